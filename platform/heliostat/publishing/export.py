"""A model artifact -> files that others can load, each read back and compared before it counts as published."""

import json
from collections.abc import Mapping

import torch

from heliostat.artifacts import Artifact
from heliostat.errors import PublishError
from heliostat.models.names import from_fair_names, to_fair_names
from heliostat.models.stored import BACKBONE, ModelInfo, read_backbone, tensors_from_bytes, tensors_to_bytes
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import load_state

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def export_safetensors(model: Artifact, tolerance: float) -> tuple[dict[str, bytes], float]:
    """The backbone as `model.safetensors` (DINOv2's key names) and `config.json`, and the largest difference found.

    Raises PublishError when the file read back gives features that differ by more than `tolerance`.
    """
    backbone, info = read_backbone(model)
    weights = tensors_to_bytes(to_fair_names(backbone.state_dict()), {"format": "pt", "source": str(model.ref)})
    config = config_json(info)
    difference = parity(backbone, info, weights, config)
    if not difference <= tolerance:
        raise PublishError(
            f"{WEIGHTS} of {model.ref} gives features that differ by {difference:g}, the limit is {tolerance:g}; "
            f"is {BACKBONE} of the model damaged? (heliostat artifacts)"
        )
    return {WEIGHTS: weights, CONFIG: config}, difference


def config_json(info: ModelInfo) -> bytes:
    """What a loader must know: architecture and preprocessing."""
    backbone = info.backbone.model_dump(mode="json")
    pixels = {"mean": info.mean, "std": info.std, "image_size": info.backbone.img_size, "grayscale": info.grayscale}
    return (json.dumps({"architecture": backbone, "preprocessing": pixels}, indent=1) + "\n").encode()


@torch.inference_mode()
def parity(backbone: VisionTransformer, info: ModelInfo, weights: bytes, config: bytes) -> float:
    """Largest absolute difference of cls and patch tokens on random images, between a backbone and what the files give."""
    from heliostat.models.config import BackboneConfig

    architecture: Mapping[str, object] = json.loads(config)["architecture"]
    again = VisionTransformer(BackboneConfig.model_validate_json(json.dumps(architecture))).eval()
    load_state(again, from_fair_names(tensors_from_bytes(weights, WEIGHTS)), WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    size = info.backbone.img_size
    images_BCHW = torch.randn(4, info.backbone.in_chans, size, size, generator=generator)
    ours, theirs = backbone(images_BCHW), again(images_BCHW)
    cls = (ours.cls_BD - theirs.cls_BD).abs().max()
    patches = (ours.patches_BND - theirs.patches_BND).abs().max()
    return float(torch.maximum(cls, patches))
