"""Looks at what is already there: where a checkpoint comes from, how two differ, and what scorers say.

    python -m experiments.audit --lineage DIR [--reports DIR ...]   a checkpoint's history, with scores from reports
    python -m experiments.audit --compare DIR DIR                   every setting, parent and label set that differs
    python -m experiments.audit --responses FILE.jsonl --out DIR    grades responses that were made elsewhere
    python -m experiments.audit --regrade REPORT                    a report's samples, graded by two scorers
    python -m experiments.audit --curves DIR ... --out DIR          learning curves of checkpoints, in one picture

`--responses` takes one object a line with `answer` and `response`; DIR/FILE.jsonl receives the same lines with
`correct` added. It needs no model, and so is how to audit the verifier.

`--regrade` says how much of a report's scores is the scorer's doing: beside the stored grades it puts those of the
present verifier and of string equality (experiments/string_scorer.py). The table and the samples on which the three do
not agree are written to regrade.md and regrade.jsonl.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import InputError
from evaluate import markdown_table, percent
from experiments import string_scorer
from lib.files import check_writable, write_whole
from lib.lineage import read_lineage
from lib.plots import draw_curves
from lib.samples import read_samples, sample_directories
from lib.scores import mean_and_error, paired_difference
from lib.verifier import Verifier, extract_answer


@dataclass
class Config:
    lineage: str | None = None  # print this checkpoint's history
    reports: tuple[str, ...] = ()  # evaluation reports to take the history's scores from
    compare: tuple[str, str] | None = None  # print how the runs of these two checkpoints differ
    responses: str | None = None  # grade the responses in this file
    regrade: str | None = None  # grade the samples of this evaluation report by two scorers
    curves: tuple[str, ...] = ()  # draw the learning curves of these checkpoints
    labels: tuple[str, ...] = ()  # names of the checkpoints in the picture; by default those of their directories
    out: str | None = None  # directory to write to; --regrade writes to its report if none is given


# Numbers of a metrics.jsonl whose first and last values say how a stage went.
MEASURES = ("reward", "forward_kl", "cross_entropy", "reverse_kl", "accuracy")


def history(lineage: dict, scores: dict[str, str], role: str = "") -> list[str]:
    """A checkpoint's lineage as a tree, one line for each checkpoint.

    A line has the path, and for a checkpoint that a stage wrote the stage, its labels, what its first and last step
    measured, and its scores. `scores` are texts by the content hash of the weights.
    """
    line = f"{role}{lineage['path']}"
    if "stage" in lineage:
        cfg = lineage["config"]
        line += f"  [{lineage['stage']}, {cfg['half']}, {len(lineage['consumed'])} labels, {lineage['steps']} steps"
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
    as sets: the halves 1H and 2H differ in `half` and in `labels`.
    """
    facts = []
    for lineage in (first, second):
        settings = {k: v for k, v in lineage.get("config", {}).items() if k not in ("out", "resume")}
        parents = {f"{role} weights": parent["sha256"] for role, parent in lineage.get("parents", {}).items()}
        labels = sorted(lineage.get("consumed", ()))
        facts.append({
            **settings, **parents, "stage": lineage.get("stage"), "steps": lineage.get("steps"),
            "labels": f"{len(labels)} (sha256 {hashlib.sha256(' '.join(labels).encode()).hexdigest()[:8]})",
            "reward file": lineage.get("reward_sha256"), "code": lineage.get("code"), **lineage.get("packages", {}),
            "ranks": lineage.get("ranks"),
        })  # fmt: skip
    names = dict.fromkeys([*facts[0], *facts[1]])
    pairs = {name: (facts[0].get(name), facts[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def grade_file(cfg: Config) -> None:
    """Grades the lines of `cfg.responses` and writes them, with `correct` added, to `cfg.out`."""
    source, target = Path(cfg.responses), Path(cfg.out) / Path(cfg.responses).name
    if not source.is_file():
        raise InputError(f"--responses {cfg.responses!r} is not a file; give a .jsonl file of answers and responses")
    if target.exists() and target.samefile(source):
        raise InputError(f"--out {cfg.out!r} is the directory of --responses itself; name another")
    rows = []
    lines = source.read_bytes().splitlines()  # of bytes, because text has more kinds of line ends
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            answer, response = row["answer"], row["response"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"line {number} of {cfg.responses!r} is not an object with answer and response; mend it"
            ) from None
        if not isinstance(answer, str) or not isinstance(response, str) or not answer.strip():
            raise InputError(
                f"line {number} of {cfg.responses!r}: answer and response must be text, the answer not empty; mend it"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"--responses {cfg.responses!r} is empty; give a line for each response")
    check_writable(cfg.out)
    for row, correct in zip(rows, verify(rows, "grading")):
        row["correct"] = correct
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    total = sum(row["correct"] for row in rows)
    print(f"{total} of {len(rows)} correct ({100 * total / len(rows):.1f} %); wrote {target}")


def verify(rows: list[dict], caption: str) -> list[bool]:
    """Whether the `response` of each row is right by its `answer`, as the verifier sees it, under a progress bar."""
    correct = []
    with Verifier() as verifier, tqdm(total=len(rows), desc=caption, unit="response") as bar:
        for start in range(0, len(rows), 256):
            chunk = rows[start : start + 256]
            verdicts = verifier.check([row["response"] for row in chunk], [row["answer"] for row in chunk])
            correct += [verdict.correct for verdict in verdicts]
            bar.update(len(chunk))
    return correct


def report_samples(cfg: Config) -> dict[tuple[str, str], list[dict]]:
    """The samples of the report `cfg.regrade` by checkpoint and data set. InputError if any is missing."""
    results = read_report(cfg.regrade, "--regrade")["results"]
    directories, found = sample_directories(cfg.regrade, list(results)), {}
    for label, name in ((label, name) for label, row in results.items() for name in row):
        path = directories[label] / f"{name}.jsonl"
        header, samples = read_samples(path)
        expected = results[label][name].get("problems", 0) * header.get("settings", {}).get("k", 0)
        if not samples or len(samples) != expected:
            raise InputError(
                f"--regrade {cfg.regrade!r}: {path} does not hold all samples that the report was made from; evaluate "
                "it anew"
            )
        found[label, name] = samples
    return found


def problem_scores(samples: list[dict], scores: list[float]) -> dict[str, float]:
    """The mean score of each problem's samples, by the problem's id."""
    by_problem: dict[str, list[float]] = {}
    for sample, score in zip(samples, scores):
        by_problem.setdefault(sample["id"], []).append(score)
    return {name: sum(values) / len(values) for name, values in by_problem.items()}


def regrade(cfg: Config) -> None:
    """Writes a table of the report's entries by three gradings, and the samples on which the three do not agree."""
    out = Path(cfg.out or cfg.regrade)
    entries, reward = report_samples(cfg), read_report(cfg.regrade, "--regrade").get("settings", {}).get("reward")
    check_writable(str(out))
    rows, disagreements = [], []
    for (label, name), samples in entries.items():
        graded = {
            "stored": [sample["correct"] for sample in samples],
            "verifier": verify(samples, f"{label} {name}"),
            "string equality": [string_scorer.is_correct(sample["response"], sample["answer"]) for sample in samples],
        }
        scores = {scorer: problem_scores(samples, correct) for scorer, correct in graded.items()}
        averages = [percent(*mean_and_error(np.array(list(each.values())))) for each in scores.values()]
        difference = percent(*paired_difference(scores["string equality"], scores["verifier"]))
        verdicts = list(zip(*graded.values()))
        changed = [sum(stored != now for stored, now, _ in verdicts), sum(now != text for _, now, text in verdicts)]
        rows.append([label, name, *averages, difference, *map(str, changed), str(len(samples))])
        disagreements += [
            {"checkpoint": label, "data set": name, **dict(zip(graded, verdict)),
             "extracted": extract_answer(sample["response"]), **sample}
            for sample, verdict in zip(samples, verdicts) if len(set(verdict)) > 1
        ]  # fmt: skip
    table = (
        "avg@k in %, ± standard error over problems, by three gradings of the same samples. The difference is in points, "
        "± standard error of the paired difference."
        + (f" Stored as right are responses to which --reward {reward} gave 1 or more." if reward else "")
        + "\n\n"
    ) + markdown_table(
        ["checkpoint", "data set", "stored", "verifier", "string equality", "string equality - verifier",
         "samples that differ, verifier and stored", "string equality and verifier", "samples"],
        rows,
    )  # fmt: skip
    write_whole(out / "regrade.md", table + "\n")
    write_whole(out / "regrade.jsonl", "".join(json.dumps(row) + "\n" for row in disagreements))
    print(
        f"{table}\n\nwrote {out}: regrade.md, and regrade.jsonl with {len(disagreements)} samples that are in dispute"
    )


def read_report(directory: str, argument: str = "--reports") -> dict:
    """A report's results.json. InputError, naming `argument`, if there is none or it is not that of an evaluation."""
    path = Path(directory) / "results.json"
    if not path.is_file():
        raise InputError(f"{argument} {directory!r} holds no results.json; evaluate into it first")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        whole = all({"avg", "se"} <= result.keys() for row in report["results"].values() for result in row.values())
        if whole and report["results"]:
            return report
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{argument} {directory!r}: its results.json is not a report of an evaluation; evaluate it anew")


def print_lineage(cfg: Config) -> None:
    scores: dict[str, str] = {}
    for directory in cfg.reports:
        for row in read_report(directory)["results"].values():
            for name, result in row.items():
                score = f"{name} {percent(result['avg'], result['se'])} %"
                scores[result["sha256"]] = ", ".join(filter(None, [scores.get(result["sha256"]), score]))
    print("\n".join(history(read_lineage(cfg.lineage), scores)))


def print_differences(cfg: Config) -> None:
    first, second = map(read_lineage, cfg.compare)
    pairs = differences(first, second).items()
    rows = [[name, *(str(value).replace("\n", "\\n") for value in pair)] for name, pair in pairs]  # a row is one line
    print(markdown_table(["", *cfg.compare], rows) if rows else "The two runs do not differ.")


def write_curves(cfg: Config) -> None:
    labels = cfg.labels or tuple(Path(directory).name for directory in cfg.curves)
    if len(set(labels)) != len(cfg.curves) or len(labels) != len(cfg.curves):
        raise InputError(
            f"--labels {list(labels)} must be one different name for each of the {len(cfg.curves)} --curves"
        )
    check_writable(cfg.out)
    if not draw_curves(dict(zip(labels, cfg.curves)), Path(cfg.out) / "curves.png"):
        raise InputError(
            f"--curves {list(cfg.curves)}: none of them has a metrics.jsonl with rewards, accuracies or KLs; name "
            "checkpoints of GRPO, OPD or the warmup"
        )
    print(f"wrote {Path(cfg.out) / 'curves.png'}")


def main(cfg: Config) -> None:
    if cfg.lineage:
        return print_lineage(cfg)
    if cfg.compare:
        return print_differences(cfg)
    if cfg.regrade:
        return regrade(cfg)
    if not cfg.responses and not cfg.curves:
        raise InputError("there is nothing to do; give --lineage, --compare, --responses, --regrade or --curves")
    if cfg.out is None:
        raise InputError("--out is missing; name the directory to write to")
    return grade_file(cfg) if cfg.responses else write_curves(cfg)


if __name__ == "__main__":
    common.cli(main, Config)
