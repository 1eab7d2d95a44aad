"""Progress on a terminal renews a block of lines below those that stay; in a log it prints a plain line now and then."""

import io
import itertools
import threading

import pytest
from screen import Screen

from heliostat.runtime import progress
from heliostat.runtime.progress import Progress, Span, bar, duration_text, sparkline


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Asked(io.StringIO):
    """A stream that says it is a terminal, of an old encoding."""

    encoding = "latin-1"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def screen(text: str, columns: int = 80, height: int = 24) -> Screen:
    shown = Screen(columns, height)
    shown.feed(text)
    return shown


def block(*lines: str) -> list[list[Span]]:
    return [[Span(line)] for line in lines]


def test_a_terminal_shows_one_line_that_renews_itself() -> None:
    stream = Terminal()
    shown = Progress(stream)
    shown.update("packing a long line 1/3")
    shown.update("packing 2/3")
    assert screen(stream.getvalue()).lines() == ["  packing 2/3"]
    shown.say("an event")
    assert screen(stream.getvalue()).lines() == ["an event", "  packing 2/3"]
    shown.update("packing 3/3", final=True)
    assert screen(stream.getvalue()).lines() == ["an event", "  packing 3/3", ""]


def test_a_block_is_redrawn_in_place_with_more_or_fewer_lines() -> None:
    stream = Terminal()
    shown = Progress(stream)
    shown.say("before")
    shown.draw(block("one", "two", "three"))
    shown.draw(block("uno", "due"))
    assert screen(stream.getvalue()).lines() == ["before", "uno", "due"]
    shown.draw(block("1", "2", "3", "4"))
    assert screen(stream.getvalue()).lines() == ["before", "1", "2", "3", "4"]
    shown.clear()
    assert screen(stream.getvalue()).lines() == ["before", ""]


def test_lines_that_stay_are_printed_above_the_block() -> None:
    stream = Terminal()
    shown = Progress(stream)
    for number in range(3):
        shown.draw(block(f"first {number}", f"second {number}"))
        shown.say(f"event {number}")
    shown.keep()
    shown.say("after")
    assert screen(stream.getvalue()).lines() == ["event 0", "event 1", "event 2", "first 2", "second 2", "after", ""]


@pytest.mark.parametrize("columns", [20, 40, 79, 80, 200])
def test_no_line_of_a_block_wraps_at_any_width(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    shown = Progress(stream)
    for _ in range(3):
        shown.draw([[Span("a" * 50, "bold"), Span("b" * 200, "dim")], [Span("c" * columns)]])
    seen = screen(stream.getvalue(), columns)
    assert seen.num_wraps == 0
    assert len(seen.lines()) == 2
    assert len(seen.lines()[0]) == min(columns - 1, 160)


def test_a_block_higher_than_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "4")
    stream = Terminal()
    shown = Progress(stream)
    for turn in range(3):
        shown.draw(block(*(f"{turn} {number}" for number in range(9))))
    assert screen(stream.getvalue(), height=4).lines() == ["2 0", "2 1", "2 2"]


@pytest.mark.parametrize(("before", "after"), [(80, 30), (30, 80), (80, 79), (60, 11)])
def test_a_terminal_that_is_resized_between_two_blocks_shows_the_new_one_alone(before, after, monkeypatch) -> None:
    stream, seen = Terminal(), Screen(before)
    shown = Progress(stream)
    monkeypatch.setenv("COLUMNS", str(before))
    shown.say("stays")
    shown.draw(block("x" * 70, "y" * 25))
    seen.feed(stream.getvalue())
    written = len(stream.getvalue())
    monkeypatch.setenv("COLUMNS", str(after))
    seen.resize(after)
    shown.draw(block("new", "block"))
    seen.feed(stream.getvalue()[written:])
    assert seen.lines() == ["stays", "new", "block"]


def test_colours_are_used_unless_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    Progress(stream).draw([[Span("loss", "bold"), Span(" low")]])
    assert stream.getvalue() == "\x1b[1mloss\x1b[0m low"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Progress(plain).draw([[Span("loss", "bold"), Span(" low")]])
    assert plain.getvalue() == "loss low"


def test_a_dumb_terminal_is_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    shown = Progress(stream)
    shown._last_update = -100.0
    shown.update("step 1")
    assert not shown.is_live
    assert stream.getvalue() == "  step 1\n"


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
    assert "\x1b" not in stream.getvalue()


def test_lines_of_several_threads_do_not_mix() -> None:
    stream = Terminal()
    shown = Progress(stream)

    def talk(name: str) -> None:
        for number in range(200):
            shown.draw(block(f"{name} {number}", "-" * 20))
            shown.say(f"{name} says {number}")

    threads = [threading.Thread(target=talk, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = screen(stream.getvalue(), height=10_000).lines()
    assert sorted(line for line in lines if "says" in line) == sorted(
        f"{name} says {number}" for name, number in itertools.product(("one", "two"), range(200))
    )
    assert len(lines) == 402


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 20, has_blocks=True) == "▁▂▃▄▅▆▇█"
    assert sparkline([8, 1], 20, has_blocks=True) == "█▁"
    assert sparkline([0, 100], 20, has_blocks=False) == "_@"
    assert sparkline([3, 3, 3], 20, has_blocks=True) == "▁▁▁"
    assert sparkline([], 20, has_blocks=True) == ""


def test_a_sparkline_averages_what_does_not_fit_and_leaves_gaps_where_nothing_is_known() -> None:
    curve = sparkline([float(number) for number in range(1000)], 8, has_blocks=True)
    assert curve == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, float("nan"), float("inf"), 2.0], 8, has_blocks=True) == "▁  █"
    assert sparkline([float("nan")], 8, has_blocks=True) == " "


def test_an_encoding_without_blocks_is_seen() -> None:
    assert Progress(Terminal()).has_blocks
    assert not Progress(Asked()).has_blocks


def test_a_bar_fills_from_empty_to_full() -> None:
    assert bar(0, 10) == "[....................]   0 %"
    assert bar(5, 10) == "[##########..........]  50 %"
    assert bar(10, 10) == "[####################] 100 %"
    assert bar(0, 0) == "[....................]   0 %"


def test_a_duration_has_the_two_units_that_matter() -> None:
    assert [duration_text(seconds) for seconds in (8, 200, 7500, 273_600)] == ["8 s", "3 min 20 s", "2 h 05 min", "3 d 04 h"]
