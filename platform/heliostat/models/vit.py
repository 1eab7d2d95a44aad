"""The Vision Transformer, with the parameter names and numerics of DINOv2 (arXiv 2304.07193; registers: arXiv 2309.16588)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from heliostat.errors import ConfigError, DataError
from heliostat.models.blocks import AttentionKernel, Block
from heliostat.models.config import BackboneConfig
from heliostat.models.stochastic_depth import Group

# Shapes: B images, C channels, H W image sides, h w grid sides, N = h*w patches, R registers, T = 1 + R + N tokens, D width,
# S tokens of a packed sequence.


@dataclass(frozen=True)
class Features:
    """What a backbone says about a group of images. The first three are after the final norm, prenorm_BTD before it."""

    cls_BD: Tensor
    registers_BRD: Tensor
    patches_BND: Tensor
    prenorm_BTD: Tensor


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to one token."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), patches in row order."""
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """A DINOv2 backbone. Stochastic depth works in training mode only, at one rate for all blocks."""

    def __init__(self, config: BackboneConfig, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.embed_dim = dim
        self.patch_size = config.patch_size
        self.checkpoint_blocks = False
        """Whether a forward pass with gradients keeps only the input of each block, and computes the rest again."""
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid_size**2, dim))
        if config.num_register_tokens:
            self.register_tokens: nn.Parameter | None = nn.Parameter(torch.empty(1, config.num_register_tokens, dim))
        else:
            self.register_parameter("register_tokens", None)
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config, drop_path_rate) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        initialise_backbone(self)

    def set_attention(self, kernel: AttentionKernel) -> None:
        """Choose how attention is computed; the results agree up to rounding, so no recipe and no weight file knows of it.

        sdpa, the default, is one call per group of images; varlen is one for all groups, on CUDA in 16 bits only. Raises
        ConfigError for another name.
        """
        if kernel not in get_args(AttentionKernel):
            raise ConfigError(f"attention kernel {kernel!r} is unknown; use {' or '.join(get_args(AttentionKernel))}")
        for block in self.blocks:
            block.attn.kernel = kernel  # type: ignore[union-attr]

    def forward(self, images_BCHW: Tensor, masks_BN: Tensor | None = None) -> Features:
        """Features of one group of images; masks_BN is True where a patch is replaced by the mask token."""
        return self.forward_packed([images_BCHW], [masks_BN])[0]

    def forward_packed(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Features]:
        """Features of several groups of images of different sizes, computed as one packed sequence."""
        x_SD, groups = self._pack(images, masks)
        recompute = self.checkpoint_blocks and torch.is_grad_enabled()
        for block in self.blocks:
            x_SD = checkpoint(block, x_SD, groups, use_reentrant=False) if recompute else block(x_SD, groups)
        return self._features(x_SD, groups)

    def get_intermediate_layers(
        self,
        images_BCHW: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens after chosen blocks, in block order: the last n blocks, or the block indices in n.

        Patches are (B, N, D), or (B, D, h, w) with reshape. With return_class_token each entry is (patches, cls_BD). norm
        applies the final norm to every entry. Raises DataError when a block index does not exist.
        """
        height, width = self._grid(images_BCHW)
        entries = [
            self._split(x_BTD, normed_BTD=self.norm(x_BTD) if norm else x_BTD)
            for x_BTD in self._run_until(images_BCHW, self._block_indices(n))
        ]
        patches = tuple(
            entry.patches_BND.transpose(1, 2).reshape(-1, self.embed_dim, height, width) if reshape else entry.patches_BND
            for entry in entries
        )
        if not return_class_token:
            return patches
        return tuple((patch, entry.cls_BD) for patch, entry in zip(patches, entries, strict=True))

    def _block_indices(self, n: int | Sequence[int]) -> list[int]:
        depth = len(self.blocks)
        wanted = list(range(depth - n, depth)) if isinstance(n, int) else sorted(set(n))
        if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
            raise DataError(f"blocks {n} were asked for; this backbone has blocks 0 to {depth - 1}")
        return wanted

    def _run_until(self, images_BCHW: Tensor, wanted: Sequence[int]) -> Iterator[Tensor]:
        x_SD, (group,) = self._pack([images_BCHW], [None])
        for index in range(wanted[-1] + 1):
            x_SD = self.blocks[index](x_SD, (group,))
            if index in wanted:
                yield x_SD.view(group.num_images, group.num_tokens, -1)

    def _grid(self, images_BCHW: Tensor) -> tuple[int, int]:
        height, width = images_BCHW.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise DataError(
                f"images of {height} x {width} pixels cannot be cut into patches of {self.patch_size}; "
                f"resize both sides to multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _tokens(self, images_BCHW: Tensor, masks_BN: Tensor | None) -> Tensor:
        height, width = self._grid(images_BCHW)
        x_BND = self.patch_embed(images_BCHW)
        if masks_BN is not None:
            if masks_BN.shape != x_BND.shape[:2]:
                raise DataError(f"masks of shape {tuple(masks_BN.shape)} do not fit {tuple(x_BND.shape[:2])} patches")
            x_BND = torch.where(masks_BN.unsqueeze(-1), self.mask_token.to(x_BND.dtype), x_BND)
        pos_embed = resize_pos_embed(
            self.pos_embed,
            (height, width),
            antialias=self.config.interpolate_antialias,
            offset=self.config.interpolate_offset,
        )
        cls_B1D = (self.cls_token + pos_embed[:, :1]).expand(x_BND.shape[0], -1, -1)
        x_BND = x_BND + pos_embed[:, 1:]
        if self.register_tokens is None:
            return torch.cat([cls_B1D, x_BND], dim=1)
        return torch.cat([cls_B1D, self.register_tokens.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)

    def _pack(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Group, ...]]:
        tokens = [self._tokens(image, mask) for image, mask in zip(images, masks, strict=True)]
        groups = tuple(Group(x_BTD.shape[0], x_BTD.shape[1]) for x_BTD in tokens)
        flat = [x_BTD.flatten(0, 1) for x_BTD in tokens]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)), groups

    def _features(self, x_SD: Tensor, groups: Sequence[Group]) -> list[Features]:
        rows = [group.num_rows for group in groups]
        pairs = zip(groups, torch.split(x_SD, rows), torch.split(self.norm(x_SD), rows), strict=True)
        return [self._split(prenorm.view(*group, -1), normed_BTD=normed.view(*group, -1)) for group, prenorm, normed in pairs]

    def _split(self, prenorm_BTD: Tensor, *, normed_BTD: Tensor) -> Features:
        first_patch = 1 + self.config.num_register_tokens
        return Features(
            cls_BD=normed_BTD[:, 0],
            registers_BRD=normed_BTD[:, 1:first_patch],
            patches_BND=normed_BTD[:, first_patch:],
            prenorm_BTD=prenorm_BTD,
        )


def resize_pos_embed(pos_embed_1TD: Tensor, grid: tuple[int, int], *, antialias: bool, offset: float) -> Tensor:
    """Position embedding of [cls, patches] for a grid of (rows, columns) of patches, resized bicubically in float32.

    With an offset the scale is (side + offset) / native side, DINOv2's first convention, which the released models without
    registers were evaluated with; with offset 0 the target size itself is given.
    """
    native = round((pos_embed_1TD.shape[1] - 1) ** 0.5)
    if grid == (native, native):
        return pos_embed_1TD
    patches = pos_embed_1TD[:, 1:].float().reshape(1, native, native, -1).permute(0, 3, 1, 2)
    if offset:
        scale = tuple((side + offset) / native for side in grid)
        resized = functional.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        resized = functional.interpolate(patches, size=grid, mode="bicubic", antialias=antialias)
    flat = resized.flatten(2).transpose(1, 2).to(pos_embed_1TD.dtype)
    return torch.cat([pos_embed_1TD[:, :1], flat], dim=1)


def initialise_linears(module: nn.Module) -> None:
    """Every linear of a module: weight truncated normal with standard deviation 0.02, bias 0 (DINOv2)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def initialise_backbone(backbone: VisionTransformer) -> None:
    """DINOv2's initialisation; the patch projection keeps PyTorch's default."""
    initialise_linears(backbone)
    nn.init.trunc_normal_(backbone.pos_embed, std=0.02)
    nn.init.normal_(backbone.cls_token, std=1e-6)
    if backbone.register_tokens is not None:
        nn.init.normal_(backbone.register_tokens, std=1e-6)
    nn.init.zeros_(backbone.mask_token)
