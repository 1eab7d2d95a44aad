"""Planted copies: twenty kinds by name, and the tiles of the demo's photographs that they are made of.

The kinds and their parameters are those of `copy_transforms`, described for readers in docs/concepts/planted_copies.md.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from heliostat.data import copy_transforms as change
from heliostat.data.copy_overlays import Pixels, in_collage, in_screenshot, with_logos, with_text
from heliostat.data.copy_transforms import Encoded, Transform, saved
from heliostat.data.photographs import PHOTOGRAPH_NAMES, REGIONS, PhotographCrop, Region, photograph
from heliostat.errors import DataError

TEXTURES = frozenset({"brick", "grass", "gravel"})
"""Photographs of one surface each: all their tiles look alike, and none is a copy of another."""

TILE_SIDE_PIXELS = (112, 200)
TILES_PER_PHOTOGRAPH = 16  # the side shrinks, down to 112 pixels, until a photograph gives as many
MIN_DEVIATION = 4.0  # levels of 255 of luminance; flatter tiles (sky, the black around a retina) say nothing


TRANSFORMS: Mapping[str, Transform] = MappingProxyType(
    {
        "identical": change.identical,
        "reencode": change.reencode,
        "resize": saved(change.resized),
        "crop_95": saved(change.cropped(0.95)),
        "crop_80": saved(change.cropped(0.80)),
        "crop_60": saved(change.cropped(0.60)),
        "flip": saved(change.flipped),
        "rotate": saved(change.rotated),
        "rotate_90": saved(change.rotated_90),
        "pad": saved(change.padded),
        "blur": saved(change.blurred),
        "colour": saved(change.recoloured),
        "grey": saved(change.greyed),
        "noise": saved(change.made_noisy),
        "text_overlay": saved(with_text),
        "logo_overlay": saved(with_logos),
        "screenshot_frame": saved(in_screenshot),
        "aspect": saved(change.stretched),
        "collage": saved(in_collage),
        "chain_of_three": saved(change.chained),
    }
)
"""Kind -> transform, in the order of the tables."""

REPORT_ONLY = frozenset({"collage"})
"""Kinds that are measured but belong to no total: half of the picture is another one."""

EASY = ("identical", "reencode", "resize")
"""Kinds of which at least 99 % have to be found."""


def planted_copy(image: Pixels, kind: str, *, seed: int, number: int) -> Encoded:
    """The copy of one picture under one kind; depends on nothing but its arguments, never on what was drawn before.

    number: of the picture among those that are planted. DataError for an unknown kind or a picture below 48 pixels a side.
    """
    if kind not in TRANSFORMS:
        raise DataError(f"no transform {kind!r}; there are {', '.join(TRANSFORMS)}")
    return TRANSFORMS[kind](image, np.random.default_rng((seed, number, list(TRANSFORMS).index(kind))))


def planted_tiles(region: Region | None = "left", *, min_deviation: float = MIN_DEVIATION) -> list[PhotographCrop]:
    """All tiles of a region, 135 of the left halves, photograph by photograph, row by row; touching, never overlapping.

    region: as in REGIONS; None takes whole photographs. Sides lie between 112 and 200 pixels.
    min_deviation: standard deviation of the luminance below which a tile is left out.
    """
    tiles = []
    for label, name in enumerate(PHOTOGRAPH_NAMES):
        image = photograph(name)
        first, last = (round(ratio * image.shape[1]) for ratio in (REGIONS[region] if region else (0.0, 1.0)))
        for left, top, pixels in grid_tiles(image[:, first:last], min_deviation=min_deviation):
            tiles.append(PhotographCrop(name, label, pixels, first + left, top))
    return tiles


def grid_tiles(image: Pixels, *, min_deviation: float = MIN_DEVIATION) -> list[tuple[int, int, Pixels]]:
    """Squares of one picture as (left, top, pixels): the largest side from 200 down to 112 that gives 16, or else of 112.

    Raises DataError for a picture that is smaller than one tile.
    """
    height, width = image.shape[:2]
    smallest, largest = TILE_SIDE_PIXELS
    if min(height, width) < smallest:
        raise DataError(f"a picture of {height} x {width} pixels gives no tile of {smallest} pixels; leave it out")
    sides = range(min(largest, height, width), smallest - 1, -1)
    side = next((side for side in sides if (height // side) * (width // side) >= TILES_PER_PHOTOGRAPH), smallest)
    places = [(left, top) for top in range(0, height - side + 1, side) for left in range(0, width - side + 1, side)]
    cut = [(left, top, image[top : top + side, left : left + side]) for left, top in places]
    return [(left, top, pixels) for left, top, pixels in cut if _deviation(pixels) >= min_deviation]


def _deviation(pixels: Pixels) -> float:
    return float(np.std(pixels @ np.array([0.299, 0.587, 0.114])))
