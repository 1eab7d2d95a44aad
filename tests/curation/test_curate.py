"""From the decisions of dedup to the training set: what curated sets bring in, evened out over clusters."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_features import DIMENSION, made_features, unit

from heliostat.config import validate
from heliostat.curation.config import CurateConfig
from heliostat.curation.curate import Curation, curate
from heliostat.curation.ledger import Decisions, same_reason
from heliostat.curation.pool import FeatureFiles, Pool, VectorSpace
from heliostat.curation.retrieval import REASONS
from heliostat.curation.tasks import run_serially
from heliostat.errors import DataError
from heliostat.storage import LocalStore

# Themes are directions; images of a theme lie around it.


def themed(themes: list[int], count: int, seed: int) -> np.ndarray:
    """So many unit vectors around each theme, as float16 would hold them."""
    generator = np.random.default_rng(seed)
    around = np.eye(DIMENSION)[np.repeat(themes, count)] + 0.05 * generator.standard_normal((count * len(themes), DIMENSION))
    return unit(around).astype(np.float16).astype(np.float64)


def of(folder: Path, name: str, vectors: np.ndarray, **options: Any) -> FeatureFiles:
    return made_features(LocalStore(folder / name), vectors, name=f"features/{name}@1", **options)


def decided(num_rows: int, dropped: tuple[int, ...] = ()) -> Decisions:
    """What dedup might have left: everything but the named rows."""
    decisions = Decisions.of(num_rows)
    decisions.judge(same_reason("copies", decisions.rows, np.isin(np.arange(num_rows), dropped), "copy"))
    return decisions


def run(
    folder: Path,
    pool: Pool,
    sets: dict[str, FeatureFiles] | None = None,
    *,
    dropped: tuple[int, ...] = (),
    run_tasks=run_serially,
    seed: int = 0,
    **settings: Any,
) -> Curation:
    config = validate(CurateConfig, settings, "recipe.yaml")
    work = LocalStore(folder)
    return curate(pool, decided(pool.num_rows, dropped), sets or {}, config, work=work, run=run_tasks, seed=seed)


def causes(found: Curation) -> list[tuple[str, str]]:
    return [found.decisions.causes[code] for code in found.decisions.cause]


def nearest(curated: np.ndarray, pool: np.ndarray, alive: np.ndarray, count: int) -> np.ndarray:
    """(M, count) rows of the pool: the most similar of those alive, by comparing all."""
    similarity = np.where(alive, curated.astype(np.float32) @ pool.astype(np.float32).T, -2.0)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


ALL = {"target_images": "all"}


def test_a_sample_keeps_the_nearest_of_what_dedup_left_and_says_who_asked_for_them(tmp_path: Path) -> None:
    vectors, curated = unit(np.random.default_rng(0).standard_normal((90, DIMENSION))), themed([1, 5], 4, seed=1)
    dropped = tuple(range(0, 90, 9))
    pool, own = Pool((of(tmp_path, "pool", vectors),)), of(tmp_path, "own", curated)
    found = run(tmp_path / "w", pool, {"own": own}, dropped=dropped, retrieval={"mode": "sample", "neighbors": 3}, balance=ALL)
    alive = ~np.isin(np.arange(90), dropped)
    expected = nearest(curated, vectors, alive, 3)
    assert set(found.decisions.rows) == set(expected.ravel())
    assert {cause for row, cause in enumerate(causes(found)) if alive[row] and row not in expected} == {
        ("retrieval", "not_retrieved")
    }
    assert all(causes(found)[row] == ("copies", "copy") for row in dropped)
    assert [(count.stage, count.rows_in, count.rows_kept) for count in found.decisions.counts] == [
        ("copies", 90, 80),
        ("retrieval", 80, len(np.unique(expected))),
        ("balance", len(np.unique(expected)), len(np.unique(expected))),
    ]
    links = found.retrieved_by
    assert links.sets == (("own", "sample"),)
    ids = own.read(0, ["id"])["id"].to_pylist() + own.read(1, ["id"])["id"].to_pylist()
    assert [bytes(one).hex() for one in links.curated_ids] == ids
    told = {(int(row), int(one), int(rank)) for row, one, rank in zip(links.pool, links.curated, links.rank, strict=True)}
    assert told == {(int(row), one, rank + 1) for one, rows in enumerate(expected) for rank, row in enumerate(rows)}
    (coverage,) = found.statistics["retrieval"]["sets"]
    assert (coverage["images"], coverage["images_that_retrieved"], coverage["coverage"]) == (8, 8, 1.0)
    # What fell out before the clusters lies in none.
    assert ((found.cluster_levels >= 0).all(axis=1) == np.isin(np.arange(90), found.decisions.rows)).all()


def test_clusters_keep_the_themes_of_the_set_and_drop_the_others_with_their_reason(tmp_path: Path) -> None:
    vectors = themed([0, 1, 2, 3], 12, seed=2)
    pool, own = Pool((of(tmp_path, "pool", vectors),)), of(tmp_path, "own", themed([1, 3], 5, seed=3))
    retrieval = {"mode": "cluster", "num_clusters": 4, "max_images_per_cluster": 10}
    found = run(tmp_path / "w", pool, {"own": own}, retrieval=retrieval, balance=ALL)
    theme = np.repeat(np.arange(4), 12)
    assert np.bincount(theme[found.decisions.rows], minlength=4).tolist() == [0, 10, 0, 10]
    for row, (stage, reason) in enumerate(causes(found)):
        if row not in found.decisions.rows:
            assert (stage, reason) == ("retrieval", "cluster_not_matched" if theme[row] in (0, 2) else "over_cluster_quota")
    assert found.matched is not None
    assert ((found.matched >= 0) == np.isin(theme, [1, 3])).all()
    assert found.statistics["retrieval"]["num_matched_clusters"] == 2
    assert "" in REASONS


def test_several_sets_each_bring_their_own_and_the_composition_tells_what_each_added(tmp_path: Path) -> None:
    vectors = themed([0, 1, 2], 10, seed=4)
    pool = Pool((of(tmp_path, "a", vectors[:17]), of(tmp_path, "b", vectors[17:])))
    curated = {"one": themed([0], 2, seed=5), "two": themed([0, 2], 2, seed=6)}
    sets = {name: of(tmp_path, name, array) for name, array in curated.items()}
    retrieval = {"mode": "auto", "neighbors": 3, "sets": {"one": {"mode": "sample"}, "two": {"mode": "sample", "neighbors": 2}}}
    found = run(tmp_path / "w", pool, sets, retrieval=retrieval, balance=ALL)
    everyone = np.ones(30, np.bool_)
    one, two = (np.unique(nearest(curated[name], vectors, everyone, count)) for name, count in (("one", 3), ("two", 2)))
    assert set(found.decisions.rows) == set(one) | set(two)
    rows = {row.dataset: (row.images, row.final, row.added) for row in found.composition}
    assert rows == {"one": (2, len(one), len(one)), "two": (4, len(two), len(set(two) - set(one)))}
    assert set(found.retrieved_by.set_code) == {0, 1}
    # Curated images are numbered over all sets: those of the second follow those of the first.
    assert found.retrieved_by.curated[found.retrieved_by.set_code == 1].min() == 2


def test_a_set_that_only_joins_as_it_is_leaves_the_pool_alone(tmp_path: Path) -> None:
    pool, own = Pool((of(tmp_path, "pool", themed([0, 1], 6, seed=7)),)), of(tmp_path, "own", themed([4], 3, seed=8))
    retrieval = {"mode": "auto", "sets": {"own": {"mode": "none", "as_is": True}}}
    found = run(tmp_path / "w", pool, {"own": own}, retrieval=retrieval, balance=ALL)
    assert len(found.decisions.rows) == 12
    assert [(row.dataset, row.mode, row.final) for row in found.composition] == [("own", "as is", 3)]
    assert [count.stage for count in found.decisions.counts] == ["copies", "balance"]


def test_balance_reaches_its_target_and_takes_from_the_large_clusters(tmp_path: Path) -> None:
    vectors = np.concatenate([themed([0], 40, seed=9), themed([1], 12, seed=10), themed([2], 4, seed=11)])
    pool = Pool((of(tmp_path, "pool", vectors),))
    found = run(tmp_path / "w", pool, clusters={"num_clusters": 3}, balance={"target_images": 24})
    theme = np.repeat([0, 1, 2], [40, 12, 4])
    # Water: 4 of the smallest, and what is left evenly of the two others.
    assert np.bincount(theme[found.decisions.rows]).tolist() == [10, 10, 4]
    assert set(causes(found)) == {("", ""), ("balance", "over_cluster_level")}
    assert (found.statistics["balance"]["target_images"], found.statistics["balance"]["kept_images"]) == (24, 24)
    other = run(tmp_path / "v", pool, clusters={"num_clusters": 3}, balance={"target_images": 24}, seed=1)
    assert len(other.decisions.rows) == 24
    assert set(other.decisions.rows) != set(found.decisions.rows)


def test_a_target_beyond_what_there_is_keeps_all(tmp_path: Path) -> None:
    pool = Pool((of(tmp_path, "pool", themed([0], 5, seed=9)),))
    found = run(tmp_path / "w", pool, balance={"target_images": 1000})
    assert len(found.decisions.rows) == 5
    assert found.statistics["balance"]["kept_images"] == 5


def test_one_image_is_a_training_set_of_one(tmp_path: Path) -> None:
    pool, own = Pool((of(tmp_path, "pool", themed([0], 1, seed=1)),)), of(tmp_path, "own", themed([0], 1, seed=2))
    assert len(run(tmp_path / "a", pool).decisions.rows) == 1
    sampled = run(tmp_path / "b", pool, {"own": own}, retrieval={"mode": "sample", "neighbors": 4})
    assert sampled.decisions.rows.tolist() == [0]


def one_line(error: pytest.ExceptionInfo[DataError], *said: str) -> None:
    assert "\n" not in str(error.value)
    for words in said:
        assert words in str(error.value)


def test_a_pool_of_which_dedup_left_nothing_is_refused(tmp_path: Path) -> None:
    pool = Pool((of(tmp_path, "pool", themed([0], 3, seed=1)),))
    with pytest.raises(DataError) as error:
        run(tmp_path / "w", pool, dropped=(0, 1, 2))
    one_line(error, "dedup leaves no image", "copies.threshold")


def test_sets_that_match_nothing_are_named(tmp_path: Path) -> None:
    pool = Pool((of(tmp_path, "pool", themed([0, 1], 20, seed=1)),))
    few = {"birds": of(tmp_path, "birds", themed([0], 2, seed=2))}
    with pytest.raises(DataError) as error:
        run(tmp_path / "w", pool, few, retrieval={"mode": "cluster", "num_clusters": 2})
    one_line(error, "birds", "min_images_per_cluster")
    # With another set that matches, it is a note.
    both = {**few, "fish": of(tmp_path, "fish", themed([1], 8, seed=3))}
    retrieval = {"mode": "cluster", "num_clusters": 2, "sets": {"birds": {}, "fish": {}}}
    found = run(tmp_path / "v", pool, both, retrieval=retrieval, balance=ALL)
    why = {one["set"]: one["why_nothing"] for one in found.statistics["retrieval"]["sets"]}
    assert why["birds"]
    assert why["fish"] == ""
    assert len(found.decisions.rows) == 20


def test_a_set_in_which_nothing_decodes_is_named(tmp_path: Path) -> None:
    pool = Pool((of(tmp_path, "pool", themed([0], 5, seed=1)),))
    broken = of(tmp_path, "own", themed([0], 2, seed=2), undecodable=[0, 1])
    with pytest.raises(DataError) as error:
        run(tmp_path / "w", pool, {"own": broken}, retrieval={"mode": "sample"})
    one_line(error, "curated set 'own' has no image")


@pytest.mark.parametrize("space", ["copy_space", "semantic_space"])
def test_a_set_of_another_embedder_is_refused_though_its_vectors_are_as_wide(tmp_path: Path, space: str) -> None:
    pool, own = Pool((of(tmp_path, "pool", themed([0], 5, seed=1)),)), of(tmp_path, "own", themed([0], 2, seed=2))
    info = own.info.model_copy(update={space: VectorSpace(name="other", version="2", dimension=DIMENSION)})
    with pytest.raises(DataError) as error:
        run(tmp_path / "w", pool, {"own": replace(own, info=info)}, retrieval={"mode": "sample"})
    one_line(error, "features/own@1", f"another {space.removesuffix('_space')} embedder", "embed both with the same settings")


CASES = {
    "sample": {"retrieval": {"mode": "sample", "neighbors": 6}, "clusters": {"num_clusters": 3}},
    "cluster": {
        "retrieval": {"mode": "cluster", "num_clusters": 6, "min_images_per_cluster": 1},
        "clusters": {"levels": [6, 2]},
    },
}


def same(one: Curation, other: Curation) -> None:
    np.testing.assert_array_equal(one.decisions.cause, other.decisions.cause)
    np.testing.assert_array_equal(one.cluster_levels, other.cluster_levels)
    for name in ("pool", "curated", "rank", "similarity", "set_code"):
        np.testing.assert_array_equal(getattr(one.retrieved_by, name), getattr(other.retrieved_by, name), err_msg=name)
    assert one.composition == other.composition
    assert one.statistics == other.statistics


@pytest.mark.parametrize("case", CASES)
def test_the_result_does_not_depend_on_how_many_files_hold_the_features(tmp_path: Path, case: str) -> None:
    vectors, curated = themed([0, 1, 2, 3], 15, seed=12), themed([0, 2], 6, seed=13)
    results = []
    for number, rows in enumerate((7, 1000, 13)):
        folder = tmp_path / str(number)
        pool = Pool((of(folder, "pool", vectors, rows_per_file=rows),))
        sets = {"own": of(folder, "own", curated, rows_per_file=rows)}
        results.append(run(folder / "w", pool, sets, dropped=(5, 20), balance={"target_images": 20}, **CASES[case]))
    assert len(results[0].decisions.rows) == 20
    same(results[0], results[1])
    same(results[0], results[2])


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_curation_goes_on_and_ends_the_same(tmp_path: Path, case: str) -> None:
    pool = Pool((of(tmp_path, "pool", themed([0, 1, 2, 3], 10, seed=12)),))
    sets = {"own": of(tmp_path, "own", themed([0, 2], 6, seed=13))}
    settings = {"balance": {"target_images": 15}, **CASES[case]}
    whole = run(tmp_path / "whole", pool, sets, **settings)

    def stopping_after(limit: int):
        calls = 0

        def stopping(function, tasks, *, label: str, has_state: bool = False):
            nonlocal calls
            for result in run_serially(function, tasks, label=label, has_state=has_state):
                calls += 1
                if calls >= limit:
                    raise KeyboardInterrupt  # as if the driver died
                yield result

        return stopping

    stops = 0
    for limit in (1, 2, 3, 5, 8, 12, 20, 33):  # each goes on from where the one before was stopped
        with contextlib.suppress(KeyboardInterrupt):
            run(tmp_path / "stopped", pool, sets, run_tasks=stopping_after(limit), **settings)
            break
        stops += 1
    assert stops >= 3
    same(run(tmp_path / "stopped", pool, sets, **settings), whole)
