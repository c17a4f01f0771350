"""CPU seconds and memory of one training step, ours beside TRL 1.16's, at the same prompts, lengths and models.

    python tests/bench_trl.py --trl .venv-trl/bin/python --out results/trl/cpu.md
    python tests/bench_trl.py --trl .venv-trl/bin/python --out results/trl/smollm2.md --model SMOLLM2 --data GSM8K.jsonl \
        --warmup 0 --steps 1 --rounds 1

The other interpreter has torch, transformers, datasets and trl==1.16.0. GRPO has 8 prompts with 8 samples each. OPD is
the exact reverse KL to a teacher (TRL's DistillationTrainer), with 8 prompts of 8 samples and with 64 prompts of one.
All is in float32. Without --model the models are tiny Qwen3 ones, untrained, so that nearly all responses have full
length, with a character vocabulary of 64 and a larger teacher. With --model, a checkpoint with a chat template is the
student and its own teacher, and prompts are the questions of --data (GSM8K's train.jsonl) below 160 characters.

Each side is a process of its own and runs in turn. CPU seconds are of all threads and of child processes, so that a
busy machine disturbs them little. Memory is the highest resident memory of the process and of its children, summed; it
includes PyTorch and the other packages. Neither side has a reference model, or loads from disk within what is timed.

Both sides train on all 64 responses. Ours would leave out groups without spread, which have nothing to learn from in
GRPO without a KL term, and TRL does not. So 1e-9 is added to every advantage here, and our step does the work, too.

"Products alone" is what would be left of our step if all but its matrix products with the weights were free, measured on
the step's own number of positions: of sampling (without the prompts), of the student's forward and backward pass and, in
OPD, of the teacher's forward pass. No code that leaves float32 products to PyTorch, and
computes each of these once, gets below it.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
STUDENT = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
TEACHER = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
CHARACTERS = "0123456789+-*=abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV"  # with end and padding 64
CASES = {"GRPO 8 x 8": ("grpo", 8, 8), "OPD 8 x 8": ("opd", 8, 8), "OPD 64 x 1": ("opd", 64, 1)}
# The ratios to TRL that the project wants: of CPU time, and of memory where the model is large enough for it to matter.
BARS = {"GRPO 8 x 8": (0.55, None), "OPD 8 x 8": (0.60, None), "OPD 64 x 1": (0.77, None)}
MODEL_BARS = {"GRPO 8 x 8": (0.35, 0.3), "OPD 8 x 8": (0.45, 0.3), "OPD 64 x 1": (0.70, 0.3)}
LONGEST_QUESTION = 160  # characters


def prepare(directory: Path, options: argparse.Namespace) -> None:
    """The problems and, without --model, the two tiny checkpoints."""
    if options.model:
        rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
        problems = [(row["question"], row["answer"].split("####")[-1].strip()) for row in rows]
        problems = [(question, answer) for question, answer in problems if len(question) < LONGEST_QUESTION]
    else:
        rng = random.Random(0)
        sums = rng.sample([(a, b) for a in range(10, 60) for b in range(10, 60)], 64 * 32)
        problems = [(f"{a}+{b}=", str(a + b)) for a, b in sums]
        prepare_tiny(directory)
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in problems]
    (directory / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare_tiny(directory: Path) -> None:
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


def checkpoints(directory: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Student and teacher."""
    return (options.model, options.model) if options.model else (str(directory / "student"), str(directory / "teacher"))


def seconds() -> float:
    """CPU seconds of this process and of its children, ended or living."""
    import psutil

    times = [os.times(), *(child.cpu_times() for child in psutil.Process().children(recursive=True))]
    return sum(t.user + t.system for t in times) + times[0].children_user + times[0].children_system


def peak_gigabytes() -> float:
    """The highest resident memory so far of this process and of each living child, summed, in GB."""
    import psutil

    kilobytes = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text()
        kilobytes += int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    return kilobytes * 1024 / 1e9


def products(models: tuple[str, str], what: str, positions: float, tokens: float, steps: int) -> float:
    """CPU seconds of one step's products. `positions` go through the layers in training, and of them `tokens` through
    the output matrix. Sampling puts `tokens` through both, in `steps` batches.
    """
    import torch
    from transformers import AutoConfig

    def least(work, *arguments) -> float:
        """Seconds of the fastest of up to three runs; of something long, one says enough."""
        times: list[float] = []
        while len(times) < 3 and sum(times) < 5:
            start = time.process_time()
            work(*arguments)
            times.append(time.process_time() - start)
        return min(times)

    def operands(model: str, rows: float, head_rows: float) -> list[list[torch.Tensor]]:
        """Of each weight: its input, itself, the gradient of its output."""
        c = AutoConfig.from_pretrained(model)
        wide, query, key = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        shapes = [(wide, query), (query, wide)] + 2 * [(wide, key), (wide, c.intermediate_size)]
        shapes += [(c.intermediate_size, wide)]
        one_layer = [[torch.randn(s) for s in ((round(rows), i), (o, i), (round(rows), o))] for i, o in shapes]
        # As in the losses, only a few rows of logits are held at a time.
        pieces = max(1, round(head_rows * c.vocab_size / 2**21))
        head = [torch.randn(s) for s in ((round(head_rows / pieces), wide), (c.vocab_size, wide))]
        head.append(torch.randn(round(head_rows / pieces), c.vocab_size))
        return one_layer * c.num_hidden_layers + pieces * [head]

    def sample(weights) -> None:
        for _ in range(steps):
            for x, weight, _ in weights:
                x @ weight.T

    def train(weights, backward: bool) -> None:
        for x, weight, gradient in weights:
            x @ weight.T
            if backward:
                gradient @ weight, gradient.T @ x  # noqa: B018

    student, teacher = models
    total = least(sample, operands(student, tokens / steps, tokens / steps))
    for model, trained in [(student, True)] + [(teacher, False)] * (what == "opd"):
        total += least(train, operands(model, positions, tokens), trained)
    return total


def ours(case: str, directory: Path, options: argparse.Namespace) -> dict:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import lib.runs
    import opd
    import teacher_grpo
    from lib.packing import by_prompt, positions

    marks, tokens, packed, log, steps = [], [], [], lib.runs.Run.log, lib.runs.Run.steps

    def marked_steps(run, total):
        marks.append(seconds())
        yield from steps(run, total)

    def log_and_mark(run, step, metrics, rollouts, show=()):
        log(run, step, metrics, rollouts, show)
        tokens.append(sum(len(rollout.response_ids) for rollout in rollouts))
        packed.append(sum(positions(rollouts, group) for group in by_prompt(rollouts, range(len(rollouts)))))
        marks.append(seconds())

    lib.runs.Run.log, lib.runs.Run.steps = log_and_mark, marked_steps
    advantages = teacher_grpo.group_advantages
    teacher_grpo.group_advantages = lambda *arguments: advantages(*arguments) + 1e-9
    what, prompts, samples = CASES[case]
    student, teacher = checkpoints(directory, options)
    settings = dict(
        model=student, data=str(directory / "problems.jsonl"), out=str(directory / "out"), exclude=(), prompt="{problem}",
        max_prompt_tokens=256 if options.model else 16, max_response_tokens=options.tokens, lr=1e-6, passes=1000,
        max_steps=options.warmup + options.steps, save_every=10**6, engine="torch", prompts_per_step=prompts,
        rollouts_per_prompt=samples, micro_batch_tokens=options.micro_batch_tokens,
    )  # fmt: skip
    if what == "grpo":
        teacher_grpo.main(teacher_grpo.Config(**settings, mini_batch_prompts=prompts, kl_coef=0.0))
    else:
        opd.main(opd.Config(**settings, teacher=teacher))
    peak = peak_gigabytes()
    floor = products((student, teacher), what, statistics.mean(packed), statistics.mean(tokens), options.tokens)
    return dict(marks=marks, tokens=statistics.mean(tokens) / (prompts * samples), gigabytes=peak, products=floor)


def theirs(case: str, directory: Path, options: argparse.Namespace) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    marks = []

    class Mark(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            marks.append(seconds())

        def on_step_end(self, args, state, control, **kwargs):
            marks.append(seconds())

    what, prompts, samples = CASES[case]
    rows = [json.loads(line) for line in (directory / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    if options.model:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    if what == "opd":  # one response to each row, so a group is the same row several times
        rows = [row for row in rows[: 2 * prompts * (options.warmup + options.steps)] for _ in range(samples)]
    student, teacher = checkpoints(directory, options)
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (student, teacher)]
    shared = dict(
        output_dir=str(directory / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=options.trl_batch,
        gradient_accumulation_steps=prompts * samples // options.trl_batch, max_steps=options.warmup + options.steps,
        max_completion_length=options.tokens, learning_rate=1e-6, temperature=1.0, beta=0.0, report_to="none",
        save_strategy="no", logging_steps=1, gradient_checkpointing=False, shuffle_dataset=False,
    )  # fmt: skip

    def reward(prompts, completions, answer, **kwargs):
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [float(right == text.strip()) for right, text in zip(answer, texts)]

    common = dict(train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Mark()])
    if what == "grpo":
        args = GRPOConfig(num_generations=samples, **shared)
        trainer = GRPOTrainer(models[0], reward, args=args, **common)
    else:
        args = DistillationConfig(**{**shared, "beta": 1.0})  # beta 1 is KL(student || teacher)
        trainer = DistillationTrainer(*models, args=args, **common)
    if what == "grpo":
        del models[1]
    trainer.train()
    logged = trainer.state.log_history
    tokens = [line["completions/mean_length"] for line in logged if "completions/mean_length" in line]
    return dict(marks=marks, tokens=statistics.mean(tokens), gigabytes=peak_gigabytes())


def measure(side: str, python: str, case: str, options: argparse.Namespace) -> dict:
    """One process's figures: {"seconds", "gigabytes", "tokens", and of ours "products"}."""
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), options)
        words = [__file__, *sys.argv[1:], "--directory", directory, "--case", case, "--side", side]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run([python, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="Python interpreter that has trl; without it only our side runs")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    parser.add_argument("--model", help="checkpoint to take in place of the tiny Qwen3")
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl, for --model")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="length of responses; by default 32, with --model 48")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="positions of our micro-batches")
    parser.add_argument("--trl-batch", type=int, default=64, help="sequences of TRL's micro-batches")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokens = options.tokens or (48 if options.model else 32)
    if options.side:
        result = {"ours": ours, "theirs": theirs}[options.side](options.case, options.directory, options)
        assert result["tokens"] > 0.7 * options.tokens, result
        marks = result.pop("marks")
        result["seconds"] = (marks[-1] - marks[options.warmup]) / options.steps
        return print("\n" + json.dumps(result))

    sides = {"ours": sys.executable} | ({"theirs": options.trl} if options.trl else {})
    found: dict = {case: {side: [] for side in sides} for case in options.cases}
    for number in range(options.rounds):
        for case in options.cases:
            for side, python in sides.items():
                result = measure(side, python, case, options)
                found[case][side].append(result)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in result.items())
                print(f"round {number}: {case}, {side}: {shown}", flush=True)
    text = report(found, options)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")


def report(found: dict, options: argparse.Namespace) -> str:
    """The table, in Markdown."""

    def cell(results: list[dict], name: str) -> tuple[float, str]:
        values = [result[name] for result in results]
        middle = statistics.median(values)
        digits = 3 if middle < 10 else 1
        span = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
        return middle, f"{middle:.{digits}f}{span}"

    rows = []
    for case, sides in found.items():
        mine, floor, memory = (cell(sides["ours"], name) for name in ("seconds", "products", "gigabytes"))
        theirs = cell(sides["theirs"], "seconds") if "theirs" in sides else (float("nan"), "not run")
        their_memory = cell(sides["theirs"], "gigabytes") if "theirs" in sides else (float("nan"), "not run")
        bars = (MODEL_BARS if options.model else BARS)[case]
        rows.append(
            f"| {case} | {mine[1]} | {theirs[1]} | {floor[1]} | {mine[0] / theirs[0]:.2f} | {floor[0] / theirs[0]:.2f} "
            f"| {bars[0]:.2f} | {memory[1]} | {their_memory[1]} | {memory[0] / their_memory[0]:.2f} | {bars[1] or ''} |"
        )
    model = f"{Path(options.model).name}, GSM8K" if options.model else "a tiny Qwen3, sums"
    return "\n".join([
        f"CPU seconds of one step and peak memory, ours beside TRL 1.16.0: {model}, {options.tokens} new tokens. Median of "
        f"{options.rounds} rounds (range), {options.steps} steps each after {options.warmup} that are not timed; a "
        f"{os.cpu_count()}-core x86-64 CPU, {options.threads} thread{'s' * (options.threads > 1)}, float32, {options.date}, "
        f"load {os.getloadavg()[2]:.1f}. TRL's micro-batches have {options.trl_batch} sequences, ours at most "
        f"{options.micro_batch_tokens} positions.",
        "",
        "| step | ours, s | TRL, s | products alone, s | ours / TRL | products / TRL | bar | ours, GB | TRL, GB | ours / TRL "
        "| bar |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
