"""Inverted files and k-means against plain numpy."""

import numpy as np
import pytest

from heliostat.curation.index import (
    add_to_inverted_file,
    inverted_factory,
    kmeans,
    load_index,
    save_index,
    search_inverted_file,
    train_inverted_file,
)
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def unit(rows: int, width: int, seed: int, *, centres: int = 0) -> np.ndarray:
    """Random unit vectors, around `centres` directions when given."""
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((rows, width))
    if centres:
        vectors = vectors * 0.15 + generator.standard_normal((centres, width))[generator.integers(centres, size=rows)]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_vectors_that_are_not_finite_or_have_no_rows_of_their_own_are_refused():
    bad = unit(4, 8, 0)
    bad[2, 3] = np.nan
    index = train_inverted_file(unit(100, 8, 1), 100, seed=0)
    with pytest.raises(DataError, match="queries row 2 is not finite; find the image"):
        search_inverted_file(index, bad, 3, num_probes=1)
    with pytest.raises(DataError, match="vectors row 2 is not finite"):
        add_to_inverted_file(index, bad, np.arange(4))
    with pytest.raises(DataError, match="sample row 2 is not finite"):
        train_inverted_file(bad, 100, seed=0)
    with pytest.raises(DataError, match=r"vectors have shape \(8,\); two dimensions"):
        kmeans(np.zeros(8, np.float32), 1, iterations=5, seed=0)


def test_kmeans_gives_the_same_clusters_for_the_same_seed_and_others_for_another():
    vectors = unit(500, 16, 3)
    first, second, other = (kmeans(vectors, 12, iterations=10, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])


def test_kmeans_assigns_to_the_most_similar_unit_centroid_and_recovers_planted_clusters(capfd):
    generator = np.random.default_rng(0)
    planted = np.repeat(np.arange(4), 50)
    directions = np.eye(8, dtype=np.float32)[:4]
    vectors = directions[planted] + 0.05 * generator.standard_normal((200, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centroids, assignment = kmeans(vectors, 4, iterations=20, seed=1)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(assignment, (vectors @ centroids.T).argmax(axis=1))
    assert len(np.unique(assignment * 4 + planted)) == 4
    assert "WARNING" not in capfd.readouterr().err


def test_more_clusters_than_images_is_an_error_that_says_so():
    with pytest.raises(DataError, match=r"num_clusters 6 is not in 1\.\.5"):
        kmeans(unit(5, 8, 0), 6, iterations=5, seed=0)
    centroids, assignment = kmeans(unit(5, 8, 0), 5, iterations=5, seed=0)
    assert len(centroids) == 5
    assert sorted(assignment) == [0, 1, 2, 3, 4]


def test_the_inverted_file_has_hnsw_lists_on_the_cpu_and_flat_ones_on_a_gpu_with_a_code_that_divides_the_width():
    assert inverted_factory(512, 1_000_000, 500_000, on_gpu=False) == "IVF8000_HNSW32,PQ64np"
    assert inverted_factory(384, 1_000_000, 500_000, on_gpu=True) == "IVF8000,PQ96np"
    assert inverted_factory(7, 100, 100, on_gpu=False) == "IVF2_HNSW32,Flat"
    assert inverted_factory(7, 100_000, 20_000, on_gpu=False) == "IVF512_HNSW32,PQ1np"


def test_an_index_is_saved_and_searched_again_with_the_same_result(tmp_path):
    store, database = LocalStore(tmp_path), unit(2_000, 16, 2, centres=20)
    index = train_inverted_file(database, len(database), seed=0)
    rows = np.arange(2_000) * 3 + 1
    add_to_inverted_file(index, database, rows)
    found = search_inverted_file(index, database[:50], 5, num_probes=16)
    assert (found[:, 0] == rows[:50]).all()
    save_index(index, store, "index")
    again = load_index(store, "index", 16)
    np.testing.assert_array_equal(search_inverted_file(again, database[:50], 5, num_probes=16), found)


def test_an_index_file_of_another_dimension_a_torn_one_and_another_file_are_refused(tmp_path):
    store, database = LocalStore(tmp_path), unit(500, 16, 2)
    index = train_inverted_file(database, 500, seed=0)
    add_to_inverted_file(index, database, np.arange(500))
    save_index(index, store, "index")
    with pytest.raises(DataError, match=r"index is for vectors of width 16, these have 32; build it again"):
        load_index(store, "index", 32)
    whole = store.read("index")
    for name, data in {"torn": whole[:-100], "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}.items():
        store.put(name, data)
        with pytest.raises(DataError, match=rf"{name} is damaged.*remove it"):
            load_index(store, name, 16)
    for name, data in {"empty": b"", "text": b"hello\nworld", "number": b"5\nworld", "binary": bytes(range(256))}.items():
        store.put(name, data)
        with pytest.raises(DataError, match=f"{name} is not an index of ours"):
            load_index(store, name, 16)
