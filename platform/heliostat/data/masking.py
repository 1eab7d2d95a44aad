"""Block masks: which patches of a global crop the student must fill in.

BEiT's block-wise masking as DINOv2 uses it (arXiv 2106.08254 Algorithm 1; arXiv 2304.07193): rectangles of random area and
aspect ratio are laid on the patch grid until the wanted number of patches is covered, seldom a few fewer.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heliostat.data.config import NUM_GLOBAL_CROPS
from heliostat.errors import ConfigError

# Shapes: N = grid_h * grid_w patches of one global crop.

_MIN_BLOCK_PATCHES = 4  # BEiT and DINOv2
_MIN_BLOCK_ASPECT_RATIO = 0.3  # BEiT and DINOv2; the largest is its inverse
_TRIES_PER_BLOCK = 10
_MASK_STREAM = 0x6D61736B  # keeps the mask draws apart from every other use of the same seed


@dataclass(frozen=True)
class MaskSettings:
    """How a step's masks are drawn.

    patch_size: side of a patch, pixels. mask_ratio_min_max: smallest and largest masked share of a masked crop.
    mask_sample_probability: share of the global crops that are masked at all. DINOv2: (0.1, 0.5) and 0.5.
    """

    patch_size: int
    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)
    mask_sample_probability: float = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that no mask can satisfy."""
        low, high = self.mask_ratio_min_max
        if not 0.0 <= low <= high <= 1.0:
            raise ConfigError(f"mask_ratio_min_max [{low}, {high}] must rise within 0..1, like [0.1, 0.5]")
        if not 0.0 <= self.mask_sample_probability <= 1.0:
            raise ConfigError(f"mask_sample_probability {self.mask_sample_probability} must lie in 0..1, like 0.5")
        if self.patch_size < 1:
            raise ConfigError(f"patch_size {self.patch_size} must be at least 1 pixel")

    def grid(self, crop_size: int) -> tuple[int, int]:
        """Patch grid of a square crop; ConfigError where the patches do not tile it."""
        if crop_size % self.patch_size:
            fit = max(1, crop_size // self.patch_size) * self.patch_size
            raise ConfigError(f"a crop of {crop_size} pixels is not divisible by patch_size {self.patch_size}; use {fit}")
        return crop_size // self.patch_size, crop_size // self.patch_size


def block_mask(grid_hw: tuple[int, int], num_masked: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draw one mask of shape grid_hw with at most, and nearly always about, `num_masked` True patches."""
    mask = np.zeros(grid_hw, dtype=np.bool_)
    max_block = grid_hw[0] // 2 * grid_hw[1]  # DINOv2: no block covers more than half of the rows' patches
    covered = 0
    while covered < num_masked:
        added = _add_block(mask, min(num_masked - covered, max_block), rng)
        if added == 0:
            break
        covered += added
    return mask


def _add_block(mask: npt.NDArray[np.bool_], max_patches: int, rng: np.random.Generator) -> int:
    """Lay one rectangle that covers 1 to max_patches new patches; returns how many, 0 when no try fits."""
    grid_h, grid_w = mask.shape
    log_limit = math.log(_MIN_BLOCK_ASPECT_RATIO)
    for draw_area, draw_aspect, draw_top, draw_left in rng.random((_TRIES_PER_BLOCK, 4)).tolist():
        area = _MIN_BLOCK_PATCHES + draw_area * (max_patches - _MIN_BLOCK_PATCHES)
        aspect = math.exp(log_limit * (1.0 - 2.0 * draw_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid_h or width >= grid_w:
            continue
        top, left = int(draw_top * (grid_h - height + 1)), int(draw_left * (grid_w - width + 1))
        block = mask[top : top + height, left : left + width]
        added = height * width - int(np.count_nonzero(block))
        if 0 < added <= max_patches:
            block[:] = True
            return added
    return 0


def batch_masks(
    settings: MaskSettings, grid_hw: tuple[int, int], num_images: int, *, seed: int, step: int, own: range | None = None
) -> npt.NDArray[np.bool_]:
    """Masks of the global crops of a step, (G * images, N) bool, crop-major: a pure function of its arguments.

    num_images is the global batch; `own` are the positions in it whose masks are wanted (all when None), so that the masks do
    not depend on the number of ranks. `int(G * num_images * probability)` crops are masked. Their ratios are stratified: the
    range is cut into as many equal strata and each crop draws from its own, so that the masked total hardly varies between
    steps. Which crop gets which stratum is one draw per step; every mask then is a draw of its own crop's.
    """
    own = range(num_images) if own is None else own
    num_crops, num_patches = NUM_GLOBAL_CROPS * num_images, grid_hw[0] * grid_hw[1]
    num_with_mask = int(num_crops * settings.mask_sample_probability)
    rng = _generator(seed, step, 0)
    edges = np.linspace(*settings.mask_ratio_min_max, num_with_mask + 1)
    ratios = np.zeros(num_crops)
    ratios[rng.permutation(num_crops)[:num_with_mask]] = edges[:-1] + rng.random(num_with_mask) * np.diff(edges)
    masks = np.zeros((NUM_GLOBAL_CROPS * len(own), num_patches), dtype=np.bool_)
    crops = [number * num_images + image for number in range(NUM_GLOBAL_CROPS) for image in own]
    for row, crop in enumerate(crops):
        num_masked = int(num_patches * ratios[crop])
        if num_masked:
            masks[row] = block_mask(grid_hw, num_masked, _generator(seed, step, 1 + crop)).reshape(-1)
    return masks


def _generator(seed: int, step: int, draw: int) -> np.random.Generator:
    # Every number as two words: SeedSequence pads with zeros, so keys of different lengths could be the same stream.
    words = np.array((_MASK_STREAM, seed, step, draw), np.uint64).view(np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words.tolist())))
