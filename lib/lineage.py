"""Where a checkpoint comes from: the `run.json` that a stage writes beside its weights.

It holds the stage's settings, the code and machine it ran on, the checkpoints it came from with their own records, and
the ids of the labelled problems that its weights have been trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from common import InputError, world_size
from lib.policy import load_config
from lib.rewards import reward_sha256


def read_lineage(model: str) -> dict:
    """A checkpoint's path and a hash of its weights, with its `run.json` if a stage wrote it.

    The `sha256` is that of the weights in a directory; of a checkpoint on the hub it is the hub's hash of the commit.
    A file of texts that a stage learnt from has a path and a hash, too.
    """
    directory = Path(model)
    if directory.is_file():
        return {"path": model, "sha256": file_sha256(directory)}
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


def read_record(directory: Path) -> dict | None:
    """The `run.json` of a run that is not finished, or of one of its training states; None if it cannot be read."""
    try:
        return json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def consumed_problems(lineage: dict) -> set[str]:
    """Ids of every labelled problem that a checkpoint's weights have been trained on, through all its ancestors: what a
    held-out half (2H) may not contain.
    """
    return set(lineage.get("consumed", ())).union(*(map(consumed_problems, lineage.get("parents", {}).values())))


def last_rl_stage(lineage: dict) -> dict | None:
    """The record of the last stage on the way to a checkpoint that trained on the sparse reward, None if none did."""
    if "reward" in lineage.get("first", {}):  # the first line of its metrics, which has a reward in GRPO only
        return lineage
    return next(filter(None, map(last_rl_stage, lineage.get("parents", {}).values())), None)


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


def new_record(cfg, parents: dict[str, str]) -> dict:
    """What `run.json` says of a run that begins; the weights of `parents` are hashed for it."""
    return {
        "stage": Path(sys.modules[type(cfg).__module__].__file__).stem,
        "config": dataclasses.asdict(cfg),
        "parents": {role: read_lineage(model) for role, model in parents.items()},
        "reward_sha256": reward_sha256(cfg),
        "consumed": [],
        "warnings": {},
        "code": code_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "math-verify")},
        "hardware": hardware(),
        "ranks": world_size(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": 0.0,
        "cpu_seconds": 0.0,  # of the process of rank 0
        "trained_tokens": 0,  # response tokens of all steps
    }


def file_sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def history_notes(lineage: dict) -> list[str]:
    """What a checkpoint's record cannot tell: one sentence each."""
    return [] if "stage" in lineage else ["no history on record: held-out labels cannot be checked"]
