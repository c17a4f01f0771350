"""The real vLLM, in this process: parity with the trainer, before and after syncs; what it must refuse."""

import copy

import pytest
import torch
from conftest import tiny_model
from test_engines import model_logprobs

import common
import lib.engines
import teacher_grpo
from experiments import toy
from lib.engines import Completion, Sampling, TorchEngine, VLLMEngine
from lib.policy import Policy

pytest.importorskip("vllm")
pytestmark = pytest.mark.rest
TOKENIZER = toy.make_tokenizer()
# More than two blocks of the prefix cache, which has 128 a block.
LONG = [2, *[4 + (7 * i) % 21 for i in range(300)], 3]
PROMPTS = [[2, 4, 11, 12, 5, 3], [2, 3], LONG, LONG[:200] + [3]]
SEEDS = [[10 * i + j for j in range(4)] for i in range(len(PROMPTS))]
STOP = {"tied": (), "untied": ("*",)}  # texts that end a response, one token of the toy's


@pytest.fixture(scope="module", params=STOP)
def pair(request, tmp_path_factory):
    """A policy and an engine that was made from the same checkpoint."""
    directory = tmp_path_factory.mktemp(request.param)
    policy = Policy(tiny_model(seed=5, tied=request.param == "tied", max_position_embeddings=512, head_dim=32))
    policy.model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    cfg = teacher_grpo.Config(
        "", data="", out="", max_prompt_tokens=388, max_response_tokens=12, max_num_seqs=64, stop=STOP[request.param]
    )
    return policy, VLLMEngine(str(directory), TOKENIZER, cfg)


def assert_parity(policy: Policy, groups: list[list[Completion]], temperature=1.0, prompts=PROMPTS) -> None:
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = model_logprobs(policy.model, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_parity_before_and_after_syncs(pair):
    policy, engine = pair
    policy = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.03)
    engine.sync(policy)
    for _ in range(3):  # the long prompts come again after every sync: an old prefix cache would answer them
        for temperature in (0.5, 1.0):
            groups = engine.generate(PROMPTS, SEEDS, Sampling(12, temperature))
            assert_parity(policy, groups, temperature)
        for step in range(3):  # large enough to be seen: the distributions move by nats
            ids = torch.randint(2, 20, (4, 12), generator=torch.Generator().manual_seed(step))
            loss = policy.model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            common.optimizer_step(policy, optimizer, loss.item(), 0.03, 1.0)
        stale = engine.generate(PROMPTS[:1], SEEDS[:1], Sampling(12))[0][0]
        now = model_logprobs(policy.model, PROMPTS[0], stale.token_ids, 1.0)
        assert (torch.tensor(stale.logprobs) - now).abs().max() > 0.1  # so the steps do show
        engine.sync(policy)


def test_another_checkpoint_is_loaded_into_the_engine_and_back(pair, tmp_path, monkeypatch):
    """Weights and end-of-sequence tokens are those of the checkpoint, end texts stay, and the model is never held whole."""
    policy, engine = pair
    stops = {toy.VOCABULARY.index(text) for text in engine.stop}
    tied = policy.model.config.tie_word_embeddings
    models = {seed: tiny_model(seed=seed, tied=tied, max_position_embeddings=512, head_dim=32) for seed in (6, 7)}
    models[7].generation_config.eos_token_id = [1, 9]
    for seed, model in models.items():
        model.save_pretrained(tmp_path / str(seed))
    monkeypatch.setattr(lib.engines, "load_causal_lm", lambda *a: pytest.fail("a whole model was loaded"))
    for seed in (6, 7, 6):
        engine.load(str(tmp_path / str(seed)), TOKENIZER)
        groups = engine.generate(PROMPTS, [list(range(40)) for _ in PROMPTS], Sampling(12))
        assert_parity(Policy(models[seed]), groups)
        ends, completions = stops | ({1, 9} if seed == 7 else {1}), [c for group in groups for c in group]
        for completion in completions:
            *before, last = (token in ends for token in completion.token_ids)
            assert not any(before) and last == (completion.finish_reason == "stop")
            assert last or len(completion.token_ids) == 12
        assert ends <= {completion.token_ids[-1] for completion in completions}


def test_more_prompt_tokens_than_one_pass_takes(pair):
    """Prompts beyond the scheduler's budget are prefilled in several passes, which seeded requests must survive."""
    policy, engine = pair
    engine.sync(policy)
    prompts = [[2 + i % 20, *LONG[:250]] for i in range(50)]  # each different at its first token: nothing is cached
    groups = engine.generate(prompts, [[i] for i in range(50)], Sampling(4))
    assert_parity(policy, groups[::7], prompts=prompts[::7])


def test_a_sample_depends_on_its_seed_alone(pair):
    _, engine = pair
    together, backwards = (engine.generate(PROMPTS[::way], SEEDS[::way], Sampling(12))[::way] for way in (1, -1))
    tokens = [[completion.token_ids for completion in group] for group in together]
    assert tokens == [[completion.token_ids for completion in group] for group in backwards]
    assert len({tuple(ids) for group in tokens for ids in group}) > 10
    assert engine.generate([], [], Sampling(4)) == []


def test_greedy_and_truncated_sampling_agree_with_the_embedded_engine(pair):
    policy, engine = pair
    engine.sync(policy)
    embedded = TorchEngine(policy.model, TOKENIZER, stop=engine.stop)
    last = set()
    for sampling in (Sampling(12, temperature=0), Sampling(12, top_k=1), Sampling(12, top_p=1e-6)):
        ours, theirs = (e.generate(PROMPTS, [[0]] * 4, sampling) for e in (embedded, engine))
        for [first], [second] in zip(ours, theirs):
            assert first.token_ids == second.token_ids and first.finish_reason == second.finish_reason
            assert first.logprobs == pytest.approx(second.logprobs, abs=1e-5)
            last.add(first.token_ids[-1])
    assert last >= {toy.VOCABULARY.index(text) for text in engine.stop}
