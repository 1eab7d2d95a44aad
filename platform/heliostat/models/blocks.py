"""Transformer blocks over a packed sequence: every linear and norm sees all crops at once, attention sees one crop group.

A packed sequence is the tokens of several groups of equal-sized images laid end to end. Packing makes few large matrix products
out of many small ones; attention is 2-7 % of the work at these lengths, so one attention call per group costs little.
"""

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.errors import ConfigError
from heliostat.models.config import BackboneConfig
from heliostat.models.stochastic_depth import Group, add_to_subset, draw_subset, take_subset

# Shapes: S tokens of all groups, R tokens of the kept images, B images and T tokens per image of one group, D width,
# H attention heads, E width of one attention head, X = 3 D queries, keys and values.

AttentionKernel = Literal["sdpa", "varlen"]


class ScaledLinear(nn.Linear):
    """The last linear of a residual branch, which takes LayerScale's gain into its weights while it trains."""

    def forward(self, x_SD: Tensor, gain_D: Tensor | None = None) -> Tensor:
        """(S, D) -> (S, D), times gain_D. With the gain in the weights nothing more is computed or kept per token."""
        if gain_D is None:
            return super().forward(x_SD)
        if self._computes_in_half(x_SD):  # a gain of 1e-5 takes weights of 0.02 below the normal numbers of float16
            return super().forward(x_SD) * gain_D
        bias_D = None if self.bias is None else self.bias * gain_D
        return functional.linear(x_SD, self.weight * gain_D[:, None], bias_D)

    def _computes_in_half(self, x_SD: Tensor) -> bool:
        kind = x_SD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return dtype == torch.float16


class Attention(nn.Module):
    """Multi-head self-attention inside each image of a packed sequence."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.kernel: AttentionKernel = "sdpa"
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = ScaledLinear(config.embed_dim, config.embed_dim, bias=config.proj_bias)

    def forward(self, x_SD: Tensor, groups: Sequence[Group], gain_D: Tensor | None = None) -> Tensor:
        """(S, D) -> (S, D), times gain_D. One call per group with sdpa, one for all groups with varlen."""
        qkv_SX = self.qkv(x_SD)
        if self.kernel == "varlen":
            _refuse_varlen(qkv_SX)
            return self.proj(attend_varlen(qkv_SX, groups, self.num_heads), gain_D)  # type: ignore[no-any-return]
        parts = torch.split(qkv_SX, [group.num_rows for group in groups])
        mixed = [self._attend(part, group) for part, group in zip(parts, groups, strict=True)]
        return self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed), gain_D)  # type: ignore[no-any-return]

    def _attend(self, qkv_SX: Tensor, group: Group) -> Tensor:
        qkv = qkv_SX.view(group.num_images, group.num_tokens, 3, self.num_heads, -1)
        # Unbound in this order, the three gradients are put together as one contiguous tensor.
        query_BHTE, key_BHTE, value_BHTE = (part_BTHE.transpose(1, 2) for part_BTHE in qkv.unbind(2))
        mixed_BHTE = functional.scaled_dot_product_attention(query_BHTE, key_BHTE, value_BHTE)
        return mixed_BHTE.transpose(1, 2).reshape(group.num_rows, -1)


def _refuse_varlen(qkv_SX: Tensor) -> None:
    if not qkv_SX.is_cuda or qkv_SX.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"varlen attention works on CUDA devices in bfloat16 or float16, not on {qkv_SX.device.type} in {qkv_SX.dtype}; "
            "use autocast there, or set_attention('sdpa')"
        )


def attend_varlen(
    qkv_SX: Tensor, groups: Sequence[Group], num_heads: int, attend: Callable[..., Tensor] | None = None
) -> Tensor:
    """(S, 3 D) -> (S, D): attention inside each image of all groups in one call of PyTorch's variable-length attention.

    attend replaces torch.nn.attention.varlen.varlen_attn: (query_SHE, key_SHE, value_SHE, first rows of the images and their
    end (int32), the same for keys, greatest number of tokens, the same for keys) -> (S, H, E).
    """
    if attend is None:
        from torch.nn.attention.varlen import varlen_attn  # imports much of the compiler: only where it is used

        attend = cast("Callable[..., Tensor]", varlen_attn)
    starts, row = [], 0
    for group in groups:
        end = row + group.num_rows
        starts.append(torch.arange(row, end, group.num_tokens, dtype=torch.int32, device=qkv_SX.device))
        row = end
    # Made on the device: a list copied from the host would wait for it in every block.
    bounds = functional.pad(torch.cat(starts), (0, 1), value=row)
    longest = max(group.num_tokens for group in groups)
    query_SHE, key_SHE, value_SHE = qkv_SX.view(row, 3, num_heads, -1).unbind(1)
    return attend(query_SHE, key_SHE, value_SHE, bounds, bounds, longest, longest).flatten(1)


class Mlp(nn.Module):
    """Two linears around an exact GELU."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_hidden_dim, bias=config.ffn_bias)
        self.fc2 = ScaledLinear(config.mlp_hidden_dim, config.embed_dim, bias=config.ffn_bias)

    def forward(self, x_SD: Tensor, gain_D: Tensor | None = None) -> Tensor:
        """(S, D) -> (S, D), times gain_D."""
        return self.fc2(functional.gelu(self.fc1(x_SD)), gain_D)  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated feed-forward layer with both input projections packed in w12 (arXiv 2002.05202)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.embed_dim, 2 * config.mlp_hidden_dim, bias=config.ffn_bias)
        self.w3 = ScaledLinear(config.mlp_hidden_dim, config.embed_dim, bias=config.ffn_bias)

    def forward(self, x_SD: Tensor, gain_D: Tensor | None = None) -> Tensor:
        """(S, D) -> (S, D), times gain_D."""
        gate, value = self.w12(x_SD).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value, gain_D)  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x_SD: Tensor) -> Tensor:
        """(S, D) -> (S, D)."""
        return x_SD * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and batch-subset stochastic depth (section 5 of arXiv 2304.07193)."""

    def __init__(self, config: BackboneConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)  # eps of every DINOv2 LayerNorm
        self.attn = Attention(config)
        self.ls1 = LayerScale(config.embed_dim, config.layerscale)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = Mlp(config) if config.ffn_layer == "mlp" else SwiGLU(config)
        self.ls2 = LayerScale(config.embed_dim, config.layerscale)

    def forward(self, x_SD: Tensor, groups: Sequence[Group]) -> Tensor:
        """(S, D) -> (S, D). In training mode the branches of dropped images are not computed at all."""
        if not self.training:
            x_SD = torch.addcmul(x_SD, self.attn(self.norm1(x_SD), groups), self.ls1.gamma)
            return torch.addcmul(x_SD, self.mlp(self.norm2(x_SD)), self.ls2.gamma)
        if self.drop_path_rate == 0:
            x_SD = x_SD + self.attn(self.norm1(x_SD), groups, self.ls1.gamma)
            x_SD = x_SD + self.mlp(self.norm2(x_SD), self.ls2.gamma)
            return x_SD
        subset = draw_subset(groups, self.drop_path_rate, x_SD.device)
        x_SD, kept_RD = take_subset(x_SD, subset)
        x_SD = add_to_subset(x_SD, self.attn(self.norm1(kept_RD), subset.groups, self.ls1.gamma), subset)
        subset = draw_subset(groups, self.drop_path_rate, x_SD.device)
        x_SD, kept_RD = take_subset(x_SD, subset)
        return add_to_subset(x_SD, self.mlp(self.norm2(kept_RD), self.ls2.gamma), subset)
