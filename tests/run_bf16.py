"""Gradients of every stage's first update on two ranks, in bfloat16 as on GPUs and in float32, from the same rollouts.

    torchrun --nproc_per_node=2 tests/run_bf16.py OUT STUDENT TEACHER PROBLEMS

Activations are computed twice, an update has several micro-batches, and one rank has fewer of them than the other. The
samples are the same because the embedded engine samples in float32 either way.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.distributed.tensor import DTensor

import common
import fkl_warmup
import lib.packing
import lib.policy
import opd
import student_grpo
import teacher_grpo

out, student, teacher, problems = sys.argv[1:]
settings = dict(
    data=problems, exclude=(), max_prompt_tokens=32, max_response_tokens=12, max_steps=1, micro_batch_tokens=60,
    activation_checkpointing=True, engine="torch",
)  # fmt: skip
grpo = dict(prompts_per_step=3, mini_batch_prompts=3, rollouts_per_prompt=3, require_finished=False, kl_coef=0.1)
stages = {
    "teacher": (teacher_grpo, dict(model=teacher, half="1H", **grpo)),
    "warmup": (fkl_warmup, dict(model=student, teacher=teacher, mini_batch_prompts=3, rollouts_per_prompt=3)),
    "bridge": (opd, dict(model=student, teacher=teacher, prompts_per_step=3, rollouts_per_prompt=3)),
    "student": (student_grpo, dict(model=student, half="2H", **grpo)),
}
shard, optimizer_step = lib.policy.shard, common.optimizer_step
computed_in, gradients, shapes = None, {}, []


def shard_in(policy, compute):
    shard(policy, computed_in)


def recorded_step(policy, *arguments):
    whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in policy.parameters()]
    assert {p.grad.dtype for p in policy.parameters()} == {torch.float32}  # summed and applied in float32 either way
    gradients[stage, computed_in] = torch.cat([gradient.flatten() for gradient in whole])
    return optimizer_step(policy, *arguments)


def made_up_grades(rollouts, verifier):
    for rollout in rollouts:
        rollout.correct = sum(rollout.response_ids) % 2 == 0


def watched_batches(*arguments):
    batches = make_batches(*arguments)
    shapes.append([len(batch.targets) for batch in batches])
    return batches


make_batches = lib.packing.make_batches
teacher_grpo.make_batches = fkl_warmup.make_batches = opd.make_batches = watched_batches
lib.policy.shard, common.optimizer_step = shard_in, recorded_step
teacher_grpo.grade = fkl_warmup.grade = opd.grade = made_up_grades
common.start_process()
for stage, (script, options) in stages.items():
    for computed_in in (None, torch.bfloat16):
        script.main(script.Config(out=f"{out}/{stage}-{computed_in}", **settings, **options))
    exact, rounded = (gradients[stage, dtype] for dtype in (None, torch.bfloat16))
    error = ((exact - rounded).norm() / exact.norm()).item()
    common.print0(f"{stage}: gradient's norm {exact.norm():.4f}, relative error of bfloat16 {error:.4f}")
    assert exact.norm() > 1e-3 and 1e-4 < error < 0.08, (stage, error)
assert max(map(len, shapes)) > 1 and common.all_max({"empty": any(0 in counts for counts in shapes)})["empty"]
common.exit_process(0)
