"""`heliostat pretrain data=./photos`: a recipe chosen from what lies in the folder and what the machine has.

Choices are rules of thumb for a first run, not studied: they fit the model to the number of images and the length of the run
to the hardware. They are printed as a recipe that can be kept and changed.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from heliostat.config import apply_overrides, validate
from heliostat.data.decode import ImageRejected, probe
from heliostat.data.sources import Source, open_source
from heliostat.errors import DataError, UsageError
from heliostat.runtime.recipe import Recipe, scope_overrides
from heliostat.training.costs import flops_per_image
from heliostat.training.recipe import TrainingConfig

_PROBED_FILES = 200
_CPU_FLOPS_PER_CORE = 25e9  # what a small ViT's training step reaches in float32; measured: docs/performance.md
_FIRST_RUN_SECONDS = 900


@dataclass(frozen=True)
class Choice:
    """One decision and its reason."""

    what: str
    why: str


def choose_recipe(overrides: Sequence[str]) -> tuple[Recipe, list[Choice]]:
    """The recipe for a folder of images and the reasons for it. Raises DataError for a folder that cannot be used."""
    given = dict(word.partition("=")[::2] for word in overrides)
    uri = given["data"]
    if re.match(r"^[a-z]+/[^/@]+@[^/@]+$", uri):
        raise UsageError(f"data={uri} is an artifact: name the recipe that trains on it, heliostat pretrain RECIPE data={uri}")
    source = open_source(uri)
    if source.kind != "images":
        raise UsageError(f"data={uri} holds shards: `heliostat shard {uri} name=NAME` first, then train on data=raw/NAME@1")
    sides = _median_side(source)
    mapping, choices = _choose(uri, len(source.files), sides, *_devices())
    rest = tuple(word for word in overrides if not word.startswith("data="))
    recipe = validate(Recipe, apply_overrides(mapping, scope_overrides(rest, "pretrain")), "chosen recipe")
    return recipe, choices


def _devices() -> tuple[int, int]:
    """(GPUs, CPU cores) of this machine."""
    import torch

    return torch.cuda.device_count(), os.cpu_count() or 1


def _median_side(source: Source) -> int:
    """Median of the shorter sides of some evenly spread images, pixels. Raises DataError when none can be read."""
    step = max(1, len(source.files) // _PROBED_FILES)
    sides = []
    for file in source.files[::step]:
        try:
            header = probe(source.store.read(file.key))
        except ImageRejected:
            continue  # the run itself counts and quarantines it
        sides.append(min(header.width, header.height))
    if not sides:
        raise DataError(f"none of {len(source.files[::step])} probed files of {source.store.uri} is a readable image")
    return int(np.median(sides))


def _choose(uri: str, num_images: int, side: int, num_gpus: int, num_cores: int) -> tuple[dict[str, Any], list[Choice]]:
    workers = num_gpus or min(num_cores, 2)
    prototypes = 1024 if num_images < 100_000 else 65_536
    pretrain = _gpu_model(num_images, num_gpus) if num_gpus else _cpu_model(side)
    pretrain["method"]["dino"]["head_n_prototypes"] = prototypes
    batch = 64 * num_gpus if num_gpus else min(64, max(8, num_images // 8 * 8))
    batch = batch // workers * workers
    steps = _steps(pretrain, num_images, batch, num_gpus=num_gpus, num_cores=num_cores)
    pretrain["method"]["teacher"] |= {"warmup_teacher_temp_steps": steps // 4}
    pretrain["optim"] |= {"warmup_steps": steps // 10, "freeze_last_layer_steps": steps // 50, "weight_decay_end": 0.2}
    pretrain["train"] = {
        "steps": steps,
        "global_batch_size": batch,
        "log_every_steps": max(1, min(20, steps // 10)),
        "checkpoint_every_steps": max(10, steps // 20),
    }
    pretrain["scaling"] = {"num_workers": workers, "use_gpu": bool(num_gpus)}
    student, size = pretrain["student"], pretrain["student"]["img_size"]
    hardware = f"{num_gpus} GPUs" if num_gpus else f"{num_cores} cores and no GPU"
    aim = "100 epochs, at most 125,000 steps" if num_gpus else f"about {_FIRST_RUN_SECONDS // 60} minutes, at most 200 epochs"
    choices = [
        Choice(
            f"{student['arch']}, {size} pixels, patch {student['patch_size']}", f"{hardware}; median shorter side {side} pixels"
        ),
        Choice(
            f"{steps:,} steps of {batch} images", f"{steps * batch / num_images:.0f} epochs of {num_images:,} images; {aim}"
        ),
        Choice(f"{prototypes:,} prototypes", f"{num_images:,} images"),
        Choice(f"{workers} workers", hardware),
    ]
    mapping = {
        "name": _name_of(uri),
        "ingest": {"pool": uri},
        "curate": {"retrieval": {"mode": "none"}, "balance": {"target_images": "all"}},
        "pretrain": pretrain,
    }
    return mapping, choices


def _gpu_model(num_images: int, num_gpus: int) -> dict[str, Any]:
    """ViT-S, or ViT-B from a million images on, with DINOv2's crops."""
    return {
        "student": {"arch": "vit_small" if num_images < 1_000_000 else "vit_base", "img_size": 224, "patch_size": 14},
        "method": {"drop_path_rate": 0.1, "centering": "sinkhorn_knopp", "dino": {}, "teacher": {"momentum_teacher": 0.994}},
        "optim": {"lr": 1e-3},
        "crops": {"global_crops_size": 224, "local_crops_size": 98, "local_crops_number": 8},
    }


def _cpu_model(side: int) -> dict[str, Any]:
    """A backbone of 0.8 M parameters on images of 64 pixels or less: what a few cores can train in minutes."""
    size = 64 if side >= 64 else max(32, side // 16 * 16)
    return {
        "student": {
            "arch": "vit_tiny",
            "embed_dim": 128,
            "depth": 4,
            "num_heads": 4,
            "img_size": size,
            "patch_size": 8,
            "num_register_tokens": 0,
            "layerscale": 1.0,
        },
        "method": {
            "drop_path_rate": 0.0,
            "centering": "sinkhorn_knopp",
            "dino": {"head_hidden_dim": 256, "head_bottleneck_dim": 64, "koleo_loss_weight": 0.01},
            "teacher": {"momentum_teacher": 0.98},
        },
        "optim": {"lr": 1e-3, "scaling_rule": "none", "layerwise_decay": 1.0, "patch_embed_lr_mult": 1.0},
        "crops": {"global_crops_size": size, "local_crops_size": size // 2, "local_crops_number": 2},
        "loader": {"workers": 1},
    }


def _steps(pretrain: dict[str, Any], num_images: int, batch: int, *, num_gpus: int, num_cores: int) -> int:
    """Steps of a first run: 100 epochs on GPUs; on CPUs what fits a quarter of an hour by the model's operation count."""
    if num_gpus:
        return max(2_000, min(125_000, 100 * num_images // batch))
    draft = validate(TrainingConfig, {key: pretrain[key] for key in ("student", "method", "crops")}, "chosen recipe")
    images = min(200 * num_images, int(num_cores * _CPU_FLOPS_PER_CORE * _FIRST_RUN_SECONDS / flops_per_image(draft)))
    return max(100, images // batch)


def _name_of(uri: str) -> str:
    """A name for the artifacts from the last part of a path."""
    last = PurePosixPath(uri.partition("://")[2] or os.path.abspath(uri)).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "images"
