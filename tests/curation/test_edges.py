"""Edges in memory and in Parquet files."""

import numpy as np
import pytest
from similar_vectors import as_list, planted, similarity_matrix, slow_edges

from heliostat.curation.edges import (
    NO_EDGES,
    iterate_edges,
    make_edges,
    merge_edge_files,
    merge_in_memory,
    read_edges,
    write_edges,
)
from heliostat.curation.tasks import run_serially
from heliostat.errors import DataError, StorageError
from heliostat.storage import LocalStore


def all_edges(vectors: np.ndarray, floor: float):
    similarity = np.triu(similarity_matrix(vectors, vectors), 1)
    first, second = np.nonzero(similarity >= np.float32(floor))
    return make_edges(first, second, similarity[first, second])


def test_pairs_either_way_round_repeated_and_with_themselves_become_sorted_distinct_edges():
    edges = make_edges(np.array([5, 1, 2, 1, 3]), np.array([1, 5, 2, 4, 0]), np.array([0.5, 0.5, 1, 0.25, 0.75], np.float32))
    assert as_list(edges) == [(0, 3, 0.75), (1, 4, 0.25), (1, 5, 0.5)]
    assert as_list(edges.above(0.5)) == [(0, 3, 0.75)]


def test_a_file_of_edges_comes_back_the_same_and_the_same_edges_give_the_same_bytes(tmp_path):
    store, edges = LocalStore(tmp_path), all_edges(planted(100, 16), 0.4)
    write_edges(store, "a.parquet", edges)
    write_edges(store, "b.parquet", edges)
    assert as_list(read_edges(store, "a.parquet")) == as_list(edges)
    assert store.read("a.parquet") == store.read("b.parquet")
    write_edges(store, "empty.parquet", NO_EDGES)
    assert read_edges(store, "empty.parquet").num_edges == 0


def test_a_torn_file_and_a_file_of_something_else_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = LocalStore(tmp_path)
    write_edges(store, "a.parquet", all_edges(planted(100, 16), 0.4))
    store.put("torn.parquet", store.read("a.parquet")[:200])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(StorageError, match=r"torn.parquet is damaged .*remove it"):
        read_edges(store, "torn.parquet")
    with pytest.raises(DataError, match=r"other.parquet has columns \['x'\]"):
        read_edges(store, "other.parquet")


@pytest.mark.parametrize("seed", range(4))
def test_merging_parts_that_overlap_gives_the_best_edges_of_all_in_memory_and_in_files(tmp_path, seed):
    vectors = planted(150, 12, seed)
    every = all_edges(vectors, 0.4)
    generator = np.random.default_rng(seed)
    store = LocalStore(tmp_path / "parts")
    parts = []
    for number in range(3):
        drawn = np.flatnonzero(generator.random(every.num_edges) < 0.7)
        drawn = np.union1d(drawn, np.arange(number, every.num_edges, 3))
        parts.append(make_edges(*(column[drawn] for column in every)))
        write_edges(store, f"{number}/edges.parquet", parts[-1])
    expected = slow_edges(vectors, 0.4, 3)
    assert as_list(merge_in_memory(parts, 3)) == expected
    merged = LocalStore(tmp_path / "merged")
    merge_edge_files(
        [(store, f"{number}/") for number in range(3)],
        files=merged,
        prefix="edges/",
        work=LocalStore(tmp_path / "work"),
        run=run_serially,
        num_rows=150,
        rows_per_range=40,
        neighbors=3,
    )
    assert [edge for edges in iterate_edges(merged, "edges/") for edge in as_list(edges)] == expected


def test_merging_nothing_gives_no_edges():
    assert merge_in_memory([], 3) is NO_EDGES
