"""avg@k ± standard error over problems (App. F), pass@k, and paired differences between two checkpoints."""

from __future__ import annotations

import numpy as np

from common import InputError


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of (P,) values and its standard error; of a single value the error is not known (nan)."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


def summarise(samples: list[dict], k: int) -> dict:
    """Statistics of one data set from its P*k samples: rates in [0, 1], lengths in tokens, the scores by problem id.

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
    """Mean of first - second over the problems (scores by problem id), and the standard error of that mean."""
    if first.keys() != second.keys():
        raise InputError(
            "two checkpoints were evaluated on different problems and cannot be compared; evaluate both anew"
        )
    return mean_and_error(np.array([first[problem_id] - second[problem_id] for problem_id in first]))
