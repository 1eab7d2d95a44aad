"""Distillation: a small student learns from a frozen large teacher with the losses of pre-training (arXiv 2304.07193, sec. 5).

Differences from pre-training, all of the paper or its authors: the teacher is frozen; nothing is masked for the student and the
ibot loss covers all patch tokens of both global crops (dinov2 issue 176); no stochastic depth; a moving average of the student,
which training never reads, is the final model (dinov2 issue 96).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heliostat.data.batch import Batch
from heliostat.errors import ConfigError
from heliostat.models.config import BackboneConfig
from heliostat.models.vit import VisionTransformer
from heliostat.models.weights import load_state, submodule_state
from heliostat.training.config import MethodConfig
from heliostat.training.losses import TargetAssignment
from heliostat.training.method import (
    StudentOutputs,
    TeacherTargets,
    build_network,
    compare,
    logged,
    move_average,
    network_logits_of_globals,
    packed_student_outputs,
    uniform_losses,
    weighted_sum,
)


class Distillation(nn.Module):
    """Frozen teacher, student and the student's average. State keys are `teacher.*`, `student.*`, `average.*` and the centres.

    Teacher and student share the method's head configuration, since they are compared prototype by prototype.
    """

    def __init__(self, *, teacher: BackboneConfig, student: BackboneConfig, method: MethodConfig) -> None:
        super().__init__()
        if teacher.patch_size != student.patch_size:
            raise ConfigError(
                f"the student's patch_size {student.patch_size} differs from the teacher's {teacher.patch_size}; "
                f"patch tokens are compared place by place, use {teacher.patch_size}"
            )
        self.method = method
        self.teacher = build_network(teacher, method)
        self.student = build_network(student, method)
        self.average = build_network(student, method)
        self.average.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.average.requires_grad_(False)
        self.dino_targets = TargetAssignment(method.dino.head_n_prototypes, method.centering)
        self.ibot_targets = TargetAssignment(method.ibot_head.out_dim, method.centering)

    @property
    def final_backbone(self) -> VisionTransformer:
        """The backbone that a run leaves behind: the student's moving average."""
        return self.average.backbone

    def load_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Take the teacher (`teacher.*`) of a self-distillation state; raises CheckpointError if it does not fit.

        Centres (`*_targets.*`) are taken where both sides have them. A centre that the state lacks starts at 0 and is found
        within tens of steps, since it moves a tenth of the way at each.
        """
        load_state(self.teacher, submodule_state(state, "teacher"), "the teacher's state")
        for name, targets in (("dino_targets", self.dino_targets), ("ibot_targets", self.ibot_targets)):
            centre = submodule_state(state, name)
            if centre and targets.state_dict():
                load_state(targets, centre, f"the teacher's {name}")

    def forward(self, batch: Batch, teacher_temp: float) -> dict[str, Tensor]:
        """The losses of a batch; wrappers such as DistributedDataParallel hook into this call."""
        teacher = self.teacher_targets(batch, teacher_temp)
        student = self.student_outputs(batch)
        return self.losses(student, teacher, batch)

    @torch.no_grad()
    def teacher_targets(self, batch: Batch, teacher_temp: float) -> TeacherTargets:
        """Targets of the cls tokens and of every patch token of the global crops."""
        cls_RK, patches_MK = network_logits_of_globals(self.teacher, batch, self._rows(batch))
        cls_RK = self.dino_targets(cls_RK, teacher_temp)
        if self.method.ibot.loss_weight > 0:
            patches_MK = self.ibot_targets(patches_MK, teacher_temp)
        return TeacherTargets(cls_RK.view(2, -1, cls_RK.shape[1]), patches_MK)

    def student_outputs(self, batch: Batch) -> StudentOutputs:
        """One packed forward over all crops, none of them masked."""
        # Masks of False instead of None keep mask_token in the graph, so that every parameter has a gradient on every rank.
        return packed_student_outputs(self.student, batch, torch.zeros_like(batch.masks), self._rows(batch))

    def losses(self, student: StudentOutputs, teacher: TeacherTargets, batch: Batch) -> dict[str, Tensor]:
        """Unweighted losses by name; see `training.method.compare`."""
        return compare(student, teacher, torch.ones_like(batch.masks), self.method)

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar to backpropagate."""
        return weighted_sum(losses, self.method)

    def logged(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Detached losses in the reference's logging convention, and their `total`."""
        return logged(losses, self.method)

    def uniform_losses(self, num_local_crops: int) -> dict[str, float]:
        """What `logged` shows while the student's outputs are uniform: a run that stays there has collapsed."""
        return uniform_losses(self.method, num_local_crops, masked_crop_ratio=1.0)

    def update_teacher(self, momentum: float) -> None:
        """Move the student's average; the teacher itself is frozen. The centres keep following the teacher's outputs."""
        move_average(self.average, self.student, momentum)
        self.dino_targets.commit()
        self.ibot_targets.commit()

    def _rows(self, batch: Batch) -> Tensor:
        num_rows = batch.masks.numel() if self.method.ibot.loss_weight > 0 else 0
        return torch.arange(num_rows, device=batch.masks.device)
