"""Training of the copy embedder on unlabelled pictures: two edited views of one picture attract, everything else repels.

    python -m heliostat.curation.copy_training OUTPUT.safetensors

makes the shipped weights again. The loss is that of SSCD (arXiv 2202.10261, section 4): InfoNCE over all views of the batch,
and the KoLeo estimate of entropy, which pushes every vector away from its nearest neighbour that is no copy. Tiles of one
picture and drawings of one template stand in the same batch, so that "same kind of picture" does not pass for "same picture";
tiles that overlap are neither copies nor strangers and are left out of the loss.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from heliostat.config import StrictModel
from heliostat.curation.copy_edits import Pixels, edited
from heliostat.curation.copy_network import CONFIG_KEY, CopyNetwork, CopyNetworkConfig, evened_out, squeezed
from heliostat.curation.copy_pictures import Scene, drawn_family, training_scenes
from heliostat.errors import DataError
from heliostat.models.weights import write_weights

# Shapes: P pairs of views, V = 2 P views, D dimension.

_MIN_SIDE_PIXELS = 32
_IGNORED_OVERLAP = 0.02  # share of the smaller tile from which on two tiles are no strangers
_ATTEMPTS = 8
_MIN_DEVIATION = 6.0  # grey levels; flatter tiles teach nothing


class CopyTrainingConfig(StrictModel):
    """Settings of the training; the defaults make the shipped weights."""

    network: CopyNetworkConfig = CopyNetworkConfig()
    """The network."""

    steps: int = Field(default=1150, gt=0)
    """Optimizer steps."""

    scenes_per_batch: int = Field(default=16, gt=0)
    """Scenes in a batch, drawn without repetition as far as there are so many."""

    families_per_batch: int = Field(default=8, ge=0)
    """Templates of drawings in a batch; 0 trains on the given pictures alone."""

    tiles_per_scene: int = Field(default=4, gt=0)
    """Tiles of each scene, and drawings of each template, in a batch; each gives two views."""

    tile_pixels: tuple[int, int] = (64, 400)
    """Least and greatest side of a tile, as far as the picture has it."""

    temp: float = Field(default=0.05, gt=0)
    """Temperature of InfoNCE (SSCD: 0.05)."""

    koleo_loss_weight: float = Field(default=2.0, ge=0)
    """Weight of the entropy term (SSCD: 30 in batches of 4,096; with few strangers in a batch less is needed; ours)."""

    mild_ratio: float = Field(default=0.75, ge=0, le=1)
    """Share of the first views that are hardly edited: a copy mostly meets its original."""

    mild_strength: float = Field(default=0.2, ge=0, le=1)
    """Strength of the edits of such views."""

    ramp_ratio: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps over which the strength of the edits grows from 0.4 to 1: easy copies first."""

    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate of AdamW; linear warm-up, then cosine to zero."""

    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay."""

    warmup_steps: int = Field(default=60, ge=0)
    """Steps of the warm-up."""

    average_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the moving average of the weights, which is the result."""

    bfloat16: bool = True
    """Convolutions of the training in bfloat16; embeddings are always computed in float32."""

    seed: int = Field(default=0, ge=0)
    """Seed of weights, tiles, edits and drawings."""


def _tiles(
    scene: Scene, sides: tuple[int, int], rng: np.random.Generator, count: int
) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Tiles of random pictures of a scene, and their boxes (top, left, bottom, right).

    A tile that overlaps another or is nearly flat is drawn again, smaller and smaller; the eighth draw is kept.
    """
    tiles: list[Pixels] = []
    boxes = np.empty((0, 4), np.int64)
    for _ in range(count):
        for attempt in range(_ATTEMPTS):
            image = scene[int(rng.integers(len(scene)))]
            box = _random_box(image.shape[:2], sides[0], sides[1] * 0.75**attempt, rng)
            tile = image[box[0] : box[2], box[1] : box[3]]
            if tile.std() >= _MIN_DEVIATION and not _overlap(np.vstack([boxes, box]))[-1, :-1].any():
                break
        tiles.append(tile)
        boxes = np.vstack([boxes, box])
    return tiles, boxes


def _random_box(extent: tuple[int, ...], least: float, most: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """A box inside an image of some (height, width), its side between least and most as far as the image has it."""
    side = math.exp(rng.uniform(math.log(least), math.log(max(least, min(most, *extent)))))
    aspect = math.exp(rng.uniform(-0.3, 0.3))
    tall, wide = min(extent[0], round(side * aspect)), min(extent[1], round(side / aspect))
    top, left = int(rng.integers(extent[0] - tall + 1)), int(rng.integers(extent[1] - wide + 1))
    return np.array([top, left, top + tall, left + wide])


def _overlap(boxes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(T, T): whether two boxes share more than the ignored share of the smaller one."""
    corner = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    other = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = np.clip(other - corner, 0, None).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.asarray(shared > _IGNORED_OVERLAP * np.minimum(areas[:, None], areas[None, :]))


def make_batch(
    scenes: Sequence[Scene], config: CopyTrainingConfig, rng: np.random.Generator, strength: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Views (V, S, S, 3) uint8, the two of a pair P apart, and which pairs of sources (P, P) are left out of the loss."""
    sources: list[Pixels] = []
    chosen = rng.choice(len(scenes), config.scenes_per_batch, replace=len(scenes) < config.scenes_per_batch)
    count = config.tiles_per_scene
    num_pairs = count * (len(chosen) + config.families_per_batch)
    ignored = np.zeros((num_pairs, num_pairs), np.bool_)
    boxes = []
    for index in chosen:
        tiles, places = _tiles(scenes[index], config.tile_pixels, rng, count)
        sources += tiles
        boxes.append(places)
    same_scene = np.repeat(chosen, count)[:, None] == np.repeat(chosen, count)[None, :]
    ignored[: len(same_scene), : len(same_scene)] = same_scene & _overlap(np.concatenate(boxes))
    for _ in range(config.families_per_batch):
        sources += drawn_family(rng, count)
    mild = rng.random(len(sources)) < config.mild_ratio
    strengths = np.where(mild, config.mild_strength, 1.0) * strength
    first = [edited(source, rng, each) for source, each in zip(sources, strengths.tolist(), strict=True)]
    second = [edited(source, rng, strength) for source in sources]
    views = np.stack([squeezed(view, config.network.image_size) for view in (*first, *second)])
    return views, ignored


def copy_loss(vectors_VD: Tensor, ignored_PP: Tensor, config: CopyTrainingConfig) -> dict[str, Tensor]:
    """InfoNCE and the entropy term of L2-normalised vectors, the two views of a pair P apart."""
    num_views = len(vectors_VD)
    partner = (torch.arange(num_views) + num_views // 2) % num_views
    is_partner = functional.one_hot(partner, num_views).bool()
    no_stranger = (ignored_PP | torch.eye(num_views // 2, dtype=torch.bool)).repeat(2, 2)
    similarity = vectors_VD @ vectors_VD.T
    contrast = functional.cross_entropy((similarity / config.temp).masked_fill(no_stranger & ~is_partner, -torch.inf), partner)
    nearest = similarity.masked_fill(no_stranger, -2.0).amax(dim=1)
    entropy = -0.5 * torch.log((2.0 - 2.0 * nearest).clamp_min(1e-6)).mean()
    return {"contrast": contrast, "koleo": entropy}


def train_copy_embedder(
    scenes: Sequence[Scene], config: CopyTrainingConfig, *, report: Callable[[dict[str, float]], None] | None = None
) -> dict[str, Tensor]:
    """Train from random weights; returns the state of a `CopyNetwork(config.network)` in evaluation mode, float32, on the CPU.

    scenes: lists of (H, W, 3) uint8 RGB pictures; for a pool of unrelated images one list each. report gets the losses
    of every 50th step. The same scenes, config, machine and number of threads give the same weights. Raises DataError
    for an empty pool, or pictures with a side under 32 pixels.
    """
    _check(scenes)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng((config.seed, 0x636F7079))
    network = CopyNetwork(config.network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    groups = [
        {"params": [value for value in network.parameters() if value.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [value for value in network.parameters() if value.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, config)
        ramp = min(1.0, 0.4 + 0.6 * step / max(1.0, config.ramp_ratio * config.steps))
        views, ignored = make_batch(scenes, config, rng, ramp)
        pixels = evened_out(views).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            vectors = network(pixels)
        losses = copy_loss(functional.normalize(vectors.float(), dim=-1), torch.from_numpy(ignored), config)
        optimizer.zero_grad()
        (losses["contrast"] + config.koleo_loss_weight * losses["koleo"]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _update(average, network.state_dict(), min(config.average_decay, (1 + step) / (10 + step)))
        if report is not None and (step % 50 == 0 or step == config.steps - 1):
            report({"step": float(step), **{name: float(loss.detach()) for name, loss in losses.items()}})
    return {name: tensor.contiguous() for name, tensor in average.items()}


def _check(scenes: Sequence[Scene]) -> None:
    pictures = [image for scene in scenes for image in scene]
    if not pictures or not all(scenes):
        raise DataError(
            f"{len(scenes)} scenes with {len(pictures)} pictures; a copy embedder needs at least one picture in each"
        )
    small = [image.shape for image in pictures if min(image.shape[:2]) < _MIN_SIDE_PIXELS]
    if small:
        raise DataError(f"{len(small)} pictures have a side under {_MIN_SIDE_PIXELS} pixels, first {small[0]}; leave them out")


def _learning_rate(step: int, config: CopyTrainingConfig) -> float:
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _update(average: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    for name, value in state.items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def main() -> int:
    """Train on `training_scenes()` with one thread and write the weights in half precision."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m heliostat.curation.copy_training OUTPUT.safetensors\n")
        return 2
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    started = time.monotonic()

    def say(losses: dict[str, float]) -> None:
        values = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        sys.stderr.write(f"{time.monotonic() - started:7.1f} s {values}\n")

    config = CopyTrainingConfig()
    state = train_copy_embedder(training_scenes(), config, report=say)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    write_weights(Path(sys.argv[1]), halves, {CONFIG_KEY: config.network.model_dump_json()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
