"""Responses made elsewhere and a report's samples are graded; what is wrong with a file is said in one sentence."""

import json

import pytest
from matplotlib.figure import Figure

from common import InputError
from experiments import audit, string_scorer


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
    labels = [[text.get_text() for text in axis.texts] for axis in saved[0].axes]  # from the lowest line to the highest
    assert labels == [["direct, all labels", "student, labels 2H", "bridge, labels 1H"], ["bridge, labels 1H"]]


def test_no_curves_are_claimed_where_none_are_drawn(tmp_path, capsys):
    """SFT logs a cross-entropy, for which there is no panel."""
    run = checkpoint(tmp_path / "sft", "1H", cross_entropy=0.2)
    with pytest.raises(InputError, match="none of them has a metrics.jsonl with rewards, accuracies or KLs"):
        audit.main(audit.Config(curves=(run,), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and "wrote" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "gold, answer, equal",
    [
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{14}{3}", r"\tfrac{14}3", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        ("5", r"5\text{ cm}^2.", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("90", r"90^\circ", True),
        (r"\$18.90", "18.90", True),
        ("10\\%", "10", True),
        ("0.25", ".25", True),
        ("5", "x = 5", True),
        (r"13\sqrt{3}", r"13\sqrt3", True),
        ("18.9", "18.90", False),  # what follows needs algebra, or at least numbers
        ("0.25", r"\frac{1}{4}", False),
        (r"2\sqrt{2}", r"\sqrt{8}", False),
        ("1,2", "2,1", False),
        ("6", "-6", False),
        ("6", "", False),
    ],
)
def test_what_string_equality_accepts(gold, answer, equal):
    assert string_scorer.is_correct(f"so it is \\boxed{{{answer}}}", gold) is equal
    assert not string_scorer.is_correct(f"so it is {answer}", gold)


def write_report(directory, label, responses, k=2):
    """A report of one checkpoint on one data set, with `k` successive responses for each problem, all stored as wrong."""
    lines = [
        {"id": f"p{i // k}", "sample": i % k, "prompt": "?", "answer": answer, "response": response, "correct": False,
         "finish_reason": "stop", "tokens": 3}
        for i, (answer, response) in enumerate(responses)
    ]  # fmt: skip
    result = {"avg": 0.0, "se": 0.0, "problems": len(responses) // k}
    (directory / "RL-d").mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps({"results": {label: {"set": result}}}))
    rows = [{"settings": {"k": k}}, *lines]
    (directory / "RL-d" / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_report_is_graded_again_by_two_scorers(tmp_path, capsys):
    both, verifier_only, neither = ("7", "\\boxed{7}"), ("2\\sqrt2", "\\boxed{\\sqrt8}"), ("7", "7")
    text_only = ("5\\text{ cm}", "\\boxed{5\\text{ inches}}")
    report = tmp_path / "report"
    write_report(report, "RL'd", [both, both, verifier_only, neither, neither, neither, text_only, neither])
    audit.main(audit.Config(regrade=str(report)))
    row = "| RL'd | set | 0.0 ± 0.0 | 37.5 ± 23.9 | 37.5 ± 23.9 | 0.0 ± 20.4 | 3 | 2 | 8 |"
    assert row in capsys.readouterr().out and row in (report / "regrade.md").read_text()
    found = [json.loads(line) for line in (report / "regrade.jsonl").read_text().splitlines()]
    assert [(line["id"], line["stored"], line["verifier"], line["string equality"]) for line in found] == [
        ("p0", False, True, True),
        ("p0", False, True, True),
        ("p1", False, True, False),
        ("p3", False, False, True),
    ]
    assert "--reward" not in (report / "regrade.md").read_text()
    assert found[2]["extracted"] == "\\sqrt8" and found[2]["checkpoint"] == "RL'd" and found[2]["data set"] == "set"
    before = {path: path.read_bytes() for path in report.rglob("*.*")}
    audit.main(audit.Config(regrade=str(report), out=str(tmp_path / "elsewhere")))
    assert {path: path.read_bytes() for path in report.rglob("*.*")} == before
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"regrade.md", "regrade.jsonl"}
    results = json.loads((report / "results.json").read_text())
    (report / "results.json").write_text(json.dumps({**results, "settings": {"reward": "mine.py:few_words"}}))
    audit.main(audit.Config(regrade=str(report)))
    assert "responses to which --reward mine.py:few_words gave 1 or more" in (report / "regrade.md").read_text()
    with (report / "RL-d" / "set.jsonl").open("r+") as file:
        file.truncate(700)
    with pytest.raises(InputError, match="does not hold all samples that the report was made from"):
        audit.main(audit.Config(regrade=str(report)))
