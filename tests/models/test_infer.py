"""The config that made a backbone is read back from its tensors; a full-size model has the released names and counts."""

import pytest
import torch
from random_backbone import VARIANTS, tiny_config

from heliostat.errors import CheckpointError
from heliostat.models.config import ARCH_SIZES, BackboneConfig
from heliostat.models.infer import infer_config
from heliostat.models.vit import VisionTransformer

RELEASED = {"img_size": 518, "patch_size": 14}
NO_REGISTERS = {"num_register_tokens": 0, "interpolate_antialias": False, "interpolate_offset": 0.1}


def state_of(config: BackboneConfig):
    with torch.device("meta"):
        return VisionTransformer(config).state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"ffn_bias": False},
        {"in_chans": 1},
        {"patch_size": 4},
        {"mlp_ratio": 2.5},
        {"mlp_ratio": 2.0, "embed_dim": 192, "num_heads": 3},
    ],
)
def test_the_config_of_a_backbone_is_read_off_its_tensors(variant, changes):
    config = tiny_config(variant, **changes)
    found = infer_config(state_of(config), None, "state")
    unseen = {"mlp_ratio"} if config.ffn_layer == "swiglufused" else set()
    assert found.model_dump(exclude=unseen) == config.model_dump(exclude=unseen)
    assert found.mlp_hidden_dim == config.mlp_hidden_dim


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@pytest.mark.parametrize("width", [64, 192, 384, 832, 1536])
def test_every_hidden_width_is_reproduced_exactly(ffn_layer, width):
    state = state_of(BackboneConfig(embed_dim=width, num_heads=width // 64, depth=1))
    for hidden in range(8, 300, 8 if ffn_layer == "swiglufused" else 1):
        if ffn_layer == "mlp":
            widths = {"fc1": (hidden, width), "fc2": (width, hidden)}
        else:
            widths = {"w12": (2 * hidden, width), "w3": (width, hidden)}
        names = {f"blocks.0.mlp.{name}.weight": torch.empty(shape, device="meta") for name, shape in widths.items()}
        tensors = {key: tensor for key, tensor in state.items() if ".mlp." not in key} | names
        assert infer_config(tensors, None, "state").mlp_hidden_dim == hidden


@pytest.mark.parametrize(
    ("arch", "ffn_layer", "parameters", "tensors"),
    [
        ("vit_small", "mlp", 22_056_576, 175),
        ("vit_base", "mlp", 86_580_480, 175),
        ("vit_large", "mlp", 304_368_640, 343),
        ("vit_giant2", "swiglufused", 1_136_480_768, 567),
    ],
)
@pytest.mark.parametrize("registers", [0, 4])
def test_released_sizes_have_the_released_counts_and_are_recognised_by_name(arch, ffn_layer, parameters, tensors, registers):
    # Counts: reference of the released ViT/14 files.
    convention = {"num_register_tokens": 4} if registers else NO_REGISTERS
    config = BackboneConfig(arch=arch, ffn_layer=ffn_layer, **RELEASED, **convention)
    state = state_of(config)
    assert len(state) == tensors + bool(registers)
    assert sum(tensor.numel() for tensor in state.values()) == parameters + registers * ARCH_SIZES[arch].embed_dim
    assert infer_config(state, None, "state") == config


def test_heads_that_the_tensors_do_not_show_are_taken_from_a_config_or_refused():
    state = state_of(BackboneConfig(embed_dim=96, num_heads=2, depth=1))
    with pytest.raises(CheckpointError, match=r"^here does not say num_heads, and width 96 is not divisible by 64"):
        infer_config(state, None, "here")
    assert infer_config(state, 4, "here").num_heads == 4
    with pytest.raises(CheckpointError, match="width 96, which num_heads 5 of its config does not divide"):
        infer_config(state, 5, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("pos_embed"), "no DINOv2 backbone: pos_embed is missing"),
        (lambda state: state.update(pos_embed=torch.zeros(17, 128)), r"pos_embed has shape \(17, 128\), expected"),
        (lambda state: state.update(pos_embed=torch.zeros(1, 16, 128)), "15 positions; only square patches on a square grid"),
        (lambda state: state.update({"patch_embed.proj.weight": torch.zeros(128, 3, 8, 4)}), "patches of 8 x 4 pixels"),
        (lambda state: state.pop("blocks.0.mlp.fc1.weight"), r"blocks\.0\.mlp\.fc1\.weight is missing"),
        (lambda state: [state.pop(key) for key in list(state) if "blocks.0." in key], r"blocks \[1\] \.\.\.; they must count"),
        (lambda state: state.update({"blocks.7.x": torch.zeros(1)}), "must count from 0 without a gap"),
        (
            lambda state: state.update({f"blocks.0.mlp.{key}.weight": torch.zeros(128, 20) for key in ("w12", "w3")}),
            "hidden width 20, which no mlp_ratio gives at width 128",
        ),
    ],
)
def test_tensors_of_another_kind_of_network_are_refused(change, message):
    state = state_of(tiny_config("mlp"))
    change(state)
    with pytest.raises(CheckpointError, match=message):
        infer_config(state, None, "state")
