"""Similar pairs of two sets of vectors against a full matrix, whatever the fast product is."""

import numpy as np
import pytest
import torch
from similar_vectors import as_list, planted, similarity_matrix, slow_edges

from heliostat.curation import products
from heliostat.curation.edges import make_edges
from heliostat.curation.products import NO_PAIRS, Pairs, best_of_either, exact_similarities, operand, similar_pairs
from heliostat.curation.vectors import Block
from heliostat.errors import DataError


def whole(vectors: np.ndarray, first_row: int = 0) -> Block:
    return Block(np.arange(first_row, first_row + len(vectors)), vectors)


def use(monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(products, "fast_product", lambda: (torch.device("cpu"), dtype))


def self_pairs(vectors: np.ndarray, floor: float, neighbors: int = 64) -> list[tuple[int, int, float]]:
    prepared = operand(whole(vectors))
    return as_list(make_edges(*similar_pairs(prepared, prepared, floor, neighbors=neighbors, same=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("dense_hits", [0, 10**9])
def test_every_fast_product_gives_exactly_the_pairs_of_a_full_matrix(monkeypatch, dtype, dense_hits):
    use(monkeypatch, dtype)
    monkeypatch.setattr(products, "TILE", 128)
    monkeypatch.setattr(products, "DENSE_HITS", dense_hits)
    vectors = planted(700, 48)
    assert self_pairs(vectors, 0.45) == slow_edges(vectors, 0.45, 64)
    assert self_pairs(vectors, 0.3, neighbors=3) == slow_edges(vectors, 0.3, 3)


def test_the_bound_of_each_fast_product_is_above_its_error_on_unit_vectors():
    # Nearly equal values everywhere are the worst case: all roundings of the operands go the same way.
    generator = np.random.default_rng(0)
    worst = np.full((64, 512), 1.0) + generator.uniform(-0.02, 0.02, (64, 512))
    for vectors in (
        planted(400, 512),
        planted(400, 16),
        (worst / np.linalg.norm(worst, axis=1, keepdims=True)).astype(np.float16),
    ):
        exact = similarity_matrix(vectors, vectors)
        for dtype, bound in products.ERROR.items():
            fast = torch.from_numpy(vectors).to(dtype)
            assert np.abs((fast @ fast.T).float().numpy() - np.minimum(exact, 1.0)).max() < bound + 1e-3


def test_the_similarity_does_not_depend_on_the_order_of_summation():
    vectors = planted(300, 512)
    pairs = np.arange(150), np.arange(150, 300)
    order = np.random.default_rng(0).permutation(512)
    expected = exact_similarities(vectors, vectors, pairs)
    np.testing.assert_array_equal(exact_similarities(vectors[:, order], vectors[:, order], pairs), expected)
    np.testing.assert_array_equal(similarity_matrix(vectors[:150], vectors[150:]).diagonal(), expected)


def test_all_duplicates_keep_the_first_rows_as_neighbours_and_stay_within_memory(monkeypatch):
    monkeypatch.setattr(products, "TILE", 64)
    monkeypatch.setattr(products, "KEPT_PAIRS", 5_000)
    vectors = np.repeat(planted(1, 16), 300, axis=0)
    found = self_pairs(vectors, 0.5, neighbors=5)
    assert found == slow_edges(vectors, 0.5, 5)
    assert len(found) < 300 * 5


def test_pairs_of_two_sets_carry_their_global_rows():
    some, others = planted(90, 24, 1), planted(120, 24, 1)
    pairs = similar_pairs(operand(whole(some)), operand(whole(others, 1000)), 0.6, neighbors=500, same=False)
    rows, columns = np.nonzero(similarity_matrix(some, others) >= np.float32(0.6))
    assert sorted(zip(pairs.first, pairs.second, strict=True)) == sorted(zip(rows, columns + 1000, strict=True))


def test_a_pair_exactly_at_the_floor_is_found():
    vectors = np.zeros((2, 4), np.float16)
    vectors[0, 0] = 1
    vectors[1, :2] = 0.5, 0.866
    assert self_pairs(vectors, 0.5) == [(0, 1, 0.5)]
    assert self_pairs(vectors, 0.5001) == []


def test_vectors_that_are_not_finite_or_not_normalised_are_refused_by_row():
    vectors = planted(5, 8)
    vectors[3, 1] = np.nan
    with pytest.raises(DataError, match="row 13 is not finite"):
        operand(whole(vectors, 10))
    with pytest.raises(DataError, match=r"row 0 has length 2, not 1 \(5 such\)"):
        operand(whole(planted(5, 8) * np.float16(2)))


def test_empty_sets_and_zero_vectors_have_no_pairs():
    empty = operand(whole(np.empty((0, 8), np.float16)))
    assert not len(similar_pairs(empty, empty, 0.5, neighbors=4, same=True).first)
    assert self_pairs(np.zeros((3, 8), np.float16), 0.5) == []
    assert best_of_either(NO_PAIRS, 3) is NO_PAIRS


@pytest.mark.parametrize("seed", range(5))
def test_an_edge_stays_when_it_is_among_the_best_of_either_end(seed):
    generator = np.random.default_rng(seed)
    first, second = np.triu_indices(14, 1)
    drawn = generator.permutation(len(first))[:60]
    pairs = Pairs(first[drawn], second[drawn], (generator.integers(1, 6, 60) / 8).astype(np.float32))
    kept = best_of_either(pairs, 3)
    expected = set()
    for node in range(14):
        near = [(-s, b if a == node else a, i) for i, (a, b, s) in enumerate(zip(*pairs, strict=True)) if node in (a, b)]
        expected |= {i for _, _, i in sorted(near)[:3]}
    assert sorted(zip(*kept, strict=True)) == sorted((pairs.first[i], pairs.second[i], pairs.similarity[i]) for i in expected)
