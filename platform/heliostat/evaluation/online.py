"""A backbone judged while it is still being trained: numbers and a picture, a pure function of the weights and the images.

k-NN and linear probe need labels and are there when labels are. RankMe, spread and the picture of patch tokens need none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import TrainingError
from heliostat.evaluation.config import KnnConfig, LinearConfig
from heliostat.evaluation.features import backbone_features, to_grey
from heliostat.evaluation.knn import leave_one_out_accuracy
from heliostat.evaluation.linear import linear_accuracy
from heliostat.evaluation.pictures import fit_size, grid_sheet, patch_tokens, pca_colors, png
from heliostat.evaluation.spread import feature_std, rankme
from heliostat.models.stored import ModelInfo
from heliostat.models.vit import VisionTransformer

# Shapes: N images, S side in pixels, D width, T patches of all pictures.

Pixels = NDArray[np.uint8]
PICTURE_PATCHES = 16  # along the longer side of a picture: enough to see shapes, whatever the crops of the training
_BATCH_SIZE = 64  # images per forward pass; small, because the memory is shared with the training
_TILE_PIXELS = 144


@dataclass(frozen=True)
class LabelledCrops:
    """Labelled images at one size: uint8 (N, S, S, 3), class numbers int64 (N,), and which of them the probe is scored on."""

    crops_NSSC: Pixels
    labels_N: NDArray[np.int64]
    is_scored_N: NDArray[np.bool_]


@dataclass(frozen=True)
class OnlineImages:
    """What an evaluation looks at: images of the training set, uint8 (N, S, S, 3), labelled ones, whole ones to draw."""

    training_NSSC: Pixels
    labelled: LabelledCrops | None
    pictures: tuple[Pixels, ...]


@dataclass(frozen=True)
class OnlineResult:
    """metrics by their names in `heliostat.metrics`; the picture as PNG, empty without pictures; its colours, uint8 (T, 3)."""

    metrics: dict[str, float]
    picture: bytes
    colors_T3: Pixels


def scored_half(labels_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the images a probe is scored on: every second one of each class. In the order of content hashes that is chance,
    and the same one every time."""
    is_scored_N = np.zeros(len(labels_N), np.bool_)
    for label in np.unique(labels_N):
        is_scored_N[np.flatnonzero(labels_N == label)[1::2]] = True
    return is_scored_N


def evaluate_online(
    backbone: VisionTransformer, info: ModelInfo, images: OnlineImages, *, before_T3: Pixels | None = None
) -> OnlineResult:
    """Judge a backbone on the device that it is on. Draws nothing at random; torch's generators stay as they are.

    before_T3: colours of the picture before this one, if its patches were the same. k-NN is over 10 neighbours, or over all
    others where there are fewer. Raises TrainingError for features that are not finite.
    """
    training_ND = _features(backbone, info, images.training_NSSC)
    metrics = {"online/rankme": rankme(training_ND), "online/feature_std": feature_std(training_ND)}
    if images.labelled is not None:
        metrics |= _accuracies(_features(backbone, info, images.labelled.crops_NSSC), images.labelled)
    picture, colors_T3 = _picture(backbone, info, images.pictures, before_T3)
    return OnlineResult(metrics, picture, colors_T3)


def _features(backbone: VisionTransformer, info: ModelInfo, crops_NSSC: Pixels) -> NDArray[np.float32]:
    pixels = to_grey(crops_NSSC) if info.grayscale else crops_NSSC
    features_ND = backbone_features(backbone, pixels, mean=info.mean, std=info.std, batch_size=_BATCH_SIZE)
    if not np.isfinite(features_ND).all():
        bad = int((~np.isfinite(features_ND)).any(axis=1).sum())
        raise TrainingError(f"features of {bad} of {len(features_ND)} images are not finite; lower optim.lr")
    return features_ND


def _accuracies(features_ND: NDArray[np.float32], labelled: LabelledCrops) -> dict[str, float]:
    labels_N, is_scored_N = labelled.labels_N, labelled.is_scored_N
    knn = KnnConfig(neighbors=min(KnnConfig().neighbors, len(labels_N) - 1))
    return {
        "online/knn_accuracy": leave_one_out_accuracy(features_ND, labels_N, config=knn),
        "online/linear_accuracy": linear_accuracy(
            features_ND[~is_scored_N],
            labels_N[~is_scored_N],
            features_ND[is_scored_N],
            labels_N[is_scored_N],
            config=LinearConfig(),
        ),
    }


def _picture(
    backbone: VisionTransformer, info: ModelInfo, whole: Sequence[Pixels], before_T3: Pixels | None
) -> tuple[bytes, Pixels]:
    """Images above, their patch tokens' principal components below."""
    if not whole:
        return b"", np.zeros((0, 3), np.uint8)
    patch = info.backbone.patch_size
    shown = [fit_size(image, PICTURE_PATCHES * patch, patch) for image in whole]
    seen = [to_grey(image[None])[0] for image in shown] if info.grayscale else shown
    tokens = patch_tokens(backbone, seen, mean=info.mean, std=info.std, patch_size=patch)
    num_patches = sum(len(one.tokens_PD) for one in tokens)
    if before_T3 is not None and before_T3.shape != (num_patches, 3):
        before_T3 = None  # online.num_pictures was changed in between: other patches, nothing to agree with
    colors = pca_colors(tokens, before_T3)
    return png(grid_sheet([shown, colors], side=_TILE_PIXELS)), np.concatenate([one.reshape(-1, 3) for one in colors])
