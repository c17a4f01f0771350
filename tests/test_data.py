"""Problem sets: every known format is read, repeats and conflicts are dropped, halves are fixed and disjoint."""

import itertools
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_problems
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

import lib.data
import lib.runs
import teacher_grpo
from common import INSTRUCTION, InputError, Problem, SamplerConfig, read_texts
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
    "an answer with #### in it": ({"prompt": "a", "answer": "so\n#### no\na####b"}, ("a", "so\n#### no\na####b")),
    "an answer that ends in another heading": ({"prompt": "a", "answer": "x\n####y"}, ("a", "x\n####y")),
    "an answer that is only GSM8K's line": ({"prompt": "a", "answer": "#### 1,000 "}, ("a", "1,000")),
    "several turns": (
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1+1? "}], "answer": "2"},
        ("1+1?", "2"),
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
    assert (problem.prompt, problem.answer) == expected and problem.row == row


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


BRACKETS = st.lists(st.sampled_from("()[]{}"), min_size=1, max_size=9)
ITEMS = st.lists(st.one_of(st.integers(-20, 999).map(str), st.text("ab", min_size=1, max_size=3)), max_size=5)
DIFFERENT = {  # problems that only their signs tell apart: made of a value, one text for each value
    "brackets": (BRACKETS, lambda signs: f"Are these brackets balanced: {''.join(signs)}?"),
    "brackets with spaces": (BRACKETS, lambda signs: f"Close the brackets. {' '.join(signs)}"),
    "a list": (ITEMS, lambda items: f"Sort the list [{', '.join(items)}]."),
    "a list with spaces": (ITEMS, lambda items: f"Sort {' '.join(items)}"),
    "a list of lists": (st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=3), "Flatten {}.".format),
    "quoted words": (st.lists(st.tuples(st.booleans(), st.sampled_from("pqr")), max_size=4), lambda words: "Which words of "
        + ", ".join(f'"{word}"' if quoted else word for quoted, word in words) + " are quoted?"),
    "an order of words": (st.permutations(["red", "blue", "green", "a", "x"]), " ".join),
    "an order of Chinese signs": (st.permutations("红蓝绿黄"), "".join),
    "an order of Arabic words": (st.permutations(["أحمر", "أزرق", "ب"]), " ".join),
    "a question mark": (st.lists(st.sampled_from("?123"), max_size=4), lambda terms: f"Continue 1, {', '.join(terms)}, 9"),
    "truth": (st.lists(st.sampled_from(["(", ")", "True", "False", "and", "not"]), max_size=7), " ".join),
    "logic": (st.lists(st.sampled_from(["(", ")", "p", "q", "~", "&", "|"]), max_size=7), " ".join),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
@given(st.data())
def test_problems_that_differ_in_signs_have_different_ids(name, data):
    values, text = DIFFERENT[name]
    first, second = data.draw(values), data.draw(values)
    assert (lib.data.problem_id(text(first)) == lib.data.problem_id(text(second))) == (text(first) == text(second))


def test_problems_that_differ_in_one_sign_are_all_kept(tmp_path):
    """Each pair that the ids did not tell apart would be one problem less, or a conflict."""
    texts = [f"Is {''.join(signs)} balanced?" for signs in itertools.product("()[]{}", repeat=3)]
    texts += ["(1+2)*3", "1+2*3", "(True and False) or True", "True and (False or True)", "f(1,2)", "f(12)", "f(1;2)"]
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": text, "answer": str(i)} for i, text in enumerate(texts)])
    assert [problem.prompt for problem in lib.data.load_problems(path)] == texts


def test_copies_that_differ_in_a_bracket_or_a_quotation_mark_are_listed():
    """Copies in DAPO-Math-17k that no rule could recognise. The list is by id, so a change of the rule breaks it."""
    for first, second in [
        ("Find the decimal form of the largest prime divisor of \\(100111011_6\\).",
         "Find [the decimal form of] the largest prime divisor of $100111011_6$."),
        ('Find the number of rearrangements of the letters in the word "MATHMEET" that begin and end with the same letter, '
         'such as "TAMEMHET".',
         "Find the number of rearrangements of the letters in the word MATHMEET that begin and end with the same letter "
         "such as TAMEMHET."),
    ]:  # fmt: skip
        assert lib.data.problem_id(first) == lib.data.problem_id(second)
        assert lib.data.problem_id(first[1:]) != lib.data.problem_id(second[1:])


def test_repeats_that_differ_in_more_than_layout_are_counted_and_shown(tmp_path, capsys):
    rows = ["Is $x$ odd, or is it even", "is x odd or is it even?", "Is  \\(x\\) odd, or is it even"]
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": prompt, "answer": "1"} for prompt in rows])
    assert len(lib.data.load_problems(path)) == 1
    said = capsys.readouterr().out
    assert "1 of the repeats differ from the first copy in punctuation or capitals" in said and repr(rows[1]) in said


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
    validate = write_rows(tmp_path / "validate.jsonl", [{"prompt": "problem 7?", "answer": "1"}])
    kept = lib.data.load_training_problems(train, "full", 0, (test,), (validate,))
    assert {p.prompt for p in kept} == {f"problem {i}" for i in range(10) if i not in (3, 5, 7)}
    assert f"3 problems dropped because they stand in {test}, {validate}" in capsys.readouterr().out


def test_an_evaluation_problem_is_excluded_also_behind_examples(tmp_path):
    rows = [{"prompt": few_shot(f"problem {i}"), "answer": "1"} for i in range(3)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", [{"prompt": "problem 1", "answer": "1"}])
    assert [p.prompt for p in lib.data.load_training_problems(train, "full", 0, (test,))] == ["problem 0", "problem 2"]


def few_shot(question, example="1+1?", system="Be brief."):
    roles = ("system", "user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, (system, example, "2", question))]


def test_every_turn_of_a_chat_is_rendered_and_in_the_id(tmp_path):
    prompts = [
        "2+2?", few_shot("2+2?")[-1:], few_shot("2+2?")[2:], few_shot("2+2?"), few_shot("2+2?", example="1-1?"),
        few_shot("2+2?", system="Be rude."), few_shot("2+2?")[1:], few_shot("3+3?"),
    ]  # fmt: skip
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": prompt, "answer": "4"} for prompt in prompts])
    problems = lib.data.load_problems(path)
    assert len(problems) == 7  # the first two are one
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    rendered = [
        lib.data.render_prompt(tokenizer, problem, SamplerConfig(out="", instruction=" Think!")) for problem in problems
    ]
    assert rendered[0] == "<user>2+2? Think!" and rendered[1] == "<assistant>2<user>2+2? Think!"
    assert rendered[2] == "<system>Be brief.<user>1+1?<assistant>2<user>2+2? Think!"
    kind = SamplerConfig(out="", instruction="!", system_prompt="Be kind.")
    assert lib.data.render_prompt(tokenizer, problems[0], kind) == "<system>Be kind.<user>2+2?!"
    tokenizer.chat_template = None
    assert lib.data.render_prompt(tokenizer, problems[0], SamplerConfig(out="", instruction="!")) == "2+2?!"


def test_a_prefix_stands_in_front_of_the_problem_in_the_users_last_turn(tmp_path):
    rows = [{"prompt": "2+2?", "answer": "4"}, {"prompt": few_shot("2+2?"), "answer": "4"}]
    alone, chat = lib.data.load_problems(write_rows(tmp_path / "data.jsonl", rows))
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    cfg = SamplerConfig(out="", prefix="3+3? 6\n", instruction="!")
    assert lib.data.render_prompt(tokenizer, alone, cfg) == "<user>3+3? 6\n2+2?!"
    assert lib.data.render_prompt(tokenizer, chat, cfg) == "<system>Be brief.<user>1+1?<assistant>2<user>3+3? 6\n2+2?!"
    plain = SamplerConfig(out="", prefix="3+3? 6\n", instruction="!", chat_template=False)
    assert lib.data.render_prompt(tokenizer, alone, plain) == "3+3? 6\n2+2?!"
    tokenizer.chat_template = None
    assert lib.data.render_prompt(tokenizer, alone, cfg) == "3+3? 6\n2+2?!"


def test_a_plain_prompt_gets_the_tokenizers_own_special_tokens():
    """A chat template writes its own, and a base model was trained with those that its tokenizer adds."""
    tokenizer = toy.make_tokenizer()
    begin = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    problem = lib.data.new_problem("3+4", "7")
    settings = dict(model="", data="", out="", prefix="1+1=2", instruction="=", max_prompt_tokens=64)
    texts = {True: "<|user|>1+1=23+4=<|assistant|>", False: "<|endoftext|>1+1=23+4="}
    for chat_template, text in texts.items():
        cfg = teacher_grpo.Config(**settings, chat_template=chat_template)
        [ids] = lib.data.tokenize_prompts(tokenizer, [problem], cfg).values()
        assert tokenizer.decode(ids) == text


def test_texts_are_read_from_files_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "é.txt").write_text("1+1=2 é\n\n", encoding="utf-8")
    cfg = SamplerConfig(
        out="", prefix="@~/é.txt", instruction=f"@{tmp_path}/é.txt", system_prompt="a@b", stop=(r"\n\n", "a")
    )
    read_texts(cfg)
    assert cfg.prefix == cfg.instruction == "1+1=2 é\n\n"
    assert cfg.system_prompt == "a@b" and cfg.stop == ("\n\n", "a")


# The ends of responses


def test_every_token_that_contains_the_stop_text_ends_a_response():
    """Wherever in the token it stands: a tokenizer may put a line break behind a full stop into one token with it."""
    tokenizer = toy.make_tokenizer()

    def words(*stop: str) -> set[str]:
        return {toy.VOCABULARY[token] for token in lib.data.stop_tokens(tokenizer, stop)}

    assert words(":") == {toy.TASK, "Carefully:", "Roughly:", "Guess:"}
    assert words("}") == {"}", INSTRUCTION} and words("}", "7") == {"}", INSTRUCTION, "7"} and words() == set()
    assert words("<|user") == {"<|user|>"}  # a special token, too
    configured = GenerationConfig(eos_token_id=[0, 2])
    assert lib.data.end_tokens(configured, tokenizer, ("7",)) == [0, 1, 2, toy.VOCABULARY.index("7")]
    assert lib.data.end_tokens(None, tokenizer) == [1]


def test_a_line_break_is_found_in_a_vocabulary_of_bytes():
    """There it is spelt as another sign. `é` has two bytes, and so no token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, ".Ċ", "Ġ.", "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(".", "Ċ"), ("Ġ", "."), ("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    found = lib.data.stop_tokens(tokenizer, ("\n",))
    assert found == {vocabulary[token] for token in ("Ċ", ".Ċ", "ĊĊ")}
    assert lib.data.stop_tokens(tokenizer, (" .",)) == {vocabulary["Ġ."]}
    with pytest.raises(InputError, match="--stop 'é' stands in no single token"):
        lib.data.stop_tokens(tokenizer, ("é",))


def test_a_stage_samples_from_the_whole_chat(student, tmp_path):
    """The toy's template has one sign for every turn that is not the user's."""
    messages = [
        {"role": role, "content": text} for role, text in (("user", "1+1"), ("assistant", "2"), ("user", "3+3"))
    ]
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": messages, "answer": "6"}])
    cfg = teacher_grpo.Config(
        student,
        data=path,
        out=str(tmp_path / "out"),
        exclude=(),
        max_response_tokens=8,
        system_prompt="7-7",
        instruction="",
    )
    _, tokenizer, prompts = lib.runs.prepare(cfg)
    expected = "<|assistant|>7-7<|im_end|><|user|>1+1<|assistant|>2<|im_end|><|user|>3+3<|assistant|>"
    assert list(prompts.values()) == [tokenizer(expected)["input_ids"]]


def test_dapos_wrapper_is_stripped_from_the_last_of_several_turns(tmp_path):
    question = lib.data.DAPO_PREFIX + "2+2?" + lib.data.DAPO_SUFFIX
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": few_shot(question), "answer": "4"}])
    [problem] = lib.data.load_problems(path)
    assert lib.data.chat_messages(problem, "!", "")[-1] == {"role": "user", "content": "2+2?!"}


def test_a_tilde_stands_for_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "数据 é").mkdir()
    write_problems(tmp_path / "数据 é" / "x.jsonl", 3)
    assert len(lib.data.load_problems("~/数据 é/x.jsonl")) == 3
    toy.make_tokenizer().save_pretrained(tmp_path / "数据 é" / "model")
    assert len(lib.data.load_tokenizer("~/数据 é/model")) == len(toy.VOCABULARY)


@given(count=st.integers(1, 30), size=st.integers(1, 12), passes=st.integers(1, 4), seed=st.integers(0, 5))
def test_batches_cover_every_pass_once(count, size, passes, seed):
    problems = [Problem(str(i), "", "") for i in range(count)]
    batches = lib.data.problem_batches(problems, size, passes, seed)
    flat = [problem for batch in batches for problem in batch]
    assert all(len(batch) == size for batch in batches[:-1]) and len(flat) == count * passes
    for number in range(passes):
        assert sorted(p.id for p in flat[number * count : (number + 1) * count]) == sorted(p.id for p in problems)


def test_passes_that_no_step_reaches_are_not_made():
    """With --max-steps a run may ask for any number of passes. A billion of them would not fit into memory."""
    problems = [Problem(str(i), "", "") for i in range(5)]
    assert lib.data.problem_batches(problems, 3, 10**9, 0, 4) == lib.data.problem_batches(problems, 3, 3, 0)[:4]
    assert len(lib.data.problem_batches(problems, 3, 2, 0, 100)) == 4


def test_every_pass_has_an_order_of_its_own():
    problems = [Problem(str(i), "", "") for i in range(12)]
    passes = lib.data.problem_batches(problems, 12, 3, seed=0)
    assert len({tuple(p.id for p in one) for one in passes}) == 3
    assert lib.data.problem_batches(problems, 12, 3, seed=1) != passes


BAD = {
    "no such file": ("nowhere.jsonl", "is not a readable .jsonl or .parquet file"),
    "unknown name": ("no-such-set", "is no known data set; give one of dapo,"),
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
