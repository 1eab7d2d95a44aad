"""Settings of the way from bytes to batches: decoding, crops, loading, and the demo's pool of photographs.

Names and defaults follow DINOv2 (arXiv 2304.07193 and its public configuration); each field says its meaning, unit and source.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from heliostat.config import StrictModel

ImageFormat = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff"]
NUM_GLOBAL_CROPS = 2  # DINOv2's objective compares two global crops of each image

IMAGE_FORMATS: tuple[ImageFormat, ...] = ("jpeg", "png", "webp", "gif", "bmp", "tiff")

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveNumber = Annotated[float, Field(gt=0.0)]

# Blur probabilities (first global crop, second global crop, local crops). DINOv2's code passes 1 - p where p is meant, so its
# released models were trained with the first row although its text declares the second.
BLUR_PROBABILITIES: dict[str, tuple[float, float, float]] = {
    "as_trained": (0.0, 0.9, 0.5),
    "as_declared": (1.0, 0.1, 0.5),
}


class DecodeConfig(StrictModel):
    """Limits that an image must respect; all are checked on the header, before any pixel is decoded."""

    max_bytes: int = Field(default=64 * 2**20, gt=0)
    """Largest encoded image, bytes. Assumption: above every camera's JPEG; bounds the memory of one read."""
    max_pixels: int = Field(default=50_000_000, gt=0, le=89_478_485)
    """Largest width times height, pixels. 50 Mpx decode to 150 MB, from a PNG of 0.5 MB. Pillow objects above 89 Mpx."""
    max_aspect_ratio: float = Field(default=8.0, ge=1.0)
    """Longest side divided by shortest side. Banners and separators lie above; assumption, not studied."""
    min_side_pixels: int = Field(default=16, ge=1)
    """Shortest side allowed, pixels. Smaller pictures are icons and tracking pixels; assumption, not studied."""
    formats: tuple[ImageFormat, ...] = Field(default=IMAGE_FORMATS, min_length=1)
    """Formats that may reach a decoder. The content decides the format, never the file name."""


class CropsConfig(StrictModel):
    """The multi-crop augmentation: two global crops and `local_crops_number` local crops of each image."""

    global_crops_size: int = Field(default=224, ge=8)
    """Side of the two global crops, pixels. DINOv2: 224."""
    global_crops_scale: tuple[float, float] = (0.32, 1.0)
    """Area of a global crop as a fraction of the image, smallest and largest. DINOv2: 0.32 to 1."""
    local_crops_number: int = Field(default=8, ge=0)
    """Local crops per image. DINOv2: 8."""
    local_crops_size: int = Field(default=98, ge=4)
    """Side of a local crop, pixels. DINOv2: 98 with patch 14, 96 with patch 16."""
    local_crops_scale: tuple[float, float] = (0.05, 0.32)
    """Area of a local crop as a fraction of the image, smallest and largest. DINOv2: 0.05 to 0.32."""
    horizontal_flip_probability: Ratio = 0.5
    """Probability of mirroring a crop left to right. DINOv2: 0.5; set 0 where left and right differ in meaning."""
    color_jitter_probability: Ratio = 0.8
    """Probability of the colour jitter. DINOv2: 0.8."""
    brightness: Ratio = 0.4
    """Brightness factor is drawn from 1 - value to 1 + value. DINOv2: 0.4; 0.1 is better for textures."""
    contrast: Ratio = 0.4
    """Contrast factor is drawn from 1 - value to 1 + value. DINOv2: 0.4."""
    saturation: Ratio = 0.2
    """Saturation factor is drawn from 1 - value to 1 + value. DINOv2: 0.2."""
    hue: float = Field(default=0.1, ge=0.0, le=0.5)
    """Hue shift is drawn from -value to +value, in turns of the colour circle. DINOv2: 0.1."""
    grayscale_probability: Ratio = 0.2
    """Probability of dropping the colour of a crop. DINOv2: 0.2."""
    cut_on: Literal["cpu", "device"] = "cpu"
    """Where crops are cut: by the loader's threads, or on the training device, for GPU nodes that are short of cores. The same
    parameters give the same crops within 1.5 of 255 grey values; then the loader only decodes."""
    blur: Literal["as_trained", "as_declared"] = "as_trained"
    """Probabilities of the Gaussian blur: `as_trained` 0.0/0.9/0.5 (first global, second global, local crops) is what the
    released DINOv2 models saw, `as_declared` 1.0/0.1/0.5 is what its paper and code say."""
    solarize_probability: Ratio = 0.2
    """Probability of inverting values of 128 and above, second global crop only. DINOv2: 0.2."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean that normalisation subtracts, per channel, in 0..1. ImageNet's, as DINOv2."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation that normalisation divides by, per channel, in 0..1. ImageNet's, as DINOv2."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= 1.0:
                raise ValueError(f"{name} [{low}, {high}] must rise within 0..1, like [0.05, 0.32]")
        if min(self.std) <= 0.0:
            raise ValueError(f"std {list(self.std)} must be positive")
        return self


class ShuffleConfig(StrictModel):
    """The order in which images are visited; the number of workers never changes it."""

    window_images: int = Field(default=131_072, ge=1)
    """Images among which the order is random. Every epoch visits the shards in a new random order, a window of them after the
    other; a data set of no more images is one window. Larger windows mix better and hold more shards in memory."""
    lanes: int = Field(default=32, ge=1)
    """Groups of shards in a window that are read side by side. Give at least as many as there are workers: each then reads
    shards of its own."""


class LoaderConfig(StrictModel):
    """How one rank reads and augments its images; none of these settings changes what it reads."""

    workers: int = Field(default=4, ge=0)
    """Threads that read, decode and augment. 0 works in the caller's thread. About 4 ms of one core per image at 224 pixels."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Batches that are prepared ahead of the training step."""
    read_by: Literal["auto", "shards", "images"] = "auto"
    """Whether whole shards are fetched ahead or each image by itself; auto: shards from object stores, images from disks."""
    shard_bytes: int = Field(default=2 * 2**30, ge=0)
    """Memory of this rank for whole shards, bytes: those of the shuffle window's lanes that it reads and, where they fit,
    those of the window to come. Images of shards that do not fit are read one by one."""
    cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """Memory for decoded images of this rank, bytes; 0 turns it off. Pays where the whole data set nearly fits."""
    via: Literal["threads", "ray_data"] = "threads"
    """Where that is done: in threads of the training worker, or by Ray Data in data workers anywhere in the cluster, whose
    batches come through the object store; for GPU nodes that are short of cores. The batches are the same, byte for byte."""
    ray_workers: int = Field(default=1, ge=1)
    """Data workers of each training worker; each reserves `workers` CPUs, one at least, and has the memory above for itself.
    Two of one thread made more images a second than one of two threads, for the same CPU time (benchmarks/ingest.py)."""
    ray_resources: dict[str, PositiveNumber] = Field(default_factory=dict)
    """Custom resources that a data worker takes besides its CPUs, such as {loader: 1} on nodes that were started with
    --resources='{"loader": 8}': keeps data workers on the CPU nodes."""

    @property
    def cpus_of_data_worker(self) -> int:
        """Logical CPUs that a data worker reserves."""
        return max(1, self.workers)


class PhotographPoolConfig(StrictModel):
    """The demo's pool of raw images, cut from real photographs, with known copies and known broken files."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn."""
    crops_per_photograph: int = Field(default=150, ge=1)
    """Square crops of each photograph, from its left 47 %."""
    exact_duplicate_ratio: Ratio = 0.03
    """Share of the crops that get one renamed copy of the same bytes."""
    num_tiles: int = Field(default=106, ge=1)
    """Originals of the planted copies: tiles of the left halves that share no pixel, 112 to 200 pixels a side."""
    copies_per_kind: int = Field(default=30, ge=0)
    """Altered copies of tiles, of each of the 20 kinds (docs/concepts/planted_copies.md)."""
    num_evaluation_tiles: int = Field(default=16, ge=0)
    """Further tiles, which become the evaluation set and are in the pool only as altered copies."""
    evaluation_copies_per_kind: int = Field(default=8, ge=0)
    """Altered copies of evaluation tiles, of each of the 20 kinds; decontamination has to find them."""
    hard_negatives_per_kind: int = Field(default=12, ge=0)
    """Cards, charts and pages that look alike and must not be merged, of each kind. Each card takes a tile for its picture."""
    num_video_frames: int = Field(default=160, ge=0, le=264)
    """Consecutive video frames, half from each of two films: natural near-duplicates."""
    num_broken_files: int = Field(default=20, ge=0)
    """Files that are not images although their names say so."""
