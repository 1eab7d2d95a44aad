"""Endless batches for one rank, where every step can be computed directly.

The global sequence of images is a pure function of (seed, position): each epoch visits the manifest in the order of a keyed
permutation that is computed, never stored. Step s holds the positions s * global_batch_size and on, rank r takes the r-th
slice of them. So a run resumes exactly at any step, and the ranks of any world size together see the same images in the same
order. Threads read, decode and augment; OpenCV, torch and the decoders release the interpreter lock while they work.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from heliostat.data.augment import Pixels, multi_crop
from heliostat.data.batch import Batch
from heliostat.data.config import NUM_GLOBAL_CROPS, CropsConfig, DecodeConfig, LoaderConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.data.masking import MaskSettings, batch_masks
from heliostat.errors import ConfigError, DataError

# Shapes: B images of this rank, G global crops, L local crops, C channels, H W global side, h w local side, N patches.

Read = Callable[[str, int, int], bytes]

_FEISTEL_ROUNDS = 4  # enough for a permutation that no simple test tells from random (Luby and Rackoff 1988)
_MAX_REPLACEMENTS = 100  # bad images in a row before the data set, not the image, is at fault
_MASK_64 = 0xFFFFFFFFFFFFFFFF


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): 64 bits to 64 well-mixed bits."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


def permuted(index: int, num_images: int, key: int) -> int:
    """The place of `index` in a keyed permutation of range(num_images), in constant memory.

    A Feistel network permutes the next power of four; results outside the range walk on along their cycle (Black and Rogaway
    2002), fewer than four steps on average.
    """
    half_bits = max(1, ((num_images - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(key + number * 0x9E3779B97F4A7C15 + (right << 8) & _MASK_64) & half_mask)
        index = left << half_bits | right
        if index < num_images:
            return index


def image_at(position: int, num_images: int, seed: int) -> tuple[int, int]:
    """(epoch, image index) at a position of the endless global sequence."""
    epoch, index = divmod(position, num_images)
    return epoch, permuted(index, num_images, _mix(_mix(seed & _MASK_64) + epoch & _MASK_64))


@dataclass(frozen=True)
class LoaderStatistics:
    """Counts since the loader was made. data_wait_seconds: how long `iterate` kept its caller waiting for a batch."""

    data_wait_seconds: float
    images: int
    bytes: int
    decode_failures: dict[str, int]


@dataclass
class _Counts:
    lock: threading.Lock = field(default_factory=threading.Lock)
    data_wait_seconds: float = 0.0
    images: int = 0
    bytes: int = 0
    decode_failures: Counter[str] = field(default_factory=Counter)


class _DecodedImages:
    """Decoded images up to a bound in bytes, shared between threads; the first come stay.

    Nothing is evicted: every image is used once per epoch in a fresh order, where a full cache that stays serves its share of
    the data set and one that evicts the least recently used serves less than half of that.
    """

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._images: dict[int, Pixels] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> Pixels | None:
        return self._images.get(index)

    def put(self, index: int, image: Pixels) -> None:
        with self._lock:
            if index not in self._images and image.nbytes <= self._free_bytes:
                self._images[index] = image
                self._free_bytes -= image.nbytes


@dataclass(frozen=True)
class _BatchArrays:
    """The memory of one batch; each image is written to its own slots by its own thread."""

    global_crops: npt.NDArray[np.uint8]
    local_crops: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]
    image_ids: list[str]

    def batch(self) -> Batch:
        return Batch(
            torch.from_numpy(self.global_crops),
            torch.from_numpy(self.local_crops),
            torch.from_numpy(self.masks),
            tuple(self.image_ids),
        )


class ImageLoader:
    """Batches of one rank: `batch(step)` computes one, `iterate` prepares a run of them ahead in threads."""

    def __init__(
        self,
        manifest: pa.Table,
        read: Read,
        *,
        crops: CropsConfig,
        loader: LoaderConfig,
        masks: MaskSettings,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        decoding: DecodeConfig | None = None,
    ) -> None:
        """Assign; nothing is read yet.

        manifest: MANIFEST_SCHEMA. read: (shard key, offset, length) -> bytes, called from several threads at once; what it
        raises reaches the consumer. Raises ConfigError (batch, rank, patches) and DataError (no images).
        """
        if global_batch_size < 1 or global_batch_size % world_size:
            fit = max(1, global_batch_size // world_size) * world_size
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not divisible by {world_size} workers; "
                f"use {fit} or {fit + world_size}"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is outside of 0..{world_size - 1}")
        if manifest.num_rows == 0:
            raise DataError("the manifest has no images; curate or ingest some first")
        self._manifest = manifest.select(["id", "shard", "offset", "length"]).combine_chunks()
        self._read = read
        self._crops, self._loader, self._decoding = crops, loader, decoding or DecodeConfig()
        self._masks, self._grid_hw = masks, masks.grid(crops.global_crops_size)
        self._seed, self._rank = seed, rank
        self._global_batch_size, self._batch_size = global_batch_size, global_batch_size // world_size
        self._images = _DecodedImages(loader.cache_bytes)
        self._counts = _Counts()

    @property
    def num_images(self) -> int:
        """Images in the manifest: the length of an epoch."""
        return int(self._manifest.num_rows)

    def statistics(self) -> LoaderStatistics:
        """What was done so far; callable at any time from any thread."""
        with self._counts.lock:
            counts = self._counts
            failures = dict(sorted(counts.decode_failures.items()))
            return LoaderStatistics(counts.data_wait_seconds, counts.images, counts.bytes, failures)

    def batch(self, step: int) -> Batch:
        """Compute the batch of one step in the caller's thread."""
        arrays = self._new_arrays()
        self._draw_masks(arrays, step)
        for slot in range(self._batch_size):
            self._fill(arrays, step, slot)
        return arrays.batch()

    def iterate(self, start_step: int, num_steps: int) -> Generator[Batch, None, None]:
        """Yield the batches of start_step, start_step + 1, ...; closing the iterator stops its threads."""
        steps = range(start_step, start_step + num_steps)
        batches = self._prefetch(steps) if self._loader.workers else (self.batch(step) for step in steps)
        try:
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                with self._counts.lock:
                    self._counts.data_wait_seconds += time.perf_counter() - began
                if batch is None:
                    return
                yield batch
        finally:
            batches.close()

    def _prefetch(self, steps: range) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self._loader.workers, thread_name_prefix="heliostat-loader")
        waiting: deque[tuple[_BatchArrays, list[Future[None]]]] = deque()
        try:
            for step in steps:
                arrays = self._new_arrays()
                fills = [pool.submit(self._fill, arrays, step, slot) for slot in range(self._batch_size)]
                waiting.append((arrays, [*fills, pool.submit(self._draw_masks, arrays, step)]))
                if len(waiting) > self._loader.prefetch_batches:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _new_arrays(self) -> _BatchArrays:
        """Memory for one batch."""
        crops, num_global = self._crops, NUM_GLOBAL_CROPS * self._batch_size
        side, local_side = crops.global_crops_size, crops.local_crops_size
        return _BatchArrays(
            np.empty((num_global, 3, side, side), np.uint8),
            np.empty((crops.local_crops_number * self._batch_size, 3, local_side, local_side), np.uint8),
            np.empty((num_global, self._grid_hw[0] * self._grid_hw[1]), np.bool_),
            [""] * self._batch_size,
        )

    def _draw_masks(self, arrays: _BatchArrays, step: int) -> None:
        own = range(self._rank * self._batch_size, (self._rank + 1) * self._batch_size)
        arrays.masks[:] = batch_masks(self._masks, self._grid_hw, self._global_batch_size, seed=self._seed, step=step, own=own)

    def _fill(self, arrays: _BatchArrays, step: int, slot: int) -> None:
        """Read, decode and augment one image into its slots."""
        position = step * self._global_batch_size + self._rank * self._batch_size + slot
        index, image = self._decodable_image(position)
        # Keyed by the position's own image: an image that also replaces its neighbour is cropped differently the second time.
        crops = multi_crop(image, self._crops, (self._seed, *image_at(position, self.num_images, self._seed)))
        for target_NCHW, crops_HWC in zip((arrays.global_crops, arrays.local_crops), crops, strict=True):
            for number, crop_HWC in enumerate(crops_HWC):
                target_NCHW[number * self._batch_size + slot] = crop_HWC.transpose(2, 0, 1)
        arrays.image_ids[slot] = self._manifest["id"][index].as_py()
        with self._counts.lock:
            self._counts.images += 1

    def _decodable_image(self, position: int) -> tuple[int, Pixels]:
        """(index, pixels) at a position, or of the next position whose image can be decoded; each failure is counted."""
        for replacement in range(position, position + _MAX_REPLACEMENTS):
            _, index = image_at(replacement, self.num_images, self._seed)
            try:
                return index, self._pixels(index)
            except ImageRejected as rejected:
                last = rejected
                with self._counts.lock:
                    self._counts.decode_failures[rejected.reason] += 1
        raise DataError(
            f"{_MAX_REPLACEMENTS} images in a row cannot be decoded, the last one: {last}; curate the data set first"
        ) from last

    def _pixels(self, index: int) -> Pixels:
        """Decoded pixels of one image, from memory where they are kept."""
        image = self._images.get(index)
        if image is None:
            row = (self._manifest[name][index].as_py() for name in ("shard", "offset", "length"))
            data = self._read(*row)
            with self._counts.lock:
                self._counts.bytes += len(data)
            image = decode(data, self._decoding)
            self._images.put(index, image)
        return image


def _finished(arrays: _BatchArrays, fills: list[Future[None]]) -> Batch:
    """Wait for every image of a batch; the first exception of a thread is raised here."""
    for fill in fills:
        fill.result()
    return arrays.batch()
