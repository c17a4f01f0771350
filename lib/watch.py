"""What can be seen of a run while it goes on: a few of its responses, and warnings that it learns nothing."""

from __future__ import annotations

from collections.abc import Sequence

from common import Rollout

# Responses

SAMPLES_PER_STEP = 4
MAX_CHARS = 10_000  # of a response in samples.jsonl; its beginning and its end, where the answer is, are kept


def why(rollout: Rollout) -> str:
    """Why a response has its reward: it was "cut" at the length limit, had "no answer", or was "right" or "wrong"."""
    if rollout.finish_reason == "length":
        return "cut"
    return "no answer" if rollout.how == "no_answer" else ("right" if rollout.correct else "wrong")


def choose_samples(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> list[int]:
    """Indices of at most SAMPLES_PER_STEP rollouts that say most: the best and the worst response to a few prompts.

    Prompts whose responses have different rewards come first, and prompts with one response last. The order of the
    rollouts decides what is equal, so that a resumed run chooses the same.
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


def sample_lines(step: int, rollouts: Sequence[Rollout], require_finished: bool) -> list[dict]:
    """The step's lines of samples.jsonl. `require_finished` says that a response that was cut earns no reward."""
    rewards = [rollout.earned(require_finished) for rollout in rollouts]
    return [
        {
            "step": step,
            "id": rollouts[index].problem.id,
            "sample": rollouts[index].sample,
            "prompt": rollouts[index].problem.prompt,
            "answer": rollouts[index].problem.answer,
            "response": shorten(rollouts[index].text, MAX_CHARS),
            "reward": rewards[index],
            "why": why(rollouts[index]),
            "advantage": rollouts[index].advantage,
            "tokens": len(rollouts[index].response_ids),
        }
        for index in choose_samples(rollouts, rewards)
    ]


def shorten(text: str, chars: int) -> str:
    """The text, or its first third and its end, about `chars` characters together, if it is longer."""
    if len(text) <= chars:
        return text
    first = chars // 3
    return f"{text[:first]} [... {len(text) - chars} characters ...] {text[first - chars :]}"


def printable(text: str) -> str:
    """The text with everything escaped that could move the cursor or reverse the line; line breaks stay.

    A response may hold any character, escape sequences of the terminal among them.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_sample(line: dict, chars: int) -> str:
    """A line of samples.jsonl, to be printed in two lines."""
    prompt, response = (printable(shorten(" ".join(line[name].split()), chars)) for name in ("prompt", "response"))
    return f"step {line['step']}: {prompt}\n  {summary(line)}: {response}"


def summary(line: dict) -> str:
    advantage = f", advantage {line['advantage']:+.2f}" if line["advantage"] else ""
    return f"{line['why']}, reward {line['reward']:.3g}{advantage}, {line['tokens']} tokens"


# Warnings. A healthy run must get none, so each needs WINDOW steps without an exception. With the 32 groups of 8 in a
# step of GRPO these are 2560 responses.

WINDOW = 10
NEARLY_ALL = 0.95
LARGE_KL = 5.0  # nats a token to the reference; the toy's runs end at 0.1 to 0.3
RISEN_KL = 1.0, 3.0  # nats a token to the teacher, and how many times what the run began with
LOW_ENTROPY = 0.01, 0.1  # nats a token, and what share of what the run began with; the toy's runs end at 0.04
GOOD_REWARD = 0.9  # above it, low entropy is what a model has that knows the answers


def is_training(line: dict) -> bool:
    """Whether a line of metrics.jsonl is that of a step, and not that of a validation."""
    return "skipped_steps" in line


def find_warnings(lines: Sequence[dict]) -> dict[str, str]:
    """What is wrong with a run, by kind, one sentence for each with the likely cause and the setting to change.

    `lines` are those of metrics.jsonl so far. Lines of validations are passed over, and so are metrics that a stage
    does not log.
    """
    lines = [line for line in lines if is_training(line)]
    last, found = lines[-WINDOW:], {}
    if len(last) < WINDOW:
        return {}

    def values(name: str) -> list[float]:
        """Those of the last steps; none if it is not logged, or was not a number in one of them."""
        numbers = [line.get(name) for line in last]
        return [] if None in numbers else numbers

    def all_at_least(name: str, limit: float) -> bool:
        return bool(values(name)) and min(values(name)) >= limit

    def means(name: str) -> tuple[float, float]:
        """Of the first five steps and of the last five."""
        first = [line[name] for line in lines[:5] if line.get(name) is not None]
        return sum(first) / max(len(first), 1), sum(values(name)[-5:]) / 5

    steps, rewards = f"of the last {WINDOW} steps", values("reward")
    if all_at_least("truncated", NEARLY_ALL):
        found["cut"] = (
            f"nearly all responses {steps} were cut at --max-response-tokens; raise it, or see in samples.jsonl whether "
            "the model ever ends a response"
        )
    elif all_at_least("no_answer", NEARLY_ALL):
        found["no answer"] = (
            f"nearly no response {steps} had a \\boxed answer; see in samples.jsonl what the model writes instead, and "
            "whether --prompt asks for a box"
        )
    elif all_at_least("frac_reward_zero_std", NEARLY_ALL):
        if not any(rewards):
            found["reward 0"] = (
                f"every response {steps} had the reward 0, from which nothing can be learnt; look at samples.jsonl, and "
                "give easier problems with --data or a better --model"
            )
        elif 0.98 <= min(rewards) <= max(rewards) <= 1:
            found["reward 1"] = (
                f"nearly every response {steps} had the full reward, so that nothing is left to learn; give harder problems "
                "with --data"
            )
        else:
            found["no spread"] = (
                f"in nearly all groups {steps} the rewards were equal, and from such a group nothing can be learnt; give "
                "problems of another difficulty with --data, or raise --rollouts-per-prompt"
            )
    if values("kl_to_reference") and means("kl_to_reference")[1] > LARGE_KL:
        found["kl"] = (
            f"the policy is {means('kl_to_reference')[1]:.3g} nats a token away from the model that it began as, so it "
            "has probably broken down; lower --lr, or raise --kl-coef"
        )
    for name in ("reverse_kl", "forward_kl"):
        first, now = means(name) if values(name) else (0.0, 0.0)
        if now > max(RISEN_KL[0], RISEN_KL[1] * first):
            found["kl"] = f"{name} has risen from {first:.3g} to {now:.3g} nats a token instead of falling; lower --lr"
    if values("entropy") and rewards:
        first, now = means("entropy")
        if now < min(LOW_ENTROPY[0], LOW_ENTROPY[1] * first) and means("reward")[1] < GOOD_REWARD:
            found["entropy"] = (
                f"the entropy has fallen from {first:.3g} to {now:.3g} nats a token at a reward of "
                f"{means('reward')[1]:.2f}, so that nothing new is tried; lower --lr, or raise --kl-coef or --temperature"
            )
    return found
