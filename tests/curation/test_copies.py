"""Copies over files of edges: representatives, the guard, and other thresholds without another join."""

import numpy as np
import pytest
from similar_vectors import on_a_circle, planted, similarity_matrix, slow_representatives

from heliostat.curation import copies, copies_shuffle
from heliostat.curation.copies import components_at, find_copies
from heliostat.curation.copies_config import CopyLimits, JoinConfig
from heliostat.curation.copies_report import describe_copies, size_histogram
from heliostat.curation.copies_shuffle import partitions_of
from heliostat.curation.join import self_join
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.errors import DataError, UsageError
from heliostat.storage import LocalStore


def limits(threshold: float, guard: float = -1.0) -> CopyLimits:
    return CopyLimits(threshold, guard, decontamination_threshold=threshold)


def joined(folder, vectors: np.ndarray, floor: float = 0.45, **keywords):
    files = LocalStore(folder / "files")
    config = JoinConfig(via="exact", edge_floor=floor, rows_per_range=90, audit_rows=10, neighbors=500)
    pool = ArrayVectors(vectors, rows_per_block=64, **keywords)
    self_join(pool, files=files, prefix="edges/", work=LocalStore(folder / "join"), config=config, run=run_serially)
    return pool, (files, "edges/")


def found_in(folder, vectors, rank, asked, *, present=None, **keywords):
    floor = 0.45
    pool, edges = joined(folder, vectors, floor, **keywords)
    work = LocalStore(folder / "copies")
    return find_copies(edges, pool, rank, asked, edge_floor=floor, work=work, run=run_serially, present=present)


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_partitions_equal_a_slow_version_over_all(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(copies_shuffle, "MEMBERS_PER_PARTITION", 20)
    monkeypatch.setattr(copies_shuffle, "ROWS_PER_PIECE", 70)
    monkeypatch.setattr(copies, "ROWS_PER_STRIP", 64)
    vectors, rank = planted(300, 16, seed), np.random.default_rng(seed).permutation(300)
    found = found_in(tmp_path, vectors, rank, limits(0.7, 0.65))
    similarity = similarity_matrix(vectors, vectors)
    assert found.representative.tolist() == slow_representatives(similarity, similarity > np.float32(0.7), rank, 0.65)
    assert found.unguarded.tolist() == slow_representatives(similarity, similarity > np.float32(0.7), rank, -1.0)
    represented = similarity[np.arange(300), found.representative]
    np.testing.assert_array_equal(found.similarity_to_representative[found.dropped], represented[found.dropped])
    np.fill_diagonal(similarity, -1)
    best, has = similarity.max(axis=1), similarity.max(axis=1) >= np.float32(0.45)
    np.testing.assert_array_equal(found.nearest, np.where(has, similarity.argmax(axis=1), -1))
    np.testing.assert_array_equal(found.nearest_similarity, np.where(has, best, -1.0).astype(np.float32))
    order = np.argsort(rank[np.unique(found.representative)])
    assert found.component[np.unique(found.representative)[order]].tolist() == list(range(len(order)))
    np.testing.assert_array_equal(found.component, found.component[found.representative])


@pytest.mark.parametrize("threshold", [0.45, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("guard", [-1.0, 0.45, 0.5, 0.7])
def test_another_threshold_needs_no_join_and_no_vectors_when_the_guard_is_not_below_the_floor(tmp_path, threshold, guard):
    vectors, rank = planted(300, 16), np.random.default_rng(0).permutation(300)
    pool, edges = joined(tmp_path, vectors)
    asked = limits(threshold, guard)
    whole = find_copies(edges, pool, rank, asked, edge_floor=0.45, work=LocalStore(tmp_path / "c"), run=run_serially)
    quick = components_at(edges, rank, asked, edge_floor=0.45)
    for name in ("component", "representative", "unguarded", "hops", "nearest", "nearest_similarity"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(quick, name))
    known = ~np.isnan(quick.similarity_to_representative)
    np.testing.assert_array_equal(quick.similarity_to_representative[known], whole.similarity_to_representative[known])


def test_a_guard_below_the_floor_is_reported_as_unknown_and_may_split_more(tmp_path):
    vectors, rank = on_a_circle([0, 50, 100]), np.arange(3)
    pool, edges = joined(tmp_path, vectors, floor=0.5)
    asked = limits(0.6, -0.5)
    whole = find_copies(edges, pool, rank, asked, edge_floor=0.5, work=LocalStore(tmp_path / "c"), run=run_serially)
    quick = components_at(edges, rank, asked, edge_floor=0.5)
    assert (whole.representative.tolist(), whole.num_unknown) == ([0, 0, 0], 0)
    assert (quick.representative.tolist(), quick.num_unknown) == ([0, 0, 2], 1)


def test_copies_do_not_depend_on_the_order_of_arrival(tmp_path):
    vectors, rank = planted(250, 12), np.random.default_rng(1).permutation(250)
    shuffled = np.random.default_rng(2).permutation(250)
    first = found_in(tmp_path / "a", vectors, rank, limits(0.7, 0.7))
    second = found_in(tmp_path / "b", vectors[shuffled], rank[shuffled], limits(0.7, 0.7))
    np.testing.assert_array_equal(first.representative[shuffled], shuffled[second.representative])
    np.testing.assert_array_equal(first.component[shuffled], second.component)


def test_absent_rows_have_no_component_and_represent_themselves(tmp_path):
    vectors, kept = planted(200, 12), np.random.default_rng(0).random(200) < 0.6
    rank = np.arange(200)[::-1].copy()
    found = found_in(tmp_path, vectors, rank, limits(0.6, 0.5), present=kept, kept=kept)
    assert ((found.component >= 0) == kept).all()
    assert (found.representative[~kept] == np.flatnonzero(~kept)).all()
    assert kept[found.representative[kept]].all()
    assert describe_copies(found).num_images == kept.sum()


def test_all_duplicates_keep_the_best_image_alone(tmp_path):
    found = found_in(tmp_path, np.repeat(planted(1, 8), 150, axis=0), np.roll(np.arange(150), 77), limits(0.6, 0.5))
    assert (found.representative == 77).all()
    report = describe_copies(found)
    assert (report.num_components, report.num_dropped, report.largest, report.size_histogram) == (
        1,
        149,
        (150,),
        {"2": 0, "3-4": 0, "5-8": 0, "9-16": 0, "17-32": 0, "33-64": 0, "65-128": 0, "129-256": 1},
    )


def test_no_image_and_one_image_are_copies_of_nothing(tmp_path):
    none = found_in(tmp_path / "none", np.empty((0, 8), np.float16), np.empty(0, np.int64), limits(0.6))
    assert none.component.tolist() == []
    one = found_in(tmp_path / "one", planted(1, 8), np.zeros(1, np.int64), limits(0.6))
    assert (one.component.tolist(), one.nearest.tolist(), one.nearest_similarity.tolist()) == ([0], [-1], [-1.0])
    for found, images in ((none, 0), (one, 1)):
        report = describe_copies(found)
        assert (report.num_images, report.num_singletons, report.num_components, report.mean_similarity) == (
            images,
            images,
            0,
            None,
        )


def test_the_report_says_what_the_guard_did(tmp_path):
    vectors = on_a_circle([0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 200.0])
    rank, threshold = np.array([0, 2, 3, 4, 5, 1, 6, 7]), float(np.cos(np.deg2rad(11)))
    report = describe_copies(found_in(tmp_path, vectors, rank, limits(threshold, float(np.cos(np.deg2rad(25))))))
    assert (report.num_components, report.num_singletons, report.num_dropped, report.largest) == (2, 1, 5, (4, 3))
    assert (report.num_split, report.num_saved, report.max_hops) == (1, 1, 6)
    assert report.chain_ratio == pytest.approx(5 / 7)
    assert report.min_similarity == pytest.approx(np.cos(np.deg2rad(20)), abs=1e-3)
    assert report.to_json()["size_histogram"] == {"2": 0, "3-4": 2}


def test_the_histogram_of_sizes_doubles():
    assert size_histogram(np.array([1, 1, 2, 2, 3, 4, 5, 8, 9])) == {"2": 2, "3-4": 2, "5-8": 2, "9-16": 1}
    assert size_histogram(np.array([1])) == {}


def test_partitions_hold_whole_components_and_leave_out_images_alone(monkeypatch):
    monkeypatch.setattr(copies_shuffle, "MEMBERS_PER_PARTITION", 4)
    label = np.array([0, 1, 0, 3, 3, 3, 3, 3, 3, 9, 10, 10, 10, 10])[np.r_[0:14]]
    partition, count = partitions_of(label)
    assert partition.tolist() == [0, -1, 0, 0, 0, 0, 0, 0, 0, -1, 1, 1, 1, 1]
    assert count == 2


def test_inputs_that_cannot_be_are_refused(tmp_path):
    pool, edges = joined(tmp_path, planted(20, 8))
    work = LocalStore(tmp_path / "c")
    with pytest.raises(DataError, match=r"20 vectors for 19 images"):
        find_copies(edges, pool, np.arange(19), limits(0.6), edge_floor=0.45, work=work, run=run_serially)
    with pytest.raises(DataError, match="not an order of the 20 images"):
        find_copies(edges, pool, np.zeros(20, np.int64), limits(0.6), edge_floor=0.45, work=work, run=run_serially)
    with pytest.raises(UsageError, match=r"threshold 0.4 is below join.edge_floor 0.45"):
        components_at(edges, np.arange(20), limits(0.4), edge_floor=0.45)
    less = ArrayVectors(planted(20, 8), kept=np.zeros(20, np.bool_))
    with pytest.raises(DataError, match="which has no vector"):
        find_copies(edges, less, np.arange(20), limits(0.45), edge_floor=0.45, work=work, run=run_serially)
