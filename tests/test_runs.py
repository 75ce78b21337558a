"""Runs on many ranks survive: killed, stopped, hung, resumed on another layout."""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dist
import train
from conftest import ROOT, fork, launch, run_train, together, wait
from test_layouts import ranks_of
from test_train import assert_same_bits, elsewhere, final, losses_of, out_of, rows_of
from tokenizer import UsageError

LAYOUTS = {"1": {}, "dp2": dict(dp=2), "dp3": dict(dp=3), "fsdp4": dict(dp=4, fsdp=3), "tp2": dict(tp=2), "pp2": dict(pp=2), "ep2": dict(dp=2, ep=2),
           "cp2": dict(cp=2), "2x2": dict(dp=2, fsdp=3, tp=2), "2x2x2": dict(pp=2, dp=2, tp=2, fsdp=2)}


@pytest.fixture
def mixed(tiny):
    """Flags of a run that every layout above can do: experts, shared keys, MTP, rows that 1, 2, 3 and 4 divide."""
    changed = ("--tokens_per_step", "--n_layer", "--n_head", "--save_every", "--eval_every", "--steps")
    return [f for f in tiny if not f.startswith(changed)] + ["--tokens_per_step=768", "--n_layer=4", "--n_head=4", "--attn=gqa", "--n_kv_head=2", "--moe",
                                                             "--n_expert=4", "--mtp=1", "--d_ff=32", "--save_every=2", "--eval_every=0", "--steps=20", "--keep=99"]


def go(flags, layout, **env):
    """One command on as many ranks as its layout has."""
    ranks = ranks_of(layout)
    said = launch(lambda: (os.environ.update(env), run_train(*flags, *(f"--{name}={value}" for name, value in layout.items()))), ranks, 300)
    assert said == [0] * ranks


def test_a_run_goes_on_from_layout_to_layout(mixed, tmp_path):
    """Two steps on each, from what the one before saved: the losses of a single process all the way."""
    layouts, flags = [*LAYOUTS.values()], [*mixed, "--schedule=constant", "--mtp_late=1", "--bias_until=1"]      # nothing that knows how long the run is
    go([*elsewhere(flags, tmp_path / "one"), f"--steps={2 * len(layouts)}"], {})
    for i, layout in enumerate(layouts):
        go([*elsewhere(flags, tmp_path / "chain"), f"--steps={2 * i + 2}", *["--resume"] * (i > 0)], layout)
    one, chain = losses_of(tmp_path / "one"), losses_of(tmp_path / "chain")
    assert chain.keys() == one.keys() and max(abs(one[step] - chain[step]) for step in one) < 5e-6


@pytest.mark.parametrize("layout", ["2x2x2", "ep2"])
def test_a_model_in_parts_writes_samples_as_a_whole_one_does(layout, mixed, tmp_path):
    """An evaluation puts the model together on the main rank."""
    flags = [*mixed, "--steps=2", "--eval_every=2", "--eval_tokens=512", "--temperature=0"]
    go(elsewhere(flags, tmp_path / "one"), {})
    go(elsewhere(flags, tmp_path / "parts"), LAYOUTS[layout])
    one, parts = ([row for row in rows_of(tmp_path / name) if "sample" in row][0] for name in ("one", "parts"))
    assert one["sample"] == parts["sample"] and abs(one["val_loss"] - parts["val_loss"]) < 5e-6


def test_what_stands_at_both_ends_of_a_rank_is_saved_once(tiny, tmp_path):
    """zbv gives one rank the first and the last stage, so the tied embedding twice."""
    if not dist.SPLITS:
        pytest.skip("this torch cannot split backward through autograd functions written in Python")
    flags = [f for f in tiny if not f.startswith("--n_layer")] + ["--n_layer=4", "--tokens_per_step=512"]
    go(elsewhere(flags, tmp_path / "one"), {})
    go([*elsewhere(flags, tmp_path / "two"), "--keep=9"], dict(pp=2, pp_schedule="zbv"))
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"two/ckpt/step_0000000{step}")
    go([f"--out_dir={tmp_path}/two", "--resume"], dict(dp=2))
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert one.keys() == two.keys() and max(abs(one[step] - two[step]) for step in one) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_reads_what_any_other_wrote(source, mixed, tmp_path):
    go([*elsewhere(mixed, tmp_path / "one"), "--steps=6"], {})
    one = losses_of(tmp_path / "one")
    go([*elsewhere(mixed, tmp_path / "from"), "--steps=6"], LAYOUTS[source])
    shutil.rmtree(tmp_path / "from/ckpt/step_00000006")
    for target, layout in LAYOUTS.items():
        shutil.copytree(tmp_path / "from", tmp_path / target)
        go([f"--out_dir={tmp_path}/{target}", "--resume"], layout)
        theirs = losses_of(tmp_path / target)
        assert theirs.keys() == one.keys() and max(abs(theirs[step] - one[step]) for step in one) < 5e-6, (source, target)


def killed_again_and_again(flags, layout, kills, tmp_path):
    """SIGKILL for all ranks at random moments of a run's life, its start and its saves among them, until it was killed so often; then losses,
    weights and optimizer are those of a run that was left alone, to the bit."""
    argv, ranks, draw = [*flags, *(f"--{name}={value}" for name, value in layout.items())], ranks_of(layout), random.Random(0)
    go(elsewhere(flags, tmp_path / "whole"), layout)
    ckpt, killed = Path(out_of(flags)) / "ckpt", 0
    while killed < kills:
        pids = together(lambda: run_train(*argv, "--resume" if dist.checkpoints(ckpt) else "--overwrite"), ranks)
        time.sleep(draw.choice([draw.uniform(0, 0.6), draw.uniform(0.6, 1.2)]))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        codes = [wait(pid) for pid in pids]
        if codes == [0] * ranks:
            break
        killed += 1
    go([*argv, "--resume" if dist.checkpoints(ckpt) else "--overwrite"], {} if ranks == 1 else layout)
    assert losses_of(out_of(flags)) == losses_of(tmp_path / "whole")
    assert_same_bits(final(out_of(flags)), final(tmp_path / "whole"))
    assert not list(ckpt.glob(".saving-*"))
    return killed


def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(mixed, tmp_path):
    assert killed_again_and_again([*mixed, "--steps=100", "--save_every=2", "--keep=2"], dict(dp=2), 4, tmp_path) == 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(dp=2, fsdp=3), dict(tp=2)], ids=lambda x: "-".join(f"{k}{v}" for k, v in x.items()))
def test_killed_twenty_times(layout, mixed, tmp_path):
    assert killed_again_and_again([*mixed, "--steps=300", "--save_every=3", "--keep=2", "--async_save"], layout, 20, tmp_path) == 20


# ---- Faults ----

def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def said_by(body, ranks, folder):
    """Exit codes and stderr of ranks that run body()."""
    def speaking():
        sys.stderr = open(folder / f"{os.environ['RANK']}.txt", "w")
        os.dup2(sys.stderr.fileno(), 2)
        body()
    folder.mkdir()
    codes = launch(speaking, ranks)
    return codes, [(folder / f"{rank}.txt").read_text() for rank in range(ranks)]


def at_step(number, rank, do):
    """Call do() in a rank when it reaches a step."""
    batches_of = train.micro_batches
    def seen(loader, step, shape, world):
        if step == number and world.rank == rank:
            do()
        return batches_of(loader, step, shape, world)
    train.micro_batches = seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_rank_is_told_to_stop_and_all_do(number, mixed):
    pids = together(lambda: run_train(*mixed, "--dp=2", "--steps=5000", "--save_every=0"), 2)
    until(lambda: Path(out_of(mixed), "log.jsonl").exists() and len(rows_of(out_of(mixed))) > 2)
    os.kill(pids[1], number)
    assert [wait(pid) for pid in pids] == [0, 0]
    saved = dist.newest_checkpoint(Path(out_of(mixed)) / "ckpt")
    assert 2 < saved.step < 5000 and saved.step == max(losses_of(out_of(mixed)))


def test_a_rank_that_dies_takes_the_others_along(mixed, tmp_path):
    def body():
        at_step(3, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run_train(*mixed, "--dp=2", "--prefetch=0", "--timeout=20")
    begun = time.monotonic()
    codes, _ = said_by(body, 2, tmp_path / "said")
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None) and time.monotonic() - begun < 30


def test_a_hang_ends_with_the_stacks_of_all_ranks(mixed, tmp_path):
    """Rank 1 sleeps; both are gone within the timeout and five seconds, and their stacks say who waits for whom."""
    def body():
        at_step(3, 1, lambda: (Path(tmp_path / "asleep").touch(), time.sleep(600)))
        run_train(*mixed, "--dp=2", "--prefetch=0", "--timeout=3")
    codes, said = said_by(body, 2, tmp_path / "said")
    assert time.time() - (tmp_path / "asleep").stat().st_mtime < 3 + 5
    assert codes == [1, 1] and all("most recent call" in text for text in said)                  # the first to give up may end the other's wait
    assert "weight_of_step" in said[0] and "in seen" in said[1] and "Timeout" in said[1], said


def test_ranks_that_were_told_different_things_are_named(mixed, tmp_path):
    def body():
        run_train(*mixed, "--dp=2", f"--lr={1e-3 if os.environ['RANK'] == '0' else 2e-3}")
    codes, said = said_by(body, 2, tmp_path / "said")
    assert 0 not in codes and all("flags differ between ranks" in text and "rank 1" in text and "--lr=0.002" in text for text in said)


def test_a_batch_of_another_shape_is_named_in_debug_mode(mixed, tmp_path):
    """TORCH_DISTRIBUTED_DEBUG=DETAIL compares every collective before it runs."""
    def body():
        os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        torch.distributed.set_debug_level_from_env()
        batches_of = train.micro_batches
        def short(loader, step, shape, world):
            batches = batches_of(loader, step, shape, world)
            return [{name: t[:-1] for name, t in batch.items()} for batch in batches] if step == 2 and world.rank == 1 else batches
        train.micro_batches = short
        run_train(*mixed, "--tp=2", "--timeout=20")
    codes, said = said_by(body, 2, tmp_path / "said")
    assert 0 not in codes and all(re.search(r"rank 1 has float32\[\d+,32,16\], rank 0 float32\[\d+,32,16\]", text) for text in said), said


def test_two_runs_do_not_share_a_folder(mixed):
    pid = fork(lambda: run_train(*mixed, "--steps=5000"))
    until(lambda: Path(out_of(mixed), "log.jsonl").exists())
    with pytest.raises(UsageError, match="another process is training"):
        run_train(*mixed, "--overwrite")
    with pytest.raises(UsageError, match="another process is training"):
        run_train(f"--out_dir={out_of(mixed)}", "--resume")
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 0
    run_train(f"--out_dir={out_of(mixed)}", "--resume", f"--steps={dist.newest_checkpoint(Path(out_of(mixed)) / 'ckpt').step + 1}")


def test_torchrun_starts_a_killed_worker_again(mixed, tmp_path):
    """--max_restarts: a worker kills itself once; the run goes on from its checkpoint to the losses of one that was left alone."""
    go(elsewhere([*mixed, "--steps=8"], tmp_path / "whole"), dict(dp=2))
    script = tmp_path / "dies_once.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
batches_of = train.micro_batches
def dying(loader, step, shape, world):
    if step == 5 and world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return batches_of(loader, step, shape, world)
train.micro_batches = dying
train.main(sys.argv[1:])
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1", "--monitor_interval=0.5",
                           script, *mixed, "--steps=8", "--dp=2", "--prefetch=0"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(out_of(mixed)) == losses_of(tmp_path / "whole")
