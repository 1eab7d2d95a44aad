"""What a loader hands to a training step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.data.config import NUM_GLOBAL_CROPS
from heliostat.errors import DataError

# Shapes: B images, G global crops, L local crops, C channels, H W global side, h w local side, N patches of a global crop.


@dataclass(frozen=True)
class Batch:
    """One step's crops of one rank, crop-major: all first crops, then all second crops.

    global_crops: (G*B, C, H, W), uint8 from the loader, floating point after normalisation.
    local_crops: (L*B, C, h, w), same dtype; L may be 0.
    masks: (G*B, N) bool, True where the student sees the mask token.
    image_ids: the B image ids, in order.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    image_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise DataError where the tensors cannot belong to the same images."""
        rows, masks = self.global_crops.shape[0], self.masks
        if rows % NUM_GLOBAL_CROPS:
            raise DataError(
                f"{rows} global crops are not {NUM_GLOBAL_CROPS} for each image; give all first, then all second crops"
            )
        images = rows // NUM_GLOBAL_CROPS
        if self.local_crops.shape[0] % max(images, 1):
            raise DataError(f"{self.local_crops.shape[0]} local crops are not as many for each of {images} images")
        if masks.dtype != torch.bool or masks.dim() != 2 or masks.shape[0] != rows:
            raise DataError(
                f"masks are {masks.dtype} of shape {tuple(masks.shape)}; give bool, one row for each of {rows} global crops"
            )

    @property
    def num_images(self) -> int:
        """B, the number of images this batch was cut from."""
        return len(self.image_ids) or self.global_crops.shape[0] // 2

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Move the tensors; ids stay on the host."""
        return Batch(
            self.global_crops.to(device, non_blocking=non_blocking),
            self.local_crops.to(device, non_blocking=non_blocking),
            self.masks.to(device, non_blocking=non_blocking),
            self.image_ids,
        )
