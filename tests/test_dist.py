import os
import random
import re
import struct
import threading

import pytest
import torch

import dist
from conftest import launch
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


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-3], lambda raw: raw[:5], lambda raw: b"", lambda raw: struct.pack("<Q", 2**60) + raw[8:],
    lambda raw: raw.replace(b'"F32"', b'"F99"'), lambda raw: raw.replace(b"[3,5]", b"[9,5]"), lambda raw: raw.replace(b"[3,5]", b"[-3,-5]"),
    lambda raw: raw.replace(b"[0,2]", b"[0,9e9]"), lambda raw: raw[:8] + b"[" * 40 + raw[48:],
    lambda raw: struct.pack("<Q", 40_000) + b"[" * 40_000])
def test_a_file_that_is_not_whole_is_refused(damage, tmp_path):
    dist.write_safetensors(tmp_path / "t", TENSORS)
    raw = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(damage(raw))
    with pytest.raises(UsageError, match="not a whole safetensors"):
        dist.read_safetensors(tmp_path / "t")


# ---- Checkpoints: what is saved under one cut is read under any other ----

WHOLE = {"matrix": torch.randn(13, 7), "cube": torch.randn(5, 4, 6).bfloat16(), "vector": torch.arange(17),
         "flags": torch.arange(9) % 2 == 0, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3),
         "copied": torch.randn(6, 5, dtype=torch.float64)}


def boxes(draw, shape, n):
    """A shape cut at random into n boxes [(place, size)], some of them empty."""
    if n == 1 or not shape:
        return [((0,) * len(shape), shape)] + [((0,) * len(shape), (0,) * len(shape))] * (n - 1) * bool(shape)
    axis, left = draw.randrange(len(shape)), draw.randint(1, n - 1)
    at = draw.randint(0, shape[axis])
    swap = lambda old, value: old[:axis] + (value,) + old[axis + 1:]
    high = boxes(draw, swap(shape, shape[axis] - at), n - left)
    return boxes(draw, swap(shape, at), left) + [(swap(place, place[axis] + at), size) for place, size in high]


def packed(name, mine, writes):
    """Held of some boxes: they lie below one another in a local tensor that has a margin of 99."""
    shape = tuple(WHOLE[name].shape)
    if not shape:
        return dist.Held(torch.tensor(99.0), (), [((), (), ())] * len(mine), writes)
    room = [sum(size[0] for _, size in mine) + 1] + [1 + max((size[axis] for _, size in mine), default=0) for axis in range(1, len(shape))]
    local, pieces, row = torch.full(room, 99).to(WHOLE[name].dtype), [], 0
    for place, size in mine:
        pieces.append((place, (row,) + (0,) * (len(shape) - 1), size))
        row += size[0]
    return dist.Held(local, shape, pieces, writes)


def part(tensor, place, size):
    return tensor[tuple(slice(p, p + n) for p, n in zip(place, size))]


def held_by(rank, ranks, seed):
    """What a rank holds where everything is cut at random (two boxes a rank, dealt out at random), and "copied" is held twice."""
    draw, held = random.Random(seed), {}
    for name, t in WHOLE.items():
        owners = (ranks + 1) // 2 if name == "copied" else ranks
        cut = boxes(draw, tuple(t.shape), 2 * owners)
        draw.shuffle(cut)
        h = packed(name, cut[rank % owners::owners], writes=rank < owners)
        for place, offset, size in h.pieces:
            part(h.local, offset, size).copy_(part(t, place, size))
        held[name] = h
    return held


def test_any_cut_is_read_under_any_other(tmp_path):
    def save():
        world = dist.init(dist.DistConfig(device="cpu"))
        dist.save_checkpoint(tmp_path / str(world.size), 3, held_by(world.rank, world.size, 7), {"next_sample": 8}, world=world)
        dist.shutdown()

    def load():
        world = dist.init(dist.DistConfig(device="cpu"))
        for ranks in (1, 2, 3, 4):
            saved = dist.newest_checkpoint(tmp_path / str(ranks), world=world)
            assert saved.step == 3 and saved.state == {"next_sample": 8} and saved.table.keys() == WHOLE.keys()
            for name, want in held_by(world.rank, world.size, ranks).items():
                got = dist.Held(torch.full_like(want.local, 99), want.shape, want.pieces)
                saved.fill(name, got)
                assert torch.equal(got.local, want.local), (ranks, name)
        dist.shutdown()

    for ranks in (1, 2, 3, 4):
        assert launch(save, ranks) == [0] * ranks
        saved = dist.open_checkpoint(tmp_path / f"{ranks}/step_00000003")
        tensors, state, step = {name: saved.whole(name) for name in saved.table}, saved.state, saved.step
        assert [name for name, t in WHOLE.items() if not torch.equal(tensors[name], t) or tensors[name].dtype != t.dtype] == []
        assert [p.name for p in sorted((tmp_path / f"{ranks}/step_00000003").iterdir())] == [
            "manifest.json", *(f"shard_{rank:05d}.safetensors" for rank in range(ranks))]
    for ranks in (1, 2, 3, 4):
        assert launch(load, ranks) == [0] * ranks


def test_boxes_that_fill_a_shape():
    """Against counting every element; a pinwheel is a cut that no straight line makes."""
    pinwheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert dist._fills((3, 3), pinwheel) and not dist._fills((3, 3), pinwheel[:-1]) and not dist._fills((3, 3), pinwheel + pinwheel[-1:])
    draw, seen = random.Random(0), []
    for _ in range(400):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 3)))
        cut = [box for box in boxes(draw, shape, draw.randint(1, 6)) if 0 not in box[1]]
        if draw.random() < 0.6:                                  # spoil it: move one box, which may happen to fit
            i = draw.randrange(len(cut))
            cut[i] = (tuple(max(0, p + draw.randint(-1, 1)) for p in cut[i][0]), cut[i][1])
        count = torch.zeros([n + 8 for n in shape])
        for place, size in cut:
            part(count, place, size).add_(1)
        whole = bool((part(count, (0,) * len(shape), shape) == 1).all()) and count.sum() == torch.Size(shape).numel()
        assert dist._fills(shape, cut) == whole, (shape, cut)
        seen.append(whole)
    assert 100 < sum(seen) < 300


def test_what_does_not_fit_is_refused(tmp_path):
    w = torch.arange(12.0).view(3, 4)
    for pieces in ([((1, 0), (0, 0), (3, 4))], [((0, 0), (1, 0), (3, 4))], [((0,), (0,), (3,))], [((-1, 0), (0, 0), (3, 4))]):
        with pytest.raises(UsageError, match="inside both"):
            dist.save_checkpoint(tmp_path, 1, {"w": dist.Held(w, (3, 4), pieces)}, {})
    for pieces in ([((0, 0), (0, 0), (2, 4))], [((0, 0), (0, 0), (2, 4)), ((1, 0), (1, 0), (2, 4))]):
        with pytest.raises(UsageError, match="tensor w .* exactly once"):
            dist.save_checkpoint(tmp_path, 1, {"w": dist.Held(w, (3, 4), pieces)}, {})
    with pytest.raises(UsageError, match="twice"):
        dist.save_checkpoint(tmp_path, 1, {"w": dist.Held(w, (3, 4), [((0, 0), (0, 0), (2, 4))] * 2)}, {})
    with pytest.raises(UsageError, match="tensor w .* exactly once"):
        dist.save_checkpoint(tmp_path, 1, {"w": dist.Held.whole(w, writes=False)}, {})
    with pytest.raises(UsageError, match="complex64"):
        dist.save_checkpoint(tmp_path, 1, {"w": w.cfloat()}, {})
    assert not dist.checkpoints(tmp_path) and not list(tmp_path.glob(".*"))
    dist.save_checkpoint(tmp_path, 1, {"w": w}, {})
    saved = dist.open_checkpoint(tmp_path / "step_00000001")
    with pytest.raises(UsageError, match="no tensor v"):
        saved.whole("v")
    with pytest.raises(UsageError, match=r"w is \[3, 4\] there and \[4, 3\]"):
        saved.fill("w", dist.Held.whole(torch.zeros(4, 3)))
    half = torch.zeros(3, 2, dtype=torch.bfloat16)               # in the dtype of who asks
    saved.fill("w", dist.Held(half, (3, 4), [((0, 1), (0, 0), (3, 2))]))
    assert torch.equal(half, w[:, 1:3].bfloat16())
    saved.table["w"]["pieces"][0]["size"] = [2, 4]
    with pytest.raises(UsageError, match="4 elements of tensor w"):
        saved.fill("w", dist.Held.whole(torch.zeros(3, 4)))


def test_ranks_that_disagree_on_a_tensor_are_told(tmp_path):
    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        with pytest.raises((UsageError, OSError), match="w: F32 .* on one rank, BF16"):
            dist.save_checkpoint(tmp_path, 1, {"w": torch.zeros(3, dtype=(torch.float32, torch.bfloat16)[world.rank])}, {}, world=world)
        dist.shutdown()

    assert launch(body, 2) == [0, 0] and not list(tmp_path.iterdir())


# ---- Checkpoints: one after another ----

def save(folder, step, keep=9, **options):
    dist.save_checkpoint(folder, step, {"w": torch.full((50,), float(step))}, {"next_sample": step}, keep, **options)


def test_checkpoints_rotate_and_the_newest_is_found(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [p.name for p in dist.checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert (tmp_path / "latest").read_text() == "step_00000003"
    saved = dist.newest_checkpoint(tmp_path)
    assert saved.step == 3 and saved.state == {"next_sample": 3} and saved.whole("w")[0] == 3
    assert dist.newest_checkpoint(tmp_path / "nothing") is None


def test_a_damaged_later_one_does_not_push_the_new_one_out(tmp_path):
    for step in (1, 5):
        save(tmp_path, step)
    (tmp_path / "step_00000005/manifest.json").write_text("{}")
    save(tmp_path, 2, keep=1)
    assert dist.newest_checkpoint(tmp_path, lambda text: None).step == 2
    save(tmp_path, 5, keep=1)                                    # in place of the damaged one
    assert dist.newest_checkpoint(tmp_path).step == 5 and len(dist.checkpoints(tmp_path)) == 1


def test_the_order_of_what_reaches_the_disk(tmp_path, monkeypatch):
    """File, then the folder that names it, then the rename, then the folder above; only then does an older one go."""
    save(tmp_path, 1)
    seen = []

    def spy(name, describe):
        real = getattr(os, name)
        def call(*args, **options):
            seen.append((name, *describe(*args)))
            return real(*args, **options)
        monkeypatch.setattr(os, name, call)

    def plain(path):
        return re.sub(r"\.saving-\w{32}", "TEMP", re.sub(r"\.(\w+\.\w+|latest)\.\d+\.tmp", r"new \1", os.path.relpath(path, tmp_path)))

    spy("fsync", lambda handle: [plain(os.readlink(f"/proc/self/fd/{handle}"))])
    spy("replace", lambda old, new: [plain(old), plain(new)])
    spy("rename", lambda old, new: [plain(old), plain(new)])
    save(tmp_path, 2, keep=1)

    def whole(folder, file):
        at = f"{folder}/" if folder != "." else ""
        return [("fsync", f"{at}new {file}"), ("replace", f"{at}new {file}", f"{at}{file}"), ("fsync", folder)]

    assert seen == [*whole("TEMP", "shard_00000.safetensors"), *whole("TEMP", "rank_00000.json"), *whole("TEMP", "manifest.json"),
                    ("rename", "TEMP", "step_00000002"), ("fsync", "."), *whole(".", "latest"),
                    ("rename", "step_00000001", ".saving-old-step_00000001")]


# ---- Checkpoints: in the background ----

@pytest.fixture
def gate(monkeypatch):
    """An event that a background save waits for before it writes a byte."""
    event, write = threading.Event(), dist.write_safetensors
    monkeypatch.setattr(dist, "write_safetensors", lambda *args: (event.wait(30), write(*args))[1])
    yield event
    event.set()
    dist.saving()


def test_a_background_save_is_of_the_moment_of_its_call(tmp_path, gate):
    w, state = torch.arange(1000.0), {"next_sample": 3}
    dist.save_checkpoint(tmp_path / "later", 3, {"w": w, "t": w.view(10, 100).t()}, state, background=True)
    before = {key: copy.data_ptr() for key, copy in dist._COPIES.items()}
    w.zero_()
    state["next_sample"] = 4
    assert not dist.checkpoints(tmp_path / "later")
    gate.set()
    dist.saving()
    w.copy_(torch.arange(1000.0))
    dist.save_checkpoint(tmp_path / "now", 3, {"w": w, "t": w.view(10, 100).t()}, {"next_sample": 3})
    for name in ("shard_00000.safetensors", "manifest.json"):
        assert (tmp_path / "later/step_00000003" / name).read_bytes() == (tmp_path / "now/step_00000003" / name).read_bytes(), name
    dist.save_checkpoint(tmp_path / "later", 4, {"w": w, "t": w.view(10, 100).t()}, state, background=True)
    assert {key: copy.data_ptr() for key, copy in dist._COPIES.items()} == before            # the memory of the first
    dist.save_checkpoint(tmp_path / "later", 5, {"w": w[:9]}, state, background=True)          # waits for it
    assert dist.newest_checkpoint(tmp_path / "later").step == 4 or len(dist.checkpoints(tmp_path / "later")) == 3
    dist.saving()
    assert torch.equal(dist.newest_checkpoint(tmp_path / "later").whole("w"), w[:9]) and dist._COPIES.keys() == {"w"}


def test_what_goes_wrong_in_the_background_is_raised_by_saving(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dist, "write_safetensors", full)
        save(tmp_path, 2, background=True)                       # says nothing yet
        with pytest.raises(OSError, match="No space left"):
            dist.saving()
        dist.saving()                                            # once
        save(tmp_path, 3, background=True)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 4)                                    # the next save hears of it too
    assert dist.newest_checkpoint(tmp_path).step == 1 and not list(tmp_path.glob(".saving-*"))


def test_two_ranks_save_in_the_background_to_the_same_bytes(tmp_path):
    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        for name, background in (("now", False), ("later", True)):
            dist.save_checkpoint(tmp_path / name, 1, held_by(world.rank, 2, 0), {"a": 1}, world=world, background=background)
        dist.saving()
        if world.rank == 1:
            dist.write_safetensors = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        dist.save_checkpoint(tmp_path / "later", 2, held_by(world.rank, 2, 0), {"a": 1}, world=world, background=True)
        with pytest.raises(OSError) as caught:                   # rank 1's fault, on both
            dist.saving()
        assert caught.value.strerror == ("rank 1: No space left on device", "No space left on device")[world.rank]
        dist.shutdown()

    assert launch(body, 2) == [0, 0]
    now, later = ({p.name: p.read_bytes() for p in (tmp_path / name / "step_00000001").iterdir()} for name in ("now", "later"))
    assert now == later and len(now) == 3
    assert [p.name for p in (tmp_path / "later").glob("*")] and not list((tmp_path / "later").glob(".saving-*"))
    assert dist.newest_checkpoint(tmp_path / "later").step == 1


def test_collectives_over_two_ranks_and_at_size_one():
    alone = World()
    assert dist.all_sum(alone, torch.tensor(3.0)) == 3 and dist.all_max(alone, torch.tensor(3.0)) == 3 and dist.from_main(alone, "x") == "x"

    def body():
        world = dist.init(dist.DistConfig(device="cpu"))
        assert (world.size, world.main) == (2, world.rank == 0)
        assert dist.all_sum(world, torch.tensor(float(world.rank + 1))) == 3
        assert dist.all_max(world, torch.tensor([float(world.rank), -float(world.rank)])).tolist() == [1, 0]
        assert dist.all_texts(world, "ä" * world.rank) == ["", "ä"]
        assert dist.from_main(world, f"päth{world.rank}") == "päth0"
        dist.shutdown()

    assert launch(body, 2) == [0, 0]


def test_an_unknown_device_is_refused():
    with pytest.raises(UsageError, match="tpu"):
        dist.validate(dist.DistConfig(device="tpu"))
