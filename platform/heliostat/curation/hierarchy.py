"""Hierarchical k-means with resampling, written from the paper (Vo et al. 2024, arXiv 2405.15613).

Level 1 groups images, level t the centroids of level t - 1. Plain k-means puts many centroids where images are many. Resampling
undoes that: take a few members of every cluster, which are spread more evenly than the images, fit on those alone, assign
everything anew, and repeat. Level 1 is never in memory; the centroids of one level are.
"""

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.assignment import Assignment, assign
from heliostat.curation.clusters import resolve_levels
from heliostat.curation.kmeans import Seeding, kmeans
from heliostat.curation.kmeans_split import kmeans_in_two_steps
from heliostat.curation.retrieval_config import ClustersConfig
from heliostat.curation.subsets import copy_rows, first_of_each, present_rows, row_keys, store_vectors
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Vectors
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of the pool, S vectors of a level, K_t clusters of level t, D dimension.

RESAMPLING_ROUNDS = 10
RESAMPLING_SIZES = (1, 10, 5, 3)
"""Of the published configuration for web images, level 1 first, the last for all above. It resamples level 1 once with one
image of each cluster, which only moves each centroid to its closest image; so level 1 has 0 rounds here."""


@dataclass(frozen=True)
class Hierarchy:
    """Clusters of clusters.

    cluster: (N,) int32, the level-1 cluster of each row, -1 for absent rows. similarity: (N,) float32 to its centroid.
    centroids: per level, (K_t, D) float32. parents: per level but the last, (K_t,) int32 cluster of the next level, -1 for a
    cluster without images.
    """

    cluster: NDArray[np.int32]
    similarity: NDArray[np.float32]
    centroids: tuple[NDArray[np.float32], ...]
    parents: tuple[NDArray[np.int32], ...]

    @property
    def num_levels(self) -> int:
        return len(self.centroids)

    def clusters_of(self, level: int) -> NDArray[np.int32]:
        """(N,) int32: the cluster of each row at a level, 1 the finest; -1 for absent rows."""
        cluster_N = self.cluster
        for parent_K in self.parents[: level - 1]:
            cluster_N = np.where(cluster_N < 0, np.int32(-1), parent_K[cluster_N])
        return cluster_N

    def sizes(self, kept: NDArray[np.bool_] | None = None) -> list[NDArray[np.int64]]:
        """Images per cluster of every level, level 1 first. kept: (N,), counts these alone."""
        shown = self.cluster >= 0 if kept is None else kept & (self.cluster >= 0)
        sizes = [np.bincount(self.cluster[shown], minlength=len(self.centroids[0])).astype(np.int64)]
        for parent_K, centroids in zip(self.parents, self.centroids[1:], strict=True):
            filled = parent_K >= 0
            counted = np.zeros(len(centroids), np.int64)
            np.add.at(counted, parent_K[filled], sizes[-1][filled])
            sizes.append(counted)
        return sizes


def resolve_resampling(config: ClustersConfig, num_levels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(rounds, sizes) per level. DataError when fewer or more were given than there are levels."""
    rounds, sizes = config.resampling_rounds, config.resampling_sizes
    if rounds == "auto":
        rounds = (0, *[RESAMPLING_ROUNDS] * (num_levels - 1))
    if sizes == "auto":
        sizes = tuple(RESAMPLING_SIZES[min(level, len(RESAMPLING_SIZES) - 1)] for level in range(num_levels))
    for name, given in (("resampling_rounds", rounds), ("resampling_sizes", sizes)):
        if len(given) != num_levels:
            raise DataError(f"clusters.{name} has {len(given)} numbers for {num_levels} levels; give one per level or auto")
    return rounds, sizes


def members_for_refit(assignment: Assignment, size: int, config: ClustersConfig, *, seed: int) -> NDArray[np.int64]:
    """Rows of `size` members of every cluster, ascending: the closest to its centroid, or random ones."""
    rows = np.flatnonzero(assignment.cluster >= 0)
    order_by: list[NDArray[np.float32] | NDArray[np.uint64]] = [row_keys(rows, seed=seed, purpose="resampling")]
    if config.resampling == "closest":
        order_by = [-assignment.similarity[rows], *order_by]
    return rows[first_of_each(assignment.cluster[rows], order_by, size)]


def _fit_level(
    vectors: Vectors,
    k: int,
    config: ClustersConfig,
    *,
    rows: NDArray[np.int64],
    resampling: tuple[int, int],
    work: Store,
    run: TaskMap,
) -> tuple[NDArray[np.float32], Assignment]:
    """k-means, then `resampling` (rounds, members of each cluster): fit on a few members, assign all, again.

    Very many clusters without resampling are fitted in two steps.
    """
    num_rounds, size = resampling
    if k > config.split_above and num_rounds == 0:
        return kmeans_in_two_steps(vectors, k, **_settings(config), seed=config.seed, rows=rows, work=work, run=run)
    centroids_KD = _fit(vectors, k, config, seed=config.seed, rows=rows, work=work, run=run)
    assignment = assign(vectors, centroids_KD, name="all", work=work, run=run)
    for number in range(1, num_rounds + 1):
        room, seed = work.child(f"resampling-{number:03d}"), config.seed + number
        members = members_for_refit(assignment, size, config, seed=seed)
        if len(members) < k:  # many vectors are alike: fewer filled clusters than asked for, nothing to spread
            break
        few = copy_rows(vectors, members, work=room, prefix="members/", run=run)
        centroids_KD = _fit(few, k, config, seed=seed, rows=np.arange(len(members)), work=room, run=run)
        assignment = assign(vectors, centroids_KD, name="all", work=room, run=run)
    return centroids_KD, assignment


def _fit(
    vectors: Vectors, k: int, config: ClustersConfig, *, seed: int, rows: NDArray[np.int64], work: Store, run: TaskMap
) -> NDArray[np.float32]:
    return kmeans(vectors, k, **_settings(config), seed=seed, rows=rows, work=work, run=run)


class _Settings(TypedDict):
    iterations: int
    seeding: Seeding
    rows_per_centroid: int


def _settings(config: ClustersConfig) -> _Settings:
    return _Settings(iterations=config.iterations, seeding=config.seeding, rows_per_centroid=config.rows_per_centroid)


def hierarchy(
    vectors: Vectors, config: ClustersConfig, *, work: Store, run: TaskMap, rows: NDArray[np.int64] | None = None
) -> Hierarchy:
    """Cluster the vectors, their centroids, and so on upwards.

    rows: the rows that have a vector, when the caller knows them. work: of these vectors and this configuration alone; a
    repeated run goes on there. Raises DataError when there is no vector, or a level asks for more clusters than the level below
    filled.
    """
    present = present_rows(vectors, work=work.child("present"), run=run) if rows is None else rows
    if len(present) == 0:
        raise DataError("no image is left to cluster; loosen copies.threshold or retrieval, or add images")
    levels = resolve_levels(config.levels, config.num_clusters, len(present))
    resampling = list(zip(*resolve_resampling(config, len(levels)), strict=True))
    first, images = _fit_level(
        vectors, levels[0], config, rows=present, resampling=resampling[0], work=work.child("level-1"), run=run
    )
    centroids, parents = [first], list[NDArray[np.int32]]()
    for level, wanted in enumerate(levels[1:], start=2):
        below = parents[-1] if parents else images.cluster
        filled = np.unique(below[below >= 0])
        k = _checked_level(wanted, len(filled), level, chosen=config.levels != "auto")
        room = work.child(f"level-{level}")
        members = store_vectors(centroids[-1][filled], room, "below/")
        found, assignment = _fit_level(
            members, k, config, rows=np.arange(len(filled)), resampling=resampling[level - 1], work=room, run=run
        )
        parent_K = np.full(len(centroids[-1]), -1, np.int32)
        parent_K[filled] = assignment.cluster
        centroids.append(found)
        parents.append(parent_K)
    return Hierarchy(images.cluster, images.similarity, tuple(centroids), tuple(parents))


def _checked_level(wanted: int, num_filled: int, level: int, *, chosen: bool) -> int:
    """Clusters of a level above the first. `auto` takes what there is; a number that was chosen is refused."""
    if chosen and wanted > num_filled:
        raise DataError(
            f"clusters.levels asks for {wanted} clusters at level {level}, but only {num_filled} clusters below hold images; "
            "lower it, or set levels to auto"
        )
    return min(wanted, num_filled)
