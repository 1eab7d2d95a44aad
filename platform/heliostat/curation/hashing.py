"""Exact duplicates: files whose bytes have the same sha256, and so the same id."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Shapes: N files of the manifest.


@dataclass(frozen=True)
class ExactGroups:
    """Files grouped by id.

    survivor: int64, row of the file that stays for each file (itself when it stays).
    dropped: bool, True where another file with the same bytes stays.
    """

    survivor: NDArray[np.int64]
    dropped: NDArray[np.bool_]

    @property
    def num_dropped(self) -> int:
        """Files that repeat the bytes of another."""
        return int(self.dropped.sum())


def group_exact(ids: Sequence[str] | NDArray[np.str_], sources: Sequence[str] | NDArray[np.str_]) -> ExactGroups:
    """Group files by id; the smallest source name of each group stays.

    Equal bytes have equal quality, so the name decides, never the order of arrival: shards may come in any order and the same
    file survives.
    """
    ids_N, sources_N = np.asarray(ids, dtype=np.str_), np.asarray(sources, dtype=np.str_)
    num_files = len(ids_N)
    if num_files == 0:
        return ExactGroups(np.empty(0, np.int64), np.empty(0, np.bool_))
    order = np.lexsort((sources_N, ids_N))
    starts = np.r_[True, ids_N[order][1:] != ids_N[order][:-1]]
    group = np.cumsum(starts) - 1
    survivor_N = np.empty(num_files, np.int64)
    survivor_N[order] = order[starts][group]
    return ExactGroups(survivor_N, survivor_N != np.arange(num_files))
