"""The comparison that every format goes through."""

import pytest
import torch
from random_backbone import tiny_config

from heliostat.errors import PublishError
from heliostat.publishing.formats import Tokens, importing, largest_difference, random_images, split_tokens


def tokens(registers: int = 2) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return split_tokens(torch.randn(3, 1 + registers + 5, 4, generator=generator), registers)


def test_a_sequence_is_cut_into_cls_registers_and_patches():
    parts = split_tokens(torch.arange(8.0).reshape(1, 8, 1), 2)
    assert [part.flatten().tolist() for part in parts] == [[0], [1, 2], [3, 4, 5, 6, 7]]


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_the_largest_difference_is_found_in_every_part(registers, part):
    ours = tokens(registers)
    if not ours[part].numel():
        return
    changed = [tensor.clone() for tensor in ours]
    changed[part].view(-1)[-1] += 0.5
    changed[part].view(-1)[0] -= 0.25
    assert largest_difference(ours, Tokens(*changed)) == pytest.approx(0.5)
    changed[part].view(-1)[1] = torch.nan
    assert not largest_difference(ours, Tokens(*changed)) <= 1e9
    assert largest_difference(ours, ours) == 0.0


def test_tokens_of_another_shape_are_infinitely_far_and_are_not_spread():
    ours = tokens()
    assert largest_difference(ours, ours._replace(cls_BD=ours.cls_BD[:1])) == float("inf")
    assert largest_difference(ours, ours._replace(registers_BRD=ours.registers_BRD[:, :0])) == float("inf")


def test_the_images_are_always_the_same_and_touch_no_global_state():
    config = tiny_config("mlp", in_chans=1)
    before = torch.get_rng_state()
    images = random_images(config)
    assert torch.equal(images, random_images(config))
    assert images.shape == (4, 1, 32, 32)
    assert torch.equal(before, torch.get_rng_state())


def test_a_library_that_cannot_be_imported_is_said_in_one_line():
    with pytest.raises(PublishError, match=r"^timm cannot be imported: No module named 'absent'; install"), importing("timm"):
        import absent  # noqa: F401
    with pytest.raises(PublishError, match=r"^timm cannot be imported: first; install"), importing("timm"):
        raise RuntimeError("first\nsecond")
