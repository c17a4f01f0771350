"""The benchmarks made for GPUs run their lines here at toy sizes: nobody should borrow a GPU to find a typo."""

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
