"""Kernels: which loops are worth writing by hand?

A step of training is matrix products, which the libraries do well, and everything between them, which moves bytes.
A kernel here exists where fewer bytes move than in any chain of library calls, and each stands beside a plain PyTorch
reference with the same signature, which is its definition and its test; without Triton torch's own ops compute it.

    rmsnorm               y_i = x_i w_i / sqrt(mean_j x_j^2 + eps)            x is read once, one float a row is kept  [RMS eq 4]
    linear_cross_entropy  sum_m weight_m (log sum_v exp(l_mv) - l_m,target)   with l = x w^T, and l never stored:
                          d/dl_mv = weight_m (softmax(l)_mv - [v = target])   a chunk of rows at a time, gradient included
    flash                 y_t = sum_s softmax_s(scale q_t . k_s) v_s          over the keys seen, whose scores are never stored

Every op is a torch.library custom op with a fake and an autograd formula, so that eager mode, torch.compile(fullgraph)
and Triton's interpreter (TRITON_INTERPRET=1, which needs no GPU) all run it.

Contents:    dispatch | rmsnorm | linear_cross_entropy | flash attention | start-up | demo and bench
Shapes:      M rows (B T flattened), D n_embd, V vocab; B batch, T queries, S keys, H heads, G kv heads, K and U widths of q and v
References:
    [RMS]    Root Mean Square Layer Normalization, arXiv:1910.07467
    [Liger]  Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989
    [Flash]  FlashAttention, arXiv:2205.14135; [Flash2] FlashAttention-2, 2307.08691; [ALiBi] 2108.12409
Run me:      python kernels.py             (errors of every op against float64)
             python kernels.py --bench     (times beside PyTorch's own, on this device)
"""
import inspect
import math
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


# ---- Start-up (what should a run that compiles nothing not wait for?) ----

def skip_dynamo():
    """torch's optimizers and custom ops import torch.compile's machinery at their first call, a second or two, only to tell
    it to leave them alone. In a run that compiles nothing there is nobody to tell: mark these functions as told, and take
    the wrapper that imports it off AdamW's step."""
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer = torch.optim.Optimizer
    told = [optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict]
    for op in (_rmsnorm, _rmsnorm_backward, _linear_cross_entropy, _flash, _flash_backward, _flash_decode):
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
