"""Decontamination: images that show evaluation images go, with everything that is a copy of them (DINOv2 A: above 0.45 for
SSCD)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.copies_config import NearestConfig
from heliostat.curation.nearest import neighbors_of
from heliostat.curation.tasks import TaskMap
from heliostat.curation.vectors import JoinedVectors, Vectors
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of the pool, R reference images of all sets together.


@dataclass(frozen=True)
class SetCount:
    """One evaluation set: its images, images of the pool above the threshold whose nearest reference is in it, and images that
    go with those because they are their copies. Rows in two sets count for the nearer one."""

    num_references: int
    num_touched: int
    num_dropped: int


@dataclass(frozen=True)
class Contamination:
    """Arrays over N rows. dropped: bool; reference: int64, the nearest reference, counted through all sets in order, -1 where
    there is none; reference_set: int32, position of its set in `sets`, -1 likewise; reference_row: int64, its row in the set;
    similarity: float32, -1 likewise. sets: by name, in order."""

    dropped: NDArray[np.bool_]
    reference: NDArray[np.int64]
    reference_set: NDArray[np.int32]
    reference_row: NDArray[np.int64]
    similarity: NDArray[np.float32]
    sets: dict[str, SetCount]


def decontaminate(
    vectors: Vectors,
    references: Mapping[str, Vectors],
    threshold: float,
    component: NDArray[np.int64],
    *,
    run: TaskMap,
    work: Store,
) -> Contamination:
    """Compare every image with every reference, exactly, and drop the whole component of one above `threshold`.

    component: (N,) int64 from `find_copies`, -1 for rows that take no part. work: of this call alone. A component that touches
    several sets counts as dropped for the set of its nearest reference. Raises DataError for widths that differ.
    """
    for name, one in references.items():
        if one.dimension != vectors.dimension:
            raise DataError(f"{name} has vectors of width {one.dimension}, the pool {vectors.dimension}; embed both alike")
    starts = np.concatenate([[0], np.cumsum([one.num_rows for one in references.values()])]).astype(np.int64)
    similarity, reference = np.full(len(component), -1.0, np.float32), np.full(len(component), -1, np.int64)
    if starts[-1]:
        joined = JoinedVectors(tuple(references.values()))
        nearest = neighbors_of(vectors, joined, 1, config=NearestConfig(via="exact"), work=work, run=run)
        similarity, reference = nearest[0][:, 0], nearest[1][:, 0]
    reference_set = np.where(reference >= 0, np.searchsorted(starts, reference, side="right") - 1, -1).astype(np.int32)
    reference_row = np.where(reference >= 0, reference - starts[reference_set], -1)
    touched = (similarity > np.float32(threshold)) & (component >= 0)
    set_of_component = _set_of_component(component, similarity, reference_set, touched)
    gone = np.where(component >= 0, set_of_component[component], -1)
    sets = {
        name: SetCount(one.num_rows, int((touched & (reference_set == at)).sum()), int((gone == at).sum()))
        for at, (name, one) in enumerate(references.items())
    }
    return Contamination(gone >= 0, reference, reference_set, reference_row, similarity, sets)


def _set_of_component(
    component: NDArray[np.int64], similarity: NDArray[np.float32], reference_set: NDArray[np.int32], touched: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Set that drops each component, -1 for none; the set of its most similar touched image, of equals the first."""
    dropped_by = np.full(int(component.max(initial=0)) + 1, -1, np.int32)
    rows = np.flatnonzero(touched)
    order = rows[np.lexsort((reference_set[rows], -similarity[rows]))][::-1]
    dropped_by[component[order]] = reference_set[order]  # the last write wins: the most similar
    return dropped_by
