"""Kernels: which loops are worth writing by hand?

A step of training is matrix products, which the libraries do well, and everything between them, which moves bytes.
A kernel here exists where fewer bytes move than in any chain of library calls, and each stands beside a plain PyTorch
reference with the same signature, which is its definition and its test; without Triton torch's own ops compute it.

    rmsnorm               y_i = x_i w_i / sqrt(mean_j x_j^2 + eps)            x is read once, one float a row is kept  [RMS eq 4]
    linear_cross_entropy  sum_m weight_m (log sum_v exp(l_mv) - l_m,target)   with l = x w^T, and l never stored:
                          d/dl_mv = weight_m (softmax(l)_mv - [v = target])   a chunk of rows at a time, gradient included
    decayed_attention     y_t = q_t M_t,  M_t = e^-slope M_{t-1} + k_t v_t^T  M never leaves the registers           [LA2 alg 1]

Every op is a torch.library custom op with a fake and an autograd formula, so that eager mode, torch.compile(fullgraph)
and Triton's interpreter (TRITON_INTERPRET=1, which needs no GPU) all run it.

Contents:    dispatch | rmsnorm | linear_cross_entropy | decayed_attention | start-up | demo and bench
Shapes:      M rows (B T flattened), D n_embd, V vocab, B batch, T tokens, H heads, K query/key head dim, U value head dim, C tile,
             N tiles
References:
    [RMS]    Root Mean Square Layer Normalization, arXiv:1910.07467
    [LA2]    Lightning Attention-2, arXiv:2401.04658
    [Liger]  Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989
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


INTERP = tl.constexpr(INTERPRET) if triton else INTERPRET   # a kernel may read it


@jit
def _dot(a, b):
    # the interpreter multiplies bfloat16 wrongly without a word; float32 inputs are not rounded to tf32
    if INTERP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


Case = namedtuple("Case", "name shape ours ref peers leaves rest flops bytes")       # a row of --bench


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
    (B, T, H, K), U = q_BTHK.shape, v_BTHU.shape[-1]
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
    if device == "cuda":
        try:
            from fla.ops.retention import chunk_retention
            from fla.ops.simple_gla import chunk_simple_gla
            peers = {"fla simple_gla": lambda q, k, v, slope, *_: chunk_simple_gla(q, k, v, g_gamma=-slope, scale=1.0)[0],
                     "fla retention": lambda q, k, v, *_: chunk_retention(q, k, v, scale=1.0)[0]}            # slopes of its own
        except ImportError:
            print("fla is not installed: no peer")
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


# ---- Start-up (what should a run that compiles nothing not wait for?) ----

def skip_dynamo():
    """torch's optimizers and custom ops import torch.compile's machinery at their first call, a second or two, only to tell
    it to leave them alone. In a run that compiles nothing there is nobody to tell: mark these functions as told, and take
    the wrapper that imports it off AdamW's step."""
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer = torch.optim.Optimizer
    told = [optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict]
    for op in (_rmsnorm, _rmsnorm_backward, _linear_cross_entropy, _decayed_attention, _decayed_attention_backward):
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
