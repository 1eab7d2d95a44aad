"""Parameters and FLOPs of a network and of a training step, counted from configurations alone (no torch).

One multiply-add is 2 FLOPs. Biases, norms, softmax, activations and the optimizer are left out, as is usual for model FLOPs.
"""

from itertools import pairwise

from heliostat.models.config import BackboneConfig, HeadConfig


def num_backbone_parameters(config: BackboneConfig) -> int:
    """Trainable parameters of a backbone."""
    dim, hidden = config.embed_dim, config.mlp_hidden_dim
    gates = 1 if config.ffn_layer == "mlp" else 2
    attention = 4 * dim * dim + config.qkv_bias * 3 * dim + config.proj_bias * dim
    ffn = (gates + 1) * dim * hidden + config.ffn_bias * (gates * hidden + dim)
    block = attention + ffn + 4 * dim + 2 * dim  # two norms of weight and bias, two layerscales
    tokens = dim * (1 + 1 + config.grid_size**2 + config.num_register_tokens + 1)  # cls, pos_embed, registers, mask
    patch_embed = dim * (config.in_chans * config.patch_size**2 + 1)
    return tokens + patch_embed + config.depth * block + 2 * dim


def num_head_parameters(in_dim: int, config: HeadConfig) -> int:
    """Trainable parameters of a projection head, the gain of each prototype included."""
    widths = _head_widths(in_dim, config)
    mlp = sum(width * following + following for width, following in pairwise(widths))
    return mlp + config.out_dim * (config.bottleneck_dim + 1)


def backbone_forward_flops(config: BackboneConfig, image_size_pixels: int) -> float:
    """FLOPs of one forward pass over one square image."""
    return _patch_flops(config, image_size_pixels) + _block_flops(config, image_size_pixels)


def head_forward_flops(in_dim: int, config: HeadConfig) -> float:
    """FLOPs of one forward pass over one row."""
    widths = _head_widths(in_dim, config)
    mlp = sum(width * following for width, following in pairwise(widths))
    return 2.0 * (mlp + config.bottleneck_dim * config.out_dim)


def training_flops_per_image(
    student: BackboneConfig,
    dino_head: HeadConfig,
    ibot_head: HeadConfig,
    *,
    global_size_pixels: int,
    local_size_pixels: int,
    num_local_crops: int,
    masked_ratio: float,
    drop_path_rate: float = 0.0,
    teacher: BackboneConfig | None = None,
) -> float:
    """FLOPs of one training step per image: teacher forward, student forward and backward (3 forwards), heads.

    drop_path_rate counts only the block computation that batch-subset stochastic depth leaves; 0 gives the figure that ignores
    it (report the first: the second inflates utilisation). masked_ratio is the share of all global patch tokens in the iBOT
    loss: mask probability times mean mask ratio in pre-training, 1 in distillation. teacher defaults to the student's size.
    """
    learning = student_flops_per_image(
        student,
        dino_head,
        ibot_head,
        global_size_pixels=global_size_pixels,
        local_size_pixels=local_size_pixels,
        num_local_crops=num_local_crops,
        masked_ratio=masked_ratio,
        drop_path_rate=drop_path_rate,
    )
    return learning + teacher_flops_per_image(
        teacher or student, dino_head, ibot_head, global_size_pixels=global_size_pixels, masked_ratio=masked_ratio
    )


def teacher_flops_per_image(
    teacher: BackboneConfig, dino_head: HeadConfig, ibot_head: HeadConfig, *, global_size_pixels: int, masked_ratio: float
) -> float:
    """The teacher's share of `training_flops_per_image`: one forward over both global crops, however many students learn."""
    heads = 2 * head_forward_flops(teacher.embed_dim, dino_head)
    heads += _masked_rows(teacher, global_size_pixels, masked_ratio) * head_forward_flops(teacher.embed_dim, ibot_head)
    return 2 * backbone_forward_flops(teacher, global_size_pixels) + heads


def student_flops_per_image(
    student: BackboneConfig,
    dino_head: HeadConfig,
    ibot_head: HeadConfig,
    *,
    global_size_pixels: int,
    local_size_pixels: int,
    num_local_crops: int,
    masked_ratio: float,
    drop_path_rate: float = 0.0,
) -> float:
    """The student's share of `training_flops_per_image`: forward and backward over all crops."""
    patch_flops = 2 * _patch_flops(student, global_size_pixels) + num_local_crops * _patch_flops(student, local_size_pixels)
    block_flops = 2 * _block_flops(student, global_size_pixels) + num_local_crops * _block_flops(student, local_size_pixels)
    heads = (2 + num_local_crops) * head_forward_flops(student.embed_dim, dino_head)
    heads += _masked_rows(student, global_size_pixels, masked_ratio) * head_forward_flops(student.embed_dim, ibot_head)
    return 3 * (patch_flops + (1 - drop_path_rate) * block_flops + heads)


def _masked_rows(config: BackboneConfig, global_size_pixels: int, masked_ratio: float) -> float:
    return 2 * masked_ratio * (global_size_pixels // config.patch_size) ** 2


def _head_widths(in_dim: int, config: HeadConfig) -> list[int]:
    return [in_dim, *[config.hidden_dim] * (config.nlayers - 1), config.bottleneck_dim]


def _patch_flops(config: BackboneConfig, image_size_pixels: int) -> float:
    patches = (image_size_pixels // config.patch_size) ** 2
    return 2.0 * patches * config.in_chans * config.patch_size**2 * config.embed_dim


def _block_flops(config: BackboneConfig, image_size_pixels: int) -> float:
    dim = config.embed_dim
    tokens = (image_size_pixels // config.patch_size) ** 2 + 1 + config.num_register_tokens
    ffn_macs = (2 if config.ffn_layer == "mlp" else 3) * dim * config.mlp_hidden_dim
    return config.depth * (2.0 * tokens * (4 * dim * dim + ffn_macs) + 4.0 * tokens**2 * dim)
