"""Sample mode of retrieval: the nearest pool images of each curated image (DINOv2 A)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.copies_config import NearestConfig
from heliostat.curation.nearest import neighbors_of
from heliostat.curation.retrieval_config import RetrievalConfig
from heliostat.curation.subsets import first_of_each
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Vectors
from heliostat.storage import Store

# Shapes: N pool rows, M curated images, K candidates of each, L pairs (curated image, pool image).


class Pairs(NamedTuple):
    """Who reached whom, L entries each. pool, curated: int64 rows; rank: int32, 1 for the nearest; similarity: float32."""

    pool: NDArray[np.int64]
    curated: NDArray[np.int64]
    rank: NDArray[np.int32]
    similarity: NDArray[np.float32]


class Candidates(NamedTuple):
    """The nearest pool images of each curated one, best first. curated: (M,) rows; pool: (M, K) rows, -1 where there is
    none."""

    curated: NDArray[np.int64]
    pool: NDArray[np.int64]
    similarity: NDArray[np.float32]


def nearest_in_pool(
    curated: Vectors, pool: Vectors, k: int, *, search: NearestConfig, seed: int, work: Store, run: TaskMap
) -> Candidates:
    """The k nearest pool images of every curated image. work: of this search alone."""
    similarity_MK, pool_MK = neighbors_of(curated, pool, k, config=search, seed=seed, work=work, run=run)
    return Candidates(np.arange(len(pool_MK)), pool_MK, similarity_MK)


def take_union(candidates: Candidates, k: int) -> Pairs:
    """Every curated image takes its k nearest; several may take the same one."""
    positions, columns = np.nonzero(candidates.pool[:, :k] >= 0)
    return _pairs(candidates, positions, columns)


def take_next_nearest(candidates: Candidates, k: int, num_pool: int) -> Pairs:
    """No pool image is taken twice: whoever finds one taken goes on to its next nearest, as far as its candidates reach.

    Images are handed out rank by rank; at one rank the more similar curated image gets it, the first of equal ones.
    """
    taken_N = np.zeros(num_pool, np.bool_)
    missing_M = np.full(len(candidates.curated), k)
    positions: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    for column in range(candidates.pool.shape[1]):
        pool_M = candidates.pool[:, column]
        asking = np.flatnonzero((missing_M > 0) & (pool_M >= 0))
        asking = asking[~taken_N[pool_M[asking]]]
        served = asking[first_of_each(pool_M[asking], [-candidates.similarity[asking, column], asking], 1)]
        taken_N[pool_M[served]] = True
        missing_M[served] -= 1
        positions.append(served)
        columns.append(np.full(len(served), column))
    return _pairs(candidates, np.concatenate(positions), np.concatenate(columns))


def _pairs(candidates: Candidates, positions: NDArray[np.int64], columns: NDArray[np.int64]) -> Pairs:
    pool = candidates.pool[positions, columns]
    rank = (columns + 1).astype(np.int32)
    return Pairs(pool, candidates.curated[positions], rank, candidates.similarity[positions, columns].astype(np.float32))


def best_ranked(pairs: Pairs, max_images: int | None) -> NDArray[np.int64]:
    """Distinct pool rows, ascending; over `max_images` those with the best rank, then the highest similarity, then first."""
    order = np.lexsort((-pairs.similarity, pairs.rank, pairs.pool))
    first = order[np.r_[True, pairs.pool[order][1:] != pairs.pool[order][:-1]]] if len(order) else order
    best = np.lexsort((pairs.pool[first], -pairs.similarity[first], pairs.rank[first]))[:max_images]
    return np.sort(pairs.pool[first[best]])


def retrieve_by_sample(
    curated: Vectors, pool: Vectors, neighbors: int, config: RetrievalConfig, *, seed: int, work: Store, run: TaskMap
) -> Pairs:
    """The pairs of one curated set with so many neighbours for each of its images, before any cap."""
    depth = neighbors * (config.search_depth if config.collisions == "next_nearest" else 1)
    candidates = nearest_in_pool(
        curated, pool, depth, search=config.search, seed=seed, work=work.child(f"nearest-{depth}"), run=run
    )
    if config.collisions == "union":
        return take_union(candidates, neighbors)
    return take_next_nearest(candidates, neighbors, pool.num_rows)
