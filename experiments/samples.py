"""Prints the responses that a stage has kept in samples.jsonl, a few of each step, of a finished run or a running one.

    python -m experiments.samples RUN [--step N] [--last N] [--only wrong|right|cut|no-answer]

RUN is the --out of a stage. Responses are untrusted text: what could steer a terminal is printed as an escape.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import common
from common import InputError
from lib.files import json_lines
from lib.watch import printable, summary


@dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # directory that a stage writes or has written
    step: int | None = None  # print the samples of this step only
    last: int = 4  # how many to print, the latest ones; with --step all of that step are printed
    only: Literal["all", "right", "wrong", "cut", "no-answer"] = "all"  # print only responses that ended like this


def run_directory(out: str) -> Path | None:
    """Where a stage's files are: OUT when it has finished, OUT.partial before; None if there is neither."""
    directories = [Path(out), Path(f"{Path(out)}.partial")]
    return next((directory for directory in directories if (directory / "metrics.jsonl").is_file()), None)


def text_of(line: dict) -> str:
    """A sample, to be read: the prompt, the response, and the answer that would have been right."""
    title = f"step {line['step']}, problem {line['id']}, response {line['sample']}: {summary(line)}"
    return printable(
        f"{title}\n{line['prompt']}\n--- response\n{line['response']}\n--- right answer: {line['answer']}\n"
    )


def main(cfg: Config) -> None:
    directory = run_directory(cfg.run)
    if directory is None or not (directory / "samples.jsonl").is_file():
        raise InputError(f"{cfg.run!r} holds no samples.jsonl; name the --out of a stage that has made a step")
    if cfg.last < 1:
        raise InputError(f"--last {cfg.last} prints nothing; give 1 or more")
    lines = json_lines(directory / "samples.jsonl")
    lines = [line for line in lines if cfg.only == "all" or line["why"] == cfg.only.replace("-", " ")]
    lines = lines[-cfg.last :] if cfg.step is None else [line for line in lines if line["step"] == cfg.step]
    if not lines:
        raise InputError(f"{directory} has no such samples; leave out --step or --only")
    for line in lines:
        print(text_of(line))


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's memory is for the run that is being looked at
    common.cli(main, Config)
