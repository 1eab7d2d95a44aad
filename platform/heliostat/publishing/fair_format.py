"""The backbone under DINOv2's released names, as `model.safetensors` beside a `config.json` of ours."""

import json
from pathlib import Path

from torch import Tensor

from heliostat.models.config import BackboneConfig
from heliostat.models.names import to_fair_names
from heliostat.models.public import CONFIG, WEIGHTS, read_public_weights
from heliostat.models.stored import ModelInfo
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import load_state, write_weights
from heliostat.publishing.formats import Tokens

FOLDER = ""
LIBRARIES: tuple[str, ...] = ()


def refusal(config: BackboneConfig) -> str:
    """Nothing: the configuration is written whole."""
    return ""


def write(backbone: VisionTransformer, info: ModelInfo, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`."""
    write_weights(folder / WEIGHTS, to_fair_names(backbone.state_dict()), {"format": "pt"})
    (folder / CONFIG).write_bytes(config_json(info))


def config_json(info: ModelInfo) -> bytes:
    """What a loader must know: architecture and preprocessing."""
    architecture = info.backbone.model_dump(mode="json")
    pixels = {"mean": info.mean, "std": info.std, "image_size": info.backbone.img_size, "grayscale": info.grayscale}
    return (json.dumps({"architecture": architecture, "preprocessing": pixels}, indent=1) + "\n").encode()


def read_back(folder: Path, images_BCHW: Tensor) -> Tokens:
    """Tokens of the published files, read as public weights are."""
    found = read_public_weights(folder)
    backbone = VisionTransformer(found.config).eval()
    load_state(backbone, found.backbone, WEIGHTS)
    features = backbone(images_BCHW)
    return Tokens(features.cls_BD, features.registers_BRD, features.patches_BND)


def notes(info: ModelInfo) -> list[str]:
    """Nothing."""
    return []


def loading(info: ModelInfo) -> str:
    """Python that loads the release with heliostat."""
    return """from pathlib import Path
from heliostat.models.public import read_public_weights
from heliostat.models.vit import VisionTransformer

found = read_public_weights(Path("."))
backbone = VisionTransformer(found.config).eval()
backbone.load_state_dict(found.backbone)
features = backbone(images)  # (B, 3, H, W), normalised as above
cls, patches = features.cls_BD, features.patches_BND"""
