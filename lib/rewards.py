"""What responses are graded with: the verifier, or with `--reward FILE.py:function` a function of the user's own.

    def few_words(row: dict, response: str) -> float:
        return 1.0 if len(response.split()) <= 100 else 0.0

`row` is the problem's row in the data set and `response` the text that the model wrote, without its prompt. A value of
1 or more counts as a right answer wherever right answers are counted.

The function runs in the training process, with all that this process may do: it is as trusted as the stage itself. So
it should take no text of the model for code, and it should end soon, because nothing stops it. This file is the only
one that runs code from outside the project.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import math
import numbers
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from common import InputError, Problem, first_line
from lib.verifier import Verifier


def make_grader(cfg) -> Verifier | Reward:
    """What a Config grades with, for a `with` statement. InputError if the file of `--reward` cannot be used."""
    return Verifier() if cfg.reward is None else Reward(cfg.reward)


def reward_sha256(cfg) -> str | None:
    """The hash of the file of `--reward`, None for the verifier. InputError if there is no such file."""
    return None if cfg.reward is None else hashlib.sha256(_read(cfg.reward)[1]).hexdigest()


class Reward:
    """The function that `--reward` names, in the verifier's place."""

    def __init__(self, reward: str):
        self.name = f"--reward {reward!r}"
        path, content, function = _read(reward)
        self.path = str(path)
        spec = importlib.util.spec_from_loader("reward_of_the_user", _Source(self.path, content))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses, for one, look up the module of a class
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise InputError(f"{self.name} could not be loaded ({self._what_happened(error)}); mend the file") from None
        self.function = getattr(module, function, None)
        if not callable(self.function):
            raise InputError(f"{self.name}: the file defines no function {function!r}; name one that it defines")

    def check(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[float]:
        """The function's value for each response, in order; `problems[i]` is the problem of `responses[i]`.

        Raises InputError, naming the problem, if the function fails or does not return a finite number.
        """
        return [self._value(problem, response) for problem, response in zip(problems, responses, strict=True)]

    def _value(self, problem: Problem, response: str) -> float:
        try:
            value = self.function(dict(problem.row), response)  # a copy, so that no call can change what others get
            number = float(value) if isinstance(value, numbers.Real) else math.nan
        except (Exception, SystemExit) as error:
            raise InputError(
                f"{self.name} failed on a response to problem {problem.id} ({self._what_happened(error)}); mend the function"
            ) from None
        if not math.isfinite(number):
            raise InputError(
                f"{self.name} returned {value!r:.40} for a response to problem {problem.id}; it must return a finite number"
            )
        return number

    def _what_happened(self, error: BaseException) -> str:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.path]
        return f"{type(error).__name__}{f' in line {lines[-1]}' if lines else ''}: {first_line(error)}"

    def __enter__(self) -> Reward:
        return self

    def __exit__(self, *exc) -> None:
        """There is nothing to close."""


class _Source(importlib.abc.SourceLoader):
    """Runs the very bytes that were read and hashed, and leaves no compiled copy beside the file."""

    def __init__(self, path: str, content: bytes):
        self.path, self.content = path, content

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return self.content


def _read(reward: str) -> tuple[Path, bytes, str]:
    """The path and the content of the file that `--reward` names, and the name of the function in it."""
    path, _, function = reward.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise InputError(
            f"--reward {reward!r} does not have the form FILE.py:function; give a Python file and a function in it"
        )
    try:
        return Path(path), Path(path).read_bytes(), function
    except OSError as error:
        raise InputError(f"--reward {reward!r}: the file cannot be read ({error.strerror}); check the path") from None
