"""The nearest images of a pool for each query: exact by products in strips, or by an inverted file and exact re-scoring.

As in products.py a fast product proposes and an exact one decides: a query's k-th best similarity so far, less the largest
error of the fast product, is what an image must reach to be looked at exactly. Ties go to the smaller row. So an exact search
gives the same bytes however it was cut and whatever it ran on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.curation.copies_config import NearestConfig
from heliostat.curation.index import load_index, search_inverted_file
from heliostat.curation.inverted import INDEX_KEY, scored_candidates, write_inverted_file
from heliostat.curation.products import ERROR, Operand, exact_similarities, order_key, rank_in_runs
from heliostat.curation.slices import run_missing
from heliostat.curation.strips import sample_rows, strip_operand, strips_of
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import ArrayVectors, Block, Vectors, read_array, write_array
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: Q queries, k neighbours, D dimension, m images at once.

QUERIES_AT_ONCE, IMAGES_AT_ONCE = 1024, 8192
"""Rows and columns of one product: 16 MiB of bfloat16 (assumption, not studied)."""

NOTHING = -1
"""Row and similarity where a query has fewer than k neighbours, or no vector itself."""


@dataclass(frozen=True)
class Best:
    """The k best of each query so far. similarity: (Q, k) float32, best first; row: (Q, k) int64; NOTHING at the end."""

    similarity: NDArray[np.float32]
    row: NDArray[np.int64]


def nothing_found(num_queries: int, k: int) -> Best:
    """Before the first image."""
    return Best(np.full((num_queries, k), NOTHING, np.float32), np.full((num_queries, k), NOTHING, np.int64))


def merge_best(best: Best, query: NDArray[np.int64], row: NDArray[np.int64], similarity: NDArray[np.float32]) -> Best:
    """The k best of what was found and of further (query, row, similarity) triples; none may be there twice."""
    num_queries, k = best.row.shape
    held = best.row >= 0
    queries = np.concatenate([np.nonzero(held)[0], query])
    rows, similarities = np.concatenate([best.row[held], row]), np.concatenate([best.similarity[held], similarity])
    order = np.lexsort((rows, -similarities, queries))
    queries, rows, similarities = queries[order], rows[order], similarities[order]
    rank = rank_in_runs(queries)
    kept = rank < k
    merged = nothing_found(num_queries, k)
    merged.row[queries[kept], rank[kept]] = rows[kept]
    merged.similarity[queries[kept], rank[kept]] = similarities[kept]
    return merged


def search_strip(queries: Operand, images: Operand, best: Best) -> Best:
    """`best` with the images of one strip, none of which was seen before."""
    parts = [
        _search(queries, slice(start, start + QUERIES_AT_ONCE), images, best)
        for start in range(0, len(queries), QUERIES_AT_ONCE)
    ]
    if not parts:
        return best
    return Best(np.concatenate([part.similarity for part in parts]), np.concatenate([part.row for part in parts]))


def _search(queries: Operand, which: slice, images: Operand, best: Best) -> Best:
    """`search_strip` for some of the queries. Finds are merged when as many wait as are kept, so merges get rarer."""
    best = Best(best.similarity[which], best.row[which])
    fast, stored = queries.fast[which], queries.stored[which]
    waiting: list[tuple[NDArray[Any], ...]] = []
    num_waiting = 0
    for start in range(0, len(images), IMAGES_AT_ONCE):
        product = torch.mm(fast, images.fast[start : start + IMAGES_AT_ONCE].T)
        found_query, column = _reached(product, best)
        column += start
        similarity = exact_similarities(stored, images.stored, (found_query, column))
        waiting.append((found_query, images.rows[column], similarity))
        num_waiting += len(column)
        if num_waiting >= best.row.size:
            best, waiting, num_waiting = merge_best(best, *map(np.concatenate, zip(*waiting, strict=True))), [], 0
    return merge_best(best, *map(np.concatenate, zip(*waiting, strict=True))) if waiting else best


def _reached(product: torch.Tensor, best: Best) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(query, column) of values that may belong to the k best: by what was found, or by the k-th best of this product."""
    k, error = best.row.shape[1], ERROR[product.dtype]
    full = best.row[:, -1] >= 0
    least = np.where(full, best.similarity[:, -1].astype(np.float64) - error, -np.inf)
    if not full.all() and product.shape[1] > k:
        least = np.maximum(least, _kth_largest(product, k) - 2 * error)
    # Rounding the limit to the type of the product may raise it by half a unit.
    limit = torch.from_numpy(least - torch.finfo(product.dtype).eps / 2).to(product.device).to(product.dtype)
    if product.is_cuda:
        query, column = torch.nonzero(product >= limit[:, None], as_tuple=True)
        return query.cpu().numpy(), column.cpu().numpy()
    if bool((limit > 0).all()):
        flat = np.flatnonzero(order_key(product) >= order_key(limit)[:, None])
    else:
        flat = np.flatnonzero((product >= limit[:, None]).numpy())
    return flat // product.shape[1], flat % product.shape[1]


def _kth_largest(product: torch.Tensor, k: int) -> NDArray[np.float64]:
    """(Q,) k-th largest value of each row, minus infinity where it may be negative."""
    if product.is_cuda:
        return np.asarray(product.float().topk(k, dim=1).values[:, -1].double().cpu().numpy())
    keys = order_key(product)
    kth = np.ascontiguousarray(np.partition(keys, keys.shape[1] - k, axis=1)[:, keys.shape[1] - k])
    values = torch.from_numpy(kth).view(product.dtype).double().numpy()
    return np.where(kth > 0, values, -np.inf)


@dataclass(frozen=True)
class _WrittenVectors:
    """Vectors of an array, as objects: what tasks read instead of carrying the array with them."""

    store: Store
    prefix: str
    num_rows: int
    dimension: int
    rows_per_block: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // self.rows_per_block)

    def read(self, block: int) -> Block:
        values = read_array(self.store, f"{self.prefix}{block:06d}.npy")
        start = block * self.rows_per_block
        return Block(np.arange(start, start + len(values)), values)


def _queries_of(queries: Vectors | NDArray[Any], dimension: int, work: Store, rows_per_block: int) -> Vectors:
    if not isinstance(queries, np.ndarray):
        vectors: Vectors = queries
    else:
        if queries.ndim != 2:
            raise DataError(f"queries have shape {queries.shape}; two dimensions (rows, width) are needed")
        vectors = _WrittenVectors(work, "queries/", len(queries), queries.shape[1], rows_per_block)
        blocks = ArrayVectors(queries, rows_per_block=rows_per_block)
        for block in range(blocks.num_blocks):
            write_array(work, f"queries/{block:06d}.npy", blocks.read(block).vectors)
    if vectors.dimension != dimension:
        raise DataError(f"queries have width {vectors.dimension}, the database {dimension}; embed both alike")
    return vectors


@dataclass(frozen=True)
class _SearchStrips:
    """Task: the k best of the queries of one strip among some strips of images."""

    queries: Vectors
    database: Vectors
    work: Store
    k: int

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        queries = strip_operand(self.queries, (task["queries"][0], task["queries"][1]))
        best = nothing_found(len(queries), self.k)
        for start, stop in task["strips"]:
            best = search_strip(queries, strip_operand(self.database, (start, stop)), best)
        write_best(self.work, str(task["key"]), queries.rows, best)
        return {"done": task["done"]}


@dataclass(frozen=True)
class _InvertedSearch:
    """Task: the k best of the queries of one strip among the candidates that the index names."""

    queries: Vectors
    database: Vectors
    work: Store
    k: int
    config: NearestConfig

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        queries = strip_operand(self.queries, (task["queries"][0], task["queries"][1]))
        index = load_index(self.work, INDEX_KEY, self.database.dimension)
        best = nothing_found(len(queries), self.k)
        if len(queries):
            candidates = search_inverted_file(
                index,
                queries.stored.astype(np.float32),
                self.k * self.config.candidates_per_neighbor,
                num_probes=self.config.num_probes,
            )
            best = merge_best(best, *scored_candidates(queries, candidates, self.database))
        write_best(self.work, str(task["key"]), queries.rows, best)
        return {"done": task["done"]}


def write_best(work: Store, key: str, queries: NDArray[np.int64], best: Best) -> None:
    """The result of one task; its similarities are written last and say that it is complete."""
    write_array(work, f"{key}.queries.npy", queries)
    write_array(work, f"{key}.rows.npy", best.row)
    write_array(work, f"{key}.npy", best.similarity)


def _collect(work: Store, keys: Sequence[str], num_queries: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best over all tasks. The tasks of one strip of queries are neighbours in `keys`."""
    total = nothing_found(num_queries, k)
    for key in keys:
        queries = read_array(work, f"{key}.queries.npy")
        if not len(queries):
            continue
        rows, similarities = read_array(work, f"{key}.rows.npy"), read_array(work, f"{key}.npy")
        here, rank = np.nonzero(rows >= 0)
        before = Best(total.similarity[queries], total.row[queries])
        merged = merge_best(before, here, rows[here, rank], similarities[here, rank])
        total.similarity[queries], total.row[queries] = merged.similarity, merged.row
    return total.similarity, total.row


def neighbors_of(
    queries: Vectors | NDArray[Any],
    database: Vectors,
    k: int,
    *,
    config: NearestConfig,
    work: Store,
    run: TaskMap,
    seed: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k images of a pool most similar to each query, best first; of equals the smaller row.

    queries: vectors, or an (Q, D) array of L2-normalised rows. work: of this search alone. Returns similarities (Q, k) float32
    and rows (Q, k) int64, both -1 where there are no more images, and for queries without a vector. seed: of the FAISS index.
    Raises DataError for vectors that are not finite, not normalised, or of another width.
    """
    if k <= 0:
        raise DataError(f"{k} neighbours were asked for; ask for 1 or more")
    vectors = _queries_of(queries, database.dimension, work, config.rows_per_strip)
    exact = config.via == "exact" or (
        config.via == "auto" and vectors.num_rows * database.num_rows <= config.exact_max_products
    )
    query_strips, strips = strips_of(vectors, config.rows_per_strip), strips_of(database, config.rows_per_strip)
    if not strips or not len(sample_rows(database, 1, seed=seed).rows):
        return _collect(work, [], vectors.num_rows, k)
    spans = [strips[at : at + config.strips_per_task] for at in range(0, len(strips), config.strips_per_task)]
    function: _SearchStrips | _InvertedSearch = _SearchStrips(vectors, database, work, k)
    if not exact:
        spans = [[]]  # the index covers every strip
        write_inverted_file(database, work, seed=seed)
        function = _InvertedSearch(vectors, database, work, k, config)
    tasks: list[Mapping[str, Any]] = []
    for number, strip in enumerate(query_strips):
        for part, span in enumerate(spans):
            key = f"nearest/{number:06d}-{part:06d}"
            tasks.append({"queries": strip, "strips": span, "key": key, "done": f"{key}.npy"})
    run_missing(run, function, tasks, store=work, prefix="nearest/", label="nearest images")
    return _collect(work, [str(task["key"]) for task in tasks], vectors.num_rows, k)
