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
from heliostat.data.ingest import Source, open_source
from heliostat.errors import DataError, UsageError
from heliostat.runtime.recipe import Recipe, scope_overrides

_PROBED_FILES = 200
_IMAGES_PER_SECOND_AND_CORE = 60  # a tiny ViT at 64 pixels: measured, see docs/performance.md
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
    choices = []
    if num_gpus:
        arch, size, patch, batch = ("vit_small" if num_images < 1_000_000 else "vit_base"), 224, 14, 64 * num_gpus
        steps = max(2_000, min(125_000, 100 * num_images // batch))
        choices.append(Choice(f"{arch}, {size} pixels, patch {patch}", f"{num_gpus} GPUs, {num_images:,} images"))
    else:
        size = 64 if side >= 64 else max(32, side // 8 * 8)
        arch, patch, batch = "vit_tiny", 8, min(64, max(8, num_images // 8 * 8))
        speed = _IMAGES_PER_SECOND_AND_CORE * num_cores
        steps = max(100, min(200 * num_images, speed * _FIRST_RUN_SECONDS) // batch)
        choices.append(Choice(f"{arch}, {size} pixels, patch {patch}", f"no GPU; the median shorter side is {side} pixels"))
    choices.append(
        Choice(f"{steps:,} steps of {batch} images", f"{steps * batch / num_images:.0f} epochs of {num_images:,} images")
    )
    prototypes = 1024 if num_images < 100_000 else 65_536
    choices.append(Choice(f"{prototypes:,} prototypes", "more of them than concepts, fewer than images"))
    workers = num_gpus or min(num_cores, 2)
    choices.append(Choice(f"{workers} workers", f"{num_gpus} GPUs, {num_cores} cores"))
    small = not num_gpus
    local = size // 2 // patch * patch
    return {
        "name": _name_of(uri),
        "ingest": {"pool": uri},
        "curate": {"retrieval": {"mode": "none"}, "balance": {"target_images": "all"}},
        "pretrain": {
            "student": {"arch": arch, "img_size": size, "patch_size": patch} | ({"layerscale": 1.0} if small else {}),
            "method": {
                "drop_path_rate": 0.0 if small else 0.1,
                "centering": "sinkhorn_knopp",
                "dino": {"head_n_prototypes": prototypes}
                | ({"head_hidden_dim": 512, "head_bottleneck_dim": 128} if small else {}),
                "teacher": {"momentum_teacher": 0.99 if small else 0.994, "warmup_teacher_temp_steps": steps // 4},
            },
            "optim": {"lr": 1e-3, "warmup_steps": steps // 20, "freeze_last_layer_steps": steps // 50, "weight_decay_end": 0.2}
            | ({"scaling_rule": "none", "layerwise_decay": 1.0, "patch_embed_lr_mult": 1.0} if small else {}),
            "crops": {"global_crops_size": size, "local_crops_size": local, "local_crops_number": 4 if small else 8},
            "train": {
                "steps": steps,
                "global_batch_size": batch // workers * workers,
                "log_every_steps": max(1, min(20, steps // 10)),
                "checkpoint_every_steps": max(10, steps // 20),
            },
            "scaling": {"num_workers": workers, "use_gpu": bool(num_gpus)},
        },
    }, choices


def _name_of(uri: str) -> str:
    """A name for the artifacts from the last part of a path."""
    last = PurePosixPath(uri.partition("://")[2] or os.path.abspath(uri)).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "images"
