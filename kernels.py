"""Kernels: which loops are worth writing by hand?

A step of training is matrix products, which the libraries do well, and everything between them, which moves bytes.
A kernel here exists where fewer bytes move than in any chain of library calls, and each stands beside a plain PyTorch
reference with the same signature, which is its definition and its test; without Triton torch's own ops compute it.

    rmsnorm               y_i = x_i w_i / sqrt(mean_j x_j^2 + eps)            x is read once, one float a row is kept  [RMS eq 4]
    linear_cross_entropy  sum_m weight_m (log sum_v exp(l_mv) - l_m,target)   with l = x w^T, and l never stored:
                          d/dl_mv = weight_m (softmax(l)_mv - [v = target])   a chunk of rows at a time, gradient included;
                          also of capped logits, smoothed targets, and with the z-loss (log sum_v exp(l_mv))^2

Every op is a torch.library custom op with a fake and an autograd formula, so that eager mode, torch.compile(fullgraph)
and Triton's interpreter (TRITON_INTERPRET=1, which needs no GPU) all run it.

Contents:    dispatch | rmsnorm | linear_cross_entropy | start-up | demo and bench
Shapes:      M rows (B T flattened), D n_embd, V vocab
References:
    [RMS]    Root Mean Square Layer Normalization, arXiv:1910.07467
    [Liger]  Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989
    [Inception] Rethinking the Inception Architecture, 1512.00567; [PaLM] 2204.02311; [Gem2] Gemma 2, 2408.00118
Run me:      python kernels.py             (errors of every op against float64)
             python kernels.py --bench     (times beside PyTorch's own, on this device)
"""
import inspect
import os
import time
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokenizer import UsageError, run_cli

try:
    import triton
    import triton.language as tl
except ImportError:                        # CPU builds of torch come without it; everything below then runs on torch's own ops
    triton = None

    class tl:
        constexpr = None

KERNELS = ("auto", "triton", "torch")      # flag --kernels
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass
class KernelConfig:
    kernels: str = "auto"          # hand-written kernels: auto (triton on a GPU, else torch), triton or torch


# ---- Dispatch (who runs this op?) ----

def jit(function):
    """triton.jit, or the bare function where triton is missing (it is then never called)."""
    return triton.jit(function) if triton else function


_choice = "auto"


def use(choice):
    """Set --kernels for this process; returns one line that says what will run and why."""
    global _choice
    if choice == "triton" and triton is None:
        raise UsageError("--kernels=triton needs the triton package, which is not installed here; use --kernels=torch")
    if choice == "triton" and not (torch.cuda.is_available() or INTERPRET):
        raise UsageError("--kernels=triton needs a GPU, or TRITON_INTERPRET=1 to be slow on a CPU; use --kernels=torch")
    _choice = choice
    if choice == "triton" or choice == "auto" and triton is not None and torch.cuda.is_available():
        return "triton" + (" (interpreted)" if INTERPRET else "")
    return "torch" + ("" if choice == "torch" else " (no GPU)" if triton else " (triton is not installed)")


def takes_triton(x):
    return _choice == "triton" or _choice == "auto" and triton is not None and x.is_cuda


def no_autocast(x):
    """Ops choose their own precision; autocast must not choose again inside them."""
    return torch.autocast(x.device.type, enabled=False)


def to_autocast(x):
    """x in autocast's type where that is on: one cast here instead of one in each product that reads x."""
    on = torch.is_autocast_enabled(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if on and x.dtype == torch.float32 else x


Case = namedtuple("Case", "name shape ours ref peers leaves rest flops bytes")


# ---- rmsnorm (scale a row to unit root mean square) ----

def rmsnorm_ref(x_MD, w_D, eps=1e-6):
    """[M, D] (any leading shape), gain [D] -> x / rms(x) * w in x's type, computed in float32 or wider."""
    x32_MD = x_MD.to(torch.promote_types(x_MD.dtype, torch.float32))
    rstd_M1 = torch.rsqrt(x32_MD.square().mean(-1, keepdim=True) + eps)
    return (x32_MD * rstd_M1 * w_D.to(x32_MD.dtype)).to(x_MD.dtype)                                  # [RMS eq 4]


@jit
def _rmsnorm_fwd(x_ptr, w_ptr, y_ptr, rstd_ptr, D, eps, BLOCK_D: tl.constexpr):
    # grid (M,): one program per row, the whole row in registers, so x is read from memory once
    row = tl.program_id(0)
    col_D = tl.arange(0, BLOCK_D)                   # power of two, may overhang D
    keep_D = col_D < D                              # the overhang reads as 0 and adds nothing to the sum
    x_D = tl.load(x_ptr + row * D + col_D, mask=keep_D, other=0.0).to(tl.float32)
    w_D = tl.load(w_ptr + col_D, mask=keep_D, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x_D * x_D, 0) / D + eps)                # divide by D, not BLOCK_D
    tl.store(y_ptr + row * D + col_D, x_D * rstd * w_D, mask=keep_D)
    tl.store(rstd_ptr + row, rstd)                  # saved: backward needs one float per row, not the row


@jit
def _rmsnorm_bwd(dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr, M, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # grid (programs,): each owns ROWS neighbouring rows and keeps its share of dw in registers, so dw needs no atomics
    # and the sum over programs afterwards is in a fixed order
    program = tl.program_id(0)
    col_D = tl.arange(0, BLOCK_D)
    keep_D = col_D < D
    w_D = tl.load(w_ptr + col_D, mask=keep_D, other=0.0).to(tl.float32)
    dw_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in tl.static_range(ROWS):
        row = program * ROWS + i
        keep = keep_D & (col_D * 0 + row < M)       # a block, not a scalar: the interpreter wants one shape
        x_D = tl.load(x_ptr + row * D + col_D, mask=keep, other=0.0).to(tl.float32)
        dy_D = tl.load(dy_ptr + row * D + col_D, mask=keep, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        xhat_D = x_D * rstd
        dw_D += dy_D * xhat_D
        g_D = dy_D * w_D
        dx_D = rstd * (g_D - xhat_D * (tl.sum(g_D * xhat_D, 0) / D))    # rms depends on every x_j: project it out
        tl.store(dx_ptr + row * D + col_D, dx_D, mask=keep)
    tl.store(dw_ptr + program * D + col_D, dw_D, mask=keep_D)


@torch.library.custom_op("flatlm::rmsnorm", mutates_args=())
def _rmsnorm(x_MD: torch.Tensor, w_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> y, 1 / rms of each row. Without triton a chain of torch's own ops, fewer than autograd would make of the reference."""
    M, D = x_MD.shape
    if not takes_triton(x_MD):
        wide = torch.promote_types(x_MD.dtype, torch.float32)
        norm_M1 = torch.linalg.vector_norm(x_MD, dim=-1, keepdim=True, dtype=wide)
        rstd_M1 = norm_M1.square_().div_(D).add_(eps).rsqrt_()
        return (x_MD * rstd_M1).mul_(w_D).to(x_MD.dtype, copy=False), rstd_M1.squeeze(1)
    y_MD, rstd_M = torch.empty_like(x_MD), torch.empty(M, device=x_MD.device, dtype=torch.float32)
    _rmsnorm_fwd[(M,)](x_MD, w_D, y_MD, rstd_M, D, eps, BLOCK_D=triton.next_power_of_2(D))
    return y_MD, rstd_M


@_rmsnorm.register_fake
def _(x_MD, w_D, eps):
    return torch.empty_like(x_MD), x_MD.new_empty(x_MD.shape[0], dtype=torch.promote_types(x_MD.dtype, torch.float32))


@torch.library.custom_op("flatlm::rmsnorm_backward", mutates_args=())
def _rmsnorm_backward(dy_MD: torch.Tensor, x_MD: torch.Tensor, w_D: torch.Tensor,
                      rstd_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, D = x_MD.shape
    if not takes_triton(x_MD):
        rstd_M1, w32_D = rstd_M[:, None], w_D.to(rstd_M.dtype)
        xhat_MD = x_MD * rstd_M1
        p_MD = dy_MD * xhat_MD
        mean_M1 = torch.mv(p_MD, w32_D)[:, None] / D             # mean_j of dy_j w_j xhat_j
        dx_MD = (dy_MD * w32_D).addcmul_(xhat_MD, mean_M1, value=-1).mul_(rstd_M1)
        dw_D = p_MD.sum(0)
        return dx_MD.to(x_MD.dtype), dw_D.to(w_D.dtype)
    ROWS = 16
    programs = triton.cdiv(M, ROWS)
    dx_MD = torch.empty_like(x_MD)
    part_PD = torch.empty(programs, D, device=x_MD.device, dtype=torch.float32)
    _rmsnorm_bwd[(programs,)](dy_MD.contiguous(), x_MD, w_D, rstd_M, dx_MD, part_PD, M, D, ROWS=ROWS,
                              BLOCK_D=triton.next_power_of_2(D))
    return dx_MD, part_PD.sum(0).to(w_D.dtype)


@_rmsnorm_backward.register_fake
def _(dy_MD, x_MD, w_D, rstd_M):
    return torch.empty_like(x_MD), torch.empty_like(w_D)


def _rmsnorm_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _rmsnorm_grad(ctx, dy_MD, _):
    return (*_rmsnorm_backward(dy_MD, *ctx.saved_tensors), None)


_rmsnorm.register_autograd(_rmsnorm_grad, setup_context=_rmsnorm_save)


def rmsnorm(x, w_D, eps=1e-6):
    """RMSNorm over the last axis of [..., D]; the value of rmsnorm_ref, in autocast's type. Compiled without triton it is
    the reference itself, which inductor fuses with its neighbours."""
    if torch.compiler.is_compiling() and not takes_triton(x):
        return to_autocast(rmsnorm_ref(x, w_D, eps))
    return to_autocast(_rmsnorm(x.reshape(-1, x.shape[-1]).contiguous(), w_D, eps)[0].view_as(x))


# ---- linear_cross_entropy (the head and its loss, without the logits) ----

def linear_cross_entropy_ref(x_MD, w_VD, targets_M, weights_M, bias_V=None, softcap=0.0, z_alpha=0.0, smoothing=0.0,
                             return_nll=False):
    """sum_m weights_m loss_m over all rows at once, a scalar in float32 or wider; a row whose target is negative counts nothing.
    return_nll: also -log softmax(l_m)[targets_m] of every row [M], which no weight, smoothing or z-loss has touched, detached."""
    wide = torch.promote_types(x_MD.dtype, torch.float32)
    l_MV = F.linear(x_MD, w_VD.to(x_MD.dtype), None if bias_V is None else bias_V.to(x_MD.dtype)).to(wide)
    if softcap:
        l_MV = softcap * torch.tanh(l_MV / softcap)                                                      # [Gem2 sec 2]
    counted_M = targets_M >= 0
    target_M = targets_M.long().where(counted_M, -100)           # where F.cross_entropy gives 0
    loss_M = nll_M = F.cross_entropy(l_MV, target_M, reduction="none")
    if smoothing:                                                # the target is a mixture of the token and of any token
        loss_M = F.cross_entropy(l_MV, target_M, reduction="none", label_smoothing=smoothing)       # [Inception sec 7]
    if z_alpha:                                                  # keeps log Z near 0, so that logits do not drift
        loss_M = loss_M + z_alpha * l_MV.logsumexp(1).square().where(counted_M, 0)                      # [PaLM sec 5]
    loss = (loss_M * weights_M.to(wide)).sum()
    return (loss, nll_M.detach()) if return_nll else loss


@jit
def _cross_entropy_rows(logit_ptr, target_ptr, weight_ptr, nll_ptr, loss_ptr, V, stride, softcap, z_alpha, smoothing,
                        CAP: tl.constexpr, SMOOTH: tl.constexpr, GRAD: tl.constexpr, BLOCK_V: tl.constexpr):
    # grid (rows of the chunk,): the first sweep finds max and sum of exp together (rescaling the sum whenever the max
    # grows), the second overwrites the logits by their gradient; a row of a small vocabulary stays in cache between them
    row = tl.program_id(0).to(tl.int64)             # rows times V passes 2^31
    target = tl.load(target_ptr + row).to(tl.int64)
    counted = target >= 0
    width = tl.where(counted, V, 0)                 # a row that does not count is not read
    row_ptr = logit_ptr + row * stride
    high = tl.full([], -float("inf"), tl.float32)
    base = tl.full([], 0.0, tl.float32)             # high, or 0 while nothing but -inf was seen: -inf - -inf is no number
    total = tl.full([], 0.0, tl.float32)
    summed = tl.full([], 0.0, tl.float32)
    for start in range(0, width, BLOCK_V):
        col_V = start + tl.arange(0, BLOCK_V)
        l_V = tl.load(row_ptr + col_V, mask=col_V < V, other=-float("inf")).to(tl.float32)
        if CAP:
            l_V = tl.where(col_V < V, softcap * (2 * tl.sigmoid(2 * l_V / softcap) - 1), -float("inf"))
        if SMOOTH:
            summed += tl.sum(tl.where(col_V < V, l_V, 0.0), 0)
        high = tl.maximum(high, tl.max(l_V, 0))
        higher = tl.where(high == -float("inf"), 0.0, high)
        total = total * tl.exp(base - higher) + tl.sum(tl.exp(l_V - higher), 0)
        base = higher
    lse = base + tl.log(total)
    # an id beyond V reads nothing and makes the loss nan, which training refuses
    l_target = tl.load(row_ptr + target, mask=counted & (target < V), other=float("nan")).to(tl.float32)
    if CAP:
        l_target = softcap * (2 * tl.sigmoid(2 * l_target / softcap) - 1)
    nll = lse - l_target
    loss = nll + z_alpha * lse * lse
    if SMOOTH:
        loss += smoothing * (l_target - summed / V)
    tl.store(nll_ptr + row, tl.where(counted, nll, 0.0))
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    if GRAD:
        weight = tl.load(weight_ptr + row).to(tl.float32)
        for start in range(0, V, BLOCK_V):
            col_V = start + tl.arange(0, BLOCK_V)
            l_V = tl.load(row_ptr + col_V, mask=col_V < width, other=-float("inf")).to(tl.float32)
            if CAP:
                t_V = 2 * tl.sigmoid(2 * l_V / softcap) - 1
                l_V = softcap * t_V
            d_V = tl.exp(l_V - lse) * (1 + 2 * z_alpha * lse) - tl.where(col_V == target, 1 - smoothing, 0.0)
            if SMOOTH:
                d_V -= smoothing / V
            if CAP:
                d_V *= 1 - t_V * t_V
            tl.store(row_ptr + col_V, tl.where(counted, d_V * weight, 0.0), mask=col_V < V)


def _cross_entropy_torch(logits_CV, targets_C, weights_C, softcap, z_alpha, smoothing, grad):
    """The kernel above in torch's ops: a few rows at a time, so that what is wide stays in cache."""
    C, V = logits_CV.shape
    nll_C, loss_C = weights_C.new_empty(2, C)
    rows = max(1, (64 << 20 if logits_CV.is_cuda else 512 << 10) // (V * weights_C.element_size()))
    for here in (slice(start, start + rows) for start in range(0, C, rows)):
        l_RV, counted_R1 = logits_CV[here].to(weights_C.dtype), targets_C[here, None] >= 0
        target_R1 = targets_C[here, None].clamp(min=0)
        if softcap:
            l_RV = l_RV.div(softcap).tanh_().mul_(softcap)
        high_R1 = l_RV.amax(1, keepdim=True).clamp_(min=torch.finfo(l_RV.dtype).min)         # a row of -inf stays a row of -inf
        at_target_R1, mean_R1 = l_RV.gather(1, target_R1), l_RV.mean(1, keepdim=True) if smoothing else 0
        p_RV = (l_RV - high_R1 if softcap else l_RV.sub_(high_R1)).exp_()        # the cap's slope needs l again
        total_R1 = p_RV.sum(1, keepdim=True)
        lse_R1 = high_R1 + total_R1.log()
        loss_R1 = nll_R1 = lse_R1 - at_target_R1
        if smoothing or z_alpha:
            loss_R1 = nll_R1 + smoothing * (at_target_R1 - mean_R1) + z_alpha * lse_R1.square()
        nll_C[here, None], loss_C[here, None] = nll_R1.where(counted_R1, 0), loss_R1.where(counted_R1, 0)
        if grad:
            weight_R1 = weights_C[here, None].where(counted_R1, 0)
            d_RV = p_RV.mul_((weight_R1 * (1 + 2 * z_alpha * lse_R1) / total_R1).where(counted_R1, 0))
            d_RV.scatter_add_(1, target_R1, (smoothing - 1) * weight_R1)
            if smoothing:
                d_RV.sub_(weight_R1 * (smoothing / V))
            if softcap:
                d_RV.mul_(1 - (l_RV / softcap).square_())
            if softcap or d_RV.dtype != logits_CV.dtype:         # else it stands there already
                logits_CV[here] = d_RV
    return nll_C, loss_C


def _cross_entropy_chunk(logits_CV, targets_C, weights_C, softcap, z_alpha, smoothing, grad):
    """(nll, loss) of each row; with `grad` the logits are overwritten by d weights loss / d logits."""
    if not takes_triton(logits_CV):
        return _cross_entropy_torch(logits_CV, targets_C, weights_C, softcap, z_alpha, smoothing, grad)
    C, V = logits_CV.shape
    nll_C, loss_C = torch.empty(2, C, device=logits_CV.device, dtype=torch.float32)
    _cross_entropy_rows[(C,)](logits_CV, targets_C, weights_C, nll_C, loss_C, V, logits_CV.stride(0), softcap, z_alpha, smoothing,
                              CAP=softcap != 0, SMOOTH=smoothing != 0, GRAD=grad,
                              BLOCK_V=min(4096, triton.next_power_of_2(V)), num_warps=8)
    return nll_C, loss_C


def chunk_rows(x_MD, V):
    """Rows whose logits fill the buffer: 256 MB on a GPU and at least 4096 (large products), on a CPU 14 MB, which stay in cache
    with the 2 MB that are worked on, and at least 128.                                                  [Liger sec 3.2]"""
    least, size = (4096, 256 << 20) if x_MD.is_cuda else (128, 14 << 20)
    return max(least, size // (V * x_MD.element_size()))


def few_logits(x_MD, w_VD):
    """On a CPU: logits that fit into cache with their gradients (16 MB) are cheaper stored than recomputed in pieces."""
    return not takes_triton(x_MD) and not x_MD.is_cuda and len(x_MD) * len(w_VD) <= 1 << 20


def _logit_buffer(x_MD, rows, V):
    """[rows, V] for logits; on a GPU rows begin at multiples of 128 bytes, as fast products want."""
    return x_MD.new_empty(rows, V + -V % 64 * x_MD.is_cuda)[:, :V]


def _empty_grads(x_MD, w_VD, x_grad, w_grad, b_grad):
    """(dx, dw, db) to write to and to add to, the latter in float32 or wider. No suffix: empty where no gradient is wanted."""
    wide, V = torch.promote_types(x_MD.dtype, torch.float32), len(w_VD)
    dw = torch.zeros_like(w_VD, dtype=wide) if w_grad else x_MD.new_empty(0, dtype=wide)
    return x_MD.new_empty(len(x_MD) * x_grad, x_MD.shape[1]), dw, x_MD.new_zeros(V * b_grad, dtype=wide)


def _add_grads(d_CV, x_CD, head_VD, dx, dw, db):
    """dx = d w; dw += d^T x; db += sum of d. Where dw is of a wider type than d, it grows by a slice of the vocabulary at a
    time, so that the product stays small."""
    if len(dx):
        torch.mm(d_CV, head_VD, out=dx)
    if len(db):
        db += d_CV.sum(0, dtype=db.dtype)
    if len(dw) and dw.dtype == d_CV.dtype:
        dw.addmm_(d_CV.T, x_CD)
    elif len(dw):
        size = max(64, (64 << 20 if x_CD.is_cuda else 1 << 20) // (x_CD.shape[1] * x_CD.element_size()) // 64 * 64)
        for start in range(0, len(dw), size):
            dw[start:start + size] += d_CV[:, start:start + size].T @ x_CD


@torch.library.custom_op("flatlm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(x_MD: torch.Tensor, w_VD: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor,
                          bias_V: torch.Tensor | None, softcap: float, z_alpha: float, smoothing: float, x_grad: bool, w_grad: bool,
                          b_grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
                                                 torch.Tensor]:
    """-> loss sum; nll and loss of each row; its gradients by x, w and bias, after those by the logits, which stand there instead
    where one chunk holds all rows. Empty where they are not wanted."""
    M, V, wide, grad = len(x_MD), len(w_VD), torch.promote_types(x_MD.dtype, torch.float32), x_grad or w_grad or b_grad
    nll_M, loss_M = x_MD.new_empty(M, dtype=wide), x_MD.new_empty(M, dtype=wide)
    weights_M, targets_M = weights_M.to(wide).contiguous(), targets_M.long().contiguous()
    most = chunk_rows(x_MD, V)
    one, rows = 0 < M <= most, -(-M // max(1, -(-M // most)))    # equal chunks
    buffer = _logit_buffer(x_MD, rows, V)                        # of all of them
    grads = _empty_grads(x_MD, w_VD, *((on and not one) for on in (x_grad, w_grad, b_grad)))
    with no_autocast(x_MD):
        head_VD, bias = w_VD.to(x_MD.dtype), None if bias_V is None else bias_V.to(x_MD.dtype)
        for here in (slice(start, start + rows) for start in range(0, M, max(1, rows))):
            x_CD, l_CV = x_MD[here], buffer[:len(x_MD[here])]
            torch.mm(x_CD, head_VD.T, out=l_CV) if bias is None else torch.addmm(bias, x_CD, head_VD.T, out=l_CV)
            nll_M[here], loss_M[here] = _cross_entropy_chunk(l_CV, targets_M[here], weights_M[here], softcap, z_alpha, smoothing,
                                                             grad)
            _add_grads(l_CV, x_CD, head_VD, grads[0][here], *grads[1:])          # l now holds its own gradient
    kinds = w_VD.dtype, wide if bias_V is None else bias_V.dtype
    kept = buffer if one and grad else x_MD.new_empty(0, V)
    return (loss_M * weights_M).sum(), nll_M, loss_M, kept, grads[0], *(g.to(kind) for g, kind in zip(grads[1:], kinds))


@_linear_cross_entropy.register_fake
def _(x_MD, w_VD, targets_M, weights_M, bias_V, softcap, z_alpha, smoothing, x_grad, w_grad, b_grad):
    M, V, one = len(x_MD), len(w_VD), 0 < len(x_MD) <= chunk_rows(x_MD, len(w_VD))
    dx, dw, db = _empty_grads(x_MD, w_VD, *((on and not one) for on in (x_grad, w_grad, b_grad)))
    kept = _logit_buffer(x_MD, M, V) if one and (x_grad or w_grad or b_grad) else x_MD.new_empty(0, V)
    row = lambda *shape: x_MD.new_empty(shape, dtype=db.dtype)
    return row(), row(M), row(M), kept, dx, dw.to(w_VD.dtype), db if bias_V is None else db.to(bias_V.dtype)


@torch.library.custom_op("flatlm::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(d_MV: torch.Tensor, x_MD: torch.Tensor, w_VD: torch.Tensor, x_grad: bool, w_grad: bool,
                                   b_grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The products of one chunk that was kept -> dx, dw, db."""
    dx, dw, db = _empty_grads(x_MD, w_VD, x_grad, w_grad, b_grad)
    with no_autocast(x_MD):
        _add_grads(d_MV, x_MD, w_VD.to(x_MD.dtype), dx, dw, db)
    return dx, dw.to(w_VD.dtype), db


@_linear_cross_entropy_backward.register_fake
def _(d_MV, x_MD, w_VD, x_grad, w_grad, b_grad):
    dx, dw, db = _empty_grads(x_MD, w_VD, x_grad, w_grad, b_grad)
    return dx, dw.to(w_VD.dtype), db


def _linear_cross_entropy_save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)                             # else zeros as large as these outputs
    ctx.save_for_backward(*output[2:], *(inputs[:2] if len(output[3]) else ()))
    ctx.weights_kind, ctx.bias_kind = inputs[3].dtype, inputs[4] if inputs[4] is None else inputs[4].dtype


def _linear_cross_entropy_grad(ctx, dloss, *_):
    """What forward computed for dloss = 1, scaled: in place, since it may be as large as the head, unless the graph is kept for
    another backward or is being traced."""
    loss_M, kept, *grads = ctx.saved_tensors
    keep = torch._C._autograd._get_current_graph_task_keep_graph() or type(dloss) is not torch.Tensor
    factor = dloss.view(1) if dloss.is_cuda else dloss          # on a GPU a scalar would be rounded to bfloat16 first
    scaled = lambda g: (g.clone() if keep else g).mul_(factor)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    if len(kept):
        grads = _linear_cross_entropy_backward(scaled(kept), *grads[3:], *needs)
        grads = *grads[:2], grads[2].to(ctx.bias_kind) if needs[2] else None
    else:
        grads = [scaled(g) if need else None for g, need in zip(grads, needs)]
    dx, dw, db = (g if need else None for g, need in zip(grads, needs))
    dweights_M = (loss_M * dloss).to(ctx.weights_kind) if ctx.needs_input_grad[3] else None
    return dx, dw, None, dweights_M, db, *[None] * 6


_linear_cross_entropy.register_autograd(_linear_cross_entropy_grad, setup_context=_linear_cross_entropy_save)


def linear_cross_entropy(x_MD, w_VD, targets_M, weights_M, bias_V=None, softcap=0.0, z_alpha=0.0, smoothing=0.0, return_nll=False):
    """Weighted sum of next-token losses from hidden states [M, D] and the head [V, D]: a scalar, and with return_nll also the plain
    nll of every row. The logits exist only a chunk at a time; their gradient is taken while they are there, so backward is one
    multiplication (or, where one chunk holds all rows, the two products). Same signature and value as linear_cross_entropy_ref."""
    x_MD = to_autocast(x_MD)
    if few_logits(x_MD, w_VD):
        return linear_cross_entropy_ref(x_MD, w_VD, targets_M, weights_M, bias_V, softcap, z_alpha, smoothing, return_nll)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x_MD, w_VD, bias_V)]
    loss, nll_M, *_ = _linear_cross_entropy(x_MD.contiguous(), w_VD, targets_M, weights_M, bias_V, float(softcap), float(z_alpha),
                                            float(smoothing), *wanted)
    return (loss, nll_M) if return_nll else loss


def bench_linear_cross_entropy(device, dtype, quick):
    """The gradient is taken in forward, so only the sum of the two passes compares with others."""
    def plain(x_MD, w_VD, targets_M, weights_M):
        return (F.cross_entropy(F.linear(x_MD, w_VD.to(x_MD.dtype)).float(), targets_M, reduction="none") * weights_M).sum()

    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
    except ImportError:
        liger = None
    peers = {"F.cross_entropy": plain}
    if liger and device == "cuda":
        peers["liger"] = lambda x_MD, w_VD, targets_M, _: liger(x_MD, w_VD.to(x_MD.dtype), targets_M, reduction="sum")
    small, large = [(512, 128, 65), (512, 128, 4096)], [(16384, 768, 50304), (16384, 2048, 50304), (8192, 4096, 131072)]
    for M, D, V in large[:1 if quick else 3] if device == "cuda" else small:
        x_MD, w_VD = torch.randn(M, D, device=device, dtype=dtype), torch.randn(V, D, device=device) / D**0.5
        rest, size = (torch.randint(V, (M,), device=device), torch.ones(M, device=device)), x_MD.element_size()
        yield Case("linear_ce", f"{M}x{D}x{V}", linear_cross_entropy, linear_cross_entropy_ref, peers, (x_MD, w_VD), rest,
                   (2 * M * D * V, 4 * M * D * V), (size * (M + V) * D, size * (M + V) * D * 2))


# ---- Start-up (what should a run that compiles nothing not wait for?) ----

def skip_dynamo():
    """torch's optimizers and custom ops import torch.compile's machinery at their first call, a second or two, only to tell
    it to leave them alone. In a run that compiles nothing there is nobody to tell: mark these functions as told, and take
    the wrapper that imports it off AdamW's step."""
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer = torch.optim.Optimizer
    told = [optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict]
    for op in (_rmsnorm, _rmsnorm_backward, _linear_cross_entropy, _linear_cross_entropy_backward):
        told += op._backend_fns.values()
    for function in told:
        if wrapped := getattr(function, "__wrapped__", None):
            vars(wrapped).setdefault("__dynamo_disable", wrapped)


# ---- Demo and bench ----

def rel_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def cases(device, dtype, M, D, V):
    """name -> (ours, reference, what PyTorch users write, inputs that need gradients, other inputs)."""
    torch.manual_seed(0)
    x_MD, w_D = torch.randn(M, D, device=device, dtype=dtype), torch.randn(D, device=device)
    head_VD = torch.randn(V, D, device=device) / D**0.5
    targets_M, weights_M = torch.randint(V, (M,), device=device), torch.rand(M, device=device)

    def plain_ce(x_MD, head_VD, targets_M, weights_M):
        logits_MV = F.linear(x_MD, head_VD.to(x_MD.dtype)).float()
        return (F.cross_entropy(logits_MV, targets_M, reduction="none") * weights_M).sum()

    return {
        "rmsnorm": (rmsnorm, rmsnorm_ref, lambda x, w: F.layer_norm(x, w.shape, w.to(x.dtype)), (x_MD, w_D), ()),
        "linear_cross_entropy": (linear_cross_entropy, linear_cross_entropy_ref, plain_ce,
                                 (x_MD, head_VD), (targets_M, weights_M)),
    }


def value_and_grads(function, leaves, rest, dtype=None):
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out = function(*leaves, *rest)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def main(argv):
    bench = argv == ["--bench"]
    if argv and not bench:
        raise UsageError(f"kernels.py takes --bench or nothing, not {' '.join(argv)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name} | torch {torch.__version__} | triton {triton.__version__ if triton else '--'} | kernels: {use(_choice)}")
    M, D, V = (16384, 2048, 50304) if device == "cuda" else (3072, 384, 4096) if bench else (256, 64, 300)
    print(f"M {M}, D {D}, V {V}; relative error against float64 of the value and of each gradient\n")
    print(f"{'op':22s} {'type':9s} {'error':>8s} {'torch':>8s}" + (f" {'ms':>9s} {'torch ms':>9s} {'ratio':>6s}" if bench else ""))
    for dtype in (torch.float32, torch.bfloat16):
        if INTERPRET and dtype == torch.bfloat16:
            print("bfloat16 is left out: Triton's interpreter computes it wrongly")
            continue
        for op, (ours, ref, plain, leaves, rest) in cases(device, dtype, M, D, V).items():
            want = value_and_grads(ref, leaves, rest, torch.float64)
            worst = lambda f: max(map(rel_error, value_and_grads(f, leaves, rest), want))
            line = f"{op:22s} {str(dtype)[6:]:9s} {worst(ours):8.1e} {worst(ref):8.1e}"
            if bench:
                mine, theirs = best_ms([lambda: value_and_grads(ours, leaves, rest), lambda: value_and_grads(plain, leaves, rest)], device)
                line += f" {mine:9.3f} {theirs:9.3f} {theirs / mine:6.2f}"
            print(line, flush=True)
    if bench:
        print("\nms: forward and backward, median of 20, interleaved; torch ms: F.layer_norm and F.linear + F.cross_entropy")


def best_ms(functions, device, rounds=20):
    """Median time of each function in ms, called in turn so that a change of clock or load meets all of them."""
    times = [[] for _ in functions]
    for i in range(rounds + 3):
        for function, kept in zip(functions, times):
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            kept += [(time.perf_counter() - start) * 1e3] * (i >= 3)
    return [sorted(kept)[len(kept) // 2] for kept in times]


if __name__ == "__main__":
    run_cli(main)
