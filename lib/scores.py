"""avg@k ± standard error over problems (App. F), pass@k, paired differences, and the validation while a stage trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common import InputError, Problem, TrainingConfig
from lib.data import load_problems, tokenize_prompts
from lib.engines import Sampling, TorchEngine, VLLMEngine
from lib.policy import Policy
from lib.rollouts import grade, sample_rollouts
from lib.samples import as_sample
from lib.verifier import Verifier


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of (P,) values ± its standard error (SE); of a single value the error is not known (nan)."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


def summarise(samples: list[dict], k: int) -> dict:
    """Statistics of one data set from its P*k samples, among them avg@k ± SE (avg@16 in the paper): rates in [0, 1],
    lengths in tokens, the scores by problem id.

    A sample's score is its `reward` if it has one, which need not lie in [0, 1]; otherwise 1 if it is correct, else 0.
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
        "tokens": float(np.mean([sample["tokens"] for sample in samples])),
        "scores": dict(zip(ids, scores.mean(axis=1).tolist())),
    }


def paired_difference(first: dict[str, float], second: dict[str, float]) -> tuple[float, float]:
    """Mean of first - second over the problems (scores by problem id) ± the standard error (SE) of that mean."""
    if first.keys() != second.keys():
        raise InputError(
            "two checkpoints were evaluated on different problems and cannot be compared; evaluate both anew"
        )
    return mean_and_error(np.array([first[problem_id] - second[problem_id] for problem_id in first]))


def check_decoding(top_p: float, top_k: int) -> None:
    """InputError for a top-p above 1 or a top-k that keeps no token."""
    if top_p > 1:
        raise InputError(f"--top-p {top_p} is more than all of the distribution; give 1 or less")
    if top_k < 1 and top_k != -1:
        raise InputError(f"--top-k {top_k} keeps no token; give 1 or more, or -1 for all")


# Validation


def validation_sets(
    cfg: TrainingConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, tuple[list[Problem], dict[str, list[int]]]]:
    """Each set of `--validate` by its name: the problems, and their prompts' token ids by problem id.

    InputError for a set that cannot be had or has the name of another one, and for a prompt that is too long.
    """
    sets = {}
    for source in cfg.validate:
        name = Path(source).stem
        if name in sets:
            raise InputError(
                f"--validate {list(cfg.validate)}: two sets have one name, and their scores need two; rename a file"
            )
        problems = load_problems(source, quiet=True, argument="--validate", reward=cfg.reward)
        prompts = tokenize_prompts(tokenizer, problems, cfg)
        sets[name] = problems, prompts
    return sets


class Validation:
    """avg@k on the sets of `--validate` while a stage trains (Table 8). Without any it does nothing.

    `engine` samples the responses and `run`, the stage's lib.runs.Run, receives the scores. Successive validations use
    the same random numbers, so that less of the difference between two of them is chance.
    """

    def __init__(
        self,
        cfg: TrainingConfig,
        tokenizer: PreTrainedTokenizerBase,
        engine: TorchEngine | VLLMEngine | None,
        verifier: Verifier,
        run,
    ):
        self.cfg, self.tokenizer, self.engine, self.verifier, self.run = cfg, tokenizer, engine, verifier, run
        self.sets = validation_sets(cfg, tokenizer)
        self.sampling = Sampling(cfg.max_response_tokens, 0.7, 0.8, 20)  # the defaults of evaluate.py

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
                grade(rollouts, self.verifier)
                scores[name] = summarise([as_sample(rollout) for rollout in rollouts], self.cfg.validate_k)
            self.engine.sleep()
        self.run.log_validation(steps, scores)
