"""What transformers loads from our folder, and what it cannot hold."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from random_backbone import VARIANTS, info_of, random_backbone, random_images, tiny_config

from heliostat.errors import PublishError
from heliostat.models.public import read_public_weights
from heliostat.publishing import huggingface_format
from heliostat.publishing.formats import Tokens, largest_difference
from heliostat.publishing.torchvision_operators import import_torchvision


def tokens(backbone, images) -> Tokens:
    features = backbone(images)
    return Tokens(features.cls_BD, features.registers_BRD, features.patches_BND)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"mlp_ratio": 3.0}, {"num_heads": 8}, {"patch_size": 4}])
def test_transformers_gives_the_features_of_the_model(tmp_path, capsys, variant, changes):
    config = tiny_config(variant, **changes)
    backbone, images = random_backbone(config), random_images(config)
    huggingface_format.write(backbone, info_of(config), tmp_path)
    assert huggingface_format.refusal(config) == ""
    assert largest_difference(tokens(backbone, images), huggingface_format.read_back(tmp_path, images)) < 1e-4
    assert read_public_weights(tmp_path).config == config
    assert capsys.readouterr() == ("", "")


def test_other_sizes_agree_with_registers_and_without_them_differ_by_the_offset(tmp_path):
    for variant, limit in (("mlp_registers", 1e-4), ("swiglu_registers", 1e-4)):
        config = tiny_config(variant)
        backbone, images = random_backbone(config), random_images(config, size=(48, 24))
        folder = tmp_path / variant
        folder.mkdir()
        huggingface_format.write(backbone, info_of(config), folder)
        assert largest_difference(tokens(backbone, images), huggingface_format.read_back(folder, images)) < limit
        assert huggingface_format.notes(info_of(config)) == []
    config = tiny_config("mlp")
    backbone, images = random_backbone(config), random_images(config, size=(48, 24))
    huggingface_format.write(backbone, info_of(config), tmp_path)
    read = huggingface_format.read_back(tmp_path, images)
    assert largest_difference(tokens(backbone, images), read) > 1e-4
    assert "without the offset of 0.1" in huggingface_format.notes(info_of(config))[0]
    plain = random_backbone(tiny_config("mlp", interpolate_offset=0.0))
    assert largest_difference(tokens(plain, images), read) < 1e-4


@pytest.mark.parametrize(
    ("variant", "changes", "reason"),
    [
        ("mlp", {"proj_bias": False}, r"always have a bias \(proj_bias=False, ffn_bias=True\)"),
        ("swiglu", {"ffn_bias": False}, r"always have a bias \(proj_bias=True, ffn_bias=False\)"),
        ("mlp", {"in_chans": 1}, r"RGB only \(in_chans=1\)"),
        ("mlp", {"mlp_ratio": 2.5}, r"whole number \(mlp_ratio=2\.5\)"),
        ("mlp", {"interpolate_antialias": True}, r"without an offset \(interpolate_offset=0\.1\)"),
        ("mlp", {"interpolate_offset": 0.2}, r"interpolate_offset=0\.2"),
        ("mlp_registers", {"interpolate_offset": 0.1}, r"interpolate_offset=0\.1"),
        ("mlp_registers", {"interpolate_antialias": False}, r"always antialiases .*\(num_register_tokens=3\)"),
    ],
)
def test_what_transformers_cannot_hold_is_named(variant, changes, reason):
    import re

    assert re.search(reason, huggingface_format.refusal(tiny_config(variant, **changes)))


def test_the_image_processor_makes_the_pixels_that_the_model_expects(tmp_path):
    import_torchvision()
    from transformers import AutoImageProcessor

    config = tiny_config("mlp_registers")
    huggingface_format.write(random_backbone(config), info_of(config), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    expected = (torch.from_numpy(picture).float() / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.25, 0.3])
    torch.testing.assert_close(pixels[0], expected.permute(2, 0, 1), atol=1e-5, rtol=0)
    wide = Image.fromarray(np.zeros((64, 100, 3), dtype=np.uint8))
    assert processor(wide, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("variant", ["mlp", "swiglu"])
def test_a_model_without_registers_that_antialiases_is_written_as_one_with_none_of_them(tmp_path, variant):
    config = tiny_config(variant, interpolate_antialias=True, interpolate_offset=0.0)
    backbone = random_backbone(config)
    huggingface_format.write(backbone, info_of(config), tmp_path)
    for size in ((32, 32), (48, 24), (16, 8)):
        images = random_images(config, size=size)
        assert largest_difference(tokens(backbone, images), huggingface_format.read_back(tmp_path, images)) < 1e-4
    assert read_public_weights(tmp_path).config == config
    assert read_public_weights(tmp_path / "model.safetensors").config == config


def test_a_weight_that_transformers_does_not_find_is_an_error_although_no_feature_shows_it(tmp_path):
    config = tiny_config("mlp_registers")
    backbone = random_backbone(config)
    huggingface_format.write(backbone, info_of(config), tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    del state["embeddings.mask_token"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PublishError, match=r"does not load .*mask_token") as refused:
        huggingface_format.read_back(tmp_path, random_images(config))
    assert "\n" not in str(refused.value)


def test_a_grey_model_says_what_the_processor_cannot(tmp_path):
    config = tiny_config("mlp_registers")
    assert "cannot make luminance" in huggingface_format.notes(info_of(config, grayscale=True))[0]


def test_the_same_backbone_gives_the_same_bytes(tmp_path):
    config = tiny_config("swiglu_registers")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        huggingface_format.write(random_backbone(config), info_of(config), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "dinov2_with_registers"
