"""GPU memory and GPU-hours of the paper's pairs, estimated: results/memory/pairs.md and results/memory/hours.md.

python -m experiments.hours
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, Qwen3Config

from lib.memory import GIB, Size, peak, plan, size_of, verdict

# The shapes of the paper's models, written out so that no hub is needed.
QWEN3 = dict(vocab_size=151936, head_dim=128, num_key_value_heads=8, max_position_embeddings=40960)
MODELS = {
    "Qwen3-1.7B": Qwen3Config(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                              tie_word_embeddings=True, **QWEN3),
    "Qwen3-8B": Qwen3Config(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                            tie_word_embeddings=False, **QWEN3),
    "Qwen3-14B": Qwen3Config(hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
                             tie_word_embeddings=False, **QWEN3),
    "Llama-3.1-8B": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                num_attention_heads=32, num_key_value_heads=8),
    "Llama-3.3-70B": LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                 num_attention_heads=64, num_key_value_heads=8),
}  # fmt: skip
PAIRS = [("Qwen3-1.7B", "Qwen3-8B"), ("Qwen3-1.7B", "Qwen3-14B"), ("Llama-3.1-8B", "Llama-3.3-70B")]


def pairs() -> str:
    """Markdown: every stage of the paper's pairs at its lengths (3072 + 16384 and 2048 + 16384 tokens)."""
    sizes = {name: size_of(config) for name, config in MODELS.items()}
    lines = [
        "GiB on each GPU at the larger of its two states, with activation checkpointing, one sequence of the paper's full "
        "length in a micro-batch and 16 GiB of vLLM cache; weights sharded over the GPUs of one node, or of two where the "
        "trained model is too large for one (`--shard-nodes 2`, `--tensor-parallel 8`, and 4 GiB of cache). Estimated on the "
        "meta device, not measured. Command: `python -m experiments.hours`.",
        "",
        "| pair | stage | trained | frozen | nodes that share the weights | GiB | 8 GPUs of 80 GB a node | 8 of 141 GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for student, teacher in PAIRS:
        for stage, trained, frozen, positions in (
            ("1 GRPO", teacher, teacher, 3072 + 16384),
            ("2 bridge", student, teacher, 2048 + 16384),
            ("3 GRPO", student, student, 3072 + 16384),
        ):
            nodes, parallel, cache = (2, 8, 4) if sizes[trained].parameters > 30e9 else (1, 1, 16)
            planned = plan(
                sizes[trained], sizes[frozen], "bridge" in stage, 8 * nodes, positions, cache * GIB, parallel, True
            )
            verdicts = [verdict(planned, gib * 1e9 / GIB) for gib in (80, 141)]
            lines.append(
                f"| {student} <- {teacher} | {stage} | {trained} ({sizes[trained].parameters / 1e9:.1f}B) | {frozen} | "
                f"{nodes} | {peak(planned) / GIB:.0f} | {verdicts[0]} | {verdicts[1]} |"
            )
    return "\n".join(lines) + "\n"


# What the estimate of time takes for granted: an H100, and lengths that nobody knows before the run.
FLOPS, UTILISATION = 989e12, 0.4  # dense bfloat16, and the share of it that training reaches
BANDWIDTH, OF_BANDWIDTH = 3.35e12, 0.6  # bytes a second, and the share of it that sampling reaches
LABELS, PROMPT, RESPONSE = 16_199, 150, 2_000  # problems of DAPO-Math-17k; mean tokens, non-thinking
GROUP = 8  # rollouts of a prompt, in every stage


def tokens_per_second(size: Size, cache: float = 16 * GIB) -> float:
    """Sampled by one GPU, bound by reading the weights and the cache of as many sequences as the cache holds."""
    cached = size.layers * 2 * size.key_value * 2 * (PROMPT + RESPONSE / 2)  # bytes of a sequence, on average
    sequences = min(512, cache / cached)
    return sequences * OF_BANDWIDTH * BANDWIDTH / (2 * size.parameters + sequences * cached)


def gpu_hours(rollouts: float, sampled: float, sampler: Size | None, trained: Size, passes: list[Size]) -> float:
    """Of training on `rollouts`, after sampling `sampled` of them; `passes` are forward passes besides the
    training's."""
    flops = 8 * trained.parameters + sum(2 * size.parameters for size in passes)  # with activations recomputed
    seconds = rollouts * (PROMPT + RESPONSE) * flops / (FLOPS * UTILISATION)
    if sampler:
        seconds += sampled * RESPONSE / tokens_per_second(sampler)
    return seconds / 3600


def stage_hours(student: Size, teacher: Size, labels: int = LABELS) -> dict[str, float]:
    """GPU-hours of every kind of checkpoint in the Makefile's graph at the paper's scale, on all labels."""
    once = labels * GROUP  # rollouts of one pass
    return {
        "Stage 1, teacher (10 passes)": gpu_hours(10 * once, 10 * once, teacher, teacher, [teacher, teacher]),
        "direct GRPO, Stage 3, replay (10 passes)": gpu_hours(10 * once, 10 * once, student, student, [student] * 2),
        "filtered SFT of the teacher (2 passes)": gpu_hours(2 * once, once, teacher, teacher, []),
        "2a warmup (1 pass)": gpu_hours(once, once, teacher, student, [teacher]),
        "2b OPD (1 pass)": gpu_hours(once, once, student, student, [teacher]),
        "OPD only (2 passes)": gpu_hours(2 * once, 2 * once, student, student, [teacher]),
        "teacher-sample SFT, after the warmup's sampling (2 passes)": gpu_hours(2 * once, 0, None, student, []),
        "forward KL only, after the warmup's sampling (2 passes)": gpu_hours(2 * once, 0, None, student, [teacher]),
    }


def hours() -> str:
    """Markdown: GPU-hours of the stages and of the paper's tables, for its pairs."""
    sizes = {name: size_of(config) for name, config in MODELS.items()}
    columns = {f"{student} <- {teacher}": stage_hours(sizes[student], sizes[teacher]) for student, teacher in PAIRS}
    sums: dict[str, list[float]] = {}
    for pair, column in columns.items():
        stage1, grpo, sft_teacher, warmup, opd, opd_only, sft_only, fkl_only = column.values()
        # A teacher of the student's size is the direct-GRPO checkpoint, and costs as much to ask as the student.
        same = stage_hours(*[sizes[pair.split(" <- ")[0]]] * 2)
        *_, same_warmup, same_opd, same_opd_only, same_sft_only, _ = same.values()
        for name, cost in {
            "R1": grpo,
            "R2": (stage1 + warmup + sft_only + grpo) / 2,
            "R3-full": stage1 + warmup + opd,
            "R5-half, or R7": (stage1 + warmup + opd + grpo) / 2,
            "R6": (sft_teacher + warmup + opd + grpo) / 2,
            "R8": (stage1 + opd_only + grpo) / 2,
            "Table 3": stage1 + grpo + 2 * (warmup + opd),
            "Tables 1, 2 (top) and 6": stage1 + grpo + sft_teacher + 3 * (warmup + opd) + opd_only + sft_only
            + fkl_only + same_warmup + same_opd + same_opd_only + same_sft_only,
            "Tables 2 (bottom), 4 and 5": (stage1 + sft_teacher + 2 * (warmup + opd) + opd_only + sft_only + 6 * grpo) / 2,
        }.items():  # fmt: skip
            sums.setdefault(name, []).append(cost)
    lines = [
        f"H100 GPU-hours, estimated, not measured: {LABELS} labels, {GROUP} rollouts of a prompt in every stage, {PROMPT} "
        f"prompt and {RESPONSE} response tokens on average, training at {100 * UTILISATION:.0f} % of {FLOPS / 1e12:.0f} "
        f"TFLOP/s, sampling at {100 * OF_BANDWIDTH:.0f} % of {BANDWIDTH / 1e12:.2f} TB/s with 16 GiB of cache; halves of the "
        "labels cost half. Evaluation is not in it. Time is in proportion to the length of the responses, which is a guess. "
        "Command: `python -m experiments.hours`.",
        "",
        "| on all labels | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for stage in next(iter(columns.values())):
        lines.append(f"| {stage} | " + " | ".join(f"{column[stage]:.0f}" for column in columns.values()) + " |")
    for name, costs in sums.items():
        lines.append(f"| **{name}**, from nothing | " + " | ".join(f"**{cost:.0f}**" for cost in costs) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    directory = Path("results/memory")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("pairs", pairs()), ("hours", hours())):
        (directory / f"{name}.md").write_text(text)
        print(text)
