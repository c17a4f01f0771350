"""What a stage leaves behind. A checkpoint is a Hugging Face directory plus `run.json`, which carries the settings and the
lineage: which checkpoints it came from, and which labelled problems it has consumed on the way."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
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
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import PreTrainedTokenizerBase

from common import (
    InputError,
    Policy,
    first_line,
    load_config,
    on_rank_0,
    progress_bar,
    rank,
    save_pretrained,
    say,
    spread,
    world_size,
)
from records import Problem, Rollout

# In one process the checkpoint library says at every call that it takes it to be one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def read_lineage(model: str) -> dict:
    """What is known of a checkpoint: its `run.json` if a stage wrote it, and always its path and a content hash."""
    directory = Path(model)
    if not directory.is_dir():
        return {"path": model, "sha256": getattr(load_config(model), "_commit_hash", None)}
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise InputError(f"model {model!r} holds no .safetensors weights; only safetensors are loaded")
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {**read_run(model), "path": model, "sha256": digest.hexdigest()}


def read_run(model: str) -> dict:
    """What a stage wrote into a checkpoint's `run.json`, {} if there is none. InputError if it is not whole."""
    path = Path(model) / "run.json"
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}), so the checkpoint's history is lost; fetch it anew") from None
    if not isinstance(run, dict) or not {"stage", "parents", "consumed"} <= run.keys():
        raise InputError(f"{path} is not what a stage writes, so the checkpoint's history is lost; fetch it anew")
    return run


def consumed_problems(lineage: dict) -> set[str]:
    """Ids of every labelled problem that a checkpoint's weights have been trained on, through all its ancestors."""
    return set(lineage.get("consumed", ())).union(*(map(consumed_problems, lineage.get("parents", {}).values())))


def rewarded(lineage: dict) -> dict | None:
    """The checkpoint or its nearest ancestor that was trained on the sparse reward (condition C1 of a teacher)."""
    if "reward" in lineage.get("first", {}):
        return lineage
    return next(filter(None, map(rewarded, lineage.get("parents", {}).values())), None)


def history(lineage: dict, scores: dict[str, str], role: str = "") -> list[str]:
    """A checkpoint's lineage as a tree, a line each: path, stage, labels, what its first and last step measured, scores.

    `scores` are texts by content hash of the weights. A checkpoint that no stage wrote has no more than a path.
    """
    line = f"{role}{lineage['path']}"
    if "stage" in lineage:
        cfg = lineage["config"]
        line += f"  [{lineage['stage']}, {cfg['half']}, {len(lineage['consumed'])} labels, {lineage['steps']} steps"
        for name in MEASURES:
            if None not in (lineage.get("first", {}).get(name), lineage.get("last", {}).get(name)):
                line += f", {name} {lineage['first'][name]:.3g} -> {lineage['last'][name]:.3g}"
        line += "]"
    line += f"  {scores.get(lineage['sha256'], '')}"
    lines = [line.rstrip()]
    parents = list(lineage.get("parents", {}).items())
    for number, (name, parent) in enumerate(parents):
        last = number == len(parents) - 1
        below = history(parent, scores, f"{name}: ")
        lines += [("└─ " if last else "├─ ") + below[0]]
        lines += [("   " if last else "│  ") + text for text in below[1:]]
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


def check_writable(out: str) -> None:
    """InputError if directory `out` cannot be made or written to. Makes nothing."""
    existing = next(path for path in (Path(out), *Path(out).absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(
            f"--out {out!r} cannot be written ({str(existing)!r} is no directory to write to); name another"
        )


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


# Training states


class _HashedFile(io.FileIO):
    """A file to write that keeps the sha256 of what it was given."""

    def __init__(self, path: Path):
        super().__init__(path, "wb")
        self.digest = hashlib.sha256()

    def write(self, data) -> int:
        written = super().write(data)
        self.digest.update(memoryview(data)[:written])
        return written


class _HashingFileSystem(FileSystem):
    """The checkpoint library's local files, and in `digests` the sha256 of what each written one should hold."""

    def __init__(self):
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path, mode: str):
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        file = _HashedFile(path)
        with io.BufferedWriter(file) as stream:
            yield stream
        self.digests[Path(path).name] = file.digest.hexdigest()

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


def _write_state(directory: Path, state: dict) -> dict[str, str]:
    """Writes a training state, each rank its own shards; the sha256 of every file by name. Collective."""
    writer = dcp.FileSystemWriter(directory)
    writer.fs = _HashingFileSystem()
    dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    return dict(spread(lambda _: list(writer.fs.digests.items()), range(world_size())))


def _damaged_files(directory: Path, digests: dict[str, str]) -> list[str]:
    """Those of the named files that are missing, or do not hold what was written. The work is spread; collective."""

    def differing(names: Sequence[str]) -> list[str]:
        return [name for name in names if _sha256(directory / name) != digests[name]]

    return spread(differing, sorted(digests))


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _read_saved(state: Path) -> dict | None:
    """The record in a training state, with the `sha256` of its files by name; None if it is not what was written."""
    try:
        lines = (state / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        if _sha256(state / "run.json") == sums["run.json"]:
            return {**json.loads((state / "run.json").read_text(encoding="utf-8")), "sha256": sums}
    except (OSError, ValueError, KeyError):
        pass
    return None


# Run directories

MAX_SKIPPED_IN_A_ROW = 3  # steps with a non-finite loss or gradient; chance gives one, a broken run gives them all


class Run:
    """The output directory of a stage, and its diary.

    While the stage runs everything is written to OUT.partial: `metrics.jsonl` (one line a step) and every
    `save_every` steps the training state from which `--resume` goes on. Only a complete checkpoint is renamed to OUT.
    So a directory called OUT is always whole, whenever and however the process dies, and `make` can depend on it.

    A training state is accepted when every file of it, read back, has the hash of what was written, and only then the
    one before it goes; before it is resumed from, its files are hashed again.

    cfg is a stage's Config; of its fields `out`, `seed`, `resume` and `save_every` are read here, and all are recorded.
    `parents` maps roles ("model", "teacher") to checkpoints, whose lineage is copied into `run.json`.

    It is a context: on leaving it the directory is free for another run. Input that turns out bad before there was
    anything to keep takes OUT.partial with it.

    Raises InputError when OUT exists, is in use by another run, or holds an interrupted run of other settings.
    """

    def __init__(self, cfg, parents: dict[str, str]):
        self.out = Path(cfg.out)
        self.partial = Path(f"{self.out}.partial")  # of the Path: a trailing slash is not part of the name
        self.save_every = cfg.save_every
        self._lock = self._metrics = self._bar = None
        try:
            # Files are rank 0's; the others learn what it found.
            self.record, states = on_rank_0(lambda: self._open(cfg, parents))
            self.state, saved = self._newest_whole(states)
            self.start_step = saved.get("steps", 0)
            self.record.update({name: saved[name] for name in ("consumed", "seconds") if name in saved})
            self._skipped_in_a_row = on_rank_0(self._open_metrics)
        except InputError as error:
            self.__exit__(InputError, error, None)
            raise
        self._began = time.monotonic()
        self._phases: dict[str, float] = defaultdict(float)

    def _open(self, cfg, parents: dict[str, str]) -> tuple[dict, list[tuple[Path, dict | None]]]:
        """Takes the directory; returns this run's record, and the states in it with theirs, the newest first."""
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
            if (self.out / "run.json").exists() and (self.out / "lock").exists():
                _tidy(self.out)  # a kill came between its last two steps
            raise InputError(f"--out {cfg.out!r} already exists; name another, or delete it")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = (self.partial / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock = lock
        except BlockingIOError:
            raise InputError(
                f"--out {cfg.out!r} is being written by another run; name another, or stop that one"
            ) from None
        except OSError as error:
            raise InputError(
                f"--out {cfg.out!r} cannot be written ({error.strerror}); name another directory"
            ) from None
        paths = sorted(self.partial.glob("state-??????"), reverse=True)
        if (paths or self._holds_work()) and not cfg.resume:
            raise InputError(f"{self.partial} holds an interrupted run; add --resume to continue it, or delete it")
        states = [(path, _read_saved(path)) for path in paths]
        for saved in [saved for _, saved in states if saved][:1]:
            self._compare_settings(saved, record)
        return record, states

    def _compare_settings(self, saved: dict, record: dict) -> None:
        if saved["stage"] != record["stage"]:
            raise InputError(
                f"--resume: {self.partial} holds an interrupted run of {saved['stage']}.py, not of {record['stage']}.py; "
                "name another --out, or delete it"
            )
        for name, value in json.loads(json.dumps(record["config"])).items():
            if name not in ("resume", "out") and saved["config"].get(name) != value:
                raise InputError(
                    f"--resume: the interrupted run had {name} = {saved['config'].get(name)!r}, now it is {value!r}; "
                    f"give the same settings, or delete {self.partial}"
                )
        for role, parent in record["parents"].items():
            if saved["parents"][role]["sha256"] != parent["sha256"]:
                raise InputError(
                    f"--resume: --{role} {parent['path']!r} has other weights than when the run was interrupted; put "
                    f"those back, or delete {self.partial}"
                )

    def _newest_whole(self, states: list[tuple[Path, dict | None]]) -> tuple[Path | None, dict]:
        """The newest state whose files all hold what was written, and its record. Collective."""
        for path, saved in states:
            damaged = ["run.json"] if saved is None else _damaged_files(path, saved["sha256"])
            if not damaged:
                return path, saved
            say(f"{path} is damaged: {damaged[0]} is not what was written")
        if states:
            raise InputError(
                f"no training state in {self.partial} is whole, {damaged[0]} of {path.name} is not what was written; "
                "delete the directory to begin again"
            )
        return None, {}

    def _open_metrics(self) -> int:
        """Cuts metrics.jsonl back to the steps that were saved; the number of skipped steps that it ends in."""
        path, lines = self.partial / "metrics.jsonl", []
        if path.exists():
            # Lines of steps that were not saved will be written again. The last may have been cut short by a kill.
            whole = path.read_text(encoding="utf-8").splitlines(True)[: self.start_step]
            lines = [line for line in whole if line.endswith("\n")]
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.rename(path)  # a kill must not find it empty
        self._metrics = path.open("a", encoding="utf-8")
        skipped = [bool(json.loads(line).get("skipped_steps")) for line in lines]
        return len(skipped) if all(skipped) else skipped[::-1].index(False)

    def _holds_work(self) -> bool:
        """Whether OUT.partial holds what somebody would miss: a training state, sampled rollouts, a batch to look at."""
        cache = self.partial / "teacher_rollouts.jsonl"
        sampled = cache.exists() and cache.read_bytes().count(b"\n") > 1
        return sampled or any(self.partial.glob("state-??????")) or any(self.partial.glob("skipped-*"))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._bar is not None:
            self._bar.close()  # what is said next begins a line
        if self._metrics is not None:
            with suppress(OSError):  # of a full disk, which has been said
                self._metrics.close()
        if self._lock is not None:
            if isinstance(error, InputError) and self.partial.exists() and not self._holds_work():
                shutil.rmtree(self.partial)
            self._lock.close()

    @contextmanager
    def _writing(self, what: str):
        """Turns a write that fails into one sentence, which says what there is to continue from."""
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            states = sorted(self.partial.glob("state-??????"))
            rest = f"--resume to continue after step {int(states[-1].name[6:])}" if states else "begin again"
            raise InputError(
                f"{what} could not be written to {self.partial} ({_reason(error)}); make room, then {rest}"
            ) from None

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
        InputError when it cannot be written: the last one is still there then.
        """
        if steps % self.save_every:
            return
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        state = self.partial / f"state-{steps:06d}"
        unfinished = state.with_suffix(".tmp")
        on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        try:
            with self._writing(f"the training state of step {steps}"):
                digests = _write_state(unfinished, {"model": model_state, "optimizer": optimizer_state})
            damaged = _damaged_files(unfinished, digests)
            if damaged:
                raise InputError(
                    f"the training state of step {steps} does not read back as it was written ({damaged[0]} of "
                    f"{unfinished}); check the disk before you --resume"
                )
            on_rank_0(lambda: self._accept_state(unfinished, state, steps, digests))
        except InputError:
            if rank() == 0:  # it only takes room
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _accept_state(self, unfinished: Path, state: Path, steps: int, digests: dict[str, str]) -> None:
        with self._writing(f"the training state of step {steps}"):
            self._write_record(unfinished, steps)
            sums = {**digests, "run.json": _sha256(unfinished / "run.json")}
            lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
            (unfinished / "SHA256SUMS").write_text(lines, encoding="utf-8")
            shutil.rmtree(state, ignore_errors=True)  # a damaged one that was passed over
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
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON knows no NaN
        self._phases.clear()
        if rank():
            return
        with self._writing("metrics.jsonl"):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        if self._bar is not None:
            self._bar.set_postfix({name: f"{metrics[name]:.4g}" for name in show if name in metrics})

    def stop_if_repeated(self, step: int, skipped_steps: float, rollouts: Sequence[Rollout]) -> None:
        """Counts the steps in a row that had an update skipped; InputError at the third, with its rollouts in a file."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped_steps else 0
        if self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        path = self.partial / f"skipped-{step:06d}.json"

        def write() -> None:
            with self._writing(path.name):
                path.write_text(json.dumps([dataclasses.asdict(rollout) for rollout in rollouts], indent=1))

        on_rank_0(write)
        raise InputError(
            f"the loss or its gradient was not finite in {self._skipped_in_a_row} steps in a row, the last of them step "
            f"{step}, whose rollouts are in {path}; look at them, or lower --lr"
        )

    def finish(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
        """Writes the checkpoint, its curves and its record, and gives the directory its final name."""
        with self._writing("the checkpoint"):
            save_pretrained(policy, self.partial)
        on_rank_0(lambda: self._complete(tokenizer, steps))

    def _complete(self, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
        with self._writing("the checkpoint"):
            tokenizer.save_pretrained(self.partial)
            self._metrics.close()
            lines = [json.loads(line) for line in (self.partial / "metrics.jsonl").read_text().splitlines()]
            if lines:
                self.record |= {"first": lines[0], "last": lines[-1]}
            plot_metrics(lines, self.partial / "curves.png")
            self._write_record(self.partial, steps)
        self.partial.rename(self.out)
        _tidy(self.out)  # only now: until it has its name, the state is what a killed run goes on from
        print(f"wrote {self.out}")


def _tidy(checkpoint: Path) -> None:
    """Removes what a finished run needs no more."""
    for state in checkpoint.glob("state-*"):
        shutil.rmtree(state, ignore_errors=True)
    (checkpoint / "lock").unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What went wrong in a write, in a few words; libraries wrap the system's error in their own."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        seen.append(error)
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        error = failures[0][0] if failures else error.__cause__ or error.__context__
    return first_line(seen[-1])


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
