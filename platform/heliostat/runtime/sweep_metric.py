"""What trials are compared by: whether they will have it, said before any of them starts."""

import difflib

from heliostat.errors import ConfigError
from heliostat.metrics import METRICS
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.training.recipe import PretrainConfig

_OF_LABELS = ("online/knn_accuracy", "online/linear_accuracy")
_OF_IMAGES = ("online/rankme", "online/feature_std")
_OF_ONE_MOMENT = ("train/images_per_second", "train/data_wait_ratio", "train/bytes_per_second", "train/storage_retries",
                  "train/decode_failures", "train/step")  # fmt: skip
"""Of the machine rather than the model: reported, and in no history."""


def is_online(sweep: SweepConfig) -> bool:
    """Whether trials are compared by what the evaluation while training finds."""
    return sweep.metric.startswith("online/")


def labelled_ref(recipe: Recipe, config: PretrainConfig) -> str:
    """The labelled images of the evaluation while training as raw/name@version; empty where there are none."""
    if config.online.labelled:
        return config.online.labelled
    return str(recipe.ref("raw", "-labelled")) if recipe.ingest is not None and recipe.ingest.labelled else ""


def compared_every(sweep: SweepConfig, config: PretrainConfig) -> int:
    """Steps between values of the metric while a trial runs."""
    if is_online(sweep):
        return config.online.every_steps or config.train.checkpoint_every_steps
    return config.train.log_every_steps


def check_metric(recipe: Recipe, sweep: SweepConfig, config: PretrainConfig) -> None:
    """Refuse a metric that trials will not have. config: what they share. Raises ConfigError."""
    metric = sweep.metric
    of_history = [name for name in METRICS if name.startswith("train/") and name not in _OF_ONE_MOMENT]
    usable = [*_OF_LABELS, *_OF_IMAGES, *of_history]
    if metric not in usable:
        near = difflib.get_close_matches(metric, usable, n=1)
        hint = f"Did you mean {near[0]}?" if near else "docs/reference/metrics.md lists those of online/ and train/"
        raise ConfigError(f"sweep.metric={metric}: trials are not compared by that. {hint}")
    if "loss" in metric and sweep.mode != "min":
        raise ConfigError(f"sweep.metric={metric} is better when it is lower, and sweep.mode is max; set sweep.mode=min")
    if is_online(sweep) and not config.online.enabled:
        raise ConfigError(
            f"sweep.metric={metric} comes from the evaluation while training, and online.enabled is false; set it to true"
        )
    if metric in _OF_LABELS and not labelled_ref(recipe, config):
        raise ConfigError(
            f"sweep.metric={metric} needs labelled images, and the recipe has none; give "
            "pretrain.online.labelled=raw/NAME@VERSION or ingest.labelled, or compare without: sweep.metric=online/rankme"
        )
    if sweep.asha is not None:
        every, steps = compared_every(sweep, config), config.train.steps
        if every >= steps or sweep.asha.grace_steps >= steps:
            key = "online.every_steps (or train.checkpoint_every_steps)" if is_online(sweep) else "train.log_every_steps"
            raise ConfigError(
                f"sweep.asha can stop nothing: {metric} comes every {every} steps and grace_steps is "
                f"{sweep.asha.grace_steps}, of {steps}; lower {key} and grace_steps below {steps}, or set sweep.asha to null"
            )
