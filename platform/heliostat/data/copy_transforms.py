"""What the web does to a picture: changes of its pixels and of its container, one function each.

A transform is a pure function `(image, rng) -> Encoded`: the codec is a part of it. The same image and generator state give the
same bytes under the same version of OpenCV. Parameters are drawn uniformly from the ranges in the docstrings; they are
assumptions about what people do to pictures, of the kinds that the literature on copy detection uses (DISC21, arXiv 2106.09672;
Copydays; AugLy, arXiv 2201.06494), not a sample of the web.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from heliostat.data.copy_overlays import Pixels, with_logos, with_text
from heliostat.errors import DataError

MIN_SIDE_PIXELS = 48
JPEG_QUALITY = (80, 95)  # of copies whose change is another one than compression


@dataclass(frozen=True)
class Encoded:
    """A picture as a file: its bytes and the suffix with its dot, such as ".jpg"."""

    data: bytes
    suffix: str


Transform = Callable[[Pixels, np.random.Generator], Encoded]
Change = Callable[[Pixels, np.random.Generator], Pixels]


def encode(image: Pixels, suffix: Literal[".png", ".jpg", ".webp"] = ".png", quality: int = 90) -> Encoded:
    """Encode (height, width, 3) uint8 RGB; quality 0 to 100 counts for jpeg and webp."""
    option = {".jpg": [cv2.IMWRITE_JPEG_QUALITY, quality], ".webp": [cv2.IMWRITE_WEBP_QUALITY, quality], ".png": []}[suffix]
    _, data = cv2.imencode(suffix, cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR), option)
    return Encoded(data.tobytes(), suffix)


def _checked(image: Pixels) -> Pixels:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < MIN_SIDE_PIXELS:
        raise DataError(
            f"a picture of {image.shape} {image.dtype} cannot be planted; give (height, width, 3) uint8 of "
            f"{MIN_SIDE_PIXELS} pixels a side and more"
        )
    return image


def saved(change: Change) -> Transform:
    """The change, then a JPEG of quality 80 to 95."""

    def transform(image: Pixels, rng: np.random.Generator) -> Encoded:
        changed = change(_checked(image), rng)
        return encode(changed, ".jpg", int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1)))

    transform.__doc__ = change.__doc__
    return transform


def identical(image: Pixels, rng: np.random.Generator) -> Encoded:
    """The same bytes again: the picture as `encode` writes it without options."""
    del rng
    return encode(_checked(image))


def reencode(image: Pixels, rng: np.random.Generator) -> Encoded:
    """The same pixels in another container: JPEG of quality 30 to 90, or WebP of quality 40 to 95 (one in three)."""
    if rng.random() < 1 / 3:
        return encode(_checked(image), ".webp", int(rng.integers(40, 96)))
    return encode(_checked(image), ".jpg", int(rng.integers(30, 91)))


def _scaled(image: Pixels, height: int, width: int) -> Pixels:
    smaller = height * width < image.shape[0] * image.shape[1]
    return np.asarray(
        cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC), np.uint8
    )


def resized(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Both sides times 0.5 to 1.5."""
    factor = rng.uniform(0.5, 1.5)
    return _scaled(image, *(max(1, round(side * factor)) for side in image.shape[:2]))


def stretched(image: Pixels, rng: np.random.Generator) -> Pixels:
    """One side times 0.7 to 0.9 or 1.1 to 1.4."""
    factor = rng.uniform(0.7, 0.9) if rng.random() < 0.5 else rng.uniform(1.1, 1.4)
    height, width = image.shape[:2]
    return (
        _scaled(image, round(height * factor), width) if rng.random() < 0.5 else _scaled(image, height, round(width * factor))
    )


def cropped(kept_area_ratio: float) -> Change:
    """The change that keeps a rectangle of this share of the area, anywhere, its sides within a third of the same share."""

    def crop(image: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = image.shape[:2]
        part = rng.uniform(1 / 3, 2 / 3)
        rows = round(height * kept_area_ratio**part)
        columns = min(width, round(kept_area_ratio * height * width / rows))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        return image[top : top + rows, left : left + columns]

    crop.__doc__ = f"A rectangle of {round(100 * kept_area_ratio)} % of the area, anywhere."
    return crop


def flipped(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Left and right exchanged."""
    del rng
    return image[:, ::-1]


def rotated(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Turned by 2 to 15 degrees either way; corners black, white, or cut away with the rest of the margin."""
    height, width = image.shape[:2]
    angle = rng.uniform(2, 15) * (1 if rng.random() < 0.5 else -1)
    corners = int(rng.integers(3))
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
    border = (255, 255, 255) if corners == 1 else (0, 0, 0)
    turned = np.asarray(cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_CUBIC, borderValue=border), np.uint8)
    if corners < 2:
        return turned
    sine, cosine = np.sin(np.radians(abs(angle))), np.cos(np.radians(angle))
    # The largest rectangle of the same proportions that lies inside the turned one.
    factor = min(width / (width * cosine + height * sine), height / (height * cosine + width * sine))
    rows, columns = int(height * factor) - 2, int(width * factor) - 2  # two pixels for the interpolation at the corners
    top, left = (height - rows) // 2, (width - columns) // 2
    return turned[top : top + rows, left : left + columns]


def rotated_90(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Turned by a quarter either way."""
    return np.rot90(image, 1 if rng.random() < 0.5 else 3)


def padded(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A border of 5 to 20 % of each side, all around or on two opposite sides; black, white, or the picture itself, blurred."""
    height, width = image.shape[:2]
    ratio, where, kind = rng.uniform(0.05, 0.20), int(rng.integers(3)), int(rng.integers(3))
    rows = 0 if where == 1 else max(1, round(ratio * height))
    columns = 0 if where == 2 else max(1, round(ratio * width))
    size = (height + 2 * rows, width + 2 * columns)
    if kind == 2:
        framed = cv2.GaussianBlur(_scaled(image, *size), (0, 0), 0.08 * max(size))
    else:
        framed = np.full((*size, 3), 255 * kind, np.uint8)
    framed[rows : rows + height, columns : columns + width] = image
    return np.asarray(framed, np.uint8)


def blurred(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A Gaussian of 0.5 to 1.5 % of the shorter side, at least 0.6 pixels."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), max(0.6, rng.uniform(0.005, 0.015) * min(image.shape[:2]))), np.uint8)


def recoloured(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness times 0.7 to 1.35, contrast and saturation times 0.7 to 1.4, hue turned by up to 18 of 360 degrees.

    A variant in other colours is a copy: its pixels come from the same shot.
    """
    pixels = image.astype(np.float32) * rng.uniform(0.7, 1.35)
    mean = float(pixels.mean())
    pixels = np.clip((pixels - mean) * rng.uniform(0.7, 1.4) + mean, 0, 255) / 255
    hue_saturation_value = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hue_saturation_value[..., 0] = (hue_saturation_value[..., 0] + rng.uniform(-18, 18)) % 360
    hue_saturation_value[..., 1] = np.clip(hue_saturation_value[..., 1] * rng.uniform(0.7, 1.4), 0, 1)
    return np.asarray(np.round(255 * np.clip(cv2.cvtColor(hue_saturation_value, cv2.COLOR_HSV2RGB), 0, 1)), np.uint8)


def greyed(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Luminance in three equal channels."""
    del rng
    return np.asarray(cv2.cvtColor(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), np.uint8)


def made_noisy(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Independent normal noise of 4 to 16 levels of 255 on every channel."""
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(4, 16))
    return np.asarray(np.clip(np.round(image + noise), 0, 255), np.uint8)


_CHAINED: tuple[Change, ...] = (
    resized, stretched, cropped(0.8), flipped, rotated, padded, blurred, recoloured, greyed, made_noisy, with_text, with_logos,
)  # fmt: skip


def chained(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Three different changes in a row, none of them a quarter turn, a screenshot or a collage; crops keep 80 %."""
    for number in rng.permutation(len(_CHAINED))[:3].tolist():
        image = np.ascontiguousarray(_CHAINED[number](image, rng))
    return image
