"""The memory plan: parameter counts against real models, sums against hand arithmetic, and --dry-run."""

import pytest
from conftest import tiny_model

import lib.memory
import teacher_grpo
from experiments import hours


def test_counts_are_those_of_real_models_and_of_the_published_sizes():
    for options in (dict(), dict(tied=False), dict(llama=True)):
        model = tiny_model(**options)
        assert lib.memory.size_of(model.config).parameters == sum(p.numel() for p in model.parameters())
    billions = {name: lib.memory.size_of(config).parameters / 1e9 for name, config in hours.MODELS.items()}
    published = {"Qwen3-1.7B": 1.72, "Qwen3-8B": 8.19, "Qwen3-14B": 14.77, "Llama-3.1-8B": 8.03, "Llama-3.3-70B": 70.55}
    assert billions == pytest.approx(published, abs=0.01)


def test_states_of_training_are_sixteen_bytes_a_parameter_over_the_shards():
    size = lib.memory.size_of(hours.MODELS["Qwen3-8B"])
    training = lib.memory.plan(size, size, False, 8, 4096, 0, 1, True)["training"]
    states = [value for name, value in training.items() if "float32, sharded" in name or "AdamW" in name]
    assert sum(states) == pytest.approx(16 * size.parameters / 8)
    without = lib.memory.plan(size, size, False, 8, 4096, 0, 1, False)["training"]["activations of a micro-batch"]
    assert without > 10 * training["activations of a micro-batch"]


def test_dry_run_loads_and_writes_nothing(student, problems, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teacher_grpo, "load_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    out = tmp_path / "out"
    teacher_grpo.main(teacher_grpo.Config(student, data=problems, out=str(out), exclude=(), dry_run=True))
    printed = capsys.readouterr().out
    assert "1 x 8 x 80 GB: fits" in printed and "2 x 8 x 141 GB: fits" in printed and "AdamW states" in printed
    assert not list(tmp_path.iterdir())


def test_hours_are_in_proportion_to_the_work():
    size = lib.memory.size_of(hours.MODELS["Qwen3-1.7B"])
    of_stage = hours.stage_hours(size, size)
    assert hours.stage_hours(size, size, labels=hours.LABELS // 2)["2b OPD (1 pass)"] == pytest.approx(
        of_stage["2b OPD (1 pass)"] / 2, rel=1e-3
    )
    assert of_stage["OPD only (2 passes)"] == pytest.approx(2 * of_stage["2b OPD (1 pass)"])
    assert of_stage["Stage 1, teacher (10 passes)"] == of_stage["direct GRPO, Stage 3, replay (10 passes)"]
    assert of_stage["teacher-sample SFT, after the warmup's sampling (2 passes)"] < of_stage["2a warmup (1 pass)"] * 2
    assert hours.tokens_per_second(size) > 2 * hours.tokens_per_second(lib.memory.size_of(hours.MODELS["Qwen3-8B"]))
