"""Train: how does it learn?

Take a batch, ask the model how surprised it is by each next token, move every weight a little so that it would have been
less so, and do that again. The loop below is the whole of it; what stands around it makes the numbers right (one loss
for any split of the batch), the run safe (stop it whenever you like, go on to the same bit) and the progress visible.

    loss = sum weights nll / sum weights                       over all micro-batches and ranks of the step
    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2           g clipped to norm grad_clip                [Adam alg 1]
    w = w - lr ( m^ / (sqrt(v^) + eps) + weight_decay w )      m^, v^ corrected for their start at 0    [AdamW alg 2]
    lr(step) = peak (step + 1) / warmup, then peak (min_lr + (1 - min_lr) cosine)                       [SGDR eq 5]
    bits per byte = nll of the validation text in bits / its UTF-8 bytes     (at most --eval_tokens of it, spread evenly)

Contents:    config | optimizer | schedules | precision | the batch | evaluation | run folder | report | plan | sample |
             bench | main
References:
    [Adam]   Adam: A Method for Stochastic Optimization, arXiv:1412.6980
    [AdamW]  Decoupled Weight Decay Regularization, arXiv:1711.05101
    [SGDR]   SGDR: Stochastic Gradient Descent with Warm Restarts, arXiv:1608.03983
    [DSV3]   DeepSeek-V3 Technical Report, arXiv:2412.19437
Run me:      python train.py                                   (trains on this Python's standard library)
             python train.py --input=book.txt --out_dir=out/book --attn=mla --moe
             torchrun --nproc_per_node=2 train.py              (the same on two processes)
             python train.py --resume | --sample --prompt="def " | --plan | --help
             python train.py --plan --world_size=2048 --pp=16 --ep=64 --preset=deepseek-v3
"""
import contextlib
import dataclasses
import functools
import html
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizer as tok_lib

FILES = ["tokenizer.py", "data.py", "kernels.py", "dist.py", "attention.py", "moe.py", "model.py", "train.py"]


def parse(argv):
    """{flag: value} of what was typed."""
    parser = tok_lib.Parser(prog="train.py", usage="train.py [--flag=value ...]", description="Pretrain a language model. "
                            "Every flag is a field of the config in the file that heads its group.")
    tok_lib.add_flags(parser, [Path(__file__).parent / name for name in FILES])
    return vars(parser.parse_args(argv))


if __name__ == "__main__":
    with tok_lib.plain_errors():                                 # a mistyped flag fails here, before torch takes its seconds
        parse(sys.argv[1:])

import torch

import attention
import data
import dist
import kernels
import model as model_lib
from data import DataConfig
from dist import DistConfig
from kernels import KernelConfig
from model import PRESETS, Model, ModelConfig
from moe import Experts, MoEConfig, dispatch_of, update_biases
from tokenizer import TokenizerConfig, UsageError, atomic_write, flag


@dataclass
class TrainConfig(ModelConfig, DistConfig, KernelConfig, DataConfig, TokenizerConfig):
    out_dir: str = "out"           # run folder: config, log, report, tokenizer, checkpoints
    preset: str = ""               # many flags at once, a key of PRESETS; other flags override it
    steps: int = 1500              # optimizer steps of the run
    tokens_per_step: int = 2048    # tokens of an optimizer step, over all ranks
    micro_batch: int = 0           # rows a device holds at once; 0 chooses. The rest of a step is accumulated
    objective: str = "clm"         # what is predicted: clm, the next token
    optimizer: str = "adamw"       # a key of OPTIMIZERS
    lr: float = 4e-3               # peak learning rate
    schedule: str = "cosine"       # learning rate over the run, a key of SCHEDULES
    warmup: int = 50               # steps of linear warm-up
    min_lr: float = 0.05           # learning rate at the end, as a share of the peak
    beta1: float = 0.9             # Adam: memory of the gradient
    beta2: float = 0.95            # Adam: memory of its square
    weight_decay: float = 0.1      # decay of matrices (gains and biases have none)
    grad_clip: float = 1.0         # largest gradient norm; 0 does not clip
    max_bad_steps: int = 10        # steps in a row without a finite loss and gradient, which change nothing, before the run ends
    dtype: str = "auto"            # of products: auto (bfloat16 where it is fast), float32 or bfloat16; weights stay float32
    compile: bool = False          # torch.compile every block
    log_every: int = 10            # steps between printed lines (log.jsonl has every step)
    eval_every: int = 250          # steps between evaluations and samples; 0 only at the end
    eval_tokens: int = 1_000_000   # validation tokens of an evaluation at most, spread evenly
    save_every: int = 250          # steps between checkpoints; 0 only at the end
    keep: int = 2                  # newest checkpoints that stay
    async_save: bool = False       # write checkpoints in the background; training waits for a copy in memory alone
    resume: str = flag("", bare="latest")  # go on with the run in out_dir: bare for its newest good checkpoint, or a path
    init_from: str = ""            # begin a new run from the weights in this folder (Hugging Face or a run of ours)
    grow_from: str = ""            # the same, in a larger model that begins as those weights do: with --moe, MLPs become experts
    overwrite: bool = False        # replace the run in out_dir
    plan: bool = False             # print what would run, and stop; with --world_size on a cluster that is not there
    device_gb: float = 80.0        # plan of a cluster: memory of a device, in 10^9 bytes
    sample: bool = False           # print samples from the run in out_dir, and stop
    prompt: str = ""               # sample: text to continue
    n_samples: int = 3             # sample: how many
    max_new_tokens: int = 200      # sample: tokens of each
    temperature: float = 0.8       # sample: 0 takes the likeliest token
    top_k: int = 50                # sample: choose among the k likeliest; 0 means all
    top_p: float = 1.0             # sample: choose among the fewest tokens that reach this probability
    repetition_penalty: float = 1.0  # sample: above 1 makes tokens that were there already less likely
    bench: bool = False            # time training steps on random tokens, and stop
    size: str = ""                 # bench: shape of the model, a key of SIZES; other flags override it
    bench_peer: str = ""           # bench: a nanoGPT checkout to time beside; none: nor transformers and litgpt, where installed

    @property
    def weights_from(self):
        return self.init_from or self.grow_from


# ---- Optimizer (how far does a weight move?) ----

def adamw(named, cfg):
    """torch's fused AdamW on (name, parameter) pairs; matrices decay, gains and biases do not.           [AdamW alg 2]"""
    named, is_vector = list(named), lambda name, p: p.ndim < 2 or ".b_" in name      # experts stack their biases
    matrices = [p for name, p in named if not is_vector(name, p)]
    vectors = [p for name, p in named if is_vector(name, p)]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)


OPTIMIZERS = {                     # flag --optimizer
    "adamw": adamw,
}


# ---- Schedules (pure functions of the progress, so a resumed run needs no state) ----

SCHEDULES = {                      # flag --schedule: progress in [0, 1] after the warm-up -> share of the way down
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),                                                # [SGDR eq 5]
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
}


def learning_rate(cfg, step):
    """Learning rate of `step` (from 0): linear warm-up, then --schedule down to min_lr of the peak."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - 1 - cfg.warmup)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * SCHEDULES[cfg.schedule](min(1.0, progress)))


def mtp_weight(cfg, step):
    """Weight of the MTP modules' loss: high while the stream takes shape, low late in the run.                 [DSV3 sec 4.2]"""
    return cfg.mtp_weight if step < cfg.mtp_late * cfg.steps else cfg.mtp_weight_late


# ---- Precision (which type do the products run in?) ----

DTYPES = ("auto", "float32", "bfloat16", "float16")      # flag --dtype
OBJECTIVES = ("clm",)                                    # flag --objective
READS = {"clm": ("decoder",)}                            # the architectures that an objective can train


def compute_dtype(cfg, device):
    """(dtype, reason). bfloat16 is the default on GPUs and on CPUs with instructions for it; elsewhere it is emulated."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "as asked"
    if device.type == "cuda":
        good = torch.cuda.is_bf16_supported()
        return (torch.bfloat16, "the GPU has it") if good else (torch.float32, "this GPU has no bfloat16")
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has instructions for it"
    return torch.float32, "this CPU has no bfloat16 instructions"


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# ---- The batch (tokens per step -> rows, micro-batches, ranks) ----

def batch_shape(cfg, ranks):
    """(rows of a step, rows of a micro-batch, micro-batches each copy of the model accumulates), for so many ranks in all."""
    dist.refuse_layout(cfg, ranks)
    return cfg.tokens_per_step // cfg.seq_len, *dist.micro_shape(cfg, ranks)


def micro_batches(loader, step, shape, world):
    """This rank's micro-batches of a step."""
    rows, micro, accumulate = shape
    first = step * rows + world.dp.rank * micro * accumulate
    return [loader.samples(first + i * micro, micro) for i in range(accumulate)]


def weight_of_step(batches, world):
    """The weight of all ranks' tokens together."""
    return dist.all_sum(world.dp, torch.stack([b["weights"].sum(dtype=torch.float64) for b in batches]).sum().to(world.device)).item()


# ---- Evaluation (what does it know of text it never saw?) ----

def evaluate(engine, loader, meta, cfg):
    """{val_loss (nats per token), val_ppl, val_bpb} of the validation text, each token counted once over all ranks."""
    engine.train(False)
    world, n = engine.world, min(loader.n_rows, max(1, cfg.eval_tokens // cfg.seq_len))
    chosen = [i * loader.n_rows // n for i in range(n)]
    size = max(1, 8192 // cfg.seq_len)
    lots = [chosen[i:i + size] for i in range(0, n, size)]
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for i in range(0, len(lots), world.dp.size):                 # copies of the model take turns; each runs as often as the others
        mine = i + world.dp.rank
        sums += engine.loss(loader.batch(lots[min(mine, len(lots) - 1)])) * (mine < len(lots))
    engine.train(True)
    loss = (lambda pair: pair[0] / pair[1])(dist.all_sum(world, sums).tolist())
    return dict(val_loss=loss, val_ppl=math.exp(min(loss, 700)),
                val_bpb=loss / math.log(2) * loader.n_tokens / meta["val_bytes"])


def sample_text(model, tok, eot, prompt, n, cfg, device, dtype, seed, max_new_tokens):
    """n continuations of a prompt, each cut at its end-of-text; the same for the same seed."""
    tokens_BT = torch.tensor([[eot, *tok.encode(prompt)]] * n, device=device)
    if model.cfg.pos == "learned":                               # there is no vector for a place beyond seq_len
        max_new_tokens = max(1, min(max_new_tokens, model.cfg.seq_len - tokens_BT.shape[1]))
    generator = torch.Generator(device).manual_seed(seed)
    eager = torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext()      # lengths change
    with autocast(device, dtype), eager:
        out = model.generate(tokens_BT, max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                             repetition_penalty=cfg.repetition_penalty, generator=generator, stop=[eot])
    texts = []
    for ids in out[:, 1:].tolist():
        stop = next((i for i, token in enumerate(ids) if token == eot or token >= tok.n_vocab), len(ids))
        texts.append(tok.decode(ids[:stop]))
    return texts


# ---- Run folder (config, log, checkpoints) ----

FREE_TO_CHANGE = {"out_dir", "resume", "overwrite", "plan", "device_gb", "sample", "prompt", "n_samples", "max_new_tokens", "temperature",
                  "top_k", "top_p", "repetition_penalty", "bench", "bench_peer", "size",
                  "log_every", "eval_every", "eval_tokens", "save_every", "keep",
                  "micro_batch", "ac", "timeout", "kernels", "compile", "steps", "cache_dir", "preset", "max_bad_steps", "async_save",
                  *DistConfig.__dataclass_fields__}
OURS = ("config.json", "log.jsonl", "report.html", "tokenizer", "ckpt", "data")


def read_run(out_dir):
    """The saved config.json of a run folder, or None where there is none."""
    try:
        return json.loads((Path(out_dir) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if dist.checkpoints(Path(out_dir) / "ckpt"):
            raise UsageError(f"{out_dir} holds checkpoints but no config.json; restore it, or start again with --overwrite") from None
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{out_dir}/config.json cannot be read ({error}); restore it, or start again with --overwrite") from None


def settle_config(typed):
    """The full config of this command: defaults, preset, the resumed run's own flags, what was typed; and all checks
    that need no data and no device."""
    preset = typed.get("preset", "")
    given = PRESETS.get(preset, {}) | SIZES.get(typed.get("size"), {}) | typed
    cfg = TrainConfig(**given)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):   # torchrun --max_restarts starts the same command again
        cfg.resume, cfg.overwrite = cfg.resume or "latest", False
    saved = read_run(cfg.out_dir) if not cfg.overwrite else None
    if cfg.resume and cfg.resume != "latest":
        path = Path(cfg.resume)
        if not (path / "manifest.json").is_file():
            raise UsageError(f"--resume={path} is not a checkpoint (no manifest.json); give a folder such as "
                             f"{cfg.out_dir}/ckpt/step_00000250, or bare --resume for the newest")
        saved = saved or dist.read_manifest(path)["state"]["config"]
    if cfg.resume and cfg.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite deletes it; give one of them")
    for name in ("init_from", "grow_from"):
        if cfg.resume and getattr(cfg, name) and (saved or {}).get(name, getattr(cfg, name)) != getattr(cfg, name):
            raise UsageError(f"--resume goes on with a run, --{name} begins a new one from weights; give one of them")
    if cfg.grow_from and (cfg.init_from or not cfg.moe and not cfg.resume):
        raise UsageError("--grow_from makes experts of a dense model's MLPs; give it --moe, and no --init_from")
    if cfg.resume and saved:
        known = {f.name: saved[f.name] for f in dataclasses.fields(TrainConfig) if f.name in saved}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}       # JSON has no tuples
        differ = [f"--{k}={typed_or(v)} (the run has {typed_or(known[k])})" for k, v in given.items()
                  if k in known and k not in FREE_TO_CHANGE and (tuple(v) if isinstance(v, list) else v) != known[k]]
        if differ:
            raise UsageError(f"the run in {cfg.out_dir} was started with other flags: {', '.join(differ)}; leave these out to "
                             f"resume it, or choose another --out_dir to begin a new run")
        axes = DistConfig.__dataclass_fields__.keys() - {"device", "timeout", "deterministic"}
        ranks, (pp, cp, tp, ep) = int(os.environ.get("WORLD_SIZE", "1")), (known.get(name, 1) for name in ("pp", "cp", "tp", "ep"))
        if axes & typed.keys() or ranks % (pp * cp * tp) or ranks // (pp * tp) % ep:
            known = {name: value for name, value in known.items() if name not in axes}     # another layout: all of it as typed now
        known["dp"] = 0                                          # whatever the others leave
        now = dict(resume=cfg.resume, overwrite=False, plan=cfg.plan, sample=cfg.sample, bench=cfg.bench, out_dir=cfg.out_dir)
        cfg = TrainConfig(**known | {k: v for k, v in given.items() if k in FREE_TO_CHANGE} | now)
    elif saved and not (cfg.plan or cfg.sample or cfg.bench):
        raise UsageError(f"{cfg.out_dir} already holds a run; go on with it by --resume, replace it by --overwrite, or "
                         f"choose another --out_dir")
    model_lib.validate(cfg)
    check_ranges(cfg)
    return cfg


AT_LEAST = dict(steps=1, tokens_per_step=1, micro_batch=0, warmup=0, log_every=1, eval_every=0, save_every=0, keep=1, eval_tokens=1,
                n_samples=1, max_new_tokens=1, device_gb=1, lr=0, weight_decay=0, grad_clip=0, temperature=0, top_k=0, seed=0, tokenizer_mb=0, subword_alpha=0)
SHARES = ("val_fraction", "beta1", "beta2", "min_lr", "top_p", "bpe_dropout")


def check_ranges(cfg):
    for name, low in AT_LEAST.items():
        if getattr(cfg, name) < low:
            raise UsageError(f"--{name}={getattr(cfg, name)} must be at least {low}, for example {getattr(TrainConfig, name)}")
    for name in SHARES:
        value = getattr(cfg, name)
        if not 0 <= value <= 1 or value == 0 and name in ("val_fraction", "top_p") or value == 1 and name in ("val_fraction", "beta1", "beta2"):
            raise UsageError(f"--{name}={value} must lie between 0 and 1, for example {getattr(TrainConfig, name)}")
    if cfg.size and not cfg.bench:
        raise UsageError(f"--size={cfg.size} is a shape to time; give it --bench, or choose one with --n_layer and --n_embd")
    if cfg.subword_alpha and not (cfg.tokenizer or cfg.weights_from or cfg.resume):
        raise UsageError("--subword_alpha samples Unigram tokenizers, and the one trained here is BPE; use --bpe_dropout=0.1, or name "
                         "a Unigram one with --tokenizer")
    if cfg.repetition_penalty <= 0:
        raise UsageError(f"--repetition_penalty={cfg.repetition_penalty} must be above 0; 1 leaves the model as it is, for example 1.2")
    if cfg.arch not in READS[cfg.objective]:
        raise UsageError(f"--objective={cfg.objective} predicts each next token, which --arch={cfg.arch} is shown or does not predict; "
                         f"use one of {[f'--arch={arch}' for arch in READS[cfg.objective]]}")
    for name in ("headless", "pooler", "mlm_head"):
        if getattr(cfg, name):
            raise UsageError(f"--{name} belongs to encoders, and --objective={cfg.objective} trains decoders; leave it out")
    model_lib.refuse_no_experts(cfg)
    if cfg.moe and cfg.n_active == 1 and (cfg.norm_gates or cfg.router == "chosen") and not cfg.weights_from:
        raise UsageError("--n_active=1: a gate divided by itself is 1, from which the router learns nothing; use --norm_gates=false with "
                         "--router=sigmoid or softmax")
    if cfg.dtype == "float16":
        raise UsageError("--dtype=float16 needs loss scaling (and is slower than float32 on a CPU); use bfloat16 or float32")


def typed_or(value):
    return " ".join(value) if isinstance(value, (list, tuple)) else value


def non_default(cfg):
    return [f"--{f.name}={typed_or(getattr(cfg, f.name))}" for f in dataclasses.fields(cfg)
            if getattr(cfg, f.name) != f.default and f.name not in ("plan", "resume", "overwrite")]


def check_disk(cfg, model, out_dir):
    """Refuse to start where the checkpoints will not fit."""
    probe = Path(out_dir).absolute()
    while not probe.exists():
        probe = probe.parent
    if not probe.is_dir():
        raise UsageError(f"{out_dir}: {probe} is a file, not a folder; choose another --out_dir")
    need = 12 * sum(p.numel() for p in model.parameters()) * (cfg.keep + 1)      # float32 weights and two moments
    free = shutil.disk_usage(probe).free
    if free < need:
        raise UsageError(f"{out_dir} has {free / 1e9:.2f} GB free and {cfg.keep + 1} checkpoints take {need / 1e9:.2f} GB; "
                         f"free some, choose another --out_dir, or a smaller --keep")
    if not os.access(probe, os.W_OK):
        raise UsageError(f"{out_dir} cannot be written; choose another --out_dir")


class Log:
    """log.jsonl: one JSON object a line, appended and flushed. A resumed run drops what came after its checkpoint."""

    def __init__(self, path, last_step):
        self.path, self.rows, self.broken = Path(path), [], False
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError):         # the last line of a killed run may be torn
                    row = json.loads(line)
                    self.rows += [row] * (row["step"] <= last_step)
        with atomic_write(self.path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.file = open(self.path, "a", encoding="utf-8")

    def add(self, **row):
        self.rows.append(row)
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:                                 # a full disk must not end the run
            if not self.broken:
                print(f"log.jsonl cannot be written ({error.strerror}); training goes on", flush=True)
            self.broken = True


def state_of(engine, optimizer):
    """{model.<name>, optimizer.<state>.<name>: what this rank holds of it}; per-parameter step counters are all equal and kept as one
    number."""
    held = {f"model.{name}": one for name, one in engine.held().items()}
    for share in engine.shares:
        for key, value in optimizer.state.get(share.local, {}).items():
            if key != "step":
                held.setdefault(f"optimizer.{key}.{share.name}", engine.held_like(share, value))         # once, also of a weight at both ends
    return held


@torch.no_grad()
def restore(engine, optimizer, saved):
    """Put a checkpoint's tensors back in place, every one of them, whatever layout they were saved on."""
    for name, one in engine.held().items():
        saved.fill(f"model.{name}", one)
    keys = {name.split(".")[1] for name in saved.table if name.startswith("optimizer.")}
    for share in engine.shares:
        own = optimizer.state[share.local] = {key: torch.zeros_like(share.local) for key in keys}
        for key, value in own.items():
            saved.fill(f"optimizer.{key}.{share.name}", engine.held_like(share, value))
        own["step"] = torch.tensor(float(saved.state["updates"]), device=share.local.device if share.local.is_cuda else "cpu")


# ---- Report (what a person sees) ----

def metrics_line(step, steps, *, loss, lr, gnorm, tok_s, mfu, mem, eta):
    """One line of progress; narrow terminals lose mfu and mem."""
    show = lambda value, form: "--" if value is None else format(value, form)
    wide = f" | mfu {show(mfu, '.1%')} | mem {show(mem, '.1f')} GB" if shutil.get_terminal_size().columns >= 100 else ""
    return (f"step {step:6d}/{steps} | loss {loss:.4f} | lr {lr:.2e} | gnorm {gnorm:5.2f} | {tok_s / 1e3:5.1f}k tok/s{wide} | "
            f"eta {clock(eta)}")


def eval_lines(step, steps, scores, metrics, text):
    """An evaluation, the load of the experts at that step, and the beginning of a sample."""
    load = "max_vio" in metrics and f" | expert load {metrics['min_load']:.2f} to {1 + metrics['max_vio']:.2f} of the mean"
    return (f"eval {step:6d}/{steps} | val loss {scores['val_loss']:.4f} | ppl {scores['val_ppl']:.2f} | bits/byte "
            f"{scores['val_bpb']:.4f}{load or ''}\n" + "\n".join("  | " + line for line in text.splitlines()[:12]))


def clock(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


def spark(values, width=40):
    """A curve in one line of text, from the lowest (space) to the highest (full block)."""
    values = [values[i * len(values) // width] for i in range(width)] if len(values) > width else values
    top = max(values) or 1
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * v / top)] for v in values)


def polyline(points, box, color):
    """SVG of a curve; at most 600 places across, each keeping its lowest and highest point, so no spike is lost."""
    (x0, x1), (y0, y1), (w, h) = box
    per = max(1, len(points) // 600)
    kept = []
    for i in range(0, len(points), per):
        part = points[i:i + per]
        ends = [min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])]
        kept += sorted(set(ends))
    at = lambda x, y: f"{(x - x0) / ((x1 - x0) or 1) * w:.1f},{h - (y - y0) / ((y1 - y0) or 1) * h:.1f}"
    return f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{" ".join(at(*p) for p in kept)}"/>'


def chart(title, series):
    """One panel: {name: [(x, y)]} on common axes, with the range written at its corners."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    xs, ys = ([p[i] for points in series.values() for p in points] for i in (0, 1))
    if not xs:
        return ""
    box = ((min(xs), max(xs)), (min(ys), max(ys)), (560, 180))
    colors = ("#4477aa", "#cc6644", "#228833")
    lines = "".join(polyline(points, box, color) for points, color in zip(series.values(), colors) if points)
    key = "".join(f'<tspan fill="{color}" dx="8">{name}</tspan>' for name, color in zip(series, colors))
    return (f'<figure><svg viewBox="-70 -28 650 236"><text x="0" y="-10" class="t">{title}{key}</text>'
            f'<rect width="560" height="180" fill="none" stroke="#8886"/>{lines}'
            f'<text x="-6" y="10" text-anchor="end">{max(ys):.4g}</text><text x="-6" y="180" text-anchor="end">{min(ys):.4g}</text>'
            f'<text x="0" y="198">{min(xs):,}</text><text x="560" y="198" text-anchor="end">{max(xs):,}</text></svg></figure>')


def write_report(path, cfg, rows, facts, running):
    """One HTML file without scripts or links; it reloads itself while the run lives."""
    curve = lambda key: [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    charts = [chart("loss, nats per token", {"train": curve("loss"), "validation": curve("val_loss")}),
              chart("validation, bits per byte", {"": curve("val_bpb")}), chart("learning rate", {"": curve("lr")}),
              chart("gradient norm", {"": curve("grad_norm")}), chart("tokens per second", {"": curve("tok_per_s")}),
              chart("expert load: largest over mean, less one", {"": curve("max_vio")})]
    text = "".join(f"<h3>step {row['step']}</h3><pre>{html.escape(row['sample'])}</pre>"
                   for row in reversed(rows) if "sample" in row)
    with atomic_write(path, "w") as file:
        file.write(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(cfg.out_dir)}</title>'
                   + '<meta http-equiv="refresh" content="10">' * running +
                   '<meta name="viewport" content="width=device-width"><style>:root{color-scheme:light dark}'
                   'body{font:15px system-ui;margin:2em auto;max-width:1240px;padding:0 1em}svg{width:100%}'
                   'svg text{font-size:13px;fill:currentColor}.t{font-weight:600}figure{margin:0}'
                   'main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1em}'
                   'pre{overflow-x:auto;padding:1em;border:1px solid #8886;white-space:pre-wrap}</style>'
                   f"<h1>{html.escape(cfg.out_dir)}</h1><pre>{html.escape(facts)}</pre><main>{''.join(charts)}</main>"
                   f"<h2>Samples</h2>{text or '<p>none yet</p>'}</html>")


# ---- Plan (what would run?) ----

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}   # dense bf16, by device name


def peak_flops(device, dtype):
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name(device)), None)


def describe(cfg, model, device, dtype, reason, ranks):
    """The facts of a run, as printed before step 0."""
    (rows, micro, accumulate), copies = batch_shape(cfg, ranks), dist.copies_of_model(cfg, ranks)
    total, active = sum(p.numel() for p in model.parameters()), model_lib.active_parameters(model)
    parts = ", ".join(f"{kind} {count:,}" for kind, count in model_lib.parameter_table(model).items())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    tokens = cfg.steps * cfg.tokens_per_step
    flags = " ".join(non_default(cfg)) or "all at their defaults"
    unused = model_lib.unused(cfg, [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default])
    state = 16 * total                                           # float32 weights, gradients and two moments
    return "\n".join((
        f"device   {name} x {ranks} | {str(dtype)[6:]} ({reason}) | kernels: {kernels.use(cfg.kernels)} | "
        f"attention: {attention.backends(model.cfg, model.plan, device, dtype)} | "
        + f"experts: {dispatch_of(cfg, device, dtype)} | " * cfg.moe +
        f"compile: {'on' if cfg.compile else 'off'} | torch {torch.__version__}",
        f"model    {total:,} parameters" + (f", {active:,} active a token" if active != total else "") + f" ({parts})",
        f"         {cfg.n_layer} layers, {model_lib.flops_per_token(model, cfg.seq_len) / 1e6:,.1f} MFLOPs a token, "
        f"{state / 1e9:.2f} GB of weights, gradients and optimizer state",
        *([f"layout   {ranks} ranks = {dist.layout_line(cfg, ranks)}"] if ranks > 1 else []),
        f"batch    {cfg.tokens_per_step:,} tokens a step = {rows} rows of {cfg.seq_len} = {micro} rows x {accumulate} accumulated x "
        + (f"dp {copies}" if ranks > 1 else "1 rank"),
        f"run      {cfg.steps:,} steps = {tokens:,} tokens = {tokens / total:.1f} a parameter",
        f"lr       {spark([learning_rate(cfg, s) for s in range(cfg.steps)])}  peak {cfg.lr:g}, end {learning_rate(cfg, cfg.steps - 1):g}",
        f"flags    {flags}", *(f"unused   --{name}={getattr(cfg, name)}: it needs {needs}" for name, needs in unused.items()),
        f"output   {cfg.out_dir}/ (stop with Ctrl-C at any time; go on with: python train.py --out_dir={cfg.out_dir} --resume)"))


def describe_data(cfg, meta, loader, rows):
    """The same of the text, once it is there."""
    facts = (f"\ndata     {meta['documents']:,} documents: {meta['train_tokens']:,} training tokens, {meta['val_tokens']:,} for validation "
             f"({meta['train_bytes'] / meta['train_tokens']:.2f} bytes a token); {loader.n_rows:,} rows an epoch")
    if isinstance(loader, data.Mixture):
        shares = zip(cfg.input, loader.epochs(cfg.steps * rows))
        facts += "\nmix      " + ", ".join(f"{source} {epochs:.2f} epochs" for source, epochs in shares)
    return facts


def plan(cfg, typed):
    """Print the facts without touching data; the real run does exactly this."""
    ranks = dist.validate(cfg)
    world = dist.init(cfg) if ranks == 1 else dist.World(device=torch.device("cpu"))
    dtype, reason = compute_dtype(cfg, world.device)
    cfg = model_flags_of(cfg, typed)[0] if cfg.weights_from else cfg
    if os.environ.get("RANK", "0") == "0":
        print(describe(cfg, model_lib.meta_model(cfg), world.device, dtype, reason, ranks), flush=True)


def flags_of_layout(cfg):
    names = ("pp", "pp_schedule", "microbatches", "cp", "cp_mode", "tp", "sp", "ep", "fsdp", "hsdp", "ac", "micro_batch")
    return " ".join(f"--{name}={getattr(cfg, name)}" for name in names if getattr(cfg, name) != getattr(TrainConfig, name))


MEMORY = ("weights", "gradients", "optimizer", "activations", "total")


def plan_cluster(cfg, typed):
    """Print what a layout of --world_size ranks would hold, send and wait for, and which layouts would be faster. Formulas alone: no
    process group, no data, no weights."""
    cfg = model_flags_of(cfg, typed)[0] if cfg.weights_from else cfg
    size, cuda, human = cfg.world_size, cfg.device != "cpu", lambda n: model_lib.human(n, "B")
    dtype = torch.bfloat16 if cuda and cfg.dtype == "auto" else compute_dtype(cfg, torch.device("cpu"))[0]
    dp, assumed = max(1, size // max(1, cfg.pp * cfg.cp * cfg.tp)), "tokens_per_step" not in typed and not cfg.resume
    if assumed:                                                  # four micro-batches a stage, each of about 4,096 tokens
        cfg.micro_batch = cfg.micro_batch or max(1, 4096 // cfg.seq_len)
        cfg.tokens_per_step = cfg.seq_len * cfg.micro_batch * dp * (4 * cfg.pp if cfg.pp > 1 else 1)
    dist.refuse_layout(cfg, size)
    model, peak, (rows, number) = model_lib.meta_model(cfg), PEAK_FLOPS["H100"] * 2 / dtype.itemsize, dist.micro_shape(cfg, size)
    of_model = model_lib.pieces(model), dtype.itemsize, cuda
    ranks, best = dist.planned(cfg, size, *of_model), dist.advise(cfg, size, *of_model, cfg.device_gb * 1e9, peak)

    def parameters(active):
        table = model_lib.parameter_table(model, active)
        ahead, total = table.get("mtp", 0), sum(table.values())
        billions = lambda n: f"{n / 1e9:,.2f} B" if n >= 1e9 else model_lib.human(n)
        return billions(total - ahead) + f" without MTP, {billions(total)} with it" * bool(ahead)

    groups, sent = {}, {}
    for row in ranks:
        shape = tuple(high - low for low, high in row["blocks"]), tuple(row["ends"]), row["params"], *(row[name] for name in MEMORY)
        groups.setdefault(shape, []).append(row)
        sent.setdefault(tuple(sorted((-n, axis, what) for (axis, what), n in row["sends"].items())), []).append(row["rank"])
    out = [f"cluster  {size:,} ranks = pp {cfg.pp}{f' ({cfg.pp_schedule})' * (cfg.pp > 1)} x dp {dp} x cp {cfg.cp} x tp {cfg.tp}"
           + f" | experts: ep {cfg.ep} x {dp * cfg.cp // cfg.ep} copies" * cfg.moe + f" | fsdp {cfg.fsdp} | ac {cfg.ac} | {str(dtype)[6:]}",
           f"model    parameters: {parameters(False)}", f"active   of a token: {parameters(True)}",
           f"batch    {cfg.tokens_per_step:,} tokens a step{' (assumed)' * assumed} = {dp} copies x {number} micro-batch{'es' * (number > 1)} x {rows} "
           f"row{'s' * (rows > 1)} of {cfg.seq_len:,}", "",
           f"{'memory of a rank of each stage':36s}{'parameters':>12s}" + "".join(f"{name:>13s}" for name in MEMORY)]
    for (counts, ends, params, *memory), at in groups.items():
        blocks = [model_lib.ranges(range(*ends_of)) for ends_of in at[0]["blocks"]] if len(at) == 1 else map(str, counts)
        what = ", ".join([f"blocks {' and '.join(blocks)}" if len(at) == 1 else f"{' and '.join(blocks)} blocks", *ends])
        out.append(f"  {model_lib.ranges([row['rank'] for row in at]) + ': ' + what:34s}{model_lib.human(params):>12s}"
                   + "".join(f"{human(n):>13s}" for n in memory))
    out += ["", "sent in a step by a rank of each stage: axis, collective, bytes"]
    for moves, at in sent.items():
        out.append(f"  {model_lib.ranges(at)}: " + (", ".join(f"{axis} {what} {human(-n)}" for n, axis, what in moves) or "nothing"))
    if cfg.pp > 1:
        w, source = dist.BUBBLES[cfg.pp_schedule]
        waits = f"{dist.bubble(cfg, number):.1%} of a step = (p-1) / ({f'{w} ' * (w > 1)}m + p-1)"
        out += ["", f"bubble   {waits} of p = {cfg.pp} ranks and m = {number} micro-batches  {source}"]
    out += ["", f"layouts that fit {0.9 * cfg.device_gb:.0f} of {cfg.device_gb:.0f} GB, fastest first; by estimate, where products reach "
            f"{dist.REACHED:.0%} of {peak / 1e12:.0f} TFLOP/s,", f"links {dist.FAST / 1e9:.0f} GB/s among {dist.NODE} neighbours and "
            f"{dist.SLOW / 1e9:.0f} beyond, nothing is sent while a rank computes, and experts are visited alike"]
    for name, (seconds, other, held) in [("this", (dist.step_seconds(cfg, size, ranks, peak), cfg, ranks)), *zip("123", best)]:
        most, waits = max(row["total"] for row in held), dist.bubble(other, dist.micro_shape(other, size)[1])
        out.append(f"  {name:5s}{seconds[0]:8.3g} s a step: computing {seconds[1]:.3g} and {waits:.1%} bubble, sending {seconds[2]:.3g} | "
                   f"{human(most)}{', which does not fit' * (most > 0.9e9 * cfg.device_gb)} | {flags_of_layout(other)}")
    out += [] if best else ["  none; more ranks, a smaller --tokens_per_step or a larger --device_gb would have some"]
    print("\n".join(out), flush=True)


# ---- Sample ----

def sample(cfg, typed):
    world = dist.init(cfg)
    source = Path(cfg.init_from or cfg.out_dir)
    if not source.is_dir():
        raise UsageError(f"there is no run in {source}; train one first with: python train.py --out_dir={source}")
    if cfg.resume and cfg.resume != "latest":
        source = Path(cfg.resume)
    model = model_lib.from_pretrained(source, world.device)
    home = Path(cfg.init_from or cfg.out_dir)
    tok = tok_lib.load(cfg.tokenizer or (home / "tokenizer" if (home / "tokenizer").is_dir() else home))
    dtype, _ = compute_dtype(cfg, world.device)
    texts = sample_text(model, tok, data.end_of_text(tok), cfg.prompt, cfg.n_samples, cfg, world.device, dtype, cfg.seed,
                        cfg.max_new_tokens)
    for number, text in enumerate(texts):
        print(f"--- sample {number + 1} of {cfg.n_samples}\n{text}", flush=True)



# ---- Bench (how fast is a step, and where does it go?) ----

SIZES = {                          # flag --size: 16,384 tokens at once
    "124m": dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024, vocab_size=50304, micro_batch=16, tokens_per_step=16384),
    "350m": dict(n_layer=24, n_head=16, n_embd=1024, seq_len=1024, vocab_size=50304, micro_batch=16, tokens_per_step=16384),
    "1.3b": dict(n_layer=24, n_head=16, n_embd=2048, seq_len=2048, vocab_size=50304, micro_batch=8, tokens_per_step=16384),
}

OP_CLASSES = {                     # the first whose pattern an op or one of its callers matches; the rest is norms and elementwise
    "optimizer": r"optimizer|adamw|_foreach_", "head and loss": r"cross_entropy|nll_loss|log_softmax",
    "attention": r"attention|flash|softmax|bmm|decayed", "matmul": r"(^|/)aten::_?(add|grouped_)?mm(/|$)",
}


def refuse_what_does_not_fit(cfg, device, params):
    """Weights, gradients and two moments in float32, and 32 bytes a channel, token and layer of activations."""
    need = 16 * params + 32 * cfg.n_embd * cfg.n_layer * batch_shape(cfg, 1)[1] * cfg.seq_len
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > there:
        raise UsageError(f"--bench of {params:,} parameters takes about {need / 1e9:.0f} GB, and {device} has {there / 1e9:.0f}; "
                         f"use a smaller --size (one of {list(SIZES)}) or --micro_batch")


def bench(cfg, typed):
    """Whole training steps (forward, backward, clip, update) on random tokens: ours and those of other programs, in turn."""
    world = dist.init(cfg)
    device, (dtype, _), (B, T) = world.device, compute_dtype(cfg, world.device), (batch_shape(cfg, world.size)[1], cfg.seq_len)
    refuse_what_does_not_fit(cfg, device, sum(p.numel() for p in model_lib.meta_model(cfg).parameters()))
    ids = torch.randint(cfg.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    batch = dict(tokens=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous(), weights=torch.ones(B, T),
                 positions=torch.arange(T).expand(B, T).contiguous(), doc_ids=torch.zeros(B, T, dtype=torch.long))
    batch = {name: t.to(device) for name, t in batch.items()}
    model = Model(cfg).to(device)
    compile_blocks(model, cfg, world)

    def mean_loss():
        loss_sum, weight, _ = model.loss(batch)
        return loss_sum / weight

    def stepping(net, loss, optimizer, dtype):
        def step():
            with autocast(device, dtype):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.item()
        return step

    makers = {f"this repo, {str(dtype)[6:]}": lambda: (model, mean_loss, OPTIMIZERS[cfg.optimizer](model.named_parameters(), cfg), dtype)}
    if cfg.bench_peer != "none":
        makers |= peers(cfg, model, batch, device, dtype)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'cpu, {torch.get_num_threads()} threads'} | torch {torch.__version__} | "
          f"kernels: {kernels.use(cfg.kernels)} | {cfg.n_layer} layers, n_embd {cfg.n_embd}, {B} rows of {T}, vocabulary {cfg.vocab_size}, attn "
          f"{cfg.attn}, act {cfg.act}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    made, runs, memory, allocated = {}, {}, {}, torch.cuda.memory_allocated if device.type == "cuda" else lambda: 0

    def tried(name, f):
        try:
            return f()
        except Exception as error:                               # of somebody else's code anything may come
            if name == next(iter(makers)):
                raise
            print(f"{name} does not run here: {type(error).__name__}: {str(error).strip()[:200]}", flush=True)

    for name, make in makers.items():                            # all before the first step, which changes the weights they share
        before = allocated()
        if one := tried(name, make):
            made[name] = stepping(*one), allocated() - before
    for name, (step, static) in made.items():
        before = allocated()
        if losses := tried(name, lambda: [step()]):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step()
            runs[name] = step
            memory[name] = f"{(torch.cuda.max_memory_allocated() - before + static) / 1e9:.2f}" if device.type == "cuda" else "--"
            print(f"{name:36s} loss of the first step {losses[0]:.4f}", flush=True)
    times = [kept[len(kept) // 2] for kept in kernels.samples(list(runs.values()), device.type, seconds=15)]
    for (name, step), ms in zip(runs.items(), times):
        print(f"{name:36s} {ms:9.1f} ms/step {B * T / ms * 1e3:12,.0f} tok/s {ms / times[0]:6.2f}x our time   peak {memory[name]} GB")
    print("time: between events" if device.type == "cuda" else "time: of the processor, all threads")
    flops, scores = model_lib.flops_per_token(model, T), sum(
        mixer.macs(T) for block in model.blocks for mixer in model_lib.mixers(block) if not mixer.recurrent)
    peak, rate, reached = peak_flops(device, dtype), kernels.matmul_rate(device.type, dtype), B * T / times[0] * 1e3
    mfu = lambda flops, peak: f"{reached * flops / peak:.1%}" if peak else "--"
    print(f"MFU {mfu(flops, peak)} PaLM's convention (12 L C T: whole squares), {mfu(flops - 3 * scores, peak)} causal (6 L C T); "
          f"{mfu(flops, rate)} and {mfu(flops - 3 * scores, rate)} of the {rate / 1e12:.2f} TFLOP/s that a large product reaches here")
    print("step     " + ", ".join(f"{name} {share:.0%}" for name, share in step_shares(next(iter(runs.values())), device).items()))


def step_shares(step, device):
    """{class of op: share of a step's time}, from the profiler."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device.type == "cuda")) as profiler:
        step()
    shares = dict.fromkeys(("matmul", "attention", "norms and elementwise", "head and loss", "optimizer"), 0.0)
    for event in profiler.events():
        callers, at = [], event
        while at is not None:
            callers, at = [*callers, at.name], at.cpu_parent
        chain = "/".join(callers).lower()
        kind = next((kind for kind, pattern in OP_CLASSES.items() if re.search(pattern, chain)), "norms and elementwise")
        if event.device_type == torch.autograd.DeviceType.CPU:
            shares[kind] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    return {kind: time / max(1e-9, sum(shares.values())) for kind, time in shares.items()}


def peers(cfg, model, batch, device, dtype):
    """{name: () -> (module, () -> mean loss, optimizer, dtype)} of other programs' models of this shape, compiled if ours is."""
    def ready(net, logits, optimizer=None, dtype=dtype):
        net = net.to(device).train()
        if cfg.compile and device.type == "cuda":
            net.compile()
        loss = lambda: torch.nn.functional.cross_entropy(logits(net).float().flatten(0, 1), batch["targets"].flatten())
        return net, loss, optimizer or torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True), dtype

    def transformers():                                          # with our weights, so its first loss is ours
        lib = importlib.import_module("transformers")
        with tempfile.TemporaryDirectory() as folder:
            model_lib.save_pretrained(model, folder)
            net = lib.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        return ready(net, lambda net: net(batch["tokens"], use_cache=False).logits)

    def litgpt():
        lib = importlib.import_module("litgpt")
        return ready(lib.GPT(lib.Config(name="peer", block_size=cfg.seq_len, vocab_size=cfg.vocab_size, padded_vocab_size=cfg.vocab_size,
                                        n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, n_query_groups=cfg.n_kv_head or cfg.n_head,
                                        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
                                        mlp_class_name="LLaMAMLP", intermediate_size=model_lib.hidden_width(cfg))), lambda net: net(batch["tokens"]))

    def nanogpt(lib, dtype):
        with contextlib.redirect_stdout(None):
            net = lib.GPT(lib.GPTConfig(block_size=cfg.seq_len, vocab_size=cfg.vocab_size, n_layer=cfg.n_layer, n_head=cfg.n_head,
                                        n_embd=cfg.n_embd, dropout=0.0, bias=False)).to(device)
            optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
        return ready(net, lambda net: net(batch["tokens"], batch["targets"])[0], optimizer, dtype)

    found = {}
    if cfg.bench_peer:
        path = Path(cfg.bench_peer) / "model.py"
        if not path.is_file():
            raise UsageError(f"--bench_peer={cfg.bench_peer} holds no model.py; give a checkout of nanoGPT, or none")
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)
        lib = importlib.util.module_from_spec(spec)
        sys.modules["nanogpt_model"] = lib                       # its dataclass looks itself up there
        spec.loader.exec_module(lib)
        for kind in dict.fromkeys((torch.float32, dtype)):
            shipped = "as shipped" if kind == torch.float32 else "autocast added"
            found[f"nanoGPT, {str(kind)[6:]} {shipped}"] = lambda kind=kind: nanogpt(lib, kind)
    for make in (transformers, litgpt):
        if importlib.util.find_spec(make.__name__):
            found[f"{make.__name__}, {str(dtype)[6:]}"] = make
    return found


# ---- Main ----

def model_flags_of(cfg, typed):
    """(cfg with the architecture of --init_from or --grow_from, its model). Typed flags may not contradict the weights; those of
    the experts say what dense ones grow into."""
    home, source = cfg.weights_from, model_lib.from_pretrained(cfg.weights_from)
    if source.cfg.arch not in READS[cfg.objective] or source.cfg.headless:
        raise UsageError(f"{home} holds an {source.cfg.arch}{' without a head' * source.cfg.headless}, which "
                         f"--objective={cfg.objective} does not train; use weights of a decoder")
    shape = {f.name: getattr(source.cfg, f.name) for f in dataclasses.fields(ModelConfig) if f.name not in ("seed", "seq_len")}
    shape |= model_lib.pinned(source.cfg)                        # what seq_len says by default stays as it was
    if source.cfg.pos == "learned":
        shape["seq_len"] = min(cfg.seq_len, source.cfg.seq_len) if "seq_len" in typed else source.cfg.seq_len
        if typed.get("seq_len", 0) > source.cfg.seq_len:
            raise UsageError(f"--seq_len={cfg.seq_len}, but {home} has learned positions for {source.cfg.seq_len} tokens only")
    if cfg.preset:
        raise UsageError(f"--preset={cfg.preset}: the weights in {home} say themselves what model they are; leave it out")
    of_the_run = {name for name in typed if re.fullmatch(model_lib.TRAINING, name)}          # dropout and the like: no weights
    experts = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(MoEConfig)} if cfg.grow_from else {}
    for name, value in shape.items():
        if name in typed and typed[name] != value and name not in of_the_run | experts.keys():
            raise UsageError(f"--{name}={typed[name]}, but the weights in {home} have {value}; leave --{name} out")
    cfg = dataclasses.replace(cfg, **shape | {name: typed[name] for name in of_the_run})
    model = model_lib.rebuilt(source, cfg)
    if experts:
        model = model_lib.upcycled(model, dataclasses.replace(cfg, **experts))
    return model.cfg, model


def compile_blocks(model, cfg, world):
    """As --compile asks; without a C++ compiler on a CPU the model stays eager and says so."""
    if cfg.compile and world.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        world.print("compile: no C++ compiler (g++) on this machine, so the blocks run eagerly")
    elif cfg.compile:
        for module in model.modules():
            if isinstance(module, Experts):                      # a loop with as many branches as experts: minutes to compile
                module.forward = torch.compiler.disable(module.forward)
        for block in [*model.enc_blocks, *model.blocks, *(module.block for module in model.mtp)]:
            block.compile()


def prepare_data(cfg, world, state):
    """(folder, meta, tokenizer): rank 0 prepares, the others open; a resumed run must find the text it began with."""
    saved = state and Path(data.cache_root(cfg, cfg.out_dir)) / state["data"]
    if saved and (saved / "meta.json").is_file():
        folder = saved
    else:
        if cfg.weights_from and not cfg.tokenizer:
            home = Path(cfg.weights_from)                           # a run, one of its checkpoints, or a Hugging Face folder
            folders = [home / "tokenizer", home.absolute().parent.parent / "tokenizer"]
            cfg.tokenizer = str(next((folder for folder in folders if folder.is_dir()), home))
        folder = data.prepare(cfg, cfg.vocab_size, cfg.out_dir, world.print) if world.main else ""
        folder = Path(dist.from_main(world, str(folder)))
        if state and folder.name != state["data"]:
            raise UsageError(f"the text changed since the checkpoint was saved ({state['data']} then, {folder.name} now); "
                             f"restore the files of --input, or begin a new run from the weights with --init_from={cfg.out_dir}")
    return folder, *data.open_prepared(folder)


def width_of(cfg, typed, state, source, tok):
    """Ids of the model: as the tokenizer has, unless a checkpoint, weights or (beside a given tokenizer) --vocab_size say more."""
    fixed = source or cfg.tokenizer and "vocab_size" in typed
    wanted = state["config"]["vocab_size"] if state else cfg.vocab_size if fixed else tok.n_vocab
    if wanted < tok.n_vocab:
        raise UsageError(f"the tokenizer has {tok.n_vocab} ids, but the model only {wanted}; use "
                         + ("the --tokenizer that belongs to these weights" if source or state else f"--vocab_size={tok.n_vocab} or more"))
    return wanted


def main(argv):
    typed = parse(argv)
    cfg = settle_config(typed)
    if cfg.plan and cfg.world_size:
        return plan_cluster(cfg, typed)
    ranks = dist.validate(cfg)
    if not cfg.weights_from:                                     # which weights may say how long rows are
        batch_shape(cfg, ranks)
    if not cfg.compile:
        kernels.skip_dynamo()
    kernels.use(cfg.kernels)
    for chosen, action in ((cfg.plan, plan), (cfg.sample, sample), (cfg.bench, bench)):
        if chosen:
            return action(cfg, typed)
    train(cfg, typed)


def listen_for_stop():
    """A list that SIGTERM or Ctrl-C makes longer: the step is finished and saved first. A second signal ends the process
    at once."""
    stop = []

    def on_signal(number, frame):
        signal.signal(number, signal.SIG_DFL)
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


def open_run(cfg, typed, world):
    """All that a run begins with or goes on from, (config, checkpoint, weights, prepared folder, its facts, tokenizer, loaders, ids of the model):
    what can be refused is refused here, before the run folder is touched."""
    out, saved, source = Path(cfg.out_dir), None, None
    dist.agree(world, "flags", " ".join(non_default(cfg)))
    if cfg.resume:
        saved = dist.open_checkpoint(cfg.resume, world) if cfg.resume != "latest" else dist.newest_checkpoint(out / "ckpt", world.print, world)
        if saved is None:
            world.print(f"--resume: {out} has no checkpoint yet, so the run begins at step 0")
    state = saved and saved.state
    if cfg.weights_from and not state:
        cfg, source = model_flags_of(cfg, typed)
        batch_shape(cfg, world.size)
    check_disk(cfg, model_lib.meta_model(cfg), out)
    folder, meta, tok = prepare_data(cfg, world, state)
    vocab_size = width_of(cfg, typed, state, source, tok)
    return cfg, saved, source, folder, meta, tok, data.open_loaders(cfg, folder, meta, tok), vocab_size


def train(cfg, typed):
    world = dist.init(cfg)
    cfg, saved, source, folder, meta, tok, loaders, vocab_size = open_run(cfg, typed, world)
    out, say, state, start = Path(cfg.out_dir), world.print, saved and saved.state, saved.step if saved else 0

    # the model, spread over the ranks, its optimizer, and where the run stands
    dtype, reason = compute_dtype(cfg, world.device)
    model_cfg = dataclasses.replace(cfg, vocab_size=vocab_size)
    model = source or Model(model_cfg)
    model.cfg = model_cfg
    compile_blocks(model, cfg, world)
    shape, facts = batch_shape(cfg, world.size), describe(cfg, model, world.device, dtype, reason, world.size)
    facts += describe_data(cfg, meta, loaders["train"], shape[0])
    flops, peak = model_lib.flops_per_token(model, cfg.seq_len), peak_flops(world.device, dtype)
    total = sum(p.numel() for p in model.parameters())
    engine = dist.Engine(model, world, model_cfg, functools.partial(autocast, world.device, dtype))
    optimizer = OPTIMIZERS[cfg.optimizer](engine.named(), cfg)
    if state:
        restore(engine, optimizer, saved)
    model = saved = source = None                                # what was copied or cut away need not stay in memory
    say(facts)
    if start >= cfg.steps:
        say(f"the run is complete: step {start} of {cfg.steps}; give a larger --steps to go on")
        engine = None
        return dist.shutdown()
    lock, log = dist.lock(world, out), start_run_folder(cfg, world, engine, tok, start, total)

    stop, seconds, recent, paused, begun = listen_for_stop(), state["seconds"] if state else 0.0, [], 0.0, time.perf_counter()
    updates, bad = state["updates"] if state else 0, 0

    def save(step, background):
        facts = dict(step=step, updates=updates, next_sample=step * shape[0], tokens=step * cfg.tokens_per_step, seconds=seconds,
                     data=folder.name, config=dataclasses.asdict(model_cfg))
        act = functools.partial(dist.save_checkpoint, out / "ckpt", step, state_of(engine, optimizer), facts, cfg.keep, world, background)
        for which, act in (("before this one", dist.saving), (f"at step {step}", act)):
            try:
                act()
            except OSError as error:
                say(f"checkpoint {which} NOT saved ({error.strerror}); training goes on, next try at the next interval")

    engine.train()
    ahead = data.prefetch((micro_batches(loaders["train"], step, shape, world) for step in range(start, cfg.steps)), cfg.prefetch)
    for step, batches in zip(range(start, cfg.steps), ahead):
        dist.watch(world, cfg.timeout)                           # a rank that hangs is not waited for
        tick = time.perf_counter()
        weight, lr = weight_of_step(batches, world), set_pace(cfg, step, engine, optimizer)
        loss, metrics, stopping = of_all_ranks(world, *engine.step(batches, weight), weight, len(stop))
        gnorm = engine.clip_grad(cfg.grad_clip).item()
        good = math.isfinite(loss + gnorm)
        updates, bad = updates + good, 0 if good else bad + 1
        if good:
            optimizer.step()
        engine.zero_grad()
        metrics |= update_biases(engine.models, world, moving=good and step < cfg.bias_until * cfg.steps)

        took = time.perf_counter() - tick
        seconds, recent = seconds + took, (recent + [took])[-50:]
        done, last = step + 1, step + 1 == cfg.steps or stopping
        tok_s = cfg.tokens_per_step / took
        if world.main:
            log.add(step=done, loss=loss, lr=lr, grad_norm=gnorm, tokens=done * cfg.tokens_per_step, tok_per_s=tok_s,
                    seconds=seconds, **metrics | ({} if good else dict(skipped=True)))
            if done % cfg.log_every == 0 or last or done == start + 1:
                typical = sorted(recent)[len(recent) // 2]
                pauses = 1 + paused / max(1e-9, time.perf_counter() - begun - paused)      # evaluations and saves to come
                say(metrics_line(done, cfg.steps, loss=loss, lr=lr, gnorm=gnorm, tok_s=cfg.tokens_per_step / typical,
                                 mfu=peak and flops * tok_s / world.size / peak, eta=(cfg.steps - done) * typical * pauses,
                                 mem=torch.cuda.max_memory_allocated() / 1e9 if world.device.type == "cuda" else None))
        if not good:
            say(f"step {done}: loss {loss}, gradient norm {gnorm}: not finite on some rank, so no rank moved its weights ({bad} in a row)")
        if bad >= cfg.max_bad_steps:
            dist.saving()
            raise UsageError(f"{bad} steps in a row without a finite loss and gradient; the last checkpoint in {out}/ckpt is good. Begin "
                             f"anew from it with --init_from={out} and a smaller --lr than {cfg.lr:g}")
        dist.watch(world, cfg.timeout)
        tick = time.perf_counter()
        if done == cfg.steps or cfg.eval_every and done % cfg.eval_every == 0 and not stopping:
            scores, whole = evaluate(engine, loaders["val"], meta, cfg), engine.on_main()
            if world.main:
                text = sample_text(whole, tok, meta["eot"], "", 1, cfg, world.device, dtype, cfg.seed + done, 100)[0] if whole else ""
                log.add(step=done, **scores, seconds=seconds, sample=text)
                say(eval_lines(done, cfg.steps, scores, metrics, text))
        if last or cfg.save_every and done % cfg.save_every == 0:
            save(done, cfg.async_save and not last)
        if world.main and (last or cfg.eval_every and done % cfg.eval_every == 0):
            try:
                write_report(out / "report.html", cfg, log.rows, facts, running=not last)
            except OSError as error:
                say(f"report.html NOT written ({error.strerror}); training goes on")
        paused += time.perf_counter() - tick
        if stopping:
            say(f"stopped at step {done}; go on with: python train.py --out_dir={out} --resume")
            break
    else:
        say(f"done in {clock(time.perf_counter() - begun)}: {out}/report.html shows the run; sample with: "
            f"python train.py --out_dir={out} --sample")
    ahead.close()
    engine = None                                                # DDP lets go of the group before the group ends
    dist.shutdown()
    if lock is not None:
        os.close(lock)


def set_pace(cfg, step, engine, optimizer):
    """What a step is given as a function of its number alone: learning rate (returned), weight of MTP's loss, randomness of dropout."""
    lr = learning_rate(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for model in engine.models:
        model.mtp_weight = mtp_weight(cfg, step)
    torch.manual_seed(((cfg.seed * 1_000_003 + step) * 65_537 + engine.world.batch.rank) % 2**63)
    return lr


def of_all_ranks(world, loss_sum, said, weight, stops):
    """(loss of the step, {metric: its mean}, did anybody ask to stop?), the same on all ranks."""
    flat = [loss_sum / weight, loss_sum.new_tensor(stops), *(number for pair in said.values() for number in pair)]
    loss, stops, *sums = dist.all_sum(world, torch.stack(flat)).tolist()
    return loss, {name: nll / max(mass, 1e-20) for name, nll, mass in zip(said, sums[::2], sums[1::2])}, stops > 0


def start_run_folder(cfg, world, engine, tok, start, total):
    """Clear a replaced run, write config.json and the tokenizer; the main rank's open log."""
    out = Path(cfg.out_dir)
    here = json.dumps(sum(share.local.numel() for share in engine.shares))
    local = [json.loads(text) for text in dist.all_texts(world, here)]
    if not world.main:
        return None
    if cfg.overwrite:
        for name in OURS[:-1]:                                   # prepared data is named by its content and stays
            shutil.rmtree(out / name, ignore_errors=True) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    config = dataclasses.asdict(cfg) | dict(n_vocab=tok.n_vocab, layout=dist.layout(cfg, world.size), params_total=total,
                                            params_local=local)
    tok.save(out / "tokenizer")
    with atomic_write(out / "config.json", "w") as file:
        json.dump(config, file, indent=1)
    return Log(out / "log.jsonl", start)


if __name__ == "__main__":
    tok_lib.run_cli(main)
