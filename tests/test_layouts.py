"""Every layout trains as one process does: five steps of AdamW in float32, losses within 5e-6 and, at the first step, the gradient of
every parameter within 1e-5 of its largest entry."""
import functools
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import dist
from conftest import launch
from model import Model
from moe import update_biases
from train import TrainConfig, compile_blocks, learning_rate

TINY = dict(n_layer=4, n_embd=32, n_head=4, seq_len=32, vocab_size=61, micro_batch=2, device="cpu", d_ff=48)
MODELS = {
    "dense": dict(attn="gqa", n_kv_head=2, qk_norm="head"),
    "mla_moe": dict(attn="mla", moe=True, n_expert=8, n_active=2, d_expert=16, mtp=1, aux_loss="sequence", tie_embeddings=False),
    "dense_mtp": dict(mtp=1), "moe": dict(moe=True, n_expert=8, n_active=2, d_expert=16, moe_every=2, n_dense_layer=0),
    "lightning": dict(layers="lightning,mha"),
    "swa": dict(attn="swa", window=9, sinks=True, tie_embeddings=False),
    "gdn": dict(layers="gdn,kda"),
    "linear": dict(layers="linear,transnormer", pos="rope"),
    "gpt2": dict(norm="layer", act="gelu_tanh", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True),
    "mqa_t5": dict(attn="mqa", pos="t5", attn_softcap=20.0),
    "t5": dict(arch="encdec", pos="t5", act="geglu_tanh", attn_scale=1.0, n_enc_layer=2, n_layer=2, norm_at="pre", tie_embeddings=False),
    "latent": dict(attn="mla", q_lora_rank=12, attn_gate=True, moe=True, n_expert=8, n_active=2, d_expert=12, expert_bias=True, router_bias=True, n_group=4,
                   top_group=2, embed_norm=True, head_bias=True, logit_softcap=20.0, z_loss=1e-2, label_smoothing=0.1, aux_loss="switch", aux_alpha=0.05,
                   z_alpha=1e-2, n_device=4, device_alpha=0.05, comm_alpha=0.05, n_head=3, n_embd=36),
    "learned": dict(layers="mha,transnormer", pos="lrpe", act="swish", mlp_bias=True, norm="layer", norm_at="deepnorm", clip_qkv=0.5, out_bias=True,
                    embed_scale=True, embed_grad_shrink=0.5),
    "shaw": dict(attn="gqa", n_kv_head=2, pos="shaw", qk_norm="width", norm="group", norm_groups=4, act="relu2"),
    "prefix": dict(arch="prefix", attn="gqa", n_kv_head=2),
    "three_heads": dict(layers="mla,mha,gdn,lightning", n_head=3, n_embd=36, head_dim=12, qk_norm="none"),
    "olmo2": dict(qk_norm="width", norm_at="branch_post", n_head=3, n_embd=36),
    "alibi": dict(layers="strided,mha", pos="alibi", sparse_stride=4, n_head=3, n_embd=36, norm_at="sandwich"),
}
STEPS, ROWS = 5, 8


def batches_of(cfg, step):
    """The rows of a step: ragged documents, some tokens not counted."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(cfg.vocab_size, (ROWS, cfg.seq_len + 1), generator=draw)
    doc = (torch.rand(ROWS, cfg.seq_len, generator=draw) < 0.08).cumsum(1)
    place = torch.arange(cfg.seq_len) - torch.stack([torch.tensor([(row == i).nonzero()[0, 0] for i in row]) for row in doc])
    batch = dict(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(), positions=place, doc_ids=doc,
                 weights=(torch.rand(ROWS, cfg.seq_len, generator=draw) < 0.9).float())
    if cfg.arch == "encdec":
        batch |= dict(enc_tokens=tokens[:, :20].contiguous(), enc_doc_ids=torch.where(torch.arange(20) < 17, doc[:, :20], -1))
    return batch | (dict(prefix_len=1 + torch.arange(ROWS)) if cfg.arch == "prefix" else {})


def run(cfg, home=None):
    """Train in this process's world; rank 0 writes {losses, gradients of step one} to `home`, or returns them."""
    world = dist.init(cfg)
    model = Model(cfg)
    if cfg.compile:                                              # what inductor would be given, without its minutes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
            compile_blocks(model, cfg, world)
    engine = dist.Engine(model, world, cfg)
    engine.train()
    optimizer = torch.optim.AdamW([share.local for share in engine.shares], lr=1e-2, fused=True)
    losses, grads = [], {}
    for step in range(STEPS):
        engine.train(False)
        engine.loss({name: t[:2] for name, t in batches_of(cfg, 99).items()})        # evaluation leaves nothing behind
        engine.train()
        whole = batches_of(cfg, step)
        mine = {name: t.chunk(world.dp.size)[world.dp.rank] for name, t in whole.items()}
        size = cfg.micro_batch
        micro = [{name: t[i:i + size] for name, t in mine.items()} for i in range(0, ROWS // world.dp.size, size)]
        weight = whole["weights"].sum().item()
        loss, said = engine.step(micro, weight)
        if step == 0:
            grads = {share.name: (share.local.grad.numpy().copy(), share.boxes, share.shape) for share in engine.shares}
        norm = engine.clip_grad(1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
        optimizer.step()
        engine.zero_grad()
        stats = update_biases(engine.models, world)
        losses.append([dist.all_sum(world, loss / weight).item(), norm.item(), *(stats[k] for k in sorted(stats))])
    engine.train(False)
    scores = dist.all_sum(world, sum(engine.loss(batch) for batch in micro)).tolist()
    losses.append([scores[0] / scores[1]])
    result = losses, grads
    if home:
        torch.save(result, Path(home) / f"{world.rank}.pt")
    engine = None
    dist.shutdown()
    return result


WHOLE = {}


def alone(name):
    if name not in WHOLE:
        WHOLE[name] = run(TrainConfig(**TINY | MODELS[name]))
    return WHOLE[name]


def check(name, layout, ranks):
    if layout.get("pp_schedule") in dist.SPLIT and not dist.SPLITS:
        pytest.skip("this torch cannot split backward through autograd functions written in Python")
    cfg, home = TrainConfig(**TINY | MODELS[name] | layout), tempfile.mkdtemp()
    losses, grads = alone(name)
    assert launch(lambda: run(cfg, home), ranks) == [0] * ranks
    seen, largest = {}, max(np.abs(grad).max() for grad, _, _ in grads.values())
    for rank in range(ranks):
        theirs, parts = torch.load(Path(home) / f"{rank}.pt", weights_only=False)
        for step, (a, b) in enumerate(zip(theirs, losses)):
            assert abs(a[0] - b[0]) < 5e-6, f"rank {rank}, step {step}: loss {a[0]} instead of {b[0]}"
            np.testing.assert_allclose(a[1:], b[1:], rtol=1e-5 if step == 0 else 2e-3, atol=1e-6, err_msg=f"rank {rank}, step {step}")
        for key, (grad, boxes, shape) in parts.items():
            whole, at = grads[key][0], 0
            for box in boxes:
                want = whole[tuple(slice(*ends) for ends in box)]
                part = grad[at:at + want.shape[0]]
                at += want.shape[0]
                off = np.abs(part - want).max() / max(np.abs(whole).max(), 1e-4 * largest)      # key biases have none but rounding
                assert off < 1e-5, f"rank {rank}: gradient of {key} {box} is off by {off:.1e}"
                mask = seen.setdefault(key, np.zeros(shape, bool))
                mask[tuple(slice(*ends) for ends in box)] = True
    assert seen.keys() == grads.keys() and all(mask.all() for mask in seen.values()), "some parameters are nowhere"


QUICK = {                          # for the plain test run; of each axis and each kind of model one
    "dense": (dict(dp=2), dict(fsdp=3, dp=2), dict(tp=2), dict(cp=2, cp_mode="ring"), dict(fsdp=3, dp=4, hsdp=2), dict(pp=2, dp=2, fsdp=3, tp=2)),
    "mla_moe": (dict(dp=2, ep=2, tp=2), dict(pp=2, dp=2, ep=2), dict(cp=2, ep=2)),
    "moe": (dict(dp=2, ep=2, fsdp=3), dict(pp=2, pp_schedule="zbv")),
    "lightning": (dict(cp=2), dict(tp=2)), "swa": (dict(cp=2, cp_mode="ulysses"),), "gdn": (dict(cp=2, tp=2),), "linear": (dict(cp=2),),
    "gpt2": (dict(tp=2),), "three_heads": (dict(tp=2),), "olmo2": (dict(tp=2),), "alibi": (dict(tp=3),), "t5": (dict(tp=2, sp=False),),
}
MORE = {
    "dense": (dict(fsdp=2, dp=2), dict(tp=2, sp=False), dict(cp=2), dict(cp=2, cp_mode="ulysses"), dict(pp=2), dict(dp=4), dict(tp=4),
              dict(fsdp=3, dp=2, tp=2), dict(pp=2, tp=2), dict(pp=2, pp_schedule="gpipe"), dict(pp=2, pp_schedule="zbv"),
              dict(pp=2, pp_schedule="interleaved"), dict(pp=2, pp_schedule="dualpipev"), dict(pp=2, pp_schedule="looped_bfs"),
              dict(pp=2, pp_schedule="interleaved_zb"), dict(pp=2, dp=2, fsdp=3), dict(dp=2, pp=2), dict(pp=2, cp=2, tp=2),
              dict(fsdp=3, dp=2, cp=2, tp=2), dict(dp=8), dict(pp=4), dict(pp=2, dp=2, fsdp=3, pp_schedule="zbv"), dict(fsdp=3, dp=2, ac="full"),
              dict(fsdp=2, dp=2, tp=2, ac="selective"), dict(pp=2, dp=2, ac="full"), dict(pp=2, pp_schedule="zbv", ac="full"), dict(cp=2, cp_mode="ring", ac="norm")),
    "mla_moe": (dict(fsdp=3, dp=2, tp=2), dict(dp=2, ep=2), dict(dp=4, ep=2), dict(dp=4, ep=2, fsdp=3), dict(cp=2, cp_mode="ring"),
                dict(cp=2, cp_mode="ulysses"), dict(pp=2), dict(tp=2), dict(dp=2, ep=2, tp=2, ac="full"), dict(dp=8, ep=4, fsdp=3, hsdp=2)),
    "moe": (dict(tp=2, sp=False),), "lightning": (dict(dp=2), dict(cp=4), dict(cp=2, tp=2, fsdp=3, dp=2), dict(pp=2)),
    "swa": (dict(cp=2), dict(cp=2, cp_mode="ring"), dict(cp=4, cp_mode="ring"), dict(tp=2), dict(pp=2, tp=2)),
    "gdn": (dict(cp=2), dict(tp=2)), "linear": (dict(tp=2),), "gpt2": (dict(tp=2, sp=False), dict(cp=2), dict(fsdp=3, dp=2), dict(pp=2, tp=2)),
    "three_heads": (dict(cp=2, tp=2),), "olmo2": (dict(dp=2, tp=2, fsdp=3),), "alibi": (dict(tp=2), dict(cp=2), dict(cp=2, cp_mode="ring")),
    "mqa_t5": (dict(tp=2), dict(cp=2), dict(cp=2, cp_mode="ulysses"), dict(pp=2)), "t5": (dict(tp=2), dict(fsdp=3, dp=2), dict(dp=2)),
    "latent": (dict(tp=2), dict(cp=2), dict(dp=2, ep=2, tp=2), dict(cp=2, cp_mode="ring", ep=2), dict(pp=2, dp=2, fsdp=3)),
    "learned": (dict(tp=2), dict(cp=2), dict(tp=2, sp=False), dict(fsdp=3, dp=2, tp=2)), "shaw": (dict(tp=4), dict(tp=4, sp=False), dict(cp=2), dict(cp=2, tp=2, cp_mode="ulysses")),
    "prefix": (dict(cp=2), dict(tp=2), dict(cp=2, cp_mode="ring")),
}
LAYOUTS = [pytest.param(name, layout, marks=marks) for table, marks in ((QUICK, ()), (MORE, pytest.mark.slow))
           for name, layouts in table.items() for layout in layouts]


def ranks_of(layout):
    return math.prod(layout.get(axis, 1) for axis in ("pp", "dp", "cp", "tp"))


@pytest.mark.parametrize("name, layout", LAYOUTS, ids=lambda x: "-".join(f"{k}{v}" for k, v in x.items()) if isinstance(x, dict) else x)
def test_a_layout_trains_as_one_process(name, layout):
    check(name, layout, ranks_of(layout))


COMPILED = [("dense", dict(dp=2)), ("dense", dict(fsdp=3, dp=2)), ("dense", dict(tp=2)), ("dense", dict(tp=2, sp=False)), ("dense", dict(fsdp=3, dp=2, tp=2)),
            ("dense", dict(cp=2)), ("dense", dict(cp=2, cp_mode="ulysses")), ("dense", dict(cp=2, cp_mode="ring")), ("dense", dict(pp=2)),
            ("moe", dict(dp=2, ep=2)), ("lightning", dict(cp=2))]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="--compile wants a C++ compiler")
@pytest.mark.parametrize("name, layout", COMPILED, ids=lambda x: "-".join(f"{k}{v}" for k, v in x.items()) if isinstance(x, dict) else x)
def test_a_compiled_layout_trains_as_one_eager_process(name, layout):
    check(name, layout | dict(compile=True), ranks_of(layout))


@pytest.mark.slow
def test_four_axes_on_sixteen_ranks():
    check("dense", dict(pp=2, dp=2, fsdp=3, cp=2, tp=2), 16)
    check("mla_moe", dict(pp=2, dp=2, ep=4, cp=2, tp=2), 16)
