"""Weights on disk: safetensors of our own, the released .pth files, and loading that refuses whatever does not fit exactly."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from heliostat.errors import CheckpointError
from heliostat.models.config import BackboneConfig
from heliostat.models.vit import resize_pos_embed

State = dict[str, Tensor]

# Key patterns of facebookresearch/dinov2 and what they are called here. Training checkpoints number blocks twice,
# `blocks.<chunk>.<block>`, with the block index global; the old weight norm kept gain and direction as weight_g and weight_v.
_FAIR_TO_OURS = (
    (re.compile(r"(^|\.)blocks\.\d+\.(\d+)\."), r"\1blocks.\2."),
    (re.compile(r"(^|\.)last_layer\.weight_g$"), r"\1last_layer.parametrizations.weight.original0"),
    (re.compile(r"(^|\.)last_layer\.weight_v$"), r"\1last_layer.parametrizations.weight.original1"),
)
_OURS_TO_FAIR = (
    (re.compile(r"(^|\.)last_layer\.parametrizations\.weight\.original0$"), r"\1last_layer.weight_g"),
    (re.compile(r"(^|\.)last_layer\.parametrizations\.weight\.original1$"), r"\1last_layer.weight_v"),
)


def from_fair_names(state: Mapping[str, Tensor]) -> State:
    """Rename the keys of DINOv2 to ours; keys that are ours already stay."""
    return _rename(state, _FAIR_TO_OURS)


def to_fair_names(state: Mapping[str, Tensor]) -> State:
    """Rename our keys to those of DINOv2's released files (blocks numbered once)."""
    return _rename(state, _OURS_TO_FAIR)


def _rename(state: Mapping[str, Tensor], rules: tuple[tuple[re.Pattern[str], str], ...]) -> State:
    renamed: State = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise CheckpointError(f"two keys of the state become {name}, one of them {key}; the state mixes two layouts")
        renamed[name] = tensor
    return renamed


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
        raise CheckpointError(f"{path} ({size} bytes) is truncated or not a safetensors file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read weights {path}: {error}") from error


def read_fair_weights(path: Path) -> State:
    """State dict of a released DINOv2 .pth file, or of the `teacher` inside a training checkpoint, under our names.

    Nothing in the file is executed: the unpickler accepts tensors and plain containers only.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot read weights {path}: no such file") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is truncated or not a file of plain tensors: {reason}") from error
    state = loaded.get("teacher", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a state dict; expected a mapping of names to tensors")
    return from_fair_names(state)


def load_state(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state dict into a module; raises CheckpointError unless names and shapes agree exactly. `what` names the state."""
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
    module.load_state_dict(dict(state))


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
