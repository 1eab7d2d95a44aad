"""A Ray session: a private local cluster, or a cluster that is there already.

A local cluster never joins another one on the machine and is shut down with its session; Ray's token authentication stays on,
because Ray's control port listens on every interface. A cluster is joined with the token of the standard chain
(`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, the user's token file); a token is never read, stored or printed here.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from heliostat.errors import ClusterError, UsageError
from heliostat.runtime.config import ClusterConfig


def set_environment() -> None:
    """Defaults of Ray that Heliostat relies on; what the user has set wins."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")  # asked at 0.2 s workers spend 2 % on answers (measured)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the progress is ours; Ray Tune's own tables would be printed over it
    os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidia0") else "cuda")


def resolve_address(config: ClusterConfig) -> str:
    """`local` or the address to join."""
    if config.address != "auto":
        return config.address
    return os.environ.get("RAY_ADDRESS") or "local"


def _check_reachable(address: str, timeout_seconds: float) -> None:
    """Fail in seconds, with one line, when nothing listens at host:port (Ray itself retries for a minute)."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=timeout_seconds).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with `ray start --head`, "
            "or use cluster.address=local"
        ) from error


@contextmanager
def open_session(config: ClusterConfig) -> Iterator[None]:
    """Start or join Ray; a session that finds Ray running in this process uses it and leaves it running.

    SIGTERM does afterwards what it did before.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    address = resolve_address(config)
    if address != "local" and config.num_cpus is not None:
        raise UsageError(f"cluster.num_cpus={config.num_cpus} cannot be set for the cluster at {address}; remove it")
    if address not in ("local", "auto"):
        _check_reachable(address, config.connect_timeout_seconds)
    port = _free_port()
    with _dashboard_named(port if address == "local" else 0):
        try:
            with _sigterm_kept():
                _initialise(address, config, port)
        except Exception as error:  # Ray raises bare ones too, when a node does not come up in time
            token = "" if address == "local" else "; a cluster with a token needs RAY_AUTH_MODE=token and the same token here"
            raise ClusterError(f"Ray at {address} could not be used: {' '.join(str(error).split())[:300]}{token}") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _dashboard_named(port: int) -> Iterator[None]:
    """Tell the processes of a local Ray where its dashboard is; 0 tells them nothing.

    What frees the workers of a training run whose driving process has died asks the dashboard whether it has. Where a second
    Ray runs on the machine it would not know which one to ask and end with an error; their places stayed taken for ever.
    """
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    if port:
        os.environ[name] = f"http://127.0.0.1:{port}"
    try:
        yield
    finally:
        if port:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _initialise(address: str, config: ClusterConfig, dashboard_port: int) -> None:
    import ray

    common = {
        "log_to_driver": os.environ.get("HELIOSTAT_DEBUG") == "1",
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address == "local":
        ray.init(
            address="local",
            num_cpus=config.num_cpus or os.cpu_count(),
            include_dashboard=True,  # without it Ray Train never frees the resources of a stopped run
            dashboard_host="127.0.0.1",
            dashboard_port=dashboard_port,
            object_store_memory=config.object_store_memory,
            **common,
        )
    else:
        ray.init(address=address, **common)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray's start puts handlers of its own over ours, its core one that ends the process at once and leaves runs open."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():  # elsewhere Python sets none
            signal.signal(signal.SIGTERM, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe_session() -> str:
    """One line about the cluster: nodes, CPUs, GPUs."""
    import ray

    resources = ray.cluster_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return f"{nodes} node{'s' if nodes != 1 else ''}, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
