"""The HTML pages of a WARC file, compressed or not, whole or not.

Records are warcio's work. Decompression is ours: warcio takes a broken member for the end of the file.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from warcio.archiveiterator import ArchiveIterator  # type: ignore[import-untyped]
from warcio.exceptions import ArchiveLoadFailed  # type: ignore[import-untyped]

from heliostat.data.windows import Bytes, BytesFile

_HTML_TYPES = ("text/html", "application/xhtml+xml")
_GZIP_MAGIC = b"\x1f\x8b"
_END_OF_RECORD = b"\r\n\r\n"  # ISO 28500, 4: two line ends after every record
_MAX_CHARACTERS = 4096
_PIECE_BYTES = 2**16


@dataclass(frozen=True)
class Page:
    """One page as a server gave it. url: as recorded; html: cut at the limit; headers: of the answer, (name, value)."""

    url: str
    html: bytes
    content_type: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass
class WarcCounts:
    """What a file held. damage: why reading ended before the end of the file, "" when it did not."""

    num_records: int = 0
    num_pages: int = 0
    damage: str = ""


def warc_pages(source: Bytes, counts: WarcCounts, *, max_page_bytes: int) -> Iterator[Page]:
    """Yield the HTML answers of status 200, in order. What follows damage is lost, and `counts.damage` says why.

    Memory: a window of the file and one page; a page above the limit is cut there.
    """
    file = BytesFile(source)
    is_packed = source.num_bytes >= 2 and bytes(source.view(0, 2)) == _GZIP_MAGIC
    stream = _Tail(_Gunzip(file) if is_packed else file)
    records, record = ArchiveIterator(stream), None
    while True:
        try:
            following: Any = next(records, None)
            if record is not None and record.raw_stream.limit > 0:
                counts.damage = f"record {counts.num_records} ends {record.raw_stream.limit} bytes too early"
                return
            record = following
            if record is None:
                counts.damage = "" if stream.tail in (b"", _END_OF_RECORD) else "the last record ends too early"
                return
            counts.num_records += 1
            page = _page(record, max_page_bytes)
        except (ArchiveLoadFailed, zlib.error, EOFError, ValueError, IndexError, AttributeError, OSError) as error:
            counts.damage = " ".join(f"{type(error).__name__}: {error}".split())[:200]  # warcio raises these on broken records
            return
        if page is not None:
            counts.num_pages += 1
            yield page


class _Tail:
    """A stream that remembers its last four bytes: warcio takes half a header for the end of the file."""

    def __init__(self, stream: "_Gunzip | BytesFile") -> None:
        self._stream = stream
        self.tail = b""

    def tell(self) -> int:
        """Bytes given so far."""
        return self._stream.tell()

    def read(self, num_bytes: int) -> bytes:
        """At most so many bytes, none at the end."""
        data = self._stream.read(num_bytes)
        self.tail = (self.tail + data[-4:])[-4:]
        return data


class _Gunzip:
    """The content of all gzip members, as warcio reads it: a bounded piece at a time, what is good before what is damaged."""

    def __init__(self, packed: BytesFile) -> None:
        self._packed = packed
        self._member: Any = None
        self._waiting = b""
        self._position = 0

    def tell(self) -> int:
        """Bytes given so far."""
        return self._position

    def read(self, num_bytes: int) -> bytes:
        """1 to `num_bytes` bytes, none at the end. ValueError where the file is damaged or ends too early."""
        while True:
            if not self._waiting:
                self._waiting = self._packed.read(_PIECE_BYTES)
                if not self._waiting:
                    if self._member is not None:
                        raise ValueError("the gzip member ends too early")
                    return b""
            if self._member is None:
                self._member = zlib.decompressobj(31)
            try:
                data = bytes(self._member.decompress(self._waiting, num_bytes))
            except zlib.error as error:
                raise ValueError(f"the gzip member is damaged: {error}") from error
            self._waiting = self._member.unconsumed_tail
            if self._member.eof:
                self._waiting, self._member = self._member.unused_data, None
            if data:
                self._position += len(data)
                return data


def _page(record: Any, max_page_bytes: int) -> Page | None:
    headers = record.http_headers
    if record.rec_type != "response" or headers is None or headers.get_statuscode() != "200":
        return None
    content_type = str(headers.get_header("Content-Type") or "")[:_MAX_CHARACTERS]
    if content_type.partition(";")[0].strip().lower() not in _HTML_TYPES:
        return None
    url = str(record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>")
    stream, pieces, left = record.content_stream(), list[bytes](), max_page_bytes
    while left > 0 and (piece := stream.read(min(left, _PIECE_BYTES))):
        pieces.append(piece)
        left -= len(piece)
    kept = tuple((str(name)[:_MAX_CHARACTERS], str(value)[:_MAX_CHARACTERS]) for name, value in headers.headers)
    return Page(url, b"".join(pieces)[:max_page_bytes], content_type, kept)
