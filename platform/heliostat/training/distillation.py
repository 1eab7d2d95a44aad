"""Distillation: small students learn from a frozen large teacher with the losses of pre-training (arXiv 2304.07193, section 5).

Differences from pre-training, all of the paper or its authors: the teacher is frozen; nothing is masked for the student and the
ibot loss covers all patch tokens of both global crops (dinov2 issue 176); no stochastic depth; a moving average of the student,
which training never reads, is the final model (dinov2 issue 96). Several students share the teacher's forward, which costs more
than theirs together; each computes what it would compute alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heliostat.data.batch import Batch
from heliostat.errors import ConfigError
from heliostat.models.config import BackboneConfig
from heliostat.models.weights import load_state, submodule_state
from heliostat.training.config import MethodConfig
from heliostat.training.losses import TargetAssignment
from heliostat.training.method import (
    MoveAverage,
    Network,
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
    """Frozen teacher, students and their averages. State keys: `teacher.*`, `students.<n>.*`, `averages.<n>.*`, the centres.

    Teacher and students share the method's head configuration, since they are compared prototype by prototype. Every student is
    drawn from the same state of torch's generator, so it begins as it would alone.
    """

    def __init__(self, *, teacher: BackboneConfig, students: Mapping[str, BackboneConfig], method: MethodConfig) -> None:
        super().__init__()
        for backbone in students.values():
            if teacher.patch_size != backbone.patch_size:
                raise ConfigError(
                    f"the student's patch_size {backbone.patch_size} differs from the teacher's {teacher.patch_size}; "
                    f"patch tokens are compared place by place, use {teacher.patch_size}"
                )
        self.method = method
        self.names = tuple(students)
        generator = torch.get_rng_state()
        self.students = nn.ModuleList()
        self.averages = nn.ModuleList()
        for backbone in students.values():
            torch.set_rng_state(generator)
            self.students.append(build_network(backbone, method))
            self.averages.append(build_network(backbone, method))
            self.averages[-1].load_state_dict(self.students[-1].state_dict())
        self.teacher = build_network(teacher, method)
        self.teacher.requires_grad_(False)
        self.averages.requires_grad_(False)
        self.dino_targets = TargetAssignment(method.dino.head_n_prototypes, method.centering)
        self.ibot_targets = TargetAssignment(method.ibot_head.out_dim, method.centering)

    @property
    def networks(self) -> dict[str, Network]:
        """The students by name."""
        return dict(zip(self.names, self.students, strict=True))  # type: ignore[arg-type]

    @property
    def results(self) -> dict[str, Network]:
        """The students' moving averages by name."""
        return dict(zip(self.names, self.averages, strict=True))  # type: ignore[arg-type]

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
        """The losses of a batch."""
        teacher = self.teacher_targets(batch, teacher_temp)
        return self.losses(self.student_outputs(batch), teacher, batch)

    @property
    def teachers(self) -> list[Network]:
        """The frozen teacher."""
        return [self.teacher]

    def is_frozen(self, name: str) -> bool:
        """The teacher is: checkpoints leave it out."""
        return name.startswith("teacher.")

    @torch.no_grad()
    def teacher_targets(self, batch: Batch, teacher_temp: float, images_per_pass: int = 0) -> TeacherTargets:
        """Targets of the cls tokens and of every patch token of the global crops."""
        cls_RK, patches_MK = network_logits_of_globals(self.teacher, batch, self.loss_rows(batch), images_per_pass)
        cls_RK = self.dino_targets(cls_RK, teacher_temp)
        if self.method.ibot.loss_weight > 0:
            patches_MK = self.ibot_targets(patches_MK, teacher_temp)
        return TeacherTargets(cls_RK.view(2, -1, cls_RK.shape[1]), patches_MK)

    def student_outputs(self, batch: Batch) -> dict[str, StudentOutputs]:
        """One packed forward of each student over all crops, none of them masked."""
        # Masks of False instead of None keep mask_token in the graph, so that every parameter has a gradient on every rank.
        unmasked, rows_M = torch.zeros_like(batch.masks), self.loss_rows(batch)
        return {name: packed_student_outputs(network, batch, unmasked, rows_M) for name, network in self.networks.items()}

    def losses(self, student: Mapping[str, StudentOutputs], teacher: TeacherTargets, batch: Batch) -> dict[str, Tensor]:
        """Unweighted losses by name (see `training.method.compare`), `<student>/<loss>` where the student has a name."""
        everywhere = torch.ones_like(batch.masks)
        return {
            f"{name}/{loss}" if name else loss: value
            for name, outputs in student.items()
            for loss, value in compare(outputs, teacher, everywhere, self.method).items()
        }

    def features(self, student: Mapping[str, StudentOutputs]) -> dict[str, Tensor]:
        """Each student's cls tokens (B, D) of the first global crops."""
        return {name: outputs.global_cls_GBD[0].detach() for name, outputs in student.items()}

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar to backpropagate: the sum over the students, which have no parameter in common."""
        return weighted_sum(losses, self.method)

    def logged(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Detached losses in the reference's logging convention, and each student's `total`."""
        shown: dict[str, Tensor] = {}
        for name in self.names:
            prefix = f"{name}/" if name else ""
            own = {key.removeprefix(prefix): loss for key, loss in losses.items() if key.startswith(prefix)}
            shown |= {f"{prefix}{key}": value for key, value in logged(own, self.method).items()}
        return shown

    def uniform_losses(self, num_local_crops: int) -> dict[str, float]:
        """What `logged` shows of a student while its outputs are uniform: a run that stays there has collapsed."""
        return uniform_losses(self.method, num_local_crops, masked_crop_ratio=1.0)

    def update_teacher(self, momentum: float, move: MoveAverage | None = None) -> None:
        """Move the students' averages; the teacher itself is frozen. The centres keep following the teacher's outputs."""
        for average, student in zip(self.averages, self.students, strict=True):
            (move or move_average)(average, student, momentum)
        self.dino_targets.commit()
        self.ibot_targets.commit()

    def loss_rows(self, batch: Batch) -> Tensor:
        """Places (M,) of all patches of the global crops; none without a patch loss."""
        num_rows = batch.masks.numel() if self.method.ibot.loss_weight > 0 else 0
        return torch.arange(num_rows, device=batch.masks.device)
