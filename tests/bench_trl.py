"""CPU seconds of one training step, ours beside TRL 1.16's, on the same tiny Qwen3.

    python tests/bench_trl.py --trl .venv-trl/bin/python --out results/trl

The other interpreter has torch, transformers, datasets and trl==1.16.0. GRPO: 8 prompts x 8 samples; OPD: 64 prompts x
1 sample, exact reverse KL to a larger teacher (TRL's DistillationTrainer). Both: at most 32 tokens, float32, one thread,
character vocabulary of 64, untrained models, so nearly all responses have full length. Each side is a process of its own
and runs in turn; CPU seconds are of all threads and of child processes, so that a busy machine disturbs them little.
Neither side skips groups without spread, has a reference model, or loads from disk within what is timed.

"Products alone" is what would be left of our step if all but its matrix products with the weights were free, measured on
the step's own number of positions: of sampling, of the student's forward and backward pass and, in OPD, of the teacher's
forward pass. No float32 code that computes every token once gets below it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
STUDENT = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
TEACHER = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
CHARACTERS = "0123456789+-*=abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV"  # with end and padding 64
KINDS = ("attention", "key_value")
PROMPT_TOKENS, TOKENS, WARMUP_STEPS, STEPS = 6, 32, 3, 20


def prepare(directory: Path) -> None:
    """The two checkpoints, and 64 different additions."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<eos>|<pad>|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    for name, sizes in {"student": STUDENT, "teacher": TEACHER}.items():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(vocabulary), intermediate_size=4 * sizes["hidden_size"], max_position_embeddings=128,
            tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, **sizes,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    rng = random.Random(0)
    sums = rng.sample([(a, b) for a in range(10, 60) for b in range(10, 60)], 64)
    rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in sums]
    (directory / "problems.jsonl").write_text("\n".join(rows) + "\n")


def seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def products(what: str, response_tokens: float) -> float:
    """CPU seconds of one step's products, with responses of this mean length."""
    import torch

    torch.set_num_threads(1)

    def operands(rows: float, sizes: dict) -> list[list[torch.Tensor]]:
        """Of each weight: its input, itself, the gradient of its output."""
        wide, heads = sizes["hidden_size"], [sizes[f"num_{kind}_heads"] * sizes["head_dim"] for kind in KINDS]
        shapes = [(wide, heads[0]), (heads[0], wide)] + 2 * [(wide, heads[1]), (wide, 4 * wide)] + [(4 * wide, wide)]
        rows = round(rows)
        one_layer = [[torch.randn(s) for s in ((rows, i), (o, i), (rows, o))] for i, o in shapes]
        return one_layer * sizes["num_hidden_layers"]

    steps = TOKENS - 1  # of sampling; what is sampled last goes through no model
    positions = 64 * (PROMPT_TOKENS + response_tokens - 1)
    sampling, training = operands(64 * (response_tokens - 1) / steps, STUDENT), operands(positions, STUDENT)
    teacher = operands(positions, TEACHER) if what == "opd" else []
    times = []
    for _ in range(STEPS):
        start = seconds()
        for x, weight, _ in steps * sampling + teacher:
            x @ weight.T
        for x, weight, gradient in training:
            x @ weight.T, gradient @ weight, gradient.T @ x  # noqa: B018
        times.append(seconds() - start)
    return statistics.mean(times)


def ours(what: str, directory: Path) -> tuple[list[float], float]:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import lib.runs
    import opd
    import teacher_grpo

    marks, lengths, log = [], [], lib.runs.Run.log

    def log_and_mark(run, step, metrics, rollouts, show=()):
        log(run, step, metrics, rollouts, show)
        lengths.append(sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts))
        marks.append(seconds())

    lib.runs.Run.log = log_and_mark
    settings = dict(
        model=str(directory / "student"), data=str(directory / "problems.jsonl"), out=str(directory / what), exclude=(),
        instruction="", max_prompt_tokens=16, max_response_tokens=TOKENS, max_steps=WARMUP_STEPS + STEPS, lr=1e-6,
        passes=1000, save_every=10**6, engine="torch",
    )  # fmt: skip
    if what == "grpo":
        script, extra = teacher_grpo, dict(prompts_per_step=8, mini_batch_prompts=8, rollouts_per_prompt=8, kl_coef=0.0)
    else:
        extra = dict(teacher=str(directory / "teacher"), prompts_per_step=64, rollouts_per_prompt=1)
        script = opd
    script.main(script.Config(**settings, **extra))
    return marks, statistics.mean(lengths)


def theirs(what: str, directory: Path) -> tuple[list[float], float]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    marks = []

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            marks.append(seconds())

    data = load_dataset("json", data_files=str(directory / "problems.jsonl"), split="train", cache_dir=str(directory))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(directory / "student")
    shared = dict(
        output_dir=str(directory / f"trl-{what}"), use_cpu=True, bf16=False, per_device_train_batch_size=64,
        max_steps=WARMUP_STEPS + STEPS, max_completion_length=TOKENS, learning_rate=1e-6, temperature=1.0, beta=0.0,
        report_to="none", save_strategy="no", logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip

    def reward(prompts, completions, answer, **kwargs):
        return [float(right == text.strip()) for right, text in zip(answer, completions)]

    if what == "grpo":
        args = GRPOConfig(num_generations=8, **shared)
        trainer = GRPOTrainer(
            student, reward, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Mark()]
        )
    else:
        args = DistillationConfig(**{**shared, "beta": 1.0})  # beta 1 is KL(student || teacher)
        trainer = DistillationTrainer(
            student, teacher, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Mark()]
        )
    trainer.train()
    tokens = [
        line["completions/mean_length"] for line in trainer.state.log_history if "completions/mean_length" in line
    ]
    return marks, statistics.mean(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl", help="Python interpreter that has trl")
    parser.add_argument("--out", default="results/trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--side", choices=["prepare", "ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "prepare":
        return prepare(options.directory)
    if options.side:
        marks, tokens = {"ours": ours, "theirs": theirs}[options.side](options.what, options.directory)
        assert tokens > 0.7 * TOKENS, tokens
        floor = products(options.what, tokens) if options.side == "ours" else None
        print("\n" + json.dumps([(marks[-1] - marks[WARMUP_STEPS - 1]) / STEPS, floor]))
        return
    pythons = {"ours": sys.executable, "theirs": options.trl}
    found: dict = {(what, side): [] for what in ("grpo", "opd") for side in pythons}
    floors: dict = {"grpo": [], "opd": []}
    for round_number in range(options.rounds):
        for what, side in found:
            with tempfile.TemporaryDirectory() as directory:
                here = [__file__, "--directory", directory, "--what", what]
                subprocess.run([sys.executable, *here, "--side", "prepare"], check=True, capture_output=True)
                done = subprocess.run([pythons[side], *here, "--side", side], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                step, floor = json.loads(done.stdout.strip().splitlines()[-1])
                found[what, side].append(step)
                floors[what] += [floor] if floor else []
                print(f"round {round_number}: {what} {side} {step:.3f} CPU s a step", flush=True)
    rows = []
    for what in ("grpo", "opd"):
        all_three = found[what, "ours"], found[what, "theirs"], floors[what]
        us, them, floor = map(statistics.median, all_three)
        cells = [f"{statistics.median(x):.3f} ({min(x):.3f}-{max(x):.3f})" for x in all_three]
        rows.append(f"| {what.upper()} | {' | '.join(cells)} | {us / them:.2f} | {floor / them:.2f} | 0.50 |")
    text = "\n".join([
        f"CPU seconds of one step, median of {options.rounds} rounds (range), {STEPS} steps each; a 2-core x86-64 CPU, one "
        f"thread, float32, {options.date}.",
        "Command: `python tests/bench_trl.py --trl .venv-trl/bin/python` (TRL 1.16.0 in that environment).",
        "",
        "| step | ours | TRL | products alone | ours / TRL | products / TRL | bar |", "|---|---|---|---|---|---|---|", *rows, "",
    ])  # fmt: skip
    Path(options.out).mkdir(parents=True, exist_ok=True)
    Path(options.out, "cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
