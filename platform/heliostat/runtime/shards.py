"""The same function over many shards, as a Ray Data pipeline: what ingest and curate are made of.

A task is small and plain (it names its shard); a result is small and plain (it counts). The images themselves go from store to
store inside the workers and never through the driver. A worker writes its shard atomically, so whatever a killed run has
finished is skipped by the next one.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from heliostat.errors import DataError, HeliostatError
from heliostat.runtime.progress import Progress, bar


class ShardFunction(Protocol):
    """Work on one shard: a plain mapping in, a plain mapping out."""

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do one shard. A HeliostatError stops the pipeline with its message."""


class _Adapter:
    """What Ray Data calls: JSON in and out, and our errors as values, so that they arrive without Ray's wrapping."""

    def __init__(self, function: ShardFunction) -> None:
        self._function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            return {"result": json.dumps(dict(self._function(json.loads(row["task"])))), "error": ""}
        except HeliostatError as error:
            return {"result": "{}", "error": str(error) or type(error).__name__}


def map_shards(
    function: ShardFunction, tasks: Sequence[Mapping[str, Any]], *, label: str, progress: Progress, has_state: bool = False
) -> Iterator[dict[str, Any]]:
    """Run `function` over all tasks and yield its results as they come, in no particular order.

    has_state: the function is costly to set up (a network), so it lives in one actor per CPU instead of being sent with every
    task. Raises DataError with the message of the first task that failed.
    """
    if not tasks:
        return
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if os.environ.get("HELIOSTAT_DEBUG") != "1":
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = ray.data.from_items([{"task": json.dumps(dict(task))} for task in tasks], override_num_blocks=len(tasks))
    if has_state:
        num_actors = max(1, min(len(tasks), int(ray.cluster_resources().get("CPU", 1))))
        mapped = rows.map(_Adapter, fn_constructor_args=(function,), compute=ray.data.ActorPoolStrategy(size=num_actors))
    else:
        mapped = rows.map(_Adapter(function).__call__)
    for done, row in enumerate(mapped.iter_rows(), start=1):
        if row["error"]:
            raise DataError(row["error"])
        progress.update(f"{label} {bar(done, len(tasks))} {done}/{len(tasks)} shards", final=done == len(tasks))
        yield json.loads(row["result"])
