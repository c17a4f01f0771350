"""Exact full-vocabulary losses: token log-probability (with entropy) and KL between two models, from hidden states.

Letters: N response tokens packed together, V vocabulary size, D hidden size (Ds student, Dt teacher).

Why this file exists. One logits matrix of N=16384 tokens over V=151936 tokens (Qwen3) is 10 GB in fp32, and naive full-vocabulary
KL keeps four to five of them alive: 44-51 GB. Yet the answer is N numbers and two gradients. So no function here ever holds
an (N, V) matrix of its own making; each works through pieces of about a gigabyte on a GPU, 16 MiB on a CPU.
"""

import math

import torch
from torch.autograd.function import once_differentiable

CPU_LOGIT_BYTES = 16 << 20  # one piece of logits; 128 rows of a 32k vocabulary: smaller pieces starve the matrix products
GPU_LOGIT_BYTES = 5 << 28  # 2048 rows of Qwen3's vocabulary: dW (V, D) in fp32 is read and written once per piece


# ---------------------------------------------------------------- references

def logprob_from_logits_reference(logits, target_ids, temperature=1.0):
    """log_softmax(logits / temperature)[target] and its entropy, by the formulas. Any float dtype -> fp32 (fp64)."""
    logp = torch.log_softmax(_wide(logits) / temperature, dim=-1)  # (N, V)
    entropy = -(logp.exp() * logp).sum(-1)  # (N,)
    return logp.gather(-1, target_ids[:, None]).squeeze(-1), entropy.detach()


def kl_from_logits_reference(student_logits, teacher_logits, direction="reverse", temperature=1.0, token_weight=None):
    """sum(token_weight * KL) and KL per token, by the formulas: Eq. 4 (reverse) and Eq. 5 (forward)."""
    student = torch.log_softmax(_wide(student_logits) / temperature, dim=-1)  # (N, V)
    teacher = torch.log_softmax(_wide(teacher_logits).detach() / temperature, dim=-1)  # (N, V)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    kl = (p.exp() * (p - q)).sum(-1)  # (N,)
    loss = kl.sum() if token_weight is None else (token_weight * kl).sum()
    return loss, kl.detach()


def fused_linear_logprob_reference(hidden, weight, target_ids, temperature=1.0, vocab_size=None):
    return logprob_from_logits_reference(hidden @ weight[:vocab_size].T, target_ids, temperature)


def fused_linear_kl_reference(student_hidden, student_weight, teacher_hidden, teacher_weight, direction="reverse",
                              temperature=1.0, token_weight=None, vocab_size=None):
    student_logits = student_hidden @ student_weight[:vocab_size].T  # (N, V)
    teacher_logits = teacher_hidden @ teacher_weight[:vocab_size].T  # (N, V)
    return kl_from_logits_reference(student_logits, teacher_logits, direction, temperature, token_weight)


# ---------------------------------------------------------------- matrix products with wide results

def _wide(x):
    """fp32, or fp64 where the input is: the precision of logits, statistics and accumulation."""
    return x if x.dtype == torch.float64 else x.float()


def _operand(x):
    """bf16 stays for the tensor cores; a CPU has no bf16 product with an fp32 result, so there it is widened (exactly)."""
    return x.detach() if x.is_cuda else _wide(x.detach())


def _mm(a, b, out=None):
    """a @ b with fp32 (fp64) result, whatever the operands: rounding logits to bf16 would ruin small KLs."""
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out=out)


def _add_mm(total, a, b):
    """total += a @ b in total's fp32 (fp64)."""
    if a.dtype == torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)


def _spans(total, row_bytes, device):
    """Equal pieces [start, stop) of `total` rows whose logits fit the budget; one piece where the problem is tiny."""
    budget = GPU_LOGIT_BYTES if device.type == "cuda" else CPU_LOGIT_BYTES
    count = max(1, math.ceil(total * row_bytes / budget))
    step = math.ceil(total / count)
    if count > 1:
        step += -step % 128  # whole tiles, aligned slices
    return [(start, min(start + step, total)) for start in range(0, total, max(step, 1))]


# ---------------------------------------------------------------- row operations

def _logprob_rows(logits, target_ids, temperature):
    """Logits (n, V), overwritten -> logprob, entropy, logsumexp (n,), the last in units of logits / temperature."""
    if temperature != 1.0:
        logits.mul_(1 / temperature)
    target = logits.gather(1, target_ids[:, None]).squeeze(1)
    top = logits.amax(1)
    logits.sub_(top[:, None])
    weight = logits.exp()
    total = weight.sum(1)
    mean = weight.mul_(logits).sum(1) / total
    log_total = total.log()
    return target - top - log_total, log_total - mean, top + log_total


def _logprob_grad_rows(logits, first, target_ids, lse, upstream, temperature):
    """Logits of columns [first, first + n) -> gradient in place: upstream * (onehot - softmax) / temperature."""
    if temperature != 1.0:
        logits.mul_(1 / temperature)
    scale = upstream / temperature
    grad = logits.sub_(lse[:, None]).exp_().mul_(-scale[:, None])
    column = target_ids - first
    inside = (column >= 0) & (column < logits.shape[1])
    column = column.clamp(0, logits.shape[1] - 1)
    grad.scatter_add_(1, column[:, None], torch.where(inside, scale, 0)[:, None])
    return grad


def _kl_rows(student, teacher, token_weight, reverse, temperature, with_grad):
    """Logits (n, V) x 2, overwritten -> KL (n,) and d sum(token_weight * KL) / d student logits, in one of the buffers.

    With e = exp(x - max x) and d = p - q on logits: KL = sum(e_p d) / sum(e_p) - lse_p + lse_q, and the gradient is
    softmax(p) (d - mean_p d) for p = student (reverse), softmax(student) - softmax(teacher) for p = teacher (forward).
    """
    if temperature != 1.0:
        student.mul_(1 / temperature), teacher.mul_(1 / temperature)
    student.sub_(student.amax(1, keepdim=True))
    teacher.sub_(teacher.amax(1, keepdim=True))
    p, q = (student, teacher) if reverse else (teacher, student)
    q_exp = q.exp()
    q_total = q_exp.sum(1, keepdim=True)
    diff = torch.sub(p, q, out=q)
    p_exp = p.exp_()
    p_total = p_exp.sum(1, keepdim=True)
    scale = token_weight[:, None] / temperature
    if reverse:
        mean = torch.mul(p_exp, diff, out=q_exp).sum(1, keepdim=True) / p_total
        grad = diff.sub_(mean).mul_(p_exp).mul_(scale / p_total) if with_grad else None
    else:
        mean = diff.mul_(p_exp).sum(1, keepdim=True) / p_total
        grad = q_exp.mul_(scale / q_total).sub_(p_exp.mul_(scale / p_total)) if with_grad else None
    return (mean - p_total.log() + q_total.log()).squeeze(1), grad


# ---------------------------------------------------------------- token log-probability

def _logprob_forward(hidden, weight, target_ids, temperature):
    hidden, weight = _operand(hidden), _operand(weight)
    pieces = []
    spans = _spans(hidden.shape[0], weight.shape[0] * weight.element_size(), hidden.device)
    for start, stop in spans:
        logits = _mm(hidden[start:stop], weight.T)  # (n, V)
        pieces.append(_logprob_rows(logits, target_ids[start:stop], temperature))
    if not pieces:
        return tuple(hidden.new_zeros(0, dtype=_wide(hidden).dtype) for _ in range(3))
    return pieces[0] if len(pieces) == 1 else tuple(torch.cat(column) for column in zip(*pieces))


class _FusedLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, temperature, vocab_size):
        logprob, entropy, lse = _logprob_forward(hidden, weight[:vocab_size], target_ids, temperature)
        ctx.save_for_backward(hidden, weight, target_ids, lse)
        ctx.temperature, ctx.vocab_size = temperature, vocab_size
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        """Recomputes the logits by slices of the vocabulary: each slice of dW is complete, and written, once."""
        hidden_in, weight_in, target_ids, lse = ctx.saved_tensors
        # Tokens without upstream gradient (clipped, or in a group without reward spread) cost nothing and poison nothing.
        keep = upstream.nonzero().squeeze(1)
        partial = len(keep) < len(upstream)
        hidden, weight = _operand(hidden_in), _operand(weight_in[:ctx.vocab_size])
        if partial:
            hidden, target_ids, lse, upstream = (x.index_select(0, keep) for x in (hidden, target_ids, lse, upstream))
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None  # (n, D)
        d_weight = torch.zeros_like(weight_in) if need_weight else None  # (V, D)
        for first, last in _spans(len(weight), max(len(hidden), 1) * lse.element_size(), weight.device):
            logits = _mm(hidden, weight[first:last].T)  # (n, slice)
            grad = _logprob_grad_rows(logits, first, target_ids, lse, upstream, ctx.temperature)
            if need_hidden:
                _add_mm(d_hidden, grad, weight[first:last])
            if need_weight:
                d_weight[first:last] = grad.T @ hidden
        if need_hidden and partial:
            d_hidden = d_hidden.new_zeros(hidden_in.shape).index_copy_(0, keep, d_hidden)
        return d_hidden.to(hidden_in.dtype) if need_hidden else None, d_weight, None, None, None


def fused_linear_logprob(hidden, weight, target_ids, temperature=1.0, vocab_size=None):
    """log_softmax(hidden @ weight[:vocab_size].T / temperature)[target] per token, without the (N, V) logits.

    hidden (N, D) and weight (V, D) of one dtype: float32, bfloat16 or float64; target_ids (N,) int64.
    Returns logprob (N,) and entropy (N,), fp32 (fp64 for fp64 inputs). The entropy is for logging and carries no gradient.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _FusedLinearLogprob.apply(hidden, weight, target_ids, temperature, vocab_size)
    return _logprob_forward(hidden, weight[:vocab_size], target_ids, temperature)[:2]


# ---------------------------------------------------------------- full-vocabulary KL

def _kl_forward(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, reverse, temperature,
                vocab_size, need_hidden, need_weight):
    weight_shape = student_weight.shape
    student_hidden, teacher_hidden = _operand(student_hidden), _operand(teacher_hidden)
    student_weight, teacher_weight = _operand(student_weight[:vocab_size]), _operand(teacher_weight[:vocab_size])
    dtype = _wide(student_hidden).dtype
    kl = token_weight.new_zeros(len(student_hidden), dtype=dtype)
    d_hidden = torch.zeros_like(student_hidden, dtype=dtype) if need_hidden else None  # (N, Ds)
    d_weight = student_weight.new_zeros(weight_shape, dtype=dtype) if need_weight else None  # (V, Ds)
    spans = _spans(len(student_hidden), len(student_weight) * kl.element_size(), kl.device)
    rows = spans[0][1] if spans else 0
    student_buffer, teacher_buffer = kl.new_empty(2, rows, len(student_weight))
    for start, stop in spans:
        student = _mm(student_hidden[start:stop], student_weight.T, out=student_buffer[:stop - start])  # (n, V)
        teacher = _mm(teacher_hidden[start:stop], teacher_weight.T, out=teacher_buffer[:stop - start])  # (n, V)
        kl[start:stop], grad = _kl_rows(student, teacher, token_weight[start:stop], reverse, temperature,
                                        need_hidden or need_weight)
        if need_hidden:
            _mm(grad, student_weight, out=d_hidden[start:stop])
        if need_weight:
            _add_mm(d_weight[:vocab_size], grad.T, student_hidden[start:stop])
    return (token_weight * kl).sum(), kl, d_hidden, d_weight


def _scaled(gradient, upstream, dtype):
    """gradient * upstream, rounded once; not in place, so that a retained graph can be walked again."""
    return None if gradient is None else torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))


class _FusedLinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_weight, teacher_hidden, teacher_weight, *rest):
        loss, kl, *gradients = _kl_forward(student_hidden, student_weight, teacher_hidden, teacher_weight, *rest,
                                           *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.dtype = student_hidden.dtype
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        d_hidden, d_weight = (_scaled(g, upstream, ctx.dtype) for g in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None, None, None


def fused_linear_kl(student_hidden, student_weight, teacher_hidden, teacher_weight, direction="reverse", temperature=1.0,
                    token_weight=None, vocab_size=None):
    """sum(token_weight * KL) over the whole vocabulary, gradient to the student only.

    direction "reverse": KL(student || teacher), Eq. 4 of arXiv 2605.12483 v1; "forward": KL(teacher || student), Eq. 5.
    student_hidden (N, Ds), student_weight (V, Ds), teacher_hidden (N, Dt), teacher_weight (Vt, Dt); token_weight (N,).
    Returns loss (scalar) and kl (N,), fp32 (fp64 for fp64 inputs); kl carries no gradient and is 0 where token_weight is.
    """
    reverse = direction == "reverse"
    count = len(student_hidden)
    token_weight = (torch.ones(count, device=student_hidden.device) if token_weight is None else token_weight.detach())
    token_weight = token_weight.to(_wide(student_hidden).dtype)
    keep = token_weight.nonzero().squeeze(1)
    partial = len(keep) < count
    if partial:  # before the products: 0 * NaN from a padded row would reach every gradient
        student_hidden, teacher_hidden, token_weight = (x.index_select(0, keep)
                                                        for x in (student_hidden, teacher_hidden, token_weight))
    args = (student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, reverse, temperature, vocab_size)
    if torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad):
        loss, kl = _FusedLinearKL.apply(*args)
    else:
        loss, kl = _kl_forward(*args, False, False)[:2]
    return loss, (kl.new_zeros(count).index_copy_(0, keep, kl) if partial else kl)


# ---------------------------------------------------------------- the same on logits that already exist

class _LogprobFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, temperature):
        logprob, entropy, lse = _logits_forward(logits, target_ids, temperature)
        ctx.save_for_backward(logits, target_ids, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        logits, target_ids, lse = ctx.saved_tensors
        d_logits = torch.empty_like(logits)  # (N, V)
        for start, stop in _spans(len(logits), logits.shape[1] * lse.element_size(), logits.device):
            rows = slice(start, stop)
            piece = logits[rows].to(lse.dtype, copy=True)  # copy: the next line writes in place
            grad = _logprob_grad_rows(piece, 0, target_ids[rows], lse[rows], upstream[rows], ctx.temperature)
            d_logits[rows] = grad.masked_fill_(upstream[rows, None] == 0, 0)
        return d_logits, None, None


def _logits_forward(logits, target_ids, temperature):
    dtype = _wide(logits[:0]).dtype
    pieces = [logits.new_zeros((3, 0), dtype=dtype)]
    for start, stop in _spans(len(logits), logits.shape[1] * dtype.itemsize, logits.device):
        piece = logits[start:stop].detach().to(dtype, copy=True)  # copy: the next line writes in place
        pieces.append(torch.stack(_logprob_rows(piece, target_ids[start:stop], temperature)))
    return torch.cat(pieces, dim=1).unbind(0)


def logprob_from_logits(logits, target_ids, temperature=1.0):
    """log_softmax(logits / temperature)[target] and entropy, both (N,), from logits (N, V); as fused_linear_logprob."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return _LogprobFromLogits.apply(logits, target_ids, temperature)
    return _logits_forward(logits, target_ids, temperature)[:2]


class _KLFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, *rest):
        loss, kl, d_logits = _logits_kl_forward(student_logits, *rest, True)
        ctx.save_for_backward(d_logits)
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        d_logits, = ctx.saved_tensors
        return _scaled(d_logits, upstream, d_logits.dtype), None, None, None, None


def _logits_kl_forward(student_logits, teacher_logits, token_weight, reverse, temperature, with_grad):
    dtype = token_weight.dtype
    kl = torch.empty_like(token_weight)  # (N,)
    d_logits = torch.empty_like(student_logits) if with_grad else None  # (N, V)
    for start, stop in _spans(len(kl), student_logits.shape[1] * dtype.itemsize, kl.device):
        rows = slice(start, stop)
        dead = token_weight[rows, None] == 0  # equal logits: KL and gradient are 0 whatever stood there
        student, teacher = (x[rows].detach().to(dtype, copy=True).masked_fill_(dead, 0)
                            for x in (student_logits, teacher_logits))
        kl[rows], grad = _kl_rows(student, teacher, token_weight[rows], reverse, temperature, with_grad)
        if with_grad:
            d_logits[rows] = grad
    return (token_weight * kl).sum(), kl, d_logits


def kl_from_logits(student_logits, teacher_logits, direction="reverse", temperature=1.0, token_weight=None):
    """sum(token_weight * KL) and KL per token (N,) from logits (N, V) of both models; as fused_linear_kl."""
    token_weight = (torch.ones(len(student_logits), device=student_logits.device) if token_weight is None
                    else token_weight.detach()).to(_wide(student_logits[:0]).dtype)
    args = (student_logits, teacher_logits, token_weight, direction == "reverse", temperature)
    if torch.is_grad_enabled() and student_logits.requires_grad:
        return _KLFromLogits.apply(*args)
    return _logits_kl_forward(*args, False)[:2]
