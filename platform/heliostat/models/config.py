"""What a network looks like: backbone and head configurations, with no import of torch so that recipes validate fast."""

from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from heliostat.config import StrictModel


class ArchSize(NamedTuple):
    """Width, number of blocks and attention heads of a named architecture."""

    embed_dim: int
    depth: int
    num_heads: int


# Table 17 of arXiv 2304.07193, except ViT-B, whose released weights have 12 blocks where the table prints 18, and vit_tiny,
# the usual 192-wide member of the family (arXiv 2012.12877), which DINOv2 did not train.
ARCH_SIZES: dict[str, ArchSize] = {
    "vit_tiny": ArchSize(192, 12, 3),
    "vit_small": ArchSize(384, 12, 6),
    "vit_base": ArchSize(768, 12, 12),
    "vit_large": ArchSize(1024, 24, 16),
    "vit_giant2": ArchSize(1536, 40, 24),
}


class BackboneConfig(StrictModel):
    """A Vision Transformer of the DINOv2 family."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"] = "vit_large"
    """Named size: gives embed_dim, depth and num_heads where those are not set."""

    embed_dim: int = Field(default=0, ge=0)
    """Width D of a token; 0 takes the value of arch. Never 0 after validation."""

    depth: int = Field(default=0, ge=0)
    """Number of transformer blocks; 0 takes the value of arch. Never 0 after validation."""

    num_heads: int = Field(default=0, ge=0)
    """Number of attention heads; 0 takes the value of arch. Never 0 after validation."""

    img_size: int = Field(default=224, ge=1)
    """Side in pixels of the square image the position embedding is stored for; other sizes are interpolated."""

    patch_size: int = Field(default=14, ge=1)
    """Side of a patch in pixels."""

    in_chans: int = Field(default=3, ge=1)
    """Channels of an image."""

    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the feed-forward layer as a multiple of embed_dim, before the two thirds of swiglufused."""

    ffn_layer: Literal["mlp", "swiglufused"] = "mlp"
    """Feed-forward layer: two linears around GELU, or gated SwiGLU at equal cost (DINOv2's from-scratch models)."""

    qkv_bias: bool = True
    """Bias of the attention's input projection."""

    proj_bias: bool = True
    """Bias of the attention's output projection."""

    ffn_bias: bool = True
    """Biases of the feed-forward layer."""

    layerscale: float = Field(default=1e-5, gt=0)
    """Initial value of the per-channel gain on each residual branch (DINOv2: 1e-5)."""

    num_register_tokens: int = Field(default=4, ge=0)
    """Learned tokens that belong to no patch and keep the patch tokens clean (arXiv 2309.16588: 4)."""

    interpolate_antialias: bool = True
    """Antialias the position embedding when it is resized (released models: True with registers, False without)."""

    interpolate_offset: float = Field(default=0.0, ge=0, lt=1)
    """Patches added to the target grid when its scale is computed (released models: 0.0 with registers, 0.1 without)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_arch(cls, data: Any) -> Any:
        size = ARCH_SIZES.get(str(data.get("arch", "vit_large"))) if isinstance(data, dict) else None
        if size is None:
            return data
        return data | {key: value for key, value in size._asdict().items() if data.get(key, 0) == 0}

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}; "
                f"use embed_dim {self.embed_dim // self.num_heads * self.num_heads + self.num_heads}"
            )
        if self.img_size % self.patch_size:
            below = self.img_size // self.patch_size * self.patch_size
            sizes = f"{below} or {below + self.patch_size}" if below else f"{self.patch_size}"
            raise ValueError(f"img_size {self.img_size} is not divisible by patch_size {self.patch_size}; use {sizes}")
        return self

    @property
    def grid_size(self) -> int:
        """Patches along one side of the native image."""
        return self.img_size // self.patch_size

    @property
    def mlp_hidden_dim(self) -> int:
        """Width between the two halves of the feed-forward layer; SwiGLU rounds two thirds of it up to a multiple of 8."""
        hidden = int(self.embed_dim * self.mlp_ratio)
        return hidden if self.ffn_layer == "mlp" else (int(hidden * 2 / 3) + 7) // 8 * 8


class HeadConfig(StrictModel):
    """A projection head: tokens to logits over prototypes."""

    out_dim: int = Field(default=65_536, ge=2)
    """Number of prototypes K."""

    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the hidden layers."""

    bottleneck_dim: int = Field(default=256, ge=1)
    """Width of the normalised vector that is compared with the prototypes."""

    nlayers: int = Field(default=3, ge=1)
    """Linear layers before the prototypes."""
