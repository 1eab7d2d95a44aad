"""Where and how a benchmark keeps what it measured: results/[theme]_[hardware]_[date].md."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def cpu_hardware() -> str:
    """This machine in a file name."""
    return f"{os.cpu_count()}core-{platform.machine()}"


def versions() -> str:
    """What a figure depends on besides the code."""
    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    return f"{cores}, Python {platform.python_version()}, torch {torch.__version__}, one thread"


def today() -> str:
    """The date, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def write_result(theme: str, lines: Sequence[str], hardware: str) -> Path:
    """Print the lines and keep them in the result file of the theme, the hardware and the day."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{theme}_{hardware}_{today()}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\nwritten to {path}")
    return path
