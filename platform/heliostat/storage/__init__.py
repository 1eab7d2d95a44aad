"""EDGE to object storage: folders and `s3://` prefixes behind one interface.

    store.py        what every store promises, and which keys are allowed
    local.py        a folder
    s3.py           a prefix of a bucket: what is tried again, read and written in pieces
    bucket.py       what a bucket can be asked, one request each
    boto.py         the same of a real one; the only file that knows boto3
    small_files.py  JSON objects that may be damaged
    parquet.py      tables that may be damaged
    statistics.py   counts of requests, retries and bytes

Every write is atomic: a reader sees the old object, the new object, or nothing.
"""

import os
import threading
from pathlib import Path

from heliostat.errors import UsageError
from heliostat.storage.local import LocalStore
from heliostat.storage.parquet import RESTORE, from_parquet, one_line_if_damaged, read_parquet, to_parquet
from heliostat.storage.s3 import S3Limits, S3Store
from heliostat.storage.small_files import read_json
from heliostat.storage.statistics import StorageStatistics, storage_statistics
from heliostat.storage.store import ObjectInfo, Store, check_key

__all__ = [
    "RESTORE",
    "LocalStore",
    "ObjectInfo",
    "S3Limits",
    "S3Store",
    "StorageStatistics",
    "Store",
    "check_key",
    "check_writable",
    "from_parquet",
    "one_line_if_damaged",
    "open_store",
    "read_json",
    "read_parquet",
    "remove_partial_writes",
    "storage_statistics",
    "to_parquet",
]


def open_store(uri: str) -> Store:
    """A store from a path or an `s3://bucket/prefix` URI. Raises UsageError for any other scheme."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        try:
            return LocalStore(Path(uri).expanduser())
        except RuntimeError as error:
            raise UsageError(f"{uri}: there is no such user here, or no home folder; write the whole path") from error
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UsageError(f"{uri} names no bucket; write s3://bucket/prefix")
        if "@" in bucket or ":" in bucket:  # not repeated in the message: it may be a secret, and messages are kept
            raise UsageError(
                "an s3:// URI holds a user, a password or a port; write s3://bucket/prefix and use AWS_* variables"
            )
        return S3Store(bucket, prefix)
    if scheme == "file":
        return LocalStore(Path(rest))
    raise UsageError(f"store scheme {scheme}:// is not known; use a local path or s3://bucket/prefix")


def check_writable(store: Store) -> None:
    """Write and delete a probe object, so that an unwritable store is refused before any work starts."""
    key = f"_work/write-probe-{os.getpid()}-{threading.get_ident()}"
    store.put(key, b"heliostat")
    store.delete(key)


def remove_partial_writes(store: Store) -> int:
    """Remove the hidden temporary files of writes that were killed, where nobody else writes; returns how many.

    A bucket shows none: the pieces of an unfinished upload are removed by its lifecycle rule (docs/guides/storage.md).
    """
    return store.remove_partial_writes() if isinstance(store, LocalStore) else 0
