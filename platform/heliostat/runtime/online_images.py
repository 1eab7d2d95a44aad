"""The images that evaluations while training look at: drawn by content hash on the driver, decoded where they are used.

The same images are drawn whatever the order of the data, the number of workers or the machine: those with the smallest hashes.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.artifacts import Artifact, ArtifactRef
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.data.image_source import ImageSource, Reader
from heliostat.data.manifest import read_manifest
from heliostat.data.shard_reader import ShardReader
from heliostat.errors import DataError
from heliostat.evaluation.features import centre_crop
from heliostat.evaluation.online import PICTURE_PATCHES, LabelledCrops, OnlineImages, Pixels, scored_half
from heliostat.runtime.pipelines import Context
from heliostat.runtime.training_data import readable_rows
from heliostat.training.recipe import TrainingConfig

_PER_CLASS = 10  # labelled images at least, where a set has them: as many as neighbours vote
_REQUESTS_AT_ONCE = 16  # to an object store, where one takes tens of milliseconds


@dataclass(frozen=True)
class DrawnImage:
    """One image: whose it is (an index into the readers), where its bytes lie, its class name."""

    reader: int
    shard: str
    offset: int
    length: int
    label: str | None = None


@dataclass(frozen=True)
class OnlineDraw:
    """Which images the evaluations of a run look at, and how large. Can be pickled; holds no pixel.

    image_size: side of the crops in pixels; picture_size: shorter side in pixels that pictures are decoded for at least;
    what: the labelled artifact's name, empty without one; num_classes: how many classes it has.
    """

    readers: tuple[Reader, ...]
    training: tuple[DrawnImage, ...]
    labelled: tuple[DrawnImage, ...]
    pictures: tuple[DrawnImage, ...]
    image_size: int
    picture_size: int
    decoding: DecodeConfig
    what: str = ""
    num_classes: int = 0

    def line(self) -> str:
        """What is looked at, in one line."""
        drawn = len({one.label for one in self.labelled})
        classes = f"{drawn:,} classes" if drawn == self.num_classes else f"{drawn:,} of {self.num_classes:,} classes"
        labelled = f"{len(self.labelled):,} of {self.what} ({classes}), " if self.labelled else ""
        no_labels = "" if self.labelled else "; no labels, so no k-NN and no probe"
        return f"{labelled}{len(self.training):,} of the training set{no_labels}"


def draw_images(context: Context, config: TrainingConfig, sources: Sequence[ImageSource]) -> OnlineDraw | None:
    """Draw the images of a run's evaluations; None when `online.enabled` is false.

    Half of `online.max_images` are images of the training set, as many of each artifact as its weight says; the other half
    labelled images, as many of each class, if there are any. Raises DataError for labels that cannot be judged by,
    ArtifactNotFoundError for a named artifact that is not there.
    """
    online = config.online
    if not online.enabled:
        return None
    size = online.image_size or config.crops.global_crops_size
    patch = next(iter(config.backbones.values())).patch_size
    readers: list[Reader] = [source.reader for source in sources]
    training = _draw_training(sources, online.max_images // 2)
    artifact = _labelled(context, online.labelled)
    labelled: tuple[DrawnImage, ...] = ()
    num_classes = 0
    if artifact is not None:
        labelled, num_classes = _draw_labelled(artifact, online.max_images - online.max_images // 2, len(readers))
        readers.append(ShardReader(artifact.files))
    whole = _pictures(context)
    pictures = training[: online.num_pictures]
    if whole is not None:
        rows = readable_rows(whole).sort_by("id")[: online.num_pictures]
        pictures = _of_rows(rows, len(readers))
        readers.append(ShardReader(whole.files))
    return OnlineDraw(
        tuple(readers),
        training,
        labelled,
        pictures,
        size,
        PICTURE_PATCHES * patch,
        config.decode,
        str(artifact.ref) if artifact is not None else "",
        num_classes,
    )


def _labelled(context: Context, name: str) -> Artifact | None:
    """The artifact that is named, else the recipe's own. A new version trained on old data may have none: that is said."""
    recipe = context.recipe
    if name:
        return context.load(ArtifactRef.parse(name))
    if recipe.ingest is None or not recipe.ingest.labelled:
        return None
    own = recipe.ref("raw", "-labelled")
    found = context.artifacts.find(own)
    if found is None:
        context.progress.say(
            f"          no {own} in the store: evaluations go without labels; name a set with online.labelled="
        )
    return found


def _pictures(context: Context) -> Artifact | None:
    """The recipe's own whole images, where there are any; else images of the training set are drawn."""
    recipe = context.recipe
    if recipe.ingest is None or not recipe.ingest.pictures:
        return None
    return context.artifacts.find(recipe.ref("raw", "-pictures"))


def _draw_training(sources: Sequence[ImageSource], count: int) -> tuple[DrawnImage, ...]:
    """Images with the smallest hashes of each source, as many as its share of the weights."""
    total = sum(source.weight for source in sources)
    drawn = []
    for number, source in enumerate(sources):
        table = source.table
        for image in smallest_hashes(table.ids, max(1, round(count * source.weight / total))):
            where = (table.shard(image), int(table.offset[image]), int(table.length[image]))
            drawn.append(DrawnImage(number, *where))
    return tuple(drawn)


def smallest_hashes(ids_N32: NDArray[np.uint8], count: int) -> list[int]:
    """Rows of the `count` smallest ids in their order; ids: (N, 32) uint8. Milliseconds for ten million."""
    keys_N = np.ascontiguousarray(ids_N32[:, :8]).view(">u8")[:, 0]  # 64 of 256 bits tell them apart
    if count < len(keys_N):
        nearly = np.argpartition(keys_N, count)[:count]
        return [int(row) for row in nearly[np.argsort(keys_N[nearly], kind="stable")]]
    return [int(row) for row in np.argsort(keys_N, kind="stable")]


def _draw_labelled(artifact: Artifact, count: int, reader: int) -> tuple[tuple[DrawnImage, ...], int]:
    """Images of every class in turn, each class in the order of its hashes, until there are `count`; and all classes' number.

    Of more classes than leave `_PER_CLASS` images to each, those are taken whose names have the smallest hashes.
    """
    manifest = read_manifest(artifact.files)
    manifest = manifest.filter(pc.greater(manifest["width"], 0)).sort_by("id")
    labels = manifest["label"].to_pylist()
    missing = sum(label is None for label in labels)
    if missing:
        raise DataError(
            f"{missing} of {len(labels)} images of {artifact.ref} have no label; lay images in one folder per class, or set "
            "online.enabled=false"
        )
    names = sorted(set(labels), key=lambda name: hashlib.sha256(name.encode()).digest())
    taken = set(names[: max(2, count // _PER_CLASS)])
    rows = [row for row, label in enumerate(labels) if label in taken]
    in_turn = [rows[number] for number in rows_in_turn([labels[row] for row in rows], count)]
    drawn = _of_rows(manifest.take(pa.array(in_turn, pa.int64())), reader)
    counts = [sum(one.label == label for one in drawn) for label in {one.label for one in drawn}]
    if sum(number >= 2 for number in counts) < 2:
        raise DataError(
            f"{len(drawn)} images of {artifact.ref} have {len(counts)} classes; k-NN and probe need 2 classes of 2 images or "
            "more: add images, raise online.max_images or set online.enabled=false"
        )
    return drawn, len(names)


def rows_in_turn(labels: Sequence[str], count: int) -> list[int]:
    """At most `count` rows: the first of every label, the second of every label ..., in the order of the rows."""
    turn: dict[str, int] = {}
    order = []
    for row, label in enumerate(labels):
        turn[label] = turn.get(label, 0) + 1
        order.append((turn[label], row))
    return sorted(row for _, row in sorted(order)[:count])


def _of_rows(rows: pa.Table, reader: int) -> tuple[DrawnImage, ...]:
    columns = ("shard", "offset", "length", "label")
    return tuple(DrawnImage(reader, *row) for row in zip(*(rows[name].to_pylist() for name in columns), strict=True))


def decode_drawn(draw: OnlineDraw, notify: Callable[[str], None]) -> OnlineImages:
    """Read and decode what was drawn. What does not decode is left out and told about; DataError when too few are left."""
    training, _ = _decoded(draw, draw.training, lambda pixels: centre_crop(pixels, draw.image_size), draw.image_size, notify)
    if len(training) < 2:
        raise DataError(f"{len(training)} of {len(draw.training)} images of the training set could be decoded; curate it first")
    pictures, _ = _decoded(draw, draw.pictures, lambda pixels: pixels, draw.picture_size, notify)
    return OnlineImages(np.stack(training), _labelled_crops(draw, notify), tuple(pictures))


def _labelled_crops(draw: OnlineDraw, notify: Callable[[str], None]) -> LabelledCrops | None:
    if not draw.labelled:
        return None
    crops, kept = _decoded(draw, draw.labelled, lambda pixels: centre_crop(pixels, draw.image_size), draw.image_size, notify)
    names = {name: number for number, name in enumerate(sorted({str(one.label) for one in kept}))}
    labels_N = np.array([names[str(one.label)] for one in kept], np.int64)
    is_scored_N = scored_half(labels_N)
    if len(set(labels_N[~is_scored_N])) < 2 or not is_scored_N.any():
        raise DataError(f"{len(kept)} of {len(draw.labelled)} images of {draw.what} could be decoded, too few to judge by")
    return LabelledCrops(np.stack(crops), labels_N, is_scored_N)


def _decoded(
    draw: OnlineDraw,
    images: Sequence[DrawnImage],
    shape: Callable[[Pixels], Pixels],
    least_side: int,
    notify: Callable[[str], None],
) -> tuple[list[Pixels], list[DrawnImage]]:
    """Decoded and shaped one by one, so that only what is kept is held in memory; and the images that were kept."""
    limits = draw.decoding.model_copy(update={"min_side_pixels": 1})  # the training's limit is for what is cropped

    def look(one: DrawnImage) -> Pixels | ImageRejected:
        data = draw.readers[one.reader](one.shard, one.offset, one.length)
        try:
            return shape(decode(bytes(data), limits, least_side=least_side))
        except ImageRejected as rejected:
            return rejected

    is_remote = any(draw.readers[one.reader].is_remote(one.shard) for one in images)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE if is_remote else 1, "heliostat-evaluation") as threads:
        seen = list(zip(images, threads.map(look, images), strict=True))
    reasons = Counter(pixels.reason for _, pixels in seen if isinstance(pixels, ImageRejected))
    if reasons:
        counts = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
        notify(f"evaluation: {reasons.total()} of {len(images)} drawn images are left out: {counts}")
    kept = [(one, pixels) for one, pixels in seen if not isinstance(pixels, ImageRejected)]
    return [pixels for _, pixels in kept], [one for one, _ in kept]
