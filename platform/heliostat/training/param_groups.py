"""AdamW parameter groups: layer-wise decay, a slower patch projection, no weight decay on biases, norms and gains."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from heliostat.training.config import OptimConfig
from heliostat.training.method import Network
from heliostat.training.schedules import StepValues


class Multipliers(NamedTuple):
    """Factors on the scheduled learning rate and weight decay; prototypes and backbone follow learning rates of their own.

    submodule is the child of the network that the parameter belongs to; gradients are clipped for each by itself.
    """

    lr: float
    weight_decay: float
    is_last_layer: bool
    is_backbone: bool
    submodule: str


def multipliers(name: str, depth: int, optim: OptimConfig) -> Multipliers:
    """Multipliers of one parameter of a network, by its name (`backbone.blocks.0.attn.qkv.weight`, `dino_head.mlp.0.bias` ...).

    The learning rate is layerwise_decay ** (depth + 1 - layer): layer 0 is tokens, position embedding and patch projection,
    layer i + 1 is block i; the final norm and the heads have factor 1. As in DINOv2, position embedding, cls, mask and
    register tokens are decayed.
    """
    layer = depth + 1
    is_backbone = name.startswith("backbone.")
    if is_backbone:
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        if block is not None:
            layer = int(block[1]) + 1
        elif not name.startswith("backbone.norm."):
            layer = 0
    lr = optim.layerwise_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        lr *= optim.patch_embed_lr_mult
    is_decayed = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return Multipliers(lr, float(is_decayed), "last_layer" in name, is_backbone, name.partition(".")[0])


def build_param_groups(network: nn.Module, depth: int, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups for AdamW, one per distinct set of multipliers, in order of first appearance.

    network has the children backbone, dino_head and perhaps ibot_head; depth is its number of blocks. Each group holds params,
    names, lr_multiplier, weight_decay_multiplier, is_last_layer, is_backbone and submodule; its lr and weight_decay are 0
    until `apply_step_values`.
    """
    groups: dict[Multipliers, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        factors = multipliers(name, depth, optim)
        group = groups.setdefault(
            factors,
            {
                "params": [],
                "names": [],
                "lr_multiplier": factors.lr,
                "weight_decay_multiplier": factors.weight_decay,
                "is_last_layer": factors.is_last_layer,
                "is_backbone": factors.is_backbone,
                "submodule": factors.submodule,
                "lr": 0.0,
                "weight_decay": 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(networks: Mapping[str, Network], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameter groups of every network. Its learning rates are 0 until `apply_step_values`.

    Fused: one pass over weights, gradients and moments (measured: docs/log.md).
    """
    groups = []
    for name, network in networks.items():
        for group in build_param_groups(network, network.backbone.config.depth, optim):
            groups.append(group | {"submodule": f"{name}/{group['submodule']}" if name else group["submodule"]})
    return torch.optim.AdamW(groups, lr=0.0, betas=(optim.adamw_beta1, optim.adamw_beta2), fused=True)


def apply_step_values(groups: Iterable[dict[str, Any]], values: StepValues) -> None:
    """Write the learning rate and weight decay of a step into the groups of an optimizer."""
    for group in groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        factor = values.backbone_lr_factor if group["is_backbone"] else 1.0
        group["lr"] = lr * factor * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["weight_decay_multiplier"]
