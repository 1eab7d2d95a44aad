"""How many trials a cluster has room for. A trial's own process takes next to nothing, so no worker waits for its place."""

import math
import os
from collections.abc import Mapping, Sequence

from heliostat.errors import TrainingError
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.training.recipe import PretrainConfig

HEAD = "node:__internal_head__"
_NEXT_TO_NOTHING = 0.001  # of the head node's own resource: 1,000 trials' processes fit; Ray refuses a trial that takes none


def worker_demand(config: PretrainConfig) -> dict[str, float]:
    """Resources of one training worker of a trial, with those of its data workers."""
    scaling, loader = config.scaling, config.loader
    demand = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    if loader.via == "ray_data":
        for name, amount in {"CPU": float(loader.cpus_of_data_worker), **loader.ray_resources}.items():
            demand[name] = demand.get(name, 0.0) + loader.ray_workers * amount
    return demand


def process_demand(config: PretrainConfig) -> dict[str, float]:
    """What the trial's own process reserves, in Ray Tune's words.

    With workers it only waits for them. It then runs on the head node, whose loss ends the sweep anyway; without workers it
    trains itself, anywhere.
    """
    return {"cpu": config.scaling.cpus_per_worker} if config.scaling.num_workers == 0 else {HEAD: _NEXT_TO_NOTHING}


def num_fitting(config: PretrainConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Trials whose workers fit at once, each worker whole on one node; data workers are counted beside their worker."""
    demand = worker_demand(config)
    workers = sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in demand.items() if amount) for node in nodes
    )
    fitting = workers // config.scaling.worker_range[0]
    if config.online.enabled:
        for name, amount in (("CPU", config.online.num_cpus), ("GPU", config.online.num_gpus)):
            whole = demand.get(name, 0.0) * config.scaling.worker_range[0] + amount
            if amount:
                fitting = min(fitting, math.floor(sum(node.get(name, 0.0) for node in nodes) / whole + 1e-9))
    return fitting


def concurrent_trials(sweep: SweepConfig, config: PretrainConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials run at once. Raises TrainingError when a cluster of fixed size has no room for one.

    A cluster that was joined may grow: it gets all that the recipe asks for, and scaling.start_timeout_seconds to bring nodes.
    """
    if os.environ.get("RAY_ADDRESS"):
        return sweep.max_concurrent_trials
    fitting = num_fitting(config, nodes)
    if fitting == 0:
        workers = config.scaling.worker_range[0]
        demand = ", ".join(f"{amount:g} {name}" for name, amount in worker_demand(config).items())
        there = {name: sum(node.get(name, 0.0) for node in nodes) for name in worker_demand(config)}
        raise TrainingError(
            f"no trial can start: it takes {workers} worker{'s' if workers > 1 else ''} of {demand}, Ray has "
            f"{', '.join(f'{amount:g} {name}' for name, amount in there.items())}; lower scaling.num_workers or "
            "scaling.cpus_per_worker in sweep.overrides, or raise cluster.num_cpus"
        )
    return min(sweep.max_concurrent_trials, fitting)
