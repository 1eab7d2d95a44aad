"""Key names of DINOv2 backbones in the three public layouts, and ours.

    ours            cls_token  register_tokens  blocks.0.attn.qkv.weight  blocks.0.mlp.w12.weight   norm.weight
    fair            the same; training checkpoints number blocks twice, heads keep the old names of weight norm
    huggingface     embeddings.cls_token  encoder.layer.0.attention.attention.{query,key,value}.weight  layernorm.weight
    timm            reg_token for register_tokens, fc1 and fc2 for the packed w12 and w3, no mask_token

Facts: facebookresearch/dinov2 (keys of the released files), transformers `Dinov2Model`, timm `vit_*_dinov2`. Only names and the
order of rows are known here; which shapes they must have is the network's business (`weights.load_state`).
"""

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from heliostat.errors import CheckpointError

State = dict[str, Tensor]
Layout = Literal["fair", "huggingface", "timm"]
Rules = tuple[tuple[re.Pattern[str], str], ...]

MASK_TOKEN_ADDED = "the file has no mask_token; it is zero, as DINOv2 initialises it"  # noqa: S105 - no password


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# Training checkpoints number blocks twice, `blocks.<chunk>.<block>`, with the block index global; the old weight norm kept gain
# and direction as weight_g and weight_v.
_FAIR_TO_OURS = _rules(
    (r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2."),
    (r"(^|\.)last_layer\.weight_g$", r"\1last_layer.parametrizations.weight.original0"),
    (r"(^|\.)last_layer\.weight_v$", r"\1last_layer.parametrizations.weight.original1"),
    (r"(^|\.)((?:dino|ibot)_head)\.mlp\.(weight|bias)$", r"\1\2.mlp.0.\3"),  # a head of one layer has no list of them
)
_OURS_TO_FAIR = _rules(
    (r"(^|\.)last_layer\.parametrizations\.weight\.original0$", r"\1last_layer.weight_g"),
    (r"(^|\.)last_layer\.parametrizations\.weight\.original1$", r"\1last_layer.weight_v"),
)

_FIRST_LAYER = re.compile(r"^((?:.*\.)?(?:dino|ibot)_head\.mlp)\.0\.(weight|bias)$")

# The names on disk. transformers 5 calls some parameters otherwise in memory (q_proj, gate_proj), and a state dict saved with
# torch.save has those; save_pretrained writes the names on disk.
_HUGGINGFACE_TO_OURS = _rules(
    (r"^dinov2(_with_registers)?\.", ""),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^(blocks\.\d+)\.attention\.attention\.(query|key|value)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.attention\.q_proj\.", r"\1.attn.query."),
    (r"^(blocks\.\d+)\.attention\.k_proj\.", r"\1.attn.key."),
    (r"^(blocks\.\d+)\.attention\.v_proj\.", r"\1.attn.value."),
    (r"^(blocks\.\d+)\.attention\.(output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.mlp\.weights_in\.", r"\1.mlp.w12."),
    (r"^(blocks\.\d+)\.mlp\.(weights_out|down_proj)\.", r"\1.mlp.w3."),
)
_OURS_TO_HUGGINGFACE = _rules(
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.attn\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"^blocks\.(\d+)\.mlp\.w12\.", r"encoder.layer.\1.mlp.weights_in."),
    (r"^blocks\.(\d+)\.mlp\.w3\.", r"encoder.layer.\1.mlp.weights_out."),
    (r"^blocks\.", "encoder.layer."),
)
_TIMM_TO_OURS = _rules((r"^reg_token$", "register_tokens"))
_TIMM_TO_OURS_PACKED = (*_TIMM_TO_OURS, *_rules((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3.")))
_OURS_TO_TIMM = _rules((r"^register_tokens$", "reg_token"), (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))
_QUERY_KEY_VALUE = ("query", "key", "value")


def detect_layout(keys: Iterable[str], what: str) -> Layout:
    """The layout of a backbone's keys (without `backbone.` before them); `what` names it. Raises CheckpointError for others."""
    names = sorted(keys)
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        return "huggingface"
    if "patch_embed.proj.weight" not in names:
        raise CheckpointError(
            f"{what}: keys {', '.join(names[:4])}{', ...' if len(names) > 4 else ''} are of no layout known here; "
            "known are DINOv2's own (fair), Hugging Face's Dinov2Model and timm's vit_*_dinov2"
        )
    fair_only = re.compile(r"mask_token$|register_tokens$|blocks\.\d+\.(\d+|mlp\.w12)\.")
    return "fair" if any(fair_only.match(name) for name in names) else "timm"


def to_our_names(state: Mapping[str, Tensor], layout: Layout) -> State:
    """A backbone's state dict in any known layout, under our names."""
    if layout == "huggingface":
        return from_huggingface_names(state)
    return from_timm_names(state) if layout == "timm" else from_fair_names(state)


def from_fair_names(state: Mapping[str, Tensor]) -> State:
    """Rename the keys of DINOv2 to ours; keys that are ours already stay."""
    return _rename(state, _FAIR_TO_OURS)


def to_fair_names(state: Mapping[str, Tensor]) -> State:
    """Rename our keys to those of DINOv2's released files (blocks numbered once)."""
    renamed = _rename(state, _OURS_TO_FAIR)
    single = {match[1] for key in renamed if (match := _FIRST_LAYER.match(key)) and f"{match[1]}.2.weight" not in renamed}
    return {
        _FIRST_LAYER.sub(r"\1.\2", key) if key.rpartition(".0.")[0] in single else key: value for key, value in renamed.items()
    }


def from_huggingface_names(state: Mapping[str, Tensor]) -> State:
    """Rename the keys of `Dinov2Model` and `Dinov2WithRegistersModel` to ours; query, key and value become one tensor."""
    renamed = _rename(state, _HUGGINGFACE_TO_OURS)
    return _fuse(_fuse(renamed, _QUERY_KEY_VALUE, "qkv"), ("gate_proj", "up_proj"), "w12")


def to_huggingface_names(state: Mapping[str, Tensor]) -> State:
    """Rename our keys to those on disk of `Dinov2Model`, or with registers of `Dinov2WithRegistersModel`."""
    split: State = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            parts = zip(_QUERY_KEY_VALUE, tensor.chunk(3), strict=True)
            split |= {key.replace(".qkv.", f".{name}."): part for name, part in parts}
        else:
            split[key] = tensor
    return _rename(split, _OURS_TO_HUGGINGFACE)


def from_timm_names(state: Mapping[str, Tensor]) -> State:
    """Rename the keys of timm's DINOv2 models to ours.

    Without a position of its own the cls token of a timm file is the sum of token and position: here the sum is the token and
    the position is zero, which is the same function. fc1 holds both inputs of a SwiGLU, the gate first, when it is twice as
    wide as fc2 takes.
    """
    wide, narrow = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    packed = wide is not None and narrow is not None and wide.shape[0] == 2 * narrow.shape[-1]
    renamed = _rename(state, _TIMM_TO_OURS_PACKED if packed else _TIMM_TO_OURS)
    pos_embed = renamed.get("pos_embed")
    if pos_embed is not None and pos_embed.ndim == 3 and is_square(pos_embed.shape[1]):
        renamed["pos_embed"] = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], dim=1)
    return renamed


def to_timm_names(state: Mapping[str, Tensor]) -> State:
    """Rename our keys to those of timm's DINOv2 models.

    timm has no mask token. Its models with registers keep no position for cls (`no_embed_class`), which is added to the token.
    """
    kept = {key: tensor for key, tensor in state.items() if key != "mask_token"}
    if "register_tokens" in kept:
        kept["cls_token"] = kept["cls_token"] + kept["pos_embed"][:, :1]
        kept["pos_embed"] = kept["pos_embed"][:, 1:]
    return _rename(kept, _OURS_TO_TIMM)


def with_mask_token(state: Mapping[str, Tensor]) -> tuple[State, tuple[str, ...]]:
    """A backbone's state with a mask token of zeros (1, D) where it has none, and a note saying so."""
    if "mask_token" in state or "cls_token" not in state:
        return dict(state), ()
    return {**state, "mask_token": torch.zeros_like(state["cls_token"]).reshape(1, -1)}, (MASK_TOKEN_ADDED,)


def is_square(count: int) -> bool:
    """Whether so many patches fill a square grid."""
    return isqrt(count) ** 2 == count


def _rename(state: Mapping[str, Tensor], rules: Rules) -> State:
    renamed: State = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise CheckpointError(f"two keys of the state become {name}, one of them {key}; the state mixes two layouts")
        renamed[name] = tensor
    return renamed


def _fuse(state: State, parts: tuple[str, ...], whole: str) -> State:
    """Lay the rows of `parts` under each other as `whole`, wherever all of them are there in one shape."""
    fused = dict(state)
    for key in state:
        before, found, after = key.partition(f".{parts[0]}.")
        siblings = [f"{before}.{part}.{after}" for part in parts]
        if found and all(name in state and state[name].shape == state[key].shape for name in siblings):
            fused[f"{before}.{whole}.{after}"] = torch.cat([fused.pop(name) for name in siblings])
    return fused
