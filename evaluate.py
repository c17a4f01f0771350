"""Evaluation: avg@k ± standard error over problems (App. F), pass@k, and paired differences between checkpoints.

    python evaluate.py --models runs/direct runs/bridge --data math500 aime24 aime25 --out runs/report

A problem's score is the mean correctness of its k answers, and a data set's entry is the mean score, ± the standard
error over problems. Two checkpoints are compared problem by problem: the standard error of their difference is that of
the paired differences, usually smaller than the two separate errors suggest.

The paper says that its ± is also over problems. For AIME it cannot be: with 30 problems and 16 samples the expected
error is at least sqrt(p (1 - p) / 480), 1.8 points at 19.8 %, where the paper prints 1.4. The paper does not state its
decoding settings; the defaults are those of the authors' earlier code.

The output directory gets every sample (<checkpoint>/<data set>-<hash of the settings>.jsonl), results.json, table.md
and bars.png. Samples of the same weights, prompts, end tokens and decoding are reused, so the same command continues a
killed evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

import common
from common import InputError, SamplerConfig
from lib import data
from lib.engines import Sampling, check_engine, make_engine, shared_cache_gib
from lib.files import locked, whole
from lib.lineage import code_version, hardware, problems_trained_on, read_lineage, report_missing_history
from lib.plots import draw_bars
from lib.policy import check_checkpoint, load_config, load_generation_config
from lib.rewards import Reward, grade, make_grader
from lib.rollouts import sample_rollouts
from lib.scores import SampleFile, TokenizedSets, grader_sha256, paired_difference, sha256, summarise, tokenize_sets
from lib.verifier import Verifier


@dataclass
class Config(SamplerConfig):
    # main settings
    models: tuple[str, ...]  # checkpoints to evaluate: directories, or names on the hub
    labels: tuple[str, ...] = ()  # checkpoint names in the tables; by default their directories' names
    data: tuple[str, ...] = ("math500", "aime24", "aime25")  # data sets: names, files or owner/name:split
    k: int = 16  # responses sampled for each problem (App. F)
    # sampling
    temperature: float = 0.7  # sampling temperature; 0 is greedy decoding (authors' earlier code; not in this paper)
    top_p: float = 0.8  # sample from the most likely tokens with this total probability (authors' earlier code)
    top_k: int = 20  # sample from this many of the most likely tokens, -1 for all (authors' earlier code)
    max_prompt_tokens: int = 3072  # longest prompt (Table 8)
    max_response_tokens: int = 16384  # length at which a response is cut (Table 8)


# Settings that determine the samples, besides the weights, the rendered prompts and the end tokens.
DECODING = ("k", "temperature", "top_p", "top_k", "max_response_tokens", "cpu_bfloat16", "seed")


class Engines:
    """One engine for each architecture; checkpoints of the same architecture are loaded into it in turn.

    Loading a checkpoint is faster than creating an engine, and a vLLM engine cannot be shut down within a process.
    """

    # Entries of a checkpoint's config that may differ within one engine.
    OF_A_CHECKPOINT = ("_name_or_path", "transformers_version", "dtype", "eos_token_id", "bos_token_id", "pad_token_id")

    def __init__(self, cfg: Config, models: Iterable[str]):
        self.cfg = cfg
        self.made = {}  # architecture -> (engine, the checkpoint that is loaded in it)
        self.cache_gib = shared_cache_gib(cfg, list({self.architecture(model): model for model in models}.values()))

    def architecture(self, model: str) -> str:
        config = load_config(model).to_dict()
        return json.dumps({name: config[name] for name in config if name not in self.OF_A_CHECKPOINT}, sort_keys=True)

    def get(self, model: str, tokenizer: PreTrainedTokenizerBase):
        """An engine with the checkpoint's weights and end-of-sequence tokens."""
        architecture = self.architecture(model)
        engine, loaded = self.made.get(architecture, (None, None))
        if engine is None:
            engine = make_engine(self.cfg, model, tokenizer, sleeps=False, cache_gib=self.cache_gib)
        elif loaded != model:
            engine.load(model, tokenizer)
        self.made[architecture] = engine, model
        return engine


@dataclass
class Checkpoint:
    """One of --models, with its tokenizer and its prompts."""

    model: str
    label: str
    directory: Path  # inside --out, for its samples
    lineage: dict  # its run.json and the hash of its weights
    tokenizer: PreTrainedTokenizerBase
    sets: TokenizedSets  # the problems of each data set, and their prompts' token ids by problem id


def evaluate_checkpoint(
    checkpoint: Checkpoint, cfg: Config, grader: Verifier | Reward, engines: Engines
) -> dict[str, dict]:
    """Samples, grades and summarises one checkpoint on every data set; samples already on disk are reused.

    Sampling and grading are spread over ranks, rank 0 writes the files, and every rank gets the statistics. Collective.
    """
    report_missing_history(checkpoint.label, checkpoint.lineage)
    trained_on, weights = problems_trained_on(checkpoint.lineage), checkpoint.lineage["sha256"]
    tokenizer, report = checkpoint.tokenizer, {}
    for name, (problems, prompts) in checkpoint.sets.items():
        settings = {"sha256": weights} | {setting: getattr(cfg, setting) for setting in DECODING}
        settings["prompts"] = sha256([[problem.id, prompts[problem.id]] for problem in problems])
        settings["end_tokens"] = data.end_tokens(load_generation_config(checkpoint.model), tokenizer, cfg.stop)
        file = SampleFile(checkpoint.directory, name, settings, problems, cfg.k, grader_sha256(cfg, problems))
        file.grade_again(grader)
        if file.missing:
            engine = engines.get(checkpoint.model, tokenizer)
            sample_missing(file, engine, prompts, cfg, grader, f"{checkpoint.label} {name}")
        summary = common.on_rank_0(lambda: summarise(file.in_order(), cfg.k))
        seen = sum(problem.id in trained_on for problem in problems)
        report[name] = {**summary, "trained_on": seen, "sha256": weights, "samples": str(file.path)}
    return report


def sample_missing(
    file: SampleFile, engine, prompts: dict, cfg: Config, grader: Verifier | Reward, caption: str
) -> None:
    """Samples and grades the file's missing problems, in parts, so that an interruption loses at most one part."""
    sampling = Sampling(cfg.max_response_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    at_a_time = max(1, common.world_size() * cfg.max_num_seqs // cfg.k)
    done = len(prompts) - len(file.missing)
    with common.progress_bar(len(prompts), caption, "problem", initial=done) as bar:
        for start in range(0, len(file.missing), at_a_time):
            part = file.missing[start : start + at_a_time]
            rollouts = sample_rollouts(engine, part, prompts, cfg.k, sampling, seed_key=(cfg.seed, "evaluate"))
            grade(rollouts, grader)
            file.append(rollouts)
            bar.update(len(part))


def percent(average: float, error: float) -> str:
    return f"{100 * average:.1f}" if np.isnan(error) else f"{100 * average:.1f} ± {100 * error:.1f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TRAINED_ON = "†"  # marks a score on problems that the checkpoint or an ancestor was trained on


def report_tables(results: dict[str, dict[str, dict]], cfg: Config) -> str:
    """Markdown: the main table, the details, and the paired differences, for results[label][data set]."""
    labels, names = list(results), list(next(iter(results.values())))

    def score(label: str, name: str) -> str:
        result = results[label][name]
        return percent(result["avg"], result["se"]) + TRAINED_ON * bool(result["trained_on"])

    parts = [
        f"avg@{cfg.k} in %, ± standard error over problems. Temperature {cfg.temperature}, top-p {cfg.top_p}, top-k "
        f"{cfg.top_k}, at most {cfg.max_response_tokens} response tokens, seed {cfg.seed}."
        + (f" avg is the mean of --reward {cfg.reward}, times 100." if cfg.reward else ""),
        markdown_table(
            ["checkpoint", *(f"{name} ({results[labels[0]][name]['problems']})" for name in names)],
            [[label, *(score(label, name) for name in names)] for label in labels],
        ),
    ]
    for label, row in results.items():
        parts += [
            f"{TRAINED_ON} {label} was trained on {result['trained_on']} of the {result['problems']} problems of {name}: "
            "this is not a test score."
            for name, result in row.items()
            if result["trained_on"]
        ]
    columns = {"pass": f"pass@{cfg.k} %", "truncated": "truncated %", "verifier_failed": "verifier failed %"}
    parts += [
        "Details:",
        markdown_table(
            ["checkpoint", "data set", *columns.values(), "mean tokens"],
            [
                [label, name, *(f"{100 * result[key]:.1f}" for key in columns), f"{result['tokens']:.1f}"]
                for label, row in results.items() for name, result in row.items()
            ],
        ),
    ]  # fmt: skip
    failed = max(result["verifier_failed"] for row in results.values() for result in row.values())
    if failed > 0.01:
        parts.append(
            f"Warning: the verifier timed out or failed on up to {100 * failed:.1f} % of a checkpoint's responses, which "
            "count as wrong; look at the samples whose `how` is timeout or error."
        )
    for name in names if len(labels) > 1 else ():
        rows = []
        for i, label in enumerate(labels[1:], start=1):
            scores = [results[other][name]["scores"] for other in labels]
            cells = [percent(*paired_difference(scores[i], scores[j])) if j < i else "" for j in range(len(labels) - 1)]
            rows.append([label, *(("+" if cell and cell[0] != "-" else "") + cell for cell in cells)])
        parts += [
            f"Differences on {name}, row minus column, ± standard error of the paired difference over problems:",
            markdown_table(["", *labels[:-1]], rows),
        ]
    return "\n\n".join(parts) + "\n"


def prepare(cfg: Config) -> list[Checkpoint]:
    """Reads, renders and tokenises the problems for each checkpoint. Refuses wrong settings before any model loads."""
    common.check_settings(cfg, may_be_zero=("temperature",))
    if cfg.top_p > 1 or not (cfg.top_k >= 1 or cfg.top_k == -1):
        raise InputError(f"--top-p {cfg.top_p} must be at most 1, and --top-k {cfg.top_k} at least 1, or -1 for all")
    labels = cfg.labels or tuple(Path(os.path.abspath(model)).name for model in cfg.models)
    directories = [re.sub(r"[^\w.+-]+", "-", label).strip("-.") for label in labels]
    if len(labels) != len(cfg.models) or len({*directories} - {""}) < len(labels):
        raise InputError(
            f"--labels {list(labels)} must give each of the {len(cfg.models)} --models its own name, and the names "
            "must differ in letters or digits, because they become directory names"
        )
    check_engine(cfg)
    sets = data.load_sets(cfg.data, "--data", cfg.reward)
    checkpoints = []
    for model, label, directory in zip(cfg.models, labels, directories):
        tokenizer = data.load_tokenizer(model, "--models")
        data.stop_tokens(tokenizer, cfg.stop)
        check_checkpoint(model, data.vocab_size(tokenizer), packs=False)
        tokenized = tokenize_sets(sets, tokenizer, cfg, model)
        lineage = common.on_rank_0(lambda: read_lineage(model))
        checkpoints.append(Checkpoint(model, label, Path(cfg.out) / directory, lineage, tokenizer, tokenized))
    return checkpoints


def main(cfg: Config) -> None:
    checkpoints = prepare(cfg)
    engines = Engines(cfg, cfg.models)
    in_use = f"--out {cfg.out!r} is in use by another process; name another, or wait for it"
    with locked(Path(cfg.out), in_use), make_grader(cfg) as grader:
        results = {each.label: evaluate_checkpoint(each, cfg, grader, engines) for each in checkpoints}
        common.on_rank_0(lambda: write_report(results, checkpoints, cfg))


def write_report(results: dict[str, dict[str, dict]], checkpoints: list[Checkpoint], cfg: Config) -> None:
    """Writes table.md, bars.png and, last, results.json, which tells make that the report is complete."""
    out = Path(cfg.out)
    tables = report_tables(results, cfg)
    configs = {each.label: load_config(each.model).get_text_config() for each in checkpoints}
    sizes = {label: f"{c.num_hidden_layers} x {c.hidden_size} (layers x width)" for label, c in configs.items()}
    draw_bars(results, f"avg@{cfg.k} ± SE over problems (%)", out / "bars.png", sizes)
    settings = {**dataclasses.asdict(cfg), "code": code_version(), "hardware": hardware()}
    record = json.dumps({"settings": settings, "results": results}) + "\n"
    for name, text in (("table.md", tables), ("results.json", record)):
        with whole(out / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    print("\n" + tables)
    print(f"wrote {out}: table.md, bars.png, results.json and every sample")


if __name__ == "__main__":
    common.cli(main, Config)
