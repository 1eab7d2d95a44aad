"""What a loader reads from: the images of one or several artifacts, as pixels, with bad ones replaced and told about."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from heliostat.data.augment import Pixels
from heliostat.data.config import CropsConfig, DecodeConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.data.image_table import ImageTable
from heliostat.data.quarantine import Rejection
from heliostat.errors import DataError

ReadBytes = Callable[[int, str, int, int], bytes]  # (source, shard, offset, length)

_MAX_REPLACEMENTS = 100  # bad images in a row before the data set, not the image, is at fault


class Reader(Protocol):
    """How the bytes of an artifact are read; called from several threads at once."""

    def is_remote(self, shard: str) -> bool:
        """Whether a request costs so much that a whole shard is better read at once."""

    def __call__(self, shard: str, offset: int, length: int) -> bytes:
        """The bytes of one image."""

    def whole(self, shard: str) -> bytes:
        """The bytes of one shard."""


@dataclass(frozen=True)
class ImageSource:
    """Images to train on. weight: the share of this source in the sequence, relative to the other sources."""

    table: ImageTable
    reader: Reader
    weight: float = 1.0


@dataclass(frozen=True)
class Found:
    """The pixels of an image, or of the one that stands in for it, and what was turned away on the way there."""

    image: int
    pixels: Pixels
    rejections: tuple[Rejection, ...]


class PixelReader:
    """Decoded images by (source, row), as large as the crops need them; safe between threads."""

    def __init__(self, sources: Sequence[ImageSource], decoding: DecodeConfig, crops: CropsConfig, cache_bytes: int) -> None:
        self._sources, self._decoding, self._crops = sources, decoding, crops
        self._cache = _DecodedImages(cache_bytes)

    def find(self, source: int, image: int, read: ReadBytes) -> Found:
        """The image, or the next one of its source that can be decoded.

        The next row lies in the same shard as a rule, which the rank holds anyway. Raises DataError after too many bad ones.
        """
        num_images = self._sources[source].table.num_images
        rejections: list[Rejection] = []
        for step in range(_MAX_REPLACEMENTS):
            candidate = (image + step) % num_images
            try:
                return Found(candidate, self._pixels(source, candidate, read), tuple(rejections))
            except ImageRejected as rejected:
                rejections.append(self._rejection(source, candidate, rejected))
        last = rejections[-1]
        raise DataError(
            f"{_MAX_REPLACEMENTS} images in a row cannot be decoded, the last one: {last.reason}: {last.detail}; "
            "curate the data set first"
        )

    def _pixels(self, source: int, image: int, read: ReadBytes) -> Pixels:
        pixels = self._cache.get(source, image)
        if pixels is None:
            table = self._sources[source].table
            data = read(source, table.shard(image), int(table.offset[image]), int(table.length[image]))
            if hashlib.sha256(data).digest() != bytes(table.ids[image]):  # 0.1 to 0.2 ms a photograph, its crops 5
                raise ImageRejected("checksum_mismatch", f"the bytes are not those of {table.id(image)[:12]}")
            pixels = decode(data, self._decoding, crops=self._crops)
            self._cache.put(source, image, pixels)
        return pixels

    def _rejection(self, source: int, image: int, rejected: ImageRejected) -> Rejection:
        table = self._sources[source].table
        offset, length = int(table.offset[image]), int(table.length[image])
        return Rejection("", table.shard(image), offset, length, table.id(image), rejected.reason, rejected.detail)


class _DecodedImages:
    """Decoded images up to a bound in bytes, shared between threads; the first come stay.

    Nothing is evicted: every image is used once per epoch in a fresh order, where a full cache that stays serves its share of
    the data set and one that evicts the least recently used serves less than half of that.
    """

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._images: dict[tuple[int, int], Pixels] = {}
        self._lock = threading.Lock()

    def get(self, source: int, image: int) -> Pixels | None:
        return self._images.get((source, image))

    def put(self, source: int, image: int, pixels: Pixels) -> None:
        with self._lock:
            if (source, image) not in self._images and pixels.nbytes <= self._free_bytes:
                self._images[source, image] = pixels
                self._free_bytes -= pixels.nbytes
