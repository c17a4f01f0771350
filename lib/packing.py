"""Rollouts packed into micro-batches: which rank computes which, where each token is, and what it attends to."""

from __future__ import annotations

import heapq
import inspect
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
import transformers.utils
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

# If a package called `kernels` is installed, transformers imports from it, and would find our kernels.py in its place.
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_: False

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from common import Batch, InputError, Rollout, Span, rank, world_size  # noqa: E402

# Positions of a micro-batch by default, by type of device. On a CPU real models keep several megabytes for each.
MICRO_BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}


def make_batches(
    rollouts: Sequence[Rollout], max_tokens: int | None, device: torch.device, share_prompts: bool | None = None
) -> list[Batch]:
    """This rank's share of the rollouts as micro-batches of at most `max_tokens` positions.

    `max_tokens` is by default that of MICRO_BATCH_TOKENS. A sequence that is longer has a micro-batch to itself.
    `rollouts` are those of all ranks. Each goes to exactly one micro-batch of one rank, and ranks get about equally
    many positions. All ranks get the same number of micro-batches, at least one and some perhaps empty, because every
    forward and backward pass of a sharded model needs all ranks. With `share_prompts`, which is the default on a CPU,
    responses to one prompt that are in one micro-batch compute it once. None of this changes a loss: a loss is a sum
    over tokens divided by one global count, and gradients are summed over ranks (lib.policy.shard).
    """
    if share_prompts is None:
        share_prompts = device.type == "cpu"
    max_tokens = max_tokens or MICRO_BATCH_TOKENS[device.type]
    shares = balance_groups(rollouts, world_size(), share_prompts)
    shares = [split_micro_batches(rollouts, share, max_tokens) for share in shares]
    micro_batches = shares[rank()]
    micro_batches += [[]] * (max(1, *map(len, shares)) - len(micro_batches))
    return [pack(rollouts, groups, device) for groups in micro_batches]


def positions(rollouts: Sequence[Rollout], group: Sequence[int]) -> int:
    """The positions that a pack of these rollouts of one prompt has."""
    return len(rollouts[group[0]].prompt_ids) + sum(max(len(rollouts[index].response_ids) - 1, 0) for index in group)


def by_prompt(rollouts: Sequence[Rollout], indices: Iterable[int]) -> list[list[int]]:
    """The indices in groups whose rollouts have the same prompt."""
    groups: dict[tuple, list[int]] = {}
    for index in indices:
        groups.setdefault(tuple(rollouts[index].prompt_ids), []).append(index)
    return list(groups.values())


def balance_groups(rollouts: Sequence[Rollout], shares: int, share_prompts: bool) -> list[list[list[int]]]:
    """Indices of the rollouts split into shares of about equally many positions; each share is a list of groups.

    A group's responses share their prompt. Whole groups compute fewest positions, but cannot always be spread evenly,
    so they are also tried cut in halves, quarters and so on, and the split whose largest share is smallest is taken.
    The longest piece that is left always goes to the share that is shortest so far.
    """
    groups = by_prompt(rollouts, range(len(rollouts)))
    size = max(map(len, groups), default=1) if share_prompts else 1
    best, least = [], math.inf
    while size:
        pieces = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        dealt: list[list[list[int]]] = [[] for _ in range(shares)]
        totals = [(0, share) for share in range(shares)]
        for piece in sorted(pieces, key=lambda piece: -positions(rollouts, piece)):
            total, share = heapq.heappop(totals)
            dealt[share].append(piece)
            heapq.heappush(totals, (total + positions(rollouts, piece), share))
        if share_prompts:  # pieces of one prompt that landed on the same rank are joined, so that it is packed once
            dealt = [by_prompt(rollouts, itertools.chain(*share)) for share in dealt]
        largest = max(sum(positions(rollouts, group) for group in share) for share in dealt)
        if largest < least:
            best, least = dealt, largest
        size //= 2
    return best


def split_micro_batches(
    rollouts: Sequence[Rollout], groups: Sequence[list[int]], max_tokens: int
) -> list[list[list[int]]]:
    """Groups of rollouts, in their order, as micro-batches of at most `max_tokens` positions, each a list of groups.

    A group stays together if it fits into a micro-batch. One that does not is cut, and its prompt computed again.
    """
    micro_batches: list[list[list[int]]] = []
    room = 0
    for group in groups:
        if room < positions(rollouts, group) <= max_tokens:
            room = 0
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
    """The Batch of groups of rollouts, given by their indices. Those of a group have, and share, one prompt."""
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
    if not groups:  # an empty micro-batch has one position, which predicts nothing
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

PADDING = 0.5  # padding is cheaper than many small attention calls, up to about this share


class Packing:
    """The indices that attention needs of a pack, computed once for all layers of a pass.

    On a GPU: where each span's queries and keys begin, and, if any span has a prefix, which positions the keys come
    from. On a CPU: spans of similar size are padded to one, and each such `Block` is a batch for the usual attention.
    `used` tells whether the model has called `packed_attention` with it.
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
        self.row_of_position = rows[queries[rows].argsort()]  # (T,) where the blocks' rows, padding included, have it


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
    """C spans as one batch for the usual attention, padded on the right to n queries and m keys."""

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
        # The positions of queries (C n,) and keys (C m,); padding has position 0.
        self.queries = torch.where(self.real, starts[:, None] + own, 0).flatten().to(device)
        self.keys = keys.flatten().to(device)
        self.mask = None  # causal attention over as many keys as queries needs none
        if prefixes.any():
            last = (prefixes[:, None] + own)[..., None]  # query i of a span sees its keys up to number prefix + i
            self.mask = (torch.arange(m) <= last)[:, None].to(device)  # (C, 1, n, m)


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, packing=None, **kwargs
):
    """Attention within each span of a pack and to its prefix, at a cost that follows their lengths and not their sum.

    query (1, H, T, d), key and value (1, K, T, d) -> (1, T, H, d). On a GPU this is PyTorch's flash attention for
    sequences of different lengths, elsewhere the usual attention for blocks of similar spans. Without `packing` (when a
    sampler calls the model) it is transformers' own attention, or `attend_from_one` for a single position of each row.
    Raises InputError for a pack in a model with a sliding window, which it would ignore.
    """
    if packing is None and query.shape[2] == 1:
        return attend_from_one(query, key, value, attention_mask, scaling), None
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if sliding_window is not None:
        raise InputError(
            f"model {module.config.name_or_path!r} attends within a sliding window, with which no training is tested; take a "
            "model without one"
        )
    packing.used = True
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H or K, d)
    attend = attend_in_blocks if packing.blocks else attend_varlen
    return attend(query, key, value, packing, scaling)[None], None


def attend_from_one(query, key, value, attention_mask, scaling) -> Tensor:
    """query (B, H, 1, d), key and value (B, K, T, d) -> (B, 1, H, d).

    All heads of a group see the same keys, so they can take the place of the positions, of which there is one.
    Repeating keys and values for each head, as transformers does, takes five times as long on a CPU.
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])  # (B, K, H / K, d)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(query.shape[0], 1, query.shape[1], -1)


def attend_in_blocks(query, key, value, packing: Packing, scaling) -> Tensor:
    """(T, H, d) with PyTorch's usual attention, in float32, because in bfloat16 it is four times slower on a CPU."""
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
    """(T, H, d) with PyTorch's kernel for a GPU, which takes bfloat16 and refuses float32."""
    dtype = query.dtype
    if dtype == torch.float32:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    grouped = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11 wants as many heads as the query has
        grouped, heads = {}, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    if packing.keys is not None:
        key, value = key.index_select(0, packing.keys), value.index_select(0, packing.keys)
    bounds = packing.query_bounds, packing.key_bounds, packing.longest_query, packing.longest_key
    # The window is causal. Where a span has more keys than queries, its last query is aligned to the last key.
    return varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0), **grouped).to(dtype)


def packed_mask(*arguments, attention_mask=None, **options):
    """None for a pack, whose attention keeps sequences apart by itself; transformers' own for a sampler's padding."""
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)
