"""The memory of one batch while threads fill it; each image is written to its own slots by its own thread."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from heliostat.data.augment import Pixels, multi_crop_into
from heliostat.data.batch import Batch
from heliostat.data.config import NUM_GLOBAL_CROPS, CropsConfig
from heliostat.data.crop_parameters import draw_parameters_batch
from heliostat.data.device_augment import RawImages
from heliostat.data.quarantine import Rejection
from heliostat.data.raw_batch import RawBatch

# Shapes: B images of this rank, G global crops, L local crops, C channels, H W global side, h w local side, N patches.

RandomKey = tuple[int, int, int]  # seed, epoch, image number


class BatchArrays(Protocol):
    """What a batch is put together in. masks: (G*B, N) bool; rejections: what was turned away on the way to its images."""

    masks: npt.NDArray[np.bool_]
    rejections: list[Rejection]

    def take(self, slot: int, pixels: Pixels, key: RandomKey, image_id: str) -> None:
        """Put one decoded image into its slot; called from several threads for different slots."""

    def batch(self) -> Batch | RawBatch:
        """The batch; called when all slots are filled."""


@dataclass
class CropArrays:
    """Crops that are cut on the CPU: (G*B, C, H, W) and (L*B, C, h, w) uint8."""

    crops: CropsConfig
    global_crops: npt.NDArray[np.uint8]
    local_crops: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]
    image_ids: list[str]
    rejections: list[Rejection] = field(default_factory=list)

    def take(self, slot: int, pixels: Pixels, key: RandomKey, image_id: str) -> None:
        """Cut the crops straight into the batch."""
        by_crop = [
            crops_NCHW.reshape(-1, len(self.image_ids), *crops_NCHW.shape[1:])[:, slot]
            for crops_NCHW in (self.global_crops, self.local_crops)
        ]
        multi_crop_into(pixels, self.crops, key, *by_crop)
        self.image_ids[slot] = image_id

    def write_slice(self, start: int, crops_and_masks: Sequence[npt.NDArray[Any]], image_ids: Sequence[str]) -> None:
        """Lay a batch of fewer images, as its global crops, local crops and masks, into the slots from `start`."""
        size, part = len(self.image_ids), len(image_ids)
        for target, rows in zip((self.global_crops, self.local_crops, self.masks), crops_and_masks, strict=True):
            by_crop = target.reshape(-1, size, *target.shape[1:])  # a view: targets are contiguous
            by_crop[:, start : start + part] = rows.reshape(-1, part, *target.shape[1:])
        self.image_ids[start : start + part] = image_ids

    def batch(self) -> Batch:
        """The batch; the memory is shared, not copied."""
        return Batch(
            torch.from_numpy(self.global_crops),
            torch.from_numpy(self.local_crops),
            torch.from_numpy(self.masks),
            tuple(self.image_ids),
        )


@dataclass
class RawArrays:
    """Decoded images whose crops are cut on the training device."""

    crops: CropsConfig
    masks: npt.NDArray[np.bool_]
    image_ids: list[str]
    pixels: list[Pixels]
    keys: list[RandomKey]
    pinned: bool
    rejections: list[Rejection] = field(default_factory=list)

    def take(self, slot: int, pixels: Pixels, key: RandomKey, image_id: str) -> None:
        """Keep the pixels."""
        self.pixels[slot], self.keys[slot], self.image_ids[slot] = pixels, key, image_id

    def batch(self) -> RawBatch:
        """One buffer with all pixels, and the parameters of their crops."""
        sizes = [(pixels.shape[0], pixels.shape[1]) for pixels in self.pixels]
        return RawBatch(
            RawImages.pack(self.pixels, pin_memory=self.pinned),
            draw_parameters_batch(sizes, self.crops, self.keys),
            torch.from_numpy(self.masks),
            tuple(self.image_ids),
        )


def new_arrays(num_images: int, crops: CropsConfig, num_patches: int, *, pinned: bool) -> BatchArrays:
    """Memory for one batch; pinned memory lets a GPU fetch it while it computes."""
    if crops.cut_on == "cpu":
        return new_crop_arrays(num_images, crops, num_patches, pinned=pinned)
    masks = _empty(NUM_GLOBAL_CROPS * num_images, num_patches, pinned=pinned).view(np.bool_)
    nothing = np.empty((0, 0, 3), np.uint8)
    return RawArrays(crops, masks, [""] * num_images, [nothing] * num_images, [(0, 0, 0)] * num_images, pinned)


def new_crop_arrays(num_images: int, crops: CropsConfig, num_patches: int, *, pinned: bool) -> CropArrays:
    """Memory for one batch of crops that are cut on a CPU."""
    num_global, num_local = NUM_GLOBAL_CROPS * num_images, crops.local_crops_number * num_images
    side, local_side = crops.global_crops_size, crops.local_crops_size
    return CropArrays(
        crops,
        _empty(num_global, 3, side, side, pinned=pinned),
        _empty(num_local, 3, local_side, local_side, pinned=pinned),
        _empty(num_global, num_patches, pinned=pinned).view(np.bool_),
        [""] * num_images,
    )


def _empty(*shape: int, pinned: bool) -> npt.NDArray[np.uint8]:
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
    return np.empty(shape, np.uint8)
