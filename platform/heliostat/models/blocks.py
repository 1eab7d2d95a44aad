"""Transformer blocks over a packed sequence: every linear and norm sees all crops at once, attention sees one crop group.

A packed sequence is the tokens of several groups of equal-sized images laid end to end. Packing makes few large matrix products
out of many small ones; attention is 2-7 % of the work at these lengths, so one attention call per group costs little.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from heliostat.models.config import BackboneConfig

# Shapes: S tokens of all groups, R tokens of the kept subset, B images and T tokens per image of one group, D width,
# H attention heads, E width of one attention head.


class Group(NamedTuple):
    """Images of one size inside a packed sequence: num_images * num_tokens consecutive rows."""

    num_images: int
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """Rows of the packed sequence that belong to the group."""
        return self.num_images * self.num_tokens


class Subset(NamedTuple):
    """The images of each group that a residual branch is computed for."""

    groups: tuple[Group, ...]
    rows_R: Tensor
    factor_R1: Tensor


def draw_subset(groups: Sequence[Group], drop_path_rate: float, device: torch.device) -> Subset:
    """Draw, in each group, the images that receive the residual, and the factor B/subset that keeps its expectation.

    At least one image per group is kept (as DINOv2), so every parameter takes part in every step. Uses the global generator.
    """
    kept_groups, rows, factors, start = [], [], [], 0
    for group in groups:
        num_kept = max(int(group.num_images * (1 - drop_path_rate)), 1)
        images = torch.randperm(group.num_images, device=device)[:num_kept]
        tokens = torch.arange(group.num_tokens, device=device)
        rows.append((start + images[:, None] * group.num_tokens + tokens).flatten())
        kept = Group(num_kept, group.num_tokens)
        factors.append(torch.full((kept.num_rows, 1), group.num_images / num_kept, device=device))
        kept_groups.append(kept)
        start += group.num_rows
    return Subset(tuple(kept_groups), torch.cat(rows), torch.cat(factors))


class Attention(nn.Module):
    """Multi-head self-attention inside each image of a packed sequence."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim, bias=config.proj_bias)

    def forward(self, x_SD: Tensor, groups: Sequence[Group]) -> Tensor:
        """(S, D) -> (S, D); one fused attention call per group."""
        parts = torch.split(self.qkv(x_SD), [group.num_rows for group in groups])
        mixed = [self._attend(part, group) for part, group in zip(parts, groups, strict=True)]
        return self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed))  # type: ignore[no-any-return]

    def _attend(self, qkv_SD: Tensor, group: Group) -> Tensor:
        qkv = qkv_SD.view(group.num_images, group.num_tokens, 3, self.num_heads, -1)
        query_BHTE, key_BHTE, value_BHTE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTE = functional.scaled_dot_product_attention(query_BHTE, key_BHTE, value_BHTE)
        return mixed_BHTE.transpose(1, 2).reshape(group.num_rows, -1)


class Mlp(nn.Module):
    """Two linears around an exact GELU."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_hidden_dim, bias=config.ffn_bias)
        self.fc2 = nn.Linear(config.mlp_hidden_dim, config.embed_dim, bias=config.ffn_bias)

    def forward(self, x_SD: Tensor) -> Tensor:
        """(S, D) -> (S, D)."""
        return self.fc2(functional.gelu(self.fc1(x_SD)))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated feed-forward layer with both input projections packed in w12 (arXiv 2002.05202)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.embed_dim, 2 * config.mlp_hidden_dim, bias=config.ffn_bias)
        self.w3 = nn.Linear(config.mlp_hidden_dim, config.embed_dim, bias=config.ffn_bias)

    def forward(self, x_SD: Tensor) -> Tensor:
        """(S, D) -> (S, D)."""
        gate, value = self.w12(x_SD).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)  # type: ignore[no-any-return]


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
        if not self.training or self.drop_path_rate == 0:
            x_SD = x_SD + self.ls1(self.attn(self.norm1(x_SD), groups))
            x_SD = x_SD + self.ls2(self.mlp(self.norm2(x_SD)))
            return x_SD
        subset = draw_subset(groups, self.drop_path_rate, x_SD.device)
        kept_RD = self.norm1(x_SD.index_select(0, subset.rows_R))
        x_SD = _add_to_subset(x_SD, self.attn(kept_RD, subset.groups), self.ls1.gamma, subset)
        subset = draw_subset(groups, self.drop_path_rate, x_SD.device)
        kept_RD = self.norm2(x_SD.index_select(0, subset.rows_R))
        return _add_to_subset(x_SD, self.mlp(kept_RD), self.ls2.gamma, subset)


def _add_to_subset(x_SD: Tensor, branch_RD: Tensor, gamma_D: Tensor, subset: Subset) -> Tensor:
    """Add the scaled branch to the kept rows. Out of place: activation checkpointing must find its input unchanged."""
    scaled_RD = branch_RD * gamma_D * subset.factor_R1
    return torch.index_add(x_SD, 0, subset.rows_R, scaled_RD.to(x_SD.dtype))
