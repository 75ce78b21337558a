"""The plan of a cluster that is not there: parameters to the last one, memory beside what real steps keep, traffic beside theory, and
every layout that cannot run refused by name."""
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining import schedules

import data
import dist
import model as M
from attention import ATTENTION
from conftest import ROOT, Living, fork, run_train, wait
from tokenizer import UsageError
from train import TrainConfig

SMALL = dict(n_layer=8, n_embd=32, n_head=4, seq_len=32, vocab_size=61, tokens_per_step=32 * 64, d_ff=48, plan=True)
MOE = dict(moe=True, n_expert=8, n_active=2, d_expert=16)


def config(**fields):
    return TrainConfig(**SMALL | fields)


def preset(name, **fields):
    return TrainConfig(**M.PRESETS[name] | dict(plan=True) | fields)


def planned(cfg, size, width=4, cuda=False):
    return dist.planned(cfg, size, M.pieces(M.meta_model(cfg)), width, cuda)


def sends(row):
    return {key: n for key, n in row["sends"].items() if n}


# ---- Parameters (to the last one) ----

CUT = (r"^(embed|head)\.weight|^head_bias|rel_bias|attn\.(w_q|w_k|w_v|w_o|w_ukv|w_beta|w_gate|w_decay)\.(weight|bias)|attn\.(w_gate|w_decay)\.1|"
       r"attn\.(sinks|dt_bias|a_log|lrpe|conv)$|mlp\.w_|mlp\.act|(experts|shared)\.")


def copies(name, p, cfg, model):
    """Ranks of a pipeline, tp and ep that hold the same number of this parameter, written down anew."""
    cut = bool(re.search(CUT, name))
    if name.endswith(("w_o.bias", "w_down.bias", "b_down")):
        cut = True                                               # the first rank alone
    if re.search(r"attn\.norm\.weight", name):
        cut = p.numel() == cfg.n_embd                            # lightning's is over all heads
    if re.search(r"attn\.(w_k|w_v)\.", name) and getattr(model.blocks[0].attn, "n_kv_head", cfg.tp) % cfg.tp:
        cut = False
    ends = cfg.pp > 1 and name.startswith(("embed", "pos_embed", "type_embed")) and (cfg.mtp or name == "embed.weight" and cfg.tie_embeddings)
    stages = cfg.pp * dist.PP_SCHEDULES[cfg.pp_schedule][1] if cfg.pp > 1 else 1
    times = stages if name.startswith("rel_bias") else 2 if ends else 1
    return times * (1 if cut else cfg.tp) * (1 if ".mlp.experts." in name else cfg.ep)


@pytest.mark.parametrize("layout", [dict(), dict(tp=2), dict(tp=4, pp=2), dict(pp=4), dict(pp=2, pp_schedule="zbv", tp=2), dict(ep=4), dict(ep=2, tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("fields", [
    dict(), dict(attn="mqa", qkv_bias=True, out_bias=True, mlp_bias=True, act="gelu"), dict(attn="gqa", n_kv_head=2, qk_norm="head", tie_embeddings=False),
    MOE | dict(attn="mla", q_lora_rank=8, mtp=2, tie_embeddings=False), MOE | dict(expert_bias=True, moe_every=2, n_dense_layer=0), dict(pos="t5"),
    dict(layers="gdn,kda,lightning,mha"), dict(pos="learned", norm="layer", norm_at="sandwich", embed_norm=True, sinks=True, attn_gate=True),
    dict(act="swish", head_bias=True)], ids=str)
def test_the_ranks_together_hold_every_parameter_as_often_as_it_is_copied(fields, layout):
    cfg = config(**fields | (layout if fields.get("moe") else {k: v for k, v in layout.items() if k != "ep"}))
    model = M.meta_model(cfg)
    pieces, held = M.pieces(model), 0
    for rank in range(cfg.pp):
        for stage in dist.stages_of(cfg, pieces, rank)[0]:
            for piece in stage:
                held += cfg.ep * sum(dist.counted(piece, cfg, 16 * cfg.pp * cfg.tp, tp)["local"] for tp in range(cfg.tp))
    assert held == sum(p.numel() * copies(name, p, cfg, model) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3", "deepseek-v3", "deepseek-v2"])
def test_a_single_rank_holds_a_preset(name):
    cfg = preset(name, tokens_per_step=M.PRESETS[name]["seq_len"])
    (row,), total = planned(cfg, 1, 2, True), sum(p.numel() for p in M.meta_model(cfg).parameters())
    assert row["params"] == row["shard"] == total and row["optimizer"] == 8 * total and row["weights"] == row["gradients"] == 4 * total
    assert not sends(row)


def test_shards_of_fsdp():
    """All shards are as large, padded; optimizer state is two float32 numbers of each number in a shard."""
    cfg = config(fsdp=3, tie_embeddings=False)
    piece = M.pieces(M.meta_model(cfg))["end"][0]
    for ranks in (2, 4, 64):
        count = dist.counted(piece, cfg, ranks)
        want = sum(-(-p // ranks) * 32 if p > 32 else -(-p // ranks) for p in (61, 32)) if ranks < 64 else 61 + 1   # 61 rows of the head over
        want = want if ranks < 64 else 1 * 32 + 1                                                     # 64 ranks: a row or nothing
        assert count["shard"] == want and count["dense gathered"] == ranks * want
    assert dist.shard_dim((1, 256, 8), 128) == 1 and dist.shard_dim((256, 1), 128) == 0 and dist.shard_dim((3, 5), 7) == 0
    row = planned(cfg, 4)[0]
    assert row["optimizer"] == 8 * row["shard"] and row["shard"] < row["params"] / 3


V3 = dict(pp=16, ep=64, world_size=2048, tokens_per_step=4096 * 128 * 32, micro_batch=1)


def test_the_layout_of_deepseek_v3():
    """Against a run of the layout in fake tensors: a middle stage holds 0.360 B parameters of each rank, its optimizer 2.68 GiB, and sends
    7.0 GiB a micro-batch from all to all: 4 layers, there and back, forward and backward, 4,096 tokens to 8 experts in bfloat16."""
    cfg = preset("deepseek-v3", fsdp=2, **V3)
    dist.refuse_layout(cfg, 2048)
    middle = planned(cfg, 2048, 2, True)[7]
    assert round(middle["shard"] / 1e9, 3) == 0.360 and round(middle["optimizer"] / 2**30, 2) == 2.68
    assert sends(middle)["ep", "all-to-all"] == 32 * 4 * 4 * 4096 * 8 * 7168 * 2
    assert sends(middle)["pp", "send"] == 2 * 32 * 4096 * 7168 * 4
    # gathered once a step in float32: twice the 6.1 GiB that were counted of two bfloat16 gathers
    assert sum(n for (axis, what), n in sends(middle).items() if what == "all-gather") / 2**30 == pytest.approx(6.1, rel=0.01)


def test_the_command_says_the_published_sizes():
    command = [sys.executable, ROOT / "train.py", "--plan", "--world_size=2048", "--pp=16", "--ep=64", "--preset=deepseek-v3", "--mtp=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="2"))
    mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    assert done.returncode == 0, done.stderr
    for said in ("2,048 ranks", "671.03 B without MTP, 682.64 B", "37.55 B without MTP", "ep all-to-all", "bubble", "which does not fit", "--pp="):
        assert said in done.stdout, said
    assert mib < 1024, mib                                       # of the largest child so far: an upper bound


def test_the_plan_starts_nothing(monkeypatch, capsys):
    def never(*args, **more):
        raise AssertionError("a plan starts no process group and reads no data")
    for module, name in ((dist.td, "init_process_group"), (dist, "init"), (data, "prepare")):
        monkeypatch.setattr(module, name, never)
    run_train("--plan", "--world_size=64", "--preset=llama", "--tp=4", "--pp=2", "--vocab_size=32000")
    said = capsys.readouterr().out
    assert "64 ranks = pp 2 (1f1b) x dp 8 x cp 1 x tp 4" in said and "--" in said.splitlines()[-1]
    with pytest.raises(UsageError, match="--tp=5"):
        run_train("--plan", "--world_size=60", "--preset=llama", "--tp=5")
    with pytest.raises(UsageError, match="use 64 ranks"):
        run_train("--plan", "--world_size=63", "--preset=llama", "--tp=4")


# ---- Activations (what does a real step keep?) ----

TOY = dict(vocab_size=2048, n_layer=4, n_embd=128, n_head=4, seq_len=128, plan=True)
KINDS = {
    "dense": {}, "gqa": dict(attn="gqa", n_kv_head=2, qk_norm="head"), "moe": MOE | dict(d_expert=64, aux_loss="sequence"),
    "mla": dict(attn="mla", q_lora_rank=48), "gpt2": dict(norm="layer", act="gelu_tanh", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True),
    "mla moe mtp": MOE | dict(attn="mla", d_expert=64, mtp=1, aux_loss="sequence"), "sandwich": dict(norm_at="sandwich", attn_gate=True),
    "linear": dict(layers="linear,lightning,transnormer"), "gdn": dict(layers="gdn,kda"), "many ids": dict(vocab_size=16384), "long": dict(seq_len=1024),
}


def batch_of(cfg, B):
    ids = torch.randint(cfg.vocab_size, (B, cfg.seq_len + 1))
    return dict(tokens=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous(), weights=torch.ones(B, cfg.seq_len),
                positions=torch.arange(cfg.seq_len).expand(B, -1).contiguous(), doc_ids=torch.zeros(B, cfg.seq_len, dtype=torch.long))


def kept_for_backward(cfg, B, dtype):
    """(bytes of the storages that hooks of saved tensors are shown, bytes alive after forward), both without parameters and batch."""
    torch.manual_seed(0)
    model, batch, seen = M.Model(cfg).train(), batch_of(cfg, B), {}
    outside = [*model.parameters(), *model.buffers(), *batch.values()]

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with Living() as living, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, _, _ = model.loss(batch)
        alive = living.bytes(outside)
    outside = {t.untyped_storage().data_ptr() for t in outside}
    return sum(storage.nbytes() for at, storage in seen.items() if at not in outside), alive


def planned_bytes(cfg, B, dtype):
    """What the plan says is kept, without the block that runs again."""
    cfg.micro_batch, cfg.tokens_per_step, width = B, B * cfg.seq_len, dtype.itemsize
    pieces = M.pieces(M.meta_model(cfg))
    (row,) = dist.planned(cfg, 1, pieces, width, False)
    keeps = [piece.keeps(cfg, B * cfg.seq_len, width, False) for part in pieces.values() for piece in part if piece.block]
    return row["activations"] - max(kept["none"] - kept[cfg.ac] for kept in keeps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_that_a_real_step_keeps(kind, dtype):
    fields = TOY | KINDS[kind]
    B = 1024 // fields["seq_len"]
    for ac in M.AC:
        saved, alive = kept_for_backward(TrainConfig(**fields, ac=ac), B, dtype)
        want = planned_bytes(TrainConfig(**fields, ac=ac), B, dtype)
        tolerance = 0.25 if ac == "selective" and "gdn" in fields.get("layers", "") else 0.1
        assert abs(want / alive - 1) < tolerance, (ac, want, alive)
        if ac == "none":                                         # a checkpoint's own copies are not shown to hooks
            assert abs(want / saved - 1) < 0.15, (ac, want, saved)


MIB = 2**20
SIZES = {
    "dense": dict(n_layer=6, n_embd=512, n_head=8, seq_len=512, vocab_size=8192),
    "moe": dict(n_layer=4, n_embd=256, n_head=4, seq_len=512, vocab_size=8192, moe=True, n_expert=16, n_active=2, d_expert=256),
    "mla": dict(n_layer=4, n_embd=384, n_head=6, seq_len=256, vocab_size=16384, attn="mla", ac="full"),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_total_is_what_a_process_takes(name):
    """Peak resident memory of a child, less what it began with: a step of one row that makes the optimizer's state, and one of two
    micro-batches, the second of which finds gradients there."""
    cfg, B = TrainConfig(**SIZES[name], plan=True), 2
    cfg.micro_batch, cfg.tokens_per_step = B, 2 * B * cfg.seq_len
    (row,) = planned(cfg, 1)
    read, write = os.pipe()

    def status(key):
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def body():
        Path("/proc/self/clear_refs").write_text("5")            # the peak begins anew
        before = status("VmRSS")
        model = M.Model(cfg).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for rows, number in ((1, 1), (B, 2)):
            for _ in range(number):
                model.loss(batch_of(cfg, rows))[0].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        os.write(write, str(status("VmHWM") - before).encode())

    assert wait(fork(body)) == 0
    taken = int(os.read(read, 100))
    os.close(read), os.close(write)
    assert abs(row["total"] - taken) < 0.15 * taken + 100 * MIB, (row["total"] / MIB, taken / MIB)
    assert taken > 250 * MIB


# ---- Pipelines (torch's own orders, one action after the other) ----

def order_of(schedule, p, m):
    """{rank: [(kind, stage, micro-batch)]} as torch makes it."""
    name, each, mirrored = dist.PP_SCHEDULES[schedule]
    if each == 1:
        orders = {}
        for r in range(p):
            forward, backward = [("F", r, i) for i in range(m)], [("B", r, i) for i in range(m)]
            warm = m if schedule == "gpipe" else min(m, p - r)
            orders[r] = forward[:warm]
            for i in range(m):
                orders[r] += [backward[i]] + forward[warm + i:warm + i + 1]
        return orders
    numbers = [0, 2 * p - 1] if mirrored else [0, p]
    stages = [SimpleNamespace(num_stages=2 * p, group_size=p, group_rank=0, stage_index=i, is_first=i == 0, is_last=i == 2 * p - 1, has_backward=True,
                              submod=torch.nn.Identity(), device=torch.device("cpu"), group=None) for i in numbers]
    made = getattr(schedules, name)(stages, m, loss_fn=lambda out, target: out)
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    flat = lambda actions: [one for a in actions if a is not None for one in (a.sub_actions or [a])]
    return {r: [(kinds[a.computation_type.name], a.stage_index, a.microbatch_index) for a in flat(actions)] for r, actions in made.pipeline_order.items()}


def played(orders, stages):
    """(when the last rank is done, [micro-batches that each rank holds of its stages when it holds most]); forward and both gradients take 1."""
    done, clock, at, held, most = {}, [0] * len(orders), [0] * len(orders), [{} for _ in orders], [{} for _ in orders]
    while any(at[r] < len(orders[r]) for r in orders):
        before = list(at)
        for r in orders:
            while at[r] < len(orders[r]):
                kind, stage, micro = orders[r][at[r]]
                needs = {"F": [("F", stage - 1, micro)] if stage else [], "W": []}.get(
                    kind, [("F", stage, micro)] + [("B", stage + 1, micro)] * (stage < stages - 1))
                if not all(need in done for need in needs):
                    break
                clock[r] = max([clock[r]] + [done[need] for need in needs]) + (2 if kind == "B" else 1)
                done["B" if kind == "I" else kind, stage, micro] = clock[r]
                held[r][stage] = held[r].get(stage, 0) + dict(F=1, I=0).get(kind, -1)
                if sum(held[r].values()) > sum(most[r].values()):
                    most[r] = dict(held[r])
                at[r] += 1
        assert at != before, "the order waits for itself"
    return max(clock), most


@pytest.mark.parametrize("schedule, p, m", [(schedule, p, m) for schedule in dist.PP_SCHEDULES for p, m in (
    (2, 4), (4, 8), (4, 16), (8, 16), (4, 10), (4, 6)) if schedule != "dualpipev" or m >= 2 * p])
def test_bubbles_and_activations_are_those_of_torchs_orders(schedule, p, m):
    cfg, each = config(pp=p, pp_schedule=schedule), dist.PP_SCHEDULES[schedule][1]
    time_taken, most = played(order_of(schedule, p, m), each * p)
    work = 3 * each * m
    if m % p == 0:
        assert (time_taken - work) / time_taken == pytest.approx(dist.bubble(cfg, m), rel=1e-9)
    for rank in range(p):
        want = [most[rank].get(stage, 0) for stage in range(each * p) if dist.stage_owner(stage, p, schedule) == rank]
        assert sum(dist.in_flight(cfg, rank, m)) == sum(want) and dist.in_flight(cfg, rank, m)[-1] == want[-1], (rank, want)


# ---- Traffic (theory, in bytes of one rank) ----

def test_gradients_cross_once_however_many_micro_batches():
    total = 4 * sum(p.numel() for p in M.meta_model(config()).parameters())
    for micro in (1, 16):
        assert sends(planned(config(micro_batch=micro), 4)[0]) == {("batch", "all-reduce"): total}
        assert sends(planned(config(micro_batch=micro, fsdp=2), 2)[0])["shards", "all-gather"] == pytest.approx(total, rel=0.01)
    blocks = 4 * sum(p.numel() for p in M.meta_model(config()).blocks.parameters())
    for number, rows in ((4, 8), (1, 32)):
        row = sends(planned(config(micro_batch=rows, fsdp=3), 2)[0])
        assert row["shards", "reduce-scatter"] == pytest.approx(total, rel=0.01)
        assert row["shards", "all-gather"] == pytest.approx(number * (2 * blocks + total - blocks), rel=0.01)
        assert sends(planned(config(micro_batch=rows, fsdp=3, pp=2), 4)[1])["pp", "send"] == 4 * 2048 // 2 * 32
    # a stage of a pipeline stays gathered for the step
    row = sends(planned(config(micro_batch=8, fsdp=3, pp=2), 4)[1])
    assert row["shards", "all-gather"] == pytest.approx(blocks / 2 + 4 * (61 + 1) * 32, rel=0.01)
    row = sends(planned(config(fsdp=3, hsdp=2), 4)[0])
    assert row["copies", "all-reduce"] == pytest.approx(total / 2, rel=0.01)


@pytest.mark.parametrize("ac, again", [("none", 0), ("full", 1)])
def test_tensor_and_sequence_parallel(ac, again):
    """A block gathers and scatters its stream twice each way; when it runs again, both gathers and the first scatter do."""
    cfg = config(tp=2, ac=ac, micro_batch=16)
    row, stream = sends(planned(cfg, 2)[0]), 4 * 2048 * 32
    assert row["tp", "all-gather"] == stream * (8 * (4 + 2 * again) + 2)                      # and the head forward, the embedding backward
    assert row["tp", "reduce-scatter"] == stream * (8 * (4 + again) + 2)
    assert row["tp", "all-reduce"] == 3 * 4 * 2048 + 4 * 17 * 32                              # the loss, and norms, which all ranks hold
    row = sends(planned(config(tp=2, ac=ac, micro_batch=16, sp=False), 2)[0])
    assert row == {("tp", "all-reduce"): stream * (8 * (4 + again) + 2) + 3 * 4 * 2048}
    half = sends(planned(cfg, 2, width=2, cuda=True)[0])
    assert half["tp", "all-gather"] == stream * (8 * (4 + 2 * again) / 2 + 0.5 + 1)           # the embedding stays float32


def test_context_and_expert_parallel():
    keys = 4 * 2048 * 32
    for mode, want in (("gather", {"all-gather": 8 * 2 * keys, "reduce-scatter": 8 * 2 * keys}), ("ulysses", {"all-to-all": 8 * 2 * 4 * keys // 2}),
                       ("ring", {"send": 8 * 2 * keys // 2 * (1 + 2 * 2 - 1)})):
        assert {what: n for (axis, what), n in sends(planned(config(cp=2, cp_mode=mode), 2)[0]).items() if axis == "cp"} == want
    mla = sends(planned(config(cp=2, attn="mla", kv_lora_rank=8, qk_rope_head_dim=4), 2)[0])
    assert mla["cp", "all-gather"] == 8 * 4 * 2048 * 12                                       # latents, not keys
    cfg = config(ep=2, **MOE)
    row = sends(planned(cfg, 4)[0])
    assert row["ep", "all-to-all"] == 4 * 7 * 512 * 2 * 32 * 4                                # 7 blocks, 512 tokens, 2 experts each
    assert row["expert_copies", "all-reduce"] == 4 * 7 * 4 * 3 * 16 * 32
    assert not [axis for axis, _ in sends(planned(config(**MOE), 4)[0]) if axis in ("ep", "expert_copies")]


def test_embeddings_at_both_ends_of_a_pipeline_are_added_up():
    table = 4 * 61 * 32
    for fields, schedule, want in ((dict(), "1f1b", table), (dict(tie_embeddings=False), "1f1b", None), (dict(tie_embeddings=False, mtp=1), "1f1b", table),
                                   (dict(), "zbv", None)):
        rows = planned(config(pp=4, pp_schedule=schedule, **fields), 4)
        assert [sends(row).get(("ends", "all-reduce")) for row in rows] == [want, None, None, want]
        turns = schedule == "zbv"                                # the last rank of a V hands on to itself
        assert [sends(row)["pp", "send"] // (32 * 2048 * 4) for row in rows] == ([2, 4, 4, 2] if turns else [1, 2, 2, 1])


# ---- What must be so ----

def test_what_more_ranks_and_modes_change():
    most = lambda key, size=8, **fields: max(row[key] for row in planned(config(**fields), size))
    assert most("params", tp=4) < most("params", tp=2) < most("params")
    assert most("optimizer", fsdp=1) == most("optimizer", fsdp=3) < most("optimizer", fsdp=1, hsdp=4) < most("optimizer")
    assert most("weights", fsdp=3) < most("weights", fsdp=2) and most("gradients", fsdp=2, micro_batch=8) < most("gradients")
    none, norm, selective, full = (most("activations", ac=ac) for ac in M.AC)
    assert full < selective < none and norm < none
    held = {schedule: most("activations", pp=4, pp_schedule=schedule, micro_batch=1) for schedule in dist.PP_SCHEDULES}
    assert held["1f1b"] < held["interleaved"] < held["gpipe"] and held["zbv"] < held["gpipe"]
    assert most("activations", tp=2, micro_batch=8, dp=4) < most("activations", micro_batch=8)
    assert dist.bubble(config(pp=4), 8) > dist.bubble(config(pp=4), 16) > dist.bubble(config(pp=4, pp_schedule="interleaved"), 16)
    assert dist.bubble(config(), 1) == 0


def test_advice_fits_is_legal_and_sorted():
    cfg = preset("llama", vocab_size=32000, world_size=16, tokens_per_step=1024 * 64)
    pieces = M.pieces(M.meta_model(cfg))
    best = dist.advise(cfg, 16, pieces, 2, True, 20e9, 989e12)
    assert len(best) > 10 and [seconds for seconds, *_ in best] == sorted(seconds for seconds, *_ in best)
    for seconds, other, ranks in best:
        dist.refuse_layout(other, 16)
        assert max(row["total"] for row in ranks) <= 18e9 and seconds[0] >= seconds[1]
    assert len(dist.advise(cfg, 16, pieces, 2, True, 2e9, 989e12)) < len(best) and not dist.advise(cfg, 16, pieces, 2, True, 1e7, 989e12)


def test_recurrent_mixers_are_those_that_say_so():
    assert dist.RECURRENT == {name for name, mixer in ATTENTION.items() if mixer.recurrent}


# ---- Refusals (before anything is started) ----

REFUSED = [  # (ranks, flags, what the message must say)
    (8, dict(tp=3), "--tp=3.*use 9 ranks"), (8, dict(dp=3), "--dp=3.*--dp=8"), (8, dict(dp=2, tp=2), "make 4 ranks.*--dp=4"),
    (6, dict(pp=4), "--pp=4.*use 8 ranks"), (1, dict(tp=2), "there is 1"), (8, dict(tp=8), "--tp=8.*--n_head=4.*--tp=4 or less"),
    (3, dict(tp=3, attn="gqa", n_kv_head=2), "--tp=3 does not divide"), (4, dict(tp=4, attn="gqa", n_kv_head=3, n_head=12, n_embd=48), "3 key heads"),
    (2, dict(tp=2, attn="gqa", n_kv_head=3, n_head=6, n_embd=48), "3 key heads"), (4, dict(tp=4, vocab_size=3), "--vocab_size=3"),
    (16, dict(pp=16), "16 stages.*--n_layer=8.*--pp=8"), (8, dict(pp=8, pp_schedule="interleaved"), "16 stages.*--pp=4 or --pp_schedule=1f1b"),
    (8, dict(pp=8, pp_schedule="zbv"), "16 stages"), (8, dict(pp=8, pp_schedule="dualpipev"), "16 stages"), (2, dict(pp=2, n_layer=1), "2 stages"),
    (8, dict(ep=3, **MOE), r"--n_expert=8.*\[1, 2, 4, 8\]"), (8, dict(ep=2), "--moe"), (4, dict(ep=8, **MOE), r"dp x cp = 4.*\[1, 2, 4\]"),
    (8, dict(ep=4, tp=4, **MOE), "dp x cp = 2"), (8, dict(ep=16, **MOE), "--n_expert=8"), (2, dict(cp=2, seq_len=30, tokens_per_step=60), "--seq_len=28"),
    (2, dict(cp=2, seq_len=31, tokens_per_step=62, cp_mode="ulysses"), "--seq_len=30"), (8, dict(cp=8, cp_mode="ulysses"), "--cp=4"),
    (4, dict(cp=2, tp=2, n_head=2, cp_mode="ulysses"), "--cp_mode=ulysses"), (2, dict(cp=2, cp_mode="ring", attn_dropout=0.1), "--attn_dropout"),
    (2, dict(cp=2, cp_mode="ring", pos="shaw"), "--pos=shaw"), (2, dict(pp=2, pp_schedule="zbv", mtp=1), "--tie_embeddings=false"),
    (2, dict(cp=2, arch="encdec"), "--cp=1"), (2, dict(cp=2, cp_mode="ring", pos="t5"), "t5"), (2, dict(cp=2, cp_mode="star"), "--cp_mode=star.*gather"),
    (2, dict(pp=2, pp_schedule="2f2b"), "--pp_schedule=2f2b.*1f1b"), (2, dict(fsdp=4), "--fsdp=4"), (2, dict(fsdp=-1), "--fsdp=-1 must be at least 0"),
    (4, dict(hsdp=2), "--hsdp=2.*--fsdp"), (4, dict(hsdp=3, fsdp=3), r"--hsdp=3.*\[1, 2, 4\]"), (8, dict(hsdp=4, fsdp=1, tp=4), "dp x cp = 2"),
    (2, dict(tp=0), "--tp=0 must be at least 1"), (2, dict(pp=-2), "--pp=-2"), (2, dict(cp=0), "--cp=0"), (2, dict(ep=0), "--ep=0"), (2, dict(hsdp=0), "--hsdp=0"),
    (2, dict(dp=-1), "--dp=-1"), (2, dict(timeout=0), "--timeout=0.*1800"), (2, dict(microbatches=-1), "--microbatches=-1"), (2, dict(world_size=-8), "--world_size"),
    (2, dict(world_size=8, plan=False), "--world_size=8.*--plan"), (2, dict(micro_batch=-1), "--micro_batch=-1"),
    (3, dict(), "--tokens_per_step=2048.*2016 or --tokens_per_step=2112"), (1, dict(tokens_per_step=16), "--tokens_per_step=32$"),
    (1, dict(micro_batch=7), "--micro_batch=7.*2016 or"), (4, dict(pp=4, microbatches=3), "--microbatches=3.*64 rows.*--microbatches=4"),
    (4, dict(pp=4, microbatches=2), "2 micro-batches.*fewer than the 4.*--microbatches=4"), (2, dict(pp=2, pp_schedule="dualpipev", microbatches=2), "fewer than the 4"),
    (4, dict(pp=4, tokens_per_step=96), "3 micro-batches.*--tokens_per_step=128"), (2, dict(microbatches=8, micro_batch=2), "leave one of them out"),
    (4, dict(pp=4, pp_schedule="interleaved", microbatches=9, tokens_per_step=9 * 32), "rounds of one length"),
    (2, dict(norm="batch"), "--norm=batch"), (4, dict(pp=2, pp_schedule="zbv", compile=True), "--compile=false"), (2, dict(pp=2, arch="encdec"), "encdec"),
]


@pytest.mark.parametrize("size, fields, says", REFUSED, ids=lambda case: str(case)[:50])
def test_a_layout_that_cannot_run_is_refused_by_name(size, fields, says):
    with pytest.raises(UsageError) as error:
        dist.refuse_layout(config(**fields), size)
    assert re.search(says, str(error.value)), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size, fields", [
    (1, dict()), (8, dict()), (8, dict(tp=4, dp=2)), (8, dict(tp=4, attn="mqa")), (8, dict(tp=4, attn="gqa", n_kv_head=2)), (8, dict(pp=8)), (8, dict(pp=4, pp_schedule="zbv")),
    (8, dict(pp=2, microbatches=4, micro_batch=4)), (8, dict(ep=8, **MOE)), (8, dict(cp=2, ep=4, **MOE)), (4, dict(cp=4, cp_mode="ulysses")), (8, dict(cp=8, cp_mode="ring", seq_len=64)),
    (4, dict(cp=4, layers="gdn,mha", seq_len=20, tokens_per_step=80)), (8, dict(fsdp=3, hsdp=4)), (16, dict(pp=2, cp=2, tp=2, fsdp=3)), (4, dict(pp=4, pp_schedule="gpipe", microbatches=1)),
    (4, dict(pp=4, pp_schedule="interleaved", n_layer=8, microbatches=8)), (2, dict(layers="swa*3,mha", tp=2)), (4, dict(attn="mla", tp=4, n_kv_head=3))])
def test_layouts_that_can_run_are_not_refused(size, fields):
    assert dist.refuse_layout(config(**fields), size) is None


def test_hints_work():
    """What a refusal offers is accepted."""
    taken = 0
    for size, fields, _ in REFUSED:
        offer = None
        try:
            dist.refuse_layout(config(**fields), size)
        except UsageError as said:
            error = said
            offer = re.search(r"use (?:one of )?(?:--)?(\w+)=(\d+)", str(error)) or re.search(r"--(\w+)=-?\d+ does not.*use one of \[(\d+)", str(error))
        if offer and offer[1] in ("tp", "ep", "hsdp", "seq_len", "tokens_per_step", "microbatches", "dp"):
            fields = fields | (dict(microbatches=0) if "no --microbatches" in str(error) else {})
            fixed = config(**fields | {offer[1]: int(offer[2])} | (dict(tokens_per_step=int(offer[2]) * size) if offer[1] == "seq_len" else {}))
            if offer[1] != "tp":                                 # fewer ranks of tp leave another size of world
                taken += dist.refuse_layout(fixed, size) is None
    assert taken >= 18
