"""Checkpoints of a training run: complete or invisible, verified by content hash, never unpickled.

    _work/checkpoints/step-00000100/model.safetensors      weights of student and teacher
    _work/checkpoints/step-00000100/optimizer.safetensors  AdamW moments
    _work/checkpoints/step-00000100/history.jsonl          metric records since the checkpoint before
    _work/checkpoints/step-00000100/checkpoint.json        hashes and state, written last

No random state is stored: every draw of a step is a function of (seed, step, rank).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from heliostat.artifacts import WORK, describe
from heliostat.errors import CheckpointError, StorageError
from heliostat.models.stored import tensors_from_bytes, tensors_to_bytes
from heliostat.storage import Store

FOLDER = f"{WORK}checkpoints/"
_MANIFEST = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` optimizer steps. Tensors are on the CPU."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)


def _folder(step: int) -> str:
    return f"{FOLDER}step-{step:08d}/"


def write_checkpoint(files: Store, checkpoint: Checkpoint, history: list[dict[str, float]], *, keep: int) -> None:
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
    files.put(folder + _MANIFEST, json.dumps(manifest, indent=1).encode())
    for step in complete_steps(files)[:-keep]:
        for name in (_MANIFEST, "model.safetensors", "optimizer.safetensors"):
            files.delete(_folder(step) + name)


def complete_steps(files: Store) -> list[int]:
    """Steps that have a manifest, rising."""
    keys = [entry.key for entry in files.list(FOLDER) if entry.key.endswith(f"/{_MANIFEST}")]
    return sorted(int(key.split("/")[-2].removeprefix("step-")) for key in keys)


def _read(files: Store, step: int) -> Checkpoint:
    folder = _folder(step)
    try:
        manifest = json.loads(files.read(folder + _MANIFEST))
        content = {}
        for name, expected in manifest["files"].items():
            content[name] = files.read(folder + name)
            if describe(content[name]).model_dump() != expected:
                raise CheckpointError(f"{folder}{name} does not match its recorded sha256")
        return Checkpoint(
            int(manifest["step"]),
            tensors_from_bytes(content["model.safetensors"], folder + "model.safetensors"),
            tensors_from_bytes(content["optimizer.safetensors"], folder + "optimizer.safetensors"),
            manifest["state"],
        )
    except (StorageError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint of step {step} cannot be read: {error}") from error


def newest_checkpoint(files: Store, notify: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose hashes agree; every bad one is passed over with a notice."""
    for step in reversed(complete_steps(files)):
        try:
            return _read(files, step)
        except CheckpointError as error:
            notify(f"passing over a damaged checkpoint: {error}")
    return None


def read_history(files: Store, up_to_step: int) -> list[dict[str, float]]:
    """All metric records of the run up to a step, in order, from the pieces beside the checkpoints."""
    rows: dict[int, dict[str, float]] = {}
    for entry in files.list(FOLDER):
        if entry.key.endswith("/history.jsonl"):
            for line in files.read(entry.key).decode().splitlines():
                row = json.loads(line)
                if row["step"] <= up_to_step:
                    rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]
