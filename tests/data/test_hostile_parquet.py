"""Parquet files that somebody made to do harm: every row is accounted for and memory stays bounded."""

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_tars import PNG, rows_in_a_child

from heliostat.data.parquet_index import ParquetIndex
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_image import ShardImage
from heliostat.data.windows import BytesInMemory


def _parquet(data: bytes | pa.Table, **options: object) -> tuple[list[ShardImage], list[Rejection]]:
    if isinstance(data, pa.Table):
        sink = io.BytesIO()
        pq.write_table(data, sink, **options)
        data = sink.getvalue()
    index = ParquetIndex(BytesInMemory(data), "p.parquet")
    found = list(index.accept())
    index.account.check("p.parquet")
    return [one for one in found if isinstance(one, ShardImage)], [one for one in found if isinstance(one, Rejection)]


IMAGES = pa.table({"image": [{"bytes": PNG, "path": f"{number}.png"} for number in range(8)], "label": list(range(8))})


def _bytes_of(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


PARQUET_CASES: dict[str, tuple[bytes | pa.Table, int, list[str]]] = {
    "Hugging Face's layout": (IMAGES, 8, []),
    "a plain column": (pa.table({"bytes": [PNG, PNG]}), 2, []),
    "a large binary column": (pa.table({"jpg": pa.array([PNG], pa.large_binary())}), 1, []),
    "two columns of one name": (pa.Table.from_arrays([pa.array([PNG])] * 2, ["jpg", "jpg"]), 0, ["damaged_parquet"]),
    "null structs": (pa.table({"image": [{"bytes": PNG, "path": None}, None]}), 1, ["no_image"]),
    "null bytes with a path": (pa.table({"image": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": PNG, "path": "x"}]}), 1,
                               ["no_image"]),
    "empty bytes": (pa.table({"bytes": [b"", PNG]}), 1, ["truncated"]),
    "not an image": (pa.table({"bytes": [b"<html>", PNG]}), 1, ["unknown_format"]),
    "no rows": (IMAGES.slice(0, 0), 0, []),
    "no bytes column": (pa.table({"url": ["http://x"]}), 0, ["damaged_parquet"]),
    "a list of bytes": (pa.table({"image": [[PNG]]}), 0, ["damaged_parquet"]),
    "no Parquet": (b"x" * 4000, 0, ["damaged_parquet"]),
    "nothing": (b"", 0, ["damaged_parquet"]),
    "only the magic": (b"PAR1PAR1", 0, ["damaged_parquet"]),
    "a footer of 4 GB": (b"PAR1" + bytes(100) + b"\xff\xff\xff\xffPAR1", 0, ["damaged_parquet"]),
    "a footer of zero": (b"PAR1" + bytes(100) + bytes(4) + b"PAR1", 0, ["damaged_parquet"]),
    "an encrypted footer": (_bytes_of(IMAGES)[:-4] + b"PARE", 0, ["damaged_parquet"]),
    "a path that climbs": (pa.table({"image": [{"bytes": PNG, "path": "../../etc/passwd"}]}), 1, []),
    "a path of a million": (pa.table({"image": [{"bytes": PNG, "path": "x" * 10**6}]}), 1, []),
    "labels of bytes": (pa.table({"image": [PNG], "label": [b"\xff"]}), 1, []),
    "labels that are lists": (pa.table({"bytes": [PNG], "label": [[1, 2]]}), 1, []),
    "a huge caption": (pa.table({"bytes": [PNG], "caption": ["é" * 10**6]}), 1, []),
    "two thousand columns": (pa.table({f"c{number}": [PNG] for number in range(2000)}), 0, ["damaged_parquet"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PARQUET_CASES)
def test_every_row_of_a_hostile_parquet_file_is_accounted_for(name: str) -> None:
    data, num_images, reasons = PARQUET_CASES[name]
    images, rejections = _parquet(data)
    assert len(images) == num_images
    assert [one.reason for one in rejections] == reasons
    assert all(len(image.label or "") < 2**15 and len(str(image.metadata)) < 2**16 for image in images)


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_three_hundred_mutated_parquet_files_are_accounted_for(compression: str) -> None:
    rng, data = random.Random(1), _bytes_of(IMAGES, compression=compression, row_group_size=3)
    for _ in range(100):
        block = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            block[rng.randrange(len(block))] = rng.randrange(256)
        images, rejections = _parquet(bytes(block[: rng.choice((len(block), len(block), rng.randrange(len(block)))) or 1]))
        assert len(images) <= 8 + 8
        assert rejections or len(images) == 8


def test_small_files_that_claim_to_be_large_cost_no_memory(tmp_path: Path) -> None:
    image = PNG + bytes(30 * 2**20)
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([image]))
    few = [image[:-number] for number in range(1, 6)]
    bombs = {
        "dictionary": (pa.table({"bytes": many}), {"use_dictionary": True}),
        "plain": (pa.table({"bytes": many}), {"use_dictionary": True, "store_schema": False}),
        "zstd": (pa.table({"bytes": few}), {"use_dictionary": False}),
    }
    for name, (table, options) in bombs.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, dictionary_pagesize_limit=2**30, compression="zstd", **options)
        assert path.stat().st_size < 2**20
        grown, rows, rejections = rows_in_a_child(path)
        assert rejections >= 1
        assert rows < 40
        assert grown < 500, name


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["1", None], pa.string()),
        pa.array(["1", None], pa.large_string()),
        pa.array(["1", None], pa.string_view()),
        pa.array(["1", None]).dictionary_encode(),
        pa.array([1, None]).dictionary_encode(),
        pa.array([1.0, None]),
    ],
    ids=lambda labels: str(labels.type)[:20],
)
def test_labels_come_in_whatever_library_wrote_them(labels: pa.Array) -> None:
    """Polars writes large strings, pandas dictionaries for categories and floats for integers with gaps."""
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        images, rejections = _parquet(pa.table({"image": pa.array([PNG, PNG], kind), "label": labels}))
        assert [image.label for image in images] == ["1", None]
        assert not rejections


def test_paths_inside_a_struct_come_in_as_large_strings_too() -> None:
    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    images, _ = _parquet(pa.table({"image": pa.array([{"bytes": PNG, "path": "a/1.png"}], kind)}))
    assert images[0].metadata == {"path": "a/1.png"}


def test_all_rows_of_a_damaged_group_are_counted() -> None:
    data = bytearray(_bytes_of(IMAGES, compression="none", row_group_size=4, use_dictionary=False))
    data[4:40] = bytes(36)  # the header of the first page
    index = ParquetIndex(BytesInMemory(bytes(data)), "hurt.parquet")
    found = list(index.accept())
    rejections = [one for one in found if isinstance(one, Rejection)]
    assert [(one.reason, one.offset, one.length) for one in rejections] == [("damaged_parquet", 0, 4)]
    assert (index.account.num_in, index.account.num_images, index.account.num_rejected) == (8, 4, 4)
