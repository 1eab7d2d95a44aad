"""EDGE Optuna: the only file that imports it. One point of a sweep from the results of the points before."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.runtime.sweep_config import RangeConfig, SweepConfig
from heliostat.runtime.sweep_points import Point
from heliostat.runtime.sweep_trials import Trial

_MOST_STARTUP_TRIALS = 10  # Optuna's own default; a quarter of a shorter sweep, so that results steer most of it


def needed_results(sweep: SweepConfig, index: int) -> range:
    """Numbers of the trials that must have ended before point `index` can be drawn.

    All but the latest `max_concurrent_trials - 1` before it: so many may still run, and that they are left out even when they
    have ended makes the draw independent of their speed.
    """
    return range(max(0, index - sweep.max_concurrent_trials + 1))


def optuna_point(sweep: SweepConfig, index: int, points: Sequence[Point], results: Mapping[int, Trial]) -> Point:
    """Point `index` by TPE, a function of the sweep's settings, the points before and `results` alone.

    points: those of numbers 0 to index - 1. results: at least those of `needed_results`; others are passed over.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = needed_results(sweep, index)
    distributions = {key: _distribution(optuna, entry) for key, entry in sweep.space.items()}
    sampler = optuna.samplers.TPESampler(
        seed=sweep.seed * 1_000_003 + index,
        n_startup_trials=min(_MOST_STARTUP_TRIALS, max(1, sweep.num_trials // 4)),
        multivariate=True,  # the best learning rate depends on the weight decay: draw settings together
    )
    study = optuna.create_study(sampler=sampler, direction="maximize" if sweep.mode == "max" else "minimize")
    for point in points[:index]:
        told = _told(optuna, results[point.index]) if point.index in known else {"state": optuna.trial.TrialState.RUNNING}
        parameters = {key: _to_optuna(sweep.space[key], value) for key, value in point.overrides.items()}
        study.add_trial(optuna.trial.create_trial(params=parameters, distributions=distributions, **told))
    drawn = study.ask(distributions).params
    return Point(index, {key: _from_optuna(sweep.space[key], drawn[key]) for key in sweep.space})


def _told(optuna: Any, trial: Trial) -> dict[str, Any]:
    """How a trial ended, in Optuna's words. A stopped one counts by its last value at its last step."""
    state = optuna.trial.TrialState
    if trial.status == "failed" or trial.value is None or not math.isfinite(trial.value):
        return {"state": state.FAIL}
    if trial.status == "stopped":
        return {"state": state.PRUNED, "intermediate_values": dict(trial.curve), "value": trial.value}
    return {"state": state.COMPLETE, "value": trial.value}


def _distribution(optuna: Any, entry: RangeConfig | Sequence[Any]) -> Any:
    if not isinstance(entry, RangeConfig):
        return optuna.distributions.CategoricalDistribution(list(range(len(entry))))
    if entry.integer:
        return optuna.distributions.IntDistribution(int(entry.low), int(entry.high), log=entry.log)
    return optuna.distributions.FloatDistribution(entry.low, entry.high, log=entry.log)


def _to_optuna(entry: RangeConfig | Sequence[Any], value: Any) -> Any:
    """Of a list Optuna sees the position: it takes no lists as values."""
    if isinstance(entry, RangeConfig):
        return value
    return [json.dumps(one) for one in entry].index(json.dumps(value))


def _from_optuna(entry: RangeConfig | Sequence[Any], value: Any) -> Any:
    return value if isinstance(entry, RangeConfig) else entry[value]
