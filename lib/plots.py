"""Pictures: the curves of one run, bars of an evaluation, and learning curves of several checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from common import first_line
from lib.files import json_lines
from lib.lineage import read_run

COLOURS = ("#4878a8", "#d1803a", "#5a9a5a", "#8d6cab", "#a05050", "#777777")  # also told apart by the colour-blind


def label_lines(axis) -> None:
    """Writes each line's label at its end, in its colour, so that nobody has to look for it in a legend."""
    lines = sorted(axis.lines, key=lambda line: axis.transData.transform((0, line.get_ydata()[-1]))[1])
    low, high = axis.get_window_extent().intervaly
    place, step = -math.inf, 0.065  # heights as shares of the axis: the last label's, and the least distance
    for number, line in enumerate(lines):
        end = (axis.transData.transform((0, line.get_ydata()[-1]))[1] - low) / (high - low)
        # Labels above this one must find room, too.
        place = max(place + step, min(end, 1 - step * (len(lines) - 1 - number)))
        axis.annotate(
            line.get_label(), (1.01, place), xycoords="axes fraction", color=line.get_color(), fontsize=9, va="center",
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


# The panels of a run's picture: a title with its unit, and what is drawn in it together. Other numbers follow, one panel
# each. What is zero in every step is left out.
PANELS = {
    "reward, and shares of responses": ("reward", "accuracy", "frac_reward_zero_std", "truncated", "no_answer"),
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

    A number called NAME_se is drawn as the error bars of NAME.
    """
    from matplotlib.figure import Figure  # importing it takes a second, which a stage need not wait for at its start

    every = dict.fromkeys(key for line in lines for key, value in line.items() if value)
    names = [name for name in every if name != "step" and name.removesuffix("_se") not in every.keys() - {name}]
    panels = {title: [name for name in members if name in names] for title, members in PANELS.items()}
    panels |= {name.replace("_", " "): [name] for name in names if name not in sum(PANELS.values(), ())}
    panels = {title: members for title, members in panels.items() if members}
    if not panels:
        return
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    # Margins are given by hand, because measuring every label takes longer than drawing.
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.3 / rows, top=1 - 0.2 / rows, hspace=0.4, wspace=0.25)
    for axis, (title, members) in zip(axes.flat, panels.items()):
        for name in members:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            label = name.removeprefix("frac_").removeprefix("seconds_").replace("_", " ")
            label = {"reward zero std": "groups without spread"}.get(label, label)
            axis.plot(*zip(*points), linewidth=1.4, marker="." if len(points) < 30 else None, label=label)
            errors = [(line["step"], line[name], line[f"{name}_se"]) for line in lines if line.get(f"{name}_se")]
            if errors:
                axis.errorbar(*zip(*errors), fmt="none", capsize=2)
        axis.set_title(title, fontsize=11)
        axis.tick_params(labelsize=9)
        axis.locator_params(nbins=5)
        axis.locator_params("x", integer=True)  # there is no half of a step
        axis.spines[["top", "right"]].set_visible(False)
        if len(PANELS.get(title, ())) > 1:
            axis.legend(fontsize=8, frameon=False, loc="center right")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.text(0.5, 0.03 / rows, "step", fontsize=11, ha="center")
    figure.savefig(picture, dpi=100)


def draw_bars(
    averages: dict[str, dict[str, tuple[float, float]]], title: str, picture: Path, kinds: dict[str, str]
) -> bool:
    """Horizontal bars of averages[label][data set] = (mean, error), in %; False, after a line why, if not drawn.

    kinds[label] says what sort of model it is, such as its size. Each kind has a colour of its own.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels, names = list(averages), list(next(iter(averages.values())))
    colours = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(dict.fromkeys(kinds.values()))}
    figure = Figure(figsize=(2 + 4 * len(names), 1.1 + 0.42 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names):
        means, errors = zip(*(averages[label][name] for label in labels))
        values = [100 * mean for mean in means]
        axis.barh(
            range(len(labels)), values, xerr=[100 * error for error in errors], ecolor="#303030", capsize=2,
            color=[colours[kinds[label]] for label in labels],
        )  # fmt: skip
        for index, (value, error) in enumerate(zip(values, errors)):
            axis.text(max(value, 0) + 100 * np.nan_to_num(error) + 1, index, f"{value:.1f}", va="center", fontsize=10)
        shown = labels if axis is axes[0][0] else [""] * len(labels)
        axis.set_yticks(
            range(len(labels)), shown, fontsize=10, parse_math=False
        )  # a dollar sign in a label is no mathematics
        axis.invert_yaxis()
        axis.set_xlim(1.08 * min(0, *values), 1.08 * max(100, *values))  # rewards of one's own may be any numbers
        axis.set_xlabel(f"{name}: {title}", fontsize=10, parse_math=False)
        axis.spines[["top", "right"]].set_visible(False)
    if len(colours) > 1:
        patches = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
        figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), fontsize=10, frameon=False)
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
    for number, (label, directory) in enumerate(checkpoints.items()):
        colour = COLOURS[number % len(COLOURS)]
        lines, record = json_lines(Path(directory) / "metrics.jsonl"), read_run(directory)
        half = record["config"]["half"] if record else "unknown"
        labels = "all labels" if half == "full" else f"labels {half}"
        for title, names in CURVES.items():
            for name in names:
                values = [line[name] for line in lines if name in line]  # a line of a validation has none of them
                if values:
                    curves[title].append((f"{label}, {labels}", values, colour))
    curves = {title: drawn for title, drawn in curves.items() if drawn}
    if not curves:
        return False
    figure = Figure(figsize=(7.5, 3.3 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), 1, squeeze=False)
    for axis, (title, drawn) in zip(axes[:, 0], curves.items()):
        for label, values, colour in drawn:
            axis.plot(values, label=label, linewidth=1.6, color=colour)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step", fontsize=10)
        axis.set_ylim(bottom=min(0, *(value for _, values, _ in drawn for value in values)))
        axis.locator_params("x", integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        label_lines(axis)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    return True
