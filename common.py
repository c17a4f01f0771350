"""Shared by all stages: settings, records (`Problem`, `Rollout`, `Batch`), processes, and the optimizer's step.

A `Problem` is a question with its answer. A `Rollout` is one response sampled for it, later marked as correct or not
and, in GRPO, given an advantage. A `Batch` is several rollouts packed one after another for one forward and backward
pass (a micro-batch). A mini-batch has the rollouts of one optimizer step, split into micro-batches to fit into memory.
A training step of GRPO uses a rollout batch of several mini-batches; in the other stages a step is one mini-batch.

The paper's symbols: x is a prompt, y = (y_1 .. y_T) a response, s_t = (x, y_<t) the state in which y_t is sampled.
pi_theta is the model in training (the policy, or the student) and pi_T the frozen teacher.

Letters used for shapes in every file: P problems, G rollouts per problem (the group), B sequences, T positions of a
pack, N response tokens of a batch, V vocabulary, D hidden size.

A function marked "Collective" must be called by all ranks together, because each waits for the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

# The paper does not give the wording of its prompts. This wording is from the authors' public code for two earlier
# papers (HJSang/OPSD_OnPolicyDistillation), "authors' earlier code" in the comments below.
INSTRUCTION = "\n\nLet's think step by step and output the final answer within \\boxed{}."


# Settings. A stage's Config inherits one of these two classes and adds its own settings, with defaults from the paper's
# Tables 8 and 9. --help prints the comments. KW_ONLY lets a subclass add settings without a default.


@dataclass
class SamplerConfig:
    """Settings that training and evaluation share: prompts, grading and sampling."""

    _: KW_ONLY
    # main settings
    out: str  # output directory of this run
    seed: int = 0  # seed of the data order and of every sampled response
    # prompts and grading
    prompt: str = "{problem}" + INSTRUCTION  # prompt template with {problem} in it (authors' earlier code), or @FILE
    chat_template: bool = True  # use the tokenizer's chat template if it has one; otherwise prompts are plain text
    stop: tuple[str, ...] = ()  # stop strings, such as "\n": a response ends at the first token that contains one
    thinking: bool = False  # let Qwen3 think before it answers (off in the authors' earlier code)
    reward: str | None = None  # FILE.py:function that rewards responses, also truncated ones; its code is run
    # sampling
    engine: Literal["auto", "torch", "vllm"] = "auto"  # sampling engine; auto is vLLM if it and a GPU are present
    max_num_seqs: int = 512  # sequences that each process samples at once; lower it if memory runs out
    kv_cache_gib: float | None = None  # GiB of vLLM's KV cache; default: 16 in training, else nearly all that is free
    tensor_parallel: int = 1  # GPUs that share one vLLM engine, for a model too large for one GPU
    cpu_bfloat16: bool = False  # use bfloat16 on a CPU too: about twice as fast on many CPUs, but less exact


@dataclass
class TrainingConfig(SamplerConfig):
    """Settings that Stages 1, 2a, 2b and 3 share."""

    _: KW_ONLY
    # main settings
    data: str  # training problems: dapo, gsm8k-train, a .jsonl or .parquet file, or owner/name:split on the hub
    half: Literal["full", "1H", "2H"] = "full"  # all problems, or one of the two fixed random halves (App. F)
    max_steps: int | None = None  # number of steps, instead of --epochs; the data are repeated as needed
    resume: bool = False  # continue an interrupted run, if there is one; docs/guide.md says which settings may change
    # training
    exclude: tuple[str, ...] = ("math500", "aime24", "aime25")  # evaluation sets whose problems are never trained on
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine decays towards a tenth of --lr; not in the paper
    lr_warmup_steps: int = 0  # steps of linear learning-rate warmup (authors' earlier code)
    weight_decay: float = 0.1  # AdamW's weight decay (authors' earlier code; not given in this paper)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm (Table 8; Table 9 does not say)
    micro_batch_tokens: int | None = None  # positions in a micro-batch; by default 16,384 on a GPU and 2,048 on a CPU
    activation_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    # saving, validation and tracking
    save_every: int = 20  # steps between saved training states, from which --resume continues
    export_every: int | None = None  # steps between exported checkpoints, OUT/step-NNNNNN, which any stage can load
    validate: tuple[str, ...] = ()  # problem sets on which avg@k is measured during training (Table 8)
    validate_every: int = 20  # steps between validations, which also run before the first step and at the end
    validate_k: int = 4  # responses sampled for each validation problem
    track: Literal["trackio", "wandb"] | None = None  # also send the metrics to this tracker, which must be installed
    accept_changes: bool = False  # with --resume: accept changed code or a changed --reward, and record the change


class InputError(ValueError):
    """A user error: one sentence that says what is wrong and how to fix it, printed without a traceback."""


class AlreadyFinished(InputError):
    """A resumed run was already complete. This is a success: the sentence is printed, and the exit status is 0."""


class Stopped(BaseException):
    """A signal ended the run after a step, and that step was saved."""

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.number = number  # the signal's number; the exit status is 128 more


POSITIVE = {"temperature", "top_p", "clip_ratio", "importance_cap", "lr", "max_grad_norm", "kv_cache_gib"}


def check_settings(cfg, may_be_zero: Sequence[str] = ()) -> None:
    """Raises InputError for a numeric setting that is negative, too large, NaN, or zero where it must be positive.

    Integers are counts and must be positive, except for the seed and the warmup steps. Of the floats only those in
    POSITIVE must be positive, so a newly added coefficient may be 0.
    """
    for field_ in dataclasses.fields(cfg):
        name, value = field_.name, getattr(cfg, field_.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "top_k":  # -1: all tokens
            flag = f"--{name.replace('_', '-')} {value}"
            coefficient = "float" in str(field_.type) and name not in POSITIVE
            zero = coefficient or name in ("seed", "lr_warmup_steps", *may_be_zero)
            if value < 0 or (value == 0 and not zero):
                raise InputError(f"{flag} is too small; give {'zero or more' if zero else 'a number above zero'}")
            if not value < 2**32:  # NumPy's seed limit (vLLM seeds NumPy); all other settings are far below it
                raise InputError(f"{flag} is not a number below {2**32}; give one")


def cli(main: Callable, config: type) -> None:
    """Runs `main` with the settings of the command line. The exit status is 2 after an `InputError`, 1 after a failure,
    and 128 + the signal's number after a signal.

    Under torchrun every process runs `main` and raises the same error. Rank 0 reports it and exits, and torchrun then
    ends the others.
    """
    cfg = parse(main, config)
    status = 0
    try:
        start_process()
        read_texts(cfg)
        main(cfg)
    except AlreadyFinished as finished:
        print0(str(finished))
    except (InputError, KeyboardInterrupt, Stopped) as error:
        status = 2 if isinstance(error, InputError) else 128 + getattr(error, "number", signal.SIGINT)
        if rank():
            time.sleep(10)  # meanwhile rank 0 reports the error, and torchrun ends this process
        sentence = "; ".join([str(error) or "stopped by Ctrl-C", *getattr(error, "__notes__", ())])
        print(f"error: {sentence}" if status == 2 else sentence, file=sys.stderr)
    except BaseException:
        if not dist.is_initialized():
            raise
        status = 1
        traceback.print_exc()
    exit_process(status)


def parse(main: Callable, config: type):
    """The settings of the command line. --help prints the docstring of `main`'s file and the settings, and exits."""
    # A shell expands ~ in `--out ~/runs/x`, but not in `--out=~/runs/x` or in a quoted argument.
    words = [re.sub(r"^(--[\w-]+=)?~/", lambda m: (m[1] or "") + os.path.expanduser("~/"), w) for w in sys.argv[1:]]
    if {"-h", "--help"} & set(words):
        explanation = re.sub(r"(?<=\S)\n(?:  )?(?!- )(?=\S)", " ", sys.modules[main.__module__].__doc__)
        for line in explanation.splitlines():
            indent = "  " * line.startswith("- ")
            print(line if line.startswith("    ") else textwrap.fill(line, 100, subsequent_indent=indent))
        print("\n".join(settings_help(config)))
        sys.exit()
    return tyro.cli(config, args=words, description="")


def settings_help(config: type) -> list[str]:
    """The lines of --help that explain a Config's settings, in groups, with a stage's own before the inherited ones.

    In a Config's source, a comment on its own line begins a group, and the comment beside a setting explains it.
    """
    settings = {setting.name: setting for setting in dataclasses.fields(config)}
    groups: dict[str, list[str]] = {}
    for base in config.__mro__[:-1]:
        group = "settings"
        for line in inspect.getsource(base).splitlines():
            if heading := re.fullmatch(r"    # (.+)", line):
                group = heading[1]
            elif (found := re.fullmatch(r"    (\w+): .+?  # (.+)", line)) and found[1] in settings:
                setting = settings.pop(found[1])
                kind = str(setting.type).removesuffix(" | None").replace("tuple[str, ...]", "str ...")
                kind = re.sub(r"Literal\[(.+)\]", lambda m: re.sub("['\" ]", "", m[1]).replace(",", "|"), kind)
                no = "[no-]" if setting.default is True else ""
                name = f"  --{no}{setting.name.replace('_', '-')} {'' if kind == 'bool' else kind}".ljust(29)
                value = " ".join(setting.default) if isinstance(setting.default, tuple) else repr(setting.default)
                default = f" (default {value})" if value not in ("", "None", "False") else ""
                default = " (required)" if setting.default is dataclasses.MISSING else default
                wrapped = textwrap.wrap(found[2] + default, 70)
                first = [name + " " + wrapped.pop(0)] if len(name) == 29 else [name]
                groups.setdefault(group, []).extend([*first, *(" " * 30 + more for more in wrapped)])
    return [line for group, lines in groups.items() for line in ("", f"{group}:", *lines)]


def read_texts(cfg) -> None:
    """Replaces --prompt @FILE by the file's text without its final newline, and \\n in --stop by a newline.

    The recorded settings thus determine every response. Raises InputError for a prompt without {problem}.
    """
    if hasattr(cfg, "prompt"):
        if cfg.prompt.startswith("@"):
            with open(os.path.expanduser(cfg.prompt[1:]), encoding="utf-8") as file:
                cfg.prompt = file.read().removesuffix("\n")
        if "{problem}" not in cfg.prompt:
            raise InputError(
                f"--prompt {cfg.prompt[:40]!r} does not say where the problem goes; write {{problem}} there"
            )
    if hasattr(cfg, "stop"):
        cfg.stop = tuple(text.replace("\\n", "\n") for text in cfg.stop)


# Records


@dataclass(frozen=True)
class Problem:
    id: str  # the same for all copies of a problem that `lib.data.problem_id` recognises, in any data set
    prompt: str  # the problem's text, without the --prompt template; of a chat, its last message (the row has all)
    answer: str
    row: dict = field(default_factory=dict, compare=False, repr=False)  # the data set's row, for a --reward function


@dataclass
class Rollout:
    """One sampled response y = (y_1 .. y_T) to a prompt x."""

    problem: Problem
    sample: int  # 0..G-1, its index within the group of responses to this problem
    prompt_ids: list[int]
    response_ids: list[int]  # ends with an end-of-sequence token unless the length limit cut it
    logprobs: list[float]  # log-probability of each response token, as the sampler computed it
    finish_reason: str  # "stop" at an end-of-sequence token, "length" at the limit
    text: str  # the decoded response, without special tokens
    correct: bool | None = None  # the grader's verdict on its answer (lib.rewards)
    how: str = ""  # how this was decided: "reward" if by --reward alone, else a `how` of lib.verifier.Verdict
    reward: float | None = None  # R(x, y): set by --reward, or else by GRPO from the grader's verdict
    advantage: float = 0.0  # the reward relative to the group; GRPO uses it for every token


@dataclass(frozen=True)
class Span:
    """A segment of a pack. Its positions attend causally to each other, and to all of its prefix, another segment."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0  # 0 without a prefix


@dataclass
class Batch:
    """Rollouts packed one after another without padding, for one forward and backward pass.

    Responses to one prompt may share it (by default on a CPU): the prompt is packed once, and each response after it is a
    span that has the prompt as its prefix. The prompt x1 x2 and its responses a1 a2 a3 and b1 b2 b3 take six positions:

        position       0     1      2     3     4     5
        input_ids      x1    x2     a1    a2    b1    b2
        position_ids   0     1      2     3     2     3
        span           1st   1st    2nd   2nd   3rd   3rd   (the 2nd and the 3rd have the 1st as their prefix)
        predicts             a1 b1  a2    a3    b2    b3

    Hence targets = [a1, a2, a3, b1, b2, b3] and predicted_at = [1, 2, 3, 1, 4, 5].

    The trained positions are computed from the lengths of prompts and responses, not by searching for padding tokens,
    so an end-of-sequence token is trained like any other.
    """

    input_ids: Tensor  # (1, T) prompts and responses, without each response's last token, which predicts nothing
    position_ids: Tensor  # (1, T)
    spans: list[Span]  # they cover the T positions in order
    predicted_at: Tensor  # (N,) int64, the position at which each response token is predicted
    targets: Tensor  # (N,) int64, the response tokens
    sampler_logprobs: Tensor  # (N,) float32, the sampler's log-probability of each target
    advantages: Tensor  # (N,) float32, the advantage of each target's rollout
    rollout_index: Tensor  # (N,) which of the rollouts given to `make_batches` each target belongs to
    old_logprobs: Tensor | None = None  # (N,) under the policy before this rollout batch's first update (GRPO)
    ref_logprobs: Tensor | None = None  # (N,) under the reference policy (GRPO)


def count_tokens(rollouts: Sequence[Rollout]) -> int:
    """Number of response tokens, by which an optimizer step's summed loss is divided; `rollouts` are those of all ranks."""
    return sum(len(rollout.response_ids) for rollout in rollouts)


def request_seed(*key: int | str) -> int:
    """A 63-bit seed for one response, from the key that identifies it: (run seed, step, problem id, sample)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


# Processes (ranks). torchrun starts one for each GPU; without torchrun there is only rank 0.


TIMEOUT = timedelta(hours=3)  # for collective calls; long, because all ranks wait for the longest response


def start_process(alone_too: bool = False) -> None:
    """Joins the other processes of this run, once. A single process on a CPU forms a group only if `alone_too`.

    Call it before creating a vLLM engine, which would otherwise create its own process group.
    """
    torchrun, cuda = "TORCHELASTIC_RUN_ID" in os.environ, torch.cuda.is_available()
    if dist.is_initialized() or not (torchrun or cuda or alone_too):
        return
    if cuda:
        torch.cuda.set_device(this_device())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # Python objects travel over gloo
    alone = {} if torchrun else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=TIMEOUT, **alone)


def exit_process(status: int) -> None:
    """Ends this process with an exit status. Every process ends here, after success and after failure.

    A process that belongs to a group skips Python's own shutdown, for two reasons. vLLM's finalizer waits for the other
    processes, so after a failure they and this one would wait for each other. And a thread of the group may abort
    during shutdown, so a process that has finished all its work would be reported as failed.
    """
    if dist.is_initialized():
        if status == 0:
            barrier()  # wait until every rank is done
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def this_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def print0(text: str) -> None:
    """Prints on rank 0 only, above the progress bar if there is one."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def progress_bar(total: int, caption: str, unit: str, **options) -> tqdm:
    """A tqdm bar on rank 0. If stderr is a file or a pipe, it prints a line at most every 30 seconds instead."""
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 30, "ncols": 0, "position": 0}
    return tqdm(total=total, desc=caption, unit=unit, disable=rank() > 0, **options)


class Lines:
    """Writes each update of a progress bar as a line of its own, for output that is not a terminal."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def on_rank_0(function: Callable):
    """Runs `function()` on rank 0 and gives its result, or raises its InputError, on every rank. Collective."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def map_over_ranks(work: Callable[[list], list], items: Sequence, tensor_parallel: int = 1) -> list:
    """Splits `work(items)` over the ranks: each works on a contiguous share, and all get every result in order.

    `tensor_parallel` consecutive ranks work on the same share. Collective; results must be picklable.
    """
    parts, part = world_size() // tensor_parallel, rank() // tensor_parallel
    results = work(items[len(items) * part // parts : len(items) * (part + 1) // parts])
    if world_size() == 1:
        return results
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, results)
    return [result for results in gathered[::tensor_parallel] for result in results]


def all_sum(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over ranks, which must have the same names in the same order. Collective."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_max(values: dict[str, float]) -> dict[str, float]:
    """Each value's maximum over ranks. Collective."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: dict[str, float], operation) -> dict[str, float]:
    if world_size() == 1:
        return values
    reduced = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(reduced, operation)
    return dict(zip(values, reduced.tolist()))


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, up to the first full stop, to quote in our own message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(" .")


# The optimizer's step


def optimizer_step(
    policy: nn.Module, optimizer: torch.optim.Optimizer, loss: float, lr: float, max_grad_norm: float
) -> float:
    """Clips the gradient to `max_grad_norm` (2-norm over all parameters), steps, and returns the norm before clipping.

    If the norm, or the `loss` of any rank, is not finite, the step is skipped: no weight changes, and nan is returned.
    The loss has no other use here. Collective.
    """
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)  # over the shards of all ranks
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    norm = float(grad_norm) if math.isfinite(all_sum({"loss": loss})["loss"]) else math.nan
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if math.isfinite(norm) else math.nan


def learning_rate(step: int, total_steps: int, peak: float, schedule: str, lr_warmup_steps: int = 0) -> float:
    """Linear warmup to `peak`, then constant, or a cosine decay towards a tenth of it. `step` counts from 0."""
    if step < lr_warmup_steps:
        return peak * (step + 1) / lr_warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - lr_warmup_steps) / max(1, total_steps - lr_warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
