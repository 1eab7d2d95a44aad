import pytest
import torch

from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.vit import VisionTransformer
from heliostat.training.config import OptimConfig
from heliostat.training.method import Network
from heliostat.training.param_groups import apply_step_values, build_param_groups, multipliers
from heliostat.training.schedules import StepValues

OPTIM = OptimConfig(layerwise_decay=0.9, patch_embed_lr_mult=0.2)


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay"),
    [
        ("backbone.cls_token", 0.07179, 1.0),
        ("backbone.pos_embed", 0.07179, 1.0),
        ("backbone.register_tokens", 0.07179, 1.0),
        ("backbone.mask_token", 0.07179, 1.0),
        ("backbone.patch_embed.proj.weight", 0.01436, 1.0),
        ("backbone.patch_embed.proj.bias", 0.01436, 0.0),
        ("backbone.blocks.0.attn.qkv.weight", 0.07977, 1.0),
        ("backbone.blocks.5.ls1.gamma", 0.13509, 0.0),
        ("backbone.blocks.23.norm1.weight", 0.9, 0.0),
        ("backbone.norm.weight", 1.0, 0.0),
        ("dino_head.mlp.0.weight", 1.0, 1.0),
    ],
)
def test_multipliers_of_a_large_backbone_are_those_of_dinov2(name, lr, weight_decay):
    found = multipliers(name, 24, OPTIM)
    assert found.lr == pytest.approx(lr, abs=5e-6)
    assert (found.weight_decay, found.is_last_layer) == (weight_decay, False)


def small_network():
    backbone = BackboneConfig(arch="vit_tiny", embed_dim=16, num_heads=2, depth=3)
    head = HeadConfig(out_dim=8, hidden_dim=8, bottleneck_dim=4)
    return Network(VisionTransformer(backbone), head, head)


def test_every_parameter_is_in_exactly_one_group():
    network = small_network()
    groups = build_param_groups(network, 3, OPTIM)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    assert [name for group in groups if group["is_last_layer"] for name in group["names"]] == [
        f"{head}_head.last_layer.parametrizations.weight.original{index}" for head in ("dino", "ibot") for index in (0, 1)
    ]


def test_frozen_parameters_are_left_out():
    network = small_network()
    network.backbone.requires_grad_(False)
    assert all(
        name.split("_")[1].startswith("head") for group in build_param_groups(network, 3, OPTIM) for name in group["names"]
    )


def test_step_values_reach_the_optimizer():
    network = small_network()
    optimizer = torch.optim.AdamW(build_param_groups(network, 3, OPTIM))
    values = StepValues(lr=0.1, last_layer_lr=0.0, weight_decay=0.3, momentum=0.9, teacher_temp=0.04)
    apply_step_values(optimizer.param_groups, values)
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["is_last_layer"] else 0.1 * group["lr_multiplier"])
        assert group["weight_decay"] == 0.3 * group["weight_decay_multiplier"]
