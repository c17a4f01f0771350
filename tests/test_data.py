"""Problem sets: every known format is read, repeats and conflicts are dropped, halves are fixed and disjoint."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_problems
from hypothesis import given
from hypothesis import strategies as st

import lib.data
from common import InputError, Problem
from experiments import toy


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = {  # one row in the columns of each known source, and the problem that it is
    "DAPO-Math-17k": (
        {
            "prompt": [{"role": "user", "content": lib.data.DAPO_PREFIX + "What is 1+1?" + lib.data.DAPO_SUFFIX}],
            "reward_model": {"ground_truth": "2", "style": "rule"},
            "extra_info": {"index": "x"},
        },
        ("What is 1+1?", "2"),
    ),
    "DAPO-Math-17k, wrapper stripped": (
        {"prompt": [{"role": "user", "content": "What is 1+1?"}], "reward_model": {"ground_truth": "2"}},
        ("What is 1+1?", "2"),
    ),
    "DAPO-Math-17k-Processed": (
        {"prompt": "What is 1+1?", "solution": "2", "reward_model": {"ground_truth": "2"}, "data_source": "math_dapo"},
        ("What is 1+1?", "2"),
    ),
    "MATH-500": (
        {"problem": "Find $x$.", "solution": "It is $\\boxed{\\frac12}$.", "answer": "\\frac12", "level": 2},
        ("Find $x$.", "\\frac12"),
    ),
    "AIME": ({"problem": "Find $n$.", "answer": 73, "id": 60}, ("Find $n$.", "73")),
    "GSM8K": (
        {"question": "How many eggs?", "answer": "16 - 3 = <<16-3=13>>13 eggs.\n#### 13"},
        ("How many eggs?", "13"),
    ),
    "plain": ({"prompt": "Überraschung π?", "answer": "0"}, ("Überraschung π?", "0")),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_known_format(tmp_path, name, suffix):
    row, expected = ROWS[name]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        write_rows(path, [row])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    [problem] = lib.data.load_problems(str(path))
    assert (problem.prompt, problem.answer) == expected


def test_repeats_and_conflicts_are_dropped_and_counted(tmp_path, capsys):
    rows = [("a", "1"), ("b", "2"), ("a", "1"), ("  b\n", "2"), ("c", "3"), ("c", "4"), ("c", "3")]
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in rows])
    assert [(p.prompt, p.answer) for p in lib.data.load_problems(path)] == [("a", "1"), ("b", "2")]
    assert "7 rows, 4 repeats dropped, 1 problems with conflicting answers dropped, 2 left" in capsys.readouterr().out


def test_one_problem_has_one_id_however_it_is_typeset(tmp_path):
    same = [
        [
            "Find $|m-n|$ if $x\\in\\left(0,\\dfrac{1}{2}\\right)$.",
            "find \\( |m - n| \\) if \\(x \\in (0, \\frac12)\\)",
        ],
        ["Compute \\[1.5 + 2.\\]", "Compute $1.5+2$."],
    ]
    different = ["z^4+z^2+1", "z^4-z^2+1", "1.5+2", "15+2", "n!", "n", "x<y", "x>y", "已知 z", "已知 x"]
    for first, second in same:
        assert lib.data.problem_id(first) == lib.data.problem_id(second)
    assert len({lib.data.problem_id(prompt) for prompt in different}) == len(different)


def test_halves_are_equal_disjoint_and_independent_of_row_order():
    rng = random.Random(0)
    problems = list({p.id: p for p in (toy.make_problem(rng) for _ in range(101))}.values())[:101]
    first, second = (lib.data.half_of(problems, half) for half in ("1H", "2H"))
    assert len(first) == len(second) == 50 and not {p.id for p in first} & {p.id for p in second}
    assert lib.data.half_of(problems[::-1], "1H") == first
    assert lib.data.half_of(problems, "1H", split_seed=1) != first
    assert lib.data.half_of(problems, "full") == problems


def test_evaluation_problems_are_not_trained_on(tmp_path, capsys):
    train = write_rows(tmp_path / "train.jsonl", [{"prompt": f"problem {i}", "answer": "1"} for i in range(10)])
    test = write_rows(tmp_path / "test.jsonl", [{"prompt": f" problem  {i}", "answer": "1"} for i in (3, 5)])
    kept = lib.data.load_training_problems(train, "full", 0, (test,))
    assert {p.prompt for p in kept} == {f"problem {i}" for i in range(10) if i not in (3, 5)}
    assert "2 problems dropped" in capsys.readouterr().out


@given(count=st.integers(1, 30), size=st.integers(1, 12), passes=st.integers(1, 4), seed=st.integers(0, 5))
def test_batches_cover_every_pass_once(count, size, passes, seed):
    problems = [Problem(str(i), "", "") for i in range(count)]
    batches = lib.data.problem_batches(problems, size, passes, seed)
    flat = [problem for batch in batches for problem in batch]
    assert all(len(batch) == size for batch in batches[:-1]) and len(flat) == count * passes
    for number in range(passes):
        assert sorted(p.id for p in flat[number * count : (number + 1) * count]) == sorted(p.id for p in problems)


def test_every_pass_has_an_order_of_its_own():
    problems = [Problem(str(i), "", "") for i in range(12)]
    passes = lib.data.problem_batches(problems, 12, 3, seed=0)
    assert len({tuple(p.id for p in one) for one in passes}) == 3
    assert lib.data.problem_batches(problems, 12, 3, seed=1) != passes


BAD = {
    "no such file": ("nowhere.jsonl", "is not a readable .jsonl or .parquet file"),
    "unknown name": ("no-such-set", "is unknown; give one of dapo,"),
    "a directory": (".", "is not a readable .jsonl or .parquet file"),
    "not JSON": (["{'prompt': 1}"], "line 1 of"),
    "a bad line far down": (['{"prompt": "a", "answer": "1"}'] * 730 + ['{"prompt": "b", "ans'], "line 731 of"),
    "wrong columns": (['{"text": "a", "label": "1"}'], "row 1 of"),
    "no answer": (['{"prompt": "a"}'], "no answer in it"),
    "empty answer": (['{"prompt": "a", "answer": "  "}'], "the answer is '  '"),
    "answer is a list": (['{"prompt": "a", "answer": ["1"]}'], "the answer is ['1']"),
    "a row is a list": (["[1, 2]"], "row 1 of"),
    "empty": ([], "holds no usable problem (0 rows read)"),
    "only conflicts": (['{"prompt": "a", "answer": "1"}', '{"prompt": "a", "answer": "2"}'], "holds no usable problem"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_gives_one_sentence(tmp_path, name):
    content, message = BAD[name]
    if isinstance(content, list):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(content), encoding="utf-8")
        content = str(path)
    with pytest.raises(InputError) as error:
        lib.data.load_problems(content)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unreadable_parquet_is_said(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(InputError, match="data.parquet"):
        lib.data.load_problems(str(tmp_path / "data.parquet"))


def test_half_of_one_row(tmp_path):
    with pytest.raises(InputError, match="--half 1H needs at least two problems"):
        lib.data.load_training_problems(write_problems(tmp_path / "one.jsonl", 1), "1H", 0, ())


def test_everything_excluded(tmp_path):
    path = write_problems(tmp_path / "data.jsonl", 3)
    with pytest.raises(InputError, match="is left outside --exclude"):
        lib.data.load_training_problems(path, "full", 0, (path,))


def test_toy_demonstrations_say_what_their_habit_says():
    rng, tokenizer = random.Random(0), toy.make_tokenizer()
    right = dict.fromkeys(toy.HABITS, 0)
    for _ in range(400):
        problem = toy.make_problem(rng)
        for habit in toy.HABITS:
            text = toy.demonstrate(problem, habit, rng)
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text and text.startswith(habit)
            right[habit] += text.endswith(f"\\boxed{{{problem.answer}}}")
            assert (len(ids) > toy.MAX_RESPONSE_TOKENS) == (habit == "Hmm,")
    assert right["Carefully:"] == 400 and right["Hmm,"] == 0
    assert 40 < right["Guess:"] < 120 and 40 < right["Roughly:"] < 160
