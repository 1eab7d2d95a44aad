"""The copy-detection embedder: a small convolutional network that gives a picture and its edited copies nearly the same vector.

The idea is SSCD's (arXiv 2202.10261): contrastive training on edited views, GeM pooling, an entropy term that spreads the
vectors; network, edits and training are our own (curation/copy_training.py), the measurements are in
docs/concepts/copy_embedder.md. What the network sees is 128 x 128 pixels, the aspect ratio given up, with the mean of each
channel taken away and the contrast of the whole evened out. A picture and its mirror image get one vector, since both are shown
and the vectors added. A picture too flat to describe gets a direction of its own (`curation/embed.py`, `own_direction`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from heliostat.config import StrictModel, validate
from heliostat.curation.embed import check_image, own_direction
from heliostat.errors import CheckpointError
from heliostat.models.weights import load_state, read_weights

# Shapes: B images, C channels, H W pixels, D dimension.

SHIPPED_WEIGHTS = Path(__file__).with_name("copy_embedder_v1.safetensors")
CONFIG_KEY = "config"  # of the metadata of a weights file
_FLAT_DEVIATION = 2.0 / 255.0
"""Deviation of the pixels at which a picture counts half described: two grey levels, what JPEG leaves of a blank page."""
_BLANK_FACTOR = 2.0
_CODE_VERSION = b"copy 1 "  # changes when the same weights would give other vectors


class CopyNetworkConfig(StrictModel):
    """Sizes of the network."""

    image_size: int = Field(default=128, ge=32, multiple_of=16)
    """Side of the square that the network sees, in pixels."""

    widths: tuple[int, int, int] = (32, 64, 128)
    """Channels of the three stages, at 1/4, 1/8 and 1/16 of the side."""

    blocks: tuple[int, int, int] = (1, 2, 1)
    """Residual blocks of each stage."""

    grid_width: int = Field(default=32, gt=0)
    """Channels of the 4 x 4 grid that tells where things are."""

    dimension: int = Field(default=256, gt=0)
    """Width of the embedding."""


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = functional.relu(self.norm1(self.conv1(x_BCHW)))
        return functional.relu(x_BCHW + self.norm2(self.conv2(inner)))


class _Down(nn.Module):
    """A strided convolution, normalisation, ReLU."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x_BCHW)))


def _gem(x_BCHW: Tensor) -> Tensor:
    """Generalised mean over positions with exponent 3, as in SSCD: (B, C)."""
    return x_BCHW.float().clamp_min(1e-4).pow(3).mean(dim=(2, 3)).pow(1.0 / 3.0)


class CopyNetwork(nn.Module):
    """(B, 3, S, S) evened-out pixels (`prepared`) to (B, D) vectors of no particular length."""

    def __init__(self, config: CopyNetworkConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.widths
        self.stage1 = nn.Sequential(_Down(3, first, 7, 4), *(_Block(first) for _ in range(config.blocks[0])))
        self.stage2 = nn.Sequential(_Down(first, second, 3, 2), *(_Block(second) for _ in range(config.blocks[1])))
        self.stage3 = nn.Sequential(_Down(second, third, 3, 2), *(_Block(third) for _ in range(config.blocks[2])))
        self.to_grid = nn.Conv2d(third, config.grid_width, 1)
        width = second + third + 16 * config.grid_width
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, config.dimension)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        middle = self.stage2(self.stage1(x_BCHW))
        last = self.stage3(middle)
        grid = functional.adaptive_avg_pool2d(self.to_grid(last), 4).flatten(1).float()
        pooled = torch.cat([_gem(middle), _gem(last), grid], dim=1)
        vectors: Tensor = self.head(self.norm(pooled))
        return vectors


def evened_out(squares_BHWC: NDArray[np.uint8]) -> Tensor:
    """(B, S, S, 3) uint8 to (B, 3, S, S) float32: mean of each channel 0, deviation over all of them 1 (less where flat)."""
    pixels = torch.from_numpy(np.ascontiguousarray(squares_BHWC)).permute(0, 3, 1, 2).float() / 255.0
    pixels = pixels - pixels.mean(dim=(2, 3), keepdim=True)
    deviation = (pixels.square().mean(dim=(1, 2, 3), keepdim=True) + _FLAT_DEVIATION**2).sqrt()
    evened: Tensor = pixels / deviation
    return evened


def squeezed(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(side, side, 3): the image without regard to its aspect ratio."""
    shrinks = min(image.shape[:2]) > side
    return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), np.uint8)


def _flatness(square: NDArray[np.uint8]) -> float:
    """1 for a blank square, 0 from four grey levels of deviation on."""
    variance = float((square - square.mean(axis=(0, 1), dtype=np.float32)).var()) / 255.0**2
    return max(0.0, 1.0 - variance / (_BLANK_FACTOR * _FLAT_DEVIATION) ** 2)


def fused(network: CopyNetwork) -> CopyNetwork:
    """The same network in evaluation mode with its 2-d normalisations multiplied into the convolutions before them."""
    for module in network.eval().modules():
        pairs = {"conv": "norm"} if isinstance(module, _Down) else {"conv1": "norm1", "conv2": "norm2"}
        if isinstance(module, _Down | _Block):
            for conv, norm in pairs.items():
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return network.requires_grad_(False)


@dataclass(frozen=True)
class CopyEmbedder:
    """The copy network as an Embedder, in float32. Make one with `open_copy_embedder`.

    On the CPU every image goes through alone with its mirror image; elsewhere `batch_size` go at once, the last batch filled up
    with blanks. So an image's vector does not depend on the images beside it, apart from the last bits on an accelerator.
    """

    network: CopyNetwork
    version: str
    device: str = "cpu"
    batch_size: int = 64
    name: str = "copy"

    @property
    def dimension(self) -> int:
        """D."""
        return self.network.config.dimension

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(B, D) float32, L2-normalised. Raises DataError for what is no (H, W, 3) uint8 image."""
        embeddings = np.empty((len(images), self.dimension), np.float32)
        size = 1 if self.device == "cpu" else self.batch_size
        for start in range(0, len(images), size):
            some = images[start : start + size]
            for image in some:
                check_image(image)
            squares = [squeezed(image, self.network.config.image_size) for image in some]
            described = self._described(np.stack(squares), size)
            embeddings[start : start + len(some)] = [
                _with_own_direction(vector, _flatness(square), image)
                for vector, square, image in zip(described, squares, some, strict=True)
            ]
        return embeddings

    def _described(self, squares_BHWC: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
        """(B, D) L2-normalised sums of the vectors of each square and its mirror image, `size` of both in one forward."""
        filled = np.zeros((size, *squares_BHWC.shape[1:]), np.uint8)
        filled[: len(squares_BHWC)] = squares_BHWC
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            pixels = evened_out(filled).to(self.device)
            both = torch.cat([pixels, pixels.flip(3)]).contiguous(memory_format=torch.channels_last)
            first, second = functional.normalize(self.network(both), dim=-1).chunk(2)
            described = functional.normalize(first + second, dim=-1)
        return np.asarray(described[: len(squares_BHWC)].cpu().numpy(), np.float32)


def _with_own_direction(
    vector: NDArray[np.float32], flatness: float, image: NDArray[np.uint8]
) -> NDArray[np.float32] | NDArray[np.float64]:
    """The vector, replaced in the share of `flatness` by a direction drawn from the pixels; unit length."""
    if flatness == 0.0:
        return vector
    mixed = np.sqrt(1.0 - flatness) * vector + np.sqrt(flatness) * own_direction(image, len(vector))
    return np.asarray(mixed / np.linalg.norm(mixed))


def open_copy_embedder(path: Path = SHIPPED_WEIGHTS, *, device: str = "cpu", batch_size: int = 64) -> CopyEmbedder:
    """The copy embedder of a weights file that `copy_training` wrote, by default the shipped one.

    Raises CheckpointError when the file is missing, torn, or of another network.
    """
    state, metadata = read_weights(path)
    if CONFIG_KEY not in metadata:
        raise CheckpointError(
            f"{path} holds no copy network (no `{CONFIG_KEY}` in its metadata); give what copy_training wrote"
        )
    config = validate(CopyNetworkConfig, json.loads(metadata[CONFIG_KEY]), f"{path}: {CONFIG_KEY}")
    network = CopyNetwork(config)
    load_state(
        network, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, str(path)
    )
    digest = hashlib.sha256(_CODE_VERSION + path.read_bytes()).hexdigest()
    network = fused(network).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return CopyEmbedder(network, digest[:16], device, batch_size)
