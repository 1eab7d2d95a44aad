"""Near-certain copies by PCA hash: candidates by sorting, each verified, one survivor of each group by quality.

Two images are compared when their codes share two of four blocks of 16 bits: all pairs with two differing bits or fewer are,
and most of those with three or four (measured: docs/concepts/pca_hash.md). Work and memory grow with the images, never with
their pairs: within a key the best image is compared with all others, then the best of those that are left.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.features_config import HashConfig
from heliostat.curation.pca_hash import COARSE_STEPS, NUM_BITS, HashColumns
from heliostat.errors import DataError

# Shapes: N images, n some of them.

_NUM_BLOCKS, _SHARED_BLOCKS = 4, 2
_PAIRS_AT_ONCE = 1 << 20  # bounds the temporary differences to 32 MiB
_ALL_BITS = (1 << NUM_BITS) - 1


@dataclass(frozen=True)
class HashCopies:
    """survivor: int64 (N,), row that stays for each image (itself when it stays).

    distance: float32 (N,), distance to the survivor over the first 16 components, in deviations; 0 for a survivor.
    """

    survivor: NDArray[np.int64]
    distance: NDArray[np.float32]

    @property
    def dropped(self) -> NDArray[np.bool_]:
        """True for every image that another one stands for."""
        return np.asarray(self.survivor != np.arange(len(self.survivor)), np.bool_)


def _keys() -> list[np.uint64]:
    """Masks of the bits that candidates share: all of them first, then every two blocks."""
    width = NUM_BITS // _NUM_BLOCKS
    block = [((1 << width) - 1) << (width * number) for number in range(_NUM_BLOCKS)]
    return [np.uint64(_ALL_BITS)] + [np.uint64(sum(kept)) for kept in itertools.combinations(block, _SHARED_BLOCKS)]


def _compare(
    columns: HashColumns, rows: NDArray[np.int64], others: NDArray[np.int64], config: HashConfig
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """(is it a copy, distance) of pairs of rows."""
    same, distance = np.empty(len(rows), np.bool_), np.empty(len(rows), np.float32)
    limit = round((config.max_distance * COARSE_STEPS) ** 2, 6)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        first, second = rows[some], others[some]
        difference = columns.coarse[first].astype(np.int32) - columns.coarse[second]
        squared = (difference * difference).sum(axis=1)
        bits = np.bitwise_count(columns.code[first] ^ columns.code[second])
        same[some] = (bits <= config.max_differing_bits) & (squared <= limit)
        distance[some] = np.sqrt(squared) / COARSE_STEPS
    return same, distance


def _merge_by_key(
    columns: HashColumns, rows: NDArray[np.int64], mask: np.uint64, leader: NDArray[np.int64], config: HashConfig
) -> None:
    """Hang rows with equal bits under the mask below the best of them that they resemble. rows: best first."""
    key = columns.code[rows] & mask
    order = np.argsort(key, kind="stable")
    rows, key = rows[order], key[order]
    for _ in range(config.max_groups_per_key):
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.empty(0, np.int64)
        lengths = np.diff(np.r_[starts, len(key)])
        shared = np.repeat(lengths > 1, lengths)
        if not shared.any():
            return
        best = np.repeat(rows[starts], lengths)
        rows, key, best = rows[shared], key[shared], best[shared]
        same, _ = _compare(columns, rows, best, config)
        leader[rows[same]] = best[same]
        rows, key = rows[~same], key[~same]


def _check(columns: HashColumns, quality_rank: NDArray[np.int64]) -> None:
    num_images = len(quality_rank)
    sizes = len(columns.code), len(columns.coarse), len(columns.contrast)
    if any(size != num_images for size in sizes):
        raise DataError(f"hash columns have {sizes} rows, {num_images} quality ranks are given; give one of each per image")
    seen = np.zeros(num_images, np.bool_)
    seen[quality_rank[(quality_rank >= 0) & (quality_rank < num_images)]] = True
    if not seen.all():
        raise DataError(f"quality_rank is not an order of the {num_images} images; use each of 0 to {num_images - 1} once")


def hash_copies(columns: HashColumns, quality_rank: NDArray[np.int64], config: HashConfig) -> HashCopies:
    """Group images that are near-certain copies; the one of the best quality stays for each group.

    quality_rank: int64 (N,), a permutation, 0 the best: the same groups come out whatever the order of the rows. A member is
    always within the limits of its own survivor: where a chain (A like B, B like C, A unlike C) puts one under a survivor that
    it does not resemble, it is taken out and grouped with others in that position. Images below `min_contrast` stay. DataError
    when rows and ranks do not fit.
    """
    _check(columns, quality_rank)
    num_images = len(quality_rank)
    survivor, distance = np.arange(num_images), np.zeros(num_images, np.float32)
    if not config.enabled:
        return HashCopies(survivor, distance)
    by_quality = np.empty(num_images, np.int64)
    by_quality[quality_rank] = np.arange(num_images)
    unsettled = by_quality[columns.contrast[by_quality] >= config.min_contrast]
    while len(unsettled):
        leader = np.arange(num_images)
        for mask in _keys():
            _merge_by_key(columns, unsettled[leader[unsettled] == unsettled], mask, leader, config)
        root = leader[unsettled]
        while not np.array_equal(above := leader[root], root):
            root = above
        same, apart = _compare(columns, unsettled, root, config)
        survivor[unsettled[same]], distance[unsettled[same]] = root[same], apart[same]
        unsettled = unsettled[~same]
    return HashCopies(survivor, distance)
