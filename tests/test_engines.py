"""The sampler: its logprobs are the model's, its greedy output is `generate`'s, its samples depend on their seeds alone."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SIZES, tiny_model, write_checkpoint
from tokenizers import Tokenizer
from transformers import MambaConfig, PreTrainedTokenizerFast

import teacher_grpo
from common import InputError
from experiments import toy
from lib.data import end_tokens, vocab_size
from lib.engines import Sampling, TorchEngine, VLLMEngine, check_lengths, sample_tokens
from lib.policy import load_causal_lm, meta_causal_lm
from lib.rollouts import sample_rollouts

TOKENIZER = toy.make_tokenizer()
PROMPTS = [[2, 4, 11, 12, 5, 3], [2, 3], [2, 7, 8, 9, 10, 3, 4, 5, 6], [2, 4, 4, 3]]  # of different lengths
GROUPED = dict(num_attention_heads=4, num_key_value_heads=2)
MODELS = {  # families that are trained, and another one, which may be evaluated
    "qwen3": dict(tied=False, **GROUPED),
    "llama": dict(family="Llama", **GROUPED),
    "sliding-window": dict(layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=4),
    "gpt-neox": dict(family="GPTNeoX", num_key_value_heads=2),
}  # fmt: skip


def model_logprobs(model, prompt, response, temperature):
    """Logprobs of the response's tokens from one plain forward pass, without cache, padding or batch."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs[range(len(response)), response]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature, shared", [(0.5, 0), (1.0, 0), (1.0, 20)])
def test_logprobs_equal_a_plain_forward(name, temperature, shared):
    """Also of prompts that begin with the same tokens, which are computed once for all of them."""
    model = tiny_model(**MODELS[name])
    sampled_from = copy.deepcopy(model)  # the engine changes its attention
    seeds = [[100 * i + j for j in range(12)] for i in range(len(PROMPTS))]
    prompts = [[5, 6, 7, 8] * (shared // 4) + prompt for prompt in PROMPTS]
    groups = TorchEngine(sampled_from, TOKENIZER).generate(prompts, seeds, Sampling(40, temperature))
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = model_logprobs(model, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
    # The responses have different lengths, so the test covers rows that leave the batch early.
    assert temperature < 1 or len({len(completion.token_ids) for group in groups for completion in group}) > 3


def test_greedy_equals_generate():
    model = tiny_model(**MODELS["qwen3"])
    groups = TorchEngine(model, TOKENIZER).generate(PROMPTS, [[0]] * len(PROMPTS), Sampling(20, temperature=0))
    for prompt, [completion] in zip(PROMPTS, groups):
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert completion.token_ids == output[0, len(prompt) :].tolist()


def test_end_of_sequence_is_kept_and_nothing_follows_it():
    [group] = TorchEngine(tiny_model(), TOKENIZER).generate([PROMPTS[0]], [list(range(200))], Sampling(12))
    assert {completion.finish_reason for completion in group} == {"stop", "length"}
    for completion in group:
        *before, last = [token == TOKENIZER.eos_token_id for token in completion.token_ids]
        assert not any(before) and len(completion.logprobs) == len(completion.token_ids)
        assert last == (completion.finish_reason == "stop") and (last or len(completion.token_ids) == 12)


def test_a_request_depends_on_its_seed_alone():
    model, seeds = tiny_model(), [[1, 2, 3], [4], [5, 6], [7]]
    together = TorchEngine(model, TOKENIZER).generate(PROMPTS, seeds, Sampling(16))
    two_at_a_time = TorchEngine(model, TOKENIZER, max_num_seqs=3).generate(PROMPTS, seeds, Sampling(16))
    backwards = TorchEngine(model, TOKENIZER).generate(PROMPTS[::-1], seeds[::-1], Sampling(16))[::-1]
    ids, *others = ([[c.token_ids for c in group] for group in each] for each in (together, two_at_a_time, backwards))
    assert others == [ids, ids] and ids[0][0] != ids[0][1] != ids[0][2]


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
    for options, kept in [(dict(top_k=2), {1, 2}), (dict(top_p=0.5), {1, 2}), (dict(top_p=0.3), {1})]:
        sampling = Sampling(1, **options)
        tokens, logprobs = sample_tokens(logits, uniforms, sampling)
        assert set(tokens.tolist()) == kept
        mass = sum([0.1, 0.4, 0.3, 0.2][token] for token in kept)
        torch.testing.assert_close(logprobs.exp(), logits.exp()[0, tokens] / mass)


# Ends and limits


def test_both_engines_end_at_the_same_tokens(tmp_path, monkeypatch):
    """Also where only config.json names them, as it does for a checkpoint without generation_config.json."""
    made, star = [], toy.VOCABULARY.index("*")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda *a, **k: made.append(k), SamplingParams=None))
    cfg = teacher_grpo.Config("", data="", out="", stop=("*",))
    model, config = write_checkpoint(tmp_path), tmp_path / "config.json"
    for ends in ([0, 1, star], [1, 2, star]):
        embedded = TorchEngine(load_causal_lm(model, torch.float32, "cpu"), TOKENIZER, stop=cfg.stop)
        assert embedded.stop_ids.tolist() == VLLMEngine(model, TOKENIZER, cfg).stop_ids == ends
        assert end_tokens(meta_causal_lm(model, torch.float32).generation_config, TOKENIZER, cfg.stop) == ends
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        config.write_text(config.read_text().replace('"eos_token_id": 1', '"eos_token_id": 2'))
    assert {options["max_model_len"] for options in made} == {SIZES["max_position_embeddings"]}


def test_a_model_is_not_asked_for_more_positions_than_it_has(tmp_path):
    cfg = teacher_grpo.Config("", data="", out="", max_response_tokens=100)
    model = write_checkpoint(tmp_path)
    check_lengths(cfg, model, [[2] * 28])
    with pytest.raises(InputError, match="the longest prompt .29 tokens. plus .* is 129, but .* has 128 positions"):
        check_lengths(cfg, model, [[2], [2] * 29])
    MambaConfig().save_pretrained(tmp_path)
    check_lengths(cfg, model, [[2] * 10**6])  # it has no limit


def test_tokens_beyond_gaps_in_the_ids_are_known():
    """A tokenizer's length counts its tokens. Where ids are skipped, the largest id is not below it."""
    content = json.loads(TOKENIZER.backend_tokenizer.to_str())
    content["model"]["vocab"]["far"] = len(toy.VOCABULARY) + 2  # the two ids before it are unused
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=toy.EOS)
    size = vocab_size(tokenizer)
    assert size == len(toy.VOCABULARY) + 3 and len(tokenizer) == len(toy.VOCABULARY) + 1
    engine, problem = TorchEngine(tiny_model(vocab_size=size + 5), tokenizer), SimpleNamespace(id="")
    rollouts = sample_rollouts(engine, [problem], {"": PROMPTS[0]}, 200, Sampling(12), seed_key=(0,))
    assert max(token for rollout in rollouts for token in rollout.response_ids) == size - 1
    assert "far" in "".join(rollout.text for rollout in rollouts)
