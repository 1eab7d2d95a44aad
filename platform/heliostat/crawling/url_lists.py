"""Lists of URLs (.txt .csv .tsv .jsonl .parquet), batch by batch: a list may be larger than memory.

The lists of `data/file_lists.py` name files and refuse web addresses; these name nothing else, and come much larger.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from heliostat.crawling.tables import URLS_SCHEMA, text_table
from heliostat.data.windows import BytesFile, BytesOfObject
from heliostat.errors import DataError
from heliostat.storage import Store

LIST_SUFFIXES = ("txt", "csv", "tsv", "jsonl", "parquet")
URL_COLUMNS = ("url", "URL", "image_url", "img_url", "uri", "link", "src")
PAGE_COLUMNS = ("page", "page_url", "source_url", "referrer")
ALT_COLUMNS = ("alt", "ALT", "caption", "text", "TEXT", "title")
LICENCE_COLUMNS = ("licence", "license", "license_url")
_COLUMNS = (URL_COLUMNS, PAGE_COLUMNS, ALT_COLUMNS, LICENCE_COLUMNS)

_ROWS_PER_BATCH = 2**16
_BLOCK_BYTES = 2**24
_MAX_LINE_BYTES = 2**20
_MAX_TEXT_CHARACTERS = 1024


def read_url_list(store: Store, key: str) -> Iterator[pa.Table]:
    """Yield the rows of a list as tables of URLS_SCHEMA, in its order. DataError for a list that cannot be read."""
    size = store.size(key)
    if size is None:
        raise DataError(f"there is no list at {store.uri}/{key}; give a file of one of {', '.join(LIST_SUFFIXES)}")
    content = BytesOfObject(store, key, size)
    suffix = key.lower().rpartition(".")[2]
    try:
        if suffix == "parquet":
            yield from _of_parquet(content, key)
        elif suffix in ("csv", "tsv"):
            yield from _of_csv(content, key, "\t" if suffix == "tsv" else ",")
        elif suffix in ("txt", "jsonl"):
            yield from _of_lines(content, key, is_json=suffix == "jsonl")
        else:
            raise DataError(f"{key} is not a list of URLs; its name has to end in .{', .'.join(LIST_SUFFIXES)}")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"the list {key} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _chosen(names: Sequence[str], key: str) -> list[str | None]:
    """Which columns are the URL, the page, the alt text and the licence."""
    chosen = [next((name for name in known if name in names), None) for known in _COLUMNS]
    if chosen[0] is None:
        raise DataError(f"the list {key} has no column of URLs; it needs one of {', '.join(URL_COLUMNS)}")
    return chosen


def _as_urls(batch: pa.Table | pa.RecordBatch, chosen: Sequence[str | None], key: str) -> pa.Table:
    table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
    columns = []
    for name, field in zip(chosen, URLS_SCHEMA, strict=True):
        if name is None:
            column = pa.nulls(table.num_rows, pa.string())
        else:
            try:
                column = table[name].cast(pa.string())
            except (pa.ArrowException, ValueError) as error:
                raise DataError(f"column {name} of the list {key} has type {table[name].type}; text is needed") from error
            if field.name != "url":
                column = pc.utf8_slice_codeunits(column, 0, _MAX_TEXT_CHARACTERS)
        columns.append(column if field.nullable else pc.fill_null(column, ""))
    return pa.Table.from_arrays(columns, schema=URLS_SCHEMA)


def _of_parquet(content: BytesOfObject, key: str) -> Iterator[pa.Table]:
    try:
        file = pq.ParquetFile(pa.PythonFile(BytesFile(content), mode="r"))
        chosen = _chosen(file.schema_arrow.names, key)
        wanted = [name for name in chosen if name is not None]
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=wanted):
            yield _as_urls(batch, chosen, key)
    except (OSError, ValueError) as error:
        raise DataError(f"the list {key} is not readable Parquet: {' '.join(str(error).split())[:200]}") from error


def _of_csv(content: BytesOfObject, key: str, delimiter: str) -> Iterator[pa.Table]:
    if content.num_bytes == 0:
        return
    reading = pa.csv.ReadOptions(block_size=_BLOCK_BYTES)
    parsing = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    head = bytes(content.view(0, min(content.num_bytes, _MAX_LINE_BYTES))).partition(b"\n")[0].decode("utf-8-sig")
    names = next(iter(_split_line(head, delimiter)), [])
    chosen = _chosen(names, key)
    wanted = [name for name in chosen if name is not None]
    typing = pa.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
    with pa.csv.open_csv(
        pa.PythonFile(BytesFile(content), mode="r"), read_options=reading, parse_options=parsing, convert_options=typing
    ) as reader:
        for batch in reader:
            yield _as_urls(batch, chosen, key)


def _split_line(line: str, delimiter: str) -> Iterator[list[str]]:
    yield from csv.reader([line.rstrip("\r")], delimiter=delimiter)


def _of_lines(content: BytesOfObject, key: str, *, is_json: bool) -> Iterator[pa.Table]:
    rows: list[Sequence[object]] = []
    for number, line in enumerate(_lines(content, key), start=1):
        if not line or (not is_json and line.startswith("#")):
            continue
        rows.append(_of_json(line, number, key) if is_json else (line, "", "", None))
        if len(rows) >= _ROWS_PER_BATCH:
            yield text_table(rows, URLS_SCHEMA)
            rows = []
    if rows:
        yield text_table(rows, URLS_SCHEMA)


def _lines(content: BytesOfObject, key: str) -> Iterator[str]:
    """Stripped lines. A mark at the beginning is passed over."""
    file, rest, number = BytesFile(content), b"", 0
    while True:
        piece = file.read(_BLOCK_BYTES)
        *lines, rest = (rest + piece).split(b"\n") if piece else (rest, b"")
        if max(map(len, (*lines, rest))) > _MAX_LINE_BYTES:
            raise DataError(
                f"a line after line {number} of the list {key} has more than {_MAX_LINE_BYTES} bytes; one URL a line"
            )
        for line in lines:
            yield (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).decode().strip()
            number += 1
        if not piece:
            return


def _of_json(line: str, number: int, key: str) -> Sequence[object]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"line {number} of the list {key} is not JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(row, dict):
        raise DataError(f"line {number} of the list {key} is a {type(row).__name__}, expected a mapping")
    values = [next((row[name] for name in known if isinstance(row.get(name), str)), None) for known in _COLUMNS]
    if values[0] is None:
        raise DataError(f"line {number} of the list {key} has no URL; it needs one of {', '.join(URL_COLUMNS)}")
    url, page, alt, licence = values
    cut = [None if value is None else value[:_MAX_TEXT_CHARACTERS] for value in (page, alt, licence)]
    return url, cut[0] or "", cut[1] or "", cut[2]
