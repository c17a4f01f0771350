"""Runs that are killed, stopped, damaged, changed, or meet numbers that are not finite; and what is left of them."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, RUNS, assert_same_weights, grpo, launch, made_up_grades, metrics, record, warmup, weights

import common
import fkl_warmup
import lib.lineage
import lib.policy
import lib.runs
import teacher_grpo
from common import AlreadyFinished, InputError, Stopped


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes half of a tiny run's time."""
    monkeypatch.setattr(lib.runs, "plot_metrics", lambda lines, picture: None)


def interrupt(main, config, step: int, number=None, raises=Killed):
    """Runs `main` until it has computed step number `step`, where it dies or gets a signal, twice."""
    original = lib.runs.Run.log

    def log(run, now, *arguments, **options):
        if now == step and number is None:
            raise Killed
        for _ in range(2 if now == step else 0):
            os.kill(os.getpid(), number)
        original(run, now, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(raises) as error:
        patch.setattr(lib.runs.Run, "log", log)
        main(config)
    return error.value


# Killed and stopped


def kill_stages(tmp_path, student, teacher, problems, kills, engine, *names, timeout=600) -> None:
    """The script compares weights, metrics, samples, lineage and files; also exports and validations."""
    words = (str(tmp_path), student, teacher, problems, str(kills), "0", engine, *names)
    done = launch(1, "tests/kill_stages.py", *words, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert all(done.stdout.count(f"| {name} |") == kills for name in names)


def test_sigkill_then_resume_is_bit_for_bit(student, teacher, problems, tmp_path):
    kill_stages(tmp_path, student, teacher, problems, 2, "torch", "bridge")


@pytest.mark.rest
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_sigkill_at_many_moments_in_every_stage(student, teacher, problems, tmp_path, engine):
    if engine == "vllm":
        pytest.importorskip("vllm")
    kill_stages(tmp_path, student, teacher, problems, 12 if engine == "torch" else 3, engine, *RUNS, timeout=1800)


def test_a_signal_ends_the_step_saves_it_and_the_run_resumes_bit_for_bit(teacher, problems, tmp_path, capfd):
    """One run, stopped by each signal in turn; no state would have been saved without them."""
    straight = grpo(teacher, problems, tmp_path / "straight", epochs=2, save_every=1000)
    teacher_grpo.main(straight)
    config = dataclasses.replace(straight, out=str(tmp_path / "out"), resume=True)
    usual = signal.getsignal(signal.SIGTERM)
    for step, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), start=1):
        error = interrupt(teacher_grpo.main, config, step, number, Stopped)  # the second signal is a copy
        name = signal.Signals(number).name
        assert f"\n{name}: the run stops after this step; another signal ends it at once\n" in capfd.readouterr().err
        assert error.number == number and str(error) == f"stopped by {name} after step {step + 1}, which is saved"
        assert error.__notes__ == [f"the same command with --resume continues from {tmp_path}/out.partial"]
        assert [path.name for path in (tmp_path / "out.partial").glob("state-*")] == [f"state-{step + 1:06d}"]
        assert signal.getsignal(signal.SIGTERM) == usual
    teacher_grpo.main(config)
    assert_same_weights(tmp_path / "straight", tmp_path / "out")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "out")
    assert (tmp_path / "straight/samples.jsonl").read_text() == (tmp_path / "out/samples.jsonl").read_text()
    sessions = record(tmp_path / "out")["sessions"]
    assert [each["first_step"] for each in sessions] == [0, 2, 3, 4]
    assert all(each["packages"]["torch"] and each["code"] and each["hardware"] for each in sessions)


def test_a_later_signal_acts_at_once(teacher, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.runs, "COPY_SECONDS", 0)
    interrupt(teacher_grpo.main, grpo(teacher, problems, tmp_path / "out"), 1, signal.SIGINT, KeyboardInterrupt)


def two_ranks(tmp_path, body: str) -> subprocess.CompletedProcess:
    """Two ranks that run `body` as a stage's main would be run."""
    (tmp_path / "script.py").write_text(
        "import atexit, os, signal, time\nimport torch, common, lib.runs, teacher_grpo\n"
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n    seed: int = 0\n"
        f"def main(cfg):\n{textwrap.indent(textwrap.dedent(body), '    ')}\ncommon.cli(main, Config)\n"
    )
    return launch(2, str(tmp_path / "script.py"))


@pytest.mark.rest
def test_two_ranks_stop_after_the_same_step(teacher, problems, tmp_path):
    """A signal to one rank only, when it has logged its third step."""
    config = grpo(teacher, problems, tmp_path / "out", epochs=2, save_every=1000)
    done = two_ranks(tmp_path, f"""
        log = lib.runs.Run.log
        def signalled(run, step, *arguments, **options):
            log(run, step, *arguments, **options)
            if step == 2 and common.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        lib.runs.Run.log = signalled
        teacher_grpo.main(teacher_grpo.{config!r})
    """)  # fmt: skip
    said = (
        f"\nstopped by SIGUSR1 after step 3, which is saved; the same command with --resume continues from {config.out}"
    )
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert {path.name for path in (tmp_path / "out.partial/state-000003").glob("*.distcp")} >= {
        "__0_0.distcp",
        "__1_0.distcp",
    }


# What is on disk


def test_a_state_counts_once_it_has_loaded(teacher, problems, tmp_path, capsys):
    """Otherwise the one before it, which is there if the run was killed before it was removed; never a fresh start."""
    config, both = grpo(teacher, problems, tmp_path / "cut", resume=True, max_steps=3), tmp_path / "both"
    interrupt(teacher_grpo.main, config, 1)
    shutil.copytree(tmp_path / "cut.partial" / "state-000001", both / "state-000001")
    interrupt(teacher_grpo.main, config, 2)
    shutil.copytree(tmp_path / "cut.partial", both, dirs_exist_ok=True)
    teacher_grpo.main(dataclasses.replace(config, out=str(tmp_path / "straight")))
    for name in ("__0_0.distcp", ".metadata", "run.json"):
        again = shutil.copytree(both, tmp_path / f"{name}.partial")
        os.truncate(again / "state-000002" / name, 100)
        teacher_grpo.main(dataclasses.replace(config, out=str(tmp_path / name)))
        said = capsys.readouterr().out
        assert f"{again}/state-000002 cannot be loaded: " in said and "continuing after step 1\n" in said
        assert_same_weights(tmp_path / "straight", tmp_path / name)
        assert metrics(tmp_path / "straight") == metrics(tmp_path / name)
    os.truncate(tmp_path / "cut.partial" / "state-000002" / ".metadata", 100)
    with pytest.raises(InputError, match="no training state in .*cut.partial can be loaded; delete the directory"):
        teacher_grpo.main(config)
    assert len(metrics(tmp_path / "cut.partial")) == 2


# What may change before a resume


def test_other_weights_or_another_stage_are_not_resumed_with(student, teacher, problems, tmp_path, monkeypatch):
    """Nor anything without --resume. The run died before its first state, and only its logs are there."""
    config = grpo(teacher, problems, tmp_path / "out", resume=True, save_every=1000)
    interrupt(teacher_grpo.main, config, 2)
    with pytest.raises(InputError, match="holds an interrupted run; add --resume"):
        teacher_grpo.main(dataclasses.replace(config, resume=False))
    with pytest.raises(InputError, match="had seed = 0, now it is 1, and lr = 0.01, now it is 0.5; restore its"):
        teacher_grpo.main(dataclasses.replace(config, lr=0.5, seed=1))
    with pytest.raises(InputError, match="had stage = 'teacher_grpo', now it is 'fkl_warmup', and"):
        fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "out", resume=True))
    with monkeypatch.context() as patch:
        lineage = lib.lineage.read_lineage
        patch.setattr(lib.lineage, "read_lineage", lambda model: {**lineage(model), "sha256": "0"})
        with pytest.raises(InputError, match="had model weights = '[0-9a-f]{64}', now it is '0'"):
            teacher_grpo.main(config)
    assert len(metrics(tmp_path / "out.partial")) == 2 and (tmp_path / "out.partial/samples.jsonl").read_text()
    may_change = dict(micro_batch_tokens=40, max_num_seqs=8, kv_cache_gib=1.0, save_every=1, export_every=1)
    teacher_grpo.main(dataclasses.replace(config, **may_change))
    assert [line["step"] for line in metrics(tmp_path / "out")] == [0, 1, 2]


def test_changed_code_and_a_changed_reward_are_not_resumed_with_unless_accepted(teacher, problems, tmp_path, capsys):
    """In the stage's own script, here a copy that nobody has committed, too. Every session's code is recorded."""
    source, reward, script = (ROOT / "teacher_grpo.py").read_text(), tmp_path / "rewards.py", tmp_path / "my_stage.py"

    def run(source: str, **settings) -> None:
        script.write_text(source)
        spec = importlib.util.spec_from_file_location("my_stage", script)
        sys.modules["my_stage"] = stage = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stage)
        settings = dict(resume=True, reward=f"{reward}:length", **settings)
        stage.main(grpo(teacher, problems, tmp_path / "out", stage.Config, **settings))

    reward.write_text("def length(row, response):\n    return len(response)\n")
    interrupt(run, source, 2)
    first = record(tmp_path / "out.partial" / "state-000002")["sessions"][0]["files"]
    assert first["my_stage.py"] == lib.lineage.file_sha256(script)
    assert {"common.py", "kernels.py", "lib/runs.py", "lib/verifier_worker.py"} < first.keys()
    assert not {"opd.py", "evaluate.py", "teacher_grpo.py", "tests/test_resume.py"} & first.keys()

    with pytest.raises(InputError, match="had another my_stage.py .--accept-changes"):
        run(source + "# changed\n")
    reward.write_text("def length(row, response):\n    return -len(response)\n")
    with pytest.raises(InputError, match="had another .*rewards.py:length .--accept"):
        run(source)
    more = source.replace("    lr: float = 1e-6", "    length_coef: float = 0.0  # new\n    lr: float = 1e-6")
    with pytest.raises(InputError, match="length_coef = None, now it is 0.0"):
        run(more)
    run(more, accept_changes=True)
    assert f"continuing with changed my_stage.py, {reward}:length" in capsys.readouterr().out
    second = record(tmp_path / "out")["sessions"][1]["files"]
    for name, path in (("my_stage.py", script), (f"{reward}:length", reward)):
        assert second[name] == lib.lineage.file_sha256(path) != first[name]
    with pytest.raises(AlreadyFinished):
        run(more)
    with pytest.raises(InputError, match="and another my_stage.py"):
        run(source)


def test_a_tracker_gets_the_metrics_and_a_resumed_run_continues_its_run(
    teacher, problems, tmp_path, monkeypatch, capsys
):
    config = grpo(teacher, problems, tmp_path / "out", resume=True, track="trackio")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="--track trackio: the package is not installed; run pip"):
        teacher_grpo.main(config)
    calls = []
    note = lambda name: lambda *arguments, **options: calls.append((name, options))
    fake = SimpleNamespace(__spec__="found", **{name: note(name) for name in ("init", "log", "finish")})
    monkeypatch.setitem(sys.modules, "trackio", fake)
    interrupt(teacher_grpo.main, config, 2)
    teacher_grpo.main(config)
    first, second = (options for name, options in calls if name == "init")
    assert [name for name, _ in calls] == ["init", "log", "log", "finish", "init", "log", "finish"]
    assert [options["step"] for name, options in calls if name == "log"] == [0, 1, 2]
    assert first["name"] == second["name"] == record(tmp_path / "out")["tracker_run"] and second["resume"] == "allow"
    assert first["config"]["lr"] == 0.01
    fake.log = lambda *a, **k: 1 / 0
    teacher_grpo.main(dataclasses.replace(config, out=str(tmp_path / "other")))
    assert capsys.readouterr().out.count("--track trackio: ZeroDivisionError: division by zero; the run continues") == 1


# Losses and gradients that are not finite


def break_losses(monkeypatch, steps: range | set) -> None:
    """Makes the loss of all micro-batches of some steps, and its gradient, nan."""
    forward, log, now = lib.policy.Policy.forward, lib.runs.Run.log, [0]

    def broken(policy, batch, head):
        factor = torch.nan if now[0] in steps else 1.0
        return forward(policy, batch, lambda hidden, weight: head(hidden * factor, weight))

    def count(run, step, *arguments, **options):
        now[0] = step + 1
        log(run, step, *arguments, **options)

    monkeypatch.setattr(lib.policy.Policy, "forward", broken)
    monkeypatch.setattr(lib.runs.Run, "log", count)


@pytest.mark.parametrize("stage", ["teacher", "warmup", "bridge"])
def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(
    stage, student, teacher, problems, tmp_path, monkeypatch
):
    monkeypatch.setattr(teacher_grpo, "grade", made_up_grades)
    break_losses(monkeypatch, {1})
    out = tmp_path / "out"
    script, config = RUNS[stage](student, teacher, problems, out, max_steps=3, export_every=1)
    script.main(config)
    lines = metrics(out)
    skipped = [line["skipped_steps"] for line in lines]
    assert skipped[0] == skipped[2] == 0 < skipped[1] and lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    assert_same_weights(out / "step-000001", out / "step-000002")
    before, after = weights(out / "step-000002"), weights(out)
    assert all(after[name].isfinite().all() for name in after) and any(
        (before[name] != after[name]).any() for name in after
    )
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_three_skipped_steps_in_a_row_end_the_run_and_leave_the_batch(teacher, problems, tmp_path, monkeypatch):
    """They are counted across a resume."""
    config, partial = grpo(teacher, problems, tmp_path / "out", epochs=2), tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        break_losses(patch, {1, 2, 3})
        interrupt(teacher_grpo.main, config, 3)
    break_losses(monkeypatch, {0})  # 0 counts from the resume: the resumed run's first step, step 3 in all
    with pytest.raises(
        InputError, match=f"in 3 steps in a row, the last of which is step 3; .*{partial}/skipped-000003"
    ):
        teacher_grpo.main(dataclasses.replace(config, resume=True))
    [batch] = partial.glob("skipped-*")
    assert {"problem", "prompt_ids", "response_ids", "logprobs", "text"} <= json.loads(batch.read_text())[0].keys()
    assert len(metrics(partial)) == 4


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_optimizer_step_is_taken_or_not_as_a_whole(broken):
    """A finite loss with a broken gradient, and the other way round; a momentum that must not move either."""
    policy = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    moments = lambda: [value for state in optimizer.state.values() for value in state.values()]
    for finite in (True, True, False):
        before = [value.detach().clone() for value in (*policy.parameters(), *moments())]
        policy(torch.ones(1, 3)).sum().backward()
        if broken == "gradient" and not finite:
            policy.weight.grad[0, 0] = torch.inf
        loss = float("nan") if broken == "loss" and not finite else 1.0
        assert (common.optimizer_step(policy, optimizer, loss, 0.1, 1.0) > 0) == finite
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, (*policy.parameters(), *moments()), strict=True))


# How processes exit


@pytest.mark.rest
def test_a_rank_that_fails_ends_the_others_that_wait_for_it(tmp_path):
    """The others wait in a collective for as long as three hours; vLLM's finalizer would have the failed one join them."""
    done = two_ranks(tmp_path, """
        atexit.register(lambda: time.sleep(3600))  # as vLLM's, which waits until all ranks leave the group
        print("started", flush=True)
        if common.rank() == 1:
            raise RuntimeError("out of memory, say")
        common.barrier()
        print("the barrier was passed")
    """)  # fmt: skip
    assert done.returncode != 0 and done.stdout.count("started") == 2 and "passed" not in done.stdout
    assert "RuntimeError: out of memory, say" in done.stderr


@pytest.mark.rest
def test_ranks_that_have_finished_exit_with_status_0_on_a_busy_machine(tmp_path):
    """At the interpreter's own shutdown a thread of the process group sometimes aborted."""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for _ in range(3):
            done = two_ranks(tmp_path, """
                common.all_sum({"x": float(common.rank())})
                torch.nn.Linear(64, 64)(torch.ones(8, 64)).sum().backward()
                print("done", flush=True)
            """)  # fmt: skip
            assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-3000:]
    finally:
        for process in load:
            process.kill()
