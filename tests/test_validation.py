"""Validation while a stage trains, and checkpoints along the way."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import RUNS, assert_same_weights, distill, grpo, made_up_grades, metrics, record, warmup
from matplotlib.axes import Axes

import evaluate
import fkl_warmup
import lib.data
import lib.lineage
import lib.plots
import lib.policy
import lib.scores
import opd
import student_grpo
import teacher_grpo
from common import InputError


@pytest.mark.parametrize("stage", ["teacher", "bridge"])
def test_a_validation_scores_as_the_evaluation_does_and_changes_nothing(
    stage, student, teacher, problems, test_problems, tmp_path, monkeypatch, capsys
):
    """The scores after two steps are those of the checkpoint that was written then, the last ones those of OUT."""
    for module in (teacher_grpo, opd, evaluate, lib.scores):
        monkeypatch.setattr(module, "grade", made_up_grades)
    plain, validated = tmp_path / "plain", tmp_path / "validated"
    for out, more in {
        plain: {}, validated: dict(validate=(test_problems,), export_every=2, validate_every=2, validate_k=3)
    }.items():  # fmt: skip
        script, config = RUNS[stage](student, teacher, problems, out, max_steps=3, **more)
        script.main(config)
    assert_same_weights(plain, validated)
    trained = [line for line in metrics(validated) if "skipped_steps" in line]
    lines = [line for line in metrics(validated) if "skipped_steps" not in line]
    assert trained == metrics(plain) and "validation" not in record(plain)
    assert [line["step"] for line in metrics(validated)] == [0, 0, 1, 2, 2, 3]
    assert [line["step"] for line in lines] == [0, 2, 3] and record(validated)["validation"] == lines
    assert record(validated)["last"]["step"] == 2 and record(validated)["first"].get("lr")
    said = capsys.readouterr().out
    assert all(f"Validation after {steps} steps: test " in said for steps in (0, 2, 3))

    sample = evaluate.sample_rollouts
    as_validation = lambda *arguments, seed_key: sample(*arguments, seed_key=(0, "validate"))
    monkeypatch.setattr(evaluate, "sample_rollouts", as_validation)
    settings = dict(data=(test_problems,), k=3, max_prompt_tokens=64, max_response_tokens=8)
    models = (str(validated / "step-000002"), str(validated))
    evaluate.main(evaluate.Config(out=str(tmp_path / "report"), models=models, **settings))
    results = json.loads((tmp_path / "report" / "results.json").read_text())["results"]
    for line, result in zip(lines[1:], results.values(), strict=True):
        for end, key in {"": "avg", "_se": "se", "_truncated": "truncated", "_tokens": "tokens"}.items():
            assert line[f"validation_test{end}"] == result["test"][key]
    assert len({line["validation_test"] for line in lines}) > 1 and 0 < lines[0]["validation_test"] < 1


@pytest.mark.parametrize("stage", ["bridge", "student"])
def test_validation_problems_are_never_trained_on(stage, student, teacher, problems, tmp_path):
    """A checkpoint before may have been trained on them, and Stage 3 has then nothing to refuse."""
    some = tmp_path / "some.jsonl"
    some.write_text("".join(Path(problems).read_text().splitlines(True)[:4]))
    held_out = [problem.id for problem in lib.data.load_problems(str(some))]
    trained = shutil.copytree(student, tmp_path / "student")
    (trained / "run.json").write_text(json.dumps({"stage": "opd", "parents": {}, "trained_on": held_out}))
    script, config = RUNS[stage](str(trained), teacher, problems, tmp_path / "out", half="full", validate=(str(some),))
    script.main(config)
    trained_on = set(record(tmp_path / "out")["trained_on"])
    assert len(trained_on) == 8 and len(held_out) == 4 and not trained_on & set(held_out)


def test_a_checkpoint_along_the_way_serves_every_later_stage(student, teacher, problems, tmp_path, capsys):
    """With the lineage of the steps up to it. The last step has none of its own: it is OUT."""
    teacher_grpo.main(grpo(teacher, problems, tmp_path / "teacher", export_every=1))
    assert sorted(path.name for path in (tmp_path / "teacher").glob("step-*")) == ["step-000001", "step-000002"]
    early, bridge = tmp_path / "teacher" / "step-000001", tmp_path / "bridge" / "step-000001"
    assert record(early)["steps"] == 1 and record(early)["first"] == record(early)["last"]
    [batch, *_] = lib.data.problem_batches(lib.data.load_problems(problems), 4, 1, "grpo", 0)
    lineage = lib.lineage.read_lineage(str(early))
    assert lib.lineage.problems_trained_on(lineage) == {problem.id for problem in batch}
    assert lineage["parents"]["model"]["path"] == teacher
    opd.main(distill(student, str(early), problems, tmp_path / "bridge", max_steps=2, export_every=1))
    assert "C1: the teacher was trained with RL" in capsys.readouterr().out
    trained_on = lib.lineage.problems_trained_on(lib.lineage.read_lineage(str(bridge)))
    assert trained_on == {*record(early)["trained_on"], *record(bridge)["trained_on"]}
    assert len(record(bridge)["trained_on"]) == 3
    assert (bridge / "generation_config.json").read_text() == (tmp_path / "bridge/generation_config.json").read_text()
    with pytest.raises(InputError, match=rf"--model .*step-000001.* on {len(trained_on)} of the 12 problems"):
        student_grpo.main(grpo(str(bridge), problems, tmp_path / "x", student_grpo.Config, half="full"))


def test_the_warmups_own_engine_is_a_trainers(student, teacher, problems, test_problems, tmp_path, monkeypatch):
    """It gets the policy, so it sleeps until the first validation, which a resumed run may reach long after its start."""
    made, make_engine = [], fkl_warmup.make_engine
    monkeypatch.setattr(fkl_warmup, "make_engine", lambda *a, **k: made.append(a[3:]) or make_engine(*a, **k))
    fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "out", validate=(test_problems,), max_steps=1))
    [of_the_teacher, [policy]] = made
    assert of_the_teacher == () and isinstance(policy, lib.policy.Policy)


def test_pictures_show_validations_with_their_errors(tmp_path, monkeypatch):
    """What is zero in every step, as skipped steps should be, has no panel."""
    drawn = {"set_title": [], "errorbar": []}
    for method, seen in drawn.items():
        draw = getattr(Axes, method)
        note = lambda axes, *a, seen=seen, draw=draw, **k: seen.append(a[:3]) or draw(axes, *a, **k)
        monkeypatch.setattr(Axes, method, note)
    lines = [
        {"step": 0, "validation_a": 0.1, "validation_a_se": 0.05, "validation_a_tokens": 4.0},
        {"step": 0, "reward": 0.2, "skipped_steps": 0},
        {"step": 1, "reward": 0.3, "skipped_steps": 0},
        {"step": 2, "validation_a": 0.4, "validation_a_se": None, "validation_a_tokens": 5.0},
    ]
    lib.plots.plot_metrics(lines, tmp_path / "curves.png")
    titles = ["reward, and shares of responses", "validation a", "validation a tokens"]
    assert drawn == {"set_title": [(title,) for title in titles], "errorbar": [((0, 2), (0.1, 0.4), (0.05, 0))]}
