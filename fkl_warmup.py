"""Stage 2a: forward-KL warmup of the student on cached teacher rollouts (Eq. 5 of v1; settings of Table 10).

    L_F(theta) = E_{s ~ d_teacher} KL(pi_T(. | s) || pi_theta(. | s))

The teacher's responses are sampled once, with `rollouts_per_prompt` of each problem, and kept in a file; the student is
then trained towards the teacher's whole next-token distribution at every position of them. It brings the student close
enough to the teacher for on-policy distillation (condition C2).

Our choices where the paper is silent, and what departs from it:
- What is cached are the teacher's *responses*. Its distributions over the whole vocabulary would take 300 KB a token;
  its forward pass over the cached tokens is repeated instead, and the KL stays exact.
- L_F is a mean over tokens, not over sequences. One pass over the rollouts, which are shuffled singly.
- Table 10's mini-batch of 64 counts prompts: an update sees as many rollouts as 64 prompts have.

The same script does the paper's two controls, which learn from the sampled tokens instead of the distributions:
- `--loss sft` is teacher-sample SFT (routes R2 and "teacher-sample SFT"): hard labels, cross-entropy;
- `--loss sft --keep correct` with the raw teacher as both model and teacher is the SFT'd teacher (route R6).

One process:   python fkl_warmup.py --model Qwen/Qwen3-1.7B --teacher runs/teacher --data dapo --half 1H --out runs/warmup
Eight GPUs:    the same behind torchrun --nproc_per_node=8 fkl_warmup.py
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoints
import common
import memory
import records
from common import InputError, Policy
from engines import Sampling, check_engine, make_engine, sample_rollouts
from kernels import fused_linear_kl, fused_linear_logprob
from records import Batch, Problem, Rollout
from verifier import Verifier


@dataclass
class Config:
    model: str  # student checkpoint: a directory, or a name on the hub
    teacher: str  # teacher checkpoint, of the student's tokenizer
    data: str  # problems: dapo, a .jsonl or .parquet file, or owner/name:split on the hub
    out: str  # checkpoint directory to write
    half: Literal["full", "1H", "2H"] = "full"  # which of the two fixed random halves of the data to use (§6)
    split_seed: int = 0  # of the halves: the same in every stage of a route
    exclude: tuple[str, ...] = ("math500", "aime24", "aime25")  # evaluation sets, whose problems are never trained on
    rollouts: str | None = None  # file of teacher rollouts, written if missing; by default inside the output directory
    loss: Literal["fkl", "sft"] = "fkl"  # forward KL (Eq. 5), or cross-entropy on the sampled tokens
    keep: Literal["all", "correct"] = "all"  # which teacher rollouts to learn from, by the verifier's word
    rollouts_per_prompt: int = 8  # Table 10
    passes: int = 1  # over the rollouts (Table 10: 1 epoch)
    max_steps: int | None = None  # stop after this many updates
    mini_batch_prompts: int = 64  # Table 10; an update sees this many times rollouts_per_prompt rollouts
    temperature: float = 1.0  # of the teacher's sampling (Table 10)
    max_prompt_tokens: int = 2048  # Table 10
    max_response_tokens: int = 16384  # Table 10
    instruction: str = records.INSTRUCTION  # appended to each problem; the paper's is not given
    thinking: bool = False  # Qwen3's thinking mode; not stated, the baselines' scores fit its being off
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


class RolloutCache:
    """Teacher rollouts in a JSONL file, read one at a time: at the paper's scale they would fill memory.

    The first line says what the rollouts are (teacher, data, sampling); a file that says otherwise is refused. Rollouts
    are appended problem by problem, so an interrupted run goes on with the problems that are missing. Rank 0 writes it,
    all ranks read it.
    """

    def __init__(self, path: Path, identity: dict, problems: list[Problem], prompts: dict[str, list[int]]):
        self.path, self.prompts = path, prompts
        self.problems = {problem.id: problem for problem in problems}
        self.offsets: list[int] = []  # where each rollout's line begins
        self.correct: list[bool] = []  # the verifier's word on each
        header = json.dumps(identity).encode() + b"\n"

        def create() -> None:
            try:
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    unfinished = path.with_name(f"{path.name}.tmp")
                    unfinished.write_bytes(header)
                    unfinished.rename(path)  # a kill must not leave half a header
                path.open("r+b").close()
            except OSError as error:
                raise InputError(
                    f"--rollouts {str(path)!r} cannot be written ({error.strerror}); name another file"
                ) from None

        common.on_rank_0(create)
        self._file = path.open("r+b" if common.rank() == 0 else "rb")
        found = self._file.readline()
        if found != header:
            raise InputError(
                f"--rollouts {str(path)!r} holds other rollouts ({_difference(found, identity)}); name another file"
            )
        self._end = self._file.tell()
        self.complete: set[str] = set()
        # A line group is one problem's rollouts and is written at once; a last line cut short is dropped with its group.
        group: list[tuple[int, bool]] = []
        number = 1
        while (line := self._file.readline()).endswith(b"\n"):
            number += 1
            try:
                row = json.loads(line)
                group.append((self._file.tell() - len(line), row["correct"]))
                if row["sample"] != len(group) - 1 or row["id"] not in self.problems:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"--rollouts {str(path)!r} is damaged at line {number}; delete the file, or that line and all "
                    "after it"
                ) from None
            if len(group) == identity["rollouts_per_prompt"]:
                self._accept(row["id"], group)
                group, self._end = [], self._file.tell()
        common.barrier()  # all have read what rank 0 cuts now
        if common.rank() == 0:
            self._file.truncate(self._end)

    def _accept(self, problem_id: str, group: list[tuple[int, bool]]) -> None:
        self.complete.add(problem_id)
        for offset, correct in group:
            self.offsets.append(offset)
            self.correct.append(correct)

    def append(self, group: list[Rollout]) -> None:
        """Writes all rollouts of one problem. Every rank calls it and learns where they stand."""
        lines, places = [], []
        for rollout in group:
            row = {"id": rollout.problem.id, "sample": rollout.sample, "correct": rollout.correct,
                   "finish_reason": rollout.finish_reason, "response_ids": rollout.response_ids,
                   "logprobs": [round(value, 5) for value in rollout.logprobs], "text": rollout.text}  # fmt: skip
            lines.append(json.dumps(row).encode() + b"\n")
            places.append((self._end, rollout.correct))
            self._end += len(lines[-1])
        if common.rank() == 0:
            try:
                self._file.seek(0, 2)
                self._file.write(b"".join(lines))
                self._file.flush()
            except OSError as error:
                raise InputError(
                    f"the teacher's rollouts could not be written to {self.path} ({error.strerror}); make room, then "
                    "--resume to keep those that are there"
                ) from None
        self._accept(group[0].problem.id, places)

    def __getitem__(self, index: int) -> Rollout:
        self._file.seek(self.offsets[index])
        row = json.loads(self._file.readline())
        return Rollout(self.problems[row["id"]], row["sample"], self.prompts[row["id"]], row["response_ids"],
                       row["logprobs"], row["finish_reason"], row["text"], row["correct"])  # fmt: skip

    def __len__(self) -> int:
        return len(self.offsets)


def _difference(header: bytes, identity: dict) -> str:
    """The first setting in which the header of a rollout file differs from what this run needs."""
    try:
        found = dict(json.loads(header))
    except (ValueError, TypeError):
        return "its first line does not say which"
    name = next((name for name in identity if found.get(name) != identity[name]), "its settings")
    return f"with {name} = {found.get(name)!r}, and this run needs {identity.get(name)!r}"


def sample_teacher(cache: RolloutCache, tokenizer, cfg: Config) -> None:
    """Fills the cache with graded rollouts of the problems that are missing from it."""
    missing = [problem for problem in cache.problems.values() if problem.id not in cache.complete]
    if not missing:
        return
    engine = make_engine(cfg, cfg.teacher, tokenizer)
    sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
    at_a_time = max(1, common.world_size() * cfg.max_sequences // cfg.rollouts_per_prompt)
    with Verifier() as verifier, common.progress_bar(len(missing), "teacher rollouts", "prompt") as bar:
        for start in range(0, len(missing), at_a_time):
            chosen = missing[start : start + at_a_time]
            key = (cfg.seed, "teacher")
            rollouts = sample_rollouts(engine, tokenizer, chosen, cache.prompts, cfg.rollouts_per_prompt, sampling, key)
            records.grade(rollouts, verifier)
            for first in range(0, len(rollouts), cfg.rollouts_per_prompt):
                cache.append(rollouts[first : first + cfg.rollouts_per_prompt])
            bar.update(len(chosen))
    engine.sleep()
    common.barrier()  # every line is in the file before anyone reads it


def forward_kl_loss(student: Policy, teacher: Policy, batch: Batch, vocab_size: int | None = None) -> torch.Tensor:
    """Eq. 5 summed over the batch's response tokens: KL(pi_T || pi_theta) on the teacher's own states.

    `vocab_size` is the tokenizer's; heads of one family are padded to different sizes, and padding is no token.
    """
    with torch.no_grad():
        teacher_hidden, teacher_weight = teacher(batch, lambda hidden, weight: (hidden, weight))  # (N, D_T), (V, D_T)

    def head(hidden, weight):
        return fused_linear_kl(hidden, weight, teacher_hidden, teacher_weight, "forward", vocab_size=vocab_size)

    loss, _ = student(batch, head)
    return loss


def sft_loss(student: Policy, batch: Batch) -> torch.Tensor:
    """Cross-entropy on the teacher's sampled tokens, summed: what its distributions are reduced to in routes R2, R6."""
    logprobs, _ = student(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))
    return -logprobs.sum()


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
    check_engine(cfg, cfg.teacher)
    with checkpoints.Run(cfg, parents={"model": cfg.model, "teacher": cfg.teacher}) as run:
        identity = {
            "teacher_sha256": run.record["parents"]["teacher"]["sha256"],
            "problems": hashlib.sha256("".join(sorted(p.id + p.answer for p in problems)).encode()).hexdigest(),
            **{name: getattr(cfg, name) for name in ("data", "half", "split_seed", "rollouts_per_prompt", "temperature",
                                                     "max_response_tokens", "instruction", "thinking", "seed")},
        }  # fmt: skip
        cache = RolloutCache(Path(cfg.rollouts or run.partial / "teacher_rollouts.jsonl"), identity, problems, prompts)

        torch.manual_seed(cfg.seed)
        device = common.this_device()
        sample_teacher(cache, tokenizer, cfg)
        teacher = None  # SFT has its tokens
        if cfg.loss == "fkl":
            teacher = common.load_policy(cfg.teacher, trainable=False, shard_nodes=cfg.shard_nodes)
        policy = common.load_policy(cfg.model, True, cfg.activation_checkpointing, cfg.shard_nodes)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer)
        chosen = [index for index in range(len(cache)) if cfg.keep == "all" or cache.correct[index]]
        common.say(f"teacher rollouts: {len(cache)}, {sum(cache.correct)} correct; learning from {len(chosen)}")
        if not chosen:
            raise InputError("--keep correct leaves no rollout: the teacher answered nothing rightly; give --keep all")
        order = []
        for number in range(cfg.passes):
            random.Random(f"{cfg.seed}/{number}").shuffle(chosen)
            order += chosen
        size = cfg.mini_batch_prompts * cfg.rollouts_per_prompt
        mini_batches = [order[start : start + size] for start in range(0, len(order), size)][: cfg.max_steps]

        for step in run.steps(len(mini_batches)):
            rollouts = [cache[index] for index in mini_batches[step]]
            num_tokens = records.count_tokens(rollouts)
            lr = common.learning_rate(step, len(mini_batches), cfg.lr, cfg.lr_schedule, cfg.warmup_steps)
            loss_sum = 0.0
            with run.phase("update"):
                for batch in records.make_batches(rollouts, cfg.micro_batch_tokens, device):
                    if cfg.loss == "fkl":
                        loss = forward_kl_loss(policy, teacher, batch, len(tokenizer))
                    else:
                        loss = sft_loss(policy, batch)
                    (loss / num_tokens).backward()
                    loss_sum += loss.item()
                loss_sum = common.all_sum({"loss": loss_sum})["loss"]
                grad_norm = common.optimizer_step(policy, optimizer, loss_sum, lr, cfg.max_grad_norm)
            skipped = int(not math.isfinite(grad_norm))
            run.consume(rollout.problem for rollout in rollouts)
            name = {"fkl": "forward_kl", "sft": "cross_entropy"}[cfg.loss]
            run.log(
                step,
                {
                    name: loss_sum / num_tokens,
                    **records.response_statistics(rollouts),
                    "grad_norm": grad_norm,
                    "skipped_steps": skipped,
                    "lr": lr,
                },
                show=(name, "grad_norm"),
            )
            run.stop_if_repeated(step, skipped, rollouts)
            run.checkpoint(step + 1, policy, optimizer)
        run.finish(policy, tokenizer, len(mini_batches))


if __name__ == "__main__":
    common.cli(main, Config)
