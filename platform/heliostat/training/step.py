"""One training step as a function: what the loop runs, what a test or a notebook can run on tensors of its own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.data.batch import Batch
from heliostat.errors import DataError
from heliostat.training.engine import Engine, not_finite
from heliostat.training.method import Method, TeacherTargets
from heliostat.training.param_groups import apply_step_values
from heliostat.training.schedules import StepValues

# Shapes: B images, D width.


@dataclass(frozen=True)
class StepResult:
    """What a step computed, detached.

    losses are unweighted (`koleo` and `ibot` as they enter the total before their weights); total is the scalar that was
    backpropagated; logged follows the reference's logging convention. features are student cls tokens (B, D) by network.
    gradient_norms, before clipping, are by sub-module. not_finite names what was not finite: then nothing was changed.
    """

    losses: dict[str, Tensor]
    total: Tensor
    logged: dict[str, Tensor]
    teacher: TeacherTargets
    features: dict[str, Tensor]
    gradient_norms: dict[str, float]
    not_finite: list[str]


def train_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    engine: Engine,
    batch: Batch,
    values: StepValues,
) -> StepResult:
    """Forward, backward, clip, optimizer step and teacher update for one batch of normalised crops on the method's device.

    When a loss or a gradient norm is not finite on any rank, no rank touches optimizer, teacher or centres. Stochastic depth
    draws from torch's global generator: seed it first for a step that can be repeated. Raises DataError for crops in bytes.
    """
    if not batch.global_crops.is_floating_point():
        raise DataError(f"crops are {batch.global_crops.dtype}; normalise them first (heliostat.data.augment.normalise)")
    apply_step_values(optimizer.param_groups, values)
    with engine.autocast():
        teacher = method.teacher_targets(batch, values.teacher_temp)
        student = method.student_outputs(batch)
        losses = method.losses(student, teacher, batch)
        total = method.weighted_sum(losses)
    bad = not_finite({**losses, "total": total}, engine.world)
    norms: dict[str, float] = {}
    if not bad:
        engine.backward(total)
        norms = engine.clip_and_step()
        bad = [f"gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm)]
    if bad:
        engine.discard()
    else:
        method.update_teacher(values.momentum)
    return StepResult(
        losses={name: loss.detach() for name, loss in losses.items()},
        total=total.detach(),
        logged=method.logged(losses),
        teacher=teacher,
        features=method.features(student),
        gradient_norms=norms,
        not_finite=bad,
    )
