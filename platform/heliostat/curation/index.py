"""The only file that imports FAISS: inverted files that find neighbours by inner product, and spherical k-means.

Vectors are L2-normalised, so the inner product is the cosine similarity. Results are the same on every run with the same number
of OpenMP threads; across machines set OMP_NUM_THREADS=1, because BLAS sums in an order that depends on the thread count.
"""

import json
import math
import zlib

import faiss
import numpy as np
from numpy.typing import NDArray

from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: Q queries, N vectors, S vectors of a sample, D dimension.

GPU_MAX_NEIGHBORS = 2048  # FAISS: k and nprobe on a GPU end here

PQ_BYTES = (96, 64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 3, 2, 1)
"""Bytes of a code that a GPU inverted file supports; the CPU takes any divisor of D."""

PQ_MIN_TRAINING = 39 * 256
"""Vectors below which FAISS warns that 256 codewords cannot be trained; fewer are stored whole (Flat)."""

FILE_KIND = "heliostat inverted file"


def _checked(vectors: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """float32, contiguous, two-dimensional and finite: FAISS reads raw memory and would return nonsense for anything else."""
    if vectors.ndim != 2:
        raise DataError(f"{name} have shape {vectors.shape}; two dimensions (rows, width) are needed")
    checked = np.ascontiguousarray(vectors, dtype=np.float32)
    if not np.isfinite(checked).all():
        row = int(np.flatnonzero(~np.isfinite(checked).all(axis=1))[0])
        raise DataError(f"{name} row {row} is not finite; find the image and the embedder that made it")
    return checked


def inverted_factory(dimension: int, num_rows: int, num_training: int, *, on_gpu: bool) -> str:
    """FAISS's name of the index for a pool: `IVF{n}_HNSW32,PQ{m}` on the CPU, `IVF{n},PQ{m}` on a GPU, which refuses HNSW.

    n is 8 sqrt(N), within FAISS's guideline of 4 to 16, with 39 training vectors per list at least; m is the largest size of
    code that divides D and leaves 4 values or more to a byte (`np`: without polysemous training, which costs minutes and is
    not used).
    """
    num_lists = max(1, min(int(8 * math.sqrt(num_rows)), num_training // 39))
    coarse = "" if on_gpu else "_HNSW32"
    code = next(m for m in PQ_BYTES if dimension % m == 0 and (4 * m <= dimension or m == 1))
    return f"IVF{num_lists}{coarse},{f'PQ{code}np' if num_training >= PQ_MIN_TRAINING else 'Flat'}"


def train_inverted_file(sample: NDArray[np.float32], num_rows: int, *, seed: int) -> faiss.Index:
    """An empty index fitted on a sample (S, D), ready for `num_rows` vectors. On the CPU; `search_inverted_file` moves it."""
    sample_SD = _checked(sample, "sample")
    dimension = sample_SD.shape[1]
    on_gpu = faiss.get_num_gpus() > 0
    name = inverted_factory(dimension, num_rows, len(sample_SD), on_gpu=on_gpu)
    index = faiss.index_factory(dimension, name, faiss.METRIC_INNER_PRODUCT)
    inverted_file = faiss.extract_index_ivf(index)
    inverted_file.cp.seed = seed
    if name.endswith("Flat") is False:
        faiss.downcast_index(inverted_file).pq.cp.seed = seed  # type: ignore[attr-defined]
    if on_gpu:
        moved = faiss.index_cpu_to_all_gpus(index)
        moved.train(sample_SD)
        index = faiss.index_gpu_to_cpu(moved)
    else:
        index.train(sample_SD)
    return index


def add_to_inverted_file(index: faiss.Index, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    """Add (n, D) vectors under their rows (n,)."""
    index.add_with_ids(_checked(vectors, "vectors"), np.ascontiguousarray(rows, np.int64))


def search_inverted_file(index: faiss.Index, queries: NDArray[np.float32], k: int, *, num_probes: int) -> NDArray[np.int64]:
    """(Q, k) candidate rows, -1 where fewer were found. Their order follows the codes: score them again."""
    num_gpus = faiss.get_num_gpus()
    if num_gpus > 0 and max(k, num_probes) > GPU_MAX_NEIGHBORS:
        raise DataError(f"{k} candidates from {num_probes} lists: a GPU allows {GPU_MAX_NEIGHBORS} of each; ask for fewer")
    inverted_file = faiss.extract_index_ivf(index)
    inverted_file.nprobe = min(num_probes, inverted_file.nlist)
    flat = isinstance(faiss.downcast_index(inverted_file.quantizer), faiss.IndexFlat)
    if not flat:  # the search within HNSW must be as wide as what is asked of it (FAISS's default is 16)
        faiss.downcast_index(inverted_file.quantizer).hnsw.efSearch = max(64, 2 * inverted_file.nprobe)  # type: ignore[attr-defined]
    searcher = faiss.index_cpu_to_all_gpus(index) if num_gpus > 0 and flat else index
    return np.asarray(searcher.search(_checked(queries, "queries"), k)[1], np.int64)


def save_index(index: faiss.Index, store: Store, key: str) -> None:
    """Write an index atomically, with its dimension, its rows and a checksum in front."""
    data = faiss.serialize_index(index).tobytes()
    header = {"kind": FILE_KIND, "dimension": index.d, "num_rows": index.ntotal, "crc32": zlib.crc32(data)}
    store.put(key, json.dumps(header).encode() + b"\n" + data)


def load_index(store: Store, key: str, dimension: int) -> faiss.Index:
    """What `save_index` wrote. Raises DataError for another file, a torn one, or one of another dimension."""
    where = f"{store.uri}/{key}"
    first, newline, data = store.read(key).partition(b"\n")
    try:
        header = json.loads(first) if newline else {}
    except ValueError:
        header = {}
    if not isinstance(header, dict) or header.get("kind") != FILE_KIND:
        raise DataError(f"{where} is not an index of ours; remove it and run again")
    if header["dimension"] != dimension:
        raise DataError(f"{where} is for vectors of width {header['dimension']}, these have {dimension}; build it again")
    if zlib.crc32(data) != header["crc32"]:
        raise DataError(f"{where} is damaged ({len(data)} bytes, checksum differs); remove it and run again")
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


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
