"""What the driver of a sweep knows: which trial comes next, which run, how they ended. Knows nothing of Ray.

Every decision is stored before it takes effect, so a driver that dies leaves a sweep which the next one takes up: a point is
written before its trial starts, the record of a trial once, and neither is drawn or run again.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from heliostat.runtime.pipelines import config_of
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_points import Point, fixed_points, num_points, short, trial_config
from heliostat.runtime.sweep_search import needed_results, optuna_point
from heliostat.runtime.sweep_trials import (
    Curve,
    Trial,
    drop_scratch,
    read_curve,
    read_failure,
    read_points,
    read_trial,
    take_failures,
    write_failure,
    write_point,
    write_trial,
)
from heliostat.storage import Store
from heliostat.tracking import Tracker
from heliostat.training.recipe import PretrainConfig

_UNKNOWN = "its process ended without a word; see --debug"


@dataclass(frozen=True)
class Offer:
    """A trial to start: its settings and its tracker's run."""

    point: Point
    run_id: str


class SweepState:
    """The trials of one sweep. Ray Tune's thread calls `offer`, `reported` and `ended`; any thread may read."""

    def __init__(
        self,
        base: PretrainConfig,
        sweep: SweepConfig,
        files: Store,
        *,
        tracker: Tracker,
        parent_run: str,
        notify: Callable[[str], None],
    ) -> None:
        self.base, self.sweep, self.files = base, sweep, files
        self._tracker, self._parent_run, self._notify = tracker, parent_run, notify
        self.count = num_points(sweep)
        self._fixed = fixed_points(sweep) if sweep.search != "optuna" or not sweep.space else []
        self._points: dict[int, tuple[Point, str]] = {}
        self._running: dict[int, Curve] = {}
        self.ends: dict[int, Trial] = {}
        self._lock = threading.Lock()

    def take_up(self) -> None:
        """Read what an earlier driver stored; what failed runs again."""
        take_failures(self.files)
        self._points = read_points(self.files)
        for index in range(self.count):
            trial = read_trial(self.files, index)
            if trial is not None:
                self.ends[index] = trial
                drop_scratch(self.files, index)  # that driver may have died between the record and this
                if index in self._points:
                    self._close(trial, self._points[index][1])
                else:  # its file was lost; its run cannot be found
                    self._points[index] = trial.point, ""

    @property
    def num_failed(self) -> int:
        """Trials that failed."""
        return sum(trial.status == "failed" for trial in list(self.ends.values()))

    @property
    def waiting(self) -> list[int]:
        """Trials that neither ended nor run, in order."""
        return [index for index in range(self.count) if index not in self.ends and index not in self._running]

    def offer(self) -> Offer | Literal["wait", "none"]:
        """The next trial to start; `wait` until another has ended, `none` when no other will start."""
        with self._lock:
            waiting = self.waiting
            if not waiting or self.num_failed > self.sweep.max_failed_trials:
                return "none"
            index = waiting[0]
            point, run_id = self._points.get(index, (None, ""))
            point = point or self._draw(index)
            if point is None:
                return "wait"
            run = self._start_run(point, run_id)
            write_point(self.files, point, run)
            self._points[index] = point, run
            self._running[index] = read_curve(self.files, index)
            return Offer(point, run)

    def _draw(self, index: int) -> Point | None:
        if self._fixed:
            return self._fixed[index]
        if any(number not in self.ends for number in needed_results(self.sweep, index)):
            return None
        return optuna_point(self.sweep, index, [self._points[number][0] for number in range(index)], self.ends)

    def _start_run(self, point: Point, run_id: str) -> str:
        tags = {"heliostat.trial": point.name, "heliostat.settings": point.shown()}
        tags |= {"mlflow.parentRunId": self._parent_run} if self._parent_run else {}
        config = config_of(trial_config(self.base, self.sweep, point.overrides))
        return self._tracker.start(f"trial {point.name}", config=config, tags=tags, resume_id=run_id).id

    def reported(self, index: int, step: int, value: float) -> None:
        """The sweep's metric of a running trial."""
        curve = self._running.get(index, [])
        if not curve or curve[-1][0] < step:
            curve.append((step, value))

    def ended(self, index: int, *, crashed: bool) -> Trial:
        """A trial is over: by its own record it finished; one without record and without failure was stopped by comparison."""
        with self._lock:
            curve = self._running.pop(index, [])
            trial = read_trial(self.files, index) or self._without_record(index, curve, crashed=crashed)
            if trial.status == "stopped" and not write_trial(self.files, trial):
                trial = read_trial(self.files, index) or trial  # it finished while it was being stopped
            self.ends[index] = trial
            if trial.status != "failed":
                drop_scratch(self.files, index)
            self._close(trial, self._points[index][1])
        self._notify(describe(trial, self.sweep))
        return trial

    def _without_record(self, index: int, curve: Curve, *, crashed: bool) -> Trial:
        point = self._points[index][0]
        facts: dict[str, Any] = {"name": point.name, "overrides": dict(point.overrides), "label": point.step, "curve": curve}
        facts["step"] = curve[-1][0] if curve else 0
        error = read_failure(self.files, index)
        if error is not None or crashed or not curve:
            if error is None:
                error = _UNKNOWN
                write_failure(self.files, index, error)
            return Trial(**facts, status="failed", error=error)
        value = curve[-1][1]
        return Trial(**facts, status="stopped", value=value, metrics={self.sweep.metric: value})

    def _close(self, trial: Trial, run_id: str) -> None:
        """Close the run of a trial. One that finished does so itself, unless it was killed just after its record."""
        run = self._tracker.attach(run_id)
        run.set_tags({"heliostat.status": trial.status})
        run.finish({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[trial.status])

    def abandon(self) -> None:
        """Close the runs of trials that go on when the sweep is taken up again."""
        for index in list(self._running):
            self._tracker.attach(self._points[index][1]).finish("KILLED")

    def table(self) -> list[Trial]:
        """All trials that ended, in order."""
        return [self.ends[index] for index in sorted(self.ends)]

    def steps_done(self, running: Mapping[int, int]) -> int:
        """Optimizer steps of all trials, as far as they are known; `running`: the last step seen of each."""
        return sum(self.ends[index].step if index in self.ends else running.get(index, 0) for index in range(self.count))


def describe(trial: Trial, sweep: SweepConfig) -> str:
    """One line about a trial that ended."""
    if trial.status == "failed":
        return f"trial {trial.name} failed: {trial.error}  ({trial.point.shown()})"
    how = "finished" if trial.status == "finished" else f"stopped at step {trial.step}"
    return f"trial {trial.name} {how}: {sweep.metric} {short(trial.value)}  ({trial.point.shown()})"
