"""Scores: avg@k ± standard error over problems (App. F), pass@k, paired differences, the files that hold an evaluation's
samples, and validation during training.
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
from lib.files import as_json_lines, file_sha256, json_lines, whole
from lib.policy import Policy
from lib.rewards import Reward, grade, reward_sha256
from lib.rollouts import sample_rollouts
from lib.verifier import Verifier


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of (P,) values and its standard error (SE), which is nan for a single value."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


def summarise(samples: Sequence[dict], k: int) -> dict:
    """Statistics of one data set from its P*k samples (`as_sample`), including avg@k and its SE (avg@16 in the paper).

    Rates are in [0, 1], lengths in tokens, scores by problem id. A sample's score is its `reward` (any number) if it has
    one, otherwise 1 if it is correct and 0 if not.
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
    """Mean of first - second over the problems (scores by problem id), and the standard error (SE) of that mean."""
    if first.keys() != second.keys():
        raise InputError("two checkpoints were evaluated on different problems; evaluate both again on the same ones")
    return mean_and_error(np.array([first[problem_id] - second[problem_id] for problem_id in first]))


# Samples on disk


def sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def grader_sha256(cfg, problems: Sequence[Problem]) -> str:
    """Hash of the grader: the verifier's sources and package versions, or the `--reward` file and the data set's rows,
    which the reward function may read.
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
    """One checkpoint's graded samples on one data set: DIRECTORY/NAME-HASH.jsonl, with one sample per line.

    HASH is the hash of `settings`, which determine the samples and are stored in the first line. So samples of other
    settings are never overwritten. Lines are appended, so a killed process loses at most the batch that it was sampling,
    and the same evaluation continues from the file.

    Each line stores the hash of its grader. `grade_again` regrades samples from another grader, or graded against another
    answer, without sampling them again. Rank 0 reads and writes; the methods are collective.
    """

    def __init__(self, directory: Path, name: str, settings: dict, problems: Sequence[Problem], k: int, grader: str):
        self.path = directory / f"{name}-{sha256(settings)[:8]}.jsonl"
        self.settings, self.problems, self.k = settings, {problem.id: problem for problem in problems}, k
        self.grader = grader
        self.samples: dict[tuple[str, int], dict] = {}  # by problem id and sample number; on rank 0 only
        self.missing: list[Problem] = [self.problems[name] for name in on_rank_0(self._open)]

    def _open(self) -> list[str]:
        """Reads the samples of every problem that has all `k`; returns the ids of the other problems."""
        found = {(line["id"], line["sample"]): line for line in json_lines(self.path) if "sample" in line}
        missing = [name for name in self.problems if any((name, n) not in found for n in range(self.k))]
        kept = [(name, n) for name in self.problems if name not in missing for n in range(self.k)]
        self.samples = {key: found[key] for key in kept}
        # The file is written anew if there is none yet, or if a kill has truncated its last line.
        if not self.path.exists() or not self.path.read_bytes().endswith(b"\n"):
            self._rewrite()
        return missing

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Adds all `k` graded rollouts of some missing problems."""
        samples = self._keep(rollouts)

        def write() -> None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(as_json_lines(samples))

        on_rank_0(write)

    def _keep(self, rollouts: Sequence[Rollout]) -> list[dict]:
        samples = [as_sample(rollout) | {"grader": self.grader} for rollout in rollouts]
        self.samples |= {(sample["id"], sample["sample"]): sample for sample in samples if rank() == 0}
        return samples

    def grade_again(self, grader: Verifier | Reward) -> None:
        """Regrades samples whose grader or right answer has changed, and prints how many verdicts changed."""
        rollouts = on_rank_0(
            lambda: [
                # A grader may only ask for the number of tokens, so zeros stand for their ids.
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
        print0(
            f"{self.path}: {len(rollouts)} samples regraded because the grading has changed; {changed} verdicts differ"
        )

    def _rewrite(self) -> None:
        with whole(self.path) as unfinished:
            unfinished.write_text(
                as_json_lines([{"settings": self.settings}, *self.samples.values()]), encoding="utf-8"
            )

    def in_order(self) -> list[dict]:
        """All samples in the order of the problems; on rank 0 only."""
        return [self.samples[name, number] for name in self.problems for number in range(self.k)]


# Validation


TokenizedSets = dict[str, tuple[list[Problem], dict[str, list[int]]]]


def tokenize_sets(
    sets: dict[str, list[Problem]], tokenizer: PreTrainedTokenizerBase, cfg: SamplerConfig, model: str
) -> TokenizedSets:
    """Pairs each set's problems with their prompts' token ids by problem id.

    InputError if a prompt exceeds the limit of `cfg`, or with its response the positions of checkpoint `model`.
    """
    tokenized = {}
    for name, problems in sets.items():
        tokenized[name] = problems, tokenize_prompts(tokenizer, problems, cfg)
        check_lengths(cfg, model, tokenized[name][1].values())
    return tokenized


class Validation:
    """avg@k on the sets of `--validate` during training (Table 8); does nothing without any.

    `engine` samples the responses with evaluate.py's default decoding, and `run`, the stage's lib.runs.Run, logs the
    scores. All validations use the same seeds, which makes the differences between them less noisy.
    """

    def __init__(
        self, cfg: TrainingConfig, sets: TokenizedSets, engine: TorchEngine | VLLMEngine | None,
        grader: Verifier | Reward, run,
    ):  # fmt: skip
        self.cfg, self.sets, self.engine, self.grader, self.run = cfg, sets, engine, grader, run
        self.sampling = Sampling(cfg.max_response_tokens, temperature=0.7, top_p=0.8, top_k=20)

    def score(self, steps: int, policy: Policy) -> None:
        """Logs the policy's scores after `steps` steps, every `validate_every` and after the last. Collective."""
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
