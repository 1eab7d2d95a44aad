import json
from pathlib import Path

import numpy as np
import pytest
import torch

from heliostat.errors import DataError
from heliostat.models.config import BackboneConfig
from heliostat.models.vit import VisionTransformer, resize_pos_embed
from heliostat.models.weights import load_state, submodule_state

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = ("native", "larger", "rect")


@pytest.fixture(params=["vit_mlp", "vit_swiglu_registers"])
def reference(request):
    with np.load(GOLDEN / f"{request.param}.npz") as arrays:
        meta = json.loads(str(arrays["meta"]))
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
    meta["ffn_layer"] = meta.pop("ffn")
    backbone = VisionTransformer(BackboneConfig(arch="vit_small", **meta)).eval()
    load_state(backbone, submodule_state(tensors, "state"), "golden backbone")
    return backbone, tensors


def scaled(backbone):
    """Give the residual branches weight: at LayerScale's 1e-5 every forward pass looks like the patch projection."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "gamma" in name or "token" in name:
                parameter.normal_(std=0.5)
    return backbone


def tiny(**settings):
    return scaled(VisionTransformer(BackboneConfig(**({"arch": "vit_tiny", "depth": 2, "img_size": 56} | settings))))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_features_equal_the_reference_with_and_without_masks(reference, size):
    backbone, golden = reference
    images = golden[f"{size}.input"].float()
    for prefix, masks in ((size, None), (f"{size}.masked", golden[f"{size}.mask"])):
        features = backbone(images, masks)
        for name, ours in (
            ("x_norm_clstoken", features.cls_BD),
            ("x_norm_regtokens", features.registers_BRD),
            ("x_norm_patchtokens", features.patches_BND),
            ("x_prenorm", features.prenorm_BTD),
        ):
            torch.testing.assert_close(ours, golden[f"{prefix}.{name}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_intermediate_layers_equal_the_reference(reference, size):
    backbone, golden = reference
    layers = backbone.get_intermediate_layers(golden[f"{size}.input"].float(), 2, reshape=True, return_class_token=True)
    for index, (patches, cls) in enumerate(layers):
        torch.testing.assert_close(patches, golden[f"{size}.intermediate{index}.patches"], atol=1e-5, rtol=0)
        torch.testing.assert_close(cls, golden[f"{size}.intermediate{index}.cls"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_intermediate_layers_can_be_chosen_by_index_and_left_unnormed():
    backbone, images = tiny(depth=3).eval(), torch.randn(2, 3, 56, 56)
    (first, last) = backbone.get_intermediate_layers(images, [2, 0], norm=False)
    features = backbone(images)
    torch.testing.assert_close(last, features.prenorm_BTD[:, 5:])
    assert first.shape == (2, 16, 192)
    assert not torch.allclose(first, last)
    (normed,) = backbone.get_intermediate_layers(images)
    torch.testing.assert_close(normed, features.patches_BND)


def test_asking_for_a_block_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match="blocks 0 to 1"):
        tiny().get_intermediate_layers(torch.zeros(1, 3, 56, 56), 3)


@pytest.mark.parametrize("registers", [0, 4])
def test_packed_forward_equals_one_forward_per_group(registers):
    backbone = tiny(num_register_tokens=registers).eval()
    crops = [torch.randn(3, 3, 56, 56), torch.randn(5, 3, 28, 28), torch.randn(2, 3, 42, 70)]
    masks = [torch.rand(3, 16) < 0.4, None, torch.rand(2, 15) < 0.4]
    packed = backbone.forward_packed(crops, masks)
    for features, crop, mask in zip(packed, crops, masks, strict=True):
        alone = backbone(crop, mask)
        for name in ("cls_BD", "registers_BRD", "patches_BND", "prenorm_BTD"):
            torch.testing.assert_close(getattr(features, name), getattr(alone, name), atol=1e-5, rtol=0)


def test_gradients_of_a_packed_forward_equal_those_of_separate_forwards():
    backbone = tiny()
    crops, masks = [torch.randn(2, 3, 56, 56), torch.randn(3, 3, 28, 28)], [torch.rand(2, 16) < 0.4, None]
    sum(f.cls_BD.square().mean() for f in backbone.forward_packed(crops, masks)).backward()
    packed = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    backbone.zero_grad(set_to_none=True)
    sum(backbone(c, m).cls_BD.square().mean() for c, m in zip(crops, masks, strict=True)).backward()
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_images_of_a_packed_forward_do_not_see_each_other():
    backbone = tiny().eval()
    crops = [torch.randn(2, 3, 56, 56), torch.randn(2, 3, 28, 28)]
    before = backbone.forward_packed(crops, [None, None])
    crops[1][1] += 1
    crops[0][0] += 1
    after = backbone.forward_packed(crops, [None, None])
    assert torch.equal(before[0].prenorm_BTD[1], after[0].prenorm_BTD[1])
    assert torch.equal(before[1].prenorm_BTD[0], after[1].prenorm_BTD[0])


def test_a_masked_patch_has_no_influence_on_the_features():
    backbone, images = tiny().eval(), torch.randn(1, 3, 56, 56)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 5] = True
    changed = images.clone()
    changed[:, :, 14:28, 14:28] += 1  # patch 5 of a 4 x 4 grid
    torch.testing.assert_close(backbone(images, masks).prenorm_BTD, backbone(changed, masks).prenorm_BTD)
    assert not torch.allclose(backbone(images).prenorm_BTD, backbone(changed).prenorm_BTD)


def test_images_that_cannot_be_cut_into_patches_are_refused():
    with pytest.raises(DataError, match="57 x 56 pixels cannot be cut into patches of 14"):
        tiny()(torch.zeros(1, 3, 57, 56))


def test_masks_of_another_grid_are_refused():
    with pytest.raises(DataError, match=r"\(2, 15\) do not fit \(2, 16\) patches"):
        tiny()(torch.zeros(2, 3, 56, 56), torch.zeros(2, 15, dtype=torch.bool))


def test_position_embedding_of_the_native_grid_is_not_touched():
    embedding = torch.randn(1, 17, 8)
    assert resize_pos_embed(embedding, (4, 4), antialias=True, offset=0.0) is embedding


def test_a_constant_position_embedding_stays_constant_at_every_size():
    embedding = torch.full((1, 17, 8), 0.3)
    for antialias, offset in ((True, 0.0), (False, 0.1)):
        resized = resize_pos_embed(embedding, (3, 7), antialias=antialias, offset=offset)
        torch.testing.assert_close(resized, torch.full((1, 22, 8), 0.3))


def test_initialisation_follows_dinov2():
    torch.manual_seed(0)
    backbone = VisionTransformer(BackboneConfig(arch="vit_small", depth=1))
    assert backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert backbone.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert backbone.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)
    assert backbone.register_tokens.std().item() == pytest.approx(1e-6, rel=0.2)
    assert torch.equal(backbone.mask_token, torch.zeros(1, 384))
    assert torch.equal(backbone.blocks[0].ls1.gamma, torch.full((384,), 1e-5))
    assert not backbone.blocks[0].mlp.fc1.bias.any()


def test_channels_other_than_three_are_possible():
    assert tiny(in_chans=1)(torch.zeros(2, 1, 28, 28)).cls_BD.shape == (2, 192)


def test_bfloat16_autocast_keeps_the_residual_stream_in_float32():
    backbone = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone(torch.randn(2, 3, 56, 56))
    assert features.prenorm_BTD.dtype == torch.float32
