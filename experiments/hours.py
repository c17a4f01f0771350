"""GPU memory and GPU-hours of the paper's pairs, and what fits one GPU, estimated: results/memory/*.md.

python -m experiments.hours
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import LlamaConfig, Qwen3Config

from lib.memory import CARDS, GIB, RESERVE, Size, peak, plan, size_of, verdict

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
            verdicts = [verdict(planned, card) for card in (80, 141)]
            lines.append(
                f"| {student} <- {teacher} | {stage} | {trained} ({sizes[trained].parameters / 1e9:.1f}B) | {frozen} | "
                f"{nodes} | {peak(planned) / GIB:.0f} | {verdicts[0]} | {verdicts[1]} |"
            )
    return "\n".join(lines) + "\n"


SMALL_PAIRS = [("Qwen3-0.6B", "Qwen3-1.7B"), ("Qwen3-0.6B", "Qwen3-4B"), *PAIRS[:2]]
LENGTHS = {
    "512 + 1,024": (1536, 4),
    "1,024 + 4,096": (5120, 8),
    "the paper's": (3072 + 16384, 16),
}  # positions, cache GiB


def one_gpu() -> str:
    """Markdown: which pairs fit a single GPU, for every stage and three lengths of prompt and response."""
    sizes = {name: size_of(config) for name, config in MODELS.items()}
    lines = [
        "GiB on a single GPU, with activation checkpointing, one sequence of full length in a micro-batch, and 4, 8 or 16 GiB of "
        f"vLLM cache (`--kv-cache-gib`); a stage fits if {RESERVE / GIB:.0f} GiB are left for CUDA. Estimated on the meta device, "
        "not measured. Command: `python -m experiments.hours`.",
        "",
        "| pair | stage | prompt + response tokens | GiB | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
        "|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for student, teacher in SMALL_PAIRS:
        for stage, trained, frozen in (("1", teacher, teacher), ("2a, 2b", student, teacher), ("3", student, student)):
            for length, (positions, cache) in LENGTHS.items():
                planned = plan(sizes[trained], sizes[frozen], stage[0] == "2", 1, positions, cache * GIB, 1, True)
                fits = ["fits" if verdict(planned, card).startswith("fits") else "-" for card in CARDS]
                lines.append(
                    f"| {student} <- {teacher} | {stage} | {length} | {peak(planned) / GIB:.0f} | {' | '.join(fits)} |"
                )
    return "\n".join(lines) + "\n"


# What the estimate of time assumes: 8 H100 GPUs, and lengths of responses that nobody knows before the run.
GPUS = 8
FLOPS, UTILISATION = 989e12, 0.4  # dense bfloat16, and the share of it that training reaches
BANDWIDTH, OF_BANDWIDTH = 3.35e12, 0.6  # bytes a second, and the share of it that sampling reaches
LABELS, PROMPT, RESPONSE = 16_199, 150, 2_000  # problems of DAPO-Math-17k; mean tokens, without thinking
LONGEST = 16_384  # Tables 8 and 9
GROUP = 8  # rollouts of a prompt, in every stage
STREAMED = 512  # sequences of a GPU at a time where responses need not wait for one another (--max-sequences)


@dataclass(frozen=True)
class Assumed:
    """What an estimate of time rests on; by default that for the paper's scale."""

    gpus: int = GPUS
    flops: float = FLOPS * UTILISATION  # of each GPU in a second, in training
    bandwidth: float = BANDWIDTH * OF_BANDWIDTH  # bytes that each GPU reads in a second, in sampling
    pass_seconds: float = 0.0  # what a token takes at least; a small model waits for the CPU, not for its weights
    response: int = RESPONSE  # mean tokens
    longest: int = LONGEST
    streamed: int = STREAMED
    share_prompts: bool = False  # off on a GPU until gpu_check has passed there


PAPER = Assumed()
# GSM8K on one GPU: an RTX 4090 (165 TFLOP/s, 1.01 TB/s) and an H100, which small models use less well than large ones do.
SHORT = dict(gpus=1, pass_seconds=0.005, response=250, longest=1024)
ONE_GPU = {
    24: ("Qwen3-0.6B", "Qwen3-0.6B", Assumed(flops=165e12 * 0.3, bandwidth=1.01e12 * 0.6, streamed=128, **SHORT)),
    80: ("Qwen3-0.6B", "Qwen3-1.7B", Assumed(flops=989e12 * 0.3, bandwidth=3.35e12 * 0.6, **SHORT)),
}  # CARD -> student, teacher, assumptions
GSM8K, GSM8K_TEST = 7_473, 1_319


def read_seconds(
    size: Size, sequences: np.ndarray | float, cached_tokens: np.ndarray | float, assumed: Assumed = PAPER
) -> np.ndarray | float:
    """Time in which a GPU reads the weights once, and the cache of so many sequences: that of sampling a token of each.

    A model too large for a GPU is split over 8 (`--tensor-parallel 8`), each of which reads its part.
    """
    weights = 2 * size.parameters / (8 if size.parameters > 30e9 else 1)
    cache = sequences * size.layers * 2 * size.key_value * 2 * cached_tokens
    return np.maximum((weights + cache) / assumed.bandwidth, assumed.pass_seconds)


def batch_seconds(size: Size, rollouts: int, assumed: Assumed = PAPER) -> float:
    """Time in which all GPUs sample a batch of rollouts, the last of which everyone waits for.

    Lengths are taken to be exponential around their mean, cut at the longest. While a few long responses are still being
    sampled, every token of theirs costs a whole pass over the weights.
    """
    token = np.arange(assumed.longest)
    running = np.exp(-token / assumed.response)  # probability that a response is at least so long
    anyone = 1 - (1 - running) ** rollouts
    return float((anyone * read_seconds(size, rollouts / assumed.gpus * running, PROMPT + token, assumed)).sum())


def stream_seconds(size: Size, rollouts: int, assumed: Assumed = PAPER) -> float:
    """Time in which all GPUs sample rollouts that need not wait for one another (teacher rollouts, evaluation)."""
    tokens, at_a_time = rollouts / assumed.gpus * assumed.response, assumed.streamed
    return tokens / at_a_time * read_seconds(size, at_a_time, PROMPT + assumed.response / 2, assumed)


def train_seconds(rollouts: int, trained: Size, passes: list[Size], assumed: Assumed = PAPER) -> float:
    """Time in which all GPUs train on rollouts, activations computed twice; `passes` are forward passes besides."""
    flops = 8 * trained.parameters + sum(2 * size.parameters for size in passes)
    positions = PROMPT / (GROUP if assumed.share_prompts else 1) + assumed.response  # of each rollout
    return rollouts * positions * flops / (assumed.flops * assumed.gpus)


def stage_hours(student: Size, teacher: Size, labels: int = LABELS, assumed: Assumed = PAPER) -> dict[str, float]:
    """GPU-hours of every kind of checkpoint in the Makefile's graph at the paper's scale, on all labels."""
    once = labels * GROUP  # rollouts of one pass

    def grpo(model: Size) -> float:  # 10 passes, 32 prompts at a time, with passes for the old and the reference policy
        return 10 * (
            once / 256 * batch_seconds(model, 256, assumed) + train_seconds(once, model, [model, model], assumed)
        )

    def opd(passes: int) -> float:  # 64 prompts at a time
        return passes * (
            once / 512 * batch_seconds(student, 512, assumed) + train_seconds(once, student, [teacher], assumed)
        )

    seconds = {
        "Stage 1, teacher (10 passes)": grpo(teacher),
        "direct GRPO, Stage 3, replay (10 passes)": grpo(student),
        "filtered SFT of the teacher (2 passes)": stream_seconds(teacher, once, assumed)
        + train_seconds(2 * once, teacher, [], assumed),
        "2a warmup (1 pass)": stream_seconds(teacher, once, assumed) + train_seconds(once, student, [teacher], assumed),
        "2b OPD (1 pass)": opd(1),
        "OPD only (2 passes)": opd(2),
        "teacher-sample SFT, after the warmup's sampling (2 passes)": train_seconds(2 * once, student, [], assumed),
        "forward KL only, after the warmup's sampling (2 passes)": train_seconds(2 * once, student, [teacher], assumed),
    }
    return {name: GPUS * value / 3600 for name, value in seconds.items()}


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
        f"H100 GPU-hours on {GPUS} GPUs, estimated, not measured: {LABELS} labels, {GROUP} rollouts of a prompt in every "
        f"stage, {PROMPT} prompt and {RESPONSE} response tokens on average. Training reaches {100 * UTILISATION:.0f} % of "
        f"{FLOPS / 1e12:.0f} TFLOP/s. Sampling reaches {100 * OF_BANDWIDTH:.0f} % of {BANDWIDTH / 1e12:.2f} TB/s; in Stages 1, "
        f"2b and 3 a step waits for its longest response (lengths exponential, cut at {LONGEST}), teacher rollouts are "
        f"sampled {STREAMED} at a time on each GPU. Halves of the labels cost half. Evaluation is not in it. The lengths are a "
        "guess, and time follows them. Command: `python -m experiments.hours`.",
        "",
        "| on all labels | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for stage in next(iter(columns.values())):
        lines.append(f"| {stage} | " + " | ".join(f"{column[stage]:.0f}" for column in columns.values()) + " |")
    for name, costs in sums.items():
        lines.append(f"| **{name}**, from nothing | " + " | ".join(f"**{cost:.0f}**" for cost in costs) + " |")
    student, teacher = (sizes[name] for name in PAIRS[0])
    apart, shared = (stage_hours(student, teacher, assumed=Assumed(share_prompts=each)) for each in (False, True))
    lines += ["", "With `--share-prompts`, which computes a prompt once for all its responses, the 8B pair's Stage 1 would take "
              f"{shared['Stage 1, teacher (10 passes)']:.0f} hours in the place of {apart['Stage 1, teacher (10 passes)']:.0f}, and "
              f"OPD {shared['2b OPD (1 pass)']:.0f} in the place of {apart['2b OPD (1 pass)']:.0f}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def one_gpu_hours() -> str:
    """Markdown: hours of `make one-gpu` by stage, for both cards, with the Makefile's numbers of passes."""
    columns: dict[str, dict[str, float]] = {}
    for card, (student_name, teacher_name, assumed) in ONE_GPU.items():
        student, teacher = size_of(MODELS[student_name]), size_of(MODELS[teacher_name])

        def grpo(model: Size, labels: float, passes: int = 2) -> float:  # 32 prompts at a time
            once = labels * GROUP
            update = train_seconds(once, model, [model, model], assumed)
            return passes * (once / 256 * batch_seconds(model, 256, assumed) + update)

        half = GSM8K // 2 * GROUP
        distil = train_seconds(half, student, [teacher], assumed)
        seconds = {
            "direct GRPO, all labels": grpo(student, GSM8K),
            "1 teacher, 1H": grpo(teacher, GSM8K // 2),
            "2a warmup, 1H": stream_seconds(teacher, half, assumed) + distil,
            "2b OPD, 1H": half / 256 * batch_seconds(student, 256, assumed) + distil,
            "3 GRPO, 2H": grpo(student, GSM8K // 2),
            "evaluation of all, 4 samples": 4 * GSM8K_TEST * sum(
                stream_seconds(size, 1, assumed) for size in (*[student] * 5, teacher, teacher)
            ),
        }  # fmt: skip
        columns[f"{card} GB: {student_name} <- {teacher_name}"] = {
            **{stage: value / 3600 for stage, value in seconds.items()}, "**sum**": sum(seconds.values()) / 3600
        }  # fmt: skip
    lines = [
        "Hours of `make one-gpu CARD=24` (on an RTX 4090) and `CARD=80` (on an H100), estimated, not measured: GSM8K, "
        f"{PROMPT} prompt and {SHORT['response']} response tokens on average, at most {SHORT['longest']}, no token quicker "
        f"than {1000 * SHORT['pass_seconds']:.0f} ms. Training reaches 30 % of the GPU's FLOP/s, sampling 60 % of its "
        "bandwidth. Loading of models, grading and installation are not in it.",
        "",
        "| stage | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for stage in next(iter(columns.values())):
        lines.append(f"| {stage} | " + " | ".join(f"{column[stage]:.1f}" for column in columns.values()) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    directory = Path("results/memory")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("pairs", pairs()), ("one_gpu", one_gpu() + "\n" + one_gpu_hours()), ("hours", hours())):
        (directory / f"{name}.md").write_text(text)
        print(text)
