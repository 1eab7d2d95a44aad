"""A worker group of any size for a batch of one size: the largest number of workers that divides it trains."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from heliostat.training.recipe import TrainingConfig
from heliostat.training.world import World

_AFTER_WATCHDOG_SECONDS = 60


def usable_size(config: TrainingConfig, num_workers: int) -> int:
    """The most of num_workers that the global batch can be divided by, data workers included where they cut it further."""
    each = config.loader.ray_workers if config.loader.via == "ray_data" else 1
    return next(size for size in range(num_workers, 0, -1) if config.train.global_batch_size % (size * each) == 0)


def collective_timeout(config: TrainingConfig) -> int:
    """Seconds after which a collective gives up: later than our own watchdog, which names the rank that the others wait for."""
    return config.scaling.collective_timeout_seconds + _AFTER_WATCHDOG_SECONDS


def usable_world(world: World, config: TrainingConfig) -> World | None:
    """The world of those that train, in a process group of their own; None on the ranks that are left over.

    Every rank of Ray's group calls it. A world that divides the batch is returned as it is.
    """
    size = usable_size(config, world.size)
    if size == world.size:
        return world
    port = torch.tensor([_free_port() if world.is_main else 0], device=world.device)
    dist.broadcast(port, 0)
    backend = dist.get_backend()
    dist.destroy_process_group()
    if world.rank >= size:
        return None
    address = f"tcp://{os.environ['MASTER_ADDR']}:{int(port)}"  # Ray Train has set it to the main rank's host
    limit = timedelta(seconds=collective_timeout(config))
    dist.init_process_group(backend, init_method=address, rank=world.rank, world_size=size, timeout=limit)
    return World(world.rank, size, world.device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
