"""Everything random about the crops of an image, drawn before any pixel is touched.

The parameters are a pure function of (seed, epoch, image index), the image's size and the settings; the way on a CPU
(`augment.py`), the way on a device (`device_augment.py`) and the tests' slow reference apply the same ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from heliostat.data.config import BLUR_PROBABILITIES, NUM_GLOBAL_CROPS, CropsConfig

# Shapes: B images, K crops of an image (global, then local), R = K * B rows.

MIN_ASPECT_RATIO, MAX_ASPECT_RATIO = 3.0 / 4.0, 4.0 / 3.0  # torchvision's RandomResizedCrop
JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
LEFT_OUT = -1

_LOG_MIN, _LOG_MAX = math.log(MIN_ASPECT_RATIO), math.log(MAX_ASPECT_RATIO)
_CROP_TRIES = 10  # torchvision's RandomResizedCrop
_LEAST_SIGMA, _MOST_SIGMA = 0.1, 2.0  # pixels, DINOv2
_MIDDLES = (1.0, 1.0, 1.0, 0.0)  # the amounts that change nothing
_BOX_DRAWS = 2 * _CROP_TRIES + 2
_DRAWS = 2 * _CROP_TRIES + 2 + 1 + 6 + 1 + 2 + 1  # box tries, position, flip, jitter, grey, blur, solarize


def _permutations() -> list[tuple[int, ...]]:
    """The 24 orders of four operations, each read from a mixed-radix number."""
    orders = []
    for number in range(24):
        code, remaining, places = number, [0, 1, 2, 3], []
        for radix in (4, 3, 2, 1):
            code, choice = divmod(code, radix)
            places.append(remaining.pop(choice))
        orders.append(tuple(places))
    return orders


_ORDERS = _permutations()


class CropParameters(NamedTuple):
    """One crop. Lengths in source pixels; 0, False or () means that the operation is left out.

    jitter: (operation, amount) in the order of application; amounts are factors, for hue a shift in turns.
    sigma: standard deviation of the blur in crop pixels.
    """

    top: int
    left: int
    height: int
    width: int
    size: int
    flip: bool = False
    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
    sigma: float = 0.0
    solarize: bool = False


@dataclass(frozen=True)
class ParameterArrays:
    """The parameters of R crops as arrays, one row a crop.

    boxes_R4: top, left, height, width in source pixels, int64. flip_R, grayscale_R, solarize_R: bool.
    order_R4: the jitter's operations in order of application, as places in JITTER_OPERATIONS; LEFT_OUT where there is none.
    amounts_R4: by place in JITTER_OPERATIONS, not by order; factors, for hue a shift in turns. sigma_R: 0 for no blur.
    """

    boxes_R4: npt.NDArray[np.int64]
    flip_R: npt.NDArray[np.bool_]
    order_R4: npt.NDArray[np.int64]
    amounts_R4: npt.NDArray[np.float64]
    grayscale_R: npt.NDArray[np.bool_]
    sigma_R: npt.NDArray[np.float64]
    solarize_R: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, crops: Sequence[CropParameters]) -> "ParameterArrays":
        """The same parameters, one row a crop."""
        order_R4 = np.full((len(crops), 4), LEFT_OUT, np.int64)
        amounts_R4 = np.tile(np.array(_MIDDLES), (len(crops), 1))
        for row, crop in enumerate(crops):
            for position, (operation, amount) in enumerate(crop.jitter):
                place = JITTER_OPERATIONS.index(operation)
                order_R4[row, position], amounts_R4[row, place] = place, amount
        return cls(
            boxes_R4=np.array([crop[:4] for crop in crops], np.int64).reshape(-1, 4),
            flip_R=np.array([crop.flip for crop in crops], np.bool_),
            order_R4=order_R4,
            amounts_R4=amounts_R4,
            grayscale_R=np.array([crop.grayscale for crop in crops], np.bool_),
            sigma_R=np.array([crop.sigma for crop in crops], np.float64),
            solarize_R=np.array([crop.solarize for crop in crops], np.bool_),
        )

    def rows(self, rows: npt.NDArray[np.int64]) -> "ParameterArrays":
        """The parameters of some of the crops."""
        return ParameterArrays(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def image_generator(seed: int, epoch: int, image_index: int) -> np.random.Generator:
    """The generator of one image in one epoch. Philox streams of different keys are independent (Salmon et al. 2011)."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, 0x63726F70], dtype=np.uint64)
    counter = np.array([0, 0, epoch, image_index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def sample_parameters(image_hw: tuple[int, int], config: CropsConfig, rng: np.random.Generator) -> list[CropParameters]:
    """Draw the parameters of the two global crops, then of the local crops."""
    draws = rng.random((NUM_GLOBAL_CROPS + config.local_crops_number, _DRAWS)).tolist()
    blur = BLUR_PROBABILITIES[config.blur]
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    crops = []
    for number, values in enumerate(draws):
        is_global = number < NUM_GLOBAL_CROPS
        scale = config.global_crops_scale if is_global else config.local_crops_scale
        size = config.global_crops_size if is_global else config.local_crops_size
        flip, jitter, *factors, order, gray, blurred, sigma, solarize = values[_BOX_DRAWS:]
        crops.append(
            CropParameters(
                *_crop_box(image_hw, scale, values),
                size,
                flip < config.horizontal_flip_probability,
                _jitter(strengths, factors, order) if jitter < config.color_jitter_probability else (),
                gray < config.grayscale_probability,
                _LEAST_SIGMA + sigma * (_MOST_SIGMA - _LEAST_SIGMA) if blurred < blur[min(number, NUM_GLOBAL_CROPS)] else 0.0,
                number == 1 and solarize < config.solarize_probability,
            )
        )
    return crops


def _crop_box(image_hw: tuple[int, int], scale: tuple[float, float], draws: list[float]) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: the first of ten tries (area, aspect ratio) that fits, else `fallback_box`."""
    image_h, image_w = image_hw
    smallest, area_range = image_h * image_w * scale[0], image_h * image_w * (scale[1] - scale[0])
    for number in range(0, 2 * _CROP_TRIES, 2):
        area = smallest + draws[number] * area_range
        root = math.exp(0.5 * (_LOG_MIN + draws[number + 1] * (_LOG_MAX - _LOG_MIN)))  # of width over height
        side = math.sqrt(area)
        width, height = round(side * root), round(side / root)
        if 0 < width <= image_w and 0 < height <= image_h:
            top = int(draws[2 * _CROP_TRIES] * (image_h - height + 1))
            return top, int(draws[2 * _CROP_TRIES + 1] * (image_w - width + 1)), height, width
    return fallback_box(image_h, image_w)


def fallback_box(image_h: int, image_w: int) -> tuple[int, int, int, int]:
    """The largest centred box of a legal aspect ratio: (top, left, height, width)."""
    aspect = min(max(image_w / image_h, MIN_ASPECT_RATIO), MAX_ASPECT_RATIO)
    width = min(image_w, max(1, round(image_h * aspect)))
    height = min(image_h, max(1, round(image_w / aspect)))
    return (image_h - height) // 2, (image_w - width) // 2, height, width


def _jitter(strengths: tuple[float, ...], factors: list[float], order: float) -> tuple[tuple[str, float], ...]:
    """The four colour operations with their amounts, in a random order; operations of strength 0 are left out."""
    operations = [
        (name, middle + strength * (2.0 * factor - 1.0)) if strength > 0.0 else None
        for name, middle, strength, factor in zip(JITTER_OPERATIONS, _MIDDLES, strengths, factors, strict=True)
    ]
    return tuple([operation for place in _ORDERS[int(order * 24)] if (operation := operations[place]) is not None])


def draw_parameters_batch(
    images_hw: Sequence[tuple[int, int]], config: CropsConfig, rng_keys: Sequence[tuple[int, int, int]]
) -> "ParameterArrays":
    """Draw the parameters of B images, the same ones that `sample_parameters` draws for each key, as arrays.

    images_hw: height and width of each image in pixels. rng_keys: B times (seed, epoch, image index). Rows are crop-major:
    crop 0 of every image, then crop 1 of every image; row `crop * B + image`.
    """
    images = [
        sample_parameters(image_hw, config, image_generator(*key)) for image_hw, key in zip(images_hw, rng_keys, strict=True)
    ]
    return ParameterArrays.of([crop for crops in zip(*images, strict=True) for crop in crops])
