"""The global sequence of images is a pure function of (seed, position): for every step, world size and number of threads."""

import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from heliostat.data.augment import multi_crop
from heliostat.data.batch import Batch
from heliostat.data.config import CropsConfig, DecodeConfig, LoaderConfig, ShuffleConfig
from heliostat.data.image_source import ImageSource
from heliostat.data.image_table import image_table
from heliostat.data.loader import ImageLoader
from heliostat.data.masking import MaskSettings
from heliostat.data.order import GlobalOrder
from heliostat.data.photographs import crops
from heliostat.data.shards import MANIFEST_SCHEMA, make_shard_image, manifest_rows, write_shard
from heliostat.errors import ConfigError, DataError, StorageError

CROPS = CropsConfig(global_crops_size=32, local_crops_size=16, local_crops_number=2)
SHUFFLE = ShuffleConfig(window_images=20, lanes=2)
SEED = 5


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


@dataclass
class Shards:
    """Shards in memory; counts what is read."""

    tars: dict[str, bytes]
    remote: bool = False
    images_read: list[int] = field(default_factory=list)
    shards_read: list[str] = field(default_factory=list)

    def __call__(self, shard: str, offset: int, length: int) -> bytes:
        self.images_read.append(length)
        return self.tars[shard][offset : offset + length]

    def is_remote(self, shard: str) -> bool:
        return self.remote

    def whole(self, shard: str) -> bytes:
        self.shards_read.append(shard)
        return self.tars[shard]


def _source(bodies: list[bytes], *, per_shard: int = 10, is_remote: bool = False) -> ImageSource:
    """Images laid into shards."""
    shards = {
        f"shards/{start}.tar": write_shard(
            make_shard_image(body, "png", str(start)) for body in bodies[start : start + per_shard]
        )
        for start in range(0, len(bodies), per_shard)
    }
    tables = [MANIFEST_SCHEMA.empty_table(), *(manifest_rows(key, data) for key, data in shards.items())]
    return ImageSource(image_table(pa.concat_tables(tables)), Shards(shards, is_remote))


@pytest.fixture(scope="module")
def bodies() -> list[bytes]:
    return [_png(crop.pixels) for crop in crops("left", count=2, seed=0)]


@pytest.fixture(scope="module")
def make(bodies: list[bytes]) -> Callable[..., ImageLoader]:
    source = _source(bodies)

    def build(*sources: ImageSource, **changes: object) -> ImageLoader:
        settings: dict[str, object] = {"crops": CROPS, "loader": LoaderConfig(workers=2), "masks": MaskSettings(8)}
        settings |= {"global_batch_size": 6, "seed": SEED, "shuffle": SHUFFLE}
        return ImageLoader(sources or (source,), **(settings | changes))  # type: ignore[arg-type]

    return build


def _same(one: Batch, two: Batch) -> bool:
    tensors = ((one.global_crops, two.global_crops), (one.local_crops, two.local_crops), (one.masks, two.masks))
    return one.image_ids == two.image_ids and all(torch.equal(a, b) for a, b in tensors)


def test_a_batch_is_crop_major_and_cut_by_multi_crop(make: Callable[..., ImageLoader], bodies: list[bytes]) -> None:
    batch = make().batch(3)
    assert batch.global_crops.shape == (12, 3, 32, 32)
    assert batch.local_crops.shape == (12, 3, 16, 16)
    assert batch.masks.shape == (12, 16)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    assert batch.num_images == 6
    places = GlobalOrder([np.array([10, 10, 10, 4])], seed=SEED, shuffle=SHUFFLE).batch(18, 6)
    for slot in range(6):
        epoch, index = int(places.epoch[slot]), int(places.image[slot])
        pixels = np.array(Image.open(io.BytesIO(bodies[index])))
        global_crops, local_crops = multi_crop(pixels, CROPS, (SEED, epoch, index))
        for number in range(2):
            assert (batch.global_crops[number * 6 + slot].permute(1, 2, 0).numpy() == global_crops[number]).all()
            assert (batch.local_crops[number * 6 + slot].permute(1, 2, 0).numpy() == local_crops[number]).all()


def test_fifty_stops_at_random_steps_resume_byte_for_byte(make: Callable[..., ImageLoader]) -> None:
    """Whatever was running ahead when the loader was stopped, and whatever its threads and memory are afterwards."""
    uninterrupted = list(make().batches(60))
    rng = np.random.default_rng(0)
    for stop in [0, 59, *rng.integers(0, 60, 50).tolist()]:
        workers, prefetch = int(rng.integers(0, 4)), int(rng.integers(1, 4))
        stopped = make(loader=LoaderConfig(workers=workers, prefetch_batches=prefetch))
        batches = stopped.batches(60)
        before = [next(batches) for _ in range(stop)]
        batches.close()
        resumed = make(loader=LoaderConfig(workers=2 - workers // 2, cache_bytes=0))
        resumed.load_state_dict(stopped.state_dict())
        again = list(resumed.batches(min(3, 60 - stop)))
        assert all(_same(one, two) for one, two in zip(before, uninterrupted, strict=False))
        assert all(_same(one, two) for one, two in zip(again, uninterrupted[stop:], strict=False))
        assert len(again) == min(3, 60 - stop)


def test_world_sizes_one_two_three_one_continue_one_global_sequence(
    make: Callable[..., ImageLoader], bodies: list[bytes]
) -> None:
    sources = (_source(bodies), replace(_source(bodies[:9], per_shard=4), weight=0.5))
    whole = list(make(*sources).batches(24))
    state = make(*sources).state_dict()
    step = 0
    for world_size in (1, 2, 3, 1):
        ranks = [make(*sources, rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in ranks:
            loader.load_state_dict(state)
        for parts in zip(*(loader.batches(6) for loader in ranks), strict=True):
            assert sum((part.image_ids for part in parts), ()) == whole[step].image_ids
            for number in range(2):
                for name in ("global_crops", "local_crops", "masks"):
                    mine = torch.cat([getattr(part, name).chunk(2)[number] for part in parts])
                    assert torch.equal(mine, getattr(whole[step], name).chunk(2)[number])
            step += 1
        states = [loader.state_dict() for loader in ranks]
        assert all(one == states[0] for one in states)
        state = states[0]
    assert step == 24


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 0},
        {"workers": 1},
        {"workers": 5, "prefetch_batches": 4},
        {"cache_bytes": 0},
        {"read_by": "shards"},
        {"read_by": "shards", "shard_bytes": 0, "cache_bytes": 0},
    ],
)
def test_threads_memory_and_reading_never_change_a_batch(make: Callable[..., ImageLoader], settings: dict[str, int]) -> None:
    loader = make(loader=LoaderConfig(**settings))
    assert all(_same(batch, make().batch(step)) for step, batch in enumerate(loader.batches(14)))


def test_a_state_of_another_sequence_is_refused(make: Callable[..., ImageLoader], bodies: list[bytes]) -> None:
    state = make().state_dict()
    others = (
        make(seed=6),
        make(_source(bodies[:20])),
        make(_source(bodies[::-1])),
        make(shuffle=ShuffleConfig(window_images=21, lanes=2)),
    )
    for other in others:
        with pytest.raises(DataError, match="another sequence of images: sources, their weights, seed or shuffle differ"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="position 6 of the loader's state is no multiple of global_batch_size 4"):
        make(global_batch_size=4).load_state_dict(state | {"position": 6})


def test_whole_shards_are_read_once_and_single_images_only_before_they_arrive(
    make: Callable[..., ImageLoader], bodies: list[bytes]
) -> None:
    source = _source(bodies, is_remote=True)
    loader = make(source, shuffle=ShuffleConfig(window_images=1000), loader=LoaderConfig(workers=2, cache_bytes=0))
    batches = list(loader.batches(11))  # two epochs
    reader = source.reader
    assert isinstance(reader, Shards)
    assert sorted(reader.shards_read) == sorted(reader.tars)
    assert len(reader.images_read) < 66
    assert all(
        _same(one, two) for one, two in zip(batches, make(shuffle=ShuffleConfig(window_images=1000)).batches(11), strict=True)
    )
    assert loader.statistics().bytes == sum(reader.images_read) + sum(map(len, reader.tars.values()))


def test_an_undecodable_image_is_replaced_by_its_neighbour_and_told_with_its_reason(bodies: list[bytes]) -> None:
    damaged = list(bodies)
    for index in range(0, 30, 3):
        damaged[index] = [b"no image", bodies[index][:200]][index % 2]
    source = _source(damaged)
    settings = {"crops": CROPS, "masks": MaskSettings(8), "global_batch_size": 6, "seed": SEED, "shuffle": SHUFFLE}
    loader = ImageLoader((source,), loader=LoaderConfig(workers=3), **settings)
    batches = list(loader.batches(8))
    order = GlobalOrder([source.table.counts], seed=SEED, shuffle=SHUFFLE)
    met = set()
    for step, batch in enumerate(batches):
        for image_id, meant in zip(batch.image_ids, order.batch(step * 6, 6).image.tolist(), strict=True):
            index = meant
            while index % 3 == 0 and index < 30:
                met.add(index)
                index += 1
            assert image_id == source.table.id(index)
    statistics = loader.statistics()
    assert set(statistics.decode_failures) == {"unknown_format", "truncated"}
    assert statistics.images == 48
    rejections = loader.take_rejections()
    assert {rejection.id for rejection in rejections} == {source.table.id(index) for index in met}
    assert {rejection.reason for rejection in rejections} == {"unknown_format", "truncated"}
    assert loader.take_rejections() == []
    again = ImageLoader((source,), loader=LoaderConfig(workers=0), **settings)
    assert all(_same(one, two) for one, two in zip(again.batches(8), batches, strict=True))


def test_only_images_of_batches_that_were_handed_out_are_told(bodies: list[bytes]) -> None:
    source = _source([b"no image", *bodies[1:]])
    first = next(
        step for step in range(99) if 0 in GlobalOrder([source.table.counts], seed=0, shuffle=SHUFFLE).batch(step * 2, 2).image
    )
    settings = {"crops": CROPS, "masks": MaskSettings(8), "global_batch_size": 2, "seed": 0, "shuffle": SHUFFLE}
    loader = ImageLoader((source,), loader=LoaderConfig(workers=2, prefetch_batches=9), **settings)
    batches = loader.batches(first + 9)
    for _ in range(first):
        next(batches)
    time.sleep(0.3)
    assert loader.take_rejections() == []
    next(batches)
    assert [rejection.id for rejection in loader.take_rejections()] == [source.table.id(0)]
    batches.close()


def test_bytes_that_are_not_those_of_the_manifest_are_turned_away(bodies: list[bytes]) -> None:
    good = _source(bodies)
    reader = good.reader
    assert isinstance(reader, Shards)
    offset = int(good.table.offset[0]) + 60
    tar = reader.tars["shards/0.tar"]
    damaged = Shards({**reader.tars, "shards/0.tar": tar[:offset] + bytes([tar[offset] ^ 1]) + tar[offset + 1 :]})
    loader = ImageLoader(
        (ImageSource(good.table, damaged),),
        crops=CROPS,
        loader=LoaderConfig(),
        masks=MaskSettings(8),
        global_batch_size=34,
        seed=0,
    )
    list(loader.batches(1))
    assert [(one.id, one.reason) for one in loader.take_rejections()] == [(good.table.id(0), "checksum_mismatch")]


def test_a_replacement_is_cropped_differently_from_its_neighbour(bodies: list[bytes]) -> None:
    source = _source([b"no image", bodies[1]])
    loader = ImageLoader((source,), crops=CROPS, loader=LoaderConfig(), masks=MaskSettings(8), global_batch_size=2, seed=SEED)
    batch = loader.batch(0)
    assert batch.image_ids[0] == batch.image_ids[1]
    assert not torch.equal(batch.global_crops[0], batch.global_crops[1])


def test_a_data_set_without_a_single_image_is_an_error(bodies: list[bytes]) -> None:
    source = _source([b"no image", b"nor this"])
    loader = ImageLoader((source,), crops=CROPS, loader=LoaderConfig(), masks=MaskSettings(8), global_batch_size=2, seed=0)
    with pytest.raises(DataError, match=r"100 images in a row cannot be decoded.*curate"):
        next(loader.batches(1))


def test_the_decode_limits_hold_while_training(make: Callable[..., ImageLoader]) -> None:
    loader = make(decoding=DecodeConfig(max_pixels=70 * 70))
    list(loader.batches(4))
    assert set(loader.statistics().decode_failures) == {"too_many_pixels"}


def _loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("heliostat-loader")]


@pytest.mark.parametrize("is_remote", [False, True])
def test_an_exception_in_a_thread_reaches_the_consumer_and_stops_the_threads(
    make: Callable[..., ImageLoader], bodies: list[bytes], is_remote: bool
) -> None:
    class Failing(Shards):
        def __call__(self, shard: str, offset: int, length: int) -> bytes:
            if len(self.images_read) == 9:
                raise StorageError("the bucket is gone")
            return super().__call__(shard, offset, length)

        def whole(self, shard: str) -> bytes:
            raise StorageError("the bucket is gone")

    source = _source(bodies)
    assert isinstance(source.reader, Shards)
    loader = make(ImageSource(source.table, Failing(source.reader.tars, is_remote)), loader=LoaderConfig(cache_bytes=0))
    with pytest.raises(StorageError, match="the bucket is gone"):
        list(loader.batches(50))
    assert _loader_threads() == []


@pytest.mark.parametrize("read_by", ["images", "shards"])
def test_closing_stops_the_threads_and_the_reading(make: Callable[..., ImageLoader], read_by: str) -> None:
    loader = make(loader=LoaderConfig(workers=2, read_by=read_by))  # type: ignore[arg-type]
    batches = loader.batches(10_000)
    next(batches)
    assert _loader_threads() != []
    batches.close()
    assert _loader_threads() == []
    images = loader.statistics().images
    assert images <= 6 * 4
    time.sleep(0.05)
    assert loader.statistics().images == images


def test_prefetching_is_bounded(make: Callable[..., ImageLoader]) -> None:
    loader = make(loader=LoaderConfig(workers=2, prefetch_batches=2))
    batches = loader.batches(100)
    for _ in range(3):
        next(batches)
    time.sleep(0.3)
    assert loader.statistics().images <= 6 * (3 + 2)
    batches.close()


def test_memory_for_decoded_images_is_bounded_and_saves_reading(make: Callable[..., ImageLoader], bodies: list[bytes]) -> None:
    epoch_steps = -(-len(bodies) // 6)
    kept, bounded = make(), make(loader=LoaderConfig(cache_bytes=100_000))
    for loader in (kept, bounded):
        list(loader.batches(4 * epoch_steps))
    assert kept.statistics().bytes == sum(map(len, bodies))
    assert sum(image.nbytes for image in bounded._pixels._cache._images.values()) <= 100_000
    assert 2 * sum(map(len, bodies)) < bounded.statistics().bytes < 4 * epoch_steps * 6 * max(map(len, bodies))


def test_statistics_count_the_time_that_the_consumer_waited(make: Callable[..., ImageLoader], bodies: list[bytes]) -> None:
    class Slow(Shards):
        def __call__(self, shard: str, offset: int, length: int) -> bytes:
            time.sleep(0.02)
            return super().__call__(shard, offset, length)

    source = _source(bodies)
    assert isinstance(source.reader, Shards)
    loader = make(ImageSource(source.table, Slow(source.reader.tars)), loader=LoaderConfig(workers=1))
    list(loader.batches(2))
    assert loader.statistics().data_wait_seconds > 12 * 0.02 * 0.9


def test_requests_that_cannot_be_served_are_refused_early(make: Callable[..., ImageLoader]) -> None:
    with pytest.raises(ConfigError, match="global_batch_size 100 is not divisible by 8 workers; use 96 or 104"):
        make(global_batch_size=100, world_size=8)
    with pytest.raises(ConfigError, match="rank 2"):
        make(rank=2, world_size=2)
    with pytest.raises(ConfigError, match="patch_size"):
        make(masks=MaskSettings(7))
    with pytest.raises(DataError, match="no images"):
        make(_source([]))


def test_only_whole_steps_of_the_run_are_yielded(make: Callable[..., ImageLoader]) -> None:
    assert list(make().batches(0)) == []
    assert make().num_images == 34
