"""The truth as arrays agrees with a slow reading of the same truth, pair by pair."""

import itertools
from typing import Any

import numpy as np
import pytest
from planted_pool import SOURCES, row, truth

from heliostat.curation.planted_truth import DIFFERENT, NEUTRAL, SAME, boxes_overlap, read_truth
from heliostat.errors import DataError


def slow_relation(truth: dict[str, Any], one: str, two: str) -> int:
    """What the truth says about two files, read with dictionaries and pixels."""
    root = {copy["file"]: copy["original"] for copy in truth["planted"]}
    root |= {copy["file"]: "evaluation/" + copy["reference"] for copy in truth["evaluation"]}
    if root.get(one, one) == root.get(two, two):
        return SAME
    boxes = truth["boxes"] | {"evaluation/" + file: box for file, box in truth["evaluation_boxes"].items()}
    places = [boxes.get(root.get(file, file)) for file in (one, two)]
    if None not in places and places[0][0] == places[1][0]:
        shown = [{(x, y) for x in range(left, left + side) for y in range(top, top + side)} for _, left, top, side in places]
        if shown[0] & shown[1]:
            return NEUTRAL
    for frames in truth["video"].values():
        if one in frames and two in frames and abs(frames.index(one) - frames.index(two)) < truth["frames_apart"]:
            return NEUTRAL
    return DIFFERENT


def test_every_pair_stands_as_a_slow_reading_says() -> None:
    table = read_truth(truth(), SOURCES)
    pairs = np.array(list(itertools.combinations_with_replacement(range(len(SOURCES)), 2)))
    expected = [slow_relation(truth(), SOURCES[one], SOURCES[two]) for one, two in pairs]
    assert table.relation(pairs[:, 0], pairs[:, 1]).tolist() == expected
    assert table.relation(pairs[:, 1], pairs[:, 0]).tolist() == expected
    assert set(expected) == {SAME, NEUTRAL, DIFFERENT}


def test_the_order_of_the_images_does_not_matter() -> None:
    table = read_truth(truth(), SOURCES)
    order = np.random.default_rng(0).permutation(len(SOURCES))
    shuffled = read_truth(truth(), [SOURCES[index] for index in order])
    first, second = (array.ravel() for array in np.indices((len(SOURCES), len(SOURCES))))
    assert (shuffled.relation(first, second) == table.relation(order[first], order[second])).all()
    assert (shuffled.innocent_N == table.innocent_N[order]).all()


def test_what_a_wrong_pair_confuses_has_a_name() -> None:
    table = read_truth(truth(), SOURCES)
    named = {
        ("planted/flip/0.jpg", "tiles/brick/1.png"): "texture_tile",
        ("hard_negatives/chart/0.png", "hard_negatives/chart/1.png"): "chart",
        ("video/bikes/0.jpg", "video/bikes/3.jpg"): "film_frame",
        ("crops/brick/0.png", "crops/brick/2.png"): "same_photograph",
        ("planted_evaluation/flip/0.jpg", "tiles/brick/0.png"): "same_photograph",
        ("tiles/coins/2.png", "tiles/brick/0.png"): "unrelated",
        ("hard_negatives/chart/0.png", "video/bikes/0.jpg"): "unrelated",
    }
    first, second = (np.array([row(pair[place]) for pair in named]) for place in (0, 1))
    assert table.kinds_of_pairs(first, second).tolist() == list(named.values())
    assert table.transforms_of_pairs(first, second).tolist()[0] == "flip + none"
    assert table.transforms_of_pairs(second, first).tolist() == table.transforms_of_pairs(first, second).tolist()
    assert table.sizes_of_negatives() == {"chart": 2, "film_frame": 4, "neighbouring_tile": 2, "texture_tile": 5}


def test_innocent_is_what_shows_no_pixel_of_the_evaluation_set() -> None:
    table = read_truth(truth(), SOURCES)
    guilty = {SOURCES[index] for index in np.flatnonzero(~table.innocent_N)}
    assert guilty == {
        "broken/empty.jpg",
        "crops/brick/2.png",
        "planted_evaluation/flip/0.jpg",
        "planted_evaluation/identical/0.png",
    }


def test_broken_files_may_be_missing_and_others_may_not() -> None:
    assert read_truth(truth(), SOURCES[1:]).innocent_N.sum() == len(SOURCES) - 4
    with pytest.raises(DataError, match=r"'tiles/coins/2\.png' of the truth is not among the images"):
        read_truth(truth(), [source for source in SOURCES if source != "tiles/coins/2.png"])
    with pytest.raises(DataError, match="21 images have 20 different names"):
        read_truth(truth(), [*SOURCES, SOURCES[3]])


def test_touching_squares_do_not_overlap_and_neither_do_images_without_a_place() -> None:
    square = np.array([3, 10, 20, 30])
    others = np.array([[3, 40, 20, 30], [3, 39, 20, 30], [3, 10, 50, 5], [3, 15, 25, 2], [4, 10, 20, 30], [-1, -1, -1, -1]])
    assert boxes_overlap(others, square).tolist() == [False, True, False, True, False, False]
    nowhere = np.full((1, 4), -1)
    assert not boxes_overlap(nowhere, nowhere).any()
