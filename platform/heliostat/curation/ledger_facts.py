"""What the stages found out about the rows of a pool, as arrays; a slice of them becomes columns of the ledger."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.curation.ledger import DROPPED, FACTS, KEPT, RETRIEVED_BY, Decisions
from heliostat.errors import DataError

# Shapes: N rows of the pool, L levels of clusters, E links of retrieval, M curated images, R evaluation images.

_HEX = np.frombuffer("".join(f"{value:02x}" for value in range(256)).encode(), np.uint16)


def ids_to_hex(ids: NDArray[np.uint8], rows: NDArray[np.int64] | None = None) -> pa.Array:
    """Ids (n, 32) uint8 as texts of 64 digits. rows: take ids[rows] instead; a negative row gives null."""
    missing = None
    if rows is not None:
        missing = rows < 0
        ids = ids[np.where(missing, 0, rows)] if len(ids) else np.zeros((len(rows), 32), np.uint8)
    digits = _HEX[ids].view(np.uint8).reshape(-1)
    text = pa.FixedSizeBinaryArray.from_buffers(pa.binary(64), len(ids), [None, pa.py_buffer(digits)])
    text = text.cast(pa.binary()).cast(pa.string())
    return text if missing is None else _masked(text, missing)


def hex_to_ids(texts: pa.Array | pa.ChunkedArray) -> NDArray[np.uint8]:
    """Ids as texts of 64 hexadecimal digits -> (n, 32) uint8. Raises DataError for anything else."""
    column = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    try:
        fixed = column.cast(pa.binary()).cast(pa.binary(64))
    except pa.ArrowInvalid as error:
        raise DataError(f"an id is not 64 hexadecimal digits: {error}") from error
    if column.null_count:
        raise DataError(f"{column.null_count} images have no id; only rows without an image may lack one")
    digits = np.frombuffer(fixed.buffers()[1], np.uint8)[64 * fixed.offset : 64 * (fixed.offset + len(fixed))]
    value = np.where(digits >= ord("a"), digits - ord("a") + 10, digits - ord("0")).astype(np.uint8)
    if value.size and int(value.max()) > 15:
        raise DataError("an id is not 64 lower-case hexadecimal digits")
    return np.asarray(value[0::2] << 4 | value[1::2], np.uint8).reshape(-1, 32)


@dataclass(frozen=True)
class RetrievedBy:
    """Which curated image brought which pool row in.

    pool: int64 (E,), ascending. curated: int64 (E,), index into curated_ids (M, 32). rank: int32, similarity: float32.
    set_code: uint8 (E,), index into sets, which are (name, mode). Links of a row: best first.
    """

    pool: NDArray[np.int64]
    curated: NDArray[np.int64]
    rank: NDArray[np.int32]
    similarity: NDArray[np.float32]
    set_code: NDArray[np.uint8]
    sets: tuple[tuple[str, str], ...]
    curated_ids: NDArray[np.uint8]

    def column(self, start: int, stop: int) -> pa.Array:
        """One list per row from `start` to `stop`; empty where nothing retrieved it."""
        low, high = np.searchsorted(self.pool, [start, stop])
        offsets = np.searchsorted(self.pool[low:high], np.arange(start, stop + 1)).astype(np.int32)
        codes = pa.array(self.set_code[low:high].astype(np.int32))
        values = [
            pa.array([name for name, _ in self.sets], pa.string()).take(codes),
            pa.array([mode for _, mode in self.sets], pa.string()).take(codes),
            ids_to_hex(self.curated_ids, self.curated[low:high]),
            pa.array(self.rank[low:high], pa.int32()),
            pa.array(self.similarity[low:high], pa.float32()),
        ]
        names = [RETRIEVED_BY.value_type.field(index).name for index in range(5)]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(values, names=names))


@dataclass(frozen=True)
class LedgerFacts:
    """Arrays over the N rows of a pool; None where the stage did not run. A row number of -1 stands for "none".

    ids: (N, 32) uint8. duplicate_of, nearest, representative: int64 rows of the pool. hash_distance: float32, NaN for none.
    similarity, similarity_to_representative, similarity_to_reference: float32. component: int64, -1 for none.
    reference: int64, index into reference_ids (R, 32); evaluation_set: uint8 (R,), index into evaluation_sets.
    cluster_levels: int32 (N, L), -1 for rows that reached no cluster. faces_blurred: bool.
    """

    ids: NDArray[np.uint8]
    duplicate_of: NDArray[np.int64] | None = None
    hash_distance: NDArray[np.float32] | None = None
    nearest: NDArray[np.int64] | None = None
    similarity: NDArray[np.float32] | None = None
    component: NDArray[np.int64] | None = None
    representative: NDArray[np.int64] | None = None
    similarity_to_representative: NDArray[np.float32] | None = None
    reference: NDArray[np.int64] | None = None
    similarity_to_reference: NDArray[np.float32] | None = None
    reference_ids: NDArray[np.uint8] | None = None
    evaluation_set: NDArray[np.uint8] | None = None
    evaluation_sets: tuple[str, ...] = ()
    retrieved_by: RetrievedBy | None = None
    cluster_levels: NDArray[np.int32] | None = None
    faces_blurred: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        """Raises DataError when an array has another length than ids."""
        for name, value in vars(self).items():
            if (
                isinstance(value, np.ndarray)
                and name not in ("reference_ids", "evaluation_set")
                and len(value) != len(self.ids)
            ):
                raise DataError(f"{name} has {len(value)} entries for {len(self.ids)} images; give one per row of the pool")

    @cached_property
    def component_size(self) -> NDArray[np.int64]:
        """int64 (components,): images of each component."""
        given = self.component if self.component is not None else np.empty(0, np.int64)
        return np.bincount(given[given >= 0]).astype(np.int64)

    def table(self, decisions: Decisions, start: int, stop: int) -> pa.Table:
        """The columns FACTS of the rows from `start` to `stop`."""
        part = slice(start, stop)
        columns: dict[str, pa.Array] = {"row": pa.array(np.arange(start, stop)), **_decided(decisions, part)}
        for name, rows in (
            ("duplicate_of", self.duplicate_of),
            ("nearest_copy", self.nearest),
            ("representative", self.representative),
        ):
            if rows is not None:
                columns[name] = ids_to_hex(self.ids, rows[part])
        columns |= {name: pa.array(values[part], FACTS.field(name).type, from_pandas=True) for name, values in self._plain()}
        for name, rows in (("similarity", self.nearest), ("similarity_to_representative", self.representative)):
            if name in columns and rows is not None:
                columns[name] = _masked(columns[name], rows[part] < 0)
        if self.component is not None:
            component = self.component[part]
            columns["component"] = pa.array(component, mask=component < 0)
            columns["component_size"] = pa.array(self._sizes(component), mask=component < 0)
        columns |= self._reference(part)
        if self.retrieved_by is not None:
            columns["retrieved_by"] = self.retrieved_by.column(start, stop)
        if self.cluster_levels is not None:
            columns["cluster_levels"] = _levels(self.cluster_levels[part])
        arrays = [
            columns[wanted.name].cast(wanted.type) if wanted.name in columns else pa.nulls(stop - start, wanted.type)
            for wanted in FACTS
        ]
        return pa.table(arrays, schema=FACTS)

    def _sizes(self, component: NDArray[np.int64]) -> NDArray[np.int64]:
        sizes = self.component_size
        return sizes[np.maximum(component, 0)] if len(sizes) else np.zeros(len(component), np.int64)

    def _plain(self) -> list[tuple[str, NDArray[Any]]]:
        """Arrays that are columns as they are; NaN becomes null."""
        named = {
            "hash_distance": self.hash_distance,
            "similarity": self.similarity,
            "similarity_to_representative": self.similarity_to_representative,
            "faces_blurred": self.faces_blurred,
        }
        return [(name, values) for name, values in named.items() if values is not None]

    def _reference(self, part: slice) -> dict[str, pa.Array]:
        if self.reference is None or self.similarity_to_reference is None or self.reference_ids is None:
            return {}
        reference = self.reference[part]
        none = reference < 0
        columns = {
            "nearest_reference": ids_to_hex(self.reference_ids, reference),
            "similarity_to_reference": pa.array(self.similarity_to_reference[part], mask=none),
        }
        if self.evaluation_set is not None and len(self.evaluation_set):
            codes = pa.array(self.evaluation_set[np.maximum(reference, 0)].astype(np.int32), mask=none)
            columns["evaluation_set"] = pa.array(self.evaluation_sets, pa.string()).take(codes)
        return columns


def _masked(column: pa.Array, missing: NDArray[np.bool_]) -> pa.Array:
    return column.take(pa.array(np.arange(len(column)), mask=missing)) if missing.any() else column


def _levels(levels: NDArray[np.int32]) -> pa.Array:
    """A list per row, null where the first level is -1."""
    count, width = levels.shape
    offsets = np.arange(0, (count + 1) * width, width, dtype=np.int32) if width else np.zeros(count + 1, np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(levels.reshape(-1), pa.int32()))
    return _masked(lists, np.asarray((levels < 0).any(axis=1), np.bool_) if width else np.ones(count, np.bool_))


def _decided(decisions: Decisions, part: slice) -> dict[str, pa.Array]:
    cause = decisions.cause[part].astype(np.int32)
    code = pa.array(cause, mask=cause == 0)
    return {
        "decision": pa.array([KEPT, DROPPED]).take(pa.array((cause > 0).astype(np.int8))),
        "stage": pa.array([stage for stage, _ in decisions.causes], pa.string()).take(code),
        "reason": pa.array([reason for _, reason in decisions.causes], pa.string()).take(code),
    }
