"""Images out of Parquet files that strangers wrote: any bytes column, Hugging Face's `image: struct<bytes, path>` included.

Rows come in small batches out of one row group at a time. What a row group or a file claims is checked first, for a small file
can claim to unpack to terabytes; Arrow reads the rest and its errors turn the row group away, never the run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data.decode import ImageRejected, probe
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_image import (
    EXTENSION_OF_FORMAT,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    ShardImage,
    image_id,
    storable_text,
)
from heliostat.data.tar_index import Account
from heliostat.data.windows import Bytes, BytesFile
from heliostat.errors import DataError

BYTES_COLUMNS = ("bytes", "image", "image_bytes", "jpg", "jpeg", "png", "webp", "img", "content", "data")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "category")
CAPTION_COLUMNS = ("caption", "text", "txt", "title")
_MAX_ROW_GROUP_BYTES = 2**31  # unpacked, as the footer says; images barely compress, so real row groups are the file's size
_MAX_EXPANSION = 16  # unpacked bytes of a file per byte of it; images barely compress, and the rest is small
_SMALL_FILE_BYTES = 64 * 2**20  # below this the expansion does no harm
_BATCH_ROWS = 32
_MAX_FOOTER_BYTES = 64 * 2**20
_MAX_COLUMNS = 1000
_MAX_TEXT_CHARACTERS = 2**14


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what. path, label and caption may be ""."""

    data: str
    path: str
    label: str
    caption: str

    @property
    def names(self) -> list[str]:
        """Leaf columns to read."""
        return [name for name in (self.data, self.path, self.label, self.caption) if name]


def find_columns(schema: pa.Schema) -> Columns | None:
    """The columns by type first and by name second; None when no column holds bytes."""
    candidates, paths = dict[str, str](), dict[str, str]()
    for field in schema:
        if _is_binary(field.type):
            candidates[field.name] = field.name
        elif pa.types.is_struct(field.type):
            inner = {field.type.field(index).name: field.type.field(index).type for index in range(field.type.num_fields)}
            if "bytes" in inner and _is_binary(inner["bytes"]):
                candidates[field.name] = f"{field.name}.bytes"
                paths[field.name] = f"{field.name}.path" if "path" in inner and is_text_column(inner["path"]) else ""
    name = next((name for name in BYTES_COLUMNS if name in candidates), next(iter(candidates), ""))
    if not name:
        return None
    plain = {field.name for field in schema if _is_plain(field.type)}
    path = paths.get(name, "") or next((column for column in ("source", "path", "url", "file_name") if column in plain), "")
    label, caption = (next((column for column in names if column in plain), "") for names in (LABEL_COLUMNS, CAPTION_COLUMNS))
    return Columns(candidates[name], path, label, caption)


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_binary(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_text_column(kind: pa.DataType) -> bool:
    """Text in any of Arrow's layouts: Polars writes large strings, pandas writes categories as dictionaries."""
    if pa.types.is_dictionary(kind):
        return is_text_column(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_plain(kind: pa.DataType) -> bool:
    """What a label may be. pandas makes integers with gaps floats, and categories of numbers dictionaries."""
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return is_text_column(kind) or any(is_number(kind) for is_number in numbers)


class ParquetIndex:
    """Reads the images of one Parquet file; `accept` yields them and Rejections in the order of the rows."""

    def __init__(self, source: Bytes, shard: str) -> None:
        self.account = Account()
        self._source, self._shard = source, shard

    def accept(self) -> Iterator[ShardImage | Rejection]:
        """Whatever the file is, the only exception is a StorageError."""
        try:
            file, columns = self._open()
        except (pa.ArrowException, OSError, ValueError, DataError, MemoryError) as error:
            yield self._reject(0, 1, "damaged_parquet", _one_line(error))
            return
        row, unpacked = 0, 0
        limit = max(_SMALL_FILE_BYTES, _MAX_EXPANSION * self._source.num_bytes)
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            claimed, num_rows = group.total_byte_size, max(0, group.num_rows)
            unpacked += max(0, claimed)
            if num_rows > self._source.num_bytes or claimed > _MAX_ROW_GROUP_BYTES or claimed < 0 or unpacked > limit:
                yield self._reject(
                    row, num_rows, "too_large", f"row group {number} unpacks to {claimed} bytes, {num_rows} rows"
                )
            else:
                yield from self._row_group(file, columns, number, row)
            row += num_rows

    def _open(self) -> tuple[pq.ParquetFile, Columns]:
        num_bytes = self._source.num_bytes
        if num_bytes < 12 or bytes(self._source.view(num_bytes - 4, 4)) != b"PAR1":
            raise DataError(f"the {num_bytes} bytes do not end as Parquet does")
        footer = int.from_bytes(bytes(self._source.view(num_bytes - 8, 4)), "little")
        if footer > min(_MAX_FOOTER_BYTES, num_bytes - 12):
            raise DataError(f"the footer claims {footer} bytes, the limit is {min(_MAX_FOOTER_BYTES, num_bytes - 12)}")
        file = pq.ParquetFile(
            pa.PythonFile(BytesFile(self._source), mode="r"),
            buffer_size=2**20,
            pre_buffer=False,
            thrift_string_size_limit=2**26,
            thrift_container_size_limit=2**20,
        )
        if file.metadata.num_columns > _MAX_COLUMNS:
            raise DataError(f"{file.metadata.num_columns} columns, the limit is {_MAX_COLUMNS}")
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"two columns are called {twice[:100]!r}; rename one")
        columns = find_columns(file.schema_arrow)
        if columns is None:
            raise DataError(f"no column holds bytes; the columns are {', '.join(file.schema_arrow.names)[:200]}")
        return file, columns

    def _row_group(
        self, file: pq.ParquetFile, columns: Columns, number: int, first_row: int
    ) -> Iterator[ShardImage | Rejection]:
        done, num_rows = 0, file.metadata.row_group(number).num_rows
        size = 1 if self._has_dictionary(file, columns, number) else _BATCH_ROWS
        limit = max(_SMALL_FILE_BYTES, _MAX_EXPANSION * self._source.num_bytes)
        try:
            batches = file.iter_batches(size, row_groups=[number], columns=columns.names, use_threads=False)
            for batch in batches:
                values = {name: _leaf(batch, name) for name in columns.names}
                limit = _charge(limit, sum(array.nbytes for array in values.values()))
                for index in range(batch.num_rows):
                    yield self._row(first_row + done, {name: array[index] for name, array in values.items()}, columns)
                    done += 1
        except (pa.ArrowException, OSError, ValueError, DataError, MemoryError) as error:
            yield self._reject(first_row + done, num_rows - done, "damaged_parquet", f"row group {number}: {_one_line(error)}")
            return
        if done < num_rows:
            detail = f"row group {number} holds {done} of {num_rows} rows"
            yield self._reject(first_row + done, num_rows - done, "damaged_parquet", detail)

    def _has_dictionary(self, file: pq.ParquetFile, columns: Columns, number: int) -> bool:
        """Whether one stored value may stand for many rows: a batch could then be any number of times the file."""
        group = file.metadata.row_group(number)
        for index in range(group.num_columns):
            column = group.column(index)
            if column.path_in_schema == columns.data:
                return any("DICTIONARY" in encoding for encoding in column.encodings)
        return True

    def _row(self, row: int, values: dict[str, Any], columns: Columns) -> ShardImage | Rejection:
        value = values[columns.data]
        data = value.as_py() if value.is_valid else None
        name = _text(values[columns.path]) if columns.path else None
        source = f"{self._shard}#{row}"
        if data is None:
            return self._reject(
                row, 1, "no_image", "the row holds no bytes" + (f", only the path {name[:200]}" if name else "")
            )
        if len(data) > MAX_IMAGE_BYTES:
            return self._reject(row, 1, "too_large", f"{len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
        suffix = (name or "").lower().rpartition(".")[2]
        try:
            extension = EXTENSION_OF_FORMAT[probe(data).format]
        except ImageRejected as rejected:
            if suffix not in IMAGE_EXTENSIONS:
                return self._reject(row, 1, rejected.reason, rejected.detail)
            extension = suffix
        label = _text(values[columns.label]) if columns.label else None
        caption = _text(values[columns.caption]) if columns.caption else None
        metadata = {key: text for key, text in (("path", name), ("caption", caption)) if text and text != label}
        self.account.num_in += 1
        self.account.num_images += 1
        return ShardImage(image_id(data), data, extension, source, label if label is not None else caption, metadata)

    def _reject(self, row: int, num_rows: int, reason: str, detail: str) -> Rejection:
        """Turn rows away. offset and length count rows here, for the bytes of a column lie in pages."""
        self.account.num_in += num_rows
        self.account.num_rejected += num_rows
        return Rejection(f"{self._shard}#{row}", self._shard, row, num_rows, "", reason, storable_text(detail))


def _charge(limit: int, num_bytes: int) -> int:
    """What is left of the bytes that a row group may unpack to. DataError when nothing is."""
    if num_bytes > limit:
        raise DataError("the rows hold far more bytes than the file")
    return limit - num_bytes


def _leaf(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column, or a child of a struct; rows whose struct is null are null in the child."""
    if name in batch.schema.names:
        return batch.column(name)
    outer, _, inner = name.rpartition(".")
    struct = batch.column(outer)
    return struct.flatten()[struct.type.get_field_index(inner)]


def _text(value: Any) -> str | None:
    """Numbers and texts as text. Invalid UTF-8 is replaced, long texts are cut."""
    if not value.is_valid:
        return None
    try:
        text = value.as_py()
        if isinstance(text, float) and text.is_integer():
            text = int(text)  # a label 3 beside a missing one is 3.0 in pandas
        return str(text)[:_MAX_TEXT_CHARACTERS]
    except UnicodeDecodeError:
        raw: bytes = value.as_buffer().to_pybytes()[:_MAX_TEXT_CHARACTERS]
        return raw.decode("utf-8", "replace")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
