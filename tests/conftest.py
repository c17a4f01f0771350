"""Tiny checkpoints and problem sets that the real scripts run on."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import signal
from pathlib import Path

import pytest
import torch
import transformers
from helpers import grade_with, run_chain

from experiments import toy

torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C, and so would every process that the tests start from one and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SIZES = dict(
    vocab_size=len(toy.VOCABULARY), intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=128, initializer_range=0.3, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def tiny_model(
    seed: int = 0, hidden_size: int = 16, layers: int = 2, tied: bool = True, family: str = "Qwen3", **changes
):
    """A random model with the toy's vocabulary; its wide initialisation makes its distributions far from uniform."""
    torch.manual_seed(seed)
    config, model = (getattr(transformers, family + name) for name in ("Config", "ForCausalLM"))
    return model(
        config(hidden_size=hidden_size, num_hidden_layers=layers, tie_word_embeddings=tied, **{**SIZES, **changes})
    ).eval()


def double_model(**options):
    """A tiny model in float64 throughout: transformers' norms compute in float32 otherwise, whatever the model's type."""
    model = tiny_model(**options).double()
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            scale = lambda x, norm=norm: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
            norm.forward = lambda x, norm=norm, scale=scale: norm.weight * x * scale(x)
    return model


def write_checkpoint(directory: Path, **options) -> str:
    model = tiny_model(**options)
    model.generation_config.eos_token_id = [1, 0]  # two tokens end a response, as in Qwen3's checkpoints
    model.save_pretrained(directory)
    toy.make_tokenizer().save_pretrained(directory)
    return str(directory)


def write_problems(path: Path, count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    problems = {problem.id: problem for problem in (toy.make_problem(rng) for _ in range(2 * count))}
    lines = [json.dumps({"problem": p.prompt, "answer": p.answer}) for p in list(problems.values())[:count]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> str:
    """Heads of 32 are the smallest that vLLM can attend with on a CPU."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "student", seed=1, head_dim=32)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    return write_checkpoint(
        tmp_path_factory.mktemp("models") / "teacher", seed=2, hidden_size=24, tied=False, head_dim=32
    )


@pytest.fixture(scope="session")
def problems(tmp_path_factory) -> str:
    return write_problems(tmp_path_factory.mktemp("data") / "train.jsonl", 12)


@pytest.fixture(scope="session")
def test_problems(tmp_path_factory) -> str:
    return write_problems(tmp_path_factory.mktemp("data") / "test.jsonl", 6, seed=1)


@pytest.fixture(scope="session")
def chain(tmp_path_factory, student, teacher, problems) -> Path:
    """All four stages, teacher and bridge on 1H, Stage 3 on 2H."""
    out = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        grade_with(patch)
        run_chain(out, student, teacher, problems)
    return out
