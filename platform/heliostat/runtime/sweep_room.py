"""How many trials a cluster has room for. A trial's own process takes next to nothing, so no worker waits for its place."""

import math
from collections.abc import Mapping, Sequence

from heliostat.errors import TrainingError
from heliostat.runtime.cluster_room import may_grow
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
    for name, amount in _evaluator_demand(config).items():
        whole = demand.get(name, 0.0) * config.scaling.worker_range[0] + amount
        fitting = min(fitting, math.floor(sum(node.get(name, 0.0) for node in nodes) / whole + 1e-9))
    return fitting


def _evaluator_demand(config: PretrainConfig) -> dict[str, float]:
    """What a trial's evaluator reserves beside the workers."""
    online = config.online
    return {name: amount for name, amount in (("CPU", online.num_cpus), ("GPU", online.num_gpus)) if online.enabled and amount}


def concurrent_trials(sweep: SweepConfig, config: PretrainConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials run at once. Raises TrainingError when a cluster of fixed size has no room for one.

    A cluster that was joined may grow: it gets all that the recipe asks for, and scaling.start_timeout_seconds to bring nodes.
    """
    if may_grow():
        return sweep.max_concurrent_trials
    fitting = num_fitting(config, nodes)
    if fitting == 0:
        workers, evaluator = config.scaling.worker_range[0], _evaluator_demand(config)
        takes = f"{workers} worker{'s' if workers > 1 else ''} of {_amounts(worker_demand(config))}"
        fewer = "scaling.num_workers or scaling.cpus_per_worker"
        if evaluator:
            takes += f" and an evaluator of {_amounts(evaluator)}"
            fewer = "online.num_gpus or online.num_cpus, " + fewer
        names = worker_demand(config).keys() | evaluator.keys()
        there = {name: sum(node.get(name, 0.0) for node in nodes) for name in sorted(names)}
        raise TrainingError(
            f"no trial can start: it takes {takes}, Ray has {_amounts(there)}; lower {fewer} in sweep.overrides, or raise "
            "cluster.num_cpus"
        )
    return min(sweep.max_concurrent_trials, fitting)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
