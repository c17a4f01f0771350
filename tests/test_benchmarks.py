"""The tools made for GPUs run their lines here at toy sizes: nobody should borrow a GPU to find a typo."""

import importlib.util
import os
import subprocess
import sys

import pytest
from helpers import ROOT


def gpu_check(*words: str, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "tests.tools.gpu_check", *words]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.rest
def test_gpu_check_runs_its_parts_at_small_sizes():
    """Each part passes, and one that fails makes the command fail."""
    done = gpu_check()
    lines = done.stdout.split("| part |")[-1].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line[:2] == "| "]
    verdicts = {part: verdict for part, verdict, *_ in rows}
    expected = dict.fromkeys(verdicts, "passed") | {"vllm": "passed" if importlib.util.find_spec("vllm") else "not run"}
    assert len(verdicts) == 6 and verdicts == expected and done.returncode == 0, done.stdout + done.stderr[-3000:]
    broken = gpu_check("--only", "attention", GPU_CHECK_LIMIT="0.1")
    assert broken.returncode == 1 and "| FAILED | not finished after 0 s" in broken.stdout
