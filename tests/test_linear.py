"""The recurrent family against its equations, written again token by token in float64, and against the published layers."""
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attention import FEATURE_MAPS, KDA, GatedDeltaNet, Lightning, Linear, TransNormer, UsageError, decayed_attention, recurrence

EXACT = dict(atol=1e-10, rtol=1e-10)
VARIANTS = {                       # name -> class, flags
    "elu": (Linear, dict(pos="none")),
    "relu rope": (Linear, dict(pos="rope", feature_map="relu")),
    "softmax rope": (Linear, dict(pos="rope", feature_map="softmax")),
    "taylor": (Linear, dict(pos="none", feature_map="taylor")),
    "taylor rope": (Linear, dict(pos="rope", feature_map="taylor")),
    "lightning": (Lightning, dict()),
    "transnormer": (TransNormer, dict()),
    "transnormer lrpe": (TransNormer, dict(pos="lrpe")),
    "gdn": (GatedDeltaNet, dict()),
    "kda": (KDA, dict()),
}


pytestmark = pytest.mark.usefixtures("shapes_checked")


def config(**flags):
    return SimpleNamespace(**{**dict(n_embd=24, n_head=3, head_dim=8, n_layer=5, pos="rope", feature_map="elu", tile=16,
                                     qkv_bias=False, out_bias=False, lrpe_layers=0), **flags})


def layer(name, index=1, dtype=torch.float64, **flags):
    torch.manual_seed(0)
    mixer, own = VARIANTS[name]
    module = mixer(config(**{**own, **flags}), SimpleNamespace(index=index, attn=name, window=0)).to(dtype)
    for key, p in module.named_parameters():          # every term must show: no gain of one, no small weights
        if key not in ("lrpe", "a_log", "dt_bias"):
            p.data = torch.randn_like(p) / (1 if p.dim() == 1 else 0.75 * p.shape[1]**0.5)
    return module


def places(T, start=0, turns=False, doc_BT=None, doc_before_B=None):
    """positions restart in every document, as a packed row has them; the turn covers the first 8 channels."""
    position_BT = torch.arange(start, start + T)[None]
    angle_1T14 = position_BT[:, :, None, None].double() * 100.0 ** (-torch.arange(4) / 4)

    def rope(x_BTHP):
        if not turns:
            return x_BTHP
        a, b, rest = x_BTHP.split([4, 4, x_BTHP.shape[-1] - 8], -1)
        cos, sin = angle_1T14.cos().to(a.dtype), angle_1T14.sin().to(a.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    return SimpleNamespace(way="", positions_BT=position_BT, rope=rope, turns=turns, doc_BT=doc_BT, doc_before_B=doc_before_B)


def new_cache():
    return SimpleNamespace(kept=[], length=0)


def random_qkv(T, B=2, H=3, K=5, U=4, grad=False):
    torch.manual_seed(T)
    return [torch.randn(B, T, H, n, dtype=torch.float64, requires_grad=grad) for n in (K, K, U)]


DOCS = torch.tensor([[0] * 5 + [1] * 19 + [2] * 1 + [3] * 12, [7] * 20 + [8] * 17])     # T = 37, no boundary on a tile's


def slow_decayed(q_BTHK, k_BTHK, v_BTHU, slope_H, doc_BT=None):
    y = []
    for t in range(q_BTHK.shape[1]):
        y_t = torch.zeros_like(v_BTHU[:, 0])
        for s in range(t + 1):
            share = torch.exp(-slope_H * (t - s)) * (q_BTHK[:, t] * k_BTHK[:, s]).sum(-1)
            if doc_BT is not None:
                share = share * (doc_BT[:, t] == doc_BT[:, s])[:, None]
            y_t = y_t + share[..., None] * v_BTHU[:, s]
        y.append(y_t)
    return torch.stack(y, 1)


def slow_delta(q_BTHK, k_BTHK, v_BTHU, g_BTHJ, beta_BTH, doc_BT=None):
    B, T, H, K = k_BTHK.shape
    S, y = torch.zeros(B, H, K, v_BTHU.shape[-1], dtype=torch.float64), []
    eye = torch.eye(K, dtype=torch.float64)
    for t in range(T):
        if doc_BT is not None and t:
            S = S * (doc_BT[:, t] == doc_BT[:, t - 1])[:, None, None, None]
        k, beta = k_BTHK[:, t], beta_BTH[:, t, :, None, None]
        erase = eye - beta * k[..., :, None] * k[..., None, :]
        S = erase @ (g_BTHJ[:, t].exp()[..., None] * S) + beta * k[..., :, None] * v_BTHU[:, t, :, None, :]
        y.append((q_BTHK[:, t, :, None, :] @ S)[..., 0, :])
    return torch.stack(y, 1), S


def delta_inputs(T, J, grad=False):
    q, k, v = random_qkv(T)
    k = F.normalize(k, dim=-1)
    g = -torch.rand(2, T, 3, J, dtype=torch.float64) * 2
    beta = torch.rand(2, T, 3, dtype=torch.float64)
    return [x.detach().requires_grad_(grad) for x in (q, k, v, g, beta)]


# ---- the functions ----

def test_decayed_attention_on_paper():
    """One head, K = U = 1, e^-slope = 1/2: y_1 = 1*2*3 = 6, y_2 = 2*(6/2 + 1*5) = 16; the state is 6/2 + 5 = 8."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([1, 2], [2, 1], [3, 5]))
    y, state = decayed_attention(q, k, v, torch.tensor([math.log(2)], dtype=torch.float64))
    torch.testing.assert_close(y.flatten(), torch.tensor([6.0, 16.0], dtype=torch.float64), **EXACT)
    assert abs(state.item() - 8) < 1e-12


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("tile", [1, 4, 16, 64])
def test_decayed_attention_equals_the_sum_for_any_tile(tile, docs):
    q, k, v = random_qkv(37)
    slope_H = torch.tensor([0.0, 0.03, 1.5], dtype=torch.float64)
    y, _ = decayed_attention(q, k, v, slope_H, doc_BT=docs, tile=tile)
    torch.testing.assert_close(y, slow_decayed(q, k, v, slope_H, docs), **EXACT)


@pytest.mark.parametrize("J", [1, 5])
@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("tile", [1, 4, 16, 64])
def test_the_delta_rule_equals_the_recurrence_for_any_tile(tile, docs, J):
    q, k, v, g, beta = delta_inputs(37, J)
    want, want_state = slow_delta(q, k, v, g, beta, docs)
    y, state = recurrence(q, k, v, g, beta, doc_BT=docs, tile=tile)
    torch.testing.assert_close(y, want, **EXACT)
    torch.testing.assert_close(state, want_state, **EXACT)


def test_equal_channel_gates_are_a_head_gate():
    q, k, v, g, beta = delta_inputs(37, 1)
    torch.testing.assert_close(recurrence(q, k, v, g.expand(-1, -1, -1, 5), beta)[0], recurrence(q, k, v, g, beta)[0], **EXACT)


def test_strong_decay_neither_overflows_nor_spoils_gradients():
    q, k, v, g, beta = delta_inputs(37, 5)
    g = (g * 40).requires_grad_()                        # e^1500 within a tile if a factor were formed alone
    y, _ = recurrence(q.float(), k.float(), v.float(), g.float(), beta.float())
    y.sum().backward()
    assert y.isfinite().all() and g.grad.isfinite().all()
    torch.testing.assert_close(y.double(), slow_delta(q, k, v, g.detach(), beta)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("kind", ["decay", "gdn", "kda"])
def test_gradients_are_those_of_the_slow_form(kind, docs):
    slope_H = torch.tensor([0.0, 0.03, 1.5], dtype=torch.float64)
    if kind == "decay":
        leaves = random_qkv(37, grad=True)
        fast, slow = decayed_attention(*leaves, slope_H, doc_BT=docs, tile=16)[0], slow_decayed(*leaves, slope_H, docs)
    else:
        leaves = delta_inputs(37, 1 if kind == "gdn" else 5, grad=True)
        fast, slow = recurrence(*leaves, doc_BT=docs, tile=16)[0], slow_delta(*leaves, docs)[0]
    weight = torch.randn_like(slow)
    for got, want in zip(torch.autograd.grad((fast * weight).sum(), leaves), torch.autograd.grad((slow * weight).sum(), leaves)):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_a_feature_map_gives_no_negative_weight(name):
    torch.manual_seed(0)
    f = FEATURE_MAPS[name](3 * torch.randn(500, 7, dtype=torch.float64))
    assert (f @ f.T).min() >= 0


def test_taylor_is_one_plus_the_cosine():
    q, k = torch.randn(2, 50, 7, dtype=torch.float64)
    got = (FEATURE_MAPS["taylor"](q) * FEATURE_MAPS["taylor"](k)).sum(-1)
    torch.testing.assert_close(got, 1 + F.cosine_similarity(q, k), **EXACT)


# ---- the layers, from x to y ----

def slow_layer(module, name, x_BTD, at):
    """The layer's own equations, one token and one sum after another."""
    cfg = {**vars(config()), **VARIANTS[name][1]}
    B, T, _ = x_BTD.shape
    H, K = 3, 8
    heads = lambda w: (x_BTD @ w.weight.T).view(B, T, H, K)
    q, k, v = heads(module.w_q), heads(module.w_k), heads(module.w_v)
    if isinstance(module, Linear):
        one = torch.ones_like(q[..., :1])
        phi = {"elu": lambda x: torch.where(x > 0, x + 1, x.exp()), "relu": lambda x: x.clamp(min=0),
               "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
               "taylor": lambda x: torch.cat([x / x.norm(dim=-1, keepdim=True), one], -1)}[cfg["feature_map"]]
        q, k = phi(q), phi(k)
        zero = torch.zeros(H, dtype=torch.float64)
        over = slow_decayed(at.rope(q), at.rope(k), v, zero, at.doc_BT)                                  # [RoPE eq 19]
        y = over / (slow_decayed(q, k, torch.ones_like(v), zero, at.doc_BT) + 1e-6)
        return y.flatten(2) @ module.w_o.weight.T
    silu = lambda x: x / (1 + (-x).exp())
    if isinstance(module, GatedDeltaNet):
        raw, out = torch.cat([x.flatten(2) for x in (q, k, v)], -1), []
        for t in range(T):
            y_t = 0
            for back in range(4):
                if t >= back:
                    same = 1 if at.doc_BT is None else (at.doc_BT[:, t] == at.doc_BT[:, t - back])[:, None]
                    y_t = y_t + module.conv[:, 3 - back] * raw[:, t - back] * same
            out.append(silu(y_t))
        q, k, v = (x.view(B, T, H, K) for x in torch.stack(out, 1).chunk(3, -1))
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        step = (1 + (module.w_decay(x_BTD) + module.dt_bias).exp()).log().view(B, T, H, -1)
        beta = 1 / (1 + (-x_BTD @ module.w_beta.weight.T).exp())
        y, _ = slow_delta(q / K**0.5, k, v, -module.a_log.exp()[:, None] * step, beta, at.doc_BT)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight
        gate = module.w_gate(x_BTD)
        gate = 1 / (1 + (-gate).exp()) * (1 if isinstance(module, KDA) else gate)
        return (gate * y.flatten(2)) @ module.w_o.weight.T
    q, k = silu(q), silu(k)
    if isinstance(module, Lightning):
        slopes = [2 ** (-8 / 3 * (h + 1)) * (1 - 1 / (4 + 1e-5) + 1e-5) for h in range(H)]
        v = silu(v)
    else:
        slopes = [s * (1 - 1 / 4 + 1e-5) for s in (2**-4, 2**-8, 2**-2)]       # two heads of 2, then the first of 4
        if cfg["pos"] == "lrpe":
            angle = at.positions_BT[:, :, None, None] * module.lrpe
            q, k = (torch.cat([x * angle.cos(), x * angle.sin()], -1) for x in (q, k))
    y = slow_decayed(q, k, v, torch.tensor(slopes, dtype=torch.float64), at.doc_BT).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    u = x_BTD @ module.w_gate.weight.T
    y = (1 / (1 + (-u).exp())) * y * module.norm.weight if isinstance(module, Lightning) else u * y
    return y @ module.w_o.weight.T


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_equals_its_equations(name, docs):
    module, x_BTD = layer(name), torch.randn(2, 37, 24, dtype=torch.float64)
    at = places(37, turns="rope" in name, doc_BT=docs)
    torch.testing.assert_close(module(x_BTD, at), slow_layer(module, name, x_BTD, at), **EXACT)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_document_is_the_document_alone(name):
    module, x_BTD = layer(name), torch.randn(2, 37, 24, dtype=torch.float64)
    y_BTD = module(x_BTD, places(37, turns="rope" in name, doc_BT=DOCS))
    for b, start, end in ((0, 0, 5), (0, 5, 24), (0, 24, 25), (0, 25, 37), (1, 0, 20), (1, 20, 37)):
        alone = module(x_BTD[b:b + 1, start:end], places(end - start, turns="rope" in name))     # a turn depends on t - s alone
        torch.testing.assert_close(y_BTD[b:b + 1, start:end], alone, **EXACT)


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("steps", [[1] * 37, [5, 1, 1, 16, 14], [20, 17], [3, 30, 4]])
@pytest.mark.parametrize("name", VARIANTS)
def test_any_chunking_through_the_cache_is_one_pass(name, steps, docs):
    module, x_BTD = layer(name), torch.randn(2, 37, 24, dtype=torch.float64)
    want = module(x_BTD, places(37, turns="rope" in name, doc_BT=docs))
    cache, start, got = new_cache(), 0, []
    for n in steps:
        here = slice(start, start + n)
        at = places(n, start, "rope" in name, None if docs is None else docs[:, here],
                    None if docs is None or not start else docs[:, start - 1])
        got.append(module(x_BTD[:, here], at, cache))
        start += n
        assert cache.length == start and sum(s[0].numel() for s in cache.kept) == module.kept(start)      # does not grow
    torch.testing.assert_close(torch.cat(got, 1), want, **EXACT)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_future_is_not_read(name):
    module, x_BTD = layer(name), torch.randn(1, 37, 24, dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(module(x_BTD, places(37, turns="rope" in name))[:, 20].square().sum(), x_BTD)
    assert grad[:, 21:].abs().max() == 0 and (grad[:, :21].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("T", [1, 16, 37, 64])
@pytest.mark.parametrize("name", VARIANTS)
def test_macs_are_those_executed(name, T):
    module, x_BTD = layer(name), torch.randn(1, T, 24, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        module(x_BTD, places(T, turns="rope" in name))
    inside = sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
    assert module.macs(T) == (counter.get_total_flops() // 2 - T * inside) // T


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_keeps_a_wide_state(name):
    module, x_BTD = layer(name), torch.randn(2, 37, 24, dtype=torch.float64)
    want = module(x_BTD, places(37, turns="rope" in name))
    for weights, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        half, cache = layer(name, dtype=torch.float64).to(weights), new_cache()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_BTD = half(x_BTD.to(weights), places(37, turns="rope" in name), cache)
        assert y_BTD.dtype == torch.bfloat16 and cache.kept[0].dtype == torch.float32
        assert (y_BTD.double() - want).norm() < 0.05 * want.norm()


def test_lrpe_only_in_the_layers_asked_for():
    assert layer("transnormer lrpe", index=1, lrpe_layers=2).lrpe.shape == (3, 8)
    assert not hasattr(layer("transnormer lrpe", index=2, lrpe_layers=2), "lrpe") and not hasattr(layer("transnormer"), "lrpe")


def test_transnormer_slopes_are_alibis():
    for H, want in ((4, [2**-2, 2**-4, 2**-6, 2**-8]), (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]), (1, [2**-8])):
        slopes_H = layer("transnormer", index=0, n_head=H).slopes(torch.zeros(1, dtype=torch.float64))
        torch.testing.assert_close(slopes_H, torch.tensor(want, dtype=torch.float64) * (1 + 1e-5), **EXACT)


@pytest.mark.parametrize("name", ["lightning", "transnormer"])
def test_one_layer_models_have_finite_slopes(name):
    assert layer(name, index=0, n_layer=1).slopes(torch.zeros(1)).isfinite().all()


@pytest.mark.parametrize("name, flags, message", [("elu", dict(feature_map="cosine"), "use one of"),
                                                  ("lightning", dict(tile=0), "--tile=64")])
def test_impossible_shapes_are_refused(name, flags, message):
    with pytest.raises(UsageError, match=message):
        layer(name, **flags)


# ---- published layers ----

def interleave(module):
    """[q | k | v] of a head after another, the rows of MiniMax's qkv_proj."""
    rows = [w.weight.view(module.n_head, module.head_dim, -1) for w in (module.w_q, module.w_k, module.w_v)]
    return torch.cat(rows, 1).flatten(0, 1)


@pytest.mark.peer
@pytest.mark.parametrize("index", [0, 1, 4])
@pytest.mark.parametrize("head_dim", [8, 6])
def test_lightning_equals_minimax(index, head_dim):
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    torch.set_default_dtype(torch.float64)              # so that its slopes are as exact as ours
    try:
        peer = minimax.MiniMaxLightningAttention(minimax.MiniMaxConfig(
            hidden_size=24, num_attention_heads=3, num_key_value_heads=3, head_dim=head_dim, num_hidden_layers=5, block_size=16,
            layer_types=["linear_attention"] * 5, vocab_size=10), index)
    finally:
        torch.set_default_dtype(torch.float32)
    peer.norm = torch.nn.RMSNorm(3 * head_dim, eps=peer.norm.variance_epsilon, dtype=torch.float64)   # theirs rounds to float32
    module = layer("lightning", index, head_dim=head_dim)
    peer.load_state_dict({"qkv_proj.weight": interleave(module), "out_proj.weight": module.w_o.weight,
                          "output_gate.weight": module.w_gate.weight, "norm.weight": module.norm.weight}, strict=False)
    x_BTD = torch.randn(2, 37, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x_BTD, places(37)), peer(x_BTD, None, None)[0], **EXACT)
    cache, theirs = new_cache(), minimax.MiniMaxCache()
    for here in (slice(0, 20), slice(20, 21), slice(21, 37)):
        got, want = module(x_BTD[:, here], places(1), cache), peer(x_BTD[:, here], None, None, cache=theirs)[0]
        torch.testing.assert_close(got, want, **EXACT)
        torch.testing.assert_close(cache.kept[0], theirs.get_linear_cache(index), **EXACT)


@pytest.mark.peer
def test_the_delta_rule_equals_qwen3_next():
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, g, beta = (x.float() for x in delta_inputs(37, 1))
    y, state = recurrence(q * 5**-0.5, k, v, g, beta, tile=16)
    chunked = qwen.torch_chunk_gated_delta_rule(q, k, v, g[..., 0], beta, chunk_size=16, output_final_state=True)
    stepped = qwen.torch_recurrent_gated_delta_rule(q, k, v, g[..., 0], beta, initial_state=None, output_final_state=True)
    for want, want_state in (chunked, stepped):
        torch.testing.assert_close(y, want, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(state, want_state, atol=2e-6, rtol=1e-5)
    more, _ = recurrence(q * 5**-0.5, k, v, g, beta, state, tile=16)
    want = qwen.torch_recurrent_gated_delta_rule(q, k, v, g[..., 0], beta, initial_state=state, output_final_state=False)[0]
    torch.testing.assert_close(more, want, atol=2e-6, rtol=1e-5)


@pytest.mark.peer
def test_gdn_equals_the_layer_of_qwen3_next():
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    peer = qwen.Qwen3NextGatedDeltaNet(qwen.Qwen3NextConfig(
        hidden_size=24, linear_num_value_heads=3, linear_num_key_heads=3, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_conv_kernel_dim=4, num_hidden_layers=2, layer_types=["linear_attention"] * 2, rms_norm_eps=1e-6), 0)
    module = layer("gdn", dtype=torch.float32)
    heads = lambda *ws: torch.cat([w.weight.view(3, -1, 24) for w in ws], 1).flatten(0, 1)
    peer.load_state_dict({
        "in_proj_qkvz.weight": heads(module.w_q, module.w_k, module.w_v, module.w_gate),
        "in_proj_ba.weight": heads(module.w_beta, module.w_decay), "conv1d.weight": module.conv[:, None],
        "A_log": module.a_log, "dt_bias": module.dt_bias, "norm.weight": module.norm.weight,
        "out_proj.weight": module.w_o.weight})
    x_BTD = torch.randn(2, 37, 24)
    torch.testing.assert_close(module(x_BTD, places(37)), peer(x_BTD), atol=1e-5, rtol=1e-5)


@pytest.mark.peer
def test_kda_equals_the_layer_of_kimi_linear():
    kimi = pytest.importorskip("transformers.models.kimi_attention.modeling_kimi_linear")
    peer = kimi.KimiLinearDeltaAttention(SimpleNamespace(
        hidden_size=24, linear_num_heads=3, linear_head_dim=8, linear_conv_kernel_dim=4, hidden_act="silu", rms_norm_eps=1e-6,
        layer_types=["linear_attention"] * 2), 0)
    module = layer("kda", dtype=torch.float32)
    peer.load_state_dict({
        **{f"{n}_proj.weight": getattr(module, f"w_{n}").weight for n in "qkvo"}, "b_proj.weight": module.w_beta.weight,
        "conv1d.weight": module.conv[:, None], "o_norm.weight": module.norm.weight,
        "g_a_proj.weight": module.w_gate[0].weight, "g_b_proj.weight": module.w_gate[1].weight,
        "forget_gate.f_a_proj.weight": module.w_decay[0].weight, "forget_gate.f_b_proj.weight": module.w_decay[1].weight,
        "forget_gate.dt_bias": module.dt_bias, "forget_gate.A_log": module.a_log.view(1, 1, 3, 1)})
    x_BTD = torch.randn(2, 37, 24)
    torch.testing.assert_close(module(x_BTD, places(37)), peer(x_BTD), atol=1e-5, rtol=1e-5)
