"""Beside the training loop of a worker: what it is asked from outside, and whether the group still moves.

A thread tells the driver's relay what this rank is doing and hears whether it should stop. When nothing has moved here for too
long it names the rank that the others wait for and ends this process: Ray then ends the whole group, the stuck process too, and
starts it again from the newest checkpoint.
"""

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray

from heliostat.runtime.relay import Relay
from heliostat.runtime.spot_notice import SpotNotice
from heliostat.training.trainer import Ask

# A start reads weights and checkpoints, a save may wait for its store: both take the time they take. Ranks that wait for one of
# them in a step are what ends a group whose start or save hangs.
_BEAT_SECONDS = 2.0
_PATIENCE_SECONDS = 20.0  # for one call to the relay; without an answer the driver is gone, and Ray ends the workers
_LAST_SAVE_SECONDS = 30.0  # before a node goes, one more checkpoint is asked for
STALLED = 86
"""Exit status of a worker whose watchdog ended it."""


class WorkerWatch:
    """The watch of one rank. `mark` and `asked` are the loop's hooks; `start` begins the thread, `stop` ends it."""

    def __init__(self, relay: Relay, label: str, rank: int, *, stall_seconds: float, spot: SpotNotice | None) -> None:
        self._relay, self._label, self._rank = relay, label, rank
        self._stall_seconds, self._spot = stall_seconds, spot
        self._doing, self._step, self._since = "start", 0, time.monotonic()
        self._is_stopping = False
        self._saved_for: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heliostat-watch")
        self.notice_seconds = 0.0
        """Seconds until the machine goes, where a spot notice was the reason to stop."""

    def start(self) -> "WorkerWatch":
        """Begin to watch."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; the run is over or failed."""
        self._done.set()

    def mark(self, doing: str, step: int) -> None:
        """The loop begins to do something."""
        self._doing, self._step, self._since = doing, step, time.monotonic()

    def asked(self) -> Ask:
        """What is asked of the run now: by the driver, by a spot notice, or by Ray, which drains a node of the group."""
        if self._is_stopping or self.notice_seconds:
            return Ask.STOP
        return Ask.SAVE if self._must_save(ray_deadline()) else Ask.GO_ON

    def _must_save(self, deadline: float | None) -> bool:
        """One checkpoint when Ray announces that a node goes, and one shortly before; Ray restarts the group afterwards."""
        if deadline is None:
            return False
        now = "last" if deadline - time.time() < _LAST_SAVE_SECONDS else "first"
        if now in self._saved_for:
            return False
        self._saved_for.add(now)
        return True

    def _watch(self) -> None:
        while not self._done.wait(_BEAT_SECONDS):
            try:
                self._is_stopping = self._relay.beat(self._rank, self._doing, self._step, _PATIENCE_SECONDS)
                if self._spot is not None and not self.notice_seconds:
                    self._look_at_notice(self._spot)
                if self._doing in ("data", "step") and time.monotonic() - self._since > self._stall_seconds:
                    self._give_up()
            except ray.exceptions.RayError:
                continue  # Ray ends this process when its driver is gone; a slow answer is asked for again

    def _look_at_notice(self, spot: SpotNotice) -> None:
        left = spot.seconds_left()
        if left is not None:
            self.notice_seconds = max(left, 1.0)
            self._relay.leaving(self.notice_seconds)
            self._relay.note(self._label, f"this machine is taken back in {left:.0f} s: the run stops with a checkpoint")

    def _give_up(self) -> None:
        beats = self._relay.beats(_PATIENCE_SECONDS)
        self._relay.note(self._label, stall_line(beats, self._stall_seconds))
        time.sleep(1.0)  # let the line out
        os._exit(STALLED)


def ray_deadline() -> float | None:
    """When Ray takes a node of this group away, in seconds since 1970; None while it does not.

    Ray's public function for this is a barrier over all workers; the loop agrees among the ranks anyway.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info: Any = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return info.deadline_ms / 1000 if info.deadline_ms else time.time() + 2 * _LAST_SAVE_SECONDS


def stall_line(beats: Mapping[int, tuple[str, int, float]], stall_seconds: float) -> str:
    """One line that names the rank that the others wait for: one that is not heard of, else the one that is furthest behind."""
    if not beats:
        return f"nothing moved for {stall_seconds:g} s and no rank was heard of; the workers are started again"
    silent = {rank: beat for rank, beat in beats.items() if beat[2] > 3 * _BEAT_SECONDS}
    order = {"start": 0, "data": 1, "step": 2, "save": 3}
    rank = min(silent or beats, key=lambda rank: (beats[rank][1], order.get(beats[rank][0], 2), -beats[rank][2]))
    doing, step, age = beats[rank]
    state = f"has given no sign of life for {age:.0f} s" if rank in silent else "answers, and does not get on"
    return (
        f"nothing moved for {stall_seconds:g} s (scaling.collective_timeout_seconds): rank {rank} {state} "
        f"({_DOING[doing]}, {step} steps done); the workers are started again"
    )


_DOING = {
    "start": "starting",
    "data": "waiting for a batch",
    "step": "computing a step",
    "save": "writing a checkpoint",
}
