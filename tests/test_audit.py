"""Responses made elsewhere are graded; what is wrong with a file is said in one sentence."""

import json

import pytest

from common import InputError
from experiments import audit


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
    assert [row.pop("correct") for row in graded] == [True, False, True, False] and graded == rows
    assert "2 of 4 correct (50.0 %)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"answer": "1", "response": "a"}', "not json"], "line 2 of"),
        (['{"answer": "1"}'], "line 1 of"),
        (['{"answer": 1, "response": "a"}'], "must be text"),
        (['{"answer": " ", "response": "a"}'], "the answer not empty"),
        ([], "is empty"),
    ],
)
def test_bad_response_files(tmp_path, lines, message):
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        audit.main(audit.Config(out=str(tmp_path / "out"), responses=str(tmp_path / "answers.jsonl")))
    assert not (tmp_path / "out").exists()


def test_curves_say_which_labels_they_are_on(tmp_path, monkeypatch):
    """Otherwise Stage 3, whose labels are new to the student, seems to begin by losing what the bridge had learnt."""
    drawn = {}
    monkeypatch.setattr(audit, "draw_curves", lambda curves, picture: drawn.update(curves) or True)
    for name, half in (("direct", "full"), ("bridge", "1H"), ("student", "2H")):
        (tmp_path / name).mkdir()
        record = {"stage": "opd", "parents": {}, "consumed": [], "config": {"half": half}}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    (tmp_path / "raw").mkdir()
    curves = [str(tmp_path / name) for name in ("direct", "bridge", "student", "raw")]
    audit.main(audit.Config(curves=tuple(curves), out=str(tmp_path)))
    assert drawn == dict(zip(["direct, all labels", "bridge, labels 1H", "student, labels 2H", "raw"], curves))
