"""Image files of a folder or bucket -> shards with a manifest. Original bytes are kept; nothing is judged here but the name."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from heliostat.data.shards import IMAGE_EXTENSIONS, list_images, make_shard_image, manifest_rows, write_shard
from heliostat.errors import DataError
from heliostat.storage import LocalStore, Store, open_store


@dataclass(frozen=True)
class SourceFile:
    """One image file below a source: its key relative to the source and its size in bytes."""

    key: str
    num_bytes: int

    @property
    def label(self) -> str | None:
        """The name of the folder that holds the file, None at the top: one folder per class is the usual layout."""
        return PurePosixPath(self.key).parent.name or None


@dataclass(frozen=True)
class Source:
    """A folder or a bucket prefix with its image files, sorted by key."""

    store: Store
    files: tuple[SourceFile, ...]

    @property
    def digest(self) -> str:
        """sha256 over names and sizes: changes when files come, go or change their size. Places are not in it."""
        text = "\n".join(f"{file.key}\t{file.num_bytes}" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()


def open_source(uri: str) -> Source:
    """List the images below a folder or `s3://` prefix. Raises DataError when it is missing or holds no images."""
    store = open_store(uri)
    if isinstance(store, LocalStore):
        root = Path(store.uri)
        files = [SourceFile(path.relative_to(root).as_posix(), path.stat().st_size) for path in list_images(root)]
    else:
        found = store.list()
        files = [
            SourceFile(entry.key, entry.num_bytes)
            for entry in found
            if entry.key.lower().rpartition(".")[2] in IMAGE_EXTENSIONS
        ]
        if not files:
            raise DataError(f"no images below {uri}; keys must end in {', '.join('.' + name for name in IMAGE_EXTENSIONS)}")
    return Source(store, tuple(sorted(files, key=lambda file: file.key)))


def shard_key(index: int) -> str:
    """The key of a shard inside its artifact."""
    return f"shards/{index:06d}.tar"


def pack_files(source: Store, files: Sequence[SourceFile], key: str) -> tuple[bytes, pa.Table]:
    """Read image files and lay them into one shard; returns its bytes and its manifest rows."""
    images = []
    for file in files:
        suffix = file.key.lower().rpartition(".")[2]
        images.append(make_shard_image(source.read(file.key), suffix, file.key, label=file.label))
    data = write_shard(images)
    return data, manifest_rows(key, data)
