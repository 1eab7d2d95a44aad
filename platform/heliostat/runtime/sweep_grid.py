"""The trials of a sweep as configurations: needed to run them and to say what they cost."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.config import apply_overrides, validate
from heliostat.runtime.config import SweepConfig
from heliostat.training.recipe import PretrainConfig


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last key fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def trial_config(base: PretrainConfig, overrides: Mapping[str, Any]) -> PretrainConfig:
    """The pretrain section with dotted keys replaced, run in one process and its threads.

    Raises ConfigError for an unknown key.
    """
    here = {"scaling.num_workers": 0, "loader.via": "threads"}
    words = [f"{key}={json.dumps(value)}" for key, value in {**overrides, **here}.items()]
    return validate(PretrainConfig, apply_overrides(base.model_dump(mode="json"), words), "sweep")


def trial_configs(base: PretrainConfig, sweep: SweepConfig) -> list[PretrainConfig]:
    """The configuration of every trial, in the order of `grid_points`. Raises ConfigError for one that cannot run."""
    return [trial_config(base, {**sweep.overrides, **point}) for point in grid_points(sweep.grid)]
