"""Writes a ledger: a shuffle from the order of the pool to the order of the ids, in tasks that may be repeated.

    facts     the caller cuts the arrays of the stages into one file per scatter task
    scatter   each task reads some blocks of rows, adds their facts, and writes a piece per file of the ledger
    gather    each file of the ledger: all of its pieces, sorted by (id, source)

Ids are hashes, so equal ranges of their first 32 bits hold equal numbers of rows; every file of one image lies in one range.
Rows without an image come in files of their own, by the hash of their source. `ledger_sources/` leads from a source to its
row: pairs (hash of the source, first 64 bits of the id), sorted, 16 bytes a row.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.artifacts import describe
from heliostat.curation.ledger import (
    DROPPED,
    LEDGER,
    LEDGER_INDEX,
    LEDGER_SOURCES,
    SCHEMA,
    Decisions,
    FunnelStep,
    StageCount,
    make_funnel,
)
from heliostat.curation.ledger_facts import LedgerFacts, hex_to_ids
from heliostat.curation.ledger_keys import hash_strings, id_heads, part_of
from heliostat.curation.tasks import TaskMap, run_serially
from heliostat.curation.vectors import read_array, write_array
from heliostat.errors import DataError
from heliostat.storage import Store, read_parquet, to_parquet

# Shapes: n rows of a task.

ROW_GROUP_ROWS = 2**14  # what a look-up reads: about 4 MB unpacked
_WORK = "_work/ledger/"
_AGAIN = "remove it and run again"
_ORDER = [(name, "ascending") for name in ("id", "source", "shard", "offset", "row")]
_TASKS_OF_A_KIND = 300_000


class RowBlocks(Protocol):
    """Tables of rows, read one at a time; can be pickled. Columns: any of SCHEMA's; `faces` (a list) becomes num_faces."""

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each block, and the number of rows at the end."""

    def read(self, block: int) -> pa.Table:
        """One block."""


@dataclass(frozen=True)
class TableRows:
    """Rows in memory, a table per block."""

    tables: tuple[pa.Table, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(np.cumsum([0, *(table.num_rows for table in self.tables)]).tolist())

    def read(self, block: int) -> pa.Table:
        return self.tables[block]


@dataclass(frozen=True)
class Parts:
    """How many files there are: of rows with an id, of rows without, of the index of sources."""

    ids: int
    outside: int
    sources: int


@dataclass(frozen=True)
class ScatterRows:
    """Reads blocks of rows and writes a piece for every file of the ledger that they touch."""

    rows: RowBlocks
    files: Store
    parts: Parts

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: index, first and last block, facts (key, or "" for rows without an image)."""
        table = pa.concat_tables(
            [self.rows.read(block) for block in range(task["first"], task["last"])], promote_options="default"
        )
        facts = read_parquet(self.files, task["facts"], fix=_AGAIN) if task["facts"] else None
        table = _normalised(table, facts)
        hashes = hash_strings(table["source"])
        if facts is None:
            part, heads = self.parts.ids + part_of(hashes, self.parts.outside), np.zeros(len(hashes), np.uint64)
        else:
            heads = id_heads(hex_to_ids(table["id"]))
            part = part_of(heads, self.parts.ids)
        for number, rows in _groups(part):
            self.files.put(_piece("rows", number, task["index"], "parquet"), ledger_bytes(table.take(pa.array(rows))))
        pairs = np.stack([hashes, heads, np.full(len(hashes), facts is not None, np.uint64)], axis=1)
        for number, rows in _groups(part_of(hashes, self.parts.sources)):
            write_array(self.files, _piece("sources", number, task["index"], "npy"), pairs[rows])
        return {"index": task["index"]}


def _groups(part: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """(number, rows of it) of every part that occurs."""
    order = np.argsort(part, kind="stable")
    numbers, firsts = np.unique(part[order], return_index=True)
    return list(zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True)) if len(part) else []


def _piece(what: str, number: int, index: int, suffix: str) -> str:
    return f"{_WORK}{what}/{number:06d}/{index:06d}.{suffix}"


def _normalised(table: pa.Table, facts: pa.Table | None) -> pa.Table:
    """The columns of SCHEMA, out of a block's own and of its facts; what neither has is null."""
    columns = {name: table[name] for name in table.column_names}
    if "faces" in columns:
        columns["num_faces"] = pc.list_value_length(columns["faces"])
    if "detail" in columns:
        columns["detail"] = pc.if_else(pc.equal(columns["detail"], ""), None, columns["detail"])
    if facts is not None:
        if facts.num_rows != table.num_rows:
            raise DataError(f"{table.num_rows} rows with facts about {facts.num_rows}; is the features artifact another one?")
        columns |= {name: facts[name] for name in facts.column_names}
    else:
        if missing := [name for name in ("source", "stage", "reason") if name not in columns]:
            raise DataError(f"rows without an image need a column {missing[0]!r}; they have {', '.join(table.column_names)}")
        columns |= {"decision": pa.array([DROPPED]).take(pa.array(np.zeros(table.num_rows, np.int8)))}
        columns |= {"id": pa.nulls(table.num_rows, pa.string()), "row": pa.nulls(table.num_rows, pa.int64())}
    arrays = [
        columns[wanted.name].cast(wanted.type) if wanted.name in columns else pa.nulls(table.num_rows, wanted.type)
        for wanted in SCHEMA
    ]
    return pa.table(arrays, schema=SCHEMA)


def ledger_bytes(table: pa.Table) -> bytes:
    """A file of the ledger; the same rows give the same bytes under one version of pyarrow."""
    return to_parquet(table, row_group_size=ROW_GROUP_ROWS)


@dataclass(frozen=True)
class GatherRows:
    """Joins the pieces of one file of the ledger, or of one file of the index of sources."""

    files: Store

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """task: what ("rows" or "sources"), number. Writes the file, then what it holds as JSON."""
        what, number = task["what"], task["number"]
        keys = [entry.key for entry in self.files.list(f"{_WORK}{what}/{number:06d}/")]
        table = self._rows(keys) if what == "rows" else self._sources(keys)
        data = ledger_bytes(table)
        self.files.put(file_key(what, number), data)
        counted = {"num_rows": table.num_rows, "file": describe(data).model_dump(), "drops": []}
        if what == "rows":
            grouped = table.group_by(["decision", "stage", "reason"]).aggregate([([], "count_all")])
            counted["drops"] = sorted(([list(row.values()) for row in grouped.to_pylist()]), key=str)
        self.files.put(_counts_key(what, number), json.dumps(counted).encode())
        return {"number": number}

    def _rows(self, keys: Sequence[str]) -> pa.Table:
        tables = [read_parquet(self.files, key, fix=_AGAIN) for key in keys]
        return pa.concat_tables(tables).combine_chunks().sort_by(_ORDER) if tables else SCHEMA.empty_table()

    def _sources(self, keys: Sequence[str]) -> pa.Table:
        pieces = [read_array(self.files, key) for key in keys]
        pairs = np.unique(np.concatenate(pieces), axis=0) if pieces else np.empty((0, 3), np.uint64)
        return pa.table({"hash": pairs[:, 0], "head": pa.array(pairs[:, 1], mask=pairs[:, 2] == 0)})


def file_key(what: str, number: int) -> str:
    """Where a file of rows or of sources lies."""
    return f"{LEDGER if what == 'rows' else LEDGER_SOURCES}{number:06d}.parquet"


def _counts_key(what: str, number: int) -> str:
    return f"{_WORK}counts/{what}/{number:06d}.json"


def write_ledger(
    files: Store,
    pool: RowBlocks,
    facts: LedgerFacts,
    decisions: Decisions,
    *,
    outside: RowBlocks | None = None,
    before: Sequence[StageCount] = (),
    settings: Mapping[str, float | None] | None = None,
    run_tasks: TaskMap = run_serially,
    rows_per_file: int = 2**20,
) -> list[FunnelStep]:
    """Write the whole ledger below `files`; returns its funnel. What an interrupted run finished is not done again.

    pool: the N rows that facts and decisions speak of. outside: rows without an image, each with a source, stage and reason.
    before: what the stages before the pool counted. settings: thresholds that sentences quote
    (dup_threshold, max_nsfw_score ...). Scratch lies under `_work/`. Raises DataError when arrays disagree or the rows do not
    add up to what the stages counted.
    """
    num_pool, num_outside = pool.starts[-1], outside.starts[-1] if outside is not None else 0
    if not num_pool == len(facts.ids) == len(decisions.cause):
        raise DataError(
            f"{num_pool} rows, {len(facts.ids)} ids and {len(decisions.cause)} decisions; give one of each per image"
        )
    sizes = (num_pool, rows_per_file), (num_outside, rows_per_file), (num_pool + num_outside, 8 * rows_per_file)
    parts = Parts(*(max(1, -(-count // each)) for count, each in sizes))
    for number, (name, rows) in enumerate({"pool": pool, "outside": outside}.items()):
        if rows is not None:
            tasks = _plan(rows.starts, number * _TASKS_OF_A_KIND, 2 * rows_per_file)
            waiting = _waiting(files, name, tasks)
            if name == "pool":
                _lay_facts(files, facts, decisions, rows.starts, waiting)
            for result in run_tasks(ScatterRows(rows, files, parts), waiting, label=f"sorting the ledger ({name})"):
                files.put(_done_key(name, result["index"]), b"")
    counted = {
        what: _gather(files, what, count, run_tasks)
        for what, count in (("rows", parts.ids + parts.outside), ("sources", parts.sources))
    }
    counts = [*before, *decisions.counts]
    kept, drops = _tally(counted["rows"])
    funnel = make_funnel(counts, drops, kept)
    index = {
        "parts": vars(parts),
        "num_rows": num_pool + num_outside,
        "stages": [list(count) for count in counts],
        "funnel": [step.as_dict() for step in funnel],
        "settings": dict(settings or {}),
        "forgotten": {},
    }
    files.put(LEDGER_INDEX, (json.dumps(index, indent=1) + "\n").encode())
    return funnel


def _plan(starts: Sequence[int], first_index: int, rows_per_task: int) -> list[dict[str, Any]]:
    """Consecutive blocks as tasks of about so many rows. first_index: pieces of both kinds lie side by side."""
    tasks, first = list[dict[str, Any]](), 0
    for block in range(len(starts) - 1):
        if starts[block + 1] - starts[first] >= rows_per_task or block + 2 == len(starts):
            tasks.append({"index": first_index + len(tasks), "first": first, "last": block + 1, "facts": ""})
            first = block + 1
    return tasks


def _waiting(files: Store, name: str, tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    done = {entry.key for entry in files.list(f"{_WORK}done/{name}/")}
    return [task for task in tasks if _done_key(name, task["index"]) not in done]


def _done_key(name: str, index: int) -> str:
    return f"{_WORK}done/{name}/{index:06d}"


def _lay_facts(
    files: Store, facts: LedgerFacts, decisions: Decisions, starts: Sequence[int], tasks: Sequence[dict[str, Any]]
) -> None:
    """Write each task's part of the facts and name it in the task."""
    for task in tasks:
        task["facts"] = f"{_WORK}facts/{task['index']:06d}.parquet"
        files.put(task["facts"], ledger_bytes(facts.table(decisions, starts[task["first"]], starts[task["last"]])))


def _gather(files: Store, what: str, count: int, run_tasks: TaskMap) -> list[dict[str, Any]]:
    done = {entry.key for entry in files.list(f"{_WORK}counts/{what}/")}
    tasks = [{"what": what, "number": number} for number in range(count) if _counts_key(what, number) not in done]
    for _ in run_tasks(GatherRows(files), tasks, label=f"writing the ledger ({what})"):
        pass
    return [json.loads(files.read(_counts_key(what, number))) for number in range(count)]


def _tally(counted: Sequence[Mapping[str, Any]]) -> tuple[int, Counter[tuple[str, str]]]:
    """Rows kept, and rows dropped by (stage, reason), as the files hold them."""
    kept, drops = 0, Counter[tuple[str, str]]()
    for file in counted:
        for decision, stage, reason, count in file["drops"]:
            if decision == DROPPED:
                drops[(stage, reason)] += count
            else:
                kept += count
    return kept, drops
