"""What a set of images is like: how many, how large, which formats, from where. Counted block by block, in bounded memory."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.curation.forget_list import hosts_of

# Shapes: n rows of a block.

_MAX_SIDE = 2**14  # longer sides count as this
_QUANTILES = (5, 25, 50, 75, 95)
_MAX_HOSTS = 1_000_000  # beyond, the rarest are dropped now and then: the top of the list stays right to within what they were
_TOP_HOSTS = 20


@dataclass
class ImageStatistics:
    """Add blocks, then read `as_dict`. short_side: int64 (16384,), images by the pixels of their shorter side."""

    num_images: int = 0
    num_bytes: int = 0
    num_pixels: int = 0
    short_side: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_MAX_SIDE, np.int64))
    formats: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)

    def add(self, rows: pa.Table, chosen: NDArray[np.bool_]) -> None:
        """Count the chosen rows of a block. rows: columns source, length, width, height, format; chosen: bool (n,)."""
        rows = rows.filter(pa.array(chosen))
        width, height = (rows[name].to_numpy().astype(np.int64) for name in ("width", "height"))
        self.num_images += rows.num_rows
        self.num_bytes += int(rows["length"].to_numpy().astype(np.int64).sum())
        self.num_pixels += int((width * height).sum())
        self.short_side += np.bincount(np.minimum(np.minimum(width, height), _MAX_SIDE - 1), minlength=_MAX_SIDE)
        _count(self.formats, rows["format"])
        _count(self.hosts, hosts_of(rows["source"]))
        if len(self.hosts) > 2 * _MAX_HOSTS:
            self.hosts = Counter(dict(self.hosts.most_common(_MAX_HOSTS)))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: counts, means, quantiles of the shorter side in pixels, formats, the most frequent hosts."""
        count = max(1, self.num_images)
        hosts = sorted(((host, number) for host, number in self.hosts.items() if host), key=lambda pair: (-pair[1], pair[0]))
        return {
            "num_images": self.num_images,
            "num_bytes": self.num_bytes,
            "mean_bytes": self.num_bytes / count,
            "mean_megapixels": self.num_pixels / count / 1e6,
            "short_side_pixels": self._quantiles(),
            "formats": dict(sorted(self.formats.items(), key=lambda pair: (-pair[1], pair[0]))),
            "num_hosts": len(hosts),
            "hosts": dict(hosts[:_TOP_HOSTS]),
        }

    def _quantiles(self) -> dict[str, int]:
        """The smallest side that so many per cent of the images do not exceed."""
        if not self.num_images:
            return {}
        reached = np.cumsum(self.short_side)
        return {f"{share}%": int(np.searchsorted(reached, share / 100 * self.num_images)) for share in _QUANTILES}


def _count(counter: Counter[str], column: pa.ChunkedArray | pa.Array) -> None:
    for pair in pc.value_counts(column).to_pylist():
        counter[pair["values"] or ""] += pair["counts"]
