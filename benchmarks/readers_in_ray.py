"""The Ray side of readers.py, in a process of its own: FOLDER ROUNDS SHARDS-OF-THE-SMALL-RUN.

Prints, a round a line, CPU and wall microseconds an image of ours and of `ray.data.read_webdataset`, where the cost of a small
run is subtracted from that of the whole.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext, Dataset

from heliostat.data.manifest import manifest_from_bytes
from heliostat.data.shard_reader import ShardReader
from heliostat.storage import LocalStore


def read(batch: pa.Table, folder: str) -> Iterator[pa.Table]:
    """Shards to tables of bytes."""
    store = LocalStore(folder)
    manifest = manifest_from_bytes(store.read("manifest.parquet"))
    for key in batch["key"].to_pylist():
        rows = manifest.filter(pc.equal(manifest["shard"], key))
        view = ShardReader(store).view(key)
        places = zip(rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True)
        yield pa.table({"jpg": pa.array([view[offset : offset + length] for offset, length in places], pa.binary())})


def ours(folder: str, names: Sequence[str]) -> Dataset:
    """Our reader inside Ray Data."""
    rows = ray.data.from_arrow([pa.table({"key": [name]}) for name in names])
    return rows.map_batches(read, fn_args=(folder,), batch_format="pyarrow", batch_size=1)


def theirs(folder: str, names: Sequence[str]) -> Dataset:
    """Ray's own, without decoding."""
    return ray.data.read_webdataset([f"{folder}/{name}" for name in names], decoder=None)


def cpu_seconds() -> float:
    """Of the whole tree, Ray's servers and workers included; workers stay alive between runs, so differences are whole."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def run(side: Callable[[str, Sequence[str]], Dataset], folder: str, names: Sequence[str]) -> tuple[float, float, list[bytes]]:
    """CPU and wall seconds; what was delivered (its sha256 is taken after the clock)."""
    started, wall, images = cpu_seconds(), time.perf_counter(), []
    for batch in side(folder, names).iter_batches(batch_format="pyarrow", batch_size=None):
        for image in batch["jpg"]:
            buffer = image.as_buffer()
            bytes(memoryview(buffer)[::4096])
            images.append(buffer)
    wall = time.perf_counter() - wall
    time.sleep(0.3)  # what workers still finish belongs to this run
    spent = cpu_seconds() - started
    return spent, wall, sorted(hashlib.sha256(image).digest() for image in images)


def main() -> None:
    """Gate and measure."""
    folder, rounds, small = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False, object_store_memory=600_000_000)
    DataContext.get_current().enable_progress_bars = False
    keys = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    if run(ours, folder, keys)[2] != run(theirs, folder, keys)[2]:
        sys.exit("ours and Ray's reader deliver other bytes")
    for number in range(rounds):
        row: dict[str, list[float]] = {}
        for side in (ours, theirs) if number % 2 else (theirs, ours):
            few, many = run(side, folder, keys[:small]), run(side, folder, keys)
            extra = len(many[2]) - len(few[2])
            row[side.__name__] = [(many[index] - few[index]) / extra * 1e6 for index in (0, 1)]
        print("row", *row["ours"], *row["theirs"], flush=True)


if __name__ == "__main__":
    main()
