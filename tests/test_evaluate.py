"""Statistics against hand-made numbers, and the script on tiny checkpoints."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_checkpoint, write_problems
from matplotlib.axes import Axes
from transformers import GenerationConfig

import evaluate
import lib.data
from common import InputError
from lib import scores
from lib.files import json_lines


def made_up_samples(correct, tokens=5, reason="stop", how="fast"):
    """Sample lines from rows of booleans, one row a problem."""
    return [
        {"id": f"p{i}", "sample": j, "correct": bool(value), "finish_reason": reason, "tokens": tokens, "how": how}
        for i, row in enumerate(correct)
        for j, value in enumerate(row)
    ]


def test_statistics_of_known_samples():
    summary = scores.summarise(made_up_samples([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]), k=4)
    assert summary["avg"] == pytest.approx(0.5) and summary["pass"] == pytest.approx(2 / 3)
    assert summary["se"] == pytest.approx(np.std([0.5, 0, 1], ddof=1) / math.sqrt(3))
    assert summary["scores"] == {"p0": 0.5, "p1": 0.0, "p2": 1.0} and summary["tokens"] == 5
    summary = scores.summarise(made_up_samples([[1]], reason="length", how="timeout"), k=1)
    assert summary["truncated"] == summary["verifier_failed"] == 1.0
    results = {"a": {"set": {**summary, "trained_on": 0}}}
    assert "verifier timed out or failed on up to 100.0 %" in evaluate.report_tables(results, config("x", ["a"], "set"))


def test_the_paired_error_is_that_of_the_differences():
    second = {f"p{i}": value for i, value in enumerate([0.1, 0.5, 0.9, 0.2, 0.7])}
    first = {problem: value + 0.1 for problem, value in second.items()}
    assert scores.paired_difference(first, second) == pytest.approx((0.1, 0), abs=1e-12)
    with pytest.raises(InputError, match="different problems"):
        scores.paired_difference(first, {**second, "p9": 0.0})


def config(out, models, data, **settings):
    settings = {"temperature": 1.0, "top_p": 1.0, "k": 3, "max_response_tokens": 6, **settings}
    return evaluate.Config(out=str(out), models=tuple(models), data=(data,), **settings)


def run(out, models, data, **settings) -> dict:
    """What an evaluation wrote to results.json, by the names of checkpoint and data set."""
    evaluate.main(config(out, models, data, **settings))
    return json.loads((out / "results.json").read_text())["results"]


def record_sampled(monkeypatch) -> list[str]:
    """A list that receives the id of every problem that is sampled from here on."""
    sampled, sample = [], evaluate.sample_rollouts

    def recording(engine, problems, *arguments, **options):
        sampled.extend(problem.id for problem in problems)
        return sample(engine, problems, *arguments, **options)

    monkeypatch.setattr(evaluate, "sample_rollouts", recording)
    return sampled


def test_checkpoints_are_compared_in_tables_and_pictures(student, teacher, test_problems, tmp_path, capsys):
    """Labels name directories inside the report, whatever is in them."""
    labels = ('../RL\'d "teacher" $\\foo$', "1H/rl/bridge")
    results = run(tmp_path / "report", [teacher, student], test_problems, labels=labels)
    table, report = capsys.readouterr().out, tmp_path / "report"
    assert "Differences on test, row minus column" in table and (report / "table.md").read_text() in table
    assert all(f"| {label} | " in table for label in labels) and results[labels[1]]["test"]["problems"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["report"] and (report / "bars.png").exists()
    assert {path.name for path in report.iterdir() if path.is_dir()} == {"RL-d-teacher-foo", "1H-rl-bridge"}
    path = Path(results[labels[1]]["test"]["samples"])
    settings, *lines = json_lines(path)
    assert path.parent == report / "1H-rl-bridge" and settings["settings"]["k"] == 3
    assert len(lines) == 6 * 3 and {"id", "response", "correct", "tokens"} <= lines[0].keys()


CHANGES = [
    dict(seed=1), dict(k=1), dict(temperature=0.5), dict(top_p=0.5), dict(top_k=5), dict(max_response_tokens=5),
    dict(stop=(":",)), dict(chat_template=False),
]  # fmt: skip


def test_samples_are_used_again_for_the_same_settings_only(student, test_problems, tmp_path, monkeypatch):
    """Each change samples anew, and the samples of earlier settings stay."""
    report, sampled = tmp_path / "report", record_sampled(monkeypatch)
    path = Path(run(report, [student], test_problems)["student"]["test"]["samples"])
    first = path.read_bytes()
    for change in CHANGES:
        run(report, [student], test_problems, **change)
    changed = write_checkpoint(tmp_path / "other" / "student", seed=9)
    run(report, [changed], test_problems)
    GenerationConfig(eos_token_id=[1, 0, 9]).save_pretrained(changed)
    run(report, [changed], test_problems)  # other end tokens and the same weights
    assert len(sampled) == 6 * (1 + len(CHANGES) + 2)
    run(report, [student], test_problems)
    assert len(sampled) == 6 * (1 + len(CHANGES) + 2) and path.read_bytes() == first


@pytest.mark.parametrize("decoding", [dict(top_p=1e-6), dict(top_k=1), dict(temperature=0.0)])
def test_decoding_settings_reach_the_sampler(decoding, student, test_problems, tmp_path):
    """Each of these leaves the likeliest token alone, so all samples of a problem are the same."""
    results = run(tmp_path, [student], test_problems, **decoding)
    lines = json_lines(Path(results["student"]["test"]["samples"]))[1:]
    assert len({(line["id"], line["response"]) for line in lines}) == len({line["id"] for line in lines})


def test_a_score_on_training_problems_is_marked(student, test_problems, tmp_path, monkeypatch):
    """In the table, under it and at the bar: the text of the picture is checked where it is drawn."""
    model = shutil.copytree(student, tmp_path / "trained")
    seen = [problem.id for problem in lib.data.load_problems(test_problems)][:2]
    (model / "run.json").write_text(json.dumps({"stage": "opd", "parents": {}, "trained_on": seen}))
    drawn = []
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **options: drawn.append(text))
    run(tmp_path / "report", [student, str(model)], test_problems)
    table = (tmp_path / "report" / "table.md").read_text()
    assert "† trained was trained on 2 of the 6 problems of test" in table and table.count("†") == 2
    assert [text.endswith("†") for text in drawn] == [False, True]


def test_checkpoints_of_one_architecture_share_an_engine(student, teacher, test_problems, tmp_path, monkeypatch):
    """Each is still judged on its own weights and ends its responses at its own tokens and those of --stop."""
    other = write_checkpoint(tmp_path / "other", seed=9, head_dim=32)
    GenerationConfig(eos_token_id=[1, 9]).save_pretrained(other)

    def samples(out, *models):
        results = run(tmp_path / out, models, test_problems, stop=("*",))
        return {label: Path(result["test"]["samples"]).read_text() for label, result in results.items()}

    alone = samples("a", student) | samples("b", other)
    made, make_engine = [], evaluate.make_engine
    monkeypatch.setattr(evaluate, "make_engine", lambda cfg, *a, **k: made.append(a[0]) or make_engine(cfg, *a, **k))
    together = samples("c", student, other, teacher)
    assert together.pop("teacher") and together == alone == samples("d", other, student)
    assert made == [student, teacher, other]


@pytest.mark.parametrize("kept, cut, lost", [(0, 50, 6), (16, 0, 1), (17, 20, 1), (18, -1, 0)])
def test_a_killed_evaluation_continues_from_its_samples(kept, cut, lost, student, test_problems, tmp_path, monkeypatch):
    """A file of 19 lines, cut after `kept` lines and some bytes of the next, costs the problem that it was cut at."""
    straight = run(tmp_path / "straight", [student], test_problems)
    path = Path(straight["student"]["test"].pop("samples"))
    lines = path.read_bytes().splitlines(True)
    (tmp_path / "report" / "student").mkdir(parents=True)
    (tmp_path / "report" / "student" / path.name).write_bytes(b"".join(lines[:kept]) + lines[kept][:cut])
    sampled = record_sampled(monkeypatch)
    continued = run(tmp_path / "report", [student], test_problems)
    assert sampled == [json.loads(line)["id"] for line in lines[1::3]][6 - lost :]
    continued["student"]["test"].pop("samples")
    assert continued == straight
    run(tmp_path / "report", [student], test_problems)  # and the file is whole again
    assert len(sampled) == lost


def test_samples_of_another_data_set_of_the_same_name_and_size_are_not_used(student, tmp_path, monkeypatch):
    sampled = record_sampled(monkeypatch)
    for number, directory in enumerate(("a", "b"), start=1):
        (tmp_path / directory).mkdir()
        data = write_problems(tmp_path / directory / "set.jsonl", 4, seed=number)
        scored = run(tmp_path / "report", [student], data)["student"]["set"]["scores"]
        assert len(sampled) == 4 * number
    assert list(scored) == sampled[4:]


def test_samples_graded_otherwise_are_graded_again_and_not_sampled(
    student, test_problems, tmp_path, monkeypatch, capsys
):
    """By another version of the verifier all 18 of them, and with another answer to a problem the 3 of this problem."""
    rows, data, version = json_lines(Path(test_problems)), tmp_path / "test.jsonl", scores.metadata.version
    shutil.copy(test_problems, data)
    path = Path(run(tmp_path / "report", [student], str(data))["student"]["test"]["samples"])
    before, sampled = json_lines(path), record_sampled(monkeypatch)
    for verdict, regraded, right in ((True, 18, 18), (False, 3, 15)):
        if regraded == 18:
            monkeypatch.setattr(scores.metadata, "version", lambda name: version(name) + ".post1")
        else:
            rows[2]["answer"] = "123"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        grade = lambda rollouts, _, verdict=verdict: [setattr(r, "correct", verdict) for r in rollouts]
        monkeypatch.setattr(scores, "grade", grade)
        capsys.readouterr()
        result = run(tmp_path / "report", [student], str(data))["student"]["test"]
        assert f"{regraded} samples regraded" in capsys.readouterr().out
        after = json_lines(path)
        assert [line.get("response") for line in after] == [line.get("response") for line in before] and not sampled
        assert sum(line["correct"] for line in after[1:]) == right and result["avg"] == pytest.approx(right / 18)
        run(tmp_path / "report", [student], str(data))
        assert "regraded" not in capsys.readouterr().out
    assert not any(line["correct"] for line in after[1 + 2 * 3 : 1 + 3 * 3])
