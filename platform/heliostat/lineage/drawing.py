"""Where the boxes and arrows of a lineage stand: columns from the raw images at the left to the result at the right.

A box stands in the column of its longest way to the result. An arrow that passes columns gets a lane of its own below their
boxes, so that no arrow runs behind a box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from heliostat.artifacts import ArtifactRef
from heliostat.costs import cost_text
from heliostat.lineage.walk import Lineage, LineageNode

BOX_WIDTH, PADDING, LINE = 232, 10, 17  # pixels
_GAP_X, _GAP_Y, _LANE = 96, 26, 22
_CHARACTERS = 34  # of a line that fits a box
_SHOWN_COUNTS, _SHOWN_METRICS = 3, 2


@dataclass
class Box:
    """One artifact, in pixels from the upper left corner."""

    node: LineageNode
    lines: tuple[str, ...]
    x: float = 0.0
    y: float = 0.0

    @property
    def height(self) -> float:
        """Room for the title, the lines and the arrows that end here."""
        return max(2 * PADDING + LINE * (1 + len(self.lines)), float(LINE * (len(self.node.roles) + 1)))


@dataclass(frozen=True)
class Arrow:
    """From an input to what was made from it: an SVG path, its roles and where their text ends."""

    path: str
    roles: str
    text_x: float
    text_y: float


@dataclass(frozen=True)
class Drawing:
    """Boxes and arrows on a sheet."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    width: float
    height: float


def draw(whole: Lineage) -> Drawing:
    """Place every artifact of a lineage once."""
    boxes = {ref: Box(node, box_lines(node)) for ref, node in whole.nodes.items()}
    depths = whole.depths()
    lanes = [
        (child, ref, depth)
        for ref, node in whole.nodes.items()
        for child in node.roles
        for depth in range(depths[ref] + 1, depths[child])
    ]
    lane_y = _place(boxes, depths, lanes)
    arrows = [arrow for box in boxes.values() for arrow in _arrows_to(box, boxes, depths, lane_y)]
    width = max(box.x for box in boxes.values()) + BOX_WIDTH + PADDING
    bottom = max([box.y + box.height for box in boxes.values()] + list(lane_y.values()))
    return Drawing(tuple(boxes.values()), tuple(arrows), width, bottom + PADDING)


_Lane = tuple[ArtifactRef, ArtifactRef, int]


def _place(boxes: Mapping[ArtifactRef, Box], depths: Mapping[ArtifactRef, int], lanes: Sequence[_Lane]) -> dict[_Lane, float]:
    """Give every box its place, and every lane its height."""
    deepest = max(depths.values())
    columns: dict[int, list[Box]] = {depth: [] for depth in range(deepest + 1)}
    for ref, box in boxes.items():
        columns[depths[ref]].append(box)
    by_length = sorted(lanes, key=lambda lane: depths[lane[0]] - depths[lane[1]])  # long ones outside: fewer crossings
    own_lanes: dict[int, list[_Lane]] = {depth: [] for depth in columns}
    for lane in by_length:
        own_lanes[lane[2]].append(lane)
    heights = {
        depth: sum(box.height + _GAP_Y for box in column) + _LANE * len(own_lanes[depth]) for depth, column in columns.items()
    }
    lane_y = {}
    for depth, column in columns.items():
        y = PADDING + (max(heights.values()) - heights[depth]) / 2
        for box in column:
            box.x, box.y = PADDING + (deepest - depth) * (BOX_WIDTH + _GAP_X), y
            y += box.height + _GAP_Y
        for lane in own_lanes[depth]:
            lane_y[lane] = y
            y += _LANE
    return lane_y


def _arrows_to(
    box: Box, boxes: Mapping[ArtifactRef, Box], depths: Mapping[ArtifactRef, int], lane_y: Mapping[_Lane, float]
) -> list[Arrow]:
    roles = box.node.roles

    def enters_at(ref: ArtifactRef) -> float:
        """Height of the last point before the box, so that arrows do not cross in front of it."""
        lane = lane_y.get((ref, box.node.ref, depths[box.node.ref] + 1))
        return boxes[ref].y + boxes[ref].height / 2 if lane is None else lane

    arrows = []
    for position, ref in enumerate(sorted(roles, key=enters_at)):
        end_y = box.y + box.height * (position + 1) / (len(roles) + 1)
        start = boxes[ref]
        points = [(start.x + BOX_WIDTH, start.y + start.height / 2)]
        for depth in range(depths[ref] - 1, depths[box.node.ref], -1):
            x = start.x + (depths[ref] - depth) * (BOX_WIDTH + _GAP_X)
            points += [(x, lane_y[ref, box.node.ref, depth]), (x + BOX_WIDTH, lane_y[ref, box.node.ref, depth])]
        points.append((box.x, end_y))
        arrows.append(Arrow(_curve(points), ", ".join(roles[ref]), box.x - 10, end_y - 5))
    return arrows


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Level at each point, bent between columns, straight along lanes."""
    parts = [f"M {points[0][0]:.1f} {points[0][1]:.1f}"]
    for number, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        if number % 2:
            parts.append(f"L {x1:.1f} {y1:.1f}")
        else:
            middle = (x0 + x1) / 2
            parts.append(f"C {middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}")
    return " ".join(parts)


def box_lines(node: LineageNode) -> tuple[str, ...]:
    """What stands in a box below the name: counts, the metrics that tell most, costs."""
    if node.record is None:
        return ("not in this store",)
    lines = [f"{value:,} {name}" for name, value in list(node.record.counts.items())[:_SHOWN_COUNTS]]
    shown = [name for name in telling_metrics(node.record.metrics) if _tells_most(name)] or list(node.record.metrics)[:1]
    lines += [f"{name.partition('/')[2] or name}: {node.record.metrics[name]:.4g}" for name in shown[:_SHOWN_METRICS]]
    lines += cost_text(node.record.costs).split(", ")
    return tuple(shortened(line) for line in lines if line)


def telling_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Names of metrics, those that tell most first: accuracies, the loss, then the others as they come."""
    return sorted(metrics, key=lambda name: (not name.startswith("evaluate/"), name != "train/loss"))


def _tells_most(name: str) -> bool:
    return name.startswith("evaluate/") or name == "train/loss"


def shortened(text: str) -> str:
    """A text that fits a box."""
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
