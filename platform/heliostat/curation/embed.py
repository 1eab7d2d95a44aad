"""Embeddings: a pixel array in, an L2-normalised vector out, by a small classical copy descriptor or by a backbone.

The descriptor `thumbnail_embedding` needs no network and no fitting. It describes where edges of which direction lie:

1. Luminance at 32 x 32, blurred a little: codec and resize differences go.
2. Gradients divided by their own length: brightness and contrast go, and one strong edge does not drown the others.
3. Eight rectified directions, pooled by Gaussian windows on a 6 x 6 grid, mean over the grid removed: a mild crop moves each
   window by less than its width.
4. The mirror image is folded in: the symmetric half of the grid as it is, the antisymmetric half as absolute value. A
   horizontal flip changes only the sign of the latter, so ONE vector serves both orientations.
5. What is too flat to describe (sky, paper) is not forced to unit length. The rest of the length goes into a direction drawn
   from the pixels themselves, so that two different blank images are unlike each other instead of all alike.

Measured with 17 photographs at `THUMBNAIL_LIMITS` (tests/curation/test_embed.py, three draws). 332 crops that share no
pixel, one copy of most: precision 0.99 to 1.00, recall 0.92 to 0.96; by kind: JPEG quality 30-80 0.90 or more, resize 0.98 or
more, brightness and contrast 0.95 or more, mirror 1.00, crop to 92 % of the side 0.70 to 0.92. Where crops overlap heavily (150
from the left half of each photograph) 151 of 2,550 are dropped without having been planted; 119 of them share more than half
their area with the image that stays. Not found: crops to 85 % of the side (0.16 of them are), rotation, overlays, flat images
that were compressed. Wrongly merged: repeated structure that happens to align (bricks, lattices), smooth skies, and the two
halves of a symmetric object, since the mirror image counts as the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from heliostat.errors import DataError

if TYPE_CHECKING:
    import torch

# Shapes: B images, H W C an image, G grid side, O directions, D dimension.

SIDE_PIXELS = 32
GRID = 6
NUM_DIRECTIONS = 8
BLUR_PIXELS = 1.0
WINDOW_CELLS = 0.5  # standard deviation of a pooling window, in cells
FLAT_GRADIENT = 0.0015  # gradient (share of full white, per pixel) at which a direction counts half: JPEG noise in flat areas
FLAT_LENGTH = 0.05  # length of the pooled responses at which an image counts as half described
BLANK_DIMENSIONS = 96

THUMBNAIL_DIMENSION = GRID * GRID * NUM_DIRECTIONS + BLANK_DIMENSIONS


class Embedder(Protocol):
    """Turns images into vectors. name and version enter fingerprints; dimension is D."""

    @property
    def name(self) -> str:
        """Name of the embedding space; vectors of different names must not be compared."""

    @property
    def dimension(self) -> int:
        """Width of the vectors."""

    @property
    def version(self) -> str:
        """Digest of the weights and of the settings that change vectors; of other versions they must not be compared."""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed images of any size, (H, W, 3) uint8 RGB each, as (B, D) float32, L2-normalised."""


def _pooling_windows() -> NDArray[np.float32]:
    """(G, SIDE) weights of the pooling windows along one axis, each summing to one."""
    centres = (np.arange(GRID) + 0.5) * SIDE_PIXELS / GRID - 0.5
    deviation = WINDOW_CELLS * SIDE_PIXELS / GRID
    weights = np.exp(-0.5 * ((np.arange(SIDE_PIXELS) - centres[:, None]) / deviation) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


_WINDOWS = _pooling_windows()
_ANGLES = np.arange(NUM_DIRECTIONS) * 2 * np.pi / NUM_DIRECTIONS
_DIRECTIONS_2O = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)]).astype(np.float32)
_MIRRORED = (NUM_DIRECTIONS // 2 - np.arange(NUM_DIRECTIONS)) % NUM_DIRECTIONS  # angle a seen in a mirror is pi - a


def check_image(image: NDArray[np.uint8]) -> None:
    """Raise DataError unless the image is (H, W, 3) uint8 with pixels in it."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise DataError(f"an image is (height, width, 3) uint8 RGB; this one is {image.shape} {image.dtype}")


def _directional_responses(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(G, G, O) pooled edge directions with their mean over the grid removed."""
    small = cv2.resize(image, (SIDE_PIXELS, SIDE_PIXELS), interpolation=cv2.INTER_AREA)
    luminance = cv2.cvtColor(small.astype(np.float32) / 255.0, cv2.COLOR_RGB2GRAY)
    luminance = cv2.GaussianBlur(luminance, (0, 0), BLUR_PIXELS)
    gradient = np.stack([cv2.Scharr(luminance, -1, 1, 0), cv2.Scharr(luminance, -1, 0, 1)], axis=-1) / 32.0
    length = np.sqrt((gradient**2).sum(axis=-1, keepdims=True))
    cosine = np.maximum(gradient / np.maximum(length, 1e-12) @ _DIRECTIONS_2O, 0.0)
    weighted = cosine**2 * (length / (length + FLAT_GRADIENT))
    rows = np.tensordot(_WINDOWS, weighted, axes=(1, 0))  # (G, SIDE, O)
    pooled = np.tensordot(_WINDOWS, rows, axes=(1, 1)).swapaxes(0, 1)
    return np.asarray(pooled - pooled.mean(axis=(0, 1)), np.float32)


def own_direction(image: NDArray[np.uint8], dimension: int) -> NDArray[np.float64]:
    """A unit vector that depends on every pixel, the same for the image and its mirror image, unlike any other image's."""
    digests = sorted(hashlib.sha256(view.tobytes()).digest() for view in (image, image[:, ::-1]))
    direction = np.random.default_rng(int.from_bytes(digests[0][:16], "big")).standard_normal(dimension)
    return direction / np.linalg.norm(direction)


def thumbnail_embedding(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Classical copy descriptor of one image, (384,) float32, L2-normalised; see the top of this file.

    image: (H, W, 3) uint8 RGB of any size. Copies score above the threshold of
    `copies_config.THUMBNAIL_LIMITS`. Raises DataError for any other array.
    """
    check_image(image)
    responses_GGO = _directional_responses(image)
    described = responses_GGO / np.sqrt((responses_GGO**2).sum() + FLAT_LENGTH**2)
    mirrored = described[:, ::-1, _MIRRORED]
    half = GRID // 2  # the other half of the columns repeats the first after folding; sqrt(2) keeps the length
    symmetric = (described + mirrored)[:, :half] / np.sqrt(2.0)
    antisymmetric = np.abs(described - mirrored)[:, :half] / np.sqrt(2.0)
    blank = own_direction(image, BLANK_DIMENSIONS) * np.sqrt(max(0.0, 1.0 - float((described**2).sum())))
    vector = np.concatenate([symmetric.ravel(), antisymmetric.ravel(), blank])
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


@dataclass(frozen=True)
class ThumbnailEmbedder:
    """`thumbnail_embedding` as an Embedder."""

    name: str = "thumbnail"
    dimension: int = THUMBNAIL_DIMENSION
    version: str = "1"

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(B, 384) float32, L2-normalised."""
        if not images:
            return np.empty((0, self.dimension), np.float32)
        return np.stack([thumbnail_embedding(image) for image in images])


@dataclass(frozen=True)
class BackboneEmbedder:
    """The cls token of a backbone as embedding.

    backbone: a module in eval mode whose `forward(images_BCHW).cls_BD` is the cls token. mean, std: per channel, of pixels in
    0..1. image_size: pixels; the shorter side is resized to it and the centre square cut out. version: digest of the weights
    and of these settings (`open_embedder` makes it).
    """

    name: str
    dimension: int
    backbone: "torch.nn.Module"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int = 224
    batch_size: int = 64
    device: str = "cpu"
    version: str = ""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(B, D) float32, L2-normalised; runs without gradients, `batch_size` images at a time."""
        import torch

        embeddings = np.empty((len(images), self.dimension), np.float32)
        for start in range(0, len(images), self.batch_size):
            batch = np.stack([self._prepared(image) for image in images[start : start + self.batch_size]])
            with torch.inference_mode():
                cls_BD = self.backbone(torch.from_numpy(batch).to(self.device)).cls_BD
                normalised = torch.nn.functional.normalize(cls_BD.float(), dim=-1)
            embeddings[start : start + len(batch)] = normalised.cpu().numpy()
        return embeddings

    def _prepared(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(3, S, S) float32: resized, centre-cropped and normalised."""
        check_image(image)
        scale = self.image_size / min(image.shape[:2])
        height, width = (max(self.image_size, round(side * scale)) for side in image.shape[:2])
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        resized = cv2.resize(image, (width, height), interpolation=interpolation)
        top, left = (height - self.image_size) // 2, (width - self.image_size) // 2
        square = resized[top : top + self.image_size, left : left + self.image_size].astype(np.float32) / 255.0
        normalised = (square - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)
