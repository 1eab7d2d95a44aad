"""Images through Ray Data: the same batches as from the loader's threads, byte for byte, whatever happens on the way."""

import io
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cv2
import psutil
import pyarrow as pa
import pytest
import ray
import torch
from local_ray import started_ray
from ray._private.internal_api import memory_summary
from tars import Tars, Unreachable
from tiny_training import final_files, job, settings, shard
from tiny_training import train as train_here

from heliostat.data.batch import Batch
from heliostat.data.config import CropsConfig, DecodeConfig, LoaderConfig, ShuffleConfig
from heliostat.data.image_source import ImageSource
from heliostat.data.image_table import image_table
from heliostat.data.loading import Loading
from heliostat.data.masking import MaskSettings
from heliostat.data.photographs import crops
from heliostat.data.shards import MANIFEST_SCHEMA, make_shard_image, manifest_rows, write_shard
from heliostat.errors import ClusterError, ConfigError, StorageError, TrainingError
from heliostat.runtime.progress import Progress
from heliostat.runtime.ray_blocks import object_store_bytes, slice_bytes
from heliostat.runtime.ray_loader import RayLoader
from heliostat.tracking import NullRun, NullTracker
from heliostat.training.run import TrainingJob

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray 2.60's, about its own settings
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # and its log files
]

GLOBAL_BATCH_SIZE = 12
STORE_BYTES = 200_000_000


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with started_ray(num_cpus=6, object_store_memory=STORE_BYTES):
        yield


def _bodies() -> list[bytes]:
    found = []
    for crop in crops("left", count=2, seed=0):
        done, data = cv2.imencode(".png", cv2.cvtColor(crop.pixels, cv2.COLOR_RGB2BGR))
        assert done
        found.append(data.tobytes())
    return found


def _source(bodies: list[bytes], *, weight: float = 1.0, per_shard: int = 10, is_remote: bool = False) -> ImageSource:
    shards = {
        f"shards/{start}.tar": write_shard(
            make_shard_image(body, "png", str(start)) for body in bodies[start : start + per_shard]
        )
        for start in range(0, len(bodies), per_shard)
    }
    tables = [MANIFEST_SCHEMA.empty_table(), *(manifest_rows(key, data) for key, data in shards.items())]
    return ImageSource(image_table(pa.concat_tables(tables)), Tars(shards, is_remote), weight)


@pytest.fixture(scope="module")
def loading() -> Loading:
    """Two sources, one of them read by whole shards, with files that are no images."""
    bodies = _bodies()
    damaged = [b"no image" if number % 5 == 0 else body for number, body in enumerate(bodies)]
    return Loading(
        sources=(_source(damaged), _source(bodies[:9], weight=0.5, per_shard=4, is_remote=True)),
        crops=CropsConfig(global_crops_size=32, local_crops_size=16, local_crops_number=2),
        loader=LoaderConfig(workers=1, ray_workers=2),
        masks=MaskSettings(8),
        global_batch_size=GLOBAL_BATCH_SIZE,
        seed=5,
        shuffle=ShuffleConfig(window_images=20, lanes=2),
        decoding=DecodeConfig(),
    )


def _through_ray(loading: Loading, *, rank: int = 0, world_size: int = 1, said: list[str] | None = None, timeout: float = 240):
    notify: Callable[[str], None] = print if said is None else said.append
    sources = ray.put(loading.sources)
    return RayLoader(loading, sources, rank=rank, world_size=world_size, notify=notify, start_timeout_seconds=timeout)


def _same(one: Batch, two: Batch) -> bool:
    tensors = ((one.global_crops, two.global_crops), (one.local_crops, two.local_crops), (one.masks, two.masks))
    return one.image_ids == two.image_ids and all(torch.equal(a, b) for a, b in tensors)


def _data_workers() -> list[psutil.Process]:
    """Processes that run a read task now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::Read_Crops" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def _all_cpus_are_free() -> bool:
    return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@pytest.mark.parametrize(("world_size", "ray_workers"), [(1, 1), (1, 3), (2, 2)])
def test_batches_rejections_and_state_are_those_of_the_threads(loading: Loading, world_size: int, ray_workers: int) -> None:
    loading = replace(loading, loader=LoaderConfig(workers=1, ray_workers=ray_workers))
    for rank in range(world_size):
        there, here = _through_ray(loading, rank=rank, world_size=world_size), loading.image_loader(rank, world_size)
        pairs = list(zip(there.batches(5), here.batches(5), strict=True))
        assert all(_same(one, two) for one, two in pairs)
        assert there.state_dict() == here.state_dict()
        rejections = there.take_rejections()
        assert rejections
        assert sorted(rejections) == sorted(here.take_rejections())
        assert there.take_rejections() == []
        ours, theirs = there.statistics(), here.statistics()
        assert (ours.images, ours.decode_failures) == (theirs.images, theirs.decode_failures)
        assert ours.bytes > 0
        assert ours.data_wait_seconds > 0


def test_either_way_goes_on_where_the_other_one_stood(loading: Loading) -> None:
    uninterrupted = list(loading.image_loader(0, 1).batches(9))
    there = _through_ray(loading)
    before = there.batches(9)
    assert all(_same(next(before), batch) for batch in uninterrupted[:3])
    before.close()
    here = loading.image_loader(0, 1)
    here.load_state_dict(there.state_dict())
    assert all(_same(one, two) for one, two in zip(here.batches(2), uninterrupted[3:5], strict=True))
    again = _through_ray(replace(loading, loader=LoaderConfig(workers=1, ray_workers=1)))
    again.load_state_dict(here.state_dict())
    assert all(_same(one, two) for one, two in zip(again.batches(4), uninterrupted[5:], strict=True))


def test_a_killed_data_worker_is_replaced_at_the_step_that_is_needed(loading: Loading) -> None:
    said: list[str] = []
    here = loading.image_loader(0, 1)
    uninterrupted, rejections = list(here.batches(20)), set(here.take_rejections())
    there = _through_ray(loading, said=said)
    with closing(there.batches(10_000)) as batches:
        found = [next(batches) for _ in range(4)]
        victims = _data_workers()
        assert len(victims) == 2
        victims[1].send_signal(signal.SIGKILL)
        found += [next(batches) for _ in range(16)]
    assert all(_same(one, two) for one, two in zip(found, uninterrupted, strict=True))
    assert len(said) == 1
    assert "was lost before step " in said[0]
    assert set(there.take_rejections()) == rejections


def test_closing_early_leaves_nothing_running(loading: Loading) -> None:
    there = _through_ray(loading)
    batches = there.batches(10_000)
    next(batches)
    assert _data_workers() != []
    batches.close()
    assert _wait_until(lambda: not _data_workers() and _all_cpus_are_free())
    assert next(there.batches(1)) is not None  # and it can begin again
    assert _wait_until(_all_cpus_are_free)


def test_batches_that_nobody_takes_are_bounded_in_memory(loading: Loading) -> None:
    """Eight megabytes a block, so that it counts; with more of them than the object store holds."""
    large = replace(
        loading,
        crops=CropsConfig(global_crops_size=224, local_crops_size=96, local_crops_number=8),
        masks=MaskSettings(16),
        loader=LoaderConfig(workers=1, ray_workers=1),
    )
    before = _used_store_bytes()
    there = _through_ray(large)
    batches = there.batches(1000)
    next(batches)
    most = 0
    for _ in range(12):
        time.sleep(0.5)
        most = max(most, _used_store_bytes() - before)
    batches.close()
    bound = object_store_bytes(large, 1)
    assert bound == 6 * slice_bytes(large, GLOBAL_BATCH_SIZE)
    assert 2 * slice_bytes(large, GLOBAL_BATCH_SIZE) < most <= bound + 2_000_000
    assert _wait_until(lambda: _used_store_bytes() - before < 2_000_000)


def _used_store_bytes() -> int:
    text = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    used = re.search(r"Plasma memory usage (\d+) MiB", text)
    return int(used[1]) * 2**20 if used else 0


def test_an_error_of_the_store_arrives_as_its_own_line(loading: Loading) -> None:
    reader = loading.sources[0].reader
    assert isinstance(reader, Tars)
    gone = replace(loading, sources=(replace(loading.sources[0], reader=Unreachable(reader.tars)),))
    with pytest.raises(StorageError) as failed:
        next(_through_ray(gone).batches(3))
    assert str(failed.value) == "the bucket is gone"
    assert _wait_until(_all_cpus_are_free)


def test_data_workers_that_find_no_room_end_the_wait_with_one_line(loading: Loading) -> None:
    starved = replace(loading, loader=LoaderConfig(workers=1, ray_resources={"loader": 1.0}))
    with pytest.raises(ClusterError, match=r"no batch came from 1 data workers in 2 s; each needs 1 free CPUs .*ray_resources"):
        next(_through_ray(starved, timeout=2).batches(3))


def test_a_batch_that_data_workers_cannot_share_is_refused(loading: Loading) -> None:
    with pytest.raises(ConfigError, match="global_batch_size 12 is not divisible by 5 workers; use 10 or 15"):
        _through_ray(replace(loading, loader=LoaderConfig(ray_workers=5)))


def fit(work: TrainingJob) -> None:
    """Train on Ray."""
    from heliostat.runtime.trainer import TrainingRequest, train

    request = TrainingRequest({"": "model/tiny@1"}, work, NullTracker(), {"": ""})
    train(request, {"": NullRun()}, Progress(io.StringIO()))


RAY_DATA = ("loader.via=ray_data", "loader.ray_workers=2", "loader.workers=1")


def test_the_model_does_not_tell_how_its_images_came(tmp_path: Path) -> None:
    tar = shard(broken=3)
    fit(job(tmp_path / "ray_data", settings("scaling.num_workers=1", *RAY_DATA), tar))
    train_here(job(tmp_path / "threads", settings("scaling.num_workers=1"), tar))
    assert final_files(tmp_path / "ray_data") == final_files(tmp_path / "threads")
    assert _wait_until(_all_cpus_are_free)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            ("scaling.num_workers=2", "loader.workers=3"),
            r"2 workers with 2 data workers each need 14 CPU, Ray has 6; lower scaling\.num_workers, loader\.ray_workers or "
            r"loader\.workers, use loader\.via=threads, or raise cluster\.num_cpus",
        ),
        (
            ('loader.ray_resources={"loader": 1}',),
            r"1 workers with 2 .* need 2 loader, Ray has 0; .* or add nodes that have loader",
        ),
        (
            ("crops.global_crops_size=2048", "train.global_batch_size=16"),
            r"take 2,\d+ MB of the object store, Ray has \d+ MB; raise cluster\.object_store_memory or lower loader\.prefetch",
        ),
    ],
)
def test_a_cluster_without_room_for_the_data_workers_is_refused_at_once(
    tmp_path: Path, changes: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(TrainingError, match=complaint):
        fit(job(tmp_path, settings("scaling.num_workers=1", *RAY_DATA, *changes), shard()))
