"""How a training run is carried out: its length and records, its workers, and what is looked at on the way."""

from typing import Literal

from pydantic import Field

from heliostat.config import StrictModel

MOST = 2**31 - 1
"""Of a number of steps, images or seconds, and of a seed: what is computed from them stays within 64 bits."""

MAX_WORKERS = 65_536


class ScalingConfig(StrictModel):
    """The worker group of one training run."""

    num_workers: int = Field(default=1, ge=0, le=MAX_WORKERS)
    """Training processes; 0 runs the loop in the calling process, without Ray."""
    min_workers: int = Field(default=0, ge=0, le=MAX_WORKERS)
    """Fewest processes that a run may shrink to when nodes are lost; 0 keeps num_workers."""
    max_workers: int = Field(default=0, ge=0, le=MAX_WORKERS)
    """Most processes that a run may grow to when nodes join; 0 keeps num_workers."""
    resize_every_seconds: int = Field(default=60, ge=1, le=MOST)
    """How often a run with min_workers or max_workers looks whether more workers fit than it has. Each change starts the group
    again at the newest checkpoint."""
    parallel: Literal["auto", "none", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """How weights and moments lie on the workers: whole on each (none for one worker, ddp for several), or sharded by DeepSpeed
    (zero1: moments, zero2: and gradients, zero3: and weights, student and teacher alike). auto takes the first of ddp, zero1,
    zero2, zero3 that fits by the memory estimate."""
    images_per_pass: int = Field(default=0, ge=0, le=MOST)
    """Most images that a worker computes at once; its share of the batch is accumulated in equal passes; 0 takes all."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    memory_per_worker_gib: float = Field(default=0.0, ge=0)
    """Memory that parallel=auto may plan with; 0 asks the device, or takes the host's memory divided by its workers."""
    use_gpu: bool = False
    """One GPU per worker; without it workers compute on CPUs over gloo."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Logical CPUs that Ray reserves per worker."""
    threads_per_worker: int = Field(default=1, ge=1, le=1024)
    """Threads that torch uses in a worker; more of them change float32 sums in the last bit."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Dense bfloat16 peak of one worker's device in TFLOP/s, for train/mfu; 0 takes that of a known GPU, and none for CPUs."""
    max_failures: int = Field(default=2, ge=-1, le=MOST)
    """How often a lost worker group is restarted from its newest checkpoint; -1 sets no limit."""
    start_timeout_seconds: int = Field(default=120, ge=1, le=MOST)
    """How long the cluster may take to place the workers, autoscaling included, before the run fails."""
    collective_timeout_seconds: int = Field(default=600, ge=10, le=MOST)
    """How long one rank may keep the others waiting before it is named and the group is restarted."""
    stop_grace_seconds: int = Field(default=90, ge=0, le=MOST)
    """How long a run that is asked to stop (Ctrl-C, SIGTERM, `ray job stop`) may take to write its checkpoint."""
    spot_notice_url: str = ""
    """Where a spot machine announces its end, asked every 2 s on every node: http://169.254.169.254 on AWS; empty asks nobody.
    A notice writes a checkpoint and starts the workers again after the machine is gone, without counting as a failure."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        fixed = max(self.num_workers, 1)
        return self.min_workers or fixed, self.max_workers or fixed


class TrainConfig(StrictModel):
    """How long, how large, how often."""

    steps: int = Field(default=125_000, ge=1, le=MOST)
    """Optimizer steps; every schedule ends here (DINOv2: 125,000 short, 625,000 long)."""
    global_batch_size: int = Field(default=1024, ge=1, le=MOST)
    """Images per optimizer step over all workers; per-worker numbers are derived."""
    seed: int = Field(default=0, ge=0, le=MOST)
    """Seed of weights, sample order, crops, masks and stochastic depth."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto computes in bfloat16 on GPUs and in float32 on CPUs; weights and teacher are float32 always."""
    log_every_steps: int = Field(default=20, ge=1, le=MOST)
    """Steps between records of metrics."""
    checkpoint_every_steps: int = Field(default=1000, ge=1, le=MOST)
    """Steps between checkpoints: what a lost worker costs at most."""
    keep_last: int = Field(default=2, ge=1, le=MOST)
    """Newest checkpoints that are kept while the run goes on."""
    keep_every: int = Field(default=0, ge=0, le=MOST)
    """Checkpoints of steps divisible by this are kept until the run ends too; 0 keeps none of them."""
    storage_patience_seconds: int = Field(default=1800, ge=0, le=MOST)
    """How long the end of a run waits for a store that takes no checkpoint: a full disk, an object store that is away. Between
    two checkpoints training goes on without one."""
    nonfinite_policy: Literal["skip", "abort"] = "skip"
    """What a NaN or infinite loss or gradient does: skip throws the step away before optimizer and teacher are touched,
    abort ends the run there, with the newest checkpoint to go on from."""
    max_nonfinite_steps: int = Field(default=10, ge=0, le=MOST)
    """Steps in a row that skip may throw away; one more aborts the run."""


class OnlineConfig(StrictModel):
    """Evaluation of the teacher while the run goes on; it changes no weight."""

    enabled: bool = True
    """Keep the teacher's backbone at every evaluation point as `teacher/step-<step>/` of the artifact, and evaluate it."""
    every_steps: int = Field(default=0, ge=0, le=MOST)
    """Steps between evaluation points; 0 takes train.checkpoint_every_steps. The last step is always one."""
    labelled: str = ""
    """Artifact of labelled images for k-NN and linear probe; empty takes the recipe's own ingest.labelled where there is one.
    Without labels RankMe, spread and pictures are made on images of the training set alone."""
    max_images: int = Field(default=2000, ge=20, le=MOST)
    """Most images that one evaluation looks at, drawn by the hash of their content."""
    image_size: int = Field(default=0, ge=0, le=MOST)
    """Side of the images in pixels; 0 takes crops.global_crops_size."""
    num_pictures: int = Field(default=6, ge=0, le=MOST)
    """Images whose patch tokens are drawn as PCA panels; 0 draws none."""
    num_cpus: float = Field(default=0.0, ge=0)
    """CPUs that Ray reserves for an evaluation; 0 lets it share those of the workers."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for an evaluation; 0 evaluates on CPUs."""
