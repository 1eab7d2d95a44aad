"""The global sequence of images: endless, the same for every number of workers, computed where it is needed and never stored.

One source. Each epoch visits every image once. Its shards are put in a keyed random order and cut into windows of about
`window_images` images; within a window the shards are dealt to lanes, each lane's images are shuffled, and the lanes are
interleaved evenly. So the order is random over a window (a small data set is one window), while a stretch of the sequence that
belongs to one lane needs only that lane's few shards.

Several sources. A keyed random pattern of 65,536 slots, repeated for ever, says whose turn it is; each source goes on in its
own epochs.

A batch holds consecutive positions, sorted by lane; each rank takes an equal slice of that. So ranks of any world size together
see the same batch in the same order, and a rank keeps reading from the same few shards while a window lasts.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from heliostat.data.config import ShuffleConfig
from heliostat.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]
_Made = TypeVar("_Made")

_GOLDEN = 0x9E3779B97F4A7C15  # the odd constant of splitmix64 (Steele et al. 2014)
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_PATTERN_SLOTS = 65_536  # resolution of the sampling weights
_KEPT_WINDOWS = 4  # the one in use, the next, and room for a planner that looks ahead
_LANE_STEPS = 1 << 32  # lanes of windows with different numbers of lanes are compared as fractions of this


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): 64 bits to 64 well-mixed bits, elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(*words: int) -> int:
    """One 64-bit key from several numbers."""
    key = 0
    for word in words:
        key = int(mix(np.array([(key + _GOLDEN + (word & _MASK_64)) & _MASK_64], np.uint64))[0])
    return key


def random_words(values: Ints, key: int) -> npt.NDArray[np.uint64]:
    """A random 64-bit word for each value, a pure function of (value, key)."""
    return mix(mix(values.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)))


def shuffled(values: Ints, key: int) -> Ints:
    """The values in the order of their random words. No numpy generator is used: their streams may change with a release."""
    return values[np.argsort(random_words(values, key), kind="stable")]


@dataclass(frozen=True)
class Places:
    """Images at some positions, as arrays of equal length.

    source: which source. epoch: how often that source was visited completely before. image: its row in the source. lane: where
    its lane lies among the lanes of its window, 0 to 2**32.
    """

    source: Ints
    epoch: Ints
    image: Ints
    lane: Ints

    def __len__(self) -> int:
        return len(self.image)

    def take(self, chosen: Ints | slice) -> "Places":
        """Some of them."""
        return Places(*(getattr(self, field.name)[chosen] for field in fields(self)))


def _joined(parts: Sequence[Places]) -> Places:
    return Places(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Places)))


class _Recent:
    """The last few results of a pure function; safe between threads."""

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._made: OrderedDict[tuple[int, ...], object] = OrderedDict()

    def get(self, key: tuple[int, ...], make: Callable[[], _Made]) -> _Made:
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]  # type: ignore[return-value]
        made = make()
        with self._lock:
            self._made[key] = made
            while len(self._made) > self._size:
                self._made.popitem(last=False)
        return made


class SourceOrder:
    """The endless sequence of one source."""

    def __init__(self, counts: Ints, *, key: int, shuffle: ShuffleConfig) -> None:
        """counts: images of each shard, all positive."""
        self._counts, self._key, self._shuffle = counts, key, shuffle
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.num_images = int(self._first[-1])
        self._num_windows = min(len(counts), max(1, round(self.num_images / shuffle.window_images)))
        self._epochs, self._windows = _Recent(2), _Recent(_KEPT_WINDOWS)

    def locate(self, start: int, stop: int, source: int = 0) -> Places:
        """The images at positions start to stop."""
        parts = []
        while start < stop:
            epoch, begin = divmod(start, self.num_images)
            _, starts = self._epoch(epoch)
            window = int(np.searchsorted(starts, begin, side="right")) - 1
            images, lanes = self._window(epoch, window)
            here = slice(
                begin - int(starts[window]), min(stop - epoch * self.num_images, int(starts[window + 1])) - int(starts[window])
            )
            size = here.stop - here.start
            parts.append(Places(np.full(size, source), np.full(size, epoch), images[here], lanes[here]))
            start += size
        return _joined(parts)

    def _epoch(self, epoch: int) -> tuple[list[Ints], Ints]:
        """The shards of each window of an epoch, and the positions in the epoch where the windows start and end."""

        def make() -> tuple[list[Ints], Ints]:
            order = shuffled(np.arange(len(self._counts)), key_of(self._key, epoch))
            windows = np.array_split(order, self._num_windows)
            sizes = [int(self._counts[shards].sum()) for shards in windows]
            return windows, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

        return self._epochs.get((epoch,), make)

    def _window(self, epoch: int, window: int) -> tuple[Ints, Ints]:
        """(image, lane) at each position of a window."""

        def make() -> tuple[Ints, Ints]:
            shards = self._epoch(epoch)[0][window]
            return self._interleaved(shards, key_of(self._key, epoch, window))

        return self._windows.get((epoch, window), make)

    def _interleaved(self, shards: Ints, key: int) -> tuple[Ints, Ints]:
        num_lanes = min(self._shuffle.lanes, len(shards))
        counts = self._counts[shards]
        lane = np.repeat(np.arange(len(shards)) % num_lanes, counts)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        images = np.arange(counts.sum()) - np.repeat(starts - self._first[shards], counts)
        by_lane = np.lexsort((random_words(images, key), lane))  # shuffled within its lane
        images, lane = images[by_lane], lane[by_lane]
        sizes = np.bincount(lane, minlength=num_lanes)
        place = np.arange(len(lane)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        evenly = np.lexsort((lane, (2 * place + 1) / (2 * sizes[lane])))
        return images[evenly], lane[evenly] * (_LANE_STEPS // num_lanes)


class GlobalOrder:
    """The endless sequence over all sources, and the batches in it."""

    def __init__(self, counts: Sequence[Ints], *, weights: Sequence[float] = (1.0,), seed: int, shuffle: ShuffleConfig) -> None:
        """counts: for each source the images of each shard. weights: sampling weights of the sources, of any sum.

        Raises DataError for a source without images, ConfigError for weights that do not fit.
        """
        if any(len(one) == 0 or one.min() < 1 for one in counts):
            raise DataError("a source has no images, or a shard without any; curate or ingest some first")
        self._slots = _slots(weights, len(counts))
        self._sources = [SourceOrder(one, key=key_of(seed, number), shuffle=shuffle) for number, one in enumerate(counts)]
        pattern = np.repeat(np.arange(len(counts)), self._slots)
        self._pattern = pattern[shuffled(np.arange(_PATTERN_SLOTS), key_of(seed, 0x6D6978))]
        turns = self._pattern[None, :] == np.arange(len(counts))[:, None]
        self._before = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(turns, axis=1)], axis=1)
        self.digest = _digest(counts, self._slots, seed, shuffle)
        """Changes with everything that changes the sequence; equal digests mean equal sequences."""

    def locate(self, start: int, stop: int) -> Places:
        """The images at positions start to stop, in the order of the sequence."""
        if len(self._sources) == 1:
            return self._sources[0].locate(start, stop)
        turns = self._pattern[np.arange(start, stop) % _PATTERN_SLOTS]
        parts, places = [], []
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(turns == number)
            if len(mine):
                begin = self._turns_before(number, start)
                parts.append(source.locate(begin, begin + len(mine), number))
                places.append(mine)
        return _joined(parts).take(np.argsort(np.concatenate(places), kind="stable"))

    def _turns_before(self, source: int, position: int) -> int:
        cycle, slot = divmod(position, _PATTERN_SLOTS)
        return cycle * int(self._slots[source]) + int(self._before[source, slot])

    def batch(self, start: int, size: int) -> Places:
        """The batch of `size` images from position `start`, in its canonical order: by lane, then by position."""
        places = self.locate(start, start + size)
        return places.take(np.argsort(places.lane, kind="stable"))

    def image_number(self, source: int, image: int) -> int:
        """One number for each image over all sources: what keys its crops."""
        return sum(one.num_images for one in self._sources[:source]) + image


def _slots(weights: Sequence[float], num_sources: int) -> Ints:
    """Whole slots of the pattern for each source, by largest remainder."""
    if len(weights) != num_sources or min(weights) <= 0:
        raise ConfigError(f"sampling weights {list(weights)} must be one positive number for each of {num_sources} sources")
    exact = np.asarray(weights, np.float64) / sum(weights) * _PATTERN_SLOTS
    slots = np.floor(exact).astype(np.int64)
    rest = np.argsort(slots - exact, kind="stable")[: _PATTERN_SLOTS - int(slots.sum())]
    slots[rest] += 1
    if slots.min() < 1:
        raise ConfigError(
            f"sampling weight {min(weights):g} of {sum(weights):g} is below 1/{_PATTERN_SLOTS}; leave the source out"
        )
    return slots


def _digest(counts: Sequence[Ints], slots: Ints, seed: int, shuffle: ShuffleConfig) -> str:
    digest = hashlib.sha256(f"{seed} {shuffle.window_images} {shuffle.lanes} {slots.tolist()}".encode())
    for one in counts:
        digest.update(hashlib.sha256(np.ascontiguousarray(one, "<i8").tobytes()).digest())
    return digest.hexdigest()
