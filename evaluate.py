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
Samples that are there already, of the same weights and settings, are used again.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

import common
from common import InputError, Rollout, SamplerConfig
from lib import data, runs
from lib.engines import Sampling, check_engine, make_engine
from lib.plots import draw_bars
from lib.policy import check_checkpoint, load_config
from lib.rollouts import grade, sample_rollouts
from lib.scores import paired_difference, summarise
from lib.stopping import Stopping
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
DECODING = ("k", "temperature", "top_p", "top_k", "max_prompt_tokens", "max_response_tokens", "instruction",
            "system_prompt", "thinking", "reward", "seed")  # fmt: skip


class Engines:
    """One engine for each architecture; checkpoints that share one are loaded into it in turn.

    Loading the next checkpoint is quicker than making an engine, and vLLM's cannot be taken down within a process.
    """

    # Entries of a checkpoint's config that may differ within one engine.
    OF_A_CHECKPOINT = ("_name_or_path", "transformers_version", "dtype", "eos_token_id", "bos_token_id", "pad_token_id")

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.made = {}  # architecture -> (engine, the checkpoint that is loaded in it)
        self.alone = len(set(map(self.architecture, cfg.models))) == 1  # no second engine will need the GPU

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
    model: str, label: str, cfg: Config, datasets: dict[str, list], verifier: Verifier, engines: Engines
) -> dict:
    """Samples, grades and summarises one checkpoint on every data set, unless its samples are already on disk.

    Sampling and grading are spread over ranks. Rank 0 writes the files, and only there the returned report is filled.
    """
    lineage = common.on_rank_0(lambda: runs.read_lineage(model))
    trained_on = runs.consumed_problems(lineage)
    settings = {"sha256": lineage["sha256"], **{name: getattr(cfg, name) for name in DECODING}}
    directory = Path(cfg.out) / label
    tokenizer, report = data.load_tokenizer(model), {}
    for name, problems in datasets.items():
        seen = sum(problem.id in trained_on for problem in problems)
        if seen:
            common.print0(
                f"{label}: {seen} of {len(problems)} problems of {name} were trained on; its score there is no test score"
            )
        path = directory / f"{name}.jsonl"
        if not common.on_rank_0(lambda: _has_samples(path, settings, len(problems) * cfg.k)):
            prompts = data.tokenize_prompts(tokenizer, problems, cfg.instruction, cfg.thinking, cfg.max_prompt_tokens)
            sampling = Sampling(cfg.max_response_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
            rollouts = sample_rollouts(
                engines.get(model, tokenizer), problems, prompts, cfg.k, sampling, seed_key=(cfg.seed, "evaluate"),
                progress=f"{label} {name}",
            )  # fmt: skip
            grade(rollouts, verifier)
            common.on_rank_0(lambda: _write_samples(path, settings, rollouts))
        if common.rank() == 0:
            samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
            report[name] = {**summarise(samples, cfg.k), "trained_on": seen, "sha256": lineage["sha256"]}
    return report


def _write_samples(path: Path, settings: dict, rollouts: list[Rollout]) -> None:
    lines = [json.dumps({"settings": settings}), *(json.dumps(as_sample(rollout)) for rollout in rollouts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    unfinished.rename(path)


def as_sample(rollout: Rollout) -> dict:
    return {
        "id": rollout.problem.id,
        "sample": rollout.sample,
        "prompt": rollout.problem.prompt,
        "answer": rollout.problem.answer,
        "response": rollout.text,
        "correct": rollout.correct,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.response_ids),
    }


def _has_samples(path: Path, settings: dict, count: int) -> bool:
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as lines:
        return json.loads(next(lines)).get("settings") == settings and sum(1 for _ in lines) == count


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
        f"{cfg.top_k}, at most {cfg.max_response_tokens} response tokens, seed {cfg.seed}.",
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


def main(cfg: Config) -> None:
    if not cfg.models:
        raise InputError("there is nothing to evaluate; name checkpoints with --models")
    common.check_settings(cfg, may_be_zero=("temperature",))
    labels = cfg.labels or tuple(Path(model).name for model in cfg.models)
    if len(set(labels)) != len(cfg.models) or len(labels) != len(cfg.models):
        raise InputError(
            f"--labels {list(labels)} must be one different name for each of the {len(cfg.models)} --models"
        )
    if cfg.top_p > 1:
        raise InputError(f"--top-p {cfg.top_p} is more than all of the distribution; give 1 or less")
    if cfg.top_k < 1 and cfg.top_k != -1:
        raise InputError(f"--top-k {cfg.top_k} keeps no token; give 1 or more, or -1 for all")
    datasets = {Path(source).stem: data.load_problems(source) for source in cfg.data}
    if len(datasets) < len(cfg.data):
        raise InputError(f"--data {list(cfg.data)}: two sets have one name, and the report needs two; rename a file")
    models = dict(zip(labels, cfg.models))
    for model in cfg.models:  # whatever can be known to be wrong is said before anything is sampled
        tokenizer = data.load_tokenizer(model, "--models")
        check_checkpoint(model, len(tokenizer), packs=False)
        check_engine(cfg, model)
        for problems in datasets.values():
            data.tokenize_prompts(tokenizer, problems, cfg.instruction, cfg.thinking, cfg.max_prompt_tokens)
        common.on_rank_0(lambda: runs.read_run(model))
    runs.check_writable(cfg.out)

    with Stopping(f"the same command goes on from what {cfg.out} holds"), Verifier() as verifier:
        engines = Engines(cfg)
        results = {
            label: evaluate_model(model, label, cfg, datasets, verifier, engines) for label, model in models.items()
        }
    common.on_rank_0(lambda: write_report(results, cfg))


def write_report(results: dict[str, dict[str, dict]], cfg: Config) -> None:
    """results.json, table.md and bars.png."""
    out = Path(cfg.out)
    settings = {**dataclasses.asdict(cfg), "code": runs.code_version(), "hardware": runs.hardware()}
    (out / "results.json").write_text(json.dumps({"settings": settings, "results": results}) + "\n", encoding="utf-8")
    tables = report_tables(results, cfg)
    (out / "table.md").write_text(tables, encoding="utf-8")
    averages = {
        label: {name: (result["avg"], result["se"]) for name, result in row.items()} for label, row in results.items()
    }
    draw_bars(averages, f"avg@{cfg.k} ± SE over problems (%)", out / "bars.png")
    print("\n" + tables)
    print(f"wrote {out}: table.md, bars.png, results.json and every sample")


if __name__ == "__main__":
    common.cli(main, Config)
