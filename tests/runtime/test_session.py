"""Which cluster a session uses, decided before Ray starts."""

import os
import time

import pytest

from heliostat.errors import ClusterError, UsageError
from heliostat.runtime.config import ClusterConfig
from heliostat.runtime.session import open_session, resolve_address


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_auto_is_local_without_an_address_and_the_jobs_cluster_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_address(ClusterConfig()) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve_address(ClusterConfig()) == "10.0.0.1:6379"
    assert resolve_address(ClusterConfig(address="local")) == "local"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_where_nothing_listens_is_refused_at_once(address: str) -> None:
    started = time.monotonic()
    with (
        pytest.raises(ClusterError, match=r"no Ray cluster answers at .*127\.0\.0\.1:1"),
        open_session(ClusterConfig(address=address)),
    ):
        pass
    assert time.monotonic() - started < 20


def test_cpus_are_refused_for_a_cluster_that_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"cluster\.num_cpus=3 cannot be set for the cluster at 10\.0\.0\.1:6379; remove it"
    with pytest.raises(UsageError, match=said), open_session(ClusterConfig(address="10.0.0.1:6379", num_cpus=3)):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    with pytest.raises(UsageError, match=r"10\.0\.0\.2:6379"), open_session(ClusterConfig(num_cpus=3)):
        pass


def test_what_the_user_has_set_in_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    with pytest.raises(ClusterError), open_session(ClusterConfig(address="127.0.0.1:1")):
        pass
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
