"""What two ranks are asked to do, alone or under torchrun; batches are cut so that they get unequal numbers of them.

[torchrun --nproc_per_node=2] tests/run_ranks.py OUT STUDENT TEACHER PROBLEMS TASK, and a TASK is
chain ENGINE TENSOR_PARALLEL [STAGE], or small, or bfloat16
"""

import functools
import shutil
import sys

import torch
from helpers import RUNS, STAGES, made_up_grades, run_chain
from torch.distributed.tensor import DTensor

import common
import evaluate
import fkl_warmup
import lib.packing
import lib.policy
import opd
import teacher_grpo
from lib.runs import Run

out, student, teacher, problems, task, *rest = sys.argv[1:]
CUDA = torch.cuda.is_available()  # gpu_check runs the chain on GPUs, with responses that are longer
LONGER = 16 if CUDA else 1
GRPO = dict(rollouts_per_prompt=3, prompts_per_step=3, kl_coef=0.1)


def run(stage: str, name: str, student: str | None, teacher: str | None, **settings) -> None:
    script, config = RUNS[stage](student, teacher, problems, f"{out}/{name}", max_prompt_tokens=32, **settings)
    script.main(config)


def chain(engine: str, tensor_parallel: str, only: str | None = None) -> None:
    """Every stage for three steps, again from the state of its second step, and an evaluation; or `only` one of these.

    The engine "vllm-dummy" is vLLM that starts with made-up weights, which the first sync has to replace.
    """
    if engine == "vllm-dummy":
        import vllm

        engine, vllm.LLM = "vllm", functools.partial(vllm.LLM, load_format="dummy")
    sampler = dict(engine=engine, tensor_parallel=int(tensor_parallel), kv_cache_gib=4.0 if CUDA else None)
    short, long = (dict(max_response_tokens=tokens * LONGER) for tokens in (8, 16))
    trained = {stage: f"{out}/{stage}" for stage in STAGES}
    runs = {
        "teacher": (None, teacher, dict(half="1H", mini_batch_prompts=2, **GRPO, **short)),
        "warmup": (student, trained["teacher"], dict(half="1H", mini_batch_prompts=2, **short)),
        "bridge": (trained["warmup"], trained["teacher"], dict(half="1H", prompts_per_step=4, rollouts_per_prompt=1,
                                                               activation_checkpointing=True, **long)),
        "student": (trained["bridge"], None, dict(half="2H", mini_batch_prompts=2, **GRPO, **short)),
    }  # fmt: skip
    save = Run.save

    def save_and_copy(run, steps, *arguments, **options):
        save(run, steps, *arguments, **options)
        if common.rank() == 0 and steps == 2 and not run.out.name.startswith("again") and not only:
            shutil.copytree(run.partial, run.partial.with_name(f"again-{run.partial.name}"))

    Run.save = save_and_copy
    settings = dict(lr=1e-4, max_steps=3, micro_batch_tokens=40 * LONGER, save_every=2, **sampler)
    for stage, (model, source, options) in runs.items():
        if only in (None, stage):
            run(stage, stage, model, source, **settings, **options)
    for stage, (model, source, options) in () if only else runs.items():  # as if killed in the third step
        run(stage, f"again-{stage}", model, source, resume=True, **settings, **options)
    if only in (None, "report"):
        models = tuple(trained[stage] for stage in ("warmup", "student", "teacher"))
        report = dict(models=models, data=(problems,), k=3, max_prompt_tokens=32, **short)
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
    settings = dict(
        max_response_tokens=12, max_steps=1, micro_batch_tokens=60, engine="torch", activation_checkpointing=True
    )
    grpo = dict(**GRPO, mini_batch_prompts=3)
    stages = {"teacher": dict(half="1H", **grpo), "warmup": dict(rollouts_per_prompt=3),
              "bridge": dict(rollouts_per_prompt=3),
              "student": dict(half="2H", micro_batch_tokens=1, **grpo)}  # fmt: skip  # nine batches for two ranks
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

    teacher_grpo.make_batches = fkl_warmup.make_batches = opd.make_batches = watched_batches
    lib.policy.shard, common.optimizer_step = lambda policy, compute: shard(policy, dtype), recorded_step
    for name, options in stages.items():
        for dtype in (None, torch.bfloat16):
            run(name, f"{name}-{dtype}", student, teacher, **settings | options)
        exact, rounded = gradients[None], gradients[torch.bfloat16]
        error = ((exact - rounded).norm() / exact.norm()).item()
        common.print0(f"{name}: gradient's norm {exact.norm():.4f}, relative error of bfloat16 {error:.4f}")
        assert exact.norm() > 1e-3 and 1e-4 < error < 0.08, (name, error)
    assert max(map(len, counts)) > 1 and common.all_max({"empty": any(0 in count for count in counts)})["empty"]


common.start_process()
for module in (teacher_grpo, fkl_warmup, opd):
    module.grade = made_up_grades
if task == "chain":
    chain(*rest)
    if len(rest) == 2:
        faults()
elif task == "small":
    run_chain(out, student, teacher, problems)
else:
    bfloat16()
common.exit_process(0)
