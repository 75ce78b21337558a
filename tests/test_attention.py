import math

import pytest
import torch

import attention as A
from attention import ATTENTION, PATTERNS, AttentionConfig, Layer, LayerCache, Pass, Places
from tokenizer import UsageError

f64 = dict(dtype=torch.float64)
close = dict(rtol=1e-10, atol=1e-10)


def randomised(module, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, **f64) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    return module


def build(attn="mha", index=0, **fields):
    """(mixer in float64 with every parameter random, cfg, layer, places(start, stop, ...) of its tokens)."""
    cfg = AttentionConfig(**dict(n_embd=24, n_head=4, seq_len=24, attn=attn) | fields)
    layer = Layer(index, attn, cfg.window or 6 * (attn == "swa"))
    table = torch.nn.Embedding(cfg.t5_buckets, cfg.n_head, **f64)
    with torch.no_grad():
        table.weight.copy_(torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(2)))

    def places(start, stop, doc_BS=None, **more):
        index_BS = A.places_in_documents(doc_BS, stop, "cpu")
        return Places(cfg, layer, Pass(index_BS[:, start:], start, doc_BS, rel_bias=table, **more))

    return randomised(ATTENTION[attn](cfg, layer).double()), cfg, layer, places


def slow_attention(q_BTHK, k_BSGK, v_BSGU, sees, scale, bias=lambda h, t, s: 0.0, softcap=0.0, sink_H=None, shaw=None):
    """[AIAYN eq 1] one query and one head at a time; query head h reads key head h // (H / G)."""
    B, T, H, _ = q_BTHK.shape
    G, out = k_BSGK.shape[2], q_BTHK.new_zeros(B, T, H, v_BSGU.shape[-1])
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                seen, score, values = [s for s in range(k_BSGK.shape[1]) if sees(b, h, t, s)], [], []
                for s in seen:
                    key, value = k_BSGK[b, s, g], v_BSGU[b, s, g]
                    if shaw:                                     # [Shaw eq 3, 4]
                        row = max(-shaw[2], min(shaw[2], s - t)) + shaw[2]
                        key, value = key + shaw[0][row], value + shaw[1][row]
                    x = q_BTHK[b, t, h] @ key * scale
                    score.append((softcap * torch.tanh(x / softcap) if softcap else x) + bias(h, t, s))
                    values.append(value)
                p = torch.stack(score + ([sink_H[h]] if sink_H is not None else [])).softmax(0)
                out[b, t, h] = sum(p[i] * value for i, value in enumerate(values))
    return out


@pytest.mark.parametrize("T, H, G, K, U", [(1, 1, 1, 2, 2), (7, 4, 2, 6, 6), (9, 3, 1, 4, 5)])
@pytest.mark.parametrize("extra", [{}, dict(softcap=1.5), dict(sinks=True), dict(shaw=2), dict(softcap=2.0, sinks=True, shaw=3), dict(pos="alibi"), dict(pos="t5")],
                         ids=lambda d: "-".join(map(str, d)) or "plain")
@pytest.mark.parametrize("documents", [False, True])
def test_attend_equals_the_paper(T, H, G, K, U, extra, documents, shapes_checked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, n, w, **f64).requires_grad_() for n, w in ((H, K), (G, K), (G, U)))
    doc = (torch.arange(T) // 3).expand(2, T) if documents else None
    pos, clip = extra.get("pos", "shaw" if "shaw" in extra else "none"), extra.get("shaw", 0)
    cfg = AttentionConfig(n_head=H, head_dim=K, pos=pos, attn_softcap=extra.get("softcap", 0.0), sinks="sinks" in extra)
    table = torch.nn.Embedding(32, H, **f64)
    at = Places(cfg, Layer(0, "mha"), Pass(torch.arange(T)[None], 0, doc, rel_bias=table, dtype=torch.float64))
    sink_H = torch.randn(H, **f64).requires_grad_() if extra.get("sinks") else None
    vectors = [torch.randn(2 * clip + 1, n, **f64).requires_grad_() for n in (K, U)] if clip else []
    sees = lambda b, h, t, s: s <= t and (not documents or s // 3 == t // 3)
    slopes = [2 ** (-8 * (h + 1) / H) for h in range(H)] if H in (1, 4) else [2**-4, 2**-8, 2**-2]     # [ALiBi sec 3]
    bias = {"none": lambda h, t, s: 0.0, "alibi": lambda h, t, s: -slopes[h] * (t - s), "t5": lambda h, t, s: table.weight[min(t - s, 15), h]}["none" if clip else pos]
    shaw = (*vectors, A.shaw_index(at.distance_TS, clip)) if clip else None
    want = slow_attention(q, k, v, sees, 0.3, bias, extra.get("softcap", 0.0), sink_H, (*vectors, clip) if clip else None)
    got = A.attend(q, k, v, at, 0.3, softcap=extra.get("softcap", 0.0), sinks=sink_H, shaw=shaw)
    torch.testing.assert_close(got, want, **close)
    weight, leaves = torch.randn_like(want), [q, k, v, *vectors] + ([sink_H] if sink_H is not None else []) + ([table.weight] if cfg.pos == "t5" else [])
    for a, b in zip(torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves)):
        torch.testing.assert_close(a, b, **close)


def test_a_sink_is_a_gate_on_the_plain_output():
    """softmax with a sink = the plain output times sigmoid(logsumexp - sink): any kernel that returns the logsumexp has sinks."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, n, 4, **f64) for n in (2, 2, 2))
    plain, sunk = (Places(AttentionConfig(n_head=2, pos="none", sinks=sinks), Layer(0, "mha"), Pass(torch.arange(6)[None])) for sinks in (False, True))
    sink_H = torch.randn(2, **f64)
    score = torch.einsum("bthk,bshk->bhts", q, k).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
    gate = torch.sigmoid(score.logsumexp(-1) - sink_H[:, None]).transpose(1, 2)[..., None]
    torch.testing.assert_close(A.attend(q, k, v, sunk, 1.0, sinks=sink_H), gate * A.attend(q, k, v, plain, 1.0), **close)


def test_both_cpu_paths_agree():
    """bfloat16 takes the plain products, float32 the fused kernel; they differ by rounding alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, n, 8) for n in (4, 2, 2))
    for doc in (None, (torch.arange(40) // 13).expand(2, 40)):
        at, at_half = (Places(AttentionConfig(n_head=4, pos="none"), Layer(0, "mha"), Pass(torch.arange(40)[None], 0, doc, dtype=dtype))
                       for dtype in (torch.float32, torch.bfloat16))
        assert at_half.stored and not at.stored
        half = A.attend(*(t.bfloat16() for t in (q, k, v)), at_half, 0.35).float()
        assert (half - A.attend(q, k, v, at, 0.35)).norm() < 0.01 * half.norm()


def slow_mha(mixer, x, cfg, sees, pos, index=0):
    """One layer of attn=mha and its relatives with every option, in float64."""
    H, G, K = mixer.n_head, mixer.n_kv_head, mixer.head_dim
    rms = lambda z, gain: z * gain / (z.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()

    def heads(w, n, norm):
        y = x @ w.weight.T + (w.bias if w.bias is not None else 0)
        if norm is not None and cfg.qk_norm == "width":
            y = rms(y, norm.weight)
        y = y.view(*x.shape[:2], n, K)
        y = rms(y, norm.weight) if norm is not None and cfg.qk_norm == "head" else y
        return y.clamp(-cfg.clip_qkv, cfg.clip_qkv) if cfg.clip_qkv else y

    q, k, v = heads(mixer.w_q, H, mixer.q_norm), heads(mixer.w_k, G, mixer.k_norm), heads(mixer.w_v, G, None)
    if pos == "rope":
        turn = A.Rope(torch.arange(x.shape[1])[None], K, 10000.0 ** (-torch.arange(0, K, 2, **f64) / K), dtype=torch.float64)
        q, k = turn(q), turn(k)
    scale = (cfg.attn_scale or K**-0.5) / (index + 1 if cfg.scale_by_layer else 1)
    y = slow_attention(q, k, v, sees, scale, softcap=cfg.attn_softcap, sink_H=mixer.sinks).flatten(2)
    if cfg.attn_gate:
        y = y * torch.sigmoid(x @ mixer.w_gate.weight.T)
    return y @ mixer.w_o.weight.T + (mixer.w_o.bias if cfg.out_bias else 0)


OPTIONS = [dict(qk_norm="head"), dict(qk_norm="width", attn="gqa", n_kv_head=2), dict(clip_qkv=0.4, qk_norm="width"), dict(clip_qkv=0.4), dict(attn_gate=True), dict(scale_by_layer=True),
           dict(attn_scale=0.7, attn_softcap=2.0, sinks=True, qkv_bias=True, out_bias=True, attn="mqa"), dict(attn="swa", window=5), dict(attn="gqa", window=3)]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_options_of_mha(fields, shapes_checked):
    mixer, cfg, layer, places = build(index=2, **fields, pos="none")
    x = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(3), **f64)
    sees = lambda b, h, t, s: s <= t and (not layer.window or t - s < layer.window)
    torch.testing.assert_close(mixer(x, places(0, 11)), slow_mha(mixer, x, cfg, sees, "none", 2), **close)


@pytest.mark.parametrize("name", list(PATTERNS))
def test_sparse_layers_see_what_their_pattern_says(name, shapes_checked):
    mixer, cfg, layer, places = build(name, pos="none", sparse_stride=4, sparse_width=2)
    x = torch.randn(1, 13, 24, generator=torch.Generator().manual_seed(3), **f64)
    doc_BS, one = torch.tensor([[0] * 5 + [1] * 8]), lambda i: torch.tensor([i])
    start = [0] * 5 + [5] * 8
    sees = lambda b, h, t, s: s <= t and doc_BS[0, s] == doc_BS[0, t] and bool(PATTERNS[name](one(t - start[t]), one(s - start[s]), one(h), 4, 2))
    torch.testing.assert_close(mixer(x, places(0, 13, doc_BS)), slow_mha(mixer, x, cfg, sees, "none"), **close)


def slow_mla(layer, x, cfg, theta):
    """[DSV2 eq 9-19] token by token, head by head, in float64."""
    B, T, D = x.shape
    H, N, P, U, R = layer.n_head, layer.nope, layer.rope_dim, layer.v_dim, layer.kv_rank
    rms = lambda z, g: z * g / (z.square().mean() + 1e-6).sqrt()

    def turn(z, p):
        a, b, out = z[:P // 2], z[P // 2:], torch.empty_like(z)
        angle = p * (1 / theta ** (torch.arange(0, P, 2).float() / P)).double()
        out[:P // 2], out[P // 2:] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    y = x.new_zeros(B, T, D)
    w_uk_uv, w_q = layer.w_ukv.weight.view(H, N + U, R), layer.w_q.weight.view(H, N + P, -1)
    for b in range(B):
        latent = [rms(layer.w_dkv.weight[:R] @ x[b, s], layer.kv_gain) for s in range(T)]
        k_rope = [turn(layer.w_dkv.weight[R:] @ x[b, s], s) for s in range(T)]
        for t in range(T):
            q_in = rms(layer.w_dq.weight @ x[b, t], layer.q_gain) if cfg.q_lora_rank else x[b, t]
            heads = []
            for h in range(H):
                q = w_q[h] @ q_in
                q = torch.cat([q[:N], turn(q[N:], t)])
                score = torch.stack([q @ torch.cat([w_uk_uv[h, :N] @ latent[s], k_rope[s]]) for s in range(t + 1)]) / (N + P) ** 0.5
                heads.append(sum(p * (w_uk_uv[h, N:] @ latent[s]) for s, p in enumerate(score.softmax(0))))
            y[b, t] = layer.w_o.weight @ torch.cat(heads)
    return y


MLA = dict(attn="mla", n_embd=12, n_head=2, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=7, rope_theta=10.0)


@pytest.mark.parametrize("q_lora_rank", [0, 6])
def test_mla_equals_the_paper(q_lora_rank, shapes_checked):
    mixer, cfg, _, places = build(**MLA, q_lora_rank=q_lora_rank)
    x_BTD = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0), **f64)
    torch.testing.assert_close(mixer(x_BTD, places(0, 7)), slow_mla(mixer, x_BTD, cfg, 10.0), rtol=1e-6, atol=1e-6)     # RoPE's table is float32


@pytest.mark.parametrize("fields", [{}, dict(sinks=True, attn_softcap=2.0, attn_gate=True), dict(window=4), dict(rope_scaling="yarn", rope_factor=4.0, rope_mscale_all=0.7)],
                         ids=lambda d: "-".join(d) or "plain")
def test_mla_absorbed_equals_expanded(fields):
    mixer, cfg, layer, places = build(**MLA | fields)
    x_BTD = torch.randn(2, 17, 12, generator=torch.Generator().manual_seed(0), **f64)
    full, cache, used, parts = mixer(x_BTD, places(0, 17)), LayerCache(layer.window), [], []
    absorbed, expanded = mixer.absorbed, mixer.expanded
    mixer.absorbed, mixer.expanded = lambda *a: used.append("absorbed") or absorbed(*a), lambda *a: used.append("expanded") or expanded(*a)
    for at, size in ((0, 7), (7, 1), (8, 2), (10, 6), (16, 1)):
        parts.append(mixer(x_BTD[:, at:at + size], places(at, at + size), cache))
    torch.testing.assert_close(torch.cat(parts, 1), full, **close)
    assert set(used) == {"absorbed", "expanded"}


VARIANTS = [dict(attn=name, qk_rope_head_dim=4) for name in ATTENTION] + [
    dict(attn="mla", window=5), dict(attn="gqa", n_kv_head=2, window=7, sinks=True), dict(pos="t5", attn="gqa", n_kv_head=2), dict(pos="alibi", attn="mqa"), dict(pos="shaw", attn="gqa", n_kv_head=2, shaw_clip=3),
    dict(pos="lrpe", attn="gqa", n_kv_head=2), dict(pos="lrpe", attn="transnormer"), dict(rope_fraction=0.67, rope_layout="interleaved", attn_softcap=2.0)]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_cached_steps_equal_the_full_pass_and_nothing_leaks_back(fields, shapes_checked):
    mixer, cfg, layer, places = build(**fields)
    x_BTD, cache = torch.randn(2, 70, 24, generator=torch.Generator().manual_seed(0), **f64), LayerCache(layer.window)
    full, held = mixer(x_BTD, places(0, 70)), []
    with torch.no_grad():
        parts, at = [], 0
        for size in (5, 1, 1, 58, 1, 4):                         # a prompt, single tokens, pieces; the buffers grow on the way
            parts.append(mixer(x_BTD[:, at:at + size], places(at, at + size), cache))
            at += size
            held.append(sum(t.numel() for t in cache.kept) / 2)
            assert held[-1] == mixer.kept(at) and cache.length == at
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-9, atol=1e-9)
    if mixer.recurrent:
        assert len(set(held)) == 1                               # a state does not grow
    elif layer.window:
        assert max(t.shape[1] for t in cache.kept) < layer.window
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in cache.kept)       # nor hides what it forgot
    changed = x_BTD.clone()
    changed[:, 40] += 1
    after = mixer(changed, places(0, 70))
    torch.testing.assert_close(after[:, :40], full[:, :40], rtol=0, atol=1e-12)
    assert (after[:, 40] != full[:, 40]).all()


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_documents_of_a_row_are_alone(fields, shapes_checked):
    mixer, cfg, layer, places = build(**fields)
    lengths, x_BTD = (9, 1, 14, 4), torch.randn(1, 28, 24, generator=torch.Generator().manual_seed(0), **f64)
    doc_BS = torch.cat([torch.full((n,), 7 - i) for i, n in enumerate(lengths)])[None]
    packed, at = mixer(x_BTD, places(0, 28, doc_BS)), 0
    for n in lengths:
        torch.testing.assert_close(packed[:, at:at + n], mixer(x_BTD[:, at:at + n], places(0, n)), rtol=1e-9, atol=1e-9)
        at += n
    cache, parts = LayerCache(layer.window), []
    for start, stop in ((0, 8), (8, 9), (9, 12), (12, 13), (13, 28)):
        parts.append(mixer(x_BTD[:, start:stop], places(start, stop, doc_BS[:, :stop]), cache))
    torch.testing.assert_close(torch.cat(parts, 1), packed, rtol=1e-9, atol=1e-9)


def test_mla_keeps_the_latent_and_one_rotary_key():
    mixer, cfg, layer, places = build("mla", kv_lora_rank=10, qk_rope_head_dim=4)
    cache = LayerCache()
    mixer(torch.randn(3, 5, 24, **f64), places(0, 5), cache)
    assert sum(t.numel() for t in cache.kept) == 3 * 5 * (10 + 4)


def visible(this, window=0, attn="mha", **fields):
    cfg = AttentionConfig(n_head=1, **fields)
    layer, T = Layer(0, attn, window), this.positions_BT.shape[1]
    return (Places(cfg, layer, this).added[0, 0] == 0).int().tolist()


def test_masks_by_hand():
    """Prefix, image block, window, documents; [query][key]."""
    p = torch.arange(4)[None]
    assert visible(Pass(p, prefix_B=torch.tensor([2]))) == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(Pass(p, image_BS=torch.tensor([[0, 1, 1, 0]]))) == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(Pass(p), window=2) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(Pass(p, causal=False), window=2) == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert visible(Pass(p, doc_BS=torch.tensor([[0, 0, 5, 5]]))) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert visible(Pass(p[:, 2:], past=2), window=3) == [[1, 1, 1, 0], [0, 1, 1, 1]]         # two keys in the cache, two new
    assert visible(Pass(p[:, 2:], past=2), window=2) == [[1, 1, 0], [0, 1, 1]]               # one key in the cache
    assert Places(AttentionConfig(), Layer(0, "mha"), Pass(p)).added is None          # plain causal: SDPA knows it


@pytest.mark.parametrize("fields, says", [
    (dict(n_head=5), "one of"), (dict(attn="gqa", n_kv_head=3), r"\[1, 2, 4\]"), (dict(attn="mqa", n_kv_head=2), "--attn=gqa"),
    (dict(attn="mla", qk_rope_head_dim=3), "use 4"), (dict(n_head=0), "n_head=0"), (dict(attn="mla", qk_norm="head"), "leave it out"),
    (dict(attn="mla", pos="shaw"), "--pos=rope"), (dict(attn="linear", tile=0), "--tile"),
])
def test_impossible_shapes_are_refused(fields, says):
    with pytest.raises(UsageError, match=says):
        build(**fields)


def test_odd_rotary_width_is_refused():
    with pytest.raises(UsageError, match="even"):
        build(head_dim=5, n_head=4)[3](0, 3)


def test_bench_times_both_paths(capsys):
    A.bench(((1, 8, 2, 4),))
    assert capsys.readouterr().out.count("ratio") == 2
