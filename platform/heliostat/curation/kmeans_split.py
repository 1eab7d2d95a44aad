"""k-means into more clusters than every image can be compared with: coarse clusters first, then each split on its own.

With k = 10M (the finest level that arXiv 2405.15613 publishes for web images) one flat assignment of 743M images of 1,024
numbers takes 1.5e19 operations. Coarse clusters and 100 children of each take a thousandth of that. An image belongs to the
closest child of its coarse cluster, which need not be the closest of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.curation.assignment import (
    ASSIGN_TASKS,
    Assignment,
    assign,
    assignment_room,
    checked,
    cosine_to,
    nearest_centroid,
    unit,
)
from heliostat.curation.kmeans import Seeding, kmeans, refill_empty, remove
from heliostat.curation.seeding import seed_centroids
from heliostat.curation.slices import DONE, read_slices, write_slices
from heliostat.curation.subsets import block_key, block_ranges
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Block, Vectors, read_array, write_array
from heliostat.curation.water import cluster_quotas
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of the pool, n vectors of a coarse cluster, C coarse clusters, k clusters in all, D dimension.

CHILDREN = 100
"""Clusters into which a coarse one is split, on average (arXiv 2405.15613: 100,000 times 100)."""

ROWS_PER_TASK = 1_000_000
"""Vectors that one task splits, about: 2 GiB of float16 at 1,024 dimensions."""


def lloyd(vectors_nD: torch.Tensor, k: int, *, iterations: int, generator: np.random.Generator) -> torch.Tensor:
    """(k, D) centroids of vectors in memory, seeded as by k-means++ with all draws in at most 16 passes."""
    centroids_kD = unit(vectors_nD)[torch.from_numpy(seed_centroids(vectors_nD, k, rounds=min(k, 16), generator=generator))]
    for _ in range(iterations):
        cluster_n, _ = nearest_centroid(vectors_nD, centroids_kD)
        sums_kD = torch.zeros(centroids_kD.shape, dtype=torch.float64, device=vectors_nD.device)
        sums_kD.index_add_(0, cluster_n, vectors_nD.double())
        sizes_k = torch.bincount(cluster_n, minlength=k)
        lengths_k = sums_kD.norm(dim=1)
        filled_k = (sizes_k > 0) & (lengths_k > 0)
        moved_kD = torch.where(filled_k[:, None], sums_kD / lengths_k.clamp(min=1e-12)[:, None], centroids_kD.double())
        refilled = refill_empty(moved_kD.float().cpu().numpy(), sizes_k.cpu().numpy().astype(np.float64))
        centroids_kD = torch.from_numpy(refilled).to(vectors_nD.device)
    return centroids_kD


def _record(dimension: int) -> np.dtype[Any]:
    return np.dtype([("row", "<i8"), ("coarse", "<i4"), ("vector", "<f2", (dimension,))])


@dataclass(frozen=True)
class _Sort:
    """Copies the vectors of some blocks, sorted by the task that will split their coarse cluster."""

    vectors: Vectors
    assigned: Store
    room: Store

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        key = block_key("sorted/", task["number"])
        if self.room.size(key + DONE) is None:
            ends = read_array(self.room, "ends.npy")  # of the coarse clusters of each splitting task
            found = read_array(self.assigned, block_key("rows/", task["number"]))
            records = np.empty(len(found), _record(self.vectors.dimension))
            records["row"], records["coarse"] = found["row"], found["cluster"]
            blocks = [self.vectors.read(number).vectors for number in range(task["first"], task["end"])]
            records["vector"] = np.concatenate(blocks)
            destination = np.searchsorted(ends, records["coarse"], side="right")
            write_slices(self.room, key, records, destination, len(ends))
        return {}


@dataclass(frozen=True)
class _Split:
    """Splits some neighbouring coarse clusters, and writes the centroids and where each of their images went."""

    room: Store
    num_sorted: int
    dimension: int
    iterations: int
    seed: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        number = task["number"]
        if self.room.size(block_key("children/", number)) is None:
            keys = [block_key("sorted/", source) for source in range(self.num_sorted)]
            records = read_slices(self.room, keys, range(number, number + 1), _record(self.dimension))
            records = records[np.argsort(records["coarse"], kind="stable")]  # rows ascend within each
            centroids, children = self._split(records, read_array(self.room, "firsts.npy"))
            write_array(self.room, block_key("centroids/", number), centroids)
            write_array(self.room, block_key("children/", number), children)
        return {}

    def _split(self, records: NDArray[Any], firsts: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """firsts: (C + 1,) the number of the first child of every coarse cluster."""
        children = np.empty(len(records), [("row", "<i8"), ("cluster", "<i4"), ("similarity", "<f4")])
        children["row"] = records["row"]
        centroids = [np.empty((0, self.dimension), np.float32)]
        coarse, starts = np.unique(records["coarse"], return_index=True)
        for one, start, stop in zip(coarse, starts, np.r_[starts[1:], len(records)], strict=True):
            vectors_nD = checked(Block(records["row"][start:stop], records["vector"][start:stop]), int(one))
            generator = np.random.default_rng([self.seed, 5, int(one)])
            count = int(firsts[one + 1] - firsts[one])
            found_kD = lloyd(vectors_nD, count, iterations=self.iterations, generator=generator)
            cluster_n, _ = nearest_centroid(vectors_nD, found_kD)
            children["cluster"][start:stop] = cluster_n.cpu().numpy() + firsts[one]
            children["similarity"][start:stop] = cosine_to(vectors_nD, found_kD, cluster_n)
            centroids.append(found_kD.cpu().numpy())
        return np.concatenate(centroids), children


def kmeans_in_two_steps(
    vectors: Vectors,
    k: int,
    *,
    iterations: int,
    seed: int,
    work: Store,
    run: TaskMap,
    rows: NDArray[np.int64],
    seeding: Seeding = "auto",
    rows_per_centroid: int = 256,
    children: int = CHILDREN,
    rows_per_task: int = ROWS_PER_TASK,
) -> tuple[NDArray[np.float32], Assignment]:
    """Exactly k centroids (k, D), and the assignment of all rows to the closest child of their coarse cluster.

    Coarse clusters get equally many children, fewer only where they have fewer images. Arguments as in `kmeans`. Writes the
    vectors once more into `work`, and deletes them at the end. Raises DataError when k is not in 1..number of vectors.
    """
    if not 1 <= k <= len(rows):
        raise DataError(
            f"{k} clusters are not in 1..{len(rows)}, the number of images; lower clusters.levels or set it to auto"
        )
    num_coarse = -(-k // children)
    coarse_CD = kmeans(
        vectors,
        num_coarse,
        iterations=iterations,
        seed=seed,
        work=work,
        run=run,
        seeding=seeding,
        rows_per_centroid=rows_per_centroid,
        rows=rows,
    )
    cluster_N = assign(vectors, coarse_CD, name="coarse", work=work, run=run).cluster
    sizes_C = np.bincount(cluster_N[cluster_N >= 0], minlength=num_coarse).astype(np.int64)
    room = work.child(f"split-{k}")
    firsts = np.r_[0, np.cumsum(cluster_quotas(sizes_C, k, seed=seed))]
    ends = _ends(sizes_C, rows_per_task)
    write_array(room, "firsts.npy", firsts)
    write_array(room, "ends.npy", ends)
    ranges = block_ranges(vectors.num_blocks, ASSIGN_TASKS)
    if any(room.size(block_key("children/", number)) is None for number in range(len(ends))):
        sorting = [{"number": number, "first": first, "end": end} for number, (first, end) in enumerate(ranges)]
        sort = _Sort(vectors, assignment_room(work, "coarse", vectors, coarse_CD), room)
        for _ in run(sort, sorting, label="sort by cluster"):
            pass
        split = _Split(room, len(ranges), vectors.dimension, iterations, seed)
        for _ in run(split, [{"number": number} for number in range(len(ends))], label="split clusters"):
            pass
    remove(room, "sorted/")
    return _collect(room, len(ends), vectors.num_rows)


def _ends(sizes_C: NDArray[np.int64], rows_per_task: int) -> NDArray[np.int64]:
    """The coarse cluster before which each splitting task ends: about `rows_per_task` vectors each."""
    task_C = (np.cumsum(sizes_C) - 1) // rows_per_task
    return np.append(np.flatnonzero(np.diff(task_C) > 0) + 1, len(sizes_C)).astype(np.int64)


def _collect(room: Store, num_tasks: int, num_rows: int) -> tuple[NDArray[np.float32], Assignment]:
    cluster_N, similarity_N = np.full(num_rows, -1, np.int32), np.zeros(num_rows, np.float32)
    for number in range(num_tasks):
        found = read_array(room, block_key("children/", number))
        cluster_N[found["row"]], similarity_N[found["row"]] = found["cluster"], found["similarity"]
    centroids = [read_array(room, block_key("centroids/", number)) for number in range(num_tasks)]
    return np.concatenate(centroids), Assignment(cluster_N, similarity_N)
