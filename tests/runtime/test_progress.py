"""Progress on a terminal renews one line; in a log it prints a plain line now and then."""

import io

import pytest

from heliostat.runtime import progress
from heliostat.runtime.progress import Progress, bar, training_line


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """What a terminal shows after this text: carriage returns overwrite."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for piece in line.split("\r"):
            shown = piece + shown[len(piece) :]
        lines.append(shown.rstrip())
    return lines


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REFRESH_SECONDS", 0.0)


def test_a_terminal_shows_one_line_that_renews_itself() -> None:
    stream = Terminal()
    shown = Progress(stream)
    shown.update("packing a long line 1/3")
    shown.update("packing 2/3")
    assert screen(stream.getvalue()) == ["  packing 2/3"]
    shown.say("an event")
    assert screen(stream.getvalue()) == ["an event", ""]
    shown.update("packing 3/3", final=True)
    assert screen(stream.getvalue()) == ["an event", "  packing 3/3", ""]


def test_a_line_wider_than_a_terminal_is_cut() -> None:
    stream = Terminal()
    Progress(stream).update("x" * 500)
    assert len(screen(stream.getvalue())[0]) == 160


def test_a_log_has_plain_lines_and_not_too_many() -> None:
    stream = io.StringIO()
    shown = Progress(stream)
    shown._last_update = 0.0
    for number in range(100):
        shown.update(f"step {number}")
    shown.update("step 100", final=True)
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "  step 100"
    assert len(lines) <= 2
    assert "\r" not in stream.getvalue()


def test_a_bar_fills_from_empty_to_full() -> None:
    assert bar(0, 10) == "[....................]   0 %"
    assert bar(5, 10) == "[##########..........]  50 %"
    assert bar(10, 10) == "[####################] 100 %"
    assert bar(0, 0) == "[....................]   0 %"


def test_a_training_line_holds_what_is_known() -> None:
    metrics = {"train/loss": 8.18, "train/ibot": 1.5, "train/images_per_second": 61.7, "train/data_wait_ratio": 0.031}
    assert training_line(metrics, 4, 8) == (
        "[##########..........]  50 % step 4/8  62 img/s  data wait 3%  loss 8.180 ibot 1.500"
    )
