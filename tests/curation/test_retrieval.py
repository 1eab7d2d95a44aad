"""Sample mode and cluster mode."""

import numpy as np
import pytest

from heliostat.curation.config import ClustersConfig, RetrievalConfig
from heliostat.curation.retrieval import retrieve_by_cluster, retrieve_by_sample, sample_matched_clusters
from heliostat.errors import DataError


def unit(rows: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_sample_mode_is_the_union_of_each_curated_images_nearest_without_repeats():
    pool, curated = unit(200, 8, 0), unit(30, 8, 1)
    found = retrieve_by_sample(pool, curated, RetrievalConfig(mode="sample", neighbors=4))
    nearest = np.argsort(-(curated @ pool.T), axis=1)[:, :4]
    assert set(np.flatnonzero(found.kept)) == set(nearest.ravel())
    assert found.kept.sum() < 30 * 4  # several curated images reach the same image
    assert len(found.links.pool) == 30 * 4
    for pool_row, curated_row, rank in zip(found.links.pool, found.links.curated, found.links.rank, strict=True):
        assert nearest[curated_row, rank - 1] == pool_row
    assert set(found.reason[~found.kept]) == {"not_retrieved"}


def test_sample_mode_over_its_cap_keeps_the_best_ranks():
    pool, curated = unit(200, 8, 0), unit(30, 8, 1)
    best = set((curated @ pool.T).argmax(axis=1))
    found = retrieve_by_sample(pool, curated, RetrievalConfig(mode="sample", neighbors=4, max_images=len(best)))
    assert set(np.flatnonzero(found.kept)) == best
    assert set(found.reason[~found.kept]) == {"not_retrieved", "over_max_images"}


def test_more_neighbours_than_the_pool_holds_retrieve_the_pool():
    assert retrieve_by_sample(unit(5, 8, 0), unit(2, 8, 1), RetrievalConfig(neighbors=32)).kept.all()


def test_a_cluster_is_matched_by_more_than_three_curated_images_and_not_by_three():
    pool_cluster = np.repeat([0, 1, 2], 50)
    curated_cluster = np.array([0] * 3 + [1] * 4)
    kept, reason, num_matched = sample_matched_clusters(pool_cluster, curated_cluster, RetrievalConfig(), seed=0)
    assert num_matched == 1
    assert set(pool_cluster[kept]) == {1}
    assert kept.sum() == 50
    assert set(reason[~kept]) == {"cluster_not_matched"}


def test_cluster_mode_samples_at_most_the_quota_of_each_cluster_and_the_cap_of_all():
    pool_cluster = np.repeat([0, 1, 2], [50, 5, 40])
    curated_cluster = np.repeat([0, 1, 2], 4)
    config = RetrievalConfig(max_images_per_cluster=10)
    kept, reason, _ = sample_matched_clusters(pool_cluster, curated_cluster, config, seed=0)
    assert np.bincount(pool_cluster[kept]).tolist() == [10, 5, 10]
    assert set(reason[~kept]) == {"over_cluster_quota"}
    capped = RetrievalConfig(max_images_per_cluster=10, max_images=12)
    kept, reason, _ = sample_matched_clusters(pool_cluster, curated_cluster, capped, seed=0)
    assert kept.sum() == 12
    assert np.count_nonzero(reason == "over_max_images") == 13


def test_cluster_samples_repeat_for_a_seed_and_change_with_it():
    clusters = np.repeat([0, 1], 100), np.repeat([0, 1], 4)
    config = RetrievalConfig(max_images_per_cluster=20)
    first, second, other = (sample_matched_clusters(*clusters, config, seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_cluster_mode_credits_each_image_to_the_most_similar_curated_image_of_its_cluster():
    generator = np.random.default_rng(0)
    directions = np.eye(8, dtype=np.float32)[:3]
    near = directions[np.repeat([0, 1, 2], 40)] + 0.05 * generator.standard_normal((120, 8)).astype(np.float32)
    pool = near / np.linalg.norm(near, axis=1, keepdims=True)
    curated = np.concatenate([pool[:5], pool[40:45], pool[80:82]])
    config = RetrievalConfig(mode="cluster", num_clusters=3)
    found = retrieve_by_cluster(pool, curated, config, clusters=ClustersConfig(), seed=0)
    assert found.num_matched_clusters == 2
    assert np.flatnonzero(found.kept).tolist() == list(range(80))
    assert found.links.pool.tolist() == list(range(80))
    similarities = pool[:40] @ curated[:5].T
    assert found.links.curated[:40].tolist() == similarities.argmax(axis=1).tolist()
    for curated_row in set(found.links.curated.tolist()):
        ranks = found.links.rank[found.links.curated == curated_row]
        assert sorted(ranks.tolist()) == list(range(1, len(ranks) + 1))
    assert found.links.similarity[0] == pytest.approx(1.0, abs=1e-5)


def test_no_matched_cluster_retrieves_nothing():
    found = retrieve_by_cluster(
        unit(50, 8, 0), unit(2, 8, 1), RetrievalConfig(mode="cluster", num_clusters=2), clusters=ClustersConfig(), seed=0
    )
    assert not found.kept.any()
    assert len(found.links.pool) == 0


def test_retrieval_without_curated_or_pool_images_is_an_error():
    with pytest.raises(DataError, match="needs curated images"):
        retrieve_by_sample(unit(5, 8, 0), unit(0, 8, 1), RetrievalConfig())
    with pytest.raises(DataError, match="needs pool images"):
        retrieve_by_sample(unit(0, 8, 0), unit(2, 8, 1), RetrievalConfig())
