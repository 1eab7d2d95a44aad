"""All similar pairs of two sets of vectors: a fast product proposes, an exact one decides.

The similarity of two images is the inner product of their stored float16 vectors, capped at 1, as float32. In float64 that
product is EXACT: a product of two float16 is a multiple of 2^-48, and partial sums of L2-normalised vectors stay below 2, so no
bit is ever rounded away (53 are there) and the order of summation does not matter. So the result depends neither on how the
work was cut nor on the hardware: the fast product (bfloat16 on a CPU with matrix units, float16 on a GPU, float32 elsewhere)
only has to propose every pair that could reach the floor, for which its largest possible error is subtracted first.
"""

import time
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.curation.vectors import Block
from heliostat.errors import DataError

# Shapes: n and m rows of two operands, D dimension, E pairs.

TILE = 1024
"""Rows and columns of one product on the CPU: its bfloat16 result (2 MiB) stays in the level-2 cache while it is searched."""

GPU_TILE = 8192
"""Rows and columns of one product on a GPU: 128 MiB of float16 (assumption, not studied)."""

DENSE_HITS = 24_576
"""Proposals in a tile from which the whole tile is multiplied in float64: that costs 15 ms, and a single pair 0.5 us (measured,
D 512, one core)."""

ERROR = {torch.bfloat16: 0.0105, torch.float16: 0.01, torch.float32: 1e-4}
"""Largest error of the fast product of unit vectors. bfloat16: 2 x 2^-8 from the operands (Cauchy-Schwarz) and 2^-9 from
rounding the result. float16 is exact on the way in; 0.01 covers sums that a GPU may keep in float16. float32: summation."""

MAX_NORM = 1.01
"""float16 rounds a unit vector to a norm of 1 +- 0.0005; more is not normalised, and the errors above would not hold."""

KEPT_PAIRS = 4_000_000
"""Pairs held before they are reduced to the best of each image (64 MB)."""


PAIRS_AT_ONCE = 512
"""Pairs compared exactly at once: their vectors stay in the cache (measured: 0.5 us a pair at 512, 2 us with 4,096 at once)."""


SCORED_AT_ONCE = 100_000
"""Proposals that wait to be compared exactly, over many tiles: a call costs as much as 100 pairs."""

Proposals = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Positions in the first and in the second operand."""


class Pairs(NamedTuple):
    """first, second: positions int64; similarity: float32. No order."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float32]


NO_PAIRS = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True)
class Operand:
    """Vectors ready to be multiplied. rows: int64 global numbers, ascending; stored: (n, D) float16; fast: the same on the
    device and in the type of the fast product."""

    rows: NDArray[np.int64]
    stored: NDArray[np.float16]
    fast: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)


@cache
def fast_product() -> tuple[torch.device, torch.dtype]:
    """Where and in which type products run fastest in this process; on the CPU by trying (10 ms). Never changes a result."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.float16
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.ones((512, 512), dtype=dtype)
        torch.mm(values, values.T)
        started = time.perf_counter()
        for _ in range(3):
            torch.mm(values, values.T)
        seconds[dtype] = time.perf_counter() - started
    return torch.device("cpu"), min(seconds, key=lambda dtype: seconds[dtype])


def operand(block: Block, where: str = "vectors") -> Operand:
    """Check and prepare a block. Raises DataError for a vector that is not finite or longer than 1."""
    stored = np.ascontiguousarray(block.vectors, np.float16)
    values = torch.from_numpy(stored)
    norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float32).numpy()
    bad = np.flatnonzero(~(norms <= MAX_NORM))
    if len(bad):
        row, norm = int(block.rows[bad[0]]), float(norms[bad[0]])
        problem = f"has length {norm:.3g}, not 1" if np.isfinite(norm) else "is not finite"
        raise DataError(f"{where}: row {row} {problem} ({len(bad)} such); find the embedder that made it")
    device, dtype = fast_product()
    return Operand(block.rows, stored, values.to(device).to(dtype))


def exact_similarities(
    first: NDArray[np.float16], second: NDArray[np.float16], pairs: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> NDArray[np.float32]:
    """(E,) similarity of the named rows of two (n, D) and (m, D) arrays: exact, then rounded to float32."""
    found = np.empty(len(pairs[0]), np.float32)
    ones = torch.ones(first.shape[1], dtype=torch.float64)
    for start in range(0, len(found), PAIRS_AT_ONCE):
        left, right = (
            torch.from_numpy(vectors[rows[start : start + PAIRS_AT_ONCE]]).float()
            for vectors, rows in zip((first, second), pairs, strict=True)
        )
        # A product of two float16 fits into a float32; only the sum needs more.
        total = left.mul_(right).double() @ ones
        found[start : start + PAIRS_AT_ONCE] = total.clamp_(max=1.0).to(torch.float32).numpy()
    return found


def order_key(values: torch.Tensor) -> NDArray[Any]:
    """Floats as integers of the same width that keep the order of non-negative values, negative ones below: a view. Comparing
    and taking maxima of integers runs at memory speed where that of bfloat16 does not (measured: 4 to 20 times)."""
    integers = torch.int32 if values.dtype == torch.float32 else torch.int16
    return np.asarray(values.view(integers).numpy())


@cache
def floor_key(floor: float, dtype: torch.dtype) -> int:
    """The key of a positive number, rounded down."""
    value = torch.tensor([floor], dtype=torch.float64).to(dtype)
    key = int(order_key(value)[0])
    return key if float(value[0]) <= floor else key - 1


def similar_pairs(first: Operand, second: Operand, floor: float, *, neighbors: int, same: bool) -> Pairs:
    """Pairs of global rows with similarity >= floor (> 0), those among the `neighbors` best of either row.

    same: both operands are one set; every pair is then found once and no row is paired with itself. Best means the larger
    similarity, then the smaller row. Within two sets a row has no other neighbours, so what is left out here cannot be among
    the best of a row in any larger set.
    """
    found: list[Pairs] = []
    proposed: list[Proposals] = []
    held = waiting = 0
    step = GPU_TILE if first.fast.is_cuda else TILE
    dense_hits = DENSE_HITS * (step // TILE) ** 2
    scratch = torch.empty((step, step), dtype=first.fast.dtype, device=first.fast.device)
    for top in range(0, len(first), step):
        for left in range(top if same else 0, len(second), step):
            rows, columns = _proposals(_product(first, second, (top, left), scratch), floor - ERROR[scratch.dtype])
            if len(rows) > dense_hits:
                found.append(_dense(first, second, (top, left), floor, neighbors=neighbors, same=same))
                held += len(found[-1].first)
            elif len(rows):
                proposed.append((rows + top, columns + left))
                waiting += len(rows)
            if waiting > SCORED_AT_ONCE or (waiting and held > KEPT_PAIRS):
                found.append(_scored(first, second, proposed, floor, same=same))
                held, waiting, proposed = held + len(found[-1].first), 0, []
            if held > KEPT_PAIRS:
                found = [best_of_either(concatenated(found), neighbors)]
                # What is left cannot shrink much further; wait until as much again has come.
                held = max(0, len(found[0].first) - KEPT_PAIRS // 2)
    if proposed:
        found.append(_scored(first, second, proposed, floor, same=same))
    return best_of_either(concatenated(found), neighbors)


def _product(first: Operand, second: Operand, corner: tuple[int, int], scratch: torch.Tensor) -> torch.Tensor:
    """The fast product of one tile; whole tiles into the same memory, because new pages cost as much as the product."""
    (top, left), step = corner, len(scratch)
    some, others = first.fast[top : top + step], second.fast[left : left + step]
    if len(some) == len(others) == step:
        return torch.mm(some, others.T, out=scratch)
    return torch.mm(some, others.T)


def _scored(first: Operand, second: Operand, proposed: list[Proposals], floor: float, *, same: bool) -> Pairs:
    """The proposals that do reach the floor, as global rows."""
    rows, columns = (np.concatenate(positions) for positions in zip(*proposed, strict=True))
    if same:
        upper = rows < columns
        rows, columns = rows[upper], columns[upper]
    similarity = exact_similarities(first.stored, second.stored, (rows, columns))
    kept = similarity >= np.float32(floor)
    return Pairs(first.rows[rows[kept]], second.rows[columns[kept]], similarity[kept])


def concatenated(pairs: list[Pairs]) -> Pairs:
    """All of them, one after the other."""
    return Pairs(*(np.concatenate(arrays) for arrays in zip(*pairs, strict=True))) if pairs else NO_PAIRS


def best_of_either(pairs: Pairs, neighbors: int) -> Pairs:
    """Those among the `neighbors` best of either end, by similarity, then by the other's row. Pairs must be distinct."""
    if len(pairs.first) <= neighbors:
        return pairs
    kept = np.zeros(len(pairs.first), np.bool_)
    both = np.concatenate([pairs.first, pairs.second])
    _, label = np.unique(both, return_inverse=True)
    counts = np.bincount(label)
    crowded = np.flatnonzero(counts > neighbors)
    if not len(crowded):
        return pairs
    is_crowded = np.zeros(len(counts), np.bool_)
    is_crowded[crowded] = True
    half = len(pairs.first)
    kept |= ~is_crowded[label[:half]] | ~is_crowded[label[half:]]
    ends = np.flatnonzero(is_crowded[label])
    edge = ends % half
    other = np.where(ends < half, pairs.second[edge], pairs.first[edge])
    order = np.lexsort((other, -pairs.similarity[edge], label[ends]))
    rank = rank_in_runs(label[ends][order])
    kept[edge[order][rank < neighbors]] = True
    return Pairs(pairs.first[kept], pairs.second[kept], pairs.similarity[kept])


def rank_in_runs(labels: NDArray[Any]) -> NDArray[np.int64]:
    """0, 1, 2, ... within every run of equal labels."""
    position = np.arange(len(labels))
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]]) if len(labels) else position
    return position - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))


def _proposals(product: torch.Tensor, floor: float) -> Proposals:
    """Rows and columns of the values that reach the floor."""
    if product.is_cuda:
        rows, columns = torch.nonzero(product >= floor, as_tuple=True)
        return rows.cpu().numpy(), columns.cpu().numpy()
    if floor <= 0:
        reached_rows, reached_columns = np.nonzero((product >= floor).numpy())
        return reached_rows, reached_columns
    keys, least = order_key(product), floor_key(floor, product.dtype)
    reached = np.flatnonzero(keys.max(axis=1) >= least)
    flat = np.flatnonzero(keys[reached] >= least)
    return reached[flat // keys.shape[1]], flat % keys.shape[1]


def _dense(first: Operand, second: Operand, corner: tuple[int, int], floor: float, *, neighbors: int, same: bool) -> Pairs:
    """A tile where many pairs are similar, as global rows: float64 products, and the best of every row and column by partial
    sorting."""
    found = []
    step = GPU_TILE if first.fast.is_cuda else TILE
    for top in range(corner[0], min(corner[0] + step, len(first)), TILE):
        for left in range(corner[1], min(corner[1] + step, len(second)), TILE):
            if not (same and left < top):
                found.append(_dense_tile(first, second, (top, left), floor, neighbors=neighbors, same=same))
    return concatenated(found)


def _dense_tile(first: Operand, second: Operand, corner: tuple[int, int], floor: float, *, neighbors: int, same: bool) -> Pairs:
    top, left = corner
    some = torch.from_numpy(first.stored[top : top + TILE]).double()
    others = torch.from_numpy(second.stored[left : left + TILE]).double()
    similarity = torch.mm(some, others.T).clamp_(max=1.0).to(torch.float32).numpy()
    diagonal = same and top == left
    if diagonal:
        np.fill_diagonal(similarity, -1.0)
    # Bits of a positive float32 order as it does; below them the position, so that of equals the smaller row is better.
    bits = np.maximum(similarity, 0).view(np.int32).astype(np.int64) << 16
    kept = np.zeros(similarity.shape, np.bool_)
    for axis in (0, 1):
        position = np.arange(similarity.shape[axis], dtype=np.int64)
        key = bits + (TILE - (position[:, None] if axis == 0 else position[None, :]))
        size = similarity.shape[axis]
        if size <= neighbors:
            kept[:] = True
            break
        least = np.partition(key, size - neighbors, axis=axis).take([size - neighbors], axis=axis)
        kept |= key >= least
    kept &= similarity >= np.float32(floor)
    rows, columns = np.nonzero(np.triu(kept, 1) if diagonal else kept)
    return Pairs(first.rows[rows + top], second.rows[columns + left], similarity[rows, columns])
