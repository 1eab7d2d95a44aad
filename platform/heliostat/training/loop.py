"""The training loop: the same one in this process, under Ray Train, and for pre-training and distillation.

Everything random in a step is a function of (seed, step, rank), so a run that goes on from a checkpoint computes what the
uninterrupted run would have computed.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heliostat.data.augment import normalise
from heliostat.data.batch import Batch
from heliostat.data.loader import ImageLoader
from heliostat.errors import NonFiniteLossError
from heliostat.models.weights import load_state
from heliostat.storage import Store
from heliostat.training.checkpoint import Checkpoint, newest_checkpoint, read_history, write_checkpoint
from heliostat.training.diagnostics import feature_std, prototype_usage, rankme, teacher_entropy
from heliostat.training.distillation import Distillation
from heliostat.training.engine import Engine, World, all_finite, refuse_different_steps
from heliostat.training.method import SelfDistillation, StudentOutputs, TeacherTargets
from heliostat.training.param_groups import apply_step_values
from heliostat.training.recipe import TrainingConfig
from heliostat.training.schedules import StepValues, step_values

Method = SelfDistillation | Distillation
Report = Callable[[Mapping[str, float], int], None]


@dataclass
class LoopState:
    """What changes while the loop runs."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    window_started: float = field(default_factory=time.perf_counter)
    window_images: int = 0
    window_wait_seconds: float = 0.0


@dataclass(frozen=True)
class Trainer:
    """Everything a run needs; `fit` drives it."""

    method: Method
    optimizer: torch.optim.Optimizer
    engine: Engine
    loader: ImageLoader
    config: TrainingConfig
    files: Store
    world: World
    report: Report
    notify: Callable[[str], None]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step, so that stochastic depth does not depend on what ran before."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def fit(trainer: Trainer) -> list[dict[str, float]]:
    """Train from the newest checkpoint to the last step; returns the metric records of the whole run.

    Raises NonFiniteLossError when the loss stays NaN or infinite; what the loader raises goes through.
    """
    state = _restore(trainer)
    first, total = state.step, trainer.config.train.steps
    with closing(trainer.loader.iterate(first, total - first)) as batches:
        for batch in batches:
            one_step(trainer, state, batch)
            if state.step % trainer.config.train.checkpoint_every_steps == 0 and state.step < total:
                _save(trainer, state)
    if first < total:  # the last checkpoint of a run that only lacks its files holds the end of the history: leave it
        _save(trainer, state)
    return read_history(trainer.files, total) if trainer.world.is_main else []


def one_step(trainer: Trainer, state: LoopState, batch: Batch) -> None:
    """Forward, backward, optimizer and teacher for one batch; a step whose loss or gradient is not finite is skipped."""
    config, world = trainer.config, trainer.world
    values = _values(trainer, state.step)
    apply_step_values(trainer.optimizer.param_groups, values)
    seed_step(config.train.seed, state.step, world.rank)
    batch = normalise(batch.to(world.device), config.crops)
    forward = _forward(trainer, batch, values)
    bad = all_finite({**forward.losses, "total": forward.total}, world)
    norms: dict[str, float] = {}
    if not bad:
        trainer.engine.backward(forward.total)
        norms = trainer.engine.clip_and_step()
        bad = [f"gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm)]
    if bad:
        _skip(trainer, state, bad)
    else:
        trainer.method.update_teacher(values.momentum)
        state.skipped_in_a_row = 0
    state.step += 1
    state.window_images += config.train.global_batch_size
    if state.step % config.train.log_every_steps == 0 or state.step == config.train.steps:
        numbers = _numbers(trainer.method.logged(forward.losses), values, norms)
        _record(trainer, state, numbers | _diagnostics(forward))


def _values(trainer: Trainer, step: int) -> StepValues:
    config = trainer.config
    return step_values(
        step,
        optim=config.optim,
        teacher=config.method.teacher,
        total_steps=config.train.steps,
        global_batch_size=config.train.global_batch_size,
    )


@dataclass(frozen=True)
class _Forward:
    """What a step computed before its gradients."""

    teacher: TeacherTargets
    student: StudentOutputs
    losses: dict[str, Tensor]
    total: Tensor


def _forward(trainer: Trainer, batch: Batch, values: StepValues) -> _Forward:
    method = trainer.method
    with trainer.engine.autocast():
        teacher = method.teacher_targets(batch, values.teacher_temp)
        student = method.student_outputs(batch)
        losses = method.losses(student, teacher, batch)
        return _Forward(teacher, student, losses, method.weighted_sum(losses))


def _diagnostics(forward: _Forward) -> dict[str, float]:
    """Signs of collapse on the main rank's images: what the teacher says, how far the student's images lie apart."""
    targets_RK = forward.teacher.cls_GBK.flatten(0, 1)
    features_BD = forward.student.global_cls_GBD[0].detach()
    return {
        "train/teacher_entropy": float(teacher_entropy(targets_RK)),
        "train/prototype_usage": float(prototype_usage(targets_RK)),
        "train/feature_std": float(feature_std(features_BD)),
        "train/rankme": float(rankme(features_BD)),
    }


def _skip(trainer: Trainer, state: LoopState, bad: list[str]) -> None:
    trainer.engine.discard()
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    where = f"step {state.step}: not finite: {', '.join(bad)}"
    if state.skipped_in_a_row > trainer.config.train.max_nonfinite_steps:
        raise NonFiniteLossError(
            f"{where}; {state.skipped_in_a_row} steps in a row, train.max_nonfinite_steps is "
            f"{trainer.config.train.max_nonfinite_steps}; lower optim.lr or lengthen optim.warmup_steps"
        )
    trainer.notify(f"{where}; the step is skipped, student and teacher are untouched")


def _numbers(logged: Mapping[str, Tensor], values: StepValues, norms: Mapping[str, float]) -> dict[str, float]:
    numbers = {f"train/{'loss' if name == 'total' else name}": float(value) for name, value in logged.items()}
    numbers["train/lr"] = values.lr
    numbers["train/weight_decay"] = values.weight_decay
    numbers["train/teacher_momentum"] = values.momentum
    numbers["train/teacher_temp"] = values.teacher_temp
    if norms:
        numbers["train/grad_norm"] = max(norms.values())
    return numbers


def _record(trainer: Trainer, state: LoopState, numbers: dict[str, float]) -> None:
    """Keep what is reproducible in the history; send that and the timings to the reporter."""
    statistics = trainer.loader.statistics()
    now = time.perf_counter()
    seconds = max(now - state.window_started, 1e-9)
    numbers["train/skipped_steps"] = float(state.skipped_steps)
    state.history.append({"step": state.step, **numbers})
    timings = {
        "train/images_per_second": state.window_images / seconds,
        "train/data_wait_ratio": min(1.0, (statistics.data_wait_seconds - state.window_wait_seconds) / seconds),
        "train/decode_failures": float(sum(statistics.decode_failures.values())),
        "train/step": float(state.step),
    }
    if trainer.world.is_main:
        trainer.report({**numbers, **timings}, state.step)
    state.window_started, state.window_images = now, 0
    state.window_wait_seconds = statistics.data_wait_seconds


def _save(trainer: Trainer, state: LoopState) -> None:
    if trainer.world.is_main:
        checkpoint = Checkpoint(
            state.step,
            dict(trainer.method.state_dict()),
            trainer.engine.optimizer_tensors(),
            {"skipped_steps": state.skipped_steps, "skipped_in_a_row": state.skipped_in_a_row},
        )
        write_checkpoint(trainer.files, checkpoint, state.history, keep=trainer.config.train.keep_checkpoints)
    state.history = []


def _restore(trainer: Trainer) -> LoopState:
    checkpoint = newest_checkpoint(trainer.files, trainer.notify)
    refuse_different_steps(checkpoint.step if checkpoint else 0, trainer.world)
    if checkpoint is None:
        return LoopState()
    load_state(trainer.method, checkpoint.model, f"checkpoint of step {checkpoint.step}")
    trainer.engine.load_optimizer_tensors(checkpoint.optimizer)
    if trainer.world.is_main:
        trainer.notify(f"resuming at step {checkpoint.step} of {trainer.config.train.steps}")
    return LoopState(checkpoint.step, checkpoint.state["skipped_steps"], checkpoint.state["skipped_in_a_row"])
