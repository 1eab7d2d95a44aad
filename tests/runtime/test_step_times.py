"""How long steps took: on the clock and on all processors, images and parts added up over tasks."""

import json
import time

import pytest

from heliostat.runtime.step_times import StepTimes


def spend(seconds: float) -> None:
    """Keep this processor busy."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_a_step_counts_the_clock_and_the_processor_of_its_body_each_time_it_is_entered() -> None:
    times = StepTimes()
    for _ in range(2):
        with times.step("plan", images=7):
            spend(0.02)
            time.sleep(0.02)
    (row,) = times.rows("embed")
    assert (row["stage"], row["step"], row["images"], row["parts"]) == ("embed", "plan", 7, {})
    assert row["seconds"] >= 0.078
    assert 0.039 <= row["cpu_seconds"] < row["seconds"]


def test_tasks_add_their_processors_images_and_parts_as_fractions_of_seconds() -> None:
    times = StepTimes()
    times.add_task("embedding", 1.25, {"images": 3, "cpu_seconds": {"decode": 0.5, "copy": 0.25}})
    times.add_task("embedding", 0.75, {"images": 2, "cpu_seconds": {"decode": 0.125}})
    times.add_task("embedding", 0.5, {})
    (row,) = times.rows("embed")
    assert (row["cpu_seconds"], row["images"], row["seconds"]) == (2.5, 5, 0.0)
    assert row["parts"] == {"copy": 0.25, "decode": 0.625}


def test_what_begins_within_a_step_is_a_part_of_it_and_its_images_are_not_counted_twice() -> None:
    times = StepTimes()
    with times.step("outer", images=5):
        times.add_task("tasks", 1.0, {"images": 1, "cpu_seconds": {"hash": 0.5}})
        with times.step("inner"):
            spend(0.01)
        times.add_task("outer", 1.0, {"images": 2})
    (row,) = times.rows("dedup")
    assert (row["step"], row["images"], row["parts"]) == ("outer", 7, {"hash": 0.5})
    assert 2.009 <= row["cpu_seconds"] < 2.5


def test_steps_come_in_the_order_in_which_they_began_and_read_back_from_json() -> None:
    times = StepTimes()
    with times.step("first"):
        pass
    times.add_task("tasks", 1.0, {"images": 1})
    with times.step("last"):
        pass
    with times.step("first"):
        pass
    rows = times.rows("dedup")
    assert [row["step"] for row in rows] == ["first", "tasks", "last"]
    assert json.loads(json.dumps(rows)) == rows


def test_a_step_that_fails_is_counted_and_its_error_goes_on() -> None:
    times = StepTimes()

    def fail() -> None:
        with times.step("plan"):
            time.sleep(0.01)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert times.steps["plan"].seconds >= 0.01


def test_no_steps_are_no_rows() -> None:
    assert StepTimes().rows("crawl") == []
