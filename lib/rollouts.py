"""Rollouts: sampled with an engine or read from texts, and cached in a directory (Stage 2a's teacher rollouts)."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common import InputError, Problem, Rollout, map_over_ranks, on_rank_0, print0, request_seed
from lib.data import prompt_and_id, vocab_size
from lib.engines import Completion, Sampling, TorchEngine, VLLMEngine
from lib.files import locked, whole
from lib.rewards import Reward, grade
from lib.verifier import Verifier


def sample_rollouts(
    engine: TorchEngine | VLLMEngine,
    problems: Sequence[Problem],
    prompts: dict[str, list[int]],
    n: int,
    sampling: Sampling,
    seed_key: Sequence[int | str],
) -> list[Rollout]:
    """`n` rollouts of each problem, grouped by problem. `prompts` are token ids by problem id. Collective.

    A response's seed is made from `seed_key`, its problem and its number, so responses depend neither on the batch they
    are computed in nor on the number of ranks (on a GPU, up to rounding, which depends on the batch). The number is the
    index in the group; a problem that appears twice in `problems` gets new numbers, hence new seeds. The work is split
    between ranks by responses, not by problems, so that even a few problems keep all ranks busy. Every rank gets all
    rollouts.
    """

    def sample(requests: Sequence[tuple[Problem, int]]) -> list[Rollout]:
        # The engine prefills a prompt once for all its responses, so this rank's requests are grouped by prompt again.
        groups = [list(group) for _, group in itertools.groupby(requests, key=lambda r: (r[0].id, r[1] // n))]
        ids = [prompts[group[0][0].id] for group in groups]
        seeds = [[request_seed(*seed_key, problem.id, number) for problem, number in group] for group in groups]
        size = vocab_size(engine.tokenizer)
        completions = [known_tokens(c, size) for group in engine.generate(ids, seeds, sampling) for c in group]
        texts = engine.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        return [
            Rollout(problem, number % n, prompts[problem.id], c.token_ids, c.logprobs, c.finish_reason, text)
            for (problem, number), c, text in zip(requests, completions, texts)
        ]

    numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)  # numbers each problem's responses in this batch
    requests = [(problem, next(numbers[problem.id])) for problem in problems for _ in range(n)]
    return map_over_ranks(sample, requests, engine.tensor_parallel)


def known_tokens(completion: Completion, vocab_size: int) -> Completion:
    """Cuts the completion before the first token that the tokenizer does not know, as if at the length limit.

    Output matrices have more rows than the tokenizer has tokens, and on rare occasions an extra row is sampled.
    """
    ids = completion.token_ids
    end = next((number for number, token in enumerate(ids) if token >= vocab_size), None)
    return completion if end is None else Completion(ids[:end], completion.logprobs[:end], "length")


# The cache


@contextmanager
def open_cache(
    directory: Path, identity: dict, problems: Sequence[Problem], prompts: dict[str, list[int]]
) -> Iterator[RolloutCache]:
    """Opens the RolloutCache in `directory`; another run that opens it waits until the block ends. Collective.

    Without this lock two runs would sample the same problems and store each response twice. `identity` holds everything
    that determines the rollouts, as JSON values. InputError if the directory holds rollouts of another identity, or
    other files.
    """

    def claim() -> None:
        path, named = directory / "identity.json", f"--rollouts {str(directory)!r} holds"
        if not path.exists():
            if {other.name for other in directory.iterdir()} - {"lock", "identity.json.tmp"}:
                raise InputError(f"{named} something other than rollouts; name another directory")
            with whole(path) as unfinished:
                unfinished.write_text(json.dumps(identity), encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if found.get(name) != value:
                differ = f"with {name} = {found.get(name)!r}, and this run needs {value!r}"
                raise InputError(f"{named} other rollouts ({differ}); name another directory")

    with locked(directory, f"waiting for another run to fill {directory}", wait=True):
        on_rank_0(claim)
        yield RolloutCache(directory, problems, prompts)


class RolloutCache:
    """Graded rollouts in a directory, read from disk on demand, because at the paper's scale they would fill memory.

    Each `shard-NNNNNN.jsonl` has one rollout per line and is written atomically, so an interrupted run continues with
    the missing problems. A shard holds all rollouts of some problems. Its number is the index of its first problem in
    `problems`, hence unique whatever the order in which problems are sampled. Rank 0 writes, all ranks read.

    Rollouts are numbered from 0 over all shards. `rows` maps a problem id to the numbers of its rollouts, and has no
    entry for a missing problem. `right[i]` says whether rollout i is correct and not truncated. `tokens` is the total
    length of all responses.
    """

    def __init__(self, directory: Path, problems: Sequence[Problem], prompts: dict[str, list[int]]):
        self.directory, self.prompts = directory, prompts
        self.problems = {problem.id: problem for problem in problems}
        self.rows: dict[str, list[int]] = {}
        self.right: list[bool] = []
        self.tokens = 0
        self._places: list[tuple[Path, int]] = []  # for each rollout, its shard and the byte at which its line begins
        for path in sorted(directory.glob("shard-??????.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        start = 0
        with path.open("rb") as file:
            for line in file:
                # The entries kept in memory come first in a line, so that its long remainder need not be parsed.
                row = json.loads(line.partition(b', "response_ids"')[0] + b"}")
                self.rows.setdefault(row["id"], []).append(len(self))
                self.right.append(row["correct"] and row["finish_reason"] == "stop")
                self.tokens += row["tokens"]
                self._places.append((path, start))
                start += len(line)

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Writes a shard with all rollouts of some missing problems. Collective."""
        number = list(self.problems).index(rollouts[0].problem.id)
        path = self.directory / f"shard-{number:06d}.jsonl"

        def write() -> None:
            with whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
                for r in rollouts:
                    row = {"id": r.problem.id, "sample": r.sample, "correct": r.correct, "finish_reason": r.finish_reason,
                           "tokens": len(r.response_ids), "response_ids": r.response_ids, "logprobs": r.logprobs,
                           "text": r.text}  # fmt: skip
                    file.write(json.dumps(row) + "\n")  # floats keep all digits, and nan stays nan

        on_rank_0(write)
        self._read(path)

    def __getitem__(self, index: int) -> Rollout:
        path, start = self._places[index]
        with path.open("rb") as file:
            file.seek(start)
            row = json.loads(file.readline())
        problem = self.problems[row["id"]]
        return Rollout(problem, row["sample"], self.prompts[row["id"]], row["response_ids"], row["logprobs"],
                       row["finish_reason"], row["text"], row["correct"])  # fmt: skip

    def __len__(self) -> int:
        return len(self.right)


# Texts: responses written by any model, with any tokenizer

PROBLEMS_AT_A_TIME = 128  # their responses are graded together and become one shard


def read_texts(
    path: str,
    cache: RolloutCache,
    tokenizer: PreTrainedTokenizerBase,
    max_response_tokens: int,
    grader: Verifier | Reward,
) -> None:
    """Grades the responses in a .jsonl file and adds them to the cache (App. B), except for problems that it already has.

    A line has a prompt, as in a data set, and a `response`; or `messages`, whose last assistant turn is the response. A
    response is tokenized without special tokens, and the end-of-sequence token is appended. A response longer than
    `max_response_tokens` is skipped, because a truncated one would teach the student to stop midway. Responses to other
    problems and malformed lines are skipped too; one printed sentence gives the counts. The sampler's log-probabilities
    are unknown (nan). Collective. Raises InputError if no line is left.
    """
    texts: dict[str, list[tuple[int, str]]] = defaultdict(list)  # line number and response, by problem id
    unreadable = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    name, text = _response_in(json.loads(line))
                    texts[name].append((number, text.removesuffix(tokenizer.eos_token)))
            except Exception as error:  # a malformed line may raise anything
                unreadable.append(f"line {number}: {error}")

    def tokenised(responses: Sequence[tuple[Problem, int, str]]) -> list[list[int]]:
        # If another model's text spells out a special token, it is plain text here, and must not end the turn.
        plain = [text for _, _, text in responses]
        encoded = tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"] if plain else []
        return [[*ids, tokenizer.eos_token_id] for ids in encoded]

    missing = [problem for name, problem in cache.problems.items() if name in texts and name not in cache.rows]
    for start in range(0, len(missing), PROBLEMS_AT_A_TIME):
        part = missing[start : start + PROBLEMS_AT_A_TIME]
        responses = [(problem, number, text) for problem in part for number, text in texts[problem.id]]
        rollouts = [
            Rollout(problem, number, cache.prompts[problem.id], ids, [math.nan] * len(ids), "stop", text)
            for (problem, number, text), ids in zip(responses, map_over_ranks(tokenised, responses))
            if len(ids) <= max_response_tokens
        ]
        if rollouts:
            grade(rollouts, grader)
            cache.append(rollouts)
    known = sum(len(found) for name, found in texts.items() if name in cache.problems)
    said = (
        f"{path}: {len(cache)} responses to {len(cache.rows)} of the {len(cache.problems)} training problems; left out are "
        f"{sum(map(len, texts.values())) - known} to other problems, {known - len(cache)} longer than "
        f"--max-response-tokens {max_response_tokens}, and {len(unreadable)} lines without a prompt and a response"
        + (f" (the first is {unreadable[0]})" if unreadable else "")
    )
    if not len(cache):
        raise InputError(f"--rollouts {said}; check the file, --data and --half")
    print0(said)


def _response_in(row: dict) -> tuple[str, str]:
    """A line's problem id and response text. Raises some exception if the line lacks a prompt or a response."""
    if isinstance(row, dict) and "messages" in row and "response" not in row:
        turns = row["messages"]
        last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        row = {"prompt": turns[:last], "response": turns[last]["content"]}
    (_, name), response = prompt_and_id(row), row.get("response")
    if not isinstance(response, str) or not response.strip():
        raise ValueError("no text in its response")
    response.encode()  # raises for a lone surrogate, which no tokenizer accepts
    return name, response
