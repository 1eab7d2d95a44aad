"""The training loop: the same one in this process, under Ray Train, and for pre-training and distillation.

Everything random in a step is a function of (seed, step, rank), so a run that goes on from a checkpoint computes what the
uninterrupted run would have computed.
"""

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from heliostat.data.batch import Batch
from heliostat.data.raw_batch import RawBatch, crops_of
from heliostat.errors import NonFiniteLossError, PreemptedError, StorageError
from heliostat.storage import storage_statistics
from heliostat.training.checkpoint import (
    read_history,
)
from heliostat.training.checkpoint_writer import CheckpointWriter, abandoned_on_error
from heliostat.training.collapse import Sign, collapse_signs
from heliostat.training.diagnostics import feature_std, kl_to_teacher, prototype_usage, rankme, teacher_entropy
from heliostat.training.distillation import Distillation
from heliostat.training.recipe import PretrainConfig, TrainingConfig
from heliostat.training.resume import computing, restore
from heliostat.training.schedules import StepValues, step_values
from heliostat.training.step import StepResult, train_step
from heliostat.training.teacher_files import has_teacher, is_evaluation_point, model_info, write_teacher
from heliostat.training.throughput import use_of_hardware
from heliostat.training.trainer import Ask, LoopState, Trainer


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step, so that stochastic depth does not depend on what ran before."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def fit(trainer: Trainer) -> list[dict[str, Any]]:
    """Train from the newest checkpoint to the last step; returns the metric records of the whole run.

    Raises NonFiniteLossError when the loss stays NaN or infinite, PreemptedError after a checkpoint when any rank is asked to
    stop; what the loader raises goes through.
    """
    train, state = trainer.config.train, restore(trainer)
    writer = CheckpointWriter(trainer.files, trainer.world, train, trainer.notify, start=state.step)
    first, total = state.step, train.steps
    saved = first
    if first and is_evaluation_point(trainer.config, first) and not _has_teacher(trainer, first):
        _keep_teacher(trainer, first)
    with abandoned_on_error(writer), closing(trainer.loader.batches(total - first)) as batches:
        trainer.mark("data", state.step)
        for batch in batches:
            trainer.mark("step", state.step)
            one_step(trainer, state, batch)
            if is_evaluation_point(trainer.config, state.step):
                _keep_teacher(trainer, state.step)
            ask = trainer.asked()
            flags = [*writer.flags(), ask is not Ask.STOP, ask is Ask.GO_ON]
            ended, well, going, quiet = trainer.world.agree(flags)
            writer.settle(ended, well)
            if not quiet or state.step % train.checkpoint_every_steps == 0 or state.step == total:
                trainer.mark("save", state.step)
                _save(trainer, state, writer)
                saved = state.step
            if not going and state.step < total:
                writer.finish(train.storage_patience_seconds)
                raise PreemptedError(f"stopped at step {saved} of {total} with a checkpoint; the same command goes on there")
            trainer.mark("data", state.step)
        trainer.mark("save", state.step)
        writer.finish(train.storage_patience_seconds)
    return read_history(trainer.files, total) if trainer.world.is_main else []


def one_step(trainer: Trainer, state: LoopState, batch: Batch | RawBatch) -> None:
    """Train on one batch; a step whose loss or gradient is not finite is skipped, or ends the run, as the recipe says."""
    config, world = trainer.config, trainer.world
    values = _values(trainer, state.step)
    _freeze_backbones(trainer, state.step)
    seed_step(config.train.seed, state.step, world.rank)
    crops = crops_of(batch, config.crops, world.device)
    result = train_step(
        trainer.method, trainer.optimizer, trainer.engine, crops, values, images_per_pass=config.scaling.images_per_pass
    )
    if result.not_finite:
        _skip(trainer, state, result.not_finite)
    else:
        state.skipped_in_a_row = 0
    state.step += 1
    state.window_images += config.train.global_batch_size
    if state.step % config.train.log_every_steps == 0 or state.step == config.train.steps:
        _record(trainer, state, result, values)


def _head_warmup_steps(config: TrainingConfig) -> int:
    return config.init.head_warmup_steps if isinstance(config, PretrainConfig) else 0


def _values(trainer: Trainer, step: int) -> StepValues:
    config = trainer.config
    starts_from_weights = isinstance(config, PretrainConfig) and bool(config.init.weights)
    return step_values(
        step,
        optim=config.optim,
        teacher=config.method.teacher,
        total_steps=config.train.steps,
        global_batch_size=config.train.global_batch_size,
        head_warmup_steps=_head_warmup_steps(config),
        backbone_lr_mult=config.init.backbone_lr_mult if starts_from_weights else 1.0,  # type: ignore[attr-defined]
    )


def _freeze_backbones(trainer: Trainer, step: int) -> None:
    """Backbones have no gradient while fresh heads warm up on them: neither time nor memory is spent on their backward pass."""
    warmup = _head_warmup_steps(trainer.config)
    if warmup:
        for network in trainer.method.networks.values():
            network.backbone.requires_grad_(step >= warmup)


def _skip(trainer: Trainer, state: LoopState, bad: list[str]) -> None:
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    train = trainer.config.train
    where = f"step {state.step}: not finite: {', '.join(bad)}"
    if train.nonfinite_policy == "abort":
        raise NonFiniteLossError(
            f"{where}; train.nonfinite_policy is abort, student and teacher are untouched; lower optim.lr or lengthen "
            "optim.warmup_steps, or set the policy to skip"
        )
    if state.skipped_in_a_row > train.max_nonfinite_steps:
        raise NonFiniteLossError(
            f"{where}; {state.skipped_in_a_row} steps in a row, train.max_nonfinite_steps is {train.max_nonfinite_steps}; "
            "lower optim.lr or lengthen optim.warmup_steps"
        )
    trainer.notify(f"{where}; the step is skipped, student and teacher are untouched")


def _model_numbers(trainer: Trainer, result: StepResult, model: str) -> dict[str, float]:
    """Losses of one network, as means over the ranks, beside their values at uniform output, and its gradient norms.

    Signs of collapse are those of this rank's images.
    """
    prefix = f"{model}/" if model else ""
    method, num_local_crops = trainer.method, trainer.config.crops.local_crops_number
    names = [name for name in result.logged if name.startswith(prefix)]
    means = trainer.world.mean([float(result.logged[name]) for name in names])
    own = {name.removeprefix(prefix): value for name, value in zip(names, means, strict=True)}
    norms = {name.removeprefix(prefix): norm for name, norm in result.gradient_norms.items() if name.startswith(prefix)}
    at_uniform = method.uniform_losses(num_local_crops)
    targets_RK, features_BD = result.teacher.cls_GBK.flatten(0, 1), result.features[model]
    entropy = float(teacher_entropy(targets_RK))
    numbers = {f"train/{'loss' if name == 'total' else name}": value for name, value in own.items()}
    numbers |= {f"train/{name}_at_uniform": value for name, value in at_uniform.items() if name in own}
    numbers |= {f"train/grad_norm_{name}": norm for name, norm in norms.items()}
    numbers |= {"train/grad_norm": max(norms.values())} if norms else {}
    return numbers | {
        "train/teacher_entropy": entropy,
        "train/teacher_entropy_at_uniform": math.log(method.method.dino.head_n_prototypes),
        "train/kl_to_teacher": kl_to_teacher(own["dino_global"], entropy, num_local_crops),
        "train/prototype_usage": float(prototype_usage(targets_RK)),
        "train/feature_std": float(feature_std(features_BD)),
        "train/rankme": float(rankme(features_BD)),
    }


def _scheduled_numbers(values: StepValues) -> dict[str, float]:
    return {
        "train/lr": values.lr,
        "train/backbone_lr": values.lr * values.backbone_lr_factor,
        "train/weight_decay": values.weight_decay,
        "train/teacher_momentum": values.momentum,
        "train/teacher_temp": values.teacher_temp,
    }


def _warn(trainer: Trainer, state: LoopState, signs: Mapping[str, list[Sign]]) -> None:
    """Say once what looks collapsed, and once more when it is over."""
    now = frozenset(f"{model}/{sign.name}" for model, found in signs.items() for sign in found)
    if trainer.world.is_main:
        for model, found in signs.items():
            for sign in found:
                if f"{model}/{sign.name}" not in state.signs:
                    trainer.notify(f"step {state.step}: {f'{model}: ' if model else ''}looks collapsed: {sign}")
        if state.signs and not now:
            trainer.notify(f"step {state.step}: no sign of collapse any more")
    state.signs = now


def _record(trainer: Trainer, state: LoopState, result: StepResult, values: StepValues) -> None:
    """Keep what is reproducible in the history; send that and the timings to the reporter."""
    timings = _timings(trainer, state)
    signs: dict[str, list[Sign]] = {}
    for model in trainer.method.networks:
        numbers = _model_numbers(trainer, result, model) | _scheduled_numbers(values)
        prototypes = trainer.config.method.dino.head_n_prototypes
        signs[model] = collapse_signs(numbers, num_prototypes=prototypes) if _is_warm(trainer.config, state.step) else []
        numbers["train/collapse_signs"] = float(len(signs[model]))
        numbers["train/skipped_steps"] = float(state.skipped_steps)
        state.history.append({"step": state.step, **({"model": model} if model else {}), **numbers})
        if trainer.world.is_main:
            trainer.report({**numbers, **timings}, state.step, model)
    _warn(trainer, state, signs)


_FEWEST_STEPS = 100  # with LayerScale at 1e-5 features depend on the image only after some tens of steps


def _is_warm(config: TrainingConfig, step: int) -> bool:
    """Whether the warm-ups are over: before that a healthy run stands where a collapsed one stays."""
    optim = config.optim
    warmups = (optim.warmup_steps, optim.freeze_last_layer_steps, config.method.teacher.warmup_teacher_temp_steps)
    return step > max(*warmups, _head_warmup_steps(config), _FEWEST_STEPS)


def _timings(trainer: Trainer, state: LoopState) -> dict[str, float]:
    """Speed of the steps since the last record; starts the next window."""
    statistics = trainer.loader.statistics()
    now = time.perf_counter()
    seconds = max(now - state.window_started, 1e-9)
    speed = state.window_images / seconds
    use = use_of_hardware(
        trainer.config,
        step=state.step,
        images_per_second=speed,
        num_workers=trainer.world.size,
        device=trainer.world.device,
        teacher=trainer.method.teacher.backbone.config if isinstance(trainer.method, Distillation) else None,
    )
    timings = use | {
        "train/images_per_second": speed,
        "train/data_wait_ratio": min(1.0, (statistics.data_wait_seconds - state.window_wait_seconds) / seconds),
        "train/bytes_per_second": (statistics.bytes - state.window_bytes) / seconds,
        "train/storage_retries": float(storage_statistics().retries),
        "train/decode_failures": float(sum(statistics.decode_failures.values())),
        "train/step": float(state.step),
    }
    state.window_started, state.window_images = now, 0
    state.window_wait_seconds, state.window_bytes = statistics.data_wait_seconds, statistics.bytes
    return timings


def _save(trainer: Trainer, state: LoopState, writer: CheckpointWriter) -> None:
    """Have the run as it is now written, with the records of the steps since the checkpoint before."""
    history, state.history = state.history, []
    described = {
        "skipped_steps": state.skipped_steps,
        "skipped_in_a_row": state.skipped_in_a_row,
        "networks": list(trainer.method.networks),
        "loader": trainer.loader.state_dict(),
        "schedules": asdict(_values(trainer, state.step)) if state.step < trainer.config.train.steps else {},
        "random": {"seed": trainer.config.train.seed, "rule": "seed_step(seed, step, rank) before every step"},
        "computing": computing(trainer),
        **trainer.labels,
    }
    rejections = trainer.loader.take_rejections()
    writer.begin(state.step, trainer.engine.pieces(), history=history, rejections=rejections, state=described)


def _keep_teacher(trainer: Trainer, step: int) -> None:
    """Write the backbones of the moving averages as they are now, and have them evaluated.

    A store that cannot be written to costs the evaluation of this point only, as any other failure of an evaluation does.
    """
    for name, network in trainer.method.results.items():
        state = trainer.engine.whole_state(network.backbone)
        if trainer.world.is_main:
            info = model_info(trainer.config, trainer.config.backbones[name], steps=step)
            try:
                folder = write_teacher(trainer.outputs.get(name, trainer.files), step, info, state)
            except StorageError as error:
                trainer.notify(
                    f"the teacher of step {step} could not be kept for its evaluation, the training goes on: {error}"
                )
            else:
                trainer.evaluate(name, step, folder)


def _has_teacher(trainer: Trainer, step: int) -> bool:
    """Whether the weights of an evaluation point are all there, as every rank is told; not so where the store was full."""
    names = trainer.method.results if trainer.world.is_main else ()
    found = [has_teacher(trainer.outputs.get(name, trainer.files), step) for name in names]
    return trainer.world.agree([all(found)])[0]
