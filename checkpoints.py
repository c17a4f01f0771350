"""What a stage leaves behind. A checkpoint is a Hugging Face directory plus `run.json`, which carries the settings and the
lineage: which checkpoints it came from, and which labelled problems it has consumed on the way."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import AutoConfig, PreTrainedTokenizerBase

from common import InputError, Policy, on_rank_0, progress_bar, rank, save_pretrained, say, world_size
from records import Problem

# In one process the checkpoint library says at every call that it takes it to be one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def read_lineage(model: str) -> dict:
    """What is known of a checkpoint: its `run.json` if a stage wrote it, and always its path and a content hash."""
    directory = Path(model)
    if not directory.is_dir():
        return {"path": model, "sha256": getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)}
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise InputError(f"model {model!r} holds no .safetensors weights; only safetensors are loaded")
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    run = {}
    if (directory / "run.json").is_file():
        try:
            run = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{directory / 'run.json'} is not JSON ({error}); the checkpoint's history is lost"
            ) from None
    return {**run, "path": model, "sha256": digest.hexdigest()}


def consumed_problems(lineage: dict) -> set[str]:
    """Ids of every labelled problem that a checkpoint's weights have been trained on, through all its ancestors."""
    return set(lineage.get("consumed", ())).union(*(map(consumed_problems, lineage.get("parents", {}).values())))


def rewarded(lineage: dict) -> dict | None:
    """The checkpoint or its nearest ancestor that was trained on the sparse reward (condition C1 of a teacher)."""
    if "reward" in lineage.get("first", {}):
        return lineage
    return next(filter(None, map(rewarded, lineage.get("parents", {}).values())), None)


def history(lineage: dict, scores: dict[str, str], role: str = "", indent: str = "") -> list[str]:
    """A checkpoint's lineage as a tree, a line each: path, stage, labels, what its first and last step measured, scores.

    `scores` are texts by content hash of the weights. A checkpoint that no stage wrote has no more than a path.
    """
    line = f"{role}{lineage['path']}"
    if "stage" in lineage:
        cfg = lineage["config"]
        line += f"  [{lineage['stage']}, {cfg['half']}, {len(lineage['consumed'])} labels, {lineage['steps']} steps"
        for name in MEASURES:
            if name in lineage.get("first", {}):
                line += f", {name} {lineage['first'][name]:.3g} -> {lineage['last'][name]:.3g}"
        line += "]"
    line += f"  {scores.get(lineage['sha256'], '')}"
    lines = [line.rstrip()]
    parents = list(lineage.get("parents", {}).items())
    for number, (name, parent) in enumerate(parents):
        last = number == len(parents) - 1
        below = history(parent, scores, f"{name}: ")
        lines += [indent + ("└─ " if last else "├─ ") + below[0]]
        lines += [indent + ("   " if last else "│  ") + text for text in below[1:]]
    return lines


MEASURES = (
    "reward",
    "forward_kl",
    "cross_entropy",
    "reverse_kl",
    "accuracy",
)  # of training rollouts, worth a look back


def differences(first: dict, second: dict) -> dict[str, tuple]:
    """Every difference between two lineages that could explain one between their results: settings, parents, code.

    Names of settings are as in a Config; the name of the output directory is no difference. Labels are compared by their
    number and as sets: half 1H and 2H differ in `half` and in `labels`.
    """
    facts = []
    for lineage in (first, second):
        settings = {k: v for k, v in lineage.get("config", {}).items() if k not in ("out", "resume")}
        parents = {f"{role} weights": parent["sha256"] for role, parent in lineage.get("parents", {}).items()}
        labels = sorted(lineage.get("consumed", ()))
        facts.append({
            **settings, **parents, "stage": lineage.get("stage"), "steps": lineage.get("steps"),
            "labels": f"{len(labels)} (sha256 {hashlib.sha256(' '.join(labels).encode()).hexdigest()[:8]})",
            "code": lineage.get("code"), **lineage.get("packages", {}), "ranks": lineage.get("ranks"),
        })  # fmt: skip
    names = dict.fromkeys([*facts[0], *facts[1]])
    pairs = {name: (facts[0].get(name), facts[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def code_version() -> str:
    """The commit of this code, with "-dirty" if it was changed since, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# Run directories


class Run:
    """The output directory of a stage, and its diary.

    While the stage runs everything is written to OUT.partial: `metrics.jsonl` (one line a step) and every
    `save_every` steps the training state from which `--resume` goes on. Only a complete checkpoint is renamed to OUT.
    So a directory called OUT is always whole, whenever and however the process dies, and `make` can depend on it.

    cfg is a stage's Config; of its fields `out`, `seed`, `resume` and `save_every` are read here, and all are recorded.
    `parents` maps roles ("model", "teacher") to checkpoints, whose lineage is copied into `run.json`.

    Raises InputError when OUT exists, is in use by another run, or holds an interrupted run of other settings.
    """

    def __init__(self, cfg, parents: dict[str, str]):
        self.out, self.partial = Path(cfg.out), Path(f"{cfg.out}.partial")
        self.save_every = cfg.save_every
        # Files are rank 0's; the others learn what it found.
        self.record, self.state, self.start_step = on_rank_0(lambda: self._open(cfg, parents))
        self._began = time.monotonic()
        self._phases: dict[str, float] = defaultdict(float)
        self._bar = None

    def _open(self, cfg, parents: dict[str, str]) -> tuple[dict, Path | None, int]:
        """Takes the directory; returns this run's record, the training state to continue from, and its step."""
        record = {
            "stage": Path(sys.modules[type(cfg).__module__].__file__).stem,
            "config": dataclasses.asdict(cfg),
            "parents": {role: read_lineage(model) for role, model in parents.items()},
            "consumed": [],
            "code": code_version(),
            "packages": {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "math-verify")},
            "hardware": hardware(),
            "ranks": world_size(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
        }
        if self.out.exists():
            raise InputError(f"--out {cfg.out!r} already exists; name another, or delete it")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self.partial / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out {cfg.out!r} is being written by another run; name another, or stop that one"
            ) from None
        except OSError as error:
            raise InputError(
                f"--out {cfg.out!r} cannot be written ({error.strerror}); name another directory"
            ) from None
        state, start_step = self._find_state(cfg.resume, record)
        # Lines of steps that were not saved will be written again.
        path, lines = self.partial / "metrics.jsonl", []
        if path.exists():
            lines = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] < start_step]
        path.write_text("".join(lines))
        self._metrics = path.open("a")
        return record, state, start_step

    def _find_state(self, resume: bool, record: dict) -> tuple[Path | None, int]:
        states = sorted(path for path in self.partial.glob("state-*") if path.suffix != ".tmp")
        if not states:
            return None, 0
        if not resume:
            raise InputError(f"{self.partial} holds an interrupted run; add --resume to continue it, or delete it")
        saved = json.loads((states[-1] / "run.json").read_text())
        for name, value in json.loads(json.dumps(record["config"])).items():
            if name != "resume" and saved["config"].get(name) != value:
                raise InputError(
                    f"--resume: the interrupted run had {name} = {saved['config'].get(name)!r}, now it is {value!r}; "
                    f"give the same settings, or delete {self.partial}"
                )
        record["consumed"], record["seconds"] = saved["consumed"], saved["seconds"]
        return states[-1], saved["steps"]

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Loads the interrupted run's weights and optimizer state, if there is one to continue."""
        if self.state is not None:
            model_state, optimizer_state = get_state_dict(policy, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=self.state, no_dist=not dist.is_initialized())
            set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            say(f"{self.out}: continuing after step {self.start_step}")

    def checkpoint(self, steps: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """After every `save_every` steps, saves the training state; the last one goes only when the new one is whole.

        Every rank writes its own shards, so on several nodes the directory must be one that all of them see.
        """
        if steps % self.save_every:
            return
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        state = self.partial / f"state-{steps:06d}"
        unfinished = state.with_suffix(".tmp")
        on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=unfinished,
            no_dist=not dist.is_initialized(),
        )
        on_rank_0(lambda: self._accept_state(unfinished, state, steps))

    def _accept_state(self, unfinished: Path, state: Path, steps: int) -> None:
        self._write_record(unfinished, steps)
        unfinished.rename(state)
        for older in self.partial.glob("state-*"):
            if older != state:
                shutil.rmtree(older)

    def _write_record(self, directory: Path, steps: int) -> None:
        seconds = self.record["seconds"] + time.monotonic() - self._began
        record = {**self.record, "steps": steps, "seconds": round(seconds, 1)}
        (directory / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def steps(self, total: int) -> Iterable[int]:
        """The steps still to do, behind a progress bar."""
        self._bar = progress_bar(total, self.out.name, "step", initial=self.start_step)
        for step in range(self.start_step, total):
            yield step
            self._bar.update()
        self._bar.close()

    def consume(self, problems: Iterable[Problem]) -> None:
        """Records that these labelled problems have been trained on."""
        self.record["consumed"] = sorted({*self.record["consumed"], *(problem.id for problem in problems)})

    @contextmanager
    def phase(self, name: str):
        """Adds the time of the block to the next logged line as `seconds_<name>`."""
        began = time.monotonic()
        yield
        self._phases[name] += time.monotonic() - began

    def log(self, step: int, metrics: dict[str, float], show: Sequence[str] = ()) -> None:
        """Appends one line to metrics.jsonl; the metrics named in `show` stand beside the progress bar."""
        line = {"step": step, **metrics, **{f"seconds_{name}": round(s, 4) for name, s in self._phases.items()}}
        self._phases.clear()
        if rank():
            return
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._bar is not None:
            self._bar.set_postfix({name: f"{metrics[name]:.4g}" for name in show if name in metrics})

    def finish(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
        """Writes the checkpoint, its curves and its record, and gives the directory its final name."""
        save_pretrained(policy, self.partial)
        on_rank_0(lambda: self._complete(tokenizer, steps))

    def _complete(self, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
        tokenizer.save_pretrained(self.partial)
        self._metrics.close()
        lines = [json.loads(line) for line in (self.partial / "metrics.jsonl").read_text().splitlines()]
        if lines:
            self.record |= {"first": lines[0], "last": lines[-1]}
        plot_metrics(lines, self.partial / "curves.png")
        self._write_record(self.partial, steps)
        for state in self.partial.glob("state-*"):
            shutil.rmtree(state)
        (self.partial / "lock").unlink()
        self.partial.rename(self.out)
        print(f"wrote {self.out}")


def plot_metrics(lines: list[dict], picture: Path) -> None:
    """Draws every number of a metrics.jsonl against its step, one small panel each."""
    from matplotlib.figure import Figure  # takes a second, and the whole of pyplot two

    names = [name for name in dict.fromkeys(key for line in lines for key in line) if name != "step"]
    if not names:
        return
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    # Margins by hand: measuring every label takes longer than drawing, and a toy's stage as long as its training.
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.25 / rows, top=1 - 0.15 / rows, hspace=0.45, wspace=0.3)
    for axis, name in zip(axes.flat, names):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axis.plot(*zip(*points), linewidth=1.2, marker="." if len(points) < 30 else None)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=5)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.text(0.5, 0.03 / rows, "step", fontsize=9, ha="center")
    figure.savefig(picture, dpi=110)
