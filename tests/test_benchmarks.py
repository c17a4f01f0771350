"""The tools made for GPUs run their lines here at toy sizes: nobody should borrow a GPU to find a typo."""

import importlib.util
import subprocess
import sys

import pytest
from helpers import ROOT
from test_verifier import wait_until_gone

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
    printed, status = gpu_check.run_limited([sys.executable, "-c", child], 5)
    assert status is None and wait_until_gone([int(printed)], 5)


def test_a_part_that_fails_is_said_with_its_last_line(monkeypatch):
    monkeypatch.setattr(gpu_check, "run_limited", lambda words, seconds: ("a\nRuntimeError: b\n", 1))
    assert gpu_check.run_part("attention", 1)[:2] == ("FAILED", "RuntimeError: b")
