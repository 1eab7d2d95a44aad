"""The drawn parameters against their distributions; seeds are fixed, so each test gives the same answer for ever.

Limits are those of a level of 0.001: 1.95 / sqrt(n) for Kolmogorov and Smirnov's distance, 3.3 standard deviations for a share.
"""

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from heliostat.data.config import CropsConfig
from heliostat.data.crop_parameters import (
    JITTER_OPERATIONS,
    CropParameters,
    draw_parameters_batch,
    image_generator,
    sample_parameters,
)

HW = (375, 500)
NUM_IMAGES = 4000


@cache
def drawn(blur: str = "as_trained") -> list[list[CropParameters]]:
    config = CropsConfig(blur=blur)
    return [sample_parameters(HW, config, image_generator(3, 1, index)) for index in range(NUM_IMAGES)]


def is_uniform(values: npt.NDArray[np.float64] | list[float], low: float, high: float) -> bool:
    """Kolmogorov and Smirnov's test against the uniform distribution."""
    ordered = (np.sort(np.asarray(values, np.float64)) - low) / (high - low)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return bool(distance < 1.95 / math.sqrt(len(ordered)))


def same_distribution(first: list[float], second: list[float]) -> bool:
    """Kolmogorov and Smirnov's test of two samples."""
    one, two = np.sort(first), np.sort(second)
    places = np.concatenate([one, two])
    distance = np.abs(np.searchsorted(one, places, "right") / len(one) - np.searchsorted(two, places, "right") / len(two)).max()
    return bool(distance < 1.95 * math.sqrt((len(one) + len(two)) / (len(one) * len(two))))


def has_share(flags: list[bool], share: float) -> bool:
    return abs(np.mean(flags) - share) <= 3.3 * math.sqrt(share * (1 - share) / len(flags))


def plain_boxes(scale: tuple[float, float], count: int) -> list[tuple[int, int, int, int]]:
    """RandomResizedCrop as its documentation says it, with another generator: (top, left, height, width)."""
    rng, boxes = np.random.default_rng(17), []
    while len(boxes) < count:
        area, ratio = rng.uniform(*scale) * HW[0] * HW[1], math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if width <= HW[1] and height <= HW[0]:
            boxes.append((int(rng.integers(HW[0] - height + 1)), int(rng.integers(HW[1] - width + 1)), height, width))
    return boxes


@pytest.mark.parametrize(("number", "scale"), [(0, (0.32, 1.0)), (1, (0.32, 1.0)), (2, (0.05, 0.32)), (9, (0.05, 0.32))])
def test_boxes_are_distributed_as_random_resized_crop(number: int, scale: tuple[float, float]) -> None:
    ours, plain = [draw[number] for draw in drawn()], plain_boxes(scale, 8000)
    for value in (
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: math.log(width / height),
        lambda top, left, height, width: top / (HW[0] - height + 1),
        lambda top, left, height, width: left / (HW[1] - width + 1),
    ):
        assert same_distribution([value(*crop[:4]) for crop in ours], [value(*box) for box in plain])
    assert all(0 <= crop.top <= HW[0] - crop.height and 0 <= crop.left <= HW[1] - crop.width for crop in ours)


def test_small_boxes_have_uniform_areas_ratios_and_positions() -> None:
    crops = [draw[number] for draw in drawn() for number in (2, 5)]
    assert is_uniform([crop.height * crop.width / (HW[0] * HW[1]) for crop in crops], 0.05, 0.32)
    assert is_uniform([math.log(crop.width / crop.height) for crop in crops], math.log(3 / 4), math.log(4 / 3))
    rng = np.random.default_rng(5)  # positions are whole numbers: spread within their pixel
    assert is_uniform([(crop.top + rng.random()) / (HW[0] - crop.height + 1) for crop in crops], 0, 1)
    assert is_uniform([(crop.left + rng.random()) / (HW[1] - crop.width + 1) for crop in crops], 0, 1)


@pytest.mark.parametrize(("blur", "shares"), [("as_trained", (0.0, 0.9, 0.5)), ("as_declared", (1.0, 0.1, 0.5))])
def test_each_operation_has_its_probability_in_each_crop(blur: str, shares: tuple[float, float, float]) -> None:
    for number in range(10):
        crops = [draw[number] for draw in drawn(blur)]
        assert has_share([crop.flip for crop in crops], 0.5)
        assert has_share([bool(crop.jitter) for crop in crops], 0.8)
        assert has_share([crop.grayscale for crop in crops], 0.2)
        assert has_share([crop.sigma > 0 for crop in crops], shares[min(number, 2)])
        assert has_share([crop.solarize for crop in crops], 0.2 if number == 1 else 0.0)


def test_amounts_and_blurs_are_uniform_within_their_limits() -> None:
    limits = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for number in (0, 1, 4):
        crops = [draw[number] for draw in drawn()]
        for name, (low, high) in limits.items():
            assert is_uniform([amount for crop in crops for key, amount in crop.jitter if key == name], low, high)
        sigmas = [crop.sigma for crop in crops if crop.sigma]
        assert number == 0 or is_uniform(sigmas, 0.1, 2.0)


def test_the_24_orders_of_the_jitter_are_equally_likely() -> None:
    orders = [tuple(name for name, _ in crop.jitter) for draw in drawn() for crop in draw if crop.jitter]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    expected = len(orders) / 24
    assert len(counts) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi-square of 23 degrees of freedom at 0.001


def test_parameters_of_a_crop_are_not_tied_to_each_other_or_to_other_crops() -> None:
    columns = []
    for number in (0, 1, 2):
        for crop_of in (
            lambda crop: crop.flip,
            lambda crop: crop.height * crop.width,
            lambda crop: bool(crop.jitter),
            lambda crop: crop.grayscale,
            lambda crop: crop.sigma,
        ):
            columns.append([float(crop_of(draw[number])) for draw in drawn()])
    varying = np.array([column for column in columns if np.std(column) > 0])
    correlations = np.corrcoef(varying) - np.eye(len(varying))
    assert np.abs(correlations).max() < 4.0 / math.sqrt(NUM_IMAGES)  # a hundred pairs: a wider limit than for one


def test_the_batch_draws_what_each_image_draws() -> None:
    config, sizes, keys = CropsConfig(local_crops_number=3), [(375, 500), (40, 400), (9, 9)], [(1, 2, 3), (1, 2, 4), (0, 0, 0)]
    arrays = draw_parameters_batch(sizes, config, keys)
    for image, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        for number, crop in enumerate(sample_parameters(size, config, image_generator(*key))):
            row = number * len(sizes) + image
            places = [place for place in arrays.order_R4[row] if place >= 0]
            assert tuple(arrays.boxes_R4[row]) == crop[:4]
            assert tuple((JITTER_OPERATIONS[place], arrays.amounts_R4[row, place]) for place in places) == crop.jitter
            flags = (arrays.flip_R[row], arrays.grayscale_R[row], arrays.sigma_R[row], arrays.solarize_R[row])
            assert flags == (crop.flip, crop.grayscale, crop.sigma, crop.solarize)


@pytest.mark.parametrize(("image_hw", "box_hw"), [((400, 40), (53, 40)), ((40, 400), (40, 53)), ((1, 1), (1, 1))])
def test_a_picture_no_box_fits_falls_back_to_its_centre(image_hw: tuple[int, int], box_hw: tuple[int, int]) -> None:
    config = CropsConfig(global_crops_scale=(1.0, 1.0))
    crop = sample_parameters(image_hw, config, image_generator(0, 0, 0))[0]
    assert (crop.height, crop.width) == box_hw
    assert (crop.top, crop.left) == ((image_hw[0] - box_hw[0]) // 2, (image_hw[1] - box_hw[1]) // 2)


def test_a_strength_of_zero_leaves_the_operation_out() -> None:
    config = CropsConfig(hue=0.0, saturation=0.0, color_jitter_probability=1.0)
    draws = [sample_parameters(HW, config, image_generator(3, 0, index)) for index in range(50)]
    assert {name for draw in draws for crop in draw for name, _ in crop.jitter} == {"brightness", "contrast"}
