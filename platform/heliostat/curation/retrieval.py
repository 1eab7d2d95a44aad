"""Retrieval: which pool images a curated set brings in, and by which of its images each one came (DINOv2 A)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.clusters import assign_clusters
from heliostat.curation.config import ClustersConfig, RetrievalConfig
from heliostat.curation.index import neighbors
from heliostat.errors import DataError

# Shapes: N pool images, M curated images, K neighbours, L links (pool image, curated image), D dimension.

NOT_RETRIEVED = "not_retrieved"
CLUSTER_NOT_MATCHED = "cluster_not_matched"
OVER_CLUSTER_QUOTA = "over_cluster_quota"
OVER_MAX_IMAGES = "over_max_images"


@dataclass(frozen=True)
class Links:
    """Who retrieved whom, sorted by pool row, then rank. All arrays have L entries.

    pool, curated: int64 rows; rank: int32, 1 for the nearest; similarity: float32 cosine.
    """

    pool: NDArray[np.int64]
    curated: NDArray[np.int64]
    rank: NDArray[np.int32]
    similarity: NDArray[np.float32]


@dataclass(frozen=True)
class Retrieved:
    """Outcome of retrieval: kept bool, reason (empty string where kept), and the links of the images that were reached."""

    kept: NDArray[np.bool_]
    reason: NDArray[np.str_]
    links: Links
    num_matched_clusters: int


def _sorted_links(
    pool_L: NDArray[np.int64], curated_L: NDArray[np.int64], rank_L: NDArray[np.int64], similarity_L: NDArray[np.float32]
) -> Links:
    order = np.lexsort((curated_L, rank_L, pool_L))
    return Links(pool_L[order], curated_L[order], rank_L[order].astype(np.int32), similarity_L[order].astype(np.float32))


def _check(pool: NDArray[np.float32], curated: NDArray[np.float32]) -> None:
    if len(curated) == 0:
        raise DataError("retrieval needs curated images and there are none; give them or set retrieval.mode=none")
    if len(pool) == 0:
        raise DataError("retrieval needs pool images and there are none left; look at the funnel for where they went")


def _cap_by_rank(links: Links, num_pool: int, max_images: int) -> NDArray[np.bool_]:
    """The `max_images` reached images with the best rank, then the highest similarity, then the first row."""
    starts = np.r_[True, links.pool[1:] != links.pool[:-1]]  # links are sorted: the first of an image has its best rank
    rows, ranks = links.pool[starts], links.rank[starts]
    order = np.lexsort((rows, -links.similarity[starts], ranks))
    kept_N = np.zeros(num_pool, np.bool_)
    kept_N[rows[order[:max_images]]] = True
    return kept_N


def retrieve_by_sample(pool: NDArray[np.float32], curated: NDArray[np.float32], config: RetrievalConfig) -> Retrieved:
    """Sample mode: the `config.neighbors` nearest pool images of each curated image; their union, no image twice.

    pool: (N, D), curated: (M, D), both L2-normalised. A pool image that several curated images reach keeps a link to each.
    When the union is larger than `config.max_images`, the best ranks stay.
    """
    _check(pool, curated)
    similarities_MK, ids_MK = neighbors(curated, pool, config.neighbors)
    curated_rows, columns = np.nonzero(ids_MK >= 0)
    links = _sorted_links(ids_MK[curated_rows, columns], curated_rows, columns + 1, similarities_MK[curated_rows, columns])
    kept_N = _cap_by_rank(links, len(pool), config.max_images)
    reason_N = np.full(len(pool), NOT_RETRIEVED, dtype="<U24")
    reason_N[links.pool] = OVER_MAX_IMAGES
    reason_N[kept_N] = ""
    return Retrieved(kept_N, reason_N, links, num_matched_clusters=0)


def sample_matched_clusters(
    pool_cluster_N: NDArray[np.int64], curated_cluster_M: NDArray[np.int64], config: RetrievalConfig, *, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.str_], int]:
    """Which pool images cluster mode takes: (kept_N, reason_N, number of matched clusters).

    A cluster is matched when MORE than `min_images_per_cluster` curated images lie in it. At most `max_images_per_cluster`
    images are drawn from each, and at most `max_images` of all that were drawn stay; both at random from `seed`.
    """
    num_clusters = int(max(pool_cluster_N.max(), curated_cluster_M.max())) + 1
    matched_K = np.bincount(curated_cluster_M, minlength=num_clusters) > config.min_images_per_cluster
    generator = np.random.default_rng([seed, 3])
    shuffled = generator.permutation(len(pool_cluster_N))
    by_cluster = shuffled[np.argsort(pool_cluster_N[shuffled], kind="stable")]
    sizes_K = np.bincount(pool_cluster_N, minlength=num_clusters)
    place = np.arange(len(by_cluster)) - np.r_[0, np.cumsum(sizes_K)[:-1]][pool_cluster_N[by_cluster]]
    drawn_N = np.zeros(len(pool_cluster_N), np.bool_)
    drawn_N[by_cluster[place < config.max_images_per_cluster]] = True
    drawn_N &= matched_K[pool_cluster_N]
    kept_N = np.zeros_like(drawn_N)
    kept_N[generator.permutation(np.flatnonzero(drawn_N))[: config.max_images]] = True
    reason_N = np.full(len(kept_N), CLUSTER_NOT_MATCHED, dtype="<U24")
    reason_N[matched_K[pool_cluster_N]] = OVER_CLUSTER_QUOTA
    reason_N[drawn_N] = OVER_MAX_IMAGES
    reason_N[kept_N] = ""
    return kept_N, reason_N, int(matched_K.sum())


def _cluster_links(
    pool: NDArray[np.float32],
    curated: NDArray[np.float32],
    pool_cluster_N: NDArray[np.int64],
    curated_cluster_M: NDArray[np.int64],
    kept_N: NDArray[np.bool_],
) -> Links:
    """One link per kept image: the most similar curated image of its cluster, ranked among the images credited to that one."""
    pool_rows: list[NDArray[np.int64]] = []
    curated_rows: list[NDArray[np.int64]] = []
    similarities: list[NDArray[np.float32]] = []
    for cluster in np.unique(pool_cluster_N[kept_N]):
        members = np.flatnonzero(kept_N & (pool_cluster_N == cluster))
        seeds = np.flatnonzero(curated_cluster_M == cluster)
        similarity, nearest = neighbors(pool[members], curated[seeds], 1)
        pool_rows.append(members)
        curated_rows.append(seeds[nearest[:, 0]])
        similarities.append(similarity[:, 0])
    if not pool_rows:
        nothing = np.empty(0, np.int64)
        return Links(nothing, nothing, np.empty(0, np.int32), np.empty(0, np.float32))
    pool_L, curated_L, similarity_L = np.concatenate(pool_rows), np.concatenate(curated_rows), np.concatenate(similarities)
    order = np.lexsort((pool_L, -similarity_L, curated_L))
    starts = np.flatnonzero(np.r_[True, curated_L[order][1:] != curated_L[order][:-1]])
    rank_L = np.empty(len(order), np.int64)
    rank_L[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)])) + 1
    return _sorted_links(pool_L, curated_L, rank_L, similarity_L)


def retrieve_by_cluster(
    pool: NDArray[np.float32],
    curated: NDArray[np.float32],
    config: RetrievalConfig,
    *,
    clusters: ClustersConfig,
    seed: int,
) -> Retrieved:
    """Cluster mode: k-means over the pool, curated images fall into its clusters, matched clusters are sampled.

    pool: (N, D), curated: (M, D). `clusters` gives the iterations and seed of k-means; `seed` draws the samples.
    """
    _check(pool, curated)
    fit = assign_clusters(pool, config.num_clusters, iterations=clusters.iterations, seed=clusters.seed)
    _, nearest_M1 = neighbors(curated, fit.centroids, 1)
    kept_N, reason_N, num_matched = sample_matched_clusters(fit.assignment, nearest_M1[:, 0], config, seed=seed)
    links = _cluster_links(pool, curated, fit.assignment, nearest_M1[:, 0], kept_N)
    return Retrieved(kept_N, reason_N, links, num_matched)
