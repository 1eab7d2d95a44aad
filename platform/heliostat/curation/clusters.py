"""Clusters: k-means over embeddings, and how evenly the images lie in them."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.index import kmeans

# Shapes: N images, K clusters, D dimension.

MAX_AUTO_CLUSTERS = 100_000  # DINOv2 A uses this many for 744M images


@dataclass(frozen=True)
class Clusters:
    """A partition of images. centroids: float32, L2-normalised; assignment: int64 in 0..K-1."""

    centroids: NDArray[np.float32]
    assignment: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Images per cluster; zero is possible."""
        return np.bincount(self.assignment, minlength=len(self.centroids)).astype(np.int64)


def resolve_num_clusters(num_clusters: int | Literal["auto"], num_images: int) -> int:
    """`auto` becomes the rounded square root of the number of images, in 1..100,000 (assumption, not studied)."""
    if num_clusters == "auto":
        return max(1, min(MAX_AUTO_CLUSTERS, round(math.sqrt(num_images))))
    return num_clusters


def assign_clusters(
    embeddings: NDArray[np.float32], num_clusters: int | Literal["auto"], *, iterations: int, seed: int
) -> Clusters:
    """Cluster (N, D) embeddings. Raises DataError when there are fewer images than clusters."""
    k = resolve_num_clusters(num_clusters, len(embeddings))
    centroids_KD, assignment_N = kmeans(embeddings, k, iterations=iterations, seed=seed)
    return Clusters(centroids_KD, assignment_N)


def evenness(sizes_K: NDArray[np.int64]) -> float:
    """Entropy of the cluster sizes over its maximum: 1 when all clusters are equal, 0 when one holds every image.

    A single cluster, or no image at all, counts as 1.
    """
    total = int(sizes_K.sum())
    if len(sizes_K) < 2 or total == 0:
        return 1.0
    return entropy(sizes_K) / math.log(len(sizes_K))


def entropy(sizes_K: NDArray[np.int64]) -> float:
    """Shannon entropy of the cluster sizes, in nats."""
    filled = sizes_K[sizes_K > 0].astype(np.float64)
    if len(filled) == 0:
        return 0.0
    share = filled / filled.sum()
    return float(-(share * np.log(share)).sum())
