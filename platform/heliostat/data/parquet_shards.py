"""Shards as Parquet files whose images can be read by range.

The column `bytes` is required, uncompressed and PLAIN: Parquet then stores each value as 4 bytes of length and the value
itself, in one piece (Apache Parquet format, "Encodings"). So the manifest's (shard, offset, length) addresses an image in a
Parquet shard exactly as it does in a tar, and every Parquet reader opens the file as a table.
"""

import io
import struct
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.config import canonical_json
from heliostat.data.decode import ImageRejected, probe
from heliostat.data.shard_image import ShardImage
from heliostat.data.shards import check_image
from heliostat.errors import DataError

SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("bytes", pa.binary(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=True),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
    ]
)
_ROW_GROUP_BYTES = 64 * 2**20  # readers elsewhere hold a row group in memory
_MAX_SHARD_BYTES = 2**31 - 1  # Arrow's binary columns count with 32 bits


def lay_parquet(images: Sequence[ShardImage]) -> tuple[bytes, list[int]]:
    """The file and where in it each image begins; the same images give the same bytes under one version of pyarrow.

    DataError for an image that cannot be stored, or more than 2 GiB of them.
    """
    total = sum(len(image.data) for image in images)
    if total > _MAX_SHARD_BYTES:
        raise DataError(f"a Parquet shard of {total} bytes exceeds the limit of {_MAX_SHARD_BYTES}; set shard_bytes")
    for image in images:
        check_image(image)
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        SHARD_SCHEMA,
        compression={name: "none" if name == "bytes" else "zstd" for name in SHARD_SCHEMA.names},
        use_dictionary=[name for name in SHARD_SCHEMA.names if name != "bytes"],
        write_statistics=[name for name in SHARD_SCHEMA.names if name != "bytes"],
        column_encoding=None,
        store_schema=False,
    ) as writer:
        for group in _row_groups(images):
            writer.write_table(_table(group), row_group_size=max(1, len(group)))
    data = sink.getvalue()
    return data, _locate(data, images)


def _row_groups(images: Sequence[ShardImage]) -> list[list[ShardImage]]:
    groups, num_bytes = list[list[ShardImage]](), _ROW_GROUP_BYTES
    for image in images:
        if num_bytes + len(image.data) > _ROW_GROUP_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(image)
        num_bytes += len(image.data)
    return groups


def _table(images: Sequence[ShardImage]) -> pa.Table:
    headers = [_header(image.data) for image in images]
    columns = {
        "id": [image.id for image in images],
        "bytes": [image.data for image in images],
        "source": [image.source.encode("utf-8", "replace").decode() for image in images],
        "label": [None if image.label is None else image.label.encode("utf-8", "replace").decode() for image in images],
        "metadata": [canonical_json(image.metadata) for image in images],
        "width": [width for width, _, _ in headers],
        "height": [height for _, height, _ in headers],
        "format": [name for _, _, name in headers],
    }
    return pa.table(columns, schema=SHARD_SCHEMA)


def _header(data: bytes) -> tuple[int, int, str]:
    try:
        header = probe(data)
    except ImageRejected:
        return 0, 0, "unknown"
    return min(header.width, 2**31 - 1), min(header.height, 2**31 - 1), str(header.format)


def _locate(data: bytes, images: Sequence[ShardImage]) -> list[int]:
    """The offset of each image: right behind the one before, or behind the header of the next page.

    Any place that holds the length and the bytes serves, so a chance match is as right as the true one.
    """
    offsets, position, view = [], 4, memoryview(data)
    for image in images:
        prefix = struct.pack("<I", len(image.data))
        start = position + 4
        while view[start - 4 : start] != prefix or view[start : start + len(image.data)] != image.data:
            found = data.find(prefix, start - 3)
            if found < 0:
                raise DataError(
                    f"{image.source} is not in one piece in the Parquet shard; pyarrow {pa.__version__} lays it otherwise"
                )
            start = found + 4
        offsets.append(start)
        position = start + len(image.data)
    return offsets
