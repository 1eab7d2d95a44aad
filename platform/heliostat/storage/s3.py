"""A prefix of a bucket as a store: what is tried again, what is read and written in pieces, and who wrote what.

Every request is repeated within the budget. Where repeating is not plainly safe the code says why it is: a creating write whose
answer was lost finds its own object, and knows it by the token it wrote beside it.
"""

import io
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from heliostat.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    ObjectReplacedError,
    StorageError,
    TransientStorageError,
)
from heliostat.retries import REAL_CLOCK, Budget, BudgetSpentError, Clock, retry
from heliostat.storage.boto import BotoBucket
from heliostat.storage.bucket import DAMAGED, Answer, Bucket
from heliostat.storage.statistics import count
from heliostat.storage.store import ObjectInfo, check_key, check_length, check_prefix

Input = TypeVar("Input")
Result = TypeVar("Result")
_MEBIBYTE = 2**20
_MOST_PIECES = 10_000  # of one upload; S3's limit
_WHOLE_READS = 3  # how often an object that changes while it is read is begun anew


@dataclass(frozen=True)
class S3Limits:
    """Numbers that only tests change. Memory beside the object itself: lanes times piece, 64 MiB reading, 256 MiB writing."""

    patient: Budget = field(default=Budget(attempts=20, seconds=180.0))
    """Towards a store that has answered: outlives an outage of a minute (pauses add up to 130 s in the mean)."""
    hasty: Budget = field(default=Budget(attempts=3, seconds=10.0))
    """Towards one that never has: a wrong endpoint is reported within seconds."""
    read_whole_bytes: int = 32 * _MEBIBYTE
    """A larger object is read by several requests at once; assumption: one connection to S3 brings 50-90 MB/s."""
    read_piece_bytes: int = 8 * _MEBIBYTE
    read_lanes: int = 8
    put_whole_bytes: int = 512 * _MEBIBYTE
    """A larger object is written in pieces. S3 takes 5 GB at once, but what breaks off is sent again from its beginning."""
    put_piece_bytes: int = 64 * _MEBIBYTE
    put_lanes: int = 4


class S3Store:
    """A prefix in a bucket. Conditional writes use If-None-Match; the size of every written object is read back.

    Of two writers that create one object in the same instant exactly one wins where the store checks and writes in one step
    (AWS, MinIO, moto). OpenStack Swift checks first and writes later: there both may be told that they won, the later one
    stays, and the other is told so only if it reads back late enough.
    """

    def __init__(
        self,
        bucket: str | Bucket,
        prefix: str = "",
        *,
        limits: S3Limits = S3Limits(),
        clock: Clock = REAL_CLOCK,
    ) -> None:
        self._bucket: Bucket = BotoBucket(bucket) if isinstance(bucket, str) else bucket
        self._prefix = prefix.strip("/")
        self._limits = limits
        self._clock = clock

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket.name}/{self._prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _request(self, what: str, key: str, call: Callable[[], Result]) -> Result:
        """Make one request until it is answered. Raises StorageError, one line, when the budget is spent."""
        try:
            return retry(
                call,
                budget=lambda: self._limits.patient if self._bucket.has_answered() else self._limits.hasty,
                transient=TransientStorageError,
                before_retry=lambda: count(retries=1),
                clock=self._clock,
            )
        except BudgetSpentError as spent:
            fault = spent.__cause__
            advice = f"; {fault.advice}" if isinstance(fault, TransientStorageError) else ""
            raise StorageError(f"{what} {self.uri}/{key} failed: {fault}, {spent}{advice}") from None

    def read(self, key: str) -> bytes:
        name, reason = self._key(key), ""
        whole, piece = self._limits.read_whole_bytes, self._limits.read_piece_bytes
        for _ in range(_WHOLE_READS):
            first = self._request("get", key, lambda: self._bucket.get(name, whole=whole, beginning=piece))
            if first.is_whole:
                return first.data
            try:
                return self._read_rest(key, name, first)
            except ObjectReplacedError:
                reason = "it was replaced each time; read what nobody writes"
            except TransientStorageError as fault:
                reason = f"{fault}; {fault.advice}"
            count(retries=1)
        raise StorageError(f"get {self.uri}/{key} failed: begun {_WHOLE_READS} times, {reason}")

    def _read_rest(self, key: str, name: str, first: Answer) -> bytes:
        """All of a large object, by several requests at once, each for the version that `first` has."""
        step = self._limits.read_piece_bytes
        content = io.BytesIO(bytes(first.num_bytes))  # its buffer becomes the result without a copy
        with content.getbuffer() as view:
            view[: len(first.data)] = first.data

            def fetch(start: int) -> None:
                wanted = min(step, first.num_bytes - start)
                piece = self._request("get", key, lambda: self._bucket.get_range(name, start, wanted, first.version))
                view[start : start + wanted] = check_length(piece, wanted, f"{self.uri}/{key}")

            _side_by_side(self._limits.read_lanes, fetch, range(len(first.data), first.num_bytes, step))
            if first.checksum and not first.checksum.agrees_with(view):
                raise TransientStorageError(f"content does not match its {first.checksum.kind}", DAMAGED)
        return content.getvalue()

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        if num_bytes == 0:
            return b""
        name = self._key(key)
        data = self._request("get", key, lambda: self._bucket.get_range(name, start, num_bytes))
        return check_length(data, num_bytes, f"{self.uri}/{key}")

    def size(self, key: str) -> int | None:
        name = self._key(key)
        try:
            return self._request("head", key, lambda: self._bucket.head(name)).num_bytes
        except ObjectNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Page after page, each asked for when the one before is used up."""
        root = f"{self._prefix}/" if self._prefix else ""
        full, token = root + check_prefix(prefix), ""
        while True:
            page = self._request("list", prefix, lambda token=token: self._bucket.list_page(full, token))  # type: ignore[misc]
            for entry in page.entries:
                yield ObjectInfo(entry.key[len(root) :], entry.num_bytes)
            token = page.next_token
            if not token:
                return

    def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
        """In pieces when it is large: nothing is visible before the last step, and pieces of a write that fails are removed."""
        name, writer = self._key(key), secrets.token_hex(8)
        try:
            if len(data) > self._limits.put_whole_bytes:
                self._put_pieces(key, data, writer, create=not overwrite)
            else:
                self._request("put", key, lambda: self._bucket.put(name, data, create=not overwrite, writer=writer))
        except (ObjectExistsError, ObjectNotFoundError):  # a repeated write that had taken effect, though its answer was lost
            if self._writer_of(key) != writer:
                raise
        self._check_written(key, len(data), writer, create=not overwrite)

    def _writer_of(self, key: str) -> str:
        """The token of whoever wrote the object, empty when there is none."""
        name = self._key(key)
        try:
            return self._request("head", key, lambda: self._bucket.head(name)).writer
        except ObjectNotFoundError:
            return ""

    def _check_written(self, key: str, num_bytes: int, writer: str, *, create: bool) -> None:
        """Read back the size. Another's token tells of a later write: a fault only where ours had to be the only one."""
        name = self._key(key)
        found = self._request("head", key, lambda: self._bucket.head(name))
        if found.writer not in (writer, ""):  # "": a store that keeps no metadata
            if create:  # it lets two conditional writes pass at the same time
                raise ObjectExistsError(f"{self.uri}/{key} exists already")
        elif found.num_bytes != num_bytes:
            raise StorageError(
                f"{self.uri}/{key} holds {found.num_bytes} bytes after writing {num_bytes}; the store corrupts uploads"
            )

    def _put_pieces(self, key: str, data: bytes, writer: str, *, create: bool) -> None:
        name = self._key(key)
        if create and self.size(key) is not None:  # before all of it is sent for nothing; the last step asks again
            raise ObjectExistsError(f"{self.uri}/{key} exists already")
        step = max(self._limits.put_piece_bytes, -(-len(data) // _MOST_PIECES))
        crc32 = f"{zlib.crc32(data):08x}"
        upload = self._request("put", key, lambda: self._bucket.start_upload(name, writer=writer, crc32=crc32))

        def send(number: int) -> str:
            piece = data[(number - 1) * step : number * step]
            return self._request("put", key, lambda: self._bucket.put_piece(name, upload, number, piece))

        try:
            tags = _side_by_side(self._limits.put_lanes, send, range(1, -(-len(data) // step) + 1))
            self._request("put", key, lambda: self._bucket.finish_upload(name, upload, tags, create=create))
        except BaseException:
            self._forget(key, upload)
            raise

    def _forget(self, key: str, upload: str) -> None:
        """Remove the pieces of a failed upload. Where that fails too, the failure of the upload is the one to tell."""
        name = self._key(key)
        try:
            self._request("abort", key, lambda: self._bucket.abort_upload(name, upload))
        except StorageError:  # invisible; a lifecycle rule of the bucket removes them (docs/guides/storage.md)
            return

    def delete(self, key: str) -> None:
        name = self._key(key)
        self._request("delete", key, lambda: self._bucket.delete(name))

    def child(self, prefix: str) -> "S3Store":
        return S3Store(self._bucket, self._key(prefix), limits=self._limits, clock=self._clock)


def _side_by_side(lanes: int, call: Callable[[Input], Result], inputs: Iterable[Input]) -> list[Result]:
    """Results in order. The first failure is raised, and what has not begun by then never does."""
    failures: list[BaseException] = []

    def call_unless_failed(one: Input) -> Result:
        if failures:
            raise failures[0]
        try:
            return call(one)
        except BaseException as error:
            failures.append(error)
            raise

    with ThreadPoolExecutor(lanes, thread_name_prefix="heliostat-s3") as pool:
        try:
            return list(pool.map(call_unless_failed, inputs))
        except BaseException as error:  # Ctrl-C too
            failures.append(error)
            raise
