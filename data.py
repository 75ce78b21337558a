"""Data: which text, in what order, in what shape?

A model becomes what it reads. So text is cleaned first: normalised, freed of copies, and measured by a language model of
n-grams that has read only good text. Then documents become ids once, on disk, and every training sample is a row of
seq_len ids that can be computed from its number alone.

    p(w | h) = (a(h w) - D) / a(h .) + gamma(h) p(w | h'),   h' is h without its first word    n-grams  [CG sec 3]
    ppl      = 10^(-sum log10 p / words)                     too high: noise, too low: copies and lists   [CCNet]
    J(A, B)  = |A n B| / |A u B| = P(min h(A) = min h(B))    copies by their shingles                   [Broder]

    stream    eot d1 d1 d1 eot d2 d2 eot d3 ... eot          every document opens with the end-of-text token
    tokens    eot d1 d1 d1 | eot d2 d2 | pad                 a row: pieces of the stream, longest first [FewTrunc]
    targets   d1  d1 d1 eot| d2  d2 eot| -                   the stream one place on: each id is predicted exactly once
    doc_ids   0   0  0  0  | 1   1  1  | -1                  a query reads keys of its own piece only

    sample i  ->  epoch = i div rows, row = permutation(seed, epoch)[i mod rows]        the loader's state is one integer

Contents:    config | default text | stages | normalisers | smoothing | n-grams | text as word ids | long arrays |
             counting | modified Kneser-Ney | ARPA | finding n-grams | words | fewer bits | the model file | state |
             asking | ARPA files | queries | quality rules | perplexity filter | filter report | units | deduplication
             | token shards | tokenising | packing | FIM | order | loader | the chain | bench | command line | demo
References:
    [CG]        An Empirical Study of Smoothing Techniques for Language Modeling, Chen and Goodman, TR-10-98
    [KenLM]     KenLM: Faster and Smaller Language Model Queries, Heafield, WMT 2011
    [LState]    Faster Phrase-Based Decoding by Refining Feature State, Heafield et al., ACL 2014
    [CCNet]     Extracting High Quality Monolingual Datasets from Web Crawl Data, arXiv:1911.00359
    [Gopher]    Scaling Language Models: Methods, Analysis and Insights from Training Gopher, arXiv:2112.11446
    [C4]        Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, arXiv:1910.10683
    [FineWeb]   The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale, arXiv:2406.17557
    [Broder]    On the resemblance and containment of documents, Sequences 1997
    [Lee]       Deduplicating Training Data Makes Language Models Better, arXiv:2107.06499
    [FewTrunc]  Fewer Truncations Improve Language Modeling, arXiv:2404.10830
    [FIM]       Efficient Training of Language Models to Fill in the Middle, arXiv:2207.14255
    [Feistel]   Ciphers with Arbitrary Finite Domains (cycle walking), Black and Rogaway 2002
    [Chairman]  The chairman assignment problem, Tijdeman, Discrete Mathematics 32, 1980
Run me:      python data.py          (packs this Python's standard library and draws the first rows)
             python data.py prepare texts/ --out shards --rules gopher | kn | norm | dedup | filter | inspect | bench | --help
"""
import concurrent.futures
import contextlib
import errno
import functools
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import queue
import random
import re
import shutil
import struct
import sys
import sysconfig
import tempfile
import threading
import time
import unicodedata
import weakref
from collections import Counter, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from functools import cached_property, reduce
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import regex

import tokenizer as tok_lib
from tokenizer import UsageError, atomic_write, cores, flag

FORMAT = 3                             # of all that is kept on disk: another number makes every stage run again
END_OF_TEXT = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]"]      # the first that a tokenizer has


@dataclass
class DataConfig:
    input: tuple = flag((), many=True)   # text: .txt, .jsonl, .jsonl.gz, folders, - for stdin, or shards; empty: this Python's own sources
    mix: tuple = flag((), many=True)     # weights of several --input, one for each: how often a row comes from it; empty: all as one text
    val_fraction: float = 0.05     # share of the text, whole documents at its end, held out for validation
    packing: str = "bfd"           # how documents fill rows, a key of PACKERS
    fim_rate: float = 0.0          # share of the training documents whose middle is moved to their end, to learn infilling
    fim_spm: float = 0.5           # share of those where the suffix comes first
    fim_level: str = "document"    # when that happens, a key of FIM_LEVELS
    prefetch: int = 2              # steps whose batches a thread makes ahead of time; 0: none
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
        if paths.count("-") > 1:
            raise UsageError("- is stdin, which can be read once; name it once")
        if "-" in paths:                                         # ... and we look more often
            spooled = Path(spool) / ".stdin.txt"
            with atomic_write(spooled) as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            paths[paths.index("-")] = str(spooled)
        for i, path in enumerate(map(Path, paths)):              # a folder that a stage wrote to: what it kept
            if (path / "kept.jsonl").is_file() and any(path.glob(".*.json")):
                paths[i] = str(path / "kept.jsonl")
        files = [os.path.abspath(path) for path in (tok_lib.input_files(paths) if paths else stdlib_files())]
        sizes = [os.path.getsize(path) for path in files]
        self.bytes = sum(sizes)
        if not self.bytes:
            raise UsageError(f"--input={' '.join(paths)} is empty (0 bytes); give a file with text")
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
            if Path(path).suffix in tok_lib.REFUSED:             # inside a folder; one that was named is refused before
                report["not_text"] += 1
                continue
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

    for done, _ in enumerate(in_order(one, missing, min(workers or cores(), len(missing))), len(paths) - len(missing) + 1):
        if say and len(paths) > 1:
            say(f"  part {done} of {len(paths)}")
    total = Counter()
    for path in paths:
        total.update(json.loads(path.with_suffix(".json").read_text()))
    if isinstance(corpus, Corpus) and not total["documents"]:
        raise UsageError(f"the input holds no documents ({tok_lib.warn_about(total) or 'nothing but blank lines'}); .jsonl takes an object "
                         f"with a text a line, such as {{\"text\": \"...\"}}")
    return paths, total


def in_order(function, items, workers):
    """function(item) of every item, in their order, in forked processes (so that it may be a closure); few items wait."""
    workers = min(workers, 4 * cores())
    if workers < 2:
        yield from map(function, items)
        return
    global _forked
    _forked = function
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _end_with_parent, (os.getpid(),)) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(_call_forked, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def _call_forked(item):
    return _forked(item)


def _end_with_parent(parent):
    """A worker whose parent was killed would wait for ever."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def read_mark(path):
    """What run_stage wrote when it was done; nothing if that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        mark = json.loads(path.read_text())
        if isinstance(mark, dict) and isinstance(mark.get("files"), dict):
            return mark
    return {"files": {}}


def size_of(path):
    return path.stat().st_size if path.is_file() else -path.is_dir()


def run_stage(name, folder, key, make, say, named):
    """Run one stage, or find it done: make(temp) writes its files into `temp` and returns its report. They get their names
    in `folder` (or those in `named`) when all are there. key() is all that the result depends on.
    Returns (report, a hash of the key)."""
    digest = lambda: hashlib.sha256(json.dumps([name, FORMAT, key()]).encode()).hexdigest()[:16]
    done, temp = folder / f".{name}.json", folder / f".{name}-{digest()}"
    named = {file: str(path) for file, path in named.items()}
    known = read_mark(done)
    if known.get("key") == digest() and known["named"] == named and known["files"] == {
            file: size_of(Path(named.get(file, folder / file))) for file in known["files"]}:
        shutil.rmtree(temp, ignore_errors=True)                  # of a process that was killed while it did this
        say(f"  done before (delete {done} to do it again)")
        return known["report"], known["key"]
    for stale in set(folder.glob(f".{name}-*")) - {temp}:
        shutil.rmtree(stale)
    for stale in folder.glob(".*.tmp"):                          # of a process that was killed
        stale.unlink()
    temp.mkdir(parents=True, exist_ok=True)
    report = make(temp)
    finals = {path: Path(named.get(path.name, folder / path.name)) for path in sorted(temp.iterdir())
              if path.name != "parts" and not path.name.startswith(".")}
    sizes, done_by = {path.name: size_of(path) for path in finals}, [done, *folder.glob(".*.json")]
    for mark in done_by:                                         # from here on neither result is whole, nor another's that is replaced
        if mark == done or read_mark(mark)["files"].keys() & sizes.keys():
            mark.unlink(missing_ok=True)
    for old in (folder / file for file in known["files"] if file not in named):
        if old.is_file() and old not in finals.values():         # a shard that the new result has not
            old.unlink()
    for path, final in finals.items():
        if path.is_dir():                                        # a tokenizer
            shutil.rmtree(final, ignore_errors=True)
        move(path, final)
    with atomic_write(done, "w") as file:
        json.dump({"key": digest(), "named": named, "files": sizes, "report": report}, file)
    shutil.rmtree(temp)
    return json.loads(json.dumps(report)), digest()


def move(path, to):
    """Rename, also to another file system; the new file is whole or absent."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with open(path, "rb") as file, atomic_write(to) as copy:
            shutil.copyfileobj(file, copy)


def n_bytes(text):
    return len(text.encode("utf-8", "surrogatepass"))


def line_of(document):
    """A document as a line of .jsonl."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def batches(documents, size=1 << 18):
    """Lists of documents of about `size` characters: enough to pay for the array calls, few enough for the cache."""
    batch, room = [], size
    for document in documents:
        batch.append(document)
        room -= len(document["text"]) + 1
        if room <= 0:
            yield batch
            batch, room = [], size
    if batch:
        yield batch


# ---- Normalisers (which different writings count as the same text?) ----
# The mild one repairs what no reader sees, so a model may learn from what it returns. The strong one makes keys, text
# that is scored or compared but never kept.

LINE_END = re.compile("[\r\v\f\x85\u2028\u2029]")                # the newline functions of Unicode, chapter 5.8
PLAIN = bytes([9, 10, *range(32, 127)])                          # ASCII that the mild normaliser leaves alone
INVISIBLE = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060\ufeff\ud800-\udfff]")
UNCLEAN = re.compile(LINE_END.pattern[:-1] + INVISIBLE.pattern[1:])
ACCENT = regex.compile(r"[\p{Mn}&&\p{Script=Inherited}--[\u3099\u309a]]", regex.V1)
QUOTE, DASH, STOP, PAUSE = (regex.compile(rf"\p{{{name}}}") for name in (
    "Quotation_Mark", "Dash", "Sentence_Terminal", "Terminal_Punctuation"))
BY_CATEGORY = {"Nd": "0", "Ps": "(", "Pe": ")", "Pi": '"', "Pf": '"', "Pc": "_", "Pd": "-", "Zs": " ", "Zl": "\n",
               "Zp": "\n", "Cf": "", "Cs": "", "Co": "", "Cn": ""}


def mild(text):
    """NFC, line ends as \\n, no control characters, soft hyphens, zero-width spaces, byte order marks, lone surrogates.
    The zero-width joiners stay, they spell words (Persian, Hindi) and emoji. No NFKC: it would turn x² into x2."""
    if text.isascii() and not text.encode().translate(None, PLAIN):
        return text
    if UNCLEAN.search(text):                                     # rarely so, and looking is faster than replacing
        text = INVISIBLE.sub("", LINE_END.sub("\n", text.replace("\r\n", "\n")))
    return unicodedata.normalize("NFC", text)


def fold(char):
    """What one character becomes in a key: compatibility forms, case, accents, digits and punctuation are levelled.

    Accents are the marks that belong to no script of their own: vowel signs of Hindi, tones of Thai are letters, and
    so is the voicing of kana. Punctuation goes by its Unicode property: 。 and ． are full stops, 「 and “ quotes."""
    if char in "\t\n\r\v\f\x85":
        return " " if char == "\t" else "\n"
    kind = unicodedata.category(char)
    if ACCENT.match(char) or kind == "Cc":
        return ""
    if char < "\x7f" and kind != "Nd" and not char.isupper():
        return char
    if QUOTE.match(char):
        return "'" if "SINGLE" in unicodedata.name(char) else '"'
    for marks, plain in (DASH, "-"), (STOP, "."), (PAUSE, ","):
        if kind[0] in "PS" and marks.match(char) and unicodedata.normalize("NFKD", char) == char:
            return plain
    if kind in BY_CATEGORY:
        return BY_CATEGORY[kind]
    apart = unicodedata.normalize("NFKD", char.casefold())       # its parts are folded in turn: ½ is 1⁄2 is 0⁄0
    return char if apart == char else unicodedata.normalize("NFC", "".join(c if c == char else fold(c) for c in apart))


class Folds(dict):
    """fold() for str.translate, filled as characters turn up."""

    def __missing__(self, code):
        return self.setdefault(code, fold(chr(code)))


FOLDS = Folds()
ASCII_FOLDS = bytes(ord(fold(chr(c)) or "\0") if c < 128 else 0 for c in range(256))
ASCII_DROPS = bytes(c for c in range(128) if not fold(chr(c)))


def strong(text):
    """A key: lower case, no accents, digits as 0, plain punctuation, single spaces, no blank lines.

    A map of single characters, then NFC (it joins what stands apart in Korean), so a second time changes nothing."""
    if text.isascii():
        text = text.encode().translate(ASCII_FOLDS, ASCII_DROPS).decode()
    else:
        text = unicodedata.normalize("NFC", text.translate(FOLDS))
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))


NORMALIZE = {            # flag --norm
    "none": str,         # the text as it is
    "mild": mild,        # same text, one encoding of it
    "strong": strong,    # a key, not a text
}


# ---- Smoothing (what probability has a word that never followed here?) ----

class TextCounts:
    """What the estimators below read, for n-grams up to `order`.

    follow[c][w]: how often word w follows context c (a tuple of 0 .. order-1 words, <s> before the first word).
    fresh[c][w]: how many different words stand before c w; for a context that begins a sentence, how often.
    vocab: the words that can be predicted: those seen, </s> and one <unk> for all others."""

    def __init__(self, sentences, order):
        self.order, self.follow, before = order, defaultdict(Counter), defaultdict(set)
        for words in sentences:
            words = ["<s>", *words, "</s>"]
            for i, j in ((i, j) for j in range(1, len(words)) for i in range(max(0, j - order), j + 1)):
                if j - i < order:
                    self.follow[tuple(words[i:j])][words[j]] += 1
                if i and j - i < order - 1:
                    before[tuple(words[i:j]), words[j]].add(words[i - 1])
        self.fresh = defaultdict(Counter)
        for context, table in self.follow.items():
            whole = len(context) == order - 1 or context[:1] == ("<s>",)
            self.fresh[context] = table if whole else Counter({w: len(before[context, w]) for w in table})
        self.vocab = sorted(set(self.follow[()]) | {"<unk>"})
        self.of = {table: [Counter(n for c, t in getattr(self, table).items() if len(c) == length for n in t.values())
                           for length in range(order)] for table in ("follow", "fresh")}      # of[..][order - 1][r]: n-grams seen r times


def uniform(n, word, context):
    return 1 / len(n.vocab)


def below(estimator, n, word, context):
    """The same estimate with a context one word shorter; below the empty one every word is as likely."""
    return estimator(n, word, context[1:]) if context else uniform(n, word, context)


def add_k(n, word, context, k=0.1):
    """Pretend that everything was seen k times more."""                                        # [CG sec 2.1]
    table = n.follow[context]
    return (table[word] + k) / (table.total() + k * len(n.vocab))


def jelinek_mercer(n, word, context, weight=0.7):
    """A fixed share for what was seen here, the rest for the shorter context."""               # [CG sec 2.3]
    table, lower = n.follow[context], below(jelinek_mercer, n, word, context)
    return weight * table[word] / table.total() + (1 - weight) * lower if table else lower


def katz_discount(of, count, most=5):
    """The share that a count keeps: small counts r become r* = (r + 1) n(r+1) / n(r), scaled so that all that was taken
    is what Good and Turing give to the unseen, n(1); counts above `most` are believed.                [CG sec 2.4]"""
    if count > most or not of[1]:
        return 1.0
    tail = (most + 1) * of[most + 1] / of[1]
    share = ((count + 1) * of[count + 1] / of[count] / count - tail) / (1 - tail) if tail < 1 else 1.0
    return share if 0 < share < 1 else 1.0                       # too little text for these counts of counts


def back_off(n, word, context, lower):
    """Discounted counts for what was seen; what they leave is shared by the unseen words in proportion to `lower`."""
    table, of = n.follow[context], n.of["follow"][len(context)]
    keep = {w: r * katz_discount(of, r) / table.total() for w, r in table.items()}
    left, unseen = max(0.0, 1 - sum(keep.values())), sum(lower(w) for w in n.vocab if w not in table)
    if not unseen:                                               # nobody could take what is left
        return keep.get(word, 0) / sum(keep.values())
    return keep[word] if word in keep else left * lower(word) / unseen


def good_turing(n, word, context):
    """All unseen words of a context are as likely."""                                          # [CG sec 2.2]
    return back_off(n, word, context, lambda w: uniform(n, w, context))


def katz(n, word, context):
    """Unseen words are as likely as the shorter context says."""                               # [CG sec 2.4]
    return back_off(n, word, context, lambda w: below(katz, n, w, context)) if n.follow[context] else below(katz, n, word, context)


def interpolate(n, table, word, context, discounts, estimator):
    """(c(w) - D(c(w))) / sum of c, and the sum of all D for the shorter context: D[0] is 0, the last D serves all above."""
    lower = below(estimator, n, word, context)
    if not table:
        return lower
    taken = sum(discounts[min(r, len(discounts) - 1)] for r in table.values())
    return (table[word] - discounts[min(table[word], len(discounts) - 1)] + taken * lower) / table.total()     # [CG sec 2.6]


def one_discount(of):
    return [0, of[1] / (of[1] + 2 * of[2])] if of[1] else [0, 0.5]                              # [CG sec 2.6]


def three_discounts(of):
    y = one_discount(of)[1]
    wanted = [r - (r + 1) * y * of[r + 1] / of[r] if of[r] else -1 for r in (1, 2, 3)]          # [CG sec 3]
    return [0, *(d if 0 <= d <= r else r / 2 for r, d in zip((1, 2, 3), wanted))]               # r / 2: too little text


def absolute(n, word, context):
    """The same is taken from every count, whatever its size."""                                # [CG sec 2.6]
    return interpolate(n, n.follow[context], word, context, one_discount(n.of["follow"][len(context)]), absolute)


def kneser_ney(n, word, context):
    """A shorter context is asked only about words that are new in the longer one, so it counts different neighbours."""
    return interpolate(n, n.fresh[context], word, context, one_discount(n.of["fresh"][len(context)]), kneser_ney)     # [CG sec 2.7]


def modified_kneser_ney(n, word, context):
    """TextCounts of 1, 2, and 3 or more lose different amounts."""                                 # [CG sec 3]
    return interpolate(n, n.fresh[context], word, context, three_discounts(n.of["fresh"][len(context)]), modified_kneser_ney)


ESTIMATORS = {                         # p(n, word, context) with n = TextCounts(sentences, order); each sums to one over n.vocab
    "add_k": add_k,
    "good_turing": good_turing,
    "jelinek_mercer": jelinek_mercer,
    "katz": katz,
    "absolute": absolute,
    "kneser_ney": kneser_ney,
    "modified_kneser_ney": modified_kneser_ney,
}


# ---- N-grams (what is a word, and how do tables of them lie in memory?) ----

UNK, BOS, EOS = 0, 1, 2


class NGrams:
    """A model as arrays, for orders n = 1 .. N: a trie that is read backwards, from an n-gram's last word to its first.

    words: bytes by id, <unk> <s> </s> first. logp[n], and bow[n] for n < N: float32 log10, in suffix order (n-grams are
    compared by their last word, then by the one before, ...); for n = 1 that is the word's id. left[n]: first word of each
    n-gram. child[n][i]:child[n][i + 1]: the (n+1)-grams that end in n-gram i. A back-off of -0.0 marks an n-gram that no
    longer one begins with. unit, norm: how text was cut into words, and normalised before."""

    def __init__(self, words, unit="space", norm="none"):
        self.words, self.unit, self.norm = words, unit, norm
        self.logp, self.bow, self.left, self.child = [None], [None], [None, None], [None]

    order = property(lambda self: len(self.logp) - 1)


def space_words(line):
    """Words as lmplz cuts them, at NUL, TAB, LF, CR and SPACE; bytes.split() would also cut at VT and FF."""
    if b"\v" in line or b"\f" in line:
        return [word for word in re.split(rb"[\0\t\n\r ]+", line) if word]
    return (line.replace(b"\0", b" ") if b"\0" in line else line).split()


def char_words(line):
    return [c.encode("utf-8", "surrogateescape") for c in line.decode("utf-8", "surrogateescape") if not c.isspace() and c != "\0"]


def unit_words(unit):
    """line (bytes) -> its words (bytes), for a unit: space, char, or tok:PATH, where words are ids of that tokenizer."""
    kind, _, path = unit.partition(":")
    if kind == "tok" and path:
        path, _, mark = path.partition("#")
        tok = tok_lib.load(path)
        if mark not in ("", tok.fingerprint[:12]):
            raise UsageError(f"the tokenizer in {path} is not the one that this model was trained with; put that back, or train anew")
        names = [b"%d" % id for id in range(tok.n_vocab)]
        return lambda line: [*map(names.__getitem__, tok.encode(line))]
    if unit not in ("space", "char"):
        raise UsageError(f"--unit={unit} is not known; use space, char, or tok:PATH with a tokenizer's file or folder")
    return {"space": space_words, "char": char_words}[unit]


def settled_unit(unit):
    """tok:PATH with the whole path and the tokenizer's fingerprint, so that a model never meets another tokenizer."""
    if not unit.startswith("tok:"):
        return unit
    path = unit[4:].partition("#")[0]
    return f"tok:{os.path.abspath(path) if os.path.exists(path) else path}#{tok_lib.load(path).fingerprint[:12]}"


# ---- Text as word ids (what is a word, what is a sentence?) ----
# A line is a sentence; NUL, TAB, CR and SPACE stand between words. Any other byte is part of a word, as in KenLM, even
# a no-break space or what is not UTF-8. Between two sentences stands one id: </s> of the one before, <s> of the next.

SPECIALS = [b"<unk>", b"<s>", b"</s>"]
SPECIAL = re.compile(rb"(?<![^ \n])(?:<unk>|<s>|</s>)(?![^ \n])")
TO_SPACE = bytes.maketrans(b"\0\t\r", b"   ")
TEXT_BLOCK = 1 << 20                   # bytes of text looked at at a time


def new_vocabulary():
    """word -> id by first appearance; to look a word up is to enter it."""
    return defaultdict(itertools.count(len(SPECIALS)).__next__, {word: id for id, word in enumerate(SPECIALS)})


def raw_pieces(path, report):
    """The bytes of a file, or of each document of a .jsonl, piece by piece; a newline ends every last line."""
    if path.removesuffix(".gz").endswith(".jsonl"):
        for document in tok_lib.documents([path], report):
            text = document["text"].encode()
            yield text if text.endswith(b"\n") else text + b"\n"
        return
    file = sys.stdin.buffer if path == "-" else gzip.open(path) if path.endswith(".gz") else open(path, "rb")
    try:
        last = b"\n"
        while piece := file.read(TEXT_BLOCK):
            yield piece
            last = piece[-1:]
        if last != b"\n":
            yield b"\n"
    except (OSError, EOFError) as error:                         # EOFError: a .gz that was cut short
        raise UsageError(f"{path}: cannot be read ({error}); mend or leave out this file") from None
    finally:
        if path != "-":
            file.close()


def text_blocks(paths, unit, norm, report):
    """The text in blocks that end between two words. Other units than words between spaces are spelled with spaces."""
    plain, rest, size = unit == "space" and norm == "none", [], 0
    words, normalize, due = None if plain else unit_words(unit), NORMALIZE[norm], TEXT_BLOCK

    def respell(line):
        line = normalize(line.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
        return b" ".join(words(line))

    named = tok_lib.input_files(paths)
    files = [path for path in named if Path(path).suffix not in tok_lib.REFUSED]
    report["not_text"] += len(named) - len(files)                # inside a folder; one that was named is refused
    for piece in itertools.chain(*(raw_pieces(path, report) for path in files), [None]):
        rest.append(piece or b"")
        size += len(rest[-1])
        if size >= due or piece is None:
            block = b"".join(rest)
            cut = 1 + max(block.rfind(b"\n"), block.rfind(b" ") if plain else -1)
            rest, size = [block[cut:]], len(block) - cut
            due = max(TEXT_BLOCK, 2 * size)                      # a word longer than a block: look half as often
            if cut:
                yield block[:cut] if plain else b"\n".join(map(respell, block[:cut].split(b"\n")))


def word_ids(block, vocabulary, skip_symbols, lines=0):
    """uint32 ids of the words of a block, EOS for every newline. `lines`: how many came before."""
    block = block.translate(TO_SPACE)
    if b"<s>" in block or b"</s>" in block or b"<unk>" in block:
        if not skip_symbols and (found := SPECIAL.search(block)):
            number = lines + block.count(b"\n", 0, found.start()) + 1
            raise UsageError(f"line {number:,} of the text holds the word {found[0].decode()}, which the model keeps "
                             f"for itself; take it out, or leave out all <s>, </s> and <unk> with --skip_symbols")
        block = SPECIAL.sub(b"", block)
    block = block.replace(b"\n", b" </s> ")
    # bytes.split() is fast and would cut at VT and FF too
    words = [*filter(None, block.split(b" "))] if b"\v" in block or b"\f" in block else block.split()
    return np.fromiter(map(vocabulary.__getitem__, words), np.uint32, len(words))


def id_blocks(blocks, vocabulary, skip_symbols, workers, report):
    """The ids of all text, block by block, each sentence followed by EOS; the first begins after an EOS as well."""
    def numbered():
        for block in blocks:
            yield block, report["lines"]
            report["lines"] += block.count(b"\n")

    def apart(item):                                             # in another process: own ids, and what they mean
        own = new_vocabulary()
        return word_ids(item[0], own, skip_symbols, item[1]), [*own]

    yield np.array([EOS], np.uint32)
    if workers < 2:
        yield from (word_ids(block, vocabulary, skip_symbols, lines) for block, lines in numbered())
    else:
        for ids, words in in_order(apart, numbered(), workers):
            yield np.fromiter(map(vocabulary.__getitem__, words), np.uint32, len(words))[ids]


# ---- Long arrays (what if they do not fit into memory?) ----

class Store:
    """Arrays in memory or, with a limit `mem` in bytes, mapped from files without a name, which vanish with the process
    however it ends. Long arrays are visited in order, in blocks, and what was visited is let go. What must be visited
    out of order is visited window by window, and all that points into a window is read once for it. The results do not
    depend on any of this."""

    step, least = 1 << 15, 1 << 12     # entries of a block, of a window

    def __init__(self, mem=0, folder=""):
        self.mem, self.folder, self.maps, self.visited = mem, folder or None, weakref.WeakSet(), 0

    @property
    def room(self):
        """How many entries are visited before their pages are let go."""
        return self.mem // 512 or 1 << 62

    def empty(self, n, dtype):
        if not self.mem:
            return np.empty(n, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, n * np.dtype(dtype).itemsize))     # a full disk shows now
            return self.mapped(file, n, dtype)

    def mapped(self, file, n, dtype):
        pages = mmap.mmap(file.fileno(), max(1, n * np.dtype(dtype).itemsize))
        self.maps.add(pages)
        return np.frombuffer(pages, dtype, n)

    def joined(self, arrays, dtype):
        """One array of many that come one after the other."""
        if not self.mem:
            return np.concatenate([*arrays])
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for array in arrays:
                file.write(array)
            file.flush()
            return self.mapped(file, file.tell() // np.dtype(dtype).itemsize, dtype)

    def visit(self, n):
        self.visited += n
        if self.visited > self.room:
            self.visited = 0
            for pages in self.maps:
                release(pages)

    def blocks(self, n, step=0):
        step = step or self.step
        for a in range(0, n, step):
            yield a, min(n, a + step)
            self.visit(step)

    def whole(self, n):
        """Block size for passes with a cost of their own: all at once, if memory allows."""
        return min(max(1, n), max(self.step, self.room))

    def windows(self, n, width):
        """Ranges of 0..n-1 that may be visited out of order, at `width` bytes each."""
        step = max(self.least, self.mem // (4 * width)) if self.mem else max(1, n)
        return ((a, min(n, a + step)) for a in range(0, n, step))

    def gather(self, source, index, n, out=None, shift=0):
        """out[i] = source[at[i] - shift], where index(a, b) gives at[a:b]; places before the start read anything."""
        out = self.empty(n, source.dtype) if out is None else out
        for low, high in self.windows(len(source), source.itemsize):
            window = source[low:high]
            for a, b in self.blocks(n):
                where, at = within(index(a, b) - shift, low, high, len(source))
                out[a:b][where] = window.take(at, mode="clip")
        return out


def release(array):
    """Lets go of the pages of an array that is mapped from a file: they stay in the page cache, but no longer count as ours."""
    while isinstance(array, (np.ndarray, memoryview)):
        array = array.base if isinstance(array, np.ndarray) else array.obj
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)


def within(index, low, high, n):
    """(which of the numbers lie in low .. high - 1, those minus low)."""
    if high - low == n:
        return slice(None), index
    where = np.flatnonzero((index >= low) & (index < high))
    return where, index[where] - low


# ---- Counting (which n-grams are there, in which order?) ----
# All places where the same n-gram ends stand together in `places`, those of n-gram r at start[r] .. start[r + 1] - 1.
# Sorting each group by the word one further to the left gives the groups of n + 1. So n-grams come in SUFFIX ORDER (by
# last word, then the one before, ...), no comparison reads more than one word, and all that extend an n-gram lie side
# by side.

def by_word(words, n_words, store, offset=0):
    """(places sorted by their word, start of each word's): a stable counting sort. Places count from `offset`."""
    start = np.zeros(n_words + 1, np.int64)
    for a, b in store.blocks(len(words), store.whole(len(words))):
        start[1:] += np.bincount(words[a:b], minlength=n_words)
    np.cumsum(start, out=start)
    free = start[:-1].copy()
    places = store.empty(len(words), np.int32 if len(words) < 1 << 31 else np.int64)
    for a, b in store.blocks(len(words), store.step if not store.mem else store.whole(len(words))):
        bits = (b - a).bit_length()
        key = words[a:b].astype(np.int64) << bits | np.arange(b - a)
        key.sort()
        word = key >> bits
        first = np.flatnonzero(np.diff(word, prepend=-1))
        size = np.diff(first, append=len(word))
        to = np.repeat(free[word[first]] - first, size) + np.arange(len(word))
        free[word[first]] += size
        key = (key & (1 << bits) - 1) + (a + offset)
        for low, high in store.windows(len(places), places.itemsize):
            here = slice(*to.searchsorted((low, high)))
            places[to[here]] = key[here]
            store.visit(store.room + 1)
    return places, start.astype(places.dtype)


def groups(start, step, store):
    """Ranges of groups of about `step` places, always whole groups."""
    r = 0
    while r < len(start) - 1:
        end = max(r + 1, int(np.searchsorted(start[r:r + step + 1], start[r] + step, "right")) - 1 + r)
        yield r, end
        store.visit(int(start[end] - start[r]) + end - r)
        r = end


def sorted_groups(ids, n, n_words, places, start, lower_left, store):
    """Groups sorted by the word n - 1 to the left, some at a time or a part of a large one: (r, end: groups r .. end -
    1; their sizes; places; those words; the last word of the part before or -1)."""
    lefts = store.gather(ids, lambda a, b: places[a:b], len(places), shift=n - 1)
    for r, end in groups(start, store.step, store):
        size, here, word = np.diff(start[r:end + 1]), places[start[r]:start[end]], lefts[start[r]:start[end]]
        if n > 2 and not (inner := lower_left[r:end] != BOS).all():      # nothing stands before <s>
            keep = np.repeat(inner, size)
            here, word, size = here[keep], word[keep], size * inner
        if len(here) > max(store.step, store.room // 4):                 # one group, too large to be sorted in memory
            order, _ = by_word(word, n_words, store)
            here, word = (store.gather(x, lambda a, b: order[a:b], len(order)) for x in (here, word))
            for a, b in store.blocks(len(order)):
                yield r, end, np.array([b - a]), here[a:b], word[a:b], word[a - 1] if a else -1
            continue
        many = np.flatnonzero(np.repeat(size > 1, size))
        if len(many):
            bits = len(many).bit_length()
            group = np.repeat(np.arange(end - r), size)[many]
            key = (group << 32 | word[many]) << bits | np.arange(len(many))
            key.sort()
            word[many], here[many] = key >> bits & 0xFFFFFFFF, here[many][key & (1 << bits) - 1]
        yield r, end, size, here, word, -1


def extended(ids, n, n_words, places, start, lower_left, store):
    """From the places of (n-1)-grams to those of n-grams (in the same array). Returns places, start, left, child."""
    index, n_lower, done, grams = places.dtype, len(start) - 1, 0, 0
    new_start, left = store.empty(len(places) + 1, index), store.empty(len(places), np.uint32)
    child = store.empty(n_lower + 1, np.uint32)
    for r, end, size, here, word, before in sorted_groups(ids, n, n_words, places, start, lower_left, store):
        new, begins = np.ones(len(word), bool), np.cumsum(size) - size
        np.not_equal(word[1:], word[:-1], out=new[1:])
        new[begins[size > 0]] = True
        new[:1] = word[:1] != before
        first = np.flatnonzero(new)
        left[grams:grams + len(first)] = word[first]
        new_start[grams:grams + len(first)] = first + done
        if before == -1:
            child[r:end] = grams + first.searchsorted(begins)
        places[done:done + len(here)] = here
        done, grams = done + len(here), grams + len(first)
    new_start[grams], child[n_lower], left = done, grams, left[:grams]
    for a, b in store.blocks(grams):
        left[a:b][left[a:b] == EOS] = BOS
    return places[:done], new_start[:grams + 1], left, child


class Counts:
    """N-grams of 1 .. order in suffix order: start (of their places, so raw counts), left word, child (range of the
    n-grams of n + 1 that end in it), context (number of the n-gram of n - 1 without the last word)."""

    def __init__(self, ids, n_words, order, store):
        self.order, self.store = order, store
        places, start = by_word(ids[1:], n_words, store, offset=1)
        self.start, self.left, self.child, self.context = [None, start], [None, None], [None], [None, None]
        ranks = store.empty(len(ids), np.uint32) if order > 2 else None      # the (n-1)-gram that ends at each place
        for n in range(2, order + 1):
            if n > 2:
                for low, high in store.windows(len(ids), 4):
                    for r, end in groups(start, store.step, store):
                        where, at = within(places[start[r]:start[end]], low, high, len(ids))
                        ranks[low:high][at] = np.repeat(np.arange(r, end), np.diff(start[r:end + 1]))[where]
            places, start, left, child = extended(ids, n, n_words, places, start, self.left[-1], store)
            self.start.append(start)
            self.left.append(left)
            self.child.append(child)
            self.context.append(left if n == 2 else
                                store.gather(ranks, lambda a, b: places[start[a:b]], len(left), shift=1))

    def size(self, n):
        return len(self.start[n]) - 1

    def raw(self, n, a, b):
        return np.diff(self.start[n][a:b + 1])

    def adjusted(self, n, a, b):
        """How often it was seen, for the highest order and after <s>; else how many different words stand before it."""
        if n == self.order:
            return self.raw(n, a, b)
        new = np.diff(self.child[n][a:b + 1]).astype(self.start[n].dtype)
        return new if n == 1 else np.where(self.left[n][a:b] == BOS, self.raw(n, a, b), new)


# ---- Modified Kneser-Ney (how likely is a word after these?) ----
# Computed in float32 and in KenLM's order of operations, so that models agree to the last digits.

FALLBACK = (0.5, 1.0, 1.5)             # what --discount_fallback stands for


def discounts(counts, n, fallback):
    """D for counts of 0, 1, 2, and 3 or more.                                                          [CG sec 3]"""
    seen = np.zeros(6, np.int64)
    for a, b in counts.store.blocks(counts.size(n)):
        seen += np.bincount(np.minimum(counts.adjusted(n, a, b), 5), minlength=6)
    # KenLM enters the very last n-gram of each lower order by its raw count, up to one that begins with <s>
    if n < counts.order and not any(counts.left[k][-1] == BOS for k in range(2, n)):
        end = counts.size(n)
        for count, change in (int(counts.adjusted(n, end - 1, end)[0]), -1), (int(counts.raw(n, end - 1, end)[0]), 1):
            seen[min(count, 5)] += change
    f, found, wrong = np.float32, [np.float32(0)], ""
    for k in (1, 2, 3):
        if not seen[k]:
            wrong = wrong or f"n_{k} = 0, no {n}-gram has the count {k}"
        elif not wrong:
            share = f(seen[1]) / f(seen[1] + 2.0 * seen[2])
            found.append(f(k) - f(k + 1) * share * f(seen[k + 1]) / f(seen[k]))
            if not 0 <= found[k] <= k:
                wrong = f"that of the count {k} would be {found[k]:.4f}, outside 0 .. {k}"
    if not wrong:
        return np.array(found, f)
    if fallback is None:
        raise UsageError(f"the discounts of order {n} cannot be estimated: {wrong} (n-grams seen 1, 2, 3, 4 times: "
                         f"{', '.join(map(str, seen[1:5]))}); remove duplicate lines, give more text, or set the "
                         f"discounts of such orders: --discount_fallback {' '.join(map(str, FALLBACK))}")
    return np.array([0, *fallback], f)


def by_parents(values, child, store):
    """(a, b, of each n-gram a .. b - 1 the value of the one that it extends), all n-grams in turn."""
    for r, end in groups(child, store.step, store):
        yield int(child[r]), int(child[end]), np.repeat(values[r:end], np.diff(child[r:end + 1]))


def kept_ngrams(counts, thresholds, allowed):
    """For each order a bool per n-gram: neither it nor a part of it is pruned. None where nothing is pruned."""
    kept, store = [None], counts.store
    for n in range(1, counts.order + 1) if any(thresholds) or allowed is not None else ():
        keep = store.empty(counts.size(n), bool)
        whole = ((a, b, True) for a, b in store.blocks(counts.size(1)))
        for a, b, parent in whole if n == 1 else by_parents(kept[n - 1], counts.child[n - 1], store):
            keep[a:b] = (counts.raw(n, a, b) > thresholds[n - 1]) & parent
            if allowed is not None:
                keep[a:b] &= allowed[counts.left[n][a:b] if n > 1 else slice(a, b)]
        if n == 1:
            keep[:3] = True                                      # <unk>, <s>, </s>
        kept.append(keep)
    return kept if len(kept) > 1 else [None] * (counts.order + 1)


def one_order(counts, n, D, keep, lower, uniform=0.0, interpolate_unigrams=True):
    """p of all n-grams; of each (n-1)-gram, what it leaves to shorter contexts, and if a kept n-gram begins with it.

        p(w|c) = (a(cw) - D[a(cw)]) / sum_v a(cv) + g(c) p(w|c'),   g(c) = (sum_v D[a(cv)] + pruned a) / sum_v a(cv)
    """
    store, size, f = counts.store, counts.size(n), np.float32
    n_contexts = 1 if n == 1 else counts.size(n - 1)
    p, weight = store.empty(size, f), store.empty(size, f)
    left_over, followed = store.empty(n_contexts, f), store.empty(n_contexts, bool)
    for low, high in store.windows(n_contexts, 64):
        width = high - low
        kinds, total, pruned = np.zeros(4 * width, np.int64), np.zeros(width), np.zeros(width)

        def blocks():
            for a, b in store.blocks(size, store.whole(size)):
                context = np.zeros(b - a, int) if n == 1 else counts.context[n][a:b]
                where, c = within(context, low, high, n_contexts)
                a_cw = counts.adjusted(n, a, b)[where]
                kind = np.minimum(a_cw, 3)
                yield a, b, where, c, a_cw, kind, kind if keep is None else kind * keep[a:b][where]

        for a, b, where, c, a_cw, _, kept_kind in blocks():
            kinds += np.bincount(4 * c.astype(np.int64) + kept_kind, minlength=4 * width)
            total += np.bincount(c, a_cw, minlength=width)
            if keep is not None:
                pruned += np.bincount(c, a_cw * (kept_kind == 0), minlength=width)
        kinds = kinds.reshape(width, 4)
        mass = sum(D[k] * kinds[:, k].astype(f) for k in (1, 2, 3)) + pruned.astype(f)
        total = np.where(total > 0, total, 1).astype(f)
        left_over[low:high], followed[low:high] = mass / total, kinds[:, 1:].any(1)
        for a, b, where, c, a_cw, kind, _ in blocks():
            p[a:b][where] = (a_cw.astype(f) - D[kind]) / total[c]
            weight[a:b][where] = left_over[low:high][c]
    if n == 1:
        p[:2] = 0 if interpolate_unigrams else left_over[0], 1
        weight[:] = left_over[0] if interpolate_unigrams else 0
        weight[BOS] = 0
        for a, b in store.blocks(size):
            p[a:b] += weight[a:b] * f(uniform)
    else:
        for a, b, shorter in by_parents(lower, counts.child[n - 1], store):
            p[a:b] += weight[a:b] * shorter
    return p, left_over, followed


def log10(values, store):
    """In place; computed in float64, so that every machine rounds to the same float32."""
    for a, b in store.blocks(len(values)):
        with np.errstate(divide="ignore"):
            values[a:b] = np.log10(values[a:b], dtype=np.float64)
    return values


def selected(values, keep, store):
    if keep is None:
        return values
    out, n = store.empty(len(values), values.dtype), 0
    for a, b in store.blocks(len(values)):
        some = values[a:b][keep[a:b]]
        out[n:n + len(some)] = some
        n += len(some)
    return out[:n]


def kept_children(child, keep, keep_children, store):
    """The ranges of children of the n-grams that are kept, among the children that are kept."""
    if keep is None:
        return child
    ends, total = store.empty(len(child), np.uint32), 0
    ends[0] = 0
    for r, end in groups(child, store.step, store):
        sums = np.concatenate([[0], np.cumsum(keep_children[child[r]:child[end]])])
        ends[r + 1:end + 1] = total + sums[child[r + 1:end + 1] - child[r]]
        total += int(sums[-1])
    return selected(ends, np.concatenate([[True], keep]), store)


def allowed_words(path, words):
    try:
        listed = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--limit_vocab_file={path} cannot be read ({error.strerror}); name a file of words") from None
    listed = set(listed.translate(TO_SPACE).replace(b"\n", b" ").split(b" ")) | set(SPECIALS)
    return np.fromiter(map(listed.__contains__, words), bool, len(words))


def check_flags(order, prune, fallback, vocab_pad, interpolate_unigrams):
    """(a threshold for each order, three discounts or None)."""
    prune, fallback = [*prune], None if fallback is None else [*fallback] or [*FALLBACK]
    show = lambda values: " ".join(map(str, values))
    if not 1 <= order <= 100:
        raise UsageError(f"--order={order} must be from 1 to 100; 3 to 5 are usual")
    if vocab_pad < 0:
        raise UsageError(f"--vocab_pad={vocab_pad} must be 0 or more")
    if len(prune) > order:
        raise UsageError(f"--prune {show(prune)}: --order={order} takes {order} thresholds; say {show(prune[:order])}")
    if prune != sorted(prune) or prune[:1] < [0] * len(prune[:1]):
        raise UsageError(f"--prune {show(prune)}: thresholds start at 0 or more and never decrease, or n-grams would "
                         f"outlive their own parts; say {show(sorted(max(0, t) for t in prune))}")
    if fallback and (len(fallback) > 3 or not all(0 <= d <= k for k, d in enumerate(fallback, 1))):
        raise UsageError(f"--discount_fallback {show(fallback)}: at most three discounts, for counts 1, 2, and 3 or "
                         f"more, the k-th within 0 .. k; say {show(FALLBACK)}")
    if vocab_pad and not interpolate_unigrams:
        raise UsageError("--vocab_pad has no effect with --interpolate_unigrams=0; leave one of them out")
    thresholds = prune + [prune[-1] if prune else 0] * (order - len(prune))
    return thresholds, fallback and fallback + [fallback[-1]] * (3 - len(fallback))


def estimate(paths, order, *, unit="space", norm="none", prune=(), discount_fallback=None, skip_symbols=False,
             limit_vocab="", vocab_pad=0, interpolate_unigrams=True, mem=0, workers=1, report=None, tmp=""):
    """Modified Kneser-Ney of `order` on text, equal to KenLM's. mem: bytes, 0 for no limit. Returns NGrams."""
    thresholds, fallback = check_flags(order, prune, discount_fallback, vocab_pad, interpolate_unigrams)
    store, vocabulary, report = Store(mem, tmp), new_vocabulary(), Counter() if report is None else report
    blocks = text_blocks(paths, unit, norm, report)
    ids = store.joined(id_blocks(blocks, vocabulary, skip_symbols, workers, report), np.uint32)
    words = [*vocabulary]
    del vocabulary
    if not report["lines"]:
        raise UsageError(f"{' '.join(map(str, paths))} holds no text; give a file with at least one line")
    if len(words) > 1 << 32:
        raise UsageError(f"there are {len(words):,} different words, a model at most {1 << 32:,}; use --unit tok:FILE")
    report["words"] = len(ids) - 1 - report["lines"]
    store.mem = mem and max(mem // 4, mem - 130 * len(words))   # the words take their share
    counts = Counts(ids, len(words), order, store)
    del ids
    kept = kept_ngrams(counts, thresholds, allowed_words(limit_vocab, words) if limit_vocab else None)
    D = [None] + [discounts(counts, n, fallback) for n in range(1, order + 1)]
    out, lower = NGrams(words, unit, norm), None
    n_kept = len(words) if kept[1] is None else int(kept[1].sum())
    uniform = 1 / np.float32(max(n_kept - 1, vocab_pad))         # of every word but <s>
    for n in range(1, order + 1):
        p, left_over, followed = one_order(counts, n, D[n], kept[n], lower, uniform, interpolate_unigrams)
        if n > 1:
            bow = log10(left_over, store)
            for a, b in store.blocks(len(bow)):
                bow[a:b][~followed[a:b]] = -0.0                  # no longer n-gram begins with it
            finish(out, n - 1, lower, bow, counts, kept, store)
        lower = p
    finish(out, order, lower, None, counts, kept, store)
    if kept[1] is not None:
        out.words = [word for word, stays in zip(words, kept[1].tolist()) if stays]
        number = np.cumsum(kept[1], dtype=np.uint32) - np.uint32(1)
        for n in range(2, order + 1):
            for a, b in store.blocks(len(out.left[n])):
                out.left[n][a:b] = number[out.left[n][a:b]]
    return out


def finish(out, n, p, bow, counts, kept, store):
    """The tables of order n: logarithms of what is kept."""
    logp = log10(selected(p, kept[n], store), store)
    for a, b in store.blocks(len(logp)):
        np.minimum(logp[a:b], 0, out=logp[a:b])
    out.logp.append(logp)
    if n > 1:
        out.left.append(selected(counts.left[n], kept[n], store))
        counts.context[n] = None
    if bow is not None:
        out.bow.append(selected(bow, kept[n], store))
        out.child.append(kept_children(counts.child[n], kept[n], kept[n + 1], store))


# ---- ARPA (how is a model exchanged?) ----
# Lines are put together from cells of 8 bytes, filled up with NUL, which no word holds: one gather and one deletion
# make the text of thousands of lines.

def cells_of(texts, room=0):
    """Texts (bytes) in cells with `room` for more: the cells (uint64), the first of each text and one more, lengths."""
    size = np.fromiter(map(len, texts), np.int64, len(texts))
    start = np.concatenate([[0], np.cumsum(size + room + 7 >> 3)])
    cells = np.zeros(8 * start[-1], np.uint8)
    for a in range(0, len(texts), 1 << 14):
        some = size[a:a + (1 << 14)]
        to = np.repeat(8 * start[a:a + len(some)] - np.cumsum(some) + some, some) + np.arange(some.sum())
        cells[to] = np.frombuffer(b"".join(texts[a:a + len(some)]), np.uint8)
    return cells.view(np.uint64), start, size


ARPA_LINES = 1 << 16                   # written at a time


def padded(texts):
    return np.array(texts, "S4").view(np.uint32)                 # four characters each, filled up with NUL


WHOLE = padded([b"-%d" % i for i in range(100)] + [b"-%d." % i for i in range(100)])
FOUR = padded([b"%04d" % i for i in range(10000)] + [(b"%04d" % i).rstrip(b"0") for i in range(10000)])
THREE = padded([(b"%03d" % i).rstrip(b"0") for i in range(1000)])


def number_cells(values, stop):
    """Cells, two each, of float32 in the fewest digits that read back as the same number; and which ones do not fit
    (these: all that are not 0 and not within -99 .. -0.0002)."""
    exact = -values.astype(np.float64)
    odd = np.flatnonzero(~((exact >= 2e-4) & (exact < 99) | (exact == 0)))
    exact[odd] = 0
    number, todo = np.empty(len(values), np.int64), np.arange(len(values))         # in units of 10^-11

    def rounded(which, digits):
        short = np.rint(exact[which] * 10.0**digits)
        same = (short / 10.0**digits).astype(np.float32) == exact[which]
        number[which[same]] = short[same].astype(np.int64) * 10**(11 - digits)
        return same

    for digits in range(7, 12):                                  # most need 6 or 7 digits behind the point
        same = rounded(todo, digits)
        shorter = todo[same] if digits == 7 else ()
        todo = todo[~same]
        for fewer in range(6, -1, -1) if digits == 7 else ():
            shorter = shorter[rounded(shorter, fewer)]
    whole, rest = np.divmod(number, 10**11)
    high, rest = np.divmod(rest, 10**7)
    middle, low = np.divmod(rest, 1000)
    out = np.empty((len(values), 4), np.uint32)
    out[:, 0] = WHOLE[whole + 100 * (number % 10**11 > 0)]
    out[:, 1] = FOUR[high + 10000 * (rest == 0)]
    out[:, 2] = FOUR[middle + 10000 * (low == 0)]
    out[:, 3] = THREE[low] | ord(stop) << 24
    out[exact == 0, 0] = ord("0")
    return out.view(np.uint64).ravel(), odd


def spelled(x):
    """A rare float32: infinite, positive, or above -0.0002."""
    if np.isinf(x) or abs(x) >= 1e-6:
        return str(x) if np.isinf(x) else np.format_float_positional(x, trim="-")
    return np.format_float_scientific(x, trim="-", exp_digits=1)


def words_of(grams, n, a, b):
    """Word ids of the n-grams a .. b - 1, a row each. Those that they extend lie side by side too, and so on."""
    if n == 1:
        return np.arange(a, b, dtype=np.uint32)[:, None]
    child = grams.child[n - 1]
    low, high = child.searchsorted(np.uint32(a), "right") - 1, child.searchsorted(np.uint32(b))
    lower = words_of(grams, n - 1, low, high)
    size = np.diff(np.clip(child[low:high + 1], a, b))
    return np.concatenate([grams.left[n][a:b, None], np.repeat(lower, size, axis=0)], axis=1)


def arpa_lines(grams, n, a, b, cells, start):
    """The text of n-grams a .. b - 1. cells: words with a space, words with what ends a last one, room for numbers."""
    columns = [(grams.logp[n][a:b], b"\t")] + ([(grams.bow[n][a:b], b"\n")] if n < grams.order else [])
    size, begin = np.full((2, b - a, n + len(columns)), 2)       # of every number and word: its cells, the first one
    ids, top = words_of(grams, n, a, b), 2 * start[-1]
    begin[:, 1:n + 1], size[:, 1:n + 1] = start[ids], start[ids + 1] - start[ids]
    begin[:, n] += start[-1]
    for at, (values, stop) in zip((0, n + 1), columns):
        numbers, odd = number_cells(values, stop)
        begin[:, at] = np.arange(top, top + len(numbers), 2)
        rare, rare_start, _ = cells_of([spelled(x).encode() + stop for x in values[odd]])
        begin[odd, at], size[odd, at] = top + len(numbers) + rare_start[:-1], np.diff(rare_start)
        for more in (numbers, rare):
            cells[top:top + len(more)] = more
            top += len(more)
    for table in (*grams.logp[1:], *grams.bow[1:], *grams.left[2:], *grams.child[1:]):
        release(table)
    begin, size = begin.ravel(), size.ravel()
    end = np.cumsum(size)
    at = np.repeat(begin - end + size, size) + np.arange(end[-1])
    return cells.take(at, mode="clip").tobytes().translate(None, b"\0")


def write_arpa(grams, path, workers=1):
    """The text format of all n-gram tools, as KenLM writes it, in suffix order."""
    sizes = [len(logp) for logp in grams.logp[1:]]
    cells, start, size = cells_of(grams.words, room=1)
    stops = 8 * start[:-1] + size                                # the byte after each word
    cells.view(np.uint8)[stops] = ord(" ")
    cells = np.concatenate([cells, cells, np.empty(10 * ARPA_LINES, np.uint64)])
    stops += 8 * start[-1]
    with atomic_write(path) as file:
        file.write(b"\\data\\\n" + b"".join(b"ngram %d=%d\n" % item for item in enumerate(sizes, 1)))
        for n, size in enumerate(sizes, 1):
            file.write(b"\n\\%d-grams:\n" % n)
            cells.view(np.uint8)[stops] = ord("\n" if n == grams.order else "\t")
            spans = ((a, min(size, a + ARPA_LINES)) for a in range(0, size, ARPA_LINES))
            for text in in_order(lambda span: arpa_lines(grams, n, *span, cells, start), spans, workers):
                file.write(text)
        file.write(b"\n\\end\\\n")


# ---- Finding n-grams (is this word known before that n-gram?) ----
# N-grams form a reverse trie: the root's children are last words, the children of a node are the words found before it;
# more context is one step down. That step is all a query needs: find(nodes, words) -> (which, children) says which of
# many nodes have a child for their word, in any order, and what it is. One structure saves time, one space.    [KenLM]

BLOCK = 1 << 18                # entries that are built, packed or written at a time
EMPTY = 0xFFFFFFFF             # a slot that holds no node
MIX = np.uint32(2654435769)    # odd, near 2^32 over the golden ratio: spreads word ids over all 32 bits, one to one


def fall_in(homes, free):
    """Linear probing for entries sorted by home: each lands there or right behind the last, none before `free`."""
    rank = np.arange(len(homes))
    return np.maximum(np.maximum.accumulate(homes - rank), free) + rank


class Probing:
    """A hash table with linear probing, half full, one for all nodes of an order.

    A slot holds only a node (4 bytes). Its key is read from the trie: the parent from child ranges, the word from
    `left`. The hash keeps the order of parents and, below one, that of the mixed words. So the entries of a parent lie
    together, the table is built in one sweep, and a search that fails ends as early as one that succeeds. [Ordered]"""

    def __init__(self, child, left, slots):
        self.child, self.left, self.slots = child, left, slots

    @staticmethod
    def home(first, count, mixed):
        """The slot where a search begins: the parent's children first .. first + count own twice as many slots."""
        return 2 * first.astype(np.int64) + (mixed.astype(np.int64) * count >> 31)

    @classmethod
    def blocks(cls, child, left):
        """The slots, in blocks of complete parents; one empty slot comes last."""
        parent, free = 0, 0
        while parent < len(child) - 1:
            many = int(np.searchsorted(child, child[parent] + BLOCK, "right")) - 1
            stop = max(parent + 1, min(parent + 65536, many))
            edge = np.array(child[parent:stop + 1])
            owner = np.repeat(np.arange(stop - parent, dtype=np.uint16), np.diff(edge))
            mixed = np.array(left[edge[0]:edge[-1]]) * MIX
            order = np.lexsort((mixed.astype(np.uint16), (mixed >> 16).astype(np.uint16), owner))    # 16 bits: by radix
            slot = fall_in(cls.home(edge[owner], np.diff(edge)[owner], mixed)[order], free)
            if len(slot):
                block = np.full(slot[-1] + 1 - free, EMPTY, np.uint32)
                block[slot - free] = edge[0] + order
                yield block
                free = int(slot[-1]) + 1
            parent = stop
            release(child)
            release(left)
        yield np.full(max(2 * int(child[-1]) - free, 0) + 1, EMPTY, np.uint32)

    def find(self, nodes, words):
        first = self.child.take(nodes, mode="clip")
        count, key = self.child[1:].take(nodes, mode="clip") - first, words * MIX
        at, todo, found = self.home(first, count, key), np.flatnonzero(count), [(np.zeros(0, np.int64),) * 2]
        only = lambda index, *arrays: (array.take(index, mode="clip") for array in arrays)       # clip: faster than to check
        at, first, count, key = only(todo, at, first, count, key)
        while len(todo):
            node = self.slots.take(at, mode="clip")
            ours = node - first < count                          # unsigned: false on both sides of the range
            here = self.left.take(node, mode="clip") * MIX
            yes, on = np.flatnonzero(ours & (here == key)), np.flatnonzero((node < first) | ours & (here < key))
            found.append((todo.take(yes, mode="clip"), node.take(yes, mode="clip").astype(np.int64)))
            todo, at, first, count, key = only(on, todo, at + 1, first, count, key)
        return tuple(map(np.concatenate, zip(*found)))


class Trie:
    """The children of a node are sorted by word: bisection finds one, and no byte is spent on finding."""

    def __init__(self, child, left):
        self.child, self.left = child, left

    def find(self, nodes, words):
        low, high = self.child.take(nodes).astype(np.int64), self.child.take(nodes + 1).astype(np.int64)
        todo, found = np.flatnonzero(low < high), [(np.zeros(0, np.int64),) * 2]
        low, high, words = low.take(todo), high.take(todo), words.take(todo)
        while len(todo):
            middle = low + high >> 1
            left = self.left.take(middle)
            hit = np.flatnonzero(left == words)
            found.append((todo.take(hit), middle.take(hit)))
            low, high = np.where(left < words, middle + 1, low), np.where(left > words, middle, high)
            more = np.flatnonzero((low < high) & (left != words))
            todo, low, high, words = todo.take(more), low.take(more), high.take(more), words.take(more)
        return tuple(map(np.concatenate, zip(*found)))


# ---- Words (which number has this word?) ----
# No word of a text becomes a Python object: a block of text is one array of bytes, words are places in it, and they are
# hashed and looked up together. As in KenLM, two words with the same 64-bit hash are taken for one.

SPACES = bytes(byte in b"\0\t\n\r " for byte in range(256))     # where lmplz cuts; kenlm.Model also cuts at VT, FF
FIRST_BYTES = np.array([(1 << 8 * i) - 1 for i in range(9)], np.uint64)
ODD = np.uint64(0x9E3779B97F4A7C15)


def cut(block):
    """(text, begin, end): where the words of a block lie. The text begins with a line end; 8 bytes follow it."""
    block = b"".join((b"\n", block, b"\n" + bytes(8)))
    space = np.frombuffer(block.translate(SPACES), bool)
    edges = np.flatnonzero(space[1:] != space[:-1]) + 1
    return np.frombuffer(block, np.uint8), edges[0::2], edges[1::2]


def eight_bytes(text, at, left):
    """The next eight bytes as one number, or what is left of the word if that is less."""
    from_here = np.ndarray(len(text) - 7, np.uint64, text, strides=(1,))     # not aligned, which costs little
    return from_here[at] & FIRST_BYTES.take(np.clip(left, 0, 8))


def hash_words(text, begin, end):
    """A 64-bit hash of each word, eight bytes at a step."""
    hashes, todo, at, left = np.zeros(len(begin), np.uint64), np.arange(len(begin)), begin, end - begin
    mixed = left.astype(np.uint64)
    while len(todo):
        mixed = (mixed ^ eight_bytes(text, at, left)) * ODD
        mixed ^= mixed >> np.uint64(32)
        hashes[todo] = mixed
        more = np.flatnonzero(left > 8)
        todo, mixed, at, left = todo.take(more), mixed.take(more), at.take(more) + 8, left.take(more) - 8
    return hashes * ODD


class Words:
    """The vocabulary: the words end to end, where each ends, their hashes, and a table of ids two thirds full. An empty
    slot is 0, the id of <unk>. Entries are in the order of their hashes, as in Probing."""

    FIELDS = ("words", "word_ends", "word_hashes", "word_slots")

    def __init__(self, text, ends, hashes, slots):
        self.text, self.ends, self.hashes, self.slots = text, ends, hashes, slots

    @staticmethod
    def home(hashes, size):
        return ((hashes >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)).astype(np.int64)

    @classmethod
    def build(cls, words):
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        text = np.frombuffer(b"".join([*words, bytes(8)]), np.uint8)
        hashes = hash_words(text, np.append(0, ends[:-1]), ends)
        order = np.argsort(hashes[1:], kind="stable") + 1
        slot = fall_in(cls.home(hashes[order], size := len(words) * 3 // 2), 0)
        slots = np.zeros(max(size, int(slot[-1]) + 1) + 1, np.uint32)
        slots[slot] = order
        return cls(text[:-8], ends, hashes, slots)

    def word(self, i):
        return self.text[self.ends[i - 1] if i else 0:self.ends[i]].tobytes()

    def find(self, hashes):
        """The ids of words with these hashes, 0 for those not here."""
        ids, todo = np.zeros(len(hashes), np.uint32), np.arange(len(hashes))
        at = self.home(hashes, len(self.hashes) * 3 // 2)
        while len(todo):
            here = self.slots.take(at)
            theirs = self.hashes.take(here)
            hit = (theirs == hashes) & (here > 0)
            yes, more = np.flatnonzero(hit), np.flatnonzero((theirs < hashes) & (here > 0))
            ids[todo.take(yes)] = here.take(yes)
            todo, at, hashes = todo.take(more), at.take(more) + 1, hashes.take(more)
        return ids


# ---- Fewer bits (how small can a number be?) ----

class Packed:
    """Whole numbers of `bits` bits each, end to end in 64-bit words; .take(i) like an array."""

    def __init__(self, data, bits):
        self.data, self.bits = data, bits

    @staticmethod
    def blocks(blocks, bits):
        """Blocks of numbers as words, 64 numbers in `bits` words; all blocks but the last hold a multiple of 64."""
        for block in blocks:
            group = np.zeros((-(-len(block) // 64), 64), np.uint64)
            group.reshape(-1)[:len(block)] = block
            words = np.zeros((len(group), bits + 1), np.uint64)
            for i in range(64):
                word, shift = divmod(i * bits, 64)
                words[:, word] |= group[:, i] << np.uint64(shift)
                words[:, word + 1] |= group[:, i] >> np.uint64(63 - shift) >> np.uint64(1)   # a shift by 64 is not 0
            yield words[:, :-1].reshape(-1)
        yield np.zeros(1, np.uint64)                             # the last number may look at the word after it

    def take(self, index):
        bit = np.asarray(index, np.int64) * self.bits
        word, shift = bit >> 6, (bit & 63).astype(np.uint64)
        high = self.data.take(word + 1) << np.uint64(1) << np.uint64(63) - shift
        return ((self.data.take(word) >> shift | high) & np.uint64((1 << self.bits) - 1)).astype(np.uint32)


class Coded:
    """Floats as codes into a small table."""

    def __init__(self, codes, table):
        self.codes, self.table = codes, table

    def take(self, index):
        return self.table.take(self.codes.take(index))


def bins(values, n):
    """The means of n bins that hold as many of the sorted values each; an empty bin repeats the one before.   [Bins]"""
    values = np.sort(values)
    edge = len(values) * np.arange(n + 1) // n
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    size = np.diff(edge)
    mean = np.diff(sums[edge]) / np.maximum(size, 1)
    last = np.maximum.accumulate(np.where(size > 0, np.arange(n), -1))
    return np.where(last < 0, -np.inf, mean[np.maximum(last, 0)]).astype(np.float32)


def nearest(table, values):
    """The index of the table's entry that is nearest to each value; the table is sorted."""
    above = np.searchsorted(table, values).clip(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    return above - (values - low < high - values)


SAMPLE = 1 << 24               # values that bins are learnt from, evenly spread


def codebook(values, n):
    """n values to stand for all: one half the means of equally full bins, as KenLM's, the other half evenly spaced. What lies
    far out is rare among n-grams but not in text, so bins alone move perplexity by up to 0.5 %, both together by 0.05 %."""
    spaced = np.linspace(values.min(), values.max(), n // 2)
    return np.sort(np.concatenate([bins(values, n - n // 2), spaced])).astype(np.float32)


def quantize(values, bits, backoff):
    """(table, function from values to codes). A zero back-off keeps its sign, which says whether something goes on from
    the n-gram: codes 0 and 1 are -0.0 and 0.0."""
    sample = np.array(values[::-(-len(values) // SAMPLE) or 1])
    if not backoff:
        table = codebook(sample, 1 << bits) if len(sample) else np.zeros(1 << bits, np.float32)
        return table, lambda part: nearest(table, part)
    zeros, sample = np.float32([-0.0, 0.0]), sample[sample != 0]
    table = codebook(sample, (1 << bits) - 2) if len(sample) else np.zeros((1 << bits) - 2, np.float32)
    return np.append(zeros, table), lambda part: np.where(part == 0, ~np.signbit(part), nearest(table, part) + 2)


# ---- The model file (how is a model ready the moment it is opened?) ----
# 64 bytes (magic, version, where the directory lies, length of the file), arrays at multiples of 64, then the
# directory, a JSON object. Arrays are mapped, not read: opening takes as long at any size, and processes share the pages.

KN_MAGIC, KN_VERSION, KN_HEAD = b"flatlm n-grams\n\0", 1, struct.Struct("<16sIIQQ24x")


class Writer:
    """Arrays one after another in a seekable file, and the directory of where they are."""

    def __init__(self, file):
        self.file, self.arrays = file, {}
        file.write(bytes(KN_HEAD.size))

    def add(self, name, blocks, dtype, bits=0):
        self.file.write(bytes(-self.file.tell() % 64))
        start, count = self.file.tell(), 0
        for block in blocks:
            count += len(block)
            self.file.write(np.ascontiguousarray(block, dtype).data)
        self.arrays[name] = [dtype, start, count, bits]

    def numbers(self, name, values, bits=0):
        """Whole numbers, uint32 or packed."""
        self.add(name, Packed.blocks(slices(values), bits) if bits else slices(values), "u8" if bits else "u4", bits)

    def floats(self, name, values, bits=0):
        """float32, or codes and a table."""
        if bits in (0, 32):
            return self.add(name, slices(values), "f4")
        table, encode = quantize(values, bits, name.startswith("bow"))
        self.add("table." + name, [table], "f4")
        self.add(name, Packed.blocks(map(encode, slices(values)), bits), "u8", bits)

    def close(self, **about):
        start = self.file.tell()
        directory = json.dumps({**about, "arrays": self.arrays}, sort_keys=True).encode()
        self.file.write(directory)
        self.file.seek(0)
        self.file.write(KN_HEAD.pack(KN_MAGIC, KN_VERSION, len(directory), start, start + len(directory)))


def slices(array):
    """An array in blocks, whose pages are let go if they are mapped."""
    for start in range(0, len(array), BLOCK):
        yield array[start:start + BLOCK]
        release(array)


def write_model(file, ngrams, quant=0):
    """Plain arrays and hash tables (quant 0), or the packed trie, a float in 2 .. 16 bits or whole (32)."""
    out, order, counts = Writer(file), ngrams.order, list(map(len, ngrams.logp[1:]))
    words = Words.build(ngrams.words)
    fields = words.text, words.ends, words.hashes, words.slots
    for name, values, dtype in zip(Words.FIELDS, fields, ("u1", "u4", "u8", "u4")):
        out.add(name, slices(values), "u8" if name == "word_ends" and values[-1] >> 32 else dtype)
    for n in range(1, order + 1):
        packed = quant if n > 1 else 0                           # 1-grams are few and asked most often: they stay plain
        out.floats(f"logp.{n}", ngrams.logp[n], packed)
        if n < order:
            out.floats(f"bow.{n}", ngrams.bow[n], packed)
            out.numbers(f"child.{n}", ngrams.child[n], packed and counts[n].bit_length())
        if n > 1:
            out.numbers(f"left.{n}", ngrams.left[n], packed and counts[0].bit_length())
            if not quant:
                out.add(f"slots.{n}", Probing.blocks(ngrams.child[n - 1], ngrams.left[n]), "u4")
    out.close(order=order, counts=counts, unit=ngrams.unit, norm=ngrams.norm, quant=quant)


def save_model(ngrams, path, quant=0):
    if quant not in (0, *range(2, 17), 32):
        raise UsageError(f"--quant={quant} is not possible; use 0 (hash tables), 2 to 16 bits, or 32 (whole floats)")
    with atomic_write(path) as file:
        write_model(file, ngrams, quant)


# ---- State (what of the words so far can still matter?) ----
# To the right a decoder keeps the longest context that something goes on from, and its back-offs: two histories with
# the same state have the same future [KenLM]. To the left a fragment keeps the n-grams that begin at its first word and
# that words before it may still lengthen: fragments are scored alone, and joining two costs a few look-ups.    [LState]

@dataclass(frozen=True)
class State:
    """The words of the context, nearest first; bows[m - 1] is the back-off of its last m words."""
    words: tuple = ()
    bows: tuple = field(default=(), compare=False)


@dataclass(frozen=True)
class Fragment:
    """left[i - 1]: the node of the first i words, as long as words before them may change the probability of word i.
    `full`: the word after those is settled, but for back-offs of contexts that begin further left. `logp`: of all
    words, with the context that is inside."""
    left: tuple = ()
    full: bool = False
    right: State = State()
    logp: float = 0.0


# ---- Asking (what does a word cost after the words before it?) ----
#     p(w | h) = p(w | h')  bow(h) if "h w" is not in the model, h' = h without its first word
# Many words are asked at once: all as 1-grams, those whose node has a child for the word before as 2-grams, then of
# these the 3-grams ... Then each owes the back-offs of its known contexts that are no shorter than what was found.

WALL = 0xFFFFFFFF              # the word before a sentence; no n-gram reaches across it
CHUNK = 1 << 18                # words asked in one vector: short enough for the cache, long enough for numpy


class Model:
    """A mapped model. Nodes of order n are numbers 0 .. counts[n] - 1; those of order 1 are the word ids."""

    def __init__(self, data, about):
        def array(name):
            dtype, start, count, bits = about["arrays"][name]
            values = np.frombuffer(data, dtype, count, start)
            values = Packed(values, bits) if bits else values
            return Coded(values, array("table." + name)) if "table." + name in about["arrays"] else values

        self.order, self.unit, self.norm, self.quant = (about[name] for name in ("order", "unit", "norm", "quant"))
        self.counts, orders = [0, *about["counts"]], range(1, self.order + 1)
        self.logp = [None, *(array(f"logp.{n}") for n in orders)]
        self.bow = [None, *(array(f"bow.{n}") for n in orders[:-1])]
        self.child = [None, *(array(f"child.{n}") for n in orders[:-1])]
        self.left = [None, None, *(array(f"left.{n}") for n in orders[1:])]
        self.search = [None, None, *(
            Trie(self.child[n - 1], self.left[n]) if self.quant else
            Probing(self.child[n - 1], self.left[n], array(f"slots.{n}")) for n in orders[1:])]
        self.words = Words(*map(array, Words.FIELDS))

        self.cut_line = unit_words(self.unit)

    def spaced(self, block):
        """Lines by the model's normaliser and unit, with spaces between the words."""
        if self.norm == "none" and self.unit == "space":
            return block
        clean, raw = NORMALIZE[self.norm], ("utf-8", "surrogateescape")
        lines = (clean(line.decode(*raw)).encode(*raw) for line in block.split(b"\n"))
        return b"\n".join(b" ".join(self.cut_line(line)) for line in lines)

    def ids(self, block, eos=True):
        """(ids, starts) of a block of spaced lines: their words, each line closed by </s>, and where they begin."""
        text, begin, end = cut(block)
        ids = self.words.find(hash_words(text, begin, end))
        ends = begin.searchsorted(np.flatnonzero(text == 10)[1:])
        if eos:
            ends += np.arange(1, len(ends) + 1)
            word = np.ones(len(ids) + len(ends), bool)
            word[ends - 1] = False
            words, ids = ids, np.full(len(word), EOS, np.uint32)
            ids[word] = words
        return ids, np.append(0, ends)[:-1]

    def score(self, ids, starts, bos=True):
        """(log10 p float32, length of the n-gram found uint8) of every id; sentences begin at `starts`, without <s>."""
        before = np.append(WALL, ids).astype(np.uint32)          # the word before each word
        before[starts] = BOS if bos else WALL
        logp, length = np.empty(len(ids), np.float32), np.empty(len(ids), np.uint8)
        for start in range(0, len(ids), CHUNK):
            seen = min(start, self.order - 1)                    # words before the chunk that its first words need
            low, high = start - seen, min(start + CHUNK, len(ids))
            begin = starts[np.searchsorted(starts, low):np.searchsorted(starts, high)] - low
            part = self._score(ids[low:high], before[low:high], begin, bos)
            logp[start:high], length[start:high] = (values[seen:] for values in part)
        return logp, length

    def _score(self, ids, before, begin, bos):
        many = len(ids)
        nodes, length = np.empty((self.order + 1, many + 1), np.uint32), np.ones(many + 1, np.uint8)
        length[0], nodes[1, 1:] = 0, ids                         # column i is about the words before word i
        node, at = ids.astype(np.int64), np.arange(many)
        for n in range(2, self.order + 1):
            which, node = self.search[n].find(node, before.take(at - (n - 2), mode="clip"))
            at = at.take(which)
            nodes[n, 1:][at], length[1:][at] = node, n
        logp, found, known = np.empty(many, np.float32), length[1:], length[:-1].copy()
        for n in range(1, self.order + 1):
            here = np.flatnonzero(found == n)
            logp[here] = self.logp[n].take(nodes[n, 1:].take(here))
        known[begin], nodes[1, begin] = bos, BOS
        for n in range(1, self.order):
            here = np.flatnonzero((found <= n) & (known >= n))   # this context is known, not with this word
            logp[here] += self.bow[n].take(nodes[n].take(here))
        return logp, found

    def ngrams(self):
        """The tables again, as estimated or read: arrays of the file where it holds plain ones."""
        def plain(array, count):
            return array if isinstance(array, np.ndarray) else array.take(np.arange(count))

        tables = NGrams([self.words.word(i) for i in range(self.counts[1])], self.unit, self.norm)
        for name, begin, stop, more in (("logp", 1, 1, 0), ("bow", 1, 0, 0), ("child", 1, 0, 1), ("left", 2, 1, 0)):
            for n in range(begin, self.order + stop):
                getattr(tables, name).append(plain(getattr(self, name)[n], self.counts[n] + more))
        return tables

    def state(self, bos=True):
        return State((BOS,), (float(self.bow[1].take(BOS)),)) if bos and self.order > 1 else State()

    def longer(self, node, n, words):
        """The nodes found when more and more `words`, nearest first, are put before the n-gram `node`."""
        found = []
        for n, word in zip(range(n + 1, self.order + 1), words):
            _, child = self.search[n].find(np.array([node]), np.array([word], np.uint32))
            if not len(child):
                break
            found.append(node := int(child[0]))
        return found

    def useful(self, n, nodes):
        """The back-offs of the nodes of orders n, n + 1 ..., up to the last that something goes on from."""
        bows = [float(self.bow[m].take(node)) for m, node in enumerate(nodes, n) if m < self.order]
        while bows and bows[-1] == 0 and math.copysign(1, bows[-1]) < 0:
            bows.pop()
        return tuple(bows)

    def can_grow(self, n, node):
        return n < self.order and self.child[n].take(node) < self.child[n].take(node + 1)

    def extend(self, state, word):
        """(log10 p of the word id, the state after it)"""
        logp, after, _ = self._extend(state, word)
        return logp, after

    def _extend(self, state, word):
        nodes = [word, *self.longer(word, 1, state.words)]
        bows = self.useful(1, nodes)
        logp = float(self.logp[len(nodes)].take(nodes[-1])) + sum(state.bows[len(nodes) - 1:])
        return logp, State((word, *state.words)[:len(bows)], bows), nodes

    def fragment(self, words, bos=False):
        left, full, state, total = [], bos, self.state(bos), 0.0
        for i, word in enumerate(words, 1):
            logp, state, nodes = self._extend(state, word)
            total += logp
            full = full or len(nodes) < i or not self.can_grow(i, nodes[-1])
            if not full:
                left.append(nodes[-1])
                full = len(state.words) < i
        return Fragment(tuple(left), full or len(left) == self.order - 1, state, total)

    def join(self, a, b):
        """The fragment of a's words and then b's."""
        left, full, words, bows = list(a.left), a.full, a.right.words, a.right.bows
        total = a.logp + b.logp
        for i, node in enumerate(b.left, 1):
            nodes = [node, *self.longer(node, i, words)]
            many = len(nodes) - 1                                # of a's words are part of the n-gram now
            total += float(self.logp[i + many].take(nodes[-1])) - float(self.logp[i].take(node)) + sum(bows[many:])
            full = full or many < len(words) or not self.can_grow(i + many, nodes[-1])
            if not full:
                left.append(nodes[-1])
            bows = self.useful(i + 1, nodes[1:])
            full = full or len(bows) < len(a.right.words)
            words = words[:len(bows)]
        if b.full:
            return Fragment(tuple(left), True, b.right, total + sum(bows))
        if len(b.right.words) < len(b.left):
            return Fragment(tuple(left), full, b.right, total)
        return Fragment(tuple(left), full or len(left) == self.order - 1, State(b.right.words + words, b.right.bows + bows), total)


def mapped(data, path="the model"):
    """A model over the bytes of a model file."""
    head = bytes(data[:KN_HEAD.size]).ljust(KN_HEAD.size, b"\0")
    _, version, length, start, size = KN_HEAD.unpack(head)
    if version != KN_VERSION:
        raise UsageError(f"{path} is a model of version {version}, this program reads version {KN_VERSION}; train it anew")
    if size != len(data) or start + length != size:
        raise UsageError(f"{path} has {len(data):,} bytes, not {size:,}: cut short or damaged; copy or train it again")
    try:
        return Model(data, json.loads(bytes(data[start:start + length])))
    except UsageError:                                           # the model is whole, its tokenizer is gone
        raise
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is damaged: its directory cannot be read; copy or train it again") from None


def from_ngrams(ngrams, quant=0):
    """A model in memory, as if saved and opened."""
    file = io.BytesIO()
    write_model(file, ngrams, quant)
    return mapped(file.getbuffer())


def open_model(path):
    """Map a model file; an ARPA file is read into the same form."""
    with open_input(path) as file:
        if file.read(len(KN_MAGIC)) == KN_MAGIC:
            return mapped(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
    return from_ngrams(read_arpa(path))


# ---- ARPA files (how are tables that another program wrote read?) ----

@contextlib.contextmanager
def open_input(path):
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            yield file
    except (OSError, EOFError) as error:                         # EOFError: a .gz that was cut short
        raise UsageError(f"cannot read {path} ({error}); give a model of `kn train` or an ARPA file") from None


class Arpa:
    """The lines of an ARPA file and their numbers."""

    def __init__(self, path, file):
        self.path, self.file, self.at = path, file, 0            # at: lines read so far

    def error(self, line, why):
        return UsageError(f"{self.path}, line {line}: {why}")

    def next(self, wanted):
        """The next line that is not blank, or a comment."""
        for line in self.file:
            self.at += 1
            if (line := line.strip()) and not line.startswith(b"#"):
                return line
        raise self.error(self.at + 1, f"the file ends here, {wanted} was expected; it was cut short, write it again")

    def counts(self):
        if (line := self.next("\\data\\")) != b"\\data\\":
            raise self.error(self.at, f"expected \\data\\, found {line[:40]!r}; give a model of `kn train` or an ARPA")
        counts = []
        while match := re.fullmatch(rb"ngram\s+%d\s*=\s*(\d+)" % (len(counts) + 1), line := self.next("\\1-grams:")):
            counts.append(int(match[1]))
        if not counts or line != b"\\1-grams:":
            raise self.error(self.at, f"expected `ngram {len(counts) + 1}=COUNT` or \\1-grams:, found {line[:40]!r}")
        return counts

    def blocks(self, n, count, last):
        """The n-grams in blocks: (text, begin (lines, n + 2), end) of log10 p, words, back-off, which may be empty."""
        while count:
            lines = list(itertools.islice(self.file, min(count, 1 << 16)))
            text, begin, end = cut(b"".join(lines))
            first = begin.searchsorted(np.flatnonzero(text == 10)[:len(lines) + 1])
            fields = np.diff(first)
            bad = np.flatnonzero((fields != n + 1) & (fields != n + 2))
            if bad.size or len(lines) < min(count, 1 << 16):
                at = int(bad[0]) if bad.size else len(lines)
                found = repr(lines[at].strip()[:60]) if bad.size else "the end of the file"
                raise self.error(self.at + at + 1, f"expected log10 p, {n} words, perhaps a back-off, found {found}; "
                                                   f"\\data\\ announces {count - at:,} more {n}-grams")
            place, short = first[:-1, None] + np.arange(n + 2), fields == n + 1
            place[short, -1] = 0
            begin, end = begin[place], end[place]
            begin[short, -1] = end[short, -1]
            yield text, begin, end
            count -= len(lines)
            self.at += len(lines)
        after = "\\end\\" if last else f"\\{n + 1}-grams:"
        if (line := self.next(after)) != after.encode():
            raise self.error(self.at, f"expected {after} here, by the counts in \\data\\, found {line[:60]!r}")

    def floats(self, text, begin, end, name, least, most):
        """Fields as float32; an empty one is 0, and what is 0 becomes -0.0."""
        size = end - begin
        places = [(np.minimum(begin + i, len(text) - 8), size - i) for i in range(0, 40, 8)]
        fields = np.stack([eight_bytes(text, at, left) for at, left in places], 1).view("S40")[:, 0]
        fields[size == 0] = b"0"
        fields[size > 40] = b"?"
        try:
            if b"_" in fields.tobytes():                         # which Python would skip in a number
                raise ValueError
            values = fields.astype(np.float64)
        except ValueError:                                       # which one?
            number = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
            values = np.array([float(x) if number.fullmatch(x) else np.nan for x in fields.tolist()])
        if (bad := np.flatnonzero(~((least <= values) & (values <= most) & np.isfinite(values)))).size:
            found = text[begin[bad[0]]:end[bad[0]]].tobytes()[:60]
            raise self.error(self.at + 1 + int(bad[0]), f"expected a {name}, found {found!r}")
        return np.where(values == 0, -0.0, values).astype(np.float32)

    def ids(self, vocabulary, text, begin, end):
        """Word ids (n, lines)."""
        ids = vocabulary.find(hashes := hash_words(text, begin.ravel(), end.ravel()))
        unknown = hash_words(*cut(b"<unk> <UNK>"))
        if (lost := np.flatnonzero((ids == UNK) & (hashes != unknown[0]) & (hashes != unknown[1]))).size:
            word = text[begin.flat[lost[0]]:end.flat[lost[0]]].tobytes()[:60]
            line = self.at + 1 + int(lost[0]) // begin.shape[1]
            raise self.error(line, f"the word {word!r} is not among the 1-grams, which must list all words")
        return ids.reshape(begin.shape).T


def number_words(path, names):
    """(words by id, id of each name): <unk>, <s>, </s>, then the others as they come."""
    if len(set(names)) < len(names):
        raise UsageError(f"{path}: the 1-gram {Counter(names).most_common(1)[0][0]!r} is there twice; remove one")
    if not {b"<s>", b"</s>"} <= set(names):
        raise UsageError(f"{path}: the 1-grams <s> and </s> are needed and one is missing")
    special = [b"<unk>", b"<s>", b"</s>"]
    words = special + [name for name in names if name not in special]
    ids = {word: i for i, word in enumerate(words)}
    return words, np.array([ids[name] for name in names], np.uint32)[None]


def read_arpa(path):
    """The tables of an ARPA file, its lines in any order. A shorter n-gram that was pruned although a longer one ends in
    it is put back with its backed-off probability, as KenLM does."""
    with open_input(path) as file:
        arpa, names, levels = Arpa(path, file), [], []
        counts = arpa.counts()
        for n, count in enumerate(counts, 1):
            last, parts = n == len(counts), [(np.zeros((n, 0), np.uint32), *np.zeros((2, 0), np.float32))]
            limits = ("back-off of 0 at the highest order", 0, 0) if last else ("log10 back-off", -np.inf, np.inf)
            for text, begin, end in arpa.blocks(n, count, last):
                logp = arpa.floats(text, begin[:, 0], end[:, 0], "log10 probability, at most 0", -np.inf, 0)
                bow = arpa.floats(text, begin[:, -1], end[:, -1], *limits)
                if n > 1:
                    ids = arpa.ids(vocabulary, text, begin[:, 1:-1], end[:, 1:-1])
                else:
                    block, ids = text.tobytes(), np.zeros((1, len(begin)), np.uint32)
                    names += [block[a:b] for a, b in zip(begin[:, 1].tolist(), end[:, 1].tolist())]
                parts.append((ids, logp, bow))
            ids, logp, bow = (np.concatenate(column, axis=-1) for column in zip(*parts))
            if n == 1:
                words, ids = number_words(path, [b"<unk>" if name == b"<UNK>" else name for name in names])
                vocabulary = Words.build(words)
            levels.append((ids, logp, bow))
    return suffix_order(path, words, levels)


def walk(search, words):
    """The nodes of n-grams whose words come in columns, -1 where one is missing."""
    which, node = np.arange(words.shape[1]), words[-1].astype(np.int64)
    for n in range(2, len(words) + 1):
        on, node = search[n].find(node, words[-n].take(which))
        which = which.take(on)
    nodes = np.full(words.shape[1], -1, np.int64)
    nodes[which] = node
    return nodes


def spell(words, ids):
    return repr(b" ".join(words[i] for i in ids).decode("utf-8", "replace"))


def suffix_order(path, words, levels):
    """The tables of n-grams in any order; levels[n - 1] = (word ids of shape (n, count), logp, bow)."""
    (ids,), logp, bow = levels[0]
    tables, search = NGrams(words), [None, None]
    tables.logp.append(np.full(len(words), -100, np.float32))    # KenLM's <unk> where none is listed
    tables.bow.append(np.full(len(words), -0.0, np.float32))
    tables.logp[1][ids], tables.bow[1][ids] = logp, bow
    for n, (ids, logp, bow) in enumerate(levels[1:], 2):
        if (ids[1:] == BOS).any():
            raise UsageError(f"{path}: a {n}-gram has <s> after another word, where no sentence begins; remove it")
        parent, context = walk(search, ids[1:]), walk(search, ids[:-1])
        if (lost := parent < 0).any():                           # put the suffixes back below, and begin again
            add, shorter = np.unique(ids[1:, lost], axis=1), levels[n - 2]
            blank = add, np.full(add.shape[1], np.nan, np.float32), np.full(add.shape[1], -0.0, np.float32)
            levels[n - 2] = tuple(np.concatenate(pair, axis=-1) for pair in zip(shorter, blank))
            return suffix_order(path, words, levels)
        if (lost := context < 0).any():
            gram, spell = ids[:, np.argmax(lost)], lambda ids: b" ".join(words[i] for i in ids)
            raise UsageError(f"{path}: {n}-gram {spell(gram)!r} is there, its context {spell(gram[:-1])!r} is missing")
        order = np.argsort(key := parent << 32 | ids[0], kind="stable")
        if (twice := np.flatnonzero(np.diff(key[order]) == 0)).size:
            gram = b" ".join(words[i] for i in ids[:, order[twice[0]]])
            raise UsageError(f"{path}: the {n}-gram {gram!r} is there twice; remove one")
        parent, context, left, logp = parent[order], context[order], ids[0, order], logp[order]
        lower, weight = tables.logp[n - 1], tables.bow[n - 1]
        weight[context[weight[context] == 0]] = 0.0              # not -0.0: something goes on from here
        blank = np.isnan(logp)
        logp[blank] = weight[context[blank]] + lower[parent[blank]]
        child = np.append(0, np.cumsum(np.bincount(parent, minlength=len(lower)))).astype(np.uint32)
        for table, values in zip((tables.logp, tables.bow, tables.left, tables.child), (logp, bow[order], left, child)):
            table.append(values)
        if n < len(levels):
            search.append(Probing(child, left, np.concatenate(list(Probing.blocks(child, left)))))
    tables.bow.pop()                                             # of the highest order: zeros
    for n in range(len(levels) - 1, 1, -1):                      # where a back-off matters its suffix must be remembered, too
        lower, live = tables.bow[n - 1], (tables.bow[n] != 0) | ~np.signbit(tables.bow[n])
        parent = np.repeat(np.arange(len(lower)), np.diff(tables.child[n - 1]))[live]
        lower[parent[lower[parent] == 0]] = 0.0
    return tables


# ---- Queries (what do a text and its documents cost?) ----

def document_scores(model, texts, batch=1024):
    """(sum of log10 p, words with </s>, unknown words) of each text, three arrays. A line with words is a sentence."""
    texts, parts = iter(texts), [np.zeros((3, 0))]
    while some := list(itertools.islice(texts, batch)):
        raw = [text.encode("utf-8", "surrogatepass") for text in some]
        ids, starts = model.ids(model.spaced(b"\n".join(raw)))
        size = np.diff(starts, append=len(ids))
        document = np.repeat(np.arange(len(raw)), [text.count(b"\n") + 1 for text in raw])      # of each line
        ids, size, document = ids[np.repeat(size > 1, size)], size[size > 1], document[size > 1]
        logp, _ = model.score(ids, np.cumsum(size) - size)
        document = np.repeat(document, size)
        parts.append([np.bincount(document, weights, len(raw)) for weights in (logp, None, ids == UNK)])
    logp, tokens, unknown = np.hstack(parts)
    return logp, tokens.astype(np.int64), unknown.astype(np.int64)


def line_blocks(path, report):
    """The text of a file or of stdin (-) in blocks of lines, or documents of a .jsonl, without the last line end."""
    tok_lib.input_files([path])                                  # says what is wrong with the path
    if ".jsonl" in str(path):
        yield from (document["text"].encode("utf-8", "surrogatepass") for document in tok_lib.documents([path], report))
    else:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open_input(path) as file:
            while block := file.read(1 << 20):
                yield (block + file.readline()).removesuffix(b"\n")


def query(path, source="-", summary=False, out=None):
    """A line for each word: word, log10 p, length of the n-gram found, 1 if unknown, tab-separated; then the totals."""
    model, out = open_model(path), out or sys.stdout.buffer
    total = np.zeros(4)                                          # log10 p, of unknown words, unknown words, words
    for block in map(model.spaced, line_blocks(source, Counter())):
        ids, starts = model.ids(block)
        logp, length = model.score(ids, starts)
        unknown = ids == UNK
        total += logp.sum(dtype=np.float64), logp[unknown].sum(dtype=np.float64), unknown.sum(), len(ids)
        if not summary:
            words = itertools.chain.from_iterable([*space_words(line), b"</s>"] for line in block.split(b"\n"))
            rows = zip(words, logp.tolist(), length.tolist(), unknown.tolist())
            out.write(b"".join(map(b"%s\t%.6f\t%d\t%d\n".__mod__, rows)))
    logp, lost, unknown, tokens = total.tolist()
    perplexity = lambda logp, tokens: 10 ** (-logp / tokens) if tokens else math.nan
    out.write(f"Total log10 p:\t{logp:.6f}\nPerplexity including OOVs:\t{perplexity(logp, tokens):.6f}\n"
              f"Perplexity excluding OOVs:\t{perplexity(logp - lost, tokens - unknown):.6f}\n"
              f"OOVs:\t{unknown:.0f}\nTokens:\t{tokens:.0f}\n".encode())
    out.flush()


# ---- Quality rules (does this document look like text that people wrote for people?) ----
# A rule is a row: what is measured, and the interval where it must lie. The numbers are those of the papers. They count
# words, and Chinese marks none: a Han character with the punctuation after it is half a word here, so counts are halved
# and n-grams are twice as long.

HAN_RANGES = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
HAN, HAN_WORDS = re.compile(f"[{HAN_RANGES}]"), re.compile(rf"[{HAN_RANGES}][^\s\w]*|[^\s{HAN_RANGES}]+")
WORDS = {"latin": str.split, "han": HAN_WORDS.findall}           # how each script is cut
PER_WORD = {"latin": 1, "han": 2}                                # pieces of that cut in a word
STOP_WORDS = {"latin": {"the", "be", "to", "of", "and", "that", "have", "with"}, "han": set("的是了在和有")}
BULLETS = {"latin": ("•", "-"), "han": ("•", "-", "·", "●", "◆", "■")}
LINE_STOPS = {"latin": (".", "?", "!", '"', "'"), "han": tuple('.?!"。！？…”」』')}
POLICIES = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
            "use cookies", "使用条款", "服务条款", "隐私政策", "隐私条款")
CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
SENTENCE_END = re.compile(r"""[.!?]+["')\]]*(?=\s|$)|[。！？…]+[”’」』）]*""")


def misread_utf8():
    """Matches UTF-8 that was read as Latin-1 or Windows-1252, é as Ã©: its byte patterns, spelt in those letters."""
    two, three, four, rest = (re.escape("".join({bytes([byte]).decode(code, "ignore") for byte in range(low, high)
                                                 for code in ("latin-1", "cp1252")}))
                              for low, high in ((0xc2, 0xe0), (0xe0, 0xf0), (0xf0, 0xf5), (0x80, 0xc0)))
    return re.compile(f"[{two}][{rest}]|[{three}][{rest}]{{2}}|[{four}][{rest}]{{3}}|\ufffd")


MISREAD = misread_utf8()


def script_of(text):
    """"han" where Han characters outnumber the words between spaces, else "latin": any script that spaces its words."""
    return "han" if not text.isascii() and len(HAN.findall(text)) > len(text.split()) else "latin"


def ratio(part, whole):
    return part / whole if whole else 0.0


def repeats(parts):
    """(share of the parts that occurred before, characters in them)."""
    seen, number, size = set(), 0, 0
    for part in parts:
        if part in seen:
            number, size = number + 1, size + len(part)
        seen.add(part)
    return ratio(number, len(parts)), size


def ngram_repeats(words, top_n, dup_n, gap):
    """{n: characters}: for n in top_n those of the most frequent n-gram, with `gap` spaces between its words; for n in
    dup_n those of the n-grams that occurred before, met one after the other so that none of them overlap.

    An n-gram can repeat only where its first n-1 words do, so each round looks where the last one found repeats."""
    ids, found = {}, dict.fromkeys((*top_n, *dup_n), 0)
    word = [ids.setdefault(w, len(ids)) for w in words]
    end = [0, *itertools.accumulate(map(len, words))]
    places, names = range(len(word)), word                       # of the (n-1)-grams that occur more than once
    for n in range(2, max(found) + 1):
        if places and places[-1] + n > len(word):
            places, names = places[:-1], names[:-1]
        grams = [name * len(ids) + word[place + n - 1] for name, place in zip(names, places)]
        count = Counter(grams)
        if len(count) == len(grams):
            break
        if n in top_n:
            best = max(count, key=count.get)                     # the first of equally frequent ones
            place = places[grams.index(best)]
            found[n] = count[best] * (end[place + n] - end[place] + (n - 1) * gap)
        kept = [(place, gram) for place, gram in zip(places, grams) if count[gram] > 1]
        seen, free = set(), 0                                    # free: the first word after the last repeat
        for place, gram in kept if n in dup_n else ():
            if place >= free and gram in seen:
                found[n], free = found[n] + end[place + n] - end[place], place + n
            elif place >= free:
                seen.add(gram)
        number = {}                                              # short names for the next round
        places, names = [place for place, _ in kept], [number.setdefault(gram, len(number)) for _, gram in kept]
    return found


class Anatomy:
    """A document taken apart once for all rules."""

    def __init__(self, text):
        self.text, self.script = text, script_of(text)
        self.per_word = PER_WORD[self.script]
        self.lines = [line.rstrip() for line in text.split("\n") if line.strip()]
        self.words = WORDS[self.script](text)
        self.n_words = len(self.words) / self.per_word

    def lines_that(self, test):
        return ratio(sum(1 for line in self.lines if test(line)), len(self.lines))

    @cached_property
    def named(self):
        """Lengths of the words that are not all punctuation."""
        return [len(w) for w in self.words if w.isalpha() or any(map(str.isalnum, w))]

    @cached_property
    def paragraph_repeats(self):
        return repeats([p for p in re.split(r"\n\s*\n", self.text.strip()) if p])

    @cached_property
    def line_repeats(self):
        return repeats(self.lines)

    @cached_property
    def ngrams(self):
        """{n: share of the text's characters}, n in words."""
        k = self.per_word
        found = ngram_repeats(self.words, [k * n for n in (2, 3, 4)], [k * n for n in range(5, 11)], k == 1)
        return {n // k: ratio(size, len(self.text)) for n, size in found.items()}

    @cached_property
    def misread(self):
        return 0.0 if self.text.isascii() else ratio(sum(map(len, MISREAD.findall(self.text))), len(self.text))

    @cached_property
    def c4_lines(self):
        """The lines that C4 keeps, without the citation marks of Wikipedia."""              # [C4 sec 2.2]
        lines = (CITATION.sub("", line).strip() for line in self.lines)
        return [line for line in lines if line.endswith(LINE_STOPS[self.script]) and not line.endswith("...")
                and len(words := WORDS[self.script](line)) >= 5 * self.per_word and max(map(len, words)) <= 1000
                and not any(map(line.lower().__contains__, POLICIES))]


Rule = namedtuple("Rule", "what measure low high script", defaults=("",))          # script: "" for any
REPETITION = [                                                   # [Gopher table A1]
    Rule("repeated lines", lambda d: d.line_repeats[0], 0, 0.3),
    Rule("repeated paragraphs", lambda d: d.paragraph_repeats[0], 0, 0.3),
    Rule("characters in repeated lines", lambda d: ratio(d.line_repeats[1], len(d.text)), 0, 0.2),
    Rule("characters in repeated paragraphs", lambda d: ratio(d.paragraph_repeats[1], len(d.text)), 0, 0.2),
    *(Rule(f"characters in the top {n}-gram", lambda d, n=n: d.ngrams[n], 0, most)
      for n, most in {2: 0.2, 3: 0.18, 4: 0.16}.items()),
    *(Rule(f"characters in repeated {n}-grams", lambda d, n=n: d.ngrams[n], 0, (20 - n) / 100) for n in range(5, 11)),
]
RULES = {                # flag --rules
    "gopher": [                                                  # [Gopher sec A.1]
        Rule("words", lambda d: len(d.named) / d.per_word, 50, 100_000),
        Rule("mean word length", lambda d: ratio(sum(d.named), len(d.named)), 3, 10, "latin"),
        Rule("# per word", lambda d: ratio(d.text.count("#"), d.n_words), 0, 0.1),
        Rule("ellipses per word", lambda d: ratio(d.text.count("...") + d.text.count("…"), d.n_words), 0, 0.1),
        Rule("lines with a bullet", lambda d: d.lines_that(lambda l: l.lstrip().startswith(BULLETS[d.script])), 0, 0.9),
        Rule("lines ending in an ellipsis", lambda d: d.lines_that(lambda l: l.endswith(("...", "…"))), 0, 0.3),
        Rule("words with a letter", lambda d: ratio(sum(any(map(str.isalpha, w)) for w in d.words), len(d.words)),
             0.8, 1),
        Rule("stop words", lambda d: len(STOP_WORDS["latin"].intersection(d.words)), 2, 8, "latin"),
        Rule("stop characters", lambda d: sum(char in d.text for char in STOP_WORDS["han"]), 2, 6, "han"),
        *REPETITION,
    ],
    "repetition": REPETITION,                                    # the half of gopher that also fits code and tables
    "c4": [                                                      # [C4 sec 2.2], and what is kept loses lines
        Rule("sentences", lambda d: sum(max(1, len(SENTENCE_END.findall(line))) for line in d.c4_lines), 3, math.inf),
        Rule("curly brackets", lambda d: d.text.count("{"), 0, 0),
        Rule("lorem ipsum", lambda d: d.text.lower().count("lorem ipsum"), 0, 0),
    ],
    "fineweb": [                                                 # [FineWeb sec 3.6], the last from its released code
        Rule("lines ending in punctuation", lambda d: d.lines_that(lambda l: STOP.match(l[-1])), 0.12, 1, "latin"),
        Rule("lines ending in punctuation", lambda d: d.lines_that(lambda l: l.endswith(LINE_STOPS["han"])), 0.12, 1,
             "han"),
        Rule("short lines", lambda d: d.lines_that(lambda l: len(l) < 30 / d.per_word), 0, 0.67),
        Rule("characters in repeated lines", lambda d: ratio(d.line_repeats[1], sum(map(len, d.lines))), 0, 0.1),
        Rule("line breaks per word", lambda d: ratio(d.text.count("\n"), d.n_words), 0, 0.3),
    ],
    "script": [                                                  # ours: text read in a wrong encoding
        Rule("misread characters", lambda d: d.misread, 0, 0.01),
    ],
}


def failures(text, rules):
    """{"gopher: stop words": "1 < 2", ...}: every rule that a text breaks."""
    doc, broken, done = Anatomy(text), {}, set()
    for name, rule in ((name, rule) for name in rules for rule in RULES[name]):
        if rule.script in ("", doc.script) and rule not in done:
            value = rule.measure(doc)
            done.add(rule)
            if not rule.low <= value <= rule.high:
                bound = f"< {rule.low:g}" if value < rule.low else f"> {rule.high:g}"
                broken[f"{name}: {rule.what}"] = f"{value:.4g} {bound}"
    return broken


# ---- Perplexity filter (how surprised is a model that has read only good text?) ----
# Pass 1 (score) is a pure function of each document, so many processes may share it. The cuts are computed once, from
# all scores, or read from a file, so that every shard of a corpus is cut alike. Pass 2 (judge) applies them.

def group_of(document, by):
    """What a document is compared with: "all", or its field `by` (a path such as meta.lang), or the language of its
    script where it has no such field."""
    if not by:
        return "all"
    value = reduce(lambda inside, key: inside.get(key) if isinstance(inside, dict) else None, by.split("."), document)
    return {"han": "zh", "latin": "en"}[script_of(document["text"])] if value is None else str(value)


def score(documents, models, by="", rules=()):
    """Pass 1: every document with its perplexity `ppl` and, for pass 2, `_filter`: group, tokens, the rules it breaks.

    ppl = 10^(-sum log10 p / tokens), lines are sentences and each </s> is a token; None without tokens or a model.
    models: {group: model}, "*" for all other groups. A text is scored as it came: cuts do not depend on --rules."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, 256)):                                   # [CCNet]
        members = {}
        for document in batch:
            state = dict(group=group_of(document, by), tokens=0, unknown=0,
                         broken=failures(document["text"], rules) if rules else {})
            members.setdefault(state["group"], []).append(document)
            document.update(ppl=None, _filter=state)
        for group, inside in members.items():
            if model := models.get(group, models.get("*")):
                scores = document_scores(model, [document["text"] for document in inside])
                for document, log10_prob, tokens, unknown in zip(inside, *(values.tolist() for values in scores)):
                    document["_filter"].update(tokens=tokens, unknown=unknown)
                    if tokens and log10_prob == log10_prob:
                        document["ppl"] = float(f"{10 ** min(-log10_prob / tokens, 300):.7g}")
        yield from batch


def thresholds(scores, keep_quantile=(), ppl_range=()):
    """{group: [low, high]}, the perplexities that are kept, from {group: perplexities}; a range holds for all, "*"."""
    low, high = ppl_range or keep_quantile
    if not 0 <= low < high <= (math.inf if ppl_range else 1):
        name, good = ("ppl_range", "perplexities, as 20 800") if ppl_range else ("keep_quantile", "shares, as .05 .6")
        raise UsageError(f"--{name} {low:g} {high:g} is no interval; give two growing {good}")
    known = {group: [ppl for ppl in values if ppl is not None] for group, values in sorted(scores.items())}
    return {"*": [low, high]} if ppl_range else {
        group: np.quantile(values, [low, high]).tolist() for group, values in known.items() if values}


def made_by(model):
    """What must agree for perplexities to be comparable."""
    return f"{model.counts[1]:,} words ({model.unit}, {model.norm}), {sum(model.counts[1:]):,} n-grams"


def save_thresholds(path, cuts, models):
    known = {"format": 1, "models": {group: made_by(model) for group, model in models.items()}, "thresholds": cuts}
    with atomic_write(path, "w") as file:
        json.dump(known, file, indent=1)


def load_thresholds(path, models):
    """The cuts of an earlier run; refused if they are of another model."""
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        cuts = {group: [float(low), float(high)] for group, (low, high) in known["thresholds"].items()}
        if known["format"] != 1 or not cuts or not all(0 <= low <= high for low, high in cuts.values()):
            raise ValueError("another format, or no cuts that are intervals")
        makers = [(group, known["models"][group], made_by(model)) for group, model in models.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"--thresholds={path} cannot be used ({error!r}); delete it to compute it anew") from None
    for group, then, now in makers:
        if then != now:
            raise UsageError(f"--thresholds={path} belongs to another model of {group!r}: {then}, --kn gives {now}; "
                             f"give the first one, or delete the file to compute it anew")
    return cuts


def cut_of(cuts, group):
    """[low, high] of a group; an entry "*" holds for all groups without their own."""
    if group not in cuts and "*" not in cuts:
        raise UsageError(f"the thresholds are of {', '.join(sorted(cuts)) or 'no group'}, not of {group!r}; compute "
                         f"them on a sample with all groups, or give the file an entry \"*\" for the others")
    return cuts[group if group in cuts else "*"]


def reasons(document, cuts):
    """{what: how} a scored document is dropped for, empty if it is kept. Scores on a bound are kept, so are ties."""
    ppl, state = document["ppl"], document["_filter"]
    if not cuts:
        return state["broken"]
    if ppl is None:
        return state["broken"] | {"ppl": f"unknown (no tokens, or no model of {state['group']})"}
    low, high = cut_of(cuts, state["group"])
    bound = f"< {low:.1f}" if ppl < low else f"> {high:.1f}"
    return state["broken"] | ({} if low <= ppl <= high else {"ppl": f"{ppl:.1f} {bound} ({state['group']})"})


def judge(documents, report, cuts=(), rules=(), score_only=False, dropped=False, examples=5):
    """Pass 2: the lines of kept.jsonl, or those of --dropped, from scored documents. With score_only all are kept, and
    say why they would not have been. Counts into `report`, see summary()."""
    nearest = {}
    for document in documents:
        why = reasons(document, cuts)
        tally(report, nearest, document, why, cuts, examples)
        del document["_filter"]
        if why:
            document["reason"] = "; ".join(f"{what} {how}" for what, how in why.items())
        else:
            document.pop("reason", None)                         # of an earlier filter
        if not why and "c4" in rules and not score_only:         # C4 is also an edit: a page loses the lines that fail
            document["text"] = "\n".join(Anatomy(document["text"]).c4_lines)
        if dropped == bool(why and not score_only):
            yield line_of(document)
    report.update(json.dumps([*key, entry]) for key, near in nearest.items() for entry in near)


# ---- Filter report (what did it do, and was that right?) ----

BINS = 10                # of the histogram, per factor of ten
COLUMNS = {              # of the tables of a report; alone: documents that no other rule would have dropped
    "documents": ("documents", "tokens", "unknown", "characters"),
    "dropped for": ("documents", "tokens", "alone"),
}


def tally(report, nearest, document, why, cuts, examples):
    """Counts one judged document. Keys are JSON lists (group, table, row, column): reports lie in files and are added.
    nearest: {(group, "examples", place): the documents on that side of that cut that lie nearest to it}."""
    ppl, state, fate = document["ppl"], document["_filter"], "dropped" if why else "kept"
    rows = {("documents", fate): (1, state["tokens"], state["unknown"], len(document["text"]))}
    for what, how in why.items():
        side = re.sub("[^<>]", "", how)[:1] or "unknown"
        rows["dropped for", f"{what} {side}"] = (1, state["tokens"], len(why) == 1)
    cells = {(table, row, column): value for (table, row), values in rows.items()
             for column, value in zip(COLUMNS[table], values)}
    if ppl:
        cells["perplexity", math.floor(BINS * math.log10(ppl)), fate] = 1
    report.update({json.dumps([state["group"], *cell]): value for cell, value in cells.items()})
    for name, cut in zip(("low", "high"), cut_of(cuts, state["group"]) if cuts and ppl else ()):
        side = "below" if ppl < cut or ppl == cut and name == "high" else "above"
        far = abs(math.log(ppl) - math.log(min(max(cut, 1e-300), 1e300)))
        near = nearest.setdefault((state["group"], "examples", f"{side} the {name} cut"), [])
        near.append([far, ppl, str(document.get("id", "")), " ".join(document["text"][:400].split())[:200]])
        near.sort()
        del near[examples:]


def summary(report, cuts=(), examples=5):
    """The counts of a report as {group: {table: {row: {column: number}}}}, with the cuts and examples of each group."""
    groups = {}
    for key in sorted(key for key in report if key.startswith("[")):
        group, table, row, column = json.loads(key)
        blank = {"cuts": [], "documents": {}, "dropped for": {}, "perplexity": {}, "examples": {}}
        rows = groups.setdefault(group, blank)[table]
        if table == "examples":
            rows.setdefault(row, []).append(column)
        else:
            rows.setdefault(row, {})[column] = report[key]
    for name, tables in groups.items():
        tables["cuts"] = list(cut_of(cuts, name)) if cuts and tables["perplexity"] else []
        by_size = lambda row: (-row[1]["documents"], row[0])
        tables["dropped for"] = dict(sorted(tables["dropped for"].items(), key=by_size))
        tables["perplexity"] = dict(sorted(tables["perplexity"].items()))
        tables["examples"] = {place: sorted(near)[:examples] for place, near in tables["examples"].items()}
    return groups


def report_text(groups):
    """A summary for the terminal."""
    lines = []
    for name, tables in groups.items():
        low_high = " to ".join(f"{cut:.1f}" for cut in tables["cuts"])
        lines.append(f"{name}: perplexity {low_high} is kept" if low_high else name)
        for table, columns in COLUMNS.items():
            lines.append(f"  {table:48s}" + "".join(f"{column:>14s}" for column in columns))
            lines += [f"    {row:46s}" + "".join(f"{cells[column]:14,d}" for column in columns)
                      for row, cells in tables[table].items()]
        most = max((sum(fates.values()) for fates in tables["perplexity"].values()), default=1)
        for bin, fates in tables["perplexity"].items():
            kept, dropped = (round(60 * fates.get(fate, 0) / most) for fate in ("kept", "dropped"))
            lines.append(f"  {10 ** (bin / BINS):12,.1f} {sum(fates.values()):9,d} {'#' * kept}{'-' * dropped}")
        for place, near in tables["examples"].items():
            lines += [f"  {place}", *(f"    {ppl:10,.1f}  {id}  {start[:80]}" for _, ppl, id, start in near)]
    return "\n".join(lines) + "\n"


def svg_histogram(bins, cuts, width=860, height=220):
    """Documents kept and dropped over the logarithm of their perplexity; the cuts are dashed lines."""
    first, last, floor = min(bins), max(bins) + 1, height - 30
    most, step = max(sum(fates.values()) for fates in bins.values()), (width - 60) / (last - first)
    marks = [f'<svg viewBox="0 0 {width} {height}" width="{width}"><text x="2" y="25">{most:,}</text>']
    for bin, fates in bins.items():
        base, x = floor, 40 + step * (bin - first)
        for fate, number in sorted(fates.items(), reverse=True):                             # kept below dropped
            tall = (floor - 20) * number / most
            base -= tall
            marks.append(f'<rect class="{fate}" x="{x:.1f}" y="{base:.1f}" width="{step:.1f}" height="{tall:.1f}"/>')
    powers = range(first // BINS, last // BINS + 1)
    ticks = [(digit * 10.0 ** power, height - 10, "") for power in powers for digit in (1, 3)]
    for value, y, line in ticks + [(cut, 11, f"V{floor}") for cut in cuts if 0 < cut < math.inf]:
        x = 40 + step * (BINS * math.log10(value) - first)
        if 40 <= x <= width - 20:
            marks.append(f'<text x="{x:.1f}" y="{y}">{value:,.4g}</text><path d="M{x:.1f} 14{line}"/>')
    return "".join(marks) + "</svg>"


PAGE_STYLE = """body{font:15px/1.5 sans-serif;max-width:900px;margin:2em auto;color:#222}
td,th{padding:.1em .8em;text-align:right} td:first-child,th:first-child{text-align:left} svg text{font-size:11px}
.kept{fill:#3a7d5c} .dropped{fill:#c9743f} path{stroke:#222;stroke-dasharray:5 3}
pre{white-space:pre-wrap;background:#f4f3ef;padding:.5em}"""


def report_html(groups):
    """A summary as one page that needs nothing else: no scripts, no other files, every text escaped."""
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    page = [f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>filter report</title><style>{PAGE_STYLE}</style>']
    for name, tables in groups.items():
        page.append(f"<h1>{html.escape(name)}</h1>")
        page.append(svg_histogram(tables["perplexity"], tables["cuts"]) if tables["perplexity"] else "")
        for table, columns in COLUMNS.items():
            page += ["<table>", row((table, *columns), "th")]
            page += [row((what, *(f"{cells[column]:,}" for column in columns)), "td")
                     for what, cells in tables[table].items()]
            page.append("</table>")
        for place, near in tables["examples"].items():
            page.append(f"<h2>{html.escape(place)}</h2>")
            page += [f"<pre>{html.escape(f'{ppl:,.1f}  {id}  {start}')}</pre>" for _, ppl, id, start in near]
    return "\n".join(page) + "</html>\n"


# ---- Units (what is one step of a text, in any language?) ----

UNSPACED = r"[\p{Ideographic}\p{Hiragana}\p{Katakana}ーｰ\p{Line_Break=SA}]"      # SA: Thai, Lao, Khmer, Burmese ...
RADIX = 0x9E3779B97F4A7C15                      # odd, and 5 modulo 8: 2^62 different powers modulo 2^64


def mix(x):
    """Every bit of a uint64 spread over all others; a bijection."""                                     #
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


@functools.cache
def unit_tables():
    """Of every code point its kind (0 lies between units, 1 is part of a word, 2 is a unit by itself, 3 is a mark and
    goes with what is before it) and a random uint64: the same for both cases of a letter, 0 between units.

    Korean has spaces between words, so Hangul is of kind 1; Han, kana and the scripts of South East Asia are of 2."""
    every = "".join(map(chr, range(0x110000)))
    kind, code = np.zeros(len(every), np.uint8), np.arange(len(every), dtype=np.uint64)
    for number, pattern in enumerate((r"\w+", UNSPACED + "+", r"\p{M}+"), 1):
        for run in regex.finditer(pattern, every):
            kind[run.start():run.end()] = number
    for c in regex.findall(r"\p{Changes_When_Casefolded}", every):
        if len(c.casefold()) == 1:              # else places in the text would move
            code[ord(c)] = ord(c.casefold())
    return kind, np.where(kind > 0, mix(code + 1), 0)


@functools.cache
def powers(size):
    """RADIX^i and its inverse modulo 2^64 for i = 1 .. size."""
    return [np.cumprod(np.full(size, r, np.uint64)) for r in (RADIX, pow(RADIX, -1, 2**64))]


def units(texts):
    """Words, or characters where a script has no spaces: the hash of each, the place in its text where it begins, and
    how many each text has. Case, and what lies between units, do not count.

    There is no loop over words: with a random number v for each character, a unit's hash is sum v_i RADIX^(i - start)
    modulo 2^64, a difference of two running sums, since what lies between units adds 0. About 60 bytes a character."""
    kind, value = unit_tables()
    code = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
    now, (up, down) = kind[code], powers(1 << len(code).bit_length())
    before = np.concatenate((now[:1] * 0, now[:-1]))
    start = np.flatnonzero((now == 2) | (now > 0) & (before == 0) | (now == 1) & (before == 2))
    sums = np.concatenate((up[:1] * 0, np.cumsum(value[code] * up[:len(code)])))
    hashes = mix(np.diff(sums[np.append(start, len(code))]) * down[start])
    length = np.array([len(text) + 1 for text in texts])
    ends = np.cumsum(length)
    count = np.diff(np.searchsorted(start, ends), prepend=0)
    return hashes, start - np.repeat(ends - length, count), count


def ngrams(hashes, n):
    """Hash of every n neighbours, g_n[i] = sum_k h[i + k] RADIX^(n-1-k), built along the binary digits of n: one
    multiply-add doubles a length, g_2m[i] = g_m[i] RADIX^m + g_m[i + m], another adds one."""
    g, m = hashes, 1
    for digit in bin(n)[3:]:
        g, m = g[:-m] * np.uint64(pow(RADIX, m, 2**64)) + g[m:], 2 * m
        if digit == "1":
            g, m = g[:-1] * np.uint64(RADIX) + hashes[m:], m + 1
    return mix(g)


def unbroken(count, n):
    """Which n-grams of texts in a row lie in one text: those whose last unit is not one of a text's first n - 1."""
    ends = np.cumsum(count, dtype=np.int64)
    good = np.ones(ends[-1] + n - 1, bool)
    good[((ends - count)[:, None] + np.arange(n - 1)).ravel()] = False
    return good[n - 1:ends[-1]]


def digest(text):
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shingles(texts, n):
    """The n-grams of each text as uint32 hashes, repeats and all, and how many each text has.           [Broder]

    A text of fewer than n units is filled up with zeros and has one shingle; one without any unit (rules, emoji) is a
    unit itself."""
    hashes, _, count = units(texts)
    room = np.maximum(count, n)
    begin = np.cumsum(room) - room
    filled = np.zeros(room.sum(), np.uint64)
    filled[np.arange(len(hashes)) + np.repeat(begin - np.cumsum(count) + count, count)] = hashes
    for i in np.flatnonzero(count == 0):
        filled[begin[i]] = int.from_bytes(digest(texts[i])[:8], "little")
    return (ngrams(filled, n)[unbroken(room, n)] >> 32).astype(np.uint32), room - n + 1


# ---- Deduplication (what was here before?) ----
# Pass 1 writes records of each part of the documents, pass 2 decides on all of them, pass 3 reads each part again and
# drops or cuts. A document is known by its number in the order of files and lines, and its record depends on itself
# alone: neither the parts nor the batches change what is kept.

def records(documents, cfg):
    """Pass 1 over a part: for each batch four columns, their length in bytes before each."""
    for batch in batches(documents):
        count, key, item = DEDUP[cfg.method][0]([document["text"] for document in batch], cfg)
        names = "".join(json.dumps(document.get("id")) + "\n" for document in batch).encode()
        for column in (count.astype(np.uint32).tobytes(), key.tobytes(), item.tobytes(), names):
            yield len(column).to_bytes(8, "little") + column


class Spool:
    """The records of all parts, a file a column, mapped: what is not looked at takes no memory.

    count: items of each document. key: uint64 columns, a row a document. item: shingles or units, one document after
    the other, those of d at begin[d]:begin[d + 1]. first: the number of each part's first document, then of all."""

    def __init__(self, folder, parts, item):
        self.path, self.first = Path(folder), [0]
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(self.path / name, "wb")) for name in ("count", "key", "item", "names")]
            for part in parts:
                with open(part, "rb") as source:
                    for file in itertools.cycle(files):
                        if not (size := source.read(8)):
                            break
                        file.write(source.read(int.from_bytes(size, "little")))
                self.first.append(files[0].tell() // 4)
        self.count = np.fromfile(self.path / "count", np.uint32)
        self.key = self._map("key", np.uint64).reshape(max(1, len(self.count)), -1)[:len(self.count)]
        self.item, self.begin = self._map("item", item), np.append(0, np.cumsum(self.count, dtype=np.int64))

    def _map(self, name, dtype):
        path = self.path / name
        return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)

    def items(self, document):
        return self.item[self.begin[document]:self.begin[document + 1]]


def run_starts(*columns):
    """Where a new value begins in sorted columns."""
    return np.append(True, np.any([c[1:] != c[:-1] for c in columns], axis=0))[:len(columns[0])]


def first_of_run(starts):
    """Of each place in sorted columns the place where its run begins."""
    return np.flatnonzero(starts)[np.cumsum(starts) - 1]


def exact_record(texts, cfg):
    """128 bits of each text as it is: one blank more is another text."""
    key = np.frombuffer(b"".join(map(digest, texts)), np.uint64)
    return np.zeros(len(texts)), key, key[:0]


def exact_twins(spool, cfg, report):
    """Twins (dropped, kept, 1.0): each document whose text an earlier one has, and the first that has it."""
    keys = spool.key.T
    order = np.lexsort(keys)                                # stable: equal texts stay in order
    starts = run_starts(*(key[order] for key in keys))
    dropped, kept = order[~starts], order[first_of_run(starts)][~starts]
    return sorted(zip(dropped.tolist(), kept.tolist(), itertools.repeat(1.0))), None


def signatures(shingle, count, permutations):
    """(permutations, texts) minima of shingle * odd + shift modulo 2^32: that two texts agree in one has the
    probability of their Jaccard index, what they share of the shingles of both.                         [Broder]"""
    start, work = np.cumsum(count) - count, np.empty_like(shingle)
    minima = np.empty((permutations, len(count)), np.uint32)
    seeds = (mix(np.arange(1, 2 * permutations + 1, dtype=np.uint64)) >> 32).astype(np.uint32)
    for row, odd, shift in zip(minima, seeds[::2] | 1, seeds[1::2]):
        np.multiply(shingle, odd, out=work)
        np.add(work, shift, out=work)
        np.minimum.reduceat(work, start, out=row)
    return minima


def minhash_record(texts, cfg):
    """A hash of each band of a text's signature, and its shingles: 8 bytes a band and 4 bytes a unit."""
    shingle, count = shingles(texts, cfg.ngram)
    minima = signatures(shingle, count, cfg.bands * cfg.rows).reshape(cfg.bands, cfg.rows, len(texts))
    odd = mix(np.arange(1, cfg.rows + 1, dtype=np.uint64)) | 1
    return count, mix((minima * odd[:, None]).sum(1, dtype=np.uint64)).T, shingle


def buckets(spool):
    """Entries document * 2^32 + bucket, in order, of all documents that share the hash of a band with another; and how
    many buckets. Two documents meet in one with the probability 1 - (1 - J^rows)^bands."""
    entries, total = [np.zeros(0, np.uint64)], 0
    for key in spool.key.T:
        order = np.argsort(key, kind="stable")
        starts = run_starts(key[order])
        shared = ~(starts & np.append(starts[1:], True)[:len(starts)])
        entries.append((order[shared] << 32 | total + np.cumsum(starts[shared]) - 1).astype(np.uint64))
        total += int(starts[shared].sum())
    entries = np.concatenate(entries)
    entries.sort()
    return entries, total


def minhash_twins(spool, cfg, report, depth=1000, tries=100):
    """Twins (dropped, kept, Jaccard): in order, a document is dropped if an earlier one that was kept has at least
    min_jaccard of both their shingles in common, counted and not estimated.

    Following chains (a ~ b ~ c, so c goes for a) would drop documents unlike all that are kept. So, each dropped one
    has a twin that stays, and no two that stay are twins whom the bands brought together. Of a bucket the `depth`
    latest kept are met, and of these the `tries` met most often compared: a million pages of one template are not
    compared in pairs."""
    entries, total = buckets(spool)
    edges = np.flatnonzero(np.append(run_starts(entries >> 32), True)).tolist()
    # The kept of a bucket are a linked list, newest first: 20 bytes an entry in all, a tenth of Python's lists.
    last, before = np.full(total, -1), np.full(len(entries), -1)
    report["table_bytes"] += entries.nbytes + last.nbytes + before.nbytes
    bucket, member, last, before = map(memoryview, (*entries.view(np.uint32).reshape(-1, 2).T, last, before))
    twins = []
    for begin, end in zip(edges, edges[1:]):
        met, mine = Counter(), np.unique(spool.items(member[begin]))
        for entry in range(begin, end):
            other, left = last[bucket[entry]], depth
            while other >= 0 and left:
                met[member[other]] += 1
                other, left = before[other], left - 1
        for other, _ in met.most_common(tries):
            its = np.unique(spool.items(other))
            both = len(np.intersect1d(mine, its, assume_unique=True))
            if (jaccard := both / (len(mine) + len(its) - both)) >= cfg.min_jaccard:
                twins.append((member[begin], other, jaccard))
                break
        else:
            for entry in range(begin, end):
                before[entry], last[bucket[entry]] = last[bucket[entry]], entry
    return twins, None


def substring_record(texts, cfg):
    """The hash of every unit, 8 bytes."""
    hashes, _, count = units(texts)
    return count, hashes[:0], hashes


def spans(spool, n, turn, rounds):
    """Hash and place of every n units in a row whose hash falls into this of so many rounds, by place."""
    hashes, places = [np.zeros(0, np.uint64)], [np.zeros(0, int)]
    edges = np.searchsorted(spool.begin, np.arange(0, len(spool.item), 1 << 20))      # documents of about 2^20 units
    edges = np.unique(np.append(edges, len(spool.count)))
    for low, high in zip(edges, edges[1:]):
        begin, end = spool.begin[low], spool.begin[high]
        if end - begin >= n:
            hashed = ngrams(spool.item[begin:end], n)
            mine = np.flatnonzero(unbroken(spool.count[low:high], n) & (hashed % rounds == turn))
            hashes.append(hashed[mine])
            places.append(begin + mine)
    return np.concatenate(hashes), np.concatenate(places)


def copied_tails(spool, cfg, report, room=1 << 23):
    """No twins; and for every unit 0 if the span that begins there is new, else how many of its last units are a copy.
                                                                                                         [Lee]
    Spans are sorted by hash, then compared unit by unit with their first occurrence. Where a span overlaps that
    (periodic text) only what is beyond it is a copy: the first `span` units of a periodic stretch stay. About `room`
    spans, 60 bytes each, are sorted at a time, in as many rounds as it takes; the answer, a byte a unit, is a file."""
    tails = np.memmap(spool.path / "tails", np.uint8, "w+", shape=max(1, len(spool.item)))
    rounds = -(-len(spool.item) // room)
    for turn in range(rounds):
        hashed, place = spans(spool, cfg.span, turn, rounds)
        order = np.argsort(hashed, kind="stable")
        starts, place = run_starts(hashed[order]), place[order]
        copy, source = place[~starts], place[first_of_run(starts)[~starts]]
        order = np.argsort(copy)                            # side by side in the file, as their sources mostly are
        for some in np.array_split(order, len(order) // (1 << 16) + 1):
            here, there, same = copy[some], source[some], True
            for k in range(cfg.span):
                same &= spool.item[here + k] == spool.item[there + k]
            tails[here] = np.where(same, np.minimum(here - there, cfg.span), 0)
    return [], tails


def without(text, tails, span):
    """The text without its copied units, each with what follows up to the next unit; None if no unit is left."""
    copy, steps = np.flatnonzero(tails), np.zeros(len(tails) + 1, int)
    np.add.at(steps, copy + span - tails[copy], 1)
    np.add.at(steps, copy + span, -1)
    gone = np.cumsum(steps)[:-1] > 0
    if gone.all():
        return None
    places = np.append(units([text])[1], len(text))
    edges = [0, *places[np.flatnonzero(np.diff(gone, prepend=False, append=False))].tolist(), len(text)]
    return "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2]))


DEDUP = {                        # flag --method: record of a batch of texts, type of its items, pass 2
    "exact": (exact_record, np.uint64, exact_twins),
    "minhash": (minhash_record, np.uint32, minhash_twins),
    "substring": (substring_record, np.uint64, copied_tails),
}


def survivors(documents, first, spool, twins, tails, cfg, report):
    """Pass 3 over the part whose first document has the number `first`: what is left of each document."""
    dropped = {d for d, _, _ in twins}
    for number, document in enumerate(documents, first):
        text = left = document["text"]
        if number in dropped:
            left = None
        elif tails is not None and (its := tails[spool.begin[number]:spool.begin[number + 1]]).any():
            left = without(text, its, cfg.span)
        if left != text:
            report["dropped" if left is None else "cut"] += 1
            report["bytes_dropped"] += n_bytes(text) - n_bytes(left or "")
        if left is not None:
            yield document if left is text else {**document, "text": left}


def cluster_lines(spool, twins):
    """A JSON line for each dropped document and its twin, by id, or by number where a document has none."""
    wanted = {number for dropped, kept, _ in twins for number in (dropped, kept)}
    with open(spool.path / "names", "rb") as file:
        names = {number: json.loads(line) for number, line in enumerate(file) if number in wanted}
    for dropped, kept, jaccard in twins:
        kept, dropped = (number if names[number] is None else names[number] for number in (kept, dropped))
        yield json.dumps({"kept": kept, "dropped": dropped, "jaccard": round(jaccard, 4)}) + "\n"


# ---- Token shards (how are a hundred billion ids kept on disk?) ----

MAGIC, HEADER = 20240520, 256          # llm.c's shard: 256 int32 (magic, version, count of ids), then the ids
DTYPES = {1: np.uint16, 2: np.uint32}  # version -> type; 2 is ours, for vocabularies beyond 65,536
SHARD_TOKENS = 100_000_000
MEGATRON, MEGATRON_DTYPES = b"MMIDIDX\0\0", {4: np.int32, 5: np.int64, 8: np.uint16}
MAPPED = 2**28                         # bytes of shards that may be resident; beyond it, the pages read are let go


class ShardWriter:
    """Writes split_000000.bin ... and split.idx (uint64 start of every document in the whole stream, and its end).

    Ids go straight to disk, so memory grows neither with a shard nor with the corpus. A file gets its name when it is
    complete, the index last; in a `with`, a failure leaves nothing half-written. A document is never divided: one that
    is longer than a shard gets a longer shard."""

    def __init__(self, folder, split, n_vocab, eot, dtype="auto", shard_tokens=0):
        if dtype == "uint16" and n_vocab > 65536:
            raise UsageError(f"--dtype=uint16 counts to 65,535, the vocabulary has {n_vocab:,} ids; use uint32 or auto")
        self.folder, self.split, self.n_vocab, self.eot = Path(folder), split, n_vocab, eot
        self.version = 2 if n_vocab > 65536 or dtype == "uint32" else 1
        self.shard_tokens = shard_tokens or SHARD_TOKENS
        self.size = self.total = self.n_shards = 0               # ids in this shard, ids in all, complete shards
        self.shard, self.files = contextlib.ExitStack(), contextlib.ExitStack()
        self.index = self.files.enter_context(atomic_write(self.folder / f"{split}.idx"))

    def add(self, ids):
        """One document, stored as end-of-text and its ids."""
        ids = np.concatenate([[self.eot], np.asarray(ids, dtype=np.int64)])
        assert 0 <= ids.min() and ids.max() < self.n_vocab, "ids are numbers below n_vocab"
        if len(ids) > 2**31 - 2:
            raise UsageError(f"a document of {len(ids):,} tokens, a shard counts to {2**31 - 1:,}; cut it into several")
        if self.size and self.size + len(ids) + 1 > self.shard_tokens:
            self._end_shard()
        if not self.size:
            path = self.folder / f"{self.split}_{self.n_shards:06d}.bin"
            self.file = self.shard.enter_context(atomic_write(path))
            self.file.write(bytes(HEADER * 4))                   # the count is not known yet
        self._append(ids)

    def _append(self, ids):
        self.index.write(np.uint64(self.total).tobytes())
        self.file.write(np.asarray(ids, dtype=DTYPES[self.version]).tobytes())
        self.size, self.total = self.size + len(ids), self.total + len(ids)

    def _end_shard(self):
        self._append([self.eot])                                 # the target of the last id; the index counts it too
        self.file.seek(0)
        self.file.write(np.array([MAGIC, self.version, self.size], dtype=np.int32).tobytes())
        self.shard.close()
        self.size, self.n_shards = 0, self.n_shards + 1

    def close(self):
        if self.size:
            self._end_shard()
        self.files.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            return self.close()
        for stack in (self.shard, self.files):
            stack.__exit__(kind, error, trace)


def map_ids(path, dtype, count=None, skip=0):
    """The ids of a file, `skip` bytes in, as a read-only array over its mapped bytes. count: how many it must hold."""
    have, size = Path(path).stat().st_size, np.dtype(dtype).itemsize
    if count is not None and have != skip + count * size:
        raise UsageError(f"{path} was cut short: {have:,} of {skip + count * size:,} bytes; make {path.parent} again")
    if have < skip + size or (have - skip) % size:
        raise UsageError(f"{path} was cut short: {have:,} bytes are no whole number of {size}-byte ids; make it again")
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype, offset=skip)


def mapped_bytes():
    """Bytes of mapped files that are resident in this process, where the system tells (Linux)."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm") as file:
        return int(file.read().split()[2]) * mmap.PAGESIZE
    return 0


def open_shard(path, bare=False):
    """The ids of a file with llm.c's header (bare: or without one, uint16 as nanoGPT writes them)."""
    head = np.fromfile(path, dtype=np.int32, count=3)
    if len(head) == 3 and head[0] == MAGIC and head[1] in DTYPES:
        return map_ids(path, DTYPES[int(head[1])], int(head[2]), HEADER * 4)
    if bare:
        return map_ids(path, np.uint16)
    raise UsageError(f"{path} is not a token shard (magic {MAGIC}, version 1 or 2); prepare {path.parent} again")


def documents_at(part, eot, step=2**24):
    """(starts, lengths) of the documents of a file without an index: one begins at each `eot`, and at the front."""
    n, found = len(part) - 1, [[0]]
    for low in range(0, n, step):
        found.append(low + np.flatnonzero(part[low:min(low + step, n)] == eot))
        release(part)
    starts = np.unique(np.concatenate(found)).astype(np.int64)[:n]
    return starts, np.diff(starts, append=n)


def open_megatron(path, index, eot):
    """(ids, starts, lengths) of Megatron's pair. The index: 9 bytes of magic, version, type of the ids, the number of
    sequences and of documents + 1; lengths and byte offsets of sequences; the first sequence of each document."""
    raw = Path(index).read_bytes()
    version, code, n, m = struct.unpack_from("<QBQQ", raw.ljust(34, b"\0"), 9)
    if version != 1 or code not in MEGATRON_DTYPES or len(raw) != 34 + 12 * n + 8 * m:
        raise UsageError(f"{index}: expected Megatron's version 1 with ids of type {[*MEGATRON_DTYPES]}, found version "
                         f"{version}, type {code}, {len(raw):,} bytes; it is damaged, or of a kind not read here")
    lengths, offsets, first = (np.frombuffer(raw, dtype, count, at) for dtype, count, at in (
        (np.int32, n, 34), (np.int64, n, 34 + 4 * n), (np.int64, m, 34 + 12 * n)))
    dtype, bounds = np.dtype(MEGATRON_DTYPES[code]), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (offsets != bounds[:-1] * dtype.itemsize).any() or not m or first[0] != 0 or first[-1] != n:
        raise UsageError(f"{index}: its sequences do not lie end to end; merge the files with Megatron's tools first")
    part, starts, ends = map_ids(path, dtype, int(bounds[-1])), bounds[first[:-1]], bounds[first[1:]]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if (part[ends[:100] - 1] == eot).all():                      # each document ends with one: it opens the next here
        starts = np.maximum(starts - 1, 0)
    return part, starts, ends - 1 - starts


class Shards:
    """Memory-mapped stream of ids over all files of a split, and the table of its documents: `starts`, and `lengths`
    counted in ids that have a next one (a document's own end-of-text is one, the last id of a file is not).

    It reads ShardWriter's files; llm.c's shards, which have no index (a document begins at each `eot`, if it is given,
    else a file is one document); nanoGPT's split.bin of bare uint16 (likewise); Megatron's split.bin with split.idx."""

    def __init__(self, folder, split, eot=-1):
        folder, self.touched, self.mapped = Path(folder), 0, mapped_bytes()
        single, index = folder / f"{split}.bin", folder / f"{split}.idx"
        paths = sorted(folder.glob(f"{split}_[0-9]*.bin")) or [single] * single.is_file()
        if not paths and not index.is_file():
            raise UsageError(f"{folder} holds no tokens named {split}; expected {split}_000000.bin ..., or {split}.bin")
        magic = np.fromfile(index, np.uint8, 9).tobytes() if index.is_file() else None
        if magic == MEGATRON:
            part, *table = open_megatron(single, index, eot)
            self.parts, tables = [part], [table]
        else:
            self.parts = [open_shard(path, bare=path == single) for path in paths]
            tables = [documents_at(part, eot) for part in self.parts] if magic is None else []
        if len({part.dtype for part in self.parts}) > 1:
            raise UsageError(f"{folder}: some shards of {split} are uint16, others uint32; tokenise all of them again")
        self.base = np.cumsum([0] + [len(part) for part in self.parts])
        self.views = [memoryview(part) for part in self.parts]
        if tables:
            self.starts = np.concatenate([low + starts for low, (starts, _) in zip(self.base, tables)])
            self.lengths = np.concatenate([lengths for _, lengths in tables])
        else:
            self._read_index(index)

    def _read_index(self, path):
        starts, ends = np.fromfile(path, dtype=np.uint64).astype(np.int64), self.base[1:] - 1
        last = np.isin(starts, ends)                             # end-of-texts that close a shard are no documents
        fits = (path.stat().st_size % 8 == 0 and (np.diff(starts, prepend=-1) > 0).all() and np.isin(ends, starts).all()
                and np.isin(self.base[:-1], starts).all() and starts[-1:].tolist() == ends[-1:].tolist())
        if not fits or any(self.read(at, 1) != self.read(0, 1) for at in starts[::max(1, len(starts) // 64)].tolist()):
            raise UsageError(f"{path} does not belong to the {len(self.parts)} shards beside it; make them again")
        self.starts, self.lengths = starts[~last], np.diff(starts, append=0)[~last]

    def read(self, start, count):
        """ids [start, start + count) of the stream; a document and the id after it never cross a shard."""
        part = int(np.searchsorted(self.base, start, side="right")) - 1
        self._touch(1)
        return self.parts[part][start - self.base[part]:start - self.base[part] + count]

    def gather(self, starts, lengths, beyond):
        """(ids of many pieces, end to end; the places where the stream does not go on with the next piece; the ids with
        which it would). Neighbours in the stream are read in one. `beyond`: ids that follow the end of the stream."""
        stops, ends, apart = starts + lengths, np.cumsum(lengths), np.ones(len(starts) + 1, dtype=bool)
        np.not_equal(starts[1:], stops[:-1], out=apart[1:-1])
        starts, stops, ends = starts[apart[:-1]], stops[apart[1:]], ends[apart[1:]]
        part = np.searchsorted(self.base, starts, side="right") - 1
        base, views = self.base[part], [*self.views, memoryview(beyond)]
        spans = list(zip(part.tolist(), (starts - base).tolist(), (stops - base).tolist()))
        ids = b"".join([views[p][a:b] for p, a, b in spans])     # twice as fast as an index for every id
        self._touch(len(spans))
        return np.frombuffer(ids, dtype=beyond.dtype), ends, [views[p][b] for p, a, b in spans]

    def _touch(self, n_places):
        """Looks now and then whether more than MAPPED bytes became resident: reading a place maps 64 kB around it, or
        2 MB where the kernel keeps the file in large pages."""
        self.touched += n_places
        if self.touched > 512:
            self.touched = 0
            if mapped_bytes() > self.mapped + MAPPED:
                for part in self.parts:
                    release(part)


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


def cut_text(text, at):
    """(head, tail) of a text, cut at the first character that begins at or after byte `at`."""
    raw = text.encode("utf-8", "surrogatepass")
    while at < len(raw) and raw[at] & 0xC0 == 0x80:              # never between the bytes of a character
        at += 1
    head = raw[:at].decode("utf-8", "surrogatepass")
    return head, text[len(head):]


def encoded(encode, documents):
    """For every (number, text): int64 number, bytes and ids, then the ids as uint32. encode(texts, numbers) gives those."""
    while batch := list(itertools.islice(documents, 1)):
        size = len(batch[0][1])
        for item in documents:
            batch.append(item)
            size += len(item[1])
            if size > 4_000_000:
                break
        numbers, texts = zip(*batch)
        for number, text, ids in zip(numbers, texts, encode(list(texts), numbers)):
            yield np.array([number, n_bytes(text), len(ids)]).tobytes()
            yield np.array(ids, dtype=np.uint32).tobytes()


def decoded(path):
    """(number, bytes, ids) of every document that encoded() wrote."""
    with open(path, "rb") as file:
        while head := file.read(24):
            number, size, count = np.frombuffer(head, dtype=np.int64).tolist()
            yield number, size, np.frombuffer(file.read(4 * count), dtype=np.uint32)


def with_end(tok, say):
    """The tokenizer itself, or with an end-of-text token if it has none."""
    if not any(name in tok.special for name in END_OF_TEXT):
        tok = tok.with_special(END_OF_TEXT[:1])
        say(f"tokenizer: it has no end-of-text token, so {END_OF_TEXT[0]} became id {tok.n_vocab - 1}")
    return tok


def write_shards(corpus, tok, temp, args, say, fim=""):
    """The shards of a corpus in `temp`, its tokenizer and meta.json. fim: the level of infilling, if any. Returns the meta data."""
    report = Counter()
    if not 0 <= args.val_fraction < 1:
        raise UsageError(f"--val_fraction={args.val_fraction} is a share of the text; use a number from 0 up to 1, such as 0.05")
    if tok is None and not (256 < args.vocab_size < 1 << 31 and 0 <= args.tokenizer_mb < math.inf):
        raise UsageError(f"--vocab_size={args.vocab_size}, --tokenizer_mb={args.tokenizer_mb}: a tokenizer is learned with 257 or more "
                         f"tokens from some megabytes, such as --vocab_size=32768 --tokenizer_mb=100")
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
    tok = with_end(tok, say)

    infill = None
    if fim:
        tok = with_sentinels(tok)
        infill = Infill(tok, args.fim_rate, args.fim_spm, args.seed, args.seq_len) if fim == "document" else None

    def encode(texts, numbers):
        """Training documents are infilled if flags ask for it; validation text stays as it is."""
        train = sum(number < cut + bool(inside) for number in numbers) if infill else 0
        return (infill.encode(texts[:train], numbers[:train]) if train else []) + tok.encode_batch(texts[train:])

    def work(documents, report, part):
        def texts():
            for number, document in enumerate(documents, firsts[part]):
                halves = cut_text(document["text"], inside) if inside and number == cut else [document["text"]]
                yield from ((number + (half and 1), text) for half, text in enumerate(halves))
        return encoded(encode, texts())

    paths, _ = run_parts(corpus, work, temp / "parts", args.workers, say)
    eot = end_of_text(tok)
    bytes_of = Counter()
    with contextlib.ExitStack() as files:
        writers = {split: files.enter_context(ShardWriter(temp, split, tok.n_vocab, eot, args.dtype, args.shard_tokens))
                   for split in ("train", "val")}
        for number, size, ids in itertools.chain.from_iterable(map(decoded, paths)):
            split = "train" if number < cut + bool(inside) else "val"
            writers[split].add(ids)
            bytes_of[split] += size
    meta = {"documents": len(sizes), "skipped": skipped, "n_vocab": tok.n_vocab, "eot": eot}
    for split, writer in writers.items():
        meta |= {f"{split}_tokens": writer.total, f"{split}_bytes": bytes_of[split]}
    tok.save(temp / "tokenizer")
    with atomic_write(temp / "meta.json", "w") as file:
        json.dump(meta, file)
    return meta


def prepare(cfg, vocab_size, run_folder, say=print):
    """The data of train.py: tokenise the text of --input into shards, or find them ready. Returns their folder.

    The folder's name is a hash of all it depends on, so a changed file or flag never meets stale shards; it gets that name
    only when it is complete. With --mix, or where an input is a folder of shards already, every input is a source by
    itself and the folder holds no more than their names."""
    mixed = [path for path in cfg.input if (Path(path) / "meta.json").is_file()]
    adopted = [path for path in cfg.input if (Path(path) / "train.bin").is_file() and path not in mixed]
    if not mixed and not adopted and not cfg.mix:
        return _prepare_text(cfg, vocab_size, cfg.input, cfg.tokenizer, run_folder, say)
    if cfg.mix and len(cfg.mix) != len(cfg.input):
        raise UsageError(f"--mix has {len(cfg.mix)} weights for {len(cfg.input)} --input; give one for each")
    if (mixed or adopted) and cfg.fim_rate and cfg.fim_level == "document":
        raise UsageError(f"{(mixed + adopted)[0]} holds ids, whose documents `data.py pack --fim_rate` infills; or say --fim_level=context")
    if adopted and not cfg.tokenizer:
        raise UsageError(f"{adopted[0]} holds tokens without their tokenizer; name that with --tokenizer")
    tokenizer = cfg.tokenizer or (Path(mixed[0]) / "tokenizer" if mixed else "")
    if not tokenizer:                                            # learned from all the text, used for each source
        tokenizer = _prepare_text(cfg, vocab_size, cfg.input, "", run_folder, say) / "tokenizer"
    homes = [Path(path).absolute() if path in mixed else _adopt(cfg, Path(path).absolute(), run_folder) if path in adopted else
             _prepare_text(cfg, vocab_size, [path], tokenizer, run_folder, say) for path in cfg.input]
    metas, toks = zip(*map(open_prepared, homes))
    for home, tok in zip(homes, toks):
        if tok.fingerprint != toks[0].fingerprint:
            raise UsageError(f"{home} was tokenised with another tokenizer than {homes[0]}; tokenise both with the same --tokenizer")
    sums = {name: sum(meta[name] for meta in metas) for name in metas[0] if name == "documents" or name.endswith(("_tokens", "_bytes"))}
    key = [file_stamps([home / "meta.json", *sorted(home.glob("*.idx"))]) for home in homes]
    folder = cache_root(cfg, run_folder) / f"data-{hashlib.sha256(json.dumps(['mix', FORMAT, key]).encode()).hexdigest()[:16]}"
    toks[0].save(folder / "tokenizer")
    with atomic_write(folder / "meta.json", "w") as file:
        json.dump(metas[0] | sums | {"sources": sum((meta.get("sources", [str(home)]) for meta, home in zip(metas, homes)), [])}, file)
    return folder


def _adopt(cfg, source, run_folder):
    """A folder for tokens that another program wrote: train.bin and val.bin of nanoGPT, or with .idx of Megatron."""
    tok = with_end(tok_lib.load(cfg.tokenizer), print)
    meta = {"n_vocab": tok.n_vocab, "eot": end_of_text(tok), "skipped": "", "documents": 0, "sources": [str(source)]}
    size = np.array([len(tok.token_bytes(i)) for i in range(tok.n_vocab)])
    for split in ("train", "val"):
        shards, n = Shards(source, split, meta["eot"]), 0
        for part in shards.parts:
            for at in range(0, len(part), 1 << 22):
                ids = np.asarray(part[at:at + (1 << 22)], dtype=np.int64)
                if ids.max() >= tok.n_vocab:
                    raise UsageError(f"{source}: {split} holds the id {ids.max()}, but {cfg.tokenizer} has {tok.n_vocab:,} tokens; name the "
                                     f"tokenizer it was made with")
                n += int(size[ids].sum())
        meta |= {f"{split}_tokens": sum(map(len, shards.parts)), f"{split}_bytes": n, "documents": meta["documents"] + len(shards.starts)}
    key = hashlib.sha256(json.dumps([FORMAT, tok.fingerprint, file_stamps([source])]).encode()).hexdigest()[:16]
    folder = cache_root(cfg, run_folder) / f"data-{key}"
    tok.save(folder / "tokenizer")
    with atomic_write(folder / "meta.json", "w") as file:
        json.dump(meta, file)
    return folder


def end_of_text(tok):
    """The id of the first of END_OF_TEXT that a tokenizer has."""
    names = [name for name in END_OF_TEXT if name in tok.special]
    if not names:
        raise UsageError(f"the tokenizer has none of {END_OF_TEXT}; add one of them as a special token")
    return tok.special[names[0]]


def _prepare_text(cfg, vocab_size, paths, tokenizer, run_folder, say):
    corpus = Corpus(paths, run_folder)
    ready = tok_lib.load(tokenizer, cfg.pattern) if tokenizer else None
    spec = [ready.fingerprint if ready else [vocab_size, cfg.pattern, cfg.tokenizer_mb], cfg.val_fraction]
    if cfg.fim_rate:                                             # context level: the tokenizer alone depends on it
        spec += [cfg.fim_rate, cfg.fim_spm, cfg.seed, cfg.seq_len] if cfg.fim_level == "document" else ["sentinels"]
    key = hashlib.sha256(json.dumps([FORMAT, corpus.fingerprint, spec]).encode()).hexdigest()[:16]
    root = cache_root(cfg, run_folder)
    folder = root / f"data-{key}"
    if (folder / "meta.json").is_file():
        return folder
    temp = Path(tempfile.mkdtemp(prefix=".data-", dir=root))
    try:
        args = SimpleNamespace(**vars(cfg) | dict(vocab_size=vocab_size, workers=0, dtype="auto", shard_tokens=SHARD_TOKENS))
        write_shards(corpus, ready, temp, args, say, cfg.fim_level if cfg.fim_rate else "")
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
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        names = ("n_vocab", "eot", "documents", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
        if not all(type(meta[name]) is int for name in names):
            raise ValueError("a number is missing")
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); make {folder} again") from None
    return meta, tok_lib.load(Path(folder) / "tokenizer")


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

def order_of(keys):
    """np.argsort(keys, kind="stable") of whole numbers >= 0: numpy sorts 16-bit keys by radix, wider ones slowly."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    while (keys := keys >> 16).any():
        order = order[np.argsort(keys[order].astype(np.uint16), kind="stable")]
    return order


def best_fit_decreasing(lengths, capacity):
    """Bin of every item: longest first, each into the open bin with the least room that holds it.      [FewTrunc alg 1]

    After an item went in, the same bin is the tightest for the next item of that length, and bins with equal room are
    alike; so all items of a length are dealt to groups of bins at once, in steps that hardly grow with the items. The
    rooms that are open stand as bits of one integer: the best fit is the lowest set bit at or above the length.
    lengths: ints in 1..capacity. Returns int64 bins, numbered in order of opening."""
    lengths = np.asarray(lengths, dtype=np.int64)
    dealt, done, opened = np.empty(len(lengths), dtype=np.int64), 0, 0
    with_room, rooms = [[] for _ in range(capacity + 1)], 0      # room -> groups of bins

    def put(room, group):
        nonlocal rooms
        if room and len(group):
            with_room[room].append(group)
            rooms |= 1 << room

    counts = np.bincount(lengths)
    for size in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[size])
        while done < end:
            fits = rooms >> size
            if fits:
                room = size + (fits & -fits).bit_length() - 1
                group = with_room[room].pop()
                rooms ^= (not with_room[room]) << room
            else:
                room, first = capacity, opened
                opened -= (done - end) // (capacity // size)     # minus floor of a negative: rounded up
                group = np.arange(first, opened)
            each = room // size
            n = min(end - done, each * len(group))
            full, some = divmod(n, each)
            dealt[done:done + n] = np.repeat(group[:full + 1], each)[:n]
            put(room - each * size, group[:full])
            put(room - some * size, group[full:full + (some > 0)])
            put(room, group[full + (some > 0):])
            done += n
    bins = np.empty_like(dealt)
    bins[order_of(capacity - lengths)] = dealt
    return bins


def windows(lengths, capacity):
    """Bin of every piece of a stream that was cut every `capacity` ids: nothing is padded, most documents are cut."""
    return (np.cumsum(lengths) - lengths) // capacity


def one_each(lengths, capacity):
    """A bin for every item."""
    return np.arange(len(lengths))


PACKERS = {                            # flag --packing
    "bfd": best_fit_decreasing,
    "concat": windows,
    "none": one_each,
}


def pack(starts, lengths, seq_len, method="bfd"):
    """Rows of seq_len places over a stream. Documents are cut every seq_len ids, counted from their own start (concat:
    from the stream's), and the pieces packed. Returns (first, piece_start, piece_length): the pieces of row r are
    first[r]:first[r + 1]."""
    phase = (np.cumsum(lengths) - lengths) % seq_len if method == "concat" else np.zeros_like(lengths)
    pieces = -(-(phase + lengths) // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces)
    edge = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * seq_len - phase[document]
    begin = np.maximum(edge, 0)
    length = np.minimum(edge + seq_len, lengths[document]) - begin
    row = PACKERS[method](length, seq_len)
    order = order_of(row)
    first = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return first, (starts[document] + begin)[order], length[order]


# ---- FIM (how does a left-to-right model learn to fill a gap?) ----

FIM_ROLES = ["fim_prefix", "fim_suffix", "fim_middle"]
FIM_LEVELS = {                         # flag --fim_level
    "document": "once, when documents become ids",
    "context": "each piece of a row anew whenever the row is drawn; the row is then trimmed",
}


def with_sentinels(tok):
    """The tokenizer itself, or with those special tokens of FIM that it lacks."""
    missing = [role for role in FIM_ROLES if tok.special.keys().isdisjoint(tok_lib.ROLES[role])]
    return tok.with_special(missing) if missing else tok


class Infill:
    """Moves the middle of a text to its end, between sentinels: it is then predicted from both sides.    [FIM sec 3]

        prefix middle suffix  ->  PRE prefix SUF suffix MID middle      PSM
                                  PRE SUF suffix MID prefix middle      SPM, in the form that shares PSM's sentinels

    A text is chosen with probability `rate`, then for SPM with probability `spm`. It is cut at two characters drawn
    uniformly, and its three parts become ids each by itself, as they will when someone asks for a gap to be filled.
    row: a text that would fit a row of so many ids, but no longer with the sentinels, stays as it is."""

    def __init__(self, tok, rate, spm=0.5, seed=0, row=0):
        for name, value in (("fim_rate", rate), ("fim_spm", spm)):
            if not 0 <= value <= 1:
                raise UsageError(f"--{name}={value} is a share; use a number from 0 to 1, such as 0.5")
        self.tok, self.rate, self.spm, self.seed, self.row = tok, rate, spm, seed, row
        self.pre, self.suf, self.mid = (tok.role(role) for role in FIM_ROLES)

    def cut(self, text, rng):
        """[text], or [prefix, middle, suffix, whether SPM] of one that was chosen."""
        if rng.random() >= self.rate:
            return [text]
        low, high = sorted(rng.randint(0, len(text)) for _ in range(2))
        return [text[:low], text[low:high], text[high:], rng.random() < self.spm]

    def arrange(self, prefix, middle, suffix, spm):
        if spm:
            return [self.pre, self.suf, *suffix, self.mid, *prefix, *middle]                             # [FIM sec 3.1]
        return [self.pre, *prefix, self.suf, *suffix, self.mid, *middle]

    def encode(self, texts, numbers):
        """Document level: ids of each text. numbers: which document of the corpus each is, for the same draws in any
        worker."""
        cuts = [self.cut(text, random.Random(f"{self.seed} {number}")) for text, number in zip(texts, numbers)]
        ids, made = iter(self.tok.encode_batch([part for parts in cuts for part in parts[:3]])), []
        for text, parts in zip(texts, cuts):
            made.append(next(ids) if len(parts) == 1 else self.arrange(next(ids), next(ids), next(ids), parts[3]))
            if len(parts) > 1 and len(made[-1]) >= self.row > len(plain := self.tok.encode(text) if self.row else ()):
                made[-1] = plain
        return made

    def __call__(self, ids, rng):
        """Context level, a Loader's `resample`: a piece of a row and the id after it, infilled and so three ids or more
        longer. Ends-of-text stay outside; a piece that has special tokens inside is left alone.        [FIM sec 3.2]"""
        special, tok = set(self.tok.special.values()), self.tok
        low, high = int(ids[0] in special), len(ids) - int(ids[-1] in special)
        body = ids[low:high]
        if not body or not special.isdisjoint(body):
            return ids
        raw = b"".join(map(tok.bytes_of.__getitem__, body)).removeprefix(b" " * (tok.strip == "left"))
        parts = self.cut(raw.decode("utf-8", "surrogateescape"), rng)          # a piece may begin inside a character
        if len(parts) == 1:
            return ids
        made = [tok.encode(part.encode("utf-8", "surrogateescape")) for part in parts[:3]]
        return [*ids[:low], *self.arrange(*made, parts[3]), *ids[high:]]


def unfim(ids, tok):
    """The ids of an infilled document in the order of its text, without sentinels; others as they are."""
    pre, suf, mid = (tok.role(role) for role in FIM_ROLES)
    if ids[:1] != [pre]:
        return ids
    a, b = ids.index(suf), ids.index(mid)
    return ids[1:a] + ids[b + 1:] + ids[a + 1:b]                 # SPM: no prefix, and a middle that begins with it


def in_turn(*steps):
    """One `resample` of several, those that are None left out; None where none is left."""
    steps = [step for step in steps if step]
    return (lambda ids, rng: functools.reduce(lambda made, step: step(made, rng), steps, ids)) if steps else None


# ---- Order (which row is sample i?) ----

def permutation(index, n, seed):
    """Where `index` (int64 array, each in 0..n-1) goes in a pseudo-random order of 0..n-1: O(1) memory, any n.

    A Feistel network permutes the numbers of 2k bits; those that fall outside 0..n-1 are sent through again until they
    fall inside, which is a permutation of 0..n-1.                                                    [Feistel sec 4]"""
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


PERIOD = 10_000                        # weights of a mixture are rounded to so many parts of the whole


def whole_shares(weights):
    """Weights as samples in a period: the shortest where all are whole, else PERIOD, largest remainders rounded up."""
    try:
        share = np.array([float(weight) for weight in weights])
        wrong = not len(share) or not np.isfinite(share).all() or share.min() <= 0
    except ValueError:
        wrong = True
    if wrong:
        raise UsageError(f"--mix {' '.join(map(str, weights))}: expected a positive number for each --input, as in "
                         f"--mix 0.7 0.3")
    share /= share.sum()
    wanted = share * np.arange(1, PERIOD + 1)[:, None]
    wanted = wanted[np.append(np.flatnonzero((np.abs(wanted - np.rint(wanted)) < 1e-9).all(1)), PERIOD - 1)[0]]
    whole = np.floor(wanted + 1e-9).astype(np.int64)
    whole[np.argsort(whole - wanted, kind="stable")[:round(wanted.sum()) - whole.sum()]] += 1
    if not whole.all():
        raise UsageError(f"--mix: a share of {share.min():.2g} is too small; give each source {1 / PERIOD:g} or more")
    return whole


def take_turns(shares):
    """Source of each sample of a period in which source j has shares[j]. After any n samples each source is less than a
    sample ahead of or behind n shares[j] / period: of the k sources, those are ready that are owed 1 / (2k - 2) of a
    sample; the one whose deadline is earliest goes next.                                         [Chairman, theorem]"""
    shares, period, k = [int(share) for share in shares], int(sum(shares)), max(1, 2 * len(shares) - 2)
    owed, turns = [0] * len(shares), []                          # in samples x period
    for _ in range(period):
        owed = [have + share for have, share in zip(owed, shares)]
        turn = min((j for j, have in enumerate(owed) if k * have >= period or k == 1 == len(shares)),
                   key=lambda j: ((k - 1) * period - k * owed[j]) / shares[j])
        owed[turn] -= period
        turns.append(turn)
    return np.array(turns)


# ---- Loader (samples as tensors) ----

ORDER_BLOCK = 4096                           # samples whose rows are looked up at once: one alone costs nearly as much


def table_paths(folder, split, seq_len, method):
    return [Path(folder) / f"{split}.{method}.{seq_len}.{name}.npy" for name in ("first", "start", "length")]


def row_table(folder, split, stream, seq_len, method):
    """What pack() returns: mapped from the files that `data.py pack` left for this length and method, else made now."""
    paths = table_paths(folder, split, seq_len, method)
    if all(path.is_file() for path in paths):
        return [np.load(path, mmap_mode="r") for path in paths]
    return pack(stream.starts, stream.lengths, seq_len, method)


class Page:
    """Memory of one batch, from the list `free`, to which it returns with the batch's last tensor: new memory costs a
    page fault every 4 kB, in all more time than filling it."""

    def __init__(self, free, size):
        self.free, self.block = free, np.empty(0, dtype=np.uint8)
        with contextlib.suppress(IndexError):                    # another thread may have taken the last one
            self.block = free.pop()
        if len(self.block) < size:
            self.block = np.empty(size, dtype=np.uint8)
        self.__array_interface__ = self.block.__array_interface__

    def __del__(self):
        self.free.append(self.block)


class Loader:
    """Rows of a split by number. `samples(first, count)` gives the rows of global samples first .. first + count - 1;
    the order is a pure function of (seed, sample), every row comes once an epoch. shuffle=False: rows in order.

    resample: (ids, rng) -> ids, another form of a piece each time its row is drawn: Tokenizer.sampler, Infill."""

    def __init__(self, folder, split, seq_len, seed=0, packing="bfd", shuffle=True, eot=-1, resample=None):
        self.stream, self.seq_len, self.eot = Shards(folder, split, eot), seq_len, max(eot, 0)
        self.seed, self.shuffle, self.resample = seed, shuffle, resample
        self.first, self.start, self.length = row_table(folder, split, self.stream, seq_len, packing)
        self.n_rows, self.n_tokens = len(self.first) - 1, int(self.length.sum())
        if not self.n_rows:
            raise UsageError(f"no {split} text is left after the split; give more text, or a smaller --val_fraction")
        self.room = seq_len - np.add.reduceat(self.length, self.first[:-1])    # places of each row that are padding
        self.padding = np.full(seq_len + 1, self.eot, dtype=self.stream.parts[0].dtype)
        self.block, self.order = min(ORDER_BLOCK, self.n_rows), functools.lru_cache(4)(self._order)
        self.columns, self.pages = np.arange(seq_len), []

    def _order(self, block):
        """Rows of the samples block * self.block ... A curriculum is another function of numbers in this place."""
        epochs, index = np.divmod(np.arange(block * self.block, (block + 1) * self.block), self.n_rows)
        for epoch in set(epochs.tolist()) if self.shuffle else ():
            here = epochs == epoch
            index[here] = permutation(index[here], self.n_rows, (self.seed, epoch))
        return index

    def rows(self, samples):
        """Row of each global sample number."""
        blocks, places = np.divmod(np.asarray(samples, dtype=np.int64), self.block)
        rows = np.empty_like(places)
        for block in set(blocks.tolist()):
            here = blocks == block
            rows[here] = self.order(block)[places[here]]
        return rows

    def samples(self, first, count):
        """Batch of tensors [count, seq_len]: tokens, targets, positions, doc_ids (int64) and weights (float32)."""
        numbers = np.arange(first, first + count)
        return self.batch(self.rows(numbers), numbers)

    def batch(self, rows, numbers=()):
        """Rows as tensors. numbers: which sample each row is, for `resample`; without them the text stays as it is."""
        import torch                                             # here: the text commands start without it
        B, T, rows = len(rows), self.seq_len, np.asarray(rows, dtype=np.int64)
        changed = self.resample and len(numbers)
        length, nth, ids, ends, after = self._resampled(rows, numbers) if changed else self._plain(rows)
        memory = np.asarray(Page(self.pages, 36 * B * T))        # four int64 and a float32 for each place
        longs, weights = memory[:32 * B * T].view(np.int64), memory[32 * B * T:36 * B * T].view(np.float32)
        tokens, targets, positions, doc_ids = longs.reshape(4, B * T)
        end = np.cumsum(length)
        column = (end - length) % T                              # where each piece begins in its row
        tokens[:] = ids
        targets[:-1] = tokens[1:]                                # right but at some ends of pieces
        targets[ends - 1] = after
        positions.reshape(B, T)[:] = self.columns
        if column.any():
            positions -= np.repeat(column, length)
        doc_ids[:] = np.repeat(nth.astype(np.int32), length)
        weights[:] = 1
        for last, n in zip(end[nth < 0].tolist(), length[nth < 0].tolist()):   # padding
            targets[last - n:last] = positions[last - n:last] = weights[last - n:last] = 0
        arrays = dict(tokens=tokens, targets=targets, weights=weights, positions=positions, doc_ids=doc_ids)
        return {name: torch.from_numpy(array.reshape(B, T)) for name, array in arrays.items()}

    def _plain(self, rows):
        """(length of each piece of some rows, its number in the row, and what Shards.gather says of them). Padding is a
        row's last piece, number -1: end-of-texts from beyond the end of the stream."""
        low, room = self.first[rows], self.room[rows]
        pieces = self.first[rows + 1] - low + (room > 0)
        ends = np.cumsum(pieces)
        nth = np.arange(ends[-1]) - np.repeat(ends - pieces, pieces)
        piece = np.repeat(low, pieces) + nth
        start, length = self.start.take(piece, mode="clip"), self.length.take(piece, mode="clip")
        padding = ends[room > 0] - 1
        start[padding], length[padding], nth[padding] = self.stream.base[-1], room[room > 0], -1
        return length, nth, *self.stream.gather(start, length, self.padding)

    def _resampled(self, rows, numbers):
        """The same, each piece in another form; what then no longer fits into its row is left out."""
        made = []                                                # (ids and the one after, number in the row)
        for row, number in zip(rows.tolist(), np.asarray(numbers).tolist()):
            room = self.seq_len
            for n, piece in enumerate(range(self.first[row], self.first[row + 1])):
                ids = self.stream.read(int(self.start[piece]), int(self.length[piece]) + 1).tolist()
                ids = self.resample(ids, random.Random(f"{self.seed} {number} {piece}"))[:room + 1]
                made.append((ids, n))
                room -= len(ids) - 1
            made.append(([self.eot] * (room + 1), -1))
        made = [(ids, n) for ids, n in made if len(ids) > 1]
        length, nth = np.array([(len(ids) - 1, n) for ids, n in made]).T
        return length, nth, [i for ids, _ in made for i in ids[:-1]], np.cumsum(length), [ids[-1] for ids, _ in made]


class Mixture:
    """Several loaders as one: sample i is the next of the source whose turn it is, each in its own epochs and order."""

    def __init__(self, loaders, weights):
        if len(loaders) != len(weights) or len({loader.seq_len for loader in loaders}) > 1:
            raise UsageError(f"--mix has {len(weights)} weights for {len(loaders)} sources; give one for each --input")
        self.loaders, self.shares, self.seq_len = loaders, whole_shares(weights), loaders[0].seq_len
        self.turns = take_turns(self.shares)
        mine = self.turns == np.arange(len(loaders))[:, None]
        self.before = (np.cumsum(mine, axis=1) - mine)           # [source, place in the period]: its samples so far
        self.base = np.cumsum([0] + [loader.n_rows for loader in loaders])
        self.n_rows, self.n_tokens = int(self.base[-1]), sum(loader.n_tokens for loader in loaders)

    def place(self, samples):
        """(source, number among its samples) of each global sample number: a table of one period, so O(1)."""
        periods, at = np.divmod(np.asarray(samples, dtype=np.int64), len(self.turns))
        source = self.turns[at]
        return source, periods * self.shares[source] + self.before[source, at]

    def epochs(self, n):
        """How often each source was read when n samples are drawn."""
        drawn = n // len(self.turns) * self.shares + self.before[:, n % len(self.turns)]
        return (drawn / [loader.n_rows for loader in self.loaders]).tolist()

    def rows(self, samples):
        source, number = self.place(samples)
        rows = self.base[source]
        for j in set(source.tolist()):
            rows[source == j] += self.loaders[j].rows(number[source == j])
        return rows

    samples = Loader.samples

    def batch(self, rows, numbers=()):
        import torch
        rows, numbers = np.asarray(rows, dtype=np.int64), np.asarray(numbers)
        source = np.searchsorted(self.base, rows, side="right") - 1
        places = [np.flatnonzero(source == j) for j in range(len(self.loaders))]
        parts = [loader.batch(rows[here] - low, numbers[here] if len(numbers) else ())
                 for loader, low, here in zip(self.loaders, self.base, places) if len(here)]
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


def prefetch(batches, depth):
    """The same batches, up to `depth` of them made ahead of time by a thread; what fails there is raised here. To stop
    before the end, close it."""
    if not depth:
        yield from batches
        return
    made, stop = queue.Queue(depth), threading.Event()

    def put(*item):
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return True

    def work():
        try:
            if all(put(batch) for batch in batches):
                put(None, None)
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while len(item := made.get()) == 1:
            yield item[0]
        if item[1]:
            raise item[1]
    finally:
        stop.set()
        thread.join()


def open_loaders(cfg, folder, meta, tok):
    """{split: Loader or Mixture} of a folder that prepare() found: training rows shuffled and, where flags ask for it, in
    another form each time they are drawn; validation rows in order, as they are."""
    homes = meta.get("sources", [folder])
    infill = Infill(tok, cfg.fim_rate, cfg.fim_spm) if cfg.fim_rate and cfg.fim_level == "context" else None
    forms, loaders = {"train": in_turn(infill, tok.sampler(cfg.bpe_dropout, cfg.subword_alpha)), "val": None}, {}
    for split, form in forms.items():
        parts = [Loader(home, split, cfg.seq_len, cfg.seed, cfg.packing, split == "train", meta["eot"], form) for home in homes]
        loaders[split] = Mixture(parts, cfg.mix or [part.n_rows for part in parts]) if len(parts) > 1 else parts[0]
    return loaders


# ---- The chain (from raw files to rows, stage after stage) ----

def write_documents(path, documents):
    """Documents to a .jsonl file; returns what a report says of them."""
    count, size = 0, 0
    with atomic_write(path) as file:
        for document in documents:
            file.write(line_of(document))
            count, size = count + 1, size + n_bytes(document["text"])
    return {"documents_out": count, "bytes_out": size}


def read_lines(paths):
    for path in paths:
        with open(path, "rb") as file:
            yield from map(json.loads, file)


def norm_stage(corpus, temp, args, say):
    """kept.jsonl: every document with its text normalised, if anything is left of that."""
    def work(documents, report, part):
        for document in documents:
            text = NORMALIZE[args.norm](document["text"])
            report["changed"] += text != document["text"]
            report["vanished"] += not text
            if text:
                yield line_of(document | {"text": text})

    paths, report = run_parts(corpus, work, temp / "parts", args.workers, say)
    return dict(report) | write_documents(temp / "kept.jsonl", read_lines(paths)) | {"norm": args.norm}


def dedup_stage(corpus, temp, args, say):
    """kept.jsonl: what was not there before; clusters.jsonl: what it resembled."""
    for name, most in ("ngram", 1000), ("bands", 1000), ("rows", 1000), ("span", 255):
        if not 1 <= getattr(args, name) <= most:
            raise UsageError(f"--{name}={getattr(args, name)} must be a whole number from 1 to {most}")
    if not 0 < args.min_jaccard <= 1:
        raise UsageError(f"--min_jaccard={args.min_jaccard} is a share; use a number above 0 and up to 1, such as 0.7")
    report = Counter()
    paths, read = run_parts(corpus, lambda documents, report, part: records(documents, args), temp / "parts", args.workers, say)
    _, item, decide = DEDUP[args.method]
    spool = Spool(temp / "parts", paths, item)
    twins, tails = decide(spool, args, report) if len(spool.count) else ([], None)
    left = (survivors(corpus.read(part, Counter()), first, spool, twins, tails, args, report)
            for part, first in enumerate(spool.first[:-1]))
    kept = write_documents(temp / "kept.jsonl", itertools.chain.from_iterable(left))
    with atomic_write(temp / "clusters.jsonl", "w") as file:
        file.writelines(cluster_lines(spool, twins))
    sizes = Counter(1 + copies for copies in Counter(kept for _, kept, _ in twins).values())
    settings = {"minhash": ("ngram", "bands", "rows", "min_jaccard"), "substring": ("span",), "exact": ()}[args.method]
    return dict(read) | kept | dict(report) | {"method": args.method, "clusters_of_size": dict(sorted(sizes.items()))} | {
        name: getattr(args, name) for name in settings}


def named_models(given):
    """{group: model} of --kn: one model for all, or en=lm.en.kn zh=lm.zh.kn."""
    named = [text.partition("=")[::2] if "=" in text else ("*", text) for text in given]
    if len(dict(named)) < len(named):
        raise UsageError(f"--kn {' '.join(given)}: one model for all, or one for each group, as in --kn en=lm.en.kn zh=lm.zh.kn")
    return {group: open_model(path) for group, path in named}


def filter_stage(corpus, temp, args, say):
    """kept.jsonl and dropped.jsonl with the field `ppl`, the latter with `reason`; report.html."""
    rules, models = [name for name in args.rules.split(",") if name], named_models(args.kn)
    if not rules and not models:
        raise UsageError(f"filter needs --kn lm.kn (made by: python data.py kn train), or --rules with some of {','.join(RULES)}")
    if unknown := set(rules) - set(RULES):
        raise UsageError(f"--rules: there is no {', '.join(sorted(unknown))}; use some of {','.join(RULES)}")
    if (args.keep_quantile or args.ppl_range or args.thresholds) and not models:
        raise UsageError("--keep_quantile, --ppl_range and --thresholds judge by perplexity, which needs a model: --kn lm.kn")
    if args.keep_quantile and args.ppl_range:
        raise UsageError("--keep_quantile and --ppl_range are two ways to say the same; give one of them")
    if args.thresholds and not (args.keep_quantile or args.ppl_range or Path(args.thresholds).is_file()):
        raise UsageError(f"--thresholds={args.thresholds} is not there yet; say with --keep_quantile or --ppl_range what to write into it")
    work = lambda documents, report, part: map(line_of, score(documents, models, args.by, rules))
    paths, read = run_parts(corpus, work, temp / "parts", args.workers, say)
    if args.thresholds and Path(args.thresholds).is_file():
        cuts = load_thresholds(args.thresholds, models)
    else:
        groups = defaultdict(list)
        for document in read_lines(paths):
            groups[document["_filter"]["group"]].append(document["ppl"])
        cuts = thresholds(groups, args.keep_quantile, args.ppl_range) if args.keep_quantile or args.ppl_range else {}
        if (args.keep_quantile or args.ppl_range) and not any(ppl is not None for ppls in groups.values() for ppl in ppls):
            raise UsageError(f"no document has a perplexity: the groups are {', '.join(sorted(groups)[:8])}, --kn has models of "
                             f"{', '.join(models)} (* is all others); name them alike, see --by")
        if args.thresholds and cuts:
            save_thresholds(temp / "thresholds.json", cuts, models)
    report = Counter()
    for name, counts in (("kept", report), ("dropped", Counter())):
        with atomic_write(temp / f"{name}.jsonl") as file:
            file.writelines(judge(read_lines(paths), counts, cuts, rules, args.score_only, name == "dropped", args.examples))
    groups = summary(report, cuts, args.examples)
    say(report_text(groups))
    with atomic_write(temp / "report.html", "w") as file:
        file.write(report_html(groups))
    return dict(read) | {"rules": rules, "groups": groups}


def tokenize_stage(corpus, temp, args, say):
    return write_shards(corpus, tok_lib.load(args.tokenizer) if args.tokenizer else None, temp, args, say)


class StoredTexts:
    """The training documents of prepared shards, as a Corpus: parts of documents, decoded."""

    def __init__(self, shards, tok, size=20_000):
        self.shards, self.tok = shards, tok
        self.parts = [range(start, min(start + size, len(shards.starts))) for start in range(0, len(shards.starts), size)]

    def read(self, part, report):
        for number in self.parts[part]:
            ids = self.shards.read(int(self.shards.starts[number]) + 1, int(self.shards.lengths[number]) - 1)
            yield number, self.tok.decode(ids.tolist())


def check_rows(args):
    if not 1 <= args.seq_len <= 1 << 24:
        raise UsageError(f"--seq_len={args.seq_len} must be a whole number from 1 to {1 << 24:,}")
    for name in ("fim_rate", "fim_spm"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(f"--{name}={getattr(args, name)} is a share; use a number from 0 to 1, such as 0.5")


def pack_stage(folder, temp, args, say):
    """The shards of a folder that `tokenize` made, their training documents infilled if asked for, and the table of rows
    of both splits."""
    check_rows(args)
    meta, tok = open_prepared(folder)
    report = {"seq_len": args.seq_len, "method": args.method}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.suffix in (".bin", ".idx") and not (args.fim_rate and path.name.startswith("train")):
            link_or_copy(path, temp / path.name)
    if args.fim_rate:
        tok = with_sentinels(tok)
        infill = Infill(tok, args.fim_rate, args.fim_spm, args.seed, args.seq_len)
        texts = StoredTexts(Shards(folder, "train", meta["eot"]), open_prepared(folder)[1])
        paths, _ = run_parts(texts, lambda documents, report, part: encoded(infill.encode, documents), temp / "parts", args.workers, say)
        with ShardWriter(temp, "train", tok.n_vocab, meta["eot"]) as writer:
            for _, _, ids in itertools.chain.from_iterable(map(decoded, paths)):
                writer.add(ids)
        meta |= {"n_vocab": tok.n_vocab, "train_tokens": writer.total, "fim_rate": args.fim_rate, "fim_spm": args.fim_spm}
    for split in ("train", "val"):
        if meta[f"{split}_tokens"]:
            stream = Shards(temp, split, meta["eot"])
            table = pack(stream.starts, stream.lengths, args.seq_len, args.method)
            for path, column in zip(table_paths(temp, split, args.seq_len, args.method), table):
                with atomic_write(path) as file:
                    np.save(file, column)
            rows, tokens = len(table[0]) - 1, int(table[2].sum())
            report[split] = {"rows": rows, "tokens": tokens, "padding": 1 - tokens / rows / args.seq_len,
                             "documents": len(stream.starts), "documents_longer_than_a_row": int((stream.lengths > args.seq_len).sum()),
                             "cuts": len(table[1]) - len(stream.starts)}
    tok.save(temp / "tokenizer")
    with atomic_write(temp / "meta.json", "w") as file:
        json.dump(meta, file)
    return report


def link_or_copy(path, to):
    """The same file under a second name where the file system can do that."""
    to.unlink(missing_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


STAGES = {                             # in the order that prepare runs them: what does it, the flags that its result depends on
    "norm": (norm_stage, "norm"),
    "dedup": (dedup_stage, "method ngram bands rows min_jaccard span"),
    "filter": (filter_stage, "kn keep_quantile ppl_range by thresholds rules score_only examples"),
    "tokenize": (tokenize_stage, "tokenizer vocab_size pattern tokenizer_mb dtype shard_tokens val_fraction"),
    "pack": (pack_stage, "method seq_len fim_rate fim_spm seed"),
}
NAMED = {"clusters.jsonl": "clusters", "dropped.jsonl": "dropped", "thresholds.json": "thresholds"}      # result: flag to name it


def file_stamps(texts):
    """[path, size, time] of the files that flags such as --tokenizer=folder name."""
    paths = [Path(str(text)) for text in texts if text]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def run_one(name, source, folder, args, say, known=""):
    """One stage from `source` (paths; for pack the folder of tokenize) to `folder`. known: what the source is known by, if
    another stage made it. Returns (report, what the result is known by)."""
    make, flags = STAGES[name]
    corpus = Path(source[0]) if name == "pack" else Corpus(source, folder)
    if name == "pack" and not (corpus / "meta.json").is_file():
        raise UsageError(f"{corpus} holds no shards with a meta.json; give the folder that `data.py tokenize` wrote to")

    def key():
        chosen = {flag: getattr(args, flag) for flag in flags.split()}
        models = [text.partition("=")[2] or text for text in chosen.get("kn") or []]
        files = file_stamps([*models, chosen.get("tokenizer"), chosen.get("thresholds")])
        return [known or (file_stamps([corpus]) if name == "pack" else corpus.fingerprint), chosen, files]

    named = {file: Path(getattr(args, flag)) for file, flag in NAMED.items() if getattr(args, flag, "")}
    inputs = {path for part in getattr(corpus, "parts", ()) for path, *_ in part}
    for path in [*named.values(), folder / "kept.jsonl", folder / "dropped.jsonl"] if name not in ("tokenize", "pack") else ():
        if path.is_dir() or os.path.abspath(path) in inputs:
            raise UsageError(f"{path} cannot take a result: it is a folder, or the input itself; name another place")
    for path in source if not known else ():
        if os.path.isdir(path) and Path(path).resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UsageError(f"--out={folder} lies inside the input {path}, so the results would be read as input next time; "
                             f"name another folder")
    say(f"{name}: {', '.join(map(str, source))} -> {folder}")
    start = time.perf_counter()
    report, known = run_stage(name, folder, key, lambda temp: make(corpus, temp, args, say), say, named)
    for key, value in report.items():
        if key != "groups" and value not in ("", 0, {}):
            say(f"  {key:28s} {value:,}" if isinstance(value, int) else f"  {key:28s} {value}")
    say(f"  {time.perf_counter() - start:.1f} s")
    return report, known


def write_report(path, report):
    if path:
        with atomic_write(path, "w") as file:
            json.dump(report, file, indent=1, ensure_ascii=False)


def stage_command(args):
    report, _ = run_one(args.command, args.input, Path(args.out), args, print)
    write_report(args.report, {args.command: report})


def prepare_command(args):
    """OUT/norm/kept.jsonl and so on; the shards of the last stage lie in OUT itself, where train.py --input=OUT finds them."""
    out, source, known, reports = Path(args.out), args.input, "", {}
    if unknown := set(args.stages) - set(STAGES):
        raise UsageError(f"--stages: there is no stage {', '.join(sorted(unknown))}; use some of {' '.join(STAGES)}")
    stages = [name for name in STAGES if name in args.stages and (name != "filter" or args.kn or args.rules)]
    if "filter" in args.stages and "filter" not in stages:
        print("filter: left out, it needs --kn or --rules")
    if not stages:
        raise UsageError("--stages: filter alone needs --kn or --rules")
    check_rows(args)
    if args.tokenizer:
        tok_lib.load(args.tokenizer)                             # what cannot be is said before the work begins
    for name in stages:
        folder = out if name == stages[-1] else out / name
        table, usual = {"dedup": (DEDUP, "minhash"), "pack": (PACKERS, "bfd")}.get(name, ((), ""))
        mine = SimpleNamespace(**vars(args) | {"method": next((method for method in args.method if method in table), usual)})
        reports[name], known = run_one(name, source, folder, mine, print, known)
        source = [folder] if name == "tokenize" else [folder / "kept.jsonl"]
    with atomic_write(out / "report.json", "w") as file:
        json.dump(reports, file, indent=1, ensure_ascii=False)
    write_report(args.report, reports)
    print(f"done: {out}/report.json" + (f"; train on it with: python train.py --input={out}" if stages[-1] in ("tokenize", "pack") else ""))


# ---- Bench (how fast, next to the libraries that do the same?) ----

def random_windows(path, B, T):
    """A batch as nanoGPT makes it: windows at random places of a file mapped anew, and the same one id later."""
    import torch
    stream = np.memmap(path, dtype=np.uint16, mode="r")
    at_B = torch.randint(len(stream) - T, (B,))
    window = lambda at: torch.from_numpy(stream[at:at + T].astype(np.int64))
    return [torch.stack([window(at + shift) for at in at_B]) for shift in (0, 1)]


def bench_loader(n_tokens=20_000_000, say=print):
    """Million tokens a second of one core's CPU time, best of three in turn: ours and nanoGPT's way, files in the page
    cache; and the packing of a million documents."""
    draw = np.random.default_rng(0)

    def speed(make, tokens):
        begin, rounds = time.process_time(), max(3, 3_000_000 // tokens)
        for number in range(rounds):
            make(number)
        return rounds * tokens / max(1e-9, time.process_time() - begin) / 1e6

    with tempfile.TemporaryDirectory() as folder:
        for name, least, most in (("long", 100_000, 100_001), ("equal", 199, 200), ("short", 100, 300)):
            with ShardWriter(folder, name, 50257, 0) as writer:
                while writer.total < n_tokens:
                    writer.add(draw.integers(1, 50257, draw.integers(least, most)))
        say("M tokens/s     B     T   nanoGPT's way      documents of 100,000        200 each      100 to 299")
        for T, B in itertools.product((256, 1024, 2048), (12, 64)):
            loaders = [Loader(folder, name, T, eot=0) for name in ("long", "equal", "short")]
            ways = [lambda i: random_windows(f"{folder}/long_000000.bin", B, T)] + [
                lambda i, loader=loader: loader.samples(i * B, B) for loader in loaders]
            base, *ours = np.max([[speed(way, B * T) for way in ways] for _ in range(3)], axis=0)
            say(f"{B:16d} {T:5d} {base:15.0f}" + "".join(f"{each:11.0f} ({each / base:4.1f}x)" for each in ours))
    lengths = np.maximum(1, draw.lognormal(6.3, 1.3, 1_000_000)).astype(np.int64)
    say("1,000,000 documents in rows of 2,048      rows   padding      cuts   CPU seconds")
    for method in PACKERS:
        begin = time.process_time()
        first, _, length = pack(np.cumsum(lengths) - lengths, lengths, 2048, method)
        rows, cuts, took = len(first) - 1, len(length) - len(lengths), time.process_time() - begin
        say(f"  {method:34s} {rows:9,} {1 - length.sum() / 2048 / rows:9.4%} {cuts:9,} {took:13.2f}")


def bench(args):
    """Each row: CPU seconds, best of --rounds runs in turn, and the ratio to the peers; then packing and the loader."""
    import importlib
    import subprocess
    peers = {}
    for name in ("kenlm", "datasketch"):
        with contextlib.suppress(ImportError):
            peers[name] = importlib.import_module(name)
    corpus = Corpus(args.input)
    texts = [document["text"] for document in corpus.documents(Counter())]
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: str(Path(folder) / name)
        Path(path("text")).write_bytes(SPECIAL.sub(b"", b"".join(text.encode("utf-8", "replace") + b"\n" for text in texts)))
        estimated = lambda: estimate([path("text")], args.order)
        lmplz = [args.lmplz, "-o", str(args.order), "-S", "1G", "-T", folder, "--text", path("text"), "--arpa", path("theirs.arpa")]
        works = {"lmplz": lambda: subprocess.run(lmplz, check=True, stderr=subprocess.DEVNULL)} if args.lmplz else {}
        works |= {"ours, ARPA": lambda: write_arpa(estimated(), path("ours.arpa")),
                  "ours, model": lambda: save_model(estimated(), path("lm.kn"))}
        tok_lib.race(f"kn train --order {args.order}, {os.path.getsize(path('text')) / 1e6:.1f} MB", works, args.rounds)

        model, lines = open_model(path("lm.kn")), Path(path("text")).read_bytes().split(b"\n")[:200_000]
        block = b"\n".join(lines)
        ids, starts = model.ids(block)
        works = {"ours, from text": lambda: model.score(*model.ids(block)), "ours, on ids": lambda: model.score(ids, starts)}
        if "kenlm" in peers:
            strings, theirs = [line.decode("utf-8", "surrogateescape") for line in lines], peers["kenlm"].Model(path("ours.arpa"))
            works = {"kenlm full_scores": lambda: [deque(theirs.full_scores(line), 0) for line in strings],
                     "kenlm score": lambda: [theirs.score(line) for line in strings]} | works
        thrice = {name: lambda work=work: [work() for _ in range(3)] for name, work in works.items()}      # pages are mapped once
        tok_lib.race(f"kn query, {len(ids):,} words, three times", thrice, args.rounds)

        settings = SimpleNamespace(method="minhash", ngram=5, bands=14, rows=8, min_jaccard=0.7)
        documents = [{"text": text} for text in texts]
        works = {"ours": lambda: [*records(documents, settings)]}
        if "datasketch" in peers:
            def datasketch():
                for text in texts:
                    words = re.findall(r"\w+", text.lower())
                    sketch = peers["datasketch"].MinHash(num_perm=112)
                    sketch.update_batch([" ".join(words[i:i + 5]).encode() for i in range(max(1, len(words) - 4))])
            works = {"datasketch": datasketch} | works
        tok_lib.race(f"minhash signatures of {corpus.bytes / 1e6:.1f} MB, 112 permutations", works, args.rounds)
    print()
    bench_loader()


# ---- Command line ----

def byte_count(text):
    """2G, 500M, 64K or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.upper())
    if not found:
        raise UsageError(f"--mem={text} is not a size; say 2G, 500M or a number of bytes")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def kn_train(args):
    if not args.out and not args.arpa:
        raise UsageError("kn train writes nothing without --out lm.kn or --arpa lm.arpa")
    if args.out and args.arpa and os.path.abspath(args.out) == os.path.abspath(args.arpa):
        raise UsageError(f"--out and --arpa both name {args.out}; give two names")
    report, start = Counter(), time.perf_counter()
    ngrams = estimate(args.input, args.order, unit=settled_unit(args.unit), norm=args.norm, prune=args.prune,
                      discount_fallback=args.discount_fallback, skip_symbols=args.skip_symbols, limit_vocab=args.limit_vocab_file,
                      vocab_pad=args.vocab_pad, interpolate_unigrams=args.interpolate_unigrams, mem=byte_count(args.mem),
                      workers=args.workers or cores(), report=report, tmp=os.path.dirname(args.out or args.arpa))
    if args.arpa:
        write_arpa(ngrams, args.arpa)
    if args.out:
        save_model(ngrams, args.out, args.quant)
    if skipped := tok_lib.warn_about(report):
        print(f"skipped {skipped}", file=sys.stderr)
    counts = " ".join(f"{len(logp):,}" for logp in ngrams.logp[1:])
    print(f"{counts} n-grams of orders 1 to {args.order} in {time.perf_counter() - start:.1f} s -> {args.out or args.arpa}")


def kn_convert(args):
    model = open_model(args.model).ngrams()
    if args.out.endswith(".arpa"):
        write_arpa(model, args.out)
    else:
        save_model(model, args.out, args.quant)


def inspect_command(args):
    """What is inside: of shards, models and text."""
    report = {}
    for path in args.input:
        if (Path(path) / "meta.json").is_file():
            report[path] = inspect_shards(Path(path))
        elif path.endswith((".kn", ".arpa")):
            model = open_model(path)
            report[path] = {"n-grams": model.counts[1:], "unit": model.unit, "norm": model.norm, "quant": model.quant,
                            "bytes": os.path.getsize(path)}
        else:
            with tempfile.TemporaryDirectory() as spool:
                report[path] = inspect_text(Corpus([path], spool))
        print(path, *(f"  {key:14s} {value}" for key, value in report[path].items()), sep="\n")
    write_report(args.report, report)
    if args.out:
        write_report(Path(args.out) / "report.json", report)


def spread(numbers):
    """The smallest, the tenths and the largest of some numbers."""
    return [int(x) for x in np.quantile(numbers, np.arange(11) / 10)] if len(numbers) else []


def inspect_shards(folder):
    meta, tok = open_prepared(folder)
    found = dict(meta)
    for split in ("train", "val"):
        if meta[f"{split}_tokens"]:
            shards = Shards(folder, split, meta["eot"])
            found |= {f"{split} files": len(shards.parts), f"{split} type": str(shards.parts[0].dtype), f"{split} documents": len(shards.starts),
                      f"{split} lengths": spread(shards.lengths), f"{split} begins": repr(tok.decode(shards.read(0, 40).tolist()))}
    return found


def inspect_text(corpus):
    report, sizes, languages, fields, texts = Counter(), [], Counter(), Counter(), set()
    for document in corpus.documents(report):
        sizes.append(n_bytes(document["text"]))
        languages[tok_lib.language_of(document)] += 1
        fields.update(document.keys())
        texts.add(digest(document["text"]))
    return {"documents": len(sizes), "bytes": sum(sizes), "lengths": spread(sizes), "languages": dict(languages.most_common(8)),
            "fields": dict(fields), "exact copies": len(sizes) - len(texts), "skipped": tok_lib.warn_about(report) or "nothing"}


IN = ("INPUT", list, ".txt, .jsonl, .jsonl.gz, folders, - for stdin")
OUT, REPORT = ("out", str, "folder for the results"), ("report", "", "JSON file for what was done, counted")
WORKERS = ("workers", 0, "processes; the result is the same for any number (0: one a core)")
NORM = [("norm", "mild", "what to do to texts", [*NORMALIZE])]
DUPLICATES = [("ngram", 5, "minhash: units (words, or characters of scripts without spaces) in a shingle"),
              ("bands", 14, "minhash: documents are compared where all rows of a band agree"), ("rows", 8, "minhash: minima in a band"),
              ("min_jaccard", 0.7, "minhash: share of common shingles from which documents are duplicates"),
              ("span", 50, "substring: so many units in a row stand only once"),
              ("clusters", "", "file for what was dropped and what it resembled (OUT/clusters.jsonl)")]
FILTER = [("kn", [], "model of good text, or group=model for several, with --by"),
          ("keep_quantile", [], "keep perplexities between these two shares of all, such as .05 .6", {"type": tok_lib.number, "nargs": 2}),
          ("ppl_range", [], "keep perplexities between these two, such as 20 800", {"type": tok_lib.number, "nargs": 2}),
          ("by", "", "field that says which group a document belongs to, such as meta.lang; each group has its own cuts"),
          ("thresholds", "", "file of cuts: used if it is there, else written"),
          ("rules", "", f"some of {','.join(RULES)}"), ("score_only", False, "keep every document, with its score and reason"),
          ("dropped", "", "file for the other documents, with a reason (OUT/dropped.jsonl)"),
          ("examples", 5, "of each side of each cut, in the report")]
TOKENS = [("dtype", "auto", "of an id on disk", ["auto", "uint16", "uint32"]), ("shard_tokens", SHARD_TOKENS, "ids in a file"),
          ("val_fraction", 0.001, "share of the text, whole documents at its end, held out for validation"),
          ("vocab_size", 32_768, "without --tokenizer: tokens to learn"), ("pattern", "cl100k", "without --tokenizer: how to cut words"),
          ("tokenizer_mb", 100.0, "without --tokenizer: megabytes to learn from")]
ROWS = [("seq_len", 2048, "places in a row"), ("fim_rate", 0.0, "share of the documents whose middle moves to their end"),
        ("fim_spm", 0.5, "share of those where the suffix comes first"), ("seed", 0, "of the infilling")]
COMMANDS = {            # (who does it, help, flags: (name, default or, where it must be given, its type, help, choices or options))
    "kn train": (kn_train, "estimate a modified Kneser-Ney model", [
        IN, ("order", 5, "words in the longest n-gram"), ("out", "", "model file"), ("arpa", "", "ARPA file"),
        ("prune", [], "drop n-grams seen so often or less, for each order, such as 0 0 1", {"type": tok_lib.integer}),
        ("discount_fallback", None, "discounts where the counts allow none (.5 1 1.5)", {"type": tok_lib.number, "nargs": "*"}),
        ("skip_symbols", False, "treat <s>, </s>, <unk> in the text as blanks"),
        ("limit_vocab_file", "", "keep only n-grams of these words"),
        ("vocab_pad", 0, "size of the vocabulary for the uniform share of unknown words"),
        ("interpolate_unigrams", True, "give every word its share of the uniform distribution"),
        ("mem", "0", "memory to stay within, such as 2G; then sorts on disk (0: any)"),
        ("unit", "space", "what a word is: space, char, tok:FILE"),
        ("norm", "none", "what to do to text first", [*NORMALIZE]),
        ("quant", 0, "bits of a packed value; 0: plain arrays and hash tables"), WORKERS]),
    "kn arpa": (kn_convert, "convert between ARPA and model files", [
        ("MODEL", str, "lm.kn or lm.arpa"), ("out", str, "X.arpa, or another name for a model file"),
        ("quant", 0, "bits of a packed value")]),
    "kn query": (lambda args: query(args.model, args.input, args.summary), "log10 p, n-gram length and oov of each word; totals", [
        ("MODEL", str, "lm.kn or lm.arpa"), ("INPUT", "-", "text, a sentence a line (stdin)", {"nargs": "?"}),
        ("summary", False, "totals only")]),
    "norm": (stage_command, "normalise texts", [IN, OUT, REPORT, *NORM, WORKERS]),
    "dedup": (stage_command, "drop copies", [IN, OUT, REPORT, ("method", "minhash", "what a copy is", [*DEDUP]), *DUPLICATES, WORKERS]),
    "filter": (stage_command, "score texts with a model of good text, check rules, drop what fails", [IN, OUT, REPORT, *FILTER, WORKERS]),
    "tokenize": (stage_command, "turn documents into shards of ids", [
        IN, OUT, REPORT, ("tokenizer", "", "folder, file or name; without it one is learned from the text"), *TOKENS, WORKERS]),
    "pack": (stage_command, "give documents their places in rows, infill them", [
        ("INPUT", list, "the folder of `tokenize`", {"nargs": 1}), OUT, REPORT,
        ("method", "bfd", "how documents fill rows", [*PACKERS]), *ROWS, WORKERS]),
    "inspect": (inspect_command, "say what text, shards or models hold", [IN, ("out", "", "folder for report.json"), REPORT]),
    "prepare": (prepare_command, "norm, dedup, filter, tokenize, pack in one go", [
        IN, OUT, REPORT, ("stages", [*STAGES], "which of them", {"choices": None}), *NORM,
        ("method", ["minhash", "bfd"], "of dedup and of packing", [*DEDUP, *PACKERS]), *DUPLICATES, *FILTER,
        ("tokenizer", "", "folder, file or name; without it one is learned"), *TOKENS, *ROWS, WORKERS]),
    "bench": (lambda args: bench(args), "time all of it against the libraries that are installed", [
        ("INPUT", list, "text (without it: the sources of Python's standard library)", {"nargs": "*"}), ("order", 3, "of the n-gram model"),
        ("lmplz", "", "path of kenlm's lmplz, to race it"), ("rounds", 3, "runs of each, in turn; the best counts")]),
}


def main(argv):
    if not argv:
        return demo()
    if argv[0] == "kn" and argv[1:] in ([], ["-h"], ["--help"]):
        argv = ["--help"]
    if argv[0] == "kn":
        argv = [" ".join(argv[:2]), *argv[2:]]
    sys.stdin = sys.stdin or open(os.devnull)                    # it may be closed
    try:
        tok_lib.run_commands(argv, "data.py", "Clean, deduplicate, filter, tokenise and pack text.", COMMANDS)
    except BrokenPipeError:
        raise
    except OSError as error:                                     # a full disk, a folder that is not ours to write
        raise UsageError(f"{error.filename or 'writing the results'}: {error.strerror or error}; mend that and run the same again: "
                         f"what is complete is kept") from None


# ---- Demo ----

def demo():
    with tempfile.TemporaryDirectory() as folder:
        cfg = DataConfig(cache_dir=folder)
        for name in ("tokenizer", "pattern", "tokenizer_mb"):
            setattr(cfg, name, getattr(tok_lib.TokenizerConfig(), name))
        where = prepare(cfg, 2048, folder)
        meta, tok = open_prepared(where)
        print(f"data: {meta['documents']:,} documents, {(meta['train_bytes'] + meta['val_bytes']) / 1e6:.1f} MB -> "
              f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens "
              f"({meta['train_bytes'] / meta['train_tokens']:.2f} bytes a token)\n")
        stream = Shards(where, "train")
        print("packing of documents into rows of 512:     rows   padding   documents cut")
        for method in PACKERS:
            first, start, length = pack(stream.starts, stream.lengths, 512, method)
            pieces = np.bincount(np.searchsorted(stream.starts, start, "right"))
            print(f"  {method:36s} {len(first) - 1:8,} {1 - length.sum() / 512 / (len(first) - 1):9.3%} {(pieces > 1).sum():15,}")
        loader = Loader(where, "train", 96, seed=0, eot=meta["eot"])
        print("\nfour samples of 96 ids; a letter for each document in a row, . for padding:")
        for number, row in enumerate(loader.samples(0, 4)["doc_ids"].tolist()):
            print(f"  sample {number} = row {loader.rows([number])[0]:6d}  {''.join('.' if d < 0 else chr(97 + d) for d in row)}")
        head = loader.samples(0, 1)["tokens"][0, :24].tolist()
        print(f"\nand the first one begins {tok.decode(head)!r}")


if __name__ == "__main__":
    tok_lib.run_cli(main)
