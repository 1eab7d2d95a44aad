"""The lineage of an artifact as one HTML page: a drawing from the raw images to the model, and a table. Nothing is fetched."""

from pathlib import Path
from typing import Any

from heliostat.costs import cost_text
from heliostat.lineage.drawing import BOX_WIDTH, LINE, PADDING, Box, draw, shortened, telling_metrics
from heliostat.lineage.walk import Lineage, LineageNode, total_costs

_TEMPLATE = Path(__file__).parent / "lineage.html.j2"
_METRICS_IN_TABLE = 6


def render_page(whole: Lineage) -> str:
    """The page. Every text is escaped; the drawing is inline SVG."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawing = draw(whole)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=str(whole.ref),
        boxes=[_of_box(box, is_result=box.node.ref == whole.ref) for box in drawing.boxes],
        drawing=drawing,
        box_width=BOX_WIDTH,
        rows=[_row(one) for one in sorted(whole.nodes.values(), key=lambda one: one.record.created if one.record else "")],
        total=cost_text(total_costs(whole)),
    )


def _of_box(box: Box, *, is_result: bool) -> dict[str, Any]:
    """A box as the template draws it."""
    x, y = box.x + PADDING, box.y + PADDING + LINE - 4
    return {
        "x": box.x,
        "y": box.y,
        "height": box.height,
        "title": str(box.node.ref),
        "short": shortened(str(box.node.ref)),
        "title_x": x,
        "title_y": y,
        "lines": [(x, y + LINE * (number + 1), line) for number, line in enumerate(box.lines)],
        "kind": box.node.ref.kind if box.node.record is not None else "missing",
        "is_result": is_result,
    }


def _row(node: LineageNode) -> dict[str, Any]:
    """One line of the table."""
    record = node.record
    if record is None:
        empty: dict[str, Any] = {key: [] for key in ("inputs", "metrics", "costs")}
        return empty | {"ref": str(node.ref), "counts": ["not in this store"], "created": "", "code": "", "fingerprint": ""}
    names = telling_metrics(record.metrics)
    metrics = [f"{name} {record.metrics[name]:.4g}" for name in names[:_METRICS_IN_TABLE]]
    return {
        "ref": str(node.ref),
        "created": record.created,
        "inputs": [f"{role}: {target}" for role, target in sorted(record.inputs.items())],
        "counts": [f"{value:,} {name}" for name, value in record.counts.items()],
        "metrics": metrics + ([f"and {len(names) - len(metrics)} more"] if len(names) > len(metrics) else []),
        "costs": [line for line in cost_text(record.costs).split(", ") if line],
        "code": record.code_version,
        "fingerprint": record.fingerprint[:16],
    }
