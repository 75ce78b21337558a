import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import dist
import kernels
import moe
from conftest import launch
from model import Model, ModelConfig
from moe import MoE, MoEConfig
from tokenizer import UsageError

SIXTEEN = dict(n_expert=16, n_active=4)
LIMITED = dict(SIXTEEN, n_group=4, top_group=2)
GREEDY = dict(LIMITED, router="softmax", group_score="max", bias_lr=0.0, norm_gates=False)
OSS = dict(router="chosen", router_bias=True, expert_act="swiglu_oss", expert_bias=True, n_shared_expert=0)


def config(n_embd=6, **fields):
    cfg = MoEConfig(**dict(n_expert=8, n_active=2) | fields)
    cfg.n_embd, cfg.n_layer = n_embd, 6
    return cfg


def layer_of(seed=0, n_embd=6, d_ff=24, **fields):
    cfg = config(n_embd, **fields)
    torch.manual_seed(seed)
    layer = MoE(cfg, d_ff)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        if cfg.group_score != "max":
            layer.bias_E.copy_(torch.randn_like(layer.bias_E) * 0.3)
    return layer


# ---- The slow transcription ----

def slow_route(logit_E, bias_E, cfg):
    """{expert: gate} of one token, in the order of its choice, from lists."""
    E, low = cfg.n_expert, {"max": 0.0, "top2": -math.inf}[cfg.group_score]
    one = {"sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1), "chosen": lambda x: x}[cfg.router](logit_E)
    score = [float(s) for s in one]
    biased = [float(one[e] + bias_E[e]) for e in range(E)]
    if cfg.n_group:
        size = E // cfg.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(cfg.n_group)]
        worth = [max(biased[e] for e in g) if cfg.group_score == "max" else sum(sorted((biased[e] for e in g), reverse=True)[:2]) for g in groups]
        best = sorted(range(cfg.n_group), key=lambda g: -worth[g])[:cfg.top_group]
        biased = [biased[e] if e // size in best else low for e in range(E)]
    chosen = sorted(range(E), key=lambda e: -biased[e])[:cfg.n_active]
    gates = [score[e] for e in chosen]
    if cfg.router == "chosen":
        top = max(gates)
        gates = [math.exp(g - top) / sum(math.exp(h - top) for h in gates) for g in gates]
    elif cfg.norm_gates:
        gates = [g / sum(gates) for g in gates]
    return {e: cfg.routed_scale * g for e, g in zip(chosen, gates)}


def slow_mlp(w, e, x, act):
    b = lambda name: 0 if w.b_gate is None else getattr(w, name)[e]
    gate, up = w.w_gate[e] @ x + b("b_gate"), w.w_up[e] @ x + b("b_up")
    if act == "swiglu":
        h = gate / (1 + torch.exp(-gate)) * up
    else:
        gate, up = torch.minimum(gate, torch.tensor(7.0)), torch.maximum(torch.minimum(up, torch.tensor(7.0)), torch.tensor(-7.0))
        h = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    return w.w_down[e] @ h + b("b_down")


def slow_moe(layer, x_MD):
    """[DSV3 eq 12-16] token by token; the gates again with a graph, over the experts that slow_route chose."""
    cfg, rows, taken = layer.cfg, [], [0] * layer.cfg.n_expert
    room = math.ceil(cfg.capacity * cfg.n_active * len(x_MD) / cfg.n_expert) or len(x_MD)
    for x in x_MD:
        logit = layer.router.weight @ x + (layer.router.bias if cfg.router_bias else 0)
        chosen = list(slow_route(logit.detach(), layer.bias_E, cfg))
        score = {"sigmoid": torch.sigmoid, "softmax": lambda l: l.softmax(0), "chosen": torch.exp}[cfg.router](logit)
        total = sum(score[e] for e in chosen) if cfg.norm_gates or cfg.router == "chosen" else 1
        y = mlp = slow_mlp(layer.shared, 0, x, cfg.expert_act) if layer.shared is not None else torch.zeros_like(x)
        for e in chosen:
            taken[e] += 1
            if taken[e] <= room:
                y = y + cfg.routed_scale * score[e] / total * slow_mlp(layer.experts, e, x, cfg.expert_act)
        rows.append(y)
    return torch.stack(rows)


VARIANTS = [dict(), dict(SIXTEEN), dict(router="softmax"), dict(router="softmax", norm_gates=False), dict(router="softmax", routed_scale=2.5, n_shared_expert=0),
            dict(norm_gates=False), dict(router="chosen"), dict(OSS), LIMITED, dict(LIMITED, router="softmax"), dict(LIMITED, top_group=4),
            dict(LIMITED, router="chosen"), GREEDY, dict(GREEDY, router="sigmoid", norm_gates=True, n_active=1, top_group=1),
            dict(n_expert=5, n_active=5), dict(n_expert=1, n_active=1), dict(router_bias=True, expert_bias=True, n_shared_expert=3)]
ids = lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()) if isinstance(fields, dict) else None


@pytest.mark.parametrize("fields", VARIANTS, ids=ids)
@pytest.mark.parametrize("M", [1, 7, 63])
def test_route_equals_the_papers_token_by_token(fields, M, shapes_checked):
    cfg = config(**fields)
    torch.manual_seed(M)
    logits_ME, bias_E = 2 * torch.randn(M, cfg.n_expert), torch.randn(cfg.n_expert) * (0.5 if cfg.group_score == "top2" else 0)
    expert_MA, gate_MA = moe.route(logits_ME, bias_E, cfg)
    for logit, experts, gates in zip(logits_ME, expert_MA.tolist(), gate_MA):
        want = slow_route(logit, bias_E, cfg)
        assert set(experts) == set(want) and len(set(experts)) == cfg.n_active
        torch.testing.assert_close(gates, torch.tensor([want[e] for e in experts]), rtol=2e-6, atol=0)
    if cfg.norm_gates or cfg.router == "chosen":
        torch.testing.assert_close(gate_MA.sum(1), torch.full((M,), cfg.routed_scale))


@pytest.mark.parametrize("fields", VARIANTS + [dict(capacity=1.0), dict(SIXTEEN, capacity=0.5)], ids=ids)
@pytest.mark.parametrize("T", [1, 7, 63])
def test_moe_equals_the_paper(fields, T, shapes_checked):
    layer = layer_of(**fields)
    x_BTD = torch.randn(1, T, 6, requires_grad=True)
    got, want = layer(x_BTD), slow_moe(layer, x_BTD[0])[None]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight, leaves = torch.randn_like(got), [x_BTD, *layer.parameters()]
    for a, b in zip(torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves, allow_unused=True)):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-3, atol=1e-4)


def test_groups_by_hand():
    """Two groups of two, one may be visited. V3 adds (0.5 + 0.5 beats 0.9 + 0.01), V2 takes the best."""
    logits_14 = torch.tensor([[0.5, 0.5, 0.9, 0.01]]).logit()
    v3 = config(n_expert=4, n_active=2, n_group=2, top_group=1)
    v2 = config(n_expert=4, n_active=2, n_group=2, top_group=1, group_score="max", bias_lr=0.0, norm_gates=False)
    assert sorted(moe.route(logits_14, torch.zeros(4), v3)[0][0].tolist()) == [0, 1]
    expert_12, gate_12 = moe.route(logits_14, torch.zeros(4), v2)
    assert sorted(expert_12[0].tolist()) == [2, 3]
    torch.testing.assert_close(gate_12.sum(), torch.tensor(0.91))
    assert sorted(moe.route(logits_14, torch.full((4,), -5.0), v3)[0][0].tolist()) == [0, 1]     # negative, yet above what is out
    expert_12, gate_12 = moe.route(torch.tensor([[9.0, -200.0, 8.0, 8.0]]), torch.zeros(4), v2)
    assert dict(zip(expert_12[0].tolist(), gate_12[0].tolist()))[0] > 0.99 and gate_12.min() == 0     # the second has no score, wherever it is


def test_router_is_float32_and_its_bias_stays_so():
    layer = layer_of(n_expert=4).bfloat16()
    assert layer.bias_E.dtype == torch.float32 and layer.bias_E.abs().sum() > 0 and layer.router.weight.dtype == torch.bfloat16
    x_BTD = torch.randn(2, 2000, 6, dtype=torch.bfloat16)        # among so many some scores are near
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x_BTD).dtype == torch.bfloat16
    logits_ME = F.linear(x_BTD.flatten(0, 1).float(), layer.router.weight.float())
    expert_MA, _ = moe.route(logits_ME, layer.bias_E, layer.cfg)
    assert torch.equal(layer.count_E, torch.bincount(expert_MA.flatten(), minlength=4))
    half_ME = F.linear(x_BTD.flatten(0, 1), layer.router.weight).float()
    assert not torch.equal(layer.count_E, torch.bincount(moe.route(half_ME, layer.bias_E, layer.cfg)[0].flatten(), minlength=4))
    kept = layer.bias_E.clone()
    layer.bias_E += 1e-4
    assert not torch.equal(layer.half().bias_E, kept) and layer.double().bias_E.dtype == torch.float32


def test_gpt_oss_activation_by_hand():
    gate, up = torch.tensor([9.0, -9.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 8.0, -8.0])
    sigmoid = lambda x: 1 / (1 + math.exp(-1.702 * x))
    torch.testing.assert_close(moe.swiglu_oss(gate, up), torch.tensor([7 * sigmoid(7), -9 * sigmoid(-9), 8 * sigmoid(1), -6 * sigmoid(1)]))


# ---- Dispatch ----

def gradients(layer, x_MD, expert_MA, gate_MA, weight_MD=None):
    x_MD, gate_MA = x_MD.clone().requires_grad_(), gate_MA.clone().requires_grad_()
    y_MD = layer(x_MD, expert_MA, gate_MA)
    loss = y_MD.sum() if weight_MD is None else (y_MD * weight_MD).sum()
    return y_MD, *torch.autograd.grad(loss, [x_MD, gate_MA, *layer.parameters()])


@pytest.mark.parametrize("D, F_expert", [(8, 16), (7, 13), (1, 1), (6, 10)])
@pytest.mark.parametrize("case", ["random", "one token", "all to one", "half of them empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("oss", [False, True])
def test_loop_equals_grouped(D, F_expert, case, dtype, oss, shapes_checked):
    E, A, M = 6, 2, 1 if case == "one token" else 23
    torch.manual_seed(0)
    make = lambda how: moe.Experts(config(D, dispatch=how, expert_act="swiglu_oss" if oss else "swiglu"), E, F_expert, oss).to(dtype)
    a, b = make("loop"), make("grouped")
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters()):
            q.copy_(p.copy_(torch.randn_like(p) * 0.5))
    expert_MA = torch.stack([torch.randperm(E // 2 if "half" in case else E)[:A] for _ in range(M)])
    if case == "all to one":
        expert_MA = torch.full((M, 1), 3)
    x_MD, gate_MA = torch.randn(M, D, dtype=dtype), torch.rand(expert_MA.shape)
    bound = 1e-5 if dtype == torch.float32 else 0.03             # of the tensor's norm
    for weight_MD in (None, torch.randn(M, D)):                  # a sum has an expanded gradient
        for p, q in zip(gradients(a, x_MD, expert_MA, gate_MA, weight_MD), gradients(b, x_MD, expert_MA, gate_MA, weight_MD)):
            assert q.dtype == p.dtype and (q - p).norm() <= bound * (p.norm() + 0.1)
    out = b.visit(x_MD, torch.tensor([M, 0, 0, 0, 0, 0]))        # also where nothing is multiplied after it
    out.sum().backward()
    assert (b.w_up.grad[1:] == 0).all() and torch.isfinite(b.w_up.grad).all()


def test_grouped_under_autocast_and_in_float64():
    a, b = layer_of(dispatch="loop"), layer_of(dispatch="grouped")
    x_BTD = torch.randn(2, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(a(x_BTD), b(x_BTD), rtol=0.02, atol=0.02)
    torch.testing.assert_close(a.double()(x_BTD.double()), b.double()(x_BTD.double()), rtol=0, atol=0)       # there it is the loop


def test_dispatch_is_said():
    said = lambda how, device="cpu", dtype=torch.float32: moe.dispatch_of(config(dispatch=how), device, dtype)
    assert said("auto").startswith("loop (on cpu") and said("loop") == "loop (--dispatch)" and said("grouped") == "grouped (--dispatch)"
    assert said("grouped", dtype=torch.float64) == "loop (grouped_mm does not take float64)"
    if not kernels.takes_triton(torch.device("cpu")):
        assert said("triton") == "loop (on cpu: the reference; triton does not run on cpu here)"


@pytest.mark.parametrize("capability, want", [((9, 0), "grouped"), ((8, 0), "grouped"), ((7, 5), "loop")])
def test_dispatch_on_a_gpu(capability, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "_choice", "torch")
    assert moe.dispatch_of(config(), "cuda").startswith(want)
    assert moe.dispatch_of(config(), torch.device("cuda", 0), torch.float16).startswith("loop")
    monkeypatch.setattr(kernels, "_choice", "triton")
    said = lambda dtype=torch.bfloat16, **fields: moe.dispatch_of(config(**fields), "cuda", dtype)
    for dtype in (torch.bfloat16, torch.float16):
        assert said(dtype).startswith("triton" if capability >= (8, 0) else "loop"), said(dtype)
    assert said(torch.float32).startswith(want) and said(dispatch="grouped").startswith("grouped") and said(dispatch="loop").startswith("loop")
    for odd in (dict(expert_act="swiglu_oss"), dict(expert_bias=True)):
        assert said(**odd).startswith(want) and ("no biases" in said(**odd)) == (capability >= (8, 0))
    monkeypatch.setattr(moe, "GROUPED_MM", None)
    assert moe.dispatch_of(config(dispatch="grouped"), "cuda") == "loop (this torch has no grouped_mm)"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_equals_loop_on_a_gpu(dtype):
    for D, F_expert in ((64, 128), (63, 65)):
        torch.manual_seed(0)
        a, b = (moe.Experts(config(D, dispatch=how), 8, F_expert).to("cuda", dtype) for how in ("loop", "grouped"))
        with torch.no_grad():
            for p, q in zip(a.parameters(), b.parameters()):
                q.copy_(p.copy_(torch.randn_like(p) * 0.1))
        expert_MA = torch.stack([torch.randperm(5)[:2] for _ in range(301)]).cuda()             # three of eight are empty
        x_MD, gate_MA = torch.randn(301, D, device="cuda", dtype=dtype), torch.rand(301, 2, device="cuda")
        junk = torch.full((1 << 24,), float("nan"), device="cuda")                              # what is not written shows
        del junk
        for p, q in zip(gradients(a, x_MD, expert_MA, gate_MA), gradients(b, x_MD, expert_MA, gate_MA)):
            torch.testing.assert_close(q, p, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("how", ["loop", "grouped"])
def test_an_expert_without_tokens_has_a_zero_gradient(how):
    layer = layer_of(n_expert=4, n_active=1, dispatch=how)
    with torch.no_grad():
        layer.bias_E.copy_(torch.tensor([9.0, 0, 0, 0]))
    layer(torch.randn(2, 5, 6)).sum().backward()
    assert layer.experts.w_up.grad[0].abs().sum() > 0 and (layer.experts.w_up.grad[1:] == 0).all()


@pytest.mark.parametrize("how", ["loop", "grouped"])
def test_output_of_a_token_does_not_depend_on_the_batch(how):
    layer = layer_of(dispatch=how)
    x_BTD = torch.randn(3, 8, 6)
    torch.testing.assert_close(layer(x_BTD)[1:2], layer(x_BTD[1:2]))
    torch.testing.assert_close(layer(x_BTD.flip(0)).flip(0), layer(x_BTD))


def test_experts_on_two_ranks_are_those_on_one():
    """The seam: each half of the experts visits its own rows, and nothing else changes."""
    layer = layer_of(n_expert=4)
    whole, halves = layer.experts, [moe.Experts(layer.cfg, 2, len(layer.experts.w_gate[0])) for _ in range(2)]
    for r, half in enumerate(halves):
        half.load_state_dict({name: p[2 * r:2 * r + 2] for name, p in whole.state_dict().items()})
    x_BTD = torch.randn(2, 9, 6)
    want = layer(x_BTD)
    sent = lambda x_VD, count_E: torch.cat([half.visit(rows, count) for half, rows, count in
                                            zip(halves, x_VD.split(count_E.view(2, 2).sum(1).tolist()), count_E.split(2))])
    whole.visit = sent
    torch.testing.assert_close(layer(x_BTD), want)


# ---- Capacity ----

def test_capacity_drops_what_comes_late():
    """Five tokens, two experts, one visit each, all to the first: capacity 0.8 leaves ceil(0.8 * 5 / 2) = 2 of them."""
    layer = layer_of(n_expert=2, n_active=1, n_shared_expert=0, capacity=0.8)
    layer.bias_E.copy_(torch.tensor([9.0, 0.0]))
    y_BTD = layer(torch.randn(1, 5, 6))
    assert (y_BTD[0, :2].abs().sum(-1) > 0).all() and (y_BTD[0, 2:] == 0).all()
    assert layer.count_E.tolist() == [5, 0]                     # the bias wants to know who was asked, not who was served
    metrics = moe.update_biases(layer)
    assert metrics["dropped"] == pytest.approx(0.6) and metrics["max_vio"] == 1 and metrics["min_load"] == 0
    layer.cfg.capacity = 2.0
    assert (layer(torch.randn(1, 5, 6)).abs().sum(-1) > 0).all() and moe.update_biases(layer)["dropped"] == 0


def test_visits_by_hand():
    order, count = moe.visits(torch.tensor([[1, 0], [1, 2], [0, 1]]), 4)
    assert order.tolist() == [1, 4, 0, 2, 5, 3] and count.tolist() == [2, 3, 1, 0]
    order, count = moe.visits(torch.tensor([[1, 0], [1, 2], [0, 1]]), 4, capacity=1)
    assert order.tolist() == [1, 0, 3] and count.tolist() == [1, 1, 1, 0]


# ---- Balance losses ----

def slow_losses(logits_TE, expert_TA, cfg):
    """Every loss of one row, summed over tokens and experts one at a time."""
    T, E, A, N = *logits_TE.shape, expert_TA.shape[1], cfg.n_device
    score = [(torch.sigmoid(l) if cfg.router == "sigmoid" else l.softmax(0)).tolist() for l in logits_TE]
    f = [sum(e in row for row in expert_TA.tolist()) * E / (A * T) for e in range(E)]
    P = {"switch": [sum(l.softmax(0)[e].item() for l in logits_TE) / T for e in range(E)], "expert": [sum(s[e] for s in score) / T for e in range(E)],
         "sequence": [sum(s[e] / sum(s) for s in score) / T for e in range(E)]}
    best = [sorted(range(E), key=lambda e: -s[e])[:A] for s in score]                         # without groups, for DSV3 eq 18
    own = [sum(e in row for row in best) * E / (A * T) for e in range(E)]
    want = {name: sum((own if name == "sequence" else f)[e] * p[e] for e in range(E)) for name, p in P.items()}
    want["z"] = sum(math.log(sum(math.exp(x) for x in l)) ** 2 for l in logits_TE.tolist()) / T
    places = [range(n * E // N, (n + 1) * E // N) for n in range(N)]
    want["device"] = sum(sum(f[e] for e in on) / len(on) * sum(P["sequence"][e] for e in on) for on in places)
    most = cfg.top_group if cfg.n_group else min(A, N)
    sent = [sum(any(e in on for e in row) for row in expert_TA.tolist()) for on in places]
    want["comm"] = sum(N / (most * T) * s * sum(P["sequence"][e] for e in on) for s, on in zip(sent, places))
    return want


@pytest.mark.parametrize("fields", [dict(), dict(router="softmax"), dict(router="chosen"), dict(LIMITED, n_device=4), dict(GREEDY, n_device=4)], ids=ids)
def test_losses_equal_the_papers(fields, shapes_checked):
    base = dict(n_device=2) | fields
    for kind in ("switch", "expert", "sequence"):
        cfg = config(**base, aux_loss=kind, z_alpha=1.0, device_alpha=1.0, comm_alpha=1.0)
        torch.manual_seed(1)
        logits_BTE = 2 * torch.randn(3, 7, cfg.n_expert)
        bias_E = torch.randn(cfg.n_expert) * (cfg.bias_lr > 0)
        expert_BTA = moe.route(logits_BTE.flatten(0, 1), bias_E, cfg)[0].unflatten(0, (3, 7))
        got = moe.balance_losses(logits_BTE, expert_BTA, cfg)
        for b in range(3):
            want = slow_losses(logits_BTE[b], expert_BTA[b], cfg)
            for name, key in (("aux_alpha", kind), ("z_alpha", "z"), ("device_alpha", "device"), ("comm_alpha", "comm")):
                assert got[name][b].item() == pytest.approx(want[key], rel=1e-5), (name, kind)


def test_a_balanced_row_has_loss_one():
    """Eight tokens, token t visits experts t and t + 1, and all logits are alike."""
    expert_182 = torch.stack([torch.arange(8), torch.arange(1, 9) % 8], 1)[None]
    far = torch.stack([torch.arange(8), (torch.arange(8) + 4) % 8], 1)[None]                  # each token to both devices
    for router in moe.ROUTERS:
        for kind in ("switch", "expert", "sequence"):
            cfg = config(router=router, aux_loss=kind, n_device=2, z_alpha=1.0, device_alpha=1.0, comm_alpha=1.0)
            losses = moe.balance_losses(torch.zeros(1, 8, 8), expert_182, cfg)
            assert losses["aux_alpha"].item() == pytest.approx(4.0 if (router, kind) == ("sigmoid", "expert") else 1.0)     # 8 scores of 1/2
            assert losses["device_alpha"].item() == pytest.approx(1.0) and losses["z_alpha"].item() == pytest.approx(math.log(8) ** 2)
            assert losses["comm_alpha"].item() == pytest.approx(10 / 16)                      # 2 tokens to two devices, 6 to one
            assert moe.balance_losses(torch.zeros(1, 8, 8), far, cfg)["comm_alpha"].item() == pytest.approx(1.0)
    skewed = torch.zeros(1, 8, 2, dtype=torch.int64)
    skewed[..., 1] = 1
    logits_188 = torch.zeros(1, 8, 8)
    logits_188[..., :2] = 30.0
    cfg = config(router="softmax", aux_loss="switch", n_device=4, device_alpha=1.0, comm_alpha=1.0)
    assert {k: round(v.item(), 4) for k, v in moe.balance_losses(logits_188, skewed, cfg).items()} == dict(aux_alpha=4.0, device_alpha=4.0, comm_alpha=2.0)


ALL = dict(aux_loss="sequence", aux_alpha=0.3, z_alpha=0.2, n_device=2, device_alpha=0.5, comm_alpha=0.7)


@pytest.mark.parametrize("kind", ["switch", "expert", "sequence", "none"])
def test_micro_batches_add_up_to_the_batch(kind):
    """Counts exactly, losses and their gradients to rounding: every loss belongs to one row."""
    fields = dict(ALL, aux_loss=kind)
    a, b, x_BTD, weight_B = layer_of(**fields), layer_of(**fields), torch.randn(4, 9, 6), torch.rand(4)
    a(x_BTD)
    total = moe.aux_sum(a, weight_B)
    total.backward()
    parts = 0.0
    for x_1TD, weight_1 in zip(x_BTD.split(1), weight_B.split(1)):
        b(x_1TD)
        part = moe.aux_sum(b, weight_1)
        part.backward()
        parts += part.item()
    assert torch.equal(a.count_E, b.count_E) and a.count_E.sum() == 4 * 9 * a.cfg.n_active
    assert parts == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(a.router.weight.grad, b.router.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.seen, b.seen)


def test_a_model_adds_them_by_the_weight_of_a_row():
    import model
    small = dict(vocab_size=19, n_layer=2, n_embd=16, n_head=2, seq_len=9, moe=True, n_expert=4, n_dense_layer=0)
    m, plain = model.Model(model.ModelConfig(**small, **ALL)), model.Model(model.ModelConfig(**small))
    torch.manual_seed(0)
    tokens, weights = torch.randint(19, (4, 9)), torch.rand(4, 9) * torch.tensor([[1.0], [0.0], [2.0], [1.0]])
    rows = lambda i: dict(tokens=tokens[i], targets=tokens[i].roll(-1, 1), weights=weights[i])
    whole = m.loss(rows(slice(0, 4)))[0].item()
    assert sum(m.loss(rows(slice(b, b + 1)))[0].item() for b in range(4)) == pytest.approx(whole, rel=1e-6)
    m.hidden(tokens)
    extra = moe.aux_sum(m, weights.sum(1)).item()
    assert whole - plain.loss(rows(slice(0, 4)))[0].item() == pytest.approx(extra, rel=1e-4) and extra > 0.1
    assert m.eval().loss(rows(slice(0, 4)))[0].item() == pytest.approx(whole - extra, rel=1e-6)


def test_auxiliary_losses_are_weighed_and_gone_in_evaluation():
    layer, x_BTD = layer_of(**ALL), torch.randn(2, 7, 6)
    layer(x_BTD)
    logits_BTE = F.linear(x_BTD, layer.router.weight)
    expert_MA, _ = moe.route(logits_BTE.flatten(0, 1), layer.bias_E, layer.cfg)
    parts = moe.balance_losses(logits_BTE, expert_MA.view(2, 7, 2), layer.cfg)
    torch.testing.assert_close(layer.aux_B, 0.3 * parts["aux_alpha"] + 0.2 * parts["z_alpha"] + 0.5 * parts["device_alpha"] + 0.7 * parts["comm_alpha"])
    seen = layer.count_E.clone()
    layer.eval()(x_BTD)
    assert layer.aux_B is None and torch.equal(layer.count_E, seen) and moe.aux_sum(layer, torch.ones(2)) == 0
    plain = layer_of()
    plain(x_BTD)
    assert plain.aux_B is None


def test_what_training_left_behind_is_no_part_of_a_copy_or_of_an_evaluation():
    layer = layer_of(**ALL)
    layer(torch.randn(2, 7, 6))
    assert layer.aux_B is not None and copy.deepcopy(layer).aux_B is None
    model = Model(ModelConfig(vocab_size=17, n_layer=2, n_embd=16, n_head=2, seq_len=16, moe=True, n_dense_layer=0, mtp=1, aux_loss="sequence", aux_alpha=9.0))
    tokens_BT = torch.arange(12).view(2, 6)
    batch = dict(tokens=tokens_BT, targets=tokens_BT, weights=torch.ones(2, 6))
    want = model.eval().loss(batch)[0]
    model.train().mtp_logits(tokens_BT[:1])                      # whose modules an evaluation does not run
    assert torch.equal(model.eval().loss(batch)[0], want)
    model.train()(tokens_BT)
    seen = moe.update_biases(model)
    assert 0 <= seen["min_load"] <= 1 and seen["max_vio"] > 0    # of the blocks that ran
    for dtype in (torch.bfloat16, torch.float64):
        model.type(dtype)
        assert all(m.count_E.dtype == torch.int64 and m.bias_E.dtype == torch.float32 for m in model.modules() if isinstance(m, moe.MoE))


def test_a_capacity_beyond_all_visits_drops_nothing():
    x_BTD = torch.randn(2, 7, 6)
    torch.testing.assert_close(layer_of(capacity=1e300)(x_BTD), layer_of()(x_BTD), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    a, b = layer_of(**ALL), layer_of(**ALL)
    x_BTD, rows = torch.randn(2, 7, 6, requires_grad=True), torch.ones(2)
    grads = []
    for layer, y_BTD in ((a, a(x_BTD)), (b, checkpoint(b, x_BTD, use_reentrant=reentrant))):
        aux = moe.aux_sum(layer, rows)
        x_BTD.grad = None
        if layer is b and reentrant:                             # no graph in the first pass
            with pytest.raises(UsageError, match="use_reentrant=False"):
                (y_BTD.square().sum() + aux).backward()
            return
        (y_BTD.square().sum() + aux).backward()
        grads.append([x_BTD.grad.clone(), *(p.grad for p in layer.parameters())])
    for p, q in zip(*grads):
        torch.testing.assert_close(p, q)
    assert torch.equal(a.count_E, b.count_E) and torch.equal(a.seen, b.seen) and b.count_E.sum() == 2 * 7 * 2
    assert b.aux_B is None and not moe.recomputing()


# ---- Bias and metrics ----

def test_bias_update_by_hand():
    layer = layer_of(n_expert=4, n_active=1, bias_lr=0.1)
    layer.bias_E.zero_()
    layer.count_E.copy_(torch.tensor([8, 4, 4, 0]))
    layer.seen.copy_(torch.tensor([8 * math.log(4), 4.0]))
    assert moe.update_biases(layer) == pytest.approx(dict(max_vio=1.0, min_load=0.0, router_entropy=0.5, dropped=0.25, bias_range=0.2))
    torch.testing.assert_close(layer.bias_E, torch.tensor([-0.1, 0.0, 0.0, 0.1]))
    assert layer.count_E.sum() == 0 and layer.seen.sum() == 0
    assert moe.update_biases(torch.nn.Linear(2, 2)) == {}


def test_router_entropy_is_one_where_all_are_alike_and_zero_where_one_wins():
    for router in moe.ROUTERS:
        layer = layer_of(n_expert=4, n_active=2, router=router)
        with torch.no_grad():
            layer.router.weight.zero_()
        layer(torch.randn(2, 7, 6))
        assert moe.update_biases(layer)["router_entropy"] == pytest.approx(1.0)
        with torch.no_grad():
            layer.router.weight[0], layer.router.weight[1:] = 50.0, -50.0
        layer(torch.ones(2, 7, 6))
        assert moe.update_biases(layer)["router_entropy"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("fields", [dict(n_expert=8), dict(LIMITED), dict(router="softmax", bias_lr=0.002), dict(router="chosen", bias_lr=0.03)], ids=ids)
def test_the_bias_balances_a_skewed_router(fields):
    torch.manual_seed(0)
    layer, vios = layer_of(**dict(n_embd=16, bias_lr=0.01) | fields), []
    layer.bias_E.zero_()
    skew = torch.randn(16)
    with torch.no_grad():
        for _ in range(300):
            layer(torch.randn(2, 256, 16) + skew)
            vios.append(moe.update_biases(layer)["max_vio"])
    assert vios[0] > 1 and sum(vios[-10:]) / 10 < 0.2 * vios[0]


@pytest.mark.parametrize("kind", ["switch", "sequence"])
def test_an_auxiliary_loss_balances_a_skewed_router(kind):
    layer, vios = layer_of(n_embd=16, bias_lr=0.0, aux_loss=kind, aux_alpha=1.0, n_shared_expert=0), []
    layer.bias_E.zero_()
    skew, optimizer = torch.randn(16), torch.optim.SGD([layer.router.weight], lr=0.3)
    for _ in range(150):
        layer(torch.randn(2, 256, 16) + skew)
        (moe.aux_sum(layer, torch.ones(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        vios.append(moe.update_biases(layer)["max_vio"])
    assert vios[0] > 0.9 and sum(vios[-10:]) / 10 < 0.3 * vios[0] and layer.bias_E.abs().sum() == 0


def test_counts_are_summed_over_ranks():
    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        layer = layer_of(n_expert=4, n_active=1, bias_lr=0.1)
        layer.bias_E.zero_()
        layer.count_E.copy_(torch.tensor([[8, 0, 0, 0], [0, 4, 4, 0]][world.rank]))
        assert moe.update_biases(layer, world)["max_vio"] == 1.0
        torch.testing.assert_close(layer.bias_E, torch.tensor([-0.1, 0.0, 0.0, 0.1]))
        dist.shutdown()

    assert launch(body, 2) == [0, 0]


# ---- Which blocks, which choices ----

def test_which_blocks_have_experts():
    of = lambda **fields: moe.moe_layers(config(moe=True, **fields))
    assert of() == [1, 2, 3, 4, 5] and of(n_dense_layer=0) == [0, 1, 2, 3, 4, 5] and of(n_dense_layer=0, moe_every=2) == [1, 3, 5]
    assert of(n_dense_layer=3, moe_every=2) == [3, 5] and of(dense_layers="1, 4") == [2, 3, 5] and of(n_dense_layer=6) == []
    assert moe.moe_layers(config()) == []
    for fields, word in ((dict(dense_layers="1,x"), "'x'"), (dict(dense_layers="6"), "0 to 5"), (dict(dense_layers="9" * 5000), "0 to 5"), (dict(moe_every=0), "--moe_every=0")):
        with pytest.raises(UsageError, match=word):
            of(**fields)


@pytest.mark.parametrize("fields, word", [
    (dict(n_active=9), "--n_active=9"), (dict(n_expert=0), "--n_expert=0"), (dict(n_expert=10**9, n_group=7), "use one of .1, 2, 4, 5"), (dict(n_active=0), "--n_active=0"), (dict(router="x"), "--router=x"), (dict(dispatch="x"), "--dispatch=x"),
    (dict(aux_loss="x"), "--aux_loss=x"), (dict(expert_act="x"), "--expert_act=x"), (dict(group_score="x"), "--group_score=x"),
    (dict(n_group=3, top_group=1), r"use one of \[1, 2, 4, 8\]"), (dict(n_group=4), "--top_group=0"), (dict(n_group=4, top_group=5), "use 1 to 4"),
    (dict(n_group=4, top_group=1, n_active=3), "use 2 to 4"), (dict(n_group=8, top_group=2), "leaves one expert"), (dict(n_device=3), "--n_device=3"),
    (dict(n_group=4, top_group=2, group_score="max"), "--bias_lr=0"), (dict(device_alpha=0.1), "--n_device=0"),
    (dict(n_group=4, top_group=2, group_score="max", bias_lr=0.0, router="chosen"), "--router=softmax"),
    (dict(n_group=4, top_group=2, comm_alpha=0.1, n_device=2), "--n_device=4"), (dict(capacity=-1.0), "--capacity"), (dict(z_alpha=math.nan), "--z_alpha")])
def test_impossible_choices_are_refused(fields, word):
    with pytest.raises(UsageError, match=word):
        layer_of(**fields)


# ---- Upcycling ----

def dense_mlp(D, width):
    torch.manual_seed(5)
    return {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in
            (("w_gate.weight", (width, D)), ("w_up.weight", (width, D)), ("w_down.weight", (D, width)))}


def slow_dense(dense, x_BTD):
    gate, up, down = (dense[f"w_{name}.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x_BTD @ gate.T) * (x_BTD @ up.T)) @ down.T


@pytest.mark.parametrize("fields, width", [
    (dict(n_shared_expert=0, d_expert=24), 24), (dict(n_shared_expert=1, d_expert=12), 24), (dict(n_shared_expert=2, d_expert=8), 24),
    (dict(n_shared_expert=1, d_expert=12), 23), (dict(n_shared_expert=3, d_expert=7), 25), (dict(n_shared_expert=0, d_expert=40), 24),
    (dict(LIMITED, routed_scale=2.5, d_expert=12), 24), (dict(router="softmax", d_expert=12), 24), (dict(router="chosen", d_expert=12), 24),
    (dict(n_expert=1, n_active=1, d_expert=12), 24), (dict(expert_bias=True, n_shared_expert=0, d_expert=24, dispatch="grouped"), 24)], ids=ids)
def test_an_upcycled_mlp_equals_the_dense_one(fields, width):
    layer, dense = layer_of(**fields), dense_mlp(6, width)
    missing = layer.load_state_dict(moe.upcycle(dense, layer.cfg), strict=False)
    assert set(missing.missing_keys) == {"router.weight", "bias_E"} and not missing.unexpected_keys
    x_BTD = torch.randn(2, 11, 6, requires_grad=True)
    torch.testing.assert_close(layer(x_BTD), slow_dense(dense, x_BTD), rtol=1e-6, atol=1e-6)
    layer(x_BTD).square().sum().backward()
    assert (layer.experts.w_down.grad != 0).any(-2).all(-1).any()          # channels that write nothing yet learn to


def test_upcycling_takes_the_default_width_where_it_fits():
    layer, dense = layer_of(n_active=1, d_expert=0, d_ff=48), dense_mlp(6, 48)
    layer.load_state_dict(moe.upcycle(dense, layer.cfg), strict=False)
    x_BTD = torch.randn(2, 5, 6)
    torch.testing.assert_close(layer(x_BTD), slow_dense(dense, x_BTD), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_upcycled_is_refused():
    dense = dense_mlp(6, 24)
    for tensors, fields, word in ((dense, dict(d_expert=11), "use --d_expert=12 or more"), (dense, dict(d_expert=12, norm_gates=False), "--norm_gates"),
                                  (dense, dict(d_expert=12, expert_act="swiglu_oss"), "--expert_act"), (dense, dict(d_expert=12, capacity=1.0), "--capacity"),
                                  ({"w_up.weight": dense["w_up.weight"], "w_down.weight": dense["w_down.weight"]}, dict(d_expert=12), "--act=swiglu"),
                                  (dense | {"w_up.bias": torch.zeros(24)}, dict(d_expert=12), "w_up.bias")):
        with pytest.raises(UsageError, match=word):
            moe.upcycle(tensors, config(**fields))


# ---- Peers (transformers) ----

def their_router(name, cls, **fields):
    pytest.importorskip("transformers")
    import importlib
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    made = next(value for key, value in vars(config).items() if key.lower() == name.replace("_", "") + "config")(
        hidden_size=24, num_attention_heads=4, **fields)
    return getattr(module, cls)(made)


V3 = dict(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5)
PEERS = [
    ("deepseek_v3", "DeepseekV3TopkRouter", dict(V3, norm_topk_prob=True), dict(LIMITED, routed_scale=2.5)),
    ("deepseek_v3", "DeepseekV3TopkRouter", dict(V3, norm_topk_prob=False), dict(LIMITED, routed_scale=2.5, norm_gates=False)),
    ("deepseek_v3", "DeepseekV3TopkRouter", dict(V3, n_group=1, topk_group=1), dict(LIMITED, n_group=1, top_group=1, routed_scale=2.5)),
    ("deepseek_v2", "DeepseekV2TopkRouter", dict(V3, topk_method="group_limited_greedy"), dict(GREEDY, routed_scale=2.5)),
    ("deepseek_v2", "DeepseekV2TopkRouter", dict(V3, topk_method="greedy", n_group=None, topk_group=None), dict(GREEDY, n_group=0, routed_scale=2.5)),
    ("mixtral", "MixtralTopKRouter", dict(num_local_experts=8, num_experts_per_tok=2), dict(router="softmax")),
    ("qwen3_moe", "Qwen3MoeTopKRouter", dict(num_experts=16, num_experts_per_tok=4, norm_topk_prob=True), dict(SIXTEEN, router="softmax")),
    ("qwen3_moe", "Qwen3MoeTopKRouter", dict(num_experts=16, num_experts_per_tok=4, norm_topk_prob=False), dict(SIXTEEN, router="softmax", norm_gates=False)),
    ("gpt_oss", "GptOssTopKRouter", dict(num_local_experts=16, num_experts_per_tok=4), dict(SIXTEEN, router="chosen", router_bias=True))]


@pytest.mark.peer
@pytest.mark.parametrize("name, cls, theirs, ours", PEERS, ids=[f"{p[1]}-{i}" for i, p in enumerate(PEERS)])
def test_routes_as_transformers(name, cls, theirs, ours):
    peer, cfg = their_router(name, cls, **theirs), config(24, **ours)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*peer.parameters(), *peer.buffers()]:
            tensor.copy_(torch.randn_like(tensor) * 0.4)
        x_MD = torch.randn(2000, 24)
        _, their_gate, their_expert = peer(x_MD)
        bias_E = getattr(peer, "e_score_correction_bias", torch.zeros(cfg.n_expert))
        expert_MA, gate_MA = moe.route(F.linear(x_MD, peer.weight, getattr(peer, "bias", None)), bias_E, cfg)
    table = lambda expert, gate: torch.zeros(2000, cfg.n_expert).scatter(1, expert, gate)
    assert torch.equal(expert_MA.sort(1).values, their_expert.sort(1).values)
    assert torch.equal(table(expert_MA, gate_MA), table(their_expert, their_gate))


@pytest.mark.peer
def test_experts_of_gpt_oss_as_transformers():
    peer = their_router("gpt_oss", "GptOssMLP", num_local_experts=8, num_experts_per_tok=2, intermediate_size=10)
    layer = layer_of(n_embd=24, d_expert=10, **OSS)
    layer.bias_E.zero_()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        e, w = peer.experts, layer.experts
        layer.router.load_state_dict(peer.router.state_dict())
        for ours, theirs in ((w.w_gate, e.gate_up_proj[..., ::2].mT), (w.w_up, e.gate_up_proj[..., 1::2].mT), (w.w_down, e.down_proj.mT),
                             (w.b_gate, e.gate_up_proj_bias[:, ::2]), (w.b_up, e.gate_up_proj_bias[:, 1::2]), (w.b_down, e.down_proj_bias)):
            ours.copy_(theirs)
        x_BTD = 3 * torch.randn(2, 31, 24)                      # wide enough to be cut at 7
        torch.testing.assert_close(layer(x_BTD), peer(x_BTD)[0], rtol=1e-4, atol=1e-4)
