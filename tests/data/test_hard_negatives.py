"""Hard negatives share their layout and nothing else; textures and neighbours come from disjoint tiles."""

import itertools

import numpy as np
import pytest

from heliostat.data.copy_overlays import drawn_picture
from heliostat.data.hard_negatives import CARD_PIXELS, DRAWN_KINDS, drawn_negatives
from heliostat.data.photographs import REGIONS, photograph
from heliostat.data.planted_copies import TEXTURES, grid_tiles, planted_tiles
from heliostat.errors import DataError


def drawn(kind: str, seed: int = 0) -> list[np.ndarray]:
    pictures = [drawn_picture(120, 120, np.random.default_rng(number)) for number in range(10)]
    return drawn_negatives(kind, 10, pictures, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", DRAWN_KINDS)
def test_drawn_negatives_are_deterministic_of_one_size_and_all_different(kind: str) -> None:
    images = drawn(kind)
    assert len(images) == 10
    assert len({image.shape for image in images}) == 1
    for image, again in zip(images, drawn(kind), strict=True):
        assert (image == again).all()
    for one, two in itertools.combinations(images, 2):
        assert (one != two).any(axis=-1).mean() > 0.002
    assert any((image != other).any() for image, other in zip(images, drawn(kind, seed=1), strict=True))


def test_cards_share_header_and_frame_and_differ_in_picture_and_words() -> None:
    images = drawn("template_card")
    assert all(image.shape[:2] == CARD_PIXELS for image in images)
    for one, two in itertools.combinations(images, 2):
        assert (one[:33] == two[:33]).all()
        assert (one[34:166, 12:164] != two[34:166, 12:164]).any(axis=-1).mean() > 0.5
        assert (one[175:] != two[175:]).any()


def test_charts_share_title_and_axes_and_differ_in_their_data() -> None:
    images = drawn("chart")
    for one, two in itertools.combinations(images, 2):
        assert (one[:20] == two[:20]).all()
        assert (one[140:] == two[140:]).all()
        assert (one[26:138] != two[26:138]).any(axis=-1).mean() > 0.05


def test_pages_are_nearly_blank() -> None:
    for image in drawn("blank_page"):
        assert (image < 200).all(axis=-1).mean() < 0.03
        assert (image < 120).any()


def test_too_few_pictures_and_unknown_kinds_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="3 cards need as many pictures and there are 0"):
        drawn_negatives("template_card", 3, [], rng)
    with pytest.raises(DataError, match="no drawn hard negative 'slide'"):
        drawn_negatives("slide", 3, [], rng)


@pytest.mark.parametrize("region", ["left", "right", None])
def test_tiles_of_a_region_share_no_pixel_and_stay_inside(region) -> None:
    tiles = planted_tiles(region)
    assert len(tiles) >= (130 if region else 270)
    taken: dict[str, np.ndarray] = {}
    for tile in tiles:
        image, side = photograph(tile.name), tile.pixels.shape[0]
        first, last = REGIONS[region] if region else (0.0, 1.0)
        assert round(first * image.shape[1]) <= tile.left <= round(last * image.shape[1]) - side
        assert 112 <= side <= 200
        assert (tile.pixels == image[tile.top : tile.top + side, tile.left : tile.left + side]).all()
        mask = taken.setdefault(tile.name, np.zeros(image.shape[:2], np.bool_))
        assert not mask[tile.top : tile.top + side, tile.left : tile.left + side].any()
        mask[tile.top : tile.top + side, tile.left : tile.left + side] = True


def test_neighbouring_tiles_touch_and_every_texture_gives_several() -> None:
    tiles = planted_tiles()
    for name in TEXTURES:
        assert sum(tile.name == name for tile in tiles) >= 6
    places = {(tile.name, tile.left, tile.top) for tile in tiles}
    touching = [tile for tile in tiles if (tile.name, tile.left + tile.pixels.shape[1], tile.top) in places]
    assert len(touching) >= 40


def test_flat_tiles_are_left_out_and_small_pictures_are_refused() -> None:
    flat = np.full((400, 400, 3), 90, np.uint8)
    assert grid_tiles(flat) == []
    assert len(grid_tiles(flat, min_deviation=0.0)) == 9
    with pytest.raises(DataError, match="80 x 300 pixels gives no tile of 112"):
        grid_tiles(np.zeros((80, 300, 3), np.uint8))
