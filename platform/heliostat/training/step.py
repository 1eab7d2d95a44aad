"""One training step as a function: what the loop runs, what a test or a notebook can run on tensors of its own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.data.batch import Batch
from heliostat.errors import DataError
from heliostat.training.engine import Engine
from heliostat.training.method import Method, TeacherTargets
from heliostat.training.param_groups import apply_step_values
from heliostat.training.schedules import StepValues
from heliostat.training.student_pass import PassResult, split_passes
from heliostat.training.world import not_finite

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
    *,
    images_per_pass: int = 0,
) -> StepResult:
    """Forward, backward, clip, optimizer step and teacher update for one batch of normalised crops on the method's device.

    With images_per_pass the batch goes through in equal passes whose gradients are averaged: targets are assigned over the
    whole batch all the same, KoLeo compares the images of one pass. When a loss or a gradient norm is not finite on any rank,
    no rank touches optimizer, teacher or centres. Stochastic depth draws from torch's global generator: seed it first for a
    step that can be repeated. Raises DataError for crops in bytes.
    """
    if not batch.global_crops.is_floating_point():
        raise DataError(f"crops are {batch.global_crops.dtype}; normalise them first (heliostat.data.augment.normalise)")
    apply_step_values(optimizer.param_groups, values)
    with engine.autocast():
        teacher = method.teacher_targets(batch, values.teacher_temp, images_per_pass)
    passes = split_passes(method, batch, teacher, images_per_pass)
    results: list[PassResult] = []
    totals: list[Tensor] = []
    bad: list[str] = []
    for number, (part, targets) in enumerate(passes, start=1):
        with engine.autocast():
            result = engine.student_pass(part, targets)
            total = method.weighted_sum(result.losses)
        bad = not_finite({**result.losses, "total": total}, engine.world)
        results.append(_detached(result))
        totals.append(total.detach())
        if bad:
            break
        engine.backward(total / len(passes), is_last=number == len(passes))
    norms: dict[str, float] = {}
    if not bad:
        norms = engine.clip_and_step()
        bad = [f"gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm)]
    if bad:
        engine.discard()
    else:
        method.update_teacher(values.momentum, engine.move_average)
    losses = _mean_losses(results)
    return StepResult(
        losses=losses,
        total=torch.stack(totals).mean(),
        logged=method.logged(losses),
        teacher=teacher,
        features={name: torch.cat([result.features[name] for result in results]) for name in results[0].features},
        gradient_norms=norms,
        not_finite=bad,
    )


def _detached(result: PassResult) -> PassResult:
    return PassResult({name: loss.detach() for name, loss in result.losses.items()}, result.features)


def _mean_losses(results: list[PassResult]) -> dict[str, Tensor]:
    """Means over the passes."""
    return {name: torch.stack([result.losses[name] for result in results]).mean() for name in results[0].losses}
