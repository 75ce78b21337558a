"""Kernels: which loops are worth writing by hand?

A step of training is matrix products, which the libraries do well, and everything between them, which moves bytes.
A kernel here exists where fewer bytes move than in any chain of library calls, and each stands beside a plain PyTorch
reference with the same signature, which is its definition and its test; without Triton torch's own ops compute it.

    rmsnorm               y_i = x_i w_i / sqrt(mean_j x_j^2 + eps)            x is read once, one float a row is kept  [RMS eq 4]
    linear_cross_entropy  sum_m weight_m (log sum_v exp(l_mv) - l_m,target)   with l = x w^T, and l never stored:
                          d/dl_mv = weight_m (softmax(l)_mv - [v = target])   a chunk of rows at a time, gradient included

Every op is a torch.library custom op with a fake and an autograd formula, so that eager mode, torch.compile(fullgraph)
and Triton's interpreter (TRITON_INTERPRET=1, which needs no GPU) all run it.

Contents:    dispatch | rmsnorm | linear_cross_entropy | start-up | demo and bench
Shapes:      M rows (B T flattened), D n_embd, V vocab
References:
    [RMS]    Root Mean Square Layer Normalization, arXiv:1910.07467
    [Liger]  Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv:2410.10989
Run me:      python kernels.py             (errors of every op against float64)
             python kernels.py --bench     (times beside PyTorch's own, on this device)
"""
import inspect
import os
import time
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


# ---- Start-up (what should a run that compiles nothing not wait for?) ----

def skip_dynamo():
    """torch's optimizers and custom ops import torch.compile's machinery at their first call, a second or two, only to tell
    it to leave them alone. In a run that compiles nothing there is nobody to tell: mark these functions as told, and take
    the wrapper that imports it off AdamW's step."""
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer = torch.optim.Optimizer
    told = [optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict]
    for op in (_rmsnorm, _rmsnorm_backward, _linear_cross_entropy):
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
