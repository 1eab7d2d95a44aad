"""The part of a step that has gradients, as one module: what engines run and DeepSpeed wraps."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from heliostat.data.batch import Batch
from heliostat.training.costs import passes_of
from heliostat.training.method import Method, TeacherTargets

# Shapes: B images, C = 2 B global crops, N patches of a global crop, M patches in the patch loss, K prototypes, D width.


@dataclass(frozen=True)
class PassResult:
    """Unweighted losses by name, and cls tokens (B, D) of the first global crops by network, detached."""

    losses: dict[str, Tensor]
    features: dict[str, Tensor]


class StudentPass(nn.Module):
    """Forward of the trained networks and their losses. It owns the trained networks alone, neither teacher nor averages."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.networks = nn.ModuleList(method.networks.values())
        self._method = (method,)  # in a tuple: its teacher must not become a part of this module

    def forward(self, batch: Batch, teacher: TeacherTargets) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and features of one pass."""
        (method,) = self._method
        outputs = method.student_outputs(batch)
        return method.losses(outputs, teacher, batch), method.features(outputs)


def split_passes(
    method: Method, batch: Batch, teacher: TeacherTargets, images_per_pass: int
) -> list[tuple[Batch, TeacherTargets]]:
    """The batch in passes of equal size, each of at most images_per_pass images (0: one pass), with its targets.

    Targets were assigned over the whole batch before, so the pass size does not change them. Views where that is possible.
    """
    num_images = batch.global_crops.shape[0] // 2
    num_passes = passes_of(num_images, images_per_pass)
    if num_passes == 1:
        return [(batch, teacher)]
    size, rows_M = num_images // num_passes, method.loss_rows(batch)
    crops_M = rows_M // batch.masks.shape[1]
    found = []
    for first in range(0, num_images, size):
        images = slice(first, first + size)
        chosen_M = (crops_M % num_images >= first) & (crops_M % num_images < first + size)
        found.append(
            (
                replace(
                    batch,
                    global_crops=_of_images(batch.global_crops, images, num_images),
                    local_crops=_of_images(batch.local_crops, images, num_images),
                    masks=_of_images(batch.masks, images, num_images),
                    image_ids=batch.image_ids[images],
                ),
                TeacherTargets(teacher.cls_GBK[:, images], teacher.patches_MK[chosen_M]),
            )
        )
    return found


def _of_images(crops: Tensor, images: slice, num_images: int) -> Tensor:
    """Those of crops (k B, ...) in order of crop and image that belong to some images: (k b, ...)."""
    if not len(crops):
        return crops
    grouped = crops.view(-1, num_images, *crops.shape[1:])[:, images]
    return torch.flatten(grouped, 0, 1)
