"""What a loader hands over when the crops are cut on the training device, and the way from either kind of batch to crops."""

from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.data.augment import normalise
from heliostat.data.batch import Batch
from heliostat.data.config import CropsConfig
from heliostat.data.crop_parameters import ParameterArrays
from heliostat.data.device_augment import RawImages, augment_on_device

# Shapes: B images, G global crops, N patches of a global crop.


@dataclass(frozen=True)
class RawBatch:
    """One step's decoded images of one rank with the parameters of their crops, rows crop-major. masks: (G*B, N) bool."""

    images: RawImages
    parameters: ParameterArrays
    masks: Tensor
    image_ids: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """B."""
        return len(self.image_ids)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "RawBatch":
        """Move pixels and masks; parameters and ids stay on the host."""
        masks = self.masks.to(device, non_blocking=non_blocking)
        return RawBatch(self.images.to(device, non_blocking), self.parameters, masks, self.image_ids)


def crops_of(batch: Batch | RawBatch, config: CropsConfig, device: torch.device) -> Batch:
    """The normalised float32 crops of a batch, on the device.

    Decoded images are cut there in half precision on GPUs, which holds the same tolerance (tests/data/test_device_augment.py).
    """
    batch = batch.to(device)
    if isinstance(batch, Batch):
        return normalise(batch, config)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    global_crops, local_crops = augment_on_device(batch.images, batch.parameters, config, dtype=dtype)
    return Batch(global_crops, local_crops, batch.masks, batch.image_ids)
