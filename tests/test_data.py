import json
import random
from collections import Counter

import numpy as np
import pytest
import torch

import data
import tokenizer as T
from data import Loader, Shards, ShardWriter


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
    assert len(loader.start) == pieces and pieces - len(docs) >= cut


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
