"""Clusters of clusters: the tree is consistent, spreads over what there is, and repeats."""

from pathlib import Path

import numpy as np
import pytest

from heliostat.config import validate
from heliostat.curation.assignment import Assignment
from heliostat.curation.clusters import evenness, gini, resolve_levels, resolve_num_clusters
from heliostat.curation.hierarchy import Hierarchy, hierarchy, members_for_refit, resolve_resampling
from heliostat.curation.retrieval_config import WEB_LEVELS, ClustersConfig
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.errors import ConfigError, DataError
from heliostat.storage import LocalStore


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def blobs(sizes: list[int], dimension: int = 16, spread: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    label = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return unit(np.eye(dimension)[label] + spread * generator.standard_normal((len(label), dimension))), label


def fit(array: np.ndarray, folder: Path, kept: np.ndarray | None = None, **settings: object) -> Hierarchy:
    vectors = ArrayVectors(array, kept=kept, rows_per_block=500)
    return hierarchy(vectors, ClustersConfig(**{"iterations": 4, **settings}), work=LocalStore(folder), run=run_serially)


def test_every_level_is_a_partition_of_the_level_below(tmp_path: Path) -> None:
    array, _ = blobs([200, 150, 100, 60, 40, 30, 20, 10])
    kept = np.random.default_rng(1).random(len(array)) < 0.8
    found = fit(array, tmp_path, kept=kept, levels=(60, 20, 5))
    assert [len(centroids) for centroids in found.centroids] == [60, 20, 5]
    np.testing.assert_array_equal(found.cluster >= 0, kept)
    for level in (2, 3):
        below, here = found.clusters_of(level - 1), found.clusters_of(level)
        for cluster in np.unique(below[kept]):
            assert set(here[below == cluster]) == {found.parents[level - 2][cluster]}
        assert (here[~kept] == -1).all()
    for level, sizes in enumerate(found.sizes(), start=1):
        cluster = found.clusters_of(level)
        assert sizes.tolist() == [int((cluster == one).sum()) for one in range(len(sizes))]
        assert sizes.sum() == kept.sum()


def test_the_top_level_finds_concepts_of_very_different_size(tmp_path: Path) -> None:
    array, label = blobs([3000, 300, 30, 30, 30, 30])
    found = fit(array, tmp_path, levels=(120, 6))
    top = found.clusters_of(2)
    majority = [int(np.bincount(top[label == one], minlength=6).argmax()) for one in range(6)]
    assert sorted(majority) == [0, 1, 2, 3, 4, 5]
    assert np.mean([(top[label == one] == majority[one]).mean() for one in range(6)]) > 0.99


def test_resampling_spreads_the_centroids_of_a_crowded_pool(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    crowd = 0.1 * generator.standard_normal((1900, 6)) + np.eye(6)[0]  # nearly all images in one spot
    array = unit(np.concatenate([crowd, generator.standard_normal((300, 6))]))

    def in_crowd(name: str, **settings: object) -> int:
        found = fit(array, tmp_path / name, levels=(40,), **settings)
        return int((found.centroids[0][:, 0] > 0.95).sum())

    assert in_crowd("plain") >= 8
    assert 1 <= in_crowd("resampled", resampling_rounds=(4,), resampling_sizes=(4,)) <= 3


def test_a_hierarchy_repeats_and_changes_with_its_seed(tmp_path: Path) -> None:
    array, _ = blobs([300, 200, 100])
    first, again, other = (
        fit(array, tmp_path / name, levels=(30, 6), seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.cluster.tobytes() == again.cluster.tobytes()
    assert first.parents[0].tobytes() == again.parents[0].tobytes()
    assert first.centroids[0].tobytes() != other.centroids[0].tobytes()


def test_a_pool_of_copies_gives_one_filled_cluster_and_a_chosen_second_level_is_refused(tmp_path: Path) -> None:
    array = np.repeat(blobs([1])[0], 50, axis=0)
    found = fit(array, tmp_path / "one", levels=(5,))
    assert sorted(found.sizes()[0].tolist()) == [0, 0, 0, 0, 50]
    with pytest.raises(DataError, match="asks for 2 clusters at level 2, but only 1"):
        fit(array, tmp_path / "two", levels=(5, 2))


def test_an_empty_pool_is_an_error_and_one_image_is_a_tree_of_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image is left to cluster"):
        fit(np.empty((0, 8), np.float16), tmp_path / "none")
    found = fit(blobs([1])[0], tmp_path / "one")
    assert (found.cluster.tolist(), [len(level) for level in found.centroids]) == ([0], [1])


@pytest.mark.parametrize("rule", ["closest", "random"])
def test_members_for_a_new_fit_are_so_many_of_every_cluster(rule: str) -> None:
    generator = np.random.default_rng(0)
    assignment = Assignment(generator.integers(-1, 7, size=300).astype(np.int32), generator.random(300).astype(np.float32))
    members = members_for_refit(assignment, 5, ClustersConfig(resampling=rule), seed=0)
    assert np.bincount(assignment.cluster[members]).tolist() == [5] * 7
    closest = [
        row
        for one in range(7)
        for row in sorted(np.flatnonzero(assignment.cluster == one), key=lambda r: -assignment.similarity[r])[:5]
    ]
    assert (sorted(closest) == members.tolist()) == (rule == "closest")


def test_auto_levels_follow_the_published_ratios() -> None:
    assert resolve_levels("auto", "auto", 2_550) == (50,)
    assert resolve_levels("auto", "auto", 1) == (1,)
    assert resolve_levels("auto", "auto", 1_000_000) == (13_333, 667, 67)
    published = resolve_levels("auto", "auto", 743_000_000)
    np.testing.assert_allclose(published, WEB_LEVELS, rtol=0.01)
    assert resolve_levels("auto", 34, 10**9) == (34,)
    assert resolve_levels((9, 3), "auto", 10**9) == (9, 3)


def test_auto_resampling_is_that_of_the_paper_for_any_number_of_levels() -> None:
    assert resolve_resampling(ClustersConfig(), 4) == ((0, 10, 10, 10), (1, 10, 5, 3))
    assert resolve_resampling(ClustersConfig(), 6) == ((0, 10, 10, 10, 10, 10), (1, 10, 5, 3, 3, 3))
    with pytest.raises(DataError, match="resampling_rounds has 1 numbers for 2 levels"):
        resolve_resampling(ClustersConfig(resampling_rounds=(3,)), 2)


def test_cluster_mode_has_100000_clusters_at_full_size_and_the_root_in_small() -> None:
    assert [resolve_num_clusters("auto", count) for count in (1, 2550, 10**6, 744_000_000, 10**12)] == [
        1,
        50,
        1000,
        100_000,
        100_000,
    ]
    assert resolve_num_clusters(7, 3) == 7


def test_gini_and_evenness_agree_with_their_definitions() -> None:
    sizes = np.random.default_rng(0).integers(0, 50, size=30)
    differences = np.abs(sizes[:, None] - sizes[None, :]).sum()
    assert gini(sizes) == pytest.approx(differences / (2 * len(sizes) ** 2 * sizes.mean()))
    assert gini(np.array([5, 5, 5])) == pytest.approx(0.0)
    assert gini(np.array([0, 0])) == 0.0
    assert evenness(np.array([5, 5, 5])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": [10, 5], "num_clusters": 3}, "keep one"),
        ({"levels": [10, 10]}, "falling"),
        ({"levels": [10, 5], "resampling_rounds": [1]}, "one per level"),
    ],
)
def test_contradictory_levels_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ClustersConfig, settings, "recipe.yaml")
