"""A batch that became a block comes back as it was; so does an error."""

import numpy as np
import pytest
import torch

from heliostat.data.batch import Batch
from heliostat.data.batch_arrays import new_arrays
from heliostat.data.config import CropsConfig
from heliostat.data.quarantine import Rejection
from heliostat.errors import ArtifactConflictError, DataError
from heliostat.runtime.ray_blocks import error_block, from_block, to_block

CROPS = CropsConfig(global_crops_size=8, local_crops_size=4, local_crops_number=3)


def _batch(seed: int, num_images: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def pixels(count: int, side: int) -> torch.Tensor:
        return torch.randint(0, 256, (count * num_images, 3, side, side), generator=generator, dtype=torch.uint8)

    masks = torch.rand((2 * num_images, 4), generator=generator) < 0.5
    return Batch(pixels(2, 8), pixels(3, 4), masks, tuple(f"{seed}-{number}" for number in range(num_images)))


def test_slices_laid_side_by_side_are_the_crop_major_batch() -> None:
    parts = [_batch(seed, 2) for seed in range(3)]
    rejections = [Rejection("", "shards/0.tar", 512, 9, "ab", "truncated", "ünd \u0000 more")]
    arrays = new_arrays(6, CROPS, 4, pinned=False)
    for number, part in enumerate(parts):
        found = from_block(to_block(7, part, rejections, 99))
        assert (found.step, found.num_bytes, found.rejections) == (7, 99, rejections)
        arrays.write_slice(2 * number, found.crops_and_masks, found.image_ids)
    whole = arrays.batch()
    assert whole.image_ids == sum((part.image_ids for part in parts), ())
    for name, count in (("global_crops", 2), ("local_crops", 3), ("masks", 2)):
        for crop in range(count):
            expected = torch.cat([getattr(part, name)[2 * crop : 2 * crop + 2] for part in parts])
            assert torch.equal(getattr(whole, name)[6 * crop : 6 * crop + 6], expected), (name, crop)


def test_a_block_shares_the_memory_of_its_batch() -> None:
    batch = _batch(0, 2)
    found = from_block(to_block(0, batch, [], 0))
    assert np.shares_memory(found.crops_and_masks[0], batch.global_crops.numpy())


@pytest.mark.parametrize("error", [DataError("100 images in a row"), ArtifactConflictError("another fingerprint")])
def test_an_error_comes_back_as_the_same_kind_and_text(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        from_block(error_block(error))
    assert str(raised.value) == str(error)
