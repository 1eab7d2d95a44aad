"""Settings and fixtures for all tests."""

import os
import signal
import sys
from pathlib import Path

import pytest

# Before anything is imported: no telemetry, no settings in the user's home, one thread a process (cores are shared).
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "DS_ACCELERATOR": "cpu",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

# A shell that starts the tests in the background makes them ignore Ctrl-C, and every process they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

from local_ray import local_ray  # noqa: E402
from s3_server import STATUS, s3_bucket, s3_server  # noqa: E402

__all__ = ["local_ray", "s3_bucket", "s3_server"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long runs under interruption are for those who ask: `pytest -m soak`. Modules on Ray take minutes each: they begin, and
    the many short ones even out when the two test processes end."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    if "soak" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="runs with -m soak"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which S3 server the tests ran against."""
    status = config.stash.get(STATUS, "")
    if status:
        terminalreporter.write_line(status)
