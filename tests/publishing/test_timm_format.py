"""What timm loads from our folder, and what it cannot hold."""

import json

import pytest
import torch
from random_backbone import VARIANTS, info_of, random_backbone, random_images, tiny_config

from heliostat.models.config import BackboneConfig
from heliostat.models.public import read_public_weights
from heliostat.publishing import timm_format
from heliostat.publishing.formats import Tokens, largest_difference
from heliostat.publishing.torchvision_operators import import_torchvision


def tokens(backbone, images) -> Tokens:
    features = backbone(images)
    return Tokens(features.cls_BD, features.registers_BRD, features.patches_BND)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False},
        {"proj_bias": False, "ffn_bias": False},
        {"in_chans": 1},
        {"mlp_ratio": 2.5},
        {"num_heads": 8},
        {"embed_dim": 384, "num_heads": 3, "mlp_ratio": 1.7},
    ],
)
def test_timm_gives_the_features_of_the_model(tmp_path, capfd, variant, changes):
    config = tiny_config(variant, **changes)
    backbone, images = random_backbone(config), random_images(config)
    timm_format.write(backbone, info_of(config), tmp_path)
    assert timm_format.refusal(config) == ""
    assert largest_difference(tokens(backbone, images), timm_format.read_back(tmp_path, images)) < 1e-4
    found = read_public_weights(tmp_path)
    assert (found.layout, found.config.num_heads, found.config.mlp_hidden_dim) == (
        "timm",
        config.num_heads,
        config.mlp_hidden_dim,
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arch", "ffn_layer", "name"),
    [
        ("vit_small", "mlp", "vit_small_patch14_reg4_dinov2"),
        ("vit_base", "mlp", "vit_base_patch14_reg4_dinov2"),
        ("vit_large", "mlp", "vit_large_patch14_reg4_dinov2"),
        ("vit_giant2", "swiglufused", "vit_giant_patch14_reg4_dinov2"),
    ],
)
def test_released_sizes_take_timms_own_names_and_its_default_sizes(arch, ffn_layer, name):
    import_torchvision()
    import timm

    config = timm_format._config(info_of(BackboneConfig(arch=arch, ffn_layer=ffn_layer, img_size=518)))
    assert config["architecture"] == name
    with torch.device("meta"):
        default = timm.create_model(name)
        ours = timm.create_model(name, **config["model_args"])
    shapes = {key: tensor.shape for key, tensor in default.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes
    assert [block.attn.num_heads for block in ours.blocks] == [block.attn.num_heads for block in default.blocks]


def test_biases_that_timm_sets_together_are_named():
    assert "(proj_bias=False, ffn_bias=True)" in timm_format.refusal(tiny_config("mlp", proj_bias=False))
    assert "(proj_bias=True, ffn_bias=False)" in timm_format.refusal(tiny_config("mlp", ffn_bias=False))


def test_timm_knows_the_pixels_and_the_size_of_the_model(tmp_path):
    import_torchvision()
    import timm

    config = tiny_config("mlp_registers")
    timm_format.write(random_backbone(config), info_of(config), tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    found = [tuple(data[key]) for key in ("mean", "std", "input_size")]
    assert found == [(0.4, 0.5, 0.6), (0.2, 0.25, 0.3), (3, 32, 32)]
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 0
