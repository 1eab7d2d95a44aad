"""Assemble one training run from its configuration: method, optimizer, loader, loop, and the files that it leaves."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heliostat.artifacts import RECORD
from heliostat.data.image_source import ImageSource
from heliostat.data.loading import BatchLoader, Loading
from heliostat.data.masking import MaskSettings
from heliostat.errors import ArtifactConflictError
from heliostat.models.config import BackboneConfig
from heliostat.models.stored import model_files
from heliostat.storage import Store
from heliostat.training.costs import passes_of
from heliostat.training.distillation import Distillation
from heliostat.training.engine import Engine, TorchEngine
from heliostat.training.loop import fit
from heliostat.training.memory import GIB
from heliostat.training.method import SelfDistillation
from heliostat.training.parallel import choose_parallel
from heliostat.training.param_groups import build_optimizer
from heliostat.training.recipe import TrainingConfig
from heliostat.training.start import StartingWeights, start_network, start_targets
from heliostat.training.teacher_files import model_info
from heliostat.training.trainer import AnyMethod, Ask, Evaluate, Report, Trainer, leave_unevaluated
from heliostat.training.world import World, compute_dtype


@dataclass(frozen=True)
class FrozenTeacher:
    """The teacher of a distillation: its architecture and the state of its network (`teacher.*` and centres)."""

    backbone: BackboneConfig
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainingJob:
    """What every rank of one run gets; can be pickled.

    files takes checkpoints, and the model's files unless `outputs` has a store for each network by name. start holds weights
    to begin with, by network, already fitted to their backbones.
    """

    config: TrainingConfig
    sources: tuple[ImageSource, ...]
    files: Store
    teacher: FrozenTeacher | None = None
    start: Mapping[str, StartingWeights] = field(default_factory=dict)
    outputs: Mapping[str, Store] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    """What checkpoints keep besides, such as the tracker's run ids."""


def build_method(
    config: TrainingConfig, teacher: FrozenTeacher | None, start: Mapping[str, StartingWeights] | None = None
) -> AnyMethod:
    """Pre-training, or distillation when there is a teacher. Weights are drawn from `train.seed`, then `start` is laid over."""
    torch.manual_seed(config.train.seed)
    method: AnyMethod
    if teacher is None:
        method = SelfDistillation(config.student, config.method)
    else:
        method = Distillation(teacher=teacher.backbone, students=config.backbones, method=config.method)
        method.load_teacher(teacher.state)
    for name, weights in (start or {}).items():
        start_network(method.networks[name], weights)
        method.results[name].load_state_dict(method.networks[name].state_dict())
        if teacher is None:
            start_targets({"dino_targets": method.dino_targets, "ibot_targets": method.ibot_targets}, weights)
    return method


@dataclass(frozen=True)
class Watch:
    """What looks at a run from outside, and may ask it to stop."""

    evaluate: Evaluate = leave_unevaluated
    asked: Callable[[], Ask] = lambda: Ask.GO_ON
    mark: Callable[[str, int], None] = lambda doing, step: None

    def hooks(self) -> dict[str, Any]:
        """As the trainer's fields."""
        return {"evaluate": self.evaluate, "asked": self.asked, "mark": self.mark}


LoaderFactory = Callable[[Loading, World, Callable[[str], None]], BatchLoader]


def in_threads(loading: Loading, world: World, notify: Callable[[str], None]) -> BatchLoader:
    """The loader that works in threads of the training process."""
    return loading.image_loader(world.rank, world.size)


def build_trainer(
    job: TrainingJob,
    world: World,
    report: Report,
    notify: Callable[[str], None],
    *,
    open_loader: LoaderFactory = in_threads,
    watch: Watch | None = None,
) -> Trainer:
    """Wire one rank's trainer together."""
    config = job.config
    torch.set_num_threads(config.scaling.threads_per_worker)
    config = resolve_parallel(config, job.teacher.backbone if job.teacher else None, world, notify)
    method = build_method(config, job.teacher, job.start)
    engine, optimizer = build_engine(config, method, world)
    loader = open_loader(loading_of(job), world, notify)
    return Trainer(
        method,
        optimizer,
        engine,
        loader,
        config,
        job.files,
        world,
        report,
        notify,
        outputs=job.outputs,
        labels=job.labels,
        **(watch or Watch()).hooks(),
    )


def resolve_parallel(
    config: TrainingConfig, teacher: BackboneConfig | None, world: World, notify: Callable[[str], None]
) -> TrainingConfig:
    """The section with `scaling.parallel` decided, the same on every rank, by what the smallest of them may fill."""
    chosen = choose_parallel(config, teacher, world.size, world.lowest(capacity_bytes(config, world)))
    if world.is_main and (world.size > 1 or len(chosen.lines) > 1):
        for line in chosen.lines:
            notify(line)
    return config.model_copy(update={"scaling": config.scaling.model_copy(update={"parallel": chosen.name})})


_USABLE = 0.95  # of a GPU's memory; the estimate holds a context and the allocator's slack


def capacity_bytes(config: TrainingConfig, world: World) -> int:
    """What one worker may fill: as the recipe says, or its GPU, or its part of the host's memory."""
    if config.scaling.memory_per_worker_gib:
        return int(config.scaling.memory_per_worker_gib * GIB)
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory * _USABLE)
    on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))  # Ray Train tells it
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // on_this_host


def build_engine(config: TrainingConfig, method: AnyMethod, world: World) -> tuple[Engine, torch.optim.Optimizer]:
    """The engine that `scaling.parallel` names ("auto" must have been resolved) and the optimizer, for a method on the CPU."""
    scaling, dtype = config.scaling, compute_dtype(config.train.compute_dtype, world.device)
    for network in method.networks.values():
        network.backbone.checkpoint_blocks = scaling.activation_checkpointing
    stage = {"zero1": 1, "zero2": 2, "zero3": 3}.get(scaling.parallel)
    if stage is None:
        optimizer = build_optimizer(method.to(world.device).networks, config.optim)
        return TorchEngine(method, optimizer, clip_grad=config.optim.clip_grad, world=world, dtype=dtype), optimizer
    from heliostat.training.zero_engine import ZeroEngine  # costs 3 s, which other runs need not pay

    if stage < 3:
        method.to(world.device)
    optimizer = build_optimizer(method.networks, config.optim)
    size = config.train.global_batch_size // world.size
    size //= passes_of(size, scaling.images_per_pass)
    engine = ZeroEngine(
        method, optimizer, stage=stage, clip_grad=config.optim.clip_grad, world=world, dtype=dtype, images_per_pass=size
    )
    return engine, optimizer


def loading_of(job: TrainingJob) -> Loading:
    """Which batches the run sees."""
    config, ibot = job.config, job.config.method.ibot
    return Loading(
        sources=job.sources,
        crops=config.crops,
        loader=config.loader,
        masks=MaskSettings(
            patch_size=next(iter(config.backbones.values())).patch_size,
            mask_ratio_min_max=ibot.mask_ratio_min_max,
            mask_sample_probability=ibot.mask_sample_probability,
        ),
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        shuffle=config.shuffle,
        decoding=config.decode,
    )


def run_training(
    job: TrainingJob,
    world: World,
    report: Report,
    notify: Callable[[str], None],
    *,
    open_loader: LoaderFactory = in_threads,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train one rank to the end. The main rank writes every model's files; returns a small summary, metrics by network."""
    trainer = build_trainer(job, world, report, notify, open_loader=open_loader, watch=watch)
    history = fit(trainer)
    metrics: dict[str, dict[str, float]] = {}
    for name, network in trainer.method.results.items():
        state = {**trainer.engine.whole_state(network), **_targets(trainer.method)}
        if not world.is_main:
            continue
        rows = [{key: value for key, value in row.items() if key != "model"} for row in history if row.get("model", "") == name]
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()
        files = job.outputs.get(name, job.files)
        if files.size(RECORD) is not None:
            raise ArtifactConflictError(f"{files.uri} was finished by another run meanwhile; its files are left as they are")
        info = model_info(job.config, job.config.backbones[name], steps=job.config.train.steps)
        for key, data in model_files(info, state, text).items():
            files.put(key, data)
        metrics[name] = {key: value for key, value in rows[-1].items() if key != "step"} if rows else {}
    return {"steps": job.config.train.steps, "metrics": metrics} if world.is_main else {}


def _targets(method: AnyMethod) -> dict[str, Tensor]:
    """The centres of the targets, which every engine keeps whole on every rank."""
    return {key: value for key, value in method.named_buffers() if key.endswith("_targets.center")}
