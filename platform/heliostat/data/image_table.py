"""The images of one artifact as plain arrays: 44 bytes an image, shared between the processes of a node without copies."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.errors import DataError

# Shapes: N images, S shards.

_ID_BYTES = 32  # sha256
_MAX_LENGTH = 2**31 - 1
_DIGESTED_IDS = 65_536  # two data sets that agree in as many ids are the same one


@dataclass(frozen=True)
class ImageTable:
    """Where every image lies. The images of a shard are neighbours: shard s holds rows first[s] to first[s + 1].

    shards: S keys. first: (S + 1,) int64. offset: (N,) int64 and length: (N,) int32, in bytes within the shard. ids: (N, 32)
    uint8, the sha256 of the bytes.
    """

    shards: tuple[str, ...]
    first: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    ids: npt.NDArray[np.uint8]

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.offset)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(S,) images of each shard."""
        return np.diff(self.first)

    @cached_property
    def shard_bytes(self) -> npt.NDArray[np.int64]:
        """(S,) where the last image of each shard ends: about the size of the shard, in bytes."""
        ends: npt.NDArray[np.int64] = np.maximum.reduceat(self.offset + self.length, self.first[:-1])
        return ends

    @cached_property
    def digest(self) -> str:
        """sha256 over the number of images and evenly spaced ids, hex: all ids of up to 65,536 images, milliseconds for any."""
        spaced = self.ids[:: -(-self.num_images // _DIGESTED_IDS) or 1]
        return hashlib.sha256(f"{self.num_images} ".encode() + spaced.tobytes()).hexdigest()

    def shard_of(self, images: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The shard numbers of images."""
        return np.searchsorted(self.first, images, side="right") - 1

    def shard(self, image: int) -> str:
        """The key of an image's shard."""
        return self.shards[int(np.searchsorted(self.first, image, side="right")) - 1]

    def id(self, image: int) -> str:
        """The id of an image: sha256 of its bytes, hex."""
        return bytes(self.ids[image]).hex()


def image_table(manifest: pa.Table) -> ImageTable:
    """The arrays of a manifest, with the rows of a shard moved together. Raises DataError for an id that is no sha256."""
    manifest = manifest.select(["id", "shard", "offset", "length"]).combine_chunks()
    codes, shards = _shard_codes(manifest["shard"])
    if np.any(np.diff(codes) < 0):
        order = np.argsort(codes, kind="stable")
        codes, manifest = codes[order], manifest.take(pa.array(order))
    first = np.searchsorted(codes, np.arange(len(shards) + 1)).astype(np.int64)
    length = manifest["length"].to_numpy()
    if len(length) and int(length.max()) > _MAX_LENGTH:
        raise DataError(f"an image of the manifest has {int(length.max())} bytes, the limit is {_MAX_LENGTH}; remove it")
    offset = np.ascontiguousarray(manifest["offset"].to_numpy(), np.int64)
    return ImageTable(tuple(shards), first, offset, length.astype(np.int32), _id_bytes(manifest["id"]))


def _shard_codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], Sequence[str]]:
    """The shard keys in order of appearance, and the number of its key for each row."""
    encoded = pc.dictionary_encode(column).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([], pa.dictionary(pa.int32(), pa.string()))
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _id_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    lengths = pc.unique(pc.utf8_length(column)).to_pylist()
    if lengths not in ([], [2 * _ID_BYTES]):
        raise DataError(f"ids of the manifest have lengths {sorted(lengths)[:5]}, expected 64 hex digits each; index it again")
    try:
        raw = b"".join(bytes.fromhex("".join(chunk.to_pylist())) for chunk in column.chunks)
    except ValueError as error:
        raise DataError("ids of the manifest are not hex digits; index it again") from error
    return np.frombuffer(raw, np.uint8).reshape(-1, _ID_BYTES)
