"""The benchmarks made for GPUs run their lines here at toy sizes: nobody should borrow a GPU to find a typo."""

import importlib.util
import json
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


def test_bench_trl_measures_our_side(tmp_path):
    """TRL needs an environment of its own, so the other side is left out, and the table says so."""
    table = tmp_path / "cpu.md"
    words = [sys.executable, "tests/bench_trl.py", "--rounds", "1", "--warmup", "0", "--steps", "1", "--out", table]
    words += ["--cases", "GRPO 8 x 8", "OPD 8 x 8"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in table.read_text().splitlines()[4:]}
    assert list(rows) == ["GRPO 8 x 8", "OPD 8 x 8"]
    for ours, theirs, products, *_ in rows.values():
        assert theirs == "not run" and float(ours) > 0 and float(products) > 0


def test_bench_trl_takes_a_checkpoint_and_gsm8k(tmp_path, student):
    """The tiny student has no chat template and few letters, which our side does not mind."""
    rows = [{"question": f"{number}+{number}", "answer": f"So it is\n#### {2 * number}"} for number in range(100)]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    words = [sys.executable, "tests/bench_trl.py", "--model", student, "--data", data, "--cases", "OPD 64 x 1"]
    words += ["--rounds", "1", "--warmup", "0", "--steps", "1", "--tokens", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "\n| OPD 64 x 1 | " in done.stdout, done.stdout + done.stderr[-3000:]


def test_bench_authors_compares_the_same_loss(tmp_path):
    """With a plain loss in the place of the authors', whose code is not ours to copy."""
    path = tmp_path / "src/opd/losses.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def compute_reverse_kl_loss(teacher, student):\n"
        "    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)\n"
        "    return (student.exp() * (student - teacher)).sum(-1).mean(), len(student)\n"
    )
    words = [sys.executable, "-m", "tests.bench_authors", "--authors", tmp_path, "--tiny", "--repeats", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loss, gradient = (float(cell) for cell in done.stdout.splitlines()[0].strip("| ").split(" | ")[-2:])
    assert loss < 1e-5 and gradient < 1e-4


def test_bench_sampling_runs_each_sampler(tmp_path):
    words = [
        sys.executable,
        "-m",
        "tests.bench_sampling",
        "--repeats",
        "1",
        "--tokens",
        "4",
        "--out",
        tmp_path / "cpu.md",
    ]
    samplers = ["embedded", "generate"] + ["vllm"] * (importlib.util.find_spec("vllm") is not None)
    done = subprocess.run([*words, "--samplers", *samplers], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (tmp_path / "cpu.md").read_text().strip().splitlines()[4:]
    assert len(rows) == len(samplers) and all(float(row.split(" | ")[1].split()[0]) > 0 for row in rows)
