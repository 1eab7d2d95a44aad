"""The teacher's backbone at every evaluation point, as small files of the model artifact.

teacher/step-00000100/model.json            what the weights are
teacher/step-00000100/backbone.safetensors  the moving average's backbone, under DINOv2's released names
teacher/step-00000100/metrics.json          what its evaluation found, written by the evaluation
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from heliostat.models.config import BackboneConfig
from heliostat.models.names import to_fair_names
from heliostat.models.stored import BACKBONE, MODEL_JSON, ModelInfo, tensors_to_bytes
from heliostat.storage import Store, read_json
from heliostat.training.recipe import TrainingConfig

FOLDER = "teacher/"
METRICS = "metrics.json"


def folder_of(step: int) -> str:
    """The folder of one evaluation point."""
    return f"{FOLDER}step-{step:08d}"


def step_of(folder: str) -> int | None:
    """The step of the folder of an evaluation point; None for any other folder, such as a copy that somebody made."""
    digits = folder.removeprefix(f"{FOLDER}step-")
    return int(digits) if digits.isascii() and digits.isdigit() and folder == folder_of(int(digits)) else None


def is_evaluation_point(config: TrainingConfig, step: int) -> bool:
    """Whether the teacher is kept and evaluated after `step` optimizer steps."""
    every = config.online.every_steps or config.train.checkpoint_every_steps
    return config.online.enabled and (step % every == 0 or step == config.train.steps)


def model_info(config: TrainingConfig, backbone: BackboneConfig, *, steps: int) -> ModelInfo:
    """What a user of the weights after `steps` optimizer steps must know."""
    has_own_head = config.method.ibot.separate_head and config.method.ibot.loss_weight > 0
    return ModelInfo(
        backbone=backbone,
        dino_head=config.method.dino.head,
        ibot_head=config.method.ibot.head if has_own_head else None,
        mean=config.crops.mean,
        std=config.crops.std,
        grayscale=config.crops.grayscale_probability == 1.0,
        steps=steps,
        images_seen=steps * config.train.global_batch_size,
    )


def write_teacher(files: Store, step: int, info: ModelInfo, backbone: Mapping[str, Tensor]) -> Store:
    """Write the backbone (a state without prefix) of one evaluation point; returns the store of its folder.

    The description is written last: where it is, the weights are complete.
    """
    folder = files.child(folder_of(step))
    folder.put(BACKBONE, tensors_to_bytes(to_fair_names(dict(backbone))))
    folder.put(MODEL_JSON, (info.model_dump_json(indent=1) + "\n").encode())
    return folder


def has_teacher(files: Store, step: int) -> bool:
    """Whether the weights of an evaluation point are complete."""
    return files.size(f"{folder_of(step)}/{MODEL_JSON}") is not None


def read_evaluations(files: Store) -> dict[int, dict[str, Any]]:
    """What the evaluations of a run found so far, by step: the content of every `metrics.json`.

    Raises StorageError for a damaged one.
    """
    fix = "remove it: the next run evaluates the weights beside it again"
    found = {}
    for entry in files.list(FOLDER):
        folder, _, name = entry.key.rpartition("/")
        step = step_of(folder)
        if name == METRICS and step is not None:
            found[step] = read_json(files, entry.key, dict[str, Any], fix)
    return dict(sorted(found.items()))
