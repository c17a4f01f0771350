r"""The token-reward heatmap: what a reward says about a response, sparse and dense, token by token.

The sparse reward is one bit: whether the answer at the end is right. The dense reward gives each token y_t of a
response the number log pi_T(y_t | s_t) - log pi_theta(y_t | s_t), one summand of Eq. 3: how much likelier the teacher
finds the token than the student that has written it. So a teacher can say in which step a response goes wrong.

For a few problems three rows are drawn: a response of the student, coloured by the dense reward from the trained
teacher; the same response, coloured by that from the raw teacher; and a response of the bridged student to the same
problem. The problems are the first of the file to which the student gives a wrong answer.

    python -m experiments.density --student runs/toy/seed0/raw/raw_student --teacher runs/toy/seed0/1H/rl/teacher \
        --raw-teacher runs/toy/seed0/raw/raw_teacher --bridge runs/toy/seed0/1H/rl/bridge \
        --data runs/toy/seed0/raw/test.jsonl --out runs/toy/seed0/density --max-response-tokens 24

Written: density.png. In the toy's answers the wrong steps are known, so there it is also counted and printed how often
the lowest dense reward of a wrong answer is at a wrong step.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers.utils
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import common
from common import Problem, Rollout, SamplerConfig
from experiments import toy
from kernels import fused_linear_logprob
from lib import data
from lib.engines import Sampling, check_engine, check_lengths, make_engine
from lib.packing import make_batches
from lib.policy import Policy, check_checkpoint, compute_dtype, load_causal_lm
from lib.rewards import grade, make_grader
from lib.rollouts import sample_rollouts
from lib.scores import mean_and_error
from lib.watch import printable, why


@dataclass
class Config(SamplerConfig):
    student: str  # checkpoint whose wrong responses are shown
    teacher: str  # teacher after Stage 1, which gives the dense reward
    raw_teacher: str  # the same teacher before Stage 1, to compare with
    data: str  # problems: a .jsonl or .parquet file, math500 or another short name, or owner/name:split on the hub
    bridge: str | None = None  # student after Stages 2a and 2b, to show its responses to the same problems
    problems: int = 3  # number of problems to show
    tried: int = 32  # problems that the student answers, the first of the data, from which those to show are taken
    responses: int = 1  # responses to each of these problems
    temperature: float = 1.0  # sampling temperature; the stages train at 1 (Table 9)
    max_prompt_tokens: int = 2048  # longest prompt (Table 9)
    max_response_tokens: int = 16384  # length at which a response is cut (Table 9)


class Shown(NamedTuple):
    """One row of the picture."""

    title: str
    rollout: Rollout
    rewards: Tensor  # (T,) float32, the dense reward of each token in nats


def prepare(cfg: Config) -> tuple[list[Problem], PreTrainedTokenizerBase, dict[str, list[int]]]:
    """The problems, the tokenizer and the prompts, once wrong settings have been refused, before any weights load."""
    common.check_settings(cfg)
    tokenizer = data.load_tokenizer(cfg.student, "--student")
    problems = data.load_problems(cfg.data)[: cfg.tried]
    prompts = data.tokenize_prompts(tokenizer, problems, cfg)
    others = {"--teacher": cfg.teacher, "--raw-teacher": cfg.raw_teacher}
    others |= {"--bridge": cfg.bridge} if cfg.bridge else {}
    for argument, model in others.items():
        data.check_same_tokenizer(cfg.student, model, problems, cfg, ("--student", argument))
    for model in (cfg.student, *others.values()):
        check_checkpoint(model, data.vocab_size(tokenizer))
        check_lengths(cfg, model, prompts.values())
    check_engine(cfg, cfg.student)
    return problems, tokenizer, prompts


def sample(
    cfg: Config, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, prompts: dict[str, list[int]]
) -> tuple[list[Rollout], list[Rollout], list[Rollout]]:
    """Graded: all answers of the student, those of them to show, and the bridged student's to the problems of these.

    One answer to a problem is shown. Those whose wrong steps are known come first, and then others that are wrong.
    """
    engine = make_engine(cfg, cfg.student, tokenizer, sleeps=False)
    with make_grader(cfg) as grader:

        def answers(problems: Sequence[Problem], count: int) -> list[Rollout]:
            sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
            rollouts = sample_rollouts(engine, problems, prompts, count, sampling, seed_key=(cfg.seed, "density"))
            grade(rollouts, grader)
            return [rollout for rollout in rollouts if rollout.response_ids]

        own, bridged = answers(problems, cfg.responses), []
        shown: dict[str, Rollout] = {}
        for rollout in sorted(own, key=lambda r: (not find_mistakes(r, tokenizer), why(r) != "wrong", r.sample)):
            shown.setdefault(rollout.problem.id, rollout)
        chosen = list(shown.values())[: cfg.problems]
        if cfg.bridge:
            engine.load(cfg.bridge, tokenizer)
            bridged = answers([rollout.problem for rollout in chosen], 1)
    return own, chosen, bridged


@torch.no_grad()
def logprobs_under(model: str, rollouts: Sequence[Rollout], cfg: Config, vocab_size: int) -> list[Tensor]:
    """Of each rollout, log pi(y_t | s_t) of its T tokens under a checkpoint, at temperature 1: (T,) float32, nats.

    `vocab_size` is the tokenizer's.
    """
    policy = Policy(load_causal_lm(model, compute_dtype(cfg), common.this_device()))
    found: dict[int, Tensor] = {}
    for batch in make_batches(rollouts, 16384, common.this_device()):
        logprobs, _ = policy(batch, lambda h, w: fused_linear_logprob(h, w, batch.targets, vocab_size=vocab_size))
        for index in batch.rollout_index.unique().tolist():
            found[index] = logprobs[batch.rollout_index == index].cpu()
    return [found[index] for index in range(len(rollouts))]


# Where an answer to the toy's problems goes wrong


def wrong_steps(tokens: Sequence[str], expression: str) -> list[int] | None:
    """Indices of the tokens at which a response to the toy's problem has a wrong result, as in ... 6+3=1 ...

    A step is judged by the result before it as the response has it, so that a mistake is not counted again in the steps
    that follow from it. None for a response of another form than the step-by-step habits have: a habit's name, the
    problem's digits and operators with a result after each step, and the last result in the box.
    """
    steps = [expression[start : start + 2] for start in range(1, len(expression), 2)]  # 7*8+3 -> *8, +3
    results = tokens[5 : 2 + 4 * len(steps) : 4]  # two tokens before the first step, and four in each
    written = expression[0] + "".join(f"{step}={result}" for step, result in zip(steps, results))
    form = [*written, " \\boxed{", *results[-1:], "}", toy.EOS]
    if list(tokens[1:]) != form or tokens[0] not in toy.HABITS or not set(results) <= set("0123456789"):
        return None
    right = [
        toy.work_out(before + step, 0.0, random.Random())[0] for before, step in zip([expression[0], *results], steps)
    ]
    return [5 + 4 * number for number, (result, wanted) in enumerate(zip(results, right)) if result != wanted]


def find_mistakes(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`wrong_steps` of a response to one of the toy's problems that is finished and wrong; else none."""
    if why(rollout) != "wrong" or not rollout.problem.prompt.startswith(toy.TASK):
        return []
    tokens = tokenizer.batch_decode([[token] for token in rollout.response_ids])
    return wrong_steps(tokens, rollout.problem.prompt.removeprefix(toy.TASK)) or []


def lowest_at_a_mistake(
    rollouts: Sequence[Rollout], mistakes: Sequence[list[int]], rewards: Sequence[Tensor]
) -> tuple[float, float]:
    """Share of the responses whose lowest dense reward is at one of their mistakes: mean over problems ± its error."""
    groups: dict[str, list[bool]] = {}
    for rollout, wrong, reward in zip(rollouts, mistakes, rewards, strict=True):
        groups.setdefault(rollout.problem.id, []).append(int(reward.argmin()) in wrong)
    return mean_and_error(np.array([np.mean(group) for group in groups.values()]))


# The picture. All text in it is untrusted.

LIMIT = 8.0  # nats; dense rewards beyond it, or beyond its negative, have the darkest colour


def nats(reward: float) -> str:
    """-0.04 -> 0, -7.91 -> −7.9, with the sign that is as wide as a plus."""
    return f"{reward:.1f}".replace("-", "−") if abs(reward) >= 0.05 else "0"


def shade(reward: float) -> tuple[str, str]:
    """The colour behind a token, from red (the teacher would not say it) over white to blue, and that of its text."""
    colour = colormaps["RdBu"](0.5 + 0.5 * max(-1.0, min(1.0, reward / LIMIT)))
    brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return to_hex(colour), "#1c1c1c" if brightness > 0.5 else "#ffffff"


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def texts_of(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the cell of each token says, in one short line. A last token that only ends the response is called so."""
    texts = tokenizer.batch_decode([[token] for token in rollout.response_ids])
    texts = [printable(text.strip(" ") or text).replace("\n", "⏎").replace(" ", "␣") for text in texts]
    return [clipped(t, 14) for t in texts[:-1]] + [
        "end" if rollout.response_ids[-1] in tokenizer.all_special_ids else clipped(texts[-1], 14)
    ]


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


def draw(groups: Sequence[Sequence[Shown]], tokenizer: PreTrainedTokenizerBase, said: str, picture: Path) -> None:
    """The rows of each problem under a title, of which `said` is the last sentence. Sizes and places are in inches.

    Of a long response only the lines around the lowest reward are drawn.
    """
    room, margin, cell, width = 10.2, 0.25, 0.56, 12.1
    rows: list[tuple] = []  # of each its height, its text or cells, and the response that ends with it
    for responses in groups:
        problem = responses[0].rollout.problem
        question = clipped(printable(" ".join(problem.prompt.split())), 60)
        rows.append((0.62, f"{question}    right answer: {clipped(printable(problem.answer), 20)}", None))
        for shown in responses:
            texts = texts_of(shown.rollout, tokenizer)
            widths = [max(0.38, 0.125 * len(text) + 0.13) for text in texts]
            lines = wrap(widths, room)
            kept = around(lines, int(shown.rewards.argmin()), most=4)
            part = f" ({sum(map(len, kept))} of its {len(texts)} tokens)" if len(kept) < len(lines) else ""
            rows.append((0.32, shown.title + part, None))
            for line in kept:
                cells = [(texts[at], widths[at], float(shown.rewards[at])) for at in line]
                rows.append((cell + 0.1, cells, shown.rollout if line is kept[-1] else None))
    height = 2.2 + sum(row[0] for row in rows)
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axis.axis("off")

    def put(x: float, y: float, text: str, **style) -> None:
        axis.text(x, y, text, parse_math=False, **{"va": "center", "color": "#1c1c1c", **style})

    put(margin, 0.36, "Sparse reward is one bit at the end of an answer.", size=19, weight="bold")
    put(margin, 0.74, "Dense reward is a number on every token.", size=19, weight="bold")
    put(margin, 1.1, said, size=13.5)
    top = 1.25
    for tall, content, ended in rows:
        if isinstance(content, str) and tall > 0.5:
            put(margin, top + tall - 0.15, content, size=15, weight="bold", family="monospace")
        elif isinstance(content, str):
            put(margin, top + tall - 0.15, content, size=13)
            put(margin + room + 0.77, top + tall - 0.15, "sparse reward", size=12, ha="center")
        left = margin
        for text, wide, reward in () if isinstance(content, str) else content:
            back, front = shade(reward)
            style = dict(facecolor=back, edgecolor="#c8c8c8", lw=0.6)
            axis.add_patch(Rectangle((left + 0.015, top), wide - 0.03, cell, **style))
            put(left + wide / 2, top + 0.21, text, size=15, ha="center", family="monospace", color=front)
            number = dict(text=nats(reward), color=front if nats(reward) != "0" else "#8a8a8a")
            put(left + wide / 2, top + 0.45, size=10, ha="center", **number)
            left += wide
        if ended is not None:
            left = margin + room + 0.17
            style = dict(boxstyle="round,pad=0.03", facecolor="white", edgecolor="#1c1c1c", lw=1.6)
            axis.add_patch(FancyBboxPatch((left, top + 0.06), 1.2, cell - 0.12, **style))
            earned = float(bool(ended.correct)) if ended.reward is None else ended.reward
            text = f"{'✓' if ended.correct else '✗'} {why(ended)}: {earned:.3g}"
            put(left + 0.6, top + cell / 2, text, size=13 if len(text) < 12 else 10, ha="center", weight="bold")
        top += tall
    bar = figure.add_axes((margin / width, 0.56 / height, 1 - 2 * margin / width, 0.16 / height))
    figure.colorbar(ScalarMappable(Normalize(-LIMIT, LIMIT), "RdBu"), bar, orientation="horizontal", extend="both")
    bar.set_xlabel("dense reward in nats: how much likelier the teacher finds a token than its student", size=13)
    bar.tick_params(labelsize=12)
    with warnings.catch_warnings():  # a token may have characters that the font lacks, which are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=130)


def main(cfg: Config) -> None:
    transformers.utils.logging.disable_progress_bar()  # otherwise each of the loaded models would draw one
    problems, tokenizer, prompts = prepare(cfg)
    own, chosen, bridged = sample(cfg, problems, tokenizer, prompts)

    # The dense reward of the student's answers from both teachers, and of the bridged student's from the trained one.
    mistaken = [rollout for rollout in own if find_mistakes(rollout, tokenizer)]
    scored = chosen + mistaken
    size = data.vocab_size(tokenizer)
    student, raw = (logprobs_under(model, scored, cfg, size) for model in (cfg.student, cfg.raw_teacher))
    trained = logprobs_under(cfg.teacher, scored + bridged, cfg, size)
    from_trained = [theirs - own for theirs, own in zip(trained, student)]
    from_raw = [theirs - own for theirs, own in zip(raw, student)]
    groups = {
        rollout.problem.id: [
            Shown("The student's answer, and its dense reward from the trained teacher", rollout, by_trained),
            Shown("The same answer, and its dense reward from the raw teacher", rollout, by_raw),
        ]
        for rollout, by_trained, by_raw in zip(chosen, from_trained, from_raw)
    }
    for rollout, theirs, own in zip(
        bridged, trained[len(scored) :], logprobs_under(cfg.bridge, bridged, cfg, size) if bridged else []
    ):
        title = "The bridged student's own answer, and its dense reward from the trained teacher"
        groups[rollout.problem.id].append(Shown(title, rollout, theirs - own))

    said = ""
    if mistaken:
        wrong = [find_mistakes(rollout, tokenizer) for rollout in mistaken]
        by_trained, by_raw = (
            "{:.0f} ± {:.0f} %".format(*(100 * x for x in lowest_at_a_mistake(mistaken, wrong, rewards[len(chosen) :])))
            for rewards in (from_trained, from_raw)
        )
        chance = np.mean([len(places) / len(r.response_ids) for places, r in zip(wrong, mistaken)])
        said = (
            f"The trained teacher's lowest number is at a wrong step in {by_trained} of the wrong step-by-step answers."
        )
        print(
            f"In {len(mistaken)} wrong step-by-step answers to {len({r.problem.id for r in mistaken})} problems the lowest "
            f"dense reward is at a wrong step in {by_trained} with the trained teacher, and in {by_raw} with the raw one "
            f"(a token picked blindly: {100 * chance:.0f} %)."
        )
    draw(list(groups.values()), tokenizer, said, Path(cfg.out) / "density.png")
    print(f"wrote {Path(cfg.out) / 'density.png'}, the token-reward heatmap of {len(groups)} problems")


if __name__ == "__main__":
    common.cli(main, Config)
