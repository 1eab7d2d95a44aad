"""Representatives and the guard against chains, for the images of some whole components.

In a chain A is like B, B like C, and A unlike C. The guard keeps with the representative only what is similar enough to it;
what is left forms components of its own, each with its own representative, until every image is settled. Edges alone can
answer that when the guard lies at or above the smallest similarity stored: a pair that is not stored is less similar than that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.components import connected_components
from heliostat.curation.edges import Edges

# Shapes: M images of the components, E edges.

Similarities = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""Similarity of positions (m,) to positions (m,); NaN where it is not known."""


@dataclass(frozen=True)
class Settled:
    """Arrays over M images. representative, unguarded: int64 positions, with and without the guard; similarity: float32 to the
    representative, 1 for itself, NaN where it is not known; hops: int32 edges between the image and the unguarded
    representative; num_unknown: similarities asked for and not known, taken for less than the guard."""

    representative: NDArray[np.int64]
    similarity: NDArray[np.float32]
    unguarded: NDArray[np.int64]
    hops: NDArray[np.int32]
    num_unknown: int


def best_of_component(label_M: NDArray[np.int64], rank_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """(M,) position of the image with the smallest rank among those with the same label. Ranks are distinct."""
    order = np.argsort(rank_M)[::-1]
    best = np.empty(len(label_M), np.int64)
    best[label_M[order]] = order  # the last write wins: the smallest rank
    return best[label_M]


def settle(edges: Edges, rank_M: NDArray[np.int64], guard: float, similarities: Similarities) -> Settled:
    """Settle M images. edges: between their positions; rank: int64, distinct, smallest is best; guard: -1 switches it off.

    Each round takes the components of the images left, keeps what is near enough to the best of each, and leaves the rest to
    the next round with the edges among themselves. Every round settles at least one image of every component, so it ends.
    """
    num_images = len(rank_M)
    representative, unguarded = np.arange(num_images), np.arange(num_images)
    similarity, hops = np.ones(num_images, np.float32), np.zeros(num_images, np.int32)
    rows, first, second, num_unknown = np.arange(num_images), edges.first, edges.second, 0  # ends count among the rows left
    while len(rows):
        best = best_of_component(connected_components(len(rows), first, second), rank_M[rows])
        if len(rows) == num_images:
            unguarded, hops = best, _hops(first, second, best)
        own = best == np.arange(len(rows))
        to_best = np.ones(len(rows), np.float32)
        to_best[~own] = similarities(rows[~own], rows[best[~own]])
        num_unknown += int(np.isnan(to_best).sum())
        settled = (to_best >= np.float32(guard)) | own | (guard <= -1)
        representative[rows[settled]], similarity[rows[settled]] = rows[best[settled]], to_best[settled]
        left = ~settled
        position = np.cumsum(left) - 1
        among = left[first] & left[second]
        first, second, rows = position[first[among]], position[second[among]], rows[left]
    return Settled(representative, similarity, unguarded, hops, num_unknown)


def _hops(first: NDArray[np.int64], second: NDArray[np.int64], best: NDArray[np.int64]) -> NDArray[np.int32]:
    """Edges between every image and the best of its component, a level at a time."""
    hops = np.full(len(best), -1, np.int32)
    hops[best == np.arange(len(best))] = 0
    level = 0
    while True:
        forward = (hops[first] == level) & (hops[second] < 0)
        backward = (hops[second] == level) & (hops[first] < 0)
        if not forward.any() and not backward.any():
            return hops
        level += 1
        hops[second[forward]] = level
        hops[first[backward]] = level


def similarities_of_edges(edges: Edges, num_images: int) -> Similarities:
    """Similarities that are stored; NaN for pairs that are not."""
    keys = edges.first * num_images + edges.second  # ascending, as edges are

    def look_up(some: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float32]:
        wanted = np.minimum(some, others) * num_images + np.maximum(some, others)
        if not len(keys):
            return np.full(len(wanted), np.nan, np.float32)
        position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[position] == wanted, edges.similarity[position], np.float32(np.nan)).astype(np.float32)

    return look_up
