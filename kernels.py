"""Exact losses over the whole vocabulary from hidden states: token log-probabilities, and the KL between two models.

Sizes: N response tokens packed together, V tokens in the vocabulary, D the hidden size (Ds of the student, Dt of the
teacher). In KL(p || q), p is the first model and q the second. e stands for exp(logit - maximum of its row).

Why this file exists. The logits of N=16384 tokens over V=151936 (Qwen3) take 10 GB in fp32, and a naive KL over the
whole vocabulary keeps four to five such matrices alive: 44-51 GB, although the answer is only N numbers and two
gradients, dH (N, Ds) and dW (V, Ds). The functions here never hold an (N, V) matrix. Counting floating-point operations
and bytes, with Ds=2048 and Dt=4096, leads to a different algorithm for each of the two losses.

The KL, `fused_linear_kl`, takes the tokens in chunks and writes the logits of a chunk to memory.
  The matrix products need 2 N V (Ds + Dt) operations for the logits of both models and 4 N V Ds for dH and dW. That is
  51 TFLOP, or 64 ms at the 800 TFLOP/s of an H100. Recomputing the logits in the backward would make it 102 ms, so the
  forward already forms the gradient while it has the logits. Keeping the logits out of memory would then gain
  nothing. The vendor's GEMM writes a chunk of fp32 logits of each model. A row kernel reads both twice, once for the
  statistics and once for the gradient, which it writes in bf16 over the student's logits: 18 bytes an entry, 45 GB in
  all, 16 ms at 2.8 TB/s. Two GEMMs turn this gradient into dH and dW. The statistics take one pass: the maximum and the
  sum of e of each model, and the sum of e_p (p - q). The student's entropy and the log-probability of the sampled token
  under both models are returned too, because they cost only a few scalars a row while both rows are at hand.

The token log-probability, `fused_linear_logprob`, is fused with its matrix product.
  Policy gradients also need its forward alone (for the old and the reference policy), where writing the logits to
  memory would be wasted. A tile kernel multiplies 128 tokens with 256 vocabulary rows, keeps the logits in registers,
  and writes three numbers for each row: 10 TFLOP, 13 ms of products. Each program computes one tile only, because a
  loop over V inside the program would spill 1.4 KB of registers per thread. The upstream gradient is unknown in the
  forward, so the backward recomputes the logits. It takes slices of the vocabulary rather than of the tokens: every
  slice of dW is then complete at once, and only dH (N, D) has to be accumulated.

Precision. Logits, statistics and all accumulation are fp32 (fp64 for fp64 inputs, in PyTorch). Only the operands of the
matrix products are bf16, which includes the gradient of the logits on its way into dH and dW. This matters most at the
end of a distillation, when the models are close: rounding the logits to bf16 gives an error in the gradient of 9 % at
KL = 0.1, 35 % at 4e-3 and 120 % at 4e-4, whereas rounding only the gradient gives 0.2 % everywhere.

Reading order: the references are the formulas. The PyTorch row operations compute them in place, on a CPU. The Triton
kernels do so on a GPU. L_R and L_F are the names that section 2 of arXiv 2605.12483 v4 gives to two equations
without numbers. A generalised Jensen-Shannon divergence is left out: its gradient needs a third pass over both rows.
"""

import math
import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # Without Triton everything runs in PyTorch.
    triton, tl = None, SimpleNamespace(constexpr=None)  # The kernels' signatures mention tl.constexpr.

# Triton reads this variable when it is imported. Its kernels then run as Python on CPU tensors, which the tests use.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

# Bytes of one model's logits that exist at a time.
CPU_LOGIT_BYTES = 8 << 20  # or 128 rows if those take more. Small problems fit into one piece.
GPU_LOGIT_BYTES = 5 << 28  # 2048 rows of Qwen3's. Each piece reads and writes all of dW, 1.2 GB, so pieces are large.

# The largest tiles that spill no register on the GPUs that use them (results/kernels/compile.md).
HOPPER_TILE = dict(BLOCK_N=128, BLOCK_V=256, BLOCK_D=64, GROUP=16, num_warps=8, num_stages=3)  # 144 KB of shared memory
TILE = dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, GROUP=16, num_warps=8, num_stages=3)  # 96 KB
AMD_TILE = dict(TILE, num_stages=2)  # 32 KB
FP32_TILE = dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32, GROUP=16, num_warps=4, num_stages=2)
ROW = dict(BLOCK=2048, num_warps=8)  # for the kernels with one program for each row


class TokenKL(NamedTuple):
    """The results of `fused_linear_kl`, all at its temperature, in float32 (float64 for float64 inputs)."""

    loss: torch.Tensor  # scalar: the sum of kl over the N tokens, and the only field with a gradient
    kl: torch.Tensor  # (N,): the KL of each token
    entropy: torch.Tensor  # (N,): the exact entropy of the student
    logprobs: torch.Tensor  # (N,): log pi_theta(target), of the student
    teacher_logprobs: torch.Tensor  # (N,): log pi_T(target)


# References: the formulas on whole logits, under plain autograd.

def fused_linear_logprob_reference(hidden, weight, target_ids, temperature=1.0, vocab_size=None):
    """The formulas of `fused_linear_logprob`, with (N, V) logits in the dtype of the inputs."""
    logits = hidden @ weight[:vocab_size].T  # (N, V)
    logp = torch.log_softmax(logits.to(_wide_dtype(logits)) / temperature, dim=-1)  # (N, V)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    return logp.gather(1, target_ids[:, None]).squeeze(1), entropy.detach()


def fused_linear_kl_reference(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids,
                              direction="reverse", temperature=1.0, vocab_size=None):
    """The formulas of `fused_linear_kl`, with (N, V) logits of both models in the dtype of the inputs."""
    student_logits = student_hidden @ student_weight[:vocab_size].T  # (N, V)
    teacher_logits = (teacher_hidden @ teacher_weight[:vocab_size].T).detach()  # (N, V)
    student, teacher = (torch.log_softmax(logits.to(_wide_dtype(logits)) / temperature, dim=-1)
                        for logits in (student_logits, teacher_logits))
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    kl = (p.exp() * (p - q)).sum(-1)  # (N,)
    entropy = -(student.detach().exp() * student.detach()).sum(-1)  # (N,)
    logprobs, teacher_logprobs = (x.gather(1, target_ids[:, None]).squeeze(1) for x in (student, teacher))
    return TokenKL(kl.sum(), *(x.detach() for x in (kl, entropy, logprobs, teacher_logprobs)))


# Precision, products and pieces.

def _wide_dtype(x):
    """The dtype of logits, statistics and accumulation for inputs like x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _operand(x):
    """x without a graph, as it enters a product. A GPU's tensor cores take bf16. A CPU has no product of bf16 matrices
    with an fp32 result, so there bf16 is widened, which is exact."""
    return x.detach() if x.is_cuda else x.detach().to(_wide_dtype(x))


def _wide_result(operand):
    """The argument that makes a product of bf16 operands fp32. Other products keep their operands' dtype."""
    return dict(out_dtype=torch.float32) if operand.dtype == torch.bfloat16 else {}


def _mm(a, b, out=None):
    return torch.mm(a, b, out=out, **_wide_result(a))


def _add_mm(accumulator, a, b):
    """accumulator += a @ b. An fp32 accumulator with bf16 operands needs PyTorch 2.10 or later."""
    torch.addmm(accumulator, a, b, out=accumulator, **_wide_result(a))


def _pieces(count, row_bytes, device):
    """Nearly equal slices of range(count), each within about the byte budget if a row takes row_bytes."""
    budget = GPU_LOGIT_BYTES if device.type == "cuda" else CPU_LOGIT_BYTES
    pieces = max(1, math.ceil(count * row_bytes / budget))
    step = math.ceil(count / pieces)
    if pieces > 1:
        step += -step % 128  # Products then consist of whole tiles, and of enough rows to be fast on a CPU.
    return [slice(start, min(start + step, count)) for start in range(0, count, max(step, 1))]


# Row operations in PyTorch. They overwrite their logits, because each new matrix would cost memory and one more pass.
# row_max is the maximum of a row of logits / temperature, sum_exp the sum of exp(logits / temperature - row_max), and
# log_sum_exp its logarithm. Both sums are thus relative to row_max, here and in the kernels.

def _logprob_rows(logits, target_ids, temperature):
    """Logits (n, V) -> logprob, entropy, row_max, log_sum_exp, stacked to (4, n)."""
    logits.mul_(1 / temperature)
    target = logits.gather(1, target_ids[:, None]).squeeze(1)
    row_max = logits.amax(1)
    exp = logits.sub_(row_max[:, None]).exp()
    sum_exp = exp.sum(1)
    log_sum_exp = sum_exp.log()
    entropy = log_sum_exp - exp.mul_(logits).sum(1) / sum_exp
    return torch.stack((target - row_max - log_sum_exp, entropy, row_max, log_sum_exp))


def _logprob_grad_rows(logits, first, target_ids, row_max, log_sum_exp, upstream, temperature):
    """Replaces logits (n, v), the columns from `first` on, by upstream * (onehot - softmax) / temperature."""
    scale = upstream / temperature
    grad = logits.mul_(1 / temperature).sub_(row_max[:, None]).sub_(log_sum_exp[:, None]).exp_().mul_(-scale[:, None])
    column = target_ids - first
    inside = (column >= 0) & (column < grad.shape[1])
    return grad.scatter_add_(1, column.clamp(0, grad.shape[1] - 1)[:, None], (scale * inside)[:, None])


def _kl_rows(student, teacher, target_ids, reverse, temperature, with_grad):
    """Logits (n, V) of both models -> kl, entropy, logprobs, teacher_logprobs, stacked to (4, n), and the gradient of
    the sum of kl with respect to the student's logits (n, V), or None.

    Let p and q be logits relative to their row_max, and let mean_diff be the mean of p - q under the softmax of p. Then
    the KL is mean_diff - log(sum(e_p)) + log(sum(e_q)), and the log-ratio of the probabilities minus the KL is p - q -
    mean_diff. The student's entropy is its log_sum_exp minus mean_logit, the mean of its logits relative to row_max.
    Only teacher_exp allocates a whole matrix. Each later result overwrites one that is no longer needed.
    """
    for logits in (student, teacher):
        logits.mul_(1 / temperature)
        logits.sub_(logits.amax(1, keepdim=True))
    targets = [logits.gather(1, target_ids[:, None]) for logits in (student, teacher)]
    teacher_exp = teacher.exp()
    teacher_sum = teacher_exp.sum(1, keepdim=True)
    if reverse:
        diff = torch.sub(student, teacher, out=teacher)
        student_exp = torch.exp(student, out=teacher_exp)
    else:
        mean_diff = teacher.sub_(student).mul_(teacher_exp).sum(1, keepdim=True) / teacher_sum
        student_exp = torch.exp(student, out=teacher)
    student_sum = student_exp.sum(1, keepdim=True)
    mean_logit = student.mul_(student_exp).sum(1, keepdim=True) / student_sum
    if reverse:
        mean_diff = torch.mul(student_exp, diff, out=student).sum(1, keepdim=True) / student_sum
    student_log, teacher_log = student_sum.log(), teacher_sum.log()
    kl = mean_diff - student_log + teacher_log if reverse else mean_diff - teacher_log + student_log
    outputs = torch.cat((kl, student_log - mean_logit, targets[0] - student_log, targets[1] - teacher_log), 1).T
    if not with_grad:
        return outputs, None
    scale = torch.ones_like(kl) / temperature
    if reverse:
        return outputs, diff.sub_(mean_diff).mul_(student_exp).mul_(scale / student_sum)
    return outputs, student_exp.mul_(scale / student_sum).sub_(teacher_exp.mul_(scale / teacher_sum))


# The same in Triton. Each program handles one row and loops over its columns, BLOCK at a time. Every lane of the block
# keeps its own running maximum and sums, so the loop needs no reduction across warps; the lanes are merged once, at the
# end. Whenever a maximum rises, the sums relative to it are corrected. Columns past V read as -1e30, far below the
# -1e20 at which the maxima start, so e, and e times anything, is 0 there. V is a compile-time constant, because each
# model has only one. Row offsets are int64, because N * V exceeds 2**31.

def _jit(function):
    return function if triton is None else triton.jit(function)


@_jit
def _kl_row_kernel(
    student_ptr, teacher_ptr, target_ptr,  # in: logits (N, V) and (N, V), token ids (N,)
    kl_ptr, entropy_ptr, logprob_ptr, teacher_logprob_ptr,  # out: (N,) each
    grad_ptr,  # out: (N, V); a bf16 gradient may lie over the first half of each fp32 row of the student
    student_stride, teacher_stride, grad_stride,  # between rows
    inv_temperature,
    V: tl.constexpr, REVERSE: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    # The targets' logits are read here, because the second pass may overwrite the student's.
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    student_target = tl.load(student_ptr + target, known, other=float("nan")).to(tl.float32) * inv_temperature
    teacher_target = tl.load(teacher_ptr + target, known, other=float("nan")).to(tl.float32) * inv_temperature
    lanes = tl.arange(0, BLOCK)
    student_max, teacher_max = tl.full((BLOCK,), -1e20, tl.float32), tl.full((BLOCK,), -1e20, tl.float32)
    student_sum, teacher_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    # The sum of e (x - max) over the student's logits x.
    student_dot = tl.zeros((BLOCK,), tl.float32)
    # The sum of e_p times the difference of the student's and the teacher's x - max. The difference of the logits
    # themselves would lose digits where these are far from 0.
    diff_dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        student = tl.load(student_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
        teacher = tl.load(teacher_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
        new_student_max, new_teacher_max = tl.maximum(student_max, student), tl.maximum(teacher_max, teacher)
        student_change, teacher_change = student_max - new_student_max, teacher_max - new_teacher_max
        student_max, teacher_max = new_student_max, new_teacher_max
        student -= student_max
        teacher -= teacher_max
        student_scale, teacher_scale = tl.exp(student_change), tl.exp(teacher_change)
        student_exp, teacher_exp = tl.exp(student), tl.exp(teacher)
        p_sum, p_scale, p_exp = ((student_sum, student_scale, student_exp) if REVERSE else
                                 (teacher_sum, teacher_scale, teacher_exp))
        diff_dot = (diff_dot + p_sum * (student_change - teacher_change)) * p_scale + p_exp * (student - teacher)
        student_dot = (student_dot + student_sum * student_change) * student_scale + student_exp * student
        student_sum = student_sum * student_scale + student_exp
        teacher_sum = teacher_sum * teacher_scale + teacher_exp

    # Merge the lanes, with the same corrections, from each lane's maximum to the row's.
    student_row_max, teacher_row_max = tl.max(student_max, 0), tl.max(teacher_max, 0)
    student_change, teacher_change = student_max - student_row_max, teacher_max - teacher_row_max
    student_scale, teacher_scale = tl.exp(student_change), tl.exp(teacher_change)
    student_row_sum, teacher_row_sum = tl.sum(student_sum * student_scale, 0), tl.sum(teacher_sum * teacher_scale, 0)
    student_log, teacher_log = tl.log(student_row_sum), tl.log(teacher_row_sum)
    p_sum, p_scale, p_row_sum = ((student_sum, student_scale, student_row_sum) if REVERSE else
                                 (teacher_sum, teacher_scale, teacher_row_sum))
    mean_diff = tl.sum((diff_dot + p_sum * (student_change - teacher_change)) * p_scale, 0) / p_row_sum
    mean_log_ratio = mean_diff - student_log + teacher_log  # of log pi_theta - log pi_T, under p
    tl.store(kl_ptr + row, mean_log_ratio if REVERSE else -mean_log_ratio)
    mean_logit = tl.sum((student_dot + student_sum * student_change) * student_scale, 0) / student_row_sum
    tl.store(entropy_ptr + row, student_log - mean_logit)
    tl.store(logprob_ptr + row, student_target - student_row_max - student_log)
    tl.store(teacher_logprob_ptr + row, teacher_target - teacher_row_max - teacher_log)

    if WITH_GRAD:
        grad_ptr += row * grad_stride
        for start in range(0, V, BLOCK):
            columns = start + lanes
            student = tl.load(student_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
            teacher = tl.load(teacher_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
            student -= student_row_max
            teacher -= teacher_row_max
            grad = tl.exp(student) * (inv_temperature / student_row_sum)
            if REVERSE:
                grad *= student - teacher - mean_diff
            else:
                grad -= tl.exp(teacher) * (inv_temperature / teacher_row_sum)
            # Block j of a bf16 gradient lies over blocks of fp32 logits up to j. All warps must have read those before
            # one of them writes.
            tl.debug_barrier()
            tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), columns < V)


@_jit
def _logprob_grad_kernel(
    logits_ptr,  # in: (N, V), the columns from `first` on
    target_ptr, row_max_ptr, log_sum_exp_ptr, upstream_ptr,  # in: (N,) each
    grad_ptr,  # out: (N, V); it may lie over the logits, as in _kl_row_kernel
    logits_stride, grad_stride,  # between rows
    first, inv_temperature,
    V: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    target = tl.load(target_ptr + row) - first
    row_max = tl.load(row_max_ptr + row)
    log_sum_exp = tl.load(log_sum_exp_ptr + row)
    upstream = tl.load(upstream_ptr + row)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, columns < V, other=-1e30).to(tl.float32) * inv_temperature
        onehot = tl.where(columns == target, 1.0, 0.0)
        grad = upstream * inv_temperature * (onehot - tl.exp(x - row_max - log_sum_exp))
        tl.debug_barrier()  # for the reason given in _kl_row_kernel
        tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), columns < V)


@_jit
def _logprob_tile_kernel(
    hidden_ptr, weight_ptr, target_ptr,  # in: (N, D), (V, D), (N,)
    max_ptr, sum_ptr, dot_ptr, target_logit_ptr,  # out: (tiles of V, N) x 3, (N,)
    N, V, hidden_stride, weight_stride,  # between rows
    inv_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, WIDEN: tl.constexpr,
):
    """Computes one (BLOCK_N, BLOCK_V) tile of logits x and reduces each row of it to max, sum e and sum e (x - max)."""
    # Programs that run at the same time share operands in the cache: GROUP row tiles are multiplied with one tile of
    # the vocabulary, then with the next.
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
    # Rows and columns past the end wrap around to existing ones, so that the loop needs no mask for them. Their logits
    # are masked below.
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
        if WIDEN:  # The interpreter cannot multiply bf16: it would multiply the bits as integers.
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        x = tl.dot(a, b, x, input_precision="ieee")
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D

    x = tl.where(columns[None, :] < V, x * inv_temperature, -1e30)  # A column past V must not count as a token.
    tile_max = tl.max(x, 1)
    exp = tl.exp(x - tile_max[:, None])
    out = column_tile.to(tl.int64) * N + rows
    tl.store(max_ptr + out, tile_max, rows < N)
    tl.store(sum_ptr + out, tl.sum(exp, 1), rows < N)
    tl.store(dot_ptr + out, tl.sum(exp * (x - tile_max[:, None]), 1), rows < N)  # Past V this adds 0 * -1e30 = 0.
    target = tl.load(target_ptr + rows, rows < N, other=-1)
    logit = tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1)
    here = (target >= column_tile * BLOCK_V) & (target < tl.minimum(column_tile * BLOCK_V + BLOCK_V, V))
    tl.store(target_logit_ptr + rows, logit, here & (rows < N))  # Exactly one tile has the target of a row.


# Launches.

def _use_triton(backend, x):
    """Whether to use Triton. By default CUDA tensors use it, and all others use PyTorch."""
    possible = triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
    if backend is None:
        backend = "triton" if possible and x.is_cuda else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f'backend is {backend!r}; pass "torch", "triton", or None to choose by device.')
    if backend == "triton" and not possible:
        raise ValueError(f'backend is "triton" for a {x.dtype} tensor on {x.device}; that needs the triton package, '
                         'float32 or bfloat16, and CUDA (or TRITON_INTERPRET=1 in the environment): pass "torch".')
    return backend == "triton" and len(x) > 0  # An empty grid cannot be launched.


def _launch(kernel, programs, *args, **constants):
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device. On a CPU this does nothing.
        kernel[(programs,)](*args, **constants)


def _logit_space(like, rows, columns, kernel):
    """Memory for a piece of logits. The pieces share it, because on a CPU each page of fresh memory costs a page fault.
    On a GPU, rows start at multiples of 256 bytes: an odd vocabulary, such as 151669, would make the products slow."""
    return like.new_empty((rows, columns + (-columns % 64 if kernel else 0)))[:, :columns]


def _grad_space(logits, dtype):
    """Where the gradient of fp32 logits (n, V) is written: over them, or, if bf16, over the first half of every row."""
    return logits.view(torch.bfloat16)[:, :logits.shape[1]] if dtype == torch.bfloat16 else logits


def _launch_kl_rows(student, teacher, target_ids, outputs, grad, reverse, temperature):
    """The Triton counterpart of `_kl_rows`: it fills outputs (4, n) and, unless it is None, grad (n, V)."""
    with_grad = grad is not None
    grad = grad if with_grad else student  # The kernel needs a pointer, even if it writes no gradient.
    _launch(_kl_row_kernel, len(student), student, teacher, target_ids, *outputs, grad, student.stride(0),
            teacher.stride(0), grad.stride(0), 1 / temperature, V=student.shape[1], REVERSE=reverse,
            WITH_GRAD=with_grad, **ROW)


def _tile(x):
    if x.dtype != torch.bfloat16 or not x.is_cuda:
        return FP32_TILE
    if torch.version.hip:
        return AMD_TILE
    return HOPPER_TILE if torch.cuda.get_device_capability(x.device)[0] == 9 else TILE


def _logprob_tiles(hidden, weight, target_ids, temperature, tile):
    """Launches the tile kernel and merges its statistics into the (4, n) result of `_logprob_rows`."""
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    (n, depth), vocabulary = hidden.shape, len(weight)
    row_tiles, column_tiles = triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(vocabulary, tile["BLOCK_V"])
    tile_max, tile_sum, tile_dot = hidden.new_empty((3, column_tiles, n), dtype=torch.float32)
    target = hidden.new_full((n,), math.nan, dtype=torch.float32)  # This NaN stays where a target id is out of range.
    _launch(_logprob_tile_kernel, row_tiles * column_tiles, hidden, weight, target_ids, tile_max, tile_sum, tile_dot,
            target, n, vocabulary, hidden.stride(0), weight.stride(0), 1 / temperature, D=depth, WIDEN=INTERPRETED,
            **tile)
    row_max = tile_max.amax(0)
    change = tile_max - row_max
    scale = change.exp()
    sum_exp = (tile_sum * scale).sum(0)
    dot = ((tile_dot + change * tile_sum) * scale).sum(0)
    log_sum_exp = sum_exp.log()
    return torch.stack((target - row_max - log_sum_exp, log_sum_exp - dot / sum_exp, row_max, log_sum_exp))


# Token log-probability.

def _logprob_forward(hidden, weight, target_ids, temperature, kernel):
    """-> logprob, entropy, row_max, log_sum_exp, stacked to (4, N)."""
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
        hidden_in, weight_in, target_ids, row_max, log_sum_exp = ctx.saved_tensors
        temperature, vocab_size, kernel = ctx.settings
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden, weight = _operand(hidden_in), _operand(weight_in[:vocab_size])
        # Tokens whose upstream gradient is 0 (clipped, or in a group with equal rewards) are left out. They then cost
        # no products, and even NaN in their hidden states does not reach dW.
        keep = upstream.nonzero().squeeze(1)
        partial = len(keep) < len(upstream)
        per_token = target_ids, row_max, log_sum_exp, upstream.contiguous()
        if partial:
            hidden, *per_token = (x.index_select(0, keep) for x in (hidden, *per_token))
        d_hidden = torch.zeros_like(hidden, dtype=row_max.dtype) if need_hidden else None  # (n, D)
        d_weight = torch.zeros_like(weight_in) if need_weight else None  # (V, D)
        kernel = kernel and len(hidden) > 0
        parts = _pieces(len(weight), max(len(hidden), 1) * row_max.element_size(), weight.device)
        space = _logit_space(row_max, len(hidden), parts[0].stop, kernel)
        for part in parts:
            logits = _mm(hidden, weight[part].T, out=space[:, :part.stop - part.start])  # (n, v)
            if kernel:
                grad = _grad_space(logits, hidden.dtype)
                _launch(_logprob_grad_kernel, len(logits), logits, *per_token, grad, logits.stride(0), grad.stride(0),
                        part.start, 1 / temperature, V=logits.shape[1], **ROW)
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
    """The log-probability of one token per row, log_softmax(hidden @ weight.T / temperature)[target].

    hidden (N, D) and weight (V, D) share a dtype: float32, bfloat16 or float64. target_ids (N,) are int64. Rows of
    weight from vocab_size on are padding, with probability and gradient 0. backend is "torch", "triton", or None to
    choose by device.

    Returns logprob (N,), differentiable with respect to hidden and weight, and entropy (N,), for logging, which carries
    no gradient. Both are float32 (float64 for float64 inputs). A row whose upstream gradient is 0 contributes to no
    gradient. If no gradient is required, nothing is saved for a backward.

    Raises ValueError for shapes, dtypes or values that do not fit, on a CPU also for a target outside the vocabulary.
    On a GPU this check would have to wait for the device; instead the Triton kernels give NaN for such a row.
    """
    vocab_size = _check_linear(hidden, weight, vocab_size, temperature)
    target_ids = _check_targets(target_ids, len(hidden), vocab_size)
    kernel = _use_triton(backend, hidden)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _FusedLinearLogprob.apply(hidden, weight, target_ids, temperature, vocab_size, kernel)
    return tuple(_logprob_forward(hidden, weight[:vocab_size], target_ids, temperature, kernel)[:2])


# KL over the whole vocabulary.

def _kl_forward(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, reverse, temperature,
                vocab_size, kernel, need_hidden, need_weight):
    """-> TokenKL, and the gradient of its loss with respect to the student's hidden states (N, Ds) and weight (V, Ds).

    A gradient that is not needed is None.
    """
    count, dtype = len(student_hidden), _wide_dtype(student_hidden)
    d_weight = student_weight.new_zeros(student_weight.shape, dtype=dtype) if need_weight else None
    student_hidden, student_weight = _operand(student_hidden), _operand(student_weight[:vocab_size])
    teacher_hidden, teacher_weight = _operand(teacher_hidden), _operand(teacher_weight[:vocab_size])
    d_hidden = torch.empty_like(student_hidden, dtype=dtype) if need_hidden else None
    outputs = student_hidden.new_empty((4, count), dtype=dtype)  # kl, entropy, logprobs, teacher_logprobs
    with_grad = need_hidden or need_weight
    pieces = _pieces(count, vocab_size * dtype.itemsize, outputs.device)
    spaces = [_logit_space(outputs, pieces[0].stop if pieces else 0, vocab_size, kernel) for _ in range(2)]
    for rows in pieces:
        student, teacher = (space[:rows.stop - rows.start] for space in spaces)  # (n, V)
        _mm(student_hidden[rows], student_weight.T, out=student)
        _mm(teacher_hidden[rows], teacher_weight.T, out=teacher)
        if kernel:
            grad = _grad_space(student, student_hidden.dtype) if with_grad else None
            _launch_kl_rows(student, teacher, target_ids[rows], outputs[:, rows], grad, reverse, temperature)
        else:
            outputs[:, rows], grad = _kl_rows(student, teacher, target_ids[rows], reverse, temperature, with_grad)
            grad = grad.to(student_hidden.dtype) if with_grad else None
        if need_hidden:
            _mm(grad, student_weight, out=d_hidden[rows])
        if need_weight:
            _add_mm(d_weight[:vocab_size], grad.T, student_hidden[rows])
    return TokenKL(outputs[0].sum(), *outputs), d_hidden, d_weight


class _FusedLinearKL(torch.autograd.Function):
    """The forward already forms the gradients of the loss. The backward multiplies them by the upstream gradient."""

    @staticmethod
    def forward(ctx, student_hidden, *args):
        result, *ctx.gradients = _kl_forward(student_hidden, *args, *ctx.needs_input_grad[:2])
        ctx.dtype = student_hidden.dtype
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        # The product with `upstream` is written over the gradient if their dtypes agree, because another dW would be as
        # large as everything else together. So only one backward pass is possible.
        if ctx.gradients is None:
            raise RuntimeError("This KL has had its backward pass; call fused_linear_kl again for another one.")
        gradients, ctx.gradients = ctx.gradients, None
        gradients = [None if gradient is None else
                     torch.mul(gradient, upstream, out=gradient if gradient.dtype == ctx.dtype
                               else torch.empty_like(gradient, dtype=ctx.dtype))
                     for gradient in gradients]
        return *gradients, *[None] * 7


def fused_linear_kl(student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids, direction="reverse",
                    temperature=1.0, vocab_size=None, backend=None):
    """The exact KL of every token over the whole vocabulary, as a `TokenKL`. Its gradient goes to the student only.

    direction "reverse" is KL(student || teacher), the OPD loss L_R. Its gradient with respect to the student's logits
    is p (log p - log q - KL) / temperature, with p the student's softmax and q the teacher's. direction "forward" is
    KL(teacher || student), the warmup loss L_F, with gradient (softmax(student) - softmax(teacher)) / temperature.

    student_hidden (N, Ds) and student_weight (V, Ds), teacher_hidden (N, Dt) and teacher_weight (Vt, Dt): each model
    has a dtype of its own, float32 or bfloat16, or both are in float64. target_ids (N,) are int64, the sampled tokens.
    Rows of either weight from vocab_size on are padding, with probability and gradient 0. If V differs from Vt,
    vocab_size (the tokenizer's) must be given. backend is as in `fused_linear_logprob`.

    Raises ValueError as `fused_linear_logprob` does. For a target outside the vocabulary on a GPU, the Triton kernel
    gives NaN for both of its log-probabilities; every other output and the gradient are unaffected.
    """
    if vocab_size is None and len(student_weight) != len(teacher_weight):
        raise ValueError(f"student_weight has {len(student_weight)} rows, teacher_weight {len(teacher_weight)}; pass "
                         "vocab_size, the size of the tokenizer they share.")
    vocab_size = _check_linear(student_hidden, student_weight, vocab_size, temperature, "student_")
    _check_linear(teacher_hidden, teacher_weight, vocab_size, temperature, "teacher_")
    if len(teacher_hidden) != len(student_hidden) or _wide_dtype(teacher_hidden) != _wide_dtype(student_hidden):
        raise ValueError(f"teacher_hidden is {_describe(teacher_hidden)}, student_hidden {_describe(student_hidden)}; "
                         "pass the same tokens, both in float64 or neither.")
    target_ids = _check_targets(target_ids, len(student_hidden), vocab_size)
    if direction not in ("reverse", "forward"):
        raise ValueError(f'direction is {direction!r}; pass "reverse" (student || teacher) or "forward".')
    args = (student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach(), target_ids,
            direction == "reverse", temperature, vocab_size, _use_triton(backend, student_hidden))
    if torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad):
        return TokenKL(*_FusedLinearKL.apply(*args))
    return _kl_forward(*args, need_hidden=False, need_weight=False)[0]


# Arguments.

def _describe(x):
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _check_linear(hidden, weight, vocab_size, temperature, name=""):
    """Returns the vocabulary size: vocab_size if given, else the number of rows of weight."""
    if hidden.dim() != 2 or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"{name}hidden is {_describe(hidden)}; flatten it to 2 dimensions and convert it to float32, "
                         "bfloat16 or float64.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it divides the logits: pass a positive number (1.0 for none).")
    if (weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype
            or weight.device != hidden.device):
        raise ValueError(f"{name}weight is {_describe(weight)}, {name}hidden {_describe(hidden)}; pass the lm_head of "
                         "the same model, in the same dtype.")
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"vocab_size is {vocab_size}, {name}weight has {len(weight)} rows; pass the tokenizer's size, "
                         "at most that.")
    return vocab_size


def _check_targets(target_ids, count, vocab_size):
    """Returns the checked target_ids, contiguous as the kernels read them."""
    if target_ids.shape != (count,) or target_ids.dtype != torch.int64:
        raise ValueError(f"target_ids is {_describe(target_ids)}; pass ({count},) int64, one per row.")
    if target_ids.device.type == "cpu" and count and not 0 <= target_ids.min() <= target_ids.max() < vocab_size:
        raise ValueError(f"target_ids spans {target_ids.min()}..{target_ids.max()} but the vocabulary has {vocab_size} "
                         "tokens; drop padding such as -100 before the call.")
    return target_ids.contiguous()
