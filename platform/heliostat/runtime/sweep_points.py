"""The trials of a sweep as configurations: needed to run them and to say what they cost. Imports neither torch nor Ray."""

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heliostat.config import apply_overrides, validate
from heliostat.errors import ConfigError
from heliostat.runtime.sweep_config import RangeConfig, SweepConfig
from heliostat.training.recipe import PretrainConfig

SEED = "train.seed"
_MOST_COMBINATIONS = 10_000
_NEVER_VARY = ("data", "init.weights", "phases", "online", "scaling", "loader")
"""Inputs of the sweep, what trials do not run, and what changes no result."""


@dataclass(frozen=True)
class Point:
    """The settings of one trial: what it changes in the section, and the ablation's step that it belongs to."""

    index: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    step: str = ""

    @property
    def name(self) -> str:
        """`000`, `001`, ... in the order of the sweep."""
        return f"{self.index:03d}"

    @property
    def settings(self) -> dict[str, Any]:
        """What it changes, apart from the seed of training: trials that agree in this are repeats of each other."""
        return {key: value for key, value in self.overrides.items() if key != SEED}

    def shown(self) -> str:
        """The trial in words."""
        words = [self.step] if self.step else []
        hidden = set(self.settings) if self.step else set()
        return ", ".join(words + [f"{key}={short(value)}" for key, value in self.overrides.items() if key not in hidden])


def short(value: Any) -> str:
    """A value as tables show it: numbers with four digits."""
    if isinstance(value, bool) or not isinstance(value, float):
        return (
            str(value).lower()
            if isinstance(value, bool)
            else json.dumps(value)
            if isinstance(value, list | tuple)
            else str(value)
        )
    return f"{value:.4g}"


def num_points(sweep: SweepConfig) -> int:
    """How many trials the sweep has."""
    if sweep.space:
        return sweep.num_trials
    return max(1, len(sweep.ablation)) * math.prod(len(values) for values in sweep.grid.values())


def fixed_points(sweep: SweepConfig) -> list[Point]:
    """The points that do not depend on results: grid, ablation, random draws; for Optuna independent draws as stand-ins.

    The last key of a grid goes fastest. A random point is a function of seed and number alone. Raises ConfigError when the
    space has too few different points.
    """
    if sweep.space:
        return _random_points(sweep)
    count = num_points(sweep)
    if count > _MOST_COMBINATIONS:
        raise ConfigError(f"sweep.grid has {count:,} combinations, more than {_MOST_COMBINATIONS:,}; use sweep.space instead")
    combinations = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    steps: list[tuple[str, dict[str, Any]]] = [("", {})] if not sweep.ablation else []
    for step in sweep.ablation:
        steps.append((step.name, {**(steps[-1][1] if steps else {}), **step.overrides}))
    chosen = [(name, {**overrides, **one}) for name, overrides in steps for one in combinations]
    return [Point(index, overrides, name) for index, (name, overrides) in enumerate(chosen)]


def _random_points(sweep: SweepConfig) -> list[Point]:
    points: list[Point] = []
    seen: set[str] = set()
    for index in range(sweep.num_trials):
        for attempt in range(1000):
            drawn = {key: _draw(entry, f"{sweep.seed}/{index}/{attempt}/{key}") for key, entry in sweep.space.items()}
            if sweep.search == "optuna" or json.dumps(drawn) not in seen:
                break
        else:
            raise ConfigError(
                f"sweep.num_trials {sweep.num_trials}: draws find no more than {len(seen)} different points; "
                f"use num_trials={len(seen)}, or a grid"
            )
        seen.add(json.dumps(drawn))
        points.append(Point(index, drawn))
    return points


def _draw(entry: RangeConfig | Sequence[Any], seed: str) -> Any:
    """One value of a key, by the digest of a text: Python seeds strings with SHA-512, the same everywhere."""
    source = random.Random(seed)
    if not isinstance(entry, RangeConfig):
        return entry[source.randrange(len(entry))]
    if entry.integer and not entry.log:
        return source.randint(int(entry.low), int(entry.high))
    if entry.log:
        value = math.exp(source.uniform(math.log(entry.low), math.log(entry.high)))
    else:
        value = source.uniform(entry.low, entry.high)
    value = min(max(value, entry.low), entry.high)
    return round(value) if entry.integer else value


def trial_config(base: PretrainConfig, sweep: SweepConfig, overrides: Mapping[str, Any]) -> PretrainConfig:
    """The pretrain section of one trial, without phases: those of the sweep's overrides and its own are replaced.

    Raises ConfigError for an unknown key or a combination that cannot run.
    """
    plain = base.model_dump(mode="json") | {"phases": []}
    words = [f"{key}={json.dumps(value)}" for key, value in {**sweep.overrides, **overrides}.items()]
    try:
        return validate(PretrainConfig, apply_overrides(plain, words), "sweep")
    except ConfigError as error:
        for key, entry in sweep.space.items():
            if isinstance(entry, RangeConfig) and f"{key}=" in str(error) and "valid integer" in str(error):
                raise ConfigError(f"sweep: {key} takes whole numbers; write integer: true in sweep.space.{key}") from error
        raise


def check_keys(sweep: SweepConfig) -> None:
    """Refuse keys that no sweep can vary. Raises ConfigError."""
    for key in sweep.varied_keys:
        room = next((name for name in _NEVER_VARY if key == name or key.startswith(f"{name}.")), "")
        if room:
            why = (
                "it changes no result; set it in sweep.overrides"
                if room in ("scaling", "loader", "online")
                else "set it in pretrain"
            )
            raise ConfigError(f"sweep: {key} cannot vary between trials: {why}")
    for key in sweep.overrides:
        if key.partition(".")[0] in ("data", "phases") or key == "init.weights":
            raise ConfigError(f"sweep.overrides: {key} is that of the pretrain section; set it there")


def trial_configs(base: PretrainConfig, sweep: SweepConfig) -> list[PretrainConfig]:
    """The configuration of every trial of `fixed_points`, in order. Raises ConfigError for one that cannot run."""
    check_keys(sweep)
    return [trial_config(base, sweep, point.overrides) for point in fixed_points(sweep)]
