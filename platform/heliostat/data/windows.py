"""Large range reads over one object: the walk over a tar of any size touches only a window of it at a time."""

import io
from typing import Protocol

from heliostat.storage import Store

WINDOW_BYTES = 16 * 2**20  # one request of this size costs an object store little more than a small one


class Bytes(Protocol):
    """Random access to a number of bytes."""

    @property
    def num_bytes(self) -> int:
        """How many there are."""

    def view(self, start: int, num_bytes: int) -> memoryview:
        """`num_bytes` bytes from `start`, all of them inside; valid until the next call."""


class BytesInMemory:
    """Bytes that are there already; views copy nothing."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._view = memoryview(data)
        self.num_bytes = len(self._view)

    def view(self, start: int, num_bytes: int) -> memoryview:
        return self._view[start : start + num_bytes]


class BytesOfObject:
    """An object of a store. Holds one window (or one larger view); reads ahead from where the last view began."""

    def __init__(self, store: Store, key: str, num_bytes: int, window_bytes: int = WINDOW_BYTES) -> None:
        self._store, self._key, self.num_bytes = store, key, num_bytes
        self._window_bytes = window_bytes
        self._start, self._window = 0, memoryview(b"")

    def view(self, start: int, num_bytes: int) -> memoryview:
        """Raises StorageError when the object is shorter than it was said to be."""
        offset = start - self._start
        if offset < 0 or offset + num_bytes > len(self._window):
            length = min(max(num_bytes, self._window_bytes), self.num_bytes - start)
            self._window = memoryview(b"")  # the old window is gone before the new one comes: one window of memory, not two
            self._window = memoryview(self._store.read_range(self._key, start, length))
            self._start, offset = start, 0
        return self._window[offset : offset + num_bytes]


class BytesFile(io.RawIOBase):
    """Bytes as a file that Arrow can seek in."""

    def __init__(self, source: Bytes) -> None:
        super().__init__()
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.num_bytes - self._position)
        length = left if size is None or size < 0 else min(size, left)
        data = bytes(self._source.view(self._position, length)) if length else b""
        self._position += length
        return data

    def readall(self) -> bytes:
        return self.read()
