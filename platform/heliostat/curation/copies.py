"""Copies: a graph of similar images, its connected components, one representative of each, and the guard against chains."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.curation.config import CopyLimits
from heliostat.curation.index import neighbors
from heliostat.errors import DataError

# Shapes: N images, E edges of the copy graph, K neighbours, R reference images, D dimension.

LOSSLESS_FORMATS = frozenset({"png", "bmp", "tiff", "ppm", "pgm"})
"""Formats that lost nothing at their last save. webp may be either and counts as lossy; gif loses colours."""


@dataclass(frozen=True)
class CopyResult:
    """Which images are copies of which. All arrays have one entry per image.

    component: int64, components are numbered 0, 1, ... by the quality of their representatives, best first.
    representative: int64, row of the image that stays for the component.
    similarity_to_representative: float32, 1 for the representative itself.
    nearest: int64, row of the nearest other image, -1 if there is none; a copy only if its similarity is above the threshold.
    nearest_similarity: float32, -1 where there is none.
    num_split_components: components that the guard split.
    num_saved: images that stay only because the guard split them off.
    """

    component: NDArray[np.int64]
    representative: NDArray[np.int64]
    similarity_to_representative: NDArray[np.float32]
    nearest: NDArray[np.int64]
    nearest_similarity: NDArray[np.float32]
    num_split_components: int
    num_saved: int

    @property
    def dropped(self) -> NDArray[np.bool_]:
        """True for every image that another one represents."""
        return np.asarray(self.representative != np.arange(len(self.representative)), np.bool_)


def quality_order(quality: pa.Table) -> NDArray[np.int64]:
    """Rank of each image, 0 the best: most pixels, then a lossless format, then most bytes, then smallest id.

    quality: columns id, width, height, format, bytes. Never the order of arrival. Known limit: an enlarged copy has more pixels
    than its original and wins.
    """
    pixels_N = quality["width"].to_numpy().astype(np.int64) * quality["height"].to_numpy()
    lossy_N = np.array([name.lower() not in LOSSLESS_FORMATS for name in quality["format"].to_pylist()], dtype=np.bool_)
    bytes_N = quality["bytes"].to_numpy().astype(np.int64)
    ids_N = np.array(quality["id"].to_pylist(), dtype=np.str_)
    best_first = np.lexsort((ids_N, -bytes_N, lossy_N, -pixels_N))
    rank_N = np.empty(len(best_first), np.int64)
    rank_N[best_first] = np.arange(len(best_first))
    return rank_N


def connected_components(num_nodes: int, edges_E2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Label every node with the smallest node of its component.

    Hooking and pointer jumping on whole arrays: every edge hangs the larger of its two roots under the smaller, then every
    label jumps to its root; rounds grow with the logarithm of the longest chain (measured: 5-6 rounds for 40M nodes).
    Labels do not depend on the order of the edges, so components of separate shards of edges merge by labelling again.
    """
    label = np.arange(num_nodes, dtype=np.int64)
    first, second = edges_E2[:, 0], edges_E2[:, 1]
    while True:
        low, high = np.minimum(label[first], label[second]), np.maximum(label[first], label[second])
        open_edges = low != high
        if not open_edges.any():
            return label
        first, second = first[open_edges], second[open_edges]
        np.minimum.at(label, high[open_edges], low[open_edges])
        while not np.array_equal(jumped := label[label], label):
            label = jumped


def copy_edges(similarities_NK: NDArray[np.float32], ids_NK: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """Edges (E, 2) of the copy graph: pairs above the threshold, itself and padding left out."""
    rows, ranks = np.nonzero((similarities_NK > threshold) & (ids_NK >= 0))
    others = ids_NK[rows, ranks]
    distinct = rows != others
    return np.stack([rows[distinct], others[distinct]], axis=1).astype(np.int64)


def _nearest_other(
    similarities_NK: NDArray[np.float32], ids_NK: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Nearest neighbour that is not the image itself, with its similarity; -1 and -1 where there is none."""
    rows = np.arange(len(ids_NK))
    if ids_NK.size == 0:
        return np.full(len(rows), -1, np.int64), np.full(len(rows), -1.0, np.float32)
    other = (ids_NK != rows[:, None]) & (ids_NK >= 0)
    column = other.argmax(axis=1)
    found = other[rows, column]
    nearest = np.where(found, ids_NK[rows, column], -1)
    return nearest, np.where(found, similarities_NK[rows, column], -1.0).astype(np.float32)


def _best_of_component(label_N: NDArray[np.int64], rank_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row of the best-ranked image of each image's component."""
    best_rank = np.full(len(label_N), len(label_N), np.int64)
    np.minimum.at(best_rank, label_N, rank_N)
    row_of_rank = np.empty(len(label_N), np.int64)
    row_of_rank[rank_N] = np.arange(len(label_N))
    return row_of_rank[best_rank[label_N]]


def split_chains(
    embeddings_ND: NDArray[np.float32], edges_E2: NDArray[np.int64], rank_N: NDArray[np.int64], guard: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Representative row and similarity to it of every image, such that no similarity is below `guard`.

    Each round takes the components of the images left, keeps what is near enough to the best image, and leaves the rest to the
    next round with the edges among themselves. Every round settles at least one image of every component, so it ends.
    """
    num_images = len(embeddings_ND)
    representative_N = np.arange(num_images, dtype=np.int64)
    similarity_N = np.ones(num_images, np.float32)
    rows = np.arange(num_images)
    while len(edges_E2):
        best = _best_of_component(connected_components(num_images, edges_E2), rank_N)[rows]
        similarity = np.einsum("nd,nd->n", embeddings_ND[rows], embeddings_ND[best])
        settled = (similarity >= guard) | (best == rows)
        representative_N[rows[settled]] = best[settled]
        similarity_N[rows[settled]] = np.where(best == rows, 1.0, similarity)[settled]
        left = np.zeros(num_images, np.bool_)
        left[rows[~settled]] = True
        rows = rows[~settled]
        edges_E2 = edges_E2[left[edges_E2].all(axis=1)]
    return representative_N, similarity_N


def find_copies(
    embeddings: NDArray[np.float32], quality: pa.Table, limits: CopyLimits, *, num_neighbors: int = 64
) -> CopyResult:
    """Find the copies among images: k-NN graph, components, representatives by quality, guard against chains.

    embeddings: (N, D) float32, L2-normalised; quality: N rows as in `quality_order`. A group of more than `num_neighbors`
    copies stays connected only as far as its k-NN graph does, which is why exact duplicates are removed first.
    """
    num_images = len(embeddings)
    if num_images != quality.num_rows:
        raise DataError(f"{num_images} embeddings for {quality.num_rows} images; embed every image of the manifest once")
    rank_N = quality_order(quality)
    similarities_NK, ids_NK = neighbors(embeddings, embeddings, num_neighbors + 1)  # an image finds itself too
    edges_E2 = copy_edges(similarities_NK, ids_NK, limits.threshold)
    unguarded_N = _best_of_component(connected_components(num_images, edges_E2), rank_N)
    representative_N, similarity_N = split_chains(embeddings, edges_E2, rank_N, limits.min_similarity_to_representative)
    own_N = np.arange(num_images)
    saved = (representative_N == own_N) & (unguarded_N != own_N)
    nearest_N, nearest_similarity_N = _nearest_other(similarities_NK, ids_NK)
    _, component_N = np.unique(rank_N[representative_N], return_inverse=True)
    return CopyResult(
        component=component_N.astype(np.int64),
        representative=representative_N,
        similarity_to_representative=similarity_N,
        nearest=nearest_N,
        nearest_similarity=nearest_similarity_N,
        num_split_components=len(np.unique(unguarded_N[representative_N != unguarded_N])),
        num_saved=int(saved.sum()),
    )


@dataclass(frozen=True)
class Contamination:
    """Which images show evaluation images. dropped: bool; reference: int64 row of the nearest reference (-1 if there are no
    references); similarity: float32 similarity to it (-1 likewise)."""

    dropped: NDArray[np.bool_]
    reference: NDArray[np.int64]
    similarity: NDArray[np.float32]


def decontaminate(
    embeddings: NDArray[np.float32],
    references: NDArray[np.float32],
    threshold: float = 0.45,
    *,
    component: NDArray[np.int64] | None = None,
) -> Contamination:
    """Drop every image above `threshold` to a reference, with its whole component (DINOv2 A: 0.45 on SSCD embeddings).

    embeddings: (N, D); references: (R, D); component: (N,) from `find_copies`, each image alone when it is left out.
    """
    num_images = len(embeddings)
    component_N = np.arange(num_images) if component is None else component
    if len(references) == 0 or num_images == 0:
        nothing = np.zeros(num_images, np.bool_)
        return Contamination(nothing, np.full(num_images, -1, np.int64), np.full(num_images, -1.0, np.float32))
    similarities_N1, ids_N1 = neighbors(embeddings, references, 1)
    touched = np.unique(component_N[similarities_N1[:, 0] > threshold])
    return Contamination(np.isin(component_N, touched), ids_N1[:, 0], similarities_N1[:, 0])
