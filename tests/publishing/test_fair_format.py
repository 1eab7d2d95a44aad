"""The release under DINOv2's names: exact at every size, for every kind of backbone, with every bias."""

import json

import pytest
import torch
from random_backbone import VARIANTS, difference, info_of, random_backbone, random_images, tiny_config
from safetensors.torch import load_file

from heliostat.models.config import BackboneConfig
from heliostat.models.public import read_public_weights
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import load_state
from heliostat.publishing import fair_format


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(32, 32), (56, 24), (8, 16)])
def test_what_is_read_back_gives_the_features_exactly_at_every_size(tmp_path, variant, size):
    config = tiny_config(variant, proj_bias=False, interpolate_offset=0.25, in_chans=5)
    backbone = random_backbone(config)
    fair_format.write(backbone, info_of(config), tmp_path)
    found = read_public_weights(tmp_path)
    assert found.config == config
    again = VisionTransformer(found.config).eval().requires_grad_(False)
    load_state(again, found.backbone, "release")
    assert difference(backbone, again, random_images(config, size=size)) == 0.0


@pytest.mark.parametrize(("registers", "tensors"), [(0, 175), (4, 176)])
def test_a_released_size_has_the_released_names(tmp_path, registers, tensors):
    config = BackboneConfig(arch="vit_small", img_size=518, num_register_tokens=registers)
    backbone = VisionTransformer(config)
    fair_format.write(backbone, info_of(config), tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    names = {f"blocks.{i}.{layer}.{kind}" for i in range(12) for layer in block for kind in ("weight", "bias")}
    names |= {f"blocks.{i}.ls{j}.gamma" for i in range(12) for j in (1, 2)}
    names |= {"cls_token", "pos_embed", "mask_token", "norm.weight", "norm.bias"}
    names |= {"patch_embed.proj.weight", "patch_embed.proj.bias"} | ({"register_tokens"} if registers else set())
    assert file.keys() == names
    assert len(file) == tensors
    assert sum(tensor.numel() for tensor in file.values()) == 22_056_576 + registers * 384
    assert file["pos_embed"].shape == (1, 1370, 384)
    assert all(torch.equal(file[key], tensor) for key, tensor in backbone.state_dict().items())


def test_the_config_says_what_pixels_are_expected(tmp_path):
    config = tiny_config("mlp")
    written = json.loads(fair_format.config_json(info_of(config, grayscale=True)))
    assert written["preprocessing"] == {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "image_size": 32,
        "grayscale": True,
    }
    assert BackboneConfig(**written["architecture"]) == config
