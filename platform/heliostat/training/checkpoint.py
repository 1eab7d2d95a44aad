"""Checkpoints of a training run: complete or invisible, verified by content hash, never unpickled.

    _work/checkpoints/step-00000100/model.safetensors      weights of student and teacher
    _work/checkpoints/step-00000100/optimizer.safetensors  AdamW moments
    _work/checkpoints/step-00000100/history.jsonl          metric records since the checkpoint before
    _work/checkpoints/step-00000100/checkpoint.json        hashes and state, itself hashed, written last
    _work/quarantine/step-00000100-rank-00003.parquet      images that a rank turned away since the checkpoint before

No random state is stored: every draw of a step is a function of (seed, step, rank).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from heliostat.artifacts import WORK, describe
from heliostat.config import canonical_json
from heliostat.data.quarantine import Rejection, quarantine_from_bytes, quarantine_to_bytes
from heliostat.errors import CheckpointError, ObjectNotFoundError
from heliostat.models.stored import tensors_from_bytes, tensors_to_bytes
from heliostat.storage import Store

FOLDER = f"{WORK}checkpoints/"
_QUARANTINE = f"{WORK}quarantine/"
_MANIFEST = "checkpoint.json"
_MANIFEST_KEY = re.compile(rf"{FOLDER}step-(\d{{8,}})/{_MANIFEST}")


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` optimizer steps. Tensors are on the CPU."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)


def _folder(step: int) -> str:
    return f"{FOLDER}step-{step:08d}/"


def write_checkpoint(files: Store, checkpoint: Checkpoint, history: list[dict[str, Any]], *, keep: int) -> None:
    """Write everything, the manifest last; then remove all but the newest `keep`, manifests first. History is never removed."""
    folder = _folder(checkpoint.step)
    content = {
        "model.safetensors": tensors_to_bytes(checkpoint.model),
        "optimizer.safetensors": tensors_to_bytes(checkpoint.optimizer),
        "history.jsonl": "".join(json.dumps(row, sort_keys=True) + "\n" for row in history).encode(),
    }
    for name, data in content.items():
        files.put(folder + name, data)
    manifest = {
        "step": checkpoint.step,
        "state": checkpoint.state,
        "files": {name: describe(data).model_dump() for name, data in content.items()},
    }
    files.put(folder + _MANIFEST, json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1).encode())
    for step in complete_steps(files)[:-keep]:
        for name in (_MANIFEST, "model.safetensors", "optimizer.safetensors"):
            files.delete(_folder(step) + name)


def _seal(manifest: Mapping[str, Any]) -> str:
    return describe(canonical_json(manifest).encode()).sha256


def complete_steps(files: Store) -> list[int]:
    """Steps that have a manifest, rising."""
    matches = (_MANIFEST_KEY.fullmatch(entry.key) for entry in files.list(FOLDER))
    return sorted(int(match[1]) for match in matches if match)


def _read(files: Store, step: int) -> Checkpoint:
    folder = _folder(step)
    try:
        manifest = json.loads(files.read(folder + _MANIFEST))
        if manifest.pop("sha256") != _seal(manifest) or manifest["step"] != step:
            raise CheckpointError(f"{folder}{_MANIFEST} does not match its own sha256")
        content = {}
        for name, expected in manifest["files"].items():
            content[name] = files.read(folder + name)
            if describe(content[name]).model_dump() != expected:
                raise CheckpointError(f"{folder}{name} does not match its recorded sha256")
        return Checkpoint(
            step,
            tensors_from_bytes(content["model.safetensors"], folder + "model.safetensors"),
            tensors_from_bytes(content["optimizer.safetensors"], folder + "optimizer.safetensors"),
            manifest["state"],
        )
    except (ObjectNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:  # a manifest may be any JSON
        raise CheckpointError(f"checkpoint of step {step} cannot be read: {error}") from error


def newest_checkpoint(files: Store, notify: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose hashes agree; every bad one is passed over with a notice.

    A store that cannot be read is an error: an outage must not cost the steps since an older checkpoint.
    """
    for step in reversed(complete_steps(files)):
        try:
            return _read(files, step)
        except CheckpointError as error:
            notify(f"passing over a damaged checkpoint: {error}")
    return None


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
