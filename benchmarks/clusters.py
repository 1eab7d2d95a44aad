"""CPU seconds of k-means in tasks beside FAISS, at the same number of iterations and at the same mean similarity.

    pip install -e . && OMP_NUM_THREADS=1 python benchmarks/clusters.py

200,000 vectors of 128 numbers around 3,000 centres, 1,000 clusters, one process and one thread. The gate comes first: the mean
similarity of every vector to its centroid, computed by numpy. Ours writes every sum and centroid to a local store, as on a
cluster; FAISS keeps everything in memory. The sides take turns.
"""

import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from results_file import cpu_hardware, today, versions, write_result

from heliostat.curation.kmeans import Seeding, kmeans
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.storage import LocalStore

NUM_VECTORS, DIMENSION, NUM_CENTRES, K = 200_000, 128, 3_000, 1_000
ITERATIONS = 20
ROUNDS = 3


def make_vectors() -> np.ndarray:
    """(N, D) float16, L2-normalised."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((NUM_CENTRES, DIMENSION)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    noise = 0.06 * generator.standard_normal((NUM_VECTORS, DIMENSION)).astype(np.float32)
    vectors = centres[generator.integers(NUM_CENTRES, size=NUM_VECTORS)] + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def cpu_seconds() -> float:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def ours(vectors: np.ndarray, iterations: int = ITERATIONS, seeding: Seeding = "auto") -> np.ndarray:
    """Our centroids."""
    with tempfile.TemporaryDirectory() as folder:
        work = LocalStore(Path(folder))
        return kmeans(ArrayVectors(vectors), K, iterations=iterations, seed=0, work=work, run=run_serially, seeding=seeding)


def theirs(vectors: np.ndarray) -> np.ndarray:
    """FAISS's centroids."""
    fit = faiss.Kmeans(DIMENSION, K, niter=ITERATIONS, seed=0, spherical=True, min_points_per_centroid=1)
    fit.train(vectors.astype(np.float32))
    return np.asarray(fit.centroids)


def mean_similarity(vectors: np.ndarray, centroids: np.ndarray) -> float:
    """Of every vector to the closest centroid."""
    tiles = [vectors[start : start + 8192].astype(np.float32) @ centroids.T for start in range(0, len(vectors), 8192)]
    return float(np.mean(np.concatenate([tile.max(axis=1) for tile in tiles])))


def main() -> None:
    """Run everything and write one result file."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    vectors = make_vectors()
    goal = mean_similarity(vectors, theirs(vectors))
    enough = next(count for count in range(2, ITERATIONS + 1) if mean_similarity(vectors, ours(vectors, count)) >= goal)
    sides: dict[str, Callable[[], np.ndarray]] = {
        f"FAISS, {ITERATIONS} iterations": lambda: theirs(vectors),
        f"ours, {ITERATIONS} iterations": lambda: ours(vectors),
        f"ours, {ITERATIONS} iterations, random seeds": lambda: ours(vectors, seeding="random"),
        f"ours, {enough} iterations: as close as FAISS": lambda: ours(vectors, enough),
    }
    spent: dict[str, list[float]] = {name: [] for name in sides}
    similarity: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            started = cpu_seconds()
            centroids = side()
            spent[name].append(cpu_seconds() - started)
            similarity[name] = mean_similarity(vectors, centroids)
    rows = [
        f"| {name} | {similarity[name]:.5f} | {statistics.median(seconds):.1f} | {min(seconds):.1f}..{max(seconds):.1f} |"
        for name, seconds in spent.items()
    ]
    lines = [
        f"# k-means of {NUM_VECTORS:,} vectors into {K:,} clusters, {today()}",
        "",
        "Synthetic vectors on a shared machine; CPU seconds of the process. Ours also writes its state to a local disk.",
        f"{versions()}, FAISS {faiss.__version__}. `OMP_NUM_THREADS=1 python benchmarks/clusters.py`",
        "",
        f"| side | mean similarity | CPU seconds (median of {ROUNDS}) | range |",
        "| --- | --- | --- | --- |",
        *rows,
    ]
    write_result("clusters", lines, cpu_hardware())


if __name__ == "__main__":
    main()
