"""Sources -> shards with their manifest rows, and every image that is turned away with its reason.

Original bytes are kept; nothing is judged here but whether the bytes are there and of a size that a shard can hold. An image
whose header cannot be read is packed all the same, with width 0 in its row and the reason in the quarantine.
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from heliostat.data.decode import ImageRejected, probe
from heliostat.data.manifest import ManifestBuilder
from heliostat.data.parquet_index import ParquetIndex
from heliostat.data.parquet_shards import lay_parquet
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_image import (
    EXTENSION_OF_FORMAT,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    ShardFormat,
    ShardImage,
    make_shard_image,
    storable_text,
)
from heliostat.data.shard_reader import ShardReader
from heliostat.data.shards import lay_tar
from heliostat.data.sources import Source, SourceFile
from heliostat.data.tar_index import Account, TarIndex
from heliostat.data.windows import BytesOfObject
from heliostat.errors import ObjectNotFoundError, StorageError
from heliostat.storage import Store

# What a file system says about one file. Anything else (a failing disk, a server that is gone) is about all and ends the run.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)

Put = Callable[[str, bytes], None]

FORGOTTEN_NAME = "(forgotten)"
"""Stands for the name of an image that was turned away because somebody asked to forget it."""


class Refusal(Protocol):
    """Images that must not be taken although they could be. Instances can be pickled."""

    def of_sources(self, sources: Sequence[str]) -> Sequence[bool]:
        """For each source, whether its image must not even be asked for."""

    def of_image(self, image: ShardImage) -> bool:
        """Whether an image must not be packed."""


@dataclass(frozen=True)
class Packing:
    """How shards are written. A shard is full at either limit, whichever comes first; one image may exceed the second.

    refusal: what must not be taken; no setting, so it is in no fingerprint.
    """

    images_per_shard: int = 1024
    shard_bytes: int = 2**30
    format: ShardFormat = "tar"
    refusal: Refusal | None = None

    @property
    def settings(self) -> dict[str, int | str]:
        """What changes the shards."""
        return {"images_per_shard": self.images_per_shard, "shard_bytes": self.shard_bytes, "format": self.format}

    def refused(self, image: ShardImage) -> Rejection | None:
        """The rejection of an image that must not be taken; its name is not written down again."""
        if self.refusal is None or not self.refusal.of_image(image):
            return None
        return Rejection(FORGOTTEN_NAME, "", 0, len(image.data), image.id, "forgotten", "somebody asked to forget it")


@dataclass
class Packed:
    """What became of one task: manifest rows, what was turned away, and the counts that have to add up."""

    rows: pa.Table
    rejections: list[Rejection] = field(default_factory=list)
    account: Account = field(default_factory=Account)


def shard_key(index: int, shard_format: ShardFormat = "tar", number: int | None = None) -> str:
    """The key of a shard inside its artifact; `number` counts the shards that one tar or Parquet file became."""
    return f"shards/{index:06d}{'' if number is None else f'-{number:04d}'}.{shard_format}"


def group_files(source: Source, packing: Packing) -> list[range]:
    """Consecutive files that share a shard. Files of unknown size count as empty."""
    groups, start, num_bytes = list[range](), 0, 0
    for index, size in enumerate(source.sizes):
        if index > start and (index - start >= packing.images_per_shard or num_bytes + size > packing.shard_bytes):
            groups.append(range(start, index))
            start, num_bytes = index, 0
        num_bytes += max(0, size)
    return [*groups, range(start, len(source.sizes))] if source.sizes else []


def pack_files(source: Store, files: Sequence[SourceFile], index: int, packing: Packing, put: Put) -> Packed:
    """Read image files and lay them into one shard (none, when all of them are turned away)."""
    images, builder, account = list[ShardImage](), ManifestBuilder(), Account(num_in=len(files))
    read = ShardReader(source)
    rejections = []
    for file in files:
        found = _read_file(read, file)
        if not isinstance(found, Rejection):
            found = packing.refused(found) or found
        if isinstance(found, Rejection):
            rejections.append(found)
        else:
            images.append(found)
    if images:
        _write(images, shard_key(index, packing.format), packing.format, builder, put)
    account.num_images, account.num_rejected = len(images), len(rejections)
    account.check(f"task {index}")
    return Packed(builder.table(), rejections + builder.rejections, account)


def _read_file(read: ShardReader, file: SourceFile) -> ShardImage | Rejection:
    name, size = storable_text(file.key), file.num_bytes
    try:
        if size < 0:
            found = read.size(file.key)
            if found is None:
                return Rejection(name, "", 0, 0, "", "missing", "there is no such file")
            size = found
        return _read_whole(read, file, name, size)
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _REFUSALS:
            return Rejection(name, "", 0, max(0, size), "", "unreadable", str(cause.strerror))
        raise


def _read_whole(read: ShardReader, file: SourceFile, name: str, size: int) -> ShardImage | Rejection:
    if size > MAX_IMAGE_BYTES:
        return Rejection(name, "", 0, size, "", "too_large", f"{size} bytes, the limit is {MAX_IMAGE_BYTES}")
    try:
        data = read.whole(file.key)
    except ObjectNotFoundError:
        return Rejection(name, "", 0, size, "", "missing", "the file was listed and is gone")
    extension = name.lower().rpartition(".")[2]
    if extension not in IMAGE_EXTENSIONS:
        try:
            extension = EXTENSION_OF_FORMAT[probe(data).format]
        except ImageRejected as rejected:
            return Rejection(name, "", 0, size, "", rejected.reason, rejected.detail)
    return make_shard_image(data, extension, name, label=file.label)


def _write(images: list[ShardImage], key: str, shard_format: ShardFormat, builder: ManifestBuilder, put: Put) -> None:
    data, offsets = lay_tar(images) if shard_format == "tar" else lay_parquet(images)
    put(key, data)
    for image, offset in zip(images, offsets, strict=True):
        builder.add(key, offset, image, image.data)


def pack_container(source: Source, file: SourceFile, index: int, packing: Packing, put: Put) -> Packed:
    """Copy the images of a tar or Parquet file into shards of our own, in its order; at least one shard a file."""
    store, builder, rejections = source.store, ManifestBuilder(), list[Rejection]()
    content = BytesOfObject(store, file.key, file.num_bytes)
    reader = TarIndex(content, file.key, is_strict=False) if source.kind == "tars" else ParquetIndex(content, file.key)
    number, images, num_bytes = 0, list[ShardImage](), 0
    num_refused = 0
    for found in _images(reader):
        if not isinstance(found, Rejection) and (refused := packing.refused(found)):
            rejections.append(refused)
            num_refused += 1
            continue
        if isinstance(found, Rejection):
            rejections.append(found)
            continue
        if images and (len(images) >= packing.images_per_shard or num_bytes + len(found.data) > packing.shard_bytes):
            _write(images, shard_key(index, packing.format, number), packing.format, builder, put)
            number, images, num_bytes = number + 1, [], 0
        images.append(found)
        num_bytes += len(found.data)
    if images:
        _write(images, shard_key(index, packing.format, number), packing.format, builder, put)
    reader.account.check(file.key)
    reader.account.num_images -= num_refused
    reader.account.num_rejected += num_refused
    return Packed(builder.table(), rejections + builder.rejections, reader.account)


def _images(reader: TarIndex | ParquetIndex) -> Iterator[ShardImage | Rejection]:
    if isinstance(reader, ParquetIndex):
        yield from reader.accept()
        return
    for found in reader.accept():
        yield found if isinstance(found, Rejection) else found[0].image(found[1])


def index_in_place(source: Source, file: SourceFile) -> Packed:
    """Manifest rows that point into a tar where it lies; nothing is copied."""
    builder, rejections = ManifestBuilder(), list[Rejection]()
    reader = TarIndex(BytesOfObject(source.store, file.key, file.num_bytes), file.key, is_strict=False)
    uri = f"{source.store.uri}/{file.key}"
    for found in reader.accept():
        if isinstance(found, Rejection):
            rejections.append(found)
        else:
            builder.add(uri, found[0].offset, *found)
    reader.account.check(file.key)
    return Packed(builder.table(), rejections + builder.rejections, reader.account)


def reasons(rejections: Iterable[Rejection]) -> dict[str, int]:
    """How many were turned away for which reason, the most frequent first."""
    counted: dict[str, int] = {}
    for rejection in rejections:
        counted[rejection.reason] = counted.get(rejection.reason, 0) + 1
    return dict(sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])))
