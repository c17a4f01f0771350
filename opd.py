r"""Stage 2b: on-policy distillation, OPD, of the student from the trained teacher (Section 2; settings of Table 9).

    L_R(theta) = E_{s ~ d_student} KL(pi_theta(. | s) || pi_T(. | s))

The student pi_theta samples responses y = (y_1 .. y_T) to prompts x. A state s_t = (x, y_<t) is a prompt with the
response so far, and d_student is the distribution of the states in the student's own responses. At each state the
frozen teacher pi_T gives its next-token distribution over the whole vocabulary, and the loss is the reverse KL, with
the student first, for this one token. The states are treated as constants: no gradient goes through their sampling.

Relation to Eq. 3, the policy gradient that lowers the KL(pi_theta || pi_T) of whole responses: Eq. 3 multiplies each
token's grad log pi_theta(y_t) by the sum of log pi_T - log pi_theta over the response. (We omit the paper's constant
factor beta.) With the states held constant, L_R keeps only token t's own summand. Dropping the earlier summands
changes nothing on average. Dropping the later ones is a bias: a token gets no credit for the states that it leads to.
In return the gradient has far less variance, and where the student can match the teacher at every state both losses
have the same minimum.

`--estimator sampled` estimates the same-token term from the sampled token: a policy gradient with the dense reward
log pi_T(y_t | s_t) - log pi_theta(y_t | s_t). The default sums over the vocabulary instead: its negative gradient is
the expectation of the same-token term over the next token. The two agree on average, except where an importance
weight is truncated, and the exact one has no sampling noise. Neither is an unbiased estimate of Eq. 3.

The paper names two conditions under which the dense reward is informative. C1 (optimality): the teacher itself is
near the best reward; Stage 1 (teacher_grpo.py) is meant to ensure this. C2 (minimal deviation): the teacher is close
to the student at the states that the student visits; Stage 2a (fkl_warmup.py) is meant to ensure this. Without C2 the
teacher is queried at states outside its own distribution, where it is a poor guide. The paper adds that a few sampled
tokens that the teacher finds very unlikely then dominate the gradient, which applies to the sampled estimator. The
teacher's recorded RL rewards are printed (C1) and C2 is logged at every step, but neither is enforced.

Our choices where the paper is silent: L_R is a mean over all tokens of an update, so long responses weigh more. Each
rollout batch is used for one update, so training is on-policy. "Mini-batch 64" in Table 9 counts prompts, each with
all its 8 responses. Rollouts are graded for the log only: no label enters the loss.

Every rank has all rollouts and computes its share of the micro-batches. Gradients are summed over ranks.

    One process:   python opd.py --model runs/warmup --teacher runs/teacher --data dapo --half 1H --out runs/bridge
    Eight GPUs:    torchrun --nproc_per_node=8 opd.py --model runs/warmup --teacher runs/teacher --data dapo --half 1H \
                       --out runs/bridge --activation-checkpointing
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

import common
from common import Batch, TrainingConfig
from kernels import TokenKL, fused_linear_kl, fused_linear_logprob
from lib import data
from lib.engines import Sampling, make_engine
from lib.lineage import last_rl_stage
from lib.packing import make_batches
from lib.policy import Policy, load_policy, release, try_longest
from lib.rewards import grade, make_grader
from lib.rollouts import sample_rollouts
from lib.runs import Run, prepare
from lib.scores import Validation


@dataclass
class Config(TrainingConfig):
    # main settings
    model: str  # student to train: a directory (the warmup's, for the two-stage bridge), or a name on the hub
    teacher: str  # teacher to distil from, with the student's tokenizer
    epochs: int = 1  # passes over the data, unless --max-steps is given (Table 9: 1 epoch)
    lr: float = 1e-6  # learning rate (Table 9)
    rollouts_per_prompt: int = 8  # responses sampled for each prompt (Table 9)
    # on-policy distillation
    prompts_per_step: int = 64  # prompts in an update (Table 9: mini-batch)
    estimator: Literal["exact", "sampled"] = "exact"  # KL over the whole vocabulary, or from the sampled token alone
    importance_cap: float = 2.0  # largest importance weight, trainer over sampler; only for --estimator sampled
    # sampling
    temperature: float = 1.0  # the student's sampling temperature (Table 9)
    max_prompt_tokens: int = 2048  # longest prompt (Table 9)
    max_response_tokens: int = 16384  # length at which a response is cut (Table 9)


FAR_KL = 1.0  # nats a token, our rule of thumb for C2: the teacher finds the tokens 2.7 times less likely on average
OUTLIER_REWARD = -5.0  # nats: the teacher finds the sampled token e^5 = 148 times less likely than the student does


def exact_kl_loss(student: Policy, teacher: Policy, batch: Batch, vocab_size: int) -> TokenKL:
    """L_R summed over the batch's tokens: KL(pi_theta || pi_T) at the student's own states, exact, at temperature 1.

    Its gradient with respect to the student's logits at a state is p (log p - log q - KL), with p = pi_theta and
    q = pi_T: minus the expectation of Eq. 3's same-token term over the next token.

    `vocab_size` is the tokenizer's. Models of one family may pad their output matrices to different sizes; both
    softmaxes exclude the padding. The targets (the sampled tokens) are used for the log only.
    """
    teacher_hidden, teacher_weight = teacher.hidden_states(batch)  # (N, D_T), (V_T, D_T)

    def head(hidden, weight):
        return fused_linear_kl(
            hidden, weight, teacher_hidden, teacher_weight, batch.targets, "reverse", vocab_size=vocab_size
        )

    return student(batch, head)


def sampled_kl_loss(student: Policy, teacher: Policy, batch: Batch, vocab_size: int, importance_cap: float) -> TokenKL:
    """A loss whose gradient estimates that of `exact_kl_loss` from the sampled tokens: Eq. 3's same-token term, summed.

    Its gradient is -w r_t grad log pi_theta(y_t), a policy gradient with the dense reward r_t = log pi_T(y_t) - log
    pi_theta(y_t). (The paper's r_T is beta log pi_T alone.) The weight w is the token's probability in the trainer over
    that in the sampler, at most `importance_cap`. Only the gradient is meaningful, not the loss value. The result's
    `kl` is -r_t, the k1 estimate of each token's KL, biased unless the sampling temperature is 1.
    """

    def head(hidden, weight):
        return fused_linear_logprob(hidden, weight, batch.targets, vocab_size=vocab_size)

    with torch.no_grad():
        teacher_logprobs, _ = teacher(batch, head)  # (N,)
    logprobs, entropy = student(batch, head)  # (N,), (N,)
    reward = teacher_logprobs - logprobs.detach()
    weights = torch.exp(logprobs.detach() - batch.sampler_logprobs).clamp(max=importance_cap)
    loss = -(weights * reward * logprobs).sum()
    return TokenKL(loss, -reward, entropy, logprobs.detach(), teacher_logprobs)


def token_statistics(result: TokenKL, batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
    """The logged statistics of one micro-batch, before the step's update: sums over its tokens, and maxima.

    Log-probabilities, KL and entropy are in nats, at temperature 1. Outliers are logged as a fraction of tokens. All
    tokens must have been sampled by the student: mixed with another model's, most of these statistics mean nothing.
    The dense reward is log pi_T(y_t) - log pi_theta(y_t) of the sampled tokens. At sampling temperature 1 its mean is
    only a noisy -KL, but its spread and outliers show how well condition C2 holds.
    """
    reward = (result.teacher_logprobs - result.logprobs).double()  # (N,)
    mismatch = (result.logprobs - batch.sampler_logprobs).abs()  # (N,) between trainer and sampler
    sums = {
        "reverse_kl": result.kl.sum(),
        "entropy": result.entropy.sum(),
        "sampler_mismatch": mismatch.sum(),
        "dense_reward": reward.sum(),
        "dense_reward_squared": (reward**2).sum(),
        "frac_dense_reward_outliers": (reward < OUTLIER_REWARD).sum(),
    }
    maxima = {"sampler_mismatch_max": mismatch, "negated_dense_reward_max": -reward}
    return (
        {name: value.item() for name, value in sums.items()},
        {name: value.max().item() if len(value) else -math.inf for name, value in maxima.items()},  # or an empty batch
    )


def reduce_statistics(statistics: list[tuple[dict, dict]], num_tokens: int, temperature: float) -> dict[str, float]:
    """Combines `token_statistics` of all micro-batches and ranks: means over tokens, and extremes. Collective."""
    sums = {name: sum(sums[name] for sums, _ in statistics) for name in statistics[0][0]}
    maxima = {name: max(maxima[name] for _, maxima in statistics) for name in statistics[0][1]}
    means = {name: total / num_tokens for name, total in common.all_sum(sums).items()}
    maxima = common.all_max(maxima)
    variance = means.pop("dense_reward_squared") - means["dense_reward"] ** 2
    means["dense_reward_std"] = max(variance, 0.0) ** 0.5
    means["dense_reward_min"] = -maxima.pop("negated_dense_reward_max")
    means |= maxima
    if temperature != 1:  # the trainer's log-probabilities are at temperature 1, the sampler's are not
        del means["sampler_mismatch"], means["sampler_mismatch_max"]
    return means


def report_c1(teacher_record: dict) -> None:
    """Prints the recorded RL rewards of the teacher or of its nearest RL-trained ancestor (C1, assumed by Eq. 2)."""
    stage = last_rl_stage(teacher_record)
    if stage is None:
        common.print0("C1: the teacher has no recorded RL stage, so C1 is unchecked.")
        return
    whose = (
        "the teacher" if stage is teacher_record else f"the teacher has no RL of its own; its ancestor {stage['path']}"
    )
    first, last = (stage[moment]["reward"] for moment in ("first", "last"))
    common.print0(f"C1: {whose} was trained with RL, in which the mean reward went from {first:.2f} to {last:.2f}.")


def main(cfg: Config) -> None:
    problems, tokenizer, prompts, validation_sets = prepare(cfg, cfg.teacher)

    with Run(cfg, parents={"model": cfg.model, "teacher": cfg.teacher}) as run, make_grader(cfg) as grader:
        report_c1(run.record["parents"]["teacher"])
        torch.manual_seed(cfg.seed)
        teacher = load_policy(cfg.teacher, cfg, trainable=False)
        policy = load_policy(cfg.model, cfg, trainable=True)
        vocab_size = data.vocab_size(tokenizer)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer)
        engine = make_engine(cfg, cfg.model, tokenizer, policy)

        def kl_loss(batch: Batch) -> TokenKL:
            """The loss of a micro-batch, summed over its tokens, and what to log."""
            if cfg.estimator == "exact":
                return exact_kl_loss(policy, teacher, batch, vocab_size)
            return sampled_kl_loss(policy, teacher, batch, vocab_size, cfg.importance_cap)

        try_longest(cfg, prompts, optimizer, lambda batch: kl_loss(batch).loss, teacher)
        validation = Validation(cfg, validation_sets, engine, grader, run)
        sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
        batches = data.problem_batches(problems, cfg.prompts_per_step, cfg.epochs, "opd", cfg.seed, cfg.max_steps)

        for step in run.steps(len(batches)):
            validation.score(step, policy)

            # 1. Sample from the student.
            with run.phase("rollout"):
                engine.sync(policy)
                rollouts = sample_rollouts(
                    engine, batches[step], prompts, cfg.rollouts_per_prompt, sampling, seed_key=(cfg.seed, step)
                )
                engine.sleep()
            with run.phase("verify"):
                grade(rollouts, grader)

            # 2. Move the student towards the teacher's distributions at the student's states.
            num_tokens = common.count_tokens(rollouts)  # of the whole update: every rank has all rollouts
            lr = common.learning_rate(step, len(batches), cfg.lr, cfg.lr_schedule, cfg.lr_warmup_steps)
            loss_sum, statistics = 0.0, []  # of this rank; optimizer_step only asks whether the sum is finite
            with run.phase("update"):
                for batch in make_batches(rollouts, cfg.micro_batch_tokens, common.this_device()):
                    result = kl_loss(batch)
                    (result.loss / num_tokens).backward()
                    loss_sum += result.loss.item()
                    statistics.append(token_statistics(result, batch))
                release(teacher)  # without a backward pass FSDP2 would keep its output matrix gathered
                grad_norm = common.optimizer_step(policy, optimizer, loss_sum, lr, cfg.max_grad_norm)

            # 3. Log and save.
            metrics = reduce_statistics(statistics, num_tokens, cfg.temperature)
            metrics |= {"accuracy": sum(rollout.correct for rollout in rollouts) / len(rollouts), "lr": lr}
            metrics |= {"grad_norm": grad_norm, "skipped_steps": int(not math.isfinite(grad_norm))}
            if step == 0 and (kl := metrics["reverse_kl"]) > FAR_KL:
                common.print0(f"C2: the student starts {kl:.2f} nats a token from the teacher; a longer warmup helps.")
            run.log(step, metrics, rollouts, show=("reverse_kl", "accuracy", "truncated", "response_tokens"))
            run.save(step + 1, policy, optimizer, tokenizer, trained_on=batches[step])
        validation.score(len(batches), policy)
        run.finish(policy, tokenizer)


if __name__ == "__main__":
    common.cli(main, Config)
