"""Faults: whatever happens to a save or to its files, one whole checkpoint is found, or the run is told that there is none."""
import builtins
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch

import dist
import tokenizer
from conftest import fork, launch, wait
from dist import Held, World
from tokenizer import UsageError

SHARDS = ["shard_00000.safetensors", "shard_00001.safetensors"]
FILES = [*SHARDS, "manifest.json"]
QUIET = dict(say=lambda text: None)


def held(step, rank, ranks):
    """Rows of a matrix on every rank, a column-cut one, and a vector that rank 0 writes."""
    place, other = (2 * rank, 0), (0, 3 * rank)
    return {"w": Held(torch.full((2, 5), float(step)), (2 * ranks, 5), [(place, (0, 0), (2, 5))]),
            "u": Held(torch.full((4, 3), float(step)).bfloat16(), (4, 3 * ranks), [(other, (0, 0), (4, 3))]), "b": torch.full((7,), step)}


def save(folder, step, world=World(), **options):
    dist.save_checkpoint(folder, step, held(step, world.rank, world.size), {"next_sample": step}, world=world, **options)


def whole(folder):
    """The step of the newest checkpoint, after a look at every element of it."""
    saved = dist.newest_checkpoint(folder, **QUIET)
    assert saved.state == {"next_sample": saved.step} and len(saved.table) == 3
    assert all((saved.whole(name) == saved.step).all() for name in saved.table)
    return saved.step


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Steps 1 and 2, saved by two ranks."""
    folder = tmp_path_factory.mktemp("pair")

    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        for step in (1, 2):
            save(folder, step, world, keep=9)
        dist.shutdown()

    assert launch(body, 2) == [0, 0]
    return folder


@pytest.fixture
def saved(pair, tmp_path):
    shutil.copytree(pair, tmp_path / "ckpt")
    return tmp_path / "ckpt"


# ---- Killed while saving ----

def die_at(nth):
    """SIGKILL at the nth point of a save: before each call that changes the disk, half-way through each write, and before the
    ranks agree."""
    count = 0

    def point():
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(function):
        def call(*args, **options):
            point()
            return function(*args, **options)
        return call

    class Half:
        """A file whose writes can end in the middle."""

        def __init__(self, *args, **options):
            self.file = open(*args, **options)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, block):
            self.file.write(block[:len(block) // 2])
            self.file.flush()
            point()
            self.file.write(block[len(block) // 2:])

    tokenizer.open = Half
    for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    dist._first_said = dying(dist._first_said)


def killed_at_every_point(home, ranks, victim, **options):
    """Step 2 is saved after step 1, with keep=1, and the victim killed at point after point until it outlives them all: how many there are."""
    for nth in range(1, 99):
        folder = home / str(nth)
        save(folder, 1)

        def body():
            world = dist.init(dist.DistConfig(device="cpu"))
            if world.rank == victim:
                die_at(nth)
            tick = time.monotonic()
            try:
                save(folder, 2, world, keep=1, **options)
                dist.saving()
            except OSError:                                      # what a survivor is told; anything else is exit code 1
                pass
            assert time.monotonic() - tick < 10

        codes = launch(body, ranks)
        assert all(code in ((0, -signal.SIGKILL) if rank == victim else (0,)) for rank, code in enumerate(codes)), (nth, codes)
        assert whole(folder) in (1, 2), nth
        if codes[victim] == 0:
            return nth - 1
        save(folder, 3)                                          # a new run's first save sweeps
        assert whole(folder) == 3 and not list(folder.glob(".*")), nth
    raise AssertionError("the save never ends")


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_any_point_of_a_save(background, tmp_path):
    assert killed_at_every_point(tmp_path, ranks=1, victim=0, background=background) >= 30


@pytest.mark.parametrize("victim, least, background", [
    (0, 35, False), pytest.param(0, 35, True, marks=pytest.mark.slow), pytest.param(1, 12, False, marks=pytest.mark.slow)])
def test_one_rank_of_two_is_killed_at_any_point_of_a_save(victim, least, background, tmp_path):
    """The other one is told so soon, and does not wait for ever."""
    assert killed_at_every_point(tmp_path, 2, victim, timeout=0.5, background=background) >= least


def test_a_rank_that_is_late_is_named_and_all_give_up(tmp_path):
    save(tmp_path, 1)

    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        if world.rank == 1:
            write = dist.write_safetensors
            dist.write_safetensors = lambda *args: (time.sleep(1.5), write(*args))[1]
        with pytest.raises(OSError) as caught:
            save(tmp_path, 2, world, timeout=0.3)
        assert world.rank == 1 or isinstance(caught.value, TimeoutError) and "rank_00001" in str(caught.value)
        dist.write_safetensors = write if world.rank else dist.write_safetensors
        save(tmp_path, 2, world)                                 # and it goes on
        dist.shutdown()

    assert launch(body, 2) == [0, 0]
    assert whole(tmp_path) == 2 and not list(tmp_path.glob(".saving-*"))


# ---- A full disk ----

@pytest.mark.parametrize("full, limit, says", [(0, 100, "rank 0: File too large"), (1, 100, "rank 1: File too large"),
                                               (1, 0, "could not even write why")])
def test_one_full_disk_fails_every_rank(full, limit, says, tmp_path):
    save(tmp_path, 1)
    state = (tmp_path / "latest").read_bytes()

    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        if world.rank == full:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for _ in range(2):                                       # and again at the next interval
            with pytest.raises(OSError) as caught:
                save(tmp_path, 2, world, keep=1)
            assert caught.value.strerror and (world.rank == full or says in caught.value.strerror), caught.value
            dist.barrier(world)
            assert [p.name for p in sorted(tmp_path.iterdir())] == ["latest", "step_00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        save(tmp_path, 3, world)
        dist.shutdown()

    assert launch(body, 2) == [0, 0]
    assert state == b"step_00000001" and whole(tmp_path) == 3


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for background in (False, True):
        with pytest.raises(OSError, match="file"):               # at once, not after the timeout
            save(tmp_path / "file/ckpt", 1, background=background)
            dist.saving()


def test_rank_0_does_not_wait_for_a_note_that_it_could_not_write(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dist, "write_safetensors", full)
    monkeypatch.setattr(Path, "write_text", full)
    tick = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 1, timeout=20)
    assert time.monotonic() - tick < 10 and not list(tmp_path.iterdir())


# ---- Damage ----

def test_every_flipped_bit_is_seen_and_the_older_one_used(saved):
    tried = 0
    for name in FILES:
        path = saved / "step_00000002" / name
        raw = path.read_bytes()
        for offset in range(0, len(raw), max(1, len(raw) // 110)):
            path.write_bytes(raw[:offset] + bytes([raw[offset] ^ 1 << offset % 8]) + raw[offset + 1:])
            said = []
            assert dist.newest_checkpoint(saved, said.append).step == 1, (name, offset)
            assert len(said) == 1 and "step_00000002" in said[0] and name in said[0] and "\n" not in said[0], said
            tried += 1
        path.write_bytes(raw)
    assert tried >= 300 and whole(saved) == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage, says", [("missing", "No such file"), ("empty", ""), ("cut", ""), ("longer", ""), ("a link", "plain"),
                                          ("a pipe", "plain"), ("a folder", "plain")])
def test_damaged_files_are_named_and_passed_over(name, damage, says, saved):
    path = saved / "step_00000002" / name
    raw = path.read_bytes()
    path.unlink()
    if damage in ("empty", "cut", "longer"):
        path.write_bytes({"empty": b"", "cut": raw[:len(raw) // 2], "longer": raw + b" "}[damage])
    elif damage == "a link":
        (saved / "elsewhere").write_bytes(raw)
        path.symlink_to(saved / "elsewhere")
    elif damage != "missing":
        os.mkfifo(path) if damage == "a pipe" else path.mkdir()
    said = []
    assert dist.newest_checkpoint(saved, said.append).step == 1
    assert len(said) == 1 and name in said[0] and says in said[0], said
    shutil.rmtree(saved / "step_00000001")
    with pytest.raises(UsageError, match="all 1 checkpoints in .* are damaged"):             # never silently from the beginning
        dist.newest_checkpoint(saved, **QUIET)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_only_rank_1_cannot_see(name, saved):
    """Also where rank 0 is the one to hash it: what any rank misses, all pass over."""
    def body():
        world, said = dist.init(dist.DistConfig(device="cpu")), []
        if world.rank == 1:
            def blind(function):
                def call(path, *args, **options):
                    if str(path).endswith(f"step_00000002/{name}"):
                        raise FileNotFoundError(2, "No such file or directory", str(path))
                    return function(path, *args, **options)
                return call
            builtins.open, os.path.getsize, Path.read_text = blind(open), blind(os.path.getsize), blind(Path.read_text)
        assert dist.newest_checkpoint(saved, said.append, world).step == 1
        assert len(said) == (world.rank == 0) and all(name in line and "No such file" in line for line in said), said
        dist.shutdown()

    assert launch(body, 2) == [0, 0] and whole(saved) == 2


def test_damage_is_found_by_whoever_hashes_and_the_error_is_everyones(saved):
    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        hashed = []
        plain, dist.file_hash = dist.file_hash, lambda path: (hashed.append(path.name), plain(path))[1]
        dist.open_checkpoint(saved / "step_00000001", world)
        assert hashed == [SHARDS[world.rank]]                    # each file once
        for name in SHARDS:
            with pytest.raises(UsageError, match=f"{name} is damaged"):
                dist.open_checkpoint(saved / f"bad_{name}", world)
        with pytest.raises(UsageError, match="all 2 checkpoints"):
            dist.newest_checkpoint(saved / "bad", print, world)
        if world.rank == 1:                                      # as where a file system shows a rank the folder of before
            read = dist._read_manifest
            dist._read_manifest = lambda path: read(saved / "step_00000001")
        with pytest.raises(UsageError, match="rank 1 does not see the manifest that rank 0 sees"):
            dist.open_checkpoint(saved / "step_00000002", world)
        dist.shutdown()

    for name in SHARDS:
        shutil.copytree(saved / "step_00000002", saved / f"bad_{name}")
        raw = bytearray((saved / f"bad_{name}" / name).read_bytes())
        raw[-1] ^= 1
        (saved / f"bad_{name}" / name).write_bytes(raw)
    for step, name in ((1, SHARDS[0]), (2, SHARDS[1])):
        shutil.copytree(saved / f"bad_{name}", saved / f"bad/step_{step:08d}")
    assert launch(body, 2) == [0, 0]


# ---- Malice ----

def sign(folder, change=lambda manifest: None):
    """Change a manifest and make every hash in it right again, as who wrote it could."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, want in manifest["files"].items():
        want.update(sha256=dist.file_hash(folder / name), bytes=os.path.getsize(folder / name))
    change(manifest)
    manifest["sha256"] = dist._own_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder, says="step_00000002"):
    with pytest.raises(UsageError, match=says):
        dist.open_checkpoint(folder)


@pytest.mark.parametrize("signed", [False, True])
def test_pickles_are_not_opened(signed, saved, tmp_path):
    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/touched",)

    payload, folder = pickle.dumps(Touch()), saved / "step_00000002"
    for name in FILES:
        raw = (folder / name).read_bytes()
        for bad in (payload, struct.pack("<Q", len(payload)) + payload):
            (folder / name).write_bytes(bad)
            if signed and name != "manifest.json":
                sign(folder)
            refused(folder)
            assert dist.newest_checkpoint(saved, **QUIET).step == 1
        (folder / name).write_bytes(raw)
    assert not (tmp_path / "touched").exists()
    pickle.loads(payload)                                        # the payload is a live one
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", [
    "../step_00000001/shard_00000.safetensors", "../../secret", "/etc/passwd", "..", ".", "", "manifest.json", "a\0b",
    "SHARD_00000.safetensors",
    "shard_00000.safetensors/../../../secret", "shard_00000.safetensors\n", "shard_0000\u0660.safetensors", "./shard_00000.safetensors"])
def test_a_manifest_cannot_point_outside_its_folder(name, saved, tmp_path, monkeypatch):
    shutil.copy(saved / "step_00000001" / SHARDS[0], tmp_path / "secret")
    folder, opened = saved / "step_00000002", []
    sign(folder, lambda m: m.update(files={name: m["files"].pop(SHARDS[0])} | m["files"]))
    for function in ("read_safetensors", "file_hash", "_plain"):
        plain = getattr(dist, function)
        monkeypatch.setattr(dist, function, lambda path, plain=plain: (opened.append(path.name), plain(path))[1])
    with pytest.raises(UsageError, match="names a file outside its folder"):
        dist.open_checkpoint(folder)
    assert opened == ["manifest.json"]                           # and nothing after it was looked at


W, PIECE = ("tensors", "w"), ("tensors", "w", "pieces", 0)
CLAIMS = [                         # where in a manifest, and what it then says
    ((*W, "shape"), [[2**60], [2**31, 5], [4, 2**40], [5, 5], [4], [], [-4, -5], [4.0, 5], [True, 20], ["4", 5], None, "45", {}, [0, 2**63],
                     [10**30, 0], [[4], 5]]),
    ((*W, "dtype"), ["F64", "BF16", "F99", None, "object", []]), ((*W, "pieces"), [[], None, [{}], {}, 3, [None]]),
    ((*PIECE, "size"), [[2**30, 5], [2, 2**60], [1, 5], [2], [2, -5], [2.0, 5], [True, 5], None]),
    ((*PIECE, "place"), [[2**62, 0], [1, 0], [2, 0], [-2, 0], [0], [0, 0, 0], [0.0, 0], [False, 0], "00", None]),
    ((*PIECE, "file"), ["shard_00009.safetensors", "../x", None, 7, []]), ((*PIECE, "key"), ["none", "b", None, {}]),
    (("tensors",), [{}, [], None]), (("files",), [{}, [], None, "x"]), (("step",), ["2", None, 2.0, []]), (("state",), [None, [], 1]),
    (("format",), [1, 3, "2", None]), (("files", SHARDS[0]), [{}, None, 3]), (("files", SHARDS[0], "bytes"), [2**60, -1, "9", None]),
    (("files", SHARDS[0], "sha256"), [None, 3, "", []]),
    (("tensors", "new"), [None, dict(dtype="F32"), dict(dtype="F99", shape=[0], pieces=[]), dict(dtype="F32", shape=[2**31], pieces=[]),
                          dict(dtype="F32", shape=[0, 2**62, 2**62], pieces=[])])]


def put(manifest, keys, value):
    for key in keys[:-1]:
        manifest = manifest[key]
    manifest[keys[-1]] = value


def limited(body, room=1 << 29):
    """In a child that cannot have more than half a gigabyte beyond what it has."""
    def small():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
        with pytest.raises(RuntimeError):
            torch.empty(2**30)
        body()
    assert wait(fork(small)) == 0


def test_claims_that_the_files_do_not_bear_out_are_refused(saved):
    """All hashes are right. Nothing is allocated for what a manifest merely says."""
    folder = saved / "step_00000002"
    raw = (folder / "manifest.json").read_bytes()

    def body():
        for keys, value in [(keys, value) for keys, values in CLAIMS for value in values]:
            (folder / "manifest.json").write_bytes(raw)
            sign(folder, lambda manifest: put(manifest, keys, value))
            assert (folder / "manifest.json").read_bytes() != raw
            refused(folder)
        for text in (b"[" * 100_000, b"[]", b"null", b"3", b"\xff\xfe", b"{" * 9, raw + b" ", raw[:-1],
                     raw.replace(b'"step"', b'"step": 2, "step"')):
            (folder / "manifest.json").write_bytes(text)
            refused(folder, "manifest.json is not whole")

    limited(body)
    (folder / "manifest.json").write_bytes(raw)
    sign(folder)
    assert (folder / "manifest.json").read_bytes() == raw and whole(saved) == 2


def test_headers_that_their_files_do_not_bear_out_are_refused(saved):
    folder = saved / "step_00000002"
    raw = (folder / SHARDS[0]).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:8 + length]), raw[8 + length:]
    key = next(iter(header))

    def head(text):
        (folder / SHARDS[0]).write_bytes(struct.pack("<Q", len(text)) + text + data)
        sign(folder)

    def body():
        entry = header[key]
        for bad in (dict(shape=[2**60]), dict(shape=[2**30, 5], data_offsets=[0, 5 * 2**32]), dict(data_offsets=[0, 2**60]),
                    dict(shape=[2.0, 5]),
                    dict(data_offsets=[-40, 0]), dict(data_offsets=[0.0, 40.0]), dict(data_offsets=None), dict(dtype=[]), dict(dtype="F99"),
                    dict(shape=[-2, -5]), dict(shape=[5, 2])):
            head(json.dumps(header | {key: entry | bad}).encode())
            refused(folder)
        for bad in ({}, None, [], "x"):
            head(json.dumps(header | {key: bad}).encode())
            refused(folder)
        for text in (b"[]", b"null", b"[" * 100_000, b"\xff" * 10, json.dumps(header | {"more": entry}).encode(), json.dumps({}).encode()):
            head(text)
            refused(folder)
        (folder / SHARDS[0]).write_bytes(struct.pack("<Q", 2**60) + raw[8:])
        sign(folder)
        refused(folder, "claims 1,152,921,504,606,846,976 bytes")

    limited(body)
    head(json.dumps(header).encode())
    assert whole(saved) == 2
