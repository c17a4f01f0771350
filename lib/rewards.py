"""What grades responses: the verifier, or with `--reward FILE.py:function` a function of the user's own.

    def few_words(row, response):
        return 1.0 if len(response.split()) <= 100 else 0.0

    def right_and_short(row, response, correct, tokens, finish_reason):
        return -1.0 if finish_reason == "length" else correct - 0.001 * tokens

`row` is the problem's row in the data set, and `response` the text that the model wrote, without its prompt. After these
two a function may ask for any of three more by name: `correct` is the verifier's verdict, which is computed only then;
`tokens` is the length of the response; `finish_reason` is "stop", or "length" if the response was cut at the length
limit.

The value is used unchanged in training, validation and evaluation, also that of a cut response, because 0 may be a good
reward on the function's own scale. Where right answers are counted, the verifier's verdict counts if the function asks
for it, otherwise a value of 1 or more.

The function runs in the training process with all rights of that process, and nothing stops it. It should not execute
what a model wrote, and it should return soon. This file is the only one that runs code from outside the project.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from common import InputError, Rollout, map_over_ranks
from lib.files import file_sha256
from lib.verifier import Verdict, Verifier


def make_grader(cfg) -> Verifier | Reward:
    """What a Config grades with, for a `with` statement."""
    return Verifier() if cfg.reward is None else Reward(cfg.reward)


def grade(rollouts: Sequence[Rollout], grader: Verifier | Reward) -> None:
    """Sets `correct` and `how` of every rollout, and `reward` if the grader is a Reward. Collective; work is spread."""

    def graded(share: Sequence[Rollout]) -> list[tuple[bool, str, float | None]]:
        if isinstance(grader, Reward):
            return grader.check(share)
        verdicts = grader.check([rollout.text for rollout in share], [rollout.problem.answer for rollout in share])
        return [(verdict.correct, verdict.how, None) for verdict in verdicts]

    # One rank grades a response and sends the verdict to all. If every rank graded all of them, a time-out on one rank
    # alone would make the ranks disagree.
    for rollout, grading in zip(rollouts, map_over_ranks(graded, rollouts), strict=True):
        rollout.correct, rollout.how, rollout.reward = grading


def reward_sha256(cfg) -> str | None:
    """The hash of the file of `--reward`, None for the verifier."""
    return None if cfg.reward is None else file_sha256(_file_of(cfg.reward))


def _file_of(reward: str) -> Path:
    path, _, function = reward.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier() or not Path(path).is_file():
        raise InputError(f"--reward {reward!r} is not FILE.py:function with a file that exists; check the path")
    return Path(path)


class Reward:
    """The function that `--reward` names."""

    def __init__(self, reward: str):
        self.name = reward
        spec = importlib.util.spec_from_file_location("reward_of_the_user", _file_of(reward))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses, for one, look up the module of a class
        spec.loader.exec_module(module)
        self.function = getattr(module, reward.rpartition(":")[2])
        self.asked = list(inspect.signature(self.function).parameters)[2:]
        self.verifier = Verifier() if "correct" in self.asked else None

    def check(self, rollouts: Sequence[Rollout]) -> list[tuple[bool, str, float]]:
        """`correct`, `how` and `reward` of each rollout.

        The function's own exceptions pass through, with a note that names the problem. Raises ValueError if it returns
        a number that is not finite.
        """
        verdicts: Sequence[Verdict | None] = [None] * len(rollouts)
        if self.verifier:
            verdicts = self.verifier.check([r.text for r in rollouts], [r.problem.answer for r in rollouts])
        found = []
        for rollout, verdict in zip(rollouts, verdicts):
            offered = {"tokens": len(rollout.response_ids), "finish_reason": rollout.finish_reason}
            offered["correct"] = verdict and verdict.correct
            asked = {name: offered[name] for name in self.asked if name in offered}
            try:
                value = float(self.function(dict(rollout.problem.row), rollout.text, **asked))  # it may change its copy
                if not math.isfinite(value):
                    raise ValueError(f"the reward is {value}, and has to be a finite number")
            except Exception as error:
                error.add_note(f"--reward {self.name} failed on a response to problem {rollout.problem.id}")
                raise
            found.append((verdict.correct, verdict.how, value) if verdict else (value >= 1, "reward", value))
        return found

    def __enter__(self) -> Reward:
        return self

    def __exit__(self, *exc) -> None:
        if self.verifier:
            self.verifier.__exit__(*exc)
