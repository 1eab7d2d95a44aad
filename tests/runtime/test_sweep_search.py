"""Points that Optuna draws are a function of settings and results, whatever order the results came in."""

from dataclasses import replace

import pytest

from heliostat.config import validate
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_points import Point
from heliostat.runtime.sweep_search import needed_results, optuna_point
from heliostat.runtime.sweep_trials import Trial

SECTION = {
    "space": {
        "optim.lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "optim.warmup_steps": {"low": 0, "high": 9, "integer": True},
        "method.ibot.mask_ratio_min_max": [[0.1, 0.5], [0.2, 0.3]],
    },
    "search": "optuna",
    "num_trials": 40,
    "max_concurrent_trials": 2,
}


def sweep(**changes) -> SweepConfig:
    return validate(SweepConfig, SECTION | changes, "sweep")


def score(point: Point) -> float:
    """Best at lr 1e-3 without warm-up."""
    import math

    return -abs(math.log10(point.overrides["optim.lr"]) + 3) - 0.1 * point.overrides["optim.warmup_steps"]


def ended(point: Point, status="finished") -> Trial:
    value = None if status == "failed" else score(point)
    return Trial(
        point.name, dict(point.overrides), status, 10, value, curve=[] if value is None else [(5, value - 1), (10, value)]
    )


def search(config: SweepConfig, count: int) -> tuple[list[Point], dict[int, Trial]]:
    points: list[Point] = []
    results: dict[int, Trial] = {}
    for index in range(count):
        points.append(optuna_point(config, index, points, results))
        results[index] = ended(points[-1])
    return points, results


def test_the_search_finds_better_points_than_it_began_with() -> None:
    points, _ = search(sweep(), 40)
    first, last = [score(point) for point in points[:10]], [score(point) for point in points[30:]]
    assert sum(last) / 10 > sum(first) / 10 + 0.5
    assert {tuple(point.overrides["method.ibot.mask_ratio_min_max"]) for point in points} == {(0.1, 0.5), (0.2, 0.3)}
    assert all(isinstance(point.overrides["optim.warmup_steps"], int) for point in points)


def test_a_point_is_drawn_again_alike_and_does_not_see_the_results_of_trials_that_may_still_run() -> None:
    config = sweep()
    points, results = search(config, 14)
    assert needed_results(config, 13) == range(12)
    assert optuna_point(config, 13, points[:13], results) == points[13]
    only_needed = {index: results[index] for index in needed_results(config, 13)}
    assert optuna_point(config, 13, points[:13], only_needed) == points[13]
    assert optuna_point(sweep(seed=1), 13, points[:13], results) != points[13]
    worse = {**results, 11: ended(points[11], "failed")}
    assert optuna_point(config, 13, points[:13], worse) != points[13]


@pytest.mark.parametrize("status", ["stopped", "failed", "not finite"])
def test_trials_that_did_not_finish_are_told_as_such(status: str) -> None:
    config = sweep()
    points, results = search(config, 12)
    nan = {index: replace(trial, value=float("nan")) for index, trial in results.items()}
    others = nan if status == "not finite" else {index: ended(points[index], status) for index in results}
    told = {index: others[index] if index % 3 == 0 else trial for index, trial in results.items()}
    drawn = optuna_point(config, 12, points, told)
    assert set(drawn.overrides) == set(SECTION["space"])
