"""Parameters, operations and images of a run against the networks and the formulas of one step."""

import pytest
from tiny_training import SETTINGS

from heliostat.config import apply_overrides, validate
from heliostat.models.config import BackboneConfig
from heliostat.models.flops import teacher_flops_per_image, training_flops_per_image
from heliostat.training.costs import flops_per_image, masked_ratio, num_images, num_parameters
from heliostat.training.method import build_network
from heliostat.training.recipe import DistillConfig, PretrainConfig

TEACHER = BackboneConfig(arch="vit_tiny", embed_dim=64, depth=4, num_heads=2, img_size=32, patch_size=8)


def pretrain(*overrides):
    return validate(PretrainConfig, apply_overrides(SETTINGS, overrides), "tiny")


def distill(**students):
    plain = {key: value for key, value in SETTINGS.items() if key != "student"}
    return validate(
        DistillConfig, plain | {"students": {name: SETTINGS["student"] | one for name, one in students.items()}}, "t"
    )


@pytest.mark.parametrize("overrides", [[], ["method.ibot.separate_head=false"], ["method.ibot.loss_weight=0"]])
def test_parameters_are_those_of_the_network(overrides):
    config = pretrain(*overrides)
    network = build_network(config.student, config.method)
    body = sum(parameter.numel() for parameter in network.backbone.parameters())
    total = sum(parameter.numel() for parameter in network.parameters())
    assert num_parameters(config.student, config.method) == (body, total - body)


def test_the_masked_share_is_that_of_the_masks_in_pretraining_and_all_in_distillation():
    assert masked_ratio(pretrain(), distills=False) == pytest.approx(0.5 * 0.3)
    assert masked_ratio(pretrain(), distills=True) == 1
    assert masked_ratio(pretrain("method.ibot.loss_weight=0"), distills=True) == 0


def test_operations_of_pretraining_are_those_of_one_step_without_what_stochastic_depth_leaves_out():
    config = pretrain()
    heads = config.method.dino.head, config.method.ibot.head
    sizes = {"global_size_pixels": 32, "local_size_pixels": 16, "num_local_crops": 2, "masked_ratio": 0.15}
    assert flops_per_image(config) == pytest.approx(
        training_flops_per_image(config.student, *heads, drop_path_rate=0.3, **sizes)
    )
    assert num_images(config) == 8 * 8


def test_students_share_one_teacher_forward():
    one, two, both = distill(a={}), distill(b={"depth": 1}), distill(a={}, b={"depth": 1})
    heads = both.method.dino.head, both.method.ibot.head
    teaching = teacher_flops_per_image(TEACHER, *heads, global_size_pixels=32, masked_ratio=1.0)
    apart = flops_per_image(one, TEACHER) + flops_per_image(two, TEACHER)
    assert flops_per_image(both, TEACHER) == pytest.approx(apart - teaching)
