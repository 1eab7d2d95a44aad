"""Reads a ledger: one row among 10^9 by two small range reads, or all of them file by file."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.curation.ledger import (
    DROPPED,
    FORGOTTEN,
    LEDGER_INDEX,
    MIN_ID_PREFIX,
    SCHEMA,
    FunnelStep,
    StageCount,
    make_funnel,
)
from heliostat.curation.ledger_keys import hash_strings, part_of
from heliostat.curation.ledger_write import Parts, file_key
from heliostat.data.windows import BytesFile, BytesOfObject
from heliostat.errors import DataError, ObjectNotFoundError
from heliostat.storage import Store, one_line_if_damaged, read_parquet

_WINDOW_BYTES = 2**16  # of a range read: footers and column chunks are larger, everything between is not worth a request
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Ledger:
    """A ledger in a store. parts: how its files divide the rows. settings: thresholds that were in force, by name."""

    files: Store
    parts: Parts
    num_rows: int
    stages: tuple[StageCount, ...]
    settings: Mapping[str, float | None]
    forgotten: Mapping[str, int]
    """Rows that were forgotten after the ledger was written, by "stage/reason" that they had, or "" if they were kept."""

    def find(self, id_or_source: str) -> pa.Table:
        """The rows of an image, one per file of it: by its whole id, by 8 or more first digits, or by a source.

        Raises DataError when nothing matches, or more than one id for first digits.
        """
        is_id = MIN_ID_PREFIX <= len(id_or_source) <= 64 and set(id_or_source) <= _HEX
        found = self._by_id(id_or_source) if is_id else SCHEMA.empty_table()
        if found.num_rows == 0:
            found = self._by_source(id_or_source)
        if found.num_rows == 0:
            raise DataError(f"no image with id or source {id_or_source[:200]!r} among the {self.num_rows} rows of this ledger")
        if is_id and (count := pc.count_distinct(found["id"], mode="only_valid").as_py()) > 1:
            raise DataError(f"{id_or_source} begins {count} ids; give more digits")
        return found

    def _by_id(self, prefix: str) -> pa.Table:
        head = np.array([int(prefix[:16].ljust(16, "0"), 16)], np.uint64)
        number = int(part_of(head, self.parts.ids)[0])
        return self._read(number, "id", prefix, prefix + "g", pc.starts_with(pc.field("id"), prefix))

    def _by_source(self, source: str) -> pa.Table:
        digest = hash_strings(pa.array([source]))
        key = file_key("sources", int(part_of(digest, self.parts.sources)[0]))
        wanted = int(digest[0])
        pairs = _read_groups(self.files, key, "hash", wanted, wanted).filter(pc.field("hash") == pa.scalar(wanted, pa.uint64()))
        tables = [SCHEMA.empty_table()]
        same = pc.field("source") == source
        for head in pairs["head"].unique().to_pylist():
            if head is None:
                number = self.parts.ids + int(part_of(digest, self.parts.outside)[0])
                tables.append(self._read(number, "source", source, source, same))
            else:
                number = int(part_of(np.array([head], np.uint64), self.parts.ids)[0])
                prefix = f"{head:016x}"
                its_own = pc.starts_with(pc.field("id"), prefix) & same  # a row group holds other images of this source too
                tables.append(self._read(number, "id", prefix, prefix + "g", its_own))
        return pa.concat_tables(tables)

    def _read(self, number: int, column: str, low: str, high: str, condition: pc.Expression) -> pa.Table:
        return _read_groups(self.files, file_key("rows", number), column, low, high).filter(condition)

    def rows(self, columns: Sequence[str] | None = None, filters: pc.Expression | None = None) -> Iterator[pa.Table]:
        """All rows, file by file in the order of the ids, those without an image last. filters: an Arrow expression."""
        for key in self.keys:
            yield read_parquet(self.files, key, columns, filters=filters)

    @property
    def keys(self) -> list[str]:
        """The files that hold the rows."""
        return [file_key("rows", number) for number in range(self.parts.ids + self.parts.outside)]

    def funnel(self) -> list[FunnelStep]:
        """The funnel, counted again from the rows. Raises DataError when they are not what the stages counted.

        Rows that were forgotten since count where they stood before.
        """
        kept, drops = self.forgotten.get("", 0), Counter[tuple[str, str]]()
        for cause, count in self.forgotten.items():
            if cause:
                stage, _, reason = cause.partition("/")
                drops[stage, reason] += count
        for table in self.rows(["decision", "stage", "reason"]):
            for row in table.group_by(["decision", "stage", "reason"]).aggregate([([], "count_all")]).to_pylist():
                if row["decision"] == DROPPED:
                    drops[row["stage"], row["reason"]] += row["count_all"]
                elif row["decision"] != FORGOTTEN:
                    kept += row["count_all"]
        return make_funnel(self.stages, drops, kept)


def _read_groups(files: Store, key: str, column: str, low: Any, high: Any) -> pa.Table:
    """The row groups of a file whose `column` may hold values from low to high, by their statistics."""
    num_bytes = files.size(key)
    if num_bytes is None:
        raise ObjectNotFoundError(f"no object {key} in {files.uri}; the ledger is not complete")
    source = pa.PythonFile(BytesFile(BytesOfObject(files, key, num_bytes, _WINDOW_BYTES)), mode="r")
    with one_line_if_damaged(files, key):
        file = pq.ParquetFile(source, page_checksum_verification=True)
        position = file.schema_arrow.get_field_index(column)
        groups = []
        for number in range(file.metadata.num_row_groups):
            known = file.metadata.row_group(number).column(position).statistics
            if known is None or not known.has_min_max or (known.min <= high and known.max >= low):
                groups.append(number)
        return file.read_row_groups(groups)


def open_ledger(files: Store) -> Ledger:
    """The ledger of a curated artifact. Raises DataError when there is none or its index is not one of ours."""
    try:
        index = json.loads(files.read(LEDGER_INDEX))
        return Ledger(
            files,
            Parts(**index["parts"]),
            index["num_rows"],
            tuple(StageCount(*count) for count in index["stages"]),
            index["settings"],
            index["forgotten"],
        )
    except ObjectNotFoundError as error:
        raise DataError(f"{files.uri} has no ledger ({LEDGER_INDEX}); only a curated artifact keeps one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{files.uri}/{LEDGER_INDEX} is not the index of a ledger; curate again") from error
