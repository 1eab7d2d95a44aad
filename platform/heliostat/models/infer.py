"""The configuration of a backbone, read off the shapes of its tensors."""

import re
from collections.abc import Iterator
from math import isqrt, nextafter

from torch import Tensor

from heliostat.config import validate
from heliostat.errors import CheckpointError
from heliostat.models.config import ARCH_SIZES, ArchSize, BackboneConfig
from heliostat.models.names import State, is_square

HEAD_WIDTH = 64  # every released DINOv2 model: embed_dim / num_heads, Table 17 of arXiv 2304.07193


def infer_config(state: State, num_heads: int | None, what: str) -> BackboneConfig:
    """The configuration that a backbone's state (our names) was made with; `what` names the state in errors.

    num_heads cannot be seen in tensors: None takes embed_dim / 64. The position embedding's convention cannot be either, and
    follows the released models: antialiased without an offset where there is a tensor of registers (even one of none, which
    `publishing/huggingface_format.py` writes to say so), offset 0.1 where there is not. Drop path and the initial
    LayerScale leave no trace and keep their defaults. Raises CheckpointError when the tensors are not of a DINOv2 backbone
    or num_heads does not divide their width.
    """
    embed_dim, in_chans, patch_size, patch_width = _shape(state, "patch_embed.proj.weight", 4, what)
    num_patches = _shape(state, "pos_embed", 3, what)[1] - 1
    if patch_size != patch_width or not is_square(num_patches):
        raise CheckpointError(
            f"{what} has patches of {patch_size} x {patch_width} pixels and {num_patches} positions; "
            "only square patches on a square grid are read"
        )
    size = ArchSize(embed_dim, _depth(state, what), num_heads or _released_heads(embed_dim, what))
    if embed_dim % size.num_heads:
        raise CheckpointError(
            f"{what} has tokens of width {embed_dim}, which num_heads {size.num_heads} of its config does not divide"
        )
    with_registers = "register_tokens" in state
    sizes = {
        "arch": next((name for name, known in ARCH_SIZES.items() if known == size), "vit_small"),
        **size._asdict(),
        "img_size": isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "num_register_tokens": _shape(state, "register_tokens", 3, what)[1] if with_registers else 0,
        "interpolate_antialias": with_registers,
        "interpolate_offset": 0.0 if with_registers else 0.1,
    }
    if "blocks.0.mlp.w12.weight" in state:
        hidden, bias = _shape(state, "blocks.0.mlp.w3.weight", 2, what)[1], "blocks.0.mlp.w3.bias" in state
        sizes |= {"ffn_layer": "swiglufused", "ffn_bias": bias}
    else:
        hidden, bias = _shape(state, "blocks.0.mlp.fc1.weight", 2, what)[0], "blocks.0.mlp.fc1.bias" in state
        sizes |= {"ffn_layer": "mlp", "ffn_bias": bias}
    for ratio in _ratios(embed_dim, hidden):
        config = validate(BackboneConfig, {**sizes, "mlp_ratio": ratio}, what)
        if config.mlp_hidden_dim == hidden:
            return config
    raise CheckpointError(
        f"{what} has a {sizes['ffn_layer']} of hidden width {hidden}, which no mlp_ratio gives at width {embed_dim}; "
        "SwiGLU must be a multiple of 8 wide"
    )


def _shape(state: State, key: str, ndim: int, what: str) -> tuple[int, ...]:
    tensor: Tensor | None = state.get(key)
    if tensor is None or tensor.ndim != ndim or (0 in tensor.shape and key != "register_tokens"):
        found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{what} is no DINOv2 backbone: {key} {found}, expected a tensor of {ndim} dimensions")
    return tuple(tensor.shape)


def _depth(state: State, what: str) -> int:
    blocks = {int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    if blocks != set(range(len(blocks))) or not blocks:
        raise CheckpointError(f"{what} has blocks {sorted(blocks)[:5]} ...; they must count from 0 without a gap")
    return len(blocks)


def _released_heads(embed_dim: int, what: str) -> int:
    if embed_dim % HEAD_WIDTH:
        raise CheckpointError(
            f"{what} does not say num_heads, and width {embed_dim} is not divisible by {HEAD_WIDTH}, the width of every "
            "released DINOv2 head; give a folder with the config.json that names num_heads"
        )
    return embed_dim // HEAD_WIDTH


def _ratios(embed_dim: int, hidden: int) -> Iterator[float]:
    """Ratios that may give a hidden width: DINOv2's 4, then exact ones for mlp and, at two thirds, for swiglufused."""
    yield 4.0
    for wide in (hidden, (3 * hidden + 1) // 2):
        yield from (round(wide / embed_dim, 3), wide / embed_dim, nextafter(wide / embed_dim, float("inf")))
