r"""Stage 2a: forward-KL warmup of the student on cached teacher rollouts (Section 2, loss L_F; settings of Table 9).

    L_F(theta) = E_{s ~ d_teacher} KL(pi_T(. | s) || pi_theta(. | s))

The teacher pi_T samples `rollouts_per_prompt` responses y to each problem x once, and they are kept on disk. d_teacher
are the states s_t = (x, y_<t) that these responses go through. At each of them the student pi_theta is trained towards
the teacher's distribution of the next token over the whole vocabulary. The stage brings the student close to the
teacher before the student samples for itself in Stage 2b (condition C2, minimal deviation).

What departs from the paper:
- The cache holds the teacher's *responses*. Its distributions over the vocabulary would take 300 KB for each token, so
  its forward pass over the cached tokens is repeated instead, and the KL stays exact.

Our choices where the paper is silent:
- L_F is a mean over all tokens of an update, so long responses weigh more.
- "Mini-batch 64" in Table 9 counts prompts: an update has 64 times `rollouts_per_prompt` responses. The problems are
  shuffled, and all responses to one come together.

The same script trains the controls that learn from the sampled tokens instead of the distributions:
- `--loss sft` is teacher-sample SFT (Tables 2, 5 and 6): cross-entropy on the teacher's tokens.
- `--loss sft --keep correct`, with the raw teacher (the one before Stage 1) as both model and teacher, makes an SFT'd
  teacher (Tables 4 and 6) from its own correct responses.
- `--loss sft --rollouts FILE.jsonl` learns from texts that any model has written, with any tokenizer. The paper's SFT'd
  teacher learnt from the responses of gpt-oss-120B in this way (App. B); we do not have those.

    One process:   python fkl_warmup.py --model Qwen/Qwen3-1.7B --teacher runs/teacher --data dapo --half 1H \
                       --out runs/warmup
    Eight GPUs:    torchrun --nproc_per_node=8 fkl_warmup.py --model Qwen/Qwen3-1.7B --teacher runs/teacher \
                       --data dapo --half 1H --out runs/warmup --activation-checkpointing
    From texts:    python fkl_warmup.py --model Qwen/Qwen3-8B --loss sft --rollouts texts.jsonl --data dapo \
                       --half 1H --out runs/sft_teacher
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import common
from common import Batch, InputError, Problem, TrainingConfig
from kernels import TokenKL, fused_linear_kl, fused_linear_logprob
from lib import data
from lib.engines import Sampling, chosen_engine, make_engine
from lib.packing import make_batches
from lib.policy import Policy, load_policy
from lib.rewards import Reward, make_grader, reward_sha256
from lib.rollouts import RolloutCache, grade, sample_rollouts
from lib.runs import Run, prepare
from lib.scores import Validation
from lib.texts import Texts, learns_from_texts
from lib.verifier import Verifier


@dataclass
class Config(TrainingConfig):
    model: str  # student to train: a directory, or a name on the hub
    teacher: str | None = None  # teacher to learn from, with the student's tokenizer; none if --rollouts is a file
    rollouts: str | None = None  # directory of teacher rollouts (by default in --out), or .jsonl file of texts (sft)
    loss: Literal["fkl", "sft"] = "fkl"  # forward KL to the teacher's distributions, or cross-entropy on its tokens
    keep: Literal["all", "correct"] = "all"  # learn from all teacher rollouts, or only from those with a right answer
    passes: int = 1  # passes over the teacher rollouts, without --max-steps (Table 9: 1 epoch)
    mini_batch_prompts: int = 64  # an update has this many times rollouts_per_prompt responses (Table 9)
    rollouts_per_prompt: int = 8  # responses that the teacher samples for each prompt (Table 9)
    temperature: float = 1.0  # the teacher's sampling temperature (Table 9)
    max_prompt_tokens: int = 2048  # longest prompt (Table 9)
    max_response_tokens: int = 16384  # length at which a response is cut (Table 9)
    lr: float = 1e-6  # learning rate (Table 9)


def forward_kl_loss(student: Policy, teacher: Policy, batch: Batch, vocab_size: int) -> TokenKL:
    """L_F summed over the batch's tokens: KL(pi_T || pi_theta) at the teacher's own states, exact, at temperature 1.

    Its gradient with respect to the student's logits at a state is p - q, with p = pi_theta and q = pi_T.

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
    """Cross-entropy on the teacher's sampled tokens (hard labels), summed: teacher-sample SFT, and the SFT of App. B.

    Its gradient with respect to the student's logits at a state is pi_theta - 1, with 1 at the sampled token only.
    """
    logprobs, _ = student(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))
    return -logprobs.sum()


def rollout_identity(cfg: Config, source_sha256: str, problems: Sequence[Problem]) -> dict:
    """The settings that the teacher's rollouts follow from: a cache made with others is refused.

    `source_sha256` is the hash of the teacher, or of the file of texts.
    """
    names = ("data", "half", "rollouts_per_prompt", "temperature", "max_response_tokens", "prompt",
             "chat_template", "stop", "thinking", "reward", "seed")  # fmt: skip
    digest = hashlib.sha256("".join(sorted(p.id + p.answer for p in problems)).encode()).hexdigest()
    identity = {"teacher_sha256": source_sha256, "problems": digest, "reward_sha256": reward_sha256(cfg)}
    return identity | {name: getattr(cfg, name) for name in names}


def fill_cache(
    cache: RolloutCache, order: list[Problem], texts: Texts | None, tokenizer, verifier: Verifier | Reward, cfg: Config
) -> None:
    """Samples from the teacher, or reads from `texts`, what the updates need and the cache lacks, and grades it.

    This goes along the order of training, so that a limited run samples only the beginning of a longer one, and in
    parts, so that an interruption loses at most one of them. With `--keep correct` nobody knows beforehand how many
    problems `--max-steps` updates need, so parts are sampled until there are enough right answers.
    """
    missing = [problem for problem in dict.fromkeys(order) if problem.id not in cache.rows]
    if missing and not texts and cfg.validate and chosen_engine(cfg.engine) == "vllm":
        raise InputError(
            f"--validate {list(cfg.validate)} needs vLLM for the student, and this process needs it for the teacher's "
            "missing rollouts; make those first, with --rollouts DIR --max-steps 1 and with --exclude in the place of "
            "--validate"
        )
    enough = (cfg.max_steps or math.inf) * cfg.mini_batch_prompts * cfg.rollouts_per_prompt
    at_a_time = max(1, common.world_size() * cfg.max_sequences // cfg.rollouts_per_prompt)
    engine, sampling = None, Sampling(cfg.max_response_tokens, cfg.temperature)
    with common.progress_bar(len(missing), "responses to learn from", "prompt") as bar:
        for start in range(0, len(missing), at_a_time):
            chosen = missing[start : start + at_a_time]
            if len(training_order(cache, order[: order.index(chosen[0])], cfg.keep)) >= enough:
                break
            if texts:
                rollouts = texts.rollouts(chosen)
            else:
                engine = engine or make_engine(cfg, cfg.teacher, tokenizer, alone=True)
                rollouts = sample_rollouts(
                    engine, chosen, cache.prompts, cfg.rollouts_per_prompt, sampling, seed_key=(cfg.seed, "teacher")
                )
            grade(rollouts, verifier)
            cache.append(rollouts)
            bar.update(len(chosen))
    if engine:
        engine.sleep()
    if texts:
        texts.report_too_long()


def training_order(cache: RolloutCache, order: Sequence[Problem], keep: str) -> list[int]:
    """The cache's rows in the order of training: each problem in turn, with all its responses to learn from."""
    rows = (row for problem in order for row in cache.rows.get(problem.id, ()))
    return [row for row in rows if keep == "all" or cache.correct[row]]


def main(cfg: Config) -> None:
    role = "rollouts" if learns_from_texts(cfg) else "teacher"  # whose responses the student learns from
    problems, tokenizer, prompts = prepare(cfg, cfg.teacher, sampled=cfg.teacher)

    with Run(cfg, parents={"model": cfg.model, role: getattr(cfg, role)}) as run, make_grader(cfg) as verifier:
        torch.manual_seed(cfg.seed)

        # 1. Sample from the teacher, once; or read what another model has written.
        texts = Texts(cfg, problems, tokenizer, prompts) if role == "rollouts" else None
        identity = rollout_identity(cfg, run.record["parents"][role]["sha256"], problems)
        directory = run.partial / "teacher_rollouts" if texts or not cfg.rollouts else Path(cfg.rollouts)
        cache = RolloutCache(directory, identity, problems, prompts, None if texts else cfg.rollouts_per_prompt)
        # How many problems the updates need is known beforehand only if all have the same number of responses.
        needed = cfg.max_steps * cfg.mini_batch_prompts if cfg.max_steps and cfg.keep == "all" and not texts else None
        order = [problem for [problem] in data.problem_batches(problems, 1, cfg.passes, "warmup", cfg.seed, needed)]
        fill_cache(cache, order, texts, tokenizer, verifier, cfg)
        rows = training_order(cache, order, cfg.keep)
        size = cfg.mini_batch_prompts * cfg.rollouts_per_prompt
        mini_batches = [rows[start : start + size] for start in range(0, len(rows), size)][: cfg.max_steps]
        used = len(set().union(*mini_batches))
        run.record["sampled_tokens"] = cache.tokens
        common.print0(f"responses: {len(cache)}, {sum(cache.correct)} correct; learning from {used}")
        if not used:
            raise InputError(
                "--keep correct leaves no rollout: the teacher answered no problem correctly; give --keep all"
            )

        teacher = None  # SFT needs the teacher's tokens only
        if cfg.loss == "fkl":
            teacher = load_policy(cfg.teacher, cfg, trainable=False)
        policy = load_policy(cfg.model, cfg, trainable=True)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer)
        engine = make_engine(cfg, cfg.model, tokenizer, policy) if cfg.validate else None
        validation = Validation(cfg, tokenizer, engine, verifier, run)

        for step in run.steps(len(mini_batches)):
            run.export(step, policy, tokenizer)
            validation.score(step, policy)

            # 2. Train the student on the teacher's responses: towards its distributions (fkl), or on its tokens (sft).
            rollouts = [cache[row] for row in mini_batches[step]]
            num_tokens = common.count_tokens(rollouts)  # of all ranks and micro-batches
            lr = common.learning_rate(step, len(mini_batches), cfg.lr, cfg.lr_schedule, cfg.warmup_steps)
            loss_sum = 0.0
            with run.phase("update"):
                for batch in make_batches(rollouts, cfg.micro_batch_tokens, common.this_device()):
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
            run.log(step, metrics, rollouts, show=(name, "grad_norm", "truncated"))
            run.save(step + 1, policy, optimizer, trained_on=(rollout.problem for rollout in rollouts))
        validation.score(len(mini_batches), policy)
        run.finish(policy, tokenizer)


if __name__ == "__main__":
    common.cli(main, Config)
