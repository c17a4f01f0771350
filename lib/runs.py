"""The output of a stage: a checkpoint that records where it comes from, written so that a run can be resumed.

A checkpoint is a Hugging Face directory plus `run.json`, which holds the stage's settings and its lineage: the
checkpoints it came from and the labelled problems that its weights have been trained on.
"""

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
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import PreTrainedTokenizerBase

from common import (
    InputError,
    Problem,
    Rollout,
    check_settings,
    first_line,
    map_over_ranks,
    on_rank_0,
    print0,
    progress_bar,
    rank,
    world_size,
)
from lib.data import check_same_tokenizer, load_tokenizer, load_training_problems, tokenize_prompts
from lib.engines import check_engine
from lib.plots import plot_metrics
from lib.policy import Policy, check_checkpoint, device_mesh, load_config, save_pretrained

# In a lone process PyTorch's checkpoint library warns at every call that it assumes a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def prepare(
    cfg, teacher: str | None = None, sampled: str | None = None
) -> tuple[list[Problem], PreTrainedTokenizerBase, dict[str, list[int]]]:
    """Checks a stage's Config, and loads its training problems, the tokenizer, and prompt token ids by problem id.

    Most wrong input is refused here, with an InputError, before any weight is read. `teacher` is the checkpoint that
    the model learns from; `sampled` the one that responses are sampled from (by default the model).
    """
    check_settings(cfg)
    device_mesh(cfg.shard_nodes)  # raises InputError if the nodes cannot be grouped as --shard-nodes says
    if teacher:
        check_same_tokenizer(cfg.model, teacher)
    problems = load_training_problems(cfg.data, cfg.half, cfg.split_seed, cfg.exclude)
    tokenizer = load_tokenizer(cfg.model)
    for model in filter(None, (cfg.model, teacher)):
        check_checkpoint(model, len(tokenizer))
    prompts = tokenize_prompts(tokenizer, problems, cfg.instruction, cfg.thinking, cfg.max_prompt_tokens)
    if not cfg.dry_run:
        check_engine(cfg, sampled or cfg.model)
    return problems, tokenizer, prompts


# Lineage


def read_lineage(model: str) -> dict:
    """A checkpoint's path and a hash of its weights, with its `run.json` if a stage wrote it.

    The `sha256` is that of the weights in a directory; of a checkpoint on the hub it is the hub's hash of the commit.
    """
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
    """A checkpoint's `run.json`, or {} if no stage wrote it. InputError if it is not whole."""
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


def last_rl_stage(lineage: dict) -> dict | None:
    """The record of the last stage on the way to a checkpoint that trained on the sparse reward, None if none did."""
    if "reward" in lineage.get("first", {}):  # the first line of its metrics, which has a reward in GRPO only
        return lineage
    return next(filter(None, map(last_rl_stage, lineage.get("parents", {}).values())), None)


def check_writable(out: str) -> None:
    """InputError if directory `out` cannot be made or written to. Makes nothing."""
    existing = next(path for path in (Path(out), *Path(out).absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(
            f"--out {out!r} cannot be written ({str(existing)!r} is not a writable directory); name another"
        )


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def code_version() -> str:
    """The commit of this code, with "-dirty" if it was changed since, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# Training states


def _file_hashes(directory: Path) -> dict[str, str | None]:
    """The sha256 of each file in a directory by its name, None for one that cannot be read. Work is spread;
    collective.
    """
    names = on_rank_0(lambda: sorted(path.name for path in directory.iterdir() if path.name != "SHA256SUMS"))
    return dict(map_over_ranks(lambda share: [(name, _sha256(directory / name)) for name in share], names))


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _saved_hashes(state: Path) -> dict[str, str]:
    """What `SHA256SUMS` says of a training state's files; {} if it cannot be read."""
    try:
        lines = (state / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        return {name: digest for digest, name in (line.split("  ") for line in lines)}
    except (OSError, ValueError):
        return {}


# Run directories

# A single step whose loss or gradient is not finite may be bad luck. So many in a row mean that the run has diverged.
STOP_AFTER_SKIPPED = 3


class Run:
    """The output directory of a stage while it runs.

    Everything is written to OUT.partial: `metrics.jsonl` (one line for each step) and, every `save_every` steps, the
    training state from which `--resume` continues. Only a complete checkpoint is renamed to OUT. So a directory called
    OUT is always whole, however the process ends, and a Makefile can use it as a target.

    The files of a training state are hashed when it is saved, and a state is resumed from only if the hashes still fit.

    `cfg` is a stage's Config. `parents` maps roles ("model", "teacher") to checkpoints, whose lineage is copied into
    `run.json`. Use it in a `with` block: at its end the directory is free for another run, and if bad input ended the
    run before there was anything to keep, OUT.partial is removed.

    Raises InputError when OUT exists, is in use by another run, or holds an interrupted run that cannot be continued.
    """

    def __init__(self, cfg, parents: dict[str, str]):
        self.out = Path(cfg.out)
        self.partial = Path(f"{self.out}.partial")  # of the Path, so that "runs/x/" becomes "runs/x.partial"
        self.save_every = cfg.save_every
        self._lock = self._metrics = self._bar = None
        try:
            # Rank 0 reads and writes the files; the other ranks learn what it found.
            self.record, states = on_rank_0(lambda: self._open(cfg, parents))
            self.state, saved = self._newest_whole(states)
            if saved:
                self._compare_settings(saved, self.record)
            self.steps_done = saved.get("steps", 0)
            self.record.update({name: saved[name] for name in ("consumed", "seconds") if name in saved})
            self._skipped_in_a_row = on_rank_0(self._open_metrics)
        except InputError as error:
            self.__exit__(InputError, error, None)
            raise
        self._began = time.monotonic()
        self._phases: dict[str, float] = defaultdict(float)

    def _open(self, cfg, parents: dict[str, str]) -> tuple[dict, list[tuple[Path, dict | None]]]:
        """Locks the directory; returns this run's record, and the training states with their records, newest first."""
        if self.out.exists():
            if (self.out / "run.json").exists() and (self.out / "lock").exists():
                _tidy(self.out)  # a process that was killed after it had renamed OUT.partial has left its states
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
        paths = self._states()[::-1]
        if (paths or self._holds_work()) and not cfg.resume:
            raise InputError(f"{self.partial} holds an interrupted run; add --resume to continue it, or delete it")
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
        states = [(path, _read_record(path)) for path in paths]
        return record, states

    def _states(self) -> list[Path]:
        """The training states, oldest first."""
        return sorted(self.partial.glob("state-??????"))

    def _compare_settings(self, saved: dict, record: dict) -> None:
        if saved["stage"] != record["stage"]:
            raise InputError(
                f"--resume: {self.partial} holds an interrupted run of {saved['stage']}.py, not of {record['stage']}.py; "
                "name another --out, or delete it"
            )
        config = json.loads(json.dumps(record["config"]))  # with lists for tuples, as in the saved one
        for name, value in config.items():
            # The size of micro-batches changes nothing but rounding, and may have to be lowered to go on.
            if name not in ("resume", "out", "micro_batch_tokens") and saved["config"].get(name) != value:
                raise InputError(
                    f"--resume: the interrupted run had {name} = {saved['config'].get(name)!r}, now it is {value!r}; "
                    f"give the same settings, or delete {self.partial}"
                )
        for role, parent in record["parents"].items():
            if saved["parents"][role]["sha256"] != parent["sha256"]:
                raise InputError(
                    f"--resume: --{role} {parent['path']!r} has other weights than when the run was interrupted; put "
                    f"the old weights back, or delete {self.partial}"
                )

    def _newest_whole(self, states: list[tuple[Path, dict | None]]) -> tuple[Path | None, dict]:
        """The newest training state whose files have the hashes in its SHA256SUMS, and its record. Collective."""
        for path, saved in states:
            kept, found = _saved_hashes(path), _file_hashes(path)
            differing = sorted(name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name))
            damaged = differing if kept else ["SHA256SUMS"]
            if not damaged and saved:
                return path, saved
            print0(f"{path} is damaged: {damaged[0]} is not what was written")
        if states:
            raise InputError(
                f"no training state in {self.partial} is whole, {damaged[0]} of {path.name} is not what was written; "
                "delete the directory to begin again"
            )
        return None, {}

    def _open_metrics(self) -> int:
        """Removes the lines of steps that were not saved; returns the number of skipped steps at the end of the
        rest.
        """
        path, lines = self.partial / "metrics.jsonl", []
        if path.exists():
            whole = path.read_text(encoding="utf-8").splitlines(True)[: self.steps_done]
            lines = [line for line in whole if line.endswith("\n")]  # a kill may have cut the last one short
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.rename(path)  # so that a kill at this moment does not leave an empty file
        self._metrics = path.open("a", encoding="utf-8")
        skipped = [bool(json.loads(line).get("skipped_steps")) for line in lines]
        return len(skipped) if all(skipped) else skipped[::-1].index(False)

    def _holds_work(self) -> bool:
        """Whether OUT.partial holds anything worth keeping: a training state, rollouts, or those of a skipped step."""
        return any(any(self.partial.glob(pattern)) for pattern in ("state-??????", "*/shard-??????", "skipped-*"))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._bar is not None:
            self._bar.close()  # so that the next message begins on a new line
        if self._metrics is not None:
            with suppress(OSError):  # closing writes what is left, which fails again on a full disk
                self._metrics.close()
        if self._lock is not None:
            if isinstance(error, InputError) and self.partial.exists() and not self._holds_work():
                shutil.rmtree(self.partial)
            self._lock.close()

    @contextmanager
    def _writing(self, what: str):
        """Turns a failed write into one sentence that says from where the run can be continued."""
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            states = self._states()
            remedy = f"--resume to continue after step {int(states[-1].name[6:])}" if states else "begin again"
            raise InputError(
                f"{what} could not be written to {self.partial} ({_reason(error)}); make room, then {remedy}"
            ) from None

    def restore(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Loads the weights and optimizer state of the interrupted run, if there is one to continue. Collective."""
        if self.state is not None:
            model_state, optimizer_state = get_state_dict(policy, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=self.state, no_dist=not dist.is_initialized())
            set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            print0(f"{self.out}: continuing after step {self.steps_done}")

    def steps(self, total: int) -> Iterable[int]:
        """The numbers of the steps still to do, while a progress bar shows how many are done."""
        self._bar = progress_bar(total, self.out.name, "step", initial=self.steps_done)
        for step in range(self.steps_done, total):
            yield step
            self._bar.update()
        self._bar.close()

    @contextmanager
    def phase(self, name: str):
        """Adds the duration of the block to the next logged line as `seconds_<name>`."""
        began = time.monotonic()
        yield
        self._phases[name] += time.monotonic() - began

    def log(self, step: int, metrics: dict[str, float], rollouts: Sequence[Rollout], show: Sequence[str] = ()) -> None:
        """Appends a line to metrics.jsonl, and shows the metrics named in `show` beside the progress bar.

        The line also holds the rollouts' mean length in tokens and the share that was cut at the length limit.
        `metrics` must have `skipped_steps`, the number of optimizer steps that were skipped. After STOP_AFTER_SKIPPED
        steps in a row with any, the rollouts of the last are written to a file and the run ends with an InputError.
        """
        line = {
            "step": step,
            **metrics,
            "response_tokens": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
            "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
            **{f"seconds_{name}": round(seconds, 4) for name, seconds in self._phases.items()},
        }
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON has no NaN
        self._phases.clear()
        if rank() == 0:
            with self._writing("metrics.jsonl"):
                self._metrics.write(json.dumps(line) + "\n")
                self._metrics.flush()
            if self._bar is not None:
                self._bar.set_postfix({name: f"{line[name]:.4g}" for name in show if line.get(name) is not None})
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics["skipped_steps"] else 0
        if self._skipped_in_a_row == STOP_AFTER_SKIPPED:
            self._stop(step, rollouts)

    def _stop(self, step: int, rollouts: Sequence[Rollout]) -> None:
        path = self.partial / f"skipped-{step:06d}.json"

        def write() -> None:
            with self._writing(path.name):
                path.write_text(json.dumps([dataclasses.asdict(rollout) for rollout in rollouts], indent=1))

        on_rank_0(write)
        raise InputError(
            f"the loss or its gradient was not finite in {self._skipped_in_a_row} steps in a row, the last of them step "
            f"{step}, whose rollouts are in {path}; look at them, or lower --lr"
        )

    def save(self, steps: int, policy: Policy, optimizer: torch.optim.Optimizer, trained_on: Iterable[Problem]) -> None:
        """Call it after every step: it records the step's problems, and saves the training state every `save_every`
        steps.

        `steps` counts the finished steps. `trained_on` are problems that the weights have been trained on, whether or
        not their answers were used; Stage 3 refuses them. The previous state is removed once the new one is complete.
        Every rank writes its own shards, so on several nodes the directory must be one that all of them see.
        Collective; InputError when the state cannot be written, and then the previous one is still there.
        """
        self.steps_done = steps
        self.record["consumed"] = sorted({*self.record["consumed"], *(problem.id for problem in trained_on)})
        if steps % self.save_every:
            return
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        unfinished = self.partial / f"state-{steps:06d}.tmp"
        on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        try:
            with self._writing(f"the training state of step {steps}"):
                dcp.save(state, checkpoint_id=unfinished, no_dist=not dist.is_initialized())
            on_rank_0(lambda: self._write_record(unfinished))
            hashes = _file_hashes(unfinished)
            on_rank_0(lambda: self._accept_state(unfinished, hashes))
        except InputError:
            if rank() == 0:  # an incomplete state only takes room
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _accept_state(self, unfinished: Path, hashes: dict[str, str]) -> None:
        state = unfinished.with_suffix("")
        with self._writing(f"the training state of step {self.steps_done}"):
            lines = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
            (unfinished / "SHA256SUMS").write_text(lines, encoding="utf-8")
            shutil.rmtree(state, ignore_errors=True)  # an older, damaged state of the same step
            unfinished.rename(state)
        for older in self.partial.glob("state-*"):
            if older != state:
                shutil.rmtree(older)

    def _write_record(self, directory: Path) -> None:
        seconds = self.record["seconds"] + time.monotonic() - self._began
        record = {**self.record, "steps": self.steps_done, "seconds": round(seconds, 1)}
        with self._writing("run.json"):
            (directory / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def finish(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the checkpoint, its curves and its record, and gives the directory its final name. Collective."""
        with self._writing("the checkpoint"):
            save_pretrained(policy, self.partial)
        on_rank_0(lambda: self._complete(tokenizer))

    def _complete(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with self._writing("the checkpoint"):
            tokenizer.save_pretrained(self.partial)
            self._metrics.close()
            lines = [json.loads(line) for line in (self.partial / "metrics.jsonl").read_text().splitlines()]
            if lines:
                self.record |= {"first": lines[0], "last": lines[-1]}
            plot_metrics(lines, self.partial / "curves.png")
        self._write_record(self.partial)
        self.partial.rename(self.out)
        _tidy(self.out)  # last, because a run that is killed before the renaming continues from the training state
        print(f"wrote {self.out}")


def _read_record(state: Path) -> dict | None:
    """The record in a training state; None if it cannot be read."""
    try:
        return json.loads((state / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _tidy(checkpoint: Path) -> None:
    """Removes what a finished run no longer needs."""
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
