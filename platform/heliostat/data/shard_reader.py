"""Reads images by (shard, offset, length), wherever the shard lies."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from heliostat.errors import DataError
from heliostat.storage import LocalStore, Store, open_store

_MAX_WHOLE_BYTES = 2**32  # shards of others can be of any size


@dataclass(frozen=True)
class ShardReader:
    """Reads the shards of an artifact: keys in its own store, or URIs (`s3://...`, `/absolute/path`) of shards left in place.

    Can be pickled; may be called from many threads.
    """

    files: Store

    def _place(self, shard: str) -> tuple[Store, str]:
        if not is_uri(shard):
            return self.files, shard
        if "://" in shard and not shard.startswith("s3://"):
            raise DataError(f"shard {shard[:200]} is neither a key nor s3:// nor an absolute path")
        folder, _, name = shard.rpartition("/")
        return open_store(folder or "/"), name

    def __call__(self, shard: str, offset: int, length: int) -> bytes:
        """The bytes of one image, or of a run of them. Raises StorageError when the shard is shorter."""
        store, key = self._place(shard)
        return store.read_range(key, offset, length)

    def whole(self, shard: str) -> bytes:
        """A whole shard. Raises DataError for one in place that is too large to hold: read that by ranges."""
        store, key = self._place(shard)
        if store is not self.files:
            num_bytes = store.size(key) or 0
            if num_bytes > _MAX_WHOLE_BYTES:
                raise DataError(f"shard {shard[:200]} has {num_bytes} bytes, the limit of a whole read is {_MAX_WHOLE_BYTES}")
        return store.read(key)

    def view(self, shard: str) -> memoryview:
        """A whole shard without a copy where it lies on a disk: pages come when they are touched. Errors as `whole`.

        Only shards of the artifact itself are mapped, for they never change once they are there; a file that somebody cuts
        while it is mapped ends the process.
        """
        store, key = self._place(shard)
        if store is not self.files or not isinstance(store, LocalStore) or not store.size(key):
            return memoryview(self.whole(shard))
        with store.path(key).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def is_remote(self, shard: str) -> bool:
        """Whether a shard lies in an object store, where each request costs time and money."""
        return not isinstance(self._place(shard)[0], LocalStore)

    def size(self, shard: str) -> int | None:
        """Size in bytes, None when there is no such shard."""
        store, key = self._place(shard)
        return store.size(key)


def is_uri(shard: str) -> bool:
    """Whether a manifest's shard lies outside of its artifact."""
    return shard.startswith("/") or "://" in shard


def image_runs(manifest: pa.Table, *, max_images: int = 1024, max_bytes: int = 2**28) -> list[range]:
    """Consecutive rows that one range read of at most `max_bytes` covers: of one shard, in its order.

    An image of its own that is larger still makes a run. A shard of any size is so read in bounded memory.
    """
    codes = pa.concat_arrays(manifest["shard"].chunks or [pa.array([], pa.string())]).dictionary_encode().indices.to_numpy()
    offsets, lengths = manifest["offset"].to_numpy(), manifest["length"].to_numpy()
    breaks = np.flatnonzero((np.diff(codes) != 0) | (np.diff(offsets) < 0)) + 1
    runs = []
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), manifest.num_rows], strict=True):
        start, ends = first, offsets[first:last] + lengths[first:last]
        while start < last:
            fits = int(np.searchsorted(ends[start - first :], offsets[start] + max_bytes, side="right"))
            stop = start + min(max(1, fits), max_images)
            runs.append(range(start, min(stop, last)))
            start = runs[-1].stop
    return runs


def read_run(read: ShardReader, shard: str, rows: Sequence[tuple[int, int]]) -> list[memoryview]:
    """The images at (offset, length) of one run, by one range read."""
    first = rows[0][0]
    data = memoryview(read(shard, first, max(offset + length for offset, length in rows) - first))
    return [data[offset - first : offset - first + length] for offset, length in rows]
