"""Copies: components of the copy graph, one representative of each by quality, and the guard against chains.

Everything is decided from stored edges and vectors, so another threshold needs no new join. Components are labelled over the
files of edges; then the members of components of two and more images, and the edges among them, are shuffled so that every
component lies whole in one partition, and a task settles each partition (settle.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.components import components_of_files
from heliostat.curation.copies_config import CopyLimits
from heliostat.curation.copies_shuffle import (
    ROWS_PER_STRIP,
    RowFacts,
    SendEdges,
    SendMembers,
    member_record,
    nearest_of_edges,
    partitions_of,
    send,
)
from heliostat.curation.edges import NO_EDGES, RECORD, Edges, edge_keys, read_edges
from heliostat.curation.products import exact_similarities
from heliostat.curation.settle import settle, similarities_of_edges
from heliostat.curation.slices import read_slices, write_slices
from heliostat.curation.strips import strips_of
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Vectors
from heliostat.errors import DataError, UsageError
from heliostat.storage import Store

# Shapes: N rows of the pool, M members of components with two images or more.

_SETTLED = np.dtype([("row", "<i8"), ("representative", "<i8"), ("similarity", "<f4"), ("unguarded", "<i8"), ("hops", "<i4")])


@dataclass(frozen=True)
class CopyResult:
    """Which images are copies of which. Arrays have one entry per row of the pool.

    component: int64, numbered 0, 1, ... by the quality of their representatives, best first; -1 for rows that are not present.
    representative: int64, row of the image that stays for the component; the row itself for rows that are not present.
    similarity_to_representative: float32, 1 for the representative itself, NaN where it is not known (`components_at`).
    unguarded: int64, what the representative would be without the guard.
    hops: int32, edges on the way to that one.
    nearest: int64, row of the nearest other image among the stored edges, -1 if there is none.
    nearest_similarity: float32, -1 where there is none.
    num_unknown: similarities to a representative that were not known and taken for less than the guard (`components_at`).
    """

    component: NDArray[np.int64]
    representative: NDArray[np.int64]
    similarity_to_representative: NDArray[np.float32]
    unguarded: NDArray[np.int64]
    hops: NDArray[np.int32]
    nearest: NDArray[np.int64]
    nearest_similarity: NDArray[np.float32]
    num_unknown: int = 0

    @property
    def dropped(self) -> NDArray[np.bool_]:
        """True for every image that another one represents."""
        return np.asarray(self.representative != np.arange(len(self.representative)), np.bool_)


@dataclass(frozen=True)
class _SettlePartition:
    """Task: representatives of the members of one partition."""

    work: Store
    member_keys: tuple[str, ...]
    edge_keys: tuple[str, ...]
    dimension: int
    guard: float

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        number = int(task["partition"])
        here = range(number, number + 1)
        members = read_slices(self.work, self.member_keys, here, member_record(self.dimension))
        found = read_slices(self.work, self.edge_keys, here, RECORD)
        rows = members["row"]  # ascending, as strips are
        edges = Edges(_positions(rows, found["node"]), _positions(rows, found["other"]), found["similarity"])
        vectors = np.ascontiguousarray(members["vector"])
        settled = settle(
            edges, members["rank"], self.guard, lambda some, others: exact_similarities(vectors, vectors, (some, others))
        )
        records = np.empty(len(rows), _SETTLED)
        records["row"], records["representative"] = rows, rows[settled.representative]
        records["similarity"], records["unguarded"] = settled.similarity, rows[settled.unguarded]
        records["hops"] = settled.hops
        write_slices(self.work, str(task["key"]), records, np.zeros(len(rows), np.int64), 1)
        return {"done": task["done"]}


def _positions(rows: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each wanted row is among ascending ones. Raises DataError when it is not."""
    position = np.searchsorted(rows, wanted)
    found = position < len(rows)
    found[found] = rows[position[found]] == wanted[found]
    if not found.all():
        raise DataError(f"an edge names row {int(wanted[~found][0])}, which has no vector; join these images again")
    return position


def find_copies(
    edges: tuple[Store, str],
    vectors: Vectors,
    quality_rank: NDArray[np.int64],
    limits: CopyLimits,
    *,
    edge_floor: float,
    work: Store,
    run: TaskMap,
    present: NDArray[np.bool_] | None = None,
) -> CopyResult:
    """Components of edges above limits.threshold, their representatives, and the guard at min_similarity_to_representative.

    edges: where `self_join` left them (store, prefix). vectors: those that were joined. quality_rank: (N,) int64, a
    permutation, 0 the best. present: bool (N,), rows that take part; all of them when left out. work: of this call alone.
    Raises UsageError for a threshold below `edge_floor`, under which no edges are stored.
    """
    check_inputs(vectors.num_rows, quality_rank, limits.threshold, edge_floor)
    files, prefix = edges
    label = components_of_files(files, prefix, len(quality_rank), threshold=limits.threshold, work=work, run=run)
    partition, num_partitions = partitions_of(label)
    RowFacts(work).write(partition, quality_rank)
    edge_slices = send(
        SendEdges(files, work, max(1, num_partitions), limits.threshold),
        [{"file": key} for key in edge_keys(files, prefix)],
        work,
        run,
        name="edges",
    )
    result = _alone(len(quality_rank))
    for key in edge_slices:
        _take_nearest(result, read_slices(work, [f"{key}-nearest"], range(1), RECORD))
    if num_partitions:
        strips = strips_of(vectors, ROWS_PER_STRIP)
        members = send(
            SendMembers(vectors, work, num_partitions), [{"strip": one} for one in strips], work, run, name="members"
        )
        function = _SettlePartition(
            work, tuple(members), tuple(edge_slices), vectors.dimension, limits.min_similarity_to_representative
        )
        settled = send(function, [{"partition": number} for number in range(num_partitions)], work, run, name="settled")
        for key in settled:
            records = read_slices(work, [key], range(1), _SETTLED)
            rows = records["row"]
            result.representative[rows], result.unguarded[rows] = records["representative"], records["unguarded"]
            result.similarity_to_representative[rows], result.hops[rows] = records["similarity"], records["hops"]
    number_components(result, quality_rank, present)
    return result


def components_at(
    edges: tuple[Store, str],
    quality_rank: NDArray[np.int64],
    limits: CopyLimits,
    *,
    edge_floor: float,
    present: NDArray[np.bool_] | None = None,
) -> CopyResult:
    """`find_copies` from the edges alone, in this process: what another threshold would do.

    Equal to it when the guard is not below `edge_floor` and every pair above the floor is stored, because a pair that is not
    stored then fails the guard in either case. It can differ where the join missed a pair, where an image has more similar ones
    than are stored for it, and where the guard lies below the floor; num_unknown counts the pairs for which that is possible.
    """
    check_inputs(len(quality_rank), quality_rank, limits.threshold, edge_floor)
    files, prefix = edges
    parts = [read_edges(files, key) for key in edge_keys(files, prefix)]
    stored = Edges(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))) if parts else NO_EDGES
    num_images = len(quality_rank)
    guard = limits.min_similarity_to_representative
    settled = settle(stored.above(limits.threshold), quality_rank, guard, similarities_of_edges(stored, num_images))
    result = _alone(num_images)
    _take_nearest(result, nearest_of_edges(stored)[0])
    result = CopyResult(
        result.component,
        settled.representative,
        settled.similarity,
        settled.unguarded,
        settled.hops,
        result.nearest,
        result.nearest_similarity,
        settled.num_unknown,
    )
    number_components(result, quality_rank, present)
    return result


def check_inputs(num_rows: int, quality_rank: NDArray[np.int64], threshold: float, edge_floor: float) -> None:
    """Raise DataError for ranks that are not a permutation of the rows, UsageError for a threshold below the floor."""
    if len(quality_rank) != num_rows:
        raise DataError(f"{num_rows} vectors for {len(quality_rank)} images; rank every image of the pool once")
    seen = np.zeros(num_rows, np.bool_)
    seen[quality_rank[(quality_rank >= 0) & (quality_rank < num_rows)]] = True
    if not seen.all():
        raise DataError(f"quality_rank is not an order of the {num_rows} images; use each of 0 to {num_rows - 1} once")
    if threshold < edge_floor:
        raise UsageError(
            f"copies.threshold {threshold:g} is below join.edge_floor {edge_floor:g}, from which on edges are stored; raise it"
        )


def _alone(num_rows: int) -> CopyResult:
    """Every image its own component."""
    return CopyResult(
        component=np.full(num_rows, -1, np.int64),
        representative=np.arange(num_rows),
        similarity_to_representative=np.ones(num_rows, np.float32),
        unguarded=np.arange(num_rows),
        hops=np.zeros(num_rows, np.int32),
        nearest=np.full(num_rows, -1, np.int64),
        nearest_similarity=np.full(num_rows, -1.0, np.float32),
    )


def _take_nearest(result: CopyResult, records: NDArray[Any]) -> None:
    """Enter what is nearer than what is there; of equals the smaller row. Every node is in `records` once."""
    node, other, similarity = records["node"], records["other"], records["similarity"]
    before, row_before = result.nearest_similarity[node], result.nearest[node]
    better = (similarity > before) | ((similarity == before) & (other < row_before))
    result.nearest[node[better]], result.nearest_similarity[node[better]] = other[better], similarity[better]


def number_components(result: CopyResult, quality_rank: NDArray[np.int64], present: NDArray[np.bool_] | None) -> None:
    """Enter the numbers of the components, by the rank of their representatives."""
    rows = np.arange(len(quality_rank)) if present is None else np.flatnonzero(present)
    has_component = np.zeros(len(quality_rank), np.bool_)
    ranks = quality_rank[result.representative[rows]]
    has_component[ranks] = True
    result.component[rows] = (np.cumsum(has_component) - 1)[ranks]
