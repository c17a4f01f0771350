"""Validation while a stage trains, and checkpoints along the way."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers import RUNS, assert_same_weights, distill, grpo, made_up_grades, metrics, warmup

import evaluate
import fkl_warmup
import lib.data
import lib.engines
import lib.lineage
import lib.plots
import lib.policy
import lib.runs
import lib.scores
import opd
import student_grpo
import teacher_grpo
from common import InputError

VALIDATE = dict(validate_every=2, validate_k=3)


@pytest.fixture
def graded(monkeypatch):
    """Made-up verdicts in all stages, in their validation and in the evaluation."""
    for module in (teacher_grpo, fkl_warmup, opd, evaluate, lib.scores):
        monkeypatch.setattr(module, "grade", made_up_grades)


def validations(directory: Path) -> list[dict]:
    return [line for line in metrics(directory) if "skipped_steps" not in line]


def record(directory: Path) -> dict:
    return json.loads((directory / "run.json").read_text())


@pytest.mark.parametrize("stage", ["teacher", "bridge"])
def test_a_validation_scores_as_the_evaluation_does_and_changes_nothing(
    stage, student, teacher, problems, test_problems, tmp_path, monkeypatch, capsys, graded
):
    """The scores after two steps are those of the checkpoint that was written then, the last ones those of OUT."""
    settings = {"require_finished": False} if stage in ("teacher", "student") else {}
    runs = {}
    for name, more in {
        "plain": {},
        "validated": dict(validate=(test_problems,), export_every=2, **VALIDATE),
    }.items():
        script, config = RUNS[stage](student, teacher, problems, tmp_path / name, max_steps=3, **settings, **more)
        script.main(config)
        runs[name] = tmp_path / name
    assert_same_weights(runs["plain"], runs["validated"])
    trained = [line for line in metrics(runs["validated"]) if "skipped_steps" in line]
    assert trained == metrics(runs["plain"]) and "validation" not in record(runs["plain"])
    lines = validations(runs["validated"])
    assert [line["step"] for line in metrics(runs["validated"])] == [0, 0, 1, 2, 2, 3]
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert record(runs["validated"])["validation"] == lines
    assert record(runs["validated"])["last"]["step"] == 2 and record(runs["validated"])["first"].get("lr")
    said = capsys.readouterr().out
    assert all(f"Validation after {steps} steps: test " in said for steps in (0, 2, 3))

    sample = evaluate.sample_rollouts

    def sample_as_validation(*arguments, seed_key):
        return sample(*arguments, seed_key=(0, "validate"))

    monkeypatch.setattr(evaluate, "sample_rollouts", sample_as_validation)
    checkpoints = [str(runs["validated"] / "step-000002"), str(runs["validated"])]
    evaluate.main(
        evaluate.Config(
            out=str(tmp_path / "report"), models=tuple(checkpoints), data=(test_problems,), k=3,
            max_prompt_tokens=64, max_response_tokens=8,
        )
    )  # fmt: skip
    results = json.loads((tmp_path / "report" / "results.json").read_text())["results"]
    for line, result in zip(lines[1:], results.values(), strict=True):
        found = {f"validation_test{end}": result["test"][key] for end, key in
                 {"": "avg", "_se": "se", "_truncated": "truncated", "_tokens": "tokens"}.items()}  # fmt: skip
        assert {name: line[name] for name in found} == found
    assert len({line["validation_test"] for line in lines}) > 1 and 0 < lines[0]["validation_test"] < 1


@pytest.mark.parametrize("stage", ["bridge", "student"])
def test_validation_problems_are_never_trained_on(stage, student, teacher, problems, tmp_path):
    every = Path(problems).read_text().splitlines(True)
    (tmp_path / "some.jsonl").write_text("".join(every[:4]))
    if stage == "student":  # may have been trained on by a checkpoint before, and Stage 3 has then nothing to refuse
        seen = [problem.id for problem in lib.data.load_problems(str(tmp_path / "some.jsonl"))]
        student = shutil.copytree(student, tmp_path / "student")
        (student / "run.json").write_text(json.dumps({"stage": "opd", "parents": {}, "trained_on": seen}))
        student = str(student)
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", half="full")
    script.main(dataclasses.replace(config, validate=(str(tmp_path / "some.jsonl"),)))
    trained, held_out = (
        set(record(tmp_path / "out")["trained_on"]),
        {problem.id for problem in lib.data.load_problems(str(tmp_path / "some.jsonl"))},
    )
    assert len(trained) == 8 and len(held_out) == 4 and not trained & held_out


def test_a_checkpoint_along_the_way_serves_every_later_stage(student, teacher, problems, tmp_path, capsys):
    """With the lineage of the steps up to it. The last step has none of its own: it is OUT."""
    teacher_grpo.main(grpo(teacher, problems, tmp_path / "teacher", export_every=1))
    assert sorted(path.name for path in (tmp_path / "teacher").glob("step-*")) == ["step-000001", "step-000002"]
    early = tmp_path / "teacher" / "step-000001"
    assert record(early)["steps"] == 1 and record(early)["first"] == record(early)["last"]
    batches = lib.data.problem_batches(lib.data.load_problems(problems), 4, 1, "grpo", 0)
    first = {problem.id for problem in batches[0]}
    lineage = lib.lineage.read_lineage(str(early))
    assert lib.lineage.problems_trained_on(lineage) == first and lineage["parents"]["model"]["path"] == teacher
    assert lib.lineage.last_rl_stage(lineage)["stage"] == "teacher_grpo"
    opd.main(distill(student, str(early), problems, tmp_path / "bridge", max_steps=2, export_every=1))
    assert "C1: the teacher was trained with RL" in capsys.readouterr().out
    bridge = tmp_path / "bridge" / "step-000001"
    trained_on = lib.lineage.problems_trained_on(lib.lineage.read_lineage(str(bridge)))
    assert trained_on == first | set(record(bridge)["trained_on"]) and len(record(bridge)["trained_on"]) == 3
    assert (bridge / "generation_config.json").read_text() == (tmp_path / "bridge/generation_config.json").read_text()
    with pytest.raises(InputError, match=rf"--model .*step-000001.* on {len(trained_on)} of the 12 problems"):
        student_grpo.main(grpo(str(bridge), problems, tmp_path / "x", student_grpo.Config, half="full"))
    fkl_warmup.main(warmup(str(bridge), str(early), problems, tmp_path / "warmup", max_steps=1))


def test_the_warmups_own_engine_is_a_trainers(student, teacher, problems, test_problems, tmp_path, monkeypatch):
    """It gets the policy, so it sleeps until the first validation, which a resumed run may reach long after its start."""
    made, make_engine = [], fkl_warmup.make_engine
    monkeypatch.setattr(fkl_warmup, "make_engine", lambda *a, **k: made.append(a[3:]) or make_engine(*a, **k))
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "out", validate=(test_problems,), max_steps=1))
    [of_the_teacher, [policy]] = made
    assert of_the_teacher == () and isinstance(policy, lib.policy.Policy)


def test_pictures_show_validations_with_their_errors(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles, bars, curves = [], [], []
    for method, seen in (("set_title", titles), ("errorbar", bars), ("plot", curves)):
        original = getattr(Axes, method)
        monkeypatch.setattr(
            Axes, method, lambda axes, *a, seen=seen, f=original, **k: seen.append(a) or f(axes, *a, **k)
        )
    lines = [
        {"step": 0, "validation_a": 0.1, "validation_a_se": 0.05, "validation_a_tokens": 4.0},
        {"step": 0, "reward": 0.2, "skipped_steps": 0},
        {"step": 1, "reward": 0.3, "skipped_steps": 0},
        {"step": 2, "validation_a": 0.4, "validation_a_se": None, "validation_a_tokens": 5.0},
    ]
    lib.plots.plot_metrics(lines, tmp_path / "curves.png")
    # What is zero in every step, as skipped steps should be, has no panel.
    assert [title for (title,) in titles] == ["reward, and shares of responses", "validation a", "validation a tokens"]
    assert [bar[:3] for bar in bars] == [((0, 2), (0.1, 0.4), (0.05, 0))] and curves[:2] == [
        ((0, 1), (0.2, 0.3)),
        ((0, 2), (0.1, 0.4)),
    ]
