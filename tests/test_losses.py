"""The stages' mathematics in float64, against the formulas written out naively and against autograd."""

import random

import pytest
import torch
from conftest import double_model

import fkl_warmup
import opd
import teacher_grpo
from common import Problem, Rollout
from lib.packing import make_batches
from lib.policy import Policy

CPU = torch.device("cpu")


def make_rollouts(count: int = 6, seed: int = 0, group: int = 2, shortest: int = 0) -> list[Rollout]:
    """Random tokens of random lengths; some responses are empty."""
    rng = random.Random(seed)
    rollouts = []
    for index in range(count):
        if index % group == 0:  # the prompt of a group
            prompt = [rng.randrange(2, 20) for _ in range(rng.randint(1, 6))]
        response = [rng.randrange(2, 20) for _ in range(rng.randint(shortest, 7))]
        logprobs = [-rng.random() * 3 for _ in response]
        problem = Problem(str(index // group), "", "1")
        rollouts.append(Rollout(problem, index % group, prompt, response, logprobs, "stop", ""))
    if shortest == 0:
        rollouts[1].response_ids, rollouts[1].logprobs = [], []
    return rollouts


def double_policy(**options) -> Policy:
    return Policy(double_model(**options))


def all_weights(policy: Policy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def naive_logits(model: torch.nn.Module, rollout: Rollout) -> torch.Tensor:
    """(R, V) logits for a rollout's response tokens, from one unpadded forward of the plain model."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    return model(ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]


def gradients(policy: Policy, loss: torch.Tensor) -> list[torch.Tensor]:
    policy.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in policy.parameters()]


# The micro-batch size decides how sequences are packed; none of it may be seen in a loss.
SPLITS = [1, 12, 30, 10_000]


def sampled_kl(q, p, tokens, sampler):
    """The policy gradient with Eq. 3's same-token term as reward, weighted by trainer over sampler, at most 0.1."""
    q, p = (x.gather(1, tokens[:, None]).squeeze(1) for x in (q, p))
    return -((q - sampler).exp().clamp(max=0.1) * (p - q)).detach().mul(q).sum()


LOSSES = {  # ours, and the equation: of log pi_theta (q), log pi_T (p), the tokens and the sampler's log-probabilities
    "forward": (
        lambda student, teacher, batch: fkl_warmup.forward_kl_loss(student, teacher, batch, 26).loss,
        lambda q, p, *_: (p.exp() * (p - q)).sum(),
    ),
    "reverse": (
        lambda student, teacher, batch: opd.exact_kl_loss(student, teacher, batch, 26).loss,
        lambda q, p, *_: (q.exp() * (q - p)).sum(),
    ),
    "sampled": (
        lambda student, teacher, batch: opd.sampled_kl_loss(student, teacher, batch, 26, importance_cap=0.1).loss,
        sampled_kl,
    ),
    "sft": (
        lambda student, teacher, batch: fkl_warmup.sft_loss(student, batch),
        lambda q, p, tokens, *_: torch.nn.functional.nll_loss(q, tokens, reduction="sum"),
    ),
}


@pytest.mark.parametrize("micro_batch_tokens", SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_distillation_losses_are_the_equations(name, micro_batch_tokens):
    student, teacher = double_policy(seed=1), double_policy(seed=2, hidden_size=24, tied=False)
    rollouts, (loss_fn, equation) = make_rollouts(), LOSSES[name]
    expected = 0.0
    for rollout in rollouts:
        if rollout.response_ids:
            q, p = (naive_logits(policy.model, rollout).log_softmax(-1) for policy in (student, teacher))
            sampler = torch.tensor(rollout.logprobs, dtype=torch.float32)
            expected = expected + equation(q, p.detach(), torch.tensor(rollout.response_ids), sampler)
    batches = make_batches(rollouts, micro_batch_tokens, CPU, share_prompts=True)
    loss = sum(loss_fn(student, teacher, batch) for batch in batches)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(student, loss), gradients(student, expected)):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def naive_grpo(logprobs, old, ref, advantages, weights, clip_ratio, kl_coef):
    total = 0.0
    for logp, logp_old, logp_ref, advantage, weight in zip(logprobs, old, ref, advantages, weights):
        ratio = (logp - logp_old).exp()
        surrogate = min(ratio * advantage, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage)
        k3 = (logp_ref - logp).exp() - (logp_ref - logp) - 1
        total = total - weight * surrogate + kl_coef * k3
    return total


def test_grpo_loss_against_the_formula_and_gradcheck():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(40, dtype=torch.float64, generator=generator)
    old, ref, advantages, weights = -draw().abs(), -draw().abs(), draw(), draw().abs()
    logprobs = (old + 0.3 * draw()).requires_grad_()  # ratios on both sides of the clip range
    arguments = (old, ref, advantages, weights, 0.2, 0.1)
    loss, sums = teacher_grpo.grpo_loss(logprobs, *arguments)
    torch.testing.assert_close(loss, naive_grpo(logprobs, *arguments))
    assert 0 < sums["clip_fraction"] < 40
    assert torch.autograd.gradcheck(lambda x: teacher_grpo.grpo_loss(x, *arguments)[0], logprobs)


def updated(rollouts, advantages, reference=True, **settings):
    """Weights after one `update` with plain SGD, and its metrics."""
    policy = double_policy(seed=1)
    other = double_policy(seed=3) if reference else None
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        rollout.advantage = advantage
    cfg = teacher_grpo.Config(model="", data="", out="", rollouts_per_prompt=2, **settings)
    metrics = teacher_grpo.update(policy, other, torch.optim.SGD(policy.parameters()), rollouts, 0.1, cfg)
    return all_weights(policy), metrics


@pytest.mark.parametrize("micro_batch_tokens", SPLITS)
@pytest.mark.parametrize("mini_batch_prompts, inner_epochs", [(2, 1), (1, 1), (1, 2)])
def test_an_update_is_the_naive_gradient_step(mini_batch_prompts, inner_epochs, micro_batch_tokens):
    """Or several steps, of which the later ones compare the policy with what it was before the first."""
    rollouts = make_rollouts(4, shortest=1)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    policy, reference = double_policy(seed=1), double_policy(seed=3)

    def token_logprobs(policy, rollout):
        index = torch.tensor(rollout.response_ids)[:, None]
        return naive_logits(policy.model, rollout).log_softmax(-1).gather(1, index).squeeze(1)

    with torch.no_grad():
        old, ref = ([token_logprobs(model, rollout) for rollout in rollouts] for model in (policy, reference))
    norms, mismatches, size = [], [], 2 * mini_batch_prompts
    for start in [*range(0, 4, size)] * inner_epochs:
        total, chosen = 0.0, range(start, start + size)
        for i in chosen:
            mismatches.append(old[i] - torch.tensor(rollouts[i].logprobs, dtype=torch.float32))
            weights = mismatches[-1].exp().clamp(max=0.1)
            logprobs = token_logprobs(policy, rollouts[i])
            total = total + naive_grpo(logprobs, old[i], ref[i], [advantages[i]] * len(ref[i]), weights, 0.2, 5e-4)
        found = gradients(policy, total / sum(len(rollouts[i].response_ids) for i in chosen))
        norms.append(torch.cat([gradient.flatten() for gradient in found]).norm().item())
        with torch.no_grad():
            for parameter, gradient in zip(policy.parameters(), found):
                parameter -= 0.1 * min(1.0, 1.0 / (norms[-1] + 1e-6)) * gradient
    settings = dict(micro_batch_tokens=micro_batch_tokens, mini_batch_prompts=mini_batch_prompts, importance_cap=0.1)
    weights, metrics = updated(rollouts, advantages, inner_epochs=inner_epochs, **settings)
    torch.testing.assert_close(weights, all_weights(policy), atol=1e-9, rtol=1e-7)
    mismatch = torch.cat(mismatches)  # log of trainer over sampler probability
    clipped = (mismatch.exp() > 0.1).double().mean().item()
    expected = dict(grad_norm=sum(norms) / len(norms), importance_clipped=clipped)
    expected |= dict(sampler_mismatch=mismatch.abs().mean().item(), sampler_mismatch_max=mismatch.abs().max().item())
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6) and 0 < clipped < 1


def test_rollouts_from_which_nothing_can_be_learnt_cost_no_pass():
    """Without a KL term an advantage of 0 changes no weight, so the update is that of all rollouts."""
    rollouts = make_rollouts(8, group=4, shortest=1)
    advantages = torch.tensor([0.0] * 4 + [1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    few, metrics = updated(rollouts, advantages, reference=False, mini_batch_prompts=2)
    everything, full = updated(rollouts, advantages, kl_coef=0.0, mini_batch_prompts=2)
    torch.testing.assert_close(few, everything, atol=1e-12, rtol=0)
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx(full[name], abs=1e-12)
    tokens = [len(rollout.response_ids) for rollout in rollouts]
    assert metrics["frac_tokens_trained"] == pytest.approx(sum(tokens[4:7]) / sum(tokens))
    assert full["frac_tokens_trained"] == 1
    unmoved, metrics = updated(rollouts, 0 * advantages, reference=False)
    assert torch.equal(unmoved, all_weights(double_policy(seed=1))) and metrics["grad_norm"] == 0.0
    moved, _ = updated(rollouts, 0 * advantages, kl_coef=1.0)
    assert not torch.allclose(moved, unmoved)
