"""Dist: how does one program run on many devices, and how does a run survive them?

Data parallel training gives every rank the same weights and its own slice of each batch. One number makes the ranks
equal to a single device: the loss of a step is a sum over all its tokens, divided by one count,

    loss = sum_{ranks} sum_{micro-batches} sum_m weight_m nll_m  /  sum_{ranks} sum_{micro-batches} sum_m weight_m

so the count is added up over the ranks first, and each rank scales its sum by R / count, because DDP averages gradients
over its R ranks. A mean of means would weigh a token by the company it happens to keep.              [DDP sec 3.2]

A checkpoint is a folder of plain tensors in the safetensors layout and one JSON manifest with the sha256 of every file,
written last; the folder gets its name by a rename when all of it is on disk. Nothing is pickled, so opening one runs no
code, and a half-written or damaged one is recognised and passed over for the one before.

Contents:    config | the world | reductions | data parallel | safetensors | checkpoints | demo
References:
    [DDP]    PyTorch Distributed: Experiences on Accelerating Data Parallel Training, arXiv:2006.15704
Run me:      python dist.py      (saves a checkpoint, damages it, recovers)
             torchrun --nproc_per_node=2 dist.py      (the same, and a token-weighted mean over two ranks)
"""
import datetime
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td

from tokenizer import UsageError, atomic_write, cores, run_cli, sync_folder


@dataclass
class DistConfig:
    device: str = "auto"           # where to compute: auto (a GPU if there is one), cpu or cuda
    dp: int = 0                    # data-parallel ranks; 0 means all that torchrun started
    timeout: int = 1800            # seconds after which a rank that waits for another gives up


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
