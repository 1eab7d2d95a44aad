"""Edits as people make them on the way of a picture through the web: what a copy embedder learns to look through.

Each edit takes an image (H, W, 3) uint8 RGB and a random generator and gives another such image. `edited` chains several. The
ranges are those of the training; evaluation uses its own edits with other parameters (data/planted_copies.py).
"""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Edit = Callable[[Pixels, np.random.Generator], Pixels]

_BORDERS = (cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT_101, cv2.BORDER_REPLICATE)
_FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX)
_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz     ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?")
_MIN_SIDE_PIXELS = 12
_MAX_SIDE_PIXELS = 192


def random_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Black, white, or any colour, a third of the time each."""
    kind = rng.integers(3)
    values = rng.integers(0, 256, 3) if kind == 2 else np.full(3, 255 * kind)
    return int(values[0]), int(values[1]), int(values[2])


def random_text(rng: np.random.Generator, length: int) -> str:
    """Letters, digits and blanks."""
    return "".join(_LETTERS[index] for index in rng.integers(0, len(_LETTERS), length))


def write_line(image: Pixels, text: str, origin: tuple[int, int], height: float, rng: np.random.Generator) -> None:
    """Draw a line of text into the image, letters about `height` pixels tall, its foot at origin (x, y)."""
    font = int(_FONTS[rng.integers(len(_FONTS))])
    thickness = max(1, round(height / rng.uniform(6, 14)))
    cv2.putText(image, text, origin, font, height / 22.0, random_colour(rng), thickness, cv2.LINE_AA)


def crop(image: Pixels, rng: np.random.Generator, area: tuple[float, float] = (0.3, 0.95)) -> Pixels:
    """Keep a rectangle of a share of the area, of nearly the same aspect ratio."""
    height, width = image.shape[:2]
    side = np.sqrt(rng.uniform(*area))
    aspect = np.exp(rng.uniform(-0.2, 0.2))
    new_height = int(np.clip(round(height * side * aspect), min(height, _MIN_SIDE_PIXELS), height))
    new_width = int(np.clip(round(width * side / aspect), min(width, _MIN_SIDE_PIXELS), width))
    top, left = int(rng.integers(height - new_height + 1)), int(rng.integers(width - new_width + 1))
    return image[top : top + new_height, left : left + new_width]


def flip(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Mirror left and right."""
    return image[:, ::-1]


def rotate(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn by up to 30 degrees, within the frame or zoomed until no border shows."""
    height, width = image.shape[:2]
    angle = rng.uniform(-30, 30)
    sine, cosine = abs(np.sin(np.deg2rad(angle))), abs(np.cos(np.deg2rad(angle)))
    zoom = max(cosine + sine * height / width, cosine + sine * width / height) if rng.random() < 0.5 else rng.uniform(0.8, 1.0)
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, zoom)
    border = int(_BORDERS[rng.integers(len(_BORDERS))])
    turned = cv2.warpAffine(
        np.ascontiguousarray(image), matrix, (width, height), borderMode=border, borderValue=random_colour(rng)
    )
    return np.asarray(turned, np.uint8)


def quarter_turn(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn by 90, 180 or 270 degrees."""
    return np.rot90(image, int(rng.integers(1, 4)))


def pad(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Add borders of up to 30 % of the side: one colour, or the image itself blurred."""
    height, width = image.shape[:2]
    top, bottom = (int(value * height) for value in rng.uniform(0, 0.3, 2) * (rng.random(2) < 0.7))
    left, right = (int(value * width) for value in rng.uniform(0, 0.3, 2) * (rng.random(2) < 0.7))
    size = width + left + right, height + top + bottom
    if rng.random() < 0.3:
        canvas = cv2.blur(cv2.resize(image, size), (15, 15))
    else:
        canvas = np.empty((size[1], size[0], 3), np.uint8)
        canvas[:] = random_colour(rng)
    canvas[top : top + height, left : left + width] = image
    return np.asarray(canvas, np.uint8)


def blur(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Gaussian blur, a deviation of up to 2 % of the side."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 0.3 + rng.uniform(0, 0.02) * min(image.shape[:2])), np.uint8)


def noise(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Gaussian noise of a deviation of up to 20 grey levels."""
    grain = rng.standard_normal(image.shape, np.float32) * rng.uniform(3, 20)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def recolour(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Gain, gamma and offset of the light, gain of each channel, saturation: one table and one mixing matrix."""
    levels = np.arange(256, dtype=np.float32) / 255.0
    table = levels ** np.exp(rng.uniform(-0.5, 0.5)) * np.exp(rng.uniform(-0.5, 0.4)) + rng.uniform(-0.15, 0.15)
    saturation = 0.0 if rng.random() < 0.25 else rng.uniform(0.3, 1.8)
    mixing = saturation * np.eye(3) + (1 - saturation) * np.array([[0.299, 0.587, 0.114]] * 3)
    mixing = np.exp(rng.uniform(-0.2, 0.2, (3, 1))) * mixing
    shifted = cv2.LUT(np.ascontiguousarray(image), np.clip(table * 255.0, 0, 255).astype(np.uint8))
    return np.asarray(cv2.transform(shifted, mixing.astype(np.float32)), np.uint8)


def posterise(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Few grey levels, or inverted edges of light: a filter of a picture app."""
    step = int(rng.integers(24, 72))
    return (image // step * step + step // 2).clip(0, 255).astype(np.uint8)


def write_text(image: Pixels, rng: np.random.Generator) -> Pixels:
    """One to four lines of text over the picture, sometimes on a bar of colour."""
    image = np.array(image)
    height, width = image.shape[:2]
    for _ in range(rng.integers(1, 5)):
        letter = rng.uniform(0.05, 0.16) * height
        x, y = int(rng.uniform(-0.05, 0.5) * width), int(rng.uniform(0.1, 1.0) * height)
        if rng.random() < 0.25:
            cv2.rectangle(image, (0, int(y - 1.2 * letter)), (width, int(y + 0.3 * letter)), random_colour(rng), -1)
        write_line(image, random_text(rng, int(rng.integers(3, 24))), (x, y), letter, rng)
    return image


def stick_faces(image: Pixels, rng: np.random.Generator) -> Pixels:
    """One to three round faces, stars or labels of 10 to 40 % of the side on the picture."""
    image = np.array(image)
    height, width = image.shape[:2]
    for _ in range(rng.integers(1, 4)):
        radius = max(3, int(rng.uniform(0.05, 0.2) * min(height, width)))
        x, y = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        if rng.random() < 0.3:
            cv2.rectangle(image, (x - radius, y - radius // 2), (x + radius, y + radius // 2), random_colour(rng), -1)
            continue
        cv2.circle(image, (x, y), radius, (255, int(rng.integers(120, 230)), 40), -1, cv2.LINE_AA)
        for side in (-1, 1):
            cv2.circle(image, (x + side * radius // 3, y - radius // 4), max(1, radius // 7), (40, 30, 20), -1, cv2.LINE_AA)
        cv2.ellipse(image, (x, y + radius // 8), (radius // 2, radius // 2), 0, 20, 160, (40, 30, 20), max(1, radius // 8))
    return image


def frame_as_screenshot(image: Pixels, rng: np.random.Generator) -> Pixels:
    """The picture inside a window: bars with lines of text above and below, margins at the sides."""
    height, width = image.shape[:2]
    top, bottom = (int(value * height) for value in rng.uniform(0.05, 0.4, 2))
    left, right = (int(value * width) for value in rng.uniform(0.0, 0.15, 2))
    canvas = np.empty((height + top + bottom, width + left + right, 3), np.uint8)
    canvas[:] = rng.choice([np.full(3, 250), np.full(3, 25), rng.integers(0, 256, 3)])
    for first, size in ((0, top), (top + height, bottom)):
        for line in range(int(rng.integers(0, 4))):
            foot = first + int((line + 1) * size / 4)
            write_line(canvas, random_text(rng, int(rng.integers(4, 30))), (int(0.04 * width), foot), max(3.0, size / 5), rng)
        for _ in range(rng.integers(0, 4)):
            centre = int(rng.uniform(0, canvas.shape[1])), int(first + size * rng.uniform(0.2, 0.8))
            cv2.circle(canvas, centre, max(2, size // 5), random_colour(rng), -1, cv2.LINE_AA)
    canvas[top : top + height, left : left + width] = image
    return canvas


def encode(image: Pixels, rng: np.random.Generator) -> Pixels:
    """JPEG of quality 10 to 95."""
    options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(10, 96))]
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, options)[1], cv2.IMREAD_COLOR), np.uint8)


def resample(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Shrink to 20 to 90 % with any filter; it stays small."""
    scale = rng.uniform(0.2, 0.9)
    height, width = (max(_MIN_SIDE_PIXELS, round(side * scale)) for side in image.shape[:2])
    filters = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_NEAREST)
    return np.asarray(cv2.resize(image, (width, height), interpolation=int(filters[rng.integers(4)])), np.uint8)


GEOMETRY: tuple[tuple[Edit, float], ...] = (
    (crop, 0.34),
    (rotate, 0.18),
    (quarter_turn, 0.1),
    (pad, 0.16),
    (frame_as_screenshot, 0.14),
)
OVERLAYS: tuple[tuple[Edit, float], ...] = ((write_text, 0.22), (stick_faces, 0.15))
LIGHT: tuple[tuple[Edit, float], ...] = ((recolour, 0.4), (blur, 0.15), (noise, 0.1), (posterise, 0.03))
FILE: tuple[tuple[Edit, float], ...] = ((resample, 0.25), (encode, 0.4))


def edited(image: Pixels, rng: np.random.Generator, strength: float = 1.0) -> Pixels:
    """A copy of the image after a random chain of edits; `strength` 0 to 1 scales the probability of each edit.

    Mirrored half of the time. Geometry, overlays and light come in random order, resampling and encoding last.
    """
    if max(image.shape[:2]) > _MAX_SIDE_PIXELS:
        scale = _MAX_SIDE_PIXELS / max(image.shape[:2])
        size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    if rng.random() < 0.5:
        image = flip(image, rng)
    chosen = [edit for edit, probability in (*GEOMETRY, *OVERLAYS, *LIGHT) if rng.random() < probability * strength]
    chosen = [chosen[index] for index in rng.permutation(len(chosen))]
    chosen += [edit for edit, probability in FILE if rng.random() < probability * strength]
    for edit in chosen:
        image = np.ascontiguousarray(edit(np.ascontiguousarray(image), rng))
    return image
