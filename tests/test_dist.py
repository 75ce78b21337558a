import json
import os
import signal
import struct

import pytest
import torch

import dist
from conftest import fork, launch, wait
from dist import World
from tokenizer import UsageError

TENSORS = {"w": torch.randn(3, 5), "b": torch.arange(4).bfloat16(), "n": torch.tensor(7), "none": torch.zeros(0, 2), "f": torch.tensor([True, False])}


def test_safetensors_round_trip(tmp_path):
    digest = dist.write_safetensors(tmp_path / "t.safetensors", TENSORS, {"format": "pt"})
    assert digest == dist.file_hash(tmp_path / "t.safetensors")
    again = dist.read_safetensors(tmp_path / "t.safetensors")
    assert again.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert again[name].dtype == t.dtype and torch.equal(again[name], t)


@pytest.mark.peer
def test_safetensors_both_ways(tmp_path):
    peer = pytest.importorskip("safetensors.torch")
    dist.write_safetensors(tmp_path / "ours", TENSORS)
    peer.save_file(TENSORS, tmp_path / "theirs")
    for read in (peer.load_file(tmp_path / "ours"), dist.read_safetensors(tmp_path / "theirs")):
        assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in TENSORS.items())


@pytest.mark.parametrize("damage", [lambda raw: raw[:-3], lambda raw: raw[:5], lambda raw: b"", lambda raw: struct.pack("<Q", 2**60) + raw[8:],
                                    lambda raw: raw.replace(b'"F32"', b'"F99"'), lambda raw: raw.replace(b"[3,5]", b"[9,5]")])
def test_a_file_that_is_not_whole_is_refused(damage, tmp_path):
    dist.write_safetensors(tmp_path / "t", TENSORS)
    raw = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(damage(raw))
    with pytest.raises(UsageError, match="not a whole safetensors"):
        dist.read_safetensors(tmp_path / "t")


def save(folder, step, keep=9):
    dist.save_checkpoint(folder, step, {"w": torch.full((50,), float(step))}, {"next_sample": step}, keep)


def test_checkpoints_rotate_and_the_newest_is_found(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [p.name for p in dist.checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert (tmp_path / "latest").read_text() == "step_00000003"
    saved = dist.newest_checkpoint(tmp_path)
    assert saved.step == 3 and saved.state == {"next_sample": 3} and saved.whole("w")[0] == 3
    assert dist.newest_checkpoint(tmp_path / "nothing") is None


def test_every_flipped_bit_is_seen_and_the_older_one_used(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for name in ("shard_00000.safetensors", "manifest.json"):
        path = tmp_path / "step_00000002" / name
        raw = path.read_bytes()
        for offset in range(0, len(raw), max(1, len(raw) // 60)):
            path.write_bytes(raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1:])
            said = []
            assert dist.newest_checkpoint(tmp_path, said.append).step == 1 and len(said) == 1 and "step_00000002" in said[0], (name, offset)
        path.write_bytes(raw)
    assert dist.newest_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_files(name, damage, tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step_00000001" / name
    raw = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(b"" if damage == "empty" else raw[:len(raw) // 2])
    with pytest.raises(UsageError, match="damaged"):             # never silently from the beginning
        dist.newest_checkpoint(tmp_path, lambda text: None)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step_00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {"../../secret": "0"}
    manifest["sha256"] = dist._own_hash(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="outside"):
        dist.open_checkpoint(path.parent)


CALLS = ["write", "fsync", "replace", "rename", "mkdtemp"]


@pytest.mark.parametrize("nth", range(1, 16))
def test_killed_at_any_point_of_a_save(nth, tmp_path):
    """The process dies at the nth system call of the second save: the older or the newer checkpoint is whole."""
    save(tmp_path, 1)

    def body():
        count = 0
        def dying(function):
            def call(*args, **options):
                nonlocal count
                count += 1
                if count == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)
            return call
        os.fsync, os.replace, os.rename = dying(os.fsync), dying(os.replace), dying(os.rename)
        dist.raw_bytes = dying(dist.raw_bytes)
        dist.shutil.rmtree = dying(dist.shutil.rmtree)
        save(tmp_path, 2, keep=1)

    code = wait(fork(body))
    assert code in (0, -signal.SIGKILL)
    saved = dist.newest_checkpoint(tmp_path)
    assert saved.step in (1, 2) and (saved.whole("w") == saved.step).all()
    save(tmp_path, 3)
    assert dist.newest_checkpoint(tmp_path).step == 3 and not list(tmp_path.glob(".saving-*"))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    save(tmp_path, 1)

    def body():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OSError):
            save(tmp_path, 2)
        assert not list(tmp_path.glob(".saving-*"))

    assert wait(fork(body)) == 0 and dist.newest_checkpoint(tmp_path).step == 1


def test_collectives_over_two_ranks_and_at_size_one():
    alone = World()
    assert dist.all_sum(alone, torch.tensor(3.0)) == 3 and dist.any_rank(alone, True) and dist.from_main(alone, "x") == "x"

    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        assert (world.size, world.main) == (2, world.rank == 0)
        assert dist.all_sum(world, torch.tensor(float(world.rank + 1))) == 3
        assert dist.any_rank(world, world.rank == 1) and not dist.any_rank(world, False)
        assert dist.from_main(world, f"päth{world.rank}") == "päth0"
        dist.shutdown()

    assert launch(body, 2) == [0, 0]


@pytest.mark.parametrize("fields, says", [(dict(dp=4), "--nproc_per_node=4"), (dict(device="tpu"), "tpu")])
def test_impossible_layouts_are_refused(fields, says):
    with pytest.raises(UsageError, match=says):
        dist.validate(dist.DistConfig(**fields))
