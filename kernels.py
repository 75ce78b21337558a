"""Kernels: which loops are worth writing by hand?

A step of training is matrix products, which the libraries do well, and everything between them, which moves bytes.
A kernel here exists where fewer bytes move than in any chain of library calls, and each stands beside a plain PyTorch
reference with the same signature, which is its definition and its test; without Triton torch's own ops compute it.

    rmsnorm               y_i = x_i w_i / sqrt(mean_j x_j^2 + eps)            x is read once, one float a row is kept  [RMS eq 4]
    add_rmsnorm           (rmsnorm(x + r), x + r)                             the stream is read and written once
    qk_norm_rope          y = (x_i w_i / rms(x)) turned by the token's angle  all heads of q and k in one launch     [RoPE eq 34]
    gated                 y = act(gate) up                                    act(gate) is not kept but made again     [GLU eq 6]
    linear_cross_entropy  sum_m weight_m (log sum_v exp(l_mv) - l_m,target)   with l = x w^T, and l never stored:
                          d/dl_mv = weight_m (softmax(l)_mv - [v = target])   a chunk of rows at a time, gradient included

Every op is a torch.library custom op with a fake and an autograd formula, so that eager mode, torch.compile(fullgraph)
and Triton's interpreter (TRITON_INTERPRET=1, which needs no GPU) all run it.

Contents:    dispatch | rmsnorm | linear_cross_entropy | qk_norm_rope | gated | start-up | demo and bench
Shapes:      M rows (B T flattened), D n_embd, V vocab, B batch, T tokens, H query heads, G key heads, K head dim,
             P rotary dim, J pairs of channels, F ffn hidden
References:
    [RMS]    Root Mean Square Layer Normalization, arXiv:1910.07467
    [Liger]  Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989
    [RoPE] RoFormer, arXiv:2104.09864; [GLU] GLU Variants Improve Transformer, arXiv:2002.05202
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


def autocast_dtype(dtype, device_type):
    """What products read where autocast is on and the stream is float32; else the type itself."""
    on = dtype == torch.float32 and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else dtype


def to_autocast(x):
    """x in autocast's type where that is on: one cast here instead of one in each product that reads x."""
    return x.to(autocast_dtype(x.dtype, x.device.type))


def sharing_programs(x, most):
    """Programs that share a sum over rows: a few for each processor, so that each adds many rows before it writes."""
    return min(most, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3)


Case = namedtuple("Case", "name shape ours ref peers leaves rest flops bytes")


# ---- rmsnorm (scale a row to unit root mean square) ----

def rmsnorm_ref(x_MD, w_D, eps=1e-6):
    """[M, D] (any leading shape), gain [D] -> x / rms(x) * w in x's type, computed in float32 or wider."""
    x32_MD = x_MD.to(torch.promote_types(x_MD.dtype, torch.float32))
    rstd_M1 = torch.rsqrt(x32_MD.square().mean(-1, keepdim=True) + eps)
    return (x32_MD * rstd_M1 * w_D.to(x32_MD.dtype)).to(x_MD.dtype)                                  # [RMS eq 4]


def add_rmsnorm_ref(x_MD, r_MD, w_D, eps=1e-6):
    """(rmsnorm(x + r), x + r): what a block adds to the stream, and the norm that reads the stream next."""
    sum_MD = x_MD + r_MD
    return rmsnorm_ref(sum_MD, w_D, eps), sum_MD


@jit
def _rmsnorm_fwd(x_ptr, r_ptr, w_ptr, y_ptr, sum_ptr, rstd_ptr, M, D, eps, ADD: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    # grid (blocks of rows,): whole rows in registers, so x is read from memory once; narrow rows share a program
    row_M1 = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col_1D = tl.arange(0, BLOCK_D)[None, :]         # power of two, may overhang D
    keep_MD = (row_M1 < M) & (col_1D < D)           # the overhang reads as 0 and adds nothing to the sum
    at_MD = row_M1 * D + col_1D
    x_MD = tl.load(x_ptr + at_MD, mask=keep_MD, other=0.0).to(tl.float32)
    if ADD:
        x_MD += tl.load(r_ptr + at_MD, mask=keep_MD, other=0.0).to(tl.float32)
        x_MD = x_MD.to(sum_ptr.dtype.element_ty).to(tl.float32)         # the numbers that are stored are those normalised
        tl.store(sum_ptr + at_MD, x_MD, mask=keep_MD)
    w_1D = tl.load(w_ptr + col_1D, mask=col_1D < D, other=0.0).to(tl.float32)
    rstd_M1 = 1.0 / tl.sqrt(tl.sum(x_MD * x_MD, 1)[:, None] / D + eps)  # divide by D, not BLOCK_D
    tl.store(y_ptr + at_MD, x_MD * rstd_M1 * w_1D, mask=keep_MD)
    tl.store(rstd_ptr + row_M1, rstd_M1, mask=row_M1 < M)               # saved: backward needs one float per row, not the row


@jit
def _rmsnorm_bwd(dy_ptr, dsum_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr, M, D, ADD: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    # grid (programs,): each strides over the rows and keeps its share of dw in registers, so dw needs no atomics, its parts
    # are few, and their sum afterwards is in a fixed order
    row_M1 = tl.arange(0, BLOCK_M)[:, None]
    col_1D = tl.arange(0, BLOCK_D)[None, :]
    w_1D = tl.load(w_ptr + col_1D, mask=col_1D < D, other=0.0).to(tl.float32)
    dw_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        here_M1 = block * BLOCK_M + row_M1
        keep_MD = (here_M1 < M) & (col_1D < D)
        at_MD = here_M1.to(tl.int64) * D + col_1D
        x_MD = tl.load(x_ptr + at_MD, mask=keep_MD, other=0.0).to(tl.float32)
        dy_MD = tl.load(dy_ptr + at_MD, mask=keep_MD, other=0.0).to(tl.float32)
        rstd_M1 = tl.load(rstd_ptr + here_M1, mask=here_M1 < M, other=0.0)
        xhat_MD = x_MD * rstd_M1
        dw_MD += dy_MD * xhat_MD
        g_MD = dy_MD * w_1D
        mean_M1 = tl.sum(g_MD * xhat_MD, 1)[:, None] / D
        dx_MD = rstd_M1 * (g_MD - xhat_MD * mean_M1)                    # rms depends on every x_j: project it out
        if ADD:                                     # the sum is also the stream: what comes back along it joins here
            dx_MD += tl.load(dsum_ptr + at_MD, mask=keep_MD, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at_MD, dx_MD, mask=keep_MD)
    tl.store(dw_ptr + tl.program_id(0) * D + col_1D, tl.sum(dw_MD, 0)[None, :], mask=col_1D < D)


def row_blocks(D):
    """Blocks of about 2,048 numbers, of at least one whole row, 16 numbers a thread."""
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_M = max(1, 2048 // BLOCK_D)
    return dict(BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D, num_warps=max(4, min(32, BLOCK_M * BLOCK_D // 512)))


@torch.library.custom_op("flatlm::rmsnorm", mutates_args=())
def _rmsnorm(x_MD: torch.Tensor, r_MD: torch.Tensor | None, w_D: torch.Tensor, eps: float,
             dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y in dtype, x + r (empty without r), 1 / rms of each row. Without triton a chain of torch's own ops, fewer than
    autograd would make of the reference."""
    M, D = x_MD.shape
    stream = x_MD.dtype if r_MD is None else torch.promote_types(x_MD.dtype, r_MD.dtype)
    if not takes_triton(x_MD):
        x_MD = x_MD if r_MD is None else x_MD + r_MD
        norm_M1 = torch.linalg.vector_norm(x_MD, dim=-1, keepdim=True, dtype=torch.promote_types(stream, torch.float32))
        rstd_M1 = norm_M1.square_().div_(D).add_(eps).rsqrt_()
        y_MD = (x_MD * rstd_M1).mul_(w_D).to(dtype, copy=False)
        return y_MD, x_MD.new_empty(0) if r_MD is None else x_MD, rstd_M1.squeeze(1)
    y_MD, rstd_M = torch.empty_like(x_MD, dtype=dtype), torch.empty(M, device=x_MD.device, dtype=torch.float32)
    total = x_MD.new_empty(0) if r_MD is None else torch.empty_like(x_MD, dtype=stream)
    blocks = row_blocks(D)
    _rmsnorm_fwd[(triton.cdiv(M, blocks["BLOCK_M"]),)](x_MD, x_MD if r_MD is None else r_MD, w_D, y_MD, total, rstd_M, M, D, eps,
                                                       ADD=r_MD is not None, **blocks)
    return y_MD, total, rstd_M


@_rmsnorm.register_fake
def _(x_MD, r_MD, w_D, eps, dtype):
    stream = x_MD.dtype if r_MD is None else torch.promote_types(x_MD.dtype, r_MD.dtype)
    total = x_MD.new_empty(0) if r_MD is None else torch.empty_like(x_MD, dtype=stream)
    return torch.empty_like(x_MD, dtype=dtype), total, x_MD.new_empty(len(x_MD), dtype=torch.promote_types(stream, torch.float32))


@torch.library.custom_op("flatlm::rmsnorm_backward", mutates_args=())
def _rmsnorm_backward(dy_MD: torch.Tensor, dsum_MD: torch.Tensor | None, x_MD: torch.Tensor, w_D: torch.Tensor,
                      rstd_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, D = x_MD.shape
    if not takes_triton(x_MD):
        rstd_M1, w32_D = rstd_M[:, None], w_D.to(rstd_M.dtype)
        dy_MD, xhat_MD = dy_MD.to(rstd_M.dtype), x_MD * rstd_M1
        p_MD = dy_MD * xhat_MD
        mean_M1 = torch.mv(p_MD, w32_D)[:, None] / D             # mean_j of dy_j w_j xhat_j
        dx_MD = (dy_MD * w32_D).addcmul_(xhat_MD, mean_M1, value=-1).mul_(rstd_M1)
        dx_MD = dx_MD if dsum_MD is None else dx_MD.add_(dsum_MD)
        return dx_MD.to(x_MD.dtype), p_MD.sum(0).to(w_D.dtype)
    blocks = row_blocks(D)
    programs = sharing_programs(x_MD, triton.cdiv(M, blocks["BLOCK_M"]))
    dx_MD, part_CD = torch.empty_like(x_MD), torch.empty(programs, D, device=x_MD.device, dtype=torch.float32)
    dy_MD, dsum_MD = dy_MD.contiguous(), None if dsum_MD is None else dsum_MD.contiguous()
    _rmsnorm_bwd[(programs,)](dy_MD, dy_MD if dsum_MD is None else dsum_MD, x_MD, w_D, rstd_M, dx_MD, part_CD, M, D,
                              ADD=dsum_MD is not None, **blocks)
    return dx_MD, part_CD.sum(0).to(w_D.dtype)


@_rmsnorm_backward.register_fake
def _(dy_MD, dsum_MD, x_MD, w_D, rstd_M):
    return torch.empty_like(x_MD), torch.empty_like(w_D)


def _rmsnorm_save(ctx, inputs, output):
    x_MD, r_MD, w_D, *_ = inputs
    ctx.dtypes = x_MD.dtype, r_MD.dtype if r_MD is not None else None
    ctx.save_for_backward(x_MD if r_MD is None else output[1], w_D, output[2])


def _rmsnorm_grad(ctx, dy_MD, dsum, _):
    x_dtype, r_dtype = ctx.dtypes
    dx_MD, dw_D = _rmsnorm_backward(dy_MD, dsum if r_dtype else None, *ctx.saved_tensors)
    return dx_MD.to(x_dtype), dx_MD.to(r_dtype) if r_dtype else None, dw_D, None, None


_rmsnorm.register_autograd(_rmsnorm_grad, setup_context=_rmsnorm_save)


def rmsnorm(x, w_D, eps=1e-6):
    """RMSNorm over the last axis of [..., D]; the value of rmsnorm_ref, in autocast's type. Compiled without triton it is
    the reference itself, which inductor fuses with its neighbours."""
    if torch.compiler.is_compiling() and not takes_triton(x):
        return to_autocast(rmsnorm_ref(x, w_D, eps))
    x_MD = x.reshape(-1, x.shape[-1]).contiguous()
    return _rmsnorm(x_MD, None, w_D, eps, autocast_dtype(x.dtype, x.device.type))[0].view_as(x)


def add_rmsnorm(x, r, w_D, eps=1e-6):
    """(rmsnorm(x + r), x + r) of [..., D]: the value of add_rmsnorm_ref, the first in autocast's type."""
    if torch.compiler.is_compiling() and not takes_triton(x):
        y, total = add_rmsnorm_ref(x, r, w_D, eps)
        return to_autocast(y), total
    dtype = autocast_dtype(torch.promote_types(x.dtype, r.dtype), x.device.type)
    x_MD, r_MD = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, r))
    y_MD, sum_MD, _ = _rmsnorm(x_MD, r_MD, w_D, eps, dtype)
    return y_MD.view_as(x), sum_MD.view_as(x)


# ---- linear_cross_entropy (the head and its loss, without the logits) ----

def linear_cross_entropy_ref(x_MD, w_VD, targets_M, weights_M):
    """sum_m weights_m * -log softmax(x_m w^T)[targets_m] over all rows at once, a scalar in float32 or wider."""
    logits_MV = (x_MD @ w_VD.to(x_MD.dtype).T).to(torch.promote_types(x_MD.dtype, torch.float32))
    return (F.cross_entropy(logits_MV, targets_M, reduction="none") * weights_M).sum()


@jit
def _cross_entropy_rows(logit_ptr, target_ptr, nll_ptr, V, stride, GRAD: tl.constexpr, BLOCK_V: tl.constexpr):
    # grid (rows of the chunk,): the first sweep finds max and sum of exp together (rescaling the sum whenever the max
    # grows), the second overwrites the logits by their gradient; a row of a small vocabulary stays in cache between them
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    row_ptr = logit_ptr + row * stride
    high = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        col_V = start + tl.arange(0, BLOCK_V)
        l_V = tl.load(row_ptr + col_V, mask=col_V < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(high, tl.max(l_V, 0))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(l_V - higher), 0)
        high = higher
    lse = high + tl.log(total)
    tl.store(nll_ptr + row, lse - tl.load(row_ptr + target).to(tl.float32))
    if GRAD:
        for start in range(0, V, BLOCK_V):
            col_V = start + tl.arange(0, BLOCK_V)
            l_V = tl.load(row_ptr + col_V, mask=col_V < V, other=-float("inf")).to(tl.float32)
            d_V = tl.exp(l_V - lse) - tl.where(col_V == target, 1.0, 0.0)
            tl.store(row_ptr + col_V, d_V, mask=col_V < V)


def _cross_entropy_chunk(logits_CV, targets_C, grad):
    """nll of each row; with `grad` the logits are overwritten by softmax - onehot. Triton on a GPU, torch elsewhere."""
    if takes_triton(logits_CV):
        nll_C = torch.empty(len(logits_CV), device=logits_CV.device, dtype=torch.float32)
        _cross_entropy_rows[(len(logits_CV),)](logits_CV, targets_C, nll_C, logits_CV.shape[1], logits_CV.stride(0), GRAD=grad,
                                               BLOCK_V=min(4096, triton.next_power_of_2(logits_CV.shape[1])))
        return nll_C
    target_C1 = targets_C[:, None]
    logp_CV = torch.log_softmax(logits_CV, 1, dtype=torch.promote_types(logits_CV.dtype, torch.float32))
    nll_C = -logp_CV.gather(1, target_C1).squeeze(1)
    if grad:
        p_CV = logp_CV.exp_()
        logits_CV.copy_(p_CV.scatter_add_(1, target_C1, p_CV.new_full(target_C1.shape, -1.0)))
    return nll_C


def chunk_rows(x_MD, V):
    """Rows whose logits fill the buffer: 256 MB on a GPU (large products), 4 MB on a CPU (stays in cache).   [Liger sec 3.2]"""
    rows = (256 << 20 if x_MD.is_cuda else 4 << 20) // (V * x_MD.element_size())
    return max(128, rows)


@torch.library.custom_op("flatlm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(x_MD: torch.Tensor, w_VD: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor,
                          grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss sum, d loss / d x, d loss / d w (both empty without `grad`)."""
    with no_autocast(x_MD):
        wide = torch.promote_types(x_MD.dtype, torch.float32)
        weight_VD = w_VD.to(x_MD.dtype)
        loss = x_MD.new_zeros((), dtype=wide)
        dx_MD = torch.empty_like(x_MD) if grad else x_MD.new_empty(0)
        dw_VD = torch.zeros_like(w_VD, dtype=wide) if grad else x_MD.new_empty(0)
        rows = chunk_rows(x_MD, len(w_VD))
        for start in range(0, len(x_MD), rows):
            here = slice(start, start + rows)
            logits_CV = x_MD[here] @ weight_VD.T
            loss += (_cross_entropy_chunk(logits_CV, targets_M[here], grad) * weights_M[here]).sum()
            if grad:                 # the chunk now holds softmax - onehot; the row weights go onto the narrow factors
                weights_C1 = weights_M[here, None].to(x_MD.dtype)
                torch.mm(logits_CV, weight_VD, out=dx_MD[here])
                dx_MD[here] *= weights_C1
                dw_VD += logits_CV.T @ (x_MD[here] * weights_C1)
    return loss, dx_MD, dw_VD.to(w_VD.dtype)


@_linear_cross_entropy.register_fake
def _(x_MD, w_VD, targets_M, weights_M, grad):
    empty = lambda like: torch.empty_like(like) if grad else like.new_empty(0)
    return x_MD.new_empty((), dtype=torch.promote_types(x_MD.dtype, torch.float32)), empty(x_MD), empty(w_VD)


def _linear_cross_entropy_save(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])


def _linear_cross_entropy_grad(ctx, dloss, *_):
    dx_MD, dw_VD = ctx.saved_tensors                             # computed in forward for dloss = 1, scaled here
    return dx_MD * dloss.to(dx_MD.dtype), dw_VD * dloss.to(dw_VD.dtype), None, None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_grad, setup_context=_linear_cross_entropy_save)


def linear_cross_entropy(x_MD, w_VD, targets_M, weights_M):
    """Weighted sum of next-token losses from hidden states [M, D] and the head [V, D]: a scalar. The logits exist only
    a chunk at a time; their gradient is taken while they are there, so backward is one multiplication.
    Same signature and value as linear_cross_entropy_ref."""
    x_MD = to_autocast(x_MD)
    grad = torch.is_grad_enabled() and (x_MD.requires_grad or w_VD.requires_grad)
    return _linear_cross_entropy(x_MD.contiguous(), w_VD, targets_M, weights_M, grad)[0]


# ---- qk_norm_rope (normalise and turn every head of queries and keys) ----

def partners(x, layout):
    """Puts in each channel's place the other of its pair: j with j + P/2 (half), 2j with 2j + 1 (interleaved)."""
    return x.roll(x.shape[-1] // 2, -1) if layout == "half" else x.unflatten(-1, (-1, 2)).roll(1, -1).flatten(-2)


def rope_ref(x_BTHK, cos, sin, layout="half"):
    """Turns the first P channels of every head; the others pass. cos and sin [B or 1, T, 1, P] hold each pair's number twice,
    sin with the sign of the turn, so that -sin turns back."""
    P, cos, sin = cos.shape[-1], cos.to(x_BTHK.dtype), sin.to(x_BTHK.dtype)          # products in the heads' own type
    x_BTHP = x_BTHK[..., :P]
    turned_BTHP = x_BTHP * cos + partners(x_BTHP, layout) * sin                                      # [RoPE eq 34]
    return turned_BTHP if P == x_BTHK.shape[-1] else torch.cat([turned_BTHP, x_BTHK[..., P:]], -1)


def qk_norm_rope_ref(q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, layout="half", eps=1e-6):
    """Queries and keys, each head normalised (unless the gains are None), then turned."""
    if q_gain_K is not None:
        q_BTHK, k_BTGK = rmsnorm_ref(q_BTHK, q_gain_K, eps), rmsnorm_ref(k_BTGK, k_gain_K, eps)
    return rope_ref(q_BTHK, cos, sin, layout), rope_ref(k_BTGK, cos, sin, layout)


@jit
def _pairs(K: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, BLOCK_J: tl.constexpr):
    # places of the two channels of each pair; those after the first P make pairs, too, which turn by no angle
    pair_1J = tl.arange(0, BLOCK_J)[None, :]
    if HALF:
        return pair_1J + tl.where(pair_1J < P // 2, 0, P // 2), pair_1J + tl.where(pair_1J < P // 2, P // 2, K // 2)
    return 2 * pair_1J, 2 * pair_1J + 1


@jit
def _load_pairs(row_H1, keep_H1, end, other, K: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
                BLOCK_J: tl.constexpr):
    # neighbours are loaded as one row, whole words at a time, and parted in registers
    if HALF:
        a_1J, b_1J = _pairs(K, P, HALF, BLOCK_J)
        return (tl.load(row_H1 + a_1J, mask=keep_H1 & (b_1J < end), other=other).to(tl.float32),
                tl.load(row_H1 + b_1J, mask=keep_H1 & (b_1J < end), other=other).to(tl.float32))
    col_1K = tl.arange(0, 2 * BLOCK_J)[None, :]
    both_HK = tl.load(row_H1 + col_1K, mask=keep_H1 & (col_1K < end), other=other).to(tl.float32)
    return tl.split(tl.reshape(both_HK, [BLOCK_H, BLOCK_J, 2]))


@jit
def _store_pairs(row_H1, keep_H1, a_HJ, b_HJ, K: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
                 BLOCK_J: tl.constexpr):
    if HALF:
        a_1J, b_1J = _pairs(K, P, HALF, BLOCK_J)
        tl.store(row_H1 + a_1J, a_HJ, mask=keep_H1 & (b_1J < K))
        tl.store(row_H1 + b_1J, b_HJ, mask=keep_H1 & (b_1J < K))
    else:
        col_1K = tl.arange(0, 2 * BLOCK_J)[None, :]
        tl.store(row_H1 + col_1K, tl.reshape(tl.join(a_HJ, b_HJ), [BLOCK_H, 2 * BLOCK_J]), mask=keep_H1 & (col_1K < K))


@jit
def _heads(x_ptr, in_ptr, w_ptr, out_ptr, dw_ptr, cos_ptr, sin_ptr, in_b, in_t, in_h, angle_b, M, T, H, block, eps, K: tl.constexpr,
           P: tl.constexpr, NORM: tl.constexpr, BACK: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
           BLOCK_J: tl.constexpr):
    head_H1, all_11 = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None], tl.arange(0, 1)[:, None] == 0
    keep_H1 = head_H1 < H
    if NORM:
        wa_1J, wb_1J = _load_pairs(w_ptr, all_11, K, 0.0, K, P, HALF, 1, BLOCK_J)
        dwa_HJ, dwb_HJ = tl.zeros([BLOCK_H, BLOCK_J], tl.float32), tl.zeros([BLOCK_H, BLOCK_J], tl.float32)
    for token in range(tl.program_id(0), M, tl.num_programs(0)):
        b, t = (token // T).to(tl.int64), token % T
        angle, row_H1 = b * angle_b + t * P, ((b * T + t) * H + head_H1) * K
        a_HJ, b_HJ = _load_pairs(in_ptr + b * in_b + t * in_t + head_H1 * in_h, keep_H1, K, 0.0, K, P, HALF, BLOCK_H, BLOCK_J)
        cos_1J, _ = _load_pairs(cos_ptr + angle, all_11, P, 1.0, K, P, HALF, 1, BLOCK_J)
        _, sin_1J = _load_pairs(sin_ptr + angle, all_11, P, 0.0, K, P, HALF, 1, BLOCK_J)     # the second has the turn's own sign
        if NORM and not BACK:                       # before the turn: the gains of a pair differ, and a turn would mix them
            rstd_H1 = 1.0 / tl.sqrt(tl.sum(a_HJ * a_HJ + b_HJ * b_HJ, 1)[:, None] / K + eps)
            a_HJ, b_HJ = a_HJ * rstd_H1 * wa_1J, b_HJ * rstd_H1 * wb_1J
        sin_1J = -sin_1J if BACK else sin_1J
        a_HJ, b_HJ = a_HJ * cos_1J - b_HJ * sin_1J, b_HJ * cos_1J + a_HJ * sin_1J
        if NORM and BACK:                           # x is read here, so forward kept neither its norm nor 1 / rms
            xa_HJ, xb_HJ = _load_pairs(x_ptr + row_H1, keep_H1, K, 0.0, K, P, HALF, BLOCK_H, BLOCK_J)
            rstd_H1 = 1.0 / tl.sqrt(tl.sum(xa_HJ * xa_HJ + xb_HJ * xb_HJ, 1)[:, None] / K + eps)
            xa_HJ, xb_HJ = xa_HJ * rstd_H1, xb_HJ * rstd_H1
            dwa_HJ += a_HJ * xa_HJ
            dwb_HJ += b_HJ * xb_HJ
            a_HJ, b_HJ = a_HJ * wa_1J, b_HJ * wb_1J
            mean_H1 = tl.sum(a_HJ * xa_HJ + b_HJ * xb_HJ, 1)[:, None] / K
            a_HJ, b_HJ = rstd_H1 * (a_HJ - xa_HJ * mean_H1), rstd_H1 * (b_HJ - xb_HJ * mean_H1)
        _store_pairs(out_ptr + row_H1, keep_H1, a_HJ, b_HJ, K, P, HALF, BLOCK_H, BLOCK_J)
    if NORM and BACK:
        _store_pairs(dw_ptr, all_11, tl.sum(dwa_HJ, 0)[None, :], tl.sum(dwb_HJ, 0)[None, :], K, P, HALF, 1, BLOCK_J)


@jit
def _qk_norm_rope_rows(q_ptr, k_ptr, qin_ptr, kin_ptr, wq_ptr, wk_ptr, qout_ptr, kout_ptr, dw_ptr, cos_ptr, sin_ptr,
                       q_b, q_t, q_h, k_b, k_t, k_h, angle_b, M, T, H, G, eps, K: tl.constexpr, P: tl.constexpr,
                       NORM: tl.constexpr, BACK: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr):
    # grid (programs, blocks of query heads, then of key heads): each strides over the tokens, whose heads lie side by side and
    # find their cos and sin in cache. What comes in comes with its strides, so that views of wider rows are not copied. The
    # way back is the same turn by the opposite angle, the norm behind it and the gains' gradients in registers
    block, q_blocks = tl.program_id(1), tl.cdiv(H, BLOCK_H)
    dw_ptr += (tl.program_id(0) * tl.num_programs(1) + block) * K
    if block < q_blocks:
        _heads(q_ptr, qin_ptr, wq_ptr, qout_ptr, dw_ptr, cos_ptr, sin_ptr, q_b, q_t, q_h, angle_b, M, T, H, block, eps,
               K, P, NORM, BACK, HALF, BLOCK_H, BLOCK_J)
    else:
        _heads(k_ptr, kin_ptr, wk_ptr, kout_ptr, dw_ptr, cos_ptr, sin_ptr, k_b, k_t, k_h, angle_b, M, T, G, block - q_blocks, eps,
               K, P, NORM, BACK, HALF, BLOCK_H, BLOCK_J)


def _launch_heads(q_in, k_in, q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, layout, eps, back):
    """The kernel on (q, k), or back on (dq, dk): two tensors of their shapes, and the sums for both gains."""
    q_in, k_in = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_in, k_in))
    (B, T, H, K), G, P, norm = q_in.shape, k_in.shape[2], cos.shape[-1], q_gain_K is not None
    BLOCK_H = min(triton.next_power_of_2(max(H, G)), max(1, 2048 // triton.next_power_of_2(K)))      # about 2,048 numbers a program
    blocks, sums = (triton.cdiv(H, BLOCK_H), triton.cdiv(G, BLOCK_H)), norm and back
    programs = sharing_programs(q_in, B * T) if sums else B * T
    q_out, k_out = q_in.new_empty(q_in.shape), k_in.new_empty(k_in.shape)
    part_CJK = torch.empty(programs * sums, sum(blocks), K, device=q_in.device, dtype=torch.float32)
    _qk_norm_rope_rows[(programs, sum(blocks))](
        *(x.contiguous() if sums else q_in for x in (q_BTHK, k_BTGK)), q_in, k_in,
        *((q_gain_K, k_gain_K) if norm else (q_in, k_in)),
        q_out, k_out, part_CJK, cos, sin, *q_in.stride()[:3], *k_in.stride()[:3], cos.stride(0) if len(cos) > 1 else 0,
        B * T, T, H, G, eps, K=K, P=P, NORM=norm, BACK=back, HALF=layout == "half", BLOCK_H=BLOCK_H,
        BLOCK_J=triton.next_power_of_2(K // 2))
    return q_out, k_out, *(part.sum((0, 1)) for part in part_CJK.split(blocks, 1))


@torch.library.custom_op("flatlm::qk_norm_rope", mutates_args=())
def _qk_norm_rope(q_BTHK: torch.Tensor, k_BTGK: torch.Tensor, q_gain_K: torch.Tensor | None, k_gain_K: torch.Tensor | None,
                  cos: torch.Tensor, sin: torch.Tensor, layout: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    if takes_triton(q_BTHK):
        return _launch_heads(q_BTHK, k_BTGK, None, None, q_gain_K, k_gain_K, cos, sin, layout, eps, False)[:2]
    return tuple(y.contiguous() for y in qk_norm_rope_ref(q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, layout, eps))


@_qk_norm_rope.register_fake
def _(q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, layout, eps):
    return q_BTHK.new_empty(q_BTHK.shape), k_BTGK.new_empty(k_BTGK.shape)


def _head_norm_backward(dy_BTHK, x_BTHK, w_K, eps):
    x_MK = x_BTHK.reshape(-1, x_BTHK.shape[-1])
    dx_MK, dw_K = _rmsnorm_backward(dy_BTHK.view(x_MK.shape), None, x_MK, w_K, _rmsnorm(x_MK, None, w_K, eps, x_MK.dtype)[2])
    return dx_MK.view(dy_BTHK.shape), dw_K


@torch.library.custom_op("flatlm::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(dq_BTHK: torch.Tensor, dk_BTGK: torch.Tensor, q_BTHK: torch.Tensor | None, k_BTGK: torch.Tensor | None,
                           q_gain_K: torch.Tensor | None, k_gain_K: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
                           layout: str, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, and the gradients of both gains (empty without them)."""
    if takes_triton(dq_BTHK):
        dq_BTHK, dk_BTGK, *gains = _launch_heads(dq_BTHK, dk_BTGK, q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, layout, eps, True)
    else:
        gains = [None, None]
        dq_BTHK, dk_BTGK = (rope_ref(d, cos, -sin, layout).contiguous() for d in (dq_BTHK, dk_BTGK))
        if q_gain_K is not None:
            dq_BTHK, gains[0] = _head_norm_backward(dq_BTHK, q_BTHK, q_gain_K, eps)
            dk_BTGK, gains[1] = _head_norm_backward(dk_BTGK, k_BTGK, k_gain_K, eps)
    return dq_BTHK, dk_BTGK, *(dq_BTHK.new_empty(0) if w is None else dw.to(w.dtype) for w, dw in zip((q_gain_K, k_gain_K), gains))


@_qk_norm_rope_backward.register_fake
def _(dq_BTHK, dk_BTGK, q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, layout, eps):
    gain = lambda gain_K: dq_BTHK.new_empty(0) if gain_K is None else torch.empty_like(gain_K)
    return dq_BTHK.new_empty(dq_BTHK.shape), dk_BTGK.new_empty(dk_BTGK.shape), gain(q_gain_K), gain(k_gain_K)


def _qk_norm_rope_save(ctx, inputs, output):
    q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, ctx.layout, ctx.eps = inputs
    kept = (None, None) if q_gain_K is None else (q_BTHK, k_BTGK)        # turning back needs the angles alone
    ctx.save_for_backward(*kept, q_gain_K, k_gain_K, cos, sin)


def _qk_norm_rope_grad(ctx, dq_BTHK, dk_BTGK):
    dq, dk, dwq_K, dwk_K = _qk_norm_rope_backward(dq_BTHK, dk_BTGK, *ctx.saved_tensors, ctx.layout, ctx.eps)
    gains = (None, None) if ctx.saved_tensors[2] is None else (dwq_K, dwk_K)
    return dq, dk, *gains, None, None, None, None


_qk_norm_rope.register_autograd(_qk_norm_rope_grad, setup_context=_qk_norm_rope_save)


def qk_norm_rope(q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, layout="half", eps=1e-6):
    """The value of qk_norm_rope_ref, in one launch. Without triton (and for heads of odd width) torch's own ops turn the heads:
    they keep no more than the kernel does."""
    if takes_triton(q_BTHK) and q_BTHK.shape[-1] % 2 == 0:
        return _qk_norm_rope(q_BTHK, k_BTGK, q_gain_K, k_gain_K, cos, sin, layout, eps)
    if q_gain_K is not None:
        q_BTHK, k_BTGK = rmsnorm(q_BTHK, q_gain_K, eps), rmsnorm(k_BTGK, k_gain_K, eps)
    return rope_ref(q_BTHK, cos, sin, layout), rope_ref(k_BTGK, cos, sin, layout)


# ---- gated (which of an MLP's hidden channels pass?) ----

aten = torch.ops.aten

GATES = {                          # kind: (act, d act(gate) / d gate times d); the kinds are the gated ones of --act
    "glu": (torch.sigmoid, lambda d, gate, act: aten.sigmoid_backward(d, act)),
    "bilinear": (lambda gate: gate, lambda d, gate, act: d),
    "reglu": (F.relu, lambda d, gate, act: aten.threshold_backward(d, gate, 0)),
    "geglu": (F.gelu, lambda d, gate, act: aten.gelu_backward(d, gate)),
    "geglu_tanh": (lambda gate: F.gelu(gate, approximate="tanh"),
                   lambda d, gate, act: aten.gelu_backward(d, gate, approximate="tanh")),
    "swiglu": (F.silu, lambda d, gate, act: aten.silu_backward(d, gate)),
}


def gated_ref(gate, up, kind):
    """act(gate) * up, elementwise.                                                                      [GLU eq 6]"""
    return GATES[kind][0](gate) * up


@jit
def _act(x, KIND: tl.constexpr):
    # act(x) and its derivative; 0.5 (1 + tanh z) is sigmoid(2z)
    if KIND == "glu":
        s = tl.sigmoid(x)
        return s, s * (1 - s)
    elif KIND == "bilinear":
        return x, x * 0 + 1
    elif KIND == "reglu":
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    elif KIND == "geglu":
        phi = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * phi, phi + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "geglu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))              # 2 sqrt(2 / pi)
        return x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))


@jit
def _gated_fwd(gate_ptr, up_ptr, y_ptr, N, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    # grid (blocks of the flattened tensor,)
    at_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_N = tl.load(gate_ptr + at_N, mask=at_N < N, other=0.0).to(tl.float32)
    up_N = tl.load(up_ptr + at_N, mask=at_N < N, other=0.0).to(tl.float32)
    act_N, _ = _act(gate_N, KIND)
    tl.store(y_ptr + at_N, act_N * up_N, mask=at_N < N)


@jit
def _gated_bwd(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    at_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dy_N = tl.load(dy_ptr + at_N, mask=at_N < N, other=0.0).to(tl.float32)
    gate_N = tl.load(gate_ptr + at_N, mask=at_N < N, other=0.0).to(tl.float32)
    up_N = tl.load(up_ptr + at_N, mask=at_N < N, other=0.0).to(tl.float32)
    act_N, slope_N = _act(gate_N, KIND)             # made again: arithmetic hides behind the loads, keeping it would not
    tl.store(dgate_ptr + at_N, dy_N * up_N * slope_N, mask=at_N < N)
    tl.store(dup_ptr + at_N, dy_N * act_N, mask=at_N < N)


def in_cache(*tensors):
    """The flattened tensors a megabyte at a time, so that what one op writes the next still finds in cache."""
    return zip(*(t.view(-1).split(1 << 18) for t in tensors))


@torch.library.custom_op("flatlm::gated", mutates_args=())
def _gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    y = torch.empty_like(gate)
    if takes_triton(gate):
        _gated_fwd[(triton.cdiv(gate.numel(), 2048),)](gate, up, y, gate.numel(), KIND=kind, BLOCK_N=2048)
        return y
    for gate_N, up_N, y_N in in_cache(gate, up, y):
        torch.mul(GATES[kind][0](gate_N), up_N, out=y_N)
    return y


@_gated.register_fake
def _(gate, up, kind):
    return torch.empty_like(gate)


@torch.library.custom_op("flatlm::gated_backward", mutates_args=())
def _gated_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    dy, dgate, dup = dy.contiguous(), torch.empty_like(gate), torch.empty_like(up)
    if takes_triton(gate):
        _gated_bwd[(triton.cdiv(gate.numel(), 2048),)](dy, gate, up, dgate, dup, gate.numel(), KIND=kind, BLOCK_N=2048)
        return dgate, dup
    act, back = GATES[kind]
    for dy_N, gate_N, up_N, dgate_N, dup_N in in_cache(dy, gate, up, dgate, dup):
        act_N = act(gate_N)
        torch.mul(dy_N, act_N, out=dup_N)
        dgate_N.copy_(back(dy_N * up_N, gate_N, act_N))
    return dgate, dup


@_gated_backward.register_fake
def _(dy, gate, up, kind):
    return torch.empty_like(gate), torch.empty_like(up)


def _gated_save(ctx, inputs, output):
    ctx.kind = inputs[2]
    ctx.save_for_backward(*inputs[:2])


def _gated_grad(ctx, dy):
    return *_gated_backward(dy, *ctx.saved_tensors, ctx.kind), None


_gated.register_autograd(_gated_grad, setup_context=_gated_save)


def gated(gate, up, kind):
    """act(gate) * up, the value of gated_ref, which keeps gate and up alone for backward. In half precision on a CPU making
    act(gate) again costs more time than the bytes it saves, so there, and compiled without triton, this is the reference."""
    if not takes_triton(gate) and (torch.compiler.is_compiling() or gate.element_size() < 4):
        return gated_ref(gate, up, kind)
    return _gated(gate.contiguous(), up.contiguous(), kind)


def bench_rows(device, dtype, quick):
    """A Case of each row kernel at the widths of 124M, 1.3B and 8B models, 16K tokens on a GPU."""
    try:
        import liger_kernel.transformers.functional as liger
    except ImportError:
        liger = None
    torch.manual_seed(0)
    gpu, draw = device == "cuda", lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    M = 16384 if gpu else 1024
    for D, K in ((384, 64),) if not gpu else ((2048, 128),) if quick else ((768, 64), (2048, 128), (4096, 128)):
        H, N, w_D, w_K = D // K, D * 8 // 3 // 32 * 32, torch.ones(D, device=device), torch.ones(K, device=device)
        angle = torch.arange(M, device=device)[None, :, None, None] * 1e-4 ** (torch.arange(K // 2, device=device) / K * 2)
        cos, sin = angle.cos().repeat(1, 1, 1, 2).to(dtype), torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)
        bare = lambda f: lambda q, k, cos, sin: f(q, k, None, None, cos, sin)
        gate = lambda f: lambda gate, up: f(gate, up, "swiglu")
        heads, hidden = [draw(1, M, H, K), draw(1, M, H, K)], [draw(M, N), draw(M, N)]
        # what moves forward and back, in tensors of the first leaf's size
        table = [("rmsnorm", rmsnorm, rmsnorm_ref, [draw(M, D), w_D], (), 2, 3,
                  lambda x, w: liger.liger_rms_norm(x, w, 1e-6, in_place=False)),
                 ("add_rmsnorm", add_rmsnorm, add_rmsnorm_ref, [draw(M, D), draw(M, D), w_D], (), 4, 4,
                  lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, 1e-6, in_place=False)),
                 ("qk_rope", bare(qk_norm_rope), bare(qk_norm_rope_ref), heads, (cos, sin), 4, 4, lambda q, k, cos, sin: tuple(
                     x.transpose(1, 2) for x in liger.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos[:, :, 0],
                                                              sin[:, :, 0, K // 2:].repeat(1, 1, 2)))),
                 ("qk_norm_rope", qk_norm_rope, qk_norm_rope_ref, [*heads, w_K, w_K.clone()], (cos, sin), 4, 6, None),
                 ("gated", gate(gated), gate(gated_ref), hidden, (), 3, 5, lambda gate, up: liger.liger_swiglu(gate, up))]
        for name, ours, ref, leaves, rest, forward, back, theirs in table:
            peers = dict(torch=ref if name != "rmsnorm" else lambda x, w: F.rms_norm(x, w.shape, w.to(x.dtype), 1e-6))
            peers |= dict(compile=torch.compile(ref)) if gpu else {}
            peers |= dict(liger=theirs) if liger and gpu and theirs else {}
            size = leaves[0].nbytes
            shape = "x".join(map(str, leaves[0].shape))
            yield Case(name, shape, ours, ref, peers, leaves, rest, (0, 0), (forward * size, back * size))


# ---- Start-up (what should a run that compiles nothing not wait for?) ----

def skip_dynamo():
    """torch's optimizers and custom ops import torch.compile's machinery at their first call, a second or two, only to tell
    it to leave them alone. In a run that compiles nothing there is nobody to tell: mark these functions as told, and take
    the wrapper that imports it off AdamW's step."""
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer = torch.optim.Optimizer
    told = [optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict]
    for op in (_rmsnorm, _rmsnorm_backward, _linear_cross_entropy, _qk_norm_rope, _qk_norm_rope_backward, _gated, _gated_backward):
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
