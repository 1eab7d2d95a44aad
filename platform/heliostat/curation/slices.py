"""Shuffles through object storage: what one task sorts by destination, another reads its share of.

An object of slices is an array of fixed-size records sorted by destination, and beside it the offsets of every destination,
written last: an object without offsets does not exist. Readers ask for the byte range of their destination alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.tasks import TaskFunction, TaskMap
from heliostat.curation.vectors import read_array, write_array
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: n records, P destinations.

DONE = ".offsets.npy"
"""Ending of the object that says a task is finished."""


def write_slices(store: Store, key: str, records: NDArray[Any], destination: NDArray[np.int64], num_destinations: int) -> None:
    """Write (n,) records grouped by destination (n,), in their order within each."""
    order = np.argsort(destination, kind="stable")
    counts = np.bincount(destination, minlength=num_destinations)
    if len(records):
        store.put(key, np.ascontiguousarray(records[order]).tobytes())
    write_array(store, key + DONE, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def read_slices(store: Store, keys: Iterable[str], destinations: range, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Records for a range of neighbouring destinations from every object, one after the other. DataError where one is torn."""
    parts = [np.empty(0, dtype)]
    for key in keys:
        offsets = read_array(store, key + DONE)
        if offsets.ndim != 1 or len(offsets) < destinations.stop + 1:
            raise DataError(f"{store.uri}/{key}{DONE} has {offsets.size} offsets, {destinations.stop + 1} needed; remove it")
        start, stop = int(offsets[destinations.start]), int(offsets[destinations.stop])
        if stop > start:
            data = store.read_range(key, start * dtype.itemsize, (stop - start) * dtype.itemsize)
            parts.append(np.frombuffer(data, dtype))
    return np.concatenate(parts)


def slice_counts(store: Store, keys: Sequence[str], num_destinations: int) -> NDArray[np.int64]:
    """(P,) records per destination over all the objects."""
    total = np.zeros(num_destinations, np.int64)
    for key in keys:
        total += np.diff(read_array(store, key + DONE))
    return total


def run_missing(
    run: TaskMap, function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, store: Store, prefix: str, label: str
) -> None:
    """Run the tasks whose object task["done"] does not lie in the store yet; all of those begin with `prefix`."""
    there = {info.key for info in store.list(prefix)}
    missing = [task for task in tasks if task["done"] not in there]
    if missing:
        for _ in run(function, missing, label=label):
            pass
