"""Reports: how good copy detection was against planted copies, and the funnel as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat.curation.copies import connected_components
from heliostat.curation.ledger import KEPT, FunnelStep
from heliostat.errors import DataError

COPY_STAGES = frozenset({"exact", "copies"})


@dataclass(frozen=True)
class CopyScore:
    """Copy detection against planted truth.

    num_planted, num_found: planted copies in the ledger, and those that share a component with their original.
    num_dropped: images that stages exact and copies dropped. num_wrongly_dropped: those whose representative is neither their
    original nor another copy of it; images that resemble each other without having been planted count as wrong here.
    recall_by_kind: per kind of change. wrongly_dropped: their sources, sorted, to be looked at.
    """

    num_planted: int
    num_found: int
    num_dropped: int
    num_wrongly_dropped: int
    recall_by_kind: Mapping[str, float]
    wrongly_dropped: Sequence[str]

    @property
    def recall(self) -> float:
        """Share of the planted copies that were found; 1 when none were planted."""
        return self.num_found / self.num_planted if self.num_planted else 1.0

    @property
    def precision(self) -> float:
        """Share of the drops that were right; 1 when nothing was dropped."""
        return 1.0 - self.num_wrongly_dropped / self.num_dropped if self.num_dropped else 1.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures, without the list of sources."""
        return {
            "num_planted": self.num_planted,
            "num_found": self.num_found,
            "num_dropped": self.num_dropped,
            "num_wrongly_dropped": self.num_wrongly_dropped,
            "recall": self.recall,
            "precision": self.precision,
            "recall_by_kind": dict(self.recall_by_kind),
        }


def copy_report(
    ledger: pa.Table,
    truth: Mapping[str, str],
    *,
    kinds: Mapping[str, str] | None = None,
    same: Sequence[Sequence[str]] = (),
) -> CopyScore:
    """Score the ledger's components against planted copies.

    truth: source of a copy -> source of its original. kinds: source of a copy -> kind of change (one kind when left out).
    same: further groups of sources that may rightly be merged though nobody planted them, such as the frames of one film; they
    count for precision, not for recall. Raises DataError for a truth whose files the ledger does not hold.
    """
    sources = ledger["source"].to_pylist()
    row_of = {source: row for row, source in enumerate(sources)}
    if missing := sorted({*truth, *truth.values()} - row_of.keys()):
        raise DataError(f"{missing[0]!r} of the truth is not in the ledger ({len(missing)} such); it scores another pool")
    pairs = [(row_of[copy], row_of[original]) for copy, original in truth.items()]
    for group in same:
        members = [row_of[source] for source in group if source in row_of]
        pairs += [(members[0], member) for member in members[1:]]
    true_group = connected_components(len(sources), np.array(pairs, np.int64).reshape(-1, 2))
    component = ledger["component"].to_pylist()
    found = {
        copy: component[row_of[copy]] is not None and component[row_of[copy]] == component[row_of[original]]
        for copy, original in truth.items()
    }
    ids, stages = ledger["id"].to_pylist(), ledger["stage"].to_pylist()
    representatives = ledger["representative"].to_pylist()
    # Files of one id belong to one true group or were never planted; the first survivor stands for all of them.
    row_of_id = {ids[row]: row for row in range(len(ids)) if ids[row] is not None and stages[row] != "exact"}
    dropped = [row for row, stage in enumerate(stages) if stage in COPY_STAGES]
    wrong = sorted(
        sources[row]
        for row in dropped
        if true_group[row] != true_group[row_of_id[representatives[row] or ids[row]]] and ids[row] != representatives[row]
    )
    return CopyScore(
        len(truth), sum(found.values()), len(dropped), len(wrong), _recall_by_kind(found, kinds or {}), tuple(wrong)
    )


def _recall_by_kind(found: Mapping[str, bool], kinds: Mapping[str, str]) -> dict[str, float]:
    """Kind -> share of its copies that were found; sorted by kind."""
    by_kind: dict[str, list[bool]] = {}
    for copy, hit in found.items():
        by_kind.setdefault(kinds.get(copy, "copy"), []).append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(by_kind.items())}


def render_funnel(steps: Sequence[FunnelStep]) -> str:
    """The funnel as text in aligned columns, one line per stage and reason, without a newline at the end."""
    lines = [("stage", "rows in", "rows kept", "dropped", "reason")]
    for step in steps:
        reasons = list(step.dropped_by_reason.items()) or [("", 0)]
        for position, (reason, count) in enumerate(reasons):
            head = (step.stage, f"{step.rows_in:,}", f"{step.rows_kept:,}") if position == 0 else ("", "", "")
            lines.append((*head, f"{count:,}", reason))
    if steps:
        lines.append((KEPT, "", f"{steps[-1].rows_kept:,}", f"{steps[0].rows_in - steps[-1].rows_kept:,}", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        f"{stage:<{widths[0]}}  {rows_in:>{widths[1]}}  {rows_kept:>{widths[2]}}  {dropped:>{widths[3]}}  {reason}".rstrip()
        for stage, rows_in, rows_kept, dropped, reason in lines
    )
