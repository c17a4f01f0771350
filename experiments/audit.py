"""Looks at checkpoints that exist: where one comes from, and how two differ. Grades responses made elsewhere.

    python -m experiments.audit --lineage DIR [--reports DIR ...]   a checkpoint's history, with scores from reports
    python -m experiments.audit --compare DIR DIR                   every setting, parent and label set that differs
    python -m experiments.audit --responses FILE.jsonl --out DIR    grades responses that were made elsewhere

`--responses` takes one object a line with `answer` and `response`; DIR/FILE.jsonl receives the same lines with
`correct` and `how` added. It needs no model, so it also serves to audit the verifier.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import common
from common import InputError
from evaluate import markdown_table, percent
from lib.files import json_lines, whole
from lib.lineage import read_lineage, settings_and_parents
from lib.verifier import Verifier


@dataclass
class Config:
    lineage: str | None = None  # print this checkpoint's history
    reports: tuple[str, ...] = ()  # evaluation reports to take the history's scores from
    compare: tuple[str, str] | None = None  # print how the runs of these two checkpoints differ
    responses: str | None = None  # grade the responses in this file
    out: str | None = None  # directory to write to


# Metrics whose first and last values say how a stage went.
MEASURES = ("reward", "forward_kl", "cross_entropy", "reverse_kl", "accuracy")


def history(lineage: dict, scores: dict[str, str], role: str = "") -> list[str]:
    """A checkpoint's lineage as a tree, one line for each checkpoint.

    A line has the path, and for a checkpoint that a stage wrote the stage, its labels, what its first and last step
    measured, and its scores. `scores` are texts by the content hash of the weights.
    """
    line = f"{role}{lineage['path']}"
    if "stage" in lineage:
        cfg = lineage["config"]
        line += f"  [{lineage['stage']}, {cfg['half']}, {len(lineage['trained_on'])} labels, {lineage['steps']} steps"
        for name in MEASURES:
            if None not in (lineage.get("first", {}).get(name), lineage.get("last", {}).get(name)):
                line += f", {name} {lineage['first'][name]:.3g} -> {lineage['last'][name]:.3g}"
        line += "]"
    line += f"  {scores.get(lineage['sha256'], '')}"
    lines = [line.rstrip()]
    parents = list(lineage.get("parents", {}).items())
    for number, (name, parent) in enumerate(parents):
        last = number == len(parents) - 1
        below = history(parent, scores, f"{name}: ")
        lines += [("└─ " if last else "├─ ") + below[0]]
        lines += [("   " if last else "│  ") + text for text in below[1:]]
    return lines


def differences(first: dict, second: dict) -> dict[str, tuple]:
    """Every difference between two lineages that could explain a difference of results: settings, parents, code.

    Settings have their names in a Config; the output directory does not count. Labels are compared by their number and
    as sets: the halves 1H and 2H differ in `half` and in `labels`. Of a run that was resumed, the code, packages,
    hardware and ranks of every session count.
    """
    facts = []
    for lineage in (first, second):
        labels = sorted(lineage.get("trained_on", ()))
        sessions = {}
        for session in lineage.get("sessions", [lineage]):
            machine = {name: session.get(name) for name in ("code", "hardware", "ranks")}
            files = {name: digest[:8] for name, digest in session.get("files", {}).items()}
            for name, value in {**machine, **session.get("packages", {}), **files}.items():
                sessions.setdefault(name, []).append(str(value))
        facts.append({
            **settings_and_parents(lineage), "steps": lineage.get("steps"),
            "labels": f"{len(labels)} (sha256 {hashlib.sha256(' '.join(labels).encode()).hexdigest()[:8]})",
            **{name: ", then ".join(dict.fromkeys(values)) for name, values in sessions.items()},
        })  # fmt: skip
    names = dict.fromkeys([*facts[0], *facts[1]])
    pairs = {name: (facts[0].get(name), facts[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def grade_file(source: Path, target: Path) -> None:
    """Grades the lines of a file, and writes them to `target` with `correct` and `how` added."""
    rows = json_lines(source)
    if not rows or not all(isinstance(row.get(key), str) for row in rows for key in ("answer", "response")):
        raise InputError(f"--responses {str(source)!r} must have one object a line, with texts answer and response")
    with Verifier() as verifier, tqdm(total=len(rows), desc="grading", unit="response") as bar:
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            verdicts = verifier.check([row["response"] for row in part], [row["answer"] for row in part])
            for row, verdict in zip(part, verdicts):
                row |= {"correct": verdict.correct, "how": verdict.how}
            bar.update(len(part))
    with whole(target) as unfinished:
        unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    total = sum(row["correct"] for row in rows)
    print(f"{total} of {len(rows)} correct ({100 * total / len(rows):.1f} %); wrote {target}")


def print_lineage(checkpoint: str, reports: tuple[str, ...]) -> None:
    scores: dict[str, str] = {}
    for directory in reports:
        report = json.loads((Path(directory) / "results.json").read_text(encoding="utf-8"))
        for row in report["results"].values():
            for name, result in row.items():
                score = f"{name} {percent(result['avg'], result['se'])} %"
                scores[result["sha256"]] = ", ".join(filter(None, [scores.get(result["sha256"]), score]))
    print("\n".join(history(read_lineage(checkpoint), scores)))


def print_differences(directories: tuple[str, str]) -> None:
    pairs = differences(*map(read_lineage, directories)).items()
    rows = [[name, *(str(value).replace("\n", "\\n") for value in pair)] for name, pair in pairs]  # a row is one line
    print(markdown_table(["", *directories], rows) if rows else "The two runs do not differ.")


def main(cfg: Config) -> None:
    if cfg.lineage:
        print_lineage(cfg.lineage, cfg.reports)
    elif cfg.compare:
        print_differences(cfg.compare)
    elif cfg.responses and cfg.out:
        grade_file(Path(cfg.responses), Path(cfg.out) / Path(cfg.responses).name)
    else:
        raise InputError("give --lineage, or --compare, or --responses with --out")


if __name__ == "__main__":
    common.cli(main, Config)
