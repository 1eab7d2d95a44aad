"""Pictures for people: principal components of patch tokens as colours, and sheets of nearest neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.errors import DataError
from heliostat.evaluation.features import normalised_batch
from heliostat.models.vit import VisionTransformer

# Shapes: N images, H W pixels, P patches of an image, D width.

Pixels = NDArray[np.uint8]
_RIGHT, _WRONG, _PLAIN = (46, 160, 67), (207, 34, 46), (110, 118, 129)


@dataclass(frozen=True)
class PatchTokens:
    """Patch tokens of one image, float32 (P, D), and the grid (rows, columns) they form."""

    tokens_PD: NDArray[np.float32]
    grid: tuple[int, int]


def fit_size(image: Pixels, side: int, patch_size: int) -> Pixels:
    """Resize so that the longer side is `side` pixels and both sides are whole numbers of patches."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    sizes = [max(patch_size, round(extent * scale / patch_size) * patch_size) for extent in (width, height)]
    return np.asarray(cv2.resize(image, sizes, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC), np.uint8)


@torch.inference_mode()
def patch_tokens(
    backbone: VisionTransformer, images: Sequence[Pixels], *, mean: Sequence[float], std: Sequence[float], patch_size: int
) -> list[PatchTokens]:
    """Patch tokens of images whose sides are whole numbers of patches, one forward pass each."""
    found = []
    for image in images:
        batch_1CHW = normalised_batch(image[None], mean, std, next(backbone.parameters()).device)
        tokens_PD = backbone(batch_1CHW).patches_BND[0].float().cpu().numpy()
        found.append(PatchTokens(tokens_PD, (image.shape[0] // patch_size, image.shape[1] // patch_size)))
    return found


def pca_colors(tokens: Sequence[PatchTokens], before_T3: Pixels | None = None) -> list[Pixels]:
    """The first three principal components over all images together, as RGB: one uint8 (rows, columns, 3) picture each.

    Components are stretched from their 2nd to their 98th percentile; their signs are fixed by making the largest loading
    positive, so that the same tokens give the same colours. before_T3: the colours that the same patches had in an earlier
    picture, uint8 (T, 3) in the order of the images; order and signs are then those that agree with it best, so that pictures
    of one network at successive steps can be laid side by side.
    """
    if not tokens:
        return []
    projected_T3 = _principal_components(np.concatenate([one.tokens_PD for one in tokens]).astype(np.float64))
    if before_T3 is not None:
        projected_T3 = _aligned(projected_T3, before_T3)
    low_3, high_3 = np.percentile(projected_T3, [2, 98], axis=0)
    colors_T3 = np.rint(np.clip((projected_T3 - low_3) / np.maximum(high_3 - low_3, 1e-12), 0, 1) * 255).astype(np.uint8)
    ends = np.cumsum([len(one.tokens_PD) for one in tokens])[:-1]
    return [colors_P3.reshape(*one.grid, 3) for colors_P3, one in zip(np.split(colors_T3, ends), tokens, strict=True)]


def _principal_components(tokens_TD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Projections (T, 3) on the three directions of largest variance, the largest first."""
    if tokens_TD.shape[1] < 3:
        raise DataError(f"principal components need a width of 3 or more, the tokens have {tokens_TD.shape[1]}")
    centred_TD = tokens_TD - tokens_TD.mean(axis=0)
    _, vectors_DD = np.linalg.eigh(np.cov(centred_TD, rowvar=False))
    axes_D3 = vectors_DD[:, ::-1][:, :3]
    axes_D3 = axes_D3 * np.sign(axes_D3[np.abs(axes_D3).argmax(axis=0), np.arange(3)])
    return np.asarray(centred_TD @ axes_D3, np.float64)


def _aligned(projected_T3: NDArray[np.float64], before_T3: Pixels) -> NDArray[np.float64]:
    """The components in the order, and with the signs, whose correlations with earlier colours have the largest sum."""
    ours_T3, theirs_T3 = (_standardised(values.astype(np.float64)) for values in (projected_T3, before_T3))
    correlation_33 = ours_T3.T @ theirs_T3 / len(projected_T3)  # [ours, channel of the earlier picture]
    order = list(max(permutations(range(3)), key=lambda order: np.abs(correlation_33[list(order), range(3)]).sum()))
    signs_3 = np.where(correlation_33[order, range(3)] < 0, -1.0, 1.0)
    return np.asarray(projected_T3[:, order] * signs_3, np.float64)


def _standardised(values_T3: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((values_T3 - values_T3.mean(axis=0)) / np.maximum(values_T3.std(axis=0), 1e-12), np.float64)


def _tile(image: Pixels, side: int) -> Pixels:
    """A square tile with the whole image centred on white; patch grids are enlarged without blurring."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    new = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = max(height, width) <= side // 3
    resized = cv2.resize(
        image, new, interpolation=cv2.INTER_NEAREST if small else cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    )
    tile = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - new[1]) // 2, (side - new[0]) // 2
    tile[top : top + new[1], left : left + new[0]] = resized
    return tile


def grid_sheet(rows: Sequence[Sequence[Pixels]], side: int = 128, gap: int = 6) -> Pixels:
    """Images in rows and columns on white, each in a tile of `side` pixels."""
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (side + gap) + gap, columns * (side + gap) + gap, 3), 255, np.uint8)
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            top, left = gap + number * (side + gap), gap + column * (side + gap)
            sheet[top : top + side, left : left + side] = _tile(image, side)
    return sheet


def framed(image: Pixels, verdict: bool | None, side: int = 96, width: int = 5) -> Pixels:
    """A tile with a frame: green for the right class, red for a wrong one, grey for a query."""
    color = _PLAIN if verdict is None else _RIGHT if verdict else _WRONG
    tile = _tile(image, side - 2 * width)
    return np.asarray(cv2.copyMakeBorder(tile, width, width, width, width, cv2.BORDER_CONSTANT, value=color), np.uint8)


def neighbor_sheet(
    queries: Sequence[Pixels],
    truth_Q: NDArray[np.int64],
    bank: Sequence[Pixels],
    labels_N: NDArray[np.int64],
    rows_QK: NDArray[np.int64],
) -> Pixels:
    """One row per query: the query framed grey, then its nearest bank images framed by whether their class is right."""
    rows = []
    for query, truth, row_K in zip(queries, truth_Q, rows_QK, strict=True):
        rows.append([framed(query, None), *(framed(bank[index], bool(labels_N[index] == truth)) for index in row_K)])
    return grid_sheet(rows, side=96, gap=4)


def png(image: Pixels) -> bytes:
    """An RGB picture as PNG bytes."""
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise DataError(f"a picture of shape {image.shape} could not be written as PNG")
    return bytes(data.tobytes())
