"""Kernels: which loops are worth writing by hand?

A step of training is matrix products, which the libraries do well, and everything between them, which moves bytes.
A kernel here exists where fewer bytes move than in any chain of library calls, and each stands beside a plain PyTorch
reference with the same signature, which is its definition and its test; without Triton torch's own ops compute it.

    rmsnorm               y_i = x_i w_i / sqrt(mean_j x_j^2 + eps)            x is read once, one float a row is kept  [RMS eq 4]
    linear_cross_entropy  sum_m weight_m (log sum_v exp(l_mv) - l_m,target)   with l = x w^T, and l never stored:
                          d/dl_mv = weight_m (softmax(l)_mv - [v = target])   a chunk of rows at a time, gradient included
    adamw_                w <- round up with probability (x - below) / (above - below): bfloat16 weights learn        [SR]
    newton_schulz         x <- a x + b (x x^T) x + c (x x^T)^2 x              half of x x^T, the rest is its mirror  [Muon]
    fp8_matmul            y ~ sum_j s_mj t_fj (q_m . r_f over tile j of 128)  eight bits, a scale to every 128  [DSV3 sec 3.3]

Every op is a torch.library custom op with a fake and an autograd formula, so that eager mode, torch.compile(fullgraph)
and Triton's interpreter (TRITON_INTERPRET=1, which needs no GPU) all run it.

Contents:    dispatch | rmsnorm | linear_cross_entropy | adamw_ | newton_schulz | fp8_matmul | start-up | demo and bench
Shapes:      M rows (B T flattened), D n_embd, V vocab, F outputs, L matrices, R C short and long side of one, I J tiles of 128
References:
    [RMS]    Root Mean Square Layer Normalization, arXiv:1910.07467
    [Liger]  Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989
    [AdamW]  Decoupled Weight Decay Regularization, arXiv:1711.05101
    [SR]     Revisiting BFloat16 Training, arXiv:2010.06192
    [Muon]   Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
    [DSV3]   DeepSeek-V3 Technical Report, arXiv:2412.19437
Run me:      python kernels.py             (errors of every op against float64)
             python kernels.py --bench     (times beside PyTorch's own, on this device)
"""
import hashlib
import inspect
import os
import time
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

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
    for op in (_rmsnorm, _rmsnorm_backward, _linear_cross_entropy, adamw_, newton_schulz,
               _fp8_matmul, _fp8_matmul_backward):
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
