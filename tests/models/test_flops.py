import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.flops import (
    backbone_forward_flops,
    head_forward_flops,
    num_backbone_parameters,
    num_head_parameters,
    training_flops_per_image,
)
from heliostat.models.heads import ProjectionHead
from heliostat.models.vit import VisionTransformer


@pytest.mark.parametrize(
    ("arch", "ffn_layer", "registers", "parameters"),
    [
        ("vit_small", "mlp", 0, 22_056_576),
        ("vit_small", "mlp", 4, 22_058_112),
        ("vit_base", "mlp", 0, 86_580_480),
        ("vit_large", "mlp", 4, 304_372_736),
        ("vit_giant2", "swiglufused", 0, 1_136_480_768),
        ("vit_giant2", "swiglufused", 4, 1_136_486_912),
    ],
)
def test_parameter_counts_are_those_of_the_released_models(arch, ffn_layer, registers, parameters):
    config = BackboneConfig(arch=arch, ffn_layer=ffn_layer, num_register_tokens=registers, img_size=518)
    assert num_backbone_parameters(config) == parameters


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@pytest.mark.parametrize("bias", [True, False])
def test_parameter_counts_are_those_of_the_modules(ffn_layer, bias):
    config = BackboneConfig(arch="vit_tiny", depth=2, ffn_layer=ffn_layer, qkv_bias=bias, proj_bias=not bias, ffn_bias=bias)
    assert num_backbone_parameters(config) == sum(p.numel() for p in VisionTransformer(config).parameters())
    head = HeadConfig(out_dim=30, hidden_dim=20, bottleneck_dim=10, nlayers=2)
    assert num_head_parameters(192, head) == sum(p.numel() for p in ProjectionHead(192, head).parameters())


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@torch.no_grad()
def test_forward_flops_are_those_that_torch_counts(ffn_layer):
    config = BackboneConfig(arch="vit_tiny", depth=2, ffn_layer=ffn_layer)
    backbone, head = VisionTransformer(config).eval(), HeadConfig(out_dim=30, hidden_dim=20, bottleneck_dim=10)
    projection = ProjectionHead(192, head)
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 112, 112))
    # torch counts no FLOPs for fused attention on a CPU: 4 T^2 D per block, with T = 64 patches, 4 registers and 1 cls token.
    attention = 2 * 4 * 69**2 * 192
    assert backbone_forward_flops(config, 112) == counter.get_total_flops() + attention
    with FlopCounterMode(display=False) as counter:
        projection(torch.zeros(1, 192))
    assert head_forward_flops(192, head) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("settings", "head", "rate", "figures"),
    [
        ({"arch": "vit_small"}, (65_536, 256), 0.1, (12.25, 0.166, 0.153)),
        ({"arch": "vit_base"}, (65_536, 256), 0.2, (46.3, 0.593, 0.497)),
        ({"arch": "vit_large", "patch_size": 16}, (65_536, 256), 0.3, (123, 1.538, 1.155)),
        ({"arch": "vit_large", "ffn_layer": "swiglufused"}, (131_072, 384), 0.4, (162, 2.070, 1.389)),
        ({"arch": "vit_giant2", "ffn_layer": "swiglufused"}, (131_072, 384), 0.4, (599, 7.565, 5.036)),
    ],
)
def test_training_flops_equal_an_independent_table(settings, head, rate, figures):
    config = BackboneConfig(num_register_tokens=0, **settings)
    heads = [HeadConfig(out_dim=head[0], bottleneck_dim=head[1])] * 2
    gflop_224, tflop, tflop_dropped = figures
    sizes = {"global_size_pixels": 224, "local_size_pixels": 7 * config.patch_size if config.patch_size == 14 else 96}
    common = {**sizes, "num_local_crops": 8, "masked_ratio": 0.15}
    assert backbone_forward_flops(config, 224) == pytest.approx(gflop_224 * 1e9, rel=0.005)
    assert training_flops_per_image(config, *heads, **common) == pytest.approx(tflop * 1e12, rel=0.005)
    dropped = training_flops_per_image(config, *heads, drop_path_rate=rate, **common)
    assert dropped == pytest.approx(tflop_dropped * 1e12, rel=0.005)


def test_a_larger_teacher_adds_only_its_forward():
    small, large = BackboneConfig(arch="vit_tiny"), BackboneConfig(arch="vit_small")
    head = HeadConfig(out_dim=64, bottleneck_dim=16, hidden_dim=32)
    common = {"global_size_pixels": 224, "local_size_pixels": 98, "num_local_crops": 0, "masked_ratio": 0.0}
    extra = training_flops_per_image(small, head, head, teacher=large, **common) - training_flops_per_image(
        small, head, head, **common
    )
    forward = backbone_forward_flops(large, 224) - backbone_forward_flops(small, 224)
    heads = head_forward_flops(384, head) - head_forward_flops(192, head)
    assert extra == pytest.approx(2 * forward + 2 * heads)
