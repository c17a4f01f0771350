"""Rollouts: sampled with an engine, graded by the verifier, and kept in a directory (Stage 2a's teacher rollouts)."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import InputError, Problem, Rollout, barrier, map_over_ranks, on_rank_0, request_seed
from lib.data import vocab_size
from lib.engines import Completion, Sampling, TorchEngine, VLLMEngine
from lib.rewards import Reward
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

    The seed of each response is made from `seed_key`, its problem and its number, so that responses depend neither on
    the batch they are computed in nor on the number of ranks (on a GPU up to rounding, which does depend on the batch).
    The number is the index in the group. If a problem occurs again among `problems`, its numbers go on where they
    stopped, because the same numbers would give the same responses again. Responses are spread over ranks one by one
    and not by groups, so that a few problems keep all ranks busy. Every rank gets all rollouts, and training then
    balances them over ranks by their lengths.
    """

    def sample(requests: Sequence[tuple[Problem, int]]) -> list[Rollout]:
        # The engine computes a prompt once for all its responses, so this rank's share is put into groups again.
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

    numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)  # of the problem's responses in this batch
    requests = [(problem, next(numbers[problem.id])) for problem in problems for _ in range(n)]
    return map_over_ranks(sample, requests, engine.tensor_parallel)


def known_tokens(completion: Completion, vocab_size: int) -> Completion:
    """The completion up to the first token that the tokenizer does not have, as if the length limit had cut it there.

    Output matrices are padded to more rows than there are tokens, and a row of the padding may be sampled, if seldom.
    """
    ids = completion.token_ids
    end = next((number for number, token in enumerate(ids) if token >= vocab_size), None)
    return completion if end is None else Completion(ids[:end], completion.logprobs[:end], "length")


def grade(rollouts: Sequence[Rollout], grader: Verifier | Reward) -> None:
    """Grades every rollout: sets `correct` and `how`, and `reward` if the grader is one. Spread over ranks; collective.

    Raises InputError on every rank if the user's own reward fails on one.
    """

    def verdicts(share: Sequence[Rollout]) -> list[tuple[bool, str, float | None] | InputError]:
        texts, problems = [rollout.text for rollout in share], [rollout.problem for rollout in share]
        if isinstance(grader, Verifier):
            found = grader.check(texts, [problem.answer for problem in problems])
            return [(verdict.correct, verdict.how, None) for verdict in found]
        try:
            return [(value >= 1, "reward", value) for value in grader.check(texts, problems)]
        except InputError as error:  # the other ranks wait for this one's verdicts, so they get to know it as one
            return [error]

    # Each response is graded by one rank, and the verdict sent to all. If every rank graded all of them, a grading
    # might time out on one rank and not on another, and the ranks would disagree.
    found = map_over_ranks(verdicts, rollouts)
    failed = next((verdict for verdict in found if isinstance(verdict, InputError)), None)
    if failed is not None:
        raise failed
    for rollout, (correct, how, reward) in zip(rollouts, found):
        rollout.correct, rollout.how, rollout.reward = correct, how, reward


class RolloutCache:
    """Graded rollouts in a directory, read from disk as they are needed, because at the paper's scale they fill memory.

    `identity.json` says what they are (teacher, problems, sampling), and a run that needs others is refused. Every
    `shard-NNNNNN` is a data set with all rollouts of some problems, in the order in which they were appended. Its number
    is the place of its first problem among `problems`: a problem is in one shard only, so no other shard has that number,
    whichever problems a run needs and in whichever order. It is written whole and then renamed, so an interrupted run
    goes on with the problems that are missing. Rank 0 writes, all ranks read.

    Rows are numbered 0 to `len` - 1 over all shards. `rows` has the numbers of each problem's rows by its id, and no
    entry for a problem that is missing. `correct` says of each row whether the response is right. `per_problem` is the
    number of responses that every problem has, None if they differ.
    """

    def __init__(
        self,
        directory: Path,
        identity: dict,
        problems: Sequence[Problem],
        prompts: dict[str, list[int]],
        per_problem: int | None,
    ):
        self.directory, self.prompts, self.per_problem = directory, prompts, per_problem
        self.identity = json.loads(json.dumps(identity))  # as the file will give it
        self.problems = {problem.id: problem for problem in problems}
        on_rank_0(self._open)
        self._read()

    def _open(self) -> None:
        path = self.directory / "identity.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not path.exists() and not any(self.directory.iterdir()):
                path.with_suffix(".tmp").write_text(json.dumps(self.identity), encoding="utf-8")
                path.with_suffix(".tmp").rename(path)
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except OSError as error:
            raise InputError(
                f"--rollouts {str(self.directory)!r} cannot be written ({error.strerror}); name another directory"
            ) from None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(
                f"--rollouts {str(self.directory)!r} is not empty and has no identity.json that can be read; name another "
                "directory"
            )
        for name, value in self.identity.items():
            if found.get(name) != value:
                raise InputError(
                    f"--rollouts {str(self.directory)!r} holds other rollouts (with {name} = {found.get(name)!r}, and this "
                    f"run needs {value!r}); name another directory"
                )

    def _read(self) -> None:
        """Opens all shards. Collective."""
        import datasets  # importing it takes a second
        from pyarrow import compute

        barrier()  # wait until rank 0 has written its shards
        parts = []
        for path in sorted(self.directory.glob("shard-??????")):
            try:
                parts.append(datasets.load_from_disk(str(path)))
                ids = parts[-1]["id"]
                if not set(ids) <= self.problems.keys() or len(ids) % (self.per_problem or 1):
                    raise ValueError
            except Exception:  # what is raised depends on which of the shard's files is damaged, and how
                raise InputError(f"{path} is damaged; delete it, and its rollouts will be sampled again") from None
        self._rows = datasets.concatenate_datasets(parts) if parts else []
        self.correct: list[bool] = list(self._rows["correct"]) if parts else []
        lengths = compute.list_value_length(self._rows.data["response_ids"]) if parts else []
        self.tokens = compute.sum(lengths).as_py() if parts else 0  # of all responses
        self.rows: dict[str, list[int]] = {}
        for number, problem in enumerate(self._rows["id"] if parts else ()):
            self.rows.setdefault(problem, []).append(number)

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Writes a shard with all rollouts of some missing problems. Collective; InputError if it cannot be written."""
        if rollouts:
            on_rank_0(lambda: self._write(rollouts))
            self._read()

    def _write(self, rollouts: Sequence[Rollout]) -> None:
        import datasets

        rows = [
            {"id": r.problem.id, "sample": r.sample, "correct": r.correct, "finish_reason": r.finish_reason,
             "response_ids": r.response_ids, "logprobs": r.logprobs, "text": r.text}
            for r in rollouts
        ]  # fmt: skip
        number = list(self.problems).index(rollouts[0].problem.id)
        shard = self.directory / f"shard-{number:06d}"
        unfinished = shard.with_suffix(".tmp")
        datasets.disable_progress_bars()
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            datasets.Dataset.from_list(rows).save_to_disk(str(unfinished))
            unfinished.rename(shard)
        except OSError as error:
            raise InputError(
                f"the teacher's rollouts could not be written to {self.directory} ({error.strerror or error}); make room, "
                "then --resume: the shards that are written are kept"
            ) from None

    def __getitem__(self, index: int) -> Rollout:
        row = self._rows[index]
        problem = self.problems[row["id"]]
        return Rollout(problem, row["sample"], self.prompts[row["id"]], row["response_ids"], row["logprobs"],
                       row["finish_reason"], row["text"], row["correct"])  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)
