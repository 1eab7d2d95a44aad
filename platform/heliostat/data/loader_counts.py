"""What a loader did so far, counted from several threads."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from heliostat.data.quarantine import Rejection


@dataclass(frozen=True)
class LoaderStatistics:
    """Counts since the loader was made. data_wait_seconds: how long `batches` kept its caller waiting; bytes: fetched."""

    data_wait_seconds: float
    images: int
    bytes: int
    decode_failures: dict[str, int]


@dataclass
class LoaderCounts:
    """Adds up; any thread may call."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _data_wait_seconds: float = 0.0
    _images: int = 0
    _bytes: int = 0
    _decode_failures: Counter[str] = field(default_factory=Counter)
    _rejections: list[Rejection] = field(default_factory=list)

    def add(
        self, *, data_wait_seconds: float = 0.0, images: int = 0, num_bytes: int = 0, rejections: Sequence[Rejection] = ()
    ) -> None:
        """Count some work."""
        with self._lock:
            self._data_wait_seconds += data_wait_seconds
            self._images += images
            self._bytes += num_bytes
            self._rejections += rejections
            self._decode_failures.update(rejection.reason for rejection in rejections)

    def statistics(self) -> LoaderStatistics:
        """The sums up to now."""
        with self._lock:
            failures = dict(sorted(self._decode_failures.items()))
            return LoaderStatistics(self._data_wait_seconds, self._images, self._bytes, failures)

    def take_rejections(self) -> list[Rejection]:
        """The rejections since the last call."""
        with self._lock:
            taken, self._rejections = self._rejections, []
        return taken
