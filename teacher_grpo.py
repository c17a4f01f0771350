r"""Stage 1: GRPO with the sparse verifiable reward, on the teacher (Sections 2 and 3).

    maximise  E_{y ~ pi_theta} R(x, y) - beta KL(pi_theta || pi_ref),    R(x, y) = 1 if the answer is right, else 0

The optimum is pi*_R(y | x), proportional to pi_ref(y | x) exp(R(x, y) / beta) (Eq. 1). The teacher pi_T trained here
serves as its proxy in the later stages (Eq. 2). Each step samples G responses to every prompt of a rollout batch,
rewards them, compares each with its group, and takes one PPO-clipped update per mini-batch. `--max-steps`,
validation, saving and the learning-rate schedule count these steps, not the updates.

The paper gives GRPO settings for direct RL and Stage 3 (Table 8), but none for Stage 1. We use the same ones.

Differences from common GRPO implementations: - The loss is the mean over all response tokens of a mini-batch, across
ranks and micro-batches, so long responses weigh   more. It is not a mean of per-response means. - The KL to the
reference policy is the k3 estimate, added to the loss and not subtracted from the reward. - The sampler and the
trainer compute slightly different probabilities of a token. Truncated importance sampling (TIS)   corrects for it:
the policy-gradient term of each token, but not its KL term, is multiplied by the trainer's   probability over the
sampler's, at most 2. - A response cut at the length limit gets no reward from the verifier. A `--reward` function is
told how a response   ended, and its value is used unchanged.

Our choices where the paper is silent:
- "GRPO epochs 10" in Table 8 is read as 10 passes over the data. Each rollout batch gets one pass of updates.
- "Mini-batch 8" in Table 8 counts prompts, as in the authors' earlier code; with G = 8 a mini-batch has 64 responses.
- Advantages are divided by the group's standard deviation, as in the original GRPO (switch it off with
  `--no-normalize-by-std`).

    One process:   python teacher_grpo.py --model Qwen/Qwen3-0.6B --data dapo --half 1H --out runs/teacher
    Eight GPUs:    torchrun --nproc_per_node=8 teacher_grpo.py --model Qwen/Qwen3-8B --data dapo --half 1H \
                       --out runs/teacher --activation-checkpointing
    Direct GRPO:   torchrun --nproc_per_node=8 teacher_grpo.py --model Qwen/Qwen3-1.7B --data dapo --out runs/direct \
                       --activation-checkpointing
    The toy:       make demo
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

import common
from common import Batch, InputError, Rollout, TrainingConfig
from kernels import fused_linear_logprob
from lib import data
from lib.engines import Sampling, make_engine
from lib.packing import make_batches
from lib.policy import Policy, load_policy, release, try_longest
from lib.rewards import grade, make_grader
from lib.rollouts import sample_rollouts
from lib.runs import Run, prepare
from lib.scores import Validation


@dataclass
class Config(TrainingConfig):
    # main settings
    model: str  # checkpoint to train: a directory, or a name on the hub
    epochs: int = 10  # passes over the data, unless --max-steps is given (Table 8: "GRPO epochs")
    lr: float = 1e-6  # learning rate (Table 8)
    rollouts_per_prompt: int = 8  # responses sampled for each prompt: the group size G (not given in Table 8)
    # GRPO
    prompts_per_step: int = 32  # prompts in a rollout batch: four mini-batches, as in the authors' earlier code
    mini_batch_prompts: int = 8  # prompts in an optimizer step (Table 8)
    inner_epochs: int = 1  # passes of updates over each rollout batch
    require_finished: bool = True  # the verifier rewards only responses that ended before the length limit
    clip_ratio: float = 0.2  # epsilon: the policy ratio is clipped to 1 - epsilon .. 1 + epsilon (Table 8)
    kl_coef: float = 5e-4  # beta, weight of the KL to the stage's initial policy (Table 8); 0 drops the reference model
    normalize_by_std: bool = True  # divide advantages by the group's standard deviation
    importance_cap: float = 2.0  # largest importance weight: a token's probability in the trainer over the sampler's
    # sampling
    temperature: float = 1.0  # divides the logits in sampling and in every log-probability (authors' earlier code)
    max_prompt_tokens: int = 3072  # longest prompt (Table 8)
    max_response_tokens: int = 16384  # length at which a response is cut (Table 8)


def rewards_of(rollouts: list[Rollout], require_finished: bool) -> Tensor:
    """R(x, y) of each rollout, (P*G,): 1 if its answer is right, else 0.

    With `require_finished` a response cut at the length limit also gets 0. With `--reward`, R is that function's value.
    """

    def reward(rollout: Rollout) -> float:
        if rollout.reward is not None:  # set by --reward
            return rollout.reward
        return float(bool(rollout.correct) and (rollout.finish_reason == "stop" or not require_finished))

    return torch.tensor([reward(rollout) for rollout in rollouts])


def group_advantages(rewards: Tensor, normalize_by_std: bool = True) -> Tensor:
    """Rewards (P, G) relative to their group's mean, in units of its standard deviation (DeepSeekMath, Section 4.1).

    If the rewards of a group are all equal, its advantages are exactly 0, and only the KL term acts on its tokens. The
    division gives any spread full weight: a slight length penalty in a group of right answers yields advantages of 1.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    if normalize_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6)
    # The mean of equal numbers may differ from them by a rounding error, which the division would amplify.
    return advantages.masked_fill(no_spread(rewards)[:, None], 0.0)


def no_spread(rewards: Tensor) -> Tensor:
    """Whether all rewards of a group are equal: (P, G) -> (P,) bool."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref), Eq. 1's regulariser, of each token. Any shape; never negative.

    The value is unbiased as long as pi is the policy that sampled the tokens. Used as a loss, which is the common
    practice, its expected gradient is that of KL(pi_ref || pi), the other direction. Near the reference the two agree.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    importance_weights: Tensor,
    clip_ratio: float,
    kl_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss of Eq. 1, *summed* over response tokens, and the sums to log. Tensor arguments are (N,).

        sum_t  w_t max(-rho_t A_t, -clip(rho_t, 1 - eps, 1 + eps) A_t) + beta k3_t,    rho_t = exp(log pi - log pi_old)

    It is minimised. `importance_weights` w are truncated ratios of trainer to sampler probabilities, without gradient.
    At an unclipped token the gradient with respect to log pi is -w rho A + beta (1 - exp(log pi_ref - log pi)). The
    loss value does not measure progress: at rho = 1 its first term sums advantages, whose mean over a group is zero.
    """
    ratio = torch.exp(logprobs - old_logprobs)  # (N,)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages
    loss = (importance_weights * torch.maximum(unclipped, clipped)).sum()
    sums = {"clip_fraction": (clipped > unclipped).sum()}
    if ref_logprobs is not None:
        kl = kl_k3(logprobs, ref_logprobs).sum()
        loss = loss + kl_coef * kl
        sums["kl_to_reference"] = kl
    sums["loss"] = loss
    return loss, {name: value.detach() for name, value in sums.items()}


def token_logprobs(policy: Policy, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(y_t | s_t) of the batch's response tokens, (N,), and the entropy of each distribution, (N,)."""
    return policy(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets, temperature))


def train_mini_batch(
    policy: Policy, optimizer: torch.optim.Optimizer, batches: list[Batch], num_tokens: int, lr: float, cfg: Config
) -> tuple[dict[str, float], float, float]:
    """One optimizer step on the micro-batches of a mini-batch with `num_tokens` response tokens over all ranks.

    Returns the sums to log and the largest sampler mismatch, both over this rank's tokens, and the gradient norm (nan
    if the step was skipped because the loss or the norm was not finite).
    """
    sums: dict[str, float] = defaultdict(float)
    worst_mismatch = 0.0
    for batch in batches:
        logprobs, entropy = token_logprobs(policy, batch, cfg.temperature)  # (N,), (N,)
        if batch.old_logprobs is None:  # the first mini-batch of `update`, before any update: pi is still pi_old
            batch.old_logprobs = logprobs.detach()
        mismatch = batch.old_logprobs - batch.sampler_logprobs  # (N,) log of trainer over sampler probability
        ratio = mismatch.exp()
        weights = ratio.clamp(max=cfg.importance_cap)
        loss, logged = grpo_loss(
            logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages, weights, cfg.clip_ratio, cfg.kl_coef
        )
        (loss / num_tokens).backward()  # gradients add up over micro-batches and ranks
        logged["entropy"] = entropy.sum()
        logged["sampler_mismatch"] = mismatch.abs().sum()
        logged["importance_clipped"] = (ratio > cfg.importance_cap).sum()
        logged["tokens_trained"] = torch.tensor(len(ratio))
        for name, value in logged.items():
            sums[name] += value.item()
        worst_mismatch = max(worst_mismatch, mismatch.abs().max().item() if len(mismatch) else 0.0)
    grad_norm = common.optimizer_step(policy, optimizer, sums["loss"], lr, cfg.max_grad_norm)
    return sums, worst_mismatch, grad_norm


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollouts: list[Rollout],
    lr: float,
    cfg: Config,
) -> dict[str, float]:
    """`inner_epochs` passes over the mini-batches of one rollout batch.

    `rollouts` are those of all ranks, grouped by prompt, with their advantages. Without a KL term, rollouts whose
    advantage is 0 have no gradient and are left out, but their tokens still count in the loss's denominator.

    Returns the metrics to log: the loss per response token; means over the tokens that went through the model, and
    their fraction (`frac_tokens_trained`); the largest sampler mismatch, the mean gradient norm, and the number of
    skipped optimizer steps.
    """
    size = cfg.mini_batch_prompts * cfg.rollouts_per_prompt
    mini_batches = []
    for start in range(0, len(rollouts), size):
        chosen = rollouts[start : start + size]
        learnt_from = [rollout for rollout in chosen if rollout.advantage or reference is not None]
        batches = make_batches(learnt_from, cfg.micro_batch_tokens, common.this_device())
        mini_batches.append((batches, common.count_tokens(chosen)))

    # The ratio rho is relative to the trainer's own policy before the first update of this rollout batch. Later
    # mini-batches are trained after updates, so their old log-probabilities are computed here. The first is trained
    # before any update, so `train_mini_batch` takes them from the training pass itself.
    with torch.no_grad():
        for number, (batches, _) in enumerate(mini_batches):
            for batch in batches:
                if number > 0:
                    batch.old_logprobs, _ = token_logprobs(policy, batch, cfg.temperature)  # (N,)
                if reference is not None:
                    batch.ref_logprobs, _ = token_logprobs(reference, batch, cfg.temperature)  # (N,)
    release(reference)  # without a backward pass FSDP2 keeps the output matrix gathered

    totals: dict[str, float] = defaultdict(float)
    norms, worst_mismatch, num_tokens = [], 0.0, 0  # num_tokens: of all rollouts
    for _ in range(cfg.inner_epochs):
        for batches, tokens in mini_batches:
            sums, worst, grad_norm = train_mini_batch(policy, optimizer, batches, tokens, lr, cfg)
            for name, value in sums.items():
                totals[name] += value
            worst_mismatch, num_tokens = max(worst_mismatch, worst), num_tokens + tokens
            norms.append(grad_norm)
    taken = [norm for norm in norms if math.isfinite(norm)]
    totals = common.all_sum(totals)
    loss, trained = totals.pop("loss"), totals.pop("tokens_trained")
    return {
        "loss": loss / num_tokens,
        "frac_tokens_trained": trained / num_tokens,
        **{name: total / max(trained, 1) for name, total in totals.items()},
        **common.all_max({"sampler_mismatch_max": worst_mismatch}),
        "grad_norm": sum(taken) / len(taken) if taken else math.nan,
        "skipped_steps": len(norms) - len(taken),
    }


def main(cfg: Config, prepared: tuple | None = None) -> None:
    """Runs Stage 1, or Stage 3, which passes in the problems and prompts that it has `prepared`."""
    if cfg.rollouts_per_prompt < 2:
        raise InputError(
            f"--rollouts-per-prompt {cfg.rollouts_per_prompt} leaves nothing to compare a response with; give 2 or more"
        )
    problems, tokenizer, prompts, validation_sets = prepared or prepare(cfg)

    with Run(cfg, parents={"model": cfg.model}) as run, make_grader(cfg) as grader:
        torch.manual_seed(cfg.seed)
        policy = load_policy(cfg.model, cfg, trainable=True)
        reference = load_policy(cfg.model, cfg, trainable=False) if cfg.kl_coef else None
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer)
        engine = make_engine(cfg, cfg.model, tokenizer, policy)
        try_longest(cfg, prompts, optimizer, lambda batch: token_logprobs(policy, batch, cfg.temperature)[0].sum())
        validation = Validation(cfg, validation_sets, engine, grader, run)
        sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
        batches = data.problem_batches(problems, cfg.prompts_per_step, cfg.epochs, "grpo", cfg.seed, cfg.max_steps)

        for step in run.steps(len(batches)):
            validation.score(step, policy)

            # 1. Sample a group of responses to each prompt, reward them, and compare each with its group.
            with run.phase("rollout"):
                engine.sync(policy)
                rollouts = sample_rollouts(
                    engine, batches[step], prompts, cfg.rollouts_per_prompt, sampling, seed_key=(cfg.seed, step)
                )
                engine.sleep()
            with run.phase("verify"):
                grade(rollouts, grader)
            rewards = rewards_of(rollouts, cfg.require_finished).view(-1, cfg.rollouts_per_prompt)  # (P, G)
            advantages = group_advantages(rewards, cfg.normalize_by_std)  # (P, G)
            for rollout, reward, advantage in zip(rollouts, rewards.flatten().tolist(), advantages.flatten().tolist()):
                rollout.reward, rollout.advantage = reward, advantage

            # 2. Update the policy, one mini-batch after another.
            lr = common.learning_rate(step, len(batches), cfg.lr, cfg.lr_schedule, cfg.lr_warmup_steps)
            with run.phase("update"):
                metrics = update(policy, reference, optimizer, rollouts, lr, cfg)

            # 3. Log and save.
            zero_std = no_spread(rewards).float().mean()  # the share of groups whose advantages are all 0
            metrics |= {"reward": rewards.mean().item(), "frac_reward_zero_std": zero_std.item(), "lr": lr}
            metrics["accuracy"] = sum(rollout.correct for rollout in rollouts) / len(rollouts)  # whatever the reward is
            shown = ("reward", "frac_reward_zero_std", "truncated", "response_tokens", "kl_to_reference")
            run.log(step, metrics, rollouts, show=shown)
            run.save(step + 1, policy, optimizer, tokenizer, trained_on=batches[step])
        validation.score(len(batches), policy)
        run.finish(policy, tokenizer)


if __name__ == "__main__":
    common.cli(main, Config)
