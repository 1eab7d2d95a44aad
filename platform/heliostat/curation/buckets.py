"""The self-join that scales out: similar images meet in overlapping buckets, and every bucket is a task of its own.

    1. centroids are fitted on a sample;
    2. a task per strip writes each vector to the slices of its `overlap` nearest centroids;
    3. a task per group of buckets reads its slices, compares all members of a bucket, and writes the pairs.

There is no index and no service: every task reads objects that never change and writes one. With buckets of constant size the
cost grows linearly with the images. A bucket that is too large is split within its task by centroids of its own, which makes
the tree two levels deep from `max_buckets` x `max_bucket_rows` members on. Two similar images are missed when they share no
bucket; the audit measures how often.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.curation.copies_config import JoinConfig
from heliostat.curation.edges import write_pairs
from heliostat.curation.index import kmeans
from heliostat.curation.products import NO_PAIRS, Operand, Pairs, best_of_either, concatenated, operand, similar_pairs
from heliostat.curation.slices import DONE, read_slices, run_missing, slice_counts, write_slices
from heliostat.curation.strips import sample_rows, strip_operand, strips_of
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Block, Vectors, read_array, write_array
from heliostat.storage import Store

# Shapes: N images, C centroids, D dimension, m overlap.

SAMPLES_PER_CENTROID = 64
"""Vectors per centroid in the sample that the centroids are fitted on (FAISS warns below 39)."""

ITERATIONS = 8
"""Lloyd iterations: buckets need to be even, not optimal (assumption, not studied)."""

ASSIGNED_AT_ONCE = 4096
"""Vectors assigned in one product: 256 MiB of similarities to 16,384 centroids."""


def bucket_record(dimension: int) -> np.dtype[Any]:
    """A vector on its way to a bucket."""
    return np.dtype([("row", "<i8"), ("bucket", "<i4"), ("vector", "<f2", (dimension,))])


def nearest_centroids(vectors_ND: NDArray[np.float16], centroids_CD: NDArray[np.float32], overlap: int) -> NDArray[np.int64]:
    """(N, m) the most similar centroids of each vector, no order among them; all of them where there are fewer than m.

    float32 products on every hardware. A last bit may make two kinds of hardware choose differently between two centroids,
    which changes where a pair is looked for and never its similarity.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    centroids = torch.from_numpy(centroids_CD).to(device)
    nearest = np.empty((len(vectors_ND), min(overlap, len(centroids))), np.int64)
    for start in range(0, len(vectors_ND), ASSIGNED_AT_ONCE):
        stored = torch.from_numpy(np.ascontiguousarray(vectors_ND[start : start + ASSIGNED_AT_ONCE]))
        product = stored.to(device).float() @ centroids.T
        nearest[start : start + len(stored)] = product.topk(nearest.shape[1], dim=1, sorted=False).indices.cpu().numpy()
    return nearest


def fit_centroids(sample: NDArray[np.float16], num_centroids: int, seed: int) -> NDArray[np.float32]:
    """(C, D) centroids, no more than there are vectors in the sample."""
    count = min(num_centroids, len(sample))
    return kmeans(sample.astype(np.float32), count, iterations=ITERATIONS, seed=seed)[0]


@dataclass(frozen=True)
class AssignStrip:
    """Task: the vectors of one strip, by bucket."""

    vectors: Vectors
    work: Store
    overlap: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        centroids = read_array(self.work, "centroids.npy")
        strip = strip_operand(self.vectors, (task["strip"][0], task["strip"][1]))
        nearest = nearest_centroids(strip.stored, centroids, self.overlap)
        position = np.repeat(np.arange(len(strip)), nearest.shape[1])
        bucket = nearest.ravel()
        order = np.argsort(bucket, kind="stable")
        position, bucket = position[order], bucket[order]
        records = np.empty(len(bucket), bucket_record(self.vectors.dimension))
        records["row"], records["bucket"], records["vector"] = strip.rows[position], bucket, strip.stored[position]
        write_slices(self.work, str(task["key"]), records, bucket, len(centroids))
        return {"done": task["done"]}


@dataclass(frozen=True)
class JoinBuckets:
    """Task: the pairs within each bucket of a range of buckets."""

    vectors_num_rows: int
    dimension: int
    work: Store
    sources: tuple[str, ...]
    config: JoinConfig
    first_new_row: int
    seed: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        buckets = range(task["buckets"][0], task["buckets"][1])
        members = read_slices(self.work, self.sources, buckets, bucket_record(self.dimension))
        members = members[np.argsort(members["bucket"], kind="stable")]  # rows stay ascending, as sources are
        cuts = np.searchsorted(members["bucket"], np.arange(buckets.start, buckets.stop + 1))
        found = []
        for start, stop in itertools.pairwise(cuts):
            own = members[start:stop]
            found.append(self._pairs(operand(Block(own["row"].astype(np.int64), own["vector"]), "bucket")))
        pairs = distinct_pairs(concatenated(found))
        pairs = best_of_either(pairs, self.config.neighbors)
        key, config = str(task["key"]), self.config
        write_pairs(self.work, key, pairs, num_rows=self.vectors_num_rows, rows_per_range=config.rows_per_range)
        return {"done": task["done"]}

    def _pairs(self, members: Operand) -> Pairs:
        """Pairs of the members of a bucket, at least one of each new; split first when there are too many."""
        if not len(members) or int(members.rows[-1]) < self.first_new_row:
            return NO_PAIRS
        if len(members) > self.config.max_bucket_rows:
            children = self._children(members)
            if children:
                return distinct_pairs(concatenated([self._pairs(child) for child in children]))
        floor, neighbors = self.config.floor, self.config.neighbors
        split = int(np.searchsorted(members.rows, self.first_new_row))
        old, new = _part(members, slice(0, split)), _part(members, slice(split, None))
        pairs = [similar_pairs(new, new, floor, neighbors=neighbors, same=True)]
        if len(old):
            pairs.append(similar_pairs(old, new, floor, neighbors=neighbors, same=False))
        return concatenated(pairs)

    def _children(self, members: Operand) -> list[Operand]:
        """Smaller overlapping buckets; none when the members cannot be told apart, as when all are one image."""
        count = -(-len(members) // self.config.bucket_rows)
        generator = np.random.default_rng([self.seed, len(members), int(members.rows[0])])
        drawn = np.sort(generator.choice(len(members), min(len(members), count * SAMPLES_PER_CENTROID), replace=False))
        centroids = fit_centroids(members.stored[drawn], count, self.seed)
        nearest = nearest_centroids(members.stored, centroids, self.config.overlap)
        position = np.repeat(np.arange(len(members)), nearest.shape[1])
        order = np.argsort(nearest.ravel(), kind="stable")
        cuts = np.searchsorted(nearest.ravel()[order], np.arange(1, len(centroids)))
        children = [position[some] for some in np.split(order, cuts)]
        if max(len(child) for child in children) > 0.8 * len(members):
            return []
        return [_part(members, np.sort(child)) for child in children if len(child)]


def _part(members: Operand, which: slice | NDArray[np.int64]) -> Operand:
    positions = torch.from_numpy(which).to(members.fast.device) if isinstance(which, np.ndarray) else which
    return Operand(members.rows[which], members.stored[which], members.fast[positions])


def distinct_pairs(pairs: Pairs) -> Pairs:
    """Every pair once, the smaller row first."""
    low, high = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
    order = np.lexsort((high, low))
    low, high, similarity = low[order], high[order], pairs.similarity[order]
    fresh = np.ones(len(low), np.bool_)
    fresh[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return Pairs(low[fresh], high[fresh], similarity[fresh])


def bucket_join(
    vectors: Vectors, *, work: Store, pieces: str, config: JoinConfig, run: TaskMap, first_new_row: int, seed: int
) -> None:
    """Leave the pairs found in every bucket as pieces for `merge_edges`."""
    if not any(info.key == "centroids.npy" for info in work.list("centroids.npy")):
        count = max(1, min(config.max_buckets, -(-vectors.num_rows // config.bucket_rows)))
        sample = sample_rows(vectors, count * SAMPLES_PER_CENTROID, seed=seed).vectors
        if not len(sample):
            return
        write_array(work, "centroids.npy", fit_centroids(sample, count, seed))
    num_buckets = len(read_array(work, "centroids.npy"))
    strips = strips_of(vectors, config.rows_per_strip)
    sources = tuple(f"assigned/{number:06d}" for number in range(len(strips)))
    tasks: list[Mapping[str, Any]] = [
        {"strip": strip, "key": key, "done": key + DONE} for strip, key in zip(strips, sources, strict=True)
    ]
    assign = AssignStrip(vectors, work, config.overlap)
    run_missing(run, assign, tasks, store=work, prefix="assigned/", label="buckets")
    groups = group_buckets(slice_counts(work, sources, num_buckets), config.rows_per_task)
    tasks = []
    for start, stop in groups:
        key = f"{pieces}{start:06d}"
        tasks.append({"buckets": [start, stop], "key": key, "done": key + DONE})
    join = JoinBuckets(vectors.num_rows, vectors.dimension, work, sources, config, first_new_row, seed)
    run_missing(run, join, tasks, store=work, prefix=pieces, label="bucket join")


def group_buckets(counts: NDArray[np.int64], rows_per_task: int) -> list[tuple[int, int]]:
    """Neighbouring buckets (start, stop) with no more than `rows_per_task` members together, one bucket at least."""
    groups: list[tuple[int, int]] = []
    start, total = 0, 0
    for bucket, count in enumerate(counts.tolist()):
        if bucket > start and total + count > rows_per_task:
            groups.append((start, bucket))
            start, total = bucket, 0
        total += count
    groups.append((start, len(counts)))
    return groups
