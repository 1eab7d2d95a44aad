"""What a person sees while stages run: lines that stay, and below them a block that renews itself on a terminal."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TextIO

_REFRESH_SECONDS = 0.2
_PLAIN_SECONDS = 10.0  # without a terminal: one line per this many seconds, so that logs stay readable
_MOST_COLUMNS = 160  # of a line that passes; a wider one is hard to read
_STYLES = {"dim": "2", "bold": "1", "good": "36"}  # SGR attributes: faint, bold, cyan
_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "_.-=+*#@"


class Span(NamedTuple):
    """A piece of a line; style is one of `_STYLES`, or empty."""

    text: str
    style: str = ""


class Progress:
    """Prints to one stream, from any thread. On a terminal `draw` and `update` renew what they drew before; elsewhere `update`
    prints a plain line now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.is_live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.has_color = self.is_live and not os.environ.get("NO_COLOR")
        self.has_blocks = _can_encode(_LEVELS, self._stream)
        self._last_update = 0.0
        self._drawn: list[str] = []
        self._lock = threading.RLock()

    def say(self, text: str = "") -> None:
        """Print a line that stays, above the block that passes."""
        with self._lock:
            below, erased = self._drawn, self._erased()
            self._write(f"{erased}{text}\n")
            if below:
                self._show(below)

    def is_due(self) -> bool:
        """Whether a passing state may be shown now; the next one then has to wait."""
        now = time.monotonic()
        if now - self._last_update < (_REFRESH_SECONDS if self.is_live else _PLAIN_SECONDS):
            return False
        self._last_update = now
        return True

    def update(self, text: str, *, final: bool = False) -> None:
        """Show a passing state in one line; `final` always prints it and lets it stay."""
        if final:
            self.clear()
            self._last_update = time.monotonic()
        elif not self.is_due():
            return
        if final or not self.is_live:
            self.say(f"  {text}")
        else:
            self.draw([[Span(f"  {text}")]])

    def draw(self, lines: Sequence[Sequence[Span]]) -> None:
        """Show lines in place of those that were drawn before, cut to the terminal's present size; on a terminal only."""
        with self._lock:
            size = shutil.get_terminal_size()
            columns = min(size.columns - 1, _MOST_COLUMNS)  # a full line would leave the cursor on the next one
            fitted = [self._fitted(line, columns) for line in lines[: size.lines - 1]]
            erased = self._erased()
            self._show(fitted, before=erased)

    def clear(self) -> None:
        """Take away what was drawn."""
        with self._lock:
            self._write(self._erased())

    def keep(self) -> None:
        """Let what was drawn stay, and go on below it."""
        with self._lock:
            if self._drawn:
                self._write("\n")
            self._drawn = []

    def _fitted(self, line: Sequence[Span], columns: int) -> str:
        shown = ""
        for text, style in line:
            piece = text[: max(columns, 0)]
            columns -= len(piece)
            shown += f"\x1b[{_STYLES[style]}m{piece}\x1b[0m" if piece and style and self.has_color else piece
        return shown

    def _show(self, lines: list[str], before: str = "") -> None:
        self._write(before + "\n".join(lines))
        self._drawn = lines

    def _erased(self) -> str:
        """What takes the cursor back to where the block began and clears from there; the block is forgotten."""
        if not self._drawn:
            return ""
        # A terminal that became narrower has wrapped the lines of the block.
        columns = max(shutil.get_terminal_size().columns, 1)
        rows = sum(max(1, -(-len(_without_styles(line)) // columns)) for line in self._drawn)
        self._drawn = []
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()


def _can_encode(text: str, stream: TextIO) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _without_styles(line: str) -> str:
    for code in ("0", *_STYLES.values()):
        line = line.replace(f"\x1b[{code}m", "")
    return line


def sparkline(values: Sequence[float], width: int, *, has_blocks: bool) -> str:
    """The values as a curve of one line, lowest to highest; more than `width` are averaged in equal groups, the oldest first.

    Values that are not finite leave a gap.
    """
    levels = _LEVELS if has_blocks else _ASCII_LEVELS
    if len(values) > width:
        edges = [len(values) * column // width for column in range(width + 1)]
        groups = [values[start:stop] for start, stop in pairwise(edges)]
        values = [sum(group) / len(group) for group in groups]
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    if span == 0:
        return "".join(levels[0] if value == low else " " for value in values)
    scale = (len(levels) - 1) / span
    return "".join(levels[round((value - low) * scale)] if abs(value) < float("inf") else " " for value in values)


def bar(done: int, total: int, width: int = 20) -> str:
    """A text bar, `[#####.....]  50 %`."""
    filled = round(width * done / max(total, 1))
    return f"[{'#' * filled}{'.' * (width - filled)}] {100 * done // max(total, 1):3d} %"


def duration_text(seconds: float) -> str:
    """A duration in the two units that matter: `8 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    whole = round(seconds)
    for size, unit, small, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small:02d} {part}"
    return f"{whole} s"
