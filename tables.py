"""The paper's tables with our rows beside its figures, and its orderings as paired differences with errors.

    python tables.py --runs runs/toy/seed0 runs/toy/seed1 --out runs/toy/tables      (make paper-toy does it)
    python tables.py --runs runs/qwen3-8b --out runs/qwen3-8b/tables --pair qwen3-8b

Each run is a directory of checkpoints HALF/TEACHER/WHAT, as the Makefile builds them, with its evaluations in report-test/.
An entry is avg@k: of one run ± the standard error over problems, of several their mean ± the standard error over runs
(other seeds: other problems, weights and samples). Differences are taken problem by problem within a run, so that what
two checkpoints share cancels; their mean over runs has the standard error over runs, or that over problems if it is larger.

Written: tables.md, results.json (every figure in the tables), routes.png (bars, learning curves, C2 along OPD).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

import common
from common import InputError
from evaluate import markdown_table, mean_and_error, paired_difference, percent


@dataclass
class Config:
    runs: tuple[str, ...]  # directories of checkpoints, one a seed
    out: str  # directory to write
    pool: Literal["test", "validation"] = "test"  # problems that were evaluated; settings are chosen on validation
    pair: Literal["qwen3-8b", "qwen3-14b", "llama"] = "qwen3-8b"  # whose figures stand beside ours


@dataclass(frozen=True)
class Row:
    teacher: str
    protocol: str
    checkpoint: str  # HALF/TEACHER/WHAT
    paper: dict[str, str]  # pair -> MATH-500 / AIME 2024 / AIME 2025


def _paper(qwen_8b: str, qwen_14b: str = "", llama: str = "") -> dict[str, str]:
    return {"qwen3-8b": qwen_8b, "qwen3-14b": qwen_14b, "llama": llama}


TABLES = {
    "Table 3 (and 8): transfer alone, all labels": [
        Row("-", "direct GRPO (R1)", "full/same/teacher",
            _paper("75.9 / 19.8 / 17.1", "75.9 / 19.8 / 17.1", "59.8 / 12.5 / 7.2")),
        Row("raw", "bridge", "full/raw/bridge", _paper("71.5 / 15.0 / 10.6", "72.8 / 16.7 / 13.5", "55.4 / 8.8 / 3.1")),
        Row("SFT'd", "bridge", "full/sft/bridge", _paper("76.9 / 22.1 / 17.6", "77.6 / 23.2 / 18.4")),
        Row("RL'd, student's size", "bridge", "full/same/bridge", _paper("76.5 / 20.6 / 17.1", "76.5 / 20.6 / 17.1")),
        Row("RL'd", "bridge (R3-full)", "full/rl/bridge",
            _paper("79.3 / 25.2 / 20.2", "78.6 / 24.6 / 20.8", "62.1 / 14.9 / 9.2")),
        Row("RL'd, student's size", "OPD only", "full/same/opd_only", _paper("75.2 / 19.1 / 12.4", "75.2 / 19.1 / 12.4")),
        Row("RL'd", "OPD only", "full/rl/opd_only", _paper("77.6 / 23.0 / 18.9", "77.1 / 22.8 / 18.6")),
        Row("RL'd, student's size", "teacher-sample SFT", "full/same/sft_only",
            _paper("73.6 / 16.7 / 11.4", "73.6 / 16.7 / 11.4")),
        Row("RL'd", "teacher-sample SFT", "full/rl/sft_only", _paper("76.0 / 22.4 / 19.4", "76.5 / 21.5 / 17.0")),
    ],
    "Table 4: RL'd teacher, Stage 3": [
        Row("RL'd", "bridge on 1H", "1H/rl/bridge", _paper("75.4 / 22.0 / 16.7", "76.3 / 22.7 / 17.3")),
        Row("RL'd", "+ GRPO on 2H (R5-half)", "1H/rl/bridge-2H", _paper("78.5 / 23.7 / 18.5", "78.7 / 23.1 / 19.2")),
        Row("RL'd", "+ replay on 1H (R7)", "1H/rl/bridge-replay", _paper("75.7 / 21.6 / 17.0", "75.6 / 22.4 / 17.6")),
    ],
    "Table 5: SFT'd teacher, Stage 3": [
        Row("SFT'd", "bridge on 1H", "1H/sft/bridge", _paper("74.3 / 21.8 / 14.5", "75.8 / 22.0 / 15.1")),
        Row("SFT'd", "+ GRPO on 2H (R6)", "1H/sft/bridge-2H", _paper("77.2 / 22.9 / 18.4", "76.9 / 23.2 / 18.6")),
        Row("SFT'd", "+ replay on 1H", "1H/sft/bridge-replay", _paper("74.0 / 22.1 / 14.2", "75.6 / 22.3 / 14.9")),
    ],
    "Table 6: what comes before Stage 3 on 2H": [
        Row("RL'd", "bridge (R5-half)", "1H/rl/bridge-2H", _paper("78.5 / 23.7 / 18.5", "78.7 / 23.1 / 19.2")),
        Row("RL'd", "OPD only (R8)", "1H/rl/opd_only-2H", _paper("77.8 / 22.8 / 16.6", "77.5 / 21.9 / 19.5")),
        Row("RL'd", "teacher-sample SFT (R2)", "1H/rl/sft_only-2H", _paper("77.3 / 22.5 / 16.9", "77.2 / 21.6 / 19.0")),
    ],
    "Component ablation (a later version of the paper: MATH-500 less than the full bridge)": [
        Row("RL'd", "bridge", "full/rl/bridge", _paper("0")),
        Row("raw", "bridge (no teacher RL)", "full/raw/bridge", _paper("-7.8")),
        Row("RL'd", "OPD only (no warmup)", "full/rl/opd_only", _paper("-1.7")),
        Row("RL'd", "forward KL only (no OPD)", "full/rl/fkl_only", _paper("-3.3")),
    ],
    "Teachers (C1) and starting points": [
        Row("-", "raw student", "student", _paper("")),
        Row("raw", "-", "teacher", _paper("")),
        Row("SFT'd", "-", "full/sft/teacher", _paper("")),
        Row("RL'd", "-", "full/rl/teacher", _paper("88.4 / 47.7 / 36.7", "89.5 / 47.1 / 39.0")),
        Row("SFT'd on 1H", "-", "1H/sft/teacher", _paper("")),
        Row("RL'd on 1H", "-", "1H/rl/teacher", _paper("")),
    ],
}  # fmt: skip

# (what the paper claims, checkpoint, its contrast, difference on MATH-500 with the 8B teacher or "" where it gives none)
ABOVE = [
    ("C1: Stage 1 improves the teacher", "full/rl/teacher", "teacher", ""),
    ("direct GRPO > bridge from the raw teacher", "full/same/teacher", "full/raw/bridge", "+4.4"),
    ("bridge from the RL'd teacher > direct GRPO", "full/rl/bridge", "full/same/teacher", "+3.4"),
    ("SFT'd teacher > raw teacher (bridges)", "full/sft/bridge", "full/raw/bridge", "+5.4"),
    ("RL'd teacher > SFT'd teacher (bridges)", "full/rl/bridge", "full/sft/bridge", "+2.4"),
    ("RL'd teacher > RL'd teacher of the student's size (bridges)", "full/rl/bridge", "full/same/bridge", "+2.8"),
    ("OPD only > teacher-sample SFT", "full/rl/opd_only", "full/rl/sft_only", "+1.6"),
    ("two-stage bridge > OPD only (no warmup)", "full/rl/bridge", "full/rl/opd_only", "+1.7"),
    ("two-stage bridge > forward KL only (no OPD)", "full/rl/bridge", "full/rl/fkl_only", "+3.3"),
    ("bridge + 2H > bridge", "1H/rl/bridge-2H", "1H/rl/bridge", "+3.1"),
    ("bridge + 2H > bridge + replay", "1H/rl/bridge-2H", "1H/rl/bridge-replay", "+2.8"),
    ("bridge + 2H > bridge (SFT'd teacher)", "1H/sft/bridge-2H", "1H/sft/bridge", "+2.9"),
    ("bridge + 2H > bridge + replay (SFT'd teacher)", "1H/sft/bridge-2H", "1H/sft/bridge-replay", "+3.2"),
    ("RL'd teacher > SFT'd teacher (bridges + 2H)", "1H/rl/bridge-2H", "1H/sft/bridge-2H", "+1.3"),
    ("bridge + 2H > OPD only + 2H", "1H/rl/bridge-2H", "1H/rl/opd_only-2H", "+0.7"),
    ("OPD only + 2H > teacher-sample SFT + 2H", "1H/rl/opd_only-2H", "1H/rl/sft_only-2H", "+0.5"),
]
EQUAL = [
    ("bridge + replay = bridge", "1H/rl/bridge-replay", "1H/rl/bridge", "+0.3"),
    ("bridge + replay = bridge (SFT'd teacher)", "1H/sft/bridge-replay", "1H/sft/bridge", "-0.3"),
]


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


def verdict(difference: float, error: float, equal: bool) -> str:
    """What a difference says of an ordering, at two standard errors."""
    if equal:
        return "holds" if abs(difference) < 2 * error else "does not hold"
    if abs(difference) < 2 * error or np.isnan(error):
        return "not resolved"
    return "holds" if difference > 0 else "REVERSED"


def ordering(claim: str, first: str, second: str, paper: str, equal: bool, runs: list[dict], name: str) -> dict:
    """One claim on one data set: the paired difference first - second of each run, their mean, and the verdict."""
    each = [paired_difference(run[first][name]["scores"], run[second][name]["scores"]) for run in runs]
    mean, error = mean_and_error(np.array([difference for difference, _ in each])) if len(each) > 1 else each[0]
    # A handful of runs may agree by chance; their problems say how closely they could have.
    error = max(error, sum(e**2 for _, e in each) ** 0.5 / len(each))
    return {"claim": claim, "first": first, "second": second, "paper": paper, "data": name, "mean": mean, "se": error,
            "runs": each, "verdict": verdict(mean, error, equal)}  # fmt: skip


def signed(mean: float, error: float) -> str:
    return ("+" if mean >= 0 else "") + percent(mean, error)


def average(runs: list[dict], checkpoint: str, name: str) -> tuple[float, float]:
    """avg@k of a checkpoint: of one run ± SE over problems, of several their mean ± SE over runs."""
    if len(runs) == 1:
        return runs[0][checkpoint][name]["avg"], runs[0][checkpoint][name]["se"]
    return mean_and_error(np.array([run[checkpoint][name]["avg"] for run in runs]))


def draw(runs: list[dict], directories: tuple[str, ...], name: str, picture: Path) -> None:
    """Bars of every row (dots: single runs), accuracy of training rollouts in GRPO, and KL to the teacher along OPD (C2)."""
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    bars = figure.add_subplot(grid[:, 0])
    position, ticks, labels = 0.0, [], []
    for number, (title, rows) in enumerate(TABLES.items()):
        rows = [row for row in rows if all(row.checkpoint in run for run in runs)]
        if not rows:
            continue
        bars.text(0, position, title.split(":")[0].split(" (")[0], fontsize=8, fontweight="bold", va="center")
        for row in rows:
            position += 1
            mean, error = average(runs, row.checkpoint, name)
            bars.barh(position, 100 * mean, xerr=100 * error, color=f"C{number}", alpha=0.75, capsize=2, height=0.75)
            single = [100 * run[row.checkpoint][name]["avg"] for run in runs] if len(runs) > 1 else []
            bars.plot(single, [position] * len(single), ".", color="black", markersize=3)
            ticks.append(position)
            labels.append(": ".join(part for part in (row.teacher, row.protocol) if part != "-"))
        position += 1.2
    bars.set_yticks(ticks, labels, fontsize=7)
    bars.set_ylim(position, -0.8)
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_xlim(0, 100)
    bars.tick_params(labelsize=7)
    bars.set_xlabel(
        f"{name}, avg@k in %" + (f", mean of {len(runs)} seeds ± SE; dots: seeds" if len(runs) > 1 else ""), fontsize=9
    )

    def curves(axis, checkpoints_and_labels, metric):
        for checkpoint, label in checkpoints_and_labels:
            paths = [Path(directory, checkpoint, "metrics.jsonl") for directory in directories]
            if all(path.is_file() for path in paths):
                lines = [[json.loads(line)[metric] for line in path.read_text().splitlines()] for path in paths]
                shortest = min(map(len, lines))
                values = np.array([line[:shortest] for line in lines])  # (runs, steps)
                [line] = axis.plot(values.mean(0), label=label, linewidth=1.4)
                axis.fill_between(range(shortest), values.min(0), values.max(0), color=line.get_color(), alpha=0.12)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        if axis.lines:
            axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)

    rewards = figure.add_subplot(grid[0, 1])
    curves(rewards, [("full/rl/teacher", "Stage 1: teacher, all labels"), ("1H/rl/teacher", "Stage 1: teacher, 1H"),
                     ("full/same/teacher", "direct GRPO"), ("1H/rl/bridge-2H", "Stage 3 on 2H"),
                     ("1H/rl/bridge-replay", "Stage 3, replay of 1H")], "reward")  # fmt: skip
    rewards.set_title("C1: reward of GRPO's rollouts" + " (band: range over seeds)" * (len(runs) > 1), fontsize=9)
    distance = figure.add_subplot(grid[1, 1])
    curves(distance, [("full/rl/bridge", "RL'd teacher, after warmup"), ("full/rl/opd_only", "RL'd teacher, OPD only"),
                      ("full/sft/bridge", "SFT'd teacher, after warmup"), ("full/raw/bridge", "raw teacher, after warmup"),
                      ("full/same/bridge", "teacher of the student's size, after warmup")], "reverse_kl")  # fmt: skip
    distance.set_title("C2: KL(student || teacher) along OPD, nats a token", fontsize=9)
    distance.set_yscale("log")
    figure.savefig(picture, dpi=130)


def main(cfg: Config) -> None:
    runs = [load_run(directory, cfg.pool) for directory in cfg.runs]
    names = list(next(iter(runs[0].values())))
    spread = f"mean of {len(runs)} runs ± SE over runs" if len(runs) > 1 else "± SE over problems"
    parts, figures = [], {}
    for title, rows in TABLES.items():
        rows = [row for row in rows if all(row.checkpoint in run for run in runs)]
        if not rows:
            continue
        header = ["teacher", "protocol", *(f"ours, {name}: {spread}" for name in names)]
        header += [f"paper, {cfg.pair} (MATH-500 / AIME 2024 / AIME 2025)", "each run, " + names[0]]
        lines = []
        for row in rows:
            ours = [average(runs, row.checkpoint, name) for name in names]
            single = ", ".join(f"{100 * run[row.checkpoint][names[0]]['avg']:.1f}" for run in runs)
            lines.append(
                [row.teacher, row.protocol, *(percent(*entry) for entry in ours), row.paper[cfg.pair] or "-", single]
            )
            figures[row.checkpoint] = dict(zip(names, ours))
        parts += [f"**{title}**", markdown_table(header, lines)]

    claims = [(*claim, False) for claim in ABOVE] + [(*claim, True) for claim in EQUAL]
    orderings = [
        ordering(*claim, runs, name)
        for claim in claims
        for name in names
        if all(checkpoint in run for checkpoint in claim[1:3] for run in runs)
    ]
    header = [
        "the paper's ordering",
        "data",
        f"ours, paired difference, {spread}",
        "each run",
        "paper, 8B, MATH-500",
        "",
    ]
    lines = [
        [o["claim"], o["data"], signed(o["mean"], o["se"]), ", ".join(signed(*each) for each in o["runs"]),
         o["paper"] or "-", o["verdict"]]
        for o in orderings
    ]  # fmt: skip
    parts += ["**Orderings** (in points; holds: by more than two standard errors)", markdown_table(header, lines)]

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    written = {"runs": list(cfg.runs), "entries": figures, "orderings": orderings}
    (out / "results.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    draw(runs, cfg.runs, names[0], out / "routes.png")
    print("\n\n".join(parts))
    print(f"wrote {out}: tables.md, results.json, routes.png")


if __name__ == "__main__":
    common.cli(main, Config)
