"""Exact full-vocabulary losses from hidden states: token log-probability (with entropy) and KL between two models.

Letters: N response tokens packed together, V vocabulary, D hidden size (Ds of the student, Dt of the teacher).

Why this file. Logits of N=16384 tokens over V=151936 (Qwen3) are 10 GB in fp32, and naive full-vocabulary KL keeps four
to five such matrices alive: 44-51 GB, for an answer of N numbers and two gradients, dH (N, Ds) and dW (V, Ds). The fused
functions never hold an (N, V) matrix. Two different algorithms follow from counting FLOPs and bytes (Ds=2048, Dt=4096):

KL, in training: chunks of tokens, logits materialised (`fused_linear_kl`).
  Products: 2 N V (Ds + Dt) for both logits, 4 N V Ds for dH and dW: 51 TFLOP, 64 ms at an H100's 800 TFLOP/s. Computing
  the logits again in the backward would make that 102 ms, so the gradient is formed in the forward, while they are at
  hand. Then nothing is gained by keeping them out of memory: the vendor's GEMM writes a chunk of fp32 logits of each
  model, one row kernel reads both twice (for statistics, then for the gradient, written in bf16 over the student's
  logits: 18 bytes an entry, 45 GB in all, 16 ms at 2.8 TB/s), and two GEMMs turn that into dH and dW. In either
  direction, KL(p || q), one pass gives the statistics: max and sum e of each model, and sum e_p (p - q), with p and q
  the logits and e = exp(logit - max).

Token log-probability: fused (`fused_linear_logprob`).
  Policy gradients need its forward without any backward too (old and reference policies), and there the traffic of
  logits is pure loss. A tile kernel multiplies 128 tokens with 256 vocabulary rows, keeps the logits in registers and
  writes three numbers a row: 13 ms of products, 10 TFLOP. One tile a program: a loop over V inside the program spills
  1.4 KB of registers a thread. The upstream gradient is not known in the forward, so the backward recomputes logits, by
  slices of the vocabulary rather than of the tokens: each slice of dW is then final, and only dH (N, D) accumulates.

Numerics. Logits, statistics and all accumulation are fp32 (fp64 for fp64 inputs, in PyTorch); only operands, and the
gradient of the logits that enters dH and dW, are bf16. It matters most where distillation ends: logits rounded to bf16
cost 9 % of the gradient at KL = 0.1, 35 % at 4e-3, 120 % at 4e-4; rounding the gradient alone costs 0.2 % everywhere.

Reading order: the references are the formulas; the PyTorch row operations do the same in place (this is what runs on a
CPU); the Triton kernels are those row operations, and the tile kernel, for a GPU. `backend` forces either.
Equations are those of arXiv 2605.12483 v1. No generalised JSD: its gradient needs a third pass over both rows.
"""

import functools
import math
import os

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # a laptop without a GPU: everything works, in PyTorch
    triton = None

    class tl:  # what the signatures below name
        constexpr = None

# Triton fixes this when it is imported; the kernels then run in Python on CPU tensors, for tests.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

CPU_LOGIT_BYTES = 8 << 20  # of logits at a time: 65 rows of a 32k vocabulary; tiny problems are one piece
GPU_LOGIT_BYTES = 5 << 28  # 2048 rows of Qwen3's: fewer would read and write dW (V, Ds), 1.2 GB in fp32, too often

# The largest tiles that spill no register where they run (results/kernels/compile.md).
HOPPER_TILE = dict(BLOCK_N=128, BLOCK_V=256, BLOCK_D=64, GROUP=16, num_warps=8, num_stages=3)  # 144 KB of shared memory
TILE = dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, GROUP=16, num_warps=8, num_stages=3)  # 96 KB
AMD_TILE = dict(TILE, num_stages=2)  # 32 KB
FP32_TILE = dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32, GROUP=16, num_warps=4, num_stages=2)
ROW = dict(BLOCK=2048, num_warps=8)


# References: the formulas on whole logits, under plain autograd.

def logprob_from_logits_reference(logits, target_ids, temperature=1.0):
    """log_softmax(logits / temperature)[target] and its entropy: (N, V), (N,) -> (N,), (N,)."""
    logp = torch.log_softmax(_wide(logits) / temperature, dim=-1)  # (N, V)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    return logp.gather(-1, target_ids[:, None]).squeeze(-1), entropy.detach()


def kl_from_logits_reference(student_logits, teacher_logits, direction="reverse", temperature=1.0, token_weight=None):
    """sum(token_weight * KL) and KL (N,): of the student from the teacher (reverse, Eq. 4) or the other way (Eq. 5)."""
    student = torch.log_softmax(_wide(student_logits) / temperature, dim=-1)  # (N, V)
    teacher = torch.log_softmax(_wide(teacher_logits).detach() / temperature, dim=-1)  # (N, V)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    kl = (p.exp() * (p - q)).sum(-1)  # (N,)
    loss = kl.sum() if token_weight is None else (token_weight * kl).sum()
    return loss, kl.detach()


def fused_linear_logprob_reference(hidden, weight, target_ids, temperature=1.0, vocab_size=None):
    """What `fused_linear_logprob` computes, with (N, V) logits in the dtype of the inputs."""
    return logprob_from_logits_reference(hidden @ weight[:vocab_size].T, target_ids, temperature)


def fused_linear_kl_reference(student_hidden, student_weight, teacher_hidden, teacher_weight, direction="reverse",
                              temperature=1.0, token_weight=None, vocab_size=None):
    """What `fused_linear_kl` computes, with (N, V) logits of both models in the dtype of the inputs."""
    student_logits = student_hidden @ student_weight[:vocab_size].T  # (N, V)
    teacher_logits = teacher_hidden @ teacher_weight[:vocab_size].T  # (N, V)
    return kl_from_logits_reference(student_logits, teacher_logits, direction, temperature, token_weight)


# Precision, products and pieces.

def _wide_dtype(x):
    """Of logits, statistics and accumulation."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x):
    return x.to(_wide_dtype(x))


def _operand(x):
    """bf16 stays bf16 for the tensor cores; a CPU has no bf16 product with an fp32 result: there it is widened, exactly."""
    return x.detach() if x.is_cuda else _wide(x.detach())


def _mm(a, b, out=None):
    """a @ b with an fp32 (fp64) result whatever the operands."""
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out=out)


def _add_mm(total, a, b):
    """total += a @ b, total being fp32 (fp64) whatever the operands."""
    if a.dtype == torch.bfloat16:  # an fp32 total beside bf16 operands: PyTorch 2.10 and later
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)


def _pieces(total, row_bytes, device):
    """Near-equal slices of range(total) with row_bytes each row within the budget; one slice for tiny problems."""
    budget = GPU_LOGIT_BYTES if device.type == "cuda" else CPU_LOGIT_BYTES
    count = max(1, math.ceil(total * row_bytes / budget))
    step = math.ceil(total / count)
    if count > 1:
        step += -step % 64  # whole tiles in the products
    return [slice(start, min(start + step, total)) for start in range(0, total, max(step, 1))]


# Row operations in PyTorch. They overwrite their logits: each new matrix would cost a pass, and memory, of its own.

def _logprob_rows(logits, target_ids, temperature):
    """Logits (n, V) -> logprob, entropy, max, log sum exp(logits - max), stacked (4, n)."""
    logits.mul_(1 / temperature)
    target = logits.gather(1, target_ids[:, None]).squeeze(1)
    top = logits.amax(1)
    exp = logits.sub_(top[:, None]).exp()
    total = exp.sum(1)
    log_total = total.log()
    entropy = log_total - exp.mul_(logits).sum(1) / total
    return torch.stack((target - top - log_total, entropy, top, log_total))


def _logprob_grad_rows(logits, first, target_ids, top, log_total, upstream, temperature):
    """Logits (n, v) of columns from `first` on -> in place, their gradient upstream * (onehot - softmax) / temperature."""
    scale = upstream / temperature
    grad = logits.mul_(1 / temperature).sub_(top[:, None]).sub_(log_total[:, None]).exp_().mul_(-scale[:, None])
    column = target_ids - first
    inside = (column >= 0) & (column < grad.shape[1])
    return grad.scatter_add_(1, column.clamp(0, grad.shape[1] - 1)[:, None], (scale * inside)[:, None])


def _kl_rows(student, teacher, token_weight, reverse, temperature, with_grad):
    """Logits (n, V) of both -> KL (n,), gradient of sum(token_weight * KL) by the student's logits (n, V) or None.

    With d = p - q and mean = sum(e_p d) / sum(e_p): KL = mean - logsumexp(p) + logsumexp(q), and its gradient is
    softmax(p) (d - mean) if the student is p (reverse), softmax(student) - softmax(teacher) if it is q (forward).
    """
    for logits in (student, teacher):
        logits.mul_(1 / temperature)
        logits.sub_(logits.amax(1, keepdim=True))
    p, q = (student, teacher) if reverse else (teacher, student)
    q_exp = q.exp()
    q_total = q_exp.sum(1, keepdim=True)
    diff = torch.sub(p, q, out=q)
    p_exp = p.exp_()
    p_total = p_exp.sum(1, keepdim=True)
    scale = token_weight[:, None] / temperature
    grad = None
    if reverse:
        mean = torch.mul(p_exp, diff, out=q_exp).sum(1, keepdim=True) / p_total
        if with_grad:
            grad = diff.sub_(mean).mul_(p_exp).mul_(scale / p_total)
    else:
        mean = diff.mul_(p_exp).sum(1, keepdim=True) / p_total
        if with_grad:
            grad = q_exp.mul_(scale / q_total).sub_(p_exp.mul_(scale / p_total))
    return (mean - p_total.log() + q_total.log()).squeeze(1), grad


# The same in Triton. One program has one row and walks its columns BLOCK at a time. Every lane of the block keeps a
# running maximum and sums of its own, so the loop needs no reduction across warps; the lanes meet once, at the end.
# Columns past V read as -1e30, far below the -1e20 at which maxima start: e is 0 there, and so is e times anything.
# V is a compile-time constant: one per model. Row offsets are int64: N * V exceeds 2**31.

def _jit(function):
    return function if triton is None else triton.jit(function)


@_jit
def _kl_row_kernel(
    student_ptr, teacher_ptr, token_weight_ptr,  # in: (N, V), (N, V), (N,)
    kl_ptr, grad_ptr,  # out: (N,), (N, V); a bf16 grad may lie over the first half of each fp32 student row
    student_stride, teacher_stride, grad_stride,  # between rows
    inv_temperature,
    V: tl.constexpr, REVERSE: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    p_top = tl.full((BLOCK,), -1e20, tl.float32)
    q_top = tl.full((BLOCK,), -1e20, tl.float32)
    p_total = tl.zeros((BLOCK,), tl.float32)
    q_total = tl.zeros((BLOCK,), tl.float32)
    # Sum of e_p ((p - p_top) - (q - q_top)), not of e_p (p - q): logits all near 80 would leave rounding in that.
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        student = tl.load(student_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
        teacher = tl.load(teacher_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
        p, q = (student, teacher) if REVERSE else (teacher, student)
        p_new = tl.maximum(p_top, p)
        q_new = tl.maximum(q_top, q)
        p_exp = tl.exp(p - p_new)
        shrink = tl.exp(p_top - p_new)
        dot = (dot + p_total * ((p_top - p_new) - (q_top - q_new))) * shrink + p_exp * ((p - p_new) - (q - q_new))
        p_total = p_total * shrink + p_exp
        q_total = q_total * tl.exp(q_top - q_new) + tl.exp(q - q_new)
        p_top = p_new
        q_top = q_new
    p_max = tl.max(p_top, 0)
    q_max = tl.max(q_top, 0)
    dot += p_total * ((p_top - p_max) - (q_top - q_max))
    scale = tl.exp(p_top - p_max)
    p_sum = tl.sum(p_total * scale, 0)
    q_sum = tl.sum(q_total * tl.exp(q_top - q_max), 0)
    mean = tl.sum(dot * scale, 0) / p_sum
    token_weight = tl.load(token_weight_ptr + row)
    live = token_weight != 0  # dead rows may hold anything, NaN too
    kl = mean - tl.log(p_sum) + tl.log(q_sum)
    tl.store(kl_ptr + row, tl.where(live, kl, 0.0))

    if WITH_GRAD:
        grad_ptr += row * grad_stride
        p_scale = token_weight * inv_temperature / p_sum
        q_scale = token_weight * inv_temperature / q_sum
        for start in range(0, V, BLOCK):
            columns = start + lanes
            student = tl.load(student_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
            teacher = tl.load(teacher_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
            if REVERSE:
                grad = tl.exp(student - p_max) * p_scale * ((student - p_max) - (teacher - q_max) - mean)
            else:
                grad = tl.exp(student - q_max) * q_scale - tl.exp(teacher - p_max) * p_scale
            # In place, bf16 block j covers bytes of fp32 blocks <= j: all warps must have read before one writes.
            tl.debug_barrier()
            tl.store(grad_ptr + columns, tl.where(live, grad, 0.0).to(grad_ptr.dtype.element_ty), columns < V)


@_jit
def _logprob_row_kernel(
    logits_ptr, target_ptr,  # in: (N, V), (N,)
    logprob_ptr, entropy_ptr, top_ptr, log_total_ptr,  # out: (N,) each
    logits_stride,  # between rows
    inv_temperature,
    V: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e20, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)  # sum of e (x - top)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        x = tl.load(logits_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
        new_top = tl.maximum(top, x)
        shrink = tl.exp(top - new_top)
        exp = tl.exp(x - new_top)
        # The old sum was relative to the old maximum; a lane's first -1e20 meets a sum of 0.
        dot = (dot + (top - new_top) * total) * shrink + exp * (x - new_top)
        total = total * shrink + exp
        top = new_top
    row_top = tl.max(top, 0)
    scale = tl.exp(top - row_top)
    row_total = tl.sum(total * scale, 0)
    row_dot = tl.sum((dot + (top - row_top) * total) * scale, 0)
    log_total = tl.log(row_total)
    target = tl.load(logits_ptr + tl.load(target_ptr + row)).to(tl.float32) * inv_temperature
    tl.store(logprob_ptr + row, target - row_top - log_total)
    tl.store(entropy_ptr + row, log_total - row_dot / row_total)
    tl.store(top_ptr + row, row_top)
    tl.store(log_total_ptr + row, log_total)


@_jit
def _logprob_grad_kernel(
    logits_ptr, target_ptr, top_ptr, log_total_ptr, upstream_ptr,  # in: (N, V), columns from `first` on; (N,) each
    grad_ptr,  # out: (N, V); as in _kl_row_kernel it may lie over the logits
    logits_stride, grad_stride,  # between rows
    first, inv_temperature,
    V: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    target = tl.load(target_ptr + row) - first
    top = tl.load(top_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    upstream = tl.load(upstream_ptr + row)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
        onehot = tl.where(columns == target, 1.0, 0.0)
        grad = tl.where(upstream != 0, upstream * inv_temperature * (onehot - tl.exp(x - top - log_total)), 0.0)
        tl.debug_barrier()  # as in _kl_row_kernel
        tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), columns < V)


@_jit
def _logprob_tile_kernel(
    hidden_ptr, weight_ptr, target_ptr,  # in: (N, D), (V, D), (N,)
    top_ptr, total_ptr, dot_ptr, target_logit_ptr,  # out: (tiles of V, N) x 3, (N,)
    N, V, hidden_stride, weight_stride,  # between rows
    inv_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, WIDEN: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_V) tile of logits x, reduced over its columns to max, sum e and sum e (x - max) a row."""
    # Neighbours in time share operands: GROUP row tiles against one tile of the vocabulary, then against the next.
    program = tl.program_id(0)
    column_tiles = tl.cdiv(V, BLOCK_V)
    group = program // (GROUP * column_tiles)
    height = tl.minimum(tl.cdiv(N, BLOCK_N) - group * GROUP, GROUP)
    within = program - group * GROUP * column_tiles
    row_tile = group * GROUP + within % height
    column_tile = within // height

    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    depth = tl.arange(0, BLOCK_D)
    # Rows and columns past the end wrap around to ones that exist: no mask in the loop; their logits are masked below.
    hidden_ptrs = hidden_ptr + (rows % N).to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    weight_ptrs = weight_ptr + (columns % V).to(tl.int64)[None, :] * weight_stride + depth[:, None]
    x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            a = tl.load(hidden_ptrs)
            b = tl.load(weight_ptrs)
        else:
            a = tl.load(hidden_ptrs, depth[None, :] < D - start, other=0.0)
            b = tl.load(weight_ptrs, depth[:, None] < D - start, other=0.0)
        if WIDEN:  # the interpreter multiplies the bits of bf16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        x = tl.dot(a, b, x, input_precision="ieee")
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D

    x = tl.where(columns[None, :] < V, x * inv_temperature, -1e30)  # or a padded column would count as a token
    top = tl.max(x, 1)
    exp = tl.exp(x - top[:, None])
    out = column_tile.to(tl.int64) * N + rows
    tl.store(top_ptr + out, top, rows < N)
    tl.store(total_ptr + out, tl.sum(exp, 1), rows < N)
    tl.store(dot_ptr + out, tl.sum(exp * (x - top[:, None]), 1), rows < N)  # 0 * -1e30 = 0 past V
    target = tl.load(target_ptr + rows, rows < N, other=-1)
    logit = tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1)
    here = (target >= column_tile * BLOCK_V) & (target < tl.minimum(column_tile * BLOCK_V + BLOCK_V, V))
    tl.store(target_logit_ptr + rows, logit, here & (rows < N))  # of all tiles, one has the row's target


# Launches.

def _use_triton(backend, x):
    """The dispatcher: Triton for CUDA tensors, PyTorch elsewhere, unless the caller says which."""
    possible = triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
    if backend is None:
        backend = "triton" if possible and x.is_cuda else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f'backend is {backend!r}; pass "torch", "triton", or None to choose by device.')
    if backend == "triton" and not possible:
        raise ValueError(f'backend is "triton" for a {x.dtype} tensor on {x.device}; that needs the triton package, float32 '
                         'or bfloat16, and CUDA (or TRITON_INTERPRET=1 in the environment): pass backend="torch".')
    return backend == "triton" and len(x) > 0  # a grid of no programs cannot be launched


def _launch(kernel, programs, *args, **constants):
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device; on a CPU this does nothing
        kernel[(programs,)](*args, **constants)


def _rows(x):
    """x with contiguous rows, as the kernels address it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _logit_space(like, rows, columns, kernel):
    """Memory for a piece of logits, used for one piece after another: fresh pages would cost a CPU a fault each. On a GPU
    rows start at multiples of 256 bytes, or an odd vocabulary (151669) would keep the products off their fast paths."""
    return like.new_empty((rows, columns + (-columns % 64 if kernel else 0)))[:, :columns]


def _grad_space(logits, dtype):
    """Where the gradient of fp32 logits (n, V) goes: over them; in bf16, over the first half of every row."""
    return logits.view(torch.bfloat16)[:, :logits.shape[1]] if dtype == torch.bfloat16 else logits


def _launch_kl_rows(student, teacher, token_weight, kl, grad, reverse, temperature):
    with_grad = grad is not None
    grad = student if grad is None else grad
    _launch(_kl_row_kernel, len(student), student, teacher, token_weight, kl, grad,
            student.stride(0), teacher.stride(0), grad.stride(0), 1 / temperature, V=student.shape[1], REVERSE=reverse, WITH_GRAD=with_grad, **ROW)


def _launch_logprob_grad(logits, first, target_ids, top, log_total, upstream, grad, temperature):
    _launch(_logprob_grad_kernel, len(logits), logits, target_ids, top, log_total, upstream, grad, logits.stride(0),
            grad.stride(0), first, 1 / temperature, V=logits.shape[1], **ROW)


def _tile(x):
    if x.dtype != torch.bfloat16 or not x.is_cuda:
        return FP32_TILE
    if torch.version.hip:
        return AMD_TILE
    return HOPPER_TILE if torch.cuda.get_device_capability(x.device)[0] == 9 else TILE


def _logprob_tiles(hidden, weight, target_ids, temperature, tile):
    """The tile kernel, and the merge of its statistics: what `_logprob_rows` returns, (4, n)."""
    hidden, weight = _rows(hidden), _rows(weight)
    (n, depth), vocabulary = hidden.shape, len(weight)
    row_tiles, column_tiles = triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(vocabulary, tile["BLOCK_V"])
    top, total, dot = hidden.new_empty((3, column_tiles, n), dtype=torch.float32)
    target = hidden.new_full((n,), math.nan, dtype=torch.float32)  # remains, visibly, where a target id is out of range
    _launch(_logprob_tile_kernel, row_tiles * column_tiles, hidden, weight, target_ids, top, total, dot, target,
            n, vocabulary, hidden.stride(0), weight.stride(0), 1 / temperature, D=depth, WIDEN=INTERPRETED, **tile)
    row_top = top.amax(0)
    shift = top - row_top
    scale = shift.exp()
    row_total = (total * scale).sum(0)
    row_dot = ((dot + shift * total) * scale).sum(0)
    log_total = row_total.log()
    return torch.stack((target - row_top - log_total, log_total - row_dot / row_total, row_top, log_total))


# Token log-probability.

def _logprob_forward(hidden, weight, target_ids, temperature, kernel):
    """-> logprob, entropy, max, log sum exp(logits - max) (4, N)."""
    if kernel:
        tile = _tile(hidden)
        row_bytes = 3 * 4 * triton.cdiv(len(weight), tile["BLOCK_V"])
        pieces = [_logprob_tiles(hidden[rows].detach(), weight.detach(), target_ids[rows], temperature, tile)
                  for rows in _pieces(len(hidden), row_bytes, hidden.device)]
    else:
        hidden, weight = _operand(hidden), _operand(weight)
        pieces = [_logprob_rows(_mm(hidden[rows], weight.T), target_ids[rows], temperature)
                  for rows in _pieces(len(hidden), len(weight) * _wide_dtype(hidden).itemsize, hidden.device)]
    return torch.cat(pieces or [hidden.new_zeros((4, 0), dtype=_wide_dtype(hidden))], 1)


class _FusedLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, temperature, vocab_size, kernel):
        logprob, entropy, *statistics = _logprob_forward(hidden, weight[:vocab_size], target_ids, temperature, kernel)
        ctx.save_for_backward(hidden, weight, target_ids, *statistics)
        ctx.settings = temperature, vocab_size, kernel
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        hidden_in, weight_in, target_ids, top, log_total = ctx.saved_tensors
        temperature, vocab_size, kernel = ctx.settings
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden, weight = _operand(hidden_in), _operand(weight_in[:vocab_size])
        # Tokens without upstream gradient (clipped, or of a group without reward spread) cost no products and, whatever
        # their hidden states hold, cannot poison dW.
        keep = upstream.nonzero().squeeze(1)
        partial = len(keep) < len(upstream)
        per_token = target_ids, top, log_total, upstream.contiguous()
        if partial:
            hidden, *per_token = (x.index_select(0, keep) for x in (hidden, *per_token))
        d_hidden = torch.zeros_like(hidden, dtype=top.dtype) if need_hidden else None  # (n, D)
        d_weight = torch.zeros_like(weight_in) if need_weight else None  # (V, D)
        kernel = kernel and len(hidden) > 0
        parts = _pieces(len(weight), max(len(hidden), 1) * top.element_size(), weight.device)
        space = _logit_space(top, len(hidden), parts[0].stop, kernel)
        for part in parts:
            logits = _mm(hidden, weight[part].T, out=space[:, :part.stop - part.start])  # (n, v)
            if kernel:
                grad = _grad_space(logits, hidden.dtype)
                _launch_logprob_grad(logits, part.start, *per_token, grad, temperature)
            else:
                grad = _logprob_grad_rows(logits, part.start, *per_token, temperature).to(hidden.dtype)
            if need_hidden:
                _add_mm(d_hidden, grad, weight[part])
            if need_weight:
                d_weight[part] = grad.T @ hidden
        if need_hidden and partial:
            d_hidden = d_hidden.new_zeros(hidden_in.shape).index_copy_(0, keep, d_hidden)
        return d_hidden.to(hidden_in.dtype) if need_hidden else None, d_weight, None, None, None, None


def fused_linear_logprob(hidden, weight, target_ids, temperature=1.0, vocab_size=None, backend=None):
    """Log-probability of one token a row, log_softmax(hidden @ weight.T / temperature)[target], without (N, V) logits.

    hidden (N, D) and weight (V, D) share a dtype, float32, bfloat16 or float64; target_ids (N,) int64. Rows of weight
    from vocab_size on are padding: probability and gradient 0. backend: "torch", "triton", or None to choose by device.
    Returns logprob (N,), differentiable in hidden and weight, and entropy (N,), for logging, which carries no gradient;
    both float32 (float64 for float64). Rows whose upstream gradient is 0 reach no gradient. Nothing is saved for a
    backward where none can come. Raises ValueError on shapes, dtypes or values that do not fit; a target outside the
    vocabulary raises on a CPU and gives NaN on a GPU, which would have to wait for the check.
    """
    vocab_size = _check_linear(hidden, weight, vocab_size, temperature)
    _check_targets(target_ids, len(hidden), vocab_size)
    kernel = _use_triton(backend, hidden)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _FusedLinearLogprob.apply(hidden, weight, target_ids, temperature, vocab_size, kernel)
    return tuple(_logprob_forward(hidden, weight[:vocab_size], target_ids, temperature, kernel)[:2])


# Full-vocabulary KL.

def _kl_forward(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, reverse, temperature,
                vocab_size, kernel, need_hidden, need_weight):
    """-> loss, KL (N,), d loss / d student hidden (N, Ds), d loss / d student weight (V, Ds); None where not needed."""
    d_weight = (student_weight.new_zeros(student_weight.shape, dtype=token_weight.dtype) if need_weight else None)
    student_hidden, student_weight = _operand(student_hidden), _operand(student_weight[:vocab_size])
    teacher_hidden, teacher_weight = _operand(teacher_hidden), _operand(teacher_weight[:vocab_size])
    d_hidden = torch.empty_like(student_hidden, dtype=token_weight.dtype) if need_hidden else None
    kl = torch.empty_like(token_weight)
    with_grad = need_hidden or need_weight
    pieces = _pieces(len(kl), vocab_size * kl.element_size(), kl.device)
    spaces = [_logit_space(kl, pieces[0].stop if pieces else 0, vocab_size, kernel) for _ in range(2)]
    for rows in pieces:
        student, teacher = (space[:rows.stop - rows.start] for space in spaces)  # (n, V)
        _mm(student_hidden[rows], student_weight.T, out=student)
        _mm(teacher_hidden[rows], teacher_weight.T, out=teacher)
        if kernel:
            grad = _grad_space(student, student_hidden.dtype) if with_grad else None
            _launch_kl_rows(student, teacher, token_weight[rows], kl[rows], grad, reverse, temperature)
        else:
            kl[rows], grad = _kl_rows(student, teacher, token_weight[rows], reverse, temperature, with_grad)
            grad = grad.to(student_hidden.dtype) if with_grad else None
        if need_hidden:
            _mm(grad, student_weight, out=d_hidden[rows])
        if need_weight:
            _add_mm(d_weight[:vocab_size], grad.T, student_hidden[rows])
    return (token_weight * kl).sum(), kl, d_hidden, d_weight


class _GradientInForward(torch.autograd.Function):
    """compute(need, ...) -> loss, KL and the gradients of loss by the leaves: formed at once, scaled in the backward."""

    @staticmethod
    def forward(ctx, compute, *leaves):
        loss, kl, *gradients = compute(*ctx.needs_input_grad[1:])
        ctx.save_for_backward(*gradients)
        ctx.dtype = leaves[0].dtype
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        # Rounded once, and not in place: a retained graph can be walked again.
        return None, *(None if gradient is None else
                       torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=ctx.dtype))
                       for gradient in ctx.saved_tensors)


def _with_gradient(compute, *leaves):
    """-> loss, KL; differentiable if that is of any use."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return _GradientInForward.apply(compute, *leaves)
    return compute(*[False] * len(leaves))[:2]


def fused_linear_kl(student_hidden, student_weight, teacher_hidden, teacher_weight, direction="reverse",
                    temperature=1.0, token_weight=None, vocab_size=None, backend=None):
    """sum(token_weight * KL) over the whole vocabulary, exact; the gradient goes to the student only.

    direction: "reverse" is KL(student || teacher), Eq. 4; "forward" is KL(teacher || student), Eq. 5.
    student_hidden (N, Ds) and student_weight (V, Ds), teacher_hidden (N, Dt) and teacher_weight (Vt, Dt): each model in
    its dtype, float32 or bfloat16, or both in float64; token_weight (N,), all ones if None. Rows of either weight from
    vocab_size on are padding: probability and gradient 0; where V differs from Vt, vocab_size (the tokenizer's) must be
    given.
    Returns loss (scalar) and kl (N,), unweighted and without gradient, 0 where token_weight is 0: such rows are dropped
    before the products, so whatever they hold, NaN included, is harmless. Both float32 (float64 for float64).
    backend: as in `fused_linear_logprob`. Raises ValueError on shapes, dtypes or values that do not fit.
    """
    count = len(student_hidden)
    if vocab_size is None and len(student_weight) != len(teacher_weight):
        raise ValueError(f"student_weight has {len(student_weight)} rows, teacher_weight {len(teacher_weight)}; pass "
                         "vocab_size, the size of the tokenizer they share.")
    vocab_size = _check_linear(student_hidden, student_weight, vocab_size, temperature, "student_")
    _check_linear(teacher_hidden, teacher_weight, vocab_size, temperature, "teacher_")
    if len(teacher_hidden) != count or _wide_dtype(teacher_hidden) != _wide_dtype(student_hidden):
        raise ValueError(f"teacher_hidden is {_describe(teacher_hidden)}, student_hidden {_describe(student_hidden)}; "
                         "pass the same tokens, both in float64 or neither.")
    reverse, token_weight = _check_kl(direction, token_weight, student_hidden)
    keep = token_weight.nonzero().squeeze(1)
    partial = len(keep) < count
    if partial:
        student_hidden, teacher_hidden, token_weight = (x.index_select(0, keep)
                                                        for x in (student_hidden, teacher_hidden, token_weight))
    compute = functools.partial(_kl_forward, student_hidden, student_weight, teacher_hidden, teacher_weight,
                                token_weight, reverse, temperature, vocab_size, _use_triton(backend, student_hidden))
    loss, kl = _with_gradient(compute, student_hidden, student_weight)
    return loss, (kl.new_zeros(count).index_copy_(0, keep, kl) if partial else kl)


# The same on logits that exist already.

class _LogprobFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, temperature, kernel):
        logprob, entropy, *statistics = _logits_logprob(logits, target_ids, temperature, kernel)
        ctx.save_for_backward(logits, target_ids, *statistics)
        ctx.settings = temperature, kernel
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        logits, target_ids, top, log_total = ctx.saved_tensors
        temperature, kernel = ctx.settings
        d_logits = torch.empty_like(logits)  # (N, V)
        if kernel:
            _launch_logprob_grad(logits, 0, target_ids, top, log_total, upstream.contiguous(), d_logits, temperature)
            return d_logits, None, None, None
        for rows in _pieces(len(logits), logits.shape[1] * top.element_size(), logits.device):
            piece = logits[rows].to(top.dtype, copy=True)  # copy: the next line writes in place
            grad = _logprob_grad_rows(piece, 0, *(x[rows] for x in (target_ids, top, log_total, upstream)), temperature)
            d_logits[rows] = grad.masked_fill_(upstream[rows, None] == 0, 0)
        return d_logits, None, None, None


def _logits_logprob(logits, target_ids, temperature, kernel):
    """-> logprob, entropy, max, log sum exp(logits - max) (4, N)."""
    out = logits.new_empty((4, len(logits)), dtype=_wide_dtype(logits))
    if kernel:
        _launch(_logprob_row_kernel, len(logits), logits.detach(), target_ids, *out, logits.stride(0), 1 / temperature,
                V=logits.shape[1], **ROW)
        return out
    for rows in _pieces(len(logits), logits.shape[1] * out.element_size(), logits.device):
        piece = logits[rows].detach().to(out.dtype, copy=True)  # copy: the next line writes in place
        out[:, rows] = _logprob_rows(piece, target_ids[rows], temperature)
    return out


def logprob_from_logits(logits, target_ids, temperature=1.0, backend=None):
    """`fused_linear_logprob` for finite logits (N, V) that exist already: logprob (N,), entropy (N,)."""
    _check_logits(logits, temperature, "logits")
    _check_targets(target_ids, len(logits), logits.shape[1])
    args = _rows(logits), target_ids, temperature, _use_triton(backend, logits)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _LogprobFromLogits.apply(*args)
    return tuple(_logits_logprob(*args)[:2])


def _logits_kl(student_logits, teacher_logits, token_weight, reverse, temperature, kernel, with_grad):
    """-> loss, KL (N,), d loss / d student logits (N, V) or None."""
    student_logits, teacher_logits = student_logits.detach(), teacher_logits.detach()
    kl = torch.empty_like(token_weight)
    d_logits = torch.empty_like(student_logits) if with_grad else None
    if kernel:
        _launch_kl_rows(student_logits, teacher_logits, token_weight, kl, d_logits, reverse, temperature)
        return (token_weight * kl).sum(), kl, d_logits
    for rows in _pieces(len(kl), student_logits.shape[1] * kl.element_size(), kl.device):
        dead = token_weight[rows, None] == 0  # both rows alike: KL and gradient are 0, whatever stood there
        student, teacher = (x[rows].to(kl.dtype, copy=True).masked_fill_(dead, 0)  # copy: the next line writes in place
                            for x in (student_logits, teacher_logits))
        kl[rows], grad = _kl_rows(student, teacher, token_weight[rows], reverse, temperature, with_grad)
        if with_grad:
            d_logits[rows] = grad
    return (token_weight * kl).sum(), kl, d_logits


def kl_from_logits(student_logits, teacher_logits, direction="reverse", temperature=1.0, token_weight=None,
                   backend=None):
    """`fused_linear_kl` for finite logits (N, V) of both models that exist already, cut to the shared vocabulary."""
    _check_logits(student_logits, temperature, "student_logits")
    if student_logits.shape != teacher_logits.shape or student_logits.device != teacher_logits.device:
        raise ValueError(f"teacher_logits is {_describe(teacher_logits)}, student_logits {_describe(student_logits)}; cut "
                         "both to the shared vocabulary, on one device.")
    reverse, token_weight = _check_kl(direction, token_weight, student_logits)
    student_logits = _rows(student_logits)
    compute = functools.partial(_logits_kl, student_logits, _rows(teacher_logits), token_weight, reverse, temperature,
                                _use_triton(backend, student_logits))
    return _with_gradient(compute, student_logits)


# Arguments.

def _describe(x):
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _check_logits(logits, temperature, name):
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"{name} is {_describe(logits)}; flatten it to 2 dimensions and convert it to float32, bfloat16 or "
                         "float64.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it divides the logits: pass a positive number (1.0 for none).")


def _check_linear(hidden, weight, vocab_size, temperature, name=""):
    """-> the vocabulary size that counts."""
    _check_logits(hidden, temperature, name + "hidden")
    if (weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype
            or weight.device != hidden.device):
        raise ValueError(f"{name}weight is {_describe(weight)}, {name}hidden {_describe(hidden)}; pass the lm_head of the "
                         "same model, in the same dtype.")
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"vocab_size is {vocab_size}, {name}weight has {len(weight)} rows; pass the tokenizer's size, at "
                         "most that.")
    return vocab_size


def _check_targets(target_ids, count, vocab_size):
    if target_ids.shape != (count,) or target_ids.dtype != torch.int64:
        raise ValueError(f"target_ids is {_describe(target_ids)}; pass ({count},) int64, one a row.")
    if target_ids.device.type == "cpu" and count and not 0 <= target_ids.min() <= target_ids.max() < vocab_size:
        raise ValueError(f"target_ids spans {target_ids.min()}..{target_ids.max()} but the vocabulary has {vocab_size} "
                         "tokens; drop padding such as -100 before the call.")


def _check_kl(direction, token_weight, student):
    """-> reverse?, token_weight in the precision of the statistics."""
    if direction not in ("reverse", "forward"):
        raise ValueError(f'direction is {direction!r}; pass "reverse" (student || teacher) or "forward" (the other way).')
    if token_weight is None:
        return direction == "reverse", student.new_ones(len(student), dtype=_wide_dtype(student))
    if token_weight.shape != (len(student),):
        raise ValueError(f"token_weight is {tuple(token_weight.shape)}; pass ({len(student)},), one number a row.")
    return direction == "reverse", token_weight.detach().to(student.device, _wide_dtype(student))
