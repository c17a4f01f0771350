"""Packing rollouts into micro-batches: which rank computes which, where each token goes, and what it attends to."""

from __future__ import annotations

import heapq
import inspect
import itertools
from collections.abc import Iterable, Sequence

import torch
import transformers.utils
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

# If a package called `kernels` is installed, transformers imports `kernels`, and would get our kernels.py instead.
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_: False

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from common import Batch, InputError, Rollout, Span, rank, world_size  # noqa: E402

# Default positions per micro-batch, by device type. On a CPU a real model keeps several megabytes per position.
MICRO_BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}


def make_batches(
    rollouts: Sequence[Rollout], max_tokens: int | None, device: torch.device, share_prompts: bool | None = None
) -> list[Batch]:
    """This rank's share of the rollouts as micro-batches of at most `max_tokens` positions.

    `max_tokens` defaults to MICRO_BATCH_TOKENS. A longer sequence gets a micro-batch to itself. `rollouts` are those of
    all ranks. Each goes to exactly one micro-batch of one rank, and all ranks get about the same number of positions.
    They also get the same number of micro-batches (at least one, some possibly empty), because every forward and
    backward pass of a sharded model needs all ranks. With `share_prompts`, the default on a CPU, responses to one prompt
    in the same micro-batch compute the prompt once. None of this changes a loss: a loss is a sum over tokens divided by
    one global count, and gradients are summed over ranks (lib.policy.shard).
    """
    if share_prompts is None:
        share_prompts = device.type == "cpu"
    max_tokens = max_tokens or MICRO_BATCH_TOKENS[device.type]
    shares = deal(rollouts, world_size(), share_prompts)
    shares = [split_micro_batches(rollouts, share, max_tokens) for share in shares]
    micro_batches = shares[rank()]
    micro_batches += [[]] * (max(1, *map(len, shares)) - len(micro_batches))
    return [pack(rollouts, groups, device) for groups in micro_batches]


def positions(rollouts: Sequence[Rollout], group: Sequence[int]) -> int:
    """Number of positions that these rollouts of one prompt take in a pack."""
    return len(rollouts[group[0]].prompt_ids) + sum(max(len(rollouts[index].response_ids) - 1, 0) for index in group)


def by_prompt(rollouts: Sequence[Rollout], indices: Iterable[int]) -> list[list[int]]:
    """Groups the indices by their rollouts' prompt."""
    groups: dict[tuple, list[int]] = {}
    for index in indices:
        groups.setdefault(tuple(rollouts[index].prompt_ids), []).append(index)
    return list(groups.values())


def deal(rollouts: Sequence[Rollout], shares: int, share_prompts: bool) -> list[list[list[int]]]:
    """Deals the rollouts' indices to shares with about equal numbers of positions; a share is a list of groups.

    A group is what shares a prompt: with `share_prompts` all of a share's responses to it, otherwise one response. The
    longest remaining rollout (for a single share: group) goes to the share with the fewest positions so far, where a
    prompt counts once per rollout even if it will be shared.
    """
    groups = by_prompt(rollouts, range(len(rollouts)))
    pieces = groups if share_prompts and shares == 1 else [[index] for group in groups for index in group]
    dealt: list[list[list[int]]] = [[] for _ in range(shares)]
    totals = [(0, share) for share in range(shares)]
    for piece in sorted(pieces, key=lambda piece: -positions(rollouts, piece)):
        total, share = heapq.heappop(totals)
        dealt[share].append(piece)
        heapq.heappush(totals, (total + positions(rollouts, piece), share))
    return [by_prompt(rollouts, itertools.chain(*share)) for share in dealt] if share_prompts else dealt


def split_micro_batches(
    rollouts: Sequence[Rollout], groups: Sequence[list[int]], max_tokens: int
) -> list[list[list[int]]]:
    """Splits groups of rollouts, in order, into micro-batches of at most `max_tokens` positions, each a list of groups.

    A group that fits into one micro-batch stays together. A larger one is cut, and its prompt is computed again.
    """
    micro_batches: list[list[list[int]]] = []
    room = 0
    for group in groups:
        if room < positions(rollouts, group) <= max_tokens:
            room = 0  # begins a new micro-batch
        cut: list[int] = []
        for index in group:
            more = positions(rollouts, [*cut, index]) - (positions(rollouts, cut) if cut else 0)
            if more > room:
                micro_batches.append([])
                cut, room, more = [], max_tokens, positions(rollouts, [index])
            if not cut:
                micro_batches[-1].append(cut)
            cut.append(index)
            room -= more
    return micro_batches


def pack(rollouts: Sequence[Rollout], groups: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Packs groups of rollouts, given by index, into a Batch. The rollouts of a group share one copy of their prompt."""
    input_ids, position_ids, spans, predicted_at = [], [], [], []
    for group in groups:
        prompt = rollouts[group[0]].prompt_ids
        prompt_start, responses = len(input_ids), [rollouts[index].response_ids for index in group]
        input_ids += prompt
        spans.append(Span(prompt_start, len(prompt)))
        for response in responses:
            start, length = len(input_ids), max(len(response) - 1, 0)
            input_ids += response[:-1]
            spans.append(Span(start, length, prompt_start, len(prompt)))
            # The prompt's last token predicts the first response token, if there is one.
            predicted_at += [prompt_start + len(prompt) - 1, *range(start, start + length)][: len(response)]
        if len(group) == 1:  # a prompt and its only response are one span
            spans[-2:] = [Span(prompt_start, len(input_ids) - prompt_start)]
    if not groups:  # an empty micro-batch still has one position, but no target
        input_ids, spans = [0], [Span(0, 1)]
    spans = [span for span in spans if span.length]
    for span in spans:
        position_ids += range(span.prefix_length, span.prefix_length + span.length)
    packed = [index for group in groups for index in group]
    counts = torch.tensor([len(rollouts[index].response_ids) for index in packed], dtype=torch.long)
    advantages = torch.tensor([rollouts[index].advantage for index in packed], dtype=torch.float32)
    targets = [token for index in packed for token in rollouts[index].response_ids]
    sampler_logprobs = [logprob for index in packed for logprob in rollouts[index].logprobs]
    return Batch(
        input_ids=torch.tensor([input_ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        spans=spans,
        predicted_at=torch.tensor(predicted_at, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        sampler_logprobs=torch.tensor(sampler_logprobs, dtype=torch.float32, device=device),
        advantages=advantages.repeat_interleave(counts).to(device),
        rollout_index=torch.tensor(packed, dtype=torch.long).repeat_interleave(counts).to(device),
    )


# Attention within a pack

PADDING = 0.5  # with up to about this share of padding, one attention call is cheaper than many small ones


class Packing:
    """The indices that attention over a pack needs, computed once for all layers of a pass.

    On a GPU: where each span's queries and keys begin and, if any span has a prefix, which positions the keys come
    from. On a CPU: spans of similar size are padded to a common size, and each such `Block` is a batch for PyTorch's
    ordinary attention. `used` records whether the model has called `packed_attention` with it.
    """

    def __init__(self, batch: Batch):
        device = batch.input_ids.device
        self.used, self.blocks, self.keys = False, [], None
        if batch.input_ids.is_cuda:
            queries = [span.length for span in batch.spans]
            keys = [span.prefix_length + span.length for span in batch.spans]
            self.query_bounds = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32, device=device)
            self.key_bounds = torch.tensor([0, *itertools.accumulate(keys)], dtype=torch.int32, device=device)
            self.longest_query, self.longest_key = max(queries), max(keys)
            if keys != queries:
                self.keys = torch.cat([seen_by(span) for span in batch.spans]).to(device)  # (sum of keys,)
            return
        self.blocks = [Block(spans, device) for spans in similar_spans(batch.spans)]
        rows = torch.cat([block.real.flatten() for block in self.blocks]).nonzero()[:, 0].to(device)
        queries = torch.cat([block.queries for block in self.blocks])
        self.row_of_position = rows[queries[rows].argsort()]  # (T,) each position's row among all blocks' padded rows


def seen_by(span: Span) -> Tensor:
    """The positions that a span attends to, (prefix_length + length,)."""
    prefix = torch.arange(span.prefix_start, span.prefix_start + span.prefix_length)
    return torch.cat([prefix, torch.arange(span.start, span.start + span.length)])


def similar_spans(spans: Sequence[Span]) -> list[list[Span]]:
    """Groups spans so that padding a group to one size multiplies its query-key products by at most 1 + PADDING."""
    lists: list[list[Span]] = []
    keys, queries, products = 0, 0, 0  # for the last list: maximum keys, maximum queries, sum of unpadded products
    for span in sorted(spans, key=lambda span: (span.prefix_length + span.length, span.length), reverse=True):
        seen = span.prefix_length + span.length
        queries, products = max(queries, span.length), products + span.length * seen
        if not lists or (len(lists[-1]) + 1) * queries * keys > (1 + PADDING) * products:
            lists.append([])
            keys, queries, products = seen, span.length, span.length * seen
        lists[-1].append(span)
    return lists


class Block:
    """C spans as one batch for PyTorch's ordinary attention, right-padded to n queries and m keys."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        lengths = torch.tensor([span.length for span in spans])
        prefixes = torch.tensor([span.prefix_length for span in spans])
        starts = torch.tensor([span.start for span in spans])
        n, m = int(lengths.max()), int((prefixes + lengths).max())
        own = torch.arange(n).expand(len(spans), n)
        keys = torch.zeros(len(spans), m, dtype=torch.long)
        for row, span in zip(keys, spans):
            row[: span.prefix_length + span.length] = seen_by(span)
        self.shape = len(spans), n, m
        self.real = own < lengths[:, None]  # (C, n) False at padding
        # The positions in the pack of queries (C n,) and keys (C m,); padding points to position 0.
        self.queries = torch.where(self.real, starts[:, None] + own, 0).flatten().to(device)
        self.keys = keys.flatten().to(device)
        self.mask = None  # without prefixes, is_causal is enough
        if prefixes.any():
            last = (prefixes[:, None] + own)[..., None]  # query i sees keys 0 .. prefix_length + i of its span
            self.mask = (torch.arange(m) <= last)[:, None].to(device)  # (C, 1, n, m)


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, packing=None, **kwargs
):
    """Attention of each span in a pack to itself and its prefix, without computing scores across spans.

    query (1, H, T, d), key and value (1, K, T, d) -> (1, T, H, d). On a GPU it uses PyTorch's variable-length flash
    attention, elsewhere ordinary attention on blocks of similar spans. Without `packing` (when a sampler calls the
    model) it is transformers' own attention, or `attend_from_one` if each row has one query position.
    Raises InputError for a pack in a model with a sliding window, because the window would be ignored.
    """
    if packing is None and query.shape[2] == 1:
        return attend_from_one(query, key, value, attention_mask, scaling), None
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if sliding_window is not None:
        raise InputError(
            f"model {module.config.name_or_path!r} uses sliding-window attention, which training does not support; choose a "
            "model without it"
        )
    packing.used = True
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H or K, d)
    attend = attend_in_blocks if packing.blocks else attend_varlen
    return attend(query, key, value, packing, scaling)[None], None


def attend_from_one(query, key, value, attention_mask, scaling) -> Tensor:
    """query (B, H, 1, d), key and value (B, K, T, d) -> (B, 1, H, d).

    The query heads that share a key head are passed as if they were query positions of one head. transformers instead
    repeats keys and values for each query head, which takes five times as long on a CPU.
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])  # (B, K, H / K, d)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(query.shape[0], 1, query.shape[1], -1)


def attend_in_blocks(query, key, value, packing: Packing, scaling) -> Tensor:
    """(T, H, d) by PyTorch's ordinary attention, in float32 because bfloat16 is four times slower on a CPU."""
    attended, dtype = [], query.dtype
    query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    for block in packing.blocks:
        count, n, m = block.shape
        q = query.index_select(0, block.queries).unflatten(0, (count, n)).transpose(1, 2)  # (C, H, n, d)
        k, v = (x.index_select(0, block.keys).unflatten(0, (count, m)).transpose(1, 2) for x in (key, value))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=block.mask, is_causal=block.mask is None, scale=scaling, enable_gqa=True
        )
        attended.append(mixed.transpose(1, 2).flatten(0, 1))  # (C n, H, d)
    return torch.cat(attended).index_select(0, packing.row_of_position).to(dtype)


def attend_varlen(query, key, value, packing: Packing, scaling) -> Tensor:
    """(T, H, d) by PyTorch's variable-length GPU kernel, which takes bfloat16 and refuses float32."""
    dtype = query.dtype
    if dtype == torch.float32:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    grouped = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11 needs one key head per query head
        grouped, heads = {}, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    if packing.keys is not None:
        key, value = key.index_select(0, packing.keys), value.index_select(0, packing.keys)
    bounds = packing.query_bounds, packing.key_bounds, packing.longest_query, packing.longest_key
    # This window is causal. If a span has more keys than queries, its last query is aligned with its last key.
    return varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0), **grouped).to(dtype)


def packed_mask(*arguments, attention_mask=None, **options):
    """None for a pack, whose attention separates sequences itself; transformers' own mask for a sampler's padding."""
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)
