"""The result of a sweep as a table: seeds together, the best first, an ablation in its own order."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_points import SEED, short
from heliostat.runtime.sweep_trials import Trial, has_seeds, seeds_of


@dataclass(frozen=True)
class Group:
    """Trials that differ in their seed alone."""

    trials: tuple[Trial, ...]

    @property
    def finished(self) -> list[Trial]:
        """Those that ran to their end."""
        return [trial for trial in self.trials if trial.status == "finished"]

    @property
    def counted(self) -> list[Trial]:
        """Those whose values are averaged: the finished ones, else the stopped ones that came farthest."""
        stopped = [trial for trial in self.trials if trial.status == "stopped"]
        farthest = max((trial.step for trial in stopped), default=0)
        return self.finished or [trial for trial in stopped if trial.step == farthest]

    @property
    def value(self) -> float | None:
        """Mean of the metric; None where all failed."""
        values = [trial.value for trial in self.counted if trial.value is not None]
        return statistics.fmean(values) if values else None

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one."""
        values = [trial.value for trial in self.counted if trial.value is not None]
        if not all(math.isfinite(value) for value in values):
            return math.nan  # the standard library's function knows no NaN
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def step(self) -> int:
        """The step of the value."""
        return max((trial.step for trial in self.counted), default=max(trial.step for trial in self.trials))

    @property
    def status(self) -> str:
        """How its trials ended, with counts where they differ."""
        counts = {status: sum(trial.status == status for trial in self.trials) for status in ("finished", "stopped", "failed")}
        there = {status: count for status, count in counts.items() if count}
        return next(iter(there)) if len(there) == 1 else ", ".join(f"{count} {status}" for status, count in there.items())


def groups_of(trials: Sequence[Trial]) -> list[Group]:
    """Trials by settings, in the order of the sweep."""
    return [Group(tuple(group)) for group in seeds_of(trials)]


def ranked(trials: Sequence[Trial], sweep: SweepConfig) -> list[Group]:
    """The groups, the best first: finished ones, then stopped ones by how far they came, then failed ones."""

    def place(group: Group) -> tuple[bool, bool, int, float]:
        value = group.value
        known = value is not None and math.isfinite(value)
        better = (-value if sweep.mode == "max" else value) if value is not None and known else 0.0
        return not group.finished, not known, 0 if group.finished else -group.step, better

    return sorted(groups_of(trials), key=place)


def best_group(trials: Sequence[Trial], sweep: SweepConfig) -> Group | None:
    """The best settings among those that ran to their end and have a number; None where there are none."""
    first = next(iter(ranked(trials, sweep)), None)
    return first if first is not None and first.finished and math.isfinite(first.value or 0.0) else None


def _shown(trials: Sequence[Trial], sweep: SweepConfig) -> list[Group]:
    """In an ablation every line adds to the one before, so its order stays."""
    return groups_of(trials) if sweep.ablation else ranked(trials, sweep)


def varied(sweep: SweepConfig) -> list[str]:
    """The keys that the table has a column for: an ablation's own keys are behind the names of its steps."""
    keys = [*sweep.grid, *sweep.space] if sweep.ablation else sweep.varied_keys
    return [key for key in keys if key != SEED]


def short_keys(keys: Sequence[str]) -> list[str]:
    """The last words of keys, as many as tell them apart."""
    found = []
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            tail = parts[-count:]
            if sum(other.split(".")[-count:] == tail for other in keys) == 1:
                break
        found.append(".".join(tail))
    return found


def rows(trials: Sequence[Trial], sweep: SweepConfig, *, exact: bool = False) -> list[list[str]]:
    """The table as text cells, its head first. `exact` writes whole numbers of every digit and full keys."""
    keys = varied(sweep)
    head = ["trials", *(["step of the ablation"] if sweep.ablation else []), *(keys if exact else short_keys(keys))]
    seeded = has_seeds(trials)
    head += [sweep.metric, *(["spread", "seeds"] if seeded else []), *(["change"] if sweep.ablation else []), "steps", "how"]
    table, before = [head], None
    number = repr if exact else short
    for group in _shown(trials, sweep):
        first, value = group.trials[0], group.value
        cells = [" ".join(trial.name for trial in group.trials), *([first.label] if sweep.ablation else [])]
        cells += [number(first.overrides[key]) if key in first.overrides else "" for key in keys]
        cells.append("" if value is None else number(value))
        cells += [number(group.spread) if len(group.counted) > 1 else "", str(len(group.counted))] if seeded else []
        if sweep.ablation:
            cells.append("" if value is None or before is None else f"{value - before:+.4g}")
            before = value if group.finished else before
        table.append([*cells, str(group.step), group.status])
    return table


def table_lines(trials: Sequence[Trial], sweep: SweepConfig) -> list[str]:
    """The table in aligned columns."""
    table = rows(trials, sweep)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def markdown_table(trials: Sequence[Trial], sweep: SweepConfig, title: str) -> str:
    """The table in Markdown, with what it says and what it leaves out."""
    head, *body = rows(trials, sweep)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, ["---"] * len(head), *body)]
    better, over = (
        "more" if sweep.mode == "max" else "less",
        ", mean and standard deviation over seeds" if has_seeds(trials) else "",
    )
    notes = [f"`{sweep.metric}` at the last step{over}; {better} is better."]
    if any(trial.status == "stopped" for trial in trials):
        notes.append("Stopped trials stand below the finished ones, with their value at the step where they were stopped.")
    notes += [f"Trial {trial.name} failed: {trial.error}" for trial in trials if trial.status == "failed"]
    return f"# {title}\n\n" + "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def csv_text(trials: Sequence[Trial], sweep: SweepConfig) -> str:
    """The table as CSV, every digit."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows(rows(trials, sweep, exact=True))
    return sink.getvalue()
