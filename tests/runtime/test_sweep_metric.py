"""A metric that trials will not have is refused before any of them starts."""

import json

import pytest
from tiny_training import SETTINGS

from heliostat.config import apply_overrides, validate
from heliostat.errors import ConfigError
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.sweep_metric import check_metric
from heliostat.runtime.sweep_points import trial_config


def check(*overrides: str) -> None:
    plain = {"name": "tiny", "pretrain": {**SETTINGS, "data": "raw/tiny@1"}, "sweep": {"grid": {"train.seed": [0, 1]}}}
    recipe = validate(Recipe, apply_overrides(json.loads(json.dumps(plain)), overrides), "tiny")
    check_metric(recipe, recipe.sweep, trial_config(recipe.pretrain, recipe.sweep, {}))


@pytest.mark.parametrize(
    "overrides",
    [
        ["pretrain.online.labelled=raw/x@1"],
        ["ingest={pool: ./a, labelled: ./b}"],
        ["sweep.metric=online/rankme"],
        ["sweep.metric=train/kl_to_teacher", "sweep.mode=min", "sweep.asha={grace_steps: 2}"],
        ["sweep.metric=online/rankme", "sweep.asha={grace_steps: 4}"],
    ],
)
def test_metrics_that_trials_will_have_pass(overrides: list[str]) -> None:
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"online/knn_accuracy needs labelled images.*or compare without: sweep\.metric=online/rankme"),
        (["sweep.metric=online/knn_acc"], r"Did you mean online/knn_accuracy\?"),
        (["sweep.metric=evaluate/anything"], "trials are not compared by that"),
        (["sweep.metric=train/images_per_second"], "trials are not compared by that"),
        (["sweep.metric=online/rankme", "pretrain.online.enabled=false"], r"online\.enabled is false; set it to true"),
        (
            ["sweep.metric=online/rankme", "sweep.asha={grace_steps: 8}"],
            r"comes every 2 steps and grace_steps is 8, of 8; lower",
        ),
        (
            ["sweep.metric=online/rankme", "sweep.asha={grace_steps: 2}", "sweep.overrides={online.every_steps: 8}"],
            r"sweep\.asha can stop nothing: online/rankme comes every 8 steps",
        ),
        (["sweep.metric=train/loss"], r"train/loss is better when it is lower, and sweep.mode is max; set sweep.mode=min"),
        (
            ["sweep.metric=train/loss", "sweep.mode=min", "sweep.asha={grace_steps: 2}", "pretrain.train.log_every_steps=9"],
            r"lower train\.log_every_steps",
        ),
    ],
)
def test_metrics_that_they_will_not_have_are_refused_with_the_way_out(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(*overrides)
