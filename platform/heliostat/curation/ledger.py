"""The ledger: one row per image file ever seen, with what was decided about it, by which stage and why.

Stages judge, the ledger records. Each stage hands in `Verdicts`; the counts a stage saw are written beside the rows, so that
`funnel` compares two independent counts and `check_funnel` fails when an image disappears without a reason.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.errors import DataError

KEPT, DROPPED = "kept", "dropped"
DECODE_STAGE = "decode"
STAGES_KEY = b"heliostat.stages"
MIN_ID_PREFIX = 8  # hexadecimal digits

RETRIEVED_BY = pa.list_(pa.struct([("curated_id", pa.string()), ("rank", pa.int32()), ("similarity", pa.float32())]))

FACTS = pa.schema(
    [
        pa.field("threshold", pa.float32(), metadata={"meaning": "similarity above which the image counts as a copy"}),
        pa.field("similarity", pa.float32(), metadata={"meaning": "similarity to nearest_copy"}),
        pa.field(
            "nearest_copy", pa.string(), metadata={"meaning": "id of the nearest other image, above the threshold or not"}
        ),
        pa.field("component", pa.int64(), metadata={"meaning": "number of the component of connected copies"}),
        pa.field("representative", pa.string(), metadata={"meaning": "id of the image that stays for the component"}),
        pa.field("similarity_to_representative", pa.float32(), metadata={"meaning": "what the guard against chains tested"}),
        pa.field("nearest_reference", pa.string(), metadata={"meaning": "id of the nearest evaluation image"}),
        pa.field("similarity_to_reference", pa.float32(), metadata={"meaning": "similarity to nearest_reference"}),
        pa.field(
            "retrieved_by", RETRIEVED_BY, metadata={"meaning": "curated images that brought this one in, best rank first"}
        ),
        pa.field("cluster", pa.int32(), metadata={"meaning": "k-means cluster among the images that reached it"}),
    ]
)
"""What stages may add to a row; null where the image did not reach the stage."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), metadata={"meaning": "sha256 of the file; null if it could not be decoded"}),
        pa.field("source", pa.string(), nullable=False, metadata={"meaning": "name or URL the file came from; unique"}),
        pa.field("label", pa.string(), metadata={"meaning": "label of the source, if it has one"}),
        pa.field("width", pa.int32(), metadata={"meaning": "pixels"}),
        pa.field("height", pa.int32(), metadata={"meaning": "pixels"}),
        pa.field("format", pa.string(), metadata={"meaning": "file format, lower case"}),
        pa.field("bytes", pa.int64(), metadata={"meaning": "size of the file"}),
        pa.field("decision", pa.string(), nullable=False, metadata={"meaning": "kept or dropped"}),
        pa.field("stage", pa.string(), metadata={"meaning": "stage that dropped the image; null if kept"}),
        pa.field("reason", pa.string(), metadata={"meaning": "why it was dropped; null if kept"}),
        pa.field("detail", pa.string(), metadata={"meaning": "the decoder's own words"}),
        *FACTS,
    ]
)


@dataclass(frozen=True)
class Verdicts:
    """What one stage decided: rows int64 (manifest rows that reached it), dropped bool, reason str (read where dropped)."""

    stage: str
    rows: NDArray[np.int64]
    dropped: NDArray[np.bool_]
    reason: NDArray[np.str_]

    @property
    def kept_rows(self) -> NDArray[np.int64]:
        """Manifest rows that go on to the next stage."""
        return self.rows[~self.dropped]


def same_reason(stage: str, rows: NDArray[np.int64], dropped: NDArray[np.bool_], reason: str) -> Verdicts:
    """Verdicts of a stage that has a single reason to drop."""
    return Verdicts(stage, rows, dropped, np.full(len(rows), reason))


@dataclass(frozen=True)
class FunnelStep:
    """One stage's counts of images."""

    stage: str
    rows_in: int
    rows_kept: int
    dropped_by_reason: Mapping[str, int]


def spread(values: pa.Array, rows: NDArray[np.int64], num_rows: int) -> pa.Array:
    """A column of `num_rows` rows that holds `values` at `rows` and null elsewhere."""
    position = np.full(num_rows, -1, np.int64)
    position[rows] = np.arange(len(rows))
    return values.take(pa.array(position, mask=position < 0))


def build_ledger(
    manifest: pa.Table, rejected: pa.Table, verdicts: Sequence[Verdicts], facts: Mapping[str, pa.Array]
) -> pa.Table:
    """Build the ledger: the manifest's rows in order, then the rejected files.

    manifest: columns id, source, label, width, height, format, length. rejected: columns source, reason, detail. verdicts: in
    the order of the stages. facts: columns of FACTS, one value per manifest row. Raises DataError for a source seen twice.
    """
    num_images, num_rejected = manifest.num_rows, rejected.num_rows
    stage = np.full(num_images, None, dtype=object)
    reason = np.full(num_images, None, dtype=object)
    counts = [{"stage": DECODE_STAGE, "rows_in": num_images + num_rejected, "rows_kept": num_images}]
    for verdict in verdicts:
        lost = verdict.rows[verdict.dropped]
        stage[lost], reason[lost] = verdict.stage, verdict.reason[verdict.dropped]
        counts.append({"stage": verdict.stage, "rows_in": len(verdict.rows), "rows_kept": len(verdict.kept_rows)})
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        name: manifest["length" if name == "bytes" else name]
        for name in ("id", "source", "label", "width", "height", "format", "bytes")
    }
    columns |= {"decision": pa.array(np.where(stage == None, KEPT, DROPPED))}  # noqa: E711  (elementwise)
    columns |= {"stage": pa.array(stage, pa.string()), "reason": pa.array(reason, pa.string()), **facts}
    seen = _table(columns, num_images)
    unread = _table(
        {
            "source": rejected["source"],
            "decision": pa.array([DROPPED] * num_rejected, pa.string()),
            "stage": pa.array([DECODE_STAGE] * num_rejected, pa.string()),
            "reason": rejected["reason"],
            "detail": rejected["detail"],
        },
        num_rejected,
    )
    ledger = pa.concat_tables([seen, unread]).combine_chunks()
    _refuse_repeated_sources(ledger)
    return ledger.replace_schema_metadata({STAGES_KEY: json.dumps(counts).encode()})


def _table(columns: Mapping[str, pa.Array | pa.ChunkedArray], num_rows: int) -> pa.Table:
    """Cast columns to SCHEMA; a column that is not given is null."""
    arrays = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(num_rows, field.type) for field in SCHEMA
    ]
    return pa.table(arrays, schema=SCHEMA)


def _refuse_repeated_sources(ledger: pa.Table) -> None:
    counts = pc.value_counts(ledger["source"]).field("counts")
    if len(counts) and pc.max(counts).as_py() > 1:
        repeated = pc.value_counts(ledger["source"]).field("values").filter(pc.greater(counts, 1))[0].as_py()
        raise DataError(f"source {repeated!r} is in the manifest twice; sources name files, so each must be unique")


def funnel(ledger: pa.Table) -> list[FunnelStep]:
    """Counts per stage in order: rows_in and rows_kept as the stage counted them, drops as the ledger's rows tell.

    Raises DataError when the two disagree (see `check_funnel`) or the ledger does not name its stages.
    """
    metadata = ledger.schema.metadata or {}
    if STAGES_KEY not in metadata:
        raise DataError("this table does not name its stages; only a ledger from build_ledger has a funnel")
    drops: dict[str, Counter[str]] = {}
    for stage, reason in zip(ledger["stage"].to_pylist(), ledger["reason"].to_pylist(), strict=True):
        if stage is not None:
            drops.setdefault(stage, Counter())[reason] += 1
    steps = [
        FunnelStep(
            count["stage"], count["rows_in"], count["rows_kept"], dict(sorted(drops.pop(count["stage"], Counter()).items()))
        )
        for count in json.loads(metadata[STAGES_KEY])
    ]
    if drops:
        raise DataError(f"rows are dropped by stage {min(drops)!r}, which the ledger does not list among its stages")
    check_funnel(steps)
    kept = pc.sum(pc.equal(ledger["decision"], KEPT)).as_py() or 0
    if kept != steps[-1].rows_kept:
        raise DataError(f"the ledger keeps {kept} rows, its last stage {steps[-1].stage!r} kept {steps[-1].rows_kept}")
    return steps


def check_funnel(steps: Sequence[FunnelStep]) -> None:
    """Raise DataError unless every stage accounts for each row it was given and hands all it kept to the next."""
    for position, step in enumerate(steps):
        dropped = sum(step.dropped_by_reason.values())
        if step.rows_in != step.rows_kept + dropped:
            raise DataError(
                f"stage {step.stage!r}: {step.rows_in} rows in, {step.rows_kept} kept and {dropped} dropped with a reason; "
                f"{step.rows_in - step.rows_kept - dropped} are unaccounted for"
            )
        if position and steps[position - 1].rows_kept != step.rows_in:
            raise DataError(
                f"stage {step.stage!r} got {step.rows_in} rows, but {steps[position - 1].stage!r} kept "
                f"{steps[position - 1].rows_kept}"
            )


def explain(ledger: pa.Table, id_or_source: str) -> list[str]:
    """The story of an image in sentences, one paragraph per file, for `heliostat why`.

    id_or_source: a whole id, its first 8 or more digits, or a source. Raises DataError when nothing or, for a prefix, more than
    one id matches.
    """
    mask = pc.or_kleene(pc.equal(ledger["id"], id_or_source), pc.equal(ledger["source"], id_or_source))
    found = ledger.filter(pc.fill_null(mask, False))
    if found.num_rows == 0 and len(id_or_source) >= MIN_ID_PREFIX:
        found = ledger.filter(pc.fill_null(pc.starts_with(ledger["id"], id_or_source), False))
        if len(set(found["id"].to_pylist())) > 1:
            raise DataError(f"{id_or_source} begins {len(set(found['id'].to_pylist()))} ids; give more digits")
    if found.num_rows == 0:
        raise DataError(f"no image with id or source {id_or_source!r} among the {ledger.num_rows} rows of this ledger")
    return [sentence for row in found.to_pylist() for sentence in _story(row)]


def _story(row: Mapping[str, Any]) -> list[str]:
    """Sentences about one row, in the order of the stages."""
    if row["id"] is None:
        return [f"{row['source']} could not be decoded: {row['reason']}" + (f" ({row['detail']})." if row["detail"] else ".")]
    name = row["id"][:12]
    story = [
        f"{row['source']} is image {name}: {row['width']} x {row['height']} {row['format']}, {row['bytes']} bytes"
        + (f", label {row['label']}." if row["label"] is not None else ".")
    ]
    if row["reason"] == "exact_duplicate":
        return [*story, "It has the same bytes as another file, which was kept in its place (stage exact)."]
    story += _copy_story(row)
    if row["nearest_reference"] is not None:
        story.append(
            f"The nearest evaluation image is {row['nearest_reference'][:12]}, similarity {row['similarity_to_reference']:.3f}."
        )
    if row["retrieved_by"]:
        first, others = row["retrieved_by"][0], len(row["retrieved_by"]) - 1
        story.append(
            f"Curated image {first['curated_id'][:12]} retrieved it at rank {first['rank']}, similarity "
            f"{first['similarity']:.3f}" + (f", and {others} other curated images did too." if others else ".")
        )
    if row["cluster"] is not None:
        story.append(f"It lies in cluster {row['cluster']}.")
    if row["decision"] == KEPT:
        return [*story, "It was kept."]
    return [*story, f"It was dropped by stage {row['stage']}: {row['reason']}."]


def _copy_story(row: Mapping[str, Any]) -> list[str]:
    """What the stage copies found about one row."""
    story = []
    if row["nearest_copy"] is not None and row["threshold"] is not None:
        side = "above" if row["similarity"] > row["threshold"] else "not above"
        story.append(
            f"The nearest other image is {row['nearest_copy'][:12]}, similarity {row['similarity']:.3f}, {side} the threshold "
            f"{row['threshold']:.3g}."
        )
    if row["representative"] is not None:
        story.append(
            f"It represents component {row['component']}."
            if row["representative"] == row["id"]
            else f"Component {row['component']} is represented by {row['representative'][:12]} instead, similarity "
            f"{row['similarity_to_representative']:.3f}."
        )
    return story
