"""The URLs of a task -> shards in the order of the task, and a log of every URL.

Answers come in any order and lie in a file on the local disk until all are there, so that memory is what one shard needs,
and the shards of two runs with the same answers are equal to the byte.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.artifacts import WORK, describe
from heliostat.crawling.config import CrawlConfig, FetchLimits, check_contact
from heliostat.crawling.fetch import Client, Lookup, look_up
from heliostat.crawling.plan import host_of
from heliostat.crawling.politeness import Hosts
from heliostat.crawling.reasons import OK, REASONS
from heliostat.crawling.tables import (
    LOG_SCHEMA,
    PLAN_SCHEMA,
    URLS_SCHEMA,
    log_key,
    plan_key,
    read_table,
    table_to_bytes,
    text_table,
)
from heliostat.crawling.urls import url_filter
from heliostat.crawling.visit import Visited, Visitor
from heliostat.data.decode import ImageRejected, probe
from heliostat.data.manifest import ManifestBuilder, manifest_to_bytes
from heliostat.data.packing import Packed, Packing, Put, shard_key
from heliostat.data.parquet_shards import lay_parquet
from heliostat.data.quarantine import Rejection, quarantine_to_bytes
from heliostat.data.shard_image import EXTENSION_OF_FORMAT, ShardImage, make_shard_image
from heliostat.data.shards import lay_tar
from heliostat.data.tar_index import Account
from heliostat.errors import DataError
from heliostat.storage import Store

_TICK_SECONDS = 0.1
_STRAGGLER = Visited("straggler")


@dataclass(frozen=True)
class Fetched:
    """What became of one URL; an image's bytes lie in the spool, `length` bytes from `offset`."""

    visited: Visited
    offset: int = 0
    length: int = 0
    extension: str = ""


class Spool:
    """Bytes on the local disk until they are packed; gone when it is closed."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="heliostat-crawl-")  # noqa: SIM115  `close` closes it
        self._end = 0

    def keep(self, visited: Visited) -> Fetched:
        """Judge the bytes by what they are, and put images away."""
        if visited.status != OK:
            return Fetched(visited)
        body, visited = visited.body, replace(visited, body=b"")
        try:
            extension = EXTENSION_OF_FORMAT[probe(body).format]
        except ImageRejected:
            return Fetched(replace(visited, status="not_an_image"), 0, len(body))
        offset, self._end = self._end, self._end + len(body)
        try:
            self._file.seek(offset)
            self._file.write(body)
            self._file.flush()
        except OSError as error:
            raise DataError(f"cannot keep an answer on the disk: {error.strerror}; free some room or set TMPDIR") from error
        return Fetched(visited, offset, len(body), extension)

    def read(self, fetched: Fetched) -> bytes:
        """The bytes of an image."""
        self._file.seek(fetched.offset)
        return self._file.read(fetched.length)

    def close(self) -> None:
        """Free the disk."""
        self._file.close()


def pack_downloads(
    work: Store, index: int, config: CrawlConfig, packing: Packing, put: Put, *, lookup: Lookup = look_up
) -> Packed:
    """Download the URLs of `plan/NNNNNN.parquet`, lay the images into shards, and write the fetch log.

    A rejection stands for every URL that gave no image: its source is the URL, its reason one of reasons.REASONS.
    """
    check_contact(config)
    table = read_table(work, plan_key(index), PLAN_SCHEMA)
    urls = table["url"].to_pylist()
    spool = Spool()
    try:
        fetched = _fetch(urls, table["share"].to_pylist(), config, packing, spool, lookup=lookup)
        rows = table.select(URLS_SCHEMA.names).to_pylist()
        packed, ids = _pack(rows, fetched, spool, index, packing=packing, put=put)
    finally:
        spool.close()
    log = [_log_row(row, found, id_) for row, found, id_ in zip(rows, fetched, ids, strict=True)]
    work.put(log_key(index), table_to_bytes(text_table(log, LOG_SCHEMA)))
    return packed


def _fetch(
    urls: Sequence[str], shares: Sequence[int], config: CrawlConfig, packing: Packing, spool: Spool, *, lookup: Lookup
) -> list[Fetched]:
    """What became of each URL, in their order; those that must not be taken are not asked for."""
    refused = packing.refusal.of_sources(urls) if packing.refusal is not None else [False] * len(urls)
    asked = [row for row, is_refused in enumerate(refused) if not is_refused]
    found = asyncio.run(_download([urls[row] for row in asked], [shares[row] for row in asked], config, spool.keep, lookup))
    fetched = [Fetched(Visited("forgotten"))] * len(urls)
    for row, one in zip(asked, found, strict=True):
        fetched[row] = one
    return fetched


async def _download(
    urls: Sequence[str], shares: Sequence[int], config: CrawlConfig, keep: Callable[[Visited], Fetched], lookup: Lookup
) -> list[Fetched]:
    """What became of each URL, in their order."""
    hosts = [host_of(url) for url in urls]
    share_of = dict(zip(hosts, shares, strict=True))
    checks = url_filter(config.filter)
    found: list[Fetched | None] = [None] * len(urls)
    async with Client(config, checks.guard, lookup) as client:
        visitor = Visitor(config, checks, client, Hosts(config.politeness, lambda name: share_of.get(name, 1)))

        async def visit_rows(rows: Iterator[int]) -> None:
            for row in rows:
                found[row] = keep(await visitor.image(urls[row]))

        async def visit_hosts(groups: Iterator[range]) -> None:
            for group in groups:
                rows = iter(group)
                seats = min(len(group), config.politeness.connections_per_host)
                await asyncio.gather(*(visit_rows(rows) for _ in range(seats)))

        groups = iter(_host_groups(hosts))
        workers = [asyncio.ensure_future(visit_hosts(groups)) for _ in range(min(len(urls), config.hosts_at_once))]
        await _until_done(workers, found, config.limits)
        await visitor.close()
    return [entry or Fetched(_STRAGGLER) for entry in found]


def _host_groups(hosts: Sequence[str]) -> list[range]:
    """Consecutive rows of one host."""
    starts = [row for row, host in enumerate(hosts) if row == 0 or host != hosts[row - 1]]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(hosts)], strict=True)]


async def _until_done(workers: Sequence["asyncio.Future[None]"], found: Sequence[object], limits: FetchLimits) -> None:
    """Wait for the workers, to the deadline at most, or until the last few have dragged on for too long; then end them."""
    deadline = time.monotonic() + limits.task_deadline_seconds
    is_dragging, waiting = False, set(workers)
    while waiting and (left := deadline - time.monotonic()) > 0:
        done, waiting = await asyncio.wait(waiting, timeout=min(_TICK_SECONDS, left), return_when=asyncio.FIRST_EXCEPTION)
        for worker in done:
            worker.result()  # a defect of ours, or a full disk: it ends the task with its message
        if not is_dragging and sum(entry is None for entry in found) <= limits.straggler_ratio * len(found):
            is_dragging, deadline = True, min(deadline, time.monotonic() + limits.straggler_seconds)
    for worker in waiting:
        worker.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def _pack(
    rows: Sequence[Mapping[str, Any]], fetched: list[Fetched], spool: Spool, index: int, *, packing: Packing, put: Put
) -> tuple[Packed, list[str | None]]:
    """Shards and their manifest rows; the id of every URL's image, None without one."""
    builder, rejections, ids = ManifestBuilder(), list[Rejection](), list[str | None]()
    images, num_bytes, number = list[ShardImage](), 0, 0

    def write() -> None:
        key = shard_key(index, packing.format, number)
        data, offsets = lay_tar(images) if packing.format == "tar" else lay_parquet(images)
        put(key, data)
        for image, offset in zip(images, offsets, strict=True):
            builder.add(key, offset, image, image.data)

    for place, (row, found) in enumerate(zip(rows, fetched, strict=True)):
        if found.visited.status != OK:
            rejections.append(_rejection(row["url"], found))
            ids.append(None)
            continue
        if images and (len(images) >= packing.images_per_shard or num_bytes + found.length > packing.shard_bytes):
            write()
            images, num_bytes, number = [], 0, number + 1
        told = {"page": row["page"], "alt": row["alt"], "licence": _licence(row, found)}
        image = make_shard_image(
            spool.read(found), found.extension, row["url"], metadata={key: text for key, text in told.items() if text}
        )
        if refused := packing.refused(image):
            fetched[place] = replace(found, visited=replace(found.visited, status=refused.reason))
            rejections.append(refused)
            ids.append(None)
            continue
        images.append(image)
        ids.append(image.id)
        num_bytes += found.length
    if images:
        write()
    account = Account(num_in=len(rows), num_images=len(rows) - len(rejections), num_rejected=len(rejections))
    account.check(f"task {index}")
    return Packed(builder.table(), rejections + builder.rejections, account), ids


def _rejection(url: str, found: Fetched) -> Rejection:
    status, http_status = found.visited.status, found.visited.http_status
    detail = REASONS[status].meaning + (f"; status {http_status}" if http_status is not None else "")
    return Rejection(url, "", 0, found.length, "", status, detail)


def _licence(row: Mapping[str, Any], found: Fetched) -> str | None:
    """What the answer links as its licence (RFC 8288), else what the page does."""
    link = found.visited.header("link") or ""
    for entry in link.split(","):
        target, _, rest = entry.partition(";")
        if "license" in rest.replace('"', " ").replace("=", " ").lower().split():
            return target.strip().strip("<>")
    licence = row["licence"]
    return None if licence is None else str(licence)


def _log_row(row: Mapping[str, Any], found: Fetched, id_: str | None) -> Sequence[object]:
    visited = found.visited
    return (
        row["url"],
        row["page"],
        row["alt"],
        _licence(row, found),
        host_of(row["url"]),
        visited.status,
        visited.http_status,
        visited.attempts,
        visited.final_url,
        visited.address,
        visited.header("content-type") or "",
        found.length,
        visited.robots,
        visited.opt_out,
        visited.header("etag"),
        visited.header("last-modified"),
        id_,
    )


def retry_list(fetch_log: pa.Table) -> pa.Table:
    """The URLs of a fetch log whose failure may have passed, as a list (URLS_SCHEMA) that `crawl.urls` takes.

    A table of failed pages (FAILED_SCHEMA) gives the list that `crawl.pages` takes.
    """
    passing = pa.array([name for name, reason in REASONS.items() if reason.may_pass])
    return fetch_log.filter(pc.is_in(fetch_log["status"], value_set=passing)).select(URLS_SCHEMA.names)


@dataclass(frozen=True)
class DownloadUrls:
    """Does one task of a Plan: shards into `files`, and, last, the manifest rows, as ingest leaves them. Can be pickled.

    work: where plan and fetch log lie; files: the artifact's draft.
    """

    work: Store
    files: Store
    config: CrawlConfig
    packing: Packing
    lookup: Lookup = look_up

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: index. Returns index, written (key -> size and checksum of every shard) and statuses (word -> URLs)."""
        index = int(task["index"])
        written: dict[str, Any] = {}

        def put(key: str, data: bytes) -> None:
            self.files.put(key, data)
            written[key] = describe(data).model_dump()

        packed = pack_downloads(self.work, index, self.config, self.packing, put, lookup=self.lookup)
        self.files.put(f"{WORK}quarantine/{index:06d}.parquet", quarantine_to_bytes(packed.rejections))
        self.files.put(f"{WORK}account/{index:06d}.json", json.dumps(asdict(packed.account)).encode())
        self.files.put(f"{WORK}rows/{index:06d}.parquet", manifest_to_bytes(packed.rows))
        statuses = {OK: packed.account.num_images} if packed.account.num_images else {}
        for rejection in packed.rejections:
            if not rejection.shard:
                statuses[rejection.reason] = statuses.get(rejection.reason, 0) + 1
        return {"index": index, "written": written, "statuses": dict(sorted(statuses.items()))}
