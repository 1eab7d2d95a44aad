"""What retries, checksums and pieces cost a read and a write, and how fast a folder is listed. Writes benchmarks/results/.

    python benchmarks/storage.py [num_files]

A real S3 server runs on loopback. Three ways alternate, round by round: ours; boto3 with default settings and nothing around it
(how this project read before); a bare HTTP GET of a presigned URL as the limit. A figure is CPU time of this process, the
client, per megabyte; the servers are processes of their own. Before any timing all ways must give the same bytes.
"""

import hashlib
import http.client
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

from results_file import cpu_hardware, today, versions, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))

from s3_server import CACHE, S3Server, moto_server, swift_server

from heliostat.storage import LocalStore, S3Store
from heliostat.storage.bucket import Checksum

ROUNDS = 5
MEGABYTE = 10**6


def cpu_ms_per_mb(work: Callable[[], object], megabytes: float) -> float:
    """CPU milliseconds of this process per megabyte."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started) / megabytes


def spread(values: list[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@contextmanager
def running(name: str) -> Iterator[S3Server]:
    """The server, with the AWS variables pointing at it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        make = swift_server([Path(folder), CACHE / "run"]) if name == "swift" else moto_server(Path(folder))
        with make as server:
            os.environ.update(server.environment)
            yield server


def bare_get(client: object, bucket: str, key: str) -> Callable[[], bytes]:
    """A GET without a library, over one connection."""
    address = urlparse(client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}, ExpiresIn=3600))  # type: ignore[attr-defined]
    connection = http.client.HTTPConnection(address.hostname or "", address.port)

    def read() -> bytes:
        connection.request("GET", f"{address.path}?{address.query}")
        return connection.getresponse().read()

    return read


def transfers(server: S3Server) -> list[str]:
    """Rows for reads and writes of several sizes, each repeated up to 10 times a round."""
    client, bucket, rows = server.client(), "benchmark", []
    client.create_bucket(Bucket=bucket)
    store = S3Store(bucket)
    for megabytes in (0.1, 24, 72):
        data, repeats = os.urandom(int(megabytes * MEGABYTE)), min(10, max(1, int(24 / megabytes)))
        total = repeats * megabytes
        store.put("object", data)
        client.put_object(Bucket=bucket, Key="others", Body=data)
        bare = bare_get(client, bucket, "object")
        ways: dict[str, Callable[[], object]] = {
            "read ours": lambda: store.read("object"),
            "read boto3": lambda client=client: client.get_object(Bucket=bucket, Key="object")["Body"].read(),
            "read bare": bare,
            "others ours": lambda: store.read("others"),
            "others boto3": lambda client=client: client.get_object(Bucket=bucket, Key="others")["Body"].read(),
            "write ours": lambda data=data: store.put("written", data),
            "write boto3": lambda data=data: client.put_object(Bucket=bucket, Key="written", Body=data),
        }
        contents = {name: ways[name]() for name in ("read ours", "read boto3", "read bare", "others ours")}
        assert all(content == data for content in contents.values()), "the ways differ"
        costs: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, work in ways.items():
                costs[name].append(cpu_ms_per_mb(lambda work=work, n=repeats: [work() for _ in range(n)], total))
        for kind in ("read", "write", "others"):
            ours, theirs = costs[f"{kind} ours"], costs[f"{kind} boto3"]
            ratio = spread([mine / other for mine, other in zip(ours, theirs, strict=True)])
            limit = "-" if kind == "write" else spread(costs["read bare"])
            verb = "read others'" if kind == "others" else kind
            what = f"{'moto' if 'moto' in server.description else 'Swift'} | {verb} {megabytes} MB"
            rows.append(f"| {what} | {spread(ours)} | {spread(theirs)} | {ratio} | {limit} |")
    return rows


def digests() -> list[str]:
    """CPU-ms per MB of the checksums alone."""
    data = os.urandom(32 * MEGABYTE)
    ways: dict[str, Callable[[], object]] = {
        "crc32": lambda: Checksum("crc32", "").agrees_with(data),
        "md5": lambda: Checksum("md5", "").agrees_with(data),
        "sha256": lambda: hashlib.sha256(data).digest(),
    }
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            costs[name].append(cpu_ms_per_mb(work, 32))
    return [f"| {name} | {spread(values)} |" for name, values in costs.items()]


def listing(num_files: int) -> list[str]:
    """Rows for a folder walk: ours and the way by pathlib that it replaced, one round of the latter (it takes minutes)."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_files):
            if number % 1000 == 0:
                below = Path(folder) / f"{number // 100_000:02d}" / f"{number // 1000:06d}"
                below.mkdir(parents=True)
            os.close(os.open(below / f"{number:09d}.jpg", os.O_CREAT | os.O_WRONLY))
        store, root = LocalStore(folder), Path(folder)

        def by_pathlib() -> list[tuple[str, int]]:
            found = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.is_file())
            return [(key, path.stat().st_size) for key, path in found]

        rows = []
        assert [tuple(info) for info in store.list()] == by_pathlib(), "the lists differ"
        for name, work, rounds in (("ours", lambda: list(store.list()), 3), ("pathlib", by_pathlib, 1)):
            wall, cpu = [], []
            for _ in range(rounds):
                started, started_cpu = time.perf_counter(), time.process_time()
                work()
                wall.append(time.perf_counter() - started)
                cpu.append(time.process_time() - started_cpu)
            rows.append(f"| {name} | {num_files:,} | {spread(cpu)} | {spread(wall)} |")
        return rows


def main() -> None:
    """Run everything and write one result file."""
    num_files = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    load = os.getloadavg()[0]
    rows = []
    for name in ("swift", "moto"):
        with running(name) as server:
            rows += transfers(server)
    lines = [
        f"# Storage, {today()}",
        "",
        f"{versions()}. Load of the machine at the beginning {load:.1f}. `python benchmarks/storage.py {num_files}`",
        "",
        f"Caveats: loopback without TLS, so requests are signed over their content; a shared machine; medians of {ROUNDS}",
        "rounds with minimum and maximum. Ours compares a crc32 after every whole read (for others' objects on Swift an",
        "MD5), reads back the size of what it wrote, and reads 72 MB by several requests at once. boto3 compares a crc32 on",
        "moto, which keeps it as AWS does, and nothing on Swift, which keeps none.",
        "",
        "| server | what | ours, CPU-ms per MB | boto3 | ours / boto3 | bare GET |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "| checksum | CPU-ms per MB |",
        "| --- | --- |",
        *digests(),
        "",
        "| listing a folder | files | CPU s | wall s |",
        "| --- | --- | --- | --- |",
        *listing(num_files),
    ]
    write_result("storage", lines, cpu_hardware())


if __name__ == "__main__":
    main()
