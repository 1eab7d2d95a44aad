"""The thumbnail descriptor on real photographs, and the backbone embedder."""

from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch

from heliostat.curation.copies import find_copies
from heliostat.curation.copies_config import THUMBNAIL_LIMITS, JoinConfig
from heliostat.curation.embed import BackboneEmbedder, ThumbnailEmbedder, thumbnail_embedding
from heliostat.curation.join import self_join
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors
from heliostat.data.photographs import photograph, photographs
from heliostat.errors import DataError
from heliostat.storage import LocalStore

KINDS = ("jpeg", "resize", "brightness", "crop", "flip")


def changed(image: np.ndarray, kind: str, generator: np.random.Generator) -> np.ndarray:
    side = len(image)
    if kind == "jpeg":
        options = [cv2.IMWRITE_JPEG_QUALITY, int(generator.integers(30, 80))]
        return cv2.imdecode(cv2.imencode(".jpg", image, options)[1], cv2.IMREAD_COLOR)
    if kind == "resize":
        return cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    if kind == "brightness":
        return np.clip(image * generator.uniform(0.7, 1.3) + generator.uniform(-20, 20), 0, 255).astype(np.uint8)
    if kind == "crop":
        top, left = generator.integers(0, round(0.08 * side) + 1, 2)
        return image[top : top + round(0.92 * side), left : left + round(0.92 * side)]
    return image[:, ::-1]


def disjoint_crops(per_photograph: int = 20) -> list[np.ndarray]:
    """Random squares of 48 to 96 pixels of every photograph that share no pixel: none is a copy of another."""
    generator = np.random.default_rng(0)
    crops = []
    for image in photographs().values():
        taken = np.zeros(image.shape[:2], np.bool_)
        found = 0
        for _ in range(2_000):
            side = int(generator.integers(48, 97))
            top, left = (int(generator.integers(0, extent - side + 1)) for extent in image.shape[:2])
            if found < per_photograph and not taken[top : top + side, left : left + side].any():
                taken[top : top + side, left : left + side] = True
                crops.append(image[top : top + side, left : left + side])
                found += 1
    return crops


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[float, float, dict[str, float]]:
    """Precision of the drops, recall, and recall per kind of change at the shipped limits."""
    generator = np.random.default_rng(1)
    originals = disjoint_crops()
    rows = generator.permutation(len(originals))[:250]
    kinds = np.array([KINDS[number % len(KINDS)] for number in range(len(rows))])
    images = originals + [changed(originals[row], kind, generator) for row, kind in zip(rows, kinds, strict=True)]
    true_group = np.concatenate([np.arange(len(originals)), rows])
    rank = np.empty(len(images), np.int64)
    rank[np.argsort([-image.shape[0] * image.shape[1] for image in images], kind="stable")] = np.arange(len(images))
    folder, floor = tmp_path_factory.mktemp("thumbnail"), THUMBNAIL_LIMITS.min_similarity_to_representative
    files, pool = LocalStore(folder / "files"), ArrayVectors(ThumbnailEmbedder()(images))
    config = JoinConfig(via="exact", edge_floor=floor)
    self_join(pool, files=files, prefix="edges/", work=LocalStore(folder / "join"), config=config, run=run_serially)
    edges, work = (files, "edges/"), LocalStore(folder / "copies")
    found = find_copies(edges, pool, rank, THUMBNAIL_LIMITS, edge_floor=floor, work=work, run=run_serially)
    hit = found.component[rows] == found.component[len(originals) :]
    right = true_group[found.representative] == true_group
    by_kind = {kind: float(hit[kinds == kind].mean()) for kind in KINDS}
    return float(right[found.dropped].mean()), float(hit.mean()), by_kind


def test_planted_copies_of_real_photographs_are_found_with_few_wrong_merges(scored):
    precision, recall, by_kind = scored
    assert precision >= 0.98
    assert recall >= 0.9
    assert min(by_kind["jpeg"], by_kind["resize"], by_kind["brightness"], by_kind["flip"]) >= 0.9, by_kind
    assert by_kind["crop"] >= 0.6, by_kind


@pytest.mark.parametrize("name", ["brick", "grass", "gravel"])
def test_disjoint_tiles_of_one_texture_are_not_copies(name):
    image = photograph(name)
    cut = [image[top : top + 96, left : left + 96] for top in range(0, 384, 96) for left in range(0, 384, 96)]
    embeddings = ThumbnailEmbedder()(cut)
    similarity = embeddings @ embeddings.T - 2 * np.eye(len(cut))
    assert similarity.max() < THUMBNAIL_LIMITS.threshold


def test_the_embedding_has_unit_length_and_does_not_see_a_horizontal_flip():
    image = photograph("astronaut")[:200, 100:300]
    embedding = thumbnail_embedding(image)
    assert (embedding.dtype, embedding.shape) == (np.float32, (ThumbnailEmbedder().dimension,))
    assert np.linalg.norm(embedding) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(thumbnail_embedding(image[:, ::-1]), embedding, atol=1e-5)
    assert embedding @ thumbnail_embedding(image[::-1]) < THUMBNAIL_LIMITS.threshold  # upside down is another picture


def test_blank_images_are_alike_only_when_they_are_equal():
    blank = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 128, 255)]
    embeddings = ThumbnailEmbedder()(blank)
    similarity = embeddings @ embeddings.T
    assert similarity[1, 2] == pytest.approx(1.0, abs=1e-6)
    assert max(similarity[0, 1], similarity[0, 3], similarity[1, 3]) < 0.5


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 500, 3), (500, 3, 3)])
def test_images_of_any_size_have_an_embedding(shape):
    assert np.isfinite(thumbnail_embedding(np.zeros(shape, np.uint8))).all()


def test_arrays_that_are_not_rgb_images_are_refused():
    for array in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(DataError, match="an image is"):
            thumbnail_embedding(array)


def test_no_images_give_no_embeddings():
    assert ThumbnailEmbedder()([]).shape == (0, ThumbnailEmbedder().dimension)


@dataclass(frozen=True)
class Outputs:
    cls_BD: torch.Tensor


class MeanBackbone(torch.nn.Module):
    """The simplest backbone: the mean of each channel is the cls token."""

    def forward(self, images_BCHW: torch.Tensor) -> Outputs:
        assert images_BCHW.shape[1:] == (3, 32, 32)
        return Outputs(images_BCHW.mean(dim=(2, 3)))


def test_a_backbone_embeds_normalised_centre_crops_whatever_the_batch_size():
    images = [
        np.full((40, 64, 3), (255, 0, 0), np.uint8),
        np.full((20, 16, 3), (0, 255, 0), np.uint8),
        photograph("coffee")[:90, :50],
    ]
    embedders = [
        BackboneEmbedder("mean", 3, MeanBackbone().eval(), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32, batch_size=size)
        for size in (1, 2, 8)
    ]
    embeddings = [embedder(images) for embedder in embedders]
    np.testing.assert_allclose(embeddings[0][0], np.array([2.0, -2.0, -2.0]) / np.sqrt(12), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings[0], axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-6)
    np.testing.assert_allclose(embeddings[0], embeddings[2], atol=1e-6)
