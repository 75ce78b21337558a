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

Contents:    config | the world | reductions | collectives of the layers | cuts and pieces | engines | safetensors | checkpoints | demo and bench
References:
    [DDP] 2006.15704; [FSDP] 2304.11277; [Megatron] 1909.08053; [SP] Reducing Activation Recomputation, 2205.05198; [Ulysses] 2309.14509;
    [Ring] 2310.01889; [Llama3] 2407.21783; [GPipe] 1811.06965; [Megatron2] 2104.04473; [BFS] Breadth-First Pipeline, 2211.05953;
    [ZB] Zero Bubble Pipeline, 2401.10241; [DSV3] DeepSeek-V3, 2412.19437
Run me:      python dist.py      (saves a checkpoint, damages it, recovers)
             torchrun --nproc_per_node=2 dist.py      (the same, and a token-weighted mean over two ranks)
"""
import contextlib
import datetime
import errno
import faulthandler
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
import time
import uuid
import warnings
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

from tokenizer import UsageError, atomic_write, cores, flag, run_cli, sync_folder


@dataclass
class DistConfig:
    device: str = "auto"           # where to compute: auto (a GPU if there is one), cpu or cuda
    dp: int = 0                    # copies of the model that share the rows of a step; 0 means as many as pp, cp and tp leave
    fsdp: int = flag(0, bare=3)    # ZeRO stage: 1 and 2 shard optimizer state and gradients, 3 (and the bare flag) weights, too
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
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if size == 1:
        return World(device=device)
    # the watchdog below is first to speak; this is for ranks that wait outside a step
    wait = datetime.timedelta(seconds=cfg.timeout + 10)
    if not td.is_initialized():
        td.init_process_group("nccl" if cuda else "gloo", timeout=wait)
    return World(rank, size, tuple(range(size)), td.group.WORLD, device, **groups(cfg, rank, size, wait), sp=cfg.sp and cfg.tp > 1)


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


def any_rank(world, flag):
    """Is it so on any rank? All ranks get the same answer, so all take the same branch."""
    if world.size == 1:
        return bool(flag)
    return all_sum(world, torch.tensor([float(flag)], device=world.device)).item() > 0


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
# gradients, so "keep" goes back as "sum".                                                     [Megatron sec 3, SP sec 4.2.2]

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


def vocab_parallel_cross_entropy(x_MD, w_VD, targets_M, weights_M, bias_V=None, softcap=0.0, z_alpha=0.0, smoothing=0.0, n_vocab=0, tp=ALONE):
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

    x_MD = x_MD.to(torch.get_autocast_dtype(x_MD.device.type)) if torch.is_autocast_enabled(x_MD.device.type) else x_MD
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
        boxes = [box[:cut.dim] + [(part * each + low, part * each + high)] + box[cut.dim + 1:] for box in boxes for part in range(cut.parts)]
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


PP_SCHEDULES = {                   # flag --pp_schedule: torch's class, stages a rank, and do stages go forth and back over the ranks?
    "gpipe": ("ScheduleGPipe", 1, False),                        # all forward, then all backward                  [GPipe sec 2]
    "1f1b": ("Schedule1F1B", 1, False),                          # in turn, so that fewer micro-batches are kept   [Megatron2 sec 2.2]
    "looped_bfs": ("ScheduleLoopedBFS", 2, False),               # as gpipe, with shorter stages                   [BFS sec 3]
    "interleaved": ("ScheduleInterleaved1F1B", 2, False),        # as 1f1b, with shorter stages                    [Megatron2 sec 2.2]
    "interleaved_zb": ("ScheduleInterleavedZeroBubble", 2, False),       # gradients of weights wait for a gap             [ZB sec 2]
    "zbv": ("ScheduleZBVZeroBubble", 2, True),                   # the same, forth and back                        [ZB sec 6]
    "dualpipev": ("ScheduleDualPipeV", 2, True),                 # forward of one beside backward of another       [DSV3 sec 3.2.1]
}


def stage_owner(number, pp, schedule):
    """Rank of pp that holds a stage."""
    _, each, mirrored = PP_SCHEDULES[schedule]
    return each * pp - 1 - number if mirrored and number >= pp else number % pp


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
        self.parts = [Part(stage if self.fsdp else stage.to(world.device), number, cast) for number, stage in enumerate(stages) if self.owner[number] == world.pp.rank]
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
        """A unit for every block, in it one for experts that ep deals out, and one for the rest.                   [FSDP sec 3]"""
        from torch.distributed.fsdp import FSDPModule, fully_shard
        world, options = self.world, dict(reshard_after_forward=self.fsdp == 3)
        mesh = mesh_of(world.shards, world.copies, world.device.type)
        blocks = [*part.model.enc_blocks.children(), *part.model.blocks.children(), *(module.block for module in part.model.mtp)]
        for block in blocks:
            if world.ep.size > 1 and hasattr(block.mlp, "experts"):
                fully_shard(block.mlp.experts, mesh=mesh_of(world.expert_copies, ALONE, world.device.type), **options)
            fully_shard(block, mesh=mesh, **options)
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
        for module in part.modules():
            if isinstance(module, FSDPModule):
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
            each = -(-p.shape[0] // shards.size)
            held, local = rows_of(held, each * shards.rank, each * (shards.rank + 1)), nn.Parameter(p._local_tensor)
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
        every = [None] * world.size if world.main else None
        td.gather_object([(name, tuple(shape), own, t.cpu()) for name, shape, own, t in boxes + others * (world.batch.rank == world.tp.rank == 0)], every)
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
        said = [one for part in self.parts for one in part.said]
        for part in self.parts:
            part.said.clear()
        mine = self.world.tp.rank == 0
        return torch.stack([sum(loss for loss, _, _ in said) * mine + torch.zeros((), dtype=torch.float64, device=self.world.device),
                            sum(weight.double() for _, weight, _ in said) * mine + torch.zeros((), dtype=torch.float64, device=self.world.device)])


def to_device(batch, device):
    if device.type == "cuda":
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}
    return batch


# ---- safetensors (8 bytes of length, a JSON header, raw tensors) ----

SAFE = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
SAFE_TYPES = {name: dtype for dtype, name in SAFE.items()}


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
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for block in (len(head).to_bytes(8, "little"), head, *(raw_bytes(t) for t in tensors.values() if t.numel())):
            digest.update(block)
            file.write(block)
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
            dtype, count = SAFE_TYPES[entry["dtype"]], int(np.prod(entry["shape"], dtype=object))
            if not 0 <= start <= stop <= len(data) or stop - start != count * dtype.itemsize:
                raise ValueError(f"tensor {name} wants bytes {start:,} to {stop:,} of {len(data):,}: the file was cut short")
            flat = torch.from_numpy(data[start:stop])
            if (8 + length + start) % dtype.itemsize:            # foreign files may start anywhere
                flat = flat.clone()
            tensors[name] = flat.view(dtype).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a whole safetensors file ({error}); copy or save it again") from None
    return tensors


# ---- Checkpoints (a folder that is either whole or not there) ----

# folder/step_00000250/  shard_00000.safetensors ...   what each rank writes: of every tensor some boxes, each held by one rank
#                        manifest.json                 where every box of every tensor lies, sha256 and size of all files, the state
# Ranks write without waiting for each other into a folder .saving-...; who is done says so in a file of its own, and the main rank makes
# the manifest of these, syncs, and renames the folder. So it may as well happen in a thread, while training goes on. All ranks see one
# file system. Reading intersects the boxes that were saved with those wanted, so any layout reads what any other wrote.

@dataclass
class Held:
    """What a rank holds of one tensor: whole[place : place + size] is local[offset : offset + size], for every piece."""
    local: torch.Tensor
    shape: tuple                   # of the whole
    pieces: list                   # [(place, offset, size)], a number for every dimension each
    writes: bool = True            # exactly one of the ranks that hold the same pieces saves them

    @classmethod
    def whole(cls, tensor, writes=True):
        zeros = (0,) * tensor.ndim
        return cls(tensor, tuple(tensor.shape), [(zeros, zeros, tuple(tensor.shape))], writes)


def box(start, size):
    return tuple(slice(a, a + n) for a, n in zip(start, size))


ATTEMPT = dict(pid=0, run="", number=0)      # names of the folders being written: all ranks count alike
WRITING = dict(thread=None, errors=[])       # the save that is on its way in the background
KEPT = {}                                    # memory of the copies it writes, used again by the next


def save_checkpoint(folder, step, held, state, keep=2, world=World(), background=False, wait=600):
    """Write folder/step_XXXXXXXX and point folder/latest at it; `keep` of the newest stay. Every rank calls it, with what it holds:
    {name: Held, or a whole tensor that the main rank has}, and the same JSON state.

    The new folder is complete and synced before its rename and before any older one is deleted. OSError on all ranks, with everything as
    it was, if one of them could not write (a full disk) or was not done in `wait` seconds. background: returns once the tensors are copied;
    an error comes with the next save, or saving()."""
    saving(world)
    folder, held = Path(folder), {name: one if isinstance(one, Held) else Held.whole(one, world.main) for name, one in held.items()}
    if ATTEMPT["pid"] != os.getpid():
        ATTEMPT.update(pid=os.getpid(), run=from_main(world, uuid.uuid4().hex[:12]), number=0)
    ATTEMPT["number"] += 1
    temp = folder / f".saving-{ATTEMPT['run']}-{ATTEMPT['number']}"
    tensors, table = {}, {}
    for name, one in held.items():
        for number, (place, offset, size) in enumerate(one.pieces if one.writes else []):
            key, part = f"{name}#{number}" if len(one.pieces) > 1 else name, one.local.detach()[box(offset, size)]
            tensors[key] = copied(key, part) if background else part
            table.setdefault(name, dict(dtype=SAFE[part.dtype], shape=list(one.shape), pieces=[]))["pieces"].append(
                dict(file=f"shard_{world.rank:05d}.safetensors", key=key, place=list(place), size=list(size)))

    def work():
        try:
            write_shard(temp, world, tensors, table)
            if world.main:
                publish(folder, temp, step, world, state, keep, wait)
        finally:
            if world.main:
                shutil.rmtree(temp, ignore_errors=True)

    if background:
        def quietly():
            try:
                work()
            except OSError as error:
                WRITING["errors"].append(error)
        WRITING["thread"] = threading.Thread(target=quietly, name="checkpoint")
        WRITING["thread"].start()
    else:
        agreed(world, work)


def copied(key, tensor):
    """A copy in memory of the CPU, which later copies under the same key reuse."""
    buffer = KEPT.get(key)
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = KEPT[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor)


def agreed(world, work):
    """Do it; OSError on every rank if it could not be done on one."""
    fault = ""
    try:
        work()
    except OSError as error:
        fault = error.strerror or str(error)
    if fault := next(filter(None, all_texts(world, fault)), ""):
        raise OSError(errno.EIO, fault)


def saving(world=World()):
    """Wait for a save in the background. All ranks call it together, and OSError comes on all."""
    if WRITING["thread"] is not None:
        WRITING["thread"].join()
        WRITING["thread"], errors = None, WRITING["errors"][:]
        WRITING["errors"].clear()

        def work():
            if errors:
                raise errors[0]
        agreed(world, work)


def write_shard(temp, world, tensors, table):
    """This rank's file and, when that is on the disk, the note that says so; or one that says that it failed."""
    temp.mkdir(parents=True, exist_ok=True)
    name = f"shard_{world.rank:05d}"
    try:
        files = {}
        if tensors:
            digest = write_safetensors(temp / f"{name}.safetensors", tensors)
            files = {f"{name}.safetensors": dict(sha256=digest, bytes=os.path.getsize(temp / f"{name}.safetensors"))}
        with atomic_write(temp / f"{name}.json", "w") as file:
            json.dump(dict(files=files, tensors=table), file)
    except OSError:
        with contextlib.suppress(OSError):                       # a full disk may still take an empty file; else the main rank waits in vain
            (temp / f"{name}.failed").touch()
        raise


def publish(folder, temp, step, world, state, keep, wait):
    """The main rank's part: the manifest of all shards, the rename, and the end of older checkpoints."""
    for stale in folder.glob(".saving-*"):                   # of processes that were killed while saving
        if stale != temp:
            shutil.rmtree(stale, ignore_errors=True)
    notes, deadline = [temp / f"shard_{rank:05d}.json" for rank in range(world.size)], time.monotonic() + wait
    while not all(note.exists() for note in notes):
        if failed := next(temp.glob("*.failed"), None):
            raise OSError(errno.EIO, f"{failed.stem} could not be written")
        if time.monotonic() > deadline:
            missing = [note.stem for note in notes if not note.exists()]
            raise OSError(errno.ETIMEDOUT, f"{', '.join(missing[:4])} not written within {wait} s")
        time.sleep(0.01)
    files, table = {}, {}
    for note in notes:
        one = json.loads(note.read_text())
        files |= one["files"]
        for name, entry in one["tensors"].items():
            table.setdefault(name, entry | dict(pieces=[]))["pieces"] += entry["pieces"]
    manifest = dict(format=2, step=step, files=files, tensors=table, state=state)
    with atomic_write(temp / "manifest.json", "w") as file:
        json.dump(manifest | {"sha256": _own_hash(manifest)}, file)
    for note in notes:
        note.unlink()
    name = f"step_{step:08d}"
    if (folder / name).exists():                             # a damaged one of this step, passed over when resuming
        _discard(folder / name)
    os.rename(temp, folder / name)
    sync_folder(folder)
    with atomic_write(folder / "latest", "w") as file:
        file.write(name)
    for old in checkpoints(folder)[:-keep]:
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


def read_manifest(path):
    """manifest.json of one checkpoint, whose every claim fits the others: it is whole, it names files inside its folder alone, and the pieces
    of every tensor lie in it, apart from each other, and fill it."""
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["sha256"] != _own_hash(manifest):
            raise ValueError("its own sha256 does not match: it was changed or damaged")
        if manifest["format"] != 2:
            raise ValueError(f"format {manifest['format']} is not known")
        for name in manifest["files"]:
            if Path(name).name != name or name in (".", ".."):
                raise ValueError(f"it names a file outside its folder: {name!r}")
        for name, entry in manifest["tensors"].items():
            boxes = [[(a, a + n) for a, n in zip(piece["place"], piece["size"], strict=True)] for piece in entry["pieces"]]
            inside = all(0 <= a <= b <= n for one in boxes for (a, b), n in zip(one, entry["shape"], strict=True))
            apart = all(overlap(one, other) is None for i, one in enumerate(boxes) for other in boxes[:i])
            filled = sum(math.prod(b - a for a, b in one) for one in boxes) == math.prod(entry["shape"])
            if entry["dtype"] not in SAFE_TYPES or not (inside and apart and filled) or any(p["file"] not in manifest["files"] for p in entry["pieces"]):
                raise ValueError(f"the pieces of tensor {name} do not make it up")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: no whole manifest.json ({type(error).__name__}: {error})") from None
    return manifest


def overlap(one, other):
    """The box that two boxes share, or None."""
    shared = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other)]
    return None if any(a >= b for a, b in shared) else shared


class Saved:
    """A checkpoint whose files are as its manifest says. Tensors are read when they are asked for."""

    def __init__(self, path, manifest):
        self.path, self.step, self.state, self.table, self.read = Path(path), manifest["step"], manifest["state"], manifest["tensors"], {}

    def piece(self, name, piece):
        """The saved tensor behind one piece, over a memory map."""
        if piece["file"] not in self.read:
            self.read[piece["file"]] = read_safetensors(self.path / piece["file"])
        tensor = self.read[piece["file"]].get(piece["key"])
        if tensor is None or list(tensor.shape) != piece["size"] or SAFE[tensor.dtype] != self.table[name]["dtype"]:
            raise UsageError(f"{self.path}: {piece['file']} does not hold what the manifest says of {name}; it belongs to another checkpoint")
        return tensor

    def whole(self, name):
        entry = self.table[name]
        if len(entry["pieces"]) == 1:
            return self.piece(name, entry["pieces"][0])
        tensor = torch.empty(entry["shape"], dtype=SAFE_TYPES[entry["dtype"]])
        self.fill(name, Held.whole(tensor))
        return tensor

    @torch.no_grad()
    def fill(self, name, held):
        """Copy what was saved of a tensor into what this rank holds of it."""
        if name not in self.table:
            raise UsageError(f"the checkpoint {self.path} lacks {name}; it belongs to another model")
        entry = self.table[name]
        if entry["shape"] != list(held.shape):
            raise UsageError(f"{name} is {entry['shape']} in the checkpoint {self.path} and {list(held.shape)} here; it belongs to another model")
        for piece in entry["pieces"]:
            there = [(a, a + n) for a, n in zip(piece["place"], piece["size"])]
            for place, offset, size in held.pieces:
                shared = overlap(there, [(a, a + n) for a, n in zip(place, size)])
                if shared is not None:
                    source = self.piece(name, piece)[tuple(slice(a - p, b - p) for (a, b), p in zip(shared, piece["place"]))]
                    held.local[tuple(slice(a - p + o, b - p + o) for (a, b), p, o in zip(shared, place, offset))] = source.to(held.local.device)


def open_checkpoint(path, world=World()):
    """Saved, every byte of it checked against the manifest: each file by one rank, and all ranks come to the same verdict."""
    fault = ""
    try:
        manifest = read_manifest(path)
        for name, want in list(manifest["files"].items())[world.rank::world.size]:
            check_file(Path(path) / name, want)
    except UsageError as error:
        fault = str(error)
    if fault := next(filter(None, all_texts(world, fault)), ""):
        raise UsageError(fault)
    return Saved(path, manifest)


def check_file(path, want):
    try:
        size = os.path.getsize(path)
        have = file_hash(path) if size == want["bytes"] else ""
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if size != want["bytes"]:
        raise UsageError(f"{path} is damaged: it has {size:,} bytes, the manifest says {want['bytes']:,}")
    if have != want["sha256"]:
        raise UsageError(f"{path} is damaged: sha256 {have[:12]}..., the manifest says {want['sha256'][:12]}...")


def newest_checkpoint(folder, say=print, world=World()):
    """open_checkpoint of the newest good one under `folder`, or None where there is none at all. Damaged ones are named and passed over;
    damaged ones only is an error: a run must never begin again from nothing by itself."""
    found = [Path(folder) / name for name in json.loads(from_main(world, json.dumps([path.name for path in checkpoints(folder)])))]
    for path in reversed(found):
        try:
            return open_checkpoint(path, world)
        except UsageError as error:
            say(f"checkpoint passed over: {error}")
    if found:
        raise UsageError(f"all {len(found)} checkpoints in {folder} are damaged; restore one, or start again with --overwrite")
    return None


# ---- Demo and bench ----

def demo():
    world = init(DistConfig())
    nll = torch.arange(1.0, 4.0, device=world.device) + 10 * world.rank          # ranks hold 3 tokens, then 3 and 1, ...
    weight = torch.ones(3, device=world.device)
    weight[1:] *= world.rank == 0
    sums = all_sum(world, torch.stack([(nll * weight).sum(), weight.sum()]))
    means = all_sum(world, ((nll * weight).sum() / weight.sum()).clone()) / world.size
    world.print(f"{world.size} rank(s) on {world.device.type}: token-weighted mean {sums[0] / sums[1]:.4f}, mean of means {means:.4f}"
                + (" (the same: start two ranks with torchrun to see them part)" if world.size == 1 else ""))
    folder = from_main(world, tempfile.mkdtemp() if world.main else "")
    low, high = bounds(6, world)
    for step in (10, 20):                                        # every rank writes its rows of w
        w = Held(torch.full((high - low, 3), float(step)), (6, 3), [((low, 0), (0, 0), (high - low, 3))])
        save_checkpoint(folder, step, {"w": w, "bias": torch.zeros(3).bfloat16()}, {"next_sample": step * 8}, world=world)
    newest = checkpoints(folder)[-1]
    world.print("saved:", *(p.name for p in checkpoints(folder)), "| latest holds:", *sorted(p.name for p in newest.iterdir()))
    if world.main:
        victim = newest / "shard_00000.safetensors"
        raw = bytearray(victim.read_bytes())
        raw[-1] ^= 1
        victim.write_bytes(raw)
    barrier(world)
    saved = newest_checkpoint(folder, lambda text: world.print("one bit flipped ->", text.replace(folder, "ckpt")), world)
    world.print(f"resumed from step {saved.step}: w = {saved.whole('w')[0].tolist()} of {saved.whole('w').shape[0]} rows, state = {saved.state}")
    barrier(world)
    if world.main:
        shutil.rmtree(folder)
    shutdown()


def bench(megabytes=200, rounds=5):
    """A checkpoint with its hashes beside torch.save, both synced to the disk, in turn."""
    tensors = {f"w{i}": torch.randn(1 << 18) for i in range(megabytes)}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        def plain():
            with atomic_write(Path(folder, "plain.pt")) as file:
                torch.save(tensors, file)

        def timed(f):
            start = time.perf_counter()
            f()
            return time.perf_counter() - start

        ours = lambda background: lambda: save_checkpoint(Path(folder, "ours"), 1, tensors, {}, background=background)
        times = {"torch.save": [], "checkpoint": [], "stall in the background": []}
        for _ in range(rounds + 1):
            times["torch.save"].append(timed(plain))
            times["checkpoint"].append(timed(ours(False)))
            times["stall in the background"].append(timed(ours(True)))
            saving()
        for name, taken in times.items():
            middle = sorted(taken[1:])[rounds // 2]
            times[name] = middle
            print(f"{name:24s} {middle * 1e3:8.1f} ms   {middle / times['torch.save']:.2f}x torch.save   {megabytes / middle:6.0f} MB/s", flush=True)
        print(f"stall: {times['stall in the background'] / times['checkpoint']:.0%} of a checkpoint in the foreground")


def main(argv):
    if argv not in ([], ["--bench"]):
        raise UsageError(f"dist.py takes --bench or nothing, not {' '.join(argv)}")
    bench() if argv else demo()


if __name__ == "__main__":
    run_cli(main)
