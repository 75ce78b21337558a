"""What all tests share: markers, the shape-suffix check, tiny configs, and ranks by fork."""
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")            # tests are small: one thread each is faster, and the same everywhere
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

FILES = ["tokenizer", "data", "kernels", "dist", "attention", "moe", "model", "train"]


def pytest_configure(config):
    config.addinivalue_line("markers", "peer: compares with software we did not write (pip install -r .ci/peers.txt)")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: minutes; runs when asked for by -m")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# ---- Shape suffixes: a local name_BTD must have three dims, and a letter means one size inside a function ----

def check_shapes(frame):
    sizes = {}
    for name, value in frame.f_locals.items():
        suffix = re.search(r"_([A-Z1]{1,6})$", name)
        if not suffix or not isinstance(value, torch.Tensor):
            continue
        where = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}: {name}"
        assert value.ndim == len(suffix[1]), f"{where} is {tuple(value.shape)}, its suffix promises {len(suffix[1])} dims"
        for letter, size in zip(suffix[1], value.shape):
            want = 1 if letter == "1" else sizes.setdefault(letter, size)
            assert size == want, f"{where} is {tuple(value.shape)}, but {letter} is {want} in this function"


@pytest.fixture
def shapes_checked():
    """Run the body with the suffix check on every function of ours that returns."""
    ours, faults = {str(ROOT / f"{name}.py") for name in FILES}, []

    def on_return(frame, event, arg):
        if event == "return" and frame.f_code.co_filename in ours:
            try:
                check_shapes(frame)
            except AssertionError as error:
                faults.append(str(error))

    sys.setprofile(on_return)
    yield
    sys.setprofile(None)
    assert not faults, "\n".join(sorted(set(faults)))


# ---- Ranks by fork: from a process that has torch, eight of them start in a third of a second ----

def fork(body, env=()):
    """Run body() in a child process; returns its pid. The child exits 0, with SystemExit's code, or 1 after a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(env)
        body()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid, timeout=120):
    """Exit code of a child (negative: the signal that ended it)."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise TimeoutError(f"child {pid} was still running after {timeout} s")


def together(body, ranks):
    """Run body() in `ranks` processes that find each other as torchrun's do; returns their pids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [fork(body, common | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in range(ranks)]


def launch(body, ranks, timeout=120):
    """The same; returns their exit codes."""
    return [wait(pid, timeout) for pid in together(body, ranks)]


# ---- Tiny text and tiny runs ----

WORDS = ("the a model token learns reads writes quickly slowly attention of in layer stream vector and number head block "
         "weight row step batch loss").split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A .jsonl of 120 documents of very different lengths."""
    import json
    import random
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    with open(path, "w") as file:
        for i in range(120):
            n = int(2 + draw.paretovariate(1.0) * 5) % 400 + 2
            file.write(json.dumps({"text": " ".join(draw.choice(WORDS) for _ in range(n)), "id": i}) + "\n")
    return path


@pytest.fixture
def tiny(corpus, tmp_path):
    """Flags of a run that takes about a second."""
    return [f"--input={corpus}", f"--cache_dir={corpus.parent}", f"--out_dir={tmp_path}/run", "--steps=8", "--n_layer=2", "--n_embd=16",
            "--n_head=2", "--seq_len=32", "--tokens_per_step=256", "--vocab_size=290", "--warmup=2", "--eval_every=4", "--save_every=2",
            "--dtype=float32", "--eval_tokens=512"]


def failure_with_triton(code, interpret):
    """Run code in a process of its own, kernels interpreted or for GPUs: the end of its complaint, "" if it had none."""
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(PYTHONPATH=paths) | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.stderr[-3000:] or f"exit code {done.returncode}" if done.returncode else ""


def run_train(*flags):
    """train.py in this process."""
    import signal
    import train
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        train.main([str(flag) for flag in flags])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Living(TorchDispatchMode):
    """The tensors made inside it; bytes() of those that are still alive, without those in `besides`."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self, besides=()):
        besides = {t.untyped_storage()._cdata for t in besides}
        return sum(size for key, (ref, size) in self.made.items() if key not in besides and not ref.expired())
