"""The sections `pretrain` and `distill` of a recipe."""

import math
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, model_validator

from heliostat.config import StrictModel, apply_overrides, validate
from heliostat.data.config import CropsConfig, DecodeConfig, LoaderConfig, ShuffleConfig
from heliostat.errors import ConfigError
from heliostat.models.config import BackboneConfig
from heliostat.training.config import MethodConfig, OptimConfig
from heliostat.training.run_config import OnlineConfig, ScalingConfig, TrainConfig
from heliostat.training.schedules import check_schedules

SamplingWeight = Annotated[float, Field(gt=0)]
Suffix = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class InitConfig(StrictModel):
    """Weights to go on from, instead of random ones."""

    weights: str = ""
    """model/name@version, or a file or folder of public weights: DINOv2's .pth, Hugging Face, timm, safetensors; empty starts
    from random weights. The position embedding is resized to student.img_size once."""
    heads: Literal["auto", "fresh"] = "auto"
    """auto takes the heads that come with the weights and draws fresh ones where none do; fresh always draws them."""
    head_warmup_steps: int = Field(default=0, ge=0)
    """First steps, in which the backbone is frozen and only the heads learn; set it whenever the heads are fresh."""
    backbone_lr_mult: float = Field(default=0.1, gt=0)
    """Factor on the backbone's learning rate after that, so that trained weights move slowly (assumption, not studied)."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.head_warmup_steps and not self.weights:
            raise ValueError(
                f"head_warmup_steps {self.head_warmup_steps} needs init.weights; random backbones cannot be frozen"
            )
        return self


class PhaseConfig(StrictModel):
    """A further phase of the same training, at another resolution (appendix B.2 of arXiv 2304.07193: 10,000 steps at 518)."""

    name: Suffix
    """Suffix of the phase's artifact: model/<recipe>-<name>."""
    steps: int = Field(ge=1)
    """Optimizer steps of the phase; every schedule and warm-up is compressed into them."""
    global_crops_size: int = Field(ge=8)
    """Side of the global crops in pixels; the position embedding is resized to it once, before the first step."""
    local_crops_size: int = Field(default=0, ge=0)
    """Side of the local crops in pixels; 0 keeps that of the section."""
    lr: float = Field(default=0.0, ge=0)
    """Base learning rate; 0 keeps that of the section (the paper lowers it and does not say how far)."""
    global_batch_size: int = Field(default=0, ge=0)
    """Images per optimizer step; 0 keeps that of the section."""
    overrides: tuple[str, ...] = ()
    """Further changes to the section as `key.path=value`, for example `scaling.num_workers=64`."""


def _check_size(key: str, size: int, patch: int) -> None:
    if size % patch:
        lower = size // patch * patch
        advice = " or ".join(str(value) for value in (lower, lower + patch) if value)
        raise ValueError(f"{key} {size} is not divisible by student.patch_size {patch}; use {advice}")


class TrainingConfig(StrictModel):
    """What both kinds of training share."""

    student: BackboneConfig = BackboneConfig()
    """The backbone that is trained."""
    method: MethodConfig = MethodConfig()
    """Losses, heads, centering, teacher."""
    optim: OptimConfig = OptimConfig()
    """AdamW and its schedules."""
    crops: CropsConfig = CropsConfig()
    """Multi-crop augmentation."""
    decode: DecodeConfig = DecodeConfig()
    """Limits on encoded images."""
    shuffle: ShuffleConfig = ShuffleConfig()
    """The order in which images are visited."""
    loader: LoaderConfig = LoaderConfig()
    """Threads and memory of the loader."""
    train: TrainConfig = TrainConfig()
    """Length, batch, seed, records."""
    online: OnlineConfig = OnlineConfig()
    """Evaluation while training; not part of the artifact's fingerprint."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers and their resources; not part of the artifact's fingerprint."""
    phases: tuple[PhaseConfig, ...] = ()
    """Further phases, each from the weights of the one before and an artifact of its own."""

    @property
    def backbones(self) -> dict[str, BackboneConfig]:
        """The backbones that are trained, by name; the only one is called ""."""
        return {"": self.student}

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        workers, batch, who = max(self.scaling.num_workers, 1), self.train.global_batch_size, ""
        if self.loader.via == "ray_data":
            if self.scaling.num_workers == 0:
                raise ValueError(
                    "loader.via ray_data needs Ray, and scaling.num_workers is 0; use 1 or more, or loader.via=threads"
                )
            if self.crops.cut_on == "device":
                raise ValueError(
                    "crops.cut_on device leaves the crops to the GPU, and loader.via ray_data has them cut by data workers; "
                    "use crops.cut_on=cpu or loader.via=threads"
                )
            who = f" with {self.loader.ray_workers} data workers each (loader.ray_workers)"
            workers *= self.loader.ray_workers
        if batch % workers:
            lower = batch // workers * workers
            advice = " or ".join(str(size) for size in (lower, lower + workers) if size)
            num_workers = max(self.scaling.num_workers, 1)
            raise ValueError(f"train.global_batch_size {batch} is not divisible by {num_workers} workers{who}; use {advice}")
        return self

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        scaling = self.scaling
        if scaling.num_workers == 0 and scaling.parallel.startswith("zero"):
            raise ValueError(
                f"scaling.parallel {scaling.parallel} needs training processes, and scaling.num_workers is 0; use 1 or more"
            )
        if scaling.parallel == "none" and scaling.num_workers > 1:
            raise ValueError(
                f"scaling.parallel none is for one worker, and scaling.num_workers is {scaling.num_workers}; use ddp, zero1, "
                "zero2, zero3 or auto"
            )
        low, high = scaling.worker_range
        if low > high:
            raise ValueError(f"scaling.min_workers {low} is above max_workers {high}; use scaling.max_workers={low} or more")
        if not low <= max(scaling.num_workers, 1) <= high:
            raise ValueError(
                f"scaling.num_workers {scaling.num_workers} is outside of min_workers {low} to max_workers {high}; "
                "change one of the three"
            )
        if low < high and scaling.num_workers == 0:
            raise ValueError("scaling.min_workers and max_workers need Ray, and scaling.num_workers is 0; use 1 or more")
        if low < high and scaling.cpus_per_worker % 1:  # Ray rounds what it has reserved, and would resize for ever
            cpus = scaling.cpus_per_worker
            raise ValueError(
                f"scaling.cpus_per_worker {cpus:g} is not whole, and Ray counts workers that come and go in whole CPUs; "
                f"use {math.ceil(cpus)}"
            )
        return self

    @model_validator(mode="after")
    def _check_crops(self) -> Self:
        for backbone in self.backbones.values():
            patch = backbone.patch_size
            if backbone.in_chans != 3:
                raise ValueError(f"student.in_chans {backbone.in_chans} does not fit the crops, which are RGB; use 3")
            for name in ("global_crops_size", "local_crops_size"):
                _check_size(f"crops.{name}", getattr(self.crops, name), patch)
            if self.online.enabled:  # image_size 0 stands for that of the crops
                _check_size("online.image_size", self.online.image_size, patch)
        if self.crops.local_crops_number and self.crops.local_crops_size > self.crops.global_crops_size:
            raise ValueError(
                f"crops.local_crops_size {self.crops.local_crops_size} is larger than crops.global_crops_size "
                f"{self.crops.global_crops_size}; lower it, or set crops.local_crops_number to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_schedules(self) -> Self:
        check_schedules(self.optim, self.method.teacher, self.train.steps)
        return self

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        names = [phase.name for phase in self.phases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"phases: {twice[0]} is there twice; give each phase a name of its own")
        for phase in self.phases:
            try:
                phase_config(self, phase)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self


class PretrainConfig(TrainingConfig):
    """Self-supervised training of a backbone, from scratch or from given weights."""

    data: str | dict[str, SamplingWeight] = ""
    """Artifact of images as curated/name@version or raw/name@version; several with their sampling weights as
    {curated/a@1: 0.8, raw/b@1: 0.2}; empty takes the recipe's own. Without a recipe (`heliostat pretrain data=./photos`) it
    is a folder or an `s3://` prefix of images."""
    init: InitConfig = InitConfig()
    """Weights to go on from."""

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if self.init.head_warmup_steps > self.train.steps:
            raise ValueError(
                f"init.head_warmup_steps {self.init.head_warmup_steps} exceeds the run of {self.train.steps} steps; "
                f"use at most {self.train.steps} (then only heads are trained)"
            )
        return self


class DistillConfig(TrainingConfig):
    """Training one student, or several, against one frozen teacher."""

    data: str | dict[str, SamplingWeight] = ""
    """As in pretrain."""
    teacher: str = ""
    """The frozen teacher: model/name@version, or a file or folder of public weights; empty takes the recipe's own model."""
    teacher_head_steps: int = Field(default=0, ge=0)
    """Steps that train heads on a teacher whose weights come without any (its backbone stays as it is): becomes
    model/<recipe>-teacher. The losses compare prototypes, so a teacher without heads cannot teach."""
    students: dict[Suffix, BackboneConfig] = Field(default_factory=dict)
    """Several students that share one teacher forward, by name: become model/<recipe>-<name>. Leave `student` out then."""
    compare_with_scratch: bool = False
    """Also train each student without the teacher for the same steps, as model/<recipe>-<student>-scratch, for the report."""

    @property
    def backbones(self) -> dict[str, BackboneConfig]:
        """The students by name; the only one is called ""."""
        return dict(self.students) or {"": self.student}

    @model_validator(mode="after")
    def _check_students(self) -> Self:
        if self.students and self.student != BackboneConfig():
            raise ValueError(f"student and students ({', '.join(self.students)}) are both given; keep one of them")
        sizes = {name: backbone.patch_size for name, backbone in self.backbones.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"students have patch sizes {sizes}; they share one teacher and its patches, use one size")
        return self


def alone(config: DistillConfig, backbone: BackboneConfig) -> PretrainConfig:
    """A student's training without its teacher: everything else as in the distillation."""
    plain = {key: value for key, value in config.model_dump(mode="json").items() if key in TrainingConfig.model_fields}
    return validate(PretrainConfig, plain | {"student": backbone.model_dump(mode="json"), "phases": []}, "distill")


def teacher_heads(config: DistillConfig, backbone: BackboneConfig) -> PretrainConfig:
    """The training of heads on a teacher that comes without: `teacher_head_steps` in which its backbone stays as it is.

    Raises ConfigError when the section cannot be shortened to so few steps.
    """
    steps = config.teacher_head_steps
    plain = compressed(alone(config, backbone).model_dump(mode="json"), config.train.steps, steps)
    plain["init"] = InitConfig(weights=config.teacher, head_warmup_steps=steps).model_dump(mode="json")
    plain["method"]["drop_path_rate"] = 0.0
    return validate(PretrainConfig, plain, "distill.teacher_head_steps")


Section = TypeVar("Section", bound=TrainingConfig)

_WARMUPS = (
    ("optim", "warmup_steps"),
    ("optim", "freeze_last_layer_steps"),
    ("teacher", "warmup_teacher_temp_steps"),
)


def compressed(plain: dict[str, Any], steps_before: int, steps: int) -> dict[str, Any]:
    """A training section as plain values, shortened: its steps, and every warm-up in proportion. Changes `plain`."""
    for section, key in _WARMUPS:
        holder = plain["method"]["teacher"] if section == "teacher" else plain[section]
        holder[key] = min(round(holder[key] * steps / steps_before), steps - 1)
    plain["train"]["steps"] = steps
    return plain


def phase_config(base: Section, phase: PhaseConfig) -> Section:
    """The section of one phase: other crops, steps and learning rate, warm-ups shortened in proportion, no phases of its own.

    Raises ConfigError when the result is impossible, naming the phase.
    """
    plain = compressed(base.model_dump(mode="json") | {"phases": []}, base.train.steps, phase.steps)
    for backbone in plain.get("students", {}).values() or [plain["student"]]:
        backbone["img_size"] = phase.global_crops_size
    plain["crops"] |= {"global_crops_size": phase.global_crops_size}
    plain["crops"] |= {"local_crops_size": phase.local_crops_size} if phase.local_crops_size else {}
    plain["train"] |= {"global_batch_size": phase.global_batch_size} if phase.global_batch_size else {}
    plain["optim"] |= {"lr": phase.lr} if phase.lr else {}
    if "init" in plain:
        plain["init"] = InitConfig().model_dump(mode="json")
    _refuse_useless(phase)
    section = validate(type(base), apply_overrides(plain, phase.overrides), f"phase {phase.name}")
    _refuse_other_network(base, section, phase.name)
    return section


_FIELDS_OF_PHASES = {
    "train.steps": "steps",
    "train.global_batch_size": "global_batch_size",
    "crops.global_crops_size": "global_crops_size",
    "crops.local_crops_size": "local_crops_size",
    "optim.lr": "lr",
    "student.img_size": "global_crops_size",
}


def _refuse_useless(phase: PhaseConfig) -> None:
    """Overrides that a phase has a field for, or that would change nothing. Raises ConfigError."""
    for override in phase.overrides:
        key = override.partition("=")[0].strip()
        if key in _FIELDS_OF_PHASES:
            raise ConfigError(f"phase {phase.name}: give {_FIELDS_OF_PHASES[key]}: of the phase instead of the override {key}")
        if key.partition(".")[0] in ("data", "init", "phases", "teacher", "teacher_head_steps", "compare_with_scratch"):
            raise ConfigError(f"phase {phase.name}: {key} is that of the section and cannot differ in a phase; remove it")


def _refuse_other_network(base: TrainingConfig, section: TrainingConfig, name: str) -> None:
    """A phase goes on with the networks of the section: only their native image size may differ. Raises ConfigError."""
    if section.backbones.keys() != base.backbones.keys():
        raise ConfigError(f"phase {name}: its students are not those of the section; remove the override")
    pairs: list[tuple[StrictModel, StrictModel]] = [(base.backbones[key], one) for key, one in section.backbones.items()]
    pairs += [(base.method.dino.head, section.method.dino.head), (base.method.ibot_head, section.method.ibot_head)]
    for before, after in pairs:
        for field, value in after.model_dump().items():
            if field != "img_size" and getattr(before, field) != value:
                raise ConfigError(
                    f"phase {name}: {field} {value} differs from the section's {getattr(before, field)}; a phase goes on "
                    "with its weights, remove the override"
                )
    if section.method.ibot.separate_head != base.method.ibot.separate_head:
        raise ConfigError(f"phase {name}: method.ibot.separate_head differs from the section's; remove the override")
