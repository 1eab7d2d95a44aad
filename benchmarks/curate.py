"""The pass over a crawl beside a bare decode loop, a script per question and a plain Ray Data pipeline; 1.2e9 images projected.

    OMP_NUM_THREADS=1 python benchmarks/curate.py

JPEGs of quality 90 cut from photographs, at two sizes, in tars with a manifest. Every side has the same networks, one thread,
and a warm page cache. Before anything is timed the sides must give the same ids, hashes, scores, numbers of faces and vectors.
Sides alternate within a round, quotients are taken within a round; a figure is CPU time, of the whole process tree inside Ray.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from curate_in_ray import NUM_CPUS, cluster, marginal
from curate_projection import Measured
from curate_report import Size, result
from curate_sides import (
    Seconds,
    Shards,
    bare,
    check_same,
    decode_loop,
    differences,
    one_script_per_question,
    our_pass,
    read_features,
    scaled,
    whole,
    without,
    write_images,
)
from results_file import cpu_hardware, write_result
from torch.utils.flop_counter import FlopCounterMode

from heliostat.curation.buckets import nearest_centroids
from heliostat.curation.config import EmbedConfig
from heliostat.curation.copy_network import SHIPPED_WEIGHTS, CopyEmbedder, evened_out, squeezed
from heliostat.curation.embed import BackboneEmbedder
from heliostat.curation.features import Instruments
from heliostat.curation.features_config import DetectorsConfig
from heliostat.curation.products import operand, similar_pairs
from heliostat.curation.vectors import Block
from heliostat.runtime.stage_embed import OpenInstruments
from heliostat.storage import LocalStore

Rows = tuple[pa.Table, pa.Table]

SIZES = {"500x375": (500, 375), "1600x1200": (1600, 1200)}
OURS, SCRIPTS = "ours", "one script per question"


@dataclass(frozen=True)
class Plan:
    """How much is measured. images, per_shard: of a size; few: images of the small Ray run, whole shards."""

    images: int
    per_shard: int
    few: int
    rounds: int
    ray_rounds: int


def sides_of(shards: Shards, folder: Path, tools: Instruments, per_task: int) -> dict[str, Callable[[], Seconds]]:
    """Every side in this process, by name: CPU seconds by part, and `all`."""
    out = LocalStore(folder / "ours")
    (folder / "scripts").mkdir(exist_ok=True)

    def ours(*names: str) -> Callable[[], Seconds]:
        return lambda: our_pass(shards, out, without(tools, *names), per_task)

    return {
        "simplejpeg, nothing else": lambda: decode_loop(shards, bare),
        "data.decode, whole size": lambda: decode_loop(shards, whole),
        "data.decode, scaled as in the pass": lambda: decode_loop(shards, scaled),
        "ours: hash, copy": ours("nsfw", "faces"),
        "ours: hash, copy, nsfw": ours("faces"),
        "ours: hash, copy, faces": ours("nsfw"),
        OURS: ours(),
        SCRIPTS: lambda: one_script_per_question(shards, folder / "scripts", tools)[0],
    }


def gate(shards: Shards, folder: Path, tools: Instruments, per_task: int) -> Rows:
    """The rows of ours, and of the scripts that decode whole images. RuntimeError when the sides differ on the same pixels."""
    out = LocalStore(folder / "ours")
    (folder / "scripts").mkdir(exist_ok=True)
    our_pass(shards, out, tools, per_task)
    ours = read_features(out)
    _, same_pixels = one_script_per_question(shards, folder / "scripts", tools, scaled)
    check_same(ours, same_pixels, SCRIPTS)
    _, whole_size = one_script_per_question(shards, folder / "scripts", tools)
    if ours.num_rows != shards.count or whole_size.num_rows != shards.count:
        raise RuntimeError("a side lost images; nothing was timed")
    return ours, whole_size


def measure(sides: Mapping[str, Callable[[], Seconds]], rounds: int, label: str) -> dict[str, list[Seconds]]:
    """Round by round; every second one goes backwards."""
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            found[name].append(sides[name]())
        print(
            f"{label}, round {number}: " + ", ".join(f"{name} {rows[-1]['all']:.2f}" for name, rows in found.items()),
            flush=True,
        )
    return found


def feature_bytes(out: LocalStore) -> float:
    """Compressed bytes of a row of our files without vectors, footers left out."""
    total = rows = 0
    for info in out.list("rows/"):
        metadata = pq.ParquetFile(out.path(info.key)).metadata
        rows += metadata.num_rows
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
            total += sum(column.total_compressed_size for column in columns if not column.path_in_schema.startswith("copy"))
    return total / rows


def prepare_ms(shards: Shards, side: int) -> dict[str, float]:
    """CPU milliseconds an image of making pixels ready for a network on a GPU."""
    images = [scaled(data) for data in shards.files()]
    backbone = BackboneEmbedder("", 1, torch.nn.Identity(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ways: dict[str, Callable[[np.ndarray], object]] = {
        "copy": lambda image: evened_out(squeezed(image, side)[None]),
        "semantic": backbone._prepared,
    }
    found = {}
    for name, way in ways.items():
        costs = []
        for _ in range(3):
            started = time.process_time()
            for image in images:
                way(image)
            costs.append((time.process_time() - started) / len(images) * 1e3)
        found[name] = statistics.median(costs)
    return found


def join_rates(dimension: int) -> tuple[float, float]:
    """FLOP/s of one core in `similar_pairs` and `nearest_centroids`: random vectors, each with five near copies."""
    rng = np.random.default_rng(0)
    base = np.repeat(rng.standard_normal((2048, dimension)), 6, axis=0) + 0.3 * rng.standard_normal((12_288, dimension))
    unit = (base / np.linalg.norm(base, axis=1, keepdims=True)).astype(np.float16)
    members = operand(Block(np.arange(len(unit), dtype=np.int64), unit))
    centroids = unit[::6].astype(np.float32)
    works: list[tuple[Callable[[], object], float]] = [
        (lambda: similar_pairs(members, members, 0.45, neighbors=64, same=True), len(unit) ** 2 * dimension),
        (lambda: nearest_centroids(unit, centroids, 8), 2.0 * len(unit) * len(centroids) * dimension),
    ]
    rates = []
    for work, flops in works:
        seconds = []
        for _ in range(4):
            started = time.process_time()
            work()
            seconds.append(time.process_time() - started)
        rates.append(flops / statistics.median(seconds[1:]))
    return rates[0], rates[1]


def copy_flops(embedder: CopyEmbedder) -> float:
    """Of one image and its mirror image, convolutions and products only."""
    side = embedder.network.config.image_size
    with FlopCounterMode(display=False) as counter:
        embedder.network(torch.zeros(2, 3, side, side))
    return float(counter.get_total_flops())


def measured_of(
    found: Mapping[str, Sequence[Seconds]], shards: Shards, out: LocalStore, image_bytes: float, tools: Instruments
) -> Measured:
    """What the projection takes: medians over rounds."""
    rounds = found[OURS]
    cpu_ms = {part: statistics.median(row[part] for row in rounds) / shards.count * 1e3 for part in rounds[0] if part != "all"}
    embedder = tools.copy
    if not isinstance(embedder, CopyEmbedder):
        raise TypeError(f"the benchmark counts the operations of the copy network; {embedder.name} is another embedder")
    join_rate, assign_rate = join_rates(embedder.dimension)
    return Measured(
        cpu_ms=cpu_ms,
        prepare_ms=prepare_ms(shards, embedder.network.config.image_size),
        image_bytes=image_bytes,
        feature_bytes=feature_bytes(out),
        dimension=embedder.dimension,
        copy_flops=copy_flops(embedder),
        join_rate=join_rate,
        assign_rate=assign_rate,
    )


def in_process(folder: Path, label: str, plan: Plan, tools: Instruments) -> tuple[Size, Rows]:
    """Everything of one size that needs no Ray; the rows that the gate saw."""
    place = folder / label
    shards = Shards(place, plan.images)
    image_bytes = write_images(shards.store, plan.images, SIZES[label], plan.per_shard)
    rows = gate(shards, place, tools, plan.per_shard)
    found = measure(sides_of(shards, place, tools, plan.per_shard), plan.rounds, label)
    our_pass(shards, LocalStore(place / "ours"), tools, plan.per_shard)  # the last round may have left other columns
    measured = measured_of(found, shards, LocalStore(place / "ours"), image_bytes, tools)
    return Size(label, plan.images, image_bytes, found, differences(*rows), measured), rows


def in_ray(
    folder: Path, config: EmbedConfig, plans: Mapping[str, Plan], truth: Mapping[str, Rows]
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """(ours, plain) of every round by size, and what the idle cluster costs."""
    found, rates = {}, []
    with cluster() as clock:
        for label, plan in plans.items():
            shards = Shards(folder / label, plan.few), Shards(folder / label, plan.images)
            found[label], rate = marginal(clock, shards, truth[label], config, plan.ray_rounds)
            rates.append(rate)
    return found, statistics.mean(rates)


def main() -> None:
    """Gate, measure, project, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ray-rounds", type=int, default=3)
    parser.add_argument("--images", type=int, nargs=2, default=(192, 96), help="of the small and of the large size")
    parser.add_argument("--ray-sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("every side has one thread; start it with OMP_NUM_THREADS=1")
    os.environ["OPENCV_FOR_THREADS_NUM"] = "1"  # for Ray's workers
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    paths = [*(path for path in sys.path if path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    plans = {
        label: Plan(images, images // 6, images // 6 * 2, arguments.rounds, arguments.ray_rounds)
        for label, images in zip(SIZES, arguments.images, strict=True)
    }
    loads = [os.getloadavg()]
    with tempfile.TemporaryDirectory(prefix="heliostat-curate-") as name:
        folder = Path(name)
        config = EmbedConfig(
            copy_embedder=shutil.copy(SHIPPED_WEIGHTS, folder),  # the same for all, whatever happens to the checkout meanwhile
            detectors=DetectorsConfig(nsfw="opennsfw", faces="centerface"),
        )
        tools = OpenInstruments(config, LocalStore(folder))()
        sizes, truth = [], {}
        for label, plan in plans.items():
            size, truth[label] = in_process(folder, label, plan, tools)
            sizes.append(size)
        loads.append(os.getloadavg())
        ray_costs, idle = in_ray(folder, config, {label: plans[label] for label in arguments.ray_sizes}, truth)
    loads.append(os.getloadavg())
    command = " ".join(["OMP_NUM_THREADS=1 python benchmarks/curate.py", *sys.argv[1:]])
    write_result(
        "curate", result(sizes, ray_costs, (idle, NUM_CPUS), loads, rounds=arguments.rounds, command=command), cpu_hardware()
    )


if __name__ == "__main__":
    main()
