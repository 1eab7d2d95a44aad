"""The ledger: one row per image ever seen, and per URL that never became one, with what was decided about it and why.

    ledger.py        the columns, the verdicts of the stages, the funnel and its check
    ledger_keys.py   which file a row lies in
    ledger_facts.py  what stages found out about the rows of a pool, as arrays
    ledger_write.py  a shuffle that writes the files, a range of ids each
    ledger_read.py   find one row among 10^9, or walk over all of them

Stages judge, the ledger records. Each stage counts what it was given and what it kept; the files count their rows.
`check_funnel` compares the two, and fails when an image disappears without a reason.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.errors import DataError

# Shapes: N rows of the pool, n rows that reached a stage.

KEPT, DROPPED, FORGOTTEN = "kept", "dropped", "forgotten"
MIN_ID_PREFIX = 8  # hexadecimal digits
LEDGER = "ledger/"
LEDGER_SOURCES = "ledger_sources/"
LEDGER_INDEX = "ledger/index.json"


def is_id(text: str) -> bool:
    """Whether a person may mean an image's id or its first digits, in capitals or not."""
    return re.fullmatch(rf"[0-9a-fA-F]{{{MIN_ID_PREFIX},64}}", text) is not None


RETRIEVED_BY = pa.list_(
    pa.struct(
        [
            ("set", pa.string()),
            ("mode", pa.string()),
            ("curated_id", pa.string()),
            ("rank", pa.int32()),
            ("similarity", pa.float32()),
        ]
    )
)


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning})


FACTS = pa.schema(
    [
        _field("row", pa.int64(), "row of the pool, as in the features artifact; null if there never was an image"),
        _field("decision", pa.string(), "kept, dropped or forgotten"),
        _field("stage", pa.string(), "stage that dropped the image; null if kept"),
        _field("reason", pa.string(), "why it was dropped; null if kept"),
        _field("duplicate_of", pa.string(), "id of the image that stays for it after the stages exact and hash"),
        _field("hash_distance", pa.float32(), "distance of the two by hash; 0 for the same bytes"),
        _field("nearest_copy", pa.string(), "id of the nearest other image, above the threshold or not"),
        _field("similarity", pa.float32(), "similarity to nearest_copy"),
        _field("component", pa.int64(), "number of the component of connected copies"),
        _field("component_size", pa.int64(), "images of the component"),
        _field("representative", pa.string(), "id of the image that stays for the component"),
        _field("similarity_to_representative", pa.float32(), "what the guard against chains tested"),
        _field("evaluation_set", pa.string(), "evaluation set of nearest_reference"),
        _field("nearest_reference", pa.string(), "id of the nearest evaluation image"),
        _field("similarity_to_reference", pa.float32(), "similarity to nearest_reference"),
        _field("retrieved_by", RETRIEVED_BY, "curated images that brought this one in, best rank first"),
        _field("cluster_levels", pa.list_(pa.int32()), "k-means cluster at each level, finest first"),
        _field("faces_blurred", pa.bool_(), "whether faces were blurred in the image that was kept"),
    ]
)
"""What curation adds to a row; null where the image did not reach the stage."""

SCHEMA = pa.schema(
    [
        _field("id", pa.string(), "sha256 of the file; null if no file came"),
        _field("source", pa.string(), "name or URL the file came from; null once it is forgotten"),
        _field("label", pa.string(), "label of the source, if it has one"),
        _field("shard", pa.string(), "shard of the raw artifact"),
        _field("offset", pa.int64(), "first byte in the shard"),
        _field("length", pa.int64(), "bytes of the file"),
        _field("width", pa.int32(), "pixels"),
        _field("height", pa.int32(), "pixels"),
        _field("format", pa.string(), "file format, lower case"),
        _field("detail", pa.string(), "the own words of what turned the file away"),
        _field("pca_code", pa.uint64(), "hash of the picture"),
        _field("pca_contrast", pa.float32(), "standard deviation of its thumbnail, grey values"),
        _field("nsfw", pa.float32(), "score, 0 to 1"),
        _field("num_faces", pa.int32(), "faces that the detector found"),
        _field("page", pa.string(), "URL of the page that showed the image"),
        _field("alt", pa.string(), "text beside it"),
        _field("http_status", pa.int32(), "answer of the server"),
        _field("licence", pa.string(), "licence that the page declares"),
        _field("robots", pa.string(), "what robots.txt said"),
        _field("opt_out", pa.string(), "signal against use for training, if there was one"),
        *FACTS,
    ]
)


@dataclass(frozen=True)
class Verdicts:
    """What one stage decided.

    rows: int64 (n,), ascending, rows that reached it. dropped: bool (n,). reasons: names; codes: uint8 (n,), index into
    reasons, read where dropped.
    """

    stage: str
    rows: NDArray[np.int64]
    dropped: NDArray[np.bool_]
    reasons: tuple[str, ...]
    codes: NDArray[np.uint8]

    @property
    def kept_rows(self) -> NDArray[np.int64]:
        """Rows that go on to the next stage."""
        return self.rows[~self.dropped]


def same_reason(stage: str, rows: NDArray[np.int64], dropped: NDArray[np.bool_], reason: str) -> Verdicts:
    """Verdicts of a stage that has a single reason to drop."""
    return Verdicts(stage, rows, dropped, (reason,), np.zeros(len(rows), np.uint8))


def named_reasons(stage: str, rows: NDArray[np.int64], reasons: pa.Array | pa.ChunkedArray) -> Verdicts:
    """Verdicts out of a column of texts: "" or null keeps, others are reasons. Raises DataError for over 255 reasons."""
    column = reasons.combine_chunks() if isinstance(reasons, pa.ChunkedArray) else reasons
    column = column.fill_null("").dictionary_encode()
    names = column.dictionary.to_pylist()
    if len(names) > 255:
        raise DataError(f"stage {stage!r} has {len(names)} reasons, the limit is 255; put what varies into the detail")
    codes = column.indices.to_numpy().astype(np.uint8)
    empty = np.array([not name for name in names], np.bool_)
    return Verdicts(stage, rows, ~empty[codes] if len(names) else np.zeros(0, np.bool_), tuple(names), codes)


class StageCount(NamedTuple):
    """Images that a stage was given, and those it kept, as it counted them itself."""

    stage: str
    rows_in: int
    rows_kept: int


@dataclass
class Decisions:
    """The verdicts so far: two bytes an image.

    cause: uint16 (N,), 0 while the image is kept, else an index into causes, which are (stage, reason).
    """

    cause: NDArray[np.uint16]
    causes: list[tuple[str, str]] = field(default_factory=lambda: [("", "")])
    counts: list[StageCount] = field(default_factory=list)

    @classmethod
    def of(cls, num_rows: int) -> "Decisions":
        """Nothing decided about `num_rows` images."""
        return cls(np.zeros(num_rows, np.uint16))

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64, ascending: images that no stage has dropped."""
        return np.flatnonzero(self.cause == 0)

    def judge(self, verdicts: Verdicts) -> None:
        """Take up a stage's verdicts. Raises DataError unless it judged exactly the images that the stages before had kept."""
        alive = self.rows
        if not np.array_equal(alive, verdicts.rows):
            raise DataError(
                f"stage {verdicts.stage!r} judged {len(verdicts.rows)} images, the stages before it kept {len(alive)}; "
                "give it all of these, in order"
            )
        first = len(self.causes)
        self.causes += [(verdicts.stage, reason) for reason in verdicts.reasons]
        if len(self.causes) > 2**16:
            raise DataError(
                f"{len(self.causes)} pairs of stage and reason, the limit is {2**16}; put what varies into the detail"
            )
        lost = verdicts.dropped
        self.cause[verdicts.rows[lost]] = first + verdicts.codes[lost].astype(np.uint16)
        self.counts.append(StageCount(verdicts.stage, len(verdicts.rows), len(verdicts.kept_rows)))


@dataclass(frozen=True)
class FunnelStep:
    """One stage's counts of images."""

    stage: str
    rows_in: int
    rows_kept: int
    dropped_by_reason: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "stage": self.stage,
            "rows_in": self.rows_in,
            "rows_kept": self.rows_kept,
            "dropped_by_reason": dict(self.dropped_by_reason),
        }


def make_funnel(counts: Sequence[StageCount], drops: Mapping[tuple[str, str], int], num_kept: int) -> list[FunnelStep]:
    """The funnel of stages' own counts and of the drops that the rows tell, by (stage, reason).

    Raises DataError when the two disagree (see `check_funnel`), when rows name another stage, or when num_kept, the rows that
    are kept, is not what the last stage kept.
    """
    by_stage: dict[str, dict[str, int]] = {}
    for (stage, reason), count in sorted(drops.items()):
        by_stage.setdefault(stage, {})[reason] = count
    steps = [FunnelStep(*count, by_stage.pop(count.stage, {})) for count in counts]
    if by_stage:
        raise DataError(f"rows are dropped by stage {min(by_stage)!r}, which the ledger does not list among its stages")
    check_funnel(steps)
    if steps and num_kept != steps[-1].rows_kept:
        raise DataError(f"the ledger keeps {num_kept} rows, its last stage {steps[-1].stage!r} kept {steps[-1].rows_kept}")
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
