"""What every stage shares: settings, records (`Problem`, `Rollout`, `Batch`), processes, and the optimizer's step.

A `Problem` is a question with its answer. A `Rollout` is one response sampled for it, later marked as correct or not
and, in GRPO, given an advantage. A `Batch` is several rollouts packed one after another for one forward and backward
pass (a micro-batch). A mini-batch is what one optimizer step works on, split into micro-batches so that it fits into
memory. In GRPO a step of the stage is a rollout batch of several mini-batches; in the other stages it is one
mini-batch.

The paper's symbols: x is a prompt, y = (y_1 .. y_T) a response, s_t = (x, y_<t) the state in which y_t is sampled.
pi_theta is the model in training (the policy, or the student) and pi_T the frozen teacher.

Letters used for shapes in every file: P problems, G rollouts per problem (the group), B sequences, T positions of a
pack, N response tokens of a batch, V vocabulary, D hidden size.

"Collective" in a docstring means that all ranks have to make the call together, because each waits for the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import os
import re
import signal
import subprocess
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

# The paper does not give the wording of its prompts. This is that of the authors' public code for two earlier papers
# (HJSang/OPSD_OnPolicyDistillation), which the comments below call their earlier code.
INSTRUCTION = "\n\nLet's think step by step and output the final answer within \\boxed{}."


# Settings. A stage's Config inherits one of these two classes and adds the values of the paper's Tables 8 and 9, which
# differ by stage, and its own options. --help prints the comments. KW_ONLY lets a subclass add settings without a
# default.


@dataclass
class SamplerConfig:
    """How prompts are written and where responses are sampled: the same in training and in the evaluation."""

    _: KW_ONLY
    # the settings to begin with
    out: str  # directory to write
    seed: int = 0  # decides the order of the data and every sampled response
    # prompts and grading
    prompt: str = "{problem}" + INSTRUCTION  # what is asked, with {problem} in it (authors' earlier code); or @FILE
    chat_template: bool = True  # render prompts with the tokenizer's chat template, if it has one, or as plain text
    stop: tuple[str, ...] = ()  # stop strings, such as "\n": a response ends at the first token that contains one
    thinking: bool = False  # whether Qwen3 may think before it answers (off in the authors' earlier code)
    reward: str | None = None  # FILE.py:function that rewards responses, truncated ones too; its code is run
    # sampling
    engine: Literal["auto", "torch", "vllm"] = "auto"  # what samples; auto is vLLM if it and a GPU are present
    max_num_seqs: int = 512  # sequences that each process samples at a time; lower it when memory runs out
    kv_cache_gib: float | None = None  # GiB for vLLM's cache; by default 16, or what is free without a trainer
    tensor_parallel: int = 1  # GPUs that share one vLLM engine, for a model too large for one GPU
    cpu_bfloat16: bool = False  # compute in bfloat16 on a CPU too: about twice as fast on many, but less exact


@dataclass
class TrainingConfig(SamplerConfig):
    """What Stages 1, 2a, 2b and 3 have in common."""

    _: KW_ONLY
    # the settings to begin with
    data: str  # training problems: dapo, gsm8k-train, a .jsonl or .parquet file, or owner/name:split on the hub
    half: Literal["full", "1H", "2H"] = "full"  # all problems, or one of the two fixed random halves (App. F)
    max_steps: int | None = None  # number of steps, instead of --epochs; the data are repeated as needed
    resume: bool = False  # continue an interrupted run of the same settings, if there is one
    # training
    exclude: tuple[str, ...] = ("math500", "aime24", "aime25")  # evaluation sets whose problems are never trained on
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine falls towards a tenth of --lr; not in the paper
    lr_warmup_steps: int = 0  # steps in which the learning rate rises to --lr (authors' earlier code)
    weight_decay: float = 0.1  # AdamW's weight decay (authors' earlier code; not given in this paper)
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm (Table 8; Table 9 does not say)
    micro_batch_tokens: int | None = None  # positions in one pass; by default 16,384 on a GPU and 2,048 on a CPU
    activation_checkpointing: bool = False  # compute activations again in the backward pass, which saves memory
    # saving, validating and watching
    save_every: int = 20  # steps between saved training states, from which --resume continues
    export_every: int | None = None  # steps between checkpoints along the way, OUT/step-NNNNNN, for any later stage
    validate: tuple[str, ...] = ()  # problem sets on which avg@k is measured while the stage trains (Table 8)
    validate_every: int = 20  # steps between two validations; there is one before the first step and one at the end
    validate_k: int = 4  # responses sampled for each validation problem
    track: Literal["trackio", "wandb"] | None = None  # also send the metrics to this tracker, which has to be installed
    accept_changes: bool = False  # with --resume: go on with changed code or a changed --reward, which is recorded


class InputError(ValueError):
    """A user error: one sentence that says what is wrong and how to fix it, printed without a traceback."""


class AlreadyFinished(InputError):
    """With --resume nothing is left to do. This is a success: the sentence is printed, and the exit status is 0."""


class Stopped(BaseException):
    """A signal has ended a run after a step, which is saved."""

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.number = number  # of the signal; the exit status is 128 more


POSITIVE = {"temperature", "top_p", "clip_ratio", "importance_cap", "lr", "max_grad_norm", "kv_cache_gib"}


def check_settings(cfg, may_be_zero: Sequence[str] = ()) -> None:
    """Raises InputError for a number of a Config that is negative, too big, NaN, or zero where it must be positive.

    Whole numbers are counts and must be positive, apart from seeds and warmup steps. Of the others only those in
    POSITIVE must be, so that a coefficient which somebody adds may be 0.
    """
    for field_ in dataclasses.fields(cfg):
        name, value = field_.name, getattr(cfg, field_.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "top_k":  # -1: all tokens
            flag = f"--{name.replace('_', '-')} {value}"
            coefficient = "float" in str(field_.type) and name not in POSITIVE
            zero = coefficient or name in ("seed", "lr_warmup_steps", *may_be_zero)
            if value < 0 or (value == 0 and not zero):
                raise InputError(f"{flag} is too small; give {'zero or more' if zero else 'a number above zero'}")
            if not value < 2**32:  # the end of NumPy's seeds, to which vLLM passes ours on; all else is far below it
                raise InputError(f"{flag} is not a number below {2**32}; give one")


def cli(main: Callable, config: type) -> None:
    """Runs `main` with the settings of the command line. The exit status is 2 after an `InputError`, 1 after a failure,
    and 128 + the signal's number after a signal.

    Under torchrun every process runs `main` and finds the same fault in the input. Rank 0 reports it and exits, and
    torchrun then ends the others.
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
            time.sleep(10)  # rank 0 reports what all ranks find, and torchrun ends this one meanwhile
        sentence = "; ".join([str(error) or "stopped by Ctrl-C", *getattr(error, "__notes__", ())])
        last_words(f"error: {sentence}" if status == 2 else sentence)
    except BaseException:
        if not dist.is_initialized():
            raise
        status = 1
        traceback.print_exc()
    exit_process(status)


def parse(main: Callable, config: type):
    """The settings of the command line. For --help it prints the docstring of `main`'s file and the settings, and exits."""
    # A shell expands the ~ of `--out ~/runs/x`, and not that of `--out=~/runs/x` or of an argument in quotes.
    words = [re.sub(r"^(--[\w-]+=)?~/", lambda m: (m[1] or "") + os.path.expanduser("~/"), w) for w in sys.argv[1:]]
    if {"-h", "--help"} & set(words):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `--help | head` ends without a traceback
        explanation = re.sub(r"(?<=\S)\n(?:  )?(?!- )(?=\S)", " ", sys.modules[main.__module__].__doc__)
        for line in explanation.splitlines():
            indent = "  " * line.startswith("- ")
            print(line if line.startswith("    ") else textwrap.fill(line, 100, subsequent_indent=indent))
        print("\n".join(settings_help(config)))
        sys.exit()
    return tyro.cli(config, args=words, description="")


def settings_help(config: type) -> list[str]:
    """The part of --help that explains the settings of a Config, in groups. A stage's own come before the inherited ones.

    In the source of a Config a line with nothing but a comment begins a group, and the comment beside a setting explains
    it.
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
                told = " (required)" if setting.default is dataclasses.MISSING else f" (default {value})"
                told = told * (value not in ("", "None", "False"))
                wrapped = textwrap.wrap(found[2] + told, 70)
                first = [name + " " + wrapped.pop(0)] if len(name) == 29 else [name]
                groups.setdefault(group, []).extend([*first, *(" " * 30 + more for more in wrapped)])
    return [line for group, lines in groups.items() for line in ("", f"{group}:", *lines)]


def read_texts(cfg) -> None:
    """Replaces a --prompt that is @FILE by the file's text without its last line break, and \\n in --stop by a newline.

    So the settings hold all that decides a response, and are recorded whole. InputError for a prompt without {problem}.
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
    id: str  # equal for all copies of a problem that `lib.data.problem_id` recognises, whichever data set they are in
    prompt: str  # its text, without --prompt; of several chat messages that of the last (all of them are in the row)
    answer: str
    row: dict = field(default_factory=dict, compare=False, repr=False)  # the data set's row, for a reward of one's own


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
    how: str = ""  # how that was decided: "reward" by --reward alone, else a `how` of lib.verifier.Verdict
    reward: float | None = None  # R(x, y): what --reward returned, then the reward that GRPO used
    advantage: float = 0.0  # its reward relative to its group, which GRPO gives to each of its tokens


@dataclass(frozen=True)
class Span:
    """A segment of a pack. Its positions attend causally to each other and to all of its prefix, another segment."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0  # 0 without a prefix


@dataclass
class Batch:
    """Rollouts packed one after another without padding: what one forward and backward pass works on.

    Responses to one prompt may share it: the prompt is packed once, and each response after it is a span that has the
    prompt as its prefix. For the prompt x1 x2 and its responses a1 a2 a3 and b1 b2 b3 these are six tokens:

        position       0     1      2     3     4     5
        input_ids      x1    x2     a1    a2    b1    b2
        position_ids   0     1      2     3     2     3
        span           1st   1st    2nd   2nd   3rd   3rd   (the 2nd and the 3rd have the 1st as their prefix)
        predicts             a1 b1  a2    a3    b2    b3

    Hence targets = [a1, a2, a3, b1, b2, b3] and predicted_at = [1, 2, 3, 1, 4, 5].

    Which positions are trained follows from the lengths of prompts and responses, not from looking for padding tokens,
    so that an end-of-sequence token is trained like any other.
    """

    input_ids: Tensor  # (1, T) prompts and responses, without a response's last token: nothing after it is predicted
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
    """Response tokens of the rollouts of all ranks: every summed loss of an optimizer step is divided by this
    number.
    """
    return sum(len(rollout.response_ids) for rollout in rollouts)


def request_seed(*key: int | str) -> int:
    """A 63-bit seed made from what identifies one response to be sampled: (run seed, step, problem id, sample)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


# Processes, or ranks. torchrun starts one for each GPU. Without torchrun there is one, which is rank 0 of 1.


TIMEOUT = timedelta(hours=3)  # of what ranks do together; long, because they wait while the longest response is sampled


def start_process(alone_too: bool = False) -> None:
    """Joins the other processes of this run, once. A single process on a CPU forms a group only if `alone_too`.

    Call it before making a vLLM engine, which would otherwise make a process group of its own.
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
    """Ends this process with an exit status: the one way out for all of them, after success and after failure.

    A process that belongs to a group skips Python's own shutdown, for two reasons. vLLM's finalizer waits for the other
    processes: after a failure this one would hang while they wait for it. And a thread of the group may abort during
    the shutdown: a process that has finished all its work would be reported as failed.
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


def last_words(sentence: str) -> None:
    """Prints the final sentence on standard error, and under torchrun again after torchrun's own traceback, so that it is
    the last thing on the screen. A small process waits for that.
    """
    print(sentence, file=sys.stderr, flush=True)
    if os.environ.get("TORCHELASTIC_ERROR_FILE") and hasattr(os, "pidfd_open"):  # torchrun sets it; Linux has pidfd
        fd = os.pidfd_open(os.getppid())
        wait = f"import select, sys; select.select([{fd}], [], [], 60)[0] and print(sys.argv[1], file=sys.stderr)"
        subprocess.Popen([sys.executable, "-ISc", wait, sentence], pass_fds=[fd], start_new_session=True)


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
    """A tqdm bar on rank 0. In a file or a pipe it is a line now and then."""
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
    """`work(items)` done by all ranks together: each works on a contiguous share, and all get every result in order.

    `tensor_parallel` successive ranks work on the same share. Collective; results must be picklable.
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
    """The first line of a library's message, without what follows its first full stop, to be quoted in our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(" .")


# The optimizer's step


def optimizer_step(
    policy: nn.Module, optimizer: torch.optim.Optimizer, loss: float, lr: float, max_grad_norm: float
) -> float:
    """Scales the gradient down to `max_grad_norm` (2-norm over all parameters), steps and clears it; returns its norm.

    If the norm, or the `loss` of any rank, is not finite, the step is skipped: no weight changes, and nan is returned.
    The loss serves no other purpose here. Collective.
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
    """Rises linearly to `peak` in `lr_warmup_steps`, then stays, or falls as a cosine towards a tenth of it.

    `step` counts from 0.
    """
    if step < lr_warmup_steps:
        return peak * (step + 1) / lr_warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - lr_warmup_steps) / max(1, total_steps - lr_warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
