"""Leaves shared by the four stages: processes, models and their sharding, the optimizer's step, the command line.

Nothing here knows which stage is calling. What flows through a stage is in records.py (problem, rollout, batch), what it
leaves behind in checkpoints.py (lineage, run directory), where its samples come from in engines.py.

Letters used for shapes in every file: B sequences in a batch, T positions, N response tokens of a batch packed
together, V vocabulary, D hidden size, G rollouts per problem (the group), P problems.
"""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import itertools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import transformers.utils
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from records import Batch

# Where the hub package `kernels` is installed as well, transformers would import our kernels.py in its place, and fail.
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_: False

from safetensors import SafetensorError, safe_open  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

# A loss head returns views, and nothing writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class InputError(ValueError):
    """Bad input, or a full disk: one sentence that names what is wrong and the remedy. Printed without a traceback."""


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
    end_process()


# Processes: one for each GPU, started by torchrun. Without torchrun there is one, and everything below is trivial.


def start_process() -> None:
    """Joins the other processes of this run. Does nothing the second time, and little in a lone process on a CPU.

    It has to come before any vLLM engine, which otherwise makes a process group of its own.
    """
    torchrun, cuda = "TORCHELASTIC_RUN_ID" in os.environ, torch.cuda.is_available()
    if not cuda:
        keep_freed_memory()
    if dist.is_initialized() or not (torchrun or cuda):
        return
    if cuda:
        torch.cuda.set_device(this_device())
    # Python objects travel over gloo. Ranks wait for one another while the longest response is being sampled.
    backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(hours=3)
    if torchrun:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistError as error:
            meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise InputError(
                f"the processes of this run cannot meet at {meeting} ({first_line(error)}); give torchrun another port"
            ) from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if rank():
        transformers.utils.logging.disable_progress_bar()


@cache
def keep_freed_memory() -> None:
    """Has the C library keep what tensors leave. It would return large ones to the kernel, which hands them out again page
    by page, cleared: a twentieth of a small model's step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc's alone
    if mallopt:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
        mallopt(m_trim_threshold, 2**31 - 1)


def end_process() -> None:
    """Leaves the other processes. An interpreter that ends without it may abort in one of the group's threads."""
    if dist.is_initialized() and "vllm" not in sys.modules:  # vLLM does it on the way out, and wants to be the one
        dist.destroy_process_group()


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
def device_mesh(shard_nodes: int = 1) -> DeviceMesh | None:
    """What weights are sharded over: the ranks of `shard_nodes` nodes, with a replica on every other such group (HSDP).

    With one, weights are gathered inside a node and only gradients cross between nodes; a model too large for a node needs
    more. None for a lone process on a CPU. InputError if the nodes cannot be grouped so.
    """
    start_process()
    if world_size() == 1 and not torch.cuda.is_available():
        return None
    together = shard_nodes * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size() % together:
        raise InputError(
            f"--shard-nodes {shard_nodes}: {world_size()} processes cannot be grouped by {together}; give a divisor of the "
            "number of nodes"
        )
    sizes, names = (world_size() // together, together), ("replicate", "shard")
    keep = slice(1, None) if world_size() == together else slice(None)
    return init_device_mesh(this_device().type, sizes[keep], mesh_dim_names=names[keep])


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
    """InputError for a number of a Config that is not positive, unless zero is a seed or switches something off, and for
    nodes that cannot share the weights as it says."""
    allowed = {"seed", "split_seed", "kl_coef", "warmup_steps", "weight_decay", *may_be_zero}
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "top_k":
            flag = f"--{name.replace('_', '-')} {value}"
            if not math.isfinite(value):
                raise InputError(f"{flag} is no number to compute with; give a finite one")
            if value < 0 or (value == 0 and name not in allowed):
                least = "zero or more" if name in allowed else "a number above zero"
                raise InputError(f"{flag} is too small; give {least}")
    if hasattr(cfg, "shard_nodes"):
        device_mesh(cfg.shard_nodes)


# Models


class Policy(nn.Module):
    """A causal language model whose forward hands hidden states and the output matrix to a loss head.

    The losses of every stage are functions of (hidden, lm_head weight) that never hold the (N, V) logits of a batch;
    calling them inside `forward` is what lets a sharded lm_head be gathered for them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        model.set_attn_implementation("packed")
        self.recomputed_layers: tuple[nn.Module, ...] = ()  # whose activations are not kept for the backward pass

    def forward(self, batch: Batch, head: Callable[[Tensor, Tensor], object]):
        """head(hidden (N, D), weight (V, D)) with one row of `hidden` for each target of the batch."""
        # transformers recomputes layers in training mode. The flag is set on the layers themselves, so that no dropout is
        # switched on, and for this pass alone: a sampler that shares the model would lose its cache by it.
        for layer in self.recomputed_layers:
            layer.training = True
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **packed_lengths(batch)
        ).last_hidden_state  # (1, T, D)
        for layer in self.recomputed_layers:
            layer.training = False
        return head(hidden[batch.response_mask], self.model.get_output_embeddings().weight)


def packed_lengths(batch: Batch) -> dict:
    """Where packed sequences begin and end, under the names that transformers hands through to the attention."""
    bounds = torch.tensor([0, *itertools.accumulate(batch.lengths)], dtype=torch.int32, device=batch.input_ids.device)
    longest = max(batch.lengths)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def packed_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Attention inside each packed sequence alone, at the cost of the sequences and not of their total length squared.

    query (1, H, T, d), key and value (1, K, T, d) -> (1, T, H, d). On a GPU the kernel is PyTorch's flash attention for
    variable lengths; elsewhere sequences of one length, which make_batches puts side by side, are a batch for the usual
    kernel. Without `cu_seq_lens_q` (a sampler's forward) it is transformers' own. InputError for a model whose attention
    has a term besides: not all of these kernels would see it.
    """
    besides = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if besides:
        raise InputError(f"the model's attention has a {besides[0]}, which packed attention has not; use another model")
    if "cu_seq_lens_q" not in kwargs:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if query.is_cuda and varlen_attn is not None:
        return varlen_attention(query, key, value, scaling, sliding_window, **kwargs)
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    parts = [x[0].transpose(0, 1).split([length * count for length, count in runs]) for x in (query, key, value)]
    attended = []
    for (length, count), *qkv in zip(runs, *parts):
        qkv = [x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv]  # (count, H or K, length, d)
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        attended.append(sdpa_attention_forward(module, *qkv, mask, scaling=scaling)[0].flatten(0, 1))
    return torch.cat(attended)[None], None


def varlen_attention(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q, **kwargs):
    """The same in one kernel, for bfloat16 on a GPU."""
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
    lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    return varlen_attn(query, key, value, *lengths, scale=scaling, **options)[None], None


def packed_mask(*arguments, attention_mask=None, **options):
    """None for packed sequences, which the attention itself tells apart; a sampler's padding makes the usual mask."""
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


try:  # torch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)
except ImportError:
    varlen_attn, VARLEN_OPTIONS = None, set()
AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)


def load_policy(model: str, trainable: bool, activation_checkpointing: bool = False, shard_nodes: int = 1) -> Policy:
    """Loads a checkpoint onto this rank's device: in float32 to train it, or frozen, in bfloat16 on a GPU.

    With several ranks, or a GPU, it is sharded over `device_mesh(shard_nodes)` and computes in bfloat16 on GPUs; collective then.
    """
    device, mesh = this_device(), device_mesh(shard_nodes)
    dtype = torch.float32 if trainable or device.type == "cpu" else torch.bfloat16
    if mesh is None:
        policy = Policy(load_causal_lm(model, dtype, device))
    else:
        policy = Policy(meta_causal_lm(model, dtype))
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


def release(model: Policy | None) -> None:
    """Frees what a forward pass without a backward leaves gathered of a sharded model: embedding, last norm and head."""
    if model is not None and is_sharded(model):
        model.reshard()


def full_weights(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight whole, by its name in a checkpoint, a tied head under both its names. Only one is held at a time.

    Gathering is collective: all ranks must go through it, in step.
    """
    release(policy)
    for name, value in policy.model.state_dict().items():
        value = value.to(dtype or value.dtype)
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


def load_config(model: str) -> PreTrainedConfig:
    """The config of a checkpoint directory or hub name; InputError if there is none of a known architecture."""
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise InputError(
                f"model {model!r} brings code of its own, which is never run; name one of an architecture that transformers "
                "has"
            ) from None
        raise InputError(
            f"model {model!r} has no config.json that transformers can use ({first_line(error)}); fetch it anew, or name "
            "another"
        ) from None


def check_checkpoint(model: str, vocab_size: int, packs: bool = True) -> None:
    """InputError, before its weights are read, for a checkpoint that could not be trained or distilled from.

    Its config must make a model whose output layer the losses know and has a row for each of the tokenizer's
    `vocab_size` tokens, and the headers of its safetensors must fit their files. `packs`: it must also be a model that can
    be given packed sequences; one that is only sampled from need not.
    """
    files = sorted(Path(model).glob("*.safetensors"))
    if not files and Path(model).is_dir():
        raise InputError(f"model {model!r} holds no .safetensors weights, and no others are loaded; convert it")
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is not a whole safetensors file ({first_line(error)}); fetch it anew") from None
    structure = meta_causal_lm(model, torch.float32)
    layer_types = set(getattr(structure.config.get_text_config(), "layer_types", None) or ())
    mixers = layer_types - {"full_attention", "sliding_attention"}
    if packs and (mixers or not structure.is_backend_compatible()):
        layers = ", ".join(sorted(mixers)) or f"those of {type(structure).__name__}"
        raise InputError(
            f"model {model!r} has layers ({layers}) that would mix the sequences of a micro-batch; use one whose layers are "
            "all plain attention"
        )
    rows = structure.get_output_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise InputError(
            f"model {model!r} knows {rows} tokens and its tokenizer has {vocab_size}; put the tokenizer beside it that it "
            "was trained with"
        )


def meta_causal_lm(model: str, dtype: torch.dtype) -> nn.Module:
    """The model's structure, without memory for its weights."""
    config = load_config(model)
    try:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"model {model!r} is no causal language model ({first_line(error)}); name another") from None
    refuse_unusual_heads(model, causal_lm)
    return causal_lm.eval()  # no dropout, in training either: the sampler and the trainer must be the same policy


def load_causal_lm(model: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`AutoModelForCausalLM` from safetensors, in evaluation mode.

    InputError for files that cannot be read, and for weights that are missing, of another shape, or not finite.
    """
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is refused
    try:
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = "they have other shapes" if "mismatched_sizes" in str(error) else first_line(error)
        raise InputError(f"model {model!r} has no weights that fit its config ({reason}); fetch it anew") from None
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(
            f"model {model!r} lacks {len(missing)} of the weights that its config asks for ({missing[0]}, ...); fetch it "
            "anew"
        )
    for name, value in causal_lm.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(
                f"model {model!r} has weights that are not finite ({name}); take the checkpoint before it broke"
            )
    refuse_unusual_heads(model, causal_lm)
    return causal_lm.to(device).eval()


def first_line(error: BaseException) -> str:
    """A library's message, cut to be a part of one sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(" .")


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


def optimizer_step(
    policy: Policy, optimizer: torch.optim.Optimizer, loss: float, lr: float, max_grad_norm: float
) -> float:
    """Clips the gradient to `max_grad_norm` (2-norm over all parameters), steps, clears it; returns the norm found.

    Where the norm, or this rank's `loss` on any rank, is not finite, nothing is changed and nan is returned. Collective.
    """
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)  # over the shards of all ranks
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    found = float(grad_norm) if math.isfinite(all_sum({"loss": loss})["loss"]) else math.nan
    if math.isfinite(found):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return found if math.isfinite(found) else math.nan


def learning_rate(step: int, total_steps: int, peak: float, schedule: str, warmup_steps: int = 0) -> float:
    """Linear warmup to `peak`, then constant, or a cosine that ends at a tenth of it. `step` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
