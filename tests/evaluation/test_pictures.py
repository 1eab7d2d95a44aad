"""Pictures: the same tokens give the same colours, and every image keeps its shape."""

import cv2
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from heliostat.errors import DataError
from heliostat.evaluation.pictures import (
    PatchTokens,
    fit_size,
    framed,
    grid_sheet,
    neighbor_sheet,
    patch_tokens,
    pca_colors,
    png,
)
from heliostat.models.config import BackboneConfig
from heliostat.models.vit import VisionTransformer


def tokens(seed: int = 0, width: int = 12) -> list[PatchTokens]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(3, width)) * np.array([[9.0], [4.0], [1.5]])
    grids = [(4, 6), (5, 5), (1, 7)]
    return [
        PatchTokens((rng.normal(size=(h * w, 3)) @ mixing + 0.05 * rng.normal(size=(h * w, width))).astype(np.float32), (h, w))
        for h, w in grids
    ]


def test_colours_are_scikit_learns_components_up_to_their_sign() -> None:
    made = tokens()
    colors = pca_colors(made)
    assert [picture.shape for picture in colors] == [(4, 6, 3), (5, 5, 3), (1, 7, 3)]
    assert all(picture.dtype == np.uint8 for picture in colors)
    projected = PCA(3, svd_solver="full").fit_transform(np.concatenate([one.tokens_PD for one in made]))
    ours = np.concatenate([picture.reshape(-1, 3) for picture in colors]).astype(float)
    inside = ((ours > 0) & (ours < 255)).all(axis=1)
    for channel in range(3):
        assert abs(np.corrcoef(ours[inside, channel], projected[inside, channel])[0, 1]) > 0.999


def test_the_same_tokens_give_the_same_colours_in_any_order_and_orientation() -> None:
    made = tokens()
    plain, turned = pca_colors(made), pca_colors(made[::-1])[::-1]
    for one, other in zip(plain, turned, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    again = pca_colors([PatchTokens(one.tokens_PD.copy(), one.grid) for one in made])
    assert all((one == other).all() for one, other in zip(plain, again, strict=True))


def test_colours_use_the_whole_range_and_ignore_scale_and_offset() -> None:
    made = tokens()
    plain = np.concatenate([picture.reshape(-1, 3) for picture in pca_colors(made)])
    assert plain.min(axis=0).tolist() == [0, 0, 0]
    assert plain.max(axis=0).tolist() == [255, 255, 255]
    moved = [PatchTokens(7 * one.tokens_PD + 3, one.grid) for one in made]
    shifted = np.concatenate([picture.reshape(-1, 3) for picture in pca_colors(moved)])
    assert np.abs(plain.astype(int) - shifted.astype(int)).max() <= 1


def test_tokens_that_are_all_alike_give_a_flat_picture() -> None:
    (picture,) = pca_colors([PatchTokens(np.ones((6, 8), np.float32), (2, 3))])
    assert len(np.unique(picture)) == 1


def test_no_tokens_give_no_pictures_and_two_dimensions_are_refused() -> None:
    assert pca_colors([]) == []
    with pytest.raises(DataError, match="width of 3 or more, the tokens have 2"):
        pca_colors(tokens(width=2))


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100), (64, 64), (7, 500)])
def test_a_fitted_image_has_whole_patches_and_its_proportions(height: int, width: int) -> None:
    fitted = fit_size(np.zeros((height, width, 3), np.uint8), 64, 8)
    assert max(fitted.shape[:2]) == 64
    assert fitted.shape[0] % 8 == fitted.shape[1] % 8 == 0
    assert abs(fitted.shape[0] - 64 * height / max(height, width)) <= 8


def test_patch_tokens_lie_on_the_grid_of_their_image() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(arch="vit_tiny", embed_dim=32, depth=2, num_heads=2, img_size=16, patch_size=8)
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    backbone = VisionTransformer(config).eval()
    (found,) = patch_tokens(backbone, [image], mean=(0.5,) * 3, std=(0.25,) * 3, patch_size=8)
    assert found.grid == (2, 4)
    assert found.tokens_PD.shape == (8, 32)


def test_a_sheet_holds_every_image_on_white() -> None:
    red, wide = np.full((30, 30, 3), (255, 0, 0), np.uint8), np.full((10, 40, 3), (0, 0, 255), np.uint8)
    sheet = grid_sheet([[red, wide], [wide]], side=40, gap=4)
    assert sheet.shape == (92, 92, 3)
    assert sheet[24, 24].tolist() == [255, 0, 0]
    assert sheet[24, 68].tolist() == [0, 0, 255]
    assert sheet[6, 68].tolist() == [255, 255, 255]  # above the wide image
    assert sheet[68, 68].tolist() == [255, 255, 255]  # no fourth image


def test_frames_tell_right_from_wrong() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    right, wrong, query = (framed(image, verdict)[0, 0] for verdict in (True, False, None))
    assert right[1] > right[0]
    assert wrong[0] > wrong[1]
    assert query.max() - query.min() < 25
    sheet = neighbor_sheet([image], np.array([1]), [image, image], np.array([1, 0]), np.array([[1, 0]]))
    tiles = [sheet[4, 4 + column * 100].tolist() for column in range(3)]
    assert tiles == [query.tolist(), wrong.tolist(), right.tolist()]


def test_a_png_comes_back_as_it_was() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    again = cv2.cvtColor(cv2.imdecode(np.frombuffer(png(image), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert (again == image).all()
