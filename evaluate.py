"""Evaluation: avg@k ± standard error over problems (App. F), pass@k, and paired differences between checkpoints.

    python evaluate.py --models runs/direct runs/bridge --data math500 aime24 aime25 --out runs/report

Each problem is answered k times under one decoding setting. A problem's score is the mean correctness of its k answers,
and a data set's entry is the mean score, ± the standard error over problems. Two checkpoints are compared problem by
problem: the standard error of their difference is that of the paired differences, which is smaller than the two entries
suggest.

The paper says that its ± is over problems, too. For AIME it cannot be: with 30 problems and 16 samples such an error is
expected to be at least sqrt(p (1 - p) / 480), 1.8 points at 19.8 % where the paper prints 1.4.

The paper does not state its decoding. The defaults are those of the authors' code for their earlier papers: temperature
0.7, top-p 0.8, top-k 20, without thinking.

Written to the output directory: every sample (<checkpoint>/<data set>.jsonl), results.json, table.md and bars.png.
Samples that are there already, of the same weights, prompts and settings, are used again, so an evaluation that was
killed goes on when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

import common
from common import InputError, Problem, SamplerConfig
from lib import data
from lib.engines import Sampling, check_engine, check_lengths, make_engine
from lib.files import check_writable, write_whole
from lib.lineage import code_version, consumed_problems, hardware, read_lineage, read_run
from lib.plots import draw_bars
from lib.policy import check_checkpoint, load_config
from lib.rewards import Reward, make_grader
from lib.rollouts import grade, sample_rollouts
from lib.samples import SampleFile, grading_key, prompts_key, sample_directories
from lib.scores import check_decoding, paired_difference, summarise
from lib.verifier import Verifier


@dataclass
class Config(SamplerConfig):
    models: tuple[str, ...]  # checkpoints to evaluate: directories, or names on the hub
    labels: tuple[str, ...] = ()  # names of the checkpoints in the tables; by default those of their directories
    data: tuple[str, ...] = ("math500", "aime24", "aime25")  # data sets: names, files or owner/name:split
    k: int = 16  # responses sampled for each problem (App. F)
    temperature: float = 0.7  # sampling temperature; 0 is greedy decoding (authors' earlier code; not in this paper)
    top_p: float = 0.8  # sample from the likeliest tokens that hold this much probability (authors' earlier code)
    top_k: int = 20  # sample from this many likeliest tokens, -1 for all (authors' earlier code)
    max_prompt_tokens: int = 3072  # longest prompt (Table 8)
    max_response_tokens: int = 16384  # length at which a response is cut (Table 8)


# The settings that decide what is sampled: samples that were made with others are not used again.
DECODING = ("k", "temperature", "top_p", "top_k", "max_prompt_tokens", "max_response_tokens", "prefix", "instruction",
            "system_prompt", "chat_template", "stop", "thinking", "cpu_bfloat16", "seed")  # fmt: skip


class Engines:
    """One engine for each architecture; checkpoints that share one are loaded into it in turn.

    Loading the next checkpoint is quicker than making an engine, and vLLM's cannot be taken down within a process.
    """

    # Entries of a checkpoint's config that may differ within one engine.
    OF_A_CHECKPOINT = ("_name_or_path", "transformers_version", "dtype", "eos_token_id", "bos_token_id", "pad_token_id")

    def __init__(self, cfg: Config, models: Iterable[str]):
        self.cfg = cfg
        self.made = {}  # architecture -> (engine, the checkpoint that is loaded in it)
        self.alone = len(set(map(self.architecture, models))) == 1  # no second engine will need the GPU

    def architecture(self, model: str) -> str:
        config = load_config(model).to_dict()
        return json.dumps({name: config[name] for name in config if name not in self.OF_A_CHECKPOINT}, sort_keys=True)

    def get(self, model: str, tokenizer: PreTrainedTokenizerBase):
        """An engine with the checkpoint's weights and end-of-sequence tokens."""
        architecture = self.architecture(model)
        engine, loaded = self.made.get(architecture, (None, None))
        if engine is None:
            engine = make_engine(self.cfg, model, tokenizer, sleeps=False, alone=self.alone)
        elif loaded != model:
            engine.load(model, tokenizer)
        self.made[architecture] = engine, model
        return engine


def evaluate_model(
    model: str,
    label: str,
    cfg: Config,
    datasets: dict[str, list[Problem]],
    verifier: Verifier | Reward,
    engines: Engines,
) -> dict:
    """Samples, grades and summarises one checkpoint on every data set; what is already on disk is not sampled again.

    Sampling and grading are spread over ranks, rank 0 writes the files, and every rank gets the statistics. Collective.
    """
    lineage = common.on_rank_0(lambda: read_lineage(model))
    trained_on = consumed_problems(lineage)
    directory = sample_directories(cfg.out, [label])[label]
    tokenizer, report = data.load_tokenizer(model), {}
    for name, problems in datasets.items():
        seen = sum(problem.id in trained_on for problem in problems)
        if seen:
            common.print0(
                f"{label}: {seen} of {len(problems)} problems of {name} were trained on; its score there is no test score"
            )
        prompts = data.tokenize_prompts(tokenizer, problems, cfg)
        settings = {"sha256": lineage["sha256"], "prompts": prompts_key(problems, prompts)}
        settings |= {setting: getattr(cfg, setting) for setting in DECODING}
        file = SampleFile(directory / f"{name}.jsonl", settings, grading_key(problems, cfg.reward), problems, cfg.k)
        file.grade_again(verifier)
        if file.missing:
            sample_missing(file, engines.get(model, tokenizer), prompts, cfg, verifier, f"{label} {name}")
        samples = file.finish()
        summary = common.on_rank_0(lambda: summarise(samples, cfg.k))
        report[name] = {**summary, "trained_on": seen, "sha256": lineage["sha256"]}
    return report


def sample_missing(file: SampleFile, engine, prompts: dict, cfg: Config, verifier: Verifier, caption: str) -> None:
    """Samples and grades what is missing from the file, in parts, so that an interruption loses at most one of them."""
    sampling = Sampling(cfg.max_response_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    at_a_time = max(1, common.world_size() * cfg.max_sequences // cfg.k)
    done = len(prompts) - len(file.missing)
    with common.progress_bar(len(prompts), caption, "problem", initial=done) as bar:
        for start in range(0, len(file.missing), at_a_time):
            part = file.missing[start : start + at_a_time]
            rollouts = sample_rollouts(engine, part, prompts, cfg.k, sampling, seed_key=(cfg.seed, "evaluate"))
            grade(rollouts, verifier)
            file.append(rollouts)
            bar.update(len(part))


def percent(average: float, error: float) -> str:
    return f"{100 * average:.1f}" if np.isnan(error) else f"{100 * average:.1f} ± {100 * error:.1f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report_tables(results: dict[str, dict[str, dict]], cfg: Config) -> str:
    """Markdown: the main table, the details, and the paired differences, for results[label][data set]."""
    labels, names = list(results), list(next(iter(results.values())))
    main_rows = [
        [label, *(percent(results[label][n]["avg"], results[label][n]["se"]) for n in names)] for label in labels
    ]
    parts = [
        f"avg@{cfg.k} in %, ± standard error over problems. Temperature {cfg.temperature}, top-p {cfg.top_p}, top-k "
        f"{cfg.top_k}, at most {cfg.max_response_tokens} response tokens, seed {cfg.seed}."
        + (f" avg is the mean of --reward {cfg.reward}, times 100." if cfg.reward else ""),
        markdown_table(["checkpoint", *(f"{name} ({results[labels[0]][name]['problems']})" for name in names)], main_rows),
        "Details:",
        markdown_table(
            ["checkpoint", "data set", f"pass@{cfg.k} %", "truncated %", "mean tokens"],
            [
                [label, name, *(f"{100 * results[label][name][key]:.1f}" for key in ("pass", "truncated")),
                 f"{results[label][name]['tokens']:.1f}"]
                for label in labels for name in names
            ],
        ),
    ]  # fmt: skip
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


def prepare(cfg: Config) -> tuple[dict[str, str], dict[str, list[Problem]]]:
    """The checkpoints by label and the problems by data set, once whatever can be known to be wrong has been refused."""
    if not cfg.models:
        raise InputError("there is nothing to evaluate; name checkpoints with --models")
    common.check_settings(cfg, may_be_zero=("temperature",))
    labels = cfg.labels or tuple(Path(os.path.abspath(model)).name for model in cfg.models)
    if len(set(labels)) != len(cfg.models) or len(labels) != len(cfg.models):
        raise InputError(
            f"--labels {list(labels)} must be one different name for each of the {len(cfg.models)} --models"
        )
    sample_directories(cfg.out, labels)
    check_decoding(cfg.top_p, cfg.top_k)
    datasets = {Path(source).stem: data.load_problems(source) for source in cfg.data}
    if len(datasets) < len(cfg.data):
        raise InputError(f"--data {list(cfg.data)}: two sets have one name, and the report needs two; rename a file")
    for model in cfg.models:
        tokenizer = data.load_tokenizer(model, "--models")
        data.stop_tokens(tokenizer, cfg.stop)
        check_checkpoint(model, len(tokenizer), packs=False)
        check_engine(cfg, model)
        for problems in datasets.values():
            check_lengths(cfg, model, data.tokenize_prompts(tokenizer, problems, cfg).values())
        common.on_rank_0(lambda: read_run(model))
    check_writable(cfg.out)
    return dict(zip(labels, cfg.models)), datasets


def main(cfg: Config) -> None:
    models, datasets = prepare(cfg)
    engines, results = Engines(cfg, models.values()), {}
    with make_grader(cfg) as verifier:
        for label, model in models.items():
            results[label] = evaluate_model(model, label, cfg, datasets, verifier, engines)
    common.on_rank_0(lambda: write_report(results, models, cfg))


def write_report(results: dict[str, dict[str, dict]], models: dict[str, str], cfg: Config) -> None:
    """table.md, bars.png and, last because make takes it for the whole report, results.json."""
    out = Path(cfg.out)
    tables = report_tables(results, cfg)
    write_whole(out / "table.md", tables)
    averages = {
        label: {name: (result["avg"], result["se"]) for name, result in row.items()} for label, row in results.items()
    }
    configs = {label: load_config(model).get_text_config() for label, model in models.items()}
    sizes = {label: f"{c.num_hidden_layers} x {c.hidden_size} (layers x width)" for label, c in configs.items()}
    drawn = draw_bars(averages, f"avg@{cfg.k} ± SE over problems (%)", out / "bars.png", sizes)
    settings = {**dataclasses.asdict(cfg), "code": code_version(), "hardware": hardware()}
    write_whole(out / "results.json", json.dumps({"settings": settings, "results": results}) + "\n")
    print("\n" + tables)
    print(f"wrote {out}: table.md, {'bars.png, ' if drawn else ''}results.json and every sample")


if __name__ == "__main__":
    common.cli(main, Config)
