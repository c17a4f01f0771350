"""Carries out a plan that `make -n` prints, with every check of every stage, up to where weights would be loaded.

The checkpoints have the configs of the real models, the toy's tokenizer and no weights, and the data sets are stand-ins
of a few rows. Where a stage would load its first weights it is stopped, and a checkpoint without weights is
put in the place of its result for the stages that follow, with the record that the stage would have written.
"""

import importlib
import json
import math
import re
import shlex
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import torch
import tyro
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3Config

import evaluate
import fkl_warmup
import lib.data
import lib.engines
import lib.lineage
import opd
import student_grpo
import teacher_grpo
from experiments import toy

SHAPE = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"


def qwen3(*shape: int, tied: bool) -> Qwen3Config:
    sizes = dict(vocab_size=151936, head_dim=128, num_key_value_heads=8, max_position_embeddings=40960)
    return Qwen3Config(**dict(zip(SHAPE, shape)), **sizes, tie_word_embeddings=tied)


def llama(*shape: int) -> LlamaConfig:
    sizes = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072)
    return LlamaConfig(**dict(zip(SHAPE, shape)), **sizes)


# The shapes of the paper's models, by their names on the hub.
MODELS = {
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": qwen3(5120, 17408, 40, 40, tied=False),
    "meta-llama/Llama-3.1-8B-Instruct": llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.3-70B-Instruct": llama(8192, 28672, 80, 64),
}


def write_models() -> None:
    """Checkpoints without weights under the models' names on the hub, in the present directory."""
    for name, config in MODELS.items():
        config.save_pretrained(name)
        toy.make_tokenizer().save_pretrained(name)
        save_file({"stub": torch.zeros(1)}, f"{name}/model.safetensors")


def stand_in(repository: str, configuration: str | None, split: str) -> list[dict]:
    """Rows in the format of a data set on the hub: of DAPO two halves of ten."""
    if f"{repository}{configuration and '@' + configuration or ''}:{split}" not in lib.data.HUB_SETS.values():
        raise ConnectionError(repository)
    questions = [f"What is {number} plus {len(repository)}?" for number in range(20)]
    if "DAPO" not in repository:
        return [{"problem": question, "answer": "1"} for question in questions[:3]]
    texts = [f"{lib.data.DAPO_PREFIX}{question}{lib.data.DAPO_SUFFIX}" for question in questions]
    return [{"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": "1"}} for text in texts]


class Reached(Exception):
    """A stage has come to where weights would be loaded."""


@contextmanager
def without_weights(ranks: int, trained_on: list):
    """Inside, vLLM would sample on so many ranks. The training problems of a stage are put into `trained_on`."""

    def prepared(*arguments, prepare=teacher_grpo.prepare, **options):
        found = prepare(*arguments, **options)
        trained_on.extend(problem.id for problem in found[0])
        return found

    found, stop = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True)), mock.Mock(side_effect=Reached)
    with ExitStack() as stack:
        for owner, name, replacement in (
            (datasets, "load_dataset", stand_in), (lib.engines, "chosen_engine", lambda engine: "vllm"),
            (lib.engines, "importlib", found), (lib.engines, "world_size", lambda: ranks),
            *((module, "prepare", prepared) for module in (teacher_grpo, fkl_warmup, opd, student_grpo)),
            *((module, "load_policy", stop) for module in (teacher_grpo, fkl_warmup, opd)),
            *((module, "make_engine", stop) for module in (fkl_warmup, evaluate)),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def leave_checkpoint(cfg, trained_on: list[str]) -> None:
    """What follows finds a checkpoint as this stage would have written it, without weights."""
    parents = {role: getattr(cfg, role) for role in ("model", "teacher") if hasattr(cfg, role)}
    line = {"step": 0, "reward" if hasattr(cfg, "kl_coef") else "reverse_kl": 0.5}
    record = lib.lineage.new_record(cfg, parents) | {"trained_on": trained_on, "steps": 1, "first": line, "last": line}
    shutil.copytree(cfg.model, cfg.out)
    save_file({"stub": torch.zeros(1)}, f"{cfg.out}/model.safetensors", metadata={"of": cfg.out})
    Path(cfg.out, "run.json").write_text(json.dumps(record))


def rehearse(plan: str) -> int:
    """Carries out every stage and evaluation of a plan in the present directory; returns their number.

    Raises what the first command raises that would be refused. Other commands are only parsed.
    """
    done = 0
    for command in plan.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(command) if word not in (">", "/dev/null")]
        script = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
        if words[1:2] == ["-m"]:
            tyro.cli(importlib.import_module(words[2]).Config, args=words[3:])
        elif script is not None:
            module = importlib.import_module(words[script].removesuffix(".py"))
            cfg = tyro.cli(module.Config, args=words[script + 1 :])
            trained_on: list[str] = []
            ranks = math.prod(map(int, re.findall(r"--(?:nproc_per_node|nnodes)=(\d+)", command)))
            with without_weights(ranks, trained_on):
                try:
                    module.main(cfg)
                except Reached:
                    if module is not evaluate:
                        leave_checkpoint(cfg, trained_on)
            done += 1
    return done
