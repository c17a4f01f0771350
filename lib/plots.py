"""Pictures: curves in panels, for one run and for several, and the bars of an evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.files import json_lines
from lib.lineage import read_run

COLOURS = ("#4878a8", "#d1803a", "#5a9a5a", "#8d6cab", "#a05050", "#777777")  # also told apart by the colour-blind


class Curve(NamedTuple):
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    colour: str | None = None


def label_lines(axis) -> None:
    """Writes each line's label at its end, in its colour, so that nobody has to look for it in a legend."""
    lines = sorted(axis.lines, key=lambda line: axis.transData.transform((0, line.get_ydata()[-1]))[1])
    low, high = axis.get_window_extent().intervaly
    place, step = -math.inf, 0.065  # heights as shares of the axis: the last label's, and the least distance
    for above, line in zip(range(len(lines) - 1, -1, -1), lines):
        end = (axis.transData.transform((0, line.get_ydata()[-1]))[1] - low) / (high - low)
        place = max(place + step, min(end, 1 - step * above))  # the labels above this one must find room, too
        axis.annotate(
            line.get_label(), (1.01, place), xycoords="axes fraction", color=line.get_color(), fontsize=9, va="center",
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


def draw_panels(panels: dict[str, list[Curve]], picture: Path, labels: bool, x: str = "step") -> None:
    """One panel of curves for each title: below one another with `labels` at the ends of the lines, or in three columns
    with legends.
    """
    from matplotlib.figure import Figure  # importing it takes a second, which a stage need not wait for at its start

    columns, width, height = (1, 7.5, 3.3) if labels else (min(3, len(panels)), 4.2, 2.6)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained" if labels else None)
    axes = figure.subplots(rows, columns, squeeze=False)
    if not labels:  # margins by hand: measuring every label takes longer than drawing the panels
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.3 / rows, top=1 - 0.2 / rows, hspace=0.4, wspace=0.25)
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for curve in curves:
            style = dict(color=curve.colour, linewidth=1.5, marker="." if len(curve.steps) < 30 else None)
            [line] = axis.plot(curve.steps, curve.values, label=curve.label, **style)
            if curve.errors is not None:
                axis.errorbar(curve.steps, curve.values, curve.errors, fmt="none", color=line.get_color(), capsize=2)
        axis.set_title(title, fontsize=11)
        axis.tick_params(labelsize=9)
        axis.locator_params("x", integer=True, nbins=5)
        axis.spines[["top", "right"]].set_visible(False)
        if labels:
            axis.set_ylim(bottom=min(0, *(value for curve in curves for value in curve.values)))
            label_lines(axis)
        elif len(curves) > 1 or len(PANELS.get(title, ())) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.supxlabel(x, fontsize=11, **({} if labels else {"y": 0.03 / rows}))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


# The panels of a run's picture: a title with its unit, and the metrics drawn in it together. Other metrics follow, one
# panel each. A metric that is zero in every step is left out.
PANELS = {
    "reward, and shares of responses": ("accuracy", "reward", "frac_reward_zero_std", "truncated", "no_answer"),
    "distance, nats a token": ("reverse_kl", "forward_kl", "cross_entropy", "kl_to_reference"),
    "entropy, nats a token": ("entropy",),
    "dense reward, nats": ("dense_reward", "dense_reward_std"),
    "dense reward of the worst token, nats": ("dense_reward_min",),
    "shares of tokens": ("clip_fraction", "importance_clipped", "frac_dense_reward_outliers", "frac_tokens_trained"),
    "length of a response, tokens": ("response_tokens",),
    "norm of the gradient": ("grad_norm",),
    "learning rate": ("lr",),
    "trainer against sampler, nats (mean)": ("sampler_mismatch",),
    "trainer against sampler, nats (largest)": ("sampler_mismatch_max",),
    "seconds a step": ("seconds_rollout", "seconds_verify", "seconds_update"),
}


def plot_metrics(lines: list[dict], picture: Path) -> None:
    """Draws the numbers of a metrics.jsonl against their step, those that belong together in one panel (`PANELS`).

    A metric called NAME_se is drawn as the error bars of NAME.
    """
    every = dict.fromkeys(key for line in lines for key, value in line.items() if value and key != "step")
    names = [name for name in every if name.removesuffix("_se") not in every.keys() - {name}]
    panels = {title: [name for name in members if name in names] for title, members in PANELS.items()}
    panels |= {name.replace("_", " "): [name] for name in names if name not in sum(PANELS.values(), ())}

    def curve(name: str) -> Curve:
        points = [(at["step"], at[name], at.get(f"{name}_se") or 0) for at in lines if at.get(name) is not None]
        steps, values, errors = zip(*points)
        label = "groups without spread" if name == "frac_reward_zero_std" else name.replace("_", " ")
        return Curve(label, steps, values, errors if any(errors) else None)

    panels = {title: [curve(name) for name in members] for title, members in panels.items() if members}
    if panels:
        draw_panels(panels, picture, labels=False)


def draw_curves(checkpoints: dict[str, str], picture: Path) -> None:
    """Learning curves of the checkpoints (label -> directory) that have a metrics.jsonl.

    The label says which half of the labels a checkpoint was trained on. A Stage 3 that begins below the end of its
    bridge has not become worse: its rollouts are for other problems.
    """
    titles = {
        "reward or accuracy of training rollouts": ("reward", "accuracy"),
        "KL to the teacher (nats a token)": ("forward_kl", "reverse_kl"),
    }
    panels: dict[str, list[Curve]] = {title: [] for title in titles}
    for (label, directory), colour in zip(checkpoints.items(), itertools.cycle(COLOURS)):
        lines, record = json_lines(Path(directory) / "metrics.jsonl"), read_run(directory)
        half = record["config"]["half"] if record else "unknown"
        label = f"{label}, {'all labels' if half == 'full' else f'labels {half}'}"
        for title, names in titles.items():
            logged = ((line["step"], [line[name] for name in names if line.get(name) is not None]) for line in lines)
            points = [(step, values[0]) for step, values in logged if values]  # GRPO logs a reward and an accuracy
            if points:
                panels[title].append(Curve(label, *zip(*points), colour=colour))
    draw_panels({title: curves for title, curves in panels.items() if curves}, picture, labels=True)


def draw_bars(results: dict[str, dict[str, dict]], title: str, picture: Path, kinds: dict[str, str]) -> None:
    """Horizontal bars, in %, of results[label][data set], which has `avg`, `se` and `trained_on`.

    kinds[label] says what sort of model it is, such as its size, and each kind has a colour. A dagger marks a score on
    problems that the checkpoint was trained on.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels, names = list(results), list(next(iter(results.values())))
    colours = dict(zip(dict.fromkeys(kinds.values()), itertools.cycle(COLOURS)))
    figure = Figure(figsize=(2 + 4 * len(names), 1.1 + 0.42 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)
    axes[0][0].invert_yaxis()
    for axis, name in zip(axes[0], names):
        values = [100 * results[label][name]["avg"] for label in labels]
        errors = [100 * np.nan_to_num(results[label][name]["se"]) for label in labels]
        bars = [colours[kinds[label]] for label in labels]
        axis.barh(range(len(labels)), values, xerr=errors, ecolor="#303030", capsize=2, color=bars)
        for index, (label, value, error) in enumerate(zip(labels, values, errors)):
            mark = "†" * bool(results[label][name]["trained_on"])
            axis.text(max(value, 0) + error + 1, index, f"{value:.1f}{mark}", va="center", fontsize=10)
        axis.set_yticks(range(len(labels)), labels, fontsize=10, parse_math=False)  # a dollar sign is not mathematics
        axis.set_xlim(1.08 * min(0, *values), 1.08 * max(100, *values))  # a user's reward may be any number
        axis.set_xlabel(f"{name}: {title}", fontsize=10, parse_math=False)
        axis.spines[["top", "right"]].set_visible(False)
    if any(result["trained_on"] for row in results.values() for result in row.values()):
        figure.supxlabel("† trained on some of these problems: not a test score", fontsize=9)
    if len(colours) > 1:
        patches = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
        figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), fontsize=10, frameon=False)
    figure.savefig(picture, dpi=130)
