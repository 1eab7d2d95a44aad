"""Shards: many images in one tar, the WebDataset way, and the manifest that says where each one lies.

A shard holds, per image, `<9-digit index>.<extension>` with the original bytes and `<index>.json` with id, source, label and
metadata. It is written deterministically (the same images give the same bytes) and read by our own walk over the 512-byte
headers: nothing is ever extracted, a member's name is only a name, links and devices are passed over, every length is checked.
Parquet shards are in parquet_shards.py; what strangers packed is read by `tar_index.TarIndex` and `parquet_index`.
"""

import io
from collections.abc import Iterable, Iterator

import pyarrow as pa

from heliostat.config import canonical_json
from heliostat.data.manifest import MANIFEST_SCHEMA, ManifestBuilder, manifest_from_bytes, manifest_to_bytes
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_image import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_SIDECAR_BYTES,
    ShardEntry,
    ShardImage,
    image_id,
    make_shard_image,
)
from heliostat.data.tar_index import TarIndex
from heliostat.data.tar_walk import BLOCK
from heliostat.data.windows import BytesInMemory
from heliostat.errors import DataError

__all__ = [
    "IMAGE_EXTENSIONS",
    "MANIFEST_SCHEMA",
    "ShardEntry",
    "ShardImage",
    "image_id",
    "index_shard",
    "lay_tar",
    "make_shard_image",
    "manifest_from_bytes",
    "manifest_rows",
    "manifest_to_bytes",
    "read_shard",
    "write_shard",
]


def write_shard(images: Iterable[ShardImage]) -> bytes:
    """Lay images into one tar. DataError when an extension is not an image's or the id is not the sha256 of the bytes."""
    return lay_tar(images)[0]


def lay_tar(images: Iterable[ShardImage]) -> tuple[bytes, list[int]]:
    """The tar and where in it each image begins. Errors as `write_shard`."""
    out, offsets = io.BytesIO(), []
    for index, image in enumerate(images):
        check_image(image)
        sidecar = {"id": image.id, "label": image.label, "metadata": image.metadata, "source": image.source}
        text = canonical_json(sidecar).encode()
        if len(text) > 2 * MAX_SIDECAR_BYTES:
            raise DataError(
                f"sidecar of {image.source[:200]} has {len(text)} bytes, the limit is {2 * MAX_SIDECAR_BYTES}; shorten metadata"
            )
        offsets.append(out.tell() + BLOCK)
        _write_member(out, f"{index:09d}.{image.extension}", image.data)
        _write_member(out, f"{index:09d}.json", text)
    out.write(bytes(2 * BLOCK))
    return out.getvalue(), offsets


def check_image(image: ShardImage) -> None:
    """DataError when it cannot go into a shard."""
    if image.extension not in IMAGE_EXTENSIONS:
        raise DataError(f"extension {image.extension!r} of {image.source} is not one of {', '.join(IMAGE_EXTENSIONS)}")
    if image.id != image_id(image.data):
        raise DataError(f"id {image.id[:12]} of {image.source} is not the sha256 of its bytes")
    if len(image.data) > MAX_IMAGE_BYTES:
        raise DataError(f"{image.source} has {len(image.data)} bytes, the limit of an image in a shard is {MAX_IMAGE_BYTES}")


def _write_member(out: io.BytesIO, name: str, data: bytes) -> None:
    before = name.encode().ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" % len(data) + b"00000000000\0"
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + 2 * b"0000000\0" + bytes(167)
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    out.write(before + b"%06o\0 " % checksum + after)
    out.write(data)
    out.write(bytes(-len(data) % BLOCK))


def _entries(data: bytes) -> Iterator[tuple[ShardEntry, memoryview]]:
    for found in TarIndex(BytesInMemory(data), "", is_strict=True).accept():
        if not isinstance(found, Rejection):
            yield found


def index_shard(data: bytes) -> list[ShardEntry]:
    """Find every image of a shard. DataError for a broken tar, a broken sidecar, or an id that does not match the bytes.

    Shards written elsewhere are read too: without a sidecar of ours the source is the member's name and the label is the text
    of a `.cls` or `.txt` member, if there is one.
    """
    return [entry for entry, _ in _entries(data)]


def read_shard(data: bytes) -> Iterator[ShardImage]:
    """Yield every image of a shard with its bytes, in order. Errors as `index_shard`, raised before the first image."""
    for entry in index_shard(data):
        yield entry.image(data[entry.offset : entry.offset + entry.length])


def manifest_rows(shard_key: str, data: bytes) -> pa.Table:
    """The manifest of one shard. An image whose header cannot be read has format "unknown", width 0 and height 0."""
    builder = ManifestBuilder()
    for entry, view in _entries(data):
        builder.add(shard_key, entry.offset, entry, view)
    return builder.table()
