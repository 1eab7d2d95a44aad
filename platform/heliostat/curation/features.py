"""What is measured on each image, in one pass that decodes it once: hashes, detectors' findings, embeddings.

The result is one Parquet file per task, one row per manifest row in its order, also for images that do not decode (with the
reason and nulls). A task is a range of manifest rows; it reads its shard by ranges, writes one file, and may be repeated.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.artifacts import describe
from heliostat.curation.detectors import FaceDetector, NsfwDetector
from heliostat.curation.embed import Embedder
from heliostat.curation.pca_hash import PcaHash, thumbnail_of
from heliostat.curation.vectors import vector_column
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.data.shard_image import image_id
from heliostat.data.shard_reader import ShardReader, image_runs, read_run
from heliostat.errors import DataError
from heliostat.storage import Store, read_parquet, to_parquet

# Shapes: n images of a batch, D dimension.

LEAST_SIDE_PIXELS = 512
"""JPEGs are decoded at a fraction of their size as long as their shorter side keeps this: above what any embedder looks at."""

_BATCH_BYTES = 2**28  # decoded pixels that are held at once
_PIECE_ROWS = 65_536

COPY, SEMANTIC = "copy", "semantic"

_PLAIN = ("id", "source", "label", "shard", "offset", "length", "width", "height", "format")
FACES = pa.list_(pa.struct([(name, pa.float32()) for name in ("left", "top", "right", "bottom", "score")]))

FEATURE_FIELDS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False, metadata={"meaning": "sha256 of the file"}),
        pa.field("source", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False, metadata={"meaning": "why it does not decode; empty if it does"}),
        pa.field("detail", pa.string(), nullable=False, metadata={"meaning": "the decoder's own words"}),
        pa.field("pca_code", pa.uint64(), metadata={"meaning": "docs/concepts/pca_hash.md"}),
        pa.field("pca_coarse", pa.binary(16), metadata={"meaning": "int8 of the first components"}),
        pa.field("pca_contrast", pa.float32(), metadata={"meaning": "standard deviation of the thumbnail, grey values"}),
        pa.field("nsfw", pa.float32(), metadata={"meaning": "score, 0 to 1; null when no detector ran"}),
        pa.field("faces", FACES, metadata={"meaning": "boxes as fractions of width and height; null when no detector ran"}),
    ]
)
"""Columns of a features file; `copy` and `semantic` (`vectors.vector_column`) follow."""


@dataclass(frozen=True)
class Instruments:
    """What measures: opened once per actor. least_side: pixels that the shorter side of a JPEG must keep when it is decoded."""

    hash: PcaHash
    nsfw: NsfwDetector | None
    faces: FaceDetector | None
    copy: Embedder
    semantic: Embedder | None
    least_side: int = LEAST_SIDE_PIXELS


@dataclass
class _Clock:
    """CPU seconds of this process by part of the pass."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started


@dataclass(frozen=True)
class FeatureShard:
    """Measures the images of one run of a shard and writes their rows.

    open_instruments: makes the Instruments; called once per process that works on tasks. batch_size: images measured together.
    """

    raw: Store
    files: Store
    pieces: str
    prefix: str
    limits: DecodeConfig
    open_instruments: Callable[[], Instruments]
    batch_size: int

    @cached_property
    def instruments(self) -> Instruments:
        """Opened when the first task comes."""
        return self.open_instruments()

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: index, piece, start, stop (rows of the piece). Raises DataError when a shard is not what its manifest says."""
        clock = _Clock()
        with clock.part("read"):
            rows = read_piece(self.files, self.pieces, task["piece"]).slice(task["start"], task["stop"] - task["start"])
            places = list(zip(rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True))
            found = read_run(ShardReader(self.raw), rows["shard"][0].as_py(), places)
            for data, identity, source in zip(found, rows["id"].to_pylist(), rows["source"].to_pylist(), strict=True):
                if image_id(data) != identity:
                    raise DataError(
                        f"{source} in {rows['shard'][0].as_py()} does not match its id {identity[:12]}; the shard is damaged"
                    )
        batches = [self._measure(*batch, clock) for batch in self._decoded(found, clock)]
        with clock.part("write"):
            table = _joined(rows, batches)
            packed, key = to_parquet(table), f"{self.prefix}{task['index']:06d}.parquet"
            self.files.put(key, packed)
            file = describe(packed).model_dump()
        return {"key": key, "file": file, "images": rows.num_rows, "cpu_seconds": clock.seconds}

    def _decoded(
        self, found: Sequence[memoryview], clock: _Clock
    ) -> Iterator[tuple[list[NDArray[np.uint8]], list[tuple[str, str]]]]:
        """Batches of decoded images with one (reason, detail) per file; bounded in images and in bytes."""
        images: list[NDArray[np.uint8]] = []
        reasons: list[tuple[str, str]] = []
        for data in found:
            with clock.part("decode"):
                try:
                    images.append(decode(bytes(data), self.limits, least_side=self.instruments.least_side))
                    reasons.append(("", ""))
                except ImageRejected as rejected:
                    reasons.append((rejected.reason, rejected.detail))
            if len(images) >= self.batch_size or sum(image.nbytes for image in images) > _BATCH_BYTES:
                yield images, reasons
                images, reasons = [], []
        if reasons:
            yield images, reasons

    def _measure(self, images: list[NDArray[np.uint8]], reasons: list[tuple[str, str]], clock: _Clock) -> dict[str, pa.Array]:
        tools = self.instruments
        present = np.array([not reason for reason, _ in reasons], np.bool_)
        columns: dict[str, pa.Array] = {
            "reason": pa.array([reason for reason, _ in reasons], pa.string()),
            "detail": pa.array([detail for _, detail in reasons], pa.string()),
        }
        with clock.part("hash"):
            thumbnails = np.stack([thumbnail_of(image) for image in images]) if images else np.empty((0, 32, 32), np.float32)
            hashed = tools.hash.hash(thumbnails)
            columns["pca_code"] = _spread(pa.array(hashed.code), present)
            columns["pca_coarse"] = _spread(pa.array([row.tobytes() for row in hashed.coarse], pa.binary(16)), present)
            columns["pca_contrast"] = _spread(pa.array(hashed.contrast, pa.float32()), present)
        if tools.nsfw is not None:
            with clock.part("nsfw"):
                columns["nsfw"] = _spread(pa.array(tools.nsfw.scores(images), pa.float32()), present)
        if tools.faces is not None:
            with clock.part("faces"):
                columns["faces"] = _spread(_face_column(tools.faces.boxes(images), images), present)
        for name, embedder in ((COPY, tools.copy), (SEMANTIC, tools.semantic)):
            if embedder is not None:
                with clock.part(name):
                    columns[name] = vector_column(embedder(images), present, embedder.dimension)
        return columns


def _spread(values: pa.Array, present: NDArray[np.bool_]) -> pa.Array:
    """One value per file, null where the image did not decode."""
    position = np.cumsum(present) - 1
    return values.take(pa.array(position, mask=~present))


def _face_column(boxes: Sequence[NDArray[np.float32]], images: Sequence[NDArray[np.uint8]]) -> pa.Array:
    """Boxes in pixels -> fractions of the sides, so that they fit the image at any size."""
    rows = []
    for found, image in zip(boxes, images, strict=True):
        height, width = image.shape[:2]
        scale = np.array([width, height, width, height, 1.0], np.float32)
        rows.append(
            [dict(zip(("left", "top", "right", "bottom", "score"), box.tolist(), strict=True)) for box in found / scale]
        )
    return pa.array(rows, FACES)


def _joined(rows: pa.Table, batches: Sequence[Mapping[str, pa.Array]]) -> pa.Table:
    """The manifest's columns and what was measured, as one table of the features' schema."""
    vectors = [name for name in (COPY, SEMANTIC) if name in batches[0]]
    columns = {name: rows[name] for name in _PLAIN}
    for wanted in FEATURE_FIELDS:
        if wanted.name in _PLAIN:
            continue
        missing = wanted.name not in batches[0]
        columns[wanted.name] = (
            pa.nulls(rows.num_rows, wanted.type) if missing else pa.chunked_array([batch[wanted.name] for batch in batches])
        )
    fields = [*FEATURE_FIELDS]
    for name in vectors:
        columns[name] = pa.chunked_array([batch[name] for batch in batches])
        fields.append(pa.field(name, columns[name].type))
    return pa.table(columns, schema=pa.schema(fields)).combine_chunks()


def plan_features(manifest: pa.Table, files: Store, pieces: str, *, max_images: int) -> list[dict[str, Any]]:
    """Write the manifest in pieces that tasks can read, and return all tasks in order, a run of one shard each.

    pieces: the prefix of the pieces; those that are there are left as they are. max_images: images of one task.
    """
    finished = {entry.key for entry in files.list(pieces)}
    tasks: list[dict[str, Any]] = []
    runs = image_runs(manifest, max_images=max_images)
    piece, first = 0, 0
    for index, run in enumerate(runs):
        if run.stop - runs[first].start > _PIECE_ROWS and index > first:
            rows = manifest.slice(runs[first].start, run.start - runs[first].start)
            _write_piece(rows, files, _piece_key(pieces, piece), finished)
            piece, first = piece + 1, index
        start = run.start - runs[first].start
        tasks.append({"index": index, "piece": piece, "start": start, "stop": start + len(run)})
    if runs:
        _write_piece(manifest.slice(runs[first].start), files, _piece_key(pieces, piece), finished)
    return tasks


def _piece_key(pieces: str, piece: int) -> str:
    return f"{pieces}{piece:06d}.parquet"


def _write_piece(rows: pa.Table, files: Store, key: str, finished: set[str]) -> None:
    if key not in finished:
        files.put(key, to_parquet(rows))


def read_piece(files: Store, pieces: str, piece: int) -> pa.Table:
    """One piece of a manifest that `plan_features` wrote."""
    return read_parquet(files, _piece_key(pieces, piece), fix="remove it and run again")
