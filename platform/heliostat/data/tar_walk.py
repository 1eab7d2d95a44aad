"""The walk over the 512-byte headers of a tar that strangers wrote: plain, ustar, GNU and pax.

Nothing is extracted and a member's name is only a name. Every length is checked against the bytes that are there before it is
believed, every header against its checksum. Formats: POSIX.1-2017 pax, and the GNU tar manual's "Basic Tar Format".
"""

import struct
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
_HEADER = struct.Struct("100s 24x 12s 12x 8s c 100x 6s 82x 155s 12x")  # name, size, checksum, kind, magic, prefix
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
    """Yield every member in order, END last. Raises TarDamage where the tar is cut off or damaged; what came before stands.

    A plain member costs about 3 microseconds, most of them in C: one unpacking of the header, two sums, one name.
    """
    position, num_members, extended = 0, 0, _Extended()
    num_bytes, view, unpack = tar.num_bytes, tar.view, _HEADER.unpack
    while True:
        if num_bytes - position < BLOCK:
            raise _no_end(position, num_bytes)
        header = bytes(view(position, BLOCK))
        if not header[0] and not any(header):
            if extended.count:
                raise _damaged(position, "the tar ends after an extended header")
            yield Member("", END, position, num_bytes - position)
            return
        raw_name, size, checksum, kind, magic, prefix = unpack(header)
        _check_checksum(header, checksum, position)
        length, body = _number(size, position), position + BLOCK
        if kind in b"xLKgX":
            _check_inside(num_bytes, body, length)
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
        raw_name = raw_name.partition(b"\0")[0]
        if prefix[0] and magic == b"ustar\0":  # POSIX splits long names here; GNU, whose magic differs, keeps times
            raw_name = prefix.partition(b"\0")[0] + b"/" + raw_name
        name = raw_name.decode("utf-8", "replace")
        if extended.count:
            name = extended.name or name
            length = length if extended.size is None else extended.size
        member = Member(name, kind, body, length)
        if kind != PLAIN:
            member = _not_plain(member, tar, header)
            _, _, body, length = member
        if body + length > num_bytes:
            _check_inside(num_bytes, body, length)
        yield member._replace(kind=SPARSE) if extended.is_sparse else member
        position = body + length + -length % BLOCK
        if extended.count:
            extended = _Extended()


def _not_plain(member: Member, tar: Bytes, header: bytes) -> Member:
    """A member whose letter is not PLAIN's, as what it is."""
    kind = member.kind
    if kind == b"\0" and member.name.endswith("/"):  # how tars of the seventies say folder
        kind = b"5"
    if kind in _WITHOUT_BODY:
        return member._replace(kind=kind, length=0)
    if kind == SPARSE:
        return member._replace(offset=_after_sparse_headers(tar, header, member.offset))
    return member._replace(kind=PLAIN if kind in b"\x007" else kind)


def _no_end(position: int, num_bytes: int) -> TarDamage:
    message = f"shard is truncated: no end mark after {num_bytes} bytes; write or download it again"
    return TarDamage("truncated", min(position, num_bytes), message)


def _check_inside(num_bytes: int, body: int, length: int) -> None:
    if body + length > num_bytes:
        raise TarDamage(
            "truncated",
            body - BLOCK,
            f"shard is truncated: the member at byte {body} needs {length} bytes, {num_bytes - body} are there",
        )


def _check_checksum(header: bytes, field: bytes, position: int) -> None:
    """The sum of all bytes, the checksum's own eight counted as spaces; old tars summed signed bytes.

    The low half of adler32 is 1 + the sum modulo 65521: ten times sum()'s speed, and headers with larger sums are summed again.
    """
    stored = _number(field, position)
    total = (zlib.adler32(header[:148]) & 0xFFFF) + (zlib.adler32(header[156:]) & 0xFFFF) + 8 * 32 - 2
    if total != stored:
        rest = header[:148] + header[156:]
        unsigned = sum(rest) + 8 * 32
        if stored not in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest)):
            raise TarDamage(
                "damaged_header",
                position,
                f"shard is damaged or not a tar: the header at byte {position} does not match its checksum",
            )


def _number(field: bytes, position: int) -> int:
    """A header field: octal digits, or GNU's base 256 where the first bit is set."""
    text = field.rstrip(b" \0")
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
