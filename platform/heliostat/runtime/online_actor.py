"""The evaluator of a run on Ray: one actor with its own resources, as kind to the training workers as it can be."""

import os
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from heliostat.errors import ClusterError
from heliostat.runtime.online import LocalEvaluator
from heliostat.runtime.online_images import OnlineDraw
from heliostat.storage import Store
from heliostat.training.run_config import OnlineConfig

_RESTARTS = 3  # of the actor, when its node is lost or its memory is taken
_COURTESY = 10  # niceness beyond that of Ray's workers: whoever has no CPU of his own takes what they leave


class _Actor(LocalEvaluator):
    """Runs in a process of its own, so that it neither shares Python's lock nor torch's threads with a training worker."""

    def __init__(self, draw: "Sequence[ray.ObjectRef]", num_cpus: float, num_gpus: float) -> None:
        if num_cpus == 0:
            os.nice(_COURTESY)
        torch.set_num_threads(max(1, int(num_cpus)))
        super().__init__(ray.get(draw[0]), "cuda" if num_gpus > 0 else "cpu")


class RayEvaluator:
    """Handle on the actor. An actor and not a task each time: images are decoded once, and torch is imported once.

    It starts at once and loads while the first steps are computed; it ends with the training worker that made it.
    """

    def __init__(self, draw: OnlineDraw, config: OnlineConfig, *, start_timeout_seconds: float) -> None:
        self._config, self._timeout = config, start_timeout_seconds
        actor = ray.remote(_Actor).options(
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
            # The resources of the training workers are in a placement group, whose last CPU is taken.
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
        )
        # In a list, and held here: an argument that Ray itself put into its store can be gone when the actor is restarted.
        self._draw = ray.put(draw)
        self._actor: Any = actor.remote([self._draw], config.num_cpus, config.num_gpus)
        self._started = time.monotonic()
        self._placed = self._actor.__ray_ready__.remote()  # first in the actor's queue; asked again after a restart
        self._prepared = self._actor.prepare.remote()

    def prepare(self) -> list[str]:
        """Also raises ClusterError when no node has had room for what it reserves within the start timeout.

        Without a reservation there always is room, and a busy machine only makes the start slow.
        """
        self._wait_for_room(self._placed, max(1.0, self._started + self._timeout - time.monotonic()))
        notes: list[str] = ray.get(self._prepared)
        return notes

    def evaluate(self, step: int, files: Store, before: Store | None) -> dict[str, float]:
        self._wait_for_room(self._actor.__ray_ready__.remote(), self._timeout)  # its node may be gone, and no other have room
        metrics: dict[str, float] = ray.get(self._actor.evaluate.remote(step, files, before))
        return metrics

    def _wait_for_room(self, placed: "ray.ObjectRef", seconds: float) -> None:
        reserves = self._config.num_cpus > 0 or self._config.num_gpus > 0
        if reserves and not ray.wait([placed], timeout=seconds)[0]:
            raise ClusterError(
                f"the evaluator did not start within {seconds:.0f} s: it needs {self._config.num_cpus:g} CPU and "
                f"{self._config.num_gpus:g} GPU besides the workers; lower online.num_cpus or online.num_gpus, or add a node"
            )

    def close(self) -> None:
        ray.kill(self._actor)
