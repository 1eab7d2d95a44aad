"""Retrieval by several curated sets against brute force, with every image accounted for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heliostat.config import validate
from heliostat.curation.assignment import assign
from heliostat.curation.composition import CompositionRow
from heliostat.curation.retrieval import REASONS, Retrieved, retrieve
from heliostat.curation.retrieval_cluster import draw_from_matched
from heliostat.curation.retrieval_config import ClustersConfig, RetrievalConfig, RetrievalSetConfig, resolve_set
from heliostat.curation.retrieval_sample import Candidates, best_ranked, take_next_nearest, take_union
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.errors import ConfigError, DataError
from heliostat.storage import LocalStore


def unit(rows: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def around(directions: list[int], count: int, seed: int, width: int = 8) -> np.ndarray:
    generator = np.random.default_rng(seed)
    near = np.eye(width)[np.repeat(directions, count)] + 0.05 * generator.standard_normal((count * len(directions), width))
    return (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float16)


def go(
    pool: np.ndarray,
    curated: dict[str, np.ndarray],
    folder: Path,
    *,
    kept: np.ndarray | None = None,
    seed: int = 0,
    **settings: Any,
) -> Retrieved:
    return retrieve(
        ArrayVectors(pool, kept=kept, rows_per_block=37),
        {name: ArrayVectors(array, rows_per_block=11) for name, array in curated.items()},
        validate(RetrievalConfig, settings, "recipe.yaml"),
        clusters=ClustersConfig(iterations=8),
        seed=seed,
        work=LocalStore(folder),
        run=run_serially,
    )


def reasons(found: Retrieved) -> list[str]:
    return [REASONS[number] for number in found.reason]


def test_sample_mode_is_the_union_of_each_curated_images_nearest_without_repeats(tmp_path: Path) -> None:
    pool, curated, kept = unit(200, 8, 0), unit(30, 8, 1), np.random.default_rng(2).random(200) < 0.8
    found = go(pool, {"own": curated}, tmp_path, kept=kept, mode="sample", neighbors=4)
    similarity = np.where(kept, curated.astype(np.float64) @ pool.astype(np.float64).T, -2.0)
    nearest = np.argsort(-similarity, axis=1)[:, :4]
    assert set(np.flatnonzero(found.kept)) == set(nearest.ravel())
    assert found.kept.sum() < 30 * 4  # several curated images reach the same image
    assert len(found.links.pool) == 30 * 4
    for pool_row, curated_row, rank in zip(found.links.pool, found.links.curated, found.links.rank, strict=True):
        assert nearest[curated_row, rank - 1] == pool_row
    np.testing.assert_allclose(found.links.similarity, similarity[found.links.curated, found.links.pool], atol=1e-3)
    assert {reason for reason, row_kept in zip(reasons(found), found.kept | ~kept, strict=True) if not row_kept} == {
        "not_retrieved"
    }
    distinct = int(found.kept.sum())
    assert found.composition == (CompositionRow("own", 30, "sample", 120, distinct, distinct),)


def test_without_collisions_a_sample_brings_exactly_neighbors_times_images(tmp_path: Path) -> None:
    pool, curated = unit(400, 8, 0), unit(30, 8, 1)
    found = go(pool, {"own": curated}, tmp_path, mode="sample", neighbors=4, collisions="next_nearest")
    assert found.composition == (CompositionRow("own", 30, "sample", 120, 120, 120),)
    assert found.kept.sum() == 120
    assert np.bincount(found.links.curated).tolist() == [4] * 30


@pytest.mark.parametrize("seed", range(6))
def test_next_nearest_equals_a_loop_over_ranks_and_similarities(seed: int) -> None:
    generator = np.random.default_rng(seed)
    similarity = generator.integers(0, 40, size=(12, 30)) / 40  # with ties
    pool = np.argsort(-similarity, axis=1, kind="stable")[:, :9]
    candidates = Candidates(np.arange(12) * 10, pool, np.take_along_axis(similarity, pool, axis=1).astype(np.float32))
    taken: dict[int, tuple[int, int]] = {}
    held = np.zeros(12, int)
    for rank in range(9):
        for one in sorted(range(12), key=lambda one: (-candidates.similarity[one, rank], one)):
            if held[one] < 3 and pool[one, rank] not in taken:
                taken[pool[one, rank]] = (one * 10, rank + 1)
                held[one] += 1
    pairs = take_next_nearest(candidates, 3, 30)
    assert {
        int(row): (int(one), int(rank)) for row, one, rank in zip(pairs.pool, pairs.curated, pairs.rank, strict=True)
    } == taken
    assert len(pairs.pool) == len(taken)


def test_a_union_skips_missing_neighbours_and_a_cap_keeps_the_best_ranks() -> None:
    candidates = Candidates(
        np.array([5, 6]), np.array([[1, 2, 3], [2, 0, -1]]), np.array([[0.9, 0.8, 0.7], [0.95, 0.5, -1]], np.float32)
    )
    pairs = take_union(candidates, 3)
    assert sorted(zip(pairs.pool, pairs.curated, pairs.rank, strict=True)) == [
        (0, 6, 2),
        (1, 5, 1),
        (2, 5, 2),
        (2, 6, 1),
        (3, 5, 3),
    ]
    assert best_ranked(pairs, None).tolist() == [0, 1, 2, 3]
    assert best_ranked(pairs, 2).tolist() == [1, 2]
    assert best_ranked(pairs, 3).tolist() == [0, 1, 2]
    assert best_ranked(take_union(candidates._replace(pool=np.full((2, 3), -1)), 3), 2).tolist() == []


def test_a_cap_on_sample_mode_names_what_it_cut(tmp_path: Path) -> None:
    pool, curated = unit(200, 8, 0), unit(30, 8, 1)
    best = set((curated.astype(float) @ pool.astype(float).T).argmax(axis=1))
    found = go(pool, {"own": curated}, tmp_path, mode="sample", max_images=len(best))
    assert set(np.flatnonzero(found.kept)) == best
    assert set(reasons(found)) == {"", "not_retrieved", "over_max_images"}


def test_more_neighbours_than_the_pool_holds_retrieve_the_pool(tmp_path: Path) -> None:
    assert go(unit(5, 8, 0), {"own": unit(2, 8, 1)}, tmp_path, mode="sample", neighbors=32).kept.all()


def test_a_cluster_is_matched_by_more_than_three_curated_images_and_not_by_three() -> None:
    pool_cluster = np.repeat([0, 1, 2, -1], 50).astype(np.int32)
    curated_cluster = np.array([0] * 3 + [1] * 4 + [-1] * 9, np.int32)
    draw = draw_from_matched(pool_cluster, curated_cluster, 3, min_images=3, quota=9, max_images=None, seed=0, name="x")
    assert draw.matched.tolist() == [False, True, False]
    assert set(pool_cluster[draw.drawn]) == {1}
    assert len(draw.final) == 9


def test_a_draw_takes_at_most_the_quota_of_each_cluster_and_the_cap_of_all_and_follows_its_name() -> None:
    pool_cluster = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 5, 40])).astype(np.int32)

    def draw(name: str = "x", max_images: int | None = None, seed: int = 0) -> Any:
        curated = np.repeat([0, 1, 2], 4).astype(np.int32)
        return draw_from_matched(pool_cluster, curated, 3, min_images=3, quota=10, max_images=max_images, seed=seed, name=name)

    assert np.bincount(pool_cluster[draw().final]).tolist() == [10, 5, 10]
    assert len(draw(max_images=12).final) == 12
    assert set(draw(max_images=12).final) < set(draw().drawn)
    np.testing.assert_array_equal(draw().final, draw().final)
    assert set(draw().final) != set(draw(seed=1).final)
    assert set(draw().final) != set(draw(name="y").final)


def test_cluster_mode_draws_from_matched_clusters_and_credits_the_most_similar_image_there(tmp_path: Path) -> None:
    pool, kept = around([0, 1, 2], 40, 0), np.ones(120, bool)
    kept[[3, 50, 119]] = False
    curated = np.concatenate([around([0, 1], 5, 1), around([2], 2, 2)])
    found = go(pool, {"own": curated}, tmp_path, kept=kept, mode="cluster", num_clusters=3)
    assert found.matched is not None
    assert found.cluster is not None
    np.testing.assert_array_equal(np.flatnonzero(found.kept), np.setdiff1d(np.arange(80), [3, 50]))
    assert found.links.pool.tolist() == np.flatnonzero(found.kept).tolist()
    exact_pool, exact_curated = (array.astype(np.float64) for array in (pool, curated))
    similarity = exact_pool @ exact_curated.T
    for row, one, value in zip(found.links.pool, found.links.curated, found.links.similarity, strict=True):
        creditors = np.arange(5) + 5 * (row >= 40)
        assert one == creditors[similarity[row, creditors].argmax()]
        assert value == np.float32(min(similarity[row, one], 1))
    for one in set(found.links.curated.tolist()):
        mine = found.links.curated == one
        by_rank = found.links.similarity[mine][np.argsort(found.links.rank[mine])]
        assert sorted(found.links.rank[mine].tolist()) == list(range(1, int(mine.sum()) + 1))
        assert (np.diff(by_rank) <= 0).all()
    assert {REASONS[number] for number in found.reason[80:119]} == {"cluster_not_matched"}
    assert found.matched.num_curated.tolist() == [5, 5]
    assert sorted(found.matched.num_pool.tolist()) == [39, 39]
    assert found.matched.examples.shape == (2, 10)
    for cluster, examples in zip(found.matched.cluster, found.matched.examples, strict=True):
        assert len(set(examples)) == 10
        assert set(found.cluster[examples]) == {cluster}


def test_several_sets_share_one_kmeans_are_served_in_order_and_count_an_image_where_it_came_first(tmp_path: Path) -> None:
    pool = around([0, 1, 2, 3], 50, 0)
    curated = {"later": around([1, 2], 6, 1), "first": around([1], 5, 2), "whole": around([4], 7, 3), "near": around([3], 2, 4)}
    found = go(
        pool,
        curated,
        tmp_path,
        mode="auto",
        num_clusters=4,
        sets={
            "first": {"max_images_per_cluster": 30},
            "whole": {"mode": "none", "as_is": True},
            "later": {"max_images_per_cluster": 20, "max_images": 35},
            "near": {"mode": "sample", "neighbors": 3, "as_is": True},
        },
    )
    assert [one.name for one in found.sets] == ["first", "whole", "later", "near"]
    first, whole, later, near_as_is, near = found.composition
    assert first == CompositionRow("first", 5, "cluster", 30, 30, 30)
    assert whole == CompositionRow("whole", 7, "as is", None, 7, 7)
    assert later[:5] == ("later", 12, "cluster", 40, 35)
    assert near_as_is == CompositionRow("near", 2, "as is", None, 2, 2)
    assert near[:4] == ("near", 2, "sample", 6)
    assert first.added + later.added + near.added == found.kept.sum()
    sets_of = [set(found.links.set[found.links.pool == row].tolist()) for row in np.flatnonzero(found.kept)]
    assert sum(0 in one for one in sets_of) == 30
    assert sum(2 in one for one in sets_of) == 35
    assert sum(one == {0, 2} for one in sets_of) == 30 + 35 - first.added - later.added
    names = set(reasons(found))
    assert names == {"", "not_retrieved", "over_cluster_quota", "over_max_images"}
    assert all(REASONS[number] == "not_retrieved" for number in found.reason[:50])  # direction 0 is in no set
    assert found.centroids is not None
    assert found.centroids.shape == (4, 8)


def test_a_set_that_matches_nothing_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    pool, curated = around([0, 1], 40, 0), {"few": around([0], 3, 1), "enough": around([1], 4, 2)}
    sets = {"few": {}, "enough": {}}
    found = go(pool, curated, tmp_path / "a", mode="cluster", num_clusters=2, sets=sets)
    assert found.unmatched == {"few": "its fullest cluster holds 3 curated images, and more than 3 are needed"}
    assert found.composition[0] == CompositionRow("few", 3, "cluster", 0, 0, 0)
    with pytest.raises(DataError, match=r"no curated set brings in an image \(few: its fullest cluster holds 3 curated images"):
        go(pool, {"few": curated["few"]}, tmp_path / "b", mode="cluster", num_clusters=2)


def test_retrieval_repeats_and_goes_on_in_the_same_place(tmp_path: Path) -> None:
    pool, curated = around([0, 1, 2], 60, 0), {"a": around([0, 1], 5, 1)}
    settings: dict[str, Any] = {"mode": "cluster", "num_clusters": 3, "max_images_per_cluster": 20}
    first, same_place, other_place, other_seed = (
        go(pool, curated, tmp_path / name, seed=seed, **settings) for name, seed in (("a", 0), ("a", 0), ("b", 0), ("c", 1))
    )
    for other in (same_place, other_place):
        np.testing.assert_array_equal(first.kept, other.kept)
        assert first.links.similarity.tobytes() == other.links.similarity.tobytes()
    assert not np.array_equal(first.kept, other_seed.kept)


@pytest.mark.parametrize(
    ("pool", "curated", "message"),
    [
        (unit(5, 8, 0), {}, "needs curated images"),
        (unit(5, 8, 0), {"a": unit(0, 8, 1)}, "curated set 'a' has no image"),
        (unit(0, 8, 0), {"a": unit(2, 8, 1)}, "needs pool images"),
        (unit(5, 8, 0), {"a": unit(2, 6, 1)}, "width 6, the pool 8"),
        (unit(5, 8, 0), {"a": unit(2, 8, 1), "b": unit(2, 8, 1)}, "retrieval.sets names none"),
    ],
)
def test_what_cannot_be_retrieved_is_an_error(
    tmp_path: Path, pool: np.ndarray, curated: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        go(pool, curated, tmp_path, mode="sample")


def test_auto_is_sample_above_a_million_images_with_the_caps_of_the_paper() -> None:
    config = RetrievalConfig(mode="auto")
    assert resolve_set("x", config, 1_000_001)[1:] == ("sample", False, 4, 3, 10_000, None)
    assert resolve_set("x", config, 1_000_000)[1:] == ("cluster", False, 4, 3, 10_000, 1_000_000)
    own = RetrievalConfig(
        mode="sample",
        neighbors=32,
        max_images=50,
        sets={"x": RetrievalSetConfig(max_images="all"), "y": RetrievalSetConfig(neighbors=2)},
    )
    assert resolve_set("x", own, 10)[1:] == ("sample", False, 32, 3, 10_000, None)
    assert resolve_set("y", own, 10)[1:] == ("sample", False, 2, 3, 10_000, 50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sets": {"x": {}}}, "mode is none, but sets are given"),
        ({"mode": "auto", "sets": {"x": {"mode": "none"}}}, "does nothing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RetrievalConfig, settings, "recipe.yaml")


def test_the_assignment_of_a_curated_set_is_that_of_brute_force(tmp_path: Path) -> None:
    vectors, centroids = unit(70, 8, 0), unit(9, 8, 1).astype(np.float32)
    found = assign(ArrayVectors(vectors, rows_per_block=9), centroids, name="x", work=LocalStore(tmp_path), run=run_serially)
    np.testing.assert_array_equal(found.cluster, (vectors.astype(np.float64) @ centroids.T).argmax(axis=1))
