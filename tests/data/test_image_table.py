"""The arrays of a manifest say of every row what the manifest says."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from heliostat.data.image_table import image_table
from heliostat.data.shards import MANIFEST_SCHEMA
from heliostat.errors import DataError


def manifest(rows: list[tuple[str, int, int]], ids: list[str] | None = None) -> pa.Table:
    names = ids or [hashlib.sha256(str(number).encode()).hexdigest() for number in range(len(rows))]
    plain = {"width": 1, "height": 1, "format": "png", "source": "s", "label": None}
    return pa.Table.from_pylist(
        [
            {"id": identity, "shard": shard, "offset": offset, "length": length} | plain
            for identity, (shard, offset, length) in zip(names, rows, strict=True)
        ],
        schema=MANIFEST_SCHEMA,
    )


def test_rows_keep_their_order_and_shards_their_neighbours() -> None:
    rows = [("b", 0, 10), ("b", 20, 5), ("a", 0, 7), ("c", 3, 3), ("c", 30, 9)]
    table = image_table(manifest(rows))
    assert table.shards == ("b", "a", "c")
    assert table.first.tolist() == [0, 2, 3, 5]
    assert table.counts.tolist() == [2, 1, 2]
    assert table.shard_bytes.tolist() == [25, 7, 39]
    assert [(table.shard(row), int(table.offset[row]), int(table.length[row])) for row in range(5)] == rows
    assert table.shard_of(np.arange(5)).tolist() == [0, 0, 1, 2, 2]
    assert table.id(3) == hashlib.sha256(b"3").hexdigest()


def test_scattered_rows_are_brought_together() -> None:
    rows = [("a", 0, 1), ("b", 0, 2), ("a", 1, 3), ("b", 2, 4)]
    table = image_table(pa.concat_tables([manifest(rows[:2]), manifest(rows[2:])]))
    assert [(table.shard(row), int(table.length[row])) for row in range(4)] == [("a", 1), ("a", 3), ("b", 2), ("b", 4)]


def test_an_empty_manifest_is_an_empty_table() -> None:
    table = image_table(MANIFEST_SCHEMA.empty_table())
    assert (table.num_images, table.shards) == (0, ())


@pytest.mark.parametrize("identity", ["short", "z" * 64])
def test_an_id_that_is_no_sha256_is_refused(identity: str) -> None:
    with pytest.raises(DataError, match="ids of the manifest"):
        image_table(manifest([("a", 0, 1)], [identity]))
