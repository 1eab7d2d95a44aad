"""What has to change so that images are forgotten: found by reading every table of every artifact, changed by nobody here."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.artifacts import RECORD, Artifact, ArtifactStore
from heliostat.curation.forget_files import (
    Wanted,
    blank_json,
    drop_from_parquet_shard,
    drop_sources,
    is_ledger,
    is_ledger_sources,
    names_image,
    shows_image,
    source_hashes,
)
from heliostat.curation.forget_list import Target
from heliostat.curation.ledger import DROPPED, FORGOTTEN, LEDGER_INDEX
from heliostat.data.quarantine import QUARANTINE
from heliostat.data.shard_reader import is_uri
from heliostat.data.windows import BytesFile, BytesOfObject
from heliostat.errors import DataError
from heliostat.storage import one_line_if_damaged

MANIFEST = "manifest.parquet"
_KINDS = ("raw", "features", "copies", "curated", "report")
_LOOKED_AT = ("id", "source", "url", "final_url", "shard", "offset", "decision", "stage", "reason")
_WINDOW_BYTES = 2**18
_ID_DIGITS = 64
_PLAIN_TEXT = (".txt", ".csv", ".tsv", ".jsonl", ".md")


@dataclass(frozen=True)
class Found:
    """ids: of all images that are meant. sources: by artifact, what these are called in it and in what it was made from."""

    ids: frozenset[str]
    sources: dict[str, frozenset[str]]


@dataclass
class Change:
    """What changes in one artifact.

    shards: tars and offsets of images in them. moves: Parquet shards, old key -> (new key, offset of each image left by id).
    in_place: shards outside the store. files: tables and JSON to be written anew; pages: to be deleted; unclean: what cannot
    be cleaned. num_rows: rows that are removed or blanked. counts, ledger_index: as they will be.
    """

    wanted: Wanted
    counts: dict[str, int]
    shards: dict[str, list[int]] = field(default_factory=dict)
    moves: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)
    in_place: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    unclean: list[str] = field(default_factory=list)
    num_rows: int = 0
    ledger_index: dict[str, Any] | None = None

    @property
    def is_needed(self) -> bool:
        """Whether anything changes, or somebody has to be told."""
        return bool(self.files or self.shards or self.moves or self.pages or self.unclean or self.in_place)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        known = asdict(self)
        known["wanted"] = {
            "ids": sorted(self.wanted.ids),
            "sources": sorted(self.wanted.sources),
            "domain": self.wanted.domain,
        }
        return known

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> "Change":
        """The inverse of `as_dict`."""
        wanted = known["wanted"]
        moves = {old: (new, places) for old, (new, places) in known["moves"].items()}
        of = Wanted(frozenset(wanted["ids"]), frozenset(wanted["sources"]), wanted["domain"])
        return cls(**{**known, "wanted": of, "moves": moves})


def resolve_prefix(artifacts: ArtifactStore, target: Target) -> Target:
    """The target with a whole id. Raises DataError when first digits begin no id of the store, or several."""
    if target.kind != "id" or len(target.text) == _ID_DIGITS:
        return target
    ids = set[str]()
    for artifact in _in_order(artifacts):
        for _, table in _tables(artifact, ("id",)):
            ids.update(table.filter(pc.starts_with(table["id"], target.text))["id"].unique().to_pylist())
    if len(ids) != 1:
        raise DataError(
            f"{target.text} begins {len(ids)} ids of {artifacts.store.uri}; give {'more digits' if ids else 'another'}"
        )
    return Target("id", ids.pop())


def _in_order(artifacts: ArtifactStore) -> list[Artifact]:
    """Complete artifacts that may hold images or name them, each after those that it was made from."""
    waiting = {str(ref): artifacts.load(ref) for ref in artifacts.list() if ref.kind in _KINDS}
    ordered: list[Artifact] = []
    while waiting:
        ready = [ref for ref, one in waiting.items() if not set(one.record.inputs.values()) & (waiting.keys() - {ref})]
        if not ready:
            raise DataError(f"the artifacts {', '.join(sorted(waiting)[:3])} are each made from the other; a record is damaged")
        ordered += [waiting.pop(ref) for ref in sorted(ready)]
    return ordered


def _tables(artifact: Artifact, needed: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """(key, the columns that are looked at) of every table with one of the columns `needed`, shards left out."""
    for key in sorted(artifact.record.files):
        if not key.endswith(".parquet") or key.startswith("shards/") or is_ledger_sources(key):
            continue
        source = BytesOfObject(artifact.files, key, artifact.record.files[key].num_bytes, _WINDOW_BYTES)
        num_bytes = artifact.files.size(key)
        if num_bytes is None:
            raise DataError(f"{artifact.ref}: {key} is gone; the artifact is damaged, remove it")
        source.num_bytes = num_bytes  # an interrupted run may have written it anew
        with one_line_if_damaged(artifact.files, key):
            file = pq.ParquetFile(pa.PythonFile(BytesFile(source), mode="r"), page_checksum_verification=True)
            columns = [name for name in _LOOKED_AT if name in file.schema_arrow.names]
            table = file.read(columns) if set(columns) & set(needed) else None
        if table is not None:
            yield key, table


def find_ids(artifacts: ArtifactStore, target: Target, known: Sequence[str]) -> Found:
    """All images that a target means: the same bytes under other names, and what was made of them under other ids.

    known: ids that an earlier run found, which may have left the tables since. Names are followed along the lineage only: two
    pools may use the same name for different images.
    """
    ids = {*known, *([target.text] if target.kind == "id" else [])}
    domain = target.text if target.kind == "domain" else ""
    given = {target.text} if target.kind == "source" else set[str]()
    sources: dict[str, set[str]] = {}
    ordered = _in_order(artifacts)
    while True:
        before = len(ids), sum(len(names) for names in sources.values())
        for artifact in ordered:
            names = sources.setdefault(str(artifact.ref), set(given))
            for ref in artifact.record.inputs.values():
                names |= sources.get(ref, set())
            for _, table in _tables(artifact, ("id", "source", "url", "final_url")):
                rows = table.filter(pa.array(Wanted(frozenset(ids), frozenset(names), domain).rows(table)))
                _take_names(rows, ids, names)
        if before == (len(ids), sum(len(names) for names in sources.values())):
            return Found(frozenset(ids), {ref: frozenset(names) for ref, names in sources.items()})


def _take_names(rows: pa.Table, ids: set[str], names: set[str]) -> None:
    for name in ("id", "source", "url", "final_url"):
        if name in rows.column_names:
            found = {text for text in rows[name].unique().to_pylist() if text}
            (ids if name == "id" else names).update(found)


def plan_changes(artifacts: ArtifactStore, target: Target, found: Found) -> dict[str, Change]:
    """The changes of every artifact, by ref; most have none."""
    moves = dict[str, tuple[str, dict[str, int]]]()
    changes = {}
    for artifact in _in_order(artifacts):
        ref = str(artifact.ref)
        wanted = Wanted(found.ids, found.sources[ref], target.text if target.kind == "domain" else "")
        changes[ref] = _plan(artifact, wanted, target.digest, moves)
    return changes


def _plan(artifact: Artifact, wanted: Wanted, digest: str, moves: dict[str, tuple[str, dict[str, int]]]) -> Change:
    """moves: of the artifacts before this one; its own are added."""
    change = Change(wanted, dict(artifact.record.counts))
    num_rows, forgotten = 0, dict[str, int]()
    for key, table in _tables(artifact, ("id", "source", "url", "final_url")):
        rows = table.filter(pa.array(wanted.rows(table)))
        left = _still_named(rows)
        if key == MANIFEST:
            _plan_shards(artifact, rows, change, digest)
            moves |= change.moves
            if rows.num_rows and "images" in change.counts:
                change.counts["images"] -= rows.num_rows
            left = rows.num_rows
        elif key == QUARANTINE:
            left = rows.num_rows
        elif is_ledger(key):
            _count_causes(rows, forgotten)
        num_rows += left
        if left or _points_to(table, moves):
            change.files.append(key)
    _plan_ledger(artifact, change, forgotten)
    _plan_texts(artifact, change)
    change.num_rows = num_rows
    return change


def _still_named(rows: pa.Table) -> int:
    """Rows that are not blank yet: some name is left, or a decision."""
    if not rows.num_rows:
        return 0
    named = np.zeros(rows.num_rows, np.bool_)
    for name in ("source", "url", "final_url"):
        if name in rows.column_names:
            named |= pc.fill_null(pc.not_equal(rows[name], ""), False).to_numpy()
    if "decision" in rows.column_names:
        named |= pc.not_equal(rows["decision"], FORGOTTEN).to_numpy()
    return int(named.sum())


def _points_to(table: pa.Table, moves: dict[str, tuple[str, dict[str, int]]]) -> bool:
    return (
        bool(moves)
        and "shard" in table.column_names
        and bool(pc.any(pc.is_in(table["shard"], pa.array(sorted(moves)))).as_py())
    )


def _plan_shards(artifact: Artifact, rows: pa.Table, change: Change, digest: str) -> None:
    """Where the bytes lie."""
    for shard in sorted(rows["shard"].unique().to_pylist()):
        its_own = rows.filter(pc.equal(rows["shard"], shard))
        if is_uri(shard):
            change.in_place.append(shard)
        elif shard.endswith(".parquet"):
            new = f"{shard.removesuffix('.parquet')}.{digest[:8]}.parquet"
            change.moves[shard] = new, drop_from_parquet_shard(artifact.files.read(shard), change.wanted.ids)[1]
        else:
            change.shards[shard] = sorted(its_own["offset"].to_pylist())


def _count_causes(rows: pa.Table, forgotten: dict[str, int]) -> None:
    """Add rows of a ledger by the stage and reason that they have now."""
    for row in rows.select(["decision", "stage", "reason"]).to_pylist():
        if row["decision"] != FORGOTTEN:
            cause = f"{row['stage']}/{row['reason']}" if row["decision"] == DROPPED else ""
            forgotten[cause] = forgotten.get(cause, 0) + 1


def _plan_ledger(artifact: Artifact, change: Change, forgotten: dict[str, int]) -> None:
    if forgotten:
        index = json.loads(artifact.files.read(LEDGER_INDEX))
        for cause, count in forgotten.items():
            index["forgotten"][cause] = index["forgotten"].get(cause, 0) + count
        change.ledger_index = index
        change.files.append(LEDGER_INDEX)
    hashes = source_hashes(change.wanted.sources)
    for key in sorted(artifact.record.files):
        if is_ledger_sources(key) and len(hashes):
            data = artifact.files.read(key)
            if drop_sources(data, hashes) != data:
                change.files.append(key)


def _plan_texts(artifact: Artifact, change: Change) -> None:
    """JSON to be blanked, pages to be deleted, other texts to be told of."""
    if names_image(json.dumps(artifact.record.config, ensure_ascii=False), change.wanted):
        change.unclean.append(RECORD)  # what the settings say is part of the fingerprint
    for key in sorted(artifact.record.files):
        if key.endswith(".html"):
            if shows_image(artifact.files.read(key), change.wanted):
                change.pages.append(key)
        elif key.endswith(".json") and key != LEDGER_INDEX:
            data = artifact.files.read(key)
            if blank_json(data, change.wanted) != data:
                change.files.append(key)
        elif key.endswith(_PLAIN_TEXT) and names_image(artifact.files.read(key).decode("utf-8", "replace"), change.wanted):
            change.unclean.append(key)
