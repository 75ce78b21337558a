"""Tokenizer: how text becomes ids.

A language model reads whole numbers, so text must become a short list of them, and come back. Four algorithms learn
the list of tokens. BPE joins, again and again, the two neighbours most often seen together; WordPiece the two whose
joining makes the text most likely; Unigram begins with too many pieces and drops those the text misses least; and
byte-level BPE does BPE on the 256 bytes, so that nothing is ever unknown.

    BPE:        (a, b) = argmax_{a,b} count(a b);   every "a b" becomes "ab";   repeat               [BPE alg 1]
    WordPiece:  (a, b) = argmax_{a,b} count(a b) / (count(a) count(b)), likewise
    Unigram:    x* = argmax_x sum_i log p(x_i) over the segmentations x of the text                  [SR sec 3.2]

All are the same pipeline: normalise the text, cut it into words that no token reaches across (so a corpus is a table
of unique words with counts), look up each word's tokens. Its steps are those of Hugging Face's tokenizer.json, and
every other vocabulary file is read into them and written from them.

Contents:    flags | files | normalisers | words | counting | learning merges | BPE | WordPiece | Unigram | Unigram training |
             Tokenizer | SentencePiece files | vocabulary files | training a tokenizer | bench | command line
References:
    [BPE]    Neural Machine Translation of Rare Words with Subword Units, arXiv:1508.07909
    [GPT2]   Language Models are Unsupervised Multitask Learners, OpenAI 2019
    [WP]     Japanese and Korean Voice Search, ICASSP 2012
    [SR]     Subword Regularization, arXiv:1804.10959
    [DROP]   BPE-Dropout, arXiv:1910.13267
Run me:      python tokenizer.py                  (learns four vocabularies from one paragraph and shows them at work)
             python tokenizer.py train --model=bbpe --vocab_size=4096 --input book.txt --out tok
"""
import argparse
import ast
import base64
import codecs
import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import gzip
import hashlib
import heapq
import io
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import struct
import sys
import time
import unicodedata
import zlib
from array import array
from collections import Counter, deque
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
    bpe_dropout: float = 0.0       # BPE: training rows leave out merges with this probability, anew each time; 0 is off
    subword_alpha: float = 0.0     # Unigram: training rows are sampled segmentations, flatter the smaller it is; 0 is off


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


def run_commands(argv, prog, about, table):
    """Parse argv by {command: (who does it, help, flags)} and do it. A flag is (name, its default or, where it must be
    given, its type, help, and its choices or further options of add_argument); a NAME in capitals stands without --."""
    parser = Parser(prog=prog, description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (_, text, flags) in table.items():
        add = commands.add_parser(command, help=text, description=text).add_argument
        for name, default, text, *more in flags:
            needed = isinstance(default, type)
            kind = default if needed else type(default)
            how = dict(nargs="+") if kind is list else dict(type=READ_AS.get(kind, str))
            how |= dict(nargs="?", const=True, metavar="BOOL") if kind is bool else {}
            how |= dict(required=True) if needed else dict(default=default)
            how |= next(({"choices": m} if isinstance(m, list) else m for m in more), {})
            if name.isupper():
                how.pop("required", None)
            add(name.lower() if name.isupper() else f"--{name}", help=text, **how)
    args = parser.parse_args(argv)
    for name in ("workers", "examples", "shard_tokens", "rounds"):
        if getattr(args, name, 0) < 0:
            raise UsageError(f"--{name}={getattr(args, name)} must not be negative")
    table[args.command][0](args)


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


SURROGATE = regex.compile("[\ud800-\udfff]")


def clean_surrogates(text):
    """What tiktoken does with code points that UTF-8 cannot hold: pairs are joined, lone halves become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


SAFE_CUT = re.compile(r"[!-~](?= )|\S\n(?=[^\s/])")            # where no pre-token reaches across; see _chunks


def _parts(file, size):
    """The bytes of a text file; if it is longer than `size` (not 0) in parts of about that, cut where that is safe."""
    rest, raw = file.read(size or -1), size
    while size and raw and len(rest) >= size:
        end = rest[-65536:].decode("utf-8", "surrogateescape")
        if cuts := [match.end() for match in SAFE_CUT.finditer(end)]:
            cut = len(rest) - len(end[cuts[-1]:].encode("utf-8", "surrogateescape"))
            yield rest[:cut]
            rest = rest[cut:]
        raw = file.read(size)
        rest += raw
    yield rest


def lines_within(file, start, end):
    """The lines of an open file that begin in start .. end - 1 (end = 0: to its end)."""
    if start:
        file.seek(start - 1)
        file.readline()                                         # the rest of a line that began earlier
    while (not end or file.tell() < end) and (line := file.readline()):
        yield line


def documents(paths, report, part=0, span=(0, 0)):
    """Yield every document as a dict with `text`: one a line of .jsonl / .jsonl.gz, else one a file (with `part`: a file
    of more bytes than that in several dicts, where it is enough to see the words). span = (start, end) reads only the
    lines of a .jsonl that begin there.

    Nothing is fatal and nothing is silent: `report` (a Counter) counts files, documents, bad_lines, bad_bytes,
    empty documents and the files of a folder that are not text."""
    for path in input_files(paths):
        report["files"] += not span[0]
        suffixes = [s for s in Path(path).suffixes if s != ".gz"][-1:]
        opened = sys.stdin.buffer if path == "-" else gzip.open(path) if path.endswith(".gz") else open(path, "rb")
        try:
            with contextlib.nullcontext(opened) if path == "-" else opened as file:
                lines = (lines_within(file, *span) if any(span) else file) if suffixes == [".jsonl"] else _parts(file, part)
                for number, raw in enumerate(lines, 1):
                    if suffixes == [".jsonl"]:
                        document = _parse_line(raw, report)
                    elif number == 1 and b"\0" in raw[:4096] or Path(path).suffix in REFUSED:
                        report["not_text"] += 1
                        break
                    else:
                        document = {"text": decode_utf8(raw, report)}
                    if document is not None and not document["text"]:
                        report["empty"] += 1
                    elif document is not None:
                        report["documents"] += suffixes == [".jsonl"] or number == 1
                        yield document
        except (OSError, EOFError) as error:                    # EOFError: a .gz that was cut short
            raise UsageError(f"{path}: cannot be read ({error}); mend or leave out this file") from None


def _parse_line(raw, report):
    if not raw.strip():
        return None
    try:
        document = json.loads(decode_utf8(raw.removeprefix(b"\xef\xbb\xbf"), report))      # a byte order mark opens some files
        if isinstance(document["text"], str):
            return document | {"text": clean_surrogates(document["text"])}
    except (ValueError, KeyError, TypeError, RecursionError):   # ValueError: no JSON, or a number of thousands of digits
        pass                                                    # counted below with the lines of a wrong shape
    report["bad_lines"] += 1
    return None


def warn_about(report):
    """What the readers skipped, in one line, or '' when there was nothing to skip."""
    says = dict(bad_lines="lines without a JSON object with a text", bad_bytes="bytes that are not UTF-8",
                empty="empty documents", not_text="files that are not text")
    return ", ".join(f"{report[key]:,} {text}" for key, text in says.items() if report[key])


# ---- Normalisers (which different writings count as the same text?) ----

BERT_DROPS = regex.compile(r"(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}\ufffd]")
BERT_SPACE = regex.compile(r"[\t\n\r\p{Zs}\u2028\u2029]")
BERT_HAN = regex.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
                    "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")         # Hugging Face's ranges; BERT begins one at 2b820
ACCENTS, CLUSTERS = regex.compile(r"\p{Mn}"), regex.compile(r"\X")
PUNCTUATION = r"[!-/:-@\[-`{-~\p{P}]"


def _lower(text):
    return text.replace("Σ", "σ").lower()                        # character by character: no final sigma


def _bert(step):
    """BERT's cleaning: no control characters, one kind of space, Han characters as words, no accents, lower case."""
    clean, han, lower = (step.get(key, True) for key in ("clean_text", "handle_chinese_chars", "lowercase"))
    accents = lower if step.get("strip_accents") is None else step["strip_accents"]

    def run(text):
        text = BERT_SPACE.sub(" ", BERT_DROPS.sub("", text)) if clean else text
        text = BERT_HAN.sub(r" \g<0> ", text) if han else text
        text = ACCENTS.sub("", unicodedata.normalize("NFD", text)) if accents else text
        return _lower(text) if lower else text
    return run


# A character map is the form in which SentencePiece models carry rewriting rules (225,000 in 240 kB): a trie over the
# UTF-8 bytes of the sources, as a "double array". Every node owns a base, and its child for byte c sits in slot base ^ c.
# A slot is one uint32: bits 0-7 its byte c (so that a wrong guess is noticed), bit 8 "a source ends here", bits 10-30
# slot ^ base of the node, to be shifted left by 8 more if bit 9 is set. Where a source ends, slot base ^ 0 has bit 31
# and the position of the replacement among the NUL-terminated strings behind the trie.
# Many slots may lead to one base: equal subtrees are stored once (the endings of all Hangul syllables, say).

END = 1 << 31


@functools.lru_cache(4)
def read_charsmap(blob):
    """precompiled_charsmap -> {source: replacement}; no bytes mean no rules."""
    size = int.from_bytes(blob[:4], "little")
    if blob and (size == 0 or size % 1024 or 4 + size >= len(blob) or blob[-1]):
        raise ValueError(f"a character map of {len(blob)} bytes cannot hold a trie of {size} (a multiple of 1024) "
                         "and strings that end in NUL: the model file is damaged")
    slots = np.frombuffer(blob[4:4 + size], "<u4").astype(np.int64)
    label, jump, strings, every = slots & (END | 255), (slots >> 10) << (slots >> 6 & 8), blob[4 + size:], np.arange(1, 256)

    @functools.cache                            # a shared subtree is read once
    def below(base, ends):                      # [(rest of a source, its replacement)]
        start = int(slots[base]) & END - 1
        out = [(b"", strings[start:strings.index(0, start)].decode())] if ends else []
        for byte in every[label[base ^ every] == every].tolist():
            out += [(bytes([byte]) + rest, to) for rest, to in from_slot(base ^ byte)]
        return out

    from_slot = lambda slot: below(slot ^ int(jump[slot]), bool(slots[slot] & 256))
    try:
        return {source.decode(): to for source, to in from_slot(0)} if blob else {}
    except (IndexError, RecursionError):
        raise ValueError("the character map leads out of itself or in a circle: the model file is damaged") from None


def write_charsmap(table):
    """{source: replacement} -> precompiled_charsmap. First fit: the nodes with most children choose their base first."""
    if "" in table or any("\0" in source + to for source, to in table.items()):
        raise ValueError("a character map ends its strings with NUL: it cannot rewrite NUL, nor the empty string")
    strings = [to.encode() + b"\0" for to in dict.fromkeys(table.values())]
    at = dict(zip(dict.fromkeys(table.values()), itertools.accumulate(map(len, strings), initial=0)))
    trie, numbers = {}, {}                      # numbers: ((byte, number of the child or position), ...) -> number
    for source, to in table.items():            # no source holds byte 0: it is free to mean "ends"
        functools.reduce(lambda node, byte: node.setdefault(byte, {}), source.encode(), trie)[0] = at[to]

    def share(node):
        key = tuple((byte, share(child) if byte else child) for byte, child in sorted(node.items()))
        return numbers.setdefault(key, len(numbers))

    root, nodes, base = share(trie), list(numbers), {}
    free, fresh, low = [], [], np.arange(256)   # blocks of 256: slots without content, bases without owner
    first_block = Counter()                     # number of children -> the first block that may still have room
    for number in sorted(range(len(nodes)), key=lambda n: -len(nodes[n])):
        labels = np.array([byte for byte, _ in nodes[number]], int)
        for block in itertools.count(first_block[len(labels)]):
            if block == len(free):
                free.append(low + block > 0)                        # slot 0 is the root
                fresh.append(free[block].copy())
            fits = fresh[block] & free[block][low[:, None] ^ labels].all(1)
            if fits.any():
                break
        offset = int(fits.argmax())
        free[block][offset ^ labels] = fresh[block][offset] = False
        base[number], first_block[len(labels)] = block << 8 | offset, block
    slots = np.full(256 * len(free), END, "<u4")                  # an empty slot matches no byte
    if len(slots) > 1 << 21:
        raise ValueError(f"{len(table)} rules need {len(slots)} slots: 2,097,152 is what bits 10-30 address")
    below = ((base[n] ^ byte, byte, child) for n, node in enumerate(nodes) for byte, child in node)
    for slot, byte, child in [(0, 0, root), *below]:
        slots[slot] = (END | child if slot and not byte else
                       byte | any(b == 0 for b, _ in nodes[child]) << 8 | (slot ^ base[child]) << 10)
    return struct.pack("<I", slots.nbytes) + slots.tobytes() + b"".join(strings) if table else b""


def longest_sources(table):
    """{first character: length of the longest source that it begins}"""
    return {source[0]: len(source) for source in sorted(table, key=len)}


def rewrite(text, table, longest):
    """Left to right, at each place the longest source that fits."""
    out, at = [], 0
    while at < len(text):
        for size in range(min(longest.get(text[at], 1), len(text) - at), 0, -1):
            if (to := table.get(text[at:at + size])) is not None:
                break
        out.append(text[at] if to is None else to)
        at += size
    return "".join(out)


@functools.cache
def nfkc_table(nmt=False):
    """The rules of SentencePiece's nfkc and nmt_nfkc, as far as this Python's Unicode goes.

    A rule for each character that NFKC changes, and for each sequence that it composes, spelt with any characters that
    stand for its parts: three kinds of jamo spell a Hangul syllable in up to 27 ways, which fills most of the table."""
    nfkc, table, spellings, sequences = functools.partial(unicodedata.normalize, "NFKC"), {}, {}, set()
    for c in map(chr, itertools.chain(range(1, 0xD800), range(0xE000, 0x110000))):
        parts = unicodedata.normalize("NFKD", c)
        if (to := nfkc(c)) != c:
            table[c] = to
        if len(parts) == 1:
            spellings.setdefault(parts, []).append(c)
        else:
            sequences.add(parts)
    for parts in sorted(sequences):                              # a set's order differs from run to run
        if (to := nfkc(parts)) != parts:
            spelt = map("".join, itertools.product(*(spellings.get(c, c) for c in parts)))
            table.update((source, to) for source in spelt if source != to)
    if nmt:                                     # for machine translation: white space is a space, controls are nothing
        table |= dict.fromkeys("\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd", " ")
        table |= dict.fromkeys(map(chr, [*range(1, 9), 11, *range(14, 32), 0x7F, 0x8F, 0x9F]), "")
        del table["\uff5e"]                     # the wide tilde is a character of its own in Japanese
    kept, longest = {}, longest_sources(table)
    for size, sources in itertools.groupby(sorted(table, key=len), len):        # without what the shorter rules give anyway
        kept |= {s: table[s] for s in sources if size == 1 or rewrite(s, kept, longest) != table[s]}
    return kept


def make_normalizer(table):
    """text -> text by the rules, at the speed of a regular expression where nothing can change."""
    if not table:
        return str
    # A source is one character and then hot ones. So no source crosses the end of a run of hot characters, nor the
    # place one character before it: what lies between these two is rewritten by itself.
    hot = sorted({c for source in table for c in source[1:] or source if c < "\U00010000"})
    runs = re.compile("[" + "".join(map(re.escape, hot)) + "\U00010000-\U0010ffff]+")     # rare ones: re is slow with a list
    longest = longest_sources(table)
    remember = functools.lru_cache(1 << 16)(lambda text: rewrite(text, table, longest))

    def normalizer(text):
        out, done = [], 0
        for run in runs.finditer(text):
            start, end = max(run.start() - 1, done), run.end()
            part = text[start:end]
            out += text[done:start], remember(part) if end - start < 32 else rewrite(part, table, longest)
            done = end
        return "".join(out) + text[done:]
    return normalizer


def charsmap(blob, longest_match):
    """A character map at work: in SentencePiece the longest source wins wherever it stands; in Hugging Face's step the
    shortest that begins a grapheme of less than 6 bytes replaces all of it, else each character goes by itself."""
    table = read_charsmap(blob)

    def grapheme(match):
        if len(match[0].encode("utf-8", "surrogatepass")) < 6:
            for start in itertools.accumulate(match[0]):
                if start in table:
                    return table[start]
        return "".join(table.get(c, c) for c in match[0])
    return make_normalizer(table) if longest_match else functools.partial(CLUSTERS.sub, grapheme)


def regex_of(pattern):
    """A pattern of tokenizer.json is {"String": literal} or {"Regex": expression}."""
    return compiled(pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"]))


def _replace(step):
    if "String" in step["pattern"]:
        return operator.methodcaller("replace", step["pattern"]["String"], step["content"])
    return functools.partial(regex_of(step["pattern"]).sub, lambda _: step["content"])


NORMALIZERS = {                      # the steps of tokenizer.json, each giving str -> str
    **{form: lambda step: functools.partial(unicodedata.normalize, step["type"]) for form in ("NFC", "NFD", "NFKC", "NFKD")},
    "Lowercase": lambda step: _lower,
    "StripAccents": lambda step: functools.partial(regex.compile(r"\p{M}").sub, ""),
    "BertNormalizer": _bert,
    "Strip": lambda step: (str, str.rstrip, str.lstrip, str.strip)[
        2 * step.get("strip_left", True) + step.get("strip_right", True)],
    "Replace": _replace,
    "Prepend": lambda step: lambda text: step["prepend"] + text if text else text,
    "Precompiled": lambda step: charsmap(base64.b64decode(step["precompiled_charsmap"]), step.get("longest_match", False)),
}


# ---- Words (where may a token never reach across?) ----

_CL100K = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
           r"""\s*[\r\n]+|\s+(?!\S)|\s+""")
PATTERNS = {                         # --pattern; every character of a text falls in exactly one match
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k": _CL100K,
    "llama3": _CL100K,
    "qwen2": _CL100K.replace("{1,3}", ""),                       # every digit by itself
    "o200k": (r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
              r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
              r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""),
    "deepseek": (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",          # several: each cuts what the one before it left
                 r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
                 r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""),
}
KNOWN_PATTERNS = {each for found in PATTERNS.values() for each in ([found] if isinstance(found, str) else found)}
LINE_WORDS = "[^ \r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"    # subword-nmt's


@functools.cache
def compiled(pattern):
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UsageError(f"--pattern={pattern}: neither one of {list(PATTERNS)} nor a regular expression ({error})") from None


BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)      # the model is over bytes


def split_steps(pattern):
    """The cutting steps of a pattern: a name in PATTERNS or a regular expression."""
    found = PATTERNS.get(pattern, pattern)
    if found is pattern and regex.fullmatch(r"[\w-]+", pattern):
        raise UsageError(f"--pattern={pattern} is not known; use one of {list(PATTERNS)}, or a regular expression such as '\\w+|\\W'")
    return [dict(type="Split", pattern=dict(Regex=compiled(each).pattern), behavior="Isolated", invert=False)
            for each in ([found] if isinstance(found, str) else found)]


ASTRAL = re.compile("[\U00010000-\U0010ffff]")


@functools.cache
def splitter(source):
    """The function that lists the pre-tokens of a text: regex.findall, for named patterns twice as fast.

    Python's own `re` is the faster engine but knows no classes like L (letters). So a named pattern is rewritten with
    its classes spelled out as ranges up to U+FFFF; a text with a member of a class beyond that takes the slow way.
    A user's own expression always does, for `re` may read it otherwise."""
    exact = compiled(source).findall
    if source not in KNOWN_PATTERNS:
        return exact
    plane, name = "".join(map(chr, range(0x10000))), r"\\p\{\w+\}|\\s"
    ranges = lambda m: "".join(f"\\u{ord(r[0]):04x}-\\u{ord(r[-1]):04x}" for r in regex.findall(m[0] + "+", plane))
    spell = lambda m: re.sub(name, ranges, m[0] if m[0][0] == "[" else f"[{m[0]}]")
    fast = re.compile(re.sub(rf"\[[^]]*\]|{name}", spell, source.replace(r"\S", r"[^\s]"))).findall
    missed = regex.compile("|".join(sorted(set(re.findall(name, source))))).search

    def split(text):
        beyond = "" if text.isascii() else "".join(set(ASTRAL.findall(text)))
        return exact(text) if beyond and missed(beyond) else fast(text)
    return split


@functools.cache
def covers(pattern):
    """Does every character fall in some match? Tried on the characters of the first planes, side by side with others."""
    probe = "".join(f"{c}a{c} {c}1{c}\n{c}!{c}" for c in map(chr, [*range(0x3100), 0xAC00, 0xE000, 0x1F600, 0x20000]))
    return pattern in KNOWN_PATTERNS or not (compiled(pattern).fullmatch("") or compiled(pattern).sub("", probe))


def step_of(table, step):
    """The function of a step of tokenizer.json."""
    if step["type"] not in table:
        raise UsageError(f"tokenizer.json asks for the step {step['type']}, which is not done here; known are {', '.join(table)}")
    return table[step["type"]](step)


def _split(step):
    """Cut at the matches of a pattern: they are kept ("Isolated"), dropped ("Removed"), or joined to a neighbour."""
    find, invert, behavior = regex_of(step["pattern"]), step.get("invert", False), step["behavior"]

    def cut(text, first=True):
        if not find.groups and (behavior == "Isolated" or behavior == "Removed" and invert):
            pieces = splitter(find.pattern)(text)
            if behavior == "Removed" or sum(map(len, pieces)) == len(text):    # nothing to keep between the matches
                return [*filter(None, pieces)]
        parts, end = [], 0
        for match in find.finditer(text):
            parts += [(text[end:match.start()], invert), (match[0], not invert)]
            end = match.end()
        parts = [(part, hit) for part, hit in [*parts, (text[end:], invert)] if part]
        if behavior == "Isolated":
            return [part for part, _ in parts]
        if behavior == "Removed":
            return [part for part, hit in parts if not hit]
        joined, before = [], None                                # MergedWithPrevious, MergedWithNext, Contiguous
        for part, hit in parts:
            if joined and (hit and before is False and behavior == "MergedWithPrevious"
                           or before and not hit and behavior == "MergedWithNext" or before == hit and behavior == "Contiguous"):
                joined[-1] += part
            else:
                joined.append(part)
            before = hit
        return joined
    return cut


def _byte_level(step):
    cut = split_step(PATTERNS["gpt2"]) if step.get("use_regex", True) else None
    if not cut and not step.get("add_prefix_space", True):
        return None                                              # it only says that the model is over bytes

    def run(text, first=True):
        if step.get("add_prefix_space", True) and not text.startswith(" "):
            text = " " + text
        return cut(text) if cut else [text]
    return run


def _metaspace(step):
    """Spaces become a visible `▁` which opens the word after it."""
    mark = step.get("replacement", "▁")
    scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
    cut = split_step(regex.escape(mark), "MergedWithNext") if step.get("split", True) else None

    def run(text, first=True):
        text = text.replace(" ", mark)
        if not text.startswith(mark) and (scheme == "always" or scheme == "first" and first):
            text = mark + text
        return cut(text) if cut else [text]
    return run


def split_step(pattern, behavior="Isolated", invert=False):
    return _split(dict(pattern=dict(Regex=pattern), behavior=behavior, invert=invert))


def _bert_cut(step):
    words, marks = split_step(r"\s+", "Removed"), split_step(PUNCTUATION)
    return lambda text, first=True: [part for word in words(text) for part in marks(word)]


CUTS = {                             # the pre-tokenisers of tokenizer.json, each giving str -> list of str
    "Split": _split,
    "ByteLevel": _byte_level,
    "Metaspace": _metaspace,
    "BertPreTokenizer": _bert_cut,
    "Whitespace": lambda step: split_step(r"\w+|[^\w\s]+", "Removed", invert=True),
    "WhitespaceSplit": lambda step: split_step(r"\s+", "Removed"),
    "Digits": lambda step: split_step(r"\p{N}" if step.get("individual_digits") else r"\p{N}+"),
    "Punctuation": lambda step: split_step(PUNCTUATION, step.get("behavior", "Isolated")),
    "CharDelimiterSplit": lambda step: split_step(regex.escape(step["delimiter"]), "Removed"),
}


# ---- Counting (what of a corpus does a trainer need?) ----

LONG, CHUNK = 1 << 20, 1 << 21       # characters: longer documents are cut where that is safe; what a worker counts at a time


def word_function(steps, cut, by_mark=False):
    """text -> list of its words, for a pipeline still without a model; by_mark: cut before every space mark, too."""
    steps, cuts = [step_of(NORMALIZERS, step) for step in steps if not step.get("theirs")], [*filter(None, (step_of(CUTS, step) for step in cut))]
    by_mark = regex.compile("▁*[^▁\n]+|▁+|\n").findall if by_mark else None

    def words(text):
        for step in steps:
            text = step(text)
        found = [text] if text else []
        for step in [*cuts, *([by_mark] if by_mark else [])]:
            found = step(found[0]) if len(found) == 1 else [part for word in found for part in step(word)]
        return found
    return words


def _chunks(texts, cuttable, progress):
    """Lists of texts of about CHUNK characters together.

    Long texts are cut, if `cuttable`, where every pattern of PATTERNS has a boundary, whatever stands around. No match
    runs from a character that is no white space on into a space, none looks back, and only white space looks ahead (at
    what follows it), so before a space that follows '!'..'~' both sides can be matched alone. A single \\n between two
    characters that are no white space ends a match in all of them; only o200k may go on, with '/'."""
    chunk, size, total = [], 0, 0
    for text in texts:
        start = 0
        while start < len(text):
            cut = SAFE_CUT.search(text, start + LONG) if cuttable and len(text) - start > LONG else None
            end = cut.end() if cut else len(text)
            chunk.append(text[start:end])
            size, start = size + end - start, end
            if size >= CHUNK:
                yield chunk
                chunk, size, total = [], 0, total + sum(len(text.encode("utf-8", "surrogatepass")) for text in chunk) if progress else 0
                if progress:
                    progress("counting words", total)
    yield chunk


_words_of = functools.cache(lambda pipeline: word_function(*json.loads(pipeline)))


def _count(chunk, pipeline, counts=None):
    counts, words = Counter() if counts is None else counts, _words_of(pipeline)
    for text in chunk:
        counts.update(words(text))
    return counts


def count_words(texts, steps, cut, by_mark=False, workers=1, progress=None):
    """Counter of the words of all texts. The corpus streams through: at most workers + 1 chunks of it are held.

    Any number of workers gives the same Counter, order included: results are added in the order of the chunks."""
    cuttable = not steps and not by_mark and all(step["type"] == "ByteLevel" or step.get("pattern", {}).get("Regex") in KNOWN_PATTERNS for step in cut)
    counts, chunks, pipeline = Counter(), _chunks(texts, cuttable, progress), json.dumps([steps, cut, by_mark])
    if workers <= 1:
        for chunk in chunks:
            _count(chunk, pipeline, counts)
        return counts
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        waiting = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_count, chunk, pipeline))
            if len(waiting) > workers:
                counts.update(waiting.popleft().result())
        while waiting:
            counts.update(waiting.popleft().result())
    return counts


# ---- Learning merges (which neighbours belong together?) ----

FEW = 20                             # up to so many positions a plain loop is faster than calls of numpy


class WordTable:
    """All different words in one array of symbols, in which pairs are surveyed, found and merged.

        sym      0 is the wall between words; a base symbol or token stands as its id + 1
        weight   how often the word at this position occurs
        span     how many positions a token covers, by id + 1

    A merged token keeps the positions of its parts: its id + 1 stands at the first, minus that at the last, something
    negative between. So a token at p finds its neighbours close by, without links: the right one begins at p + span,
    the left one ends at p - 1, where the absolute value names it. A survey squeezes negative positions out, and all
    spans are 1 again. Lists of positions are ascending: int32 arrays, or Python lists when they are short."""

    def __init__(self, symbols, lengths, counts, n_ids):
        walls = np.cumsum(np.asarray(lengths, np.int64) + 1)
        self.sym = np.ones(walls[-1] + 1, np.int32)
        self.sym[0] = self.sym[walls] = 0
        self.sym[self.sym > 0] += symbols
        counts = np.asarray(counts, np.int32 if np.max(counts) < 2**31 else np.int64)
        self.weight = np.concatenate([counts[:1], np.repeat(counts, np.diff(walls, prepend=0))])
        self.span = np.ones(n_ids + 1, np.int32)

    def survey(self, below, floor, enough):
        """Choose a threshold under `below` that `enough` pairs reach, or the floor, and list the pairs that reach it.

        A first pass adds up weights in a table of hashed slots: too high for pairs that share one, never too low. A
        second pass keeps the positions whose slot reaches the threshold; these alone are sorted by pair and counted.
        Returns the threshold and [(left, right, count, positions)]."""
        live = self.sym >= 0
        self.sym = sym = self.sym[live]
        self.weight = weight = self.weight[live]
        self.span[:] = 1
        self.views = memoryview(sym), memoryview(weight), memoryview(self.span)      # fast to read singly
        slots, step = 1 << 19, 1 << 18                           # table and step fit a processor's cache

        def slot(start):
            left, right = sym[start:start + step + 1][:-1].astype(np.int64), sym[start + 1:start + step + 1]
            return (left * 0x9E3779B1 + right) % slots * ((left > 0) & (right > 0))          # slot 0: there is a wall

        bound = np.zeros(slots)
        for start in range(0, len(sym), step):
            at = slot(start)
            bound += np.bincount(at, weight[start:start + len(at)], slots)
        bound[0] = 0
        threshold = max(floor, int(min(below, bound.max() + 1)) // 2)
        while threshold > floor and np.count_nonzero(bound >= threshold) < enough:
            threshold = max(floor, threshold // 2)
        good = bound >= threshold
        del live, bound                                          # memory peaks below
        pos = np.concatenate([np.flatnonzero(good[slot(start)]).astype(np.int32) + np.int32(start)
                              for start in range(0, len(sym), step)])
        narrow = np.uint16 if len(self.span) <= 1 << 16 else np.int32                # 16 bits are sorted by radix
        left, right = sym[pos].astype(narrow), sym[pos + 1].astype(narrow)
        order = np.lexsort((right, left))
        pos, left, right = pos[order], left[order], right[order]
        del order
        other = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
        first = np.flatnonzero(np.append(len(pos) > 0, other))   # where the next pair begins
        counts = np.add.reduceat(weight[pos], first, dtype=np.int64)
        first = np.append(first, len(pos)).tolist()
        return threshold, [(int(left[first[j]]), int(right[first[j]]), int(counts[j]), pos[first[j]:first[j + 1]])
                           for j in np.flatnonzero(counts >= threshold).tolist()]

    def find(self, left, right, pos):
        """Those of the positions where the pair still stands, and its count."""
        if len(pos) > FEW:
            pos = pos[(self.sym.take(pos) == left) & (self.sym.take(pos + self.span[left]) == right)]
            return pos, int(self.weight.take(pos).sum(dtype=np.int64))
        sym, weight, span = self.views
        half, pos = span[left], pos if isinstance(pos, list) else pos.tolist()
        pos = [p for p in pos if sym[p] == left and sym[p + half] == right]
        return pos, sum([weight[p] for p in pos])

    def merge(self, left, right, new, pos, threshold):
        """Write `new` over the pair, left to right; list the pairs so formed whose count reaches the threshold."""
        self.span[new] = self.span[left] + self.span[right]
        return (self._merge_few if isinstance(pos, list) else self._merge_many)(left, right, new, pos, threshold)

    def _merge_few(self, left, right, new, pos, threshold):
        sym, weight, span = self.views
        half, whole, done, born = span[left], span[new], [], {}
        for p in pos:
            if sym[p] == left and sym[p + half] == right:        # in "aaa" the second "aa" is gone with the first
                sym[p + half] = sym[p + whole - 1] = -new
                sym[p] = new
                done.append(p)
        for p in done:
            before, after = abs(sym[p - 1]), sym[p + whole]
            if before and before != new:                         # (new, new) is seen from its left half
                born.setdefault((before, new), []).append(p - span[before])
            if after:
                born.setdefault((new, after), []).append(p)
        counted = [(*pair, sum([weight[p] for p in at]), at) for pair, at in born.items()]
        return [found for found in counted if found[2] >= threshold]

    def _merge_many(self, left, right, new, pos, threshold):
        sym, half, whole = self.sym, self.span[left], self.span[new]
        if left == right:                                        # of a run "aaaa" every second position
            starts = np.diff(pos, prepend=-half) != half
            index = np.arange(len(pos))
            pos = pos[(index - np.maximum.accumulate(np.where(starts, index, 0))) % 2 == 0]
        sym[pos + half] = sym[pos + (whole - 1)] = -new
        sym[pos] = new
        weight, found = self.weight.take(pos), []
        before, after = np.abs(sym.take(pos - 1)), sym.take(pos + whole)
        for ids, at in (before, pos - self.span.take(before)), (after, pos):
            order = ids.astype(np.uint16 if new < 1 << 16 else np.int32).argsort(kind="stable")
            ids = ids.take(order)
            first = np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [len(ids)]))
            counts = np.add.reduceat(weight.take(order), first[:-1], dtype=np.int64)
            for j in np.flatnonzero(counts >= threshold).tolist():
                other = int(ids[first[j]])
                if other and (at is pos or other != new):
                    pair = (new, other) if at is pos else (other, new)
                    found.append((*pair, int(counts[j]), at.take(order[first[j]:first[j + 1]])))
        return found


TIES = {                             # --tie: which of equally frequent pairs merges first
    "hf": "the smallest (left id, right id), the bytes in the order of GPT-2's printable characters: Hugging Face's trainer",
    "byte": "the smallest (left id, right id), the bytes by value: rustbpe, minbpe",
    "lex": "the last (left, right) in the order of strings: subword-nmt",
}


class Last(tuple):
    """A tuple that sorts last things first."""
    __lt__ = tuple.__gt__


def learn_merges(symbols, lengths, counts, spelled, n_merges, tie="hf", min_frequency=0, max_token_length=0,
                 progress=None):
    """Merge the most frequent pair of neighbours, again and again; returns the pairs of ids in order.     [BPE alg 1]

    Words: `symbols`, the base ids of all words joined; `lengths` and `counts`, one a word. `spelled` holds the bytes
    or str of each id and grows with every merge, unless it spells a token that is there already: then it yields that.
    A pair counts at every place where it stands ("aaa" has two "aa"), times the count of the word.

    tie, a key of TIES, decides between equal counts. No token is longer than max_token_length base symbols (0: any). With tie="hf" it is shorter than that,
    but two base symbols may always merge: so does HF's trainer.

    Why so few pairs need counting: a pair (x, y) comes into being only in the step that makes the younger of x and y;
    each later step can but use up places where it stands. So the count it was born with remains an upper bound. The
    heap holds such bounds, and the pair on top is counted again. Has it kept its count, then no pair can have more,
    and none with as many comes first. If it fell, it goes back with its new count. And pairs born under a threshold
    stay under it: nobody keeps them until the heap is empty, when a survey lowers the threshold and finds them."""
    def push(left, right, count, pos):
        if size[left] + size[right] <= limit:
            order = (Last((spelled[left - 1], spelled[right - 1])),) if tie == "lex" else ()
            heapq.heappush(heap, (-count, *order, left, right))
            where[left, right] = pos

    floor = max(1, min_frequency)
    limit = max(2, max_token_length - 1) if tie == "hf" and max_token_length else max_token_length or 2**62
    id_of, size = {token: i for i, token in enumerate(spelled)}, [0] + [1] * len(spelled)
    merges, heap, where, threshold = [], [], {}, 2**62
    words = WordTable(symbols, lengths, counts, len(spelled) + n_merges + 1) if len(symbols) else None
    while words and len(merges) < n_merges:
        if not heap:
            if threshold == floor:
                break
            threshold, found = words.survey(threshold, floor, enough=2000 + len(merges) * 3 // 2)
            for pair in found:
                push(*pair)
            continue
        bound, *_, left, right = heapq.heappop(heap)
        pos, count = words.find(left, right, where.pop((left, right)))
        if count != -bound:
            if count >= threshold:
                push(left, right, count, pos)
            continue
        merges.append((left - 1, right - 1))
        token, new = spelled[left - 1] + spelled[right - 1], len(spelled) + 1
        found = words.merge(left, right, new, pos, threshold)
        if token not in id_of:
            id_of[token] = len(spelled)
            spelled.append(token)
            size.append(size[left] + size[right])
            for pair in found:
                push(*pair)
        else:                                                    # pairs of an old token grew: no bound holds
            words.sym[words.sym == new] = id_of[token] + 1
            heap, where, threshold = [], {}, 2**62
        if progress and len(merges) % 256 == 0:
            progress("merging", len(merges), n_merges)
    return merges


# ---- BPE (encoding replays the merges) ----

@functools.cache
def byte_alphabet():
    """The 256 bytes in the order of the printable characters that stand for them in GPT-2's vocabulary files.

    Printable Latin-1 bytes stand for themselves, the 68 others take the code points from 256 on; sorting by that
    character puts '!' first. Returns {byte: character}, in that order. [GPT2, released encoder]"""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_in = {b: chr(b) for b in plain}
    stand_in |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in stand_in)}
    return dict(sorted(stand_in.items(), key=lambda item: item[1]))


class Model:
    """vocab {token: id}, and what becomes of text that is not in it: its bytes <0xNN> (`byte_fallback`), or the token
    `unk`, one for several in a row (`fuse_unk`). Subclasses give segment(word) -> [(part of the word, its ids)]."""
    vocab: dict
    unk, end, byte_fallback, fuse_unk, byte_level = "", "", False, False, False

    @functools.cached_property
    def words(self):
        """A regular expression for words that can be looked up one by one: no token reaches past the space mark before
        which it cuts. None where the model knows no space mark."""
        inside = sorted({match[0][0] for token in self.vocab if "▁" in token[1:] for match in regex.finditer("[^▁]▁", token)})
        if "▁" not in self.vocab or len(inside) > 50:
            return None
        across = f"|(?<=[{regex.escape(''.join(inside))}])▁+" if inside else ""
        return regex.compile(f"▁*(?:[^▁]{across})+|▁+")

    def look_up(self, parts):
        """[(part, ids)] of the parts of a word."""
        found = []
        for part in parts:
            id = self.vocab.get(part)
            if id is not None:
                found.append((part, [id]))
                continue
            if self.byte_fallback:
                ids = [self.vocab.get(f"<0x{b:02X}>") for b in part.encode("utf-8", "surrogateescape")]
                if None not in ids:
                    found.append((part, ids))
                    continue
            unknown = [self.vocab[self.unk]] if self.unk else []
            if self.fuse_unk and found and found[-1][1] == unknown:
                found[-1] = (found[-1][0] + part, unknown)
            else:
                found.append((part, unknown))
        return found


class BPE(Model):
    """Merge neighbours, the earliest learned first, of equals the leftmost, until no learned pair is left. [BPE alg 1]

    Tokens are bytes (`byte_level`) or str. `merges` [(left, right)] in the order learned; or None where a file knows only
    `ranks` {token: rank} (tiktoken, SentencePiece): then neighbours merge whenever their joined form has a rank.
    `end` marks the last symbol of a word ("</w>")."""

    def __init__(self, vocab, merges=None, ranks=None, *, byte_level=False, end="", unk="", byte_fallback=False,
                 fuse_unk=False, ignore_merges=False):
        self.vocab, self.merges, self.byte_level, self.end = vocab, merges, byte_level, end
        self.unk, self.byte_fallback, self.fuse_unk, self.ignore_merges = unk, byte_fallback, fuse_unk, ignore_merges
        self.allowed, self.whole = None, None                    # subword-nmt's vocabulary filter and glossary
        self.key = operator.add if merges is None else lambda left, right: (left, right)
        self.rank = (vocab if ranks is None else ranks) if merges is None else {
            pair: rank for rank, pair in reversed([*enumerate(merges)])}

    def segment(self, word, dropout=0.0, rng=None):
        if self.byte_level:
            word = word.encode("utf-8", "surrogateescape")
        if self.ignore_merges and not dropout and word in self.vocab:
            return [(word, [self.vocab[word]])]
        parts = [word[i:i + 1] for i in range(len(word))]
        if self.end and parts:
            parts[-1] += self.end
        if self.whole and self.whole.fullmatch(word):
            return self.look_up([word + self.end])
        parts = self.merge(parts, dropout, rng)
        if self.allowed is not None:
            parts = [half for i, part in enumerate(parts, 1) for half in self.undo(part, i == len(parts))]
        return self.look_up(parts)

    def undo(self, part, final):
        """subword-nmt's vocabulary filter: a piece that is not allowed goes back to the two it was merged from."""
        if part.removesuffix(self.end) + "@@" * (not final) in self.allowed or part not in self.halves:
            return [part]
        left, right = self.halves[part]
        return self.undo(left, False) + self.undo(right, final)

    @functools.cached_property
    def halves(self):
        """{token: the two it is merged from}."""
        return {left + right: (left, right) for left, right in self.rank}

    def merge(self, parts, dropout=0.0, rng=None):
        """A heap of candidate pairs and links between the parts, so that n parts cost O(n log n).

        With dropout every candidate is left out of a step with that probability; a step in which all are left out is
        the last one. So 0 is BPE, 1 leaves bytes or characters. [DROP alg 1]"""
        rank, key, n = self.rank.get, self.key, len(parts)
        after, before, left_out = list(range(1, n + 1)), list(range(-1, n)), []
        heap = [(r, i, parts[i], parts[i + 1]) for i in range(n - 1) if (r := rank(key(parts[i], parts[i + 1]))) is not None]
        heapq.heapify(heap)
        while heap:
            candidate = _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if parts[i] is not left or j >= n or parts[j] is not right:
                continue                                         # one of the two was merged with another since
            if dropout and rng.random() < dropout:
                left_out.append(candidate)
                continue
            parts[i], parts[j] = left + right, None
            after[i] = k = after[j]
            before[k] = i
            for a, b in ((before[i], i), (i, k)):
                if a >= 0 and b < n and (r := rank(key(parts[a], parts[b]))) is not None:
                    heapq.heappush(heap, (r, a, parts[a], parts[b]))
            while left_out:
                heapq.heappush(heap, left_out.pop())
        return [part for part in parts if part is not None]

    @functools.cached_property
    def joined(self):
        """Does knowing the tokens and their order amount to knowing the merges? Then tiktoken, which merges whatever
        joins to a token, gives the same ids.

        True where later merges make later ids, and every split of a token into two tokens is a merge as well or can
        never be met: the token's own parts a, b stay side by side until their merge, so its bytes always become it."""
        if self.merges is None:
            return True
        made = [self.vocab.get(a + b) for a, b in self.merges]
        tokens = {token for token in self.vocab if len(token) > 1}
        if None in made or any(one > two for one, two in zip(made, made[1:])):
            return False
        if len(self.halves) == len(made) == len(tokens):
            return not any(self._torn(a, b, rank) for rank, (a, b) in enumerate(self.merges))
        if not self.ignore_merges and len(self.halves) < len(tokens):
            return False                                         # a token that no merge makes, yet tiktoken would
        return all((t[:i], t[i:]) in self.rank for t in tokens for i in range(1, len(t)) if t[:i] in self.vocab and t[i:] in self.vocab)

    def _torn(self, a, b, limit):
        """Would some merge before `limit` reach across from the bytes of a to the bytes of b? Follow both edges of the
        cut from the whole tokens down to single bytes: each symbol lives from its own merge to that of its parent."""
        ends = []
        for token, side in ((a, 1), (b, 0)):
            spine, dies = [], limit
            while token in self.halves:
                spine.append((token, dies))
                dies, token = self.rank[self.halves[token]], self.halves[token][side]
            ends.append([*spine, (token, dies)])
        return any(rank is not None and rank < dies_u and rank <= dies_v and rank < limit
                   for u, dies_u in ends[0] for v, dies_v in ends[1] if (rank := self.rank.get((u, v))) is not None)


# ---- WordPiece (which neighbours belong together more than chance would have it?) ----

class WordPiece(Model):
    """The longest token that begins the rest of the word, again and again; inside a word tokens carry `prefix`.
    A word that cannot be built, or of more than `max_chars` characters, is one `unk`."""

    def __init__(self, vocab, unk="[UNK]", prefix="##", max_chars=100):
        self.vocab, self.unk, self.prefix, self.max_chars = vocab, unk, prefix, max_chars
        self.longest = max(map(len, vocab), default=0)

    def segment(self, word):
        found, start, prefix = [], 0, ""
        while start < len(word) <= self.max_chars:
            end = next((end for end in range(min(len(word), start + self.longest), start, -1)
                        if prefix + word[start:end] in self.vocab), start)
            if end == start:
                break
            found.append((word[start:end], [self.vocab[prefix + word[start:end]]]))
            start, prefix = end, self.prefix
        return found if word and start == len(word) else [(word, [self.vocab[self.unk]])] if word else []

class PairTable:
    """All pairs of neighbours of a corpus of words, with their counts and places, kept exact while symbols merge."""

    def __init__(self, words, counts):
        """words: lists of symbol ids, -1 for a symbol that no token may hold; a wall (-1) stands between words."""
        flat = [-1, *itertools.chain.from_iterable([*word, -1] for word in words)]
        self.sym = np.array(flat, np.int32)
        place = np.arange(len(flat))
        self.after, self.before = np.minimum(place + 1, len(flat) - 1), np.maximum(place - 1, 0)
        self.weight = np.zeros(len(flat), np.int64)
        self.weight[1:] = np.repeat(np.array(counts, np.int64), [len(word) + 1 for word in words])
        self.row, self.places, self.rows_with = {}, [], {}       # pair -> row; row -> arrays of places; symbol -> rows
        self.pair, self.count = np.zeros((1024, 2), np.int64), np.zeros(1024, np.int64)
        self.change(place, +1)

    def change(self, places, sign):
        """Count the pairs at these places in (+1) or out (-1); returns their rows."""
        places = places[(self.sym[places] >= 0) & (self.sym[self.after[places]] >= 0)]
        keys, inverse = np.unique(self.sym[places].astype(np.int64) << 32 | self.sym[self.after[places]], return_inverse=True)
        total = np.zeros(len(keys), np.int64)
        np.add.at(total, inverse, self.weight[places])
        groups = np.split(places[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse, minlength=len(keys)))[:-1])
        rows = []
        for key, n, group in zip(keys.tolist(), total.tolist(), groups):
            row = self.row.get(key)
            if row is None:
                row = self.row[key] = len(self.places)
                self.places.append([])
                if row == len(self.count):
                    self.pair, self.count = np.concatenate([self.pair, 0 * self.pair]), np.concatenate([self.count, 0 * self.count])
                self.pair[row] = key >> 32, key & 0xFFFFFFFF
                for symbol in {key >> 32, key & 0xFFFFFFFF}:
                    self.rows_with.setdefault(symbol, []).append(row)
            self.count[row] += sign * n
            if sign > 0:
                self.places[row].append(group)
            rows.append(row)
        return rows

    def merge(self, row, new):
        """Write `new` over the pair of a row, left to right; returns (how often, the rows whose counts changed)."""
        left, right = self.pair[row]
        places = np.unique(np.concatenate(self.places[row]))
        places = places[(self.sym[places] == left) & (self.sym[self.after[places]] == right)]
        if left == right:                                        # in a run of equal symbols every second place merges
            starts = np.concatenate([[True], self.after[places[:-1]] != places[1:]])
            index = np.arange(len(places))
            places = places[(index - np.maximum.accumulate(np.where(starts, index, 0))) % 2 == 0]
        second = self.after[places]
        rows = self.change(np.unique(np.concatenate([places, self.before[places], second])), -1)
        self.sym[places], self.sym[second] = new, -2
        self.after[places] = self.after[second]
        self.before[self.after[places]] = places
        return int(self.weight[places].sum()), rows + self.change(np.unique(np.concatenate([places, self.before[places]])), +1)


def learn_wordpiece(words, vocab_size, alphabet, prefix="##", min_frequency=0, longest=0, progress=None):
    """Add tokens to the `alphabet` until there are vocab_size; returns {token: id}. words: {word: count}.

    The pair with the highest score count(ab) / (count(a) · count(b)) merges, as a double; of equal ones the smallest
    (left id, right id). Pairs seen less than min_frequency times do not. Unlike BPE's counts these scores also rise: once
    a and b have merged, every other pair with one of them tells more. So all pairs are kept, and those with a, b or the
    new token are scored anew. [WP, the greedy algorithm with its likelihood taken for independent units]"""
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    spelled = list(vocab)
    split = [[vocab.get(word[0], -1), *(vocab.get(prefix + c, -1) for c in word[1:])] for word in words]
    table = PairTable(split, list(words.values()))
    seen = table.sym >= 0
    count, score, size = np.zeros(vocab_size + 1, np.int64), np.zeros(len(table.count)), np.ones(vocab_size + 1, np.int64)
    np.add.at(count, table.sym[seen], table.weight[seen])
    changed = np.arange(len(table.places))
    while True:
        if len(score) < len(table.count):
            score = np.concatenate([score, np.zeros(len(table.count) - len(score))])
        n, (left, right) = table.count[changed], table.pair[changed].T
        enough = n >= max(1, min_frequency)
        if longest:
            enough &= size[left] + size[right] <= longest
        score[changed] = np.where(enough, n / np.maximum(count[left] * count[right], 1), 0)
        top = score.max()
        if len(vocab) >= vocab_size or top == 0:
            return vocab
        row = min(np.flatnonzero(score == top).tolist(), key=lambda row: tuple(table.pair[row]))
        left, right = table.pair[row].tolist()
        token = spelled[left] + spelled[right].removeprefix(prefix)
        new = vocab.setdefault(token, len(vocab))
        spelled += [token] if new == len(spelled) else []
        size[new] = size[left] + size[right]
        times, rows = table.merge(row, new)
        count[left] -= times
        count[right] -= times
        count[new] += times
        changed = np.array(list({*rows, *(r for symbol in (left, right, new) for r in table.rows_with.get(symbol, ()))}))
        if progress and len(vocab) % 256 == 0:
            progress("merging", len(vocab), vocab_size)


# ---- Unigram (which walk through its pieces explains a text best?) ----

def float32(x):
    return array("f", (x,))[0]


class Hypothesis:
    """A walk known from `start` to the end of the text, and `bound`, the score of its best completion."""
    __slots__ = "start", "tail", "bound", "after"

    def __init__(self, *values):
        self.start, self.tail, self.bound, self.after = values

    def __lt__(self, other):       # nothing else breaks ties: heapq then pops equal bounds in the library's order
        return self.bound > other.bound


class Unigram(Model):
    """Pieces with log probabilities; a text is worth its best, or a random, walk through the lattice of its pieces.

    pieces [(token, score)] in the order of the ids; `never`: ids that no text may become (<unk>, control, byte pieces);
    `users`: ids of pieces that a user wants kept whole, which outscore every other walk. `single`: sums are rounded to
    float32 as SentencePiece does, which decides near ties; Hugging Face's are doubles."""
    fuse_unk = True

    def __init__(self, pieces, unk_id, byte_fallback=False, never=(), users=(), single=False):
        self.never, self.users, never, users = sorted(never), sorted(users), set(never), set(users)
        self.pieces, self.unk_id = [*map(tuple, pieces)], unk_id
        self.byte_fallback, self.single = bool(byte_fallback), single
        self.vocab = {token: i for i, (token, _) in enumerate(self.pieces)}
        self.unk = self.pieces[unk_id][0] if unk_id is not None else ""
        self.kind, self.round = ("f", float32) if single else ("d", float)
        normal = [score for i, (_, score) in enumerate(self.pieces) if i not in never and i not in users]
        self.unk_score = self.round(self.round(min(normal, default=0.0)) - 10.0)
        self.score = {token: self.round(0.1 * (len(token.encode()) - 1) if i in users else score)
                      for i, (token, score) in enumerate(self.pieces) if i not in never}
        self.longest = max(map(len, self.score), default=1)
        self.trie = {}                                    # character -> [score of the piece that ends here, children]
        for token, score in self.score.items():
            node = [None, self.trie]
            for char in token:
                node = node[1].setdefault(char, [None, {}])
            node[0] = score

    @functools.cached_property
    def words(self):
        return None if self.single else Model.words.func(self)   # float32 rounds by all that went before

    def segment(self, word, alpha=0.0, nbest=-1, rng=None):
        return self.look_up(self.sample(word, alpha, rng, nbest) if alpha else self.viterbi(word)[0])

    def viterbi(self, text):
        """The best walk: its pieces, and its score. Of equal walks the first found stays, the one whose last piece is
        longest. Scores far from 0 are shifted back, by the library's rule: float32 would have too few digits left."""
        best, back = array(self.kind, [-math.inf]) * (len(text) + 1), [0] * (len(text) + 1)
        best[0], longest, single = 0.0, self.longest, array(self.kind, [0.0])
        for start in range(len(text)):
            here, children, end = best[start], self.trie, start
            if here < -100_000 and self.single:
                for place in range(start, min(start + longest, len(best))):
                    best[place] -= here
                here = 0.0
            for char in text[start:start + longest]:
                node = children.get(char)
                if node is None:
                    break
                score, children = node
                end += 1
                if score is not None and here + score > best[end]:
                    old, best[end] = best[end], here + score                      # rounds: `best` may hold float32
                    if best[end] > old:
                        back[end] = start
            if text[start] not in self.score:
                single[0] = here + self.unk_score
                if single[0] > best[start + 1]:
                    best[start + 1], back[start + 1] = single[0], start
        pieces, end = [], len(text)
        while end:
            pieces.append(text[back[end]:end])
            end = back[end]
        return pieces[::-1], best[-1]

    def edges(self, text):
        """For every place of the text the pieces that end there, leftmost first, as (start, score)."""
        ends = [[] for _ in range(len(text) + 1)]
        for start, first in enumerate(text):
            children, end = self.trie, start
            for char in text[start:start + self.longest]:
                if char not in children:
                    break
                score, children = children[char]
                end += 1
                if score is not None:
                    ends[end].append((start, score))
            if first not in self.score:
                ends[start + 1].append((start, self.unk_score))
        return ends

    def nbest(self, text, n):
        """The n best walks as (pieces, score), by A* from the end of the text: the best score of every beginning of the
        text is known, so walks complete in order of their scores.                             [SR sec 3.3]"""
        ends, best = self.edges(text), array(self.kind, [0.0])
        for arriving in ends[1:]:
            best.append(max(best[start] + score for start, score in arriving))
        ends[0] = [(-1, 0.0)]                            # one step off the text completes a walk
        agenda, walks = [Hypothesis(len(text), 0.0, best[-1], None)], []
        while agenda and len(walks) < n:
            last = heapq.heappop(agenda)
            if last.start < 0:
                path, step = [], last.after
                while step.after:
                    path.append(text[step.start:step.after.start])
                    step = step.after
                walks.append((path, last.bound))
                continue
            for start, score in ends[last.start]:
                bound = self.round((self.round(best[start] + score) if start >= 0 else 0.0) + last.tail)
                heapq.heappush(agenda, Hypothesis(start, self.round(score + last.tail), bound, last))
            if len(agenda) >= 10_000:                    # each bound is the score of another walk: n suffice
                agenda = [heapq.heappop(agenda) for _ in range(max(n, min(512, 10 * n)))]
        return walks

    def log_sums(self, ends, alpha):
        """For every place, the log of the sum of P(walk)^alpha over all walks to it."""
        total = [0.0]
        for arriving in ends[1:]:
            terms = [total[start] + alpha * score for start, score in arriving]
            top = max(terms)
            total.append(top + math.log(sum(math.exp(term - top) for term in terms)))
        return total

    def sample(self, text, alpha, rng, nbest=-1):
        """A walk drawn in proportion to P(walk)^alpha, among the nbest best walks or, if -1, among all: then sums go
        forward, and draws by rng (a random.Random) backward from the end.                      [SR sec 3.3]"""
        if nbest in (0, 1):
            return self.viterbi(text)[0]
        if nbest > 1:
            walks, scores = zip(*self.nbest(text, nbest))
            return rng.choices(walks, [math.exp(alpha * (score - scores[0])) for score in scores])[0]
        ends, pieces, end = self.edges(text), [], len(text)
        total = self.log_sums(ends, alpha)
        while end:
            weights = [math.exp(total[start] + alpha * score - total[end]) for start, score in ends[end]]
            (start, _), = rng.choices(ends[end], weights)
            pieces.append(text[start:end])
            end = start
        return pieces[::-1]


# ---- Unigram training (which pieces, how likely, make the corpus likely?) ----

class Lattices:
    """All segmentations of all words as arrays, so that a numpy call serves one place of every word.

    A node is a place between the characters of a word. With the longest word first, and nodes numbered by place, then by
    word, the nodes of a place are a slice, and the place after node v is v + hop[v]. An edge is a piece where it occurs;
    edges are sorted by their end: at v end first[v] <= edge < first[v + 1].

    Letters: W words, T places, N nodes, E edges, P pieces."""

    def __init__(self, size_W, weight_W):
        self.weight_W = weight_W
        self.width_T = np.searchsorted(-size_W, -np.arange(size_W[0] + 2), side="right")  # words with place t
        self.offset_T = np.cumsum(self.width_T) - self.width_T
        self.hop_N = np.repeat(self.width_T, self.width_T).astype(np.int32)
        self.word_N = (np.arange(len(self.hop_N)) - np.repeat(self.offset_T, self.width_T)).astype(np.int32)
        self.end_W = self.offset_T[size_W] + np.arange(len(size_W))

    def set_edges(self, start_E, piece_E, degree_N):
        self.start_E, self.piece_E, self.first_N = start_E, piece_E, np.concatenate([[0], np.cumsum(degree_N)])

    def places(self, step=1):
        """For every place but the first: its slices of nodes and edges, edges per node, each node's first."""
        for t in range(1, len(self.width_T) - 1)[::step]:
            nodes = slice(self.offset_T[t], self.offset_T[t] + self.width_T[t])
            first = self.first_N[nodes.start:nodes.stop + 1]
            yield nodes, slice(first[0], first[-1]), np.diff(first), first[:-1] - first[0]

    def expected_counts(self, score_P):
        """How often each piece occurs, over all walks of all words; and the log likelihood of the words.

        Forward, alpha is the log of the sum over all walks to a node, and share an edge's part in it.
        Backward, the walks through a node (at a word's end: its count) divide among its edges by the shares."""
        alpha_N, passing_N, share_E = np.zeros(len(self.hop_N)), np.zeros(len(self.hop_N)), np.empty(len(self.start_E))
        for nodes, edges, degree, first in self.places():
            score = alpha_N[self.start_E[edges]] + score_P[self.piece_E[edges]]
            alpha_N[nodes] = np.logaddexp.reduceat(score, first)
            share_E[edges] = np.exp(score - np.repeat(alpha_N[nodes], degree))
        passing_N[self.end_W] = self.weight_W
        for nodes, edges, degree, _ in self.places(-1):
            share_E[edges] *= np.repeat(passing_N[nodes], degree)
            np.add.at(passing_N, self.start_E[edges], share_E[edges])
        return np.bincount(self.piece_E, share_E, len(score_P)), self.weight_W @ alpha_N[self.end_W]

    def best_walks(self, score_P):
        """Scores of the words' best walks, and the walks from the end: a list of (words, a piece of each)."""
        best_N, back_N = np.zeros(len(self.hop_N)), np.empty(len(self.hop_N), np.int64)
        for nodes, edges, degree, first in self.places():
            score = best_N[self.start_E[edges]] + score_P[self.piece_E[edges]]
            best_N[nodes] = np.maximum.reduceat(score, first)
            winner = np.flatnonzero(score == np.repeat(best_N[nodes], degree))
            back_N[np.repeat(np.arange(nodes.start, nodes.stop), degree)[winner]] = winner + edges.start
        node, steps = self.end_W, []
        while len(node):
            edge = back_N[node]
            steps.append((self.word_N[node], self.piece_E[edge]))
            node = self.start_E[edge]
            node = node[node >= self.width_T[0]]         # nodes below are the starts of words
        return best_N[self.end_W], steps


class UnigramTrainer:
    """Pieces on trial (where one occurs, its length, its score), and the lattices of the words over them."""

    def __init__(self, words, max_piece_length, seed_size):
        words = sorted(words.items(), key=lambda item: (-len(item[0]), item[0]))
        size_W, self.text = np.array([len(word) for word, _ in words]), "".join(word for word, _ in words)
        self.lattices = its = Lattices(size_W, np.array([count for _, count in words], dtype=np.float64))
        code_C = np.unique(np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), np.uint32), return_inverse=True)[1]
        place_N = np.repeat(np.arange(len(its.width_T)), its.width_T)
        inside_N = place_N < size_W[its.word_N]
        self.at_N = ((np.cumsum(size_W) - size_W)[its.word_N] + place_N).astype(np.int32)      # in the text
        self.char_N = np.full(len(place_N), -1, np.int32)          # the character after a node, -1 at an end
        self.char_N[inside_N] = code_C[self.at_N[inside_N]]
        self.seed(list(self.substrings(max_piece_length)), seed_size)

    def substrings(self, longest):
        """For every length the substrings that occur twice: all occurrences (start, end, name), and counts.

        A substring is named by the name of all but its last character, and that character. The rare ones are dropped at
        every length, so that what is left to sort shrinks fast."""
        weight_W, word_N, hop_N = self.lattices.weight_W, self.lattices.word_N, self.lattices.hop_N
        start = np.flatnonzero(self.char_N >= 0).astype(np.int32)
        end, name, letters = start + hop_N[start], self.char_N[start], int(self.char_N.max()) + 1
        for length in range(1, longest + 1):
            count = np.bincount(name, weight_W[word_N[start]])
            if length > 1:                                             # every character stays, however rare
                frequent = count >= 2
                kept, name, count = frequent[name], (np.cumsum(frequent) - 1)[name], count[frequent]
                start, end, name = start[kept], end[kept], name[kept].astype(np.int32)
            if not len(start):
                return
            yield start, end, name, count
            going = self.char_N[end] >= 0
            start, end, name = start[going], end[going], name[going].astype(np.int64)
            name = np.unique(name * letters + self.char_N[end], return_inverse=True)[1]
            end = end + hop_N[end]

    def seed(self, levels, seed_size):
        """All characters, and the substrings that cover most (count times length), are the first pieces."""
        sizes = [len(count) for _, _, _, count in levels]
        count = np.concatenate([count for _, _, _, count in levels])
        length = np.repeat(np.arange(1, len(levels) + 1), sizes)
        chosen = np.zeros(len(count), bool)
        chosen[np.lexsort((-count * length, length > 1))[:max(seed_size, sizes[0])]] = True
        number = np.where(chosen, np.cumsum(chosen, dtype=np.int32) - 1, -1)
        self.length, self.start = length[chosen], np.empty(np.count_nonzero(chosen), np.int32)
        self.score = np.log(np.maximum(count[chosen], 0.5) / count[chosen].sum())
        degree_N = np.zeros(len(self.char_N), np.int64)
        for i, (start, end, name, _) in enumerate(levels):
            piece = number[sum(sizes[:i]):][name]
            levels[i] = start, end, piece = [part[piece >= 0] for part in (start, end, piece)]
            self.start[piece] = start
            degree_N[end] += 1
        slot_N, start_E, piece_E = np.cumsum(degree_N) - degree_N, *np.empty((2, degree_N.sum()), np.int32)
        for start, end, piece in levels:                       # at a node ends at most one piece of a length
            start_E[slot_N[end]], piece_E[slot_N[end]] = start, piece
            slot_N[end] += 1
        self.lattices.set_edges(start_E, piece_E, degree_N)

    def keep(self, kept):
        """Forget the pieces where `kept` is False, and number the others anew."""
        self.start, self.length, self.score, its = self.start[kept], self.length[kept], self.score[kept], self.lattices
        kept_E = kept[its.piece_E]
        degree_N = np.diff(np.concatenate([[0], np.cumsum(kept_E)])[its.first_N])
        its.set_edges(its.start_E[kept_E], (np.cumsum(kept, dtype=np.int32) - 1)[its.piece_E[kept_E]], degree_N)

    def step(self, vocab_size):
        """A round of EM. Digamma in place of log is a sparse prior: it punishes rare pieces."""
        count, _ = self.lattices.expected_counts(self.score)
        kept = (count >= min(0.5, np.sort(count)[max(len(count) - vocab_size, 0)])) | (self.length == 1)
        self.keep(kept)
        count = np.maximum(count[kept], 0.5)
        self.score = digamma(count) - digamma(count.sum())

    def pieces_inside(self):
        """The longer pieces, and their own lattices, without the edge that is the whole piece."""
        row = np.argsort(-self.length, kind="stable")[:np.count_nonzero(self.length > 1)]
        inner, outer = Lattices(self.length[row], np.ones(len(row))), self.lattices
        node, starts, pieces, degrees = self.start[row], [], [], [np.zeros(len(row), np.int64)]
        for t in range(1, len(inner.width_T) - 1):
            node = node[:inner.width_T[t]]
            node = node + outer.hop_N[node]            # where, in some word, their first t characters end
            degree = outer.first_N[node + 1] - outer.first_N[node]
            which = np.repeat(np.arange(len(node)), degree)
            edge = np.arange(len(which)) + np.repeat(outer.first_N[node + 1] - np.cumsum(degree), degree)
            span = self.length[outer.piece_E[edge]]
            fits = span <= t - (self.length[row[which]] == t)
            which, edge, span = which[fits], edge[fits], span[fits]
            starts.append((inner.offset_T[t - span] + which).astype(np.int32))
            pieces.append(outer.piece_E[edge])
            degrees.append(np.bincount(which, minlength=len(node)))
        inner.set_edges(*map(np.concatenate, (starts, pieces, degrees)))
        return row, inner

    def prune(self, size):
        """Keep the characters, and of the other pieces those that the likelihood needs most.     [SR sec 3.2]

        Without piece x, each of its count(x) uses falls to the best walk through others, y_1 .. y_M, whose
        counts grow by count(x). The loss is about count(x) (log p(x) - sum_i log p'(y_i)), p' as they grew."""
        count = np.zeros(len(self.score))
        for word, piece in self.lattices.best_walks(self.score)[1]:
            count += np.bincount(piece, self.lattices.weight_W[word], len(count))
        row, inner = self.pieces_inside()
        other, steps = inner.best_walks(self.score)
        uses, total, parts = count[row], count.sum(), np.zeros(len(row))
        with np.errstate(divide="ignore", invalid="ignore"):           # unused pieces: log 0
            loss = np.log(uses / total)
            for word, piece in steps:
                loss[word] -= np.log(count[piece] + uses[word])
                parts[word] += 1
            loss = uses * (loss + parts * np.log(total + uses * (parts - 1)))
        loss[(uses == 0) | (other > self.score[row])] = -np.inf        # the best walks do without the piece
        kept = self.length == 1
        kept[row[np.argsort(-loss, kind="stable")[:max(size - np.count_nonzero(kept), 0)]]] = True
        self.keep(kept)

    def pieces(self):
        """[(text, score)]"""
        spans = zip(self.at_N[self.start].tolist(), self.length.tolist(), self.score.tolist())
        return [(self.text[at:at + length], score) for at, length, score in spans]


def digamma(x):
    """d log Gamma(x) / dx: its recurrence up to x + 6, where the asymptotic series is good to 2e-9."""
    y, z = 1 / (x + 6) ** 2, x + 6
    return np.log(z) - 0.5 / z - y * (1 / 12 - y * (1 / 120 - y / 252)) - sum(1 / (x + k) for k in range(6))


def train_unigram(words, vocab_size, alphabet, longest=16, progress=None):
    """{word with its ▁: count} -> vocab_size pieces (token, log probability), the most probable first; less where the text
    holds fewer substrings twice. No piece reaches across words, which may be whole sentences, nor beyond the alphabet."""
    trainer = UnigramTrainer({**dict.fromkeys(alphabet, 0), **words}, longest, 1_000_000)
    seeds = len(trainer.score)
    while True:
        trainer.step(vocab_size)
        trainer.step(vocab_size)
        if len(trainer.score) <= vocab_size:
            # scores in steps of 1/256: float32 (SentencePiece) and float64 (Hugging Face) then add them up alike, ties too
            pieces = [(piece, round(score * 256) / 256) for piece, score in trainer.pieces()]
            return sorted(pieces, key=lambda item: (-item[1], item[0]))
        if progress:
            progress("pruning pieces", seeds - len(trainer.score), seeds - vocab_size)
        trainer.prune(max(vocab_size, int(0.75 * len(trainer.score))))


# ---- Tokenizer (the contract: normalise, cut, look up, and back) ----

ROLES = {                            # what a special token is for: the name it gets here, then the names others gave it
    "eos": ["<|endoftext|>", "</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "<EOT>", "[EOS]"],
    "bos": ["<|bos|>", "<s>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "[BOS]"],
    "pad": ["<|pad|>", "<pad>", "[PAD]", "<｜▁pad▁｜>"],
    "unk": ["<unk>", "[UNK]"],
    "mask": ["<|mask|>", "[MASK]", "<mask>"],
    "cls": ["<|cls|>", "[CLS]"],
    "sep": ["<|sep|>", "[SEP]", "<sep>"],
    "fim_prefix": ["<|fim_prefix|>", "<fim_prefix>", "<｜fim▁begin｜>", "[PREFIX]"],
    "fim_middle": ["<|fim_middle|>", "<fim_middle>", "<｜fim▁end｜>", "[MIDDLE]"],
    "fim_suffix": ["<|fim_suffix|>", "<fim_suffix>", "<｜fim▁hole｜>", "[SUFFIX]"],
    "gmask": ["[gMASK]"], "sop": ["<sop>", "<|startofpiece|>"], "eop": ["<eop>", "<|endofpiece|>"],
    "system": ["<|system|>"], "user": ["<|user|>"], "assistant": ["<|assistant|>"], "eot": ["<|eot_id|>", "<|im_end|>"],
}
SENTINEL = "<extra_id_{}>"           # the sentinels of span corruption, numbered from 0


def special_names(wanted):
    """Names of special tokens: as typed, by role (`eos`), or `sentinels=N` for N sentinels of span corruption."""
    names = []
    for name in wanted:
        word, _, count = name.partition("=")
        if word == "sentinels" and count and not count.isdecimal():
            raise UsageError(f"--special {name}: expected a number, as in sentinels=100")
        names += [SENTINEL.format(i) for i in range(integer(count or "100"))] if word == "sentinels" else [ROLES.get(name, [name])[0]]
    return list(dict.fromkeys(names))


class Cache(dict):
    """word -> what `find` gives for it, found out when a word comes by for the first time."""

    def __init__(self, find):
        self.find = find

    def __missing__(self, word):
        if len(self) > 200_000:
            self.clear()
        found = self.find(word)
        if len(word) < 1000:
            self[word] = found
        return found


def trie_regex(words):
    """A regular expression for the longest of many words at a place: one branch a character, not one a word."""
    heads = {}
    for word in words:
        heads.setdefault(word[:1], []).append(word[1:])
    ends = heads.pop("", None) is not None
    branches = [regex.escape(head) + trie_regex(rest) for head, rest in heads.items()]
    return f"(?:{'|'.join(branches)})" + "?" * ends if branches else ""


def plain_text(text):
    """A str without surrogates; of bytes a str in which those that are not UTF-8 are lone surrogates, to be bytes again."""
    return text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else clean_surrogates(text)


class Tokenizer:
    """encode(text) -> ids and decode(ids) -> text. The steps are those of a tokenizer.json, kept in its form.

    normalizer: steps str -> str; cut: steps str -> words; model: word -> ids. `added`: tokens beside the model's own
    ({id, content, special, ...}): the special ones make up `special` {name: id} and are met in a text only where the
    caller allows it, the others are cut out of every text first. `spelling`, a key of SPELLINGS: how tokens become text."""

    def __init__(self, model, normalizer=(), cut=(), added=(), spelling="bytes", strip=""):
        self.model, self.normalizer, self.cut, self.added = model, list(normalizer), list(cut), list(added)
        self.spelling, self.strip = spelling, strip
        self.special = {token["content"]: token["id"] for token in self.added if token.get("special")}
        # "normalized" tokens are looked for after normalising, where doing that twice is doing it once
        self.late = bool(self.normalizer) and any(t.get("normalized") for t in self.added) and all(
            step["type"] != "Prepend" for step in self.normalizer)
        self.always = [token for token in self.added if not token.get("special")]
        self._normalize = [step_of(NORMALIZERS, step) for step in self.normalizer if not step.get("theirs")]
        self._cut = [*filter(None, (step_of(CUTS, step) for step in self.cut))]
        self.cache, self._finders = Cache(lambda word: [i for _, ids in model.segment(word) for i in ids]), {}

    @functools.cached_property
    def bytes_of(self):
        """{id: the bytes it stands for}; of added tokens: their name."""
        spell = SPELLINGS[self.spelling]
        lead = " " * (self.spelling.startswith("##") or self.spelling in ("_", " "))       # special tokens stand as words
        return {i: spell(self.model, token) for token, i in self.model.vocab.items()} | {
            token["id"]: spell(self.model, token["content"]) if self.spelling == "▁" and not token.get("special") else
            (token.get("surface") or lead + token["content"]).encode("utf-8") for token in self.added}

    @functools.cached_property
    def n_vocab(self):
        return max([*self.model.vocab.values(), *(token["id"] for token in self.added)]) + 1

    def token_bytes(self, id):
        """The bytes a token stands for (a special token: its name)."""
        if id not in self.bytes_of:
            raise UsageError(f"token id {id} is not in this vocabulary of {self.n_vocab} (0 to {self.n_vocab - 1})")
        return self.bytes_of[id]

    @functools.cached_property
    def pieces(self):
        """{id: the token as vocabulary files write it}."""
        return {i: show(token) for token, i in self.model.vocab.items()} | {token["id"]: token["content"] for token in self.added}

    def role(self, role):
        """The id of the special token that plays a role, a key of ROLES."""
        found = [self.special[name] for name in ROLES[role] if name in self.special]
        if not found:
            raise UsageError(f"this tokenizer has no {role} token; train it with --special {role}, which adds {ROLES[role][0]}")
        return found[0]

    def with_special(self, names):
        """The same tokenizer with more special tokens, on the ids after all others."""
        new = [name for name in special_names(names) if name not in self.special]
        ordinary = [name for name in new if not name.strip() or name in self.model.vocab or name.encode() in self.model.vocab]
        if ordinary:
            raise UsageError(f"--special {' '.join(map(repr, ordinary))}: blank, or an ordinary token of this vocabulary; use names such as <|{ordinary[0].strip() or 'name'}|>")
        added = [dict(id=self.n_vocab + i, content=name, special=True) for i, name in enumerate(new)]
        return Tokenizer(self.model, self.normalizer, self.cut, [*self.added, *added], self.spelling, self.strip)

    def normalize(self, text):
        for step in self._normalize:
            text = step(text)
        return text

    def words(self, text, first=True):
        """The words of a text (its beginning, if `first`), each of which the model encodes by itself."""
        text = self.normalize(text)
        words = [text] if text else []
        for cut in self._cut:
            words = [part for word in words for part in cut(word, first)] if len(words) != 1 else cut(words[0], first)
        find = None if self.model.byte_level else self.model.words
        return [part for word in words for part in find.findall(word)] if find else words

    # ---- to ids

    @functools.cached_property
    def core(self):
        """tiktoken's Rust encoder over the same tokens, or None where it would not give the ids of encode_reference."""
        kinds = [step["type"] for step in self.cut]
        plain = kinds[-1:] == ["ByteLevel"] and not self.cut[-1].get("add_prefix_space", True)
        if not (self.model.byte_level and plain and self.model.joined):
            return None
        if kinds == ["ByteLevel"] and self.cut[0].get("use_regex", True):
            pattern = PATTERNS["gpt2"]
        elif kinds == ["Split", "ByteLevel"] and self.cut[0]["behavior"] == "Isolated" and not self.cut[1].get("use_regex", True):
            pattern = regex_of(self.cut[0]["pattern"]).pattern
        else:
            return None
        if not covers(pattern):
            return None                                          # tiktoken drops what no match holds
        try:
            return tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=self.model.vocab, special_tokens={})
        except ValueError:                                       # an expression that Rust's engine does not know
            return None

    def encode(self, text, allowed_special=(), disallowed_special=(), rng=None, **sampling):
        """ids of a str, or of bytes, which need not be UTF-8.

        allowed_special: names of the special tokens to recognise, or "all"; disallowed_special: names that must not occur
        ("all": all that are not allowed). Sampling draws from `rng`, a random.Random: dropout=p leaves BPE merges out,
        alpha=a (nbest=n) samples Unigram segmentations. UsageError where the text holds a disallowed name."""
        if not (allowed_special or disallowed_special or sampling or self.always) and self.core and type(text) is str:
            return self.core.encode_ordinary(self.normalize(text))
        sampling = self._sampling(**sampling)
        allowed = set(self.special) if allowed_special == "all" else set(allowed_special)
        refused = set(self.special) - allowed if disallowed_special == "all" else set(disallowed_special)
        text = plain_text(text)
        if found := next((name for name in sorted(refused) if name in text), None):
            raise UsageError(f"the text holds the special token {found}; allow it, or have it read as plain text by disallowed_special=()")
        return self._encode(text, allowed, rng, sampling, None if sampling or SURROGATE.search(text) else self.core)

    def _sampling(self, dropout=0.0, alpha=0.0, nbest=-1):
        """The options of sampling that this model takes; none where nothing is to be sampled."""
        for name, value, kind, highest in (("dropout", dropout, BPE, 1), ("alpha", alpha, Unigram, math.inf)):
            if value and not isinstance(self.model, kind):
                raise UsageError(f"{name}={value} samples {kind.__name__} models; this is a {type(self.model).__name__} model: leave it out")
            if not 0 <= value <= highest:
                raise UsageError(f"{name}={value} is out of range; use a number from 0 to {highest}")
        return dict(dropout=dropout) if dropout else dict(alpha=alpha, nbest=nbest) if alpha else {}

    def sampler(self, dropout=0.0, alpha=0.0):
        """(ids, rng) -> the same text in a freshly sampled segmentation, special ids where they were; None where neither is
        asked for. A piece of a document is sampled as a text of its own."""
        how, special = self._sampling(dropout, alpha), set(self.special.values())
        if not how:
            return None

        def resample(ids, rng):
            runs = itertools.groupby(ids, special.__contains__)
            return [i for is_special, run in runs for i in (run if is_special else self.encode(
                b"".join(map(self.bytes_of.__getitem__, run)).removeprefix(b" " * (self.strip == "left")), rng=rng, **how))]
        return resample

    def encode_reference(self, text):
        """The definition, in plain Python: encode gives the same ids, also where it goes through tiktoken's core."""
        return self._encode(plain_text(text), (), None, {}, None)

    def _encode(self, text, allowed, rng, sampling, core):
        ids = []
        for number, (part, token) in enumerate(self.sections(text, allowed)):
            if token:
                ids.append(token["id"])
            elif core:
                ids += core.encode_ordinary(self.normalize(part))
            elif sampling:
                ids += [i for word in self.words(part, number == 0) for _, ids in self.model.segment(word, rng=rng, **sampling) for i in ids]
            else:
                ids += itertools.chain.from_iterable(map(self.cache.__getitem__, self.words(part, number == 0)))
        return ids

    def _finder(self, allowed, late):
        """(regular expression or None, {name: token}) of the added tokens to look for, of those that begin first the longest:
        those to be found before normalising, or (late) the others."""
        if (allowed, late) not in self._finders:
            tokens = {self.normalize(t["content"]) if late else t["content"]: t for t in self.added
                      if (not t.get("special") or t["content"] in allowed) and late == (self.late and bool(t.get("normalized")))}
            plain, others = [], []
            for name, token in sorted(tokens.items(), key=lambda item: -len(item[0])):
                edge, (left, right) = r"\b" * bool(token.get("single_word")), (r"\s*" * bool(token.get(side)) for side in ("lstrip", "rstrip"))
                others += [f"{left}{edge}({regex.escape(name)}){edge}{right}"] if edge or left or right else []
                plain += [] if edge or left or right else [name]
            find = "|".join(filter(None, [*others, trie_regex(plain)]))
            self._finders[allowed, late] = find and compiled(find), tokens
        return self._finders[allowed, late]

    def sections(self, text, allowed=(), late=False):
        """[(text, None) or (text, added token)], the added tokens cut out of the text."""
        find, tokens = self._finder(frozenset(allowed), late)
        found, end = [], 0
        for match in find.finditer(text) if find else ():
            found += [(text[end:match.start()], None), (match[0], tokens[match[match.lastindex or 0]])]
            end = match.end()
        found = [(part, token) for part, token in [*found, (text[end:], None)] if part]
        if self.late and not late:
            return [each for part, token in found for each in (
                [(part, token)] if token else self.sections(self.normalize(part), allowed, late=True))]
        return found

    def encode_batch(self, texts):
        """encode of every text; tiktoken's core works on as many as there are processor cores."""
        if self.core and not self.always:
            return self.core.encode_ordinary_batch([self.normalize(text) for text in texts], num_threads=cores())
        return [self.encode(text) for text in texts]

    def spans(self, text):
        """[(id, (first byte, end), (first character, end))] of encode(text): the part of the text each token stands for.

        A token of some bytes of a character covers the whole of it in characters; a mark that a normaliser put in
        covers nothing. (Of the normalised text, where added tokens are looked for in that.)"""
        text = clean_surrogates(text) if not self.late else self.normalize(clean_surrogates(text))
        found, start, byte_at = [], 0, [*itertools.accumulate((len(c.encode("utf-8", "surrogatepass")) for c in text), initial=0)]
        for number, (part, token) in enumerate(self.sections(text)):
            stop = start + len(part)
            if token:
                found.append((token["id"], (byte_at[start], byte_at[stop]), (start, stop)))
                start = stop
                continue
            words = self.words(part, number == 0)
            units, at = self._units(part, "".join(words), start, byte_at), 0
            for word in words:
                for piece, ids in self.model.segment(word):
                    here = units[at:at + len(piece.removesuffix(self.model.end) if self.model.end else piece)]
                    at += len(here)
                    low, high = here[0][0], here[-1][1]
                    for k, id in enumerate(ids):
                        span = (here[0][2], here[-1][3])
                        if len(ids) > 1 and span[1] - span[0] == len(ids):     # a character as bytes <0xNN>
                            span = (span[0] + k, span[0] + k + 1)
                        found.append((id, span, (low, high)))
            start = stop
        return found

    def _sources(self, text):
        """What every character of a text becomes by itself under the normaliser: [(new character, first, end of the old)]."""
        specs = (spec for spec in self.normalizer if not spec.get("theirs"))
        local = [step for step, spec in zip(self._normalize, specs) if spec["type"] not in ("Strip", "Prepend") and spec.get("content") != ""]
        source = []
        for cluster in CLUSTERS.finditer(text):
            became, *singly = [functools.reduce(lambda part, step: step(part), local, part) for part in (cluster[0], *cluster[0])]
            if "".join(singly) == became:
                source += [(c, at, at + 1) for at, part in enumerate(singly, cluster.start()) for c in part]
            else:                                                # a letter and its marks became this together
                source += [(c, *cluster.span()) for c in became]
        return source

    def _units(self, text, made, start, byte_at):
        """For every character of `made`, what the words of `text` spell together (for every byte, where the model is
        byte-level), the slice of the text it came from: (character, end, byte, end)."""
        source, units, at = self._sources(text), [], 0
        prefix = any(step["type"] == "Prepend" for step in self.normalizer)
        space = "" if any(step["type"] == "WhitespaceSplit" for step in self.cut) else " "     # what a mark may stand for
        for place, c in enumerate(made):
            own = (c, space) if c == self.spelling else (c,)
            put_in = prefix and place == 0 or c == self.spelling and at < len(source) and source[at][0] not in own
            ahead = at
            while not put_in and ahead < len(source) and source[ahead][0] not in own and source[ahead][0] in BLANKS:
                ahead += 1                                       # white space that the words no longer hold
            if not put_in and ahead < len(source) and source[ahead][0] in own:
                (low, high), at = source[ahead][1:], ahead + 1
            else:
                low = high = source[at][1] if at < len(source) else len(text)
            whole = (start + low, start + high, byte_at[start + low], byte_at[start + high])
            size = len(c.encode("utf-8", "surrogateescape")) if self.model.byte_level else 1
            if size == whole[3] - whole[2] > 1:                  # the bytes of an unchanged character, one by one
                units += [(*whole[:2], whole[2] + k, whole[2] + k + 1) for k in range(size)]
            else:
                units += [whole] * size
        for k in range(len(units) - 2, -1, -1):                  # what was put in stands where the next begins
            if units[k][0] == units[k][1]:
                units[k] = (units[k + 1][0],) * 2 + (units[k + 1][2],) * 2
        return units

    # ---- and back

    def decode_bytes(self, ids, skip_special=False):
        """The bytes of ids, exactly."""
        hidden = set(self.special.values()) if skip_special else ()
        try:
            raw = b"".join([self.bytes_of[i] for i in ids if i not in hidden])
        except KeyError as error:
            self.token_bytes(error.args[0])
        return raw.removesuffix(b" ") if self.strip == "right" else raw.removeprefix(b" ") if self.strip else raw

    def decode(self, ids, skip_special=False):
        """Text of ids; bytes that are not whole UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def save(self, path):
        """Write PATH/tokenizer.json, which load opens, and Hugging Face's tokenizers, with the same ids."""
        return save(self, path)

    @functools.cached_property
    def fingerprint(self):
        """A hash of everything that the ids depend on."""
        return hashlib.sha256(write_hf(self)).hexdigest()


class StreamDecoder:
    """decode for ids that come one after the other: push gives the text that is certain, whole characters only."""

    def __init__(self, tok):
        self.tok, self.utf8, self.held, self.fresh = tok, codecs.getincrementaldecoder("utf-8")("replace"), b"", tok.strip == "left"

    def push(self, ids):
        raw = self.held + b"".join(map(self.tok.token_bytes, ids))
        if self.fresh and raw:
            raw, self.fresh = raw.removeprefix(b" "), False
        cut = len(raw) - (self.tok.strip == "right" and raw.endswith(b" "))
        self.held = raw[cut:]
        return self.utf8.decode(raw[:cut])

    def flush(self):
        """What is left: U+FFFD for a character that never became whole."""
        return self.utf8.decode(b"", True)


TIDY = re.compile(r" ([.?!,]|n't|'m|'s|'ve|'re)$")       # BERT's clean-up: no space before these
BLANKS = frozenset(" \t\n\r\x0b\x0c\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000▁" + "".join(map(chr, range(0x2000, 0x200b))))
SPELLINGS = {                        # how the tokens of a vocabulary become bytes
    "bytes": lambda model, token: token,
    " ": lambda model, token: b" " + token.encode("utf-8"),      # tokenizer.json without a decoder: tokens are words
    "▁": lambda model, token: (bytes([int(token[3:5], 16)]) if model.byte_fallback and regex.fullmatch("<0x[0-9A-F]{2}>", token)
                               else token.replace("▁", " ").encode("utf-8")),
    "_": lambda model, token: (" " + token[1:] if token.startswith("_") else token).encode("utf-8"),
    "##": lambda model, token: (token[2:] if token.startswith("##") else " " + token).encode("utf-8"),
    "##tidy": lambda model, token: TIDY.sub(r"\1", token[2:] if token.startswith("##") else " " + token).encode("utf-8"),
    "</w>": lambda model, token: token.replace("</w>", " ").encode("utf-8"),
}


# ---- SentencePiece files (what is inside a .model?) ----
#
# One protocol buffer: a run of (key, value), where key = field number << 3 | wire type. Wire type 0 is a number in
# groups of seven bits, low ones first, whose top bit says that more follow; 2 is a length and that many bytes (text,
# bytes or a message in its turn); 1 and 5 are eight and four bytes. An absent field means its default.

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6         # types of pieces

# field number -> (name, kind, default). trainer_spec has forty more fields, which only tell how it was trained.
PIECE = {1: ("text", str, ""), 2: ("score", float, 0.0), 3: ("type", int, NORMAL)}
TRAINER = {3: ("model_type", int, 1), 4: ("vocab_size", int, 8000), 35: ("byte_fallback", bool, False),
           24: ("treat_whitespace_as_suffix", bool, False), 44: ("unk_surface", str, " \u2047 "),
           40: ("unk_id", int, 0), 41: ("bos_id", int, 1), 42: ("eos_id", int, 2), 43: ("pad_id", int, -1),
           45: ("unk_piece", str, "<unk>"), 46: ("bos_piece", str, "<s>"), 47: ("eos_piece", str, "</s>"),
           48: ("pad_piece", str, "<pad>")}
NORMALIZER = {1: ("name", str, ""), 2: ("precompiled_charsmap", bytes, b""), 3: ("add_dummy_prefix", bool, True),
              4: ("remove_extra_whitespaces", bool, True), 5: ("escape_whitespaces", bool, True)}
MODEL = {1: ("pieces", PIECE, ()), 2: ("trainer_spec", TRAINER, {}), 3: ("normalizer_spec", NORMALIZER, {}),
         5: ("denormalizer_spec", NORMALIZER, {})}


def not_a_model(at, why):
    return ValueError(f"byte {at}: {why}; this is no SentencePiece .model file, or a truncated or damaged one")


def read_varint(data, at):
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise not_a_model(at, "the data ends inside a number, or the number is longer than ten bytes")


def read_message(data, fields):
    """The bytes of a message as {name: value}, defaults filled in. Only pieces repeat: they come as a list of tuples."""
    out, at = {name: [] if kind is PIECE else default for name, kind, default in fields.values()}, 0
    while at < len(data):
        start, (key, at) = at, read_varint(data, at)
        number, wire = key >> 3, key & 7
        name, kind, _ = fields.get(number, ("", None, None))
        if wire not in (0, 1, 2, 5) or kind and wire != (0 if kind in (int, bool) else 5 if kind is float else 2):
            raise not_a_model(start, f"field {number} has wire type {wire}")
        value, at = read_varint(data, at) if wire in (0, 2) else (8 if wire == 1 else 4, at)
        if wire:                                                    # so far a size
            value, at = data[at:at + value], at + value
        if at > len(data):
            raise not_a_model(start, f"field {number} is to fill {at - len(data)} bytes more than there are")
        if not kind and fields is MODEL and number != 4 and number < 200:           # 4 is self-test data, 200 extensions
            raise not_a_model(start, f"a model has no field {number}")
        if kind is PIECE:
            out[name].append(tuple(read_message(value, PIECE).values()))
        elif kind:
            out[name] = (read_message(value, kind) if isinstance(kind, dict) else value.decode() if kind is str else
                         struct.unpack("<f", value)[0] if kind is float else kind(value) if kind is not int else
                         (value + (1 << 31) & (1 << 32) - 1) - (1 << 31))           # int32
    return out


def check_pieces(pieces):
    """What decoding relies on, and the library demands: a text names one piece, and one piece stands for the unknown."""
    texts = Counter((text, kind in (UNKNOWN, CONTROL, BYTE)) for text, _, kind in pieces)
    if bad := [text for (text, _), n in texts.items() if not text or n > 1]:
        raise ValueError(f"pieces must differ and not be empty: {bad[:5]}")
    if sum(kind == UNKNOWN for _, _, kind in pieces) != 1:
        raise ValueError("a model has exactly one piece of type 2, which stands for all that no other piece covers")


def read_model(data):
    """The bytes of a .model file -> {"pieces": [(text, score, type)], "trainer_spec": {...}, "normalizer_spec": {...}}."""
    try:
        model = read_message(bytes(data), MODEL)
    except UnicodeDecodeError as error:
        raise not_a_model(error.start, f"{error.object[:40]} is not UTF-8") from None
    for name in ("pieces", "trainer_spec", "normalizer_spec"):      # files hold them in this order: a cut one lacks the last
        if not model[name]:
            raise not_a_model(len(data), f"the data ends before any {name}")
    check_pieces(model["pieces"])
    return {name: value for name, value in model.items() if value}


def varint(value):
    value &= (1 << 64) - 1                                          # -1 travels as ten bytes of two's complement
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def write_message(values, fields):
    """The inverse of read_message; fields that hold their default are left out."""
    out = []
    for number, (name, kind, default) in fields.items():
        value = values.get(name, default)
        if value == default:
            continue
        if kind in (int, bool):
            out += varint(number << 3), varint(int(value))
        elif kind is float:
            out += varint(number << 3 | 5), struct.pack("<f", value)
        else:
            for part in [dict(zip(("text", "score", "type"), piece)) for piece in value] if kind is PIECE else [value]:
                body = write_message(part, kind) if isinstance(kind, dict) else part.encode() if kind is str else part
                out += varint(number << 3 | 2), varint(len(body)), body
    return b"".join(out)


def write_model(pieces, trainer_spec, normalizer_spec, **more):
    """pieces [(text, score, type)] and dicts of fields, as read_model gives them -> the bytes of a .model file."""
    check_pieces(pieces)
    if (sum(kind == BYTE for _, _, kind in pieces) == 256) != trainer_spec.get("byte_fallback", False):
        raise ValueError("byte_fallback=True and 256 pieces <0x00>...<0xFF> of type 6 need each other: give both or neither")
    trainer_spec = trainer_spec | dict(vocab_size=len(pieces), unk_id=[kind for _, _, kind in pieces].index(UNKNOWN))
    normalizer_spec = normalizer_spec | dict(name=normalizer_spec.get("name") or "identity")
    # The library wants a spec to be there even if all is default: model_type and name are written in any case.
    return write_message(dict(pieces=pieces, trainer_spec=trainer_spec, normalizer_spec=normalizer_spec, **more),
                         {**MODEL, 2: ("trainer_spec", {**TRAINER, 3: ("model_type", int, 0)}, {})})


# ---- Vocabulary files (whose file is this, and how is it written?) ----

def flat(node):
    """The steps of a part of tokenizer.json: nothing, one, or a (nested) sequence of them."""
    inside = [node[key] for key in ("normalizers", "pretokenizers", "decoders") if key in node] if node else [[]]
    return [step for child in inside[0] for step in flat(child)] if inside else [node]


numbered = lambda tokens: {token: i for i, token in enumerate(tokens)}
split_at = lambda pattern, behavior="Isolated", invert=False: dict(
    type="Split", pattern=dict(Regex=pattern), behavior=behavior, invert=invert)
charsmap_step = lambda charsmap: dict(
    type="Precompiled", precompiled_charsmap=base64.b64encode(charsmap).decode(), longest_match=True)
sennrich_cut = lambda glossaries=(): [split_at(LINE_WORDS, "Removed", True), *map(split_at, glossaries)]
GNMT_MARK = dict(type="Metaspace", replacement="_", prepend_scheme="always", split=True)


def read_hf(path, spec):
    """tokenizer.json of Hugging Face's tokenizers: every step by its name, the model as it stands."""
    model, *parts = spec["model"], *(flat(spec.get(key)) for key in ("normalizer", "pre_tokenizer", "decoder"))
    (normalizer, cut, decoder), added = parts, spec.get("added_tokens") or []
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram" if "unk_id" in model else "WordPiece")
    byte_level = any(step["type"] == "ByteLevel" for step in cut)
    if kind == "BPE":
        if prefix := model.get("continuing_subword_prefix"):
            raise UsageError(f"{path}: BPE with continuing_subword_prefix={prefix!r} is not read here; "
                             f"convert it to end_of_word_suffix or byte-level BPE")
        merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
        vocab, made, names = model["vocab"], {a + b for a, b in merges}, {token["content"] for token in added}
        if byte_level:
            vocab = {to_bytes(t): i for t, i in vocab.items() if len(t) == 1 or t in made or t not in names}
            merges = [(to_bytes(a), to_bytes(b)) for a, b in merges]
        ranks = {a + b: i for i, (a, b) in reversed([*enumerate(merges)])} if model.get("joined") else None
        core = BPE(vocab, None if ranks is not None else merges, ranks, byte_level=byte_level,
                   end=model.get("end_of_word_suffix") or "", unk=model.get("unk_token") or "",
                   **{key: bool(model.get(key)) for key in ("byte_fallback", "fuse_unk", "ignore_merges")})
    elif kind == "WordPiece":
        core = WordPiece(model["vocab"], model["unk_token"], model["continuing_subword_prefix"],
                         model.get("max_input_chars_per_word", 100))
    elif kind == "Unigram":
        core = Unigram(model["vocab"], model.get("unk_id"), model.get("byte_fallback"),
                       **{key: model.get(key, ()) for key in ("never", "users", "single")})
    else:
        raise UsageError(f"{path}: a model of type {kind} is not read here; BPE, WordPiece and Unigram are")
    kinds = {step["type"] for step in decoder}
    spelling = next(name for name, holds in {                    # the first that holds
        "bytes": byte_level, "##tidy": any(step.get("cleanup") for step in decoder), "##": "WordPiece" in kinds,
        "</w>": "BPEDecoder" in kinds, "_": any(step.get("replacement") == "_" for step in decoder),
        "▁": kinds & {"Metaspace", "Replace"}, " ": True}.items() if holds)
    scheme = lambda step: step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    opens = "Strip" in kinds or any(step["type"] == "Metaspace" and scheme(step) != "never" for step in decoder)
    strip = {"bytes": "", "</w>": "right", "▁": "left" * opens}.get(spelling, "left")
    return Tokenizer(core, normalizer, cut, added, spelling, strip)


BYTE_OF = {character: b for b, character in byte_alphabet().items()}


def to_bytes(token):
    """Bytes of a byte-level token as GPT-2's files write it; a token with other characters stands for itself."""
    return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode("utf-8")


def show(token):
    """A token as vocabulary files write it."""
    return "".join(map(byte_alphabet().__getitem__, token)) if isinstance(token, bytes) else token


def hf_json(tok):
    """The tokenizer as a tokenizer.json, which Hugging Face's tokenizers opens with the same ids."""
    model, vocab = tok.model, {show(token): i for token, i in tok.model.vocab.items()}
    if {*vocab.values(), *(token["id"] for token in tok.added)} != {*range(tok.n_vocab)}:
        vocab |= {token["content"]: token["id"] for token in tok.added}      # ids with gaps are kept only inside the model
    if isinstance(model, BPE):
        merges = model.merges
        if merges is None:           # it knows only ranks: every cut of a token into two tokens, in the order of the ranks
            known = model.rank.keys() | {token for token in model.vocab if len(token) == 1}
            merges = [(token[:i], token[i:]) for token in sorted(model.rank, key=lambda t: (model.rank[t], model.vocab[t]))
                      for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
        spec = dict(type="BPE", dropout=None, unk_token=model.unk or None, continuing_subword_prefix=None,
                    end_of_word_suffix=model.end or None, fuse_unk=model.fuse_unk, byte_fallback=model.byte_fallback,
                    ignore_merges=model.ignore_merges, joined=model.merges is None, vocab=vocab,
                    merges=[[show(a), show(b)] for a, b in merges])
    elif isinstance(model, WordPiece):
        spec = dict(type="WordPiece", unk_token=model.unk, continuing_subword_prefix=model.prefix,
                    max_input_chars_per_word=model.max_chars, vocab=vocab)
    else:
        spec = dict(type="Unigram", unk_id=model.unk_id, byte_fallback=model.byte_fallback, vocab=model.pieces,
                    never=model.never, users=model.users, single=model.single)
    sequence = lambda key, steps: None if not steps else steps[0] if len(steps) == 1 else {"type": "Sequence", key: steps}
    fallback = [dict(type="Replace", pattern=dict(String="▁"), content=" "), dict(type="ByteFallback"), dict(type="Fuse"),
                *([dict(type="Strip", content=" ", start=1, stop=0)] if tok.strip else [])]
    wordpiece = dict(type="WordPiece", prefix=getattr(model, "prefix", ""))
    decoder = {"bytes": BYTE_LEVEL, "##": wordpiece | dict(cleanup=False), "##tidy": wordpiece | dict(cleanup=True),
               "_": GNMT_MARK, "▁": sequence("decoders", fallback), "</w>": dict(type="BPEDecoder", suffix="</w>"),
               " ": None}[tok.spelling]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[plain | token for token in tok.added],
                normalizer=sequence("normalizers", tok.normalizer), pre_tokenizer=sequence("pretokenizers", tok.cut),
                post_processor=None, decoder=decoder, model=spec)


KNOWN_RANKS = {50256: "gpt2", 50257: "gpt2", 50280: "gpt2", 100256: "cl100k", 128000: "llama3", 151643: "qwen2",
               199998: "o200k", 200000: "o200k"}      # rank files hold no pattern: these numbers of ranks give them away
NFC = [dict(type="NFC")]


def read_ranks(path, raw, pattern):
    """A .tiktoken file: lines of 'base64 rank'."""
    pairs = map(bytes.split, filter(None, raw.splitlines()))
    ranks = {base64.b64decode(token.rstrip(b"=") + b"=="): int(rank) for token, rank in pairs}
    known = KNOWN_RANKS.get(len(ranks))
    return byte_bpe(ranks, pattern or known or "cl100k", steps=NFC if known == "qwen2" else ())       # as its owner does


def byte_bpe(ranks, pattern, special=(), merges=None, steps=()):
    """Byte-level BPE of `ranks` {token bytes: id}, with special tokens (names, or {name: id}) past the others."""
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UsageError(f"a byte-level vocabulary must hold all 256 bytes; missing {missing[:8]}")
    added = [dict(id=i, content=name, special=True) for name, i in special.items()] if isinstance(special, dict) else []
    core = BPE(ranks, merges, byte_level=True, ignore_merges=merges is None)
    return Tokenizer(core, steps, [*split_steps(pattern), BYTE_LEVEL], added).with_special(() if added else special)


def read_tekken(path, spec):
    """Mistral's tekken.json: ranks with the pattern beside them, the ids shifted past the special tokens."""
    config = spec["config"]
    shift, size = config["default_num_special_tokens"], config["default_vocab_size"]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] + shift for token in spec["vocab"][:size - shift]}
    named = {token["token_str"]: token["rank"] for token in spec.get("special_tokens") or []}
    named = named or numbered(("<unk>", "<s>", "</s>"))
    return byte_bpe(ranks, config["pattern"], named | {f"<SPECIAL_{i}>": i for i in range(shift) if i not in named.values()})


BESIDE = {"vocab.json": "merges.txt", "merges.txt": "vocab.json", "encoder.json": "vocab.bpe", "vocab.bpe": "encoder.json"}


def read_gpt2(path):
    """vocab.json with merges.txt beside it (encoder.json with vocab.bpe): byte-level BPE as GPT-2 has it."""
    other = path.with_name(BESIDE.get(path.name, "merges.txt"))
    if not other.is_file():
        raise UsageError(f"{path}: {other.name} must lie beside it; the one holds the ids, the other the merges")
    ids, lines = (file.read_text(encoding="utf-8") for file in ((path, other) if path.suffix == ".json" else (other, path)))
    vocab = json.loads(ids)
    merges = [tuple(line.split(" ")) for line in lines.split("\n") if line and not line.startswith("#version")]
    made = {a + b for a, b in merges}
    special = {token: i for token, i in vocab.items() if len(token) > 1 and token not in made}
    ranks = {to_bytes(t): i for t, i in vocab.items() if t not in special}
    return byte_bpe(ranks, "gpt2", special, [(to_bytes(a), to_bytes(b)) for a, b in merges])


SQUEEZE = r"\A +| +(?![\s\S])"      # spaces at both ends of a text (^ and $ would match at every line)


def sentencepiece_steps(charsmap, dummy_prefix, squeeze):
    """The normaliser of a SentencePiece model in the steps of tokenizer.json: the character map, spaces squeezed, one put
    before the text, all made visible. Hugging Face's step for maps works by graphemes; two NFC around it ("theirs": we
    leave them out, as our step finds what SentencePiece finds) bring it as near as it gets."""
    replace = lambda content, **find: dict(type="Replace", pattern=find, content=content)
    steps = [replace(" ", String="\r") | dict(theirs=True)] if charsmap and read_charsmap(charsmap).get("\r") == " " else []
    steps += [dict(type="NFC", theirs=True), charsmap_step(charsmap), dict(type="NFC", theirs=True)] if charsmap else []
    steps += [replace("", Regex=SQUEEZE), replace(" ", Regex=" {2,}")] if squeeze else []
    steps += [dict(type="Prepend", prepend="▁")] if dummy_prefix else []
    return [*steps, replace("▁", String=" "), *([replace("", Regex=r"▁+(?![\s\S])")] if squeeze else [])]


def read_sentencepiece(path, raw):
    """A SentencePiece .model: Unigram or BPE over text whose spaces are visible."""
    spec = read_model(raw)
    trainer, norm, pieces = spec["trainer_spec"], spec["normalizer_spec"], spec["pieces"]
    bpe, of_kind = trainer["model_type"] == 2, lambda *kinds: [i for i, piece in enumerate(pieces) if piece[2] in kinds]
    refused = {"treat_whitespace_as_suffix": trainer["treat_whitespace_as_suffix"],
               "escape_whitespaces=false": not norm["escape_whitespaces"],
               "a model_type other than unigram and bpe": trainer["model_type"] not in (1, 2),
               "an unused piece": bpe and of_kind(UNUSED)}
    if what := next((what for what, found in refused.items() if found), ""):
        raise UsageError(f"{path}: {what} is not read here; train the model without it")
    users, unk = of_kind(USER_DEFINED), of_kind(UNKNOWN)[0]
    added = [dict(id=i, content=pieces[i][0], special=True) | (dict(surface=trainer["unk_surface"]) if i == unk else {})
             for i in of_kind(CONTROL, UNKNOWN)]
    longest = "|".join(map(regex.escape, sorted((pieces[i][0] for i in users), key=len, reverse=True)))
    if bpe:
        core = BPE({text: i for i, (text, _, kind) in enumerate(pieces) if kind != CONTROL}, None,
                   {text: -score for text, score, kind in pieces if kind == NORMAL}, unk=pieces[unk][0],
                   byte_fallback=trainer["byte_fallback"], fuse_unk=True, ignore_merges=bool(users))
    else:
        worth = [(text, 0.1 * (len(text.encode()) - 1) if kind == USER_DEFINED else score) for text, score, kind in pieces]
        core = Unigram(worth, trainer["unk_id"], trainer["byte_fallback"], single=True, users=users,
                       never=[i for i, piece in enumerate(pieces) if piece[2] not in (NORMAL, USER_DEFINED)])
    steps = sentencepiece_steps(norm["precompiled_charsmap"], norm["add_dummy_prefix"], norm["remove_extra_whitespaces"])
    strip = "left" * (norm["add_dummy_prefix"] or norm["remove_extra_whitespaces"])
    return Tokenizer(core, steps, [split_at(longest)] if bpe and users else [], added, "▁", strip)


BERT = dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
WORDPIECE_CUTS = {"##": [dict(type="BertPreTokenizer")], "_": [dict(type="WhitespaceSplit"), GNMT_MARK]}


def read_vocab_txt(path, raw):
    """vocab.txt of WordPiece: a token a line, its number the id; `##` inside words, or `_` before them. BERT's normaliser,
    in lower case unless the vocabulary knows capitals."""
    tokens = [token.rstrip("\r") for token in raw.decode("utf-8").removesuffix("\n").split("\n")] if raw else []
    vocab = numbered(tokens)
    unk = next((name for name in ROLES["unk"] if name in vocab), None)
    if unk is None or len(vocab) < len(tokens):
        raise UsageError(f"{path}: not a WordPiece vocabulary: expected different tokens, a line each, one of them [UNK]")
    named = filter(regex.compile(r"\[[A-Z]+\]|<\S+>").fullmatch, tokens)
    added = [dict(id=vocab[token], content=token, special=True) for token in named]
    starts = {token[:1] for token in tokens} | {token[:2] for token in tokens}
    style = "_" if "_" in starts and "##" not in starts else "##"
    lower = all(token == token.lower() for token in tokens if token[:1] not in "[<")
    core = WordPiece(vocab, unk, style.replace("_", ""))
    return Tokenizer(core, [BERT | dict(lowercase=lower)], WORDPIECE_CUTS[style], added, style, "left")


def read_codes(path, raw):
    """Merges of subword-nmt ('#version: 0.2', then a pair a line). It knows no ids: they count its symbols as they come,
    after <unk>."""
    first, *lines = raw.decode("utf-8").split("\n")
    if not first.startswith("#version:") or first.removeprefix("#version:").strip() != "0.2":
        raise UsageError(f"{path}: expected subword-nmt codes that begin with '#version: 0.2', not {first[:40]!r}")
    merges = [tuple(line.split(" ")) for line in (line.strip("\r ") for line in lines) if line]
    if wrong := next((number for number, pair in enumerate(merges, 2) if len(pair) != 2), None):
        raise UsageError(f"{path}: line {wrong} is not a pair of symbols; the file is damaged")
    symbols = ["<unk>"]
    for token in itertools.chain(*merges):                       # its characters, the end of a word on the last one
        body = token.removesuffix("</w>")
        symbols += [*body[:-1], body[-1:] + token[len(body):]] if body else []
    return sennrich(numbered(dict.fromkeys([*symbols, *(a + b for a, b in merges)])), merges)


def sennrich(vocab, merges, steps=(), cut=()):
    core, unk = BPE(vocab, merges, end="</w>", unk="<unk>"), dict(id=vocab["<unk>"], content="<unk>", special=True)
    return Tokenizer(core, steps, cut or sennrich_cut(), [unk], "</w>", "right")


def limit(tok, vocabulary="", threshold=0, glossaries=()):
    """The tokenizer under subword-nmt's options: only pieces listed in the file `vocabulary` (lines of 'piece count') with a
    count of `threshold` or more, others go back to what they were merged from; words that match a glossary stay whole."""
    if not isinstance(tok.model, BPE) or tok.model.end != "</w>":
        raise UsageError("--vocabulary and --glossaries are options of BPE with </w> (train --model=bpe, or subword-"
                         "nmt codes)")
    model = BPE(tok.model.vocab, tok.model.merges, end="</w>", unk="<unk>")
    if vocabulary:
        try:
            lines = [line.split(" ") for line in Path(vocabulary).read_text(encoding="utf-8").split("\n") if line.strip()]
            model.allowed = {piece for piece, count in lines if int(count) >= threshold}
        except (OSError, ValueError) as error:
            raise UsageError(f"--vocabulary={vocabulary}: expected lines of 'piece count' as subword-nmt writes them "
                             f"({error})") from None
    if glossaries:
        model.whole = compiled("|".join(glossaries))
    return Tokenizer(model, tok.normalizer, sennrich_cut(glossaries), tok.added, tok.spelling, tok.strip)


IN_FOLDERS = ("tokenizer.json", "vocab.json", "encoder.json", "*.model", "*.spm", "*.tiktoken", "tekken*.json", "vocab.txt",
              "*.model.v*", "codes*")        # what load looks for, best first
DAMAGE = (LookupError, TypeError, AttributeError, ValueError, StopIteration, RecursionError, EOFError, OSError,
          OverflowError, struct.error, zlib.error)          # how readers fail on a file that is not whole


def load(path_or_name, pattern=""):
    """Open any tokenizer: tokenizer.json, vocab.json + merges.txt, a .tiktoken rank file (cut by `pattern`), tekken.json, a
    SentencePiece .model, vocab.txt, subword-nmt codes; a folder with one of them; 'bytes'; or a name that tiktoken knows
    (fetched by tiktoken: needs the network or its cache). What a file is, its content says, not its name."""
    path, name = Path(path_or_name), str(path_or_name)
    if name == "bytes":
        return byte_bpe({bytes([b]): b for b in range(256)}, "gpt2", ["<|endoftext|>"])
    if path.is_dir():
        path, folder = next((file for glob in IN_FOLDERS for file in sorted(path.glob(glob))), None), path
        if not path:
            raise UsageError(f"the folder {folder} holds no vocabulary file; expected one of {', '.join(IN_FOLDERS)}")
    if path.is_file():
        try:
            tok = read_any(path, path.read_bytes(), pattern)
            ids, more = [*tok.model.vocab.values()], [token["id"] for token in tok.added]
            if not all(type(i) is int and 0 <= i < 2**31 for i in [*ids, *more]) or len(set(ids)) < len(ids):
                raise ValueError("ids must be different whole numbers from 0 on")
            tok.decode(tok.encode_reference("a b"))              # what is missing shows here, not in the middle of work
            return tok
        except UsageError as error:
            raise error if str(path) in str(error) else UsageError(f"{path}: {error}") from None
        except DAMAGE as error:
            raise UsageError(f"{path}: not a whole vocabulary file ({type(error).__name__}: {error}); "
                             f"copy or save it again") from None
    if name not in tiktoken.list_encoding_names():
        raise UsageError(f"no tokenizer at {name}: expected a vocabulary file, a folder with one, 'bytes' or one of "
                         f"{tiktoken.list_encoding_names()}")
    try:
        core = tiktoken.get_encoding(name)
    except OSError as error:
        raise UsageError(f"tiktoken could not fetch {name} ({type(error).__name__}: no network?); "
                         f"train one with --tokenizer='' or give a local file") from None
    return byte_bpe(core._mergeable_ranks, core._pat_str, core._special_tokens)


def read_any(path, raw, pattern):
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    first, other = raw.split(b"\n", 1)[0], BESIDE.get(path.name)
    if raw[:1] == b"{":
        spec = json.loads(raw)
        if isinstance(spec.get("model"), dict):
            return read_hf(path, spec)
        return read_tekken(path, spec) if isinstance(spec.get("config"), dict) else read_gpt2(path)
    if first.startswith(b"#version") and other and path.with_name(other).is_file():
        return read_gpt2(path)
    if first.startswith(b"#version") or path.name.startswith("codes"):
        return read_codes(path, raw)
    if regex.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?", first):
        return read_ranks(path, raw, pattern)
    return (read_sentencepiece if first == b"" or b"\0" in raw[:4096] else read_vocab_txt)(path, raw)


def write_hf(tok):
    return json.dumps(hf_json(tok), ensure_ascii=False).encode("utf-8")


def write_ranks(tok):
    if not tok.core or tok.normalizer not in ([], NFC):
        raise UsageError("only byte-level BPE that tiktoken itself can do can be written as .tiktoken ranks: one "
                         "pattern that covers any text, no normaliser, merges in the order of their ids;"
                         " write it with --to hf")
    ranks = sorted(tok.model.vocab.items(), key=operator.itemgetter(1))
    return b"".join((base64.b64encode(token) or b"=") + b" %d\n" % i for token, i in ranks)


def write_codes(tok):
    if not (isinstance(tok.model, BPE) and tok.model.end == "</w>") or tok.normalizer or tok.cut != sennrich_cut():
        raise UsageError("only BPE with </w> as --model=bpe trains it, without --normalizer and --pattern, has subword-nmt "
                         "codes")
    return "".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in tok.model.merges)]).encode("utf-8")


def write_vocab_txt(tok):
    raw = "".join(f"{tok.pieces.get(i)}\n" for i in range(tok.n_vocab)).encode("utf-8")
    whole = isinstance(tok.model, WordPiece) and sorted(tok.pieces) == [*range(tok.n_vocab)]
    back = read_vocab_txt("vocab.txt", raw) if whole else None
    if not back or (back.normalizer, back.cut, back.special) != (tok.normalizer, tok.cut, tok.special):
        raise UsageError("only WordPiece with BERT's normaliser and words can be written as vocab.txt: ids from 0 on "
                         "without gaps, special tokens named like [CLS] or <s>, capitals kept or not as the tokens say")
    return raw


def write_sentencepiece(tok):
    """A .model of Unigram, or of BPE over visible spaces; its normaliser must be one that sentencepiece_steps gives."""
    model, unigram = tok.model, isinstance(tok.model, Unigram)
    steps = {step["type"]: step for step in reversed(tok.normalizer)}
    charsmap = base64.b64decode(steps["Precompiled"]["precompiled_charsmap"]) if "Precompiled" in steps else b""
    dummy, squeeze = "Prepend" in steps, any(step.get("pattern") == dict(Regex=SQUEEZE) for step in tok.normalizer)
    cuts = [step["pattern"]["Regex"] if step["type"] == "Split" else "" for step in tok.cut]
    names = {re.sub(r"\\(.)", r"\1", part) for cut in cuts for part in regex.split(r"(?<!\\)\|", cut)}
    if (tok.spelling != "▁" or not names <= model.vocab.keys() or isinstance(model, BPE) and model.merges is not None
            or tok.normalizer != sentencepiece_steps(charsmap, dummy, squeeze)):
        raise UsageError("only Unigram and BPE trained in SentencePiece's way (train --model=unigram, or bpe with "
                         "--style=sp) can be written as a SentencePiece .model; this tokenizer cuts or normalises text "
                         "differently")
    score = dict(model.pieces) if unigram else {token: -float(rank) for token, rank in model.rank.items()}
    users = {*(model.users if unigram else ()), *(model.vocab[name] for name in names)}
    kind = lambda i, text: (UNKNOWN if text == model.unk else CONTROL if text in tok.special else USER_DEFINED if i in users
                            else BYTE if model.byte_fallback and regex.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL)
    texts = [tok.pieces[i] for i in range(tok.n_vocab)]
    trainer = dict(model_type=1 if unigram else 2, byte_fallback=model.byte_fallback, unk_piece=model.unk)
    for role in ("bos", "eos", "pad"):
        trainer[f"{role}_id"] = next((tok.special[name] for name in ROLES[role] if name in tok.special), -1)
        trainer |= {f"{role}_piece": texts[trainer[f"{role}_id"]]} if trainer[f"{role}_id"] >= 0 else {}
    norm = dict(name="nmt_nfkc" if charsmap else "identity", precompiled_charsmap=charsmap, add_dummy_prefix=dummy,
                remove_extra_whitespaces=squeeze)
    return write_model([(text, score.get(text, -1e4 - i), kind(i, text)) for i, text in enumerate(texts)], trainer, norm)


WRITERS = {                          # --to: how to write a tokenizer, and the name of the file
    "hf": (write_hf, "tokenizer.json"),
    "tiktoken": (write_ranks, "vocab.tiktoken"),
    "sentencepiece": (write_sentencepiece, "tokenizer.model"),
    "subword-nmt": (write_codes, "codes.txt"),
    "vocab.txt": (write_vocab_txt, "vocab.txt"),
}


def save(tok, path, to="hf"):
    """Write PATH (a file where it has the usual ending, else a folder); whole or not at all."""
    (write, name), path = WRITERS[to], Path(path)
    file, raw = path if path.suffix and not path.is_dir() else path / name, write(tok)
    try:
        with atomic_write(file) as out:
            out.write(raw)
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}); name another --out") from None
    return file


# ---- Training a tokenizer (text in, one of the four out) ----

PUNCTUATION_MAP = dict(zip("‘’‚‛“”„‟′″‐‑‒–—―−、。《》〈〉「」『』【】·", "''''\"\"\"\"'\"-------,.<><>\"\"''[]."))
PUNCTUATION_MAP |= {"…": "...", "⋯": "..."}
TABLES = {                           # --normalizer: maps of characters, each written into the vocabulary file as a table
    "nfkc": nfkc_table,
    "nmt_nfkc": lambda: nfkc_table(nmt=True),
    "lower": lambda: {c: _lower(c) for c in map(chr, range(0x110000)) if _lower(c) != c},
    "punctuation": lambda: PUNCTUATION_MAP,
    "fullwidth": lambda: {chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)} | {"\u3000": " "},
}
STEPS = {"nfc": NFC[0], "nfkc": dict(type="NFKC"), "lower": dict(type="Lowercase"), "bert": BERT}    # or steps of their own


def one_table(names):
    """The maps of several normalisers as one, in their order."""
    table = {}
    for name in names:
        if name not in TABLES:
            raise UsageError(f"--normalizer={name} is not a map of characters, the only kind a SentencePiece model can "
                             f"hold; use some of {list(TABLES)}")
        new = TABLES[name]()
        run = make_normalizer(new)
        table = {source: run(to) for source, to in table.items()} | {s: to for s, to in new.items() if s not in table}
    return table


def blueprint(model, style, pattern, normalizer):
    """(normaliser, cut) for a tokenizer to be trained."""
    names = normalizer or {"sp": ["nmt_nfkc"], "##": ["bert"], "_": ["bert"]}.get(style, [])
    names = [name for name in names if name != "none"]
    cut = split_steps(pattern or "cl100k") if pattern or model == "bbpe" else []
    if style == "sp":
        return sentencepiece_steps(write_charsmap(one_table(names)), True, bool(names)), cut
    steps = [STEPS.get(name) or charsmap_step(write_charsmap(TABLES[name]())) for name in names]
    return steps, [*cut, BYTE_LEVEL] if model == "bbpe" else cut or WORDPIECE_CUTS.get(style) or sennrich_cut()


def alphabet_of(words, coverage):
    """The characters of the words, the most frequent first, until they make up `coverage` of the text."""
    counts = Counter()
    for word, n in words.items():
        for c in word:
            counts[c] += n
    order = sorted(counts, key=lambda c: (-counts[c], c))
    share = np.cumsum([counts[c] for c in order]) / max(1, sum(counts.values()))
    return order[:1 + int(np.searchsorted(share, coverage - 1e-12))]


def within(words, alphabet):
    """The words cut at characters beyond the alphabet."""
    known, kept = regex.compile("[" + regex.escape("".join(alphabet), special_only=False) + "]+"), Counter()
    for word, n in words.items():
        for part in known.findall(word):
            kept[part] += n
    return kept


def check_room(size, alphabet):
    if size < len(alphabet):
        raise UsageError(f"--vocab_size={size} is smaller than the {len(alphabet)} bytes and characters that this text is "
                         f"made of; use {len(alphabet)} or more"
                         + ", or a smaller --character_coverage" * (len(alphabet) > 256))
    return size - len(alphabet)


def learn_bytes(words, size, steps, cut, tie="hf", **limits):
    """Byte-level BPE. The base ids are the bytes in GPT-2's order (tie hf) or by value."""
    order = list(byte_alphabet()) if tie == "hf" else list(range(256))
    raw, spelled = [word.encode("utf-8", "surrogateescape") for word in words], [bytes([b]) for b in order]
    lengths, counts = np.array([*map(len, raw)], np.int64), np.fromiter(words.values(), np.int64, len(words))
    symbols = np.argsort(order).astype(np.int32)[np.frombuffer(b"".join(raw), np.uint8)]
    words.clear()                                                # the arrays hold all of it
    del raw
    pairs = learn_merges(symbols, lengths, counts, spelled, check_room(size, order), tie, **limits)
    merges = [(spelled[a], spelled[b]) for a, b in pairs]
    return Tokenizer(BPE(numbered(spelled), merges, byte_level=True), steps, cut)


def learn_characters(words, size, steps, cut, style, fallback=(), letters=None, **limits):
    """BPE over characters: Sennrich's with </w>, or SentencePiece's, whose vocabulary has the letters last. The symbols are
    the characters in the order of their code points, after them those at the end of a word, if these are told apart."""
    words = within(words, letters) if letters else words
    lengths, counts = np.array([*map(len, words)], np.int64), np.fromiter(words.values(), np.int64, len(words))
    codes = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    codes[np.cumsum(lengths) - 1] += (style == "</w>") << 21
    codes, symbols = np.unique(codes, return_inverse=True)
    base = [chr(code & 0x1FFFFF) + "</w>" * (code >> 21) for code in codes.tolist()]
    spelled, room = list(base), check_room(size, [*fallback, *(letters or base)])
    pairs = learn_merges(symbols.astype(np.int32), lengths, counts, spelled, room, **limits)
    merges = [(spelled[a], spelled[b]) for a, b in pairs]
    if style == "</w>":
        return sennrich(numbered(["<unk>", *spelled]), merges, steps, cut)
    order = [*spelled[len(base):], *letters]
    return sentencepiece(BPE(numbered(["<unk>", *fallback, *order]), None, numbered(order), unk="<unk>",
                             byte_fallback=bool(fallback), fuse_unk=True), steps, cut)


def learn_wordpieces(words, size, steps, cut, style, letters, min_frequency=0, max_token_length=0, progress=None, **_):
    words, mark = within({word: n for word, n in words.items() if len(word) <= 100}, letters), style * (style == "##")
    first = {word[0] for word in words}
    alphabet = sorted(first) + sorted({mark + c for word in words for c in word[1:]} - first)
    check_room(size, alphabet)
    vocab = numbered(["[UNK]", *learn_wordpiece(words, size, alphabet, mark, min_frequency, max_token_length, progress)])
    return Tokenizer(WordPiece(vocab, "[UNK]", mark), steps, cut, [dict(id=0, content="[UNK]", special=True)], style, "left")


def learn_unigram(words, size, steps, cut, style, fallback, letters, max_token_length=0, progress=None, **_):
    check_room(size, [*fallback, *letters])
    pieces = [(token, 0.0) for token in ("<unk>", *fallback)]
    pieces += train_unigram(within(words, letters), size - len(fallback), letters, max_token_length or 16, progress)
    return sentencepiece(Unigram(pieces, 0, bool(fallback), never=range(1 + len(fallback)), single=True), steps, cut)


def sentencepiece(core, steps, cut):
    unk = dict(id=0, content="<unk>", special=True)
    return Tokenizer(core, steps, cut, [unk], "▁", "left").with_special(["<s>", "</s>"])


KINDS = {                            # --model: who learns it, in each --style, the first being the default
    "bbpe": {"bytes": learn_bytes},
    "bpe": {"</w>": learn_characters, "sp": learn_characters},
    "wordpiece": {"##": learn_wordpieces, "_": learn_wordpieces},
    "unigram": {"sp": learn_unigram},
}


def train(texts, model="bbpe", vocab_size=32_000, *, pattern="", special=(), tie="hf", min_frequency=0, max_token_length=0,
          normalizer=(), style="", character_coverage=0.0, byte_fallback=True, workers=1, progress=None):
    """Learn a tokenizer from texts (an iterable of str, read once, never held). Returns (tokenizer, (words, different words)).

    vocab_size counts the base alphabet but not the special tokens, <unk> among them: those come on top. A corpus that cannot
    fill the vocabulary gives a smaller one."""
    style = style or next(iter(KINDS[model]))
    if style not in KINDS[model]:
        raise UsageError(f"--style={style} is not a style of --model={model}; use one of {list(KINDS[model])}")
    limits = dict(tie=tie, min_frequency=min_frequency, max_token_length=max_token_length)
    if min(min_frequency, max_token_length) < 0 or model == "unigram" and min_frequency:
        raise UsageError(f"--min_frequency={min_frequency} --max_token_length={max_token_length}: use 0 or more, and no --min_frequency "
                         f"with --model=unigram, which merges nothing")
    if not 0 <= character_coverage <= 1:
        raise UsageError(f"--character_coverage={character_coverage} is out of range; use a share such as 0.9995, at most 1")
    if model == "bbpe":
        check_room(vocab_size, range(256))
    steps, cut = blueprint(model, style, pattern, normalizer)
    words = count_words(map(clean_surrogates, texts), steps, cut, style == "sp", workers, progress)
    if not words:
        raise UsageError("the input holds no text; give files with some")
    seen = sum(words.values()), len(words)
    if model != "bbpe":
        limits |= dict(style=style, fallback=[f"<0x{b:02X}>" for b in range(256)] if style == "sp" and byte_fallback else [])
        if limits["fallback"]:
            words.pop("\n", None)                                # a line break is the piece <0x0A>
        if style != "</w>":
            limits["letters"] = alphabet_of(words, character_coverage or (0.9995 if style == "sp" else 1.0))
    tok = KINDS[model][style](words, vocab_size, steps, cut, progress=progress, **limits)
    return tok.with_special(special), seen


# ---- Bench (how fast, next to the libraries that do the same?) ----

def in_child(work):
    """(CPU seconds with all threads and children, wall seconds, peak MB) of work() in a process of its own."""
    sys.stdout.flush()
    start, pid = time.perf_counter(), os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)                                       # no clean-up of the parent's state; a traceback was printed
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError("a run of the bench failed; its message stands above")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start, usage.ru_maxrss / 1024


def race(title, works, rounds):
    """Print, for {name: what to run}, the best CPU and wall seconds and peak memory of some rounds in turn, and the ratio
    of everything called ours... to the others."""
    spent = {name: [] for name in works}
    for name in [*works] * rounds:
        spent[name].append(in_child(works[name]))
    best = {name: [*map(min, zip(*figures))] for name, figures in spent.items()}
    others = [name for name in best if not name.startswith("ours")]
    print(f"\n{title}\n  {'':24s} {'CPU s':>8s} {'wall s':>8s} {'peak MB':>8s}  CPU ratio to {', '.join(others)}")
    for name, (cpu, wall, peak) in best.items():
        ratios = "  ".join(f"{cpu / best[other][0]:.2f}x" for other in others if name not in others)
        print(f"  {name:24s} {cpu:8.2f} {wall:8.2f} {peak:8.0f}  {ratios}")


def contests(texts, peers, args):
    """Yield (title, {name: what to run}); peers that are not installed will not be called."""
    hf, sp, pattern = peers.get("tokenizers"), peers.get("sentencepiece"), compiled(PATTERNS[args.pattern]).pattern
    ours = lambda workers=1: train(texts(), "bbpe", args.vocab_size, pattern=args.pattern, workers=workers)
    lines = [line for line in "".join(itertools.islice(texts(), 200))[:1_500_000].split("\n") if line]
    tok, mb = ours()[0], f"{sum(map(len, lines)) / 1e6:.1f} MB"

    def hugging_face():
        theirs, byte_level = hf.Tokenizer(hf.models.BPE()), hf.pre_tokenizers.ByteLevel
        theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"),
                                                           byte_level(add_prefix_space=False, use_regex=False)])
        theirs.train_from_iterator(texts(), hf.trainers.BpeTrainer(vocab_size=args.vocab_size, show_progress=False,
                                                                   initial_alphabet=byte_level.alphabet()))

    def subword_nmt():
        with contextlib.redirect_stderr(io.StringIO()):          # its progress bar
            peers["subword_nmt.learn_bpe"].learn_bpe(lines, io.StringIO(), 3000)

    yield f"train BBPE {args.vocab_size}", {
        "tokenizers": hugging_face,
        "rustbpe": lambda: peers["rustbpe"].Tokenizer().train_from_iterator(texts(), args.vocab_size, pattern=pattern),
        "ours, 1 process": ours, f"ours, {cores()} processes": lambda: ours(cores())}
    theirs = hf and hf.Tokenizer.from_str(json.dumps(hf_json(tok)))
    yield "encode with the same ranks", {
        "tokenizers": lambda: [theirs.encode(text) for text in texts()],
        "tiktoken": lambda: [tok.core.encode_ordinary(text) for text in texts()],
        "ours": lambda: [tok.encode(text) for text in texts()],
        "ours, plain Python": lambda: [tok.encode_reference(text) for text in texts()]}
    yield f"train BPE </w>, {mb}, 3000 merges", {
        "subword_nmt.learn_bpe": subword_nmt,
        "ours": lambda: train(iter(lines), "bpe", 3000 + len({*"".join(lines)}), tie="lex", min_frequency=2)}
    yield f"train Unigram 4000, {mb}", {
        "sentencepiece": lambda: sp.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=io.BytesIO(), vocab_size=4000, minloglevel=2, hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc"),
        "ours": lambda: train(iter(lines), "unigram", 4000, byte_fallback=False)}


def bench_command(args):
    """Each row: CPU seconds, best of --rounds runs in turn, and the ratio to the peers of its group."""
    import importlib
    import sysconfig
    peers = {}
    for name in ("tokenizers", "rustbpe", "subword_nmt.learn_bpe", "sentencepiece"):
        with contextlib.suppress(ImportError):
            peers[name] = importlib.import_module(name)
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    paths = args.input or [path for path in sources if "site-packages" not in path.parts]
    texts = lambda: (document["text"] for document in documents(paths, Counter()))
    size = sum(len(text.encode("utf-8", "replace")) for text in texts())
    print(f"{size / 1e6:.1f} MB, {args.vocab_size:,} tokens, pattern {args.pattern}; {cores()} cores; "
          f"CPU seconds, the best of {args.rounds} runs in turn")
    for title, works in contests(texts, peers, args):
        race(title, {name: work for name, work in works.items() if name in peers or name.startswith(("ours", "tiktoken"))}, args.rounds)


# ---- Command line ----

def demo():
    text = " ".join(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3)
    print(f"corpus: {text!r}\n")
    tok, _ = train([text], "bbpe", 256 + 10, pattern="gpt2", special=["eos"])
    print("BBPE, most frequent pair first (a space belongs to the word after it):")
    for rank, (a, b) in enumerate(tok.model.merges):
        print(f"  {256 + rank}: {a.decode()!r} + {b.decode()!r}")
    for sample in (" lowest newer", " 你好", "<|endoftext|>"):
        ids = tok.encode(sample)
        print(f"  {sample!r}: {len(sample.encode())} bytes -> {len(ids)} tokens {' '.join(tok.pieces[i] for i in ids)}")
        assert tok.decode(ids) == sample and ids == tok.encode_reference(sample)
    ids = tok.encode("<|endoftext|>", allowed_special="all")
    print(f"  a special token enters only where the caller allows it: {ids}\n")
    for model, size in (("bpe", 25), ("wordpiece", 25), ("unigram", 30)):
        tok, _ = train([text], model, size, byte_fallback=False)
        print(f"{model + ':':10s} {' '.join(pieces_of(tok, 'lowest newer'))}")
    draw = random.Random(0)
    sampled = (tok.encode("newest", alpha=0.1, rng=draw) for _ in range(4))
    print("sampled:   " + " | ".join(" ".join(map(tok.pieces.get, ids)) for ids in sampled))


def marked_parts(tok, word):
    """The parts of a word as subword-nmt prints them: all but the last end in @@."""
    parts = [part.removesuffix(tok.model.end) for each in tok.words(word) for part, _ in tok.model.segment(each)]
    return [part + "@@" for part in parts[:-1]] + parts[-1:]


def pieces_of(tok, text):
    """What the tokens of a text look like: parts of words with @@ where the model marks the ends of words, else as the
    vocabulary has them, SentencePiece's unknown text as it stands."""
    if tok.model.end:
        known = tok.__dict__.setdefault("marked", Cache(functools.partial(marked_parts, tok)))
        return [*itertools.chain.from_iterable(map(known.__getitem__, compiled(LINE_WORDS).findall(text)))]
    found = []
    for part, token in tok.sections(text):
        for piece, ids in [(part, [token["id"]])] if token else itertools.chain(*map(tok.model.segment, tok.words(part))):
            names = [tok.pieces[i] for i in ids]
            found += [piece] if names == [tok.model.unk] and tok.spelling == "▁" else names
    return found


def train_command(args):
    start, report = time.perf_counter(), Counter()
    if Path(args.out).is_file():
        raise UsageError(f"--out={args.out} is a file; name a folder for tokenizer.json")
    home = next(folder for folder in (Path(args.out), *Path(args.out).absolute().parents) if folder.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise UsageError(f"--out={args.out} cannot be written; name a folder that can")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that worker processes are ended, too
    progress = Progress(sum(os.path.getsize(path) for path in input_files(args.input) if path != "-"))
    part = 0 if args.pattern and args.pattern not in PATTERNS else 1 << 24       # one's own regex may look anywhere
    texts = (document["text"] for document in documents(args.input, report, part))
    options = {key: value for key, value in vars(args).items() if key not in ("command", "input", "out")}
    try:
        tok, (words, different) = train(texts, progress=progress, **options | dict(workers=args.workers or cores()))
    finally:
        progress.end()
    if skipped := warn_about(report):
        print(f"skipped {skipped}", file=sys.stderr)
    size = tok.n_vocab - len(tok.special)
    if size < args.vocab_size:
        print(f"warning: the corpus fills only {size:,} of {args.vocab_size:,} tokens", file=sys.stderr)
    tok.save(args.out)
    print(f"{size:,} tokens from {report['documents']:,} documents ({words:,} words, {different:,} "
          f"different) in {time.perf_counter() - start:.1f} s -> {args.out}/tokenizer.json")


class Progress:
    """How far counting (in bytes of text) and merging are, with the time left: on a terminal one line rewritten, else a
    line every ten seconds."""

    def __init__(self, total_bytes, out=sys.stderr):
        self.total, self.out, self.last, self.started = total_bytes, out, time.monotonic(), {}

    def __call__(self, what, done, total=0):
        now, total = time.monotonic(), total or self.total
        start = self.started.setdefault(what, now)
        if now - self.last < (0.2 if self.out.isatty() else 10) or now == start:
            return
        self.last = now
        left = f", {(now - start) * (total - done) / done:.0f} s left" if 0 < done < total else ""
        line = f"{what} {min(1, done / max(total, 1)):.0%}{left}"
        print(f"\r\x1b[K{line}" if self.out.isatty() else f"{line}\n", end="", file=self.out, flush=True)

    def end(self):
        print("\r\x1b[K" * self.out.isatty(), end="", file=self.out, flush=True)


def input_lines():
    """Lines of stdin; bytes that are not UTF-8 travel as surrogate escapes."""
    return (line.decode("utf-8", "surrogateescape").removesuffix("\n") for line in sys.stdin.buffer)


def encode_command(args):
    tok, draw = load(args.tok), random.Random(args.seed)
    sampling = dict(dropout=args.dropout) if args.dropout else {}
    sampling |= dict(alpha=args.alpha, nbest=args.nbest) if args.alpha else {}
    if args.vocabulary or args.glossaries:
        tok = limit(tok, args.vocabulary, args.vocabulary_threshold, args.glossaries)
    encode = tok.encode_reference if args.engine == "python" else functools.partial(tok.encode, rng=draw, **sampling)
    for line in input_lines():
        if args.format == "pieces":
            kept = line.strip("\r\n ") if tok.model.end else line          # subword-nmt keeps the blanks around a line
            lead, _, trail = line.partition(kept) if kept else (line, "", "")
            print(lead + " ".join(pieces_of(tok, line)) + trail)
        else:
            print(*encode(line.encode("utf-8", "surrogateescape")))


def decode_command(args):
    tok = load(args.tok)
    for number, line in enumerate(input_lines(), 1):
        try:
            sys.stdout.buffer.write(tok.decode_bytes([*map(int, line.split())]) + b"\n")
        except ValueError as error:
            hint = "" if isinstance(error, UsageError) else "; expected ids separated by spaces"
            raise UsageError(f"line {number}: {error}{hint}") from None


def convert_command(args):
    tok = load(args.tok)
    print(f"{tok.n_vocab:,} tokens -> {save(tok, args.out, args.to)}")
    gpt2 = [*split_steps("gpt2"), BYTE_LEVEL], [dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)]
    if args.to == "hf" and Path(args.out).is_dir() and tok.cut in gpt2 and tok.model.merges and not tok.normalizer:
        with atomic_write(Path(args.out) / "vocab.json", "w") as vocab, atomic_write(Path(args.out) / "merges.txt", "w") as merges:
            json.dump({piece: i for i, piece in sorted(tok.pieces.items())}, vocab, ensure_ascii=False)
            merges.write("#version: 0.2\n" + "".join(f"{show(a)} {show(b)}\n" for a, b in tok.model.merges))
        print(f"and as GPT-2 has it -> {args.out}/vocab.json, merges.txt")
    if args.to == "tiktoken":
        print("a rank file holds neither the pattern nor the special tokens; give tiktoken:",
              dict(pat_str=tok.core._pat_str, special_tokens=tok.special))


SCRIPTS = {name: regex.compile(rf"\p{{{name}}}") for name in (
    "Han Latin Cyrillic Arabic Hangul Hiragana Katakana Greek Hebrew Devanagari Thai").split()}


def language_of(document):
    """What a document says of itself (lang, language, meta.lang), else the script of most of its letters."""
    meta = document["meta"] if isinstance(document.get("meta"), dict) else {}
    named = next(filter(None, (where.get(key) for where in (document, meta) for key in ("lang", "language"))), None)
    counts = {name: len(find.findall(document["text"][:2000])) for name, find in SCRIPTS.items()}
    counts["Japanese"] = counts.pop("Hiragana") * 3 + counts.pop("Katakana") * 3
    return str(named) if named else max(counts, key=counts.get) if any(counts.values()) else "no letters"


def eval_command(args):
    toks, report, find_words = {name: load(name) for name in args.tok}, Counter(), regex.compile(r"\w+|[^\w\s]").findall
    rows, used = {name: {} for name in toks}, {name: set() for name in toks}
    for document in documents(args.input, report):
        text = document["text"]
        size, words = len(text.encode("utf-8", "replace")), len(find_words(text))
        for name, tok in toks.items():
            ids = tok.encode(text)
            rows[name].setdefault(language_of(document), Counter()).update(
                documents=1, bytes=size, words=words, tokens=len(ids), exact=tok.decode(ids) == text)
            used[name].update(ids)
    if not any(rows.values()):
        raise UsageError(f"--input={' '.join(args.input)} holds no text; give a file with some")
    for name, tok in toks.items():
        print(f"{name}: {tok.n_vocab:,} tokens, {len(used[name]) / tok.n_vocab:.1%} of them used\n"
              "  language     documents       MB bytes/token tokens/word round trip")
        languages = sorted(rows[name].items(), key=lambda item: -item[1]["bytes"])
        for language, row in [*languages, ("all", sum(rows[name].values(), Counter()))]:
            n, size, words, tokens, exact = map(row.__getitem__, ("documents", "bytes", "words", "tokens", "exact"))
            print(f"  {language:12s} {n:9,d} {size / 1e6:8.2f} {size / max(1, tokens):11.3f} {tokens / max(1, words):11.3f} "
                  f"{exact / n:10.1%}")
    if skipped := warn_about(report):
        print(f"skipped {skipped}", file=sys.stderr)


def show_command(args):
    tok = load(args.tok)
    text = args.text or sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    print(f"{'id':>8s}  {'bytes':>13s}  {'characters':>13s}  token")
    for id, (low, high), (first, last) in tok.spans(text):
        print(f"{id:8d}  {low:6d}-{high:<6d}  {first:6d}-{last:<6d}  {tok.pieces[id]!r} {tok.token_bytes(id)!r}")


NORMALIZER_NAMES, STYLES = ["none", *dict.fromkeys([*STEPS, *TABLES])], [*dict.fromkeys(itertools.chain(*KINDS.values()))]
TOK = ("tok", str, "any vocabulary file, a folder with one, or a name")
INPUT = ("input", list, ".txt, .jsonl, .jsonl.gz, folders, - for stdin")
COMMANDS = {            # (who does it, help, flags: (name, default or, where it must be given, its type, help, choices))
    "train": (train_command, "learn a vocabulary from text", [
        ("model", "bbpe", "algorithm", [*KINDS]),
        ("vocab_size", int, "tokens to learn, the base alphabet included; special tokens come on top"),
        ("pattern", "", f"where to cut words: one of {[*PATTERNS]} or a regular expression (bbpe: cl100k)"),
        ("tie", "hf", "which of equally frequent pairs merges first", [*TIES]),
        ("min_frequency", 0, "merge no pair seen less often"),
        ("max_token_length", 0, "longest token, in bytes or characters; 0: any (unigram: 16)"),
        ("normalizer", [], "what to do to text first", NORMALIZER_NAMES),
        ("style", "", "bpe: </w> or sp (SentencePiece); wordpiece: ## or _", STYLES),
        ("character_coverage", 0.0, "share of the characters that get a token (sp: 0.9995, else 1)"),
        ("byte_fallback", True, "sp: unknown characters become bytes, not <unk>"),
        ("special", [], f"special tokens, on the ids after all others: names, roles ({', '.join(ROLES)}), sentinels=N"),
        ("workers", 0, "processes that count; the result is the same for any number (0: one a core)"),
        INPUT, ("out", str, "folder to write tokenizer.json to; one that is there is replaced")]),
    "encode": (encode_command, "text on stdin to ids, a line each", [
        TOK, ("format", "ids", "what to print", ["ids", "pieces"]),
        ("engine", "auto", "python: the reference encoder, without tiktoken's core", ["auto", "python"]),
        ("dropout", 0.0, "BPE-dropout: leave out merges with this probability"),
        ("alpha", 0.0, "Unigram: sample segmentations, the more even the smaller; 0: the best one"),
        ("nbest", -1, "with --alpha: sample from so many best ones; -1: from all"), ("seed", 0, "of the sampling"),
        ("vocabulary", "", "subword-nmt: file of 'piece count' lines; other pieces are split up"),
        ("vocabulary_threshold", 0, "subword-nmt: pieces of the vocabulary seen less often are split up too"),
        ("glossaries", [], "subword-nmt: words or regular expressions that stay whole")]),
    "decode": (decode_command, "ids on stdin, a line each, to text", [TOK]),
    "convert": (convert_command, "write a vocabulary for another library", [
        TOK, ("to", str, "whose file to write", [*WRITERS]), ("out", str, "file or folder")]),
    "eval": (eval_command, "bytes per token, tokens per word, vocabulary use and round trip, by script or language", [
        ("tok", list, "vocabularies to compare"), INPUT]),
    "show": (show_command, "tokens, ids, and the bytes and characters of the text they stand for", [
        TOK, ("text", "", "text to show (stdin without it)")]),
    "bench": (bench_command, "time training and encoding against the libraries that are installed", [
        ("input", [], "text to use (without it: the sources of Python's standard library)"),
        ("vocab_size", 32_000, "tokens to learn"), ("pattern", "cl100k", "where to cut words", [*PATTERNS.keys() - {"deepseek"}]),
        ("rounds", 3, "runs of each, in turn; the best counts")]),
}


def main(argv):
    if not argv:
        return demo()
    run_commands(argv, "tokenizer.py", "Train, use, convert and compare tokenizers.", COMMANDS)


if __name__ == "__main__":
    run_cli(main)
