"""How well copies were found against what was planted: recall per kind, wrong merges, decontamination, precision and recall.

Every share comes with its count and a 95 % interval (Wilson, J. Am. Stat. Assoc. 22, 1927), since thirty copies of a kind say
less than three hundred.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.planted_truth import DIFFERENT, NEUTRAL, SAME, PlantedTruth, read_truth
from heliostat.data.planted_copies import EASY, REPORT_ONLY
from heliostat.errors import DataError

# Shapes: N images, M planted copies, Q copies of evaluation images, E candidate pairs.

_Z = 1.959964  # 97.5 % point of the normal distribution
_CURVE_POINTS = 41
_PRECISION_OF_RECALL = 0.9  # recall@P90, as the image similarity challenge reports it (arXiv 2106.09672)


@dataclass(frozen=True)
class Share:
    """`found` of `planted`: the ratio and its 95 % interval; ratio and interval are None when nothing was planted."""

    planted: int
    found: int
    ratio: float | None
    low: float | None
    high: float | None


def share(planted: int, found: int) -> Share:
    """A share with Wilson's 95 % interval."""
    if planted == 0:
        return Share(0, 0, None, None, None)
    ratio = found / planted
    centre = (ratio + _Z**2 / (2 * planted)) / (1 + _Z**2 / planted)
    reach = _Z * float(np.sqrt(ratio * (1 - ratio) / planted + _Z**2 / (4 * planted**2))) / (1 + _Z**2 / planted)
    low, high = 0.0 if found == 0 else centre - reach, 1.0 if found == planted else centre + reach
    return Share(planted, found, ratio, low, high)


def counts(names: NDArray[np.str_]) -> dict[str, int]:
    """Name -> how often it comes, most often first, then by name."""
    found, numbers = np.unique(names, return_counts=True)
    return dict(sorted(zip(found.tolist(), numbers.tolist(), strict=True), key=lambda entry: (-entry[1], entry[0])))


def share_by_kind(kinds: NDArray[np.str_], found: NDArray[np.bool_]) -> dict[str, Share]:
    """Kind -> share of its copies that were found, in the order in which kinds first come."""
    return {kind: share(int((kinds == kind).sum()), int(found[kinds == kind].sum())) for kind in dict.fromkeys(kinds.tolist())}


@dataclass(frozen=True)
class Curve:
    """Candidate pairs against the truth, pair by pair; copies of one original with each other and neutral pairs are left out.

    average_precision: µAP, over all pairs in one ranking; a planted pair that is no candidate counts as never found.
    recall_at_precision_90: largest recall at which precision is still 0.9. points: threshold, precision, recall, falling
    thresholds. Equal similarities stand or fall together.
    """

    num_positive: int
    num_candidates: int
    average_precision: float | None
    recall_at_precision_90: float | None
    points: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class PlantedScore:
    """Copy detection and decontamination against planted truth; `as_dict` is JSON-ready.

    recall: of all planted copies but those that are report-only, easy_recall: of identical, re-encoded and resized ones,
    recall_by_kind: of each kind. A copy is found when it shares a component with its original.
    num_dropped = num_right + num_neutral + num_wrong: images that another one represents, which is a copy of the same original,
    overlaps it or is a near frame of the film, or has nothing to do with it. precision: num_right of num_right + num_wrong.
    wrong_by_kind: what was confused; wrong_by_transforms: how the two images were altered, such as "none + pad"; wrong: every
    such drop with its representative, to be looked at.
    num_lost: planted groups of which no image is left and whose original something unrelated stands for. num_replaced:
    originals that stay only as an altered copy.
    decontamination_by_kind: copies of evaluation images that were dropped. innocent: of the images without any pixel of an
    evaluation image, those that decontamination dropped (the fewer the better). curve: when candidate pairs were given.
    """

    num_images: int
    recall: Share
    easy_recall: Share
    recall_by_kind: Mapping[str, Share]
    num_dropped: int
    num_right: int
    num_neutral: int
    num_wrong: int
    precision: Share
    wrong_by_kind: Mapping[str, int]
    wrong_by_transforms: Mapping[str, int]
    images_by_negative: Mapping[str, int]
    wrong: Sequence[Mapping[str, str]]
    num_lost: int
    num_replaced: int
    decontamination: Share
    easy_decontamination: Share
    decontamination_by_kind: Mapping[str, Share]
    innocent: Share
    curve: Curve | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def score_planted(
    truth: Mapping[str, Any],
    *,
    sources: Sequence[str],
    representative_N: NDArray[np.int64],
    decontaminated_N: NDArray[np.bool_] | None = None,
    candidates: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None,
) -> PlantedScore:
    """Score what copy detection did to the images of a planted pool.

    sources: names of all images. representative_N: row of the image that stays for each one once exact copies, hash copies and
    embedding copies are merged: itself where it stays, -1 for an image that never took part (it could not be decoded). Images
    of one representative are one component. decontaminated_N: dropped for showing an evaluation image; what such an image
    represents counts as dropped too. candidates: pairs of rows (E, 2) with similarities (E,), for the curve.
    Raises DataError when the arrays do not fit each other or the truth.
    """
    table = read_truth(truth, sources)
    _check(sources, representative_N, decontaminated_N)
    copies, originals = representative_N[table.copy_M], representative_N[table.original_M]
    found_M = (copies >= 0) & (copies == originals)
    counted_M = ~np.isin(table.kind_M, list(REPORT_ONLY))
    easy_M = np.isin(table.kind_M, list(EASY))
    removed_N = _removed(representative_N, decontaminated_N)
    innocent_N = table.innocent_N & (representative_N >= 0)
    easy_Q = np.isin(table.evaluation_kind_Q, list(EASY))
    removed_Q = removed_N[table.evaluation_Q]
    return PlantedScore(
        num_images=len(sources),
        recall=_share_of(found_M[counted_M]),
        easy_recall=_share_of(found_M[easy_M]),
        recall_by_kind=share_by_kind(table.kind_M, found_M),
        **_drops(table, representative_N),
        images_by_negative=table.sizes_of_negatives(),
        **_groups(table, representative_N),
        decontamination=_share_of(removed_Q[~np.isin(table.evaluation_kind_Q, list(REPORT_ONLY))]),
        easy_decontamination=_share_of(removed_Q[easy_Q]),
        decontamination_by_kind=share_by_kind(table.evaluation_kind_Q, removed_Q),
        innocent=_share_of(removed_N[innocent_N]),
        curve=None if candidates is None else pair_curve(table, *candidates),
    )


def _share_of(found: NDArray[np.bool_]) -> Share:
    return share(len(found), int(found.sum()))


def _check(sources: Sequence[str], representative_N: NDArray[np.int64], decontaminated_N: NDArray[np.bool_] | None) -> None:
    num_images = len(sources)
    for name, array in (("representatives", representative_N), ("flags of decontamination", decontaminated_N)):
        if array is not None and len(array) != num_images:
            raise DataError(f"{len(array)} {name} for {num_images} images; give one for each")
    taking_part = representative_N[representative_N >= 0]
    if len(taking_part) and (taking_part.max() >= num_images or (representative_N[taking_part] != taking_part).any()):
        raise DataError("a representative is itself represented by another image; merge exact, hash and embedding copies first")


def _removed(representative_N: NDArray[np.int64], decontaminated_N: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Dropped by decontamination, or represented by an image that was."""
    if decontaminated_N is None:
        return np.zeros(len(representative_N), np.bool_)
    through = np.where(representative_N >= 0, representative_N, np.arange(len(representative_N)))
    return np.asarray(decontaminated_N | decontaminated_N[through], np.bool_)


def _drops(table: PlantedTruth, representative_N: NDArray[np.int64]) -> dict[str, Any]:
    """What became of the images that another one represents."""
    dropped = np.flatnonzero((representative_N >= 0) & (representative_N != np.arange(len(representative_N))))
    relation = table.relation(dropped, representative_N[dropped])
    wrong = dropped[relation == DIFFERENT]
    kinds = table.kinds_of_pairs(wrong, representative_N[wrong])
    num_right, num_wrong = int((relation == SAME).sum()), len(wrong)
    listed = zip(wrong.tolist(), representative_N[wrong].tolist(), kinds.tolist(), strict=True)
    return {
        "num_dropped": len(dropped),
        "num_right": num_right,
        "num_neutral": int((relation == NEUTRAL).sum()),
        "num_wrong": num_wrong,
        "precision": share(num_right + num_wrong, num_right),
        "wrong_by_kind": counts(kinds),
        "wrong_by_transforms": counts(table.transforms_of_pairs(wrong, representative_N[wrong])),
        "wrong": sorted(
            ({"file": table.sources[row], "representative": table.sources[kept], "kind": kind} for row, kept, kind in listed),
            key=lambda drop: (drop["kind"], drop["file"]),
        ),
    }


def _groups(table: PlantedTruth, representative_N: NDArray[np.int64]) -> dict[str, Any]:
    """Planted groups that vanished, and originals that an altered copy stands for."""
    stays_N = representative_N == np.arange(len(representative_N))
    originals = np.unique(table.original_M)
    originals = originals[representative_N[originals] >= 0]
    num_left = np.bincount(table.root_N[stays_N], minlength=len(stays_N))[originals]
    relation = table.relation(originals, representative_N[originals])
    return {
        "num_lost": int(((num_left == 0) & (relation == DIFFERENT)).sum()),
        "num_replaced": int(((relation == SAME) & ~stays_N[originals]).sum()),
    }


def pair_curve(table: PlantedTruth, pairs_E2: NDArray[np.int64], similarity_E: NDArray[np.float32]) -> Curve:
    """Precision and recall over falling thresholds; a pair may be given in both directions and counts once, at its best."""
    if pairs_E2.shape != (len(similarity_E), 2):
        raise DataError(f"{len(similarity_E)} similarities for pairs of shape {pairs_E2.shape}; give one for each pair")
    first, second = pairs_E2.min(axis=1, initial=len(table.sources)), pairs_E2.max(axis=1, initial=-1)
    order = np.lexsort((-similarity_E, second, first))
    first, second, similarity = first[order], second[order], similarity_E[order]
    key = first * len(table.sources) + second
    fresh = (first != second) & np.r_[True, key[1:] != key[:-1]][: len(key)]
    first, second, similarity = first[fresh], second[fresh], similarity[fresh]
    relation = table.relation(first, second)
    positive = (relation == SAME) & _is_planted_pair(table, first, second)
    counted = positive | (relation == DIFFERENT)
    return _curve(similarity[counted], positive[counted], len(table.copy_M))


def _is_planted_pair(table: PlantedTruth, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray((table.root_N[first] == second) | (table.root_N[second] == first), np.bool_)


def _curve(similarity: NDArray[np.float32], positive: NDArray[np.bool_], num_positive: int) -> Curve:
    order = np.argsort(-similarity, kind="stable")
    similarity, hits = similarity[order], np.cumsum(positive[order])
    last = np.r_[similarity[1:] != similarity[:-1], True][: len(similarity)]  # of each run of equal similarities
    ends = np.flatnonzero(last)
    hits, num_ranked = hits[ends], ends + 1
    if num_positive == 0 or len(ends) == 0:
        return Curve(num_positive, len(similarity), 0.0 if num_positive else None, 0.0 if num_positive else None, ())
    precision, recall = hits / num_ranked, hits / num_positive
    average = float((precision * np.diff(hits, prepend=0)).sum() / num_positive)
    good = recall[precision >= _PRECISION_OF_RECALL]
    chosen = np.unique(np.searchsorted(recall, np.linspace(0, recall[-1], _CURVE_POINTS)).clip(0, len(ends) - 1))
    points = [
        {"threshold": float(similarity[ends[at]]), "precision": float(precision[at]), "recall": float(recall[at])}
        for at in chosen.tolist()
    ]
    return Curve(num_positive, len(similarity), average, float(good.max(initial=0.0)), points)
