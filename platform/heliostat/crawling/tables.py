"""The tables of a crawl: links that were found, the URLs of a task, and the log of what was fetched."""

import io
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data.shard_image import storable_text
from heliostat.errors import DataError
from heliostat.storage import Store, from_parquet, to_parquet

URLS_SCHEMA = pa.schema(
    [
        pa.field("url", pa.string(), nullable=False),
        pa.field("page", pa.string(), nullable=False),
        pa.field("alt", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=True),
    ]
)
"""One row a URL to fetch. page: where it was found, "" when a list named it; licence: what that page links as its own."""

LINKS_SCHEMA = pa.schema(
    [*URLS_SCHEMA, pa.field("opt_out", pa.string(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)
"""One row a link. reason: "" when it is to be fetched, else one of reasons.REASONS; opt_out: what of the page said no."""

FAILED_SCHEMA = pa.schema([*URLS_SCHEMA, pa.field("status", pa.string(), nullable=False)])
"""One row a page that was asked for and did not come; status: one of reasons.REASONS."""

PLAN_SCHEMA = pa.schema([*URLS_SCHEMA, pa.field("share", pa.int32(), nullable=False)])
"""One row a URL of a task, all URLs of a host in a row. share: over how many tasks its host is spread, for the rate."""

LOG_SCHEMA = pa.schema(
    [
        *URLS_SCHEMA,
        pa.field("host", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("http_status", pa.int32(), nullable=True),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("final_url", pa.string(), nullable=False),
        pa.field("address", pa.string(), nullable=False),
        pa.field("content_type", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("robots", pa.string(), nullable=False),
        pa.field("opt_out", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=True),
        pa.field("last_modified", pa.string(), nullable=True),
        pa.field("id", pa.string(), nullable=True),
    ]
)
"""One row a URL of a task, in its order. status: "ok" or one of reasons.REASONS; http_status: of the last answer, null when
there was none; address: the IP address that gave it; robots: allowed, disallowed, none (there is none), unreachable, or "" when
nobody asked; id: sha256 of the bytes of an image. No clock is in it: the same answers give the same bytes."""


def links_key(index: int) -> str:
    """Where the links of a task lie."""
    return f"links/{index:06d}.parquet"


def failed_key(index: int) -> str:
    """Where the pages that a task of links did not get lie."""
    return f"failed_pages/{index:06d}.parquet"


def plan_key(index: int) -> str:
    """Where the URLs of a download task lie."""
    return f"plan/{index:06d}.parquet"


def log_key(index: int) -> str:
    """Where the fetch log of a download task lies."""
    return f"fetch_log/{index:06d}.parquet"


def text_table(rows: Iterable[Sequence[object]], schema: pa.Schema) -> pa.Table:
    """Rows of Python values as a table; text that UTF-8 cannot hold is replaced."""
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [
        pa.array([storable_text(value) if isinstance(value, str) else value for value in column], field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def table_to_bytes(table: pa.Table) -> bytes:
    """A table as Parquet; the same table gives the same bytes."""
    return to_parquet(table.combine_chunks())


def read_table(store: Store, key: str, schema: pa.Schema) -> pa.Table:
    """Read one of these tables. DataError when it is not Parquet with the columns of `schema`."""
    try:
        return from_parquet(store.read(key), schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise DataError(f"{store.uri}/{key} is not one of this crawl's tables: {detail}; remove it and run again") from error


class TableWriter:
    """Collects batches of rows into one Parquet file in memory, compressed as they come."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd", write_page_checksum=True)
        self.num_rows = 0

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        if table.num_rows:
            self._writer.write_table(table)
            self.num_rows += table.num_rows

    def finish(self) -> bytes:
        """The file."""
        self._writer.close()
        return self._sink.getvalue()


def batches_of(table: pa.Table, num_rows: int) -> Iterator[pa.Table]:
    """Slices of at most so many rows."""
    for start in range(0, table.num_rows, num_rows):
        yield table.slice(start, num_rows)
