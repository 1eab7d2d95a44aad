"""What a sweep's driver decides and stores: each trial once, whatever happens between."""

from pathlib import Path

from tiny_training import settings

from heliostat.config import validate
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_state import SweepState
from heliostat.runtime.sweep_trials import (
    Trial,
    read_trial,
    trial_files,
    trial_scratch,
    write_curve,
    write_failure,
    write_trial,
)
from heliostat.storage import LocalStore
from heliostat.tracking import NullTracker

METRIC = "train/rankme"


def state(folder: Path, said: list[str] | None = None, **section) -> SweepState:
    """A driver that took up what is in the folder."""
    plain = {"grid": {"train.seed": [0, 1, 2]}, "metric": METRIC} | section
    sweep = validate(SweepConfig, plain, "sweep")
    notify = (said if said is not None else []).append
    made = SweepState(settings(), sweep, LocalStore(folder), tracker=NullTracker(), parent_run="", notify=notify)
    made.take_up()
    return made


def finish(driver: SweepState, index: int, value: float = 1.0) -> None:
    """What a trial's own process does at its end, and then Ray Tune."""
    point = driver._points[index][0]
    write_trial(driver.files, Trial(point.name, dict(point.overrides), "finished", 8, value, point.step, {METRIC: value}))
    driver.ended(index, crashed=False)


def numbers(driver: SweepState) -> list[int]:
    """The trials that a driver would start now."""
    found = []
    while not isinstance(offer := driver.offer(), str):
        found.append(offer.point.index)
    return found


def test_a_driver_that_follows_a_dead_one_starts_what_did_not_end_and_nothing_else(tmp_path: Path) -> None:
    first = state(tmp_path)
    assert numbers(first) == [0, 1, 2]
    finish(first, 1)
    write_curve(first.files, 2, [(2, 0.5)])
    second = state(tmp_path)
    assert sorted(second.ends) == [1]
    assert numbers(second) == [0, 2]
    second.reported(2, 2, 0.5)  # its process tells again what it had told
    second.reported(2, 4, 0.7)
    trial = second.ended(2, crashed=False)
    assert (trial.status, trial.step, trial.value, trial.curve) == ("stopped", 4, 0.7, [(2, 0.5), (4, 0.7)])
    assert numbers(state(tmp_path)) == [0]


def test_a_trial_that_finished_while_it_was_stopped_has_finished_and_its_checkpoints_go(tmp_path: Path) -> None:
    said: list[str] = []
    driver = state(tmp_path, said)
    numbers(driver)
    driver.reported(0, 6, 0.5)
    trial_scratch(driver.files, 0).put("_work/checkpoints/step-00000006/checkpoint.json", b"{}")
    for name in ("backbone.safetensors", "model.json", "metrics.json"):
        trial_files(driver.files, 0).put(f"teacher/step-00000006/{name}", b"{}")
    finish(driver, 0, 0.9)
    assert (driver.ends[0].status, driver.ends[0].value) == ("finished", 0.9)
    assert said == [f"trial 000 finished: {METRIC} 0.9  (train.seed=0)"]
    assert list(trial_scratch(driver.files, 0).list()) == []
    assert [entry.key for entry in trial_files(driver.files, 0).list()] == ["teacher/step-00000006/metrics.json", "trial.json"]
    later = Trial("000", {"train.seed": 0}, "stopped", 6, 0.5)
    assert not write_trial(driver.files, later)
    assert read_trial(driver.files, 0).status == "finished"


def test_after_one_failure_too_many_nothing_starts_and_the_next_driver_tries_what_failed_again(tmp_path: Path) -> None:
    said: list[str] = []
    driver = state(tmp_path, said)
    assert driver.offer().point.index == 0
    write_failure(driver.files, 0, "step 3: not finite: dino_global")
    assert driver.ended(0, crashed=False).error == "step 3: not finite: dino_global"
    assert said == ["trial 000 failed: step 3: not finite: dino_global  (train.seed=0)"]
    assert driver.offer() == "none"
    assert numbers(state(tmp_path)) == [0, 1, 2]


def test_failures_that_a_recipe_allows_stand_in_the_table(tmp_path: Path) -> None:
    driver = state(tmp_path, max_failed_trials=1)
    assert numbers(driver) == [0, 1, 2]
    driver.ended(0, crashed=True)
    finish(driver, 1)
    driver.reported(2, 4, 0.1)
    driver.ended(2, crashed=False)
    assert [trial.status for trial in driver.table()] == ["failed", "finished", "stopped"]
    assert driver.ends[0].error == "its process ended without a word; see --debug"


def test_a_draw_waits_for_the_results_that_it_depends_on_and_is_stored_before_its_trial_runs(tmp_path: Path) -> None:
    section = {"grid": {}, "space": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, "search": "optuna", "num_trials": 6}
    driver = state(tmp_path, **section)
    assert numbers(driver) == [0, 1]
    assert driver.offer() == "wait"
    finish(driver, 1, 0.3)
    assert driver.offer() == "wait"  # the second may end first; the third is drawn from the first all the same
    finish(driver, 0, 0.2)
    third = driver.offer()
    assert third.point.index == 2
    again = state(tmp_path, **section)
    assert again.offer().point == third.point
    other = state(tmp_path / "other", **section)
    assert numbers(other) == [0, 1]
    finish(other, 0, 0.2)
    assert other.offer().point == third.point
