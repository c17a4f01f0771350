"""Stage 2b: on-policy distillation, OPD (Eq. 4 of v1; settings of Table 10).

    L_R(theta) = E_{s ~ d_student} KL(pi_theta(. | s) || pi_T(. | s))

The current student samples; the frozen teacher is asked for its whole next-token distribution at every position of the
student's own responses; the student moves towards it. This is maximum-entropy RL with the dense token reward
r_T = beta log pi_T(y_t | s_t): -beta L_R is Eq. 2's J_0.

Is this really reverse KL? Yes: the student comes first in the KL and its samples are the states. As usual in OPD, the
gradient is taken at the sampled states and not through the sampling of them. `--estimator sampled` replaces the exact KL
at each state by its one-sample policy gradient, with the reward log pi_T - log pi_theta on the sampled token (later
versions of the paper, and most other code): the same gradient in expectation, with its variance.

Our choices where the paper is silent: L_R is a mean over tokens; one update per batch of rollouts, so every update is
exactly on-policy; Table 10's mini-batch of 64 counts prompts, each with all its 8 rollouts. The rollouts are graded for
the log only: no label enters the loss.

One process:   python opd.py --model runs/warmup --teacher runs/teacher --data dapo --half 1H --out runs/bridge
Eight GPUs:    the same behind torchrun --nproc_per_node=8 opd.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import checkpoints
import common
import memory
import records
from common import Policy
from engines import Sampling, check_engine, make_engine, sample_rollouts
from kernels import fused_linear_kl, fused_linear_logprob
from records import Batch
from verifier import Verifier


@dataclass
class Config:
    model: str  # student checkpoint: a directory (the warmup's, for the two-stage bridge), or a name on the hub
    teacher: str  # teacher checkpoint, of the student's tokenizer
    data: str  # problems: dapo, a .jsonl or .parquet file, or owner/name:split on the hub
    out: str  # checkpoint directory to write
    half: Literal["full", "1H", "2H"] = "full"  # which of the two fixed random halves of the data to use (§6)
    split_seed: int = 0  # of the halves: the same in every stage of a route
    exclude: tuple[str, ...] = ("math500", "aime24", "aime25")  # evaluation sets, whose problems are never trained on
    estimator: Literal["full", "sampled"] = "full"  # exact KL over the vocabulary (Eq. 4), or its one-sample estimate
    passes: int = 1  # over the data (Table 10: 1 epoch)
    max_steps: int | None = None  # stop after this many updates
    prompts_per_step: int = 64  # Table 10's mini-batch
    rollouts_per_prompt: int = 8  # Table 10
    temperature: float = 1.0  # of the student's sampling (Table 10; top-p 1, top-k -1)
    max_prompt_tokens: int = 2048  # Table 10
    max_response_tokens: int = 16384  # Table 10
    instruction: str = records.INSTRUCTION  # appended to each problem; the paper's is not given
    thinking: bool = False  # Qwen3's thinking mode; not stated, the baselines' scores fit its being off
    importance_cap: float = 2.0  # of the truncated trainer/sampler weights in the sampled estimator
    lr: float = 1e-6  # Table 10
    lr_schedule: Literal["constant", "cosine"] = "constant"  # not in the paper; cosine ends at a tenth
    warmup_steps: int = 0  # of the learning rate
    weight_decay: float = 0.01  # not in the paper
    max_grad_norm: float = 1.0  # not in Table 10; as in Table 9
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


FAR_FROM_TEACHER = 1.0  # nats a token; a student whose first KL is beyond it hardly ever writes what the teacher would


def reverse_kl_loss(
    student: Policy | Callable, teacher: Policy, batch: Batch, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 4 summed over the batch's tokens, and the KL of each, (N,): KL(pi_theta || pi_T) on the student's states.

    `vocab_size` is the tokenizer's; heads of one family are padded to different sizes, and padding is no token.
    """
    with torch.no_grad():
        teacher_hidden, teacher_weight = teacher(batch, lambda hidden, weight: (hidden, weight))  # (N, D_T), (V, D_T)

    def head(hidden, weight):
        return fused_linear_kl(hidden, weight, teacher_hidden, teacher_weight, "reverse", vocab_size=vocab_size)

    return student(batch, head)


def sampled_kl_loss(
    student: Policy | Callable, teacher: Policy, batch: Batch, importance_cap: float
) -> tuple[Tensor, Tensor]:
    """A loss whose gradient is the one-sample estimate of Eq. 4's, and the k1 estimate of each token's KL, (N,).

    Policy gradient with the teacher-induced token reward log pi_T - log pi_theta (later versions of the paper), each
    token weighted by the truncated ratio of trainer to sampler.
    """

    def token_logprobs(policy: Policy) -> Tensor:
        return policy(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))[0]

    with torch.no_grad():
        teacher_logprobs = token_logprobs(teacher)  # (N,)
    logprobs = token_logprobs(student)  # (N,)
    reward = teacher_logprobs - logprobs.detach()
    weights = torch.exp(logprobs.detach() - batch.sampler_logprobs).clamp(max=importance_cap)
    return -(weights * reward * logprobs).sum(), -reward


def watched(student: Policy, temperature: float, mismatch: list[Tensor]) -> Callable:
    """`student`, whose forward also notes how far the sampler's logprobs are from its own; no pass of its own for that."""

    def forward(batch: Batch, head: Callable):
        def noting_head(hidden, weight):
            with torch.no_grad():
                logprobs, _ = fused_linear_logprob(hidden, weight, batch.targets, temperature)
            mismatch.append((logprobs - batch.sampler_logprobs).abs())  # (N,)
            return head(hidden, weight)

        return student(batch, noting_head)

    return forward


def mismatch_statistics(mismatch: Tensor) -> dict[str, float]:
    """Mean and largest over the tokens of all ranks."""
    sums = common.all_sum({"total": mismatch.sum().item(), "count": len(mismatch)})
    worst = common.all_max({"sampler_mismatch_max": mismatch.max().item() if len(mismatch) else 0.0})
    return {"sampler_mismatch": sums["total"] / max(sums["count"], 1), **worst}


def main(cfg: Config) -> None:
    common.check_settings(cfg)
    records.check_same_tokenizer(cfg.model, cfg.teacher)
    problems = records.load_training_problems(cfg.data, cfg.half, cfg.split_seed, cfg.exclude)
    tokenizer = records.load_tokenizer(cfg.model)
    for model in (cfg.model, cfg.teacher):
        common.check_checkpoint(model, len(tokenizer))
    prompts = records.tokenize_prompts(tokenizer, problems, cfg.instruction, cfg.thinking, cfg.max_prompt_tokens)
    if cfg.dry_run:
        return memory.report(cfg, cfg.teacher, in_loss=True)
    check_engine(cfg, cfg.model)
    parents = {"model": cfg.model, "teacher": cfg.teacher}
    with checkpoints.Run(cfg, parents) as run, Verifier() as verifier:
        rewarded = checkpoints.rewarded(run.record["parents"]["teacher"])
        if rewarded is None:
            common.say(
                "C1: the teacher's lineage holds no stage trained on reward; expect the student to copy a raw teacher."
            )
        else:
            before, after = (rewarded[moment]["reward"] for moment in ("first", "last"))
            common.say(
                f"C1: reward took the teacher's rollouts from {100 * before:.0f} % to {100 * after:.0f} % right."
            )

        torch.manual_seed(cfg.seed)
        device = common.this_device()
        teacher = common.load_policy(cfg.teacher, trainable=False, shard_nodes=cfg.shard_nodes)
        policy = common.load_policy(cfg.model, True, cfg.activation_checkpointing, cfg.shard_nodes)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer)
        engine = make_engine(cfg, cfg.model, tokenizer, policy)
        sampling = Sampling(cfg.max_response_tokens, cfg.temperature)

        batches = records.problem_batches(problems, cfg.prompts_per_step, cfg.passes, cfg.seed)[: cfg.max_steps]

        for step in run.steps(len(batches)):
            engine.sync(policy)
            with run.phase("rollout"):
                rollouts = sample_rollouts(
                    engine, tokenizer, batches[step], prompts, cfg.rollouts_per_prompt, sampling, (cfg.seed, step)
                )
            with run.phase("verify"):
                records.grade(rollouts, verifier)
            engine.sleep()
            num_tokens = records.count_tokens(rollouts)
            lr = common.learning_rate(step, len(batches), cfg.lr, cfg.lr_schedule, cfg.warmup_steps)
            loss_sum = kl_sum = 0.0
            with run.phase("update"):
                micro_batches = records.make_batches(rollouts, cfg.micro_batch_tokens, device)
                mismatch: list[Tensor] = []
                for batch in micro_batches:
                    # One micro-batch tells if the sampler's weights are stale.
                    student = policy if mismatch else watched(policy, cfg.temperature, mismatch)
                    if cfg.estimator == "full":
                        loss, kl = reverse_kl_loss(student, teacher, batch, len(tokenizer))
                    else:
                        loss, kl = sampled_kl_loss(student, teacher, batch, cfg.importance_cap)
                    (loss / num_tokens).backward()
                    loss_sum += loss.item()
                    kl_sum += kl.sum().item()
                common.release(teacher)
                grad_norm = common.optimizer_step(policy, optimizer, loss_sum, lr, cfg.max_grad_norm)
            reverse_kl = common.all_sum({"kl": kl_sum})["kl"] / num_tokens
            skipped = int(not math.isfinite(grad_norm))
            if step == 0 and reverse_kl > FAR_FROM_TEACHER:
                common.say(
                    f"C2: the student starts {reverse_kl:.2f} nats a token from the teacher; a warmup would help."
                )
            run.consume(batches[step])
            run.log(
                step,
                {
                    "reverse_kl": reverse_kl,
                    "accuracy": sum(r.correct for r in rollouts) / len(rollouts),
                    # What was sampled estimates the student's entropy without bias, at the sampling temperature.
                    "entropy": -sum(sum(r.logprobs) for r in rollouts) / num_tokens,
                    **records.response_statistics(rollouts),
                    **mismatch_statistics(mismatch[0]),
                    "grad_norm": grad_norm,
                    "skipped_steps": skipped,
                    "lr": lr,
                },
                show=("reverse_kl", "accuracy", "response_tokens"),
            )
            run.stop_if_repeated(step, skipped, rollouts)
            run.checkpoint(step + 1, policy, optimizer)
        run.finish(policy, tokenizer, len(batches))


if __name__ == "__main__":
    common.cli(main, Config)
