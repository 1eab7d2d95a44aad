"""How well a run uses its hardware: share of the peak, memory, time to go."""

import resource
import sys

import torch

from heliostat.models.config import BackboneConfig
from heliostat.training.costs import flops_per_image, head_training_flops_per_image
from heliostat.training.recipe import PretrainConfig, TrainingConfig

# Dense bfloat16 peaks in TFLOP/s by what torch calls the device, from the maker's data sheets (without sparsity).
# The first name that is found in the device's counts: longer names stand before shorter ones.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 836.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,  # SXM
    "H20": 148.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,  # with float32 accumulation
    "RTX 3090": 71.0,  # with float32 accumulation
}


def peak_tflops(config: TrainingConfig, device: torch.device) -> float | None:
    """Peak of one worker in TFLOP/s: `scaling.peak_tflops`, else that of a known GPU, else None.

    CPUs are not in the table: what their cores reach depends on clocks and libraries more than on their name.
    """
    if config.scaling.peak_tflops:
        return config.scaling.peak_tflops
    if device.type != "cuda":
        return None
    return peak_of_device(torch.cuda.get_device_name(device))


def peak_of_device(name: str) -> float | None:
    """Dense bfloat16 peak of a device by name, in TFLOP/s; None for one that is not known."""
    words = f" {name.upper().replace('-', ' ')} "
    return next((peak for known, peak in PEAK_TFLOPS.items() if f" {known.upper()} " in words), None)


def use_of_hardware(
    config: TrainingConfig,
    *,
    step: int,
    images_per_second: float,
    num_workers: int,
    device: torch.device,
    teacher: BackboneConfig | None = None,
) -> dict[str, float]:
    """Metrics after `step` steps at a speed over all `num_workers`. `train/mfu` is there only where a peak is known.

    teacher: the frozen teacher of a distillation.
    """
    remaining = (config.train.steps - step) * config.train.global_batch_size
    numbers = {
        "train/eta_seconds": remaining / max(images_per_second, 1e-9),
        "train/memory_bytes": float(peak_memory_bytes(device)),
    }
    peak = peak_tflops(config, device)
    if peak is not None:
        warmup = config.init.head_warmup_steps if isinstance(config, PretrainConfig) else 0
        flops = _flops_per_image(config, teacher, is_head_warmup=step <= warmup)
        numbers["train/mfu"] = flops * images_per_second / (num_workers * peak * 1e12)
    return numbers


def _flops_per_image(config: TrainingConfig, teacher: BackboneConfig | None, *, is_head_warmup: bool) -> float:
    return head_training_flops_per_image(config) if is_head_warmup else flops_per_image(config, teacher)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: allocated on its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
