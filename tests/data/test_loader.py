"""The global sequence of images is a pure function of (seed, position): for every step, world size and number of threads."""

import io
import threading
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from heliostat.data.augment import multi_crop
from heliostat.data.batch import Batch
from heliostat.data.config import CropsConfig, DecodeConfig, LoaderConfig
from heliostat.data.loader import ImageLoader, Read, image_at, permuted
from heliostat.data.masking import MaskSettings
from heliostat.data.photographs import crops
from heliostat.data.shards import make_shard_image, manifest_rows, write_shard
from heliostat.errors import ConfigError, DataError, StorageError

CROPS = CropsConfig(global_crops_size=32, local_crops_size=16, local_crops_number=2)
SEED = 5


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def _data_set(bodies: list[bytes]) -> tuple[pa.Table, Read]:
    """Lay images into shards of ten; returns the manifest and how to read them."""
    shards = {
        f"shards/{start}.tar": write_shard(make_shard_image(body, "png", str(start)) for body in bodies[start : start + 10])
        for start in range(0, len(bodies), 10)
    }
    manifest = pa.concat_tables([manifest_rows(key, data) for key, data in shards.items()])
    return manifest, lambda key, offset, length: shards[key][offset : offset + length]


@pytest.fixture(scope="module")
def bodies() -> list[bytes]:
    return [_png(crop.pixels) for crop in crops("left", count=2, seed=0)]


@pytest.fixture(scope="module")
def make(bodies: list[bytes]) -> Callable[..., ImageLoader]:
    manifest, read = _data_set(bodies)

    def build(**changes: object) -> ImageLoader:
        settings: dict[str, object] = {"crops": CROPS, "loader": LoaderConfig(workers=2), "masks": MaskSettings(8)}
        settings |= {"global_batch_size": 6, "seed": SEED, "manifest": manifest, "read": read}
        return ImageLoader(**(settings | changes))  # type: ignore[arg-type]

    return build


def _same(one: Batch, two: Batch) -> bool:
    tensors = ((one.global_crops, two.global_crops), (one.local_crops, two.local_crops), (one.masks, two.masks))
    return one.image_ids == two.image_ids and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_the_permutation_is_a_bijection(num_images: int) -> None:
    for key in (0, 1, 2**63):
        assert sorted(permuted(index, num_images, key) for index in range(num_images)) == list(range(num_images))


def test_the_permutation_looks_random() -> None:
    num_images = 4096
    orders = np.array([[permuted(index, num_images, key) for index in range(num_images)] for key in range(6)])
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(num_images))[0, 1]) < 0.06
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
        assert (np.diff(order) == 1).sum() < 10
    assert abs(np.corrcoef(orders) - np.eye(6)).max() < 0.06
    small = [tuple(permuted(index, 5, key) for index in range(5)) for key in range(2400)]
    firsts = np.bincount([order[0] for order in small], minlength=5) / 2400
    assert abs(firsts * 5 - 1).max() < 0.25
    assert len(set(small)) > 100  # of 120


def test_every_epoch_visits_every_image_once_in_a_new_order() -> None:
    visited = [image_at(position, 37, SEED) for position in range(3 * 37)]
    assert [epoch for epoch, _ in visited] == [0] * 37 + [1] * 37 + [2] * 37
    orders = [tuple(index for _, index in visited[start : start + 37]) for start in (0, 37, 74)]
    assert all(sorted(order) == list(range(37)) for order in orders)
    assert len(set(orders)) == 3


def test_a_position_of_a_billion_images_is_found_at_once() -> None:
    began = time.perf_counter()
    epochs, indices = zip(*(image_at(10**12 + position, 1_200_000_000, SEED) for position in range(2000)), strict=True)
    assert time.perf_counter() - began < 2.0
    assert set(epochs) == {833}
    assert len(set(indices)) == 2000


def test_a_batch_is_crop_major_and_cut_by_multi_crop(make: Callable[..., ImageLoader], bodies: list[bytes]) -> None:
    batch = make().batch(3)
    assert batch.global_crops.shape == (12, 3, 32, 32)
    assert batch.local_crops.shape == (12, 3, 16, 16)
    assert batch.masks.shape == (12, 16)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    assert batch.num_images == 6
    for slot in range(6):
        epoch, index = image_at(3 * 6 + slot, len(bodies), SEED)
        pixels = np.array(Image.open(io.BytesIO(bodies[index])))
        global_crops, local_crops = multi_crop(pixels, CROPS, (SEED, epoch, index))
        for number in range(2):
            assert (batch.global_crops[number * 6 + slot].permute(1, 2, 0).numpy() == global_crops[number]).all()
            assert (batch.local_crops[number * 6 + slot].permute(1, 2, 0).numpy() == local_crops[number]).all()


def test_resuming_at_any_step_equals_the_uninterrupted_run(make: Callable[..., ImageLoader]) -> None:
    uninterrupted = list(make().iterate(0, 20))
    rng = np.random.default_rng(0)
    for start in sorted({0, 19, *rng.integers(1, 19, 3).tolist()}):
        resumed = list(make().iterate(start, 20 - start))
        assert len(resumed) == 20 - start
        assert all(_same(one, two) for one, two in zip(resumed, uninterrupted[start:], strict=True))


@pytest.mark.parametrize(
    "settings", [{"workers": 0}, {"workers": 1}, {"workers": 5, "prefetch_batches": 4}, {"cache_bytes": 0}]
)
def test_threads_and_memory_never_change_a_batch(make: Callable[..., ImageLoader], settings: dict[str, int]) -> None:
    loader = make(loader=LoaderConfig(**settings))
    assert all(_same(batch, make().batch(step)) for step, batch in enumerate(loader.iterate(0, 4)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_world_sizes_see_the_same_global_sequence(make: Callable[..., ImageLoader], world_size: int) -> None:
    ranks = [make(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 1, 8):
        whole, parts = make().batch(step), [loader.batch(step) for loader in ranks]
        assert sum((part.image_ids for part in parts), ()) == whole.image_ids
        for number in range(2):
            mine = torch.cat([part.global_crops.chunk(2)[number] for part in parts])
            assert torch.equal(mine, whole.global_crops.chunk(2)[number])
    masks = [loader.batch(0).masks for loader in ranks]
    assert len({mask.numpy().tobytes() for mask in masks}) == world_size


def test_an_undecodable_image_is_replaced_by_the_next_one_and_counted(bodies: list[bytes]) -> None:
    damaged = list(bodies)
    for index in range(0, 30, 3):
        damaged[index] = [b"no image", bodies[index][:200]][index % 2]
    manifest, read = _data_set(damaged)
    settings = {"crops": CROPS, "masks": MaskSettings(8), "global_batch_size": 6, "seed": SEED}
    loader = ImageLoader(manifest, read, loader=LoaderConfig(workers=3), **settings)
    ids = manifest["id"].to_pylist()
    batches = list(loader.iterate(0, 8))
    bad = {ids[index] for index in range(0, 30, 3)}
    for step, batch in enumerate(batches):
        assert not set(batch.image_ids) & bad
        for slot, image_id in enumerate(batch.image_ids):
            position = step * 6 + slot
            while ids[image_at(position, len(ids), SEED)[1]] in bad:
                position += 1
            assert image_id == ids[image_at(position, len(ids), SEED)[1]]
    statistics = loader.statistics()
    assert set(statistics.decode_failures) == {"unknown_format", "truncated"}
    assert statistics.images == 48
    again = ImageLoader(manifest, read, loader=LoaderConfig(workers=0), **settings)
    assert all(_same(one, two) for one, two in zip(again.iterate(0, 8), batches, strict=True))


def test_a_replacement_is_cropped_differently_from_its_neighbour(bodies: list[bytes]) -> None:
    order = [image_at(position, 2, SEED)[1] for position in range(2)]
    damaged = [bodies[0], bodies[1]]
    damaged[order[0]] = b"no image"
    manifest, read = _data_set(damaged)
    loader = ImageLoader(
        manifest, read, crops=CROPS, loader=LoaderConfig(), masks=MaskSettings(8), global_batch_size=2, seed=SEED
    )
    batch = loader.batch(0)
    assert batch.image_ids[0] == batch.image_ids[1]
    assert not torch.equal(batch.global_crops[0], batch.global_crops[1])


def test_a_data_set_without_a_single_image_is_an_error(bodies: list[bytes]) -> None:
    manifest, read = _data_set([b"no image", b"nor this"])
    loader = ImageLoader(manifest, read, crops=CROPS, loader=LoaderConfig(), masks=MaskSettings(8), global_batch_size=2, seed=0)
    with pytest.raises(DataError, match=r"100 images in a row cannot be decoded.*curate"):
        next(loader.iterate(0, 1))


def test_the_decode_limits_hold_while_training(make: Callable[..., ImageLoader]) -> None:
    loader = make(decoding=DecodeConfig(max_pixels=70 * 70))
    list(loader.iterate(0, 4))
    assert set(loader.statistics().decode_failures) == {"too_many_pixels"}


def _loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("heliostat-loader")]


def test_an_exception_in_a_thread_reaches_the_consumer_and_stops_the_threads(make: Callable[..., ImageLoader]) -> None:
    calls = iter(range(1000))

    def read(key: str, offset: int, length: int) -> bytes:
        if next(calls) == 9:
            raise StorageError("the bucket is gone")
        return original(key, offset, length)

    original = make()._read
    batches = make(read=read).iterate(0, 50)
    with pytest.raises(StorageError, match="the bucket is gone"):
        list(batches)
    assert _loader_threads() == []


def test_closing_stops_the_threads_and_the_reading(make: Callable[..., ImageLoader]) -> None:
    loader = make()
    batches = loader.iterate(0, 10_000)
    next(batches)
    assert _loader_threads() != []
    batches.close()  # type: ignore[attr-defined]
    assert _loader_threads() == []
    images = loader.statistics().images
    assert images <= 6 * 4
    time.sleep(0.05)
    assert loader.statistics().images == images


def test_prefetching_is_bounded(make: Callable[..., ImageLoader]) -> None:
    loader = make(loader=LoaderConfig(workers=2, prefetch_batches=2))
    batches = loader.iterate(0, 100)
    for _ in range(3):
        next(batches)
    time.sleep(0.3)
    assert loader.statistics().images <= 6 * (3 + 2)
    batches.close()  # type: ignore[attr-defined]


def test_memory_for_decoded_images_is_bounded_and_saves_reading(make: Callable[..., ImageLoader], bodies: list[bytes]) -> None:
    epoch_steps = -(-len(bodies) // 6)
    kept, bounded = make(), make(loader=LoaderConfig(cache_bytes=100_000))
    for loader in (kept, bounded):
        list(loader.iterate(0, 4 * epoch_steps))
    assert kept.statistics().bytes == sum(map(len, bodies))
    assert sum(image.nbytes for image in bounded._images._images.values()) <= 100_000
    assert 2 * sum(map(len, bodies)) < bounded.statistics().bytes < 4 * epoch_steps * 6 * max(map(len, bodies))


def test_statistics_count_the_time_that_the_consumer_waited(make: Callable[..., ImageLoader]) -> None:
    original = make()._read

    def slow_read(key: str, offset: int, length: int) -> bytes:
        time.sleep(0.02)
        return original(key, offset, length)

    loader = make(read=slow_read, loader=LoaderConfig(workers=1))
    list(loader.iterate(0, 2))
    assert loader.statistics().data_wait_seconds > 12 * 0.02 * 0.9


def test_requests_that_cannot_be_served_are_refused_early(make: Callable[..., ImageLoader]) -> None:
    with pytest.raises(ConfigError, match="global_batch_size 100 is not divisible by 8 workers; use 96 or 104"):
        make(global_batch_size=100, world_size=8)
    with pytest.raises(ConfigError, match="rank 2"):
        make(rank=2, world_size=2)
    with pytest.raises(ConfigError, match="patch_size"):
        make(masks=MaskSettings(7))
    with pytest.raises(DataError, match="no images"):
        make(manifest=make()._manifest.slice(0, 0))


def test_only_whole_steps_of_the_run_are_yielded(make: Callable[..., ImageLoader]) -> None:
    assert list(make().iterate(5, 0)) == []
    assert make().num_images == 34
