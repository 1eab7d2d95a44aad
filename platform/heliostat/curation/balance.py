"""Balance: take about equally many images of every cluster, by water-filling.

Pour `target` images over the clusters as water over columns: every cluster fills up to one common level c, or to its own
size if that is lower (arXiv 2405.15613, one level of its hierarchy).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import DataError

# Shapes: N images, K clusters.

AUTO_MEAN_RATIO = 2.0
"""`auto` cuts clusters at this many times the mean size of the clusters that hold images (assumption, not studied)."""


def water_level(sizes_K: NDArray[np.int64], target: int) -> tuple[int, int]:
    """Largest level c with sum(min(c, size)) <= target, and the remainder that is left to hand out above c.

    With target >= sum(sizes) the level is the largest size and the remainder 0. Exact: sizes are sorted once.
    """
    if target < 0:
        raise DataError(f"target_images {target} is negative; ask for 0 or more")
    if len(sizes_K) == 0 or target >= int(sizes_K.sum()):
        return (int(sizes_K.max()) if len(sizes_K) else 0), 0
    ascending = np.sort(sizes_K)
    below = np.r_[0, np.cumsum(ascending)[:-1]]
    higher = len(ascending) - np.arange(len(ascending))
    # Filling the j smallest clusters wholly leaves level (target - below_j) // higher_j for the rest; the first j whose level
    # is below the next size is the answer.
    levels = (target - below) // higher
    first = int(np.flatnonzero(levels < ascending)[0])
    level = int(levels[first])
    return level, target - int(np.minimum(sizes_K, level).sum())


def cluster_quotas(sizes_K: NDArray[np.int64], target: int, *, seed: int) -> NDArray[np.int64]:
    """Images to take of each cluster: the level, plus one for `remainder` random clusters above the level."""
    level, remainder = water_level(sizes_K, target)
    quotas_K = np.minimum(sizes_K, level).astype(np.int64)
    above = np.flatnonzero(sizes_K > level)
    lucky = np.random.default_rng([seed, 1]).permutation(above)[:remainder]
    quotas_K[lucky] += 1
    return quotas_K


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


def balanced_sample(assignment_N: NDArray[np.int64], num_clusters: int, target: int, *, seed: int) -> NDArray[np.bool_]:
    """True for the images to keep: each cluster's quota, drawn at random from `seed`.

    assignment_N: int64 in 0..num_clusters-1. min(target, N) images are kept.
    """
    sizes_K = np.bincount(assignment_N, minlength=num_clusters).astype(np.int64)
    quotas_K = cluster_quotas(sizes_K, target, seed=seed)
    shuffled = np.random.default_rng([seed, 2]).permutation(len(assignment_N))
    by_cluster = shuffled[np.argsort(assignment_N[shuffled], kind="stable")]
    cluster = assignment_N[by_cluster]
    place = np.arange(len(by_cluster)) - np.r_[0, np.cumsum(sizes_K)[:-1]][cluster]
    kept_N = np.zeros(len(assignment_N), np.bool_)
    kept_N[by_cluster[place < quotas_K[cluster]]] = True
    return kept_N
