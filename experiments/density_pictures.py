"""The density picture as density.png and as density.html (experiments/density.py). All text in it is untrusted."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common import Rollout
from lib.watch import printable, why

LIMIT = 8.0  # nats; dense rewards beyond it, or beyond its negative, have the darkest colour
SHORT = 64  # tokens up to which a response of the page has a number under each token


class Scores(NamedTuple):
    """What a model says about the T tokens of a response, at temperature 1."""

    logprobs: Tensor  # (T,) float32, nats
    top_ids: Tensor  # (T, 5) int64, the tokens likeliest to stand at each place, the likeliest first
    top_probs: Tensor  # (T, 5) float32


class Shown(NamedTuple):
    """One row of the picture: a response, what the model that wrote it says about its tokens, and what a teacher does."""

    title: str
    rollout: Rollout
    student: Scores
    teacher: Scores

    @property
    def rewards(self) -> Tensor:
        """(T,) the dense reward of each token, log pi_T(y_t) - log pi_theta(y_t), in nats."""
        return self.teacher.logprobs - self.student.logprobs


def nats(reward: float) -> str:
    """-0.04 -> 0, -7.91 -> −7.9, with the sign that is as wide as a plus."""
    return f"{reward:.1f}".replace("-", "−") if abs(reward) >= 0.05 else "0"


def mark(rollout: Rollout) -> str:
    """The sparse reward: how the response ended, and what that earns in GRPO, which wants it finished."""
    return f"{'✓' if rollout.correct else '✗'} {why(rollout)}"


def shade(reward: float) -> tuple[str, str]:
    """The colour behind a token, from red (the teacher would not say it) over white to blue, and that of its text."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colour = colormaps["RdBu"](0.5 + 0.5 * max(-1.0, min(1.0, reward / LIMIT)))
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return to_hex(colour), "#1c1c1c" if brightness > 0.5 else "#ffffff"


def readable(token: str) -> str:
    """A token's text, which is untrusted, for a cell of the picture: without what cannot be printed, in one line, short."""
    return clipped(printable(token.strip(" ") or token).replace("\n", "⏎").replace(" ", "␣"), 14)


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def texts_of(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token of a response. A last token that only ends it is called so."""
    texts = tokenizer.batch_decode([[token] for token in rollout.response_ids])
    return [*texts[:-1], "end"] if rollout.response_ids[-1] in tokenizer.all_special_ids else texts


def wrap(widths: Sequence[float], room: float) -> list[list[int]]:
    """Indices of cells of these widths in lines that are at most `room` wide."""
    lines: list[list[int]] = []
    left = 0.0
    for index, width in enumerate(widths):
        if not lines or width > left:
            lines.append([])
            left = room
        lines[-1].append(index)
        left -= width
    return lines


def around(lines: list[list[int]], index: int, most: int) -> list[list[int]]:
    """At most `most` successive lines, with the one that holds `index` among them."""
    at = next(number for number, line in enumerate(lines) if index in line)
    start = max(0, min(at - most // 2, len(lines) - most))
    return lines[start : start + most]


def draw(groups: Sequence[Sequence[Shown]], tokenizer: PreTrainedTokenizerBase, short: str, picture: Path) -> None:
    """density.png, the rows of each problem under a title, of which `short` is the last sentence.

    Of a long response only the lines around the lowest reward are drawn.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Rectangle

    room, margin, cell, width = 10.2, 0.25, 0.56, 12.1  # in inches, as are all sizes and places below but those of type
    rows: list[tuple] = []  # of each its height, its text or cells, and the response that ends with it
    for responses in groups:
        problem = responses[0].rollout.problem
        question = clipped(printable(" ".join(problem.prompt.split())), 60)
        rows.append((0.62, f"{question}    right answer: {clipped(printable(problem.answer), 20)}", None))
        for shown in responses:
            texts = [readable(text) for text in texts_of(shown.rollout, tokenizer)]
            widths = [max(0.38, 0.125 * len(text) + 0.13) for text in texts]
            lines = wrap(widths, room)
            kept = around(lines, int(shown.rewards.argmin()), most=4)
            part = f" ({sum(map(len, kept))} of its {len(texts)} tokens)" if len(kept) < len(lines) else ""
            rows.append((0.32, shown.title + part, None))
            for line in kept:
                cells = [(texts[at], widths[at], float(shown.rewards[at])) for at in line]
                rows.append((cell + 0.1, cells, shown.rollout if line is kept[-1] else None))
    height = (1.25 if short else 1.0) + sum(row[0] for row in rows) + 0.95
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axis.axis("off")

    def put(x: float, y: float, text: str, **style) -> None:
        axis.text(x, y, text, parse_math=False, **{"va": "center", "color": "#1c1c1c", **style})

    put(margin, 0.36, "Sparse reward is one bit at the end of an answer.", size=19, weight="bold")
    put(margin, 0.74, "Dense reward is a number on every token.", size=19, weight="bold")
    put(margin, 1.1, short, size=13.5)
    top = 1.0 if not short else 1.25
    for tall, content, ended in rows:
        if isinstance(content, str):
            style = dict(size=15, weight="bold", family="monospace") if tall > 0.5 else dict(size=13)
            put(margin, top + tall - 0.15, content, **style)
            if tall < 0.5:
                put(margin + room + 0.77, top + tall - 0.15, "sparse reward", size=12, ha="center")
            content = []
        left = margin
        for text, wide, reward in content:
            back, front = shade(reward)
            axis.add_patch(
                Rectangle((left + 0.015, top), wide - 0.03, cell, facecolor=back, edgecolor="#c8c8c8", lw=0.6)
            )
            put(left + wide / 2, top + 0.21, text, size=15, ha="center", family="monospace", color=front)
            put(
                left + wide / 2,
                top + 0.45,
                nats(reward),
                size=10,
                ha="center",
                color=front if nats(reward) != "0" else "#8a8a8a",
            )
            left += wide
        if ended is not None:
            left = margin + room + 0.17
            place = (left, top + 0.06), 1.2, cell - 0.12
            axis.add_patch(
                FancyBboxPatch(*place, boxstyle="round,pad=0.03", facecolor="white", edgecolor="#1c1c1c", lw=1.6)
            )
            put(
                left + 0.6,
                top + cell / 2,
                mark(ended),
                size=13 if len(mark(ended)) < 12 else 10,
                ha="center",
                weight="bold",
            )
        top += tall
    bar = figure.add_axes((margin / width, 0.56 / height, 1 - 2 * margin / width, 0.16 / height))
    figure.colorbar(ScalarMappable(Normalize(-LIMIT, LIMIT), "RdBu"), bar, orientation="horizontal", extend="both")
    bar.set_xlabel(
        "dense reward in nats: how much likelier the teacher finds a token than the student who wrote it", size=13
    )
    bar.tick_params(labelsize=12)
    with warnings.catch_warnings():  # a token may have characters that the font lacks, which are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(picture, dpi=130)


def page(groups: Sequence[Sequence[Shown]], tokenizer: PreTrainedTokenizerBase, said: str) -> str:
    """density.html, which needs no other file; `said` is a sentence for its head. All text in it is escaped."""
    here = Path(__file__).with_name("density.html")
    script = here.with_suffix(".js").read_text(encoding="utf-8")
    sections, responses, used = [], [], set()
    for rows in groups:
        problem = rows[0].rollout.problem
        parts = [f"<h2>{escaped(problem.prompt)}\nright answer: {escaped(problem.answer)}</h2>"]
        for shown in rows:
            ids, rewards = shown.rollout.response_ids, shown.rewards.tolist()
            cells = []
            for at, (text, reward) in enumerate(zip(texts_of(shown.rollout, tokenizer), rewards)):
                back, front = shade(reward)
                number = f"<small>{nats(reward)}</small>" if len(ids) <= SHORT else ""
                style = f"background:{back};color:{front}"
                cells.append(f'<span class="token" data-at="{at}" style="{style}">{escaped(text)}{number}</span>')
            kind = "response short" if len(ids) <= SHORT else "response"
            parts.append(
                f'<h3>{escaped(shown.title)}</h3><div class="{kind}" data-response="{len(responses)}">{"".join(cells)}'
                f'<span class="mark">{mark(shown.rollout)}</span></div>'
            )
            tops = {
                name: likeliest(scores) for name, scores in (("student", shown.student), ("teacher", shown.teacher))
            }
            responses.append(
                {"ids": ids, "rewards": rounded(shown.rewards), "logprobs": rounded(shown.student.logprobs), **tops}
            )
            used |= {*ids, *(token for top in tops.values() for place in top for token, _ in place)}
        sections.append(f"<section>{''.join(parts)}</section>")
    texts = {token: printable(tokenizer.decode([token])) for token in used}
    # A script element would end at the first </ in it, whatever quotes that stands in.
    content = json.dumps({"texts": texts, "responses": responses}).replace("<", "\\u003c")
    return string.Template(here.read_text(encoding="utf-8")).substitute(
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        gradient=", ".join(shade(LIMIT * (number / 8 - 1))[0] for number in range(17)),
        limit=f"{LIMIT:.0f}",
        said=escaped(said),
        problems="\n".join(sections),
        data=content,
    )


def escaped(text: str) -> str:
    return html.escape(printable(text))


def rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def likeliest(scores: Scores) -> list[list[list]]:
    """For each token's place [[token, probability], ...], from likely to unlikely."""
    probs = [[float(f"{p:.2g}") for p in place] for place in scores.top_probs.tolist()]
    return [[list(pair) for pair in zip(*place)] for place in zip(scores.top_ids.tolist(), probs)]
