"""avg@k ± standard error over problems (App. F), pass@k, paired differences; the files that keep an evaluation's samples;
and the validation while a stage trains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common import InputError, Problem, Rollout, SamplerConfig, TrainingConfig, on_rank_0, print0, rank
from lib import verifier
from lib.data import tokenize_prompts
from lib.engines import Sampling, TorchEngine, VLLMEngine, check_lengths
from lib.files import file_sha256, json_lines, whole
from lib.policy import Policy
from lib.rewards import Reward, grade, reward_sha256
from lib.rollouts import sample_rollouts
from lib.verifier import Verifier


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of (P,) values ± its standard error (SE), which is nan for a single value."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


def summarise(samples: Sequence[dict], k: int) -> dict:
    """Statistics of one data set from its P*k samples (`as_sample`), among them avg@k ± SE (avg@16 in the paper).

    Rates are in [0, 1], lengths in tokens, scores by problem id. A sample's score is its `reward` if it has one, which
    may be any number, and otherwise 1 if it is correct, else 0.
    """
    ids = list(dict.fromkeys(sample["id"] for sample in samples))
    row = {problem_id: index for index, problem_id in enumerate(ids)}
    correct, scores = np.zeros((2, len(ids), k))  # (P, k) each
    for sample in samples:
        place = row[sample["id"]], sample["sample"]
        correct[place] = sample["correct"]
        scores[place] = sample["correct"] if sample.get("reward") is None else sample["reward"]
    average, error = mean_and_error(scores.mean(axis=1))
    return {
        "problems": len(ids),
        "avg": average,
        "se": error,
        "pass": float(correct.any(axis=1).mean()),
        "truncated": float(np.mean([sample["finish_reason"] == "length" for sample in samples])),
        "verifier_failed": float(np.mean([sample.get("how") in ("timeout", "error") for sample in samples])),
        "tokens": float(np.mean([sample["tokens"] for sample in samples])),
        "scores": dict(zip(ids, scores.mean(axis=1).tolist())),
    }


def paired_difference(first: dict[str, float], second: dict[str, float]) -> tuple[float, float]:
    """Mean of first - second over the problems (scores by problem id) ± the standard error (SE) of that mean."""
    if first.keys() != second.keys():
        raise InputError("two checkpoints were evaluated on different problems; evaluate both again on the same ones")
    return mean_and_error(np.array([first[problem_id] - second[problem_id] for problem_id in first]))


# Samples on disk


def sha256(value: object) -> str:
    """The hash of a value written as JSON."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def grader_sha256(cfg, problems: Sequence[Problem]) -> str:
    """The hash of the grader: the verifier's sources and the versions of the packages behind it; or the file of
    `--reward` and the rows of the data set, which that function may read.
    """
    if cfg.reward:
        return sha256([cfg.reward, reward_sha256(cfg), [problem.row for problem in problems]])
    sources = [file_sha256(Path(verifier.__file__).with_name(name)) for name in ("verifier.py", "verifier_worker.py")]
    return sha256([*sources, *map(metadata.version, ("math-verify", "latex2sympy2-extended", "sympy"))])


def as_sample(rollout: Rollout) -> dict:
    """A graded rollout as one line of a sample file."""
    return {
        "id": rollout.problem.id, "sample": rollout.sample, "prompt": rollout.problem.prompt,
        "answer": rollout.problem.answer, "response": rollout.text, "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.response_ids), "correct": rollout.correct, "how": rollout.how, "reward": rollout.reward,
    }  # fmt: skip


class SampleFile:
    """One checkpoint's graded samples on one data set: DIRECTORY/NAME-HASH.jsonl, with one sample a line.

    HASH is that of `settings`, everything that decides the samples, which the first line holds. Samples of other settings
    are therefore never overwritten. Lines are only appended, so a process that is killed loses at most the part that it
    was sampling, and the same evaluation continues from the file.

    Each line carries `grader`, its grader's hash. `grade_again` grades the samples that another grader has graded, or that
    were graded against another answer, so that they need not be sampled again.

    Rank 0 reads and writes; the methods are collective.
    """

    def __init__(self, directory: Path, name: str, settings: dict, problems: Sequence[Problem], k: int, grader: str):
        self.path = directory / f"{name}-{sha256(settings)[:8]}.jsonl"
        self.settings, self.problems, self.k = settings, {problem.id: problem for problem in problems}, k
        self.grader = grader
        self.samples: dict[tuple[str, int], dict] = {}  # by problem id and number; on rank 0 only
        self.missing: list[Problem] = [self.problems[name] for name in on_rank_0(self._open)]

    def _open(self) -> list[str]:
        """Reads the samples of the problems that have all `k` of them; returns the ids of the other problems."""
        found = {(line["id"], line["sample"]): line for line in json_lines(self.path) if "sample" in line}
        missing = [name for name in self.problems if any((name, n) not in found for n in range(self.k))]
        kept = [(name, n) for name in self.problems if name not in missing for n in range(self.k)]
        self.samples = {key: found[key] for key in kept}
        if not self.path.exists() or not self.path.read_bytes().endswith(b"\n"):  # a kill has cut the last line
            self._rewrite()
        return missing

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Keeps all `k` graded rollouts of some missing problems."""
        samples = self._keep(rollouts)

        def write() -> None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in samples)

        on_rank_0(write)

    def _keep(self, rollouts: Sequence[Rollout]) -> list[dict]:
        samples = [as_sample(rollout) | {"grader": self.grader} for rollout in rollouts]
        self.samples |= {(sample["id"], sample["sample"]): sample for sample in samples if rank() == 0}
        return samples

    def grade_again(self, grader: Verifier | Reward) -> None:
        """Grades the samples whose grader or right answer was another one, and says how many verdicts changed."""
        rollouts = on_rank_0(
            lambda: [
                # The number of tokens is all that a grader may ask about them.
                Rollout(problem, line["sample"], [], [0] * line["tokens"], [], line["finish_reason"], line["response"],
                        correct=line["correct"])
                for line in self.samples.values()
                if (problem := self.problems[line["id"]]).answer != line["answer"] or line["grader"] != self.grader
            ]
        )  # fmt: skip
        if not rollouts:
            return
        before = [rollout.correct for rollout in rollouts]
        grade(rollouts, grader)
        changed = sum(rollout.correct != verdict for rollout, verdict in zip(rollouts, before))
        self._keep(rollouts)
        on_rank_0(self._rewrite)
        print0(f"{self.path}: {len(rollouts)} samples graded again, because the grading has changed; {changed} differ")

    def _rewrite(self) -> None:
        with whole(self.path) as unfinished:
            lines = [{"settings": self.settings}, *self.samples.values()]
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def in_order(self) -> list[dict]:
        """All samples in the order of the problems; on rank 0 only."""
        return [self.samples[name, number] for name in self.problems for number in range(self.k)]


# Validation


TokenizedSets = dict[str, tuple[list[Problem], dict[str, list[int]]]]


def tokenize_sets(
    sets: dict[str, list[Problem]], tokenizer: PreTrainedTokenizerBase, cfg: SamplerConfig, model: str
) -> TokenizedSets:
    """Adds to the problems of each set their prompts' token ids by problem id.

    InputError for a prompt that is too long for `cfg`, or with its response for checkpoint `model`.
    """
    tokenized = {}
    for name, problems in sets.items():
        tokenized[name] = problems, tokenize_prompts(tokenizer, problems, cfg)
        check_lengths(cfg, model, tokenized[name][1].values())
    return tokenized


class Validation:
    """avg@k on the sets of `--validate` while a stage trains (Table 8). Without any it does nothing.

    `engine` samples the responses, with the decoding that evaluate.py has by default, and `run`, the stage's
    lib.runs.Run, logs the scores. Successive validations use the same random numbers, so that less of the difference
    between two of them is chance.
    """

    def __init__(
        self, cfg: TrainingConfig, sets: TokenizedSets, engine: TorchEngine | VLLMEngine | None,
        grader: Verifier | Reward, run,
    ):  # fmt: skip
        self.cfg, self.sets, self.engine, self.grader, self.run = cfg, sets, engine, grader, run
        self.sampling = Sampling(cfg.max_response_tokens, temperature=0.7, top_p=0.8, top_k=20)

    def score(self, steps: int, policy: Policy) -> None:
        """Measures and logs the policy's scores if they are due: every `validate_every` steps, and after the last one.

        `steps` counts the finished steps. Collective.
        """
        if not self.sets or (steps % self.cfg.validate_every and steps != self.run.total_steps):
            return
        scores = {}
        with self.run.phase("validation"):
            self.engine.sync(policy)
            for name, (problems, prompts) in self.sets.items():
                rollouts = sample_rollouts(
                    self.engine, problems, prompts, self.cfg.validate_k, self.sampling, (self.cfg.seed, "validate")
                )
                grade(rollouts, self.grader)
                scores[name] = summarise([as_sample(rollout) for rollout in rollouts], self.cfg.validate_k)
            self.engine.sleep()
        self.run.log_validation(steps, scores)
