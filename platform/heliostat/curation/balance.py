"""Balanced sampling: take more evenly from large and small clusters, down a hierarchy of them.

Like water poured into a row of columns: every cluster fills up to one common level c, or to its own size if that is lower. From
the top level of a hierarchy down, each cluster's share is poured into its own children in the same way (arXiv 2405.15613).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.clusters import size_statistics
from heliostat.curation.hierarchy import Hierarchy
from heliostat.curation.retrieval_config import BalanceConfig
from heliostat.curation.subsets import first_of_each, place_in_group, row_keys
from heliostat.curation.water import cluster_quotas

# Shapes: N images, K clusters, P clusters of the level above (parents).

AUTO_MEAN_RATIO = 2.0
"""`auto` cuts clusters at this many times the mean size of the clusters that hold images (assumption, not studied)."""


def share_among_children(
    sizes_K: NDArray[np.int64], parent_K: NDArray[np.int32], quota_P: NDArray[np.int64], *, seed: int, purpose: str
) -> NDArray[np.int64]:
    """(K,) int64: `cluster_quotas` of every parent's children, for all parents at once.

    sizes_K: images of each child, 0 where it has no parent (parent -1). quota_P: at most the sum of the children's sizes.
    """
    children = np.flatnonzero(parent_K >= 0)
    order = children[np.lexsort((sizes_K[children], parent_K[children]))]
    parent, size = parent_K[order], sizes_K[order]
    place = place_in_group(parent)
    num_children = np.bincount(parent, minlength=len(quota_P))[parent]
    before = np.cumsum(size) - size  # of all smaller children, and of all parents before
    below = before - before[np.arange(len(order)) - place]
    levels = (quota_P[parent] - below) // (num_children - place)
    level_P = np.full(len(quota_P), np.iinfo(np.int64).max)
    cut = np.flatnonzero(levels < size)
    first = cut[place_in_group(parent[cut]) == 0]
    level_P[parent[first]] = levels[first]
    quotas = np.minimum(size, level_P[parent])
    given_P = np.zeros(len(quota_P), np.int64)
    np.add.at(given_P, parent, quotas)
    above = np.flatnonzero(size > quotas)
    keys = row_keys(order[above], seed=seed, purpose=purpose)
    lucky = first_of_each(parent[above], [keys], (quota_P - given_P)[parent[above]])
    quotas[above[lucky]] += 1
    shared_K = np.zeros(len(sizes_K), np.int64)
    shared_K[order] = quotas
    return shared_K


def resolve_target(target: int | Literal["auto", "all"], sizes_K: NDArray[np.int64]) -> int:
    """The number of images to keep: given, all of them, or what remains when clusters end at twice their mean size."""
    total = int(sizes_K.sum())
    if target == "all":
        return total
    if target == "auto":
        filled = sizes_K[sizes_K > 0]
        cut = int(np.ceil(AUTO_MEAN_RATIO * filled.mean())) if len(filled) else 0
        return int(np.minimum(sizes_K, cut).sum())
    return min(target, total)


@dataclass(frozen=True)
class Balanced:
    """kept: (N,) bool. target: images kept. levels: JSON-ready, per level its number, its clusters, and
    `size_statistics` before and after."""

    kept: NDArray[np.bool_]
    target: int
    levels: list[dict[str, Any]]


def balance(hierarchy: Hierarchy, config: BalanceConfig, *, seed: int) -> Balanced:
    """Choose exactly min(target, images) images: shares flow from the top level down, then images are drawn within level 1.

    Every draw follows from `seed` and the number of the row or cluster. An absent row is never kept.
    """
    sizes = hierarchy.sizes()
    target = resolve_target(config.target_images, sizes[0])
    quotas_K = cluster_quotas(sizes[-1], target, seed=seed)
    for level in range(hierarchy.num_levels - 1, 0, -1):
        parent_K = hierarchy.parents[level - 1]
        quotas_K = share_among_children(sizes[level - 1], parent_K, quotas_K, seed=seed, purpose=f"balance of level {level}")
    rows = np.flatnonzero(hierarchy.cluster >= 0)
    order_by: list[NDArray[Any]] = [row_keys(rows, seed=seed, purpose="balance")]
    if config.sampling == "closest":
        order_by = [-hierarchy.similarity[rows], *order_by]
    cluster = hierarchy.cluster[rows]
    kept_N = np.zeros(len(hierarchy.cluster), np.bool_)
    kept_N[rows[first_of_each(cluster, order_by, quotas_K[cluster])]] = True
    after = hierarchy.sizes(kept_N)
    levels = [
        {"level": level, "num_clusters": len(size), "before": size_statistics(size), "after": size_statistics(left)}
        for level, (size, left) in enumerate(zip(sizes, after, strict=True), start=1)
    ]
    return Balanced(kept_N, target, levels)
