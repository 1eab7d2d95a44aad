"""The nearest images of a pool, exactly in pieces and through an inverted file."""

import numpy as np
import pytest
import torch
from similar_vectors import planted, similarity_matrix

from heliostat.curation import nearest, products
from heliostat.curation.copies_config import NearestConfig
from heliostat.curation.nearest import neighbors_of
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def slow(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    similarity = similarity_matrix(queries, database)
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, axis=1), rows


def find(folder, queries, database, k, run=run_serially, **settings):
    config = NearestConfig(**{"via": "exact", "rows_per_strip": 100, "strips_per_task": 2, **settings})
    return neighbors_of(queries, database, k, config=config, work=LocalStore(folder), run=run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 7, 200])
def test_exact_search_equals_a_full_matrix_in_every_bit(tmp_path, monkeypatch, dtype, k):
    monkeypatch.setattr(products, "fast_product", lambda: (torch.device("cpu"), dtype))
    monkeypatch.setattr(nearest, "QUERIES_AT_ONCE", 33)
    monkeypatch.setattr(nearest, "IMAGES_AT_ONCE", 64)
    queries, database = planted(150, 24, 1), planted(700, 24, 2)
    similarities, rows = find(tmp_path, queries, ArrayVectors(database, rows_per_block=50), k)
    expected = slow(queries, database, k)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_array_equal(similarities, expected[0])
    assert (similarities.dtype, rows.dtype) == (np.float32, np.int64)


def test_of_equal_images_the_smaller_rows_are_named_first(tmp_path):
    database = np.repeat(planted(3, 8), 40, axis=0)
    _, rows = find(tmp_path, database[:1], ArrayVectors(database, rows_per_block=16), 5, rows_per_strip=16)
    assert rows.tolist() == [[0, 1, 2, 3, 4]]


def test_opposite_images_are_neighbours_too_when_there_are_no_better_ones(tmp_path):
    database = -planted(60, 8)
    queries = -database[:4]
    similarities, rows = find(tmp_path, queries, ArrayVectors(database), 60)
    np.testing.assert_array_equal(rows, slow(queries, database, 60)[1])
    assert similarities.min() < -0.999


def test_places_without_a_neighbour_are_minus_one_and_so_are_absent_queries(tmp_path):
    database, queries = planted(6, 8), planted(4, 8, 1)
    kept = np.array([True, False, True, True, False, True])
    asked = ArrayVectors(queries, kept=np.array([True, True, False, True]))
    similarities, rows = find(tmp_path, asked, ArrayVectors(database, kept=kept), 5)
    assert sorted(rows[0].tolist()) == [-1, 0, 2, 3, 5]
    assert rows[2].tolist() == [-1] * 5
    assert similarities[:, -1].tolist() == [-1] * 4


@pytest.mark.parametrize("via", ["exact", "faiss"])
def test_no_queries_no_images_and_none_present_are_defined(tmp_path, via):
    none, some = np.empty((0, 8), np.float16), planted(5, 8)
    hidden = ArrayVectors(some, kept=np.zeros(5, np.bool_))
    assert find(tmp_path / "a", none, ArrayVectors(some), 3, via=via)[1].shape == (0, 3)
    for number, database in enumerate([ArrayVectors(none), hidden]):
        assert find(tmp_path / str(number), some, database, 3, via=via)[1].tolist() == [[-1] * 3] * 5


def test_the_inverted_file_finds_almost_all_and_scores_them_exactly(tmp_path):
    database = planted(12_000, 32, centres=100)
    queries = database[:300]
    similarities, rows = find(tmp_path, queries, ArrayVectors(database), 10, via="faiss", rows_per_strip=4096)
    expected = slow(queries, database, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, expected[1], strict=True)])
    assert recall > 0.9
    np.testing.assert_array_equal(similarities, np.take_along_axis(similarity_matrix(queries, database), rows, axis=1))
    assert (np.diff(similarities, axis=1) <= 0).all()


def test_auto_is_exact_up_to_the_limit_of_comparisons(tmp_path):
    database = ArrayVectors(planted(50, 8))
    find(tmp_path / "a", planted(4, 8), database, 3, via="auto", exact_max_products=200)
    find(tmp_path / "b", planted(4, 8), database, 3, via="auto", exact_max_products=199)
    assert LocalStore(tmp_path / "a").size("inverted-file") is None
    assert LocalStore(tmp_path / "b").size("inverted-file") > 0


def test_finished_tasks_are_not_run_again(tmp_path):
    database = ArrayVectors(planted(500, 8), rows_per_block=50)
    first = find(tmp_path, planted(4, 8), database, 3)

    def refuse(function, tasks, *, label, has_state=False):
        raise AssertionError(tasks)

    again = find(tmp_path, planted(4, 8), database, 3, run=refuse)
    np.testing.assert_array_equal(first[1], again[1])


def test_widths_shapes_and_counts_that_cannot_be_are_refused(tmp_path):
    database = ArrayVectors(planted(5, 8))
    with pytest.raises(DataError, match="queries have width 9, the database 8"):
        find(tmp_path, planted(2, 9), database, 1)
    with pytest.raises(DataError, match="two dimensions"):
        find(tmp_path, np.zeros(8, np.float16), database, 1)
    with pytest.raises(DataError, match="0 neighbours"):
        find(tmp_path, planted(2, 8), database, 0)
    with pytest.raises(DataError, match="row 0 has length"):
        find(tmp_path / "long", planted(2, 8) * np.float16(4), database, 1)
