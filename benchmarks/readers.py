"""Bytes of images out of shards: ours beside webdataset, Ray Data's reader and a bare walk over a mapped tar.

    python benchmarks/readers.py            # or: make bench

8,000 JPEG files of about 50 kB, cut from photographs, in 8 tars, read from a disk (page cache warm) and from an S3 server on
loopback. Every side hands over each image, and the benchmark touches every page of it, so that a reader which merely maps
pays for what it gives. The gate first: all sides must deliver the same multiset of sha256. Sides alternate within a round;
CPU seconds are those of the process and its children, without the S3 server's.
"""

import hashlib
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from readers_sides import Images, by_index, by_manifest, by_walk, by_webdataset, raw_get, raw_walk
from results_file import cpu_hardware, today, versions, write_result

from heliostat.data.manifest import manifest_to_bytes
from heliostat.data.photographs import photographs
from heliostat.data.shard_image import ShardImage
from heliostat.data.shards import make_shard_image, manifest_rows, write_shard
from heliostat.storage import LocalStore, Store, open_store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/fixtures"))

NUM_IMAGES, NUM_SHARDS, ROUNDS = 8000, 8, 7
S3_IMAGES = 2000
RAY_SMALL, RAY_REPEATS = 2, 5  # shards of the small run that is subtracted, and rounds
Side = Callable[[], Images]


def make_images() -> Iterator[ShardImage]:
    """JPEG files of about 50 kB: crops of photographs, all different, quality 90."""
    photos = [pixels for pixels in photographs().values() if min(pixels.shape[:2]) >= 300]
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        photo = photos[number % len(photos)]
        height, width = (min(side, 400) for side in photo.shape[:2])
        top, left = (int(rng.integers(0, side - cut + 1)) for side, cut in zip(photo.shape[:2], (height, width), strict=True))
        crop = cv2.resize(photo[top : top + height, left : left + width], (420, 420), interpolation=cv2.INTER_LINEAR)
        crop = np.clip(crop.astype(np.int16) + rng.integers(-6, 7, crop.shape, np.int16), 0, 255).astype(np.uint8)
        _, encoded = cv2.imencode(".jpg", crop[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        yield make_shard_image(encoded.tobytes(), "jpg", f"{number:06d}.jpg", label=str(number % 17))


def write_shards(store: Store) -> list[str]:
    """Tars with a manifest beside them."""
    images, keys, tables = list(make_images()), [], []
    size = NUM_IMAGES // NUM_SHARDS
    for number in range(NUM_SHARDS):
        key = f"{number:06d}.tar"
        data = write_shard(images[number * size : (number + 1) * size])
        store.put(key, data)
        keys.append(key)
        tables.append(manifest_rows(key, data))
    store.put("manifest.parquet", manifest_to_bytes(pa.concat_tables(tables)))
    return keys


def touched(images: Images) -> int:
    """Touch every page; the number of images."""
    count = 0
    for image in images:
        bytes(memoryview(image)[::4096])
        count += 1
    return count


def digests(images: Images) -> Counter[bytes]:
    """What was delivered, as a multiset."""
    return Counter(hashlib.sha256(image).digest() for image in images)


def gate(sides: dict[str, Side], expected: Counter[bytes]) -> None:
    """RuntimeError unless every side delivers every image."""
    for name, side in sides.items():
        if digests(side()) != expected:
            raise RuntimeError(f"{name} delivers other bytes than were written; nothing was timed")


def measure(sides: dict[str, Side], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) microseconds an image, round by round; every second round goes backwards."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            cpu, wall = _cpu_seconds(), time.perf_counter()
            count = touched(sides[name]())
            spent = (_cpu_seconds() - cpu) / count * 1e6, (time.perf_counter() - wall) / count * 1e6
            if number:  # the first round warms up
                found[name].append(spent)
    return found


def _cpu_seconds() -> float:
    """Of this process and of children that have ended (webdataset reads S3 through a shell pipe)."""
    total = 0.0
    for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(whose)
        total += usage.ru_utime + usage.ru_stime
    return total


def spread(values: list[float]) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(found: dict[str, list[tuple[float, float]]], limit: str) -> list[str]:
    """One row a side; ratios are taken within a round, by CPU time."""
    lines = ["| side | CPU µs an image | wall µs | times webdataset's speed | of the limit's speed |", "|---|---|---|---|---|"]
    for name, rows in found.items():
        cpu, wall = ([row[index] for row in rows] for index in (0, 1))
        against = []
        for other in ("webdataset", limit):
            against.append(
                spread([theirs[0] / own for theirs, own in zip(found[other], cpu, strict=True)]) if other in found else "-"
            )
        lines.append(f"| {name} | {spread(cpu)} | {spread(wall)} | {' | '.join(against)} |")
    return lines


def local_part(folder: Path, keys: list[str], expected: Counter[bytes]) -> list[str]:
    """Shards on a disk."""
    store = LocalStore(folder)
    sides: dict[str, Side] = {
        "ours, by manifest": lambda: by_manifest(store, keys),
        "ours, walk with checksums": lambda: by_walk(store, keys),
        "ours, index with sha256 of every image": lambda: by_index(store, keys),
        "webdataset": lambda: by_webdataset([str(folder / key) for key in keys]),
        "raw walk, mapped": lambda: raw_walk(folder, keys),
    }
    gate(sides, expected)
    return ["## Local shards", "", *table(measure(sides, ROUNDS), "raw walk, mapped"), ""]


def s3_part(folder: Path, keys: list[str]) -> list[str]:
    """Shards on an S3 server: Swift where it can run, else moto."""
    from s3_server import CACHE, CannotStartError, moto_server, swift_server

    keys = keys[: NUM_SHARDS * S3_IMAGES // NUM_IMAGES]
    with ExitStack() as stack:
        try:
            server = stack.enter_context(swift_server([folder / "swift", CACHE / "run"]))
        except CannotStartError as error:
            print(f"Swift cannot run: {error}")
            server = stack.enter_context(moto_server(folder / "moto"))
        os.environ.update(server.environment)
        server.client().create_bucket(Bucket="bench")
        store = open_store("s3://bench/shards")
        for key in [*keys, "manifest.parquet"]:
            store.put(key, (folder / key).read_bytes())
        signed = [
            server.client().generate_presigned_url("get_object", {"Bucket": "bench", "Key": f"shards/{key}"}) for key in keys
        ]
        sides: dict[str, Side] = {
            "ours, by manifest": lambda: by_manifest(store, keys),
            "ours, walk with checksums": lambda: by_walk(store, keys),
            "webdataset": lambda: by_webdataset([f"pipe:curl -s -f '{url}'" for url in signed]),
            "raw, one GET a shard": lambda: raw_get(store, keys),
        }
        gate(sides, digests(raw_walk(folder, keys)))
        found = table(measure(sides, ROUNDS), "raw, one GET a shard")
    return [f"## From an S3 server ({server.description}), {S3_IMAGES:,} images, webdataset through curl", "", *found, ""]


def ray_part(folder: Path) -> list[str]:
    """Inside Ray Data: what 6,000 more images cost, so that Ray's start and the pipeline's are not counted."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).parent / "readers_in_ray.py"),
        str(folder),
        str(RAY_REPEATS),
        str(RAY_SMALL),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    rows = [list(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("row ")]
    if done.returncode or not rows:
        raise RuntimeError(f"the Ray side failed: {done.stderr.strip().splitlines()[-1:] or 'no output'}")
    ours, theirs = ([(row[at], row[at + 1]) for row in rows] for at in (0, 2))
    ratio = spread([their[0] / own[0] for own, their in zip(ours, theirs, strict=True)])
    lines = [
        "## Inside Ray Data (blocks of bytes into the driver), marginal cost",
        "",
        "| side | CPU µs an image | wall µs |",
        "|---|---|---|",
    ]
    for name, side in (("ours in map_batches", ours), ("ray.data.read_webdataset, decoder off", theirs)):
        lines.append(f"| {name} | {spread([row[0] for row in side])} | {spread([row[1] for row in side])} |")
    return [*lines, "", f"read_webdataset costs {ratio} times ours inside Ray.", ""]


def missing() -> list[str]:
    """What has to be installed first, or why a peer is left out."""
    if importlib.util.find_spec("webdataset") is None:
        sys.exit("webdataset is missing; install the peers with: pip install -c constraints.txt -e '.[bench,demo]'")
    return [
        "mosaicml-streaming 0.13.0 is left out: it imports torchvision, which raises beside a CPU build of torch, and its "
        "shards are a format of its own."
    ]


def main() -> None:
    """Gate, measure, write."""
    import webdataset

    notes = missing()
    with tempfile.TemporaryDirectory(prefix="heliostat-readers-") as name:
        folder = Path(name)
        keys = write_shards(LocalStore(folder))
        expected = digests(raw_walk(folder, keys))
        mean = sum(len(image) for image in raw_walk(folder, keys)) / NUM_IMAGES
        load_before = os.getloadavg()[0]
        local = local_part(folder, keys, expected)
        s3 = s3_part(folder, keys)
        in_ray = ray_part(folder)
    lines = [
        f"# Reading shards, {today()}",
        "",
        f"{versions()}, webdataset {webdataset.__version__}, load average {load_before:.1f} on a shared machine. Command: "
        "`python benchmarks/readers.py`.",
        f"{NUM_IMAGES:,} JPEG files of {mean / 1000:.0f} kB in {NUM_SHARDS} tars with JSON sidecars, page cache warm.",
        f"Medians of {ROUNDS} rounds ({RAY_REPEATS} for Ray), spread in brackets; all sides gave the same multiset of sha256.",
        "",
        "By manifest nothing is verified while reading (the ids were, when the shard was made); the walk verifies headers, "
        "the index also parses every sidecar and hashes every image. " + " ".join(notes),
        "",
        *local,
        *s3,
        *in_ray,
    ]
    write_result("readers", lines, cpu_hardware())


if __name__ == "__main__":
    main()
