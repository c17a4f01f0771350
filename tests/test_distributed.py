"""Two ranks against one, on the real scripts: the same rollouts, losses and weights, with either engine."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint
from helpers import STAGES, assert_same_weights, launch, metrics, weights

import common
import lib.policy
import teacher_grpo

COMPARED = {"loss", "forward_kl", "reverse_kl", "reward", "entropy", "kl_to_reference", "grad_norm"}


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory, student, teacher, problems):
    """A function that runs a task of run_ranks.py once, and gives its directory."""
    made = {}

    def run(ranks: int, *task: str) -> Path:
        if (ranks, *task) not in made:
            out = tmp_path_factory.mktemp("".join(task))
            done = launch(ranks, "tests/run_ranks.py", str(out), student, teacher, problems, *task)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
            made[ranks, *task] = out
        return made[ranks, *task]

    return run


@pytest.mark.rest
def test_two_ranks_do_what_one_does(run_ranks):
    """Inside, each rank's shards are compared with the saved checkpoint, bit for bit."""
    one, two = run_ranks(1, "chain", "torch", "1"), run_ranks(2, "chain", "torch", "1")
    rollouts = json.loads((one / "rollouts.json").read_text())
    assert rollouts == json.loads((two / "rollouts.json").read_text())
    assert len({tuple(ids) for batch in rollouts for *_, ids in batch}) > 60  # and samples differ
    for stage in STAGES:
        for alone, together in zip(metrics(one / stage), metrics(two / stage), strict=True):
            for name in alone.keys() & COMPARED:
                assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), (stage, name)
        assert max(line["grad_norm"] for line in metrics(one / stage)) > 0.01  # a batch may lack spread, a run not
        # AdamW moves a weight whose gradient is nothing but rounding by up to the learning rate, so a few may differ.
        first, second = weights(one / stage), weights(two / stage)
        distances = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
        assert (distances > 1e-5).sum() <= len(distances) / 1000 and distances.max() < 1e-3, stage
        for out in (one, two):
            assert json.loads((out / stage / "generation_config.json").read_text())["eos_token_id"] == [1, 0], stage
    scores = [json.loads((out / "report" / "results.json").read_text())["results"] for out in (one, two)]
    averages = [[found["avg"] for row in rows.values() for found in row.values()] for rows in scores]
    assert averages[0] == averages[1]


@pytest.mark.rest
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_a_run_on_two_ranks_resumes_bit_for_bit(run_ranks, engine):
    """Every stage, from the state of its second step; inside, too, that a rank's broken numbers stop all from stepping."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    out = run_ranks(2, "chain", engine, "1")
    for stage in STAGES:
        assert_same_weights(out / stage, out / f"again-{stage}")
        assert metrics(out / stage) == metrics(out / f"again-{stage}") and len(metrics(out / stage)) == 3, stage


@pytest.mark.rest
def test_gradients_in_bfloat16_are_those_in_float32_up_to_rounding(run_ranks):
    """As GPUs compute, in every stage, with activations computed twice, accumulation, and a rank with nothing to do."""
    run_ranks(2, "bfloat16")


@pytest.mark.rest
@pytest.mark.parametrize("tensor_parallel", "12", ids=["an engine on each", "one engine on both"])
def test_the_chain_on_two_ranks_with_vllm(run_ranks, tensor_parallel):
    """Trainer and sampler disagree by rounding alone, in every step of every stage that has both."""
    pytest.importorskip("vllm")
    out = run_ranks(2, "chain", "vllm", tensor_parallel)
    for stage in ("teacher", "bridge", "student"):
        for line in metrics(out / stage):
            assert line["sampler_mismatch_max"] < 1e-5 and line.get("importance_clipped", 0) == 0
        assert max(line["grad_norm"] for line in metrics(out / stage)) > 0.01
    results = json.loads((out / "report" / "results.json").read_text())["results"]
    assert results.keys() == {"warmup", "student", "teacher"}


@pytest.mark.rest
def test_bad_input_ends_all_ranks_and_is_said_last(problems, tmp_path):
    arguments = ["--model", "./nowhere", "--data", problems, "--exclude", "--out", str(tmp_path / "out")]
    done = launch(2, "teacher_grpo.py", *arguments, timeout=120)
    assert done.returncode != 0
    sentence = "error: --model './nowhere' is not a checkpoint directory"
    assert done.stderr.count(sentence) == 2  # the second time after what torchrun says
    assert done.stderr.splitlines()[-1].startswith(sentence)


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
    monkeypatch.setattr(common, "world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)

        def gather(gathered, results, rank=rank):
            done[rank] = results
            gathered[:] = [done.get(other, done[max(done)]) for other in range(4)]

        monkeypatch.setattr(common.dist, "all_gather_object", gather)
        result = common.map_over_ranks(lambda share: [10 * item for item in share], items, tensor_parallel=2)
    assert done[0] == done[1] and done[2] == done[3] and result == [10 * item for item in items]
