"""The walk from an artifact along its inputs, and the tree as text."""

from collections.abc import Iterator
from dataclasses import dataclass

from heliostat.artifacts import ArtifactRecord, ArtifactRef, ArtifactStore
from heliostat.costs import add_costs
from heliostat.errors import ArtifactNotFoundError


@dataclass(frozen=True)
class LineageNode:
    """One artifact in a lineage tree; `record` is None when it is not in this store."""

    role: str
    ref: ArtifactRef
    record: ArtifactRecord | None
    inputs: tuple["LineageNode", ...]


def lineage(artifacts: ArtifactStore, ref: ArtifactRef, role: str = "") -> LineageNode:
    """Walk from an artifact to everything it was made from."""
    found = artifacts.find(ref)
    if found is None and not role:
        raise ArtifactNotFoundError(f"no artifact {ref} in {artifacts.store.uri}")
    inputs = found.record.inputs if found else {}
    children = tuple(lineage(artifacts, ArtifactRef.parse(target), name) for name, target in sorted(inputs.items()))
    return LineageNode(role, ref, found.record if found else None, children)


def render_lineage(node: LineageNode) -> list[str]:
    """The tree as lines of text, inputs indented below what was made from them; what was shown before is not unfolded again."""
    return _render(node, "", "", set())


def distinct(node: LineageNode) -> Iterator[LineageNode]:
    """Every artifact of the tree once, what was made last first."""
    seen: set[ArtifactRef] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop(0)
        if one.ref not in seen:
            seen.add(one.ref)
            yield one
            waiting += one.inputs


def total_costs(node: LineageNode) -> dict[str, float]:
    """What all training in the tree has cost, each artifact counted once; empty where nothing was counted."""
    return add_costs(one.record.costs for one in distinct(node) if one.record is not None and one.record.costs)


def _render(node: LineageNode, prefix: str, branch: str, shown: set[ArtifactRef]) -> list[str]:
    role = f"{node.role}: " if node.role else ""
    counts = ", ".join(f"{value:,} {name}" for name, value in (node.record.counts if node.record else {}).items())
    repeated = node.ref in shown and bool(node.inputs)
    shown.add(node.ref)
    note = (
        "  (not in this store)" if node.record is None else "  (see above)" if repeated else f"  [{counts}]" if counts else ""
    )
    lines = [f"{prefix}{branch}{role}{node.ref}{note}"]
    if repeated:
        return lines
    inner = prefix + ("" if not branch else "   " if branch.startswith("└") else "│  ")
    for position, child in enumerate(node.inputs):
        lines += _render(child, inner, "└─ " if position == len(node.inputs) - 1 else "├─ ", shown)
    return lines
