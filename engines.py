"""Where rollouts come from: one interface, with vLLM or an embedded PyTorch sampler behind it.

An engine has three verbs. `sync(policy)` makes it sample from the policy's present weights; `generate(prompts, seeds,
sampling)` returns completions with the logprob of every sampled token under the *processed* distribution (after
temperature, top-k and top-p), which is what an importance ratio must be taken against; `sleep()` leaves the GPU's memory
to the trainer until the next `sync`. Every rank has an engine of its own and samples its share of the rollouts, or
`tensor_parallel` successive ranks have one together.

Each request has its own seed, so what a prompt is answered does not depend on which other prompts stand in its batch,
nor on their order, nor on the number of processes.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedTokenizerBase

import common
import records
from common import InputError, Policy
from records import Problem, Rollout


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
    engine: TorchEngine | VLLMEngine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: dict[str, list[int]],
    n: int,
    sampling: Sampling,
    seed_key: Sequence[int | str],
    progress: str | None = None,
) -> list[Rollout]:
    """`n` rollouts of each problem, grouped by problem; request seeds come from `seed_key`, problem id and sample.

    Spread over ranks by requests, so that few problems with many samples occupy all of them; every rank gets all
    rollouts, which is what lets training deal them out anew, by their real lengths. Collective.
    """

    def sample(requests: Sequence[tuple[Problem, int]]) -> list[Rollout]:
        groups = [list(group) for _, group in itertools.groupby(requests, key=lambda request: request[0].id)]
        ids = [prompts[group[0][0].id] for group in groups]
        seeds = [[records.request_seed(*seed_key, problem.id, s) for problem, s in group] for group in groups]
        completions = [c for group in engine.generate(ids, seeds, sampling, progress) for c in group]
        texts = tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        return [
            Rollout(problem, number, prompts[problem.id], c.token_ids, c.logprobs, c.finish_reason, text)
            for (problem, number), c, text in zip(requests, completions, texts)
        ]

    requests = [(problem, number) for problem in problems for number in range(n)]
    return common.spread(sample, requests, engine.tensor_parallel)


def chosen_engine(engine: str) -> str:
    """ "auto" resolved: vLLM where it is installed and there is a GPU."""
    if engine != "auto":
        return engine
    return "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "torch"


VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # that its attention on a CPU is compiled for


def check_engine(cfg, model: str) -> None:
    """InputError for settings that the engine of a stage's Config would fail on, before anything is loaded."""
    if chosen_engine(cfg.engine) == "torch":
        if cfg.tensor_parallel != 1:
            raise InputError(f"--tensor-parallel {cfg.tensor_parallel} needs vLLM; give --engine vllm, or drop it")
        return
    if importlib.util.find_spec("vllm") is None:
        raise InputError("--engine vllm: vLLM is not installed; install requirements.txt, or give --engine torch")
    if common.world_size() % cfg.tensor_parallel:
        raise InputError(
            f"--tensor-parallel {cfg.tensor_parallel} must divide the number of processes ({common.world_size()}); give "
            "one that does"
        )
    config = common.load_config(model).get_text_config()
    longest, limit = cfg.max_prompt_tokens + cfg.max_response_tokens, config.max_position_embeddings
    if longest > limit:
        raise InputError(
            f"--max-prompt-tokens {cfg.max_prompt_tokens} and --max-response-tokens {cfg.max_response_tokens} make "
            f"{longest}, and {model!r} has {limit} positions; lower one of them"
        )
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not torch.cuda.is_available() and head_size not in VLLM_CPU_HEAD_SIZES:
        raise InputError(
            f"--engine vllm: on a CPU vLLM has no attention for heads of {head_size}, the size in {model!r}, only for "
            f"{', '.join(map(str, VLLM_CPU_HEAD_SIZES))}; give --engine torch"
        )


def make_engine(
    cfg, model: str, tokenizer: PreTrainedTokenizerBase, policy: Policy | None = None, sleeps: bool = True
) -> TorchEngine | VLLMEngine:
    """The engine that a Config asks for, with the weights of checkpoint `model`.

    `policy`: the same checkpoint, if it is loaded already; unsharded it is sampled from in place. `sleeps`: whether its
    `sleep` is to free a GPU's memory; vLLM allows that to one engine a process.
    """
    if chosen_engine(cfg.engine) == "vllm":
        return VLLMEngine(
            model,
            tokenizer,
            max_tokens=cfg.max_prompt_tokens + cfg.max_response_tokens,
            max_sequences=cfg.max_sequences,
            tensor_parallel=cfg.tensor_parallel,
            kv_cache_gib=cfg.kv_cache_gib,
            seed=cfg.seed,
            sleeps=sleeps,
        )
    if policy is not None and not common.is_sharded(policy):
        return TorchEngine(policy.model, tokenizer, cfg.max_sequences)
    device = common.this_device()
    replica = common.load_causal_lm(model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    return TorchEngine(replica, tokenizer, cfg.max_sequences)


class TorchEngine:
    """Batched sampling with a key/value cache from any causal LM that transformers loads. Needs nothing but PyTorch.

    A prompt is prefilled once and its cache repeated over its samples; rows that have finished leave the batch as soon
    as a quarter of it is done. `max_sequences` bounds the rows, and so the cache, of one batch.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_sequences: int = 512):
        self.model = model
        self.dtype = model.dtype
        self.max_sequences = max_sequences
        self.tensor_parallel = 1
        self.stop_ids = torch.tensor(records.end_tokens(model.generation_config, tokenizer), device=model.device)

    @torch.no_grad()
    def sync(self, policy: Policy) -> None:
        if not common.is_sharded(policy):
            self.model = policy.model  # in one process the sampler *is* the policy: no copy to go stale
            return
        replica = self.model.state_dict()
        for name, value in common.full_weights(policy, self.dtype):
            replica[name].copy_(value)

    def sleep(self) -> None:
        """Nothing to do: the cache is gone already, and the weights are the policy's or one replica."""

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
        with common.progress_bar(len(prompts), progress, "prompt", leave=False) as bar:
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

        logits, decoder = prefill(self.model, input_ids, mask, origin)  # (B, V)

        budget = sampling.max_response_tokens
        uniforms = request_uniforms([seed for group in seeds for seed in group], budget).to(device)  # (B, budget)
        rows = torch.arange(len(origin), device=device)  # the rows still in the batch
        running = torch.ones(len(rows), dtype=torch.bool, device=device)  # those of them that have not ended
        token_ids = torch.zeros(len(rows), budget, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(rows), budget, device=device)
        for step in range(budget):
            tokens, token_logprobs = sample_tokens(logits, uniforms[rows, step], sampling)  # (B,), (B,)
            token_ids[rows, step] = tokens
            logprobs[rows, step] = token_logprobs
            running &= ~torch.isin(tokens, self.stop_ids)
            remaining = int(running.sum())
            if remaining == 0 or step + 1 == budget:
                break
            if remaining <= 0.75 * len(rows):  # dropping rows copies the cache, so not for every single one
                keep = running.nonzero().squeeze(1)
                decoder.keep(keep)
                rows, tokens, running = rows[keep], tokens[keep], running[keep]
            logits = decoder.step(tokens)

        stop_ids = set(self.stop_ids.tolist())
        for ids, values in zip(token_ids.tolist(), logprobs.tolist()):
            length = next((n for n, token in enumerate(ids, 1) if token in stop_ids), None)  # what follows is idle
            yield Completion(ids[:length], values[:length], "length" if length is None else "stop")


def request_uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """`count` uniforms in [0, 1) for each request, (B, count) float64, each row from its seed alone.

    Inverse-CDF sampling takes one a token, so that a request's stream needs its seed and nothing else.
    """
    bits = np.random.Philox(key=0)  # one for all: making one asks the system for entropy, which a key has no use for
    start, generator = bits.state, np.random.Generator(bits)
    uniforms = np.empty((len(seeds), count))
    for seed, row in zip(seeds, uniforms):
        start["state"]["key"][0] = seed
        bits.state = start
        generator.random(out=row)
    return torch.from_numpy(uniforms)


# Decoding: the model's logits after one more token of every row


def prefill(
    model: nn.Module, input_ids: Tensor, mask: Tensor, origin: Tensor
) -> tuple[Tensor, ModelDecoder | LeanDecoder]:
    """The first logits (B, V) of rows that continue the prompts `origin` (B,), and the decoder for all that follow.

    input_ids (P, T) are the prompts, padded on the left where mask (P, T) is 0; each is computed once for all its rows.
    """
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (P, T)
    logits = model_logits(model, input_ids, mask, positions, cache)
    layer_types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    known = type(model).__name__ in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    decoder = LeanDecoder if known and layer_types == {"full_attention"} else ModelDecoder
    return logits[origin], decoder(model, cache, mask[origin], positions[origin, -1:], origin)


def model_logits(model: nn.Module, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Of the last position, float32; the cache grows by input_ids (B, T), and mask (B, length) covers all of it."""
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


class ModelDecoder:
    """For any architecture: the model's own forward and cache."""

    def __init__(self, model: nn.Module, cache: DynamicCache, mask: Tensor, positions: Tensor, origin: Tensor):
        self.model, self.cache, self.mask, self.positions = model, cache, mask, positions
        cache.batch_select_indices(origin)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (B,) -> logits (B, V)."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions + 1
        return model_logits(self.model, tokens[:, None], self.mask, self.positions, self.cache)


class LeanDecoder:
    """The same for the architectures of Llama, Qwen2 and Qwen3, out of the model's own modules.

    At every token the model's forward makes a mask, copies each layer's cache to append to it, and copies it again to
    give every head its own keys and values; on small models that is most of the time. Here the cache has room to be
    written into, and the heads that share keys and values are the rows of one product with them.
    """

    def __init__(self, model: nn.Module, cache: DynamicCache, mask: Tensor, positions: Tensor, origin: Tensor):
        self.model, self.positions, self.length = model, positions, mask.shape[1]
        # What is added to attention scores, (B, 1, 1, room); None if nothing is padding.
        self.bias = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        self.bias = None if mask.all() else self.bias.masked_fill(mask == 0, -torch.inf)[:, None, None]
        self.keys = [layer.keys[origin] for layer in cache.layers]  # each (B, K, room, d), `length` of it filled
        self.values = [layer.values[origin] for layer in cache.layers]

    def keep(self, rows: Tensor) -> None:
        self.positions = self.positions[rows]
        self.bias = None if self.bias is None else self.bias[rows]
        self._replace_cache(lambda x: x[rows])

    def _replace_cache(self, change: Callable[[Tensor], Tensor]) -> None:
        for stored in (self.keys, self.values):
            for number, tensor in enumerate(stored):  # one by one: old and new of all layers together may not fit
                stored[number] = change(tensor)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (B,) -> logits (B, V)."""
        room = self.keys[0].shape[2]
        if self.length == room:
            more = max(32, room // 4)
            self.bias = None if self.bias is None else F.pad(self.bias, (0, more))
            self._replace_cache(lambda x: F.pad(x, (0, 0, 0, more)))
        base, here, seen = self.model.base_model, self.length, slice(self.length + 1)
        self.length += 1
        self.positions = self.positions + 1
        bias = None if self.bias is None else self.bias[..., seen]
        hidden = base.embed_tokens(tokens)  # (B, D)
        cos, sin = base.rotary_emb(hidden, self.positions)  # (B, 1, d)
        for layer, keys, values in zip(base.layers, self.keys, self.values):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            query, key, value = (
                project(normed).unflatten(-1, (-1, attention.head_dim))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )  # (B, H, d), (B, K, d), (B, K, d)
            if hasattr(attention, "q_norm"):
                query, key = attention.q_norm(query), attention.k_norm(key)
            keys[:, :, here] = rotated(key, cos, sin)
            values[:, :, here] = value
            query = rotated(query, cos, sin).unflatten(1, (key.shape[1], -1))  # (B, K, H / K, d)
            mixed = attend(query, keys[:, :, seen], values[:, :, seen], bias, attention.scaling)
            hidden = hidden + attention.o_proj(mixed.flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(base.norm(hidden)).float()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, heads, d) at cos, sin (B, 1, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of each row's last token: query (B, K, G, d), keys and values (B, K, T, d) -> (B, K, G, d)."""
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
    scores = (query * scale) @ keys.transpose(2, 3)  # on a CPU the fused kernel is made for long queries
    return (scores if bias is None else scores + bias).softmax(-1) @ values


class VLLMEngine:
    """vLLM inside this process, on the GPU that the trainer uses too.

    With several ranks each has a whole engine, or `tensor_parallel` successive ranks one together (vLLM's external
    launcher). On a GPU it is put to sleep while the policy is trained. Facts about vLLM 0.32 that this rests on are beside
    the lines that use them.
    """

    _alive: ClassVar[list] = []  # a vLLM engine that is deleted takes the process group with it, so none is

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        max_sequences: int = 512,
        tensor_parallel: int = 1,
        kv_cache_gib: float = 16.0,
        seed: int = 0,
        sleeps: bool = True,
    ):
        common.start_process()
        on_gpu = torch.cuda.is_available()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if not on_gpu:
            # Compiling its samplers takes half a minute; torch may have read TORCH_COMPILE_DISABLE already.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
            torch._dynamo.config.disable = True
        from vllm import LLM, SamplingParams

        self._sampling_params = SamplingParams
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.max_tokens, self.tensor_parallel = max_tokens, tensor_parallel
        self._sleeps, self._asleep = sleeps and on_gpu, False
        self.stop_ids = records.stop_token_ids(model, tokenizer)
        self.llm = LLM(
            model,
            dtype=self.dtype,
            skip_tokenizer_init=True,  # token ids go in and come out
            max_model_len=max_tokens,
            max_num_seqs=max_sequences,
            kv_cache_memory_bytes=int((kv_cache_gib if on_gpu else min(kv_cache_gib, 0.25)) * 2**30),
            enforce_eager=not on_gpu,
            enable_sleep_mode=self._sleeps,
            logprobs_mode="processed_logprobs",  # the default ones know nothing of temperature and top-p
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher" if common.world_size() > 1 else None,
            seed=seed,
            disable_log_stats=True,
            # On a CPU vLLM fails on a seeded request whose prompt is prefilled in pieces, so it must be done in one.
            **({} if on_gpu else {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_tokens)}),
        )
        self._alive.append(self.llm)

    def sync(self, policy: Policy) -> None:
        """Hands over the policy's weights, a full tensor at a time. Collective."""
        if self._asleep:
            self.llm.wake_up(tags=["weights"])
        # reload_weights wants the tied head by its own name, too; `full_weights` gives it.
        weights = common.full_weights(policy, self.dtype)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self.llm.reset_prefix_cache()  # else prompts longer than a block are answered from the old weights' cache

    def sleep(self) -> None:
        """Frees weights and cache; only `sync` brings them back. Without a GPU there is nothing to free."""
        if self._sleeps and not self._asleep:
            self.llm.sleep(level=2)
            self._asleep = True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        progress: str | None = None,
    ) -> list[list[Completion]]:
        """As `TorchEngine.generate`. InputError if a prompt leaves no room for a response of full length."""
        longest = max(map(len, prompts), default=0)
        if longest + sampling.max_response_tokens > self.max_tokens:
            raise InputError(
                f"a prompt of {longest} tokens and --max-response-tokens {sampling.max_response_tokens} are more than the "
                f"{self.max_tokens} that the engine was made for; raise --max-prompt-tokens or drop the prompt"
            )
        requests = [(list(prompt), seed) for prompt, group in zip(prompts, seeds) for seed in group]
        if not requests:
            return [[] for _ in prompts]
        params = [
            self._sampling_params(
                max_tokens=sampling.max_response_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed,
                logprobs=0,  # of the sampled token alone
                stop_token_ids=self.stop_ids,
                detokenize=False,
            )
            for _, seed in requests
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            params,
            use_tqdm=progress is not None and common.rank() == 0,
        )
        answers = iter(output.outputs[0] for output in outputs)
        return [[_completion(next(answers)) for _ in group] for group in seeds]


def _completion(output) -> Completion:
    token_ids = list(output.token_ids)
    logprobs = [candidates[token].logprob for token, candidates in zip(token_ids, output.logprobs)]
    return Completion(token_ids, logprobs, output.finish_reason)


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
        mass = ordered.softmax(-1)
        mass_before = mass.cumsum(-1) - mass
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
