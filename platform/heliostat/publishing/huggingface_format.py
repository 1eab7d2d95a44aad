"""The backbone as a folder that `transformers.AutoModel` loads.

Dinov2WithRegistersModel resizes the position embedding antialiased, Dinov2Model does not: that decides between them. A model
without registers that antialiases is written as one with registers, none of them.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.errors import PublishError
from heliostat.models.config import BackboneConfig
from heliostat.models.names import to_huggingface_names
from heliostat.models.public import CONFIG, WEIGHTS
from heliostat.models.stored import ModelInfo
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import write_weights
from heliostat.publishing.formats import Tokens, importing, split_tokens
from heliostat.publishing.torchvision_operators import import_torchvision

FOLDER = "huggingface"
LIBRARIES: tuple[str, ...] = ("transformers",)
_PREPROCESSOR = "preprocessor_config.json"


def refusal(config: BackboneConfig) -> str:
    """The first thing that neither class of transformers can say.

    Each resizes the position embedding in its own way, and neither with an offset. Released models without registers have an
    offset of 0.1, which their copies on the hub leave out as well: it is let through, as it does not touch the native size, and
    the card says so.
    """
    if not config.proj_bias or not config.ffn_bias:
        return f"its linears after attention always have a bias (proj_bias={config.proj_bias}, ffn_bias={config.ffn_bias})"
    if config.in_chans != 3:
        return f"its image processor knows RGB only (in_chans={config.in_chans})"
    if _whole_mlp_ratio(config) is None:
        return f"its mlp_ratio is a whole number (mlp_ratio={config.mlp_ratio})"
    if config.num_register_tokens and not config.interpolate_antialias:
        return f"with registers it always antialiases the position embedding (num_register_tokens={config.num_register_tokens})"
    if config.interpolate_offset not in ((0.0,) if config.interpolate_antialias else (0.0, 0.1)):
        return f"it resizes the position embedding without an offset (interpolate_offset={config.interpolate_offset})"
    return ""


def _whole_mlp_ratio(config: BackboneConfig) -> int | None:
    """The whole ratio that gives the hidden width of the feed-forward layer."""
    for ratio in range(1, 33):
        if config.model_copy(update={"mlp_ratio": float(ratio)}).mlp_hidden_dim == config.mlp_hidden_dim:
            return ratio
    return None


def write(backbone: VisionTransformer, info: ModelInfo, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and `preprocessor_config.json`."""
    state = backbone.state_dict()
    if info.backbone.interpolate_antialias and not info.backbone.num_register_tokens:
        state["register_tokens"] = torch.zeros(1, 0, info.backbone.embed_dim)
    write_weights(folder / WEIGHTS, to_huggingface_names(state), {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(info.backbone), indent=1) + "\n", encoding="utf-8")
    (folder / _PREPROCESSOR).write_text(json.dumps(_preprocessor(info), indent=1) + "\n", encoding="utf-8")


def _config(config: BackboneConfig) -> dict[str, Any]:
    registers = config.interpolate_antialias
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": _whole_mlp_ratio(config),
        "use_swiglu_ffn": config.ffn_layer == "swiglufused",
        "hidden_act": "gelu",
        "qkv_bias": config.qkv_bias,
        "layerscale_value": config.layerscale,
        "layer_norm_eps": 1e-6,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "dtype": "float32",
    } | ({"num_register_tokens": config.num_register_tokens} if registers else {"use_mask_token": True})


def _preprocessor(info: ModelInfo) -> dict[str, Any]:
    """The shorter side is resized to the native size and the centre cut out. Luminance it cannot make: the card says so."""
    size = info.backbone.img_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": info.mean,
        "image_std": info.std,
    }


def read_back(folder: Path, images_BCHW: Tensor) -> Tokens:
    """Tokens by transformers. Raises PublishError when it finds a weight too many or too few."""
    with importing("transformers"):
        import_torchvision()
        from transformers import AutoModel

    with _without_progress_bars():
        model, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if problems := {kind: sorted(names) for kind, names in report.items() if names}:
        raise PublishError(f"transformers does not load the weights as they were written: {problems}")
    tokens_BTD = model.eval()(pixel_values=images_BCHW).last_hidden_state
    return split_tokens(tokens_BTD, getattr(model.config, "num_register_tokens", 0))


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws a bar over our own progress line for every model that it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def notes(info: ModelInfo) -> list[str]:
    """Where transformers does otherwise than the model."""
    found = []
    if info.grayscale:
        found.append("The image processor cannot make luminance: give it grey pictures.")
    if info.backbone.interpolate_offset:
        found.append(
            f"At other sizes than {info.backbone.img_size} pixels the features differ: transformers resizes the position "
            f"embedding without the offset of {info.backbone.interpolate_offset} of the model."
        )
    return found


def loading(info: ModelInfo) -> str:
    """Python that loads the release with transformers."""
    return f"""from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{FOLDER}")  # images = processor(pictures, return_tensors="pt").pixel_values
backbone = AutoModel.from_pretrained("{FOLDER}").eval()
tokens = backbone(pixel_values=images).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {1 + info.backbone.num_register_tokens}:]"""
