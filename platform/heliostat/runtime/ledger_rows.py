"""The rows of a ledger: the images of a pool with what the crawl knew of each, and the URLs and files that never became one."""

import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.artifacts import Artifact
from heliostat.crawling.reasons import OK
from heliostat.crawling.tables import LOG_SCHEMA, log_key, read_table
from heliostat.curation.ledger import SCHEMA, StageCount
from heliostat.curation.ledger_write import TableRows
from heliostat.curation.pool import Pool
from heliostat.data.quarantine import QUARANTINE
from heliostat.errors import DataError
from heliostat.storage import Store, read_parquet

CRAWL = "crawl"
"""Where links, plan and fetch log of a crawl lie in its raw artifact."""

_EVIDENCE = ("page", "alt", "licence", "http_status", "robots", "opt_out")
_TASK = re.compile(r"^shards/(\d{6})")


@dataclass(frozen=True)
class PoolRows:
    """The rows of a pool as the ledger reads them (`ledger_write.RowBlocks`). logs: per member, where its fetch log lies."""

    pool: Pool
    logs: tuple[Store | None, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each block, and N."""
        return tuple(self.pool.starts)

    def read(self, block: int) -> pa.Table:
        """One block, without its vectors."""
        for member, log in zip(self.pool.members, self.logs, strict=True):
            if block < len(member.keys):
                rows = member.read_present(block, {*SCHEMA.names, "faces"} - {"reason"})
                return rows if log is None else _with_evidence(rows, log)
            block -= len(member.keys)
        raise IndexError(block)


def _with_evidence(rows: pa.Table, crawl: Store) -> pa.Table:
    """Add what the fetch log tells. A shard's name holds the number of the task that wrote it, and so of its log."""
    shards = rows["shard"].to_pylist()
    tasks = {shard: _task_of(shard) for shard in dict.fromkeys(shards)}
    logs = {task: read_table(crawl, log_key(int(task)), LOG_SCHEMA) for task in sorted(set(tasks.values()))}
    log = pa.concat_tables(logs.values())
    fetched = pa.array([task for task, one in logs.items() for _ in range(one.num_rows)], pa.string())
    asked = pa.array([tasks[shard] for shard in shards], pa.string())
    known = pc.binary_join_element_wise(fetched, log["url"].combine_chunks(), " ")
    place = pc.index_in(pc.binary_join_element_wise(asked, rows["source"].combine_chunks(), " "), value_set=known)
    for name in _EVIDENCE:
        rows = rows.append_column(name, log[name].take(place))
    return rows


def _task_of(shard: str) -> str:
    """The number of the crawl task that wrote a shard, six digits."""
    match = _TASK.match(shard)
    if match is None:
        raise DataError(f"shard {shard} is not named as a crawl names its shards; make the raw artifact again")
    return match[1]


def fetch_log_of(raw: Artifact) -> Store | None:
    """Where the fetch log of a raw artifact lies; None when it was not crawled."""
    return raw.files.child(CRAWL) if any(key.startswith(f"{CRAWL}/fetch_log/") for key in raw.record.files) else None


def rows_outside(raws: tuple[Artifact, ...], pool: Pool) -> tuple[TableRows | None, list[StageCount]]:
    """The URLs and files that have no row in the pool, with the stage `crawl` or `ingest` and the reason, and what those stages
    counted."""
    crawled, ingested = list[pa.Table](), list[pa.Table]()
    for number, raw in enumerate(raws):
        crawl = fetch_log_of(raw)
        if crawl is not None:
            crawled += [
                _failed_urls(crawl, key.removeprefix(f"{CRAWL}/")) for key in sorted(raw.record.files) if "/fetch_log/" in key
            ]
        elif raw.files.size(QUARANTINE) is not None:
            ingested.append(_turned_away(raw, pool, number))
    num_crawled, num_ingested = (sum(table.num_rows for table in tables) for tables in (crawled, ingested))
    counts, num_in = list[StageCount](), num_crawled + num_ingested + pool.num_rows
    if num_crawled:
        counts.append(StageCount("crawl", num_in, num_in - num_crawled))
    if num_ingested:
        counts.append(StageCount("ingest", pool.num_rows + num_ingested, pool.num_rows))
    tables = tuple(table for table in (*crawled, *ingested) if table.num_rows)
    return (TableRows(tables) if tables else None), counts


def _failed_urls(crawl: Store, key: str) -> pa.Table:
    log = read_table(crawl, key, LOG_SCHEMA)
    failed = log.filter(pc.not_equal(log["status"], OK))
    columns: dict[str, Any] = {name: failed[name] for name in _EVIDENCE}
    return pa.table({"source": failed["url"], **_judged("crawl", failed["status"]), "length": failed["bytes"], **columns})


def _turned_away(raw: Artifact, pool: Pool, number: int) -> pa.Table:
    """Rows of the quarantine that are not images of the manifest too (those are packed, and fail to decode)."""
    table = read_parquet(raw.files, QUARANTINE)
    packed = _unreadable_places(pool, number)
    keys = list(zip(table["shard"].to_pylist(), table["offset"].to_pylist(), strict=True))
    outside = table.filter(pa.array([key not in packed for key in keys], pa.bool_()))
    return pa.table(
        {
            "source": outside["source"],
            **_judged("ingest", outside["reason"]),
            "detail": outside["detail"],
            "shard": outside["shard"],
            "offset": outside["offset"],
            "length": outside["length"],
        }
    )


def _unreadable_places(pool: Pool, number: int) -> set[tuple[str, int]]:
    """(shard, offset) of the packed images whose header cannot be read."""
    member, places = pool.members[number], set[tuple[str, int]]()
    for block in range(len(member.keys)):
        rows = member.read(block, ["shard", "offset", "width"])
        rows = rows.filter(pc.equal(rows["width"], 0))
        places.update(zip(rows["shard"].to_pylist(), rows["offset"].to_pylist(), strict=True))
    return places


def _judged(stage: str, reason: pa.ChunkedArray) -> dict[str, Any]:
    return {"stage": pa.array([stage] * len(reason), pa.string()), "reason": reason}
