import pytest

from heliostat.config import validate, walk_fields
from heliostat.errors import ConfigError
from heliostat.training.config import DinoConfig, IbotConfig, MethodConfig, OptimConfig


@pytest.mark.parametrize("model", [MethodConfig, OptimConfig])
def test_every_setting_has_a_description(model):
    assert [key for key, field in walk_fields(model) if not field.description] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ibot": {"mask_ratio_min_max": [0.5, 0.1]}},
            "ibot: mask_ratio_min_max .0.5, 0.1. must be two shares in rising order",
        ),
        ({"dino": {"loss_weight": 0}, "ibot": {"loss_weight": 0}}, "give at least one of them a weight"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0: input should be less than 1"),
        ({"centering": "sinkhorn"}, "centering='sinkhorn'"),
        ({"dino": {"koleo_weight": 0.1}}, "Did you mean dino.koleo_loss_weight?"),
    ],
)
def test_an_impossible_method_is_refused_with_a_readable_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(MethodConfig, settings, "recipe")


def test_patch_tokens_go_through_the_shared_head_unless_they_have_their_own():
    dino, ibot = DinoConfig(head_n_prototypes=100), IbotConfig(head_n_prototypes=50)
    assert MethodConfig(dino=dino, ibot=ibot).ibot_head.out_dim == 100
    assert MethodConfig(dino=dino, ibot=ibot.model_copy(update={"separate_head": True})).ibot_head.out_dim == 50
