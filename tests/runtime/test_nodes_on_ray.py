"""A cluster of several nodes on this machine loses one and gets one: the run goes on with the workers that there are."""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from families import end_family
from ranks import SAME, furthest
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from slow_tracker import SlowTracker
from tiny_training import job, settings, shard
from tiny_training import train as train_here

from heliostat.runtime.config import ClusterConfig
from heliostat.runtime.progress import Progress
from heliostat.runtime.session import open_session
from heliostat.runtime.trainer import TrainingRequest, train
from heliostat.tracking import NullRun

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SETTINGS = (*SAME, "train.steps=60", "train.checkpoint_every_steps=4", "scaling.cpus_per_worker=1")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that computes nothing and two nodes of one CPU; this process is its driver."""
    folder = tempfile.mkdtemp(prefix="hst", dir="/tmp")  # short: Ray keeps unix sockets below it
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", folder)
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        made = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1"}
        )
        try:
            # Every node is an instance of Ray on this machine; who asks for "the" dashboard would not know which.
            environment.setenv("RAY_API_SERVER_ADDRESS", f"http://{made.webui_url}")
            for _ in range(2):
                made.add_node(num_cpus=1)
            environment.setenv("RAY_ADDRESS", made.address)
            with open_session(ClusterConfig()):
                yield made
        finally:
            made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(1200)
@pytest.mark.soak  # two minutes on two free cores; on crowded ones Ray gives up nodes that still live
def test_a_lost_node_shrinks_the_run_and_a_new_one_grows_it(cluster: Cluster, tmp_path: Path) -> None:
    tar, stream = shard(), io.StringIO()
    train_here(job(tmp_path / "here", settings(*SETTINGS), tar))
    overrides = ["scaling.num_workers=2", "scaling.min_workers=1", "scaling.max_workers=2", "scaling.resize_every_seconds=2"]
    overrides.append("scaling.start_timeout_seconds=20")  # Ray notices late that a node is gone, and places workers there
    work = job(tmp_path / "ray", settings(*SETTINGS, *overrides), tar)

    joined, grown = [], tmp_path / "grown"

    def happen() -> None:
        until(lambda: newest(tmp_path / "ray") >= 8)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        before = newest(tmp_path / "ray")
        until(lambda: newest(tmp_path / "ray") >= before + 8)
        joined.append(join(cluster.address))
        until(lambda: ray.cluster_resources()["CPU"] == 2)
        grown.touch()

    events = threading.Thread(target=happen, daemon=True)
    events.start()
    tracker = SlowTracker(0.3, wait_at=40, wait_for=grown)
    train(TrainingRequest({"": "model/tiny@1"}, work, tracker, {"": "run"}), {"": NullRun()}, Progress(stream))
    events.join(1)
    end_family(joined[0])
    seen = stream.getvalue()
    written_by = re.findall(r"resuming at step \d+ of 60(?:, written by (\d) workers?)?", seen)
    assert written_by == ["2", "1"], seen
    ours, theirs = (load_file(tmp_path / f"{name}/backbone.safetensors") for name in ("ray", "here"))
    assert furthest(ours, theirs) < 1e-5


def join(address: str) -> subprocess.Popen[bytes]:
    """A further node, as a machine that boots joins (`Cluster.add_node` works in main threads alone)."""
    command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={address}", "--num-cpus=1", "--block"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max(
        (int(path.parent.name.removeprefix("step-")) for path in folder.glob("_work/checkpoints/*/checkpoint.json")), default=0
    )


def until(true: Callable[[], bool], seconds: float = 200) -> None:
    """Wait."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
