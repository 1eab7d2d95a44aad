"""Water-filling and clusters."""

import math

import numpy as np
import pytest

from heliostat.curation.balance import balanced_sample, cluster_quotas, resolve_target, water_level
from heliostat.curation.clusters import assign_clusters, entropy, evenness, resolve_num_clusters
from heliostat.errors import DataError


@pytest.mark.parametrize("seed", range(40))
def test_the_water_level_equals_a_search_over_every_level(seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 30, size=int(generator.integers(1, 12)))
    for target in range(int(sizes.sum()) + 3):
        levels = [level for level in range(int(sizes.max()) + 1) if np.minimum(sizes, level).sum() <= target]
        assert water_level(sizes, target) == (max(levels), min(target, sizes.sum()) - np.minimum(sizes, max(levels)).sum())


@pytest.mark.parametrize("target", [0, 1, 7, 8, 9, 50, 111, 112, 500])
def test_quotas_sum_to_the_target_and_differ_by_one_at_most_among_clusters_that_are_cut(target):
    sizes = np.array([3, 0, 50, 20, 39])
    quotas = cluster_quotas(sizes, target, seed=0)
    assert quotas.sum() == min(target, 112)
    assert (quotas <= sizes).all()
    cut = quotas[quotas < sizes]
    assert len(cut) == 0 or cut.max() - cut.min() <= 1


def test_a_balanced_sample_takes_each_quota_repeats_for_a_seed_and_changes_with_it():
    assignment = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [100, 5, 60]))
    kept = balanced_sample(assignment, 4, 65, seed=1)
    assert np.bincount(assignment[kept], minlength=4).tolist() == [30, 5, 0, 30]
    np.testing.assert_array_equal(kept, balanced_sample(assignment, 4, 65, seed=1))
    assert not np.array_equal(kept, balanced_sample(assignment, 4, 65, seed=2))


def test_the_remainder_goes_to_random_clusters_above_the_level():
    lucky = {tuple(cluster_quotas(np.array([9, 9, 9, 1]), 8, seed=seed)) for seed in range(40)}
    assert lucky == {(3, 2, 2, 1), (2, 3, 2, 1), (2, 2, 3, 1)}


def test_auto_cuts_at_twice_the_mean_of_the_filled_clusters_and_all_keeps_everything():
    sizes = np.array([100, 10, 10, 0])
    assert resolve_target("auto", sizes) == 80 + 20
    assert resolve_target("all", sizes) == 120
    assert resolve_target(500, sizes) == 120
    assert resolve_target(30, sizes) == 30


def test_a_negative_target_is_refused():
    with pytest.raises(DataError, match="target_images -1 is negative"):
        water_level(np.array([1]), -1)


def test_entropy_is_log_k_for_equal_clusters_and_zero_for_one():
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(math.log(4))
    assert evenness(np.array([5, 5, 5, 5])) == pytest.approx(1.0)
    assert entropy(np.array([5, 0, 0])) == 0.0
    assert evenness(np.array([5, 0, 0])) == 0.0
    assert evenness(np.array([5])) == 1.0


def test_auto_clusters_are_the_root_of_the_images_within_bounds():
    assert [resolve_num_clusters("auto", count) for count in (1, 2550, 10**12)] == [1, 50, 100_000]
    assert resolve_num_clusters(7, 3) == 7


def test_cluster_sizes_count_every_image_once():
    vectors = np.random.default_rng(0).standard_normal((90, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    clusters = assign_clusters(vectors, "auto", iterations=10, seed=0)
    assert len(clusters.sizes) == 9
    assert clusters.sizes.sum() == 90
