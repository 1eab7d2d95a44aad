"""Water-filling and clusters."""

import itertools
import math

import numpy as np
import pytest

from heliostat.curation.balance import balance, resolve_target, share_among_children
from heliostat.curation.clusters import entropy, evenness
from heliostat.curation.hierarchy import Hierarchy
from heliostat.curation.retrieval_config import BalanceConfig
from heliostat.curation.water import cluster_quotas, water_level
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


def tree(seed: int, num_images: int = 400, levels: tuple[int, ...] = (30, 8, 3)) -> Hierarchy:
    """A random hierarchy; some images are absent and some clusters empty."""
    generator = np.random.default_rng(seed)
    weights = generator.pareto(1.0, size=levels[0]) * (generator.random(levels[0]) < 0.8)
    cluster = generator.choice(levels[0], p=weights / weights.sum(), size=num_images).astype(np.int32)
    cluster[generator.random(num_images) < 0.1] = -1
    parents, filled = [], np.unique(cluster[cluster >= 0])
    for below, here in itertools.pairwise(levels):
        parent = np.full(below, -1, np.int32)
        parent[filled] = generator.integers(here, size=len(filled))
        parents.append(parent)
        filled = np.unique(parent[parent >= 0])
    similarity = generator.random(num_images).astype(np.float32)
    return Hierarchy(cluster, similarity, tuple(np.zeros((size, 2), np.float32) for size in levels), tuple(parents))


def slow_quotas(sizes: np.ndarray, target: int) -> np.ndarray:
    """Water-filling one image at a time: the next goes to a cluster that has least and is not full."""
    quotas = np.zeros(len(sizes), int)
    for _ in range(min(target, int(sizes.sum()))):
        open_clusters = np.flatnonzero(quotas < sizes)
        quotas[open_clusters[quotas[open_clusters].argmin()]] += 1
    return quotas


@pytest.mark.parametrize("seed", range(12))
def test_shares_of_all_parents_at_once_equal_water_filling_image_by_image(seed: int) -> None:
    generator = np.random.default_rng(seed)
    parent = generator.integers(-1, 5, size=40).astype(np.int32)
    sizes = np.where(parent >= 0, generator.integers(0, 20, size=40), 0)
    total = np.array([sizes[parent == one].sum() for one in range(5)])
    quota = generator.integers(0, total + 1)
    shared = share_among_children(sizes, parent, quota, seed=seed, purpose="x")
    assert (shared <= sizes).all()
    for one in range(5):
        children = np.flatnonzero(parent == one)
        assert shared[children].sum() == quota[one]
        # Which clusters get the last image each is drawn; how many clusters get how many is not.
        assert sorted(shared[children]) == sorted(slow_quotas(sizes[children], int(quota[one])))


@pytest.mark.parametrize("sampling", ["random", "closest"])
@pytest.mark.parametrize("seed", range(4))
def test_exactly_the_target_is_kept_and_every_level_shares_its_part_evenly(seed: int, sampling: str) -> None:
    found = tree(seed)
    num_images = int((found.cluster >= 0).sum())
    for target in (0, 1, 7, 50, 200, num_images - 1, num_images, 10_000):
        kept = balance(found, BalanceConfig(target_images=target, sampling=sampling), seed=seed).kept
        assert kept.sum() == min(target, num_images)
        assert not kept[found.cluster < 0].any()
        before, after = found.sizes(), found.sizes(kept)
        assert sorted(after[2]) == sorted(slow_quotas(before[2], target))
        for level in (2, 1):
            for parent, quota in enumerate(after[level]):
                children = np.flatnonzero(found.parents[level - 1] == parent)
                assert sorted(after[level - 1][children]) == sorted(slow_quotas(before[level - 1][children], int(quota)))
        if sampling == "closest":
            for cluster in np.unique(found.cluster[kept]):
                inside = found.cluster == cluster
                assert (
                    kept.sum() == 0
                    or not (inside & ~kept).any()
                    or (found.similarity[inside & kept].min() >= found.similarity[inside & ~kept].max())
                )


def test_the_last_images_of_a_share_go_to_random_children() -> None:
    parent, sizes = np.zeros(4, np.int32), np.array([9, 9, 9, 1])
    lucky = {tuple(share_among_children(sizes, parent, np.array([8]), seed=seed, purpose="x")) for seed in range(40)}
    assert lucky == {(3, 2, 2, 1), (2, 3, 2, 1), (2, 2, 3, 1)}


def test_a_balance_repeats_for_a_seed_changes_with_it_and_evens_out_what_it_reports() -> None:
    found = tree(1, num_images=3000)
    first, again, other = (balance(found, BalanceConfig(target_images=300), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.kept, again.kept)
    assert not np.array_equal(first.kept, other.kept)
    for number, level in enumerate(first.levels):
        assert level["after"]["evenness"] > level["before"]["evenness"]
        assert level["after"]["gini"] < level["before"]["gini"]
        assert level["after"]["largest"] == found.sizes(first.kept)[number].max()


def test_one_level_keeps_what_a_common_level_leaves_of_each_cluster() -> None:
    cluster = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [100, 5, 60])).astype(np.int32)
    flat = Hierarchy(cluster, np.zeros(165, np.float32), (np.zeros((4, 2), np.float32),), ())
    kept = balance(flat, BalanceConfig(target_images=65), seed=1).kept
    assert np.bincount(cluster[kept], minlength=4).tolist() == [30, 5, 0, 30]
    assert balance(flat, BalanceConfig(target_images="all"), seed=1).kept.all()
    assert balance(flat, BalanceConfig(), seed=1).target == resolve_target("auto", np.array([100, 5, 0, 60]))
