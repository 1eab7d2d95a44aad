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
from heliostat.errors import DataError, ObjectNotFoundError, StorageError
from heliostat.storage import Store

# Shapes: n records, P destinations.

DONE = ".offsets.npy"
"""Ending of the object that says a task is finished."""

_HEADER_BYTES = 128
"""Header of a .npy file of version 1.0 that holds one row of int64, whatever its length."""


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
        start, stop = _bounds(store, key + DONE, destinations)
        if stop > start:
            data = store.read_range(key, start * dtype.itemsize, (stop - start) * dtype.itemsize)
            parts.append(np.frombuffer(data, dtype))
    return np.concatenate(parts)


def _bounds(store: Store, key: str, destinations: range) -> tuple[int, int]:
    """First record and end of the destinations, by one request for their offsets alone: a join asks a million times."""
    first, count = _HEADER_BYTES + 8 * destinations.start, len(destinations) + 1
    try:
        offsets = np.frombuffer(store.read_range(key, first, 8 * count), "<i8")
    except ObjectNotFoundError:
        raise
    except StorageError as error:
        raise DataError(f"{store.uri}/{key} has not {destinations.stop + 1} offsets; remove it and run again") from error
    if offsets[0] < 0 or (np.diff(offsets) < 0).any():
        raise DataError(f"{store.uri}/{key} holds no offsets; remove it and run again")
    return int(offsets[0]), int(offsets[-1])


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
