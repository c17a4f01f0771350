"""What two ranks are asked to do, alone or under torchrun; batches are cut so that they get unequal numbers of them.

[torchrun --nproc_per_node=2] tests/run_ranks.py OUT STUDENT TEACHER PROBLEMS {chain ENGINE TENSOR_PARALLEL [STAGE] | bfloat16}
"""

import functools
import json
import shutil
import sys
from pathlib import Path

import torch
from helpers import STAGES, made_up_grades
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import common
import evaluate
import fkl_warmup
import lib.packing
import lib.policy
import opd
import student_grpo
import teacher_grpo
from lib.runs import Run

out, student, teacher, problems, task, *rest = sys.argv[1:]
SCRIPTS = dict(zip(STAGES, (teacher_grpo, fkl_warmup, opd, student_grpo)))
CUDA = torch.cuda.is_available()  # gpu_check runs the chain on GPUs, with responses that are longer
LONGER = 16 if CUDA else 1
GRPO = dict(rollouts_per_prompt=3, prompts_per_step=3, kl_coef=0.1, require_finished=False)
COMMON = dict(data=problems, exclude=(), max_prompt_tokens=32)


def grade_with(function) -> None:
    teacher_grpo.grade = fkl_warmup.grade = opd.grade = function


def chain(engine: str, tensor_parallel: str, only: str | None = None) -> None:
    """Every stage for three steps, again from the state of its second step, and an evaluation; or `only` one of these.

    The engine "vllm-dummy" is vLLM that starts with made-up weights, which the first sync has to replace.
    """
    if engine == "vllm-dummy":
        import vllm

        engine, vllm.LLM = "vllm", functools.partial(vllm.LLM, load_format="dummy")
    sampler = dict(engine=engine, tensor_parallel=int(tensor_parallel), kv_cache_gib=4.0 if CUDA else None)
    settings = dict(**COMMON, lr=1e-4, max_steps=3, micro_batch_tokens=40 * LONGER, save_every=2, **sampler)
    grpo = dict(**GRPO, mini_batch_prompts=2, max_response_tokens=8 * LONGER)
    runs = {
        "teacher": dict(model=teacher, half="1H", **grpo),
        "warmup": dict(model=student, teacher=f"{out}/teacher", half="1H", mini_batch_prompts=2, rollouts_per_prompt=2,
                       max_response_tokens=8 * LONGER),
        "bridge": dict(model=f"{out}/warmup", teacher=f"{out}/teacher", half="1H", prompts_per_step=4, epochs=2,
                       rollouts_per_prompt=1, max_response_tokens=16 * LONGER, activation_checkpointing=True),
        "student": dict(model=f"{out}/bridge", half="2H", **grpo),
    }  # fmt: skip
    sampled, finish, save = [], Run.finish, Run.save

    def grade(rollouts, grader):
        made_up_grades(rollouts, grader)
        sampled.append([[rollout.problem.id, rollout.sample, rollout.response_ids] for rollout in rollouts])

    def finish_and_compare(run, policy, tokenizer):
        """The saved checkpoint, read back by plain transformers, against this rank's shards, bit for bit."""
        finish(run, policy, tokenizer)
        saved = AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float32).state_dict()
        ours = policy.model.state_dict()
        assert saved.keys() == ours.keys()
        for name, value in ours.items():
            expected = saved[name]
            if isinstance(value, DTensor):  # FSDP shards the rows; the last rank has fewer of an odd number
                pieces = expected.chunk(common.world_size())
                expected = pieces[common.rank()] if common.rank() < len(pieces) else expected[:0]
                value = value.to_local()
            assert torch.equal(value.cpu(), expected), name

    def save_and_copy(run, steps, *arguments, **options):
        save(run, steps, *arguments, **options)
        if common.rank() == 0 and steps == 2 and not run.out.name.startswith("again") and not only:
            shutil.copytree(run.partial, run.partial.with_name(f"again-{run.partial.name}"))

    grade_with(grade)
    Run.save, Run.finish = save_and_copy, finish_and_compare
    for name, options in runs.items():
        if only in (None, name):
            SCRIPTS[name].main(SCRIPTS[name].Config(out=f"{out}/{name}", **settings, **options))
    if common.rank() == 0:
        Path(out, "rollouts.json").write_text(json.dumps(sampled))
    for name, options in () if only else runs.items():  # from what a kill in the third step would have left
        SCRIPTS[name].main(SCRIPTS[name].Config(out=f"{out}/again-{name}", resume=True, **settings, **options))
    if only not in (None, "report"):
        return
    models = tuple(f"{out}/{name}" for name in ("warmup", "student", "teacher"))
    report = dict(models=models, data=(problems,), k=3, max_prompt_tokens=32, max_response_tokens=8 * LONGER)
    evaluate.main(evaluate.Config(out=f"{out}/report", **report, **sampler))


def faults() -> None:
    """What is not finite on one rank is seen by all, and none of them steps; and a frozen model's matrix is freed."""
    cfg = opd.Config(student, teacher, data="", out="")
    policy = lib.policy.load_policy(student, cfg, True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    rollouts = [common.Rollout(None, 0, [2, 4, 3], [5 + i, 6, 1], [0.0] * 3, "stop", "") for i in range(4)]

    def step(loss: float, spoil: bool) -> tuple[float, list[torch.Tensor]]:
        for batch in lib.packing.make_batches(rollouts, 8, common.this_device(), None):
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

    if lib.policy.is_sharded(policy):  # an output matrix is gathered for a forward pass
        frozen = lib.policy.load_policy(student, cfg, trainable=False)
        with torch.no_grad():
            frozen(lib.packing.make_batches(rollouts, 100, common.this_device(), None)[0], lambda hidden, weight: None)
        assert not isinstance(frozen.model.get_output_embeddings().weight, DTensor)
        lib.policy.release(frozen)
        assert isinstance(frozen.model.get_output_embeddings().weight, DTensor)


def bfloat16() -> None:
    """Gradients of every stage's first update, in bfloat16 as on GPUs and in float32, from the same rollouts.

    Activations are computed twice, an update has several micro-batches, and one rank has fewer of them than the other.
    The samples are the same because the embedded engine samples in float32 either way.
    """
    settings = dict(**COMMON, max_response_tokens=12, max_steps=1, micro_batch_tokens=60, engine="torch")
    settings["activation_checkpointing"] = True
    grpo, distill = dict(**GRPO, mini_batch_prompts=3), dict(model=student, teacher=teacher, rollouts_per_prompt=3)
    stages = {
        "teacher": dict(model=teacher, half="1H", **grpo), "warmup": dict(mini_batch_prompts=3, **distill),
        "bridge": dict(prompts_per_step=3, **distill), "student": dict(model=student, half="2H", **grpo),
    }  # fmt: skip
    shard, optimizer_step, make_batches = lib.policy.shard, common.optimizer_step, lib.packing.make_batches
    gradients, counts = {}, []

    def recorded_step(policy, *arguments):
        whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in policy.parameters()]
        assert {p.grad.dtype for p in policy.parameters()} == {torch.float32}  # summed and applied in float32
        gradients[dtype] = torch.cat([gradient.flatten() for gradient in whole])
        return optimizer_step(policy, *arguments)

    def watched_batches(*arguments):
        batches = make_batches(*arguments)
        counts.append([len(batch.targets) for batch in batches])
        return batches

    grade_with(made_up_grades)
    teacher_grpo.make_batches = fkl_warmup.make_batches = opd.make_batches = watched_batches
    lib.policy.shard, common.optimizer_step = lambda policy, compute: shard(policy, dtype), recorded_step
    for name, options in stages.items():
        for dtype in (None, torch.bfloat16):
            SCRIPTS[name].main(SCRIPTS[name].Config(out=f"{out}/{name}-{dtype}", **settings, **options))
        exact, rounded = gradients[None], gradients[torch.bfloat16]
        error = ((exact - rounded).norm() / exact.norm()).item()
        common.print0(f"{name}: gradient's norm {exact.norm():.4f}, relative error of bfloat16 {error:.4f}")
        assert exact.norm() > 1e-3 and 1e-4 < error < 0.08, (name, error)
    assert max(map(len, counts)) > 1 and common.all_max({"empty": any(0 in count for count in counts)})["empty"]


common.start_process()
if task == "chain":
    chain(*rest)
    if len(rest) == 2:
        faults()
else:
    bfloat16()
common.exit_process(0)
