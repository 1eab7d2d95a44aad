"""The Ray sides of curate.py: a plain Ray Data pipeline and ours through RayTasks, in CPU time of the whole process tree."""

import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from curate_sides import BATCH_SIZE, PIECES, ROWS, Shards, answers, check_same, read_features

from heliostat.curation.config import EmbedConfig
from heliostat.curation.features import FeatureShard, plan_features
from heliostat.data.config import DecodeConfig
from heliostat.runtime.config import ClusterConfig
from heliostat.runtime.progress import Progress
from heliostat.runtime.session import open_session
from heliostat.runtime.shards import RayTasks
from heliostat.runtime.stage_embed import OpenInstruments
from heliostat.storage import LocalStore

_LOOK_SECONDS = 0.5
_TAIL_SECONDS = 1.5  # what workers still finish belongs to their run
_IDLE_SECONDS = 6.0
NUM_CPUS = 2


class TreeClock:
    """CPU seconds of this process and all below it, those that have ended included: looked at twice a second, itself left out.

    A worker that ends loses what it did since the last look; before it ends it has waited.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, float], float] = {}
        self._own, self._lock, self._stop = 0.0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        started = time.thread_time()
        with self._lock:
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    times = process.cpu_times()
                    self._found[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue
            self._own += time.thread_time() - started

    def seconds(self) -> float:
        """Until now."""
        self._look()
        with self._lock:
            return sum(self._found.values()) - self._own

    def stop(self) -> None:
        """No more looks."""
        self._stop.set()
        self._thread.join()


@dataclass(frozen=True)
class Run:
    """One run: CPU and wall seconds, and the rows it wrote."""

    cpu: float
    wall: float
    rows: pa.Table


def to_floats(row: dict[str, Any]) -> dict[str, Any]:
    """Pixels as most pipelines hand them on: float32, 0 to 1."""
    return {"id": row["json"]["id"], "image": row["jpg"].astype(np.float32) / 255}


class Measure:
    """The same instruments, one image at a time."""

    def __init__(self, config: EmbedConfig, artifacts: LocalStore) -> None:
        self._tools = OpenInstruments(config, artifacts)()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = np.rint(row["image"] * 255).astype(np.uint8)
        return {"id": row["id"], **answers(self._tools, image)}


def plain(shards: Shards, out: Path, config: EmbedConfig) -> pa.Table:
    """read_webdataset with its default decoder, a map to floats, a map in an actor, write_parquet."""
    import ray

    rows = ray.data.read_webdataset([str(shards.folder / key) for key in shards.keys])
    pool = ray.data.ActorPoolStrategy(size=1)  # of two CPUs one is left to read and write
    arguments = (config, LocalStore(out))
    floats = rows.map(to_floats, num_cpus=0.5)  # with the resources of the others Ray would run it inside the actor
    measured = floats.map(Measure, fn_constructor_args=arguments, compute=pool)
    measured.write_parquet(str(out / "plain"))
    return pq.read_table(out / "plain")


def ours(shards: Shards, out: Path, config: EmbedConfig) -> pa.Table:
    """The embed stage's own way: FeatureShard through RayTasks."""
    store = LocalStore(out)
    per_task = max(1, shards.count // len(shards.keys))
    tasks = plan_features(shards.manifest, store, PIECES, max_images=per_task)
    opener = OpenInstruments(config, store)
    function = FeatureShard(shards.store, store, PIECES, ROWS, DecodeConfig(), opener, BATCH_SIZE)
    for _ in RayTasks(Progress(io.StringIO()))(function, tasks, label="embedding", has_state=True):
        pass
    return read_features(store)


Side = Callable[[Shards, Path, EmbedConfig], pa.Table]


def run(clock: TreeClock, side: Side, shards: Shards, config: EmbedConfig) -> Run:
    """One run into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        cpu, wall = clock.seconds(), time.perf_counter()
        rows = side(shards, Path(folder), config)
        wall = time.perf_counter() - wall
        time.sleep(_TAIL_SECONDS)
        return Run(clock.seconds() - cpu, wall + _TAIL_SECONDS, rows)


@contextmanager
def cluster() -> Iterator[TreeClock]:
    """Ray on this machine and a clock over it, both stopped at the end."""
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="hsc", dir="/tmp")  # short: Ray keeps unix sockets below it
    with open_session(ClusterConfig(address="local", num_cpus=NUM_CPUS, object_store_memory=1_500_000_000)):
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        clock = TreeClock()
        try:
            yield clock
        finally:
            clock.stop()


def idle_rate(clock: TreeClock) -> float:
    """CPU seconds a second of a cluster that nobody asks anything."""
    before = clock.seconds()
    time.sleep(_IDLE_SECONDS)
    return (clock.seconds() - before) / _IDLE_SECONDS


def marginal(
    clock: TreeClock, shards: tuple[Shards, Shards], truth: tuple[pa.Table, pa.Table], config: EmbedConfig, rounds: int
) -> tuple[list[tuple[float, float]], float]:
    """(ours, plain) CPU milliseconds of one more image, a round each, without the idle cluster; and that cluster's rate.

    shards: a part of the images, and all of them. truth: the rows of ours, and of scripts that decode whole images as the plain
    pipeline does, without Ray. A run of each side is the gate and warms up: RuntimeError when a side gives other rows.
    """
    idle = [idle_rate(clock)]
    few, every = shards
    for side, expected in zip((ours, plain), truth, strict=True):
        check_same(expected, run(clock, side, every, config).rows, f"{side.__name__} inside Ray")
    idle.append(idle_rate(clock))
    rate, found = sum(idle) / len(idle), []
    for number in range(rounds):
        cost = {}
        for side in (ours, plain) if number % 2 else (plain, ours):
            less, more = run(clock, side, few, config), run(clock, side, every, config)
            busy = (more.cpu - less.cpu) - rate * (more.wall - less.wall)
            cost[side] = busy / (more.rows.num_rows - less.rows.num_rows) * 1e3
        found.append((cost[ours], cost[plain]))
        print(f"Ray, round {number}: ours {cost[ours]:.1f}, plain {cost[plain]:.1f} CPU ms an image", flush=True)
    return found, rate
