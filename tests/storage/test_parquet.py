"""Tables that are torn, or in which a bit has flipped, are found when they are read."""

import numpy as np
import pyarrow as pa
import pytest

from heliostat.errors import ObjectNotFoundError, StorageError
from heliostat.storage import LocalStore, read_parquet, to_parquet

ROWS = 2_000


@pytest.fixture
def table() -> pa.Table:
    values = np.random.default_rng(0).integers(0, 256, (ROWS, 16), np.uint8)
    return pa.table(
        {"vector": pa.array([bytes(row) for row in values], pa.binary()), "name": [f"{row}.png" for row in range(ROWS)]}
    )


def test_what_was_written_is_read_with_its_columns(tmp_path, table) -> None:
    files = LocalStore(tmp_path)
    files.put("a.parquet", to_parquet(table))
    assert read_parquet(files, "a.parquet") == table
    assert read_parquet(files, "a.parquet", ["name"]) == table.select(["name"])
    assert to_parquet(table) == to_parquet(table)
    with pytest.raises(ObjectNotFoundError):
        read_parquet(files, "b.parquet")


def test_a_torn_table_is_named_with_what_to_do(tmp_path, table) -> None:
    files = LocalStore(tmp_path)
    for length in (0, 3, 100, 20_000):
        files.put("a.parquet", to_parquet(table)[:length])
        with pytest.raises(StorageError, match=r"a\.parquet is damaged \(.*\); run dedup again$") as error:
            read_parquet(files, "a.parquet", fix="run dedup again")
        assert "\n" not in str(error.value)


def test_every_flipped_bit_in_the_rows_is_found(tmp_path, table) -> None:
    """Bytes past the rows are the footer and its magic; Parquet has no checksum for these."""
    whole, generator = to_parquet(table), np.random.default_rng(1)
    files, end = LocalStore(tmp_path), len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    for _ in range(300):
        torn = bytearray(whole)
        torn[generator.integers(0, end)] ^= 1 << int(generator.integers(8))
        files.put("a.parquet", bytes(torn))
        try:
            found = read_parquet(files, "a.parquet")
        except StorageError:
            continue
        assert found == table, "a flip that changes the rows was not found"
