"""Where rollouts come from: one interface, an embedded PyTorch sampler behind it.

An engine has two verbs. `sync(policy)` makes it sample from the policy's present weights; `generate(prompts, seeds,
sampling)` returns completions with the logprob of every sampled token under the *processed* distribution (after
temperature, top-k and top-p), which is what an importance ratio must be taken against.

Each request has its own seed, so what a prompt is answered does not depend on which other prompts stand in its batch,
nor on their order, nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

import common
from common import Policy, Problem, Rollout


@dataclass(frozen=True)
class Sampling:
    max_response_tokens: int
    temperature: float = 1.0  # 0 is greedy decoding
    top_p: float = 1.0
    top_k: int = -1  # -1 is the whole vocabulary


@dataclass
class Completion:
    token_ids: list[int]  # the end-of-sequence token included
    logprobs: list[float]
    finish_reason: str  # "stop" at an end-of-sequence token, "length" at the cap


def sample_rollouts(
    engine: TorchEngine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: dict[str, list[int]],
    n: int,
    sampling: Sampling,
    seed_key: Sequence[int | str],
    progress: str | None = None,
) -> list[Rollout]:
    """`n` rollouts of each problem, grouped by problem; request seeds come from `seed_key`, problem id and sample."""
    seeds = [[common.request_seed(*seed_key, problem.id, sample) for sample in range(n)] for problem in problems]
    completions = engine.generate([prompts[problem.id] for problem in problems], seeds, sampling, progress)
    flat = [completion for group in completions for completion in group]
    texts = tokenizer.batch_decode([completion.token_ids for completion in flat], skip_special_tokens=True)
    return [
        Rollout(problem, sample, prompts[problem.id], c.token_ids, c.logprobs, c.finish_reason, text)
        for (problem, sample), c, text in zip(((p, s) for p in problems for s in range(n)), flat, texts)
    ]


class TorchEngine:
    """Batched sampling with a key/value cache from any causal LM that transformers loads. Needs nothing but PyTorch.

    A prompt is prefilled once and its cache repeated over its samples; rows that have finished leave the batch as soon
    as a quarter of it is done. `max_sequences` bounds the rows, and so the cache, of one batch.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_sequences: int = 512):
        self.model = model
        self.max_sequences = max_sequences
        configured = model.generation_config.eos_token_id
        stop_ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        self.stop_ids = torch.tensor(sorted(stop_ids - {None}), device=model.device)

    def sync(self, policy: Policy) -> None:
        self.model = policy.model  # in one process the sampler *is* the policy: no copy to go stale

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        progress: str | None = None,
    ) -> list[list[Completion]]:
        """One completion for each seed of each prompt. `prompts[i]` are token ids, `seeds[i]` its samples' seeds.

        `progress`, if given, is the caption of a progress bar over prompts.
        """
        completions: list[list[Completion]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding within a batch
        per_batch = max(1, self.max_sequences // max(1, max(map(len, seeds), default=1)))
        with tqdm(total=len(prompts), desc=progress, unit="prompt", disable=progress is None, leave=False) as bar:
            for start in range(0, len(by_length), per_batch):
                batch = by_length[start : start + per_batch]
                rows = self._generate_batch([prompts[i] for i in batch], [seeds[i] for i in batch], sampling)
                for index in batch:
                    completions[index] = [next(rows) for _ in seeds[index]]
                bar.update(len(batch))
        return completions

    def _generate_batch(self, prompts, seeds, sampling: Sampling):
        device = self.model.device
        width = max(map(len, prompts))
        # Left-padded, so that every row's next token is sampled from the last position.
        input_ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        repeats = torch.tensor([len(group) for group in seeds], device=device)
        origin = torch.arange(len(prompts), device=device).repeat_interleave(repeats)  # (B,) the prompt of each row

        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # (P, T)
        logits = self._forward(input_ids, mask, positions, cache)[origin]  # (B, V)
        cache.batch_select_indices(origin)
        mask, positions = mask[origin], positions[origin, -1:]

        budget = sampling.max_response_tokens
        # Inverse-CDF sampling takes one uniform a token, so that a request's stream needs its seed and nothing else.
        uniforms = torch.from_numpy(
            np.stack(
                [np.random.Generator(np.random.Philox(key=seed)).random(budget) for group in seeds for seed in group]
            )
        ).to(device)  # (B, budget) float64
        rows = torch.arange(len(origin), device=device)  # the rows still in the batch
        token_ids = torch.zeros(len(rows), budget, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(rows), budget, device=device)
        lengths = torch.full((len(rows),), budget, device=device)
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for step in range(budget):
            tokens, token_logprobs = sample_tokens(logits, uniforms[rows, step], sampling)  # (B,), (B,)
            token_ids[rows, step] = tokens
            logprobs[rows, step] = token_logprobs
            ends = torch.isin(tokens, self.stop_ids) & ~stopped[rows]
            lengths[rows[ends]] = step + 1
            stopped[rows[ends]] = True
            running = ~stopped[rows]
            remaining = int(running.sum())
            if remaining == 0 or step + 1 == budget:
                break
            if remaining <= 0.75 * len(rows):  # dropping rows copies the cache, so not for every single one
                keep = running.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, tokens, mask, positions = rows[keep], tokens[keep], mask[keep], positions[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions + 1
            logits = self._forward(tokens[:, None], mask, positions, cache)

        lengths, stopped, token_ids, logprobs = (x.tolist() for x in (lengths, stopped, token_ids, logprobs))
        for length, stop, ids, values in zip(lengths, stopped, token_ids, logprobs):
            yield Completion(ids[:length], values[:length], "stop" if stop else "length")

    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.is_cuda):
            output = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()  # (B, V)


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at `uniforms`; returns tokens and their logprobs.

    logits (B, V) float32, uniforms (B,) float64 in [0, 1). Logprobs are those of the distribution sampled from; greedy
    decoding (temperature 0) reports the model's own at temperature 1.
    """
    scores = logits / (sampling.temperature or 1.0)
    if sampling.top_k > 0:
        kth = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, mass_before >= sampling.top_p)
        scores = scores.masked_fill(outside, -torch.inf)
    logprobs = scores.log_softmax(-1)  # (B, V)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        # float64: over 150k entries a float32 running sum is off by more than a rare token's probability.
        cumulative = logprobs.double().exp().cumsum(-1)
        points = (uniforms * cumulative[:, -1]).unsqueeze(1)
        tokens = torch.searchsorted(cumulative, points, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(1)).squeeze(1)
