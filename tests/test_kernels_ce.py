"""linear_cross_entropy: the head and its loss with bias, softcap, smoothing, z-loss, rows that do not count, and little memory."""
import itertools

import pytest
import torch
import torch.nn.functional as F

import kernels as K
from conftest import failure_with_triton

EXTRAS = [dict(), dict(bias=True), dict(softcap=2.0), dict(z_alpha=0.1), dict(smoothing=0.3), dict(bias=True, softcap=2.0, z_alpha=0.1, smoothing=0.3)]
ids = lambda fields: "-".join(fields) or "plain"


def drawn(M, D, V, dtype=torch.float64, bias=False, **extra):
    """(leaves x, w, weights, bias; targets, some of which count nothing; keywords)."""
    torch.manual_seed(M + V)
    leaves = [torch.randn(M, D), torch.randn(V, D), torch.rand(M) * (torch.rand(M) > 0.2), *[torch.randn(V)] * bias]
    targets_M = torch.randint(V, (M,)).where(torch.rand(M) > 0.3, torch.tensor([-100, -1, -5]).repeat(M)[:M])
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], targets_M, extra


def run(function, leaves, targets_M, extra, factor=0.37):
    """[loss, nll, gradient of each leaf]."""
    x_MD, w_VD, weights_M, *bias = leaves
    loss, nll_M = function(x_MD, w_VD, targets_M, weights_M, *bias, **extra, return_nll=True)
    assert not nll_M.requires_grad
    return [loss.detach(), nll_M, *torch.autograd.grad(loss * factor, leaves)]


def slow(x_MD, w_VD, targets_M, weights_M, bias_V=None, softcap=0.0, z_alpha=0.0, smoothing=0.0, return_nll=True):
    """Number by number: cross entropy with the target (1 - eps) onehot + eps / V, and z log^2 Z."""
    loss, nll = x_MD.new_zeros(()), []
    for x, target, weight in zip(x_MD, targets_M, weights_M):
        l_V = torch.stack([x @ w for w in w_VD]) + (0 if bias_V is None else bias_V)
        l_V = softcap * (l_V / softcap).tanh() if softcap else l_V
        log_z = l_V.exp().sum().log()
        nll.append(log_z - l_V[target] if target >= 0 else torch.zeros_like(log_z))
        if target >= 0:
            q_V = torch.full_like(l_V, smoothing / len(l_V))
            q_V[target] += 1 - smoothing
            loss = loss + weight * ((q_V * (log_z - l_V)).sum() + z_alpha * log_z**2)
    return loss, torch.stack(nll).detach()


@pytest.fixture(params=["one chunk", "chunks"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(K, "few_logits", lambda x_MD, w_VD: False)
    if request.param == "chunks":
        monkeypatch.setattr(K, "chunk_rows", lambda x, V: 5)


@pytest.mark.parametrize("extra", EXTRAS, ids=ids)
def test_reference_equals_the_slow_sum(extra):
    case = drawn(7, 5, 4, **extra)
    for got, want in zip(run(K.linear_cross_entropy_ref, *case), run(slow, *case)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("extra", EXTRAS, ids=ids)
@pytest.mark.parametrize("M, D, V", [(1, 1, 1), (7, 5, 3), (33, 8, 130)])
def test_op_equals_the_reference(M, D, V, extra, chunked, shapes_checked):
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        case = drawn(M, D, V, dtype, **extra)
        want = run(K.linear_cross_entropy_ref, *drawn(M, D, V, **extra))
        for got, exact in zip(run(K.linear_cross_entropy, *case), want):
            torch.testing.assert_close(got.double(), exact, rtol=tol, atol=tol)


def test_smoothing_and_ignoring_are_those_of_torch(chunked):
    (x_MD, w_VD, _), targets_M, _ = drawn(33, 8, 20)
    targets_M = targets_M.where(targets_M >= 0, -100)
    ones_M = torch.ones(33, dtype=torch.float64)
    want = F.cross_entropy(x_MD @ w_VD.T, targets_M, reduction="sum", label_smoothing=0.2)
    got = K.linear_cross_entropy(x_MD, w_VD, targets_M, ones_M, smoothing=0.2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(got, (x_MD, w_VD)), torch.autograd.grad(want, (x_MD, w_VD))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_micro_batches_and_kept_graphs_add_up(chunked):
    leaves, targets_M, extra = drawn(33, 8, 20, bias=True, z_alpha=0.1)
    x_MD, w_VD, weights_M, bias_V = leaves
    part = lambda i: K.linear_cross_entropy(x_MD[i], w_VD, targets_M[i], weights_M[i], bias_V, **extra)
    whole = torch.autograd.grad(part(slice(0, 33)) / 7, leaves)
    for start in range(0, 33, 11):
        (part(slice(start, start + 11)) / 7).backward()
    for leaf, want in zip(leaves, whole):
        torch.testing.assert_close(leaf.grad, want, rtol=1e-10, atol=1e-12)
    loss = part(slice(0, 33))
    first, second = (torch.autograd.grad(loss / 7, leaves, retain_graph=keep) for keep in (True, False))
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused(chunked):
    (x_MD, w_VD, weights_M), targets_M, _ = drawn(7, 5, 4)
    grad, = torch.autograd.grad(K.linear_cross_entropy(x_MD, w_VD, targets_M, weights_M), x_MD, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x_MD)


def test_edges(chunked):
    (x_MD, w_VD, weights_M, bias_V), targets_M, extra = drawn(7, 5, 4, bias=True, softcap=2.0, z_alpha=0.1, smoothing=0.3)
    none_M = torch.full_like(targets_M, -100)
    loss, nll_M = K.linear_cross_entropy(x_MD, w_VD, none_M, weights_M, bias_V, **extra, return_nll=True)
    assert loss == 0 and not nll_M.any() and not any(g.any() for g in torch.autograd.grad(loss, (x_MD, w_VD, bias_V)))
    empty = K.linear_cross_entropy(x_MD[:0], w_VD, targets_M[:0], weights_M[:0], bias_V, **extra)
    assert empty == 0 and not torch.autograd.grad(empty, w_VD)[0].any()
    torch.testing.assert_close(K.linear_cross_entropy(x_MD, w_VD, targets_M.int(), weights_M), K.linear_cross_entropy(x_MD, w_VD, targets_M, weights_M))
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        K.linear_cross_entropy(x_MD, w_VD, torch.full_like(targets_M, 4), weights_M)
    # ids that cannot occur: a bias of -inf takes them out of the softmax, and a row of nothing else counts only where it is asked to
    bias_V = torch.tensor([-torch.inf, 0, 1, -torch.inf], dtype=torch.float64, requires_grad=True)
    targets_M = torch.tensor([1, 2, -1, 1, 1, 2, 2])
    case = [x_MD, w_VD, weights_M, bias_V], targets_M, dict(z_alpha=0.1)
    for got, want in zip(run(K.linear_cross_entropy, *case), run(K.linear_cross_entropy_ref, *case)):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    loss = K.linear_cross_entropy(x_MD, w_VD, none_M, weights_M, torch.full_like(bias_V, -torch.inf))
    assert loss == 0 and not torch.autograd.grad(loss, w_VD)[0].any()


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """FLOPs: 2 M D V forward, and 2 M D V for each gradient that is wanted; of a chunk that was kept these come in backward."""
    from torch.utils.flop_counter import FlopCounterMode
    forward, backward = K._linear_cross_entropy._init_fn, K._linear_cross_entropy_backward._init_fn
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    x_MD, w_VD, rest = torch.randn(30, 8), torch.randn(9, 8), (torch.randint(9, (30,)), torch.ones(30), None, 0.0, 0.0, 0.0)
    for chunk, *needs in itertools.product((5, 100), (False, True), (False, True)):
        monkeypatch.setattr(K, "chunk_rows", lambda x, V: chunk)
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            kept = forward(x_MD, w_VD, *rest, *needs, False)[3]
            if len(kept):
                backward(kept, x_MD, w_VD, *needs, False)
        assert counter.get_total_flops() == 2 * 30 * 8 * 9 * (1 + sum(needs))


def peak_bytes(function, leaves):
    """The most memory that was allocated at one time, above what was there before."""
    function()
    for leaf in leaves:
        leaf.grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return sizes.cumsum(0).max().item()


@pytest.mark.parametrize("M, D, V", [(2048, 32, 4096), (8192, 256, 65), (8192, 32, 256), (300, 64, 50304)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_chunk(M, D, V, dtype):
    """Beyond the gradients that come out (and the head in the type of the products) there is one chunk, and what is worked on."""
    x_MD, w_VD = torch.randn(M, D, dtype=dtype, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets_M, weights_M = torch.randint(V, (M,)), torch.ones(M)

    results = x_MD.nbytes + w_VD.nbytes + (w_VD.numel() * 2 if dtype == torch.bfloat16 else 0)
    chunk = max(32 << 20, 256 * V * x_MD.element_size() + (4 << 20))
    ours, stored = (peak_bytes(lambda: (f(x_MD, w_VD, targets_M, weights_M) / 3).backward(), (x_MD, w_VD)) - results for f in (K.linear_cross_entropy, K.linear_cross_entropy_ref))
    assert 0 < ours <= min(chunk, 1.05 * stored), (ours / 2**20, stored / 2**20)


def test_opcheck_and_compile(chunked):
    torch._dynamo.reset()                                        # what was compiled for chunks of another size
    for extra in (dict(), dict(bias=True, softcap=2.0, z_alpha=0.1, smoothing=0.3)):
        leaves, targets_M, extra = drawn(7, 5, 4, torch.float32, **extra)
        x_MD, w_VD, weights_M, *bias = leaves
        torch.library.opcheck(torch.ops.flatlm.linear_cross_entropy.default, (x_MD, w_VD, targets_M, weights_M, *(bias or [None]), extra.get("softcap", 0.0),
                              extra.get("z_alpha", 0.0), extra.get("smoothing", 0.0), True, True, bool(bias)))
        compiled = torch.compile(K.linear_cross_entropy, fullgraph=True, backend="aot_eager")
        for got, want in zip(run(compiled, leaves, targets_M, extra), run(K.linear_cross_entropy_ref, leaves, targets_M, extra)):
            torch.testing.assert_close(got, want)


def test_half_precision_is_as_exact_as_torch(chunked):
    """bfloat16 products, everything else in float32: errors of value and gradients against float64 beside the reference's."""
    for extra in EXTRAS:
        exact = run(K.linear_cross_entropy_ref, *drawn(130, 64, 300, **extra), factor=1 / 3)
        leaves, targets_M, fields = drawn(130, 64, 300, torch.float32, **extra)
        leaves[0] = leaves[0].detach().bfloat16().requires_grad_()
        ours, theirs = (run(f, leaves, targets_M, fields, 1 / 3) for f in (K.linear_cross_entropy, K.linear_cross_entropy_ref))
        for a, b, want in zip(ours, theirs, exact):
            assert K.rel_error(a, want) <= 1.5 * K.rel_error(b, want) + 1e-4


# ---- Triton: interpreted, and compiled ahead ----

INTERPRETED = """
import torch, kernels as K
from test_kernels_ce import EXTRAS, drawn, run
assert K.use("triton") == "triton (interpreted)"
for i, (M, D, V) in enumerate([(3, 7, 1), (5, 63, 130), (6, 16, 5000)]):
    for chunk in (2, 100):
        K.chunk_rows = lambda x, V: chunk
        for extra in EXTRAS:
            exact = run(K.linear_cross_entropy_ref, *drawn(M, D, V, **extra))
            for dtype in (torch.float32, torch.float16):
                leaves, targets, extra_ = drawn(M, D, V, torch.float32, **extra)
                leaves[0] = leaves[0].detach().to(dtype).requires_grad_()
                theirs = run(K.linear_cross_entropy_ref, leaves, targets, extra_)
                for ours, plain, want in zip(run(K.linear_cross_entropy, leaves, targets, extra_), theirs, exact):
                    error, base = ((t.double() - want).norm() / max(want.norm(), 1e-3) for t in (ours, plain))
                    assert error <= 2 * base + 3e-6, (M, D, V, chunk, extra, dtype, error, base)
inf = float("inf")
K.chunk_rows = lambda x, V: 2
(x, w, weights), targets, _ = drawn(5, 8, 9000, torch.float32)
bias = torch.zeros(9000); bias[:5000] = -inf; bias.requires_grad_()        # the first block is -inf from end to end
targets = torch.tensor([6000, -100, 8999, -1, 7000])
for ours, plain in zip(*(run(f, [x, w, weights, bias], targets, dict(z_alpha=0.1)) for f in (K.linear_cross_entropy, K.linear_cross_entropy_ref))):
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, plain)
loss = K.linear_cross_entropy(x, w, torch.full((5,), -100), weights, torch.full((9000,), -inf))
assert loss == 0 and not torch.autograd.grad(loss, w)[0].any()
assert K.linear_cross_entropy(x, w, torch.full((5,), 9000), torch.ones(5)).isnan()          # an id beyond the vocabulary
"""


@pytest.mark.peer
def test_kernel_interpreted():
    assert not failure_with_triton(INTERPRETED, interpret=True)


AHEAD = """
import itertools, kernels as K, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
signature = dict(logit_ptr="*bf16", target_ptr="*i64", weight_ptr="*fp32", nll_ptr="*fp32", loss_ptr="*fp32", V="i32", stride="i32", softcap="fp32",
                 z_alpha="fp32", smoothing="fp32", CAP="constexpr", SMOOTH="constexpr", GRAD="constexpr", BLOCK_V="constexpr")
for arch, extra, grad in itertools.product((80, 90), (False, True), (False, True)):
    constants = dict(CAP=extra, SMOOTH=extra, GRAD=grad, BLOCK_V=4096)
    made = triton.compile(ASTSource(K._cross_entropy_rows, signature=signature, constexprs=constants), target=GPUTarget("cuda", arch, 32), options=dict(num_warps=8))
    assert made.asm["ptx"] and made.metadata.shared < 160_000 and not getattr(made, "n_spills", 0), (arch, extra, grad)
"""


@pytest.mark.peer
def test_kernel_compiles_ahead():
    assert not failure_with_triton(AHEAD, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", EXTRAS, ids=ids)
def test_on_the_gpu(dtype, extra):
    K.use("triton")
    for M, D, V in [(1, 8, 3), (37, 257, 300), (9000, 768, 50257)]:
        leaves, targets_M, fields = drawn(M, D, V, torch.float32, **extra)
        on = lambda kind: [leaf.detach().to("cuda", kind).requires_grad_() for leaf in leaves]
        exact = run(K.linear_cross_entropy_ref, on(torch.float64), targets_M.cuda(), fields)
        half = on(torch.float32)
        half[0] = half[0].detach().to(dtype).requires_grad_()
        ours, again, theirs = (run(f, half, targets_M.cuda(), fields) for f in (K.linear_cross_entropy, K.linear_cross_entropy, K.linear_cross_entropy_ref))
        assert all(map(torch.equal, ours, again))
        for a, b, want in zip(ours, theirs, exact):
            assert (a - want).norm() <= 2 * (b - want).norm() + 1e-5 * want.norm()


# ---- In the model ----

def test_the_model_trains_on_z_loss_and_smoothing_and_is_judged_without():
    import model as M
    torch.manual_seed(0)
    small = dict(n_layer=1, n_embd=16, n_head=2, seq_len=8, vocab_size=40, head_bias=True, logit_softcap=3.0)
    plain, m = (M.Model(M.ModelConfig(**small, **more)) for more in ({}, dict(z_loss=0.01, label_smoothing=0.1)))
    batch = dict(tokens=torch.randint(40, (3, 8)), targets=torch.randint(40, (3, 8)), weights=torch.rand(3, 8))
    batch["targets"][0, :3] = -100
    logits_MV = plain(batch["tokens"]).flatten(0, 1)
    counted_M = batch["weights"].flatten() * (batch["targets"].flatten() >= 0)
    smooth_M, nll_M = (F.cross_entropy(logits_MV, batch["targets"].flatten(), reduction="none", label_smoothing=s) for s in (0.1, 0.0))
    loss_sum, weight_sum, metrics = m.train().loss(batch)
    torch.testing.assert_close(loss_sum, (counted_M * (smooth_M + 0.01 * logits_MV.logsumexp(1) ** 2)).sum())
    torch.testing.assert_close(metrics["nll"], torch.stack([(counted_M * nll_M).sum(), weight_sum]))
    for one in (plain.train(), plain.eval(), m.eval()):
        torch.testing.assert_close(one.loss(batch)[0], (counted_M * nll_M).sum())
        assert one.loss(batch)[2] == {}
    for wrong in (dict(z_loss=-1.0), dict(z_loss=float("nan")), dict(label_smoothing=1.0), dict(label_smoothing=-0.1)):
        with pytest.raises(M.UsageError, match=next(iter(wrong))):
            M.validate(M.ModelConfig(**wrong))
