"""The solutions of docs/course.md's exercises: each is applied to a copy of the tree and runs there for a few steps."""

import dataclasses
import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, distill, grpo, metrics
from test_plan import plan as make_plan

from common import Problem, Rollout
from experiments import toy
from kernels import fused_linear_kl_reference
from lib.rewards import Reward

EXERCISES = ROOT / "experiments/exercises"
STEPS = f"{EXERCISES / '6-steps.py'}:right_steps"


@pytest.fixture
def apply(tmp_path):
    """A function that applies the solution of an exercise to a copy of the tree, and gives the copy's directory."""

    def in_a_copy(number: int) -> Path:
        [patch] = EXERCISES.glob(f"{number}-*.patch")
        tree = tmp_path / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "results", "tests", "__pycache__"))
        # Git would take the paths of a patch for those of a repository around the copy, so it must not look for one.
        alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        done = subprocess.run(["git", "apply", str(patch)], cwd=tree, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return tree

    return in_a_copy


def stage(tree: Path, name: str):
    """The stage `name` of a tree as a module."""
    specification = importlib.util.spec_from_file_location(f"{name}_of_exercise", tree / f"{name}.py")
    module = sys.modules[specification.name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("number, checkpoint", [(1, "full/raw/bridge"), (2, "1H/rl/opd_only")])
def test_the_demo_has_one_more_row(number, checkpoint, apply):
    """Exercise 1 adds the bridge from the raw teacher, and exercise 2 OPD of the raw student from the RL'd teacher."""
    plain, changed = (make_plan("demo", cwd=tree, RUNS="runs/none") for tree in (ROOT, apply(number)))
    path = f"runs/none/seed0/{checkpoint}"
    assert f"--out {path} " in changed and f"--out {path} " not in plain
    models, labels = map(shlex.split, re.search(r"--models (.*?) --labels (.*?) --data", changed).groups())
    assert path in models and checkpoint in labels and len(models) == len(labels)


def loss_and_gradient(module):
    """The reverse KL that an exercise's `exact_kl_loss` logs for random hidden states; then pairs of loss and gradient with
    respect to them: its own, and by the formulas those of the reverse and of the forward KL.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 4), (26, 4), (7, 6), (26, 6)
    hidden, weight, *states = (torch.randn(shape, generator=generator) for shape in shapes)
    targets = torch.arange(7)
    hidden.requires_grad_()
    student = lambda batch, loss_fn: loss_fn(hidden, weight)
    teacher = SimpleNamespace(hidden_states=lambda batch: states)
    result = module.exact_kl_loss(student, teacher, SimpleNamespace(targets=targets), 26)
    formulas = [fused_linear_kl_reference(hidden, weight, *states, targets, way).loss for way in ("reverse", "forward")]
    return result.kl.sum(), *((loss, torch.autograd.grad(loss, hidden)[0]) for loss in (result.loss, *formulas))


def check_steps(module, student, teacher, problems, out) -> None:
    module.main(module.Config(**vars(distill(student, teacher, problems, out, max_steps=3))))
    lines = metrics(out)
    assert len(lines) == 3 and all(math.isfinite(line["reverse_kl"]) and not line["skipped_steps"] for line in lines)


def test_forward_kl_on_the_students_own_states(apply, student, teacher, problems, tmp_path):
    module = stage(apply(3), "opd")
    _, ours, reverse, forward = loss_and_gradient(module)
    torch.testing.assert_close(ours, forward)
    assert (ours[0] - reverse[0]).abs() > 0.1
    check_steps(module, student, teacher, problems, tmp_path / "out")


def test_generalised_jsd(apply, student, teacher, problems, tmp_path):
    """At 1/2 it is symmetric and bounded by log 2; at its ends it goes in the two directions of the KL."""
    module = stage(apply(5), "opd")
    logged, ours, reverse, forward = loss_and_gradient(module)
    torch.testing.assert_close(logged, reverse[0].detach())
    assert 0 < ours[0] < 7 * math.log(2)
    for beta, limit in ((1e-3, forward), (1 - 1e-3, reverse)):
        module.BETA = beta
        _, (loss, gradient), *_ = loss_and_gradient(module)
        torch.testing.assert_close(loss / 1e-3, limit[0], rtol=0.05, atol=0)
        assert torch.cosine_similarity(gradient.flatten(), limit[1].flatten(), dim=0) > 0.99
    check_steps(module, student, teacher, problems, tmp_path / "out")


def test_dr_grpo_divides_by_a_constant(apply, teacher, problems, tmp_path, monkeypatch):
    """The number of responses times the longest one that is allowed, however long they are."""
    module = stage(apply(4), "teacher_grpo")
    denominators, train = [], module.train_mini_batch
    recording = lambda *arguments: denominators.append(arguments[3]) or train(*arguments)
    monkeypatch.setattr(module, "train_mini_batch", recording)
    settings = vars(grpo(teacher, problems, tmp_path / "out", normalize_by_std=False, reward=STEPS, max_steps=3))
    module.main(module.Config(**settings))
    assert len(denominators) == 6 and set(denominators) == {2 * 4 * 8}  # prompts, responses to each, longest response
    assert all(line["frac_tokens_trained"] < 1 and math.isfinite(line["loss"]) for line in metrics(tmp_path / "out"))


def test_the_shaped_reward_pays_for_each_right_step():
    row = {"problem": f"{toy.TASK}7*8+3-4*2", "answer": "0"}
    responses = {
        "Carefully:7*8=6+3=9-4=5*2=0 \\boxed{0}": 1.0,
        "Roughly:7*8=6+3=9-4=4*2=8 \\boxed{8}": 0.25,
        "Roughly:7*8=5+3=9-4=5*2=0 \\boxed{0}": 0.5,
        "Guess: \\boxed{0}": 0.5,
        "Hmm,7*8+3-4*2=7*8+3-4*2=7*8+": 0.0,
    }
    problem = Problem("one", row["problem"], row["answer"], row)
    rollouts = [Rollout(problem, 0, [4], [5], [-1.0], "stop", text) for text in responses]
    rollouts.append(dataclasses.replace(rollouts[0], finish_reason="length"))
    assert [value for *_, value in Reward(STEPS).check(rollouts)] == [*responses.values(), 0.0]


def test_the_course_names_every_solution():
    text = (ROOT / "docs/course.md").read_text(encoding="utf-8")
    solutions = {path.name for path in EXERCISES.iterdir() if path.is_file()}
    assert solutions == set(re.findall(r"experiments/exercises/([\w.-]+\.(?:patch|py))", text))
