"""The demo's pool of raw images: crops to train on, the planted-copy suite, film frames, broken files, as a crawl brings them.

`truth.json` says what was planted; curation/planted_truth.py reads it. The tiles of the left halves are dealt out by the seed:
some become the evaluation set (`write_evaluation`), which the pool holds altered copies of and nothing else, some are shown on
the template cards, the others are originals. Crops overlap tiles, so every file has its place in the photograph written down.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from heliostat.data.config import PhotographPoolConfig
from heliostat.data.copy_overlays import Pixels
from heliostat.data.copy_transforms import encode
from heliostat.data.hard_negatives import DRAWN_KINDS, drawn_negatives
from heliostat.data.photographs import VIDEO_NAMES, PhotographCrop, video_frames, write_crops, write_file
from heliostat.data.planted_copies import TEXTURES, TRANSFORMS, planted_copy, planted_tiles
from heliostat.errors import DataError

FRAMES_APART = (
    48  # two seconds: nearer frames of a film may be merged or not, these must not (looked at: other poses, other shots)
)
_VIDEO_SIDE_PIXELS = 160

Box = list[int]


def write_pool(folder: Path, config: PhotographPoolConfig) -> dict[str, Any]:
    """Write the demo's raw images below `folder`, which must be absent or empty; returns what `truth.json` there says.

    crops/<photograph>/*.png, tiles/<photograph>/*.png (originals), planted/<kind>/* (their copies), planted/exact/*.png
    (renamed crops), hard_negatives/<kind>/*.png, planted_evaluation/<kind>/* (copies of evaluation tiles), video/<film>/*.jpg,
    broken/*.
    truth.json: `planted` [file, original, kind], `evaluation` [file, reference, kind], `hard_negatives` [kind, files that must
    not be merged with each other], `boxes` and `evaluation_boxes` (file -> [photograph, left, top, side]), `video` (film ->
    files in order), `frames_apart`, `broken` (files), `labels` (file -> photograph). The same config gives the same files.
    """
    _check_empty(folder)
    rng = np.random.default_rng((config.seed, 0x706F6F6C))
    cut = write_crops(folder / "crops", "left", count=config.crops_per_photograph, seed=config.seed)
    crops = {f"crops/{file}": crop for file, crop in cut.items()}
    references, card_pictures, originals = _dealt_tiles(config)
    tiles = {f"tiles/{file}": tile for file, tile in originals.items()}
    for file, tile in tiles.items():
        write_file(folder / file, encode(tile.pixels).data)
    planted = _plant(folder / "planted", tiles, config.copies_per_kind, config.seed)
    planted += _plant_exact_duplicates(folder, list(crops), config.exact_duplicate_ratio, rng)
    evaluation = _plant(folder / "planted_evaluation", references, config.evaluation_copies_per_kind, config.seed + 1)
    negatives, card_boxes = _write_negatives(folder, card_pictures, config.hard_negatives_per_kind, rng)
    labels = {file: crop.name for file, crop in (crops | tiles).items()}
    truth = {
        "planted": planted,
        "evaluation": [{"file": copy["file"], "reference": copy["original"], "kind": copy["kind"]} for copy in evaluation],
        "hard_negatives": _groups_of_tiles(tiles) + negatives,
        "boxes": {file: _box(crop) for file, crop in (crops | tiles).items()} | card_boxes,
        "evaluation_boxes": {file: _box(tile) for file, tile in references.items()},
        "video": _write_video(folder, config.num_video_frames),
        "frames_apart": FRAMES_APART,
        "broken": _write_broken(folder, next(iter(crops.values())).pixels, config.num_broken_files, rng),
        "labels": labels
        | {copy["file"]: labels[copy["original"]] for copy in planted}
        | {copy["file"]: references[copy["original"]].name for copy in evaluation},
    }
    write_file(folder / "truth.json", json.dumps(truth, indent=1, sort_keys=True).encode())
    return truth


def write_suite(
    folder: Path, tiles: Sequence[PhotographCrop], *, seed: int, num_negatives: int = 12, per_kind: int | None = None
) -> dict[str, Any]:
    """Write the planted copies and hard negatives of any tiles and nothing else, for benchmarks; returns their truth.

    tiles: as `planted_tiles` gives them, or cut elsewhere: name and label say which tiles come from one picture. A random
    `num_negatives` of them are shown on cards, the others are originals. per_kind: copies of each kind; None makes one of every
    original. The folder must be absent or empty; the truth is written to `truth.json`, with the fields of `write_pool`.
    """
    _check_empty(folder)
    if len(tiles) <= num_negatives:
        raise DataError(f"{len(tiles)} tiles are too few for {num_negatives} cards and an original; cut more tiles")
    rng = np.random.default_rng((seed, 0x7375))
    on_cards = set(rng.choice(len(tiles), num_negatives, replace=False).tolist())
    originals = {f"tiles/{tile.name}/{number:06d}.png": tile for number, tile in enumerate(tiles) if number not in on_cards}
    for file, tile in originals.items():
        write_file(folder / file, encode(tile.pixels).data)
    planted = _plant(folder / "planted", originals, len(originals) if per_kind is None else per_kind, seed)
    cards = [tiles[number] for number in sorted(on_cards)]
    negatives, card_boxes = _write_negatives(folder, cards, num_negatives, rng)
    truth = {
        "planted": planted,
        "evaluation": [],
        "hard_negatives": _groups_of_tiles(originals) + negatives,
        "boxes": {file: _box(tile) for file, tile in originals.items()} | card_boxes,
        "evaluation_boxes": {},
        "video": {},
        "frames_apart": FRAMES_APART,
        "broken": [],
        "labels": {file: tile.name for file, tile in originals.items()}
        | {copy["file"]: originals[copy["original"]].name for copy in planted},
    }
    write_file(folder / "truth.json", json.dumps(truth, indent=1, sort_keys=True).encode())
    return truth


def write_evaluation(folder: Path, config: PhotographPoolConfig) -> dict[str, PhotographCrop]:
    """Write the evaluation tiles as `<photograph>/000017.png` below `folder`; returns them by that name.

    The pool of the same config holds copies of them, listed under `evaluation` in its truth.
    """
    references, _, _ = _dealt_tiles(config)
    for file, tile in references.items():
        write_file(folder / file, encode(tile.pixels).data)
    return references


def _dealt_tiles(
    config: PhotographPoolConfig,
) -> tuple[dict[str, PhotographCrop], list[PhotographCrop], dict[str, PhotographCrop]]:
    """Evaluation tiles by name, tiles for the cards, originals by name: no tile is in two of them."""
    tiles = planted_tiles("left")
    order = np.random.default_rng((config.seed, 0x74696C65)).permutation(len(tiles)).tolist()
    num_set_aside = config.num_evaluation_tiles + config.hard_negatives_per_kind
    if num_set_aside + config.num_tiles > len(tiles):
        raise DataError(
            f"num_tiles {config.num_tiles}, num_evaluation_tiles {config.num_evaluation_tiles} and hard_negatives_per_kind "
            f"{config.hard_negatives_per_kind} make more than the {len(tiles)} tiles that there are; lower one of them"
        )

    def named(numbers: Sequence[int]) -> dict[str, PhotographCrop]:
        return {f"{tiles[number].name}/{number:06d}.png": tiles[number] for number in sorted(numbers)}

    references = named(order[: config.num_evaluation_tiles])
    card_pictures = [tiles[number] for number in order[config.num_evaluation_tiles : num_set_aside]]
    return references, card_pictures, named(order[num_set_aside : num_set_aside + config.num_tiles])


def _check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; give a new folder for the pool")


def _box(crop: PhotographCrop) -> Box:
    return [crop.label, crop.left, crop.top, crop.pixels.shape[0]]


def _plant(folder: Path, tiles: Mapping[str, PhotographCrop], per_kind: int, seed: int) -> list[dict[str, str]]:
    """Write `per_kind` copies of every kind; the tiles take turns, across the kinds too, so that all have as many copies."""
    planted: list[dict[str, str]] = []
    files = list(tiles)
    for kind in TRANSFORMS if files else ():
        for number in range(per_kind):
            original = files[len(planted) % len(files)]
            copy = planted_copy(tiles[original].pixels, kind, seed=seed, number=len(planted))
            file = f"{kind}/{number:06d}{copy.suffix}"
            write_file(folder / file, copy.data)
            planted.append({"file": f"{folder.name}/{file}", "original": original, "kind": kind})
    return planted


def _plant_exact_duplicates(folder: Path, files: list[str], ratio: float, rng: np.random.Generator) -> list[dict[str, str]]:
    """Write the same bytes again under another name for a random share of the crops."""
    planted = []
    for number, index in enumerate(rng.permutation(len(files))[: round(ratio * len(files))].tolist()):
        file = f"planted/exact/{number:06d}.png"
        write_file(folder / file, (folder / files[index]).read_bytes())
        planted.append({"file": file, "original": files[index], "kind": "exact"})
    return planted


def _groups_of_tiles(tiles: Mapping[str, PhotographCrop]) -> list[dict[str, Any]]:
    """Per photograph its tiles, which touch and show one scene, and in textures are all of a kind."""
    by_name: dict[str, list[str]] = {}
    for file, tile in tiles.items():
        by_name.setdefault(tile.name, []).append(file)
    return [
        {"kind": "texture_tile" if name in TEXTURES else "neighbouring_tile", "files": files}
        for name, files in sorted(by_name.items())
    ]


def _write_negatives(
    folder: Path, card_pictures: Sequence[PhotographCrop], count: int, rng: np.random.Generator
) -> tuple[list[dict[str, Any]], dict[str, Box]]:
    """The drawn groups, and the places of what the cards show."""
    groups, boxes = [], {}
    for kind in DRAWN_KINDS if count else ():
        files = [f"hard_negatives/{kind}/{number:06d}.png" for number in range(count)]
        drawn = drawn_negatives(kind, count, [crop.pixels for crop in card_pictures], rng)
        for file, image in zip(files, drawn, strict=True):
            write_file(folder / file, encode(image).data)
        groups.append({"kind": kind, "files": files})
        if kind == "template_card":
            boxes = {file: _box(crop) for file, crop in zip(files, card_pictures, strict=True)}
    return groups, boxes


def _write_video(folder: Path, count: int) -> dict[str, list[str]]:
    """Write the middle square of consecutive frames, at most 160 pixels a side."""
    written: dict[str, list[str]] = {name: [] for name in VIDEO_NAMES}
    for name, frame in video_frames(count):
        height, width = frame.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square, small = frame[top : top + side, left : left + side], min(side, _VIDEO_SIDE_PIXELS)
        shrunk = np.asarray(cv2.resize(square, (small, small), interpolation=cv2.INTER_AREA), np.uint8)
        file = f"video/{name}/{len(written[name]):06d}.jpg"
        write_file(folder / file, encode(shrunk, ".jpg").data)
        written[name].append(file)
    return written


def _write_broken(folder: Path, image: Pixels, count: int, rng: np.random.Generator) -> list[str]:
    """Write files that no decoder can accept, six kinds in turn."""
    files = []
    for number in range(count):
        kinds = {
            "truncated_png": (".png", encode(image).data[: 300 + 10 * number]),
            "truncated_jpeg": (".jpg", encode(image, ".jpg").data[: 700 + 10 * number]),
            "empty": (".jpg", b""),
            "text": (".jpg", b"<html><body>404 Not Found</body></html>\n" * (1 + number)),
            "bomb": (".png", _bomb(50_000 + number)),
            "noise": (".png", rng.bytes(512 + number)),
        }
        kind = list(kinds)[number % len(kinds)]
        suffix, data = kinds[kind]
        file = f"broken/{kind}_{number:02d}{suffix}"
        write_file(folder / file, data)
        files.append(file)
    return files


def _bomb(side: int) -> bytes:
    """A valid PNG header that declares side x side pixels, with next to no data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")
