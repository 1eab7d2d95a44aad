"""What the contact sheets show: pairs at the margin, large components, hits, clusters, detectors, a draw of each reason."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.sheets import Frame, Review, Sheet, SheetsConfig, Strip, decision_of

# Shapes: N rows of the pool, E edges of the copy graph.


def choose_sheets(review: Review, config: SheetsConfig) -> list[Sheet]:
    """All sheets for which there is something to show, the least certain decisions first."""
    makers = (
        margin_pairs,
        largest_components,
        evaluation_hits,
        matched_clusters,
        near_nsfw_threshold,
        blurred_faces,
        by_reason,
    )
    return [sheet for make in makers for sheet in [make(review, config)] if sheet is not None and sheet.strips]


def margin_pairs(review: Review, config: SheetsConfig) -> Sheet | None:
    """Pairs whose similarity is next to the threshold, side by side."""
    pairs, threshold = review.pairs, review.settings.get("dup_threshold")
    if pairs is None or threshold is None:
        return None
    distance = np.abs(pairs.similarity.astype(np.float64) - threshold)
    near = np.flatnonzero(distance <= config.margin)
    order = near[np.lexsort((pairs.second[near], pairs.first[near], distance[near]))]
    chosen = _from_both_sides(order, pairs.similarity[order] > threshold, config.pairs)
    strips = []
    for edge in chosen.tolist():
        similarity = float(pairs.similarity[edge])
        side = "a copy" if similarity > threshold else "no copy"
        rows = int(pairs.first[edge]), int(pairs.second[edge])
        strips.append(Strip(f"similarity {similarity:.4f}: {side}", tuple(Frame(row) for row in rows)))
    note = f"Pairs within {config.margin:.3g} of the threshold {threshold:.3g}, the nearest to it first. Which side is right?"
    return Sheet("margin", "Pairs at the margin", note, tuple(strips), len(near))


def _from_both_sides(order: NDArray[np.int64], is_above: NDArray[np.bool_], limit: int) -> NDArray[np.int64]:
    """The first of `order`, half of each side; where one side has fewer, the other fills up. The order stays."""
    above, below = np.flatnonzero(is_above), np.flatnonzero(~is_above)
    half = limit // 2
    num_above = min(len(above), max(limit - half, limit - len(below)))
    num_below = min(len(below), limit - num_above)
    return np.asarray(order[np.sort(np.concatenate([above[:num_above], below[:num_below]]))], np.int64)


def largest_components(review: Review, config: SheetsConfig) -> Sheet | None:
    """The components with most images: the representative, then those least like it."""
    facts = review.facts
    if facts.component is None or facts.representative is None or facts.similarity_to_representative is None:
        return None
    sizes = facts.component_size
    copies = np.flatnonzero(sizes > 1)
    largest = copies[np.argsort(-sizes[copies], kind="stable")][: config.components]
    members = _members(facts.component, largest)
    strips = []
    for number, rows in zip(largest.tolist(), members, strict=True):
        similarity = np.where(facts.representative[rows] == rows, -2.0, facts.similarity_to_representative[rows])
        shown = rows[np.lexsort((rows, similarity))][: config.images_per_component]
        frames = [
            Frame(
                row, "represents it" if facts.representative[row] == row else f"{facts.similarity_to_representative[row]:.3f}"
            )
            for row in shown.tolist()
        ]
        strips.append(Strip(f"component {number}: {len(rows):,} images", tuple(frames)))
    note = "The representative stays; below the others is their similarity to it, the lowest first."
    return Sheet("components", "Largest components", note, tuple(strips), len(copies))


def _members(groups: NDArray[np.int64], wanted: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of each wanted group, ascending; one pass over all rows."""
    if not len(wanted):
        return []
    rows = np.flatnonzero(np.isin(groups, wanted))
    order = rows[np.argsort(groups[rows], kind="stable")]
    ordered = groups[order]
    return [order[slice(*np.searchsorted(ordered, [number, number + 1]))] for number in wanted.tolist()]


def evaluation_hits(review: Review, config: SheetsConfig) -> Sheet | None:
    """Every image above the threshold to an evaluation image, beside that image."""
    facts, threshold = review.facts, review.settings.get("decontamination_threshold")
    if facts.reference is None or facts.similarity_to_reference is None or threshold is None:
        return None
    similarity = facts.similarity_to_reference
    hits = np.flatnonzero((facts.reference >= 0) & (similarity > threshold))
    shown = hits[np.argsort(similarity[hits], kind="stable")][: config.evaluation_hits]
    strips = []
    for row in shown.tolist():
        reference = int(facts.reference[row])
        known = facts.evaluation_set is not None and len(facts.evaluation_sets) > 0
        name = facts.evaluation_sets[int(facts.evaluation_set[reference])] if known and facts.evaluation_set is not None else ""
        frames = (Frame(row), Frame(reference, name, is_reference=True))
        strips.append(Strip(f"similarity {similarity[row]:.4f}", frames))
    note = (
        f"Left: an image of the pool. Right: the evaluation image that it shows, above {threshold:.3g}; the least sure first."
    )
    return Sheet("evaluation", "Evaluation images in the pool", note, tuple(strips), len(hits))


def matched_clusters(review: Review, config: SheetsConfig) -> Sheet | None:
    """A draw of every matched cluster, so that quotas can be set by eye."""
    if review.matched is None:
        return None
    cluster = review.matched.astype(np.int64)
    sizes = np.bincount(cluster[cluster >= 0])
    matched = np.flatnonzero(sizes)
    largest = matched[np.argsort(-sizes[matched], kind="stable")][: config.clusters]
    strips = []
    for number, rows in zip(largest.tolist(), _members(cluster, largest), strict=True):
        shown = _draw(rows, config.images_per_cluster, [config.seed, 1, number])
        strips.append(Strip(f"cluster {number}: {len(rows):,} images", _frames(review, shown)))
    note = "Images drawn from clusters that hold enough curated images. Do they look like the curated set?"
    return Sheet("clusters", "Matched clusters", note, tuple(strips), len(matched))


def near_nsfw_threshold(review: Review, config: SheetsConfig) -> Sheet | None:
    """Scores on both sides of the threshold; pictures coarse enough to be bearable."""
    threshold = review.settings.get("max_nsfw_score")
    if review.nsfw is None or threshold is None:
        return None
    score = review.nsfw.astype(np.float64)
    scored = np.flatnonzero(np.isfinite(score))
    order = scored[np.lexsort((scored, np.abs(score[scored] - threshold)))]
    chosen = _from_both_sides(order, score[order] > threshold, config.images_per_reason)
    chosen = chosen[np.argsort(score[chosen], kind="stable")]
    frames = tuple(
        Frame(row, f"score {score[row]:.3f}, {'above' if score[row] > threshold else 'not above'}", is_pixelated=True)
        for row in chosen.tolist()
    )
    note = f"Scores next to the threshold {threshold:.3g}, lowest first; pictures are made coarse on purpose."
    return Sheet("nsfw", "NSFW scores at the threshold", note, (Strip("", frames),) if frames else (), len(scored))


def blurred_faces(review: Review, config: SheetsConfig) -> Sheet | None:
    """A draw of kept images with faces, as they are in the training set."""
    if review.num_faces is None:
        return None
    rows = np.flatnonzero((review.num_faces > 0) & (review.decisions.cause == 0))
    frames = tuple(
        Frame(row, f"faces: {review.num_faces[row]}", is_kept=True)
        for row in _draw(rows, config.images_per_reason, [config.seed, 2]).tolist()
    )
    note = "Kept images in which the detector found faces, after blurring. Is any face still recognisable?"
    return Sheet("faces", "Faces after blurring", note, (Strip("", frames),) if frames else (), len(rows))


def by_reason(review: Review, config: SheetsConfig) -> Sheet | None:
    """A draw of what every stage dropped for every reason; what the NSFW filter dropped is coarse here too."""
    cause = review.decisions.cause
    strips = []
    for number, (stage, reason) in enumerate(review.decisions.causes):
        rows = np.flatnonzero(cause == number) if stage else np.empty(0, np.int64)
        if len(rows):
            shown = _draw(rows, config.images_per_reason, [config.seed, 3, number])
            frames = tuple(Frame(row, is_pixelated=stage == "nsfw") for row in shown.tolist())
            strips.append(Strip(f"{stage}, {reason}: {len(rows):,} images", frames))
    return Sheet("reasons", "Dropped, by reason", "A draw of every stage and reason.", tuple(strips), len(strips))


def _draw(rows: NDArray[np.int64], count: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """At most `count` of the rows, ascending."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def _frames(review: Review, rows: NDArray[np.int64]) -> tuple[Frame, ...]:
    return tuple(Frame(row, decision_of(review, row)) for row in rows.tolist())
