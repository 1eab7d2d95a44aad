"""The funnel as text."""

from collections.abc import Sequence

from heliostat.curation.ledger import KEPT, FunnelStep


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
