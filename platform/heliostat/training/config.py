"""What a training method is: losses, teacher, optimizer. Names follow DINOv2's configuration; nothing here imports torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from heliostat.config import StrictModel
from heliostat.models.config import HeadConfig

# Defaults are DINOv2's `vitl16_short` recipe (dinov2/configs/ssl_default_config.yaml), its epochs of 1,250 steps written out.


class DinoConfig(StrictModel):
    """The cls token loss between crops, its head, and KoLeo."""

    loss_weight: float = Field(default=1.0, ge=0)
    """Weight of both cls token losses in the total (DINOv2: 1)."""

    head_n_prototypes: int = Field(default=65_536, ge=2)
    """Prototypes of the DINO head (DINOv2: 65,536 on ImageNet-1k, 131,072 on large data)."""

    head_bottleneck_dim: int = Field(default=256, ge=1)
    """Width of the normalised vector before the prototypes (DINOv2: 256; 384 in the large-data recipes)."""

    head_nlayers: int = Field(default=3, ge=1)
    """Linear layers of the head before the prototypes (DINOv2: 3)."""

    head_hidden_dim: int = Field(default=2048, ge=1)
    """Width of the head's hidden layers (DINOv2: 2048)."""

    koleo_loss_weight: float = Field(default=0.1, ge=0)
    """Weight of KoLeo, summed over both global crops (DINOv2: 0.1); 0 turns it off."""

    koleo_loss_distributed: bool = False
    """Look for the nearest neighbour among the images of all ranks instead of the rank's own (DINOv2: own only)."""

    @property
    def head(self) -> HeadConfig:
        """The DINO head."""
        return HeadConfig(
            out_dim=self.head_n_prototypes,
            hidden_dim=self.head_hidden_dim,
            bottleneck_dim=self.head_bottleneck_dim,
            nlayers=self.head_nlayers,
        )


class IbotConfig(StrictModel):
    """The masked patch token loss, its masks and its head."""

    loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the masked patch loss in the total (DINOv2: 1); 0 turns it off."""

    mask_sample_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of the global crops that are masked for the student (DINOv2: 0.5)."""

    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)
    """Least and greatest share of masked patches in a masked crop (DINOv2: 0.1, 0.5)."""

    separate_head: bool = False
    """Give patch tokens a head of their own (large-data recipes) instead of sharing the DINO head."""

    head_n_prototypes: int = Field(default=65_536, ge=2)
    """Prototypes of the separate head (DINOv2: 131,072 on large data)."""

    head_bottleneck_dim: int = Field(default=256, ge=1)
    """Width of the normalised vector of the separate head (DINOv2: 256)."""

    head_nlayers: int = Field(default=3, ge=1)
    """Linear layers of the separate head before the prototypes (DINOv2: 3)."""

    head_hidden_dim: int = Field(default=2048, ge=1)
    """Width of the separate head's hidden layers (DINOv2: 2048)."""

    @model_validator(mode="after")
    def _check_ratios(self) -> Self:
        low, high = self.mask_ratio_min_max
        if not 0 <= low <= high <= 1:
            raise ValueError(f"mask_ratio_min_max ({low}, {high}) must be two shares in rising order, 0 <= min <= max <= 1")
        return self

    @property
    def head(self) -> HeadConfig:
        """The separate iBOT head."""
        return HeadConfig(
            out_dim=self.head_n_prototypes,
            hidden_dim=self.head_hidden_dim,
            bottleneck_dim=self.head_bottleneck_dim,
            nlayers=self.head_nlayers,
        )


class TeacherConfig(StrictModel):
    """How the teacher follows the student and how sharp its targets are."""

    momentum_teacher: float = Field(default=0.992, ge=0, le=1)
    """Share of the teacher kept at each step, at the start of the cosine (DINOv2: 0.992 short, 0.994 long)."""

    final_momentum_teacher: float = Field(default=1.0, ge=0, le=1)
    """The same share at the last step (DINOv2: 1)."""

    warmup_teacher_temp: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's targets at the first step (DINOv2: 0.04)."""

    teacher_temp: float = Field(default=0.07, gt=0)
    """Temperature after the linear warm-up (DINOv2: 0.07)."""

    warmup_teacher_temp_steps: int = Field(default=37_500, ge=0)
    """Steps of the temperature's warm-up (DINOv2: 30 epochs of 1,250 steps)."""


class OptimConfig(StrictModel):
    """AdamW, its schedules and its parameter groups."""

    lr: float = Field(default=0.004, gt=0)
    """Base learning rate, before scaling_rule (DINOv2: 0.004 short, 2e-4 long)."""

    scaling_rule: Literal["sqrt_wrt_1024", "none"] = "sqrt_wrt_1024"
    """sqrt_wrt_1024 multiplies lr by the square root of global batch / 1024 (DINOv2); none takes lr as it is."""

    warmup_steps: int = Field(default=12_500, ge=0)
    """Steps in which the learning rate rises linearly from 0 (DINOv2: 10 epochs short, 100,000 steps long)."""

    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the end of the cosine (DINOv2: 1e-6)."""

    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at the start of its cosine (DINOv2: 0.04)."""

    weight_decay_end: float = Field(default=0.4, ge=0)
    """Weight decay at the last step (DINOv2: 0.4 short, 0.2 long)."""

    clip_grad: float = Field(default=3.0, ge=0)
    """Greatest gradient norm of each of backbone, dino_head and ibot_head by itself (DINOv2: 3); 0 turns clipping off."""

    freeze_last_layer_steps: int = Field(default=1250, ge=0)
    """Steps in which the prototypes have learning rate 0 (DINOv2: 1 epoch)."""

    layerwise_decay: float = Field(default=0.9, gt=0, le=1)
    """Factor on the learning rate per block of depth below the top (DINOv2: 0.9 short, 1.0 long)."""

    patch_embed_lr_mult: float = Field(default=0.2, ge=0)
    """Further factor on the learning rate of the patch projection (DINOv2: 0.2)."""

    adamw_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment (DINOv2: 0.9)."""

    adamw_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's second moment (DINOv2: 0.999)."""


class MethodConfig(StrictModel):
    """A self-distillation method: what student and teacher compute and how they are compared."""

    drop_path_rate: float = Field(default=0.3, ge=0, lt=1)
    """Share of images that skip each residual branch of the student (DINOv2: 0.3 short, 0.4 long); distillation uses 0."""

    student_temp: float = Field(default=0.1, gt=0)
    """Temperature of the student's outputs (DINOv2: 0.1)."""

    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """How teacher logits become targets: moving mean and softmax (short), or three Sinkhorn-Knopp iterations (long)."""

    dino: DinoConfig = DinoConfig()
    """The cls token losses."""

    ibot: IbotConfig = IbotConfig()
    """The masked patch token loss."""

    teacher: TeacherConfig = TeacherConfig()
    """The teacher's momentum and temperature."""

    @model_validator(mode="after")
    def _check_some_loss(self) -> Self:
        if self.dino.loss_weight == 0 and self.ibot.loss_weight == 0:
            raise ValueError("dino.loss_weight and ibot.loss_weight are both 0; give at least one of them a weight")
        return self

    @property
    def ibot_head(self) -> HeadConfig:
        """The head that patch tokens go through: the separate one, or the DINO head when it is shared."""
        return self.ibot.head if self.ibot.separate_head else self.dino.head
