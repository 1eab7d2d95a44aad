"""The images that a training stage reads: one artifact, or several with sampling weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.artifacts import Artifact, ArtifactRef
from heliostat.data.image_source import ImageSource
from heliostat.data.image_table import image_table
from heliostat.data.manifest import read_manifest
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_reader import ShardReader
from heliostat.errors import DataError, UsageError
from heliostat.runtime.pipelines import Context
from heliostat.training.trainer import DATA_REVISIONS

_OF_IMAGES = ("curated", "raw")


@dataclass(frozen=True)
class TrainingData:
    """Artifacts of images and their sampling weights."""

    artifacts: tuple[Artifact, ...]
    weights: tuple[float, ...]

    @property
    def inputs(self) -> dict[str, Artifact]:
        """The artifacts by role, for the lineage."""
        return {f"data_{number}" if number > 1 else "data": one for number, one in enumerate(self.artifacts, start=1)}

    @property
    def identity(self) -> dict[str, Any]:
        """What belongs into a fingerprint besides the inputs."""
        return {"data_weights": list(self.weights)} if len(self.weights) > 1 else {}

    @property
    def labels(self) -> dict[str, str]:
        """What checkpoints keep of it: the requests to forget that changed the images."""
        revisions = [[str(one.ref), one.record.revisions] for one in self.artifacts if one.record.revisions]
        return {DATA_REVISIONS: json.dumps(revisions)} if revisions else {}

    def sources(self) -> tuple[ImageSource, ...]:
        """What a loader reads from. Raises DataError for an artifact without a readable image."""
        return tuple(
            ImageSource(image_table(readable_rows(one)), ShardReader(one.files), weight)
            for one, weight in zip(self.artifacts, self.weights, strict=True)
        )

    def named(self, rejections: Sequence[Rejection]) -> list[Rejection]:
        """The rejections with the paths or URLs that their images came from, without images that were forgotten since."""
        wanted = pa.array([rejection.id for rejection in rejections], pa.string())
        sources: dict[str, str] = {}
        for one in self.artifacts if rejections else ():
            manifest = read_manifest(one.files)
            rows = manifest.filter(pc.is_in(manifest["id"], value_set=wanted))
            sources |= dict(zip(rows["id"].to_pylist(), rows["source"].to_pylist(), strict=True))
        return [replace(one, source=sources[one.id]) for one in rejections if one.id in sources]


def training_data(context: Context, data: str | Mapping[str, float]) -> TrainingData:
    """The artifacts that are named, else the recipe's curated one, else its raw one."""
    if not data:
        kind = "curated" if context.recipe.curate is not None or context.recipe.ingest is None else "raw"
        return TrainingData((context.load(context.recipe.ref(kind)),), (1.0,))
    named = {data: 1.0} if isinstance(data, str) else data
    for name in named:
        if ArtifactRef.parse(name).kind not in _OF_IMAGES:
            raise UsageError(f"data={name} holds no images to train on; name curated/NAME@VERSION or raw/NAME@VERSION")
    return TrainingData(tuple(context.load(ArtifactRef.parse(name)) for name in named), tuple(named.values()))


def readable_rows(images: Artifact) -> pa.Table:
    """The manifest without the files whose header could not be read. Raises DataError when nothing is left."""
    manifest = read_manifest(images.files)
    rows = manifest.filter(pc.greater(manifest["width"], 0))
    if rows.num_rows == 0:
        raise DataError(f"{images.ref} holds no readable image; look at its manifest")
    return rows
