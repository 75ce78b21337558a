"""decayed_attention: the tiled reference against the sum written out, and the Triton sweeps against the reference."""
import pytest
import torch

import kernels as K
from attention import recurrence
from conftest import failure_with_triton

EXACT = dict(atol=1e-10, rtol=1e-10)
DOCS = torch.tensor([[0] * 5 + [1] * 19 + [2] * 1 + [3] * 12, [7] * 20 + [8] * 17])     # T = 37, no boundary on a tile's
CASES = [(None, None), (DOCS, None), (DOCS, torch.tensor([0, 5]))]                      # the first row goes on, the second begins

pytestmark = pytest.mark.usefixtures("shapes_checked")


def inputs(T=37, B=2, H=3, KEY=5, U=4, dtype=torch.float64):
    torch.manual_seed(T)
    shapes = (B, T, H, KEY), (B, T, H, KEY), (B, T, H, U), (B, H, KEY, U)
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return leaves, torch.tensor([0.0, 0.03, 1.5], dtype=dtype)


def slow(q_BTHK, k_BTHK, v_BTHU, slope_H, state_BHKU, doc_BT=None, before_B=None):
    """M_t = e^-slope M_{t-1} + k_t v_t^T, y_t = q_t M_t, token by token; nothing passes from one document to the next."""
    y = []
    for t in range(q_BTHK.shape[1]):
        if doc_BT is not None and (t or before_B is not None):
            state_BHKU = state_BHKU * (doc_BT[:, t] == (doc_BT[:, t - 1] if t else before_B))[:, None, None, None]
        state_BHKU = torch.exp(-slope_H)[:, None, None] * state_BHKU + k_BTHK[:, t, :, :, None] * v_BTHU[:, t, :, None]
        y.append((q_BTHK[:, t, :, None] @ state_BHKU)[:, :, 0])
    return torch.stack(y, 1), state_BHKU


def outcome(function, leaves, slope_H, doc_BT, before_B, **more):
    """y, the state, and the gradients of a weighted sum of both."""
    q, k, v, state = leaves
    y, last = function(q, k, v, slope_H, state, doc_BT, before_B, **more)
    torch.manual_seed(0)
    y_weight, last_weight = (torch.randn(x.shape, dtype=torch.float64).to(x) for x in (y, last))
    total = (y * y_weight).sum() + (last * last_weight).sum()
    return [y, last, *torch.autograd.grad(total, leaves)]


def general(q_BTHK, k_BTHK, v_BTHU, slope_H, *rest, **more):
    return recurrence(q_BTHK, k_BTHK, v_BTHU, (-slope_H[:, None]).expand(*q_BTHK.shape[:3], 1), None, *rest, **more)


@pytest.mark.parametrize("docs, before", CASES)
@pytest.mark.parametrize("tile", [1, 4, 16, 37, 64])
@pytest.mark.parametrize("want", [slow, general])
def test_value_and_gradients_equal_the_slow_recurrence(docs, before, tile, want):
    leaves, slope_H = inputs()
    expected = outcome(want, leaves, slope_H, docs, before)
    for got, exact in zip(outcome(K.decayed_attention, leaves, slope_H, docs, before, tile=tile), expected):
        torch.testing.assert_close(got, exact, **EXACT)


@pytest.mark.parametrize("docs, before", CASES)
def test_float32_and_bfloat16(docs, before):
    leaves, slope_H = inputs()
    exact = outcome(slow, leaves, slope_H, docs, before)
    for dtype, tol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        low = [x.detach().to(dtype).requires_grad_() for x in leaves[:3]] + [leaves[3].detach().float().requires_grad_()]
        got = outcome(K.decayed_attention, low, slope_H.float(), docs, before, tile=16)
        assert got[0].dtype == dtype and got[1].dtype == torch.float32
        for a, b in zip(got, exact):
            assert (a.double() - b).norm() < tol * b.norm().clamp(min=1)


def test_strong_decay_neither_overflows_nor_spoils_gradients():
    leaves, slope_H = inputs(dtype=torch.float32)
    for got in outcome(K.decayed_attention, leaves, slope_H * 1e4, None, None):
        assert got.isfinite().all()


def test_compiles_whole():
    leaves, slope_H = inputs(T=9)
    function = lambda q, k, v, state: K.decayed_attention(q, k, v, slope_H, state)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), K.decayed_attention(*leaves[:3], slope_H, leaves[3])[0], **EXACT)


def test_bench_cases_are_whole():
    for case in K.bench_linear("cpu", torch.float32, True):
        want = K.value_and_grads(case.ref, case.leaves, case.rest, torch.float64)
        for got, exact in zip(K.value_and_grads(case.ours, case.leaves, case.rest), want):
            assert K.rel_error(got, exact) < 1e-5


# ---- Triton: interpreted and compiled ahead ----

INTERPRETED = """
import sys; sys.path.insert(0, "tests")
import torch, kernels as K
from test_kernels_linear import outcome, slow
K.use("triton")
K.skip_dynamo()

def check(T, KEY, U, span, docs, dtype, border=0, B=1, H=2):
    torch.manual_seed(T)
    K.span_length = lambda *_: span
    leaves = [torch.randn(*s).to(dtype).requires_grad_() for s in ((B, T, H, KEY), (B, T, H, KEY), (B, T, H, U))]
    leaves.append(torch.randn(B, H, KEY, U, requires_grad=True))
    slope_H = torch.tensor([0.0, 0.3])
    doc_BT = (torch.arange(T)[None] == border if border else torch.rand(B, T) < 0.3).long().cumsum(1) + 3 if docs else None
    before_B = torch.tensor([doc_BT[0, 0] if docs == "goes on" else 99]) if docs else None
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = outcome(K.decayed_attention_ref, wide, slope_H.double(), doc_BT, before_B)
    plain = outcome(slow, [x.detach().to(dtype).requires_grad_() for x in leaves], slope_H.to(dtype), doc_BT, before_B)
    for i, (got, theirs, want) in enumerate(zip(outcome(K.decayed_attention, leaves, slope_H, doc_BT, before_B), plain, exact)):
        error, torchs = ((x.double() - want).norm() / want.norm().clamp(min=1) for x in (got, theirs))
        print(T, KEY, U, docs, dtype, i, f"{error:.1e} {torchs:.1e}")
        assert error < (1e-6 if dtype == torch.float32 else 2 * torchs), (T, KEY, U, docs, i, error.item(), torchs.item())

check(1, 16, 16, 512, "", torch.float32)
check(70, 5, 33, 512, "goes on", torch.float32)
check(130, 17, 16, 64, "begins", torch.float32, border=130 - 64)      # where a span ends that runs backward in time
check(130, 16, 16, 64, "goes on", torch.float16, border=64)
"""

COMPILED = """
import torch, kernels as K
K.use("triton")
q, k, v = (torch.randn(1, 3, 1, n, requires_grad=True) for n in (4, 4, 2))
slope, state, doc = torch.tensor([0.1]), torch.randn(1, 1, 4, 2, requires_grad=True), torch.tensor([[0, 0, 0, 1, 1]])
torch.library.opcheck(torch.ops.flatlm.decayed_attention.default, (q, k, v, slope, state, doc))
compiled = torch.compile(lambda q, k, v: K.decayed_attention(q, k, v, slope)[0].square().sum(), fullgraph=True, backend="aot_eager")
want = torch.autograd.grad(K.decayed_attention_ref(q, k, v, slope)[0].square().sum(), (q, k, v))
for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), want):
    torch.testing.assert_close(a, b)
"""


@pytest.mark.peer
@pytest.mark.parametrize("code", [INTERPRETED, COMPILED], ids=["values", "compiled"])
def test_interpreted(code):
    assert not failure_with_triton(code, interpret=True)


AHEAD = """
import kernels as K, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
ptr, f32 = "*bf16", "*fp32"
types = dict(a_ptr=ptr, b_ptr=ptr, c_ptr=ptr, slope_ptr=f32, doc_ptr="*i64", start_ptr=f32, ends_ptr=f32, y_ptr=ptr, last_ptr=f32,
             **dict.fromkeys(("T", "H", "K", "U", "SPAN"), "i32"))
names = "REVERSE", "DOCS", "OUTPUT", "BLOCK_C", "BLOCK_K", "BLOCK_U"
for values in ((True, True, True, 64, 128, 64), (False, False, True, 32, 256, 32), (False, False, False, 64, 128, 64)):
    fixed = dict(zip(names, values))
    source = ASTSource(K._decayed_sweep, signature=types | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    for arch, limit in ((80, 163), (90, 227)):
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=8, num_stages=2))
        assert made.asm["ptx"] and made.metadata.shared <= limit << 10, (values, arch, made.metadata.shared)
"""


@pytest.mark.peer
def test_compiles_ahead_for_gpus():
    assert not failure_with_triton(AHEAD, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("B, T, H, KEY, U", [(1, 1, 1, 16, 16), (2, 700, 3, 64, 65), (1, 5000, 2, 128, 128), (1, 300, 2, 256, 256)])
def test_on_the_gpu(B, T, H, KEY, U, docs):
    K.use("triton")
    torch.manual_seed(0)
    leaves = [torch.randn(*s, device="cuda").bfloat16().requires_grad_() for s in ((B, T, H, KEY), (B, T, H, KEY), (B, T, H, U))]
    leaves.append(torch.randn(B, H, KEY, U, device="cuda", requires_grad=True))
    slope_H = torch.linspace(0, 0.3, H, device="cuda")
    doc_BT = (torch.rand(B, T, device="cuda") < 0.01).long().cumsum(1) if docs else None
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = outcome(K.decayed_attention_ref, wide, slope_H.double(), doc_BT, None)
    torchs = outcome(K.decayed_attention_ref, leaves, slope_H, doc_BT, None)
    ours, again = (outcome(K.decayed_attention, leaves, slope_H, doc_BT, None) for _ in range(2))
    for got, plain, want in zip(ours, torchs, exact):
        scale = want.norm().clamp(min=1)
        assert (got.double() - want).norm() / scale <= 2 * (plain.double() - want).norm() / scale + 1e-5
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
