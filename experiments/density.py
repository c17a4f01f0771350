r"""The density picture: what a reward says about a response, sparse and dense, token by token.

The sparse reward is one bit: whether the answer at the end is right. The dense reward gives each token y_t of a
response the number log pi_T(y_t | s_t) - log pi_theta(y_t | s_t), one summand of Eq. 3: how much likelier the teacher
finds the token than the student that has written it. So a teacher can say in which step a response goes wrong.

For a few problems three rows are drawn: a response of the student, coloured by the dense reward from the trained
teacher; the same response, coloured by that from the raw teacher; and a response of the bridged student to the same
problem. The problems are the first of the file to which the student gives a wrong answer.

    python -m experiments.density --student runs/toy/seed0/raw/raw_student --teacher runs/toy/seed0/1H/rl/teacher \
        --raw-teacher runs/toy/seed0/raw/raw_teacher --bridge runs/toy/seed0/1H/rl/bridge \
        --data runs/toy/seed0/raw/test.jsonl --out runs/toy/seed0/density --max-response-tokens 24

Written: density.png, and density.html, which shows the five likeliest tokens of both models where the mouse points. On
the toy's problems the true place of a mistake is known. There it is also counted, in density.json, how often the lowest
dense reward of a wrong answer is that of a wrong result.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers.utils
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import common
from common import InputError, Problem, Rollout, SamplerConfig
from experiments import toy
from experiments.density_pictures import Scores, Shown, draw, page
from kernels import fused_linear_logprob
from lib import data
from lib.engines import Sampling, check_engine, check_lengths, make_engine
from lib.files import check_writable, write_whole
from lib.lineage import code_version
from lib.packing import make_batches
from lib.policy import Policy, check_checkpoint, compute_dtype, load_causal_lm
from lib.rewards import make_grader
from lib.rollouts import grade, sample_rollouts
from lib.scores import mean_and_error, paired_difference
from lib.watch import why


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


TOP = 5  # likeliest tokens of a model to show
PACK = 16384  # positions in one forward pass
LOGITS = 2**25  # logits that are held at a time


# Measuring


@torch.no_grad()
def score(model: str, rollouts: Sequence[Rollout], cfg: Config, vocab_size: int) -> list[Scores]:
    """The scores of each rollout under a checkpoint, which is loaded for this. `vocab_size` is the tokenizer's."""
    policy = Policy(load_causal_lm(model, compute_dtype(cfg), common.this_device()))
    scores: dict[int, Scores] = {}
    for batch in make_batches(rollouts, PACK, common.this_device()):
        found = policy(batch, lambda hidden, weight: token_scores(hidden, weight, batch.targets, vocab_size))
        for index in batch.rollout_index.unique().tolist():
            scores[index] = Scores(*(values[batch.rollout_index == index].cpu() for values in found))
    return [scores[index] for index in range(len(rollouts))]


def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Scores:
    """hidden (N, D), weight (V, D), targets (N,) -> the scores of N tokens, without ever holding all (N, V) logits."""
    logprobs, _ = fused_linear_logprob(hidden, weight, targets, vocab_size=vocab_size)
    tops = [
        (rows @ weight[:vocab_size].T).float().softmax(-1).topk(min(TOP, vocab_size))
        for rows in hidden.split(max(1, LOGITS // vocab_size))
    ]
    return Scores(logprobs, torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops]))


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
    if (
        list(tokens[1:]) != form
        or tokens[0] not in toy.HABITS
        or not all(result in set("0123456789") for result in results)
    ):
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


class Case(NamedTuple):
    """A response with mistakes."""

    problem: str  # the id of its problem
    mistakes: list[int]  # where its wrong results stand, as indices of its T tokens
    rewards: tuple[Tensor, Tensor]  # (T,) each, from the trained and from the raw teacher


MEASURES = {
    "lowest at first mistake": lambda case, rewards: int(rewards.argmin()) == case.mistakes[0],
    "lowest at any mistake": lambda case, rewards: int(rewards.argmin()) in case.mistakes,
    "nats at first mistake": lambda case, rewards: float(rewards[case.mistakes[0]]),
}


def compare(cases: Sequence[Case]) -> dict:
    """Each measure for both teachers and their paired difference: the mean over problems and its standard error."""
    result: dict = {"responses": len(cases), "problems": len({case.problem for case in cases})}
    result["chance"] = float(np.mean([1 / len(case.rewards[0]) for case in cases]))
    for name, measure in MEASURES.items():
        trained, raw = (
            mean_by_problem([(c.problem, measure(c, c.rewards[teacher])) for c in cases]) for teacher in (0, 1)
        )
        result[name] = {
            "trained teacher": mean_and_error(np.array(list(trained.values()))),
            "raw teacher": mean_and_error(np.array(list(raw.values()))),
            "difference": paired_difference(trained, raw),
        }
    return result


def mean_by_problem(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each problem's values, by its id."""
    groups: dict[str, list[float]] = {}
    for problem, value in values:
        groups.setdefault(problem, []).append(value)
    return {problem: float(np.mean(group)) for problem, group in groups.items()}


def in_words(found: dict) -> tuple[str, str]:
    """The comparison in one sentence, and a shorter one for the picture."""
    first, each, depth = (
        [
            f"{scale * mean:.{digits}f} ± {scale * error:.{digits}f}".replace("-", "−")
            for mean, error in found[name].values()
        ]
        for name, scale, digits in zip(MEASURES, (100, 100, 1), (0, 0, 1))
    )
    return (
        f"In {found['responses']} wrong step-by-step answers to {found['problems']} problems the lowest dense reward is that of "
        f"the first wrong result in {first[0]} % with the trained teacher and {first[1]} % with the raw one (difference "
        f"{first[2]}; chance {100 * found['chance']:.0f} %), and that of any wrong result in {each[0]} % and {each[1]} % "
        f"(difference {each[2]}). The first wrong result gets {depth[0]} nats from the trained teacher and {depth[1]} from the "
        f"raw one (difference {depth[2]}).",
        f"The trained teacher's lowest number is at a wrong step in {each[0]} % of the student's wrong step-by-step answers.",
    )


def prepare(cfg: Config) -> tuple[list[Problem], PreTrainedTokenizerBase, dict[str, list[int]]]:
    """The problems, the tokenizer and the prompts, once all that can be known to be wrong has been refused."""
    common.check_settings(cfg)
    if common.world_size() > 1:
        raise InputError(
            f"{common.world_size()} processes would draw one picture; start a single one, without torchrun"
        )
    tokenizer = data.load_tokenizer(cfg.student, "--student")
    data.stop_tokens(tokenizer, cfg.stop)
    problems = data.load_problems(cfg.data)[: cfg.tried]
    models = {"--teacher": cfg.teacher, "--raw-teacher": cfg.raw_teacher, "--bridge": cfg.bridge}
    models = {argument: model for argument, model in models.items() if model is not None}
    prompts = data.tokenize_prompts(tokenizer, problems, cfg)
    for argument, model in models.items():
        data.check_same_tokenizer(cfg.student, model, problems, cfg, ("--student", argument))
    for model in (cfg.student, *models.values()):
        check_checkpoint(model, data.vocab_size(tokenizer))
        check_lengths(cfg, model, prompts.values())
    check_engine(cfg, cfg.student)
    check_writable(cfg.out)
    return problems, tokenizer, prompts


def sample(
    cfg: Config, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, prompts: dict[str, list[int]]
) -> tuple[list[Rollout], list[Rollout], list[Rollout]]:
    """Graded: all answers of the student, those of them to show, and the bridged student's to the problems of these.

    Shown is one answer to a problem. Those whose mistakes are known come first, and then those that end wrong.
    """
    engine = make_engine(cfg, cfg.student, tokenizer, sleeps=False)
    with make_grader(cfg) as grader:

        def answers(problems: Sequence[Problem], count: int) -> list[Rollout]:
            sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
            rollouts = sample_rollouts(engine, problems, prompts, count, sampling, seed_key=(cfg.seed, "density"))
            grade(rollouts, grader)
            return [rollout for rollout in rollouts if rollout.response_ids]

        own, theirs = answers(problems, cfg.responses), []
        shown: dict[str, Rollout] = {}
        for rollout in sorted(own, key=lambda r: (not find_mistakes(r, tokenizer), why(r) != "wrong", r.sample)):
            shown.setdefault(rollout.problem.id, rollout)
        chosen = list(shown.values())[: cfg.problems]
        if cfg.bridge:
            engine.load(cfg.bridge, tokenizer)
            theirs = answers([rollout.problem for rollout in chosen], 1)
    return own, chosen, theirs


def main(cfg: Config) -> None:
    transformers.utils.logging.disable_progress_bar()  # otherwise each of the loaded models would draw one
    problems, tokenizer, prompts = prepare(cfg)
    own, chosen, theirs = sample(cfg, problems, tokenizer, prompts)

    # What the models say about every token.
    mistaken = [rollout for rollout in own if find_mistakes(rollout, tokenizer)]
    scored = chosen + mistaken
    by_student, by_raw = (score(model, scored, cfg, len(tokenizer)) for model in (cfg.student, cfg.raw_teacher))
    by_teacher = score(cfg.teacher, scored + theirs, cfg, len(tokenizer))
    rows = [
        (
            Shown("The student's answer, and its dense reward from the trained teacher", rollout, student, teacher),
            Shown("The same answer, and its dense reward from the raw teacher", rollout, student, raw),
        )
        for rollout, student, teacher, raw in zip(scored, by_student, by_teacher, by_raw)
    ]
    groups = {rollout.problem.id: list(pair) for rollout, pair in zip(chosen, rows)}
    for rollout, bridge, teacher in zip(
        theirs, score(cfg.bridge, theirs, cfg, len(tokenizer)) if theirs else [], by_teacher[len(scored) :]
    ):
        title = "The bridged student's own answer, and its dense reward from the trained teacher"
        groups[rollout.problem.id].append(Shown(title, rollout, bridge, teacher))

    # How often the dense reward finds a mistake, and the pictures.
    cases = [
        Case(rollout.problem.id, find_mistakes(rollout, tokenizer), (trained.rewards, raw.rewards))
        for rollout, (trained, raw) in zip(mistaken, rows[len(chosen) :])
    ]
    record = {"settings": {**dataclasses.asdict(cfg), "code": code_version()}, "mistakes": None}
    sentence = short = ""
    if cases:
        record["mistakes"] = compare(cases)
        sentence, short = in_words(record["mistakes"])
        print(sentence)
    out = Path(cfg.out)
    write_whole(out / "density.html", page(list(groups.values()), tokenizer, sentence))
    draw(list(groups.values()), tokenizer, short, out / "density.png")
    write_whole(out / "density.json", json.dumps(record) + "\n")
    print(f"wrote {out}: density.png, density.html and density.json")


if __name__ == "__main__":
    common.cli(main, Config)
