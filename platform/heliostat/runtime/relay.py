"""A small actor through which workers tell the driver how far they are, and Prometheus what they measure."""

from collections.abc import Mapping
from typing import Any

import ray

from heliostat.metrics import METRICS


class _Relay:
    """Keeps events until the driver fetches them; sets one gauge per live metric, labelled by artifact."""

    def __init__(self) -> None:
        self._events: list[tuple[str, dict[str, float], int]] = []
        self._gauges: dict[str, Any] = {}

    def push(self, artifact: str, metrics: dict[str, float], step: int) -> None:
        self._events.append((artifact, metrics, step))
        for name, value in metrics.items():
            metric = METRICS.get(name)
            if metric is not None and metric.live:
                self._gauge(name).set(value, tags={"artifact": artifact})

    def note(self, artifact: str, text: str) -> None:
        self._events.append((text, {}, -1))

    def drain(self) -> list[tuple[str, dict[str, float], int]]:
        events, self._events = self._events, []
        return events

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            metric = METRICS[name]
            self._gauges[name] = Gauge(
                metric.short_name, description=f"{metric.meaning} [{metric.unit}]", tag_keys=("artifact",)
            )
        return self._gauges[name]


class Relay:
    """Handle on the actor; can be passed to workers."""

    def __init__(self) -> None:
        self._actor = ray.remote(num_cpus=0)(_Relay).remote()

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

    def close(self) -> None:
        """Stop the actor."""
        ray.kill(self._actor)
