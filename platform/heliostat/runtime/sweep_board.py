"""Metrics of trials on their way: from the workers of a trial to its own process, which tells Ray Tune, and to the driver.

One actor serves a sweep. Workers push through the tracker that they log to anyway, wherever the metrics come from.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import ray

from heliostat.runtime.relay import Gauges, beside_driver
from heliostat.tracking import Run, Tracker

Event = tuple[dict[str, float], int]
"""Metrics and their step."""


class _Board:
    def __init__(self) -> None:
        self._shown: list[tuple[str, dict[str, float], int]] = []
        self._of_trials: dict[str, list[Event]] = defaultdict(list)

    def push(self, trial: str, metrics: dict[str, float], step: int) -> None:
        self._shown.append((trial, metrics, step))
        self._of_trials[trial].append((metrics, step))

    def note(self, text: str) -> None:
        self._shown.append((text, {}, -1))

    def take(self, trial: str) -> list[Event]:
        return self._of_trials.pop(trial, [])

    def drain(self) -> list[tuple[str, dict[str, float], int]]:
        events, self._shown = self._shown, []
        return events


class Board:
    """Handle on the actor; can be passed to trials and workers."""

    def __init__(self) -> None:
        self._actor = beside_driver(_Board)

    def push(self, trial: str, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics of a step, without waiting."""
        self._actor.push.remote(trial, dict(metrics), step)

    def note(self, text: str) -> None:
        """Send one line of text to the driver, without waiting."""
        self._actor.note.remote(text)

    def take(self, trial: str) -> list[Event]:
        """Fetch what a trial's workers sent since the last call."""
        events: list[Event] = ray.get(self._actor.take.remote(trial))
        return events

    def drain(self) -> list[tuple[str, dict[str, float], int]]:
        """Fetch what came from all trials since the last call: (trial, metrics, step), or (text, {}, -1)."""
        events: list[tuple[str, dict[str, float], int]] = ray.get(self._actor.drain.remote())
        return events

    def close(self) -> None:
        """Stop the actor."""
        ray.kill(self._actor)


@dataclass(frozen=True)
class _BoardRun:
    """A tracker's run whose metrics are seen by the board as well, and by Prometheus where this process sets gauges.

    Everything else is the run's own, whatever runs learn to keep.
    """

    run: Run
    board: Board
    trial: str
    gauges: Gauges | None
    artifact: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log_metrics(metrics, step)
        self.board.push(self.trial, metrics, step)
        if self.gauges is not None:
            self.gauges.set(self.artifact, metrics)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle asks before there is a run
            raise AttributeError(name)
        return getattr(self.run, name)


def shown_on_board(run: Run, board: Board, trial: str, gauges: Gauges | None = None, artifact: str = "") -> Run:
    """The run, with what is logged to it sent to the board too; `gauges` are set for `artifact`."""
    return cast(Run, _BoardRun(run, board, trial, gauges, artifact))


@dataclass(frozen=True)
class _BoardTracker:
    """A tracker whose runs a trial's workers attach to: what they log, the board sees."""

    tracker: Tracker
    board: Board
    trial: str

    def attach(self, *arguments: Any, **named: Any) -> Run:
        return shown_on_board(self.tracker.attach(*arguments, **named), self.board, self.trial)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tracker, name)


def tracker_on_board(tracker: Tracker, board: Board, trial: str) -> Tracker:
    """The tracker, for a trial's workers."""
    return cast(Tracker, _BoardTracker(tracker, board, trial))
