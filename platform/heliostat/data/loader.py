"""Endless batches for one rank, where every step can be computed directly.

What a step holds is a pure function of (sources, seed, step), see `order`: a run resumes exactly at any step, and the ranks of
any world size together see the same batches. Threads read, decode and augment; OpenCV, torch and the decoders release the
interpreter lock while they work. A batch that nobody takes stops them: at most `prefetch_batches` wait.
"""

import hashlib
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heliostat.data.batch import Batch
from heliostat.data.batch_arrays import BatchArrays, new_arrays
from heliostat.data.config import CropsConfig, DecodeConfig, LoaderConfig, ShuffleConfig
from heliostat.data.image_source import ImageSource, PixelReader, ReadBytes
from heliostat.data.loader_counts import LoaderCounts, LoaderStatistics
from heliostat.data.masking import MaskSettings, batch_masks
from heliostat.data.order import GlobalOrder, Places
from heliostat.data.position import Position
from heliostat.data.quarantine import Rejection
from heliostat.data.raw_batch import RawBatch
from heliostat.data.shard_window import ShardWindow
from heliostat.errors import ConfigError


@dataclass(frozen=True)
class _Plan:
    """The images of one step on this rank."""

    step: int
    places: Places


class ImageLoader:
    """Batches of one rank: `batch(step)` computes one, `batches` prepares a run of them ahead in threads."""

    def __init__(
        self,
        sources: Sequence[ImageSource],
        *,
        crops: CropsConfig,
        loader: LoaderConfig,
        masks: MaskSettings,
        global_batch_size: int,
        seed: int,
        shuffle: ShuffleConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        decoding: DecodeConfig | None = None,
        pinned: bool | None = None,
    ) -> None:
        """Assign; nothing is read yet. pinned: whether batches lie in pinned memory; None: where there is a GPU.

        What a reader raises reaches the consumer. Raises ConfigError (batch, rank, patches, weights) and DataError (no images).
        """
        if global_batch_size < 1 or global_batch_size % world_size:
            fit = max(1, global_batch_size // world_size) * world_size
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not divisible by {world_size} workers; "
                f"use {fit} or {fit + world_size}"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is outside of 0..{world_size - 1}")
        shuffle = shuffle or ShuffleConfig()
        self._sources = tuple(sources)
        self._order = GlobalOrder(
            [source.table.counts for source in sources],
            weights=[source.weight for source in sources],
            seed=seed,
            shuffle=shuffle,
        )
        self._pixels = PixelReader(self._sources, decoding or DecodeConfig(), crops, loader.cache_bytes)
        self._crops, self._loader, self._shuffle = crops, loader, shuffle
        self._masks, self._grid_hw = masks, masks.grid(crops.global_crops_size)
        self._seed, self._rank = seed, rank
        self._global_batch_size, self._batch_size = global_batch_size, global_batch_size // world_size
        self._counts = LoaderCounts()
        digests = (self._order.digest, *(source.table.digest for source in self._sources))
        self._position = Position(hashlib.sha256(" ".join(digests).encode()).hexdigest(), global_batch_size)
        self._pinned = torch.cuda.is_available() if pinned is None else pinned

    @property
    def num_images(self) -> int:
        """Images of all sources."""
        return sum(source.table.num_images for source in self._sources)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands after the last batch that was handed out; the same on every rank, for every world size."""
        return self._position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood. Raises DataError when it had another sequence or stood in the middle of a batch."""
        self._position.load_state_dict(state)

    def statistics(self) -> LoaderStatistics:
        """What was done so far; callable at any time from any thread."""
        return self._counts.statistics()

    def take_rejections(self) -> list[Rejection]:
        """What was turned away in the batches that were handed out since the last call."""
        return self._counts.take_rejections()

    def batch(self, step: int) -> Batch | RawBatch:
        """Compute the batch of one step in the caller's thread."""
        arrays, plan = self._new_arrays(), self._plan(step)
        self._draw_masks(arrays, step)
        for slot in range(self._batch_size):
            self._fill(arrays, plan, slot, self._read_image)
        return self._handed_out(arrays, step)

    def batches(self, num_steps: int) -> Generator[Batch | RawBatch, None, None]:
        """Yield the next `num_steps` batches; closing the iterator stops its threads."""
        first = self._position.next_step
        steps = range(first, first + num_steps)
        batches = self._prefetch(steps) if self._loader.workers else (self.batch(step) for step in steps)
        try:
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                self._counts.add(data_wait_seconds=time.perf_counter() - began)
                if batch is None:
                    return
                yield batch
        finally:
            batches.close()

    def _prefetch(self, steps: range) -> Generator[Batch | RawBatch, None, None]:
        pool = ThreadPoolExecutor(self._loader.workers, thread_name_prefix="heliostat-loader")
        waiting: deque[tuple[int, BatchArrays, list[Future[None]]]] = deque()
        window = self._shard_window()
        try:
            for plan in self._plans(steps, window):
                arrays = self._new_arrays()
                read = self._read_image if window is None else window.read
                fills = [pool.submit(self._fill, arrays, plan, slot, read) for slot in range(self._batch_size)]
                waiting.append((plan.step, arrays, [*fills, pool.submit(self._draw_masks, arrays, plan.step)]))
                if len(waiting) > self._loader.prefetch_batches:
                    yield self._finished(*waiting.popleft(), window)
            while waiting:
                yield self._finished(*waiting.popleft(), window)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if window is not None:
                window.close()

    def _finished(
        self, step: int, arrays: BatchArrays, fills: list[Future[None]], window: ShardWindow | None
    ) -> Batch | RawBatch:
        """Wait for every image of a batch; the first exception of a thread is raised here."""
        for fill in fills:
            fill.result()
        if window is not None:
            window.done(step)
        return self._handed_out(arrays, step)

    def _handed_out(self, arrays: BatchArrays, step: int) -> Batch | RawBatch:
        self._counts.add(rejections=arrays.rejections)
        self._position.next_step = step + 1
        return arrays.batch()

    def _plan(self, step: int) -> _Plan:
        places = self._order.batch(step * self._global_batch_size, self._global_batch_size)
        return _Plan(step, places.take(slice(self._rank * self._batch_size, (self._rank + 1) * self._batch_size)))

    def _shard_window(self) -> ShardWindow | None:
        """Memory for whole shards, where they are read that way."""
        remote = any(source.reader.is_remote(source.table.shards[0]) for source in self._sources)
        if not {"auto": remote, "shards": True, "images": False}[self._loader.read_by]:
            return None
        window = ShardWindow(self._read_image, self._read_shard, self._loader.shard_bytes)
        window.start()
        return window

    def _read_image(self, source: int, shard: str, offset: int, length: int) -> bytes:
        data = self._sources[source].reader(shard, offset, length)
        self._counts.add(num_bytes=len(data))
        return data

    def _read_shard(self, source: int, shard: str) -> bytes:
        data = self._sources[source].reader.whole(shard)
        self._counts.add(num_bytes=len(data))
        return data

    def _plans(self, steps: range, window: ShardWindow | None) -> Generator[_Plan, None, None]:
        """The plans of all steps; with a window they are made ahead, so that it knows which shards are coming."""
        horizon = min(self._shuffle.window_images, self.num_images)
        ahead = 1 if window is None else -(-horizon // self._global_batch_size)
        planned: deque[_Plan] = deque()
        for step in steps:
            planned.append(self._plan(step))
            if window is not None:
                self._expect(planned[-1], window)
            if len(planned) >= ahead:
                yield planned.popleft()
        yield from planned

    def _expect(self, plan: _Plan, window: ShardWindow) -> None:
        """Tell the window how many bytes of which shards a step needs."""
        for number, source in enumerate(self._sources):
            images = plan.places.image[plan.places.source == number]
            shards, inverse = np.unique(source.table.shard_of(images), return_inverse=True)
            needed = np.bincount(inverse, weights=source.table.length[images])
            for shard, num_bytes in zip(shards.tolist(), needed.tolist(), strict=True):
                size = int(source.table.shard_bytes[shard])
                window.expect(plan.step, (number, source.table.shards[shard]), shard_bytes=size, image_bytes=int(num_bytes))

    def _new_arrays(self) -> BatchArrays:
        num_patches = self._grid_hw[0] * self._grid_hw[1]
        return new_arrays(self._batch_size, self._crops, num_patches, pinned=self._pinned)

    def _draw_masks(self, arrays: BatchArrays, step: int) -> None:
        own = range(self._rank * self._batch_size, (self._rank + 1) * self._batch_size)
        arrays.masks[:] = batch_masks(self._masks, self._grid_hw, self._global_batch_size, seed=self._seed, step=step, own=own)

    def _fill(self, arrays: BatchArrays, plan: _Plan, slot: int, read: ReadBytes) -> None:
        """Read, decode and augment one image into its slots."""
        places = plan.places
        source, epoch, image = int(places.source[slot]), int(places.epoch[slot]), int(places.image[slot])
        found = self._pixels.find(source, image, read)
        # Keyed by the image that was meant: one that also stands in for its neighbour is cropped differently the second time.
        key = (self._seed, epoch, self._order.image_number(source, image))
        arrays.take(slot, found.pixels, key, self._sources[source].table.id(found.image))
        arrays.rejections.extend(found.rejections)
        self._counts.add(images=1)
