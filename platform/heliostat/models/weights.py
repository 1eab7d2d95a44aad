"""Weights on disk as safetensors, and loading that refuses whatever does not fit exactly."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from heliostat.errors import CheckpointError
from heliostat.models.config import BackboneConfig
from heliostat.models.names import State
from heliostat.models.vit import resize_pos_embed


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict as safetensors: temporary name, fsync, atomic rename, so a file of this name is always complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, temporary, dict(metadata))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write weights to {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: Path) -> tuple[State, dict[str, str]]:
    """State dict (on the CPU) and metadata of a safetensors file. Raises CheckpointError when it is torn or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a safetensors file: {error}; fetch or write it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read weights {path}: {error}") from error


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state dict into a module; raises CheckpointError unless names and shapes agree exactly. `what` names the state."""
    check_state(module, state, what)
    module.load_state_dict(dict(state))


def check_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError unless a state dict has the names and shapes of a module (which may be on the meta device)."""
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {problem}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit {type(module).__name__}: {'; '.join(problems)}")


def submodule_state(state: Mapping[str, Tensor], prefix: str) -> State:
    """The part of a state dict below `prefix` (without a dot at its end), with the prefix removed."""
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in state.items() if key.startswith(f"{prefix}.")}


def fit_pos_embed(state: Mapping[str, Tensor], config: BackboneConfig) -> State:
    """A backbone state whose position embedding is resized to the config's native grid, to go on training at that size."""
    if "pos_embed" not in state:
        raise CheckpointError("the state has no pos_embed; give the state of a backbone, without a prefix")
    resized = resize_pos_embed(
        state["pos_embed"],
        (config.grid_size, config.grid_size),
        antialias=config.interpolate_antialias,
        offset=config.interpolate_offset,
    )
    return {**state, "pos_embed": resized}
