"""Baselines and backbone features against loops over pixels."""

import numpy as np
import torch

from heliostat.evaluation.features import (
    backbone_features,
    grey_histogram_features,
    histogram_features,
    normalised_batch,
    pixel_features,
    resize_all,
    to_grey,
)
from heliostat.models.config import BackboneConfig
from heliostat.models.vit import VisionTransformer

TINY = BackboneConfig(arch="vit_tiny", embed_dim=32, depth=2, num_heads=2, img_size=16, patch_size=8)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


def images(count: int = 5, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def test_images_of_any_shape_become_squares_of_one_size() -> None:
    mixed = [images(1, side)[0] for side in (8, 16, 40)] + [np.full((20, 50, 3), 7, np.uint8)]
    resized = resize_all(mixed, 16)
    assert resized.shape == (4, 16, 16, 3)
    assert (resized[1] == mixed[1]).all()
    assert (resized[3] == 7).all()


def test_shrinking_by_two_averages_blocks() -> None:
    whole = images(1, 32)[0]
    blocks = whole.reshape(16, 2, 16, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(resize_all([whole], 16)[0] - blocks).max() <= 0.5 + 1e-6


def test_grey_is_luminance_in_three_equal_channels() -> None:
    grey = to_grey(images())
    red, green, blue = images()[2, 3, 4].astype(float)
    assert grey[2, 3, 4].tolist() == [round(0.299 * red + 0.587 * green + 0.114 * blue)] * 3
    assert (to_grey(grey) == grey).all()


def test_pixels_are_centred_per_image() -> None:
    features = pixel_features(images())
    assert features.shape == (5, 16 * 16 * 3)
    np.testing.assert_allclose(features.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(pixel_features(np.full((1, 4, 4, 3), 200, np.uint8)), 0)


def test_the_colour_histogram_counts_every_pixel_once() -> None:
    features = histogram_features(images())
    for image, found in zip(images(), features, strict=True):
        counts = np.zeros(64)
        for red, green, blue in image.reshape(-1, 3):
            counts[(red // 64) * 16 + (green // 64) * 4 + blue // 64] += 1
        np.testing.assert_allclose(found**2, counts / 256, atol=1e-6)


def test_the_grey_histogram_counts_every_pixel_once() -> None:
    grey = to_grey(images())
    for image, found in zip(grey, grey_histogram_features(grey), strict=True):
        counts = np.zeros(64)
        for value in image[..., 0].ravel():
            counts[value // 4] += 1
        np.testing.assert_allclose(found**2, counts / 256, atol=1e-6)


def test_normalisation_is_minus_mean_over_std_in_planes() -> None:
    batch = normalised_batch(images(), MEAN, STD)
    assert batch.shape == (5, 3, 16, 16)
    expected = (images()[1, 2, 3, 0] / 255 - MEAN[0]) / STD[0]
    np.testing.assert_allclose(float(batch[1, 0, 2, 3]), expected, rtol=1e-5)


def test_backbone_features_are_the_cls_tokens_whatever_the_batch_size() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(TINY, drop_path_rate=0.5).train()  # training mode must not leak into the features
    found = [backbone_features(backbone, images(), mean=MEAN, std=STD, batch_size=size) for size in (1, 2, 100)]
    with torch.no_grad():
        expected = backbone.eval()(normalised_batch(images(), MEAN, STD)).cls_BD.numpy()
    for features in found:
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
