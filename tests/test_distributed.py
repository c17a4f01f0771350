"""Two ranks against one, on the real scripts: the same rollouts, losses and weights, with either engine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_losses import make_rollouts

import common
import lib.policy
import teacher_grpo
from lib import packing

ROOT = Path(__file__).parent.parent
STAGES = ["teacher", "warmup", "bridge", "student"]


def launch(ranks: int, *words: str, timeout: int = 400) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_stages(tmp_path_factory, student, teacher, problems):
    made = {}

    def run(ranks: int, engine: str, tensor_parallel: int = 1) -> Path:
        key = ranks, engine, tensor_parallel
        if key not in made:
            out = tmp_path_factory.mktemp(f"{engine}{ranks}")
            arguments = str(out), student, teacher, problems, engine, str(tensor_parallel)
            done = launch(ranks, "tests/run_stages.py", *arguments)
            assert done.returncode == 0, done.stderr[-5000:]
            made[key] = out
        return made[key]

    return run


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(out / stage / "model.safetensors")


def metrics(out: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_do_what_one_does(run_stages):
    """Inside, each rank's shards are compared with the saved checkpoint, bit for bit."""
    one, two = run_stages(1, "torch"), run_stages(2, "torch")
    rollouts = json.loads((one / "rollouts.json").read_text())
    assert rollouts == json.loads((two / "rollouts.json").read_text())
    assert len({tuple(ids) for batch in rollouts for *_, ids in batch}) > 60  # and samples differ
    for stage in STAGES:
        for alone, together in zip(metrics(one, stage), metrics(two, stage), strict=True):
            for name in alone:
                if name in ("loss", "forward_kl", "reverse_kl", "reward", "kl_to_reference", "entropy", "lr"):
                    assert together[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), (stage, name)
                elif name == "grad_norm":
                    assert together[name] == pytest.approx(alone[name], rel=1e-4), stage
        assert max(line["grad_norm"] for line in metrics(one, stage)) > 0.01  # a batch may lack spread, a run not
        first, second = weights(one, stage), weights(two, stage)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[name], second[name], atol=1e-4, rtol=0) for name in first), stage
        for out in (one, two):
            assert json.loads((out / stage / "generation_config.json").read_text())["eos_token_id"] == [1, 0], stage
    scores = [json.loads((out / "report" / "results.json").read_text())["results"] for out in (one, two)]
    for rows in scores:
        for result in (result for row in rows.values() for result in row.values()):
            del result["sha256"]  # of weights that differ by rounding
    assert scores[0] == scores[1]


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_a_run_on_two_ranks_resumes_bit_for_bit(run_stages, engine):
    """Every stage, from the state of its second step; inside, too, that a rank's broken numbers stop all from stepping."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    out = run_stages(2, engine)
    for stage in STAGES:
        first, second = weights(out, stage), weights(out, f"again-{stage}")
        assert all(torch.equal(first[name], second[name]) for name in first), stage
        lines = [[{k: v for k, v in line.items() if not k.startswith("seconds")} for line in metrics(out, name)]
                 for name in (stage, f"again-{stage}")]  # fmt: skip
        assert lines[0] == lines[1] and len(lines[0]) == 3, stage


def test_gradients_in_bfloat16_are_those_in_float32_up_to_rounding(student, teacher, problems, tmp_path):
    """As GPUs compute, in every stage, with activations computed twice, accumulation, and a rank with nothing to do."""
    done = launch(2, "tests/run_bf16.py", str(tmp_path), student, teacher, problems)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    assert done.stdout.count("relative error of bfloat16") == 4


def test_two_nodes_hold_a_copy_each_or_one_between_them(student, problems, tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"--rdzv_endpoint=localhost:{free.getsockname()[1]}"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
    ]
    words = [*torchrun, endpoint, "--rdzv_id=1", "tests/run_nodes.py", student, problems, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for node in nodes:
        _, said = node.communicate(timeout=200)
        assert node.returncode == 0, said[-5000:]
    first, second, start = (
        weights(directory, "") for directory in (tmp_path / "nodes1", tmp_path / "nodes2", Path(student))
    )
    assert all(torch.allclose(first[name], second[name], atol=1e-5, rtol=0) for name in first)
    assert any(not torch.equal(first[name], start[name]) for name in first)


def test_nodes_that_cannot_be_grouped_are_refused(student, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.policy, "world_size", lambda: 24)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        common.InputError, match="--shard-nodes 2: 24 processes cannot be grouped by 16; give a divisor"
    ):
        teacher_grpo.main(
            teacher_grpo.Config(student, data=problems, out=str(tmp_path / "x"), exclude=(), shard_nodes=2)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["an engine on each", "one engine on both"])
def test_the_chain_on_two_ranks_with_vllm(run_stages, tensor_parallel):
    """Trainer and sampler disagree by rounding alone, in every step of every stage that has both."""
    pytest.importorskip("vllm")
    out = run_stages(2, "vllm", tensor_parallel)
    for stage in ("teacher", "bridge", "student"):
        for line in metrics(out, stage):
            assert line["sampler_mismatch_max"] < 1e-5 and line.get("importance_clipped", 0) == 0
        assert max(line["grad_norm"] for line in metrics(out, stage)) > 0.01
    assert json.loads((out / "report" / "results.json").read_text())["results"].keys() == {
        "warmup",
        "student",
        "teacher",
    }


def test_bad_input_ends_all_ranks_and_is_said_last(problems, tmp_path):
    arguments = ["--model", "./nowhere", "--data", problems, "--exclude", "--out", str(tmp_path / "out")]
    done = launch(2, "teacher_grpo.py", *arguments, timeout=120)
    assert done.returncode != 0
    sentence = "error: --model './nowhere' is not a checkpoint directory, nor a hub name (owner/name)"
    assert done.stderr.count(sentence) == 2 and done.stderr.splitlines()[-1] == sentence  # again after torchrun's own


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_micro_batches_are_dealt_out_once_evenly_and_equally_many(monkeypatch, ranks):
    rollouts = make_rollouts(11, group=1)
    monkeypatch.setattr(packing, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(packing, "rank", lambda rank=rank: rank)
        shares.append(packing.make_batches(rollouts, 16, torch.device("cpu"), None))
    assert len({len(share) for share in shares}) == 1
    seen = [index for share in shares for batch in share for index in batch.rollout_index.unique().tolist()]
    assert sorted(seen) == [index for index, rollout in enumerate(rollouts) if rollout.response_ids]
    loads = [sum(batch.input_ids.count_nonzero().item() for batch in share) for share in shares]
    assert max(loads) - min(loads) <= 13  # the longest sequence


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
