"""What can be seen of a run while it goes on: a few of its responses, and warnings that something is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from common import Rollout

# Responses

SAMPLES_PER_STEP = 4
MAX_CHARS = 10_000  # of a response in samples.jsonl; its beginning and its end, where the answer is, are kept


def why(rollout: Rollout) -> str:
    """How the response did: "cut" at the length limit, "no answer" found, or "right" or "wrong", as the grader says."""
    if rollout.finish_reason == "length":
        return "cut"
    return "no answer" if rollout.how == "no_answer" else ("right" if rollout.correct else "wrong")


def choose_samples(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> list[int]:
    """Indices of the best and the worst response to a few prompts, at most SAMPLES_PER_STEP together.

    Prompts whose responses have different rewards come first, and prompts with one response last. Of equal ones the
    order of the rollouts decides, so that a resumed run chooses the same.
    """
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.problem.id, []).append(index)
    pairs = []
    for indices in groups.values():
        best = max(indices, key=lambda index: rewards[index])
        worst = min(reversed(indices), key=lambda index: rewards[index])
        pairs.append((rewards[worst] - rewards[best], -len(indices[:2]), [best, worst] if best != worst else [best]))
    chosen = [index for _, _, pair in sorted(pairs, key=lambda pair: pair[:2]) for index in pair]
    return chosen[:SAMPLES_PER_STEP]


def sample_lines(step: int, rollouts: Sequence[Rollout]) -> list[dict]:
    """The step's lines of samples.jsonl. The reward is the one that the stage used, or else 1 for a right answer."""
    rewards = [float(bool(r.correct)) if r.reward is None else r.reward for r in rollouts]
    return [
        {
            "step": step,
            "id": r.problem.id,
            "sample": r.sample,
            "prompt": r.problem.prompt,
            "answer": r.problem.answer,
            "response": shorten(r.text, MAX_CHARS),
            "reward": float(f"{rewards[index]:.7g}"),  # a float32 as a person would write it
            "why": why(r),
            "advantage": r.advantage,
            "tokens": len(r.response_ids),
        }
        for index, r in ((index, rollouts[index]) for index in choose_samples(rollouts, rewards))
    ]


def shorten(text: str, chars: int) -> str:
    """The text, or of a longer one its first third and its end, about `chars` characters together."""
    if len(text) <= chars:
        return text
    first = chars // 3
    return f"{text[:first]} [... {len(text) - chars} characters ...] {text[first - chars :]}"


def printable(text: str) -> str:
    """The text with everything escaped that could move the terminal's cursor or reverse the line; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_sample(line: dict, chars: int) -> str:
    """A line of samples.jsonl, to be printed in two lines."""
    prompt, response = (printable(shorten(" ".join(line[name].split()), chars)) for name in ("prompt", "response"))
    advantage = f", advantage {line['advantage']:+.2f}" if line["advantage"] else ""
    said = f"{line['why']}, reward {line['reward']:.3g}{advantage}, {line['tokens']} tokens"
    return f"step {line['step']}: {prompt}\n  {said}: {response}"


# Warnings

WINDOW = 10  # steps without an exception that a warning needs, so that healthy runs get none
NEARLY_ALL = 0.95
FAR_FROM_REFERENCE = 5.0  # nats a token to the reference; the toy's runs end at 0.1 to 0.3
MISMATCH = 0.5  # nats a token between sampler and trainer; in bfloat16 a healthy run has about 0.01
FAILED = 0.01  # of all gradings


def is_training(line: dict) -> bool:
    """Whether a line of metrics.jsonl is that of a step, and not that of a validation."""
    return "skipped_steps" in line


def find_warnings(lines: Sequence[dict]) -> dict[str, str]:
    """What is wrong with a run, by kind, one sentence for each with the likely cause and the setting to change.

    `lines` are those of metrics.jsonl so far. Validations do not count, nor do metrics that a stage does not log.
    """
    lines = [line for line in lines if is_training(line)]
    last = lines[-WINDOW:]
    if len(last) < WINDOW:
        return {}

    def all_in(name: str, low: float, high: float) -> bool:
        """Whether the metric was between the two in every one of the last steps."""
        return all(line.get(name) is not None and low <= line[name] <= high for line in last)

    def mean(name: str, among: Sequence[dict] = last) -> float:
        """0 if the metric is not logged, or was not finite."""
        values = [line[name] for line in among if line.get(name) is not None]
        return sum(values) / max(len(values), 1)

    found = {}
    # One of these four at most: if all responses are cut there is no answer either, and no spread.
    if all_in("truncated", NEARLY_ALL, 1):
        found["cut"] = "nearly all responses were cut; raise --max-response-tokens, or see in samples.jsonl why"
    elif all_in("no_answer", NEARLY_ALL, 1):
        found["no answer"] = (
            "nearly no response had a \\boxed answer; see samples.jsonl, and let --prompt ask for a box"
        )
    elif all_in("frac_reward_zero_std", NEARLY_ALL, 1):
        found["no spread"] = (
            f"in nearly all groups the rewards were equal (mean reward {mean('reward'):.3g}), which teaches nothing; give "
            "easier or harder problems with --data, or raise --rollouts-per-prompt"
        )
    elif all_in("grad_norm", 0, 0):
        found["gradient"] = "the gradient was exactly 0, so nothing is learnt; see samples.jsonl"
    if (kl := mean("kl_to_reference")) > FAR_FROM_REFERENCE:
        found["kl"] = f"the policy is {kl:.3g} nats a token away from where it began; lower --lr, or raise --kl-coef"
    for name in ("reverse_kl", "forward_kl"):
        first, now = mean(name, lines[:5]), mean(name)
        if now > max(1.0, 3 * first):
            found["kl"] = f"{name} was {now:.3g} nats a token, up from {first:.3g} in the first 5; lower --lr"
    if (mismatch := mean("sampler_mismatch")) > MISMATCH:
        found["mismatch"] = (
            f"sampler and trainer differ by {mismatch:.3g} nats a token on average; compare with --engine torch, and see in "
            "lib/policy.py whether training supports this architecture"
        )
    if (failed := mean("verifier_failed")) > FAILED:
        found["verifier"] = (
            f"{100 * failed:.2g} % of the gradings timed out or failed, and count as wrong; see whether the machine is "
            "overloaded, the answers in --data are unusual, or many boxes are malformed"
        )
    return {kind: f"in the last {WINDOW} steps {sentence}" for kind, sentence in found.items()}
