"""Memory of one worker at the fullest moment of a training step, counted from configurations alone (no torch).

What autograd keeps was counted in models/blocks.py, models/heads.py and training/losses.py and is written below as multiples of
the width of a token; tests/training/test_memory.py measures real steps and fails when the code keeps something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from heliostat.models.config import BackboneConfig
from heliostat.training.config import MethodConfig
from heliostat.training.costs import heads, masked_ratio, num_parameters, passes_of
from heliostat.training.recipe import TrainingConfig

GIB = 2.0**30

_FLOAT32, _BFLOAT16 = 4, 2  # bytes

# Kept per token of one block, in widths D. "Cast" values have the compute dtype, the others are float32.
_NORM_INPUTS = 2
_CAST_LINEAR_INPUTS = 2  # of qkv and of the first feed-forward linear
_CAST_ATTENTION = 5  # query, key, value, output, and the output joined over the crop groups for proj
# Kept per token of the feed-forward layer, in hidden widths.
_CAST_HIDDEN = {"mlp": 2, "swiglufused": 4}  # input and output of GELU; gate, value, silu(gate) and their product

# Logits that the cross-entropy takes in float32 at a time: _BLOCK_LOGITS of training/losses.py, which imports torch.
_LOSS_BLOCK_LOGITS = 2**22
# Float32 tensors as large as the teacher's logits while targets are made of them; centering first copies bfloat16 to float32.
_TARGET_COPIES = {"sinkhorn_knopp": 2, "centering": 3}
_TARGETS_OF_STUDENT = 3  # of B rows each: both global crops swapped, and their sum

# Assumptions, not studied: CUDA context, cuBLAS and NCCL buffers; blocks that the caching allocator cannot reuse.
_CONTEXT_BYTES = 1.5 * GIB
_ALLOCATOR_SLACK = 0.08


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker holds at the fullest moment of a step."""

    state: dict[str, float]
    """Held all the time, by name: weights, gradients, moments, averages."""
    step: dict[str, float]
    """Held at the fullest moment in addition, by name; grows with the images per worker."""
    reserve: float
    """Context and allocator on a GPU; 0 on a CPU."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.state.values()) + sum(self.step.values()) + self.reserve


@dataclass(frozen=True)
class _Rows:
    """Rows that go through the heads of one network: cls tokens and patch tokens."""

    cls: int
    patches: int


def training_memory(
    config: TrainingConfig,
    teacher: BackboneConfig | None,
    images_per_worker: int,
    *,
    parallel: str = "none",
    num_workers: int = 1,
) -> Memory:
    """Memory of one worker of `num_workers`. `teacher` is the frozen teacher of a distillation, None in pre-training.

    parallel: what is whole on every worker and what is a share of it, see `ScalingConfig.parallel` (not "auto").
    """
    in_a_pass = images_per_worker // passes_of(images_per_worker, config.scaling.images_per_pass)
    state = _shared_out(_state_bytes(config, teacher), parallel, num_workers)
    held = held_for_backward(config, teacher, in_a_pass)
    held["targets"] = held_for_backward(config, teacher, images_per_worker)["targets"]  # of all passes, before the first
    after_losses = {name: size for name, size in held.items() if name != "heads"}
    moments = [
        {"teacher's logits and targets": _target_making(config, teacher, images_per_worker)},
        held | {"gradients of logits": _loss_gradients(config, teacher, in_a_pass)},
        after_losses | {"gradients inside a block": _block_gradients(config, teacher, in_a_pass)},
        {"optimizer temporaries": state["weights"]},  # gradients in flat buffers; one rank alone needs none
    ]
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    step = {**fullest, "crops in float32": 3.0 * _FLOAT32 * images_per_worker * _pixels_per_image(config)}
    if parallel == "zero3":
        step["blocks that are fetched"] = _fetched_blocks(config, teacher)
    used = sum(state.values()) + sum(step.values())
    return Memory(state, step, _CONTEXT_BYTES + _ALLOCATOR_SLACK * used if config.scaling.use_gpu else 0.0)


# What each stage leaves whole on every worker; the rest is shared out. Stages 1 and 2 keep a second copy of their share of the
# weights for the optimizer, stage 3 has no other.
_WHOLE = {
    "zero1": {"weights", "gradients", "moving average", "frozen teacher"},
    "zero2": {"weights", "moving average", "frozen teacher"},
    "zero3": set[str](),
}


def _shared_out(state: Mapping[str, float], parallel: str, num_workers: int) -> dict[str, float]:
    if parallel not in _WHOLE:
        return dict(state)
    shared = {name: size if name in _WHOLE[parallel] else size / num_workers for name, size in state.items()}
    if parallel != "zero3":
        shared["optimizer's weights"] = state["weights"] / num_workers
    return shared


def _fetched_blocks(config: TrainingConfig, teacher: BackboneConfig | None) -> float:
    """Weights that are whole for a while: four blocks of the largest network, and the largest head, see `zero_engine`."""
    networks = [*config.backbones.values(), *([teacher] if teacher is not None else [])]
    sizes = [num_parameters(network, config.method) for network in networks]
    return max(
        _FLOAT32 * (4.0 * backbone / network.depth + head) for network, (backbone, head) in zip(networks, sizes, strict=True)
    )


def held_for_backward(config: TrainingConfig, teacher: BackboneConfig | None, images_per_worker: int) -> dict[str, float]:
    """Bytes by name that stay between the forward and the backward pass: saved by autograd, or results of the step."""
    method, backbones, element = config.method, config.backbones.values(), _element_bytes(config)
    rows = _rows(config, teacher, images_per_worker)
    logits = len(backbones) * float(rows.cls * method.dino.head.out_dim + rows.patches * method.ibot_head.out_dim)
    cls_targets = (2.0 + _TARGETS_OF_STUDENT * len(backbones)) * images_per_worker * method.dino.head.out_dim
    return {
        "activations": sum(_backbone_activations(one, config, teacher, images_per_worker) for one in backbones),
        "heads": sum(_head_activations(one, method, rows, element) for one in backbones),
        "student's logits": element * logits,
        "targets": _FLOAT32 * (cls_targets + rows.patches * method.ibot_head.out_dim),
        "copies of weights": sum(_weight_copies(one, method, element) for one in backbones),
    }


def _element_bytes(config: TrainingConfig) -> int:
    name = config.train.compute_dtype
    if name == "auto":
        name = "bfloat16" if config.scaling.use_gpu else "float32"
    return _BFLOAT16 if name == "bfloat16" else _FLOAT32


def _pixels_per_image(config: TrainingConfig) -> int:
    crops = config.crops
    return 2 * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2


def _state_bytes(config: TrainingConfig, teacher: BackboneConfig | None) -> dict[str, float]:
    trained = _FLOAT32 * float(sum(sum(num_parameters(one, config.method)) for one in config.backbones.values()))
    state = {"weights": trained, "gradients": trained, "AdamW moments": 2 * trained, "moving average": trained}
    if teacher is not None:
        state["frozen teacher"] = _FLOAT32 * float(sum(num_parameters(teacher, config.method)))
    return state


def _rows(config: TrainingConfig, teacher: BackboneConfig | None, num_images: int) -> _Rows:
    """Rows of the student. Masked patches are an expectation; a batch differs from it by its draw."""
    patch, crops = next(iter(config.backbones.values())).patch_size, config.crops
    patches = 2 * num_images * (crops.global_crops_size // patch) ** 2
    share = masked_ratio(config, distills=teacher is not None)
    return _Rows((2 + crops.local_crops_number) * num_images, round(share * patches))


def _target_making(config: TrainingConfig, teacher: BackboneConfig | None, num_images: int) -> float:
    """The teacher's logits and its targets while the last of them are made; nothing of the student is there yet."""
    method, rows = config.method, _rows(config, teacher, num_images)
    cls, patches = 2.0 * num_images * method.dino.head.out_dim, float(rows.patches * method.ibot_head.out_dim)
    element = _element_bytes(config)
    copies = _TARGET_COPIES[method.centering] if element < _FLOAT32 else 2
    per_logit = element + copies * _FLOAT32
    return max(per_logit * cls, per_logit * patches + _FLOAT32 * cls)


def _loss_gradients(config: TrainingConfig, teacher: BackboneConfig | None, num_images: int) -> float:
    """Gradients of logits and what they are computed with. The losses of all students go first, from the last to the first.

    The fullest moment is in a loss of the first student, or where the gradients of its logits are joined.
    """
    method, rows, element = config.method, _rows(config, teacher, num_images), _element_bytes(config)
    prototypes = method.dino.head.out_dim
    cls, patches = float(rows.cls * prototypes), float(rows.patches * method.ibot_head.out_dim)
    local, one_local = float((rows.cls - 2 * num_images) * prototypes), float(num_images * prototypes)
    copied_targets = float(_FLOAT32 * _TARGETS_OF_STUDENT * num_images * prototypes)
    gradients = element * (cls + patches)
    # Local and global crops are slices of one tensor, and so are cls and patch tokens of a shared head: the gradient of a slice
    # is as large as the whole.
    slices = element * (cls + 2 * num_images * prototypes)
    joined = max(slices, gradients if len(heads(method)) == 1 else 0.0) + gradients - copied_targets
    ibot = element * patches + _loss_blocks(patches, patches)
    first = max(ibot, element * (patches + local) + _loss_blocks(local, one_local), joined)
    return (len(config.backbones) - 1) * (gradients - copied_targets) + first


def _loss_blocks(num_logits: float, largest_block: float) -> float:
    """Float32 temporaries of one loss: two of a block, the first alone, the second beside the result of the first."""
    block = min(largest_block, _LOSS_BLOCK_LOGITS)
    return _FLOAT32 * (block + max(block, 2 * min(num_logits - block, block)))


def _block_gradients(config: TrainingConfig, teacher: BackboneConfig | None, num_images: int) -> float:
    """Of the residual stream and of what is added to it, and before and after the activation of the feed-forward layer.

    A bound: by then what the last norm keeps is free again, and so is the input of the last linear.
    """
    sizes = []
    for backbone in config.backbones.values():
        tokens, kept = _tokens(backbone, config, teacher, num_images)
        hidden = _element_bytes(config) * backbone.mlp_hidden_dim * _CAST_HIDDEN[backbone.ffn_layer]
        sizes.append(2.0 * _FLOAT32 * backbone.embed_dim * tokens + float(hidden) * kept)
    return max(sizes)


def _tokens(
    backbone: BackboneConfig, config: TrainingConfig, teacher: BackboneConfig | None, num_images: int
) -> tuple[int, int]:
    """Tokens of all crops, and those that each residual branch is computed for; distillation has no stochastic depth."""
    crops, extra = config.crops, 1 + backbone.num_register_tokens
    rate = 0.0 if teacher is not None else config.method.drop_path_rate
    tokens = kept = 0
    for images, side in (
        (2 * num_images, crops.global_crops_size),
        (crops.local_crops_number * num_images, crops.local_crops_size),
    ):
        per_image = (side // backbone.patch_size) ** 2 + extra
        tokens += images * per_image
        kept += (max(int(images * (1 - rate)), 1) if images else 0) * per_image
    return tokens, kept


def _backbone_activations(
    backbone: BackboneConfig, config: TrainingConfig, teacher: BackboneConfig | None, num_images: int
) -> float:
    element = _element_bytes(config)
    tokens, kept = _tokens(backbone, config, teacher, num_images)
    groups = 2 if config.crops.local_crops_number else 1
    one_block = kept * _block_bytes_per_token(backbone, element, num_groups=groups)
    if config.scaling.activation_checkpointing:  # the input of each block, and one block that is computed again
        blocks = backbone.depth * float(_FLOAT32 * backbone.embed_dim) * tokens + one_block
    else:
        blocks = backbone.depth * one_block
    ends = 2.0 * _FLOAT32 * backbone.embed_dim * tokens  # input and output of the last norm
    pixels = 3.0 * element * num_images * _pixels_per_image(config) if element < _FLOAT32 else 0.0
    return blocks + ends + pixels


def _block_bytes_per_token(backbone: BackboneConfig, element: int, *, num_groups: int) -> float:
    """What one block keeps for the backward pass, per token that it computes."""
    attention = _CAST_ATTENTION if num_groups > 1 else _CAST_ATTENTION - 1
    cast = element * backbone.embed_dim * (_CAST_LINEAR_INPUTS + attention)
    hidden = element * backbone.mlp_hidden_dim * _CAST_HIDDEN[backbone.ffn_layer]
    full = _FLOAT32 * backbone.embed_dim * _NORM_INPUTS
    single = _FLOAT32 * (backbone.num_heads + 4)  # log-sums of attention, mean and deviation
    return cast + hidden + full + single


def _head_activations(backbone: BackboneConfig, method: MethodConfig, rows: _Rows, element: int) -> float:
    """Input, hidden layers before and after GELU, and the bottleneck before and after its normalisation."""
    own = heads(method)
    shares = [rows.cls, rows.patches] if len(own) == 2 else [rows.cls + rows.patches]
    return float(
        sum(
            count * element * (backbone.embed_dim + 2 * (head.nlayers - 1) * head.hidden_dim + 2 * head.bottleneck_dim)
            for head, count in zip(own, shares, strict=True)
        )
    )


def _weight_copies(backbone: BackboneConfig, method: MethodConfig, element: int) -> float:
    """Autocast keeps a bfloat16 copy of every weight; without it only what is computed of weights is kept.

    That is the prototypes, and the last linears of both branches of each block times their LayerScale.
    """
    if element < _FLOAT32:
        return _BFLOAT16 * float(sum(num_parameters(backbone, method)))
    scaled = backbone.depth * backbone.embed_dim * (backbone.embed_dim + backbone.mlp_hidden_dim)
    return _FLOAT32 * float(scaled + sum(head.out_dim * head.bottleneck_dim for head in heads(method)))
