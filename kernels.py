"""Kernels: which loops are worth writing by hand?

A step of training is matrix products, which the libraries do well, and everything between them, which moves bytes.
A kernel here exists where fewer bytes move than in any chain of library calls, and each stands beside a plain PyTorch
reference with the same signature, which is its definition and its test; without Triton torch's own ops compute it.

    rmsnorm               y_i = x_i w_i / sqrt(mean_j x_j^2 + eps)            x is read once, one float a row is kept  [RMS eq 4]
    linear_cross_entropy  sum_m weight_m (log sum_v exp(l_mv) - l_m,target)   with l = x w^T, and l never stored:
                          d/dl_mv = weight_m (softmax(l)_mv - [v = target])   a chunk of rows at a time, gradient included
    moe_mlp               y_m = sum_a gate_ma MLP_{expert_ma}(x_m)            rows fetched by index, never copied in order

Every op is a torch.library custom op with a fake and an autograd formula, so that eager mode, torch.compile(fullgraph)
and Triton's interpreter (TRITON_INTERPRET=1, which needs no GPU) all run it.

Contents:    dispatch | rmsnorm | linear_cross_entropy | moe_mlp | start-up | demo and bench
Shapes:      M rows (B T flattened), D n_embd, V vocab; in moe_mlp E experts, A active experts, V visits (M A), F d_expert
References:
    [RMS]    Root Mean Square Layer Normalization, arXiv:1910.07467
    [DSV3]   DeepSeek-V3 Technical Report, arXiv:2412.19437
    [Liger]  Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989
Run me:      python kernels.py             (errors of every op against float64)
             python kernels.py --bench     (times beside PyTorch's own, on this device)
"""
import functools
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


INTERP = tl.constexpr(INTERPRET) if triton else INTERPRET   # a kernel may read it


@jit
def _dot(a, b):
    # the interpreter multiplies bfloat16 wrongly without a word; float32 inputs are not rounded to tf32
    if INTERP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


Case = namedtuple("Case", "name shape ours ref peers leaves rest flops bytes")

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
    """Does triton run on x, a tensor or the device of one?"""
    return _choice == "triton" or _choice == "auto" and triton is not None and getattr(x, "device", x).type == "cuda"


def no_autocast(x):
    """Ops choose their own precision; autocast must not choose again inside them."""
    return torch.autocast(x.device.type, enabled=False)


def to_autocast(x):
    """x in autocast's type where that is on: one cast here instead of one in each product that reads x."""
    on = torch.is_autocast_enabled(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if on and x.dtype == torch.float32 else x


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


# ---- moe_mlp (each row through its experts, without a sorted copy of the rows) ----

def moe_mlp_ref(x_MD, visit_V, count_E, gate_MA, w_gate_EFD, w_up_EFD, w_down_EDF):
    """sum_a gate_ma MLP_{e(m, a)}(x_m): [M, D] in the wider type of x and the gates. visit_V lists places in the flattened [M, A]
    sorted by expert, count_E of them for each; a visit that is not listed adds nothing.                           [DSV3 eq 12]"""
    y_MD, A = torch.zeros_like(x_MD, dtype=torch.promote_types(x_MD.dtype, gate_MA.dtype)), gate_MA.shape[1]
    for visit_C, *weights in zip(visit_V.split(count_E.tolist()), w_gate_EFD, w_up_EFD, w_down_EDF):
        w_gate_FD, w_up_FD, w_down_DF = (w.to(x_MD.dtype) for w in weights)
        x_CD = x_MD[visit_C // A]
        h_CF = F.silu(x_CD @ w_gate_FD.T) * (x_CD @ w_up_FD.T)
        y_MD = y_MD.index_add(0, visit_C // A, gate_MA.flatten()[visit_C, None] * (h_CF @ w_down_DF.T))
    return y_MD


@jit
def _moe_tile(first_ptr, E, width, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    # program -> expert, block of columns and the columns, sorted rows of the expert's tile, which of them it has. Grids are
    # (tiles * blocks,), so that the blocks of a tile run side by side and find its rows in cache, with as many tiles as there
    # may be, however the visits fall: for those behind the last the expert is E, and there is nothing to do
    tile, block = tl.program_id(0) // tl.cdiv(width, BLOCK_N), tl.program_id(0) % tl.cdiv(width, BLOCK_N)
    e_E = tl.arange(0, BLOCK_E)
    next_E = tl.load(first_ptr + E + 2 + e_E, mask=e_E < E, other=2147483647)           # the tile that begins the next expert
    expert = tl.sum((next_E <= tile).to(tl.int32), 0)
    row_R = tl.load(first_ptr + expert) + (tile - tl.load(first_ptr + E + 1 + expert)) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep_R = row_R < tl.load(first_ptr + expert + 1)
    return expert.to(tl.int64), block, block * BLOCK_N + tl.arange(0, BLOCK_N), row_R.to(tl.int64), keep_R


@jit
def _moe_up(x_ptr, visit_ptr, first_ptr, gate_ptr, w_gate_ptr, w_up_ptr, g_ptr, u_ptr, h_ptr, E, A, D, F, KEEP: tl.constexpr,
            BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr):
    # grid (tiles * F blocks,): rows of x are fetched by index, once for both products, and gate * silu(g) * u is taken while
    # g and u are still in registers (the gate here: it is linear, so the product with w_down may follow it)
    D, F = D // ALIGN * ALIGN, F // ALIGN * ALIGN   # themselves, seen to be multiples: rows then load in whole vectors
    expert, _, col_F, row_R, keep_R = _moe_tile(first_ptr, E, F, BLOCK_R, BLOCK_F, BLOCK_E)
    if expert == E:
        return
    visit_R = tl.load(visit_ptr + row_R, mask=keep_R, other=0)
    x_R = x_ptr + (visit_R // A).to(tl.int64) * D
    w_F = expert * F * D + col_F * D
    g_RF = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
    u_RF = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        keep_DF = (col_D[:, None] < D) & (col_F[None, :] < F)
        x_RD = tl.load(x_R[:, None] + col_D[None, :], mask=keep_R[:, None] & (col_D[None, :] < D), other=0.0)
        w_DF = w_F[None, :] + col_D[:, None]
        g_RF += _dot(x_RD, tl.load(w_gate_ptr + w_DF, mask=keep_DF, other=0.0))
        u_RF += _dot(x_RD, tl.load(w_up_ptr + w_DF, mask=keep_DF, other=0.0))
    gate_R = tl.load(gate_ptr + visit_R, mask=keep_R, other=0.0).to(tl.float32)
    keep_RF, at_RF = keep_R[:, None] & (col_F[None, :] < F), row_R[:, None] * F + col_F[None, :]
    tl.store(h_ptr + at_RF, g_RF * tl.sigmoid(g_RF) * u_RF * gate_R[:, None], mask=keep_RF)
    if KEEP:                                        # for backward: 4 F bytes a visit in bfloat16, where to multiply again
        tl.store(g_ptr + at_RF, g_RF, mask=keep_RF)                     # would cost 2/9 more of all products
        tl.store(u_ptr + at_RF, u_RF, mask=keep_RF)


@jit
def _moe_scatter(a_ptr, a2_ptr, w_ptr, w2_ptr, slot_ptr, visit_ptr, first_ptr, E, I, O, TWO: tl.constexpr,
                 BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr):
    # grid (tiles * O blocks,): sorted rows, each written to its visit's own slot. Forward: y = h w_down^T of w_down[e] [O, I];
    # backward, with TWO: dx = dg w_gate + du w_up of matrices [I, O]
    I, O = I // ALIGN * ALIGN, O // ALIGN * ALIGN
    expert, _, col_O, row_R, keep_R = _moe_tile(first_ptr, E, O, BLOCK_R, BLOCK_O, BLOCK_E)
    if expert == E:
        return
    y_RO = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
    for part in tl.static_range(1 + TWO):
        for start in range(0, I, BLOCK_I):
            col_I = start + tl.arange(0, BLOCK_I)
            keep_IO = (col_I[:, None] < I) & (col_O[None, :] < O)
            at_IO = col_I[:, None] * (O if TWO else 1) + col_O[None, :] * (1 if TWO else I)
            at_RI, keep_RI = row_R[:, None] * I + col_I[None, :], keep_R[:, None] & (col_I[None, :] < I)
            a_RI = tl.load((a2_ptr if part else a_ptr) + at_RI, mask=keep_RI, other=0.0)
            w_IO = tl.load((w2_ptr if part else w_ptr) + expert * I * O + at_IO, mask=keep_IO, other=0.0)
            y_RO += _dot(a_RI, w_IO)
    slot_R = tl.load(visit_ptr + row_R, mask=keep_R, other=0).to(tl.int64)
    tl.store(slot_ptr + slot_R[:, None] * O + col_O[None, :], y_RO, mask=keep_R[:, None] & (col_O[None, :] < O))


@jit
def _moe_sum(slot_ptr, y_ptr, M, A, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    # grid (rows, columns): a row adds its own A slots in their order, whoever else is in the batch
    row_M = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    keep_MD = (row_M[:, None] < M) & (col_D[None, :] < D)
    y_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for a in range(A):
        y_MD += tl.load(slot_ptr + (row_M[:, None] * A + a) * D + col_D[None, :], mask=keep_MD, other=0.0).to(tl.float32)
    tl.store(y_ptr + row_M[:, None] * D + col_D[None, :], y_MD, mask=keep_MD)


@jit
def _moe_dh(dy_ptr, visit_ptr, first_ptr, gate_ptr, w_down_ptr, g_ptr, u_ptr, h_ptr, dg_ptr, du_ptr, part_ptr, E, M, A, D, F,
            BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr):
    # grid as _moe_up's. dh = dy w_down never leaves the registers: from it come dg, du, and the gate's gradient
    # dy . MLP(x) = dh . h, of which each block keeps its part; h with its gate is computed again for the gradient of w_down
    D, F = D // ALIGN * ALIGN, F // ALIGN * ALIGN
    expert, block, col_F, row_R, keep_R = _moe_tile(first_ptr, E, F, BLOCK_R, BLOCK_F, BLOCK_E)
    if expert == E:
        return
    visit_R = tl.load(visit_ptr + row_R, mask=keep_R, other=0)
    dy_R = dy_ptr + (visit_R // A).to(tl.int64) * D
    w_F = expert * F * D + col_F
    dh_RF = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        dy_RD = tl.load(dy_R[:, None] + col_D[None, :], mask=keep_R[:, None] & (col_D[None, :] < D), other=0.0)
        w_DF = tl.load(w_down_ptr + w_F[None, :] + col_D[:, None] * F, mask=(col_D[:, None] < D) & (col_F[None, :] < F), other=0.0)
        dh_RF += _dot(dy_RD, w_DF)
    keep_RF, at_RF = keep_R[:, None] & (col_F[None, :] < F), row_R[:, None] * F + col_F[None, :]
    g_RF = tl.load(g_ptr + at_RF, mask=keep_RF, other=0.0).to(tl.float32)
    u_RF = tl.load(u_ptr + at_RF, mask=keep_RF, other=0.0).to(tl.float32)
    s_RF = tl.sigmoid(g_RF)
    h_RF = g_RF * s_RF * u_RF
    gate_R1 = tl.load(gate_ptr + visit_R, mask=keep_R, other=0.0).to(tl.float32)[:, None]
    tl.store(part_ptr + block.to(tl.int64) * M * A + visit_R, tl.sum(dh_RF * h_RF, 1), mask=keep_R)
    tl.store(h_ptr + at_RF, h_RF * gate_R1, mask=keep_RF)
    tl.store(du_ptr + at_RF, dh_RF * gate_R1 * g_RF * s_RF, mask=keep_RF)
    dg_RF = dh_RF * gate_R1 * u_RF * s_RF * (1 + g_RF * (1 - s_RF))     # silu'(g) = s (1 + g (1 - s))
    tl.store(dg_ptr + at_RF, dg_RF, mask=keep_RF)


@jit
def _moe_dw(a_ptr, a2_ptr, x_ptr, visit_ptr, first_ptr, dw_ptr, dw2_ptr, A, D, F, TWO: tl.constexpr,
            BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    # grid (E * F blocks * D blocks,): one tile of one expert's dw = a^T x (and a2^T x) runs over all rows of that expert, in
    # their order; an expert without rows writes zeros. With TWO dw_gate and dw_up [F, D], else dw_down [D, F] with dy for x
    D, F = D // ALIGN * ALIGN, F // ALIGN * ALIGN
    block, blocks_D, blocks_F = tl.program_id(0), tl.cdiv(D, BLOCK_D), tl.cdiv(F, BLOCK_F)
    col_D = block % blocks_D * BLOCK_D + tl.arange(0, BLOCK_D)
    col_F = block // blocks_D % blocks_F * BLOCK_F + tl.arange(0, BLOCK_F)
    expert = block // (blocks_D * blocks_F)
    end = tl.load(first_ptr + expert + 1)
    dw_FD = tl.zeros([BLOCK_F, BLOCK_D], dtype=tl.float32)
    dw2_FD = tl.zeros([BLOCK_F, BLOCK_D], dtype=tl.float32)
    for start in range(tl.load(first_ptr + expert), end, BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        keep_RF = (row_R[:, None] < end) & (col_F[None, :] < F)
        x_R = tl.load(visit_ptr + row_R, mask=row_R < end, other=0).to(tl.int64) // A * D
        x_RD = tl.load(x_ptr + x_R[:, None] + col_D[None, :], mask=(row_R[:, None] < end) & (col_D[None, :] < D), other=0.0)
        at_RF = row_R.to(tl.int64)[:, None] * F + col_F[None, :]
        dw_FD += _dot(tl.trans(tl.load(a_ptr + at_RF, mask=keep_RF, other=0.0)), x_RD)
        if TWO:
            dw2_FD += _dot(tl.trans(tl.load(a2_ptr + at_RF, mask=keep_RF, other=0.0)), x_RD)
    at_FD = expert.to(tl.int64) * F * D + col_F[:, None] * (D if TWO else 1) + col_D[None, :] * (1 if TWO else F)
    keep_FD = (col_F[:, None] < F) & (col_D[None, :] < D)
    tl.store(dw_ptr + at_FD, dw_FD, mask=keep_FD)
    if TWO:
        tl.store(dw2_ptr + at_FD, dw2_FD, mask=keep_FD)


def _moe_launch(x_MD, w_gate_EFD, V):
    """-> (rows, columns, depth) of a product's block, the most tiles of rows there can be, and what every product is told."""
    E, width, D = w_gate_EFD.shape
    R, N, K, warps = (128, 128, 64, 8) if x_MD.element_size() == 2 else (64, 64, 32, 4)
    align = 8 if D % 8 == width % 8 == 0 else 1
    return (R, N, K), (V + E * (R - 1)) // R, dict(num_warps=warps, num_stages=3, ALIGN=align)


@torch.library.custom_op("flatlm::moe_mlp", mutates_args=())
def _moe_mlp(x_MD: torch.Tensor, visit_V: torch.Tensor, count_E: torch.Tensor, gate_MA: torch.Tensor, w_gate_EFD: torch.Tensor,
             w_up_EFD: torch.Tensor, w_down_EDF: torch.Tensor, grad: bool,
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y, where each expert's visits and tiles begin, and for backward (empty without `grad`) g and u of the sorted visits."""
    (M, A), (E, width, D), V = gate_MA.shape, w_gate_EFD.shape, len(visit_V)
    (R, N, K), tiles, run = _moe_launch(x_MD, w_gate_EFD, V)
    run |= dict(BLOCK_R=R, BLOCK_E=triton.next_power_of_2(E))
    first_2E = F.pad(torch.stack([count_E, (count_E + R - 1) // R]).cumsum(1, dtype=torch.int32), (1, 0))
    w_gate_EFD, w_up_EFD, w_down_EDF = (w.to(x_MD.dtype) for w in (w_gate_EFD, w_up_EFD, w_down_EDF))
    g_VF, u_VF = (x_MD.new_empty(V if grad else 0, width) for _ in range(2))
    h_VF, slot_MAD = x_MD.new_empty(V, width), (x_MD.new_empty if V == M * A else x_MD.new_zeros)(M, A, D)
    y_MD = torch.empty_like(x_MD, dtype=torch.promote_types(x_MD.dtype, gate_MA.dtype))
    _moe_up[(tiles * triton.cdiv(width, N),)](x_MD, visit_V, first_2E, gate_MA, w_gate_EFD, w_up_EFD, g_VF, u_VF, h_VF, E, A, D,
                                              width, KEEP=grad, BLOCK_F=N, BLOCK_D=K, **run)
    _moe_scatter[(tiles * triton.cdiv(D, N),)](h_VF, h_VF, w_down_EDF, w_down_EDF, slot_MAD, visit_V, first_2E, E, width, D,
                                               TWO=False, BLOCK_I=K, BLOCK_O=N, **run)
    _moe_sum[(triton.cdiv(M, 8), triton.cdiv(D, 256))](slot_MAD, y_MD, M, A, D, BLOCK_M=8, BLOCK_D=256)
    return y_MD, first_2E, g_VF, u_VF


@_moe_mlp.register_fake
def _(x_MD, visit_V, count_E, gate_MA, w_gate_EFD, w_up_EFD, w_down_EDF, grad):
    g_VF, u_VF = (x_MD.new_empty(len(visit_V) if grad else 0, w_gate_EFD.shape[1]) for _ in range(2))
    y_MD = torch.empty_like(x_MD, dtype=torch.promote_types(x_MD.dtype, gate_MA.dtype))
    return y_MD, count_E.new_empty(2, len(count_E) + 1, dtype=torch.int32), g_VF, u_VF


@torch.library.custom_op("flatlm::moe_mlp_backward", mutates_args=())
def _moe_mlp_backward(dy_MD: torch.Tensor, x_MD: torch.Tensor, visit_V: torch.Tensor, gate_MA: torch.Tensor,
                      w_gate_EFD: torch.Tensor, w_up_EFD: torch.Tensor, w_down_EDF: torch.Tensor, first_2E: torch.Tensor,
                      g_VF: torch.Tensor, u_VF: torch.Tensor,
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (M, A), (E, width, D), V = gate_MA.shape, w_gate_EFD.shape, len(visit_V)
    (R, N, K), tiles, run = _moe_launch(x_MD, w_gate_EFD, V)
    tiled, blocks_F, blocks_D = run | dict(BLOCK_R=R, BLOCK_E=triton.next_power_of_2(E)), triton.cdiv(width, N), triton.cdiv(D, N)
    half, halves_F = N // 2, triton.cdiv(width, N // 2)          # _moe_dh holds five blocks in registers: wider ones spill
    new = x_MD.new_empty if V == M * A else x_MD.new_zeros       # a dropped visit writes nothing
    part_BMA, slot_MAD, dx_MD = new(halves_F, M, A, dtype=torch.float32), new(M, A, D), torch.empty_like(x_MD)
    h_VF, dg_VF, du_VF = (torch.empty_like(g_VF) for _ in range(3))
    dw_gate_EFD, dw_up_EFD, dw_down_EDF = (torch.empty_like(w) for w in (w_gate_EFD, w_up_EFD, w_down_EDF))
    w_gate_EFD, w_up_EFD, w_down_EDF = (w.to(x_MD.dtype) for w in (w_gate_EFD, w_up_EFD, w_down_EDF))
    dy_MD = dy_MD.to(x_MD.dtype).contiguous()
    _moe_dh[(tiles * halves_F,)](dy_MD, visit_V, first_2E, gate_MA, w_down_EDF, g_VF, u_VF, h_VF, dg_VF, du_VF, part_BMA, E, M, A,
                                 D, width, BLOCK_F=half, BLOCK_D=K, **tiled)
    for two, a_VF, a2_VF, b_MD, dw, dw2 in ((False, h_VF, h_VF, dy_MD, dw_down_EDF, dw_down_EDF),
                                            (True, dg_VF, du_VF, x_MD, dw_gate_EFD, dw_up_EFD)):
        _moe_dw[(E * blocks_F * blocks_D,)](a_VF, a2_VF, b_MD, visit_V, first_2E, dw, dw2, A, D, width, TWO=two,
                                            BLOCK_R=K, BLOCK_F=N, BLOCK_D=N, **run)
    _moe_scatter[(tiles * blocks_D,)](dg_VF, du_VF, w_gate_EFD, w_up_EFD, slot_MAD, visit_V, first_2E, E, width, D,
                                      TWO=True, BLOCK_I=K, BLOCK_O=N, **tiled)
    _moe_sum[(triton.cdiv(M, 8), triton.cdiv(D, 256))](slot_MAD, dx_MD, M, A, D, BLOCK_M=8, BLOCK_D=256)
    return dx_MD, part_BMA.sum(0).to(gate_MA.dtype), dw_gate_EFD, dw_up_EFD, dw_down_EDF


@_moe_mlp_backward.register_fake
def _(dy_MD, x_MD, visit_V, *leaves):
    return tuple(torch.empty_like(t) for t in (x_MD, *leaves[:4]))


def _moe_mlp_save(ctx, inputs, output):
    x_MD, visit_V, _, *leaves, _ = inputs
    ctx.save_for_backward(x_MD, visit_V, *leaves, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)                             # or backward would be handed zeros as large as g and u


def _moe_mlp_grad(ctx, dy_MD, *_):
    dx_MD, *rest = _moe_mlp_backward(dy_MD, *ctx.saved_tensors)
    return dx_MD, None, None, *rest, None


_moe_mlp.register_autograd(_moe_mlp_grad, setup_context=_moe_mlp_save)


def moe_mlp(x_MD, visit_V, count_E, gate_MA, w_gate_EFD, w_up_EFD, w_down_EDF):
    """Same signature and value as moe_mlp_ref, which it is where triton does not run. Products are in x's type (autocast's, where
    that is on), gradients in the type of their tensors. Rows that came sorted are the case A = 1, visit_V = 0, 1, 2, ..."""
    x_MD = to_autocast(x_MD)
    if not takes_triton(x_MD) or x_MD.dtype == torch.float64:
        with no_autocast(x_MD):
            return moe_mlp_ref(x_MD, visit_V, count_E, gate_MA, w_gate_EFD, w_up_EFD, w_down_EDF)
    x_MD, *leaves = (leaf.contiguous() for leaf in (x_MD, gate_MA, w_gate_EFD, w_up_EFD, w_down_EDF))
    grad = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (x_MD, *leaves))
    return _moe_mlp(x_MD, visit_V.to(torch.int32), count_E, *leaves, grad)[0]


def bench_moe(device, dtype, quick):
    """A layer of 8 experts on a CPU; on a GPU of 128 and 64 fine ones. FLOPs: three products of 2 D F a visit, twice that backward;
    bytes: weights once each way and their gradients, rows in and out, and what a visit keeps of g, u and h."""
    large = [(32768, 2048, 768, 128, 8), (16384, 2048, 1408, 64, 6)]
    for M, D, width, E, A in [(256, 64, 48, 8, 2)] if device == "cpu" else large[:1 if quick else 2]:
        torch.manual_seed(0)
        expert_MA = torch.rand(M, E, device=device).topk(A).indices
        visit_V, count_E = expert_MA.flatten().sort(stable=True).indices, torch.bincount(expert_MA.flatten(), minlength=E)
        leaves = [torch.randn(M, D, device=device, dtype=dtype), torch.rand(M, A, device=device)]
        leaves += [torch.randn(s, device=device, dtype=dtype) / s[2]**0.5 for s in ((E, width, D), (E, width, D), (E, D, width))]

        def ours(x_MD, *rest, op=moe_mlp):
            return op(x_MD, visit_V, count_E, *rest)

        def grouped(x_MD, gate_MA, w_gate_EFD, w_up_EFD, w_down_EDF):
            product = lambda rows, w: F.grouped_mm(rows, w.mT, offs=count_E.cumsum(0).to(torch.int32))
            x_VD = x_MD[visit_V // A]
            out_VD = product(F.silu(product(x_VD, w_gate_EFD)) * product(x_VD, w_up_EFD), w_down_EDF)
            return (torch.empty_like(out_VD).index_copy(0, visit_V, out_VD).view(M, A, D) * gate_MA[..., None]).sum(1)

        peers = {"torch grouped_mm": grouped} if hasattr(F, "grouped_mm") and dtype == torch.bfloat16 else {}
        flops, size = 6 * M * A * D * width, leaves[0].element_size()
        weights, rows, kept = 3 * E * D * width * size, 2 * M * D * size, M * A * width * size
        yield Case("moe_mlp", f"{M}x{D} E{E}k{A} {width}", ours, functools.partial(ours, op=moe_mlp_ref), peers, leaves, (),
                   (flops, 2 * flops), (weights + rows + 4 * kept, 2 * weights + 2 * rows + 8 * kept))


# ---- Start-up (what should a run that compiles nothing not wait for?) ----

def skip_dynamo():
    """torch's optimizers and custom ops import torch.compile's machinery at their first call, a second or two, only to tell
    it to leave them alone. In a run that compiles nothing there is nobody to tell: mark these functions as told, and take
    the wrapper that imports it off AdamW's step."""
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer = torch.optim.Optimizer
    told = [optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict]
    for op in (_rmsnorm, _rmsnorm_backward, _linear_cross_entropy, _moe_mlp, _moe_mlp_backward):
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
