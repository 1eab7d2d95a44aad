"""Images -> feature vectors: frozen backbones, and the two baselines that any model must beat."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from heliostat.models.vit import VisionTransformer

# Shapes: N images, H W pixels, C channels, D width, P patches.


def resize_all(images: Sequence[NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    """Resize RGB images of any shape to uint8 (N, size, size, 3): area when shrinking, cubic when growing."""
    resized = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for row, image in enumerate(images):
        shrinking = min(image.shape[:2]) >= size
        resized[row] = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    return resized


def centre_crop(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle of an RGB image of any shape as uint8 (size, size, 3), its shorter side resized to `size`: no squeezing."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    resized = cv2.resize(image, new, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return np.asarray(resized[top : top + size, left : left + size], np.uint8)


def to_grey(images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luminance in three equal channels, uint8 (N, H, W, 3): what is left when colour is no help."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
    grey = np.rint(images_NHWC.astype(np.float32) @ weights).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def normalised_batch(
    images_NHWC: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), minus mean, over std (both in 0..1 units)."""
    pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC)).to(device).permute(0, 3, 1, 2).float().div_(255)
    shift = torch.tensor(mean, device=device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=device).view(1, 3, 1, 1)
    return (pixels - shift) / scale


@torch.inference_mode()
def backbone_features(
    backbone: VisionTransformer,
    images_NHWC: NDArray[np.uint8],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
) -> NDArray[np.float32]:
    """Normalised class tokens of the last block, float32 (N, D)."""
    backbone.eval()
    device = next(backbone.parameters()).device
    blocks = []
    for start in range(0, len(images_NHWC), batch_size):
        batch_NCHW = normalised_batch(images_NHWC[start : start + batch_size], mean, std, device)
        blocks.append(backbone(batch_NCHW).cls_BD.float().cpu().numpy())
    return np.concatenate(blocks)


def pixel_features(images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Baseline: the pixels themselves, centred, float32 (N, H*W*3)."""
    flat = images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32)
    return np.asarray(flat - flat.mean(axis=1, keepdims=True), np.float32)


def histogram_features(images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Baseline: a colour histogram of 4 x 4 x 4 = 64 bins, square-rooted (Hellinger), float32 (N, 64)."""
    levels = (images_NHWC // 64).astype(np.int64)
    bins = levels[..., 0] * 16 + levels[..., 1] * 4 + levels[..., 2]
    counts = np.stack([np.bincount(image.ravel(), minlength=64) for image in bins]).astype(np.float32)
    return np.asarray(np.sqrt(counts / counts.sum(axis=1, keepdims=True)), np.float32)


def grey_histogram_features(images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Baseline for grey images: 64 bins of luminance, square-rooted, float32 (N, 64)."""
    counts = np.stack([np.bincount((image[..., 0] // 4).ravel(), minlength=64) for image in images_NHWC]).astype(np.float32)
    return np.asarray(np.sqrt(counts / counts.sum(axis=1, keepdims=True)), np.float32)
