"""What a machine does, sampled in a thread under the names that MLflow's page "System metrics" shows."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import psutil

_MEGABYTE = 1e6


def sample() -> dict[str, float]:
    """CPUs, memory, disk and network of this machine, since it started where they count up."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_megabytes": disk.used / _MEGABYTE,
        "disk_usage_percentage": disk.percent,
        "network_receive_megabytes": network.bytes_recv / _MEGABYTE,
        "network_transmit_megabytes": network.bytes_sent / _MEGABYTE,
    }
    return {f"system/{name}": value for name, value in values.items()}


@contextmanager
def watching(record: Callable[[Mapping[str, float]], None], every_seconds: float) -> Iterator[None]:
    """Give `record` a sample at once and then every so many seconds, until the context ends."""
    ended = threading.Event()

    def watch() -> None:
        psutil.cpu_percent()  # the first call only starts its window
        while not ended.wait(min(1.0, every_seconds)):
            record(sample())
            if ended.wait(max(0.0, every_seconds - 1.0)):
                return

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=every_seconds + 30.0)
