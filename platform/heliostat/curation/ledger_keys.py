"""Where a row of the ledger lies: by the first bits of its id, which is a hash already, or by a hash of its source."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# Shapes: n rows.

_HASH_STRINGS = 65_536  # strings hashed at a time: their bytes take eight times their size


def hash_strings(texts: pa.Array | pa.ChunkedArray) -> NDArray[np.uint64]:
    """64-bit hashes of texts, vectorised: a polynomial over their bytes modulo 2^64, mixed. Null hashes as "".

    Not cryptographic: who wants to can make sources collide, which costs a look-up a few rows more and no more than that.
    """
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    parts = [_hash(chunk.slice(start, _HASH_STRINGS)) for chunk in chunks for start in range(0, len(chunk), _HASH_STRINGS)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def _hash(texts: pa.Array) -> NDArray[np.uint64]:
    column = pa.concat_arrays([texts.fill_null("").cast(pa.large_string())])
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    data = column.buffers()[2]
    values = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data is not None else np.empty(0, np.uint8)
    begins, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    powers = np.full(int(lengths.max()) + 1, 0x9E3779B97F4A7C15, np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers)
    place = np.arange(len(values)) - np.repeat(begins, lengths)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((values.astype(np.uint64) + np.uint64(1)) * powers[place])])
    mixed: NDArray[np.uint64] = sums[begins + lengths] - sums[begins]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def part_of(hashes: NDArray[np.uint64], num_parts: int) -> NDArray[np.int64]:
    """Which of equal ranges of the upper 32 bits each hash lies in."""
    return ((hashes >> np.uint64(32)) * np.uint64(num_parts) >> np.uint64(32)).astype(np.int64)


def id_heads(ids: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The first 64 bits of ids (n, 32), as numbers whose order is that of the ids."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").astype(np.uint64).reshape(-1)
