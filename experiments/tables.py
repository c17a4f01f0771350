"""The paper's tables (arXiv 2605.12483, v4) with ours beside its figures, and its predictions as paired differences.

    python -m experiments.tables --runs runs/toy/seed0 runs/toy/seed1 --out runs/toy/tables   (make paper-toy does it)
    python -m experiments.tables --runs runs/qwen3-8b/seed0 --out runs/qwen3-8b/tables --pair qwen3-8b
    python -m experiments.tables --results results/toy/results.json --out results/toy   (without the runs)
    python -m experiments.tables --demo DIR ... --labels NAME ... --out REPORT   (what make demo shows at its end)

Each run is a directory of checkpoints HALF/TEACHER/WHAT, as the Makefile builds them, with its evaluations in
report-test/. HALF says which labels a checkpoint may use (full: all of them; 1H: the first of two random halves),
TEACHER who taught it (raw; sft: SFT'd; rl: RL'd in Stage 1; same: an RL'd model of the student's size), and WHAT what
was done (-2H and -replay are Stage 3 on the other half and on the same one).

An entry is avg@k: of one run ± the standard error over problems, of several runs their mean ± the standard error over
runs. Differences are taken problem by problem within a run, so that what two checkpoints share cancels.

Verdicts are at the 5 % level, by Student's t. With several runs two intervals are computed, one from the spread of the
runs with one degree of freedom less than there are runs, and one from the spread of the problems. The wider one
decides, because a handful of runs may agree by chance.

A table says what each row cost, with the teacher behind it, by the run.json of its checkpoint.

Written: tables.md, results.json (the same figures, unrounded), routes.png (bars, rewards in GRPO, KL in OPD) and, for
SCALE=real, time.png (accuracy against CPU time).
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import common
import lib.plots
from common import InputError
from evaluate import markdown_table, percent
from lib.files import json_lines
from lib.lineage import problems_trained_on, read_run
from lib.plots import COLOURS, Curve, draw_panels, label_lines
from lib.scores import mean_and_error, paired_difference

Pair = Literal["qwen3-8b", "qwen3-14b", "llama"]
PAIRS = get_args(Pair)


@dataclass
class Config:
    out: str  # directory to write
    runs: tuple[str, ...] = ()  # directories of checkpoints, one a seed
    pool: Literal["test", "validation"] = "test"  # problems that were evaluated; settings are chosen on validation
    pair: Pair = "qwen3-8b"  # models of the paper whose figures stand beside ours
    results: str | None = None  # results.json of an earlier call, to write tables.md again without the runs
    demo: tuple[str, ...] = ()  # checkpoints of make demo, to draw their curves and explain the table.md in --out
    labels: tuple[str, ...] = ()  # names of the checkpoints of --demo in the picture


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
    curve: str = ""  # name of its curve in routes.png, of the reward in GRPO or of the KL in OPD; without one, no curve


LLAMA = "Table 3: the Llama pair"
OURS = "Teachers (C1) and starting points (our own table)"
TABLES = {
    "Table 1: direct GRPO by model size": (
        Row("-", "direct GRPO of the student", "full/direct", "student: direct GRPO"),
        Row("-", "direct GRPO of the teacher (Stage 1)", "full/rl/teacher", "teacher, all labels (Stage 1)"),
    ),
    "Table 2, top: component ablation on all labels, no Stage 3": (
        Row("RL'd", "full bridge (1 + 2a + 2b)", "full/rl/bridge", "RL'd teacher, after warmup"),
        Row("raw", "without Stage 1 (2a + 2b only)", "full/raw/bridge", "raw teacher, after warmup"),
        Row("RL'd", "without Stage 2a (OPD only)", "full/rl/opd_only", "RL'd teacher, OPD only"),
        Row("RL'd", "without Stage 2b (teacher-sample SFT only)", "full/rl/sft_only"),
        Row("-", "without everything (cold GRPO)", "full/direct"),
        Row("RL'd", "forward KL only (ours, not in the paper)", "full/rl/fkl_only"),
        Row("RL'd", "full bridge, sampled estimator in 2b (ours, not in the paper)", "full/rl/bridge_sampled",
            "RL'd teacher, sampled estimator"),
    ),
    "Table 2, bottom: RL'd teacher, half of the labels held out": (
        Row("RL'd", "bridge on 1H + Stage 3 on 2H", "1H/rl/bridge-2H", "student: Stage 3 on 2H"),
        Row("RL'd", "bridge on 1H alone", "1H/rl/bridge"),
        Row("RL'd", "bridge on 1H + replay (Stage 3 on 1H)", "1H/rl/bridge-replay", "student: replay of 1H"),
    ),
    LLAMA: (
        Row("-", "direct GRPO", "full/direct", "student: direct GRPO"),
        Row("raw", "bridge", "full/raw/bridge", "raw teacher, after warmup"),
        Row("RL'd", "bridge", "full/rl/bridge", "RL'd teacher, after warmup"),
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
        Row("SFT'd", "bridge", "full/sft/bridge", "SFT'd teacher, after warmup"),
        Row("RL'd, student's size", "bridge", "full/same/bridge", "RL'd, student's size"),
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
        Row("RL'd on 1H", "the teacher itself", "1H/rl/teacher", "teacher, 1H (Stage 1)"),
    ),
}  # fmt: skip
# SCALE=real has every row on 1H, so that all rows compare what is done with the same labels.
DIRECT = "1H/direct/step-000020"  # the direct GRPO run after as many updates of the student as the bridge makes
TABLES_1H = {
    "Rows on half of the labels (1H)": (
        Row("-", "the raw student", "student"),
        Row("raw", "the teacher itself", "teacher"),
        Row("RL'd", "the teacher itself (Stage 1)", "1H/rl/teacher", "teacher (Stage 1)"),
        Row("-", "direct GRPO of the student, as many updates as the bridge", DIRECT),
        Row("-", "direct GRPO of the student, as much CPU time as the bridge", "1H/direct", "student: direct GRPO"),
        Row("raw", "bridge (2a + 2b)", "1H/raw/bridge", "raw teacher, after warmup"),
        Row("RL'd", "bridge (1 + 2a + 2b)", "1H/rl/bridge", "RL'd teacher, after warmup"),
        Row("RL'd", "warmup only (1 + 2a)", "1H/rl/warmup"),
        Row("RL'd", "OPD only", "1H/rl/opd_only", "RL'd teacher, OPD only"),
        Row("RL'd", "teacher-sample SFT only", "1H/rl/sft_only"),
    ),
}


@dataclass(frozen=True)
class Claim:
    prediction: str
    text: str
    first: str  # checkpoint
    relation: Literal[">", "=", "?"]  # expected of first and second; ? where no order is expected
    second: str


UPSTREAM, DOWNSTREAM = "full/rl/bridge", "1H/rl/bridge-2H"  # where the second half of the labels is spent
PREDICTIONS = {
    "P1": "with a raw teacher the bridge does not exceed direct GRPO (C1: optimality of the teacher).",
    "P2": "OPD without the warmup falls below the bridge; so does the off-policy half (C2: closeness).",
    "P3": "after the bridge, fresh labels give what more updates on the bridge's own labels do not.",
    "App. C": "where should the held-out half of the labels go? The paper's difference on MATH-500 is "
    f"{paper_difference(UPSTREAM, DOWNSTREAM, 'qwen3-8b')} with the 8B teacher and "
    f"{paper_difference(UPSTREAM, DOWNSTREAM, 'qwen3-14b')} with the 14B teacher; by the printed errors neither is "
    "resolved. So no order is expected here: the verdict says whether our difference is resolved, and its sign.",
}
OWN = "(ours, not in the paper)"
CLAIMS = (
    Claim("P1", "Stage 1 improves the teacher", "full/rl/teacher", ">", "teacher"),
    Claim("P1", "direct GRPO > bridge from the raw teacher", "full/direct", ">", "full/raw/bridge"),
    Claim("P1", "bridge from the RL'd teacher > direct GRPO", "full/rl/bridge", ">", "full/direct"),
    Claim("P1", "SFT'd teacher > raw teacher (bridges)", "full/sft/bridge", ">", "full/raw/bridge"),
    Claim("P1", "RL'd teacher > SFT'd teacher (bridges)", "full/rl/bridge", ">", "full/sft/bridge"),
    Claim("P1", "RL'd teacher > RL'd one of the student's size (bridges)", "full/rl/bridge", ">", "full/same/bridge"),
    Claim("P1", "RL'd teacher > SFT'd teacher (bridges + 2H)", "1H/rl/bridge-2H", ">", "1H/sft/bridge-2H"),
    Claim("P2", "bridge > OPD only (without 2a)", "full/rl/bridge", ">", "full/rl/opd_only"),
    Claim("P2", "bridge > teacher-sample SFT (without 2b)", "full/rl/bridge", ">", "full/rl/sft_only"),
    Claim("P2", "OPD only > teacher-sample SFT", "full/rl/opd_only", ">", "full/rl/sft_only"),
    Claim("P2", "bridge + 2H > OPD only + 2H", "1H/rl/bridge-2H", ">", "1H/rl/opd_only-2H"),
    Claim("P2", "OPD only + 2H > teacher-sample SFT + 2H", "1H/rl/opd_only-2H", ">", "1H/rl/sft_only-2H"),
    Claim("P2", f"bridge > forward KL only {OWN}", "full/rl/bridge", ">", "full/rl/fkl_only"),
    Claim("P2", f"exact > sampled estimator in 2b {OWN}", "full/rl/bridge", ">", "full/rl/bridge_sampled"),
    Claim("P3", "bridge + 2H > bridge", "1H/rl/bridge-2H", ">", "1H/rl/bridge"),
    Claim("P3", "bridge + 2H > bridge + replay", "1H/rl/bridge-2H", ">", "1H/rl/bridge-replay"),
    Claim("P3", "bridge + replay = bridge", "1H/rl/bridge-replay", "=", "1H/rl/bridge"),
    Claim("P3", "SFT'd teacher: bridge + 2H > bridge", "1H/sft/bridge-2H", ">", "1H/sft/bridge"),
    Claim("P3", "SFT'd teacher: bridge + 2H > bridge + replay", "1H/sft/bridge-2H", ">", "1H/sft/bridge-replay"),
    Claim("P3", "SFT'd teacher: bridge + replay = bridge", "1H/sft/bridge-replay", "=", "1H/sft/bridge"),
    Claim("App. C", "2H in Stages 1 and 2 against 2H in Stage 3", UPSTREAM, "?", DOWNSTREAM),
)
CLAIMS_1H = (
    Claim("P1", "Stage 1 improves the teacher", "1H/rl/teacher", ">", "teacher"),
    Claim("P1", "direct GRPO (as many updates) > bridge from the raw teacher", DIRECT, ">", "1H/raw/bridge"),
    Claim("P1", "bridge > direct GRPO (as many updates)", "1H/rl/bridge", ">", DIRECT),
    Claim("P1", f"bridge > direct GRPO (as much CPU time) {OWN}", "1H/rl/bridge", ">", "1H/direct"),
    Claim("P2", f"bridge > warmup only {OWN}", "1H/rl/bridge", ">", "1H/rl/warmup"),
    Claim("P2", "bridge > OPD only (without 2a)", "1H/rl/bridge", ">", "1H/rl/opd_only"),
    Claim("P2", "bridge > teacher-sample SFT (without 2b)", "1H/rl/bridge", ">", "1H/rl/sft_only"),
)

ERRORS = (
    "Our ± is the standard error over problems (one run) or over runs (several). The paper calls its own ± the standard "
    "error over problems, which for AIME it cannot be: with 30 problems and 16 samples of each that is on average at least "
    "sqrt(p (1 - p) / 480), or 1.8 at 19.8 % where 1.4 is printed. No verdict below uses the paper's ±."
)
COSTS = (
    "**What each row cost** ({spread}): its own stage and every stage behind it, the teacher's included, each once. Labels "
    "are counted as in the paper: all problems that the student or its teacher has been trained on. GRPO learns from their "
    "answers, as does the SFT'd teacher, which trains on its right answers; the other stages learn without them. Tokens "
    "are thousands of response tokens; in a teacher's own row they are the teacher's. The teacher's forward pass in Stages "
    "2a and 2b is not among them. CPU minutes are those of each stage's first process, without GPUs and without the "
    "pretraining of the raw models. `fkl_only` and `sft_only` reuse the responses that the teacher has sampled for the "
    "warmup: their rows have these tokens, but not the minutes that it took to sample them."
)
VERDICTS = (
    "**Orderings**, by the paper's predictions and as it finds them on MATH-500. Differences are in points and taken "
    "problem by problem, ± one standard error. {spread} An ordering (>) holds, or is REVERSED, if the interval leaves out "
    "zero, and is otherwise not resolved. An equality (=) does not hold if the interval leaves out zero; otherwise no "
    "difference is resolved, which does not show that there is none: the interval says how large it may be. In brackets is how "
    "many runs would resolve a difference if its mean and its spread over runs stayed as they are."
)
ONE_RUN = "The 95 % interval is by Student's t over {problems} problems of one run; another seed may differ by more."
SEVERAL_RUNS = (
    "The 95 % interval is the wider of two by Student's t: over the {runs} runs ({quantile:.2f} standard errors), and over "
    "the problems, because a handful of runs may agree by chance. ± and p are the larger of the two, too."
)
DEMO = """
Each row of the first table is a checkpoint, with the percentage of its answers to test problems that are right.
Direct GRPO spent {labels} on the student. The teacher, the warmup and the bridge used 1H, half of them:
first the teacher learnt from the labels (Stage 1), and then the student from the teacher (Stages 2a and 2b).
The last row trained on with the other half, 2H (Stage 3). The paper expects each of these steps to help, and the
bridge to beat direct GRPO. A difference of less than two standard errors (±) may be chance.
Pictures: {out}/bars.png and {out}/curves.png. The curves are of training problems.
Stage 3 begins lower there than the bridge ends, because the problems of its half are new to it.
"""


# Student's t


def p_value(difference: float, error: float, df: int) -> float:
    """Two-sided p of difference / error under Student's t with `df` degrees of freedom (a whole number); 1 if the error
    is not known. Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if math.isnan(error) or difference == 0:
        return 1.0
    angle = math.atan2(abs(difference), error * math.sqrt(df))
    term, total = math.cos(angle) if df % 2 else 1.0, 0.0
    for number in range(df % 2 + 2, df + 1, 2):
        total += term
        term *= (number - 1) / number * math.cos(angle) ** 2
    inside = math.sin(angle) * total
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if df % 2 else inside))


def quantile(df: int, level: float = 0.05) -> float:
    """Standard errors on each side of a mean that make its interval: 12.71 of 1 degree of freedom, 1.96 of very many."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, 1.0, df) > level else (low, middle)
    return high


def difference(each: Sequence[tuple[float, float]], problems: int) -> dict[str, float]:
    """What the paired differences of the runs say, each a mean over so many problems ± its standard error.

    `mean` and `se`, and the half width of the 95 % `interval` and `p` by Student's t. Of the errors over runs and over
    problems, each with its degrees of freedom, the one that is less sure decides.
    """
    means, errors = np.array(each, float).T
    tests = [(float((errors**2).sum() ** 0.5) / len(each), problems - 1)]
    if len(each) > 1:
        tests.append((mean_and_error(means)[1], len(each) - 1))
    mean = float(means.mean())
    return {
        "mean": mean,
        "se": max(error for error, _ in tests),
        "interval": max(quantile(df) * error for error, df in tests),
        "p": max(p_value(mean, error, df) for error, df in tests),
    }


def runs_needed(each: Sequence[tuple[float, float]]) -> int | None:
    """How many runs would resolve the mean of these if mean and spread over runs stayed as they are; None if over 199."""
    mean, error = mean_and_error(np.array(each, float)[:, 0])
    spread = error * len(each) ** 0.5
    return next((n for n in range(len(each) + 1, 200) if quantile(n - 1) * spread / n**0.5 < abs(mean)), None)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values after Holm's correction for their number: the chance that any below 0.05 is false is at most 5 %."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(mean: float, p: float, relation: str) -> str:
    """What a difference says of the expected relation, at the 5 % level."""
    if p >= 0.05:
        return "no difference resolved" if relation == "=" else "not resolved"
    if relation == "?":
        return f"resolved ({'+' if mean > 0 else '-'})"
    return "does not hold" if relation == "=" else "holds" if mean > 0 else "REVERSED"


# From the runs to results.json


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


def tables_of(pair: str, checkpoints: Iterable[str]) -> tuple[dict[str, Sequence[Row]], Sequence[Claim]]:
    """The tables with the rows that these checkpoints fill, without tables that have none; and the claims about them.

    The Llama pair has Table 3, whose rows the other pairs have in Tables 2 and 6. Our own table goes with every pair.
    Where no checkpoint has seen all labels (SCALE=real), the tables are those on 1H.
    """
    tables, claims = TABLES_1H, CLAIMS_1H
    if any(checkpoint.startswith("full/") for checkpoint in checkpoints):
        tables, claims = TABLES, CLAIMS
        tables = {
            title: rows for title, rows in tables.items() if title == OURS or (title == LLAMA) == (pair == "llama")
        }
    filled = {title: [row for row in rows if row.checkpoint in checkpoints] for title, rows in tables.items()}
    return (
        {title: rows for title, rows in filled.items() if rows},
        [claim for claim in claims if claim.first in checkpoints and claim.second in checkpoints],
    )


def average(runs: list[dict], checkpoint: str, name: str) -> tuple[float, float]:
    """avg@k of a checkpoint: of one run ± SE over problems, of several their mean ± SE over runs."""
    if len(runs) == 1:
        return runs[0][checkpoint][name]["avg"], runs[0][checkpoint][name]["se"]
    return mean_and_error(np.array([run[checkpoint][name]["avg"] for run in runs]))


def collect(cfg: Config) -> dict:
    """What results.json holds, without the verdicts: of every checkpoint that all runs have evaluated the entries and
    what it cost, and the paired differences.
    """
    runs = [load_run(directory, cfg.pool) for directory in cfg.runs]
    names = list(next(iter(runs[0].values())))
    known = dict.fromkeys(row.checkpoint for rows in (*TABLES.values(), *TABLES_1H.values()) for row in rows)
    without = {c: [path for path, run in zip(cfg.runs, runs) if c not in run] for c in known}
    checkpoints = [c for c in known if not without[c]]
    each = {c: {name: [run[c][name]["avg"] for run in runs] for name in names} for c in checkpoints}
    return {
        "runs": list(cfg.runs),
        "pair": cfg.pair,
        "problems": {name: min(len(run[c][name]["scores"]) for run in runs for c in checkpoints) for name in names},
        "missing": {c: paths for c, paths in without.items() if 0 < len(paths) < len(runs)},
        "entries": {c: {name: average(runs, c, name) for name in names} for c in checkpoints},
        "each": each,
        "costs": average_costs(cfg.runs, checkpoints),
        "over_time": over_time(cfg.runs),
        "orderings": [
            {"prediction": claim.prediction, "claim": claim.text, "first": claim.first, "relation": claim.relation,
             "second": claim.second, "data": name,
             "runs": [paired_difference(*(run[c][name]["scores"] for c in (claim.first, claim.second))) for run in runs]}
            for claim in tables_of(cfg.pair, checkpoints)[1] for name in names
        ],
    }  # fmt: skip


def judge(results: dict) -> None:
    """Adds to each ordering its mean difference, standard error, interval, p values and verdict."""
    for ordering in results["orderings"]:
        ordering |= difference(ordering["runs"], results["problems"][ordering["data"]])
        ordering["verdict"] = verdict(ordering["mean"], ordering["p"], ordering["relation"])
    for ordering, p in zip(results["orderings"], holm([o["p"] for o in results["orderings"]])):
        ordering["p_holm"] = p


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
    spent = {"labels": len(problems_trained_on(lineage)), "student_sampled": 0, "student_trained": 0, "teacher_sampled": 0,
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


# Accuracy against CPU time


OVER_TIME = {  # name of a curve -> the stages behind it
    "direct GRPO": ("1H/direct",),
    "bridge, with its teacher": ("1H/rl/teacher", "1H/rl/warmup", "1H/rl/bridge"),
    "the teacher (Stage 1)": ("1H/rl/teacher",),
}


def validations(directory: Path) -> tuple[list[tuple[float, float]], float]:
    """A stage's validations as (CPU minutes since its start, accuracy), and all its minutes, without the validations'.

    A stage records its CPU time when it ends. Here it is spread over the steps by the seconds that they took.
    """
    lines = json_lines(directory / "metrics.jsonl")
    seconds = [sum(value for name, value in line.items() if name.startswith("seconds_")) for line in lines]
    minutes_a_second = read_run(str(directory))["cpu_seconds"] / 60 / sum(seconds)
    spent, points = 0.0, []
    for line, of_line in zip(lines, seconds):
        if "validation_validation" in line:
            points.append((spent, line["validation_validation"]))
        else:
            spent += minutes_a_second * of_line
    return points, spent


def over_time(directories: Sequence[str]) -> dict[str, list[list[tuple[float, float]]]]:
    """The points of the curves in OVER_TIME, of each run; no curves if a run lacks one of the stages."""
    stages = {stage for stages in OVER_TIME.values() for stage in stages}
    if not all(Path(run, stage, "run.json").exists() for run in directories for stage in stages):
        return {}
    curves: dict[str, list] = {name: [] for name in OVER_TIME}
    for name, stages in OVER_TIME.items():
        for run in directories:
            start, points = 0.0, []
            for stage in stages:
                found, minutes = validations(Path(run, stage))
                if stage == stages[-1] or not stage.endswith("teacher"):
                    points += [(start + at, accuracy) for at, accuracy in found]
                start += minutes
            # While its teacher is trained, the student stays what it is.
            curves[name].append([(0.0, points[0][1]), *points] if points[0][0] else points)
    return curves


def draw_over_time(curves: dict[str, list], picture: Path) -> None:
    """The curves' mean over the runs, with the range of the runs as error bars."""
    drawn = []
    for (name, runs), colour in zip(curves.items(), COLOURS):
        minutes, accuracy = np.array(runs).transpose(2, 0, 1)  # (runs, points) each
        mean = 100 * accuracy.mean(0)
        spread = np.stack([mean - 100 * accuracy.min(0), 100 * accuracy.max(0) - mean])
        drawn.append(Curve(name, minutes.mean(0), mean, spread if len(runs) > 1 else None, colour))
    draw_panels({f"validation accuracy in %, mean and range of {len(runs)} runs": drawn}, picture, True, "CPU minutes")


# From results.json to tables.md and routes.png


def tables_text(results: dict) -> str:
    """tables.md: the entries, what they cost, and the orderings."""
    tables, _ = tables_of(results["pair"], results["entries"])
    parts = [ERRORS, *missing_rows(results), *entry_tables(tables, results), *cost_table(tables, results)]
    return "\n\n".join([*parts, *ordering_tables(results)]) + "\n"


def missing_rows(results: dict) -> list[str]:
    """A sentence on the rows that some of the runs have and others have not."""
    if not results["missing"]:
        return []
    rows = [f"`{checkpoint}` (missing in {', '.join(paths)})" for checkpoint, paths in results["missing"].items()]
    return ["**Left out**, with the orderings that need them, because not every run has them: " + "; ".join(rows) + "."]


def entry_tables(tables: dict[str, Sequence[Row]], results: dict) -> list[str]:
    """The paper's tables in markdown, each after its title."""
    names, runs = list(results["problems"]), len(results["runs"])
    spread = f"mean of {runs} runs ± SE over runs" if runs > 1 else "± SE over problems"
    header = ["teacher", "protocol", "checkpoint", *(f"ours, {name}: {spread}" for name in names)]
    header += [f"paper, {results['pair']} (MATH-500 / AIME 2024 / AIME 2025)", f"each run, {names[0]}"]
    parts = []
    for title, rows in tables.items():
        lines = []
        for row in rows:
            ours = [percent(*results["entries"][row.checkpoint][name]) for name in names]
            each = ", ".join(f"{100 * average:.1f}" for average in results["each"][row.checkpoint][names[0]])
            paper = paper_figures(row.checkpoint, results["pair"])
            lines.append([row.teacher, row.protocol, f"`{row.checkpoint}`", *ours, paper, each])
        parts += [f"**{title}**", markdown_table(header, lines)]
    return parts


def cost_table(tables: dict[str, Sequence[Row]], results: dict) -> list[str]:
    """What each row cost, in markdown, after what the columns mean; nothing if no cost is on record."""
    if not results["costs"]:
        return []
    names, runs = list(results["problems"]), len(results["runs"])
    header = ["teacher", "protocol", "checkpoint", *names, "labels", "student: sampled", "student: trained on",
              "teacher: sampled", "teacher: trained on", "CPU minutes"]  # fmt: skip
    lines = {}
    for row in itertools.chain(*tables.values()):
        if row.checkpoint in results["costs"] and row.checkpoint not in lines:
            labels, *tokens, minutes = results["costs"][row.checkpoint].values()
            ours = [percent(*results["entries"][row.checkpoint][name]) for name in names]
            spent = [f"{labels:.0f}", *(f"{count / 1000:,.0f}" for count in tokens), f"{minutes:.2f}"]
            lines[row.checkpoint] = [row.teacher, row.protocol, f"`{row.checkpoint}`", *ours, *spent]
    spread = f"mean of {runs} runs" if runs > 1 else "in one run"
    return [COSTS.format(spread=spread), markdown_table(header, list(lines.values()))]


def ordering_tables(results: dict) -> list[str]:
    """The orderings in markdown: how they are judged, what they come to, and one table a prediction."""
    orderings, runs = results["orderings"], len(results["runs"])
    header = ["ordering", "data", "ours, paired difference", "95 % interval", "p", "p, Holm", "each run",
              f"paper, {results['pair']}, MATH-500", "verdict"]  # fmt: skip
    spread = SEVERAL_RUNS if runs > 1 else ONE_RUN
    spread = spread.format(runs=runs, quantile=quantile(max(1, runs - 1)), problems=min(results["problems"].values()))
    parts = [VERDICTS.format(spread=spread), *summary(orderings)]
    for prediction, says in PREDICTIONS.items():
        lines = [
            [o["claim"], o["data"], signed(o["mean"], o["se"]), interval(o), *map(small, (o["p"], o["p_holm"])),
             ", ".join(signed(*run) for run in o["runs"]),
             paper_difference(o["first"], o["second"], results["pair"]), o["verdict"] + outlook(o, runs)]
            for o in orderings if o["prediction"] == prediction
        ]  # fmt: skip
        if lines:
            parts += [f"**{prediction}**: {says}", markdown_table(header, lines)]
    return parts


def summary(orderings: list[dict]) -> list[str]:
    """How many claims have which verdict, and how far to trust so many verdicts together."""
    if not orderings:
        return []
    paper = Counter(o["verdict"] for o in orderings if o["relation"] != "?" and OWN not in o["claim"])
    resolved = [o for o in orderings if o["p"] < 0.05]
    lost = [f"{o['claim']} ({o['data']})" for o in resolved if o["p_holm"] >= 0.05]
    return [
        f"**Verdicts on {paper.total()} claims of the paper**: {', '.join(f'{v} {n}' for v, n in paper.most_common())}.",
        f"**Chance**: {len(orderings)} claims are tested below, each at 5 %. If no difference were real, "
        f"{len(orderings)} x 0.05 = {0.05 * len(orderings):.2g} of them would on average be resolved by chance. Holm's correction keeps the chance of even one "
        f"false verdict at 5 %. Of the {len(resolved)} resolved verdicts {len(resolved) - len(lost)} survive it"
        + (f", and these do not: {'; '.join(lost)}." if lost else "."),
    ]


def outlook(ordering: dict, runs: int) -> str:
    if runs == 1 or ordering["p"] < 0.05:
        return ""
    return f" ({runs_needed(ordering['runs']) or 'over 199'} runs might)"


def signed(mean: float, error: float) -> str:
    return ("+" if mean >= 0 else "") + percent(mean, error)


def interval(ordering: dict) -> str:
    ends = (100 * (ordering["mean"] + sign * ordering["interval"]) for sign in (-1, 1))
    return "-" if math.isnan(ordering["interval"]) else "{:+.1f} to {:+.1f}".format(*ends)


def small(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


TEACHERS, STUDENTS = COLOURS[1], COLOURS[0]


def draw(results: dict, picture: Path) -> None:
    """Bars of every checkpoint, the reward of GRPO's rollouts (C1), and the KL to the teacher along OPD (C2)."""
    tables, _ = tables_of(results["pair"], results["entries"])
    bars = sum(map(len, tables.values())) + len(tables)
    figure = Figure(figsize=(16, max(7, 0.36 * bars)), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1))
    draw_bars(figure.add_subplot(grid[:, 0]), tables, results)
    rows = [row for row in itertools.chain(*tables.values()) if row.curve]
    axes = figure.add_subplot(grid[0, 1])
    draw_curves(axes, results["runs"], rows, "reward")
    axes.set_title("C1: the reward of GRPO's rollouts", fontsize=13)
    axes = figure.add_subplot(grid[1, 1])
    axes.set_yscale("log")
    draw_curves(axes, results["runs"], rows, "reverse_kl")
    axes.set_title("C2: KL(student || teacher) along OPD, nats a token", fontsize=13)
    figure.savefig(picture, dpi=100)


def draw_bars(axes, tables: dict[str, Sequence[Row]], results: dict) -> None:
    """A bar for each checkpoint under the first table that has it, and, of several runs, a dot for each."""
    position, labels, drawn = 0.0, {}, set()
    name, runs = next(iter(results["problems"])), len(results["runs"])
    for title, rows in tables.items():
        rows = [row for row in rows if row.checkpoint not in drawn]
        if not rows:
            continue
        drawn |= {row.checkpoint for row in rows}
        axes.text(0, position, title.split(":")[0], fontsize=11, fontweight="bold", va="center")
        for row in rows:
            position += 1
            mean, error = results["entries"][row.checkpoint][name]
            colour = TEACHERS if row.checkpoint.endswith("teacher") else STUDENTS
            axes.barh(position, 100 * mean, xerr=100 * error, color=colour, alpha=0.75, capsize=2, height=0.75)
            single = [100 * average for average in results["each"][row.checkpoint][name]] if runs > 1 else []
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
    spread = f"mean of {runs} runs ± SE; dots: runs" if runs > 1 else "± SE over problems"
    axes.set_xlabel(f"{name}, avg@k in %, {spread}", fontsize=11)


def draw_curves(axes, directories: Sequence[str], rows: Iterable[Row], metric: str) -> None:
    """A metric's mean and range over the runs at each step, for the checkpoints that log it in every run."""
    for row in rows:
        paths = [Path(directory, row.checkpoint, "metrics.jsonl") for directory in directories]
        if not all(path.is_file() for path in paths):
            continue
        steps = [map(json.loads, path.read_text().splitlines()) for path in paths]
        series = [[step[metric] for step in run if metric in step] for run in steps]
        if shortest := min(map(len, series)):
            colour = COLOURS[len(axes.lines) % len(COLOURS)]
            values = np.array([run[:shortest] for run in series])  # (runs, steps)
            axes.plot(values.mean(0), label=row.curve, linewidth=1.6, color=colour)
            axes.fill_between(range(shortest), values.min(0), values.max(0), color=colour, alpha=0.12)
    spread = f" (line: mean, band: range of {len(directories)} runs)" if len(directories) > 1 else ""
    axes.set_xlabel("step" + spread, fontsize=11)
    axes.tick_params(which="both", labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    label_lines(axes)


def show_demo(cfg: Config) -> None:
    """Draws the learning curves, prints the table of the evaluation in `out` and explains it."""
    out = Path(cfg.out)
    lib.plots.draw_curves(dict(zip(cfg.labels, cfg.demo, strict=True)), out / "curves.png")
    labels = "the half 1H of the training labels" if Path(cfg.demo[0]).parent.name == "1H" else "all training labels"
    print((out / "table.md").read_text(encoding="utf-8") + DEMO.format(labels=labels, out=cfg.out))


def main(cfg: Config) -> None:
    if cfg.demo:
        show_demo(cfg)
        return
    results = json.loads(Path(cfg.results).read_text(encoding="utf-8")) if cfg.results else collect(cfg)
    judge(results)
    text = tables_text(results)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not cfg.results:
        draw(results, out / "routes.png")
    if results.get("over_time"):
        draw_over_time(results["over_time"], out / "time.png")
    print(text)
    print(f"wrote {out}: tables.md, results.json{'' if cfg.results else ', routes.png'}")


if __name__ == "__main__":
    common.cli(main, Config)
