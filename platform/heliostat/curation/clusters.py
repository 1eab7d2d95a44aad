"""Numbers about clusters: how many to make, and how evenly images lie in them."""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_CURVE_POINTS = 200

# Shapes: K clusters.

MAX_AUTO_CLUSTERS = 100_000
"""Clusters DINOv2 A makes of 744M images."""

IMAGES_PER_AUTO_CLUSTER = 7_440
"""744M over 100,000: what `auto` gives each cluster of a large pool."""

IMAGES_PER_FINEST_CLUSTER = 75
"""743M images over 10M clusters of level 1 (arXiv 2405.15613), rounded."""

LEVEL_RATIOS = (20, 10, 5)
"""Level 1 over level 2, and so on: 10M, 500k, 50k, 10k (arXiv 2405.15613)."""

MIN_HIERARCHY_IMAGES = 100_000
"""Below this `auto` makes one level: a second one would have a handful of clusters (assumption, not studied)."""

MIN_LEVEL_CLUSTERS = 50
"""A level of fewer clusters is left out by `auto` (assumption, not studied)."""


def resolve_num_clusters(num_clusters: int | Literal["auto"], num_images: int) -> int:
    """The number given. `auto` is the rounded root of the number of images, or a 7,440th of it if that is more, in
    1..100,000."""
    if num_clusters != "auto":
        return num_clusters
    wanted = max(math.sqrt(num_images), num_images / IMAGES_PER_AUTO_CLUSTER)
    return max(1, min(MAX_AUTO_CLUSTERS, round(wanted)))


def resolve_levels(
    levels: tuple[int, ...] | Literal["auto"], num_clusters: int | Literal["auto"], num_images: int
) -> tuple[int, ...]:
    """Clusters per level, the finest first; for `auto` see ClustersConfig.levels."""
    if levels != "auto":
        return levels
    if num_clusters != "auto":
        return (num_clusters,)
    if num_images < MIN_HIERARCHY_IMAGES:
        return (max(1, round(math.sqrt(num_images))),)
    resolved = [round(num_images / IMAGES_PER_FINEST_CLUSTER)]
    for ratio in LEVEL_RATIOS:
        if resolved[-1] / ratio < MIN_LEVEL_CLUSTERS:
            break
        resolved.append(round(resolved[-1] / ratio))
    return tuple(resolved)


def entropy(sizes_K: NDArray[np.int64]) -> float:
    """Shannon entropy of the cluster sizes, in nats."""
    filled = sizes_K[sizes_K > 0].astype(np.float64)
    if len(filled) == 0:
        return 0.0
    share = filled / filled.sum()
    return float(-(share * np.log(share)).sum())


def evenness(sizes_K: NDArray[np.int64]) -> float:
    """Entropy of the cluster sizes over its maximum: 1 when all clusters are equal, 0 when one holds every image.

    A single cluster, or no image at all, counts as 1.
    """
    total = int(sizes_K.sum())
    if len(sizes_K) < 2 or total == 0:
        return 1.0
    return entropy(sizes_K) / math.log(len(sizes_K))


def gini(sizes_K: NDArray[np.int64]) -> float:
    """Gini coefficient of the cluster sizes: 0 when all are equal, near 1 when one holds every image; 0 without images."""
    total = float(sizes_K.sum())
    if total == 0:
        return 0.0
    ascending = np.sort(sizes_K).astype(np.float64)
    places = np.arange(1, len(ascending) + 1)
    return float((2 * places - len(ascending) - 1) @ ascending / (len(ascending) * total))


def size_statistics(sizes_K: NDArray[np.int64]) -> dict[str, Any]:
    """How even clusters are, JSON-ready: counts, entropy in nats, evenness, Gini, and the sizes as a curve.

    curve: at most 200 of the sizes, evenly spaced among the sorted ones, largest first.
    """
    ordered, count = np.sort(sizes_K)[::-1], len(sizes_K)
    spaced = np.unique(np.linspace(0, count - 1, min(count, _CURVE_POINTS)).astype(np.int64)) if count else ordered[:0]
    return {
        "num_images": int(ordered.sum()),
        "num_clusters": count,
        "num_empty": int((ordered == 0).sum()),
        "largest": int(ordered[0]) if count else 0,
        "smallest": int(ordered[-1]) if count else 0,
        "entropy_nats": entropy(sizes_K),
        "evenness": evenness(sizes_K),
        "gini": gini(sizes_K),
        "curve": ordered[spaced].astype(np.int64).tolist(),
    }
