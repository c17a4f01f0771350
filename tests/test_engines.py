"""The sampler: its logprobs are the model's, its greedy output is `generate`'s, its samples depend on their seeds alone."""

import copy

import numpy as np
import pytest
import torch
from conftest import SIZES, tiny_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, MambaConfig, Qwen2Config, Qwen2ForCausalLM

from experiments import toy
from lib.engines import (
    Sampling,
    TorchEngine,
    number_of_positions,
    prefill,
    request_uniforms,
    sample_tokens,
)

TOKENIZER = toy.make_tokenizer()
PROMPTS = [[2, 4, 11, 12, 5, 3], [2, 3], [2, 7, 8, 9, 10, 3, 4, 5, 6], [2, 4, 4, 3]]  # of different lengths
GROUPED = dict(num_attention_heads=4, num_key_value_heads=2)
MODELS = {
    "qwen3": dict(),
    "qwen3-untied": dict(tied=False, **GROUPED),
    "llama": dict(family="Llama", **GROUPED),
    "llama-long-context": dict(
        family="Llama",
        tied=False,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "sliding-window": dict(layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=4),
}  # fmt: skip


def make_model(name):
    if name == "qwen2":  # has biases, which are made as zeros
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(hidden_size=32, num_hidden_layers=2, **{**SIZES, **GROUPED})).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model
    if name == "gpt-neox":
        torch.manual_seed(0)
        sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
        return GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=16, num_hidden_layers=2, **sizes)).eval()
    return tiny_model(**MODELS[name])


@pytest.mark.parametrize(
    "scaling, positions",
    [
        (dict(rope_type="default"), 128),
        (dict(rope_type="linear", factor=4.0), 512),
        (dict(rope_type="dynamic", factor=1.5), 192),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
        (MODELS["llama-long-context"]["rope_parameters"], 128),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_number_of_positions(scaling, positions, tmp_path):
    """Llama 3's and YaRN's configs name the scaled number of positions, those with the older two the original one."""
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **scaling})
    config.save_pretrained(tmp_path)
    assert number_of_positions(str(tmp_path)) == positions


def test_a_model_may_have_no_limit(tmp_path):
    MambaConfig().save_pretrained(tmp_path)
    assert number_of_positions(str(tmp_path)) is None


NAMES = [*MODELS, "qwen2", "gpt-neox"]


def model_logprobs(model, prompt, response, temperature):
    """Logprobs of the response's tokens from one plain forward pass, without cache, padding or batch."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs[range(len(response)), response]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logprobs_equal_a_plain_forward(name, temperature):
    model = make_model(name)
    sampled_from = copy.deepcopy(model)  # the engine changes its attention
    seeds = [[100 * i + j for j in range(25)] for i in range(len(PROMPTS))]
    groups = TorchEngine(sampled_from, TOKENIZER).generate(PROMPTS, seeds, Sampling(20, temperature))
    lengths = set()
    for prompt, group in zip(PROMPTS, groups):
        assert len(group) == 25
        for completion in group:
            expected = model_logprobs(model, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
            lengths.add(len(completion.token_ids))
    assert temperature < 1 or len(lengths) > 3  # rows did leave the batch at different times


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0], PROMPTS[0][::-1]]], ids=["padded", "equally-long"])
def test_every_step_of_decoding_equals_a_plain_forward(name, prompts):
    """Over enough steps to fill the cache's first room, and while rows leave the batch."""
    model, generator = make_model(name), torch.Generator().manual_seed(0)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    origin = torch.arange(len(prompts)).repeat_interleave(torch.arange(2, 2 + len(prompts)))
    texts = [list(prompts[index]) for index in origin]
    with torch.inference_mode():
        logits, decoder = prefill(model, ids, mask, origin)
        for step in range(50):
            expected = torch.stack([model(torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts])
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
            if step % 15 == 7:
                keep = torch.randperm(len(texts), generator=generator)[: len(texts) - 1].sort().values
                decoder.keep(keep)
                texts = [texts[index] for index in keep]
            tokens = torch.randint(2, SIZES["vocab_size"], (len(texts),), generator=generator)
            texts = [[*text, int(token)] for text, token in zip(texts, tokens)]
            logits = decoder.step(tokens)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_generate(name):
    model = make_model(name)
    groups = TorchEngine(model, TOKENIZER).generate(PROMPTS, [[0]] * len(PROMPTS), Sampling(20, temperature=0))
    for prompt, [completion] in zip(PROMPTS, groups):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert completion.token_ids == output[0, len(prompt) :].tolist()


def test_end_of_sequence_is_kept_and_nothing_follows_it():
    seeds = [list(range(200))]
    [group] = TorchEngine(tiny_model(), TOKENIZER).generate([PROMPTS[0]], seeds, Sampling(12))
    reasons = {completion.finish_reason for completion in group}
    assert reasons == {"stop", "length"}
    for completion in group:
        stops = [token == TOKENIZER.eos_token_id for token in completion.token_ids]
        assert not any(stops[:-1]) and len(completion.logprobs) == len(completion.token_ids)
        assert stops[-1] == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12


def test_a_request_depends_on_its_seed_alone():
    model = tiny_model()
    seeds = [[1, 2, 3], [4], [5, 6], [7]]
    together = TorchEngine(model, TOKENIZER).generate(PROMPTS, seeds, Sampling(16))
    two_at_a_time = TorchEngine(model, TOKENIZER, max_sequences=3).generate(PROMPTS, seeds, Sampling(16))
    backwards = TorchEngine(model, TOKENIZER).generate(PROMPTS[::-1], seeds[::-1], Sampling(16))[::-1]
    ids = [[completion.token_ids for completion in group] for group in together]
    assert ids == [[completion.token_ids for completion in group] for group in two_at_a_time]
    assert ids == [[completion.token_ids for completion in group] for group in backwards]
    assert ids[0][0] != ids[0][1] != ids[0][2]


def test_a_seed_names_one_stream():
    seeds = [7, 0, 2**63 - 1, 7]
    for seed, row in zip(seeds, request_uniforms(seeds, 9)):
        assert row.tolist() == np.random.Generator(np.random.Philox(key=seed)).random(9).tolist()


def test_no_prompts_give_no_completions():
    assert TorchEngine(tiny_model(), TOKENIZER).generate([], [], Sampling(4)) == []


def test_tokens_follow_their_distribution():
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, 2.5]).expand(20000, 5)
    uniforms = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample_tokens(logits, uniforms, Sampling(1, temperature=2.0))
    expected = (logits[0] / 2).softmax(0)
    frequency = torch.bincount(tokens, minlength=5) / 20000
    torch.testing.assert_close(frequency, expected, atol=4 * 0.5 / 20000**0.5, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_top_k_and_top_p_keep_the_right_tokens_and_renormalise():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().expand(1000, 4)
    uniforms = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    for sampling, kept in [
        (Sampling(1, top_k=2), {1, 2}),
        (Sampling(1, top_p=0.5), {1, 2}),
        (Sampling(1, top_p=0.3), {1}),
    ]:
        tokens, logprobs = sample_tokens(logits, uniforms, sampling)
        assert set(tokens.tolist()) == kept
        mass = sum([0.1, 0.4, 0.3, 0.2][token] for token in kept)
        torch.testing.assert_close(logprobs.exp(), logits.exp()[0, tokens] / mass)
