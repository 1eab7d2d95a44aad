import subprocess
import sys

import pytest

from heliostat.config import validate
from heliostat.errors import ConfigError
from heliostat.models.config import ARCH_SIZES, BackboneConfig, HeadConfig


@pytest.mark.parametrize("arch", sorted(ARCH_SIZES))
def test_a_named_architecture_fills_its_sizes(arch):
    config = BackboneConfig(arch=arch)
    assert (config.embed_dim, config.depth, config.num_heads) == ARCH_SIZES[arch]


def test_explicit_sizes_override_the_architecture():
    config = BackboneConfig(arch="vit_small", embed_dim=48, depth=2)
    assert (config.embed_dim, config.depth, config.num_heads) == (48, 2, 6)


def test_a_resolved_config_survives_a_round_trip():
    config = BackboneConfig(arch="vit_tiny", depth=3, ffn_layer="swiglufused")
    assert BackboneConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 100, "num_heads": 3}, "embed_dim 100 is not divisible by num_heads 3; use embed_dim 102"),
        ({"img_size": 225}, "img_size 225 is not divisible by patch_size 14; use 224 or 238"),
        ({"img_size": 8}, "img_size 8 is not divisible by patch_size 14; use 14"),
        ({"arch": "vit_huge"}, "arch='vit_huge'"),
        ({"depht": 3}, "unknown key: depht. Did you mean depth?"),
        ({"layerscale": 0.0}, "layerscale=0.0: input should be greater than 0"),
    ],
)
def test_an_impossible_backbone_is_refused_with_a_readable_line(settings, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        validate(BackboneConfig, settings, "recipe")


@pytest.mark.parametrize(
    ("arch", "ffn_layer", "hidden"),
    [
        ("vit_large", "mlp", 4096),
        ("vit_large", "swiglufused", 2736),
        ("vit_giant2", "swiglufused", 4096),
    ],
)
def test_feed_forward_width_is_rounded_as_in_dinov2(arch, ffn_layer, hidden):
    assert BackboneConfig(arch=arch, ffn_layer=ffn_layer).mlp_hidden_dim == hidden


def test_every_field_has_a_description():
    for model in (BackboneConfig, HeadConfig):
        assert all(field.description for field in model.model_fields.values())


def test_configurations_do_not_import_torch():
    code = "import sys, heliostat.models.config, heliostat.models.flops, heliostat.training.config, "
    code += "heliostat.training.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
