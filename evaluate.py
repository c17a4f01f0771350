"""Evaluation: avg@k ± standard error over problems (§6), pass@k, and paired differences between checkpoints.

    python evaluate.py --models runs/direct runs/bridge --data math500 aime24 aime25 --out runs/report

Each problem is answered k times under one decoding setting. Its score is its mean correctness; a data set's entry is the
mean score, ± the standard error over problems. Two checkpoints are compared problem by problem, so the standard error of
their difference is that of the paired differences, which is smaller than the two entries' would suggest.

Written to the output directory: every sample (<checkpoint>/<data set>.jsonl), results.json, table.md, bars.png, and
curves.png from the checkpoints' own metrics.jsonl. What is already there for the same weights and settings is reused.

Two more uses:
- `--responses FILE.jsonl --out DIR` grades responses made elsewhere, without any model: one object a line with `answer`
  and `response`; DIR/FILE.jsonl receives the same lines with `correct` added. It is how to audit the verifier.
- `--merge DIR DIR ... --out DIR` puts the reports of several seeds into one table, ± the standard error over seeds.

And two looks at where checkpoints come from, which need no --out:
- `--lineage DIR [--reports DIR ...]` prints a checkpoint's history as a tree, with its ancestors' scores from the reports;
- `--compare DIR DIR` prints every setting, parent and label set in which two checkpoints differ: what a contrast rests on.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import checkpoints
import common
import records
from common import InputError, Policy
from engines import Sampling, check_engine, make_engine, sample_rollouts
from verifier import Verifier


@dataclass
class Config:
    out: str | None = None  # directory for the report
    models: tuple[str, ...] = ()  # checkpoints to evaluate: directories, or names on the hub
    labels: tuple[str, ...] = ()  # their names in the tables; by default the directories'
    data: tuple[str, ...] = ("math500", "aime24", "aime25")  # data sets, in any form that the stages take
    k: int = 16  # samples per problem
    temperature: float = 0.6  # the paper gives no decoding setting; 0.6 and 0.95 are DeepSeek-R1's
    top_p: float = 0.95
    top_k: int = -1
    max_prompt_tokens: int = 3072  # Table 9
    max_response_tokens: int = 16384  # Table 9
    instruction: str = records.INSTRUCTION  # appended to each problem, as in training
    thinking: bool = False  # as in training
    max_sequences: int = 512  # sequences that a rank samples at a time; lower it when memory runs out
    engine: Literal["auto", "torch", "vllm"] = "auto"  # sampler; auto is vLLM where it and a GPU are present
    tensor_parallel: int = 1  # ranks that share one vLLM engine, for models that one GPU cannot sample from
    kv_cache_gib: float = 16.0  # vLLM's key/value cache on each GPU (on a CPU 0.25)
    seed: int = 0  # of the samples
    responses: str | None = None  # grade this file instead of sampling from models
    merge: tuple[str, ...] = ()  # reports to put into one table instead
    lineage: str | None = None  # print this checkpoint's history instead
    reports: tuple[str, ...] = ()  # reports to take the history's scores from
    compare: tuple[str, str] | None = None  # print how two checkpoints' runs differ instead


DECODING = ("k", "temperature", "top_p", "top_k", "max_prompt_tokens", "max_response_tokens", "instruction", "thinking",
            "seed")  # fmt: skip


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of (P,) values and its standard error; of a single value the error is not known (nan)."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


def summarise(samples: list[dict], k: int) -> dict:
    """Statistics of one data set from its P*k samples: rates in [0, 1], lengths in tokens, the scores by problem id."""
    ids = list(dict.fromkeys(sample["id"] for sample in samples))
    row = {problem_id: index for index, problem_id in enumerate(ids)}
    correct = np.zeros((len(ids), k))  # (P, k)
    for sample in samples:
        correct[row[sample["id"]], sample["sample"]] = sample["correct"]
    average, error = mean_and_error(correct.mean(axis=1))
    return {
        "problems": len(ids),
        "avg": average,
        "se": error,
        "pass": float(correct.any(axis=1).mean()),
        "truncated": float(np.mean([sample["finish_reason"] == "length" for sample in samples])),
        "tokens": float(np.mean([sample["tokens"] for sample in samples])),
        "scores": dict(zip(ids, correct.mean(axis=1).tolist())),
    }


def paired_difference(first: dict[str, float], second: dict[str, float]) -> tuple[float, float]:
    """Mean of first - second over the problems (scores by problem id), and the standard error of that mean."""
    if first.keys() != second.keys():
        raise InputError(
            "two checkpoints were evaluated on different problems and cannot be compared; evaluate both anew"
        )
    return mean_and_error(np.array([first[problem_id] - second[problem_id] for problem_id in first]))


class Engines:
    """One engine for each architecture; checkpoints that share it are put into it in turn.

    Loading the next checkpoint is quicker than making an engine, and vLLM's cannot be taken down within a process.
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.made = {}  # architecture -> engine, and the checkpoint in it

    def get(self, model: str, tokenizer):
        config = common.load_config(model).to_dict()
        architecture = {key: value for key, value in config.items() if key not in ("transformers_version", "dtype")}
        key = json.dumps([architecture, records.stop_token_ids(model, tokenizer)], sort_keys=True)
        engine, present = self.made.get(key, (None, None))
        if engine is None:
            engine = make_engine(self.cfg, model, tokenizer, sleeps=False)
        elif present != model:
            engine.sync(Policy(common.load_causal_lm(model, engine.dtype, common.this_device())))
        self.made[key] = engine, model
        return engine


def evaluate_model(
    model: str, label: str, cfg: Config, datasets: dict[str, list], verifier: Verifier, engines: Engines
) -> dict:
    """Samples, grades and summarises one checkpoint on every data set; samples already on disk are taken from there.

    Sampling and grading are spread over ranks; files are rank 0's, and so is what is returned."""
    lineage = common.on_rank_0(lambda: checkpoints.read_lineage(model))
    trained_on = checkpoints.consumed_problems(lineage)
    settings = {"sha256": lineage["sha256"], **{name: getattr(cfg, name) for name in DECODING}}
    directory = Path(cfg.out) / label
    tokenizer, report = records.load_tokenizer(model), {}
    for name, problems in datasets.items():
        seen = sum(problem.id in trained_on for problem in problems)
        if seen:
            common.say(
                f"{label}: {seen} of {len(problems)} problems of {name} were trained on; its score there is no test score"
            )
        path = directory / f"{name}.jsonl"
        if not common.on_rank_0(lambda: _has_samples(path, settings, len(problems) * cfg.k)):
            prompts = records.tokenize_prompts(
                tokenizer, problems, cfg.instruction, cfg.thinking, cfg.max_prompt_tokens
            )
            sampling = Sampling(cfg.max_response_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
            rollouts = sample_rollouts(
                engines.get(model, tokenizer),
                tokenizer,
                problems,
                prompts,
                cfg.k,
                sampling,
                (cfg.seed, "evaluate"),
                progress=f"{label} {name}",
            )
            records.grade(rollouts, verifier)
            common.on_rank_0(lambda: _write_samples(path, settings, rollouts))
        if common.rank() == 0:
            samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
            report[name] = {**summarise(samples, cfg.k), "trained_on": seen, "sha256": lineage["sha256"]}
    return report


def _write_samples(path: Path, settings: dict, rollouts: list[records.Rollout]) -> None:
    lines = [json.dumps({"settings": settings}), *(json.dumps(as_sample(rollout)) for rollout in rollouts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    unfinished.rename(path)


def as_sample(rollout: records.Rollout) -> dict:
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


def draw_bars(averages: dict[str, dict[str, tuple[float, float]]], title: str, picture: Path) -> None:
    """Horizontal bars of averages[label][data set] = (mean, error), in %."""
    labels, names = list(averages), list(next(iter(averages.values())))
    figure = Figure(figsize=(2 + 4 * len(names), 0.8 + 0.42 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names):
        means, errors = zip(*(averages[label][name] for label in labels))
        values = [100 * mean for mean in means]
        axis.barh(
            range(len(labels)), values, xerr=[100 * e for e in errors], color="#4878a8", ecolor="#303030", capsize=2
        )
        for index, (value, error) in enumerate(zip(values, errors)):
            axis.text(value + 100 * np.nan_to_num(error) + 1, index, f"{value:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(labels)), labels if axis is axes[0][0] else [""] * len(labels), fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, 108)
        axis.set_xlabel(f"{name}: {title}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)


def draw_curves(models: dict[str, str], picture: Path) -> None:
    """Learning curves of the checkpoints that have a metrics.jsonl: accuracy of training rollouts, and KL to a teacher."""
    panels = {"accuracy of training rollouts": ("reward", "accuracy"), "KL to the teacher (nats/token)": ("forward_kl", "reverse_kl")}  # fmt: skip
    curves: dict[str, list] = {title: [] for title in panels}
    for label, model in models.items():
        path = Path(model) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for title, names in panels.items():
            for name in names:
                if lines and name in lines[0]:
                    curves[title].append((f"{label}: {name.replace('_', ' ')}", [line[name] for line in lines]))
    curves = {title: lines for title, lines in curves.items() if lines}
    if not curves:
        return
    figure = Figure(figsize=(5.2 * len(curves), 3.6), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)
    for axis, (title, lines) in zip(axes[0], curves.items()):
        for label, values in lines:
            axis.plot(values, label=label, linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)


def grade_file(cfg: Config) -> None:
    """Grades `cfg.responses`; see the module's docstring."""
    source, target = Path(cfg.responses), Path(cfg.out) / Path(cfg.responses).name
    if not source.is_file():
        raise InputError(f"--responses {cfg.responses!r} is not a file; give a .jsonl file of answers and responses")
    if target.exists() and target.samefile(source):
        raise InputError(f"--out {cfg.out!r} is the directory of --responses itself; name another")
    rows = []
    for number, line in enumerate(source.read_bytes().splitlines(), start=1):  # of bytes: text has more line ends
        try:
            row = json.loads(line)
            answer, response = row["answer"], row["response"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"line {number} of {cfg.responses!r} is not an object with answer and response; mend it"
            ) from None
        if not isinstance(answer, str) or not isinstance(response, str) or not answer.strip():
            raise InputError(
                f"line {number} of {cfg.responses!r}: answer and response must be text, the answer not empty; mend it"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"--responses {cfg.responses!r} is empty; give a line for each response")
    checkpoints.check_writable(cfg.out)
    with Verifier() as verifier, tqdm(total=len(rows), desc="grading", unit="response") as bar:
        for start in range(0, len(rows), 256):
            chunk = rows[start : start + 256]
            verdicts = verifier.check([row["response"] for row in chunk], [row["answer"] for row in chunk])
            for row, verdict in zip(chunk, verdicts):
                row["correct"] = verdict.correct
            bar.update(len(chunk))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    total = sum(row["correct"] for row in rows)
    print(f"{total} of {len(rows)} correct ({100 * total / len(rows):.1f} %); wrote {target}")


def read_report(directory: str, argument: str) -> dict:
    """A report's results.json. InputError, naming the argument, if there is none, or not of one evaluation."""
    path = Path(directory) / "results.json"
    if not path.is_file():
        raise InputError(f"{argument} {directory!r} holds no results.json; evaluate into it first")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        whole = all({"avg", "se"} <= result.keys() for row in report["results"].values() for result in row.values())
        if whole and report["results"] and isinstance(report["settings"], dict):
            return report
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{argument} {directory!r}: its results.json is not a report of one evaluation; evaluate it anew")


def merge_reports(cfg: Config) -> None:
    """One table of several seeds' reports: each seed's avg@k, their mean, ± its standard error over seeds."""
    reports, shapes = {}, []
    for directory in cfg.merge:
        report = reports[directory] = read_report(directory, "--merge")
        rows = {label: sorted(row) for label, row in report["results"].items()}
        shapes.append((rows, {name: report["settings"].get(name) for name in DECODING if name != "seed"}))
    for directory, (rows, settings) in zip(cfg.merge, shapes):
        if rows != shapes[0][0] or settings != shapes[0][1]:
            what = "checkpoints and data sets" if rows != shapes[0][0] else "settings"
            raise InputError(
                f"--merge: {directory!r} and {cfg.merge[0]!r} do not have the same {what}; evaluate them alike"
            )
    checkpoints.check_writable(cfg.out)
    results = [report["results"] for report in reports.values()]
    labels, names = list(results[0]), list(next(iter(results[0].values())))
    averages = {
        label: {name: mean_and_error(np.array([result[label][name]["avg"] for result in results])) for name in names}
        for label in labels
    }
    parts = []
    for name in names:
        rows = [
            [
                label,
                percent(*averages[label][name]),
                *(percent(r[label][name]["avg"], r[label][name]["se"]) for r in results),
            ]
            for label in labels
        ]
        header = ["checkpoint", "mean ± SE over seeds", *(Path(directory).parent.name for directory in cfg.merge)]
        parts += [f"{name}, avg@{reports[cfg.merge[0]]['settings']['k']} in %:", markdown_table(header, rows)]
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    summary = {label: {name: {"mean": a[0], "se_over_seeds": a[1]} for name, a in row.items()} for label, row in averages.items()}  # fmt: skip
    (out / "results.json").write_text(json.dumps({"reports": list(cfg.merge), "averages": summary}, indent=1) + "\n")
    draw_bars(averages, f"avg, mean of {len(results)} seeds ± SE (%)", out / "bars.png")
    print("\n\n".join(parts))


def print_lineage(cfg: Config) -> None:
    scores: dict[str, str] = {}
    for directory in cfg.reports:
        for row in read_report(directory, "--reports")["results"].values():
            for name, result in row.items():
                score = f"{name} {percent(result['avg'], result['se'])} %"
                scores[result["sha256"]] = ", ".join(filter(None, [scores.get(result["sha256"]), score]))
    print("\n".join(checkpoints.history(checkpoints.read_lineage(cfg.lineage), scores)))


def print_differences(cfg: Config) -> None:
    first, second = map(checkpoints.read_lineage, cfg.compare)
    rows = [[name, *map(str, pair)] for name, pair in checkpoints.differences(first, second).items()]
    print(markdown_table(["", *cfg.compare], rows) if rows else "The two runs do not differ.")


def main(cfg: Config) -> None:
    if cfg.lineage:
        return common.on_rank_0(lambda: print_lineage(cfg))
    if cfg.compare:
        return common.on_rank_0(lambda: print_differences(cfg))
    if cfg.out is None:
        raise InputError("--out is missing; name the directory for the report")
    if cfg.responses:
        return common.on_rank_0(lambda: grade_file(cfg))
    if cfg.merge:
        return common.on_rank_0(lambda: merge_reports(cfg))
    if not cfg.models:
        raise InputError("nothing to evaluate: give --models, or --responses to grade, or --merge reports")
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
    datasets = {Path(source).stem: records.load_problems(source) for source in cfg.data}
    if len(datasets) < len(cfg.data):
        raise InputError(f"--data {list(cfg.data)}: two sets have one name, and the report needs two; rename a file")
    models = dict(zip(labels, cfg.models))
    for model in cfg.models:  # all that can be known before anything is sampled
        tokenizer = records.load_tokenizer(model, "--models")
        common.check_checkpoint(model, len(tokenizer), packs=False)
        check_engine(cfg, model)
        for problems in datasets.values():
            records.tokenize_prompts(tokenizer, problems, cfg.instruction, cfg.thinking, cfg.max_prompt_tokens)
        common.on_rank_0(lambda: checkpoints.read_run(model))
    checkpoints.check_writable(cfg.out)
    with Verifier() as verifier:
        engines = Engines(cfg)
        results = {
            label: evaluate_model(model, label, cfg, datasets, verifier, engines) for label, model in models.items()
        }
    common.on_rank_0(lambda: write_report(results, models, cfg))


def write_report(results: dict[str, dict[str, dict]], models: dict[str, str], cfg: Config) -> None:
    """results.json, table.md, bars.png and curves.png."""
    out = Path(cfg.out)
    settings = {**dataclasses.asdict(cfg), "code": checkpoints.code_version(), "hardware": checkpoints.hardware()}
    (out / "results.json").write_text(json.dumps({"settings": settings, "results": results}) + "\n", encoding="utf-8")
    tables = report_tables(results, cfg)
    (out / "table.md").write_text(tables, encoding="utf-8")
    averages = {
        label: {name: (result["avg"], result["se"]) for name, result in row.items()} for label, row in results.items()
    }
    draw_bars(averages, f"avg@{cfg.k} ± SE over problems (%)", out / "bars.png")
    draw_curves(models, out / "curves.png")
    print("\n" + tables)
    print(f"wrote {out}: table.md, bars.png, curves.png, results.json and every sample")


if __name__ == "__main__":
    common.cli(main, Config)
