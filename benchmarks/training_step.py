"""One DINOv2 training step on random crops: what step_cpu.py and step_gpu.py measure. No image is read or decoded.

Needs torch, numpy, pydantic and PyYAML, nothing else of what the package needs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.data.batch import Batch
from heliostat.data.masking import MaskSettings, batch_masks
from heliostat.models.config import BackboneConfig
from heliostat.models.flops import training_flops_per_image
from heliostat.training.config import MethodConfig, OptimConfig, TeacherConfig
from heliostat.training.engine import TorchEngine
from heliostat.training.method import SelfDistillation
from heliostat.training.param_groups import build_optimizer
from heliostat.training.schedules import step_values
from heliostat.training.step import train_step
from heliostat.training.world import World

OPTIM = OptimConfig(lr=1e-4, scaling_rule="none", warmup_steps=0, freeze_last_layer_steps=0)
VALUES = step_values(0, optim=OPTIM, teacher=TeacherConfig(), total_steps=1000, global_batch_size=1024)


@dataclass(frozen=True)
class Setting:
    """What is trained on what: one cell of a benchmark's table."""

    backbone: BackboneConfig
    method: MethodConfig
    global_size_pixels: int
    local_size_pixels: int
    num_images: int
    num_local_crops: int = 8

    def tflop_per_image(self) -> float:
        """Model FLOPs of a step per image; what stochastic depth drops is not counted."""
        low, high = self.method.ibot.mask_ratio_min_max
        flops = training_flops_per_image(
            self.backbone,
            self.method.dino.head,
            self.method.ibot_head,
            global_size_pixels=self.global_size_pixels,
            local_size_pixels=self.local_size_pixels,
            num_local_crops=self.num_local_crops,
            masked_ratio=self.method.ibot.mask_sample_probability * (low + high) / 2,
            drop_path_rate=self.method.drop_path_rate,
        )
        return flops / 1e12


def random_batch(setting: Setting, device: torch.device, seed: int = 0) -> Batch:
    """Crops of random uint8 pixels, drawn on the device, with the block masks of the product."""
    generator = torch.Generator(device).manual_seed(seed)

    def pixels(num_crops: int, size: int) -> Tensor:
        shape = (num_crops, setting.backbone.in_chans, size, size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

    ibot = setting.method.ibot
    masking = MaskSettings(setting.backbone.patch_size, ibot.mask_ratio_min_max, ibot.mask_sample_probability)
    masks = batch_masks(masking, masking.grid(setting.global_size_pixels), setting.num_images, seed=seed, step=0)
    return Batch(
        pixels(2 * setting.num_images, setting.global_size_pixels),
        pixels(setting.num_local_crops * setting.num_images, setting.local_size_pixels),
        torch.from_numpy(masks).to(device),
    )


def normalise(batch: Batch) -> Batch:
    """uint8 crops to floating point around 0. (The product's own needs OpenCV to import.)"""
    return Batch(batch.global_crops.float().mul_(2 / 255).sub_(1), batch.local_crops.float().mul_(2 / 255).sub_(1), batch.masks)


def build_model(setting: Setting, device: torch.device | None = None) -> SelfDistillation:
    """Student and teacher, their weights drawn on the device."""
    torch.manual_seed(0)
    with device or torch.device("cpu"):
        return SelfDistillation(setting.backbone, setting.method)


class TrainingStep:
    """The product's step with fixed learning rate, momentum and temperature."""

    def __init__(self, model: SelfDistillation, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self._world = World(device=device)
        self._optimizer = build_optimizer(model.networks, OPTIM)
        self._engine = TorchEngine(model, self._optimizer, clip_grad=OPTIM.clip_grad, world=self._world, dtype=dtype)

    def __call__(self, batch: Batch) -> None:
        """One step; RuntimeError when it was skipped, since that measures nothing."""
        result = train_step(self.model, self._optimizer, self._engine, normalise(batch), VALUES)
        if result.not_finite:
            raise RuntimeError(f"not finite on random pixels: {', '.join(result.not_finite)}")
