"""Representatives and the guard against a slow version, one component at a time."""

import numpy as np
import pytest
from similar_vectors import on_a_circle, similarity_matrix, slow_representatives

from heliostat.curation.edges import NO_EDGES, make_edges
from heliostat.curation.settle import settle, similarities_of_edges


def edges_above(vectors: np.ndarray, floor: float):
    similarity = np.triu(similarity_matrix(vectors, vectors), 1)
    first, second = np.nonzero(similarity > np.float32(floor))
    return make_edges(first, second, similarity[first, second])


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_settle_as_one_component_after_the_other(seed):
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((80, 5))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    similarity = similarity_matrix(vectors, vectors)
    edges, rank = edges_above(vectors, 0.8), generator.permutation(80)
    guard = float(generator.uniform(0.6, 0.95))
    found = settle(edges, rank, guard, lambda some, others: similarity[some, others])
    linked = similarity > np.float32(0.8)
    assert found.representative.tolist() == slow_representatives(similarity, linked, rank, guard)
    assert found.unguarded.tolist() == slow_representatives(similarity, linked, rank, -1.0)
    own = found.representative == np.arange(80)
    np.testing.assert_array_equal(found.similarity[~own], similarity[np.flatnonzero(~own), found.representative[~own]])
    assert (found.similarity[own] == 1).all()


def test_the_guard_splits_a_chain_whose_ends_are_unlike_and_hops_count_its_edges():
    vectors = on_a_circle([0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 200.0])
    similarity, rank = similarity_matrix(vectors, vectors), np.array([0, 2, 3, 4, 5, 1, 6, 7])
    edges = edges_above(vectors, np.cos(np.deg2rad(11)))
    linked = settle(edges, rank, -1.0, lambda some, others: similarity[some, others])
    assert linked.representative.tolist() == [0] * 7 + [7]
    assert linked.hops.tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    guarded = settle(edges, rank, np.cos(np.deg2rad(25)), lambda some, others: similarity[some, others])
    assert guarded.representative.tolist() == [0, 0, 0, 5, 5, 5, 5, 7]
    assert guarded.unguarded.tolist() == [0] * 7 + [7]


def test_a_long_chain_that_splits_in_many_rounds_ends():
    degrees = np.linspace(0, 350, 3_000)
    vectors = on_a_circle(degrees.tolist())
    number = np.arange(2_999)
    edges = make_edges(number, number + 1, np.full(2_999, 0.99, np.float32))
    similarity = similarity_matrix(vectors, vectors)
    found = settle(edges, np.arange(3_000), 0.999, lambda some, others: similarity[some, others])
    assert (similarity[np.arange(3_000), found.representative] >= np.float32(0.999)).all()
    assert found.hops.max() == 2_999


def test_pairs_that_are_not_stored_are_unknown_counted_and_fail_the_guard():
    edges = make_edges(np.array([0, 1]), np.array([1, 2]), np.array([0.9, 0.9], np.float32))
    found = settle(edges, np.arange(3), 0.5, similarities_of_edges(edges, 3))
    assert (found.representative.tolist(), found.num_unknown) == ([0, 0, 2], 1)
    off = settle(edges, np.arange(3), -1.0, similarities_of_edges(edges, 3))
    assert (off.representative.tolist(), off.num_unknown) == ([0, 0, 0], 1)
    assert np.isnan(off.similarity[2])
    assert np.isnan(similarities_of_edges(NO_EDGES, 3)(np.array([0]), np.array([1]))).all()
    assert settle(NO_EDGES, np.empty(0, np.int64), 0.5, similarities_of_edges(NO_EDGES, 0)).representative.tolist() == []
