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
