"""The sections `pretrain` and `distill` of a recipe."""

from typing import Literal, Self

from pydantic import Field, model_validator

from heliostat.config import StrictModel
from heliostat.data.config import CropsConfig, DecodeConfig, LoaderConfig
from heliostat.models.config import BackboneConfig
from heliostat.training.config import MethodConfig, OptimConfig
from heliostat.training.schedules import check_schedules


class ScalingConfig(StrictModel):
    """The worker group of one training run."""

    num_workers: int = Field(default=1, ge=0)
    """Training processes; 0 runs the loop in the calling process, without Ray."""
    use_gpu: bool = False
    """One GPU per worker; without it workers compute on CPUs over gloo."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Logical CPUs that Ray reserves per worker."""
    threads_per_worker: int = Field(default=1, ge=1)
    """Threads that torch uses in a worker; more of them change float32 sums in the last bit."""
    max_failures: int = Field(default=2, ge=0)
    """How often a lost worker group is restarted from its newest checkpoint."""
    start_timeout_seconds: int = Field(default=120, ge=1)
    """How long the cluster may take to place the workers, autoscaling included, before the run fails."""
    collective_timeout_seconds: int = Field(default=600, ge=10)
    """How long one rank may keep the others waiting before the group is restarted."""


class TrainConfig(StrictModel):
    """How long, how large, how often."""

    steps: int = Field(default=125_000, ge=1)
    """Optimizer steps; every schedule ends here (DINOv2: 125,000 short, 625,000 long)."""
    global_batch_size: int = Field(default=1024, ge=1)
    """Images per optimizer step over all workers; per-worker numbers are derived."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, sample order, crops, masks and stochastic depth."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto computes in bfloat16 on GPUs and in float32 on CPUs; weights and teacher are float32 always."""
    log_every_steps: int = Field(default=20, ge=1)
    """Steps between records of metrics."""
    checkpoint_every_steps: int = Field(default=1000, ge=1)
    """Steps between checkpoints: what a lost worker costs at most."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept while the run goes on."""
    max_nonfinite_steps: int = Field(default=10, ge=0)
    """Steps in a row whose loss may be NaN or infinite: each is skipped and counted, one more aborts the run."""


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
    loader: LoaderConfig = LoaderConfig()
    """Threads and caches of the loader."""
    train: TrainConfig = TrainConfig()
    """Length, batch, seed, records."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers and their resources; not part of the artifact's fingerprint."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        workers, batch = max(self.scaling.num_workers, 1), self.train.global_batch_size
        if batch % workers:
            lower = batch // workers * workers
            advice = " or ".join(str(size) for size in (lower, lower + workers) if size)
            raise ValueError(f"train.global_batch_size {batch} is not divisible by {workers} workers; use {advice}")
        return self

    @model_validator(mode="after")
    def _check_crops(self) -> Self:
        patch = self.student.patch_size
        for name in ("global_crops_size", "local_crops_size"):
            size = getattr(self.crops, name)
            if size % patch:
                lower = size // patch * patch
                advice = " or ".join(str(value) for value in (lower, lower + patch) if value)
                raise ValueError(f"crops.{name} {size} is not divisible by student.patch_size {patch}; use {advice}")
        return self

    @model_validator(mode="after")
    def _check_schedules(self) -> Self:
        check_schedules(self.optim, self.method.teacher, self.train.steps)
        return self


class PretrainConfig(TrainingConfig):
    """Self-supervised training of a backbone from scratch."""

    data: str = ""
    """Artifact of images as curated/name@version or raw/name@version; empty takes the recipe's own. Without a recipe
    (`heliostat pretrain data=./photos`) it is a folder or an `s3://` prefix of images."""


class DistillConfig(TrainingConfig):
    """Training a student against a frozen teacher."""

    data: str = ""
    """As in pretrain."""
    teacher: str = ""
    """Artifact of the frozen teacher as model/name@version; empty takes the recipe's own pre-trained model."""
