"""Order, completeness and silence of the way to a server that comes and goes."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.errors import TrackerLostError, TrackingError
from heliostat.tracking.delivery import Delivery
from heliostat.tracking.spool import Entry, SpoolFolder


class Server:
    """Keeps what it gets, while it is up."""

    def __init__(self) -> None:
        self.up, self.got, self.refused, self.failing = True, [], set(), set()

    def apply(self, entry: Entry) -> None:
        self.probe()
        if entry.time_ms in self.refused:
            raise TrackingError(f"entry {entry.time_ms} is refused")
        if entry.time_ms in self.failing:
            raise TrackerLostError(f"entry {entry.time_ms} fails", "status 500")
        self.got.append(entry.time_ms)

    def probe(self) -> None:
        if not self.up:
            raise TrackerLostError("no answer", "no answer")


class Way:
    """A delivery to such a server, and what it says."""

    def __init__(self, server: Server, folder: Path, *, limit_bytes: int = 100_000, retry_seconds: float = 0.05) -> None:
        self.said: list[str] = []
        self.spools = SpoolFolder(folder, "key", limit_bytes)
        self.delivery = Delivery(server.apply, server.probe, self.spools, where="MLflow", retry_every_seconds=retry_seconds)

    def send(self, *numbers: int, call: str = "log_metrics") -> None:
        for number in numbers:
            self.delivery.send(Entry("run", call, {"step": number}, number), self.said.append)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def server() -> Server:
    return Server()


def test_while_the_server_answers_nothing_waits_and_nothing_is_said(server: Server, tmp_path: Path) -> None:
    way = Way(server, tmp_path / "spool")
    way.send(1, 2, 3)
    assert (server.got, way.said, (tmp_path / "spool").exists()) == ([1, 2, 3], [], False)


def test_an_outage_is_said_once_and_its_end_once_and_all_arrives_in_order(server: Server, tmp_path: Path) -> None:
    way = Way(server, tmp_path)
    way.send(1)
    server.up = False
    way.send(2, 3, 4)
    assert server.got == [1]
    assert way.said == [
        f"MLflow is lost (no answer); the run goes on, its records wait in {tmp_path} and are sent when it is back"
    ]
    server.up = True
    wait_until(lambda: not way.delivery.is_lost)
    way.send(5)
    assert server.got == [1, 2, 3, 4, 5]
    assert way.said[1:] == ["MLflow is back after 0 s; 3 waiting records are sent"]
    assert way.spools.is_empty()


def test_only_the_first_request_of_an_outage_keeps_the_training_waiting(server: Server, tmp_path: Path) -> None:
    way, asked_by = Way(server, tmp_path, retry_seconds=0.01), []
    server.up = False
    server.probe = lambda: asked_by.append(threading.current_thread()) or Server.probe(server)  # type: ignore[method-assign]
    way.send(*range(50))
    wait_until(lambda: len(asked_by) > 10)
    assert asked_by.count(threading.current_thread()) == 1
    server.up = True
    wait_until(lambda: not way.delivery.is_lost)
    assert server.got == list(range(50))


def test_what_is_sent_while_the_spool_empties_does_not_overtake(server: Server, tmp_path: Path) -> None:
    way, numbers = Way(server, tmp_path, retry_seconds=0.01), iter(range(1, 10_000))
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            way.send(next(numbers))
            time.sleep(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(8):
        time.sleep(0.05)
        server.up = not server.up
    server.up = True
    ended.set()
    writer.join()
    wait_until(lambda: not way.delivery.is_lost)
    assert server.got == list(range(1, next(numbers)))
    assert len(way.said) in (2, 4, 6, 8)


def test_a_refused_entry_is_said_once_and_does_not_stop_the_others(server: Server, tmp_path: Path) -> None:
    server.refused = {2, 4}
    way = Way(server, tmp_path)
    way.send(1, 2, 3, 2)
    server.up = False
    way.send(4, 5)
    server.up = True
    wait_until(lambda: not way.delivery.is_lost)
    assert server.got == [1, 3, 5]
    assert [text for text in way.said if text.startswith("entry")] == [
        f"entry {number} is refused; the record (log_metrics) is dropped and the run goes on" for number in (2, 4)
    ]


def test_an_entry_that_fails_for_ever_while_the_server_answers_is_dropped_aloud(server: Server, tmp_path: Path) -> None:
    server.failing = {2}
    way = Way(server, tmp_path)
    way.send(1, 2, 3)
    wait_until(lambda: not way.delivery.is_lost)
    assert server.got == [1, 3]
    assert "entry 2 fails; the record (log_metrics) is dropped and the run goes on" in way.said


def test_an_outage_that_is_long_drops_nothing_however_often_it_is_tried(server: Server, tmp_path: Path) -> None:
    way = Way(server, tmp_path, retry_seconds=0.01)
    server.up = False
    way.send(1, 2)
    time.sleep(0.3)
    assert len(way.said) == 1
    server.up = True
    wait_until(lambda: not way.delivery.is_lost)
    assert server.got == [1, 2]


def test_a_full_spool_drops_metrics_aloud_and_says_at_the_end_how_many(server: Server, tmp_path: Path) -> None:
    way = Way(server, tmp_path, limit_bytes=1000)
    server.up = False
    way.send(*range(100))
    way.send(100, call="finish")
    assert way.said[1:] == [
        "MLflow is lost and the limit tracking.spool_bytes=1000 is reached; further records are dropped from here on"
    ]
    server.up = True
    wait_until(lambda: not way.delivery.is_lost)
    kept = len(server.got) - 1
    assert server.got == [*range(kept), 100]
    assert way.said[-1].endswith(f"{kept + 1} waiting records are sent, {100 - kept} were dropped")


def test_a_folder_that_cannot_be_written_does_not_end_the_run_and_is_said(server: Server, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file where the folder should be")
    way = Way(server, tmp_path / "plain")
    server.up = False
    way.send(1, 2)
    assert len(way.said) == 2
    assert "cannot be written: " in way.said[1]
    server.up = True
    wait_until(lambda: not way.delivery.is_lost)
    assert way.said[-1].endswith("0 waiting records are sent, 2 were dropped")


def test_what_an_earlier_process_left_is_sent_before_what_is_new(server: Server, tmp_path: Path) -> None:
    left = SpoolFolder(tmp_path, "key", 10_000).create()
    for number in (1, 2):
        left.append(Entry("run", "log_metrics", {}, number), 10_000)
    left.release()
    way = Way(server, tmp_path)
    server.up = False
    way.send(3)
    server.up = True
    wait_until(lambda: not way.delivery.is_lost)
    assert server.got == [1, 2, 3]
    assert way.spools.is_empty()


def test_the_end_of_a_run_tries_once_more_and_then_says_where_its_records_wait(server: Server, tmp_path: Path) -> None:
    way = Way(server, tmp_path, retry_seconds=60)
    server.up = False
    way.send(1)
    way.delivery.settle(way.said.append)
    assert way.said[-1] == (
        f"MLflow: records of the run still wait in {tmp_path}; the next heliostat command that uses this store and server "
        "from this machine sends them"
    )
    server.up = True
    way.delivery.settle(way.said.append)
    assert server.got == [1]
    assert way.spools.is_empty()
