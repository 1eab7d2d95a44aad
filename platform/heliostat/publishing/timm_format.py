"""The backbone as a folder that `timm.create_model("local-dir:...")` loads: one of its vit_*_dinov2 models, resized."""

import json
from math import nextafter
from pathlib import Path
from typing import Any

from torch import Tensor

from heliostat.models.config import BackboneConfig
from heliostat.models.names import to_timm_names
from heliostat.models.public import CONFIG, WEIGHTS
from heliostat.models.stored import ModelInfo
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import write_weights
from heliostat.publishing.formats import Tokens, importing, split_tokens
from heliostat.publishing.torchvision_operators import import_torchvision

FOLDER = "timm"
LIBRARIES: tuple[str, ...] = ("timm",)
_SIZE_OF_WIDTH = {384: "small", 768: "base", 1024: "large"}  # of the models with a plain MLP; the one with SwiGLU is "giant"


def refusal(config: BackboneConfig) -> str:
    """The first thing that timm's VisionTransformer cannot say. It takes images of the native size only."""
    if config.proj_bias != config.ffn_bias:
        return f"one argument sets both biases (proj_bias={config.proj_bias}, ffn_bias={config.ffn_bias})"
    return ""


def write(backbone: VisionTransformer, info: ModelInfo, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`."""
    write_weights(folder / WEIGHTS, to_timm_names(backbone.state_dict()), {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(info), indent=1) + "\n", encoding="utf-8")


def _config(info: ModelInfo) -> dict[str, Any]:
    backbone = info.backbone
    # timm's SwiGLU model differs from the others in what cannot be written as JSON, so the name must choose it.
    size = "giant" if backbone.ffn_layer == "swiglufused" else _SIZE_OF_WIDTH.get(backbone.embed_dim, "small")
    registers = backbone.num_register_tokens
    return {
        "architecture": f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2",
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "model_args": _arguments(backbone),
        "pretrained_cfg": {
            "input_size": [backbone.in_chans, backbone.img_size, backbone.img_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": info.mean,
            "std": info.std,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _arguments(config: BackboneConfig) -> dict[str, Any]:
    """Every size, so that nothing depends on the architecture's name but SwiGLU."""
    registers = {"reg_tokens": config.num_register_tokens, "no_embed_class": True} if config.num_register_tokens else {}
    return {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": _mlp_ratio(config),
        "qkv_bias": config.qkv_bias,
        "proj_bias": config.proj_bias,
        "init_values": config.layerscale,
    } | registers


def _mlp_ratio(config: BackboneConfig) -> float:
    """timm's ratio: int(width * ratio) is the width of fc1, which holds both inputs of a SwiGLU."""
    if config.ffn_layer == "mlp":
        return config.mlp_ratio
    ratio = 2 * config.mlp_hidden_dim / config.embed_dim
    exact = int(config.embed_dim * ratio) == 2 * config.mlp_hidden_dim
    return ratio if exact else nextafter(ratio, float("inf"))


def read_back(folder: Path, images_BCHW: Tensor) -> Tokens:
    """Tokens by timm, which refuses weights that do not fit."""
    with importing("timm"):
        import_torchvision()
        import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return split_tokens(model.forward_features(images_BCHW), model.num_prefix_tokens - 1)


def notes(info: ModelInfo) -> list[str]:
    """Sizes, and what timm has no place for."""
    size = info.backbone.img_size
    return [f"Other sizes than {size} need `img_size=...` in create_model. timm has no mask token: it is not in the file."]


def loading(info: ModelInfo) -> str:
    """Python that loads the release with timm."""
    return f"""import timm

backbone = timm.create_model("local-dir:{FOLDER}", pretrained=True).eval()
tokens = backbone.forward_features(images)  # (B, 3, {info.backbone.img_size}, {info.backbone.img_size}), normalised as above
cls, patches = tokens[:, 0], tokens[:, backbone.num_prefix_tokens:]"""
