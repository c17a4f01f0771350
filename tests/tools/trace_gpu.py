"""Calls what only a GPU runs, where there is none: on fake tensors, which have a device, a shape and a dtype, but no memory.

    python -m tests.tools.trace_gpu        # needs PyTorch's CUDA build, which pip installs on Linux unless told otherwise

It finds arguments that an operator does not take, and shapes and dtypes that do not fit, at the paper's sizes and in
seconds. Values are for the tests in Triton's interpreter, machine code for tests/tools/compile_kernels.py.
"""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
import fkl_warmup  # noqa: E402
import kernels  # noqa: E402
import lib.packing  # noqa: E402
import lib.policy  # noqa: E402
import opd  # noqa: E402
import teacher_grpo  # noqa: E402
from lib.packing import make_batches  # noqa: E402
from tests.tools.rehearsal import MODELS  # noqa: E402

STUDENT_AND_TEACHER = "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B"
N, V = 16384, MODELS["Qwen/Qwen3-8B"].vocab_size
DS, DT = MODELS["Qwen/Qwen3-1.7B"].hidden_size, MODELS["Qwen/Qwen3-8B"].hidden_size


@contextmanager
def fake_gpu(tensors):
    """Inside, tensors on "cuda" are fake, of an H100, and launches are noted, not made."""
    launches = []

    def launch(kernel, programs, *arguments, **constants):
        assert all(x.is_cuda for x in arguments if isinstance(x, torch.Tensor))
        launches.append(kernel.__name__)

    with (
        tensors,
        nullcontext() if isinstance(tensors, nullcontext) else torch.no_grad(),
        mock.patch.object(kernels, "_launch", launch),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
    ):
        yield launches


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def two_rollouts() -> list[common.Rollout]:
    return [
        common.Rollout(None, number, [1] * 100, [2] * length, [0.0] * length, "stop", "", advantage=number - 0.5)
        for number, length in enumerate((9000, 7000))
    ]


def make_policy(name: str, device: str, layers: int, trainable: bool = True) -> lib.policy.Policy:
    config = type(MODELS[name])(**{**MODELS[name].to_dict(), "num_hidden_layers": layers, "layer_types": None})
    with torch.device(device):
        policy = lib.policy.Policy(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    return policy.requires_grad_(trainable)


def packed_forward(name: str, share_prompts: bool) -> str:
    """Two layers of a model over a full pack: PyTorch's attention for variable lengths is called, and gives what is due."""
    policy, calls, attention = make_policy(name, "cuda", 2), [], torch.nn.attention.varlen.varlen_attn
    [batch] = make_batches(two_rollouts(), N, torch.device("cuda"), share_prompts)
    with mock.patch.object(lib.packing, "varlen_attn", lambda *a, **k: calls.append(k) or attention(*a, **k)):
        hidden, weight = policy(batch, lambda hidden, weight: (hidden, weight))
    assert len(calls) == 2 and hidden.dtype == weight.dtype == torch.bfloat16
    assert weight.shape[0] == MODELS[name].vocab_size
    return f"attention called with {calls[0]}"


def kl(direction: str, dtype: torch.dtype, vocab_size: int) -> str:
    """Loss, KL and both gradients; the teacher's head has more rows than the student's, and both more than the tokenizer."""
    weights = empty(V, DS, dtype=dtype), empty(V + 128, DT, dtype=dtype)
    found, d_hidden, d_weight = kernels._kl_forward(
        empty(N, DS, dtype=dtype), weights[0], empty(N, DT, dtype=dtype), weights[1], empty(N, dtype=torch.int64),
        direction == "reverse", 1.0, vocab_size, True, True, True,
    )  # fmt: skip
    assert found.loss.shape == () and all(x.shape == (N,) for x in found[1:])
    assert d_hidden.shape == (N, DS) and d_weight.shape == (V, DS)
    assert {x.dtype for x in (*found, d_hidden, d_weight)} == {torch.float32}
    return "loss, KL, entropy, log-probabilities, dH and dW in float32"


def all_rows(x: torch.Tensor) -> torch.Tensor:
    """In the place of nonzero: which rows are zero is not known without values."""
    return torch.arange(len(x), device=x.device)[:, None]


def logprob(dtype: torch.dtype, vocab_size: int) -> str:
    hidden, weight, targets = empty(N, DS, dtype=dtype), empty(V, DS, dtype=dtype), empty(N, dtype=torch.int64)
    statistics = kernels._logprob_forward(hidden, weight[:vocab_size], targets, 1.0, True)
    assert statistics.shape == (4, N) and statistics.dtype == torch.float32
    context = SimpleNamespace(
        saved_tensors=(hidden, weight, targets, *statistics[2:]), settings=(1.0, vocab_size, True),
        needs_input_grad=(True, True),
    )  # fmt: skip
    with mock.patch.object(torch.Tensor, "nonzero", all_rows):
        d_hidden, d_weight, *_ = kernels._FusedLinearLogprob.backward(context, empty(N, dtype=torch.float32), None)
    assert d_hidden.shape == (N, DS) and d_weight.shape == (V, DS) and d_hidden.dtype == d_weight.dtype == dtype
    return f"forward in float32, dH and dW in {dtype}"


def update(stage: str, student: str, teacher: str) -> str:
    """A stage's update, forward and backward, on three layers of each model and on sequences of the paper's length.

    PyTorch's backward pass wants a real device, so the tensors are on "meta", and say that they are on a GPU.
    """

    rollouts = two_rollouts()
    settings = dict(data="", out="", micro_batch_tokens=N, rollouts_per_prompt=2, mini_batch_prompts=1)
    trained = make_policy(teacher if stage == "1" else student, "meta", 3)
    frozen = make_policy(teacher if stage[0] == "2" else student, "meta", 3, trainable=False)
    optimizer = torch.optim.SGD(trained.parameters())  # AdamW's fused kernel is PyTorch's own
    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda x: True)),
        mock.patch.object(common, "this_device", lambda: torch.device("meta")),
        mock.patch.object(torch.Tensor, "nonzero", all_rows),
        mock.patch.object(torch.Tensor, "item", lambda x: 1.0),
        mock.patch.object(torch.Tensor, "__float__", lambda x: 1.0),
        mock.patch.object(torch.Tensor, "__bool__", lambda x: False),
    ):
        if stage in ("1", "3"):
            found = teacher_grpo.update(trained, frozen, optimizer, rollouts, 1e-6, teacher_grpo.Config("", **settings))
            assert {"loss", "entropy", "kl_to_reference", "sampler_mismatch_max"} <= found.keys()
        for batch in make_batches(rollouts, N, torch.device("meta"), True) if stage[0] == "2" else ():
            result = {
                "2a": lambda: fkl_warmup.forward_kl_loss(trained, frozen, batch, 151669),
                "2b": lambda: opd.exact_kl_loss(trained, frozen, batch, 151669),
                "2b, sampled": lambda: opd.sampled_kl_loss(trained, frozen, batch, 151669, 2.0),
            }[stage]()
            (result.loss / N).backward()
            opd.token_statistics(result, batch)
            missing = [name for name, p in trained.named_parameters() if p.grad is None or p.grad.shape != p.shape]
            assert not missing, missing
            common.optimizer_step(trained, optimizer, 1.0, 1e-6, 1.0)
    return "forward, backward, clipping and step"


def main() -> None:
    if torch.version.cuda is None:
        raise SystemExit("this PyTorch has no CUDA in it: install the build that pip takes on Linux by default")
    checks = [(packed_forward, name, share_prompts) for name in MODELS for share_prompts in (False, True)]
    for dtype in (torch.bfloat16, torch.float32):
        for vocab_size in (V, 151669):  # the head's rows; the tokenizer's tokens, an odd number
            checks += [(kl, way, dtype, vocab_size) for way in ("reverse", "forward")] + [(logprob, dtype, vocab_size)]
    checks += [(update, stage, *STUDENT_AND_TEACHER) for stage in ("1", "2a", "2b", "2b, sampled", "3")]
    print(f"PyTorch {torch.__version__}; {N} tokens, hidden sizes {DS} and {DT}, {V} rows of the output matrix")
    for check, *arguments in checks:
        with fake_gpu(FakeTensorMode(shape_env=ShapeEnv()) if check is not update else nullcontext()) as launches:
            found = check(*arguments)
        counts = ", ".join(f"{launches.count(name)} x {name}" for name in dict.fromkeys(launches))
        print(
            f"{check.__name__}({', '.join(map(str, arguments))}): {found}{'; ' + counts if counts else ''}", flush=True
        )


if __name__ == "__main__":
    main()
