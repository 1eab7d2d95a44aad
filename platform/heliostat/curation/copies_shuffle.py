"""The shuffle before copies are settled: members and edges of a component meet in one partition.

What a task needs to know of every row, its partition and its rank, lies in pieces of a million rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.edges import RECORD, Edges, read_edges
from heliostat.curation.slices import DONE, run_missing, write_slices
from heliostat.curation.strips import read_strip
from heliostat.curation.tasks import TaskFunction, TaskMap
from heliostat.curation.vectors import Vectors, read_array, write_array
from heliostat.storage import Store

# Shapes: N rows of the pool, M members of components with two images or more.

MEMBERS_PER_PARTITION = 200_000
"""Members settled by one task: 200 MiB of vectors at 512. A component is never cut, so a larger one makes a larger task."""

ROWS_PER_STRIP = 262_144
"""Rows whose vectors one task sends to their partitions."""

ROWS_PER_PIECE = 1 << 20
"""Rows in one object of what tasks need to know of each row."""


@dataclass(frozen=True)
class RowFacts:
    """What tasks know of rows: partition int32 (-1 for rows alone) and rank int64, in pieces."""

    work: Store

    def write(self, partition: NDArray[np.int32], rank: NDArray[np.int64]) -> None:
        for number, start in enumerate(range(0, len(rank), ROWS_PER_PIECE)):
            write_array(self.work, f"facts/partition-{number:06d}.npy", partition[start : start + ROWS_PER_PIECE])
            write_array(self.work, f"facts/rank-{number:06d}.npy", rank[start : start + ROWS_PER_PIECE])

    def read(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The values of ascending rows."""
        if not len(rows):
            return np.empty(0, np.int64)
        pieces = range(int(rows[0]) // ROWS_PER_PIECE, int(rows[-1]) // ROWS_PER_PIECE + 1)
        values = [read_array(self.work, f"facts/{name}-{number:06d}.npy") for number in pieces]
        return np.asarray(np.concatenate(values)[rows - pieces.start * ROWS_PER_PIECE])


def member_record(dimension: int) -> np.dtype[Any]:
    """A member on its way to its partition."""
    return np.dtype([("row", "<i8"), ("rank", "<i8"), ("vector", "<f2", (dimension,))])


@dataclass(frozen=True)
class SendMembers:
    """Task: the vectors of the members in one strip, to their partitions."""

    vectors: Vectors
    work: Store
    num_partitions: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        rows, values = read_strip(self.vectors, (task["strip"][0], task["strip"][1]))
        facts = RowFacts(self.work)
        partition = facts.read("partition", rows)
        inside = np.flatnonzero(partition >= 0)
        records = np.empty(len(inside), member_record(self.vectors.dimension))
        records["row"], records["vector"] = rows[inside], values[inside]
        records["rank"] = facts.read("rank", rows)[inside]
        write_slices(self.work, str(task["key"]), records, partition[inside].astype(np.int64), self.num_partitions)
        return {"done": task["done"]}


@dataclass(frozen=True)
class SendEdges:
    """Task: the edges of one file above the threshold, to their partitions; and the nearest of every image in that file."""

    files: Store
    work: Store
    num_partitions: int
    threshold: float

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        edges = read_edges(self.files, str(task["file"]))
        write_slices(self.work, f"{task['key']}-nearest", *nearest_of_edges(edges), 1)
        above = edges.above(self.threshold)
        records = np.empty(above.num_edges, RECORD)
        records["node"], records["other"], records["similarity"] = above
        partition = RowFacts(self.work).read("partition", above.first).astype(np.int64)
        write_slices(self.work, str(task["key"]), records, partition, self.num_partitions)
        return {"done": task["done"]}


def nearest_of_edges(edges: Edges) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(T,) records of every touched node with its most similar other one, of equals the smaller row; and T zeros."""
    records = np.empty(2 * edges.num_edges, RECORD)
    records["node"] = np.concatenate([edges.first, edges.second])
    records["other"] = np.concatenate([edges.second, edges.first])
    records["similarity"] = np.concatenate([edges.similarity, edges.similarity])
    records = records[np.lexsort((records["other"], -records["similarity"], records["node"]))]
    best = np.ones(len(records), np.bool_)
    best[1:] = records["node"][1:] != records["node"][:-1]
    return records[best], np.zeros(int(best.sum()), np.int64)


def partitions_of(label: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """(N,) int32 partition of every row in a component of two or more, -1 for others; and how many partitions there are."""
    size = np.bincount(label, minlength=len(label))
    size[size < 2] = 0
    before = np.cumsum(size) - size
    partition_of_label = np.where(size > 0, before // MEMBERS_PER_PARTITION, -1)
    used, compact = np.unique(partition_of_label[size > 0], return_inverse=True)
    partition_of_label[size > 0] = compact
    return partition_of_label[label].astype(np.int32), len(used)


def send(
    function: TaskFunction,
    tasks: Sequence[Mapping[str, Any]],
    work: Store,
    run: TaskMap,
    *,
    name: str,
) -> list[str]:
    """Run the tasks that are not done yet; returns the key of each."""
    keys = [f"{name}/{number:06d}" for number in range(len(tasks))]
    named = [{**task, "key": key, "done": key + DONE} for task, key in zip(tasks, keys, strict=True)]
    run_missing(run, function, named, store=work, prefix=f"{name}/", label=name)
    return keys
