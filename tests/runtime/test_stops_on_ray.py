"""Training on Ray that is stopped, loses its machine or a worker, hangs, or has a worker too many ends as an untouched run."""

import contextlib
import http.server
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from local_ray import started_ray
from ranks import SAME, furthest
from safetensors.torch import load_file
from tiny_training import final_files, job, settings, shard
from tiny_training import train as train_here

from heliostat.errors import ConfigError, PreemptedError
from heliostat.runtime.progress import Progress
from heliostat.runtime.spot_notice import SpotNotice
from heliostat.runtime.trainer import TrainingRequest, train
from heliostat.runtime.worker_watch import WorkerWatch, stall_line
from heliostat.tracking import NullRun, NullTracker

LONG = (
    "train.steps=60",
    "train.log_every_steps=10",
    "train.checkpoint_every_steps=10",
    "scaling.num_workers=2",
    "scaling.cpus_per_worker=0.5",
)
on_ray = [
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray 2.60's, about its own settings
]


def fit(folder: Path, tar: bytes, *overrides: str) -> str:
    """Train on Ray; returns what a person saw, also when the run stopped."""
    stream = io.StringIO()
    request = TrainingRequest({"": "model/tiny@1"}, job(folder, settings(*LONG, *overrides), tar), NullTracker(), {"": ""})
    try:
        train(request, {"": NullRun()}, Progress(stream))
    except PreemptedError as error:
        stream.write(f"{error}\n")
    return stream.getvalue()


def when(marker: Path, do: Any) -> threading.Thread:
    """Do something in a thread as soon as a file is there."""

    def wait() -> None:
        deadline = time.monotonic() + 200
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def training_workers() -> list[psutil.Process]:
    """The Ray Train workers below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def first_checkpoint(folder: Path) -> Path:
    return folder / "_work/checkpoints/step-00000010/checkpoint.json"


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Room for three workers of one CPU."""
    with started_ray(num_cpus=3):
        yield


@pytest.fixture(scope="module")
def tar() -> bytes:
    return shard()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tar: bytes, local_ray: None) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, tar)
    return final_files(folder)


class TestOnRay:
    pytestmark = on_ray

    def test_a_signal_writes_a_checkpoint_of_that_step_and_the_run_goes_on_there(self, tmp_path, tar, whole) -> None:
        when(first_checkpoint(tmp_path), lambda: os.kill(os.getpid(), signal.SIGINT))
        seen = fit(tmp_path, tar)
        assert "stopping after this step with a checkpoint; once more to stop at once" in seen
        (stopped,) = [line for line in seen.splitlines() if line.startswith("stopped at step ")]
        step = int(stopped.split()[3])
        assert (tmp_path / f"_work/checkpoints/step-{step:08d}/checkpoint.json").is_file()
        assert f"resuming at step {step} of 60" in fit(tmp_path, tar)
        assert final_files(tmp_path) == whole

    def test_a_killed_worker_is_replaced(self, tmp_path, tar, whole) -> None:
        handler, killed = signal.getsignal(signal.SIGINT), []

        def kill() -> None:
            killed.append(training_workers()[-1])
            killed[-1].kill()

        when(first_checkpoint(tmp_path), kill)
        seen = fit(tmp_path, tar)
        assert killed
        assert "resuming at step " in seen
        assert final_files(tmp_path) == whole
        assert signal.getsignal(signal.SIGINT) == handler

    def test_a_stuck_worker_is_named_and_the_group_is_started_again(self, tmp_path, tar, whole) -> None:
        frozen = []

        def freeze() -> None:
            frozen.append(training_workers()[-1])
            frozen[-1].suspend()

        when(first_checkpoint(tmp_path), freeze)
        seen = fit(tmp_path, tar, "scaling.collective_timeout_seconds=10")
        assert "has given no sign of life for" in seen, seen
        assert "the workers are started again" in seen
        assert "resuming at step " in seen
        assert final_files(tmp_path) == whole
        assert not frozen[-1].is_running()

    def test_a_spot_machine_that_goes_costs_no_step(self, tmp_path, tar, whole, metadata) -> None:
        when(first_checkpoint(tmp_path), lambda: metadata.announce(seconds=4))
        seen = fit(tmp_path, tar, f"scaling.spot_notice_url={metadata.url}", "scaling.max_failures=0")
        assert "this machine is taken back in" in seen, seen
        assert "the workers start again in" in seen
        stopped = int(seen.partition("stopped at step ")[2].split()[0])
        assert f"resuming at step {stopped} of 60" in seen
        assert final_files(tmp_path) == whole

    def test_a_worker_too_many_is_left_over_and_shards_train_on_the_others(self, tmp_path, tar) -> None:
        same = (*SAME, "train.steps=6", "train.log_every_steps=2")
        train_here(job(tmp_path / "here", settings(*same), tar))
        overrides = ("scaling.max_workers=3", "scaling.min_workers=1", "scaling.parallel=zero3", "scaling.cpus_per_worker=1")
        seen = fit(tmp_path / "ray", tar, *same, "scaling.num_workers=2", *overrides)
        assert "the batch cannot be divided by 3" in seen, seen
        assert "parallel: zero3" in seen
        ours, theirs = (load_file(tmp_path / f"{name}/backbone.safetensors") for name in ("ray", "here"))
        assert furthest(ours, theirs) < 1e-5


class Metadata(http.server.BaseHTTPRequestHandler):
    """AWS's metadata service, as far as a spot notice goes."""

    ends: datetime | None = None
    zone = "Z"

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        self._answer(200, b"ticket")

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != "ticket":
            self._answer(401, b"")
        elif (
            self.path != "/latest/meta-data/spot/instance-action" or Metadata.ends is None or Metadata.ends < datetime.now(UTC)
        ):
            self._answer(404, b"")
        else:
            text = {"action": "terminate", "time": Metadata.ends.strftime("%Y-%m-%dT%H:%M:%S") + Metadata.zone}
            self._answer(200, json.dumps(text).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing is said."""


class Served:
    """The service on loopback."""

    def __init__(self, url: str) -> None:
        self.url = url

    def announce(self, seconds: float) -> None:
        Metadata.ends = datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.fixture
def metadata() -> Iterator[Served]:
    Metadata.ends, Metadata.zone = None, "Z"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Served(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()


def test_a_notice_tells_the_seconds_that_are_left(metadata: Served) -> None:
    notice = SpotNotice(metadata.url)
    assert notice.seconds_left() is None
    metadata.announce(seconds=90)
    assert 80 < notice.seconds_left() <= 90
    Metadata.zone = ""
    assert notice.seconds_left() == 120  # a time of no zone says only that it is announced
    assert SpotNotice("http://127.0.0.1:9").seconds_left() is None  # nobody answers


@pytest.mark.parametrize("url", ["https://169.254.169.254", "169.254.169.254", "http://", "http://host/path", "file:///etc"])
def test_a_notice_from_elsewhere_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"scaling\.spot_notice_url .* is not http://host"):
        SpotNotice(url)


def test_a_drained_node_asks_for_a_checkpoint_at_once_and_one_before_it_goes() -> None:
    watch = WorkerWatch(None, "model/x@1", 0, stall_seconds=600, spot=None)  # type: ignore[arg-type]
    now = time.time()
    assert not watch._must_save(None)
    assert watch._must_save(now + 100)
    assert not watch._must_save(now + 99)
    assert watch._must_save(now + 20)
    assert not watch._must_save(now + 10)


def test_the_rank_that_is_furthest_behind_is_named() -> None:
    beats = {0: ("step", 41, 0.5), 1: ("data", 41, 1.0), 2: ("step", 41, 0.1)}
    assert "rank 1 answers, and does not get on (waiting for a batch, 41 steps done)" in stall_line(beats, 600)
    beats[2] = ("step", 41, 300.0)
    assert "rank 2 has given no sign of life for 300 s (computing a step, 41 steps done)" in stall_line(beats, 600)
    assert "no rank was heard of" in stall_line({}, 600)
