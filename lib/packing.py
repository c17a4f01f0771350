"""Rollouts packed into micro-batches: which rank computes which, and where each token stands."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import torch

from common import Batch, Rollout, Span, rank, world_size


def make_batches(
    rollouts: Sequence[Rollout], max_tokens: int | None, device: torch.device, share_prompts: bool | None = None
) -> list[Batch]:
    """This rank's share of the rollouts as micro-batches of at most `max_tokens` positions.

    None is 16,384 on a GPU and 2,048 on a CPU, where real models keep several megabytes for each position.

    A sequence that is longer has a micro-batch to itself. `rollouts` are those of all ranks. Each goes to exactly one
    micro-batch of one rank, and ranks get about equally many positions. All ranks get the same number of micro-batches,
    at least one and some perhaps empty, because every forward and backward pass of a sharded model needs all ranks.
    With `share_prompts`, responses to one prompt that are in one micro-batch compute it once; None means that this is
    done on a CPU. None of this changes a loss: a loss is a sum over tokens divided by one global count, and gradients
    are summed over ranks (lib.policy.shard).
    """
    if share_prompts is None:
        share_prompts = device.type == "cpu"
    max_tokens = max_tokens or (16384 if device.type == "cuda" else 2048)
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
    """
    groups = by_prompt(rollouts, range(len(rollouts)))
    size = max(map(len, groups), default=1) if share_prompts else 1
    best, least = [], math.inf
    while size:
        pieces = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        costs = [positions(rollouts, piece) for piece in pieces]
        dealt = [[pieces[number] for number in share] for share in balance_by_length(costs, shares)]
        if share_prompts:  # pieces of one group may have met again
            dealt = [by_prompt(rollouts, (index for piece in share for index in piece)) for share in dealt]
        largest = max(sum(positions(rollouts, group) for group in share) for share in dealt)
        if largest < least:
            best, least = dealt, largest
        size //= 2
    return best


def balance_by_length(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Indices split into shares of about equal total length, each from long to short.

    The longest that is left goes to the share that is shortest so far.
    """
    result: list[list[int]] = [[] for _ in range(shares)]
    totals = [(0, share) for share in range(shares)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, share = heapq.heappop(totals)
        result[share].append(index)
        heapq.heappush(totals, (total + lengths[index], share))
    return result


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
