"""One pass over the images: every row of the manifest comes out, measured once, with its reason where it does not decode."""

import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.curation.embed import ThumbnailEmbedder
from heliostat.curation.features import FeatureShard, Instruments, plan_features, read_piece
from heliostat.curation.pca_hash import PcaHash, thumbnail_of
from heliostat.curation.pool import FeatureFiles, FeaturesInfo, Pool, VectorSpace, check_same_spaces, read_columns
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import read_all
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.manifest import join_manifests
from heliostat.data.shards import make_shard_image, manifest_rows, write_shard
from heliostat.errors import DataError
from heliostat.storage import LocalStore


@dataclass(frozen=True)
class Tools:
    """Instruments of small cost, with a face in the middle of every image."""

    def __call__(self) -> Instruments:
        return Instruments(PcaHash.load(), _Nsfw(), _Faces(), ThumbnailEmbedder(), None)


class _Nsfw:
    name, version = "mean", "1"

    def scores(self, images) -> np.ndarray:
        return np.array([image.mean() / 255 for image in images], np.float32)


class _Faces:
    name, version = "middle", "1"

    def boxes(self, images) -> list[np.ndarray]:
        return [np.array([[0.25 * i.shape[1], 0, 0.5 * i.shape[1], i.shape[0], 0.9]], np.float32) for i in images]


def picture(seed: int, height: int = 48, width: int = 64) -> bytes:
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (6, 8, 3), np.uint8)
    _, data = cv2.imencode(".png", cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
    return data.tobytes()


def raw(store: LocalStore, sizes: list[int]) -> pa.Table:
    """Shards of so many images; the second of each is no image."""
    tables, seed = [], 0
    for number, size in enumerate(sizes):
        images = []
        for index in range(size):
            data = b"nothing that decodes" if index == 1 else picture(seed)
            images.append(make_shard_image(data, "png", f"{number}/{index}.png", label=f"l{index % 2}"))
            seed += 1
        tar = write_shard(images)
        store.put(f"shards/{number:06d}.tar", tar)
        tables.append(manifest_rows(f"shards/{number:06d}.tar", tar))
    return join_manifests(tables)


def features(
    store: LocalStore, manifest: pa.Table, files: LocalStore, *, batch_size: int = 3, max_images: int = 4
) -> FeatureFiles:
    tasks = plan_features(manifest, files, "_work/pieces/", max_images=max_images)
    function = FeatureShard(store, files, "_work/pieces/", "rows/", DecodeConfig(), Tools(), batch_size)
    list(run_serially(function, tasks, label="embedding"))
    starts = (0, *np.cumsum([task["stop"] - task["start"] for task in tasks]).tolist())
    space = VectorSpace(name="thumbnail", version="1", dimension=ThumbnailEmbedder().dimension)
    return FeatureFiles(
        "features/x@1", files, FeaturesInfo(starts=starts, copy_space=space, hash_version=PcaHash.load().version)
    )


def test_every_row_of_the_manifest_is_measured_in_its_order(tmp_path: Path) -> None:
    store, files = LocalStore(tmp_path / "raw"), LocalStore(tmp_path / "features")
    manifest = raw(store, [5, 9])
    found = features(store, manifest, files)
    tables = pa.concat_tables(
        [found.read(block, pq.read_schema(io.BytesIO(files.read(key))).names) for block, key in enumerate(found.keys)]
    )
    for name in manifest.column_names:
        assert tables[name].to_pylist() == manifest[name].to_pylist(), name
    assert [bool(reason) for reason in tables["reason"].to_pylist()] == [
        name.endswith("/1.png") for name in manifest["source"].to_pylist()
    ]
    row = tables.slice(7, 1).to_pylist()[0]
    pixels = decode(store.read_range(row["shard"], row["offset"], row["length"]), DecodeConfig())
    expected = PcaHash.load().hash(thumbnail_of(pixels)[None])
    assert row["pca_code"] == int(expected.code[0])
    assert row["nsfw"] == pytest.approx(pixels.mean() / 255)
    assert row["faces"] == [{"left": 0.25, "top": 0.0, "right": 0.5, "bottom": 1.0, "score": pytest.approx(0.9)}]
    vectors = read_all(found.vectors("copy"))
    assert len(vectors.rows) == 12
    at = int(np.flatnonzero(vectors.rows == 7)[0])
    np.testing.assert_allclose(vectors.vectors[at], ThumbnailEmbedder()([pixels])[0], atol=1e-3)


def test_a_file_is_the_same_bytes_however_its_images_were_batched_and_whoever_ran_before(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "raw")
    manifest = raw(store, [5, 9])
    first, second = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    features(store, manifest, first, batch_size=2)
    features(store, manifest, second, batch_size=64)
    features(store, manifest, second, batch_size=5)  # again, over what is there
    for entry in first.list("rows/"):
        assert first.read(entry.key) == second.read(entry.key)


def test_the_pool_holds_what_decisions_need_and_numbers_members_one_after_the_other(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "raw")
    manifest = raw(store, [5, 9])
    one = features(store, manifest, LocalStore(tmp_path / "a"))
    two = features(store, manifest.slice(5), LocalStore(tmp_path / "b"), max_images=100)
    pool = Pool((one, two))
    columns = read_columns(pool)
    assert (pool.num_rows, columns.num_rows) == (23, 23)
    ids = [*manifest["id"].to_pylist(), *manifest["id"].to_pylist()[5:]]
    assert [columns.id(row) for row in range(23)] == ids
    assert columns.decoded.sum() == 20
    assert columns.num_faces[0] == 1
    assert np.isnan(columns.nsfw[1])
    rows = np.array([22, 3, 14])
    found = pool.columns_at(rows, ["id", "source"])
    assert found["id"].to_pylist() == [ids[row] for row in rows]
    shown = np.arange(23) % 2 == 0
    masked = pool.vectors("copy", pool.write_masks(LocalStore(tmp_path / "work"), "masks/", shown))
    np.testing.assert_array_equal(read_all(masked).rows, np.flatnonzero(shown & columns.decoded))


def test_quality_prefers_pixels_then_lossless_formats_then_bytes_then_ids(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "raw")
    data = [picture(0), picture(1, 60, 64), picture(2), cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()]
    tar = write_shard([make_shard_image(one, "png", f"{index}.png") for index, one in enumerate(data)])
    store.put("shards/000000.tar", tar)
    columns = read_columns(Pool((features(store, manifest_rows("shards/000000.tar", tar), LocalStore(tmp_path / "f")),)))
    best_first = np.argsort(columns.quality_rank())
    assert best_first[0] == 1
    assert best_first[-1] == 3
    assert list(best_first[1:3]) == sorted([0, 2], key=lambda row: -len(data[row]))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "raw")
    manifest = raw(store, [3])
    data = bytearray(store.read("shards/000000.tar"))
    data[manifest["offset"][0].as_py() + 20] ^= 1
    store.put("shards/000000.tar", bytes(data))
    with pytest.raises(DataError, match=r"0/0\.png in shards/000000\.tar does not match its id"):
        features(store, manifest, LocalStore(tmp_path / "f"))


def test_features_of_other_embedders_are_not_compared(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "raw")
    one = features(store, raw(store, [3]), LocalStore(tmp_path / "f"))
    space = VectorSpace(name="copy", version="abcdefghij", dimension=192)
    other = FeatureFiles("features/y@1", one.files, one.info.model_copy(update={"copy_space": space}))
    with pytest.raises(DataError, match=r"another copy embedder each \(thumbnail 1, 384 wide and copy abcdefgh, 192 wide\)"):
        check_same_spaces([one, other])


def test_a_plan_of_many_rows_is_cut_into_pieces_that_hold_whole_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliostat.curation.features._PIECE_ROWS", 6)
    store = LocalStore(tmp_path / "raw")
    manifest, files = raw(store, [5, 9, 4]), LocalStore(tmp_path / "f")
    tasks = plan_features(manifest, files, "pieces/", max_images=4)
    rows = [read_piece(files, "pieces/", task["piece"]).slice(task["start"], task["stop"] - task["start"]) for task in tasks]
    assert pa.concat_tables(rows).equals(manifest)
    assert [len(set(one["shard"].to_pylist())) for one in rows] == [1] * len(tasks)
    assert len({task["piece"] for task in tasks}) > 1
