"""The files of a model artifact, and how a model is read back.

model.json              what the weights are: backbone, heads, pixels they expect
backbone.safetensors    the final backbone (EMA of the student), under DINOv2's released names
heads.safetensors       the heads of the same average, `dino_head.*` and `ibot_head.*`
history.jsonl           metric records of the run, one JSON object per line
"""

import json
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore
from heliostat.config import StrictModel, validate
from heliostat.errors import CheckpointError
from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.names import from_fair_names, to_fair_names
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import load_state
from heliostat.storage import Store, open_store

MODEL_JSON = "model.json"
BACKBONE = "backbone.safetensors"
HEADS = "heads.safetensors"
HISTORY = "history.jsonl"


class ModelInfo(StrictModel):
    """What a user of the weights must know."""

    backbone: BackboneConfig
    """The network."""
    dino_head: HeadConfig
    """The head of cls tokens."""
    ibot_head: HeadConfig | None = None
    """The head of patch tokens where it is separate."""
    mean: tuple[float, float, float]
    """Per-channel mean of the expected pixels, in 0..1."""
    std: tuple[float, float, float]
    """Per-channel standard deviation of the expected pixels, in 0..1."""
    grayscale: bool = False
    """Whether images were turned into luminance first."""
    steps: int
    """Optimizer steps of the run."""
    images_seen: int
    """Images drawn in the run, repeats included."""


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialise named tensors of any device as safetensors."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data: bytes = safetensors.torch.save(plain, dict(metadata or {}))
    return data


def tensors_from_bytes(data: bytes, what: str) -> dict[str, Tensor]:
    """Read safetensors. Raises CheckpointError naming `what` when the bytes are torn or foreign."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{what} ({len(data)} bytes) is truncated or not safetensors: {error}") from error
    return tensors


def model_files(info: ModelInfo, network: Mapping[str, Tensor], history: bytes) -> dict[str, bytes]:
    """The files of a model artifact from the state of a network (`backbone.*`, `dino_head.*` ...) and the centres."""
    backbone = {key.removeprefix("backbone."): value for key, value in network.items() if key.startswith("backbone.")}
    heads = {key: value for key, value in network.items() if not key.startswith("backbone.")}
    return {
        MODEL_JSON: (info.model_dump_json(indent=1) + "\n").encode(),
        BACKBONE: tensors_to_bytes(to_fair_names(backbone)),
        HEADS: tensors_to_bytes(to_fair_names(heads)),
        HISTORY: history,
    }


def read_info(model: Artifact) -> ModelInfo:
    """The model.json of a model artifact. Raises ArtifactError when it is not what was committed."""
    return validate(ModelInfo, json.loads(model.read(MODEL_JSON)), f"{model.ref}/{MODEL_JSON}")


def read_backbone_files(files: Store, what: str) -> tuple[VisionTransformer, ModelInfo]:
    """The backbone below a store, in evaluation mode on the CPU; `what` names it in errors.

    Nothing is drawn: torch's generator belongs to the training, which may go on in another thread.
    """
    info = validate(ModelInfo, json.loads(files.read(MODEL_JSON)), f"{what}/{MODEL_JSON}")
    return _backbone_of(info, files.read(BACKBONE), what), info


def _backbone_of(info: ModelInfo, weights: bytes, what: str) -> VisionTransformer:
    with torch.device("meta"):
        backbone = VisionTransformer(info.backbone)
    backbone.to_empty(device="cpu")
    state = tensors_from_bytes(weights, f"{what}/{BACKBONE}")
    load_state(backbone, from_fair_names(state), f"{what}/{BACKBONE}")
    return backbone.eval().requires_grad_(False)


def read_backbone(model: Artifact) -> tuple[VisionTransformer, ModelInfo]:
    """The backbone of a model artifact, in evaluation mode on the CPU. Raises ArtifactError when a file was changed since."""
    info = read_info(model)
    return _backbone_of(info, model.read(BACKBONE), str(model.ref)), info


def open_backbone(name: str, *, store: str = "./heliostat-store") -> tuple[VisionTransformer, ModelInfo]:
    """The backbone of `model/name@version` in a store, in evaluation mode on the CPU. Raises ArtifactNotFoundError."""
    return read_backbone(ArtifactStore(open_store(store)).load(ArtifactRef.parse(name)))


def read_states(model: Artifact) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's state without prefix, and the heads' (`dino_head.*`, `ibot_head.*`, `*_targets.*`), under our names."""
    states = [from_fair_names(tensors_from_bytes(model.read(key), f"{model.ref}/{key}")) for key in (BACKBONE, HEADS)]
    return states[0], states[1]


def teacher_state(backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the teacher of a distillation: `teacher.backbone.*`, `teacher.dino_head.*` ..., `*_targets.*`."""
    state = {f"teacher.backbone.{key}": value for key, value in backbone.items()}
    for key, value in heads.items():
        state[key if key.partition(".")[0].endswith("_targets") else f"teacher.{key}"] = value
    return state
