"""Tokenizer: how text becomes ids.

A language model reads whole numbers, so text must become a short list of them, and any text whatever must come
back unchanged. Byte-level BPE starts from the 256 bytes, so that nothing is ever unknown, and learns which
neighbours belong together: again and again the most frequent pair becomes one new token. What it learned is the
list of merges in order; encoding replays that list inside each pre-token.

    train:   (a, b) = argmax_{a,b} count(a b);   every "a b" becomes "ab";   repeat                  [BPE alg 1]
    encode:  while some neighbours "a b" were merged in training: merge those that were merged first
    decode:  the bytes of the ids, joined

Pre-tokens (a regular expression cuts text into words, numbers, runs of space) keep merges inside words and make
training cheap: a corpus is a table of unique words with counts.                                    [GPT2 sec 2.2]

Contents:    flags | files | pre-token patterns | training | Tokenizer | ByteBPE | load and save | command line
References:
    [BPE]    Neural Machine Translation of Rare Words with Subword Units, arXiv:1508.07909
    [GPT2]   Language Models are Unsupervised Multitask Learners, OpenAI 2019
Run me:      python tokenizer.py                  (trains a vocabulary on a paragraph and shows every merge at work)
             python tokenizer.py train --vocab_size=4096 --input book.txt --out tok
"""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import gzip
import heapq
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import tiktoken


# ---- Flags (how does a dataclass become a command line?) ----

class UsageError(ValueError):
    """Something a user can type or mend: what was wrong, what was expected, a value that works. Exit code 2."""


def flag(default, bare=None, many=False):
    """A config field that may also stand bare on the command line (`--resume`) or take many values (`--input a b`)."""
    return dataclasses.field(default=default, metadata=dict(bare=bare, many=many))


@dataclass
class TokenizerConfig:
    tokenizer: str = ""            # folder, file or name of a ready tokenizer; empty trains one on the input
    pattern: str = "cl100k"        # how a tokenizer trained here cuts text into pre-tokens, a key of PATTERNS or a regex
    tokenizer_mb: float = 2.0      # megabytes of training text that a tokenizer trained here looks at; 0 means all


def integer(text):
    """A whole number, also written 1_000 or 1e6."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError, OverflowError):
        if float(text) == int(float(text)):
            return int(float(text))
    raise argparse.ArgumentTypeError(f"expected a whole number such as 8 or 1e6, not {text!r}")


def number(text):
    with contextlib.suppress(ValueError):
        if float(text) == float(text):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number such as 0.1 or 3e-4, not {text!r}")


def truth(text):
    words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return words[text.lower()]


READ_AS = {int: integer, float: number, bool: truth, str: str, tuple: str}


class Parser(argparse.ArgumentParser):
    """argparse that never guesses an abbreviation, says errors in one line and suggests the nearest flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UsageError(re.sub(r"\(choose from (.*)\)", r"(use \1)", message.removeprefix("argument ")))

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            near = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), flags, 1, 0.5)
            raise UsageError(f"there is no flag {name}" + (f"; did you mean {near[0]}?" if near else "")
                             + " (--help lists them all)" if name.startswith("-") else
                             f"{unknown[0]!r} stands alone; every value follows a flag, as in --steps=100")
        return known


@functools.cache
def read_config(path):
    """What the source text of a file says of its flags, without importing it (torch takes seconds to import, a typing
    error should not): ({field: (default, comment, bare, many)}, {flag: choices}).

    A field of the file's `@dataclass class ...Config` is a flag; a dict or tuple whose first line ends in
    `# flag --name` lists the values that flag may take."""
    source = Path(path).read_text(encoding="utf-8")
    lines, fields, choices = source.split("\n"), {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for item in (n for n in node.body if isinstance(n, ast.AnnAssign)):
                comment = lines[item.end_lineno - 1][item.end_col_offset:].partition("#")[2].strip()
                value, options = item.value, {}
                if isinstance(value, ast.Call):                  # flag(default, bare=..., many=...)
                    options = {k.arg: ast.literal_eval(k.value) for k in value.keywords}
                    value = value.args[0]
                fields[item.target.id] = (ast.literal_eval(value), comment, options.get("bare"), options.get("many"))
        elif isinstance(node, ast.Assign) and "# flag --" in lines[node.lineno - 1]:
            name = re.search(r"# flag --(\w+)", lines[node.lineno - 1])[1]
            entries = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            choices[name] = [ast.literal_eval(entry) for entry in entries]
    return fields, choices


def add_flags(parser, files):
    """One flag per config field, grouped by the file that owns it: the field's name is the flag, its default gives the
    type, its trailing comment is the help. Only flags that were typed appear in the parsed namespace."""
    read = {Path(path).name: read_config(path) for path in files}
    choices = {flag: values for _, table in read.values() for flag, values in table.items()}
    for file, (fields, _) in read.items():
        group = parser.add_argument_group(file)
        for name, (default, comment, bare, many) in fields.items():
            how = dict(type=READ_AS[type(default)], default=argparse.SUPPRESS, metavar=name.upper())
            if name in choices:
                how["choices"] = choices[name]
                how.pop("metavar")
            if isinstance(default, bool):
                how.update(nargs="?", const=True, metavar="BOOL")
            elif bare is not None:
                how.update(nargs="?", const=bare)
            elif many:
                how.update(nargs="+")
            group.add_argument(f"--{name}", help=f"{comment} (default: {default!r})".replace("%", "%%"), **how)


@contextlib.contextmanager
def plain_errors():
    """A user's mistake is one line on stderr and exit code 2, never a traceback."""
    try:
        yield
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":                  # under torchrun one rank speaks for all
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:                                     # python FILE.py | head: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def run_cli(main):
    """The entry of every file: main(argv) with plain errors."""
    with plain_errors():
        main(sys.argv[1:])
        sys.stdout.flush()


def cores():
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- Files (where documents come from, and how nothing is ever left half written) ----

@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that appears under its name whole or not at all: temp file beside it, fsync, rename, fsync folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path):
    """A rename survives a power cut only once the folder that holds the name is on disk too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


REFUSED = {".parquet": "convert it to .jsonl first", ".arrow": "convert it to .jsonl first", ".zip": "unpack it first",
           ".zst": "recompress it as .gz", ".bz2": "recompress it as .gz", ".xz": "recompress it as .gz",
           ".tar": "unpack it first", ".tgz": "unpack it first", ".pdf": "extract its text first"}


def input_files(paths):
    """The files behind what a user named: files as given, folders as their files in path order, '-' for stdin."""
    found = []
    for path in map(str, paths):
        if path == "-" or os.path.isfile(path):
            found.append(path)
        elif os.path.isdir(path):
            inside = sorted(p for p in Path(path).rglob("*") if p.is_file() and not any(
                part.startswith(".") for part in p.relative_to(path).parts))
            if not inside:
                raise UsageError(f"the folder {path} holds no files; put .txt, .jsonl or .jsonl.gz files into it")
            found += map(str, inside)
        else:
            raise UsageError(f"there is no file or folder {path}; give text (.txt), .jsonl, .jsonl.gz, a folder, or - for stdin")
    for path in found:
        if path != "-" and Path(path).suffix in REFUSED and path in map(str, paths):
            raise UsageError(f"{path}: {Path(path).suffix} files are not read here; {REFUSED[Path(path).suffix]}")
    return found


def decode_utf8(raw, report):
    """Text of bytes; bytes that are not UTF-8 are left out and counted in report['bad_bytes']."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "ignore")
        report["bad_bytes"] += len(raw) - len(text.encode("utf-8"))
        return text


def documents(paths, report):
    """Yield every document as a dict with `text`: one a line of .jsonl / .jsonl.gz, else one a file.

    Nothing is fatal and nothing is silent: `report` (a Counter) counts files, documents, bad_lines, bad_bytes,
    empty documents and the files of a folder that are not text."""
    for path in input_files(paths):
        report["files"] += 1
        suffixes = [s for s in Path(path).suffixes if s != ".gz"][-1:]
        opened = sys.stdin.buffer if path == "-" else gzip.open(path) if path.endswith(".gz") else open(path, "rb")
        try:
            with contextlib.nullcontext(opened) if path == "-" else opened as file:
                lines = file if suffixes == [".jsonl"] else [file.read()]
                for number, raw in enumerate(lines, 1):
                    if suffixes == [".jsonl"]:
                        document = _parse_line(raw, report)
                    elif b"\0" in raw[:4096] or Path(path).suffix in REFUSED:
                        report["not_text"] += 1
                        continue
                    else:
                        document = {"text": decode_utf8(raw, report)}
                    if document is not None and not document["text"]:
                        report["empty"] += 1
                    elif document is not None:
                        report["documents"] += 1
                        yield document
        except (OSError, EOFError) as error:                    # EOFError: a .gz that was cut short
            raise UsageError(f"{path}: cannot be read ({error}); mend or leave out this file") from None


def _parse_line(raw, report):
    if not raw.strip():
        return None
    try:
        document = json.loads(decode_utf8(raw, report))
        if isinstance(document["text"], str):
            return document
    except (json.JSONDecodeError, KeyError, TypeError):
        pass                                                    # counted below with the lines of a wrong shape
    report["bad_lines"] += 1
    return None


def warn_about(report):
    """What the readers skipped, in one line, or '' when there was nothing to skip."""
    says = dict(bad_lines="lines without a JSON object with a text", bad_bytes="bytes that are not UTF-8",
                empty="empty documents", not_text="files that are not text")
    return ", ".join(f"{report[key]:,} {text}" for key, text in says.items() if report[key])


# ---- Pre-token patterns (where may a token never reach across?) ----

PATTERNS = {                         # every character of a text falls in exactly one match
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
              r"""\s*[\r\n]+|\s+(?!\S)|\s+""",
}


@functools.cache
def compiled(pattern):
    try:
        return regex.compile(PATTERNS.get(pattern, pattern))
    except regex.error as error:
        raise UsageError(f"--pattern={pattern}: neither one of {list(PATTERNS)} nor a regular expression ({error})") from None


# ---- Training (which neighbours belong together?) ----

@functools.cache
def byte_alphabet():
    """The 256 bytes in the order of the printable characters that stand for them in GPT-2's vocabulary files.

    Printable Latin-1 bytes stand for themselves, the 68 others take the code points from 256 on; sorting by that
    character puts '!' first. Returns {byte: character}, in that order. [GPT2, released encoder]"""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_in = {b: chr(b) for b in plain}
    stand_in |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in stand_in)}
    return dict(sorted(stand_in.items(), key=lambda item: item[1]))


def count_pretokens(texts, pattern):
    """Counter of the pre-tokens of all texts; the corpus itself is never held."""
    counts, find = Counter(), compiled(pattern).findall
    for text in texts:
        counts.update(find(text))
    return counts


def train_bbpe(pretoken_counts, vocab_size, min_frequency=0, progress=None):
    """Learn byte-level BPE; returns ranks {token bytes: id} of at most vocab_size tokens.

    The pair with the highest count is merged; of equal counts the one with the smallest (left id, right id). That and
    the order of ids (byte_alphabet, then merges) equal Hugging Face's BpeTrainer. Counts are int64.

    All unique words lie in one array of symbols joined by links. A pair (x, y) can only come into being in the step
    that makes the younger of x and y; from then on its count falls. So the count it was born with is an upper bound,
    a heap of upper bounds finds the true maximum (look again when popped, push back if it fell), and pairs born below
    a threshold need not be kept at all until the maximum has sunk to the threshold, when everything is counted anew.
    """
    if vocab_size < 256:
        raise UsageError(f"--vocab_size={vocab_size} is smaller than the 256 bytes every text is made of; use 256 or more")
    order = list(byte_alphabet())
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    if not pretoken_counts:
        return ranks
    spelled = list(ranks)
    sym, nxt, prv, weight = _word_links(pretoken_counts, np.argsort(order).astype(np.int32))
    threshold, heap, where = np.inf, [], {}
    while len(ranks) < vocab_size:
        if not heap or -heap[0][0] < threshold:                  # below it there may be pairs that nobody kept
            if threshold <= 1:
                break
            pos = np.flatnonzero((sym >= 0) & (sym[nxt] >= 0))
            keys, counts, places = _group_pairs(sym[pos], sym[nxt[pos]], pos, weight)
            threshold = max(1, min(threshold, counts.max(initial=1) + 1) // 4)
            heap, where = [], {}
            _keep_frequent(keys, counts, places, threshold, heap, where)
            continue
        bound, left, right = heapq.heappop(heap)
        pos = where[left, right]
        pos = pos[(sym[pos] == left) & (sym[nxt[pos]] == right)]
        count = int(weight[pos].sum())
        if count != -bound:                                      # it fell since it was pushed: not the maximum, or not yet known to be
            where[left, right] = pos
            if count >= threshold:
                heapq.heappush(heap, (-count, left, right))
            continue
        if count < max(1, min_frequency):
            break
        token = spelled[left] + spelled[right]
        new = ranks.setdefault(token, len(spelled))
        if new == len(spelled):
            spelled.append(token)
        else:                                                    # the same spelling by another merge: old pairs can grow,
            threshold, heap = np.inf, []                         # so no bound holds any more: count anew
        del where[left, right]
        pos = _merge(pos, left == right, new, sym, nxt, prv)
        after, before = pos[sym[nxt[pos]] >= 0], prv[pos]
        before = before[(sym[before] >= 0) & (sym[before] != new)]      # (new, new) is already among the pairs after
        born = np.concatenate([after, before])
        if len(born):
            _keep_frequent(*_group_pairs(sym[born], sym[nxt[born]], born, weight), threshold, heap, where)
        if progress and len(ranks) % 256 == 0:
            progress(len(ranks))
    return ranks


def _word_links(pretoken_counts, id_of_byte):
    """All words one after the other, a wall (-1) between them: symbols, next and previous positions, word counts."""
    words = [word.encode("utf-8", "surrogatepass") for word in pretoken_counts]
    lengths = np.array([len(word) + 1 for word in words])
    text = np.frombuffer(b"\0".join(words) + b"\0", dtype=np.uint8)
    sym = np.empty(len(text) + 1, dtype=np.int32)
    sym[1:] = id_of_byte[text]
    sym[np.concatenate([[0], np.cumsum(lengths)])] = -1
    position = np.arange(len(sym), dtype=np.int64)
    weight = np.zeros(len(sym), dtype=np.int64)
    weight[1:] = np.repeat(np.fromiter(pretoken_counts.values(), dtype=np.int64, count=len(words)), lengths)
    return sym, np.minimum(position + 1, len(sym) - 1), np.maximum(position - 1, 0), weight


def _group_pairs(left, right, pos, weight):
    """Positions grouped by the pair that stands there: keys (left << 32 | right), counts, list of position arrays."""
    key = left.astype(np.int64) << 32 | right
    order = np.argsort(key, kind="stable")
    key, pos = key[order], pos[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else np.zeros(0, np.int64)
    counts = np.add.reduceat(weight[pos], first) if len(key) else np.zeros(0, np.int64)
    return key[first], counts, (pos, np.append(first, len(pos)))


def _keep_frequent(keys, counts, places, threshold, heap, where):
    pos, edge = places
    for i in np.flatnonzero(counts >= threshold):
        pair = (int(keys[i]) >> 32, int(keys[i]) & 0xFFFFFFFF)
        where[pair] = np.sort(pos[edge[i]:edge[i + 1]])
        heapq.heappush(heap, (-int(counts[i]), *pair))


def _merge(pos, same, new, sym, nxt, prv):
    """Write `new` over the pairs at pos, left to right and without overlap; returns the positions used."""
    if same and len(pos) > 1:                                    # "aaa" holds (a, a) twice but merges once: take every
        starts = np.concatenate([[True], nxt[pos[:-1]] != pos[1:]])          # second position of each run
        index = np.arange(len(pos))
        pos = pos[(index - np.maximum.accumulate(np.where(starts, index, 0))) % 2 == 0]
    second = nxt[pos]
    follower = nxt[second]
    sym[pos], sym[second] = new, -2
    nxt[pos] = follower
    prv[follower] = pos
    return pos


# ---- Tokenizer (the contract) ----

class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text, exactly inverse. Subclasses give `encode_plain`, `token_bytes`, `save`.

    `special` maps names such as '<|endoftext|>' to ids past all ordinary ones. Text never turns into a special id
    unless the caller allows that name."""
    special: dict[str, int]
    n_vocab: int

    def encode_plain(self, text):
        raise TypeError(f"{type(self).__name__} must define encode_plain")

    def encode(self, text, allowed_special=()):
        """ids of a str. `allowed_special`: names of special tokens to recognise in the text, or 'all'."""
        allowed = self.special if allowed_special == "all" else {n: self.special[n] for n in allowed_special}
        if not allowed:
            return self.encode_plain(text)
        longest_first = "|".join(map(re.escape, sorted(allowed, key=len, reverse=True)))
        parts = re.split(f"({longest_first})", text)
        return [i for part in parts if part for i in ([allowed[part]] if part in allowed else self.encode_plain(part))]

    def encode_batch(self, texts):
        return [self.encode_plain(text) for text in texts]

    def decode(self, ids):
        """Text of ids; bytes that are not whole UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


def clean_surrogates(text):
    """What tiktoken does with code points that UTF-8 cannot hold: pairs are joined, lone halves become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ByteBPE(Tokenizer):
    """Byte-level BPE. `ranks` {token bytes: id} is the whole model: a lower id was merged earlier."""

    def __init__(self, ranks, pattern, special=()):
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            raise UsageError(f"a byte-level vocabulary must hold all 256 bytes; missing {missing[:8]}")
        self.ranks, self.pattern = ranks, pattern
        top = max(ranks.values()) + 1
        self.special = dict(special) if isinstance(special, dict) else {name: top + i for i, name in enumerate(special)}
        self.bytes_of = {i: token for token, i in ranks.items()} | {i: n.encode() for n, i in self.special.items()}
        self.n_vocab = max(self.bytes_of) + 1
        self.cache = {}

    @functools.cached_property
    def core(self):
        """tiktoken's Rust encoder over the same ranks: the accelerator, with the ids of encode_reference."""
        return tiktoken.Encoding("ranks", pat_str=compiled(self.pattern).pattern, mergeable_ranks=self.ranks,
                                 special_tokens=self.special)

    def encode_plain(self, text):
        return self.core.encode_ordinary(text)

    def encode_batch(self, texts):
        return self.core.encode_ordinary_batch(list(texts), num_threads=cores())

    def encode_reference(self, text):
        """The definition: cut into pre-tokens, replay the merges in each. Pure Python, equal to encode_plain."""
        ids = []
        for piece in compiled(self.pattern).findall(clean_surrogates(text)):
            if piece not in self.cache:
                if len(self.cache) > 100_000:
                    self.cache.clear()
                self.cache[piece] = self.merge(piece.encode("utf-8"))
            ids += self.cache[piece]
        return ids

    def merge(self, piece):
        """ids of one pre-token: the neighbours with the lowest rank merge first, of equals the leftmost.

        A heap of candidate merges with links between the parts, so a piece of n bytes costs O(n log n)."""
        rank, n = self.ranks.get, len(piece)
        if (whole := rank(piece)) is not None:
            return [whole]
        end = list(range(1, n + 1))                              # part i is piece[i:end[i]]; end[i] is its right neighbour
        before = list(range(-1, n))
        alive = [True] * n + [False]
        heap = [(r, i, i + 2) for i in range(n - 1) if (r := rank(piece[i:i + 2])) is not None]
        heapq.heapify(heap)
        while heap:
            _, i, stop = heapq.heappop(heap)
            j = end[i]
            if not alive[i] or j >= n or not alive[j] or end[j] != stop:
                continue                                         # one of the two parts was merged with another since
            alive[j], end[i], before[stop] = False, stop, i
            for a, b in ((before[i], stop), (i, end[stop] if stop < n else 0)):
                if a >= 0 and b and (r := rank(piece[a:b])) is not None:
                    heapq.heappush(heap, (r, a, b))
        return [self.ranks[piece[i:end[i]]] for i in range(n) if alive[i]]

    def token_bytes(self, id):
        """The bytes a token stands for (a special token: its name)."""
        if id not in self.bytes_of:
            raise UsageError(f"token id {id} is not in this vocabulary of {self.n_vocab} (0 to {self.n_vocab - 1})")
        return self.bytes_of[id]

    def merges(self):
        """The merges in order, as pairs of token bytes: each token is made of what the earlier ones make of it."""
        made = []
        for token, i in sorted(self.ranks.items(), key=lambda item: item[1]):
            if len(token) > 1:
                earlier = ByteBPE.__new__(ByteBPE)
                earlier.ranks = _Below(self.ranks, i)
                made.append(tuple(self.bytes_of[k] for k in earlier.merge(token)))
        return made

    def save(self, path):
        """Write PATH/tokenizer.json, which Hugging Face's tokenizers opens with the same ids."""
        stand_in = byte_alphabet()
        show = lambda token: "".join(stand_in[b] for b in token)
        split = dict(type="Split", pattern=dict(Regex=compiled(self.pattern).pattern), behavior="Isolated", invert=False)
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        added = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                 for name, i in self.special.items()]
        model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                     fuse_unk=False, byte_fallback=False, ignore_merges=False,
                     vocab={show(token): i for token, i in self.ranks.items()},
                     merges=[[show(a), show(b)] for a, b in self.merges()])
        with atomic_write(Path(path) / "tokenizer.json", "w") as file:
            json.dump(dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                           pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]), post_processor=None,
                           decoder=level, model=model), file, ensure_ascii=False)


class _Below:
    """ranks as they were before token `limit` was learned."""

    def __init__(self, ranks, limit):
        self.ranks, self.limit = ranks, limit

    def get(self, token):
        rank = self.ranks.get(token)
        return rank if rank is not None and rank < self.limit else None

    def __getitem__(self, token):
        return self.ranks[token]


# ---- Load and save (which vocabulary file is this?) ----

def load(path_or_name, pattern="cl100k"):
    """Open a tokenizer: a folder with tokenizer.json, such a file, a .tiktoken rank file (cut by `pattern`), 'bytes', or
    a name that tiktoken knows (fetched by tiktoken, so it needs the network or its cache)."""
    path = Path(path_or_name)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if str(path_or_name) == "bytes":
        return ByteBPE({bytes([b]): b for b in range(256)}, "gpt2", ["<|endoftext|>"])
    if path.is_file():
        return _load_ranks(path, pattern) if path.suffix == ".tiktoken" else _load_json(path)
    if str(path_or_name) in tiktoken.list_encoding_names():
        try:
            core = tiktoken.get_encoding(str(path_or_name))
        except OSError as error:
            raise UsageError(f"tiktoken could not fetch {path_or_name} ({type(error).__name__}: no network?); "
                             f"train one with --tokenizer='' or give a local file") from None
        return ByteBPE(core._mergeable_ranks, core._pat_str, core._special_tokens)
    raise UsageError(f"no tokenizer at {path_or_name}: expected a folder with tokenizer.json, a .json or .tiktoken file, "
                     f"'bytes' or one of {tiktoken.list_encoding_names()}")


def _load_ranks(path, pattern):
    import base64
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        return ByteBPE({base64.b64decode(token): int(rank) for token, rank in pairs}, pattern)
    except ValueError as error:
        raise UsageError(f"{path}: not a rank file of lines 'base64 rank' ({error})") from None


def _load_json(path):
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        model, steps = spec["model"], spec["pre_tokenizer"]
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        kinds = [step["type"] for step in steps]
        readable = model["type"] == "BPE" and kinds in (["ByteLevel"], ["Split", "ByteLevel"]) and not spec.get("normalizer")
        if readable:
            pattern = PATTERNS["gpt2"] if kinds == ["ByteLevel"] else steps[0]["pattern"]["Regex"]
            byte_of = {character: b for b, character in byte_alphabet().items()}
            special = {token["content"]: token["id"] for token in spec["added_tokens"]}
            ranks = {bytes(byte_of[c] for c in token): i for token, i in model["vocab"].items() if token not in special}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not a whole tokenizer.json ({type(error).__name__}: {error}); save or copy it again") from None
    if not readable:
        raise UsageError(f"{path}: only byte-level BPE without a normaliser is read, this is {model['type']} after {kinds}")
    return ByteBPE(ranks, pattern, special)


TOKENIZERS = {"bbpe": train_bbpe}    # --model of the command train


# ---- Command line ----

def demo():
    text = "low low low low low lower lower newest newest newest newest newest newest widest widest widest"
    counts = count_pretokens([text], "gpt2")
    tok = ByteBPE(train_bbpe(counts, 256 + 10), "gpt2", ["<|endoftext|>"])
    print(f"corpus: {text!r}\n\nlearned merges, most frequent pair first (a space belongs to the word after it):")
    for rank, (a, b) in enumerate(tok.merges()):
        print(f"  {256 + rank}: {a.decode()!r} + {b.decode()!r}")
    for sample in (" lowest newer", " 你好", "<|endoftext|>"):
        ids = tok.encode(sample)
        print(f"\n{sample!r}: {len(sample.encode())} bytes -> {len(ids)} tokens {ids}")
        print("  ", " ".join(repr(tok.token_bytes(i).decode("utf-8", "backslashreplace")) for i in ids))
        assert tok.decode(ids) == sample and ids == tok.encode_reference(sample)
    print(f"\nA special token enters only where the caller allows it: {tok.encode('<|endoftext|>', allowed_special='all')}")


def main(argv):
    if not argv:
        return demo()
    parser = Parser(prog="tokenizer.py", description="Train and use tokenizers.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, text: commands.add_parser(name, help=text)
    cmd = add("train", "learn a vocabulary from text")
    cmd.add_argument("--model", choices=list(TOKENIZERS), default="bbpe", help="algorithm")
    cmd.add_argument("--vocab_size", type=integer, required=True, help="tokens to learn, the 256 bytes included")
    cmd.add_argument("--pattern", default="cl100k", help=f"one of {list(PATTERNS)} or a regular expression")
    cmd.add_argument("--min_frequency", type=integer, default=0, help="stop when no pair is this frequent")
    cmd.add_argument("--special", nargs="+", default=[], help="special tokens, with ids after the vocabulary")
    cmd.add_argument("--input", nargs="+", required=True, help=".txt, .jsonl, .jsonl.gz, folders, - for stdin")
    cmd.add_argument("--out", required=True, help="folder to write tokenizer.json to")
    cmd = add("encode", "text on stdin to ids, a line each")
    cmd.add_argument("--tok", required=True, help="folder, file or name")
    cmd.add_argument("--format", choices=["ids", "pieces"], default="ids", help="what to print")
    cmd = add("decode", "ids on stdin, a line each, to text")
    cmd.add_argument("--tok", required=True, help="folder, file or name")
    args = parser.parse_args(argv)
    if args.command == "train":
        return _train_command(args)
    tok = load(args.tok)
    for number, line in enumerate(sys.stdin, 1):
        line = line.rstrip("\n")
        if args.command == "encode":
            ids = tok.encode(line)
            pieces = (repr(tok.token_bytes(i).decode("utf-8", "backslashreplace")) for i in ids)
            print(*(ids if args.format == "ids" else pieces))
        else:
            try:
                print(tok.decode(map(int, line.split())))
            except ValueError as error:
                raise UsageError(f"line {number}: {error}; expected ids separated by spaces") from None


def _train_command(args):
    start, report = time.perf_counter(), Counter()
    counts = count_pretokens((d["text"] for d in documents(args.input, report)), args.pattern)
    if not counts:
        raise UsageError(f"--input={' '.join(args.input)} holds no text; give a file with some")
    if warn_about(report):
        print(f"skipped {warn_about(report)}", file=sys.stderr)
    say = lambda n: print(f"\r{n:,} of {args.vocab_size:,} tokens", end="", file=sys.stderr, flush=True)
    ranks = TOKENIZERS[args.model](counts, args.vocab_size, args.min_frequency, say if sys.stderr.isatty() else None)
    if len(ranks) < args.vocab_size:
        print(f"the corpus fills only {len(ranks):,} of {args.vocab_size:,} tokens", file=sys.stderr)
    ByteBPE(ranks, args.pattern, args.special).save(args.out)
    print(f"{len(ranks):,} tokens from {report['documents']:,} documents ({sum(counts.values()):,} pre-tokens, "
          f"{len(counts):,} different) in {time.perf_counter() - start:.1f} s -> {args.out}/tokenizer.json")


if __name__ == "__main__":
    run_cli(main)
