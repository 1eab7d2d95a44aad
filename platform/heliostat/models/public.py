"""Weights of others, and our own, read from a file or a folder: whatever layout they are in, they come out under our names.

Files: `.safetensors`, or whatever torch.save wrote (`.pth`, `.pt`, `.bin`), of which only tensors and plain containers are
read: nothing in a file is ever executed. Folders: Hugging Face, timm, a release of ours, a model artifact of ours.
"""

import hashlib
import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from heliostat.artifacts import RECORD, Artifact, ArtifactRecord
from heliostat.config import StrictModel, validate
from heliostat.errors import CheckpointError, ConfigError
from heliostat.models.config import BackboneConfig
from heliostat.models.infer import HEAD_WIDTH, infer_config
from heliostat.models.names import Layout, State, detect_layout, from_fair_names, to_our_names, with_mask_token
from heliostat.models.stored import BACKBONE, HEADS, MODEL_JSON, ModelInfo
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import check_state, read_weights, submodule_state
from heliostat.storage import LocalStore

M = TypeVar("M", bound=StrictModel)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_HUGGINGFACE_TYPES = ("dinov2", "dinov2_with_registers")
_LFS_POINTER = b"version https://git-lfs"
_HEADS = ("dino_head.", "ibot_head.", "dino_targets.", "ibot_targets.")
_CLASSIFIERS = ("classifier.", "head.")  # of Dinov2ForImageClassification and timm; the features do not pass through them
# Arguments of timm's constructor that change sizes, which the tensors show as well; any other could change the function.
_TIMM_SIZES = {"img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"}
_TIMM_SIZES |= {"proj_bias", "init_values", "reg_tokens", "no_embed_class", "dynamic_img_size"}
# What torch.load raises on files that are torn or not its own (found by altering bytes): its unpickler checks little.
_TORN: tuple[type[Exception], ...] = (
    RuntimeError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    TypeError,
)
_TORN += (AttributeError, AssertionError, OverflowError, MemoryError, struct.error)


@dataclass(frozen=True)
class PublicWeights:
    """A backbone as it was found, in float32 on the CPU. Its tensors fit `VisionTransformer(config)` exactly."""

    backbone: State
    """Our names, without a prefix."""
    heads: State
    """`dino_head.*`, `ibot_head.*`, centres (`*_targets.*`, own models only) under our names; empty where there are none."""
    config: BackboneConfig
    """What the tensors, and config.json where there is one, say."""
    layout: Layout
    """The names that the file used."""
    sha256: str
    """Of the bytes of the weight file, or of all weight files of a folder in the order of their names."""
    notes: tuple[str, ...] = ()
    """What was added, left out or converted on the way, one sentence each."""


@dataclass(frozen=True)
class _Found:
    """What lies on disk: tensors under the names of the files, and what config.json says beyond them."""

    state: State
    files: tuple[Path, ...]
    config: BackboneConfig | None = None
    num_heads: int | None = None


def read_public_weights(path: Path, *, num_heads: int | None = None) -> PublicWeights:
    """Read a backbone from a file or folder. Raises CheckpointError, in one line, for whatever is torn, foreign or unknown.

    num_heads is used where no config.json tells the attention heads; without it they are 64 wide, as all released ones are.

    Layouts: DINOv2's own, released or in a training checkpoint (`teacher`); `Dinov2Model` and `Dinov2WithRegistersModel` of
    transformers; `vit_*_dinov2` of timm. timm drops the mask token: it is then zero, as DINOv2 initialises it (see `notes`).
    """
    what = str(path)
    found = _read_folder(path) if path.is_dir() else _Found(_read_file(path), (path,))
    if damaged := [key for key in found.state if not key.isprintable()]:
        raise CheckpointError(f"{what} has a tensor named {damaged[0]!r}; the file is damaged, fetch it again")
    state, heads, left_out = _split(found.state)
    layout = detect_layout(state, what)
    state, converted = _as_float32(to_our_names(state, layout), what)
    backbone, added = with_mask_token(state)
    config = found.config or infer_config(backbone, found.num_heads or num_heads, what)
    if found.config is None and found.num_heads is None and config.num_heads * HEAD_WIDTH != config.embed_dim:
        added += (f"does not tell its attention heads, {config.num_heads} are taken on trust",)
    if not config.num_register_tokens and "register_tokens" in backbone and backbone["register_tokens"].numel() == 0:
        del backbone["register_tokens"]  # a tensor of no registers only told the convention of the position embedding
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        network = VisionTransformer(config)
    check_state(network, backbone, what)
    return PublicWeights(
        backbone=backbone,
        heads=_as_float32(from_fair_names(heads), what)[0],
        config=config,
        layout=layout,
        sha256=_sha256(found.files),
        notes=(*left_out, *added, *converted),
    )


def _read_file(path: Path) -> State:
    if path.suffix == ".safetensors":
        return read_weights(path)[0]
    try:
        with warnings.catch_warnings():
            # torch warns of a file's age (pickle protocol, typed storages) before it tries: what cannot be read fails below.
            warnings.filterwarnings(
                "ignore", message="Detected pickle protocol|TypedStorage is deprecated", category=UserWarning
            )
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot read weights {path}: no such file or folder") from error
    except _TORN as error:
        size = path.stat().st_size
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        if is_pointer:
            raise CheckpointError(f"{path} is a pointer of git-lfs, not the file; run git lfs pull, or download it") from error
        # torch's own text advises to switch the check off; of what may be wrong only the kind is told on.
        refused = "weights_only" in str(error)
        reason = "it asks for code to be run" if refused else (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a file of plain tensors: {reason}; fetch it again, or convert it to "
            "safetensors where you trust it"
        ) from error
    state = loaded.get("teacher", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(
            f"{path} does not hold a state dict; expected a mapping of names to tensors, or one under `teacher`"
        )
    return dict(state)


def _check_artifact(path: Path) -> None:
    """Compare a folder that is one of our artifacts with its record. Raises ArtifactError."""
    if (path / RECORD).is_file():
        try:
            record = ArtifactRecord.model_validate(_read_json(path / RECORD))
        except ValidationError as error:
            raise CheckpointError(
                f"{path / RECORD} is damaged ({error.errors()[0]['msg']}); restore it, or remove it"
            ) from error
        model = Artifact(record, LocalStore(path))
        for key in (MODEL_JSON, BACKBONE, HEADS):
            model.read(key)


def _read_folder(path: Path) -> _Found:
    if (path / MODEL_JSON).is_file():
        _check_artifact(path)
        info = _validated(ModelInfo, _read_json(path / MODEL_JSON), str(path / MODEL_JSON))
        backbone = {f"backbone.{key}": tensor for key, tensor in read_weights(path / BACKBONE)[0].items()}
        heads = read_weights(path / HEADS)[0]
        return _Found(backbone | heads, (path / BACKBONE, path / HEADS), config=info.backbone)
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} has neither {CONFIG} nor {MODEL_JSON}; give a folder of Hugging Face, timm or heliostat, or a file in it"
        )
    config = _read_json(path / CONFIG)
    state, files = _read_shards(path)
    architecture = config.get("architecture")
    if isinstance(architecture, dict):
        return _Found(state, files, config=_validated(BackboneConfig, architecture, f"{path / CONFIG}: architecture"))
    if architecture is not None:
        return _Found(state, files, num_heads=_timm_heads(config, path / CONFIG))
    return _Found(state, files, num_heads=_huggingface_heads(config, path / CONFIG))


def _validated(model: type[M], mapping: Mapping[str, Any], source: str) -> M:
    try:
        return validate(model, mapping, source)
    except ConfigError as error:
        raise CheckpointError(f"{error}; it was not written by this version of heliostat") from error


def _timm_heads(config: Mapping[str, Any], path: Path) -> int | None:
    architecture, arguments = config["architecture"], config.get("model_args") or {}
    if "dinov2" not in str(architecture):
        raise CheckpointError(f"{path} is of timm's {architecture}; only its vit_*_dinov2 models are read")
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path} has model_args of type {type(arguments).__name__}; expected a JSON object")
    if unknown := sorted(set(arguments) - _TIMM_SIZES):
        raise CheckpointError(f"{path} sets {', '.join(unknown)}, which may change what the model computes; it cannot be read")
    return _count(arguments.get("num_heads"), "model_args.num_heads", path)


def _huggingface_heads(config: Mapping[str, Any], path: Path) -> int | None:
    if config.get("model_type") not in _HUGGINGFACE_TYPES:
        raise CheckpointError(
            f"{path} has model_type {config.get('model_type')!r}; only {' and '.join(_HUGGINGFACE_TYPES)} are read"
        )
    for key, known in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if config.get(key, known) != known:
            raise CheckpointError(f"{path} has {key} {config[key]!r}; DINOv2 has {known!r}, and only that is computed here")
    return _count(config.get("num_attention_heads"), "num_attention_heads", path)


def _count(value: object, key: str, path: Path) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise CheckpointError(f"{path} has {key} {value!r}; expected a whole number above 0")


def _read_shards(path: Path) -> tuple[State, tuple[Path, ...]]:
    """The tensors of model.safetensors (which transformers prefers as well), or else of the files that its index names."""
    if (path / WEIGHTS).is_file() or not (path / _INDEX).is_file():
        return read_weights(path / WEIGHTS)[0], (path / WEIGHTS,)
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path / _INDEX} has no weight_map of names to files; fetch it again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{path / _INDEX} names files outside its folder: {outside[0]}")
    state: State = {}
    for name in names:
        state |= read_weights(path / name)[0]
    if missing := sorted(weight_map.keys() - state.keys()):
        raise CheckpointError(f"{path}: {len(missing)} tensors of {_INDEX} are in none of its files, first {missing[0]}")
    return state, tuple(path / name for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path} as JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _split(state: State) -> tuple[State, State, tuple[str, ...]]:
    """Backbone without its prefix, heads, and what was left out."""
    if any(key.startswith("backbone.") for key in state):
        backbone = submodule_state(state, "backbone")
        heads = {key: tensor for key, tensor in state.items() if key.startswith(_HEADS)}
    else:
        backbone = {key: tensor for key, tensor in state.items() if not key.startswith(_CLASSIFIERS)}
        heads = {}
    left_out = sorted({key.partition(".")[0] for key in state} - {key.partition(".")[0] for key in (*backbone, *heads)})
    left_out = [name for name in left_out if name != "backbone"]
    return backbone, heads, (f"left out: {', '.join(left_out)}",) if left_out else ()


def _as_float32(state: State, what: str) -> tuple[State, tuple[str, ...]]:
    """A state in float32, and a note where it was stored in another type. Raises CheckpointError for what is not finite."""
    for key, tensor in state.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{what}: {key} ({tensor.dtype}) is not finite numbers; the file is damaged, fetch it again")
    dtypes = sorted({str(tensor.dtype) for tensor in state.values()} - {"torch.float32"})
    notes = (f"stored in {', '.join(dtypes)}, read as float32",) if dtypes else ()
    return {key: tensor.float() for key, tensor in state.items()}, notes


def _sha256(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
