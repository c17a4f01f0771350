"""Pictures: the curves of one run, bars of an evaluation, and learning curves of several checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from common import first_line
from lib.files import json_lines
from lib.lineage import read_record


def plot_metrics(lines: list[dict], picture: Path) -> None:
    """Draws every number of a metrics.jsonl against its step, one small panel each.

    A number called NAME_se is drawn as the error bars of NAME.
    """
    from matplotlib.figure import Figure  # importing it takes a second, which a stage need not wait for at its start

    every = dict.fromkeys(key for line in lines for key in line)
    names = [name for name in every if name != "step" and name.removesuffix("_se") not in every.keys() - {name}]
    if not names:
        return
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    # Margins are given by hand, because measuring every label takes longer than drawing.
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.25 / rows, top=1 - 0.15 / rows, hspace=0.45, wspace=0.3)
    for axis, name in zip(axes.flat, names):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axis.plot(*zip(*points), linewidth=1.2, marker="." if len(points) < 30 else None)
        bars = [(line["step"], line[name], line[f"{name}_se"]) for line in lines if line.get(f"{name}_se") is not None]
        if bars:
            axis.errorbar(*zip(*bars), fmt="none", capsize=2)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=5)
        axis.locator_params("x", integer=True)  # there is no half of a step
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.text(0.5, 0.03 / rows, "step", fontsize=9, ha="center")
    figure.savefig(picture, dpi=110)


def draw_bars(averages: dict[str, dict[str, tuple[float, float]]], title: str, picture: Path) -> bool:
    """Horizontal bars of averages[label][data set] = (mean, error), in %; False, after a line why, if not drawn."""
    from matplotlib.figure import Figure

    labels, names = list(averages), list(next(iter(averages.values())))
    figure = Figure(figsize=(2 + 4 * len(names), 0.8 + 0.42 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names):
        means, errors = zip(*(averages[label][name] for label in labels))
        values = [100 * mean for mean in means]
        axis.barh(
            range(len(labels)), values, xerr=[100 * e for e in errors], color="#4878a8", ecolor="#303030", capsize=2
        )
        for index, (value, error) in enumerate(zip(values, errors)):
            axis.text(max(value, 0) + 100 * np.nan_to_num(error) + 1, index, f"{value:.1f}", va="center", fontsize=8)
        shown = labels if axis is axes[0][0] else [""] * len(labels)
        axis.set_yticks(
            range(len(labels)), shown, fontsize=9, parse_math=False
        )  # a dollar sign in a label is no mathematics
        axis.invert_yaxis()
        axis.set_xlim(1.08 * min(0, *values), 1.08 * max(100, *values))  # rewards of one's own may be any numbers
        axis.set_xlabel(f"{name}: {title}", fontsize=9, parse_math=False)
        axis.spines[["top", "right"]].set_visible(False)
    try:
        picture.unlink(missing_ok=True)  # an older picture must not pass for this one
        figure.savefig(picture, dpi=130)
    except (OSError, ValueError) as error:  # a full disk, or more bars than fit into a picture
        print(f"{picture} could not be drawn ({first_line(error)})")
        return False
    return True


CURVES = {
    "reward or accuracy of training rollouts": ("reward", "accuracy"),
    "KL to the teacher (nats a token)": ("forward_kl", "reverse_kl"),
}


def draw_curves(checkpoints: dict[str, str], picture: Path) -> bool:
    """Learning curves of the checkpoints (label -> directory) that have a metrics.jsonl; False if none has.

    The legend says which half of the labels a checkpoint was trained on. A Stage 3 that begins below the end of its
    bridge has not become worse: its rollouts are for other problems.
    """
    from matplotlib.figure import Figure

    curves: dict[str, list] = {title: [] for title in CURVES}
    for label, directory in checkpoints.items():
        lines, record = json_lines(Path(directory) / "metrics.jsonl"), read_record(Path(directory))
        half = record["config"]["half"] if record else "unknown"
        labels = "all labels" if half == "full" else f"labels {half}"
        for title, names in CURVES.items():
            for name in names:
                values = [line[name] for line in lines if name in line]  # a line of a validation has none of them
                if values:
                    curves[title].append((f"{label}: {name.replace('_', ' ')}, {labels}", values))
    curves = {title: drawn for title, drawn in curves.items() if drawn}
    if not curves:
        return False
    figure = Figure(figsize=(5.2 * len(curves), 3.6), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)
    for axis, (title, drawn) in zip(axes[0], curves.items()):
        for label, values in drawn:
            axis.plot(values, label=label, linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(bottom=min(0, *(value for _, values in drawn for value in values)))
        axis.locator_params("x", integer=True)
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    return True
