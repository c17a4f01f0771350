"""What a stage holds in memory, estimated before anything is loaded: for --dry-run, and for micro-batches that fit.

Parameters are counted on PyTorch's meta device, so a 70B model takes seconds and no memory. The estimate has the
sharded weights with their gradients and AdamW states, the layers that FSDP2 gathers, the frozen model (reference or
teacher), the activations of one micro-batch, the loss head's piece of logits and gradient of the output matrix, and
vLLM's weights and cache. It leaves out the CUDA context, NCCL's buffers and fragmentation, for which `RESERVE` is kept
free.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common import InputError, all_max, print0, rank, world_size
from lib.lineage import read_record
from lib.policy import decoder_layers, load_config

GIB = 2**30
RESERVE = 6 * GIB  # CUDA context, NCCL buffers, fragmentation
BESIDE_A_TRAINER = 16 * GIB  # of vLLM's cache, if --kv-cache-gib is not given
LARGEST, SMALLEST = 16384, 512  # positions of a micro-batch whose size is not given
# On a CPU, activations are in float32, and attention and norms keep more of them than on a GPU: bytes a position relative
# to a GPU's. Measured with SmolLM2-135M, 676 and 2,704 positions: 1.9 MB each, where the GPU's formula gives 0.64.
CPU_ACTIVATIONS = 3
CPU_SHARE = 0.8  # of the free memory that is planned with
CARDS = (24, 48, 80, 141)  # GB of memory of common GPUs
LOGITS = 5 << 28  # bytes of logits that a loss holds at a time, for each model (kernels.GPU_LOGIT_BYTES)


@dataclass(frozen=True)
class Size:
    """The numbers of one model that its memory depends on."""

    parameters: int
    largest_layer: int  # parameters of one decoder layer
    outside: int  # parameters outside the layers: embedding, head, last norm
    head: int  # parameters of the output matrix
    layers: int
    hidden: int
    intermediate: int
    query: int  # width of all query heads
    key_value: int  # width of all key heads, and of all value heads


def size_of(config) -> Size:
    """Counts a model's parameters on the meta device; tied matrices once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layers = decoder_layers(model)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    total = sum(p.numel() for p in model.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Size(
        total, max(counts), total - sum(counts), model.get_output_embeddings().weight.numel(), len(layers),
        config.hidden_size, config.intermediate_size, config.num_attention_heads * head_dim,
        config.num_key_value_heads * head_dim,
    )  # fmt: skip


def plan(
    trained: Size,
    frozen: Size | None,
    in_loss: bool,
    shards: int,
    positions: int,
    kv_cache_bytes: float,
    tensor_parallel: int,
    checkpointing: bool,
    engine: bool = True,
) -> dict[str, dict[str, float]]:
    """Bytes on each GPU by item while a stage samples and while it trains: {"sampling": {...}, "training": {...}}.

    `in_loss` says whether the frozen model is a teacher, which takes part in every loss, or a reference, which is asked
    before the first one. The weights are sharded over `shards` GPUs, a micro-batch has `positions` positions, and
    `checkpointing` means that activations are computed again in the backward pass. Weights, gradients and the two
    states of AdamW are in float32, all computation is in bfloat16.
    """
    always = {
        "weights (float32, sharded)": 4 * trained.parameters / shards,
        "AdamW states": 8 * trained.parameters / shards,
    }
    if frozen:
        always["frozen model (bfloat16, sharded)"] = 2 * frozen.parameters / shards
    widest = max(size.largest_layer for size in (trained, frozen) if size)
    # A KL holds the logits of both models and sums the gradient of the output matrix in float32. The gradient of either
    # loss is then copied to float32 to be summed over ranks.
    loss_head = 2 * LOGITS + (4 + 4) * trained.head if in_loss else LOGITS + (2 + 4) * trained.head
    training = {
        "gradients (float32, sharded)": 4 * trained.parameters / shards,
        # The weights of two layers, because the next one is gathered ahead; the gradient of one layer in bfloat16 and
        # in float32; and the embedding and output matrix, which the wrapper gathers.
        "gathered layers and their gradients": 2 * 2 * widest + 6 * trained.largest_layer + 2 * trained.outside,
        "activations of a micro-batch": positions * activations(trained, checkpointing),
        "loss head: logits, gradient of the output matrix": loss_head,
    }
    if frozen and in_loss:
        training["the teacher's embedding and head, gathered"] = 2 * frozen.outside
    sampling = {}
    if engine:
        sampling["vLLM weights (bfloat16)"] = 2 * trained.parameters / tensor_parallel
        sampling["vLLM key/value cache"] = kv_cache_bytes
    else:
        sampling["replica to sample from (bfloat16)"] = 2 * trained.parameters
        training["replica to sample from (bfloat16)"] = 2 * trained.parameters
    return {"sampling": {**always, **sampling}, "training": {**always, **training}}


def activations(size: Size, checkpointing: bool) -> float:
    """Bytes that the backward pass needs of each position, in bfloat16.

    A layer keeps the inputs of norms and projections, queries, keys, values, the attention's output, and the MLP's
    gate, up and product. A quarter is added for statistics in float32 and copies. With `checkpointing` only a layer's
    input is kept, and one layer at a time computed again.
    """
    layer = 2 * 1.25 * (4 * size.hidden + 2 * size.query + 2 * size.key_value + 3 * size.intermediate)
    return size.layers * 2 * size.hidden + layer if checkpointing else size.layers * layer


def plan_on_cpu(
    trained: Size, frozen: Size | None, shards: int, positions: int, checkpointing: bool
) -> dict[str, dict[str, float]]:
    """The same for a process on a CPU, where everything is in float32. Ranks, but not a lone process, keep a replica of
    the whole model to sample from.
    """
    held = 16 * trained.parameters + (4 * frozen.parameters if frozen else 0)
    return {
        "training": {
            "weights, gradients, AdamW states, frozen model": held / shards,
            "replica to sample from": 4 * trained.parameters * (shards > 1),
            "activations of a micro-batch": CPU_ACTIVATIONS * positions * activations(trained, checkpointing),
            "gradient of the output matrix": 4 * trained.head,
        }
    }


def disk_bytes(trained: Size, save_dtype: str = "float32") -> dict[str, float]:
    """What a stage writes, by item. A training state has float32 weights and both states of AdamW."""
    state, checkpoint = 12 * trained.parameters, {"float32": 4, "bfloat16": 2}[save_dtype] * trained.parameters
    return {"training state": state, "the next one, until it is complete": state, "checkpoint": checkpoint}


def peak(planned: dict[str, dict[str, float]]) -> float:
    return max(sum(items.values()) for items in planned.values())


def verdict(planned: dict, gigabytes: float) -> str:
    """Whether a plan fits GPUs of so many GB (10^9 bytes, as they are sold), with RESERVE kept free."""
    free = gigabytes * 1e9 - RESERVE - peak(planned)
    return f"fits, {free / GIB:.0f} GiB to spare" if free > 0 else f"does NOT fit, {-free / GIB:.0f} GiB too much"


def table(planned: dict) -> str:
    items = list(dict.fromkeys(name for part in planned.values() for name in part))
    rows = [
        f"| {name} | "
        + " | ".join(f"{part[name] / GIB:.1f}" if name in part else "" for part in planned.values())
        + " |"
        for name in items
    ]
    rows.append("| **sum** | " + " | ".join(f"**{sum(part.values()) / GIB:.1f}**" for part in planned.values()) + " |")
    return "\n".join(["| GiB on each GPU | sampling | training |", "|---|---|---|", *rows])


def fit(cfg, frozen: str | None, in_loss: bool) -> bool:
    """Whether the stage is to go on: not after --dry-run, for which the plan is printed. Collective.

    Otherwise `cfg.micro_batch_tokens`, if it is not given, becomes what the free memory allows, or what an interrupted
    run had that is to be resumed, so that it continues in the same numbers. InputError on a CPU whose memory does not
    hold the run: the system would kill it without a word. On a GPU, where running out of memory is an error with a
    message of its own, that is only printed, because the plan is an estimate.

    `frozen` is the stage's reference model, or the teacher, which is `in_loss`.
    """
    sizes = [size_of(load_config(model)) if model else None for model in (cfg.model, frozen)]
    if cfg.dry_run:
        if rank() == 0:
            report(cfg, sizes, in_loss)
        return False
    on_cpu, processes = not torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = CPU_SHARE * available_memory() / processes if on_cpu else torch.cuda.mem_get_info()[0] - RESERVE
    free = -all_max({"negated": -free})["negated"]  # of the rank that has least
    shards = min(world_size(), processes * cfg.shard_nodes)

    def needed(positions: int) -> float:
        if on_cpu:
            return peak(plan_on_cpu(*sizes, shards, positions, cfg.activation_checkpointing))
        return peak(plan_on_gpus(cfg, sizes, in_loss, shards, positions))

    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    if cfg.micro_batch_tokens is None:
        cfg.micro_batch_tokens = resumed_micro_batch(cfg)
    if cfg.micro_batch_tokens is None:
        cfg.micro_batch_tokens = LARGEST
        while cfg.micro_batch_tokens > SMALLEST and needed(cfg.micro_batch_tokens) > free:
            cfg.micro_batch_tokens //= 2
        print0(f"micro-batches of at most {cfg.micro_batch_tokens} positions (--micro-batch-tokens)")
    positions = max(cfg.micro_batch_tokens, longest)
    if needed(positions) > free:
        short = (
            f"--micro-batch-tokens {cfg.micro_batch_tokens} and sequences of up to {longest} tokens need about "
            f"{needed(positions) / GIB:.1f} GiB in each process, and {free / GIB:.1f} can be had; lower them "
            "(--max-response-tokens), add --activation-checkpointing, or take a smaller model"
        )
        if on_cpu:
            raise InputError(short)
        print0(f"This may run out of memory: {short}")
    return True


def plan_on_gpus(cfg, sizes: list[Size | None], in_loss: bool, shards: int, positions: int) -> dict:
    """`plan` with the settings of a Config."""
    cache = BESIDE_A_TRAINER if cfg.kv_cache_gib is None else cfg.kv_cache_gib * GIB
    return plan(*sizes, in_loss, shards, positions, cache, cfg.tensor_parallel, cfg.activation_checkpointing,
                engine=cfg.engine != "torch")  # fmt: skip


def resumed_micro_batch(cfg) -> int | None:
    """The micro-batch size of the interrupted run that --resume continues."""
    states = sorted(Path(f"{Path(cfg.out)}.partial").glob("state-??????")) if cfg.resume else []
    record = read_record(states[-1]) if states else None
    return record["config"]["micro_batch_tokens"] if record else None


def available_memory() -> int:
    """Bytes of memory that this process and others beside it can still take: of the machine, a container, `ulimit -v`."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]  # where the system does not say more
    with suppress(OSError):  # Linux
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits = [int(lines["MemAvailable"].split()[0]) * 1024]
    with suppress(OSError, ValueError):  # a container; "max" is no limit
        group = Path("/sys/fs/cgroup")
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        used = int((group / "memory.current").read_text()) - int(cached)
        limits.append(int((group / "memory.max").read_text()) - used)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits))


def report(cfg, sizes: list[Size | None], in_loss: bool) -> None:
    """Prints what a stage's Config needs on the GPUs of this command, or on `cfg.gpus` of them with 8 on a node."""
    positions = max(cfg.micro_batch_tokens or LARGEST, cfg.max_prompt_tokens + cfg.max_response_tokens)
    gpus = cfg.gpus or world_size()
    on_a_node = min(gpus, 8) if cfg.gpus else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shards = min(gpus, on_a_node * cfg.shard_nodes)
    planned = plan_on_gpus(cfg, sizes, in_loss, shards, positions)
    print(
        f"\n{gpus} GPU{'s' * (gpus > 1)}, the weights sharded over {shards}, a micro-batch of {positions} positions:\n\n"
        f"{table(planned)}\n\nWith {RESERVE / GIB:.0f} GiB kept free for CUDA and NCCL:"
    )
    for gigabytes in CARDS:
        print(f"- GPUs of {gigabytes} GB: {verdict(planned, gigabytes)}")
    state, another, checkpoint = disk_bytes(sizes[0], cfg.save_dtype).values()
    print(
        f"\nOn disk: {(state + another) / 1e9:.0f} GB for training states, of which two stand side by side during a save, "
        f"and {checkpoint / 1e9:.0f} GB for {'each' if cfg.export_every or cfg.keep_best else 'the'} checkpoint."
    )
