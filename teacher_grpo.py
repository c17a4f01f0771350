"""Stage 1: GRPO with the sparse verifiable reward, on the teacher (§2, "sparse RL"; settings of Table 9).

    max_theta  E_{y ~ pi_theta} R(x, y) - beta KL(pi_theta || pi_ref),    R(x, y) = 1 if the answer is right, else 0

Per step: sample G responses of each prompt, reward them, normalise within the group, and take PPO-clipped updates.

Our choices where the paper is silent, and what departs from other GRPO implementations:
- The loss is a token mean over the whole mini-batch, all ranks and micro-batches together; not a mean of sequence means.
- Advantages are divided by the group's standard deviation, as in original GRPO (`--no-normalize-by-std` does not).
- The KL to the reference is the k3 estimator inside the loss, not a penalty on the reward.
- Table 9's "GRPO epochs 10" is read as passes over the data (`passes`); optimisation passes over each rollout batch are
  a setting of their own (`inner_epochs`, 1).
- Table 9's mini-batch of 8 counts prompts, as in the paper's stack; each brings all its G rollouts.
- Where sampler and trainer disagree on a token's probability, its term is weighted by their truncated ratio.
- An answer counts only if the response was finished, not cut at the length limit.

One process:   python teacher_grpo.py --model Qwen/Qwen3-8B --data dapo --half 1H --out runs/teacher
Eight GPUs:    torchrun --nproc_per_node=8 teacher_grpo.py --model Qwen/Qwen3-8B --data dapo --half 1H \
                   --out runs/teacher --activation-checkpointing
The toy:       make demo
Direct GRPO (route R1) is this script on the base student.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import checkpoints
import common
import memory
import records
from common import InputError, Policy
from engines import Sampling, check_engine, make_engine, sample_rollouts
from kernels import fused_linear_logprob
from records import Batch, Rollout
from verifier import Verifier


@dataclass
class Config:
    model: str  # checkpoint to train: a directory, or a name on the hub
    data: str  # labelled problems: dapo, a .jsonl or .parquet file, or owner/name:split on the hub
    out: str  # checkpoint directory to write
    half: Literal["full", "1H", "2H"] = "full"  # which of the two fixed random halves of the data to train on (§6)
    split_seed: int = 0  # of the halves: the same in every stage of a route
    exclude: tuple[str, ...] = ("math500", "aime24", "aime25")  # evaluation sets, whose problems are never trained on
    passes: int = 10  # over the data (Table 9: "GRPO epochs")
    max_steps: int | None = None  # stop after this many rollout batches
    prompts_per_step: int = 32  # prompts in a rollout batch; not in the paper
    mini_batch_prompts: int = 8  # prompts in an optimizer step (Table 9)
    inner_epochs: int = 1  # optimisation passes over each rollout batch
    group_size: int = 8  # G, rollouts per prompt; not in the paper
    temperature: float = 1.0  # of sampling and of every logprob; not in the paper
    max_prompt_tokens: int = 3072  # Table 9
    max_response_tokens: int = 16384  # Table 9
    instruction: str = records.INSTRUCTION  # appended to each problem; the paper's is not given
    thinking: bool = False  # Qwen3's thinking mode; not stated, the baselines' scores fit its being off
    require_finished: bool = True  # no reward for a response cut at the length limit
    clip_ratio: float = 0.2  # Table 9
    kl_coef: float = 5e-4  # beta, to the stage's initial policy (Table 9)
    normalize_by_std: bool = True  # divide advantages by the group's standard deviation
    importance_cap: float = 2.0  # of the truncated trainer/sampler weights
    lr: float = 1e-6  # Table 9
    lr_schedule: Literal["constant", "cosine"] = "constant"  # not in the paper; cosine ends at a tenth
    warmup_steps: int = 0  # of the learning rate
    weight_decay: float = 0.01  # not in the paper
    max_grad_norm: float = 1.0  # Table 9
    micro_batch_tokens: int = 16384  # positions in one forward and backward pass; lower it when memory runs out
    max_sequences: int = 512  # sequences that a rank samples at a time; likewise
    engine: Literal["auto", "torch", "vllm"] = "auto"  # sampler; auto is vLLM where it and a GPU are present
    tensor_parallel: int = 1  # ranks that share one vLLM engine, for models that one GPU cannot sample from
    shard_nodes: int = 1  # nodes that hold the weights between them, for models too large for one
    kv_cache_gib: float = 16.0  # vLLM's key/value cache on each GPU (on a CPU 0.25)
    activation_checkpointing: bool = False  # recompute activations in the backward pass; saves memory
    seed: int = 0  # of the order of the data and of every sample
    save_every: int = 20  # steps between training states that --resume can continue from
    dry_run: bool = False  # print what each GPU would hold, and stop
    resume: bool = False  # continue an interrupted run of the same settings, if there is one


def group_advantages(rewards: Tensor, normalize_by_std: bool = True) -> Tensor:
    """Rewards (P, G) relative to their group's mean, in units of its standard deviation (DeepSeekMath, Eq. for A_i).

    A group whose rewards are all equal teaches nothing: its advantages are exactly 0.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    if normalize_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6)
    return advantages


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || pi_ref) from tokens sampled by pi: unbiased, never negative. Any shape."""
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
    """The GRPO loss *summed* over tokens, and sums of what is logged; all arguments (N,) over response tokens.

        sum_t  w_t max(-rho_t A_t, -clip(rho_t, 1 - eps, 1 + eps) A_t) + beta k3_t,    rho_t = exp(log pi - log pi_old)

    `importance_weights` w are the truncated ratios of trainer to sampler; no gradient passes through them.
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


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollouts: list[Rollout],
    advantages: Tensor,
    lr: float,
    cfg: Config,
) -> dict[str, float]:
    """`inner_epochs` passes over the mini-batches of one rollout batch; returns token means of what is logged.

    `rollouts` are those of all ranks, grouped by prompt; `advantages` (P*G,) are theirs.
    """
    device = advantages.device

    def token_logprobs(model: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
        head = lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets, cfg.temperature)  # noqa: E731
        return model(batch, head)

    size = cfg.mini_batch_prompts * cfg.group_size
    mini_batches = []
    for start in range(0, len(rollouts), size):
        chosen = rollouts[start : start + size]
        batches = records.make_batches(chosen, cfg.micro_batch_tokens, device)
        mini_batches.append((records.count_tokens(chosen), advantages[start : start + size], batches))
    # The policy that rho is relative to is the trainer's own, before the first update of this rollout batch. The first
    # mini-batch is seen by that policy anyway, and needs no pass of its own.
    old_logprobs, ref_logprobs = {}, {}
    with torch.no_grad():
        for number, (*_, batches) in enumerate(mini_batches):
            for batch in batches:
                if number > 0:
                    old_logprobs[id(batch)] = token_logprobs(policy, batch)[0]  # (N,)
                ref_logprobs[id(batch)] = token_logprobs(reference, batch)[0] if reference else None
    common.release(reference)

    totals: dict[str, float] = {}
    norms, tokens, worst_mismatch = [], 0, 0.0
    for _ in range(cfg.inner_epochs):
        for num_tokens, mini_advantages, batches in mini_batches:
            mini_loss = 0.0
            for batch in batches:
                logprobs, entropy = token_logprobs(policy, batch)  # (N,), (N,)
                old = old_logprobs.setdefault(id(batch), logprobs.detach())
                ratio_to_sampler = torch.exp(old - batch.sampler_logprobs)
                loss, sums = grpo_loss(
                    logprobs,
                    old,
                    ref_logprobs[id(batch)],
                    mini_advantages[batch.rollout_index],
                    ratio_to_sampler.clamp(max=cfg.importance_cap),
                    cfg.clip_ratio,
                    cfg.kl_coef,
                )
                (loss / num_tokens).backward()
                mismatch = (old - batch.sampler_logprobs).abs()
                sums["entropy"] = entropy.sum()
                sums["sampler_mismatch"] = mismatch.sum()
                sums["importance_clipped"] = (ratio_to_sampler > cfg.importance_cap).sum()
                worst_mismatch = max(worst_mismatch, mismatch.max().item() if len(mismatch) else 0.0)
                mini_loss += sums["loss"].item()
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value.item()
            tokens += num_tokens
            norms.append(common.optimizer_step(policy, optimizer, mini_loss, lr, cfg.max_grad_norm))
    means = {name: total / tokens for name, total in common.all_sum(totals).items()}
    worst = common.all_max({"sampler_mismatch_max": worst_mismatch})
    taken = [norm for norm in norms if math.isfinite(norm)]
    return {
        **means,
        **worst,
        "grad_norm": sum(taken) / len(taken) if taken else math.nan,
        "skipped_steps": len(norms) - len(taken),
    }


def main(cfg: Config) -> None:
    common.check_settings(cfg)
    if cfg.group_size < 2:
        raise InputError(f"--group-size {cfg.group_size} leaves nothing to compare a rollout with; give 2 or more")
    problems = records.load_training_problems(cfg.data, cfg.half, cfg.split_seed, cfg.exclude)
    tokenizer = records.load_tokenizer(cfg.model)
    common.check_checkpoint(cfg.model, len(tokenizer))
    prompts = records.tokenize_prompts(tokenizer, problems, cfg.instruction, cfg.thinking, cfg.max_prompt_tokens)
    if cfg.dry_run:
        return memory.report(cfg, cfg.model if cfg.kl_coef else None, in_loss=False)
    check_engine(cfg, cfg.model)
    with checkpoints.Run(cfg, parents={"model": cfg.model}) as run, Verifier() as verifier:
        torch.manual_seed(cfg.seed)
        device = common.this_device()
        policy = common.load_policy(cfg.model, True, cfg.activation_checkpointing, cfg.shard_nodes)
        reference = common.load_policy(cfg.model, trainable=False, shard_nodes=cfg.shard_nodes) if cfg.kl_coef else None
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer)
        engine = make_engine(cfg, cfg.model, tokenizer, policy)
        sampling = Sampling(cfg.max_response_tokens, cfg.temperature)

        batches = records.problem_batches(problems, cfg.prompts_per_step, cfg.passes, cfg.seed)[: cfg.max_steps]
        common.say(
            "The loss below reads near zero, and should: a group's advantages sum to zero, so before the first update of a "
            "rollout batch the loss is about 0 whatever the policy; its gradient is not. Watch the reward."
        )

        for step in run.steps(len(batches)):
            engine.sync(policy)
            with run.phase("rollout"):
                rollouts = sample_rollouts(
                    engine, tokenizer, batches[step], prompts, cfg.group_size, sampling, (cfg.seed, step)
                )
            with run.phase("verify"):
                records.grade(rollouts, verifier)
            engine.sleep()
            finished = torch.tensor([r.finish_reason == "stop" or not cfg.require_finished for r in rollouts])
            rewards = torch.tensor([float(r.correct) for r in rollouts]) * finished  # (P*G,) R(x, y)
            groups = rewards.view(-1, cfg.group_size)  # (P, G)
            advantages = group_advantages(groups, cfg.normalize_by_std).flatten().to(device)  # (P*G,)
            lr = common.learning_rate(step, len(batches), cfg.lr, cfg.lr_schedule, cfg.warmup_steps)
            with run.phase("update"):
                metrics = update(policy, reference, optimizer, rollouts, advantages, lr, cfg)
            run.consume(batches[step])
            run.log(
                step,
                {
                    "reward": rewards.mean().item(),
                    "groups_without_spread": (groups.std(dim=1, correction=0) == 0).float().mean().item(),
                    **records.response_statistics(rollouts),
                    **metrics,
                    "lr": lr,
                },
                show=("reward", "response_tokens", "kl_to_reference", "loss"),
            )
            run.stop_if_repeated(step, metrics["skipped_steps"], rollouts)
            run.checkpoint(step + 1, policy, optimizer)
        run.finish(policy, tokenizer, len(batches))


if __name__ == "__main__":
    common.cli(main, Config)
