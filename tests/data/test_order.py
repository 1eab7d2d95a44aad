"""The global order against a slow definition of it, and what it promises: every epoch whole, the same for all world sizes."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from heliostat.data.config import ShuffleConfig
from heliostat.data.order import GlobalOrder, SourceOrder, key_of, shuffled
from heliostat.errors import ConfigError, DataError

SEED = 5
UNEVEN = [7, 1, 12, 3, 3, 20, 5, 9, 1, 2]
MASK = 2**64 - 1


def order(counts: list[list[int]], weights: list[float] | None = None, *, seed: int = SEED, **shuffle: int) -> GlobalOrder:
    settings = ShuffleConfig(**({"window_images": 20, "lanes": 3} | shuffle))
    arrays = [np.array(one, np.int64) for one in counts]
    return GlobalOrder(arrays, weights=weights or [1.0] * len(counts), seed=seed, shuffle=settings)


def slow_mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def slow_word(value: int, key: int) -> int:
    return slow_mix(slow_mix((value * 0x9E3779B97F4A7C15 + key) & MASK))


def slow_epoch(counts: list[int], key: int, epoch: int, window_images: int, lanes: int) -> Iterator[int]:
    """The definition in plain Python: windows of shuffled shards, lanes of shuffled images, dealt evenly."""
    first = [sum(counts[:shard]) for shard in range(len(counts))]
    shards = sorted(range(len(counts)), key=lambda shard: slow_word(shard, key_of(key, epoch)))
    num_windows = min(len(counts), max(1, round(sum(counts) / window_images)))
    size, larger = divmod(len(counts), num_windows)
    for window in range(num_windows):
        chosen, shards = shards[: size + (window < larger)], shards[size + (window < larger) :]
        window_key = key_of(key, epoch, window)
        queues = []
        for lane in range(min(lanes, len(chosen))):
            images = [first[shard] + row for shard in chosen[lane::lanes] for row in range(counts[shard])]
            queues.append(sorted(images, key=lambda image: slow_word(image, window_key)))
        dealt = [
            ((2 * place + 1) / (2 * len(queue)), lane, image)
            for lane, queue in enumerate(queues)
            for place, image in enumerate(queue)
        ]
        yield from (image for _, _, image in sorted(dealt))


@pytest.mark.parametrize(("window", "lanes"), [(20, 3), (1, 1), (7, 2), (1000, 4), (1000, 1)])
def test_the_order_is_that_of_the_slow_definition(window: int, lanes: int) -> None:
    fast = SourceOrder(np.array(UNEVEN), key=9, shuffle=ShuffleConfig(window_images=window, lanes=lanes))
    for epoch in range(3):
        found = fast.locate(epoch * 63, (epoch + 1) * 63)
        assert found.image.tolist() == list(slow_epoch(UNEVEN, 9, epoch, window, lanes))
        assert set(found.epoch.tolist()) == {epoch}


def test_any_stretch_is_a_piece_of_the_whole_sequence() -> None:
    counts, weights = [UNEVEN, [4, 4], [11]], [0.5, 0.3, 0.2]
    whole = order(counts, weights).locate(0, 1000)
    for start, stop in [(0, 1), (17, 18), (62, 65), (100, 500), (999, 1000)]:
        piece = order(counts, weights).locate(start, stop)
        for name in ("source", "epoch", "image", "lane"):
            assert (getattr(piece, name) == getattr(whole, name)[start:stop]).all()


def test_every_epoch_visits_every_image_once_in_a_new_order() -> None:
    visited = order([UNEVEN]).locate(0, 3 * 63)
    orders = [visited.image[start : start + 63].tolist() for start in (0, 63, 126)]
    assert all(sorted(one) == list(range(63)) for one in orders)
    assert len(set(map(tuple, orders))) == 3


def test_a_data_set_that_fits_one_window_is_shuffled_as_a_whole() -> None:
    images = order([[10] * 100], window_images=10_000, lanes=100).locate(0, 1000).image
    assert abs(np.corrcoef(images, np.arange(1000))[0, 1]) < 0.1
    assert (np.diff(images) == 1).sum() < 10
    assert np.bincount(images[:500] // 10, minlength=100).tolist() == [5] * 100  # every shard is met evenly


def test_shuffled_orders_are_uniform() -> None:
    orders = np.array([shuffled(np.arange(5), key_of(key)) for key in range(6000)])
    for place in range(5):
        assert abs(np.bincount(orders[:, place], minlength=5) / 1200 - 1).max() < 0.12
    assert len(np.unique(orders, axis=0)) == 120


def test_batches_hold_the_same_images_whatever_the_world_size_and_ranks_keep_to_their_shards() -> None:
    counts = [100] * 96
    made = order([counts], window_images=9600, lanes=24)
    shards_of_rank: list[set[int]] = [set() for _ in range(4)]
    for step in range(100):
        batch = made.batch(step * 96, 96)
        assert sorted(batch.image.tolist()) == sorted(made.locate(step * 96, step * 96 + 96).image.tolist())
        for rank in range(4):
            shards_of_rank[rank] |= set((batch.take(slice(rank * 24, rank * 24 + 24)).image // 100).tolist())
    assert all(len(shards) == 24 for shards in shards_of_rank)
    assert sum(map(len, shards_of_rank)) == len(set.union(*shards_of_rank)) == 96


def test_uneven_shards_make_ranks_share_a_few_shards_only() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 150, 96).tolist()
    made, seen = order([counts], window_images=10**6, lanes=24), [set() for _ in range(4)]
    shard_of = np.repeat(np.arange(96), counts)
    for step in range(sum(counts) // 96):
        batch = made.batch(step * 96, 96)
        for rank in range(4):
            seen[rank] |= set(shard_of[batch.image[rank * 24 : rank * 24 + 24]].tolist())
    assert sum(map(len, seen)) < 1.6 * 96


def test_weights_are_kept_in_every_stretch_and_each_source_goes_on_in_its_own_epochs() -> None:
    made = order([[100] * 10, [10], [500]], [0.7, 0.1, 0.2])
    places = made.locate(0, 65_536)
    for source, weight in enumerate((0.7, 0.1, 0.2)):
        mine = places.source == source
        assert abs(mine.sum() - weight * 65_536) < 1.5
        assert abs(mine[:5000].mean() - weight) < 0.03
        num_images = (1000, 10, 500)[source]
        first_epoch = places.image[mine][:num_images]
        assert sorted(first_epoch.tolist()) == list(range(num_images))
        assert places.epoch[mine].tolist() == [index // num_images for index in range(mine.sum())]


def test_image_numbers_are_distinct_over_all_sources() -> None:
    made = order([[3, 4], [5]])
    assert [made.image_number(0, 6), made.image_number(1, 0), made.image_number(1, 4)] == [6, 7, 11]


def test_a_position_of_a_billion_images_is_found_without_a_permutation_of_them() -> None:
    made = GlobalOrder([np.full(1_200_000, 1000)], seed=SEED, shuffle=ShuffleConfig())
    began = time.process_time()
    places = made.batch(10**12, 2048)
    assert time.process_time() - began < 10.0
    assert set(places.epoch.tolist()) == {833}
    assert len(set(places.image.tolist())) == 2048
    assert len(set((places.image // 1000).tolist())) <= 132


def test_the_digest_changes_with_everything_that_changes_the_sequence() -> None:
    digests = [
        order([UNEVEN]).digest,
        order([UNEVEN[::-1]]).digest,
        order([UNEVEN], seed=6).digest,
        order([UNEVEN], window_images=21).digest,
        order([UNEVEN], lanes=4).digest,
        order([UNEVEN, UNEVEN], [1.0, 2.0]).digest,
        order([UNEVEN, UNEVEN], [2.0, 1.0]).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert order([UNEVEN]).digest == digests[0]


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        order([[]])
    with pytest.raises(DataError, match="no images"):
        order([[3, 0]])
    with pytest.raises(ConfigError, match=r"weights \[1.0\] must be one positive number for each of 2 sources"):
        order([[1], [1]], [1.0])
    with pytest.raises(ConfigError, match="below 1/65536"):
        order([[1], [1]], [1.0, 1e-9])
