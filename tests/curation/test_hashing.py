"""Exact duplicates."""

import numpy as np

from heliostat.curation.hashing import group_exact


def test_of_equal_ids_the_smallest_source_name_stays_whatever_the_order_of_arrival():
    ids = np.array(["aa", "bb", "aa", "cc", "aa", "bb"])
    sources = np.array(["z.png", "k.png", "m.png", "c.png", "b.png", "x.png"])
    for order in (np.arange(6), np.arange(6)[::-1], np.array([3, 1, 4, 0, 5, 2])):
        groups = group_exact(ids[order], sources[order])
        assert sorted(sources[order][~groups.dropped]) == ["b.png", "c.png", "k.png"]
        assert (ids[order][groups.survivor] == ids[order]).all()
        assert groups.num_dropped == 3


def test_no_files_give_empty_groups():
    groups = group_exact([], [])
    assert len(groups.survivor) == 0
    assert groups.num_dropped == 0
