import pytest
import torch

import attention as A
import kernels as K
from attention import PATTERNS, AttentionConfig, Layer, Pass, Places
from conftest import failure_with_triton

f64 = dict(dtype=torch.float64)
close = dict(rtol=1e-10, atol=1e-10)


def slow_flash(q_BTHK, k_BSGK, v_BSGU, sees, scale, softcap=0.0, sink_H=None, slope_H=None):
    """[AIAYN eq 1] one query at a time, as a person would write it."""
    (B, T, H, _), (S, G, U) = q_BTHK.shape, v_BSGU.shape[1:]
    y_BTHU = q_BTHK.new_zeros(B, T, H, U)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                place, g = t + S - T, h // (H // G)
                seen = [s for s in range(S) if sees(b, h, place, s)]
                score = torch.stack([q_BTHK[b, t, h] @ k_BSGK[b, s, g] * scale for s in seen])
                score = softcap * torch.tanh(score / softcap) if softcap else score
                if slope_H is not None:
                    score = score - slope_H[h] * torch.tensor([abs(place - s) for s in seen])
                if sink_H is not None:
                    score = torch.cat([score, sink_H[h:h + 1]])
                p = score.softmax(0)
                y_BTHU[b, t, h] = sum(p[i] * v_BSGU[b, s, g] for i, s in enumerate(seen))
    return y_BTHU


def inputs(B, T, S, H, G, K, U, dtype=torch.float64, sinks=False):
    torch.manual_seed(0)
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, U)] + [(H,)] * sinks
    return [torch.randn(shape, **f64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("sight, more", [
    ({}, {}), (dict(window=3), dict(softcap=1.5)), (dict(causal=False), {}), (dict(causal=False, window=2), {}), (dict(docs=True), dict(sinks=True)),
    (dict(docs=True, window=3), dict(slopes=True, sinks=True, softcap=2.0)), *((dict(docs=True, pattern=name, stride=3, width=2), {}) for name in ("dilated", "sparse", "strided", "fixed"))],
    ids=str)
@pytest.mark.parametrize("T, S, H, G", [(1, 1, 1, 1), (7, 7, 4, 2), (3, 9, 2, 1)])
def test_the_reference_equals_the_slow_sum(sight, more, T, S, H, G):
    doc = torch.stack([torch.arange(S) // 4, torch.cat([torch.full((S - S // 3,), 5), torch.full((S // 3,), -1)])]) if sight.get("docs") else None
    place = A.places_in_documents(doc, S, "cpu") if sight.get("pattern") else None
    see = K.Sight(**{k: v for k, v in sight.items() if k != "docs"}, doc_BS=doc, place_BS=place)

    def sees(b, h, t, s):
        seen = (s <= t or not see.causal) and (not see.window or abs(t - s) < see.window) and (doc is None or bool(doc[b, t] == doc[b, s]))
        return seen and (not see.pattern or bool(PATTERNS[see.pattern](place[b, t], place[b, s], torch.tensor(h), 3, 2)))

    leaves, slope_H = inputs(2, T, S, H, G, 5, 3, sinks="sinks" in more), torch.rand(H, **f64) if "slopes" in more else None
    rest = dict(softcap=more.get("softcap", 0.0), slope_H=slope_H)
    want = slow_flash(*leaves[:3], sees, 0.3, sink_H=leaves[3] if "sinks" in more else None, **rest)
    for function in (K.flash, K.flash_ref):
        got = function(*leaves[:3], see, 0.3, sink_H=leaves[3] if "sinks" in more else None, **rest)
        torch.testing.assert_close(got, want, **close)
    weight = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves)):
        torch.testing.assert_close(a, b, **close)


def random_sight(g):
    """Any way of seeing, ids of documents in any order, T <= S."""
    n = lambda high: int(torch.randint(high, (1,), generator=g))
    S, pattern = 1 + n(70), ("", "", "dilated", "sparse", "strided", "fixed")[n(6)]
    kind, B = n(5), 1 + n(2)
    doc = None if kind == 0 else torch.randint(-1, 4, (B, S), generator=g)
    if kind > 1:                                                 # in one piece each, padding first, or last, or ids that fall
        doc = doc.sort(1).values if kind < 4 else doc.sort(1, descending=True).values
    if kind == 3:
        doc = torch.cat([doc[doc >= 0], doc[doc < 0]])[None] if B == 1 else doc
    return 1 + n(S), S, K.Sight(causal=bool(n(3)), window=n(2) * (1 + n(30)), doc_BS=doc, pattern=pattern, stride=1 + n(9), width=1 + n(3),
                                place_BS=A.places_in_documents(doc, S, "cpu") if pattern and kind > 1 and kind != 4 else None)


@pytest.mark.parametrize("seed", range(60))
def test_spans_hold_all_that_is_seen_and_skip_no_mask_that_is_needed(seed):
    g = torch.Generator().manual_seed(seed)
    T, S, see = random_sight(g)
    mask = see.mask(T, S, 4, "cpu")
    for keys in (False, True):
        block, step = (16, 8) if seed % 2 else (8, 16)
        seen = mask.mT if keys else mask
        for b, rows in enumerate(see.spans(T, S, block, step, "cpu", keys)):
            for h in range(4):
                here = seen[b % len(mask), h % mask.shape[1]]
                for i, (low, inner, outer, high) in enumerate(rows[h % len(rows)].tolist()):
                    mine = here[i * block:(i + 1) * block]
                    assert 0 <= low <= inner <= outer <= high and not any(x % step for x in (low, inner, outer, high))
                    assert not mine[:, :low].any() and not mine[:, high:].any()
                    assert mine[:, inner:outer].all() and (inner == outer or outer <= here.shape[1])


def test_spans_are_tight_for_packed_rows():
    """Documents of 40, 1 and 59 tokens, then padding: tiles of 8 queries and 8 keys."""
    doc = torch.tensor([[0] * 40 + [1] + [2] * 59 + [-1] * 28])
    rows = K.Sight(doc_BS=doc).spans(128, 128, 8, 8, "cpu")[0, 0].tolist()
    assert rows[0] == [0, 0, 0, 8] and rows[4] == [0, 0, 32, 40] and rows[9] == [40, 48, 72, 80]
    assert rows[5] == [40, 48, 48, 48]                           # two documents begin here: no tile without a mask
    of_keys = K.Sight(doc_BS=doc).spans(128, 128, 8, 8, "cpu", keys=True)[0, 0].tolist()
    assert of_keys[0] == [0, 8, 40, 40] and of_keys[9] == [72, 80, 96, 104]
    assert K.Sight(window=16).spans(64, 64, 8, 8, "cpu")[0, 0, 5].tolist() == [24, 32, 40, 48]


@pytest.mark.parametrize("name", ["local", "dilated", "blocks", "sparse", "strided", "fixed", "mha", "swa"])
@pytest.mark.parametrize("past", [0, 9])
def test_sight_of_a_layer_is_its_mask(name, past):
    """attention.py says who sees whom twice, as a mask and as a Sight."""
    cfg = AttentionConfig(n_head=4, n_embd=32, attn=name, sparse_stride=4, sparse_width=2)
    doc = torch.tensor([[0] * 5 + [1] * 11 + [2] * 7, [3] * 20 + [-1] * 3])
    layer = Layer(0, name, 6 if name == "swa" else 0)
    for causal in (True, False)[:1 + (past == 0)]:
        at = Places(cfg, layer, Pass(torch.arange(past, 23)[None], past, doc, causal))
        T, S = at.distance_TS.shape
        assert torch.equal(at.sight.mask(T, S, 4, "cpu").expand(2, 4, T, S), (at.added == 0).expand(2, 4, T, S))


def test_what_flash_does_not_cover_goes_the_old_way():
    table = dict(rel_bias=torch.nn.Embedding(32, 3))
    for fields, this in ((dict(pos="t5"), table), (dict(pos="shaw"), {}), (dict(attn="star"), {}), ({}, dict(prefix_B=torch.tensor([2])))):
        cfg = AttentionConfig(**fields)
        assert Places(cfg, Layer(0, cfg.attn), Pass(torch.arange(4)[None], **this)).sight is None


@pytest.mark.parametrize("triton, made", [(False, "added"), (True, "sight")])
def test_what_will_be_asked_for_alone_is_made_before_the_blocks(triton, made, monkeypatch):
    monkeypatch.setattr(A, "takes_triton", lambda x: triton)
    at = Places(AttentionConfig(), Layer(0, "mha"), Pass(torch.arange(4)[None], 0, torch.zeros(1, 4)))
    assert list(at.made) == [made] and at.sight is at.sight and at.added is at.added and set(at.made) == {"sight", "added"}


@pytest.mark.parametrize("fields, says", [({}, "sdpa"), (dict(attn_softcap=3.0), "products"), (dict(attn="lightning"), "tiles"), (dict(layers="gdn,mha"), "sdpa and tiles")], ids=str)
def test_the_start_up_line_names_what_runs(fields, says):
    cfg = AttentionConfig(**fields)
    plan = [Layer(i, name) for i, name in enumerate((cfg.layers or cfg.attn).split(","))]
    assert A.backends(cfg, plan, torch.device("cpu"), torch.float32) == says
    if not fields:
        assert A.backends(cfg, plan, torch.device("cpu"), torch.bfloat16) == "products"


def test_decode_reference_is_the_last_row():
    q, k, v = inputs(2, 9, 9, 4, 2, 5, 3)
    want = K.flash_ref(q, k, v, K.Sight(), 0.4)[:, -1]
    torch.testing.assert_close(K.flash_decode(q[:, -1], k, v, 0.4), want, **close)


def test_bench_cases_are_right():
    for case in K.bench_flash("cpu", torch.float32, True):
        want = K.value_and_grads(case.ref, case.leaves, case.rest, torch.float64)
        assert all(K.rel_error(a, b) < 1e-5 for a, b in zip(K.value_and_grads(case.ours, case.leaves, case.rest), want)), case.name
        assert case.flops[1] > case.flops[0] > 0 and case.bytes[1] > case.bytes[0] > 0


# ---- Triton: interpreted, compiled ahead, and on a GPU ----

CASES = """
import torch, kernels as K
from kernels import Sight
doc = torch.tensor([[0] * 30 + [1] + [2] * 40 + [-1] * 6, [5] * 40 + [3] * 37])
place = torch.cat([torch.arange(n) for n in (30, 1, 40, 6, 40, 37)]).view(2, 77)
CASES = [  # B T S H G K U, who sees whom, softcap, sinks, slopes
    ((1, 70, 70, 2, 1, 32, 32), Sight(), 0.0, False, False),
    ((1, 37, 77, 2, 1, 48, 16), Sight(window=20), 2.0, True, True),
    ((2, 77, 77, 1, 1, 16, 32), Sight(doc_BS=doc), 0.0, True, False),
    ((2, 40, 77, 1, 1, 32, 16), Sight(doc_BS=doc, causal=False, window=30), 0.0, False, False),
    ((1, 77, 77, 2, 1, 16, 16), Sight(pattern="strided", stride=8), 0.0, False, False),
    ((1, 77, 77, 2, 1, 16, 16), Sight(pattern="fixed", stride=8, width=3, doc_BS=doc[:1], place_BS=place[:1]), 0.0, False, False),
    ((1, 1, 1, 1, 1, 16, 16), Sight(), 0.0, False, False)]

def case(shape, see, softcap, sinks, slopes, dtype, device="cpu"):
    (B, T, S, H, G, k, u), _ = shape, torch.manual_seed(0)
    leaves = [torch.randn(s, device=device).to(dtype) for s in ((B, T, H, k), (B, S, G, k), (B, S, G, u))] + [torch.randn(H, device=device)] * sinks
    slope_H = torch.rand(H, device=device) if slopes else None
    run = lambda op: lambda q, k_, v, sink_H=None: op(q, k_, v, see, k**-0.5, softcap, sink_H, slope_H)
    return run, leaves
"""

INTERPRETED = CASES + """
assert K.use("triton") == "triton (interpreted)"
K.flash_blocks = lambda *a: ((64, 32), (32, 64), (4, 1), (4, 1), (4, 1))          # few programs: the interpreter counts operations
for arguments in CASES:
    for dtype in (torch.float32, torch.float16)[:1 + (arguments[0][5] == 48)]:
        run, leaves = case(*arguments, dtype)
        want = K.value_and_grads(run(K.flash_ref), leaves, (), torch.float64)
        errors = lambda op: [((a.double() - b).norm() / b.norm().clamp(min=1.0)).item() for a, b in zip(K.value_and_grads(run(op), leaves, ()), want)]
        ours, torch_s = errors(K.flash), errors(K.flash_ref)
        assert all(e < (1e-5 if dtype == torch.float32 else max(2 * t, 1e-3)) for e, t in zip(ours, torch_s)), (arguments, dtype, ours, torch_s)
for B, S, G, H, k, u in ((2, 300, 2, 6, 32, 32), (1, 530, 1, 20, 48, 32)):       # keys apart, or values inside the keys; two splits
    keys, q_BHK, sink_H = torch.randn(B, S, G, k), torch.randn(B, H, k), torch.randn(H)
    values, docs = keys[..., :u] if G == 1 else torch.randn(B, S, G, u), (torch.arange(S) // 70).expand(B, S)
    for rest in ((0.2,), (0.2, 1.5, sink_H, docs)):
        want = K.flash_decode_ref(q_BHK.double(), keys.double(), values.double(), *rest)
        assert (K.flash_decode(q_BHK, keys, values, *rest) - want).norm() < 1e-5 * want.norm()
run, leaves = case((1, 20, 20, 2, 1, 16, 16), Sight(window=9), 3.0, True, False, torch.float32)
compiled = torch.compile(run(K.flash), fullgraph=True, backend="aot_eager")
for a, b in zip(K.value_and_grads(compiled, leaves, ()), K.value_and_grads(run(K.flash_ref), leaves, ())):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
q, k_, v, sink_H = (leaf.requires_grad_() for leaf in leaves)
span = Sight().spans(20, 20, 32, 32, "cpu")
torch.library.opcheck(torch.ops.flatlm.flash.default, (q, k_, v, span, span, None, None, sink_H, None, 0.3, 0.0, True, 0, "", 1, 1))
torch.library.opcheck(torch.ops.flatlm.flash_decode.default, (q[:, 0].detach(), k_.detach(), v.detach(), 0.3, 0.0, sink_H.detach(), None))
"""


@pytest.mark.peer
def test_flash_interpreted():
    assert not failure_with_triton(INTERPRETED, interpret=True)


LAYERS = """
import torch, attention as A, kernels as K
from attention import ATTENTION, AttentionConfig, Layer, LayerCache, Pass, Places
ran = set()
for name in ("flash", "flash_decode"):
    setattr(A, name, lambda *a, f=getattr(A, name), name=name: (ran.add(name), f(*a))[1])
doc_BS = (torch.arange(24) // 9).expand(2, 24)
for fields in (dict(attn="mla", qk_rope_head_dim=4, sinks=True), dict(attn="gqa", window=7, attn_softcap=3.0), dict(attn="fixed", sparse_stride=4, sparse_width=2)):
    cfg = AttentionConfig(**dict(n_embd=64, n_head=4) | fields)
    layer, _ = Layer(0, cfg.attn, cfg.window), torch.manual_seed(0)
    mixer, x_BTD, out = ATTENTION[cfg.attn](cfg, layer), torch.randn(2, 24, 64), {}
    places = lambda a, b: Places(cfg, layer, Pass(A.places_in_documents(doc_BS[:, :b], b, "cpu")[:, a:], a, doc_BS[:, :b]))
    for choice in ("torch", "triton"):
        K.use(choice)
        ran.clear()
        y_BTD = mixer(x_BTD, places(0, 24))
        out[choice] = [y_BTD, *torch.autograd.grad(y_BTD.sin().sum(), list(mixer.parameters()))]
        with torch.no_grad():
            cache = LayerCache(layer.window)
            out[choice] += [mixer(x_BTD[:, a:b], places(a, b), cache) for a, b in ((0, 20), (20, 21), (21, 24))]
    assert ran == ({"flash"} if cfg.attn == "fixed" else {"flash", "flash_decode"}), ran
    for a, b in zip(out["triton"], out["torch"]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.peer
def test_layers_through_flash_equal_layers_without():
    assert not failure_with_triton(LAYERS, interpret=True)


AHEAD = """
import torch, kernels as K, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget

def check(kernel, warps, constants, most):
    kind = lambda n: "constexpr" if n in constants else "fp32" if n in ("scale", "cap") else "*fp32" if n in ("lse_ptr", "delta_ptr", "part_ptr", "sink_ptr") else \\
        "*i32" if n in ("span_ptr", "doc_ptr", "place_ptr") else "*bf16" if n.endswith("_ptr") else "i32"
    signature = {n: kind(n) for n in kernel.arg_names}
    constants = {n: c for n, c in constants.items() if n in signature}
    # 16 bytes at once, as Triton finds when called: widths of heads are multiples of 16
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n][0] == "*" or n[1:] in ("_b", "_t", "_s", "_h", "_g")}
    made = triton.compile(ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs), target=GPUTarget("cuda", arch, 32),
                          options=dict(num_warps=warps[0], num_stages=warps[1]))
    assert made.asm["ptx"] and made.metadata.shared <= most * 1024, (kernel, made.metadata.shared)

for arch, most, shapes in ((80, 163, ((192, 128),)), (90, 227, ((256, 256),))):
    for k, u in shapes:
        (K1, K2), (tile, tile_k, *warps) = K.two_powers(k), K.flash_blocks(k, u, torch.bfloat16)
        constants = dict(CAUSAL=True, WINDOW=True, PATTERN="", CAP=True, KINDS=1, K=k, U=u, K1=K1, K2=K2, U1=u, place_ptr=None, slope_ptr=None)
        for kernel, (M, N), w in zip((K._flash_fwd, K._flash_bwd_q, K._flash_bwd_kv), (tile, tile, tile_k), warps):
            check(kernel, w, constants | dict(BLOCK_M=M, BLOCK_N=N), most)
    check(K._decode, (8, 2), dict(CAP=False, SHARED=True, K=576, U=512, K1=512, K2=64, U1=512, BLOCK_H=32, BLOCK_N=32), most)
    check(K._decode_join, (4, 2), dict(BLOCK_S=64, BLOCK_U=64), most)
"""


@pytest.mark.peer
def test_flash_compiles_ahead_for_gpus():
    assert not failure_with_triton(AHEAD, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_on_the_gpu(dtype):
    space = {}
    exec(CASES.replace("doc = ", "torch.set_default_device('cuda'); doc = "), space)
    K.use("triton")
    try:
        for arguments in space["CASES"] + [((2, 512, 512, 4, 2, width, u), K.Sight(window=200), 20.0, True, False) for width, u in ((64, 64), (128, 128), (192, 128), (256, 256))]:
            run, leaves = space["case"](*arguments, dtype, "cuda")
            want, plain = K.value_and_grads(run(K.flash_ref), leaves, (), torch.float64), K.value_and_grads(run(K.flash_ref), leaves, ())
            got = K.value_and_grads(run(K.flash), leaves, ())
            for mine, theirs, exact in zip(got, plain, want):
                scale = exact.norm().clamp(min=1.0)
                assert (mine.double() - exact).norm() / scale <= 2 * (theirs.double() - exact).norm() / scale + (1e-5 if dtype == torch.float32 else 5e-3), arguments
            assert all(torch.equal(a, b) for a, b in zip(got, K.value_and_grads(run(K.flash), leaves, ()))), arguments
    finally:
        torch.set_default_device(None)
        K.use("auto")
