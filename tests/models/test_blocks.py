import pytest
import torch

from heliostat.models.blocks import Block, Group, draw_subset
from heliostat.models.config import BackboneConfig
from heliostat.models.vit import VisionTransformer

CONFIG = BackboneConfig(arch="vit_tiny", embed_dim=16, num_heads=2, depth=1, layerscale=0.5)
GROUPS = (Group(8, 5), Group(4, 3))


def test_a_subset_keeps_whole_images_of_each_group_once():
    subset = draw_subset(GROUPS, 0.5, torch.device("cpu"))
    assert subset.groups == (Group(4, 5), Group(2, 3))
    first, second = subset.rows_R[:20].view(4, 5), subset.rows_R[20:].view(2, 3)
    for images, start, length in ((first, 0, 5), (second, 40, 3)):
        assert (images[:, 0] - start).remainder(length).eq(0).all()
        assert (images == images[:, :1] + torch.arange(length)).all()
        assert len(images[:, 0].unique()) == len(images)
    assert int(first.max()) < 40 <= int(second.min())


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.4, 0.9, 0.99])
def test_at_least_one_image_is_kept_and_the_factor_restores_the_expectation(rate):
    subset = draw_subset(GROUPS, rate, torch.device("cpu"))
    for kept, group in zip(subset.groups, GROUPS, strict=True):
        assert kept.num_images == max(int(group.num_images * (1 - rate)), 1)
    mass = subset.factor_R1[:, 0].split([kept.num_rows for kept in subset.groups])
    assert [float(part.sum()) for part in mass] == pytest.approx([40, 12])


@torch.no_grad()
def test_each_draw_adds_the_scaled_branch_to_kept_images_and_nothing_to_the_others():
    block = Block(CONFIG, 0.5).train()
    block.mlp.fc2.weight.zero_()
    block.mlp.fc2.bias.zero_()
    tokens = torch.randn(52, 16)
    change = block(tokens, GROUPS) - tokens
    full = block.ls1(block.attn(block.norm1(tokens), GROUPS))
    for rows, expected, kept in (
        (change[:40].view(8, -1), full[:40].view(8, -1), 4),
        (change[40:].view(4, -1), full[40:].view(4, -1), 2),
    ):
        is_kept = rows.abs().sum(1) > 0
        assert int(is_kept.sum()) == kept
        torch.testing.assert_close(rows[is_kept], 2 * expected[is_kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.4])
@torch.no_grad()
def test_the_mean_over_draws_is_the_forward_without_stochastic_depth(rate):
    torch.manual_seed(0)
    block, groups = Block(CONFIG, rate).train(), (Group(6, 3),)
    block.mlp.fc2.weight.zero_()  # with one branch left the output is linear in the draw, so the expectation is exact
    block.mlp.fc2.bias.zero_()
    tokens = torch.randn(18, 16)
    mean = torch.stack([block(tokens, groups) for _ in range(1500)]).mean(0)
    exact = tokens + block.ls1(block.attn(block.norm1(tokens), groups))
    spread = (exact - tokens).abs().max() * (1 / (1 - rate) - 1) ** 0.5 / 1500**0.5
    assert float((mean - exact).abs().max()) < 6 * float(spread) + 1e-6


@pytest.mark.parametrize(("rate", "rows"), [(0.0, 52), (0.5, 26), (0.75, 13)])
def test_dropped_images_are_not_computed(rate, rows):
    block, seen = Block(CONFIG, rate).train(), []
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.norm1, block.norm2):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    block(torch.randn(52, 16), GROUPS)
    assert seen == [rows] * 5


def test_stochastic_depth_is_off_in_evaluation_mode():
    block, tokens = Block(CONFIG, 0.9).eval(), torch.randn(52, 16)
    assert torch.equal(block(tokens, GROUPS), block(tokens, GROUPS))


def test_the_input_of_a_block_is_left_unchanged_so_that_it_can_be_recomputed():
    block, tokens = Block(CONFIG, 0.5).train(), torch.randn(52, 16)
    before = tokens.clone()
    block(tokens, GROUPS)
    assert torch.equal(tokens, before)


def test_a_reseeded_step_draws_the_same_subsets():
    backbone = VisionTransformer(CONFIG, drop_path_rate=0.4).train()
    images = torch.randn(5, 3, 28, 28)
    torch.manual_seed(7)
    first = backbone(images).prenorm_BTD
    torch.manual_seed(7)
    assert torch.equal(first, backbone(images).prenorm_BTD)
    assert not torch.equal(first, backbone(images).prenorm_BTD)


def test_gradients_flow_through_kept_and_dropped_images():
    block = Block(CONFIG, 0.5).train()
    tokens = torch.randn(52, 16, requires_grad=True)
    block(tokens, GROUPS).square().sum().backward()
    assert (tokens.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad is not None for parameter in block.parameters())
