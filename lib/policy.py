"""Models: a checkpoint loaded as a `Policy`, run on packed sequences, sharded over GPUs (FSDP2), and saved."""

from __future__ import annotations

import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
import transformers.utils
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

# If a package called `kernels` is installed, transformers imports from it, and would find our kernels.py in its place.
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_: False

from safetensors import SafetensorError, safe_open  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from common import TIMEOUT, Batch, InputError, Span, first_line, rank, start_process, this_device, world_size  # noqa: E402

# FSDP2 warns that a module returns a view of its input, which matters only where somebody writes into it. Nobody does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class Policy(nn.Module):
    """A causal language model whose forward hands hidden states and the output matrix to a loss head.

    The losses of every stage are functions of (hidden, output matrix) that never hold the (N, V) logits of a batch.
    Calling them inside `forward` is what lets FSDP2 gather a sharded output matrix for them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        model.set_attn_implementation("packed")
        self.recomputed_layers: tuple[
            nn.Module, ...
        ] = ()  # layers whose activations are computed again in the backward

    def forward(self, batch: Batch, head: Callable[[Tensor, Tensor], object]):
        """head(hidden (N, D), weight (V, D)), with one row of `hidden` for each target of the batch."""
        # transformers recomputes a layer's activations only in training mode. The flag is set on the layers alone, so
        # that dropout stays off, and only during this pass: a sampler that shares the model would lose its cache by it.
        for layer in self.recomputed_layers:
            layer.training = True
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, packing=Packing(batch)
        ).last_hidden_state  # (1, T, D)
        for layer in self.recomputed_layers:
            layer.training = False
        return head(hidden[0].index_select(0, batch.predicted_at), self.model.get_output_embeddings().weight)


# Attention within a pack

PADDING = 0.5  # padding is cheaper than many small attention calls, up to about this share


class Packing:
    """What attention needs to know of a pack, worked out once for all layers of a pass.

    On a GPU: where each span's queries and keys begin, and, if any span has a prefix, which positions the keys come
    from. On a CPU: spans of similar size are padded to one, and each such `Block` is a batch for the usual attention.
    """

    def __init__(self, batch: Batch):
        device = batch.input_ids.device
        self.block_order, self.blocks, self.keys = None, [], None
        if batch.input_ids.is_cuda and varlen_attn is not None:
            queries = [span.length for span in batch.spans]
            keys = [span.prefix_length + span.length for span in batch.spans]
            self.query_bounds = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32, device=device)
            self.key_bounds = torch.tensor([0, *itertools.accumulate(keys)], dtype=torch.int32, device=device)
            self.longest_query, self.longest_key = max(queries), max(keys)
            if keys != queries:
                self.keys = torch.cat([seen_by(span) for span in batch.spans]).to(device)  # (sum of keys,)
            return
        self.blocks = [Block(spans, device) for spans in similar_spans(batch.spans)]
        rows = torch.cat([block.positions for block in self.blocks])  # (T,) the position of each row that is no padding
        self.block_order = rows.argsort()  # (T,) the row of each position


def seen_by(span: Span) -> Tensor:
    """The positions that a span attends to, (prefix_length + length,)."""
    prefix = torch.arange(span.prefix_start, span.prefix_start + span.prefix_length)
    return torch.cat([prefix, torch.arange(span.start, span.start + span.length)])


def similar_spans(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans in lists whose padding to one size adds at most a share PADDING to the products of queries and keys."""
    lists: list[list[Span]] = []
    keys, queries, products = 0, 0, 0  # of the last list: most keys, most queries, products without padding
    for span in sorted(spans, key=lambda span: (span.prefix_length + span.length, span.length), reverse=True):
        seen = span.prefix_length + span.length
        queries, products = max(queries, span.length), products + span.length * seen
        if not lists or (len(lists[-1]) + 1) * queries * keys > (1 + PADDING) * products:
            lists.append([])
            keys, queries, products = seen, span.length, span.length * seen
        lists[-1].append(span)
    return lists


class Block:
    """Spans side by side as a batch of C, padded on the right to n queries and m keys."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        lengths = torch.tensor([span.length for span in spans])
        prefixes = torch.tensor([span.prefix_length for span in spans])
        n, m = int(lengths.max()), int((prefixes + lengths).max())
        own = torch.arange(n).expand(len(spans), n)
        starts = torch.tensor([span.start for span in spans])
        real = own < lengths[:, None]  # (C, n) False at padding
        queries = torch.where(real, starts[:, None] + own, 0)
        keys = torch.zeros(len(spans), m, dtype=torch.long)
        for row, span in zip(keys, spans):
            row[: span.prefix_length + span.length] = seen_by(span)
        self.shape = len(spans), n, m
        self.queries, self.keys = queries.flatten().to(device), keys.flatten().to(device)
        self.rows = None if real.all() else real.flatten().nonzero()[:, 0].to(device)
        self.positions = queries[real].to(device)
        # Query i of a span is the key number prefix + i of those that it sees.
        self.last_key = (prefixes[:, None] + own).to(device) if prefixes.any() else None  # (C, n)
        self.masks: dict[int | None, Tensor | None] = {}

    def mask(self, sliding_window: int | None) -> Tensor | None:
        """(C or 1, 1, n, m) bool, or None if causal attention over as many keys as queries is all that is needed."""
        if sliding_window not in self.masks:
            count, n, m = self.shape
            if self.last_key is None and (sliding_window is None or sliding_window >= m):
                return None
            last = torch.arange(n, device=self.queries.device)[None] if self.last_key is None else self.last_key
            key = torch.arange(m, device=last.device)
            mask = key <= last[..., None]
            if sliding_window is not None:
                mask &= key > last[..., None] - sliding_window
            self.masks[sliding_window] = mask[:, None]
        return self.masks[sliding_window]


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, packing=None, **kwargs
):
    """Attention within each span of a pack and to its prefix, at a cost that follows their lengths and not their sum.

    query (1, H, T, d), key and value (1, K, T, d) -> (1, T, H, d). On a GPU this is PyTorch's flash attention for
    sequences of different lengths, elsewhere the usual attention for blocks of similar spans. Without `packing` (when a
    sampler calls the model) it is transformers' own attention, or `attend_from_one` for a single position of each row.
    Raises InputError for a model whose attention has an additional term, which these kernels would leave out.
    """
    additional = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if additional:
        raise InputError(
            f"the attention of model {module.config.name_or_path!r} has a {additional[0]}, which packed attention leaves "
            "out; use another model"
        )
    if packing is None and query.shape[2] == 1:
        return attend_from_one(query, key, value, attention_mask, scaling), None
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H or K, d)
    attend = attend_varlen if packing.block_order is None else attend_in_blocks
    return attend(query, key, value, packing, scaling, sliding_window)[None], None


def attend_from_one(query, key, value, attention_mask, scaling) -> Tensor:
    """query (B, H, 1, d), key and value (B, K, T, d) -> (B, 1, H, d).

    All heads of a group see the same keys, so they can take the place of the positions, of which there is one.
    Repeating keys and values for each head, as transformers does, takes five times as long on a CPU.
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])  # (B, K, H / K, d)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(query.shape[0], 1, query.shape[1], -1)


def attend_in_blocks(query, key, value, packing: Packing, scaling, sliding_window) -> Tensor:
    """(T, H, d) with PyTorch's usual attention, in float32, because in bfloat16 it is four times slower on a CPU."""
    attended, dtype = [], query.dtype
    query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    for block in packing.blocks:
        count, n, m = block.shape
        q = query.index_select(0, block.queries).unflatten(0, (count, n)).transpose(1, 2)  # (C, H, n, d)
        k, v = (x.index_select(0, block.keys).unflatten(0, (count, m)).transpose(1, 2) for x in (key, value))
        mask = block.mask(sliding_window)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        ).transpose(1, 2).flatten(0, 1)  # (C n, H, d)  # fmt: skip
        attended.append(mixed if block.rows is None else mixed.index_select(0, block.rows))
    return torch.cat(attended).index_select(0, packing.block_order).to(dtype)


def attend_varlen(query, key, value, packing: Packing, scaling, sliding_window) -> Tensor:
    """(T, H, d) with PyTorch's kernel for bfloat16 on a GPU, whose options differ between versions of PyTorch."""
    grouped = query.shape[1] // key.shape[1]
    if "enable_gqa" in VARLEN_OPTIONS:
        options = {"enable_gqa": grouped > 1}
    else:
        options, key, value = {}, key.repeat_interleave(grouped, dim=1), value.repeat_interleave(grouped, dim=1)
    if "window_size" in VARLEN_OPTIONS:
        # How many tokens a position sees to its left, -1 for all of them, and to its right. With more keys than queries
        # the last query is aligned to the last key.
        options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    elif sliding_window is None:
        options["is_causal"] = True
    else:
        raise InputError(
            f"a model with sliding windows needs torch 2.13 for packed sequences on a GPU, and this is {torch.__version__}; "
            "upgrade it"
        )
    if packing.keys is not None:
        key, value = key.index_select(0, packing.keys), value.index_select(0, packing.keys)
    bounds = packing.query_bounds, packing.key_bounds, packing.longest_query, packing.longest_key
    return varlen_attn(query, key, value, *bounds, scale=scaling, **options)


def packed_mask(*arguments, attention_mask=None, **options):
    """No mask for packed sequences, which the attention itself keeps apart; transformers' own for a sampler's
    padding.
    """
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


try:  # torch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)
except ImportError:
    varlen_attn, VARLEN_OPTIONS = None, set()
AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)


# Loading


def compute_dtype(cfg) -> torch.dtype:
    """What a Config's products are computed in: bfloat16 on a GPU, and float32 on a CPU unless told otherwise."""
    return torch.bfloat16 if torch.cuda.is_available() or cfg.cpu_bfloat16 else torch.float32


def load_policy(model: str, cfg, trainable: bool) -> Policy:
    """A checkpoint on this rank's device: in float32 to be trained; frozen, in the Config's `compute_dtype`.

    With several ranks, a GPU or bfloat16 it is sharded over a `device_mesh`, and the call is collective.
    """
    device, compute = this_device(), compute_dtype(cfg)
    mesh = device_mesh(alone_too=compute == torch.bfloat16)
    dtype = torch.float32 if trainable else compute
    policy = Policy(load_causal_lm(model, dtype, device) if mesh is None else meta_causal_lm(model, dtype))
    policy.requires_grad_(trainable)
    if trainable and cfg.activation_checkpointing:
        recompute_layers(policy)
    if mesh is not None:
        shard(policy, mesh, compute=compute if compute == torch.bfloat16 else None)
        policy.to_empty(device=device)
        policy.model.tie_weights()  # to_empty has made two tensors of one that was shared
        fill(policy, load_causal_lm(model, dtype, torch.device("cpu")) if rank() == 0 else None)
    return policy


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a causal language model: the longest list of modules in it."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def recompute_layers(policy: Policy) -> None:
    """Has each decoder layer computed again in the backward pass, so that its activations need not be kept."""
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.recomputed_layers = tuple(decoder_layers(policy.model))


def device_mesh(alone_too: bool = False) -> DeviceMesh | None:
    """All ranks, over which weights are sharded. For a lone process on a CPU it is None unless `alone_too`: FSDP2 is
    also what computes in another type than that of the weights.
    """
    start_process(alone_too)
    if world_size() == 1 and not (torch.cuda.is_available() or alone_too):
        return None
    mesh = init_device_mesh(this_device().type, (world_size(),))
    # The mesh's group has PyTorch's short default time-out, not that of the whole group.
    dist.distributed_c10d._set_pg_timeout(TIMEOUT, mesh.get_group())
    return mesh


def shard(policy: Policy, mesh: DeviceMesh, compute: torch.dtype | None) -> None:
    """Shards each decoder layer, and at the wrapper the rest (embedding, last norm, output matrix), over the mesh.

    `compute` is the dtype that weights are gathered in; None keeps their own. Gradients are summed in float32.
    """
    # Without the last argument FSDP2 would also round the float tensors of a Batch to `compute`.
    precision = MixedPrecisionPolicy(compute, compute and torch.float32, cast_forward_inputs=False)
    for module in (*decoder_layers(policy.model), policy):
        fully_shard(module, mesh=mesh, mp_policy=precision)
        # Every loss is a sum over tokens divided by one global count, so gradients have to be summed over ranks, where
        # FSDP2 would average them.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def fill(policy: Policy, source: nn.Module | None) -> None:
    """Copies the weights of rank 0's `source` into the sharded policy, one tensor at a time. Collective."""
    weights = source.state_dict() if source is not None else {}
    device = this_device()
    for name, target in policy.model.state_dict().items():
        if source is not None:
            value = weights[name].to(device)
        else:
            value = torch.empty(target.shape, dtype=target.dtype, device=device)
        target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
    for name, target in policy.model.named_buffers():  # rotary frequencies, which a state dict leaves out
        if source is not None:
            target.copy_(source.get_buffer(name))
        dist.broadcast(target, 0)


def is_sharded(policy: Policy) -> bool:
    return isinstance(policy, FSDPModule)


def release(model: Policy | None) -> None:
    """Frees the embedding, last norm and output matrix that a forward pass without a backward leaves gathered."""
    if model is not None and is_sharded(model):
        model.reshard()


def full_weights(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight, whole, by its name in a checkpoint; a tied output matrix comes under both its names.

    Only one is held at a time. Gathering is collective: all ranks must go through it in step.
    """
    release(policy)
    for name, value in policy.model.state_dict().items():
        value = value.to(dtype or value.dtype)
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


def checkpoint_weights(model: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The same from a checkpoint's safetensors, without loading the whole model. InputError for one that is not
    finite.
    """
    names: dict[int, list[str]] = {}  # of each parameter; a tied matrix has two
    for name, parameter in meta_causal_lm(model, dtype).state_dict(keep_vars=True).items():
        names.setdefault(id(parameter), []).append(name)
    synonyms = {name: same for same in names.values() for name in same}
    directory = Path(model)
    if not directory.is_dir():
        directory = Path(huggingface_hub.snapshot_download(model, allow_patterns="*.safetensors"))
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                value = file.get_tensor(name)
                if not value.isfinite().all():
                    raise InputError(
                        f"model {model!r} has weights that are not finite ({name}); take another checkpoint"
                    )
                for synonym in synonyms.get(name, [name]):
                    yield synonym, value.to(dtype)


def save_pretrained(policy: Policy, directory: Path) -> None:
    """Writes config and safetensors, from rank 0; gathering the weights is collective."""
    weights, kept = {}, {}  # kept: a tied matrix is kept, and so written, once
    for (name, value), source in zip(full_weights(policy), policy.model.state_dict(keep_vars=True).values()):
        if rank() == 0:
            weights[name] = kept.setdefault(id(source), value.cpu())
    if rank() == 0:
        policy.model.save_pretrained(directory, state_dict=weights)


# Checkpoints as files


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


def load_generation_config(model: str) -> GenerationConfig:
    """The checkpoint's generation_config.json, which names its end-of-sequence tokens; without one, what its
    config.json says of them, as transformers does.
    """
    if Path(model).is_dir() and not (Path(model) / "generation_config.json").exists():
        return GenerationConfig.from_model_config(load_config(model))
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError as error:
        if Path(model).is_dir():
            raise InputError(
                f"model {model!r} has a generation_config.json that cannot be read ({first_line(error)}); fetch it anew"
            ) from None
        return GenerationConfig.from_model_config(load_config(model))


def check_checkpoint(model: str, vocab_size: int, packs: bool = True) -> None:
    """Raises InputError, before any weight is read, for a checkpoint that could not be trained or distilled from.

    Its config must make a model whose output layer the losses know, with a row for each of the tokenizer's `vocab_size`
    tokens, and the headers of its safetensors must fit their files. `packs`: it must also take packed sequences, which
    a model that is only sampled from need not.
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
    load_generation_config(model)
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
    """The model's structure, without memory for its weights, and with the checkpoint's own generation settings."""
    config = load_config(model)
    try:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"model {model!r} is no causal language model ({first_line(error)}); name another") from None
    # A model made from a config has default generation settings. The checkpoint's own may name several end-of-sequence
    # tokens, and have to reach the checkpoints that are saved from this model.
    causal_lm.generation_config = load_generation_config(model)
    refuse_unusual_heads(model, causal_lm)
    return causal_lm.eval()  # without dropout, in training too: the sampler and the trainer must be the same policy


def load_causal_lm(model: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`AutoModelForCausalLM` from safetensors, in evaluation mode.

    InputError for files that cannot be read, and for weights that are missing, of another shape, or not finite.
    """
    if rank() or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what transformers would warn of is refused below
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


def refuse_unusual_heads(model: str, causal_lm: nn.Module) -> None:
    """Raises InputError for an output layer that the fused losses would get wrong."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(causal_lm.config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"model {model!r} rescales its logits ({name}), which the fused losses do not do; use another"
            )
    if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
        raise InputError(f"model {model!r} has a bias in its output layer, which the fused losses ignore; use another")
