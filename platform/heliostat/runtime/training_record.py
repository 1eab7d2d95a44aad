"""What the main rank keeps of a training run besides its files: metrics and the machine's load in the tracker, and costs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from heliostat.costs import Device, Meter
from heliostat.costs.nvml import energy_counter, gpu_loads
from heliostat.storage import Store
from heliostat.tracking import Run, without_secrets
from heliostat.training.run import TrainingJob
from heliostat.training.trainer import Evaluate, Report
from heliostat.training.world import World


@contextmanager
def recording(job: TrainingJob, world: World, runs: Mapping[str, Run], notify: Callable[[str], None]) -> Iterator[Report]:
    """A report that goes into the runs (by network) and counts the costs of this attempt until the context ends.

    Ranks other than the main one get a report that does nothing: they have nothing to say.
    """
    if not world.is_main:
        yield _say_nothing
        return
    device = _device(world, job)
    meter = Meter(
        job.files,
        device,
        num_workers=world.size,
        record_steps=job.config.train.log_every_steps,
        joules=energy_counter(device.uuid) if device.is_gpu else None,
        notify=notify,
    )

    def report(metrics: Mapping[str, float], step: int, model: str = "") -> None:
        runs[model].log_metrics(metrics, step)
        if "train/step" in metrics:  # an evaluation is reported at the step of its weights, later
            meter.note(step)

    with next(iter(runs.values())).watch_system(also=gpu_loads):
        try:
            yield report
        finally:
            meter.close()


def _say_nothing(metrics: Mapping[str, float], step: int, model: str = "") -> None:
    """Only the main rank reports."""


def _device(world: World, job: TrainingJob) -> Device:
    """What a worker computes on, as the costs count it."""
    if world.device.type != "cuda":
        return Device(cores=max(job.config.scaling.cpus_per_worker, job.config.scaling.threads_per_worker))
    properties = torch.cuda.get_device_properties(world.device)
    return Device(name=properties.name, uuid=str(properties.uuid))


def noted(evaluate: Evaluate, runs: Mapping[str, Run]) -> Evaluate:
    """An evaluation that also leaves in each run where its newest evaluation point lies; weights stay in the store."""

    def evaluate_and_note(model: str, step: int, files: Store) -> None:
        runs[model].set_tags({"heliostat.teacher_step": str(step), "heliostat.teacher_files": without_secrets(files.uri)})
        evaluate(model, step, files)

    return evaluate_and_note
