"""The fused losses of kernels.py against float64: PyTorch path, Triton kernels (interpreted, or on a GPU), machine code.

Plain pytest runs this file twice: here with the PyTorch path (and on a GPU where there is one), and, from
`test_triton_in_interpreter`, in a process of its own in which Triton was imported to interpret. `test_machine_code`
compiles in a third.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels as K  # noqa: E402

if K.INTERPRETED:
    CASES = [("triton", "cpu")]
else:
    CASES = [("torch", "cpu")] + [(backend, "cuda") for backend in ("torch", "triton") if torch.cuda.is_available()]
only_here = pytest.mark.skipif(K.INTERPRETED, reason="runs in the process that is not interpreting")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=CASES, ids="-".join)
def where(request):
    return dict(zip(("backend", "device"), request.param))


def only(where):
    return dict(backend=where["backend"])


def linear(n, v, d, dtype, device, seed=0, shift=0.0, scale=0.3):
    """hidden (n, d + 1), weight (v, d + 1): logits of spread about scale * sqrt(d), all moved by `shift`."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d + 1, generator=g), torch.randn(v, d + 1, generator=g) * scale
    hidden[:, -1], weight[:, -1] = 1.0, shift
    return tuple(x.to(device, dtype).requires_grad_() for x in (hidden, weight))


def run(op, leaves, others, upstream, **kwargs):
    """-> (first output, second output, gradient of each leaf), as float64; the inputs must survive unchanged."""
    before = [x.detach().clone() for x in (*leaves, *others)]
    first, second = op(*leaves, *others, **kwargs)
    grads = torch.autograd.grad((first * upstream.to(first)).sum(), leaves)
    assert all(torch.equal(a.nan_to_num(7e7), b.detach().nan_to_num(7e7)) for a, b in zip(before, (*leaves, *others)))
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(grads, leaves))
    return [x.detach().double() for x in (first, second, *grads)]


def as_double(tensors):
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]


def check(op, reference, leaves, others, upstream, where, shift=0.0, **kwargs):
    """Ours may not be further from float64 than the formulas in the dtype of the inputs are.

    In fp32 both are down to the order of summation, so a few last bits are granted, of the logits if these were shifted.
    The last column of the hidden states' gradient is then left out: shift * (sum of a row's gradient, 0) is noise alone.
    """
    ours = run(op, leaves, others, upstream, backend=where["backend"], **kwargs)
    naive = run(reference, leaves, others, upstream, **kwargs)
    truth = run(reference, as_double(leaves), as_double(others), upstream, **kwargs)
    for name, x, y, z in zip(("output 1", "output 2", "gradient 1", "gradient 2"), ours, naive, truth):
        if shift and name == "gradient 1" and len(leaves) == 2:
            x, y, z = x[:, :-1], y[:, :-1], z[:, :-1]
        mine, theirs, size = (x - z).norm().item(), (y - z).norm().item(), z.norm().item()
        bits = 0.0 if leaves[0].dtype == torch.bfloat16 else EPS * (4 + abs(shift) / 8)
        assert mine <= theirs + bits * size + 1e-30, f"{name}: error {mine:.3g}, naive {theirs:.3g}, norm {size:.3g}"


KL, LOGPROB = (K.fused_linear_kl, K.fused_linear_kl_reference), (K.fused_linear_logprob, K.fused_linear_logprob_reference)
LOGITS_KL, LOGITS_LOGPROB = ((K.kl_from_logits, K.kl_from_logits_reference),
                             (K.logprob_from_logits, K.logprob_from_logits_reference))
SHAPES = [(1, 1100, 40), (17, 1100, 48), (65, 257, 63), (64, 512, 127), (3, 4099, 20)]  # N, V, D - 1


# Token log-probability.

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logprob(where, shape, dtype):
    n, v, d = shape
    leaves = linear(n, v, d, dtype, where["device"])
    target = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(1)).to(where["device"])
    target[-1], target[0] = v - 1, v - 1  # the last column, in a tile that is not full
    upstream = torch.linspace(-2, 3, n, device=where["device"]) / n
    check(*LOGPROB, leaves, [target], upstream, where)


@pytest.mark.parametrize("temperature, shift", [(0.5, 0.0), (2.0, 0.0), (1.0, -20.0), (1.0, 80.0)])
def test_logprob_temperature_and_shift(where, temperature, shift):
    leaves = linear(9, 1100, 40, torch.float32, where["device"], shift=shift)
    target = torch.arange(9, device=where["device"]) * 137
    upstream = torch.linspace(-2, 3, 9, device=where["device"])
    check(*LOGPROB, leaves, [target], upstream, where, temperature=temperature, shift=shift)
    logits = torch.randn(9, 5001, generator=torch.Generator().manual_seed(3)) * 3 + shift  # several blocks a row
    logits = logits.to(where["device"]).requires_grad_()
    check(*LOGITS_LOGPROB, [logits], [target], upstream, where, temperature=temperature, shift=shift)


def test_logprob_rows_without_gradient_cannot_poison(where):
    hidden, weight = linear(40, 300, 16, torch.float32, where["device"])
    target = torch.arange(40, device=where["device"])
    live = target % 3 > 0
    poisoned = torch.where(live[:, None], hidden, float("nan")).detach().requires_grad_()
    upstream = live * torch.linspace(1, 2, 40, device=where["device"])
    expected = run(K.fused_linear_logprob, [hidden, weight], [target], upstream, **only(where))
    logprob, _ = K.fused_linear_logprob(poisoned, weight, target, **only(where))
    d_hidden, d_weight = torch.autograd.grad(logprob, (poisoned, weight), upstream)
    assert torch.equal(d_hidden.double(), expected[2]) and torch.equal(d_weight.double(), expected[3])
    assert not d_hidden[~live].any() and logprob[~live].isnan().all()


def test_entropy_carries_no_gradient_and_bounds(where):
    hidden, weight = linear(9, 300, 16, torch.float32, where["device"], scale=1e-4)
    target = torch.arange(9, device=where["device"])
    logprob, entropy = K.fused_linear_logprob(hidden, weight, target, **only(where))
    assert logprob.requires_grad and not entropy.requires_grad
    assert torch.allclose(entropy, torch.full_like(entropy, 300.0).log(), atol=1e-5)  # near-uniform


# KL.

@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl(where, shape, dtype, direction):
    n, v, d = shape
    leaves = linear(n, v, d, dtype, where["device"])
    teacher = [x.detach() for x in linear(n, v, 24, dtype, where["device"], seed=5)]
    weights = torch.linspace(0.1, 2, n, device=where["device"])
    check(*KL, leaves, teacher, torch.tensor(0.7), where, direction=direction, token_weight=weights)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("temperature, shift, teacher_shift", [
    (0.5, 0, 0), (2.0, 0, 0), (1.0, -20, -20), (1.0, 80, 80), (1.0, 80, 0), (1.0, 0, -20)])
def test_kl_temperature_and_shift(where, direction, temperature, shift, teacher_shift):
    leaves = linear(9, 1100, 40, torch.float32, where["device"], shift=shift)
    teacher = [x.detach() for x in linear(9, 1100, 24, torch.float32, where["device"], seed=5, shift=teacher_shift)]
    kwargs = dict(direction=direction, temperature=temperature)
    check(*KL, leaves, teacher, torch.tensor(0.7), where, shift=shift, **kwargs)
    student_logits, teacher_logits = ((h @ w.T).detach() for h, w in (leaves, teacher))
    check(*LOGITS_KL, [student_logits.requires_grad_()], [teacher_logits], torch.tensor(0.7), where, **kwargs)


@pytest.mark.parametrize("noise", [0.12, 0.024, 0.0076])  # KL about 1e-1, 4e-3, 4e-4
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_gradient_error_when_models_are_close(where, direction, noise):
    """Where rounded logits ruin the gradient of others (9 % at KL 0.1, 120 % at 4e-4), at most 0.3 % here."""
    hidden, weight = linear(16, 1100, 64, torch.bfloat16, where["device"])
    moved = weight.detach().float()
    moved = (moved + noise * torch.randn(moved.shape, generator=torch.Generator().manual_seed(2)).to(moved)).bfloat16()
    args, upstream = ([hidden, weight], [hidden.detach(), moved]), torch.tensor(1.0)
    ours = run(K.fused_linear_kl, *args, upstream, direction=direction, **only(where))
    truth = run(K.fused_linear_kl_reference, *map(as_double, args), upstream, direction=direction)
    assert 0.3 < truth[1].mean().item() / (0.42 * (noise / 0.1) ** 2 * 0.64) < 3  # the case is what it says
    for x, y in zip(ours[2:], truth[2:]):
        assert (x - y).norm() <= 0.003 * y.norm()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_of_a_model_with_itself_is_zero(where, direction):
    hidden, weight = linear(20, 1100, 40, torch.float32, where["device"], shift=80.0)
    loss, kl = K.fused_linear_kl(hidden, weight, hidden.detach().clone(), weight.detach().clone(), direction,
                                 **only(where))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert kl.abs().max() == 0 and not any(g.any() for g in grads)
    nudged = (hidden.detach() + 1e-5 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden))
    _, kl = K.fused_linear_kl(hidden, weight, nudged, weight.detach(), direction, **only(where))
    assert kl.min() > -2e-5  # rounding of logits near 80


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_padding_of_vocabulary_and_tokens_is_ignored(where, direction):
    """Rows past vocab_size and tokens of weight 0 hold NaN: they may reach nothing, in value or in gradient."""
    nan = float("nan")
    hidden, weight = linear(40, 300, 16, torch.float32, where["device"])
    teacher_hidden, teacher_weight = (x.detach() for x in linear(40, 300, 24, torch.float32, where["device"], seed=5))
    live = torch.arange(40, device=where["device"]) % 3 > 0
    weights = live * torch.linspace(0.5, 1, 40, device=where["device"])
    want = run(K.fused_linear_kl_reference, [hidden, weight], [teacher_hidden, teacher_weight], torch.tensor(2.0),
               direction=direction, token_weight=weights)
    spoil = lambda x: torch.where(live[:, None], x.detach(), nan)
    pad = lambda x, rows: torch.cat((x.detach(), x.new_full((rows, x.shape[1]), nan)))
    leaves = [spoil(hidden).requires_grad_(), pad(weight, 20).requires_grad_()]
    got = run(K.fused_linear_kl, leaves, [spoil(teacher_hidden), pad(teacher_weight, 84)], torch.tensor(2.0),
              direction=direction, token_weight=weights, vocab_size=300, **only(where))
    assert torch.allclose(got[0], want[0], rtol=1e-5) and torch.allclose(got[1], want[1] * live, atol=1e-5)
    assert torch.allclose(got[2], want[2], atol=1e-5) and torch.allclose(got[3][:300], want[3], atol=1e-5)
    assert not got[2][~live].any() and not got[3][300:].any()

    student_logits, teacher_logits = spoil(hidden) @ weight.detach().T, spoil(teacher_hidden) @ teacher_weight.T
    loss, kl = K.kl_from_logits(student_logits.requires_grad_(), teacher_logits, direction, 1.0, weights, **only(where))
    assert torch.allclose(kl.double(), got[1], atol=1e-5)
    grad, = torch.autograd.grad(loss, student_logits)
    assert grad.isfinite().all() and not grad[~live].any()

    target = torch.arange(40, device=where["device"])
    logprob = K.fused_linear_logprob(hidden, leaves[1], target, vocab_size=300, **only(where))[0]
    assert torch.allclose(logprob, K.fused_linear_logprob_reference(hidden, weight, target)[0], atol=1e-5)
    assert not torch.autograd.grad(logprob.sum(), leaves[1])[0][300:].any()


@pytest.mark.parametrize("n, weights", [(0, None), (5, torch.zeros(5))], ids=["no tokens", "all tokens masked"])
def test_nothing_to_do_gives_zero_gradients(where, n, weights):
    hidden, weight = linear(n, 130, 16, torch.float32, where["device"])
    weights = weights if weights is None else weights.to(where["device"])
    teacher = hidden.detach() * float("nan"), weight.detach()
    loss, kl = K.fused_linear_kl(hidden, weight, *teacher, token_weight=weights, **only(where))
    assert loss.item() == 0 and kl.shape == (n,) and not kl.any()
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert not any(g.any() for g in grads)
    logits = torch.randn(n, 130, device=where["device"], requires_grad=True)
    loss, kl = K.kl_from_logits(logits, logits.detach() * float("nan"), token_weight=weights, **only(where))
    assert loss.item() == 0 and not kl.any() and not torch.autograd.grad(loss, logits)[0].any()
    target = torch.zeros(n, dtype=torch.int64, device=where["device"])
    for leaves, op in (((hidden, weight), K.fused_linear_logprob), ((logits,), K.logprob_from_logits)):
        logprob, entropy = op(*leaves, target, **only(where))
        assert logprob.shape == entropy.shape == (n,)
        assert not any(g.any() for g in torch.autograd.grad((logprob * 0).sum(), leaves))


# Both.

def test_pieces_do_not_change_the_result(where, monkeypatch):
    hidden, weight = linear(90, 300, 16, torch.float32, where["device"])
    teacher = [x.detach() for x in linear(90, 300, 24, torch.float32, where["device"], seed=5)]
    target = torch.arange(90, device=where["device"]) * 3
    upstream = torch.linspace(-1, 1, 90, device=where["device"])
    results = []
    for budget in (1 << 30, 1 << 15):
        monkeypatch.setattr(K, "CPU_LOGIT_BYTES", budget)
        monkeypatch.setattr(K, "GPU_LOGIT_BYTES", budget)
        results.append(run(K.fused_linear_kl, [hidden, weight], teacher, torch.tensor(1.0), **only(where))
                       + run(K.fused_linear_logprob, [hidden, weight], [target], upstream, **only(where)))
    for whole, parts in zip(*results):
        assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_repeats_bit_for_bit_and_graph_can_be_walked_twice(where):
    hidden, weight = linear(30, 300, 16, torch.float32, where["device"])
    teacher = [x.detach() for x in linear(30, 300, 24, torch.float32, where["device"], seed=5)]
    target = torch.arange(30, device=where["device"])
    one = torch.ones((), device=where["device"])
    first, again = [[*run(K.fused_linear_kl, [hidden, weight], teacher, one, **only(where)),
                     *run(K.fused_linear_logprob, [hidden, weight], [target], one, **only(where))] for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    loss, _ = K.fused_linear_kl(hidden, weight, *teacher, **only(where))
    once, twice = (torch.autograd.grad(loss * 3, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice) and torch.allclose(once.double(), 3 * first[3], rtol=1e-6)


def test_no_gradient_is_computed_that_nobody_asked_for(where, monkeypatch):
    hidden, weight = linear(8, 130, 16, torch.float32, where["device"])
    target = torch.arange(8, device=where["device"])
    loss, _ = K.fused_linear_kl(hidden, weight.detach(), hidden.detach(), weight.detach() * 2, **only(where))
    assert loss.grad_fn.saved_tensors[1] is None  # a frozen head: no dW
    assert torch.autograd.grad(loss, hidden)[0].any()

    def forbidden(*args):
        raise AssertionError("an autograd.Function ran under no_grad")
    for function in (K._FusedLinearLogprob, K._LogprobFromLogits, K._GradientInForward):
        monkeypatch.setattr(function, "forward", forbidden)
    with torch.no_grad():
        K.fused_linear_kl(hidden, weight, hidden, weight, **only(where))
        K.fused_linear_logprob(hidden, weight, target, **only(where))
        K.kl_from_logits(hidden, hidden, **only(where))
        K.logprob_from_logits(hidden, target, **only(where))


def test_teacher_in_another_precision(where):
    leaves = linear(9, 300, 16, torch.float32, where["device"])
    teacher = [x.detach() for x in linear(9, 300, 24, torch.bfloat16, where["device"], seed=5)]
    got = run(K.fused_linear_kl, leaves, teacher, torch.tensor(1.0), **only(where))
    want = run(K.fused_linear_kl_reference, as_double(leaves), as_double(teacher), torch.tensor(1.0))
    assert all(torch.allclose(x, y, atol=1e-4, rtol=1e-4) for x, y in zip(got, want))


def test_transposed_and_sliced_inputs(where):
    """Rows that are not contiguous, hidden states cut from a longer sequence, a weight with padded columns."""
    hidden, weight = (x.detach() for x in linear(20, 130, 15, torch.float32, where["device"]))
    target = torch.arange(20, device=where["device"])
    wide = torch.cat((weight, weight), 1)[:, :16]
    want = K.fused_linear_logprob_reference(hidden, weight, target)[0]
    for h, w in ((hidden.T.contiguous().T, wide), (torch.cat((hidden, hidden))[20:], weight.T.contiguous().T)):
        assert torch.allclose(K.fused_linear_logprob(h, w, target, **only(where))[0], want, atol=1e-5)
        loss, _ = K.fused_linear_kl(h.clone().requires_grad_(), w, h, w, **only(where))
        assert loss.item() == 0
    logits = (hidden @ weight.T).T.contiguous().T.requires_grad_()
    assert torch.allclose(K.logprob_from_logits(logits, target, **only(where))[0], want, atol=1e-5)


@pytest.mark.skipif(not K.INTERPRETED, reason="needs the kernel itself, on CPU memory; the interpreter run has it")
@pytest.mark.parametrize("reverse", [True, False])
def test_bf16_gradient_over_fp32_logits(reverse):
    """The gradient written in place, half as wide, over rows that span several blocks, is that of logits kept apart."""
    student, teacher = torch.randn(2, 3, 5001)
    weights = torch.tensor([1.0, 0.0, 2.0])
    kl, kl_in_place, grad = torch.empty(3), torch.empty(3), torch.empty(3, 5001)
    K._launch_kl_rows(student, teacher, weights, kl, grad, reverse, 0.7)
    in_place = K._grad_space(student, torch.bfloat16)
    K._launch_kl_rows(student, teacher, weights, kl_in_place, in_place, reverse, 0.7)
    assert torch.equal(kl, kl_in_place)
    assert ((in_place.float() - grad).abs() <= grad.abs() / 128).all()  # the interpreter truncates to bf16


@pytest.mark.skipif(not K.INTERPRETED, reason="needs the kernel itself, on CPU memory; the interpreter run has it")
def test_rows_beyond_two_gigabytes():
    """Row 2 starts at element 2**31 + 128, past what an int32 reaches. The memory in between is never touched."""
    stride, v = 2 ** 30 + 64, 300
    logits = torch.empty(2 * stride + v, dtype=torch.bfloat16).as_strided((3, v), (stride, 1))
    logits.copy_(torch.randn(3, v))
    target = torch.tensor([0, 150, 299])
    want = K.logprob_from_logits_reference(logits, target)
    got = K.logprob_from_logits(logits, target, backend="triton")
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(got, want))
    assert K.kl_from_logits(logits, logits, backend="triton")[1].abs().max() == 0


# The PyTorch path alone.

@only_here
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction):
    hidden, weight = (x.detach().requires_grad_() for x in linear(5, 11, 3, torch.float64, "cpu"))
    teacher = [x.detach() for x in linear(5, 13, 4, torch.float64, "cpu", seed=5)]
    weights, target = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0]).double(), torch.tensor([0, 3, 9, 1, 2])
    logits, teacher_logits = torch.randn(2, 5, 11, dtype=torch.float64).unbind()
    logits.requires_grad_()
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda h, w: K.fused_linear_kl(h, w, *teacher, direction, 0.7, weights, 10)[0], (hidden, weight))
    assert gradcheck(lambda h, w: K.fused_linear_logprob(h, w, target, 0.7, 10)[0], (hidden, weight))
    assert gradcheck(lambda x: K.kl_from_logits(x, teacher_logits, direction, 0.7, weights)[0], logits)
    assert gradcheck(lambda x: K.logprob_from_logits(x, target, 0.7)[0], logits)


@only_here
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(2, 40), st.integers(1, 6), st.sampled_from(["reverse", "forward"]),
       st.floats(0.3, 3), st.integers(0, 5), st.integers(1, 1 << 12), st.randoms(use_true_random=False))
def test_any_shape_equals_the_formulas(n, v, d, direction, temperature, padding, budget, random):
    hidden, weight = linear(n, v + padding, d, torch.float64, "cpu", seed=random.randrange(99))
    teacher = [x.detach() for x in linear(n, v + 2 * padding, d + 1, torch.float64, "cpu", seed=random.randrange(99))]
    weights = torch.tensor([random.choice([0.0, 1.0, 0.25]) for _ in range(n)], dtype=torch.float64)
    target = torch.tensor([random.randrange(v) for _ in range(n)], dtype=torch.int64)
    kwargs = dict(temperature=temperature, vocab_size=v)
    kl = dict(kwargs, direction=direction, token_weight=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(K, "CPU_LOGIT_BYTES", budget)
        got = [*run(K.fused_linear_kl, [hidden, weight], teacher, torch.tensor(0.3), **kl),
               *run(K.fused_linear_logprob, [hidden, weight], [target], weights, **kwargs)]
    want = [*run(K.fused_linear_kl_reference, [hidden, weight], teacher, torch.tensor(0.3), **kl),
            *run(K.fused_linear_logprob_reference, [hidden, weight], [target], weights, **kwargs)]
    want[1] = want[1] * (weights != 0)
    assert all(torch.allclose(x, y, atol=1e-11) for x, y in zip(got, want))


@only_here
@pytest.mark.parametrize("message, call", [
    ("temperature is 0", lambda h, w, y: K.fused_linear_logprob(h, w, y, temperature=0)),
    ("target_ids spans -100", lambda h, w, y: K.fused_linear_logprob(h, w, y - 100)),
    ("target_ids is .*int32", lambda h, w, y: K.logprob_from_logits(h, y.int())),
    ("vocab_size is 8", lambda h, w, y: K.fused_linear_logprob(h, w, y, vocab_size=8)),
    ("weight is", lambda h, w, y: K.fused_linear_logprob(h, w.double(), y)),
    ("hidden is .*float16", lambda h, w, y: K.fused_linear_logprob(h.half(), w.half(), y)),
    ("logits is", lambda h, w, y: K.logprob_from_logits(h[None], y)),
    ("direction is 'both'", lambda h, w, y: K.fused_linear_kl(h, w, h, w, "both")),
    ("pass vocab_size", lambda h, w, y: K.fused_linear_kl(h, w, h, w[:5])),
    ("teacher_hidden is", lambda h, w, y: K.fused_linear_kl(h, w, h[:1], w)),
    ("teacher_logits is", lambda h, w, y: K.kl_from_logits(h, w)),
    ("token_weight is", lambda h, w, y: K.kl_from_logits(h, h, token_weight=torch.ones(3))),
    ("backend is 'cuda'", lambda h, w, y: K.kl_from_logits(h, h, backend="cuda")),
    ('backend is "triton"', lambda h, w, y: K.kl_from_logits(h, h, backend="triton")),
])
def test_bad_arguments_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3), torch.randn(7, 3), torch.arange(4))


# Other processes.

def python(*args, **environment):
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | environment
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@only_here
def test_triton_in_interpreter():
    print(python("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1"))


@only_here
def test_machine_code():
    print(python("-m", "tests.compile_kernels"))


@only_here
def test_works_without_triton():
    python("-c", "import sys; sys.modules['triton'] = None\nimport torch, kernels\nassert not kernels.INTERPRETED\n"
           "kernels.fused_linear_kl(*[torch.randn(4, 4, requires_grad=True)] * 4)[0].backward()")


@only_here
def test_cpu_memory():
    """Peak extra memory at most 0.3x that of the formulas (T=512, D=256, V=32000); the benchmark prints the time too."""
    print(python("-m", "tests.bench_kernels", "--cpu", "--assert-memory"))
