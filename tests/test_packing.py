"""Packed micro-batches against one forward pass for each sequence: values and gradients."""

import pytest
import torch
from conftest import SIZES, double_model, tiny_model
from test_losses import make_rollouts, naive_logits
from transformers import Gemma2Config, Gemma2ForCausalLM

import lib.policy
from common import InputError
from kernels import fused_linear_logprob
from lib.packing import make_batches, pack
from lib.policy import Policy

CPU = torch.device("cpu")
SLIDING = dict(layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=3)
MODELS = {"qwen3": {}, "qwen2": dict(family="Qwen2"), "llama": dict(family="Llama"), "sliding-window": SLIDING}


def one_by_one(model, rollouts):
    """Logprobs of all response tokens, rollout by rollout, from transformers alone."""
    logprobs = []
    for rollout in rollouts:
        if rollout.response_ids:
            targets = torch.tensor(rollout.response_ids)[:, None]
            logprobs.append(naive_logits(model, rollout).log_softmax(-1).gather(1, targets).squeeze(1))
    return torch.cat(logprobs)


def in_batches(policy, rollouts, max_tokens, share_prompts=True):
    pieces = [None] * len(rollouts)
    for batch in make_batches(rollouts, max_tokens, CPU, share_prompts):
        head = lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets)
        logprobs, _ = policy(batch, head)
        for index in batch.rollout_index.unique().tolist():
            pieces[index] = logprobs[batch.rollout_index == index]
    return torch.cat([piece for piece in pieces if piece is not None])


def naive_varlen(query, key, value, bounds, bounds_k, longest, longest_k, scale, window_size, enable_gqa):
    """What the GPU's kernel computes, a span at a time; the last query is aligned to the last key."""
    assert longest == bounds.diff().max() and longest_k == bounds_k.diff().max() and bounds_k[-1] == len(key)
    assert bounds.dtype == bounds_k.dtype == torch.int32 and window_size[1] == 0
    pieces = []
    for (start, end), (start_k, end_k) in zip(bounds.unfold(0, 2, 1).tolist(), bounds_k.unfold(0, 2, 1).tolist()):
        q, k, v = query[start:end].transpose(0, 1), key[start_k:end_k].transpose(0, 1), value[start_k:end_k].transpose(0, 1)  # fmt: skip
        distance = torch.arange(end_k - start_k)[-(end - start) :, None] - torch.arange(end_k - start_k)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        pieces.append(attended.transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])  # alone; groups cut in two; all together
@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("attention", ["blocks", "varlen", "varlen of torch 2.10", "sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packs_equal_one_by_one_forwards(name, attention, share_prompts, max_tokens, monkeypatch):
    model = double_model(seed=3, **MODELS[name])
    rollouts = make_rollouts(12, group=4)
    expected = one_by_one(model, rollouts)
    policy = Policy(model)
    if attention in ("sdpa", "eager"):  # transformers' own, with a mask over the whole pack
        model.set_attn_implementation(attention)
        share_prompts = False  # whose masks have no prefixes
    elif attention != "blocks":
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(lib.policy, "varlen_attn", naive_varlen)
        monkeypatch.setattr(lib.policy, "VARLEN_OPTIONS", {"window_size", "enable_gqa"})
        if attention == "varlen of torch 2.10":
            monkeypatch.setattr(
                lib.policy,
                "varlen_attn",
                lambda *args, scale, is_causal: naive_varlen(
                    *args, scale, (-1, 0) if is_causal else None, enable_gqa=False
                ),
            )
            monkeypatch.setattr(lib.policy, "VARLEN_OPTIONS", {"is_causal"})
            if name == "sliding-window":
                with pytest.raises(InputError, match="sliding windows needs torch 2.13"):
                    in_batches(policy, rollouts, max_tokens, share_prompts)
                return
    logprobs = in_batches(policy, rollouts, max_tokens, share_prompts)
    tolerance = 1e-6 if attention == "eager" else 1e-12  # whose softmax computes in float32
    torch.testing.assert_close(logprobs, expected, atol=tolerance, rtol=0)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    gradients = []
    for values in (logprobs, expected):
        policy.zero_grad()
        (weights * values).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(*gradients, atol=10 * tolerance, rtol=0)


def test_attention_with_a_term_besides_is_refused():
    config = Gemma2Config(hidden_size=16, num_hidden_layers=2, **SIZES)  # caps the scores before the softmax
    with pytest.raises(InputError, match="the attention of model '' has a softcap, which packed attention leaves out"):
        in_batches(Policy(Gemma2ForCausalLM(config)), make_rollouts(2), 1000)


def test_a_pack_has_no_padding_and_keeps_the_budget():
    rollouts = make_rollouts(40, shortest=3)
    batches = make_batches(rollouts, 50, CPU, False)
    assert all(batch.input_ids.shape[0] == 1 and batch.input_ids.numel() <= 50 for batch in batches)
    total = sum(len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts)
    assert (
        sum(batch.input_ids.numel() for batch in batches)
        == total
        == sum(span.length for batch in batches for span in batch.spans)
    )
    assert len(batches) <= total // 50 + 2


def test_nothing_to_do_is_a_pass_of_zero():
    """What a rank does that has fewer micro-batches than another: all parameters get a gradient, and it is zero."""
    batch = pack([], [], CPU)
    policy = Policy(tiny_model())
    logprobs, entropy = policy(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in policy.parameters())


def test_activation_checkpointing_recomputes_and_changes_nothing():
    rollouts = make_rollouts(4, shortest=2)  # two groups, whose prompts are shared
    calls, gradients = [], []
    for checkpointing in (False, True):
        policy = Policy(tiny_model())
        if checkpointing:
            lib.policy.recompute_layers(policy)
        policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(checkpointing))
        in_batches(policy, rollouts, 1000).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in policy.parameters()])
        assert not any(module.training for module in policy.modules() if isinstance(module, torch.nn.Dropout))
    assert calls == [False, True, True]  # once, then once more in the backward pass
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)
