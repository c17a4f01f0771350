"""Responses that any model has written, as text: what SFT can learn from, whatever tokenizer that model had."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common import InputError, Problem, Rollout, map_over_ranks, print0
from lib.data import prompt_and_id


def learns_from_texts(cfg) -> bool:
    """Whether `--rollouts` of a Config names a file of texts, and not a directory, or nothing.

    Raises InputError unless there is one source of responses, and the loss can learn from it.
    """
    if not (cfg.rollouts or "").endswith(".jsonl"):
        if cfg.teacher is None:
            raise InputError("--teacher is missing; name a checkpoint, or with --loss sft a .jsonl file in --rollouts")
        return False
    if cfg.loss == "fkl":
        raise InputError(
            f"--loss fkl needs the teacher's distributions over its own tokens, and --rollouts {cfg.rollouts!r} holds "
            "texts; give --loss sft, or a directory"
        )
    if cfg.teacher is not None:
        raise InputError(
            f"--teacher {cfg.teacher!r} has no part in learning from the texts of --rollouts {cfg.rollouts!r}; leave one out"
        )
    if not Path(cfg.rollouts).is_file():
        raise InputError(f"--rollouts {cfg.rollouts!r} is not a file; check the path")
    return True


class Texts:
    """The .jsonl file of `--rollouts` (App. B): lines with a prompt, as in a data set, and a `response`.

    A problem may have several lines, wherever they stand. They are matched to `problems` by `problem_id`, and lines of
    other problems are left out, with a printed count. The file is read twice, because at the paper's scale its texts
    fill memory: once for the places of each problem's lines, and then line by line as `rollouts` needs them.

    Raises InputError for a line that is no response to a problem (with its number), or if no line belongs to any of the
    problems.
    """

    def __init__(
        self, cfg, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, prompts: dict[str, list[int]]
    ):
        self.path, self.max_response_tokens = cfg.rollouts, cfg.max_response_tokens
        self.tokenizer, self.prompts = tokenizer, prompts
        self.too_long = 0  # responses that `rollouts` has left out
        if tokenizer.eos_token_id is None:
            raise InputError(
                "--model has a tokenizer without an end-of-sequence token, so a text cannot be ended; set its eos_token"
            )
        self.places: dict[str, list[int]] = defaultdict(list)  # by problem id: where its lines begin, in bytes
        known, others = {problem.id for problem in problems}, 0
        for place, found in self._ids():
            if found in known:
                self.places[found].append(place)
            else:
                others += 1
        count = sum(map(len, self.places.values()))
        if not count:
            raise InputError(
                f"--rollouts {self.path!r}: none of its {others} lines is a response to one of the {len(problems)} training "
                "problems; check --data and --half, or name another file"
            )
        print0(
            f"{self.path}: {count} responses to {len(self.places)} of the {len(problems)} training problems; {others} to other "
            "problems are left out"
        )
        if others > 2 * count:  # with one half of the problems, texts for all of them leave out every second
            print0(f"Most lines of {self.path} match no training problem: are --data and --half those it was made for?")

    def _ids(self):
        """(place, problem id) of each line of the file, which must all be whole."""
        with Path(self.path).open("rb") as file:
            place = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                        (_, name), response = prompt_and_id(row), row.get("response")
                        if not isinstance(response, str) or not response.strip():
                            raise ValueError("no text in its response")
                        response.encode()  # raises for half of a surrogate pair, which no tokenizer takes
                    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
                        raise InputError(
                            f"line {number} of --rollouts {self.path!r} is not a response to a problem ({error}); each line "
                            "needs a prompt (prompt, problem or question) and a response"
                        ) from None
                    yield place, name
                place += len(line)

    def rollouts(self, problems: Sequence[Problem]) -> list[Rollout]:
        """The responses to some of the problems as rollouts, those of one problem together. Spread; collective.

        A response is tokenised as what follows the prompt, and ends with the end-of-sequence token. One that is longer
        than `max_response_tokens` is left out and counted: its beginning alone would teach the student to stop in the
        middle, or, without an end, not to stop at all. The sampler's log-probabilities are not known (nan).
        """
        found = map_over_ranks(self._read, problems)
        self.too_long += found.count(None)
        return [rollout for rollout in found if rollout is not None]

    def report_too_long(self) -> None:
        """Says how many responses `rollouts` has left out. InputError if these were all."""
        if self.too_long == sum(map(len, self.places.values())):
            raise InputError(
                f"--rollouts {self.path!r}: every response is longer than --max-response-tokens {self.max_response_tokens}; "
                "raise the limit"
            )
        if self.too_long:
            print0(
                f"{self.path}: left out responses longer than --max-response-tokens {self.max_response_tokens}: {self.too_long}"
            )

    def _read(self, problems: Sequence[Problem]) -> list[Rollout | None]:
        rollouts: list[Rollout | None] = []
        with Path(self.path).open("rb") as file:
            for problem in problems:
                for number, place in enumerate(self.places.get(problem.id, ())):
                    file.seek(place)
                    rollouts.append(self._rollout(problem, number, json.loads(file.readline())["response"]))
        return rollouts

    def _rollout(self, problem: Problem, number: int, response: str) -> Rollout | None:
        text = response.removesuffix(self.tokenizer.eos_token)
        # What looks like a special token in the text of another model is text, and must not end a turn here.
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids.append(self.tokenizer.eos_token_id)
        if len(ids) > self.max_response_tokens:
            return None
        return Rollout(problem, number, self.prompts[problem.id], ids, [math.nan] * len(ids), "stop", text)
