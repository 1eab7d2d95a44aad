"""Whole shards are held while they are needed and fit; everything else is read image by image."""

import threading
import time
from collections.abc import Iterator

import pytest

from heliostat.data.shard_window import ShardWindow

BODIES = {name: bytes([number]) * 100 for number, name in enumerate("abcd")}


class Store:
    """Counts requests; `gate` holds the reading of shards back."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.shards: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def image(self, source: int, shard: str, offset: int, length: int) -> bytes:
        self.images.append(shard)
        return BODIES[shard][offset : offset + length]

    def shard(self, source: int, shard: str) -> bytes:
        self.gate.wait(10)
        self.shards.append(shard)
        return BODIES[shard]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def window(store: Store) -> Iterator[ShardWindow]:
    made = ShardWindow(store.image, store.shard, max_bytes=250, num_threads=1)
    made.start()
    yield made
    store.gate.set()
    made.close()


def until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_shards_come_in_the_order_of_need_and_make_room_when_done(window: ShardWindow, store: Store) -> None:
    for step, name in enumerate("abc"):
        window.expect(step, (0, name), shard_bytes=100, image_bytes=50)
    until(lambda: store.shards == ["a", "b"])
    time.sleep(0.02)
    assert store.shards == ["a", "b"]  # c does not fit yet
    assert window.read(0, "a", 3, 5) == BODIES["a"][3:8]
    assert store.images == []
    assert window.read(0, "c", 0, 4) == BODIES["c"][:4]
    assert store.images == ["c"]
    window.done(0)
    until(lambda: store.shards == ["a", "b", "c"])
    assert window.read(0, "c", 0, 4) == BODIES["c"][:4]
    assert store.images == ["c"]


def test_a_shard_that_can_never_fit_holds_up_no_other(window: ShardWindow, store: Store) -> None:
    window.expect(0, (0, "a"), shard_bytes=251, image_bytes=200)
    window.expect(0, (0, "b"), shard_bytes=100, image_bytes=50)
    until(lambda: store.shards == ["b"])
    assert window.read(0, "a", 0, 1) == b"\0"
    assert store.images == ["a"]


def test_a_shard_stays_until_the_last_batch_that_needs_it(window: ShardWindow, store: Store) -> None:
    for step in (0, 5):
        window.expect(step, (0, "a"), shard_bytes=100, image_bytes=50)
    until(lambda: store.shards == ["a"])
    window.done(4)
    assert window.read(0, "a", 0, 1) == b"\0"
    assert store.images == []
    window.done(5)
    assert window.read(0, "a", 0, 1) == b"\0"
    assert store.images == ["a"]


def test_a_few_images_are_not_worth_a_shard(window: ShardWindow, store: Store) -> None:
    window.expect(0, (0, "a"), shard_bytes=100, image_bytes=10)
    window.expect(1, (0, "b"), shard_bytes=100, image_bytes=60)
    until(lambda: store.shards == ["b"])
    window.expect(2, (0, "a"), shard_bytes=100, image_bytes=20)  # now it is
    until(lambda: store.shards == ["b", "a"])


def test_who_needs_a_shard_on_its_way_waits_for_it(window: ShardWindow, store: Store) -> None:
    store.gate.clear()
    window.expect(0, (0, "a"), shard_bytes=100, image_bytes=50)
    until(lambda: window._shards[0, "a"].fetch is not None)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(window.read(0, "a", 0, 2)))
    reader.start()
    time.sleep(0.02)
    assert found == []
    store.gate.set()
    reader.join(10)
    assert found == [b"\0\0"]
    assert store.images == []


def test_sources_are_told_apart(window: ShardWindow, store: Store) -> None:
    window.expect(0, (0, "a"), shard_bytes=100, image_bytes=50)
    until(lambda: store.shards == ["a"])
    window.read(1, "a", 0, 1)
    assert store.images == ["a"]


def test_a_shard_that_was_cut_fails_as_it_does_when_it_is_read_by_range(store: Store, window: ShardWindow) -> None:
    window.expect(0, (0, "a"), shard_bytes=200, image_bytes=200)
    until(lambda: store.shards == ["a"])
    assert window.read(0, "a", 0, 100) == BODIES["a"]
    assert store.images == []
    window.read(0, "a", 50, 100)  # the shard ends at 100: the reader of ranges says so in its own words
    assert store.images == ["a"]
