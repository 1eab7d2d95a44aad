"""What runs in the process of a trial: one training run, on workers of Ray Train or here, whose metric Ray Tune compares.

The training goes on in a thread of its own while this one tells Ray Tune; where Ray Tune stops the trial, the process ends, and
with it the worker group that it started.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import Any

from heliostat.data.image_source import ImageSource
from heliostat.errors import HeliostatError, PreemptedError, StorageError, TrainingError
from heliostat.evaluation.online import PICTURE_PATCHES
from heliostat.runtime.interrupt import in_thread
from heliostat.runtime.online_images import OnlineDraw
from heliostat.runtime.progress import Progress
from heliostat.runtime.relay import Gauges
from heliostat.runtime.session import set_environment
from heliostat.runtime.sweep_board import Board, Event, shown_on_board, tracker_on_board
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_metric import is_online
from heliostat.runtime.sweep_points import Point, trial_config
from heliostat.runtime.sweep_trials import (
    Trial,
    read_curve,
    trial_files,
    trial_scratch,
    write_curve,
    write_failure,
    write_trial,
)
from heliostat.runtime.trainer import TrainingRequest, train
from heliostat.storage import Store
from heliostat.tracking import Run, Tracker
from heliostat.training.recipe import PretrainConfig
from heliostat.training.run import TrainingJob
from heliostat.training.start import StartingWeights, fit_backbone
from heliostat.training.teacher_files import read_evaluations

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class SweepJob:
    """What the trials of a sweep share; can be pickled. files: of the sweep's draft."""

    artifact: str
    base: PretrainConfig
    sweep: SweepConfig
    sources: tuple[ImageSource, ...]
    files: Store
    tracker: Tracker
    board: Board
    start: StartingWeights | None = None
    online: OnlineDraw | None = None
    """The images that every trial's evaluations look at."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What checkpoints of all trials keep."""

    def online_of(self, config: PretrainConfig) -> OnlineDraw | None:
        """The same images at the sizes of one trial, whose crops and patches may differ from the others'."""
        if self.online is None:
            return None
        size = config.online.image_size or config.crops.global_crops_size
        return replace(self.online, image_size=size, picture_size=PICTURE_PATCHES * config.student.patch_size)


class _TrialProgress(Progress):
    """Lines that stay go to the sweep's driver; passing states are shown there from the metrics."""

    def __init__(self, board: Board, trial: str) -> None:
        super().__init__()
        self._board, self._trial = board, trial

    def say(self, text: str = "") -> None:
        if text.strip():
            self._board.note(f"trial {self._trial}: {text.strip()}")

    def update(self, text: str, *, final: bool = False) -> None:
        return


def run_trial(parameters: dict[str, Any], *, job: SweepJob) -> None:
    """Train one trial to its end, from its newest checkpoint, and record it.

    What our own code refuses is written down and not tried again; anything else is raised, for Ray Tune to start it anew.
    """
    set_environment()
    point = Point(parameters["index"], parameters["overrides"], parameters["step"])
    run = job.tracker.attach(parameters["run_id"])
    try:
        _train(point, run, job)
    except PreemptedError:
        raise  # its machine went; the checkpoint is good, and Ray Tune starts it again
    except HeliostatError as error:
        write_failure(job.files, point.index, str(error))
        run.finish("FAILED")


def _train(point: Point, run: Run, job: SweepJob) -> None:
    config = trial_config(job.base, job.sweep, point.overrides)
    name, artifact = point.name, f"{job.artifact} trial {point.name}"
    results = trial_files(job.files, point.index)
    start = {"": fit_backbone(job.start, config.student)} if job.start is not None else {}
    scratch, labels = trial_scratch(job.files, point.index), {"tracker_run": run.id, **job.labels}
    work = TrainingJob(config, job.sources, scratch, start=start, outputs={"": results}, labels=labels)
    tracker = tracker_on_board(job.tracker, job.board, name)
    request = TrainingRequest({"": artifact}, work, tracker, {"": run.id}, job.online_of(config))
    # Without a worker group nobody else exports what is measured here.
    gauges = Gauges() if config.scaling.num_workers == 0 else None
    runs = {"": shown_on_board(run, job.board, name, gauges, artifact)}
    training = in_thread(lambda: train(request, runs, _TrialProgress(job.board, name)))
    curve = _Curve(job, point.index, config.train.steps)
    while not training.done():
        curve.tell(job.board.take(name))
        wait([training], timeout=_POLL_SECONDS)
    summary = training.result()
    curve.tell(job.board.take(name))
    evaluated = read_evaluations(results).get(config.train.steps)
    if evaluated is None and is_online(job.sweep):
        raise TrainingError(
            f"the evaluation of the last step failed, so there is no {job.sweep.metric}; what it said is above, and the same "
            "command tries it again"
        )
    evaluated = evaluated or {}
    metrics = {**summary["metrics"][""], **{key: value for key, value in evaluated.items() if isinstance(value, int | float)}}
    value = _value(job.sweep, metrics)
    points = [*curve.points, (config.train.steps, value)]
    trial = Trial(name, dict(point.overrides), "finished", config.train.steps, value, point.step, metrics, points)
    if write_trial(job.files, trial):
        run.finish("FINISHED")
        curve.finish(value)


def _value(sweep: SweepConfig, metrics: dict[str, float]) -> float:
    """The metric that trials are compared by. Raises TrainingError where the run has none."""
    if sweep.metric not in metrics:
        there = ", ".join(sorted(metrics)) or "none"
        raise TrainingError(f"the run has no {sweep.metric} at its last step; set sweep.metric to one that it has: {there}")
    return float(metrics[sweep.metric])


class _Curve:
    """The metric of a running trial by step: kept, and told to Ray Tune, which may end this process for it.

    The last step is told only when the trial is recorded: what has done all its work is not stopped.
    """

    def __init__(self, job: SweepJob, index: int, steps: int) -> None:
        self._job, self._index, self._steps = job, index, steps
        self.points = read_curve(job.files, index)
        for step, value in self.points:
            self._report(step, value)

    def tell(self, events: Sequence[Event]) -> None:
        """Tell what is new among metrics of the trial."""
        for metrics, step in events:
            value = metrics.get(self._job.sweep.metric)
            if value is not None and step < self._steps and (not self.points or step > self.points[-1][0]):
                self.points.append((step, float(value)))
                try:
                    write_curve(self._job.files, self._index, self.points)
                except StorageError as error:  # the next one that can be written holds them all
                    self._job.board.note(f"trial {self._index:03d}: the curve is not kept now: {error}; the trial goes on")
                self._report(step, value)

    def finish(self, value: float) -> None:
        """Tell the last value."""
        self._report(self._steps, value)

    @staticmethod
    def _report(step: int, value: float) -> None:
        from ray import tune

        tune.report({"step": step, "value": float(value)})
