"""How long the steps of a stage took, on the clock and on all processors, for the report's table of times."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TIMES = "times.json"


@dataclass
class StepTime:
    """seconds: on the clock; cpu_seconds: of the driver and the workers; parts: the workers' CPU seconds by part, if told."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    images: int = 0
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class StepTimes:
    """The steps of one stage in the order in which they began; what begins within a step counts as a part of it.

    What an interrupted run had done is not counted again.
    """

    steps: dict[str, StepTime] = field(default_factory=dict)
    _open: list[StepTime] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, *, images: int = 0) -> Iterator[StepTime]:
        """Time the body, which runs in this process."""
        if self._open:
            yield self._open[0]
            return
        step = self.steps.setdefault(name, StepTime())
        step.images = max(step.images, images)
        started, used = time.monotonic(), time.process_time()
        self._open.append(step)
        try:
            yield step
        finally:
            self._open.pop()
            step.seconds += time.monotonic() - started
            step.cpu_seconds += time.process_time() - used

    def add_task(self, name: str, cpu_seconds: float, result: Mapping[str, Any]) -> None:
        """Count a task that a worker did; its result may tell `images` and `cpu_seconds` by part."""
        outer = self._open[0] if self._open else None
        step = outer if outer is not None else self.steps.setdefault(name, StepTime())
        step.cpu_seconds += cpu_seconds
        if step is self.steps.get(name):  # images of a step within another are not counted twice
            step.images += int(result.get("images", 0))
        for part, seconds in result.get("cpu_seconds", {}).items():
            step.parts[part] = step.parts.get(part, 0.0) + seconds

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """JSON-ready rows: stage, step, seconds, cpu_seconds, images, parts."""
        return [
            {
                "stage": stage,
                "step": name,
                "seconds": round(step.seconds, 3),
                "cpu_seconds": round(step.cpu_seconds, 3),
                "images": step.images,
                "parts": {part: round(seconds, 3) for part, seconds in sorted(step.parts.items())},
            }
            for name, step in self.steps.items()
        ]
