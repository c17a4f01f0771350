"""Packed micro-batches against one forward pass for each sequence: values and gradients."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SIZES, double_model, tiny_model
from test_losses import make_rollouts, naive_logits

import lib.policy
from common import InputError
from kernels import fused_linear_logprob
from lib import packing
from lib.packing import make_batches, pack
from lib.policy import Policy

CPU = torch.device("cpu")
MODELS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # families that are trained, and their classes


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
        logprobs, _ = policy(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))
        for index in batch.rollout_index.unique().tolist():
            pieces[index] = logprobs[batch.rollout_index == index]
    return torch.cat([piece for piece in pieces if piece is not None])


VARLEN = inspect.signature(packing.varlen_attn)


def naive_varlen(query, key, value, bounds, bounds_k, longest, longest_k, *, scale, window_size, **grouped):
    """What the GPU's kernel computes, a span at a time; the last query is aligned to the last key."""
    if grouped.keys() <= VARLEN.parameters.keys():  # the installed PyTorch takes this call
        VARLEN.bind(
            query, key, value, bounds, bounds_k, longest, longest_k, scale=scale, window_size=window_size, **grouped
        )
    assert longest == bounds.diff().max() and longest_k == bounds_k.diff().max() and bounds_k[-1] == len(key)
    assert bounds.dtype == bounds_k.dtype == torch.int32 and window_size == (-1, 0) and query.dtype != torch.float32
    pieces = []
    for (start, end), (start_k, end_k) in zip(bounds.unfold(0, 2, 1).tolist(), bounds_k.unfold(0, 2, 1).tolist()):
        q, k, v = (x.transpose(0, 1) for x in (query[start:end], key[start_k:end_k], value[start_k:end_k]))
        seen = torch.arange(end_k - start_k)[-(end - start) :, None] >= torch.arange(end_k - start_k)
        attend = torch.nn.functional.scaled_dot_product_attention
        attended = attend(q, k, v, attn_mask=seen, scale=scale, enable_gqa=len(q) != len(k))
        pieces.append(attended.transpose(0, 1))
    return torch.cat(pieces)


def grouped_varlen(*arguments, enable_gqa, **options):
    assert enable_gqa
    return naive_varlen(*arguments, enable_gqa=True, **options)


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])  # alone; groups cut in two; all together
@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("attention", ["blocks", "varlen", "varlen of torch 2.11"])
@pytest.mark.parametrize("family", lib.policy.FAMILIES)
def test_packs_equal_one_by_one_forwards(family, attention, share_prompts, max_tokens, monkeypatch):
    model = double_model(seed=3, family=MODELS[family])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers makes these as zeros
            torch.nn.init.normal_(parameter)
    rollouts = make_rollouts(12, group=4)
    expected = one_by_one(model, rollouts)
    policy = Policy(model)
    if attention != "blocks":
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(packing, "varlen_attn", grouped_varlen if attention == "varlen" else naive_varlen)
    logprobs = in_batches(policy, rollouts, max_tokens, share_prompts)
    torch.testing.assert_close(logprobs, expected, atol=1e-12, rtol=0)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    gradients = []
    for values in (logprobs, expected):
        policy.zero_grad()
        (weights * values).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=0)


def test_the_longest_sequence_is_tried_and_forgotten(monkeypatch):
    """On a GPU, before the first step: a full micro-batch, its gradient, and nothing is left of it."""
    policy, tried = Policy(tiny_model()), []
    optimizer = torch.optim.AdamW(policy.parameters())
    cfg = SimpleNamespace(max_response_tokens=9, micro_batch_tokens=40)

    def loss_of(batch):
        if tried:
            raise torch.OutOfMemoryError
        tried.append(batch.position_ids.flatten().tolist())
        loss = policy(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))[0].sum()
        loss.register_hook(lambda gradient: tried.append("backward"))
        return loss

    lib.policy.try_longest(cfg, {"a": [2, 3], "b": [2, 4, 3]}, optimizer, loss_of)
    assert not tried  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lib.policy.try_longest(cfg, {"a": [2, 3], "b": [2, 4, 3]}, optimizer, loss_of)
    assert tried == [3 * list(range(3 + 9 - 1)), "backward"] and not optimizer.state
    assert all(parameter.grad is None for parameter in policy.parameters())
    with pytest.raises(InputError, match="or one sequence of 3 . 9 tokens, does not fit"):
        lib.policy.try_longest(cfg, {"b": [2, 4, 3]}, optimizer, loss_of)


def test_only_tested_families_are_trained(tmp_path):
    transformers.GPTNeoXConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="of the family 'gpt_neox', but only llama, qwen2, qwen3 are tested"):
        lib.policy.check_checkpoint(str(tmp_path), 100)
    lib.policy.check_checkpoint(str(tmp_path), 100, packs=False)  # any may be evaluated


def test_models_whose_sequences_would_see_each_other_or_less_are_refused():
    """Nemotron's layers drop what its attention would need to keep sequences apart; a window would be ignored."""
    sizes = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    model = transformers.NemotronForCausalLM(transformers.NemotronConfig(hidden_size=16, num_hidden_layers=2, **sizes))
    with pytest.raises(RuntimeError, match="NemotronForCausalLM does not pass `packing` on to its attention"):
        in_batches(Policy(model), make_rollouts(2), 1000)
    window = dict(layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=3)
    with pytest.raises(InputError, match="model '' uses sliding-window attention"):
        in_batches(Policy(tiny_model(family="Qwen2", **window)), make_rollouts(2), 1000)


def test_packs_are_filled_and_dealt_out_evenly(monkeypatch):
    rollouts = make_rollouts(40, shortest=3)
    total = sum(len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts)
    assert len(make_batches(rollouts, 50, CPU, False)) <= total // 50 + 2
    monkeypatch.setattr(packing, "world_size", lambda: 7)
    loads = []
    for rank in range(7):
        monkeypatch.setattr(packing, "rank", lambda: rank)
        loads.append(sum(batch.input_ids.numel() for batch in make_batches(rollouts, 16, CPU)))
    assert max(loads) - min(loads) <= 16


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
