"""The tools made for GPUs run their lines here at toy sizes: nobody should borrow a GPU to find a typo."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT, STAGES

from tests.tools import gpu_check


@pytest.mark.rest
def test_gpu_check_runs_its_parts_at_small_sizes():
    words = [sys.executable, "-m", "tests.tools.gpu_check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.split("| part |")[-1].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line[:2] == "| "]
    verdicts = {part: verdict for part, verdict, *_ in rows}
    with_vllm = "passed" if importlib.util.find_spec("vllm") else "not run"
    expected = dict.fromkeys(verdicts, "passed") | {"vllm": with_vllm, "dummy_weights": with_vllm}
    assert len(verdicts) == 7 and verdicts == expected and done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_a_part_that_overruns_keeps_what_it_printed_and_leaves_no_process():
    child = "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    printed, status = gpu_check.run_limited([sys.executable, "-c", child], 2)
    assert status is None
    for _ in range(50):  # a dead child stays in the table until init has read its status
        try:
            state = open(f"/proc/{int(printed)}/stat").read().split()[2] if sys.platform == "linux" else "Z"
            os.kill(int(printed), 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is alive")


def test_a_part_that_fails_is_said_with_its_last_line(monkeypatch):
    monkeypatch.setattr(gpu_check, "run_limited", lambda words, seconds: ("a\nRuntimeError: b\n", 1))
    assert gpu_check.run_part("attention", 1)[:2] == ("FAILED", "RuntimeError: b")


def test_each_stage_with_vllm_is_a_process_of_its_own(monkeypatch):
    """vLLM's allocator takes one engine that sleeps in a process."""
    started = []
    monkeypatch.setattr(gpu_check, "WITHOUT_VLLM", None)
    monkeypatch.setattr(
        gpu_check, "run_apart", lambda *words: (started.append(words[-4:]) or int(words[-1] == "report"), [])
    )
    passed, figure, _ = gpu_check.vllm()
    assert started == [("chain", "vllm", "1", stage) for stage in (*STAGES, "report")]
    assert not passed and figure == "exit status 1 report"
    found = importlib.util.find_spec("vllm")
    if found:
        worker = open(os.path.join(os.path.dirname(found.origin), "v1/worker/gpu_worker.py")).read()
        assert "CuMem allocator can only be used for one instance per process." in worker


def test_all_packages_that_are_missing_are_named_first():
    hidden = "tyro", "math-verify", "latex2sympy2_extended"
    code = f"""
import importlib.metadata as metadata, runpy, sys
found = metadata.version
def version(name):
    if name in {hidden}:
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
sys.modules.update(dict.fromkeys(("tyro", "math_verify", "latex2sympy2_extended", "datasets"), None))
runpy.run_module("tests.tools.gpu_check", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    names = ", ".join(sorted(hidden, key=(ROOT / "requirements-cpu.txt").read_text().index))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {names} cannot be imported; "), done.stderr
