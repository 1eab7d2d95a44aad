"""Links of all inputs -> the URLs of each download task: every URL once, all URLs of a host together, in a fixed order.

Out of core: links are spread over buckets by a hash of their host and spilled; a bucket is small enough to be sorted in memory.
The order follows from the input alone: buckets by number, hosts by their hash and name, URLs as they were found.
"""

import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.crawling.tables import (
    LINKS_SCHEMA,
    PLAN_SCHEMA,
    URLS_SCHEMA,
    TableWriter,
    batches_of,
    plan_key,
    read_table,
    table_to_bytes,
)
from heliostat.errors import DataError
from heliostat.storage import Store

# Shapes: N rows of a bucket, H hosts.

_ROWS_PER_BUCKET = 2_000_000  # about 1 GB while it is sorted (assumption: 250 bytes a row, twice)
_SPILL_BYTES = 2**32  # a billion links become some ten thousand spilled files
_MAX_BUCKETS = 4096
_WORK = "plan/_spill/"
_DONE = "plan/plan.json"
_HOST_RE2 = r"^https?://(?P<host>\[[^\]]*\]|[^/:?#]*)"
_HOST = re.compile(_HOST_RE2)


@dataclass
class Plan:
    """What is to be downloaded. num_links == num_urls + num_repeated + sum(refused.values())."""

    num_links: int = 0
    num_urls: int = 0
    num_repeated: int = 0
    num_hosts: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Links by the reason of their refusal; `opt_out` counts links whose URL is on any page that opts out, too."""
    tasks: list[int] = field(default_factory=list)
    """URLs of each task; task i is {"index": i}, its URLs lie at plan_key(i)."""

    @property
    def task_list(self) -> list[Mapping[str, Any]]:
        """The tasks for a TaskMap."""
        return [{"index": index} for index in range(len(self.tasks))]


def plan_downloads(work: Store, keys: Sequence[str], *, urls_per_task: int, rows_per_bucket: int = _ROWS_PER_BUCKET) -> Plan:
    """Write the URLs of every task below `plan/` of the work store, and return what there is to do; a finished plan is kept.

    keys: links tables, in the order in which their pages count: of a URL that was found twice the first row stays. A URL that
    any page with an opt-out shows is not fetched at all. Raises DataError for a table that is damaged.
    """
    if work.size(_DONE) is not None:
        return Plan(**json.loads(work.read(_DONE)))
    plan = Plan()
    num_buckets = _count(work, keys, plan, rows_per_bucket)
    spills = _spill(work, keys, num_buckets)
    tasks = _Tasks(work, urls_per_task)
    for bucket in range(num_buckets):
        tables = [read_table(work, _spill_key(bucket, number), LINKS_SCHEMA) for number in range(spills[bucket])]
        if tables:
            _plan_bucket(pa.concat_tables(tables), plan, tasks)
    tasks.close()
    plan.tasks = tasks.sizes
    plan.refused = dict(sorted(plan.refused.items()))
    if plan.num_links != plan.num_urls + plan.num_repeated + sum(plan.refused.values()):
        raise DataError(
            f"{plan.num_links} links came in and not all are accounted for: {asdict(plan)}; please report this defect"
        )
    for bucket, count in enumerate(spills):
        for number in range(count):
            work.delete(_spill_key(bucket, number))
    work.put(_DONE, json.dumps(asdict(plan), sort_keys=True).encode())
    return plan


def _spill_key(bucket: int, number: int) -> str:
    return f"{_WORK}{bucket:04d}-{number:06d}.parquet"


def _count(work: Store, keys: Sequence[str], plan: Plan, rows_per_bucket: int) -> int:
    """Count the refused ones; returns how many buckets the rest needs."""
    num_kept = 0
    for key in keys:
        reasons = read_table(work, key, pa.schema([LINKS_SCHEMA.field("reason")]))["reason"]
        plan.num_links += len(reasons)
        for entry in pc.value_counts(reasons).to_pylist():
            if entry["values"] in ("", "opt_out"):  # opt-outs go along: they speak for the same URL on other pages
                num_kept += entry["counts"]
            else:
                plan.refused[entry["values"]] = plan.refused.get(entry["values"], 0) + entry["counts"]
    return max(1, min(_MAX_BUCKETS, -(-num_kept // rows_per_bucket)))


def _spill(work: Store, keys: Sequence[str], num_buckets: int) -> list[int]:
    """Spread the rows over buckets; returns how many files each has. Held in memory: `_SPILL_BYTES` of rows."""
    waiting: list[list[pa.Table]] = [[] for _ in range(num_buckets)]
    counts, held = [0] * num_buckets, 0

    def flush() -> None:
        for bucket, tables in enumerate(waiting):
            if tables:
                work.put(_spill_key(bucket, counts[bucket]), table_to_bytes(pa.concat_tables(tables)))
                counts[bucket] += 1
                tables.clear()

    for key in keys:
        table = read_table(work, key, LINKS_SCHEMA)
        table = table.filter(pc.is_in(table["reason"], value_set=pa.array(["", "opt_out"])))
        for batch in batches_of(table, 2**20):
            held += batch.nbytes
            for bucket, rows in _by_bucket(batch, num_buckets):
                waiting[bucket].append(rows)
            if held > _SPILL_BYTES:
                flush()
                held = 0
    flush()
    return counts


def _by_bucket(table: pa.Table, num_buckets: int) -> Iterator[tuple[int, pa.Table]]:
    bucket_N = _host_hashes(table["url"])[1] % num_buckets
    order_N = np.argsort(bucket_N, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(bucket_N[order_N]) != 0]) if len(order_N) else order_N
    for start, stop in zip(starts, np.r_[starts[1:], len(order_N)], strict=True):
        yield int(bucket_N[order_N[start]]), table.take(pa.array(order_N[start:stop]))


def _host_hashes(urls: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """(host of each URL, dictionary-encoded; a hash of each): Python sees every host once, not every URL."""
    hosts = pc.struct_field(pc.extract_regex(urls, pattern=_HOST_RE2), "host").combine_chunks()
    encoded = pc.fill_null(hosts, "").dictionary_encode()
    hash_H = np.array([zlib.crc32(name.encode()) for name in encoded.dictionary.to_pylist()] or [0], np.int64)
    return encoded, hash_H[encoded.indices.to_numpy()] if len(encoded) else np.empty(0, np.int64)


def host_of(url: str) -> str:
    """The host of a URL in its plain spelling, without a port."""
    match = _HOST.match(url)
    return match["host"] if match else ""


def _plan_bucket(table: pa.Table, plan: Plan, tasks: "_Tasks") -> None:
    """Every URL once, sorted by host, and into the tasks."""
    urls = table.select(["url"]).append_column("row", pa.array(np.arange(table.num_rows)))
    urls = urls.append_column("no", pc.not_equal(table["reason"], ""))
    groups = urls.group_by("url", use_threads=False).aggregate([("row", "min"), ("no", "max"), ("row", "count")])
    is_out = groups["no_max"].to_numpy()
    num_out = int(groups["row_count"].to_numpy()[is_out].sum())
    if num_out:
        plan.refused["opt_out"] = plan.refused.get("opt_out", 0) + num_out
    kept_N = np.sort(groups["row_min"].to_numpy()[~is_out])
    plan.num_urls += len(kept_N)
    plan.num_repeated += table.num_rows - num_out - len(kept_N)
    if not len(kept_N):
        return
    table = table.select(URLS_SCHEMA.names).take(pa.array(kept_N)).combine_chunks()
    encoded, hash_N = _host_hashes(table["url"])
    rank_H = pc.rank(encoded.dictionary, sort_keys="ascending").to_numpy().astype(np.int64)
    host_N = rank_H[encoded.indices.to_numpy()]
    order_N = np.lexsort((host_N, hash_N))  # stable: URLs of a host stay as they were found
    ends = np.flatnonzero(np.r_[np.diff(host_N[order_N]) != 0, True]) + 1
    plan.num_hosts += len(ends)
    tasks.add(table.take(pa.array(order_N)), ends)


class _Tasks:
    """Cuts sorted rows into tasks of whole hosts; a host that is too large gets tasks of its own."""

    def __init__(self, work: Store, urls_per_task: int) -> None:
        self._work, self._limit = work, urls_per_task
        self._open: list[pa.Table] = []
        self._num_open = 0
        self.sizes: list[int] = []

    def add(self, table: pa.Table, ends: NDArray[np.int64]) -> None:
        """Rows sorted by host; ends: where each host ends."""
        start = taken = 0
        for end in ends.tolist():
            if end - start > self._limit:
                self._take(table, taken, start)
                self.close()
                self._split(table.slice(start, end - start))
                taken = end
            elif self._num_open + end - taken > self._limit:
                self._take(table, taken, start)
                self.close()
                taken = start
            start = end
        self._take(table, taken, start)

    def _take(self, table: pa.Table, start: int, stop: int, share: int = 1) -> None:
        if stop > start:
            rows = table.slice(start, stop - start)
            self._open.append(rows.append_column("share", pa.array(np.full(rows.num_rows, share, np.int32))).cast(PLAN_SCHEMA))
            self._num_open += rows.num_rows

    def _split(self, table: pa.Table) -> None:
        """Equal parts; each takes its share of the host's rate, so that together they are one polite visitor."""
        share = -(-table.num_rows // self._limit)
        bounds = np.linspace(0, table.num_rows, share + 1).astype(np.int64).tolist()
        for start, stop in itertools.pairwise(bounds):
            self._take(table, start, stop, share)
            self.close()

    def close(self) -> None:
        """Write the task that is open, if it holds anything."""
        if self._open:
            writer = TableWriter(PLAN_SCHEMA)
            writer.add(pa.concat_tables(self._open).combine_chunks())
            self._work.put(plan_key(len(self.sizes)), writer.finish())
            self.sizes.append(self._num_open)
        self._open, self._num_open = [], 0
