"""Images per second, memory and model-FLOP utilisation of a DINOv2 training step on one GPU, in bfloat16.

    python3 benchmarks/step_gpu.py --archs vit_large vit_giant2 --drop-rates 0 0.4

Runs from a bare checkout: it needs torch, numpy, pydantic and PyYAML, reads no image, and draws its crops on the GPU. Sizes are
those of DINOv2's recipes at patch 14: 2 crops of 224 pixels, 8 of 98. The batch is the largest that fits, halved from a first
guess. FLOPs that stochastic depth drops are not counted as work done, nor what --checkpoint computes twice.
"""

import argparse
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch
from results_file import today, write_result
from torch.utils.checkpoint import checkpoint
from training_step import VALUES, Setting, TrainingStep, build_model, normalise, random_batch

from heliostat.data.batch import Batch
from heliostat.models.config import BackboneConfig
from heliostat.training.config import DinoConfig, IbotConfig, MethodConfig
from heliostat.training.method import SelfDistillation

WARM_UP = 3
KERNELS = ("sdpa", "varlen")

# Dense bfloat16 TFLOP/s of the makers' data sheets; the first whose name is a word of the device's counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


@dataclass(frozen=True)
class Arch:
    """A network with the head of the recipe that DINOv2 trained it with, and the batch to try first."""

    first_batch: int
    backbone: dict[str, object]
    num_prototypes: int = 65_536
    bottleneck_dim: int = 256
    hidden_dim: int = 2048
    separate_head: bool = False


ARCHS = {
    "vit_small": Arch(256, {"arch": "vit_small"}),
    "vit_base": Arch(256, {"arch": "vit_base"}),
    "vit_large": Arch(128, {"arch": "vit_large"}, 131_072, 384, separate_head=True),
    "vit_giant2": Arch(64, {"arch": "vit_giant2", "ffn_layer": "swiglufused"}, 131_072, 384, separate_head=True),
}
SMOKE = {"smoke": Arch(2, {"arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2}, 64, 16, 32)}


def setting(arch: Arch, drop_path_rate: float, num_images: int) -> Setting:
    """One cell of the table."""
    head = {
        "head_n_prototypes": arch.num_prototypes,
        "head_bottleneck_dim": arch.bottleneck_dim,
        "head_hidden_dim": arch.hidden_dim,
    }
    method = MethodConfig(
        drop_path_rate=drop_path_rate,
        centering="sinkhorn_knopp",
        dino=DinoConfig(**head),
        ibot=IbotConfig(separate_head=arch.separate_head, **head),
    )
    return Setting(BackboneConfig(**arch.backbone), method, global_size_pixels=224, local_size_pixels=98, num_images=num_images)


def peak_tflops(device_name: str, given: float | None) -> float | None:
    """The peak to compare with: what the user gave, else the table's, else none."""
    return given or next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def largest_batch(first: int, run: Callable[[int], "Cell"]) -> "Cell | None":
    """run(first), or of the half, and so on while the device's memory does not suffice; None when one image is too many."""
    num_images = first
    while num_images >= 1:
        try:
            return run(num_images)
        except torch.OutOfMemoryError:
            pass  # only after this block the exception lets go of the tensors of the failed try
        gc.collect()
        torch.cuda.empty_cache()
        num_images //= 2
    return None


@dataclass(frozen=True)
class Cell:
    """What was measured of one setting."""

    case: Setting
    kernel: str
    seconds: list[float]
    peak_bytes: int


def recompute_blocks(model: SelfDistillation) -> None:
    """Keep only the inputs of the student's blocks and compute the rest again in the backward pass."""
    for block in model.student.backbone.blocks:
        forward = block.forward
        block.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)


def set_attention(model: SelfDistillation, kernel: str) -> None:
    """Choose the attention of student and teacher."""
    for network in (model.student, model.teacher):
        network.backbone.set_attention(kernel)


def step_seconds(step: TrainingStep, batch: Batch, device: torch.device, num_steps: int) -> list[float]:
    """Seconds of each step; on a GPU between two events on its stream."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(num_steps):
            step(batch)
            times.append(time.perf_counter())
        return [end - start for start, end in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    events[0].record()
    for event in events[1:]:
        step(batch)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


def measure(case: Setting, kernel: str, options: argparse.Namespace, device: torch.device) -> Cell:
    """Warm up, then time steps on one batch. Raises torch.OutOfMemoryError."""
    gc.collect()  # recomputed blocks refer to themselves: without this the model before would stay on the device
    model = build_model(case, device)
    set_attention(model, kernel)
    if options.checkpoint:
        recompute_blocks(model)
    step = TrainingStep(model, device, torch.bfloat16)
    batch = random_batch(case, device)
    step_seconds(step, batch, device, WARM_UP)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = step_seconds(step, batch, device, options.steps)
    return Cell(case, kernel, seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)


def disagreement(arch: Arch, kernels: tuple[str, str], device: torch.device) -> float:
    """The gate: relative difference of the total loss of the same weights, batch and draws with two attention kernels."""
    case = setting(arch, 0.4, 2)
    model, totals = build_model(case, device), []
    batch = normalise(random_batch(case, device))
    for kernel in kernels:
        set_attention(model, kernel)
        torch.manual_seed(0)
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            totals.append(model.weighted_sum(model(batch, VALUES.teacher_temp)).item())
    return abs(totals[1] / totals[0] - 1)


def row(name: str, cell: Cell | None, peak: float | None) -> str:
    """A line of the table."""
    if cell is None:
        return f"| {name} | one image does not fit | | | | | | |"
    rates = sorted(cell.case.num_images / seconds for seconds in cell.seconds)
    rate, tflop = statistics.median(rates), cell.case.tflop_per_image()
    share = f"{100 * rate * tflop / peak:.1f} %" if peak else "unknown peak"
    return (
        f"| {name} | {cell.case.method.drop_path_rate} | {cell.kernel} | {cell.case.num_images} "
        f"| {rate:.4g} ({rates[0]:.4g} to {rates[-1]:.4g}) | {cell.peak_bytes / 2**30:.1f} | {tflop:.3f} | {share} |"
    )


def measure_all(options: argparse.Namespace, device: torch.device, peak: float | None) -> list[str]:
    """All lines of the table; each is printed when it is there."""
    archs, rows = SMOKE if options.smoke else {name: ARCHS[name] for name in options.archs}, []
    kernels = tuple(kernel for kernel in options.attention if device.type == "cuda" or kernel == "sdpa")
    for name, arch in archs.items():
        difference = disagreement(arch, (kernels[0], kernels[-1]), device)
        if difference > 0.01:  # bfloat16 has 8 bits; the losses are means over many rows
            raise RuntimeError(
                f"{name}: the loss differs by {difference:.1e} between {' and '.join(kernels)}; nothing was timed"
            )
        for rate in options.drop_rates:
            first = options.batch or arch.first_batch
            for kernel in kernels:
                cell = largest_batch(
                    first, lambda size, a=arch, r=rate, k=kernel: measure(setting(a, r, size), k, options, device)
                )
                first = cell.case.num_images if cell else 1  # all kernels are compared at one batch
                rows.append(row(name, cell, peak))
                print(rows[-1], flush=True)
    return rows


def table(rows: list[str], options: argparse.Namespace, device_name: str, peak: float | None) -> list[str]:
    """The result file."""
    words = " ".join(["python3 benchmarks/step_gpu.py", *sys.argv[1:]])
    peak_text = f"{peak:g} TFLOP/s dense bfloat16" if peak else "not known, so no utilisation (--peak-tflops gives it)"
    return [
        f"# Training step on a GPU, {today()}",
        "",
        f"{device_name}, torch {torch.__version__}, CUDA {torch.version.cuda}. Command: `{words}`.",
        f"Median of {options.steps} steps, spread in brackets. Utilisation does not count dropped compute; peak: {peak_text}.",
        "Random pixels, one batch again and again, no loader: an upper bound of a run's speed. One GPU, no communication.",
        "Blocks of the student are recomputed (--checkpoint)." if options.checkpoint else "No activation is recomputed.",
        "",
        "| network | drop rate | attention | batch | images/s | peak GiB | TFLOP per image | utilisation |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed of a DINOv2 training step on one GPU.")
    parser.add_argument("--archs", nargs="+", choices=list(ARCHS), default=list(ARCHS))
    parser.add_argument("--drop-rates", nargs="+", type=float, default=[0.0, 0.4])
    parser.add_argument("--attention", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each cell")
    parser.add_argument("--batch", type=int, help="images to try first instead of the table's")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of a device that the table does not know")
    parser.add_argument("--checkpoint", action="store_true", help="recompute the student's blocks in the backward pass")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny network on the CPU: shows that the script runs, measures nothing"
    )
    return parser.parse_args(words)


def main() -> int:
    """Measure and write; 2 where there is nothing to measure on."""
    options = parse(sys.argv[1:])
    if options.smoke:
        torch.set_num_threads(1)
        print("\n".join(table(measure_all(options, torch.device("cpu"), None), options, "a CPU (smoke)", None)))
        return 0
    if not torch.cuda.is_available():
        print(
            "step_gpu: torch sees no CUDA device here; run it on a machine with one (an 80 GB H100 takes all sizes), "
            "or with --smoke to see that it works",
            file=sys.stderr,
        )
        return 2
    name = torch.cuda.get_device_name()
    peak = peak_tflops(name, options.peak_tflops)
    rows = measure_all(options, torch.device("cuda"), peak)
    write_result("step_gpu", table(rows, options, name, peak), name.replace(" ", "-"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
