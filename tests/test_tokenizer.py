import json
import random
import subprocess
import sys
from collections import Counter

import pytest

import tokenizer as T
from conftest import ROOT

TEXT = ("It was the best of times, it was the worst of times; it's what they've said. 我们在这里学习语言模型。 naïve café 😀 "
        "def f(x):\n    return x ** 2  # square\n\n\tif x >= 12345: pass\n") * 3
ODD = ["", " ", "\n", "a", "aaaaaaa", "  \n\n  x", "don't DON'T", "😀" * 3, "\u0000\u0001", "a" * 500, "\ud800 lone", "\ud83d\ude00"]


def slow_bpe(words, vocab_size):
    """BPE as the paper's algorithm 1 has it, recounting everything at every step; ties to the smallest pair of ids."""
    order = list(T.byte_alphabet())
    spelled = [bytes([b]) for b in order]
    words = [([order.index(b) for b in word.encode()], n) for word, n in words.items()]
    while len(spelled) < vocab_size:
        pairs = Counter()
        for ids, n in words:
            for pair in zip(ids, ids[1:]):
                pairs[pair] += n
        if not pairs:
            break
        top = max(pairs.values())
        a, b = min(pair for pair, n in pairs.items() if n == top)
        spelled.append(spelled[a] + spelled[b])
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if ids[i] == a and ids[i + 1] == b:
                    ids[i:i + 2] = [len(spelled) - 1]
                i += 1
    return {token: i for i, token in enumerate(spelled)}


def test_worked_example():
    """aaabdaaabac: aa is the most frequent pair (4 overlapping places), then aaa... small enough for paper."""
    ranks = T.train_bbpe(Counter({"aaabdaaabac": 1}), 256 + 3)
    assert [token for token, i in ranks.items() if i >= 256] == [b"aa", b"ab", b"aaab"]
    tok = T.ByteBPE(ranks, ".+")
    assert tok.encode_reference("aaabdaaabac") == tok.encode("aaabdaaabac")
    assert [tok.token_bytes(i) for i in tok.encode("aaabdaaabac")] == [b"aaab", b"d", b"aaab", b"a", b"c"]


@pytest.mark.parametrize("seed", range(6))
def test_training_equals_the_slow_algorithm(seed):
    draw = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdé"
    words = Counter({"".join(draw.choice(letters) for _ in range(draw.randint(1, 12))): draw.randint(1, 9) for _ in range(60)})
    assert T.train_bbpe(words, 300) == slow_bpe(words, 300)


def test_counts_beyond_32_bits():
    words = Counter({"ab": 2**40, "cd": 2**40 + 1})
    assert list(T.train_bbpe(words, 257))[-1] == b"cd"


def test_encoder_equals_tiktoken_and_round_trips():
    for pattern in T.PATTERNS:
        tok = T.ByteBPE(T.train_bbpe(T.count_pretokens([TEXT], pattern), 400), pattern, ["<|endoftext|>"])
        for text in [TEXT, *ODD]:
            ids = tok.encode(text)
            assert ids == tok.encode_reference(text)
            assert tok.decode(ids) == T.clean_surrogates(text)
        assert tok.encode_batch([TEXT, "x"]) == [tok.encode(TEXT), tok.encode("x")]


def test_patterns_lose_no_character():
    for name in T.PATTERNS:
        for text in [TEXT, *ODD]:
            assert "".join(T.compiled(name).findall(text)) == text


def test_a_vocabulary_that_cannot_be_filled_ends_smaller():
    assert len(T.train_bbpe(Counter({"ab": 1}), 1000)) == 257
    assert len(T.train_bbpe(Counter({"ab": 1, "cd": 3}), 1000, min_frequency=2)) == 257


def test_special_tokens_enter_only_where_allowed():
    tok = T.ByteBPE(T.train_bbpe(Counter({"ab": 3}), 257), "gpt2", ["<|endoftext|>", "<|end"])
    name = "<|endoftext|>"
    assert tok.special[name] not in tok.encode(name) and tok.decode(tok.encode(name)) == name
    assert tok.encode(f"a{name}b", allowed_special="all") == [*tok.encode("a"), tok.special[name], *tok.encode("b")]
    assert tok.special[name] not in tok.encode(name, allowed_special=["<|end"])
    assert tok.encode(name, allowed_special=["<|end"])[0] == tok.special["<|end"]


def test_save_and_load(tmp_path):
    tok = T.ByteBPE(T.train_bbpe(T.count_pretokens([TEXT], "cl100k"), 400), "cl100k", ["<|endoftext|>"])
    tok.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        again = T.load(path)
        assert (again.ranks, again.special, again.n_vocab) == (tok.ranks, tok.special, tok.n_vocab)
        assert again.encode(TEXT) == tok.encode(TEXT)
    made = {b"".join(pair) for pair in tok.merges()}
    assert made == {token for token in tok.ranks if len(token) > 1}
    assert T.load("bytes").encode("hé") == [104, 195, 169]


def test_rank_files_load(tmp_path):
    import base64
    ranks = T.train_bbpe(T.count_pretokens([TEXT], "gpt2"), 300)
    (tmp_path / "r.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for t, i in ranks.items()))
    assert T.load(tmp_path / "r.tiktoken", "gpt2").ranks == ranks


def test_readers_count_what_they_skip(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one", "id": 7}\nnot json\n{"no": 1}\n\n{"text": ""}\n{"text": "tw\xffo"}\n[1]\n')
    (tmp_path / "b.txt").write_bytes(b"three\n\xfe\xfe")
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    (tmp_path / ".hidden").write_text("no")
    report = Counter()
    docs = list(T.documents([tmp_path], report))
    assert [d["text"] for d in docs] == ["one", "two", "three\n"] and docs[0]["id"] == 7
    assert dict(report) == dict(files=3, documents=3, bad_lines=3, bad_bytes=3, empty=1, not_text=1)
    assert "3 lines" in T.warn_about(report) and "3 bytes" in T.warn_about(report)


def test_gzip_lines(tmp_path):
    import gzip
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n{"text": "y"}\n'))
    assert [d["text"] for d in T.documents([tmp_path / "a.jsonl.gz"], Counter())] == ["x", "y"]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 999)[:-9])
    with pytest.raises(T.UsageError, match="cut.jsonl.gz"):
        list(T.documents([tmp_path / "cut.jsonl.gz"], Counter()))


@pytest.mark.parametrize("make, says", [
    (lambda p: T.load(p / "none"), "no tokenizer at"),
    (lambda p: T.train_bbpe(Counter({"a": 1}), 99), "256 or more"),
    (lambda p: T.compiled("(((").findall(""), "regular expression"),
    (lambda p: list(T.documents([p / "none.txt"], Counter())), "there is no file"),
    (lambda p: list(T.documents([p], Counter())), "holds no files"),
    (lambda p: T.load("bytes").token_bytes(999), "not in this vocabulary"),
    (lambda p: T.ByteBPE({b"a": 0}, "gpt2"), "all 256 bytes"),
])
def test_mistakes_are_named(make, says, tmp_path):
    with pytest.raises(T.UsageError, match=says):
        make(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"model": {"type": "BPE"}}', '{"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "X"}}'])
def test_damaged_vocabulary_files(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(T.UsageError, match="tokenizer.json"):
        T.load(tmp_path)


def test_atomic_write_leaves_all_or_nothing(tmp_path):
    with T.atomic_write(tmp_path / "f", "w") as file:
        file.write("old")
    with pytest.raises(RuntimeError):
        with T.atomic_write(tmp_path / "f", "w") as file:
            file.write("half of the new")
            raise RuntimeError
    assert (tmp_path / "f").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_flags_come_from_the_source(tmp_path):
    (tmp_path / "x.py").write_text('@dataclass\nclass XConfig:\n    size: int = 1_000  # how big, 5 % of all\n    rate: float = 1e-3  # r\n'
                                   '    on: bool = False  # o\n    go: str = flag("", bare="now")  # g\n    files: tuple = flag((), many=True)  # f\n'
                                   '    kind: str = "a"  # k\nKINDS = {"a": 1, "b": 2}  # flag --kind\n')
    parser = T.Parser()
    T.add_flags(parser, [tmp_path / "x.py"])
    read = lambda *argv: vars(parser.parse_args(list(argv)))
    assert read() == {}
    assert read("--size=1e6", "--rate", "2", "--on", "--go", "--files", "a", "b", "--kind=b") == dict(
        size=1_000_000, rate=2.0, on=True, go="now", files=["a", "b"], kind="b")
    assert read("--on=false", "--go=here") == dict(on=False, go="here")
    for argv, says in ((["--sizes=1"], "did you mean --size"), (["--kind=c"], "'a', 'b'"), (["--size=x"], "whole number"),
                       (["--si=1"], "no flag"), (["stray"], "stands alone"), (["--on=maybe"], "true or false"), (["--rate=nan"], "number")):
        with pytest.raises(T.UsageError, match=says):
            read(*argv)
    assert "5 % of all" in parser.format_help()


def test_command_line(tmp_path):
    (tmp_path / "in.txt").write_text(TEXT)
    run = lambda *argv, stdin="": subprocess.run([sys.executable, ROOT / "tokenizer.py", *map(str, argv)], input=stdin, capture_output=True, text=True)
    done = run("train", "--vocab_size=320", "--input", tmp_path / "in.txt", "--out", tmp_path / "tok", "--special", "<|endoftext|>")
    assert done.returncode == 0 and "320 tokens" in done.stdout, done.stderr
    ids = run("encode", "--tok", tmp_path / "tok", stdin="best of times\n").stdout
    assert [int(i) for i in ids.split()] == T.load(tmp_path / "tok").encode("best of times")
    assert run("decode", "--tok", tmp_path / "tok", stdin=ids).stdout == "best of times\n"
    for argv, says in ((["train", "--vocab_size=320", "--input", tmp_path / "none", "--out", tmp_path / "t2"], "none"),
                       (["encode", "--tok", tmp_path / "none"], "no tokenizer"), (["decode", "--tok", "bytes"], "line 1")):
        bad = run(*argv, stdin="999999")
        assert bad.returncode == 2 and says in bad.stderr and bad.stderr.count("\n") == 1
    assert not (tmp_path / "t2").exists()


@pytest.mark.peer
@pytest.mark.parametrize("pattern", list(T.PATTERNS))
def test_equals_hugging_face(pattern, tmp_path):
    """Merges, vocabulary order and ids, and the saved file opens there."""
    hf = pytest.importorskip("tokenizers")
    import data
    texts = [d["text"] for d in data.stdlib_documents(Counter())][::12] + [TEXT]
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(T.PATTERNS[pattern]), "isolated"), hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator(texts, hf.trainers.BpeTrainer(vocab_size=3000, show_progress=False,
                                                             initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
    tok = T.ByteBPE(T.train_bbpe(T.count_pretokens(texts, pattern), 3000), pattern, ["<|endoftext|>"])
    show = lambda token: "".join(T.byte_alphabet()[b] for b in token)
    assert {show(t): i for t, i in tok.ranks.items()} == theirs.get_vocab()
    assert [[show(a), show(b)] for a, b in tok.merges()] == [list(m) for m in json.loads(theirs.to_str())["model"]["merges"]]
    tok.save(tmp_path)
    opened = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*texts[:20], *ODD[:-2]]:
        assert tok.encode(text) == theirs.encode(text).ids == opened.encode(text).ids
        assert opened.decode(tok.encode(text)) == text
