"""Vectors of images, in blocks that are read one at a time: what the neighbour search, k-means and retrieval work on.

Every image of a pool has a row number, 0 to num_rows - 1, that never changes while it is curated. Vectors are float16 and
L2-normalised. A row without a vector (it did not decode, or a mask took it out) is absent from its block.
"""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.errors import DataError
from heliostat.storage import Store, read_parquet

# Shapes: N rows of the pool, n rows of a block, D dimension.


class Block(NamedTuple):
    """rows: int64, global row numbers, ascending; vectors: (n, D) float16, L2-normalised."""

    rows: NDArray[np.int64]
    vectors: NDArray[np.float16]


class Vectors(Protocol):
    """Blocks of vectors; can be pickled, and read from many processes."""

    @property
    def num_rows(self) -> int:
        """Row numbers end below this; absent rows count."""

    @property
    def num_blocks(self) -> int:
        """Blocks are 0 to num_blocks - 1 and hold ascending ranges of rows."""

    @property
    def dimension(self) -> int:
        """D."""

    def read(self, block: int) -> Block:
        """One block, absent rows left out."""


@dataclass(frozen=True)
class ArrayVectors:
    """Vectors in memory. array: (N, D), any float; kept: bool (N,), rows to show (all of them when left out)."""

    array: NDArray[Any]
    kept: NDArray[np.bool_] | None = None
    rows_per_block: int = 8192

    @property
    def num_rows(self) -> int:
        return len(self.array)

    @property
    def num_blocks(self) -> int:
        return -(-len(self.array) // self.rows_per_block)

    @property
    def dimension(self) -> int:
        return int(self.array.shape[1])

    def read(self, block: int) -> Block:
        start = block * self.rows_per_block
        rows = np.arange(start, min(start + self.rows_per_block, len(self.array)))
        if self.kept is not None:
            rows = rows[self.kept[rows]]
        return Block(rows, self.array[rows].astype(np.float16))


@dataclass(frozen=True)
class StoredVectors:
    """One column of the Parquet files of a features artifact; a null is an absent row.

    keys: a file per block; starts: the first row of each, and num_rows at the end. masks: where a bool array per block lies
    (`write_mask`), which hides further rows.
    """

    files: Store
    keys: tuple[str, ...]
    starts: tuple[int, ...]
    column: str
    dimension: int
    masks: tuple[Store, str] | None = None

    @property
    def num_rows(self) -> int:
        return self.starts[-1]

    @property
    def num_blocks(self) -> int:
        return len(self.keys)

    def read(self, block: int) -> Block:
        """One block. Raises StorageError for a damaged file, DataError for one of other rows or another width."""
        table = read_parquet(self.files, self.keys[block], [self.column])
        start, stop = self.starts[block : block + 2]
        if table.num_rows != stop - start:
            raise DataError(f"{self.keys[block]} has {table.num_rows} rows, {stop - start} expected; make its artifact again")
        present, vectors = vectors_of(table[self.column], self.dimension, self.keys[block])
        if self.masks is not None:
            store, prefix = self.masks
            shown = read_array(store, mask_key(prefix, block))
            vectors = vectors[shown[present]]
            present = present & shown
        return Block(np.flatnonzero(present) + start, vectors)


@dataclass(frozen=True)
class JoinedVectors:
    """Several Vectors one after the other; the rows of each follow those of the one before."""

    members: tuple[Vectors, ...]

    @property
    def num_rows(self) -> int:
        return sum(member.num_rows for member in self.members)

    @property
    def num_blocks(self) -> int:
        return sum(member.num_blocks for member in self.members)

    @property
    def dimension(self) -> int:
        return self.members[0].dimension

    def read(self, block: int) -> Block:
        first_row = 0
        for member in self.members:
            if block < member.num_blocks:
                rows, vectors = member.read(block)
                return Block(rows + first_row, vectors)
            block, first_row = block - member.num_blocks, first_row + member.num_rows
        raise IndexError(block)


def gather(vectors: Vectors, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(R, D) float32 of the named rows, in their order. Reads every block once; DataError for an absent row."""
    found = np.zeros((len(rows), vectors.dimension), np.float32)
    missing = np.ones(len(rows), np.bool_)
    for block in range(vectors.num_blocks):
        there, values = vectors.read(block)
        if not len(there):
            continue
        position = np.minimum(np.searchsorted(there, rows), len(there) - 1)
        hit = there[position] == rows
        found[hit] = values[position[hit]]
        missing &= ~hit
    if missing.any():
        raise DataError(f"row {int(rows[missing][0])} has no vector ({int(missing.sum())} such)")
    return found


def read_all(vectors: Vectors) -> Block:
    """All blocks as one, for pools that fit into memory."""
    blocks = [vectors.read(block) for block in range(vectors.num_blocks)]
    if not blocks:
        return Block(np.empty(0, np.int64), np.empty((0, vectors.dimension), np.float16))
    return Block(np.concatenate([block.rows for block in blocks]), np.concatenate([block.vectors for block in blocks]))


def vector_column(vectors: NDArray[Any], present: Sequence[bool] | NDArray[np.bool_], dimension: int) -> pa.Array:
    """A Parquet column: little-endian float16 values of a vector as binary of 2 D bytes, null where not present.

    vectors: the present ones, in order. (Arrow cannot read nullable lists of fixed length back from Parquet.)
    """
    mask = np.asarray(present, np.bool_)
    dense = np.zeros((len(mask), dimension), "<f2")
    dense[mask] = vectors
    width = pa.binary(2 * dimension)
    plain = pa.FixedSizeBinaryArray.from_buffers(width, len(mask), [None, pa.py_buffer(dense.tobytes())])
    return pc.if_else(pa.array(mask, pa.bool_()), plain, pa.scalar(None, width))


def vectors_of(column: pa.ChunkedArray, dimension: int, where: str) -> tuple[NDArray[np.bool_], NDArray[np.float16]]:
    """(present bool (n,), the present rows' vectors) of a column made by `vector_column`. DataError for another width."""
    if column.type != pa.binary(2 * dimension):
        raise DataError(f"{where} holds vectors of type {column.type}, {dimension} x float16 expected; embed both alike")
    present = np.asarray(column.is_valid().to_numpy(), np.bool_)
    parts = [_values(chunk, dimension) for chunk in column.chunks]
    values = np.concatenate(parts) if parts else np.empty((0, dimension), np.float16)
    return present, values[present]


def _values(array: pa.FixedSizeBinaryArray, dimension: int) -> NDArray[np.float16]:
    """(n, D) of one chunk, anything where it is null."""
    if not len(array):
        return np.empty((0, dimension), np.float16)
    values = np.frombuffer(array.buffers()[1], "<f2").reshape(-1, dimension)
    return np.asarray(values[array.offset : array.offset + len(array)], np.float16)


def mask_key(prefix: str, block: int) -> str:
    """Where the mask of a block lies."""
    return f"{prefix}{block:06d}.npy"


def write_mask(store: Store, prefix: str, starts: Sequence[int], shown: NDArray[np.bool_]) -> None:
    """Write one bool array per block for `StoredVectors.masks`. shown: (N,), True for rows that stay visible."""
    for block, (start, stop) in enumerate(itertools.pairwise(starts)):
        write_array(store, mask_key(prefix, block), shown[start:stop])


def write_array(store: Store, key: str, array: NDArray[Any]) -> None:
    """One numpy array as an object, atomically; the same array gives the same bytes."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(array), allow_pickle=False)
    store.put(key, sink.getvalue())


def read_array(store: Store, key: str) -> NDArray[Any]:
    """What `write_array` wrote; nothing is unpickled. DataError when it is damaged."""
    try:
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(store.read(key)), allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{store.uri}/{key} is not a numpy array: {error}; remove it and run again") from error
    return array
