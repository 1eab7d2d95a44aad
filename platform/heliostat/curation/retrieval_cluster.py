"""Cluster mode of retrieval: draw from the clusters of the pool that hold enough curated images (DINOv2 A)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.curation.assignment import checked
from heliostat.curation.products import ERROR, exact_similarities
from heliostat.curation.subsets import (
    WorkVectors,
    block_key,
    block_ranges,
    copy_rows,
    draw_rows,
    first_of_each,
    place_in_group,
    row_keys,
)
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Block, Vectors, read_all, read_array, write_array
from heliostat.storage import Store

# Shapes: N pool rows, M curated images, K clusters, C matched clusters, L pairs (curated image, pool image).

NUM_EXAMPLES = 10
"""Pool images of a matched cluster that are put before a person."""

CREDIT_TASKS = 256
"""Tasks that look for the curated image to credit, at most; each reads all drawn rows (14 bytes each)."""

_DRAWN = np.dtype([("row", "<i8"), ("set", "<i2"), ("cluster", "<i4")])
_CREDIT = np.dtype([("row", "<i8"), ("set", "<i2"), ("curated", "<i8"), ("similarity", "<f4")])


class ClusterDraw(NamedTuple):
    """What one set draws. num_curated: (K,) curated images per cluster; matched: (K,) bool. drawn: pool rows within the quota
    of their cluster, ascending; final: those of them under the cap of the set, ascending."""

    num_curated: NDArray[np.int64]
    matched: NDArray[np.bool_]
    drawn: NDArray[np.int64]
    final: NDArray[np.int64]


@dataclass(frozen=True)
class MatchedClusters:
    """All (set, matched cluster) pairs, for a person to look at; C entries each.

    set: int16 position of the set; cluster: int32; num_curated, num_pool, num_final: int64 images of the set, of the pool, and
    of the pool that the set takes; examples: (C, 10) int64 pool rows it takes, -1 where there are fewer.
    """

    set: NDArray[np.int16]
    cluster: NDArray[np.int32]
    num_curated: NDArray[np.int64]
    num_pool: NDArray[np.int64]
    num_final: NDArray[np.int64]
    examples: NDArray[np.int64]


def draw_from_matched(
    pool_cluster_N: NDArray[np.int32],
    curated_cluster_M: NDArray[np.int32],
    num_clusters: int,
    *,
    min_images: int,
    quota: int,
    max_images: int | None,
    seed: int,
    name: str,
) -> ClusterDraw:
    """Which pool rows a set takes.

    A cluster is matched when MORE than `min_images` curated images lie in it. At most `quota` images are drawn from each, and
    at most `max_images` of all drawn stay; both at random from `seed` and the name of the set, whatever other sets there are.
    Absent rows have cluster -1.
    """
    num_curated_K = np.bincount(curated_cluster_M[curated_cluster_M >= 0], minlength=num_clusters)
    matched_K = num_curated_K > min_images
    rows = np.flatnonzero(np.append(matched_K, False)[pool_cluster_N])  # the appended one is what -1 stands for
    keys = row_keys(rows, seed=seed, purpose=f"retrieval {name}")
    drawn = rows[first_of_each(pool_cluster_N[rows], [keys], quota)]
    final = drawn if max_images is None else draw_rows(drawn, max_images, seed=seed, purpose=f"retrieval limit {name}")
    return ClusterDraw(num_curated_K, matched_K, drawn, final)


def matched_clusters(
    draws: Sequence[tuple[int, str, ClusterDraw]], pool_cluster_N: NDArray[np.int32], *, seed: int
) -> MatchedClusters:
    """The matched clusters of all sets, given as (position, name, draw), with random examples of what each takes."""
    num_pool_K = np.bincount(pool_cluster_N[pool_cluster_N >= 0])
    found = [_matched_of(position, name, draw, pool_cluster_N, num_pool_K, seed) for position, name, draw in draws]
    columns = [np.concatenate([one[column] for one in found]) for column in range(6)]
    return MatchedClusters(*columns)


def _matched_of(  # noqa: PLR0917
    position: int, name: str, draw: ClusterDraw, pool_cluster_N: NDArray[np.int32], num_pool_K: NDArray[np.int64], seed: int
) -> tuple[NDArray[Any], ...]:
    cluster_C = np.flatnonzero(draw.matched).astype(np.int32)
    num_pool = np.zeros(len(draw.matched), np.int64)
    num_pool[: len(num_pool_K)] = num_pool_K
    cluster = pool_cluster_N[draw.final]
    shown = first_of_each(cluster, [row_keys(draw.final, seed=seed, purpose=f"examples {name}")], NUM_EXAMPLES)
    order = np.flatnonzero(shown)[np.argsort(cluster[shown], kind="stable")]
    examples_C10 = np.full((len(cluster_C), NUM_EXAMPLES), -1, np.int64)
    examples_C10[np.searchsorted(cluster_C, cluster[order]), place_in_group(cluster[order])] = draw.final[order]
    num_final = np.bincount(cluster, minlength=len(draw.matched))
    return (
        np.full(len(cluster_C), position, np.int16),
        cluster_C,
        draw.num_curated[cluster_C],
        num_pool[cluster_C],
        num_final[cluster_C],
        examples_C10,
    )


class _Creditors(NamedTuple):
    """The curated images of one set in matched clusters, sorted by cluster."""

    vectors: NDArray[np.float16]
    rows: NDArray[np.int64]
    cluster: NDArray[np.int32]


@dataclass(frozen=True)
class _Credit:
    """Finds, for the drawn images of some pool blocks, the most similar curated image of the same cluster."""

    pool: Vectors
    creditors: Mapping[int, WorkVectors]
    work: Store

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        key = block_key("credits/", task["number"])
        if self.work.size(key) is None:
            drawn = read_array(self.work, "drawn.npy")
            curated = {position: self._read_creditors(position) for position in self.creditors}
            found = [np.empty(0, _CREDIT)]
            for number in range(task["first"], task["end"]):
                block = self.pool.read(number)
                if len(block.rows):
                    start, stop = np.searchsorted(drawn["row"], [block.rows[0], block.rows[-1] + 1])
                    found += _credits(block, number, drawn[start:stop], curated)
            write_array(self.work, key, np.concatenate(found))
        return {}

    def _read_creditors(self, position: int) -> _Creditors:
        listed = read_array(self.work, _listed_key(position))
        order = np.argsort(listed["cluster"], kind="stable")
        return _Creditors(read_all(self.creditors[position]).vectors[order], listed["row"][order], listed["cluster"][order])


def _listed_key(position: int) -> str:
    return f"creditors-{position:03d}.npy"


def _credits(block: Block, number: int, drawn: NDArray[Any], curated: Mapping[int, _Creditors]) -> list[NDArray[Any]]:
    """An array per set that drew from the block. drawn: sorted by row."""
    if len(drawn) == 0:
        return []
    vectors_nD = checked(block, number)
    found = []
    for position in np.unique(drawn["set"]):
        mine = drawn[drawn["set"] == position]
        mine = mine[np.argsort(mine["cluster"], kind="stable")]
        place = np.searchsorted(block.rows, mine["row"])
        vectors_LD = vectors_nD[torch.from_numpy(place).to(vectors_nD.device)]
        found.append(_nearest_of_cluster(mine, vectors_LD, block.vectors[place], curated[int(position)]))
    return found


def _nearest_of_cluster(
    mine: NDArray[Any], vectors_LD: torch.Tensor, stored_LD: NDArray[np.float16], curated: _Creditors
) -> NDArray[Any]:
    """The credits of drawn rows that are sorted by cluster. A float32 product proposes and an exact one decides, so how the
    pool is cut into blocks cannot change a bit; of equally similar curated images the first is credited."""
    clusters, starts = np.unique(mine["cluster"], return_index=True)
    firsts = np.searchsorted(curated.cluster, clusters)
    ends = np.searchsorted(curated.cluster, clusters, side="right")
    credit = np.empty(len(mine), _CREDIT)
    credit["row"], credit["set"] = mine["row"], mine["set"]
    for start, stop, first, end in zip(starts, np.r_[starts[1:], len(mine)], firsts, ends, strict=True):
        seeds_SD = curated.vectors[first:end]
        product_lS = vectors_LD[start:stop] @ torch.from_numpy(seeds_SD).to(vectors_LD.device).float().T
        may_be_best_lS = product_lS >= product_lS.amax(dim=1, keepdim=True) - 2 * ERROR[torch.float32]
        row, seed = np.nonzero(may_be_best_lS.cpu().numpy())
        similarity = exact_similarities(stored_LD[start:stop], seeds_SD, (row, seed))
        order = np.lexsort((seed, -similarity, row))
        best = order[np.unique(row[order], return_index=True)[1]]
        credit["curated"][start:stop] = curated.rows[first:end][seed[best]]
        credit["similarity"][start:stop] = similarity[best]
    return credit


class CreditedSet(NamedTuple):
    """A set whose draws want a curated image to credit. assignment: (M,) int32 clusters of its rows, -1 for absent ones."""

    position: int
    curated: Vectors
    assignment: NDArray[np.int32]
    draw: ClusterDraw


def credit_draws(
    pool: Vectors, sets: Sequence[CreditedSet], pool_cluster_N: NDArray[np.int32], *, work: Store, run: TaskMap
) -> NDArray[Any]:
    """For every (row, set) of the final draws the most similar curated image of its cluster: fields row, set, curated,
    similarity.

    One pass over the pool serves all sets. Sorted by row, then set.
    """
    creditors = {}
    for position, curated, assignment_M, draw in sets:
        rows = np.flatnonzero(assignment_M >= 0)
        rows = rows[draw.matched[assignment_M[rows]]]
        listed = np.empty(len(rows), [("row", "<i8"), ("cluster", "<i4")])
        listed["row"], listed["cluster"] = rows, assignment_M[rows]
        write_array(work, _listed_key(position), listed)
        creditors[position] = copy_rows(curated, rows, work=work, prefix=f"creditors-{position:03d}/", run=run)
    drawn = np.concatenate([_drawn_rows(one, pool_cluster_N) for one in sets])
    write_array(work, "drawn.npy", drawn[np.lexsort((drawn["set"], drawn["row"]))])
    ranges = block_ranges(pool.num_blocks, CREDIT_TASKS)
    tasks = [{"number": number, "first": first, "end": end} for number, (first, end) in enumerate(ranges)]
    for _ in run(_Credit(pool, creditors, work), tasks, label="which curated image retrieved"):
        pass
    credits = np.concatenate([read_array(work, block_key("credits/", number)) for number in range(len(ranges))])
    return np.asarray(credits[np.lexsort((credits["set"], credits["row"]))])


def _drawn_rows(one: CreditedSet, pool_cluster_N: NDArray[np.int32]) -> NDArray[Any]:
    rows = np.empty(len(one.draw.final), _DRAWN)
    rows["row"], rows["set"], rows["cluster"] = one.draw.final, one.position, pool_cluster_N[one.draw.final]
    return rows
