"""Names are translated both ways; the other side is what transformers and timm call their parameters."""

import pytest
import torch
from random_backbone import VARIANTS, difference, random_backbone, random_images, tiny_config

from heliostat.errors import CheckpointError
from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.heads import ProjectionHead
from heliostat.models.names import (
    detect_layout,
    from_fair_names,
    from_huggingface_names,
    from_timm_names,
    to_fair_names,
    to_huggingface_names,
    to_our_names,
    to_timm_names,
    with_mask_token,
)
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import load_state


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def loaded(config: BackboneConfig, state) -> VisionTransformer:
    backbone = VisionTransformer(config).eval().requires_grad_(False)
    load_state(backbone, state, "translated")
    return backbone


@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_to_hugging_face_and_back_is_exact(variant):
    state = random_backbone(tiny_config(variant)).state_dict()
    theirs = to_huggingface_names(state)
    assert not [key for key in theirs if key in state]
    assert detect_layout(theirs, "state") == "huggingface"
    assert equal(from_huggingface_names(theirs), state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_to_timm_and_back_is_exact_in_function_and_without_registers_in_every_bit(variant):
    config = tiny_config(variant)
    backbone = random_backbone(config)
    theirs = to_timm_names(backbone.state_dict())
    assert "mask_token" not in theirs
    assert detect_layout(theirs, "state") == "timm"
    again, notes = with_mask_token(from_timm_names(theirs))
    assert notes == ("the file has no mask_token; it is zero, as DINOv2 initialises it",)
    assert torch.equal(again["mask_token"], torch.zeros(1, config.embed_dim))
    if not config.num_register_tokens:
        assert equal(again, backbone.state_dict() | {"mask_token": again["mask_token"]})
    assert difference(backbone, loaded(config, again), random_images(config)) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_names_of_a_backbone_are_those_of_the_released_files(variant):
    state = random_backbone(tiny_config(variant)).state_dict()
    assert list(to_fair_names(state)) == list(state)
    assert detect_layout(state, "state") == "fair"
    assert equal(to_our_names(to_fair_names(state), "fair"), state)


def test_names_that_transformers_uses_in_memory_are_read_as_well():
    state = random_backbone(tiny_config("swiglu_registers")).state_dict()
    memory = {}
    for key, tensor in to_huggingface_names(state).items():
        name = key.replace("attention.output.dense", "attention.o_proj").replace("weights_out", "down_proj")
        for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            name = name.replace(f"attention.attention.{part}", f"attention.{letter}_proj")
        if "weights_in" in name:
            gate, up = tensor.chunk(2)
            memory |= {name.replace("weights_in", "gate_proj"): gate, name.replace("weights_in", "up_proj"): up}
        else:
            memory[name] = tensor
    assert equal(from_huggingface_names(memory), state)


def test_parts_that_cannot_become_one_tensor_are_left_for_the_loader_to_name():
    theirs = to_huggingface_names(random_backbone(tiny_config("mlp")).state_dict())
    del theirs["encoder.layer.1.attention.attention.key.weight"]
    ours = from_huggingface_names(theirs)
    assert "blocks.0.attn.qkv.weight" in ours
    assert {"blocks.1.attn.query.weight", "blocks.1.attn.value.weight", "blocks.1.attn.qkv.bias"} <= ours.keys()
    assert "blocks.1.attn.qkv.weight" not in ours


def test_fair_names_of_heads_and_chunked_blocks_are_translated():
    head = ProjectionHead(16, HeadConfig(out_dim=12, hidden_dim=10, bottleneck_dim=6))
    fair = to_fair_names(head.state_dict())
    assert {"last_layer.weight_g", "last_layer.weight_v"} <= fair.keys()
    load_state(head, from_fair_names(fair), "head")
    assert list(from_fair_names({"backbone.blocks.1.6.norm1.weight": torch.zeros(1)})) == ["backbone.blocks.6.norm1.weight"]
    assert list(from_fair_names({"blocks.6.norm1.weight": torch.zeros(1)})) == ["blocks.6.norm1.weight"]


def test_a_state_that_mixes_two_layouts_is_refused():
    with pytest.raises(CheckpointError, match="mixes two layouts"):
        from_fair_names({"blocks.0.1.norm1.weight": torch.zeros(1), "blocks.1.norm1.weight": torch.zeros(1)})


def test_an_unknown_layout_is_refused_with_its_first_keys_and_the_known_ones():
    with pytest.raises(CheckpointError, match=r"^net\.pth: keys conv1\.weight, fc\.weight are of no layout known here; known"):
        detect_layout(["fc.weight", "conv1.weight"], "net.pth")
    with pytest.raises(CheckpointError, match=r"keys a, b, c, d, \.\.\. are"):
        detect_layout("fedcba", "letters")


def test_a_head_of_one_layer_has_the_names_of_the_reference():
    from heliostat.models.config import HeadConfig
    from heliostat.models.heads import ProjectionHead

    one, three = (ProjectionHead(8, HeadConfig(out_dim=6, hidden_dim=5, bottleneck_dim=4, nlayers=n)) for n in (1, 3))
    ours = {f"student.dino_head.{key}": value for key, value in one.state_dict().items()}
    ours |= {f"student.ibot_head.{key}": value for key, value in three.state_dict().items()}
    fair = to_fair_names(ours)
    assert {"student.dino_head.mlp.weight", "student.dino_head.mlp.bias", "student.ibot_head.mlp.0.weight"} <= fair.keys()
    again = from_fair_names(fair)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[key], value) for key, value in ours.items())
