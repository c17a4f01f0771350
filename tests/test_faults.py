"""Runs that are killed, run out of disk, find their own files damaged, or meet numbers that are none."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from test_stages import RUNS, assert_same_weights, grpo, metrics, warmup, weights

import common
import fkl_warmup
import lib.data
import lib.lineage
import lib.runs
import opd
import teacher_grpo
from common import InputError

ROOT = Path(__file__).parent.parent


def kill_stages(tmp_path, student, teacher, problems, kills, seed, engine="torch", timeout=600) -> str:
    words = [
        str(ROOT / "tests/kill_stages.py"),
        str(tmp_path),
        student,
        teacher,
        problems,
        str(kills),
        str(seed),
        engine,
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


def test_killed_at_random_moments_and_resumed_every_stage_ends_the_same(student, teacher, problems, tmp_path):
    """The script compares weights, metrics, rollouts, lineage and files, bit for bit; and what it says on a full disk."""
    printed = kill_stages(tmp_path, student, teacher, problems, 60 if os.environ.get("TEST_LONG") else 20, seed=0)
    for stage in RUNS:
        assert printed.count(f"| {stage} | ") >= 2
    for what, step in [("the training state of step 4", 2), ("the checkpoint", 6)]:
        assert f"error: {what} could not be written to /full.partial (" in printed
        assert f"File too large); make room, then --resume to continue after step {step}`" in printed.replace(
            " (os error 27)", ""
        )


@pytest.mark.skipif(not os.environ.get("TEST_LONG"), reason="make test-long: engines of vLLM take seconds each")
def test_killed_with_vllm(student, teacher, problems, tmp_path):
    pytest.importorskip("vllm")
    kill_stages(tmp_path, student, teacher, problems, 8, seed=1, engine="vllm", timeout=1800)


class Killed(Exception):
    pass


@pytest.fixture
def cut_short(student, teacher, problems, tmp_path, monkeypatch):
    """A run that died in its third step, when it had saved two, with the state of the first put back beside the second."""
    config = grpo(teacher, problems, tmp_path / "cut", passes=1)
    accept, log = lib.runs.Run._accept_state, lib.runs.Run.log

    def keep_all(run, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(lib.runs.shutil, "rmtree", lambda *a, **k: None)
            accept(run, *arguments)

    def die(run, step, *arguments, **options):
        if step == 2:
            raise Killed
        log(run, step, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lib.runs.Run, "_accept_state", keep_all)
        patch.setattr(lib.runs.Run, "log", die)
        with pytest.raises(Killed):
            teacher_grpo.main(config)
    partial = tmp_path / "cut.partial"
    assert sorted(path.name for path in partial.glob("state-*")) == ["state-000001", "state-000002"]
    return dataclasses.replace(config, resume=True), partial


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit flipped in the weights": lambda state: flip(state / "__0_0.distcp"),
    "cut short": lambda state: os.truncate(state / "__0_0.distcp", 1000),
    "a file gone": lambda state: (state / ".metadata").unlink(),
    "record half-written": lambda state: os.truncate(state / "run.json", 100),
    "record changed": lambda state: (state / "run.json").write_text((state / "run.json").read_text().replace("0", "1", 1)),
    "hashes gone": lambda state: (state / "SHA256SUMS").unlink(),
    "hashes cut short": lambda state: os.truncate(state / "SHA256SUMS", 80),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_never_resumed_from(damage, cut_short, capfd):
    config, partial = cut_short
    for state in ("state-000002", "state-000001"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=partial / state, check=True)
    DAMAGE[damage](partial / "state-000002")
    run = lib.runs.Run(config, {"model": config.model})
    assert run.steps_done == 1 and run.state.name == "state-000001"
    run.__exit__(None, None, None)
    assert [line["step"] for line in metrics(partial)] == [0]
    DAMAGE[damage](partial / "state-000001")
    with pytest.raises(
        InputError, match=r"no training state in .*cut.partial is whole, .* delete the directory"
    ) as error:
        lib.runs.Run(config, {"model": config.model})
    assert "\n" not in str(error.value) and (partial / "state-000002").exists()


def test_after_a_damaged_state_the_run_ends_the_same(cut_short, problems, teacher, tmp_path):
    config, partial = cut_short
    flip(partial / "state-000002" / "__0_0.distcp")
    teacher_grpo.main(config)
    teacher_grpo.main(grpo(teacher, problems, tmp_path / "straight", passes=1))
    assert_same_weights(tmp_path / "straight", tmp_path / "cut")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "cut")


def test_other_weights_under_the_old_name_are_not_resumed_with(cut_short, student):
    config, partial = cut_short
    lineage = lib.lineage.read_lineage

    def changed(model):
        return {**lineage(model), "sha256": "0"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.lineage, "read_lineage", changed)
        with pytest.raises(InputError, match="--resume: --model .* has other weights than in the run in "):
            lib.runs.Run(config, {"model": config.model})
    with pytest.raises(InputError, match="holds a run of teacher_grpo.py, not of fkl_warmup.py"):
        lib.runs.Run(warmup(student, config.model, config.data, config.out, resume=True), {"model": config.model})


# Numbers that are none

STEPS = {  # what of each stage's loss can be made to break
    "teacher": (teacher_grpo, "grpo_loss"),
    "warmup": (fkl_warmup, "forward_kl_loss"),
    "bridge": (opd, "exact_kl_loss"),
    "student": (teacher_grpo, "grpo_loss"),
}


def break_loss(monkeypatch, stage: str, steps: range | set, how: float) -> None:
    """Makes the stage's loss `how` in all micro-batches of some steps, with a gradient to match."""
    module, name = STEPS[stage]
    compute, now = getattr(module, name), {"step": 0}
    log = lib.runs.Run.log

    def broken(*arguments):
        result = compute(*arguments)
        if now["step"] not in steps:
            return result
        if name == "grpo_loss":
            return result[0] * how, {**result[1], "loss": result[0].detach() * how}
        return result._replace(loss=result.loss * how)

    def count(run, step, *arguments, **options):
        now["step"] = step + 1
        log(run, step, *arguments, **options)

    monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(lib.runs.Run, "log", count)


@pytest.mark.parametrize("stage", RUNS)
def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(
    stage, student, teacher, problems, tmp_path, monkeypatch
):
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", max_steps=3)
    states = []
    save = lib.runs.Run.save

    def snapshot(run, steps, policy, optimizer, trained_on):
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        states.append([p.detach().clone() for p in policy.parameters()] + moments)
        save(run, steps, policy, optimizer, trained_on)

    monkeypatch.setattr(lib.runs.Run, "save", snapshot)
    for module in (teacher_grpo, fkl_warmup, opd):
        monkeypatch.setattr(module, "grade", lambda rollouts, _: [setattr(r, "correct", sum(r.response_ids) % 2 == 0) for r in rollouts])  # fmt: skip
    break_loss(monkeypatch, stage, {1}, float("nan"))
    script.main(dataclasses.replace(config, **({"require_finished": False} if stage in ("teacher", "student") else {})))
    lines = metrics(tmp_path / "out")
    skipped = [line["skipped_steps"] for line in lines]
    assert skipped[0] == skipped[2] == 0 < skipped[1] and lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    assert len(states[0]) == len(states[1]) and all(torch.equal(a, b) for a, b in zip(states[0], states[1]))
    assert any(not torch.equal(a, b) for a, b in zip(states[1], states[2]))
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("stage", RUNS)
def test_skipped_again_and_again_the_run_stops_and_leaves_the_batch(
    stage, student, teacher, problems, tmp_path, monkeypatch
):
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", save_every=20)
    break_loss(monkeypatch, stage, range(100), float("inf"))
    with pytest.raises(
        InputError, match="not finite in 3 steps in a row, the last of them step 2, whose rollouts"
    ) as error:
        script.main(config)
    [path] = (tmp_path / "out.partial").glob("skipped-*")
    assert path.name == "skipped-000002.json" and str(path) in str(error.value) and "\n" not in str(error.value)
    batch = json.loads(path.read_text())
    assert {"problem", "prompt_ids", "response_ids", "logprobs", "text", "finish_reason"} <= batch[0].keys()
    assert len(metrics(tmp_path / "out.partial")) == 3


def test_skipped_steps_in_a_row_are_counted_across_a_resume(student, teacher, problems, tmp_path, monkeypatch):
    config = grpo(teacher, problems, tmp_path / "out", passes=2)
    break_loss(monkeypatch, "teacher", {1, 2, 3}, float("nan"))
    log = lib.runs.Run.log

    def die(run, step, *arguments, **options):
        if step == 3:
            raise Killed
        log(run, step, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lib.runs.Run, "log", die)
        with pytest.raises(Killed):
            teacher_grpo.main(config)
    monkeypatch.undo()
    break_loss(monkeypatch, "teacher", {0}, float("nan"))  # the first step of the resumed run, which is step 3
    with pytest.raises(InputError, match="in 3 steps in a row, the last of them step 3"):
        teacher_grpo.main(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize("broken", ["loss", "gradient", "overflow"])
def test_an_optimizer_step_is_taken_or_not_as_a_whole(broken):
    """A finite loss with a broken gradient, and the other way round; a momentum that must not move either."""
    policy = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    for _ in range(2):
        policy(torch.ones(1, 3)).sum().backward()
        assert common.optimizer_step(policy, optimizer, 1.0, 0.1, 1.0) > 0
    before = [p.detach().clone() for p in policy.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    policy(torch.ones(1, 3)).sum().backward()
    if broken != "loss":
        policy.weight.grad[0, 0] = torch.nan if broken == "gradient" else torch.inf
    norm = common.optimizer_step(policy, optimizer, float("nan") if broken == "loss" else 1.0, 0.1, 1.0)
    assert norm != norm and all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after))


# The way out of a process


def failing_rank(tmp_path: Path, body: str) -> tuple[subprocess.CompletedProcess, float]:
    """Two ranks that run `body` as a stage's main would be run; what they said, and how many seconds it took."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from dataclasses import dataclass\n"
        "import torch, common\n"
        "@dataclass\nclass Config:\n    seed: int = 0\n"
        f"def main(cfg):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "common.cli(main, Config)\n"
    )
    began = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done, time.monotonic() - began


@pytest.mark.parametrize("vllm", [False, True], ids=["", "with vLLM's finalizer"])
def test_a_rank_that_fails_ends_the_others_that_wait_for_it(vllm, tmp_path):
    """The others wait in a collective for as long as three hours; vLLM's finalizer would have the failed one join them."""
    finalizer = """
        import atexit
        atexit.register(lambda: time.sleep(3600))  # as vLLM's, which waits until all ranks leave the group
    """
    body = f"""{finalizer if vllm else ""}
        print("started", flush=True)
        if common.rank() == 1:
            raise RuntimeError("out of memory, say")
        common.barrier()
        print("the barrier was passed")
    """
    done, seconds = failing_rank(tmp_path, body)
    assert done.returncode != 0 and done.stdout.count("started") == 2 and "passed" not in done.stdout
    assert "RuntimeError: out of memory, say" in done.stderr
    assert seconds < 60


def test_ranks_that_have_finished_exit_with_status_0_on_a_busy_machine(tmp_path):
    """At the interpreter's own shutdown a thread of the process group sometimes aborted; results/faults has fifty runs."""
    body = """
        common.all_sum({"x": float(common.rank())})
        work = torch.nn.Linear(64, 64)
        work(torch.ones(8, 64)).sum().backward()
        print("done", flush=True)
    """
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for _ in range(int(os.environ.get("EXIT_RUNS", 3))):
            done, _ = failing_rank(tmp_path, body)
            assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-3000:]
    finally:
        for process in load:
            process.kill()
