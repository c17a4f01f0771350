"""Responses made elsewhere are graded, and two runs are compared."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from common import InputError
from experiments import audit
from lib.plots import draw_curves


def test_responses_made_elsewhere_are_graded(tmp_path, capsys):
    rows = [
        {"answer": "42", "response": "so it is \\boxed{42}", "source": "kept as it is"},
        {"answer": "42", "response": "I think of 42, so \\boxed{41}"},
        {"answer": "\\frac12", "response": "\\boxed{0.5}"},
        {"answer": "7", "response": "7"},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    audit.main(audit.Config(out=str(tmp_path / "out"), responses=str(tmp_path / "answers.jsonl")))
    graded = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row.pop("correct") for row in graded] == [True, False, True, False]
    assert [row.pop("how") for row in graded] == ["fast", "fast", "math_verify", "no_answer"] and graded == rows
    assert "2 of 4 correct (50.0 %)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"answer": "1"}'], "must have one object a line"),
        (['{"answer": 1, "response": "a"}'], "with texts answer and response"),
        ([], "must have one object a line"),
    ],
)
def test_bad_response_files(tmp_path, lines, message):
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        audit.main(audit.Config(out=str(tmp_path / "out"), responses=str(tmp_path / "answers.jsonl")))
    assert not (tmp_path / "out").exists()


def checkpoint(directory, half: str, **metrics) -> str:
    directory.mkdir()
    (directory / "run.json").write_text(
        json.dumps({"stage": "opd", "parents": {}, "trained_on": [], "config": {"half": half}})
    )
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 0, **metrics}) + "\n")
    return str(directory)


def test_curves_say_which_labels_they_are_for(tmp_path, monkeypatch):
    """A Stage 3 starts below the end of its bridge because it sees other problems, and the picture has to say so."""
    runs = [
        checkpoint(tmp_path / "bridge", "1H", reverse_kl=0.2, accuracy=0.9),
        checkpoint(tmp_path / "student", "2H", reward=0.6),
        checkpoint(tmp_path / "direct", "full", reward=0.1),
    ]
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    draw_curves({Path(run).name: run for run in runs}, tmp_path / "curves.png")
    labels = [[text.get_text() for text in axis.texts] for axis in saved[0].axes]  # from the lowest line to the highest
    assert labels == [["direct, all labels", "student, labels 2H", "bridge, labels 1H"], ["bridge, labels 1H"]]


def test_a_run_with_a_reward_and_an_accuracy_has_one_curve_of_its_rewards(tmp_path, monkeypatch):
    run, saved = checkpoint(tmp_path / "direct", "full", reward=-0.4, accuracy=0.9), []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    draw_curves({"direct": run}, tmp_path / "curves.png")
    [line] = saved[0].axes[0].lines
    assert list(line.get_ydata()) == [-0.4]


def test_a_comparison_looks_at_every_session_of_a_resumed_run():
    session = {"code": "a", "hardware": "x", "ranks": 1, "packages": {"torch": "1"}, "files": {"opd.py": "0123456789"}}
    first = {"stage": "opd", "sessions": [session]}
    second = {"stage": "opd", "sessions": [session, {**session, "code": "b", "packages": {"torch": "2"}}, session]}
    assert audit.differences(first, second) == {"code": ("a", "a, then b"), "torch": ("1", "1, then 2")}
    assert audit.differences(second, second) == {}
    third = {"stage": "opd", "sessions": [session, {**session, "files": {"opd.py": "abcdefghij"}}]}
    assert audit.differences(first, third) == {"opd.py": ("01234567", "01234567, then abcdefgh")}
