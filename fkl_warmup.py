r"""Stage 2a: forward-KL warmup of the student on cached teacher rollouts (Section 2, loss L_F; settings of Table 9).

    L_F(theta) = E_{s ~ d_teacher} KL(pi_T(. | s) || pi_theta(. | s))

The teacher pi_T samples `rollouts_per_prompt` responses y to each problem x once; they are cached on disk. d_teacher is
the distribution of the states s_t = (x, y_<t) in these responses. At each state the student pi_theta is trained towards
the teacher's next-token distribution over the whole vocabulary. The stage brings the student close to the teacher
before the student samples its own responses in Stage 2b (condition C2, minimal deviation).

Difference from the paper: the cache holds only the teacher's *responses*. Its next-token distributions would take
300 KB for each token, so its forward pass over the cached tokens is repeated instead, and the KL stays exact.

Our choices where the paper is silent: L_F is a mean over all tokens of an update, so long responses weigh more.
"Mini-batch 64" in Table 9 counts prompts: an update has 64 times `rollouts_per_prompt` responses. The problems are
shuffled, and all responses to a problem stay together.

The same script trains the controls that learn from sampled tokens instead of distributions:
- `--loss sft` is teacher-sample SFT (Tables 2, 5 and 6): cross-entropy on the teacher's tokens.
- `--loss sft --keep correct`, with the raw teacher (the one before Stage 1) as both model and teacher, trains an SFT'd
  teacher (Tables 4 and 6) on its own correct and finished responses.
- `--loss sft --rollouts FILE.jsonl` trains on texts written by any model, with any tokenizer. The paper's SFT'd teacher
  was trained on responses of gpt-oss-120B in this way (App. B); we do not have those responses.

    One process:   python fkl_warmup.py --model Qwen/Qwen3-1.7B --teacher runs/teacher --data dapo --half 1H \
                       --out runs/warmup
    Eight GPUs:    torchrun --nproc_per_node=8 fkl_warmup.py --model Qwen/Qwen3-1.7B --teacher runs/teacher \
                       --data dapo --half 1H --out runs/warmup --activation-checkpointing
    From texts:    python fkl_warmup.py --model Qwen/Qwen3-8B --loss sft --rollouts texts.jsonl --data dapo \
                       --half 1H --out runs/sft_teacher
"""

from __future__ import annotations

import hashlib
import json
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
from lib.policy import Policy, load_generation_config, load_policy, release, try_longest
from lib.rewards import Reward, grade, make_grader, reward_sha256
from lib.rollouts import RolloutCache, open_cache, read_texts, sample_rollouts
from lib.runs import Run, prepare
from lib.scores import Validation
from lib.verifier import Verifier


@dataclass
class Config(TrainingConfig):
    # main settings
    model: str  # student to train: a directory, or a name on the hub
    teacher: str | None = None  # teacher to distil from, with the student's tokenizer; none if --rollouts is a file
    epochs: int = 1  # passes over the teacher rollouts, unless --max-steps is given (Table 9: 1 epoch)
    lr: float = 1e-6  # learning rate (Table 9)
    rollouts_per_prompt: int = 8  # responses that the teacher samples for each prompt (Table 9)
    # warmup
    mini_batch_prompts: int = 64  # an optimizer step uses this many times rollouts_per_prompt responses (Table 9)
    rollouts: str | None = None  # directory of teacher rollouts (by default in --out), or .jsonl file of texts (sft)
    loss: Literal["fkl", "sft"] = "fkl"  # forward KL to the teacher's distributions, or cross-entropy on its tokens
    keep: Literal["all", "correct"] = "all"  # train on all teacher rollouts, or only on correct and finished ones
    # sampling
    temperature: float = 1.0  # the teacher's sampling temperature (Table 9)
    max_prompt_tokens: int = 2048  # longest prompt (Table 9)
    max_response_tokens: int = 16384  # length at which a response is cut (Table 9)


def forward_kl_loss(student: Policy, teacher: Policy, batch: Batch, vocab_size: int) -> TokenKL:
    """L_F summed over the batch's tokens: KL(pi_T || pi_theta) at the teacher's own states, exact, at temperature 1.

    Its gradient with respect to the student's logits at a state is p - q, with p = pi_theta and q = pi_T.

    `vocab_size` is the tokenizer's. Models of one family may pad their output matrices to different sizes; both
    softmaxes exclude the padding.
    """
    teacher_hidden, teacher_weight = teacher.hidden_states(batch)  # (N, D_T), (V_T, D_T)

    def head(hidden, weight):
        return fused_linear_kl(
            hidden, weight, teacher_hidden, teacher_weight, batch.targets, "forward", vocab_size=vocab_size
        )

    return student(batch, head)


def sft_loss(student: Policy, batch: Batch) -> Tensor:
    """Cross-entropy on the teacher's sampled tokens (hard labels), summed: teacher-sample SFT, and the SFT of App. B.

    Its gradient with respect to the student's logits at a state is pi_theta minus the sampled token's one-hot vector.
    """
    logprobs, _ = student(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))
    return -logprobs.sum()


def learns_from_texts(cfg: Config) -> bool:
    """Whether `--rollouts` names a file of texts. Raises InputError unless exactly one usable source is given."""
    texts = (cfg.rollouts or "").endswith(".jsonl")
    if not texts and cfg.teacher is None:
        raise InputError("--teacher is missing; name a checkpoint, or with --loss sft a .jsonl file in --rollouts")
    if texts and (cfg.loss == "fkl" or cfg.teacher is not None):
        raise InputError(
            f"--rollouts {cfg.rollouts!r} holds texts, which need --loss sft and no --teacher; change these settings, "
            "or name a directory in --rollouts"
        )
    if texts and not Path(cfg.rollouts).is_file():
        raise InputError(f"--rollouts {cfg.rollouts!r} is not a file; check the path")
    return texts


def rollout_identity(
    cfg: Config, source_sha256: str, problems: Sequence[Problem], prompts: dict[str, list[int]], tokenizer
) -> dict:
    """Everything that determines the cached rollouts. A cache with another identity is refused.

    `source_sha256` is the hash of the teacher, or of the file of texts. The prompts' token ids cover every setting that
    affects their wording.
    """
    ordered = sorted(problems, key=lambda problem: problem.id)
    end = data.end_tokens(load_generation_config(cfg.teacher), tokenizer, cfg.stop) if cfg.teacher else None
    names = ("data", "half", "rollouts_per_prompt", "temperature", "max_response_tokens", "reward", "seed")
    return {
        "source_sha256": source_sha256,
        **{name: getattr(cfg, name) for name in names},
        "reward_sha256": reward_sha256(cfg),
        "end_tokens": end,
        "problems": hashlib.sha256("".join(p.id + p.answer for p in ordered).encode()).hexdigest(),
        "prompts": hashlib.sha256(json.dumps([prompts[p.id] for p in ordered]).encode()).hexdigest(),
    }


def learnt_from(cache: RolloutCache, problem: Problem, keep: str) -> list[int]:
    """The cache rows of a problem that the student is trained on."""
    return [row for row in cache.rows.get(problem.id, ()) if keep == "all" or cache.right[row]]


def fill_cache(cache: RolloutCache, problems: list[Problem], tokenizer, grader: Verifier | Reward, cfg: Config) -> None:
    """Samples the missing rollouts from the teacher, in parts, so that an interruption loses at most one part.

    With `--max-steps` it samples only the problems that the updates need, the first in training order. With
    `--keep correct` their number is not known in advance, so it samples until there are enough responses.
    """
    order = [problem for [problem] in data.problem_batches(problems, 1, 1, "warmup", cfg.seed)]
    enough = (cfg.max_steps or math.inf) * cfg.mini_batch_prompts * cfg.rollouts_per_prompt
    if cfg.max_steps and cfg.keep == "all":
        order = order[: cfg.max_steps * cfg.mini_batch_prompts]
    at_a_time = max(1, common.world_size() * cfg.max_num_seqs // cfg.rollouts_per_prompt)
    sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
    engine, found = None, 0
    with common.progress_bar(len(order), "responses to learn from", "prompt") as bar:
        while order and found < enough:
            part, order = order[:at_a_time], order[at_a_time:]
            if missing := [problem for problem in part if problem.id not in cache.rows]:
                if cfg.validate and chosen_engine(cfg.engine) == "vllm":  # vLLM can free one engine per process
                    raise InputError(
                        f"--validate {list(cfg.validate)} needs vLLM for the student, but this process needs it for "
                        "the teacher's missing rollouts; sample these first: run this command with --rollouts DIR, "
                        "another --out, and --exclude instead of --validate, and stop it when training begins"
                    )
                engine = engine or make_engine(cfg, cfg.teacher, tokenizer, cache_gib=None)
                rollouts = sample_rollouts(
                    engine, missing, cache.prompts, cfg.rollouts_per_prompt, sampling, seed_key=(cfg.seed, "teacher")
                )
                grade(rollouts, grader)
                cache.append(rollouts)
            found += sum(len(learnt_from(cache, problem, cfg.keep)) for problem in part)
            bar.update(len(part))
    if engine:
        engine.sleep()


def training_order(cache: RolloutCache, problems: list[Problem], cfg: Config) -> list[int]:
    """The cache rows in training order: each problem in turn, with all its responses to train on.

    With `--max-steps` there are as many epochs as the updates need.
    """
    per_epoch = sum(len(learnt_from(cache, problem, cfg.keep)) for problem in problems)
    if not per_epoch:
        raise InputError("--keep correct leaves nothing, because no response is right and finished; give --keep all")
    enough = cfg.max_steps and cfg.max_steps * cfg.mini_batch_prompts * cfg.rollouts_per_prompt
    epochs = math.ceil(enough / per_epoch) if enough else cfg.epochs
    order = data.problem_batches(problems, 1, epochs, "warmup", cfg.seed)
    return [row for [problem] in order for row in learnt_from(cache, problem, cfg.keep)][:enough]


def main(cfg: Config) -> None:
    role = "rollouts" if learns_from_texts(cfg) else "teacher"  # the source of the responses
    problems, tokenizer, prompts, validation_sets = prepare(cfg, cfg.teacher)

    with Run(cfg, parents={"model": cfg.model, role: getattr(cfg, role)}) as run, make_grader(cfg) as grader:
        torch.manual_seed(cfg.seed)

        # 1. Sample from the teacher, once, or read another model's texts.
        identity = rollout_identity(cfg, run.record["parents"][role]["sha256"], problems, prompts, tokenizer)
        shared = cfg.rollouts and role == "teacher"
        directory = Path(cfg.rollouts) if shared else run.partial / "teacher_rollouts"
        with open_cache(directory, identity, problems, prompts) as cache:
            if role == "rollouts":
                read_texts(cfg.rollouts, cache, tokenizer, cfg.max_response_tokens, grader)
            else:
                fill_cache(cache, problems, tokenizer, grader, cfg)
        rows = training_order(cache, problems, cfg)
        size = cfg.mini_batch_prompts * cfg.rollouts_per_prompt
        mini_batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        run.record["sampled_tokens"] = cache.tokens
        common.print0(f"responses: {len(cache)}, {sum(cache.right)} right and finished; learning from {len(set(rows))}")

        teacher = None  # SFT needs only the teacher's tokens
        if cfg.loss == "fkl":
            teacher = load_policy(cfg.teacher, cfg, trainable=False)
        policy = load_policy(cfg.model, cfg, trainable=True)
        vocab_size = data.vocab_size(tokenizer)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer)
        engine = make_engine(cfg, cfg.model, tokenizer, policy) if cfg.validate else None

        def loss_of(batch: Batch) -> Tensor:
            """The loss of a micro-batch, summed over its tokens."""
            if cfg.loss == "fkl":
                return forward_kl_loss(policy, teacher, batch, vocab_size).loss
            return sft_loss(policy, batch)

        try_longest(cfg, prompts, optimizer, loss_of, teacher)
        validation = Validation(cfg, validation_sets, engine, grader, run)

        for step in run.steps(len(mini_batches)):
            validation.score(step, policy)

            # 2. Train the student on the teacher's responses: towards its distributions (fkl), or on its tokens (sft).
            rollouts = [cache[row] for row in mini_batches[step]]
            num_tokens = common.count_tokens(rollouts)  # of all ranks and micro-batches
            lr = common.learning_rate(step, len(mini_batches), cfg.lr, cfg.lr_schedule, cfg.lr_warmup_steps)
            loss_sum = 0.0
            with run.phase("update"):
                for batch in make_batches(rollouts, cfg.micro_batch_tokens, common.this_device()):
                    loss = loss_of(batch)
                    (loss / num_tokens).backward()
                    loss_sum += loss.item()
                release(teacher)  # without a backward pass FSDP2 would keep its output matrix gathered
                grad_norm = common.optimizer_step(policy, optimizer, loss_sum, lr, cfg.max_grad_norm)

            # 3. Log and save.
            name = {"fkl": "forward_kl", "sft": "cross_entropy"}[cfg.loss]
            loss = common.all_sum({"loss": loss_sum})["loss"] / num_tokens
            metrics = {name: loss, "lr": lr, "grad_norm": grad_norm, "skipped_steps": int(not math.isfinite(grad_norm))}
            run.log(step, metrics, rollouts, show=(name, "grad_norm", "truncated"))
            run.save(step + 1, policy, optimizer, tokenizer, trained_on=(rollout.problem for rollout in rollouts))
        validation.score(len(mini_batches), policy)
        run.finish(policy, tokenizer)


if __name__ == "__main__":
    common.cli(main, Config)
