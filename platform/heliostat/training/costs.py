"""What one training run computes: parameters, operations, images. From configurations alone (no torch)."""

from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.flops import (
    backbone_forward_flops,
    num_backbone_parameters,
    num_head_parameters,
    student_flops_per_image,
    teacher_flops_per_image,
)
from heliostat.training.config import MethodConfig
from heliostat.training.recipe import TrainingConfig


def heads(method: MethodConfig) -> list[HeadConfig]:
    """The heads of a network: one for all tokens, or one for cls tokens and one for patch tokens."""
    own = method.ibot.separate_head and method.ibot.loss_weight > 0
    return [method.dino.head, method.ibot.head] if own else [method.dino.head]


def num_parameters(backbone: BackboneConfig, method: MethodConfig) -> tuple[int, int]:
    """Parameters of (backbone, heads) of one network."""
    return num_backbone_parameters(backbone), sum(num_head_parameters(backbone.embed_dim, head) for head in heads(method))


def num_images(config: TrainingConfig) -> int:
    """Images seen, repeats included."""
    return config.train.steps * config.train.global_batch_size


def passes_of(num_images: int, images_per_pass: int) -> int:
    """The fewest passes of equal size that none has more than images_per_pass images (0: no limit)."""
    if images_per_pass == 0 or images_per_pass >= num_images:
        return 1
    return next(count for count in range(-(-num_images // images_per_pass), num_images + 1) if num_images % count == 0)


def masked_ratio(config: TrainingConfig, *, distills: bool) -> float:
    """Share of all patch tokens of the global crops that are in the iBOT loss: an expectation, or all in distillation."""
    ibot = config.method.ibot
    if ibot.loss_weight == 0:
        return 0.0
    return 1.0 if distills else ibot.mask_sample_probability * sum(ibot.mask_ratio_min_max) / 2


def flops_per_image(config: TrainingConfig, teacher: BackboneConfig | None = None) -> float:
    """FLOPs of one training step per image; what stochastic depth leaves out is not counted.

    `teacher` is the frozen teacher of a distillation, whose forward all students share; None in pre-training.
    """
    dino, ibot, crops = config.method.dino.head, config.method.ibot_head, config.crops
    share = masked_ratio(config, distills=teacher is not None)
    total = 0.0
    for student in config.backbones.values():
        total += student_flops_per_image(
            student,
            dino,
            ibot,
            global_size_pixels=crops.global_crops_size,
            local_size_pixels=crops.local_crops_size,
            num_local_crops=crops.local_crops_number,
            masked_ratio=share,
            drop_path_rate=0.0 if teacher is not None else config.method.drop_path_rate,
        )
    teaching = teacher or next(iter(config.backbones.values()))
    return total + teacher_flops_per_image(teaching, dino, ibot, global_size_pixels=crops.global_crops_size, masked_ratio=share)


def head_training_flops_per_image(config: TrainingConfig) -> float:
    """As `flops_per_image` while the backbone is frozen: its backward pass, as much as two forwards, is left out.

    For sections without stochastic depth.
    """
    crops, backward = config.crops, 0.0
    for student in config.backbones.values():
        backward += 2 * 2 * backbone_forward_flops(student, crops.global_crops_size)
        backward += 2 * crops.local_crops_number * backbone_forward_flops(student, crops.local_crops_size)
    return flops_per_image(config) - backward
