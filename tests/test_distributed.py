"""Two ranks, on the real scripts, with either engine."""

import json
import shutil

import pytest
import torch
from conftest import write_checkpoint
from helpers import RUNS, assert_same_weights, launch, metrics

import common
import lib.policy
import teacher_grpo


@pytest.fixture
def run_ranks(tmp_path, student, teacher, problems):
    """A function that runs a task of run_ranks.py on some ranks."""

    def run(ranks: int, *task: str) -> None:
        done = launch(ranks, "tests/run_ranks.py", str(tmp_path), student, teacher, problems, *task)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]

    return run


@pytest.mark.rest
@pytest.mark.parametrize("engine, tensor_parallel", [("torch", "1"), ("vllm", "1"), ("vllm", "2")])
def test_a_run_on_two_ranks_resumes_bit_for_bit(run_ranks, engine, tensor_parallel, tmp_path):
    """Every stage, from the state of its second step. Trainer and sampler disagree by rounding alone.

    Inside, a rank's broken numbers stop all from stepping.
    """
    if engine == "vllm":
        pytest.importorskip("vllm")
    run_ranks(2, "chain", engine, tensor_parallel)
    for stage in RUNS:
        lines = metrics(tmp_path / stage)
        assert_same_weights(tmp_path / stage, tmp_path / f"again-{stage}")
        assert lines == metrics(tmp_path / f"again-{stage}") and len(lines) == 3, stage
        assert all(line.get("sampler_mismatch_max", 0) < 1e-5 for line in lines)
        assert all(line.get("importance_clipped", 0) == 0 for line in lines)
        assert max(line["grad_norm"] for line in lines) > 0.01  # a batch may lack spread, a run not
    together = json.loads((tmp_path / "report/results.json").read_text())["results"]
    assert together.keys() == {"warmup", "student", "teacher"}
    if engine == "torch":
        shutil.rmtree(tmp_path / "report")
        run_ranks(1, "chain", "torch", "1", "report")
        assert json.loads((tmp_path / "report/results.json").read_text())["results"] == together


@pytest.mark.rest
def test_gradients_in_bfloat16_are_those_in_float32_up_to_rounding(run_ranks):
    """As GPUs compute, in every stage, with activations computed twice, accumulation, and a rank with nothing to do."""
    run_ranks(2, "bfloat16")


@pytest.mark.rest
def test_bad_input_ends_all_ranks_and_is_said_once(problems, tmp_path):
    arguments = ["--model", "./nowhere", "--data", problems, "--exclude", "--out", str(tmp_path / "out")]
    done = launch(2, "teacher_grpo.py", *arguments, timeout=120)
    assert done.returncode and done.stderr.count("error: --model './nowhere' is not a checkpoint directory") == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_policy_has_the_weights_of_its_checkpoint(tied, tmp_path):
    """A lone process in bfloat16 is sharded as many are. Saved again, the checkpoint is the same, its ends included."""
    model = write_checkpoint(tmp_path / "model", tied=tied, seed=4)
    try:
        cfg = teacher_grpo.Config(model, data="", out="", cpu_bfloat16=True)
        policy = lib.policy.load_policy(model, cfg, trainable=True)
        assert lib.policy.is_sharded(policy)
        assert (policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight) == tied
        plain = lib.policy.load_causal_lm(model, torch.float32, torch.device("cpu"))
        ours = dict(lib.policy.full_weights(policy)) | dict(policy.model.named_buffers())
        theirs = plain.state_dict() | dict(plain.named_buffers())
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        lib.policy.save_pretrained(policy, tmp_path / "saved")
    finally:
        torch.distributed.destroy_process_group()
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_work_is_spread_in_order(monkeypatch):
    """Four ranks, two to an engine: partners do the same share, and each share counts once."""
    items, done = list(range(7)), {}

    def gather(gathered, results):
        done[common.rank()] = results
        gathered[:] = [done.get(other, results) for other in range(4)]

    monkeypatch.setattr(common, "world_size", lambda: 4)
    monkeypatch.setattr(common.dist, "all_gather_object", gather)
    for rank in range(4):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        result = common.map_over_ranks(lambda share: [10 * item for item in share], items, tensor_parallel=2)
    assert done[0] == done[1] and done[2] == done[3] and result == [10 * item for item in items]
