"""Which responses a stage trains on: of repeated problems, of a limited warmup, and of texts that another model wrote."""

import dataclasses
import json
import math
import struct
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, write_checkpoint, write_problems
from helpers import assert_same_weights, cached_rows, made_up_grades, metrics, record, warmup
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fkl_warmup
import lib.data
import lib.lineage
import lib.rollouts
from common import INSTRUCTION, InputError, Rollout
from experiments import toy
from lib.engines import Sampling, TorchEngine
from lib.rollouts import open_cache, sample_rollouts


def test_a_problem_that_comes_again_in_a_batch_gets_other_responses(problems):
    """Adjacent or not, and the first time the same as if it were alone."""
    tokenizer = toy.make_tokenizer()
    first, other = lib.data.load_problems(problems)[:2]
    prompts = lib.data.tokenize_prompts(tokenizer, [first, other], toy.WORDING)
    engine = TorchEngine(tiny_model(), tokenizer, max_num_seqs=3)

    def sample(*chosen):
        rollouts = sample_rollouts(engine, chosen, prompts, 3, Sampling(8), seed_key=(0, 5))
        assert [(r.problem, r.sample) for r in rollouts] == [(p, number) for p in chosen for number in range(3)]
        ids = [rollout.response_ids for rollout in rollouts]
        return [ids[start : start + 3] for start in range(0, len(ids), 3)]

    a, b, again, once_more = sample(first, other, first, first)
    assert a != again != once_more != a
    assert [a] == sample(first) and [b] == sample(other)
    assert sample(first, first, first, other) == [a, again, once_more, b]


# The cache and the order of the warmup


@pytest.fixture
def trained_on(monkeypatch):
    """The rollouts of every update that `fkl_warmup` makes."""
    updates, make_batches = [], fkl_warmup.make_batches
    recording = lambda rollouts, *rest: updates.append(rollouts) or make_batches(rollouts, *rest)
    monkeypatch.setattr(fkl_warmup, "make_batches", recording)
    return updates


def names(updates) -> list[list[tuple[str, int]]]:
    return [[(r.problem.id, r.sample) for r in update] for update in updates]


@pytest.mark.parametrize("keep", ["all", "correct"])
def test_a_limited_warmup_samples_what_it_uses(
    keep, student, teacher, problems, tmp_path, monkeypatch, trained_on, capsys
):
    """The same as the first step of a longer one, which can go on with its rollouts. A problem's responses stay together.

    Also on a machine without the packages that read data sets from the hub.
    """
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)  # to import it fails
    monkeypatch.setattr(fkl_warmup, "grade", made_up_grades)
    at_a_time = {"all": 512, "correct": 2}[keep]  # sequences: all problems, or one
    [order] = lib.data.problem_batches(lib.data.load_problems(problems), 12, 1, "warmup", 0)
    order = [problem.id for problem in order]

    def run(name: str, rollouts: str, **settings) -> None:
        settings |= dict(keep=keep, loss="sft", mini_batch_prompts=2, max_response_tokens=16, max_num_seqs=at_a_time)
        trained_on.clear()
        fkl_warmup.main(
            warmup(student, teacher, problems, tmp_path / name, rollouts=str(tmp_path / rollouts), **settings)
        )

    run("whole", "whole_rollouts")
    every = names(trained_on)
    run("short", "rollouts", max_steps=1)
    assert names(trained_on) == every[:1] and metrics(tmp_path / "short") == metrics(tmp_path / "whole")[:1]
    sampled, used = {row["id"] for row in cached_rows(tmp_path / "rollouts")}, [name for name, _ in every[0]]
    if keep == "all":
        assert sum(every, []) == [(name, sample) for name in order for sample in (0, 1)]
        assert sampled == set(used) and len(sampled) == 2
    else:  # those before the last one in use were sampled, whether or not they had a right answer, and no others
        assert sampled == set(order[: order.index(used[-1]) + 1]) > set(used) and len(sampled) < 12
        assert "learning from 4\n" in capsys.readouterr().out
    run("long", "rollouts")
    assert_same_weights(tmp_path / "whole", tmp_path / "long")


def test_epochs_repeat_until_max_steps(student, teacher, problems, tmp_path, monkeypatch, trained_on):
    """--keep correct keeps what is right and finished; --epochs, which is 1, does not end the run."""
    monkeypatch.setattr(fkl_warmup, "grade", made_up_grades)
    settings = dict(keep="correct", loss="sft", mini_batch_prompts=4, max_response_tokens=16)
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "out", **settings, max_steps=7))
    rows = cached_rows(tmp_path / "out" / "teacher_rollouts")
    right = [row for row in rows if row["correct"]]
    learnt = {(row["id"], row["sample"]) for row in right if row["finish_reason"] == "stop"}
    assert len(rows) == 24 and 0 < len(learnt) < len(right)
    flat = sum(names(trained_on), [])
    assert len(trained_on) == 7 and len(flat) == 56
    for start in range(0, 56, len(learnt)):
        one_pass = flat[start : start + len(learnt)]
        assert set(one_pass) <= learnt and len(set(one_pass)) == len(one_pass)
    assert set(record(tmp_path / "out")["trained_on"]) == {name for name, _ in learnt}
    monkeypatch.setattr(fkl_warmup, "grade", lambda rollouts, _: [setattr(r, "correct", False) for r in rollouts])
    with pytest.raises(InputError, match="no response is right and finished"):
        fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "none", **settings))


def test_a_rollout_comes_back_from_the_cache_as_it_was(problems, tmp_path):
    """Each by itself, in any order, with every digit; and a process that opens the cache again finds the same."""
    a, b, c = loaded = lib.data.load_problems(problems)[:3]
    prompts = {problem.id: [5, number] for number, problem in enumerate(loaded)}
    rollouts = [
        Rollout(problem, number, prompts[problem.id], [7] * len(logprobs), logprobs, reason, text, correct)
        for number, (problem, logprobs, reason, text, correct) in enumerate([
            (a, [-1 / 3, -2.5e-8, math.nan], "stop", '"response_ids": [1]\n\u2028é\ud800', True),
            (b, [-0.1], "length", "", True),
            (b, [float(torch.tensor(-0.7)), -12.0], "stop", "4", False),
            (c, [-math.inf, -1e-300], "length", "5", True),
        ])
    ]  # fmt: skip
    with open_cache(tmp_path / "cache", {}, loaded, prompts) as first:
        for part in (rollouts[1:3], rollouts[3:], rollouts[:1]):
            first.append(part)
    with open_cache(tmp_path / "cache", {}, loaded, prompts) as again:
        pass
    assert first.rows == {b.id: [0, 1], c.id: [2], a.id: [3]} and again.rows == {a.id: [0], b.id: [1, 2], c.id: [3]}
    assert again.right == [True, False, False, False] and again.tokens == first.tokens == 8
    bits = lambda values: [struct.pack("d", value) for value in values]
    for row in (2, 0, 3, 1):
        assert dataclasses.replace(again[row], logprobs=[]) == dataclasses.replace(rollouts[row], logprobs=[])
        assert bits(again[row].logprobs) == bits(rollouts[row].logprobs)


def test_a_cache_is_refused_when_its_responses_would_differ(student, problems, tmp_path):
    """Other end tokens, or another wording of the prompts, make other responses."""
    teacher = write_checkpoint(tmp_path / "teacher", seed=2)
    tokenizer, loaded = toy.make_tokenizer(), lib.data.load_problems(problems)
    prompts = lib.data.tokenize_prompts(tokenizer, loaded, toy.WORDING)

    def identity(prompts=prompts, **settings):
        cfg = warmup(student, teacher, problems, tmp_path / "out", **settings)
        return fkl_warmup.rollout_identity(cfg, "hash", loaded, prompts, tokenizer)

    first = identity()
    assert identity() == identity(loss="sft", epochs=2) == first != identity({**prompts, loaded[0].id: [5]})
    for change in (
        dict(temperature=0.5), dict(seed=1), dict(rollouts_per_prompt=3), dict(max_response_tokens=5), dict(stop=(":",))
    ):  # fmt: skip
        assert identity(**change) != first, change
    path = Path(teacher) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1]}))
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").touch()
    made_otherwise = "holds other rollouts .with end_tokens = .1., and this run needs .0, 1.*name"
    for name, wanted, outcome in (
        ("cache", identity(), nullcontext()),
        ("cache", identity(), nullcontext()),
        ("cache", first, pytest.raises(InputError, match=made_otherwise)),
        ("documents", first, pytest.raises(InputError, match="holds something other than rollouts")),
    ):
        with outcome, open_cache(tmp_path / name, wanted, loaded, prompts):
            pass


def test_a_second_run_waits_for_the_first_to_fill_the_cache(problems, tmp_path, capsys):
    """Otherwise both would sample the same problems, and each problem would have its responses twice."""
    [problem, *_] = loaded = lib.data.load_problems(problems)
    found, arguments = [], (tmp_path / "cache", {"seed": 0}, loaded, {problem.id: [5] for problem in loaded})

    def second():
        with open_cache(*arguments) as cache:
            found.append(list(cache.rows))

    thread = threading.Thread(target=second)
    with open_cache(*arguments) as cache:
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not found
        cache.append([Rollout(problem, 0, [5], [6, 1], [-1.0, -1.0], "stop", "4", True)])
    thread.join(60)
    assert found == [[problem.id]] and "waiting for another run to fill" in capsys.readouterr().out


# Texts


def response(problem, right=True):
    answer = problem.answer if right else str((int(problem.answer) + 1) % 10)
    return f"Guess: \\boxed{{{answer}}}"


def write_texts(path: Path, rows) -> str:
    path.write_text("".join(json.dumps({"problem": p.prompt, "response": text}) + "\n" for p, text in rows))
    return str(path)


def from_texts(model, data, out, rollouts, **settings):
    settings = dict(loss="sft", max_response_tokens=12, mini_batch_prompts=2, rollouts_per_prompt=2) | settings
    return warmup(model, None, data, out, rollouts=rollouts, **settings)


def test_sft_learns_from_texts_of_any_model(student, problems, tmp_path, trained_on, capsys):
    """Their tokens are those that follow the generation prompt; what is left out is counted."""
    a, b, _, c = lib.data.load_problems(problems)[:4]
    [stranger] = lib.data.load_problems(write_problems(tmp_path / "other.jsonl", 1, seed=7))
    learnt = [(a, response(a)), (b, response(b, right=False)), (a, response(a, right=False)), (c, response(c))]
    rows = [*learnt[:2], (stranger, "Hmm,"), (a, "Roughly:" + "1" * 20), (a, learnt[2][1] + "<|im_end|>")]
    texts = write_texts(tmp_path / "texts.jsonl", rows)
    turns = [("user", c.prompt), ("assistant", response(c)), ("user", "Thanks")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    with open(texts, "a") as file:
        file.write("{\n\n" + json.dumps(chat) + "\n" + json.dumps({"prompt": a.prompt}) + "\n")
    fkl_warmup.main(from_texts(student, problems, tmp_path / "out", texts, max_steps=3))
    printed = capsys.readouterr().out
    assert "4 responses to 3 of the 12 training problems; left out are 1 to other problems, 1 longer than " in printed
    assert "and 2 lines without a prompt and a response (the first is line 6: Expecting" in printed
    assert "responses: 4, 2 right and finished; learning from 4" in printed

    render = AutoTokenizer.from_pretrained(student).apply_chat_template
    turns = lambda p, text: [
        {"role": "user", "content": p.prompt + INSTRUCTION},
        {"role": "assistant", "content": text},
    ]
    expected = sorted(render(turns(*pair), return_dict=False) for pair in learnt)
    assert len(trained_on) == 3  # epochs are repeated
    for update in trained_on:
        assert sorted(r.prompt_ids + r.response_ids for r in update) == expected
        assert {r.finish_reason for r in update} == {"stop"} and all(r.response_ids[-1] == 1 for r in update)

    fkl_warmup.main(from_texts(student, problems, tmp_path / "correct", texts, keep="correct"))
    assert {r.text for r in trained_on[-1]} == {response(a), response(c)}

    (tmp_path / "none.jsonl").write_text('[1]\n{"prompt": "1+1", "response": "2"}\n')
    with pytest.raises(InputError, match="0 responses to 0 of the 12 .* is line 1: it is .1., not an object.; check"):
        fkl_warmup.main(from_texts(student, problems, tmp_path / "none", str(tmp_path / "none.jsonl")))

    lineage = lib.lineage.read_lineage(str(tmp_path / "out"))  # for Stage 3 and the audit
    assert lineage["parents"].keys() == {"model", "rollouts"}
    assert lineage["parents"]["rollouts"] == {"path": texts, "sha256": lib.lineage.file_sha256(Path(texts))}
    assert lib.lineage.problems_trained_on(lineage) == {a.id, b.id, c.id}


def test_special_tokens_in_a_text_end_no_turn_and_what_the_cache_has_is_not_graded_again(
    problems, tmp_path, monkeypatch
):
    """With a tokenizer of bytes, in which a special token's name can also be spelt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=AddedToken("<end>"))
    [problem, other, *_] = loaded = lib.data.load_problems(problems)
    rows = [(problem, "a<end>b"), (problem, "ab<end>"), (other, "c"), (problem, "d")]
    texts, graded = write_texts(tmp_path / "texts.jsonl", rows), []

    def grade(rollouts, grader):
        graded.append([rollout.text for rollout in rollouts])
        made_up_grades(rollouts, grader)
        if len(graded) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lib.rollouts, "PROBLEMS_AT_A_TIME", 1)
    monkeypatch.setattr(lib.rollouts, "grade", grade)
    for ends in (pytest.raises(KeyboardInterrupt), nullcontext()):
        with ends, open_cache(tmp_path / "cache", {}, loaded, {problem.id: [5] for problem in loaded}) as cache:
            lib.rollouts.read_texts(texts, cache, tokenizer, 12, None)
    assert graded == [["a<end>b", "ab", "d"], ["c"], ["c"]]
    for row, text in enumerate(["a<end>b", "ab", "d", "c"]):
        *ids, end = cache[row].response_ids
        assert tokenizer.decode(ids) == text and end == tokenizer.eos_token_id not in ids
    assert cache.rows == {problem.id: [0, 1, 2], other.id: [3]}
