"""WARC files, folders of HTML and lists of URLs come in; robots.txt and Retry-After are read; reasons are documented."""

import asyncio
import gzip
import itertools
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_web import crawl_config

from heliostat.crawling.config import CrawlConfig, PolitenessConfig
from heliostat.crawling.extract import ExtractLinks, plan_inputs
from heliostat.crawling.politeness import Host, HostClosed, retry_after_seconds
from heliostat.crawling.reasons import OK, REASONS, may_pass
from heliostat.crawling.robots import RobotsAnswer, read_rules
from heliostat.crawling.tables import LINKS_SCHEMA, links_key, read_table
from heliostat.crawling.url_lists import read_url_list
from heliostat.errors import DataError
from heliostat.storage import LocalStore

URL = "http://example.org/{}.jpg"
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "crawling.md"


def rows(folder: Path, name: str, content: bytes | str) -> list[tuple[Any, ...]]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [tuple(row.values()) for table in read_url_list(LocalStore(folder), name) for row in table.to_pylist()]


def test_lists_of_every_kind_are_read(tmp_path: Path) -> None:
    assert rows(tmp_path, "a.txt", "\ufeff# list\nhttp://a.org/1\r\n\n http://a.org/2 \n") == [
        ("http://a.org/1", "", "", None),
        ("http://a.org/2", "", "", None),
    ]
    quoted = 'caption,url,page\n"a, b\n""c""",http://a.org/1,http://p.org\n,http://a.org/2,\n'
    assert rows(tmp_path, "a.csv", quoted) == [
        ("http://a.org/1", "http://p.org", 'a, b\n"c"', None),
        ("http://a.org/2", "", "", None),
    ]
    assert rows(tmp_path, "a.tsv", "URL\tTEXT\nhttp://a.org/1\tx\n") == [("http://a.org/1", "", "x", None)]
    lines = [{"url": "http://a.org/1", "license": "l", "alt": None}, {"image_url": "http://a.org/2", "text": "\ud800"}]
    assert rows(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines))) == [
        ("http://a.org/1", "", "", "l"),
        ("http://a.org/2", "", "?", None),
    ]
    pq.write_table(
        pa.table({"url": ["http://a.org/1", None], "alt": pa.array(["x", None], pa.large_string())}), tmp_path / "a.parquet"
    )
    assert rows(tmp_path, "a.parquet", (tmp_path / "a.parquet").read_bytes()) == [
        ("http://a.org/1", "", "x", None),
        ("", "", "", None),
    ]
    assert rows(tmp_path, "b.txt", "") == rows(tmp_path, "b.csv", "") == rows(tmp_path, "b.jsonl", "") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,size\na,1\n", "no column of URLs"),
        ("a.jsonl", '{"name": 1}\n', "line 1 .* no URL"),
        ("a.jsonl", "[1]\n", "line 1 .* is a list"),
        ("a.jsonl", "{no\n", "line 1 .* not JSON"),
        ("a.txt", b"\xff\xfe\n", "cannot be read"),
        ("a.txt", "x" * (2**20 + 1), "more than 1048576 bytes"),
        ("a.parquet", b"PAR1 no", "not readable Parquet"),
        ("a.xls", "x", "not a list of URLs"),
    ],
)
def test_a_list_that_is_none_is_an_error_that_names_it(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows(tmp_path, name, content)


def extract(folder: Path, **inputs: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(accounts, rows of all tasks)."""
    config, work = crawl_config(None, **inputs), LocalStore(folder / "work")
    accounts = [dict(ExtractLinks(work, config)(json.loads(json.dumps(task)))) for task in plan_inputs(config)]
    tables = [read_table(work, links_key(index), LINKS_SCHEMA).to_pylist() for index in range(len(accounts))]
    return accounts, [row for table in tables for row in table]


def warc_record(number: int) -> bytes:
    http = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<img src=%d.jpg><img src=x.svg><img src='http://10.0.0.1/a'>"
        % number
    )
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.org/d/{number}\r\n"
    head += "WARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:1>\r\nContent-Type: application/http\r\n"
    head += f"Content-Length: {len(http)}\r\n\r\n"
    return gzip.compress(head.encode() + http + b"\r\n\r\n")


def test_a_folder_of_warcs_gives_links_and_names_the_damaged_file(tmp_path: Path) -> None:
    folder = tmp_path / "warcs" / "deep"
    folder.mkdir(parents=True)
    whole = b"".join(map(warc_record, range(10)))
    (folder / "a.warc.gz").write_bytes(whole)
    (folder / "b.warc.gz").write_bytes(whole[: len(whole) // 2 + 30])
    (folder / "readme.txt").write_text("no")
    accounts, found = extract(tmp_path, warcs=(str(tmp_path / "warcs"),))
    assert [account["pages"] for account in accounts] == [10, 5]
    assert accounts[0]["damage"] == []
    assert "b.warc.gz" in accounts[1]["damage"][0]
    assert accounts[0]["refused"] == {"blocked_suffix": 10, "forbidden_address": 10}
    kept = [(row["url"], row["page"]) for row in found if not row["reason"]]
    assert kept[:10] == [(f"http://example.org/d/{number}.jpg", f"http://example.org/d/{number}") for number in range(10)]
    assert len(found) == sum(account["links"] for account in accounts) == 45


def test_a_mirror_of_html_files_and_a_list_of_images_come_in_together(tmp_path: Path) -> None:
    (tmp_path / "mirror" / "example.org" / "d e").mkdir(parents=True)
    (tmp_path / "mirror" / "example.org" / "d e" / "a.html").write_text("<img src=../b.jpg alt=x>")
    (tmp_path / "mirror" / "example.org" / "empty.htm").write_text("")
    (tmp_path / "list.csv").write_text("url\nhttp://example.org/1.jpg\nhttp://127.0.0.1/\n")
    accounts, found = extract(tmp_path, pages=(str(tmp_path / "mirror"),), urls=(str(tmp_path / "list.csv"),))
    assert [(row["url"], row["page"], row["reason"]) for row in found] == [
        ("https://example.org/b.jpg", "https://example.org/d%20e/a.html", ""),
        ("http://example.org/1.jpg", "", ""),
        ("http://127.0.0.1/", "", "forbidden_address"),
    ]
    assert accounts[0]["pages"] == 2


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(warc_record, range(5))))
    found = []
    for run in ("1", "2"):
        extract(tmp_path / run, warcs=(str(tmp_path / "a.warc.gz"),))
        found.append(LocalStore(tmp_path / run / "work").read(links_key(0)))
    assert found[0] == found[1]


def test_an_input_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for inputs in ({"warcs": (str(tmp_path / "a.warc"),)}, {"pages": (str(tmp_path),)}, {"urls": (str(tmp_path / "no.csv"),)}):
        with pytest.raises(DataError):
            plan_inputs(crawl_config(None, **inputs))


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b"User-agent: *\nDisallow: /a", "disallowed"),
        (200, b"", "allowed"),
        (404, b"", "none"),
        (401, b"User-agent: *\nDisallow: /a", "none"),
        (500, b"", "unreachable"),
        (429, b"", "unreachable"),
        (304, b"", "unreachable"),
        (None, b"", "unreachable"),
        (200, b"User-agent: *\nDisallow: /\nAllow: /a.jpg$\n", "allowed"),
        (200, b"User-agent: other\nDisallow: /\n", "allowed"),
        (200, b"Disallow: /\n", "allowed"),
        (200, b"user-agent: HELIOSTATBOT\ndisallow: /%61.jpg\n", "disallowed"),
        (200, b"User-agent: *\nAllow: /\nUser-agent: HeliostatBot\nDisallow: /\n", "disallowed"),
        (200, b"\x00\xff" * 1000, "allowed"),
        (200, b"User-agent: *\nDisallow: /" + b"*a" * 50_000 + b"b$\n", "allowed"),
    ],
)
def test_rules_follow_rfc_9309(status: int | None, body: bytes, expected: str) -> None:
    assert read_rules(RobotsAnswer(status, body)).verdict("http://example.org/a.jpg", "HeliostatBot") == expected


def test_a_crawl_delay_is_bounded() -> None:
    assert read_rules(RobotsAnswer(200, b"User-agent: *\nCrawl-delay: 7\n")).delay_seconds("HeliostatBot") == 7
    assert read_rules(RobotsAnswer(200, b"User-agent: *\nCrawl-delay: 1e300\n")).delay_seconds("HeliostatBot") == 3600
    assert read_rules(RobotsAnswer(404)).delay_seconds("HeliostatBot") == 0


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_seconds("120") == 120
    assert 50 < retry_after_seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)) <= 60
    for nothing in (
        "",
        "soon",
        "-5",
        "1.5",
        format_datetime(datetime(2001, 1, 1, tzinfo=UTC)),
        "9" * 60 + "x",
        "Mon, 99 Foo 2026",
    ):
        assert retry_after_seconds(nothing) == 0, nothing
    assert retry_after_seconds("9" * 64) == 10**9


def test_every_reason_is_in_the_guide_and_only_what_may_pass_is_tried_again() -> None:
    text = GUIDE.read_text()
    for name, reason in REASONS.items():
        assert f"| `{name}` | {reason.meaning} | {'yes' if reason.may_pass else 'no'} |" in text, name
    passing = {
        "dns",
        "timeout",
        "server_error",
        "busy",
        "reset",
        "straggler",
        "connect",
        "truncated",
        "host_down",
        "robots_unreachable",
    }
    assert {name for name in REASONS if may_pass(name)} == passing
    assert not may_pass(OK)


def test_every_field_of_the_config_is_documented() -> None:
    def fields(model: Any) -> list[Any]:
        own = list(model.model_fields.values())
        return own + [
            field for one in own for field in (fields(one.annotation) if hasattr(one.annotation, "model_fields") else [])
        ]

    assert len(fields(CrawlConfig)) > 35
    assert all(field.description for field in fields(CrawlConfig))


def turns_of(host: Host, count: int) -> list[float]:
    """When each of `count` visitors that come together has its turn, in seconds."""

    async def run() -> list[float]:
        started, found = time.monotonic(), list[float]()

        async def visit() -> None:
            async with host.turn():
                found.append(time.monotonic() - started)

        await asyncio.gather(*(visit() for _ in range(count)))
        return found

    return asyncio.run(run())


def test_turns_are_an_interval_apart_and_a_share_takes_its_part_of_the_rate() -> None:
    config = PolitenessConfig(requests_per_second=50.0, connections_per_host=4)
    for host, interval_seconds in ((Host(config), 0.02), (Host(config, share=3), 0.06)):
        times = turns_of(host, 5)
        assert min(after - before for before, after in itertools.pairwise(times)) > interval_seconds - 0.002, times
    slow = Host(config)
    slow.slow_down(0.1)
    assert turns_of(slow, 3)[-1] > 0.19


def test_a_host_pauses_as_long_as_it_asks_and_is_closed_when_that_is_too_long() -> None:
    config = PolitenessConfig(requests_per_second=1000.0, longest_wait_seconds=1.0)
    host = Host(config)
    host.pause(0.2)
    assert turns_of(host, 3)[0] > 0.19
    host.pause(2.0)
    with pytest.raises(HostClosed, match="busy"):
        turns_of(host, 1)
    failing = Host(config)
    for reason in ("timeout", "not_found", *["timeout"] * 10):
        failing.note(reason)
    with pytest.raises(HostClosed, match="host_down"):
        turns_of(failing, 1)
