"""What the stages' own code costs on one device: tokens a second, MFU, peak memory; fused losses beside the formulas.

    python -m tests.bench_training            # on a GPU: writes results/training/<device>.md
    python -m tests.bench_training --tiny     # the same lines at toy sizes, on any device; writes nothing

Models of Qwen3-0.6B's and (teacher) Qwen3-1.7B's shape with their whole vocabulary and random weights, responses of 2,000
to 4,000 random tokens. Timed are `teacher_grpo.update`, an update of OPD, and the embedded sampler, as the scripts call
them. MFU counts the products and attention of one forward and backward pass, recomputes nothing, and divides by the dense
bfloat16 peak. A row that runs out of memory stays in the table.
"""

import argparse
import dataclasses
import math
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import kernels  # noqa: E402
import lib.engines  # noqa: E402
import lib.memory  # noqa: E402
import lib.policy  # noqa: E402
import opd  # noqa: E402
import teacher_grpo  # noqa: E402
from experiments import hours  # noqa: E402
from lib.packing import make_batches  # noqa: E402

STUDENT = Qwen3Config(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True,
    **hours.QWEN3,
)  # fmt: skip
TEACHER = hours.MODELS["Qwen3-1.7B"]
SHRUNK = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    vocab_size=300, layer_types=None,
)  # fmt: skip
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s
FORMULAS = {
    (teacher_grpo, "fused_linear_logprob"): kernels.fused_linear_logprob_reference,
    (opd, "fused_linear_logprob"): kernels.fused_linear_logprob_reference,
    (opd, "fused_linear_kl"): kernels.fused_linear_kl_reference,
}


def forward_flops(config: Qwen3Config, rollouts: list[common.Rollout]) -> float:
    """Of one pass over all positions, with the output matrix at those that predict response tokens."""
    size = lib.memory.size_of(config)
    lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts]
    layers = 2 * (size.parameters - size.outside) * sum(lengths)
    attention = 2 * size.layers * size.query * sum(length**2 for length in lengths)  # causal: half of two products
    return layers + attention + 2 * size.head * common.count_tokens(rollouts)


def random_rollouts(count: int, shortest: int, longest: int, vocab_size: int) -> list[common.Rollout]:
    rng = random.Random(0)
    rollouts = []
    for number in range(count):
        prompt, response = (
            [rng.randrange(vocab_size) for _ in range(n)] for n in (100, rng.randint(shortest, longest))
        )
        logprobs = [-math.log(vocab_size)] * len(response)
        rollouts.append(common.Rollout(None, number % 8, prompt, response, logprobs, "length", ""))
    return rollouts


def opd_update(policy, teacher, optimizer, rollouts, cfg) -> None:
    """An update as in opd.py's main."""
    loss_sum = 0.0
    for batch in make_batches(rollouts, cfg.micro_batch_tokens, common.this_device(), cfg.share_prompts):
        kl = opd.exact_kl_loss(policy, teacher, batch, policy.model.config.vocab_size)
        (kl.loss / common.count_tokens(rollouts)).backward()
        loss_sum += kl.loss.item()
    lib.policy.release(teacher)
    common.optimizer_step(policy, optimizer, loss_sum, cfg.lr, cfg.max_grad_norm)


def measure(work) -> tuple[float, float]:
    """Median seconds of three calls after one, and the peak GiB of all; nan where memory does not suffice."""
    cuda, times = torch.cuda.is_available(), []
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(4):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return math.nan, math.nan
    return statistics.median(times[1:]), torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --tiny runs the same lines at toy sizes")
    common.start_process()
    device = common.this_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = next((flops for key, flops in PEAK.items() if key in name), math.nan)
    configs = {"student": STUDENT, "teacher": TEACHER}
    if options.tiny:
        configs = {key: Qwen3Config(**{**config.to_dict(), **SHRUNK}) for key, config in configs.items()}
    student, teacher = configs.values()
    count, shortest, longest, new_tokens = (8, 5, 30, 8) if options.tiny else (16, 2000, 4000, 256)
    rollouts = random_rollouts(count, shortest, longest, student.vocab_size)
    cfg = teacher_grpo.Config(
        "", data="", out="", rollouts_per_prompt=8, mini_batch_prompts=count // 8, kl_coef=0.0,
        micro_batch_tokens=300 if options.tiny else 16384,
    )  # fmt: skip
    positions = sum(len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts)
    for rollout, advantage in zip(rollouts, torch.linspace(-1, 1, count).tolist()):
        rollout.advantage = advantage

    rows = []

    def row(step: str, losses: str, work, tokens: float, flops: float) -> None:
        seconds, gib = measure(work)
        cells = [f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{100 * flops / seconds / peak:.1f} %", f"{gib:.1f}"]
        cells = (
            ["out of memory"] + [""] * 3 if math.isnan(seconds) else ["-" if "nan" in cell else cell for cell in cells]
        )
        rows.append(f"| {step} | {losses} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as directory:
        for key, config in configs.items():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(f"{directory}/{key}")
        load = lambda key: lib.policy.load_policy(f"{directory}/{key}", cfg, trainable=key == "student")
        forward, teacher_forward = forward_flops(student, rollouts), forward_flops(teacher, rollouts)
        for losses in ("fused", "formulas"):
            for (module, function), formula in FORMULAS.items() if losses == "formulas" else ():
                setattr(module, function, formula)
            for step in ("GRPO update", "OPD update"):  # on models of its own: running out of memory spoils them
                policy, frozen = load("student"), load("teacher") if step == "OPD update" else None
                optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=cfg.weight_decay, fused=True)
                if frozen is None:
                    work = partial(teacher_grpo.update, policy, None, optimizer, rollouts, cfg.lr, cfg)
                else:
                    work = partial(opd_update, policy, frozen, optimizer, rollouts, cfg)
                row(step, losses, work, positions, 3 * forward + (teacher_forward if frozen else 0))
                del policy, frozen, optimizer, work  # before the next ones come
        policy = load("student")
        sampler = lib.engines.make_engine(
            dataclasses.replace(cfg, engine="torch"), f"{directory}/student", SimpleNamespace(eos_token_id=0), policy
        )
        sampler.sync(policy)
        prompts, seeds = [[5 + i] * 100 for i in range(8)], [[8 * i + j for j in range(8)] for i in range(8)]
        work = partial(sampler.generate, prompts, seeds, lib.engines.Sampling(new_tokens))
        row("embedded sampler", "", work, 64 * new_tokens, 2 * 64 * new_tokens * lib.memory.size_of(student).parameters)
    text = "\n".join([
        f"{name}, torch {torch.__version__}, {options.date}. Student {lib.memory.size_of(student).parameters / 1e9:.2f}B, teacher "
        f"{lib.memory.size_of(teacher).parameters / 1e9:.2f}B parameters, {student.vocab_size} tokens in the vocabulary, {positions} "
        f"positions an update in micro-batches of {cfg.micro_batch_tokens}. Command: `python -m tests.bench_training`.",
        "",
        "| step | losses | seconds | tokens/s | MFU | peak GiB |", "|---|---|---|---|---|---|", *rows, "",
    ])  # fmt: skip
    print(text)
    if not options.tiny:
        path = ROOT / "results/training" / f"{name.replace(' ', '-').lower()}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    common.exit_process(0)


if __name__ == "__main__":
    main()
