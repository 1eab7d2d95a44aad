"""Crops into a training worker: the loader's threads beside Ray Data, in CPU time of the whole process tree per image.

    python benchmarks/ingest.py

JPEGs of 375 x 500 pixels, DINOv2's crops (2 x 224 and 8 x 98), one training worker that only takes batches. Both sides have the
same number of threads; the Ray side has them in one data worker, or in as many data workers of one thread. Before anything is
timed every side must give the same batches, byte for byte. A round is a whole run, with the start of its streams, but in data
worker processes that are there already. What the idle cluster costs is measured in the same run and subtracted from every side.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from results_file import cpu_hardware, today, versions, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))

from tars import Tars

from heliostat.data.batch import Batch
from heliostat.data.config import CropsConfig, DecodeConfig, LoaderConfig, ShuffleConfig
from heliostat.data.image_source import ImageSource
from heliostat.data.image_table import image_table
from heliostat.data.loading import BatchLoader, Loading
from heliostat.data.masking import MaskSettings
from heliostat.data.photographs import photographs
from heliostat.data.shards import make_shard_image, manifest_rows, write_shard
from heliostat.runtime.config import ClusterConfig
from heliostat.runtime.ray_blocks import from_block, slice_bytes, to_block
from heliostat.runtime.session import open_session

BATCH_SIZE = 64
THREADS = 2
GATE_STEPS = 3
SHARD = "shards/000000.tar"


def jpegs(count: int) -> ImageSource:
    """Cuts of 375 x 500 pixels of the photographs, JPEG of quality 90, in one shard in memory."""
    rng, pictures, images = np.random.default_rng(0), list(photographs().values()), []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        height, width = picture.shape[0], picture.shape[1]
        scale = max(1.0, 1.15 * 375 / height, 1.15 * 500 / width)
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else picture
        top, left = rng.integers(0, picture.shape[0] - 375 + 1), rng.integers(0, picture.shape[1] - 500 + 1)
        cut = np.ascontiguousarray(picture[top : top + 375, left : left + 500])
        done, data = cv2.imencode(".jpg", cv2.cvtColor(cut, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
        if not done:
            raise RuntimeError("a photograph could not be encoded")
        images.append(make_shard_image(data.tobytes(), "jpg", f"{number}.jpg"))
    tar = write_shard(images)
    return ImageSource(image_table(manifest_rows(SHARD, tar)), Tars({SHARD: tar}))


KINDS = ("training worker", "data workers", "Ray itself")


def kind_of(process: psutil.Process) -> str:
    """Whose CPU time a process spends. Data workers are those worker processes that run no agent and no actor of Ray's."""
    title = " ".join(process.cmdline())
    if process.pid == os.getpid():
        return KINDS[0]
    is_worker = title.startswith("ray::") and not any(word in title for word in ("Agent", "Actor", "Spill", "Restore"))
    return KINDS[1] if is_worker else KINDS[2]


def tree_cpu_seconds() -> dict[int, tuple[float, str]]:
    """CPU seconds of this process and all below it, Ray's own processes included, with their kinds."""
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process.pid] = (times.user + times.system, kind_of(process))
        except psutil.Error:
            continue
    return found


def spent(before: Mapping[int, tuple[float, str]]) -> dict[str, float]:
    """CPU seconds since `before`, by kind of process."""
    total = dict.fromkeys(KINDS, 0.0)
    for pid, (seconds, kind) in tree_cpu_seconds().items():
        total[kind] += seconds - before.get(pid, (0.0, ""))[0]
    return total


def same(one: Batch, two: Batch) -> bool:
    """Byte for byte."""
    names = ("global_crops", "local_crops", "masks")
    return one.image_ids == two.image_ids and all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


def take(loader: BatchLoader, steps: int) -> tuple[dict[str, float], float, list[Batch]]:
    """CPU seconds by kind of process and wall seconds of a whole run; its first batches."""
    kept: list[Batch] = []
    before, began = tree_cpu_seconds(), time.perf_counter()
    for batch in loader.batches(steps):
        if len(kept) < GATE_STEPS:
            kept.append(batch)
    return spent(before), time.perf_counter() - began, kept


def idle_cpu_per_second(seconds: float = 6.0) -> float:
    """What the cluster costs when nobody asks anything of it."""
    before = tree_cpu_seconds()
    time.sleep(seconds)
    return sum(spent(before).values()) / seconds


def parts(loading: Loading) -> list[str]:
    """Where the Ray side's extra time goes, measured one by one: CPU ms per image."""
    import ray

    batch = loading.image_loader(0, 1).batch(0)
    num = BATCH_SIZE
    out = np.empty(slice_bytes(loading, num), np.uint8)

    def cost(work: Callable[[], object], times: int = 10) -> float:
        work()
        before = tree_cpu_seconds()
        for _ in range(times):
            work()
        return sum(spent(before).values()) / times / num * 1e3

    block = to_block(0, batch, [], 0)
    reference = ray.put(block)

    def copy_out() -> None:
        start = 0
        for array in from_block(ray.get(reference)).crops_and_masks:
            out[start : start + array.size] = array
            start += array.size

    build, put, read = cost(lambda: to_block(0, batch, [], 0)), cost(lambda: ray.put(block)), cost(copy_out)
    return [
        f"| building the Arrow block (no copy of pixels) | {build:.3f} |",
        f"| writing it to the object store (one copy) | {put:.3f} |",
        f"| reading it and laying it into the batch (one copy) | {read:.3f} |",
    ]


def spread(values: list[float], digits: int = 2) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Gate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    paths = [*(path for path in sys.path if path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="hsb", dir="/tmp")  # short: Ray keeps unix sockets below it
    loading = Loading(
        sources=(jpegs(340),),
        crops=CropsConfig(),
        loader=LoaderConfig(workers=THREADS, cache_bytes=0),
        masks=MaskSettings(14),
        global_batch_size=BATCH_SIZE,
        seed=0,
        shuffle=ShuffleConfig(),
        decoding=DecodeConfig(),
    )
    with open_session(ClusterConfig(address="local", num_cpus=8, object_store_memory=1_500_000_000)):
        measure(loading, arguments.rounds, arguments.steps)


def measure(loading: Loading, rounds: int, steps: int) -> None:
    """Both sides alternate; every second round goes backwards."""
    import ray

    from heliostat.runtime.ray_loader import RayLoader

    sources = ray.put(loading.sources)

    def ray_side(num_workers: int) -> Callable[[], BatchLoader]:
        threads = THREADS // num_workers
        one = replace(loading, loader=replace_loader(loading.loader, workers=threads, ray_workers=num_workers))
        return lambda: RayLoader(one, sources, rank=0, world_size=1, notify=print, start_timeout_seconds=120)

    sides: dict[str, Callable[[], BatchLoader]] = {
        "threads": lambda: loading.image_loader(0, 1),
        f"Ray Data, 1 data worker of {THREADS} threads": ray_side(1),
        f"Ray Data, {THREADS} data workers of 1 thread": ray_side(THREADS),
    }
    truth = [loading.image_loader(0, 1).batch(step) for step in range(GATE_STEPS)]
    for name, make in sides.items():
        _, _, kept = take(make(), GATE_STEPS)
        if not all(same(one, two) for one, two in zip(kept, truth, strict=True)):
            raise RuntimeError(f"{name} gave other batches; nothing was timed")
    idle = [idle_cpu_per_second()]
    results: dict[str, list[tuple[dict[str, float], float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            cpu, wall, _ = take(sides[name](), steps)
            results[name].append((cpu, wall))
            print(f"round {number}: {name}: {per_image(cpu, steps)}", flush=True)
    idle.append(idle_cpu_per_second())
    write_result("ingest", report(results, idle, steps, parts(loading)), cpu_hardware())


def per_image(cpu: Mapping[str, float], steps: int) -> str:
    """CPU ms per image by kind of process."""
    return ", ".join(f"{kind} {seconds / steps / BATCH_SIZE * 1e3:.2f}" for kind, seconds in cpu.items()) + " CPU ms/image"


def replace_loader(config: LoaderConfig, **changes: int) -> LoaderConfig:
    """The settings with some of them changed."""
    return LoaderConfig.model_validate(config.model_dump() | changes)


def report(
    results: Mapping[str, list[tuple[dict[str, float], float]]], idle: list[float], steps: int, costs: list[str]
) -> list[str]:
    """The result file."""
    import ray

    num, rate = steps * BATCH_SIZE, statistics.mean(idle)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions_text = versions().replace("one thread", f"{THREADS} loader threads")
    lines = [
        f"# Crops into a training worker, {today()}",
        "",
        f"{versions_text}, Ray {ray.__version__}. Command: `python benchmarks/ingest.py`. Medians of {len(results['threads'])} "
        f"interleaved rounds of {steps} batches of {BATCH_SIZE} images, spread in brackets; quotients and differences are "
        "taken within a round.",
        "",
        "JPEGs of 375 x 500 pixels, quality 90, 2 x 224 and 8 x 98 crops, no cache. The gate: the first batches of all sides "
        f"are equal, byte for byte. Load averages at the end: {load}. Shared host: CPU time holds better than images/s.",
        "",
        f"The idle cluster costs {rate * 1e3:.0f} CPU ms a second ({idle[0] * 1e3:.0f} before, {idle[1] * 1e3:.0f} after the "
        "rounds). It runs beside the threads as well, so it is subtracted from every side, by wall time.",
        "",
        "| way in | images/s | CPU ms per image | without the idle cluster | relative to threads | more CPU ms per image |",
        "|---|---|---|---|---|---|",
    ]
    busy = {name: [(sum(cpu.values()) - rate * wall) / num * 1e3 for cpu, wall in found] for name, found in results.items()}
    for name, found in results.items():
        all_ms = [sum(cpu.values()) / num * 1e3 for cpu, _ in found]
        quotients = [one / two for one, two in zip(busy[name], busy["threads"], strict=True)]
        more = [one - two for one, two in zip(busy[name], busy["threads"], strict=True)]
        lines.append(
            f"| {name} | {spread([num / wall for _, wall in found], 0)} | {spread(all_ms)} "
            f"| {spread(busy[name])} | {spread(quotients)} | {spread(more)} |"
        )
    lines += [
        "",
        "Where the difference goes, each measured by itself in one process:",
        "",
        "| part | CPU ms per image |",
        "|---|---|",
    ]
    return lines + costs


if __name__ == "__main__":
    main()
