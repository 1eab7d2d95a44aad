"""The rows of a ledger: what the crawl knew beside each image, and what never became one, each of them once."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_features import DIMENSION, made_features

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore
from heliostat.crawling.tables import LOG_SCHEMA, log_key, table_to_bytes, text_table
from heliostat.curation.ledger import Decisions, named_reasons
from heliostat.curation.ledger_facts import LedgerFacts
from heliostat.curation.ledger_read import open_ledger
from heliostat.curation.ledger_write import write_ledger
from heliostat.curation.pool import FeatureFiles, Pool, read_columns
from heliostat.data.quarantine import QUARANTINE, Rejection, quarantine_to_bytes
from heliostat.errors import DataError
from heliostat.runtime.ledger_rows import PoolRows, fetch_log_of, rows_outside
from heliostat.storage import LocalStore

EVIDENCE = ("page", "alt", "licence", "http_status", "robots", "opt_out")


def log_row(url: str, status: str, number: int) -> dict[str, Any]:
    """One row of a fetch log, told apart by its number."""
    plain = {field.name: 0 if pa.types.is_integer(field.type) else "" for field in LOG_SCHEMA}
    told = {"page": f"https://p.example/{number}", "alt": f"alt {number}", "http_status": 200 + number, "robots": "allowed"}
    licence = f"CC-{number}" if number % 2 else None
    return plain | {"url": url, "status": status, "bytes": 10 * number, "licence": licence} | told


def features_at(store: LocalStore, places: list[dict[str, Any]], **options: Any) -> FeatureFiles:
    """Features with these columns instead of the made ones, four rows a file."""
    vectors = np.random.default_rng(0).standard_normal((len(places), DIMENSION))
    made = made_features(store, vectors, rows_per_file=4, **options)
    for block, key in enumerate(made.keys):
        table = pq.read_table(io.BytesIO(store.read(key)))
        for name in places[0]:
            index = table.column_names.index(name)
            values = [place[name] for place in places[made.info.starts[block] : made.info.starts[block + 1]]]
            table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        store.put(key, sink.getvalue())
    return made


def artifact(store: LocalStore, name: str, files: dict[str, bytes]) -> Artifact:
    draft = ArtifactStore(store).begin(ArtifactRef("raw", name, "1"), config={}, inputs={}, notify=print)
    for key, data in files.items():
        draft.put(key, data)
    return draft.commit(counts={})


def crawled(store: LocalStore, logs: list[list[dict[str, Any]]]) -> Artifact:
    """A raw artifact of a crawl of so many tasks."""
    files = {}
    for index, rows in enumerate(logs):
        values = [[row[name] for name in LOG_SCHEMA.names] for row in rows]
        files[f"crawl/{log_key(index)}"] = table_to_bytes(text_table(values, LOG_SCHEMA))
    return artifact(store, "web", files)


LOGS = [
    [log_row("https://a.example/1.png", "ok", 1), log_row("https://a.example/2.png", "not_found", 2)],
    [log_row("https://b.example/1.png", "ok", 3), log_row("https://a.example/1.png", "ok", 4)],
    [log_row("https://b.example/9.png", "dns", 5)],
    [log_row("https://c.example/1.png", "ok", 6), log_row("https://c.example/2.png", "robots", 7)],
]
# (task, url) of the images, in the order of the manifest; one URL stands in the logs of two tasks.
IMAGES = [(0, "https://a.example/1.png"), (1, "https://b.example/1.png"), (1, "https://a.example/1.png")]
IMAGES += [(3, "https://c.example/1.png")] * 3


def web(tmp_path: Path) -> tuple[Artifact, FeatureFiles]:
    places = [{"source": url, "shard": f"shards/{task:06d}-{number % 2:04d}.tar"} for number, (task, url) in enumerate(IMAGES)]
    return crawled(LocalStore(tmp_path / "web"), LOGS), features_at(LocalStore(tmp_path / "f"), places)


def test_an_image_gets_the_evidence_of_its_own_fetch_and_not_of_the_same_url_elsewhere(tmp_path: Path) -> None:
    raw, features = web(tmp_path)
    rows = PoolRows(Pool((features,)), (fetch_log_of(raw),))
    assert rows.starts == (0, 4, 6)
    found = [row for block in range(2) for row in rows.read(block).to_pylist()]
    for row, (task, url) in zip(found, IMAGES, strict=True):
        (expected,) = [entry for entry in LOGS[task] if entry["url"] == url]
        assert {name: row[name] for name in EVIDENCE} == {name: expected[name] for name in EVIDENCE}
    assert not {"reason", "copy", "pca_coarse"} & set(rows.read(0).column_names)
    with pytest.raises(IndexError):
        rows.read(2)


def test_a_shard_that_no_crawl_has_named_is_refused(tmp_path: Path) -> None:
    raw, _ = web(tmp_path)
    features = features_at(LocalStore(tmp_path / "g"), [{"source": "x", "shard": "/elsewhere/photos.tar"}])
    with pytest.raises(
        DataError, match=r"^shard /elsewhere/photos\.tar is not named as a crawl names its shards; make the raw"
    ):
        PoolRows(Pool((features,)), (fetch_log_of(raw),)).read(0)


def test_images_that_were_not_crawled_have_no_evidence_and_blocks_are_counted_over_all_members(tmp_path: Path) -> None:
    raw, features = web(tmp_path)
    plain = artifact(LocalStore(tmp_path / "plain"), "own", {"manifest.parquet": b"x"})
    own = made_features(LocalStore(tmp_path / "own"), np.eye(DIMENSION)[:5], rows_per_file=3)
    assert fetch_log_of(plain) is None
    rows = PoolRows(Pool((own, features)), (fetch_log_of(plain), fetch_log_of(raw)))
    assert rows.starts == (0, 3, 5, 9, 11)
    assert "page" not in rows.read(1).column_names
    assert rows.read(2)["page"].to_pylist()[0] == "https://p.example/1"


def folder(tmp_path: Path) -> tuple[Artifact, FeatureFiles]:
    """Six packed images, the third and the sixth of which have no readable header, and two files that were not packed."""
    places = [
        {
            "source": f"{row}.png",
            "shard": f"shards/{row // 4:06d}.tar",
            "offset": 512 + 1000 * row,
            "width": 0 if row in (2, 5) else 9,
        }
        for row in range(6)
    ]
    rejected = [
        Rejection("2.png", "shards/000000.tar", 2512, 900, "ab", "no_image", "no header"),
        Rejection("5.png", "shards/000001.tar", 5512, 900, "cd", "no_image", "no header"),
        Rejection("empty.png", "", 0, 0, "", "empty", "0 bytes"),
        Rejection("huge.png", "", 0, 10**9, "", "too_large", "1 GB"),
        # A member of a tar of others that lies where another shard has an image of ours.
        Rejection("bad member", "shards/000001.tar", 2512, 5, "", "bad_member", ""),
    ]
    raw = artifact(LocalStore(tmp_path / "raw"), "own", {QUARANTINE: quarantine_to_bytes(rejected)})
    return raw, features_at(LocalStore(tmp_path / "own"), places, undecodable=[2, 5], name="features/own@1")


def test_what_is_packed_and_unreadable_is_told_once_as_an_image(tmp_path: Path) -> None:
    raw, features = folder(tmp_path)
    outside, counts = rows_outside((raw,), Pool((features,)))
    (table,) = outside.tables
    assert sorted(zip(table["source"].to_pylist(), table["reason"].to_pylist(), strict=True)) == [
        ("bad member", "bad_member"),
        ("empty.png", "empty"),
        ("huge.png", "too_large"),
    ]
    assert set(table["stage"].to_pylist()) == {"ingest"}
    assert [tuple(count) for count in counts] == [("ingest", 9, 6)]


def test_the_failed_urls_of_a_crawl_keep_their_status_and_their_evidence(tmp_path: Path) -> None:
    raw, features = web(tmp_path)
    outside, counts = rows_outside((raw,), Pool((features,)))
    found = {row["source"]: row for table in outside.tables for row in table.to_pylist()}
    failed = {row["url"]: row for log in LOGS for row in log if row["status"] != "ok"}
    assert set(found) == set(failed)
    for url, row in found.items():
        assert (row["stage"], row["reason"], row["length"]) == ("crawl", failed[url]["status"], failed[url]["bytes"])
        assert {name: row[name] for name in EVIDENCE} == {name: failed[url][name] for name in EVIDENCE}
    assert [tuple(count) for count in counts] == [("crawl", 9, 6)]


def test_a_ledger_over_a_crawl_and_a_folder_adds_up_from_the_first_url_to_the_last_image(tmp_path: Path) -> None:
    (web_raw, web_features), (own_raw, own_features) = web(tmp_path), folder(tmp_path)
    pool, raws = Pool((web_features, own_features)), (web_raw, own_raw)
    outside, before = rows_outside(raws, pool)
    assert [tuple(count) for count in before] == [("crawl", 18, 15), ("ingest", 15, 12)]
    columns, decisions = read_columns(pool), Decisions.of(12)
    reasons = pa.array([reason for _, table in pool.blocks(["reason"]) for reason in table["reason"].to_pylist()])
    decisions.judge(named_reasons("decode", decisions.rows, reasons))
    files = LocalStore(tmp_path / "ledger")
    rows = PoolRows(pool, tuple(fetch_log_of(raw) for raw in raws))
    funnel = write_ledger(files, rows, LedgerFacts(columns.ids), decisions, outside=outside, before=before, rows_per_file=5)
    assert [(step.stage, step.rows_in, step.rows_kept, dict(step.dropped_by_reason)) for step in funnel] == [
        ("crawl", 18, 15, {"not_found": 1, "dns": 1, "robots": 1}),
        ("ingest", 15, 12, {"empty": 1, "too_large": 1, "bad_member": 1}),
        ("decode", 12, 10, {"truncated": 2}),
    ]
    ledger = open_ledger(files)
    assert ledger.num_rows == 18
    assert ledger.funnel() == funnel
    assert ledger.find("https://b.example/9.png")["reason"].to_pylist() == ["dns"]
    assert ledger.find("https://c.example/1.png")["page"].to_pylist() == ["https://p.example/6"] * 3
    assert ledger.find("2.png")["stage"].to_pylist() == ["decode"]


def test_where_nothing_was_lost_nothing_is_added(tmp_path: Path) -> None:
    features = made_features(LocalStore(tmp_path / "f"), np.eye(DIMENSION)[:3])
    raw = artifact(LocalStore(tmp_path / "raw"), "own", {QUARANTINE: quarantine_to_bytes([])})
    assert rows_outside((raw,), Pool((features,))) == (None, [])
    ingested_before_quarantines = artifact(LocalStore(tmp_path / "old"), "old", {"manifest.parquet": b"x"})
    assert rows_outside((ingested_before_quarantines,), Pool((features,))) == (None, [])
