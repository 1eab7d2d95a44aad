"""Packing: from any source to shards whose manifest points at the bytes, in both formats, with nothing lost."""

import errno
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.data.packing import (
    Packed,
    Packing,
    ShardFormat,
    group_files,
    index_in_place,
    pack_container,
    pack_files,
    reasons,
)
from heliostat.data.photographs import crops
from heliostat.data.shard_reader import ShardReader, image_runs, read_run
from heliostat.data.sources import Source, SourceFile, open_source
from heliostat.errors import DataError, StorageError
from heliostat.storage import LocalStore, open_store


@pytest.fixture(scope="module")
def pngs() -> list[bytes]:
    import cv2

    return [cv2.imencode(".png", crop.pixels)[1].tobytes() for crop in crops("left", count=2, seed=0)]


@pytest.fixture
def photos(tmp_path: Path, pngs: list[bytes]) -> Path:
    folder = tmp_path / "photos"
    for number, data in enumerate(pngs):
        (folder / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{number % 3}/{number:02d}.png").write_bytes(data)
    (folder / "page.jpg").write_text("<html>")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def pack(source: Source, packing: Packing, store: LocalStore) -> list[Packed]:
    if source.kind == "images":
        groups = group_files(source, packing)
        return [
            pack_files(source.store, [source.files[at] for at in group], number, packing, store.put)
            for number, group in enumerate(groups)
        ]
    return [pack_container(source, file, number, packing, store.put) for number, file in enumerate(source.files)]


def rows_of(packed: list[Packed]) -> pa.Table:
    return pa.concat_tables([one.rows for one in packed])


def check_bytes(rows: pa.Table, read: ShardReader) -> None:
    """Every row points at bytes of its id, one by one, by runs and by whole shards."""
    by_run = []
    for run in image_runs(rows, max_images=7):
        part = rows.slice(run.start, len(run))
        places = list(zip(part["offset"].to_pylist(), part["length"].to_pylist(), strict=True))
        by_run += [hashlib.sha256(data).hexdigest() for data in read_run(read, part["shard"][0].as_py(), places)]
    assert by_run == rows["id"].to_pylist()
    for row in rows.to_pylist():
        data = read(row["shard"], row["offset"], row["length"])
        assert hashlib.sha256(data).hexdigest() == row["id"]
        end = row["offset"] + row["length"]
        assert read.whole(row["shard"])[row["offset"] : end] == read.view(row["shard"])[row["offset"] : end] == data


@pytest.mark.parametrize("shard_format", ["tar", "parquet"])
def test_files_become_shards_that_are_read_by_range(
    photos: Path, store: LocalStore, pngs: list[bytes], shard_format: ShardFormat
) -> None:
    packed = pack(open_source(str(photos)), Packing(images_per_shard=10, format=shard_format), store)
    rows = rows_of(packed)
    assert set(rows["id"].to_pylist()) >= {hashlib.sha256(data).hexdigest() for data in pngs}
    assert [one.rows.num_rows for one in packed] == [10] * ((len(pngs) + 1) // 10) + [(len(pngs) + 1) % 10]
    assert [(one.source, one.reason) for one in packed[-1].rejections] == [("page.jpg", "unknown_format")]
    assert rows["label"].to_pylist()[0] == "class0"
    check_bytes(rows, ShardReader(store))
    again = LocalStore(store.uri + "2")
    pack(open_source(str(photos)), Packing(images_per_shard=10, format=shard_format), again)
    assert [again.read(entry.key) == store.read(entry.key) for entry in store.list()] == [True] * len(packed)


def test_a_parquet_shard_is_a_table_for_everybody(photos: Path, store: LocalStore) -> None:
    (packed,) = pack(open_source(str(photos)), Packing(format="parquet"), store)
    table = pq.read_table(io.BytesIO(store.read("shards/000000.parquet")))
    assert table.column_names == ["id", "bytes", "source", "label", "metadata", "width", "height", "format"]
    for name in ("id", "source", "label", "width", "height", "format"):
        assert table[name].to_pylist() == packed.rows[name].to_pylist()
    assert [hashlib.sha256(data).hexdigest() for data in table["bytes"].to_pylist()] == table["id"].to_pylist()


def test_both_formats_and_both_ways_in_give_the_same_images(photos: Path, tmp_path: Path) -> None:
    ids = []
    for shard_format in ("tar", "parquet"):
        first, second = LocalStore(tmp_path / f"{shard_format}1"), LocalStore(tmp_path / f"{shard_format}2")
        ids.append(rows_of(pack(open_source(str(photos)), Packing(7, format=shard_format), first))["id"].to_pylist())
        again = pack(open_source(first.uri + "/shards"), Packing(5, format="tar"), second)
        assert rows_of(again)["id"].to_pylist()[:20] == ids[0][:20]
        check_bytes(rows_of(again), ShardReader(second))
    assert ids[0] == ids[1]


def test_shards_close_at_a_number_of_bytes() -> None:
    source = Source(LocalStore("/nowhere"), "images", [f"{n}.jpg" for n in range(9)], [10, 10, 10, 25, 1, 1, 50, 2, -1])
    assert [list(group) for group in group_files(source, Packing(4, 30))] == [[0, 1, 2], [3, 4, 5], [6], [7, 8]]
    assert group_files(Source(LocalStore("/nowhere"), "images", [], []), Packing()) == []


def wds_tar(pngs: list[bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, data in enumerate(pngs):
            sidecar = json.dumps({"caption": f"no {number}", "id": number, "ratio": float("nan")}).encode()
            for extension, body in (("png", data), ("json", sidecar), ("cls", b"%d" % (number % 5)), ("npy", b"x")):
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def test_a_tar_is_copied_or_indexed_where_it_lies(tmp_path: Path, store: LocalStore, pngs: list[bytes]) -> None:
    (tmp_path / "a.tar").write_bytes(wds_tar(pngs))
    source = open_source(str(tmp_path / "a.tar"))
    copied = pack_container(source, source.files[0], 3, Packing(images_per_shard=10), store.put)
    in_place = index_in_place(source, source.files[0])
    for packed, read in ((copied, ShardReader(store)), (in_place, ShardReader(LocalStore(tmp_path / "elsewhere")))):
        assert packed.rows["id"].to_pylist() == [hashlib.sha256(data).hexdigest() for data in pngs]
        assert packed.rows["source"].to_pylist()[1] == "a.tar/00001.png"
        assert packed.rows["label"].to_pylist()[6] == "1"
        assert reasons(packed.rejections) == {"not_an_image": len(pngs)}
        assert (packed.account.num_in, packed.account.num_sidecars) == (4 * len(pngs), 2 * len(pngs))
        check_bytes(packed.rows, read)
    assert set(in_place.rows["shard"].to_pylist()) == {str(tmp_path / "a.tar")}
    with tarfile.open(fileobj=io.BytesIO(store.read("shards/000003-0000.tar"))) as tar:
        assert json.loads(tar.extractfile("000000001.json").read())["metadata"]["caption"] == "no 1"  # type: ignore[union-attr]


def test_hugging_face_tables_come_in(tmp_path: Path, store: LocalStore, pngs: list[bytes]) -> None:
    images = [{"bytes": data, "path": None} for data in pngs]
    table = pa.table({"image": images, "label": list(range(len(pngs))), "caption": [f"no {n}" for n in range(len(pngs))]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=9)
    (packed,) = pack(open_source(str(tmp_path / "train.parquet")), Packing(10), store)
    assert packed.rows["id"].to_pylist() == [hashlib.sha256(data).hexdigest() for data in pngs]
    assert packed.rows["label"].to_pylist() == [str(number) for number in range(len(pngs))]
    assert packed.rows["source"].to_pylist()[11] == "train.parquet#11"
    check_bytes(packed.rows, ShardReader(store))


def test_files_that_are_gone_or_no_images_are_accounted_for(tmp_path: Path, store: LocalStore, pngs: list[bytes]) -> None:
    (tmp_path / "a.jpg").write_bytes(pngs[0])
    (tmp_path / "b.dat").write_bytes(pngs[1])
    (tmp_path / "c.dat").write_bytes(b"text")
    files = [SourceFile(name, 1) for name in ("a.jpg", "b.dat", "c.dat", "gone.png")]
    files += [SourceFile("huge.jpg", 2**40), SourceFile("/dev/zero", -1), SourceFile(str(tmp_path / "a.jpg"), -1, "by path")]
    packed = pack_files(LocalStore(tmp_path), files, 0, Packing(), store.put)
    assert packed.rows["source"].to_pylist() == ["a.jpg", "b.dat", str(tmp_path / "a.jpg")]
    assert {one.source: one.reason for one in packed.rejections} == {
        "c.dat": "unknown_format", "gone.png": "missing", "huge.jpg": "too_large", "/dev/zero": "missing",
    }  # fmt: skip


def test_runs_are_bounded_and_cover_every_row() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        num = int(rng.integers(1, 60))
        shards = np.sort(rng.integers(0, 3, num))
        table = pa.table(
            {"shard": [f"s{n}" for n in shards], "offset": rng.integers(0, 500, num), "length": rng.integers(0, 90, num)}
        )
        runs = image_runs(table, max_images=5, max_bytes=200)
        assert [row for run in runs for row in run] == list(range(num))
        for run in runs:
            part = table.slice(run.start, len(run)).to_pylist()
            assert len({row["shard"] for row in part}) == 1
            assert len(part) <= 5
            span = max(row["offset"] + row["length"] for row in part) - part[0]["offset"]
            assert len(part) == 1 or (span <= 200 and part[0]["offset"] == min(row["offset"] for row in part))
    assert image_runs(table.slice(0, 0)) == []


def test_the_reader_takes_keys_and_two_kinds_of_places(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(range(100)))
    read = ShardReader(LocalStore(tmp_path))
    assert read("a.tar", 5, 3) == ShardReader(LocalStore("/nowhere"))(str(tmp_path / "a.tar"), 5, 3) == bytes([5, 6, 7])
    assert (read.size("a.tar"), read.size("b.tar"), bytes(read.view("a.tar")[:2])) == (100, None, b"\0\1")
    with pytest.raises(DataError, match="neither a key nor s3"):
        read("file:///etc/passwd", 0, 1)
    with pytest.raises(StorageError, match="short read"):
        read("a.tar", 90, 20)


@pytest.mark.s3
def test_tars_and_lists_in_a_bucket_are_read_where_they_lie(s3_bucket: str, tmp_path: Path, pngs: list[bytes]) -> None:
    lake = open_store(f"{s3_bucket}/lake")
    lake.put("wds/000000.tar", wds_tar(pngs))
    lake.put("one.png", pngs[0])
    lake.put("list.txt", f"one.png\n{s3_bucket}/lake/one.png\n/etc/passwd\n../escape.png\ngone.png\n".encode())
    source = open_source(f"{s3_bucket}/lake/wds/{{000000..000000}}.tar")
    packed = index_in_place(source, source.files[0])
    assert set(packed.rows["shard"].to_pylist()) == {f"{s3_bucket}/lake/wds/000000.tar"}
    check_bytes(packed.rows, ShardReader(LocalStore(tmp_path)))
    listed = open_source(f"{s3_bucket}/lake/list.txt")
    assert list(listed.keys) == ["one.png", f"{s3_bucket}/lake/one.png", "gone.png"]
    assert [one.reason for one in listed.rejected] == ["bad_entry", "bad_entry"]
    found = pack_files(listed.store, listed.files[:], 0, Packing(), LocalStore(tmp_path).put)
    assert found.rows["id"].to_pylist() == [hashlib.sha256(pngs[0]).hexdigest()] * 2
    assert [one.reason for one in found.rejections] == ["missing"]


def test_a_file_that_the_system_refuses_is_quarantined_and_a_failing_disk_ends_the_run(
    tmp_path: Path, store: LocalStore, pngs: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fine.png").write_bytes(pngs[0])
    (tmp_path / "round.png").symlink_to("round.png")
    (tmp_path / "list.txt").write_text(f"fine.png\nround.png\n{'x' * 300}.png\n")
    source = open_source(str(tmp_path / "list.txt"))
    packed = pack_files(source.store, source.files[:], 0, Packing(), store.put)
    assert packed.rows["source"].to_pylist() == ["fine.png"]
    assert reasons(packed.rejections) == {"unreadable": 2}

    def broken(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        pack_files(source.store, source.files[:], 0, Packing(), store.put)
