"""A small file that was damaged after it was written is one line with a way out, whoever reads it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.costs import read_attempts
from heliostat.errors import StorageError
from heliostat.runtime.sweep_trials import (
    read_curve,
    read_failure,
    read_points,
    read_trial,
    take_failures,
    trial_files,
    trial_scratch,
)
from heliostat.storage import LocalStore, Store
from heliostat.training.teacher_files import read_evaluations

READERS: dict[str, tuple[Callable[[Store], object], Callable[[Store], Store], str]] = {
    "attempt": (read_attempts, lambda files: files, "_work/costs/1000abc.json"),
    "evaluation": (read_evaluations, lambda files: files, "teacher/step-00000002/metrics.json"),
    "point": (read_points, lambda files: files, "_work/points/000.json"),
    "trial": (lambda files: read_trial(files, 0), lambda files: trial_files(files, 0), "trial.json"),
    "curve": (lambda files: read_curve(files, 0), lambda files: trial_scratch(files, 0), "curve.json"),
    "failure": (lambda files: read_failure(files, 0), lambda files: files, "_work/failures/000.json"),
    "failures": (take_failures, lambda files: files, "_work/failures/000.json"),
}


@pytest.mark.parametrize("content", [b"", b'{"a', b"[7]", b"null", b"7", b"\xff\xfe"])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    read, place, key = READERS[name]
    files = LocalStore(tmp_path)
    place(files).put(key, content)
    with pytest.raises(StorageError, match=rf"{key} is damaged \({len(content)} bytes that cannot be used\); remove it"):
        read(files)


def test_copies_that_somebody_made_by_hand_are_no_files_of_ours(tmp_path: Path) -> None:
    files = LocalStore(tmp_path)
    files.put("teacher/step-00000002 (copy)/metrics.json", b"{}")
    files.put("teacher/step-2/metrics.json", b"{}")
    files.put("_work/points/000 (copy).json", b"{}")
    files.put("_work/failures/000 (copy).json", b"{}")
    assert read_evaluations(files) == {}
    assert read_points(files) == {}
    assert take_failures(files) == {}
