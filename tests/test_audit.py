"""Responses made elsewhere are graded; what is wrong with a file is said in one sentence."""

import json

import pytest
from matplotlib.figure import Figure

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


def checkpoint(directory, half: str, **metrics) -> str:
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({"config": {"half": half}}))
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
    audit.main(audit.Config(curves=tuple(runs), out=str(tmp_path / "out")))
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in saved[0].axes]
    assert legends == [
        ["bridge: accuracy, labels 1H", "student: reward, labels 2H", "direct: reward, all labels"],
        ["bridge: reverse kl, labels 1H"],
    ]


def test_no_curves_are_claimed_where_none_are_drawn(tmp_path, capsys):
    """SFT logs a cross-entropy, for which there is no panel."""
    run = checkpoint(tmp_path / "sft", "1H", cross_entropy=0.2)
    with pytest.raises(InputError, match="none of them has a metrics.jsonl with rewards, accuracies or KLs"):
        audit.main(audit.Config(curves=(run,), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and "wrote" not in capsys.readouterr().out
