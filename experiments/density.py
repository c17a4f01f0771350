r"""The token-reward heatmap: what a reward says about a response, sparse and dense, token by token.

The sparse reward is one bit: whether the answer at the end is right. The dense reward gives each token y_t of a
response the number log pi_T(y_t | s_t) - log pi_theta(y_t | s_t), one summand of Eq. 3: how much likelier the teacher
finds the token than the student that has written it. So a teacher can say in which step a response goes wrong.

For a problem to which the student gives a wrong answer three rows are drawn: this answer, coloured by the dense
reward from the RL'd teacher; the same answer, coloured by that from the raw teacher; and an answer of the bridged student.

    python -m experiments.density --student runs/toy/seed0/raw/raw_student --teacher runs/toy/seed0/1H/rl/teacher \
        --raw-teacher runs/toy/seed0/raw/raw_teacher --bridge runs/toy/seed0/1H/rl/bridge \
        --data runs/toy/seed0/raw/test.jsonl --out runs/toy/seed0/density --max-response-tokens 24

It writes density.png. The toy's wrong steps are known: they are underlined, and it prints how often the lowest dense
reward of a wrong answer is at one of them.
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
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import common
from common import Problem, Rollout, SamplerConfig
from experiments import toy
from kernels import fused_linear_logprob
from lib import data
from lib.engines import Sampling, check_lengths, make_engine
from lib.packing import make_batches
from lib.policy import Policy, compute_dtype, load_causal_lm
from lib.rewards import grade, make_grader
from lib.rollouts import sample_rollouts
from lib.scores import mean_and_error
from lib.watch import printable, why


@dataclass
class Config(SamplerConfig):
    student: str  # checkpoint whose wrong responses are shown
    teacher: str  # teacher after Stage 1, which gives the dense reward
    raw_teacher: str  # the same teacher before Stage 1, to compare with
    bridge: str  # student after Stages 2a and 2b, whose responses to the same problems are shown
    data: str  # problems: a .jsonl or .parquet file, math500 or another short name, or owner/name:split on the hub
    problems: int = 1  # number of problems to show
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
    mistakes: list[int]  # indices of the tokens to underline


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
            return rollouts

        own = answers(problems, cfg.responses)
        shown: dict[str, Rollout] = {}
        for rollout in sorted(own, key=lambda r: (why(r) != "wrong", not find_mistakes(r, tokenizer), r.sample)):
            shown.setdefault(rollout.problem.id, rollout)
        chosen = list(shown.values())[: cfg.problems]
        engine.load(cfg.bridge, tokenizer)
        return own, chosen, answers([rollout.problem for rollout in chosen], 1)


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


def dense_rewards(
    teacher: str, student: str, rollouts: Sequence[Rollout], cfg: Config, vocab_size: int
) -> list[Tensor]:
    """Of each rollout log pi_T(y_t | s_t) - log pi_theta(y_t | s_t) of its T tokens: (T,) float32, nats."""
    theirs, own = (logprobs_under(model, rollouts, cfg, vocab_size) for model in (teacher, student))
    return [first - second for first, second in zip(theirs, own)]


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
    starts = [expression[0], *results]
    right = [toy.work_out(start + step, 0.0, random.Random())[0] for start, step in zip(starts, steps)]
    return [5 + 4 * number for number, (result, wanted) in enumerate(zip(results, right)) if result != wanted]


def find_mistakes(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`wrong_steps` of a response to one of the toy's problems; none for other problems and other forms of response."""
    if not rollout.problem.prompt.startswith(toy.TASK):
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


# The picture. All text in it is untrusted. Sizes and places are in inches.

LIMIT = 8.0  # nats; dense rewards beyond it, or beyond its negative, have the darkest colour
WIDTH, MARGIN, ROOM = 12.1, 0.25, 10.2  # of the picture, of the space on its left, and of a line of tokens
CELL = 0.56  # height of a token
INK = "#1c1c1c"


def nats(reward: float) -> str:
    """-0.04 -> 0, -7.91 -> −7.9, -10.04 -> −10, with the sign that is as wide as a plus."""
    if abs(reward) < 0.05:
        return "0"
    return f"{reward:.{1 if abs(reward) < 9.95 else 0}f}".replace("-", "−")


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def cell_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each token in one short line of printable characters. A last token that only ends the response is called "end"."""
    texts = tokenizer.batch_decode([[token] for token in rollout.response_ids])
    texts = [printable(text.strip(" ") or text).replace("\n", "⏎").replace(" ", "␣") for text in texts]
    if rollout.response_ids[-1] in tokenizer.all_special_ids:
        texts[-1] = "end"
    return [clipped(text, 14) for text in texts]


def lines_of(widths: Sequence[float], lowest: int) -> list[list[int]]:
    """Indices of cells of these widths in lines that fit into ROOM: at most four lines, around the cell `lowest`."""
    lines: list[list[int]] = []
    left = 0.0
    for index, width in enumerate(widths):
        if not lines or width > left:
            lines.append([])
            left = ROOM
        lines[-1].append(index)
        left -= width
    at = next(number for number, line in enumerate(lines) if lowest in line)
    start = max(0, min(at - 2, len(lines) - 4))
    return lines[start : start + 4]


def draw(groups: Sequence[Sequence[Shown]], tokenizer: PreTrainedTokenizerBase, said: str, picture: Path) -> None:
    """The rows of each problem under a title, of which `said` is the last sentence."""
    figure = Figure()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")

    def put(x: float, y: float, text: str, **style) -> None:
        axis.text(x, y, text, parse_math=False, **{"va": "center", "color": INK, **style})

    put(MARGIN, 0.36, "Sparse reward is one bit at the end of an answer.", size=19, weight="bold")
    put(MARGIN, 0.74, "Dense reward is a number on every token.", size=19, weight="bold")
    put(MARGIN, 1.1, said, size=13.5)
    top = 1.25
    for responses in groups:
        problem = responses[0].rollout.problem
        question = clipped(printable(" ".join(problem.prompt.split())), 60)
        title = f"{question}    right answer: {clipped(printable(problem.answer), 20)}"
        put(MARGIN, top + 0.47, title, size=15, weight="bold", family="monospace")
        top += 0.62
        for shown in responses:
            texts = cell_texts(shown.rollout, tokenizer)
            widths = [max(0.38, 0.125 * len(text) + 0.13) for text in texts]
            lines = lines_of(widths, int(shown.rewards.argmin()))
            count = sum(map(len, lines))
            part = f" ({count} of its {len(texts)} tokens)" if count < len(texts) else ""
            put(MARGIN, top + 0.17, shown.title + part, size=13)
            put(MARGIN + ROOM + 0.77, top + 0.17, "sparse reward", size=12, ha="center")
            top += 0.32
            for line in lines:
                left = MARGIN
                for at in line:
                    reward, width = float(shown.rewards[at]), widths[at]
                    colour = colormaps["RdBu"](0.5 + 0.5 * max(-1.0, min(1.0, reward / LIMIT)))
                    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] <= 0.5
                    corner, front = (left + 0.015, top), "#ffffff" if dark else INK
                    axis.add_patch(Rectangle(corner, width - 0.03, CELL, facecolor=colour, edgecolor="#c8c8c8", lw=0.6))
                    put(left + width / 2, top + 0.21, texts[at], size=15, ha="center", family="monospace", color=front)
                    number = nats(reward)
                    grey = "#8a8a8a" if number == "0" else front
                    put(left + width / 2, top + 0.45, number, size=10, ha="center", color=grey)
                    if at in shown.mistakes:
                        axis.add_patch(Rectangle((left + 0.015, top + CELL), width - 0.03, 0.06, facecolor=INK))
                    left += width
                top += CELL + 0.14
            left, middle, rollout = MARGIN + ROOM + 0.17, top - 0.14 - CELL / 2, shown.rollout
            style = dict(boxstyle="round,pad=0.03", facecolor="white", edgecolor=INK, lw=1.6)
            axis.add_patch(FancyBboxPatch((left, middle - 0.22), 1.2, 0.44, **style))
            earned = float(bool(rollout.correct)) if rollout.reward is None else rollout.reward
            text = f"{'✓' if rollout.correct else '✗'} {why(rollout)}: {earned:.3g}"
            put(left + 0.6, middle, text, size=13 if len(text) < 12 else 10, ha="center", weight="bold")
    height = top + 0.95
    figure.set_size_inches(WIDTH, height)
    axis.set(xlim=(0, WIDTH), ylim=(height, 0))
    bar = figure.add_axes((MARGIN / WIDTH, 0.56 / height, 1 - 2 * MARGIN / WIDTH, 0.16 / height))
    figure.colorbar(ScalarMappable(Normalize(-LIMIT, LIMIT), "RdBu"), bar, orientation="horizontal", extend="both")
    bar.set_xlabel(
        "dense reward in nats: log-probability of a token under the teacher, minus that under the student", size=13
    )
    bar.tick_params(labelsize=12)
    with warnings.catch_warnings():  # a token may have characters that the font lacks, which are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=130)


def main(cfg: Config) -> None:
    transformers.utils.logging.disable_progress_bar()  # otherwise each of the loaded models would draw one
    common.check_settings(cfg)
    tokenizer = data.load_tokenizer(cfg.student, "--student")
    problems = data.load_problems(cfg.data)[: cfg.tried]
    prompts = data.tokenize_prompts(tokenizer, problems, cfg)
    models = {
        "--student": cfg.student,
        "--teacher": cfg.teacher,
        "--raw-teacher": cfg.raw_teacher,
        "--bridge": cfg.bridge,
    }
    for argument, model in models.items():
        data.check_same_tokenizer(cfg.student, model, problems, cfg, ("--student", argument))
        check_lengths(cfg, model, prompts.values())
    own, chosen, bridged = sample(cfg, problems, tokenizer, prompts)

    size = data.vocab_size(tokenizer)
    mistaken = [rollout for rollout in own if why(rollout) == "wrong" and find_mistakes(rollout, tokenizer)]
    from_rl = dense_rewards(cfg.teacher, cfg.student, chosen + mistaken, cfg, size)
    from_raw = dense_rewards(cfg.raw_teacher, cfg.student, chosen + mistaken, cfg, size)
    of_bridged = dense_rewards(cfg.teacher, cfg.bridge, bridged, cfg, size)
    rows = (
        ("The raw student's answer, and its dense reward from the RL'd teacher", chosen, from_rl),
        ("The same answer, and its dense reward from the raw teacher", chosen, from_raw),
        ("The bridged student's own answer, and its dense reward from the RL'd teacher", bridged, of_bridged),
    )
    groups = [
        [Shown(title, them[n], rewards[n], find_mistakes(them[n], tokenizer)) for title, them, rewards in rows]
        for n in range(len(chosen))
    ]

    picture, said = Path(cfg.out) / "density.png", ""
    if mistaken:
        wrong = [find_mistakes(rollout, tokenizer) for rollout in mistaken]
        by_rl, by_raw = (
            "{:.0f} ± {:.0f} %".format(*(100 * x for x in lowest_at_a_mistake(mistaken, wrong, rewards[len(chosen) :])))
            for rewards in (from_rl, from_raw)
        )
        chance = np.mean([len(places) / len(r.response_ids) for places, r in zip(wrong, mistaken)])
        said = f"Wrong steps are underlined. The RL'd teacher's lowest reward is at one of them in {by_rl} of {len(mistaken)} wrong answers."
        print(
            "The dense reward of a token is its log-probability under the teacher, minus that under the student. In "
            f"{len(mistaken)} wrong\nstep-by-step answers of the raw student to {len({r.problem.id for r in mistaken})} "
            f"problems it is lowest at a wrong step in {by_rl} with the RL'd\nteacher, and in {by_raw} with the raw one. "
            f"A token picked at random is at a wrong step in {100 * chance:.0f} %."
        )
    draw(groups, tokenizer, said, picture)
    print(f"wrote {picture}, the token-reward heatmap")


if __name__ == "__main__":
    common.cli(main, Config)
