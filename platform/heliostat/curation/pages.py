"""Static pages out of our templates: everything that is filled in is escaped, and no page loads anything from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def render_template(path: Path, **values: Any) -> str:
    """A page. Values are text, numbers and containers of them; text is escaped, a name that is missing is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "thousands": lambda value: f"{value:,}",
        "percent": lambda value: f"{100 * value:.1f}",
        "duration": duration,
        "bytes": size,
        "ratio": ratio,
        "interval": interval,
        "number": number,
    }
    return environment.from_string(path.read_text(encoding="utf-8")).render(**values)


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `5 h 07 min`, `2 d 04 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(num_bytes: float) -> str:
    """`812 B`, `34.1 kB`, `1.2 GB`: powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} PB"


def ratio(share: Mapping[str, Any]) -> str:
    """The share of a `planted_score.Share`: `98.2 %`, or `none planted`."""
    return "none planted" if share["ratio"] is None else f"{100 * share['ratio']:.1f} %"


def interval(share: Mapping[str, Any]) -> str:
    """Of how many, and the 95 % interval: `of 510, 96.6-99.0`."""
    if share["ratio"] is None:
        return ""
    return f"of {share['planted']:,}, {100 * share['low']:.1f}-{100 * share['high']:.1f}"


def number(value: Any) -> str:
    """Integers with thousands, other numbers with four digits, the first ten of a list, anything else as it is."""
    if isinstance(value, list | tuple):
        return ", ".join(number(one) for one in value[:10]) + (", ..." if len(value) > 10 else "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
