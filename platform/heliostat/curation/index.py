"""The only file that imports FAISS: nearest neighbours by inner product, and spherical k-means.

Vectors are L2-normalised, so the inner product is the cosine similarity. Results are the same on every run with the same number
of OpenMP threads; across machines set OMP_NUM_THREADS=1, because BLAS sums in an order that depends on the thread count.
"""

import math

import faiss
import numpy as np
from numpy.typing import NDArray

from heliostat.errors import DataError

# Shapes: Q queries, N database vectors, D dimension, K neighbours (or centroids in kmeans).

EXACT_MAX_ROWS = 200_000
"""Database rows up to which search is exact: 200k x 200k x 512 is 2e13 multiply-adds, minutes on a few cores."""

HNSW_MIN_ROWS = 1_000_000
"""From here the lists number in the tens of thousands and are found through HNSW (FAISS wiki, "Guidelines to choose an index").
Only on the CPU: a GPU inverted file refuses an HNSW coarse quantizer."""

NUM_PROBES = 64
"""Inverted lists read per query; measured in tests/curation/test_index.py: recall at 10 above 0.95 on clustered vectors."""

GPU_MAX_NEIGHBORS = 2048  # FAISS: k and nprobe on a GPU end here


def _checked(vectors: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """float32, contiguous, two-dimensional and finite: FAISS reads raw memory and would return nonsense for anything else."""
    if vectors.ndim != 2:
        raise DataError(f"{name} have shape {vectors.shape}; two dimensions (rows, width) are needed")
    checked = np.ascontiguousarray(vectors, dtype=np.float32)
    if not np.isfinite(checked).all():
        row = int(np.flatnonzero(~np.isfinite(checked).all(axis=1))[0])
        raise DataError(f"{name} row {row} is not finite; find the image and the embedder that made it")
    return checked


def _build(database_ND: NDArray[np.float32], k: int, seed: int, exact_max_rows: int) -> faiss.Index:
    num_rows, dimension = database_ND.shape
    num_gpus = faiss.get_num_gpus()
    if num_gpus > 0 and k > GPU_MAX_NEIGHBORS:
        raise DataError(f"{k} neighbours are more than the {GPU_MAX_NEIGHBORS} a GPU can return; ask for fewer")
    index: faiss.Index = faiss.IndexFlatIP(dimension)
    if num_rows > exact_max_rows:
        # 8 sqrt(N) is inside the wiki's 4..16 sqrt(N); at least 39 training vectors per list, below which FAISS warns.
        num_lists = max(1, min(int(8 * math.sqrt(num_rows)), num_rows // 39))
        coarse = "_HNSW32" if num_rows >= HNSW_MIN_ROWS and num_gpus == 0 else ""
        index = faiss.index_factory(dimension, f"IVF{num_lists}{coarse},Flat", faiss.METRIC_INNER_PRODUCT)
        inverted_file = faiss.extract_index_ivf(index)
        inverted_file.cp.seed = seed
        inverted_file.nprobe = NUM_PROBES
    if num_gpus > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        index.train(database_ND)
    index.add(database_ND)
    return index


def neighbors(
    queries: NDArray[np.float32],
    database: NDArray[np.float32],
    k: int,
    *,
    seed: int = 0,
    exact_max_rows: int = EXACT_MAX_ROWS,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k database rows most similar to each query, best first.

    queries: (Q, D) and database: (N, D), L2-normalised. k is clamped to N. Returns similarities (Q, k) float32 and ids (Q, k)
    int64. Exact up to `exact_max_rows` rows; approximate beyond (inverted file), where a query that finds fewer than k rows
    is padded with id -1 and similarity -1. Raises DataError for vectors that are not finite or of another width.
    """
    queries_QD, database_ND = _checked(queries, "queries"), _checked(database, "database vectors")
    k = min(k, len(database_ND))
    if len(queries_QD) == 0 or k == 0:
        return np.empty((len(queries_QD), k), np.float32), np.empty((len(queries_QD), k), np.int64)
    if queries_QD.shape[1] != database_ND.shape[1]:
        raise DataError(f"queries have width {queries_QD.shape[1]}, the database {database_ND.shape[1]}; embed both alike")
    similarities_QK, ids_QK = _build(database_ND, k, seed, exact_max_rows).search(queries_QD, k)
    similarities_QK[ids_QK < 0] = -1.0
    return similarities_QK, ids_QK


def kmeans(
    vectors: NDArray[np.float32], k: int, *, iterations: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Spherical k-means: centroids are L2-normalised and nearest means largest inner product.

    vectors: (N, D). Returns centroids (k, D) float32 and the assignment (N,) int64 of every vector. FAISS fits on at most 256
    vectors per centroid, drawn from `seed`; the assignment is of all. Raises DataError when k is not in 1..N.
    """
    vectors_ND = _checked(vectors, "vectors")
    if not 1 <= k <= len(vectors_ND):
        raise DataError(f"num_clusters {k} is not in 1..{len(vectors_ND)}, the number of images; lower it or set it to auto")
    fit = faiss.Kmeans(
        vectors_ND.shape[1],
        k,
        niter=iterations,
        seed=seed,
        spherical=True,
        # FAISS prints a warning below 39 points per centroid, also when that is what was asked for.
        min_points_per_centroid=1,
        gpu=faiss.get_num_gpus() > 0,
    )
    fit.train(vectors_ND)
    _, assignment_N = fit.assign(vectors_ND)
    return np.asarray(fit.centroids, np.float32), assignment_N.astype(np.int64)
