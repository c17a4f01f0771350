"""Stage 3 (optional): GRPO of the bridged student on held-out labels, the paper's 2H (Section 3; settings of Table
8).

The student comes from Stages 2a and 2b, the bridge. This *is* Stage 1 on another checkpoint and another half: it
calls `teacher_grpo.main`, so that direct GRPO, Stage 3 and the replay control run the same code with the same
defaults, as the paper's matched protocol asks (App. F).

This file adds a check that the labels are held out. A checkpoint's run.json lists every problem on which our stages
have trained its weights or its teacher's. Training on any of them is refused, unless `--replay` says that this is the
replay control of Table 2, which trains again on the half used before (1H). The halves are equally large, so both runs
make the same number of updates.

    One process:   python student_grpo.py --model runs/bridge --data dapo --half 2H --out runs/student
    The control:   python student_grpo.py --model runs/bridge --data dapo --half 1H --replay --out runs/replay
    Eight GPUs:    torchrun --nproc_per_node=8 student_grpo.py --model runs/bridge --data dapo --out runs/student \
                       --activation-checkpointing
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import common
import teacher_grpo
from common import InputError
from lib.lineage import problems_trained_on, read_lineage, report_missing_history
from lib.runs import prepare


@dataclass
class Config(teacher_grpo.Config):
    _: KW_ONLY
    # main settings
    half: Literal["full", "1H", "2H"] = "2H"  # labels to train on; the default assumes that Stages 1 and 2 used 1H
    # GRPO
    replay: bool = False  # train again on labels used before: the replay control of Table 2


def main(cfg: Config) -> None:
    prepared = prepare(cfg)
    problems = prepared[0]
    lineage = common.on_rank_0(lambda: read_lineage(cfg.model))
    report_missing_history(f"--model {cfg.model}", lineage)
    trained_on = problems_trained_on(lineage)
    seen = sum(problem.id in trained_on for problem in problems)
    if seen and not cfg.replay:
        raise InputError(
            f"--half {cfg.half}: --model {cfg.model!r} or an ancestor was already trained on {seen} of the "
            f"{len(problems)} problems; give the other half, or add --replay for the replay control"
        )
    if cfg.replay and not seen:
        raise InputError(
            f"--replay: --model {cfg.model!r} was trained on none of the problems of half {cfg.half}; leave --replay out"
        )
    teacher_grpo.main(cfg, prepared)


if __name__ == "__main__":
    common.cli(main, Config)
