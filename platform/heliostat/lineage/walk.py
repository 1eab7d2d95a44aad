"""The walk from an artifact along its inputs, and the tree as text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from heliostat.artifacts import ArtifactRecord, ArtifactRef, ArtifactStore
from heliostat.costs import add_costs
from heliostat.errors import ArtifactError, ArtifactNotFoundError


@dataclass(frozen=True)
class LineageNode:
    """One artifact, what it was made from by role; `record` is None when it is not in this store."""

    ref: ArtifactRef
    record: ArtifactRecord | None
    inputs: tuple[tuple[str, ArtifactRef], ...]

    @property
    def roles(self) -> dict[ArtifactRef, list[str]]:
        """Every input once, with its roles: one artifact can have several."""
        roles: dict[ArtifactRef, list[str]] = {}
        for role, ref in self.inputs:
            roles.setdefault(ref, []).append(role)
        return roles


@dataclass(frozen=True)
class Lineage:
    """An artifact and everything that it was made from, each artifact once, what was made last first."""

    ref: ArtifactRef
    nodes: Mapping[ArtifactRef, LineageNode]

    def depths(self) -> dict[ArtifactRef, int]:
        """Steps of the longest way from each artifact to the result."""
        depths = dict.fromkeys(self.nodes, 0)
        for ref in reversed(_inputs_first(self)):
            for child in self.nodes[ref].roles:
                depths[child] = max(depths[child], depths[ref] + 1)
        return depths


def lineage(artifacts: ArtifactStore, ref: ArtifactRef) -> Lineage:
    """Walk from an artifact to everything it was made from; inputs that are not in the store end the walk.

    Raises ArtifactNotFoundError where the artifact itself is missing, ArtifactError where records name each other in a circle.
    """
    nodes: dict[ArtifactRef, LineageNode] = {}
    waiting = [ref]
    while waiting:
        following: list[ArtifactRef] = []
        for one in waiting:
            if one in nodes:
                continue
            found = artifacts.find(one)
            inputs = found.record.inputs if found else {}
            nodes[one] = LineageNode(
                one,
                found.record if found else None,
                tuple((role, ArtifactRef.parse(target)) for role, target in sorted(inputs.items())),
            )
            following += [child for _, child in nodes[one].inputs]
        waiting = following
    if nodes[ref].record is None:
        raise ArtifactNotFoundError(f"no artifact {ref} in {artifacts.store.uri}")
    whole = Lineage(ref, nodes)
    try:
        _inputs_first(whole)
    except CycleError as error:
        circle = " -> ".join(str(one) for one in reversed(error.args[1]))
        raise ArtifactError(f"the records in {artifacts.store.uri} name each other as inputs: {circle}") from error
    return whole


def _inputs_first(whole: Lineage) -> list[ArtifactRef]:
    return list(TopologicalSorter({ref: list(node.roles) for ref, node in whole.nodes.items()}).static_order())


def render_lineage(whole: Lineage) -> list[str]:
    """The tree as lines of text, inputs indented below what was made from them; what was shown before is not unfolded again."""
    return list(_render(whole))


def total_costs(whole: Lineage) -> dict[str, float]:
    """What all training in the tree has cost, each artifact counted once; empty where nothing was counted."""
    records = [node.record for node in whole.nodes.values() if node.record is not None]
    return add_costs(record.costs for record in records if record.costs)


def _render(whole: Lineage) -> Iterator[str]:
    shown: set[ArtifactRef] = set()
    waiting = [("", whole.ref, "", "")]
    while waiting:
        role, ref, branch, prefix = waiting.pop()
        node = whole.nodes[ref]
        is_repeated = ref in shown and bool(node.inputs)
        shown.add(ref)
        yield f"{prefix}{branch}{role}{ref}{_note(node, is_repeated=is_repeated)}"
        if is_repeated:
            continue
        inner = prefix + ("" if not branch else "   " if branch.startswith("└") else "│  ")
        for position, (name, child) in enumerate(reversed(node.inputs)):
            waiting.append((f"{name}: ", child, "├─ " if position else "└─ ", inner))


def _note(node: LineageNode, *, is_repeated: bool) -> str:
    if node.record is None:
        return "  (not in this store)"
    if is_repeated:
        return "  (see above)"
    counts = ", ".join(f"{value:,} {name}" for name, value in node.record.counts.items())
    return f"  [{counts}]" if counts else ""
