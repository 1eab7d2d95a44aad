"""PCA hash: the same numbers as a slow computation in whole numbers, equal for copies, and files that are refused."""

import math

import cv2
import numpy as np
import pytest

from heliostat.curation.pca_hash import (
    COARSE_STEPS,
    HashColumns,
    PcaHash,
    contrast_of,
    fit_pca_hash,
    thumbnail_of,
)
from heliostat.data.photographs import crops, photographs
from heliostat.errors import DataError


@pytest.fixture(scope="module")
def shipped() -> PcaHash:
    return PcaHash.load()


@pytest.fixture(scope="module")
def thumbnails() -> np.ndarray:
    return np.stack([thumbnail_of(crop.pixels) for crop in crops("right", count=12, seed=0)])


def slow_hash(fitted: PcaHash, thumbnail: np.ndarray) -> tuple[int, list[int]]:
    """Python's whole numbers, one pixel at a time."""
    levels = [round(float(value) * 256) for value in thumbnail.ravel()]
    mean = sum(levels) / 1024
    deviation = math.sqrt(sum(level * level for level in levels) / 1024 - mean * mean)
    pixels = [max(-2048, min(2048, round((level - mean) * 256 / deviation))) for level in levels]
    code, coarse = 0, []
    for number, component in enumerate(fitted.components.tolist()):
        value = sum(weight * pixel for weight, pixel in zip(component, pixels, strict=True)) - int(fitted.offset[number])
        code |= (value > 0) << number
        if number < 16:
            coarse.append(max(-127, min(127, round(value / float(fitted.deviation[number]) * COARSE_STEPS))))
    return code, coarse


def rows(columns: HashColumns) -> list[bytes]:
    return [columns.code.tobytes(), columns.coarse.tobytes(), columns.contrast.tobytes()]


def test_the_thumbnail_is_the_grey_average_of_equal_areas():
    image = np.random.default_rng(0).integers(0, 256, (128, 64, 3), np.uint8)
    areas = image.reshape(32, 4, 32, 2, 3).mean(axis=(1, 3))
    slow = areas @ [77 / 256, 150 / 256, 29 / 256]
    found = thumbnail_of(image)
    assert found.shape == (32, 32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow, atol=0.51)  # each colour is rounded to a whole level
    assert np.array_equal(found * 256, np.rint(found * 256))


@pytest.mark.parametrize("shape", [(1, 1, 3), (16, 16, 3), (7, 900, 3), (900, 7, 3)])
def test_any_size_of_image_has_a_thumbnail(shape, shipped):
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    assert shipped.hash(thumbnail_of(image)[None]).coarse.shape == (1, 16)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_rgb_image_is_refused(image):
    with pytest.raises(DataError, match="uint8 RGB"):
        thumbnail_of(image)


def test_hashes_equal_a_slow_computation_in_whole_numbers(shipped, thumbnails):
    columns = shipped.hash(thumbnails[:6])
    for row, thumbnail in enumerate(thumbnails[:6]):
        code, coarse = slow_hash(shipped, thumbnail)
        assert int(columns.code[row]) == code
        assert columns.coarse[row].tolist() == coarse


def test_a_hash_does_not_depend_on_the_batch_it_is_computed_in(shipped, thumbnails):
    together = shipped.hash(thumbnails)
    for row in range(0, len(thumbnails), 17):
        alone = shipped.hash(thumbnails[row : row + 1])
        some = HashColumns(*(getattr(together, name)[row : row + 1] for name in ("code", "coarse", "contrast")))
        assert rows(alone) == rows(some)


def test_brightness_and_contrast_change_nothing_but_the_contrast(shipped, thumbnails):
    textured = thumbnails[(contrast_of(thumbnails) > 20) & (contrast_of(thumbnails * np.float32(0.5)) > 0)]
    assert len(textured) > 50
    plain, dimmed = shipped.hash(textured), shipped.hash(textured * np.float32(0.5) + np.float32(16))
    assert np.array_equal(plain.code, dimmed.code)
    assert np.array_equal(plain.coarse, dimmed.coarse)
    np.testing.assert_allclose(dimmed.contrast, plain.contrast / 2, rtol=1e-5)


def test_smooth_gradients_and_blank_images_have_no_contrast(shipped):
    y, x = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 32), indexing="ij")
    smooth = np.stack([np.full((32, 32), 90.0), 128 + 60 * y, 128 + 40 * x * y - 30 * x**2 + 20 * y]).astype(np.float32)
    assert shipped.hash(smooth).contrast.max() < 0.01
    chess = (128 + 50 * ((np.indices((32, 32)) // 4).sum(axis=0) % 2 * 2 - 1)).astype(np.float32)
    assert shipped.hash(chess[None]).contrast[0] == pytest.approx(50, rel=0.1)


def test_shapes_on_white_have_no_contrast_and_a_picture_with_detail_has(shipped):
    image = np.full((300, 300, 3), 255, np.uint8)
    cv2.ellipse(image, (150, 150), (110, 70), 0, 0, 360, (180, 20, 60), -1)
    assert shipped.hash(thumbnail_of(image)[None]).contrast[0] == 0
    image[60:240, 60:240] = photographs()["coffee"][60:240, 60:240]
    assert shipped.hash(thumbnail_of(image)[None]).contrast[0] > 20


def test_bits_of_photographs_are_balanced_and_mirror_images_are_others(shipped, thumbnails):
    textured = thumbnails[contrast_of(thumbnails) > 6]
    columns = shipped.hash(textured)
    bits = np.unpackbits(columns.code.view(np.uint8).reshape(-1, 8), axis=1)
    assert bits.mean(axis=0).min() > 0.2
    assert bits.mean(axis=0).max() < 0.8
    mirrored = shipped.hash(textured[:, :, ::-1])
    assert np.bitwise_count(columns.code ^ mirrored.code).min() > 4


def test_no_images_give_empty_columns(shipped):
    columns = shipped.hash(np.empty((0, 32, 32), np.float32))
    assert columns.code.shape == (0,)
    assert columns.coarse.shape == (0, 16)
    assert columns.contrast.shape == (0,)


def test_thumbnails_of_another_size_are_refused(shipped):
    with pytest.raises(DataError, match=r"\(n, 32, 32\)"):
        shipped.hash(np.zeros((2, 16, 16), np.float32))


def test_a_fit_finds_the_directions_that_the_sample_varies_in(tmp_path):
    rng = np.random.default_rng(3)
    waves = np.stack([np.outer(np.cos(np.pi * i * (np.arange(32) + 0.5) / 32), np.cos(np.pi * j * (np.arange(32) + 0.5) / 32))
                      for i in range(10) for j in range(10)][1:])  # fmt: skip
    strength = 40 / np.arange(1, 100)
    sample = 128 + np.tensordot(rng.standard_normal((3000, 99)) * strength, waves, axes=1)
    fitted = fit_pca_hash(sample.astype(np.float32))
    lengths = np.linalg.norm(fitted.components / 32767.0, axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-3)
    first = waves[0].ravel() / np.linalg.norm(waves[0])
    assert abs(fitted.components[0] / 32767.0 @ first) > 0.95
    again = fit_pca_hash(sample.astype(np.float32))
    assert again.version == fitted.version
    fitted.save(tmp_path / "a.npz")
    again.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert PcaHash.load(tmp_path / "a.npz").version == fitted.version


def test_a_sample_that_is_too_small_or_all_alike_is_refused():
    with pytest.raises(DataError, match=r"10 thumbnails are too few.*1024"):
        fit_pca_hash(np.zeros((10, 32, 32), np.float32))
    alike = np.repeat(np.random.default_rng(0).uniform(0, 255, (1, 32, 32)), 1100, axis=0).astype(np.float32)
    with pytest.raises(DataError, match="fewer than 64 directions"):
        fit_pca_hash(alike)


def test_versions_tell_fits_apart(shipped):
    changed = shipped.components.copy()
    changed[0, 0] += 1
    assert PcaHash(changed, shipped.offset, shipped.deviation).version != shipped.version
    assert len(shipped.version) == 32


def test_damaged_and_foreign_files_are_refused(tmp_path, shipped):
    good = tmp_path / "good.npz"
    shipped.save(good)
    data = good.read_bytes()
    cases = {
        "cut.npz": data[: len(data) // 2],
        "flipped.npz": data[:5000] + bytes([data[5000] ^ 255]) + data[5001:],
        "empty.npz": b"",
        "text.npz": b"not a fit",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"not a fitted PCA hash|damaged"):
            PcaHash.load(tmp_path / name)
    with pytest.raises(DataError, match="not a fitted PCA hash"):
        PcaHash.load(tmp_path / "absent.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(DataError, match="not a fitted PCA hash"):
        PcaHash.load(tmp_path / "array.npy")
    np.savez(tmp_path / "objects.npz", components=np.array([{}], object))
    with pytest.raises(DataError, match="not a fitted PCA hash"):
        PcaHash.load(tmp_path / "objects.npz")
    PcaHash(shipped.components[:32], shipped.offset, shipped.deviation).save(tmp_path / "narrow.npz")
    with pytest.raises(DataError, match="not a fitted PCA hash"):
        PcaHash.load(tmp_path / "narrow.npz")
    PcaHash(shipped.components, shipped.offset, -shipped.deviation).save(tmp_path / "negative.npz")
    with pytest.raises(DataError, match="positive"):
        PcaHash.load(tmp_path / "negative.npz")


def test_all_photographs_differ_in_many_bits(shipped):
    columns = shipped.hash(np.stack([thumbnail_of(image) for image in photographs().values()]))
    differing = np.bitwise_count(columns.code[:, None] ^ columns.code[None])
    assert differing[~np.eye(len(differing), dtype=bool)].min() > 12
