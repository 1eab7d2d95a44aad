"""The ways to the bytes of images that readers.py compares; each yields the bytes of every image."""

import mmap
from collections.abc import Iterator
from pathlib import Path

from heliostat.data.manifest import manifest_from_bytes
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_reader import ShardReader
from heliostat.data.tar_index import TarIndex
from heliostat.data.tar_walk import PLAIN, walk
from heliostat.data.windows import BytesOfObject
from heliostat.storage import Store

Images = Iterator[bytes | memoryview]


def by_manifest(store: Store, keys: list[str]) -> Images:
    """Ours, as training reads: the manifest says where the images lie; nothing is parsed or verified."""
    manifest = manifest_from_bytes(store.read("manifest.parquet"))
    reader, wanted = ShardReader(store), set(keys)
    shards, offsets, lengths = (manifest[name].to_pylist() for name in ("shard", "offset", "length"))
    last, view = "", memoryview(b"")
    for shard, offset, length in zip(shards, offsets, lengths, strict=True):
        if shard not in wanted:
            continue
        if shard != last:
            last, view = shard, reader.view(shard)
        yield view[offset : offset + length]


def by_walk(store: Store, keys: list[str]) -> Images:
    """Ours without a manifest: every header is checked against its checksum and its bounds; images are not hashed."""
    for key in keys:
        tar = BytesOfObject(store, key, store.size(key) or 0)
        for member in walk(tar):
            if member.kind == PLAIN and member.name.endswith(".jpg"):
                yield tar.view(member.offset, member.length)


def by_index(store: Store, keys: list[str]) -> Images:
    """Ours as tars of strangers are indexed: sidecars parsed, every image hashed."""
    for key in keys:
        tar = BytesOfObject(store, key, store.size(key) or 0)
        for found in TarIndex(tar, key, is_strict=False).accept():
            if not isinstance(found, Rejection):
                yield found[1]


def raw_walk(folder: Path, keys: list[str]) -> Images:
    """The limit: sizes and names out of a mapped tar, no check of anything."""
    for key in keys:
        with (folder / key).open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view, position = memoryview(data), 0
        while data[position]:
            size = int(data[position + 124 : position + 135], 8)
            if data[position : data.find(b"\0", position)].endswith(b".jpg"):
                yield view[position + 512 : position + 512 + size]
            position += 512 + size + -size % 512


def raw_get(store: Store, keys: list[str]) -> Images:
    """The limit for object storage: one GET a shard and the same bare walk."""
    for key in keys:
        data, position = store.read(key), 0
        view = memoryview(data)
        while data[position]:
            size = int(data[position + 124 : position + 135], 8)
            if data[position : data.find(b"\0", position)].endswith(b".jpg"):
                yield view[position + 512 : position + 512 + size]
            position += 512 + size + -size % 512


def by_webdataset(urls: list[str]) -> Images:
    """webdataset, no decoding, no shuffle, in this process."""
    import webdataset

    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        yield sample["jpg"]
