"""Crops that are cut on the training device are those that the loader's threads cut, within the tolerance."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from tars import Tars

from heliostat.data.batch import Batch
from heliostat.data.config import CropsConfig, LoaderConfig
from heliostat.data.image_source import ImageSource
from heliostat.data.image_table import image_table
from heliostat.data.loader import ImageLoader
from heliostat.data.masking import MaskSettings
from heliostat.data.photographs import crops
from heliostat.data.raw_batch import RawBatch, crops_of
from heliostat.data.shards import make_shard_image, manifest_rows, write_shard

KEY = "shards/000000.tar"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make() -> Callable[..., ImageLoader]:
    images = []
    for number, crop in enumerate(crops("left", count=1, seed=0)):
        height = 60 + 7 * number
        pixels = cv2.resize(crop.pixels, (90, height))
        images.append(make_shard_image(cv2.imencode(".png", pixels)[1].tobytes(), "png", f"{number}.png"))
    images.append(make_shard_image(b"no image", "png", "bad.png"))
    tar = write_shard(images)
    source = ImageSource(image_table(manifest_rows(KEY, tar)), Tars({KEY: tar}))

    def build(cut_on: str, **changes: object) -> ImageLoader:
        config = CropsConfig(global_crops_size=48, local_crops_size=24, local_crops_number=3, cut_on=cut_on)  # type: ignore[arg-type]
        settings: dict[str, object] = {"crops": config, "loader": LoaderConfig(workers=2), "masks": MaskSettings(8)}
        settings |= {"global_batch_size": 6, "seed": 3}
        return ImageLoader((source,), **(settings | changes))  # type: ignore[arg-type]

    return build


def test_both_places_cut_the_same_crops(make: Callable[..., ImageLoader]) -> None:
    on_device, on_cpu = make("device"), make("cpu")
    config = on_cpu._crops
    scale = np.mean(config.std) * 255
    for raw, plain in zip(on_device.batches(6), on_cpu.batches(6), strict=True):
        assert isinstance(raw, RawBatch)
        assert isinstance(plain, Batch)
        one, two = crops_of(raw, config, CPU), crops_of(plain, config, CPU)
        assert one.image_ids == two.image_ids
        assert torch.equal(one.masks, two.masks)
        for mine, theirs in ((one.global_crops, two.global_crops), (one.local_crops, two.local_crops)):
            assert mine.dtype == theirs.dtype == torch.float32
            assert float((mine - theirs).abs().mean()) * scale < 1.5
    assert on_device.take_rejections() == on_cpu.take_rejections() != []


def test_raw_batches_resume_and_divide_among_ranks(make: Callable[..., ImageLoader]) -> None:
    whole = list(make("device").batches(5))
    resumed = make("device")
    resumed.load_state_dict(make("device").state_dict() | {"position": 3 * 6})
    for one, two in zip(resumed.batches(2), whole[3:], strict=True):
        assert isinstance(one, RawBatch)
        assert isinstance(two, RawBatch)
        assert torch.equal(one.images.pixels, two.images.pixels)
        assert (one.parameters.boxes_R4 == two.parameters.boxes_R4).all()
    ranks = [make("device", rank=rank, world_size=2).batch(2) for rank in range(2)]
    assert sum((part.image_ids for part in ranks), ()) == whole[2].image_ids
    assert sum((part.images.sizes for part in ranks if isinstance(part, RawBatch)), ()) == whole[2].images.sizes  # type: ignore[union-attr]
