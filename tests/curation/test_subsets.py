"""Draws that only the seed decides, and copies of what was drawn."""

from pathlib import Path

import numpy as np
import pytest

from heliostat.curation.subsets import (
    block_ranges,
    copy_rows,
    draw_rows,
    first_of_each,
    place_in_group,
    present_rows,
    row_keys,
    store_vectors,
)
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors, read_all
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def test_keys_are_distinct_uniform_and_of_their_seed_and_purpose() -> None:
    rows = np.arange(20_000)
    keys = row_keys(rows, seed=1, purpose="a")
    assert len(np.unique(keys)) == len(rows)
    share = np.histogram(keys.astype(np.float64), bins=20, range=(0.0, 2.0**64))[0]
    assert share.min() > 850  # 1,000 expected, standard deviation 31
    assert share.max() < 1150
    for other in (row_keys(rows, seed=2, purpose="a"), row_keys(rows, seed=1, purpose="b")):
        assert abs(np.corrcoef(keys.astype(np.float64), other.astype(np.float64))[0, 1]) < 0.03


def test_a_draw_keeps_its_choice_when_other_rows_leave() -> None:
    rows = np.arange(1000)
    drawn = draw_rows(rows, 300, seed=0, purpose="x")
    assert (len(drawn), len(np.unique(drawn))) == (300, 300)
    np.testing.assert_array_equal(drawn, np.sort(drawn))
    gone = np.setdiff1d(rows, drawn)[:500]
    np.testing.assert_array_equal(draw_rows(np.setdiff1d(rows, gone), 300, seed=0, purpose="x"), drawn)
    assert draw_rows(rows, 5000, seed=0, purpose="x").tolist() == rows.tolist()
    assert draw_rows(rows, 0, seed=0, purpose="x").tolist() == []


def test_the_first_of_each_group_are_those_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    group, value = generator.integers(0, 9, size=200), generator.integers(0, 5, size=200)
    tie = generator.permutation(200)
    quota = generator.integers(0, 30, size=9)
    taken = first_of_each(group, [value, tie], quota[group])
    for one in range(9):
        rows = sorted(np.flatnonzero(group == one), key=lambda row: (value[row], tie[row]))
        assert set(np.flatnonzero(taken & (group == one))) == set(rows[: quota[one]])
    assert place_in_group(np.array([4, 4, 7, 9, 9, 9])).tolist() == [0, 1, 0, 0, 1, 2]
    assert place_in_group(np.array([])).tolist() == []


@pytest.mark.parametrize(("num_blocks", "max_tasks"), [(0, 4), (1, 4), (4, 4), (10, 4), (1000, 64)])
def test_block_ranges_cover_every_block_once_in_equal_tasks(num_blocks: int, max_tasks: int) -> None:
    ranges = block_ranges(num_blocks, max_tasks)
    assert [block for first, end in ranges for block in range(first, end)] == list(range(num_blocks))
    assert len(ranges) == min(num_blocks, max_tasks)
    lengths = [end - first for first, end in ranges]
    assert not lengths or max(lengths) - min(lengths) <= 1


def test_copied_rows_are_the_rows_and_a_repeated_copy_finds_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    array, kept = generator.standard_normal((300, 6)).astype(np.float16), generator.random(300) < 0.7
    vectors, work = ArrayVectors(array, kept=kept, rows_per_block=23), LocalStore(tmp_path)
    present = present_rows(vectors, work=work, run=run_serially, max_tasks=5)
    np.testing.assert_array_equal(present, np.flatnonzero(kept))
    wanted = draw_rows(present, 40, seed=0, purpose="x")
    for _ in range(2):
        copied = copy_rows(vectors, wanted, work=work, prefix="some/", run=run_serially, max_tasks=7)
        assert (copied.num_rows, copied.num_blocks, copied.dimension) == (40, 7, 6)
        np.testing.assert_array_equal(read_all(copied).vectors, array[wanted])
        np.testing.assert_array_equal(read_all(copied).rows, np.arange(40))
    with pytest.raises(DataError, match="1 of 1 rows have no vector"):
        copy_rows(vectors, np.flatnonzero(~kept)[:1], work=work, prefix="absent/", run=run_serially)


def test_stored_vectors_are_read_in_blocks(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((25, 4)).astype(np.float16)
    stored = store_vectors(array, LocalStore(tmp_path), "all/", rows_per_block=10)
    assert (stored.num_rows, stored.num_blocks) == (25, 3)
    np.testing.assert_array_equal(read_all(stored).vectors, array)
    assert stored.read(2).rows.tolist() == [20, 21, 22, 23, 24]
