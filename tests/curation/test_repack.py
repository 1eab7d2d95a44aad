"""Kept images become shards: their own bytes, read with few requests, and faces blurred where there are some."""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from made_features import made_features

from heliostat.curation.face_blur import blur_faces
from heliostat.curation.features import FACES
from heliostat.curation.features_config import FaceBlurConfig
from heliostat.curation.pool import FeatureFiles, Pool
from heliostat.curation.repack import PLAN_COLUMNS, RepackPlan, RepackShard, ShardSize, first_seen, has_faces_to_blur
from heliostat.curation.tasks import run_serially
from heliostat.data.manifest import join_manifests, manifest_from_bytes
from heliostat.data.shard_image import image_id
from heliostat.data.shards import make_shard_image, manifest_rows, read_shard, write_shard
from heliostat.errors import DataError
from heliostat.storage import LocalStore

FIVE = ShardSize(5, 2**30)


@dataclass
class CountingStore:
    """Another store, with the range reads that were asked of it."""

    inner: LocalStore
    reads: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return self.inner.uri

    def read_range(self, key: str, start: int, num_bytes: int) -> bytes:
        self.reads.append((key, start, num_bytes))
        return self.inner.read_range(key, start, num_bytes)


def picture(seed: int, side: int = 32) -> bytes:
    """A noisy picture; the odd ones are JPEGs."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), np.uint8)
    return cv2.imencode(".jpg" if seed % 2 else ".png", pixels)[1].tobytes()


def raw(store: LocalStore, sizes: list[int], *, first: int = 0, side: int = 32) -> pa.Table:
    """Shards of so many pictures; returns the rows of a plan, without faces. One image in three has a label."""
    tables, seed = [], first
    for number, size in enumerate(sizes):
        images = []
        for _ in range(size):
            suffix = "jpg" if seed % 2 else "png"
            images.append(
                make_shard_image(picture(seed, side), suffix, f"{seed}.{suffix}", label=None if seed % 3 else "third")
            )
            seed += 1
        tar = write_shard(images)
        store.put(f"shards/{number:06d}.tar", tar)
        tables.append(manifest_rows(f"shards/{number:06d}.tar", tar))
    rows = join_manifests(tables)
    return rows.append_column("faces", pa.nulls(rows.num_rows, FACES)).select(PLAN_COLUMNS)


def with_faces(rows: pa.Table, faces: dict[int, list[tuple[float, ...]]]) -> pa.Table:
    """faces: by row, (left, top, right, bottom, score); an empty list for the others, as a detector that found nothing."""
    names = ("left", "top", "right", "bottom", "score")
    lists = [[dict(zip(names, face, strict=True)) for face in faces.get(row, [])] for row in range(rows.num_rows)]
    return rows.set_column(rows.column_names.index("faces"), "faces", pa.array(lists, FACES))


def pack(
    files: LocalStore,
    raws: list[LocalStore | CountingStore],
    added: list[tuple[int, pa.Table]],
    *,
    size: ShardSize = FIVE,
    faces: FaceBlurConfig | None = None,
) -> list[dict]:
    """Plan and write everything; returns the results of the tasks."""
    plan = RepackPlan(files, "plan/", size)
    for number, rows in added:
        plan.add(number, rows)
    function = RepackShard(tuple(raws), files, "plan/", "rows/", faces)
    return [dict(function(task)) for task in plan.finish()]


def contents(files: LocalStore) -> dict[str, bytes]:
    return {entry.key: files.read(entry.key) for entry in files.list()}


def packed(files: LocalStore) -> list:
    """All images in the order of the shards."""
    return [image for entry in files.list("shards/") for image in read_shard(files.read(entry.key))]


def test_every_kept_image_arrives_with_its_own_bytes_in_the_order_of_the_pool(tmp_path: Path) -> None:
    one, two, files = (LocalStore(tmp_path / name) for name in ("one", "two", "files"))
    rows, more = raw(one, [4, 7]), raw(two, [5], first=100)
    kept = rows.take(pa.array([0, 2, 3, 5, 9, 10]))
    results = pack(files, [one, two], [(0, kept), (1, more.slice(1, 3))])
    found = packed(files)
    expected = [*kept["id"].to_pylist(), *more["id"].to_pylist()[1:4]]
    assert [image.id for image in found] == expected
    assert [image_id(image.data) for image in found] == expected
    assert [image.source for image in found] == [*kept["source"].to_pylist(), *more["source"].to_pylist()[1:4]]
    assert [image.label for image in found] == [*kept["label"].to_pylist(), *more["label"].to_pylist()[1:4]]
    assert [image.data for image in found[:2]] == [picture(0), picture(2)]
    assert [(result["images"], result["faces_blurred"]) for result in results] == [(5, 0), (4, 0)]
    manifest = join_manifests([manifest_from_bytes(files.read(entry.key)) for entry in files.list("rows/")])
    assert manifest["id"].to_pylist() == expected
    for row, image in zip(manifest.to_pylist(), found, strict=True):
        assert files.read_range(row["shard"], row["offset"], row["length"]) == image.data
    for result in results:
        assert result["file"]["num_bytes"] == files.size(result["key"])


@pytest.mark.parametrize(("images", "share"), [(4, 100.0), (1000, 2.5), (3, 2.5), (1000, 0.1)])
def test_a_shard_ends_at_either_limit_and_one_image_may_exceed_the_second(tmp_path: Path, images: int, share: float) -> None:
    store, files = LocalStore(tmp_path / "raw"), LocalStore(tmp_path / "files")
    rows = raw(store, [9, 8])
    lengths = rows["length"].to_pylist()
    limit = int(share * max(lengths))
    pack(files, [store], [(0, rows)], size=ShardSize(images, limit))
    expected, inside = [0], 0  # one image after the other
    for length in lengths:
        if expected[-1] and (expected[-1] == images or inside + length > limit):
            expected.append(0)
            inside = 0
        expected[-1] += 1
        inside += length
    assert [len(list(read_shard(files.read(entry.key)))) for entry in files.list("shards/")] == expected


def test_a_plan_that_comes_in_pieces_is_the_plan_of_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "raw")
    rows = raw(store, [9, 8, 6])
    whole, pieces, small = (LocalStore(tmp_path / name) for name in ("whole", "pieces", "small"))
    pack(whole, [store], [(0, rows)])
    parts = [(0, rows.slice(start, stop - start)) for start, stop in ((0, 1), (1, 1), (1, 8), (8, 20), (20, 23))]
    pack(pieces, [store], parts)
    monkeypatch.setattr("heliostat.curation.repack._PIECE_ROWS", 7)
    pack(small, [store], parts)
    assert len(list(small.list("plan/"))) > 1
    for files in (pieces, small):
        for prefix in ("shards/", "rows/"):
            assert {entry.key: files.read(entry.key) for entry in files.list(prefix)} == {
                entry.key: whole.read(entry.key) for entry in whole.list(prefix)
            }


def test_neighbours_come_by_one_request_and_what_lies_far_apart_by_several(tmp_path: Path) -> None:
    inner, files = LocalStore(tmp_path / "raw"), LocalStore(tmp_path / "files")
    rows = raw(inner, [8, 3], side=400)  # noise of 400 x 408: about 490 kB as PNG
    lengths, offsets = rows["length"].to_pylist(), rows["offset"].to_pylist()
    assert min(length for row, length in enumerate(lengths) if row % 2 == 0) > 2**18
    store = CountingStore(inner)
    # 0 1: neighbours. 3: between lies 2, a large PNG. 4 5 7: between 5 and 7 lies 6. Then another shard.
    kept = rows.take(pa.array([0, 1, 3, 4, 5, 7, 8, 9]))
    pack(files, [store], [(0, kept)], size=ShardSize(100, 2**30))
    assert store.reads == [
        ("shards/000000.tar", offsets[0], offsets[1] + lengths[1] - offsets[0]),
        ("shards/000000.tar", offsets[3], offsets[5] + lengths[5] - offsets[3]),
        ("shards/000000.tar", offsets[7], lengths[7]),
        ("shards/000001.tar", offsets[8], offsets[9] + lengths[9] - offsets[8]),
    ]
    # A small one between two others is read along.
    store.reads.clear()
    small = raw(LocalStore(tmp_path / "small"), [9])
    pack(LocalStore(tmp_path / "f"), [CountingStore(LocalStore(tmp_path / "small"), store.reads)], [(0, small.take([0, 2, 8]))])
    assert len(store.reads) == 1


def test_faces_are_blurred_where_they_were_found_and_nothing_else_changes(tmp_path: Path) -> None:
    store, files, plain = (LocalStore(tmp_path / name) for name in ("raw", "files", "plain"))
    config = FaceBlurConfig(min_face_score=0.5)
    rows = with_faces(
        raw(store, [6]),
        {
            1: [(0.25, 0.0, 0.75, 0.5, 0.9)],
            2: [(0.1, 0.1, 0.3, 0.3, 0.4)],
            4: [(0.0, 0.0, 0.5, 0.5, 0.6), (0.5, 0.5, 1, 1, 0.1)],
        },
    )
    results = pack(files, [store], [(0, rows)], size=ShardSize(100, 2**30), faces=config)
    pack(plain, [store], [(0, rows)], size=ShardSize(100, 2**30))
    found, untouched = packed(files), packed(plain)
    assert [image.data for image in untouched] == [picture(seed) for seed in range(6)]
    assert [row for row in range(6) if found[row].data != untouched[row].data] == [1, 4]
    for row, boxes in {1: [[10, 0, 30, 16, 0.9]], 4: [[0, 0, 20, 16, 0.6], [20, 16, 40, 32, 0.1]]}.items():
        assert found[row].data == blur_faces(picture(row), np.array(boxes, np.float32), config)
        assert found[row].id == image_id(found[row].data)
        assert found[row].source == untouched[row].source
    assert results[0]["faces_blurred"] == 2


def test_what_the_ledger_calls_blurred_is_what_is_blurred(tmp_path: Path) -> None:
    faces = {
        0: [(0.2, 0.2, 0.4, 0.4, 0.5)],
        2: [(0.2, 0.2, 0.4, 0.4, 0.49)],
        3: [(0.4, 0.2, 0.4, 0.4, 0.9)],
        8: [(0, 0, 1, 1, 1)],
    }
    made = made_features(LocalStore(tmp_path / "f"), np.eye(64)[:10], undecodable=[5], rows_per_file=4)

    class WithFaces(FeatureFiles):
        def read(self, block, columns):
            table = super().read(block, columns)
            start = self.info.starts[block]
            return with_faces(table, {row - start: found for row, found in faces.items()})

    pool = Pool((WithFaces(made.name, made.files, made.info), made))
    found = has_faces_to_blur(pool, FaceBlurConfig(min_face_score=0.5))
    assert np.flatnonzero(found).tolist() == [0, 8]
    assert len(found) == 20


@pytest.mark.parametrize(("num_ids", "num_known"), [(0, 3), (3, 0), (1, 1), (60, 40)])
def test_an_image_that_joins_as_it_is_joins_once_and_not_beside_itself(num_ids: int, num_known: int) -> None:
    generator = np.random.default_rng(num_ids)
    few = generator.integers(0, 256, (30, 32)).astype(np.uint8)
    few[:10] = 0
    few[:10, 31] = np.arange(10)  # ids that differ in their last byte alone
    few[5:10, :31], few[5:10, 31] = 255, 0  # and some that end in a zero
    few[5:10, 0] = np.arange(5)
    ids, known = (few[generator.integers(0, 30, count)] for count in (num_ids, num_known))
    seen, expected = {bytes(one) for one in known}, []
    for one in ids:
        expected.append(bytes(one) not in seen)
        seen.add(bytes(one))
    assert first_seen(ids, known).tolist() == expected


def test_a_damaged_raw_shard_is_named_with_the_image(tmp_path: Path) -> None:
    store, files = LocalStore(tmp_path / "raw"), LocalStore(tmp_path / "files")
    rows = raw(store, [3, 3])
    data = bytearray(store.read("shards/000001.tar"))
    data[rows["offset"][4].as_py() + 30] ^= 1
    store.put("shards/000001.tar", bytes(data))
    with pytest.raises(DataError) as error:
        pack(files, [store], [(0, rows)])
    identity = rows["id"][4].as_py()[:12]
    assert str(error.value) == (f"4.png in shards/000001.tar does not match its id {identity}; the raw shard is damaged")
    assert not list(files.list("shards/"))


def test_a_resumed_plan_names_the_same_tasks_and_leaves_finished_pieces_alone(tmp_path: Path) -> None:
    store, files = LocalStore(tmp_path / "raw"), LocalStore(tmp_path / "files")
    rows = raw(store, [9, 8])
    pack(files, [store], [(0, rows)])
    before = contents(files)

    class NoWrites(LocalStore):
        def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
            raise AssertionError(f"{key} is there already")

    plan = RepackPlan(NoWrites(tmp_path / "files"), "plan/", ShardSize(5, 2**30))
    plan.add(0, rows)
    tasks = plan.finish()
    assert [task["stop"] - task["start"] for task in tasks] == [5, 5, 5, 2]
    # A task that is done again, as after a crash between its two writes, leaves the same bytes.
    files.delete("rows/000002.parquet")
    list(run_serially(RepackShard((store,), files, "plan/", "rows/", None), tasks[2:3], label="packing"))
    assert contents(files) == before


def test_names_that_end_in_no_image_suffix_get_that_of_their_format(tmp_path: Path) -> None:
    store, files = LocalStore(tmp_path / "raw"), LocalStore(tmp_path / "files")
    rows = raw(store, [3])
    names = ["https://example.org/a?b=c", "table.parquet#17", "photo.JPEG"]
    rows = rows.set_column(rows.column_names.index("source"), "source", pa.array(names))
    pack(files, [store], [(0, rows)])
    assert [image.source for image in packed(files)] == names
    assert [image.extension for image in packed(files)] == ["png", "jpg", "jpeg"]


def test_nothing_to_keep_makes_no_task(tmp_path: Path) -> None:
    plan = RepackPlan(LocalStore(tmp_path), "plan/", ShardSize(5, 2**30))
    assert plan.finish() == []
    plan = RepackPlan(LocalStore(tmp_path), "plan/", ShardSize(5, 2**30))
    plan.add(0, raw(LocalStore(tmp_path / "raw"), [2]).slice(0, 0))
    assert plan.finish() == []
