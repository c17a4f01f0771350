"""Where a checkpoint comes from: the `run.json` that a stage writes beside its weights.

It holds the stage's settings, the checkpoints it came from with their own records, the ids of the labelled problems that
its weights have been trained on, and for each session (a start or a resume) the code and machine that it ran on.
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

from common import InputError, world_size
from lib.data import ID_RULE
from lib.files import file_sha256
from lib.policy import load_config
from lib.rewards import reward_sha256

ROOT = Path(__file__).parent.parent


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
    digests = b"".join(bytes.fromhex(file_sha256(path)) for path in weights)
    return {**read_run(directory), "path": model, "sha256": hashlib.sha256(digests).hexdigest()}


def read_run(directory: str | Path) -> dict:
    """The `run.json` of a checkpoint, a run or a training state; {} if there is none. InputError if it is not whole."""
    path = Path(directory) / "run.json"
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        run = {}
    if not {"stage", "parents", "trained_on"} <= run.keys():
        raise InputError(f"{path} is not what a stage writes, so the checkpoint's history is lost; fetch it anew")
    return run


def settings_and_parents(record: dict) -> dict:
    """What decides the result of a run apart from its code: the stage, its settings, and the weights of its parents."""
    decide_nothing = ("out", "resume", "track", "accept_changes")
    settings = {"stage": record.get("stage"), **record.get("config", {})}
    weights = {f"{role} weights": parent["sha256"] for role, parent in record.get("parents", {}).items()}
    return {name: value for name, value in settings.items() if name not in decide_nothing} | weights


def ancestry(lineage: dict) -> Iterator[dict]:
    """The record of a checkpoint and, after it, those of all its ancestors."""
    yield lineage
    for parent in lineage.get("parents", {}).values():
        yield from ancestry(parent)


def problems_trained_on(lineage: dict) -> set[str]:
    """Ids of every labelled problem that a checkpoint's weights have been trained on, through all its ancestors: what a
    held-out half (2H) may not contain.
    """
    return {problem for record in ancestry(lineage) for problem in record.get("trained_on", ())}


def history_notes(lineage: dict) -> list[str]:
    """Why `problems_trained_on` may be incomplete, one sentence for each reason; none if nothing is wrong."""
    if "stage" not in lineage:
        return ["no history on record: held-out labels cannot be checked"]
    return [
        f"{record['path']} names its problems by another rule: held-out labels cannot be checked"
        for record in ancestry(lineage)
        if "stage" in record and record.get("id_rule", 1) != ID_RULE  # early records have no such entry
    ]


def last_rl_stage(lineage: dict) -> dict | None:
    """The record of the last stage on the way to a checkpoint that trained on the sparse reward, None if none did."""
    # The first line of a run's metrics has a reward in GRPO only.
    return next((record for record in ancestry(lineage) if "reward" in record.get("first", {})), None)


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def code_version() -> str:
    """The commit of this code, with "-dirty" if it was changed since, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def code_files(stage: Path) -> dict[str, str]:
    """sha256 of the code that a stage runs, by path: all of lib/, its own script, and what this imports from above lib/.

    A copy of a stage that was never committed, or that lies elsewhere, is recorded by its name.
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
    """What `run.json` says of a run that begins or is resumed, which is one session; the `parents` are hashed for it."""
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
        "id_rule": ID_RULE,
        "trained_on": [],
        "warnings": {},
        "sessions": [session],
        "seconds": 0.0,
        "cpu_seconds": 0.0,  # of the process of rank 0
        "trained_tokens": 0,  # response tokens of all steps
    }
