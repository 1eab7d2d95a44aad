"""`heliostat what-if dup_threshold=0.7`: what another threshold would have done, from stored edges and scores.

Nothing is decoded, embedded or searched again. The edges of the copy graph are stored from a floor on, far below the threshold,
so components, representatives and drops follow for every threshold above that floor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.edges import Edges
from heliostat.curation.pool_facts import PoolFacts
from heliostat.curation.settle import Similarities, settle, similarities_of_edges
from heliostat.errors import UsageError

# Shapes: N rows of the pool, E edges, n rows that reached the copies stage.

Settings = Mapping[str, float | None]

KEYS = ("dup_threshold", "decontamination_threshold", "max_nsfw_score", "min_similarity_to_representative")
_STAGES_BEFORE_COPIES = ("decode", "forgotten", "nsfw", "exact", "hash")
_TOLD = ("nsfw", "copies", "decontaminate")
_NUM_PAIRS = 10
_SWEEP_STEPS = 7


@dataclass(frozen=True)
class Outcome:
    """One setting and what it does.

    dropped: by stage, of those that can be told. representative: int64 (N,), -1 where a row did not reach the copies stage.
    num_unknown: images that the guard split off because their similarity to the representative is not stored.
    """

    settings: Settings
    dropped: Mapping[str, int]
    num_left: int
    num_components: int
    num_components_of_copies: int
    largest_component: int
    representative: NDArray[np.int64]
    num_unknown: int


def outcome(facts: PoolFacts, edges: Edges, settings: Settings, similarities: Similarities) -> Outcome:
    """Judge again: nsfw, copies, decontaminate. edges: at least all above settings["dup_threshold"]."""
    entering = ~facts.dropped_by([stage for stage in _STAGES_BEFORE_COPIES if stage != "nsfw"])
    limit = settings.get("max_nsfw_score")
    above = np.zeros(len(entering), np.bool_) if limit is None else facts.nsfw > np.float32(limit)
    bad = entering & (above | facts.dropped_by(["nsfw"]))
    reached = entering & ~bad
    representative, num_unknown = _representatives(facts, edges, settings, similarities, reached)
    copies = reached & (representative != np.arange(len(reached)))
    shows = _contaminated(facts, settings, representative, reached)
    sizes = np.bincount(representative[reached], minlength=len(reached))
    dropped = {"nsfw": int(bad.sum()), "copies": int(copies.sum()), "decontaminate": int((shows & ~copies).sum())}
    return Outcome(
        dict(settings),
        dropped,
        int((reached & ~copies & ~shows).sum()),
        int((sizes > 0).sum()),
        int((sizes > 1).sum()),
        int(sizes.max(initial=0)),
        np.where(reached, representative, -1),
        num_unknown,
    )


def _representatives(
    facts: PoolFacts, edges: Edges, settings: Settings, similarities: Similarities, reached: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], int]:
    """(the row that stays for each row, similarities that were not known and taken for less than the guard)."""
    threshold, guard = settings.get("dup_threshold"), settings.get("min_similarity_to_representative")
    if threshold is None:
        return np.arange(len(facts.rank)), 0
    chosen = edges.above(threshold)
    inside = reached[chosen.first] & reached[chosen.second]
    chosen = Edges(chosen.first[inside], chosen.second[inside], chosen.similarity[inside])
    settled = settle(chosen, facts.rank, -1.0 if guard is None else guard, similarities)
    return settled.representative, settled.num_unknown


def _contaminated(
    facts: PoolFacts, settings: Settings, representative: NDArray[np.int64], reached: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Rows whose component holds an image that shows an evaluation image."""
    limit = settings.get("decontamination_threshold")
    if limit is None:
        return np.zeros(len(reached), np.bool_)
    hits = np.zeros(len(reached), np.bool_)
    hits[representative[reached & (facts.similarity_to_reference > np.float32(limit))]] = True
    return reached & hits[representative]


@dataclass(frozen=True)
class WhatIf:
    """then: as the recorded settings judge from the same edges; now: as the new ones do.

    recorded: what the ledger says each stage dropped. pairs: up to ten (id, id, similarity) that change sides, those nearest to
    the new threshold first; num_pairs: how many do. num_now_kept, num_now_dropped: images that change sides.
    """

    then: Outcome
    now: Outcome
    recorded: Mapping[str, int]
    pairs: tuple[tuple[str, str, float], ...]
    num_pairs: int
    num_now_kept: int
    num_now_dropped: int

    def lines(self) -> list[str]:
        """For people."""
        changed = {name: (self.then.settings.get(name), value) for name, value in self.now.settings.items()}
        named = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items() if old != new) or "nothing changes"
        lines = [named, f"{'':16} {'then':>14} {'now':>14}"]
        lines += [f"dropped {stage:8} {self.then.dropped[stage]:>14,} {self.now.dropped[stage]:>14,}" for stage in _TOLD]
        for words, name in (
            ("left", "num_left"),
            ("components", "num_components"),
            ("with copies", "num_components_of_copies"),
        ):
            lines.append(f"{words:16} {getattr(self.then, name):>14,} {getattr(self.now, name):>14,}")
        lines.append(f"{'largest':16} {self.then.largest_component:>14,} {self.now.largest_component:>14,}")
        lines.append(f"images that come back: {self.num_now_kept:,}; that go: {self.num_now_dropped:,}")
        lines += self._pairs()
        off = {stage: count for stage, count in self.recorded.items() if count != self.then.dropped[stage]}
        for stage, count in off.items():
            lines.append(
                f"caution: stage {stage} dropped {count:,}, its facts give {self.then.dropped[stage]:,} at the same setting; "
                "the run that is asked about stored fewer facts than it used"
            )
        if self.now.num_unknown:
            lines.append(
                f"{self.now.num_unknown:,} images were split off because their similarity to the best one is not stored"
            )
        return lines

    def _pairs(self) -> list[str]:
        if not self.num_pairs:
            return []
        shown = [f"  {first[:12]}  {second[:12]}  similarity {value:.4f}" for first, second, value in self.pairs]
        return [f"pairs that change sides: {self.num_pairs:,}, nearest to the new threshold", *shown]


def what_if(
    facts: PoolFacts,
    edges: Edges,
    overrides: Mapping[str, float],
    *,
    edge_floor: float,
    similarities: Similarities | None = None,
) -> WhatIf:
    """Compare what was decided with what other thresholds would decide.

    edges: all stored ones, from edge_floor on. similarities: of images to representatives; from the edges when left out.
    Raises UsageError for a key that cannot be asked about, and for thresholds below what is stored.
    """
    settings = _changed(facts, overrides, edge_floor)
    known = similarities or similarities_of_edges(edges, len(facts.rank))
    then = outcome(facts, edges, facts.settings, known)
    now = outcome(facts, edges, settings, known)
    old, new = facts.settings.get("dup_threshold"), settings.get("dup_threshold")
    between = np.zeros(edges.num_edges, np.bool_)
    if old is not None and new is not None:
        between = (edges.similarity > np.float32(min(old, new))) & (edges.similarity <= np.float32(max(old, new)))
    changed = np.flatnonzero(between)
    distance = np.abs(edges.similarity[changed].astype(np.float64) - (new or 0.0))
    shown = changed[np.lexsort((edges.second[changed], edges.first[changed], distance))][:_NUM_PAIRS]
    pairs = [(_hex(facts, edges.first[edge]), _hex(facts, edges.second[edge]), float(edges.similarity[edge])) for edge in shown]
    kept_then, kept_now = (_is_left(facts, one) for one in (then, now))
    recorded = {stage: int(facts.dropped_by([stage]).sum()) for stage in _TOLD}
    return WhatIf(
        then,
        now,
        recorded,
        tuple(pairs),
        len(changed),
        int((kept_now & ~kept_then).sum()),
        int((kept_then & ~kept_now).sum()),
    )


def _is_left(facts: PoolFacts, one: Outcome) -> NDArray[np.bool_]:
    reached = one.representative >= 0
    own = one.representative == np.arange(len(reached))
    shows = _contaminated(facts, one.settings, np.maximum(one.representative, 0), reached)
    return np.asarray(reached & own & ~shows, np.bool_)


def _hex(facts: PoolFacts, row: np.int64) -> str:
    return bytes(facts.ids[int(row)]).hex()


def _changed(facts: PoolFacts, overrides: Mapping[str, float], edge_floor: float) -> dict[str, float | None]:
    """The settings with the overrides. Raises UsageError for what the stored facts cannot answer."""
    for key, value in overrides.items():
        _check_key(key)
        if key != "max_nsfw_score" and value < edge_floor:
            raise UsageError(
                f"{key}={value} is below {edge_floor}, where stored similarities begin; dedup with a lower edge_floor"
            )
        if facts.settings.get(key) is None:
            raise UsageError(f"{key} was not in force here, so nothing was stored about it; curate with it once")
    old, new = facts.settings.get("max_nsfw_score"), overrides.get("max_nsfw_score")
    if old is not None and new is not None and new > old:
        raise UsageError(f"max_nsfw_score={new} is above {old}: images above that were never compared; dedup again with it")
    return {**facts.settings, **overrides}


def parse_overrides(words: Sequence[str]) -> list[dict[str, float]]:
    """`key=value` words as settings to compare; one `key=low..high` makes a sweep of seven. Raises UsageError."""
    settings = [dict[str, float]()]
    for word in words:
        key, equals, text = word.partition("=")
        if equals:
            _check_key(key)
        if key in settings[0]:
            raise UsageError(f"{key} is given twice; give it once, or as a range {key}=0.6..0.8")
        low, dots, high = text.partition("..")
        try:
            values = np.linspace(float(low), float(high), _SWEEP_STEPS).round(6).tolist() if dots else [float(low)]
        except ValueError:
            values = []
        if not equals or not all(-1 <= value <= 1 for value in values) or not values:
            raise UsageError(f"{word!r} is not key=number or key=low..high with numbers from -1 to 1")
        settings = [{**known, key: value} for known in settings for value in values]
    if len(settings) > _SWEEP_STEPS:
        raise UsageError("only one key can have a range; give single values for the others")
    return settings


def _check_key(key: str) -> None:
    if key not in KEYS:
        raise UsageError(f"what-if knows no {key[:80]}; ask about {', '.join(KEYS)}")


def sweep_lines(results: Sequence[WhatIf]) -> list[str]:
    """A table of several settings, the recorded one first."""
    outcomes = [results[0].then, *(result.now for result in results)]
    names = [name for name in KEYS if len({one.settings.get(name) for one in outcomes}) > 1] or [KEYS[0]]
    head = [*names, "copies", "decontaminate", "left", "components", "largest"]
    rows = [
        [
            *(f"{one.settings.get(name)}" for name in names),
            *(f"{one.dropped[stage]:,}" for stage in ("copies", "decontaminate")),
            *(f"{count:,}" for count in (one.num_left, one.num_components, one.largest_component)),
        ]
        for one in outcomes
    ]
    rows[0][0] += " (as it was)"
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
