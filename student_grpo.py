"""Stage 3 (optional): GRPO of the bridged student on held-out labels (§3, the paper's 2H).

This *is* Stage 1 on another checkpoint and another half: it calls `teacher_grpo.main`, so direct GRPO, Stage 3 and
replay share verifier, normalisation, optimizer, batches and schedule by construction (the paper's matched protocol).

What is added is the guarantee that the labels are held out: the checkpoint's lineage lists every problem its weights
have been trained on, its teacher's included, and training on any of them is refused, unless `--replay` says that this is
the control (route R7: 1H again, with the same number of problems and updates).

One process:   python student_grpo.py --model runs/bridge --data dapo --half 2H --out runs/student
The control:   python student_grpo.py --model runs/bridge --data dapo --half 1H --replay --out runs/replay
Eight GPUs:    the same behind torchrun --nproc_per_node=8 student_grpo.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import checkpoints
import common
import records
import teacher_grpo
from common import InputError


@dataclass
class Config(teacher_grpo.Config):
    half: Literal["full", "1H", "2H"] = "2H"  # the labels held out from Stages 1 and 2
    replay: bool = False  # train on consumed labels on purpose (route R7)


def main(cfg: Config) -> None:
    problems = records.load_training_problems(cfg.data, cfg.half, cfg.split_seed, cfg.exclude)
    records.load_tokenizer(cfg.model)  # says so if there is no such checkpoint
    consumed = common.on_rank_0(lambda: checkpoints.consumed_problems(checkpoints.read_lineage(cfg.model)))
    seen = sum(problem.id in consumed for problem in problems)
    if seen and not cfg.replay:
        raise InputError(
            f"--half {cfg.half}: {seen} of its {len(problems)} problems were already consumed on the way to --model "
            f"{cfg.model!r}; train on the other half, or say --replay if that is the control"
        )
    if cfg.replay and not seen:
        raise InputError(
            f"--replay: --model {cfg.model!r} has consumed none of the problems of half {cfg.half}; drop it"
        )
    teacher_grpo.main(cfg)


if __name__ == "__main__":
    common.cli(main, Config)
