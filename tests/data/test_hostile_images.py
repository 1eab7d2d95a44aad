"""Hostile images end in pixels or in a verdict, in bounded time and memory, in a process that survives them."""

import json
import subprocess
import sys
from pathlib import Path

import hostile_images
import pytest

from heliostat.data.decode import REASONS

SCRIPT = Path(hostile_images.__file__)
MOST_SECONDS = 5.0  # CPU, both decodes of one file
# Beside what the child held before the file: 28 bytes for each pixel allowed, and the largest file with a copy.
MOST_BYTES = 28 * hostile_images.LIMITS.max_pixels + 2 * hostile_images.LIMITS.max_bytes


def outcomes(*arguments: str, seconds: int) -> list[dict]:
    """Run the child on some files; a crash, a hang or an exception of another kind fails."""
    command = [sys.executable, str(SCRIPT), *arguments]
    child = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    last = lines[-1]["name"] if lines else "none"
    assert child.returncode == 0, f"the decoder died after {last} with {child.returncode}: {child.stderr[-2000:]}"
    return lines


def check(lines: list[dict]) -> None:
    """Each file ended in three-channel pixels or in a known reason that is no lack of memory, in time."""
    for line in lines:
        for outcome in line["outcomes"]:
            assert outcome == "pixels uint8 3 3" or outcome.split(":")[0] in REASONS, line
            assert "MemoryError" not in outcome, line
            assert "\n" not in outcome, line
        assert line["seconds"] < MOST_SECONDS, line


@pytest.fixture(scope="module")
def curated() -> list[dict]:
    return outcomes("cases", seconds=300)


def test_every_hostile_file_ends_in_pixels_or_a_reason_in_time(curated: list[dict]) -> None:
    assert len(curated) >= 300
    check(curated)


def test_memory_stays_bounded_for_each_of_them(curated: list[dict]) -> None:
    most = max(curated, key=lambda line: line["grown_bytes"])
    assert most["grown_bytes"] < MOST_BYTES, most


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("png of 179 megapixels in half a megabyte", "too_many_pixels"),
        ("jpeg of 65,500 pixels each way", "too_many_pixels"),
        ("jpeg of 200 more scans", "decode_error"),
        ("jpeg of 100,000 segments", "decode_error"),
        ("png of 2 billion columns and one row", "too_small"),
        ("gif of 65,535 pixels each way", "too_many_pixels"),
        ("tiff of 4 billion pixels each way", "too_many_pixels"),
        ("webp of 16,777,216 pixels each way", "too_many_pixels"),
        ("svg", "unknown_format"),
        ("postscript", "unknown_format"),
        ("pdf and jpeg", "unknown_format"),
        ("nothing", "truncated"),
    ],
)
def test_bombs_have_the_reason_that_they_deserve(curated: list[dict], name: str, reason: str) -> None:
    (found,) = [line["outcomes"] for line in curated if line["name"] == name]
    assert [outcome.split(":")[0] for outcome in found] == [reason, reason]


@pytest.mark.parametrize(
    "name", ["jpeg of 4,000 segments", "gif of 100,000 frames", "png with acTL", "jpeg and zip", "jpeg with an exif far away"]
)
def test_odd_but_sound_files_still_give_pixels(curated: list[dict], name: str) -> None:
    (found,) = [line["outcomes"] for line in curated if line["name"] == name]
    assert found == ["pixels uint8 3 3"] * 2


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_twelve_thousand_mutations_end_in_pixels_or_a_reason() -> None:
    num_files, step = 12_000, 1000
    lines = [
        line
        for first in range(0, num_files, step)
        for line in outcomes("mutations", str(first), str(first + step), seconds=600)
    ]
    assert len(lines) == num_files
    check(lines)
    assert max(line["grown_bytes"] for line in lines) < MOST_BYTES
