"""A pool: the images of one or several features artifacts with one row number each, and what is kept of them in memory.

Vectors, names and boxes stay in the files. What decisions need of every image is held in arrays of about 90 bytes an image.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from heliostat.config import StrictModel
from heliostat.curation.pca_hash import HashColumns
from heliostat.curation.vectors import JoinedVectors, StoredVectors, Vectors
from heliostat.errors import DataError
from heliostat.storage import Store, from_parquet, one_line_if_damaged, read_parquet

# Shapes: N rows of the pool.

FEATURES_JSON = "features.json"
ROWS = "rows/"
LOSSLESS_FORMATS = frozenset({"png", "bmp", "tiff", "ppm", "pgm"})
"""Formats that lost nothing at their last save. webp may be either and counts as lossy; gif loses colours."""

_ARRAYS = ("id", "reason", "length", "width", "height", "format", "pca_code", "pca_coarse", "pca_contrast", "nsfw", "faces")


class VectorSpace(StrictModel):
    """What made vectors: those of another space must not be compared with them."""

    name: str
    """Name of the embedder."""
    version: str
    """Digest of its weights and settings."""
    dimension: int
    """Width of the vectors."""


class FeaturesInfo(StrictModel):
    """`features.json`: what a features artifact holds."""

    starts: tuple[int, ...]
    """First row of each file below rows/, and the number of rows at the end."""
    copy_space: VectorSpace
    """Of the column `copy`."""
    semantic_space: VectorSpace | None = None
    """Of the column `semantic`; null when the copy embedding serves for both."""
    hash_version: str
    """Digest of the fit of the PCA hash."""
    nsfw: str = ""
    """Name and digest of the NSFW detector; empty when none ran."""
    faces: str = ""
    """Name and digest of the face detector; empty when none ran."""


@dataclass(frozen=True)
class FeatureFiles:
    """One features artifact: its name, its files and what they hold."""

    name: str
    files: Store
    info: FeaturesInfo

    @property
    def num_rows(self) -> int:
        """Images, those that do not decode included."""
        return self.info.starts[-1]

    @property
    def keys(self) -> tuple[str, ...]:
        """The files in order, one block of rows each."""
        return tuple(f"{ROWS}{index:06d}.parquet" for index in range(len(self.info.starts) - 1))

    def vectors(self, column: str, masks: tuple[Store, str] | None = None) -> StoredVectors:
        """The vectors of `copy` or `semantic`; without a semantic embedder both are the copy embedding."""
        space = self.info.semantic_space if column == "semantic" else None
        column = column if space is not None else "copy"
        space = space or self.info.copy_space
        return StoredVectors(self.files, self.keys, self.info.starts, column, space.dimension, masks)

    def read(self, block: int, columns: Sequence[str]) -> pa.Table:
        """Columns of one block. Raises StorageError for a damaged file."""
        return read_parquet(self.files, self.keys[block], columns)

    def read_present(self, block: int, columns: Collection[str]) -> pa.Table:
        """Those of the columns that a block has, in its order. Raises StorageError for a damaged file."""
        data = self.files.read(self.keys[block])
        with one_line_if_damaged(self.files, self.keys[block]):
            there = pq.read_schema(pa.BufferReader(data)).names
            return from_parquet(data, [name for name in there if name in columns])


@dataclass(frozen=True)
class Pool:
    """Features artifacts in the order in which they were curated; rows of each follow those of the one before."""

    members: tuple[FeatureFiles, ...]

    @property
    def num_rows(self) -> int:
        """N."""
        return sum(member.num_rows for member in self.members)

    @property
    def starts(self) -> list[int]:
        """First row of every block over all members, and N at the end."""
        starts, first = [], 0
        for member in self.members:
            starts += [first + start for start in member.info.starts[:-1]]
            first += member.num_rows
        return [*starts, first]

    def first_row(self, member: int) -> int:
        """The first row of a member."""
        return sum(one.num_rows for one in self.members[:member])

    def vectors(self, column: str, masks: tuple[Store, str] | None = None) -> Vectors:
        """All vectors of `copy` or `semantic`. masks: as `masked` wrote them."""
        parts = []
        for number, member in enumerate(self.members):
            own = None if masks is None else (masks[0], f"{masks[1]}{number:03d}/")
            parts.append(member.vectors(column, own))
        return parts[0] if len(parts) == 1 else JoinedVectors(tuple(parts))

    def write_masks(self, store: Store, prefix: str, shown: NDArray[np.bool_]) -> tuple[Store, str]:
        """Hide rows from `vectors`: returns what to give it. shown: (N,)."""
        from heliostat.curation.vectors import write_mask

        for number, member in enumerate(self.members):
            first = self.first_row(number)
            write_mask(store, f"{prefix}{number:03d}/", member.info.starts, shown[first : first + member.num_rows])
        return store, prefix

    def blocks(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """(first row, table) of every block in order."""
        for number, member in enumerate(self.members):
            for block, start in enumerate(member.info.starts[:-1]):
                yield self.first_row(number) + start, member.read(block, columns)

    def columns_at(self, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Columns of the named rows, in their order; reads the blocks that hold them, once each."""
        order = np.argsort(rows, kind="stable")
        wanted, starts = rows[order], np.array(self.starts)
        tables = []
        for number, member in enumerate(self.members):
            first = self.first_row(number)
            for block, (start, stop) in enumerate(itertools.pairwise(member.info.starts)):
                low, high = np.searchsorted(wanted, [first + start, first + stop])
                if low < high:
                    tables.append(member.read(block, columns).take(pa.array(wanted[low:high] - first - start)))
        if len(rows) and (rows.min() < 0 or rows.max() >= starts[-1]):
            raise DataError(f"row {int(rows.max())} is not in the pool of {self.num_rows} images")
        found = pa.concat_tables(tables) if tables else self.members[0].read(0, columns).slice(0, 0)
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return found.take(pa.array(back))


def check_same_spaces(members: Sequence[FeatureFiles], *, semantic: bool = False) -> None:
    """Raise DataError unless all features were made by the same embedder, and the same hash."""
    first = members[0]
    for other in members[1:]:
        for what, here, there in (
            ("copy embedder", first.info.copy_space, other.info.copy_space),
            ("semantic embedder", first.info.semantic_space, other.info.semantic_space),
            ("PCA hash", first.info.hash_version, other.info.hash_version),
        ):
            if here != there and (semantic or what != "semantic embedder"):
                raise DataError(
                    f"{first.name} and {other.name} were made with another {what} each ({_short(here)} and {_short(there)}); "
                    "embed both with the same settings"
                )


def _short(space: VectorSpace | str | None) -> str:
    if isinstance(space, VectorSpace):
        return f"{space.name} {space.version[:8]}, {space.dimension} wide"
    return str(space)[:12]


@dataclass(frozen=True)
class PoolColumns:
    """What decisions need of every image, as arrays of N.

    ids: (N, 32) uint8, sha256. decoded: bool. num_bytes: int64. width, height: int32, pixels. lossless: bool. hashes: PCA hash,
    zeros where not decoded. nsfw: float32, NaN without a score. num_faces: int32, -1 without a detector.
    """

    ids: NDArray[np.uint8]
    decoded: NDArray[np.bool_]
    num_bytes: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    lossless: NDArray[np.bool_]
    hashes: HashColumns
    nsfw: NDArray[np.float32]
    num_faces: NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.ids)

    def id(self, row: int) -> str:
        """The id of a row, hex."""
        return bytes(self.ids[row]).hex()

    def id_words(self) -> NDArray[np.uint64]:
        """(N, 4) big-endian words of the ids: sorting by them sorts the ids."""
        return np.ascontiguousarray(self.ids).view(">u8").astype(np.uint64)

    def quality_rank(self) -> NDArray[np.int64]:
        """Rank of each image, 0 the best: most pixels, then a lossless format, then most bytes, then smallest id and row.

        Never the order of arrival. Known limit: an enlarged copy has more pixels than its original and wins.
        """
        words = self.id_words()
        pixels = self.width.astype(np.int64) * self.height
        keys = (np.arange(self.num_rows), *(words[:, word] for word in (3, 2, 1, 0)), -self.num_bytes, ~self.lossless, -pixels)
        rank = np.empty(self.num_rows, np.int64)
        rank[np.lexsort(keys)] = np.arange(self.num_rows)
        return rank


def read_columns(pool: Pool) -> PoolColumns:
    """Read the arrays of a pool; each file once."""
    parts = [_arrays(table) for _, table in pool.blocks(_ARRAYS)]
    if not parts:
        raise DataError("the features hold no image; embed an artifact that has some")
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    ids, decoded, num_bytes, width, height, lossless, code, coarse, contrast, nsfw, num_faces = joined
    hashes = HashColumns(code, coarse, contrast)
    return PoolColumns(ids, decoded, num_bytes, width, height, lossless, hashes, nsfw, num_faces)


def _arrays(table: pa.Table) -> tuple[NDArray[np.generic], ...]:
    table = table.combine_chunks()
    coarse = pc.fill_null(table["pca_coarse"], bytes(16)).combine_chunks()
    return (
        id_bytes(table["id"]),
        pc.equal(table["reason"], "").to_numpy(zero_copy_only=False) if table.num_rows else np.empty(0, np.bool_),
        table["length"].to_numpy(),
        table["width"].to_numpy(),
        table["height"].to_numpy(),
        np.asarray(pc.is_in(table["format"], pa.array(sorted(LOSSLESS_FORMATS))).to_numpy(), np.bool_),
        pc.fill_null(table["pca_code"], 0).to_numpy(),
        np.frombuffer(b"".join(coarse.to_pylist()), np.int8).reshape(-1, 16),
        pc.fill_null(table["pca_contrast"], 0.0).to_numpy(),
        pc.fill_null(table["nsfw"], float("nan")).to_numpy(),
        pc.fill_null(pc.list_value_length(table["faces"]), -1).to_numpy(),
    )


def id_bytes(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """(n, 32) uint8 of hexadecimal sha256 ids. Raises DataError for any other text."""
    text = "".join(column.to_pylist())
    try:
        return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(len(column), 32)
    except ValueError as error:
        raise DataError("an id in the features is no sha256; make them again with heliostat embed") from error
