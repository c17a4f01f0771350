"""Models: a checkpoint loaded as a `Policy`, run on packed sequences, sharded over GPUs (FSDP2), and saved."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
import transformers.utils
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from common import Batch, InputError, Rollout, first_line, rank, start_process, this_device, world_size

# Before transformers' models, because lib.packing keeps transformers from importing our kernels.py.
from lib.packing import MICRO_BATCH_TOKENS, Packing, make_batches

# isort: split

from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

# The `model_type` of the models that are trained or distilled: tests/test_packing.py compares their packs with forwards
# one by one. To add one, name it here, and in MODELS there.
FAMILIES = ("llama", "qwen2", "qwen3")

# FSDP2 warns that a module returns a view of its input, which matters only where somebody writes into it. Nobody does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class Policy(nn.Module):
    """A causal language model whose forward hands hidden states and the output matrix to a loss.

    The losses of every stage are functions of (hidden, output matrix) that never hold the (N, V) logits of a batch.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        model.set_attn_implementation("packed")

    def forward(self, batch: Batch, loss_fn: Callable[[Tensor, Tensor], object]):
        """loss_fn(hidden (N, D), weight (V, D)), with one row of `hidden` for each target of the batch.

        Call the module, policy(batch, loss_fn), not this method: FSDP2 gathers the sharded output matrix in the module's
        hooks, so the loss has to run inside the forward.
        Raises RuntimeError for a model that has not used the pack's own attention, because without it the sequences of
        a pack attend to each other.
        """
        packing = Packing(batch)
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, packing=packing
        ).last_hidden_state  # (1, T, D)
        if not packing.used:
            raise RuntimeError(f"{type(self.model).__name__} does not pass `packing` on to its attention")
        return loss_fn(hidden[0].index_select(0, batch.predicted_at), self.model.get_output_embeddings().weight)

    def hidden_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """hidden (N, D) and weight (V, D) without a gradient: what a loss needs of a frozen teacher.

        FSDP2 keeps the weight gathered until `release`.
        """
        with torch.no_grad():
            return self(batch, lambda hidden, weight: (hidden, weight))


def compute_dtype(cfg) -> torch.dtype:
    """The dtype of a Config's products: bfloat16 on a GPU, and float32 on a CPU unless told otherwise."""
    return torch.bfloat16 if torch.cuda.is_available() or cfg.cpu_bfloat16 else torch.float32


def load_policy(model: str, cfg, trainable: bool) -> Policy:
    """A checkpoint on this rank's device: in float32 to be trained; frozen, in the Config's `compute_dtype`.

    With several ranks, or in bfloat16, it is sharded over all ranks, and the call is collective. A single
    process uses FSDP2 for bfloat16, too: it keeps float32 weights and computes in bfloat16.
    """
    device, compute = this_device(), compute_dtype(cfg)
    dtype = torch.float32 if trainable else compute
    sharded = world_size() > 1 or compute == torch.bfloat16
    policy = Policy(meta_causal_lm(model, dtype) if sharded else load_causal_lm(model, dtype, device))
    policy.requires_grad_(trainable)
    if trainable and cfg.activation_checkpointing:
        recompute_layers(policy)
    if sharded:
        start_process(alone_too=True)
        shard(policy, compute if compute == torch.bfloat16 else None)
        policy.to_empty(device=device)
        source = load_causal_lm(model, dtype, torch.device("cpu")) if rank() == 0 else None
        weights = source.state_dict() if source else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(policy.model, weights, options=options)
        for name, target in policy.model.named_buffers():  # rotary frequencies, which a state dict leaves out
            if source:
                target.copy_(source.get_buffer(name))
            dist.broadcast(target, 0)
    return policy


def recompute_layers(policy: Policy) -> None:
    """Makes each decoder layer compute its activations again in the backward pass, so that they need not be kept."""
    for layer in policy.model.base_model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def shard(policy: Policy, compute: torch.dtype | None) -> None:
    """Shards each decoder layer, and at the wrapper the rest (embedding, last norm, output matrix), over all ranks.

    `compute` is the dtype that weights are gathered in; None keeps their own. Gradients are summed in float32.
    """
    mesh = init_device_mesh(this_device().type, (world_size(),))
    # Without the last argument FSDP2 would also round the float tensors of a Batch to `compute`.
    precision = MixedPrecisionPolicy(compute, compute and torch.float32, cast_forward_inputs=False)
    for module in (*policy.model.base_model.layers, policy):
        fully_shard(module, mesh=mesh, mp_policy=precision)
        # Every loss is a sum over tokens divided by one global count, so gradients have to be summed over ranks, where
        # FSDP2 would average them.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(policy: Policy) -> bool:
    return isinstance(policy, FSDPModule)


def release(model: Policy | None) -> None:
    """Frees the embedding, last norm and output matrix, which FSDP2 keeps gathered after a forward without a backward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def try_longest(
    cfg,
    prompts: dict[str, list[int]],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable,
    frozen: Policy | None = None,
) -> None:
    """On a GPU, computes the loss of a full micro-batch of the longest allowed sequences and its gradient, and drops both.

    So a run that does not fit into memory ends in its first minutes, and not after its first long rollout. `prompts` are
    token ids by problem id, and `loss_of(batch)` is the stage's loss, after which the `frozen` model is released. Room is
    taken for AdamW's two states, which come with the first step. Collective. Raises InputError if memory runs out.
    """
    if not torch.cuda.is_available():
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    prompt, count = max(prompts.values(), key=len), cfg.max_response_tokens
    longest = Rollout(None, 0, prompt, prompt[-1:] * count, [0.0] * count, "length", "")
    max_tokens = cfg.micro_batch_tokens or MICRO_BATCH_TOKENS["cuda"]
    copies = max(1, max_tokens // (len(prompt) + count)) * world_size()
    try:
        states = [] if optimizer.state else [torch.empty_like(parameter) for parameter in 2 * parameters]
        loss_of(make_batches([longest] * copies, max_tokens, parameters[0].device, share_prompts=False)[0]).backward()
    except torch.OutOfMemoryError:
        raise InputError(
            f"a micro-batch of {max_tokens} positions, or one sequence of {len(prompt)} + {count} tokens, does not fit into "
            "the GPU's memory; give --activation-checkpointing, a lower --micro-batch-tokens or --max-response-tokens, or "
            "more GPUs"
        ) from None
    del states
    optimizer.zero_grad(set_to_none=True)
    release(frozen)


def full_weights(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight, whole, by its name in a checkpoint; a tied output matrix comes under both its names.

    Only one is held at a time. Gathering is collective: all ranks must go through it in step.
    """
    release(policy)
    for name, value in policy.model.state_dict().items():
        value = value.to(dtype or value.dtype)
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


def checkpoint_weights(model: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a checkpoint, named as in `full_weights`, one at a time from its safetensors."""
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
                value = file.get_tensor(name).to(dtype)
                yield from ((synonym, value) for synonym in synonyms.get(name, [name]))


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
        raise InputError(
            f"model {model!r} has no config.json that transformers can use ({first_line(error)}); fetch it anew, or name "
            "another"
        ) from None


def load_generation_config(model: str) -> GenerationConfig:
    """The checkpoint's generation_config.json, which names its end-of-sequence tokens; without one, what its
    config.json says of them, as transformers does.
    """
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(load_config(model))


def check_checkpoint(model: str, vocab_size: int, packs: bool = True) -> None:
    """Raises InputError, before any weight is read, for a checkpoint that could not be trained or distilled from.

    `vocab_size` is the tokenizer's. `packs`: the model takes packed sequences, so its family must be one of those that
    are tested, whereas any model that its engine can load is sampled from.
    """
    config = load_config(model)
    if packs and config.model_type not in FAMILIES:
        raise InputError(
            f"model {model!r} is of the family {config.model_type!r}, and only {', '.join(FAMILIES)} are tested for training "
            "and distillation; take one of these, or add the family to FAMILIES in lib/policy.py"
        )
    rows = config.get_text_config().vocab_size
    if rows < vocab_size:
        raise InputError(
            f"model {model!r} knows {rows} tokens and its tokenizer has {vocab_size}; put the tokenizer beside it that it "
            "was trained with"
        )


def meta_causal_lm(model: str, dtype: torch.dtype) -> nn.Module:
    """The model without memory for its weights, and with the checkpoint's own generation settings."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(load_config(model), dtype=dtype, trust_remote_code=False)
    # A model made from a config has default generation settings. The checkpoint's own may name several end-of-sequence
    # tokens, and have to reach the checkpoints that are saved from this model.
    causal_lm.generation_config = load_generation_config(model)
    return causal_lm.eval()  # without dropout, in training too: the sampler and the trainer must be the same policy


def load_causal_lm(model: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`AutoModelForCausalLM` from safetensors, in evaluation mode.

    Raises InputError for a checkpoint that lacks weights, which transformers would make up at random.
    """
    if rank() or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    causal_lm, found = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(
            f"model {model!r} lacks {len(missing)} of the weights that its config asks for ({missing[0]}, ...); fetch it "
            "anew"
        )
    return causal_lm.to(device).eval()
