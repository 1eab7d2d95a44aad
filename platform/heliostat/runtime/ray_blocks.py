"""Batches as blocks of Ray Data: what a data worker yields and a training worker reads.

A block is an Arrow table of one row: a step of one data worker. Crops and masks are the raw bytes of their arrays, so that a
block is built without a copy, written to shared memory once, and read from there without a copy.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from heliostat import errors
from heliostat.data.batch import Batch
from heliostat.data.config import NUM_GLOBAL_CROPS
from heliostat.data.loading import Loading
from heliostat.data.quarantine import Rejection
from heliostat.data.raw_batch import RawBatch
from heliostat.errors import HeliostatError

_ARRAYS = ("global_crops", "local_crops", "masks")
_NOTES = ("image_ids", "rejections", "error")  # JSON
_BLOCKS_ON_THE_WAY = 4  # measured: being written, announced, read, and held by the training worker, besides those that wait


def slice_bytes(loading: Loading, num_images: int) -> int:
    """Bytes of the crops and masks of some images."""
    crops = loading.crops
    pixels = NUM_GLOBAL_CROPS * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2
    return num_images * (3 * pixels + NUM_GLOBAL_CROPS * num_patches(loading))


def object_store_bytes(loading: Loading, world_size: int) -> int:
    """The most bytes that batches of one training worker take in the object store."""
    num_blocks = loading.loader.prefetch_batches + _BLOCKS_ON_THE_WAY
    return num_blocks * slice_bytes(loading, loading.global_batch_size // world_size)


def num_patches(loading: Loading) -> int:
    """Patches of a global crop."""
    height, width = loading.masks.grid(loading.crops.global_crops_size)
    return height * width


@dataclass(frozen=True)
class Slice:
    """What one data worker made of one step. num_bytes: fetched since its last slice."""

    step: int
    crops_and_masks: tuple[npt.NDArray[Any], ...]
    image_ids: Sequence[str]
    rejections: Sequence[Rejection]
    num_bytes: int


def to_block(step: int, batch: Batch | RawBatch, rejections: Sequence[Rejection], num_bytes: int) -> pa.Table:
    """A batch as a block; the block shares its memory. Decoded images without crops have no form as a block."""
    if not isinstance(batch, Batch):
        raise TypeError(f"a block holds crops, not a {type(batch).__name__}")
    columns = {name: _bytes(getattr(batch, name).numpy()) for name in _ARRAYS}
    columns |= {"step": pa.array([step]), "num_bytes": pa.array([num_bytes])}
    notes = {"image_ids": batch.image_ids, "rejections": [asdict(one) for one in rejections], "error": None}
    return pa.table(columns | {name: pa.array([json.dumps(value)]) for name, value in notes.items()})


def error_block(error: HeliostatError) -> pa.Table:
    """An error of ours as a block, so that it arrives without Ray's wrapping."""
    columns = {name: _bytes(np.empty(0, np.uint8)) for name in _ARRAYS}
    columns |= {"step": pa.array([-1]), "num_bytes": pa.array([0])}
    notes = {"image_ids": [], "rejections": [], "error": [type(error).__name__, str(error)]}
    return pa.table(columns | {name: pa.array([json.dumps(value)]) for name, value in notes.items()})


def from_block(block: pa.Table) -> Slice:
    """The slice of a block; its arrays are flat, read-only and lie in the block. Raises the error of an error block."""
    notes = {name: json.loads(block[name][0].as_py()) for name in _NOTES}
    if notes["error"]:
        kind, text = notes["error"]
        raise getattr(errors, kind)(text)
    return Slice(
        block["step"][0].as_py(),
        tuple(_memory(block[name].chunk(0)) for name in _ARRAYS),
        notes["image_ids"],
        [Rejection(**one) for one in notes["rejections"]],
        block["num_bytes"][0].as_py(),
    )


def _bytes(array: npt.NDArray[Any]) -> pa.Array:
    """One row that holds the memory of an array."""
    ends = pa.py_buffer(np.array([0, array.nbytes], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(np.ascontiguousarray(array))])


def _memory(row: pa.LargeBinaryArray) -> npt.NDArray[np.uint8]:
    """The bytes of one row where they lie; its scalar would be a copy."""
    _, ends, data = row.buffers()
    start, stop = np.frombuffer(ends, np.int64)[row.offset : row.offset + 2]
    return np.frombuffer(data, np.uint8)[start:stop]
