"""Packed and padded micro-batches against one forward pass for each sequence: values and gradients."""

import pytest
import torch
from conftest import tiny_model
from test_losses import make_rollouts, naive_logits

import common
import records
from common import Policy
from kernels import fused_linear_logprob

CPU = torch.device("cpu")


def one_by_one(policy, rollouts):
    """Logprobs of all response tokens, rollout by rollout."""
    logprobs = []
    for rollout in rollouts:
        if rollout.response_ids:
            targets = torch.tensor(rollout.response_ids)[:, None]
            logprobs.append(naive_logits(policy, rollout).log_softmax(-1).gather(1, targets).squeeze(1))
    return torch.cat(logprobs)


def in_batches(policy, rollouts, max_tokens, packed):
    pieces = [None] * len(rollouts)
    for batch in records.make_batches(rollouts, max_tokens, CPU, packed):
        head = lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets)
        logprobs, _ = policy(batch, head)
        for index in batch.rollout_index.unique().tolist():
            pieces[index] = logprobs[batch.rollout_index == index]
    return torch.cat([piece for piece in pieces if piece is not None])


def naive_varlen(query, key, value, bounds, bounds_k, longest, longest_k, scale, window_size, enable_gqa):
    """What the GPU's kernel computes, a sequence at a time."""
    assert window_size == (-1, 0) and torch.equal(bounds, bounds_k) and longest == longest_k == bounds.diff().max()
    assert bounds.dtype == torch.int32
    pieces = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        pieces.append(attended.transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("llama", [False, True])
def test_layouts_equal_one_by_one_forwards(layout, attention, max_tokens, llama, monkeypatch):
    if attention == "packed":
        monkeypatch.setattr(common, "varlen_attn", naive_varlen)
        monkeypatch.setattr(common, "VARLEN_OPTIONS", {"window_size", "enable_gqa"})
    policy = Policy(tiny_model(seed=3, llama=llama).double())
    rollouts = make_rollouts(8)
    expected = one_by_one(policy, rollouts)
    policy.model.set_attn_implementation(attention)
    logprobs = in_batches(policy, rollouts, max_tokens, layout == "packed")
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)  # transformers' norms compute in float32
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    gradients = []
    for values in (logprobs, expected):
        policy.zero_grad()
        (weights * values).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-5)


def test_a_pack_has_no_padding_and_keeps_the_budget():
    rollouts = make_rollouts(40, shortest=3)
    batches = records.make_batches(rollouts, 50, CPU, packed=True)
    assert all(batch.input_ids.shape[0] == 1 and batch.input_ids.numel() <= 50 for batch in batches)
    total = sum(len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts)
    assert sum(batch.input_ids.numel() for batch in batches) == total
    assert len(batches) <= total // 50 + 2


def test_nothing_to_do_is_a_pass_of_zero():
    """What a rank does that has fewer micro-batches than another: all parameters get a gradient, and it is zero."""
    for packed in (False, True):
        batch = records._lay_out([], [], [], CPU, packed)
        policy = Policy(tiny_model())
        logprobs, entropy = policy(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))
        assert logprobs.shape == entropy.shape == (0,)
        logprobs.sum().backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in policy.parameters())


def test_activation_checkpointing_recomputes_and_changes_nothing():
    rollouts = make_rollouts(4, shortest=2)
    calls, gradients = [], []
    for checkpointing in (False, True):
        policy = Policy(tiny_model())
        if checkpointing:
            common.checkpoint_layers(policy)
        policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(checkpointing))
        in_batches(policy, rollouts, 1000, False).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in policy.parameters()])
        assert not any(module.training for module in policy.modules() if isinstance(module, torch.nn.Dropout))
    assert calls == [False, True, True]  # once, then once more in the backward pass
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)
