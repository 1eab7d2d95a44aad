"""Every transform is a pure function of picture and generator, keeps what it says it keeps, and writes files that decode."""

import cv2
import numpy as np
import pytest

from heliostat.data import copy_overlays, copy_transforms
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.image_header import probe
from heliostat.data.planted_copies import EASY, REPORT_ONLY, TRANSFORMS, planted_copy
from heliostat.errors import DataError


def picture(height: int = 120, width: int = 160, seed: int = 0) -> np.ndarray:
    return copy_overlays.drawn_picture(height, width, np.random.default_rng(seed))


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng((7, number)) for number in range(count)]


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("size", [(48, 48), (50, 171), (300, 200)])
def test_a_transform_is_deterministic_leaves_its_input_alone_and_decodes(kind: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    before = image.copy()
    for number in range(6):
        copy = planted_copy(image, kind, seed=3, number=number)
        assert copy == planted_copy(image, kind, seed=3, number=number)
        assert (image == before).all()
        decoded = decode(copy.data, DecodeConfig())
        assert decoded.shape[2] == 3
        assert min(decoded.shape[:2]) >= 18
        assert copy.suffix in {".png", ".jpg", ".webp"}


@pytest.mark.parametrize("kind", sorted(set(TRANSFORMS) - {"identical", "flip", "grey"}))
def test_seed_and_number_change_what_is_drawn(kind: str) -> None:
    image = picture()
    copies = {planted_copy(image, kind, seed=seed, number=number).data for seed in (0, 1) for number in range(8)}
    assert len(copies) >= 8


def test_there_are_twenty_kinds_and_the_named_groups_are_among_them() -> None:
    assert len(TRANSFORMS) == 20
    assert set(EASY) | REPORT_ONLY < set(TRANSFORMS)
    for transform in TRANSFORMS.values():
        assert transform.__doc__


def test_identical_is_the_file_that_the_original_is_written_as() -> None:
    image = picture()
    assert planted_copy(image, "identical", seed=0, number=5) == copy_transforms.encode(image)
    assert (decode(copy_transforms.encode(image).data, DecodeConfig()) == image).all()


def test_reencoding_changes_the_container_and_little_else() -> None:
    image = picture()
    formats = set()
    for rng in generators(20):
        copy = copy_transforms.reencode(image, rng)
        formats.add(probe(copy.data).format)
        assert np.abs(decode(copy.data, DecodeConfig()).astype(int) - image).mean() < 8
    assert formats == {"jpeg", "webp"}


@pytest.mark.parametrize("ratio", [0.95, 0.80, 0.60])
@pytest.mark.parametrize("size", [(48, 48), (120, 160), (400, 210)])
def test_a_crop_keeps_its_share_of_the_area_and_is_cut_from_the_picture(ratio: float, size: tuple[int, int]) -> None:
    image = np.arange(size[0] * size[1], dtype=np.int64).reshape(size)
    coded = np.stack([image % 256, image // 256 % 256, image // 65536], axis=-1).astype(np.uint8)  # every pixel is unique
    for rng in generators(25):
        cut = copy_transforms.cropped(ratio)(coded, rng)
        assert cut.shape[0] * cut.shape[1] / (size[0] * size[1]) == pytest.approx(ratio, abs=0.02)
        top, left = divmod(int(cut[0, 0] @ np.array([1, 256, 65536])), size[1])
        assert (cut == coded[top : top + cut.shape[0], left : left + cut.shape[1]]).all()


def test_flips_and_quarter_turns_move_pixels_and_lose_none() -> None:
    image = picture()
    assert (copy_transforms.flipped(copy_transforms.flipped(image, generators(1)[0]), generators(1)[0]) == image).all()
    turned = {copy_transforms.rotated_90(image, rng).tobytes() for rng in generators(12)}
    assert turned == {np.rot90(image, 1).tobytes(), np.rot90(image, 3).tobytes()}


def test_padding_surrounds_the_untouched_picture() -> None:
    image = picture(100, 140)
    grounds = set()
    for rng in generators(40):
        framed = copy_transforms.padded(image, rng)
        rows, columns = (framed.shape[0] - 100) // 2, (framed.shape[1] - 140) // 2
        assert (framed[rows : rows + 100, columns : columns + 140] == image).all()
        assert max(rows / 100, columns / 140) == pytest.approx(0.125, abs=0.08)
        corner = framed[0, 0].tolist()
        grounds.add({0: "black", 765: "white"}.get(sum(corner), "picture"))
    assert grounds == {"black", "white", "picture"}


def test_a_rotated_picture_without_corners_holds_only_pixels_of_the_picture() -> None:
    white = np.full((90, 130, 3), 255, np.uint8)
    shapes = set()
    for rng in generators(40):
        turned = copy_transforms.rotated(white, rng)
        if turned.shape != white.shape:  # corners cut away
            shapes.add(turned.shape)
            assert turned.min() >= 250
            assert turned.shape[0] / turned.shape[1] == pytest.approx(90 / 130, rel=0.05)
    assert len(shapes) >= 5


def test_grey_has_three_equal_channels_and_the_luminance_of_the_picture() -> None:
    image = picture()
    grey = copy_transforms.greyed(image, generators(1)[0])
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == grey[..., 2]).all()
    assert np.abs(grey[..., 0] - image @ np.array([0.299, 0.587, 0.114])).max() <= 1


@pytest.mark.parametrize(
    ("change", "smallest", "largest"),
    [(copy_transforms.recoloured, 4, 90), (copy_transforms.blurred, 0.2, 12), (copy_transforms.made_noisy, 2, 14)],
)
def test_photometric_changes_keep_the_size_and_stay_in_bounds(change, smallest: float, largest: float) -> None:
    image = picture()
    for rng in generators(20):
        changed = change(image, rng)
        assert changed.shape == image.shape
        assert smallest < np.abs(changed.astype(int) - image).mean() < largest


@pytest.mark.parametrize(("change", "largest"), [(copy_overlays.with_text, 0.75), (copy_overlays.with_logos, 0.35)])
def test_overlays_cover_a_part_of_the_picture_and_leave_the_rest(change, largest: float) -> None:
    image = picture()
    for rng in generators(30):
        covered = (change(image, rng) != image).any(axis=-1).mean()
        assert 0.005 < covered < largest


def test_screenshots_and_collages_hold_the_whole_picture() -> None:
    image = picture()
    for change, smallest, largest in ((copy_overlays.in_screenshot, 0.4, 0.85), (copy_overlays.in_collage, 0.49, 0.75)):
        for rng in generators(15):
            framed = change(image, rng)
            # Exact position by normalised correlation, an independent way to find the picture.
            _, _, _, (left, top) = cv2.minMaxLoc(cv2.matchTemplate(framed, image, cv2.TM_CCORR_NORMED))
            assert (framed[top : top + image.shape[0], left : left + image.shape[1]] == image).all()
            assert smallest < image[..., 0].size / framed[..., 0].size < largest


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((47, 90, 3), np.uint8),
        np.zeros((90, 90), np.uint8),
        np.zeros((90, 90, 3), np.float32),
        np.zeros((0, 0, 3), np.uint8),
    ],
)
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_what_cannot_be_planted_is_refused(kind: str, image: np.ndarray) -> None:
    with pytest.raises(DataError, match="48 pixels a side"):
        planted_copy(image, kind, seed=0, number=0)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="no transform 'emboss'; there are identical, reencode"):
        planted_copy(picture(), "emboss", seed=0, number=0)
