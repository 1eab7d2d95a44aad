"""Retrieval: which pool images curated sets bring in, by which of their images, and why the others stay out (DINOv2 A)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.assignment import assign
from heliostat.curation.clusters import resolve_num_clusters
from heliostat.curation.composition import CompositionRow
from heliostat.curation.kmeans import kmeans
from heliostat.curation.retrieval_cluster import (
    CreditedSet,
    MatchedClusters,
    credit_draws,
    draw_from_matched,
    matched_clusters,
)
from heliostat.curation.retrieval_config import ClustersConfig, ResolvedSet, RetrievalConfig, resolve_set
from heliostat.curation.retrieval_links import Links, links_of_draws, links_of_pairs, merge_links
from heliostat.curation.retrieval_sample import Pairs, best_ranked, retrieve_by_sample
from heliostat.curation.subsets import present_rows
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Vectors
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N pool rows, M curated images, K clusters, L links (pool image, curated image), D dimension.

NOT_RETRIEVED = "not_retrieved"
CLUSTER_NOT_MATCHED = "cluster_not_matched"
OVER_CLUSTER_QUOTA = "over_cluster_quota"
OVER_MAX_IMAGES = "over_max_images"

REASONS = ("", NOT_RETRIEVED, CLUSTER_NOT_MATCHED, OVER_CLUSTER_QUOTA, OVER_MAX_IMAGES)
"""What a reason number means; the further an image came, the higher its number."""


@dataclass(frozen=True)
class Retrieved:
    """Outcome of retrieval.

    kept: (N,) bool; reason: (N,) int8, position in REASONS, 0 where kept or absent. links: of the images reached in sample mode
    and of those taken in cluster mode. composition: rows like those of table 15. unmatched: the sets that brought nothing, and
    why. With a set in cluster mode also centroids (K, D), cluster (N,) int32 (-1 for absent rows), and the matched clusters.
    """

    sets: tuple[ResolvedSet, ...]
    kept: NDArray[np.bool_]
    reason: NDArray[np.int8]
    links: Links
    composition: tuple[CompositionRow, ...]
    unmatched: dict[str, str]
    centroids: NDArray[np.float32] | None
    cluster: NDArray[np.int32] | None
    matched: MatchedClusters | None


class _Found(NamedTuple):
    """What one set did: pool rows, ascending, reached (before its cap) and final; retrieved counts one image as often as it was
    reached. pairs: in sample mode; credited: in cluster mode."""

    reached: NDArray[np.int64]
    final: NDArray[np.int64]
    num_retrieved: int
    pairs: Pairs | None = None
    credited: CreditedSet | None = None


class _Clustered(NamedTuple):
    centroids: NDArray[np.float32]
    cluster: NDArray[np.int32]


def retrieve(
    pool: Vectors,
    curated: Mapping[str, Vectors],
    config: RetrievalConfig,
    *,
    clusters: ClustersConfig,
    seed: int,
    work: Store,
    run: TaskMap,
    rows: NDArray[np.int64] | None = None,
) -> Retrieved:
    """Decide which pool images stay because a curated set brings them in.

    curated: the vectors of every set, by the names of `config.sets`, or one set of any name when those are empty. clusters: how
    k-means of cluster mode is fitted; one k-means of the pool serves all sets. seed: of the draws. rows: the pool rows that
    have a vector, when the caller knows them. work: of this pool, these sets and this configuration alone; a repeated run goes
    on there. Raises DataError when there is no set, no pool, an empty set, or when no set brings anything.
    """
    present = present_rows(pool, work=work.child("pool"), run=run) if rows is None else rows
    names = _names(config, curated)
    counts = [len(present_rows(curated[name], work=_room(work, name), run=run)) for name in names]
    _check(pool, present, curated, dict(zip(names, counts, strict=True)))
    sets = tuple(resolve_set(name, config, count) for name, count in zip(names, counts, strict=True))
    clustered = None
    if any(one.mode == "cluster" for one in sets):
        clustered = _cluster_pool(pool, present, config, clusters, work=work.child("clusters"), run=run)
    found = [
        _find(position, one, curated[one.name], pool, clustered, config=config, seed=seed, work=_room(work, one.name), run=run)
        for position, one in enumerate(sets)
    ]
    unmatched = {
        one.name: _why_nothing(one, this)
        for one, this in zip(sets, found, strict=True)
        if one.mode != "none" and not len(this.final)
    }
    if unmatched and all(one.mode == "none" or one.name in unmatched for one in sets):
        raise DataError(_nothing_at_all(unmatched))
    cluster_N = clustered.cluster if clustered else None
    kept_N, reason_N = _judge(present, pool.num_rows, sets, found, cluster_N)
    return Retrieved(
        sets,
        kept_N,
        reason_N,
        _links(pool, found, cluster_N, work=work.child("credits"), run=run),
        tuple(_composition(sets, counts, found, pool.num_rows)),
        unmatched,
        clustered.centroids if clustered else None,
        cluster_N,
        _matched(sets, found, cluster_N, seed=seed),
    )


def _room(work: Store, name: str) -> Store:
    """Where one set keeps its state; names may hold characters that keys may not."""
    return work.child(f"set-{hashlib.sha256(name.encode()).hexdigest()[:16]}")


def _names(config: RetrievalConfig, curated: Mapping[str, Vectors]) -> list[str]:
    """The sets in the order of the recipe."""
    if not curated:
        raise DataError(f"retrieval.mode={config.mode} needs curated images; give them or set retrieval.mode=none")
    names = list(config.sets) or list(curated)
    if set(names) != set(curated) or (not config.sets and len(names) > 1):
        raise DataError(
            f"curated sets {', '.join(curated)} were embedded, retrieval.sets names {', '.join(config.sets) or 'none'}"
        )
    return names


def _check(pool: Vectors, present: NDArray[np.int64], curated: Mapping[str, Vectors], counts: Mapping[str, int]) -> None:
    if len(present) == 0:
        raise DataError("retrieval needs pool images and there are none left; look at the funnel for where they went")
    for name, count in counts.items():
        if count == 0:
            raise DataError(f"curated set {name!r} has no image; give it some, take it out, or set retrieval.mode=none")
        if curated[name].dimension != pool.dimension:
            widths = f"{curated[name].dimension}, the pool {pool.dimension}"
            raise DataError(f"curated set {name!r} has vectors of width {widths}; embed both alike")


def _cluster_pool(
    pool: Vectors, present: NDArray[np.int64], config: RetrievalConfig, clusters: ClustersConfig, *, work: Store, run: TaskMap
) -> _Clustered:
    centroids_KD = kmeans(
        pool,
        resolve_num_clusters(config.num_clusters, len(present)),
        iterations=clusters.iterations,
        seed=clusters.seed,
        work=work,
        run=run,
        seeding=clusters.seeding,
        rows_per_centroid=clusters.rows_per_centroid,
        rows=present,
    )
    return _Clustered(centroids_KD, assign(pool, centroids_KD, name="pool", work=work, run=run).cluster)


def _find(
    position: int,
    one: ResolvedSet,
    curated: Vectors,
    pool: Vectors,
    clustered: _Clustered | None,
    *,
    config: RetrievalConfig,
    seed: int,
    work: Store,
    run: TaskMap,
) -> _Found:
    if one.mode == "sample":
        pairs = retrieve_by_sample(curated, pool, one.neighbors, config, seed=seed, work=work, run=run)
        return _Found(np.unique(pairs.pool), best_ranked(pairs, one.max_images), len(pairs.pool), pairs=pairs)
    if one.mode == "none" or clustered is None:
        nothing = np.empty(0, np.int64)
        return _Found(nothing, nothing, 0)
    curated_cluster_M = assign(curated, clustered.centroids, name="curated", work=work, run=run).cluster
    draw = draw_from_matched(
        clustered.cluster,
        curated_cluster_M,
        len(clustered.centroids),
        min_images=one.min_images_per_cluster,
        quota=one.max_images_per_cluster,
        max_images=one.max_images,
        seed=seed,
        name=one.name,
    )
    credited = CreditedSet(position, curated, curated_cluster_M, draw)
    return _Found(draw.drawn, draw.final, len(draw.drawn), credited=credited)


def _why_nothing(one: ResolvedSet, found: _Found) -> str:
    if found.credited is None:
        return "its images have no neighbour in the pool"
    fullest = int(found.credited.draw.num_curated.max())
    if fullest > one.min_images_per_cluster:
        return "its matched clusters hold no image of the pool"
    return f"its fullest cluster holds {fullest} curated images, and more than {one.min_images_per_cluster} are needed"


def _nothing_at_all(unmatched: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in unmatched.items())
    return (
        f"no curated set brings in an image ({reasons}); lower retrieval.min_images_per_cluster or retrieval.num_clusters, "
        "give more curated images, or set retrieval.mode=sample"
    )


def _judge(
    present: NDArray[np.int64],
    num_rows: int,
    sets: Sequence[ResolvedSet],
    found: Sequence[_Found],
    cluster_N: NDArray[np.int32] | None,
) -> tuple[NDArray[np.bool_], NDArray[np.int8]]:
    """(kept_N, reason_N): kept when one set takes the image; otherwise the reason of the set that came nearest to it."""
    kept_N, reason_N = np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.int8)
    only_clusters = all(one.mode == "cluster" for one in sets)
    reason_N[present] = REASONS.index(CLUSTER_NOT_MATCHED if only_clusters else NOT_RETRIEVED)
    for this in found:
        if this.credited is not None and cluster_N is not None:
            in_matched = np.flatnonzero((cluster_N >= 0) & this.credited.draw.matched[cluster_N])
            reason_N[in_matched] = np.maximum(reason_N[in_matched], REASONS.index(OVER_CLUSTER_QUOTA))
        reason_N[this.reached] = REASONS.index(OVER_MAX_IMAGES)
        kept_N[this.final] = True
    reason_N[kept_N] = 0
    return kept_N, reason_N


def _links(pool: Vectors, found: Sequence[_Found], cluster_N: NDArray[np.int32] | None, *, work: Store, run: TaskMap) -> Links:
    several = [links_of_pairs(position, this.pairs) for position, this in enumerate(found) if this.pairs is not None]
    credited = [this.credited for this in found if this.credited is not None and len(this.final)]
    if credited and cluster_N is not None:
        several.append(links_of_draws(credit_draws(pool, credited, cluster_N, work=work, run=run)))
    return merge_links(several)


def _composition(
    sets: Sequence[ResolvedSet], counts: Sequence[int], found: Sequence[_Found], num_rows: int
) -> list[CompositionRow]:
    """One row per use of a set, in their order; a pool image counts as added where it comes first."""
    there_N = np.zeros(num_rows, np.bool_)
    rows = []
    for one, count, this in zip(sets, counts, found, strict=True):
        if one.as_is:
            rows.append(CompositionRow(one.name, count, "as is", None, count, count))
        if one.mode != "none":
            added = int((~there_N[this.final]).sum())
            there_N[this.final] = True
            rows.append(CompositionRow(one.name, count, one.mode, this.num_retrieved, len(this.final), added))
    return rows


def _matched(
    sets: Sequence[ResolvedSet], found: Sequence[_Found], cluster_N: NDArray[np.int32] | None, *, seed: int
) -> MatchedClusters | None:
    if cluster_N is None:
        return None
    draws = [
        (position, sets[position].name, this.credited.draw) for position, this in enumerate(found) if this.credited is not None
    ]
    return matched_clusters(draws, cluster_N, seed=seed)
