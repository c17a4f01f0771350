"""Statistics against hand-made numbers, and the script on tiny checkpoints."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model, write_checkpoint

import evaluate
from common import InputError
from experiments import toy
from lib import scores


def samples(correct, tokens=5, reason="stop"):
    """Sample lines from rows of booleans, one row a problem."""
    return [
        {"id": f"p{i}", "sample": j, "correct": bool(value), "finish_reason": reason, "tokens": tokens}
        for i, row in enumerate(correct)
        for j, value in enumerate(row)
    ]


def test_statistics_of_known_samples():
    summary = scores.summarise(samples([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]), k=4)
    assert summary["avg"] == pytest.approx(0.5) and summary["pass"] == pytest.approx(2 / 3)
    assert summary["se"] == pytest.approx(np.std([0.5, 0, 1], ddof=1) / math.sqrt(3))
    assert summary["scores"] == {"p0": 0.5, "p1": 0.0, "p2": 1.0} and summary["tokens"] == 5
    assert scores.summarise(samples([[1]], reason="length"), k=1)["truncated"] == 1.0


def test_the_paired_error_is_that_of_the_differences():
    easy_and_hard = np.array([0.1, 0.5, 0.9, 0.2, 0.7])
    first = {f"p{i}": value + 0.1 for i, value in enumerate(easy_and_hard)}
    second = {f"p{i}": value for i, value in enumerate(easy_and_hard)}
    mean, error = scores.paired_difference(first, second)
    assert mean == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="different problems"):
        scores.paired_difference(first, {**second, "p9": 0.0})


def config(out, models, data, **settings):
    settings = {"temperature": 1.0, "top_p": 1.0, "k": 3, "max_response_tokens": 6, **settings}
    return evaluate.Config(out=str(out), models=tuple(models), data=(data,), **settings)


def test_checkpoints_are_compared_in_tables_and_pictures(
    student, teacher, test_problems, tmp_path, capsys, monkeypatch
):
    evaluate.main(config(tmp_path / "report", [student, teacher], test_problems))
    output = capsys.readouterr().out
    assert "| student | " in output and "Differences on test, row minus column" in output
    assert {"table.md", "results.json", "bars.png"} <= {path.name for path in (tmp_path / "report").iterdir()}
    report = json.loads((tmp_path / "report" / "results.json").read_text())
    assert report["results"]["student"]["test"]["problems"] == 6 and report["settings"]["k"] == 3
    lines = (tmp_path / "report" / "teacher" / "test.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 6 * 3 and {"id", "response", "correct", "tokens"} <= json.loads(lines[1]).keys()

    # The same again samples nothing; other settings, or other weights under the old name, sample anew.
    sampled = []
    sample = evaluate.sample_rollouts
    monkeypatch.setattr(evaluate, "sample_rollouts", lambda *a, **k: sampled.append(k["progress"]) or sample(*a, **k))
    evaluate.main(config(tmp_path / "report", [student, teacher], test_problems))
    assert sampled == []
    evaluate.main(config(tmp_path / "report", [student, teacher], test_problems, seed=1))
    assert len(sampled) == 2
    changed = write_checkpoint(tmp_path / "student", seed=9)
    evaluate.main(config(tmp_path / "report", [changed, teacher], test_problems, seed=1))
    assert len(sampled) == 3


def test_checkpoints_of_one_architecture_share_an_engine(student, teacher, test_problems, tmp_path, monkeypatch):
    """Each is still judged on its own weights and ends its responses at its own tokens, in either order."""
    other = tiny_model(seed=9, head_dim=32)
    other.generation_config.eos_token_id = [1, 9]
    other.save_pretrained(tmp_path / "other")
    toy.make_tokenizer().save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")
    for model in (student, other):
        evaluate.main(config(tmp_path / f"alone-{Path(model).name}", [model], test_problems))
    made, make_engine = [], evaluate.make_engine
    monkeypatch.setattr(evaluate, "make_engine", lambda cfg, *a, **k: made.append(a[0]) or make_engine(cfg, *a, **k))
    for number, models in enumerate(([student, other, teacher], [other, student])):
        evaluate.main(config(tmp_path / str(number), models, test_problems))
        for model in (student, other):
            name = Path(model).name
            together, alone = (tmp_path / where / name / "test.jsonl" for where in (str(number), f"alone-{name}"))
            assert together.read_text() == alone.read_text()
    assert made == [student, teacher, other]


def test_every_setting_that_decides_what_is_sampled_is_in_the_key():
    """All but where samples come from and go to, and how they are spread over machines."""
    elsewhere = {"out", "models", "labels", "data", "engine", "max_sequences", "kv_cache_gib", "tensor_parallel"}
    assert set(evaluate.DECODING) == {field.name for field in dataclasses.fields(evaluate.Config)} - elsewhere


def test_samples_repeat_with_their_seed(student, test_problems, tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        evaluate.main(config(tmp_path / name, [student], test_problems, seed=seed))
    first, second, third = ((tmp_path / name / "student" / "test.jsonl").read_text().splitlines()[1:] for name in "abc")
    assert first == second != third


def test_bad_arguments(student, test_problems, tmp_path):
    for settings, message in [
        (dict(models=()), "there is nothing to evaluate"),
        (dict(models=(student, student)), "one different name for each of the 2 --models"),
        (dict(models=("nowhere",)), "--models 'nowhere' is not a checkpoint directory"),
        (dict(models=(student,), k=0), "--k 0"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.main(evaluate.Config(out=str(tmp_path / "out"), **{"data": (test_problems,), **settings}))
