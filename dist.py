"""Dist: how does one program run on many devices, and how does a run survive them?

A model that is too slow or too large for one device is cut along every axis it has:

    data      each rank has rows of its own       gradients are summed                    DDP; fsdp: weights are cut, too
    tensor    ... a part of every matrix          what sublayers give is summed           X A = [X A1, X A2];  Y B = Y1 B1 + Y2 B2
    sequence  ... between sublayers, some places  sum = scatter, then gather
    context   ... places of every row             queries meet the keys of others         gather, Ulysses, ring
    expert    ... some experts                    tokens travel to them and back          all-to-all
    pipeline  ... some blocks                     the stream goes on to the next          schedules

The layers call the few collectives below, which are the identity where one rank is alone, so model.py reads as if there were one device;
what all ranks compute together is that one device's step, to rounding. One number makes it so: the loss of a step is a sum over all its
tokens, divided by one count,

    loss = sum_{ranks} sum_{micro-batches} sum_m weight_m nll_m  /  sum_{ranks} sum_{micro-batches} sum_m weight_m        [DDP sec 3.2]

so the count is added up over the ranks first, and gradients are added, not averaged. A mean of means would weigh a token by the company it
happens to keep.

A checkpoint is a folder of plain tensors in the safetensors layout and one JSON manifest with the sha256 of every file, written last; the
folder gets its name by a rename when all of it is on disk. Nothing is pickled, so opening one runs no code, and a half-written or damaged
one is recognised and passed over for the one before.

Contents:    config | the world | layouts | reductions | collectives of the layers | cuts and pieces | engines | safetensors | checkpoints |
             plan | demo and bench
References:
    [DDP] 2006.15704; [FSDP] 2304.11277; [Megatron] 1909.08053; [SP] Reducing Activation Recomputation, 2205.05198; [Ulysses] 2309.14509;
    [Ring] 2310.01889; [Llama3] 2407.21783; [GPipe] 1811.06965; [Megatron2] 2104.04473; [BFS] Breadth-First Pipeline, 2211.05953;
    [ZB] Zero Bubble Pipeline, 2401.10241; [DSV3] DeepSeek-V3, 2412.19437
Run me:      python dist.py      (saves a checkpoint, damages it, recovers)
             torchrun --nproc_per_node=2 dist.py      (the same, and a token-weighted mean over two ranks)
"""
import contextlib
import copy
import datetime
import errno
import faulthandler
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import statistics
import tempfile
import threading
import time
import uuid
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td
import torch.distributed._functional_collectives as funcol
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from kernels import to_autocast
from tokenizer import UsageError, atomic_write, cores, flag, run_cli, sync_folder


@dataclass
class DistConfig:
    device: str = "auto"           # where to compute: auto (a GPU if there is one), cpu or cuda
    dp: int = 0                    # copies of the model that share the rows of a step; 0 means as many as pp, cp and tp leave
    fsdp: int = flag(0, bare=3)    # ZeRO stage: 1, 2 shard optimizer state and gradients, 3 (or bare) weights, too; with pp 3 is as 2
    hsdp: int = 1                  # fsdp: copies of the sharded weights, so that weights are gathered among fewer ranks
    tp: int = 1                    # ranks that share heads, hidden channels and the vocabulary
    sp: bool = True                # with tp, what is between sublayers is cut along the row, not held by all
    pp: int = 1                    # ranks that share the depth
    pp_schedule: str = "1f1b"      # which micro-batch a pipeline stage works on next, a key of PP_SCHEDULES
    microbatches: int = 0          # pp: micro-batches of a step; 0 means two a stage, where rows divide
    cp: int = 1                    # ranks that share each row
    cp_mode: str = "gather"        # how queries meet the keys of other ranks, a key of CP_MODES
    ep: int = 1                    # ranks that share the experts, taken from dp x cp
    timeout: int = 1800            # seconds after which a rank that waits for another gives up
    deterministic: bool = False    # refuse operations whose result may change from run to run
    world_size: int = 0            # plan: ranks of a cluster that is not there


DEVICES = ("auto", "cpu", "cuda")  # flag --device

CP_MODES = {                       # flag --cp_mode
    "gather": "every rank gets all keys and values of the row",                                                    # [Llama3 sec 3.3.2]
    "ulysses": "every rank gets the whole row of some heads",                                                      # [Ulysses sec 3.1]
    "ring": "keys and values go round, so that no rank ever holds all of them",                                    # [Ring sec 3]
}


# ---- The world (who am I among how many?) ----

# Ranks stand in a grid of four axes, tp the fastest, so that those who talk most are neighbours:
#     pp  stages: consecutive blocks
#     dp  rows of the batch             dp x cp together are `batch`: gradients of dense weights are summed over it, FSDP shards over it,
#     cp  parts of a row                and the experts of a layer are dealt to ep neighbours in it, `expert_copies` times over
#     tp  heads, channels, vocabulary

@dataclass(frozen=True)
class Group:
    """Ranks that share one thing: this is `rank` of `size`. At size one every collective below is the identity."""
    rank: int = 0
    size: int = 1
    ranks: tuple = (0,)            # of the world
    pg: object = None

    @property
    def name(self):
        return self.pg.group_name if self.pg is not None else ""


ALONE = Group()


@dataclass(frozen=True)
class World(Group):
    """All ranks, the device this one computes on, and the groups it belongs to."""
    device: torch.device = torch.device("cpu")
    pp: Group = ALONE
    dp: Group = ALONE
    cp: Group = ALONE
    tp: Group = ALONE
    batch: Group = ALONE           # dp x cp
    ep: Group = ALONE
    expert_copies: Group = ALONE   # ranks of batch that hold the same experts
    shards: Group = ALONE          # ranks of batch that share weights under fsdp
    copies: Group = ALONE          # those that hold the same shard (hsdp)
    ends: Group = ALONE            # first and last rank of pp
    sp: bool = False

    @property
    def main(self):
        return self.rank == 0

    def print(self, *words):
        """One voice for all ranks, flushed also when piped."""
        if self.main:
            print(*words, flush=True)


def validate(cfg):
    """Refuse an impossible layout before any device is touched. Returns the number of ranks."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.device not in DEVICES:
        raise UsageError(f"--device={cfg.device} is not known; use one of {DEVICES}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda but no GPU answers here; use --device=cpu or auto")
    return size


def copies_of_model(cfg, size):
    """dp: copies of the model in a world of `size` ranks, what its other axes leave. Each has rows of its own."""
    return size // (cfg.pp * cfg.cp * cfg.tp)


def layout(cfg, size):
    """{axis: ranks} of those that are used."""
    named = dict(pp=cfg.pp, dp=copies_of_model(cfg, size), cp=cfg.cp, tp=cfg.tp, ep=cfg.ep, fsdp=cfg.fsdp, hsdp=cfg.hsdp)
    return {name: n for name, n in named.items() if name == "dp" or n != getattr(DistConfig, name)}


def layout_line(cfg, size):
    """The same in words."""
    axes, how = layout(cfg, size), dict(pp=f" ({cfg.pp_schedule})", cp=f" ({cfg.cp_mode})", tp=" (the stream, too)" if cfg.sp else "")
    grid = " x ".join(f"{name} {axes[name]}{how.get(name, '')}" for name in ("pp", "dp", "cp", "tp") if axes.get(name, 1) > 1)
    return ", ".join([grid or "dp 1"] + [f"{name} {axes[name]}" for name in ("ep", "fsdp", "hsdp") if name in axes])


def init(cfg):
    """Join the process group that torchrun prepared (NCCL on GPUs, gloo on CPUs), or be alone. Returns a World."""
    size = validate(cfg)
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise UsageError(f"rank {rank} has no GPU: {torch.cuda.device_count()} on this machine; start fewer processes")
        torch.cuda.set_device(local)
    elif size > 1:                           # torchrun sets one thread a rank, which leaves the other cores of a CPU idle
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if size == 1:
        return World(device=device)
    # the watchdog below is first to speak; this is for ranks that wait outside a step
    wait = datetime.timedelta(seconds=cfg.timeout + 10)
    if not td.is_initialized():
        td.init_process_group("nccl" if cuda else "gloo", timeout=wait, **meeting(rank, size, wait))
    return World(rank, size, tuple(range(size)), td.group.WORLD, device, **groups(cfg, rank, size, wait), sp=cfg.sp and cfg.tp > 1)


def meeting(rank, size, wait):
    """Where ranks that torchrun has started again find each other. Its store outlives them, and gloo would find the addresses of those that
    died there, so each attempt has a corner of its own."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return {}
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = td.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, hosts, timeout=wait)
    return dict(store=td.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=size)


def groups(cfg, rank, size, wait):
    """{name: Group} of this rank. All ranks make all groups, in the same order."""
    dp = copies_of_model(cfg, size)
    grid = np.arange(size).reshape(cfg.pp, dp, cfg.cp, cfg.tp)
    batch = grid.reshape(cfg.pp, dp * cfg.cp, cfg.tp)
    copies = cfg.hsdp if cfg.fsdp else dp * cfg.cp
    sharded, experts = (batch.reshape(cfg.pp, n, -1, cfg.tp) for n in (copies, batch.shape[1] // cfg.ep))
    axes = dict(pp=(grid, 0), dp=(grid, 1), cp=(grid, 2), tp=(grid, 3), batch=(batch, 1), ep=(experts, 2), expert_copies=(experts, 1),
                shards=(sharded, 2), copies=(sharded, 1), ends=(grid[[0, -1]] if cfg.pp > 1 else grid, 0))
    made, own, alone = {}, {}, cfg.fsdp == 0                     # fully_shard wants a process group even of one
    for name, (ranks, axis) in axes.items():
        for members in np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis]).tolist():
            key = tuple(members)
            if key not in made:
                whole = len(key) == size
                made[key] = None if len(key) == 1 and alone else td.group.WORLD if whole else td.new_group(members, timeout=wait)
            if rank in key:
                own[name] = Group(key.index(rank), len(key), key, made[key])
    return own


def watch(world, timeout):
    """From now on this rank has `timeout` seconds, until the next call, or it prints the stack of every thread and ends with exit code 1:
    who waits for a rank that hangs would wait for ever, and which one hangs is seen from all their stacks."""
    if world.size > 1:
        faulthandler.dump_traceback_later(timeout, exit=True)


def shutdown():
    """Leave the process group once all ranks have come this far. Let go of parallelize()'s step before: it holds the group,
    and freeing a gloo group from there can wait for ever on a thread that waits for Python."""
    if td.is_initialized():
        td.barrier()
        faulthandler.cancel_dump_traceback_later()
        td.destroy_process_group()


# ---- Layouts (which can run?) ----

PP_SCHEDULES = {                   # flag --pp_schedule: torch's class, stages a rank, and do stages go forth and back over the ranks?
    "gpipe": ("ScheduleGPipe", 1, False),                        # all forward, then all backward                  [GPipe sec 2]
    "1f1b": ("Schedule1F1B", 1, False),                          # in turn, so that fewer micro-batches are kept   [Megatron2 sec 2.2]
    "looped_bfs": ("ScheduleLoopedBFS", 2, False),               # as gpipe, with shorter stages                   [BFS sec 3]
    "interleaved": ("ScheduleInterleaved1F1B", 2, False),        # as 1f1b, with shorter stages                    [Megatron2 sec 2.2]
    "interleaved_zb": ("ScheduleInterleavedZeroBubble", 2, False),       # gradients of weights wait for a gap             [ZB sec 2]
    "zbv": ("ScheduleZBVZeroBubble", 2, True),                   # the same, forth and back                        [ZB sec 6]
    "dualpipev": ("ScheduleDualPipeV", 2, True),                 # forward of one beside backward of another       [DSV3 sec 3.2.1]
}
SPLIT = {"interleaved_zb", "zbv", "dualpipev"}                           # schedules that split backward in two
SPLITS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)    # can torch do so with autograd functions written in Python?
RECURRENT = {"linear", "lightning", "transnormer", "gdn", "kda"}         # mixers that hand on a state instead of keys


def stage_owner(number, pp, schedule):
    """Rank of pp that holds a stage."""
    _, each, mirrored = PP_SCHEDULES[schedule]
    return each * pp - 1 - number if mirrored and number >= pp else number % pp


@functools.cache
def divisors(n, *others):
    """Numbers that divide n and all others."""
    return [d for d in range(1, n + 1) if not any(k % d for k in (n, *others))]


def micro_shape(cfg, size):
    """(rows of a micro-batch, micro-batches of a step) of a rank; where nothing is said the fewest of 16,384 tokens at most, in a pipeline
    two or more a rank."""
    rows, most = cfg.tokens_per_step // cfg.seq_len // (size // (cfg.pp * cfg.cp * cfg.tp)), max(1, 16384 // cfg.seq_len)
    number = rows // cfg.micro_batch if cfg.micro_batch else cfg.microbatches
    if not number:
        fits = [n for n in divisors(rows) if n * most >= rows]
        even = [n for n in fits if n % cfg.pp == 0] if cfg.pp > 1 else fits
        number = ([n for n in even if n >= 2 * cfg.pp and cfg.pp > 1] or even or [rows])[0]
    return rows // number, number


def refuse_layout(cfg, size):
    """Refuse a layout that `size` ranks cannot run, by the flag at fault and with values that work. It reads the config alone: before any
    process group and any weight."""
    least = dict(dp=0, fsdp=0, hsdp=1, tp=1, pp=1, microbatches=0, cp=1, ep=1, timeout=1, world_size=0, micro_batch=0)
    for name, low in least.items():
        if getattr(cfg, name) < low:
            raise UsageError(f"--{name}={getattr(cfg, name)} must be at least {low}, for example {max(low, getattr(DistConfig, name, 1))}")
    for name, table in (("pp_schedule", PP_SCHEDULES), ("cp_mode", CP_MODES), ("fsdp", range(4))):
        if getattr(cfg, name) not in table:
            raise UsageError(f"--{name}={getattr(cfg, name)} is not known; use one of {list(table)}")
    pp, cp, tp, ep, H, schedule = cfg.pp, cfg.cp, cfg.tp, cfg.ep, cfg.n_head, cfg.pp_schedule
    dp, left = divmod(size, pp * cp * tp)
    if left or cfg.dp not in (0, dp):
        fits = f"--dp={dp}, or leave it out" if not left else f"{max(1, round(size / (pp * cp * tp))) * pp * cp * tp} ranks"
        grid, ranks = f"--dp={cfg.dp} x " * bool(cfg.dp) + f"--pp={pp} x --cp={cp} x --tp={tp}", max(1, cfg.dp) * pp * cp * tp
        start = "" if cfg.world_size else f", or start with torchrun --nproc_per_node={ranks}"
        raise UsageError(f"{grid} make {ranks} ranks{'' if cfg.dp else ' or a multiple of that'}, and there {'is' if size == 1 else 'are'} "
                         f"{size}; use {fits}{start}")
    batch, each = dp * cp, PP_SCHEDULES[schedule][1]
    mixers = {name.partition("*")[0].strip() for name in (cfg.layers or cfg.attn).split(",")}
    softmax, stages = mixers - RECURRENT, pp * each if pp > 1 else 1
    kv = cfg.n_kv_head or (1 if "mqa" in mixers else max(1, H // 4) if "gqa" in mixers else H)
    grouped = softmax - {"mla"} and kv != H
    mirrored = cfg.cp_mode != "ulysses" and not mixers & RECURRENT and cfg.arch == "decoder"           # then a rank has two pieces of a row
    cuts, unit = cp * (1 + mirrored), cfg.seq_len * dp * max(1, cfg.micro_batch)
    low, ours = cfg.tokens_per_step // unit * unit, f" x --micro_batch={cfg.micro_batch}" * bool(cfg.micro_batch)
    refuse_first((                 # (is it wrong?, what to say)
        (cfg.world_size and not cfg.plan, f"--world_size={cfg.world_size} is a cluster that --plan imagines; give it --plan, too"),
        (cfg.hsdp > 1 and not cfg.fsdp, f"--hsdp={cfg.hsdp} makes copies of sharded weights; give it --fsdp, or leave it out"),
        (batch % cfg.hsdp, f"--hsdp={cfg.hsdp} does not divide dp x cp = {batch} ranks; use one of {divisors(batch)[:12]}"),
        (tp > H, f"--tp={tp} ranks share --n_head={H} heads, at least one each; use --tp={divisors(H)[-1]} or less"),
        (grouped and H % tp, f"--tp={tp} does not divide --n_head={H}, whose heads share keys; use one of {divisors(H)}"),
        (grouped and kv % tp and tp % kv, f"--tp={tp}, {kv} key heads: one must divide the other; use one of {divisors(H, kv)}"),
        (tp > cfg.vocab_size, f"--tp={tp} is more than --vocab_size={cfg.vocab_size}; use one of {divisors(H)}"),
        (ep > 1 and not cfg.moe, f"--ep={ep} deals out experts, of which there are none; give it --moe, or leave it out"),
        (ep > 1 and cfg.n_expert % ep, f"--ep={ep} does not divide --n_expert={cfg.n_expert}; use one of {divisors(cfg.n_expert, batch)}"),
        (batch % ep, f"--ep={ep} does not divide dp x cp = {batch} ranks, which it shares; use one of {divisors(batch, cfg.n_expert)}"),
        (cp > 1 and cfg.seq_len % cuts, f"--cp={cp} cuts rows into {cuts} pieces, and --seq_len={cfg.seq_len} is no multiple of that; use "
         f"--seq_len={max(1, cfg.seq_len // cuts) * cuts}"),
        (cp > 1 and cfg.cp_mode == "ulysses" and softmax and H % (tp * cp), f"--cp_mode=ulysses shares heads, and --cp={cp} x --tp={tp} "
         f"does not divide --n_head={H}; use --cp={divisors(max(1, H // tp))[-1]} or another mode"),
        (cp > 1 and cfg.cp_mode == "ring" and (cfg.attn_dropout or cfg.pos in ("shaw", "t5")),
         "--cp_mode=ring has neither --attn_dropout nor --pos=shaw or t5; use --cp_mode=gather"),
        (cp > 1 and cfg.arch == "encdec", f"--cp={cp} shares the rows of one text, and --arch=encdec reads two; use --cp=1"),
        (cp > 1 and mixers & {"gdn", "kda"} and cfg.seq_len // cp < 4, f"--cp={cp} leaves a rank fewer tokens of --seq_len={cfg.seq_len} "
         "than the convolution of gdn and kda reads; use --cp=1"),
        (pp > 1 and cfg.arch == "encdec", f"--pp={pp} cuts one stack of blocks, and --arch=encdec has two; use --pp=1"),
        (cfg.n_layer < stages, f"--pp={pp} with --pp_schedule={schedule} has {stages} stages, more than --n_layer={cfg.n_layer} blocks; "
         f"use --pp={max(1, cfg.n_layer // each)}" + " or --pp_schedule=1f1b" * (each > 1)),
        (cfg.norm == "batch" and size > 1, "--norm=batch takes its statistics over the rows of one rank, so ranks would train different "
         "models; use one, or another --norm"),
        (cfg.compile and pp > 1 and schedule in SPLIT,
         f"--pp_schedule={schedule} splits backward in two, which compiled blocks cannot; use --compile=false or --pp_schedule=1f1b"),
        (pp > 1 and schedule in SPLIT and not (SPLITS or cfg.world_size), f"--pp_schedule={schedule} splits backward in two, which torch "
         f"{torch.__version__} cannot do with our kernels; use --pp_schedule=1f1b, or torch 2.13"),
        (cfg.mtp and cfg.tie_embeddings and pp > 1 and schedule in SPLIT,
         f"--pp_schedule={schedule} splits backward in two, which torch cannot where MTP looks up what is also the head; use "
         "--tie_embeddings=false or --pp_schedule=1f1b"),
        (low != cfg.tokens_per_step, f"--tokens_per_step={cfg.tokens_per_step} is not a multiple of {unit} (--seq_len={cfg.seq_len}{ours} "
         f"x dp {dp}); use " + " or ".join(f"--tokens_per_step={n}" for n in (low, low + unit) if n)),
    ))
    rows, number = cfg.tokens_per_step // cfg.seq_len // dp, micro_shape(cfg, size)[1]
    enough = {"1f1b": pp, "dualpipev": stages}.get(schedule, 1) if pp > 1 else 1
    uneven = lambda n: pp > 1 and schedule.startswith("interleaved") and n % max(1, n // pp)
    fits = [n for n in divisors(rows) if n >= enough and not uneven(n)]
    fits = [] if cfg.micro_batch else fits
    even = -(-max(number, enough) // pp) * pp                    # a multiple of pp suits every schedule
    asked, more = cfg.microbatches, f"use --tokens_per_step={even * unit}" + " and no --microbatches" * bool(cfg.microbatches)
    use = f"use --microbatches={fits[0]}" if fits else more
    refuse_first((
        (asked and rows % asked, f"--microbatches={asked} does not divide the {rows} rows of a rank; {use}"),
        (asked and number != asked, f"--microbatches={asked} of --micro_batch={cfg.micro_batch} rows are not the {rows} rows of a rank; "
         "leave one of them out"),
        (number < enough, f"{number} micro-batches of a rank are fewer than the {enough} that --pp={pp} with --pp_schedule={schedule} "
         f"needs; {use}"),
        (uneven(number), f"{number} micro-batches do not come in rounds of one length, as --pp_schedule={schedule} needs; {use}"),
    ))


def refuse_first(table):
    for wrong, message in table:
        if wrong:
            raise UsageError(message)


# ---- Reductions (one number from all ranks) ----

def all_sum(group, tensor):
    """Sum over the ranks of a group (a World is one), in place; the identity at size one."""
    if group.size > 1:
        td.all_reduce(tensor, group=group.pg)
    return tensor


def all_max(group, tensor):
    """The same, the largest of each element."""
    if group.size > 1:
        td.all_reduce(tensor, td.ReduceOp.MAX, group=group.pg)
    return tensor


def all_texts(world, text, device=None):
    """The texts of all ranks (of a World, or of a Group with its device), on every rank."""
    if world.size == 1:
        return [text]
    device = device or world.device
    raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = torch.zeros(world.size, dtype=torch.long)
    sizes[world.rank] = len(raw)
    longest = int(all_sum(world, sizes.to(device)).max())
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[:len(raw)] = raw
    every = MOVES["gather"](mine.to(device), world.rank, world.size, world.name, 0)
    return [bytes(row).rstrip(b"\0").decode() for row in every.view(world.size, longest).tolist()]


def from_main(world, text):
    """Rank 0's text, on every rank."""
    return all_texts(world, text if world.main else "")[0]


def agree(world, what, text, device=None):
    """Refuse to go on where ranks were told different things, and name them."""
    texts = all_texts(world, text, device)
    apart = next((rank for rank, other in enumerate(texts) if other != texts[0]), None)
    if apart is not None:
        only = lambda one, other: " ".join(word for word in one.split() if word not in other.split()) or "nothing of it"
        raise UsageError(f"{what} differ between ranks: rank {world.ranks[apart]} has {only(texts[apart], texts[0])}, rank {world.ranks[0]} "
                         f"{only(texts[0], texts[apart])}; "
                         "start all ranks with the same command and the same files")


def lock(world, folder):
    """Keep other runs out of `folder` for as long as this process lives and holds on to what is returned. All ranks learn whether the main
    one could."""
    refusal, held = "", None
    if world.main:
        os.makedirs(folder, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refusal = f"another process is training into {folder}; wait for it, stop it, or choose another --out_dir"
    if refusal := from_main(world, refusal):
        raise UsageError(refusal)
    return held


def barrier(world):
    if world.size > 1:
        td.barrier()


# ---- Collectives of the layers (what crosses the network inside forward and backward) ----

# Each is a move of a tensor and the move that its gradient makes on the way back. A sum that every rank goes on with the same way has
# the whole gradient on every rank already, so "sum" goes back as "keep"; a copy that every rank uses for a part of the work has partial
# gradients, so "keep" goes back as "sum".                                                     [Megatron sec 3] [SP sec 4.2.2]

all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor            # as they are called before torch 2.13
reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor
MOVES = {
    "keep": lambda x, rank, size, name, dim: x.view_as(x),
    "sum": lambda x, rank, size, name, dim: funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", name)),
    "gather": lambda x, rank, size, name, dim: funcol.wait_tensor(all_gather(x.contiguous(), dim, name)),
    "scatter": lambda x, rank, size, name, dim: funcol.wait_tensor(reduce_scatter(x.contiguous(), "sum", dim, name)),
    "cut": lambda x, rank, size, name, dim: x.narrow(dim, rank * (x.shape[dim] // size), x.shape[dim] // size).contiguous(),
}


class Move(torch.autograd.Function):
    """One move forward, another for the gradient."""
    @staticmethod
    def forward(ctx, x, there, back, rank, size, name, dim):
        ctx.back, ctx.where = back, (rank, size, name, dim)
        return MOVES[there](x, rank, size, name, dim)

    @staticmethod
    def backward(ctx, grad):
        return MOVES[ctx.back](grad, *ctx.where), None, None, None, None, None, None


def move(x, group, there, back, dim=0):
    """MOVES[there], whose gradient does MOVES[back]; the identity at size one. TORCH_DISTRIBUTED_DEBUG=DETAIL has torch compare what ranks
    reduce before it does; this is for what they gather and scatter."""
    if group.size == 1:
        return x
    if not torch.compiler.is_compiling() and os.environ.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL":
        agree(group, "tensors of a collective", f"{there} {str(x.dtype)[6:]}[{','.join(map(str, x.shape))}]", x.device)
    return Move.apply(x, there, back, group.rank, group.size, group.name, dim)


def padded(x, size, dim=1):
    """x, lengthened by zeros so that `size` divides its dimension `dim`."""
    more = -x.shape[dim] % size
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, more)) if more else x


def enter(x_BTD, world, T):
    """What a sublayer reads, whose ranks hold a part of its weights each: all T places of the stream."""
    if not world.sp:
        return move(x_BTD, world.tp, "keep", "sum")
    return move(x_BTD, world.tp, "gather", "scatter", 1)[:, :T]


def leave(y_BTD, world):
    """The sum of what the parts of a sublayer gave, as the stream holds it: with sp a part of the places."""
    if not world.sp:
        return move(y_BTD, world.tp, "sum", "keep")
    return move(padded(y_BTD, world.tp.size), world.tp, "scatter", "gather", 1)


def of_stream(t_BT, world):
    """The part of t that belongs to the places which this rank's stream holds."""
    return MOVES["cut"](padded(t_BT, world.tp.size), world.tp.rank, world.tp.size, "", 1) if world.sp else t_BT


def bounds(n, group):
    """[start, stop) of this rank's part of n things; the parts differ by one at most."""
    return n * group.rank // group.size, n * (group.rank + 1) // group.size


def row_places(T, cp, zigzag, rank=None):
    """Places of a row that a rank of cp holds [T / cp]: a run of them or, zigzag, a run from its first half and its mirror image from the
    second, so that under a causal mask all ranks have as much to do.                                               [Llama3 sec 3.3.2]"""
    rank = cp.rank if rank is None else rank
    if cp.size == 1:
        return torch.arange(T)
    if not zigzag:
        return torch.arange(T).view(cp.size, -1)[rank]
    return torch.arange(T).view(2 * cp.size, -1)[[rank, 2 * cp.size - 1 - rank]].flatten()


class Exchange(torch.autograd.Function):
    """All-to-all of rows: the first sent[0] go to rank 0, and so on; back the same way."""
    @staticmethod
    def forward(ctx, x, sent, received, name):
        ctx.how = received, sent, name
        return funcol.wait_tensor(funcol.all_to_all_single(x.contiguous(), received, sent, name))

    @staticmethod
    def backward(ctx, grad):
        received, sent, name = ctx.how
        return funcol.wait_tensor(funcol.all_to_all_single(grad.contiguous(), sent, received, name)), None, None, None


def swap(x, group, cut, join):
    """x cut along one dimension and joined along another, part r from and to rank r.                            [Ulysses sec 3.1]"""
    if group.size == 1:
        return x
    parts = torch.stack(x.chunk(group.size, cut)).flatten(0, 1)
    even = [parts.shape[0] // group.size] * group.size
    return torch.cat(Exchange.apply(parts, even, even, group.name).chunk(group.size), join)


def to_owners(x_VD, count_E, group):
    """Rows sorted by expert, sent to the ranks that own the experts. Returns the rows that came, grouped by sender and in there by expert;
    their counts [senders, own experts]; and the way back for rows in this order."""
    count_NE = count_E.view(group.size, -1)
    came_NE = funcol.wait_tensor(funcol.all_to_all_single(count_NE.contiguous(), None, None, group.name))
    sent, received = torch.stack([count_NE.sum(1), came_NE.sum(1)]).tolist()
    return Exchange.apply(x_VD, sent, received, group.name), came_NE, lambda y_VD: Exchange.apply(y_VD, received, sent, group.name)


def vocab_parallel_cross_entropy(x_MD, w_VD, targets_M, weights_M, bias_V=None, softcap=0.0, z_alpha=0.0, smoothing=0.0, n_vocab=0,
                                 tp=ALONE):
    """kernels.linear_cross_entropy where each rank of tp has the head's rows of some ids: (sum of weights * loss, nll [M], detached). A
    maximum, a sum and the target's logit of every row cross the network, never the logits.                  [Megatron sec 3]"""
    low, high = bounds(n_vocab, tp)
    total = lambda t: move(t, tp, "sum", "keep")

    def some(x_CD, target_C, weight_C):
        wide = torch.promote_types(x_CD.dtype, torch.float32)
        l_CV = F.linear(x_CD, w_VD.to(x_CD.dtype), None if bias_V is None else bias_V.to(x_CD.dtype)).to(wide)
        if softcap:
            l_CV = softcap * torch.tanh(l_CV / softcap)
        top_C = all_max(tp, l_CV.detach().amax(1))
        log_z_C = total((l_CV - top_C[:, None]).exp().sum(1)).log() + top_C
        here_C, counted_C = (target_C >= low) & (target_C < high), target_C >= 0
        own_C = l_CV.gather(1, (target_C - low).clamp(0, high - low - 1)[:, None])[:, 0] * here_C
        nll_C = loss_C = (log_z_C - total(own_C)) * counted_C
        if smoothing:
            loss_C = (1 - smoothing) * nll_C + smoothing * (log_z_C - total(l_CV.sum(1)) / n_vocab) * counted_C
        if z_alpha:
            loss_C = loss_C + z_alpha * log_z_C.square() * counted_C
        return (loss_C * weight_C.to(wide)).sum(), nll_C.detach()

    x_MD = to_autocast(x_MD)
    rows = max(256, (32 << 20) // (4 * (high - low)))            # logits of so many rows at a time; of more than one lot they are made again
    lots = [t.split(rows) for t in (x_MD, targets_M.long(), weights_M)]
    run = some if len(x_MD) <= rows or not torch.is_grad_enabled() else lambda *lot: checkpoint(some, *lot, use_reentrant=False)
    losses, nlls = zip(*(run(*lot) for lot in zip(*lots)))
    return sum(losses), torch.cat(nlls)


# ---- Cuts and pieces (which part of a tensor is here?) ----

@dataclass(frozen=True)
class Cut:
    """A group's ranks hold a part of dimension `dim` each, of every one of the `parts` that it comes in, in whole units of which a part has
    `units` (0: numbers); with dim None the first rank holds all and the others nothing."""
    dim: int
    group: Group
    parts: int = 1
    units: int = 0


def pieces(shape, cuts):
    """[[(start, stop) of every dimension]]: the boxes of the whole that this rank holds, one after the other along the first dimension."""
    boxes = [[(0, n) for n in shape]]
    for cut in cuts:
        if cut.dim is None:
            boxes = boxes if cut.group.rank == 0 else []
            continue
        each = shape[cut.dim] // cut.parts
        low, high = (end * each // (cut.units or each) for end in bounds(cut.units or each, cut.group))
        parts = [[(part * each + low, part * each + high)] for part in range(cut.parts)]
        boxes = [box[:cut.dim] + part + box[cut.dim + 1:] for box in boxes for part in parts]
    return boxes


def cut(tensor, cuts):
    """This rank's part of a whole tensor, a copy; None where it holds nothing."""
    boxes = [tensor[tuple(slice(*ends) for ends in box)] for box in pieces(tensor.shape, cuts)]
    return torch.cat(boxes).clone() if boxes else None


# ---- Engines (one call for a step, whatever the layout) ----

class Part(nn.Module):
    """A model, or a pipeline stage of one, as DDP, FSDP and the schedules call it: Part(**batch), or Part(stream, aux, **batch) where a
    stage came before. A loss goes out as [1], its metrics stay in `said`."""

    def __init__(self, model, number, cast):
        super().__init__()
        self.model, self.number, self.cast, self.said = model, number, cast, []

    def forward(self, *before, **batch):
        with self.cast():
            out = self.model.stage(batch, *before)
        if not self.model.last:
            return out
        self.said.append((out[0].detach().double(), out[1], out[2]))
        return torch.stack([out[0]])                             # a view would lose FSDP's hook


@dataclass
class Share:
    """One parameter as this rank holds it."""
    name: str
    local: nn.Parameter            # a plain tensor, also where FSDP has a DTensor; its gradient is complete after Engine.step
    param: nn.Parameter            # the module's own
    shape: tuple                   # of the whole
    boxes: list                    # [[(start, stop) of every dimension]] of the whole that local holds, one after the other
    copies: int                    # how often this same part is held
    writes: bool                   # is this the one of them that is saved?
    sums: tuple                    # groups over which the gradient is added up after backward


def summed(group, bucket):
    """DDP's reduction: add, do not average."""
    return td.all_reduce(bucket.buffer(), group=group, async_op=True).get_future().then(lambda future: future.value()[0])


def mesh_of(shards, copies, kind):
    """The DeviceMesh that fully_shard wants."""
    from torch.distributed.device_mesh import DeviceMesh         # imported where it is used, here and below: it takes a second
    if copies.size == 1:
        return DeviceMesh.from_group(shards.pg, kind)
    lines = torch.tensor([[a - copies.ranks[copies.rank] + b for b in shards.ranks] for a in copies.ranks])
    return DeviceMesh.from_group([copies.pg, shards.pg], kind, mesh=lines, mesh_dim_names=("copies", "shards"))


def rows_of(boxes, low, high):
    """Of boxes that lie one after the other along the first dimension, rows low ... high - 1."""
    kept, at = [], 0
    for (start, stop), *rest in boxes:
        first, last = max(low - at, 0), min(high - at, stop - start)
        if first < last:
            kept.append([(start + first, start + last), *rest])
        at += stop - start
    return kept


def shard_dim(shape, n):
    """The dimension of which n ranks of FSDP hold a part each: the first, unless it is too short and another divides."""
    return 0 if shape[0] >= n else next((dim for dim, k in enumerate(shape) if k and k % n == 0), 0)


class Engine:
    """A model spread over the ranks. step() leaves the gradients of one optimizer step in shares[i].local.grad; loss() evaluates.

    Gradients are sums: each micro-batch's loss is divided by the weight of the whole step, and DDP and FSDP are told to add."""

    def __init__(self, model, world, cfg, cast=contextlib.nullcontext):
        self.world, self.cfg, self.weight, self.schedule, pp = world, cfg, 1.0, None, world.pp.size
        self.fsdp = cfg.fsdp if world.batch.size > 1 else 0
        table, depth = model.spread(world, cfg.cp_mode), len(model.blocks)
        self.n_stages = pp * PP_SCHEDULES[cfg.pp_schedule][1] if pp > 1 else 1
        self.owner = [stage_owner(number, pp, cfg.pp_schedule) for number in range(self.n_stages)]
        at = [depth * number // self.n_stages for number in range(self.n_stages + 1)]
        stages = [model.part(*at[number:number + 2], number == 0, number == self.n_stages - 1) for number in range(self.n_stages)]
        stages = stages if pp > 1 else [model]
        self.holders = {}                                        # {name of a parameter: stages that have it}
        for number, stage in enumerate(stages):
            for name, _ in stage.named_parameters():
                self.holders.setdefault(name, []).append(number)
        self.parts = [Part(stage if self.fsdp else stage.to(world.device), number, cast)
                      for number, stage in enumerate(stages) if self.owner[number] == world.pp.rank]
        self.calls = [self.wrapped(part) for part in self.parts]
        self.shares = [self.share(part.number, name, p, *table[name]) for part in self.parts for name, p in part.model.named_parameters()]

    @property
    def models(self):
        return [part.model for part in self.parts]

    def wrapped(self, part):
        """DDP or FSDP around a part, where there is anybody to share the rows of the batch with."""
        world = self.world
        if world.batch.size == 1:
            return part
        if self.fsdp:
            return self.fully_sharded(part)
        experts = [f"model.{name}" for name, _ in part.model.named_parameters() if world.ep.size > 1 and ".mlp.experts." in name]
        DDP._set_params_and_buffers_to_ignore_for_model(part, experts)           # they have fewer copies: see share
        warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)        # its successor is not in torch 2.11
        call = DDP(part, device_ids=[world.device.index] if world.device.type == "cuda" else None, process_group=world.batch.pg,
                   broadcast_buffers=False, gradient_as_bucket_view=True)
        call.register_comm_hook(world.batch.pg, summed)
        return call

    def fully_sharded(self, part):
        """A unit for every block, in it one for experts that ep deals out, and one for the rest. A pipeline stage stays gathered for a step:
        it would gather for every micro-batch, and backward in two parts looks for gathered weights.                [FSDP sec 3]"""
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        world, units = self.world, []
        mesh = mesh_of(world.shards, world.copies, world.device.type)

        def unit(module, mesh, shards, whole=self.fsdp == 3 and self.n_stages == 1):
            units.append(fully_shard(module, mesh=mesh, reshard_after_forward=whole,
                                     shard_placement_fn=lambda p: Shard(shard_dim(p.shape, shards.size))))
        blocks = [*part.model.enc_blocks.children(), *part.model.blocks.children(), *(module.block for module in part.model.mtp)]
        for block in blocks:
            if world.ep.size > 1 and hasattr(block.mlp, "experts"):
                unit(block.mlp.experts, mesh_of(world.expert_copies, ALONE, world.device.type), world.expert_copies)
            unit(block, mesh, world.shards)
        unit(part, mesh, world.shards, False)
        for module in units:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        return part

    def share(self, number, name, p, shape, cuts, partial):
        """What this rank holds of a parameter, how many hold the same, and who adds up its gradient."""
        world, owners, expert = self.world, self.holders[name], self.world.ep.size > 1 and ".mlp.experts." in name
        held, local, sums = pieces(shape, cuts), p, [world.tp] * partial
        same = world.expert_copies if expert else world.batch
        if self.fsdp:
            shards, same = (world.expert_copies, ALONE) if expert else (world.shards, world.copies)
            dim, local = p.placements[-1].dim, nn.Parameter(p._local_tensor)
            each = -(-p.shape[dim] // shards.size)
            low, high = each * shards.rank, each * (shards.rank + 1)
            held = rows_of(held, low, high) if dim == 0 else [
                box[:dim] + [(box[dim][0] + low, box[dim][0] + high)] + box[dim + 1:] for box in held]
        elif expert:
            sums.append(world.expert_copies)
        writes, copies = same.rank == 0 and number == owners[0], same.size * len(owners)
        if not any(cut.group is world.tp for cut in cuts):
            writes, copies = writes and world.tp.rank == 0, copies * world.tp.size
        return Share(name, local, p, shape, held, copies, writes, tuple(sums))

    def train(self, mode=True):
        for model in self.models:
            model.train(mode)

    # -- what is here

    def named(self):
        """(name, plain parameter of this rank), as an optimizer wants them."""
        return [(share.name, share.local) for share in self.shares]

    def held_like(self, share, tensor):
        """A tensor that lies as a share does: the parameter, or a state of its optimizer."""
        placed, at = [], 0
        for box in share.boxes:
            size = tuple(stop - start for start, stop in box)
            placed.append((tuple(start for start, _ in box), (at,) + (0,) * (len(box) - 1), size))
            at += size[0]
        return Held(tensor, share.shape, placed, share.writes)

    def held(self):
        """{name: Held} of parameters and buffers."""
        first = self.world.batch.rank == self.world.tp.rank == 0
        held = {}
        for model in self.models:
            own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
            held |= {name: Held.whole(t, first) for name, t in model.state_dict().items() if name not in own}
        return held | {share.name: self.held_like(share, share.param.detach() if not self.fsdp else share.param._local_tensor)
                       for share in reversed(self.shares)}       # of a weight that two stages here have, the first

    def on_main(self, most=1 << 30):
        """The model in one piece, ready to generate: on the main rank, None on the others. It is put together where it is in parts, unless
        it has more than `most` parameters."""
        world, here = self.world, self.models[0]
        if world.size == world.dp.size and not self.fsdp and world.ep.size == 1:
            return here if world.main else None
        boxes = [(share.name, share.shape, share.boxes, share.param._local_tensor if self.fsdp else share.param.detach())
                 for share in self.shares if share.writes]
        total = all_sum(world, torch.tensor(float(sum(t.numel() for *_, t in boxes)), device=world.device)).item()
        if total > most:
            return None
        others = [(name, t.shape, [[(0, n) for n in t.shape]], t) for model in self.models for name, t in model.state_dict().items()
                  if name in dict(model.named_buffers())]
        boxes, every = boxes + others * (world.batch.rank == world.tp.rank == 0), [None] * world.size if world.main else None
        td.gather_object([(name, tuple(shape), own, t.cpu()) for name, shape, own, t in boxes], every)
        if not world.main:
            return None
        with torch.device("meta"):
            whole = type(here)(here.cfg)
        whole.to_empty(device=world.device)
        for buffer in whole.buffers():
            buffer.zero_()
        goals = whole.state_dict()
        for name, shape, own, t in (one for some in every for one in some):
            at = 0
            for box in own:
                size = box[0][1] - box[0][0] if box else 0
                goals[name][tuple(slice(*ends) for ends in box)].copy_(t[at:at + size] if box else t)
                at += size
        return whole

    # -- a step

    def step(self, batches, weight):
        """Gradients of these micro-batches for a loss divided by `weight`, that of all ranks' together. -> (the loss times that, {metric:
        [sum, weight]}), as far as they are this rank's to report."""
        self.weight = weight
        if self.n_stages > 1:
            whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            self.pipeline(batches).step(target=whole["targets"], **to_device(whole, self.world.device))
        else:
            for i, batch in enumerate(batches):
                with self.accumulating(last=i == len(batches) - 1):
                    (self.calls[0](**to_device(batch, self.world.device)) / weight).sum().backward()
        self.add_up()
        return self.reported()

    def accumulating(self, last):
        """Context of a micro-batch: gradients cross the network only with the last one of a step."""
        call = self.calls[0]
        if self.fsdp:
            call.set_requires_gradient_sync(last)
            call.set_reshard_after_backward(last or self.fsdp == 3)
        return call.no_sync() if isinstance(call, DDP) and not last else contextlib.nullcontext()

    def reported(self):
        """(sum of losses, {metric: [sum, weight]}) since the last call, of the ranks that know them: zero on the others."""
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        said = {name: loss.new_zeros(2) for name in self.models[0].metric_names}
        for part in self.parts:
            for loss_sum, _, metrics in part.said:
                loss += loss_sum
                said |= {name: said[name] + pair.double() for name, pair in metrics.items()}
            part.said.clear()
        mine = self.world.tp.rank == 0
        return loss * mine, {name: pair * mine for name, pair in said.items()}

    def add_up(self):
        """Complete the gradients: over stages that have the same weight, and over the groups of Share.sums."""
        tied, groups = {}, {}
        for share in self.shares:
            if self.fsdp:
                share.local.data = share.param._local_tensor
            grad = share.param.grad
            share.local.grad = getattr(grad, "_local_tensor", grad)
            if share.local.grad is None and (share.sums or len(self.holders[share.name]) > 1):
                share.local.grad = torch.zeros_like(share.local)
            for group in share.sums:
                groups.setdefault(group, []).append(share.local.grad)
            if len(self.holders[share.name]) > 1:
                tied.setdefault(share.name, []).append(share.local.grad)
        for name, (first, *others) in tied.items():
            for other in others:
                first += other
            ranks = {self.owner[number] for number in self.holders[name]}
            if len(ranks) > 1:
                all_sum(self.world.pp if len(ranks) == self.world.pp.size else self.world.ends, first)
            for other in others:
                other.copy_(first)
        for group, grads in groups.items():
            flat = all_sum(group, torch.cat([grad.flatten() for grad in grads]))
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(part.view_as(grad))

    def zero_grad(self):
        for share in self.shares:
            share.local.grad = share.param.grad = None

    @torch.no_grad()
    def clip_grad(self, limit):
        """Norm of the whole gradient, scaled down to `limit` (0: it stays). Exact on every layout: each rank adds the squares of its parts,
        over the number of those that hold the same."""
        shares = [share for share in self.shares if share.local.grad is not None and share.local.numel()]
        norms = torch._foreach_norm([share.local.grad for share in shares])
        squares = torch.stack([norm.double().square() / share.copies for norm, share in zip(norms, shares)]).sum()
        norm = all_sum(self.world, squares).sqrt()
        if limit and math.isfinite(norm):
            torch._foreach_mul_([share.local.grad for share in shares], (limit / (norm + 1e-6)).clamp(max=1.0).to(norms[0].dtype))
        return norm

    # -- pipeline

    def pipeline(self, batches):
        """torch's schedule, made when the shapes are known."""
        if self.schedule is None:
            from torch.distributed.pipelining import PipelineStage, schedules
            name, each, _ = PP_SCHEDULES[self.cfg.pp_schedule]
            stages = []
            for part, call in zip(self.parts, self.calls):
                between = tuple(torch.empty(shape, device="meta", requires_grad=True) for shape in self.between(batches[0]))
                out = torch.empty(1, device="meta", requires_grad=True)
                stages.append(PipelineStage(call, part.number, self.n_stages, self.world.device, input_args=between if part.number else (),
                                            output_args=out if part.model.last else between, group=self.world.pp.pg))
            self.schedule = getattr(schedules, name)(stages if each > 1 else stages[0], len(batches), scale_grads=False,
                                                     loss_fn=lambda out, target: (out / self.weight).sum())
        return self.schedule

    def between(self, batch):
        """Shapes of what stages hand on: the stream and the auxiliary losses."""
        B, T = batch["tokens"].shape
        T = T // self.world.cp.size
        return (B, -(-T // self.world.tp.size) if self.world.sp else T, self.cfg.n_embd), (1,)

    @torch.no_grad()
    def loss(self, batch):
        """(sum of weights * nll, sum of weights) of a batch without gradients, of this rank alone; stage after stage."""
        batch, out = to_device(batch, self.world.device), ()
        for number in range(self.n_stages):
            part = next((part for part in self.parts if part.number == number), None)
            if part is None:
                continue
            if number and self.owner[number - 1] != self.world.pp.rank:
                out = tuple(torch.empty(shape, device=self.world.device) for shape in self.between(batch))
                for t in out:
                    td.recv(t, self.world.pp.ranks[self.owner[number - 1]], group=self.world.pp.pg)
            out = part(*out, **batch)
            if not part.model.last and self.owner[number + 1] != self.world.pp.rank:
                for t in out:
                    td.send(t.contiguous(), self.world.pp.ranks[self.owner[number + 1]], group=self.world.pp.pg)
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for part in self.parts:
            for loss, weight, _ in part.said:
                total += torch.stack([loss, weight.double()])
            part.said.clear()
        return total * (self.world.tp.rank == 0)


def to_device(batch, device):
    if device.type == "cuda":
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}
    return batch


# ---- safetensors (8 bytes of length, a JSON header, raw tensors) ----

SAFE = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
SAFE_TYPES = {name: dtype for dtype, name in SAFE.items()}


STRANGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)          # what JSON of the wrong form leads to


def whole_numbers(values):
    """A list from a file as a tuple that can be a shape or a place, or ValueError."""
    if not (isinstance(values, list) and all(type(n) is int and n >= 0 for n in values) and math.prod(max(1, n) for n in values) < 2**62):
        raise ValueError(f"{str(values)[:80]} is not a list of sizes")
    return tuple(values)


def raw_bytes(tensor):
    """The memory of a tensor as a flat uint8 array, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor}; returns the sha256 of the file."""
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=SAFE[tensor.dtype], shape=list(tensor.shape), data_offsets=[offset, offset + size])
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)                              # tensors begin on a multiple of 8 bytes
    digest = hashlib.sha256(len(head).to_bytes(8, "little") + head)
    with ThreadPoolExecutor(1) as beside, atomic_write(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in (t for t in tensors.values() if t.numel()):
            block = raw_bytes(t)
            hashed = beside.submit(digest.update, block)         # while it is written and synced: both let go of Python's lock
            file.write(block)
            if block.ctypes.data != t.data_ptr():                # a copy: one of them at a time
                hashed.result()
    return digest.hexdigest()


def read_safetensors(path):
    """{name: tensor} over one memory map (copy before writing). A file that is not whole is refused by name."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"the header claims {length:,} bytes of a file of {size:,}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data = np.memmap(path, dtype=np.uint8, mode="c", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
        tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            dtype, count = SAFE_TYPES[entry["dtype"]], math.prod(whole_numbers(entry["shape"]))
            if not 0 <= start <= stop <= len(data) or stop - start != count * dtype.itemsize:
                raise ValueError(f"tensor {name} wants bytes {start:,} to {stop:,} of {len(data):,}: the file was cut short")
            flat = torch.from_numpy(data[start:stop])
            if (8 + length + start) % dtype.itemsize:            # foreign files may start anywhere
                flat = flat.clone()
            tensors[name] = flat.view(dtype).reshape(entry["shape"])
    except STRANGE as error:
        raise UsageError(f"{path} is not a whole safetensors file ({error}); copy or save it again") from None
    return tensors


# ---- Checkpoints (a folder that is either whole or not there) ----

@dataclass
class Held:
    """What this rank holds of one tensor: boxes of it, each with as many numbers as the tensor has axes."""
    local: torch.Tensor            # the memory they lie in
    shape: tuple                   # of the whole tensor
    pieces: list                   # [(place, offset, size)]: whole[place : place + size] is local[offset : offset + size]
    writes: bool = True            # exactly one of the ranks that hold the same copy writes it

    @classmethod
    def whole(cls, tensor, writes=True):
        shape, origin = tuple(tensor.shape), (0,) * tensor.ndim
        return cls(tensor, shape, [(origin, origin, shape)], writes)

    def views(self):
        """(place, size, view of local) of every piece with anything in it."""
        for place, offset, size in self.pieces:
            if not (_inside(place, size, self.shape) and _inside(offset, size, self.local.shape)):
                raise UsageError(f"a piece of size {tuple(size)} at {tuple(place)} of a tensor {tuple(self.shape)} is said to lie at "
                                 f"{tuple(offset)} of a local one {tuple(self.local.shape)}; it must lie inside both")
            if 0 not in size:
                yield tuple(place), tuple(size), self.local.detach()[_box(offset, size)]


def _box(place, size):
    return tuple(slice(p, p + n) for p, n in zip(place, size))


def _inside(place, size, shape):
    return len(place) == len(size) == len(shape) and all(0 <= p <= p + n <= whole for p, n, whole in zip(place, size, shape))


def _fills(shape, boxes):
    """Do the boxes [(place, size)] hold every element of the shape exactly once?"""
    if any(0 in size or not _inside(place, size, shape) for place, size in boxes):
        return False
    if len(boxes) < 2 or sum(math.prod(size) for _, size in boxes) != math.prod(shape):
        return sum(math.prod(size) for _, size in boxes) == math.prod(shape)
    start, size = (np.array(column) for column in zip(*sorted(boxes)))
    stop = start + size
    ahead = np.searchsorted(start[:, 0], stop[:, 0])             # only those that begin before box i ends can meet it
    return not any(((start[i + 1:j] < stop[i]) & (stop[i + 1:j] > start[i])).all(1).any() for i, j in enumerate(ahead) if j > i + 1)


def _first_said(world, text):
    """The text of the first rank that has any to say, on every rank."""
    if world.size == 1:
        return text
    box, raw = torch.zeros(world.size, 1000, dtype=torch.uint8), text.encode()[:1000]
    box[world.rank, :len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    rows = all_sum(world, box.to(world.device)).cpu().numpy()
    return next((said for row in rows if (said := row.tobytes().rstrip(b"\0").decode(errors="ignore"))), "")


_SAVING = []                       # the save in the background, if there is one: (thread, world, [what went wrong])
_COPIES = {}                       # the memory of its tensors, used again by the next


def save_checkpoint(folder, step, held, state, keep=2, world=World(), background=False, timeout=600):
    """Write folder/step_XXXXXXXX (a shard of every rank that writes anything, manifest.json) and point folder/latest at it.

    held: {global name: Held, or a tensor that rank 0 writes whole}; state: JSON (step, data position, configuration). Every
    rank calls it, with what it holds and the same step and state; all share one file system. The new folder is complete and
    synced before its rename and before any older one is deleted; `keep` of them stay. Where a rank cannot write (a full disk),
    or has not after `timeout` seconds, every rank raises OSError and the older ones are as they were. In the background, all
    that is waited for is a copy of the tensors to CPU memory; saving() waits for the rest."""
    saving()
    table, tensors = _own_part(held, world)
    state = json.loads(json.dumps(state))                        # as it is now
    if background:
        tensors = _copied(tensors)
    with _peers():
        temp = Path(folder) / f".saving-{from_main(world, uuid.uuid4().hex)}"        # one name on all ranks, never used before
    job, wrong = (temp, step, table, tensors, state, keep, world, timeout), []
    if not background:
        return _agree(world, _write(*job))
    _SAVING.append((threading.Thread(target=lambda: wrong.append(_write(*job)), daemon=True), world, wrong))
    _SAVING[0][0].start()


def saving():
    """Wait for the save in the background, if there is one; its OSError is raised here, on every rank."""
    if _SAVING:
        thread, world, wrong = _SAVING.pop()
        thread.join()
        _agree(world, wrong[0])


def _agree(world, error):
    """Raise on every rank what went wrong on any."""
    with _peers():
        said = _first_said(world, _reason(world, error) if error else "")
    if error or said:
        raise error or OSError(errno.EIO, said)


def _reason(world, error):
    said = getattr(error, "strerror", None) or str(error)
    return said if said.startswith("rank ") else f"rank {world.rank}: {said}"


@contextlib.contextmanager
def _peers():
    """A rank that died reads as an OSError, like all else that keeps a save from its end."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(errno.ECONNRESET, "another rank is gone") from error


def _own_part(held, world):
    """({name: its dtype, shape and the pieces this rank writes}, {key in this rank's shard: tensor})."""
    table, tensors = {}, {}
    for name, h in held.items():
        h, pieces = h if isinstance(h, Held) else Held.whole(h, writes=world.main), []
        if h.local.dtype not in SAFE:
            raise UsageError(f"tensor {name} is {h.local.dtype}, which a safetensors file cannot hold; use one of {list(SAFE)}")
        for place, size, view in h.views() if h.writes else ():
            key = name if size == tuple(h.shape) else f"{name}@{','.join(map(str, place))}"
            if key in tensors:
                raise UsageError(f"rank {world.rank} holds {key} twice; every element is written once")
            tensors[key] = view
            pieces.append(dict(file=f"shard_{world.rank:05d}.safetensors", key=key, place=place, size=size))
        table[name] = dict(dtype=SAFE[h.local.dtype], shape=tuple(h.shape), pieces=pieces)
    return table, tensors


def _copied(tensors):
    """The tensors in CPU memory of our own (pinned for a GPU's), the same memory from save to save."""
    for key in [key for key, c in _COPIES.items() if key not in tensors or (c.shape, c.dtype) != (tensors[key].shape, tensors[key].dtype)]:
        del _COPIES[key]
    for key, t in tensors.items():
        if key not in _COPIES:
            _COPIES[key] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        _COPIES[key].copy_(t, non_blocking=True)
    if any(t.is_cuda for t in tensors.values()):
        torch.cuda.synchronize()
    return {key: _COPIES[key] for key in tensors}


def _write(temp, step, table, tensors, state, keep, world, timeout):
    """A rank's part of a save, and on rank 0 the rest of it. Without collectives, so that any thread may run it: ranks leave
    notes for rank 0 in the folder. Returns what went wrong, or None."""
    error, shard, note = None, temp / f"shard_{world.rank:05d}.safetensors", temp / f"rank_{world.rank:05d}.json"
    try:
        if world.main:                                           # what a process that was killed while saving left
            for stale in {*temp.parent.glob(".saving-*"), *temp.parent.glob(".latest.*.tmp")} - {temp}:
                shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)
        temp.mkdir(parents=True, exist_ok=True)
        files = {shard.name: dict(sha256=write_safetensors(shard, tensors), bytes=os.path.getsize(shard))} if tensors else {}
        with atomic_write(note, "w") as file:
            file.write(json.dumps(dict(files=files, tensors=table)))
    except Exception as failure:
        error = failure
        with contextlib.suppress(OSError):                       # without a note, rank 0 learns it from the clock
            shard.unlink(missing_ok=True)                        # room for the note
            note.write_text(_reason(world, error), encoding="utf-8")
    if world.main:
        try:
            notes = _notes(temp, range(1 if error else 0, world.size), timeout)
            if not error:
                _complete(temp, step, notes, state, keep)
        except Exception as failure:
            error = error or failure
        shutil.rmtree(temp, ignore_errors=True)
    return error


def _notes(temp, ranks, timeout):
    """What the ranks wrote of their parts, once all have; OSError with the reason where one of them failed."""
    end, names = time.monotonic() + timeout, [f"rank_{rank:05d}.json" for rank in ranks]
    while missing := set(names) - set(os.listdir(temp)):
        if time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, f"no {', '.join(sorted(missing))[:300]} after {timeout} s: a rank is gone, or too slow")
        time.sleep(0.01)
    for name in names:
        text = (temp / name).read_text(encoding="utf-8", errors="replace")
        if not text.startswith("{"):
            raise OSError(errno.EIO, text or f"{name} is empty: that rank could not even write why")
    return [json.loads((temp / name).read_text(encoding="utf-8")) for name in names]


def _complete(temp, step, notes, state, keep):
    """All shards are on disk: merge the notes into the manifest, give the folder its name, let old ones go."""
    files, table = {}, {}
    for note in notes:
        files |= note["files"]
        for name, entry in note["tensors"].items():
            whole = table.setdefault(name, entry | dict(pieces=[]))
            if (whole["dtype"], whole["shape"]) != (entry["dtype"], entry["shape"]):
                raise UsageError(f"tensor {name}: {whole['dtype']} {whole['shape']} on one rank, "
                                 f"{entry['dtype']} {entry['shape']} on another")
            whole["pieces"] += entry["pieces"]
    for name, entry in table.items():
        if not _fills(entry["shape"], [(piece["place"], piece["size"]) for piece in entry["pieces"]]):
            raise UsageError(f"tensor {name} {entry['shape']}: the pieces that ranks write do not hold every element exactly once")
    for note in temp.glob("rank_*.json"):
        note.unlink()
    manifest = dict(format=2, step=step, state=state, files=files, tensors=table)
    with atomic_write(temp / "manifest.json", "w") as file:
        file.write(json.dumps(manifest | {"sha256": _own_hash(manifest)}))
    folder, final = temp.parent, temp.parent / f"step_{step:08d}"
    if final.exists():                                           # a damaged one of this step, passed over when resuming
        _discard(final)
    os.rename(temp, final)
    sync_folder(folder)
    with atomic_write(folder / "latest", "w") as file:
        file.write(final.name)
    found = checkpoints(folder)
    for old in found[:found.index(final) + 1][:-keep]:           # never this one for the sake of damaged ones after it
        _discard(old)


def _discard(path):
    """Delete a checkpoint under another name, so that a kill half-way leaves no folder that looks like one."""
    doomed = path.with_name(f".saving-old-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _own_hash(manifest):
    """sha256 over a manifest without its own entry, so that no byte of it can change unseen."""
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True).encode()).hexdigest()


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checkpoints(folder):
    """Checkpoint folders, oldest first."""
    return sorted(p for p in Path(folder).glob("step_*") if p.is_dir())


@dataclass
class Saved:
    """A checkpoint that was found good. Its tensors stay in their files until they are asked for."""
    path: Path
    step: int
    state: dict
    table: dict                    # {name: dtype, shape, pieces: [{file, key, place, size}]}
    files: dict                    # {file: {key: tensor over a memory map}}

    def whole(self, name):
        """One tensor, all of it: the memory map itself where one piece is all (copy before writing)."""
        entry = self._entry(name)
        if len(entry["pieces"]) == 1:
            return self.files[entry["pieces"][0]["file"]][entry["pieces"][0]["key"]]
        whole = torch.empty(entry["shape"], dtype=SAFE_TYPES[entry["dtype"]])
        self.fill(name, Held.whole(whole))
        return whole

    def fill(self, name, held):
        """Copy into held.local, in its dtype, what it holds of the tensor, from wherever the pieces lie now."""
        entry = self._entry(name)
        if tuple(entry["shape"]) != tuple(held.shape):
            raise UsageError(f"{self.path}: tensor {name} is {entry['shape']} there and {list(held.shape)} here: another model's")
        for place, size, view in held.views():
            missing = view.numel()
            for piece in entry["pieces"]:
                low = [max(p, q) for p, q in zip(place, piece["place"])]
                both = [min(p + n, q + m) - at for p, n, q, m, at in zip(place, size, piece["place"], piece["size"], low)]
                if all(n > 0 for n in both):
                    there = _box([at - q for at, q in zip(low, piece["place"])], both)
                    view[_box([at - p for at, p in zip(low, place)], both)].copy_(self.files[piece["file"]][piece["key"]][there])
                    missing -= math.prod(both)
            if missing:
                raise UsageError(f"{self.path}: {missing:,} elements of tensor {name} are in none of its files")

    def _entry(self, name):
        if name not in self.table:
            raise UsageError(f"{self.path} has no tensor {name}: it is another model's")
        return self.table[name]


def _must(fact, text):
    if not fact:
        raise ValueError(text)


def _plain(file):
    """The file, or where it would be one: a link could lead anywhere, and a pipe would never end."""
    _must(not file.is_symlink() and (file.is_file() or not file.exists()), f"{file.name} is not a plain file")
    return file


def _read_manifest(path):
    text = _plain(path / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    _must(manifest["format"] == 2, f"its format is {manifest['format']!r}, and this reads 2")
    _must(manifest["sha256"] == _own_hash(manifest) and text == json.dumps(manifest), "it was changed or damaged: its sha256 differs")
    _must([type(manifest[key]) for key in ("step", "state", "files", "tensors")] == [int, dict, dict, dict], "an entry has a strange type")
    return manifest


def _open_files(path, manifest, world):
    """{file: {key: tensor}}: every rank looks at every file and hashes its share of them; then what the table says of them."""
    files = {}
    for number, (name, want) in enumerate(manifest["files"].items()):
        _must(re.fullmatch(r"shard_[0-9]{5,9}\.safetensors", name), f"its manifest names a file outside its folder or kind: {name[:80]!r}")
        size = os.path.getsize(_plain(path / name))
        _must(size == want["bytes"], f"{name} is damaged: {size:,} bytes, the manifest says {want['bytes']}")
        have = file_hash(path / name) if number % world.size == world.rank else want["sha256"]
        _must(have == want["sha256"], f"{name} is damaged: sha256 {have[:12]}..., the manifest says {want['sha256'][:12]}...")
        files[name] = read_safetensors(path / name)
    keys = []
    for name, entry in manifest["tensors"].items():              # what a piece claims, its file has: nothing is larger than the files
        boxes = []
        for piece in entry["pieces"]:
            t = files[piece["file"]][piece["key"]]
            _must((SAFE[t.dtype], t.shape) == (entry["dtype"], whole_numbers(piece["size"])), f"{piece['file']} has another {name[:80]!r}")
            boxes.append((whole_numbers(piece["place"]), tuple(t.shape)))
            keys.append((piece["file"], piece["key"]))
        _must(entry["dtype"] in SAFE_TYPES and _fills(whole_numbers(entry["shape"]), boxes), f"pieces of {name[:80]!r} do not fill it")
    _must(sorted(keys) == sorted((name, key) for name in files for key in files[name]), "its manifest and its files name different tensors")
    return files


def open_checkpoint(path, world=World()):
    """The checkpoint in a folder, the sha256 of each file checked by one of the ranks. Every rank calls it; the first fault that
    any of them found is a UsageError on all."""
    path, said, manifest = Path(path), "", {}
    try:
        manifest = _read_manifest(path)
    except (OSError, *STRANGE) as error:
        said = f"{path}/manifest.json is not whole ({type(error).__name__}: {str(error)[:200]})"
    theirs = from_main(world, "" if said else manifest["sha256"])
    try:
        _must(said or theirs == manifest["sha256"], f"rank {world.rank} does not see the manifest that rank 0 sees")
        files = {} if said else _open_files(path, manifest, world)
    except (OSError, *STRANGE) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{path}: {error}"
    if said := _first_said(world, said):
        raise UsageError(said)
    return Saved(path, manifest["step"], manifest["state"], manifest["tensors"], files)


def newest_checkpoint(folder, say=print, world=World()):
    """open_checkpoint of the newest good one under `folder`, or None where there is none at all. Rank 0 lists them, all ranks
    try each. Damaged ones are named by rank 0 and passed over; damaged ones only is an error: a run must never begin again
    from nothing by itself."""
    found, tried = [p.name for p in reversed(checkpoints(folder))] if world.main else [], 0
    while name := from_main(world, found[tried] if tried < len(found) else ""):
        try:
            return open_checkpoint(Path(folder) / name, world)
        except UsageError as error:
            if world.main:
                say(f"checkpoint passed over: {error}")
        tried += 1
    if tried:
        raise UsageError(f"all {tried} checkpoints in {folder} are damaged; restore one, or start again with --overwrite")
    return None


# ---- Plan (what would it take?) ----

# Nothing is built: parameters are counted by how they are cut, activations by what layers keep (model.py:pieces), and bytes on the network
# by what sends them, of one rank and one step: an all-reduce counts its tensor, an all-gather its output, a reduce-scatter and an
# all-to-all their input, a send what is sent.

@dataclass(frozen=True)
class Weight:
    """A parameter, and how a layout cuts it."""
    shape: tuple
    dim: int = None                # what tp cuts; None: every rank has all of it, -1: the first has
    parts: int = 1                 # in how many parts that dimension comes
    heads: int = 0                 # key heads in it: tp must divide them, or it stays whole
    expert: bool = False           # ep cuts its first dimension
    cast: bool = False             # products read a narrow copy of it, which backward reads, too
    inside: bool = True            # it is read by what tp shares, so its gradients are parts of a sum


@dataclass
class Piece:
    """What stages are made of: a block, what comes before them, what ends the model. Functions of it take the config first."""
    name: str
    held: list                     # [Weight]
    macs: float = 0.0              # multiply-adds of a token
    keeps: object = lambda cfg, tokens, width, cuda: dict(none=0, norm=0, selective=0, full=0)         # bytes for backward, by --ac
    moves: object = lambda cfg, rows, width: []        # [(axis, collective, bytes, bytes when a block runs again, collective back, bytes)]
    block: bool = False            # a unit of FSDP, and of --ac


def counted(piece, cfg, size, rank=0):
    """Numbers of a piece on rank `rank` of tp: `dense` and `experts` as layers see them, the largest `shard` of each, `gathered` all shards
    padded to that, what is `cast` for products, and whose gradients `tp` adds up."""
    out, batch = Counter(), size // (cfg.pp * cfg.tp)
    for held in piece.held:
        shape, expert = list(held.shape), held.expert and cfg.ep > 1
        shape[0] //= cfg.ep if expert else 1
        cut = cfg.tp > 1 and held.dim is not None and not (held.heads and held.heads % cfg.tp)
        if cut and held.dim < 0:
            shape[0] *= rank == 0
        elif cut:
            each = shape[held.dim] // held.parts
            shape[held.dim] = held.parts * (each * (rank + 1) // cfg.tp - each * rank // cfg.tp)
        n, kind = math.prod(shape), "experts" if expert else "dense"
        shards = batch // (cfg.ep if expert else cfg.hsdp) if cfg.fsdp else 1
        dim = shard_dim(shape, shards)
        shard = n // max(1, shape[dim]) * -(-shape[dim] // shards)
        out.update({kind: n, f"{kind} shard": shard, f"{kind} gathered": shard * shards, "local": n, "shard": shard, "cast": n * held.cast,
                    "experts cast": n * held.expert, "tp": shard * (cfg.tp > 1 and not cut and (cfg.sp or held.inside))})
    return out


def in_flight(cfg, rank, number):
    """For each stage of a pipeline rank the micro-batches whose activations it holds when the rank holds most, in torch's orders."""
    p, m = cfg.pp, number
    warm, one_round = 2 * (p - rank) - 1, m // max(1, m // p)
    late = min(one_round, warm)
    held = {"gpipe": [m], "1f1b": [p - rank], "looped_bfs": [m, m], "interleaved": [one_round + warm - late, late],
            "interleaved_zb": [one_round, p], "zbv": [2 * p - rank - 1, rank + 1], "dualpipev": [2 * p - rank, rank + 1]}[cfg.pp_schedule]
    return [min(m, n) for n in held] if p > 1 else [1]


BUBBLES = {                        # (w, where from): p ranks wait (p - 1) / (w m + p - 1) of a step of m micro-batches
    "gpipe": (1, "[GPipe sec 2.3]"), "1f1b": (1, "as gpipe"), "looped_bfs": (2, "[BFS]"), "interleaved": (2, "[Megatron2 sec 2.2]"),
    "interleaved_zb": (6, "[ZB sec 2.1], forward and both gradients as long"),
    "zbv": (6, "[ZB sec 6] has 0, without the wait for the gradient's norm"),
    "dualpipev": (6, "[DSV3 sec 3.2.1] has (p-1)(F&B+B-3W), here with F&B = B = 2W"),
}


def bubble(cfg, number):
    return (cfg.pp - 1) / (BUBBLES[cfg.pp_schedule][0] * number + cfg.pp - 1)


def stages_of(cfg, pieces, rank):
    """([[Piece]] of the stages of a pipeline rank, [(first block, the one after the last)] of them, how many neighbours they have on other
    ranks, are embeddings shared with another rank?). Embeddings that are tied or that MTP reads stand at both ends."""
    count, depth = cfg.pp * PP_SCHEDULES[cfg.pp_schedule][1] if cfg.pp > 1 else 1, len(pieces["blocks"])
    owner = [stage_owner(number, cfg.pp, cfg.pp_schedule) for number in range(count)]
    cuts = [depth * number // count for number in range(count + 1)]
    ends = {0: pieces["embed"]} | {count - 1: (pieces["twice"] if count > 1 else pieces["embed"]) + pieces["end"]}
    own, borders = [i for i in range(count) if owner[i] == rank], sum(a != b and rank in (a, b) for a, b in zip(owner, owner[1:]))
    stages = [pieces["blocks"][cuts[i]:cuts[i + 1]] + pieces["each"] + ends.get(i, []) for i in own]
    return stages, [(cuts[i], cuts[i + 1]) for i in own], borders, rank in (owner[0], owner[-1]) and owner[0] != owner[-1]


def spans(cfg, size):
    """{axis: (its ranks, how many ranks lie from the first to the last)}"""
    batch = size // (cfg.pp * cfg.tp)
    apart = dict(tp=(cfg.tp, 1), cp=(cfg.cp, cfg.cp), ep=(cfg.ep, cfg.ep), batch=(batch, batch), shards=(batch // cfg.hsdp,) * 2,
                 copies=(cfg.hsdp, batch), expert_copies=(batch // cfg.ep, batch), pp=(cfg.pp, batch * cfg.pp), ends=(2, batch * cfg.pp))
    return {axis: (ranks, distance * cfg.tp) for axis, (ranks, distance) in apart.items()}


def traffic(piece, count, cfg, size, width):
    """Counter {(axis, collective): bytes} that a rank sends in a step for a piece."""
    out, sizes, (rows, number) = Counter(), spans(cfg, size), micro_shape(cfg, size)
    again = piece.block and cfg.ac in ("selective", "full")

    def add(axis, collective, n):
        out[axis, collective] += n * (sizes[axis][0] > 1)

    for axis, there, n, more, back, m in piece.moves(cfg, rows, width):
        add(axis, there, number * (n + again * more))
        add(axis, back, number * m)
    add("tp", "all-reduce", 4 * count["tp"])
    add("pp", "all-reduce", 4 * count["shard"] * (piece.name == "each"))
    times = 1 if cfg.fsdp < 3 or cfg.pp > 1 else number * (1 + piece.block)
    for kind, axis in (("dense", "shards"), ("experts", "expert_copies")):
        if cfg.fsdp:
            add(axis, "all-gather", 4 * times * count[f"{kind} gathered"])
            add(axis, "reduce-scatter", 4 * count[f"{kind} gathered"])
            add("copies", "all-reduce", 4 * count[f"{kind} shard"] * (kind == "dense"))
        else:
            add(axis.replace("shards", "batch"), "all-reduce", 4 * count[kind])
    return out


def planned(cfg, size, pieces, width, cuda):
    """[{what: bytes}] of the ranks of a pipeline: what each holds and sends. `width`: bytes of a number in products. Weights, gradients and
    the two moments are float32; the fullest rank of tp counts."""
    if size == cfg.pp * cfg.tp:                                  # nobody to shard with
        cfg = copy.copy(cfg)
        cfg.fsdp = 0
    rows, number = micro_shape(cfg, size)
    T, of, out, kinds = cfg.seq_len // cfg.cp, {}, [], {id(piece): piece for part in pieces.values() for piece in part}.values()
    stream = 4 * rows * -(-T // (cfg.tp if cfg.sp else 1)) * cfg.n_embd
    ways = [[counted(piece, cfg, size, rank) for piece in kinds] for rank in {0, cfg.tp - 1}]
    for piece, count in zip(kinds, max(ways, key=lambda way: sum(count["local"] for count in way))):
        of[id(piece)] = piece, count, piece.keeps(cfg, rows * T, width, cuda), traffic(piece, count, cfg, size, width)
    for rank in range(cfg.pp):
        (stages, blocks_of, borders, at_end), own, sends = stages_of(cfg, pieces, rank), Counter(), Counter()
        kept = narrow = macs = 0
        for live, stage in zip(in_flight(cfg, rank, number), stages):
            for piece, count, keeps, moved in (of[id(piece)] for piece in stage):
                for total, part in ((own, count), (sends, moved)):
                    for key, n in part.items():
                        total[key] += n
                own["in blocks"] += count["local"] * piece.block
                kept, macs = kept + live * keeps[cfg.ac], macs + piece.macs
                narrow += (count["cast"] - count["experts cast"] * cuda) * (live if cfg.ac in ("none", "norm") else 1)
        sends["pp", "send"] += number * stream * borders         # the stream to the one, its gradient to the other
        sends["ends", "all-reduce"] += 4 * at_end * sum(of[id(piece)][1]["shard"] for piece in pieces["twice"])
        blocks = [of[id(piece)] for stage in stages for piece in stage if piece.block]
        again = max(keeps["none"] - keeps[cfg.ac] for *_, keeps, _ in blocks)                  # of the block that is computed again
        two = own["local"] - own["in blocks"] + 2 * max(count["local"] for _, count, *_ in blocks)
        gathered = dict(weights=two if cfg.fsdp == 3 and cfg.pp == 1 else own["local"], gradients=two if number == 1 else own["local"])
        row = {name: 4 * (own["shard"] + n if cfg.fsdp else own["local"]) for name, n in gathered.items()}
        row |= dict(optimizer=8 * own["shard"], activations=kept + again + narrow * width * (width < 4))
        flops = 6 * macs * rows * T * number / cfg.tp * (4 / 3 if cfg.ac == "full" else 1)
        row["total"] = sum(row.values())
        out.append(row | dict(params=own["local"], shard=own["shard"], rank=rank, blocks=blocks_of, ends=[
            piece.name for stage in stages for piece in stage if piece.name in ("embed", "end", "mtp")], sends=+sends, flops=flops))
    return out


NODE, FAST, SLOW, REACHED = 8, 450e9, 50e9, 0.4        # ranks of a node; bytes a second in it and beyond; share of the peak that is reached


def step_seconds(cfg, size, ranks, peak):
    """(seconds of a step, of it computing, sending) of the slowest rank, to compare layouts: nothing is sent while it computes."""
    number, sizes = micro_shape(cfg, size)[1], spans(cfg, size)

    def sending(row):
        share = lambda axis, what: 1 if what == "send" else (1 + (what == "all-reduce")) * (1 - 1 / sizes[axis][0])
        return sum(n * share(axis, what) / (FAST if sizes[axis][1] <= NODE else SLOW) for (axis, what), n in row["sends"].items())

    computing = [row["flops"] / (REACHED * peak) for row in ranks]
    return max((work / (1 - bubble(cfg, number)) + sending(row), work, sending(row)) for work, row in zip(computing, ranks))


def advise(cfg, size, pieces, width, cuda, memory, peak):
    """The legal layouts of `size` ranks that fit nine tenths of `memory`, fastest first: [(step_seconds, config, planned)]. Each has the
    least --ac that fits, and in a pipeline micro-batches of about 4,096 tokens, which keep a device busy."""
    powers, found = lambda most: [2**i for i in range(max(1, most).bit_length())], []
    axes = powers(min(NODE, size)), powers(len(pieces["blocks"])), powers(cfg.n_expert * cfg.moe), ("1f1b", "interleaved", "zbv"), (0, 2, 3)
    for tp, pp, ep, schedule, fsdp in itertools.product(*axes):
        other, rows = copy.copy(cfg), cfg.tokens_per_step // cfg.seq_len * tp * pp * cfg.cp // size
        other.__dict__.update(tp=tp, pp=pp, ep=ep, pp_schedule=schedule, fsdp=fsdp, dp=0, hsdp=1, microbatches=0, ac="full",
                              micro_batch=math.gcd(rows, max(1, 4096 // cfg.seq_len)) if pp > 1 else 0)
        if pp == 1 and schedule != "1f1b":
            continue
        with contextlib.suppress(UsageError):
            refuse_layout(other, size)
            fits = lambda ranks: max(row["total"] for row in ranks) <= 0.9 * memory
            for other.ac in ("none", "selective", "full") if fits(planned(other, size, pieces, width, cuda)) else ():
                if fits(ranks := planned(other, size, pieces, width, cuda)):
                    found.append((step_seconds(other, size, ranks, peak), other, ranks))
                    break
    return sorted(found, key=lambda item: item[0])


# ---- Demo and bench ----

def bench(megabytes=200, rounds=5):
    """torch.save, a checkpoint and one in the background, in turn on the disk of this folder: medians, and their ratios."""
    tensors = {f"layer{i}": torch.randn(megabytes * 25_000 // 20, 10) for i in range(20)}
    seconds = {"torch.save + fsync": [], "save_checkpoint": [], "in the background: the stall": [], "in the background: all of it": []}
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        for turn in range(rounds + 1):                           # the first warms the caches and does not count
            ticks = [time.perf_counter()]
            with open(f"{folder}/torch.pt", "wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())
            ticks.append(time.perf_counter())
            save_checkpoint(f"{folder}/ckpt", 2 * turn, tensors, {})
            ticks.append(time.perf_counter())
            save_checkpoint(f"{folder}/ckpt", 2 * turn + 1, tensors, {}, background=True)
            ticks.append(time.perf_counter())
            saving()
            ticks.append(time.perf_counter())
            for row, begin, end in zip(seconds.values(), (0, 1, 2, 2), (1, 2, 3, 4)):
                row += [ticks[end] - ticks[begin]] * (turn > 0)
    middle = {name: statistics.median(row) for name, row in seconds.items()}
    print(f"{megabytes} MB in {len(tensors)} tensors, median of {rounds} in turn, {cores()} cores")
    for name, value in middle.items():
        print(f"  {name:28s} {value * 1e3:7.0f} ms   {value / middle['torch.save + fsync']:.2f} of torch.save, "
              f"{value / middle['save_checkpoint']:.2f} of save_checkpoint")


def demo(argv):
    if argv == ["--bench"]:
        return bench()
    if argv:
        raise UsageError(f"dist.py takes no arguments but --bench, not {' '.join(argv)}")
    world = init(DistConfig())
    nll = torch.arange(1.0, 4.0, device=world.device) + 10 * world.rank          # ranks hold 3 tokens, then 3 and 1, ...
    weight = torch.ones(3, device=world.device)
    weight[1:] *= world.rank == 0
    sums = all_sum(world, torch.stack([(nll * weight).sum(), weight.sum()]))
    means = all_sum(world, ((nll * weight).sum() / weight.sum()).clone()) / world.size
    world.print(f"{world.size} rank(s) on {world.device.type}: token-weighted mean {sums[0] / sums[1]:.4f}, mean of means {means:.4f}"
                + (" (the same: start two ranks with torchrun to see them part)" if world.size == 1 else ""))
    folder = from_main(world, tempfile.mkdtemp() if world.main else "")
    rows = 2 * world.size                                        # of a matrix of which every rank holds two
    for step in (10, 20):
        mine = torch.full((2, 3), float(step + world.rank), device=world.device)
        held = {"w": Held(mine, (rows, 3), [((2 * world.rank, 0), (0, 0), (2, 3))]), "bias": torch.zeros(3).bfloat16()}
        save_checkpoint(folder, step, held, {"next_sample": step * 8}, world=world, background=True)
    saving()
    if world.main:
        print("saved:", *(p.name for p in checkpoints(folder)), "| latest:", Path(folder, "latest").read_text(), "| files:",
              *sorted(p.name for p in Path(folder, "step_00000020").iterdir()))
        victim = Path(folder, "step_00000020", f"shard_{world.size - 1:05d}.safetensors")
        raw = bytearray(victim.read_bytes())
        raw[-1] ^= 1
        victim.write_bytes(raw)
    barrier(world)
    saved = newest_checkpoint(folder, lambda text: print("one bit flipped ->", text.replace(folder, "ckpt")), world)
    half = Held(torch.zeros(rows, 2), (rows, 3), [((0, 1), (0, 0), (rows, 2))])              # cut the other way now
    saved.fill("w", half)
    world.print(f"resumed from step {saved.step}: w[:, 1:] = {half.local.tolist()}, state = {saved.state}")
    barrier(world)
    if world.main:
        shutil.rmtree(folder)
    shutdown()


if __name__ == "__main__":
    run_cli(demo)
