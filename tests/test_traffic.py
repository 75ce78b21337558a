"""What crosses the network in a step, counted as it is called, is what theory says, within 1 %."""
import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dist
import model as model_lib
from conftest import launch
from model import Model
from test_layouts import MODELS, ROWS, TINY, batches_of, ranks_of
from train import TrainConfig

COUNTED = {                        # op: (kind, which argument is counted: the whole sum, what is gathered, what is scattered, what leaves)
    "allreduce_": ("reduce", 0), "all_reduce": ("reduce", 0), "_allgather_base_": ("gather", 0), "all_gather_into_tensor": ("gather", -1),
    "_reduce_scatter_base_": ("scatter", 1), "reduce_scatter_tensor": ("scatter", 0), "all_to_all_single": ("all_to_all", 0),
    "alltoall_base_": ("all_to_all", 1), "send": ("send", 0), "allgather_": ("gather", 0), "all_reduce_": ("reduce", 0),
}


class Traffic(TorchDispatchMode):
    """{kind: bytes} of the collectives called inside."""

    def __init__(self):
        super().__init__()
        self.bytes, self.seen = {}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        space, name = op._schema.name.split("::")
        if space in ("c10d", "_c10d_functional", "c10d_functional"):
            self.seen[name] = self.seen.get(name, 0) + 1
            if name in COUNTED:
                kind, which = COUNTED[name]
                what = out if which < 0 else args[which]
                tensors = torch.utils._pytree.tree_leaves(what)
                self.bytes[kind] = self.bytes.get(kind, 0) + sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return out


def traffic_of(name, layout, ranks, **more):
    """[{kind: bytes}, {op: calls}, micro-batches, parameters here] of the second step, rank by rank."""
    home = tempfile.mkdtemp()
    cfg = TrainConfig(**TINY | MODELS[name] | layout | more)

    def body():
        world = dist.init(cfg)
        engine = dist.Engine(Model(cfg), world, cfg)
        for step in range(2):
            mine = {key: t.chunk(world.dp.size)[world.dp.rank] for key, t in batches_of(cfg, step).items()}
            micro = [{key: t[i:i + cfg.micro_batch] for key, t in mine.items()} for i in range(0, len(mine["tokens"]), cfg.micro_batch)]
            with Traffic() as counted:
                engine.step(micro, 100.0)
            engine.zero_grad()
        Path(home, f"{world.rank}.json").write_text(json.dumps([counted.bytes, counted.seen, len(micro), sum(s.local.numel() for s in engine.shares)]))
        dist.shutdown()

    assert launch(body, ranks) == [0] * ranks
    return [json.loads(Path(home, f"{rank}.json").read_text()) for rank in range(ranks)]


def size(name, **more):
    return 4 * sum(p.numel() for p in Model(TrainConfig(**TINY | MODELS[name] | more)).parameters())


def about(want):
    """Within 1 %, and no other kinds."""
    return pytest.approx(want, rel=0.01)


def test_ddp_reduces_each_gradient_once():
    for micro in (4, 1):
        assert traffic_of("dense", dict(dp=2), 2, micro_batch=micro)[0][0] == about(dict(reduce=size("dense")))


@pytest.mark.parametrize("stage, micro, gathers", [(3, 4, 2), (2, 4, 1), (2, 1, 1), (3, 1, 2 * 4)])
def test_fsdp(stage, micro, gathers):
    """Stage 3 gathers a block's weights for forward and for backward of every micro-batch, what is outside of blocks once; stage 2
    gathers once a step. Either scatters each gradient once."""
    got = traffic_of("dense", dict(dp=2, fsdp=stage), 2, micro_batch=micro)[0][0]
    blocks = 4 * sum(p.numel() for p in Model(TrainConfig(**TINY | MODELS["dense"])).blocks.parameters())
    rest = size("dense") - blocks
    rows = gathers // 2 if stage == 3 else 1
    assert got == about(dict(gather=gathers * blocks + rows * rest, scatter=size("dense")))


@pytest.mark.parametrize("sp, ac", [(True, "none"), (False, "none"), (True, "full")])
def test_tensor_parallel(sp, ac):
    """A block moves its stream 4 times forward (with --ac=full twice that, but for the last move) and 4 times backward, embedding and head
    once each way; the loss reduces three numbers a row; gradients of what all ranks hold whole are added up once."""
    got, calls, micro, held = traffic_of("dense", dict(tp=2, sp=sp), 2, micro_batch=8, ac=ac)[0]
    cfg = TrainConfig(**TINY | MODELS["dense"])
    M = 8 * cfg.seq_len
    stream, n_norm = 4 * M * cfg.n_embd, 2 * cfg.n_layer + 1
    inside = 2 * cfg.n_layer * cfg.n_embd // cfg.n_head                            # gains of queries and keys
    again = {"none": 0, "full": cfg.n_layer}[ac]
    if sp:
        each = 4 * cfg.n_layer + 2
        assert got == about(dict(gather=stream * (each + 2 * again), scatter=stream * (each + again),
                        reduce=3 * 4 * M + 4 * (inside + n_norm * cfg.n_embd)))
    else:
        assert got == about(dict(reduce=stream * (4 * cfg.n_layer + 2) + 3 * 4 * M + 4 * inside))


def test_ulysses():
    """Queries, keys, values and outputs cross once each way, and DDP reduces the gradients."""
    cfg = TrainConfig(**TINY | MODELS["dense"])
    got = traffic_of("dense", dict(cp=2, cp_mode="ulysses"), 2, micro_batch=8)[0][0]
    heads = cfg.n_head + 2 * cfg.n_kv_head + cfg.n_head
    assert got == about(dict(reduce=size("dense"), all_to_all=2 * cfg.n_layer * 8 * cfg.seq_len // 2 * heads * 4 * cfg.n_embd // cfg.n_head))


def test_gathered_keys():
    cfg = TrainConfig(**TINY | MODELS["dense"])
    got, row = traffic_of("dense", dict(cp=2), 2, micro_batch=8)[0][0], cfg.n_layer * 8 * cfg.seq_len * 2 * cfg.n_kv_head * 4 * cfg.n_embd // cfg.n_head
    assert got == about(dict(reduce=size("dense"), gather=row, scatter=row))


def test_ring():
    """Keys and values go round once, forward and backward; their gradients come home."""
    cfg = TrainConfig(**TINY | MODELS["dense"])
    for ranks in (2, 4):
        got, calls, *_ = traffic_of("dense", dict(cp=ranks, cp_mode="ring"), ranks, micro_batch=8)[0]
        part = 8 * cfg.seq_len // ranks * 2 * cfg.n_kv_head * 4 * cfg.n_embd // cfg.n_head
        assert got == about(dict(reduce=size("dense"), send=cfg.n_layer * part * (ranks - 1 + 2 * ranks - 1)))


@pytest.mark.parametrize("fsdp", [0, 3])
def test_expert_parallel(fsdp):
    """Visits go to their experts and come back, in forward and in backward; experts are held by half of the ranks."""
    cfg = TrainConfig(**TINY | MODELS["moe"])
    ranks = traffic_of("moe", dict(dp=2, ep=2, fsdp=fsdp), 2, micro_batch=4)
    blocks = [block for block in Model(cfg).blocks if hasattr(block.mlp, "experts")]
    visits, counts = len(blocks) * ROWS * cfg.seq_len * cfg.n_active, 2 * len(blocks) * 8 * cfg.n_expert
    total = sum(got["all_to_all"] for got, *_ in ranks)
    assert abs(total / (4 * visits * 4 * cfg.n_embd + counts) - 1) < 0.01
    experts = 4 * sum(p.numel() for block in blocks for p in block.mlp.experts.parameters())
    if not fsdp:
        assert abs(ranks[0][0]["reduce"] / (size("moe") - experts) - 1) < 0.01


KINDS = {"reduce": "all-reduce", "gather": "all-gather", "scatter": "reduce-scatter", "all_to_all": "all-to-all", "send": "send"}


PLANNED = [("dense", dict(dp=2, fsdp=3, tp=2, ac="full")), ("dense", dict(pp=2, dp=2, fsdp=2)), ("mla_moe", dict(dp=2, ep=2)), ("dense", dict(cp=2))]
MORE = [("dense", dict(dp=2)), ("dense", dict(dp=2, fsdp=3)), ("dense", dict(dp=4, fsdp=3, hsdp=2)), ("dense", dict(tp=2)), ("dense", dict(tp=2, sp=False)),
        ("dense", dict(cp=2, cp_mode="ulysses")), ("dense", dict(cp=2, cp_mode="ring")), ("dense", dict(pp=2)), ("mla_moe", dict(tp=2)),
        ("mla_moe", dict(cp=2)), ("mla_moe", dict(dp=2, fsdp=3, tp=2)), ("lightning", dict(cp=2)), ("gdn", dict(tp=2, cp=2))]


@pytest.mark.parametrize("name, layout", PLANNED + [pytest.param(*one, marks=pytest.mark.slow) for one in MORE],
                         ids=lambda x: "-".join(f"{k}{v}" for k, v in x.items()) if isinstance(x, dict) else x)
def test_the_plan_says_what_is_sent(name, layout):
    """Within 1 % of what a step sends, all ranks of a pipeline and all kinds of collectives."""
    ranks, cfg = ranks_of(layout), TrainConfig(**TINY | MODELS[name] | layout | dict(tokens_per_step=ROWS * TINY["seq_len"]))
    traced = traffic_of(name, layout, ranks)
    planned = dist.planned(cfg, ranks, model_lib.pieces(model_lib.meta_model(cfg)), 4, False)
    per_stage = ranks // cfg.pp
    for stage, row in enumerate(planned):
        want = {}
        for (axis, what), n in row["sends"].items():
            want[what] = want.get(what, 0) + n
        own = [{KINDS[kind]: n for kind, n in got.items()} for got, *_ in traced[stage * per_stage:][:per_stage]]
        mean = {what: sum(got.get(what, 0) for got in own) / per_stage for what in {what for got in own for what in got}}
        most = {what: max(got.get(what, 0) for got in own) for what in mean}          # where ranks hold a different number of rows
        assert {what for what, n in mean.items() if n} == {what for what, n in want.items() if n}, (mean, want)
        assert all(min(abs(got[what] / want[what] - 1) for got in (mean, most)) < 0.01 for what in want if want[what]), (stage, mean, want)
