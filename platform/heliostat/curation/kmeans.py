"""Spherical k-means over more vectors than fit into memory, as tasks that may be repeated, killed and reordered.

An iteration is one pass of `_Sum` tasks over the blocks and one of `_Average` tasks over ranges of centroids. Sums are of the
float16 values in float64, which is exact up to 2^29 vectors a cluster: their order, and how the blocks are split among tasks,
cannot change a bit. Centroids are written after every iteration, and a killed run goes on from there.

Seeding that scales: the first centroids come from a sample of the vectors, by D^2 sampling as in k-means++ (Arthur and
Vassilvitskii 2007), several draws per pass as in k-means|| (Bahmani et al. 2012, arXiv 1203.6402). Lloyd's iterations run on at
most `rows_per_centroid` vectors for each centroid, as FAISS does.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.curation.assignment import checked, device, nearest_centroid, unit
from heliostat.curation.seeding import seed_centroids
from heliostat.curation.subsets import block_key, block_ranges, copy_rows, draw_rows, present_rows
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Vectors, read_all, read_array, write_array
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of the pool, n rows of a block, S rows seeding draws from, K centroids, D dimension.

Seeding = Literal["auto", "kmeans++", "sample", "random"]

ROWS_PER_CENTROID = 256
"""Vectors per centroid that Lloyd's iterations look at, at most (FAISS's default, Clustering.h)."""

SEEDING_ROWS_PER_CENTROID = 16
"""Vectors per centroid that `sample` seeding draws from (assumption; benchmarks/clusters.py compares the outcome)."""

SEEDING_ROUNDS = 256
"""Passes of `sample` seeding; each draws K / 256 centroids (assumption; k-means|| uses 5 to 10 with many more draws)."""

EXACT_SEEDING_MAX_PRODUCTS = 2**24
"""`auto` seeds by plain k-means++ up to this many vectors x centroids: below a second on one core."""

SUM_TASKS = 64
"""Tasks of one iteration, at most: each writes K x D sums, so more of them would cost more bytes than they save time."""

VALUES_PER_RANGE = 2**24
"""Sums in one object: 128 MiB of float64."""

ROWS_AT_ONCE = 8192
"""Vectors widened to float64 at once."""

SPLIT = 1 / 1024
"""Relative step by which the centroid of a large cluster is split for an empty one (as FAISS)."""


@dataclass(frozen=True)
class _Seed:
    """Chooses the first centroids, where the products are fast."""

    vectors: Vectors
    room: Store
    k: int
    seed: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.room.size(_centroids_key(0)) is None:
            vectors_SD = checked(read_all(self.vectors), 0)
            generator = np.random.default_rng([self.seed, 4])
            rows = np.arange(self.k)
            if task["rounds"]:
                rows = seed_centroids(vectors_SD, self.k, rounds=task["rounds"], generator=generator)
            write_array(self.room, _centroids_key(0), unit(vectors_SD[torch.from_numpy(rows)]).cpu().numpy())
        return {}


@dataclass(frozen=True)
class _Sum:
    """Assigns some blocks and writes, per range of centroids, the sums of their vectors and in a last column their number."""

    vectors: Vectors
    room: Store
    num_ranges: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        prefix = f"sums/{task['iteration']:04d}/{task['number']:06d}-"
        # The last range is written last: where it is, all are.
        if self.room.size(block_key(prefix, self.num_ranges - 1)) is None:
            sums_KD = self._sums(read_array(self.room, _centroids_key(task["iteration"])), task["first"], task["end"])
            for number, (start, stop) in enumerate(block_ranges(len(sums_KD), self.num_ranges)):
                write_array(self.room, block_key(prefix, number), sums_KD[start:stop])
        return {}

    def _sums(self, centroids: NDArray[np.float32], first: int, end: int) -> NDArray[np.float64]:
        centroids_KD = torch.from_numpy(centroids).to(device())
        sums_KD = torch.zeros(centroids.shape, dtype=torch.float64, device=device())
        sizes_K = torch.zeros(len(centroids), dtype=torch.float64, device=device())
        for number in range(first, end):
            vectors_nD = checked(self.vectors.read(number), number)
            cluster_n, _ = nearest_centroid(vectors_nD, centroids_KD)
            sizes_K += torch.bincount(cluster_n, minlength=len(centroids))
            for start in range(0, len(vectors_nD), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                sums_KD.index_add_(0, cluster_n[rows], vectors_nD[rows].double())
        return torch.cat([sums_KD, sizes_K[:, None]], dim=1).cpu().numpy()


@dataclass(frozen=True)
class _Average:
    """Adds the sums of one range of centroids and writes the new ones, with the number of vectors of each in a last column."""

    room: Store
    num_sums: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        iteration, number = task["iteration"], task["number"]
        key = block_key(f"averages/{iteration:04d}/", number)
        if self.room.size(key) is None:
            total = read_array(self.room, block_key(f"sums/{iteration:04d}/{0:06d}-", number))
            for other in range(1, self.num_sums):
                total += read_array(self.room, block_key(f"sums/{iteration:04d}/{other:06d}-", number))
            lengths = np.linalg.norm(total[:, :-1], axis=1, keepdims=True)
            total[:, :-1] /= np.maximum(lengths, 1e-12)
            write_array(self.room, key, total.astype(np.float32 if total[:, -1].max() < 2**24 else np.float64))
        return {}


def _centroids_key(iteration: int) -> str:
    return f"centroids/{iteration:04d}.npy"


def refill_empty(centroids_KD: NDArray[np.float32], sizes_K: NDArray[np.float64]) -> NDArray[np.float32]:
    """Empty clusters take half of the largest ones: both centroids move apart by a step of `SPLIT`.

    The largest cluster is split first, the lowest number of equal ones, each at most once in an iteration. What only repeats
    one vector cannot be split and stays as it is: the copy is empty again.
    """
    empty = np.flatnonzero(sizes_K == 0)
    largest = np.lexsort((np.arange(len(sizes_K)), -sizes_K))[: len(empty)]
    largest = largest[sizes_K[largest] > 1]
    empty = empty[: len(largest)]
    step_D = np.where(np.arange(centroids_KD.shape[1]) % 2 == 0, 1 + SPLIT, 1 - SPLIT).astype(np.float32)
    refilled_KD = centroids_KD.copy()
    refilled_KD[empty] = centroids_KD[largest] * step_D
    refilled_KD[largest] = centroids_KD[largest] * (2 - step_D)
    changed = np.r_[empty, largest]
    refilled_KD[changed] /= np.maximum(np.linalg.norm(refilled_KD[changed], axis=1, keepdims=True), 1e-12)
    return refilled_KD


def kmeans(
    vectors: Vectors,
    k: int,
    *,
    iterations: int,
    seed: int,
    work: Store,
    run: TaskMap,
    seeding: Seeding = "auto",
    rows_per_centroid: int = ROWS_PER_CENTROID,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Centroids (k, D) float32, L2-normalised, after at most `iterations` of Lloyd's; fewer when nothing moves any more.

    rows: the rows that have a vector, when the caller knows them; otherwise one more pass finds them. work: keeps the state of
    this fit under a name made of its settings, so fits of other settings or pools of another size may share it. Raises
    DataError when k is not in 1..number of vectors, or a vector is not finite.
    """
    present = present_rows(vectors, work=work.child("present"), run=run) if rows is None else rows
    if not 1 <= k <= len(present):
        raise DataError(
            f"{k} clusters are not in 1..{len(present)}, the number of images; lower num_clusters or set it to auto"
        )
    settings = [k, iterations, seed, seeding, rows_per_centroid, len(present), vectors.num_blocks, vectors.dimension]
    room = work.child(f"kmeans-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}")
    if room.size("centroids.npy") is None:
        fitted, fitted_rows = vectors, present
        if len(present) > k * rows_per_centroid:
            fitted_rows = draw_rows(present, k * rows_per_centroid, seed=seed, purpose="k-means")
            fitted = copy_rows(vectors, fitted_rows, work=room, prefix="sample/", run=run)
            fitted_rows = np.arange(len(fitted_rows))
        _seed(fitted, fitted_rows, k, seeding, seed=seed, room=room, run=run)
        write_array(room, "centroids.npy", _iterate(fitted, k, iterations, room=room, run=run))
        for prefix in ("sample/", "seeding/", "centroids/", "sums/", "averages/"):
            remove(room, prefix)
    return read_array(room, "centroids.npy")


def _seed(fitted: Vectors, rows: NDArray[np.int64], k: int, seeding: Seeding, *, seed: int, room: Store, run: TaskMap) -> None:
    """Write the first centroids."""
    if _iteration_reached(room) is not None:
        return
    if seeding == "auto":
        seeding = "kmeans++" if len(rows) * k <= EXACT_SEEDING_MAX_PRODUCTS else "sample"
    count = {"kmeans++": len(rows), "sample": k * SEEDING_ROWS_PER_CENTROID, "random": k}[seeding]
    drawn = draw_rows(rows, count, seed=seed, purpose="seeding")
    if len(drawn) < len(rows):
        fitted = copy_rows(fitted, drawn, work=room, prefix="seeding/", run=run)
    rounds = {"kmeans++": k, "sample": min(k, SEEDING_ROUNDS), "random": 0}[seeding]
    for _ in run(_Seed(fitted, room, k, seed), [{"rounds": rounds}], label="first centroids"):
        pass


def _iteration_reached(room: Store) -> int | None:
    numbers = [int(found[1]) for info in room.list("centroids/") if (found := re.search(r"(\d+)\.npy$", info.key))]
    return max(numbers, default=None)


def _iterate(fitted: Vectors, k: int, iterations: int, *, room: Store, run: TaskMap) -> NDArray[np.float32]:
    """Lloyd's iterations, from the one that an earlier run reached."""
    reached = _iteration_reached(room) or 0
    centroids_KD = read_array(room, _centroids_key(reached))
    blocks = block_ranges(fitted.num_blocks, SUM_TASKS)
    num_ranges = min(k, -(-k * (fitted.dimension + 1) // VALUES_PER_RANGE))
    for iteration in range(reached, iterations):
        tasks = [{"iteration": iteration, "number": n, "first": first, "end": end} for n, (first, end) in enumerate(blocks)]
        for _ in run(_Sum(fitted, room, num_ranges), tasks, label=f"k-means, iteration {iteration + 1} of {iterations}"):
            pass
        ranges = [{"iteration": iteration, "number": number} for number in range(num_ranges)]
        for _ in run(_Average(room, len(blocks)), ranges, label=f"centroids, iteration {iteration + 1} of {iterations}"):
            pass
        averages = [read_array(room, block_key(f"averages/{iteration:04d}/", number)) for number in range(num_ranges)]
        sizes_K = np.concatenate([average[:, -1] for average in averages]).astype(np.float64)
        moved_KD = np.concatenate([average[:, :-1] for average in averages]).astype(np.float32)
        # A cluster that lost every vector, or whose vectors cancel out, stays where it was until it is refilled.
        lost = (sizes_K == 0) | (np.abs(moved_KD).max(axis=1) == 0)
        moved_KD[lost] = centroids_KD[lost]
        moved_KD = refill_empty(moved_KD, sizes_K)
        unchanged = np.array_equal(moved_KD, centroids_KD)
        write_array(room, _centroids_key(iteration + 1), moved_KD)
        centroids_KD = moved_KD
        for prefix in (f"sums/{iteration:04d}/", f"averages/{iteration:04d}/", _centroids_key(iteration)):
            remove(room, prefix)
        if unchanged:
            break
    return centroids_KD


def remove(room: Store, prefix: str) -> None:
    """Delete every object below a prefix."""
    for info in list(room.list(prefix)):
        room.delete(info.key)
