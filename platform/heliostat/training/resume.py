"""How a run goes on from a checkpoint: the newest one that every rank can read, and what differs from the run that wrote it."""

from collections.abc import Callable
from typing import Any

from heliostat.errors import CheckpointError
from heliostat.training.checkpoint import FOLDER, StoredCheckpoint, newest_checkpoint, open_checkpoint, refuse_misfit
from heliostat.training.trainer import DATA_REVISIONS, LoopState, Trainer
from heliostat.training.world import compute_dtype


def restore(trainer: Trainer) -> LoopState:
    """Take over the newest checkpoint that every rank can read; a fresh state without one."""
    below: int | None = None
    while True:
        stored = newest_checkpoint(trainer.files, trainer.notify, below)
        step = trainer.world.lowest(stored.step if stored else 0)
        if stored is not None and stored.step > step:  # another rank could not open this one
            stored = open_checkpoint(trainer.files, step) if step else None
        if stored is None:
            return LoopState()
        below = stored.step
        if stored.state["networks"] != list(trainer.method.networks):
            _discard(trainer, stored)
            return LoopState()
        refuse_misfit(stored, trainer.engine.shapes())
        if _take_over(trainer, stored):
            break
    state = stored.state
    trainer.loader.load_state_dict(_loader_state(trainer, stored))
    if trainer.world.is_main:
        written = _written_otherwise(trainer, stored)
        trainer.notify(f"resuming at step {stored.step} of {trainer.config.train.steps}{written and f', written {written}'}")
    return LoopState(stored.step, state["skipped_steps"], state["skipped_in_a_row"])


def _loader_state(trainer: Trainer, stored: StoredCheckpoint) -> dict[str, Any]:
    """Where the loader stood. When images were forgotten since, the order of those that are left is another one."""
    kept: dict[str, Any] = stored.state["loader"]
    if stored.state.get(DATA_REVISIONS, "") == trainer.labels.get(DATA_REVISIONS, ""):
        return kept
    if trainer.world.is_main:
        trainer.notify(
            f"images were forgotten since the checkpoint of step {stored.step}: from there on the run sees those that are "
            "left, in another order than it would have"
        )
    return kept | {"order": trainer.loader.state_dict()["order"]}


def computing(trainer: Trainer) -> dict[str, str]:
    """What is no part of a model's identity and yet makes its last digits other ones."""
    device, scaling = trainer.world.device, trainer.config.scaling
    return {
        "scaling.parallel": scaling.parallel,
        "device": device.type,
        "compute_dtype": str(compute_dtype(trainer.config.train.compute_dtype, device)).removeprefix("torch."),
        "scaling.images_per_pass": str(scaling.images_per_pass),
    }


def _written_otherwise(trainer: Trainer, stored: StoredCheckpoint) -> str:
    """How a checkpoint's run computed, where this one does so differently: it goes on, but not bit for bit."""
    before, size = stored.state.get("computing", {}), stored.world_size  # the first checkpoints did not say
    parts = [f"by {size} worker{'s' if size > 1 else ''}"] if size != trainer.world.size else []
    others = [f"{name} {before[name]}" for name, value in computing(trainer).items() if before.get(name, value) != value]
    return " ".join(parts + ([f"with {', '.join(others)}"] if others else []))


def _take_over(trainer: Trainer, stored: StoredCheckpoint) -> bool:
    """Read this rank's part, and apply it when all ranks could read theirs."""
    apply: Callable[[], None] | None = None
    try:
        apply = trainer.engine.restore(stored.read, stored.places.keys())
    except CheckpointError as error:
        trainer.notify(f"passing over a damaged checkpoint: {error}")
    if not trainer.world.agree([apply is not None])[0] or apply is None:
        return False
    apply()
    return True


def _discard(trainer: Trainer, stored: StoredCheckpoint) -> None:
    """Throw away the checkpoints of a run that trained other students together: each is drawn and stepped by itself anyway."""
    if trainer.world.is_main:
        trainer.notify(
            f"the checkpoint of step {stored.step} is of students {', '.join(stored.state['networks'])}; "
            f"starting again with {', '.join(trainer.method.networks)}"
        )
        for entry in list(trainer.files.list(FOLDER)):
            trainer.files.delete(entry.key)
    trainer.world.agree([True])  # nobody goes on before they are gone
