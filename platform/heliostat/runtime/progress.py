"""What a person sees while stages run: one line per event, and a line that renews itself on a terminal."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

_REFRESH_SECONDS = 0.2
_PLAIN_SECONDS = 10.0  # without a terminal: one line per this many seconds, so that logs stay readable


class Progress:
    """Prints to one stream. On a terminal `update` rewrites its line; elsewhere it prints a plain line now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._last_update = 0.0
        self._width = 0
        self._started = time.monotonic()

    def say(self, text: str = "") -> None:
        """Print a line that stays."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def update(self, text: str, *, final: bool = False) -> None:
        """Show a passing state; `final` always prints it and lets it stay."""
        now = time.monotonic()
        if not final and now - self._last_update < (_REFRESH_SECONDS if self._live else _PLAIN_SECONDS):
            return
        self._last_update = now
        if final or not self._live:
            self.say(f"  {text}")
            return
        shown = f"  {text}"[:160]
        print("\r" + shown.ljust(self._width), end="", file=self._stream, flush=True)
        self._width = len(shown)

    def _clear(self) -> None:
        if self._live and self._width:
            print("\r" + " " * self._width + "\r", end="", file=self._stream)
            self._width = 0


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


def training_line(metrics: Mapping[str, float], step: int, total: int) -> str:
    """One line about a training run: step, speed, share of time waiting for data, losses / their values at uniform output."""
    losses = " ".join(
        _with_uniform(name, metrics)
        for name in ("loss", "dino_global", "dino_local", "ibot", "koleo")
        if f"train/{name}" in metrics
    )
    speed, wait = metrics.get("train/images_per_second", 0.0), metrics.get("train/data_wait_ratio", 0.0)
    return f"{bar(step, total)} step {step}/{total}  {speed:.0f} img/s  data wait {wait:.0%}  {losses}"


def _with_uniform(name: str, metrics: Mapping[str, float]) -> str:
    """A loss, and after a slash what it would be at uniform output."""
    uniform = metrics.get(f"train/{name}_at_uniform")
    return f"{name} {metrics[f'train/{name}']:.3f}" + (f"/{uniform:.2f}" if uniform is not None else "")
