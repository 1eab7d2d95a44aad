"""What downloading costs: images per second and per CPU-second of the crawl's client. Writes benchmarks/results/.

    python benchmarks/crawl.py [num_images]

A server of one process answers on loopback under 64 host names with 50 kB PNG images. Two ways alternate, round by round: a
task of the crawl (robots.txt, checks, retries, log, shards) and a bare aiohttp session with as many connections that keeps the
bytes. Politeness is set out of the way. A figure is CPU time of the client's process; the server is one of its own. Before any
timing the shards must hold exactly the images that the server has.
"""

import asyncio
import hashlib
import multiprocessing
import os
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
from results_file import cpu_hardware, today, versions, write_result

from heliostat.crawling.config import CrawlConfig, PolitenessConfig, UrlFilterConfig
from heliostat.crawling.download import pack_downloads
from heliostat.crawling.plan import plan_downloads
from heliostat.crawling.tables import LINKS_SCHEMA, links_key, table_to_bytes, text_table
from heliostat.data.packing import Packing
from heliostat.data.shards import read_shard
from heliostat.storage import LocalStore

ROUNDS = 5
NUM_HOSTS = 64
CONNECTIONS = 64
IMAGE_BYTES = 50_000
ADDRESS = "127.20.0.1"


def image(number: int) -> bytes:
    """A PNG of one pixel with a comment that makes it as large as a photograph."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    text = chunk(b"tEXt", b"Comment\0" + hashlib.sha256(b"%d" % number).hexdigest().encode() * (IMAGE_BYTES // 64))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + text + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def serve(pipe: Connection) -> None:
    """Answer /<number>.png until the process is ended."""
    made: dict[str, bytes] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].decode()
                if path not in made and path != "/robots.txt":
                    made[path] = image(int(path[1:-4]))
                body, status = (b"", b"404 X") if path == "/robots.txt" else (made[path], b"200 OK")
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, ADDRESS, 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def lookup(host: str, port: int) -> list[str]:
    """Every name is the server's."""
    del host, port
    return [ADDRESS]


def bare(urls: list[str], port: int) -> dict[str, bytes]:
    """As many requests at once, by aiohttp alone."""

    async def run() -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
            waiting = iter(urls)

            async def work() -> None:
                for url in waiting:
                    async with session.get(f"http://{ADDRESS}:{port}/{url.rpartition('/')[2]}") as response:
                        found[url] = await response.read()

            await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
        return found

    return asyncio.run(run())


def ours(work: LocalStore, config: CrawlConfig) -> dict[str, bytes]:
    """One task: shards by key."""
    shards: dict[str, bytes] = {}
    pack_downloads(work, 0, config, Packing(), shards.__setitem__, lookup=lookup)
    return shards


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(values: list[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})"


def measure(num_images: int, port: int, folder: Path) -> list[str]:
    """Rows of the result."""
    urls = [f"http://host{number % NUM_HOSTS}.example.org:{port}/{number}.png" for number in range(num_images)]
    work = LocalStore(folder)
    work.put(links_key(0), table_to_bytes(text_table([(url, "", "", None, "", "") for url in urls], LINKS_SCHEMA)))
    plan_downloads(work, [links_key(0)], urls_per_task=num_images)
    config = CrawlConfig(
        contact="https://example.org",
        connections=CONNECTIONS,
        filter=UrlFilterConfig(ports=(port,), allowed_addresses=(f"{ADDRESS}/32",)),
        politeness=PolitenessConfig(requests_per_second=1e6),
    )
    stored = {found.source: found.data for data in ours(work, config).values() for found in read_shard(data)}
    assert stored == bare(urls, port) == {url: image(number) for number, url in enumerate(urls)}, "the ways differ"
    ways: dict[str, Callable[[], object]] = {"crawl": partial(ours, work, config), "bare aiohttp": partial(bare, urls, port)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            found[name].append(timed(way))
    rows = []
    for name, times in found.items():
        per_second = spread([num_images / wall for wall, _ in times])
        rows.append(f"| {name} | {per_second} | {spread([num_images / cpu for _, cpu in times])} |")
    ratios = [mine[1] / other[1] for mine, other in zip(found["crawl"], found["bare aiohttp"], strict=True)]
    return [*rows, "", f"CPU time of the crawl over that of bare aiohttp: {spread(ratios)}."]


def main() -> None:
    """Run everything and write one result file."""
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    load = os.getloadavg()[0]
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(num_images, here.recv(), Path(folder))
    server.terminate()
    lines = [
        f"# Crawl, {today()}",
        "",
        f"{versions()}. Load of the machine at the beginning {load:.1f}. `python benchmarks/crawl.py {num_images}`",
        "",
        f"Caveats: loopback without TLS and name servers, {IMAGE_BYTES:,} bytes an image, {CONNECTIONS} connections,",
        f"{NUM_HOSTS} hosts, no limit of rate; the server takes a core of its own of a shared machine. The crawl also asks for",
        "robots.txt, keeps answers on the disk, hashes them and lays shards; the bare way keeps bytes. Medians of",
        f"{ROUNDS} rounds, least and most.",
        "",
        "| way | images per second | images per CPU-second |",
        "| --- | --- | --- |",
        *rows,
    ]
    write_result("crawl", lines, cpu_hardware())


if __name__ == "__main__":
    main()
