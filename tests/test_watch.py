"""What can be seen of a run: kept responses, warnings, and a tracker that follows its metrics."""

import dataclasses
import json
import re
import sys
import time
import types

import pytest
from test_stages import RUNS, grpo

import fkl_warmup
import opd
import teacher_grpo
from common import Problem, Rollout
from experiments import samples, track
from lib.files import drop_steps
from lib.watch import find_warnings, printable, sample_lines, shorten

# Responses


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", RUNS)
def test_every_stage_keeps_a_few_responses_of_each_step(
    stage, student, teacher, problems, tmp_path, monkeypatch, capsys
):
    def made_up_grades(rollouts, verifier):
        for rollout in rollouts:
            rollout.correct = sum(rollout.response_ids) % 2 == 0
            rollout.how = "fast"

    for module in (teacher_grpo, fkl_warmup, opd):
        monkeypatch.setattr(module, "grade", made_up_grades)
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", max_steps=3, save_every=2)
    if stage in ("teacher", "student"):
        config = dataclasses.replace(config, require_finished=False)
    script.main(config)
    kept = lines_of(tmp_path / "out" / "samples.jsonl")
    for step in range(3):
        found = [line for line in kept if line["step"] == step]
        assert 2 <= len(found) <= 4
        assert {line["why"] for line in found} <= {"right", "wrong", "cut"}
        assert len({(line["id"], line["sample"]) for line in found}) == len(found)
    pairs = [kept[start : start + 2] for start in range(0, len(kept), 4)]
    if stage in ("teacher", "student"):
        assert any(best["id"] == worst["id"] and best["advantage"] > 0 > worst["advantage"] for best, worst in pairs)
    shown = capsys.readouterr().out
    assert "step 0: " in shown and "step 2: " in shown and "step 1: " not in shown
    metrics = lines_of(tmp_path / "out" / "metrics.jsonl")
    assert all(line.get("no_answer") == (None if stage == "warmup" else 0) for line in metrics)


def rollout(problem: str, sample: int, correct: bool, **changes) -> Rollout:
    rollout = Rollout(Problem(problem, f"prompt of {problem}", "7"), sample, [1], [2, 3], [0.0, 0.0], "stop", "text", correct)  # fmt: skip
    return dataclasses.replace(rollout, **changes)


def test_best_and_worst_of_prompts_with_spread_come_first():
    rollouts = [rollout("a", i, False) for i in range(3)] + [rollout("b", i, i == 2) for i in range(3)]
    chosen = [(line["id"], line["sample"], line["reward"]) for line in sample_lines(5, rollouts, False)]
    assert chosen == [("b", 2, 1.0), ("b", 1, 0.0), ("a", 0, 0.0), ("a", 2, 0.0)]
    rollouts = [rollout("a", 0, True, reward=0.2), rollout("a", 1, False, reward=0.7), rollout("c", 0, True)]
    chosen = [(line["id"], line["sample"], line["reward"]) for line in sample_lines(5, rollouts, False)]
    assert chosen == [("a", 1, 0.7), ("a", 0, 0.2), ("c", 0, 1.0)]


def test_why_a_response_has_its_reward():
    rollouts = [
        rollout("a", 0, True, how="fast"),
        rollout("b", 0, False, how="math_verify"),
        rollout("c", 0, False, how="no_answer"),
        rollout("d", 0, True, how="fast", finish_reason="length"),
    ]
    found = {line["why"]: line["reward"] for line in sample_lines(0, rollouts, require_finished=True)}
    assert found == {"right": 1.0, "wrong": 0.0, "no answer": 0.0, "cut": 0.0}
    assert {line["why"]: line["reward"] for line in sample_lines(0, rollouts, False)}["cut"] == 1.0


def test_a_long_response_is_kept_at_both_ends():
    [line] = sample_lines(0, [rollout("a", 0, True, text="begin" + "x" * 50_000 + "end")], True)
    assert (
        line["response"].startswith("beginx") and line["response"].endswith("xend") and len(line["response"]) < 10_100
    )
    assert shorten("abcdefghi", 9) == "abcdefghi"


def test_what_could_steer_a_terminal_is_printed_as_an_escape(tmp_path, capsys):
    text = "\x1b[2J\x1b]0;title\x07 \u202eevil \r\x9b1m \ud800 fine, naïve 数\n\\boxed{1}"
    assert printable(text) == "\\x1b[2J\\x1b]0;title\\x07 \\u202eevil \\r\\x9b1m \\ud800 fine, naïve 数\n\\boxed{1}"
    lines = sample_lines(0, [rollout("a", 0, True, text=text), rollout("b\x1b[1m", 0, False, text="no")], True)
    (tmp_path / "out.partial").mkdir()
    for name, content in (("samples.jsonl", lines), ("metrics.jsonl", [{"step": 0}])):
        (tmp_path / "out.partial" / name).write_text("".join(json.dumps(line) + "\n" for line in content))
    for only, shown, hidden in (("all", "evil", "----"), ("wrong", "no", "evil"), ("right", "evil", "prompt of b")):
        samples.main(samples.Config(str(tmp_path / "out"), only=only))
        said = capsys.readouterr().out
        assert shown in said and hidden not in said and "\x1b" not in said and "\u202e" not in said


def test_lines_that_a_resumed_run_will_write_again_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    drop_steps(path, 3)
    assert path.read_text() == ""
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 0, 1, 2, 2)) + '{"step": 0, "te')
    drop_steps(path, 2)
    assert [line["step"] for line in lines_of(path)] == [0, 0, 1]


# Warnings

# Steps as the toy logs them.
GRPO = dict(reward=0.5, frac_reward_zero_std=0.84, truncated=0.2, no_answer=0.3, kl_to_reference=0.3, entropy=0.035,
            skipped_steps=0)  # fmt: skip
OPD = dict(reverse_kl=0.2, entropy=0.03, accuracy=0.9, truncated=0.03, no_answer=0.0, skipped_steps=0)
WARMUP = dict(forward_kl=0.18, truncated=0.0, skipped_steps=0)
KIND = {
    "no spread": (GRPO, dict(frac_reward_zero_std=1.0), "rewards were equal"),
    "reward 0": (GRPO, dict(reward=0.0, frac_reward_zero_std=1.0), "had the reward 0"),
    "reward 1": (GRPO, dict(reward=1.0, frac_reward_zero_std=1.0), "nothing is left to learn"),
    "cut": (OPD, dict(truncated=0.99, no_answer=1.0), "--max-response-tokens"),
    "no answer": (OPD, dict(no_answer=1.0), "--prompt"),
    "kl": (GRPO, dict(kl_to_reference=6.0), "lower --lr, or raise --kl-coef"),
    "entropy": (GRPO, dict(entropy=0.002), "entropy has fallen from 0.035 to 0.002"),
}


def lines(healthy: dict, changed: dict, count: int) -> list[dict]:
    """Fifteen healthy steps and `count` of another kind, with lines of validations between them."""
    steps = [healthy] * 15 + [{**healthy, **changed}] * count
    mixed = [line for step in steps for line in (step, {"validation_math500": 0.0, "truncated": 1.0})]
    return [{"step": number, **line} for number, line in enumerate(mixed)]


@pytest.mark.parametrize("kind", KIND)
def test_a_warning_takes_as_many_steps_as_it_says(kind):
    healthy, changed, words = KIND[kind]
    if kind == "entropy":
        healthy = {**healthy, "entropy": 0.3}
        words = words.replace("0.035", "0.3")
    found = find_warnings(lines(healthy, changed, 10))
    assert found.keys() == {kind} and words in found[kind] and "\n" not in found[kind]
    assert find_warnings(lines(healthy, changed, 4 if kind in ("kl", "entropy") else 9)).keys() <= {kind} - (
        set() if kind in ("kl", "entropy") else {kind}
    )
    assert find_warnings(lines(healthy, {}, 10)) == {}


@pytest.mark.parametrize("healthy, name", [(OPD, "reverse_kl"), (WARMUP, "forward_kl")])
def test_a_kl_to_the_teacher_that_rises_is_a_warning_and_one_that_starts_high_is_none(healthy, name):
    assert f"{name} has risen from" in find_warnings(lines(healthy, {name: 2.0}, 10))["kl"]
    assert find_warnings(lines({**healthy, name: 2.7}, {name: 3.0}, 10)) == {}
    assert find_warnings(lines(healthy, {name: None}, 10)) == {}  # such steps are skipped and counted


def test_a_model_that_knows_the_answers_may_have_a_low_entropy():
    assert find_warnings(lines({**GRPO, "entropy": 0.3}, dict(entropy=0.002, reward=0.95), 10)) == {}


def test_a_warning_is_printed_once_in_a_run_and_stands_in_its_record(student, problems, tmp_path, capsys, monkeypatch):
    """A random model is never right. The run dies after the warning and goes on from a state that was saved then."""
    config = grpo(student, problems, tmp_path / "out", passes=5, save_every=1, resume=True)
    update = teacher_grpo.update
    seen = []

    def die(*arguments):
        seen.append(1)
        if len(seen) == 14:
            raise KeyboardInterrupt
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_grpo, "update", die)
        with pytest.raises(KeyboardInterrupt):
            teacher_grpo.main(config)
    first = re.findall("warning: (.*)", capsys.readouterr().out)
    teacher_grpo.main(config)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "continuing after step 13" in said and record["steps"] == 15 and first and "reward 0" in record["warnings"]
    assert [*first, *re.findall("warning: (.*)", said)] == list(record["warnings"].values())


# A tracker


@pytest.fixture
def tracker(monkeypatch):
    """A module with the functions that trackio and wandb share, which notes how it is called."""
    module = types.ModuleType("trackio")
    module.__spec__ = types.SimpleNamespace(name="trackio")
    module.calls = []
    module.init = lambda **options: module.calls.append(("init", options))
    module.log = lambda metrics, step: module.calls.append((step, metrics))
    module.finish = lambda: module.calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_a_tracker_follows_a_run_from_before_its_beginning_through_a_resume_to_its_end(tmp_path, tracker, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    step = [json.dumps({"step": n, "reward": n / 10, "loss": None, "skipped_steps": 0}) + "\n" for n in range(5)]
    validation = json.dumps({"step": 2, "validation_math500": 0.5}) + "\n"
    ancestor = {"path": "m", "sha256": "0", "consumed": ["id"]}
    record = {"stage": "opd", "config": {"lr": 1}, "parents": {"model": ancestor}, "consumed": ["id"]}

    def write(*written):
        partial.mkdir(exist_ok=True)
        (partial / "metrics.jsonl").write_text("".join(written))

    moments = [
        lambda: write(),
        lambda: (partial / "run.json").write_text('{"sta'),
        lambda: (partial / "run.json").write_text(json.dumps(record)),
        lambda: write(step[0], step[1], step[2][:9]),
        lambda: write(*step[:3]),
        lambda: write(step[0]),  # interrupted, and resumed from its first step
        lambda: write(*step[:3], validation, step[3]),
        lambda: (write(*step[:3], validation, *step[3:]), partial.rename(out)),
    ]
    monkeypatch.setattr(time, "sleep", lambda seconds: moments.pop(0)())
    track.main(track.Config(str(out), "trackio"))
    assert not moments
    (first, options), *logged, last = tracker.calls
    assert (first, last) == ("init", ("finish",)) and options["name"] == str(out)
    assert options["config"] == {
        "stage": "opd",
        "config": {"lr": 1},
        "parents": {"model": {"path": "m", "sha256": "0"}},
    }
    assert [number for number, _ in logged] == [0, 1, 2, 2, 3, 4]
    assert logged[1][1] == {"reward": 0.1, "skipped_steps": 0} and logged[3][1] == {"validation_math500": 0.5}


def test_a_tracker_takes_what_a_stage_has_written(student, problems, tmp_path, tracker):
    teacher_grpo.main(grpo(student, problems, tmp_path / "out"))
    track.main(track.Config(str(tmp_path / "out"), "trackio"))
    steps = [call[0] for call in tracker.calls[1:-1]]
    assert steps == [0, 1, 2] and tracker.calls[0][1]["config"]["config"]["prompts_per_step"] == 4
