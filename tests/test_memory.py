"""The memory plan: parameter counts against real models, sums against hand arithmetic, and --dry-run."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
from conftest import tiny_model
from test_distributed import ROOT, launch

import lib.engines
import lib.memory
import teacher_grpo
from common import InputError
from experiments import hours


def test_counts_are_those_of_real_models_and_of_the_published_sizes():
    for options in (dict(), dict(tied=False), dict(family="Llama")):
        model = tiny_model(**options)
        assert lib.memory.size_of(model.config).parameters == sum(p.numel() for p in model.parameters())
    billions = {name: lib.memory.size_of(config).parameters / 1e9 for name, config in hours.MODELS.items()}
    published = {
        "Qwen3-0.6B": 0.60,
        "Qwen3-4B": 4.02,
        "Qwen3-1.7B": 1.72,
        "Qwen3-8B": 8.19,
        "Qwen3-14B": 14.77,
        "Llama-3.1-8B": 8.03,
        "Llama-3.3-70B": 70.55,
    }
    assert billions == pytest.approx(published, abs=0.01)


def test_states_of_training_are_sixteen_bytes_a_parameter_over_the_shards():
    size = lib.memory.size_of(hours.MODELS["Qwen3-8B"])
    training = lib.memory.plan(size, size, False, 8, 4096, 0, 1, True)["training"]
    states = [value for name, value in training.items() if "float32, sharded" in name or "AdamW" in name]
    assert sum(states) == pytest.approx(16 * size.parameters / 8)
    without = lib.memory.plan(size, size, False, 8, 4096, 0, 1, False)["training"]["activations of a micro-batch"]
    assert without > 10 * training["activations of a micro-batch"]


def test_dry_run_loads_and_writes_nothing(student, problems, tmp_path, capsys, monkeypatch):
    """It plans for the GPUs of the command, here one, or for those that --gpus names."""
    monkeypatch.setattr(teacher_grpo, "load_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    out = tmp_path / "out"
    cfg = teacher_grpo.Config(student, data=problems, out=str(out), exclude=(), max_response_tokens=64, dry_run=True)
    teacher_grpo.main(cfg)
    printed = capsys.readouterr().out
    assert "1 GPU, the weights sharded over 1," in printed and "AdamW states" in printed and "On disk: " in printed
    assert [line for line in printed.splitlines() if line.startswith("- GPUs of 80 GB: fits, ")]
    for gpus, nodes, shards in ((4, 1, 4), (8, 1, 8), (16, 1, 8), (16, 2, 16)):
        teacher_grpo.main(dataclasses.replace(cfg, gpus=gpus, shard_nodes=nodes))
        assert f"{gpus} GPUs, the weights sharded over {shards}," in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_dry_run_under_torchrun_plans_for_its_processes(student, problems, tmp_path):
    words = [
        "--model",
        student,
        "--data",
        problems,
        "--exclude",
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
        "--max-response-tokens",
        "64",
    ]
    done = launch(2, "teacher_grpo.py", *words)
    assert done.returncode == 0 and done.stdout.count("2 GPUs, the weights sharded over 2,") == 1, done.stderr[-2000:]


def test_disk_of_an_8b_model():
    """About 98 GB for a training state in float32 with both states of AdamW, and two of them during a save."""
    size = lib.memory.size_of(hours.MODELS["Qwen3-8B"])
    disk = lib.memory.disk_bytes(size)
    assert disk["training state"] / 1e9 == pytest.approx(98, abs=1)
    assert sum(disk.values()) / 1e9 == pytest.approx(2 * 98 + 33, abs=2)
    assert lib.memory.disk_bytes(size, "bfloat16")["checkpoint"] == disk["checkpoint"] / 2


@cache
def size_of(name: str) -> lib.memory.Size:
    return lib.memory.size_of(hours.MODELS[name])


def held_at_start(planned: dict[str, dict[str, float]], resumed: bool) -> float:
    """Bytes that the trainer holds on each GPU when the engine is made; optimizer states only after a resume."""
    names = ("weights (float32, sharded)", "frozen model (bfloat16, sharded)", *["AdamW states"] * resumed)
    return sum(planned["sampling"].get(name, 0.0) for name in names)


STAGES = {  # of a pair: (what is trained, what is frozen, is it in the loss)
    "1": (1, 1, False), "2b": (0, 1, True), "3": (0, 0, False),
}  # fmt: skip


@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
@pytest.mark.parametrize("gpus", [1, 8, 16])
@pytest.mark.parametrize("pair", [*hours.SMALL_PAIRS[:1], *hours.PAIRS], ids="<-".join)
@pytest.mark.parametrize("stage", STAGES)
def test_vllm_starts_beside_the_trainer(stage, pair, gpus, resumed, monkeypatch):
    """Its own check of free memory, with what the trainer holds when the engine is made, wherever the plan says it fits."""
    request_memory = pytest.importorskip("vllm.v1.worker.utils").request_memory
    trained, frozen, in_loss = STAGES[stage]
    sizes = [size_of(pair[i]) for i in (trained, frozen)]
    planned = lib.memory.plan(*sizes, in_loss, gpus, 19456, lib.memory.BESIDE_A_TRAINER, 1, True)
    held = held_at_start(planned, resumed)
    for card in lib.memory.CARDS:
        if not lib.memory.verdict(planned, card).startswith("fits"):
            continue
        total = int(card * 1e9)
        snapshot = SimpleNamespace(device_="cuda:0", total_memory=total, free_memory=int(total - held - 2**31))
        request_memory(snapshot, SimpleNamespace(gpu_memory_utilization=lib.engines.GPU_MEMORY_UTILIZATION))
        if held > 0.08 * total:  # vLLM's default would refuse
            with pytest.raises(ValueError, match="less than"):
                request_memory(snapshot, SimpleNamespace(gpu_memory_utilization=0.92))


def test_hours_follow_the_work():
    small, large = (lib.memory.size_of(hours.MODELS[name]) for name in ("Qwen3-1.7B", "Qwen3-8B"))
    whole, half = (hours.stage_hours(small, large, labels) for labels in (hours.LABELS, hours.LABELS / 2))
    assert {name: value / 2 for name, value in whole.items()} == pytest.approx(half)
    assert whole["OPD only (2 passes)"] == pytest.approx(2 * whole["2b OPD (1 pass)"])
    same = hours.stage_hours(small, small)
    assert same["Stage 1, teacher (10 passes)"] == same["direct GRPO, Stage 3, replay (10 passes)"]
    assert whole["teacher-sample SFT, after the warmup's sampling (2 passes)"] < whole["2a warmup (1 pass)"] * 2


def test_a_batch_waits_for_its_longest_response():
    """One response costs a pass over the weights for each of its tokens; many more cost little more, and never less."""
    size = lib.memory.size_of(hours.MODELS["Qwen3-8B"])
    one_pass = float(hours.read_seconds(size, 0, 0))
    assert one_pass == pytest.approx(2 * 8.19e9 / (0.6 * 3.35e12), rel=1e-3)
    alone = hours.batch_seconds(size, 1)
    assert alone == pytest.approx(hours.RESPONSE * one_pass, rel=0.05)
    assert 5 * alone < hours.batch_seconds(size, 256) < hours.LONGEST * one_pass * 1.5
    per_response = [hours.batch_seconds(size, n) / n for n in (1, 32, 256, 2048)]
    assert per_response == sorted(per_response, reverse=True)
    assert hours.stream_seconds(size, 2048) < hours.batch_seconds(size, 2048)


def limited_run(gib: float, *words) -> subprocess.CompletedProcess:
    """A stage in a process whose address space is limited, as by `ulimit -v`."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (int(gib * lib.memory.GIB),) * 2)
    return subprocess.run(
        [sys.executable, "teacher_grpo.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_micro_batch_fits_the_memory_that_a_process_may_take(student, problems, tmp_path, monkeypatch):
    """Less memory gives smaller micro-batches, a number that is given stays, and a run that cannot fit is refused."""
    settings = dict(data=problems, out=str(tmp_path / "out"), exclude=(), max_prompt_tokens=64, max_response_tokens=64)
    size = lib.memory.size_of(lib.memory.load_config(student))
    chosen = []
    for share in (2.0, 0.4, 0.1, 0.05):
        room = lib.memory.peak(lib.memory.plan_on_cpu(size, size, 1, int(share * lib.memory.LARGEST), False))
        monkeypatch.setattr(lib.memory, "available_memory", lambda room=room: room / lib.memory.CPU_SHARE)
        cfg = teacher_grpo.Config(student, **settings)
        assert lib.memory.fit(cfg, student, in_loss=False)
        chosen.append(cfg.micro_batch_tokens)
    assert chosen == [16384, 4096, 1024, 512]
    assert lib.memory.fit(cfg := teacher_grpo.Config(student, micro_batch_tokens=300, **settings), student, False)
    assert cfg.micro_batch_tokens == 300
    monkeypatch.setattr(lib.memory, "available_memory", lambda: 1 << 20)
    with pytest.raises(
        InputError, match="sequences of up to 128 tokens need about .* GiB in each process, and 0.0 can"
    ):
        lib.memory.fit(teacher_grpo.Config(student, **settings), student, in_loss=False)


def test_a_run_that_the_system_would_kill_is_refused_in_one_sentence(student, problems, tmp_path):
    """3 GiB of weights, gradients and optimizer states in an address space of 4; no weight is read before."""
    large = tmp_path / "large"
    shutil.copytree(student, large)
    config = tiny_model(hidden_size=1024, layers=1, intermediate_size=65536, family="Llama").config
    config.save_pretrained(large)
    words = ["--data", problems, "--exclude", "--max-response-tokens", "16", "--max-prompt-tokens", "64",
             "--out", str(tmp_path / "out")]  # fmt: skip
    refused = limited_run(4, "--model", str(large), *words)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert "error: --micro-batch-tokens 512 and sequences of up to 80 tokens need about" in refused.stderr
    fits = limited_run(4, "--model", student, *words, "--max-steps", "1")
    assert fits.returncode == 0, fits.stderr[-2000:]


def test_a_resumed_run_keeps_its_micro_batches_unless_told_otherwise(student, problems, tmp_path, monkeypatch):
    settings = dict(data=problems, out=str(tmp_path / "out"), exclude=(), resume=True)
    state = tmp_path / "out.partial/state-000002"
    state.mkdir(parents=True)
    (state / "run.json").write_text(json.dumps({"config": {"micro_batch_tokens": 2048}}))
    for given, expected in ((None, 2048), (700, 700)):
        cfg = teacher_grpo.Config(student, micro_batch_tokens=given, **settings)
        lib.memory.fit(cfg, student, in_loss=False)
        assert cfg.micro_batch_tokens == expected
