"""Which rows of a pool have a vector, draws among them that nothing but the seed decides, and copies of the rows drawn.

A draw gives every row a key from its number and the seed. So it does not depend on the order of tasks, on blocks, or on which
other rows are there: a row that is added or taken out changes nothing about the rest.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Block, Vectors, read_array, write_array
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of the pool, P of them with a vector, S rows of a copy, D dimension.

ROWS_PER_BLOCK = 65_536
"""Rows in a block that `store_vectors` writes: 128 MiB at 1,024 dimensions."""

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def row_keys(rows: NDArray[np.int64], *, seed: int, purpose: str) -> NDArray[np.uint64]:
    """A pseudo-random number per row, no two alike. purpose: what is drawn, so that two draws of one seed differ.

    The finaliser of splitmix64, a bijection of 64 bits (public domain; S. Vigna), of the row plus a digest of seed and purpose.
    """
    start = np.frombuffer(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "<u8")[0]
    keys = (rows.astype(np.uint64) + start) * _GOLDEN
    keys = (keys ^ (keys >> np.uint64(30))) * _MIX_1
    keys = (keys ^ (keys >> np.uint64(27))) * _MIX_2
    return np.asarray(keys ^ (keys >> np.uint64(31)), np.uint64)


def draw_rows(rows: NDArray[np.int64], count: int, *, seed: int, purpose: str) -> NDArray[np.int64]:
    """`count` of the rows at random, ascending; all of them when there are no more."""
    if count >= len(rows):
        return np.sort(rows)
    keys = row_keys(rows, seed=seed, purpose=purpose)
    return np.sort(rows[np.argpartition(keys, count)[:count]]) if count else np.empty(0, np.int64)


def first_of_each(
    group_R: NDArray[Any], order_by: Sequence[NDArray[Any]], quota_R: NDArray[np.int64] | int
) -> NDArray[np.bool_]:
    """True for the first rows of every group.

    group_R: the group of each row. order_by: what comes first within a group, the most important array first, ascending.
    quota_R: how many of its group to take, given per row, or one number for all.
    """
    order = np.lexsort((*reversed(order_by), group_R))
    taken_R = np.zeros(len(group_R), np.bool_)
    taken_R[order[place_in_group(group_R[order]) < (quota_R if isinstance(quota_R, int) else quota_R[order])]] = True
    return taken_R


def place_in_group(sorted_group_R: NDArray[Any]) -> NDArray[np.int64]:
    """0, 1, 2, ... within each run of equal values."""
    if len(sorted_group_R) == 0:
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.r_[True, sorted_group_R[1:] != sorted_group_R[:-1]])
    return np.arange(len(sorted_group_R)) - np.repeat(starts, np.diff(np.r_[starts, len(sorted_group_R)]))


def block_ranges(num_blocks: int, max_tasks: int) -> list[tuple[int, int]]:
    """Consecutive blocks of one task each: (first, end), at most `max_tasks` of about equal length."""
    count = min(num_blocks, max_tasks)
    edges = [round(task * num_blocks / count) for task in range(count + 1)] if count else [0]
    return list(itertools.pairwise(edges))


@dataclass(frozen=True)
class WorkVectors:
    """Vectors that this package wrote itself, a float16 array per block, without absent rows.

    starts: the first row of each block, and the number of rows at the end.
    """

    work: Store
    prefix: str
    starts: tuple[int, ...]
    dimension: int

    @property
    def num_rows(self) -> int:
        return self.starts[-1]

    @property
    def num_blocks(self) -> int:
        return len(self.starts) - 1

    def read(self, block: int) -> Block:
        return Block(np.arange(*self.starts[block : block + 2]), read_array(self.work, block_key(self.prefix, block)))


def block_key(prefix: str, block: int) -> str:
    """Where an array per block or task lies."""
    return f"{prefix}{block:06d}.npy"


def store_vectors(array: NDArray[Any], work: Store, prefix: str, *, rows_per_block: int = ROWS_PER_BLOCK) -> WorkVectors:
    """Write (S, D) as blocks of float16, so that tasks read it instead of carrying it."""
    starts = [*range(0, len(array), rows_per_block), len(array)]
    for block, (start, stop) in enumerate(itertools.pairwise(starts)):
        if work.size(block_key(prefix, block)) is None:
            write_array(work, block_key(prefix, block), array[start:stop].astype(np.float16))
    return WorkVectors(work, prefix, tuple(starts), int(array.shape[1]))


@dataclass(frozen=True)
class _FindRows:
    """Writes which rows of some blocks have a vector."""

    vectors: Vectors
    work: Store

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        key = block_key("rows/", task["number"])
        if self.work.size(key) is None:
            found = [self.vectors.read(block).rows for block in range(task["first"], task["end"])]
            write_array(self.work, key, np.concatenate(found))
        return {}


def present_rows(vectors: Vectors, *, work: Store, run: TaskMap, max_tasks: int = 1024) -> NDArray[np.int64]:
    """(P,) int64, ascending: the rows that have a vector. Reads every block once."""
    ranges = block_ranges(vectors.num_blocks, max_tasks)
    tasks = [{"number": number, "first": first, "end": end} for number, (first, end) in enumerate(ranges)]
    for _ in run(_FindRows(vectors, work), tasks, label="rows with a vector"):
        pass
    found = [read_array(work, block_key("rows/", number)) for number in range(len(ranges))]
    return np.concatenate(found) if found else np.empty(0, np.int64)


@dataclass(frozen=True)
class _CopyRows:
    """Copies the wanted rows of some blocks; their count is written first, for a run that finds the copy finished."""

    vectors: Vectors
    work: Store
    prefix: str

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        key, count_key = block_key(self.prefix, task["number"]), block_key(f"{self.prefix}count-", task["number"])
        if self.work.size(key) is None:
            wanted = read_array(self.work, f"{self.prefix}wanted.npy")
            blocks = [self._wanted_of(block, wanted) for block in range(task["first"], task["end"])]
            copied = np.concatenate(blocks)
            write_array(self.work, count_key, np.array([len(copied)]))
            write_array(self.work, key, copied)
        return {"number": task["number"], "count": int(read_array(self.work, count_key)[0])}

    def _wanted_of(self, block: int, wanted: NDArray[np.int64]) -> NDArray[np.float16]:
        rows, vectors = self.vectors.read(block)
        return vectors[np.isin(rows, wanted[slice(*_around(wanted, rows))], assume_unique=True)]


def _around(sorted_wanted: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[int, int]:
    """Where in `sorted_wanted` the range of an ascending block lies."""
    if len(rows) == 0:
        return 0, 0
    return int(np.searchsorted(sorted_wanted, rows[0])), int(np.searchsorted(sorted_wanted, rows[-1], side="right"))


def copy_rows(
    vectors: Vectors, rows: NDArray[np.int64], *, work: Store, prefix: str, run: TaskMap, max_tasks: int = 64
) -> WorkVectors:
    """The named rows alone, numbered 0, 1, 2, ... in their order.

    rows: ascending. Raises DataError when one of them has no vector.
    """
    if work.size(f"{prefix}wanted.npy") is None:
        write_array(work, f"{prefix}wanted.npy", rows)
    ranges = block_ranges(vectors.num_blocks, max_tasks)
    tasks = [{"number": number, "first": first, "end": end} for number, (first, end) in enumerate(ranges)]
    counts = np.zeros(len(tasks), np.int64)
    for result in run(_CopyRows(vectors, work, prefix), tasks, label="rows for k-means"):
        counts[result["number"]] = result["count"]
    if counts.sum() != len(rows):
        raise DataError(f"{len(rows) - counts.sum()} of {len(rows)} rows have no vector; pass only rows that do")
    return WorkVectors(work, prefix, (0, *np.cumsum(counts).tolist()), vectors.dimension)
