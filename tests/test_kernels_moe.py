"""kernels.py's moe_mlp and moe.py's --dispatch=triton: the reference against the paper, the kernels against the reference."""
import pytest
import torch
import torch.nn.functional as F

import kernels as K
from conftest import failure_with_triton

CASES = """
import torch, torch.nn as nn, kernels as K, moe

def case(M, D, width, E, A, dtype=torch.float32, how="", device="cpu"):
    '''(leaves, visits); how: half of the experts empty, all rows to one, late visits dropped, or rows that came sorted.'''
    torch.manual_seed(M + D)
    expert_MA = torch.stack([torch.randperm(E // 2 if how == "empty" else E)[:A] for _ in range(M)])
    if how == "one":
        expert_MA = torch.full((M, 1), E - 1)
    if how == "sorted":
        expert_MA = expert_MA[:, :1].sort(0).values
    visit_V, count_E = moe.visits(expert_MA, E, capacity=M * A // E * 3 // 4 if how == "dropped" else 0)
    leaves = [torch.randn(M, D, dtype=dtype), torch.rand(expert_MA.shape)]
    leaves += [torch.randn(s, dtype=dtype) / s[2] ** 0.5 for s in ((E, width, D), (E, width, D), (E, D, width))]
    return [leaf.to(device) for leaf in leaves], (visit_V.to(device), count_E.to(device))

def run(op, leaves, visits, dtype=None):
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    y = op(leaves[0], *visits, *leaves[1:])
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).sin().view_as(y).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]

def errors(got, want):
    return [((a.double() - b).norm() / b.norm().clamp(min=1.0)).item() for a, b in zip(got, want)]
"""
exec(CASES)
SHAPES = [(1, 1, 1, 1, 1, ""), (7, 5, 3, 3, 2, ""), (23, 8, 16, 6, 3, "empty"), (9, 4, 6, 3, 1, "one"), (16, 5, 7, 4, 2, "dropped"), (11, 3, 5, 4, 1, "sorted")]


def slow_moe_mlp(x_MD, visit_V, count_E, gate_MA, w_gate_EFD, w_up_EFD, w_down_EDF):
    """[DSV3 eq 12] a visit at a time."""
    rows, A = [torch.zeros_like(x) for x in x_MD], gate_MA.shape[1]
    experts = [e for e, count in enumerate(count_E.tolist()) for _ in range(count)]
    for visit, e in zip(visit_V.tolist(), experts):
        m, a = divmod(visit, A)
        gate, up = w_gate_EFD[e] @ x_MD[m], w_up_EFD[e] @ x_MD[m]
        rows[m] = rows[m] + gate_MA[m, a] * (w_down_EDF[e] @ (gate / (1 + torch.exp(-gate)) * up))
    return torch.stack(rows)


@pytest.mark.parametrize("M, D, width, E, A, how", SHAPES)
def test_moe_mlp_equals_the_paper(M, D, width, E, A, how):
    leaves, visits = case(M, D, width, E, A, how=how)
    assert (visits[1] == 0).any() or how not in ("empty", "one")
    assert len(visits[0]) < leaves[1].numel() or how != "dropped"
    want = run(slow_moe_mlp, leaves, visits, torch.float64)
    for op in (K.moe_mlp_ref, K.moe_mlp):
        for a, b in zip(run(op, leaves, visits, torch.float64), want):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert max(errors(run(op, leaves, visits), want)) < 1e-5
    if how == "sorted":                                           # rows in the order of their experts, with gates of one
        product = lambda x, w: torch.cat([c @ m.T for c, m in zip(x.split(visits[1].tolist()), w)])
        x_VD, _, *w = leaves
        y_VD = product(F.silu(product(x_VD, w[0])) * product(x_VD, w[1]), w[2])
        torch.testing.assert_close(K.moe_mlp(x_VD, *visits, torch.ones(M, 1), *w), y_VD)


def test_autocast_multiplies_in_half_precision_and_keeps_float32_gradients():
    leaves, visits = case(64, 32, 24, 4, 2)
    exact = run(K.moe_mlp_ref, leaves, visits, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(K.moe_mlp, leaves, visits)
    assert all(a.dtype == torch.float32 for a in got) and 1e-4 < max(errors(got, exact)) < 0.02


# ---- Triton: interpreted, compiled ahead, and on a GPU ----

INTERPRETED = CASES + """
assert K.use("triton") == "triton (interpreted)"
for *shape, how in [(1, 16, 16, 4, 2, ""), (7, 5, 3, 3, 2, ""), (60, 72, 66, 4, 2, "empty"), (140, 17, 9, 3, 1, "one"), (40, 24, 8, 4, 2, "dropped"), (37, 8, 16, 4, 1, "sorted")]:
    leaves, visits = case(*shape, how=how)
    want = run(K.moe_mlp_ref, leaves, visits, torch.float64)
    got = run(K.moe_mlp, leaves, visits)
    assert max(errors(got, want)) < 1e-6, (shape, how, errors(got, want))
    assert all((dw[visits[1] == 0] == 0).all() for dw in got[3:])
    leaves, visits = case(*shape, dtype=torch.float16, how=how)
    want = run(K.moe_mlp_ref, leaves, visits, torch.float64)
    got, plain = (errors(run(op, leaves, visits), want) for op in (K.moe_mlp, K.moe_mlp_ref))
    assert all(a <= 2 * b + 1e-4 for a, b in zip(got, plain)), (shape, how, got, plain)

# a row's output is its own, to the bit: in another order, and alone
(x, gate, *w), visits = case(40, 24, 8, 4, 2)
expert = torch.empty(80, dtype=torch.long).scatter_(0, visits[0], torch.repeat_interleave(visits[1])).view(40, 2)
y, flip = K.moe_mlp(x, *visits, gate, *w), lambda t: t.flip(0)
assert torch.equal(flip(K.moe_mlp(flip(x), *moe.visits(flip(expert), 4), flip(gate), *w)), y)
assert torch.equal(K.moe_mlp(x[5:6], *moe.visits(expert[5:6], 4), gate[5:6], *w), y[5:6])

# --dispatch=triton equals loop: fused, through the seam (a capacity, and half of the experts on each rank), and in training
for fields in (dict(), dict(n_expert=16, n_active=3), dict(capacity=0.8, routed_scale=2.5)):
    out = {}
    for how in ("loop", "triton"):
        cfg = moe.MoEConfig(**fields, dispatch=how)
        cfg.n_embd = 24
        torch.manual_seed(0)
        layer = moe.MoE(cfg, 96)
        for p in layer.parameters():
            nn.init.normal_(p, std=0.3)
        x = torch.randn(2, 17, 24, requires_grad=True)
        y = layer(x)
        out[how] = [y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), [x, *layer.parameters()])]
    assert moe.dispatch_of(cfg, "cpu", torch.float32) == "triton (--dispatch)"
    for a, b in zip(out["triton"], out["loop"]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
halves = [moe.Experts(cfg, 4, len(layer.experts.w_gate[0])) for _ in range(2)]
for r, half in enumerate(halves):
    half.load_state_dict({name: p[4 * r:4 * r + 4] for name, p in layer.experts.state_dict().items()})
x, count = torch.randn(20, 24), torch.tensor([3, 0, 5, 1, 0, 7, 2, 2])
sent = torch.cat([half.visit(rows, part) for half, rows, part in zip(halves, x.split([9, 11]), count.split(4))])
cfg.dispatch = "loop"
torch.testing.assert_close(sent, layer.experts.visit(x, count), rtol=1e-4, atol=1e-5)

leaves, visits = case(5, 4, 6, 3, 2)
leaves = [leaf.requires_grad_() for leaf in leaves]
loss = lambda x, *rest: K.moe_mlp(x, *visits, *rest).square().sum()
grads = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
for a, b in zip(grads, torch.autograd.grad(K.moe_mlp_ref(leaves[0], *visits, *leaves[1:]).square().sum(), leaves)):
    torch.testing.assert_close(a, b)
torch.library.opcheck(torch.ops.flatlm.moe_mlp.default, (leaves[0], visits[0].int(), visits[1], *leaves[1:], True))
with torch.no_grad():
    assert torch.ops.flatlm.moe_mlp(leaves[0], visits[0].int(), visits[1], *leaves[1:], False)[2].numel() == 0
"""


@pytest.mark.peer
def test_moe_kernels_interpreted():
    assert not failure_with_triton(INTERPRETED, interpret=True)


AHEAD = """
import kernels as K, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
whole, single = {"visit_ptr", "first_ptr"}, {"gate_ptr", "part_ptr", "dw_ptr", "dw2_ptr"}
kind = lambda name: ("*i32" if name in whole else "*fp32" if name in single else "*bf16") if name.endswith("_ptr") else "i32"
tile = dict(BLOCK_E=128, ALIGN=8, BLOCK_R=128)
jobs = [(K._moe_up, tile | dict(KEEP=True, BLOCK_F=128, BLOCK_D=64)), (K._moe_dh, tile | dict(BLOCK_F=64, BLOCK_D=64)),
        (K._moe_sum, dict(BLOCK_M=8, BLOCK_D=256))]
jobs += [(K._moe_scatter, tile | dict(TWO=two, BLOCK_I=64, BLOCK_O=128)) for two in (False, True)]
jobs += [(K._moe_dw, dict(TWO=two, ALIGN=8, BLOCK_R=64, BLOCK_F=128, BLOCK_D=128)) for two in (False, True)]
for kernel, constants in jobs:
    signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    for arch, room in ((80, 163), (90, 227)):
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=8, num_stages=3))
        assert made.asm["ptx"] and made.metadata.shared <= room << 10, (kernel, made.metadata.shared)
        assert arch == 80 or kernel is K._moe_sum or "wgmma" in made.asm["ptx"], kernel
        assert "cp.async" in made.asm["ptx"] or kernel is K._moe_sum, kernel          # rows arrive in whole vectors
"""


@pytest.mark.peer
def test_moe_kernels_compile_ahead_for_gpus():
    assert not failure_with_triton(AHEAD, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_on_the_gpu(dtype):
    for *shape, how in [(1, 16, 16, 4, 2, ""), (300, 130, 70, 6, 3, "empty"), (500, 63, 65, 3, 1, "one"), (2048, 768, 256, 64, 6, "dropped")]:
        leaves, visits = case(*shape, dtype=dtype, how=how, device="cuda")
        want = run(K.moe_mlp_ref, leaves, visits, torch.float64)
        got = run(K.moe_mlp, leaves, visits)
        for a, b in zip(errors(got, want), errors(run(K.moe_mlp_ref, leaves, visits), want)):
            assert a <= 2 * b + 1e-5, (shape, how)
        assert all(torch.equal(a, b) for a, b in zip(got, run(K.moe_mlp, leaves, visits))), "two runs differ"
