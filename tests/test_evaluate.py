"""Statistics against hand-made numbers, and the script on tiny checkpoints."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model, write_checkpoint, write_problems

import evaluate
from common import InputError
from experiments import toy
from lib import plots, samples, scores

ROOT = Path(__file__).parent.parent


def made_up_samples(correct, tokens=5, reason="stop"):
    """Sample lines from rows of booleans, one row a problem."""
    return [
        {"id": f"p{i}", "sample": j, "correct": bool(value), "finish_reason": reason, "tokens": tokens}
        for i, row in enumerate(correct)
        for j, value in enumerate(row)
    ]


def test_statistics_of_known_samples():
    summary = scores.summarise(made_up_samples([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]), k=4)
    assert summary["avg"] == pytest.approx(0.5) and summary["pass"] == pytest.approx(2 / 3)
    assert summary["se"] == pytest.approx(np.std([0.5, 0, 1], ddof=1) / math.sqrt(3))
    assert summary["scores"] == {"p0": 0.5, "p1": 0.0, "p2": 1.0} and summary["tokens"] == 5
    assert scores.summarise(made_up_samples([[1]], reason="length"), k=1)["truncated"] == 1.0


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


def record_sampled(monkeypatch) -> list[str]:
    """A list that receives the id of every problem that is sampled from here on."""
    sampled, sample = [], evaluate.sample_rollouts

    def recording(engine, problems, *arguments, **options):
        sampled.extend(problem.id for problem in problems)
        return sample(engine, problems, *arguments, **options)

    monkeypatch.setattr(evaluate, "sample_rollouts", recording)
    return sampled


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
    sampled = record_sampled(monkeypatch)
    evaluate.main(config(tmp_path / "report", [student, teacher], test_problems))
    assert sampled == []
    evaluate.main(config(tmp_path / "report", [student, teacher], test_problems, seed=1))
    assert len(sampled) == 2 * 6
    changed = write_checkpoint(tmp_path / "student", seed=9)
    evaluate.main(config(tmp_path / "report", [changed, teacher], test_problems, seed=1))
    assert len(sampled) == 3 * 6
    for stop, expected in (((":",), 4 * 6), ((":",), 4 * 6), ((":", "*"), 5 * 6)):
        evaluate.main(config(tmp_path / "report", [teacher], test_problems, seed=1, stop=stop))
        assert len(sampled) == expected


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
    """All but where samples come from and go to, how they are spread over machines, and how they are graded."""
    elsewhere = {"out", "models", "labels", "data", "engine", "max_sequences", "kv_cache_gib", "tensor_parallel"}
    elsewhere |= {"reward"}
    assert set(evaluate.DECODING) == {field.name for field in dataclasses.fields(evaluate.Config)} - elsewhere


def test_samples_repeat_with_their_seed(student, test_problems, tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        evaluate.main(config(tmp_path / name, [student], test_problems, seed=seed))
    first, second, third = ((tmp_path / name / "student" / "test.jsonl").read_text().splitlines()[1:] for name in "abc")
    assert first == second != third


# What is sampled is kept, and what is kept is used only where it belongs


def files(report: Path) -> dict[str, bytes]:
    return {str(path.relative_to(report)): path.read_bytes() for path in report.rglob("*.*") if path.suffix != ".json"}


def command(out: Path, model: str, data: str, *more: str) -> list[str]:
    words = (
        f"--models {model} --data {data} --out {out} --k 2 --max-sequences 4 --max-response-tokens 16 --engine torch"
    )
    return [str(ROOT / "evaluate.py"), *words.split(), *more]


def as_on_the_command_line(out: Path, model: str, data: str) -> evaluate.Config:
    return evaluate.Config(
        out=str(out), models=(model,), data=(data,), k=2, max_sequences=4, max_response_tokens=16, engine="torch"
    )


@pytest.fixture(scope="module")
def straight(student, tmp_path_factory):
    """A data set of 60 problems, and the report of an evaluation that was left undisturbed."""
    directory = tmp_path_factory.mktemp("straight")
    data = write_problems(directory / "many.jsonl", 60, seed=3)
    subprocess.run([sys.executable, *command(directory / "report", student, data)], check=True, capture_output=True)
    return data, directory / "report"


def test_a_killed_evaluation_goes_on_where_it_was(student, straight, tmp_path):
    data, undisturbed = straight
    out = tmp_path / "report"
    partial = out / "student" / "many.jsonl.partial"
    process = subprocess.Popen([sys.executable, *command(out, student, data)], stderr=subprocess.DEVNULL)
    while not (partial.exists() and partial.stat().st_size > 5000):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = partial.read_bytes()
    assert os.listdir(out / "student") == ["many.jsonl.partial"]
    again = subprocess.run([sys.executable, *command(out, student, data)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert files(out) == files(undisturbed)
    assert (out / "student" / "many.jsonl").read_bytes().startswith(kept[: kept.rindex(b"\n")])
    first = again.stderr[again.stderr.index("student many:") :]
    assert "| 0/60" not in first and "60/60" in first  # one bar, which begins at what was kept


@pytest.mark.parametrize(
    "kept, bytes_of_the_next, lost",
    [(0, 0, 60), (0, 50, 60), (1, 0, 60), (118, 0, 2), (119, 0, 1), (119, 20, 1), (120, -2, 1), (120, -1, 0)],
)
def test_a_file_cut_anywhere_costs_no_more_than_the_problem_it_was_cut_at(
    kept, bytes_of_the_next, lost, student, straight, tmp_path, monkeypatch
):
    """Of 121 lines, the first of which is the header."""
    data, undisturbed = straight
    lines = (undisturbed / "student" / "many.jsonl").read_bytes().splitlines(True)
    (tmp_path / "report" / "student").mkdir(parents=True)
    partial = tmp_path / "report" / "student" / "many.jsonl.partial"
    partial.write_bytes(b"".join(lines[:kept]) + lines[kept][:bytes_of_the_next])
    sampled = record_sampled(monkeypatch)
    evaluate.main(as_on_the_command_line(tmp_path / "report", student, data))
    assert files(tmp_path / "report") == files(undisturbed)
    assert sampled == [json.loads(line)["id"] for line in lines[1::2]][60 - lost :]


def test_a_damaged_line_in_the_middle_is_sampled_again(student, straight, tmp_path, monkeypatch):
    data, undisturbed = straight
    lines = (undisturbed / "student" / "many.jsonl").read_bytes().splitlines(True)
    (tmp_path / "report" / "student").mkdir(parents=True)
    damaged = [*lines[:40], b"\0\xff\n", *lines[41:]]
    (tmp_path / "report" / "student" / "many.jsonl").write_bytes(b"".join(damaged))
    sampled = record_sampled(monkeypatch)
    evaluate.main(as_on_the_command_line(tmp_path / "report", student, data))
    assert sampled == [json.loads(lines[40])["id"]] and files(tmp_path / "report") == files(undisturbed)


def test_samples_of_another_data_set_of_the_same_name_and_size_are_not_used(student, tmp_path, monkeypatch):
    sampled = record_sampled(monkeypatch)
    for number, directory in enumerate(("a", "b"), start=1):
        (tmp_path / directory).mkdir()
        data = write_problems(tmp_path / directory / "set.jsonl", 4, seed=number)
        evaluate.main(config(tmp_path / "report", [student], data))
        assert len(sampled) == 4 * number
    scored = json.loads((tmp_path / "report" / "results.json").read_text())["results"]["student"]["set"]["scores"]
    assert list(scored) == sampled[4:]

    # Another wording of the prompts is another data set for the model, too.
    evaluate.main(config(tmp_path / "report", [student], data, prompt="{problem} ?"))
    changed = write_checkpoint(tmp_path / "student", seed=1, head_dim=32)
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|user|><|user|>")
    tokenizer.save_pretrained(changed)
    evaluate.main(config(tmp_path / "report", [changed], data, prompt="{problem} ?"))
    assert len(sampled) == 4 * 4


@pytest.mark.parametrize("change", ["the verifier", "an answer"])
def test_samples_graded_otherwise_are_graded_again_and_not_sampled(
    change, student, test_problems, tmp_path, monkeypatch, capsys
):
    rows = [json.loads(line) for line in Path(test_problems).read_text().splitlines()]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(config(tmp_path / "report", [student], str(data)))
    path = tmp_path / "report" / "student" / "test.jsonl"
    _, before = samples.read_samples(path)
    sampled = record_sampled(monkeypatch)
    if change == "the verifier":  # one by which everything is right
        version = samples.metadata.version
        monkeypatch.setattr(samples.metadata, "version", lambda name: version(name) + ".post1")
        monkeypatch.setattr(samples, "grade", lambda rollouts, _: [setattr(r, "correct", True) for r in rollouts])
    else:
        rows[2]["answer"] = "123"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(
            samples,
            "grade",
            lambda rollouts, _: [setattr(r, "correct", r.problem.answer == "123") for r in rollouts],
        )
    capsys.readouterr()
    evaluate.main(config(tmp_path / "report", [student], str(data)))
    _, after = samples.read_samples(path)
    assert sampled == [] and [line["response"] for line in after] == [line["response"] for line in before]
    right = range(18) if change == "the verifier" else range(6, 9)
    assert [number for number, line in enumerate(after) if line["correct"]] == list(right)
    assert "18 samples graded again" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "results.json").read_text())["results"]["student"]["test"]
    assert report["avg"] == pytest.approx(len(right) / 18)
    evaluate.main(config(tmp_path / "report", [student], str(data)))
    assert "graded again" not in capsys.readouterr().out


def test_two_ranks_go_on_with_what_one_has_left_and_grade_it_again(student, straight, tmp_path):
    data, undisturbed = straight
    lines = (undisturbed / "student" / "many.jsonl").read_text().splitlines()
    header = json.loads(lines[0])
    old = [{**json.loads(line), "correct": True, "answer": "9"} for line in lines[1:82]]  # 40 problems and a half
    text = "".join(json.dumps(line) + "\n" for line in ({**header, "grading": "an older one"}, *old))
    (tmp_path / "report" / "student").mkdir(parents=True)
    (tmp_path / "report" / "student" / "many.jsonl.partial").write_text(text)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, *command(tmp_path / "report", student, data)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "80 samples graded again" in done.stdout
    assert files(tmp_path / "report") == files(undisturbed)
    results = [json.loads((out / "results.json").read_text())["results"] for out in (tmp_path / "report", undisturbed)]
    assert results[0] == results[1]


# Names and numbers


def test_labels_name_directories_inside_the_report_and_stand_in_the_tables(student, teacher, test_problems, tmp_path):
    labels = ('../RL\'d "teacher" $\\foo$', "1H/rl/bridge")
    evaluate.main(config(tmp_path / "report", [student, teacher], test_problems, labels=labels))
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    names = {path.name for path in (tmp_path / "report").iterdir() if path.is_dir()}
    assert names == {"RL-d-teacher-foo", "1H-rl-bridge"}
    table = (tmp_path / "report" / "table.md").read_text()
    assert all(f"| {label} | " in table for label in labels) and (tmp_path / "report" / "bars.png").exists()


def test_a_picture_that_cannot_be_drawn_is_not_said_to_be_written(
    student, test_problems, tmp_path, capsys, monkeypatch
):
    (tmp_path / "report" / "bars.png").mkdir(parents=True)
    evaluate.main(config(tmp_path / "report", [student], test_problems))
    said = capsys.readouterr().out.splitlines()
    assert any("bars.png could not be drawn (" in line for line in said)
    assert said[-1] == f"wrote {tmp_path / 'report'}: table.md, results.json and every sample"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "draw_bars", plots.draw_bars)
        assert plots.draw_bars({"a": {"b": (0.5, 0.1)}}, "title", tmp_path / "bars.png", {"a": "small"})


def test_bad_arguments(student, test_problems, tmp_path):
    for settings, message in [
        (dict(models=()), "there is nothing to evaluate"),
        (dict(models=(student, student)), "one different name for each of the 2 --models"),
        (dict(models=("nowhere",)), "--models 'nowhere' is not a checkpoint directory"),
        (dict(models=(student,), k=0), "--k 0"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.main(evaluate.Config(out=str(tmp_path / "out"), **{"data": (test_problems,), **settings}))
