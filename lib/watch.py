"""Monitoring a run in progress: a few of its responses, and warnings that something is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from common import Rollout

# Responses

SAMPLES_PER_STEP = 4
MAX_CHARS = 10_000  # longer responses lose their middle in samples.jsonl, because the answer is at the end


def why(rollout: Rollout) -> str:
    """The outcome of a response: "cut" at the length limit, "no answer" found, or the grader's "right" or "wrong"."""
    if rollout.finish_reason == "length":
        return "cut"
    return "no answer" if rollout.how == "no_answer" else ("right" if rollout.correct else "wrong")


def choose_samples(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> list[int]:
    """Indices of the best and worst responses to a few prompts, at most SAMPLES_PER_STEP in all.

    Prompts with the largest reward differences come first, prompts with a single response last. Ties are broken by the
    order of the rollouts, so that a resumed run makes the same choice.
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
    """A step's lines for samples.jsonl. Without a --reward, the reward is 1 for a right answer and 0 otherwise."""
    rewards = [float(bool(r.correct)) if r.reward is None else r.reward for r in rollouts]
    return [
        {
            "step": step,
            "id": r.problem.id,
            "sample": r.sample,
            "prompt": r.problem.prompt,
            "answer": r.problem.answer,
            "response": shorten(r.text, MAX_CHARS),
            "reward": float(f"{rewards[index]:.7g}"),  # the digits that a float32 holds
            "why": why(r),
            "advantage": r.advantage,
            "tokens": len(r.response_ids),
        }
        for index, r in ((index, rollouts[index]) for index in choose_samples(rollouts, rewards))
    ]


def shorten(text: str, chars: int) -> str:
    """Cuts the middle out of a long text so that about `chars` characters remain, a third at the start, the rest at the end."""
    if len(text) <= chars:
        return text
    first = chars // 3
    return f"{text[:first]} [... {len(text) - chars} characters ...] {text[first - chars :]}"


def printable(text: str) -> str:
    """The text with unprintable characters escaped, such as terminal control sequences, but with its line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_sample(line: dict, chars: int) -> str:
    """A line of samples.jsonl as two lines to print."""
    prompt, response = (printable(shorten(" ".join(line[name].split()), chars)) for name in ("prompt", "response"))
    advantage = f", advantage {line['advantage']:+.2f}" if line["advantage"] else ""
    said = f"{line['why']}, reward {line['reward']:.3g}{advantage}, {line['tokens']} tokens"
    return f"step {line['step']}: {prompt}\n  {said}: {response}"


# Warnings

WINDOW = 10  # a condition must hold over this many steps, so that healthy runs get no warnings
NEARLY_ALL = 0.95
FAR_FROM_REFERENCE = 5.0  # nats per token from the reference; the toy's runs end at 0.1 to 0.3
MISMATCH = 0.5  # nats per token between sampler and trainer; a healthy bfloat16 run has about 0.01
FAILED = 0.01  # fraction of gradings


def is_training(line: dict) -> bool:
    """Whether a line of metrics.jsonl is from a training step, not from a validation."""
    return "skipped_steps" in line


def find_warnings(lines: Sequence[dict]) -> dict[str, str]:
    """Problems found in a run: for each kind, a sentence with the likely cause and the setting to change.

    `lines` are the lines of metrics.jsonl so far. Validations and metrics that the stage does not log are ignored.
    """
    lines = [line for line in lines if is_training(line)]
    last = lines[-WINDOW:]
    if len(last) < WINDOW:
        return {}

    def all_in(name: str, low: float, high: float) -> bool:
        """Whether the metric was in [low, high] in every one of the last steps."""
        return all(line.get(name) is not None and low <= line[name] <= high for line in last)

    def mean(name: str, among: Sequence[dict] = last) -> float:
        """The metric's mean over the lines with a finite value; 0 if there are none."""
        values = [line[name] for line in among if line.get(name) is not None]
        return sum(values) / max(len(values), 1)

    found = {}
    # At most one of these four: if all responses are cut, there are no answers and no spread either.
    if all_in("truncated", NEARLY_ALL, 1):
        found["cut"] = "nearly all responses were cut; raise --max-response-tokens, or see samples.jsonl for the reason"
    elif all_in("no_answer", NEARLY_ALL, 1):
        found["no answer"] = (
            "hardly any response had a \\boxed answer; see samples.jsonl, and ask for a box in --prompt"
        )
    elif all_in("frac_reward_zero_std", NEARLY_ALL, 1):
        found["no spread"] = (
            f"in nearly all groups the rewards were equal (mean reward {mean('reward'):.3g}), so their advantages were 0; give "
            "easier or harder problems with --data, or raise --rollouts-per-prompt"
        )
    elif all_in("grad_norm", 0, 0):
        found["gradient"] = "the gradient was exactly 0, so the model learns nothing; see samples.jsonl"
    if (kl := mean("kl_to_reference")) > FAR_FROM_REFERENCE:
        found["kl"] = f"the policy is {kl:.3g} nats per token from its reference; lower --lr, or raise --kl-coef"
    for name in ("reverse_kl", "forward_kl"):
        first, now = mean(name, lines[:5]), mean(name)
        if now > max(1.0, 3 * first):
            found["kl"] = f"{name} was {now:.3g} nats per token, up from {first:.3g} in the first 5 steps; lower --lr"
    if (mismatch := mean("sampler_mismatch")) > MISMATCH:
        found["mismatch"] = (
            f"sampler and trainer differ by {mismatch:.3g} nats per token on average; compare with --engine torch, and check "
            "in lib/policy.py that training supports this architecture"
        )
    if (failed := mean("verifier_failed")) > FAILED:
        found["verifier"] = (
            f"{100 * failed:.2g} % of the gradings timed out or failed, and count as wrong; check whether the machine is "
            "overloaded, the answers in --data are unusual, or many boxes are malformed"
        )
    return {kind: f"in the last {WINDOW} steps {sentence}" for kind, sentence in found.items()}
