"""One image of a shard, and where it lies."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any, Literal

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
EXTENSION_OF_FORMAT = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tif"}
ShardFormat = Literal["tar", "parquet"]

MAX_IMAGE_BYTES = 2**28  # 256 MiB encoded; what decoding accepts is less (DecodeConfig.max_bytes)
MAX_SIDECAR_BYTES = 2**19  # as read; written ones may have twice that, for a label and a caption come into them

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardImage:
    """One image with what is known about it. id: sha256 of data in hex; extension without the dot; source: path or URL."""

    id: str
    data: bytes
    extension: str
    source: str
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """Where an image lies inside its shard (offset and length in bytes) and what its sidecar says."""

    id: str
    extension: str
    offset: int
    length: int
    source: str
    label: str | None
    metadata: dict[str, Any]

    def image(self, data: bytes | memoryview) -> ShardImage:
        """The entry with its bytes."""
        return ShardImage(self.id, bytes(data), self.extension, self.source, self.label, self.metadata)


def image_id(data: bytes | memoryview) -> str:
    """The identity of an image: sha256 of its original bytes, hex."""
    return hashlib.sha256(data).hexdigest()


def is_image_id(text: object) -> bool:
    """Whether a sidecar's id is one of ours; others number their images as they like."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def make_shard_image(
    data: bytes, extension: str, source: str, *, label: str | None = None, metadata: dict[str, Any] | None = None
) -> ShardImage:
    """A ShardImage whose id is computed from its bytes."""
    return ShardImage(image_id(data), data, extension.lower().lstrip("."), source, label, metadata or {})


def storable_text(text: str) -> str:
    """Text that UTF-8 can hold: a JSON sidecar can smuggle half a surrogate pair into a string."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
