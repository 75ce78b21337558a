"""Activation checkpointing: the same loss, gradients and counts to the bit, from less memory."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import Living
from model import AC, Model, ModelConfig, keep_products
from moe import MoE, update_biases
from tokenizer import UsageError

SMALL = dict(vocab_size=61, n_layer=3, n_embd=32, n_head=4, seq_len=24)
KINDS = {
    "default": {},
    "gpt2": dict(norm="layer", act="gelu_tanh", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True),
    "dropout": dict(resid_dropout=0.2, embed_dropout=0.1, attn_dropout=0.15),
    "moe and mtp": dict(moe=True, n_expert=4, n_active=2, mtp=2, aux_loss="sequence", aux_alpha=0.1, z_alpha=0.01, resid_dropout=0.1),
    "moe, biases, capacity": dict(moe=True, n_expert=4, n_active=2, expert_bias=True, router_bias=True, capacity=1.1),
    "mla": dict(attn="mla"), "t5": dict(pos="t5"), "sandwich": dict(norm_at="sandwich"), "post": dict(norm_at="post", norm="layer"),
    "swish": dict(act="swish", norm="group", norm_groups=4), "linear": dict(layers="lightning,mha,gdn"),
    "softcap and sinks": dict(attn_softcap=5.0, sinks=True, qk_norm="head"),
}


def batches(B=4, T=24):
    g = torch.Generator().manual_seed(1)
    for _ in range(2):
        ids, docs = torch.randint(61, (B, T + 1), generator=g), (torch.arange(T) > torch.tensor([[7], [30], [11], [16]])).long()
        yield dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=torch.rand(B, T, generator=g), doc_ids=docs)


def two_steps(cfg, dtype=None):
    """[loss, gradients, counts and biases] over two micro-batches a step, and a step later."""
    model, seen = Model(cfg).train(), []
    for step in range(2):
        torch.manual_seed(step)
        for batch in batches():
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss, weight, _ = model.loss(batch)
            (loss / weight).backward()
            seen.append(loss.detach())
        seen += [p.grad.clone() for p in model.parameters()]
        seen += [t.clone() for m in model.modules() if isinstance(m, MoE) for t in (m.count_E, m.seen)]
        update_biases(model)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        seen += [m.bias_E.clone() for m in model.modules() if isinstance(m, MoE)]
    return seen


@pytest.mark.parametrize("ac", list(AC)[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit(kind, ac):
    plain, again = (two_steps(ModelConfig(**SMALL | KINDS[kind], ac=mode)) for mode in ("none", ac))
    assert len(plain) == len(again)
    for want, got in zip(plain, again):
        assert torch.equal(want, got)


@pytest.mark.parametrize("ac", list(AC)[1:])
def test_checkpointing_changes_no_bit_under_autocast(ac):
    plain, again = (two_steps(ModelConfig(**SMALL, ac=mode), torch.bfloat16) for mode in ("none", ac))
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("ac", list(AC)[1:])
def test_an_encoder_decoder_is_checkpointed_too(ac):
    def run(mode):
        model = Model(ModelConfig(**SMALL, arch="encdec", pos="t5", ac=mode)).train()
        batch = next(batches())
        loss, _, _ = model.loss(dict(tokens=batch["tokens"], targets=batch["targets"], weights=batch["weights"], enc_tokens=batch["targets"]))
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]
    assert all(map(torch.equal, run("none"), run(ac)))


def living_bytes(ac, **shape):
    cfg = ModelConfig(**dict(vocab_size=61, n_layer=4, n_embd=64, n_head=4, seq_len=128, ac=ac) | shape)
    model, ids = Model(cfg).train(), torch.randint(61, (4, 129))
    with Living() as living, torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = model.loss(dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(4, 128)))
        return living.bytes()


def test_each_mode_keeps_less_than_the_one_before():
    """What is alive between forward and backward; a norm's output is D and an activation's F numbers of 2 bytes a token."""
    kept = {ac: living_bytes(ac) for ac in AC}
    F, D, tokens, layers = 192, 64, 4 * 128, 4
    assert kept["none"] - kept["norm"] == layers * tokens * 2 * (2 * D + F)
    assert kept["full"] < 0.35 * kept["selective"] and kept["selective"] < 0.7 * kept["norm"], kept
    # a block more keeps its input, and autocast the narrow copies of its weights
    assert living_bytes("full", n_layer=8) - kept["full"] == layers * (tokens * 4 * D + 2 * (4 * D * D + 3 * D * F))


def test_selective_computes_no_product_twice_but_the_scores():
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.name()
            counts[name] = counts.get(name, 0) + 1
            return op(*args, **(kwargs or {}))

    seen = {}
    for ac in ("none", "selective", "full"):
        counts, model = {}, Model(ModelConfig(**SMALL, ac=ac))
        with Count():
            model.loss(next(batches()))[0].backward()
        seen[ac] = counts.get("aten::mm", 0)
    assert seen["none"] == seen["selective"] < seen["full"]


def test_the_policy_keeps_no_op_that_draws_while_there_is_dropout():
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    for dropout, kept in ((0.0, True), (0.1, False)):
        assert (keep_products(ModelConfig(attn_dropout=dropout), None, flash).name == "MUST_SAVE") == kept


def test_batch_norm_refuses_to_run_twice():
    with pytest.raises(UsageError, match="--ac=none"):
        Model(ModelConfig(**SMALL, norm="batch", ac="full"))


@pytest.mark.parametrize("ac", AC)
def test_a_block_compiles_whole(ac):
    torch._dynamo.reset()
    model, plain = (Model(ModelConfig(**SMALL | dict(n_layer=1), ac=mode)) for mode in (ac, "none"))
    model.blocks[0].compile(backend="aot_eager", fullgraph=ac != "norm")
    for m in (model, plain):
        m.loss(next(batches()))[0].backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
