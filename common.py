"""Leaves shared by the four stages: problems, prompts, batches, models, run directories, logging.

Nothing here knows which stage is calling. One record flows through everything: a `Problem` (prompt, answer, id) is
sampled into `Rollout`s (token ids, the sampler's logprobs, a reward), which are laid out as `Batch`es that a `Policy`
turns into hidden states and a loss. A checkpoint is a Hugging Face directory plus `run.json`, which carries the
settings and the lineage: which checkpoints it came from, and which labelled problems it has consumed on the way.

Letters used for shapes in every file: B sequences in a batch, T positions, N response tokens of a batch packed
together, V vocabulary, D hidden size, G rollouts per problem (the group), P problems.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import heapq
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers.utils
import tyro
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from verifier import Verifier

# Where the hub package `kernels` is installed as well, transformers would import our kernels.py in its place, and fail.
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_: False

from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

# In one process the checkpoint library says at every call that it takes it to be one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
# A loss head returns views, and nothing writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class InputError(ValueError):
    """Bad input: one sentence that names the argument, its value and the remedy. Printed without a traceback."""


def cli(main: Callable, config: type) -> None:
    """Parses the command line into `config` and runs `main`; an `InputError` ends in one line and exit status 2.

    Under torchrun every rank runs `main`. All find the same fault in the input, and rank 0 says it; torchrun then ends
    the others.
    """
    cfg = tyro.cli(config, description=sys.modules[main.__module__].__doc__)
    try:
        start_process()
        main(cfg)
    except InputError as error:
        if rank():
            time.sleep(10)  # if rank 0 is still there afterwards the fault is this rank's own
        print(f"error: {error}" if rank() == 0 else f"error on rank {rank()}: {error}", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(2)
    if dist.is_initialized() and "vllm" not in sys.modules:  # vLLM does it on the way out, and wants to be the one
        dist.destroy_process_group()


# Processes: one for each GPU, started by torchrun. Without torchrun there is one, and everything below is trivial.


def start_process() -> None:
    """Joins the other processes of this run. Does nothing the second time, and nothing in a lone process on a CPU.

    It has to come before any vLLM engine, which otherwise makes a process group of its own.
    """
    torchrun, cuda = "TORCHELASTIC_RUN_ID" in os.environ, torch.cuda.is_available()
    if dist.is_initialized() or not (torchrun or cuda):
        return
    if cuda:
        torch.cuda.set_device(this_device())
    # Python objects travel over gloo. Ranks wait for one another while the longest response is being sampled.
    backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(hours=3)
    if torchrun:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if rank():
        transformers.utils.logging.disable_progress_bar()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def this_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


@cache  # vLLM overwrites LOCAL_WORLD_SIZE
def device_mesh() -> DeviceMesh | None:
    """What weights are sharded over: all ranks of one node, or, on several nodes, the ranks of each, with a replica on
    every node (HSDP), so that weights are gathered inside a node and only gradients cross between them. None for a lone
    process on a CPU."""
    start_process()
    if world_size() == 1 and not torch.cuda.is_available():
        return None
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size() > per_node:
        return init_device_mesh(
            this_device().type, (world_size() // per_node, per_node), mesh_dim_names=("replicate", "shard")
        )
    return init_device_mesh(this_device().type, (world_size(),), mesh_dim_names=("shard",))


def say(text: str) -> None:
    """print, on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def progress_bar(total: int, caption: str | None, unit: str, **options) -> tqdm:
    """tqdm, on rank 0, if there is a caption."""
    return tqdm(total=total, desc=caption, unit=unit, disable=rank() > 0 or caption is None, **options)


def on_rank_0(function: Callable):
    """Runs `function()` on rank 0 and gives what it returns, or its InputError, to every rank. Collective."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome.pop()  # pop: an error that its own traceback's frames hold keeps files locked until gc finds it
    return outcome[0]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def spread(work: Callable[[list], list], items: Sequence, tensor_parallel: int = 1) -> list:
    """`work(items)`, done by all ranks together: each works on a contiguous share, and gets everyone's results, in order.

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
    """Each value summed over ranks, which must have the same names in the same order."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_max(values: dict[str, float]) -> dict[str, float]:
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: dict[str, float], operation) -> dict[str, float]:
    if world_size() == 1:
        return values
    reduced = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(reduced, operation)
    return dict(zip(values, reduced.tolist()))


def check_settings(cfg, may_be_zero: Sequence[str] = ()) -> None:
    """InputError for a number of a Config that is not positive, unless zero is a seed or switches something off."""
    allowed = {"seed", "split_seed", "kl_coef", "warmup_steps", "weight_decay", *may_be_zero}
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "top_k":
            if value < 0 or (value == 0 and name not in allowed):
                raise InputError(f"--{name.replace('_', '-')} {value} is too small; give a number above zero")


# Problems


@dataclass(frozen=True)
class Problem:
    id: str  # the same problem has one id in every data set, however it is typeset; see `problem_id`
    prompt: str
    answer: str

    @staticmethod
    def create(prompt: str, answer: str) -> Problem:
        return Problem(problem_id(prompt), prompt, answer)


def problem_id(prompt: str) -> str:
    """First 16 hex digits of the sha256 of the prompt's letters, digits and signs, without case, spaces or layout.

    A thousand problems of DAPO-Math-17k stand in it twice with other spacing, delimiters or fractions. Were their copies
    taken for two problems, one could train the teacher while the other counts as held out.
    """
    text = unicodedata.normalize("NFKC", prompt).lower()
    text = re.sub(r"\\(left|right|displaystyle|quad|qquad|[,;:! ])", "", text)  # LaTeX that only spaces or sizes
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)  # a decimal point stays, a full stop goes
    kept = "".join(character for character in text if character.isalnum() or character in "+-*/=<>^!|.")
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


HUB_SETS = {  # short name -> (repository, configuration, split)
    "dapo": ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train"),
    "dapo-processed": ("open-r1/DAPO-Math-17k-Processed", "en", "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "gsm8k-train": ("openai/gsm8k", "main", "train"),
}

# The wrapper that the original DAPO-Math-17k puts around each problem; our own instruction replaces it.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'


def load_problems(source: str, quiet: bool = False) -> list[Problem]:
    """Reads a problem set and drops repeated problems and those whose copies disagree on the answer.

    `source` is a short name (see `HUB_SETS`), a local .jsonl or .parquet file, or `owner/name[@configuration]:split`
    on the hub. A row's prompt is its `prompt` (text, or chat messages), `problem` or `question`; its answer is
    `reward_model.ground_truth`, `answer`, `solution` or `ground_truth`, and what follows "####" if that occurs.

    Raises InputError for an unknown source, an unreadable row (with its number), or when no problem is left.
    """
    answers: dict[str, Problem] = {}
    conflicting: set[str] = set()
    rows = 0
    for rows, row in enumerate(_read_rows(source), start=1):
        try:
            problem = _problem_from_row(row)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise InputError(
                f"row {rows} of {source!r} is not a labelled problem ({error}); each row needs a prompt "
                "(prompt, problem or question) and an answer (answer, solution or reward_model.ground_truth)"
            ) from None
        if answers.setdefault(problem.id, problem).answer != problem.answer:
            conflicting.add(problem.id)
    problems = [problem for problem in answers.values() if problem.id not in conflicting]
    if not problems:
        raise InputError(f"data set {source!r} holds no usable problem ({rows} rows read); name another with --data")
    if rows > len(problems) and not quiet:
        say(
            f"{source}: {rows} rows, {rows - len(answers)} repeats dropped, "
            f"{len(conflicting)} problems with conflicting answers dropped, {len(problems)} left"
        )
    return problems


def _problem_from_row(row: dict) -> Problem:
    prompt = next((row[key] for key in ("prompt", "problem", "question") if row.get(key)), None)
    if isinstance(prompt, list):
        prompt = [message["content"] for message in prompt if message["role"] == "user"][-1]
    if not isinstance(prompt, str):
        raise ValueError("no prompt in it")
    prompt = prompt.removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX).strip()
    answer = (row.get("reward_model") or {}).get("ground_truth")
    for key in ("answer", "solution", "ground_truth"):
        answer = row.get(key) if answer is None else answer
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("no answer in it" if answer is None else f"the answer is {answer!r}")
    return Problem.create(prompt, answer.rsplit("####", 1)[-1].strip())


def _read_rows(source: str) -> Iterable[dict]:
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise InputError(
                            f"line {number} of {source!r} is not JSON ({error}); mend or delete it"
                        ) from None
    elif path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError):
            raise InputError(f"data set {source!r} is not a parquet file that can be read; fetch it anew") from None
        yield from rows
    elif path.suffix in (".jsonl", ".parquet", ".json", ".csv") or path.exists():
        raise InputError(
            f"data set {source!r} is not a readable .jsonl or .parquet file; check the path given with --data"
        )
    else:
        name, _, split = source.partition(":")
        repository, _, configuration = name.partition("@")
        if source in HUB_SETS:
            repository, configuration, split = HUB_SETS[source]
        elif repository.count("/") != 1:
            raise InputError(
                f"data set {source!r} is unknown; give one of {', '.join(HUB_SETS)}, a .jsonl or .parquet file, or "
                "owner/name:split on the hub"
            )
        import datasets

        try:
            yield from datasets.load_dataset(repository, configuration or None, split=split or "train")
        except Exception as error:  # the hub client raises many kinds; all of them mean that the rows cannot be had
            raise InputError(f"data set {source!r} could not be loaded from the hub ({type(error).__name__}); "
                             "go online, or give a local .jsonl or .parquet file") from error  # fmt: skip


def half_of(problems: Sequence[Problem], half: str, split_seed: int = 0) -> list[Problem]:
    """The paper's fixed random split into two equal halves (§6); `half` is "full", "1H" or "2H".

    The split depends on the problems' ids and `split_seed` alone, not on the order of rows; of an odd number of
    problems one is left out of both halves, so that the halves are equal.

    Raises InputError when there are fewer than two problems to split.
    """
    if half == "full":
        return list(problems)
    if len(problems) < 2:
        raise InputError(f"--half {half} needs at least two problems, and there is {len(problems)}; use --half full")
    shuffled = sorted(problems, key=lambda problem: problem.id)
    random.Random(split_seed).shuffle(shuffled)
    middle = len(shuffled) // 2
    return shuffled[:middle] if half == "1H" else shuffled[middle : 2 * middle]


def load_training_problems(data: str, half: str, split_seed: int, exclude: Sequence[str]) -> list[Problem]:
    """The problems of one half of `data`, less every problem that stands in one of the `exclude`d evaluation sets.

    The halves are cut before the exclusion, so that a checkpoint's half does not depend on what is evaluated.
    """
    problems = half_of(load_problems(data), half, split_seed)
    held_out = {problem.id for source in exclude for problem in load_problems(source, quiet=True)}
    kept = [problem for problem in problems if problem.id not in held_out]
    if len(kept) < len(problems):
        say(f"{data}: {len(problems) - len(kept)} problems dropped because they stand in {', '.join(exclude)}")
    if not kept:
        raise InputError(f"no problem of --data {data!r} (half {half}) is left outside --exclude {list(exclude)}")
    return kept


def problem_batches(problems: Sequence[Problem], size: int, passes: int, seed: int) -> list[list[Problem]]:
    """`passes` shuffled passes over the problems, cut into batches of `size`.

    The tail of a pass is filled from the next one, so every batch is full; the last batch of all may be cut short.
    """
    order = []
    for number in range(passes):
        one_pass = list(problems)
        random.Random(f"{seed}/{number}").shuffle(one_pass)
        order += one_pass
    return [order[start : start + size] for start in range(0, len(order), size)]


# Prompts and tokenizers

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def load_tokenizer(model: str, argument: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory or hub name; InputError (naming `argument`) if there is none."""
    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise InputError(f"{argument} {model!r} is not a checkpoint directory, nor a hub name (owner/name)")
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{argument} {model!r} has no tokenizer that transformers can load ({reason})") from None


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: str, instruction: str, thinking: bool) -> str:
    """The problem with the instruction, in the model's own chat template (plain text for a model without one)."""
    if tokenizer.chat_template is None:
        return problem + instruction
    messages = [{"role": "user", "content": problem + instruction}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    instruction: str,
    thinking: bool,
    max_prompt_tokens: int,
) -> dict[str, list[int]]:
    """Prompt token ids by problem id. InputError when a prompt is longer than `max_prompt_tokens`."""
    texts = [render_prompt(tokenizer, problem.prompt, instruction, thinking) for problem in problems]
    prompts = {}
    # The template writes its own special tokens; a model without one wants the tokenizer's (a leading BOS, say).
    encoded = tokenizer(texts, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    for problem, ids in zip(problems, encoded):
        if len(ids) > max_prompt_tokens:
            raise InputError(
                f"the prompt of problem {problem.id} ({problem.prompt[:40]!r}...) has {len(ids)} tokens, more than "
                f"--max-prompt-tokens {max_prompt_tokens}; raise the limit or drop the problem"
            )
        prompts[problem.id] = ids
    return prompts


def end_tokens(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a response: the tokenizer's end of sequence, and those of the checkpoint's generation settings."""
    configured = generation_config.eos_token_id if generation_config else None
    return sorted({tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None})


def stop_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`end_tokens` of a checkpoint that is not loaded."""
    try:
        return end_tokens(GenerationConfig.from_pretrained(model), tokenizer)
    except OSError:  # a checkpoint need not have generation settings
        return end_tokens(None, tokenizer)


def check_same_tokenizer(student: str, teacher: str) -> None:
    """Teacher and student must read and write the same tokens: a KL between their distributions means nothing else.

    Compares the vocabularies, the special tokens and the rendered prompt; InputError with the first difference.
    """
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher, "--teacher")
    pair = f"--model {student!r} and --teacher {teacher!r}"
    if ours.get_vocab() != theirs.get_vocab():
        differing = dict(set(ours.get_vocab().items()) ^ set(theirs.get_vocab().items()))
        example = min(differing, key=differing.get)
        raise InputError(
            f"{pair} have different vocabularies ({len(ours)} and {len(theirs)} tokens, first difference {example!r}); "
            "distillation needs a teacher of the student's family"
        )
    for name in ("eos_token", "bos_token", "pad_token"):
        if getattr(ours, name) != getattr(theirs, name):
            raise InputError(
                f"{pair} differ in their {name} ({getattr(ours, name)!r} and {getattr(theirs, name)!r}); "
                "copy one tokenizer over the other"
            )
    for thinking in (False, True):
        rendered = [render_prompt(tokenizer, "1+1", INSTRUCTION, thinking) for tokenizer in (ours, theirs)]
        if rendered[0] != rendered[1]:
            raise InputError(
                f"{pair} render prompts differently ({rendered[0]!r} and {rendered[1]!r}); "
                "give both the same chat template"
            )


# Rollouts and batches


@dataclass
class Rollout:
    problem: Problem
    sample: int  # 0..G-1 within the problem's group
    prompt_ids: list[int]
    response_ids: list[int]  # ends with the end-of-sequence token unless the length cap cut it
    logprobs: list[float]  # of each response token, as the sampler computed it
    finish_reason: str  # "stop" or "length"
    text: str  # the decoded response, without special tokens
    correct: bool | None = None  # the verifier's word


def grade(rollouts: Sequence[Rollout], verifier: Verifier) -> None:
    """Sets `correct` on every rollout from its response and its problem's answer. Spread over ranks; collective."""

    def verdicts(some: Sequence[Rollout]) -> list[bool]:
        found = verifier.check([rollout.text for rollout in some], [rollout.problem.answer for rollout in some])
        return [verdict.correct for verdict in found]

    # One verdict for all ranks: a deadline met on one and missed on another would make them differ.
    for rollout, correct in zip(rollouts, spread(verdicts, rollouts)):
        rollout.correct = correct


def response_statistics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean response length in tokens, and the share of responses cut at the length limit."""
    return {
        "response_tokens": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
        "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
    }


def request_seed(*key: int | str) -> int:
    """A 63-bit seed for one request from what names it: (run seed, step, problem id, sample)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


@dataclass
class Batch:
    """Sequences right-padded to one length, or packed one after another.

    A causal model's valid positions never see the padding that follows them, so padded sequences need no attention mask;
    packed ones are told apart by position_ids that begin again at 0. Which positions count is known from the lengths.
    """

    input_ids: Tensor  # (B, T) prompt and response; the last response token predicts nothing and is left off
    position_ids: Tensor | None  # (1, T) if packed, with B = 1
    response_mask: Tensor  # (B, T) bool, True where the next token is a response token; N entries are True
    targets: Tensor  # (N,) those next tokens, row by row
    rollout_index: Tensor  # (N,) which of the rollouts given to `make_batches` a token belongs to
    sampler_logprobs: Tensor  # (N,) float32, the sampler's logprob of each target


def make_batches(
    rollouts: Sequence[Rollout], max_tokens: int, device: torch.device, packed: bool | None = None
) -> list[Batch]:
    """This rank's share of the rollouts as micro-batches of at most `max_tokens` positions, or of one longer sequence.

    `rollouts` are those of all ranks. They are dealt out so that every rank has about as many tokens, and each is in
    exactly one micro-batch of one rank. All ranks get equally many micro-batches, the last ones perhaps with nothing in
    them, because each forward and backward pass of a sharded model is one of all ranks. None of this changes a loss:
    losses are sums over tokens divided by one global count.

    packed: lay sequences end to end instead of padding them; by default where attention can leave out what is between
    sequences (a GPU). On a CPU a long pack costs more than the padding, as its attention is masked, not skipped.
    """
    packed = device.type == "cuda" if packed is None else packed
    lengths = [len(rollout.prompt_ids) + max(len(rollout.response_ids) - 1, 0) for rollout in rollouts]
    shares = [_group(share, lengths, max_tokens, packed) for share in deal(lengths, world_size())]
    groups = shares[rank()]
    groups += [[]] * (max(map(len, shares)) - len(groups))
    return [_lay_out(rollouts, group, lengths, device, packed) for group in groups]


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Indices dealt into hands of about equal total length, each from long to short: the next longest goes to the hand
    that has least so far."""
    result: list[list[int]] = [[] for _ in range(hands)]
    totals = [(0, hand) for hand in range(hands)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, hand = heapq.heappop(totals)
        result[hand].append(index)
        heapq.heappush(totals, (total + lengths[index], hand))
    return result


def _group(indices: Sequence[int], lengths: Sequence[int], max_tokens: int, packed: bool) -> list[list[int]]:
    """Cuts indices, from long to short, into micro-batches; padding counts as positions."""
    groups: list[list[int]] = []
    for index in indices:
        if groups:
            members = [*groups[-1], index]
            positions = sum(lengths[i] for i in members) if packed else lengths[members[0]] * len(members)
            if positions <= max_tokens:
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups


def _lay_out(
    rollouts: Sequence[Rollout], group: list[int], lengths: list[int], device: torch.device, packed: bool
) -> Batch:
    starts, position = [], 0  # where each sequence begins in the flattened (B, T)
    width = max((lengths[index] for index in group), default=1)
    for index in group:
        starts.append(position)
        position += lengths[index] if packed else width
    total = max(position, 1)  # a micro-batch of nothing is one position, which predicts nothing
    input_ids = torch.zeros(total, dtype=torch.long)
    position_ids = torch.zeros(total, dtype=torch.long)
    response_mask = torch.zeros(total, dtype=torch.bool)
    for start, index in zip(starts, group):
        rollout, length = rollouts[index], lengths[index]
        input_ids[start : start + length] = torch.tensor((rollout.prompt_ids + rollout.response_ids)[:length])
        position_ids[start : start + length] = torch.arange(length)
        first = start + len(rollout.prompt_ids) - 1  # the last prompt token predicts the first response token
        response_mask[first : first + len(rollout.response_ids)] = True
    rows = 1 if packed else max(len(group), 1)
    members = [rollouts[index] for index in group]
    counts = torch.tensor([len(rollout.response_ids) for rollout in members], dtype=torch.long)
    return Batch(
        input_ids.view(rows, -1).to(device),
        position_ids.view(rows, -1).to(device) if packed else None,
        response_mask.view(rows, -1).to(device),
        torch.tensor([token for rollout in members for token in rollout.response_ids], dtype=torch.long).to(device),
        torch.tensor(group, dtype=torch.long).repeat_interleave(counts).to(device),
        torch.tensor([value for rollout in members for value in rollout.logprobs], dtype=torch.float32).to(device),
    )


def count_tokens(rollouts: Sequence[Rollout]) -> int:
    """Response tokens of the rollouts of all ranks: what every summed loss of an optimizer step is divided by."""
    return sum(len(rollout.response_ids) for rollout in rollouts)


# Models


class Policy(nn.Module):
    """A causal language model whose forward hands hidden states and the output matrix to a loss head.

    The losses of every stage are functions of (hidden, lm_head weight) that never hold the (N, V) logits of a batch;
    calling them inside `forward` is what lets a sharded lm_head be gathered for them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.recomputed_layers: tuple[nn.Module, ...] = ()  # whose activations are not kept for the backward pass

    def forward(self, batch: Batch, head: Callable[[Tensor, Tensor], object]):
        """head(hidden (N, D), weight (V, D)) with one row of `hidden` for each target of the batch."""
        # transformers recomputes layers in training mode. The flag is set on the layers themselves, so that no dropout is
        # switched on, and for this pass alone: a sampler that shares the model would lose its cache by it.
        for layer in self.recomputed_layers:
            layer.training = True
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **packed_lengths(batch)
        ).last_hidden_state  # (B, T, D)
        for layer in self.recomputed_layers:
            layer.training = False
        return head(hidden[batch.response_mask], self.model.get_output_embeddings().weight)


def packed_lengths(batch: Batch) -> dict:
    """Where packed sequences begin and end, under the names that transformers hands through to the attention."""
    if batch.position_ids is None:
        return {}
    starts = (batch.position_ids[0] == 0).nonzero().squeeze(1)
    bounds = torch.cat([starts, starts.new_tensor([batch.input_ids.shape[1]])]).int()  # (S + 1,)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def packed_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Attention inside each packed sequence alone, at the cost of the sequences and not of their total length squared.

    query (1, H, T, d), key and value (1, K, T, d), in bfloat16 on a GPU -> (1, T, H, d). The kernel is PyTorch's flash
    attention for variable lengths; without `cu_seq_lens_q` it is transformers' usual one.
    """
    if "cu_seq_lens_q" not in kwargs:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.shape[1] // key.shape[1]
    if "enable_gqa" in VARLEN_OPTIONS:
        options = {"enable_gqa": grouped > 1}
    else:
        options, key, value = {}, key.repeat_interleave(grouped, dim=1), value.repeat_interleave(grouped, dim=1)
    if "window_size" in VARLEN_OPTIONS:
        options["window_size"] = ((sliding_window or 0) - 1, 0)  # tokens to the left (-1: all of them) and to the right
    elif sliding_window is None:
        options["is_causal"] = True
    else:
        raise InputError("a model with sliding windows needs torch 2.13 for packed sequences on a GPU; upgrade it")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
    bounds, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, **options)[None], None


try:  # torch before 2.10 has none; packed sequences are then told apart by a mask
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)
except ImportError:
    varlen_attn, VARLEN_OPTIONS = None, set()
AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *arguments, **options: None)


def load_policy(model: str, trainable: bool, activation_checkpointing: bool = False) -> Policy:
    """Loads a checkpoint onto this rank's device: in float32 to train it, or frozen, in bfloat16 on a GPU.

    With several ranks, or a GPU, it is sharded over `device_mesh()` and computes in bfloat16 on GPUs; collective then.
    """
    device, mesh = this_device(), device_mesh()
    dtype = torch.float32 if trainable or device.type == "cpu" else torch.bfloat16
    if mesh is None:
        policy = Policy(load_causal_lm(model, dtype, device))
    else:
        policy = Policy(meta_causal_lm(model, dtype))
        if device.type == "cuda" and varlen_attn is not None:
            policy.model.set_attn_implementation("packed")
    policy.requires_grad_(trainable)
    if activation_checkpointing:
        checkpoint_layers(policy)
    if mesh is not None:
        shard(policy, mesh)
        policy.to_empty(device=device)
        policy.model.tie_weights()  # to_empty has made two of what was one
        fill(policy, load_causal_lm(model, dtype, torch.device("cpu")) if rank() == 0 else None)
    return policy


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a causal language model: the longest list of modules in it."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def checkpoint_layers(policy: Policy) -> None:
    """Recomputes each decoder layer in the backward pass instead of keeping its activations."""
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.recomputed_layers = tuple(decoder_layers(policy.model))


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shards each decoder layer, and at the wrapper what is left (embedding, last norm, head), over the mesh (FSDP2)."""
    cuda = mesh.device_type == "cuda"
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if cuda else MixedPrecisionPolicy()
    for module in (*decoder_layers(policy.model), policy):
        fully_shard(module, mesh=mesh, mp_policy=precision)
        # Every loss is a sum over tokens divided by one global count, so gradients add up over ranks. By default they
        # would be averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def fill(policy: Policy, source: nn.Module | None) -> None:
    """Copies the weights of rank 0's `source` into the sharded policy, a tensor at a time. Collective."""
    weights = source.state_dict() if source is not None else {}
    device = this_device()
    for name, target in policy.model.state_dict().items():
        value = weights[name] if source is not None else torch.empty(target.shape, dtype=target.dtype)
        target.copy_(distribute_tensor(value.to(device), target.device_mesh, target.placements))
    for name, target in policy.model.named_buffers():  # rotary frequencies, which are in no state dict
        if source is not None:
            target.copy_(source.get_buffer(name))
        dist.broadcast(target, 0)


def is_sharded(policy: Policy) -> bool:
    return isinstance(policy, FSDPModule)


def full_weights(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight whole, by its name in a checkpoint, a tied head under both its names. Only one is held at a time.

    Gathering is collective: all ranks must go through it, in step.
    """
    if is_sharded(policy):
        policy.reshard()  # a forward pass without a backward leaves the wrapper's weights gathered
    for name, value in policy.model.state_dict().items():
        value = value.to(dtype or value.dtype)
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


def meta_causal_lm(model: str, dtype: torch.dtype) -> nn.Module:
    """The model's structure, without memory for its weights."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    refuse_unusual_heads(model, causal_lm)
    return causal_lm.eval()  # no dropout, in training either: the sampler and the trainer must be the same policy


def load_causal_lm(model: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`AutoModelForCausalLM` from safetensors, in evaluation mode."""
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True).to(device)
    refuse_unusual_heads(model, causal_lm)
    return causal_lm.eval()


def refuse_unusual_heads(model: str, causal_lm: nn.Module) -> None:
    """InputError for an output layer that the fused losses would get wrong."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(causal_lm.config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"model {model!r} rescales its logits ({name}), which the fused losses do not do; use another"
            )
    if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
        raise InputError(f"model {model!r} has a bias in its output layer, which the fused losses ignore; use another")


def save_pretrained(policy: Policy, directory: Path) -> None:
    """Writes config and safetensors, from rank 0; all ranks take part in gathering the weights."""
    weights, kept = {}, {}  # kept: one copy of a tied matrix, so that it is written once
    for (name, value), source in zip(full_weights(policy), policy.model.state_dict(keep_vars=True).values()):
        if rank() == 0:
            weights[name] = kept.setdefault(id(source), value.cpu())
    if rank() == 0:
        policy.model.save_pretrained(directory, state_dict=weights)


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float) -> float:
    """Clips the gradient to `max_grad_norm` (2-norm over all parameters), steps, clears it; returns the norm found."""
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)  # over the shards of all ranks
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(grad_norm)


def learning_rate(step: int, total_steps: int, peak: float, schedule: str, warmup_steps: int = 0) -> float:
    """Linear warmup to `peak`, then constant, or a cosine that ends at a tenth of it. `step` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# Lineage: what a checkpoint is made of


def read_lineage(model: str) -> dict:
    """What is known of a checkpoint: its `run.json` if a stage wrote it, and always its path and a content hash."""
    directory = Path(model)
    if not directory.is_dir():
        return {"path": model, "sha256": getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)}
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise InputError(f"model {model!r} holds no .safetensors weights; only safetensors are loaded")
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    run = {}
    if (directory / "run.json").is_file():
        try:
            run = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{directory / 'run.json'} is not JSON ({error}); the checkpoint's history is lost"
            ) from None
    return {**run, "path": model, "sha256": digest.hexdigest()}


def consumed_problems(lineage: dict) -> set[str]:
    """Ids of every labelled problem that a checkpoint's weights have been trained on, through all its ancestors."""
    return set(lineage.get("consumed", ())).union(*(map(consumed_problems, lineage.get("parents", {}).values())))


def was_rewarded(lineage: dict) -> bool:
    """Whether a checkpoint or one of its ancestors was trained on the sparse reward (condition C1 of a teacher)."""
    stages = {"teacher_grpo", "student_grpo"}
    return lineage.get("stage") in stages or any(map(was_rewarded, lineage.get("parents", {}).values()))


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def code_version() -> str:
    """The commit of this code, with "-dirty" if it was changed since, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# Run directories


class Run:
    """The output directory of a stage, and its diary.

    While the stage runs everything is written to OUT.partial: `metrics.jsonl` (one line a step) and every
    `save_every` steps the training state from which `--resume` goes on. Only a complete checkpoint is renamed to OUT.
    So a directory called OUT is always whole, whenever and however the process dies, and `make` can depend on it.

    cfg is a stage's Config; of its fields `out`, `seed`, `resume` and `save_every` are read here, and all are recorded.
    `parents` maps roles ("model", "teacher") to checkpoints, whose lineage is copied into `run.json`.

    Raises InputError when OUT exists, is in use by another run, or holds an interrupted run of other settings.
    """

    def __init__(self, cfg, parents: dict[str, str]):
        self.out, self.partial = Path(cfg.out), Path(f"{cfg.out}.partial")
        self.save_every = cfg.save_every
        # Files are rank 0's; the others learn what it found.
        self.record, self.state, self.start_step = on_rank_0(lambda: self._open(cfg, parents))
        self._began = time.monotonic()
        self._phases: dict[str, float] = defaultdict(float)
        self._bar = None

    def _open(self, cfg, parents: dict[str, str]) -> tuple[dict, Path | None, int]:
        """Takes the directory; returns this run's record, the training state to continue from, and its step."""
        record = {
            "stage": Path(sys.modules[type(cfg).__module__].__file__).stem,
            "config": dataclasses.asdict(cfg),
            "parents": {role: read_lineage(model) for role, model in parents.items()},
            "consumed": [],
            "code": code_version(),
            "packages": {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "math-verify")},
            "hardware": hardware(),
            "ranks": world_size(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
        }
        if self.out.exists():
            raise InputError(f"--out {cfg.out!r} already exists; name another, or delete it")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self.partial / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out {cfg.out!r} is being written by another run; name another, or stop that one"
            ) from None
        except OSError as error:
            raise InputError(
                f"--out {cfg.out!r} cannot be written ({error.strerror}); name another directory"
            ) from None
        state, start_step = self._find_state(cfg.resume, record)
        # Lines of steps that were not saved will be written again.
        path, lines = self.partial / "metrics.jsonl", []
        if path.exists():
            lines = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] < start_step]
        path.write_text("".join(lines))
        self._metrics = path.open("a")
        return record, state, start_step

    def _find_state(self, resume: bool, record: dict) -> tuple[Path | None, int]:
        states = sorted(path for path in self.partial.glob("state-*") if path.suffix != ".tmp")
        if not states:
            return None, 0
        if not resume:
            raise InputError(f"{self.partial} holds an interrupted run; add --resume to continue it, or delete it")
        saved = json.loads((states[-1] / "run.json").read_text())
        for name, value in json.loads(json.dumps(record["config"])).items():
            if name != "resume" and saved["config"].get(name) != value:
                raise InputError(
                    f"--resume: the interrupted run had {name} = {saved['config'].get(name)!r}, now it is {value!r}; "
                    f"give the same settings, or delete {self.partial}"
                )
        record["consumed"], record["seconds"] = saved["consumed"], saved["seconds"]
        return states[-1], saved["steps"]

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Loads the interrupted run's weights and optimizer state, if there is one to continue."""
        if self.state is not None:
            model_state, optimizer_state = get_state_dict(policy, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=self.state, no_dist=not dist.is_initialized())
            set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            say(f"{self.out}: continuing after step {self.start_step}")

    def checkpoint(self, steps: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """After every `save_every` steps, saves the training state; the last one goes only when the new one is whole.

        Every rank writes its own shards, so on several nodes the directory must be one that all of them see.
        """
        if steps % self.save_every:
            return
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        state = self.partial / f"state-{steps:06d}"
        unfinished = state.with_suffix(".tmp")
        on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=unfinished,
            no_dist=not dist.is_initialized(),
        )
        on_rank_0(lambda: self._accept_state(unfinished, state, steps))

    def _accept_state(self, unfinished: Path, state: Path, steps: int) -> None:
        self._write_record(unfinished, steps)
        unfinished.rename(state)
        for older in self.partial.glob("state-*"):
            if older != state:
                shutil.rmtree(older)

    def _write_record(self, directory: Path, steps: int) -> None:
        seconds = self.record["seconds"] + time.monotonic() - self._began
        record = {**self.record, "steps": steps, "seconds": round(seconds, 1)}
        (directory / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def steps(self, total: int) -> Iterable[int]:
        """The steps still to do, behind a progress bar."""
        self._bar = progress_bar(total, self.out.name, "step", initial=self.start_step)
        for step in range(self.start_step, total):
            yield step
            self._bar.update()
        self._bar.close()

    def consume(self, problems: Iterable[Problem]) -> None:
        """Records that these labelled problems have been trained on."""
        self.record["consumed"] = sorted({*self.record["consumed"], *(problem.id for problem in problems)})

    @contextmanager
    def phase(self, name: str):
        """Adds the time of the block to the next logged line as `seconds_<name>`."""
        began = time.monotonic()
        yield
        self._phases[name] += time.monotonic() - began

    def log(self, step: int, metrics: dict[str, float], show: Sequence[str] = ()) -> None:
        """Appends one line to metrics.jsonl; the metrics named in `show` stand beside the progress bar."""
        line = {"step": step, **metrics, **{f"seconds_{name}": round(s, 4) for name, s in self._phases.items()}}
        self._phases.clear()
        if rank():
            return
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._bar is not None:
            self._bar.set_postfix({name: f"{metrics[name]:.4g}" for name in show if name in metrics})

    def finish(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
        """Writes the checkpoint, its curves and its record, and gives the directory its final name."""
        save_pretrained(policy, self.partial)
        on_rank_0(lambda: self._complete(tokenizer, steps))

    def _complete(self, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
        tokenizer.save_pretrained(self.partial)
        self._metrics.close()
        plot_metrics(self.partial / "metrics.jsonl", self.partial / "curves.png")
        self._write_record(self.partial, steps)
        for state in self.partial.glob("state-*"):
            shutil.rmtree(state)
        (self.partial / "lock").unlink()
        self.partial.rename(self.out)
        print(f"wrote {self.out}")


def pyplot():
    """matplotlib.pyplot for pictures in files, with no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Draws every number of a metrics.jsonl against its step, one small panel each."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name != "step"]
    if not names:
        return
    plt = pyplot()
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.2 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axis.plot(*zip(*points), linewidth=1.2, marker="." if len(points) < 30 else None)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("step", fontsize=9)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
