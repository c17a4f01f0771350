"""Small settings for the stages, and what their outputs are compared by; shared by the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import fkl_warmup
import opd
import student_grpo
import teacher_grpo

ROOT = Path(__file__).parent.parent
STAGES = ["teacher", "warmup", "bridge", "student"]
SMALL = dict(exclude=(), max_prompt_tokens=64, max_response_tokens=8, lr=1e-2, save_every=1)


def grpo(model, data, out, config=teacher_grpo.Config, **settings):
    sizes = dict(prompts_per_step=4, mini_batch_prompts=2, rollouts_per_prompt=4, epochs=1, require_finished=False)
    return config(model=model, data=data, out=str(out), **{**SMALL, **sizes, **settings})


def warmup(model, teacher, data, out, **settings):
    settings = {**SMALL, "mini_batch_prompts": 3, "rollouts_per_prompt": 2, **settings}
    return fkl_warmup.Config(model=model, teacher=teacher, data=data, out=str(out), **settings)


def distill(model, teacher, data, out, **settings):
    settings = {**SMALL, "prompts_per_step": 3, "rollouts_per_prompt": 2, **settings}
    return opd.Config(model=model, teacher=teacher, data=data, out=str(out), **settings)


# Of each stage: its script, and a Config of a few steps.
RUNS = {
    "teacher": lambda s, t, data, out, **k: (teacher_grpo, grpo(t, data, out, **{"epochs": 2, **k})),
    "warmup": lambda s, t, data, out, **k: (fkl_warmup, warmup(s, t, data, out, **{"epochs": 2, **k})),
    "bridge": lambda s, t, data, out, **k: (opd, distill(s, t, data, out, **k)),
    "student": lambda s, t, data, out, **k: (student_grpo, grpo(s, data, out, student_grpo.Config, **{"epochs": 3, **k})),
}  # fmt: skip


def launch(ranks: int, *words: str, timeout: int = 400) -> subprocess.CompletedProcess:
    """`python WORDS` on one rank, `torchrun WORDS` on several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(directory) -> list[dict]:
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


def made_up_grades(rollouts, grader):
    """Rewards with spread: random models solve nothing, and GRPO without advantages would show nothing."""
    for rollout in rollouts:
        rollout.correct = sum(rollout.response_ids) % 2 == 0


def record(directory) -> dict:
    return json.loads((Path(directory) / "run.json").read_text())


def cached_rows(directory) -> list[dict]:
    """All rows of a directory of teacher rollouts, in order."""
    shards = sorted(Path(directory).glob("shard-*.jsonl"))
    return [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]


CHAIN = dict(micro_batch_tokens=60, lr=1e-3)
CHAIN_GRPO = dict(**CHAIN, kl_coef=0.1)


def run_chain(out, student, teacher, problems) -> None:
    """All four stages, with teacher and bridge on 1H, and Stage 3 on 2H."""
    teacher_grpo.main(grpo(teacher, problems, f"{out}/teacher", half="1H", **CHAIN_GRPO))
    fkl_warmup.main(warmup(student, f"{out}/teacher", problems, f"{out}/warmup", half="1H", **CHAIN))
    opd.main(distill(f"{out}/warmup", f"{out}/teacher", problems, f"{out}/bridge", half="1H", **CHAIN))
    student_grpo.main(grpo(f"{out}/bridge", problems, f"{out}/student", student_grpo.Config, **CHAIN_GRPO))


def grade_with(monkeypatch, function=lambda rollouts, grader: None):
    """Made-up grades in all stages, and then `function(rollouts, grader)`, which may change them."""
    for module in (teacher_grpo, fkl_warmup, opd):
        monkeypatch.setattr(module, "grade", lambda *both: made_up_grades(*both) or function(*both))
