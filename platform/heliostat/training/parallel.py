"""How a run lies on its workers: the smallest way that fits, by an estimate that is printed. From configurations alone."""

from dataclasses import dataclass

from heliostat.errors import ConfigError
from heliostat.models.config import BackboneConfig
from heliostat.training.memory import GIB, training_memory
from heliostat.training.recipe import TrainingConfig

WAYS = ("ddp", "zero1", "zero2", "zero3")
_MEANING = {
    "none": "one worker holds everything",
    "ddp": "everything whole on every worker, gradients averaged",
    "zero1": "moments sharded",
    "zero2": "moments and gradients sharded",
    "zero3": "moments, gradients, weights and averages sharded",
}


@dataclass(frozen=True)
class Parallel:
    """The way that was chosen, and lines that say why."""

    name: str
    lines: tuple[str, ...]


def choose_parallel(
    config: TrainingConfig, teacher: BackboneConfig | None, num_workers: int, capacity_bytes: float
) -> Parallel:
    """What `scaling.parallel` names, or for "auto" the first of ddp, zero1, zero2, zero3 that fits capacity_bytes.

    capacity_bytes: what one worker may fill. Where nothing fits, the way that needs least, and a line that says so.
    """
    asked = config.scaling.parallel
    if asked == "none" and num_workers > 1:
        raise ConfigError(
            f"scaling.parallel=none is for one worker, and there are {num_workers}; use ddp, zero1, zero2 or zero3"
        )
    ways = {"auto": WAYS if num_workers > 1 else ("none",)}.get(asked, (asked,))
    images = config.train.global_batch_size // num_workers
    needed = {way: training_memory(config, teacher, images, parallel=way, num_workers=num_workers).total for way in ways}
    fitting = [way for way in ways if needed[way] <= capacity_bytes]
    name = fitting[0] if fitting else min(needed, key=lambda way: needed[way])
    sizes = ", ".join(f"{way} {size / GIB:.2f}" for way, size in needed.items())
    lines = [f"parallel: {name} ({_MEANING[name]}); estimated GiB per worker: {sizes}; there are {capacity_bytes / GIB:.1f}"]
    if not fitting:
        lines.append(
            f"by the estimate that is {needed[name] / GIB:.1f} GiB of {capacity_bytes / GIB:.1f}: add workers, set "
            "scaling.images_per_pass, or scaling.activation_checkpointing=true"
        )
    return Parallel(name, tuple(lines))
