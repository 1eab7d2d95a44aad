"""Shuffles through object storage."""

import numpy as np
import pytest

from heliostat.curation.slices import DONE, read_slices, run_missing, slice_counts, write_slices
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import write_array
from heliostat.errors import DataError, StorageError
from heliostat.storage import LocalStore


def test_every_destination_reads_what_was_sent_to_it_in_order(tmp_path):
    store, generator = LocalStore(tmp_path), np.random.default_rng(0)
    sent = {}
    for key in ("a", "b"):
        destination = generator.integers(5, size=100)
        records = generator.integers(1000, size=100)
        sent[key] = destination, records
        write_slices(store, key, records, destination, 6)
    for first in range(6):
        for last in range(first, 6):
            expected = [
                records[destination == number] for destination, records in sent.values() for number in range(first, last + 1)
            ]
            got = read_slices(store, ["a", "b"], range(first, last + 1), np.dtype(np.int64))
            np.testing.assert_array_equal(got, np.concatenate(expected))
    counts = slice_counts(store, ["a", "b"], 6)
    assert (
        counts.tolist() == np.bincount(np.concatenate([destination for destination, _ in sent.values()]), minlength=6).tolist()
    )


def test_nothing_sent_is_an_object_of_nothing(tmp_path):
    store = LocalStore(tmp_path)
    write_slices(store, "a", np.empty(0, np.int64), np.empty(0, np.int64), 3)
    assert len(read_slices(store, ["a"], range(3), np.dtype(np.int64))) == 0


def test_a_torn_object_and_offsets_of_another_shuffle_are_errors(tmp_path):
    store = LocalStore(tmp_path)
    write_slices(store, "a", np.arange(10), np.zeros(10, np.int64), 2)
    with pytest.raises(DataError, match="has not 6 offsets"):
        read_slices(store, ["a"], range(4, 5), np.dtype(np.int64))
    store.put("a", store.read("a")[:30])
    with pytest.raises(StorageError, match="truncated"):
        read_slices(store, ["a"], range(2), np.dtype(np.int64))
    whole = store.read("a" + DONE)
    assert len(whole) == 128 + 8 * 3  # what the reader counts on
    store.put("a" + DONE, b"junk")
    with pytest.raises(DataError, match="has not 3 offsets"):
        read_slices(store, ["a"], range(2), np.dtype(np.int64))
    write_array(store, "a" + DONE, np.array([10, 5, 0]))
    with pytest.raises(DataError, match="holds no offsets"):
        read_slices(store, ["a"], range(2), np.dtype(np.int64))


def test_only_tasks_whose_object_is_missing_are_run(tmp_path):
    store, done = LocalStore(tmp_path), []

    def work(task):
        done.append(task["done"])
        write_array(store, task["done"], np.zeros(1))
        return {}

    tasks = [{"done": f"part/{number}"} for number in range(4)]
    write_array(store, "part/2", np.zeros(1))
    for _ in range(2):
        run_missing(run_serially, work, tasks, store=store, prefix="part/", label="work")
    assert done == ["part/0", "part/1", "part/3"]
