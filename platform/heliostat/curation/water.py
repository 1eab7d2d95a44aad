"""Water-filling: like water poured into a row of columns, every cluster fills up to one common level or to its own size."""

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import DataError

# Shapes: K clusters.


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
