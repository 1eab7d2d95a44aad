"""The report of a curation: one HTML page for people, and the same numbers as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from heliostat.curation.ledger import FunnelStep
from heliostat.curation.pages import render_template
from heliostat.storage import Store

REPORT_HTML = "report.html"
REPORT_JSON = "report.json"
_TEMPLATE = Path(__file__).parent / "curation_report.html.j2"
_WIDTH, _HEIGHT = 460, 170  # of a picture, in the units of its viewBox


@dataclass(frozen=True)
class ReportData:
    """What the report tells; every part may be left out. Mappings and lists are JSON-ready.

    statistics: "before" and "after", each `ImageStatistics.as_dict()`. planted: `PlantedScore.as_dict()` by method, ours
    first. edges: rows of low, high, num_true, num_found (`audit.Band`). components: `CopyReport.to_json()`; of a list the
    first ten are shown. balance: a row per level of level, num_clusters, and before and after, each
    `clusters.size_statistics`. composition: rows of dataset, images, mode, retrieved, final, added
    (`composition.CompositionRow`). coverage: rows of set, num_images, num_that_retrieved. times: rows of stage, seconds,
    cpu_seconds, images, in their order. cost_per_cpu_hour: for the column of costs. sheets: of `write_sheets`. settings:
    what was asked for, by name. notes: caveats, a sentence each.
    """

    title: str
    funnel: Sequence[FunnelStep]
    statistics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    planted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    edges: Sequence[Mapping[str, Any]] = ()
    components: Mapping[str, Any] = field(default_factory=dict)
    balance: Sequence[Mapping[str, Any]] = ()
    composition: Sequence[Mapping[str, Any]] = ()
    coverage: Sequence[Mapping[str, Any]] = ()
    times: Sequence[Mapping[str, Any]] = ()
    cost_per_cpu_hour: float | None = None
    currency: str = "USD"
    sheets: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def report_json(data: ReportData) -> dict[str, Any]:
    """Every number of the page, JSON-ready."""
    times = _times(data)
    known = {**vars(data), "funnel": [step.as_dict() for step in data.funnel], "times": times, "summary": _summary(data, times)}
    known["edge_recall"] = _edge_recall(data.edges)
    plain: dict[str, Any] = json.loads(json.dumps(known, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot stand in a report; give numbers, text, lists and mappings")


def _summary(data: ReportData, times: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, last = (data.funnel[0], data.funnel[-1]) if data.funnel else (None, None)
    rows_in, kept = (first.rows_in, last.rows_kept) if first and last else (0, 0)
    slowest = max(times, key=lambda row: row["seconds"], default=None)
    return {
        "rows_in": rows_in,
        "rows_kept": kept,
        "kept_ratio": kept / rows_in if rows_in else 0.0,
        "seconds": sum(row["seconds"] for row in times),
        "cpu_seconds": sum(row["cpu_seconds"] for row in times),
        "bottleneck": None if slowest is None else slowest["stage"],
        "bottleneck_share": None if slowest is None else slowest["share"],
    }


def _times(data: ReportData) -> list[dict[str, Any]]:
    """The stages with what follows from their times: images a second, CPU seconds for 1,000 images, share, cost."""
    total, rows = sum(row["seconds"] for row in data.times), list[dict[str, Any]]()
    for row in data.times:
        images, seconds, cpu = row["images"], row["seconds"], row["cpu_seconds"]
        price = data.cost_per_cpu_hour
        rows.append(
            {
                **row,
                "images_per_second": images / seconds if seconds else None,
                "cpu_seconds_per_1000_images": 1000 * cpu / images if images else None,
                "cost": None if price is None else cpu / 3600 * price,
                "share": seconds / total if total else 0.0,
            }
        )
    return rows


def _edge_recall(bands: Sequence[Mapping[str, Any]]) -> float | None:
    num_true = sum(band["num_true"] for band in bands)
    return sum(band["num_found"] for band in bands) / num_true if num_true else None


def render_report(data: ReportData) -> str:
    """The page. Text from recipes, file names and URLs is escaped; nothing is loaded from elsewhere."""
    known = report_json(data)
    widest = max((step["rows_in"] for step in known["funnel"]), default=1) or 1
    curves = [[_curve(level["before"]["curve"]), _curve(level["after"]["curve"])] for level in known["balance"]]
    kinds = sorted({kind for score in known["planted"].values() for kind in score.get("recall_by_kind", {})})
    formats = list(dict.fromkeys(name for side in known["statistics"].values() for name in side["formats"]))
    return render_template(
        _TEMPLATE, report=known, widest=widest, curves=curves, kinds=kinds, formats=formats, width=_WIDTH, height=_HEIGHT
    )


def _curve(sizes: Sequence[int]) -> str:
    """Sorted cluster sizes as the points of a polyline: rank from left to right, log size from the bottom up."""
    if not sizes:
        return ""
    top = np.log1p(max(sizes)) or 1.0
    last = max(1, len(sizes) - 1)
    points = [(rank / last * _WIDTH, _HEIGHT - float(np.log1p(size) / top) * (_HEIGHT - 8)) for rank, size in enumerate(sizes)]
    return " ".join(f"{across:.1f},{up:.1f}" for across, up in points)


def write_report(files: Store, data: ReportData) -> list[str]:
    """Write `report.json` and `report.html`; returns their keys. The same data gives the same bytes."""
    files.put(REPORT_JSON, (json.dumps(report_json(data), indent=1) + "\n").encode())
    files.put(REPORT_HTML, render_report(data).encode())
    return [REPORT_JSON, REPORT_HTML]
