"""Scores of planted copies agree with counting by hand and with slow versions of the curves."""

import json

import numpy as np
import pytest
from planted_pool import SOURCES, row, truth

from heliostat.curation.planted_score import pair_curve, score_planted, share
from heliostat.curation.planted_truth import DIFFERENT, read_truth
from heliostat.errors import DataError


def representatives(**merged: str) -> np.ndarray:
    """Everybody stays but the broken file and the rows named as `file -> representative`."""
    result = np.arange(len(SOURCES))
    result[row("broken/empty.jpg")] = -1
    for file, representative in merged.items():
        result[row(file)] = row(representative)
    return result


MERGED = {
    "planted/identical/0.png": "tiles/brick/0.png",  # right
    "planted/flip/0.jpg": "tiles/brick/0.png",  # right
    "crops/brick/0.png": "tiles/brick/0.png",  # neutral: it overlaps
    "planted/exact/0.png": "tiles/brick/0.png",  # neutral by its original, which is found with it
    "tiles/coins/2.png": "planted/flip/1.jpg",  # right, but the altered copy stays
    "tiles/brick/1.png": "tiles/brick/0.png",  # wrong: texture
    "hard_negatives/chart/1.png": "hard_negatives/chart/0.png",  # wrong: chart
    "video/bikes/1.jpg": "video/bikes/0.jpg",  # neutral: near frame
    "video/bikes/2.jpg": "video/bikes/0.jpg",  # wrong: distant frame
    "planted_evaluation/flip/0.jpg": "planted_evaluation/identical/0.png",  # right
}


def test_recall_precision_and_wrong_merges_are_what_counting_by_hand_gives() -> None:
    score = score_planted(truth(), sources=SOURCES, representative_N=representatives(**MERGED))
    assert {kind: (one.planted, one.found) for kind, one in score.recall_by_kind.items()} == {
        "identical": (1, 1),
        "flip": (2, 2),
        "collage": (1, 0),
        "exact": (1, 1),
    }
    assert (score.recall.planted, score.recall.found) == (4, 4)  # the collage is reported, not counted
    assert (score.easy_recall.planted, score.easy_recall.found) == (1, 1)
    assert (score.num_dropped, score.num_right, score.num_neutral, score.num_wrong) == (10, 4, 3, 3)
    assert score.precision.ratio == pytest.approx(4 / 7)
    assert score.wrong_by_kind == {"chart": 1, "film_frame": 1, "texture_tile": 1}
    assert score.wrong_by_transforms == {"none + none": 3}
    assert list(score.wrong) == [
        {"file": "hard_negatives/chart/1.png", "representative": "hard_negatives/chart/0.png", "kind": "chart"},
        {"file": "video/bikes/2.jpg", "representative": "video/bikes/0.jpg", "kind": "film_frame"},
        {"file": "tiles/brick/1.png", "representative": "tiles/brick/0.png", "kind": "texture_tile"},
    ]
    assert score.curve is None
    assert json.loads(json.dumps(score.as_dict()))["num_wrong"] == 3


def test_lost_groups_and_replaced_originals_are_counted() -> None:
    score = score_planted(truth(), sources=SOURCES, representative_N=representatives(**MERGED))
    # crops/brick/0 is gone with its exact copy, for a tile that overlaps it; tiles/brick/1 is gone but its collage stays.
    assert (score.num_lost, score.num_replaced) == (0, 1)
    worse = MERGED | {"planted/collage/0.jpg": "tiles/brick/0.png"}
    assert score_planted(truth(), sources=SOURCES, representative_N=representatives(**worse)).num_lost == 1
    nothing = score_planted(truth(), sources=SOURCES, representative_N=representatives())
    assert (nothing.num_lost, nothing.num_replaced, nothing.num_dropped, nothing.recall.found) == (0, 0, 0, 0)
    assert nothing.precision.ratio is None


def test_decontamination_counts_copies_through_their_representative_and_innocents_too() -> None:
    dropped = np.zeros(len(SOURCES), np.bool_)
    dropped[row("planted_evaluation/identical/0.png")] = True  # and with it the flip that it represents
    dropped[row("crops/brick/2.png")] = True  # shows evaluation pixels: neither required nor innocent
    dropped[row("video/bikes/0.jpg")] = True  # innocent, and two frames with it
    score = score_planted(truth(), sources=SOURCES, representative_N=representatives(**MERGED), decontaminated_N=dropped)
    assert {kind: one.ratio for kind, one in score.decontamination_by_kind.items()} == {"flip": 1.0, "identical": 1.0}
    assert (score.decontamination.found, score.easy_decontamination.planted) == (2, 1)
    assert (score.innocent.planted, score.innocent.found) == (len(SOURCES) - 4, 3)
    without = score_planted(truth(), sources=SOURCES, representative_N=representatives(**MERGED))
    assert (without.decontamination.found, without.innocent.found) == (0, 0)


def test_copies_that_could_not_be_decoded_are_not_found() -> None:
    result = representatives()
    result[[row("planted/identical/0.png"), row("tiles/brick/0.png")]] = -1
    score = score_planted(truth(), sources=SOURCES, representative_N=result)
    assert score.recall_by_kind["identical"].found == 0
    assert score.num_dropped == 0


@pytest.mark.parametrize(
    ("planted", "found", "low", "high"),
    # Wilson's interval without continuity correction, as statsmodels' proportion_confint(method="wilson") gives it.
    [(10, 8, 0.4902, 0.9433), (30, 30, 0.8865, 1.0), (30, 0, 0.0, 0.1135), (1, 1, 0.2065, 1.0)],
)
def test_intervals_are_wilsons(planted: int, found: int, low: float, high: float) -> None:
    one = share(planted, found)
    assert (one.low, one.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))
    assert one.low <= one.ratio <= one.high


def test_a_share_of_nothing_has_no_ratio() -> None:
    assert share(0, 0).ratio is None
    empty = {key: type(value)() for key, value in truth().items() if key != "frames_apart"} | {"frames_apart": 2}
    score = score_planted(empty, sources=[], representative_N=np.empty(0, np.int64))
    assert (score.recall.planted, score.num_dropped, score.num_lost) == (0, 0, 0)


def slow_curve(table, similarity: dict) -> tuple[float, float]:
    """µAP and recall at precision 0.9 of {(row, row): similarity}, threshold by threshold."""
    planted = {frozenset(pair) for pair in zip(table.copy_M.tolist(), table.original_M.tolist(), strict=True)}
    pairs = {frozenset(pair): value for pair, value in similarity.items()}
    different = {pair for pair in pairs if (table.relation(*(np.array([index]) for index in sorted(pair))) == DIFFERENT).all()}
    average = best = recall_before = 0.0
    for threshold in sorted(set(pairs.values()), reverse=True):
        above = {pair for pair, value in pairs.items() if value >= threshold}
        if not above & (planted | different):
            continue
        recall = len(above & planted) / len(planted)
        precision = len(above & planted) / len(above & (planted | different))
        average += precision * (recall - recall_before)
        best = max(best, recall if precision >= 0.9 else 0.0)
        recall_before = recall
    return average, best


@pytest.mark.parametrize("seed", range(6))
def test_the_curve_agrees_with_a_slow_version_in_any_order_and_direction(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = read_truth(truth(), SOURCES)
    every = [(one, two) for one in range(len(SOURCES)) for two in range(one + 1, len(SOURCES))]
    some = [every[index] for index in rng.choice(len(every), 90, replace=False)]
    similarity = {pair: float(np.float32(rng.integers(0, 12) / 12 + (0.4 if rng.random() < 0.3 else 0))) for pair in some}
    average, best = slow_curve(table, similarity)
    pairs = np.array([pair if rng.random() < 0.5 else pair[::-1] for pair in similarity])
    values = np.array(list(similarity.values()), np.float32)
    doubled = np.concatenate([pairs, pairs[::-1, ::-1], [[3, 3]]]), np.r_[values, values[::-1] - 0.05, np.float32(9)]
    curve = pair_curve(table, *doubled)
    assert curve.average_precision == pytest.approx(average)
    assert curve.recall_at_precision_90 == pytest.approx(best)
    assert [point["threshold"] for point in curve.points] == sorted(
        (point["threshold"] for point in curve.points), reverse=True
    )


def test_a_curve_without_candidates_is_zero_and_one_of_only_planted_pairs_is_one() -> None:
    table = read_truth(truth(), SOURCES)
    assert pair_curve(table, np.empty((0, 2), np.int64), np.empty(0, np.float32)).average_precision == 0.0
    planted = np.stack([table.copy_M, table.original_M], axis=1)
    curve = pair_curve(table, planted, np.linspace(0.5, 0.9, len(planted), dtype=np.float32))
    assert (curve.average_precision, curve.recall_at_precision_90) == (1.0, 1.0)
    score = score_planted(
        truth(), sources=SOURCES, representative_N=representatives(), candidates=(planted, np.ones(len(planted), np.float32))
    )
    assert score.curve is not None
    assert score.curve.average_precision == 1.0


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="3 representatives for 20 images"):
        score_planted(truth(), sources=SOURCES, representative_N=np.arange(3))
    with pytest.raises(DataError, match="2 flags of decontamination for 20 images"):
        score_planted(truth(), sources=SOURCES, representative_N=representatives(), decontaminated_N=np.zeros(2, np.bool_))
    chained = representatives(**{"planted/flip/0.jpg": "tiles/brick/0.png", "tiles/brick/0.png": "tiles/brick/1.png"})
    with pytest.raises(DataError, match="a representative is itself represented"):
        score_planted(truth(), sources=SOURCES, representative_N=chained)
    with pytest.raises(DataError, match="3 similarities for pairs of shape"):
        pair_curve(read_truth(truth(), SOURCES), np.zeros((2, 2), np.int64), np.zeros(3, np.float32))
