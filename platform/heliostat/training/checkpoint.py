"""Checkpoints of a training run: sharded, complete or invisible, verified by content hash, never unpickled.

    _work/checkpoints/step-00000100/rank-00000.safetensors  pieces of weights, averages, moments and centres that a rank held
    _work/checkpoints/step-00000100/rank-00000.json         where each piece lies in that file, and its sha256
    _work/checkpoints/step-00000100/history.jsonl           metric records since the checkpoint before
    _work/checkpoints/step-00000100/checkpoint.json         hashes of the indexes and state, itself hashed, written last
    _work/quarantine/step-00000100-rank-00003.parquet       images that a rank turned away since the checkpoint before

Pieces go by names that no engine and no number of ranks changes, so a run goes on with other ones. No random state is stored:
every draw of a step is a function of (seed, step, rank).
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from heliostat.artifacts import WORK, describe
from heliostat.config import canonical_json
from heliostat.data.quarantine import Rejection, quarantine_from_bytes, quarantine_to_bytes
from heliostat.errors import CheckpointError, ObjectNotFoundError, StorageError
from heliostat.storage import Store
from heliostat.training.piece_file import Place, index_from_json, index_to_json, write_pieces
from heliostat.training.pieces import MOMENTS, Piece

FOLDER = f"{WORK}checkpoints/"
_QUARANTINE = f"{WORK}quarantine/"
_MANIFEST = "checkpoint.json"
_HISTORY = "history.jsonl"
_MANIFEST_KEY = re.compile(rf"{FOLDER}step-(\d{{8,}})/{_MANIFEST}")
_WINDOW_BYTES = 32 * 2**20
_WINDOWS = 4  # per file: weights, averages and two moments are read side by side
_ANY_KEY = re.compile(rf"{FOLDER}step-(\d{{8,}})/(.+)")


def folder_of(step: int) -> str:
    """The prefix of the keys of one checkpoint."""
    return f"{FOLDER}step-{step:08d}/"


def write_shard(files: Store, step: int, rank: int, pieces: Iterable[Piece]) -> None:
    """Write what one rank held: the pieces, then their index. Values may be on any device."""
    data, places = write_pieces(pieces)
    name = f"{folder_of(step)}rank-{rank:05d}"
    files.put(f"{name}.safetensors", cast("bytes", data))  # a bytearray, which stores take as well: a copy would double it
    files.put(f"{name}.json", index_to_json(places, len(data)))


def write_history(files: Store, step: int, history: list[dict[str, Any]]) -> None:
    """Write the metric records since the checkpoint before; the main rank does."""
    files.put(folder_of(step) + _HISTORY, "".join(json.dumps(row, sort_keys=True) + "\n" for row in history).encode())


def commit(files: Store, step: int, world_size: int, state: Mapping[str, Any]) -> None:
    """Make a checkpoint visible after all ranks and the history are written. Raises StorageError when something is missing."""
    folder, hashes = folder_of(step), {}
    for name in [*(f"rank-{rank:05d}.json" for rank in range(world_size)), _HISTORY]:
        try:
            hashes[name] = describe(files.read(folder + name)).model_dump()
        except ObjectNotFoundError as error:
            raise StorageError(f"{files.uri}/{folder}{name} was written and is not there; is the store shared?") from error
    manifest = {"step": step, "world_size": world_size, "state": dict(state), "files": hashes}
    files.put(folder + _MANIFEST, json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1).encode())


def prune(files: Store, newest: int, *, damaged: Collection[int] = (), keep_last: int, keep_every: int) -> None:
    """Remove checkpoints but the last `keep_last` up to step `newest`, and those of steps divisible by `keep_every` (0: none).

    Those of later steps stay: they are on their way, or damaged until the run gets there again. `damaged` ones never count as
    kept. Manifests go first; history stays; what older attempts left without a manifest goes too.
    """
    complete = [step for step in complete_steps(files) if step <= newest and step not in damaged]
    kept = {*complete[-keep_last:], *(step for step in complete if keep_every and step % keep_every == 0)}
    doomed = []
    for entry in files.list(FOLDER):
        match = _ANY_KEY.fullmatch(entry.key)
        if match and int(match[1]) not in kept and int(match[1]) < newest and match[2] != _HISTORY:
            doomed.append(entry.key)
    for key in sorted(doomed, key=lambda key: not key.endswith(f"/{_MANIFEST}")):
        files.delete(key)


def _seal(manifest: Mapping[str, Any]) -> str:
    return describe(canonical_json(manifest).encode()).sha256


def complete_steps(files: Store) -> list[int]:
    """Steps that have a manifest, rising."""
    matches = (_MANIFEST_KEY.fullmatch(entry.key) for entry in files.list(FOLDER))
    return sorted(int(match[1]) for match in matches if match)


@dataclass(frozen=True)
class StoredCheckpoint:
    """An opened checkpoint: its manifest and indexes are verified, its pieces are when they are read."""

    files: Store
    step: int
    world_size: int
    state: dict[str, Any]
    places: Mapping[str, tuple[Place, ...]]
    _windows: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict, repr=False, compare=False)

    def _places(self, name: str) -> tuple[Place, ...]:
        if name not in self.places:
            raise CheckpointError(f"checkpoint of step {self.step} has no tensor {name}")
        return self.places[name]

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements of a flattened tensor, on the CPU; every piece that holds some of them is verified as a whole.

        Raises CheckpointError for damage and for elements that no piece holds.
        """
        places = self._places(name)
        found = torch.empty(count, dtype=places[0].torch_dtype)
        missing = count
        for place in places:
            first, stop = max(start, place.start), min(start + count, place.start + place.count)
            if first < stop:
                values = self._read_place(place)
                found[first - start : stop - start] = values[first - place.start : stop - place.start]
                missing -= stop - first
        if missing:
            raise CheckpointError(
                f"checkpoint of step {self.step}: {missing} of {count} elements of {name} are in no rank's file"
            )
        return found

    def _read_place(self, place: Place) -> Tensor:
        data = self._bytes_of(place)
        if hashlib.sha256(data).hexdigest() != place.sha256:
            raise CheckpointError(f"{folder_of(self.step)}{place.file}: {place.name} does not match its recorded sha256")
        return torch.frombuffer(bytearray(data), dtype=place.torch_dtype) if data else torch.empty(0, dtype=place.torch_dtype)

    def _bytes_of(self, place: Place) -> memoryview:
        """The bytes of one piece, by way of large reads: pieces are small, and each request takes an object store its time."""
        stop, windows = place.offset + place.num_bytes, self._windows.setdefault(place.file, [])
        for start, data in windows:
            if start <= place.offset and stop <= start + len(data):
                return memoryview(data)[place.offset - start : stop - start]
        key = folder_of(self.step) + place.file
        size = self.files.size(key)
        if size is None or size < stop:
            raise CheckpointError(f"{key} has {size} bytes, {place.name} ends at {stop}")
        data = _read_range(self.files, key, place.offset, min(max(place.num_bytes, _WINDOW_BYTES), size - place.offset))
        windows.append((place.offset, data))
        del windows[:-_WINDOWS]
        return memoryview(data)[: place.num_bytes]


def _read_range(files: Store, key: str, start: int, num_bytes: int) -> bytes:
    try:
        return files.read_range(key, start, num_bytes) if num_bytes else b""
    except ObjectNotFoundError as error:
        raise CheckpointError(f"{key} is missing") from error


def open_checkpoint(files: Store, step: int) -> StoredCheckpoint:
    """Open the checkpoint of a step: all that says where pieces are is read and verified, and sizes of files are compared.

    Raises CheckpointError for damage. A store that cannot be read is a StorageError.
    """
    folder = folder_of(step)
    try:
        manifest = json.loads(files.read(folder + _MANIFEST))
        if manifest.pop("sha256") != _seal(manifest) or manifest["step"] != step:
            raise CheckpointError(f"{folder}{_MANIFEST} does not match its own sha256")
        places: dict[str, list[Place]] = {}
        for name, expected in manifest["files"].items():
            data = files.read(folder + name)
            if describe(data).model_dump() != expected:
                raise CheckpointError(f"{folder}{name} does not match its recorded sha256")
            if name != _HISTORY:
                _collect(files, folder, name, data, places)
        return StoredCheckpoint(
            files,
            step,
            manifest["world_size"],
            manifest["state"],
            {name: tuple(sorted(found, key=lambda place: place.start)) for name, found in places.items()},
        )
    except (ObjectNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:  # a manifest may be any JSON
        raise CheckpointError(f"checkpoint of step {step} cannot be read: {error}") from error


def _collect(files: Store, folder: str, index: str, data: bytes, places: dict[str, list[Place]]) -> None:
    """Add what one rank's index says, after a look at the size and the header of its file."""
    key = index.removesuffix(".json") + ".safetensors"
    found = index_from_json(data, key)
    size = files.size(folder + key)
    if size != found.num_bytes:
        raise CheckpointError(f"{folder}{key} has {size} bytes; recorded {found.num_bytes}")
    header = _read_range(files, folder + key, 0, found.header_bytes)
    if hashlib.sha256(header).hexdigest() != found.header_sha256:
        raise CheckpointError(f"{folder}{key}: its header does not match its recorded sha256")
    for place in found.places:
        places.setdefault(place.name, []).append(place)


def refuse_misfit(stored: StoredCheckpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError that names what differs, unless a checkpoint has exactly these tensors (and moments)."""
    found = {name: places[0].shape for name, places in stored.places.items() if not name.startswith(MOMENTS)}
    problems = [
        f"{len(names)} {problem}: {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
        for problem, names in (
            ("missing", shapes.keys() - found.keys()),
            ("unexpected", found.keys() - shapes.keys()),
            ("of another shape", {name for name in shapes.keys() & found.keys() if shapes[name] != found[name]}),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint of step {stored.step} is of another network, {'; '.join(problems)}; restore the recipe or change "
            "version="
        )


def read_history(files: Store, up_to_step: int) -> list[dict[str, Any]]:
    """All metric records of the run up to a step, in order, from the pieces beside the checkpoints. Raises CheckpointError.

    A record has `step`, metrics, and `model` where the run trains several networks.
    """
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in files.list(FOLDER):
        if not entry.key.endswith("/history.jsonl"):
            continue
        try:
            found = [json.loads(line) for line in files.read(entry.key).decode().splitlines()]
            rows |= {(int(row["step"]), str(row.get("model", ""))): row for row in found if row["step"] <= up_to_step}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{files.uri}/{entry.key} is damaged ({error}); remove it, the curves will lack these steps"
            ) from error
    return [rows[key] for key in sorted(rows)]


def write_rejections(files: Store, step: int, rank: int, rejections: list[Rejection]) -> None:
    """Keep what a rank turned away up to a step; every rank writes its own before the main rank's checkpoint of that step."""
    if rejections:
        files.put(f"{_QUARANTINE}step-{step:08d}-rank-{rank:05d}.parquet", quarantine_to_bytes(rejections))


def read_rejections(files: Store) -> list[Rejection]:
    """What all ranks turned away in the whole run, sorted, each once: restarts and world sizes do not change it."""
    found = {rejection for entry in files.list(_QUARANTINE) for rejection in quarantine_from_bytes(files.read(entry.key))}
    return sorted(found)


def newest_checkpoint(files: Store, notify: Callable[[str], None], below: int | None = None) -> StoredCheckpoint | None:
    """The newest checkpoint (of a step less than `below`) that opens; every bad one is passed over with a notice.

    A store that cannot be read is an error: an outage must not cost the steps since an older checkpoint.
    """
    for step in reversed(complete_steps(files)):
        if below is not None and step >= below:
            continue
        try:
            return open_checkpoint(files, step)
        except CheckpointError as error:
            notify(f"passing over a damaged checkpoint: {error}")
    return None
