"""Validation while a stage trains, checkpoints along the way, and the best weights kept."""

import dataclasses
import json
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import write_problems
from test_distributed import launch
from test_faults import Killed
from test_stages import RUNS, assert_same_weights, command_line, distill, grpo, metrics, warmup, weights
from transformers import AutoModelForCausalLM

import evaluate
import fkl_warmup
import lib.data
import lib.engines
import lib.lineage
import lib.plots
import lib.runs
import lib.scores
import opd
import student_grpo
import teacher_grpo
from common import InputError

ROOT = Path(__file__).parent.parent
VALIDATE = dict(validate_every=2, validate_k=3)


def made_up_grades(rollouts, verifier):
    """Random models solve nothing."""
    for rollout in rollouts:
        rollout.correct = sum(rollout.response_ids) % 2 == 0


@pytest.fixture
def graded(monkeypatch):
    """Made-up verdicts in all stages, in their validation and in the evaluation."""
    for module in (teacher_grpo, fkl_warmup, opd, evaluate, lib.scores):
        monkeypatch.setattr(module, "grade", made_up_grades)


def validations(directory: Path) -> list[dict]:
    return [line for line in metrics(directory) if "skipped_steps" not in line]


def record(directory: Path) -> dict:
    return json.loads((directory / "run.json").read_text())


@pytest.mark.parametrize("stage", RUNS)
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


@pytest.mark.parametrize("stage", RUNS)
def test_validation_problems_are_never_trained_on(stage, student, teacher, problems, tmp_path):
    every = Path(problems).read_text().splitlines(True)
    (tmp_path / "some.jsonl").write_text("".join(every[:4]))
    if stage == "student":  # may have been trained on by a checkpoint before, and Stage 3 has then nothing to refuse
        seen = [problem.id for problem in lib.data.load_problems(str(tmp_path / "some.jsonl"))]
        student = shutil.copytree(student, tmp_path / "student")
        (student / "run.json").write_text(json.dumps({"stage": "opd", "parents": {}, "consumed": seen}))
        student = str(student)
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", half="full")
    script.main(dataclasses.replace(config, validate=(str(tmp_path / "some.jsonl"),)))
    trained, held_out = (
        set(record(tmp_path / "out")["consumed"]),
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
    assert lib.lineage.consumed_problems(lineage) == first and lineage["parents"]["model"]["path"] == teacher
    assert lib.lineage.last_rl_stage(lineage)["stage"] == "teacher_grpo"
    opd.main(distill(student, str(early), problems, tmp_path / "bridge", max_steps=2, export_every=1))
    assert "C1: in the last RL on record behind the teacher" in capsys.readouterr().out
    bridge = tmp_path / "bridge" / "step-000001"
    consumed = lib.lineage.consumed_problems(lib.lineage.read_lineage(str(bridge)))
    assert consumed == first | set(record(bridge)["consumed"]) and len(record(bridge)["consumed"]) == 3
    assert (bridge / "generation_config.json").read_text() == (tmp_path / "bridge/generation_config.json").read_text()
    with pytest.raises(InputError, match=rf"on {len(consumed)} of its 12 problems --model .*step-000001"):
        student_grpo.main(grpo(str(bridge), problems, tmp_path / "x", student_grpo.Config, half="full"))
    fkl_warmup.main(warmup(str(bridge), str(early), problems, tmp_path / "warmup", max_steps=1))


def scripted(monkeypatch, shares: list[float]) -> None:
    """Successive validations find these shares of the responses right, and then no more may follow."""
    shares = iter(shares)

    def grade(rollouts, verifier):
        right = round(next(shares) * len(rollouts))
        for number, rollout in enumerate(rollouts):
            rollout.correct = number < right

    monkeypatch.setattr(lib.scores, "grade", grade)


def test_the_best_weights_are_kept_and_of_equals_the_earlier(teacher, problems, test_problems, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.5, 0.8, 0.8, 0.2])
    settings = dict(validate=(test_problems,), validate_every=1, validate_k=5, keep_best=True, export_every=1)
    teacher_grpo.main(grpo(teacher, problems, tmp_path / "out", max_steps=4, passes=2, **settings))
    found = record(tmp_path / "out")
    assert_same_weights(tmp_path / "out", tmp_path / "out" / "step-000002")
    assert found["kept_step"] == found["steps"] == 2
    assert [line["validation_test"] for line in found["validation"]] == pytest.approx([0.1, 0.5, 0.8, 0.8, 0.2])
    assert found["consumed"] == record(tmp_path / "out" / "step-000002")["consumed"]
    assert found["last"] == [line for line in (json.loads(text) for text in (tmp_path / "out" / "metrics.jsonl").open())
                             if "lr" in line][1]  # fmt: skip
    # The weights after the last step are still to be had, and the best ones do not lie there twice.
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert names == [f"step-00000{number}" for number in (1, 2, 3, 4)]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_mean_over_the_sets_decides(teacher, problems, test_problems, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.0, 0.9, 0.6, 0.6, 0.9, 0.0])
    other = write_problems(tmp_path / "other.jsonl", 4, seed=2)
    settings = dict(validate=(test_problems, other), validate_every=1, validate_k=5, keep_best=True)
    teacher_grpo.main(grpo(teacher, problems, tmp_path / "out", max_steps=2, **settings))
    assert record(tmp_path / "out")["kept_step"] == 1


def test_weights_that_are_best_again_after_a_kill_are_kept(teacher, problems, test_problems, tmp_path, monkeypatch):
    """On a GPU a validation that is made again after a kill may score less, and then an earlier one is the best."""
    settings = dict(validate=(test_problems,), keep_best=True, export_every=2, save_every=3, max_steps=6, passes=3)
    config = grpo(teacher, problems, tmp_path / "out", **settings, **VALIDATE)
    log = lib.runs.Run.log

    def die(run, step, *arguments, **options):
        if step == 4:
            raise Killed
        log(run, step, *arguments, **options)

    with monkeypatch.context() as patch:
        scripted(patch, [0.1, 0.5, 0.9])
        patch.setattr(lib.runs.Run, "log", die)
        with pytest.raises(Killed):
            teacher_grpo.main(config)
    scripted(monkeypatch, [0.3, 0.2])
    teacher_grpo.main(dataclasses.replace(config, resume=True))
    scores = [line["validation_test"] for line in validations(tmp_path / "out")]
    assert scores == pytest.approx([0.1, 0.5, 0.3, 0.2], abs=0.03)
    assert record(tmp_path / "out")["kept_step"] == 2
    assert_same_weights(tmp_path / "out", tmp_path / "out" / "step-000002")
    assert not list((tmp_path / "out").glob("best-*"))


def test_validations_of_a_resumed_run_are_those_of_one_that_ran_through(
    student, teacher, problems, test_problems, tmp_path, monkeypatch, graded
):
    """A kill comes after the validation before a step and before the step's own line; the step before was saved."""
    more = dict(validate=(test_problems,), validate_every=1, validate_k=3)
    opd.main(distill(student, teacher, problems, tmp_path / "straight", **more))
    config = distill(student, teacher, problems, tmp_path / "cut", **more)
    log = lib.runs.Run.log

    def die(run, step, *arguments, **options):
        if step == 2:
            raise Killed
        log(run, step, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lib.runs.Run, "log", die)
        with pytest.raises(Killed):
            opd.main(config)
    assert [line["step"] for line in metrics(tmp_path / "cut.partial")] == [0, 0, 1, 1, 2]
    opd.main(dataclasses.replace(config, resume=True))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "straight")
    assert record(tmp_path / "cut")["validation"] == record(tmp_path / "straight")["validation"]


def test_the_best_is_not_chosen_by_problems_of_an_excluded_evaluation_set(
    student, problems, test_problems, tmp_path, monkeypatch
):
    every = Path(problems).read_text().splitlines(True) + Path(test_problems).read_text().splitlines(True)[:2]
    reported = tmp_path / "reported.jsonl"
    reported.write_text("".join(every[-4:]))
    monkeypatch.setattr(lib.scores, "REPORTED", (str(reported),))
    config = grpo(student, problems, tmp_path / "out", exclude=(str(reported),), validate=(test_problems,))
    with pytest.raises(InputError, match=r"--keep-best .*test.jsonl'.*2 of its 6 problems stand in .*reported.jsonl"):
        teacher_grpo.main(dataclasses.replace(config, keep_best=True))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("stage", ["teacher", "warmup"])
def test_bfloat16_halves_what_is_saved_and_rounds_nothing_in_training(
    stage, student, teacher, problems, test_problems, tmp_path
):
    for name, dtype in (("full", "float32"), ("half", "bfloat16")):
        script, config = RUNS[stage](student, teacher, problems, tmp_path / name, max_steps=2, export_every=1)
        script.main(dataclasses.replace(config, save_dtype=dtype))
    assert metrics(tmp_path / "full") == metrics(tmp_path / "half")
    for part in ("", "step-000001"):
        full, half = weights(tmp_path / "full" / part), weights(tmp_path / "half" / part)
        assert all(torch.equal(half[name], full[name].bfloat16()) for name in full) and full.keys() == half.keys()
        sizes = [sum(value.numel() * value.element_size() for value in each.values()) for each in (full, half)]
        assert sizes[0] == 2 * sizes[1]
        configs = [json.loads((tmp_path / name / part / "config.json").read_text()) for name in ("full", "half")]
        assert configs[1] == {**configs[0], "dtype": "bfloat16"} and configs[0]["dtype"] == "float32"
    evaluate.main(
        evaluate.Config(out=str(tmp_path / "report"), models=(str(tmp_path / "half"),), data=(test_problems,), k=2,
                        max_prompt_tokens=64, max_response_tokens=8)
    )  # fmt: skip
    opd.main(distill(str(tmp_path / "half"), teacher, problems, tmp_path / "next", max_steps=1))


def test_two_ranks_validate_export_and_keep_what_one_does(student, teacher, problems, test_problems, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import common, fkl_warmup
        from test_validation import lib, made_up_grades
        lib.scores.grade = fkl_warmup.grade = made_up_grades
        common.start_process()
        fkl_warmup.main(fkl_warmup.Config(
            {student!r}, {teacher!r}, data={problems!r}, out=sys.argv[1], exclude=(), max_prompt_tokens=64,
            max_response_tokens=8, lr=1e-2, mini_batch_prompts=3, rollouts_per_prompt=2, save_every=2,
            validate=({test_problems!r},), validate_every=1, validate_k=3, keep_best=True, export_every=1,
            save_dtype="bfloat16",
        ))
        common.exit_process(0)
    """)
    )
    for ranks in (1, 2):
        done = launch(ranks, str(script), str(tmp_path / str(ranks)))
        assert done.returncode == 0, done.stderr[-5000:]
    one, two = tmp_path / "1", tmp_path / "2"
    assert validations(one) == validations(two) and len({line["validation_test"] for line in validations(one)}) > 1
    assert record(one)["kept_step"] == record(two)["kept_step"]
    assert sorted(path.name for path in one.rglob("*")) == sorted(path.name for path in two.rglob("*"))
    for part in ("", "step-000002"):
        first, second = weights(one / part), weights(two / part)
        assert all(torch.allclose(first[name], second[name], atol=1e-2, rtol=1e-2) for name in first)  # of bfloat16
        assert record(one / part)["consumed"] == record(two / part)["consumed"]


def test_stage_2a_validates_with_vllm_once_the_teachers_rollouts_are_there(student, teacher, problems, tmp_path):
    """The most likely responses, which do not depend on the sampler's random numbers, are those of the other sampler.

    The rollouts are made as the sentence says that refuses to validate while they are missing.
    """
    pytest.importorskip("vllm")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(Path(problems).read_text().splitlines(True)[:5]))
    rollouts = dict(rollouts=str(tmp_path / "rollouts"), engine="torch")
    fkl_warmup.main(
        warmup(student, teacher, problems, tmp_path / "first", exclude=(str(held_out),), max_steps=1, **rollouts)
    )
    config = warmup(
        student, teacher, problems, tmp_path / "torch", max_steps=2, **rollouts,
        validate=(str(held_out),), validate_temperature=0.0, validate_every=1, validate_k=1,
    )  # fmt: skip
    fkl_warmup.main(config)
    vllm = dataclasses.replace(config, engine="vllm", out=str(tmp_path / "vllm"))
    done = subprocess.run(command_line(fkl_warmup, vllm), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    assert validations(tmp_path / "vllm") == validations(tmp_path / "torch")


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
    assert bars == [((0,), (0.1,), (0.05,))] and curves[:2] == [((0, 1), (0.2, 0.3)), ((0, 2), (0.1, 0.4))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves.clear()
    assert lib.plots.draw_curves({"a": str(tmp_path)}, tmp_path / "all.png") and ([0.2, 0.3],) in curves
