"""What a training run consists of, and what those outside of it are told and may ask."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch

from heliostat.data.loading import BatchLoader
from heliostat.storage import Store
from heliostat.training.distillation import Distillation
from heliostat.training.engine import Engine
from heliostat.training.method import SelfDistillation
from heliostat.training.recipe import TrainingConfig
from heliostat.training.world import World

AnyMethod = SelfDistillation | Distillation

DATA_REVISIONS = "data_revisions"
"""Label of a run whose images `heliostat forget` has changed."""


class Report(Protocol):
    """Receives the metrics of a step; `model` names the network where a run trains several."""

    def __call__(self, metrics: Mapping[str, float], step: int, model: str = "") -> None: ...


class Evaluate(Protocol):
    """Looks at the teacher of one evaluation point, elsewhere or later: the caller goes on training at once."""

    def __call__(self, model: str, step: int, files: Store) -> None:
        """`files` is the folder of `training.teacher_files` that holds the weights; `model` names the network."""


def leave_unevaluated(model: str, step: int, files: Store) -> None:
    """The teacher is kept, and nothing looks at it."""


class Ask(Enum):
    """What somebody outside may ask of a run between two steps."""

    GO_ON = "go on"
    SAVE = "save"
    """Write a checkpoint now and go on."""
    STOP = "stop"
    """Write a checkpoint and end."""


@dataclass
class LoopState:
    """What changes while the loop runs."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    signs: frozenset[str] = frozenset()
    window_started: float = field(default_factory=time.perf_counter)
    window_images: int = 0
    window_wait_seconds: float = 0.0
    window_bytes: int = 0


@dataclass(frozen=True)
class Trainer:
    """Everything a run needs; `fit` drives it."""

    method: AnyMethod
    optimizer: torch.optim.Optimizer
    engine: Engine
    loader: BatchLoader
    config: TrainingConfig
    files: Store
    world: World
    report: Report
    notify: Callable[[str], None]
    outputs: Mapping[str, Store]
    """Where the model of each network goes, by name."""
    evaluate: Evaluate
    asked: Callable[[], Ask]
    """What is asked of the run, after every step on every rank; what one rank is asked counts for all."""
    mark: Callable[[str, int], None]
    """Told what this rank is doing: `data`, `step` or `save`, and the steps done; for a watchdog."""
    labels: Mapping[str, str]
    """Names that checkpoints keep, such as the tracker's run ids."""
