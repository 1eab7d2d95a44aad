"""Strips: neighbouring blocks of vectors read together, the unit of work of an exact comparison; and samples of rows."""

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.products import Operand, operand
from heliostat.curation.vectors import Block, Vectors


def strips_of(vectors: Vectors, rows_per_strip: int) -> list[tuple[int, int]]:
    """(first block, end) of strips with about `rows_per_strip` rows each, counted as if all blocks were alike."""
    if vectors.num_blocks == 0:
        return []
    blocks = max(1, round(rows_per_strip * vectors.num_blocks / max(1, vectors.num_rows)))
    return [(start, min(start + blocks, vectors.num_blocks)) for start in range(0, vectors.num_blocks, blocks)]


def read_strip(vectors: Vectors, strip: tuple[int, int]) -> Block:
    """The blocks of a strip as one."""
    blocks = [vectors.read(block) for block in range(*strip)]
    return Block(np.concatenate([block.rows for block in blocks]), np.concatenate([block.vectors for block in blocks]))


def strip_operand(vectors: Vectors, strip: tuple[int, int]) -> Operand:
    """A strip, checked and ready to be multiplied."""
    return operand(read_strip(vectors, strip), f"blocks {strip[0]} to {strip[1] - 1}")


def blocks_before(vectors: Vectors, row: int) -> int:
    """How many blocks at the beginning surely hold rows below `row` alone, by bisection: a few blocks are read."""
    low, high = 0, vectors.num_blocks if row > 0 else 0
    while low < high:
        middle = (low + high) // 2
        rows = vectors.read(middle).rows
        if len(rows) and int(rows[-1]) < row:
            low = middle + 1
        else:
            high = middle
    return low


SAMPLED_BLOCKS = 256
"""Blocks that a sample is drawn from at least, if there are as many: a pool of a billion is not read for a thousand rows."""


def sample_rows(vectors: Vectors, num_sampled: int, *, first_row: int = 0, seed: int = 0) -> Block:
    """`num_sampled` present rows from `first_row` on, or all there are; ascending. The same for the same seed and blocks."""
    generator = np.random.default_rng([seed, num_sampled, first_row])
    begin = blocks_before(vectors, first_row)
    order = generator.permutation(np.arange(begin, vectors.num_blocks))
    share = max(1, -(-num_sampled // max(1, min(SAMPLED_BLOCKS, len(order)))))
    while True:
        drawn, is_all = _draw(vectors, order, num_sampled, first_row=first_row, share=share, generator=generator)
        if is_all or len(drawn.rows) >= num_sampled:
            break
        share *= 2
    kept = generator.permutation(len(drawn.rows))[:num_sampled]
    kept = kept[np.argsort(drawn.rows[kept])]
    return Block(drawn.rows[kept], drawn.vectors[kept])


def _draw(
    vectors: Vectors,
    order: NDArray[np.int64],
    num_sampled: int,
    *,
    first_row: int,
    share: int,
    generator: np.random.Generator,
) -> tuple[Block, bool]:
    """Up to `share` rows of each block in turn until there are enough; and whether those are all rows there are."""
    parts = [Block(np.empty(0, np.int64), np.empty((0, vectors.dimension), np.float16))]
    total, is_all = 0, True
    for block in order:
        if total >= num_sampled:
            is_all = False
            break
        rows, values = vectors.read(int(block))
        eligible = np.flatnonzero(rows >= first_row)
        drawn = generator.choice(eligible, min(share, len(eligible)), replace=False)
        is_all &= len(drawn) == len(eligible)
        total += len(drawn)
        parts.append(Block(rows[drawn], values[drawn]))
    return Block(np.concatenate([part.rows for part in parts]), np.concatenate([part.vectors for part in parts])), is_all
