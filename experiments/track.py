"""Sends the metrics of a run to an experiment tracker, while it runs or afterwards.

    pip install trackio    # or wandb; neither is in requirements.txt, because no stage needs one
    python -m experiments.track RUN --to trackio

RUN is the --out of a stage, which may not have begun yet. The command follows RUN.partial/metrics.jsonl, through
interruptions and resumes, until the run is finished. Ctrl-C ends it earlier and harms neither side.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import common
from common import InputError
from experiments.samples import run_directory
from lib.files import json_lines
from lib.lineage import read_record
from lib.watch import is_training


@dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # directory that a stage writes or has written
    to: Literal["trackio", "wandb"]  # the tracker's package, which has to be installed
    project: str = "sparse-to-dense"  # project in the tracker, to which the run is added under its path
    follow: bool = True  # wait for more until the run is finished, or else send what there is and end
    seconds: float = 5.0  # time between two looks at the run's directory


def lineage(record: dict) -> dict:
    """What a tracker's page should say of a checkpoint and its ancestors: all but the ids of their problems."""
    kept = ("stage", "path", "sha256", "config", "code", "hardware", "ranks", "started")
    parents = {role: lineage(parent) for role, parent in record.get("parents", {}).items()}
    return {**{name: record[name] for name in kept if name in record}, **({"parents": parents} if parents else {})}


def new_lines(directory: Path, sent: set[tuple[int, bool]]) -> list[dict]:
    """The lines of metrics.jsonl that are not in `sent`, to which they are added.

    After a resume the file is shorter at first, and the steps that were not saved come a second time. A tracker cannot
    take back what it has, so the first time counts. A step may have two lines, of the training and of a validation.
    """
    found = []
    for line in json_lines(directory / "metrics.jsonl"):  # none if the directory has got its final name meanwhile
        key = line["step"], is_training(line)
        if key not in sent:
            sent.add(key)
            found.append(line)
    return found


def main(cfg: Config) -> None:
    if importlib.util.find_spec(cfg.to) is None:
        raise InputError(f"--to {cfg.to}: it is not installed; run pip install {cfg.to}, or name the other one")
    if not cfg.follow and run_directory(cfg.run) is None:
        raise InputError(f"{cfg.run!r} is no run of a stage; name its --out, or leave out --no-follow to wait for it")
    common.check_settings(cfg)
    while (directory := run_directory(cfg.run)) is None or (record := read_record(directory)) is None:
        time.sleep(cfg.seconds)

    # Imported by name, because an import statement would make the package a requirement of everybody. The two have the
    # same functions.
    tracker = importlib.import_module(cfg.to)
    tracker.init(project=cfg.project, name=str(Path(cfg.run)), config=lineage(record))
    sent: set[tuple[int, bool]] = set()
    finished = False
    try:
        while not finished:
            # Asked before the lines are read, so that none is missed.
            finished = not cfg.follow or Path(cfg.run, "metrics.jsonl").is_file()
            directory = run_directory(cfg.run)  # None while it gets its final name, or if it is deleted
            for line in new_lines(directory, sent) if directory else ():
                step = line.pop("step")
                tracker.log({name: value for name, value in line.items() if value is not None}, step=step)
            if not finished:
                time.sleep(cfg.seconds)
    finally:
        tracker.finish()
    print(f"sent {len(sent)} lines of {cfg.run} to {cfg.to}")


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's memory is for the run that is being followed
    common.cli(main, Config)
