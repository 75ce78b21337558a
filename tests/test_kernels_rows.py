import itertools

import pytest
import torch

import kernels as K
from conftest import failure_with_triton

f64 = dict(dtype=torch.float64)


def angles(B, T, P, layout, dtype=torch.float64):
    """cos and sin as attention.Rope keeps them."""
    angle = torch.randn(B, T, 1, P // 2, dtype=torch.float64)
    pair = -2 if layout == "half" else -1
    return [torch.stack(two, pair).flatten(-2).to(dtype) for two in ([angle.cos()] * 2, [-angle.sin(), angle.sin()])]


def values_and_grads(function, leaves, rest=(), seed=1):
    """Values, then the gradient of every leaf under random gradients of the values."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, *rest)
    out = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(y.shape, generator=g).half().to(y) for y in out]                 # the same in every type
    return [y.detach() for y in out] + list(torch.autograd.grad(out, leaves, upstream))


def turned_slowly(x_BTHK, gain, cos, sin, layout, eps=1e-6):
    """One head of one token at a time, one pair of channels at a time."""
    y_BTHK, P = x_BTHK.clone(), cos.shape[-1]
    for b, t, h in itertools.product(*map(range, x_BTHK.shape[:3])):
        x = x_BTHK[b, t, h]
        if gain is not None:
            x = x / (x @ x / len(x) + eps) ** 0.5 * gain                                 # [RMS eq 4]
        y = x.clone()
        for j in range(P // 2):
            i, k = (j, j + P // 2) if layout == "half" else (2 * j, 2 * j + 1)
            c, s = cos[b % len(cos), t, 0, k], sin[b % len(sin), t, 0, k]
            y[i], y[k] = x[i] * c - x[k] * s, x[k] * c + x[i] * s                        # [RoPE eq 13]
        y_BTHK[b, t, h] = y
    return y_BTHK


ROPES = [("half", 6, 6), ("half", 6, 4), ("interleaved", 6, 6), ("interleaved", 10, 4)]     # layout, head width, turned width


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout, width, P", ROPES)
def test_qk_norm_rope_equals_the_slow_turn(layout, width, P, norm):
    torch.manual_seed(0)
    q, k, cos_sin = torch.randn(2, 3, 3, width, **f64), torch.randn(2, 3, 1, width, **f64), angles(1, 3, P, layout)
    gains = [torch.randn(width, **f64) for _ in range(2)] if norm else [None, None]
    for function in (K.qk_norm_rope_ref, K.qk_norm_rope, torch.ops.flatlm.qk_norm_rope):
        for got, x, gain in zip(function(q, k, *gains, *cos_sin, layout, 1e-6), (q, k), gains):
            torch.testing.assert_close(got, turned_slowly(x, gain, *cos_sin, layout))


def test_gates_equal_their_formulas():
    x, up = torch.linspace(-4, 4, 41, **f64), torch.randn(41, **f64)
    phi, sig = 0.5 * (1 + torch.erf(x / 2**0.5)), 1 / (1 + torch.exp(-x))
    tanh = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    want = {"glu": sig, "bilinear": x, "reglu": x.clamp(min=0), "geglu": x * phi, "geglu_tanh": tanh, "swiglu": x * sig}
    assert want.keys() == K.GATES.keys()
    for kind, act in want.items():
        torch.testing.assert_close(K.gated_ref(x, up, kind), act * up)


def cases(layout="half", M=7, D=5, dtype=torch.float64):
    """name: (op, reference, leaves, rest)"""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    (q, k), gains, cos_sin = (draw(2, 7, 3, 10), draw(2, 7, 2, 10)), [draw(10), draw(10)], angles(2, 7, 4, layout, dtype)
    bare = lambda f: lambda q, k, *rest: f(q, k, None, None, *rest)
    op = lambda name: lambda *args: getattr(torch.ops.flatlm, name)(*args)
    made = {"rmsnorm": (K.rmsnorm, K.rmsnorm_ref, [draw(M, D), draw(D)], []),
            "add_rmsnorm": (K.add_rmsnorm, K.add_rmsnorm_ref, [draw(M, D), draw(M, D), draw(D)], []),
            "rope": (bare(op("qk_norm_rope")), bare(K.qk_norm_rope_ref), [q, k], [*cos_sin, layout, 1e-6]),
            "qk_norm_rope": (op("qk_norm_rope"), K.qk_norm_rope_ref, [q, k, *gains], [*cos_sin, layout, 1e-6])}
    return made | {kind: (op("gated"), K.gated_ref, [draw(M, D), draw(M, D)], [kind]) for kind in K.GATES}


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_ops_equal_their_references(dtype, tol, layout):
    for name, (op, ref, leaves, rest) in cases(layout, dtype=dtype).items():
        for got, want in zip(values_and_grads(op, leaves, rest), values_and_grads(ref, leaves, rest)):
            torch.testing.assert_close(got, want, rtol=tol, atol=tol, msg=lambda m: f"{name}: {m}")


def test_the_gate_keeps_its_inputs_alone():
    kept = []
    gate, up = (torch.randn(300, 1000, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        K.gated(gate, up, "swiglu")
    assert set(kept) == {gate.data_ptr(), up.data_ptr()}
    got, want = (values_and_grads(f, [gate, up], ["swiglu"]) for f in (K.gated, K.gated_ref))       # more than one piece of cache
    torch.testing.assert_close(got, want)


def test_the_stream_keeps_its_type_under_autocast():
    """float32 stream, half-precision branch: the sum is float32, what the products read is not, each gradient has its leaf's type."""
    x, r, w = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, total = K.add_rmsnorm(x, r, w)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    (y.float().sum() + total.square().sum()).backward()
    assert (x.grad.dtype, r.grad.dtype, w.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(r.grad, x.grad.bfloat16())


def test_opcheck():
    c = cases(dtype=torch.float32)
    leaves = lambda name: [leaf.requires_grad_() for leaf in c[name][2]]
    x, r, w = leaves("add_rmsnorm")
    q, k, *gains = leaves("qk_norm_rope")
    for op, args in (("rmsnorm", (x, r, w, 1e-6, torch.float32)), ("rmsnorm", (x, None, w, 1e-6, torch.bfloat16)),
                     ("qk_norm_rope", (q, k, *gains, *c["rope"][3])), ("qk_norm_rope", (q, k, None, None, *c["rope"][3])),
                     ("gated", (*leaves("swiglu"), "swiglu"))):
        torch.library.opcheck(getattr(torch.ops.flatlm, op).default, args)


def test_compiled_whole():
    for name, (op, ref, leaves, rest) in cases(dtype=torch.float32).items():
        if name in ("add_rmsnorm", "qk_norm_rope", "swiglu"):
            compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
            for got, want in zip(values_and_grads(compiled, leaves, rest), values_and_grads(ref, leaves, rest)):
                torch.testing.assert_close(got, want)


def test_bench_rows_yields_cases_that_run():
    for case in K.bench_rows("cpu", torch.float32, True):
        for got, want in zip(values_and_grads(case.ours, case.leaves, case.rest), values_and_grads(case.ref, case.leaves, case.rest)):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


# ---- Triton: interpreted, compiled ahead, and on a GPU ----

INTERPRETED = """
import sys; sys.path.insert(0, "tests")
import torch, kernels as K, test_kernels_rows as rows
assert K.use("triton") == "triton (interpreted)"
error = lambda got, want: ((got.double() - want).norm() / want.norm().clamp(min=1.0)).item()
for layout, M, D in (("half", 1, 1), ("interleaved", 37, 130)):
    for name in rows.cases():
        for dtype in (torch.float32, torch.float16):
            op, ref, leaves, rest = rows.cases(layout, M, D, dtype)[name]
            exact = rows.values_and_grads(ref, [x.double() for x in leaves], [x.double() if torch.is_tensor(x) else x for x in rest])
            got, theirs = rows.values_and_grads(op, leaves, rest), rows.values_and_grads(ref, leaves, rest)
            for ours, plain, want in zip(got, theirs, exact):
                limit = 2e-6 if dtype == torch.float32 else 2 * error(plain, want) + 1e-5
                assert error(ours, want) <= limit, (name, dtype, layout, M, D, error(ours, want), limit)
q, k, (cos, sin) = torch.randn(2, 5, 3, 20)[..., 4:], torch.randn(2, 5, 24)[:, :, None, 8:], rows.angles(1, 5, 16, "half", torch.float32)
torch.testing.assert_close(K.qk_norm_rope(q, k, None, None, cos, sin), K.qk_norm_rope_ref(q, k, None, None, cos, sin))     # views of wider rows
x = torch.randn(4, 6)
compiled = torch.compile(lambda x, r, w: K.add_rmsnorm(x, r, w), fullgraph=True, backend="aot_eager")
for got, want in zip(rows.values_and_grads(compiled, [x, x, x[0]]), rows.values_and_grads(K.add_rmsnorm_ref, [x, x, x[0]])):
    torch.testing.assert_close(got, want)
"""


@pytest.mark.peer
def test_row_kernels_interpreted():
    assert not failure_with_triton(INTERPRETED, interpret=True)


AHEAD = """
import inspect, kernels as K, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
jobs = []
for D in (128, 768, 8192):
    sizes = K.row_blocks(D)
    warps = sizes.pop("num_warps")
    jobs += [(kernel, warps, sizes | dict(ADD=True)) for kernel in (K._rmsnorm_fwd, K._rmsnorm_bwd)]
for HALF in (True, False):
    sizes = dict(K=128, P=128 if HALF else 64, HALF=HALF, BLOCK_H=16, BLOCK_J=64, NORM=True)
    jobs += [(K._qk_norm_rope_rows, 4, sizes | dict(BACK=BACK)) for BACK in (False, True)]
jobs += [(kernel, 4, dict(KIND=kind, BLOCK_N=2048)) for kind in K.GATES for kernel in (K._gated_fwd, K._gated_bwd)]
for kernel, warps, constants in jobs:
    of = lambda name: "*fp32" if name in ("w_ptr", "rstd_ptr", "dw_ptr", "wq_ptr", "wk_ptr") else "*bf16" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32"
    signature = {name: "constexpr" if name in constants else of(name) for name in inspect.signature(kernel.fn).parameters}
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind not in ("constexpr", "fp32")}
    for arch, most in ((80, 163), (90, 227)):
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps))
        assert made.asm["ptx"] and made.metadata.shared <= most << 10, kernel
        assert ".v4" in made.asm["ptx"] or "rope" not in kernel.fn.__name__, "heads are read two bytes at a time"
"""


@pytest.mark.peer
def test_row_kernels_compile_ahead_for_gpus():
    assert not failure_with_triton(AHEAD, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_the_gpu(dtype):
    K.use("triton")
    for case in K.bench_rows("cuda", dtype, True):
        double = lambda values: [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in values]
        run = lambda f, leaves, rest: [y.cpu() for y in values_and_grads(f, leaves, rest)]
        exact, theirs = run(case.ref, double(case.leaves), double(case.rest)), run(case.ref, case.leaves, case.rest)
        got, again = (run(case.ours, case.leaves, case.rest) for _ in range(2))
        for ours, other, plain, want in zip(got, again, theirs, exact):
            assert torch.equal(ours, other), f"{case.name} is not deterministic"
            scale = want.norm().clamp(min=1.0)
            assert (ours.double() - want).norm() / scale <= 2 * (plain.double() - want).norm() / scale + 1e-5, case.name
