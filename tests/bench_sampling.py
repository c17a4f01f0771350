"""Tokens per CPU second of the embedded sampler, of transformers' generate, and of vLLM on a CPU, at the same prompts.

    python -m tests.bench_sampling                                                    # a tiny untrained Qwen3
    python -m tests.bench_sampling --model SMOLLM2 --data GSM8K.jsonl --out results/sampling/cpu.md

Every sampler continues 64 rows by the same number of tokens at temperature 1, with end-of-sequence tokens ignored, so
that all do the same work. The rows are 64 prompts, or 8 prompts with 8 samples each; the embedded sampler and vLLM can
then compute each prompt once. All is in float32. The embedded sampler and vLLM run as the stages use them, with a seed
for each response and the log-probability of every token, and generate runs plainly. Each is a process of its own. Its
CPU seconds are of all threads, the least of some runs after one that is not timed.

With --model, prompts are the questions of --data (GSM8K's train.jsonl) below 160 characters in the chat template, and
without it sums.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import evaluate
from common import request_seed
from lib.data import load_tokenizer
from lib.engines import Sampling, TorchEngine, VLLMEngine
from lib.policy import load_causal_lm
from tests import bench_trl

ROWS = {"64 x 1": (64, 1), "8 x 8": (8, 8)}
SAMPLERS = {"embedded": "embedded sampler", "generate": "transformers' generate", "vllm": "vLLM"}


def load(sampler: str, model: str, longest_prompt: int, tokens: int):
    """A function of prompts (lists of token ids) and the number of samples, which returns the sampled token ids."""
    tokenizer = load_tokenizer(model)
    if sampler == "generate":
        causal_lm = load_causal_lm(model, torch.float32, torch.device("cpu"))
        causal_lm.generation_config.eos_token_id = None

        def generate(prompts, samples):
            batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
            ids = causal_lm.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=tokens,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=samples, pad_token_id=0,
            )  # fmt: skip
            return ids[:, batch["input_ids"].shape[1] :].tolist()

        return generate
    if sampler == "embedded":
        engine = TorchEngine(load_causal_lm(model, torch.float32, torch.device("cpu")), tokenizer)
        engine.stop_ids = torch.tensor([-1])
    else:
        lengths = dict(max_prompt_tokens=longest_prompt, max_response_tokens=tokens)
        engine = VLLMEngine(model, tokenizer, evaluate.Config((model,), out="", **lengths))
        engine.stop_ids = []

    def sample(prompts, samples):
        if sampler == "vllm":  # in training, where the weights have changed, no prompt is known from the step before
            engine.llm.reset_prefix_cache()
        seeds = [[request_seed(0, i, j) for j in range(samples)] for i in range(len(prompts))]
        groups = engine.generate(prompts, seeds, Sampling(tokens))
        return [completion.token_ids for group in groups for completion in group]

    return sample


def run(options: argparse.Namespace, directory: Path) -> None:
    """Prints, as JSON, one sampler's tokens per CPU second by the kind of rows."""
    torch.set_num_threads(options.threads)
    bench_trl.prepare(directory, options)
    model, _ = bench_trl.checkpoints(directory, options)
    tokenizer = load_tokenizer(model)
    lines = (directory / "problems.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    texts = [json.loads(line)["prompt"] for line in lines]
    if options.model:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    sample, rates = load(options.sampler, model, max(map(len, prompts)), options.tokens), {}
    for name, (count, samples) in ROWS.items():
        seconds = []
        for _ in range(options.repeats + 1):
            start = time.process_time()
            with torch.inference_mode():
                found = sample(prompts[:count], samples)
            seconds.append(time.process_time() - start)
            assert [len(ids) for ids in found] == [options.tokens] * count * samples
        rates[name] = count * samples * options.tokens / min(seconds[1:])
    print(json.dumps(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint with a chat template")
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl, for --model")
    parser.add_argument("--out", type=Path, help="file to append the table to")
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="length of responses; by default 32, with --model 48")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--sampler", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokens = options.tokens or (48 if options.model else 32)
    if options.sampler:
        with tempfile.TemporaryDirectory() as directory:
            return run(options, Path(directory))
    rates = {}
    for sampler in options.samplers:
        words = [sys.executable, "-m", "tests.bench_sampling", *sys.argv[1:], "--sampler", sampler]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        rates[sampler] = json.loads(done.stdout.strip().splitlines()[-1])
        print(sampler, rates[sampler], flush=True)
    first = rates[options.samplers[0]]
    rows = [
        f"| {SAMPLERS[sampler]} | " + " | ".join(f"{rate:.0f} ({rate / first[name]:.2f}x)" for name, rate in of.items()) + " |"
        for sampler, of in rates.items()
    ]  # fmt: skip
    model = f"{Path(options.model).name}, GSM8K" if options.model else "a tiny Qwen3, sums"
    text = "\n".join([
        f"Tokens per CPU second, {model}, 64 rows of {options.tokens} new tokens; a {os.cpu_count()}-core x86-64 CPU, 24 GB, "
        f"{options.threads} thread{'s' * (options.threads > 1)}, float32, {options.date}, load {os.getloadavg()[2]:.1f}.",
        "",
        "| sampler | " + " | ".join(ROWS) + " |",
        "|---|" + "---|" * len(ROWS),
        *rows,
        "",
    ])  # fmt: skip
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
