"""The paper's tables (arXiv 2605.12483, v4) with our figures beside its own, and its predictions as paired differences.

    python -m experiments.tables --runs runs/toy/seed0 runs/toy/seed1 --out runs/toy/tables   (make paper-toy does it)
    python -m experiments.tables --runs runs/qwen3-8b/seed0 --out runs/qwen3-8b/tables --pair qwen3-8b
    python -m experiments.tables --results results/toy/results.json --out results/toy   (without the runs)
    python -m experiments.tables --demo --runs runs/toy/seed0 --out runs/toy/seed0/report-test/demo   (the end of make demo)

Each run is a directory of checkpoints HALF/TEACHER/WHAT, as the Makefile builds them, with its evaluations in
report-test/. HALF says which labels a checkpoint may use (full: all of them; 1H: the first of two random halves),
TEACHER which teacher it has (raw; sft: SFT'd; rl: RL'd in Stage 1; same: an RL'd model of the student's size), and WHAT
how it was trained (-2H and -replay are Stage 3 on the other half and on the same one).

An entry is avg@k: for one run ± the standard error over problems, for several runs their mean ± the standard error over
runs. Differences are taken problem by problem within a run, so that variation shared by two checkpoints cancels. Verdicts
are at the 5 % level, by Student's t (`difference`).

It writes tables.md, results.json (the same figures, unrounded), routes.png (bars, rewards in GRPO, KL in OPD) and, for
SCALE=real, time.png (accuracy against CPU time).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import mpmath
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import common
from common import InputError
from evaluate import markdown_table, percent
from lib.files import json_lines
from lib.lineage import problems_trained_on, read_run
from lib.plots import COLOURS, bars, label_lines
from lib.scores import mean_and_error, paired_difference

Pair = Literal["qwen3-8b", "qwen3-14b", "llama"]
PAIRS = get_args(Pair)


@dataclass
class Config:
    out: str  # directory to write
    runs: tuple[str, ...] = ()  # directories of checkpoints, one per seed
    pool: Literal["test", "validation"] = "test"  # problems that were evaluated; settings are chosen on validation
    pair: Pair = "qwen3-8b"  # models of the paper whose figures are shown beside ours
    results: str | None = None  # results.json of an earlier call, to write tables.md again without the runs
    demo: bool = False  # draw the curves of make demo's checkpoints and explain its evaluation, which is in --out


# The paper's figures for MATH-500 / AIME 2024 / AIME 2025 in %, some with ±, in the order of PAIRS.
# Rows that involve only the 1.7B student have the same figures for both Qwen pairs.
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


LLAMA = "Table 3: the Llama pair"
TEACHERS_TABLE = "Teachers (C1) and starting points (our own table)"
TABLES = {
    "Table 1: direct GRPO by model size": ("full/direct", "full/rl/teacher"),
    "Table 2, top: component ablation on all labels, no Stage 3": (
        "full/rl/bridge", "full/raw/bridge", "full/rl/opd_only", "full/rl/sft_only", "full/direct", "full/direct_long",
        "full/rl/fkl_only", "full/rl/bridge_sampled", "full/rl/opd_only_sampled",
    ),
    "Table 2, bottom: RL'd teacher, half of the labels held out": (
        "1H/rl/bridge-2H", "1H/rl/bridge", "1H/rl/bridge-replay",
    ),
    LLAMA: ("full/direct", "full/raw/bridge", "full/rl/bridge"),
    "Table 4: SFT'd teacher, half of the labels held out": (
        "1H/sft/bridge", "1H/sft/bridge-2H", "1H/sft/bridge-replay",
    ),
    "Table 5: what precedes Stage 3 on 2H": ("1H/rl/bridge-2H", "1H/rl/opd_only-2H", "1H/rl/sft_only-2H"),
    "Table 6: transfer only, all labels, no Stage 3": (
        "full/direct", "full/raw/bridge", "full/sft/bridge", "full/same/bridge", "full/rl/bridge", "full/same/opd_only",
        "full/rl/opd_only", "full/same/sft_only", "full/rl/sft_only",
    ),
    TEACHERS_TABLE: (
        "student", "teacher", "full/sft/teacher", "full/rl/teacher", "1H/sft/teacher", "1H/rl/teacher",
    ),
}  # fmt: skip
# With SCALE=real every row uses 1H, so that all rows make use of the same labels. Direct GRPO takes as much CPU time as the
# bridge with its teacher; after step 26 it has made as many student updates as the bridge.
TABLES_1H = {
    "Rows on half of the labels (1H)": (
        "student", "teacher", "1H/rl/teacher", "1H/direct/step-000026", "1H/direct", "1H/raw/bridge", "1H/rl/warmup",
        "1H/rl/bridge", "1H/rl/opd_only", "1H/rl/sft_only",
    ),
}  # fmt: skip

TEACHERS = {"raw": "raw", "sft": "SFT'd", "rl": "RL'd", "same": "student-sized RL'd"}
PROTOCOLS = {
    "direct": "direct GRPO",
    "direct_long": "direct GRPO with the bridge's CPU time",
    "bridge": "bridge",
    "bridge_sampled": "bridge with the sampled estimator",
    "opd_only": "OPD alone",
    "opd_only_sampled": "OPD alone with the sampled estimator",
    "sft_only": "teacher-sample SFT",
    "fkl_only": "forward KL alone",
    "-2H": " + Stage 3 on 2H",
    "-replay": " + replay",
}


def in_words(checkpoint: str) -> str:
    """A checkpoint's name in words: 1H/rl/bridge-2H -> bridge on 1H + Stage 3 on 2H (RL'd teacher)."""
    half, *rest = checkpoint.split("/")
    if not rest:
        return f"raw {checkpoint}"
    teacher = TEACHERS.get(rest[0])
    what, *step = rest[1:] if teacher else rest
    what, dash, stage_3 = what.partition("-")
    labels = "" if half == "full" else f" on {half}"
    if what == "teacher":
        return f"{teacher} teacher{labels}"
    words = PROTOCOLS.get(what, what) + labels + PROTOCOLS.get(dash + stage_3, "")
    words += f", step {int(step[0].removeprefix('step-'))}" if step else ""
    return f"{words} ({teacher} teacher)" if teacher else words


OURS = "(ours)"  # marks a claim that the paper does not make
PREDICTIONS = {
    "P1": "with a raw teacher the bridge does not exceed direct GRPO (C1: optimality of the teacher).",
    "P2": "OPD without the warmup falls below the bridge; so does the off-policy half (C2: closeness).",
    "P3": "after the bridge, fresh labels give what more updates on the bridge's own labels do not.",
    "App. C": "where should the held-out half of the labels go? The paper's difference on MATH-500 is +0.8 with the 8B "
    "teacher and -0.1 with the 14B teacher; by the printed errors neither is resolved. So no order is expected here: the "
    "verdict says whether our difference is resolved, and its sign.",
}
# The relations between two checkpoints that each prediction expects: > or =, or ? if it expects no order.
CLAIMS = {
    "P1": (
        f"full/rl/teacher > teacher {OURS}",
        "full/direct > full/raw/bridge",
        "full/rl/bridge > full/direct",
        f"full/rl/bridge > full/direct_long {OURS}",
        "full/sft/bridge > full/raw/bridge",
        "full/rl/bridge > full/sft/bridge",
        "full/rl/bridge > full/same/bridge",
        "1H/rl/bridge-2H > 1H/sft/bridge-2H",
    ),
    "P2": (
        "full/rl/bridge > full/rl/opd_only",
        "full/rl/bridge > full/rl/sft_only",
        "1H/rl/bridge-2H > 1H/rl/opd_only-2H",
        "1H/rl/bridge-2H > 1H/rl/sft_only-2H",
        f"full/rl/bridge > full/rl/fkl_only {OURS}",
        f"full/rl/bridge > full/rl/bridge_sampled {OURS}",
        f"full/rl/bridge_sampled > full/rl/opd_only_sampled {OURS}",
    ),
    "P3": (
        "1H/rl/bridge-2H > 1H/rl/bridge",
        "1H/rl/bridge-2H > 1H/rl/bridge-replay",
        "1H/rl/bridge-replay = 1H/rl/bridge",
        "1H/sft/bridge-2H > 1H/sft/bridge",
        "1H/sft/bridge-2H > 1H/sft/bridge-replay",
        "1H/sft/bridge-replay = 1H/sft/bridge",
    ),
    "App. C": ("full/rl/bridge ? 1H/rl/bridge-2H",),
}
CLAIMS_1H = {
    "P1": (
        f"1H/rl/teacher > teacher {OURS}",
        "1H/direct/step-000026 > 1H/raw/bridge",
        "1H/rl/bridge > 1H/direct/step-000026",
        f"1H/rl/bridge > 1H/direct {OURS}",
    ),
    "P2": (
        f"1H/rl/bridge > 1H/rl/warmup {OURS}",
        "1H/rl/bridge > 1H/rl/opd_only",
        "1H/rl/bridge > 1H/rl/sft_only",
    ),
}

LEGEND = (
    "**The rows**: the bridge is Stages 2a and 2b. *OPD alone* is 2b without the warmup 2a, *teacher-sample SFT* replaces "
    "both by SFT on the teacher's responses, and *forward KL alone* uses 2a's loss throughout. *On 1H* means the first of "
    "two random halves of the labels; the other rows use all labels. Stage 3 is GRPO of the student on the other half, "
    "2H, and *replay* is the same on 1H again. Forward KL alone, the sampled estimator and direct GRPO with the bridge's CPU "
    "time (three times the steps) are our rows, not the paper's."
)
ERRORS = (
    "**Errors**: our ± is the standard error over problems (one run) or over runs (several). The paper calls its own ± the "
    "standard error over problems, but on AIME it is too small for that: over 30 problems with 16 samples each it would be "
    "at least sqrt(p (1 - p) / 480) on average, or 1.8 at 19.8 %, where 1.4 is printed. No verdict below uses the paper's ±."
)
COSTS = (
    "**Costs** ({spread}) of the row's own stage and all stages before it, including its teacher's, each counted once. "
    "Labels are all problems that the student or its teacher was trained on, as the paper counts them; only GRPO and the "
    "SFT'd teacher use their answers. Tokens are thousands of response tokens, sampled or trained on, without the "
    "teacher's forward pass in 2a and 2b. CPU minutes are those of each stage's first process. `fkl_only` and `sft_only` "
    "reuse the warmup's teacher responses, so their minutes do not include sampling them."
)
VERDICTS = (
    "**Claims**: relations between rows. We chose those that the paper's predictions state or that follow from them and hold "
    "in its MATH-500 column, and added some of our own, marked so. Differences are in points, taken "
    "problem by problem, ± one standard error. {spread} If the interval excludes zero, a claim of an order (>) holds or is "
    "REVERSED; otherwise it is not resolved. A claim of equality (=) does not hold if the interval excludes zero; otherwise "
    "no difference is resolved, which does not prove equality: the interval says how large the difference may be. Brackets "
    "give the number of runs that would resolve the difference if its mean and its spread over runs stayed the same."
)
ONE_RUN = "The 95 % interval is Student's t over {problems} problems of one run; another seed may differ by more."
SEVERAL_RUNS = (
    "The 95 % interval is the wider of two Student's t intervals, over the {runs} runs ({quantile:.2f} standard errors) and "
    "over the problems, because a handful of runs may agree by chance. ± and p are also the larger of the two."
)


# Student's t


def p_value(difference: float, error: float, df: int) -> float:
    """Two-sided p of difference / error under Student's t with `df` degrees of freedom; 1 if the error is unknown."""
    if math.isnan(error) or difference == 0:
        return 1.0
    squared = df * error**2
    return float(mpmath.betainc(df / 2, 0.5, 0, squared / (squared + difference**2), regularized=True))


@functools.cache
def quantile(df: int) -> float:
    """Half width of Student's 95 % interval in standard errors: 12.71 for df = 1, 1.96 for very large df."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, 1.0, df) > 0.05 else (low, middle)
    return high


def difference(each: Sequence[tuple[float, float]], problems: int) -> dict[str, float]:
    """Averages the paired differences of the runs; `each` has a run's mean over its `problems` and the standard error.

    Returns the mean, its `se`, the half width of its 95 % `interval`, and its `p` by Student's t. The last three are
    computed from the spread over problems and, with several runs, over runs; the larger value is returned, because a
    handful of runs may agree by chance.
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
    """Number of runs that would resolve the mean if it and the spread over runs stayed the same; None if over 199."""
    mean, error = mean_and_error(np.array(each, float)[:, 0])
    spread = error * len(each) ** 0.5
    return next((n for n in range(len(each) + 1, 200) if quantile(n - 1) * spread / n**0.5 < abs(mean)), None)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values after Holm's correction: the chance of any false positive below 0.05 is at most 5 %."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(mean: float, p: float, relation: str) -> str:
    """Whether a difference supports the expected relation at the 5 % level."""
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


def tables_and_claims(checkpoints: Collection[str]) -> tuple[dict, dict]:
    """`TABLES` and `CLAIMS`, or their 1H versions if no checkpoint uses all labels (SCALE=real)."""
    on_all_labels = any(checkpoint.startswith("full/") for checkpoint in checkpoints)
    return (TABLES, CLAIMS) if on_all_labels else (TABLES_1H, CLAIMS_1H)


def collect(cfg: Config) -> dict:
    """The content of results.json without the verdicts: the entries and costs of every checkpoint evaluated in all runs,
    and the paired differences of each claim.
    """
    runs = [load_run(directory, cfg.pool) for directory in cfg.runs]
    names = list(next(iter(runs[0].values())))
    known = dict.fromkeys(c for tables in (TABLES, TABLES_1H) for rows in tables.values() for c in rows)
    without = {c: [path for path, run in zip(cfg.runs, runs) if c not in run] for c in known}
    checkpoints = [c for c in known if not without[c]]
    each = {c: {name: [run[c][name]["avg"] for run in runs] for name in names} for c in checkpoints}

    def entry(checkpoint: str, name: str) -> tuple[float, float]:
        single = runs[0][checkpoint][name]
        return (single["avg"], single["se"]) if len(runs) == 1 else mean_and_error(np.array(each[checkpoint][name]))

    orderings = []
    for prediction, claims in tables_and_claims(checkpoints)[1].items():
        for first, relation, second, *ours in map(str.split, claims):
            for name in names if {first, second} <= set(checkpoints) else ():
                pairs = [paired_difference(run[first][name]["scores"], run[second][name]["scores"]) for run in runs]
                orderings.append({"prediction": prediction, "first": first, "relation": relation, "second": second,
                                  "ours": bool(ours), "data": name, "runs": pairs})  # fmt: skip
    costs = {c: [cost(directory, c) for directory in cfg.runs] for c in checkpoints}
    return {
        "runs": list(cfg.runs),
        "pair": cfg.pair,
        "problems": {name: min(len(run[c][name]["scores"]) for run in runs for c in checkpoints) for name in names},
        "missing": {c: paths for c, paths in without.items() if 0 < len(paths) < len(runs)},
        "entries": {c: {name: entry(c, name) for name in names} for c in checkpoints},
        "each": each,
        "costs": {
            c: {key: float(np.mean([spent[key] for spent in found])) for key in found[0]}
            for c, found in costs.items()
            if None not in found
        },
        "orderings": orderings,
        "over_time": over_time(cfg.runs),
    }


def judge(results: dict) -> None:
    """Adds to each ordering its mean difference, standard error, interval, p values and verdict."""
    for ordering in results["orderings"]:
        ordering |= difference(ordering["runs"], results["problems"][ordering["data"]])
        ordering["verdict"] = verdict(ordering["mean"], ordering["p"], ordering["relation"])
        if len(ordering["runs"]) > 1 and ordering["p"] >= 0.05:
            ordering["runs_needed"] = runs_needed(ordering["runs"])
    for ordering, p in zip(results["orderings"], holm([o["p"] for o in results["orderings"]])):
        ordering["p_holm"] = p


def stages_behind(lineage: dict, whose: str) -> dict[str | None, tuple[str, dict]]:
    """All stages that led to a checkpoint, by the sha256 of its weights: the model each one trained, and its record.

    `whose` says whether the checkpoint is the "student" or the "teacher". Stages reached through its `model` trained the
    checkpoint itself, stages reached through its `teacher` the teacher. A stage reached through both counts as the former.
    """
    found = {lineage.get("sha256"): (whose, lineage)} if "stage" in lineage else {}
    for role, parent in lineage.get("parents", {}).items():  # the model comes first
        found = stages_behind(parent, whose if role == "model" else "teacher") | found
    return found


def cost(directory: str, checkpoint: str) -> dict[str, float] | None:
    """Labels, response tokens and CPU minutes of a checkpoint and all stages that led to it.

    None if no stage made the checkpoint, or if one of the stages recorded no cost.
    """
    lineage = read_run(Path(directory, checkpoint))
    whose = "teacher" if Path(checkpoint).name == "teacher" else "student"
    stages = list(stages_behind(lineage, whose).values())
    if not stages or any("trained_tokens" not in record for _, record in stages):
        return None
    spent = {"labels": len(problems_trained_on(lineage)), "student_sampled": 0, "student_trained": 0, "teacher_sampled": 0,
             "teacher_trained": 0, "cpu_minutes": sum(record["cpu_seconds"] for _, record in stages) / 60}  # fmt: skip
    for trained, record in stages:
        spent[f"{trained}_trained"] += record["trained_tokens"]
        # Only Stage 2a learns from the teacher's samples; the others train on every token that they sample.
        sampler = "teacher" if "sampled_tokens" in record else trained
        spent[f"{sampler}_sampled"] += record.get("sampled_tokens", record["trained_tokens"])
    return spent


# Accuracy against CPU time

OVER_TIME = {  # curve -> the stages that lead to its model
    "direct GRPO of the student": ("1H/direct",),
    "the bridge, after its teacher's Stage 1": ("1H/rl/teacher", "1H/rl/warmup", "1H/rl/bridge"),
    "the teacher in Stage 1": ("1H/rl/teacher",),
}


def over_time(directories: Sequence[str]) -> dict[str, list[list[tuple[float, float]]]]:
    """The points (CPU minutes, validation accuracy) of each curve of OVER_TIME in each run; none without its validations.

    A stage records its CPU time at its end. Here it is spread over the steps by the seconds that each took, and the
    validations are left out.
    """
    curves: dict[str, list] = {name: [] for name in OVER_TIME}
    for directory, (name, stages) in itertools.product(directories, OVER_TIME.items()):
        spent, points = 0.0, []
        for stage in stages:
            lines = json_lines(Path(directory, stage, "metrics.jsonl"))
            cpu_minutes = read_run(Path(directory, stage))["cpu_seconds"] / 60 if lines else 0.0
            seconds = [sum(value for key, value in line.items() if key.startswith("seconds_")) for line in lines]
            for line, of_line in zip(lines, seconds):
                if "validation_validation" not in line:
                    spent += of_line / sum(seconds) * cpu_minutes
                elif stage in (stages[-1], "1H/rl/warmup"):  # of the student, and not of its teacher
                    points.append((spent, line["validation_validation"]))
        if not points:
            return {}
        curves[name].append([(0.0, points[0][1]), *points])  # while its teacher learns, the student stays what it is
    return curves


def draw_mean_and_range(axis, x: Sequence[float], runs: np.ndarray, **style) -> None:
    """Draws the mean of the runs (runs, points) as a line, and their range as a band, in the next colour."""
    colour = COLOURS[len(axis.lines) % len(COLOURS)]
    axis.plot(x, runs.mean(0), color=colour, **style)
    axis.fill_between(x, runs.min(0), runs.max(0), color=colour, alpha=0.12)


def draw_over_time(curves: dict[str, list], picture: Path) -> None:
    """The mean of the runs, and their range as a band."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.add_subplot(xlabel="CPU minutes, without validations", ylabel="validation accuracy, %")
    for name, runs in curves.items():
        minutes, accuracy = np.array(runs).transpose(2, 0, 1)  # (runs, points) each
        draw_mean_and_range(axis, minutes.mean(0), 100 * accuracy, label=name, marker=".")
    axis.set_title(f"line: mean, band: range of {len(runs)} runs", fontsize=11)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    label_lines(axis)
    figure.savefig(picture, dpi=120)


# From results.json to tables.md and routes.png


def tables_text(results: dict) -> str:
    """tables.md: the entries, their costs, and the claims."""
    entries, names, runs = results["entries"], list(results["problems"]), len(results["runs"])
    spread = f"mean of {runs} runs ± SE over runs" if runs > 1 else "± SE over problems"
    parts = [LEGEND, ERRORS]
    if results["missing"]:
        missing = "; ".join(f"`{row}` (missing in {', '.join(paths)})" for row, paths in results["missing"].items())
        parts.append(f"**Left out**, with the claims that need them, because some runs lack them: {missing}.")

    def row(checkpoint: str) -> list[str]:
        ours = [percent(*entries[checkpoint][name]) for name in names]
        return [in_words(checkpoint), f"`{checkpoint}`", *ours]

    header = ["model", "checkpoint", *(f"ours, {name}: {spread}" for name in names)]
    header += [f"paper, {results['pair']} (MATH-500 / AIME 2024 / AIME 2025)", f"each run, {names[0]}"]
    for title, rows in tables_and_claims(entries)[0].items():
        # The Llama pair has only Table 3, whose rows the other pairs have in Tables 2 and 6. All pairs have our own table.
        wanted = title == TEACHERS_TABLE or (title == LLAMA) == (results["pair"] == "llama")
        lines = []
        for checkpoint in rows:
            if wanted and checkpoint in entries:
                each = ", ".join(f"{100 * average:.1f}" for average in results["each"][checkpoint][names[0]])
                lines.append([*row(checkpoint), paper_figures(checkpoint, results["pair"]), each])
        parts += [f"**{title}**", markdown_table(header, lines)] if lines else []

    if results["costs"]:
        header = ["model", "checkpoint", *names, "labels", "student: sampled", "student: trained on", "teacher: sampled",
                  "teacher: trained on", "CPU minutes"]  # fmt: skip
        lines = []
        for checkpoint, (labels, *tokens, minutes) in ((c, spent.values()) for c, spent in results["costs"].items()):
            tokens = [f"{count / 1000:,.0f}" for count in tokens]
            lines.append([*row(checkpoint), f"{labels:.0f}", *tokens, f"{minutes:.2f}"])
        costs = COSTS.format(spread=f"mean of {runs} runs" if runs > 1 else "in one run")
        parts += [costs, markdown_table(header, lines)]
    return "\n\n".join([*parts, *claims_text(results)]) + "\n"


def claims_text(results: dict) -> list[str]:
    """The claims in markdown: how they are judged, the number of each verdict, and one table per prediction."""
    orderings, runs = results["orderings"], len(results["runs"])
    spread = SEVERAL_RUNS if runs > 1 else ONE_RUN
    spread = spread.format(runs=runs, quantile=quantile(max(1, runs - 1)), problems=min(results["problems"].values()))
    paper = Counter(o["verdict"] for o in orderings if o["relation"] != "?" and not o["ours"])
    resolved = sum(o["p"] < 0.05 for o in orderings)
    parts = [
        VERDICTS.format(spread=spread),
        f"**Verdicts on {paper.total()} claims of the paper**: {', '.join(f'{v} {n}' for v, n in paper.most_common())}.",
        f"**Chance**: {len(orderings)} claims are tested below, each at 5 %. If no difference were real, on average "
        f"{len(orderings)} x 0.05 = {0.05 * len(orderings):.2g} of them would be resolved by chance. Holm's correction "
        "limits the chance of even one such verdict to 5 %. Of the "
        f"{resolved} resolved verdicts {sum(o['p_holm'] < 0.05 for o in orderings)} survive it (p, Holm below 0.05).",
    ]
    header = ["claim", "data", "ours, paired difference", "95 % interval", "p", "p, Holm", "each run",
              f"paper, {results['pair']}, MATH-500", "verdict"]  # fmt: skip
    small = lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}"
    for prediction, says in PREDICTIONS.items():
        lines = [
            [claim_of(o), o["data"], signed(o["mean"], o["se"]), interval(o), small(o["p"]), small(o["p_holm"]),
             ", ".join(signed(*run) for run in o["runs"]),
             paper_difference(o["first"], o["second"], results["pair"]),
             o["verdict"] + (f" ({o['runs_needed'] or 'over 199'} runs might)" if "runs_needed" in o else "")]
            for o in orderings if o["prediction"] == prediction
        ]  # fmt: skip
        parts += [f"**{prediction}**: {says}", markdown_table(header, lines)] if lines else []
    return parts


def claim_of(ordering: dict) -> str:
    relation = "against" if ordering["relation"] == "?" else ordering["relation"]
    return f"{in_words(ordering['first'])} {relation} {in_words(ordering['second'])}" + f" {OURS}" * ordering["ours"]


def signed(mean: float, error: float) -> str:
    return ("+" if mean >= 0 else "") + percent(mean, error)


def interval(ordering: dict) -> str:
    ends = (100 * (ordering["mean"] + sign * ordering["interval"]) for sign in (-1, 1))
    return "-" if math.isnan(ordering["interval"]) else "{:+.1f} to {:+.1f}".format(*ends)


REWARD_CURVES = ("full/direct", "full/direct_long", "full/rl/teacher", "1H/rl/teacher", "1H/rl/bridge-2H",
                 "1H/rl/bridge-replay")  # fmt: skip
KL_CURVES = ("full/rl/bridge", "full/raw/bridge", "full/rl/opd_only", "full/rl/bridge_sampled", "full/sft/bridge",
             "full/same/bridge")  # fmt: skip


def draw(results: dict, picture: Path, rewards: Sequence[str] = REWARD_CURVES, kls: Sequence[str] = KL_CURVES) -> None:
    """Bars for every checkpoint; for some, curves of their rollouts' reward (C1) and their KL to the teacher (C2)."""
    checkpoints, runs, name = list(results["entries"]), len(results["runs"]), next(iter(results["problems"]))
    figure = Figure(figsize=(17, max(7, 1 + 0.36 * len(checkpoints))), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    axis = figure.add_subplot(grid[:, 0])
    means, errors = zip(*(results["entries"][checkpoint][name] for checkpoint in checkpoints))
    student, teacher = COLOURS[:2]
    colours = [teacher if checkpoint.endswith("teacher") else student for checkpoint in checkpoints]
    bars(axis, [in_words(checkpoint) for checkpoint in checkpoints], means, errors, colours)
    for place, checkpoint in enumerate(checkpoints if runs > 1 else ()):
        single = [100 * average for average in results["each"][checkpoint][name]]
        axis.plot(single, [place] * runs, ".", color="black", markersize=4)
    patches = [Patch(color=student, label="student"), Patch(color=teacher, label="teacher")]
    axis.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=11, frameon=False)
    spread = f"mean of {runs} runs ± SE; dots: runs" if runs > 1 else "± SE over problems"
    axis.set_xlabel(f"{name}, avg@k in %, {spread}", fontsize=11)
    if not any(checkpoint.startswith("full/") for checkpoint in checkpoints):  # SCALE=real
        rewards, kls = ([row.replace("full/", "1H/") for row in rows] for rows in (rewards, kls))
    axis = figure.add_subplot(grid[0, 1], title="C1: reward of the rollouts")
    draw_curves(axis, results["runs"], rewards, ("reward", "accuracy"))
    axis = figure.add_subplot(grid[1, 1], title="C2: KL between student and teacher, nats a token", yscale="log")
    draw_curves(axis, results["runs"], kls, ("reverse_kl", "forward_kl"))
    figure.savefig(picture, dpi=100)


def draw_curves(axis, directories: Sequence[str], checkpoints: Sequence[str], metrics: Sequence[str]) -> None:
    """Draws for each checkpoint the mean and range over runs, at each step, of the first metric that every run logs."""
    for checkpoint in dict.fromkeys(checkpoints):
        logs = [json_lines(Path(directory, checkpoint, "metrics.jsonl")) for directory in directories]
        for metric in metrics:
            series = [[line[metric] for line in lines if line.get(metric) is not None] for lines in logs]
            if shortest := min(map(len, series)):
                values = np.array([run[:shortest] for run in series])  # (runs, steps)
                draw_mean_and_range(axis, range(shortest), values, label=in_words(checkpoint), linewidth=1.6)
                break
    spread = f" (line: mean, band: range of {len(directories)} runs)" if len(directories) > 1 else ""
    axis.set_xlabel("step" + spread, fontsize=11)
    axis.tick_params(which="both", labelsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    label_lines(axis)


# The end of make demo

STEPS = {  # "first - second": a description of this difference
    "1H/rl/teacher - teacher": "Stage 1: the raw teacher learns by GRPO, from 1H",
    "1H/rl/warmup - student": "Stage 2a: the raw student learns from the RL'd teacher's answers",
    "1H/rl/bridge - 1H/rl/warmup": "Stage 2b: the teacher judges each token of the student's answers",
    "1H/rl/bridge-2H - 1H/rl/bridge": "Stage 3: the student learns by GRPO, from 2H",
    "1H/rl/bridge-2H - full/direct": "the last row, minus direct GRPO on the same labels",
    "1H/rl/bridge - 1H/direct": "the bridge, minus direct GRPO on the same labels",
    "1H/rl/bridge - 1H/raw/bridge": "the bridge from the RL'd teacher, minus that from the raw one",
}
DEMO = """
Each model answered {problems} test problems {k} times. The table has the percentage of right answers ± one standard error
over the problems. 1H and 2H are two random halves of the labelled training problems, and "labels" counts the problems
that a model, or a teacher behind it, was trained on.

{table}

The paper's rule: spend labels on the large model first (Stage 1), then pass its skill to the small model through a
reward on every token (Stages 2a and 2b, the bridge), and only then spend the remaining labels on the small model
(Stage 3). Paired differences, in points:

{steps}

A difference of less than two standard errors may be chance, and one seed is an example, not evidence.
Written to {out}:
  demo.png     the table as bars, and the curves of reward and of KL to the teacher during training. Stage 3 begins
               below the end of the bridge because the problems of 2H are new to it.
  table.md     more about each model, and every pair of models. The answers themselves are in the folders beside it.
"""


def show_demo(cfg: Config) -> None:
    """Plots and explains the evaluation of make demo's checkpoints, which is in `out`."""
    out = Path(cfg.out)
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = {checkpoint: next(iter(scored.values())) for checkpoint, scored in report["results"].items()}
    problems = next(iter(rows.values()))["problems"]
    entries = {checkpoint: {cfg.pool: (row["avg"], row["se"])} for checkpoint, row in rows.items()}
    results = {"runs": cfg.runs, "problems": {cfg.pool: problems}, "entries": entries}
    draw(results, out / "demo.png", list(entries), list(entries))

    table, steps = [("", "% right", "labels")], []
    for checkpoint, row in rows.items():
        labels = len(problems_trained_on(read_run(Path(cfg.runs[0], checkpoint))))
        table.append((in_words(checkpoint), percent(row["avg"], row["se"]), str(labels)))
    for contrast, step in STEPS.items():
        first, second = (rows.get(checkpoint) for checkpoint in contrast.split(" - "))
        if first and second:
            steps.append((step, signed(*paired_difference(first["scores"], second["scores"]))))
    k = report["settings"]["k"]
    print(DEMO.format(problems=problems, k=k, table=aligned(table), steps=aligned(steps), out=out))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


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
