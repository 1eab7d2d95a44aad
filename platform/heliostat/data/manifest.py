"""The manifest: the table of all images of an artifact, one row an image, and where its bytes lie."""

from collections.abc import Sequence

import pyarrow as pa

from heliostat.data.decode import ImageRejected, probe
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_image import ShardEntry, ShardImage, storable_text
from heliostat.errors import DataError, StorageError
from heliostat.storage import RESTORE, Store, from_parquet, to_parquet

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
_MAX_SIDE = 2**31 - 1
_ROWS_HELD = 2**16  # Python values become Arrow columns after so many rows


class ManifestBuilder:
    """Collects rows column by column; a million rows stay small."""

    def __init__(self) -> None:
        self._columns: list[list[object]] = [[] for _ in MANIFEST_SCHEMA]
        self._batches: list[pa.RecordBatch] = []
        self.rejections: list[Rejection] = []

    def add(self, shard: str, offset: int, image: ShardImage | ShardEntry, data: bytes | memoryview) -> None:
        """One image. When its header cannot be read the row has format "unknown", width 0 and height 0, and a Rejection."""
        width, height, name = 0, 0, "unknown"
        fault: tuple[str, str] | None = None
        try:
            header = probe(bytes(data))
            if max(header.width, header.height) <= _MAX_SIDE and min(header.width, header.height) > 0:
                width, height, name = header.width, header.height, str(header.format)
            else:
                fault = "decode_error", f"{header.width} x {header.height} pixels"
        except ImageRejected as rejected:
            fault = rejected.reason, rejected.detail
        if fault:
            self.rejections.append(Rejection(storable_text(image.source), shard, offset, len(data), image.id, *fault))
        row = (image.id, shard, offset, len(data), width, height, name, image.source, image.label)
        for column, value in zip(self._columns, row, strict=True):
            column.append(storable_text(value) if isinstance(value, str) else value)
        if len(self._columns[0]) >= _ROWS_HELD:
            self._flush()

    def _flush(self) -> None:
        arrays = [pa.array(column, field.type) for column, field in zip(self._columns, MANIFEST_SCHEMA, strict=True)]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=MANIFEST_SCHEMA))
        self._columns = [[] for _ in MANIFEST_SCHEMA]

    def table(self) -> pa.Table:
        """All rows so far, MANIFEST_SCHEMA."""
        self._flush()
        return pa.Table.from_batches(self._batches, MANIFEST_SCHEMA)


def manifest_to_bytes(table: pa.Table) -> bytes:
    """A manifest as Parquet. DataError when its columns are not MANIFEST_SCHEMA's."""
    return to_parquet(_checked(table, "manifest"))


def manifest_from_bytes(data: bytes) -> pa.Table:
    """Read a manifest. DataError when it is not Parquet or its columns are not MANIFEST_SCHEMA's."""
    try:
        table = from_parquet(data)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"manifest is not readable Parquet: {' '.join(str(error).split())}") from error
    return _checked(table, "manifest")


def read_manifest(files: Store, key: str = "manifest.parquet") -> pa.Table:
    """The manifest of an artifact. Raises StorageError, which names the object, where it is damaged."""
    try:
        return manifest_from_bytes(files.read(key))
    except DataError as error:
        raise StorageError(f"{files.uri}/{key} is damaged ({error}); {RESTORE}") from error


def join_manifests(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables in their order."""
    return pa.concat_tables(tables) if tables else MANIFEST_SCHEMA.empty_table()


def _checked(table: pa.Table, what: str) -> pa.Table:
    if table.schema.names != MANIFEST_SCHEMA.names:
        raise DataError(f"{what} has the columns {', '.join(table.schema.names)}; expected {', '.join(MANIFEST_SCHEMA.names)}")
    try:
        return table.cast(MANIFEST_SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{what} has columns of other types: {' '.join(str(error).split())}") from error
