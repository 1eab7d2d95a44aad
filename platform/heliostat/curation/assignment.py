"""The nearest centroid of vectors, block by block: the products that k-means and cluster mode spend their time on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.curation.subsets import block_key, block_ranges
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import Block, Vectors, read_array, write_array
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of the pool, n rows of a block, K centroids, D dimension.

ASSIGN_TASKS = 1024
"""Tasks of one assignment, at most; each writes 16 bytes a row."""

TILE_ROWS = {"cpu": 1024, "cuda": 16_384}
TILE_CENTROIDS = 4096
"""Similarities computed at once: 16 MiB on a CPU, which its caches like (measured: 1,024 rows are
1.2 times as fast as 4,096)."""


@dataclass(frozen=True)
class Assignment:
    """cluster: (N,) int32, -1 for absent rows; similarity: (N,) float32 cosine to that centroid, 0 for absent rows."""

    cluster: NDArray[np.int32]
    similarity: NDArray[np.float32]


def device() -> torch.device:
    """Where products are computed: the GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checked(block: Block, number: int) -> torch.Tensor:
    """(n, D) float32 on the device. Raises DataError for a vector that is not finite."""
    vectors_nD = torch.from_numpy(np.require(block.vectors, requirements="W")).to(device()).float()
    finite_n = torch.isfinite(vectors_nD.norm(dim=1))  # cheaper than every value; the square of a float16 fits into float32
    if not finite_n.all():
        row = int(block.rows[~finite_n.cpu().numpy()][0])
        raise DataError(f"the vector of row {row} (block {number}) is not finite; find its image and the embedder that made it")
    return vectors_nD


def nearest_centroid(vectors_nD: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 (n,), float32 (n,)): the centroid with the largest cosine, the first of equal ones, and that cosine."""
    num_rows, kind = len(vectors_nD), vectors_nD.device.type
    best_n = torch.full((num_rows,), -torch.inf, device=vectors_nD.device)
    cluster_n = torch.zeros(num_rows, dtype=torch.int64, device=vectors_nD.device)
    for row in range(0, num_rows, TILE_ROWS[kind]):
        rows = slice(row, row + TILE_ROWS[kind])
        for start in range(0, len(centroids_KD), TILE_CENTROIDS):
            highest, where = _largest(vectors_nD[rows] @ centroids_KD[start : start + TILE_CENTROIDS].T)
            better = highest > best_n[rows]
            best_n[rows] = torch.where(better, highest, best_n[rows])
            cluster_n[rows] = torch.where(better, where + start, cluster_n[rows])
    norms_n = vectors_nD.norm(dim=1).clamp(min=1e-12)
    return cluster_n, best_n / norms_n


def cosine_to(vectors_nD: torch.Tensor, centroids_KD: torch.Tensor, cluster_n: torch.Tensor) -> NDArray[np.float32]:
    """(n,) cosine of every float16 vector, widened to float32, to its centroid. Summed in float64 row by row: a product's last
    bits depend on how many rows it has, and these decide what is drawn first."""
    found = np.empty(len(vectors_nD), np.float32)
    for start in range(0, len(vectors_nD), TILE_ROWS["cpu"]):
        rows = slice(start, start + TILE_ROWS["cpu"])
        wide_nD = vectors_nD[rows].double()
        cosine_n = (wide_nD * centroids_KD[cluster_n[rows]]).sum(dim=1) / wide_nD.norm(dim=1).clamp(min=1e-12)
        found[rows] = cosine_n.float().cpu().numpy()
    return found


def _largest(products_nK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, position) of the first largest of each row."""
    if products_nK.device.type != "cpu":
        highest_n, where_n = products_nK.max(dim=1)
        return highest_n, where_n
    where_n = torch.from_numpy(products_nK.numpy().argmax(axis=1))  # measured: half the time of torch's max with positions
    return products_nK.gather(1, where_n[:, None])[:, 0], where_n


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Every row divided by its length."""
    normed: torch.Tensor = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return normed


@dataclass(frozen=True)
class _Assign:
    """Writes row, centroid and similarity of every vector of some blocks."""

    vectors: Vectors
    room: Store

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        key = block_key("rows/", task["number"])
        if self.room.size(key) is None:
            centroids_KD = torch.from_numpy(read_array(self.room, "centroids.npy")).to(device())
            found = [self._block(number, centroids_KD) for number in range(task["first"], task["end"])]
            write_array(self.room, key, np.concatenate(found))
        return {}

    def _block(self, number: int, centroids_KD: torch.Tensor) -> NDArray[Any]:
        block = self.vectors.read(number)
        vectors_nD = checked(block, number)
        cluster_n, _ = nearest_centroid(vectors_nD, centroids_KD)
        found = np.empty(len(block.rows), [("row", "<i8"), ("cluster", "<i4"), ("similarity", "<f4")])
        found["row"], found["cluster"] = block.rows, cluster_n.cpu().numpy()
        found["similarity"] = cosine_to(vectors_nD, centroids_KD, cluster_n)
        return found


def assignment_room(work: Store, name: str, vectors: Vectors, centroids: NDArray[np.float32]) -> Store:
    """Where `assign` writes, an object per task of `block_ranges(num_blocks, ASSIGN_TASKS)` under rows/."""
    digest = hashlib.sha256(centroids.tobytes()).hexdigest()[:16]
    return work.child(f"assign-{name}-{vectors.num_rows}-{digest}")


def assign(vectors: Vectors, centroids: NDArray[np.float32], *, name: str, work: Store, run: TaskMap) -> Assignment:
    """The nearest centroid of every row, in one pass.

    name: of these vectors (`pool`, a curated set), which with the centroids names what is written, so that a repeated run finds
    it.
    """
    room = assignment_room(work, name, vectors, centroids)
    if room.size("centroids.npy") is None:
        write_array(room, "centroids.npy", centroids)
    blocks = block_ranges(vectors.num_blocks, ASSIGN_TASKS)
    tasks = [{"number": number, "first": first, "end": end} for number, (first, end) in enumerate(blocks)]
    for _ in run(_Assign(vectors, room), tasks, label="images to clusters"):
        pass
    cluster_N, similarity_N = np.full(vectors.num_rows, -1, np.int32), np.zeros(vectors.num_rows, np.float32)
    for number in range(len(blocks)):
        found = read_array(room, block_key("rows/", number))
        cluster_N[found["row"]], similarity_N[found["row"]] = found["cluster"], found["similarity"]
    return Assignment(cluster_N, similarity_N)
