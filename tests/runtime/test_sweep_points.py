"""The trials of a sweep: grids, ablations, draws, and what cannot vary."""

import json

import pytest
from tiny_training import settings

from heliostat.config import validate
from heliostat.errors import ConfigError
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_points import fixed_points, num_points, trial_config, trial_configs

KOLEO = "method.dino.koleo_loss_weight"


def sweep(**section) -> SweepConfig:
    return validate(SweepConfig, section, "sweep")


def test_a_grid_is_every_combination_with_the_last_key_fastest() -> None:
    points = fixed_points(sweep(grid={KOLEO: [0.0, 0.1], "train.seed": [0, 1, 2]}))
    assert [point.index for point in points] == list(range(6))
    assert [tuple(point.overrides.values()) for point in points] == [(0.0, 0), (0.0, 1), (0.0, 2), (0.1, 0), (0.1, 1), (0.1, 2)]
    assert points[4].settings == {KOLEO: 0.1}
    assert points[4].shown() == f"{KOLEO}=0.1, train.seed=1"


def test_steps_of_an_ablation_keep_what_was_before_them_and_each_meets_every_seed() -> None:
    steps = [
        {"name": "iBOT"},
        {"name": "+ KoLeo", "overrides": {KOLEO: 0.1}},
        {"name": "+ less of it", "overrides": {KOLEO: 0.05, "method.drop_path_rate": 0.2}},
    ]
    section = sweep(ablation=steps, grid={"train.seed": [0, 1]})
    points = fixed_points(section)
    assert num_points(section) == len(points) == 6
    assert [point.step for point in points] == ["iBOT"] * 2 + ["+ KoLeo"] * 2 + ["+ less of it"] * 2
    assert [dict(point.overrides) for point in points[::2]] == [
        {"train.seed": 0},
        {KOLEO: 0.1, "train.seed": 0},
        {KOLEO: 0.05, "method.drop_path_rate": 0.2, "train.seed": 0},
    ]
    assert points[3].shown() == "+ KoLeo, train.seed=1"


SPACE = {
    KOLEO: {"low": 0.001, "high": 0.1, "log": True},
    "optim.warmup_steps": {"low": 1, "high": 4, "integer": True},
    "method.centering": ["centering", "sinkhorn_knopp"],
    "method.ibot.mask_ratio_min_max": [[0.1, 0.5], [0.2, 0.3]],
}


def test_random_points_are_a_function_of_seed_and_number_and_stay_when_more_are_asked_for() -> None:
    few, many = fixed_points(sweep(space=SPACE, num_trials=5)), fixed_points(sweep(space=SPACE, num_trials=40))
    assert many[:5] == few
    assert fixed_points(sweep(space=SPACE, num_trials=5, seed=1)) != few
    assert len({json.dumps(point.overrides) for point in many}) == 40
    weights = [point.overrides[KOLEO] for point in many]
    assert all(0.001 <= weight <= 0.1 for weight in weights)
    assert 12 <= sum(weight < 0.01 for weight in weights) <= 28  # half of a log range lies below its geometric mean
    assert {point.overrides["optim.warmup_steps"] for point in many} == {1, 2, 3, 4}
    for config in trial_configs(settings(), sweep(space=SPACE, num_trials=5)):
        assert config.method.ibot.mask_ratio_min_max in ((0.1, 0.5), (0.2, 0.3))


def test_a_space_with_too_few_points_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"num_trials 5: draws find no more than 2 different points; use num_trials=2, or a grid"
    ):
        fixed_points(sweep(space={"method.centering": ["centering", "sinkhorn_knopp"]}, num_trials=5))


def test_a_trial_has_the_shared_overrides_its_own_and_no_phases() -> None:
    base = settings("scaling.num_workers=2", "phases=[{name: high, steps: 4, global_crops_size: 64}]")
    trial = trial_config(base, sweep(grid={"train.seed": [4]}, overrides={"scaling.num_workers": 0}), {"train.seed": 4})
    assert (trial.scaling.num_workers, trial.train.seed, trial.phases) == (0, 4, ())
    assert trial_config(base, sweep(grid={"train.seed": [4]}), {}).scaling.num_workers == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "nothing varies; give grid, ablation or space"),
        ({"grid": {KOLEO: []}}, f"{KOLEO} has no values; give a list of some"),
        ({"grid": {KOLEO: [0.1]}, "search": "optuna"}, "search=optuna is about draws from a space, and there is none"),
        ({"grid": {KOLEO: [0.1]}, "num_trials": 4}, "num_trials=4 is about draws from a space"),
        ({"grid": {KOLEO: [0.1]}, "space": {KOLEO: [0.1]}}, "space and grid are both given"),
        ({"grid": {KOLEO: [0.1]}, "overrides": {KOLEO: 0.2}}, f"{KOLEO} is swept and in overrides; keep one of them"),
        ({"ablation": [{"name": "a"}, {"name": "a"}]}, "the name 'a' is there twice"),
        ({"grid": {KOLEO: [0.1, 0.2, 0.1]}}, f"{KOLEO} has the value 0.1 twice; remove one"),
        ({"grid": {KOLEO: [1, 1.0]}}, f"{KOLEO} has the value 1.0 twice"),
        ({"space": {"crops.grayscale": [[0.1, 0.5], [0.1, 0.5]]}}, r"has the value \[0.1, 0.5\] twice"),
        ({"space": {KOLEO: {"low": 1, "high": 0.1}}}, "low 1 is not below high 0.1"),
        ({"space": {KOLEO: {"low": 0, "high": 0.1, "log": True}}}, "low 0 has no logarithm"),
        ({"space": {"optim.warmup_steps": {"low": 0.5, "high": 3, "integer": True}}}, "must be whole numbers"),
        ({"grid": {"train.steps": [5, 10]}, "asha": {"grace_steps": 2}}, "asha compares trials at equal steps"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_in_one_line(section, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as refused:
        sweep(**section)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"grid": {"koleo_loss_weight": [0.1]}},
            r"unknown key: koleo_loss_weight\. Did you mean method\.dino\.koleo_loss_weight\?",
        ),
        ({"grid": {"scaling.num_workers": [1, 2]}}, r"scaling\.num_workers cannot vary between trials: it changes no result"),
        ({"grid": {"data": ["raw/a@1", "raw/b@1"]}}, "data cannot vary between trials: set it in pretrain"),
        ({"grid": {KOLEO: [0.1]}, "overrides": {"phases": "x"}}, r"sweep\.overrides: phases is that of the pretrain section"),
        (
            {"grid": {"train.global_batch_size": [8, 9]}, "overrides": {"scaling.num_workers": 2}},
            "9 is not divisible by 2 workers",
        ),
        (
            {"grid": {"student.patch_size": [8, 16]}, "overrides": {"online.image_size": 24}},
            r"online\.image_size 24 is not divisible by student\.patch_size 16; use 16 or 32",
        ),
        (
            {"grid": {KOLEO: [index / 101 for index in range(101)], "train.seed": list(range(100))}},
            "has 10,100 combinations, more than 10,000",
        ),
    ],
)
def test_what_no_trial_could_be_is_refused_before_any_starts(section, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trial_configs(settings(), sweep(**section))


def test_a_range_of_a_key_that_takes_whole_numbers_says_how_to_draw_them() -> None:
    section = sweep(space={"student.depth": {"low": 1, "high": 5}}, num_trials=2)
    with pytest.raises(ConfigError, match=r"student.depth takes whole numbers; write integer: true in sweep.space"):
        trial_configs(settings(), section)
