"""The section `sweep` of a recipe: which settings its trials have, how they are compared, how many run at once."""

import json
from typing import Literal, Self

from pydantic import Field, model_validator

from heliostat.config import StrictModel

Value = bool | int | float | str | tuple[float, ...]
"""One value of a key of the pretrain section, as a recipe writes it."""


class RangeConfig(StrictModel):
    """Numbers between two ends, both included."""

    low: float
    """Least value."""
    high: float
    """Greatest value."""
    log: bool = False
    """Draw evenly in the logarithm: for learning rates and weights of losses."""
    integer: bool = False
    """Draw whole numbers."""

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if not self.low < self.high:
            raise ValueError(
                f"low {self.low:g} is not below high {self.high:g}; swap them, or set one value in sweep.overrides"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} has no logarithm; use a low above 0, or log=false")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"low {self.low:g} and high {self.high:g} must be whole numbers; round them, or integer=false")
        return self


class AblationStep(StrictModel):
    """One line of an ablation."""

    name: str = Field(min_length=1)
    """What the step adds, as the table shows it."""
    overrides: dict[str, Value] = Field(default_factory=dict)
    """Settings of the pretrain section that it changes; the steps after it keep them."""


class AshaConfig(StrictModel):
    """Asynchronous successive halving (arXiv 1810.05934): at growing numbers of steps only the best trials go on."""

    grace_steps: int = Field(ge=1)
    """Steps that every trial gets before it may be stopped."""
    reduction_factor: float = Field(default=3.0, gt=1)
    """One trial in so many goes on at each halving, and the steps to the next one grow by the same factor."""


Choices = tuple[Value, ...]


def _check_choices(key: str, values: RangeConfig | Choices) -> None:
    """Equal trials would count as repeats, and repeats are a key train.seed with several values."""
    if isinstance(values, RangeConfig):
        return
    if not values:
        raise ValueError(f"{key} has no values; give a list of some, or remove it")
    seen: set[tuple[bool, Value]] = set()
    for value in values:
        if (isinstance(value, bool), value) in seen:  # 1 and 1.0 are one value, 1 and true are two
            raise ValueError(
                f"{key} has the value {json.dumps(value)} twice; remove one, or repeat trials by train.seed: [0, 1]"
            )
        seen.add((isinstance(value, bool), value))


class SweepConfig(StrictModel):
    """Trials of the recipe's pretrain section: a `grid`, an `ablation`, both multiplied, or draws from a `space`."""

    grid: dict[str, Choices] = Field(default_factory=dict)
    """Key of the pretrain section -> values to try; every combination is one trial, of every step of an ablation too."""
    ablation: tuple[AblationStep, ...] = ()
    """Named steps, each with the settings of all steps before it; each is one trial."""
    space: dict[str, RangeConfig | Choices] = Field(default_factory=dict)
    """Key of the pretrain section -> {low, high, log, integer} or a list of values, to draw `num_trials` trials from."""
    search: Literal["random", "optuna"] = "random"
    """How trials are drawn from the space: independently, or by Optuna's TPE from the results of those before."""
    num_trials: int = Field(default=16, ge=1)
    """Trials that are drawn from the space."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws; the seed of training is the key train.seed."""
    overrides: dict[str, Value] = Field(default_factory=dict)
    """Settings of the pretrain section that all trials share, such as fewer steps, or scaling.num_workers=0: small trials in
    one process each, without a worker group that costs some ten seconds to start."""
    metric: str = "online/knn_accuracy"
    """What trials are compared by, at their last step: a metric of the evaluation while training (online/...) or one of the
    history (train/...). k-NN needs labelled images; online/rankme needs none."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of the metric is better."""
    asha: AshaConfig | None = None
    """Stop trials early that are worse than others at the same step; null runs all to their end."""
    max_concurrent_trials: int = Field(default=2, ge=1)
    """Trials that run at once where the cluster has room for so many. Optuna draws a trial from the results of all but the
    latest of this number, so that its draws do not depend on which of them ends first."""
    max_failed_trials: int = Field(default=0, ge=0)
    """Trials that may fail; one more, and no other is started and the sweep fails. Running it again takes up what is left."""

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.space and (self.grid or self.ablation):
            other = "grid" if self.grid else "ablation"
            raise ValueError(f"space and {other} are both given; move the keys of {other} into space as lists, or drop one")
        if not (self.space or self.grid or self.ablation):
            raise ValueError("nothing varies; give grid, ablation or space")
        for name in ("search", "num_trials", "seed"):
            value = getattr(self, name)
            if not self.space and value != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} is about draws from a space, and there is none; give space or remove {name}")
        for key, values in [*self.grid.items(), *self.space.items()]:
            _check_choices(key, values)
        names = [step.name for step in self.ablation]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"ablation: the name {twice[0]!r} is there twice; give each step a name of its own")
        both = sorted(set(self.overrides) & (set(self.grid) | set(self.space)))
        if both:
            raise ValueError(f"{both[0]} is swept and in overrides; keep one of them")
        if self.asha is not None and "train.steps" in self.varied_keys:
            raise ValueError("asha compares trials at equal steps, and train.steps varies; set it in overrides, or asha: null")
        return self

    @property
    def varied_keys(self) -> tuple[str, ...]:
        """Every key in which trials differ, in the order of the recipe."""
        keys = [key for step in self.ablation for key in step.overrides]
        return tuple(dict.fromkeys([*keys, *self.grid, *self.space]))
