import pytest
import torch

from heliostat.models.stochastic_depth import Group, add_to_subset, draw_subset, take_subset

GROUPS = (Group(8, 5), Group(4, 3))
CPU = torch.device("cpu")


def test_a_subset_keeps_whole_images_of_each_group_once():
    subset = draw_subset(GROUPS, 0.5, CPU)
    assert subset.groups == (Group(4, 5), Group(2, 3))
    places = torch.arange(52)[:, None] * torch.ones(1, 2, dtype=torch.int64)
    _, rows = take_subset(places, subset)
    first, second = rows[:20, 0].view(4, 5), rows[20:, 0].view(2, 3)
    for images, start, length in ((first, 0, 5), (second, 40, 3)):
        assert (images[:, 0] - start).remainder(length).eq(0).all()
        assert (images == images[:, :1] + torch.arange(length)).all()
        assert len(images[:, 0].unique()) == len(images)
    assert int(first.max()) < 40 <= int(second.min())


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.4, 0.9, 0.99])
def test_at_least_one_image_is_kept_and_the_factor_restores_the_expectation(rate):
    subset = draw_subset(GROUPS, rate, CPU)
    for kept, group in zip(subset.groups, GROUPS, strict=True):
        assert kept.num_images == max(int(group.num_images * (1 - rate)), 1)
    added = add_to_subset(torch.zeros(52, 2), torch.ones(sum(kept.num_rows for kept in subset.groups), 2), subset)
    assert [float(part.sum()) for part in added[:, 0].split([40, 12])] == pytest.approx([40, 12])


def test_a_branch_in_16_bits_is_added_in_the_precision_of_the_stream():
    subset, stream = draw_subset(GROUPS, 0.5, CPU), torch.ones(52, 2)
    branch = torch.full((26, 2), 2.0**-12, dtype=torch.bfloat16, requires_grad=True)
    added = add_to_subset(stream, branch, subset)
    assert added.dtype == torch.float32
    assert added.unique().tolist() == [1, 1 + 2 * 2.0**-12]  # bfloat16 has no number between 1 and 1 + 2 ** -7
    added.sum().backward()
    assert branch.grad.dtype == torch.bfloat16
    assert branch.grad.unique().tolist() == [2]
