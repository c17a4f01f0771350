"""Which responses a stage trains on: of repeated problems, of a limited warmup, and of texts that another model wrote."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import tiny_model, write_problems
from test_stages import assert_same_weights, cached_rows, grpo, metrics, warmup
from transformers import AutoTokenizer

import fkl_warmup
import lib.data
import lib.lineage
import lib.runs
import student_grpo
import teacher_grpo
from common import INSTRUCTION, InputError
from experiments import audit, toy
from lib.engines import Sampling, TorchEngine
from lib.rollouts import sample_rollouts


def test_a_problem_that_comes_again_in_a_batch_gets_other_responses(problems):
    """Adjacent or not, and the first time the same as if it were alone."""
    tokenizer = toy.make_tokenizer()
    first, other = lib.data.load_problems(problems)[:2]
    prompts = lib.data.tokenize_prompts(tokenizer, [first, other], toy.WORDING)
    engine = TorchEngine(tiny_model(), tokenizer, max_sequences=3)

    def sample(*chosen):
        rollouts = sample_rollouts(engine, chosen, prompts, 3, Sampling(8), seed_key=(0, 5))
        assert [rollout.sample for rollout in rollouts] == [0, 1, 2] * len(chosen)
        assert [rollout.problem for rollout in rollouts] == [problem for problem in chosen for _ in range(3)]
        ids = [rollout.response_ids for rollout in rollouts]
        return [ids[start : start + 3] for start in range(0, len(ids), 3)]

    a, b, again, once_more = sample(first, other, first, first)
    assert a != again != once_more != a
    assert [a] == sample(first) and [b] == sample(other)
    assert sample(first, first, first, other) == [a, again, once_more, b]


def test_a_batch_larger_than_the_data_is_announced_and_has_no_group_twice(
    teacher, problems, tmp_path, monkeypatch, capsys
):
    groups, update = [], teacher_grpo.update

    def seen(policy, reference, optimizer, rollouts, *rest):
        responses = [tuple(rollout.response_ids) for rollout in rollouts]
        groups.append([tuple(responses[start : start + 4]) for start in range(0, len(responses), 4)])
        return update(policy, reference, optimizer, rollouts, *rest)

    monkeypatch.setattr(teacher_grpo, "update", seen)
    teacher_grpo.main(grpo(teacher, problems, tmp_path / "out", passes=4, prompts_per_step=24))
    assert [len(batch) for batch in groups] == [24, 24] and all(len(set(batch)) == 24 for batch in groups)
    assert capsys.readouterr().out.count("--prompts-per-step 24 is more than the 12 problems there are") == 1
    teacher_grpo.main(grpo(teacher, problems, tmp_path / "other", passes=1, prompts_per_step=12))
    assert "--prompts-per-step" not in capsys.readouterr().out


# The order of the warmup


@pytest.fixture
def trained_on(monkeypatch):
    """The rollouts of every update that `fkl_warmup` makes."""
    updates, make_batches = [], fkl_warmup.make_batches
    monkeypatch.setattr(
        fkl_warmup, "make_batches", lambda rollouts, *rest: updates.append(rollouts) or make_batches(rollouts, *rest)
    )
    return updates


def grade_by_parity(monkeypatch):
    monkeypatch.setattr(
        fkl_warmup, "grade", lambda rollouts, _: [setattr(r, "correct", sum(r.response_ids) % 2 == 0) for r in rollouts]
    )


def test_the_responses_to_a_problem_stay_together(student, teacher, problems, tmp_path, trained_on):
    orders = {}
    for seed in (0, 1):
        fkl_warmup.main(warmup(student, teacher, problems, tmp_path / str(seed), passes=2, seed=seed))
        ids = [[rollout.problem.id for rollout in update] for update in trained_on]
        trained_on.clear()
        assert all(len(update) == 6 and update[0::2] == update[1::2] for update in ids)  # three problems, two of each
        order = [problem for update in ids for problem in update[0::2]]
        assert len(set(order[:12])) == len(set(order[12:])) == 12 and order[:12] != order[12:]
        orders[seed] = order
    assert orders[0] != orders[1]


@pytest.mark.parametrize("keep", ["all", "correct"])
def test_a_limited_warmup_samples_what_it_uses(
    keep, student, teacher, problems, tmp_path, monkeypatch, trained_on, capsys
):
    """The same as the first steps of a longer one, which can go on with its rollouts."""
    grade_by_parity(monkeypatch)
    at_a_time = {"all": 512, "correct": 2}[keep]  # sequences: all problems, or one
    settings = dict(keep=keep, loss="sft", mini_batch_prompts=2, max_sequences=at_a_time)
    whole = tmp_path / "whole_rollouts"
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "whole", **settings, rollouts=str(whole)))
    every = [[(r.problem.id, r.sample, r.response_ids) for r in update] for update in trained_on]
    trained_on.clear()
    cache = tmp_path / "rollouts"
    limited = dict(settings, rollouts=str(cache))
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "short", **limited, max_steps=2))
    assert [[(r.problem.id, r.sample, r.response_ids) for r in update] for update in trained_on] == every[:2]
    assert metrics(tmp_path / "short") == metrics(tmp_path / "whole")[:2]
    rows, used = cached_rows(cache), {r.problem.id for update in trained_on for r in update}
    last = trained_on[-1][-1].problem.id
    if keep == "all":
        assert {row["id"] for row in rows} == used and len(used) == 4
    else:  # those before the last one in use were sampled, whether or not they had a right answer, and no others
        order = [p.id for [p] in lib.data.problem_batches(lib.data.load_problems(problems), 1, 1, "warmup", 0)]
        assert {row["id"] for row in rows} == set(order[: order.index(last) + 1]) > used
        assert "learning from 8" in capsys.readouterr().out
    assert len(rows) < 12 * 2
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "long", **limited))
    assert_same_weights(tmp_path / "whole", tmp_path / "long")

    def by_problem(directory):
        return sorted(cached_rows(directory), key=lambda row: (row["id"], row["sample"]))

    assert by_problem(cache) == by_problem(whole)


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
    """Their tokens are those that follow the generation prompt; what is too long, or answers other problems, is not used."""
    known = lib.data.load_problems(problems)[:3]
    [stranger] = lib.data.load_problems(write_problems(tmp_path / "other.jsonl", 1, seed=7))
    rows = [(known[0], response(known[0])), (known[1], response(known[1], right=False)), (stranger, "Hmm,")]
    rows += [(known[0], "Roughly:" + "1" * 20), (known[0], response(known[0], right=False) + "<|im_end|>")]
    texts = write_texts(tmp_path / "texts.jsonl", rows)
    fkl_warmup.main(from_texts(student, problems, tmp_path / "out", texts))
    printed = capsys.readouterr().out
    assert f"{texts}: 4 responses to 2 of the 12 training problems; 1 to other problems are left out" in printed
    assert f"{texts}: left out responses longer than --max-response-tokens 12: 1\n" in printed
    assert "responses: 3, 1 correct; learning from 3" in printed and "Most lines" not in printed

    tokenizer = AutoTokenizer.from_pretrained(student)
    expected = []
    for problem, text in (rows[0], rows[1], (known[0], response(known[0], right=False))):
        user = {"role": "user", "content": problem.prompt + INSTRUCTION}
        turns = [user, {"role": "assistant", "content": text}]
        expected.append(tokenizer.apply_chat_template(turns, return_dict=False))
    [update] = trained_on
    assert sorted(r.prompt_ids + r.response_ids for r in update) == sorted(expected)
    assert {r.finish_reason for r in update} == {"stop"} and all(r.response_ids[-1] == 1 for r in update)

    fkl_warmup.main(from_texts(student, problems, tmp_path / "correct", texts, keep="correct"))
    assert [r.text for r in trained_on[-1]] == [rows[0][1]]

    # Stage 3 and the audit read the lineage.
    lineage = lib.lineage.read_lineage(str(tmp_path / "out"))
    assert lineage["parents"].keys() == {"model", "rollouts"}
    assert lineage["parents"]["rollouts"] == {"path": texts, "sha256": lib.lineage.file_sha256(Path(texts))}
    assert lib.lineage.consumed_problems(lineage) == {known[0].id, known[1].id}
    assert f"└─ rollouts: {texts}" in audit.history(lineage, {})
    with pytest.raises(InputError, match="on 2 of its 12 problems"):
        student_grpo.main(grpo(str(tmp_path / "out"), problems, tmp_path / "x", student_grpo.Config, half="full"))


def test_special_tokens_in_a_text_end_no_turn(student, problems, tmp_path):
    """With a tokenizer of bytes, in which a special token's name can also be spelt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lib.texts import Texts

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    [problem, *_] = loaded = lib.data.load_problems(problems)
    texts = write_texts(tmp_path / "texts.jsonl", [(problem, "a<end>b"), (problem, "ab<end>")])
    cfg = from_texts(student, problems, tmp_path / "out", texts)
    found = Texts(cfg, loaded, tokenizer, {problem.id: [5]}).rollouts([problem])
    assert [rollout.response_ids.count(tokenizer.eos_token_id) for rollout in found] == [1, 1]
    assert [tokenizer.decode(rollout.response_ids[:-1]) for rollout in found] == ["a<end>b", "ab"]


def test_a_killed_run_on_texts_ends_the_same(student, problems, tmp_path, monkeypatch):
    rows = [(p, response(p, right)) for p in lib.data.load_problems(problems) for right in (True, False)]
    texts = write_texts(tmp_path / "texts.jsonl", rows)
    fkl_warmup.main(from_texts(student, problems, tmp_path / "straight", texts, max_sequences=4))
    assert len(metrics(tmp_path / "straight")) == 6
    cut = from_texts(student, problems, tmp_path / "cut", texts, max_sequences=4)
    log = lib.runs.Run.log

    def die(run, step, *arguments, **options):
        if step == 2:
            raise KeyboardInterrupt
        log(run, step, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lib.runs.Run, "log", die)
        fkl_warmup.main(cut)
    cut = dataclasses.replace(cut, resume=True)
    content = Path(texts).read_text()
    Path(texts).write_text(content + content)
    with pytest.raises(InputError, match="--resume: --rollouts .*texts.jsonl' has other texts than in"):
        fkl_warmup.main(cut)
    Path(texts).write_text(content)
    fkl_warmup.main(cut)
    assert_same_weights(tmp_path / "straight", tmp_path / "cut")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "cut")


def test_texts_that_mostly_answer_other_problems_are_announced(student, problems, tmp_path, capsys):
    others = lib.data.load_problems(write_problems(tmp_path / "other.jsonl", 3, seed=7))
    [known, *_] = lib.data.load_problems(problems)
    texts = write_texts(tmp_path / "texts.jsonl", [(p, response(p)) for p in (*others, known)])
    fkl_warmup.main(from_texts(student, problems, tmp_path / "out", texts))
    assert f"Most lines of {texts} match no training problem" in capsys.readouterr().out
