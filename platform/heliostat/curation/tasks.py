"""How curation hands out its work: small plain tasks to one function, wherever it runs.

A task and its result are JSON-ready mappings that name things; vectors, edges and images go from store to store inside the
function, never through the one who hands out. A function writes each object atomically under a key that follows from its task,
so that a task may run twice, and what a killed run has finished is skipped by the next one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol


class TaskFunction(Protocol):
    """Work on one task. Instances can be pickled."""

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do it. A HeliostatError stops the stage with its message."""


class TaskMap(Protocol):
    """Runs a function over tasks: on Ray (`runtime.shards.RayTasks`), or here (`run_serially`)."""

    def __call__(
        self, function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, label: str, has_state: bool = False
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the results as they come, in no particular order.

        label: what the progress shows. has_state: the function is costly to set up (a network), so one instance serves many
        tasks.
        """


def run_serially(
    function: TaskFunction, tasks: Sequence[Mapping[str, Any]], *, label: str, has_state: bool = False
) -> Iterator[Mapping[str, Any]]:
    """A TaskMap in the caller's own process; tasks and results pass through JSON as they do on Ray."""
    del label, has_state
    for task in tasks:
        yield json.loads(json.dumps(dict(function(json.loads(json.dumps(dict(task)))))))
