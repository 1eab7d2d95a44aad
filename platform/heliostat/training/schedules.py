"""Every value that changes with the step, as pure functions of the step: a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass

from heliostat.training.config import OptimConfig, TeacherConfig


@dataclass(frozen=True)
class StepValues:
    """Scheduled values of one step.

    last_layer_lr is the learning rate of the prototypes; backbone_lr_factor is 1 unless a run starts from given weights.
    """

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    backbone_lr_factor: float = 1.0


def linear_warmup(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Straight line that is `start` at step 0 and `end` at step num_steps - 1 (both ends are steps, as in DINOv2)."""
    return start + (end - start) * step / max(num_steps - 1, 1)


def cosine(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step num_steps, and `end` from there on."""
    if step >= num_steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / num_steps))


def peak_lr(optim: OptimConfig, global_batch_size: int) -> float:
    """Learning rate after the warm-up, for a global batch in images."""
    return optim.lr * (math.sqrt(global_batch_size / 1024) if optim.scaling_rule == "sqrt_wrt_1024" else 1.0)


def learning_rate(step: int, optim: OptimConfig, *, total_steps: int, global_batch_size: int) -> float:
    """Linear from 0 during the warm-up, then a cosine to min_lr."""
    peak = peak_lr(optim, global_batch_size)
    if step < optim.warmup_steps:
        return linear_warmup(step, start=0.0, end=peak, num_steps=optim.warmup_steps)
    after = step - optim.warmup_steps
    return cosine(after, start=peak, end=optim.min_lr, num_steps=total_steps - optim.warmup_steps)


def backbone_factor(step: int, optim: OptimConfig, *, head_warmup_steps: int, lr_mult: float) -> float:
    """Factor on the learning rate for a backbone that starts from given weights.

    0 while the heads warm up, then a line of warmup_steps steps from 0 to lr_mult, so that it is never hit by a full step.
    Without a head warm-up the learning rate's own warm-up is that line.
    """
    if head_warmup_steps == 0:
        return lr_mult
    if step < head_warmup_steps:
        return 0.0
    return lr_mult * min(1.0, (step - head_warmup_steps) / max(optim.warmup_steps, 1))


def teacher_temperature(step: int, teacher: TeacherConfig) -> float:
    """Linear from warmup_teacher_temp to teacher_temp, then constant."""
    num_steps = teacher.warmup_teacher_temp_steps
    if step >= num_steps:
        return teacher.teacher_temp
    return linear_warmup(step, start=teacher.warmup_teacher_temp, end=teacher.teacher_temp, num_steps=num_steps)


def step_values(
    step: int,
    *,
    optim: OptimConfig,
    teacher: TeacherConfig,
    total_steps: int,
    global_batch_size: int,
    head_warmup_steps: int = 0,
    backbone_lr_mult: float = 1.0,
) -> StepValues:
    """All scheduled values of a step, counted from 0; the last two arguments are for runs that start from given weights."""
    lr = learning_rate(step, optim, total_steps=total_steps, global_batch_size=global_batch_size)
    return StepValues(
        lr=lr,
        last_layer_lr=0.0 if step < optim.freeze_last_layer_steps else lr,
        weight_decay=cosine(step, start=optim.weight_decay, end=optim.weight_decay_end, num_steps=total_steps),
        momentum=cosine(step, start=teacher.momentum_teacher, end=teacher.final_momentum_teacher, num_steps=total_steps),
        teacher_temp=teacher_temperature(step, teacher),
        backbone_lr_factor=backbone_factor(step, optim, head_warmup_steps=head_warmup_steps, lr_mult=backbone_lr_mult),
    )


def check_schedules(optim: OptimConfig, teacher: TeacherConfig, total_steps: int) -> None:
    """Refuse a run that would end inside one of its warm-ups; raises ValueError with the key in the section of a recipe."""
    limits = {
        "optim.warmup_steps": optim.warmup_steps,
        "optim.freeze_last_layer_steps": optim.freeze_last_layer_steps,
        "method.teacher.warmup_teacher_temp_steps": teacher.warmup_teacher_temp_steps,
    }
    for name, steps in limits.items():
        if steps >= total_steps:
            raise ValueError(f"{name} {steps} does not end within a run of {total_steps} steps; use at most {total_steps - 1}")
