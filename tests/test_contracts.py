"""What only a GPU would run, held against the installed packages: the arguments they take, and the order of the calls.

vLLM's class is replaced by a recorder that samples with the embedded engine and has a GPU's states: asleep, weights awake,
all awake. Each call is bound to the signature of the real method.
"""

import dataclasses
import inspect
import sys
from types import SimpleNamespace

import helpers
import pytest
import torch

import evaluate
import kernels
import lib.engines
import lib.policy
import teacher_grpo
from experiments import toy
from lib.engines import Sampling, TorchEngine, VLLMEngine


class RecordedLLM:
    """Refuses what a GPU's engine would get wrong: sampling asleep, with old weights, or with an old prefix cache."""

    real, made = None, []  # vllm.LLM, and the recorders of a test

    def __init__(self, model, **options):
        from vllm.engine.arg_utils import EngineArgs

        inspect.signature(self.real.__init__).bind(self, model, **options)
        assert options.keys() <= {field.name for field in dataclasses.fields(EngineArgs)} | {"dtype"}
        assert (options["kv_cache_memory_bytes"], options["gpu_memory_utilization"]) in ((16 << 30, 0.05), (None, 0.9))
        assert options["hf_overrides"] == {"head_dtype": "float32"}
        assert options["dtype"] == torch.bfloat16 and not options["enforce_eager"] and options["enable_sleep_mode"]
        assert "enable_chunked_prefill" not in options
        self.model = lib.policy.load_causal_lm(model, torch.float32, torch.device("cpu"))
        self.weights = self.cache = self.fresh = True
        self.calls = []
        self.made.append(self)

    def note(self, name, *arguments, **options):
        inspect.signature(getattr(self.real, name)).bind(None, *arguments, **options)
        self.calls.append(name + "".join(f" {tag}" for tag in options.get("tags", ())))

    def sleep(self, **options):
        self.note("sleep", **options)
        assert options["level"] == 2 and self.weights and self.cache
        self.weights = self.cache = self.fresh = False

    def wake_up(self, **options):
        self.note("wake_up", **options)
        for tag in options["tags"]:
            assert tag != "kv_cache" or self.weights, "the cache wakes after the weights"
            setattr(self, tag.removeprefix("kv_"), True)

    def collective_rpc(self, method, **options):
        self.note("collective_rpc", method, **options)
        assert method == "reload_weights" and self.weights
        own = self.model.state_dict()
        given = {name: value.clone() for name, value in options["kwargs"]["weights_iterator"]}
        assert given.keys() == own.keys() and {value.dtype for value in given.values()} == {torch.bfloat16}
        self.model.load_state_dict(given)
        self.fresh = False

    def reset_prefix_cache(self):
        self.note("reset_prefix_cache")
        assert self.cache
        self.fresh = True

    def generate(self, prompts, params, **options):
        self.note("generate", prompts, params, **options)
        assert self.weights and self.cache and self.fresh
        from vllm.logprobs import FlatLogprobs

        outputs = []
        for prompt, wanted in zip(prompts, params, strict=True):
            assert wanted.logprobs == 0 and wanted.flat_logprobs and wanted.ignore_eos and not wanted.detokenize
            sampling = Sampling(wanted.max_tokens, wanted.temperature, wanted.top_p, wanted.top_k)
            sampler = TorchEngine(self.model, toy.make_tokenizer(), stop=STOP)
            assert wanted.stop_token_ids == sampler.stop_ids.tolist()
            [[found]] = sampler.generate([prompt["prompt_token_ids"]], [[wanted.seed]], sampling)
            logprobs = FlatLogprobs(token_ids=found.token_ids, logprobs=found.logprobs)
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(**{**vars(found), "logprobs": logprobs})]))
        return outputs


STOP = ("*",)  # a text that ends a response
STEP = ["wake_up weights", "collective_rpc", "wake_up kv_cache", "reset_prefix_cache", "generate", "sleep"]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Engines are made as on a GPU. Everything else, the embedded engine inside the recorder too, is on the CPU."""
    made = VLLMEngine.__init__

    def make(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(lib.engines, "start_process", lambda: None)
            made(*arguments, **options)

    monkeypatch.setattr(VLLMEngine, "__init__", make)
    monkeypatch.setattr(VLLMEngine, "_alive", [])


CALLS = {  # asleep while the trainer tries the longest sequence
    "teacher": ["sleep", "try_longest", *3 * STEP],
    "warmup": ["generate", "sleep", "try_longest"],
    "bridge": ["sleep", "try_longest", *3 * STEP],
}


@pytest.mark.rest
@pytest.mark.parametrize("stage", CALLS)
def test_a_stage_wakes_reloads_samples_and_sleeps_in_order(
    stage, student, teacher, problems, tmp_path, on_a_gpu, monkeypatch
):
    vllm = pytest.importorskip("vllm")
    for owner, name, value in (RecordedLLM, "real", vllm.LLM), (RecordedLLM, "made", []), (vllm, "LLM", RecordedLLM):
        monkeypatch.setattr(owner, name, value)
    sizes = {} if stage == "warmup" else {"prompts_per_step": 2}
    settings = dict(max_steps=3, engine="vllm", stop=STOP, **sizes)
    script, config = helpers.RUNS[stage](student, teacher, problems, tmp_path / "out", **settings)

    def try_longest(*arguments):
        RecordedLLM.made[0].calls.append("try_longest")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            lib.policy.try_longest(*arguments)

    monkeypatch.setattr(script, "try_longest", try_longest)
    script.main(config)
    [engine] = RecordedLLM.made
    assert engine.calls == CALLS[stage]
    assert vllm.envs.VLLM_NO_USAGE_STATS


def test_the_cache_takes_the_whole_gpu_only_where_the_sampler_is_alone(student, on_a_gpu, monkeypatch):
    made = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda *a, **k: made.append(k), SamplingParams=None))
    for gib, default in ((None, {}), (None, {"cache_gib": None}), (4.0, {"cache_gib": None})):
        VLLMEngine(student, toy.make_tokenizer(), teacher_grpo.Config("", data="", out="", kv_cache_gib=gib), **default)
    found = [(options["kv_cache_memory_bytes"], options["gpu_memory_utilization"]) for options in made]
    assert found == [(16 << 30, 0.05), (None, 0.9), (4 << 30, 0.05)]


def test_engines_that_share_a_gpu_leave_room_for_each_others_weights(student, teacher, monkeypatch):
    """Two of them take all but the weights and a reserve; one alone lets vLLM measure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 << 30, 80 << 30))
    cfg = evaluate.Config(models=(student, teacher), out="")
    assert evaluate.Engines(cfg, (student, student)).cache_gib is None
    each = evaluate.Engines(cfg, (student, teacher, student)).cache_gib
    weights = sum(value.numel() * 2 for model in (student, teacher) for value in helpers.weights(model).values())
    assert 2 * (each + lib.engines.RESERVE_GIB) * 2**30 + weights == pytest.approx(79 << 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_with_a_wider_result_are_operators_that_pytorch_has(dtype):
    """On tensors without memory: their shapes and dtypes are checked as on a GPU."""
    a, b = torch.empty(6, 4, dtype=dtype, device="meta"), torch.empty(4, 5, dtype=dtype, device="meta")
    assert kernels._mm(a, b).dtype == torch.float32
    total = torch.zeros(6, 5, device="meta")
    kernels._add_mm(total, a, b)
    assert total.dtype == torch.float32
