"""A checkpoint is whole or it is passed over, whatever happened to its files."""

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
    Checkpoint,
    complete_steps,
    newest_checkpoint,
    read_history,
    write_checkpoint,
)

FILES = ("model.safetensors", "optimizer.safetensors", "history.jsonl", "checkpoint.json")


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    model = {"weight": torch.randn(3, 4, generator=generator), "bias": torch.randn(4, generator=generator)}
    optimizer = {"0.exp_avg": torch.randn(3, 4, generator=generator), "0.step": torch.tensor(float(step))}
    return Checkpoint(step, model, optimizer, {"skipped_steps": step % 3})


def folder(step: int) -> str:
    return f"{FOLDER}step-{step:08d}/"


def write(store: LocalStore, steps: tuple[int, ...], keep: int = 10) -> None:
    for step in steps:
        write_checkpoint(store, checkpoint(step), [{"step": step, "train/loss": 1.0 / step}], keep=keep)


def equal(found: Checkpoint | None, step: int) -> bool:
    wanted = checkpoint(step)
    return (
        found is not None
        and (found.step, found.state) == (wanted.step, wanted.state)
        and all(torch.equal(found.model[name], value) for name, value in wanted.model.items())
        and all(torch.equal(found.optimizer[name], value) for name, value in wanted.optimizer.items())
    )


def test_the_newest_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    store, said = LocalStore(tmp_path), []
    assert newest_checkpoint(store, said.append) is None
    write(store, (4, 8, 12))
    assert equal(newest_checkpoint(store, said.append), 12)
    assert said == []


def test_only_the_newest_are_kept_and_the_history_is_kept_whole(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8, 12, 16), keep=2)
    assert complete_steps(store) == [12, 16]
    left = {entry.key for entry in store.list(folder(4))}
    assert left == {folder(4) + "history.jsonl"}
    assert [row["step"] for row in read_history(store, 16)] == [4, 8, 12, 16]
    assert [row["step"] for row in read_history(store, 11)] == [4, 8]


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


@pytest.mark.parametrize("damage", [cut, flip, lengthen, overwrite, zero, remove])
@pytest.mark.parametrize("name", FILES[:3])
def test_a_damaged_file_makes_the_checkpoint_before_it_count(tmp_path: Path, name: str, damage: Damage) -> None:
    store, rng = LocalStore(tmp_path), random.Random(f"{name} {damage.__name__}")
    write(store, (4, 8))
    whole = store.read(folder(8) + name)
    for _ in range(20):
        data = damage(whole, rng)
        if data is None:
            store.delete(folder(8) + name)
        else:
            store.put(folder(8) + name, data)
        if data == whole:  # zeros over zeros
            continue
        said: list[str] = []
        assert equal(newest_checkpoint(store, said.append), 4)
        assert len(said) == 1
        assert said[0].startswith("passing over a damaged checkpoint: ")
        assert "step 8" in said[0] or "step-00000008" in said[0]


@pytest.mark.parametrize("damage", [cut, flip, lengthen, overwrite, zero, remove])
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
        found = newest_checkpoint(store, lambda text: None)
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
    for name in FILES:
        store.put(folder(9) + name, store.read(folder(4) + name))
    said: list[str] = []
    assert equal(newest_checkpoint(store, said.append), 8)
    assert "step-00000009" in said[0]


def test_when_every_checkpoint_is_damaged_the_run_starts_again_and_says_so(tmp_path: Path) -> None:
    store, said = LocalStore(tmp_path), []
    write(store, (4, 8))
    for step in (4, 8):
        store.put(folder(step) + "model.safetensors", b"")
    assert newest_checkpoint(store, said.append) is None
    assert len(said) == 2


def test_a_foreign_folder_beside_the_checkpoints_is_left_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4,))
    store.put(f"{FOLDER}best/checkpoint.json", b"{}")
    assert complete_steps(store) == [4]
    assert equal(newest_checkpoint(store, print), 4)


def test_a_damaged_history_is_refused_with_its_place(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8), keep=1)
    for data in (b'{"step": 4, "train/lo', b"\xff\xfe", b"[]\n", b'{"loss": 1}\n', b'{"step": "x"}\n'):
        store.put(folder(4) + "history.jsonl", data)
        with pytest.raises(CheckpointError, match=r"step-00000004/history\.jsonl"):
            read_history(store, 8)


def test_writing_a_checkpoint_again_replaces_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, (4, 8))
    store.put(folder(8) + "model.safetensors", b"torn")
    write(store, (8,))
    assert equal(newest_checkpoint(store, print), 8)
    assert json.loads(store.read(folder(8) + "checkpoint.json"))["step"] == 8
