"""A sweep in one picture: a curve over one key, a heat map over two, parallel coordinates over more; bars for an ablation."""

import io
import math
from collections.abc import Sequence
from typing import Any

from heliostat.runtime.sweep_config import RangeConfig, SweepConfig
from heliostat.runtime.sweep_points import short
from heliostat.runtime.sweep_table import Group, groups_of, short_keys, varied
from heliostat.runtime.sweep_trials import Trial

_COLOURS = "viridis"
_FINISHED, _STOPPED = "#d9730d", "#9aa4b2"
_MOST_CELLS = 12  # of one axis of a heat map: beyond that its numbers cannot be read, and the trials are drawn as points


def draw_trials(trials: Sequence[Trial], sweep: SweepConfig, title: str) -> bytes:
    """PNG of the trials; seeds are drawn as their mean with the spread where the picture has room for it."""
    import matplotlib
    from matplotlib.figure import Figure

    groups = [group for group in groups_of(trials) if group.value is not None]
    keys = varied(sweep)
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
        figure.suptitle(title, fontsize=10)
        if sweep.ablation:
            _ablation(figure, groups, sweep)
        elif len(keys) <= 1:
            _curve(figure.add_subplot(), groups, keys[0] if keys else "", sweep)
        elif len(keys) == 2:
            _two_keys(figure, groups, keys, sweep)
        else:
            _parallel(figure, groups, keys, sweep)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _values(groups: Sequence[Group]) -> list[float]:
    return [float(group.value or 0.0) for group in groups]


def _range(groups: Sequence[Group]) -> tuple[float, float]:
    """Ends of the colours: the finite values of the finished trials, or of all where none finished."""
    chosen = [group for group in groups if group.finished] or list(groups)
    values = [value for value in _values(chosen) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _is_log(sweep: SweepConfig, key: str) -> bool:
    entry = sweep.space.get(key)
    return isinstance(entry, RangeConfig) and entry.log


def _places(groups: Sequence[Group], sweep: SweepConfig, key: str) -> tuple[list[float], list[tuple[float, str]]]:
    """Where the groups lie along a key, and its ticks. Numbers of a range lie at their value, anything else in even steps."""
    values = [group.trials[0].overrides[key] for group in groups]
    entry = sweep.space.get(key)
    if isinstance(entry, RangeConfig):
        scale = math.log10 if entry.log else float
        low, high = scale(entry.low), scale(entry.high)
        ends = [low + (high - low) * part / 4 for part in range(5)]
        return [scale(value) for value in values], [(end, f"{10**end if entry.log else end:.2g}") for end in ends]
    order = list(sweep.grid.get(key) or entry or ())
    texts = [short(value) for value in order]
    return [float(texts.index(short(value))) for value in values], [(float(place), text) for place, text in enumerate(texts)]


def _curve(axes: Any, groups: Sequence[Group], key: str, sweep: SweepConfig) -> None:
    """The metric over one key, every seed a dot; over the seeds where nothing else varies."""
    if not key:
        trials = [trial for group in groups for trial in group.counted]
        axes.bar([trial.name for trial in trials], [trial.value for trial in trials], color=_FINISHED)
        axes.set_xlabel("trial")
    else:
        places, ticks = _places(groups, sweep, key)
        order = sorted(range(len(groups)), key=lambda index: places[index])
        done = [index for index in order if groups[index].finished]
        axes.errorbar(
            [places[index] for index in done],
            [groups[index].value for index in done],
            yerr=[groups[index].spread for index in done],
            fmt="o" if isinstance(sweep.space.get(key), RangeConfig) else "o-",  # draws of a range are no curve
            color=_FINISHED,
            capsize=3,
        )
        for index in order:
            colour = _FINISHED if groups[index].finished else _STOPPED
            for trial in groups[index].counted:
                axes.plot(places[index], trial.value, ".", color=colour, alpha=0.6)
            if not groups[index].finished:
                where = (places[index], groups[index].value)
                axes.annotate(
                    f"stopped at {groups[index].step}",
                    where,
                    xytext=(5, -3),
                    textcoords="offset points",
                    fontsize=7,
                    color="#5b6472",
                )
        axes.set_xticks([place for place, _ in ticks], labels=[text for _, text in ticks])
        axes.set_xlabel(key)
    axes.set_ylabel(sweep.metric)
    axes.grid(alpha=0.3)


def _two_keys(figure: Any, groups: Sequence[Group], keys: Sequence[str], sweep: SweepConfig) -> None:
    """A heat map of a grid with its numbers; of ranges the trials as coloured points."""
    axes = figure.add_subplot()
    (across, ticks_x), (up, ticks_y) = (_places(groups, sweep, key) for key in keys)
    low, high = _range(groups)
    is_grid = all(not isinstance(sweep.space.get(key), RangeConfig) for key in keys)
    if is_grid and max(len(ticks_x), len(ticks_y)) <= _MOST_CELLS:
        cells = [[math.nan] * len(ticks_x) for _ in ticks_y]
        for group, column, row in zip(groups, across, up, strict=True):
            if group.finished:
                cells[int(row)][int(column)] = float(group.value or 0.0)
        drawn = axes.imshow(cells, cmap=_COLOURS, vmin=low, vmax=high, aspect="auto", origin="lower")
        for group, column, row in zip(groups, across, up, strict=True):
            text = short(group.value) + (f"\n± {short(group.spread)}" if len(group.counted) > 1 else "")
            text += "" if group.finished else f"\nstopped at {group.step}"
            is_dark = group.finished and float(group.value or 0.0) < (low + high) / 2
            axes.text(column, row, text, ha="center", va="center", color="white" if is_dark else "black")
    else:
        done = [index for index, group in enumerate(groups) if group.finished]
        rest = [index for index in range(len(groups)) if index not in done]
        axes.scatter([across[index] for index in rest], [up[index] for index in rest], c=_STOPPED, marker="x", label="stopped")
        drawn = axes.scatter(
            [across[index] for index in done],
            [up[index] for index in done],
            c=[groups[index].value for index in done],
            cmap=_COLOURS,
            vmin=low,
            vmax=high,
            s=70,
            edgecolors="black",
            linewidths=0.5,
        )
        if rest:
            axes.legend(fontsize=7)
    axes.set_xticks([place for place, _ in ticks_x], labels=[text for _, text in ticks_x])
    axes.set_yticks([place for place, _ in ticks_y], labels=[text for _, text in ticks_y])
    axes.set_xlabel(keys[0])
    axes.set_ylabel(keys[1])
    figure.colorbar(drawn, ax=axes, label=sweep.metric)


def _parallel(figure: Any, groups: Sequence[Group], keys: Sequence[str], sweep: SweepConfig) -> None:
    """One line per settings over one axis per key, the metric last; stopped ones are grey and dashed and lie behind."""
    import matplotlib

    axes = figure.add_subplot()
    low, high = _range(groups)
    columns = [*(_places(groups, sweep, key) for key in keys), _of_metric(groups, low, high)]
    heights = []
    for column, (places, ticks) in enumerate(columns):
        least, most = min(place for place, _ in ticks), max(place for place, _ in ticks)
        extent = (most - least) or 1.0
        shift = 0.0 if most > least else 0.5
        heights.append([(place - least) / extent + shift for place in places])
        axes.axvline(column, color="#c7ccd4", linewidth=1, zorder=1)
        for place, text in ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
            place_of_text = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (column, (place - least) / extent + shift), **place_of_text, fontsize=7, zorder=5, bbox=box)
    colours = matplotlib.colormaps[_COLOURS]
    for index, group in enumerate(groups):
        path = [height[index] for height in heights]
        share = (float(group.value or 0.0) - low) / (high - low)
        if group.finished:
            axes.plot(range(len(path)), path, color=colours(share), linewidth=1.8, alpha=0.9, zorder=3)
        else:
            axes.plot(range(len(path)), path, "--", color=_STOPPED, linewidth=1.0, zorder=2)
    names = [*short_keys(keys), sweep.metric]
    axes.set_xticks(range(len(columns)), labels=[("\n" if place % 2 else "") + name for place, name in enumerate(names)])
    axes.set_yticks([])
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlim(-0.1, len(columns) - 0.7)
    for side in ("top", "left", "right", "bottom"):
        axes.spines[side].set_visible(False)
    if any(not group.finished for group in groups):
        axes.plot([], [], "--", color=_STOPPED, label="stopped early, at its last value")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.0, 1.08), frameon=False)


def _of_metric(groups: Sequence[Group], low: float, high: float) -> tuple[list[float], list[tuple[float, str]]]:
    """The last axis: values, those of stopped trials beyond its ends drawn at the end, and five ticks."""
    ticks = [low + (high - low) * part / 4 for part in range(5)]
    return [min(max(value, low), high) if math.isfinite(value) else low for value in _values(groups)], [
        (tick, short(tick)) for tick in ticks
    ]


def _ablation(figure: Any, groups: Sequence[Group], sweep: SweepConfig) -> None:
    """A line per step: its mean, its spread, and what it changed. No bars, for the axis does not begin at 0."""
    axes = figure.add_subplot()
    figure.set_size_inches(8, max(3.0, 0.42 * len(groups) + 1.2))
    keys = varied(sweep)
    names = []
    for group in groups:
        words = [f"{key}={short(group.trials[0].overrides[key])}" for key in keys]
        names.append(", ".join([group.trials[0].label, *words]))
    values = _values(groups)
    for place, (value, group) in enumerate(zip(values, groups, strict=True)):
        colour = _FINISHED if group.finished else _STOPPED
        axes.errorbar(value, place, xerr=group.spread or None, marker="o", color=colour, capsize=3)
        change = f"  ({value - values[place - 1]:+.3g})" if place else ""
        axes.text(value + group.spread, place, f"   {short(value)}{change}", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), labels=names)
    axes.invert_yaxis()
    axes.margins(x=0.25)  # room for the texts on the right
    axes.set_xlabel(sweep.metric)
    axes.grid(alpha=0.3, axis="x")
