"""Weights that a run begins with: a teacher whose heads differ is refused with the key that would fit."""

import pytest
from tiny_training import settings

from heliostat.errors import CheckpointError
from heliostat.models.stored import ModelInfo
from heliostat.training.recipe import PretrainConfig
from heliostat.training.start import check_heads
from heliostat.training.teacher_files import model_info


def info_of(config: PretrainConfig) -> ModelInfo:
    return model_info(config, config.student, steps=1)


def test_heads_that_agree_pass() -> None:
    for override in ("method.ibot.separate_head=false", "method.ibot.separate_head=true", "method.ibot.loss_weight=0"):
        config = settings(override)
        check_heads("model/x@1", info_of(config), config.method)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.dino.head_n_prototypes=77",
            "head_n_prototypes is .*, model/x@1 has 77; set distill.method.dino.head_n_prototypes=77",
        ),
        ("method.dino.head_hidden_dim=13", "distill.method.dino.head_hidden_dim is .*, model/x@1 has 13; set"),
        ("method.ibot.separate_head=true", "separate_head is false, and model/x@1 has one; set .*separate_head=true"),
    ],
)
def test_a_difference_is_named_with_the_key_that_fits(override: str, message: str) -> None:
    ours = settings("method.ibot.separate_head=false")
    with pytest.raises(CheckpointError, match=message):
        check_heads("model/x@1", info_of(settings("method.ibot.separate_head=false", override)), ours.method)


def test_a_separate_head_of_another_size_is_named() -> None:
    ours, theirs = (settings("method.ibot.separate_head=true", f"method.ibot.head_bottleneck_dim={size}") for size in (8, 16))
    with pytest.raises(CheckpointError, match=r"distill.method.ibot.head_bottleneck_dim is 8, model/x@1 has 16; set"):
        check_heads("model/x@1", info_of(theirs), ours.method)
    with pytest.raises(CheckpointError, match=r"separate_head is true, and model/x@1 has none; set .*separate_head=false"):
        check_heads("model/x@1", info_of(settings("method.ibot.separate_head=false")), ours.method)
