import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dist
import train
from conftest import ROOT, fork, launch, run_train, wait
from tokenizer import UsageError


def rows_of(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


def losses_of(out):
    return {row["step"]: row["loss"] for row in rows_of(out) if "loss" in row}


def final(out):
    saved = dist.newest_checkpoint(Path(out) / "ckpt")
    return {name: saved.whole(name).clone() for name in saved.table}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def out_of(flags):
    return next(flag.split("=", 1)[1] for flag in flags if flag.startswith("--out_dir="))


def elsewhere(flags, folder):
    return [f"--out_dir={folder}" if flag.startswith("--out_dir=") else flag for flag in flags]


def in_child(flags, ranks=1):
    codes = launch(lambda: run_train(*flags), ranks) if ranks > 1 else [wait(fork(lambda: run_train(*flags)))]
    assert codes == [0] * ranks


# ---- Pure functions ----

def test_learning_rate_by_hand():
    cfg = train.TrainConfig(lr=1.0, warmup=4, steps=13, min_lr=0.1)
    rates = [train.learning_rate(cfg, s) for s in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and abs(rates[-1] - 0.1) < 1e-12
    assert abs(rates[8] - (0.1 + 0.9 * 0.5)) < 1e-12             # half-way down the cosine
    for schedule in train.SCHEDULES:
        cfg.schedule = schedule
        tail = [train.learning_rate(cfg, s) for s in range(4, 13)]
        assert all(a >= b for a, b in zip(tail, tail[1:])), schedule
    assert train.learning_rate(train.TrainConfig(steps=1, warmup=0), 0) > 0


@pytest.mark.peer
def test_cosine_equals_transformers():
    hf = pytest.importorskip("transformers")
    cfg = train.TrainConfig(lr=1.0, warmup=0, steps=101, min_lr=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = hf.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, 100, min_lr_rate=0.1)
    for step in range(100):
        assert abs(train.learning_rate(cfg, step) - theirs.get_last_lr()[0]) < 1e-12
        optimizer.step()
        theirs.step()


def test_only_matrices_decay():
    from model import Model
    cfg = train.TrainConfig(n_layer=1, n_embd=16, n_head=2, vocab_size=9, moe=True, n_dense_layer=0, qkv_bias=True)
    model = Model(cfg)
    matrices, vectors = train.adamw(model.named_parameters(), cfg).param_groups
    assert {p.ndim for p in matrices["params"]} == {2, 3} and {p.ndim for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_batch_shape():
    cfg = train.TrainConfig(seq_len=32, tokens_per_step=32 * 24)
    assert train.batch_shape(cfg, 1) == (24, 24, 1) and train.batch_shape(cfg, 3) == (24, 8, 1)
    cfg.micro_batch = 4
    assert train.batch_shape(cfg, 2) == (24, 4, 3)
    for cfg, ranks, says in ((train.TrainConfig(seq_len=300, tokens_per_step=2048), 1, "1800 or --tokens_per_step=2100"),
                             (train.TrainConfig(seq_len=32, tokens_per_step=96, micro_batch=2), 1, "=64 or --tokens_per_step=128"),
                             (train.TrainConfig(seq_len=32, tokens_per_step=96), 2, "=64 or --tokens_per_step=128")):
        with pytest.raises(UsageError, match=says):
            train.batch_shape(cfg, ranks)


def test_progress_line():
    line = train.metrics_line(120, 5000, loss=3.21451, lr=6e-4, gnorm=0.83, tok_s=41200, mfu=None, mem=None, eta=75)
    assert line.startswith("step    120/5000 | loss 3.2145 | lr 6.00e-04 | gnorm  0.83 |  41.2k tok/s") and line.endswith("eta 1m15s")
    assert train.clock(3 * 3600 + 61) == "3h01m" and len(train.spark(list(range(100)))) == 40


# ---- A run, start to end ----

def test_a_run_leaves_what_it_promises(tiny, capsys):
    run_train(*tiny)
    out, said = Path(out_of(tiny)), capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "report.html", "tokenizer", "ckpt"}
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 8 and config["params_local"] == [config["params_total"]] and config["layout"] == {"dp": 1}
    rows = rows_of(out)
    steps, evals = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9)) and [r["step"] for r in evals] == [4, 8]
    assert set(steps[0]) >= {"step", "loss", "lr", "grad_norm", "tokens", "tok_per_s"} and steps[-1]["tokens"] == 8 * 256
    assert abs(steps[0]["loss"] - math.log(290)) < 0.2 and steps[-1]["loss"] < steps[0]["loss"]
    assert (out / "ckpt/latest").read_text() == "step_00000008" and len(dist.checkpoints(out / "ckpt")) == 2
    assert "step      8/8" in said and "bits/byte" in said and "--resume" in said
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 5 and "http-equiv" not in page and "script" not in page
    import xml.etree.ElementTree as xml
    for svg in re.findall(r"<svg.*?</svg>", page):
        xml.fromstring(svg)
    run_train(f"--out_dir={out}", "--sample", "--prompt=the model", "--max_new_tokens=5", "--n_samples=2")
    assert capsys.readouterr().out.count("the model") == 2


def test_bits_per_byte_counts_the_whole_validation_text(tiny):
    """Recomputed document by document, without packing, from the exported weights."""
    import data
    import model as model_lib
    flags = [f for f in tiny if not f.startswith("--eval_tokens")]
    run_train(*flags)
    out = Path(out_of(tiny))
    row = [r for r in rows_of(out) if "val_loss" in r][-1]
    folder = Path(next(f for f in tiny if f.startswith("--cache_dir")).split("=")[1]) / dist.newest_checkpoint(out / "ckpt").state["data"]
    meta, tok = data.open_prepared(folder)
    model, stream, nll, n = model_lib.from_pretrained(out).eval(), data.Shards(folder, "val"), 0.0, 0
    for start, length in zip(stream.starts.tolist(), stream.lengths.tolist()):
        for at in range(0, length, 32):
            ids = torch.from_numpy(stream.read(start + at, min(32, length - at) + 1).astype("int64"))
            with torch.no_grad():
                logp = model(ids[None, :-1])[0].log_softmax(-1)
            nll, n = nll - logp.gather(1, ids[1:, None]).sum().item(), n + len(ids) - 1
    assert abs(row["val_loss"] - nll / n) < 1e-5
    assert abs(row["val_bpb"] - nll / math.log(2) / meta["val_bytes"]) < 1e-5 * row["val_bpb"] + 1e-5


@pytest.mark.parametrize("extra", [["--attn=mla", "--moe", "--n_expert=4", "--n_dense_layer=0"], ["--preset=gpt2", "--tokens_per_step=256", "--attn_dropout=0.1"],
                                   ["--preset=llama", "--n_kv_head=1"], ["--dtype=bfloat16"], ["--optimizer=adamw", "--schedule=linear", "--packing=concat"]])
def test_variants_train(tiny, extra):
    run_train(*tiny, *extra)
    losses = losses_of(out_of(tiny))
    assert losses[8] < losses[1]


def test_accumulation_does_not_change_the_run(tiny, tmp_path):
    """8 rows at once, or 4 x 2, or 1 x 8: losses to 1e-6, on packed ragged rows."""
    seen = {}
    for micro in (8, 2, 1):
        out = tmp_path / f"m{micro}"
        run_train(*elsewhere(tiny, out), f"--micro_batch={micro}", "--seq_len=32")
        seen[micro] = losses_of(out)
    for micro in (2, 1):
        assert max(abs(seen[8][s] - seen[micro][s]) for s in seen[8]) < 2e-6


# ---- Stopping and going on ----

def test_killed_at_ten_random_moments_the_run_ends_in_the_same_bits(tiny, tmp_path):
    flags = [*tiny, "--steps=60", "--resid_dropout=0.1", "--moe", "--n_expert=4", "--eval_every=10", "--save_every=2"]
    start = time.monotonic()
    in_child(elsewhere(flags, tmp_path / "whole"))
    took, draw, kills = time.monotonic() - start, random.Random(0), 0
    broken = elsewhere(flags, tmp_path / "broken")
    while kills < 10:
        pid = fork(lambda: run_train(*broken, "--resume"))
        time.sleep(draw.uniform(0.05, 0.25) * took)
        os.kill(pid, signal.SIGKILL)
        kills += wait(pid) == -signal.SIGKILL
        if (tmp_path / "broken/ckpt/step_00000060").is_dir():
            break                                                # it got there between two kills
    in_child([*broken, "--resume"])
    assert kills >= 4
    assert_same_bits(final(tmp_path / "whole"), final(tmp_path / "broken"))
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "broken")
    rows = [r["step"] for r in rows_of(tmp_path / "broken") if "loss" in r]
    assert rows == list(range(1, 61))                            # one row a step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_the_run_goes_on(number, tiny, tmp_path):
    flags = [*tiny, "--steps=400", "--save_every=0", "--eval_every=0"]
    pid = fork(lambda: run_train(*flags))
    log = Path(out_of(tiny)) / "log.jsonl"
    while not (log.exists() and log.stat().st_size > 2000):
        time.sleep(0.02)
    os.kill(pid, number)
    assert wait(pid) == 0
    step = dist.newest_checkpoint(Path(out_of(tiny)) / "ckpt").step
    assert 0 < step < 400
    in_child([f"--out_dir={out_of(tiny)}", "--resume", f"--steps={step + 2}"])
    assert dist.newest_checkpoint(Path(out_of(tiny)) / "ckpt").step == step + 2


def test_two_ranks_equal_one_and_take_over_its_run(tiny, tmp_path):
    flags = [*tiny, "--moe", "--n_expert=4"]
    in_child(elsewhere(flags, tmp_path / "one"))
    in_child(elsewhere(flags, tmp_path / "two"), ranks=2)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert max(abs(one[s] - two[s]) for s in one) < 5e-6
    a, b = final(tmp_path / "one"), final(tmp_path / "two")
    assert all((a[n] - b[n]).abs().max() < 1e-4 for n in a if n.startswith("model."))
    assert json.loads((tmp_path / "two/config.json").read_text())["params_local"] == [json.loads((tmp_path / "one/config.json").read_text())["params_total"]] * 2

    def stopped_at_four():                                       # one rank to step 4, then two ranks from there
        save = dist.save_checkpoint
        def save_and_die(folder, step, *rest, **more):
            save(folder, step, *rest, **more)
            if step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        train.dist.save_checkpoint = save_and_die
        run_train(*elsewhere(flags, tmp_path / "moved"))

    assert wait(fork(stopped_at_four)) == -signal.SIGKILL
    in_child([*elsewhere(flags, tmp_path / "moved"), "--resume"], ranks=2)
    moved = losses_of(tmp_path / "moved")
    assert moved.keys() == one.keys() and max(abs(one[s] - moved[s]) for s in one) < 5e-6


def test_torchrun(tiny):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *tiny],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step      8/8") == 1 and "2 ranks = dp 2" in done.stdout
    assert json.loads((Path(out_of(tiny)) / "config.json").read_text())["layout"] == {"dp": 2}


def test_a_damaged_newest_checkpoint_is_passed_over(tiny, capsys):
    run_train(*tiny)
    out = Path(out_of(tiny))
    want = final(out)
    victim = out / "ckpt/step_00000008/shard_00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x7f")
    run_train(f"--out_dir={out}", "--resume")
    said = capsys.readouterr().out
    assert "passed over" in said and "step_00000008" in said
    assert_same_bits(final(out), want)
    for path in (out / "ckpt").glob("step_*/manifest.json"):
        path.write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        run_train(f"--out_dir={out}", "--resume")


def test_a_full_disk_does_not_end_the_run(tiny, tmp_path):
    log = tmp_path / "said"

    def body():
        save, sys.stdout = dist.save_checkpoint, open(log, "w")
        def full_at_four(folder, step, *rest, **more):
            if step == 4:
                raise OSError(28, "No space left on device")
            save(folder, step, *rest, **more)
        train.dist.save_checkpoint = full_at_four
        run_train(*tiny)

    assert wait(fork(body)) == 0
    assert "checkpoint at step 4 NOT saved (No space left on device)" in log.read_text()
    assert dist.newest_checkpoint(Path(out_of(tiny)) / "ckpt").step == 8


def test_checkpoints_in_the_background_are_the_same_and_say_when_they_fail(tiny, tmp_path):
    """The disk is full once: the next save says so, and the run goes on."""
    run_train(*elsewhere(tiny, tmp_path / "plain"))
    log = tmp_path / "said"

    def body():
        write, sys.stdout, calls = dist.write_safetensors, open(log, "w"), []
        def full_once(path, *rest):
            calls.append(path)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return write(path, *rest)
        dist.write_safetensors = full_once
        run_train(*tiny, "--async_save", "--keep=9", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()

    assert wait(fork(body)) == 0
    assert log.read_text().count("checkpoint before this one NOT saved (No space left on device)") == 1
    assert [path.name[-1] for path in dist.checkpoints(Path(out_of(tiny)) / "ckpt")] == ["2", "6", "8"]
    assert_same_bits(final(out_of(tiny)), final(tmp_path / "plain"))


@pytest.mark.parametrize("until, ranks", [(6, 1), (6, 2), (99, 2)])
def test_a_loss_that_is_not_finite_moves_no_weight_on_any_rank(until, ranks, tiny, tmp_path):
    """One rank sees nan in some steps: all skip them, to the bit as if they had not been; too many in a row end the run."""
    def body():
        batches_of = train.micro_batches
        def poisoned(loader, number, shape, world):
            batches = batches_of(loader, number, shape, world)
            if 4 <= number < until and world.rank == ranks - 1:
                batches[0]["weights"][0, 0] = math.nan
            return batches
        train.micro_batches = poisoned
        train.weight_of_step = lambda batches, world: 256.0      # the weight is nan for all, else
        run_train(*tiny, "--max_bad_steps=3", "--lr=1e-3", "--save_every=1", "--keep=9")

    codes = launch(body, ranks) if ranks > 1 else [wait(fork(body))]
    ckpt = Path(out_of(tiny)) / "ckpt"
    tensors = {step: dist.open_checkpoint(ckpt / f"step_{step:08d}") for step in (4, 5, 6)}
    names = [name for name in tensors[4].table]
    assert all(tensors[4].whole(name).isfinite().all() for name in names)
    assert [n for n in names if not torch.equal(tensors[4].whole(n), tensors[6].whole(n))] == []
    assert tensors[6].state["updates"] == 4
    rows = [row for row in rows_of(out_of(tiny)) if "loss" in row]
    assert [row["step"] for row in rows if "skipped" in row] == ([5, 6] if until == 6 else [5, 6, 7])
    assert codes == [0] * ranks if until == 6 else all(code == 1 for code in codes)
    assert all(path.name <= "step_00000006" for path in ckpt.iterdir() if path.name.startswith("step")) == (until != 6)


def test_new_runs_begin_from_weights(tiny, tmp_path, capsys):
    import model as model_lib
    run_train(*tiny)
    first = out_of(tiny)
    short = [f for f in tiny if not f.startswith(("--n_", "--vocab_size"))]
    run_train(*elsewhere(short, tmp_path / "from_run"), f"--init_from={first}", "--lr=1e-9")
    assert abs(losses_of(tmp_path / "from_run")[1] - losses_of(first)[8]) < 0.5 < losses_of(first)[1] - losses_of(tmp_path / "from_run")[1] + 0.6
    a, b = model_lib.from_pretrained(first), model_lib.from_pretrained(tmp_path / "from_run")
    torch.testing.assert_close(a.embed.weight, b.embed.weight, rtol=0, atol=1e-6)
    model_lib.save_pretrained(a, tmp_path / "hf")
    import tokenizer
    tokenizer.load(Path(first) / "tokenizer").save(tmp_path / "hf")
    run_train(*elsewhere(short, tmp_path / "from_hf"), f"--init_from={tmp_path}/hf", "--lr=1e-9")
    assert losses_of(tmp_path / "from_hf")[1] == pytest.approx(losses_of(tmp_path / "from_run")[1], abs=1e-5)
    run_train(f"--out_dir={tmp_path}/from_hf", "--resume", "--steps=9")          # which needs the weights no more
    with pytest.raises(UsageError, match="--n_layer=5"):
        run_train(*elsewhere(short, tmp_path / "x"), f"--init_from={first}", "--n_layer=5")


def test_a_dense_run_grows_experts(tiny, tmp_path, capsys):
    """Exact at start, also where the run was stopped before its first checkpoint; then its routers learn."""
    run_train(*tiny, "--dtype=float32", "--mtp=1")
    first, short = out_of(tiny), [f for f in tiny if not f.startswith(("--n_", "--vocab_size"))]
    parent = [row for row in rows_of(first) if "val_loss" in row][-1]["val_loss"]
    grow = [*short, "--dtype=float32", f"--grow_from={first}", "--moe", "--n_expert=4", "--save_every=0"]
    for name, lr in (("still", 1e-9), ("moves", 1e-2)):
        run_train(*elsewhere(grow, tmp_path / name), f"--lr={lr}")
    loss = {name: [row for row in rows_of(tmp_path / name) if "val_loss" in row][-1]["val_loss"] for name in ("still", "moves")}
    assert loss["still"] == pytest.approx(parent, abs=1e-5) and loss["moves"] < parent - 0.01
    copies = dist.newest_checkpoint(tmp_path / "moves/ckpt").whole("model.blocks.1.mlp.experts.w_down")
    assert len(copies) == 4 and not torch.equal(copies[0], copies[1])
    import shutil
    shutil.rmtree(tmp_path / "still/ckpt")
    run_train(f"--out_dir={tmp_path}/still", "--resume")                     # which grows them again
    assert [row for row in rows_of(tmp_path / "still") if "val_loss" in row][-1]["val_loss"] == pytest.approx(loss["still"], abs=1e-6)
    for more, said in ((["--moe", f"--init_from={first}"], "no --init_from"), ([], "give it --moe"), (["--moe", "--d_expert=1"], "--d_expert="),
                       (["--moe", "--n_layer=5"], "--n_layer=5")):
        with pytest.raises(UsageError, match=said):
            run_train(*elsewhere(short, tmp_path / "x"), f"--grow_from={first}", *more)
    with pytest.raises(UsageError, match="experts already"):
        run_train(*elsewhere(short, tmp_path / "x"), f"--grow_from={tmp_path}/moves", "--moe")


@pytest.mark.parametrize("flag, said", [("--moe", "experts: loop (on cpu: the reference) | "), ("--dispatch=grouped", "experts: grouped (--dispatch) | "),
                                        ("--moe=false", "compile: ")])
def test_the_start_says_how_experts_run(flag, said, tiny, capsys):
    run_train(*tiny, "--moe", flag, "--plan")
    first = capsys.readouterr().out.splitlines()[0]
    assert said in first and ("experts" in first) == (flag != "--moe=false")


def test_late_in_a_run_the_biases_rest_and_mtp_weighs_less(tiny):
    run_train(*tiny, "--moe", "--n_dense_layer=0", "--mtp=1", "--bias_until=0.5", "--mtp_late=0.5", "--aux_loss=none")
    rows = [row for row in rows_of(out_of(tiny)) if "loss" in row]
    ranges = [row["bias_range"] for row in rows]
    assert len(rows) == 8 and ranges[0] > 0 and ranges[3:] == [ranges[3]] * 5 and ranges[3] > ranges[0]
    for row in rows:                                             # loss = nll + weight sum mtp_nll w / sum w, nearly the mean here
        weight = 0.3 if row["step"] <= 4 else 0.1
        assert (row["loss"] - row["nll"]) / row["mtp1_nll"] == pytest.approx(weight, rel=0.1)


@pytest.mark.parametrize("kind, fields", [
    ("gpt2", dict(norm="layer", act="gelu_tanh", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True)),
    ("llama", dict(attn="gqa", rope_scaling="dynamic", rope_factor=2.0, tie_embeddings=False)),
    ("gemma3_text", dict(layers="swa,gqa", n_kv_head=1, window=5, norm_at="sandwich", norm_one_plus=True, embed_scale=True, qk_norm="head", act="geglu_tanh",
                         rope_local_theta=50.0))])
def test_weights_go_on_with_other_rows_and_dropout(kind, fields, tiny, tmp_path, capsys):
    """Rows of another length and dropout are the run's own: they act, resume exactly, and leave the function and what is exported as it was."""
    import model as model_lib
    import tokenizer
    run_train(*tiny)
    tok = tokenizer.load(Path(out_of(tiny)) / "tokenizer")
    cfg = model_lib.ModelConfig(**dict(n_layer=2, n_embd=16, n_head=2, vocab_size=tok.n_vocab, seq_len=48) | fields)
    source = model_lib.Model(cfg).eval()
    model_lib.save_pretrained(source, tmp_path / "hf")
    tok.save(tmp_path / "hf")
    short = [f for f in tiny if not f.startswith(("--n_", "--vocab_size", "--seq_len", "--steps"))]
    runs = {}
    for name, more in {"plain": [], "dropped": ["--resid_dropout=0.5"], "halves": ["--resid_dropout=0.5", "--save_every=2"]}.items():
        flags = [*elsewhere(short, tmp_path / name), f"--init_from={tmp_path}/hf", "--seq_len=16", "--lr=1e-9", "--dtype=float32", *more]
        run_train(*flags, "--steps=2" if name == "halves" else "--steps=4")
        if name == "halves":
            run_train(f"--out_dir={tmp_path}/halves", "--resume", "--steps=4")
        runs[name] = losses_of(tmp_path / name)
    assert runs["plain"] != runs["dropped"] == runs["halves"]
    again, tokens = model_lib.from_pretrained(tmp_path / "plain").eval(), torch.arange(16)[None]
    torch.testing.assert_close(again(tokens), source(tokens), rtol=1e-4, atol=1e-5)
    model_lib.save_pretrained(again, tmp_path / "back")
    back, longer = model_lib.from_pretrained(tmp_path / "back").eval(), torch.arange(40)[None]
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == kind
    if kind != "gpt2":                                           # whose table of positions is shorter now
        torch.testing.assert_close(back(longer), source(longer), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="--n_layer=9"):
        run_train(*elsewhere(short, tmp_path / "x"), f"--init_from={tmp_path}/hf", "--n_layer=9", "--plan")


def test_text_through_stdin(tiny, monkeypatch, corpus):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the model reads the stream. " * 400)))
    run_train(*[f for f in tiny if not f.startswith("--input")], "--input", "-")
    run_train(f"--out_dir={out_of(tiny)}", "--resume", "--steps=9")              # without stdin: the data lies in the run folder
    assert losses_of(out_of(tiny))[9] < losses_of(out_of(tiny))[1]


# ---- Mistakes ----

def test_an_existing_run_is_kept(tiny):
    run_train(*tiny)
    before = final(out_of(tiny))
    with pytest.raises(UsageError, match="already holds a run"):
        run_train(*tiny)
    for flag, says in (("--n_layer=3", r"--n_layer=3 \(the run has 2\)"), ("--seed=5", "--seed=5")):
        with pytest.raises(UsageError, match=says):
            run_train(*tiny, "--resume", flag)
    assert_same_bits(final(out_of(tiny)), before)
    run_train(*tiny, "--overwrite", "--seed=5")
    assert not torch.equal(final(out_of(tiny))["model.embed.weight"], before["model.embed.weight"])


def test_changed_text_is_not_resumed(tiny, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("the model reads. " * 300)
    flags = [f"--input={text}" if f.startswith("--input") else f for f in tiny]
    run_train(*flags)
    import shutil
    shutil.rmtree(Path(next(f for f in tiny if f.startswith("--cache_dir")).split("=")[1]) / dist.newest_checkpoint(Path(out_of(tiny)) / "ckpt").state["data"])
    text.write_text("another text altogether. " * 300)
    with pytest.raises(UsageError, match="text changed"):
        run_train(*flags, "--resume", "--steps=9")


@pytest.mark.parametrize("argv, says", [
    (["--nlayer=3"], "did you mean --n_layer"), (["--n-layer=3"], "did you mean --n_layer"), (["--attn=mlaa"], "'mla'"), (["--steps=many"], "whole number"),
    (["--input", "/does/not/exist"], "/does/not/exist"), (["--n_head=5"], "--n_head=5"), (["--tokens_per_step=100"], "--tokens_per_step=256"),
    (["--dtype=float16"], "bfloat16"), (["--resume", "--overwrite"], "one of them"), (["--resume=/nowhere"], "not a checkpoint"), (["--steps=0"], "at least 1"),
    (["--lr=-1"], "at least 0"), (["--dp=3"], "--nproc_per_node=3"), (["--init_from=/nowhere"], "/nowhere"), (["--sample", "--out_dir=/nowhere"], "/nowhere"),
    (["--val_fraction=0"], "between"), (["--preset=gpt9"], "gpt2"), (["--kernels=cuda"], "triton"), (["--out_dir=/dev/null/x"], "/dev/null"),
    (["--tokenizer=/nowhere"], "/nowhere"), (["--moe", "--n_active=99"], "--n_active=99"), (["--bench", "--bench_peer=/nowhere"], "/nowhere"),
    (["--size=124m"], "--bench"), (["--bench", "--size=9b"], "124m"), (["--bench", "--size=1.3b", "--n_layer=4000"], "--micro_batch"), (["--ac=some"], "selective"),
])
def test_mistakes_are_one_line(argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says) as caught:
        run_train(*argv)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_mistake_exits_with_2_and_no_traceback(tmp_path):
    for argv in (["--nlayer=3"], ["--n_head=5"]):
        done = subprocess.run([sys.executable, ROOT / "train.py", *argv], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("train.py: --n_head" if argv[0] == "--n_head=5" else "train.py: there is no")
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_refused_at_the_start(tiny, monkeypatch):
    import collections
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(UsageError, match="GB free"):
        run_train(*tiny)
    assert not Path(out_of(tiny)).exists()


def test_plan_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_train("--plan", "--preset=gpt2", "--vocab_size=50257")
    said = capsys.readouterr().out
    assert "124,439,808 parameters" in said and "--resume" in said and not list(tmp_path.iterdir())


TINY_BENCH = ("--bench", "--n_layer=2", "--n_embd=32", "--n_head=2", "--seq_len=64", "--tokens_per_step=128", "--vocab_size=65", "--out_dir=/nowhere")


@pytest.fixture
def few_samples(monkeypatch):
    samples = train.kernels.samples
    monkeypatch.setattr(train.kernels, "samples", lambda functions, device, rounds=0, seconds=1.0: samples(functions, device, 2))
    monkeypatch.setattr(train.kernels, "matmul_rate", lambda device, dtype: 1e12)


def test_bench_names_its_conventions_and_where_the_step_goes(few_samples, capsys):
    run_train(*TINY_BENCH, "--bench_peer=none")
    said = capsys.readouterr().out
    shares = [int(n) for n in re.findall(r"(\d+)%", said.splitlines()[-1])]
    assert 97 <= sum(shares) <= 103 and len(shares) == 5
    tok_s = float(re.search(r"([\d,]+) tok/s", said)[1].replace(",", ""))
    weights, squares = 2 * (4 * 32 * 32 + 3 * 32 * 96) + 65 * 32, 12 * 2 * 32 * 64        # 12 L C T
    of_matmul = [float(x) for x in re.findall(r"([\d.]+)%", said.splitlines()[-2])]
    for got, flops in zip(of_matmul, (6 * weights + squares, 6 * weights + squares / 2)):
        assert abs(got / 100 - tok_s * flops / 1e12) < 6e-4
    assert "PaLM" in said and "causal" in said and "MFU --" in said


def test_every_class_of_op_has_its_share_of_a_step():
    model = train.Model(train.ModelConfig(vocab_size=65, n_layer=2, n_embd=32, n_head=2, seq_len=64))
    optimizer, ids = train.adamw(model.named_parameters(), train.TrainConfig()), torch.randint(65, (2, 65))

    def step():
        model.loss(dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(2, 64)))[0].backward()
        optimizer.step()

    step()
    shares = train.step_shares(step, torch.device("cpu"))
    assert abs(sum(shares.values()) - 1) < 1e-6 and min(shares.values()) > 0 and list(shares)[:2] == ["matmul", "attention"]


def test_bench_times_peers_and_says_which_do_not_run(few_samples, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "model.py").write_text("GPT = None\nclass GPTConfig:\n    def __init__(self, **shape): raise RuntimeError('not today')\n")
    run_train(*TINY_BENCH, f"--bench_peer={tmp_path}")
    said = capsys.readouterr().out
    assert "nanoGPT, float32 as shipped does not run here: RuntimeError: not today" in said
    ours, theirs = (float(re.search(name + r".*first step ([\d.]+)", said)[1]) for name in ("this repo", "transformers"))
    assert abs(ours - theirs) < 2e-3                             # the same weights
    assert re.search(r"transformers.* tok/s +[\d.]+x our time", said)


@pytest.mark.parametrize("ac", ["norm", "selective", "full"])
def test_a_run_goes_on_with_other_checkpointing_to_the_same_bits(tiny, ac):
    run_train(*tiny, "--steps=4")
    other = [f + "2" if f.startswith("--out_dir") else f for f in tiny]
    run_train(*other, "--steps=4", f"--ac={ac}", "--micro_batch=1")
    losses = [[json.loads(line)["loss"] for line in open(Path(out_of(flags)) / "log.jsonl") if "loss" in json.loads(line) and "val_loss" not in json.loads(line)] for flags in (tiny, other)]
    assert len(losses[0]) == 4 and max(abs(a - b) for a, b in zip(*losses)) < 1e-5
    run_train(*other, "--steps=5", "--resume", "--ac=none")
