"""Whether a cluster of fixed size has room for a training run, said before anything waits for it."""

import os
from collections.abc import Mapping

import ray

from heliostat.errors import TrainingError
from heliostat.runtime.ray_blocks import object_store_bytes
from heliostat.training.run import TrainingJob, loading_of


def may_grow() -> bool:
    """Whether the cluster is one that was joined, and that may bring nodes; HELIOSTAT_FIXED_SIZE says that it does not."""
    return bool(os.environ.get("RAY_ADDRESS")) and not os.environ.get("HELIOSTAT_FIXED_SIZE")


def check_room(resources: Mapping[str, float], job: TrainingJob) -> None:
    """Refuse what can never be placed. resources: of one training worker.

    The cluster of a job may grow and is given its start timeout, unless HELIOSTAT_FIXED_SIZE is set (clusters/local.sh).
    Training workers that leave no room for their data workers would wait for them for ever. Raises TrainingError.
    """
    if may_grow():
        return
    config, total = job.config, ray.cluster_resources()
    num_workers, loader = config.scaling.worker_range[0], config.loader
    needed, who, fewer = dict(resources), f"{num_workers} workers", "lower scaling.num_workers"
    if loader.via == "ray_data":
        for name, amount in {"CPU": float(loader.cpus_of_data_worker), **loader.ray_resources}.items():
            needed[name] = needed.get(name, 0.0) + loader.ray_workers * amount
        who += f" with {loader.ray_workers} data worker{'s' if loader.ray_workers > 1 else ''} each"
        fewer += ", loader.ray_workers or loader.workers, use loader.via=threads,"
    for name, amount in needed.items():
        if amount * num_workers > total.get(name, 0):
            is_own = not os.environ.get("RAY_ADDRESS")  # of a cluster that is joined nothing can be set
            more = "raise cluster.num_cpus" if name == "CPU" and is_own else f"add nodes that have {name}"
            raise TrainingError(
                f"{who} need {amount * num_workers:g} {name}, Ray has {total.get(name, 0):g}; {fewer} or {more}"
            )
    if loader.via == "ray_data":
        _check_object_store(num_workers * object_store_bytes(loading_of(job), num_workers), total.get("object_store_memory", 0))


def _check_object_store(needed_bytes: int, there_bytes: float) -> None:
    if needed_bytes > there_bytes:
        raise TrainingError(
            f"batches on their way from data workers take {needed_bytes / 1e6:,.0f} MB of the object store, Ray has "
            f"{there_bytes / 1e6:,.0f} MB; raise cluster.object_store_memory or lower loader.prefetch_batches"
        )
