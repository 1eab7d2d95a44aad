"""The cost formulas against the networks themselves."""

import pytest

from heliostat.models.heads import ProjectionHead
from heliostat.models.vit import VisionTransformer
from heliostat.runtime.dry_run import training_costs
from heliostat.runtime.recipe import read_recipe


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_the_printed_parameters_steps_and_memory_are_those_of_the_networks(stage: str) -> None:
    recipe = read_recipe("laptop", ("pretrain.student.embed_dim=256", "distill.student.embed_dim=192"))
    config = getattr(recipe, stage)
    backbone = count(VisionTransformer(config.student))
    head = count(ProjectionHead(config.student.embed_dim, config.method.dino.head))
    lines = training_costs(config, recipe.pretrain.student if stage == "distill" else None)
    assert lines[0] == f"{backbone / 1e6:.1f} M parameters in the backbone, {head / 1e6:.1f} M in the heads"
    steps, batch = config.train.steps, config.train.global_batch_size
    assert lines[1] == f"{steps:,} steps of {batch} images: {steps * batch:,} images seen"
    assert lines[4].startswith(f"{(backbone + head) * 20 / 2**30:.2f} GiB per worker")


def test_a_distillation_costs_more_with_a_larger_teacher() -> None:
    recipe = read_recipe("laptop")
    small, large = (
        training_costs(recipe.distill, recipe.pretrain.student.model_copy(update={"depth": depth})) for depth in (2, 20)
    )
    assert float(small[2].split()[0]) < float(large[2].split()[0])
