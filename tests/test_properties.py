"""What must hold for any input: layouts, advantages, schedules."""

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import teacher_grpo
from common import Rollout
from lib import packing

CPU = torch.device("cpu")
checked = settings(max_examples=60, deadline=None)

prompts, responses = st.lists(st.integers(2, 3), min_size=1, max_size=2), st.lists(st.integers(2, 99), max_size=7)
rollout_lists = st.lists(st.tuples(prompts, responses), min_size=1, max_size=9).map(
    lambda pairs: [
        Rollout(None, 0, prompt, response, [-float(i) - t / 8 for t in range(len(response))], "stop", "")
        for i, (prompt, response) in enumerate(pairs)
    ]
)


def predictions(batch: common.Batch) -> list[tuple]:
    """(rollout, its tokens before a target, target, sampler's logprob) for each target, as the attention would see them."""
    ids, seen = batch.input_ids[0].tolist(), []
    for span in batch.spans:
        assert span.start == len(seen)
        prefix = ids[span.prefix_start : span.prefix_start + span.prefix_length]
        seen += [(*prefix, *ids[span.start : span.start + count + 1]) for count in range(span.length)]
    assert batch.position_ids[0].tolist() == [len(before) - 1 for before in seen]
    per_target = (x.tolist() for x in (batch.predicted_at, batch.rollout_index, batch.targets, batch.sampler_logprobs))
    return [
        (rollout, seen[place], target, logprob) for place, rollout, target, logprob in zip(*per_target, strict=True)
    ]


@checked
@given(rollout_lists, st.sampled_from([1, 5, 9, 17, 60]), st.integers(1, 3), st.booleans())
def test_packed_and_one_by_one_predict_the_same_once(rollouts, max_tokens, ranks, share_prompts):
    expected = sorted(
        (index, tuple((r.prompt_ids + r.response_ids)[: len(r.prompt_ids) + t]), r.response_ids[t], r.logprobs[t])
        for index, r in enumerate(rollouts)
        for t in range(len(r.response_ids))
    )
    shares = []
    for rank in range(ranks):
        with mock.patch.object(packing, "world_size", lambda: ranks), mock.patch.object(packing, "rank", lambda: rank):
            shares.append(packing.make_batches(rollouts, max_tokens, CPU, share_prompts))
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert sorted(p for batch in batches for p in predictions(batch)) == expected
    for batch in batches:
        assert batch.input_ids.numel() <= max_tokens or len(batch.rollout_index.unique()) <= 1
    if share_prompts and ranks == 1 and max_tokens == 60:  # room for whole groups: no prompt is computed twice
        assert sum(batch.input_ids.numel() for batch in batches) <= sum(
            len(prompt) for prompt in {tuple(r.prompt_ids) for r in rollouts}
        ) + sum(max(len(r.response_ids) - 1, 0) for r in rollouts)


rewards = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=6), min_size=1, max_size=4)


@checked
@given(rewards, st.permutations(range(6)), st.floats(0.5, 20), st.floats(-5, 5))
def test_advantages_sum_to_zero_and_know_no_order_scale_or_offset(rewards, order, scale, offset):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    for normalize in (False, True):
        advantages = teacher_grpo.group_advantages(rewards, normalize)
        assert advantages.sum(1).abs().max() < 1e-9
        torch.testing.assert_close(teacher_grpo.group_advantages(rewards[:, order], normalize), advantages[:, order])
        changed = teacher_grpo.group_advantages(scale * rewards + offset, normalize)
        torch.testing.assert_close(changed, advantages * (1 if normalize else scale), atol=1e-4, rtol=1e-4)
        spread = rewards.std(1) > 0
        single = teacher_grpo.group_advantages((scale * rewards + offset).float(), normalize)
        assert not single[~spread].any()  # although the mean of equal numbers may be a rounding error off
        if normalize and spread.any():
            deviation = advantages[spread].std(1, correction=0)
            torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=1e-4, rtol=0)


@checked
@given(st.integers(1, 60), st.integers(0, 70), st.floats(1e-8, 1.0), st.sampled_from(["constant", "cosine"]))
def test_the_learning_rate_rises_to_its_peak_and_never_falls_below_a_tenth(total, warmup, peak, schedule):
    rates = [common.learning_rate(step, total, peak, schedule, warmup) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(rate >= 0.1 * peak * (1 - 1e-12) for rate in rates[warmup:])
    assert schedule == "cosine" or all(rate == peak for rate in rates[warmup:])
