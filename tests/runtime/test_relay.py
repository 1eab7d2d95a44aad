"""What workers push to the relay arrives at the driver, and at the port that Prometheus scrapes."""

import http.client
import time

import pytest

pytestmark = pytest.mark.ray
EXPORT_SECONDS = 30


def scrape(deadline: float, wanted: str) -> list[str]:
    """Lines of the node's metrics page that start with `wanted`; empty when the deadline passes first."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()
        except OSError:  # the agent is still starting
            page = ""
        finally:
            connection.close()
        if found := [line for line in page.splitlines() if line.startswith(wanted)]:
            return found
        time.sleep(0.5)
    return []


@pytest.mark.usefixtures("local_ray")
def test_a_pushed_live_metric_is_exported_under_its_prometheus_name_with_its_artifact() -> None:
    from heliostat.runtime.relay import Relay

    relay = Relay()
    try:
        relay.push("model/fields@1", {"train/loss": 7.25, "train/weight_decay": 0.04}, 3)
        assert relay.drain() == [("model/fields@1", {"train/loss": 7.25, "train/weight_decay": 0.04}, 3)]
        lines = scrape(time.monotonic() + EXPORT_SECONDS, "ray_heliostat_train_loss{")
        (line,) = [line for line in lines if 'artifact="model/fields@1"' in line]
        assert line.endswith(" 7.25")
        # A metric that is not live reaches the driver and the tracker only: the same page must not have it.
        assert scrape(time.monotonic() + 1, "ray_heliostat_train_weight_decay") == []
    finally:
        relay.close()


def test_a_machine_that_goes_is_waited_for_once_and_not_when_the_user_stopped_the_run() -> None:
    from heliostat.runtime.relay import _Relay

    relay = _Relay()
    assert relay.take_leaving() is None
    relay.leaving(60.0)
    relay.leaving(30.0)
    assert 50 < relay.take_leaving() <= 60
    assert relay.take_leaving() is None
    relay.leaving(-1.0)
    assert relay.take_leaving() == 0, "gone already is not the same as not announced"
    relay.leaving(60.0)
    relay.ask_to_stop()
    assert relay.take_leaving() is None


@pytest.mark.usefixtures("local_ray")
def test_events_come_once_and_in_order() -> None:
    from heliostat.runtime.relay import Relay

    relay = Relay()
    try:
        relay.note("model/fields@1", "checkpoint written")
        relay.push("model/fields@1", {"train/step": 4.0}, 4)
        assert relay.drain() == [("checkpoint written", {}, -1), ("model/fields@1", {"train/step": 4.0}, 4)]
        assert relay.drain() == []
    finally:
        relay.close()
