"""The engines that sample responses, vLLM and an embedded PyTorch sampler, behind one interface.

`sync(policy)` copies the policy's current weights into the engine. `generate(prompts, seeds, sampling)` returns
completions with each token's log-probability under the distribution it was sampled from (after temperature, top-k and
top-p), which importance ratios need. `sleep()` frees GPU memory for the trainer until the next `sync`. Every rank has an
engine and samples its share, or `tensor_parallel` successive ranks share one.

Each request has its own seed, so on a CPU a response does not depend on the other prompts in its batch, their order, or
the number of processes. On a GPU rounding depends on the batch shape, so a response can change with its batch.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedTokenizerBase

from common import InputError, barrier, start_process, this_device, world_size
from lib.data import end_tokens
from lib.policy import (
    Policy,
    checkpoint_weights,
    compute_dtype,
    full_weights,
    is_sharded,
    load_causal_lm,
    load_config,
    load_generation_config,
    meta_causal_lm,
)

GIB = 2**30
RESERVE_GIB = 6  # kept free for activations, CUDA graphs and NCCL


@dataclass(frozen=True)
class Sampling:
    max_response_tokens: int
    temperature: float = 1.0  # 0 is greedy decoding
    top_p: float = 1.0
    top_k: int = -1  # -1 is the whole vocabulary


@dataclass
class Completion:
    token_ids: list[int]  # includes the end-of-sequence token
    logprobs: list[float]
    finish_reason: str  # "stop" at an end-of-sequence token, "length" at the length limit


def chosen_engine(engine: str) -> str:
    """Resolves "auto" to vLLM if it is installed and there is a GPU, otherwise to the embedded sampler."""
    if engine != "auto":
        return engine
    return "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "torch"


def number_of_positions(model: str) -> float:
    """The longest sequence, prompt plus response, that a checkpoint supports; infinite if its config does not say."""
    return getattr(load_config(model).get_text_config(), "max_position_embeddings", math.inf)


def check_lengths(cfg, model: str, prompts: Iterable[Sequence[int]]) -> None:
    """InputError if a prompt plus a full response exceeds the position limit, beyond which a model produces noise."""
    longest, limit = max(map(len, prompts)), number_of_positions(model)
    if longest + cfg.max_response_tokens > limit:
        raise InputError(
            f"the longest prompt ({longest} tokens) plus --max-response-tokens {cfg.max_response_tokens} is "
            f"{longest + cfg.max_response_tokens}, but {model!r} has {limit} positions; lower --max-response-tokens"
        )


def check_engine(cfg) -> None:
    """Raises InputError, before anything is loaded, if the engine that a Config asks for is not usable here."""
    if chosen_engine(cfg.engine) == "torch":
        if cfg.tensor_parallel != 1:
            raise InputError(f"--tensor-parallel {cfg.tensor_parallel} needs vLLM; give --engine vllm, or drop it")
    elif importlib.util.find_spec("vllm") is None:
        raise InputError("--engine vllm: vLLM is not installed; install requirements.txt, or give --engine torch")
    elif world_size() % cfg.tensor_parallel:
        ranks = f"the number of processes ({world_size()})"
        raise InputError(f"--tensor-parallel {cfg.tensor_parallel} must divide {ranks}; give one that does")


def shared_cache_gib(cfg, models: Sequence[str]) -> float | None:
    """GiB of cache for each of several models that share a GPU without a trainer; None (vLLM decides) for one model."""
    if len(models) == 1 or not torch.cuda.is_available():
        return None
    weights = sum(
        parameter.nbytes for model in models for parameter in meta_causal_lm(model, torch.bfloat16).parameters()
    )
    return (torch.cuda.mem_get_info()[0] - weights / cfg.tensor_parallel) / GIB / len(models) - RESERVE_GIB


def make_engine(
    cfg, model: str, tokenizer: PreTrainedTokenizerBase, policy: Policy | None = None, sleeps=True, cache_gib=16.0
) -> TorchEngine | VLLMEngine:
    """The engine that a Config asks for, with the weights of checkpoint `model`.

    `policy` is that checkpoint as loaded for training. If it is not sharded, the embedded sampler uses it directly; vLLM
    sleeps until the first `sync`. For `sleeps` and `cache_gib` see VLLMEngine.
    """
    if chosen_engine(cfg.engine) == "vllm":
        engine = VLLMEngine(model, tokenizer, cfg, sleeps, cache_gib)
        if policy is not None:
            engine.sleep()
        return engine
    shared = policy is not None and not is_sharded(policy)
    replica = policy.model if shared else load_causal_lm(model, compute_dtype(cfg), this_device())
    return TorchEngine(replica, tokenizer, cfg.max_num_seqs, cfg.stop)


class TorchEngine:
    """Batched sampling with a KV cache from any causal LM that transformers loads. Needs only PyTorch.

    It uses the model's own forward and transformers' dynamic cache (a static cache was slower on a CPU,
    results/sampling/decoders.md). Each prompt is prefilled once, and its cache is copied for its samples. Finished rows
    are removed once they make up a quarter of the batch. `max_num_seqs` limits the rows of one batch.
    """

    tensor_parallel = 1

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_num_seqs: int = 512, stop: Sequence[str] = ()
    ):
        self.max_num_seqs, self.stop = max_num_seqs, stop
        self._use(model, tokenizer)

    def _use(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        if model.config._attn_implementation == "sdpa":
            # For sampling, lib.packing's attention gives the same results as "sdpa" and decodes faster.
            model.set_attn_implementation("packed")
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = torch.tensor(end_tokens(model.generation_config, tokenizer, self.stop), device=model.device)

    @torch.no_grad()
    def sync(self, policy: Policy) -> None:
        if not is_sharded(policy):
            self.model = policy.model  # the sampler uses the policy itself, so nothing needs to be copied
            return
        replica = self.model.state_dict()
        for name, value in full_weights(policy, self.model.dtype):
            replica[name].copy_(value)

    def load(self, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Switches to another checkpoint."""
        dtype, device = self.model.dtype, self.model.device
        self.model = None  # frees the old model first
        self._use(load_causal_lm(model, dtype, device), tokenizer)

    def sleep(self) -> None:
        """Does nothing: `generate` has freed its cache, and the weights are the policy's own or a replica that is kept."""

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """One completion per seed of each prompt. `prompts[i]` holds token ids, `seeds[i]` the seeds of its samples."""
        completions: list[list[Completion]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths need little padding
        per_batch = max(1, self.max_num_seqs // max(1, max(map(len, seeds), default=1)))
        for start in range(0, len(by_length), per_batch):
            batch = by_length[start : start + per_batch]
            rows = self._generate_batch([prompts[i] for i in batch], [seeds[i] for i in batch], sampling)
            for index in batch:
                completions[index] = [next(rows) for _ in seeds[index]]
        return completions

    def _generate_batch(self, prompts, seeds, sampling: Sampling) -> Iterator[Completion]:
        device = self.model.device
        # A common beginning of the prompts (such as worked examples) is computed once, unless it is too short to be worth a
        # pass. It ends before each prompt's last token, whose logits are needed for each prompt. Models with a sliding
        # window do without it, because the padding after it would take up part of the window.
        shared = len(os.path.commonprefix([tuple(prompt[:-1]) for prompt in prompts]))
        cache = DynamicCache(config=self.model.config)
        shared = shared if shared >= 16 and len(prompts) > 1 and not any(cache.is_sliding) else 0
        if shared:
            start = torch.tensor([prompts[0][:shared]], device=device)
            self._logits(start, torch.ones_like(start), torch.arange(shared, device=device)[None], cache)
            cache.batch_repeat_interleave(len(prompts))
        # The rest of P prompts, left-padded to T tokens, so that every row's next token is sampled from the last position.
        rests = [list(prompt[shared:]) for prompt in prompts]
        width = max(map(len, rests))
        padding = [width - len(rest) for rest in rests]
        input_ids = torch.tensor([[0] * n + rest for n, rest in zip(padding, rests)], device=device)
        mask = torch.tensor([[1] * shared + [0] * n + [1] * (width - n) for n in padding], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]  # (P, T)
        logits = self._logits(input_ids, mask, positions, cache)  # (P, V)
        # From here on there is one row for each of the B responses.
        repeats = torch.tensor([len(group) for group in seeds], device=device)
        origin = torch.arange(len(prompts), device=device).repeat_interleave(repeats)  # (B,) the prompt of each row
        logits, mask, positions = logits[origin], mask[origin], positions[origin, -1:]  # (B, V), (B, T), (B, 1)
        cache.batch_select_indices(origin)

        budget = sampling.max_response_tokens
        uniforms = request_uniforms([seed for group in seeds for seed in group], budget).to(device)  # (B, budget)
        rows = torch.arange(len(origin), device=device)  # the rows still in the batch
        running = torch.ones(len(rows), dtype=torch.bool, device=device)  # which of these rows have not ended
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
            if remaining <= 0.75 * len(rows):  # removing rows copies the cache, so several are removed at once
                keep = running.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, tokens, running, mask, positions = (x[keep] for x in (rows, tokens, running, mask, positions))
            mask, positions = F.pad(mask, (0, 1), value=1), positions + 1
            logits = self._logits(tokens[:, None], mask, positions, cache)

        stop_ids = set(self.stop_ids.tolist())
        for ids, values in zip(token_ids.tolist(), logprobs.tolist()):
            length = next((n for n, token in enumerate(ids, 1) if token in stop_ids), None)  # later tokens are unused
            yield Completion(ids[:length], values[:length], "length" if length is None else "stop")

    def _logits(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (B, V) of the last position, in float32. Appends input_ids (B, T) to the cache; mask covers both."""
        options = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
        output = self.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, **options)
        return output.logits[:, -1].float()


def request_uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """`count` uniforms in [0, 1) for each request, (B, count) float64; each row depends only on its seed.

    Sampling by inverting the cumulative distribution takes one uniform per token, so the seed fixes a request's stream.
    """
    bits = np.random.Philox(key=0)  # created once and rekeyed for each seed, because creating one is slow
    start, generator = bits.state, np.random.Generator(bits)
    uniforms = np.empty((len(seeds), count))
    for seed, row in zip(seeds, uniforms):
        start["state"]["key"][0] = seed
        bits.state = start
        generator.random(out=row)
    return torch.from_numpy(uniforms)


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Samples one token per row by inverting the cumulative distribution; returns tokens and their logprobs.

    logits (B, V) float32, uniforms (B,) float64 in [0, 1). Logprobs are under the distribution sampled from; greedy
    decoding (temperature 0) reports the model's own logprobs at temperature 1.
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
        # In float32 the error of a running sum over 150,000 entries would exceed a rare token's probability.
        cumulative = logprobs.double().exp().cumsum(-1)
        points = (uniforms * cumulative[:, -1]).unsqueeze(1)
        tokens = torch.searchsorted(cumulative, points, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(1)).squeeze(1)


class VLLMEngine:
    """vLLM inside this process, on the GPU that the trainer also uses.

    Each rank has its own engine, or `tensor_parallel` successive ranks share one (vLLM's external launcher). With
    `sleeps`, `sleep` frees the engine's GPU memory, which vLLM supports for only one engine per process. `cache_gib` is
    the cache size if --kv-cache-gib is not given; None lets vLLM take nearly all of the free GPU memory. Assumptions
    about vLLM 0.32 are noted beside the lines that rely on them.
    """

    _alive: ClassVar[list] = []  # deleting a vLLM engine destroys the process group, so engines are never deleted

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, cfg, sleeps=True, cache_gib: float | None = 16.0
    ):
        start_process()
        on_gpu = torch.cuda.is_available()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # run the engine in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_NO_USAGE_STATS"] = "1"  # otherwise rank 0 of every engine sends usage statistics
        if not on_gpu:
            # Compiling vLLM's samplers takes half a minute. torch may have read the variable already, so both are set.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
            torch._dynamo.config.disable = True
        from vllm import LLM, SamplingParams

        self._sampling_params, self.tokenizer, self.stop = SamplingParams, tokenizer, cfg.stop
        self.dtype, self.tensor_parallel = compute_dtype(cfg), cfg.tensor_parallel
        self._sleeps, self._asleep = sleeps and on_gpu, False
        self.stop_ids = end_tokens(load_generation_config(model), tokenizer, cfg.stop)
        # vLLM refuses a limit beyond the model's positions; `check_lengths` has refused any prompt that needs more.
        max_tokens = min(cfg.max_prompt_tokens + cfg.max_response_tokens, number_of_positions(model))
        cache = cfg.kv_cache_gib or cache_gib
        if not on_gpu:
            cache = min(cache or 0.25, 0.25)
        self.llm = LLM(
            model,
            dtype=self.dtype,
            skip_tokenizer_init=True,  # token ids go in and come out
            max_model_len=max_tokens,
            max_num_seqs=cfg.max_num_seqs,
            kv_cache_memory_bytes=cache and int(cache * GIB),
            # vLLM refuses to start unless this share of the GPU is free, and the trainer may already hold most of it. With
            # a given cache size vLLM uses the share for nothing else.
            gpu_memory_utilization=0.05 if cache else 0.9,
            hf_overrides={"head_dtype": "float32"},  # logits in float32, as in the trainer
            enforce_eager=not on_gpu,
            enable_sleep_mode=self._sleeps,
            logprobs_mode="processed_logprobs",  # vLLM's default ignores temperature and top-p
            tensor_parallel_size=cfg.tensor_parallel,
            distributed_executor_backend="external_launcher" if world_size() > 1 else None,
            disable_log_stats=True,
            # On a CPU vLLM fails on a seeded request whose prompt is prefilled in chunks.
            **({} if on_gpu else {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_tokens)}),
        )
        self._alive.append(self.llm)
        if not on_gpu and cfg.tensor_parallel > 1:
            # On a CPU, ranks that share an engine open shared memory under a fixed name. vLLM removes the name only when the
            # interpreter shuts down, and a leftover name breaks the next run, so we remove it once all ranks have opened it.
            barrier()
            for path in Path("/dev/shm").glob("*-cpushm_*"):
                path.unlink(missing_ok=True)

    def sync(self, policy: Policy) -> None:
        """Copies the policy's weights into the engine, one full tensor at a time. Collective."""
        self._reload(full_weights(policy, self.dtype))

    def load(self, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Loads another checkpoint of the same architecture from its files, one tensor at a time. Collective."""
        self.tokenizer = tokenizer
        self.stop_ids = end_tokens(load_generation_config(model), tokenizer, self.stop)
        self._reload(checkpoint_weights(model, self.dtype))

    def _reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """`weights` must yield a tied output matrix under both its names."""
        if self._asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self.llm.reset_prefix_cache()  # otherwise prompts would reuse prefixes computed with the old weights

    def sleep(self) -> None:
        """Frees the GPU memory of weights and cache until the next `sync`; does nothing without a GPU."""
        if self._sleeps and not self._asleep:
            self.llm.sleep(level=2)
            self._asleep = True

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Like `TorchEngine.generate`."""
        requests = [(list(prompt), seed) for prompt, group in zip(prompts, seeds) for seed in group]
        params = [
            self._sampling_params(
                max_tokens=sampling.max_response_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                top_k=sampling.top_k, seed=seed, stop_token_ids=self.stop_ids, detokenize=False,
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,  # two lists of numbers, where the default makes three objects per token
                ignore_eos=True,  # otherwise vLLM also stops at the end tokens of the checkpoint it was started with
            )
            for _, seed in requests
        ]  # fmt: skip
        inputs = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        outputs = self.llm.generate(inputs, params, use_tqdm=False) if requests else []
        found = (output.outputs[0] for output in outputs)
        completions = (Completion(list(o.token_ids), o.logprobs.logprobs, o.finish_reason) for o in found)
        return [[next(completions) for _ in group] for group in seeds]
