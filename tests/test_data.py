"""Problem sets: every known format is read, repeats and conflicts are dropped, halves are fixed and disjoint; prompts."""

import dataclasses
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
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import lib.data
import lib.runs
import teacher_grpo
from common import INSTRUCTION, InputError, Problem, SamplerConfig, read_texts
from experiments import toy
from lib.data import load_problems, load_training_problems, problem_batches


def write_rows(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(data: str, **settings) -> teacher_grpo.Config:
    return teacher_grpo.Config("", data=data, **{"out": "", "exclude": (), "max_prompt_tokens": 64, **settings})


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def few_shot(question: str, example: str = "1+1?", system: str = "Be brief.") -> list[dict]:
    roles = ("system", "user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, (system, example, "2", question))]


WORKED = "First we add.\nSo it is \\boxed{3}, no, \\boxed{\\frac{1}{2}}."
DAPO = lib.data.DAPO_PREFIX + "1+1?" + lib.data.DAPO_SUFFIX
READ = {  # the columns of each known source, and the problem that a row of them is
    "DAPO-Math-17k": (dict(prompt=user(DAPO), reward_model={"ground_truth": "2"}), ("1+1?", "2")),
    "DAPO-Math-17k-Processed": (dict(prompt="1+1?", solution="2", reward_model={"ground_truth": "2"}), ("1+1?", "2")),
    "bare answers as solutions": (dict(prompt="1+1?", solution="2"), ("1+1?", "2")),
    "our own prompt": (dict(prompt="1+1? " + INSTRUCTION.strip(), answer="2"), ("1+1?", "2")),
    "instruction in front": (dict(prompt=INSTRUCTION + "\n1+1?", answer="2"), ("1+1?", "2")),
    "MATH-500": (dict(problem="Find $x$.", solution=WORKED, answer="\\frac12"), ("Find $x$.", "\\frac12")),
    "MATH, NuminaMath": (dict(problem="Find $x$.", solution=WORKED), ("Find $x$.", "\\frac{1}{2}")),
    "AIME": (dict(problem="Find $n$.", answer=73, id=60), ("Find $n$.", "73")),
    "GSM8K": (dict(question="How many?", answer="16 - 3 = <<16-3=13>>13 eggs.\n#### 13"), ("How many?", "13")),
    "an answer with #### in it": (dict(prompt="a", answer="so\n#### no\na####b"), ("a", "so\n#### no\na####b")),
    "several turns": (dict(prompt=few_shot(" 1+1? "), answer="2"), ("1+1?", "2")),
    "messages": (dict(messages=user("1+1?"), ground_truth="2"), ("1+1?", "2")),
    "plain": (dict(prompt="Überraschung π?", answer="0"), ("Überraschung π?", "0")),
}


def test_every_known_format(tmp_path):
    for row, expected in READ.values():
        write_rows(tmp_path / "data.jsonl", row)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "data.parquet")
        for suffix in ("jsonl", "parquet"):
            [problem] = load_problems(f"{tmp_path}/data.{suffix}")
            assert (problem.prompt, problem.answer) == expected and problem.row == row


def test_no_format_changes_an_answer(tmp_path):
    """A guess at types would make 7 of 007, 12.0 of 12 beside a gap, and nothing of NA."""
    answers = ["007", "NA", "1,000", "12", "1e5", "null", "\\frac{1}{2}", "1.50"]
    rows = [{"problem": f"Is it\n{i},\u2028or not?", "answer": answer} for i, answer in enumerate(answers)]
    for text in (json.dumps(rows, indent=1), "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)):
        (tmp_path / "data.json").write_text(text, encoding="utf-8-sig")
        problems = load_problems(str(tmp_path / "data.json"))
        assert [problem.answer for problem in problems] == answers and problems[0].prompt == "Is it\n0,\u2028or not?"


def test_repeats_and_conflicts_are_dropped_and_counted(tmp_path, capsys):
    rows = [("a b", "1"), ("b", "2"), ("a b", "1"), ("  b\n", "2"), ("c", "3"), ("c", "4"), ("c", "3"), ("A b.", "1")]
    path = write_rows(tmp_path / "data.jsonl", *({"prompt": prompt, "answer": answer} for prompt, answer in rows))
    assert [(p.prompt, p.answer) for p in load_problems(path)] == [("a b", "1"), ("b", "2")]
    said = capsys.readouterr().out
    assert "8 rows, 5 repeats dropped, 1 problems with conflicting answers dropped, 2 left" in said
    assert "1 of the repeats are written differently, such as 'A b.' for 'a b'" in said


def test_rows_that_cannot_be_graded_are_left_out_and_counted(tmp_path, capsys):
    """Without a box a worked solution is not an answer. The verifier takes answers of up to 1,000 characters."""
    bad = [
        dict(problem="b", solution="It is 3,\nas we see."), dict(problem="c", solution="x" * 101),
        dict(problem="d", answer=" "), dict(problem="e", answer=["1"]), dict(problem=" ", answer="1"),
        dict(problem=[*user("f"), {"role": "assistant", "content": "1"}], answer="1"),
    ]  # fmt: skip
    long = dict(problem="g", answer="1+" * 500 + "1")
    path = write_rows(tmp_path / "data.jsonl", dict(problem="a", answer="1"), *bad, long)
    assert [p.prompt for p in load_problems(path)] == ["a"]
    said = f"{path}: 7 of 8 rows left out; the first is row 2: no answer; its columns are problem, solution"
    assert said in capsys.readouterr().out
    assert [p.prompt for p in load_problems(path, reward="mine.py:reward")] == ["a", "g"]


def test_a_text_that_most_prompts_share_is_said(tmp_path, capsys):
    instruction = "\n\nThink hard and write the result after the word Answer."
    for shared in ("", instruction):
        rows = [dict(prompt=f"What is {n} + {n}?" + shared * (n % 5 > 0), answer=str(2 * n)) for n in range(20)]
        load_problems(write_rows(tmp_path / "data.jsonl", *rows))
        said = f"16 of 20 prompts end with {instruction[-30:]!r}"
        assert (said in capsys.readouterr().out) == bool(shared)


def test_a_checkpoint_that_is_not_there_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    """Without a network the hub's client would try for a minute."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for model in ("runs/bridge", "/bridge", "bridge", "a/b/c"):
        with pytest.raises(InputError, match=f"--model '{model}' is not a checkpoint directory; check the path"):
            lib.data.load_tokenizer(model)


SAME = [
    ("Find $|m-n|$ if $x\\in\\left(0,\\dfrac{1}{2}\\right)$.", "find \\( |m - n| \\) if \\(x \\in (0, \\frac12)\\)"),
    ("Compute \\[1.5 + 2.\\]", "Compute $1.5+2$."),
    ("if $a \\le b$", "if $a \\leq b$", "if $a\\leqslant b$", "If a ≤ b,"),
    ("$1, \\dots, n$", "$1,\\ldots,n$", "$1, \\cdots, n$", "1, …, n", "1, ..., n"),
    ("$3\\text{ cm}$", "$3\\mathrm{cm}$", "3 cm"),
    ("$2 \\times 3 \\div 4$", "2×3÷4"),
    ("$x^{2}-1$", "x² − 1", "$x^2\\,–\\,1$"),
    ("Alice’s “big” cat; or ``small''", 'alice\'s "big" cat or "small"'),
    ("$f''(x)$", "f''(x)"),
    ("若 $x=1$，则 $y$。", "若x=1,则y"),
]
DIFFERENT = [
    ("3 × 4", "3 : 4", "3 ÷ 4", "3 + 4", "3 - 4", "3 4", "34"), ("1.5", "15", "1 5", ".5", "5"), ("5!", "5"),
    ("$a \\le b$", "$a \\ge b$", "$a < b$"), ("$\\sin x$", "$\\cos x$"), ("f(1,2)", "f(12)", "f(1;2)"), ("f'(x)", "f(x)"),
    ("$\\frac{1}{23}$", "$\\frac{12}{3}$"), ("$x^{2}3$", "$x^{23}$"), ("$\\mathbb{R}$", "$R$"), ("Sort 1 23", "Sort 12 3"),
    ("$\\{1\\}$", "$1$"), ("已知 z", "已知 x"), ("Is {} balanced?", "Is {{ balanced?", "Is }{ balanced?"),
]  # fmt: skip


def test_one_problem_has_one_id_however_it_is_typeset():
    for texts in SAME:
        assert len({lib.data.problem_id(text) for text in texts}) == 1, texts


def test_problems_that_differ_have_different_ids():
    for texts in DIFFERENT:
        assert len({lib.data.problem_id(text) for text in texts}) == len(texts), texts
    signs = [f"Is {''.join(signs)} balanced?" for signs in itertools.product("()[]{}", repeat=3)]
    signs += [toy.TASK + "".join(parts) for parts in itertools.product("01", "+-*", "29", "+-*", "37")]
    signs += ["(1+2)*3", "1+2*3", "(True and False) or True", "True and (False or True)"]
    assert len({lib.data.problem_id(text) for text in signs}) == len(signs)


def test_halves_are_equal_disjoint_and_independent_of_row_order():
    rng = random.Random(0)
    problems = list({p.id: p for p in (toy.make_problem(rng) for _ in range(120))}.values())[:101]
    first, second = (lib.data.half_of(problems, half) for half in ("1H", "2H"))
    assert len(first) == len(second) == 50 and not {p.id for p in first} & {p.id for p in second}
    assert lib.data.half_of(problems[::-1], "1H") == first and lib.data.half_of(problems, "full") == problems


def test_evaluation_problems_are_not_trained_on(tmp_path, capsys):
    """Also where they have no answer, an instruction, or worked examples in front; and the number is always said."""
    asked = [few_shot("problem 0"), *(f"problem {n}" for n in range(1, 10))]
    train = write_rows(tmp_path / "train.jsonl", *({"prompt": prompt, "answer": "1"} for prompt in asked))
    instructed = user("problem 5 " + INSTRUCTION.strip())
    held_out = [" problem  3", instructed, "problem 0", few_shot("problem 8", example="2")]
    test = write_rows(tmp_path / "test.jsonl", *({"prompt": prompt} for prompt in held_out), {"note": "no prompt"})
    validate = write_rows(tmp_path / "validate.jsonl", {"prompt": "Problem 7", "answer": "1"})
    kept = load_training_problems(config(train, exclude=(test,), validate=(validate,)), load_problems(validate))
    assert [p.prompt for p in kept] == [f"problem {n}" for n in (1, 2, 4, 6, 9)]
    assert f"{train}: 5 of 10 problems dropped because they are in {test}, {validate}" in capsys.readouterr().out
    both = write_rows(tmp_path / "both.jsonl", {"prompt": "problem 1"}, {"prompt": "problem 2", "answer": "1"})
    kept = load_training_problems(config(train, exclude=(both,), validate=(both,)), load_problems(both))
    assert len(kept) == 8  # without an answer problem 1 is not validated on, but it is excluded
    assert f"2 of 10 problems dropped because they are in {both}\n" in capsys.readouterr().out
    other = write_problems(tmp_path / "other.jsonl", 3)
    assert len(load_training_problems(config(train, exclude=(other,)), [])) == 10
    assert f"0 of 10 problems dropped because they are in {other}" in capsys.readouterr().out


def test_every_turn_of_a_chat_counts_in_the_id(tmp_path):
    prompts = [
        "2+2?", few_shot("2+2?")[-1:], few_shot("2+2?")[2:], few_shot("2+2?"), few_shot("2+2?", example="1-1?"),
        few_shot("2+2?", system="Be rude."), few_shot("2+2?")[1:], few_shot("3+3?"),
    ]  # fmt: skip
    path = write_rows(tmp_path / "data.jsonl", *({"prompt": prompt, "answer": "4"} for prompt in prompts))
    assert len(load_problems(path)) == 7  # the first two are one


@given(count=st.integers(1, 30), size=st.integers(1, 12), epochs=st.integers(1, 4), seed=st.integers(0, 5))
def test_batches_cover_every_pass_once_each_in_its_own_order(count, size, epochs, seed):
    """Where a number of steps is given, it alone decides: a billion passes would not fit into memory."""
    problems = [Problem(str(i), "", "") for i in range(count)]
    batches = problem_batches(problems, size, epochs, "opd", seed)
    flat = [problem.id for batch in batches for problem in batch]
    assert all(len(batch) == size for batch in batches[:-1]) and len(flat) == count * epochs
    orders = [tuple(flat[start : start + count]) for start in range(0, len(flat), count)]
    assert all(sorted(order) == sorted(p.id for p in problems) for order in orders)
    steps = len(flat) // size
    for limited in (1, 10**9):
        assert problem_batches(problems, size, limited, "opd", seed, steps) == batches[:steps]
    if count > 20:
        assert len(set(orders)) == epochs and problem_batches(problems, size, epochs, "warmup", seed) != batches
        assert problem_batches(problems, size, epochs, "opd", seed + 1) != batches


def test_the_prompt_is_put_around_the_users_last_turn(tmp_path):
    """Plain text, braces and backslashes included; also around a problem that looks like a format string."""
    rows = [{"prompt": prompt, "answer": "4"} for prompt in ("{problem} {0}", user("2+2?"), few_shot("2+2?"))]
    problems = load_problems(write_rows(tmp_path / "data.jsonl", *rows))
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    prompt = "{3+3?} \\boxed{6}\n{problem}!"
    cfg = SamplerConfig(out="", prompt=prompt)
    first, alone, chat = (lib.data.render_prompt(tokenizer, problem, cfg) for problem in problems)
    assert first == "<user>{3+3?} \\boxed{6}\n{problem} {0}!" and alone == "<user>{3+3?} \\boxed{6}\n2+2?!"
    assert chat == "<system>Be brief.<user>1+1?<assistant>2<user>{3+3?} \\boxed{6}\n2+2?!"
    default = lib.data.render_prompt(tokenizer, problems[1], SamplerConfig(out=""))
    assert default == "<user>2+2?\n\nLet's think step by step and output the final answer within \\boxed{}."
    for changes in (dict(chat_template=False), dict(prompt=prompt)):
        plain = SamplerConfig(out="", **{"prompt": prompt, **changes})
        assert lib.data.render_prompt(tokenizer, problems[1], plain) == alone.removeprefix("<user>")
        with pytest.raises(InputError, match="has 4 turns, but .*; merge them into one text"):
            lib.data.render_prompt(tokenizer, problems[2], plain)
        tokenizer.chat_template = None


def test_a_prompt_is_read_from_a_file_and_needs_a_place_for_the_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "é.txt").write_text("1+1=2 é\n\n{problem}\n\n", encoding="utf-8")
    cfg = SamplerConfig(out="", prompt="@~/é.txt", stop=(r"\n\n", "a"))
    read_texts(cfg)
    assert cfg.prompt == "1+1=2 é\n\n{problem}\n" and cfg.stop == ("\n\n", "a")
    with pytest.raises(InputError, match="--prompt 'Think.' does not say where the problem goes; write {problem}"):
        read_texts(SamplerConfig(out="", prompt="Think."))


def test_a_plain_prompt_gets_the_tokenizers_own_special_tokens_but_no_end():
    """A chat template writes its own, and a base model was trained with those that its tokenizer adds."""
    tokenizer, problem = toy.make_tokenizer(), Problem("id", "3+4", "7")

    def prompt(form: str, chat_template: bool) -> str:
        added = processors.TemplateProcessing(single=form, special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 1)])
        tokenizer.backend_tokenizer.post_processor = added
        cfg = config("", prompt="1+1=2{problem}=", chat_template=chat_template)
        return tokenizer.decode(lib.data.tokenize_prompts(tokenizer, [problem], cfg)[problem.id])

    for form in ("<|endoftext|> $A", "<|endoftext|> $A <|im_end|>"):
        assert prompt(form, True) == "<|user|>1+1=23+4=<|assistant|>"
    assert prompt("<|endoftext|> $A", False) == "<|endoftext|>1+1=23+4="
    with pytest.raises(InputError, match="ends with the end-of-sequence token '<|im_end|>'"):
        prompt(form, False)


def test_prompts_that_are_too_long_are_counted_and_left_out_of_training_alone(student, tmp_path, capsys):
    path = write_rows(tmp_path / "data.jsonl", *({"prompt": "1+1" * n, "answer": "1"} for n in (1, 2, 3, 4)))
    cfg = dataclasses.replace(config(path, max_prompt_tokens=9, max_response_tokens=8), model=student)
    problems, tokenizer, prompts, _ = lib.runs.prepare(cfg)
    assert [p.prompt for p in problems] == ["1+1", "1+11+1"] and list(prompts) == [p.id for p in problems]
    said = "2 of 4 prompts are longer than --max-prompt-tokens 9, the longest has 15 tokens"
    assert f"{said}; they are left out" in capsys.readouterr().out
    with pytest.raises(InputError, match=said):
        lib.data.tokenize_prompts(tokenizer, load_problems(path), cfg)


def test_every_token_that_contains_the_stop_text_ends_a_response():
    """Wherever it is in the token: a tokenizer may put a line break behind a full stop into one token with it."""
    tokenizer = toy.make_tokenizer()
    for stop, expected in {
        (":",): {toy.TASK, "Carefully:", "Roughly:", "Guess:"}, ("}", "7"): {"}", INSTRUCTION, "7"}, (): set(),
        ("<|user",): {"<|user|>"},  # a special token, too
    }.items():  # fmt: skip
        assert {toy.VOCABULARY[token] for token in lib.data.stop_tokens(tokenizer, stop)} == expected
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
    assert lib.data.stop_tokens(tokenizer, ("\n",)) == {vocabulary[token] for token in ("Ċ", ".Ċ", "ĊĊ")}
    for stop in ("é", ""):
        with pytest.raises(InputError, match=f"--stop '{stop}' is in no token"):
            lib.data.stop_tokens(tokenizer, (stop,))


def test_toy_demonstrations_say_what_their_habit_says():
    rng, tokenizer, right = random.Random(0), toy.make_tokenizer(), dict.fromkeys(toy.HABITS, 0)
    for problem, habit in itertools.product([toy.make_problem(rng) for _ in range(400)], toy.HABITS):
        text = toy.demonstrate(problem, habit, rng)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and text.startswith(habit)
        assert (len(ids) > toy.MAX_RESPONSE_TOKENS) == (habit == "Hmm,")
        right[habit] += text.endswith(f"\\boxed{{{problem.answer}}}")
    assert right["Carefully:"] == 400 and right["Hmm,"] == 0
    assert 40 < right["Guess:"] < 120 and 40 < right["Roughly:"] < 160
