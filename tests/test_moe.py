import pytest
import torch
import torch.nn.functional as F

import dist
import moe
from conftest import launch
from moe import MoE, MoEConfig
from tokenizer import UsageError


def layer_of(seed=0, n_embd=6, d_ff=24, **fields):
    cfg = MoEConfig(**fields)
    cfg.n_embd = n_embd
    torch.manual_seed(seed)
    layer = MoE(cfg, d_ff)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        layer.bias_E.copy_(torch.randn_like(layer.bias_E) * 0.3)
    return layer


def slow_moe(layer, x_MD):
    """[DSV3 eq 12-16] token by token."""
    mlp = lambda w, e, x: w.w_down[e] @ (F.silu(w.w_gate[e] @ x) * (w.w_up[e] @ x))
    rows = []
    for x in x_MD:
        logit = layer.router.weight.float() @ x.float()
        score = torch.sigmoid(logit) if layer.score == "sigmoid" else logit.softmax(0)
        chosen = sorted(range(len(score)), key=lambda e: -(score[e] + layer.bias_E[e]))[:layer.n_active]
        y = sum(score[e] / sum(score[a] for a in chosen) * layer.scale * mlp(layer.experts, e, x) for e in chosen)
        rows.append(y + (mlp(layer.shared, 0, x) if layer.shared is not None else 0))
    return torch.stack(rows)


@pytest.mark.parametrize("fields", [dict(), dict(n_expert=5, n_active=5), dict(n_expert=1, n_active=1), dict(n_shared_expert=0), dict(router="softmax", routed_scale=2.5)])
@pytest.mark.parametrize("T", [1, 7, 63])
def test_moe_equals_the_paper(fields, T, shapes_checked):
    layer = layer_of(**fields)
    x_BTD = torch.randn(1, T, 6, requires_grad=True)
    got, want = layer(x_BTD), slow_moe(layer, x_BTD[0])[None]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight, leaves = torch.randn_like(got), [x_BTD, *layer.parameters()]
    for a, b in zip(torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves, allow_unused=True)):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-3, atol=1e-4)


def test_an_expert_without_tokens_has_a_zero_gradient():
    layer = layer_of(n_expert=4, n_active=1)
    with torch.no_grad():
        layer.bias_E.copy_(torch.tensor([9.0, 0, 0, 0]))
    layer(torch.randn(2, 5, 6)).sum().backward()
    assert layer.experts.w_up.grad[0].abs().sum() > 0 and (layer.experts.w_up.grad[1:] == 0).all()


def test_output_of_a_token_does_not_depend_on_the_batch():
    layer = layer_of()
    x_BTD = torch.randn(3, 8, 6)
    torch.testing.assert_close(layer(x_BTD)[1:2], layer(x_BTD[1:2]))


def test_counts_add_up_over_micro_batches_and_not_in_evaluation():
    a, b, x_BTD = layer_of(), layer_of(), torch.randn(4, 9, 6)
    a(x_BTD)
    for part in x_BTD.split(1):
        b(part)
    assert torch.equal(a.count_E, b.count_E) and a.count_E.sum() == 4 * 9 * a.n_active
    a.eval()
    a(x_BTD)
    assert torch.equal(a.count_E, b.count_E)


def test_bias_update_by_hand():
    layer = layer_of(n_expert=4, n_active=1, bias_lr=0.1)
    layer.bias_E.zero_()
    layer.count_E.copy_(torch.tensor([8.0, 4.0, 4.0, 0.0]))
    assert moe.update_biases(layer) == {"max_vio": 1.0}
    torch.testing.assert_close(layer.bias_E, torch.tensor([-0.1, 0.0, 0.0, 0.1]))
    assert layer.count_E.sum() == 0
    assert moe.update_biases(torch.nn.Linear(2, 2)) == {}


def test_the_bias_balances_a_skewed_router():
    layer, first = layer_of(n_embd=16, bias_lr=0.01), None
    skew = torch.randn(16)
    with torch.no_grad():
        for _ in range(150):
            layer(torch.randn(2, 128, 16) + skew)
            vio = moe.update_biases(layer)["max_vio"]
            first = first or vio
    assert first > 1 and vio < 0.3 * first


def test_counts_are_summed_over_ranks():
    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        layer = layer_of(n_expert=4, n_active=1, bias_lr=0.1)
        layer.bias_E.zero_()
        layer.count_E.copy_(torch.tensor([[8.0, 0, 0, 0], [0, 4.0, 4.0, 0]][world.rank]))
        moe.update_biases(layer, world)
        torch.testing.assert_close(layer.bias_E, torch.tensor([-0.1, 0.0, 0.0, 0.1]))
        dist.shutdown()

    assert launch(body, 2) == [0, 0]


def test_impossible_choices_are_refused():
    for fields in (dict(n_active=9), dict(n_active=0)):
        with pytest.raises(UsageError, match="--n_active"):
            layer_of(**fields)
