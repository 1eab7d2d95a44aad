"""EDGE to object storage: the only file that knows boto3.

A `Store` is a folder on a disk or a prefix in an S3-compatible bucket. Every write is atomic: a reader sees the old object, the
new object, or nothing. Credentials, region and endpoint come from the standard AWS chain only (environment, profile, instance
role; `AWS_ENDPOINT_URL` for other stores) and never appear in messages.
"""

import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from heliostat.errors import ObjectExistsError, ObjectNotFoundError, StorageError, UsageError

_TEMPORARY_SUFFIX = ".heliostat-partial"
_MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound"})
_EXISTS_CODES = frozenset({"412", "PreconditionFailed", "ConditionalRequestConflict", "409"})


@dataclass(frozen=True)
class ObjectInfo:
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
        """The whole object. Raises ObjectNotFoundError."""

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


def _check_prefix(prefix: str) -> str:
    """Return `prefix`, which may end anywhere in a key, or raise UsageError when it would leave the store."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


class LocalStore:
    """A folder. Writes go to a temporary file beside the target, are flushed, then renamed or linked into place."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()

    @property
    def uri(self) -> str:
        return str(self._root)

    def path(self, key: str) -> Path:
        """The file that holds `key`."""
        return self._root / check_key(key)

    def read(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFoundError(f"no object {key} in {self.uri}") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.path(key)}: {error.strerror}") from error

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        try:
            with self.path(key).open("rb") as file:
                file.seek(start)
                data = file.read(num_bytes)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFoundError(f"no object {key} in {self.uri}") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.path(key)}: {error.strerror}") from error
        return _checked_length(data, num_bytes, f"{self.uri}/{key}")

    def size(self, key: str) -> int | None:
        path = self.path(key)
        return path.stat().st_size if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = self._root / _check_prefix(prefix).rpartition("/")[0]
        found = [
            (path.relative_to(self._root).as_posix(), path)
            for path in folder.rglob("*")
            if path.is_file() and not path.name.endswith(_TEMPORARY_SUFFIX)
        ]
        for key, path in sorted(found):
            if key.startswith(prefix):
                try:
                    info = ObjectInfo(key, path.stat().st_size)
                except FileNotFoundError:  # deleted since the folder was read
                    continue
                yield info

    def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
        path = self.path(key)
        temporary = path.parent / f".{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("xb")
        except OSError as error:
            raise StorageError(f"cannot write to {path.parent}: {error.strerror}; choose another store=") from error
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)
        except FileExistsError as error:
            raise ObjectExistsError(f"{path} exists already") from error
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; choose another store= or free some room") from error
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        try:
            self.path(key).unlink(missing_ok=True)
        except (IsADirectoryError, NotADirectoryError):  # a folder is not an object, and a file has nothing below it
            return
        except OSError as error:
            raise StorageError(f"cannot delete {self.path(key)}: {error.strerror}") from error

    def child(self, prefix: str) -> "LocalStore":
        return LocalStore(self._root / check_key(prefix))


_clients: dict[tuple[object, ...], Any] = {}
_clients_lock = threading.Lock()
_answered: set[tuple[object, ...]] = set()


def _client_key() -> tuple[object, ...]:
    """What a client depends on: the process (a fork must not share sockets) and the AWS environment."""
    return (os.getpid(), *sorted(pair for pair in os.environ.items() if pair[0].startswith("AWS_")))


def _s3_client() -> Any:
    """The boto3 client of this process; clients may be used by many threads, and each costs about 0.3 CPU seconds to build.

    Retries back off up to 20 s each. A store that has answered once gets seven of them, so that a run outlives an outage of a
    minute; one that never answered gets two, so that a wrong endpoint is reported within seconds.
    """
    key = _client_key()
    patient = key in _answered
    with _clients_lock:
        client = _clients.get((patient, key))
        if client is None:
            import boto3
            from botocore.config import Config

            addressing = "path" if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") else "auto"
            config = Config(
                retries={"max_attempts": 8 if patient else 3, "mode": "standard"},
                connect_timeout=5,
                read_timeout=60,
                max_pool_connections=32,
                s3={"addressing_style": addressing},
            )
            client = boto3.session.Session().client("s3", config=config)
            _clients.clear()  # one at a time: another environment or another patience replaces it
            _clients[patient, key] = client
    return client


class S3Store:
    """A prefix in a bucket. Conditional writes use If-None-Match; the size of every written object is read back.

    Of two writers that create one object in the same instant exactly one wins where the store checks and writes in one step
    (AWS, MinIO, moto). OpenStack Swift checks first and writes later: there both may be told that they won, the later one
    stays, and the other is told so only if it reads back late enough.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _call(self, operation: str, key: str, **parameters: Any) -> Any:
        """Run one client call; turn every botocore failure into one line without credentials."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError

        where = f"{self.uri}/{key}"
        try:
            response = getattr(_s3_client(), operation)(Bucket=self._bucket, **parameters)
            _answered.add(_client_key())
            if operation == "get_object":
                return response["Body"].read()
            return response
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            if code == "NoSuchBucket":
                raise StorageError(f"no bucket {self._bucket}; create it or choose another store=") from None
            if code == "InvalidRange":
                raise StorageError(
                    f"short read of {where}: it ends before the range asked for; the object is truncated"
                ) from None
            if code in _MISSING_CODES:
                raise ObjectNotFoundError(f"no object {where} ({code})") from None
            if code in _EXISTS_CODES:
                raise ObjectExistsError(f"{where} exists already") from None
            raise StorageError(
                f"{operation} {where} was refused: {code}; check the credentials, the region and the permissions"
            ) from None
        except NoCredentialsError:
            raise StorageError(
                f"no AWS credentials for {where}; set a profile, an instance role or AWS_ACCESS_KEY_ID"
            ) from None
        except (BotoCoreError, HTTPClientError) as error:
            raise StorageError(
                f"{operation} {where} failed: {type(error).__name__}; is AWS_ENDPOINT_URL right and up?"
            ) from None
        except ValueError:  # botocore's answer to an endpoint that is not a URL
            raise StorageError(f"{operation} {where} failed: AWS_ENDPOINT_URL is not a URL; write http://host:port") from None

    def read(self, key: str) -> bytes:
        data: bytes = self._call("get_object", key, Key=self._key(key))
        return data

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        if num_bytes == 0:
            return b""
        data = self._call("get_object", key, Key=self._key(key), Range=f"bytes={start}-{start + num_bytes - 1}")
        return _checked_length(data, num_bytes, f"{self.uri}/{key}")

    def size(self, key: str) -> int | None:
        try:
            return int(self._call("head_object", key, Key=self._key(key))["ContentLength"])
        except ObjectNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        root = f"{self._prefix}/" if self._prefix else ""
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", prefix, Prefix=root + _check_prefix(prefix), **token)
            for entry in page.get("Contents", []):
                yield ObjectInfo(entry["Key"][len(root) :], int(entry["Size"]))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
        condition = {} if overwrite else {"IfNoneMatch": "*"}
        written = self._call("put_object", key, Key=self._key(key), Body=data, **condition)
        found = self._call("head_object", key, Key=self._key(key))
        if not overwrite and found["ETag"] != written["ETag"]:  # the store lets two conditional writes pass at the same time
            raise ObjectExistsError(f"{self.uri}/{key} exists already")
        if found["ContentLength"] != len(data):
            raise StorageError(
                f"{self.uri}/{key} holds {found['ContentLength']} bytes after writing {len(data)}; the store corrupts uploads"
            )

    def delete(self, key: str) -> None:
        self._call("delete_object", key, Key=self._key(key))

    def child(self, prefix: str) -> "S3Store":
        return S3Store(self._bucket, self._key(prefix))


def _checked_length(data: bytes, expected: int, where: str) -> bytes:
    if len(data) != expected:
        raise StorageError(f"short read of {where}: {len(data)} of {expected} bytes; the object is truncated")
    return data


def open_store(uri: str) -> Store:
    """A store from a path or an `s3://bucket/prefix` URI. Raises UsageError for any other scheme."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri).expanduser())
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UsageError(f"{uri} names no bucket; write s3://bucket/prefix")
        return S3Store(bucket, prefix)
    if scheme == "file":
        return LocalStore(Path(rest))
    raise UsageError(f"store scheme {scheme}:// is not known; use a local path or s3://bucket/prefix")


def check_writable(store: Store) -> None:
    """Write and delete a probe object, so that an unwritable store is refused before any work starts."""
    key = f"_work/write-probe-{os.getpid()}-{threading.get_ident()}"
    store.put(key, b"heliostat")
    store.delete(key)
