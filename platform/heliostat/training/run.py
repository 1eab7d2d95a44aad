"""Assemble one training run from its configuration: method, optimizer, loader, loop, and the files that it leaves."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from heliostat.data.loader import ImageLoader
from heliostat.data.masking import MaskSettings
from heliostat.models.stored import ModelInfo, model_files
from heliostat.storage import Store
from heliostat.training.distillation import Distillation
from heliostat.training.engine import TorchEngine, World, compute_dtype
from heliostat.training.loop import Method, Report, Trainer, fit
from heliostat.training.method import SelfDistillation
from heliostat.training.param_groups import build_param_groups
from heliostat.training.recipe import TrainingConfig

Read = Callable[[str, int, int], bytes]


@dataclass(frozen=True)
class FrozenTeacher:
    """The teacher of a distillation: its description and the state of its network (backbone and heads)."""

    info: ModelInfo
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainingJob:
    """What every rank of one run gets; can be pickled."""

    config: TrainingConfig
    manifest: pa.Table
    read: Read
    files: Store
    teacher: FrozenTeacher | None = None


def build_method(config: TrainingConfig, teacher: FrozenTeacher | None) -> Method:
    """Pre-training, or distillation when there is a teacher. Weights are drawn from `train.seed`."""
    torch.manual_seed(config.train.seed)
    if teacher is None:
        return SelfDistillation(config.student, config.method)
    method = Distillation(teacher=teacher.info.backbone, student=config.student, method=config.method)
    method.load_teacher(teacher.state)
    return method


def build_trainer(job: TrainingJob, world: World, report: Report, notify: Callable[[str], None]) -> Trainer:
    """Wire one rank's trainer together."""
    config = job.config
    torch.set_num_threads(config.scaling.threads_per_worker)
    method = build_method(config, job.teacher).to(world.device)
    groups = build_param_groups(method.student, config.student.depth, config.optim)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.optim.adamw_beta1, config.optim.adamw_beta2))
    engine = TorchEngine(
        dict(method.student.named_children()),
        optimizer,
        clip_grad=config.optim.clip_grad,
        world=world,
        dtype=compute_dtype(config.train.compute_dtype, world.device),
    )
    loader = ImageLoader(
        job.manifest,
        job.read,
        crops=config.crops,
        loader=config.loader,
        masks=MaskSettings(
            patch_size=config.student.patch_size,
            mask_ratio_min_max=config.method.ibot.mask_ratio_min_max,
            mask_sample_probability=config.method.ibot.mask_sample_probability,
        ),
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.size,
        decoding=config.decode,
    )
    return Trainer(method, optimizer, engine, loader, config, job.files, world, report, notify)


def run_training(job: TrainingJob, world: World, report: Report, notify: Callable[[str], None]) -> dict[str, Any]:
    """Train one rank to the end. The main rank writes the model's files; returns a small summary."""
    trainer = build_trainer(job, world, report, notify)
    history = fit(trainer)
    if not world.is_main:
        return {}
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in history).encode()
    for key, data in model_files(_info(job.config), _final_state(trainer.method), text).items():
        job.files.put(key, data)
    last = {name: value for name, value in history[-1].items() if name != "step"} if history else {}
    return {
        "steps": job.config.train.steps,
        "metrics": last,
        "decode_failures": sum(trainer.loader.statistics().decode_failures.values()),
    }


def _info(config: TrainingConfig) -> ModelInfo:
    has_own_head = config.method.ibot.separate_head and config.method.ibot.loss_weight > 0
    return ModelInfo(
        backbone=config.student,
        dino_head=config.method.dino.head,
        ibot_head=config.method.ibot.head if has_own_head else None,
        mean=config.crops.mean,
        std=config.crops.std,
        grayscale=config.crops.grayscale_probability == 1.0,
        steps=config.train.steps,
        images_seen=config.train.steps * config.train.global_batch_size,
    )


def _final_state(method: Method) -> dict[str, Tensor]:
    """The final network and the centres of its targets."""
    network = method.average if isinstance(method, Distillation) else method.teacher
    targets = {key: value for key, value in method.state_dict().items() if key.partition(".")[0].endswith("_targets")}
    return {**network.state_dict(), **targets}
