"""Metrics of trials on their way: from the workers of a trial to its own process, which tells Ray Tune, and to the driver.

One actor serves a sweep. Workers push through the tracker that they log to anyway, wherever the metrics come from.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from heliostat.runtime.relay import Gauges
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
        self._actor = ray.remote(num_cpus=0)(_Board).remote()

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
class BoardRun:
    """A tracker's run whose metrics are seen by the board as well, and by Prometheus where this process sets gauges."""

    run: Run
    board: Board
    trial: str
    gauges: Gauges | None = None
    artifact: str = ""

    @property
    def id(self) -> str:
        """That of the run."""
        return self.run.id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers and send them to the board."""
        self.run.log_metrics(metrics, step)
        self.board.push(self.trial, metrics, step)
        if self.gauges is not None:
            self.gauges.set(self.artifact, metrics)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep one local file with the run."""
        self.run.log_file(path, folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""
        self.run.set_tags(tags)

    def finish(self, status: str) -> None:
        """Close the run."""
        self.run.finish(status)


@dataclass(frozen=True)
class BoardTracker:
    """A tracker whose runs a trial's workers attach to: what they log, the board sees."""

    tracker: Tracker
    board: Board
    trial: str

    @property
    def uri(self) -> str:
        """That of the tracker."""
        return self.tracker.uri

    def start(self, name: str, *, config: Mapping[str, Any], tags: Mapping[str, str], resume_id: str = "") -> Run:
        """Open a run of the tracker, or reopen it."""
        return BoardRun(self.tracker.start(name, config=config, tags=tags, resume_id=resume_id), self.board, self.trial)

    def attach(self, run_id: str) -> Run:
        """The open run with this id."""
        return BoardRun(self.tracker.attach(run_id), self.board, self.trial)
