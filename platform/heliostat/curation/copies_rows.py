"""What a copies artifact holds of each image: decisions, duplicates, components, nearest images and references, as files.

Rows are those of the pool, 2^22 a file; a column is an array with one value a row, -1 for "none" where it holds row numbers.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.artifacts import Artifact
from heliostat.curation.ledger import Decisions, StageCount
from heliostat.errors import DataError
from heliostat.storage import Store, read_parquet, to_parquet

# Shapes: N rows of the pool.

ROWS_PREFIX = "rows/"
COPIES_JSON = "copies.json"
_ROWS_PER_FILE = 2**22


@dataclass(frozen=True)
class CopiesRows:
    """Arrays over the N rows.

    cause: uint16, as in ledger.Decisions. duplicate_of: int64, row that stays for it after exact and hash. hash_distance:
    float32, NaN for none. nearest: int64 and similarity: float32, nearest other image above the edge floor. component: int64.
    representative: int64 and similarity_to_representative: float32. reference: int64, row among all evaluation images, and
    similarity_to_reference: float32.
    """

    cause: NDArray[np.uint16]
    duplicate_of: NDArray[np.int64]
    hash_distance: NDArray[np.float32]
    nearest: NDArray[np.int64]
    similarity: NDArray[np.float32]
    component: NDArray[np.int64]
    representative: NDArray[np.int64]
    similarity_to_representative: NDArray[np.float32]
    reference: NDArray[np.int64]
    similarity_to_reference: NDArray[np.float32]

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.cause)

    @staticmethod
    def empty(num_rows: int) -> dict[str, NDArray[Any]]:
        """Arrays in which nothing was found, by name, to be filled."""
        rows, floats = np.full(num_rows, -1, np.int64), np.full(num_rows, -1.0, np.float32)
        return {
            "cause": np.zeros(num_rows, np.uint16),
            "duplicate_of": rows.copy(),
            "hash_distance": np.full(num_rows, np.nan, np.float32),
            "nearest": rows.copy(),
            "similarity": floats.copy(),
            "component": rows.copy(),
            "representative": rows.copy(),
            "similarity_to_representative": floats.copy(),
            "reference": rows.copy(),
            "similarity_to_reference": floats.copy(),
        }

    def write(self, files: Store) -> list[str]:
        """Write all rows; returns the keys."""
        bounds = [*range(0, self.num_rows, _ROWS_PER_FILE), self.num_rows]
        keys = []
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            table = pa.table({one.name: pa.array(getattr(self, one.name)[start:stop]) for one in fields(self)})
            keys.append(f"{ROWS_PREFIX}{number:06d}.parquet")
            files.put(keys[-1], to_parquet(table))
        return keys


def read_copies_rows(files: Store, num_rows: int) -> CopiesRows:
    """The arrays that `CopiesRows.write` wrote. Raises DataError when there are not `num_rows` rows.

    Raises StorageError for a damaged file.
    """
    keys = [entry.key for entry in files.list(ROWS_PREFIX)]
    tables = [read_parquet(files, key) for key in keys]
    found = sum(table.num_rows for table in tables)
    if found != num_rows:
        raise DataError(f"{files.uri} holds {found} rows, its pool has {num_rows} images; make it again with heliostat dedup")
    names = [one.name for one in fields(CopiesRows)]
    return CopiesRows(**{name: np.concatenate([table[name].to_numpy() for table in tables]) for name in names})


def decisions_of(rows: CopiesRows, causes: list[list[str]], counts: list[list[Any]]) -> Decisions:
    """The decisions up to dedup, to be gone on with. causes, counts: as copies.json holds them."""
    return Decisions(
        rows.cause.copy(),
        [(stage, reason) for stage, reason in causes],
        [StageCount(str(stage), int(rows_in), int(rows_kept)) for stage, rows_in, rows_kept in counts],
    )


def read_facts(copies: Artifact) -> dict[str, Any]:
    """copies.json: causes, counts, settings, evaluation_sets, statistics. Raises StorageError when it is damaged."""
    facts: dict[str, Any] = copies.read_json(COPIES_JSON, _facts_of)
    return facts


def _facts_of(plain: Any) -> dict[str, Any]:
    return {
        "causes": list(plain["causes"]),
        "counts": list(plain["counts"]),
        "settings": dict(plain["settings"]),
        "evaluation_sets": list(plain["evaluation_sets"]),
        "statistics": dict(plain["statistics"]),
    }
