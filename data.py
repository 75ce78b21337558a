"""Data: which text, in what order, in what shape?

Documents become ids once, on disk; then every training sample is a row of seq_len ids that can be computed from its
number alone. A row holds whole documents wherever that is possible: cutting the corpus every seq_len tokens would
break most documents, best-fit-decreasing packing breaks only those that are longer than a row.     [FewTrunc sec 3]

    stream    eot d1 d1 d1 eot d2 d2 eot d3 ... eot          every document opens with the end-of-text token
    tokens    eot d1 d1 d1 | eot d2 d2 | pad                 a row: pieces of the stream, longest first
    targets   d1  d1 d1 eot| d2  d2 eot| -                   the stream one place on: each id is predicted exactly once
    positions 0   1  2  3  | 0   1  2  | 0                   begin anew in each piece
    doc_ids   0   0  0  0  | 1   1  1  | -1                  a query reads keys of its own piece only

    sample i  ->  epoch = i div rows, row = permutation(seed, epoch)[i mod rows]

so the state of the loader is one integer, whatever the number of ranks or the micro-batch.

Contents:    config | default text | token shards | prepare | packing | order | Loader | demo
References:
    [FewTrunc]  Fewer Truncations Improve Language Modeling, arXiv:2404.10830
    [Feistel]   Ciphers with Arbitrary Finite Domains (cycle walking), Black and Rogaway 2002
Run me:      python data.py          (packs this Python's standard library and draws the first rows)
"""
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import tokenizer as tok_lib
from tokenizer import UsageError, atomic_write, cores, flag

FORMAT = 1                             # of all that is kept on disk: another number makes every stage run again
END_OF_TEXT = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]"]      # the first that a tokenizer has


@dataclass
class DataConfig:
    input: tuple = flag((), many=True)   # text: .txt, .jsonl, .jsonl.gz, folders, - for stdin; empty: this Python's own sources
    val_fraction: float = 0.05     # share of the text, whole documents at its end, held out for validation
    packing: str = "bfd"           # how documents fill rows, a key of PACKERS
    cache_dir: str = ""            # folder of prepared data; empty: ~/.cache/flatlm, or the run folder if that cannot be written


# ---- Default text (what can a fresh machine without a network read?) ----

SKIPPED_FOLDERS = {"site-packages", "idlelib", "lib2to3", "encodings", "turtledemo", "__pycache__"}
SKIPPED_FILES = {"html/entities.py", "pydoc_data/topics.py"}     # tables of names, not text


def stdlib_files():
    """The sources of the running Python's standard library in path order, tests and tables left out."""
    root, keep = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in SKIPPED_FOLDERS and not name.startswith("test")]
        keep += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(("test", "_sysconfigdata"))]
    keep = sorted(path for path in keep if path.relative_to(root).as_posix() not in SKIPPED_FILES)
    if len(keep) < 100:
        raise UsageError(f"this Python keeps no sources of its standard library in {root}; name your own text with --input")
    return keep


def stdlib_documents(report):
    """The language reference as pydoc ships it (English), then the sources (Python)."""
    from pydoc_data.topics import topics
    texts = itertools.chain(topics.values(), (tok_lib.decode_utf8(p.read_bytes(), report) for p in stdlib_files()))
    for text in texts:
        if text:
            report["documents"] += 1
            yield {"text": text}


# ---- Stages (how does a long job on many cores survive a kill?) ----

PART_BYTES = 32_000_000                # of input: what one process reads at a time, and what a kill costs at most


class Corpus:
    """The documents behind what a user named, in order, cut into parts: each a list of (path, start, end), where end = 0
    is a whole file, else the lines of a .jsonl that begin in start .. end - 1. No path at all is the default text."""

    def __init__(self, paths, spool="."):
        paths = [*map(str, paths)]
        if "-" in paths:                                         # stdin can be read once, and we look more often
            spooled = Path(spool) / "stdin.txt"
            with atomic_write(spooled) as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            paths[paths.index("-")] = str(spooled)
        files = [os.path.abspath(path) for path in (tok_lib.input_files(paths) if paths else stdlib_files())]
        sizes = [os.path.getsize(path) for path in files]
        self.bytes = sum(sizes)
        if not self.bytes:
            raise UsageError(f"{' '.join(paths)} is empty (0 bytes); give a file with text")
        self.fingerprint = [sys.version if not paths else "", [[path, size, os.stat(path).st_mtime_ns] for path, size in zip(files, sizes)]]
        self.parts, room = [], 0
        for path, size in zip(files, sizes) if paths else [("", self.bytes)]:
            ends = range(PART_BYTES, size + PART_BYTES, PART_BYTES) if path.endswith(".jsonl") else [0]
            for span in [(path, end and end - PART_BYTES, end) for end in ends]:
                if room <= 0:
                    self.parts.append([])
                    room = PART_BYTES
                self.parts[-1].append(span)
                room -= PART_BYTES if span[1] else size

    def read(self, part, report):
        """The documents of self.parts[part]."""
        for path, start, end in self.parts[part]:
            yield from tok_lib.documents([path], report, span=(start, end)) if path else stdlib_documents(report)

    def documents(self, report):
        return itertools.chain.from_iterable(self.read(part, report) for part in range(len(self.parts)))


def run_parts(corpus, work, folder, workers=1, say=None):
    """work(documents, report, part) yields bytes. Runs it over every part of a corpus in `workers` processes; each output
    is a file of `folder` that is whole or absent, so a job that was killed goes on with the parts that are missing.
    Returns (paths in order of the corpus, the sum of all reports)."""
    paths = [Path(folder) / f"{part:06d}" for part in range(len(corpus.parts))]
    missing = [part for part, path in enumerate(paths) if not path.with_suffix(".json").is_file()]

    def one(part):
        report = Counter()
        with atomic_write(paths[part]) as file:
            file.writelines(work(corpus.read(part, report), report, part))
        with atomic_write(paths[part].with_suffix(".json"), "w") as file:
            json.dump(report, file)

    for done, _ in enumerate(in_processes(one, missing, workers), len(paths) - len(missing) + 1):
        if say and len(paths) > 1:
            say(f"  part {done} of {len(paths)}")
    total = Counter()
    for path in paths:
        total.update(json.loads(path.with_suffix(".json").read_text()))
    return paths, total


def in_processes(function, items, workers):
    """function(item) of every item, as they are ready, in forked processes (so that it may be a closure)."""
    if workers < 2 or len(items) < 2:
        yield from map(function, items)
        return
    global _forked
    _forked = function
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(_call_forked, item) for item in items]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _call_forked(item):
    return _forked(item)


def run_stage(name, folder, key, make, say):
    """Run one stage of the chain, or find it done. make(temp) writes its files into `temp` and returns its report; they
    get their names in `folder` when all are there. `key` is all that the result depends on."""
    folder, key = Path(folder), hashlib.sha256(json.dumps([name, FORMAT, key]).encode()).hexdigest()[:16]
    done, temp = folder / f".{name}.json", folder / f".{name}-{key}"
    if done.is_file() and (known := json.loads(done.read_text()))["key"] == key:
        say(f"{name}: done before; delete {done} to do it again")
        return known["report"], key
    for stale in folder.glob(f".{name}-*"):
        if stale != temp:
            shutil.rmtree(stale)
    temp.mkdir(parents=True, exist_ok=True)
    report = make(temp)
    for path in sorted(temp.iterdir()):
        if path.name != "parts":
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
    with atomic_write(done, "w") as file:
        json.dump({"key": key, "report": report}, file)
    shutil.rmtree(temp)
    return report, key


# ---- Token shards (how are a hundred billion ids kept on disk?) ----

MAGIC, HEADER = 20240520, 256          # llm.c's shard: 256 int32 (magic, version, count), then the ids
DTYPES = {1: np.uint16, 2: np.uint32}  # version -> type; 2 is ours, for vocabularies beyond 65,536
SHARD_TOKENS = 100_000_000


class ShardWriter:
    """Writes split_000000.bin ... and split.idx (uint64 start of every document in the whole stream, and its end)."""

    def __init__(self, folder, split, n_vocab, eot, dtype="auto", shard_tokens=SHARD_TOKENS):
        self.folder, self.split, self.eot = Path(folder), split, eot
        self.version = 1 if n_vocab <= 65536 else 2
        self.starts, self.held, self.size, self.total, self.shard = [], [], 0, 0, 0

    def add(self, ids):
        """One document, stored as end-of-text and its ids."""
        if self.size and self.size + len(ids) + 2 > SHARD_TOKENS:
            self._flush()
        self.starts.append(self.total)
        self.held.append(np.array([self.eot, *ids], dtype=DTYPES[self.version]))
        self.size += len(ids) + 1
        self.total += len(ids) + 1

    def _flush(self):
        self.held.append(np.array([self.eot], dtype=DTYPES[self.version]))     # the target of the shard's last id
        head = np.zeros(HEADER, dtype=np.int32)
        head[:3] = MAGIC, self.version, self.size + 1
        with atomic_write(self.folder / f"{self.split}_{self.shard:06d}.bin") as file:
            file.write(head.tobytes())
            for ids in self.held:
                file.write(ids.tobytes())
        self.starts.append(self.total)                                         # the closing end-of-text has a place as well
        self.held, self.size, self.total, self.shard = [], 0, self.total + 1, self.shard + 1

    def close(self):
        if self.size:
            self._flush()
        with atomic_write(self.folder / f"{self.split}.idx") as file:
            file.write(np.array(self.starts, dtype=np.uint64).tobytes())


class Shards:
    """Memory-mapped stream of ids over all shards of a split, with the table of its documents."""

    def __init__(self, folder, split):
        self.parts, folder = [], Path(folder)
        for path in sorted(folder.glob(f"{split}_*.bin")):
            head = np.fromfile(path, dtype=np.int32, count=3)
            if len(head) < 3 or head[0] != MAGIC or head[1] not in DTYPES:
                raise UsageError(f"{path} is not a token shard (magic {MAGIC}, version 1 or 2); delete {folder} to prepare "
                                 f"it again")
            dtype = DTYPES[int(head[1])]
            want, have = HEADER * 4 + int(head[2]) * dtype().itemsize, path.stat().st_size
            if want != have:
                raise UsageError(f"{path} was cut short: {have:,} of {want:,} bytes; delete {folder} to prepare it again")
            self.parts.append(np.memmap(path, dtype=dtype, mode="r", offset=HEADER * 4))
        self.base = np.cumsum([0] + [len(part) for part in self.parts])
        starts = np.fromfile(folder / f"{split}.idx", dtype=np.uint64).astype(np.int64)
        last = np.isin(starts, self.base[1:] - 1)                # closing end-of-texts: ends of shards, not documents
        self.starts = starts[~last]
        self.lengths = (np.diff(starts)[~last[:-1]]).astype(np.int64)          # ids of a document, its end-of-text included

    def read(self, start, count):
        """ids [start, start + count) of the stream; a document and the id after it never cross a shard."""
        part = int(np.searchsorted(self.base, start, side="right")) - 1
        return self.parts[part][start - self.base[part]:start - self.base[part] + count]


# ---- Tokenising (from any text to shards, once) ----

def split_point(sizes, fraction):
    """(document, byte) where validation begins: the last whole documents that come nearest to `fraction` of all bytes;
    inside the last document, at the fraction, where that one alone is more than half of the text."""
    total = int(sum(sizes))
    if not fraction:
        return len(sizes), 0
    if sizes[-1] > total / 2:
        return len(sizes) - 1, max(1, int(sizes[-1] - fraction * total)) if sizes[-1] > 1 else 0
    tail = np.cumsum(sizes[::-1])[:-1]                           # at least one document is left to learn from
    held = 1 + int(np.argmin(np.abs(tail - fraction * total)))
    return len(sizes) - held, 0


def measure(corpus, report, budget):
    """Bytes of every document, the number of the first document of each part, and about `budget` bytes of whole documents
    spread evenly over the text: whenever the sample is twice too large every other document leaves it, so one pass over a
    text of any length is enough."""
    sizes, firsts, sample, stride, held = [], [], [], 1, 0
    for part in range(len(corpus.parts)):
        firsts.append(len(sizes))
        for number, document in enumerate(corpus.read(part, report), len(sizes)):
            sizes.append(n_bytes(document["text"]))
            if budget and number % stride == 0:
                sample.append((number, document["text"][:int(budget)]))
                held += min(sizes[-1], budget)
                while held > 2 * budget and len(sample) > 1:
                    sample, stride = sample[::2], stride * 2
                    held = sum(len(text) for _, text in sample)
    return sizes, firsts, sample


def n_bytes(text):
    return len(text.encode("utf-8", "surrogatepass"))


def cut_text(text, at):
    """(head, tail) of a text, cut at the first character that begins at or after byte `at`."""
    raw = text.encode("utf-8", "surrogatepass")
    while at < len(raw) and raw[at] & 0xC0 == 0x80:              # never between the bytes of a character
        at += 1
    head = raw[:at].decode("utf-8", "surrogatepass")
    return head, text[len(head):]


def encoded(tok, documents):
    """For every (number, text): int64 number, bytes and ids, then the ids as uint32."""
    while batch := list(itertools.islice(documents, 1)):
        size = len(batch[0][1])
        for item in documents:
            batch.append(item)
            size += len(item[1])
            if size > 4_000_000:
                break
        for (number, text), ids in zip(batch, tok.encode_batch([text for _, text in batch])):
            yield np.array([number, n_bytes(text), len(ids)]).tobytes()
            yield np.array(ids, dtype=np.uint32).tobytes()


def decoded(path):
    """(number, bytes, ids) of every document that encoded() wrote."""
    with open(path, "rb") as file:
        while head := file.read(24):
            number, size, count = np.frombuffer(head, dtype=np.int64).tolist()
            yield number, size, np.frombuffer(file.read(4 * count), dtype=np.uint32)


def write_shards(corpus, tok, temp, args, say):
    """The shards of a corpus in `temp`, its tokenizer and meta.json. Returns the meta data."""
    report = Counter()
    sizes, firsts, sample = measure(corpus, report, 0 if tok else args.tokenizer_mb * 1e6)
    skipped = tok_lib.warn_about(report)
    if skipped:
        say(f"data: skipped {skipped}")
    if sum(sizes) < 100:
        raise UsageError(f"the input holds {sum(sizes)} bytes of text{', after skipping ' + skipped if skipped else ''}; "
                         f"at least 100 are needed, some megabytes to learn anything")
    cut, inside = split_point(sizes, args.val_fraction)
    if tok is None:
        texts = [text for number, text in sample if number < cut + bool(inside)]
        tok, _ = tok_lib.train(texts, "bbpe", args.vocab_size - 1, pattern=args.pattern, special=["eos"])
        say(f"tokenizer: {tok.n_vocab - 1:,} byte-level tokens learned from {sum(map(len, texts)) / 1e6:.1f} MB of the text"
            + (f" (it could not fill --vocab_size={args.vocab_size})" if tok.n_vocab < args.vocab_size else ""))
    if not any(name in tok.special for name in END_OF_TEXT):
        tok = tok.with_special(END_OF_TEXT[:1])
        say(f"tokenizer: it has no end-of-text token, so {END_OF_TEXT[0]} became id {tok.n_vocab - 1}")

    def work(documents, report, part):
        def texts():
            for number, document in enumerate(documents, firsts[part]):
                halves = cut_text(document["text"], inside) if inside and number == cut else [document["text"]]
                yield from ((number + (half and 1), text) for half, text in enumerate(halves))
        return encoded(tok, texts())

    paths, _ = run_parts(corpus, work, temp / "parts", args.workers, say)
    eot = next(tok.special[name] for name in END_OF_TEXT if name in tok.special)
    writers = {split: ShardWriter(temp, split, tok.n_vocab, eot, args.dtype, args.shard_tokens) for split in ("train", "val")}
    bytes_of = Counter()
    for number, size, ids in itertools.chain.from_iterable(map(decoded, paths)):
        split = "train" if number < cut + bool(inside) else "val"
        writers[split].add(ids)
        bytes_of[split] += size
    meta = {"documents": len(sizes), "skipped": skipped, "n_vocab": tok.n_vocab, "eot": eot}
    for split, writer in writers.items():
        writer.close()
        meta |= {f"{split}_tokens": writer.total, f"{split}_bytes": bytes_of[split]}
    tok.save(temp / "tokenizer")
    with atomic_write(temp / "meta.json", "w") as file:
        json.dump(meta, file)
    return meta


def prepare(cfg, vocab_size, run_folder, say=print):
    """Tokenise the text of train.py's --input into shards, or find them ready. Returns their folder.

    The folder's name is a hash of all it depends on, so a changed file or flag never meets stale shards; it gets that
    name only when it is complete."""
    if len(cfg.input) == 1 and (Path(cfg.input[0]) / "meta.json").is_file():
        return Path(cfg.input[0])                                # what tokenize, pack or prepare made
    corpus = Corpus(cfg.input, run_folder)
    ready = tok_lib.load(cfg.tokenizer, cfg.pattern) if cfg.tokenizer else None
    spec = ready.fingerprint if ready else [vocab_size, cfg.pattern, cfg.tokenizer_mb]
    key = hashlib.sha256(json.dumps(["format 1", corpus.fingerprint, spec, cfg.val_fraction]).encode()).hexdigest()[:16]
    root = cache_root(cfg, run_folder)
    folder = root / f"data-{key}"
    if (folder / "meta.json").is_file():
        return folder
    temp = Path(tempfile.mkdtemp(prefix=".data-", dir=root))
    try:
        args = SimpleNamespace(**vars(cfg) | dict(vocab_size=vocab_size, workers=cores(), dtype="auto", shard_tokens=SHARD_TOKENS))
        write_shards(corpus, ready, temp, args, say)
        shutil.rmtree(temp / "parts")
        try:
            os.rename(temp, folder)
        except OSError:                                          # another process finished the same data first
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def open_prepared(folder):
    """(meta, tokenizer) of a folder that prepare() made."""
    return json.loads((Path(folder) / "meta.json").read_text()), tok_lib.load(Path(folder) / "tokenizer")


def cache_root(cfg, run_folder):
    """Where prepared data lies: --cache_dir, else the user's cache, else (where that cannot be written, or the text came
    through stdin) the run folder."""
    home = Path(cfg.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatlm")
    if "-" not in cfg.input:
        try:
            home.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=home).close()
            return home
        except OSError as error:
            if cfg.cache_dir:
                raise UsageError(f"--cache_dir={cfg.cache_dir} cannot be written ({error.strerror}); name another") from None
    local = Path(run_folder) / "data"
    local.mkdir(parents=True, exist_ok=True)
    return local


# ---- Packing (which documents share a row?) ----

def best_fit_decreasing(lengths, capacity):
    """Bin of every item: longest first, each into the open bin with the least room that still holds it.

    The rooms that are open stand as bits of one integer, so the best fit is the lowest set bit at or above the length.
    lengths: ints in 1..capacity. Returns int64 bins, numbered in order of opening.            [FewTrunc alg 1]"""
    bins = np.empty(len(lengths), dtype=np.int64)
    with_room, rooms, opened = [[] for _ in range(capacity + 1)], 0, 0
    sizes = np.asarray(lengths).tolist()
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        size = sizes[i]
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            home = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, home, opened = capacity, opened, opened + 1
        bins[i] = home
        if room > size:
            with_room[room - size].append(home)
            rooms |= 1 << room - size
    return bins


def first_come(lengths, capacity):
    """Bin of every item in corpus order, a new bin whenever the next does not fit: its padding is what packing saves."""
    bins, home, room = np.empty(len(lengths), dtype=np.int64), -1, 0
    for i, size in enumerate(np.asarray(lengths).tolist()):
        if size > room:
            home, room = home + 1, capacity
        bins[i], room = home, room - size
    return bins


PACKERS = {                            # flag --packing
    "bfd": best_fit_decreasing,
    "first_come": first_come,
}


def pack(starts, lengths, seq_len, method="bfd"):
    """Rows of seq_len places over a stream. A document longer than a row is cut into full rows and a remainder; the
    remainders and the shorter documents are packed. Returns (first, piece_start, piece_length): the pieces of row r are
    first[r]:first[r + 1]."""
    full, rest = np.divmod(lengths, seq_len)
    owner = np.repeat(np.arange(len(lengths)), full)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    short = np.flatnonzero(rest)
    bins = PACKERS[method](rest[short], seq_len)
    piece_row = np.concatenate([np.arange(len(owner)), len(owner) + bins])
    piece_start = np.concatenate([starts[owner] + nth * seq_len, (starts + full * seq_len)[short]])
    piece_length = np.concatenate([np.full(len(owner), seq_len), rest[short]])
    order = np.argsort(piece_row, kind="stable")
    n_rows = int(piece_row.max(initial=-1)) + 1
    first = np.searchsorted(piece_row[order], np.arange(n_rows + 1))
    return first, piece_start[order], piece_length[order]


# ---- Order (which row is sample i?) ----

def permutation(index, n, seed):
    """Where `index` (int64 array, each in 0..n-1) goes in a pseudo-random order of 0..n-1: O(1) memory, any n.

    A Feistel network permutes the numbers of 2k bits; those that fall outside 0..n-1 are sent through again until they
    fall inside, which is a permutation of 0..n-1.                                                     [Feistel sec 4]"""
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << bits) - 1)
    keys = np.random.Generator(np.random.Philox(seed)).integers(0, 2**63, 6, dtype=np.uint64)
    value, outside = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(bits), value[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ (mixed ^ mixed >> np.uint64(32)) & mask
        value[outside] = left << np.uint64(bits) | right
        outside = value >= n
    return value.astype(np.int64)


# ---- Loader (samples as tensors) ----

class Loader:
    """Rows of a split by number. `samples(first, count)` gives the rows of global samples first .. first + count - 1;
    the order is a pure function of (seed, sample), every row comes once an epoch. shuffle=False: rows in order, once."""

    def __init__(self, folder, split, seq_len, seed=0, packing="bfd", shuffle=True, eot=0, resample=None):
        self.resample = resample                                 # Tokenizer.sampler: another segmentation each time a row is drawn
        self.stream, self.seq_len, self.seed, self.shuffle, self.eot = Shards(folder, split), seq_len, seed, shuffle, eot
        self.first, self.start, self.length = pack(self.stream.starts, self.stream.lengths, seq_len, packing)
        self.n_rows, self.n_tokens = len(self.first) - 1, int(self.length.sum())
        if not self.n_rows:
            raise UsageError(f"no {split} text is left after the split; give more text, or a smaller --val_fraction")

    def rows(self, samples):
        """Row of each global sample number."""
        samples = np.asarray(samples, dtype=np.int64)
        if not self.shuffle:
            return samples % self.n_rows
        epochs, rows = samples // self.n_rows, np.empty(len(samples), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permutation(samples[here] % self.n_rows, self.n_rows, (self.seed, int(epoch)))
        return rows

    def samples(self, first, count):
        """Batch of tensors [count, seq_len]: tokens, targets, positions, doc_ids (int64) and weights (float32)."""
        numbers = np.arange(first, first + count)
        return self.batch(self.rows(numbers), numbers)

    def batch(self, rows, numbers=()):
        import torch                                             # here: the text commands start without it
        B, T = len(rows), self.seq_len
        out = {name: np.zeros((B, T), dtype=np.int64) for name in ("targets", "positions")}
        out |= {"tokens": np.full((B, T), self.eot), "doc_ids": np.full((B, T), -1), "weights": np.zeros((B, T), np.float32)}
        for b, row in enumerate(rows):
            at = 0
            for number, piece in enumerate(range(self.first[row], self.first[row + 1])):
                n = int(self.length[piece])
                ids = self.stream.read(int(self.start[piece]), n + 1)
                if self.resample and len(numbers):               # a sampled row is longer: what no longer fits is left out
                    rng = random.Random(f"{self.seed} {numbers[b]} {piece}")
                    ids = np.array(self.resample(ids.tolist(), rng)[:T - at + 1])
                    n = len(ids) - 1
                here = slice(at, at + n)
                out["tokens"][b, here], out["targets"][b, here] = ids[:-1], ids[1:]
                out["positions"][b, here], out["doc_ids"][b, here], out["weights"][b, here] = np.arange(n), number, 1
                at += n
        return {name: torch.from_numpy(array) for name, array in out.items()}


# ---- Demo ----

def demo(argv):
    if argv:
        raise UsageError("data.py takes no arguments yet; train.py prepares data by itself, from --input")
    with tempfile.TemporaryDirectory() as folder:
        cfg = DataConfig(cache_dir=folder)
        for field in ("tokenizer", "pattern", "tokenizer_mb"):
            setattr(cfg, field, getattr(tok_lib.TokenizerConfig(), field))
        where = prepare(cfg, 2048, folder)
        meta, tok = open_prepared(where)
        print(f"data: {meta['documents']:,} documents, {(meta['train_bytes'] + meta['val_bytes']) / 1e6:.1f} MB -> "
              f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens "
              f"({meta['train_bytes'] / meta['train_tokens']:.2f} bytes a token)\n")
        stream = Shards(where, "train")
        print("packing of documents into rows of 512:     rows   padding   documents cut")
        for method in PACKERS:
            first, _, length = pack(stream.starts, stream.lengths, 512, method)
            cut = int((stream.lengths > 512).sum())
            print(f"  {method:36s} {len(first) - 1:8,} {1 - length.sum() / 512 / (len(first) - 1):9.3%} {cut:15,}")
        cut = (stream.starts // 512 != (stream.starts + stream.lengths - 1) // 512).sum()
        print(f"  {'every 512 ids, documents ignored':36s} {-(-stream.lengths.sum() // 512):8,} {0:9.3%} {cut:15,}\n")
        loader = Loader(where, "train", 96, seed=0, eot=meta["eot"])
        print("four samples of 96 ids; a letter for each document in a row, . for padding:")
        for number, row in enumerate(loader.samples(0, 4)["doc_ids"].tolist()):
            print(f"  sample {number} = row {loader.rows([number])[0]:6d}  {''.join('.' if d < 0 else chr(97 + d) for d in row)}")
        head = loader.samples(0, 1)["tokens"][0, :24].tolist()
        print(f"\nand the first one begins {tok.decode(head)!r}")


if __name__ == "__main__":
    tok_lib.run_cli(demo)
