"""A batch whose tensors cannot belong together is refused with the number that is wrong."""

import pytest
import torch

from heliostat.data.batch import Batch
from heliostat.errors import DataError


@pytest.mark.parametrize(
    ("num_global", "num_local", "masks", "message"),
    [
        (7, 0, torch.zeros(7, 4, dtype=torch.bool), "7 global crops are not 2 for each image"),
        (8, 6, torch.zeros(8, 4, dtype=torch.bool), "6 local crops are not as many for each of 4 images"),
        (
            8,
            8,
            torch.zeros(4, 4, dtype=torch.bool),
            r"masks are torch.bool of shape \(4, 4\); give bool, one row for each of 8",
        ),
        (8, 8, torch.zeros(8, 4, dtype=torch.int32), r"masks are torch.int32 of shape \(8, 4\)"),
        (8, 8, torch.zeros(8, 2, 2, dtype=torch.bool), r"masks are torch.bool of shape \(8, 2, 2\)"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(num_global, num_local, masks, message) -> None:
    with pytest.raises(DataError, match=message):
        Batch(torch.zeros(num_global, 3, 28, 28), torch.zeros(num_local, 3, 14, 14), masks)


def test_a_batch_without_local_crops_is_one() -> None:
    batch = Batch(torch.zeros(4, 3, 28, 28), torch.zeros(0, 3, 14, 14), torch.zeros(4, 4, dtype=torch.bool))
    assert batch.num_images == 2
