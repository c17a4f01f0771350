"""The benchmarks made for GPUs run their lines here at toy sizes: nobody should borrow a GPU to find a typo."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = {
    "tests.bench_training": ["| GRPO update | fused |", "| OPD update | formulas |", "| embedded sampler |"],
    "tests.bench_kernels": ["ours, reverse", "ours, forward + backward"],
}


@pytest.mark.parametrize("benchmark", ROWS)
def test_runs_at_toy_sizes(benchmark):
    done = subprocess.run([sys.executable, "-m", benchmark, "--tiny"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ROWS[benchmark]:
        lines = [line for line in done.stdout.splitlines() if row in line]
        assert lines and not any(
            "nan" in line.split("GB")[0].split("ms")[0] or "out of memory" in line for line in lines
        )


def test_gpu_check_runs_its_parts_at_small_sizes():
    """All but those that other tests run with the same code; each passes, and a part that fails fails the command."""
    words = [sys.executable, "-m", "tests.gpu_check", "--only", "attention,chain,updates,resume,two_ranks,vllm,kernels"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    rows = [line for line in done.stdout.split("| part |")[-1].splitlines() if line.startswith("| ")]
    verdicts = {row.split(" | ")[0].strip("| "): row.split(" | ")[1] for row in rows}
    expected = dict.fromkeys(verdicts, "passed") | {"vllm": "passed" if importlib.util.find_spec("vllm") else "not run"}
    assert len(verdicts) == 7 and verdicts == expected and done.returncode == 0, done.stdout + done.stderr[-3000:]
    limited = {**os.environ, "GPU_CHECK_LIMIT": "0.1"}
    broken = subprocess.run([*words[:-1], "attention"], cwd=ROOT, env=limited, capture_output=True, text=True)
    assert broken.returncode == 1 and "| FAILED | not finished after 0 s" in broken.stdout
