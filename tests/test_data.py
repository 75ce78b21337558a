import gzip
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import tokenizer as T
from conftest import ROOT
from data import Infill, Loader, Mixture, Shards, ShardWriter


def config(**fields):
    cfg = data.DataConfig(**{k: v for k, v in fields.items() if k in data.DataConfig.__dataclass_fields__})
    for name, field in T.TokenizerConfig.__dataclass_fields__.items():
        setattr(cfg, name, fields.get(name, field.default))
    return cfg


def shards_of(folder, docs, n_vocab=300, split="train"):
    writer = ShardWriter(folder, split, n_vocab, eot=0)
    for ids in docs:
        writer.add(ids)
    writer.close()
    return Shards(folder, split)


def documents(seed, n, longest):
    draw = random.Random(seed)
    return [[draw.randint(1, 255) for _ in range(draw.choice([0, 1, 2, draw.randint(0, longest)]))] for _ in range(n)]


def test_worked_example():
    """Capacity 10, items 6 5 4 3 2: 6 opens a bin, 5 another, 4 fills the first, 3 and 2 fill the second."""
    assert data.best_fit_decreasing([2, 3, 4, 5, 6], 10).tolist() == [1, 1, 0, 1, 0]


def slow_best_fit(lengths, capacity):
    bins = []
    for size in sorted(lengths, reverse=True):
        fits = [b for b in bins if b >= size]
        if fits:
            bins[bins.index(min(fits))] -= size
        else:
            bins.append(capacity - size)
    return sorted(bins)


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_equals_the_slow_search(seed):
    draw = random.Random(seed)
    capacity = draw.choice([1, 7, 63, 64, 100])
    lengths = [draw.randint(1, capacity) for _ in range(200)]
    bins = data.best_fit_decreasing(lengths, capacity)
    used = np.bincount(bins, weights=lengths)
    assert used.max() <= capacity and sorted((capacity - used).tolist()) == slow_best_fit(lengths, capacity)


@pytest.mark.parametrize("seed, T_", [(0, 1), (1, 7), (2, 32), (3, 63)])
@pytest.mark.parametrize("method", list(data.PACKERS))
def test_no_token_is_lost_or_doubled(seed, T_, method, tmp_path, monkeypatch):
    """The targets of an epoch are every document's ids and its end-of-text, each exactly once; several small shards."""
    monkeypatch.setattr(data, "SHARD_TOKENS", 200)
    docs = documents(seed, 90, 150)
    shards = shards_of(tmp_path, docs)
    assert len(shards.parts) > 1 and [n - 1 for n in shards.lengths.tolist()] == [len(d) for d in docs]
    loader = Loader(tmp_path, "train", T_, seed=seed, packing=method)
    batch = {k: v.numpy() for k, v in loader.samples(0, loader.n_rows).items()}
    counted = batch["weights"] == 1
    want = Counter(token for d in docs for token in (*d, 0))
    assert Counter(batch["targets"][counted].tolist()) == want and loader.n_tokens == sum(want.values()) == counted.sum()
    for row in range(loader.n_rows):                             # piece by piece: inputs, targets and positions of one document
        for d in set(batch["doc_ids"][row]) - {-1}:
            here = batch["doc_ids"][row] == d
            tokens, targets = batch["tokens"][row][here].tolist(), batch["targets"][row][here].tolist()
            assert tokens[1:] == targets[:-1] and batch["positions"][row][here].tolist() == list(range(here.sum()))
            whole = [0, *next(x for x in docs if contains([0, *x, 0], tokens + targets[-1:])), 0]
            assert contains(whole, tokens + targets[-1:])
    cut = sum(len(d) + 1 > T_ for d in docs)
    pieces = sum(-(-(len(d) + 1) // T_) for d in docs)
    assert len(loader.start) == pieces and pieces - len(docs) >= cut or method == "concat"


def contains(whole, part):
    return any(whole[i:i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def test_only_documents_longer_than_a_row_are_cut(tmp_path):
    docs = documents(5, 200, 80)
    shards = shards_of(tmp_path, docs)
    first, start, length = data.pack(shards.starts, shards.lengths, 32, "bfd")
    assert (first[1:] > first[:-1]).all() and first[-1] == len(start)
    whole = {(int(s), int(n)) for s, n in zip(start, length)}
    for s, n in zip(shards.starts.tolist(), shards.lengths.tolist()):
        assert n > 32 or (s, n) in whole


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_permutation_is_one(n):
    for seed in ((0, 0), (0, 1), (5, 3)):
        assert sorted(data.permutation(np.arange(n), n, seed).tolist()) == list(range(n))
    if n > 60:
        assert data.permutation(np.arange(n), n, (0, 0)).tolist() != data.permutation(np.arange(n), n, (0, 1)).tolist()
        big = data.permutation(np.arange(10), 2**40, (0, 0))
        assert len(set(big.tolist())) == 10 and big.max() < 2**40 and big.max() > 2**35


def test_order_is_a_function_of_seed_and_sample(tmp_path):
    shards_of(tmp_path, documents(1, 60, 40))
    a, b = (Loader(tmp_path, "train", 16, seed=3) for _ in range(2))
    rows = a.rows(range(3 * a.n_rows))
    for epoch in range(3):                                       # every row once an epoch, another order each time
        assert sorted(rows[epoch * a.n_rows:(epoch + 1) * a.n_rows].tolist()) == list(range(a.n_rows))
    assert rows[:a.n_rows].tolist() != rows[a.n_rows:2 * a.n_rows].tolist()
    halves = [b.samples(first, 5)["tokens"] for first in (10, 15)]          # any split of the stream gives the same samples
    assert (np.concatenate(halves) == a.samples(10, 10)["tokens"].numpy()).all()
    assert Loader(tmp_path, "train", 16, seed=4).rows(range(9)).tolist() != a.rows(range(9)).tolist()


def test_wide_vocabularies_do_not_wrap(tmp_path):
    shards = shards_of(tmp_path, [[70_000, 1, 99_999]], n_vocab=100_000)
    assert shards.read(0, 5).tolist() == [0, 70_000, 1, 99_999, 0]


def test_a_shard_cut_short_is_refused(tmp_path):
    shards_of(tmp_path, [[1, 2, 3]] * 50)
    path = next(tmp_path.glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(T.UsageError, match="cut short"):
        Shards(tmp_path, "train")
    path.write_bytes(b"not a shard at all, just some text")
    with pytest.raises(T.UsageError, match="not a token shard"):
        Shards(tmp_path, "train")


@pytest.mark.parametrize("sizes, want", [
    ([100] * 100, (95, 0)), ([10, 10, 10], (2, 0)), ([1000], (0, 950)), ([10, 1000], (1, 949)), ([1, 1], (1, 0)), ([90, 4, 4, 2], (2, 0)),
])
def test_validation_is_the_last_whole_documents(sizes, want):
    assert data.split_point(sizes, 0.05) == want


def test_prepare_splits_whole_documents_and_is_cached(tmp_path, corpus):
    lines = [json.loads(line)["text"] for line in open(corpus)]
    cfg, said = config(input=(str(corpus),), cache_dir=str(tmp_path / "cache")), []
    folder = data.prepare(cfg, 300, tmp_path, said.append)
    meta, tok = data.open_prepared(folder)
    train, val = Shards(folder, "train"), Shards(folder, "val")
    texts = [tok.decode(s.read(int(a) + 1, int(n) - 1).tolist()) for s in (train, val) for a, n in zip(s.starts, s.lengths)]
    assert texts == lines and tok.n_vocab == 300 == meta["n_vocab"]
    assert meta["val_bytes"] == sum(len(t.encode()) for t in lines[-len(val.starts):])
    assert abs(meta["val_bytes"] / sum(map(len, lines)) - 0.05) < 0.03
    stamp = (folder / "meta.json").stat().st_mtime_ns
    assert data.prepare(cfg, 300, tmp_path, said.append) == folder and (folder / "meta.json").stat().st_mtime_ns == stamp
    assert data.prepare(cfg, 301, tmp_path, said.append) != folder and len(said) == 2
    assert not list((tmp_path / "cache").glob(".data-*"))


def test_a_single_document_is_split_inside(tmp_path):
    text = "é word " * 3000
    (tmp_path / "one.txt").write_text(text)
    folder = data.prepare(config(input=(str(tmp_path / "one.txt"),), cache_dir=str(tmp_path)), 280, tmp_path, lambda s: None)
    meta, tok = data.open_prepared(folder)
    parts = [tok.decode(s.read(1, int(s.lengths[0]) - 1).tolist()) for s in (Shards(folder, "train"), Shards(folder, "val"))]
    assert "".join(parts) == text and abs(meta["val_bytes"] / len(text.encode()) - 0.05) < 0.001


def test_a_ready_tokenizer_is_used_and_given_an_end_of_text(tmp_path, corpus):
    tok = T.train(["model"] * 5, "bbpe", 258, pattern="gpt2")[0]
    tok.save(tmp_path / "tok")
    folder = data.prepare(config(input=(str(corpus),), tokenizer=str(tmp_path / "tok"), cache_dir=str(tmp_path)), 0, tmp_path, lambda s: None)
    meta, again = data.open_prepared(folder)
    assert again.model.vocab == tok.model.vocab and meta["eot"] == again.special["<|endoftext|>"] == 258


def test_rows_are_sampled_anew_and_reproducibly(tmp_path):
    """BPE-dropout on the fly: the same text in more tokens, another segmentation for another sample number, the same for the same."""
    (tmp_path / "one.txt").write_text("the model reads the words of the text again and again\n" * 400)
    folder = data.prepare(config(input=(str(tmp_path / "one.txt"),), cache_dir=str(tmp_path)), 300, tmp_path, lambda s: None)
    meta, tok = data.open_prepared(folder)
    make = lambda p: Loader(folder, "train", 64, 0, "bfd", True, meta["eot"], tok.sampler(p))
    plain, sampled = make(0.0), make(0.3)
    assert plain.resample is None
    for number in range(4):
        a, b = (loader.samples(number, 1) for loader in (plain, sampled))
        text = lambda batch: tok.decode(batch["tokens"][0][batch["weights"][0] > 0].tolist())
        assert text(a).startswith(text(b)[:-1]) and len(text(b)) < len(text(a))
        assert (b["tokens"][0][1:] == b["targets"][0][:-1])[b["weights"][0][1:] > 0].all()
        assert torch.equal(sampled.samples(number, 1)["tokens"], b["tokens"])
    n = plain.n_rows
    assert plain.rows([0])[0] in plain.rows(range(n, 2 * n))
    again = n + plain.rows(range(n, 2 * n)).tolist().index(plain.rows([0])[0])
    assert torch.equal(plain.samples(again, 1)["tokens"], plain.samples(0, 1)["tokens"])
    assert not torch.equal(sampled.samples(again, 1)["tokens"], sampled.samples(0, 1)["tokens"])


def test_default_text_is_the_standard_library():
    report = Counter()
    docs = [d["text"] for d in data.stdlib_documents(report)]
    assert len(docs) > 300 and 5e6 < sum(map(len, docs)) < 2e7 and report["documents"] == len(docs)
    assert not any(part.startswith("test") for p in data.stdlib_files() for part in p.parts[-2:])


@pytest.mark.parametrize("text", ["", "tiny"])
def test_empty_input_is_refused(text, tmp_path):
    (tmp_path / "e.txt").write_text(text)
    with pytest.raises(T.UsageError, match="bytes"):
        data.prepare(config(input=(str(tmp_path / "e.txt"),), cache_dir=str(tmp_path / "c")), 300, tmp_path, lambda s: None)
    assert not list(tmp_path.glob("c/*"))


def test_unknown_formats_are_refused_by_name(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(T.UsageError, match="parquet"):
        data.prepare(config(input=(str(tmp_path / "x.parquet"),)), 300, tmp_path)


# ---- Shards ----

def pieces_of(shards):
    """Every document as (ids, id after it), read through the public interface."""
    return [shards.read(int(s), int(n) + 1).tolist() for s, n in zip(shards.starts, shards.lengths)]


def test_a_written_shard_is_llm_cs_to_the_byte(tmp_path):
    shards_of(tmp_path, [[5, 6, 7], [], [8]])
    raw = (tmp_path / "train_000000.bin").read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, 8, *[0] * 253)
    assert struct.unpack("<8H", raw[1024:]) == (0, 5, 6, 7, 0, 0, 8, 0)
    assert struct.unpack("<4Q", (tmp_path / "train.idx").read_bytes()) == (0, 4, 5, 7)
    wide = shards_of(tmp_path, [[70_000]], n_vocab=70_001, split="wide")
    raw = (tmp_path / "wide_000000.bin").read_bytes()
    assert struct.unpack("<3i", raw[:12]) == (20240520, 2, 3) and struct.unpack("<3I", raw[1024:]) == (0, 70_000, 0)
    assert wide.lengths.tolist() == [2]


def test_dtypes_are_chosen_and_refused(tmp_path):
    assert ShardWriter(tmp_path, "a", 65536, 0).version == 1 and ShardWriter(tmp_path, "b", 65537, 0).version == 2
    assert ShardWriter(tmp_path, "c", 300, 0, "uint32").version == 2
    with pytest.raises(T.UsageError, match="uint32"):
        ShardWriter(tmp_path, "d", 65537, 0, "uint16")


def test_a_shard_is_written_as_it_comes(tmp_path):
    """Ids are on disk long before the shard is complete, under no final name; a failure leaves nothing of it."""
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", 300, 0) as writer:
        for _ in range(200):
            writer.add([7] * 1000)
        assert max(path.stat().st_size for path in tmp_path.iterdir()) > 300_000
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", 300, 0, shard_tokens=100) as writer:
        for i in range(5):
            writer.add([7] * 60)
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"train_00000{i}.bin" for i in range(4)]       # whole ones


def test_a_document_longer_than_a_shard_has_one_of_its_own(tmp_path):
    docs = [[1] * 3, [2] * 50, [3] * 3, [4] * 3]
    with ShardWriter(tmp_path, "train", 300, 0, shard_tokens=10) as writer:
        for ids in docs:
            writer.add(ids)
    shards = Shards(tmp_path, "train")
    assert [len(part) for part in shards.parts] == [5, 52, 9] and pieces_of(shards) == [[0, *ids, 0] for ids in docs]


def write_megatron(prefix, docs, kind, cut=3):
    """Megatron's pair, written by hand: sequences of `cut` ids at most, several to a document."""
    code, letter, size = {"uint16": (8, "H", 2), "int32": (4, "i", 4)}[kind]
    seqs, first = [], [0]
    for ids in docs:
        seqs += [ids[i:i + cut] for i in range(0, len(ids), cut)]
        first.append(len(seqs))
    offsets = [size * sum(map(len, seqs[:i])) for i in range(len(seqs))]
    prefix.with_suffix(".bin").write_bytes(b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in seqs))
    prefix.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(seqs), len(first)) + struct.pack(
        f"<{len(seqs)}i{len(seqs)}q{len(first)}q", *map(len, seqs), *offsets, *first))


@pytest.mark.parametrize("kind", ["uint16", "int32"])
def test_megatron_is_read(kind, tmp_path):
    docs = [[1, 2, 3, 4, 9], [5, 9], [6, 7, 8, 9]]
    write_megatron(tmp_path / "train", docs, kind)
    assert pieces_of(Shards(tmp_path, "train")) == docs                        # no id is known to end a document
    assert pieces_of(Shards(tmp_path, "train", eot=9)) == [[1, 2, 3, 4, 9], [9, 5, 9], [9, 6, 7, 8, 9]]
    path = tmp_path / "train.idx"
    whole = path.read_bytes()
    for broken, message in ((whole[:-3], "damaged"), (whole[:20], "damaged"), (whole[:17] + b"\6" + whole[18:], "type 6"),
                            (whole[:34] + whole[38:42] + whole[38:], "end to end")):
        path.write_bytes(broken)
        with pytest.raises(T.UsageError, match=message):
            Shards(tmp_path, "train")
    path.write_bytes(whole)
    (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-1])
    with pytest.raises(T.UsageError, match="cut short"):
        Shards(tmp_path, "train")


def test_nanogpt_and_llm_c_are_read(tmp_path):
    """No index: one document, or one at each end-of-text; the first id is never predicted, the last is only a target."""
    ids = [4, 5, 9, 6, 9, 9, 7, 9]
    (tmp_path / "train.bin").write_bytes(struct.pack("<8H", *ids))
    head = struct.pack("<3i", 20240520, 1, 8) + bytes(1012)
    for name in ("web_000001.bin", "web_000002.bin", "single.bin"):
        (tmp_path / name).write_bytes(head + struct.pack("<8H", *ids))
    cut = [[4, 5, 9], [9, 6, 9], [9, 9], [9, 7, 9]]
    for name, times in (("train", 1), ("single", 1), ("web", 2)):
        assert pieces_of(Shards(tmp_path, name)) == [ids] * times
        assert pieces_of(Shards(tmp_path, name, eot=9)) == cut * times
        loader = Loader(tmp_path, name, 3, packing="concat", eot=9)
        batch = {k: v.numpy() for k, v in loader.samples(0, loader.n_rows).items()}
        assert Counter(batch["targets"][batch["weights"] > 0].tolist()) == Counter(ids[1:] * times)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "none.bin").write_bytes(b"")
    for name in ("odd", "none", "missing"):
        with pytest.raises(T.UsageError):
            Shards(tmp_path, name)


def test_documents_are_found_across_the_steps_of_the_search(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(data, "release", steps.append)
    np.random.default_rng(0).integers(0, 5, 1000, dtype=np.uint16).tofile(tmp_path / "x.bin")
    part = data.map_ids(tmp_path / "x.bin", np.uint16)
    starts, lengths = data.documents_at(part, 3, step=7)
    assert starts.tolist() == sorted({0, *(i for i in range(999) if part[i] == 3)}) and lengths.sum() == 999
    assert len(steps) == 143


def test_an_index_that_does_not_belong_is_refused(tmp_path):
    shards_of(tmp_path, [[1, 2, 3]] * 50)
    shards_of(tmp_path / "b", [[1, 2, 3, 4]] * 40)                             # as many ids, other documents
    good = (tmp_path / "train.idx").read_bytes()
    other = (tmp_path / "b" / "train.idx").read_bytes()
    for wrong in (other, b"", good[:-8], good[:-3], good[8:], good + b"abc", good + good[-8:], good + struct.pack("<Q", 10**6),
                  good[:80] + good[88:96] + good[80:88] + good[96:]):
        (tmp_path / "train.idx").write_bytes(wrong)
        with pytest.raises(T.UsageError, match="does not belong"):
            Shards(tmp_path, "train")


# ---- Packing ----

@pytest.mark.parametrize("high", [1, 2**16, 2**17, 2**33])
def test_wide_keys_are_sorted_by_their_digits(high):
    keys = np.random.default_rng(0).integers(0, high, 999)
    assert (data.order_of(keys) == np.argsort(keys, kind="stable")).all()


def test_packing_of_a_hundred_thousand_documents():
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.3, 1.3, 100_000)).astype(np.int64)
    starts, begin = np.cumsum(lengths) - lengths, time.process_time()
    first, start, length = data.pack(starts, lengths, 2048, "bfd")
    assert time.process_time() - begin < 1                                     # 0.03 s on a quiet machine
    assert len(first) - 1 <= -(-lengths.sum() // 2048) * 1.0005
    filled = np.add.reduceat(length, first[:-1])
    assert filled.max() <= 2048 and filled.sum() == lengths.sum()
    order = np.argsort(start)                                                  # every id once
    assert start[order[0]] == 0 and ((start + length)[order[:-1]] == start[order[1:]]).all()
    cut = np.bincount(np.searchsorted(starts, start, side="right") - 1) > 1
    assert (cut == (lengths > 2048)).all()


@pytest.mark.parametrize("seed", range(4))
def test_concat_is_windows_of_the_stream(seed, tmp_path):
    docs = documents(seed, 40, 60)
    shards_of(tmp_path, docs)
    loader = Loader(tmp_path, "train", 16, packing="concat", shuffle=False)
    batch = loader.samples(0, loader.n_rows)
    stream = [(token, place) for d in docs for place, token in enumerate([0, *d])]
    kept = batch["weights"].flatten() > 0
    assert batch["tokens"].flatten()[kept].tolist() == [token for token, _ in stream] and kept[:len(stream)].all()
    for row in range(loader.n_rows):                                           # positions begin anew, also at a cut
        window = [place for _, place in stream[row * 16:row * 16 + 16]]
        begins = [i if i == 0 or place == 0 else 0 for i, place in enumerate(window)]
        assert batch["positions"][row][:len(window)].tolist() == [i - b for i, b in enumerate(itertools.accumulate(begins, max))]


def test_none_gives_every_document_rows_of_its_own(tmp_path):
    shards_of(tmp_path, [[1] * 3, [2] * 20, [3]])
    loader = Loader(tmp_path, "train", 8, packing="none", shuffle=False)
    tokens = loader.samples(0, loader.n_rows)["tokens"].tolist()
    assert tokens == [[0, 1, 1, 1, 0, 0, 0, 0], [0] + [2] * 7, [2] * 8, [2] * 5 + [0] * 3, [0, 3] + [0] * 6]


# ---- FIM ----

@pytest.fixture(scope="module")
def tok():
    text = "def f(x):\n    return x + 1\nthe model reads the words 模型读取文字，学习语言。 🙂👩‍👩‍👧 é"
    return T.train([text] * 5, "bbpe", 330, special=["eos", "fim_prefix", "fim_suffix", "fim_middle"])[0]


TEXTS = ["def f(x):\n    return x + 1\n", "模型读取文字，学习语言。模型再读一遍。", "🙂👩‍👩‍👧é🙂🏳️‍🌈", "", "a", "文"]


@pytest.mark.parametrize("spm", [0, 1])
def test_infilling_is_undone_exactly(spm, tok):
    infill = Infill(tok, 1, spm)
    pre, suf, mid = (tok.role(role) for role in ("fim_prefix", "fim_suffix", "fim_middle"))
    for text, ids in zip(TEXTS * 30, infill.encode(TEXTS * 30, range(len(TEXTS) * 30))):
        assert [ids.count(s) for s in (pre, suf, mid)] == [1, 1, 1] and ids[0] == pre
        assert tok.decode(data.unfim(ids, tok)) == text
        a, b = ids.index(suf), ids.index(mid)
        if spm:
            assert a == 1 and ids[2:b] == tok.encode(tok.decode(ids[2:b]))     # PRE SUF suffix MID prefix middle
        else:                                                                  # PRE prefix SUF suffix MID middle
            p, s, m = (tok.decode(part) for part in (ids[1:a], ids[a + 1:b], ids[b + 1:]))
            assert p + m + s == text and ids == [pre, *tok.encode(p), suf, *tok.encode(s), mid, *tok.encode(m)]


def test_rates_and_cuts_of_infilling(tok):
    n, rate, spm = 20_000, 0.6, 0.3
    infill = Infill(tok, rate, spm, seed=3)
    cuts = [infill.cut("0123456789", random.Random(f"3 {i}")) for i in range(n)]
    chosen = [c for c in cuts if len(c) > 1]
    assert abs(len(chosen) - n * rate) < 3 * (n * rate * (1 - rate)) ** 0.5
    assert abs(sum(c[3] for c in chosen) - len(chosen) * spm) < 3 * (len(chosen) * spm * (1 - spm)) ** 0.5
    assert all("".join(c[:3]) == "0123456789" for c in cuts)
    pairs = Counter((len(c[0]), len(c[0]) + len(c[1])) for c in chosen)
    for low, high in ((0, 0), (0, 10), (3, 7), (10, 10)):                      # 11 x 11 ordered pairs, sorted
        want = len(chosen) * (1 if low == high else 2) / 121
        assert abs(pairs[low, high] - want) < 4 * want ** 0.5


def test_infilling_is_a_function_of_seed_and_document(tok):
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 20)]
    whole = Infill(tok, 0.5, 0.5, seed=1).encode(texts, range(len(texts)))
    for parts in (1, 2, 7):                                                    # however many workers share the corpus
        bounds = np.linspace(0, len(texts), parts + 1).astype(int)
        again = [ids for a, b in zip(bounds, bounds[1:]) for ids in Infill(tok, 0.5, 0.5, seed=1).encode(texts[a:b], range(a, b))]
        assert again == whole
    assert Infill(tok, 0.5, 0.5, seed=2).encode(texts, range(len(texts))) != whole
    plain = [ids == tok.encode(text) for ids, text in zip(whole, texts)]
    assert 30 < sum(plain) < 90


def test_the_sentinels_are_budgeted(tok):
    """A document that fits a row as it is never grows out of it."""
    texts = [text * n for text in TEXTS for n in range(1, 9)]
    for row in range(20, 60):
        for text, ids in zip(texts, Infill(tok, 1, row=row).encode(texts, range(len(texts)))):
            assert len(ids) < row or len(tok.encode(text)) >= row
    assert any(len(ids) < 40 and ids[0] == tok.role("fim_prefix") for ids in Infill(tok, 1, row=40).encode(texts, range(len(texts))))


def test_a_tokenizer_without_sentinels(tok):
    bare = T.train(["the model"] * 5, "bbpe", 260, special=["eos"])[0]
    with pytest.raises(T.UsageError, match="--special fim_prefix"):
        Infill(bare, 0.5)
    grown = data.with_sentinels(bare)
    assert grown.n_vocab == bare.n_vocab + 3 and data.with_sentinels(grown) is grown and Infill(grown, 0.5)
    for wrong in (-0.1, 1.5):
        with pytest.raises(T.UsageError, match="fim_rate"):
            Infill(tok, wrong)


@pytest.mark.parametrize("T_, method", [(700, "none"), (700, "bfd"), (48, "bfd"), (17, "concat")])
def test_context_level_infills_the_pieces_of_a_row(T_, method, tok, tmp_path):
    """Each piece between its ends-of-text; where a row grows too long its end is trimmed, so a piece is found by its head."""
    eot, texts = tok.role("eos"), [text * n for text in TEXTS[:3] for n in (1, 2, 5)]
    with ShardWriter(tmp_path, "train", tok.n_vocab, eot) as writer:
        for text in texts:
            writer.add(tok.encode(text))
    make = lambda how: Loader(tmp_path, "train", T_, 0, method, False, eot, how)
    plain, infilled = make(None), make(Infill(tok, 1))
    n, raw = plain.n_rows, lambda ids: b"".join(map(tok.token_bytes, ids))
    a, b = ({k: v.numpy() for k, v in loader.samples(0, n).items()} for loader in (plain, infilled))
    whole = 0
    for row, d in ((row, d) for row in range(n) for d in range(max(b["doc_ids"][row]) + 1)):
        here, old = b["doc_ids"][row] == d, a["doc_ids"][row] == d
        ids, was = ([x["tokens"][row][at][0], *x["targets"][row][at]] for x, at in ((b, here), (a, old)))
        low, high = int(was[0] == eot), len(was) - int(was[-1] == eot)
        assert b["positions"][row][here].tolist() == list(range(here.sum())) and ids[:low] == was[:low]
        room = T_ - np.flatnonzero(here)[0]
        assert len(ids) - 1 == room or raw(data.unfim(ids[low:len(ids) - (len(was) - high)], tok)) == raw(was[low:high])
        whole += len(ids) - 1 < room
    assert whole >= 9 if T_ == 700 else whole >= 1
    assert all((infilled.samples(0, n)[k].numpy() == b[k]).all() for k in b)   # the same again, another cut next epoch
    assert not torch.equal(infilled.samples(n, n)["tokens"], torch.from_numpy(b["tokens"]))
    assert torch.equal(infilled.batch(range(n))["tokens"], torch.from_numpy(a["tokens"]))


def test_what_is_infilled_already_is_left_alone(tok):
    document = [tok.role(role) for role in ("eos", "fim_prefix", "fim_suffix", "fim_middle", "eos")]
    assert Infill(tok, 1)(document, random.Random(0)) == document == data.unfim(document, tok)
    assert data.in_turn(None, None) is None
    assert data.in_turn(None, lambda ids, rng: ids[1:], lambda ids, rng: ids * rng)([1, 2], 2) == [2, 2]


# ---- Loader ----

def slow_batch(loader, rows, numbers=()):
    """Piece by piece, as the picture at the top of data.py says."""
    B, T = len(rows), loader.seq_len
    out = {name: np.zeros((B, T), dtype=np.int64) for name in ("targets", "positions")}
    out |= {"tokens": np.full((B, T), loader.eot), "doc_ids": np.full((B, T), -1), "weights": np.zeros((B, T), np.float32)}
    for b, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(range(loader.first[row], loader.first[row + 1])):
            ids = loader.stream.read(int(loader.start[piece]), int(loader.length[piece]) + 1)
            if loader.resample and len(numbers):
                ids = np.array(loader.resample(ids.tolist(), random.Random(f"{loader.seed} {numbers[b]} {piece}"))[:T - at + 1])
            n = len(ids) - 1
            here = slice(at, at + n)
            out["tokens"][b, here], out["targets"][b, here] = ids[:-1], ids[1:]
            out["positions"][b, here], out["doc_ids"][b, here], out["weights"][b, here] = np.arange(n), number, 1
            at += n
    return out


def double(ids, rng):
    """A resampling that makes pieces longer or shorter."""
    return [*ids[:-1], *ids[1:-1], ids[-1]] if rng.random() < 0.5 else ids[:1] + ids[len(ids) // 2 + 1:]


@pytest.mark.parametrize("method", list(data.PACKERS))
@pytest.mark.parametrize("T_, resample", [(1, None), (7, None), (32, None), (63, None), (7, double), (32, double)])
def test_a_batch_equals_the_slow_one(method, T_, resample, tmp_path):
    docs = documents(T_, 120, 100)
    with ShardWriter(tmp_path, "train", 70_000 if T_ == 32 else 300, 5, shard_tokens=300) as writer:
        for ids in docs:
            writer.add(ids)
    loader = Loader(tmp_path, "train", T_, 2, method, eot=5, resample=resample)
    assert len(loader.stream.parts) > 3
    for first, count in ((0, 1), (3, 17), (loader.n_rows - 5, 63), (10**6, 2)):
        batch, numbers = loader.samples(first, count), range(first, first + count)
        for name, want in slow_batch(loader, loader.rows(numbers), numbers).items():
            assert (batch[name].numpy() == want).all(), name
            assert batch[name].dtype == (torch.float32 if name == "weights" else torch.int64) and batch[name].is_contiguous()


def test_a_row_may_hold_many_documents(tmp_path):
    shards_of(tmp_path, [[]] * 40_000)
    loader = Loader(tmp_path, "train", 40_000)
    assert loader.n_rows == 1 and loader.samples(0, 1)["doc_ids"].tolist() == [list(range(40_000))]


def test_ranks_and_kills_do_not_change_the_stream(tmp_path):
    """1, 2 and 4 ranks with any micro-batch read the same global batches, and so does a run that goes on at any sample."""
    shards_of(tmp_path, documents(1, 100, 60))
    fresh = lambda: Loader(tmp_path, "train", 16, seed=7)
    whole = fresh().samples(0, 96)
    for ranks, micro in ((1, 12), (2, 6), (2, 3), (4, 3)):
        mine, stream = 12 // ranks, []
        loaders = [fresh() for _ in range(ranks)]
        for step in range(8):
            if step == 5:
                loaders = [fresh() for _ in range(ranks)]                      # killed, and resumed
            stream += [loaders[rank].samples(step * 12 + rank * mine + i, micro) for rank in range(ranks) for i in range(0, mine, micro)]
        assert all(torch.equal(torch.cat([b[name] for b in stream]), whole[name]) for name in whole)


def test_blocks_of_the_order_join_seamlessly(tmp_path, monkeypatch):
    shards_of(tmp_path, documents(2, 150, 40))
    want = Loader(tmp_path, "train", 8, seed=1)
    monkeypatch.setattr(data, "BLOCK", 7)
    loader, numbers = Loader(tmp_path, "train", 8, seed=1), np.random.default_rng(0).integers(0, 500, 200)
    assert (loader.rows(numbers) == want.rows(numbers)).all()
    slow = [data.permutation(np.array([n % want.n_rows]), want.n_rows, (1, n // want.n_rows))[0] for n in numbers.tolist()]
    assert want.rows(numbers).tolist() == slow


def test_memory_is_used_again_but_never_while_it_is_held(tmp_path):
    shards_of(tmp_path, documents(3, 100, 60))
    loader = Loader(tmp_path, "train", 16)
    kept = [loader.samples(i * 8, 8)["tokens"] for i in range(6)]              # one tensor of each batch is alive
    copies = [t.clone() for t in kept]
    for i in range(20):
        loader.samples(i * 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies)) and len(loader.pages) == 1
    del kept
    assert len(loader.pages) == 7
    held = loader.samples(0, 8)
    places = [t.data_ptr() for t in held.values()]
    assert len(loader.pages) == 6 and len(set(places)) == 5
    for t in held.values():
        t.fill_(3)                                                             # no two tensors share an element
    assert all((t == 3).all() for t in held.values())
    loader.samples(0, 40), loader.samples(0, 1)                                # pages of another size


def test_resident_memory_is_flat(tmp_path, monkeypatch):
    """Of a file of 8 MB about 1 MB stay mapped (and what 512 more places map, which may be 2 MB each on some kernels)."""
    np.random.default_rng(0).integers(1, 999, 4_000_000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    monkeypatch.setattr(data, "MAPPED", 1_000_000)
    loader = Loader(tmp_path, "train", 1024)

    def resident():
        text = open("/proc/self/smaps").read()
        return int(text[text.index(str(tmp_path / "train.bin")):].split("Rss:")[1].split()[0]) * 1024

    dropped, least = [], []
    monkeypatch.setattr(data, "release", lambda part, real=data.release: (dropped.append(resident()), real(part), least.append(resident())))
    for i in range(0, loader.n_rows - 16, 16):
        loader.samples(i, 16)
    assert len(dropped) >= 3 and min(dropped) > 900_000 and max(least) == 0


# ---- Mixture ----

@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [3, 1, 1, 1], [1 / 3, 0.6, 0.0667], [5, 0.01, 0.3, 0.3], [0.123456, 0.9],
                                     *(np.random.default_rng(s).dirichlet([0.5] * (s + 3)) + 0.001 for s in range(6))])
def test_no_prefix_is_off_by_a_sample(weights):
    shares = data.whole_shares(weights)
    turns = data.take_turns(shares)
    n = np.arange(1, len(turns) + 1)
    for j, share in enumerate(shares / shares.sum()):
        off = np.abs(np.cumsum(turns == j) - share * n)
        assert off.max() <= max(0, 1 - 1 / max(1, 2 * len(shares) - 2)) + 1e-9                 # Tijdeman's bound
        assert abs(share - weights[j] / sum(weights)) < 1.01 / data.PERIOD
    assert (np.bincount(turns, minlength=len(shares)) == shares).all()


def test_shares_are_exact_where_they_can_be():
    assert data.whole_shares(["0.7", "0.2", "0.1"]).tolist() == [7, 2, 1] and data.whole_shares([1, 1]).tolist() == [1, 1]
    assert data.whole_shares([1, 2**0.5]).tolist() == [4142, 5858]
    for wrong in ([0, 1], [-1, 2], ["a", 1], [float("nan"), 1], [float("inf"), 1], [1e-9, 1], []):
        with pytest.raises(T.UsageError, match="--mix"):
            data.whole_shares(wrong)


def test_a_mixture_draws_every_source_in_its_own_epochs(tmp_path):
    loaders = []
    for j in range(3):
        shards_of(tmp_path / str(j), documents(j, 20 + 30 * j, 40))
        loaders.append(Loader(tmp_path / str(j), "train", 16, seed=j))
    mixture, n = Mixture(loaders, ["0.5", "0.3", "0.2"]), 400
    source, number = mixture.place(range(n))
    for j, loader in enumerate(loaders):                                       # each source: its own samples 0, 1, 2, ...
        mine = np.flatnonzero(source == j)
        assert number[mine].tolist() == list(range(len(mine)))
        assert (mixture.rows(mine) - mixture.base[j] == loader.rows(range(len(mine)))).all()
        assert mixture.epochs(n)[j] == len(mine) / loader.n_rows
    batch = mixture.samples(37, 50)
    for i in range(50):
        one = loaders[source[37 + i]].samples(int(number[37 + i]), 1)
        assert all(torch.equal(batch[name][i], one[name][0]) for name in one)
    far = mixture.samples(10**12 + 3, 4)                                       # any sample at once
    assert torch.equal(far["tokens"][2:], mixture.samples(10**12 + 5, 2)["tokens"])
    rows = list(range(mixture.n_rows))
    assert mixture.n_tokens == int(mixture.batch(rows)["weights"].sum()) == sum(l.n_tokens for l in loaders)
    with pytest.raises(T.UsageError, match="--mix"):
        Mixture(loaders, [1, 2])


# ---- Prefetch ----

@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_changes_nothing(depth, tmp_path):
    shards_of(tmp_path, documents(1, 60, 40))
    loader, threads = Loader(tmp_path, "train", 16), threading.active_count()
    made = list(data.prefetch((loader.samples(i, 5) for i in range(0, 60, 5)), depth))
    assert len(made) == 12 and threading.active_count() == threads
    assert all(torch.equal(batch["tokens"], loader.samples(5 * i, 5)["tokens"]) for i, batch in enumerate(made))


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_raises_where_the_batch_is_wanted(depth):
    threads = threading.active_count()

    def batches():
        yield 1
        raise T.UsageError("a shard vanished")

    stream = data.prefetch(batches(), depth)
    assert next(stream) == 1
    with pytest.raises(T.UsageError, match="vanished"):
        next(stream)
    assert threading.active_count() == threads


def test_prefetch_is_bounded_and_stops_when_closed():
    seen, threads = [], threading.active_count()
    stream = data.prefetch((seen.append(i) or i for i in itertools.count()), 3)
    assert next(stream) == 0
    time.sleep(0.05)
    assert len(seen) <= 5                                                      # the one we have, three waiting, one at the door
    stream.close()
    assert threading.active_count() == threads


# ---- Stages ----

def test_parts_hold_every_document_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART_BYTES", 300)
    draw, texts = random.Random(0), []
    for name in ("a.jsonl", "b.txt", "c.jsonl", "d.txt"):
        texts += [f"{name} {i} " + "é" * draw.randint(0, 60) for i in range(30 if name.endswith("l") else 1)]
        here = [t for t in texts if t.startswith(name)]
        (tmp_path / name).write_text("\n".join(json.dumps({"text": t}) for t in here) if len(here) > 1 else here[0])
    corpus, report = data.Corpus([tmp_path]), Counter()
    assert [d["text"] for d in corpus.documents(report)] == texts and len(corpus.parts) > 5
    assert report["documents"] == len(texts) and report["files"] == 4


@pytest.mark.parametrize("workers", [1, 3])
def test_parts_that_are_there_are_not_done_again(workers, tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(data, "PART_BYTES", 5000)
    text, done = data.Corpus([corpus]), tmp_path / "done"
    done.mkdir()

    def work(documents, report, part):
        (done / str(part)).touch()
        for document in documents:
            report["seen"] += 1
            yield document["text"].encode()

    paths, report = data.run_parts(text, work, tmp_path / "parts", workers)
    whole = b"".join(p.read_bytes() for p in paths)
    assert whole.decode() == "".join(d["text"] for d in text.documents(Counter())) and report["seen"] == report["documents"]
    assert len(paths) > 3 and len(list(done.iterdir())) == len(paths)
    paths[1].with_suffix(".json").unlink()
    for name in done.iterdir():
        name.unlink()
    again, same = data.run_parts(text, work, tmp_path / "parts", workers)
    assert b"".join(p.read_bytes() for p in again) == whole and same == report and [p.name for p in done.iterdir()] == ["1"]


def test_a_mistake_inside_a_worker_is_the_users(tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(data, "PART_BYTES", 5000)

    def work(documents, report, part):
        raise T.UsageError("not like this")
        yield

    with pytest.raises(T.UsageError, match="not like this"):
        data.run_parts(data.Corpus([corpus]), work, tmp_path, 2)
    assert not list(tmp_path.iterdir())


# ---- What train.py reads ----

def prepared(tmp_path, **fields):
    cfg = config(cache_dir=str(tmp_path / "cache"), **fields)
    cfg.seq_len, cfg.seed = 32, 0
    folder = data.prepare(cfg, 300, tmp_path, lambda said: None)
    return cfg, folder, *data.open_prepared(folder)


def test_each_input_of_a_mixture_is_a_source(tmp_path, corpus):
    (tmp_path / "b.txt").write_text("other words are read here now and then " * 200)
    cfg, folder, meta, tok = prepared(tmp_path, input=(str(corpus), str(tmp_path / "b.txt")), mix=("3", "1"))
    train, val = data.open_loaders(cfg, folder, meta, tok).values()
    assert isinstance(train, Mixture) and [len(part.stream.starts) for part in train.loaders][1] == 1
    texts = [tok.decode(row[row > 0].tolist()) for row in train.samples(0, 40)["tokens"].numpy()]
    assert sum("other" in text or "read here" in text for text in texts) == 10
    assert meta["val_tokens"] - 2 == val.n_tokens == val.batch(range(val.n_rows))["weights"].sum()
    again = prepared(tmp_path, input=(str(folder),))             # a mixture is data as well
    assert again[2]["train_tokens"] == meta["train_tokens"]
    with pytest.raises(T.UsageError, match="3 weights for 2 --input"):
        prepared(tmp_path, input=cfg.input, mix=("1", "1", "1"))
    T.train(["other"] * 9, "bbpe", 262, pattern="gpt2")[0].save(tmp_path / "tok")
    strange = prepared(tmp_path, input=(str(corpus),), tokenizer=str(tmp_path / "tok"))[1]
    with pytest.raises(T.UsageError, match="another tokenizer"):
        prepared(tmp_path, input=(str(strange), str(folder)))


def test_tokens_of_other_programs_are_adopted(tmp_path):
    tok = T.train(["it was the age"] * 9, "bbpe", 262, pattern="gpt2", special=["eos"])[0]
    tok.save(tmp_path / "tok")
    ids = [tok.special["<|endoftext|>"], *tok.encode("it was the age of wisdom"), tok.special["<|endoftext|>"], *tok.encode("the age")] * 9
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(np.array(ids, np.uint16).tobytes())
    cfg, folder, meta, _ = prepared(tmp_path, input=(str(tmp_path),), tokenizer=str(tmp_path / "tok"))
    assert meta["train_tokens"] == len(ids) and meta["documents"] == 36 and meta["val_bytes"] == sum(len(tok.token_bytes(i)) for i in ids)
    train, _ = data.open_loaders(cfg, folder, meta, tok).values()
    assert train.n_tokens == len(ids) - 1
    with pytest.raises(T.UsageError, match="--tokenizer"):
        prepared(tmp_path, input=(str(tmp_path),))
    (tmp_path / "train.bin").write_bytes(np.array([9999], np.uint16).tobytes() * 2)
    with pytest.raises(T.UsageError, match="holds the id 9999"):
        prepared(tmp_path, input=(str(tmp_path),), tokenizer=str(tmp_path / "tok"))


@pytest.mark.parametrize("level", ["document", "context"])
def test_training_text_is_infilled_and_validation_is_not(level, tmp_path, corpus):
    lines = [json.loads(line)["text"] for line in open(corpus)]
    cfg, folder, meta, tok = prepared(tmp_path, input=(str(corpus),), fim_rate=1.0, fim_level=level)
    train, val = (Shards(folder, split) for split in ("train", "val"))
    read = lambda s: [s.read(int(a) + 1, int(n) - 1).tolist() for a, n in zip(s.starts, s.lengths)]
    assert [tok.decode(data.unfim(ids, tok)) for ids in read(train)] + [tok.decode(ids) for ids in read(val)] == lines
    assert any(tok.role("fim_middle") in ids for ids in read(train)) == (level == "document")
    loader = data.open_loaders(cfg, folder, meta, tok)["train"]
    assert (loader.samples(0, 20)["tokens"] == tok.role("fim_middle")).any()
    assert prepared(tmp_path, input=(str(corpus),), fim_rate=0.5, fim_level=level)[1] == folder or level == "document"


# ---- Smoothing ----

SENTENCES = [line.split() for line in ("a b a", "a b", "b a a b", "c a", "")]


def pareto_sentences(seed, n, longest=9, letters=9):
    draw = random.Random(seed)
    return [[chr(97 + int(draw.paretovariate(1)) % letters) for _ in range(draw.randint(0, longest))] for _ in range(n)]


def test_smoothing_by_hand():
    """After a came b three times, a once, </s> twice: 6 in all; 5 words can be predicted (a b c </s> <unk>)."""
    n = data.TextCounts(SENTENCES, 2)
    assert n.vocab == ["</s>", "<unk>", "a", "b", "c"] and n.follow["a",] == {"b": 3, "a": 1, "</s>": 2}
    p = {name: estimate(n, "c", ("a",)) for name, estimate in data.ESTIMATORS.items()}
    total = 6 + 4 + 1 + 5                                        # of the unigrams: a, b, c, </s>
    assert p["add_k"] == pytest.approx(0.1 / (6 + 0.5))
    assert p["jelinek_mercer"] == pytest.approx(0.3 * (0.7 * 1 / total + 0.3 / 5))
    d = 5 / (5 + 2 * 4)                                          # five bigrams seen once, four seen twice
    d1 = 1 / (1 + 0)                                             # unigram counts 6 4 1 5: n1 = 1, n2 = 0
    assert p["absolute"] == pytest.approx(3 * d / 6 * ((1 - d1) / total + 4 * d1 / total / 5))
    fresh = {"a": 4, "b": 2, "c": 1, "</s>": 3}                  # different words before each: <s> a b c; <s> a; <s>; <s> a b
    assert n.fresh[()] == fresh
    d1 = 1 / (1 + 2 * 1)
    assert p["kneser_ney"] == pytest.approx(3 * d / 6 * ((1 - d1) / 10 + 4 * d1 / 10 / 5))


def test_katz_keeps_what_good_and_turing_say():
    """100 counts: 40 seen once, 12 twice, 4 three times, ...: what all small counts lose is what the unseen get, n(1)."""
    of = Counter({1: 40, 2: 12, 3: 6, 4: 3, 5: 2, 6: 1, 9: 1})
    lost = sum(of[r] * r * (1 - data.katz_discount(of, r)) for r in of)
    assert lost == pytest.approx(of[1]) and data.katz_discount(of, 6) == 1
    star = 2 * 12 / 40                                           # r* of a count of one, before the scaling
    tail = 6 * of[6] / of[1]
    assert data.katz_discount(of, 1) == pytest.approx((star - tail) / (1 - tail))


@pytest.mark.parametrize("name", list(data.ESTIMATORS))
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_every_estimator_sums_to_one(name, order):
    for seed, size in ((0, 1), (1, 5), (2, 60)):
        n = data.TextCounts(pareto_sentences(seed, size), order)
        contexts = [c for c in n.follow if len(c) < order][:40] + [("never",) * (order - 1)]
        for context in contexts:
            p = [data.ESTIMATORS[name](n, word, context) for word in n.vocab]
            assert min(p) >= 0 and sum(p) == pytest.approx(1, abs=1e-12)


def test_modified_kneser_ney_by_dictionaries_equals_the_arrays(tmp_path):
    draw = random.Random(7)
    sentences = [[f"w{int(draw.paretovariate(0.8)) % 500}" for _ in range(draw.randint(0, 9))] for _ in range(1500)]
    sentences += [["<s>"[1:2]]] * 1                              # ends in a word seen once, so lmplz's quirk (see discounts) is idle
    (tmp_path / "t.txt").write_text("".join(" ".join(words) + "\n" for words in sentences))
    n, model = data.TextCounts(sentences, 3), data.from_ngrams(data.estimate([tmp_path / "t.txt"], 3))
    asked = sentences[:20] + [["w1", "new", "w2"]]
    ids, starts = model.ids("\n".join(map(" ".join, asked)).encode())
    want = []
    for words in asked:
        history = ["<s>", *(word if word in n.follow[()] else "<unk>" for word in words), "</s>"]
        want += [np.log10(data.modified_kneser_ney(n, history[i], tuple(history[max(0, i - 2):i]))) for i in range(1, len(history))]
    assert model.score(ids, starts)[0] == pytest.approx(want, abs=1e-5)


# ---- Kneser-Ney, equal to lmplz ----
# tests/golden/*.arpa.gz were made from kn_text(name) by KenLM (4cb443e):  lmplz FLAGS --text NAME.txt --arpa NAME.arpa

def kn_text(name):
    """Text that shows one thing each; bytes, a sentence a line."""
    draw = random.Random(name)
    words = lambda kinds, n: [b"w%d" % (int(draw.paretovariate(0.9)) % kinds) for _ in range(n)]
    if name == "quirk":                                          # the last n-gram of each order: see discounts()
        return b"".join(b" ".join(words(60, 12)) + b"\n" for _ in range(400)) + b"zz1 zz2 zzlast zz3\n" * 3
    if name == "odd":                                            # what separates words, and what does not
        ends, inside = [b"\n", b"\r\n", b" \n", b"\n\n", b"\t\r\n"], [b"", b"", b"\xc2\xa0x", b"\x0b", b"\x0c", b"\xff", b"\xe3\x80\x80"]
        return b"".join(draw.choice([b" ", b"\t", b"  ", b"\0"]).join(w + draw.choice(inside) for w in words(9, draw.randint(0, 7)))
                        + draw.choice(ends) for _ in range(120))
    if name == "han":
        return "".join(" ".join(chr(0x4e00 + int(draw.paretovariate(0.7)) % 90) for _ in range(draw.randint(1, 12))) + "\n"
                       for _ in range(110)).encode()
    return b"".join(b" ".join(words(40, draw.randint(0, 9))) + b"\n" for _ in range(200))


GOLDEN = {                             # name -> flags of lmplz, which are those of `data.py kn train`
    "quirk": "--order 3",
    "odd": "--order 4 --discount_fallback",
    "han": "--order 6 --discount_fallback 0.4 0.9 1.3",
    "prune": "--order 3 --prune 0 1 2 --discount_fallback",
    "limit": "--order 3 --limit_vocab_file limit --discount_fallback",
    "uniform": "--order 2 --interpolate_unigrams 0",
    "padded": "--order 1 --vocab_pad 3000 --discount_fallback",
}


def read_arpa_slowly(path):
    """({n: announced}, {n-gram: (log10 p, back-off)})"""
    counts, grams, n = {}, {}, 0
    for line in (gzip.open if str(path).endswith(".gz") else open)(path, "rb"):
        line = line.rstrip(b"\n")
        if line.startswith(b"ngram "):
            counts[int(line[6:line.index(b"=")])] = int(line[line.index(b"=") + 1:])
        elif line.endswith(b"-grams:"):
            n = int(line[1:-7])
        elif n and line and not line.startswith(b"\\"):
            p, words, *bow = line.split(b"\t")
            grams[words] = float(p), float(bow[0]) if bow else 0.0
    return counts, grams


def check_arpas(ours, theirs):
    (counts, grams), (want_counts, want) = read_arpa_slowly(ours), read_arpa_slowly(theirs)
    assert counts == want_counts and grams.keys() == want.keys() and len(want) == sum(counts.values())
    assert max((abs(a - b) for g in want for a, b in zip(grams[g], want[g]) if a != b), default=0) <= 1e-5


@pytest.mark.parametrize("name", list(GOLDEN))
def test_kneser_ney_equals_lmplz(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_bytes(kn_text(name))
    (tmp_path / "limit").write_text(" ".join(f"w{i}" for i in range(0, 40, 2)))
    data.main(["kn", "train", "t.txt", *GOLDEN[name].split(), "--arpa", "a.arpa", "--out", "m.kn"])
    check_arpas("a.arpa", ROOT / "tests/golden" / f"{name}.arpa.gz")
    data.main(["kn", "arpa", "m.kn", "--out", "b.arpa"])         # through the model file, and through our reader
    data.main(["kn", "arpa", "b.arpa", "--out", "n.kn"])
    data.main(["kn", "arpa", "n.kn", "--out", "c.arpa"])
    assert Path("a.arpa").read_bytes() == Path("b.arpa").read_bytes() == Path("c.arpa").read_bytes()


@pytest.mark.parametrize("name", ["odd", "prune", "han"])
def test_memory_and_processes_do_not_change_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TEXT_BLOCK", 700)
    (tmp_path / "t.txt").write_bytes(kn_text(name))
    for out, more in (("a", []), ("b", ["--mem", "1"]), ("c", ["--mem", "20K", "--workers", "2"])):
        data.main(["kn", "train", "t.txt", *GOLDEN[name].split(), "--out", out, *more])
    assert Path("a").read_bytes() == Path("b").read_bytes() == Path("c").read_bytes()


def test_discounts_that_cannot_be_are_explained(tmp_path):
    (tmp_path / "t.txt").write_text("a b c\n" * 4)
    with pytest.raises(T.UsageError, match=r"order 1 .*count 2.*--discount_fallback"):
        data.estimate([tmp_path / "t.txt"], 2)


def test_special_words_are_refused_or_skipped(tmp_path):
    (tmp_path / "t.txt").write_text("a b\nb </s> a b\n")
    with pytest.raises(T.UsageError, match="line 2 .*</s>.*--skip_symbols"):
        data.estimate([tmp_path / "t.txt"], 2, discount_fallback=[])
    (tmp_path / "u.txt").write_text("a b\nb a b\n")
    skipped, plain = (data.estimate([tmp_path / name], 2, discount_fallback=[], skip_symbols=True) for name in ("t.txt", "u.txt"))
    assert skipped.words == plain.words and all((a == b).all() for a, b in zip(skipped.logp[1:], plain.logp[1:]))


def test_units_and_normaliser_are_part_of_the_model(tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("Das \u4f60\u597d Caf\u00e9 5\n" * 3 + "das 7\n")
    data.main(["kn", "train", "t.txt", "--order", "2", "--discount_fallback", "--norm", "strong", "--unit", "char", "--out", "m"])
    (tmp_path / "q").write_text("DAS cafe\u0301\n")
    capfdbinary.readouterr()
    data.main(["kn", "query", "m", "q"])
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert [line.split("\t")[0] for line in lines[:8]] == [*"dascafe", "</s>"] and all(line.split("\t")[3] == "0" for line in lines[:8])
    assert "OOVs:\t0" in "\n".join(lines)
    T.train(["das model"] * 9, "bbpe", 262, pattern="gpt2")[0].save(tmp_path / "tok")
    data.main(["kn", "train", "t.txt", "--order", "2", "--discount_fallback", "--unit", "tok:tok", "--out", "i"])
    assert data.open_model("i").unit.startswith(f"tok:{tmp_path}/tok#")
    T.train(["other"] * 9, "bbpe", 262, pattern="gpt2")[0].save(tmp_path / "tok")
    with pytest.raises(T.UsageError, match="not the one"):
        data.open_model("i")


# ---- Queries ----

def ask_slowly(grams, order, words, bos=True, eos=True):
    """[(log10 p, length of the n-gram found, unknown)] by the textbook: the longest n-gram, and a back-off for each word less."""
    history, found = [b"<s>"] * bos, []
    for word in [*words, *[b"</s>"] * eos]:
        known = word if word in grams else b"<unk>"
        context, owed = history[len(history) - min(len(history), order - 1):], 0.0
        while b" ".join([*context, known]) not in grams:
            owed += grams.get(b" ".join(context), (0, 0))[1]
            context = context[1:]
        found.append((owed + grams[b" ".join([*context, known])][0], len(context) + 1, known == b"<unk>"))
        history.append(known)
    return found


def dump_arpa(path, grams, draw=None):
    """grams: {"a b": (log10 p, back-off or None)}; lines in any order and with and without zero back-offs, if `draw` is given."""
    levels = [[g for g in grams if len(g.split(" ")) == n] for n in range(1, max(len(g.split(" ")) for g in grams) + 1)]
    out = ["\\data\\", *(f"ngram {n}={len(level)}" for n, level in enumerate(levels, 1))]
    for n, level in enumerate(levels, 1):
        level = draw.sample(level, len(level)) if draw else level
        bows = [grams[g][1] if n < len(levels) else None for g in level]
        bows = [None if draw and not b and draw.random() < .5 else b for b in bows]
        out += ["", f"\\{n}-grams:", *(f"{grams[g][0]!r}\t{g}" + ("" if b is None else f"\t{b!r}") for g, b in zip(level, bows))]
    path.write_text("\n".join([*out, "", "\\end\\", ""]))
    return path


def random_grams(seed, order, words="abc", keep=.4, dead_ends=False):
    """A model whose logarithms are multiples of 2^-16, so that sums are exact in any order. Half of the back-offs are zero."""
    draw, number = random.Random(seed), lambda: -draw.randint(1, 1 << 18) / 65536
    grams = {"<unk>", "<s>", "</s>", *words}
    for gram in itertools.product(["<s>", *words], *[words] * (order - 2), [*words, "</s>"]) if order > 1 else ():
        if draw.random() < keep:
            grams |= {" ".join(gram[a:b]) for a in range(order) for b in range(a + 1, order + 1)}
    go_on = {g.rpartition(" ")[0] for g in grams} | {g for g in grams if dead_ends or " " not in g}
    return {g: (number(), number() if g in go_on and draw.random() < .5 else 0.0) for g in sorted(grams, key=lambda g: (g.count(" "), g))}


def strange_lines(name, draw, n):
    """Lines of kn_text(name) with unknown words, <s> and </s> in between, and bytes that are no space or no text."""
    lines = [data.space_words(line) for line in kn_text(name).split(b"\n")]
    more = [b"new", b"\xff\xfe", b"\xc2\xa0", b"\xe3\x80\x80w1", b"long" * 9, b"<s>", b"</s>", b"<unk>", b"w1", b"w2"]
    return [[draw.choice(more) if draw.random() < .15 else word for word in draw.choice(lines)] for _ in range(n)] + [[], [b"w1"], more]


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_queries_equal_a_walk_through_the_arpa(order, tmp_path, monkeypatch):
    name, draw = ("odd", "han", "prune")[order % 3], random.Random(order)
    (tmp_path / "t.txt").write_bytes(kn_text(name))
    ngrams = data.estimate([tmp_path / "t.txt"], order, discount_fallback=[], prune=[0, 0, 1][:order] if name == "prune" else ())
    lines = strange_lines(name, draw, 40)
    rounded = data.from_ngrams(ngrams, 8)
    assert (rounded.logp[1] == ngrams.logp[1]).all()             # only longer ones are rounded
    for source, quant, near in ((ngrams, 0, 1e-5), (ngrams, 32, 1e-5), (ngrams, 8, .4), (rounded.ngrams(), 8, 1e-5)):
        model = rounded if quant == 8 else data.from_ngrams(ngrams, quant)
        data.write_arpa(source, tmp_path / "m.arpa")
        grams = read_arpa_slowly(tmp_path / "m.arpa")[1]
        for bos, eos, chunks in ((True, True, (1, 7, 1 << 18)), (True, False, (4,)), (False, True, (3, 1 << 18)), (False, False, (50,))):
            want = [row for line in lines for row in ask_slowly(grams, order, line, bos, eos)]
            ids, starts = model.ids(b"\n".join(map(b" ".join, lines)), eos)
            assert starts.tolist() == np.cumsum([0] + [len(line) + eos for line in lines])[:-1].tolist()
            for chunk in chunks:
                monkeypatch.setattr(data, "CHUNK", chunk)
                logp, length = model.score(ids, starts, bos)
                assert list(zip(length.tolist(), (ids == 0).tolist())) == [row[1:] for row in want]
                assert logp.dtype == np.float32 and np.abs(logp - [row[0] for row in want]).max() < near


@pytest.mark.parametrize("order, quant", [(1, 0), (2, 0), (3, 0), (3, 32), (4, 0), (4, 8), (5, 32)])
def test_states_and_fragments(order, quant, tmp_path):
    """All sums are exact here, so what is equal is equal in all bits."""
    for seed in range(3):
        draw, grams = random.Random(seed), random_grams(seed, order, "ab" if order > 3 else "abc", (.9, .5, .2)[seed])
        model = data.from_ngrams(data.read_arpa(dump_arpa(tmp_path / "m.arpa", grams, draw)), quant)
        for coded in model.logp[2:] + model.bow[2:] if quant == 8 else ():         # the means of bins, back on the grid
            coded.table = np.copysign(np.rint(coded.table * 65536) / 65536, coded.table)
        words = [0, *range(3, model.counts[1])]
        for _ in range(25):                                      # a sentence word by word, and from pieces joined in any order
            for bos in (True, False):
                ids = [draw.choice(words + words[1:]) for _ in range(draw.randint(0, 9))] + [2] * draw.randint(0, 1)
                logp, _ = model.score(np.array(ids, np.uint32), np.array([0]), bos)
                state, one = model.state(bos), []
                for word in ids:
                    p, state = model.extend(state, word)
                    one.append(p)
                whole = model.fragment(ids, bos)
                assert one == logp.tolist() and whole.logp == sum(one) and (whole.right, whole.right.bows) == (state, state.bows)
                cuts = [0, *sorted(draw.choices(range(len(ids) + 1), k=draw.randint(0, 4))), len(ids)]
                parts = [model.fragment(ids[a:b], bos and a == i == 0) for i, (a, b) in enumerate(zip(cuts, cuts[1:]))]
                while len(parts) > 1:
                    i = draw.randrange(len(parts) - 1)
                    parts[i:i + 2] = [model.join(*parts[i:i + 2])]
                assert parts[0] == whole and parts[0].right.bows == whole.right.bows
        if quant == 8 or order == 5:
            continue                                             # too rounded, too many
        histories = [h for n in range(order + 1) for h in itertools.product(words, repeat=n)]
        futures, seen = [*itertools.product([*words, 2], repeat=max(order - 1, 1))], []
        for bos in (True, False):                                # same state: same costs of all that can follow; and only then
            for history in histories:
                state = model.state(bos)
                for word in history:
                    state = model.extend(state, word)[1]
                text = np.array([[*history, *future] for future in futures], np.uint32)
                logp, _ = model.score(text.ravel(), np.arange(0, text.size, text.shape[1]), bos)
                seen.append((state, logp.reshape(text.shape)[:, len(history):].tobytes()))
        assert len(set(seen)) == len({state for state, _ in seen}) == len({future for _, future in seen}) > (order > 1)


@pytest.mark.parametrize("bits", range(1, 33))
def test_packed_numbers_come_back(bits):
    draw = np.random.default_rng(bits)
    for sizes in ((0,), (1,), (64,), (128, 64, 63), (64, 65)):
        parts = [draw.integers(0, 1 << bits, size, np.uint64) for size in sizes]
        values = np.concatenate(parts)
        values[::5] = (1 << bits) - 1
        stored = np.concatenate([*data.Packed.blocks(np.split(values, np.cumsum(sizes)[:-1]), bits)])
        assert len(stored) == sum(-(-size // 64) * bits for size in sizes) + 1
        order = draw.permutation(len(values))
        assert data.Packed(stored, bits).take(order).tolist() == values[order].tolist()


def test_bins_hold_as_many_values_each():
    assert data.bins(np.array([20, 1, 3, 2, 10, 4.]), 3).tolist() == [1.5, 3.5, 15]
    assert data.bins(np.array([5., 7]), 4).tolist() == [-np.inf, 5, 5, 7]
    values = -np.random.default_rng(0).exponential(1, 700).astype(np.float32)
    values[::9] = -0.0
    values[::7] = 0.0
    other = values[values != 0]
    for bits in (2, 3, 8, 10):
        for backoff in (False, True):
            table, encode = data.quantize(values, bits, backoff)
            codes, learnt = encode(values), table[2 * backoff:]
            assert len(table) == 1 << bits and 0 <= codes.min() and codes.max() < 1 << bits and (learnt[1:] >= learnt[:-1]).all()
            mine, full = np.sort(other if backoff else values), len(learnt) - len(learnt) // 2
            parts = np.split(mine, len(mine) * np.arange(1, full) // full)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            step = (mine[-1] - mine[0]) / max(1, len(learnt) // 2 - 1)
            want = [np.mean(part, dtype=float) for part in parts] + [mine[0] + i * step for i in range(len(learnt) // 2)]
            assert learnt == pytest.approx(sorted(want), rel=1e-5, abs=1e-6)
            best = np.abs(learnt[None] - values[:, None]).min(1)
            best[(values == 0) & backoff] = 0
            assert (np.abs(table[codes] - values) == best).all()
            if backoff:                                          # a zero keeps its sign
                assert codes[values == 0].tolist() == (~np.signbit(values[values == 0])).tolist() and codes[values != 0].min() > 1
    table, encode = data.quantize(np.array([-0.0, 0.0], np.float32), 2, True)
    assert np.signbit(table[encode(np.array([0.0, -0.0], np.float32))]).tolist() == [False, True]


def test_both_searches_find_what_a_dictionary_finds(monkeypatch):
    draw = np.random.default_rng(0)
    sizes = draw.integers(0, 4, 70_000)
    sizes[[0, 7, 69_999]] = 3000, 0, 500
    child = np.append(0, np.cumsum(sizes)).astype(np.uint32)
    pool = np.unique(draw.integers(0, 1 << 32, 3200, np.uint32))
    last = pool[np.argsort(pool * data.MIX)[-6:]]                # these are hashed to a parent's end, and flow over
    left = np.concatenate([np.sort(draw.choice(last if size < 9 else pool, size, replace=False)) for size in sizes])
    owner = np.repeat(np.arange(70_000), sizes)
    nodes = np.concatenate([owner, owner, draw.integers(0, 70_000, 9000)])
    words = np.concatenate([left, draw.permutation(left), draw.choice(last, 9000)])
    table = {(node, word): i for i, (node, word) in enumerate(zip(owner.tolist(), left.tolist()))}
    want = {i: table[pair] for i, pair in enumerate(zip(nodes.tolist(), words.tolist())) if pair in table}
    pack = lambda values, bits: data.Packed(np.concatenate([*data.Packed.blocks([values], bits)]), bits)
    searches = [data.Trie(child, left), data.Trie(pack(child, 18), pack(left, 32))]
    for size in (64, 1 << 20):
        monkeypatch.setattr(data, "BLOCK", size)
        searches.append(data.Probing(child, left, np.concatenate([*data.Probing.blocks(child, left)])))
    assert (searches[2].slots == searches[3].slots).all()
    for search in searches[:3]:
        which, found = search.find(nodes, words)
        assert len(which) == len(want) and dict(zip(which.tolist(), found.tolist())) == want


def test_words_are_cut_and_found_as_their_bytes_say():
    draw = random.Random(0)
    text = bytes(draw.choice(b"aab \t\r\n\0\v\f\x85\xa0\xff\xc2") for _ in range(3000))
    for block in (text, text[:-1] + b"a", b"", b"a", b"\n\n"):
        found, begin, end = data.cut(block)
        assert [found[a:b].tobytes() for a, b in zip(begin, end)] == data.space_words(block) and not len(block) or len(found) > len(block)
    words = {b"x" * n + last for n in range(1, 26) for last in (b"", b"a", b"b", b"\x01", b"\xff")} | {b"y" * 3000, b"y" * 3001}
    for size in (3, 4, 10, len(words)):
        known = [b"<unk>", b"<s>", *draw.sample(sorted(words), size)]
        table = data.Words.build(known)
        asked = [*known, *sorted(words), b"z", b"x" * 40]
        ids = table.find(data.hash_words(*data.cut(b" ".join(asked))))
        assert ids.tolist() == [known.index(word) if word in known else 0 for word in asked]
        assert [table.word(i) for i in range(len(known))] == known


GRAMS = {"<unk>": (-3.0, None), "<s>": (-99.0, -.25), "</s>": (-1.5, None), "a": (-1.0, -.5), "b": (-.75, -.125), "c": (-2.0, 0.0),
         "<s> a": (-.5, -.0625), "a b": (-.375, -.03125), "b c": (-.625, 0.0), "<s> a b": (-.25, None), "a b c": (-.125, None)}


def test_model_files_are_mapped_and_the_same_each_time(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_bytes(kn_text("han"))
    ngrams = data.estimate([tmp_path / "t.txt"], 4, discount_fallback=[])
    for quant in (0, 2, 8, 32):
        path, again = tmp_path / f"{quant}.kn", tmp_path / "again.kn"
        data.save_model(ngrams, path, quant)
        monkeypatch.setattr(data, "BLOCK", 64)
        data.save_model(data.from_ngrams(ngrams).ngrams(), again, quant)
        monkeypatch.undo()
        raw, model = path.read_bytes(), data.open_model(path)
        assert raw == again.read_bytes()
        arrays = [model.words.text, model.words.ends, model.words.hashes, model.words.slots]
        for array in [*model.logp[1:], *model.bow[1:], *model.left[2:], *model.child[1:]]:
            arrays += [array.codes.data, array.table] if hasattr(array, "codes") else [getattr(array, "data", array)]
        for array in (np.asarray(array) for array in arrays):
            while isinstance(array, (np.ndarray, memoryview)):
                array = array.base if isinstance(array, np.ndarray) else array.obj
            assert isinstance(array, __import__("mmap").mmap)
        *head, start, size = data.KN_HEAD.unpack(raw[:64])
        with open(tmp_path / "big.kn", "wb") as file:            # the same model around 32 GB of nothing
            file.write(data.KN_HEAD.pack(*head, start + (1 << 35), size + (1 << 35)) + raw[64:start])
            file.seek(1 << 35, os.SEEK_CUR)
            file.write(raw[start:])
        ids, starts = model.ids(kn_text("han"))
        start = time.monotonic()
        assert (data.open_model(tmp_path / "big.kn").score(ids, starts)[0] == model.score(ids, starts)[0]).all()
        assert time.monotonic() - start < 2
    for quant in (-1, 1, 17, 31, 33):
        with pytest.raises(T.UsageError, match=f"--quant={quant} "):
            data.save_model(ngrams, path, quant)


def test_what_is_no_model_is_refused_in_one_line(tmp_path):
    path, raw = tmp_path / "m.kn", data.from_ngrams(data.read_arpa(dump_arpa(tmp_path / "m.arpa", GRAMS)))
    data.save_model(raw.ngrams(), path)
    raw = path.read_bytes()
    assert data.open_model(path).counts == [0, 6, 3, 2]
    for what, part in [(raw[:n], "") for n in range(0, len(raw), 61)] + [
            (raw[:-1], f"has {len(raw) - 1:,} bytes, not {len(raw):,}"), (raw + b"x", "bytes, not"),
            (raw[:16] + b"\x07" + raw[17:], "version 7"), (raw.replace(b'"f4"', b'"qq"'), "directory"),
            (raw.replace(b"bow.1", b"row.1"), "directory"), (raw[:-20] + b"}" * 20, "directory"), (raw[:-20] + b"\xff" * 20, "directory"),
            (b"hello\n", "line 1: expected \\data\\"), (b"\x1f\x8b" + bytes(80), "expected \\data\\"), (b"", "line 1: the file ends here")]:
        path.write_bytes(what)
        with pytest.raises(T.UsageError) as error:
            data.open_model(path)
        one_line(error, str(path), part)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(T.UsageError) as error:
            data.open_model(path)
        one_line(error, "cannot read", str(path))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_arpa_lines_may_come_in_any_order(order, tmp_path):
    draw, grams = random.Random(order), random_grams(order, order, ("a", "b", "<unk>"), dead_ends=True)
    dump_arpa(tmp_path / "a.arpa", grams)
    text = dump_arpa(tmp_path / "b.arpa", grams, draw).read_text().replace("\n\n", "\n\n  \n# of nothing\n")
    text = text.replace("\n", " \r\n").replace("<unk>", "<UNK>")
    with gzip.open(tmp_path / "b.arpa.gz", "wt", newline="") as file:
        file.write("# a comment\n\n" + text.replace("ngram ", "ngram\t").replace("=", " = "))
    lines = [draw.choices([b"a", b"b", b"c", b"z"], k=draw.randint(0, 7)) for _ in range(50)]
    want = [row[:2] for line in lines for row in ask_slowly(read_arpa_slowly(tmp_path / "a.arpa")[1], order, line)]
    for path in (tmp_path / "a.arpa", tmp_path / "b.arpa", tmp_path / "b.arpa.gz"):
        model = data.open_model(path)
        logp, length = model.score(*model.ids(b"\n".join(map(b" ".join, lines))))
        assert [*zip(logp.tolist(), length.tolist())] == want


def test_pruned_suffixes_are_put_back(tmp_path):
    """By hand: d after c, after b c and after z b c; none of c d, b c d, b c is listed, only a b c d and what begins it."""
    grams = {"<s>": (-99.0, None), "</s>": (-1.0, None), "a": (-1.0, -.5), "b": (-1.25, -.25), "c": (-1.5, -.125),
             "d": (-2.0, None), "a b": (-.5, -.0625), "a b c": (-.25, -.5), "a b a": (-.75, None), "a b c d": (-.125, None)}
    model = data.open_model(dump_arpa(tmp_path / "m.arpa", grams))
    assert model.counts == [0, 7, 4, 3, 1]
    ids = model.ids(b"c d b c d a b c d a b d z b a", eos=False)[0]
    logp, length = model.score(ids, np.array([0]), bos=False)
    assert [*zip(logp.tolist(), length.tolist())] == [
        (-1.5, 1), (-.125 - 2, 2),                               # c; c d: put back as bow(c) + p(d)
        (-1.25, 1), (-.25 - 1.5, 2), (0 - .125 - 2, 3),          # b; b c: bow(b) + p(c); b c d: b c has no back-off, then c d
        (-1.0, 1), (-.5, 2), (-.25, 3), (-.125, 4), (-1.0, 1), (-.5, 2), (-.0625 - .25 - 2, 1),
        (-100, 1), (-1.25, 1), (-.25 - 1, 2)]                    # an unknown word, which this file does not list; b; b a: bow(b) + p(a)
    bows = [[model.ngrams().bow[n][i] for i in range(model.counts[n])] for n in (1, 2, 3)]
    assert [sorted(str(x) for x in row) for row in bows[1:]] == [["-0.0", "-0.0", "-0.0625", "0.0"], ["-0.0", "-0.0", "-0.5"]]


def test_faults_in_an_arpa_are_found_by_line(tmp_path):
    lines = dump_arpa(tmp_path / "m.arpa", GRAMS).read_text().split("\n")
    assert [lines.index(f"\\{n}-grams:") for n in (1, 2, 3)] == [5, 13, 18]            # line numbers are one more

    def refused(at, old, new, *parts):
        text = [*lines]
        assert old in text[at]
        text[at] = text[at].replace(old, new)
        (tmp_path / "m.arpa").write_text("\n".join(line for line in text if line != "GONE"))
        with pytest.raises(T.UsageError) as error:
            data.open_model(tmp_path / "m.arpa")
        one_line(error, "m.arpa", *parts)

    refused(2, "3", "4", "line 18: ", "expected log10 p, 2 words", "announces 1 more 2-grams")
    refused(2, "3", "2", "line 17: ", "expected \\3-grams: here, by the counts")
    refused(3, "2", "1", "line 21: ", "expected \\end\\")
    refused(3, "2", "3", "line 22: ", "3 words")
    refused(2, "ngram 2", "ngram 4", "line 3: ", "expected `ngram 2=COUNT`")
    refused(1, lines[1], "GONE", "line 2: ", "expected `ngram 1=COUNT`")
    refused(16, "b c", "b q", "line 17: ", "'q' is not among the 1-grams")
    refused(16, "b c\t0.0", "b", "line 17: ", "2 words")
    refused(9, "-1.0", "-1.0.0", "line 10: ", "log10 probability", "-1.0.0")
    for bad in ("x", "nan", "inf", "-inf", ".25", "1e", "-1_0", "0x1", "-" + "1" * 45):
        refused(20, "-0.125", bad, "line 21: ", "log10 probability, at most 0")
    refused(14, "-0.0625", "-inf", "line 15: ", "log10 back-off", "-inf")
    refused(19, "a b", "a b\t-0.5", "line 20: ", "back-off of 0 at the highest order")
    refused(16, "b c", "a b", "2-gram b'a b' is there twice")
    refused(9, "\ta", "\tb", "1-gram b'b' is there twice")
    refused(7, "<s>", "s", "<s> and </s> are needed")
    refused(20, "a b c", "c b c", "3-gram b'c b c' is there, its context b'c b' is missing")
    refused(16, "b c", "b <s>", "<s> after another word")
    for n in range(1, 22):                                       # cut short after any line but the last
        (tmp_path / "m.arpa").write_text("\n".join(lines[:n]) + "\n")
        with pytest.raises(T.UsageError) as error:
            data.open_model(tmp_path / "m.arpa")
        one_line(error, f"line {n + 1}: ")
    (tmp_path / "cut.arpa.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-20])
    with pytest.raises(T.UsageError, match="cannot read .*cut.arpa.gz"):
        data.open_model(tmp_path / "cut.arpa.gz")


def test_long_arpas_are_read_in_blocks(tmp_path):
    """70,000 words, each after the one before it; then one fault far behind."""
    many = 70_000
    after = [f"-0.{i % 89 + 10}" for i in range(many - 1)]
    lines = ["\\data\\", f"ngram 1={many + 3}", f"ngram 2={many - 1}", "", "\\1-grams:", "-3\t<unk>", "-99\t<s>", "-1\t</s>",
             *(f"-{i % 90 + 1}\tw{i}\t-{i % 7}" for i in range(many)), "", "\\2-grams:",
             *(f"{p}\tw{i} w{i + 1}" for i, p in enumerate(after)), "", "\\end\\", ""]
    (tmp_path / "m.arpa").write_text("\n".join(lines))
    model = data.open_model(tmp_path / "m.arpa")
    logp, length = model.score(*model.ids(b" ".join(b"w%d" % i for i in range(many)), eos=False), bos=False)
    assert logp[0] == -1 and (length[1:] == 2).all() and (logp[1:] == np.float32([*map(float, after)])).all()
    lines[-9] = "-0.5\tw1 nowhere"
    (tmp_path / "m.arpa").write_text("\n".join(lines))
    with pytest.raises(T.UsageError, match=f"line {len(lines) - 8}: .*nowhere"):
        data.open_model(tmp_path / "m.arpa")


def test_query_prints_by_hand(tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(tmp_path)
    dump_arpa(tmp_path / "m.arpa", GRAMS)
    data.main(["kn", "arpa", "m.arpa", "--out", "m.kn", "--quant", "32"])
    Path("t.txt").write_bytes(b"a b\tc\r\n\nb\vc \xff\n")
    with gzip.open("t.txt.gz", "wb") as file:
        file.write(Path("t.txt").read_bytes()[:-1])
    rows = (b"a -.5 2", b"b -.25 3", b"c -.125 3", b"</s> -1.5 1", b"</s> -1.75 1", b"b\vc -3.25 1", b"\xff -3 1", b"</s> -1.5 1")
    words = b"".join(b"%s\t%.6f\t%s\t%d\n" % (w, float(p), n, w in (b"b\vc", b"\xff")) for w, p, n in (row.split(b" ") for row in rows))
    totals = (f"Total log10 p:\t-11.875000\nPerplexity including OOVs:\t{10 ** (11.875 / 8):.6f}\n"
              f"Perplexity excluding OOVs:\t{10 ** (5.625 / 6):.6f}\nOOVs:\t2\nTokens:\t8\n").encode()
    for name, source in (("m.arpa", "t.txt"), ("m.kn", "t.txt"), ("m.kn", "t.txt.gz")):
        for flags, want in (([], words + totals), (["--summary"], totals)):
            capfdbinary.readouterr()
            data.main(["kn", "query", name, source, *flags])
            assert capfdbinary.readouterr().out == want
    import io
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("t.txt").read_bytes())))
    data.query("m.kn", out=(out := io.BytesIO()))
    assert out.getvalue() == words + totals
    Path("t.jsonl").write_text(json.dumps({"text": "a b\nc"}) + "\n" + json.dumps({"text": "b"}) + "\n")
    Path("none.txt").write_text("")
    Path("long.txt").write_bytes(b"a b c\nc new\n" * 200_000)      # more than one block
    for source, tokens, unknown in (("t.jsonl", 7, 0), ("none.txt", 0, 0), ("long.txt", 1_400_000, 200_000)):
        capfdbinary.readouterr()
        data.main(["kn", "query", "m.kn", source, "--summary"])
        out = capfdbinary.readouterr().out.decode()
        assert f"OOVs:\t{unknown}\nTokens:\t{tokens}\n" in out and ("nan" in out) == (not tokens)


def test_documents_cost_what_their_lines_cost(tmp_path):
    model, draw = data.open_model(dump_arpa(tmp_path / "m.arpa", GRAMS)), random.Random(3)
    grams = read_arpa_slowly(tmp_path / "m.arpa")[1]
    pieces = ["a", "b", "c", "new", "\n", "\n", "\n\n", " ", "\t", "\r\n", "\u00a0", "\v", "\x0c", "\x85", "\u2028", "\ud800"]
    texts = ["", "\n", " \n\t\n", "a", "a\n\nb\n", "a b c new"] + [" ".join(draw.choices(pieces, k=draw.randint(0, 20))) for _ in range(60)]
    want = []
    for text in texts:
        lines = [data.space_words(line) for line in text.encode("utf-8", "surrogatepass").split(b"\n")]
        found = [row for line in lines if line for row in ask_slowly(grams, 3, line)]
        want.append((sum(row[0] for row in found), len(found), sum(row[2] for row in found)))
    for batch in (1, 7, 1024):
        logp, tokens, unknown = data.document_scores(model, iter(texts), batch)
        assert [*zip(logp.tolist(), tokens.tolist(), unknown.tolist())] == want and tokens.dtype == unknown.dtype == np.int64
    assert [len(x) for x in data.document_scores(model, [])] == [0, 0, 0]


# ---- Queries, equal to KenLM ----

def peer_model(path):
    kenlm = pytest.importorskip("kenlm")
    config = kenlm.Config()
    config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
    return kenlm.Model(str(path), config)


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "padded"])        # KenLM reads no order 1
def test_queries_equal_kenlm(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_bytes(kn_text(name))
    Path("limit").write_text(" ".join(f"w{i}" for i in range(0, 40, 2)))
    data.main(["kn", "train", "t.txt", *GOLDEN[name].split(), "--arpa", "a.arpa", "--out", "m.kn"])
    model, peer = data.open_model("m.kn"), peer_model("a.arpa")
    lines = [b" ".join(line) for line in strange_lines(name, random.Random(1), 200)]
    lines = [line for line in lines if not {*b"\v\f"} & {*line}]   # kenlm.Model, not lmplz, cuts there too
    for bos, eos in itertools.product((True, False), repeat=2):
        ids, starts = model.ids(b"\n".join(lines), eos)
        logp, length = model.score(ids, starts, bos)
        want = [row for line in lines for row in peer.full_scores(line, bos, eos)]
        assert np.abs(logp - [row[0] for row in want]).max() < 1e-5
        assert list(zip(length.tolist(), (ids == 0).tolist())) == [row[1:] for row in want]
        ends = np.append(starts, len(ids))
        sums = np.diff(np.append(0, np.cumsum(logp, dtype=np.float64))[ends])
        assert sums == pytest.approx([peer.score(line, bos, eos) for line in lines], rel=1e-6, abs=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("order", [2, 3, 4])
def test_states_are_equal_where_kenlms_are(order, tmp_path):
    kenlm, draw, pairs = pytest.importorskip("kenlm"), random.Random(0), {}
    grams = random_grams(order, order, "abc")
    for g in [g for g in grams if 1 < len(g.split()) < order and not any(h.startswith(g + " ") for h in grams)][::2]:
        del grams[g]                                             # suffixes to be put back
    peer, model = peer_model(dump_arpa(tmp_path / "m.arpa", grams, draw)), data.open_model(tmp_path / "m.arpa")
    for _ in range(150):
        line, theirs, ours = draw.choices(["a", "b", "c", "z"], [3, 3, 3, 1], k=9), kenlm.State(), model.state()
        peer.BeginSentenceWrite(theirs)
        for word, id in zip(line, model.ids(" ".join(line).encode(), eos=False)[0].tolist()):
            after = kenlm.State()
            want = peer.BaseScore(theirs, word, after)
            logp, ours = model.extend(ours, id)
            theirs = after
            assert logp == pytest.approx(want, abs=1e-5)
            pairs.setdefault(ours, []).append(theirs)
    kinds = [same[0] for same in pairs.values()]
    assert all(state == same[0] for same in pairs.values() for state in same)
    assert not any(a == b for a, b in itertools.combinations(kinds, 2)) and len(kinds) > order


# ---- Normalisers ----

@pytest.mark.parametrize("text, mild, strong", [
    ("plain ascii\n", None, "plain ascii"),
    ("a\r\nb\rc\u2028d\fe\x85f\vg", "a\nb\nc\nd\ne\nf\ng", "a\nb\nc\nd\ne\nf\ng"),
    ("e\u0301\u00c5\u212b", "\u00e9\u00c5\u00c5", "eaa"),
    ("x\u00ad\u200b\ufeff\u2060y\0\x7f\ud800z", "xyz", "xyz"),
    ("\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e", None, "\U0001f469\U0001f467 \u0645\u06cc\u062e"),      # joiners spell words
    ("\tX  y \n\n z\u00a0\u3000 1\n", None, "x y\nz 0"),
    ("x\u00b2 \u00bd \u2460 \u0667", None, "x0 0\u20440 0 0"),
    ("Ｈello，World！「你好」。《红》、第１２回", None, 'hello,world!"你好".(红),第00回'),
    ("Don’t “quote” — ever… ÉCOLE Straße Ёлка", None, 'don\'t "quote" - ever... ecole strasse елка'),
    ("が\uff76\uff9e हिन्दी ที่", None, "がガ हिन्दी ที่"),      # vowel signs, tones and voicing are no accents
    ("\u1100\u1161", "\uac00", "\uac00"),
])
def test_normalisers_by_hand(text, mild, strong):
    assert data.NORMALIZE["none"](text) == text
    assert data.mild(text) == (text if mild is None else mild) and data.strong(text) == strong


def test_normalising_twice_changes_nothing():
    import unicodedata
    draw = random.Random(0)
    ranges = [(0, 0x250), (0x300, 0x370), (0x600, 0x700), (0x900, 0xe80), (0x1100, 0x1200), (0x1e00, 0x2600), (0x3000, 0x3400),
              (0xac00, 0xd7a4), (0xd800, 0xe000), (0xf900, 0x10000), (0x1d000, 0x1fa00), *((p << 16, p + 1 << 16) for p in range(17))]
    for _ in range(15_000):
        text = "".join(draw.choice([chr(draw.randrange(*draw.choice(ranges))), draw.choice("\r\n\u200b\ufeff\u0301\u3099\u0327 \t\0aA")])
                       for _ in range(draw.randint(1, 10)))
        once = data.mild(text)
        assert data.mild(once) == once == unicodedata.normalize("NFC", once) and not data.UNCLEAN.search(once), ascii(text)
        key = data.strong(text)
        assert data.strong(key) == key == data.strong(once), ascii(text)
        short = "".join(chr(ord(c) % 128) for c in text)         # the quick ways of ASCII are the long ones
        assert data.strong(short) == data.strong(short + "\n\u4e2d").removesuffix("\n\u4e2d").removesuffix("\u4e2d")
        assert data.mild(short + "\u4e2d") == data.mild(short) + "\u4e2d"


def test_texts_that_vanish_are_dropped(tmp_path):
    docs = [{"text": text, "id": i} for i, text in enumerate(["\u200b\ufeff", "a\r\nb", "c", "\n"])]
    assert clean(tmp_path, docs, "norm") == [{"text": "a\nb", "id": 1}, *docs[2:]]
    report = json.loads((tmp_path / "out/r.json").read_text())["norm"]
    assert (report["changed"], report["vanished"], report["documents"], report["documents_out"], report["bytes_out"]) == (2, 1, 4, 3, 5)


# ---- Quality rules ----

def lines(*counted):
    """lines(3, "a", 1, "b") is a a a b, a line each."""
    return "\n".join(text for n, text in zip(counted[::2], counted[1::2]) for _ in range(n))


def ngram_text(n, han, size):
    """n units twice, and a long word that fills the text up to `size` characters."""
    gap, part = ("", "一二三四五六七八九十百千万亿甲乙丙丁戊己"[:2 * n]) if han else (" ", " ".join("abcdefghij"[:n]))
    text = gap.join([part, "x", part, ""])
    return text + "y" * (size - len(text))


HAN_SENTENCE = "一二三四五六七八九十。"
BOUNDS = [                             # rule: a text just inside, one just outside, what is said of that
    ("gopher: words", "ab " * 50, "ab " * 49 + "--- ... 。", "49 < 50"),
    ("gopher: words", "字" * 100, "字，" * 99, "49.5 < 50"),
    ("gopher: words", " ".join(map(str, range(100_000))), " ".join(map(str, range(100_001))), "1e+05 > 100000"),
    ("gopher: mean word length", "abc -", "abc ab", "2.5 < 3"),
    ("gopher: mean word length", "a" * 10, "a" * 10 + " " + "b" * 11, "10.5 > 10"),
    ("gopher: # per word", "#a b c d e f g h i j", "#a b c d e f g h i", "0.1111 > 0.1"),
    ("gopher: # per word", "字" * 20 + "#", "字" * 18 + "#", "0.1111 > 0.1"),
    ("gopher: ellipses per word", "a b c... d e f g h i j", "a b c d… e f g h i", "0.1111 > 0.1"),
    ("gopher: ellipses per word", "字…" + "字" * 19, "字…" + "字" * 15, "0.125 > 0.1"),
    ("gopher: lines with a bullet", lines(5, "- a", 4, " • b", 1, "c"), lines(5, "- a", 5, " • b", 1, "c"), "0.9091 > 0.9"),
    ("gopher: lines with a bullet", lines(9, "·字字", 1, "字"), lines(10, "●字字", 1, "字"), "0.9091 > 0.9"),
    ("gopher: lines ending in an ellipsis", lines(2, "a...", 1, "b… ", 7, "c"), lines(4, "字…", 6, "字"), "0.4 > 0.3"),
    ("gopher: words with a letter", "a. b2 c d e f g h 1 -", "a b c d e f g 1 2 -", "0.7 < 0.8"),
    ("gopher: words with a letter", "字" * 8 + "1 2", "字" * 7 + "1 2 3", "0.7 < 0.8"),
    ("gopher: stop words", "with the fog", "the To OF thesis the", "1 < 2"),
    ("gopher: stop characters", "的是", "的的字", "1 < 2"),
    ("gopher: repeated lines", "\n".join("aaaabcdefg"), " \n\n".join("aaaaabcdef"), "0.4 > 0.3"),
    ("gopher: repeated paragraphs", "\n\n".join("aaaabcdefg"), "\n \n".join("aaaaabcdef"), "0.4 > 0.3"),
    ("gopher: characters in repeated lines", "ab\nab\ncccc", "ab\nab\nccc", "0.2222 > 0.2"),
    ("gopher: characters in repeated paragraphs", "ab\n\nab\n\ncc", "ab\n\nab\n\nc", "0.2222 > 0.2"),
    ("c4: sentences", "One two three four five. Six? Yes!", "One two three four five. Six, so yes.\nAnd more!", "2 < 3"),
    ("c4: sentences", HAN_SENTENCE * 3, HAN_SENTENCE * 2 + "\n一二三四五六七八九。", "2 < 3"),
    ("c4: curly brackets", "}", "{}", "1 > 0"),
    ("c4: lorem ipsum", "Lorem, ipsum", "Lorem Ipsum", "1 > 0"),
    ("fineweb: lines ending in punctuation", lines(3, "a.", 22, "b"), lines(1, "a.", 1, "a!", 15, "b,"), "0.1176 < 0.12"),
    ("fineweb: lines ending in punctuation", lines(3, "字。", 22, "字"), lines(2, "字？", 15, "字，"), "0.1176 < 0.12"),
    ("fineweb: short lines", lines(67, "x" * 29, 33, "x" * 30), lines(68, "x" * 29, 32, "x" * 30), "0.68 > 0.67"),
    ("fineweb: short lines", lines(67, "字" * 14, 33, "字" * 15), lines(68, "字" * 14, 32, "字" * 15), "0.68 > 0.67"),
    ("fineweb: characters in repeated lines", "a\n\na\nbbbbbbbb", "a\na\nbbbbbbb", "0.1111 > 0.1"),
    ("fineweb: line breaks per word", lines(3, "a b c", 1, "d"), lines(3, "a b c", 1, ""), "0.3333 > 0.3"),
    ("fineweb: line breaks per word", lines(3, "字" * 6, 1, "字字"), lines(3, "字" * 6, 1, ""), "0.3333 > 0.3"),
    ("script: misread characters", "Ã©" + "é" * 198, "â€™" + "é" * 198, "0.01493 > 0.01"),
    *((f"gopher: characters in {what} {n}-gram{s}", ngram_text(n, han, -(-size * 100 // most)),
       ngram_text(n, han, (size * 100 - 1) // most), f"> {most / 100:g}")
      for han in (0, 1) for what, s, n, most, size in [
          *(("the top", "", n, most, 4 * n if han else 4 * n - 2) for n, most in ((2, 20), (3, 18), (4, 16))),
          *(("repeated", "s", n, 20 - n, 2 * n if han else n) for n in range(5, 11))]),
]


@pytest.mark.parametrize("rule, inside, outside, says", BOUNDS, ids=[rule for rule, *_ in BOUNDS])
def test_a_rule_is_kept_on_its_bound_and_broken_beyond(rule, inside, outside, says):
    rules = [rule.partition(":")[0]]
    assert rule not in data.failures(inside, rules) and data.failures(outside, rules)[rule].endswith(says)


def test_every_rule_has_its_bounds_tried():
    tried = {rule for rule, *_ in BOUNDS}
    missing = {f"{name}: {rule.what}" for name in data.RULES for rule in data.RULES[name]} - tried
    assert all(rule.startswith("repetition: ") and rule.replace("repetition", "gopher") in tried for rule in missing)
    broken = data.failures("a b\n" * 50, ["gopher", "repetition"])           # a rule that two sets share counts once
    assert "gopher: repeated lines" in broken and not any(rule.startswith("repetition") for rule in broken)
    for text in ("", " ", "\n\n", "。", "{", "\ud800", "\0", "...\n" * 30, "的" * 5):
        data.failures(text, data.RULES)


def test_script_misreadings_and_the_lines_of_c4():
    assert [data.script_of(text) for text in ("", "字字 word", "ひらがな 字", "字字字 word", "字，字")] == ["latin"] * 3 + ["han"] * 2
    assert data.MISREAD.findall("cafÃ© â€œxâ€\x9d \ufffd") == ["Ã©", "â€œ", "â€\x9d", "\ufffd"]
    assert not data.MISREAD.search("café naïve Köln Ångström “quoted” — £5 © 2020")
    keeps = ["This line has five words.", "Sources say so in the text!", "y " * 5 + "x" * 999 + ".", 'He said "so it is now"']
    loses = ["Four words are few.", "This line lacks the final stop", "It is cut short here...", "y " * 5 + "x" * 1000 + ".",
             "Please enable Javascript to see this page.", "See our Terms of Use before you go."]
    mixed = "\n".join(line for pair in itertools.zip_longest(keeps, loses, fillvalue="") for line in pair)
    assert data.Anatomy(mixed.replace(" has", "[1] has").replace("!", "![citation needed]")).c4_lines == keeps
    han = [HAN_SENTENCE, "请先阅读隐私政策再继续使用。", HAN_SENTENCE[:-1], f"他说：“{HAN_SENTENCE}”"]
    assert data.Anatomy("\n".join(han)).c4_lines == han[::3]


def test_ngram_repeats_equal_the_slow_search():
    def slow(words, top_n, dup_n, gap):
        found = {}
        for n in top_n:
            grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
            gram, count = max(Counter(grams).items(), key=lambda item: item[1], default=((), 0))
            found[n] = count * (sum(map(len, gram)) + gap * (n - 1)) if count > 1 else 0
        for n in dup_n:
            seen, i, found[n] = set(), 0, 0
            while i + n <= len(words):
                gram = tuple(words[i:i + n])
                found[n] += sum(map(len, gram)) if gram in seen else 0
                i += n if gram in seen else 1
                seen.add(gram)
        return found

    draw = random.Random(0)
    for _ in range(1500):
        words = [draw.choice(["a", "bb", "ccc", "d", "ee"][:draw.randint(1, 5)]) for _ in range(draw.randint(0, 40))]
        words += words[:draw.randint(0, 40)] + words if draw.random() < 0.3 else []
        gap = draw.randint(0, 1)
        assert data.ngram_repeats(words, (2, 3, 4), range(5, 11), gap) == slow(words, (2, 3, 4), range(5, 11), gap), words


# ---- Perplexity filter ----

def clean(folder, docs, command, *flags, out="out"):
    """kept.jsonl of a stage over texts or documents, without leaving this process."""
    write_jsonl(folder / f"{out}.jsonl", [d if isinstance(d, dict) else {"text": d} for d in docs])
    data.main([command, str(folder / f"{out}.jsonl"), "--out", str(folder / out), "--report", str(folder / out / "r.json"), *map(str, flags)])
    return read_jsonl(folder / out / "kept.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two trigram models and their ARPA files: a.kn, a.arpa, b.kn, b.arpa."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        (folder / name).with_suffix(".txt").write_text("\n".join(map(" ".join, pareto_sentences(seed, 300, letters=20))))
        out = ["--out", f"{folder}/{name}.kn", "--arpa", f"{folder}/{name}.arpa"]
        data.main(["kn", "train", f"{folder}/{name}.txt", "--order", "3", "--discount_fallback", *out])
    return folder


def scored_texts(seed, n):
    """Texts of known and unknown words, with blank lines; the last has no words."""
    return ["\n".join(map(" ".join, pareto_sentences(seed + i, 1 + i % 5, 6, 26))) + "\n" * (i % 3) or "q" for i in range(n)] + [" \n\t\n"]


def slow_perplexity(grams, text):
    """By hand from {n-gram: (log10 p, back-off)}: p(w | h) is that of the longest n-gram known, times the back-offs on the way."""
    total, tokens, known = 0.0, 0, lambda words: grams.get(" ".join(words).encode())
    for line in filter(str.strip, text.split("\n")):
        said = ["<s>"]
        for word in [*line.split(), "</s>"]:
            said.append(word if known([word]) else "<unk>")
            gram, tokens = said[-3:], tokens + 1
            while not known(gram):
                total, gram = total + (known(gram[:-1]) or (0, 0))[1], gram[1:]
            total += known(gram)[0]
    return 10 ** (-total / tokens) if tokens else None


def test_perplexity_of_a_document_equals_the_slow_sum(models):
    docs = [{"text": text, "meta": {"lang": "en fr".split()[i % 3]} if i % 3 < 2 else {}} for i, text in enumerate(scored_texts(0, 600))]
    grams = {group: read_arpa_slowly(models / f"{name}.arpa")[1] for group, name in (("en", "a"), ("fr", "b"))}
    known = {"en": data.open_model(models / "a.kn"), "*": data.open_model(models / "b.kn")}
    for d in data.score(iter(docs), known, "meta.lang"):
        group = d["meta"].get("lang", "en")                      # without the field: a text of Latin script
        want, words = slow_perplexity(grams[group], d["text"]), d["text"].split()
        tokens = len(words) + sum(map(bool, map(str.strip, d["text"].split("\n"))))          # each line with words ends in </s>
        unknown = sum(word.encode() not in grams[group] for word in words)
        assert d["ppl"] == (want and pytest.approx(want, rel=1e-5))
        assert d["_filter"] == dict(group=group, tokens=tokens, unknown=unknown, broken={})
    assert docs[-1]["ppl"] is None and docs[0]["ppl"] > 1        # no tokens
    assert next(data.score([{"text": "a b"}], {"fr": known["en"]}))["ppl"] is None           # no model


@pytest.mark.parametrize("document, by, group", [
    ({"text": "a"}, "", "all"), ({"text": "a"}, "lang", "en"), ({"text": "字字"}, "lang", "zh"), ({"text": "字", "lang": "de"}, "lang", "de"),
    ({"text": "a", "meta": {"lang": "fr"}}, "meta.lang", "fr"), ({"text": "a", "meta": "fr"}, "meta.lang", "en"),
    ({"text": "a", "meta": {"part": {"n": 0}}}, "meta.part.n", "0"), ({"text": "字字", "meta": None}, "meta.lang", "zh"),
])
def test_a_group_is_a_path_of_fields(document, by, group):
    assert data.group_of(document, by) == group


def test_quantiles_cut_both_ends_and_bounds_are_kept():
    ppl = {"en": [*range(11, 0, -1)], "zh": [5, None, 5, 5], "none": [None]}
    cuts = data.thresholds(ppl, (0.1, 0.65))
    assert cuts == {"en": [2, 7.5], "zh": [5, 5]}                # order statistics 1 and 6.5 of 0 .. 10
    scored = [dict(text="x", ppl=p, _filter=dict(group=group, tokens=1, unknown=0, broken={})) for group in ppl for p in ppl[group]]
    kept, lost = ([json.loads(line) for line in data.judge(map(dict, scored), Counter(), cuts, dropped=dropped)] for dropped in (False, True))
    assert kept == [{"text": "x", "ppl": p} for p in (7, 6, 5, 4, 3, 2, 5, 5, 5)]
    assert [d["reason"] for d in lost] == [*(f"ppl {p}.0 > 7.5 (en)" for p in (11, 10, 9, 8)), "ppl 1.0 < 2.0 (en)"] + [
        f"ppl unknown (no tokens, or no model of {group})" for group in ("zh", "none")]
    assert data.thresholds(ppl, (), (20, 800)) == {"*": [20, 800]}
    assert [data.cut_of({"*": [20, 800], "en": [1, 2]}, group) for group in ("en", "fr")] == [[1, 2], [20, 800]]
    for quantile, limits in ((0.6, 0.05), ()), ((-0.1, 1), ()), ((0, 1.5), ()), ((), (800, 20)):
        with pytest.raises(T.UsageError, match="keep_quantile" if quantile else "ppl_range"):
            data.thresholds(ppl, quantile, limits)
    with pytest.raises(T.UsageError, match="en, zh, not of 'fr'"):
        data.cut_of(cuts, "fr")


def test_a_second_sample_is_cut_like_the_first(models, tmp_path):
    cuts, flags = tmp_path / "cuts.json", ["--by", "lang", "--thresholds", tmp_path / "cuts.json"]
    docs = [{"text": text, "lang": "en" if i % 3 else "fr", "id": i} for i, text in enumerate(scored_texts(0, 400))]
    kept = clean(tmp_path, docs, "filter", "--kn", models / "a.kn", "--keep_quantile", .1, .6, *flags)
    written, found = cuts.read_bytes(), json.loads(cuts.read_text())["thresholds"]
    every = kept + read_jsonl(tmp_path / "out/dropped.jsonl")
    assert sorted(d["id"] for d in every) == [*range(401)] and [d["id"] for d in kept] == sorted(d["id"] for d in kept)
    for group in ("en", "fr"):
        values = sorted(d["ppl"] for d in every if d["lang"] == group and d["ppl"])
        assert found[group] == pytest.approx([np.interp(q * (len(values) - 1), range(len(values)), values) for q in (.1, .6)], rel=1e-9)
    more = [{"text": text, "lang": "en"} for text in scored_texts(5000, 90)]
    every = clean(tmp_path, more, "filter", "--kn", models / "a.kn", *flags, out="more") + read_jsonl(tmp_path / "more/dropped.jsonl")
    assert len(every) == 91 and all(("reason" not in d) == (found["en"][0] <= (d["ppl"] or 0) <= found["en"][1]) for d in every)
    with pytest.raises(T.UsageError, match="another model"):
        clean(tmp_path, more, "filter", "--kn", models / "b.kn", *flags, out="other")
    with pytest.raises(T.UsageError, match="--kn"):
        clean(tmp_path, more, "filter", "--rules", "c4", *flags, out="other")
    assert cuts.read_bytes() == written
    for junk in ("{", "[]", '{"models": {}, "thresholds": {"en": [1]}}', json.dumps({"models": {}, "thresholds": found})):
        cuts.write_text(junk)
        with pytest.raises(T.UsageError, match="cannot be used"):
            data.load_thresholds(cuts, {"*": data.open_model(models / "a.kn")})


# ---- Filter report ----

def test_a_report_counts_every_document_and_escapes_every_text(models, tmp_path):
    import re
    texts = [f"<script>{{</script> & 'q' {text}" if i % 9 and text.strip() else text for i, text in enumerate(scored_texts(0, 200))]
    docs = [{"text": text, "lang": "en" if i % 3 else "<i>zh", "id": f"</pre>{i}&"} for i, text in enumerate(texts)]
    flags = ["--kn", models / "a.kn", "--keep_quantile", .2, .7, "--by", "lang", "--rules", "c4", "--examples"]
    groups_of = lambda out: json.loads((tmp_path / out / "r.json").read_text())["filter"]["groups"]
    kept, dropped = clean(tmp_path, docs, "filter", *flags, 7), read_jsonl(tmp_path / "out/dropped.jsonl")
    groups, page = groups_of("out"), (tmp_path / "out/report.html").read_text()
    for group, tables in groups.items():
        for fate, those in ("kept", kept), ("dropped", dropped):
            mine = [d for d in those if d["lang"] == group]
            assert tables["documents"].get(fate, {"documents": 0})["documents"] == len(mine)
            assert sum(bin.get(fate, 0) for bin in tables["perplexity"].values()) == sum(d["ppl"] is not None for d in mine)
        reasons = [[re.sub(r"([\d.]+ )?([<>]|unknown).*", r"\2", part) for part in d["reason"].split("; ")] for d in mine]
        for what, row in tables["dropped for"].items():
            assert (row["documents"], row["alone"]) == (sum(what in r for r in reasons), reasons.count([what]))
        assert {what for r in reasons for what in r} == {*tables["dropped for"]}
        low, high, every = *tables["cuts"], sorted(d["ppl"] for d in kept + dropped if d["lang"] == group and d["ppl"])
        nearest = {"below the low cut": [p for p in every[::-1] if p < low], "above the low cut": [p for p in every if p >= low],
                   "below the high cut": [p for p in every[::-1] if p <= high], "above the high cut": [p for p in every if p > high]}
        assert {place: [entry[1] for entry in near] for place, near in tables["examples"].items()} == {k: v[:7] for k, v in nearest.items()}
    assert page.count("<svg") == 2 and page.count("<pre>") == page.count("</pre>") == 2 * 4 * 7 and "&lt;i&gt;zh" in page
    assert not any(bad in page for bad in ("<script", "<i>", "</pre></pre>", "src=", "href=", "http", "url("))
    everything = clean(tmp_path, docs, "filter", *flags, 7, "--score_only", out="only")
    reason = {d["id"]: d.get("reason") for d in kept + dropped}
    assert [(d["id"], d["text"], d.get("reason")) for d in everything] == [(d["id"], d["text"], reason[d["id"]]) for d in docs]
    assert groups_of("only") == groups and read_jsonl(tmp_path / "only/dropped.jsonl") == []
    clean(tmp_path, docs, "filter", *flags, 0, out="few")        # a report without examples tells the cuts
    assert groups_of("few")["en"]["cuts"] == groups["en"]["cuts"]


def test_c4_edits_what_it_keeps(tmp_path):
    texts = ["Menu\n" + "This sentence [1] has five words. " * 3 + "\nsee more...", "Menu\nShort {."]
    kept = clean(tmp_path, texts, "filter", "--rules", "c4", "--score_only")
    assert [d["text"] for d in kept] == texts and "c4: curly brackets 1 > 0" in kept[1]["reason"]
    assert clean(tmp_path, kept, "filter", "--rules", "script", out="again") == [{"text": text, "ppl": None} for text in texts]
    kept = clean(tmp_path, texts, "filter", "--rules", "c4", out="edit")
    assert kept == [{"text": ("This sentence  has five words. " * 3).strip(), "ppl": None}]
    why = "c4: sentences 0 < 3; c4: curly brackets 1 > 0"
    assert read_jsonl(tmp_path / "edit/dropped.jsonl") == [{"text": texts[1], "ppl": None, "reason": why}]


@pytest.mark.peer
def test_perplexity_of_a_document_equals_kenlm(models):
    kenlm = pytest.importorskip("kenlm")
    theirs, texts = kenlm.Model(str(models / "a.arpa")), scored_texts(7, 300)
    for d in data.score([{"text": text} for text in texts], {"*": data.open_model(models / "a.kn")}):
        sentences = [line for line in d["text"].split("\n") if line.strip()]
        tokens = sum(len(line.split()) + 1 for line in sentences)
        assert d["ppl"] == (pytest.approx(10 ** (-sum(map(theirs.score, sentences)) / tokens), rel=1e-4) if tokens else None)


# ---- Deduplication ----

def slow_units(text):
    """[place, unit]: a word, or one character of a script without spaces, with its marks; cases are one."""
    import regex
    found, before = [], 0
    for i, c in enumerate(text):
        kind = 0 if c in " ,." else next((k for k, p in ((3, r"\p{M}"), (2, data.UNSPACED), (1, r"\w")) if regex.match(p, c)), 0)
        folded = c.casefold() if len(c.casefold()) == 1 else c
        if kind == 2 or kind and not before or kind == 1 and before == 2:
            found.append([i, folded])
        elif kind:
            found[-1][1] += folded
        before = kind
    return found


def slow_shingles(text, n=5):
    words = [unit for _, unit in slow_units(text)]
    return [tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))] if words else [text]


def jaccard(a, b):
    return len(a & b) / len(a | b)


def families(seed, n):
    """Latin and Han texts, short and long, and each again with some of its units changed; texts without any unit."""
    draw, texts = random.Random(seed), ["...", "!!!", "\U0001f600 \U0001f600", "...", "x", "X.", "字"]
    for family in range(n):
        new = (lambda: chr(draw.randrange(0x4e00, 0x9000))) if family % 2 else lambda: "".join(draw.choices("etaoinshr", k=6))
        units = [new() for _ in range(draw.choice([1, 3, 4, 5, 6, draw.randint(7, 60)]))]
        units += units[:len(units) // draw.choice([1, 2, 9])]
        for rate in draw.sample([0, 0, 0.01, 0.03, 0.1], draw.randint(1, 4)):
            text = draw.choice(["", "。", "\n"] if family % 2 else [" ", ", ", "\n"]).join(new() if draw.random() < rate else u for u in units)
            texts.append(draw.choice([str, str.upper])(text))
    draw.shuffle(texts)
    return texts


def pairs_of_texts(n, han, size):
    """n pairs of all likenesses, one text after the other; their shingles; the Jaccard index of each pair."""
    draw, texts, sets = random.Random(size + han), [], []
    new = lambda: chr(0x4e00 + draw.randrange(6000)) if han else f"w{draw.randrange(30000)}"
    for pair in range(n):
        units, share = [new() for _ in range(size)], draw.uniform(0.4, 1)
        change, at = (1 - share) / (1 + share), draw.randrange(size)
        if pair % 2:                                             # one stretch is another, or units here and there
            other = units[:at] + [new() for _ in range(int(size * change))] + units[at + int(size * change):]
        else:
            other = [new() if draw.random() < change / 4 else unit for unit in units]
        texts += [("" if han else " ").join(u) for u in (units, other)]
        sets += [{tuple(u[i:i + 5]) for i in range(len(u) - 4)} for u in (units, other)]
    return texts, sets, np.array([*map(jaccard, sets[::2], sets[1::2])])


def test_units_and_shingles_equal_the_slow_ones():
    draw = random.Random(1)
    some = "aB cÄß\n.,-_'9 中文〇かなー한국 ไทยที่ हिन्दी e\u0301 \U0001f600\ufeff\ud800 İI \U00020000"
    texts = ["".join(draw.choices(some, k=draw.randint(0, 40))) for _ in range(300)] + ["", "...", "\n"]
    hashes, start, count = data.units(texts)
    slow = [slow_units(text) for text in texts]
    assert count.tolist() == [*map(len, slow)] and start.tolist() == [place for found in slow for place, _ in found]
    one_to_one = lambda pairs: len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert one_to_one(set(zip(hashes.tolist(), (unit for found in slow for _, unit in found))))
    for n in (1, 2, 5, 13):
        hashes, count = data.shingles(texts, n)
        want = [slow_shingles(text, n) for text in texts]
        assert count.tolist() == [*map(len, want)] and one_to_one(set(zip(hashes.tolist(), itertools.chain.from_iterable(want))))
    a, b = data.signatures(np.array([5, 5 + 2**31], np.uint32), np.array([1, 1]), 112).T     # minima of permutations: never equal
    assert (a != b).all()


def test_exact_keeps_the_first_of_equal_texts(tmp_path):
    draw, first = random.Random(0), {}
    docs = [{"text": draw.choice(["a", "b", "a ", "A", "字", "x" * 5, "..."]), "n": i} for i in range(90)]
    kept = clean(tmp_path, docs, "dedup", "--method", "exact")
    for d in docs:
        first.setdefault(d["text"], d["n"])
    assert [d["n"] for d in kept] == sorted(first.values())
    clusters = read_jsonl(tmp_path / "out/clusters.jsonl")       # numbers, where documents have no id
    assert [(c["dropped"], c["kept"]) for c in clusters] == [(d["n"], first[d["text"]]) for d in docs if first[d["text"]] != d["n"]]
    report = json.loads((tmp_path / "out/r.json").read_text())["dedup"]
    assert report["dropped"] == len(clusters) == 90 - report["documents_out"]
    assert report["bytes_out"] + report["bytes_dropped"] == sum(len(d["text"].encode()) for d in docs)
    assert report["clusters_of_size"] == {str(k): v for k, v in Counter(Counter(d["text"] for d in docs).values()).items()}


@pytest.mark.parametrize("least", [0.5, 0.7, 1])
def test_minhash_equals_the_greedy_search_of_all_pairs(least, tmp_path):
    """With bands of one row no pair can hide (0.5^60), so what is kept is what comparing all pairs keeps."""
    docs = [{"text": text, "id": f"d{i}"} for i, text in enumerate(families(2, 120))]
    kept = clean(tmp_path, docs, "dedup", "--bands", 60, "--rows", 1, "--min_jaccard", least)
    sets, stay = [set(slow_shingles(d["text"])) for d in docs], []
    for i, mine in enumerate(sets):
        if not any(jaccard(mine, sets[k]) >= least for k in stay):
            stay.append(i)
    assert kept == [docs[i] for i in stay] and len(docs) > len(kept) + 50
    pairs = [(int(c["kept"][1:]), int(c["dropped"][1:]), c["jaccard"]) for c in read_jsonl(tmp_path / "out/clusters.jsonl")]
    assert sorted([b for _, b, _ in pairs] + stay) == [*range(len(docs))]
    assert all(a in stay and a < b and j == round(jaccard(sets[a], sets[b]), 4) >= least for a, b, j in pairs)


@pytest.mark.parametrize("han, size", [(0, 60), (1, 60), (0, 12), (1, 300)])
def test_recall_is_that_of_the_bands(han, size, tmp_path):
    """Pairs of Jaccard index J meet with the probability 1 - (1 - J^rows)^bands, whatever the edit."""
    texts, _, J = pairs_of_texts(1000, han, size)
    clean(tmp_path, texts, "dedup", "--min_jaccard", 0.01)
    met = {(c["kept"], c["dropped"]) for c in read_jsonl(tmp_path / "out/clusters.jsonl")}
    hit, theory = np.array([(2 * i, 2 * i + 1) in met for i in range(1000)]), 1 - (1 - J**8) ** 14
    for low in np.arange(0.3, 1, 0.1):
        here = (J >= low) & (J < low + 0.1)
        want, spread = theory[here].sum(), np.sqrt((theory * (1 - theory))[here].sum())
        assert abs(hit[here].sum() - want) <= 4 * spread + 1, f"J {low:.1f}: {hit[here].sum()} of {here.sum()}, not {want:.1f}"


def slow_substrings(texts, span):
    """Texts without the units of every span that stood somewhere before, except where it overlaps that first occurrence."""
    flat, left, first, gone = [], [], {}, set()
    for text in texts:
        mine, begin = slow_units(text), len(flat)
        flat += [unit for _, unit in mine]
        for i in range(begin, len(flat) - span + 1):
            at = first.setdefault(tuple(flat[i:i + span]), i)
            gone |= set(range(max(i, at + span), i + span)) if at < i else set()
        places = [place for place, _ in mine] + [len(text)]
        kept = [text[a:b] for i, (a, b) in enumerate(zip(places, places[1:]), begin) if i not in gone]
        left += [text[:places[0]] + "".join(kept)] if kept or not mine else []
    return left


def test_substring_equals_the_slow_search(tmp_path):
    draw = random.Random(0)
    for trial in range(40):
        span, docs = draw.choice([1, 2, 3, 5, 8, 50]), []
        pool = [chr(0x4e00 + i) if trial % 2 else f"w{i}" for i in range(draw.choice([1, 2, 3, 20]))]
        for _ in range(draw.randint(1, 6)):
            units = draw.choices(pool, k=draw.choice([0, 1, 5, 20, 120]))
            units = (units[:draw.randint(1, 5)] * 100)[:draw.randint(1, 130)] if draw.random() < 0.3 else units
            docs.append(units + (draw.choice(docs) if docs and draw.random() < 0.5 else []))
        between = draw.choice(["", "。"] if trial % 2 else [" ", ". ", "\n"])
        texts = [draw.choice(["-", '"']) + between.join(units) + draw.choice(["", "."]) for units in docs]
        assert [d["text"] for d in clean(tmp_path, texts, "dedup", "--method", "substring", "--span", span)] == slow_substrings(texts, span)
    texts = [" ".join(map(str, range(600))), " ".join(map(str, range(-9, 700)))]
    kept = clean(tmp_path, texts, "dedup", "--method", "substring", "--span", 255)           # the most that a byte holds
    assert [d["text"] for d in kept] == slow_substrings(texts, 255)


@pytest.mark.parametrize("flag, value", [("--span", 0), ("--span", 256), ("--ngram", 0), ("--bands", 0), ("--rows", 0), ("--min_jaccard", 2)])
def test_sizes_that_cannot_be_are_refused(flag, value, tmp_path):
    with pytest.raises(T.UsageError, match=flag):
        clean(tmp_path, ["a b c", "d e f"], "dedup", "--method", "substring" if flag == "--span" else "minhash", flag, value)


@pytest.mark.parametrize("command, flags", [
    ("dedup", ["--method", "exact"]), ("dedup", ["--min_jaccard", .5]), ("dedup", ["--method", "substring", "--span", 4]),
    ("filter", ["--kn", "a.kn", "--rules", "script", "--keep_quantile", .1, .8]), ("norm", ["--norm", "strong"]),
])
def test_parts_batches_and_processes_change_nothing(command, flags, models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    docs, seen = [{"text": text, "id": i} for i, text in enumerate(families(3, 60) * 2)], []
    for part, batch, room, workers in (10**8, 1 << 18, 1 << 23, 1), (8000, 1, 300, 1), (3000, 500, 70, 2):
        monkeypatch.setattr(data, "PART_BYTES", part)
        monkeypatch.setattr(data.batches, "__defaults__", (batch,))
        monkeypatch.setattr(data.copied_tails, "__defaults__", (room,))
        clean(tmp_path, docs, command, *flags, "--workers", workers)
        seen.append({path.name: path.read_bytes() for path in sorted((tmp_path / "out").glob("[!.]*"))})
        (tmp_path / f"out/.{command}.json").unlink()
    assert seen[0] == seen[1] == seen[2] and len(data.Corpus([tmp_path / "out.jsonl"]).parts) > 2 and seen[0]["kept.jsonl"]


@pytest.mark.peer
def test_jaccard_estimates_are_as_good_as_datasketch():
    datasketch, theirs = pytest.importorskip("datasketch"), []
    texts, sets, J = pairs_of_texts(300, 1, 80)
    for shingles in sets:
        theirs.append(datasketch.MinHash(num_perm=112))
        theirs[-1].update_batch([repr(shingle).encode() for shingle in shingles])
    ours = data.signatures(*data.shingles(texts, 5), 112)
    rms = lambda found: np.sqrt(np.mean((np.array(found) - J) ** 2))
    mine, other = rms((ours[:, ::2] == ours[:, 1::2]).mean(0)), rms([a.jaccard(b) for a, b in zip(theirs[::2], theirs[1::2])])
    assert mine == pytest.approx(other, rel=0.2) and mine == pytest.approx(np.sqrt(np.mean(J * (1 - J) / 112)), rel=0.2)


# ---- Commands ----

def run_data(*args, stdin=None, check=True):
    done = subprocess.run([sys.executable, ROOT / "data.py", *map(str, args)], capture_output=True, text=True, input=stdin)
    assert not check or done.returncode == 0, done.stderr
    return done


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """English and Chinese documents, with copies, noise and what a normaliser mends."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("messy")
    words = "the of and to a in model that is text reads for with as on language from are by this data".split()
    sentence = lambda: " ".join(draw.choice(words) for _ in range(draw.randint(6, 14))).capitalize() + "."
    han = "的是了在和有我他这中大来上国个到说们为子你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    docs = []
    for i in range(240):
        text = "\n".join(sentence() for _ in range(draw.randint(8, 20))) if i % 4 else "\n".join(
            "".join(draw.choice(han) for _ in range(draw.randint(12, 30))) + "。" for _ in range(12))
        docs.append({"id": i, "text": text, "meta": {"lang": "en" if i % 4 else "zh"}})
    docs += [{"id": 300 + i, "text": docs[i]["text"], "meta": docs[i]["meta"]} for i in range(0, 40, 2)]
    docs += [{"id": 400 + i, "text": "".join(draw.choice("qxzjkw") for _ in range(600)), "meta": {"lang": "en"}} for i in range(6)]
    docs += [{"id": 500, "text": "cafe\u0301 \u200bno\r\nline. " * 30, "meta": {"lang": "en"}}]
    write_jsonl(folder / "good.jsonl", docs[:120])
    return write_jsonl(folder / "docs.jsonl", docs)


def test_prepare_runs_the_chain_and_train_reads_it(messy, tmp_path):
    out = tmp_path / "out"
    run_data("kn", "train", messy.parent / "good.jsonl", "--order", 3, "--out", tmp_path / "lm.kn", "--unit", "char", "--discount_fallback")
    done = run_data("prepare", messy, "--out", out, "--kn", tmp_path / "lm.kn", "--by", "meta.lang", "--keep_quantile", 0, .97,
                    "--vocab_size", 600, "--val_fraction", .1, "--seq_len", 64, "--fim_rate", .5, "--report", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report) == list(data.STAGES) and report == json.loads((out / "report.json").read_text())
    assert report["norm"]["documents_out"] == 267 and report["dedup"]["documents_out"] == 247 and report["norm"]["changed"] == 1
    assert "é no\nline." in next(d["text"] for d in read_jsonl(out / "norm/kept.jsonl") if d["id"] == 500)
    clusters = read_jsonl(out / "dedup/clusters.jsonl")
    assert {(c["kept"], c["dropped"]) for c in clusters} == {(i, 300 + i) for i in range(0, 40, 2)}
    kept, dropped = (read_jsonl(out / f"filter/{name}.jsonl") for name in ("kept", "dropped"))
    assert len(kept) + len(dropped) == 247 and {400, 401, 402, 403, 404, 405} <= {d["id"] for d in dropped}
    assert all(d["reason"] and d["ppl"] > 0 for d in dropped) and all(d["ppl"] > 0 and "reason" not in d for d in kept)
    meta, tok = data.open_prepared(out)
    assert tok.role("fim_prefix") and meta["documents"] == len(kept)
    loader = Loader(out, "train", 64, packing="bfd", eot=meta["eot"])
    assert loader.n_rows == report["pack"]["train"]["rows"] and isinstance(loader.start, np.memmap)
    assert "train.py --input=" in done.stdout


def kill_at(moment, args):
    child = subprocess.Popen([sys.executable, ROOT / "data.py", *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
    try:
        child.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return child.returncode


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prepare_killed_at_random_moments_ends_in_the_same_bytes(messy, tmp_path):
    args = ["prepare", messy, "--rules", "gopher", "--by", "meta.lang", "--vocab_size", 500, "--val_fraction", .1, "--seq_len", 64]
    begin = time.monotonic()
    run_data(*args, "--out", tmp_path / "a")
    took, draw = time.monotonic() - begin, random.Random(1)
    codes = [kill_at(draw.uniform(0.3, 1) * took, [*args, "--out", tmp_path / "b"]) for _ in range(5)]
    assert -signal.SIGKILL in codes
    run_data(*args, "--out", tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    left = tmp_path / "b" / "norm" / f".norm-{json.loads((tmp_path / 'b/norm/.norm.json').read_text())['key']}"
    left.mkdir()                                                 # killed between the mark and the end
    assert "done before" in run_data(*args, "--out", tmp_path / "b").stdout and not left.exists()


@pytest.mark.parametrize("args, says", [
    (["filter", "X", "--out", "O"], "--kn"),
    (["filter", "X", "--out", "O", "--rules", "gofer"], "gopher"),
    (["filter", "X", "--out", "O", "--kn", "X"], "ARPA"),
    (["filter", "X", "--out", "O", "--rules", "c4", "--keep_quantile", "0", ".5"], "--kn"),
    (["dedup", "X", "--out", "O", "--method", "simhash"], "minhash"),
    (["pack", "X", "--out", "O"], "tokenize"),
    (["norm", "missing.jsonl", "--out", "O"], "no file or folder"),
    (["kn", "train", "X"], "--out"),
    (["kn", "train", "X", "--out", "O", "--unit", "tok:nowhere"], "nowhere"),
    (["kn", "query", "missing.kn"], "missing.kn"),
    (["prepare", "X", "--out", "O", "--stages", "norm", "stem"], "stem"),
    (["tokenize", "X", "--out", "O", "--val_fraction", "2"], "val_fraction"),
    (["nothing"], "prepare"),
])
def test_mistakes_are_one_line(args, says, messy, tmp_path):
    args = [str(messy) if a == "X" else str(tmp_path / "o") if a == "O" else a for a in args]
    done = run_data(*args, check=False)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list((tmp_path / "o").glob("*.jsonl")) if (tmp_path / "o").is_dir() else True


def test_stdin_is_read_and_inspect_says_what_is_inside(messy, tmp_path):
    run_data("norm", "-", "--out", tmp_path / "n", stdin="one  text\r\nof two lines")
    assert [d["text"] for d in read_jsonl(tmp_path / "n/kept.jsonl")] == ["one  text\nof two lines"]
    run_data("inspect", messy, "--report", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())[str(messy)]
    assert found["documents"] == 267 and found["exact copies"] == 20 and found["fields"]["meta"] == 267


def test_a_stage_is_done_again_when_its_result_is_not_there(messy, tmp_path):
    out, again = tmp_path / "o", lambda *args: "done before" not in run_data(*args).stdout
    norm = ["norm", messy, "--out", out]
    assert [again(*norm), again(*norm)] == [True, False]
    kept = (out / "kept.jsonl").read_bytes()
    (out / "kept.jsonl").unlink()
    assert again(*norm) and (out / "kept.jsonl").read_bytes() == kept
    dedup = ["dedup", messy, "--out", out]
    assert again(*dedup) and again(*norm) and (out / "kept.jsonl").read_bytes() == kept          # one took the other's place
    assert again(*dedup) and not again(*dedup) and again(*dedup, "--clusters", tmp_path / "c.jsonl") and (tmp_path / "c.jsonl").exists()
    (out / ".dedup.json").write_text("{")                        # damaged
    assert again(*dedup)
    filtered = tmp_path / "f"
    run_data("filter", messy, "--rules", "gopher", "--out", filtered)
    run_data("norm", filtered, "--out", tmp_path / "n")          # a result is what was kept, not what was dropped
    assert len(read_jsonl(tmp_path / "n/kept.jsonl")) == len(read_jsonl(filtered / "kept.jsonl")) < 267


def test_fewer_shards_leave_none_of_the_old(messy, tmp_path):
    tokenize = ["tokenize", messy, "--out", tmp_path / "t", "--vocab_size", 300]
    run_data(*tokenize, "--val_fraction", .1, "--shard_tokens", 5000)
    many = len(list((tmp_path / "t").glob("*.bin")))
    run_data(*tokenize, "--val_fraction", 0)
    assert many > 5 and [p.name for p in (tmp_path / "t").glob("*.bin")] == ["train_000000.bin"]


@pytest.mark.parametrize("args, says", [
    (["norm", "folder", "--out", "folder/inside"], "inside the input"),
    (["norm", "folder/kept.jsonl", "--out", "folder"], "cannot take a result"),
    (["dedup", "folder/kept.jsonl", "--out", "o", "--clusters", "folder"], "cannot take a result"),
    (["filter", "folder/kept.jsonl", "--out", "o", "--rules", "c4", "--dropped", "folder/kept.jsonl"], "cannot take a result"),
    (["prepare", "folder/kept.jsonl", "--out", "o", "--seq_len", "0"], "--seq_len"),
    (["kn", "train", "folder/kept.jsonl", "--order", "1000000000", "--out", "lm"], "--order"),
    (["norm", "-", "-", "--out", "o"], "stdin"),
])
def test_nothing_is_written_over_what_was_given(args, says, tmp_path):
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder/kept.jsonl", [{"text": "some words of text"}] * 3)
    done = subprocess.run([sys.executable, ROOT / "data.py", *args], cwd=tmp_path, capture_output=True, text=True, input="")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == ["folder/kept.jsonl"]


def test_damaged_thresholds_are_refused(tmp_path):
    model = SimpleNamespace(counts=[0, 5], unit="space", norm="none")
    data.save_thresholds(tmp_path / "t", {"en": [1.0, 9.0]}, {"en": model})
    assert data.load_thresholds(tmp_path / "t", {"en": model}) == {"en": [1.0, 9.0]}
    good = (tmp_path / "t").read_text()
    for bad in (good.replace("1.0", "NaN"), good.replace("1.0", "99.0"), good.replace('"format": 1', '"format": 9'), "[" * 100_000, "{}"):
        (tmp_path / "t").write_text(bad)
        with pytest.raises(T.UsageError, match="cannot be used"):
            data.load_thresholds(tmp_path / "t", {"en": model})
