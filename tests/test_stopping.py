"""Signals that ask a run to stop: what is saved, what is said, with which status it ends, and that a resume goes on."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from test_stages import assert_same_weights, command_line, grpo, metrics, warmup

import fkl_warmup
import lib.stopping
import teacher_grpo
from lib.stopping import Stopping

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def signalled(words: list[str], partial: Path, steps: int, send) -> tuple[int, list[str]]:
    """Starts a command and calls `send(process)` once it has logged `steps` steps; its status and lines of stderr."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while lines_in(partial / "metrics.jsonl") < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    send(process)
    _, said = process.communicate(timeout=120)
    return process.returncode, said.splitlines()


def saved_step(sentence: str, name: str, partial: Path) -> int:
    """The step of which a run's last sentence says that it is saved; it is the only state there is."""
    match = re.fullmatch(
        rf"stopped by {name} after step (\d+), which is saved; the same command with --resume continues", sentence
    )
    assert match, sentence
    assert [path.name for path in partial.glob("state-*")] == [f"state-{int(match[1]):06d}"]
    return int(match[1])


def test_a_signal_ends_the_step_saves_it_and_the_run_resumes_bit_for_bit(teacher, problems, tmp_path):
    """One run, stopped by each signal in turn; no state would have been saved without them."""
    straight = grpo(teacher, problems, tmp_path / "straight", passes=20, save_every=1000)
    teacher_grpo.main(straight)
    config = dataclasses.replace(straight, out=str(tmp_path / "out"), resume=True)
    partial, done = tmp_path / "out.partial", 0
    for number, name in [(INT, "Ctrl-C"), (TERM, "SIGTERM"), (USR1, "SIGUSR1")]:
        words = command_line(teacher_grpo, config)
        status, said = signalled(words, partial, done + 2, lambda process: process.send_signal(number))
        assert status == 128 + number and not [line for line in said if "Traceback" in line]
        before, done = done, saved_step(said[-1], name, partial)
        assert before + 2 <= done < 60 and len(metrics(partial)) == done
    teacher_grpo.main(config)
    assert_same_weights(tmp_path / "straight", tmp_path / "out")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "out")
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("straight", "out")]
    assert samples[0] == samples[1]


def workers(torchrun: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"teacher_grpo.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_two_ranks_stop_after_the_same_step_and_our_sentence_is_the_last(teacher, problems, tmp_path):
    """A signal to one of the ranks only, and then Ctrl-C to torchrun, which prints a traceback of its own."""
    config = grpo(teacher, problems, tmp_path / "out", passes=100, save_every=1000, max_steps=30, resume=True)
    partial = tmp_path / "out.partial"

    def launch(config):
        return [sys.executable, *TORCHRUN, *command_line(teacher_grpo, config)[1:]]

    status, said = signalled(launch(config), partial, 2, lambda run: os.kill(workers(run)[1], USR1))
    assert status == 1 and "Traceback" in "".join(said)
    done = saved_step(said[-1], "SIGUSR1", partial)
    status, said = signalled(launch(config), partial, done + 2, lambda run: run.send_signal(INT))
    assert status == 1 and "Traceback" in "".join(said)
    assert done < saved_step(said[-1], "Ctrl-C", partial) < 30
    for each in (config, dataclasses.replace(config, out=str(tmp_path / "straight"))):
        finished = subprocess.run(launch(each), capture_output=True, text=True, cwd=ROOT, timeout=200)
        assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_weights(tmp_path / "straight", tmp_path / "out")
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "out")


# Where there is no step to finish

SELF_SIGNAL = """
import os, signal, sys, threading
sys.path.insert(0, {root!r})
import {script}, common, lib.rollouts
owner, name = {owner}, {name!r}
function = getattr(owner, name)
def stop(*arguments):
    function(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()
setattr(owner, name, stop)
common.cli({script}.main, {script}.Config)
"""


def stopped_after(owner: str, name: str, words: list[str]) -> subprocess.CompletedProcess:
    """A stage's command line that gets SIGTERM when it has called the named function for the first time."""
    script = Path(words[1]).stem
    code = SELF_SIGNAL.format(root=str(ROOT), script=script, owner=owner, name=name)
    return subprocess.run([sys.executable, "-c", code, *words[2:]], capture_output=True, text=True, timeout=120)


def test_stopped_while_the_teacher_samples_the_rollouts_are_kept(student, teacher, problems, tmp_path):
    straight = warmup(student, teacher, problems, tmp_path / "straight", max_sequences=6)
    fkl_warmup.main(straight)
    config = dataclasses.replace(straight, out=str(tmp_path / "out"), resume=True)
    done = stopped_after("lib.rollouts.RolloutCache", "append", command_line(fkl_warmup, config))
    assert done.returncode == 128 + TERM and "Traceback" not in done.stderr
    sentence = f"stopped by SIGTERM; the same command with --resume continues from what {tmp_path}/out.partial holds"
    assert done.stderr.splitlines()[-1] == sentence
    [shard] = (tmp_path / "out.partial" / "teacher_rollouts").glob("shard-??????")
    written = shard.stat().st_mtime_ns
    fkl_warmup.main(config)
    assert (tmp_path / "out" / "teacher_rollouts" / shard.name).stat().st_mtime_ns == written
    assert_same_weights(tmp_path / "straight", tmp_path / "out")


def test_stopped_an_evaluation_keeps_its_samples(student, teacher, test_problems, tmp_path):
    words = f"--models {student} {teacher} --data {test_problems} --k 2 --max-prompt-tokens 64 --max-response-tokens 8"
    words = [sys.executable, str(ROOT / "evaluate.py"), *words.split(), "--out", str(tmp_path / "report")]
    done = stopped_after("lib.samples.SampleFile", "finish", words)
    assert done.returncode == 128 + TERM and "Traceback" not in done.stderr
    sentence = f"stopped by SIGTERM; the same command goes on from what {tmp_path}/report holds"
    assert done.stderr.splitlines()[-1] == sentence
    kept = tmp_path / "report" / "student" / "test.jsonl"
    written = kept.stat().st_mtime_ns
    assert subprocess.run(words, capture_output=True, timeout=120).returncode == 0
    assert kept.stat().st_mtime_ns == written and (tmp_path / "report" / "results.json").exists()


# A second signal


@pytest.mark.parametrize(
    "received, torchrun, left",
    [
        ([(0, INT), (2, INT)], False, True),
        ([(0, INT), (0.1, INT)], False, False),  # a copy, from a launcher
        ([(0, INT), (0.1, TERM)], True, False),
        ([(0, INT), (2, TERM)], True, True),  # what torchrun sends after a second Ctrl-C
        ([(0, INT), (2, TERM)], False, False),
        ([(0, TERM), (2, TERM)], True, False),
        ([(0, USR1), (2, TERM), (300, TERM)], True, False),
        ([(0, TERM), (2, INT)], False, True),
    ],
)
def test_which_second_signal_leaves_at_once(received, torchrun, left, monkeypatch, capsys):
    now, exits = [100.0], []
    monkeypatch.setattr(lib.stopping, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(lib.stopping.os, "_exit", exits.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stopping = Stopping("all is kept")
    stopping.patient = True
    for seconds, number in received:
        now[0] = 100 + seconds
        stopping._receive(number)
    assert stopping.number == received[0][1]
    assert exits == ([128 + stopping.number] if left else [])
    assert ("stopped at once by a second Ctrl-C; all is kept" in capsys.readouterr().err) == left


def test_a_second_ctrl_c_leaves_although_the_main_thread_hangs(tmp_path):
    """It waits inside PyTorch, as for a rank that never answers, where Python runs no signal handler."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import common, lib.stopping, torch.distributed
lib.stopping.COPY_SECONDS = 0
with lib.stopping.Stopping("all is kept") as stopping:
    stopping.patient = True
    print("waiting", flush=True)
    torch.distributed.HashStore().wait(["never"], common.TIMEOUT)
"""
    words = [sys.executable, "-u", "-c", code]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(INT)
    assert process.stdout.readline().startswith("Ctrl-C: this step is finished and saved first")
    process.send_signal(INT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines()[-1] == "stopped at once by a second Ctrl-C; all is kept"


def test_handlers_are_put_back_and_what_was_ignored_stays_ignored():
    before = {number: signal.getsignal(number) for number in (INT, TERM, USR1)}
    signal.signal(USR1, signal.SIG_IGN)
    try:
        with Stopping("all is kept") as stopping:
            assert signal.getsignal(USR1) == signal.SIG_IGN and signal.getsignal(TERM) != before[TERM]
            os.kill(os.getpid(), USR1)
            assert stopping.number == 0
        assert signal.getsignal(TERM) == before[TERM] and signal.getsignal(INT) == before[INT]
    finally:
        signal.signal(USR1, before[USR1])
