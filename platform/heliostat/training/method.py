"""DINOv2's self-distillation: a student learns from a slowly moving average of itself (arXiv 2304.07193, section 4)."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from heliostat.data.batch import Batch
from heliostat.errors import TrainingError
from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.heads import ProjectionHead
from heliostat.models.vit import VisionTransformer
from heliostat.training.config import MethodConfig
from heliostat.training.losses import TargetAssignment, dino_global_loss, dino_local_loss, ibot_loss, koleo_loss

# Shapes: B images, G = 2 global crops, L local crops, C = G*B crops, N patches of a global crop, M masked patches, D width,
# R rows of any kind, K prototypes.


@dataclass(frozen=True)
class TeacherTargets:
    """Distributions over prototypes that the student is compared with, float32, without gradient."""

    cls_GBK: Tensor
    patches_MK: Tensor


@dataclass(frozen=True)
class StudentOutputs:
    """The student's logits; global_cls_GBD are its cls tokens before the head; rows_M are the masked patches' places in C*N."""

    global_cls_GBD: Tensor
    global_GBK: Tensor
    local_LBK: Tensor
    patches_MK: Tensor
    rows_M: Tensor


class Network(nn.Module):
    """A backbone with its heads; ibot_head exists only where patch tokens do not share the DINO head."""

    def __init__(self, backbone: VisionTransformer, dino_head: HeadConfig, ibot_head: HeadConfig | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = ProjectionHead(backbone.embed_dim, dino_head)
        self.ibot_head = ProjectionHead(backbone.embed_dim, ibot_head) if ibot_head is not None else None

    def logits(self, cls_RD: Tensor, patches_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of cls tokens and of patch tokens; a shared head is called once, a separate one also when M = 0."""
        if self.ibot_head is not None:
            return self.dino_head(cls_RD), self.ibot_head(patches_MD)
        cls_RK, patches_MK = self.dino_head(torch.cat([cls_RD, patches_MD])).split([len(cls_RD), len(patches_MD)])
        return cls_RK, patches_MK


def build_network(backbone: BackboneConfig, method: MethodConfig, *, drop_path_rate: float = 0.0) -> Network:
    """A network with the heads that the method asks for."""
    has_own_head = method.ibot.separate_head and method.ibot.loss_weight > 0
    vit = VisionTransformer(backbone, drop_path_rate=drop_path_rate)
    return Network(vit, method.dino.head, method.ibot.head if has_own_head else None)


def masked_rows(masks_CN: Tensor) -> Tensor:
    """Places of the masked patches among all C*N patches, (M,). Costs one synchronisation with the device."""
    return masks_CN.flatten().nonzero().flatten()


MoveAverage = Callable[[nn.Module, nn.Module, float], None]
"""(average, source, momentum): average = momentum * average + (1 - momentum) * source, wherever their weights lie."""


class Method(Protocol):
    """What a training step asks of a method: one or several networks learn from the targets of one teacher.

    Networks go by name, the only one is called "". Loss names of several networks begin with `<name>/`.
    """

    method: MethodConfig

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters, as of a module."""

    def state_dict(self, *, keep_vars: bool) -> dict[str, Tensor]:
        """All tensors, as of a module."""

    def is_frozen(self, name: str) -> bool:
        """Whether a tensor of the state never changes in a run, like those of a distillation's teacher."""

    @property
    def networks(self) -> dict[str, Network]:
        """The networks that are trained."""

    @property
    def results(self) -> dict[str, Network]:
        """The networks that a run leaves behind: moving averages of the trained ones."""

    @property
    def teachers(self) -> list[Network]:
        """The networks that compute targets and are not trained."""

    def teacher_targets(self, batch: Batch, teacher_temp: float, images_per_pass: int = 0) -> TeacherTargets:
        """Distributions to learn, without gradient, assigned over the whole batch; its images go through in passes (0: one)."""

    def loss_rows(self, batch: Batch) -> Tensor:
        """Places (M,) among all C*N patches of the global crops of those in the patch loss, rising."""

    def student_outputs(self, batch: Batch) -> Any:
        """What the trained networks say about the batch."""

    def losses(self, student: Any, teacher: TeacherTargets, batch: Batch) -> dict[str, Tensor]:
        """Unweighted losses by name."""

    def features(self, student: Any) -> dict[str, Tensor]:
        """Cls tokens (B, D) of the first global crops before the head, by network, without gradient."""

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar to backpropagate."""

    def logged(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses as they are shown."""

    def uniform_losses(self, num_local_crops: int) -> dict[str, float]:
        """What `logged` shows of one network while its outputs are uniform."""

    def update_teacher(self, momentum: float, move: MoveAverage | None = None) -> None:
        """Move averages, by the engine's `move`, and centres after the optimizer's step."""


class SelfDistillation(nn.Module):
    """Student and teacher of pre-training. State keys are `student.*`, `teacher.*` and, with centering, the centres."""

    def __init__(self, backbone: BackboneConfig, method: MethodConfig) -> None:
        super().__init__()
        self.method = method
        self.student = build_network(backbone, method, drop_path_rate=method.drop_path_rate)
        self.teacher = build_network(backbone, method)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.dino_targets = TargetAssignment(method.dino.head_n_prototypes, method.centering)
        self.ibot_targets = TargetAssignment(method.ibot_head.out_dim, method.centering)

    @property
    def networks(self) -> dict[str, Network]:
        """The student."""
        return {"": self.student}

    @property
    def results(self) -> dict[str, Network]:
        """The teacher."""
        return {"": self.teacher}

    def forward(self, batch: Batch, teacher_temp: float) -> dict[str, Tensor]:
        """The losses of a batch."""
        teacher = self.teacher_targets(batch, teacher_temp)
        return self.losses(self.student_outputs(batch), teacher, batch)

    @property
    def teachers(self) -> list[Network]:
        """The teacher."""
        return [self.teacher]

    def is_frozen(self, name: str) -> bool:
        """Nothing is: the teacher follows the student."""
        return False

    @torch.no_grad()
    def teacher_targets(self, batch: Batch, teacher_temp: float, images_per_pass: int = 0) -> TeacherTargets:
        """Targets from unmasked global crops; patches_MK at the places that are masked for the student."""
        cls_RK, patches_MK = network_logits_of_globals(self.teacher, batch, self.loss_rows(batch), images_per_pass)
        cls_RK = self.dino_targets(cls_RK, teacher_temp)
        if self.method.ibot.loss_weight > 0:
            patches_MK = self.ibot_targets(patches_MK, teacher_temp)
        return TeacherTargets(cls_RK.view(2, -1, cls_RK.shape[1]), patches_MK)

    def student_outputs(self, batch: Batch) -> StudentOutputs:
        """One packed forward over masked global crops and unmasked local crops, then the heads."""
        return packed_student_outputs(self.student, batch, batch.masks, self.loss_rows(batch))

    def losses(self, student: StudentOutputs, teacher: TeacherTargets, batch: Batch) -> dict[str, Tensor]:
        """Unweighted losses by name; see `compare`."""
        return compare(student, teacher, batch.masks, self.method)

    def features(self, student: StudentOutputs) -> dict[str, Tensor]:
        """Student cls tokens (B, D) of the first global crops."""
        return {"": student.global_cls_GBD[0].detach()}

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar to backpropagate."""
        return weighted_sum(losses, self.method)

    def logged(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Detached losses in the reference's logging convention, and their `total`."""
        return logged(losses, self.method)

    def uniform_losses(self, num_local_crops: int) -> dict[str, float]:
        """What `logged` shows, averaged over masks, while the student's outputs are uniform; stuck there it has collapsed."""
        return uniform_losses(self.method, num_local_crops, masked_crop_ratio=self.method.ibot.mask_sample_probability)

    def update_teacher(self, momentum: float, move: MoveAverage | None = None) -> None:
        """Move the teacher towards the student, and the centres towards the batch."""
        (move or move_average)(self.teacher, self.student, momentum)
        self.dino_targets.commit()
        self.ibot_targets.commit()

    def loss_rows(self, batch: Batch) -> Tensor:
        """Places (M,) of the patches that are masked for the student; none without a patch loss."""
        masks = batch.masks if self.method.ibot.loss_weight > 0 else torch.zeros_like(batch.masks)
        return masked_rows(masks)


def network_logits_of_globals(
    network: Network, batch: Batch, rows_M: Tensor, images_per_pass: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits of the unmasked global crops: cls tokens (C, K) and the patch tokens at rows_M, which rise.

    2 * images_per_pass crops go through at a time; 0 takes all at once.
    """
    num_crops, num_patches = batch.masks.shape
    per_pass = 2 * images_per_pass or num_crops
    found = []
    for first in range(0, num_crops, per_pass):
        features = network.backbone(batch.global_crops[first : first + per_pass])
        own_M = rows_M
        if per_pass < num_crops:
            own_M = rows_M[(rows_M >= first * num_patches) & (rows_M < (first + per_pass) * num_patches)] - first * num_patches
        found.append(network.logits(features.cls_BD, features.patches_BND.flatten(0, 1).index_select(0, own_M)))
    if len(found) == 1:
        return found[0]
    return torch.cat([cls for cls, _ in found]), torch.cat([patches for _, patches in found])


def packed_student_outputs(network: Network, batch: Batch, masks_CN: Tensor | None, rows_M: Tensor) -> StudentOutputs:
    """Outputs for all crops of a batch; masks_CN hides patches of the global crops, rows_M selects those that get logits."""
    num_global, num_local = batch.global_crops.shape[0], batch.local_crops.shape[0]
    crops = [batch.global_crops, batch.local_crops] if num_local else [batch.global_crops]
    features = network.backbone.forward_packed(crops, [masks_CN, None][: len(crops)])
    patches_MD = features[0].patches_BND.flatten(0, 1).index_select(0, rows_M)
    cls_RK, patches_MK = network.logits(torch.cat([group.cls_BD for group in features]), patches_MD)
    num_images, num_prototypes = num_global // 2, cls_RK.shape[1]
    return StudentOutputs(
        global_cls_GBD=features[0].cls_BD.view(2, num_images, -1),
        global_GBK=cls_RK[:num_global].view(2, num_images, -1),
        local_LBK=cls_RK[num_global:].view(num_local // num_images, num_images, num_prototypes),
        patches_MK=patches_MK,
        rows_M=rows_M,
    )


def compare(student: StudentOutputs, teacher: TeacherTargets, masks_CN: Tensor, method: MethodConfig) -> dict[str, Tensor]:
    """Losses before their weights: dino_global, dino_local (with local crops), ibot and koleo (where they have a weight).

    masks_CN tells which patches are in the ibot loss. koleo is the sum over both global crops.
    """
    num_local_crops = student.local_LBK.shape[0]
    temp = method.student_temp
    losses = {
        "dino_global": dino_global_loss(student.global_GBK, teacher.cls_GBK, num_local_crops=num_local_crops, student_temp=temp)
    }
    if num_local_crops:
        losses["dino_local"] = dino_local_loss(student.local_LBK, teacher.cls_GBK, student_temp=temp)
    if method.ibot.loss_weight > 0:
        num_crops, num_patches = masks_CN.shape
        weights_C = 1 / masks_CN.sum(1).clamp(min=1)
        weights_M = weights_C.index_select(0, student.rows_M // num_patches)
        losses["ibot"] = ibot_loss(student.patches_MK, teacher.patches_MK, weights_M, num_crops=num_crops, student_temp=temp)
    if method.dino.koleo_loss_weight > 0:
        first_BD, second_BD = student.global_cls_GBD
        far = method.dino.koleo_loss_distributed
        losses["koleo"] = koleo_loss(first_BD, distributed=far) + koleo_loss(second_BD, distributed=far)
    return losses


def loss_weights(method: MethodConfig) -> dict[str, float]:
    """Weight of each loss in the backpropagated total."""
    dino = method.dino.loss_weight
    return {
        "dino_global": dino,
        "dino_local": dino,
        "ibot": method.ibot.loss_weight,
        "koleo": method.dino.koleo_loss_weight,
    }


def weighted_sum(losses: Mapping[str, Tensor], method: MethodConfig) -> Tensor:
    """Sum of the losses times their weights; a prefix `<network>/` of a name does not matter."""
    weights = loss_weights(method)
    return torch.stack([weights[name.rpartition("/")[2]] * loss for name, loss in losses.items()]).sum()


def logged(losses: Mapping[str, Tensor], method: MethodConfig) -> dict[str, Tensor]:
    """DINOv2's logging convention, kept so that curves can be laid over published ones.

    The cls token losses as they are; half of ibot; half of koleo times its weight; `total` is the sum of these four, not the
    backpropagated scalar.
    """
    factors = {"dino_global": 1.0, "dino_local": 1.0, "ibot": 0.5, "koleo": 0.5 * method.dino.koleo_loss_weight}
    shown = {name: factors[name] * loss.detach() for name, loss in losses.items()}
    return {**shown, "total": torch.stack(list(shown.values())).sum()}


def uniform_losses(method: MethodConfig, num_local_crops: int, *, masked_crop_ratio: float) -> dict[str, float]:
    """Logged value of each cross-entropy when the student gives every prototype the same probability (ln K times its share)."""
    num_pairs = 2 * num_local_crops + 2
    log_prototypes = math.log(method.dino.head_n_prototypes)
    values = {"dino_global": log_prototypes * 2 / num_pairs}
    if num_local_crops:
        values["dino_local"] = log_prototypes * 2 * num_local_crops / num_pairs
    if method.ibot.loss_weight > 0:
        values["ibot"] = math.log(method.ibot_head.out_dim) * masked_crop_ratio / 2
    return values


@torch.no_grad()
def move_average(average: nn.Module, source: nn.Module, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * source over all parameters, in float32.

    Raises TrainingError when the average is kept in less: near momentum 1 its steps would round to nothing.
    """
    averages: list[Tensor] = list(average.parameters())
    if any(parameter.dtype != torch.float32 for parameter in averages):
        kind = next(parameter.dtype for parameter in averages if parameter.dtype != torch.float32)
        raise TrainingError(f"the moving average is kept in {kind}; keep it in torch.float32 and use autocast for speed")
    sources = [parameter.detach().float() for parameter in source.parameters()]
    torch._foreach_lerp_(averages, sources, 1 - momentum)
