"""The shipped copy embedder on photographs that it was not trained on, and what its vectors do not depend on."""

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from heliostat.curation.copies_config import COPY_LIMITS
from heliostat.curation.copy_network import (
    SHIPPED_WEIGHTS,
    CopyEmbedder,
    CopyNetwork,
    CopyNetworkConfig,
    evened_out,
    fused,
    open_copy_embedder,
    squeezed,
)
from heliostat.curation.embed import ThumbnailEmbedder
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.photographs import photograph
from heliostat.data.planted_copies import planted_copy, planted_tiles
from heliostat.errors import CheckpointError, DataError

TINY = CopyNetworkConfig(image_size=32, widths=(8, 16, 32), blocks=(1, 1, 1), grid_width=4, dimension=32)


@pytest.fixture(scope="module")
def embedder() -> CopyEmbedder:
    return open_copy_embedder()


@pytest.fixture(scope="module")
def tiles() -> list[np.ndarray]:
    return [tile.pixels for tile in planted_tiles("right")[::3]]


def copies(tiles: list[np.ndarray], kind: str) -> list[np.ndarray]:
    return [decode(planted_copy(tile, kind, seed=3, number=number).data, DecodeConfig()) for number, tile in enumerate(tiles)]


def similarities(embedder, tiles, kind: str) -> np.ndarray:
    """(N, N) of copies and originals; the diagonal is right, the rest is wrong."""
    return embedder(copies(tiles, kind)) @ embedder(tiles).T


@pytest.mark.parametrize("kind", ["identical", "reencode", "resize", "flip", "crop_95", "blur"])
def test_copies_as_a_crawl_brings_them_are_found(embedder, tiles, kind):
    assert (np.diagonal(similarities(embedder, tiles, kind)) > COPY_LIMITS.threshold).mean() >= 0.97


@pytest.mark.parametrize("kind", ["crop_80", "crop_60", "rotate", "pad", "text_overlay", "logo_overlay", "chain_of_three"])
def test_copies_that_the_thumbnail_misses_are_found_more_often(embedder, tiles, kind):
    thumbnail = np.diagonal(similarities(ThumbnailEmbedder(), tiles, kind)) > 0.86
    learned = np.diagonal(similarities(embedder, tiles, kind)) > COPY_LIMITS.threshold
    assert learned.mean() > thumbnail.mean() + 0.1


def test_tiles_of_one_photograph_are_rarely_taken_for_copies(embedder):
    every_tile = [tile.pixels for tile in planted_tiles("right")]
    vectors = embedder(every_tile)
    alike = np.triu(vectors @ vectors.T, 1) > COPY_LIMITS.threshold
    assert alike.sum() <= 12  # of 9,591 pairs, three textures among them


def test_the_vector_has_unit_length_and_belongs_to_the_mirror_image_as_well(embedder, tiles):
    vectors = embedder(tiles[:8])
    assert (vectors.dtype, vectors.shape) == (np.float32, (8, embedder.dimension))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    mirrored = embedder([np.ascontiguousarray(tile[:, ::-1]) for tile in tiles[:8]])
    assert (vectors * mirrored).sum(axis=1).min() > 0.9999


def test_the_vector_does_not_depend_on_the_images_beside_it(embedder, tiles):
    alone = np.concatenate([embedder([tile]) for tile in tiles[:9]])
    together = embedder(tiles[:9])
    backwards = embedder(tiles[8::-1])[::-1]
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(alone, backwards)


def test_filled_up_batches_give_the_vectors_of_single_images_to_half_precision(embedder, tiles):
    squares = np.stack([squeezed(tile, 128) for tile in tiles[:5]])
    batched = embedder._described(squares, 8)
    single = np.concatenate([embedder._described(square[None], 1) for square in squares])
    np.testing.assert_allclose(batched.astype(np.float16), single.astype(np.float16), atol=2e-4)


def test_blank_images_are_alike_only_when_they_are_equal(embedder):
    blank = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 128, 255)]
    similarity = (vectors := embedder(blank)) @ vectors.T
    assert similarity[1, 2] == pytest.approx(1.0, abs=1e-6)
    assert max(similarity[0, 1], similarity[0, 3], similarity[1, 3]) < COPY_LIMITS.decontamination_threshold


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 500, 3), (500, 3, 3), (2, 2, 3)])
def test_images_of_any_size_have_a_vector(embedder, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert np.linalg.norm(embedder([image])[0]) == pytest.approx(1.0, abs=1e-5)


def test_what_is_no_image_is_refused_and_nothing_gives_nothing(embedder):
    with pytest.raises(DataError, match="an image is"):
        embedder([np.zeros((4, 4), np.uint8)])
    assert embedder([]).shape == (0, embedder.dimension)


def test_pixels_are_evened_out_whatever_light_and_contrast(tiles):
    square = squeezed(tiles[0], 64)
    evened = evened_out(square[None])[0].numpy()
    expected = square / 255.0 - (square / 255.0).mean(axis=(0, 1))
    expected /= np.sqrt((expected**2).mean() + (2 / 255) ** 2)
    np.testing.assert_allclose(evened, expected.transpose(2, 0, 1), atol=1e-4)
    dimmed = evened_out((square * 0.5).astype(np.uint8)[None])[0].numpy()
    assert np.abs(evened - dimmed).mean() < 0.03


def test_fusing_the_normalisations_changes_nothing_but_the_time():
    torch.manual_seed(0)
    network = CopyNetwork(TINY)
    images = torch.randn(4, 3, 32, 32)
    network.train()(images)  # statistics other than 0 and 1
    expected = network.eval()(images).detach()
    torch.testing.assert_close(fused(network)(images), expected, atol=1e-5, rtol=1e-5)


def test_the_shipped_file_is_small_and_its_version_follows_its_bytes(embedder, tmp_path):
    assert SHIPPED_WEIGHTS.stat().st_size < 2_000_000
    assert open_copy_embedder().version == embedder.version
    network = CopyNetwork(TINY)
    save_file(network.state_dict(), tmp_path / "own.safetensors", {"config": TINY.model_dump_json()})
    assert open_copy_embedder(tmp_path / "own.safetensors").version != embedder.version


def test_a_large_photograph_and_its_small_version_have_one_vector(embedder):
    image = photograph("chelsea")
    small = cv2.resize(image, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA)
    first, second = embedder([image, small])
    assert first @ second > 0.97


def test_files_of_something_else_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds no copy network"):
        open_copy_embedder(tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "wrong.safetensors", {"config": TINY.model_dump_json()})
    with pytest.raises(CheckpointError, match="does not fit CopyNetwork"):
        open_copy_embedder(tmp_path / "wrong.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(SHIPPED_WEIGHTS.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        open_copy_embedder(tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointError, match="cannot read weights"):
        open_copy_embedder(tmp_path / "none.safetensors")
