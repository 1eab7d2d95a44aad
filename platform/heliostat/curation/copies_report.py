"""What the copies of a pool look like: sizes, how tightly components hang together, and what the guard did."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.copies import CopyResult

# Shapes: N rows of the pool.

NUM_LARGEST = 20


@dataclass(frozen=True)
class CopyReport:
    """Figures of a CopyResult.

    num_images: present; num_components: of two and more images, as they stand after the guard; num_singletons: images alone;
    num_dropped: images that another one represents; largest: sizes, descending; size_histogram: components by size, keys `2`,
    `3-4`, `5-8`, ...; mean_similarity, min_similarity: of dropped images to their representatives, None without any; max_hops:
    edges from an image to the best of its component before the guard: the diameter lies between this and twice this;
    chain_ratio: share of members, before the guard, that are two or more edges away from the best; num_split: components that
    the guard split; num_saved: images that stay only because of that; num_unknown: see CopyResult.
    """

    num_images: int
    num_components: int
    num_singletons: int
    num_dropped: int
    largest: tuple[int, ...]
    size_histogram: dict[str, int]
    mean_similarity: float | None
    min_similarity: float | None
    max_hops: int
    chain_ratio: float
    num_split: int
    num_saved: int
    num_unknown: int

    def to_json(self) -> dict[str, Any]:
        """For a record or a report."""
        return asdict(self)


def describe_copies(result: CopyResult) -> CopyReport:
    """Count. Everything is a pass over arrays of N."""
    present = result.component >= 0
    sizes = np.bincount(result.component[present]) if present.any() else np.empty(0, np.int64)
    dropped = result.dropped & present
    similarity = result.similarity_to_representative[dropped]
    similarity = similarity[~np.isnan(similarity)]
    own = np.arange(len(result.component))
    linked = present & ((result.unguarded != own) | (np.bincount(result.unguarded, minlength=len(own)) > 1))
    saved = present & ~dropped & (result.unguarded != own)
    return CopyReport(
        num_images=int(present.sum()),
        num_components=int((sizes > 1).sum()),
        num_singletons=int((sizes == 1).sum()),
        num_dropped=int(dropped.sum()),
        largest=tuple(np.sort(sizes[sizes > 1])[::-1][:NUM_LARGEST].tolist()),
        size_histogram=size_histogram(sizes),
        mean_similarity=float(similarity.mean(dtype=np.float64)) if len(similarity) else None,
        min_similarity=float(similarity.min()) if len(similarity) else None,
        max_hops=int(result.hops.max(initial=0)),
        chain_ratio=float((result.hops[linked] > 1).mean()) if linked.any() else 0.0,
        num_split=len(np.unique(result.unguarded[present & (result.representative != result.unguarded)])),
        num_saved=int(saved.sum()),
        num_unknown=result.num_unknown,
    )


def size_histogram(sizes: NDArray[np.int64]) -> dict[str, int]:
    """Components of two and more by size: `2`, then doubling."""
    bins = np.ceil(np.log2(sizes[sizes > 1])).astype(np.int64)
    counts = np.bincount(bins)
    names = {power: "2" if power == 1 else f"{2 ** (power - 1) + 1}-{2**power}" for power in range(1, len(counts))}
    return {names[power]: int(counts[power]) for power in names}
