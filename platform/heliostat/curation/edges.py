"""Edges of the copy graph: pairs of similar images, in memory and in Parquet files that are ranges of the first image.

Join tasks write their pairs as records in slices, both ways round; `merge_edges` reduces them to the best of every image, drops
what was found more than once, and writes one Parquet file for each range of rows. An edge stays when it is among the best of
EITHER end, so whatever a task left out among its own pairs could not have stayed, and the result does not depend on the cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.curation.products import Pairs, best_of_either, rank_in_runs
from heliostat.curation.slices import DONE, read_slices, run_missing, write_slices
from heliostat.curation.tasks import TaskMap
from heliostat.errors import DataError
from heliostat.storage import Store, read_parquet, to_parquet

# Shapes: E edges, P ranges of rows.

RECORD = np.dtype([("node", "<i8"), ("other", "<i8"), ("similarity", "<f4")])
"""One direction of an edge; 20 bytes."""

SCHEMA = pa.schema([("first", pa.int64()), ("second", pa.int64()), ("similarity", pa.float32())])


class Edges(NamedTuple):
    """first < second: int64 rows; similarity: float32. Sorted by (first, second), every pair once."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float32]

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.first)

    def above(self, threshold: float) -> "Edges":
        """Those with a similarity above `threshold`."""
        kept = self.similarity > np.float32(threshold)
        return Edges(self.first[kept], self.second[kept], self.similarity[kept])


def make_edges(first: NDArray[np.int64], second: NDArray[np.int64], similarity: NDArray[np.float32]) -> Edges:
    """Edges of pairs in any order, either way round and repeated; an image's pair with itself is dropped."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((high, low))
    low, high, similarity = low[order], high[order], similarity[order]
    kept = low != high
    kept[1:] &= (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return Edges(low[kept].astype(np.int64), high[kept].astype(np.int64), similarity[kept].astype(np.float32))


def merge_in_memory(parts: Sequence[Edges], neighbors: int) -> Edges:
    """All edges of all parts, reduced to those among the `neighbors` best of either end."""
    if not parts:
        return NO_EDGES
    edges = make_edges(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return Edges(*best_of_either(Pairs(*edges), neighbors))


NO_EDGES = Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def write_edges(store: Store, key: str, edges: Edges) -> None:
    """One Parquet file, atomically; the same edges give the same bytes."""
    table = pa.table([pa.array(column) for column in edges], schema=SCHEMA)
    encodings = {"first": "DELTA_BINARY_PACKED", "second": "PLAIN", "similarity": "BYTE_STREAM_SPLIT"}
    store.put(key, to_parquet(table, use_dictionary=False, column_encoding=encodings))


def read_edges(store: Store, key: str) -> Edges:
    """What `write_edges` wrote. StorageError when the file is damaged, DataError when it holds something else."""
    table = read_parquet(store, key, fix="restore it, or remove it and run again")
    if table.schema.remove_metadata() != SCHEMA:
        raise DataError(f"{store.uri}/{key} has columns {table.column_names}, {SCHEMA.names} expected; name another file")
    return Edges(*(table[name].to_numpy() for name in SCHEMA.names))


def edge_keys(store: Store, prefix: str) -> list[str]:
    """The files of edges under a prefix, by range."""
    return [info.key for info in store.list(prefix) if info.key.endswith(".parquet")]


def iterate_edges(store: Store, prefix: str) -> Iterator[Edges]:
    """The edges under a prefix, a file at a time, in order."""
    for key in edge_keys(store, prefix):
        yield read_edges(store, key)


def edges_key(prefix: str, number: int) -> str:
    """Where the edges of a range of rows lie."""
    return f"{prefix}edges-{number:05d}.parquet"


def num_ranges(num_rows: int, rows_per_range: int) -> int:
    """P: files of edges for so many rows; one at least."""
    return max(1, -(-num_rows // rows_per_range))


def write_pairs(store: Store, key: str, pairs: Pairs, *, num_rows: int, rows_per_range: int) -> None:
    """What a join task found, for `merge_edges`: records of both directions, by the range of their node."""
    records = np.empty(2 * len(pairs.first), RECORD)
    records["node"] = np.concatenate([pairs.first, pairs.second])
    records["other"] = np.concatenate([pairs.second, pairs.first])
    records["similarity"] = np.concatenate([pairs.similarity, pairs.similarity])
    records = records[np.lexsort((records["other"], records["node"]))]
    write_slices(store, key, records, records["node"] // rows_per_range, num_ranges(num_rows, rows_per_range))


@dataclass(frozen=True)
class _BestOfNodes:
    """Task: the best edges of the nodes of one range, from all pieces; written by the range of their first row."""

    work: Store
    pieces: str
    num_rows: int
    rows_per_range: int
    neighbors: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        number = int(task["range"])
        keys = [info.key.removesuffix(DONE) for info in self.work.list(self.pieces) if info.key.endswith(DONE)]
        found = read_slices(self.work, keys, range(number, number + 1), RECORD)
        found = found[np.lexsort((found["other"], -found["similarity"], found["node"]))]
        # The same pair has the same similarity wherever it was found, so repeats are neighbours now.
        fresh = np.ones(len(found), np.bool_)
        fresh[1:] = (found["node"][1:] != found["node"][:-1]) | (found["other"][1:] != found["other"][:-1])
        found = found[fresh]
        found = found[rank_in_runs(found["node"]) < self.neighbors]
        first = np.minimum(found["node"], found["other"])
        destinations = num_ranges(self.num_rows, self.rows_per_range)
        write_slices(self.work, str(task["key"]), found, first // self.rows_per_range, destinations)
        return {"done": task["done"]}


@dataclass(frozen=True)
class _EdgesOfRange:
    """Task: the edges whose first row lies in one range, each once, as Parquet."""

    work: Store
    kept: Sequence[str]
    files: Store

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        number = int(task["range"])
        found = read_slices(self.work, self.kept, range(number, number + 1), RECORD)
        write_edges(self.files, str(task["done"]), make_edges(found["node"], found["other"], found["similarity"]))
        return {"done": task["done"]}


def merge_edges(
    work: Store, pieces: str, files: Store, prefix: str, run: TaskMap, *, num_rows: int, rows_per_range: int, neighbors: int
) -> None:
    """Merge everything `write_pairs` left under `pieces` in `work` into files of edges under `prefix` in `files`."""
    numbers = range(num_ranges(num_rows, rows_per_range))
    kept = [f"kept-{pieces}{number:05d}" for number in numbers]
    tasks = [{"range": number, "key": kept[number], "done": kept[number] + DONE} for number in numbers]
    best = _BestOfNodes(work, pieces, num_rows, rows_per_range, neighbors)
    run_missing(run, best, tasks, store=work, prefix=f"kept-{pieces}", label="best edges")
    files_tasks = [{"range": number, "done": edges_key(prefix, number)} for number in numbers]
    run_missing(run, _EdgesOfRange(work, kept, files), files_tasks, store=files, prefix=prefix, label="edges")


@dataclass(frozen=True)
class _Scatter:
    """Task: one file of edges as a piece for `merge_edges`."""

    work: Store
    sources: Sequence[tuple[Store, str]]
    num_rows: int
    rows_per_range: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        store, key = self.sources[int(task["source"])]
        pairs = Pairs(*read_edges(store, key))
        write_pairs(self.work, str(task["key"]), pairs, num_rows=self.num_rows, rows_per_range=self.rows_per_range)
        return {"done": task["done"]}


def merge_edge_files(
    sources: Sequence[tuple[Store, str]],
    *,
    files: Store,
    prefix: str,
    work: Store,
    run: TaskMap,
    num_rows: int,
    rows_per_range: int,
    neighbors: int,
) -> None:
    """Merge files of edges under several (store, prefix), such as those of an earlier crawl and of a new one joined against it.

    The result equals that of one join over all when every join was exact.
    """
    named = [(store, key) for store, start in sources for key in edge_keys(store, start)]
    keys = [f"earlier/{number:06d}" for number in range(len(named))]
    tasks = [{"source": number, "key": key, "done": key + DONE} for number, key in enumerate(keys)]
    scatter = _Scatter(work, named, num_rows, rows_per_range)
    run_missing(run, scatter, tasks, store=work, prefix="earlier/", label="earlier edges")
    merge_edges(work, "earlier/", files, prefix, run, num_rows=num_rows, rows_per_range=rows_per_range, neighbors=neighbors)
