"""A checkpoint's lineage: the `run.json` that a stage writes beside its weights.

It holds the stage's settings, its parent checkpoints with their own records, the ids of the labelled problems that the
weights were trained on, and, for each session (a start or a resume), the code and machine used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from common import InputError, print0, world_size
from lib.files import file_sha256
from lib.policy import load_config
from lib.rewards import reward_sha256

ROOT = Path(__file__).parent.parent


def read_lineage(model: str) -> dict:
    """A checkpoint's path, the hash of its weights, and its `run.json` if a stage wrote it.

    The `sha256` covers the weights in a directory; for a checkpoint on the hub it is the commit hash. A file of texts
    that a stage was trained on also has a path and a hash.
    """
    directory = Path(model)
    if directory.is_file():
        return {"path": model, "sha256": file_sha256(directory)}
    if not directory.is_dir():
        return {"path": model, "sha256": getattr(load_config(model), "_commit_hash", None)}
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise InputError(
            f"model {model!r} holds no .safetensors weights; convert it, because no other format is loaded"
        )
    digests = b"".join(bytes.fromhex(file_sha256(path)) for path in weights)
    return {**read_run(directory), "path": model, "sha256": hashlib.sha256(digests).hexdigest()}


def read_run(directory: str | Path) -> dict:
    """The `run.json` of a checkpoint, run or training state; {} if there is none. InputError if it is damaged."""
    path = Path(directory) / "run.json"
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        run = {}
    if not {"stage", "parents", "trained_on"} <= run.keys():
        raise InputError(f"{path} was not written by a stage or is damaged, so the history is lost; fetch it again")
    return run


def settings_and_parents(record: dict) -> dict:
    """Everything, apart from the code, that determines a run's result: its stage, settings and parents' weights."""
    decide_nothing = ("out", "resume", "track", "accept_changes")
    settings = {"stage": record.get("stage"), **record.get("config", {})}
    weights = {f"{role} weights": parent["sha256"] for role, parent in record.get("parents", {}).items()}
    return {name: value for name, value in settings.items() if name not in decide_nothing} | weights


def ancestry(lineage: dict) -> Iterator[dict]:
    """Yields the record of a checkpoint, then those of all its ancestors."""
    yield lineage
    for parent in lineage.get("parents", {}).values():
        yield from ancestry(parent)


def problems_trained_on(lineage: dict) -> set[str]:
    """Ids of all labelled problems that a checkpoint or any of its ancestors was trained on. A held-out half (2H) must
    contain none of them.
    """
    return {problem for record in ancestry(lineage) for problem in record.get("trained_on", ())}


def report_missing_history(checkpoint: str, lineage: dict) -> None:
    """Prints a note if no stage wrote the checkpoint, because then `problems_trained_on` knows nothing about it."""
    if "stage" not in lineage:
        print0(f"{checkpoint}: no recorded history: held-out labels cannot be checked")


def last_rl_stage(lineage: dict) -> dict | None:
    """The most recent stage in a checkpoint's history that trained on the sparse reward, or None."""
    # Of the stages only GRPO logs a reward.
    return next((record for record in ancestry(lineage) if "reward" in record.get("first", {})), None)


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def code_version() -> str:
    """The commit of this code, with "-dirty" if there are uncommitted changes; "unknown" outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def code_files(stage: Path) -> dict[str, str]:
    """sha256 by path of the code that a stage runs: lib/, the stage's script, and the top-level modules it imports.

    A script outside this repository is recorded under its file name.
    """
    found, waiting = {}, [stage.absolute(), *(ROOT / "lib").glob("*.py")]
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        if path.is_file() and name not in found:
            found[name] = file_sha256(path)
            imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            waiting += [ROOT / f"{name}.py" for name in imported]
    return dict(sorted(found.items()))


def new_record(cfg, parents: dict[str, str]) -> dict:
    """The initial `run.json` of a session, that is of a run that begins or resumes. Hashes the weights of `parents`."""
    stage = Path(sys.modules[type(cfg).__module__].__file__)
    reward = {cfg.reward: reward_sha256(cfg)} if cfg.reward else {}
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_version(),
        "files": code_files(stage) | reward,
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "math-verify")},
        "hardware": hardware(),
        "ranks": world_size(),
        "first_step": 0,
    }
    return {
        "stage": stage.stem,
        "config": dataclasses.asdict(cfg),
        "parents": {role: read_lineage(model) for role, model in parents.items()},
        "trained_on": [],
        "warnings": {},
        "sessions": [session],
        "seconds": 0.0,
        "cpu_seconds": 0.0,  # of rank 0's process
        "trained_tokens": 0,  # response tokens of all steps
    }
