"""Time is counted by what a killed process leaves behind."""

from pathlib import Path

from heliostat.costs import Device, Meter, read_attempts
from heliostat.costs.nvml import energy_counter
from heliostat.errors import StorageError
from heliostat.storage import LocalStore


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_killed_attempt_is_counted_to_its_newest_record_and_the_next_one_adds_to_it(tmp_path: Path) -> None:
    files, clock, joules = LocalStore(tmp_path), Clock(), Clock()
    meter = Meter(files, Device(name="GPU"), num_workers=8, record_steps=10, joules=joules, clock=clock)
    (started,) = read_attempts(files)
    assert (started.seconds, started.first_step) == (0, -1)
    for step in (10, 20, 30):
        clock.now += 60
        joules.now += 500
        meter.note(step)
    clock.now += 60  # killed before the next record
    Meter(files, Device(name="GPU"), num_workers=4, record_steps=10, clock=clock).note(30)
    first, second = read_attempts(files)
    assert (first.seconds, first.joules, first.num_workers) == (180, 1500, 8)
    assert (first.first_step, first.last_step, first.first_record_seconds, first.seconds_per_step) == (10, 30, 60, 6)
    assert (second.started, second.joules, second.num_workers) == (1240, None, 4)


def test_records_that_come_fast_are_not_all_written_and_the_end_is(tmp_path: Path) -> None:
    files, clock = LocalStore(tmp_path), Clock()
    meter = Meter(files, Device(), num_workers=1, record_steps=1, clock=clock)
    for step in range(1, 6):
        clock.now += 1
        meter.note(step)
    assert read_attempts(files)[0].last_step == 1
    meter.close()
    (attempt,) = read_attempts(files)
    assert (attempt.last_step, attempt.seconds) == (5, 5)


class Full(LocalStore):
    """A disk without room while `is_full`."""

    is_full = True

    def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
        if self.is_full:
            raise StorageError(f"{key}: no space left on device")
        super().put(key, data, overwrite=overwrite)


def test_a_full_disk_costs_the_record_only_until_there_is_room_again(tmp_path: Path) -> None:
    files, clock, said = Full(tmp_path), Clock(), []
    meter = Meter(files, Device(), num_workers=1, record_steps=1, notify=said.append, clock=clock)
    for step in (1, 2, 3):
        clock.now += 20
        meter.note(step)
    meter.close()
    assert read_attempts(files) == []
    assert [line.partition(": ")[0] for line in said] == ["costs of this run cannot be kept now"]
    files.is_full = False
    clock.now += 20
    meter.note(4)
    (attempt,) = read_attempts(files)
    assert (attempt.first_step, attempt.last_step, attempt.seconds) == (1, 4, 80)


def test_a_gpu_that_stops_to_tell_its_energy_is_not_measured(tmp_path: Path) -> None:
    files, clock, told = LocalStore(tmp_path), Clock(), iter([100.0, 200.0, None])
    meter = Meter(files, Device(name="GPU"), num_workers=1, record_steps=1, joules=lambda: next(told), clock=clock)
    clock.now += 20
    meter.note(1)
    meter.close()
    assert read_attempts(files)[0].joules is None


def test_a_gpu_that_is_not_there_counts_no_energy() -> None:
    assert energy_counter("GPU-00000000-0000-0000-0000-000000000000") is None
