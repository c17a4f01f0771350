"""Carries out a plan that `make -n` prints, with every check of every stage, up to where weights would be loaded.

The checkpoints have the configs of the real models, a tokenizer whose tokens are bytes, and no weights. The data sets are
stand-ins of a few rows in the format of the real ones. A launcher's processes are those of PyTorch's fake process group,
which has any number of ranks in one process. Where a stage would load its first weights it is stopped, and a checkpoint
without weights is put in the place of its result, with the record that the stage would have written, for the stages
that follow.
"""

import importlib
import json
import os
import shlex
import shutil
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import torch
import torch.distributed as dist
import tyro
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

import common
import evaluate
import fkl_warmup
import lib.data
import lib.engines
import lib.lineage
import lib.policy
import opd
import teacher_grpo

# The shapes of the paper's models, written out so that no hub is needed.
QWEN3 = dict(vocab_size=151936, head_dim=128, num_key_value_heads=8, max_position_embeddings=40960)
MODELS = {
    "Qwen3-0.6B": Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                              tie_word_embeddings=True, **QWEN3),
    "Qwen3-1.7B": Qwen3Config(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                              tie_word_embeddings=True, **QWEN3),
    "Qwen3-4B": Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                            tie_word_embeddings=True, **QWEN3),
    "Qwen3-8B": Qwen3Config(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                            tie_word_embeddings=False, **QWEN3),
    "Qwen3-14B": Qwen3Config(hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
                             tie_word_embeddings=False, **QWEN3),
    "Llama-3.1-8B": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072),
    "Llama-3.3-70B": LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                 num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131072),
}  # fmt: skip

NAMES = {name: f"{'Qwen' if 'Qwen' in name else 'meta-llama'}/{name}" for name in MODELS}
NAMES = {name: f"{hub}-Instruct" if "Llama" in name else hub for name, hub in NAMES.items()}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_models(names: list[str]) -> None:
    """Checkpoints without weights under the models' names on the hub, in the present directory."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    for name in names:
        directory = Path(NAMES[name])
        MODELS[name].save_pretrained(directory)
        GenerationConfig(eos_token_id=[257]).save_pretrained(directory)
        fast.save_pretrained(directory)
        save_file({"stub": torch.zeros(1)}, directory / "model.safetensors")


def stand_in(repository: str, configuration: str | None, split: str) -> list[dict]:
    """Rows in the format of a data set on the hub, as many as a plan needs: of DAPO and GSM8K two halves of ten."""
    if (repository, configuration, split) not in lib.data.HUB_SETS.values():
        raise ConnectionError(repository)
    questions = [f"What is {number} plus {len(repository)}?" for number in range(20)]
    if "DAPO" in repository:
        wrapped = [f"{lib.data.DAPO_PREFIX}{question}{lib.data.DAPO_SUFFIX}" for question in questions]
        return [
            {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": "1"}} for text in wrapped
        ]
    if "gsm8k" in repository:
        return [{"question": f"In {split}: {question}", "answer": "So it is\n#### 1"} for question in questions]
    return [{"problem": question, "answer": "1"} for question in questions[:3]]


class Reached(Exception):
    """A stage has come to where weights would be loaded."""


def stop(*arguments, **options):
    raise Reached


make_structure = lib.policy.meta_causal_lm
STRUCTURES: dict = {}  # by what they follow from; a plan asks for a few of them again and again


def structure(model: str, dtype: torch.dtype) -> torch.nn.Module:
    key = (lib.policy.load_config(model).to_json_string(), dtype)
    if key not in STRUCTURES:
        STRUCTURES[key] = make_structure(model, dtype)
    return STRUCTURES[key]


def ranks_of(words: list[str]) -> tuple[int, int]:
    """The processes that a command starts, and how many of them on each node."""
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
    on_a_node = int(options.get("nproc_per_node", 1))
    return on_a_node * int(options.get("nnodes", 1)), on_a_node


@contextmanager
def on_ranks(ranks: int, on_a_node: int):
    """Inside, this process is rank 0 of so many, with vLLM to sample, and no weights are loaded."""
    with ExitStack() as stack:
        if ranks > 1:
            os.environ["LOCAL_WORLD_SIZE"] = str(on_a_node)
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            stack.callback(os.environ.pop, "LOCAL_WORLD_SIZE")
            stack.callback(dist.destroy_process_group)
        found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True))
        for owner, name, replacement in (
            (datasets, "load_dataset", stand_in),
            (lib.engines, "chosen_engine", lambda engine: "vllm"),
            (lib.engines, "importlib", found),
            (lib.policy, "meta_causal_lm", structure),
            (teacher_grpo, "load_policy", stop),
            (opd, "load_policy", stop),
            (fkl_warmup, "load_policy", stop),
            (fkl_warmup, "make_engine", stop),
            (evaluate, "make_engine", lambda *a, **k: SimpleNamespace(load=lambda *a: None)),
            (evaluate, "sample_rollouts", sample),
            (evaluate, "grade", lambda rollouts, verifier: None),
            (evaluate, "draw_bars", lambda *a: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # by real process groups
        yield


def sample(engine, problems, prompts, n, *arguments, **options) -> list[common.Rollout]:
    """Responses of one token to each problem, half of them right."""
    return [
        common.Rollout(problem, number, prompts[problem.id], [257], [0.0], "stop", "1", correct=number % 2 == 0)
        for problem in problems
        for number in range(n)
    ]


def leave_checkpoint(module, cfg) -> None:
    """What follows finds a checkpoint as this stage would have written it, without weights."""
    parents = {role: getattr(cfg, role) for role in ("model", "teacher") if hasattr(cfg, role)}
    record = lib.lineage.new_record(cfg, parents)
    problems = lib.data.load_training_problems(cfg)
    line = {"step": 0, "reward": 0.5} if hasattr(cfg, "kl_coef") else {"step": 0, "reverse_kl": 0.5}
    out = Path(cfg.out)
    shutil.rmtree(f"{out}.partial")
    shutil.copytree(cfg.model, out)
    save_file({"stub": torch.zeros(1)}, out / "model.safetensors", metadata={"of": cfg.out})
    consumed = [problem.id for problem in problems]
    written = {**record, "consumed": consumed, "steps": 1, "first": line, "last": line}
    (out / "run.json").write_text(json.dumps(written))
    (out / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def rehearse(plan: str) -> int:
    """Carries out every command of a plan in the present directory; the number of stages and evaluations among them.

    Raises what the first command raises that would be refused.
    """
    done = 0
    for command in plan.replace("\\\n", " ").splitlines():
        words = shlex.split(command)
        script = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
        if words[1:2] == ["-m"] and words[2].startswith("experiments."):
            module = importlib.import_module(words[2])
            cfg = tyro.cli(module.Config, args=[word for word in words[3:] if word not in (">", "/dev/null")])
            with mock.patch.object(module, "draw", lambda *a: None, create=True):  # pictures take seconds
                module.main(cfg)
        elif script is not None:
            module = importlib.import_module(words[script].removesuffix(".py"))
            cfg = tyro.cli(module.Config, args=[w for w in words[script + 1 :] if w not in (">", "/dev/null")])
            with on_ranks(*ranks_of(words[:script])):
                try:
                    module.main(cfg)
                except Reached:
                    leave_checkpoint(module, cfg)
            done += 1
    return done
