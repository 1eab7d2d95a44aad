"""Shards: many images in one tar, the WebDataset way, and the manifest that says where each one lies.

A shard holds, per image, `<9-digit index>.<extension>` with the original bytes and `<index>.json` with id, source, label and
metadata. It is written deterministically (the same images give the same bytes) and read by our own walk over the 512-byte
headers: nothing is ever extracted, a member's name is only a name, links and devices are passed over, every length is checked.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.config import canonical_json
from heliostat.data.decode import ImageRejected, probe
from heliostat.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

_BLOCK = 512
_MAX_MEMBER_BYTES = 2**30  # above any image; a header may claim 8 GiB and more
_MAX_SIDECAR_BYTES = 2**20
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_BODY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=True),
    ]
)


@dataclass(frozen=True)
class ShardImage:
    """One image with what is known about it. id: sha256 of data in hex; extension without the dot; source: path or URL."""

    id: str
    data: bytes
    extension: str
    source: str
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardEntry:
    """Where an image lies inside its shard (offset and length in bytes) and what its sidecar says."""

    id: str
    extension: str
    offset: int
    length: int
    source: str
    label: str | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    length: int


def image_id(data: bytes) -> str:
    """The identity of an image: sha256 of its original bytes, hex."""
    return hashlib.sha256(data).hexdigest()


def make_shard_image(
    data: bytes, extension: str, source: str, *, label: str | None = None, metadata: dict[str, Any] | None = None
) -> ShardImage:
    """A ShardImage whose id is computed from its bytes."""
    return ShardImage(image_id(data), data, extension.lower().lstrip("."), source, label, metadata or {})


def write_shard(images: Iterable[ShardImage]) -> bytes:
    """Lay images into one tar. DataError when an extension is not an image's or the id is not the sha256 of the bytes."""
    out = io.BytesIO()
    for index, image in enumerate(images):
        if image.extension not in IMAGE_EXTENSIONS:
            raise DataError(f"extension {image.extension!r} of {image.source} is not one of {', '.join(IMAGE_EXTENSIONS)}")
        if image.id != image_id(image.data):
            raise DataError(f"id {image.id[:12]} of {image.source} is not the sha256 of its bytes")
        sidecar = {"id": image.id, "label": image.label, "metadata": image.metadata, "source": image.source}
        text = canonical_json(sidecar).encode()
        if len(text) > _MAX_SIDECAR_BYTES:
            raise DataError(
                f"sidecar of {image.source} has {len(text)} bytes, the limit is {_MAX_SIDECAR_BYTES}; shorten metadata"
            )
        _write_member(out, f"{index:09d}.{image.extension}", image.data)
        _write_member(out, f"{index:09d}.json", text)
    out.write(bytes(2 * _BLOCK))
    return out.getvalue()


def _write_member(out: io.BytesIO, name: str, data: bytes) -> None:
    if len(data) > _MAX_MEMBER_BYTES:
        raise DataError(f"{name} has {len(data)} bytes, the limit of a shard's member is {_MAX_MEMBER_BYTES}")
    before = name.encode().ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" % len(data) + b"00000000000\0"
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + 2 * b"0000000\0" + bytes(167)
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    out.write(before + b"%06o\0 " % checksum + after)
    out.write(data)
    out.write(bytes(-len(data) % _BLOCK))


def _number(field_bytes: bytes, what: str, position: int) -> int:
    """An octal header field; base-256 numbers are only ever needed above our limits, so they are refused."""
    text = field_bytes.strip(b" \0")
    if not all(48 <= digit <= 55 for digit in text):
        raise DataError(f"shard is not a tar: {what} at byte {position} is {field_bytes[:12]!r}, expected octal digits")
    return int(text or b"0", 8)


def _walk(data: bytes) -> Iterator[_Member]:
    """Yield the regular members. DataError when the tar is cut off, damaged, or of a kind no image set needs (sparse)."""
    position, long_name = 0, ""
    while True:
        header = data[position : position + _BLOCK]
        if len(header) < _BLOCK:
            raise DataError(f"shard is truncated: no end mark after {len(data)} bytes; write or download it again")
        if not any(header):
            return
        stored = _number(header[148:156], "checksum", position)
        if stored != sum(header[:148]) + sum(header[156:]) + 8 * ord(" "):
            raise DataError(f"shard is damaged: the header at byte {position} does not match its checksum")
        kind, length = header[156:157], _number(header[124:136], "size", position)
        body = position + _BLOCK
        position = body
        if kind in _WITHOUT_BODY:
            long_name = ""
            continue
        if length > _MAX_MEMBER_BYTES:
            raise DataError(f"shard has a member of {length} bytes at byte {body}, the limit is {_MAX_MEMBER_BYTES}")
        if body + length > len(data):
            raise DataError(f"shard is truncated: the member at byte {body} needs {length} bytes, {len(data) - body} are there")
        position = body + length + -length % _BLOCK
        if kind in _REGULAR:
            short_name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
            yield _Member(long_name or short_name, body, length)
            long_name = ""
        elif kind in (b"x", b"L"):
            long_name = _long_name(kind, data[body : body + min(length, _MAX_SIDECAR_BYTES)]) or long_name
        elif kind not in (b"g", b"K"):
            raise DataError(f"shard has a member of kind {kind!r} at byte {body}; only plain files are read")


def _long_name(kind: bytes, body: bytes) -> str:
    """The name in a GNU long-name member or a pax header; "" when the pax header carries none."""
    if kind == b"L":
        return body.partition(b"\0")[0].decode("utf-8", "replace")
    for line in body.split(b"\n"):
        _, _, record = line.partition(b" ")
        if record.startswith(b"path="):
            return record[5:].decode("utf-8", "replace")
    return ""


def _samples(data: bytes) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Group neighbouring members by key, the name up to its first dot (WebDataset's rule)."""
    key, group = "", dict[str, _Member]()
    for member in _walk(data):
        folder, _, file_name = member.name.rpartition("/")
        stem, _, extension = file_name.partition(".")
        member_key = f"{folder}/{stem}" if folder else stem
        if member_key != key and group:
            yield key, group
            group = {}
        key = member_key
        group[extension.lower()] = member
    if group:
        yield key, group


def index_shard(data: bytes) -> list[ShardEntry]:
    """Find every image of a shard. DataError for a broken tar, a broken sidecar, or an id that does not match the bytes.

    Shards written elsewhere are read too: without a sidecar of ours the source is the member's name and the label is the text
    of a `.cls` or `.txt` member, if there is one.
    """
    return [entry for key, group in _samples(data) if (entry := _entry(data, key, group)) is not None]


def _entry(data: bytes, key: str, group: dict[str, _Member]) -> ShardEntry | None:
    extension = next((name for name in group if name.rpartition(".")[2] in IMAGE_EXTENSIONS), None)
    if extension is None:
        return None
    member = group[extension]
    identity = image_id(data[member.offset : member.offset + member.length])
    sidecar = _sidecar(data, key, group["json"]) if "json" in group else {}
    if sidecar.get("id", identity) != identity:
        raise DataError(f"image {key[:80]!r} does not match its id {str(sidecar['id'])[:12]}; the shard is damaged")
    label = sidecar.get("label")
    text = group.get("cls") or group.get("txt")
    if label is None and text is not None and text.length <= _MAX_SIDECAR_BYTES:
        label = data[text.offset : text.offset + text.length].decode("utf-8", "replace").strip()
    metadata = sidecar.get("metadata", {})
    return ShardEntry(
        id=identity,
        extension=extension.rpartition(".")[2],
        offset=member.offset,
        length=member.length,
        source=str(sidecar.get("source", member.name)),
        label=None if label is None else str(label),
        metadata=metadata if isinstance(metadata, dict) else {},
    )


def _sidecar(data: bytes, key: str, member: _Member) -> dict[str, Any]:
    if member.length > _MAX_SIDECAR_BYTES:
        raise DataError(f"sidecar of {key[:80]!r} has {member.length} bytes, the limit is {_MAX_SIDECAR_BYTES}")
    try:
        sidecar = json.loads(data[member.offset : member.offset + member.length])
    except (ValueError, RecursionError) as error:
        raise DataError(f"sidecar of {key[:80]!r} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(sidecar, dict):
        raise DataError(f"sidecar of {key[:80]!r} is a {type(sidecar).__name__}, expected a mapping")
    return sidecar


def read_shard(data: bytes) -> Iterator[ShardImage]:
    """Yield every image of a shard with its bytes, in order. Errors as `index_shard`, raised before the first image."""
    for entry in index_shard(data):
        image = data[entry.offset : entry.offset + entry.length]
        yield ShardImage(entry.id, image, entry.extension, entry.source, entry.label, entry.metadata)


def manifest_rows(shard_key: str, data: bytes) -> pa.Table:
    """The manifest of one shard. An image whose header cannot be read has format "unknown", width 0 and height 0."""
    rows: list[dict[str, Any]] = []
    for entry in index_shard(data):
        row = {"id": entry.id, "shard": shard_key, "offset": entry.offset, "length": entry.length}
        row |= {"width": 0, "height": 0, "format": "unknown", "source": entry.source, "label": entry.label}
        try:
            header = probe(data[entry.offset : entry.offset + entry.length])
            row |= {"width": header.width, "height": header.height, "format": header.format}
        except ImageRejected:
            pass  # the row itself says so; whoever decodes the image gets the reason
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def manifest_to_bytes(table: pa.Table) -> bytes:
    """A manifest as Parquet. DataError when its columns are not MANIFEST_SCHEMA's."""
    sink = io.BytesIO()
    pq.write_table(_checked(table, "manifest"), sink, compression="zstd")
    return sink.getvalue()


def manifest_from_bytes(data: bytes) -> pa.Table:
    """Read a manifest. DataError when it is not Parquet or its columns are not MANIFEST_SCHEMA's."""
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"manifest is not readable Parquet: {' '.join(str(error).split())}") from error
    return _checked(table, "manifest")


def _checked(table: pa.Table, what: str) -> pa.Table:
    if table.schema.names != MANIFEST_SCHEMA.names:
        raise DataError(f"{what} has the columns {', '.join(table.schema.names)}; expected {', '.join(MANIFEST_SCHEMA.names)}")
    try:
        return table.cast(MANIFEST_SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{what} has columns of other types: {' '.join(str(error).split())}") from error


def list_images(folder: Path) -> list[Path]:
    """Every image file below a folder by its suffix, sorted. DataError when the folder is missing or holds none."""
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}; give the folder that holds your images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file())
    if not paths:
        raise DataError(f"no images below {folder}; files must end in {', '.join('.' + name for name in IMAGE_EXTENSIONS)}")
    return paths
