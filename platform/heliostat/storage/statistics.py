"""Counts of what this process asked of object storage, so that a run can report them."""

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class StorageStatistics:
    """Sums since the process began. Folders are not counted: only what crosses a network."""

    requests: int = 0
    """Requests sent, repeated ones included."""
    retries: int = 0
    """Requests sent again after a transient failure."""
    bytes_read: int = 0
    """Bytes of objects that arrived, discarded ones not included."""
    bytes_written: int = 0
    """Bytes of objects that were sent, repeated ones included."""

    def since(self, before: "StorageStatistics") -> "StorageStatistics":
        """What came on top of an earlier count."""
        return StorageStatistics(
            self.requests - before.requests,
            self.retries - before.retries,
            self.bytes_read - before.bytes_read,
            self.bytes_written - before.bytes_written,
        )


_lock = threading.Lock()
_counts = StorageStatistics()


def count(*, requests: int = 0, retries: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
    """Add to the counts; any thread may."""
    global _counts  # noqa: PLW0603  (one sum for the process is the point)
    with _lock:
        _counts = StorageStatistics(
            _counts.requests + requests,
            _counts.retries + retries,
            _counts.bytes_read + bytes_read,
            _counts.bytes_written + bytes_written,
        )


def storage_statistics() -> StorageStatistics:
    """The counts of this process up to now; subtract with `since`."""
    return _counts
