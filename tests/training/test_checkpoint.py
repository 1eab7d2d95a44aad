"""A checkpoint is whole or it is passed over, whatever happened to its files, and however many ranks wrote it or read it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heliostat.errors import CheckpointError
from heliostat.storage import LocalStore
from heliostat.training.checkpoint import (
    FOLDER,
    StoredCheckpoint,
    commit,
    complete_steps,
    newest_checkpoint,
    prune,
    read_history,
    refuse_misfit,
    write_history,
    write_shard,
)
from heliostat.training.checkpoint_writer import CheckpointWriter
from heliostat.training.pieces import Piece
from heliostat.training.run_config import TrainConfig
from heliostat.training.world import World

FILES = ("rank-00000.safetensors", "rank-00001.safetensors", "rank-00000.json", "rank-00001.json", "history.jsonl")
SHAPES = {"student.weight": (3, 4), "student.bias": (5,), "adamw/step/student.bias": (), "empty": (0,)}


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def pieces(step: int, rank: int, size: int) -> list[Piece]:
    """What a rank holds where each holds its run of the elements, as a sharded engine's would."""
    found = []
    for name, tensor in tensors(step).items():
        flat = tensor.view(-1)
        each = -(-flat.numel() // size)
        start, stop = min(rank * each, flat.numel()), min((rank + 1) * each, flat.numel())
        if start < stop or rank == 0:
            found.append(Piece(name, tuple(tensor.shape), start, flat[start:stop]))
    return found


def folder(step: int) -> str:
    return f"{FOLDER}step-{step:08d}/"


def write(store: LocalStore, steps: tuple[int, ...], *, keep_last: int = 10, keep_every: int = 0, size: int = 2) -> None:
    for step in steps:
        for rank in range(size):
            write_shard(store, step, rank, pieces(step, rank, size))
        write_history(store, step, [{"step": step, "train/loss": 1.0 / step}])
        commit(store, step, size, {"skipped_steps": step % 3})
        prune(store, step, keep_last=keep_last, keep_every=keep_every)


def readable(store: LocalStore, said: Callable[[str], None]) -> StoredCheckpoint | None:
    """The newest checkpoint of which every element can be read, as the ranks find it."""
    below = None
    while True:
        found = newest_checkpoint(store, said, below)
        if found is None:
            return None
        try:
            for name, shape in SHAPES.items():
                found.read(name, 0, torch.Size(shape).numel())
            return found
        except CheckpointError as error:
            said(f"passing over a damaged checkpoint: {error}")
            below = found.step


def equal(found: StoredCheckpoint | None, step: int) -> bool:
    return (
        found is not None
        and (found.step, found.state) == (step, {"skipped_steps": step % 3})
        and all(torch.equal(found.read(name, 0, value.numel()), value.view(-1)) for name, value in tensors(step).items())
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_newest_checkpoint_comes_back_as_it_was_by_any_cut(tmp_path: Path, size: int) -> None:
    store, said = LocalStore(tmp_path), []
    assert newest_checkpoint(store, said.append) is None
    write(store, (4, 8, 12), size=size)
    found = newest_checkpoint(store, said.append)
    assert equal(found, 12)
    weight = tensors(12)["student.weight"].view(-1)
    for start in range(12):
        for count in range(12 - start):
            assert torch.equal(found.read("student.weight", start, count), weight[start : start + count])
    assert found.world_size == size
    assert said == []


def test_only_the_newest_and_the_landmarks_are_kept_and_the_history_is_kept_whole(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8, 12, 16, 20), keep_last=2, keep_every=8)
    assert complete_steps(store) == [8, 16, 20]
    assert {entry.key for entry in store.list(folder(4))} == {folder(4) + "history.jsonl"}
    assert [row["step"] for row in read_history(store, 20)] == [4, 8, 12, 16, 20]
    assert [row["step"] for row in read_history(store, 11)] == [4, 8]


def test_a_damaged_checkpoint_that_was_passed_over_costs_no_good_one(tmp_path: Path) -> None:
    store, said = LocalStore(tmp_path), []
    write(store, (8, 10))
    path = tmp_path / folder(10) / "rank-00000.safetensors"
    path.write_bytes(flip(path.read_bytes(), random.Random(0)))
    assert equal(readable(store, said.append), 8)
    writer = CheckpointWriter(store, World(), TrainConfig(keep_last=1), said.append, start=8)
    for step, complete in ((9, [9, 10]), (12, [12])):
        writer.begin(step, pieces(step, 0, 1), history=[], rejections=[], state={"skipped_steps": step % 3})
        writer.finish(0)
        assert complete_steps(store) == complete
        assert equal(readable(store, said.append), step)


def test_what_an_attempt_without_a_manifest_left_is_removed_by_the_next_checkpoint(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4,))
    write_shard(store, 6, 0, pieces(6, 0, 2))
    write_shard(store, 10, 0, pieces(10, 0, 2))
    write(store, (8,))
    assert not list(store.list(folder(6)))
    assert list(store.list(folder(10)))  # a later step may be on its way


def test_a_checkpoint_without_its_manifest_is_not_there(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8))
    store.delete(folder(8) + "checkpoint.json")
    assert complete_steps(store) == [4]
    assert equal(newest_checkpoint(store, print), 4)


Damage = Callable[[bytes, random.Random], bytes | None]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


def lengthen(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 40))


def overwrite(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(data))


def zero(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + bytes(len(data) - start)


def remove(data: bytes, rng: random.Random) -> None:
    return None


DAMAGES = [cut, flip, lengthen, overwrite, zero, remove]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_two_thousand_damaged_files_make_the_checkpoint_before_count(tmp_path: Path, name: str, damage: Damage) -> None:
    """30 cases of 70: 2,100 in all."""
    store, rng = LocalStore(tmp_path), random.Random(f"{name} {damage.__name__}")
    write(store, (4, 8))
    whole = store.read(folder(8) + name)
    for _ in range(70):
        data = damage(whole, rng)
        while data == whole:  # zeros over zeros
            data = damage(whole, rng)
        if data is None:
            store.delete(folder(8) + name)
        else:
            store.put(folder(8) + name, data)
        said: list[str] = []
        assert equal(readable(store, said.append), 4)
        assert len(said) == 1
        assert said[0].startswith("passing over a damaged checkpoint: ")
        assert "step 8" in said[0] or "step-00000008" in said[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_never_brings_back_other_weights(tmp_path: Path, damage: Damage) -> None:
    store, rng = LocalStore(tmp_path), random.Random(damage.__name__)
    write(store, (4, 8))
    whole = store.read(folder(8) + "checkpoint.json")
    for _ in range(60):
        data = damage(whole, rng)
        if data is None:
            store.delete(folder(8) + "checkpoint.json")
        else:
            store.put(folder(8) + "checkpoint.json", data)
        found = readable(store, lambda text: None)
        assert found is not None
        assert equal(found, 4) or equal(found, 8)


@pytest.mark.parametrize(
    "manifest",
    [
        b"null",
        b"[]",
        b"{}",
        b'"step"',
        b'{"step": 8, "state": {}, "files": {}}',
        b'{"step": 8, "state": {}, "files": null}',
        b'{"step": 8, "state": {}, "files": {"../../secret": {"num_bytes": 1, "sha256": ""}}}',
        b"\xff\xfe",
    ],
)
def test_a_manifest_of_another_kind_is_passed_over(tmp_path: Path, manifest: bytes) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8))
    store.put(folder(8) + "checkpoint.json", manifest)
    said: list[str] = []
    assert equal(newest_checkpoint(store, said.append), 4)
    assert len(said) == 1


def test_a_manifest_under_the_name_of_another_step_is_passed_over(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8))
    for name in (*FILES, "checkpoint.json"):
        store.put(folder(9) + name, store.read(folder(4) + name))
    said: list[str] = []
    assert equal(newest_checkpoint(store, said.append), 8)
    assert "step-00000009" in said[0]


def test_when_every_checkpoint_is_damaged_the_run_starts_again_and_says_so(tmp_path: Path) -> None:
    store, said = LocalStore(tmp_path), []
    write(store, (4, 8))
    for step in (4, 8):
        store.put(folder(step) + "rank-00001.safetensors", b"")
    assert newest_checkpoint(store, said.append) is None
    assert len(said) == 2


def test_a_foreign_folder_beside_the_checkpoints_is_left_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put(f"{FOLDER}best/checkpoint.json", b"{}")
    write(store, (4,))
    assert complete_steps(store) == [4]
    assert store.read(f"{FOLDER}best/checkpoint.json") == b"{}"


def test_a_damaged_history_is_refused_with_its_place(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8), keep_last=1)
    for data in (b'{"step": 4, "train/lo', b"\xff\xfe", b"[]\n", b'{"loss": 1}\n', b'{"step": "x"}\n'):
        store.put(folder(4) + "history.jsonl", data)
        with pytest.raises(CheckpointError, match=r"step-00000004/history\.jsonl"):
            read_history(store, 8)


def test_writing_a_checkpoint_again_replaces_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8))
    store.put(folder(8) + "rank-00000.safetensors", b"torn")
    write(store, (8,), size=3)
    assert equal(readable(store, print), 8)
    assert json.loads(store.read(folder(8) + "checkpoint.json"))["world_size"] == 3


def test_a_checkpoint_of_another_network_is_refused_with_what_differs(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4,))
    found = newest_checkpoint(store, print)
    own = {name: shape for name, shape in SHAPES.items() if not name.startswith("adamw/")}
    refuse_misfit(found, own)
    with pytest.raises(
        CheckpointError, match=r"1 missing: student\.head; 1 unexpected: empty; 1 of another shape: student\.bias"
    ):
        refuse_misfit(found, {"student.weight": (3, 4), "student.bias": (6,), "student.head": (1,)})


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load

    store = LocalStore(tmp_path)
    write(store, (4,), size=1)
    held = load(store.read(folder(4) + "rank-00000.safetensors"))
    assert torch.equal(held["student.weight@0"].view(3, 4), tensors(4)["student.weight"])
