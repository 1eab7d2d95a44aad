"""Lists of image files: .txt, .csv, .tsv, .jsonl or .parquet with one path or s3:// URI an entry."""

import csv
import io
import json
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data.parquet_index import LABEL_COLUMNS, find_columns, is_text_column
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_image import storable_text
from heliostat.data.windows import BytesFile, BytesOfObject
from heliostat.errors import DataError, UsageError
from heliostat.storage import LocalStore, Store, check_key

LIST_SUFFIXES = ("txt", "csv", "tsv", "jsonl", "parquet")
PATH_COLUMNS = ("path", "file", "file_name", "filename", "filepath", "image_path", "image", "uri", "url", "key")
_MAX_LIST_BYTES = 2**32
_MAX_ENTRY_CHARACTERS = 4096

Entry = tuple[str, str | None]


@dataclass
class ListedFiles:
    """Keys relative to the list's folder, or URIs; sizes (-1: unknown or missing); labels; what names no file."""

    keys: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def read_list(store: Store, name: str, num_bytes: int) -> ListedFiles | None:
    """The entries of a list; None for a Parquet file that holds the images themselves.

    A missing file is found when it is packed. Raises DataError for a list that cannot be read, UsageError for web addresses.
    """
    if num_bytes > _MAX_LIST_BYTES:
        raise DataError(f"the list {name} has {num_bytes} bytes, the limit is {_MAX_LIST_BYTES}; split it")
    suffix = name.lower().rpartition(".")[2]
    if suffix == "parquet":
        table = _table(BytesOfObject(store, name, num_bytes))
        if table is None:
            return None
        entries: Iterable[Entry] = _of_table(table, name)
    else:
        try:
            text = store.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"the list {name} is not UTF-8 at byte {error.start}") from error
        entries = _of_text(text, suffix, name)
    return _resolved(store, name, entries)


def _of_text(text: str, suffix: str, name: str) -> Iterator[Entry]:
    if suffix == "txt":
        yield from ((line.strip(), None) for line in _lines(text) if line.strip() and not line.startswith("#"))
        return
    rows = _json_rows(text, name) if suffix == "jsonl" else _csv_rows(text, "\t" if suffix == "tsv" else ",", name)
    for number, row in enumerate(rows, start=1):
        path = next((row[column] for column in PATH_COLUMNS if row.get(column)), None)
        if not isinstance(path, str):
            raise DataError(
                f"row {number} of the list {name} has no path; it needs one of the columns {', '.join(PATH_COLUMNS)}"
            )
        label = next((row[column] for column in LABEL_COLUMNS if row.get(column) is not None), None)
        yield path.strip(), None if label is None or label == "" else str(label)


def _lines(text: str) -> list[str]:
    """Lines as files have them. `splitlines` would cut at U+2028 and its like too, which names and captions hold."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _csv_rows(text: str, delimiter: str, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from csv.DictReader(io.StringIO(text), delimiter=delimiter)
    except csv.Error as error:
        raise DataError(f"the list {name} is not readable: {error}") from error


def _json_rows(text: str, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of the list {name} is not JSON: {' '.join(str(error).split())}") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} of the list {name} is a {type(row).__name__}, expected a mapping")
        yield row


def _table(source: BytesOfObject) -> pa.Table | None:
    """Path and label columns of a Parquet list; None when the file holds bytes."""
    try:
        file = pq.ParquetFile(pa.PythonFile(BytesFile(source), mode="r"))
        if find_columns(file.schema_arrow) is not None:
            return None
        wanted = [column for column in (*PATH_COLUMNS, *LABEL_COLUMNS) if column in file.schema_arrow.names]
        return file.read(columns=wanted)
    except (pa.ArrowException, OSError, ValueError):
        return None  # damaged: as a source of images it is turned away with its reason


def _of_table(table: pa.Table, name: str) -> Iterator[Entry]:
    path = next((column for column in PATH_COLUMNS if column in table.column_names), None)
    if path is None or not is_text_column(table[path].type):
        raise DataError(f"{name} holds neither bytes nor paths; a list needs one of the columns {', '.join(PATH_COLUMNS)}")
    label = next((column for column in LABEL_COLUMNS if column in table.column_names), None)
    labels = table[label].to_pylist() if label else [None] * table.num_rows
    for value, given in zip(table[path].to_pylist(), labels, strict=True):
        yield value or "", None if given is None else str(given)


def _resolved(store: Store, name: str, entries: Iterable[Entry]) -> ListedFiles:
    found, seen, is_local = ListedFiles(), set[str](), isinstance(store, LocalStore)
    for number, (entry, label) in enumerate(entries, start=1):
        key = _key(store, entry, f"entry {number} of the list {name}")
        if key is None or key in seen:
            reason = "bad_entry" if key is None else "duplicate_name"
            found.rejected.append(Rejection(f"{name}#{number}", "", 0, 0, "", reason, storable_text(entry)))
            continue
        seen.add(key)
        found.keys.append(key)
        found.sizes.append(_local_size(store, key) if is_local and not key.startswith("s3://") else -1)
        found.labels.append(storable_text(label) if label is not None else PurePosixPath(key).parent.name or None)
    return found


def _key(store: Store, entry: str, where: str) -> str | None:
    """A key of the list's folder or a URI; None when it names nothing that may be read."""
    if not entry or len(entry) > _MAX_ENTRY_CHARACTERS or "\0" in entry or "\\" in entry or storable_text(entry) != entry:
        return None
    if "://" in entry:
        if not entry.startswith("s3://"):
            raise UsageError(f"{where} is {entry[:200]}; only paths and s3:// can be listed, fetch the others first")
        return entry if _names_an_object(entry, where) else None
    is_local = isinstance(store, LocalStore)
    if entry.startswith(("/", "~")):
        path = os.path.expanduser(entry)  # leaves the home of an unknown user as it is
        return os.path.normpath(path) if is_local and path.startswith("/") else None  # a remote list has no say over this disk
    plain = posixpath.normpath(entry)
    if plain.startswith(".."):
        return os.path.normpath(os.path.join(store.uri, plain)) if is_local else None
    try:
        return check_key(plain)
    except UsageError:
        return None


def _names_an_object(uri: str, where: str) -> bool:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:  # not repeated: it may be a secret
        raise UsageError(f"{where} holds a user, a password or a port; write s3://bucket/key and use AWS_* variables")
    try:
        return bool(bucket and key) and check_key(key) == key
    except UsageError:
        return False


def _local_size(store: Store, key: str) -> int:
    try:
        found = os.stat(key if key.startswith("/") else os.path.join(store.uri, key))
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1
