"""Whole shards in memory while the coming batches need them, for stores where one large read is cheaper than many small ones.

The loader says which shards each coming batch will touch (`expect`) and when a batch is done (`done`). Threads fetch the shards
in the order of their first use while they fit into the memory; a shard that no coming batch needs gives its room back. What
does not fit, or is needed for a few images only, is read image by image: memory stays bounded, nothing is fetched twice.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

ShardKey = tuple[int, str]  # source number, shard key

_FEW_USES_RATIO = 0.25  # below this share of a shard's bytes single images cost less than the shard (assumption, not studied)


@dataclass
class _Shard:
    num_bytes: int
    last_step: int
    used_bytes: int = 0
    fetch: Future[bytes] | None = None


@dataclass
class ShardWindow:
    """Bytes of images by (source, shard, offset, length). Safe between threads; `close` stops its threads.

    read_image and read_shard fetch from the store; max_bytes bounds the shards that are held or on their way.
    """

    read_image: Callable[[int, str, int, int], bytes]
    read_shard: Callable[[int, str], bytes]
    max_bytes: int
    num_threads: int = 2
    _shards: "OrderedDict[ShardKey, _Shard]" = field(default_factory=OrderedDict)
    _held_bytes: int = 0
    _closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _threads: list[threading.Thread] = field(default_factory=list)

    def expect(self, step: int, key: ShardKey, *, shard_bytes: int, image_bytes: int) -> None:
        """A coming batch will use `image_bytes` of a shard of `shard_bytes`. Steps must not fall."""
        with self._changed:
            shard = self._shards.setdefault(key, _Shard(shard_bytes, step))
            shard.last_step = step
            shard.used_bytes += image_bytes
            self._changed.notify_all()

    def done(self, step: int) -> None:
        """All batches up to `step` have been read: shards that none of the expected ones needs are let go."""
        with self._changed:
            for key in [key for key, shard in self._shards.items() if shard.last_step <= step]:
                shard = self._shards.pop(key)
                if shard.fetch is not None:
                    self._held_bytes -= shard.num_bytes
            self._changed.notify_all()

    def read(self, source: int, shard: str, offset: int, length: int) -> bytes:
        """The bytes of one image; what the store raises is raised here."""
        with self._changed:
            expected = self._shards.get((source, shard))
            fetch = expected.fetch if expected is not None else None
        if fetch is None:
            return self.read_image(source, shard, offset, length)
        found = fetch.result()[offset : offset + length]
        return found if len(found) == length else self.read_image(source, shard, offset, length)  # a cut shard: the same error

    def start(self) -> None:
        """Begin to fetch."""
        for number in range(self.num_threads):
            thread = threading.Thread(target=self._fetch_shards, name=f"heliostat-loader-shards_{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Stop fetching and wait for the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._shards.clear()

    def _fetch_shards(self) -> None:
        while (wanted := self._wait_for_wanted()) is not None:
            key, fetch = wanted
            try:
                data = self.read_shard(*key)
                self._correct_size(key, fetch, len(data))
                fetch.set_result(data)
            except BaseException as error:  # noqa: BLE001  whoever needs an image of the shard gets the error
                fetch.set_exception(error)

    def _correct_size(self, key: ShardKey, fetch: "Future[bytes]", num_bytes: int) -> None:
        """Count what a shard really takes: one of others may hold much besides its images."""
        with self._changed:
            shard = self._shards.get(key)
            if shard is not None and shard.fetch is fetch:
                self._held_bytes += num_bytes - shard.num_bytes
                shard.num_bytes = num_bytes

    def _wait_for_wanted(self) -> tuple[ShardKey, Future[bytes]] | None:
        """Claim the next shard to fetch; None when the window is closed."""
        with self._changed:
            while True:
                if self._closed:
                    return None
                wanted = self._next_wanted()
                if wanted is not None:
                    key, shard = wanted
                    shard.fetch = Future()
                    self._held_bytes += shard.num_bytes
                    return key, shard.fetch
                self._changed.wait()

    def _next_wanted(self) -> tuple[ShardKey, _Shard] | None:
        """The first expected shard that is worth its bytes and fits."""
        for key, shard in self._shards.items():
            if shard.fetch is not None or shard.num_bytes > self.max_bytes:
                continue
            if shard.used_bytes >= _FEW_USES_RATIO * shard.num_bytes:
                return (key, shard) if self._held_bytes + shard.num_bytes <= self.max_bytes else None
        return None
