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
import json
import os
import time
from collections import namedtuple
from dataclasses import dataclass

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


def bench_rows(device, dtype, quick):
    for M, D in ((3072, 384),) if device == "cpu" else ((16384, 2048),) if quick else ((16384, 768), (16384, 2048), (16384, 4096)):
        x_MD, w_D, size = torch.randn(M, D, device=device, dtype=dtype), torch.rand(D, device=device) + 0.5, dtype.itemsize
        peers = {"F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w.to(x.dtype), 1e-6)}
        yield Case("rmsnorm", f"{M}x{D}", rmsnorm, rmsnorm_ref, peers, (x_MD, w_D), (), (0, 0), (2 * M * D * size, 3 * M * D * size))


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


def bench_ce(device, dtype, quick):
    def plain(x_MD, w_VD, targets_M, weights_M):
        logits_MV = F.linear(x_MD, w_VD.to(x_MD.dtype)).float()
        return (F.cross_entropy(logits_MV, targets_M, reduction="none") * weights_M).sum()

    gpu = ((16384, 768, 50304),) if quick else ((16384, 768, 50304), (16384, 2048, 50304), (8192, 4096, 131072))
    for M, D, V in gpu if device == "cuda" else ((1024, 128, 2048),):
        x_MD, w_VD = torch.randn(M, D, device=device, dtype=dtype), torch.randn(V, D, device=device) / D**0.5
        rest = torch.randint(V, (M,), device=device), torch.rand(M, device=device)
        yield Case("linear_cross_entropy", f"{M}x{D}x{V}", linear_cross_entropy, linear_cross_entropy_ref, {"F.cross_entropy": plain},
                   (x_MD, w_VD), rest, (6 * M * D * V, 0), (3 * M * D * dtype.itemsize + 4 * D * V, 0))        # no backward of its own


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


# ---- Demo and bench (how right is each kernel, and how fast beside what people use?) ----

BENCHES = {                        # part -> f(device, dtype, quick), which yields Cases
    "rows": bench_rows,
    "cross entropy": bench_ce,
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
    as many as fit `seconds`. On a GPU between events, the L2 cache swept before each; on a CPU the time of all its threads."""
    times, cuda = [[] for _ in functions], torch.device(device).type == "cuda"
    sweep = torch.empty(256 << 20, dtype=torch.int8, device=device) if cuda else None

    def once(function):
        if not cuda:
            start = time.process_time()
            function()
            return (time.process_time() - start) * 1e3
        sweep.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    for function in functions:                                   # compile, tune, fill the allocator
        once(function)
    rounds = rounds or min(100, max(5, int(seconds * 1e3 / sum(map(once, functions)))))
    for _ in range(rounds):
        for function, kept in zip(functions, times):
            kept.append(once(function))
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
