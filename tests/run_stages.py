"""Runs every stage for three steps, alone or under torchrun, and writes what must not depend on the number of ranks.

    [torchrun --nproc_per_node=2] tests/run_stages.py OUT STUDENT TEACHER PROBLEMS ENGINE TENSOR_PARALLEL

Batches are cut so that ranks get unequal numbers of micro-batches, and sometimes nothing. Rewards are made up from the
responses, so that groups have spread: random models solve nothing.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import common
import evaluate
import fkl_warmup
import lib.policy
import lib.runs
import opd
import student_grpo
import teacher_grpo
from lib.packing import make_batches

out, student, teacher, problems, engine = sys.argv[1:6]
sampler = dict(engine=engine, tensor_parallel=int(sys.argv[6]))
grpo = dict(prompts_per_step=3, mini_batch_prompts=2, rollouts_per_prompt=3, max_response_tokens=8, kl_coef=0.1)
settings = dict(
    data=problems, exclude=(), max_prompt_tokens=32, lr=1e-3, max_steps=3, micro_batch_tokens=40, save_every=2,
    **sampler,
)  # fmt: skip
runs = {
    "teacher": (teacher_grpo, dict(model=teacher, half="1H", **grpo)),
    "warmup": (fkl_warmup, dict(model=student, teacher=f"{out}/teacher", half="1H", mini_batch_prompts=2,
                                rollouts_per_prompt=2, max_response_tokens=8)),
    "bridge": (opd, dict(model=f"{out}/warmup", teacher=f"{out}/teacher", half="1H", prompts_per_step=4,
                         rollouts_per_prompt=1, passes=2, max_response_tokens=16,
                         activation_checkpointing=True)),
    "student": (student_grpo, dict(model=f"{out}/bridge", half="2H", **grpo)),
}  # fmt: skip

sampled, finish, save = [], lib.runs.Run.finish, lib.runs.Run.save


def made_up_grades(rollouts, verifier):
    for rollout in rollouts:
        rollout.correct = sum(rollout.response_ids) % 2 == 0
    sampled.append([[rollout.problem.id, rollout.sample, rollout.response_ids] for rollout in rollouts])


def finish_and_compare(run, policy, tokenizer):
    """The saved checkpoint, read back by plain transformers, against this rank's shards, bit for bit."""
    finish(run, policy, tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float32).state_dict()
    ours = policy.model.state_dict()
    assert saved.keys() == ours.keys()
    for name, value in ours.items():
        expected = saved[name]
        if isinstance(value, DTensor):
            # FSDP shards the rows; the last rank has fewer of an odd number.
            pieces = expected.chunk(common.world_size())
            expected = pieces[common.rank()] if common.rank() < len(pieces) else expected[:0]
            value = value.to_local()
        assert torch.equal(value, expected), name


def save_and_copy(run, steps, *arguments, **options):
    save(run, steps, *arguments, **options)
    if common.rank() == 0 and steps == 2 and not run.out.name.startswith("again"):
        shutil.copytree(run.partial, run.partial.with_name(f"again-{run.partial.name}"))


teacher_grpo.grade = fkl_warmup.grade = opd.grade = made_up_grades
lib.runs.Run.save = save_and_copy
lib.runs.Run.finish = finish_and_compare
common.start_process()
for name, (stage, options) in runs.items():
    # A rewarded teacher is checked by lineage, so the made-up rewards serve; rewarded finishing would need real ones.
    extra = {"require_finished": False} if stage in (teacher_grpo, student_grpo) else {}
    stage.main(stage.Config(out=f"{out}/{name}", **settings, **options, **extra))


# Each stage again, from what a kill in its third step would have left.
straight = list(sampled)
for name, (stage, options) in runs.items():
    extra = {"require_finished": False} if stage in (teacher_grpo, student_grpo) else {}
    stage.main(stage.Config(out=f"{out}/again-{name}", resume=True, **settings, **options, **extra))

# What is not finite on one rank is seen by all, and none of them steps.
cfg = opd.Config(student, teacher, data="", out="")
policy = lib.policy.load_policy(student, cfg, True)
optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
rollouts = [common.Rollout(None, 0, [2, 4, 3], [5 + i, 6, 1], [0.0] * 3, "stop", "") for i in range(4)]


def step(loss: float, spoil: bool) -> tuple[float, list[torch.Tensor]]:
    for batch in make_batches(rollouts, 8, common.this_device(), None):
        fkl_warmup.sft_loss(policy, batch).backward()
    if spoil:
        gradient = next(parameter.grad for parameter in policy.parameters())
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(torch.nan)
    norm = common.optimizer_step(policy, optimizer, loss, 0.1, 1.0)
    return norm, [value.clone() for _, value in lib.policy.full_weights(policy)]


last = common.rank() == common.world_size() - 1
_, before = step(1.0, False)
for loss, spoil in ((float("inf") if last else 1.0, False), (1.0, last)):
    norm, after = step(loss, spoil)
    assert norm != norm and all(torch.equal(x, y) for x, y in zip(before, after))
norm, after = step(1.0, False)
assert norm > 0 and not all(torch.equal(x, y) for x, y in zip(before, after))

# A frozen model's output matrix is gathered for its forward pass, and freed by release.
if lib.policy.is_sharded(policy):
    frozen = lib.policy.load_policy(student, cfg, trainable=False)
    head = lambda: frozen.model.get_output_embeddings().weight
    with torch.no_grad():
        frozen(make_batches(rollouts, 100, common.this_device(), None)[0], lambda hidden, weight: None)
    assert not isinstance(head(), DTensor)
    lib.policy.release(frozen)
    assert isinstance(head(), DTensor)

evaluate.main(
    evaluate.Config(
        out=f"{out}/report", models=(f"{out}/warmup", f"{out}/student", f"{out}/teacher"), data=(problems,), k=3,
        max_prompt_tokens=32, max_response_tokens=8, **sampler,
    )
)  # fmt: skip
if common.rank() == 0:
    Path(out, "rollouts.json").write_text(json.dumps(straight))
common.exit_process(0)
