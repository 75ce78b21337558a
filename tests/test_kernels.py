import json
import subprocess
import sys

import pytest
import torch

import kernels as K
from conftest import ROOT, failure_with_triton
from tokenizer import UsageError


def cases(device, dtype, M, D, V):
    """name -> (ours, reference, inputs that need gradients, other inputs)."""
    torch.manual_seed(0)
    x_MD, w_D, w_VD = torch.randn(M, D).to(device, dtype), torch.randn(D).to(device), torch.randn(V, D).to(device) / D**0.5
    rest = torch.randint(V, (M,)).to(device), torch.rand(M).to(device)
    return {"rmsnorm": (K.rmsnorm, K.rmsnorm_ref, (x_MD, w_D), ()),
            "linear_cross_entropy": (K.linear_cross_entropy, K.linear_cross_entropy_ref, (x_MD, w_VD), rest)}


@pytest.mark.parametrize("M, D", [(1, 1), (3, 7), (5, 63), (2, 257)])
def test_rmsnorm_equals_the_paper(M, D):
    torch.manual_seed(0)
    x_MD, w_D = torch.randn(M, D), torch.randn(D)
    want_MD = torch.stack([x * w_D / ((x @ x) / D + 1e-6) ** 0.5 for x in x_MD])     # [RMS eq 4] by row
    torch.testing.assert_close(K.rmsnorm_ref(x_MD, w_D), want_MD)
    torch.testing.assert_close(K.rmsnorm(x_MD, w_D), want_MD)


def slow_cross_entropy(x_MD, w_VD, targets_M, weights_M):
    total = x_MD.new_zeros(())
    for x, t, weight in zip(x_MD, targets_M, weights_M):
        logits = torch.stack([x @ w for w in w_VD])
        total = total - weight * (logits[t] - logits.exp().sum().log())
    return total


@pytest.mark.parametrize("M, D, V", [(1, 1, 2), (7, 5, 3), (300, 8, 13)])
@pytest.mark.parametrize("function", [K.linear_cross_entropy_ref, K.linear_cross_entropy])
def test_linear_cross_entropy_equals_the_slow_sum(M, D, V, function, monkeypatch):
    """Value and both gradients, over several ragged chunks, with rows of weight zero and an upstream factor."""
    monkeypatch.setattr(K, "chunk_rows", lambda x, V: 128)
    torch.manual_seed(M)
    x_MD, w_VD = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((M, D), (V, D)))
    targets_M, weights_M = torch.randint(V, (M,)), torch.rand(M, dtype=torch.float64) * (torch.rand(M) > 0.3)
    want = torch.autograd.grad(slow_cross_entropy(x_MD, w_VD, targets_M, weights_M) * 0.37, (x_MD, w_VD))
    loss = function(x_MD, w_VD, targets_M, weights_M)
    torch.testing.assert_close(loss, slow_cross_entropy(x_MD, w_VD, targets_M, weights_M))
    for got, expected in zip(torch.autograd.grad(loss * 0.37, (x_MD, w_VD)), want):
        torch.testing.assert_close(got, expected)


def test_extreme_logits_stay_finite():
    x_MD = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    w_VD = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    loss = K.linear_cross_entropy(x_MD, w_VD, torch.tensor([1, 1]), torch.ones(2))
    loss.backward()
    assert loss.item() == 2e4 and x_MD.grad.isfinite().all() and w_VD.grad.isfinite().all()


def test_autocast_runs_the_products_in_half_precision_and_keeps_float32_gradients():
    torch.manual_seed(0)
    x_MD, w_VD = torch.randn(64, 32), torch.randn(50, 32, requires_grad=True)
    rest = (torch.randint(50, (64,)), torch.ones(64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = K.linear_cross_entropy(x_MD, w_VD, *rest)
    loss.backward()
    assert loss.dtype == torch.float32 and w_VD.grad.dtype == torch.float32
    exact = K.linear_cross_entropy_ref(x_MD, w_VD, *rest)
    assert 0 < abs(loss - exact) < 0.02 * exact


def test_dispatch_says_what_runs_and_refuses_what_cannot(monkeypatch):
    monkeypatch.setattr(K, "_choice", "auto")
    assert K.use("torch") == "torch"
    if not torch.cuda.is_available() and not K.INTERPRET:
        assert K.use("auto").startswith("torch (")
        with pytest.raises(UsageError, match="--kernels=torch"):
            K.use("triton")


def fake_case(dtype, factor, **changed):
    x_MD = torch.randn(40, 8, dtype=dtype)
    case = K.Case("twice", "40x8", lambda x: factor * x, lambda x: 2 * x, {"mul": lambda x: x.mul(2), "absent": lambda x: x.nothing()}, (x_MD,),
                  (), (320, 320), (640, 640))
    return case._replace(**changed)


def test_bench_prints_times_of_what_is_right_and_none_of_what_is_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(K, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(K, "matmul_rate", lambda device, dtype: 1e11)
    f = dict(right=2.0, wrong=2.1)
    monkeypatch.setattr(K, "BENCHES", {part: lambda device, dtype, quick, part=part: iter([fake_case(dtype, f[part])]) for part in f})
    K.main(["--bench", f"--json={tmp_path}/rows.jsonl"])
    lines, rows = capsys.readouterr().out.splitlines(), [json.loads(line) for line in open(f"{tmp_path}/rows.jsonl")]
    assert [row["pass"] for row in rows] == ["fwd", "bwd", "f+b", "FAIL"] * 2 and sum("FAIL" in line for line in lines) == 2
    assert all("ms" not in row for row in rows if row["pass"] == "FAIL")
    assert any("absent does not run here: AttributeError" in line for line in lines)
    for row in rows[:3]:                                         # 1.28 kB each way at 1 GB/s
        least = 640 / 1e9 * 1e3 * (2 if row["pass"] == "f+b" else 1)
        assert row["bound"] == "copy" and abs(row["of bound"] * row["ms"] - least) < 1e-9 and row["best peer"] in ("mul", "reference")
    with pytest.raises(UsageError, match="wrong"):
        K.main(["--bench", "elsewhere"])


def test_a_bench_knows_what_has_no_backward():
    half = torch.bfloat16
    assert list(K.passes(fake_case(half, 2.0))) == ["fwd", "bwd", "f+b"]
    assert list(K.passes(fake_case(half, 2.0, flops=(320, 0), bytes=(640, 0)))) == ["f+b"]
    assert list(K.passes(fake_case(half, 2.0, leaves=(), rest=(torch.randn(3, 2),)))) == ["fwd"]
    out = K.value_and_grads(lambda x, y: (x * y, y), (torch.randn(3, 2, dtype=half),), (torch.randn(3, 2),), torch.float64)
    assert [t.dtype for t in out] == [torch.float64, torch.float32, torch.float64]      # two values, one gradient
    assert torch.equal(K.upstream(torch.zeros(())), torch.ones(())) and len(K.upstream(torch.zeros(40)).unique()) == 17


def test_works_without_triton():
    """A process where triton cannot be imported still has every op."""
    code = ("import sys; sys.modules['triton'] = None; import torch, kernels as K; assert K.triton is None\n"
            "x = torch.randn(3, 5, requires_grad=True); K.rmsnorm(x, torch.ones(5)).sum().backward()\n"
            "print(K.use('auto'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "not installed" in done.stdout, done.stderr


# ---- Triton: interpreted, compiled ahead, and on a GPU ----

INTERPRETED = """
import sys, torch, kernels as K
sys.path.insert(0, 'tests')
from test_kernels import cases
assert K.use("triton") == "triton (interpreted)"
K.chunk_rows = lambda x, V: 16
for M, D, V in [(1, 1, 3), (3, 7, 5), (5, 63, 130), (37, 65, 300)]:
    for dtype, tol in ((torch.float32, 2e-6), (torch.float16, 4e-3)):
        for op, (ours, ref, leaves, rest) in cases("cpu", dtype, M, D, V).items():
            want = K.value_and_grads(ref, leaves, rest, torch.float64)
            for got, exact in zip(K.value_and_grads(ours, leaves, rest), want):
                error = (got.double() - exact).norm() / max(exact.norm(), 1.0)
                assert error < tol, (op, dtype, M, D, V, error)
x = torch.randn(4, 6, requires_grad=True)
compiled = torch.compile(lambda x, w: K.rmsnorm(x, w).square().sum(), fullgraph=True, backend="aot_eager")
grad, = torch.autograd.grad(compiled(x, torch.ones(6)), x)
want, = torch.autograd.grad(K.rmsnorm_ref(x, torch.ones(6)).square().sum(), x)
torch.testing.assert_close(grad, want)
torch.library.opcheck(torch.ops.flatlm.rmsnorm.default, (x, None, torch.ones(6, requires_grad=True), 1e-6, torch.float32))
"""


@pytest.mark.peer
def test_triton_kernels_interpreted():
    assert not failure_with_triton(INTERPRETED, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(dtype):
    K.use("triton")
    for M, D, V in [(1, 8, 3), (37, 257, 300), (4096, 768, 50304)]:
        for op, (ours, ref, leaves, rest) in cases("cuda", dtype, M, D, V).items():
            want = K.value_and_grads(ref, leaves, rest, torch.float64)
            theirs = K.value_and_grads(ref, leaves, rest)
            for got, plain, exact in zip(K.value_and_grads(ours, leaves, rest), theirs, want):
                scale = exact.norm().clamp(min=1.0)
                assert (got.double() - exact).norm() / scale <= 2 * (plain.double() - exact).norm() / scale + 1e-5, op
            again = K.value_and_grads(ours, leaves, rest)
            assert all(torch.equal(a, b) for a, b in zip(again, K.value_and_grads(ours, leaves, rest))), f"{op} is not deterministic"
