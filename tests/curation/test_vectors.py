"""Blocks of vectors: what comes out is what went in, with absent rows left out, wherever it lies."""

import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.curation.vectors import (
    ArrayVectors,
    JoinedVectors,
    StoredVectors,
    gather,
    read_all,
    read_array,
    vector_column,
    write_array,
    write_mask,
)
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def unit(num_rows: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((num_rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def stored(store: LocalStore, vectors: np.ndarray, present: np.ndarray, sizes: list[int]) -> StoredVectors:
    starts = [0, *np.cumsum(sizes).tolist()]
    keys = []
    for block, (start, stop) in enumerate(itertools.pairwise(starts)):
        here = present[start:stop]
        column = vector_column(vectors[start:stop][here], here, vectors.shape[1])
        sink = io.BytesIO()
        pq.write_table(pa.table({"copy": column}), sink)
        keys.append(f"rows/{block:06d}.parquet")
        store.put(keys[-1], sink.getvalue())
    return StoredVectors(store, tuple(keys), tuple(starts), "copy", vectors.shape[1])


def test_stored_vectors_come_back_bit_for_bit_without_the_absent_rows(tmp_path: Path) -> None:
    vectors, present = unit(50, 12, 0), np.random.default_rng(1).random(50) < 0.7
    found = read_all(stored(LocalStore(tmp_path), vectors, present, [20, 0, 29, 1]))
    np.testing.assert_array_equal(found.rows, np.flatnonzero(present))
    np.testing.assert_array_equal(found.vectors, vectors[present])


def test_a_mask_hides_further_rows(tmp_path: Path) -> None:
    store, vectors, present = LocalStore(tmp_path), unit(40, 8, 0), np.random.default_rng(1).random(40) < 0.8
    base = stored(store, vectors, present, [15, 25])
    shown = np.random.default_rng(2).random(40) < 0.5
    write_mask(store, "mask/", base.starts, shown)
    masked = StoredVectors(store, base.keys, base.starts, "copy", 8, masks=(store, "mask/"))
    np.testing.assert_array_equal(read_all(masked).rows, np.flatnonzero(present & shown))
    np.testing.assert_array_equal(read_all(masked).vectors, vectors[present & shown])


def test_joined_vectors_number_the_rows_of_the_second_after_the_first(tmp_path: Path) -> None:
    first, second = unit(10, 4, 0), unit(7, 4, 1)
    kept = np.arange(10) % 3 != 0
    joined = JoinedVectors((ArrayVectors(first, kept, rows_per_block=4), ArrayVectors(second, rows_per_block=5)))
    assert (joined.num_rows, joined.num_blocks, joined.dimension) == (17, 5, 4)
    np.testing.assert_array_equal(read_all(joined).rows, [*np.flatnonzero(kept), *range(10, 17)])
    np.testing.assert_array_equal(gather(joined, np.array([16, 1, 10])), np.stack([second[6], first[1], second[0]]))
    with pytest.raises(DataError, match="row 3 has no vector"):
        gather(joined, np.array([1, 3]))


def test_vectors_of_another_width_are_refused(tmp_path: Path) -> None:
    base = stored(LocalStore(tmp_path), unit(5, 8, 0), np.ones(5, bool), [5])
    with pytest.raises(DataError, match="16 x float16 expected"):
        StoredVectors(base.files, base.keys, base.starts, "copy", 16).read(0)
    with pytest.raises(DataError, match="5 rows, 6 expected"):
        StoredVectors(base.files, base.keys, (0, 6), "copy", 8).read(0)


def test_an_array_comes_back_and_a_torn_one_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write_array(store, "a.npy", np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(read_array(store, "a.npy"), np.arange(6).reshape(2, 3))
    store.put("a.npy", store.read("a.npy")[:-5])
    with pytest.raises(DataError, match="is not a numpy array"):
        read_array(store, "a.npy")
