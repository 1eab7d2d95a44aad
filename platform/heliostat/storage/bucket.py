"""What a bucket can be asked, one request and one attempt each. `boto.py` asks a real one; `s3.py` decides what is tried again.

Every method may raise TransientStorageError (another attempt may succeed), StorageError (it will not), and what it names.
"""

import hashlib
import zlib
from dataclasses import dataclass
from typing import Literal, Protocol

from heliostat.storage.store import ObjectInfo

DAMAGED = "the object is damaged, or the store's ETag is no MD5: then set AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
"""Advice of a TransientStorageError about a checksum."""


@dataclass(frozen=True)
class Checksum:
    """What a store says about an object's content: `value` is lower-case hex."""

    kind: Literal["crc32", "md5"]
    value: str

    def agrees_with(self, data: bytes | memoryview) -> bool:
        """Compute and compare; about 0.33 (crc32) and 1.63 (md5) CPU-ms per MB, measured: benchmarks/storage.py."""
        if self.kind == "crc32":
            return f"{zlib.crc32(data):08x}" == self.value
        return hashlib.md5(data, usedforsecurity=False).hexdigest() == self.value


@dataclass(frozen=True)
class Answer:
    """The beginning of an object, or all of it; then its checksum, where the store gave one, has been verified."""

    data: bytes
    num_bytes: int
    """Size of the whole object."""
    version: str
    """The ETag: changes with the content."""
    checksum: Checksum | None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return len(self.data) == self.num_bytes


@dataclass(frozen=True)
class ObjectHead:
    """What is known about an object without its bytes. `writer` is the token of the write that made it, empty for others'."""

    num_bytes: int
    writer: str


@dataclass(frozen=True)
class Page:
    """A piece of a listing, keys as in the bucket, and where the next begins (empty: nowhere)."""

    entries: tuple[ObjectInfo, ...]
    next_token: str


class Bucket(Protocol):
    """One bucket. Keys are absolute in it. Instances can be pickled."""

    @property
    def name(self) -> str:
        """The name of the bucket."""

    def has_answered(self) -> bool:
        """Whether the store behind it has ever answered this process, a refusal included."""

    def get(self, key: str, *, whole: int, beginning: int) -> Answer:
        """The whole object when it has at most `whole` bytes, else its first `beginning` bytes. ObjectNotFoundError."""

    def get_range(self, key: str, start: int, num_bytes: int, version: str = "") -> bytes:
        """A range, fewer bytes at the end of the object. ObjectNotFoundError; ObjectReplacedError: it has another version."""

    def head(self, key: str) -> ObjectHead:
        """ObjectNotFoundError."""

    def list_page(self, prefix: str, token: str) -> Page:
        """Objects whose key starts with `prefix`, sorted, from a token on ("" is the beginning)."""

    def put(self, key: str, data: bytes, *, create: bool, writer: str) -> None:
        """Write at most 5 GB with a checksum that the store verifies. ObjectExistsError when `create` and one is there."""

    def delete(self, key: str) -> None:
        """No error when there is no such object."""

    def start_upload(self, key: str, *, writer: str, crc32: str) -> str:
        """Begin a write in pieces, with the crc32 of the whole in hex; nothing is visible before its end. Returns its id."""

    def put_piece(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Send piece `number` (1 to 10,000; at least 5 MiB but for the last); returns its tag."""

    def finish_upload(self, key: str, upload: str, tags: list[str], *, create: bool) -> None:
        """Make the object of its pieces. ObjectExistsError as in `put`; ObjectNotFoundError: no such upload (any more)."""

    def abort_upload(self, key: str, upload: str) -> None:
        """Forget an upload and its pieces. ObjectNotFoundError: it was finished or forgotten before."""
