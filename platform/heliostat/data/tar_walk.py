"""The walk over the 512-byte headers of a tar that strangers wrote: plain, ustar, GNU and pax.

Nothing is extracted and a member's name is only a name. Every length is checked against the bytes that are there before it is
believed, every header against its checksum. Formats: POSIX.1-2017 pax, and the GNU tar manual's "Basic Tar Format".
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from heliostat.data.windows import Bytes
from heliostat.errors import DataError

BLOCK = 512
MAX_MEMBERS = 2**22  # 4 million members hold every shard in use; a hostile tar of empty members would run for ever
MAX_EXTENDED_BYTES = 2**20  # of a pax header or a long name; real ones have hundreds of bytes
_MAX_EXTENDED_IN_A_ROW = 8  # headers about one member: GNU writes two, pax one
_MAX_MEMBER_BYTES = 2**43  # 8 TiB; no object store keeps a larger object
_MAX_SPARSE_HEADERS = 1024
_WITHOUT_BODY = b"123456"  # links, devices, folders, pipes: the size field means nothing

PLAIN, SPARSE, DAMAGED, END = b"0", b"S", b"!", b"."


class Member(NamedTuple):
    """One member. kind: PLAIN, SPARSE, the tar's own letter, or one of two that are no members:

    DAMAGED (a pax header or long name that cannot be read) and END (the end mark and all that follows it).
    """

    name: str
    kind: bytes
    offset: int
    length: int


class TarDamage(DataError):  # noqa: N818  callers decide whether it is a fault
    """From `position` on the tar cannot be read. reason: truncated, damaged_header or too_many_members."""

    def __init__(self, reason: str, position: int, message: str) -> None:
        super().__init__(message)
        self.reason, self.position = reason, position

    def __reduce__(self) -> tuple[type["TarDamage"], tuple[str, int, str]]:
        """Survive the way between processes."""
        return type(self), (self.reason, self.position, str(self))


def _damaged(position: int, what: str) -> TarDamage:
    return TarDamage("damaged_header", position, f"shard is damaged: {what} at byte {position}")


@dataclass
class _Extended:
    """What the headers before a member say about it."""

    name: str = ""
    size: int | None = None
    is_sparse: bool = False
    count: int = 0


def walk(tar: Bytes) -> Iterator[Member]:
    """Yield every member in order, END last. Raises TarDamage where the tar is cut off or damaged; what came before stands."""
    position, num_members, extended = 0, 0, _Extended()
    while True:
        header = _header(tar, position)
        if not header[0] and not any(header):
            if extended.count:
                raise _damaged(position, "the tar ends after an extended header")
            yield Member("", END, position, tar.num_bytes - position)
            return
        _check_checksum(header, position)
        kind, body = header[156:157], position + BLOCK
        length = _number(header[124:136], position)
        if kind in b"xLKgX":
            _check_inside(tar, body, length)
            extended.count += 1
            if extended.count > _MAX_EXTENDED_IN_A_ROW:
                raise _damaged(position, f"more than {_MAX_EXTENDED_IN_A_ROW} extended headers in a row")
            if not _extend(extended, kind, tar, body, length):
                yield Member("", DAMAGED, body, length)
            position = body + length + -length % BLOCK
            continue
        num_members += 1
        if num_members > MAX_MEMBERS:
            raise TarDamage("too_many_members", position, f"shard has more than {MAX_MEMBERS} members; split it")
        name = extended.name or _name(header)
        if extended.size is not None:
            length = extended.size
        if kind == b"\0" and name.endswith("/"):  # how tars of the seventies say folder
            kind = b"5"
        if kind in _WITHOUT_BODY:
            length = 0
        elif kind == SPARSE:
            body = _after_sparse_headers(tar, header, body)
        elif kind in b"\x007":
            kind = PLAIN
        _check_inside(tar, body, length)
        yield Member(name, SPARSE if extended.is_sparse else kind, body, length)
        position = body + length + -length % BLOCK
        if extended.count:
            extended = _Extended()


def _header(tar: Bytes, position: int) -> bytes:
    left = tar.num_bytes - position
    if left < BLOCK:
        raise TarDamage(
            "truncated",
            min(position, tar.num_bytes),
            f"shard is truncated: no end mark after {tar.num_bytes} bytes; write or download it again",
        )
    return bytes(tar.view(position, BLOCK))


def _check_inside(tar: Bytes, body: int, length: int) -> None:
    if body + length > tar.num_bytes:
        raise TarDamage(
            "truncated",
            body - BLOCK,
            f"shard is truncated: the member at byte {body} needs {length} bytes, {tar.num_bytes - body} are there",
        )


def _check_checksum(header: bytes, position: int) -> None:
    """The sum of all bytes, the checksum's own eight counted as spaces; old tars summed signed bytes.

    adler32's low half is 1 + the sum modulo 65521, and 256 bytes sum to at most 65280: exact, and ten times sum()'s speed.
    """
    own = header[148:156]
    stored = _number(own, position)
    total = (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2
    if total - sum(own) + 256 != stored:
        rest = header[:148] + header[156:]
        if sum(rest) - 256 * sum(byte > 127 for byte in rest) + 256 != stored:
            raise TarDamage(
                "damaged_header",
                position,
                f"shard is damaged or not a tar: the header at byte {position} does not match its checksum",
            )


def _number(field: bytes, position: int) -> int:
    """A header field: octal digits, or GNU's base 256 where the first bit is set."""
    text = field[:-1]
    if text.isdigit():
        try:
            return int(text, 8)
        except ValueError:
            pass  # an 8 or a 9: refused below with what it is
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
        if number > _MAX_MEMBER_BYTES:
            raise _damaged(position, f"a size above the limit of {_MAX_MEMBER_BYTES} bytes")
        return number
    text = field.strip(b" \0")
    if not all(48 <= digit <= 55 for digit in text):
        raise _damaged(position, f"{field[:12]!r} where octal digits belong: not a tar, or a damaged header")
    return int(text or b"0", 8)


def _name(header: bytes) -> str:
    """The name, with the prefix that POSIX ustar splits off long ones (GNU keeps times there)."""
    name = header[: header.find(0, 0, 100)] if 0 in header[:100] else header[:100]
    if header[345] and header[257:263] == b"ustar\0":
        prefix = header[345:500]
        name = prefix.partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "replace")


def _after_sparse_headers(tar: Bytes, header: bytes, body: int) -> int:
    """Where the data of a GNU sparse member begins: maps of more than four holes go on in blocks of their own."""
    more, number = header[482], 0
    while more:
        number += 1
        if number > _MAX_SPARSE_HEADERS or body + BLOCK > tar.num_bytes:
            raise _damaged(body, "a sparse member with an endless map")
        more = tar.view(body, BLOCK)[504]
        body += BLOCK
    return body


def _extend(extended: _Extended, kind: bytes, tar: Bytes, body: int, length: int) -> bool:
    """Take up an extended header; False when it cannot be read. Global headers and names of link targets say nothing here."""
    if length > MAX_EXTENDED_BYTES:
        return False
    if kind == b"L":
        extended.name = bytes(tar.view(body, length)).partition(b"\0")[0].decode("utf-8", "replace")
        return bool(extended.name)
    if kind not in b"xX":
        return True
    records = _pax_records(bytes(tar.view(body, length)))
    if records is None:
        return False
    extended.is_sparse |= any(key.startswith(b"GNU.sparse.") for key in records)
    if path := records.get(b"path"):
        extended.name = path.decode("utf-8", "replace")
    if size := records.get(b"size"):
        if not size.isdigit() or len(size) > 13:
            return False
        extended.size = int(size)
    return True


def _pax_records(body: bytes) -> dict[bytes, bytes] | None:
    """`length key=value` lines, where the length counts the whole line; None when they are not that."""
    records, position = dict[bytes, bytes](), 0
    while position < len(body) and body[position]:
        space = body.find(b" ", position, position + 9)
        digits = body[position:space]
        if space < 0 or not digits.isdigit():
            return None
        end = position + int(digits)
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if end > len(body) or end <= space or body[end - 1 : end] != b"\n" or not equals:
            return None
        records[key] = value
        position = end
    return records
