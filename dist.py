"""Dist: how does one program run on many devices, and how does a run survive them?

Data parallel training gives every rank the same weights and its own slice of each batch. One number makes the ranks
equal to a single device: the loss of a step is a sum over all its tokens, divided by one count,

    loss = sum_{ranks} sum_{micro-batches} sum_m weight_m nll_m  /  sum_{ranks} sum_{micro-batches} sum_m weight_m

so the count is added up over the ranks first, and each rank scales its sum by R / count, because DDP averages gradients
over its R ranks. A mean of means would weigh a token by the company it happens to keep.              [DDP sec 3.2]

A checkpoint is a folder of plain tensors in the safetensors layout and one JSON manifest with the sha256 of every file,
written last; the folder gets its name by a rename when all of it is on disk. Nothing is pickled, so opening one runs no
code, and a half-written or damaged one is recognised and passed over for the one before.

Contents:    config | the world | layouts | reductions | data parallel | safetensors | checkpoints | plan | demo
References:
    [DDP]    PyTorch Distributed: Experiences on Accelerating Data Parallel Training, arXiv:2006.15704
    [GPipe] 1811.06965; [Megatron2] interleaved 1F1B, 2104.04473; [BFS] 2211.05953; [ZB] Zero Bubble Pipeline Parallelism, 2401.10241;
    [DSV3] DeepSeek-V3 Technical Report, 2412.19437
Run me:      python dist.py      (saves a checkpoint, damages it, recovers)
             torchrun --nproc_per_node=2 dist.py      (the same, and a token-weighted mean over two ranks)
"""
import contextlib
import copy
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td

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
    cp_mode: str = "gather"        # how a query meets the keys of other ranks: gather, ulysses or ring
    ep: int = 1                    # ranks that share the experts, taken from dp x cp
    timeout: int = 1800            # seconds after which a rank that waits for another gives up
    deterministic: bool = False    # refuse operations whose result may change from run to run
    world_size: int = 0            # plan: ranks of a cluster that is not there


DEVICES = ("auto", "cpu", "cuda")  # flag --device


# ---- The world (who am I among how many?) ----

@dataclass
class World:
    """rank of size, and the device this rank computes on. At size one every collective below is the identity."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

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
    if cfg.dp and cfg.dp != size:
        raise UsageError(f"--dp={cfg.dp} but {size} process{'es were' if size > 1 else ' was'} started; leave --dp out or run "
                         f"torchrun --nproc_per_node={cfg.dp} train.py")
    if cfg.device not in DEVICES:
        raise UsageError(f"--device={cfg.device} is not known; use one of {DEVICES}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda but no GPU answers here; use --device=cpu or auto")
    return size


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
    if size > 1 and not td.is_initialized():
        td.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=cfg.timeout))
    return World(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"))


def shutdown():
    """Leave the process group once all ranks have come this far. Let go of parallelize()'s module before: it holds the group,
    and freeing a gloo group from there can wait for ever on a thread that waits for Python."""
    if td.is_initialized():
        td.barrier()
        td.destroy_process_group()


# ---- Layouts (which can run?) ----

PP_SCHEDULES = {                   # flag --pp_schedule: torch's class, stages a rank, and do stages go forth and back over the ranks?
    "gpipe": ("ScheduleGPipe", 1, False),                        # all forward, then all backward                       [GPipe]
    "1f1b": ("Schedule1F1B", 1, False),                          # in turn, so that fewer micro-batches are kept
    "looped_bfs": ("ScheduleLoopedBFS", 2, False),               # as gpipe, with shorter stages                          [BFS]
    "interleaved": ("ScheduleInterleaved1F1B", 2, False),        # as 1f1b, with shorter stages                     [Megatron2]
    "interleaved_zb": ("ScheduleInterleavedZeroBubble", 2, False),       # gradients of weights wait for a gap             [ZB]
    "zbv": ("ScheduleZBVZeroBubble", 2, True),
    "dualpipev": ("ScheduleDualPipeV", 2, True),                 # forward of one beside backward of another   [DSV3 sec 3.2.1]
}
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
    for name, table in (("pp_schedule", PP_SCHEDULES), ("cp_mode", ("gather", "ulysses", "ring")), ("fsdp", range(4))):
        if getattr(cfg, name) not in table:
            raise UsageError(f"--{name}={getattr(cfg, name)} is not known; use one of {list(table)}")
    pp, cp, tp, ep, H, schedule = cfg.pp, cfg.cp, cfg.tp, cfg.ep, cfg.n_head, cfg.pp_schedule
    dp, left = divmod(size, pp * cp * tp)
    if left or cfg.dp not in (0, dp):
        fits = f"--dp={dp}, or leave it out" if not left else f"{max(1, round(size / (pp * cp * tp))) * pp * cp * tp} ranks"
        grid, ranks = f"--dp={cfg.dp} x " * bool(cfg.dp) + f"--pp={pp} x --cp={cp} x --tp={tp}", max(1, cfg.dp) * pp * cp * tp
        raise UsageError(f"{grid} make {ranks} ranks{'' if cfg.dp else ' or a multiple of that'}, and there {'is' if size == 1 else 'are'} "
                         f"{size}; use {fits}")
    batch, each = dp * cp, PP_SCHEDULES[schedule][1]
    mixers = {name.partition("*")[0].strip() for name in (cfg.layers or cfg.attn).split(",")}
    softmax, stages = mixers - RECURRENT, pp * each if pp > 1 else 1
    kv = cfg.n_kv_head or (1 if "mqa" in mixers else max(1, H // 4) if "gqa" in mixers else H)
    mirrored = cfg.cp_mode != "ulysses" and not mixers & RECURRENT and cfg.arch == "decoder"           # then a rank has two pieces of a row
    cuts, unit = cp * (1 + mirrored), cfg.seq_len * dp * max(1, cfg.micro_batch)
    low, ours = cfg.tokens_per_step // unit * unit, f" x --micro_batch={cfg.micro_batch}" * bool(cfg.micro_batch)
    refuse_first((                 # (is it wrong?, what to say)
        (cfg.world_size and not cfg.plan, f"--world_size={cfg.world_size} is a cluster that --plan imagines; give it --plan, too"),
        (cfg.hsdp > 1 and not cfg.fsdp, f"--hsdp={cfg.hsdp} makes copies of sharded weights; give it --fsdp, or leave it out"),
        (batch % cfg.hsdp, f"--hsdp={cfg.hsdp} does not divide dp x cp = {batch} ranks; use one of {divisors(batch)[:12]}"),
        (H % tp, f"--tp={tp} does not divide --n_head={H}: ranks share heads equally; use one of {divisors(H)}"),
        (softmax - {"mla"} and kv % tp and tp % kv, f"--tp={tp}, {kv} key heads: one must divide the other; use one of {divisors(H, kv)}"),
        (tp > cfg.vocab_size, f"--tp={tp} is more than --vocab_size={cfg.vocab_size}; use one of {divisors(H)}"),
        (ep > 1 and not cfg.moe, f"--ep={ep} deals out experts, of which there are none; give it --moe, or leave it out"),
        (ep > 1 and cfg.n_expert % ep, f"--ep={ep} does not divide --n_expert={cfg.n_expert}; use one of {divisors(cfg.n_expert, batch)}"),
        (batch % ep, f"--ep={ep} does not divide dp x cp = {batch} ranks, which it shares; use one of {divisors(batch, cfg.n_expert)}"),
        (cp > 1 and cfg.seq_len % cuts, f"--cp={cp} cuts rows into {cuts} pieces, and --seq_len={cfg.seq_len} is no multiple of that; use "
         f"--seq_len={max(1, cfg.seq_len // cuts) * cuts}"),
        (cp > 1 and cfg.cp_mode == "ulysses" and softmax and H % (tp * cp), f"--cp_mode=ulysses shares heads, and --cp={cp} x --tp={tp} "
         f"does not divide --n_head={H}; use --cp={divisors(max(1, H // tp))[-1]} or another mode"),
        (cp > 1 and cfg.cp_mode == "ring" and (cfg.attn_dropout or cfg.pos == "shaw"),
         "--cp_mode=ring has neither --attn_dropout nor --pos=shaw; use --cp_mode=gather"),
        (pp > 1 and cfg.arch == "encdec", f"--pp={pp} cuts one stack of blocks, and --arch=encdec has two; use --pp=1"),
        (cfg.n_layer < stages, f"--pp={pp} with --pp_schedule={schedule} has {stages} stages, more than --n_layer={cfg.n_layer} blocks; "
         f"use --pp={max(1, cfg.n_layer // each)}" + " or --pp_schedule=1f1b" * (each > 1)),
        (cfg.norm == "batch" and size > 1, "--norm=batch takes its statistics over the rows of one rank, so ranks would train different "
         "models; use one, or another --norm"),
        (cfg.compile and pp > 1 and schedule in ("interleaved_zb", "zbv", "dualpipev"),
         f"--pp_schedule={schedule} splits backward in two, which compiled blocks cannot; use --compile=false or --pp_schedule=1f1b"),
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

def all_sum(world, tensor):
    """Sum over ranks, in place; the identity at size one."""
    if world.size > 1:
        td.all_reduce(tensor)
    return tensor


def any_rank(world, flag):
    """Is it so on any rank? All ranks get the same answer, so all take the same branch."""
    if world.size == 1:
        return bool(flag)
    return all_sum(world, torch.tensor([float(flag)], device=world.device)).item() > 0


def from_main(world, text):
    """Rank 0's text (up to 4,096 bytes), on every rank."""
    if world.size == 1:
        return text
    box = torch.zeros(4096, dtype=torch.uint8)
    raw = text.encode()
    box[:len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else 0
    box = box.to(world.device)
    td.broadcast(box, 0)
    return bytes(box.tolist()).rstrip(b"\0").decode()


def barrier(world):
    if world.size > 1:
        td.barrier()


# ---- Data parallel (every rank a slice of the batch) ----

class LossOf(torch.nn.Module):
    """The call that DDP must see to hook the backward pass: batch -> model.loss(batch)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def parallelize(model, world):
    """A module whose call is model.loss(batch) and whose backward leaves the rank-averaged gradient in model's parameters."""
    step = LossOf(model)
    if world.size == 1:
        return step
    warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)        # its successor is not in torch 2.11
    return torch.nn.parallel.DistributedDataParallel(
        step, device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(step, last):
    """Context of a micro-batch: gradients cross the network only with the last one of a step."""
    return step.no_sync() if hasattr(step, "no_sync") and not last else torch.autograd.set_grad_enabled(True)


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

def save_checkpoint(folder, step, tensors, state, keep=2):
    """Write folder/step_XXXXXXXX (tensors.safetensors, manifest.json) and point folder/latest at it.

    tensors: {global name: tensor}; state: JSON (step, data position, configuration). The new folder is complete and
    synced before its rename and before any older one is deleted; `keep` of them stay. OSError (a full disk) leaves
    everything as it was."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{step:08d}"
    for stale in folder.glob(".saving-*"):                       # left by a process that was killed while saving
        shutil.rmtree(stale, ignore_errors=True)
    temp = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        digest = write_safetensors(temp / "tensors.safetensors", tensors)
        table = {key: dict(file="tensors.safetensors", dtype=SAFE[t.dtype], shape=list(t.shape)) for key, t in tensors.items()}
        manifest = dict(format=1, step=step, files={"tensors.safetensors": digest}, tensors=table, state=state)
        with atomic_write(temp / "manifest.json", "w") as file:
            json.dump(manifest | {"sha256": _own_hash(manifest)}, file)
        if (folder / name).exists():                             # a damaged one of this step, passed over when resuming
            _discard(folder / name)
        os.rename(temp, folder / name)
        sync_folder(folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
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


def read_checkpoint(path):
    """(tensors, state, step) of one checkpoint folder, every byte checked against the manifest's sha256."""
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files, step, state, table = (manifest[key] for key in ("files", "step", "state", "tensors"))
        if manifest["sha256"] != _own_hash(manifest):
            raise ValueError("its own sha256 does not match: it was changed or damaged")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: no whole manifest.json ({type(error).__name__}: {error})") from None
    tensors = {}
    for name, want in files.items():
        if Path(name).name != name:
            raise UsageError(f"{path}: the manifest names a file outside its folder: {name!r}")
        try:
            have = file_hash(path / name)
        except OSError as error:
            raise UsageError(f"{path / name}: {error.strerror}") from None
        if have != want:
            raise UsageError(f"{path / name} is damaged: sha256 {have[:12]}..., the manifest says {want[:12]}...")
        tensors |= read_safetensors(path / name)
    if set(tensors) != set(table):
        raise UsageError(f"{path}: the manifest and the file name different tensors")
    return tensors, state, step


def newest_checkpoint(folder, say=print):
    """read_checkpoint of the newest good one under `folder`, or None where there is none at all. Damaged ones are named
    and passed over; damaged ones only is an error: a run must never begin again from nothing by itself."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return read_checkpoint(path)
        except UsageError as error:
            say(f"checkpoint passed over: {error}")
    if found:
        raise UsageError(f"all {len(found)} checkpoints in {folder} are damaged; restore one, or start again with --overwrite")
    return None


# ---- Plan (what would it take?) ----

# Nothing is built: parameters are counted by how they are cut, activations by what layers keep (model.py:pieces), and bytes on the network
# by what sends them, of one rank and one step: an all-reduce counts its tensor, an all-gather its output, a reduce-scatter and an
# all-to-all their input, a send what is sent.

@dataclass(frozen=True)
class Held:
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
    held: list                     # [Held]
    macs: float = 0.0              # multiply-adds of a token
    keeps: object = lambda cfg, tokens, width, cuda: dict(none=0, norm=0, selective=0, full=0)         # bytes for backward, by --ac
    moves: object = lambda cfg, rows, width: []        # [(axis, collective, bytes, bytes when a block runs again, collective back, bytes)]
    block: bool = False            # a unit of FSDP, and of --ac


def shard_dim(shape, n):
    """The dimension of which n ranks of FSDP hold a part each: the first, unless it is too short and another divides."""
    return 0 if shape[0] >= n else next((dim for dim, k in enumerate(shape) if k and k % n == 0), 0)


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
    # in a pipeline a stage stays gathered from each backward to the end of the forward after it, and what is outside of blocks all the step
    times = 1 if cfg.fsdp < 3 or cfg.pp > 1 and not piece.block else number + 1 if cfg.pp > 1 else number * (1 + piece.block)
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


# ---- Demo ----

def demo(argv):
    if argv:
        raise UsageError(f"dist.py takes no arguments, not {' '.join(argv)}")
    world = init(DistConfig())
    nll = torch.arange(1.0, 4.0, device=world.device) + 10 * world.rank          # ranks hold 3 tokens, then 3 and 1, ...
    weight = torch.ones(3, device=world.device)
    weight[1:] *= world.rank == 0
    sums = all_sum(world, torch.stack([(nll * weight).sum(), weight.sum()]))
    means = all_sum(world, ((nll * weight).sum() / weight.sum()).clone()) / world.size
    world.print(f"{world.size} rank(s) on {world.device.type}: token-weighted mean {sums[0] / sums[1]:.4f}, mean of means {means:.4f}"
                + (" (the same: start two ranks with torchrun to see them part)" if world.size == 1 else ""))
    if world.main:
        with tempfile.TemporaryDirectory() as folder:
            for step in (10, 20):
                save_checkpoint(folder, step, {"w": torch.full((2, 3), float(step)), "bias": torch.zeros(3).bfloat16()}, {"next_sample": step * 8})
            print("saved:", *(p.name for p in checkpoints(folder)), "| latest:", Path(folder, "latest").read_text())
            victim = Path(folder, "step_00000020", "tensors.safetensors")
            raw = bytearray(victim.read_bytes())
            raw[-1] ^= 1
            victim.write_bytes(raw)
            tensors, state, step = newest_checkpoint(folder, say=lambda text: print("one bit flipped ->", text.replace(folder, "ckpt")))
            print(f"resumed from step {step}: w = {tensors['w'][0].tolist()}, state = {state}")
    barrier(world)
    shutdown()


if __name__ == "__main__":
    run_cli(demo)
