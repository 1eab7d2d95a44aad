"""The ways through shards that curate.py compares, and the shards: decode loops, our pass, one script per question."""

import io
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from heliostat.curation.features import LEAST_SIDE_PIXELS, FeatureShard, Instruments, plan_features
from heliostat.curation.pca_hash import thumbnail_of
from heliostat.curation.tasks import run_serially
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.manifest import manifest_from_bytes, manifest_to_bytes
from heliostat.data.photographs import photographs
from heliostat.data.shard_image import image_id
from heliostat.data.shard_reader import ShardReader, read_run
from heliostat.data.shards import make_shard_image, manifest_rows, write_shard
from heliostat.storage import LocalStore

Pixels = NDArray[np.uint8]
Seconds = dict[str, float]

MANIFEST, PIECES, ROWS = "manifest.parquet", "pieces/", "rows/"
BATCH_SIZE = 64
_NOISE = 3.0  # grey values: enlarged photographs are too smooth for a camera's file size
_MARGIN = 1.15


def write_images(store: LocalStore, count: int, size: tuple[int, int], per_shard: int) -> float:
    """Cuts of `size` (width, height) of photographs as JPEG of quality 90, in tars with a manifest; their mean bytes."""
    rng, pictures, images = np.random.default_rng(0), list(photographs().values()), []
    width, height = size
    for number in range(count):
        picture = pictures[number % len(pictures)]
        scale = max(_MARGIN * width / picture.shape[1], _MARGIN * height / picture.shape[0])
        if scale > 1:
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        left, top = rng.integers(0, picture.shape[1] - width + 1), rng.integers(0, picture.shape[0] - height + 1)
        cut = picture[top : top + height, left : left + width] + rng.normal(0, _NOISE, (height, width, 1))
        bgr = np.clip(np.rint(cut), 0, 255).astype(np.uint8)[:, :, ::-1]
        done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 90])
        if not done:
            raise RuntimeError("a photograph could not be encoded")
        images.append(make_shard_image(data.tobytes(), "jpg", f"{number:06d}.jpg"))
    tables = []
    for number, start in enumerate(range(0, count, per_shard)):
        key = f"shards/{number:06d}.tar"
        tar = write_shard(images[start : start + per_shard])
        store.put(key, tar)
        tables.append(manifest_rows(key, tar))
    store.put(MANIFEST, manifest_to_bytes(pa.concat_tables(tables)))
    return sum(len(image.data) for image in images) / count


@dataclass(frozen=True)
class Shards:
    """The images of one size on a disk. count: all of them, or how many of the first are used."""

    folder: Path
    count: int

    @property
    def store(self) -> LocalStore:
        """Where they lie."""
        return LocalStore(self.folder)

    @property
    def manifest(self) -> pa.Table:
        """One row an image."""
        return manifest_from_bytes(self.store.read(MANIFEST)).slice(0, self.count)

    @property
    def keys(self) -> list[str]:
        """The tars in order."""
        return list(dict.fromkeys(self.manifest["shard"].to_pylist()))

    def files(self) -> Iterator[memoryview]:
        """The bytes of every image, by the manifest, one read a tar."""
        table, reader = self.manifest, ShardReader(self.store)
        for key in self.keys:
            rows = table.filter(pc.equal(table["shard"], key))
            places = list(zip(rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True))
            yield from read_run(reader, key, places)


def decode_loop(shards: Shards, one: Callable[[memoryview], Pixels]) -> Seconds:
    """CPU seconds of decoding every image and doing nothing with it."""
    started = time.process_time()
    for data in shards.files():
        one(data)
    return {"all": time.process_time() - started}


def bare(data: memoryview) -> Pixels:
    """The decoder alone, whole size."""
    pixels: Pixels = simplejpeg.decode_jpeg(data)
    return pixels


def whole(data: memoryview) -> Pixels:
    """Ours with its checks, whole size."""
    return decode(bytes(data), DecodeConfig())


def scaled(data: memoryview) -> Pixels:
    """As in the pass: a large JPEG at a fraction of its size."""
    return decode(bytes(data), DecodeConfig(), least_side=LEAST_SIDE_PIXELS)


def pillow(data: bytes | memoryview) -> Pixels:
    """As most scripts do it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def prepared_pass(
    shards: Shards, out: LocalStore, tools: Instruments, per_task: int
) -> tuple[FeatureShard, list[dict[str, Any]]]:
    """Our pass and its tasks; the manifest is cut into pieces here."""
    tasks = plan_features(shards.manifest, out, PIECES, max_images=per_task)
    return FeatureShard(shards.store, out, PIECES, ROWS, DecodeConfig(), lambda: tools, BATCH_SIZE), tasks


def our_pass(shards: Shards, out: LocalStore, tools: Instruments, per_task: int) -> Seconds:
    """CPU seconds of FeatureShard over all tasks: by its own parts, and `all`."""
    function, tasks = prepared_pass(shards, out, tools, per_task)
    started, parts = time.process_time(), dict[str, float]()
    for result in run_serially(function, tasks, label="", has_state=True):
        for name, seconds in result["cpu_seconds"].items():
            parts[name] = parts.get(name, 0.0) + seconds
    return {**parts, "all": time.process_time() - started}


def read_features(out: LocalStore) -> pa.Table:
    """What our pass wrote."""
    keys = sorted(info.key for info in out.list(ROWS))
    return pa.concat_tables([pq.read_table(pa.BufferReader(out.read(key))) for key in keys])


def without(tools: Instruments, *names: str) -> Instruments:
    """The same without some detectors."""
    return replace(tools, **dict.fromkeys(names))


def answers(tools: Instruments, image: Pixels) -> dict[str, Any]:
    """What a plain program notes of one image, detectors included."""
    return {name: answer for question in QUESTIONS for name, answer in question(tools, image).items()}


def _hash(tools: Instruments, image: Pixels) -> dict[str, Any]:
    hashed = tools.hash.hash(thumbnail_of(image)[None])
    return {"pca_code": hashed.code[0], "pca_coarse": hashed.coarse[0].tobytes()}


def _nsfw(tools: Instruments, image: Pixels) -> dict[str, Any]:
    return {"nsfw": float(tools.nsfw.scores([image])[0])} if tools.nsfw else {}


def _faces(tools: Instruments, image: Pixels) -> dict[str, Any]:
    return {"num_faces": len(tools.faces.boxes([image])[0])} if tools.faces else {}


def _copy(tools: Instruments, image: Pixels) -> dict[str, Any]:
    return {"copy": tools.copy([image])[0].tolist()}


QUESTIONS: tuple[Callable[[Instruments, Pixels], dict[str, Any]], ...] = (_hash, _nsfw, _faces, _copy)
"""One script of a team each."""


def one_script_per_question(
    shards: Shards, out: Path, tools: Instruments, to_pixels: Callable[[bytes], Pixels] = pillow
) -> tuple[Seconds, pa.Table]:
    """CPU seconds by question and `all`; the answers. Each script walks the tars, decodes every image, writes a file."""
    spent: Seconds = {}
    columns: dict[str, list[Any]] = {}
    for question in QUESTIONS:
        started, rows = time.process_time(), list[dict[str, Any]]()
        for data in members([shards.folder / key for key in shards.keys]):
            answer = question(tools, to_pixels(data))
            rows.append({"id": image_id(data), **answer} if question is _hash else answer)
        found = {name: [row[name] for row in rows] for name in rows[0]}
        pq.write_table(pa.table(found), out / f"{question.__name__}.parquet")
        spent[question.__name__.strip("_")] = time.process_time() - started
        columns |= found
    return {**spent, "all": sum(spent.values())}, pa.table(columns)


def members(paths: Sequence[Path]) -> Iterator[bytes]:
    """Every JPEG, by the standard library's tarfile."""
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None:
                    yield file.read()


def in_order(table: pa.Table) -> pa.Table:
    """By id, with numbers of faces where there are boxes."""
    if "faces" in table.column_names:
        table = table.append_column("num_faces", pc.list_value_length(table["faces"]))
    return table.sort_by("id")


def check_same(ours: pa.Table, theirs: pa.Table, who: str) -> None:
    """RuntimeError unless both have the same images, hashes, scores, numbers of faces and vectors (as float16)."""
    one, other = (in_order(table) for table in (ours, theirs))
    if one["id"].to_pylist() != other["id"].to_pylist():
        raise RuntimeError(f"{who} has other images ({other.num_rows}, ours {one.num_rows}); nothing was timed")
    for name in ("pca_code", "pca_coarse"):
        if one[name].to_pylist() != other[name].to_pylist():
            raise RuntimeError(f"{who} has other hashes in {name}; nothing was timed")
    distance = np.abs(vectors_of(one) - vectors_of(other)).max()
    if not distance <= 2**-10:  # one step of float16 for values below 1, twice
        raise RuntimeError(f"{who} has other vectors, by {distance:.2g}; nothing was timed")
    if not np.allclose(one["nsfw"].to_numpy(), other["nsfw"].to_numpy(), atol=1e-5):
        raise RuntimeError(f"{who} has other scores; nothing was timed")
    if one["num_faces"].to_pylist() != other["num_faces"].to_pylist():
        raise RuntimeError(f"{who} finds other faces; nothing was timed")


def vectors_of(table: pa.Table) -> NDArray[np.float32]:
    """(n, D) of the column `copy`: float16 in bytes, or lists of numbers."""
    rows = table["copy"].to_pylist()
    vectors = [np.frombuffer(row, "<f2") if isinstance(row, bytes) else row for row in rows]
    return np.asarray(vectors, np.float32)


def differences(ours: pa.Table, theirs: pa.Table) -> dict[str, float]:
    """How far two ways of decoding move what is measured: bits of the hash, cosine of vectors, score; the largest."""
    one, other = (in_order(table) for table in (ours, theirs))
    bits = [(a ^ b).bit_count() for a, b in zip(one["pca_code"].to_pylist(), other["pca_code"].to_pylist(), strict=True)]
    cosine = (vectors_of(one) * vectors_of(other)).sum(axis=1)
    score = np.abs(one["nsfw"].to_numpy() - other["nsfw"].to_numpy()).max()
    changed = sum(a != b for a, b in zip(one["num_faces"].to_pylist(), other["num_faces"].to_pylist(), strict=True))
    return {"bits": max(bits), "cosine": float(cosine.min()), "nsfw": float(score), "faces": changed}
