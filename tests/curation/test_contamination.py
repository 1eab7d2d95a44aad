"""Decontamination against several evaluation sets."""

import numpy as np
import pytest
from similar_vectors import on_a_circle, planted, similarity_matrix

from heliostat.curation.contamination import decontaminate
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def judge(folder, vectors, references, threshold, component):
    sets = {name: ArrayVectors(one) for name, one in references.items()}
    return decontaminate(
        ArrayVectors(vectors), sets, threshold, np.asarray(component, np.int64), run=run_serially, work=LocalStore(folder)
    )


def test_the_whole_component_of_an_image_that_shows_a_reference_goes(tmp_path):
    vectors = on_a_circle([0, 20, 40, 180])
    found = judge(tmp_path, vectors, {"exam": on_a_circle([50, 300])}, 0.95, [0, 0, 0, 1])
    assert found.dropped.tolist() == [True, True, True, False]
    assert found.reference.tolist() == [0, 0, 0, 1]
    assert (found.sets["exam"].num_references, found.sets["exam"].num_touched, found.sets["exam"].num_dropped) == (2, 1, 3)


def test_every_image_knows_its_nearest_reference_and_the_set_it_belongs_to(tmp_path):
    vectors, one, two = planted(200, 16, 0), planted(30, 16, 1), planted(40, 16, 0)
    found = judge(tmp_path, vectors, {"one": one, "two": two}, 0.6, np.arange(200))
    similarity = similarity_matrix(vectors, np.concatenate([one, two]))
    np.testing.assert_array_equal(found.reference, similarity.argmax(axis=1))
    np.testing.assert_array_equal(found.similarity, similarity.max(axis=1))
    np.testing.assert_array_equal(found.reference_set, found.reference >= 30)
    np.testing.assert_array_equal(found.reference_row, found.reference - 30 * found.reference_set)
    np.testing.assert_array_equal(found.dropped, similarity.max(axis=1) > np.float32(0.6))
    assert sum(count.num_dropped for count in found.sets.values()) == found.dropped.sum()


def test_a_component_that_touches_two_sets_counts_for_the_more_similar_one(tmp_path):
    vectors = on_a_circle([0, 30])
    found = judge(tmp_path, vectors, {"a": on_a_circle([4]), "b": on_a_circle([31])}, 0.99, [0, 0])
    assert [count.num_touched for count in found.sets.values()] == [1, 1]
    assert [count.num_dropped for count in found.sets.values()] == [0, 2]


def test_a_similarity_at_the_threshold_stays_and_rows_without_a_component_are_left_alone(tmp_path):
    vectors = on_a_circle([0, 0])
    assert not judge(tmp_path / "at", vectors, {"a": on_a_circle([0])}, 1.0, [0, 1]).dropped.any()
    assert judge(tmp_path / "out", vectors, {"a": on_a_circle([0])}, 0.9, [0, -1]).dropped.tolist() == [True, False]


def test_without_references_or_images_nothing_is_dropped(tmp_path):
    for number, references in enumerate([{}, {"none": np.empty((0, 2), np.float16)}]):
        found = judge(tmp_path / str(number), on_a_circle([0, 20]), references, 0.45, [0, 1])
        assert not found.dropped.any()
        assert (found.reference.tolist(), found.reference_set.tolist(), found.reference_row.tolist()) == ([-1, -1],) * 3
    empty = judge(tmp_path / "empty", np.empty((0, 2), np.float16), {"a": on_a_circle([0])}, 0.45, [])
    assert empty.dropped.tolist() == []


def test_references_of_another_width_are_named(tmp_path):
    with pytest.raises(DataError, match="exam has vectors of width 2, the pool 8"):
        judge(tmp_path, planted(5, 8), {"exam": on_a_circle([0])}, 0.45, np.arange(5))
