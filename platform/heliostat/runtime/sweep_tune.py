"""The trials of a sweep on Ray Tune: its searcher asks our state for points, its scheduler stops trials, its result is ours.

Ray Tune's own files are thrown away. It would restore its trials from them after a crash, but not what a finished training run
had reported (docs/decisions/0017); the sweep's artifact tells all that, so a sweep that goes on starts Tune anew with what is
left, after telling the scheduler what the earlier trials had reported.
"""

import os
import tempfile
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from heliostat.errors import HeliostatError, TrainingError
from heliostat.runtime.interrupt import run_interruptible
from heliostat.runtime.progress import Progress, bar
from heliostat.runtime.relay import Watcher
from heliostat.runtime.sweep_points import short, trial_config
from heliostat.runtime.sweep_room import concurrent_trials, process_demand
from heliostat.runtime.sweep_state import SweepState
from heliostat.runtime.sweep_trial import SweepJob, run_trial
from heliostat.runtime.sweep_trials import Trial
from heliostat.training.recipe import PretrainConfig


class _Search(Searcher):  # type: ignore[misc]
    """Hands the state's points to Ray Tune, and the ends of trials to the state."""

    def __init__(self, state: SweepState) -> None:
        super().__init__()
        self._state = state
        self._numbers: dict[str, int] = {}
        self.error: HeliostatError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune pickles its searcher into files that we throw away."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """The settings of the next trial, None to be asked again later, FINISHED when there is none."""
        if self.error is not None:
            return Searcher.FINISHED
        try:
            offer = self._state.offer()
        except HeliostatError as error:  # Tune would wrap it in pages of its own; what runs may end
            self.error = error
            return Searcher.FINISHED
        if isinstance(offer, str):
            return None if offer == "wait" else Searcher.FINISHED
        point = offer.point
        self._numbers[trial_id] = point.index
        return {"index": point.index, "overrides": dict(point.overrides), "step": point.step, "run_id": offer.run_id}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A running trial reported."""
        if "value" in result:
            self._state.reported(self._numbers[trial_id], int(result["step"]), float(result["value"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial ended by itself, was stopped, or crashed too often. The result that stopped it comes only here."""
        if result is not None:
            self.on_trial_result(trial_id, result)
        try:
            self._state.ended(self._numbers.pop(trial_id), crashed=error)
        except HeliostatError as failure:
            self.error = self.error or failure

    def save(self, checkpoint_path: str) -> None:
        """Nothing: points and records are in the artifact."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is taken up from the artifact."""


class _Earlier:
    """What a scheduler asks of a trial: its identity."""

    def __init__(self, name: str) -> None:
        self.trial_id = f"earlier-{name}"


def scheduler(state: SweepState, steps: int) -> TrialScheduler:
    """Successive halving that knows what trials of earlier drivers reported, or one that stops nothing."""
    sweep = state.sweep
    if sweep.asha is None:
        return FIFOScheduler()
    asha = AsyncHyperBandScheduler(
        time_attr="step",
        metric="value",
        mode=sweep.mode,
        max_t=steps + 1,  # the last step is told when the trial is recorded, and stops nothing
        grace_period=sweep.asha.grace_steps,
        reduction_factor=sweep.asha.reduction_factor,
    )
    for trial in state.table():
        earlier: Any = _Earlier(trial.name)
        asha.on_trial_add(None, earlier)
        for step, value in trial.curve:
            asha.on_trial_result(None, earlier, {"step": step, "value": value})
    return asha


def run_trials(state: SweepState, job: SweepJob, progress: Progress) -> None:
    """Run what is left of a sweep. Raises TrainingError when no trial fits the cluster, and what drawing a point raises."""
    config = trial_config(state.base, state.sweep, {})
    at_once = concurrent_trials(state.sweep, config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    wanted = state.sweep.max_concurrent_trials
    if at_once < wanted:
        progress.say(
            f"  room for {at_once} trial{'s' if at_once > 1 else ''} at a time; sweep.max_concurrent_trials is {wanted}"
        )
    # Tune's own check wants the metric in every result; a trial that failed has none.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    search = _Search(state)
    storage = tempfile.TemporaryDirectory(prefix="heliostat-sweep-", ignore_cleanup_errors=True)
    with Watcher(job.board, _Display(state, config, progress)), storage as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, job=job), process_demand(config)),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler(state, config.train.steps),
                num_samples=-1,  # until the searcher says that there is none left
                max_concurrent_trials=at_once,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=config.scaling.max_failures),
            ),
        )
        try:
            run_interruptible(tuner.fit)
        except tune.TuneError as error:
            raise TrainingError(f"Ray Tune gave up: {' '.join(str(error).split())[-300:]}; see --debug") from error
    if search.error is not None:
        raise search.error


class _Display:
    """One passing line about all trials, from their metrics."""

    def __init__(self, state: SweepState, config: PretrainConfig, progress: Progress) -> None:
        self._state, self._progress = state, progress
        self._total = state.count * config.train.steps
        self._steps: dict[int, int] = {}

    def __call__(self, source: str, metrics: dict[str, float], step: int) -> None:
        if step < 0:
            self._progress.say(f"  {source}")
            return
        self._steps[int(source)] = max(step, self._steps.get(int(source), 0))
        done, ends = self._state.steps_done(self._steps), self._state.table()
        self._progress.update(
            f"{len(ends)}/{self._state.count} trials {bar(done, self._total)} step {done}/{self._total}{self._best(ends)}"
        )

    def _best(self, ends: list[Trial]) -> str:
        values = [trial.value for trial in ends if trial.status == "finished" and trial.value is not None]
        if not values:
            return ""
        best = max(values) if self._state.sweep.mode == "max" else min(values)
        return f"  best {self._state.sweep.metric} {short(best)}"
