"""Links: which curated image of which set reached a pool image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.retrieval_sample import Pairs
from heliostat.curation.subsets import place_in_group

# Shapes: L links (pool image, curated image).


@dataclass(frozen=True)
class Links:
    """Who retrieved whom, sorted by pool row, then set, then rank. All arrays have L entries.

    pool, curated: int64 rows; set: int16, position in `Retrieved.sets`; rank: int32, 1 for the nearest: in sample mode among
    the pool images of the curated one, in cluster mode among those credited to it; similarity: float32 cosine.
    """

    pool: NDArray[np.int64]
    set: NDArray[np.int16]
    curated: NDArray[np.int64]
    rank: NDArray[np.int32]
    similarity: NDArray[np.float32]


def links_of_pairs(position: int, pairs: Pairs) -> Links:
    """The links of one set in sample mode."""
    return Links(pairs.pool, np.full(len(pairs.pool), position, np.int16), pairs.curated, pairs.rank, pairs.similarity)


def links_of_draws(credits_L: NDArray[Any]) -> Links:
    """The links of all sets in cluster mode: what `credit_draws` found, ranked among the images of each curated one."""
    order = np.lexsort((credits_L["row"], -credits_L["similarity"], credits_L["curated"], credits_L["set"]))
    ranked = credits_L[order]
    first = np.r_[True, (np.diff(ranked["curated"]) != 0) | (np.diff(ranked["set"]) != 0)][: len(ranked)]
    rank = (place_in_group(np.cumsum(first)) + 1).astype(np.int32)
    return Links(ranked["row"], ranked["set"], ranked["curated"], rank, ranked["similarity"])


def merge_links(several: Sequence[Links]) -> Links:
    """All of them as one, in their order."""
    no_rows = np.empty(0, np.int64)
    empty = Links(no_rows, np.empty(0, np.int16), no_rows, np.empty(0, np.int32), np.empty(0, np.float32))
    pool, set_, curated, rank, similarity = (
        np.concatenate([getattr(links, name) for links in (empty, *several)])
        for name in ("pool", "set", "curated", "rank", "similarity")
    )
    order = np.lexsort((curated, rank, set_, pool))
    return Links(pool[order], set_[order], curated[order], rank[order], similarity[order])
