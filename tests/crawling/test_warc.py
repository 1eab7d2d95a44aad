"""WARC files, whole ones and others."""

import gzip
import random

import pytest

from heliostat.crawling.warc import Page, WarcCounts, warc_pages
from heliostat.data.windows import BytesInMemory


def record(kind: str, url: str, content: bytes) -> bytes:
    """One WARC record (ISO 28500), written by hand."""
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
    head += f"WARC-Record-ID: <urn:uuid:1>\r\nContent-Type: application/http\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content + b"\r\n\r\n"


def answer(url: str, status: str, kind: str, body: bytes, more: str = "") -> bytes:
    """A record of an answer."""
    return record(
        "response", url, f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nX-Robots-Tag: noai\r\n{more}\r\n".encode() + body
    )


def warc(num_pages: int, *, packed: bool = True) -> bytes:
    """HTML answers with an image and a 404 between them."""
    records = [record("warcinfo", "", b"software: x\r\n")]
    for number in range(num_pages):
        url = f"http://example.org/{number}"
        records.append(answer(url, "200 OK", "text/html; charset=utf-8", b"<img src=%d.jpg>" % number * 100))
        records.append(answer(url, "200 OK", "image/png", b"\x89PNG"))
        records.append(answer(url, "404 Not Found", "text/html", b"<img src=no.jpg>"))
    return b"".join(gzip.compress(each) if packed else each for each in records)


def pages(data: bytes, max_page_bytes: int = 10**6) -> tuple[list[Page], WarcCounts]:
    counts = WarcCounts()
    return list(warc_pages(BytesInMemory(data), counts, max_page_bytes=max_page_bytes)), counts


@pytest.mark.parametrize("packed", [True, False])
def test_html_answers_are_found_in_order(packed: bool) -> None:
    found, counts = pages(warc(5, packed=packed))
    assert [page.url for page in found] == [f"http://example.org/{number}" for number in range(5)]
    assert found[3].html == b"<img src=3.jpg>" * 100
    assert ("X-Robots-Tag", "noai") in found[0].headers
    assert (counts.num_records, counts.num_pages, counts.damage) == (16, 5, "")


def test_one_gzip_member_for_all_records_is_read_too() -> None:
    found, counts = pages(gzip.compress(warc(5, packed=False)))
    assert (len(found), counts.damage) == (5, "")


@pytest.mark.parametrize("packed", [True, False])
def test_a_truncated_file_gives_the_pages_before_the_end_and_says_so(packed: bool) -> None:
    whole = warc(6, packed=packed)
    for cut in range(len(whole) // 3, len(whole) - 400, len(whole) // 11):
        found, counts = pages(whole[:cut])
        assert 0 < len(found) <= 6
        assert counts.damage, cut


def test_damage_ends_the_reading_with_a_reason_whatever_it_is() -> None:
    generator, whole = random.Random(3), warc(6)
    num_damaged = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(5):
            data[generator.randrange(len(data))] = generator.randrange(256)
        found, counts = pages(bytes(data))
        assert len(found) <= 6
        assert len(found) == 6 or counts.damage
        num_damaged += bool(counts.damage)
    assert num_damaged > 80


def test_what_is_no_warc_at_all_is_damage(capsys: pytest.CaptureFixture[str]) -> None:
    for data in (
        b"<html>no</html>" * 100,
        b"\x1f\x8b" + bytes(100),
        bytes(1000),
        b"WARC/1.0\r\n\r\n",
        b"WARC/1.0\r\nContent-Length: -5\r\n\r\n",
    ):
        assert pages(data)[0] == []
        assert pages(data)[1].damage or data.startswith(b"WARC")
    assert pages(b"") == ([], WarcCounts())
    del capsys


def test_a_large_page_is_cut_and_a_bomb_is_not_unpacked() -> None:
    big = gzip.compress(answer("http://example.org/big", "200 OK", "text/html", bytes(50 * 2**20)))
    found, counts = pages(big + warc(1), max_page_bytes=1000)
    assert [len(page.html) for page in found] == [1000, 1000]
    assert counts.damage == ""


def test_content_encodings_and_pieces_of_the_answer_are_undone() -> None:
    html = b"<img src=a.jpg>" * 10
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (html[:7], html[7:])) + b"0\r\n\r\n"
    data = answer("http://a.org/", "200 OK", "text/html", gzip.compress(html), "Content-Encoding: gzip\r\n")
    data += answer("http://b.org/", "200 OK", "text/html", chunked, "Transfer-Encoding: chunked\r\n")
    assert [page.html for page in pages(data)[0]] == [html, html]
