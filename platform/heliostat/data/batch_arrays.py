"""The memory of one batch while threads fill it; each image is written to its own slots by its own thread."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from heliostat.data.augment import Pixels
from heliostat.data.batch import Batch
from heliostat.data.config import NUM_GLOBAL_CROPS, CropsConfig
from heliostat.data.quarantine import Rejection

# Shapes: B images of this rank, G global crops, L local crops, C channels, H W global side, h w local side, N patches.


@dataclass(frozen=True)
class BatchArrays:
    """Crops (G*B, C, H, W) and (L*B, C, h, w) uint8, masks (G*B, N) bool, and what is known of the B images."""

    global_crops: npt.NDArray[np.uint8]
    local_crops: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]
    image_ids: list[str]
    rejections: list[Rejection] = field(default_factory=list)

    def write(self, slot: int, crops: tuple[Pixels, Pixels], image_id: str) -> None:
        """Lay the crops of one image, (G, H, W, C) and (L, h, w, C), into its slots."""
        size = len(self.image_ids)
        for target_NCHW, crops_HWC in zip((self.global_crops, self.local_crops), crops, strict=True):
            for number, crop_HWC in enumerate(crops_HWC):
                target_NCHW[number * size + slot] = crop_HWC.transpose(2, 0, 1)
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


def new_arrays(num_images: int, crops: CropsConfig, num_patches: int, *, pinned: bool) -> BatchArrays:
    """Memory for one batch; pinned memory lets a GPU fetch it while it computes."""
    num_global = NUM_GLOBAL_CROPS * num_images
    side, local_side = crops.global_crops_size, crops.local_crops_size

    def empty(*shape: int) -> npt.NDArray[np.uint8]:
        if pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return np.empty(shape, np.uint8)

    return BatchArrays(
        empty(num_global, 3, side, side),
        empty(crops.local_crops_number * num_images, 3, local_side, local_side),
        empty(num_global, num_patches).view(np.bool_),
        [""] * num_images,
    )
