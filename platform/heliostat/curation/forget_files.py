"""How images are taken out of the files of an artifact: out of tars in place, out of Parquet shards, tables, JSON and pages.

Every function maps the bytes of a file to those it should have. Done twice it changes nothing more, so that an interrupted run
is finished by running it again.
"""

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from heliostat.curation.forget_list import hosts_of, in_domain
from heliostat.curation.ledger import FORGOTTEN, LEDGER, LEDGER_SOURCES
from heliostat.curation.ledger_keys import hash_strings
from heliostat.curation.ledger_write import ledger_bytes
from heliostat.data.parquet_shards import SHARD_SCHEMA, lay_parquet
from heliostat.data.shard_image import EXTENSION_OF_FORMAT, ShardImage
from heliostat.data.tar_walk import BLOCK, PLAIN, walk
from heliostat.data.windows import BytesInMemory
from heliostat.errors import DataError
from heliostat.storage import from_parquet

# Shapes: n rows of a table.

BLANK_JSON = "(forgotten)"
_SOURCE_COLUMNS = ("source", "url", "final_url")
_KEPT_COLUMNS = frozenset({"id", "row"})
_REMOVED = ".forgotten"
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Wanted:
    """What an artifact must not hold any longer. domain: "" when none was named."""

    ids: frozenset[str]
    sources: frozenset[str]
    domain: str = ""

    @cached_property
    def urls(self) -> tuple[str, ...]:
        """Sources that are URLs and do not hold the domain, which is looked for anyway."""
        return tuple(sorted(name for name in self.sources if "://" in name and not self.names_domain(name)))

    def names_domain(self, text: str) -> bool:
        """Whether a text holds the domain, not as a part of a longer word."""
        pattern = rf"(?<![\w-]){re.escape(self.domain)}(?![\w-])"
        return bool(self.domain) and re.search(pattern, text.lower()) is not None

    def rows(self, table: pa.Table) -> NDArray[np.bool_]:
        """bool (n,): rows of a table that hold one of the images, by its id, source, url and final_url."""
        found = np.zeros(table.num_rows, np.bool_)
        for name in ("id", *_SOURCE_COLUMNS):
            if name not in table.column_names or not pa.types.is_string(table.schema.field(name).type):
                continue
            known = pa.array(sorted(self.ids if name == "id" else self.sources), pa.string())
            found |= np.asarray(pc.is_in(table[name], known).to_numpy(), np.bool_)
            if self.domain and name != "id":
                found |= in_domain(hosts_of(table[name]), self.domain)
        return found


def zero_in_tar(data: bytes, offsets: Sequence[int]) -> bytes:
    """A tar of ours in which the images at `offsets` and their sidecars are zeros under a name that is no image's.

    Offsets of all others stay, and so does the length. Raises DataError when no image is there.
    """
    members = [member for member in walk(BytesInMemory(data)) if member.kind == PLAIN]
    place = {member.offset: member for member in members}
    out = bytearray(data)
    for offset in offsets:
        if offset not in place:
            raise DataError(f"no image begins at byte {offset} of the shard; is its manifest another one's?")
        stem = place[offset].name.partition(".")[0]
        for member in members:
            if member.name.partition(".")[0] == stem:
                _rename(out, member.offset - BLOCK, f"{member.name.removesuffix(_REMOVED)}{_REMOVED}")
                out[member.offset : member.offset + member.length] = bytes(member.length)
    return bytes(out)


def _rename(tar: bytearray, header: int, name: str) -> None:
    """Put another name into a header, and its checksum: six octal digits, a zero and a space."""
    encoded = name.encode()
    if len(encoded) > 100:
        raise DataError(f"the member {name[:80]!r} has too long a name to be marked; write the shard again")
    tar[header : header + 100] = encoded.ljust(100, b"\0")
    tar[header + 148 : header + 156] = b" " * 8
    tar[header + 148 : header + 156] = b"%06o\0 " % sum(tar[header : header + BLOCK])


def drop_from_parquet_shard(data: bytes, ids: frozenset[str]) -> tuple[bytes, dict[str, int]]:
    """A Parquet shard of ours without some images, and the offset of every other one by its id.

    Its values are compressed, so nothing can be overwritten in place: what is left is laid anew.
    """
    table = pq.read_table(io.BytesIO(data)).cast(SHARD_SCHEMA)
    images = [
        ShardImage(
            row["id"],
            row["bytes"],
            EXTENSION_OF_FORMAT.get(row["format"], "jpg"),
            row["source"],
            row["label"],
            json.loads(row["metadata"]),
        )
        for row in table.filter(pc.invert(pc.is_in(table["id"], pa.array(sorted(ids), pa.string())))).to_pylist()
    ]
    laid, offsets = lay_parquet(images)
    return laid, {image.id: offset for image, offset in zip(images, offsets, strict=True)}


@dataclass(frozen=True)
class Moves:
    """Shards that were laid anew: old key -> new key, and where in it each image lies now, by id."""

    keys: Mapping[str, str]
    offsets: Mapping[str, Mapping[str, int]]

    def apply(self, table: pa.Table) -> pa.Table:
        """The table with new shards and offsets; rows of other shards, and ids that did not move, stay as they are."""
        if not self.keys or not {"id", "shard", "offset"} <= set(table.column_names):
            return table
        moved = np.flatnonzero(pc.fill_null(pc.is_in(table["shard"], pa.array(sorted(self.keys))), False).to_numpy())
        shards, offsets = table["shard"].to_pylist(), table["offset"].to_pylist()
        ids = table["id"].to_pylist()
        for row in moved.tolist():
            place = self.offsets[shards[row]].get(ids[row])
            if place is not None:
                shards[row], offsets[row] = self.keys[shards[row]], place
        for name, values in (("shard", shards), ("offset", offsets)):
            index = table.schema.get_field_index(name)
            table = table.set_column(index, table.schema.field(name), pa.array(values, table.schema.field(name).type))
        return table


def drop_rows(data: bytes, wanted: Wanted, moves: Moves) -> bytes:
    """A manifest or a list of rejections without the rows of the images."""
    table = from_parquet(data)
    left = moves.apply(table.filter(pa.array(~wanted.rows(table))))
    return data if left.equals(table) else _written(left)


def blank_rows(data: bytes, wanted: Wanted, moves: Moves) -> bytes:
    """A table that keeps its rows, and of the images' rows nothing but the id: what may be null is, texts are empty."""
    table = from_parquet(data)
    rows = wanted.rows(table)
    blank = moves.apply(table)
    if rows.any():
        arrays = [_blanked(blank[one.name], one, rows) for one in blank.schema]
        blank = pa.table(arrays, schema=blank.schema)
    return data if blank.equals(table) else _written(blank)


def _blanked(column: pa.ChunkedArray, field: pa.Field, rows: NDArray[np.bool_]) -> pa.ChunkedArray:
    mask = pa.array(rows)
    if field.name in _KEPT_COLUMNS or (not field.nullable and not pa.types.is_string(field.type)):
        return column
    if field.name in ("decision", "status", "reason") and (not field.nullable or field.name == "decision"):
        return pc.if_else(mask, FORGOTTEN, column)
    if not field.nullable:
        return pc.if_else(mask, "", column)
    return column.combine_chunks().take(pa.array(np.arange(len(column)), mask=rows))


def _written(table: pa.Table) -> bytes:
    return ledger_bytes(table.combine_chunks())


def drop_sources(data: bytes, hashes: NDArray[np.uint64]) -> bytes:
    """A file of `ledger_sources/` without the hashes of the sources."""
    table = from_parquet(data)
    left = table.filter(pa.array(~np.isin(table["hash"].to_numpy(), hashes)))
    return data if left.num_rows == table.num_rows else _written(left)


def blank_json(data: bytes, wanted: Wanted) -> bytes:
    """A JSON file in which every text that names one of the sources, keys included, reads "(forgotten)"."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DataError(f"it is not JSON: {error}") from error
    blank = _blank_value(value, wanted)
    return data if blank == value else (json.dumps(blank, indent=1) + "\n").encode()


def _blank_value(value: Any, wanted: Wanted) -> Any:
    if isinstance(value, dict):
        return {_blank_text(key, wanted): _blank_value(inner, wanted) for key, inner in value.items()}
    if isinstance(value, list):
        return [_blank_value(inner, wanted) for inner in value]
    return _blank_text(value, wanted) if isinstance(value, str) else value


def _blank_text(text: str, wanted: Wanted) -> str:
    return BLANK_JSON if names_image(text, wanted) else text


def names_image(text: str, wanted: Wanted) -> bool:
    """Whether a text is one of the sources, holds one that is a URL, or holds the domain. (Names of files occur in others.)"""
    return text in wanted.sources or wanted.names_domain(text) or any(url in text for url in wanted.urls)


def shows_image(page: bytes, wanted: Wanted) -> bool:
    """Whether an HTML page shows one of the images: by its id, or by a URL or the domain as they are escaped there."""
    text = html.unescape(page.decode("utf-8", "replace"))
    return not wanted.ids.isdisjoint(_ID.findall(text)) or names_image(text, wanted)


def source_hashes(sources: frozenset[str]) -> NDArray[np.uint64]:
    """Hashes of sources as `ledger_sources/` holds them."""
    return hash_strings(pa.array(sorted(sources), pa.string()))


def is_ledger(key: str) -> bool:
    """Whether a file holds rows of a ledger."""
    return key.startswith(LEDGER) and key.endswith(".parquet")


def is_ledger_sources(key: str) -> bool:
    """Whether a file belongs to the index of sources."""
    return key.startswith(LEDGER_SOURCES)
