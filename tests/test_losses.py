"""The stages' mathematics in float64, against the formulas written out naively and against autograd."""

import copy
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


def assert_same_gradients(policy: Policy, loss: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(policy, loss), gradients(policy, expected)):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


# The micro-batch size decides how sequences are packed; none of it may be seen in a loss.
SPLITS = [1, 12, 30, 10_000]


@pytest.mark.parametrize("micro_batch_tokens", SPLITS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distillation_losses_are_the_equations(direction, micro_batch_tokens):
    student, teacher = double_policy(seed=1), double_policy(seed=2, hidden_size=24, tied=False)
    rollouts = make_rollouts()
    expected = 0.0
    for rollout in rollouts:
        if rollout.response_ids:
            q = naive_logits(student.model, rollout).log_softmax(-1)  # pi_theta
            p = naive_logits(teacher.model, rollout).log_softmax(-1).detach()  # pi_T
            expected = expected + ((p.exp() * (p - q)).sum() if direction == "forward" else (q.exp() * (q - p)).sum())
    loss = 0.0
    for batch in make_batches(rollouts, micro_batch_tokens, CPU, share_prompts=True):
        before = copy.deepcopy(batch)
        loss_fn = fkl_warmup.forward_kl_loss if direction == "forward" else opd.exact_kl_loss
        kl = loss_fn(student, teacher, batch, 26)
        torch.testing.assert_close(kl.kl.sum(), kl.loss.detach())
        assert (kl.kl > -1e-12).all() and not kl.kl.requires_grad
        loss = loss + kl.loss
        for name, value in vars(batch).items():
            if value is not None:
                same = getattr(before, name)
                assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    assert_same_gradients(student, loss, expected)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("micro_batch_tokens", SPLITS)
def test_sft_loss_is_cross_entropy_on_response_tokens(micro_batch_tokens):
    student, rollouts = double_policy(), make_rollouts()
    expected = sum(
        torch.nn.functional.cross_entropy(naive_logits(student.model, r), torch.tensor(r.response_ids), reduction="sum")
        for r in rollouts
        if r.response_ids
    )
    batches = make_batches(rollouts, micro_batch_tokens, CPU, share_prompts=True)
    assert_same_gradients(student, sum(fkl_warmup.sft_loss(student, batch) for batch in batches), expected)


def test_sampled_estimator_has_the_exact_gradient_on_average():
    """Summing the one-sample gradient over every next token, weighted by its probability, gives the gradient of L_R."""
    student, teacher = double_policy(seed=1), double_policy(seed=2)
    prompt = [2, 5, 9, 3]
    vocabulary = student.model.config.vocab_size
    problem = Problem("0", "", "1")
    with torch.no_grad():
        logprobs = student.model(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)
    total = None
    for token in range(vocabulary):
        rollout = Rollout(problem, 0, prompt, [token], [logprobs[token].item()], "stop", "")
        [batch] = make_batches([rollout], 100, CPU, share_prompts=True)
        batch.sampler_logprobs = logprobs[token : token + 1]  # in float64, so that the weights are exactly 1
        loss = opd.sampled_kl_loss(student, teacher, batch, 26, importance_cap=2.0).loss
        weighted = [logprobs[token].exp() * gradient for gradient in gradients(student, loss)]
        total = weighted if total is None else [a + b for a, b in zip(total, weighted)]
    [batch] = make_batches([Rollout(problem, 0, prompt, [7], [0.0], "stop", "")], 100, CPU, share_prompts=True)
    exact = gradients(student, opd.exact_kl_loss(student, teacher, batch, 26).loss)
    for ours, theirs in zip(total, exact):  # the model's norms compute in float32
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


# GRPO


def test_group_advantages():
    """What no property fixes: the deviation is that of the population, and is no unit where it is not asked for."""
    double = lambda *values: torch.tensor([values], dtype=torch.float64)
    torch.testing.assert_close(
        teacher_grpo.group_advantages(double(1, 1, 0, 0)), double(1, 1, -1, -1), atol=1e-5, rtol=0
    )
    found = teacher_grpo.group_advantages(double(1, 0, 0, 0), normalize_by_std=False)
    torch.testing.assert_close(found, double(0.75, -0.25, -0.25, -0.25))


@pytest.mark.parametrize("reward", [10.1, 100.1, -0.3])
def test_equal_rewards_give_no_advantage_in_float32(reward):
    """Their mean may be a rounding error off, which would be divided by 1e-6."""
    rewards = torch.full((3, 8), reward)
    rewards[2, 0] += 1
    assert (teacher_grpo.group_advantages(rewards)[:2] == 0).all()
    assert (teacher_grpo.group_advantages(rewards, normalize_by_std=False)[:2] == 0).all()
    assert teacher_grpo.no_spread(rewards).tolist() == [True, True, False]


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
    norms, size = [], 2 * mini_batch_prompts
    for start in [*range(0, 4, size)] * inner_epochs:
        total, chosen = 0.0, range(start, start + size)
        for i in chosen:
            sampler = torch.tensor(rollouts[i].logprobs, dtype=torch.float32).double()
            weights = (old[i] - sampler).exp().clamp(max=2.0)
            logprobs = token_logprobs(policy, rollouts[i])
            total = total + naive_grpo(logprobs, old[i], ref[i], [advantages[i]] * len(ref[i]), weights, 0.2, 5e-4)
        found = gradients(policy, total / sum(len(rollouts[i].response_ids) for i in chosen))
        norms.append(torch.cat([gradient.flatten() for gradient in found]).norm().item())
        with torch.no_grad():
            for parameter, gradient in zip(policy.parameters(), found):
                parameter -= 0.1 * min(1.0, 1.0 / (norms[-1] + 1e-6)) * gradient
    settings = dict(micro_batch_tokens=micro_batch_tokens, mini_batch_prompts=mini_batch_prompts)
    weights, metrics = updated(rollouts, advantages, inner_epochs=inner_epochs, **settings)
    torch.testing.assert_close(weights, all_weights(policy), atol=1e-9, rtol=1e-7)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-6)


def test_a_stale_sampler_is_measured_and_capped():
    rollouts = make_rollouts(4, shortest=1)
    advantages = torch.ones(4, dtype=torch.float64)
    for rollout in rollouts:
        rollout.logprobs = [-40.0] * len(rollout.response_ids)  # the sampler gave these tokens almost no probability
    weights, metrics = updated(rollouts, advantages, importance_cap=2.0)
    assert metrics["importance_clipped"] == 1.0 and metrics["sampler_mismatch"] > 20
    assert metrics["sampler_mismatch_max"] >= metrics["sampler_mismatch"]
    uncapped, _ = updated(rollouts, advantages, importance_cap=1e30)
    assert torch.isfinite(weights).all() and not torch.allclose(weights, uncapped)


def test_groups_without_spread_move_nothing_but_the_kl():
    rollouts = make_rollouts(4)
    start = all_weights(double_policy(seed=1))
    unmoved, metrics = updated(rollouts, torch.zeros(4, dtype=torch.float64), reference=False)
    assert torch.equal(unmoved, start) and metrics["grad_norm"] == 0.0
    moved, _ = updated(rollouts, torch.zeros(4, dtype=torch.float64), kl_coef=1.0)
    assert not torch.allclose(moved, start)


def test_rollouts_from_which_nothing_can_be_learnt_cost_no_pass(monkeypatch):
    """Without a KL term an advantage of 0 changes no weight, so the update is that of all rollouts, in fewer positions."""
    rollouts = make_rollouts(8, group=4, shortest=1)
    advantages = torch.tensor([0.0] * 4 + [1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    computed = []
    make = teacher_grpo.make_batches
    record = lambda chosen, *rest: computed.append(len(chosen)) or make(chosen, *rest)
    monkeypatch.setattr(teacher_grpo, "make_batches", record)
    settings = dict(mini_batch_prompts=2)  # of two responses each, by the test's settings
    few, metrics = updated(rollouts, advantages, reference=False, **settings)
    assert computed == [0, 3]
    tokens = [len(rollout.response_ids) for rollout in rollouts]
    assert metrics["frac_tokens_trained"] == pytest.approx(sum(tokens[4:7]) / sum(tokens))
    monkeypatch.setattr(teacher_grpo, "make_batches", lambda chosen, *rest: make(rollouts[4:] if chosen else [], *rest))
    all_of_them, full = updated(rollouts, advantages, reference=False, **settings)
    torch.testing.assert_close(few, all_of_them, atol=1e-12, rtol=0)
    assert metrics["loss"] == pytest.approx(full["loss"], abs=1e-12) and metrics["grad_norm"] == full["grad_norm"]
    updated(rollouts, advantages, kl_coef=0.1, **settings)  # with a KL term all of them have a pass
    assert full["frac_tokens_trained"] > metrics["frac_tokens_trained"]
