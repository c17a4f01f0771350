"""Runs that are killed, stopped, damaged, changed, or meet numbers that are not finite; and what is left of them."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    RUNS,
    assert_same_weights,
    command_line,
    grade_with,
    grpo,
    launch,
    made_up_grades,
    metrics,
    warmup,
    weights,
)

import common
import fkl_warmup
import lib.lineage
import lib.runs
import opd
import student_grpo
import teacher_grpo
from common import AlreadyFinished, InputError, Stopped


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes half of a tiny run's time."""
    monkeypatch.setattr(lib.runs, "plot_metrics", lambda lines, picture: None)


def record(directory: Path) -> dict:
    return json.loads((directory / "run.json").read_text())


def interrupt(main, config, step: int, how=None, raises=Killed):
    """Runs `main` until it has computed step number `step`, and there calls `how` in the place of logging it."""

    original = lib.runs.Run.log

    def log(run, now, *arguments, **options):
        if now == step:
            how(run) if how else None
            if raises is Killed:
                raise Killed
        original(run, now, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(raises) as error:
        patch.setattr(lib.runs.Run, "log", log)
        main(config)
    return error.value


# Killed and stopped


def kill_stages(tmp_path, student, teacher, problems, kills, engine, *names, timeout=600) -> None:
    words = [str(ROOT / "tests/kill_stages.py"), str(tmp_path), student, teacher, problems, str(kills), "0", engine]
    done = subprocess.run([sys.executable, *words, *names], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert all(done.stdout.count(f"| {name} |") == kills for name in names)


def test_sigkill_then_resume_is_bit_for_bit(student, teacher, problems, tmp_path):
    """The script compares weights, metrics, samples, lineage and files; also exports and validations."""
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
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in signals]
    for step, number in enumerate(signals, start=1):
        twice = lambda run, number=number: [os.kill(os.getpid(), number) for _ in range(2)]  # the second is a copy
        error = interrupt(teacher_grpo.main, config, step, twice, raises=Stopped)
        name = signal.Signals(number).name
        assert f"\n{name}: the run stops after this step; another signal ends it at once\n" in capfd.readouterr().err
        assert error.number == number and str(error) == f"stopped by {name} after step {step + 1}, which is saved"
        assert error.__notes__ == [f"the same command with --resume continues from {tmp_path}/out.partial"]
        assert [path.name for path in (tmp_path / "out.partial").glob("state-*")] == [f"state-{step + 1:06d}"]
        assert [signal.getsignal(number) for number in signals] == handlers
    teacher_grpo.main(config)
    assert_same_weights(tmp_path / "straight", tmp_path / "out")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "out")
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("straight", "out")]
    assert samples[0] == samples[1]
    sessions = record(tmp_path / "out")["sessions"]
    assert [each["first_step"] for each in sessions] == [0, 2, 3, 4]
    assert all(
        each["packages"]["torch"] and each["code"] and each["hardware"] and each["ranks"] == 1 for each in sessions
    )


def test_a_later_signal_acts_at_once(teacher, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.runs, "COPY_SECONDS", 0)
    twice = lambda run: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    error = interrupt(
        teacher_grpo.main, grpo(teacher, problems, tmp_path / "out", epochs=2), 1, twice, KeyboardInterrupt
    )
    assert error.__notes__ == [f"the same command with --resume continues from {tmp_path}/out.partial"]


@pytest.mark.rest
def test_two_ranks_stop_after_the_same_step(teacher, problems, tmp_path):
    """A signal to one rank only, when it has logged its third step; then a resume."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import common, lib.runs, teacher_grpo
        log = lib.runs.Run.log
        def signalled(run, step, *arguments, **options):
            log(run, step, *arguments, **options)
            if step == 2 and common.rank() == 1 and "--resume" not in sys.argv:
                os.kill(os.getpid(), signal.SIGUSR1)
        lib.runs.Run.log = signalled
        common.cli(teacher_grpo.main, teacher_grpo.Config)
    """))  # fmt: skip
    config = grpo(teacher, problems, tmp_path / "out", epochs=2, save_every=1000)
    done = launch(2, str(script), *command_line(teacher_grpo, config)[2:])
    assert done.returncode == 1 and "\nstopped by SIGUSR1 after step 3, which is saved" in done.stderr, done.stderr
    for name in ("out", "straight"):
        cfg = dataclasses.replace(config, out=str(tmp_path / name), resume=True)
        done = launch(2, *command_line(teacher_grpo, cfg)[1:])
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(tmp_path / "straight", tmp_path / "out")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "out")


# What is on disk


def test_a_state_counts_once_it_has_loaded(teacher, problems, tmp_path, capsys):
    """Otherwise the one before it, which is there if the run was killed before it was removed; never a fresh start."""
    config, both = grpo(teacher, problems, tmp_path / "cut", epochs=1, resume=True), tmp_path / "both"
    interrupt(teacher_grpo.main, config, 1)
    shutil.copytree(tmp_path / "cut.partial" / "state-000001", both / "state-000001")
    interrupt(teacher_grpo.main, config, 2)
    shutil.copytree(tmp_path / "cut.partial", both, dirs_exist_ok=True)
    teacher_grpo.main(grpo(teacher, problems, tmp_path / "straight", epochs=1))
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


def test_logs_are_kept_when_a_run_ends_before_its_first_state(teacher, problems, tmp_path):
    config, partial = grpo(teacher, problems, tmp_path / "out", epochs=1, save_every=1000), tmp_path / "out.partial"
    error = interrupt(teacher_grpo.main, config, 2)
    assert error.__notes__ == [f"the same command with --resume continues from {partial}"]
    assert len(metrics(partial)) == 2 and (partial / "samples.jsonl").read_text()
    with pytest.raises(InputError, match="holds an interrupted run; add --resume"):
        teacher_grpo.main(config)
    assert len(metrics(partial)) == 2
    teacher_grpo.main(dataclasses.replace(config, resume=True))
    assert [line["step"] for line in metrics(tmp_path / "out")] == [0, 1, 2]


# What may change before a resume


def test_other_weights_or_another_stage_are_not_resumed_with(student, teacher, problems, tmp_path, monkeypatch):
    config = grpo(teacher, problems, tmp_path / "out", epochs=1, resume=True)
    interrupt(teacher_grpo.main, config, 2)
    with pytest.raises(InputError, match="had seed = 0, now it is 1, and lr = 0.01, now it is 0.5; restore its"):
        teacher_grpo.main(dataclasses.replace(config, lr=0.5, seed=1))
    with pytest.raises(InputError, match="had stage = 'teacher_grpo', now it is 'fkl_warmup', and"):
        fkl_warmup.main(warmup(student, teacher, problems, tmp_path / "out", resume=True))
    lineage = lib.lineage.read_lineage
    monkeypatch.setattr(lib.lineage, "read_lineage", lambda model: {**lineage(model), "sha256": "0"})
    with pytest.raises(InputError, match="had model weights = '[0-9a-f]{64}', now it is '0'"):
        teacher_grpo.main(config)
    monkeypatch.undo()
    teacher_grpo.main(
        dataclasses.replace(
            config, micro_batch_tokens=40, max_num_seqs=8, kv_cache_gib=1.0, save_every=1, export_every=1
        )
    )


def load_script(path: Path, source: str) -> types.ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_changed_code_and_a_changed_reward_are_not_resumed_with_unless_accepted(teacher, problems, tmp_path, capsys):
    """In the stage's own script, here a copy that nobody has committed, too. Every session's code is recorded."""
    source, reward, script = (ROOT / "teacher_grpo.py").read_text(), tmp_path / "rewards.py", tmp_path / "my_stage.py"

    def run(source: str, **settings) -> None:
        stage = load_script(script, source)
        settings = dict(epochs=1, resume=True, reward=f"{reward}:length", **settings)
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


FAKE = """
import json
def init(**options): write("init", options)
def log(values, step): write("log", step)
def finish(): write("finish", None)
def write(*what):
    with open({path!r}, "a") as file: file.write(json.dumps(what) + "\\n")
"""


def test_a_tracker_gets_the_metrics_and_a_resumed_run_continues_its_run(
    teacher, problems, tmp_path, monkeypatch, capsys
):
    (tmp_path / "trackio.py").write_text(FAKE.format(path=str(tmp_path / "calls")))
    config = grpo(teacher, problems, tmp_path / "out", epochs=1, resume=True, track="trackio")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="--track trackio: the package is not installed; run pip"):
        teacher_grpo.main(config)
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio")
    interrupt(teacher_grpo.main, config, 2)
    teacher_grpo.main(config)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [name if name != "log" else f"log {what}" for name, what in calls] == [
        "init", "log 0", "log 1", "finish", "init", "log 2", "finish"
    ]  # fmt: skip
    first, second = (what for name, what in calls if name == "init")
    assert first["name"] == second["name"] == record(tmp_path / "out")["tracker_run"] and second["resume"] == "allow"
    assert first["config"]["lr"] == 0.01
    sys.modules["trackio"].log = lambda *a, **k: 1 / 0
    teacher_grpo.main(dataclasses.replace(config, out=str(tmp_path / "other")))
    assert capsys.readouterr().out.count("--track trackio: ZeroDivisionError: division by zero; the run continues") == 1
    with pytest.raises(AlreadyFinished):
        teacher_grpo.main(dataclasses.replace(config, track=None))


# What a record says


def test_what_is_not_on_record_is_said(student, teacher, problems, tmp_path, capsys):
    teacher_grpo.main(grpo(student, problems, tmp_path / "own", half="1H"))
    fkl_warmup.main(warmup(student, str(tmp_path / "own"), problems, tmp_path / "heir", half="1H"))
    note = "no recorded history: held-out labels cannot be checked"
    for directory, said in (
        (tmp_path / "own", "C1: the teacher was trained with RL, in which the mean reward went from"),
        (tmp_path / "heir", f"C1: the teacher has no RL of its own; its ancestor {tmp_path}/own was trained with RL"),
        (student, "C1: the teacher has no recorded RL stage, so C1 is unchecked."),
    ):
        opd.report_c1(lib.lineage.read_lineage(str(directory)))
        assert said in capsys.readouterr().out
        lib.lineage.report_missing_history("it", lib.lineage.read_lineage(str(directory)))
        assert (f"it: {note}\n" in capsys.readouterr().out) == (directory == student)
    student_grpo.main(grpo(student, problems, tmp_path / "third", student_grpo.Config, max_steps=1))
    assert f"--model {student}: {note}\n" in capsys.readouterr().out


# Output


def test_a_progress_bar_in_a_file_is_a_line_now_and_then(monkeypatch):
    """Two bars at a time, too: neither moves the cursor to write over the other."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with common.progress_bar(100, "outer", "step") as bar, common.progress_bar(100, "inner", "step") as inner:
        bar._time = inner._time = lambda: now[0]
        for _ in range(100):
            now[0] += 1
            bar.update()
            inner.update()
    *lines, last = sys.stderr.getvalue().split("\n")
    assert not last and 2 * 4 <= len(lines) <= 2 * 6
    assert all(re.fullmatch(r"(outer|inner): +\d+% \d+/100 \[[^\r\x1b]+\]", line) for line in lines), lines


# Losses and gradients that are not finite

STEPS = {  # what of each stage's loss can be made to break
    "teacher": (teacher_grpo, "grpo_loss"),
    "warmup": (fkl_warmup, "forward_kl_loss"),
    "bridge": (opd, "exact_kl_loss"),
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


@pytest.mark.parametrize("stage", STEPS)
def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(
    stage, student, teacher, problems, tmp_path, monkeypatch
):
    script, config = RUNS[stage](student, teacher, problems, tmp_path / "out", max_steps=3)
    states = []
    save = lib.runs.Run.save

    def snapshot(run, steps, policy, optimizer, *rest, **options):
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        states.append([p.detach().clone() for p in policy.parameters()] + moments)
        save(run, steps, policy, optimizer, *rest, **options)

    monkeypatch.setattr(lib.runs.Run, "save", snapshot)
    grade_with(monkeypatch, made_up_grades)
    break_loss(monkeypatch, stage, {1}, float("nan"))
    script.main(dataclasses.replace(config, **({"require_finished": False} if stage == "teacher" else {})))
    lines = metrics(tmp_path / "out")
    skipped = [line["skipped_steps"] for line in lines]
    assert skipped[0] == skipped[2] == 0 < skipped[1] and lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    assert len(states[0]) == len(states[1]) and all(torch.equal(a, b) for a, b in zip(states[0], states[1]))
    assert any(not torch.equal(a, b) for a, b in zip(states[1], states[2]))
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_three_skipped_steps_in_a_row_end_the_run_and_leave_the_batch(teacher, problems, tmp_path, monkeypatch):
    """They are counted across a resume."""
    config, partial = grpo(teacher, problems, tmp_path / "out", epochs=2), tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        break_loss(patch, "teacher", {1, 2, 3}, float("inf"))
        interrupt(teacher_grpo.main, config, 3)
    break_loss(monkeypatch, "teacher", {0}, float("nan"))  # the first step of the resumed run, which is step 3
    with pytest.raises(
        InputError, match="in 3 steps in a row, the last of which is step 3; look at its rollouts"
    ) as error:
        teacher_grpo.main(dataclasses.replace(config, resume=True))
    [path] = partial.glob("skipped-*")
    assert path.name == "skipped-000003.json" and str(path) in str(error.value)
    assert {"problem", "prompt_ids", "response_ids", "logprobs", "text"} <= json.loads(path.read_text())[0].keys()
    assert len(metrics(partial)) == 4


@pytest.mark.parametrize("broken", ["loss", "gradient"])
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
        policy.weight.grad[0, 0] = torch.inf
    norm = common.optimizer_step(policy, optimizer, float("nan") if broken == "loss" else 1.0, 0.1, 1.0)
    assert norm != norm and all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after))


# How processes exit


def two_ranks(tmp_path: Path, body: str) -> subprocess.CompletedProcess:
    """Two ranks that run `body` as a stage's main would be run."""
    (tmp_path / "script.py").write_text(
        "import atexit, time, torch, common\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Config:\n    seed: int = 0\n"
        f"def main(cfg):\n{textwrap.indent(textwrap.dedent(body), '    ')}\ncommon.cli(main, Config)\n"
    )
    return launch(2, str(tmp_path / "script.py"), timeout=120)


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
                work = torch.nn.Linear(64, 64)
                work(torch.ones(8, 64)).sum().backward()
                print("done", flush=True)
            """)  # fmt: skip
            assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-3000:]
    finally:
        for process in load:
            process.kill()
