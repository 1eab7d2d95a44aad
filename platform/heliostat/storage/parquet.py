"""Parquet with a checksum in every page: a bit that has flipped is found when it is read, not when a model is worse for it."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.errors import StorageError
from heliostat.storage.store import Store

RESTORE = "restore it, or make its artifact again under another version"


def to_parquet(table: pa.Table, **layout: Any) -> bytes:
    """A file, zstd; the same table gives the same bytes under one pyarrow. layout: of pyarrow's `write_table`."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **layout)
    return sink.getvalue()


def from_parquet(data: bytes, columns: Sequence[str] | None = None, filters: pc.Expression | None = None) -> pa.Table:
    """The rows of a file whose pages are what was written. Raises what pyarrow raises (see `one_line_if_damaged`)."""
    names = list(columns) if columns is not None else None
    return pq.read_table(pa.BufferReader(data), columns=names, filters=filters, page_checksum_verification=True)


def read_parquet(
    files: Store,
    key: str,
    columns: Sequence[str] | None = None,
    *,
    fix: str = RESTORE,
    filters: pc.Expression | None = None,
) -> pa.Table:
    """The rows of an object. Raises ObjectNotFoundError where there is none, StorageError where it is damaged."""
    data = files.read(key)
    with one_line_if_damaged(files, key, fix):
        return from_parquet(data, columns, filters)


@contextmanager
def one_line_if_damaged(files: Store, key: str, fix: str = RESTORE) -> Iterator[None]:
    """Turn what pyarrow says of a torn or changed file into a StorageError that names the object and `fix`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StorageError(f"{files.uri}/{key} is damaged ({reason}); {fix}") from error
