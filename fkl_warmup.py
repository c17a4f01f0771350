"""Stage 2a: forward-KL warmup of the student on cached teacher rollouts (Section 2, the loss L_F; settings of Table 9).

    L_F(theta) = E_{s ~ d_teacher} KL(pi_T(. | s) || pi_theta(. | s))

The teacher pi_T samples `rollouts_per_prompt` responses y to each problem x once, and they are kept on disk. d_teacher
are the states s_t = (x, y_<t) that these responses go through. At each of them the student pi_theta is trained towards
the teacher's distribution of the next token over the whole vocabulary. With p = pi_theta and q = pi_T, the gradient
with respect to the student's logits is p - q. The stage brings the student close to the teacher before the student
samples for itself in Stage 2b (condition C2, minimal deviation).

What departs from the paper:
- The cache holds the teacher's *responses*. Its distributions over the vocabulary would take 300 KB for each token, so
  its forward pass over the cached tokens is repeated instead, and the KL stays exact.

Our choices where the paper is silent:
- L_F is a mean over all tokens of an update, so long responses weigh more. The responses are shuffled one by one, so
  that those of one prompt come in different updates.
- "Mini-batch 64" in Table 9 counts prompts: an update has 64 times `rollouts_per_prompt` responses.

The same script trains the controls that learn from the sampled tokens instead of the distributions:
- `--loss sft` is teacher-sample SFT (Tables 2, 5 and 6): cross-entropy on the teacher's tokens.
- `--loss sft --keep correct`, with the raw teacher (the one before Stage 1) as both model and teacher, makes an SFT'd
  teacher (Tables 4 and 6). The paper trains its own on the responses of gpt-oss-120B. We do not have those, and use the
  teacher's own correct responses.

One process:   python fkl_warmup.py --model Qwen/Qwen3-1.7B --teacher runs/teacher --data dapo --half 1H --out
runs/warmup Eight GPUs:    torchrun --nproc_per_node=8 fkl_warmup.py --model Qwen/Qwen3-1.7B --teacher runs/teacher
--data dapo \
                   --half 1H --out runs/warmup --activation-checkpointing
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import common
from common import Batch, InputError, Problem, TrainingConfig
from kernels import TokenKL, fused_linear_kl, fused_linear_logprob
from lib import memory
from lib.engines import Sampling, make_engine
from lib.packing import make_batches
from lib.policy import Policy, load_policy
from lib.rollouts import RolloutCache, grade, sample_rollouts
from lib.runs import Run, prepare
from lib.verifier import Verifier


@dataclass
class Config(TrainingConfig):
    model: str  # student to train: a directory, or a name on the hub
    teacher: str  # teacher to learn from, with the student's tokenizer
    rollouts: str | None = None  # directory of teacher rollouts, made if there is none; by default a part of --out
    loss: Literal["fkl", "sft"] = "fkl"  # forward KL to the teacher's distributions, or cross-entropy on its tokens
    keep: Literal["all", "correct"] = "all"  # learn from all teacher rollouts, or only from those with a right answer
    passes: int = 1  # passes over the teacher rollouts (Table 9: 1 epoch)
    mini_batch_prompts: int = 64  # an update has this many times rollouts_per_prompt responses (Table 9)
    rollouts_per_prompt: int = 8  # responses that the teacher samples for each prompt (Table 9)
    temperature: float = 1.0  # the teacher's sampling temperature (Table 9)
    max_prompt_tokens: int = 2048  # longest prompt (Table 9)
    max_response_tokens: int = 16384  # length at which a response is cut (Table 9)
    lr: float = 1e-6  # learning rate (Table 9)


def forward_kl_loss(student: Policy, teacher: Policy, batch: Batch, vocab_size: int) -> TokenKL:
    """L_F summed over the batch's tokens: KL(pi_T || pi_theta) at the teacher's own states, exact, at temperature 1.

    `vocab_size` is the tokenizer's. Output matrices of one model family are padded to different sizes, and both
    softmaxes leave the padding out.
    """
    with torch.no_grad():
        teacher_hidden, teacher_weight = teacher(batch, lambda hidden, weight: (hidden, weight))  # (N, D_T), (V_T, D_T)

    def head(hidden, weight):
        return fused_linear_kl(
            hidden, weight, teacher_hidden, teacher_weight, batch.targets, "forward", vocab_size=vocab_size
        )

    return student(batch, head)


def sft_loss(student: Policy, batch: Batch) -> Tensor:
    """Cross-entropy on the teacher's sampled tokens (hard labels), summed over the batch's tokens."""
    logprobs, _ = student(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))
    return -logprobs.sum()


def rollout_identity(cfg: Config, teacher_sha256: str, problems: Sequence[Problem]) -> dict:
    """The settings that the teacher's rollouts follow from: a cache made with others is refused."""
    names = ("data", "half", "split_seed", "rollouts_per_prompt", "temperature", "max_response_tokens", "instruction",
             "thinking", "seed")  # fmt: skip
    digest = hashlib.sha256("".join(sorted(p.id + p.answer for p in problems)).encode()).hexdigest()
    return {"teacher_sha256": teacher_sha256, "problems": digest, **{name: getattr(cfg, name) for name in names}}


def sample_teacher(cache: RolloutCache, tokenizer, cfg: Config) -> None:
    """Samples and grades what is missing from the cache, in parts, so that an interruption loses at most one of
    them.
    """
    missing = cache.missing
    if not missing:
        return
    engine = make_engine(cfg, cfg.teacher, tokenizer, alone=True)
    sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
    at_a_time = max(1, common.world_size() * cfg.max_sequences // cfg.rollouts_per_prompt)
    with Verifier() as verifier, common.progress_bar(len(missing), "teacher rollouts", "prompt") as bar:
        for start in range(0, len(missing), at_a_time):
            chosen = missing[start : start + at_a_time]
            rollouts = sample_rollouts(
                engine, chosen, cache.prompts, cfg.rollouts_per_prompt, sampling, seed_key=(cfg.seed, "teacher")
            )
            grade(rollouts, verifier)
            cache.append(rollouts)
            bar.update(len(chosen))
    engine.sleep()
    cache.read()


def rollout_order(chosen: Sequence[int], passes: int, seed: int) -> list[int]:
    """Indices of rollouts in the order of training: `passes` times all of them, each time shuffled again."""
    chosen, order = list(chosen), []
    for number in range(passes):
        random.Random(f"{seed}/{number}").shuffle(chosen)
        order += chosen
    return order


def main(cfg: Config) -> None:
    problems, tokenizer, prompts = prepare(cfg, cfg.teacher, sampled=cfg.teacher)
    if not memory.fit(cfg, frozen=cfg.teacher, in_loss=True):
        return  # --dry-run ends here

    with Run(cfg, parents={"model": cfg.model, "teacher": cfg.teacher}) as run:
        torch.manual_seed(cfg.seed)

        # 1. Sample from the teacher, once.
        identity = rollout_identity(cfg, run.record["parents"]["teacher"]["sha256"], problems)
        cache = RolloutCache(Path(cfg.rollouts or run.partial / "teacher_rollouts"), identity, problems, prompts)
        sample_teacher(cache, tokenizer, cfg)
        chosen = [index for index in range(len(cache)) if cfg.keep == "all" or cache.correct[index]]
        common.print0(f"teacher rollouts: {len(cache)}, {sum(cache.correct)} correct; learning from {len(chosen)}")
        if not chosen:
            raise InputError(
                "--keep correct leaves no rollout: the teacher answered no problem correctly; give --keep all"
            )
        order = rollout_order(chosen, cfg.passes, cfg.seed)
        size = cfg.mini_batch_prompts * cfg.rollouts_per_prompt
        mini_batches = [order[start : start + size] for start in range(0, len(order), size)][: cfg.max_steps]

        teacher = None  # SFT needs the teacher's tokens only
        if cfg.loss == "fkl":
            teacher = load_policy(cfg.teacher, trainable=False, shard_nodes=cfg.shard_nodes)
        policy = load_policy(cfg.model, True, cfg.activation_checkpointing, cfg.shard_nodes)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer)

        for step in run.steps(len(mini_batches)):
            # 2. Train the student on the teacher's responses: towards its distributions (fkl), or on its tokens (sft).
            rollouts = [cache[index] for index in mini_batches[step]]
            num_tokens = common.count_tokens(rollouts)  # of all ranks and micro-batches
            lr = common.learning_rate(step, len(mini_batches), cfg.lr, cfg.lr_schedule, cfg.warmup_steps)
            loss_sum = 0.0
            with run.phase("update"):
                for batch in make_batches(rollouts, cfg.micro_batch_tokens, common.this_device(), cfg.share_prompts):
                    if cfg.loss == "fkl":
                        loss = forward_kl_loss(policy, teacher, batch, len(tokenizer)).loss
                    else:
                        loss = sft_loss(policy, batch)
                    (loss / num_tokens).backward()
                    loss_sum += loss.item()
                grad_norm = common.optimizer_step(policy, optimizer, loss_sum, lr, cfg.max_grad_norm)

            # 3. Log and save.
            name = {"fkl": "forward_kl", "sft": "cross_entropy"}[cfg.loss]
            loss = common.all_sum({"loss": loss_sum})["loss"] / num_tokens
            metrics = {name: loss, "lr": lr, "grad_norm": grad_norm, "skipped_steps": int(not math.isfinite(grad_norm))}
            run.log(step, metrics, rollouts, show=(name, "grad_norm"))
            run.save(step + 1, policy, optimizer, trained_on=(rollout.problem for rollout in rollouts))
        run.finish(policy, tokenizer)


if __name__ == "__main__":
    common.cli(main, Config)
