"""Pictures: the curves of a run, the bars of an evaluation, and labels at the ends of lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLOURS = ("#4878a8", "#d1803a", "#5a9a5a", "#8d6cab", "#a05050", "#777777")  # also told apart by the colour-blind


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
    from matplotlib.figure import Figure  # importing it takes a second, which a stage need not wait for at its start

    every = dict.fromkeys(key for line in lines for key, value in line.items() if value and key != "step")
    names = [name for name in every if name.removesuffix("_se") not in every.keys() - {name}]
    panels = {title: [name for name in members if name in names] for title, members in PANELS.items()}
    panels |= {name.replace("_", " "): [name] for name in names if name not in sum(PANELS.values(), ())}
    panels = {title: members for title, members in panels.items() if members}
    if not panels:
        return
    columns, rows = min(3, len(panels)), math.ceil(len(panels) / 3)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows))
    # Margins by hand: measuring every label takes longer than drawing the panels.
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.3 / rows, top=1 - 0.2 / rows, hspace=0.4, wspace=0.25)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, members) in zip(axes, panels.items()):
        for name in members:
            points = [(at["step"], at[name], at.get(f"{name}_se") or 0) for at in lines if at.get(name) is not None]
            steps, values, errors = zip(*points)
            label = "groups without spread" if name == "frac_reward_zero_std" else name.replace("_", " ")
            [line] = axis.plot(steps, values, label=label, linewidth=1.5, marker="." if len(steps) < 30 else None)
            if any(errors):
                axis.errorbar(steps, values, errors, fmt="none", color=line.get_color(), capsize=2)
        axis.set_title(title, fontsize=11)
        axis.tick_params(labelsize=9)
        axis.locator_params("x", integer=True, nbins=5)
        axis.spines[["top", "right"]].set_visible(False)
        if title in PANELS and len(PANELS[title]) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    figure.supxlabel("step", fontsize=11, y=0.03 / rows)
    figure.savefig(picture, dpi=120)


def bars(axis, labels: Sequence[str], values: Sequence[float], errors: Sequence[float], colours: Sequence[str]) -> None:
    """Horizontal bars of `values` ± `errors`, shares that are drawn in %, from the first label at the top to the last."""
    values, errors = 100 * np.array(values), 100 * np.nan_to_num(np.array(errors))
    axis.barh(range(len(labels)), values, xerr=errors, ecolor="#303030", capsize=2, color=colours)
    axis.set_yticks(range(len(labels)), labels, fontsize=10, parse_math=False)  # a dollar sign is not mathematics
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlim(1.08 * min(0, *values), 1.08 * max(100, *values))  # a user's reward may be any number
    axis.spines[["top", "right"]].set_visible(False)


def draw_bars(results: dict[str, dict[str, dict]], title: str, picture: Path, kinds: dict[str, str]) -> None:
    """The bars of results[label][data set], which has `avg`, `se` and `trained_on`, one column for each data set.

    kinds[label] says what sort of model it is, such as its size, and each kind has a colour. A dagger marks a score on
    problems that the checkpoint was trained on.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels, names = list(results), list(next(iter(results.values())))
    colours = dict(zip(dict.fromkeys(kinds.values()), itertools.cycle(COLOURS)))
    figure = Figure(figsize=(2 + 4 * len(names), 1.1 + 0.42 * len(labels)), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names):
        scores = [results[label][name] for label in labels]
        values, errors = [score["avg"] for score in scores], [score["se"] for score in scores]
        bars(axis, labels, values, errors, [colours[kinds[label]] for label in labels])
        for index, score in enumerate(scores):
            text = f"{100 * score['avg']:.1f}{'†' * bool(score['trained_on'])}"
            end = 100 * (max(score["avg"], 0) + np.nan_to_num(score["se"])) + 1
            axis.text(end, index, text, va="center", fontsize=10)
        axis.set_xlabel(f"{name}: {title}", fontsize=10, parse_math=False)
    if any(score["trained_on"] for row in results.values() for score in row.values()):
        figure.supxlabel("† trained on some of these problems: not a test score", fontsize=9)
    if len(colours) > 1:
        patches = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
        figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), fontsize=10, frameon=False)
    figure.savefig(picture, dpi=130)
