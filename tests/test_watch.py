"""What can be seen of a run while it goes on: kept responses and warnings."""

import dataclasses
import json
import re

import pytest
import torch
from helpers import RUNS, grade_with, grpo, made_up_grades, metrics

import teacher_grpo
from common import Problem, Rollout
from lib.files import json_lines
from lib.watch import find_warnings, one_sample, sample_lines

# Responses


@pytest.mark.parametrize("stage", ["teacher", "warmup", "bridge"])
def test_every_stage_keeps_a_few_responses_of_each_step(
    stage, student, teacher, problems, tmp_path, monkeypatch, capsys
):
    def grades(rollouts, grader):
        made_up_grades(rollouts, grader)
        for number, rollout in enumerate(rollouts):
            rollout.how = ("timeout", "error", "no_answer", "fast")[number % 4]

    grade_with(monkeypatch, grades)
    more = {"require_finished": False} if stage == "teacher" else {}
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", max_steps=3, save_every=2, **more)
    script.main(config)
    kept = json_lines(tmp_path / "out" / "samples.jsonl")
    for step in range(3):
        found = [line for line in kept if line["step"] == step]
        assert 2 <= len(found) <= 4 and len({(line["id"], line["sample"]) for line in found}) == len(found)
    pairs = [kept[start : start + 2] for start in range(0, len(kept), 4)]
    if stage == "teacher":
        assert any(best["id"] == worst["id"] and best["advantage"] > 0 > worst["advantage"] for best, worst in pairs)
    shown = capsys.readouterr().out
    assert "step 0: " in shown and "step 2: " in shown and "step 1: " not in shown
    shares = {(line.get("no_answer"), line.get("verifier_failed")) for line in metrics(tmp_path / "out")}
    assert shares == {{"teacher": (1 / 4, 2 / 4), "bridge": (1 / 6, 4 / 6), "warmup": (None, None)}[stage]}


def test_the_reward_that_is_shown_is_the_one_that_the_loss_used(student, problems, tmp_path, monkeypatch):
    """Also where a fork has another `rewards_of`."""
    rewards_of = lambda rollouts, require_finished: torch.tensor([-0.1 * len(r.response_ids) for r in rollouts])
    monkeypatch.setattr(teacher_grpo, "rewards_of", rewards_of)
    teacher_grpo.main(grpo(student, problems, tmp_path / "out", max_steps=1))
    shown = json_lines(tmp_path / "out" / "samples.jsonl")
    assert [line["reward"] for line in shown] == pytest.approx([-0.1 * line["tokens"] for line in shown]) and len(
        shown
    ) == 4


def rollout(problem: str, sample: int, correct: bool, **changes) -> Rollout:
    given = Problem(problem, f"prompt of {problem}", "7"), sample, [1], [2, 3], [0.0, 0.0], "stop", "text", correct
    return dataclasses.replace(Rollout(*given), **changes)


def test_best_and_worst_of_prompts_with_spread_come_first():
    chosen = lambda *rollouts: [(line["id"], line["sample"], line["reward"]) for line in sample_lines(5, rollouts)]
    found = chosen(*(rollout("a", i, False) for i in range(3)), *(rollout("b", i, i == 2) for i in range(3)))
    assert found == [("b", 2, 1.0), ("b", 1, 0.0), ("a", 0, 0.0), ("a", 2, 0.0)]
    found = chosen(rollout("a", 0, True, reward=0.2), rollout("a", 1, False, reward=0.7), rollout("c", 0, True))
    assert found == [("a", 1, 0.7), ("a", 0, 0.2), ("c", 0, 1.0)]


def test_why_says_what_the_grader_found_and_not_what_was_paid():
    ended, cut = dict(how="fast", reward=-0.5), dict(how="fast", finish_reason="length", reward=0.0)
    rollouts = [rollout("a", 0, True, **ended), rollout("b", 0, False, how="math_verify", reward=2.0),
                rollout("c", 0, False, how="no_answer"), rollout("d", 0, True, **cut)]  # fmt: skip
    found = {line["why"]: line["reward"] for line in sample_lines(0, rollouts)}
    assert found == {"right": -0.5, "wrong": 2.0, "no answer": 0.0, "cut": 0.0}


def test_a_long_response_is_kept_at_both_ends_and_nothing_steers_the_terminal():
    [line] = sample_lines(0, [rollout("a", 0, True, text="begin" + "x" * 50_000 + "end")])
    assert line["response"].startswith("beginx") and line["response"].endswith("xend")
    assert len(line["response"]) < 10_100
    text = "\x1b[2J\x1b]0;title\x07 \u202eevil \x9b1m \ud800 fine, naïve 数 \\boxed{1}"
    [line] = sample_lines(0, [rollout("a\x1b[1m", 0, True, text=text)])
    shown = one_sample(line, 400)
    assert not {"\x1b", "\u202e", "\x9b", "\x07"} & set(shown)
    assert "\\x1b[2J\\x1b]0;title\\x07 \\u202eevil \\x9b1m \\ud800 fine, naïve 数 \\boxed{1}" in shown


# Warnings

# Steps as the toy logs them.
GRPO = dict(reward=0.5, frac_reward_zero_std=0.84, truncated=0.2, no_answer=0.3, kl_to_reference=0.3, entropy=0.035,
            grad_norm=0.4, sampler_mismatch=0.01, verifier_failed=0.005, skipped_steps=0)  # fmt: skip
OPD = dict(reverse_kl=0.2, entropy=0.03, accuracy=0.9, truncated=0.03, no_answer=0.0, grad_norm=0.1, skipped_steps=0)
WARMUP = dict(forward_kl=0.18, truncated=0.0, grad_norm=0.1, skipped_steps=0)
KIND = {  # kind of warning: healthy steps, what changes, words of the sentence
    "no spread": (GRPO, dict(reward=0.0, frac_reward_zero_std=1.0), "rewards were equal (mean reward 0)"),
    "cut": (OPD, dict(truncated=0.99, no_answer=1.0), "--max-response-tokens"),
    "no answer": (OPD, dict(no_answer=1.0), "--prompt"),
    "gradient": (WARMUP, dict(grad_norm=0.0), "exactly 0"),
    "kl": (GRPO, dict(kl_to_reference=6.0), "lower --lr, or raise --kl-coef"),
    "mismatch": (GRPO, dict(sampler_mismatch=0.7), "differ by 0.7 nats"),
    "verifier": (GRPO, dict(verifier_failed=0.02), "2 % of the gradings"),
}


def lines(healthy: dict, changed: dict, count: int) -> list[dict]:
    """Fifteen healthy steps and `count` of another kind, with lines of validations between them."""
    steps = [healthy] * 15 + [{**healthy, **changed}] * count
    mixed = [line for step in steps for line in (step, {"validation_math500": 0.0, "truncated": 1.0})]
    return [{"step": number, **line} for number, line in enumerate(mixed)]


@pytest.mark.parametrize("kind", KIND)
def test_a_warning_takes_ten_steps_and_healthy_runs_get_none(kind):
    healthy, changed, words = KIND[kind]
    found = find_warnings(lines(healthy, changed, 10))
    assert found.keys() == {kind} and words in found[kind] and "\n" not in found[kind]
    assert find_warnings(lines(healthy, changed, 3)) == find_warnings(lines(healthy, {}, 10)) == {}
    assert find_warnings([{**line, **changed} for line in lines(healthy, {}, 0)[:18]]) == {}


@pytest.mark.parametrize("healthy, name", [(OPD, "reverse_kl"), (WARMUP, "forward_kl")])
def test_a_kl_to_the_teacher_that_rises_is_a_warning_and_one_that_starts_high_is_none(healthy, name):
    assert f"{name} was 2 nats per token, up from 0." in find_warnings(lines(healthy, {name: 2.0}, 10))["kl"]
    assert find_warnings(lines({**healthy, name: 2.7}, {name: 3.0}, 10)) == {}
    assert find_warnings(lines(healthy, {name: None}, 10)) == {}  # such steps are skipped and counted


def test_a_warning_is_printed_once_in_a_run_and_is_in_its_record(student, problems, tmp_path, capsys, monkeypatch):
    """A random model is never right. The run dies after the warning and goes on from a state that was saved then."""
    config = grpo(student, problems, tmp_path / "out", epochs=5, resume=True)
    update, steps = teacher_grpo.update, iter([True] * 13)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(teacher_grpo, "update", lambda *arguments: next(steps) and update(*arguments))
        teacher_grpo.main(config)
    first = re.findall("warning: (.*)", capsys.readouterr().out)
    teacher_grpo.main(config)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "continuing after step 13" in said and record["steps"] == 15 and first
    assert [*first, *re.findall("warning: (.*)", said)] == list(record["warnings"].values())
