"""Kernels: which loops are worth writing by hand?

A step of training is matrix products, which the libraries do well, and everything between them, which moves bytes.
A kernel here exists where fewer bytes move than in any chain of library calls, and each stands beside a plain PyTorch
reference with the same signature, which is its definition and its test; without Triton torch's own ops compute it.

    rmsnorm               y_i = x_i w_i / sqrt(mean_j x_j^2 + eps)            x is read once, one float a row is kept  [RMS eq 4]
    add_rmsnorm           (rmsnorm(x + r), x + r)                             the stream is read and written once
    qk_norm_rope          y = (x_i w_i / rms(x)) turned by the token's angle  all heads of q and k in one launch     [RoPE eq 34]
    gated                 y = act(gate) up                                    act(gate) is not kept but made again     [GLU eq 6]
    linear_cross_entropy  sum_m weight_m (log sum_v exp(l_mv) - l_m,target)   with l = x w^T, and l never stored:
                          d/dl_mv = weight_m (softmax(l)_mv - [v = target])   a chunk of rows at a time, gradient included;
                          also of capped logits, smoothed targets, and with the z-loss (log sum_v exp(l_mv))^2
    flash                 y_t = sum_s softmax_s(scale q_t . k_s) v_s          over the keys seen, whose scores are never stored
    decayed_attention     y_t = q_t M_t,  M_t = e^-slope M_{t-1} + k_t v_t^T  M never leaves the registers           [LA2 alg 1]
    moe_mlp               y_m = sum_a gate_ma MLP_{expert_ma}(x_m)            rows fetched by index, never copied in order
    adamw_                w <- round up with probability (x - below) / (above - below): bfloat16 weights learn        [SR]
    newton_schulz         x <- a x + b (x x^T) x + c (x x^T)^2 x              half of x x^T, the rest is its mirror  [Muon]
    fp8_matmul            y ~ sum_j s_mj t_fj (q_m . r_f over tile j of 128)  eight bits, a scale to every 128  [DSV3 sec 3.3]

Every op is a torch.library custom op with a fake and an autograd formula, so that eager mode, torch.compile(fullgraph)
and Triton's interpreter (TRITON_INTERPRET=1, which needs no GPU) all run it.

Contents:    dispatch | rmsnorm | qk_norm_rope | gated | linear_cross_entropy | flash attention | decayed_attention | moe_mlp | adamw_ |
             newton_schulz | fp8_matmul | start-up | demo and bench
Shapes:      M rows (B T flattened), D n_embd, V vocab (in moe_mlp visits, M A), B batch, T tokens, H query heads, G key heads,
             K head dim, U value head dim, P rotary dim, J pairs of channels, C N tile and tiles, F ffn hidden or outputs,
             E experts, A active experts, L matrices, R C short and long side of one, I J tiles of 128
References:
    [RMS] Root Mean Square Layer Normalization, arXiv:1910.07467; [RoPE] RoFormer, 2104.09864; [GLU] GLU Variants, 2002.05202;
    [Liger] Liger Kernel, 2410.10989; [Inception] Rethinking the Inception Architecture, 1512.00567; [PaLM] 2204.02311;
    [Gem2] Gemma 2, 2408.00118; [Flash] FlashAttention, 2205.14135; [Flash2] FlashAttention-2, 2307.08691; [ALiBi] 2108.12409;
    [LA2] Lightning Attention-2, 2401.04658; [AdamW] Decoupled Weight Decay Regularization, 1711.05101;
    [SR] Revisiting BFloat16 Training, 2010.06192; [Muon] kellerjordan.github.io/posts/muon; [DSV3] DeepSeek-V3, 2412.19437
Run me:      python kernels.py             (errors of every op against float64)
             python kernels.py --bench     (times beside PyTorch's own, on this device)
"""
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from tokenizer import Parser, UsageError, run_cli

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

Case = namedtuple("Case", "name shape ours ref peers leaves rest flops bytes")       # what bench_<part> yields; see Demo and bench


def peer(name):
    """Somebody else's module to time beside, none of which is required: None, and a line that says so, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"  no peer from {name}: {error}")


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
        # LayerNorm's backward around a mean of 0, one pass where ours were seven; the mean of dy w that it takes off comes back
        rstd_M1, wide = rstd_M[:, None], rstd_M.dtype
        dy_MD, w32_D = dy_MD.to(wide).contiguous(), w_D.to(wide)
        dx_MD, dw_D, _ = torch.ops.aten.native_layer_norm_backward(dy_MD, x_MD.to(wide), [D], torch.zeros_like(rstd_M1), rstd_M1, w32_D,
                                                                   None, [True, True, False])
        dx_MD.add_(torch.mv(dy_MD, w32_D)[:, None] * rstd_M1 / D)
        dx_MD = dx_MD if dsum_MD is None else dx_MD.add_(dsum_MD)
        return dx_MD.to(x_MD.dtype), dw_D.to(w_D.dtype)
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
    torch.manual_seed(0)
    gpu, draw = device == "cuda", lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    liger = gpu and peer("liger_kernel.transformers.functional")
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
            peers |= dict(liger=theirs) if liger and theirs else {}
            size = leaves[0].nbytes
            shape = "x".join(map(str, leaves[0].shape))
            yield Case(name, shape, ours, ref, peers, leaves, rest, (0, 0), (forward * size, back * size))


# ---- linear_cross_entropy (the head and its loss, without the logits) ----

def linear_cross_entropy_ref(x_MD, w_VD, targets_M, weights_M, bias_V=None, softcap=0.0, z_alpha=0.0, smoothing=0.0,
                             return_nll=False):
    """sum_m weights_m loss_m over all rows at once, a scalar in float32 or wider; a row whose target is negative counts nothing.
    return_nll: also -log softmax(l_m)[targets_m] of every row [M], which no weight, smoothing or z-loss has touched, detached."""
    wide = torch.promote_types(x_MD.dtype, torch.float32)
    l_MV = F.linear(x_MD, w_VD.to(x_MD.dtype), None if bias_V is None else bias_V.to(x_MD.dtype)).to(wide)
    if softcap:
        l_MV = softcap * torch.tanh(l_MV / softcap)                                                      # [Gem2 sec 2]
    target_M = targets_M.long().clamp(min=-1)
    loss_M = nll_M = F.cross_entropy(l_MV, target_M, reduction="none", ignore_index=-1)
    if smoothing:                                                # the target is a mixture of the token and of any token
        loss_M = F.cross_entropy(l_MV, target_M, reduction="none", ignore_index=-1, label_smoothing=smoothing)   # [Inception sec 7]
    if z_alpha:                                                  # keeps log Z near 0, so that logits do not drift
        loss_M = loss_M + z_alpha * l_MV.logsumexp(1).square().where(target_M >= 0, 0)                  # [PaLM sec 5]
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
    counted_C1, target_C1 = targets_C[:, None] >= 0, targets_C[:, None].clamp(min=0)
    weight_C1, nll_C1, loss_C1 = weights_C[:, None].where(counted_C1, 0), *weights_C.new_empty(2, C, 1)
    rows = max(1, (64 << 20 if logits_CV.is_cuda else 1 << 20) // (V * weights_C.element_size()))
    for here in (slice(start, start + rows) for start in range(0, C, rows)):
        l_RV, target_R1, weight_R1 = logits_CV[here].to(weights_C.dtype), target_C1[here], weight_C1[here]
        if softcap:
            l_RV = l_RV.div(softcap).tanh_().mul_(softcap)
        high_R1, at_target_R1, mean_R1 = l_RV.amax(1, True), l_RV.gather(1, target_R1), l_RV.mean(1, True) if smoothing else 0
        l_RV[:, :1].masked_fill_(high_R1 == -torch.inf, 0)       # a row of -inf alone has no softmax; what it adds is its lse, -inf
        p_RV = torch.softmax(l_RV, 1)
        lse_R1 = high_R1 - p_RV.amax(1, True).log_()             # the largest of them is exp(high - lse)
        nll_R1 = torch.sub(lse_R1, at_target_R1, out=nll_C1[here])
        loss_C1[here] = nll_R1 + smoothing * (at_target_R1 - mean_R1) + z_alpha * lse_R1.square() if smoothing or z_alpha else nll_R1
        if grad:
            d_RV = p_RV.mul_(weight_R1 * (1 + 2 * z_alpha * lse_R1) if z_alpha else weight_R1)
            d_RV.scatter_add_(1, target_R1, (smoothing - 1) * weight_R1)
            if smoothing:
                d_RV.sub_(weight_R1 * (smoothing / V))
            if softcap:
                d_RV.mul_(1 - (l_RV / softcap).square_())
            logits_CV[here] = d_RV
    return nll_C1.where(counted_C1, 0).squeeze(1), loss_C1.where(counted_C1, 0).squeeze(1)


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
    """Rows whose logits fill the buffer: 256 MB on a GPU and at least 4096 (large products), on a CPU 28 MB (32 with
    what is worked on), and at least 256: each chunk reads and writes all of dw.                         [Liger sec 3.2]"""
    least, size = (4096, 256 << 20) if x_MD.is_cuda else (256, 28 << 20)
    return max(least, size // (V * x_MD.element_size()))


def few_logits(x_MD, w_VD):
    """On a CPU: logits that take no more than the chunk (32 MB with all that autograd keeps) are cheaper stored."""
    return not takes_triton(x_MD) and not x_MD.is_cuda and len(x_MD) * len(w_VD) <= 2 << 20


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
    """The gradients for dloss = 1, scaled: in place, since they may be as large as the head, unless the graph is kept for
    another backward or is being traced."""
    loss_M, kept, *grads = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    if len(kept):
        *grads, db = _linear_cross_entropy_backward(kept, *grads[3:], *needs)
        grads.append(db.to(ctx.bias_kind or db.dtype))
    keep = torch._C._autograd._get_current_graph_task_keep_graph() or type(dloss) is not torch.Tensor
    factor = dloss.view(1) if dloss.is_cuda else dloss          # on a GPU a scalar would be rounded to bfloat16 first
    dx, dw, db = ((g.clone() if keep else g).mul_(factor) if need else None for g, need in zip(grads, needs))
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

    peers = {"F.cross_entropy": plain}
    if device == "cuda" and (liger := peer("liger_kernel.transformers.functional")):
        peers["liger"] = lambda x_MD, w_VD, targets_M, _: liger.liger_fused_linear_cross_entropy(x_MD, w_VD.to(x_MD.dtype), targets_M,
                                                                                              reduction="sum")
    small, large = [(512, 128, 65), (512, 128, 4096)], [(16384, 768, 50304), (16384, 2048, 50304), (8192, 4096, 131072)]
    for M, D, V in large[:1 if quick else 3] if device == "cuda" else small:
        x_MD, w_VD = torch.randn(M, D, device=device, dtype=dtype), torch.randn(V, D, device=device) / D**0.5
        rest, size = (torch.randint(V, (M,), device=device), torch.ones(M, device=device)), x_MD.element_size()
        yield Case("linear_ce", f"{M}x{D}x{V}", linear_cross_entropy, linear_cross_entropy_ref, peers, (x_MD, w_VD), rest,
                   (2 * M * D * V, 4 * M * D * V), (size * (M + V) * D, size * (M + V) * D * 2))


# ---- Flash attention (softmax attention whose scores never leave the chip) ----

# Scores are made a tile at a time while a running maximum and sum keep the softmax exact [Flash alg 1]; backward makes them again
# from the saved log-sum-exp [Flash2 alg 2]. Causal, windowed, packed and sparse rows differ in who sees whom, and that is all
# that Sight holds: a mask for the reference and, for the kernels, the span of keys that each block of queries has to visit.

def sees(q, k, head, l, c, PATTERN):
    """attention.py's sparse patterns, in operators that tensors and Triton share. q, k: places in the document."""
    near, far = (q - k < l) & (k - q < l), (q - k) % l == 0
    if PATTERN == "fixed":
        near, far = q // l == k // l, ((l - 1 - k % l) // c == (head // 2) % ((l + c - 1) // c)) | (q == k)
    see = far
    if PATTERN == "sparse":
        see = near | far
    elif PATTERN != "dilated":                      # strided and fixed: heads take turns
        even = (q - q + head) % 2 == 0
        see = even & near | (even == 0) & far
    return see


_sees = jit(sees)


@dataclass
class Sight:
    """Who sees whom: queries are the last T of S places, keys all S. Ids of documents may come in any order; spans are tight
    where they do not decrease, with padding (-1) on either side."""
    causal: bool = True
    window: int = 0                         # keys with |q - k| < window; 0 means all
    doc_BS: torch.Tensor = None             # a query sees keys of its own document
    pattern: str = ""                       # dilated, sparse, strided or fixed, with stride and width
    stride: int = 1
    width: int = 1
    place_BS: torch.Tensor = None           # patterns: place in the document; None means place in the row

    def __post_init__(self):
        self.kept = {}
        self.doc_BS, self.place_BS = (x if x is None else x.int().contiguous() for x in (self.doc_BS, self.place_BS))

    def mask(self, T, S, H, device):
        """bool [B or 1, H or 1, T, S]: the definition."""
        k_1S = torch.arange(S, device=device)[None]
        q_T1 = k_1S[:, S - T:].mT
        see = ((k_1S <= q_T1) if self.causal else (k_1S >= 0) & (q_T1 >= 0))[None, None]
        if self.window:
            see = see & ((q_T1 - k_1S).abs() < self.window)
        if self.doc_BS is not None:
            see = see & (self.doc_BS[:, None, S - T:, None] == self.doc_BS[:, None, None])
        if self.pattern:
            place_BS, head_H11 = k_1S if self.place_BS is None else self.place_BS, torch.arange(H, device=device)[:, None, None]
            q_B1T1, k_B11S = place_BS[:, None, S - T:, None], place_BS[:, None, None]
            see = see & sees(q_B1T1, k_B11S, head_H11, self.stride, self.width, self.pattern)
        return see

    def spans(self, T, S, block, step, device, keys=False):
        """int32 [B or 1, kinds of heads, blocks, 4]: a block of queries visits the keys from the first number to the last, and
        needs no mask between the middle two, all in whole tiles of `step`. keys: the same of the queries that see a block of
        keys. Made once for all layers of a kind."""
        key = T, S, block, step, keys
        if key not in self.kept:
            l, plain = self.stride, (self.window, self.doc_BS, not self.pattern)
            parts = [plain]
            if self.pattern == "strided":
                parts = [(min(l, self.window or l), self.doc_BS, True), plain]
            elif self.pattern == "fixed":           # a block of l places is a document of its own
                place_BS = torch.arange(S, device=device)[None] if self.place_BS is None else self.place_BS
                whole = self.doc_BS is None or self.place_BS is not None
                parts = [(self.window, (place_BS % l == 0).cumsum(1).int(), whole), plain]
            spans = [self._spans(T, S, block, step, device, keys, *part) for part in parts]
            B = max(map(len, spans))
            self.kept[key] = torch.stack([span.expand(B, -1, -1) for span in spans], 1).int().contiguous()
        return self.kept[key]

    def _spans(self, T, S, block, step, device, keys, window, doc_BS, exact):
        begin, far = S - T if keys else 0, 2 * S                         # where those who are visited begin
        back, ahead = window - 1 if window else far, 0 if self.causal else window - 1 if window else far
        back, ahead = (ahead, back) if keys else (back, ahead)
        N = S if keys else T                                             # one place sees, or is seen from, [low, high)
        place_N = torch.arange(-(-N // block) * block, device=device).clamp(max=N - 1) + S - N
        low_BN, high_BN, exact_BN = place_N[None] - back, place_N[None] + ahead + 1, torch.full((1, 1), exact, device=device)
        if doc_BS is not None:          # an id begins where the largest so far reaches it, ends where the least to come exceeds it
            last_BS = torch.where(doc_BS < 0, torch.iinfo(torch.int32).max, doc_BS)
            first_BS = torch.searchsorted(doc_BS.cummax(1).values, doc_BS)
            end_BS = torch.searchsorted(last_BS.flip(1).cummin(1).values.flip(1).contiguous(), last_BS, right=True)
            changes_BS = F.pad(doc_BS[:, 1:] != doc_BS[:, :-1], (1, 0)).cumsum(1)
            alone_BS = changes_BS.gather(1, first_BS) == changes_BS.gather(1, end_BS - 1)         # nothing else between
            low_BN, high_BN = torch.maximum(low_BN, first_BS[:, place_N]), torch.minimum(high_BN, end_BS[:, place_N])
            exact_BN = exact_BN & alone_BS[:, place_N]
        low_BNC, high_BNC = (x.clamp(begin, S).sub(begin).unflatten(1, (-1, block)) for x in (low_BN, high_BN))
        low, high = low_BNC.amin(-1) // step * step, -(-high_BNC.amax(-1) // step) * step
        inner = -(-low_BNC.amax(-1) // step) * step
        outer = (high_BNC.amin(-1) // step * step) * exact_BN.expand(-1, len(place_N)).unflatten(1, (-1, block)).all(-1)
        inner = torch.minimum(torch.maximum(inner, low), high)
        return torch.stack(torch.broadcast_tensors(low, inner, torch.minimum(torch.maximum(outer, inner), high), high), -1)


def flash_ref(q_BTHK, k_BSGK, v_BSGU, see, scale, softcap=0.0, sink_H=None, slope_H=None):
    """softmax(scale q k^T where seen) v -> [B, T, H, U], in float32 or wider; H/G neighbouring query heads share a key head.
    softcap: scores s become c tanh(s / c); sink_H: a logit a head that takes probability and has no value; slope_H: less
    slope |t - s| [ALiBi sec 3]. A query that sees nothing gives 0."""
    (T, H), (S, G), wide = q_BTHK.shape[1:3], k_BSGK.shape[1:3], torch.promote_types(q_BTHK.dtype, torch.float32)
    k_BSHK, v_BSHU = (x.to(wide).repeat_interleave(H // G, 2) for x in (k_BSGK, v_BSGU))
    score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK.to(wide), k_BSHK) * scale
    if softcap:
        score_BHTS = softcap * torch.tanh(score_BHTS / softcap)
    if slope_H is not None:
        place_S = torch.arange(S, device=q_BTHK.device)
        score_BHTS = score_BHTS - slope_H.to(wide)[:, None, None] * (place_S[S - T:, None] - place_S).abs()
    score_BHTS = score_BHTS.masked_fill(~see.mask(T, S, H, q_BTHK.device), -torch.inf)
    sink = score_BHTS.new_full((H,), -torch.inf) if sink_H is None else sink_H.to(wide)
    scores = torch.cat([score_BHTS, sink.view(1, H, 1, 1).expand(len(q_BTHK), -1, T, -1)], -1)
    p_BHTS = scores.softmax(-1).nan_to_num(0.0)[..., :S]
    return torch.einsum("bhts,bshu->bthu", p_BHTS, v_BSHU).to(q_BTHK.dtype)


LOG2E = tl.constexpr(1.4426950408889634) if triton else 1.4426950408889634        # powers of 2 are one instruction


@jit
def _tile(ptr, row_M, stride, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    # (BLOCK_M, BLOCK) columns from FIRST on of a matrix of WIDTH columns. A width is known at compile time, so its test costs
    # nothing where the block fits; EDGE: rows may overhang, too
    col = FIRST + tl.arange(0, BLOCK)
    at = ptr + row_M[:, None].to(tl.int64) * stride + col[None, :]
    if EDGE:
        return tl.load(at, mask=(row_M[:, None] < rows) & (col[None, :] < WIDTH), other=0.0)
    elif FIRST + BLOCK > WIDTH:
        return tl.load(at, mask=(row_M[:, None] >= 0) & (col[None, :] < WIDTH), other=0.0)
    else:
        return tl.load(at)


@jit
def _put(ptr, row_M, stride, rows, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    col = FIRST + tl.arange(0, BLOCK)
    tl.store(ptr + row_M[:, None].to(tl.int64) * stride + col[None, :], x, mask=(row_M[:, None] < rows) & (col[None, :] < WIDTH))


@jit
def _flash_score(s, q, k, head, doc_ptr, place_ptr, slope_ptr, S, scale, cap, window, l, c, CAUSAL: tl.constexpr,
                 WINDOW: tl.constexpr, PATTERN: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr):
    # -> scores in powers of 2, -inf where not seen, and the slope of the cap. q, k: places, one a row and one a column, in
    # either order. MASK: at the border of what is seen; documents are read again there, 4 bytes a key
    slack = 1.0
    if CAP:
        t = 1 - 2 / (1 + tl.exp2(s * (2 * LOG2E * scale / cap)))         # tanh, which has no instruction everywhere
        s = t * (cap * LOG2E)
        slack = 1 - t * t
    else:
        s = s * (scale * LOG2E)
    if slope_ptr is not None:
        s -= tl.load(slope_ptr + head).to(tl.float32) * LOG2E * tl.abs(q - k).to(tl.float32)
    if MASK:
        see = (k < S) & (q < S)
        if CAUSAL:
            see = see & (k <= q)
        if WINDOW:
            see = see & (q - k < window) & (k - q < window)
        if doc_ptr is not None:
            see = see & (tl.load(doc_ptr + q, mask=q < S, other=-2) == tl.load(doc_ptr + k, mask=k < S, other=-2))
        if PATTERN != "":
            if place_ptr is not None:
                q, k = tl.load(place_ptr + q, mask=q < S, other=0), tl.load(place_ptr + k, mask=k < S, other=0)
            see = see & _sees(q, k, head, l, c, PATTERN)
        s = tl.where(see, s, -float("inf"))
    return s, slack


@jit
def _flash_add(y_MU, high_M, sum_M, s_MN, v_NU):
    # keys N join the softmax so far: what was summed under a lower maximum shrinks                        [Flash alg 1]
    higher_M = tl.maximum(high_M, tl.max(s_MN, 1))
    base_M = tl.where(higher_M == -float("inf"), 0.0, higher_M)          # nothing seen yet: all differences are -inf
    p_MN, shrink_M = tl.exp2(s_MN - base_M[:, None]), tl.exp2(high_M - base_M)
    y_MU = y_MU * shrink_M[:, None] + _dot(p_MN.to(v_NU.dtype), v_NU)
    return y_MU, higher_M, sum_M * shrink_M + tl.sum(p_MN, 1)


@jit
def _flash_fwd(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, span_ptr, doc_ptr, place_ptr, sink_ptr, slope_ptr, scale, cap, T, S, H, G,
               q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, span_b, window, l, c,
               CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PATTERN: tl.constexpr, CAP: tl.constexpr, KINDS: tl.constexpr,
               K: tl.constexpr, U: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, U1: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # grid (blocks of queries, B H): queries stay in registers while the keys they see pass by. The last blocks, which see
    # the most keys, start first. A head of K channels is K1 + K2 of them, powers of two (192 = 128 + 64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    group, past = head // (H // G), S - T
    row_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += batch * q_b + head * q_h
    k_ptr += batch * k_b + group * k_g
    v_ptr += batch * v_b + group * v_g
    if doc_ptr is not None:
        doc_ptr += batch * S
    if place_ptr is not None:
        place_ptr += batch * S
    q1_MK = _tile(q_ptr, row_M, q_t, T, 0, K, K1, True)
    if K2:
        q2_MK = _tile(q_ptr, row_M, q_t, T, K1, K, K2, True)
    high_M, sum_M = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if sink_ptr is not None:                       # a key that was there before all others, whose value is 0
        high_M, sum_M = sum_M + tl.load(sink_ptr + head).to(tl.float32) * LOG2E, sum_M + 1.0
    y_MU = tl.zeros([BLOCK_M, U1], tl.float32)
    span_ptr += batch * span_b + ((head % KINDS) * tl.num_programs(0) + block) * 4
    for phase in tl.static_range(3):               # keys at one border of what is seen, those that all see, the other border
        for start in range(tl.load(span_ptr + phase), tl.load(span_ptr + phase + 1), BLOCK_N):
            col_N = start + tl.arange(0, BLOCK_N)
            k1_NK = _tile(k_ptr, col_N, k_s, S, 0, K, K1, phase != 1)
            s_MN = _dot(q1_MK, tl.trans(k1_NK))
            if K2:
                s_MN += _dot(q2_MK, tl.trans(_tile(k_ptr, col_N, k_s, S, K1, K, K2, phase != 1)))
            s_MN, _ = _flash_score(s_MN, row_M[:, None] + past, col_N[None, :], head, doc_ptr, place_ptr, slope_ptr, S, scale, cap,
                                   window, l, c, CAUSAL, WINDOW, PATTERN, CAP, phase != 1)
            y_MU, high_M, sum_M = _flash_add(y_MU, high_M, sum_M, s_MN, _tile(v_ptr, col_N, v_s, S, 0, U, U1, phase != 1))
    y_MU = y_MU / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    lse_M = tl.where(sum_M > 0, high_M + tl.log2(tl.where(sum_M > 0, sum_M, 1.0)), float("inf"))     # inf: no probability at all
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * T + row_M, lse_M, mask=row_M < T)
    _put(o_ptr + (batch * T * H + head) * U, row_M, H * U, T, y_MU.to(q1_MK.dtype), 0, U, U1)


@jit
def _flash_bwd_q(do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, delta_ptr, dq_ptr, span_ptr, doc_ptr, place_ptr, slope_ptr,
                 scale, cap, T, S, H, G, q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, span_b, window, l, c,
                 CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PATTERN: tl.constexpr, CAP: tl.constexpr, KINDS: tl.constexpr,
                 K: tl.constexpr, U: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, U1: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # grid and walk as in forward. ds = p (dp - delta) with delta = do . o of the row, which is left for the other kernel
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    group, past = head // (H // G), S - T
    row_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += batch * q_b + head * q_h
    k_ptr += batch * k_b + group * k_g
    v_ptr += batch * v_b + group * v_g
    if doc_ptr is not None:
        doc_ptr += batch * S
    if place_ptr is not None:
        place_ptr += batch * S
    line = tl.program_id(1).to(tl.int64) * T
    q1_MK = _tile(q_ptr, row_M, q_t, T, 0, K, K1, True)
    dq1_MK = tl.zeros([BLOCK_M, K1], tl.float32)
    if K2:
        q2_MK = _tile(q_ptr, row_M, q_t, T, K1, K, K2, True)
        dq2_MK = tl.zeros([BLOCK_M, K2], tl.float32)
    do_MU = _tile(do_ptr + (batch * T * H + head) * U, row_M, H * U, T, 0, U, U1, True)
    o_MU = _tile(o_ptr + (batch * T * H + head) * U, row_M, H * U, T, 0, U, U1, True)
    delta_M = tl.sum(do_MU.to(tl.float32) * o_MU.to(tl.float32), 1)
    tl.store(delta_ptr + line + row_M, delta_M, mask=row_M < T)
    lse_M = tl.load(lse_ptr + line + row_M, mask=row_M < T, other=float("inf"))
    span_ptr += batch * span_b + ((head % KINDS) * tl.num_programs(0) + block) * 4
    for phase in tl.static_range(3):
        for start in range(tl.load(span_ptr + phase), tl.load(span_ptr + phase + 1), BLOCK_N):
            col_N = start + tl.arange(0, BLOCK_N)
            k1_NK = _tile(k_ptr, col_N, k_s, S, 0, K, K1, phase != 1)
            s_MN = _dot(q1_MK, tl.trans(k1_NK))
            if K2:
                k2_NK = _tile(k_ptr, col_N, k_s, S, K1, K, K2, phase != 1)
                s_MN += _dot(q2_MK, tl.trans(k2_NK))
            s_MN, slack = _flash_score(s_MN, row_M[:, None] + past, col_N[None, :], head, doc_ptr, place_ptr, slope_ptr, S, scale,
                                       cap, window, l, c, CAUSAL, WINDOW, PATTERN, CAP, phase != 1)
            dp_MN = _dot(do_MU, tl.trans(_tile(v_ptr, col_N, v_s, S, 0, U, U1, phase != 1)))
            ds_MN = (tl.exp2(s_MN - lse_M[:, None]) * (dp_MN - delta_M[:, None]) * slack).to(k1_NK.dtype)
            dq1_MK += _dot(ds_MN, k1_NK)
            if K2:
                dq2_MK += _dot(ds_MN, k2_NK)
    dq_ptr += (batch * T * H + head) * K
    _put(dq_ptr, row_M, H * K, T, (dq1_MK * scale).to(q1_MK.dtype), 0, K, K1)
    if K2:
        _put(dq_ptr, row_M, H * K, T, (dq2_MK * scale).to(q1_MK.dtype), K1, K, K2)


@jit
def _flash_bwd_kv(do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, span_ptr, doc_ptr, place_ptr, slope_ptr,
                  scale, cap, T, S, H, G, q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, span_b, window, l, c,
                  CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PATTERN: tl.constexpr, CAP: tl.constexpr, KINDS: tl.constexpr,
                  K: tl.constexpr, U: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, U1: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # grid (blocks of keys, B G): keys stay, the queries that see them pass by, of all heads that share them, so that their sum
    # is made here in a fixed order. Scores are made transposed: their products with do and q then need no other transpose
    block, past = tl.program_id(0), S - T
    batch, group = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    col_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += batch * k_b + group * k_g
    v_ptr += batch * v_b + group * v_g
    if doc_ptr is not None:
        doc_ptr += batch * S
    if place_ptr is not None:
        place_ptr += batch * S
    k1_NK = _tile(k_ptr, col_N, k_s, S, 0, K, K1, True)
    dk1_NK = tl.zeros([BLOCK_N, K1], tl.float32)
    if K2:
        k2_NK = _tile(k_ptr, col_N, k_s, S, K1, K, K2, True)
        dk2_NK = tl.zeros([BLOCK_N, K2], tl.float32)
    v_NU, dv_NU = _tile(v_ptr, col_N, v_s, S, 0, U, U1, True), tl.zeros([BLOCK_N, U1], tl.float32)
    for head in range(group * (H // G), (group + 1) * (H // G)):
        here_q, here_do, line = q_ptr + batch * q_b + head * q_h, do_ptr + (batch * T * H + head) * U, (batch * H + head) * T
        here_span = span_ptr + batch * span_b + ((head % KINDS) * tl.num_programs(0) + block) * 4
        for phase in tl.static_range(3):
            for start in range(tl.load(here_span + phase), tl.load(here_span + phase + 1), BLOCK_M):
                row_M = start + tl.arange(0, BLOCK_M)
                q1_MK = _tile(here_q, row_M, q_t, T, 0, K, K1, phase != 1)
                s_NM = _dot(k1_NK, tl.trans(q1_MK))
                if K2:
                    q2_MK = _tile(here_q, row_M, q_t, T, K1, K, K2, phase != 1)
                    s_NM += _dot(k2_NK, tl.trans(q2_MK))
                s_NM, slack = _flash_score(s_NM, row_M[None, :] + past, col_N[:, None], head, doc_ptr, place_ptr, slope_ptr, S,
                                           scale, cap, window, l, c, CAUSAL, WINDOW, PATTERN, CAP, phase != 1)
                lse_M = tl.load(lse_ptr + line + row_M, mask=row_M < T, other=float("inf"))
                p_NM = tl.exp2(s_NM - lse_M[None, :])
                do_MU = _tile(here_do, row_M, H * U, T, 0, U, U1, phase != 1)
                dv_NU += _dot(p_NM.to(do_MU.dtype), do_MU)
                delta_M = tl.load(delta_ptr + line + row_M, mask=row_M < T, other=0.0)
                ds_NM = (p_NM * (_dot(v_NU, tl.trans(do_MU)) - delta_M[None, :]) * slack).to(q1_MK.dtype)
                dk1_NK += _dot(ds_NM, q1_MK)
                if K2:
                    dk2_NK += _dot(ds_NM, q2_MK)
    dk_ptr += (batch * S * G + group) * K
    _put(dk_ptr, col_N, G * K, S, (dk1_NK * scale).to(k1_NK.dtype), 0, K, K1)
    if K2:
        _put(dk_ptr, col_N, G * K, S, (dk2_NK * scale).to(k1_NK.dtype), K1, K, K2)
    _put(dv_ptr + (batch * S * G + group) * U, col_N, G * U, S, dv_NU.to(v_NU.dtype), 0, U, U1)


def flash_blocks(K, U, dtype):
    """((queries, keys) of a tile where queries stay, the same where keys do, (warps, stages) of the three kernels): what fits the
    163 KB of shared memory of an A100, and the registers nearly or wholly."""
    if dtype == torch.float32:
        return (32, 32), (32, 32), (4, 1), (4, 1), (4, 1)
    if max(K, U) <= 128:
        return (128, 64), (64, 128), (4, 3) if max(K, U) <= 64 else (8, 2), (8, 2), (8, 2)
    return ((128, 32) if max(K, U) <= 192 else (64, 32)), (32, 64), (8, 2), (8, 2), (8, 1)


def two_powers(K):
    """(K1, K2): powers of two that hold K channels between them, as tiles must: 192 = 128 + 64. K2 may be 0."""
    K1 = 1 << max(4, K.bit_length() - 1)
    return K1, 0 if K <= K1 else max(16, triton.next_power_of_2(K - K1))


def _flash_launch(kernel, heads, pointers, qkv, span, tile, warps, scale, softcap, causal, window, pattern, stride, width):
    """Start one of the three kernels: after their pointers all take the same."""
    q_BTHK, k_BSGK, v_BSGU = qkv
    (T, H, K), (S, G, U), (K1, K2) = q_BTHK.shape[1:], v_BSGU.shape[1:], two_powers(q_BTHK.shape[3])
    span_b = span.stride(0) if len(span) > 1 else 0                      # one table may serve the whole batch
    strides = (*q_BTHK.stride()[:3], *k_BSGK.stride()[:3], *v_BSGU.stride()[:3], span_b)
    kernel[(span.shape[2], heads)](
        *pointers, scale, softcap, T, S, H, G, *strides, window, stride, width, CAUSAL=causal, WINDOW=window > 0, PATTERN=pattern,
        CAP=softcap > 0, KINDS=span.shape[1], K=K, U=U, K1=K1, K2=K2, U1=max(16, triton.next_power_of_2(U)), BLOCK_M=tile[0],
        BLOCK_N=tile[1], num_warps=warps[0], num_stages=warps[1])


@torch.library.custom_op("flatlm::flash", mutates_args=())
def _flash(q_BTHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGU: torch.Tensor, span_q: torch.Tensor, span_k: torch.Tensor,
           doc_BS: torch.Tensor | None, place_BS: torch.Tensor | None, sink_H: torch.Tensor | None, slope_H: torch.Tensor | None,
           scale: float, softcap: float, causal: bool, window: int, pattern: str, stride: int,
           width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> y [B, T, H, U], log2 of the sum of exponentials [B, H, T]. Triton alone: elsewhere flash is its reference."""
    (B, T, H, K), U = q_BTHK.shape, v_BSGU.shape[-1]
    y_BTHU, lse_BHT = q_BTHK.new_empty(B, T, H, U), q_BTHK.new_empty(B, H, T, dtype=torch.float32)
    tile, _, warps, _, _ = flash_blocks(K, U, q_BTHK.dtype)
    qkv = q_BTHK, k_BSGK, v_BSGU
    _flash_launch(_flash_fwd, B * H, (*qkv, y_BTHU, lse_BHT, span_q, doc_BS, place_BS, sink_H, slope_H), qkv, span_q, tile, warps,
                  scale, softcap, causal, window, pattern, stride, width)
    return y_BTHU, lse_BHT


@_flash.register_fake
def _(q_BTHK, k_BSGK, v_BSGU, *_):
    B, T, H, _ = q_BTHK.shape
    return q_BTHK.new_empty(B, T, H, v_BSGU.shape[-1]), q_BTHK.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("flatlm::flash_backward", mutates_args=())
def _flash_backward(do_BTHU: torch.Tensor, y_BTHU: torch.Tensor, lse_BHT: torch.Tensor, q_BTHK: torch.Tensor, k_BSGK: torch.Tensor,
                    v_BSGU: torch.Tensor, span_q: torch.Tensor, span_k: torch.Tensor, doc_BS: torch.Tensor | None,
                    place_BS: torch.Tensor | None, slope_H: torch.Tensor | None, scale: float, softcap: float, causal: bool,
                    window: int, pattern: str, stride: int,
                    width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv, and delta = do . y of every row [B, H, T]."""
    (B, _, H, K), (_, G, U) = q_BTHK.shape, v_BSGU.shape[1:]
    dq_BTHK, dk_BSGK, dv_BSGU = (x.new_empty(x.shape) for x in (q_BTHK, k_BSGK, v_BSGU))
    delta_BHT, do_BTHU = torch.empty_like(lse_BHT), do_BTHU.contiguous()
    tile, tile_k, _, warps, warps_k = flash_blocks(K, U, q_BTHK.dtype)
    qkv, settings = (q_BTHK, k_BSGK, v_BSGU), (scale, softcap, causal, window, pattern, stride, width)
    _flash_launch(_flash_bwd_q, B * H, (do_BTHU, *qkv, y_BTHU, lse_BHT, delta_BHT, dq_BTHK, span_q, doc_BS, place_BS, slope_H), qkv,
                  span_q, tile, warps, *settings)
    _flash_launch(_flash_bwd_kv, B * G, (do_BTHU, *qkv, lse_BHT, delta_BHT, dk_BSGK, dv_BSGU, span_k, doc_BS, place_BS, slope_H),
                  qkv, span_k, tile_k, warps_k, *settings)
    return dq_BTHK, dk_BSGK, dv_BSGU, delta_BHT


@_flash_backward.register_fake
def _(do_BTHU, y_BTHU, lse_BHT, q_BTHK, k_BSGK, v_BSGU, *_):
    return *(x.new_empty(x.shape) for x in (q_BTHK, k_BSGK, v_BSGU)), torch.empty_like(lse_BHT)


def _flash_save(ctx, inputs, output):
    *tensors, sink_H, slope_H = inputs[:9]
    ctx.save_for_backward(*output, *tensors, sink_H, slope_H)
    ctx.settings = inputs[9:]


def _flash_grad(ctx, do_BTHU, _):
    *tensors, sink_H, slope_H = ctx.saved_tensors
    dq_BTHK, dk_BSGK, dv_BSGU, delta_BHT = _flash_backward(do_BTHU, *tensors, slope_H, *ctx.settings)
    dsink_H = None
    if sink_H is not None:                          # its share of every row, times 0 - delta: its value is 0
        p_BHT = torch.exp2(sink_H.float()[:, None] * math.log2(math.e) - tensors[1])
        dsink_H = -(p_BHT * delta_BHT).sum((0, 2)).to(sink_H.dtype)
    return dq_BTHK, dk_BSGK, dv_BSGU, *[None] * 4, dsink_H, *[None] * 8


_flash.register_autograd(_flash_grad, setup_context=_flash_save)


def _rows(q, *others):
    """All in one type, autocast's where that is on, with the channels of a head side by side in memory."""
    q = to_autocast(q)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in (q, *(x.to(q.dtype) for x in others))]


def _for_rows(x_BS, B):
    return x_BS if x_BS is None else x_BS.int().expand(B, -1).contiguous()


def flash(q_BTHK, k_BSGK, v_BSGU, see, scale, softcap=0.0, sink_H=None, slope_H=None):
    """Signature and value of flash_ref, in autocast's type, with memory for the inputs and the output alone."""
    if not takes_triton(q_BTHK):
        return flash_ref(q_BTHK, k_BSGK, v_BSGU, see, scale, softcap, sink_H, slope_H)
    q_BTHK, k_BSGK, v_BSGU = _rows(q_BTHK, k_BSGK, v_BSGU)
    (B, T, _, K), (S, _, U) = q_BTHK.shape, v_BSGU.shape[1:]
    tile, tile_k, *_ = flash_blocks(K, U, q_BTHK.dtype)
    span_q = see.spans(T, S, *tile, q_BTHK.device)
    span_k = see.spans(T, S, *tile_k[::-1], q_BTHK.device, keys=True)
    return _flash(q_BTHK, k_BSGK, v_BSGU, span_q, span_k, _for_rows(see.doc_BS, B), _for_rows(see.place_BS, B), sink_H, slope_H,
                  float(scale), float(softcap), see.causal, see.window, see.pattern, see.stride, see.width)[0]


@jit
def _decode(q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, doc_ptr, scale, cap, S, H, G, q_b, q_h, k_b, k_s, k_g, v_b, v_s, v_g, SPLIT,
            CAP: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, U: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
            U1: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    # grid (splits of the keys, blocks of the heads that share them, B G): one query is too few rows to keep a chip busy, so
    # many programs read a share of SPLIT keys each, all heads of a group at once. SHARED: values are the first channels of the
    # keys (MLA's latent), which are then read once
    split, batch, group = tl.program_id(0), (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    row_M = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_M, top = group * (H // G) + row_M, H // G
    q_ptr += batch * q_b + group * (H // G) * q_h
    k_ptr += batch * k_b + group * k_g
    v_ptr += batch * v_b + group * v_g
    if doc_ptr is not None:
        doc_ptr += batch * S
    q1_MK = _tile(q_ptr, row_M, q_h, top, 0, K, K1, True)
    if K2:
        q2_MK = _tile(q_ptr, row_M, q_h, top, K1, K, K2, True)
    high_M, sum_M = tl.full([BLOCK_H], -float("inf"), tl.float32), tl.zeros([BLOCK_H], tl.float32)
    y_MU = tl.zeros([BLOCK_H, U1], tl.float32)
    for start in range(split * SPLIT, tl.minimum(S, split * SPLIT + SPLIT), BLOCK_N):
        col_N = start + tl.arange(0, BLOCK_N)
        k1_NK = _tile(k_ptr, col_N, k_s, S, 0, K, K1, True)
        s_MN = _dot(q1_MK, tl.trans(k1_NK))
        if K2:
            s_MN += _dot(q2_MK, tl.trans(_tile(k_ptr, col_N, k_s, S, K1, K, K2, True)))
        s_MN, _ = _flash_score(s_MN, row_M[:, None] * 0 + S - 1, col_N[None, :], 0, doc_ptr, None, None, S, scale, cap, 0, 0, 0,
                               False, False, "", CAP, True)
        if SHARED:
            v_NU = k1_NK
        else:
            v_NU = _tile(v_ptr, col_N, v_s, S, 0, U, U1, True)
        y_MU, high_M, sum_M = _flash_add(y_MU, high_M, sum_M, s_MN, v_NU)
    line_M = (batch * H + head_M) * tl.num_programs(0) + split
    lse_M = tl.where(sum_M > 0, high_M + tl.log2(tl.where(sum_M > 0, sum_M, 1.0)), -float("inf"))
    tl.store(lse_ptr + line_M, lse_M, mask=row_M < top)
    y_MU = y_MU / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    col_U = tl.arange(0, U1)
    tl.store(part_ptr + line_M[:, None] * U + col_U[None, :], y_MU, mask=(row_M[:, None] < top) & (col_U[None, :] < U))


@jit
def _decode_join(part_ptr, lse_ptr, sink_ptr, y_ptr, splits, H, U, BLOCK_S: tl.constexpr, BLOCK_U: tl.constexpr):
    # grid (B H, blocks of U): the parts of all splits, each weighted by its share of the probability; a sink's is lost
    line, at_S = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_S)
    col_U = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    lse_S = tl.load(lse_ptr + line * splits + at_S, mask=at_S < splits, other=-float("inf"))
    high = tl.max(lse_S, 0)
    total = tl.sum(tl.exp2(lse_S - high), 0)
    if sink_ptr is not None:
        total += tl.exp2(tl.load(sink_ptr + line % H).to(tl.float32) * LOG2E - high)
    part_SU = tl.load(part_ptr + (line * splits + at_S[:, None]) * U + col_U[None, :],
                      mask=(at_S[:, None] < splits) & (col_U[None, :] < U), other=0.0)
    tl.store(y_ptr + line * U + col_U, tl.sum(part_SU * tl.exp2(lse_S - high)[:, None], 0) / total, mask=col_U < U)


@torch.library.custom_op("flatlm::flash_decode", mutates_args=())
def _flash_decode(q_BHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGU: torch.Tensor, scale: float, softcap: float,
                  sink_H: torch.Tensor | None, doc_BS: torch.Tensor | None) -> torch.Tensor:
    (B, H, K), (S, G, U) = q_BHK.shape, v_BSGU.shape[1:]
    (K1, K2), U1 = two_powers(K), max(16, triton.next_power_of_2(U))
    shared = v_BSGU.data_ptr() == k_BSGK.data_ptr() and v_BSGU.stride() == k_BSGK.stride() and U == U1 == K1
    wide, heads = max(K1, U1) > 256, 16 if H // G <= 16 else 32
    programs, BLOCK_N = B * G * triton.cdiv(H // G, heads), 32 if wide else 64
    SPLIT = max(256, triton.next_power_of_2(triton.cdiv(S * programs, 264)))       # about two programs a processor of an H100
    splits = triton.cdiv(S, SPLIT)
    y_BHU = q_BHK.new_empty(B, H, U)
    part_BHNU, lse_BHN = (q_BHK.new_empty(B, H, splits, *more, dtype=torch.float32) for more in ((U,), ()))
    _decode[(splits, triton.cdiv(H // G, heads), B * G)](
        q_BHK, k_BSGK, v_BSGU, part_BHNU, lse_BHN, doc_BS, scale, softcap, S, H, G, *q_BHK.stride()[:2], *k_BSGK.stride()[:3],
        *v_BSGU.stride()[:3], SPLIT, CAP=softcap > 0, SHARED=shared, K=K, U=U,
        K1=K1, K2=K2, U1=U1, BLOCK_H=heads, BLOCK_N=BLOCK_N, num_warps=8 if wide else 4, num_stages=2)
    _decode_join[(B * H, triton.cdiv(U, 64))](part_BHNU, lse_BHN, sink_H, y_BHU, splits, H, U,
                                              BLOCK_S=triton.next_power_of_2(splits), BLOCK_U=64)
    return y_BHU


@_flash_decode.register_fake
def _(q_BHK, k_BSGK, v_BSGU, *_):
    return q_BHK.new_empty(*q_BHK.shape[:2], v_BSGU.shape[-1])


def flash_decode_ref(q_BHK, k_BSGK, v_BSGU, scale, softcap=0.0, sink_H=None, doc_BS=None):
    """One query a row, the newest of S tokens, reads all keys of its document: [B, H, U]."""
    return flash_ref(q_BHK[:, None], k_BSGK, v_BSGU, Sight(doc_BS=doc_BS), scale, softcap, sink_H)[:, 0]


def flash_decode(q_BHK, k_BSGK, v_BSGU, scale, softcap=0.0, sink_H=None, doc_BS=None):
    """Signature and value of flash_decode_ref; no gradient. Values that are the first channels of the keys are not read again."""
    if not takes_triton(q_BHK):
        return flash_decode_ref(q_BHK, k_BSGK, v_BSGU, scale, softcap, sink_H, doc_BS)
    return _flash_decode(*_rows(q_BHK, k_BSGK, v_BSGU), float(scale), float(softcap), sink_H, _for_rows(doc_BS, len(q_BHK)))


def flash_peers(see, T, scale, softcap):
    """What PyTorch users write on a GPU: SDPA with the mask in memory, flex_attention without it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    doc_BS, run = see.doc_BS, torch.compile(flex_attention)
    B = 1 if doc_BS is None else len(doc_BS)

    def seen(b, h, q, k):
        keep = k <= q if not see.window else (k <= q) & (q - k < see.window)
        return keep if doc_BS is None else keep & (doc_BS[b, q] == doc_BS[b, k])

    cap = (lambda s, b, h, q, k: softcap * torch.tanh(s / softcap)) if softcap else None
    block_mask = create_block_mask(seen, B, None, T, T, device="cuda")
    peers = {"flex": lambda q, k, v: run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cap, block_mask, scale,
                                         enable_gqa=True).transpose(1, 2)}
    if not softcap:
        mask = see.mask(T, T, 1, "cuda")
        peers["sdpa"] = lambda q, k, v: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), mask, scale=scale, enable_gqa=True).transpose(1, 2)
    return peers


def bench_flash(device, dtype, quick):
    """Rows packed with documents, windows, caps, sinks, sparse patterns and MLA's widths."""
    gpu = device == "cuda"
    B, T, l = (1, 2048 if quick else 8192, 128) if gpu else (1, 256, 16)
    H, G, K, heads = (16, 4, 128, (128, 192)) if gpu else (4, 2, 32, (32, 48))
    doc_BS = (torch.arange(T, device=device) // (T // 5 + 1)).expand(B, T)
    wide = dict(H=H, G=H, K=heads[1], U=heads[0])
    kinds = {"docs": (Sight(doc_BS=doc_BS), {}), "window+docs": (Sight(window=T // 8, doc_BS=doc_BS), {}),
             "window+cap": (Sight(window=T // 8), dict(softcap=50.0)), "window+sinks": (Sight(window=T // 8), dict(sinks=True)),
             "docs, MLA": (Sight(doc_BS=doc_BS), wide)} | {
             name: (Sight(pattern=name, stride=l, width=l // 4), {}) for name in ("strided", "fixed")}
    for kind, (see, more) in kinds.items():
        h, g, k, u = (more.get(name, default) for name, default in zip("HGKU", (H, G, K, K)))
        torch.manual_seed(0)
        leaves = [torch.randn(B, T, n, width, device=device, dtype=dtype) for n, width in ((h, k), (g, k), (g, u))]
        cap, sinks = more.get("softcap", 0.0), torch.zeros(h, device=device) if more.get("sinks") else None
        run = lambda op, see=see, scale=k**-0.5, cap=cap: lambda q, k, v, *sink: op(q, k, v, see, scale, cap, *sink)
        mask = see.mask(T, T, h, device)
        flops = 2 * (k + u) * mask.sum().item() * B * h // (mask.shape[0] * mask.shape[1])
        read = leaves[0].element_size() * B * T * (h + g) * (k + u)
        peers = flash_peers(see, T, k**-0.5, cap) if gpu and not see.pattern and sinks is None else {}
        leaves += [] if sinks is None else [sinks]
        yield Case("flash " + kind, f"{B}x{h}x{T}x{k}", run(flash), run(flash_ref), peers, tuple(leaves), (),
                   (flops, 5 * flops // 2), (read, 2 * read))


# ---- decayed_attention (linear attention whose past fades at a fixed pace a head) ----

def decayed_attention_ref(q_BTHK, k_BTHK, v_BTHU, slope_H, state_BHKU=None, doc_BT=None, doc_before_B=None, tile=64):
    """y_t = sum_{s <= t, same document} e^{-slope (t - s)} (q_t . k_s) v_s + e^{-slope (t + 1)} q_t . state -> y [B, T, H, U]
    and the state after the last token [B, H, K, U]. doc_before_B: the document that the state belongs to, by default the first.

    The pairs of a tile of C tokens directly, all before it through the state [LA2 alg 1]: all tiles at once but for the states,
    and the T mod C last tokens as a shorter tile. bfloat16 is multiplied and returned as it is, all else and the state in
    float32 or wider."""
    (B, T, H, K), U, full = q_BTHK.shape, v_BTHU.shape[-1], q_BTHK.shape[1] // tile * tile
    wide, y = torch.promote_types(q_BTHK.dtype, torch.float32), []
    kind, slope_H111 = q_BTHK.dtype if q_BTHK.dtype == torch.bfloat16 else wide, slope_H.to(wide).view(H, 1, 1, 1)
    state_BHKU = q_BTHK.new_zeros(B, H, K, U, dtype=wide) if state_BHKU is None else state_BHKU.to(wide)
    docs = torch.zeros(1, T, device=q_BTHK.device) if doc_BT is None else doc_BT             # one row of one document for all
    end = docs[:, 0] if doc_BT is None or doc_before_B is None else doc_before_B
    for first, last, C in ((0, full, tile), (full, T, T - full)):
        if first == last:
            continue
        q_BHNCK, k_BHNCK, v_BHNCU = (x[:, first:last].to(kind).unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4).contiguous()
                                     for x in (q_BTHK, k_BTHK, v_BTHU))
        doc = docs[:, None, first:last, None].unflatten(2, (-1, C))                          # [B, 1, N, C, 1]
        before, end = torch.cat([end.view(-1, 1, 1, 1, 1), doc[:, :, :-1, -1:]], 2), doc[:, :, -1, -1]
        # what is left, at token t of a tile, of what token s <= t wrote and of the state; at its end, of token s and the state
        i_C1 = torch.arange(C, device=q_BTHK.device, dtype=wide)[:, None]
        left = lambda steps, same: ((-slope_H111 * steps).exp() * same).to(kind)             # [B, H, N, C, .]
        pair, old = left((i_C1 - i_C1.T).clamp(min=0), (doc == doc.mT).tril()), left(i_C1 + 1, doc == before)
        new, kept = left(C - 1 - i_C1, doc == doc[:, :, :, -1:]), (-slope_H111 * C).exp() * (doc[:, :, :, -1:] == before)
        with no_autocast(q_BTHK):
            states, written = [state_BHKU], ((k_BHNCK * new).mT @ v_BHNCU).to(wide)
            for write_BHKU, share in zip(written.unbind(2), kept.unbind(2)):
                states.append(torch.addcmul(write_BHKU, states[-1], share))
            state_BHKU, old_BHNKU = states[-1], torch.stack(states[:-1], 2).to(kind)
            y_BHNCU = (q_BHNCK @ k_BHNCK.mT).mul_(pair) @ v_BHNCU
            y_BHNCU += (q_BHNCK @ old_BHNKU).mul_(old)
        y.append(y_BHNCU.permute(0, 2, 3, 1, 4).flatten(1, 2))
    return torch.cat(y, 1), state_BHKU


@jit
def _decayed_sweep(a_ptr, b_ptr, c_ptr, slope_ptr, doc_ptr, start_ptr, ends_ptr, y_ptr, last_ptr, T, H, K, U, SPAN,
                   REVERSE: tl.constexpr, DOCS: tl.constexpr, OUTPUT: tl.constexpr,
                   BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_U: tl.constexpr):
    # grid (blocks of U, spans, B H): a program walks its span tile by tile, its columns of the state in registers all the way,
    # so a, b, c and y pass once; blocks of one span are neighbours in the grid and find each other's a and b in the L2 cache.
    # y_t = a_t M_t, M_t = e^-slope M_{t-1} + b_t c_t^T. REVERSE: time runs backward, and the state fades after the reading, not
    # before the writing. Not OUTPUT: only the state that a span adds, one [K, U] for each span but the last.
    span, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, h, spans = head // H, head % H, tl.num_programs(1)
    slope = tl.load(slope_ptr + h).to(tl.float32)
    i_C, col_K, col_U = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    ahead_CC = (i_C[:, None] - i_C[None, :]).to(tl.float32)
    left_CC = tl.where(ahead_CC >= 0, tl.exp(-slope * tl.maximum(ahead_CC, 0.0)), 0.0)       # of s at t, in every tile the same
    cell_KU, keep_KU = col_K[:, None] * U + col_U[None, :], (col_K[:, None] < K) & (col_U[None, :] < U)
    doc_ptr += row * (T + 2)                        # of the token before, of all tokens, of the last again
    M_KU = tl.zeros([BLOCK_K, BLOCK_U], dtype=tl.float32)
    if OUTPUT:                                      # the state at the start of the span, from what each span before it adds
        M_KU += tl.load(start_ptr + head * K * U + cell_KU, mask=keep_KU, other=0.0).to(tl.float32)
        for i in range(0, span):
            kept = tl.exp(-slope * SPAN)
            if DOCS:
                before = tl.load(doc_ptr + (T + 1 - i * SPAN if REVERSE else i * SPAN))
                final = tl.load(doc_ptr + (T + 1 - (i + 1) * SPAN if REVERSE else (i + 1) * SPAN))
                kept = tl.where(final == before, kept, 0.0)
            M_KU = M_KU * kept + tl.load(ends_ptr + (head * (spans - 1) + i) * K * U + cell_KU, mask=keep_KU, other=0.0)
    for start in range(span * SPAN, tl.minimum(T, (span + 1) * SPAN), BLOCK_C):
        n = tl.minimum(T - start, BLOCK_C)          # tokens of this tile
        time_C = start + i_C
        keep_C1, place_C = (time_C < T)[:, None], T - 1 - time_C if REVERSE else time_C
        line_C1 = ((row * T + place_C) * H + h)[:, None]
        b_CK = tl.load(b_ptr + line_C1 * K + col_K[None, :], mask=keep_C1 & (col_K[None, :] < K), other=0.0)
        c_CU = tl.load(c_ptr + line_C1 * U + col_U[None, :], mask=keep_C1 & (col_U[None, :] < U), other=0.0)
        share_CC = left_CC
        old_C = tl.exp(-slope * (i_C + 1 - REVERSE).to(tl.float32))
        new_C = tl.exp(-slope * tl.maximum(n - 1 - i_C + REVERSE, 0).to(tl.float32))         # to the last token, not to C
        kept = tl.exp(-slope * n)
        if DOCS:
            doc_C = tl.load(doc_ptr + 1 + place_C, mask=time_C < T, other=0)
            before = tl.load(doc_ptr + (T + 1 - start if REVERSE else start))
            final = tl.load(doc_ptr + (T + 1 - start - n if REVERSE else start + n))
            share_CC = tl.where(doc_C[:, None] == doc_C[None, :], left_CC, 0.0)
            old_C, new_C = tl.where(doc_C == before, old_C, 0.0), tl.where(doc_C == final, new_C, 0.0)
            kept = tl.where(final == before, kept, 0.0)
        if OUTPUT:
            a_CK = tl.load(a_ptr + line_C1 * K + col_K[None, :], mask=keep_C1 & (col_K[None, :] < K), other=0.0)
            y_CU = _dot(a_CK, M_KU.to(a_CK.dtype)) * old_C[:, None]
            y_CU += _dot((_dot(a_CK, tl.trans(b_CK)) * share_CC).to(c_CU.dtype), c_CU)
            tl.store(y_ptr + line_C1 * U + col_U[None, :], y_CU, mask=keep_C1 & (col_U[None, :] < U))
        M_KU = M_KU * kept + _dot(tl.trans((b_CK.to(tl.float32) * new_C[:, None]).to(c_CU.dtype)), c_CU)
    if OUTPUT:
        if span == spans - 1:
            tl.store(last_ptr + head * K * U + cell_KU, M_KU, mask=keep_KU)
    else:
        tl.store(ends_ptr + (head * spans + span) * K * U + cell_KU, M_KU, mask=keep_KU)


def span_length(T, programs, x):
    """Tokens that one program walks: the whole row, where rows, heads and blocks give each processor two programs. Else the row
    is cut, and a first sweep over b and c finds the state that each span adds: half as many bytes more, no idle processors."""
    cuts = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count // programs if x.is_cuda else 1
    return max(512, triton.cdiv(T, max(1, cuts)))


def _sweep(a_BTHK, b_BTHK, c_BTHU, slope_H, state_BHKU, doc_BP, reverse, kind):
    """y_t = a_t M_t with M_t = e^-slope M_{t-1} + b_t c_t^T from a given state, in either direction -> y, the last M."""
    (B, T, H, K), U, BLOCK_K = a_BTHK.shape, c_BTHU.shape[-1], max(16, triton.next_power_of_2(a_BTHK.shape[-1]))
    BLOCK_C, BLOCK_U = 64 if BLOCK_K <= 128 else 32, 16 if U <= 16 else 32 if U % 64 or BLOCK_K > 128 else 64
    blocks = triton.cdiv(U, BLOCK_U)
    SPAN = triton.cdiv(span_length(T, B * H * blocks, a_BTHK), BLOCK_C) * BLOCK_C
    spans = triton.cdiv(T, SPAN)
    y_BTHU, last_BHKU = torch.empty_like(c_BTHU, dtype=kind), torch.empty_like(state_BHKU)
    ends_BHNKU = last_BHKU.new_empty(B, H, spans - 1, K, U)
    for OUTPUT, n in ((False, spans - 1), (True, spans)):
        if n:
            _decayed_sweep[(blocks, n, B * H)](
                a_BTHK, b_BTHK, c_BTHU, slope_H, slope_H if doc_BP is None else doc_BP, state_BHKU, ends_BHNKU, y_BTHU, last_BHKU,
                T, H, K, U, SPAN, REVERSE=reverse, DOCS=doc_BP is not None, OUTPUT=OUTPUT, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K,
                BLOCK_U=BLOCK_U, num_warps=8 if BLOCK_K >= 128 else 4, num_stages=2)
    return y_BTHU, last_BHKU


@torch.library.custom_op("flatlm::decayed_attention", mutates_args=())
def _decayed_attention(q_BTHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHU: torch.Tensor, slope_H: torch.Tensor,
                       state_BHKU: torch.Tensor, doc_BP: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """doc_BP: the document of the state, those of the T tokens, the last again. Triton only: decayed_attention sees to that."""
    kind = state_BHKU.dtype if v_BTHU.dtype == torch.float16 else v_BTHU.dtype               # sums overflow float16
    return _sweep(q_BTHK, k_BTHK, v_BTHU, slope_H, state_BHKU, doc_BP, False, kind)


@_decayed_attention.register_fake
def _(q_BTHK, k_BTHK, v_BTHU, slope_H, state_BHKU, doc_BP):
    kind = state_BHKU.dtype if v_BTHU.dtype == torch.float16 else v_BTHU.dtype
    return torch.empty_like(v_BTHU, dtype=kind), torch.empty_like(state_BHKU)


@torch.library.custom_op("flatlm::decayed_attention_backward", mutates_args=())
def _decayed_attention_backward(
        dy_BTHU: torch.Tensor, dlast_BHKU: torch.Tensor, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHU: torch.Tensor,
        slope_H: torch.Tensor, state_BHKU: torch.Tensor, doc_BP: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq_t = M_t dy_t asks what was written with v, and k answers: the same sweep with the roles changed. dk and dv read the
    adjoint state, e^-slope D_{t+1} + q_t dy_t^T, so for them it runs backward.                                    [LA2 alg 2]"""
    dy_BTHU = dy_BTHU.to(v_BTHU.dtype).contiguous()
    sweep = lambda a, b, c, state, reverse: _sweep(a, b, c, slope_H, state.contiguous(), doc_BP, reverse, q_BTHK.dtype)
    dq_BTHK, _ = sweep(dy_BTHU, v_BTHU, k_BTHK, state_BHKU.mT, False)
    dk_BTHK, _ = sweep(v_BTHU, dy_BTHU, q_BTHK, dlast_BHKU.mT, True)
    dv_BTHU, dstate_BHKU = sweep(k_BTHK, q_BTHK, dy_BTHU, dlast_BHKU, True)
    if doc_BP is not None:
        dstate_BHKU *= (doc_BP[:, 0] == doc_BP[:, 1])[:, None, None, None]
    return dq_BTHK, dk_BTHK, dv_BTHU, dstate_BHKU


@_decayed_attention_backward.register_fake
def _(dy_BTHU, dlast_BHKU, q_BTHK, k_BTHK, v_BTHU, slope_H, state_BHKU, doc_BP):
    return torch.empty_like(q_BTHK), torch.empty_like(k_BTHK), torch.empty_like(v_BTHU), torch.empty_like(state_BHKU)


def _decayed_attention_grad(ctx, dy_BTHU, dlast_BHKU):
    dq_BTHK, dk_BTHK, dv_BTHU, dstate_BHKU = _decayed_attention_backward(dy_BTHU, dlast_BHKU, *ctx.saved_tensors)
    return dq_BTHK, dk_BTHK, dv_BTHU, None, dstate_BHKU, None


_decayed_attention.register_autograd(
    _decayed_attention_grad, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def decayed_attention(q_BTHK, k_BTHK, v_BTHU, slope_H, state_BHKU=None, doc_BT=None, doc_before_B=None, tile=64):
    """Linear attention with a fixed decay a head; the slopes are constants. Same signature and value as decayed_attention_ref,
    which runs where Triton does not, for heads wider than 256, whose state fills the registers, and for float32, whose exact
    products know no tensor cores: cuBLAS has better ones. The kernel's tile is its own."""
    (B, _, H, K), U = q_BTHK.shape, v_BTHU.shape[-1]
    if not takes_triton(q_BTHK) or max(K, U) > 256 or q_BTHK.element_size() > 2 and not INTERPRET:
        return decayed_attention_ref(q_BTHK, k_BTHK, v_BTHU, slope_H, state_BHKU, doc_BT, doc_before_B, tile)
    if state_BHKU is None:
        state_BHKU = torch.zeros(B, H, K, U, device=q_BTHK.device)
    doc_BP = doc_BT
    if doc_BT is not None:
        begin = doc_BT[:, :1] if doc_before_B is None else doc_before_B[:, None]
        doc_BP = torch.cat([begin, doc_BT, doc_BT[:, -1:]], 1).expand(B, -1).contiguous()
    return _decayed_attention(*(x.contiguous() for x in (q_BTHK, k_BTHK, v_BTHU)), slope_H.float(), state_BHKU.contiguous(), doc_BP)


def bench_linear(device, dtype, quick):
    shapes = [(8, 1024, 12, 64, 0), (8, 2048, 16, 128, 0), (2, 16384, 16, 128, 0), (1, 65536, 16, 128, 0), (2, 16384, 16, 128, 1000)]
    peers = {}
    if device == "cuda" and (gla := peer("fla.ops.simple_gla")) and (retention := peer("fla.ops.retention")):
        peers = {"fla simple_gla": lambda q, k, v, slope, *_: gla.chunk_simple_gla(q, k, v, g_gamma=-slope, scale=1.0)[0],
                 "fla retention": lambda q, k, v, *_: retention.chunk_retention(q, k, v, scale=1.0)[0]}      # slopes of its own
    for B, T, H, K, length in shapes[1::2] if quick else shapes:
        B, T, H, K = (B, T, H, K) if device == "cuda" else (1, 128, 2, 32)
        torch.manual_seed(0)
        leaves = [torch.randn(B, T, H, K, device=device, dtype=dtype) for _ in range(3)]
        slope_H = torch.exp2(-8 / H * torch.arange(1, H + 1, device=device))                 # those of the first Lightning layer
        doc_BT = (torch.arange(T, device=device) // length).expand(B, T) if length else None
        size, flops = B * T * H * K * leaves[0].element_size(), 4 * B * T * H * K * (64 + K)
        yield Case("decayed_attention", f"{B}x{T}x{H}x{K}" + " docs" * bool(length), lambda *a: decayed_attention(*a)[0],
                   lambda *a: decayed_attention_ref(*a)[0], {} if length else peers, leaves, (slope_H, None, doc_BT),
                   (flops, 3 * flops), (4 * size, 7 * size))


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


# ---- adamw_ (what does a bfloat16 weight need to learn without a float32 copy?) ----

# A step of AdamW is often smaller than half the distance between two bfloat16 numbers; rounded to the nearest it is lost,
# every time. Rounded up with probability equal to the part that is cut off, it arrives on average.                  [SR]

def rounding_key(seed, step):
    """Two 32-bit words, a hash of (seed, step). Odd, because triton compiles a further kernel for multiples of 16."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return tuple(int.from_bytes(digest[i:i + 4], "little", signed=True) | 1 for i in (0, 4))


@jit
def _mix(x):
    # int32 -> int32, one to one; each input bit flips each output bit half of the time (constants: C. Wellons, lowbias32).
    # Wrapping products and shifts with their sign masked off: torch runs this very function and gets the same bits
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


mix = getattr(_mix, "fn", _mix)                                  # the Python function under triton.jit, for tensors of torch


def random_words(n, key, offset=0, device=None):
    """[n] int32; word i is a hash of (key, offset + i). No state: any slice can be drawn anywhere and again."""
    at = torch.arange(offset, offset + n, device=device)
    return mix(mix(at.to(torch.int32) ^ key[0]) ^ (at >> 32).to(torch.int32) ^ key[1])


def _round_with(x, words):
    """float32 -> bfloat16: add the low 16 bits of `words` to the 16 bits that go, keep the rest. Sign and magnitude are
    apart, so both signs round alike; inf has nothing to carry; NaN would carry into its sign and is written as NaN."""
    bits = x.view(torch.int32) + (words & 0xFFFF)
    return torch.where(x.isnan(), 0x7FC0, bits >> 16).to(torch.int16).view(torch.bfloat16)


def stochastic_round(x, key, offset=0):
    """float32 -> bfloat16, up with probability (x - below) / (above - below). Element i uses word offset + i of the key."""
    return _round_with(x, random_words(x.numel(), key, offset, x.device).view_as(x))


def _adamw_scalars(step, lr, beta1, beta2, weight_decay):
    """What is the same for every element: decay of p, length of the step, 1 / sqrt of v's correction.          [AdamW alg 2]"""
    return 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5


def adamw_ref(p, g, m, v, step, lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, clip=None, seed=0, offset=0):
    """One step (the first is 1) in place on p, m, v; the gradient is read as clip * g. Computed in float32 or wider; those of
    p, m, v that are bfloat16 are rounded stochastically, each with other bits of the words offset .. offset + p.numel()."""
    if torch.float16 in (p.dtype, m.dtype, v.dtype):
        raise ValueError("adamw_ rounds to bfloat16 or keeps float32; weights and moments in float16 are neither: use bfloat16")
    wide = torch.promote_types(p.dtype, torch.float32)
    decay, length, correct = _adamw_scalars(step, lr, beta1, beta2, weight_decay)
    g32 = g.to(wide) if clip is None else g.to(wide) * clip.to(wide)
    m32 = m.to(wide) * beta1 + g32 * (1 - beta1)
    v32 = v.to(wide) * beta2 + g32 * g32 * (1 - beta2)
    root = v32.double().sqrt().to(wide)              # torch's float32 root is off by one bit in a fifth of all cases
    p32 = p.to(wide) * decay - m32 / (root * correct + eps) * length                                 # [AdamW alg 2]
    words = random_words(p.numel(), rounding_key(seed, step), offset, p.device).view(p.shape)
    for x, x32, word in ((p, p32, words), (m, m32, words >> 16), (v, v32, mix(words))):
        x.copy_(_round_with(x32, word) if x.dtype == torch.bfloat16 else x32)


@jit
def _store_rounded(ptr, x_B, word_B, keep_B):
    if ptr.dtype.element_ty == tl.bfloat16:
        bits_B = x_B.to(tl.int32, bitcast=True) + (word_B & 0xFFFF)
        x_B = tl.where(x_B != x_B, 0x7FC0, bits_B >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(ptr, x_B, mask=keep_B)


@jit
def _adamw_step(p_ptr, g_ptr, m_ptr, v_ptr, clip_ptr, n, offset, key0, key1, decay, length, correct, beta1, rest1, beta2,
                rest2, eps, BLOCK: tl.constexpr):
    # grid (n / BLOCK,): every byte of p, g, m, v is read once and every byte of p, m, v written once. Launched without fused
    # multiply-add and with roots and quotients rounded to nearest, so that the bits are those of adamw_ref
    i_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep_B = i_B < n
    clip = tl.load(clip_ptr).to(tl.float32)         # a pointer, so that the host need not wait for the norm of the gradients
    g_B = tl.load(g_ptr + i_B, mask=keep_B, other=0.0).to(tl.float32) * clip
    m_B = tl.load(m_ptr + i_B, mask=keep_B, other=0.0).to(tl.float32) * beta1 + g_B * rest1
    v_B = tl.load(v_ptr + i_B, mask=keep_B, other=0.0).to(tl.float32) * beta2 + g_B * g_B * rest2
    p_B = tl.load(p_ptr + i_B, mask=keep_B, other=0.0).to(tl.float32) * decay
    p_B = p_B - tl.div_rn(m_B, tl.sqrt_rn(v_B) * correct + eps) * length
    at_B = offset + i_B
    word_B = _mix(_mix(at_B.to(tl.int32) ^ key0) ^ (at_B >> 32).to(tl.int32) ^ key1)
    _store_rounded(p_ptr + i_B, p_B, word_B, keep_B)
    _store_rounded(m_ptr + i_B, m_B, word_B >> 16, keep_B)
    _store_rounded(v_ptr + i_B, v_B, _mix(word_B), keep_B)


@torch.library.custom_op("flatlm::adamw_", mutates_args=("p", "m", "v"))
def adamw_(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int, lr: float, beta1: float = 0.9,
           beta2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0, clip: torch.Tensor | None = None, seed: int = 0,
           offset: int = 0) -> None:
    """adamw_ref as one kernel: 14 bytes a weight where p, g, m, v are bfloat16. An optimizer calls it under no_grad for each of
    its (contiguous, local) weights, with m and v of its state, zeros at first, its count of steps, clip = clamp(max_norm / norm,
    max=1) left as a scalar tensor, and as offset the number of weights before p. A resumed run needs no more than seed and step.
    For bfloat16 weights: float32 ones on a CPU are better served by torch's fused AdamW."""
    p, g, m, v, n = p.view(-1), g.reshape(-1), m.view(-1), v.view(-1), p.numel()
    if not takes_triton(p):
        for i in range(0, n, 1 << 16):                           # a piece at a time: its float32 copies stay in cache
            pgmv = (x[i:i + (1 << 16)] for x in (p, g, m, v))
            adamw_ref(*pgmv, step, lr, beta1, beta2, eps, weight_decay, clip, seed, offset + i)
        return
    scalars = (*_adamw_scalars(step, lr, beta1, beta2, weight_decay), beta1, 1 - beta1, beta2, 1 - beta2, eps)
    clip = torch.ones((), device=p.device) if clip is None else clip
    _adamw_step[(triton.cdiv(n, 2048),)](p, g, m, v, clip, n, offset, *rounding_key(seed, step), *scalars, BLOCK=2048, num_warps=8,
                                         enable_fp_fusion=False)


adamw_.register_fake(lambda *_, **__: None)                      # writes its arguments, returns nothing


# ---- newton_schulz (Muon: the nearest orthogonal matrix, by products alone) ----

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315        # x <- a x + b (x x^T) x + c (x x^T)^2 x: steepest at small singular values  [Muon]


def newton_schulz_ref(g, steps=5, eps=1e-7, dtype=torch.bfloat16):
    """[..., F, D] -> u s v^T with every s near 1, in `dtype`; operation by operation what torch.optim.Muon computes. [Muon]"""
    if g.ndim > 2:
        return torch.stack([newton_schulz_ref(each, steps, eps, dtype) for each in g])
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[0] > g.shape[1]
    x_RC = g.to(dtype, copy=True).T if tall else g.to(dtype, copy=True)     # wide, so that x x^T is the smaller square
    x_RC.div_(x_RC.norm().clamp(min=eps))                                   # no singular value above 1
    for _ in range(steps):
        gram_RR = x_RC @ x_RC.T
        poly_RR = torch.addmm(gram_RR, gram_RR, gram_RR, beta=b, alpha=c)
        x_RC = torch.addmm(x_RC, poly_RR, x_RC, beta=a)
    return x_RC.T if tall else x_RC


@jit
def _symmetric_product(x_ptr, y_ptr, out_ptr, R, C, alpha, beta, ADD: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    # out = alpha x x^T (+ beta y, symmetric too). grid (tiles, tiles, L): tiles above the diagonal stop at once, those below
    # write their transpose there as well, so half of the multiplications are done
    i, j, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j > i:
        return
    row_B, col_B = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    x_ptr += matrix * R * C
    out_BB = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, C, DEPTH):
        k_K = start + tl.arange(0, DEPTH)
        x_BK = tl.load(x_ptr + row_B[:, None] * C + k_K[None, :], mask=(row_B < R)[:, None] & (k_K < C)[None, :], other=0.0)
        x_KB = tl.load(x_ptr + col_B[None, :] * C + k_K[:, None], mask=(col_B < R)[None, :] & (k_K < C)[:, None], other=0.0)
        out_BB += _dot(x_BK, x_KB)
    out_BB *= alpha
    keep_BB = (row_B < R)[:, None] & (col_B < R)[None, :]
    if ADD:
        y_BB = tl.load(y_ptr + matrix * R * R + row_B[:, None] * R + col_B[None, :], mask=keep_BB, other=0.0)
        out_BB += beta * y_BB.to(tl.float32)
    out_ptr += matrix * R * R
    tl.store(out_ptr + row_B[:, None] * R + col_B[None, :], out_BB, mask=keep_BB)
    if i != j:
        tl.store(out_ptr + col_B[:, None] * R + row_B[None, :], tl.trans(out_BB), mask=tl.trans(keep_BB))


def _symmetric(x_LRC, alpha=1.0, y_LRR=None, beta=0.0):
    L, R, C = x_LRC.shape
    BLOCK, DEPTH = (128 if R > 1024 else 64, 64) if x_LRC.element_size() == 2 else (64, 32)
    out_LRR, tiles = x_LRC.new_empty(L, R, R), triton.cdiv(R, BLOCK)
    _symmetric_product[(tiles, tiles, L)](x_LRC, y_LRR, out_LRR, R, C, alpha, beta, ADD=y_LRR is not None, BLOCK=BLOCK, DEPTH=DEPTH,
                                          num_warps=BLOCK // 16, num_stages=3)
    return out_LRR


@torch.library.custom_op("flatlm::newton_schulz", mutates_args=())
def newton_schulz(g: torch.Tensor, steps: int = 5, eps: float = 1e-7, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """newton_schulz_ref of [F, D] or [L, F, D]: L matrices of one shape in one launch. Muon, under no_grad: buf.lerp_(grad, 1 -
    momentum), u = newton_schulz(grad.lerp(buf, momentum)) with equal shapes stacked, p.mul_(1 - lr * weight_decay),
    p.add_(u, alpha=-lr * max(1, F / D)**0.5)."""
    with no_autocast(g):
        if not takes_triton(g):
            return newton_schulz_ref(g, steps, eps, dtype).contiguous()
        a, b, c = NEWTON_SCHULZ
        tall, g_LFD = g.shape[-2] > g.shape[-1], g.reshape(-1, *g.shape[-2:])
        x_LRC = (g_LFD.mT if tall else g_LFD).to(dtype).contiguous()
        x_LRC = x_LRC / torch.linalg.vector_norm(x_LRC, dim=(1, 2), keepdim=True).clamp(min=eps)
        for _ in range(steps):
            gram_LRR = _symmetric(x_LRC)
            poly_LRR = _symmetric(gram_LRR, c, gram_LRR, b)      # gram is symmetric: gram gram is gram gram^T
            x_LRC = torch.baddbmm(x_LRC, poly_LRR, x_LRC, beta=a)
        return (x_LRC.mT.contiguous() if tall else x_LRC).view(g.shape)


@newton_schulz.register_fake
def _(g, steps=5, eps=1e-7, dtype=torch.bfloat16):
    return g.new_empty(g.shape, dtype=dtype)


# ---- fp8_matmul (how do eight bits hold a product?) ----

# e4m3 spans 2^-9 .. 448 with four significant bits. One outlier would push everything that shares its scale to zero, so
# few values share one: 128 along the summed axis for activations and gradients, 128 x 128 for weights.   [DSV3 sec 3.3]
TILE, E4M3_MAX = 128, 448.0


def quantise_fp8_ref(x_MD, rows):
    """-> q [M, D] float8_e4m3fn, float32 scales [I, J], one for each `rows` x 128 values (1: tiles, 128: blocks), x ~ q scale."""
    M, D = x_MD.shape
    I, J = -(-M // rows), -(-D // TILE)
    wide = torch.promote_types(x_MD.dtype, torch.float32)
    x_IRJT = F.pad(x_MD.to(wide), (0, J * TILE - D, 0, I * rows - M)).view(I, rows, J, TILE)
    scale_IJ = x_IRJT.abs().amax((1, 3)).float().clamp(min=1e-30) / E4M3_MAX           # of zeros: any, but not zero
    q_MD = (x_IRJT / scale_IJ[:, None, :, None]).to(torch.float8_e4m3fn).view(I * rows, J * TILE)[:M, :D].contiguous()
    return q_MD, scale_IJ


def dequantise_fp8(q_MD, scale_IJ, rows, dtype=torch.float32):
    (M, D), spread = q_MD.shape, scale_IJ.repeat_interleave(rows, 0).repeat_interleave(TILE, 1)
    return q_MD.to(dtype) * spread[:M, :D].to(dtype)


def _rounded(x_MD, rows):
    return dequantise_fp8(*quantise_fp8_ref(x_MD, rows), rows, torch.promote_types(x_MD.dtype, torch.float32))


class _Fp8Reference(torch.autograd.Function):
    """y = x w^T, dx = dy w, dw = dy^T x, each factor rounded in tiles along the axis that is summed.       [DSV3 sec 3.3]"""
    @staticmethod
    def forward(ctx, x_MD, w_FD):
        ctx.save_for_backward(x_MD, w_FD)
        return (_rounded(x_MD, 1) @ _rounded(w_FD, TILE).T).to(x_MD.dtype)

    @staticmethod
    def backward(ctx, dy_MF):
        x_MD, w_FD = ctx.saved_tensors
        dx_MD, dw_FD = _rounded(dy_MF, 1) @ _rounded(w_FD, TILE), _rounded(dy_MF.T, 1) @ _rounded(x_MD.T, 1).T
        return dx_MD.to(x_MD.dtype), dw_FD.to(w_FD.dtype)


fp8_matmul_ref = _Fp8Reference.apply


@jit
def _quantise_tiles(x_ptr, q_ptr, scale_ptr, M, D, stride_m, stride_d, J, GROUP: tl.constexpr, TILE: tl.constexpr):
    # grid (M / 128, J): the square is read once, in x's own strides, so a transposed x costs no copy
    row_B = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    col_T = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep_BT = (row_B < M)[:, None] & (col_T < D)[None, :]
    x_BT = tl.load(x_ptr + row_B[:, None] * stride_m + col_T[None, :] * stride_d, mask=keep_BT, other=0.0).to(tl.float32)
    high_B = tl.max(tl.abs(x_BT), 1)
    if GROUP > 1:
        high_B = tl.zeros([TILE], dtype=tl.float32) + tl.max(high_B, 0)
    scale_B = tl.div_rn(tl.maximum(high_B, 1e-30), 448.0)
    tl.store(q_ptr + row_B[:, None] * D + col_T[None, :], tl.div_rn(x_BT, scale_B[:, None]).to(tl.float8e4nv), mask=keep_BT)
    tl.store(scale_ptr + row_B // GROUP * J + tl.program_id(1), scale_B, mask=row_B < M)     # a block's rows write the same


@jit
def _fp8_product(a_ptr, sa_ptr, b_ptr, sb_ptr, out_ptr, M, N, D, J, GROUP: tl.constexpr, TILE: tl.constexpr):
    # out = a b^T, grid (M / 128, N / 128). The tensor cores sum eight-bit products in about 14 bits, so each dot starts from
    # zero, covers 128 of the summed axis, and is scaled and added in float32 registers.                     [DSV3 sec 3.3]
    row_B = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    col_N = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    out_BN = tl.zeros([TILE, TILE], dtype=tl.float32)
    for j in range(0, J):
        k_K = j * TILE + tl.arange(0, TILE)
        a_BK = tl.load(a_ptr + row_B[:, None] * D + k_K[None, :], mask=(row_B < M)[:, None] & (k_K < D)[None, :], other=0.0)
        b_KN = tl.load(b_ptr + col_N[None, :] * D + k_K[:, None], mask=(col_N < N)[None, :] & (k_K < D)[:, None], other=0.0)
        sa_B = tl.load(sa_ptr + row_B * J + j, mask=row_B < M, other=0.0)
        sb_N = tl.load(sb_ptr + col_N // GROUP * J + j, mask=col_N < N, other=0.0)
        out_BN += _dot(a_BK, b_KN) * (sa_B[:, None] * sb_N[None, :])
    tl.store(out_ptr + row_B[:, None] * N + col_N[None, :], out_BN, mask=(row_B < M)[:, None] & (col_N < N)[None, :])


def takes_fp8(x):
    """Hopper and later multiply e4m3 and have room for these tiles; other GPUs run the emulation, as CPUs do."""
    return takes_triton(x) and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0))


def quantise_fp8(x_MD, rows):
    """quantise_fp8_ref in one pass over x, which may be a transposed view."""
    if not takes_fp8(x_MD):
        return quantise_fp8_ref(x_MD, rows)
    (M, D), J = x_MD.shape, triton.cdiv(x_MD.shape[1], TILE)
    q_MD = torch.empty(M, D, device=x_MD.device, dtype=torch.float8_e4m3fn)
    scale_IJ = torch.empty(triton.cdiv(M, rows), J, device=x_MD.device, dtype=torch.float32)
    _quantise_tiles[(triton.cdiv(M, TILE), J)](x_MD, q_MD, scale_IJ, M, D, *x_MD.stride(), J, GROUP=rows, TILE=TILE, num_warps=8)
    return q_MD, scale_IJ


def _scaled_product(a_MD, sa_MJ, b_ND, sb_IJ, rows, dtype):
    """a b^T of two quantised matrices in `dtype`; b has a scale for each `rows` rows."""
    (M, D), N = a_MD.shape, len(b_ND)
    if not takes_fp8(a_MD):
        wide = torch.promote_types(dtype, torch.float32)
        return (dequantise_fp8(a_MD, sa_MJ, 1, wide) @ dequantise_fp8(b_ND, sb_IJ, rows, wide).T).to(dtype)
    out_MN = torch.empty(M, N, device=a_MD.device, dtype=dtype)
    _fp8_product[(triton.cdiv(M, TILE), triton.cdiv(N, TILE))](a_MD, sa_MJ, b_ND, sb_IJ, out_MN, M, N, D, sa_MJ.shape[1],
                                                               GROUP=rows, TILE=TILE, num_warps=8, num_stages=4)
    return out_MN


@torch.library.custom_op("flatlm::fp8_matmul", mutates_args=())
def _fp8_matmul(x_MD: torch.Tensor, w_FD: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y, and with `keep` what Wgrad will read: x in bytes, quantised once more along M, half of bfloat16's memory."""
    with no_autocast(x_MD):
        y_MF = _scaled_product(*quantise_fp8(x_MD, 1), *quantise_fp8(w_FD, TILE), TILE, x_MD.dtype)                 # Fprop
        kept, scale = quantise_fp8(x_MD.T if keep else x_MD.new_empty(0, 0), 1)
    return y_MF, kept.view(torch.uint8), scale                   # bytes, because autograd makes zeros for what floats


@_fp8_matmul.register_fake
def _(x_MD, w_FD, keep):
    D, M = (x_MD.shape[1], x_MD.shape[0]) if keep else (0, 0)
    return (x_MD.new_empty(x_MD.shape[0], w_FD.shape[0]), x_MD.new_empty(D, M, dtype=torch.uint8),
            x_MD.new_empty(D, (M + TILE - 1) // TILE, dtype=torch.float32))


@torch.library.custom_op("flatlm::fp8_matmul_backward", mutates_args=())
def _fp8_matmul_backward(dy_MF: torch.Tensor, w_FD: torch.Tensor, kept: torch.Tensor,
                         scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with no_autocast(dy_MF):
        dx_MD = _scaled_product(*quantise_fp8(dy_MF, 1), *quantise_fp8(w_FD.T, TILE), TILE, dy_MF.dtype)            # Dgrad
        if not len(kept):
            return dx_MD, w_FD.new_empty(0)
        x8_DM = kept.view(torch.float8_e4m3fn)
        return dx_MD, _scaled_product(*quantise_fp8(dy_MF.T, 1), x8_DM, scale, 1, w_FD.dtype)                       # Wgrad


@_fp8_matmul_backward.register_fake
def _(dy_MF, w_FD, kept, scale):
    return dy_MF.new_empty(dy_MF.shape[0], w_FD.shape[1]), torch.empty_like(w_FD) if len(kept) else w_FD.new_empty(0)


def _fp8_matmul_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], *output[1:])
    ctx.keep = inputs[2]


def _fp8_matmul_grad(ctx, dy_MF, *_):
    dx_MD, dw_FD = _fp8_matmul_backward(dy_MF, *ctx.saved_tensors)
    return dx_MD, dw_FD if ctx.keep else None, None


_fp8_matmul.register_autograd(_fp8_matmul_grad, setup_context=_fp8_matmul_save)


def fp8_matmul(x_MD, w_FD):
    """x w^T with all three products of a linear layer in blockwise fp8; same signature, value and gradients as fp8_matmul_ref."""
    return _fp8_matmul(x_MD, w_FD, torch.is_grad_enabled() and w_FD.requires_grad)[0]


def linear_fp8(x, w_FD, bias=None):
    """F.linear's stand-in: x [..., D], float32 or bfloat16 weights (quantised as they are), y in x's type, or autocast's.
    V3 keeps embedding, head, router, norms and attention itself wider than this.                          [DSV3 sec 3.3]"""
    x = to_autocast(x)
    y = fp8_matmul(x.reshape(-1, x.shape[-1]), w_FD).view(*x.shape[:-1], len(w_FD))
    return y if bias is None else y + bias.to(y.dtype)


def bench_optim(device, dtype, quick):
    """AdamW moves bytes, the other two multiply. AdamW and Newton-Schulz have no gradient: no leaves, forward only."""
    cpu, draw = device == "cpu", lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    n, L, R, D = (1 << 20, 2, 128, 256) if cpu else (1 << 26, 8, 2048, 4096 if quick else 8192)
    pgmv, wide = (draw(n), draw(n), draw(n) * 0, draw(n) * 0), torch.nn.Parameter(draw(n).float())
    wide.grad, fused = pgmv[1].float(), torch.optim.AdamW([wide], lr=1e-5, fused=True)
    ours, peers = lambda p, *gmv: adamw_(p, *gmv, 1, 1e-5) or p, {"fused float32": lambda *_: fused.step() or wide}
    ref = lambda *pgmv: adamw_ref(*(copies := [x.clone() for x in pgmv]), 1, 1e-5) or copies[0]
    yield Case("adamw", f"{n}", ours, ref, peers, (), pgmv, (0, 0), (7 * n * dtype.itemsize, 0))
    ours, ref = partial(newton_schulz, dtype=dtype), partial(newton_schulz_ref, dtype=dtype)

    def plain(x):                                                # batched, whole products
        x, (a, b, c) = x / x.norm(dim=(1, 2), keepdim=True), NEWTON_SCHULZ
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

    peers = {"bmm": plain} | ({} if cpu else {"bmm compiled": torch.compile(plain)})
    yield Case("newton_schulz", f"{L}x{R}x{R}", ours, ref, peers, (), (draw(L, R, R),), (20 * L * R**3, 0), (0, 0))
    leaves, peers = (draw(D, D), draw(D, D) / D**0.5), {"F.linear": F.linear}
    yield Case("fp8_matmul", f"{D}x{D}x{D}", fp8_matmul, fp8_matmul_ref, peers, leaves, (), (2 * D**3, 4 * D**3), (0, 0))


# ---- Start-up (what should a run that compiles nothing not wait for?) ----

def skip_dynamo():
    """torch's optimizers and custom ops import torch.compile's machinery at their first call, a second or two, only to tell
    it to leave them alone. In a run that compiles nothing there is nobody to tell: mark these functions as told, and take
    the wrapper that imports it off AdamW's step."""
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer = torch.optim.Optimizer
    told = [optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict]
    for op in (value for value in globals().values() if isinstance(value, torch.library.CustomOpDef)):
        told += op._backend_fns.values()
    for function in told:
        if wrapped := getattr(function, "__wrapped__", None):
            vars(wrapped).setdefault("__dynamo_disable", wrapped)


# ---- Demo and bench (how right is each kernel, and how fast beside what people use?) ----

BENCHES = {                        # part -> f(device, dtype, quick), which yields Cases
    "rows": bench_rows,
    "cross entropy": bench_linear_cross_entropy,
    "flash": bench_flash,
    "linear": bench_linear,
    "moe": bench_moe,
    "optim": bench_optim,
}
ERROR_FLOOR = 1e-6                 # an error below it is no error, whatever the reference's


def rel_error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def tensors(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def upstream(out):
    """A gradient for out that differs from place to place, exact in every type; 1 for a loss."""
    ramp = torch.arange(out.numel(), device=out.device).view(out.shape) % 17 - 8
    return torch.ones_like(out) if out.numel() == 1 else (ramp / 8).to(out.dtype)


def value_and_grads(function, leaves, rest, dtype=None):
    """What function(*leaves, *rest) returns, and the gradient of every leaf; in `dtype`, all leaves made so. Without leaves
    the floats of the rest are made so, and there is no gradient."""
    to = lambda t: t.to(dtype or t.dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
    leaves, rest = [to(leaf.detach()).requires_grad_() for leaf in leaves], rest if leaves else [to(t) for t in rest]
    outs = tensors(function(*leaves, *rest))
    if graph := [out for out in outs if out.requires_grad]:
        torch.autograd.backward(graph, [upstream(out) for out in graph])
    return [out.detach() for out in outs] + [leaf.grad for leaf in leaves if leaf.grad is not None]


def errors(case):
    """[(ours, the reference's in the same type)] of every value and gradient, against the reference in float64."""
    want = value_and_grads(case.ref, case.leaves, case.rest, torch.float64)
    both = (value_and_grads(f, case.leaves, case.rest) for f in (case.ours, case.ref))
    return [(rel_error(ours, exact), rel_error(ref, exact)) for ours, ref, exact in zip(*both, want)]


def samples(functions, device, rounds=0, seconds=1.0):
    """[times in ms, sorted] of each function, called in turn so that a change of clock or load meets all of them: 5 to 100 rounds,
    as many as fit `seconds`. On a GPU between events, the L2 cache swept before each; on a CPU the time of all its threads, over as
    many calls as take 20 ms, since the kernel counts another thread's time in ticks of up to 4 ms."""
    times, cuda = [[] for _ in functions], torch.device(device).type == "cuda"
    sweep = torch.empty(256 << 20, dtype=torch.int8, device=device) if cuda else None

    def once(function, calls=1):
        if not cuda:
            start = time.process_time()
            for _ in range(calls):
                function()
            return (time.process_time() - start) * 1e3 / calls
        sweep.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    for function in functions:                                   # compile, tune, fill the allocator
        once(function)
    total = sum(map(once, functions))
    calls = 1 if cuda else max(1, int(20 * len(functions) / max(total, 1e-3)))
    rounds = rounds or min(100, max(5, int(seconds * 1e3 / (total * calls))))
    for _ in range(rounds):
        for function, kept in zip(functions, times):
            kept.append(once(function, calls))
    return [sorted(kept) for kept in times]


def best_ms(functions, device, rounds=20):
    """Median time of each function in ms."""
    return [kept[len(kept) // 2] for kept in samples(functions, device, rounds)]


def copy_rate(device):
    """Bytes a second that a copy reads and writes."""
    x = torch.ones((1 << 28) if device == "cuda" else 1 << 24, device=device)
    y = torch.empty_like(x)
    return 8 * len(x) / best_ms([lambda: y.copy_(x)], device)[0] * 1e3


def matmul_rate(device, dtype):
    """FLOPs a second of a large product of random numbers (zeros would draw less power, and so run faster)."""
    n = 8192 if device == "cuda" else 1024
    x, y = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / best_ms([lambda: x @ y], device)[0] * 1e3


def passes(case):
    """{"fwd", "bwd", "f+b": function -> what to time}. Where backward has no work of its own (bytes and FLOPs 0) only the last."""
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
    run = lambda f: tensors(f(*leaves, *case.rest))
    graph = lambda f: [out for out in run(f) if out.requires_grad]
    grads = lambda outs, ups, **how: torch.autograd.grad(outs, leaves, ups, allow_unused=True, **how)
    if not leaves or not (ups := [upstream(out) for out in graph(case.ours)]):
        return {"fwd": lambda f: lambda: run(f)}
    both = {"f+b": lambda f: lambda: grads(graph(f), ups)}
    return both if not (case.flops[1] or case.bytes[1]) else {
        "fwd": lambda f: lambda: run(f), "bwd": lambda f: (lambda outs: lambda: grads(outs, ups, retain_graph=True))(graph(f))} | both


def rivals(case, device, quick):
    """{name: function}: the case's peers, the reference and, on a GPU, that compiled; without those that do not run here."""
    found = {"reference": case.ref} | case.peers
    if device == "cuda" and not quick:
        torch._dynamo.reset()
        modes = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}
        found |= {name: torch.compile(case.ref, mode=mode, dynamic=False) for name, mode in modes.items()}
    for name, function in list(found.items()):
        try:
            value_and_grads(function, case.leaves, case.rest)
        except Exception as error:                               # of somebody else's code anything may come
            print(f"  {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}")
            del found[name]
    return found


def rows_of(case, device, quick, rates):
    """Yield a row {column: value} for each pass of a case: correctness first, and no time for what is wrong."""
    row = dict(kernel=case.name, shape=str(case.shape))
    ratios = [ours / max(ref, ERROR_FLOOR / 2) for ours, ref in errors(case)]
    if not max(ratios) <= 2:                                     # a nan fails, too
        yield row | {"pass": "FAIL", "err/ref": max(ratios)}
        return
    peers = rivals(case, device, quick)
    for i, (name, timed) in enumerate(passes(case).items()):
        if quick and name == "bwd":
            continue
        ours, *theirs = samples([timed(f) for f in (case.ours, *peers.values())], device, seconds=0.5 if quick else 2.0)
        p20, ms, p80 = (ours[int(len(ours) * q)] for q in (0.2, 0.5, 0.8))
        part = {"fwd": slice(0, 1), "bwd": slice(1, 2), "f+b": slice(0, 2)}[name]
        least = {bound: sum(n or 0 for n in work[part]) / rate * 1e3 for bound, work, rate in
                 zip(("copy", "gemm"), (case.bytes, case.flops), rates)}
        bound = max(least, key=least.get)
        medians = {peer: times[len(times) // 2] for peer, times in zip(peers, theirs)}
        best = min(medians, key=medians.get)
        yield row | {"pass": name, "ms": ms, "p20": p20, "p80": p80, "bound": bound, "of bound": least[bound] / ms,
                     "err/ref": max(ratios), "best peer ms": medians[best], "best peer": best, "ratio": medians[best] / ms}


def bench(device, quick, only, file):
    """Print the table, a row a pass; `file` gets them as JSON lines. -> number of cases that FAIL."""
    failed, copy = 0, copy_rate(device)
    print("ms: median, " + ("events, L2 swept" if device == "cuda" else "processor time of all threads")
          + ", all in turn; of bound: the least time by copy or matmul over ours; err/ref: largest over value and gradients\n")
    for dtype in (torch.bfloat16,) if quick or device == "cuda" else (torch.float32, torch.bfloat16):
        matmul = matmul_rate(device, dtype)
        print(f"{str(dtype)[6:]}: copy {copy / 1e9:,.1f} GB/s | matmul {matmul / 1e12:,.2f} TFLOP/s\n"
              f"{'kernel':22s} {'shape':26s} pass {'ms':>9s} {'[p20':>9s} {'p80]':>9s} bound of bound err/ref {'best peer ms':>12s} ratio", flush=True)
        for case in (case for part in only for case in BENCHES[part](device, dtype, quick)):
            for row in rows_of(case, device, quick, (copy, matmul)):
                line = f"{row['kernel']:22s} {row['shape']:26s} {row['pass']:4s} "
                failed += row["pass"] == "FAIL"
                print(line + (f"error {row['err/ref']:.1f} times the reference's" if row["pass"] == "FAIL" else
                      f"{row['ms']:9.3f} {row['p20']:9.3f} {row['p80']:9.3f} {row['bound']:5s} {row['of bound']:8.2f} {row['err/ref']:7.1f} "
                      f"{row['best peer ms']:12.3f} {row['ratio']:5.2f} {row['best peer']}"), flush=True)
                if file:
                    with open(file, "a") as out:
                        out.write(json.dumps(row | dict(dtype=str(dtype)[6:], device=device_name(device), torch=torch.__version__)) + "\n")
        print(f"matmul at the end {matmul_rate(device, dtype) / matmul:.2f} of that at the start: the clock " "of this table\n")
    return failed


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def main(argv):
    parser = Parser(prog="kernels.py", usage="kernels.py [--bench [part ...] [--quick] [--json=FILE]]",
                    description="Errors of every kernel against float64, and their times beside what PyTorch users write.")
    parser.add_argument("parts", nargs="*", help=f"of these alone: {', '.join(BENCHES)}")
    parser.add_argument("--bench", action="store_true", help="time them")
    parser.add_argument("--quick", action="store_true", help="small shapes, fewer passes and rounds")
    parser.add_argument("--json", metavar="FILE", default="", help="append each row as a JSON line")
    args = parser.parse_args(argv)
    if wrong := [part for part in args.parts if part not in BENCHES]:
        raise UsageError(f"there is no part {wrong[0]!r} to bench; use one of {list(BENCHES)}")
    if INTERPRET and args.bench:
        raise UsageError("--bench would time Triton's interpreter; run it without TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device_name(device)} | torch {torch.__version__} | triton {triton.__version__ if triton else '--'} | kernels: {use(_choice)}")
    if args.bench:
        return bench(device, args.quick, args.parts or BENCHES, args.json)
    print(f"relative error against float64, the largest over the value and each gradient\n\n{'op':22s} {'shape':26s} {'type':9s} {'error':>8s} {'torch':>8s}")
    for part in args.parts or BENCHES:
        for dtype in (torch.float32,) if INTERPRET else (torch.float32, torch.bfloat16):         # whose bfloat16 is wrong
            case = next(BENCHES[part](device, dtype, True))
            ours, ref = (max(column) for column in zip(*errors(case)))
            print(f"{case.name:22s} {str(case.shape):26s} {str(dtype)[6:]:9s} {ours:8.1e} {ref:8.1e}", flush=True)


if __name__ == "__main__":
    run_cli(main)
