"""Responses made elsewhere are graded, and two runs are compared."""

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
    assert [row.pop("correct") for row in graded] == [True, False, True, False]
    assert [row.pop("how") for row in graded] == ["fast", "fast", "math_verify", "no_answer"] and graded == rows
    assert "2 of 4 correct (50.0 %)" in capsys.readouterr().out


@pytest.mark.parametrize("lines", ['{"answer": "1"}', '{"answer": 1, "response": "a"}', ""])
def test_bad_response_files(tmp_path, lines):
    (tmp_path / "answers.jsonl").write_text(lines)
    with pytest.raises(InputError, match="must have one object per line, with texts answer and response"):
        audit.main(audit.Config(out=str(tmp_path / "out"), responses=str(tmp_path / "answers.jsonl")))
    assert not (tmp_path / "out").exists()


def test_a_comparison_looks_at_every_session_of_a_resumed_run():
    session = {"code": "a", "hardware": "x", "ranks": 1, "packages": {"torch": "1"}, "files": {"opd.py": "0123456789"}}
    first = {"stage": "opd", "sessions": [session]}
    other = {**session, "code": "b", "packages": {"torch": "2"}, "files": {"opd.py": "abcdefghij"}}
    second = {"stage": "opd", "sessions": [session, other, session]}
    torch, opd = ("1", "1, then 2"), ("01234567", "01234567, then abcdefgh")
    assert audit.differences(first, second) == {"code": ("a", "a, then b"), "torch": torch, "opd.py": opd}
    assert audit.differences(second, second) == {}
