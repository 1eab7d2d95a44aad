"""What a recipe will cost, from formulas: images, steps, parameters, operations, memory, bytes."""

from collections.abc import Sequence

from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.flops import num_backbone_parameters, num_head_parameters, training_flops_per_image
from heliostat.models.stored import read_info
from heliostat.runtime.pipelines import Context
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.stage_sweep import grid_points, trial_config
from heliostat.training.recipe import DistillConfig, TrainingConfig

_H100_FLOPS = 400e12  # assumption: 40 % of an H100's 989 TFLOP/s in bfloat16, above the best published for a ViT
_STUDENT_BYTES, _TEACHER_BYTES = 16, 4  # float32 weight, gradient and two AdamW moments; float32 EMA


def print_costs(recipe: Recipe, stages: Sequence[str]) -> None:
    """Print one block per training stage. Raises ConfigError for trials that cannot run."""
    print("\n# what this would cost, by formula")
    for stage in stages:
        if stage in ("pretrain", "distill"):
            config: TrainingConfig = getattr(recipe, stage)
            print("\n".join(f"# {stage}: {line}" for line in training_costs(config, _teacher(recipe, config))))
        elif stage == "sweep" and recipe.sweep is not None and recipe.pretrain is not None:
            points = grid_points(recipe.sweep.grid)
            for point in points:
                trial_config(recipe.pretrain, {**recipe.sweep.overrides, **point})
            print(f"# sweep: {len(points)} trials, {recipe.sweep.max_concurrent_trials} at a time")


def _teacher(recipe: Recipe, config: TrainingConfig) -> BackboneConfig | None:
    """The teacher of a distillation, from the recipe or from the artifact that is named."""
    if not isinstance(config, DistillConfig):
        return None
    if not config.teacher:
        return recipe.pretrain.student if recipe.pretrain is not None else None
    from heliostat.artifacts import ArtifactRef

    return read_info(Context(recipe, Progress()).load(ArtifactRef.parse(config.teacher))).backbone


def training_costs(config: TrainingConfig, teacher: BackboneConfig | None) -> list[str]:
    """Lines about parameters, operations, memory and time of one training run."""
    student, method, train = config.student, config.method, config.train
    own_ibot_head: HeadConfig | None = method.ibot.head if method.ibot.separate_head and method.ibot.loss_weight else None
    backbone = num_backbone_parameters(student)
    heads = num_head_parameters(student.embed_dim, method.dino.head)
    heads += num_head_parameters(student.embed_dim, own_ibot_head) if own_ibot_head else 0
    low, high = method.ibot.mask_ratio_min_max
    flops = training_flops_per_image(
        student,
        method.dino.head,
        method.ibot_head,
        global_size_pixels=config.crops.global_crops_size,
        local_size_pixels=config.crops.local_crops_size,
        num_local_crops=config.crops.local_crops_number,
        masked_ratio=1.0 if teacher else method.ibot.mask_sample_probability * (low + high) / 2,
        drop_path_rate=0.0 if teacher else method.drop_path_rate,
        teacher=teacher,
    )
    images = train.steps * train.global_batch_size
    workers = max(1, config.scaling.num_workers)
    state_gib = (backbone + heads) * (_STUDENT_BYTES + _TEACHER_BYTES) / 2**30
    return [
        f"{backbone / 1e6:.1f} M parameters in the backbone, {heads / 1e6:.1f} M in the heads",
        f"{train.steps:,} steps of {train.global_batch_size:,} images: {images:,} images seen",
        f"{flops / 1e12:.4f} TFLOP per image, {flops * images / 1e18:.4g} EFLOP in all",
        f"about {flops * images / _H100_FLOPS / 3600:.3g} H100-hours at 400 TFLOP/s",
        f"{state_gib:.2f} GiB per worker for weights, gradients, moments and EMA, {workers} workers, before activations",
    ]
