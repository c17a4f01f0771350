"""What a policy might try to be paid for: answers in the prompt, several boxes, responses that never end."""

import pytest
import torch
from test_stages import grpo, metrics

import lib.rollouts
import teacher_grpo
from common import Problem, Rollout
from lib.verifier import Verifier

RESPONSES = {  # text, whether it ended, whether it is to be paid for: the answer is 4
    "right": ("so \\boxed{4}", True, True),
    "wrong": ("so \\boxed{5}", True, False),
    "right, but cut at the limit": ("so \\boxed{4}", False, False),
    "right first, wrong last": ("\\boxed{4} or rather \\boxed{5}", True, False),
    "wrong first, right last": ("\\boxed{5} or rather \\boxed{4}", True, True),
    "every digit, in boxes": ("".join(f"\\boxed{{{digit}}}" for digit in range(10)), True, False),
    "every digit, in one box": ("\\boxed{0,1,2,3,4,5,6,7,8,9}", True, False),
    "quoted, not answered": ("the problem says \\boxed{4}, and I say: \\boxed{}", True, False),
    "nothing": ("", True, False),
}


@pytest.mark.parametrize("normalize", [True, False], ids=["", "not normalised"])
@pytest.mark.parametrize("require_finished", [True, False], ids=["", "cut ones too"])
def test_what_is_rewarded(student, problems, tmp_path, monkeypatch, require_finished, normalize):
    """Through Stage 1 itself, on groups of these responses. Every prompt holds its own answer in a box.

    The answer to the last problem of the batch is another one, so that none of its responses is paid for.
    """

    def sample(engine, chosen, prompts, n, *rest, **options):
        assert n == len(RESPONSES)
        return [
            Rollout(Problem(p.id, "Is it \\boxed{4}?", "4" if p is not chosen[-1] else "17"), i, prompts[p.id], [5, 1],
                    [-1.0, -1.0], "stop" if finished else "length", text)
            for p in chosen for i, (text, finished, _) in enumerate(RESPONSES.values())
        ]  # fmt: skip

    advantages = []
    update = teacher_grpo.update

    def seen(policy, reference, optimizer, rollouts, *rest):
        advantages.append(torch.tensor([rollout.advantage for rollout in rollouts]).view(-1, len(RESPONSES)))
        return update(policy, reference, optimizer, rollouts, *rest)

    monkeypatch.setattr(teacher_grpo, "sample_rollouts", sample)
    monkeypatch.setattr(teacher_grpo, "update", seen)
    teacher_grpo.main(
        grpo(
            student,
            problems,
            tmp_path / "out",
            rollouts_per_prompt=len(RESPONSES),
            max_steps=1,
            require_finished=require_finished,
            normalize_by_std=normalize,
        )
    )
    paid = [right or (not require_finished and "cut" in name) for name, (_, _, right) in RESPONSES.items()]
    [line] = metrics(tmp_path / "out")
    share = sum(paid) / len(paid)
    *groups, unpaid = advantages[0]
    assert len(groups) == 3 and not unpaid.any()
    assert line["reward"] == pytest.approx(share * 3 / 4) and line["frac_reward_zero_std"] == 1 / 4
    assert line["truncated"] == pytest.approx(1 / len(RESPONSES))
    scale = (share * (1 - share)) ** 0.5 if normalize else 1.0
    for group in groups:
        assert group.tolist() == pytest.approx([(value - share) / scale for value in paid], abs=1e-4)


def test_the_prompt_is_never_graded():
    """Nor what a response says of itself in fields other than its text."""
    rollouts = [
        Rollout(Problem("x", "The answer is \\boxed{4}.", "4"), 0, [4], [], [], "stop", text)
        for text in ("", "as was said above", "\\boxed{5}", "\\boxed{4}")
    ]
    with Verifier() as verifier:
        lib.rollouts.grade(rollouts, verifier)
    assert [rollout.correct for rollout in rollouts] == [False, False, False, True]
