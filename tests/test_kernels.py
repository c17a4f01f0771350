"""Compares the fused losses of kernels.py with float64: the PyTorch path, the Triton kernels and their machine code.

Plain pytest runs this file twice: here with the PyTorch path (and on a GPU where there is one), and, from
`test_triton_in_interpreter`, in a process of its own in which Triton was imported to interpret its kernels.
`test_machine_code` compiles them in a third process.
"""

import functools
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kernels as K

ROOT = pathlib.Path(__file__).resolve().parent.parent
if K.INTERPRETED:
    CASES = [("triton", "cpu")]
else:
    CASES = [("torch", "cpu")] + [(backend, "cuda") for backend in ("torch", "triton") if torch.cuda.is_available()]
both_ways = pytest.mark.parametrize("direction", ["reverse", "forward"])
only_here = pytest.mark.skipif(K.INTERPRETED, reason="runs in the process that is not interpreting")
only_interpreted = pytest.mark.skipif(not K.INTERPRETED, reason="needs the kernel itself, on CPU memory")
FP32, BF16 = torch.float32, torch.bfloat16
EPS = torch.finfo(FP32).eps
formulas = SimpleNamespace(kl=K.fused_linear_kl_reference, logprob=K.fused_linear_logprob_reference)


@pytest.fixture(params=CASES, ids="-".join)
def where(request):
    """A device, and the losses with a backend."""
    backend, device = request.param
    kl, logprob = (functools.partial(loss, backend=backend) for loss in (K.fused_linear_kl, K.fused_linear_logprob))
    return SimpleNamespace(device=device, kl=kl, logprob=logprob)


def targets(n, v, device, seed=1):
    """Tokens (n,), two of them in the last column of the vocabulary, whose block or tile is not full."""
    target = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))
    target[:1] = target[-1:] = v - 1
    return target.to(device)


def linear(n, v, d, dtype, device, seed=0, shift=0.0, scale=0.3):
    """hidden (n, d + 1), weight (v, d + 1): the logits spread by about scale * sqrt(d), all moved by `shift`."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d + 1, generator=g), torch.randn(v, d + 1, generator=g) * scale
    hidden[:, -1], weight[:, -1] = 1.0, shift
    return tuple(x.to(device, dtype).requires_grad_() for x in (hidden, weight))


def case(where, n, v=300, shift=0.0):
    """hidden and weight of a student, hidden and weight of a teacher, tokens."""
    student = linear(n, v, 16, FP32, where.device, shift=shift)
    teacher = [x.detach() for x in linear(n, v, 24, FP32, where.device, seed=5)]
    return *student, teacher, targets(n, v, where.device)


def run(loss, leaves, others, upstream, **kwargs):
    """-> every output and the gradient of the first for each leaf, as float64. The inputs must survive unchanged."""
    before = [x.detach().clone() for x in (*leaves, *others)]
    first, *rest = outputs = loss(*leaves, *others, **kwargs)
    assert not any(x.requires_grad for x in rest)
    grads = torch.autograd.grad((first * upstream.to(first)).sum(), leaves)
    assert all(torch.equal(a.nan_to_num(7e7), b.detach().nan_to_num(7e7)) for a, b in zip(before, (*leaves, *others)))
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(grads, leaves))
    return [x.detach().double() for x in (*outputs, *grads)]


def as_double(tensors):
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]


def check(loss, reference, leaves, others, upstream, shift=0.0, **kwargs):
    """Ours may not be further from float64 than the formulas in the dtype of the inputs are.

    In fp32 the two differ only in the order of summation, so a few last bits are granted, of the logits if these were
    shifted. The last column of the hidden states' gradient is then left out: it is shift times the sum of a row of the
    logits' gradient, which is 0, so that only rounding errors stand there.
    """
    ours, naive = (run(f, leaves, others, upstream, **kwargs) for f in (loss, reference))
    truth = run(reference, as_double(leaves), as_double(others), upstream, **kwargs)
    if shift:
        ours[-2], naive[-2], truth[-2] = (x[-2][:, :-1] for x in (ours, naive, truth))
    bits = 0.0 if leaves[0].dtype == BF16 else EPS * (4 + abs(shift) / 8)
    for number, (x, y, z) in enumerate(zip(ours, naive, truth, strict=True)):
        mine, theirs, size = (x - z).norm().item(), (y - z).norm().item(), z.norm().item()
        assert mine <= theirs + bits * size + 1e-30, f"result {number}: {mine:.3g}, naive {theirs:.3g} of {size:.3g}"


@pytest.mark.parametrize("shape, dtype, temperature, shift", [  # shape: N, V, D - 1
    *((shape, dtype, 1.0, 0) for shape in ((1, 1100, 40), (65, 257, 63), (64, 512, 127)) for dtype in (FP32, BF16)),
    *(((9, 1100, 40), FP32, *more) for more in ((0.5, 0), (2.0, -20), (1.0, 80)))])
def test_logprob(where, shape, dtype, temperature, shift):
    leaves = linear(*shape, dtype, where.device, shift=shift)
    upstream = torch.linspace(-2, 3, shape[0], device=where.device) / shape[0]
    target = targets(*shape[:2], where.device)
    check(where.logprob, formulas.logprob, leaves, [target], upstream, shift, temperature=temperature)


def test_logprob_rows_without_gradient_cannot_poison(where):
    hidden, weight = linear(40, 300, 16, FP32, where.device)
    target = torch.arange(40, device=where.device)
    live = target % 3 > 0
    poisoned = torch.where(live[:, None], hidden, float("nan")).detach().requires_grad_()
    upstream = live * torch.linspace(1, 2, 40, device=where.device)
    expected = run(where.logprob, [hidden, weight], [target], upstream)
    logprob, _ = where.logprob(poisoned, weight, target)
    d_hidden, d_weight = torch.autograd.grad(logprob, (poisoned, weight), upstream)
    assert torch.equal(d_hidden.double(), expected[2]) and torch.equal(d_weight.double(), expected[3])
    assert not d_hidden[~live].any() and logprob[~live].isnan().all()


@both_ways
@pytest.mark.parametrize("shape, dtypes, temperature, shift, teacher_shift", [  # N is small: a row at a time
    *((shape, [x, x], 1.0, 0, 0) for shape in ((1, 1100, 40), (7, 257, 63), (3, 4099, 20)) for x in (FP32, BF16)),
    ((7, 257, 63), [FP32, BF16], 1.0, 0, 0),
    *(((5, 5001, 16), [FP32, FP32], *more) for more in ((0.5, 0, 0), (2.0, 80, 80), (1.0, 80, 0), (1.0, 0, -20)))])
def test_kl(where, direction, shape, dtypes, temperature, shift, teacher_shift):
    n, v, d = shape
    leaves = linear(n, v, d, dtypes[0], where.device, shift=shift)
    teacher = [x.detach() for x in linear(n, v, 24, dtypes[1], where.device, seed=5, shift=teacher_shift)]
    check(where.kl, formulas.kl, leaves, [*teacher, targets(n, v, where.device)], torch.tensor(0.7), shift,
          direction=direction, temperature=temperature)


@pytest.mark.parametrize("noise", [0.12, 0.024, 0.0076])  # KL about 1e-1, 4e-3, 4e-4
@both_ways
def test_kl_gradient_error_when_models_are_close(where, direction, noise):
    """Where rounded logits ruin the gradient of others (9 % at KL 0.1, 120 % at 4e-4), at most 0.3 % here."""
    hidden, weight = linear(16, 1100, 64, BF16, where.device)
    moved = weight.detach().float()
    moved = (moved + noise * torch.randn(moved.shape, generator=torch.Generator().manual_seed(2)).to(moved)).bfloat16()
    args = [hidden, weight], [hidden.detach(), moved, targets(16, 1100, where.device)]
    upstream = torch.tensor(1.0)
    ours = run(where.kl, *args, upstream, direction=direction)
    truth = run(formulas.kl, *map(as_double, args), upstream, direction=direction)
    assert 0.3 < truth[1].mean().item() / (0.42 * (noise / 0.1) ** 2 * 0.64) < 3  # the case is what it says
    for x, y in zip(ours[-2:], truth[-2:]):
        assert (x - y).norm() <= 0.003 * y.norm()


@both_ways
def test_kl_of_a_model_with_itself_is_zero(where, direction):
    hidden, weight, _, target = case(where, 9, 1100, shift=80.0)
    teacher = hidden.detach().clone(), weight.detach().clone()
    same = where.kl(hidden, weight, *teacher, target, direction)
    grads = torch.autograd.grad(same.loss, (hidden, weight))
    assert same.kl.abs().max() == 0 and not any(g.any() for g in grads)
    assert torch.equal(same.logprobs, same.teacher_logprobs)


@both_ways
def test_padding_of_vocabulary_is_ignored(where, direction):
    """Rows past vocab_size hold NaN: they may reach nothing, in value or in gradient."""
    hidden, weight, teacher, target = case(where, 6)
    pad = lambda x, rows: torch.cat((x.detach(), x.new_full((rows, x.shape[1]), float("nan"))))
    padded, padded_teacher = pad(weight, 20).requires_grad_(), [teacher[0], pad(teacher[1], 84)]
    upstream = torch.linspace(-1, 1, 6, device=where.device)
    for loss, formula, args, padded_args, kwargs in (
            (where.kl, formulas.kl, [*teacher, target], [*padded_teacher, target], dict(direction=direction)),
            (where.logprob, formulas.logprob, [target], [target], {})):
        want = run(formula, [hidden, weight], args, upstream, **kwargs)
        got = run(loss, [hidden, padded], padded_args, upstream, vocab_size=300, **kwargs)
        assert not got[-1][300:].any()
        got[-1] = got[-1][:300]
        assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(got, want, strict=True))


def test_no_tokens_give_zero_gradients(where):
    hidden, weight, teacher, target = case(where, 0)
    logprob, entropy = where.logprob(hidden, weight, target)
    loss, *per_token = where.kl(hidden, weight, *teacher, target)
    assert loss == 0 and all(x.shape == (0,) for x in (logprob, entropy, *per_token))
    for value in (logprob.sum(), loss):
        assert not any(g.any() for g in torch.autograd.grad(value, (hidden, weight)))


@only_here  # it takes long, and the kernels are launched in the same way for each piece
def test_pieces_do_not_change_the_result(where, monkeypatch):
    """Pieces are multiples of 128, of tokens in the KL and of the vocabulary in the log-probability's backward pass."""
    hidden, weight, teacher, target = case(where, 290)
    upstream = torch.linspace(-1, 1, 290, device=where.device)
    results = []
    for budget in (1 << 30, 1 << 15):
        monkeypatch.setattr(K, "CPU_LOGIT_BYTES", budget)
        monkeypatch.setattr(K, "GPU_LOGIT_BYTES", budget)
        results.append(run(where.kl, [hidden, weight], [*teacher, target], torch.tensor(1.0))
                       + run(where.logprob, [hidden, weight], [target], upstream))
    for whole, parts in zip(*results):
        assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_the_graph_of_a_kl_is_walked_once(where):
    hidden, weight, teacher, target = case(where, 5)
    loss = where.kl(hidden, weight, *teacher, target).loss
    torch.autograd.grad(loss * 3, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="call fused_linear_kl again"):
        torch.autograd.grad(loss, weight)


@both_ways
def test_outputs_are_the_same_without_a_gradient(where, direction):
    """And the KL's agree with those of the log-probability, which takes another route to them."""
    hidden, weight, teacher, target = case(where, 4)
    with_graph = where.kl(hidden, weight, *teacher, target, direction)
    with torch.no_grad():
        without = where.kl(hidden, weight, *teacher, target, direction)
        logprob, entropy = where.logprob(hidden, weight, target)
        teacher_logprob, _ = where.logprob(*teacher, target)
    assert with_graph.loss.requires_grad and not any(x.requires_grad for x in (*with_graph[1:], *without))
    assert all(torch.equal(x, y) for x, y in zip(with_graph, without))
    for x, y in ((without.entropy, entropy), (without.logprobs, logprob), (without.teacher_logprobs, teacher_logprob)):
        assert torch.allclose(x, y, atol=1e-5)


def test_transposed_and_sliced_inputs(where):
    """Rows and targets are not contiguous, hidden states cut from a longer sequence, a weight has padded columns."""
    hidden, weight = (x.detach() for x in linear(5, 130, 15, FP32, where.device))
    target = torch.arange(10, device=where.device)[::2]
    wide = torch.cat((weight, weight), 1)[:, :16]
    want = formulas.logprob(hidden, weight, target)[0]
    for h, w in ((hidden.T.contiguous().T, wide), (torch.cat((hidden, hidden))[5:], weight.T.contiguous().T)):
        assert torch.allclose(where.logprob(h, w, target)[0], want, atol=1e-5)
        same = where.kl(h.clone().requires_grad_(), w, h, w, target)
        assert same.loss.item() == 0 and torch.allclose(same.teacher_logprobs, want, atol=1e-5)


@only_interpreted
@both_ways
def test_a_target_outside_the_vocabulary_gives_nan(where, direction, monkeypatch):
    """On a GPU nobody checks targets. The NaN may reach no other row, no other output, and not the KL's gradient."""
    monkeypatch.setattr(K, "_check_targets", lambda target_ids, *sizes: target_ids)
    hidden, weight, teacher, target = case(where, 4)
    leaves, upstream, bad = [hidden, weight], torch.tensor(1.0), torch.tensor([-100, target[1], 300, target[3]])
    outside = torch.tensor([True, False, True, False])
    good, wrong = (run(where.kl, leaves, [*teacher, y], upstream, direction=direction) for y in (target, bad))
    for name, x, y in zip((*K.TokenKL._fields, "d hidden", "d weight"), good, wrong, strict=True):
        same = torch.equal(y.isnan(), outside) and torch.equal(x[~outside], y[~outside])
        assert same if "logprobs" in name else torch.equal(x, y), name
    (good, entropy), (wrong, same_entropy) = (where.logprob(*leaves, y) for y in (target, bad))
    assert torch.equal(wrong.isnan(), outside) and torch.equal(good[~outside], wrong[~outside])
    assert torch.equal(entropy, same_entropy)


@only_interpreted
@pytest.mark.parametrize("reverse", [True, False])
def test_bf16_gradient_over_fp32_logits(reverse):
    """Written in place, half as wide, over rows of several blocks, it is that of logits kept apart, as is the rest."""
    student, teacher = torch.randn(2, 3, 5001)
    target = torch.tensor([1, 5000, 2600])
    (apart, in_place), grad = torch.empty(2, 4, 3), torch.empty(3, 5001)
    K._launch_kl_rows(student, teacher, target, apart, grad, reverse, 0.7)
    over_logits = K._grad_space(student, BF16)
    K._launch_kl_rows(student, teacher, target, in_place, over_logits, reverse, 0.7)
    assert torch.equal(apart, in_place)
    assert ((over_logits.float() - grad).abs() <= grad.abs() / 128).all()  # the interpreter truncates to bf16


@only_interpreted
@pytest.mark.parametrize("reverse", [True, False])
def test_rows_beyond_two_gigabytes(reverse):
    """Row 2 starts at element 2**31 + 128, past what an int32 reaches. The memory in between is never touched."""
    stride, v, found = 2 ** 30 + 64, 300, []
    logits, target = torch.randn(2, 3, v).bfloat16(), torch.tensor([0, 150, 299])
    for step in (v, stride):
        space = lambda: torch.empty(2 * step + v, dtype=BF16).as_strided((3, v), (step, 1))
        outputs, grad = torch.empty(4, 3), space()
        K._launch_kl_rows(*(space().copy_(x) for x in logits), target, outputs, grad, reverse, 1.0)
        found.append((outputs, grad.clone()))
    (near, near_grad), (far, far_grad) = found
    assert torch.equal(near, far) and torch.equal(near_grad, far_grad) and near.isfinite().all()


@pytest.mark.parametrize("message, call", [
    ("temperature is 0", lambda h, w, y: K.fused_linear_logprob(h, w, y, temperature=0)),
    ("target_ids spans -100", lambda h, w, y: K.fused_linear_logprob(h, w, y - 100)),
    ("vocab_size is 8", lambda h, w, y: K.fused_linear_logprob(h, w, y, vocab_size=8)),
    ("direction is 'both'", lambda h, w, y: K.fused_linear_kl(h, w, h, w, y, "both")),
    ("pass vocab_size", lambda h, w, y: K.fused_linear_kl(h, w, h, w[:5], y)),
])
def test_bad_arguments_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3), torch.randn(7, 3), torch.arange(4))


def python(*args, **environment):
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | environment
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@only_here
def test_triton_in_interpreter():
    """Without conftest.py, which imports what no kernel needs."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-m", "not rest", __file__]
    print(python(*words, TRITON_INTERPRET="1"))


@pytest.mark.rest
@pytest.mark.parametrize("tool", ["compile_kernels", "bench_kernels --cpu"])
def test_tools(tool):
    """No kernel spills registers, and on a CPU ours take at most 0.3x the formulas' extra memory."""
    print(python("-m", *f"tests.tools.{tool}".split()))


@pytest.mark.rest
def test_works_without_triton():
    python("-c", "import sys; sys.modules['triton'] = None\nimport torch, kernels\nassert not kernels.INTERPRETED\n"
           "kernels.fused_linear_kl(*[torch.randn(4, 4, requires_grad=True)] * 4, torch.arange(4)).loss.backward()")
