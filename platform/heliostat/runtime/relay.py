"""A small actor through which workers tell the driver how far they are, and Prometheus what they measure."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import ray

from heliostat.metrics import METRICS, Metric

_POLL_SECONDS = 0.5


class Gauges:
    """One Prometheus gauge per live metric, exported by Ray's agent for as long as this process lives, labelled by artifact."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def set(self, artifact: str, metrics: Mapping[str, float]) -> None:
        """Set the live ones among the metrics; the others are for the tracker only."""
        for name, value in metrics.items():
            metric = METRICS.get(name)
            if metric is not None and metric.live:
                self._gauge(metric).set(value, tags={"artifact": artifact})

    def _gauge(self, metric: Metric) -> Any:
        if metric.name not in self._gauges:
            from ray.util.metrics import Gauge

            text = f"{metric.meaning} [{metric.unit}]"
            self._gauges[metric.name] = Gauge(metric.short_name, description=text, tag_keys=("artifact",))
        return self._gauges[metric.name]


class Beat(NamedTuple):
    """What a rank was doing when it was last heard of."""

    doing: str
    step: int
    at: float


class _Relay:
    """Keeps events until the driver fetches them, and sets the gauges."""

    def __init__(self) -> None:
        self._events: list[tuple[str, dict[str, float], int]] = []
        self._gauges = Gauges()
        self._is_stopping = False
        self._beats: dict[int, Beat] = {}
        self._leaving_at: float | None = None

    def push(self, artifact: str, metrics: dict[str, float], step: int) -> None:
        self._events.append((artifact, metrics, step))
        self._gauges.set(artifact, metrics)

    def note(self, artifact: str, text: str) -> None:
        self._events.append((text, {}, -1))

    def ask_to_stop(self) -> None:
        self._is_stopping = True

    def beat(self, rank: int, doing: str, step: int) -> bool:
        self._beats[rank] = Beat(doing, step, time.monotonic())
        return self._is_stopping

    def leaving(self, seconds: float) -> None:
        self._leaving_at = max(self._leaving_at or 0.0, time.monotonic() + seconds)

    def take_leaving(self) -> float | None:
        leaving_at, self._leaving_at = self._leaving_at, None
        return None if leaving_at is None or self._is_stopping else max(0.0, leaving_at - time.monotonic())

    def beats(self) -> dict[int, tuple[str, int, float]]:
        now = time.monotonic()
        return {rank: (beat.doing, beat.step, now - beat.at) for rank, beat in self._beats.items()}

    def drain(self) -> list[tuple[str, dict[str, float], int]]:
        events, self._events = self._events, []
        return events


def beside_driver(actor: type) -> Any:
    """Start an actor on this process's own node: any other node may be lost, and the run goes on."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(actor).remote()


class Relay:
    """Handle on the actor; can be passed to workers."""

    def __init__(self) -> None:
        self._actor = beside_driver(_Relay)

    def push(self, artifact: str, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics of a step, without waiting."""
        self._actor.push.remote(artifact, dict(metrics), step)

    def note(self, artifact: str, text: str) -> None:
        """Send one line of text, without waiting."""
        self._actor.note.remote(artifact, text)

    def drain(self) -> list[tuple[str, dict[str, float], int]]:
        """Fetch what came since the last call: (artifact, metrics, step), or (text, {}, -1)."""
        events: list[tuple[str, dict[str, float], int]] = ray.get(self._actor.drain.remote())
        return events

    def ask_to_stop(self) -> None:
        """Have every rank stop with a checkpoint, within seconds."""
        ray.get(self._actor.ask_to_stop.remote())

    def beat(self, rank: int, doing: str, step: int, timeout_seconds: float) -> bool:
        """Tell what a rank is doing; returns whether it should stop. Raises what Ray raises when the driver is gone."""
        return bool(ray.get(self._actor.beat.remote(rank, doing, step), timeout=timeout_seconds))

    def beats(self, timeout_seconds: float) -> dict[int, tuple[str, int, float]]:
        """Of every rank: what it was doing, the steps done, and the seconds since it was heard of."""
        beats: dict[int, tuple[str, int, float]] = ray.get(self._actor.beats.remote(), timeout=timeout_seconds)
        return beats

    def leaving(self, seconds: float) -> None:
        """Tell that a machine of the group goes in so many seconds."""
        self._actor.leaving.remote(seconds)

    def take_leaving(self) -> float | None:
        """Seconds until the last machine that told so is gone, 0 when it is gone already; the news is then forgotten.

        None where no machine told so, and where somebody asked to stop: that holds.
        """
        seconds: float | None = ray.get(self._actor.take_leaving.remote())
        return seconds

    def close(self) -> None:
        """Stop the actor."""
        ray.kill(self._actor)


class Drained(Protocol):
    """What a `Watcher` watches."""

    def drain(self) -> list[tuple[str, dict[str, float], int]]:
        """Fetch what came since the last call: (artifact, metrics, step), or (text, {}, -1)."""

    def close(self) -> None:
        """Nothing more will be fetched."""


R = TypeVar("R", bound=Drained)


class Watcher(Generic[R]):
    """Hands every event of a relay to `show(source_or_text, metrics, step)` in a thread, while a `with` block lasts.

    A line of text has step -1. The relay is drained once more at the end, then closed.
    """

    def __init__(self, relay: R, show: Callable[[str, dict[str, float], int], None]) -> None:
        self._relay, self._show = relay, show
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heliostat-progress")

    def __enter__(self) -> R:
        self._thread.start()
        return self._relay

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._drain()
        self._relay.close()

    def _watch(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self._drain()

    def _drain(self) -> None:
        for event in self._relay.drain():
            self._show(*event)
