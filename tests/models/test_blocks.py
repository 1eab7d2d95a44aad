import pytest
import torch

from heliostat.errors import ConfigError
from heliostat.models.blocks import Block, attend_varlen
from heliostat.models.config import BackboneConfig
from heliostat.models.stochastic_depth import Group, draw_subset
from heliostat.models.vit import VisionTransformer

CONFIG = BackboneConfig(arch="vit_tiny", embed_dim=16, num_heads=2, depth=1, layerscale=0.5)
GROUPS = (Group(8, 5), Group(4, 3))


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


def masked(block, tokens, groups, subsets):
    """The block computed for every image, its branches multiplied by B/subset or 0."""
    branches = (lambda x: block.ls1(block.attn(block.norm1(x), groups)), lambda x: block.ls2(block.mlp(block.norm2(x))))
    for branch, subset in zip(branches, subsets, strict=True):
        masks = []
        for group, images in zip(groups, subset.images, strict=True):
            mask = torch.zeros(group.num_images)
            mask[images] = group.num_images / len(images)
            masks.append(mask.repeat_interleave(group.num_tokens))
        tokens = tokens + torch.cat(masks)[:, None] * branch(tokens)
    return tokens


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_values_and_gradients_equal_those_of_a_block_that_computes_all_images_and_masks_them(rate, ffn_layer):
    config = CONFIG.model_copy(update={"ffn_layer": ffn_layer, "proj_bias": rate > 0})
    block = Block(config, rate).train().double()
    tokens = torch.randn(52, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(52, 16, dtype=torch.float64)
    torch.manual_seed(5)
    subsets = [draw_subset(GROUPS, rate, torch.device("cpu")) for _ in range(2)]
    torch.manual_seed(5)
    results = []
    for output in (block(tokens, GROUPS), masked(block, tokens, GROUPS, subsets)):
        gradients = torch.autograd.grad((output * weights).sum(), [tokens, *block.parameters()])
        results.append((output.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_a_gradient_that_is_not_contiguous_is_taken():
    block, tokens = Block(CONFIG, 0.5).train(), torch.randn(52, 16, requires_grad=True)
    block(tokens, GROUPS).sum().backward()  # the gradient of a sum is one number with strides of 0
    assert tokens.grad.isfinite().all()


def test_recomputation_gives_the_same_gradients():
    block, tokens = Block(CONFIG, 0.5).train(), torch.randn(52, 16, requires_grad=True)
    torch.manual_seed(3)
    (plain,) = torch.autograd.grad(block(tokens, GROUPS).square().sum(), tokens)
    torch.manual_seed(3)
    output = torch.utils.checkpoint.checkpoint(block, tokens, GROUPS, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(output.square().sum(), tokens)
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_gain_survives_16_bits_in_training(dtype, rate):
    block, tokens = Block(CONFIG.model_copy(update={"layerscale": 1e-5}), rate).train(), torch.randn(52, 16)
    torch.manual_seed(3)
    exact = block(torch.zeros(52, 16) + 1e-9 * tokens, GROUPS)  # tokens so small that the change is not lost in the sum
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype):
        output = block(torch.zeros(52, 16) + 1e-9 * tokens, GROUPS)
    assert output.dtype == torch.float32
    assert exact.abs().max() > 1e-7
    torch.testing.assert_close(output, exact, atol=0.03 * exact.abs().max().item(), rtol=0)


def separate_sequences(query, key, value, starts, *rest):
    """What PyTorch's variable-length attention is documented to compute: softmax attention, sequence by sequence."""
    key_starts, longest, longest_key = rest
    assert torch.equal(starts, key_starts)
    assert longest == longest_key == int(starts.diff().max())
    outputs = []
    for first, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        scores = torch.einsum("qhe,khe->hqk", query[first:end], key[first:end]) / query.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), value[first:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("groups", [GROUPS, (Group(1, 1),), (Group(2, 3), Group(1, 7), Group(5, 1))])
def test_one_variable_length_call_is_attention_within_each_image(groups):
    block = Block(CONFIG, 0.0)
    tokens = torch.randn(sum(group.num_rows for group in groups), 16)
    mixed = attend_varlen(block.attn.qkv(tokens), groups, block.attn.num_heads, separate_sequences)
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(tokens, groups), atol=1e-6, rtol=1e-5)


def test_the_bounds_of_a_variable_length_call_are_those_that_the_kernel_wants():
    seen = []
    attend_varlen(torch.zeros(52, 48), GROUPS, 2, lambda query, key, value, starts, *rest: seen.append(starts) or query)
    assert seen[0].dtype == torch.int32
    assert seen[0].tolist() == [0, 5, 10, 15, 20, 25, 30, 35, 40, 43, 46, 49, 52]


def test_variable_length_attention_is_refused_where_it_has_no_kernel():
    backbone = VisionTransformer(CONFIG)
    backbone.set_attention("varlen")
    with pytest.raises(ConfigError, match=r"not on cpu in torch\.float32; use autocast there, or set_attention\('sdpa'\)"):
        backbone(torch.zeros(1, 3, 28, 28))
    backbone.set_attention("sdpa")
    backbone(torch.zeros(1, 3, 28, 28))


def test_an_unknown_attention_kernel_is_refused():
    with pytest.raises(ConfigError, match="attention kernel 'flash' is unknown; use sdpa or varlen"):
        VisionTransformer(CONFIG).set_attention("flash")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_attention_kernels_agree_on_a_gpu():
    config = BackboneConfig(arch="vit_small", depth=2, img_size=56, layerscale=0.5)
    backbone = VisionTransformer(config, drop_path_rate=0.3).cuda().train()
    crops = [torch.randn(6, 3, 56, 56, device="cuda"), torch.randn(9, 3, 28, 28, device="cuda")]
    results = []
    for kernel in ("sdpa", "varlen"):
        backbone.set_attention(kernel)
        backbone.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            features = backbone.forward_packed(crops, [None, None])
            sum(group.cls_BD.float().square().mean() + group.patches_BND.float().mean() for group in features).backward()
        values = [group.prenorm_BTD.detach() for group in features]
        results.append(values + [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None])
    for sdpa, varlen in zip(*results, strict=True):
        assert (sdpa - varlen).norm() <= 0.02 * sdpa.norm()
