"""The same function over many shards, on Ray: what ingest, crawl, embed, dedup and curate are made of.

A task is small and plain (it names its shard); a result is small and plain (it counts). The images themselves go from store to
store inside the workers and never through the driver. A worker writes its shard atomically, so whatever a killed run has
finished is skipped by the next one. What holds a network is a Ray Data pipeline over a pool of actors; the rest are Ray tasks,
because a pipeline takes half a second to start and some steps are a few tasks long.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heliostat.curation.tasks import TaskFunction
from heliostat.errors import ClusterError, DataError, HeliostatError
from heliostat.runtime.progress import Progress, bar, duration_text
from heliostat.runtime.step_times import StepTimes

_TASKS_AT_ONCE = 8192
"""Tasks of one Ray Data execution: each is a block of its own, and Ray's driver keeps some kilobytes a block."""

_LINE_SECONDS = 1.0
"""Steps that end sooner leave no line: k-means alone has forty of them."""

_TASKS_IN_FLIGHT = 64
_RETRIES = 9


def _run(function: TaskFunction, task: str) -> dict[str, Any]:
    """One task, with the CPU seconds that it took."""
    started = time.process_time()
    try:
        result, error = json.dumps(dict(function(json.loads(task)))), ""
    except HeliostatError as failed:
        result, error = "{}", str(failed) or type(failed).__name__
    return {"result": result, "error": error, "cpu_seconds": time.process_time() - started}


@dataclass(frozen=True)
class RayTasks:
    """A `curation.tasks.TaskMap` on Ray, with progress and times.

    gpus_per_actor: GPUs of an actor that holds a network; there are as many actors as the cluster has such shares, and with 0
    as many as it has CPUs.
    """

    progress: Progress
    times: StepTimes = field(default_factory=StepTimes)
    gpus_per_actor: float = 0.0

    def __call__(
        self, function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, label: str, has_state: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Run `function` over all tasks and yield its results as they come, in no particular order.

        Raises DataError with the message of the first task that failed.
        """
        if not tasks:
            return
        started, done = time.monotonic(), 0
        if len(tasks) == 1 and not (has_state and self.gpus_per_actor):  # nothing to spread: workers take seconds to start
            with self.times.step(label):
                result = dict(function(tasks[0]))
            self.times.add_task(label, 0.0, result)
            self._show(label, 1, 1, time.monotonic() - started)
            yield result
            return
        with self.times.step(label):
            for first in range(0, len(tasks), _TASKS_AT_ONCE):
                for row in self._rows(function, tasks[first : first + _TASKS_AT_ONCE], has_state):
                    if row["error"]:
                        raise DataError(row["error"])
                    done, result = done + 1, json.loads(row["result"])
                    self.times.add_task(label, row["cpu_seconds"], result)
                    self._show(label, done, len(tasks), time.monotonic() - started)
                    yield result

    def _rows(self, function: TaskFunction, tasks: Sequence[Mapping[str, Any]], has_state: bool) -> Iterator[dict[str, Any]]:
        texts = [json.dumps(dict(task)) for task in tasks]
        return self._pipeline(function, texts) if has_state else self._tasks(function, texts)

    def _tasks(self, function: TaskFunction, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """As Ray tasks; one whose worker dies is done again. So many wait that a cluster which can grow does."""
        import ray

        run = ray.remote(_run).options(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD")
        shared, waiting = ray.put(function), list(reversed(texts))
        window = max(_TASKS_IN_FLIGHT, 4 * int(ray.cluster_resources().get("CPU", 1)))
        in_flight: list[Any] = []
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < window:
                    in_flight.append(run.remote(shared, waiting.pop()))
                done, in_flight = ray.wait(in_flight)
                yield from ray.get(done)
        except ray.exceptions.RayTaskError:
            raise  # a defect of ours; --debug shows where
        except ray.exceptions.RayError as error:
            raise ClusterError(f"a task was lost {_RETRIES + 1} times: {' '.join(str(error).split())[:300]}") from error
        finally:
            for task in in_flight:  # an error, or a driver that was interrupted
                ray.cancel(task, force=True)

    def _pipeline(self, function: TaskFunction, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """As Ray Data over a pool of actors, each of which sets the function up once."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        if os.environ.get("HELIOSTAT_DEBUG") != "1":
            logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_items([{"task": text} for text in texts], override_num_blocks=len(texts))
        resources = ray.cluster_resources()
        places = resources.get("GPU", 0) / self.gpus_per_actor if self.gpus_per_actor else resources.get("CPU", 1)
        if places < 1:
            raise ClusterError(
                f"an actor needs {self.gpus_per_actor:g} GPUs, Ray has {resources.get('GPU', 0):g}; lower embed.gpus_per_actor"
            )
        pool = ray.data.ActorPoolStrategy(size=max(1, min(len(texts), int(places))))
        options = {"num_gpus": self.gpus_per_actor} if self.gpus_per_actor else {}

        class Held:
            """What an actor holds. The function comes with the class: as an argument it could be lost before a restart."""

            def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
                return _run(function, row["task"])

        yield from rows.map(Held, compute=pool, **options).iter_rows()

    def _show(self, label: str, done: int, total: int, seconds: float) -> None:
        left = f", {duration_text(seconds / done * (total - done))} left" if done < total else f" in {duration_text(seconds)}"
        is_final = done == total and seconds >= _LINE_SECONDS
        if done < total or is_final:
            self.progress.update(f"{label} {bar(done, total)} {done:,}/{total:,}{left}", final=is_final)


def map_shards(
    function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, label: str, progress: Progress, has_state: bool = False
) -> Iterator[dict[str, Any]]:
    """`RayTasks` in one call."""
    return RayTasks(progress)(function, tasks, label=label, has_state=has_state)
