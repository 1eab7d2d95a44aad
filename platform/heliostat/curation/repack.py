"""Kept images -> the shards of a curated artifact: original bytes, and faces made unrecognisable where they were found.

The plan lists the kept images in pool order, cut into shards, as Parquet pieces that tasks read. A task reads its images by
ranges, neighbours in one request, and writes one shard and then its manifest rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.artifacts import describe
from heliostat.curation.face_blur import blur_faces
from heliostat.curation.features import FACES
from heliostat.curation.features_config import FaceBlurConfig
from heliostat.curation.pool import Pool
from heliostat.data.manifest import manifest_to_bytes
from heliostat.data.packing import shard_key
from heliostat.data.shard_image import EXTENSION_OF_FORMAT, IMAGE_EXTENSIONS, image_id
from heliostat.data.shard_reader import ShardReader
from heliostat.data.shards import ShardImage, make_shard_image, manifest_rows, write_shard
from heliostat.errors import DataError
from heliostat.storage import Store, read_parquet, to_parquet

_PLAN = pa.schema(
    [
        pa.field("raw", pa.int32()),
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("label", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),
        pa.field("faces", FACES),
    ]
)
PLAN_COLUMNS = tuple(name for name in _PLAN.names if name != "raw")

_GAP_BYTES = 2**18  # what lies between two wanted images is read along when it is less: a request costs more
_READ_BYTES = 2**28
_PIECE_ROWS = 65_536


@dataclass(frozen=True)
class ShardSize:
    """A shard is full at either limit, whichever comes first; one image may exceed the second."""

    images: int
    num_bytes: int


class RepackPlan:
    """Collects kept images in order and cuts them into shards; pieces of the plan are written as they fill."""

    def __init__(self, files: Store, prefix: str, size: ShardSize) -> None:
        self._files, self._prefix, self._size = files, prefix, size
        self._finished = {entry.key for entry in files.list(prefix)}
        self._waiting: list[pa.Table] = []
        self._piece = 0
        self.tasks: list[dict[str, Any]] = []

    def add(self, raw: int, rows: pa.Table) -> None:
        """Kept images of one raw artifact, by its number; rows: PLAN_COLUMNS."""
        table = pa.table({"raw": pa.array(np.full(rows.num_rows, raw, np.int32)), **{n: rows[n] for n in PLAN_COLUMNS}})
        self._waiting.append(table.cast(_PLAN))
        if sum(table.num_rows for table in self._waiting) >= _PIECE_ROWS:
            self._flush(last=False)

    def finish(self) -> list[dict[str, Any]]:
        """All tasks, in the order of their shards: index, piece, start, stop."""
        self._flush(last=True)
        return self.tasks

    def _flush(self, *, last: bool) -> None:
        """Cut what waits into whole shards and write them as one piece; the images of an open shard go on waiting."""
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting).combine_chunks()
        ends = _cuts(table["length"].to_numpy(), self._size)
        whole = ends if last else ends[:-1]
        if not whole:
            self._waiting = [table]
            return
        start = 0
        for end in whole:
            self.tasks.append({"index": len(self.tasks), "piece": self._piece, "start": start, "stop": end})
            start = end
        key = f"{self._prefix}{self._piece:06d}.parquet"
        if key not in self._finished:
            self._files.put(key, to_parquet(table.slice(0, start)))
        self._piece += 1
        self._waiting = [table.slice(start)] if start < table.num_rows else []


def _cuts(lengths: NDArray[np.int64], size: ShardSize) -> list[int]:
    """Where shards end: the last end is the number of images, full or not."""
    total = np.cumsum(lengths)
    ends, start, before = [], 0, 0
    while start < len(lengths):
        fits = int(np.searchsorted(total, before + size.num_bytes, side="right"))
        start = min(max(fits, start + 1), start + size.images, len(lengths))
        before = int(total[start - 1])
        ends.append(start)
    return ends


@dataclass(frozen=True)
class RepackShard:
    """Copies the kept images of one shard out of the raw shards; only images with faces are encoded again.

    raws: the stores of the raw artifacts by number. faces: how they are blurred; None leaves every byte as it is.
    """

    raws: tuple[Store, ...]
    files: Store
    plan: str
    rows: str
    faces: FaceBlurConfig | None

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: index, piece, start, stop. Raises DataError when bytes are not those that the manifest was made of."""
        plan = read_parquet(self.files, f"{self.plan}{task['piece']:06d}.parquet", fix="remove it and run again")
        wanted = plan.slice(task["start"], task["stop"] - task["start"]).to_pylist()
        images, num_blurred = list[ShardImage](), 0
        for row, data in _read(self.raws, wanted):
            if image_id(data) != row["id"]:
                raise DataError(
                    f"{row['source']} in {row['shard']} does not match its id {row['id'][:12]}; the raw shard is damaged"
                )
            final = self._without_faces(row, data)
            num_blurred += final is not data
            suffix = row["source"].rpartition(".")[2].lower()
            if suffix not in IMAGE_EXTENSIONS:  # a row of a Parquet file, an entry of a list, a URL with a query
                suffix = EXTENSION_OF_FORMAT[row["format"]]
            images.append(make_shard_image(final, suffix, row["source"], label=row["label"]))
        key, tar = shard_key(task["index"]), write_shard(images)
        self.files.put(key, tar)
        self.files.put(f"{self.rows}{task['index']:06d}.parquet", manifest_to_bytes(manifest_rows(key, tar)))
        return {
            "key": key,
            "file": describe(tar).model_dump(),
            "images": len(images),
            "faces_blurred": num_blurred,
        }

    def _without_faces(self, row: Mapping[str, Any], data: bytes) -> bytes:
        if self.faces is None or not row["faces"]:
            return data
        width, height = row["width"], row["height"]
        boxes = [
            (face["left"] * width, face["top"] * height, face["right"] * width, face["bottom"] * height, face["score"])
            for face in row["faces"]
        ]
        return blur_faces(data, np.array(boxes, np.float32), self.faces)


def first_seen(ids: NDArray[np.uint8], known: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n,) whether an id of (n, 32) uint8 is the first of its kind and none of the known (m, 32)."""
    fresh = np.zeros(len(ids), np.bool_)
    if not len(ids):
        return fresh
    distinct, first = np.unique(np.ascontiguousarray(ids).view("V32").reshape(-1), return_index=True)
    fresh[first] = True
    asked = np.ascontiguousarray(known).view("V32").reshape(-1)
    place = np.minimum(np.searchsorted(distinct, asked), len(distinct) - 1)
    fresh[first[place[distinct[place] == asked]]] = False
    return fresh


def has_faces_to_blur(pool: Pool, config: FaceBlurConfig) -> NDArray[np.bool_]:
    """(N,) whether `RepackShard` would blur a face of each image: one that is certain enough and has an area."""
    found = np.zeros(pool.num_rows, np.bool_)
    for start, table in pool.blocks(["faces"]):
        faces = table["faces"].combine_chunks()
        boxes = pc.list_flatten(faces)
        left, top, right, bottom, score = (
            pc.struct_field(boxes, name).to_numpy() for name in ("left", "top", "right", "bottom", "score")
        )
        certain = (score >= config.min_face_score) & (right > left) & (bottom > top)
        found[start + pc.list_parent_indices(faces).to_numpy()[certain]] = True
    return found


def _read(raws: Sequence[Store], wanted: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], bytes]]:
    """The bytes of every row in order; images that lie close to each other come by one request."""
    start = 0
    while start < len(wanted):
        first, stop, end = wanted[start], start + 1, wanted[start]["offset"] + wanted[start]["length"]
        while stop < len(wanted) and _is_near(first, end, wanted[stop]):
            end, stop = wanted[stop]["offset"] + wanted[stop]["length"], stop + 1
        data = ShardReader(raws[first["raw"]])(first["shard"], first["offset"], end - first["offset"])
        for row in wanted[start:stop]:
            low = row["offset"] - first["offset"]
            yield row, data[low : low + row["length"]]
        start = stop


def _is_near(first: Mapping[str, Any], end: int, row: Mapping[str, Any]) -> bool:
    return (
        (row["raw"], row["shard"]) == (first["raw"], first["shard"])
        and 0 <= row["offset"] - end <= _GAP_BYTES
        and row["offset"] + row["length"] - first["offset"] <= _READ_BYTES
    )
