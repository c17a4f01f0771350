"""The paper's tables (arXiv 2605.12483, v4) with ours beside its figures, and its predictions as paired differences.

    python -m experiments.tables --runs runs/toy/seed0 runs/toy/seed1 --out runs/toy/tables   (make paper-toy does it)
    python -m experiments.tables --runs runs/qwen3-8b/seed0 --out runs/qwen3-8b/tables --pair qwen3-8b

Each run is a directory of checkpoints HALF/TEACHER/WHAT, as the Makefile builds them, with its evaluations in
report-test/. HALF says which labels a checkpoint may use (full: all of them; 1H: the first of two random halves),
TEACHER who taught it (raw; sft: SFT'd; rl: RL'd in Stage 1; same: an RL'd model of the student's size), and WHAT what
was done (-2H and -replay are Stage 3 on the other half and on the same one).

An entry is avg@k: of one run ± the standard error over problems, of several runs their mean ± the standard error over
runs. Differences are taken problem by problem within a run, so that what two checkpoints share cancels. Over several
runs, a difference has the standard error over runs, or that over problems where it is larger.

Where a run has no checkpoint on all labels (SCALE=real), the rows that the paper has on all labels are those on 1H.

A table says what each row cost, with the teacher behind it, by the run.json of its checkpoint.

Written: tables.md, results.json (the same figures, unrounded) and routes.png (bars, rewards in GRPO, KL in OPD).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import common
from common import InputError
from evaluate import markdown_table, percent
from lib.lineage import consumed_problems, read_run
from lib.plots import COLOURS, label_lines
from lib.scores import mean_and_error, paired_difference

Pair = Literal["qwen3-8b", "qwen3-14b", "llama"]
PAIRS = get_args(Pair)


@dataclass
class Config:
    runs: tuple[str, ...]  # directories of checkpoints, one a seed
    out: str  # directory to write
    pool: Literal["test", "validation"] = "test"  # problems that were evaluated; settings are chosen on validation
    pair: Pair = "qwen3-8b"  # whose figures stand beside ours


# The paper's figures for MATH-500 / AIME 2024 / AIME 2025 in %, with ± where it is at hand, for each of PAIRS in turn.
# What involves no model but the 1.7B student is the same for both Qwen pairs.
PAPER = {
    # Tables 1, 2, 3 and 6
    "full/direct": 2 * ("75.9±0.9 / 19.8±1.4 / 17.1±0.9",) + ("59.8 / 12.5 / 7.2",),
    # Table 1
    "full/rl/teacher": ("88.4±0.8 / 47.7±1.5 / 36.7±1.2", "89.5±0.7 / 47.1±1.2 / 39.0±0.9"),
    # Table 2, top; Table 3; Table 6
    "full/rl/bridge": ("79.3±0.7 / 25.2±1.6 / 20.2±1.3", "78.6±0.9 / 24.6±1.5 / 20.8±1.5", "62.1 / 14.9 / 9.2"),
    "full/raw/bridge": ("71.5±0.9 / 15.0±1.5 / 10.6±1.2", "72.8±0.8 / 16.7±1.4 / 13.5±1.3", "55.4 / 8.8 / 3.1"),
    "full/rl/opd_only": ("77.6±0.8 / 23.0±1.4 / 18.9±1.4", "77.1±1.0 / 22.8±1.5 / 18.6±1.7"),
    "full/rl/sft_only": ("76.0±0.9 / 22.4±1.5 / 19.4±1.4", "76.5±1.1 / 21.5±1.5 / 17.0±1.1"),
    # Table 2, bottom
    "1H/rl/bridge-2H": ("78.5±0.9 / 23.7±1.5 / 18.5±1.2", "78.7±1.1 / 23.1±1.7 / 19.2±1.3"),
    "1H/rl/bridge": ("75.4±0.8 / 22.0±1.6 / 16.7±1.4", "76.3±1.1 / 22.7±1.7 / 17.3±1.2"),
    "1H/rl/bridge-replay": ("75.7±0.7 / 21.6±1.3 / 17.0±1.2", "75.6±1.0 / 22.4±1.5 / 17.6±1.0"),
    # Table 4
    "1H/sft/bridge": ("74.3±1.0 / 21.8±1.5 / 14.5±1.2", "75.8 / 22.0 / 15.1"),
    "1H/sft/bridge-2H": ("77.2 / 22.9 / 18.4", "76.9 / 23.2 / 18.6"),
    "1H/sft/bridge-replay": ("74.0 / 22.1 / 14.2", "75.6 / 22.3 / 14.9"),
    # Table 5
    "1H/rl/opd_only-2H": ("77.8 / 22.8 / 16.6", "77.5 / 21.9 / 19.5"),
    "1H/rl/sft_only-2H": ("77.3 / 22.5 / 16.9", "77.2 / 21.6 / 19.0"),
    # Table 6
    "full/sft/bridge": ("76.9±0.9 / 22.1±1.7 / 17.6±1.4", "77.6±0.8 / 23.2±1.6 / 18.4±1.5"),
    "full/same/bridge": 2 * ("76.5 / 20.6 / 17.1",),
    "full/same/opd_only": 2 * ("75.2 / 19.1 / 12.4",),
    "full/same/sft_only": 2 * ("73.6 / 16.7 / 11.4",),
}


def paper_figures(checkpoint: str, pair: str) -> str:
    """The paper's figures of a checkpoint for this pair of models; "-" where it has none."""
    return dict(zip(PAIRS, PAPER.get(checkpoint, ()))).get(pair, "-")


def paper_difference(first: str, second: str, pair: str) -> str:
    """The paper's MATH-500 difference between two checkpoints, in points; "-" if it has no figure for one of them."""
    figures = [paper_figures(checkpoint, pair) for checkpoint in (first, second)]
    if "-" in figures:
        return "-"
    first_math, second_math = (float(figure.split(" / ")[0].split("±")[0]) for figure in figures)
    return f"{first_math - second_math:+.1f}"


@dataclass(frozen=True)
class Row:
    teacher: str
    protocol: str
    checkpoint: str  # HALF/TEACHER/WHAT, or one of the raw models


LLAMA = "Table 3: the Llama pair"
OURS = "Teachers (C1) and starting points (our own table)"
TABLES = {
    "Table 1: direct GRPO by model size": (
        Row("-", "direct GRPO of the student", "full/direct"),
        Row("-", "direct GRPO of the teacher (Stage 1)", "full/rl/teacher"),
    ),
    "Table 2, top: component ablation on all labels, no Stage 3": (
        Row("RL'd", "full bridge (1 + 2a + 2b)", "full/rl/bridge"),
        Row("raw", "without Stage 1 (2a + 2b only)", "full/raw/bridge"),
        Row("RL'd", "without Stage 2a (OPD only)", "full/rl/opd_only"),
        Row("RL'd", "without Stage 2b (teacher-sample SFT only)", "full/rl/sft_only"),
        Row("-", "without everything (cold GRPO)", "full/direct"),
        Row("RL'd", "forward KL only (ours, not in the paper)", "full/rl/fkl_only"),
        Row("RL'd", "full bridge, sampled estimator in 2b (ours, not in the paper)", "full/rl/bridge_sampled"),
    ),
    "Table 2, bottom: RL'd teacher, half of the labels held out": (
        Row("RL'd", "bridge on 1H + Stage 3 on 2H", "1H/rl/bridge-2H"),
        Row("RL'd", "bridge on 1H alone", "1H/rl/bridge"),
        Row("RL'd", "bridge on 1H + replay (Stage 3 on 1H)", "1H/rl/bridge-replay"),
    ),
    LLAMA: (
        Row("-", "direct GRPO", "full/direct"),
        Row("raw", "bridge", "full/raw/bridge"),
        Row("RL'd", "bridge", "full/rl/bridge"),
    ),
    "Table 4: SFT'd teacher, half of the labels held out": (
        Row("SFT'd", "bridge on 1H alone", "1H/sft/bridge"),
        Row("SFT'd", "bridge on 1H + Stage 3 on 2H", "1H/sft/bridge-2H"),
        Row("SFT'd", "bridge on 1H + replay (Stage 3 on 1H)", "1H/sft/bridge-replay"),
    ),
    "Table 5: what precedes Stage 3 on 2H": (
        Row("RL'd", "bridge on 1H + Stage 3 on 2H", "1H/rl/bridge-2H"),
        Row("RL'd", "OPD only on 1H + Stage 3 on 2H", "1H/rl/opd_only-2H"),
        Row("RL'd", "teacher-sample SFT on 1H + Stage 3 on 2H", "1H/rl/sft_only-2H"),
    ),
    "Table 6: transfer only, all labels, no Stage 3": (
        Row("-", "direct GRPO", "full/direct"),
        Row("raw", "bridge", "full/raw/bridge"),
        Row("SFT'd", "bridge", "full/sft/bridge"),
        Row("RL'd, student's size", "bridge", "full/same/bridge"),
        Row("RL'd", "bridge", "full/rl/bridge"),
        Row("RL'd, student's size", "OPD only", "full/same/opd_only"),
        Row("RL'd", "OPD only", "full/rl/opd_only"),
        Row("RL'd, student's size", "teacher-sample SFT", "full/same/sft_only"),
        Row("RL'd", "teacher-sample SFT", "full/rl/sft_only"),
    ),
    OURS: (
        Row("-", "the raw student", "student"),
        Row("raw", "the teacher itself", "teacher"),
        Row("SFT'd", "the teacher itself", "full/sft/teacher"),
        Row("RL'd", "the teacher itself", "full/rl/teacher"),
        Row("SFT'd on 1H", "the teacher itself", "1H/sft/teacher"),
        Row("RL'd on 1H", "the teacher itself", "1H/rl/teacher"),
    ),
}


@dataclass(frozen=True)
class Claim:
    text: str
    first: str  # checkpoint
    relation: Literal[">", "=", "?"]  # expected of first and second; ? where no order is expected
    second: str


@dataclass(frozen=True)
class Prediction:
    name: str
    says: str
    claims: tuple[Claim, ...]


UPSTREAM, DOWNSTREAM = "full/rl/bridge", "1H/rl/bridge-2H"  # where the second half of the labels is spent
PREDICTIONS = (
    Prediction("P1", "with a raw teacher the bridge does not exceed direct GRPO (C1: optimality of the teacher).", (
        Claim("Stage 1 improves the teacher", "full/rl/teacher", ">", "teacher"),
        Claim("direct GRPO > bridge from the raw teacher", "full/direct", ">", "full/raw/bridge"),
        Claim("bridge from the RL'd teacher > direct GRPO", "full/rl/bridge", ">", "full/direct"),
        Claim("SFT'd teacher > raw teacher (bridges)", "full/sft/bridge", ">", "full/raw/bridge"),
        Claim("RL'd teacher > SFT'd teacher (bridges)", "full/rl/bridge", ">", "full/sft/bridge"),
        Claim("RL'd teacher > RL'd teacher of the student's size (bridges)", "full/rl/bridge", ">", "full/same/bridge"),
        Claim("RL'd teacher > SFT'd teacher (bridges + 2H)", "1H/rl/bridge-2H", ">", "1H/sft/bridge-2H"),
    )),
    Prediction("P2", "OPD without the warmup falls below the bridge; so does the off-policy half (C2: closeness).", (
        Claim("bridge > OPD only (without 2a)", "full/rl/bridge", ">", "full/rl/opd_only"),
        Claim("bridge > teacher-sample SFT (without 2b)", "full/rl/bridge", ">", "full/rl/sft_only"),
        Claim("OPD only > teacher-sample SFT", "full/rl/opd_only", ">", "full/rl/sft_only"),
        Claim("bridge + 2H > OPD only + 2H", "1H/rl/bridge-2H", ">", "1H/rl/opd_only-2H"),
        Claim("OPD only + 2H > teacher-sample SFT + 2H", "1H/rl/opd_only-2H", ">", "1H/rl/sft_only-2H"),
        Claim("bridge > forward KL only (ours, not in the paper)", "full/rl/bridge", ">", "full/rl/fkl_only"),
        Claim("exact > sampled estimator in 2b (ours, not in the paper)", "full/rl/bridge", ">", "full/rl/bridge_sampled"),
    )),
    Prediction("P3", "after the bridge, fresh labels give what more updates on the bridge's own labels do not.", (
        Claim("bridge + 2H > bridge", "1H/rl/bridge-2H", ">", "1H/rl/bridge"),
        Claim("bridge + 2H > bridge + replay", "1H/rl/bridge-2H", ">", "1H/rl/bridge-replay"),
        Claim("bridge + replay = bridge", "1H/rl/bridge-replay", "=", "1H/rl/bridge"),
        Claim("SFT'd teacher: bridge + 2H > bridge", "1H/sft/bridge-2H", ">", "1H/sft/bridge"),
        Claim("SFT'd teacher: bridge + 2H > bridge + replay", "1H/sft/bridge-2H", ">", "1H/sft/bridge-replay"),
        Claim("SFT'd teacher: bridge + replay = bridge", "1H/sft/bridge-replay", "=", "1H/sft/bridge"),
    )),
    Prediction(
        "App. C",
        "where should the held-out half of the labels go? The paper's difference on MATH-500 is "
        f"{paper_difference(UPSTREAM, DOWNSTREAM, 'qwen3-8b')} with the 8B teacher and "
        f"{paper_difference(UPSTREAM, DOWNSTREAM, 'qwen3-14b')} with the 14B teacher; by the printed errors neither is "
        "resolved. So no order is expected here: the verdict says whether our difference is resolved, and its sign.",
        (Claim("2H in Stages 1 and 2 against 2H in Stage 3", UPSTREAM, "?", DOWNSTREAM),),
    ),
)  # fmt: skip

PAPER_ERRORS = (
    "The paper calls its ± the standard error over problems, but for AIME it cannot be: with 30 problems and 16 "
    "samples of each that error is on average at least sqrt(p (1 - p) / 480), which is 1.8 at 19.8 % where 1.4 is "
    "printed. Ours is over problems (one run) or over runs (several), and no verdict below uses the paper's ±."
)
COSTS = (
    "**What each row cost** ({spread}): its own stage and every stage behind it, the teacher's included, each once. Labels "
    "are counted as in the paper: all problems that the student or its teacher has been trained on. GRPO learns from their "
    "answers, and so does the SFT'd teacher, which learns only from problems that it has answered rightly; the other "
    "stages learn without the answers. Tokens are thousands of response tokens; in a teacher's own row they are the "
    "teacher's. The teacher's forward pass over what the student trains on in Stages 2a and 2b is not among the tokens. "
    "CPU minutes are those of each stage's first process, without GPUs and without the pretraining of the raw models. "
    "`fkl_only` and `sft_only` reuse the responses that the teacher has sampled for the warmup: their rows have these "
    "tokens, but not the minutes that it took to sample them."
)
VERDICTS = (
    "**Orderings**, by the paper's predictions and as it finds them on MATH-500. Differences are in points and taken "
    "problem by problem; with several runs, ± is the standard error over runs, or that over problems if it is larger. "
    "An ordering (>) holds, or is REVERSED, if the difference is more than two standard errors from zero; an "
    "equality (=) holds if it is not."
)


def load_run(directory: str, pool: str) -> dict[str, dict]:
    """results[checkpoint][data set] of one run, from all its reports. InputError if there are none."""
    found: dict[str, dict] = {}
    for path in sorted(Path(directory, f"report-{pool}").glob("*/results.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))["results"]
    if not found:
        raise InputError(
            f"--runs {directory!r} holds no report-{pool}/*/results.json; evaluate its checkpoints with make tables"
        )
    return found


def tables_of(pair: str, runs: list[dict]) -> dict[str, list[Row]]:
    """The tables of a pair, with the rows whose checkpoints every run has evaluated, and without tables that have none.

    The Llama pair has Table 3, whose rows the other pairs have in Tables 2 and 6. Our own table goes with every pair.
    """
    tables = {title: rows for title, rows in TABLES.items() if title == OURS or (title == LLAMA) == (pair == "llama")}
    tables = tables_on_half(tables) if on_half(runs) else tables
    evaluated = {title: [row for row in rows if in_all(runs, row.checkpoint)] for title, rows in tables.items()}
    return {title: rows for title, rows in evaluated.items() if rows}


def on_half(runs: list[dict]) -> bool:
    """Whether the runs have used the half 1H only, also for the rows that the paper has on all labels."""
    return not any(checkpoint.startswith("full/") for run in runs for checkpoint in run)


def on_1h(checkpoint: str) -> str:
    return checkpoint.replace("full/", "1H/", 1)


def tables_on_half(tables: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The tables for runs on 1H: rows on all labels become rows on 1H, and of two rows of one checkpoint one stays."""
    renamed = {}
    for title, rows in tables.items():
        distinct = {on_1h(row.checkpoint): replace(row, checkpoint=on_1h(row.checkpoint)) for row in rows}
        renamed[title.replace("all labels", "1H")] = list(distinct.values())
    return renamed


def predictions_on_half(predictions: Iterable[Prediction]) -> list[Prediction]:
    """The predictions for runs on 1H. That of App. C is about what all labels do upstream, and is left out."""
    renamed = []
    for prediction in predictions:
        if prediction.name != "App. C":
            claims = [replace(c, first=on_1h(c.first), second=on_1h(c.second)) for c in prediction.claims]
            renamed.append(replace(prediction, claims=tuple(claims)))
    return renamed


def in_all(runs: list[dict], *checkpoints: str) -> bool:
    return all(checkpoint in run for run in runs for checkpoint in checkpoints)


def average(runs: list[dict], checkpoint: str, name: str) -> tuple[float, float]:
    """avg@k of a checkpoint: of one run ± SE over problems, of several their mean ± SE over runs."""
    if len(runs) == 1:
        return runs[0][checkpoint][name]["avg"], runs[0][checkpoint][name]["se"]
    return mean_and_error(np.array([run[checkpoint][name]["avg"] for run in runs]))


def verdict(difference: float, error: float, relation: str) -> str:
    """What a difference says of the expected relation, at two standard errors."""
    if np.isnan(error):
        return "not resolved"
    resolved = abs(difference) > 2 * error
    if relation == "?":
        return f"{'resolved' if resolved else 'not resolved'} ({'+' if difference >= 0 else '-'})"
    if relation == "=":
        return "does not hold" if resolved else "holds"
    return "not resolved" if not resolved else "holds" if difference > 0 else "REVERSED"


def ordering(prediction: Prediction, claim: Claim, runs: list[dict], name: str, pair: str) -> dict:
    """One claim on one data set: the paired difference first - second of each run, their mean, and the verdict."""
    each = [paired_difference(run[claim.first][name]["scores"], run[claim.second][name]["scores"]) for run in runs]
    mean, error = mean_and_error(np.array([difference for difference, _ in each])) if len(each) > 1 else each[0]
    # A handful of runs may agree by chance; their problems say how closely they could have.
    error = max(error, sum(e**2 for _, e in each) ** 0.5 / len(each))
    return {"prediction": prediction.name, "claim": claim.text, "first": claim.first, "second": claim.second,
            "paper": paper_difference(claim.first, claim.second, pair), "data": name, "mean": mean, "se": error,
            "runs": each, "verdict": verdict(mean, error, claim.relation)}  # fmt: skip


def signed(mean: float, error: float) -> str:
    return ("+" if mean >= 0 else "") + percent(mean, error)


def entry_tables(tables: dict[str, list[Row]], runs: list[dict], names: list[str], pair: str) -> list[str]:
    """The paper's tables in markdown, each after its title."""
    spread = f"mean of {len(runs)} runs ± SE over runs" if len(runs) > 1 else "± SE over problems"
    header = ["teacher", "protocol", "checkpoint", *(f"ours, {name}: {spread}" for name in names)]
    header += [f"paper, {pair} (MATH-500 / AIME 2024 / AIME 2025)", f"each run, {names[0]}"]
    parts = []
    for title, rows in tables.items():
        lines = []
        for row in rows:
            ours = [percent(*average(runs, row.checkpoint, name)) for name in names]
            each = ", ".join(f"{100 * run[row.checkpoint][names[0]]['avg']:.1f}" for run in runs)
            paper = paper_figures(row.checkpoint, pair)
            lines.append([row.teacher, row.protocol, f"`{row.checkpoint}`", *ours, paper, each])
        parts += [f"**{title}**", markdown_table(header, lines)]
    return parts


def stages_behind(lineage: dict, whose: str) -> dict[str | None, tuple[str, dict]]:
    """Every stage on the way to a checkpoint once, by the sha256 of its weights: who was trained in it, and its record.

    `whose` says who the checkpoint itself is, "student" or "teacher". What stands behind its `model` is its own training,
    and what stands behind its `teacher` is the teacher's. A stage that is both counts as its own.
    """
    found = {lineage.get("sha256"): (whose, lineage)} if "stage" in lineage else {}
    for role, parent in lineage.get("parents", {}).items():  # the model comes first
        found = stages_behind(parent, whose if role == "model" else "teacher") | found
    return found


def cost(directory: str, checkpoint: str) -> dict[str, float] | None:
    """What a run's checkpoint and all stages behind it cost: labels, response tokens, CPU minutes.

    None if no stage has made it, or one of the stages behind it has not recorded what it cost.
    """
    lineage = read_run(str(Path(directory, checkpoint)))
    whose = "teacher" if Path(checkpoint).name == "teacher" else "student"
    stages = list(stages_behind(lineage, whose).values())
    if not stages or any("trained_tokens" not in record for _, record in stages):
        return None
    spent = {"labels": len(consumed_problems(lineage)), "student_sampled": 0, "student_trained": 0, "teacher_sampled": 0,
             "teacher_trained": 0, "cpu_minutes": sum(record["cpu_seconds"] for _, record in stages) / 60}  # fmt: skip
    for trained, record in stages:
        spent[f"{trained}_trained"] += record["trained_tokens"]
        # Only Stage 2a learns from what the teacher has sampled; the others train on every token that they sample.
        sampler = "teacher" if "sampled_tokens" in record else trained
        spent[f"{sampler}_sampled"] += record.get("sampled_tokens", record["trained_tokens"])
    return spent


def average_costs(directories: tuple[str, ...], checkpoints: Iterable[str]) -> dict[str, dict[str, float]]:
    """The mean cost over the runs, of each checkpoint whose cost is on record in all of them."""
    costs = {checkpoint: [cost(directory, checkpoint) for directory in directories] for checkpoint in checkpoints}
    return {
        checkpoint: {name: float(np.mean([spent[name] for spent in each])) for name in each[0]}
        for checkpoint, each in costs.items()
        if None not in each
    }


def cost_table(
    tables: dict[str, list[Row]], costs: dict[str, dict[str, float]], runs: list[dict], names: list[str]
) -> list[str]:
    """What each row cost, in markdown, after what the columns mean; nothing if no cost is on record."""
    if not costs:
        return []
    header = ["teacher", "protocol", "checkpoint", *names, "labels", "student: sampled", "student: trained on",
              "teacher: sampled", "teacher: trained on", "CPU minutes"]  # fmt: skip
    lines = {}
    for row in itertools.chain(*tables.values()):
        if row.checkpoint in costs and row.checkpoint not in lines:
            labels, *tokens, minutes = costs[row.checkpoint].values()
            ours = [percent(*average(runs, row.checkpoint, name)) for name in names]
            spent = [f"{labels:.0f}", *(f"{count / 1000:,.0f}" for count in tokens), f"{minutes:.2f}"]
            lines[row.checkpoint] = [row.teacher, row.protocol, f"`{row.checkpoint}`", *ours, *spent]
    spread = f"mean of {len(runs)} runs" if len(runs) > 1 else "in one run"
    return [COSTS.format(spread=spread), markdown_table(header, list(lines.values()))]


def ordering_tables(orderings: list[dict], pair: str) -> list[str]:
    """The orderings in markdown, one table a prediction, each after what it says."""
    header = ["ordering", "data", "ours, paired difference", "each run", f"paper, {pair}, MATH-500", "verdict"]
    parts = []
    for prediction in PREDICTIONS:
        lines = [
            [o["claim"], o["data"], signed(o["mean"], o["se"]), ", ".join(signed(*run) for run in o["runs"]),
             o["paper"], o["verdict"]]
            for o in orderings if o["prediction"] == prediction.name
        ]  # fmt: skip
        if lines:
            parts += [f"**{prediction.name}**: {prediction.says}", markdown_table(header, lines)]
    return parts


REWARDS = {
    "full/rl/teacher": "teacher, all labels (Stage 1)",
    "1H/rl/teacher": "teacher, 1H (Stage 1)",
    "full/direct": "student: direct GRPO",
    "1H/rl/bridge-2H": "student: Stage 3 on 2H",
    "1H/rl/bridge-replay": "student: replay of 1H",
}
DISTANCES = {
    "full/rl/bridge": "RL'd teacher, after warmup",
    "full/rl/opd_only": "RL'd teacher, OPD only",
    "full/rl/bridge_sampled": "the same, sampled estimator",
    "full/sft/bridge": "SFT'd teacher, after warmup",
    "full/raw/bridge": "raw teacher, after warmup",
    "full/same/bridge": "RL'd, student's size",
}
TEACHERS, STUDENTS = COLOURS[1], COLOURS[0]


def draw(
    tables: dict[str, list[Row]], runs: list[dict], directories: tuple[str, ...], name: str, picture: Path
) -> None:
    """Bars of every checkpoint, the reward of GRPO's rollouts (C1), and the KL to the teacher along OPD (C2)."""
    bars = sum(map(len, tables.values())) + len(tables)
    figure = Figure(figsize=(16, max(7, 0.36 * bars)), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1))
    draw_bars(figure.add_subplot(grid[:, 0]), tables, runs, name)
    rewards, distances = (
        {on_1h(checkpoint) if on_half(runs) else checkpoint: label for checkpoint, label in labels.items()}
        for labels in (REWARDS, DISTANCES)
    )
    axes = figure.add_subplot(grid[0, 1])
    draw_curves(axes, directories, rewards, "reward")
    axes.set_title("C1: the reward of GRPO's rollouts", fontsize=13)
    axes = figure.add_subplot(grid[1, 1])
    axes.set_yscale("log")
    draw_curves(axes, directories, distances, "reverse_kl")
    axes.set_title("C2: KL(student || teacher) along OPD, nats a token", fontsize=13)
    figure.savefig(picture, dpi=100)


def draw_bars(axes, tables: dict[str, list[Row]], runs: list[dict], name: str) -> None:
    """A bar for each checkpoint under the first table that has it, and, of several runs, a dot for each."""
    position, labels, drawn = 0.0, {}, set()
    for title, rows in tables.items():
        rows = [row for row in rows if row.checkpoint not in drawn]
        if not rows:
            continue
        drawn |= {row.checkpoint for row in rows}
        axes.text(0, position, title.split(":")[0], fontsize=11, fontweight="bold", va="center")
        for row in rows:
            position += 1
            mean, error = average(runs, row.checkpoint, name)
            colour = TEACHERS if row.checkpoint.endswith("teacher") else STUDENTS
            axes.barh(position, 100 * mean, xerr=100 * error, color=colour, alpha=0.75, capsize=2, height=0.75)
            single = [100 * run[row.checkpoint][name]["avg"] for run in runs] if len(runs) > 1 else []
            axes.plot(single, [position] * len(single), ".", color="black", markersize=4)
            labels[position] = row.protocol if row.teacher == "-" else f"{row.teacher}: {row.protocol}"
        position += 1.2
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_ylim(position, -0.8)
    axes.set_xlim(0, 100)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=STUDENTS, alpha=0.75, label="student"), Patch(color=TEACHERS, alpha=0.75, label="teacher")]
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=11, frameon=False)
    spread = f"mean of {len(runs)} runs ± SE; dots: runs" if len(runs) > 1 else "± SE over problems"
    axes.set_xlabel(f"{name}, avg@k in %, {spread}", fontsize=11)


def draw_curves(axes, directories: tuple[str, ...], labels: dict[str, str], metric: str) -> None:
    """A metric's mean and range over the runs at each step, for checkpoints that have a metrics.jsonl in every run."""
    for number, (checkpoint, label) in enumerate(labels.items()):
        paths = [Path(directory, checkpoint, "metrics.jsonl") for directory in directories]
        if all(path.is_file() for path in paths):
            steps = [map(json.loads, path.read_text().splitlines()) for path in paths]
            series = [[step[metric] for step in run if metric in step] for run in steps]
            shortest = min(map(len, series))
            values = np.array([run[:shortest] for run in series])  # (runs, steps)
            axes.plot(values.mean(0), label=label, linewidth=1.6, color=COLOURS[number])
            axes.fill_between(range(shortest), values.min(0), values.max(0), color=COLOURS[number], alpha=0.12)
    spread = f" (line: mean, band: range of {len(directories)} runs)" if len(directories) > 1 else ""
    axes.set_xlabel("step" + spread, fontsize=11)
    axes.tick_params(which="both", labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    label_lines(axes)


def main(cfg: Config) -> None:
    runs = [load_run(directory, cfg.pool) for directory in cfg.runs]
    names = list(next(iter(runs[0].values())))
    tables = tables_of(cfg.pair, runs)
    predictions = predictions_on_half(PREDICTIONS) if on_half(runs) else PREDICTIONS
    orderings = [
        ordering(prediction, claim, runs, name, cfg.pair)
        for prediction in predictions
        for claim in prediction.claims
        for name in names
        if in_all(runs, claim.first, claim.second)
    ]
    checkpoints = dict.fromkeys(row.checkpoint for rows in tables.values() for row in rows)
    entries = {c: {name: average(runs, c, name) for name in names} for c in checkpoints}
    costs = average_costs(cfg.runs, checkpoints)
    text = [PAPER_ERRORS, *entry_tables(tables, runs, names, cfg.pair), *cost_table(tables, costs, runs, names)]
    text += [VERDICTS, *ordering_tables(orderings, cfg.pair)]

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    written = {"runs": list(cfg.runs), "entries": entries, "costs": costs, "orderings": orderings}
    (out / "results.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    draw(tables, runs, cfg.runs, names[0], out / "routes.png")
    print("\n\n".join(text))
    print(f"wrote {out}: tables.md, results.json, routes.png")


if __name__ == "__main__":
    common.cli(main, Config)
