"""What every store promises: objects under keys, written atomically."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, runtime_checkable

from heliostat.errors import StorageError, UsageError


class ObjectInfo(NamedTuple):
    """One listed object: its key relative to the store, and its size in bytes."""

    key: str
    num_bytes: int


@runtime_checkable
class Store(Protocol):
    """Objects under one URI. Keys are relative, `/`-separated, without `..`. Instances can be pickled."""

    @property
    def uri(self) -> str:
        """Where the store is: a path or `s3://bucket/prefix`."""

    def read(self, key: str) -> bytes:
        """The whole object, of one version. Raises ObjectNotFoundError."""

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """`num_bytes` bytes from offset `start`. Raises StorageError when the object is shorter."""

    def size(self, key: str) -> int | None:
        """Size in bytes, None when there is no such object."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, sorted by key."""

    def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
        """Write atomically. With `overwrite=False` an existing object raises ObjectExistsError and stays as it is."""

    def delete(self, key: str) -> None:
        """Remove the object; no error when it is not there."""

    def child(self, prefix: str) -> "Store":
        """The store under `prefix`."""


def check_key(key: str) -> str:
    """Return `key`, or raise UsageError when it would leave the store."""
    path = PurePosixPath(key)
    if str(path) != key or path.is_absolute() or ".." in path.parts or key == "." or "\\" in key or "\0" in key:
        raise UsageError(f"object key {key!r} is not allowed; use a relative path without '..', '.' or empty parts")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix`, which may end anywhere in a key, or raise UsageError when it would leave the store."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def check_length(data: bytes, expected: int, where: str) -> bytes:
    """Return `data`, or raise StorageError when it has not the length that was asked for."""
    if len(data) != expected:
        raise StorageError(f"short read of {where}: {len(data)} of {expected} bytes; the object is truncated")
    return data
