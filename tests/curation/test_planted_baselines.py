"""Descriptors are compared on one pool by one truth; distances agree with counting bits one by one."""

import json
import sys

import cv2
import numpy as np
import pytest
from planted_pool import SOURCES, row, truth

from heliostat.curation.planted_baselines import (
    Descriptor,
    baseline_descriptors,
    baseline_table,
    has_pdq,
    pdq_hashes,
    perceptual_hashes,
    score_pairs_by_descriptor,
)
from heliostat.curation.planted_truth import DIFFERENT, read_truth
from heliostat.data.config import DecodeConfig
from heliostat.data.copy_overlays import drawn_picture
from heliostat.data.decode import decode
from heliostat.data.planted_copies import planted_copy
from heliostat.errors import DataError


def picture(seed: int) -> np.ndarray:
    return drawn_picture(128, 128, np.random.default_rng(seed))


def pool() -> list[np.ndarray]:
    """A picture for each source; copies are real copies."""
    images = [picture(number) for number in range(len(SOURCES))]
    for copy in truth()["planted"]:
        kind = "identical" if copy["kind"] == "exact" else copy["kind"]
        data = planted_copy(images[row(copy["original"])], kind, seed=0, number=0).data
        images[row(copy["file"])] = decode(data, DecodeConfig())
    return images


def test_a_perceptual_hash_is_its_definition_bit_by_bit() -> None:
    image = picture(3)
    (bits,), _ = perceptual_hashes([image])
    grey = cv2.cvtColor(
        cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32), cv2.COLOR_RGB2GRAY
    ).astype(float)
    places = np.arange(32)
    cosine = np.cos(np.pi * (places[None, :] + 0.5) * places[:8, None] / 32) * np.sqrt(2 / 32)
    cosine[0] /= np.sqrt(2)
    low = (cosine @ grey @ cosine.T).ravel()
    clear = np.abs(low - np.median(low[1:])) > 1e-3
    assert clear.sum() >= 62
    assert (bits == (low > np.median(low[1:])))[clear].all()


def test_a_perceptual_hash_survives_compression_and_not_a_mirror() -> None:
    images = [picture(number) for number in range(12)]
    bits, usable = perceptual_hashes(images)
    assert usable.all()
    small = [decode(planted_copy(image, "reencode", seed=0, number=0).data, DecodeConfig()) for image in images]
    assert ((perceptual_hashes(small)[0] != bits).sum(axis=1) <= 10).all()
    assert ((perceptual_hashes([image[:, ::-1] for image in images])[0] != bits).sum(axis=1) > 10).all()


@pytest.mark.parametrize("metric", ["cosine", "hamming"])
def test_scores_agree_with_comparing_pair_by_pair(metric: str) -> None:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((4, 24))
    vectors = centres[rng.integers(4, size=len(SOURCES))] + 0.8 * rng.standard_normal((len(SOURCES), 24))
    usable = rng.random(len(SOURCES)) > 0.15
    if metric == "cosine":
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        threshold = 0.5
    else:
        vectors, threshold = vectors > 0, 7.0

    def alike(one: int, two: int) -> bool:
        if not (usable[one] and usable[two]):
            return False
        close = float(vectors[one] @ vectors[two]) > 0.5 if metric == "cosine" else (vectors[one] != vectors[two]).sum() <= 7
        return bool(close)

    descriptor = Descriptor(lambda _: (vectors, usable), metric, threshold)
    score = score_pairs_by_descriptor([picture(0)] * len(SOURCES), truth(), descriptor, sources=SOURCES)
    table = read_truth(truth(), SOURCES)
    found = {
        kind: sum(alike(row(copy["file"]), row(copy["original"])) for copy in truth()["planted"] if copy["kind"] == kind)
        for kind in ("identical", "flip", "collage", "exact")
    }
    assert {kind: one.found for kind, one in score.recall_by_kind.items()} == found
    assert score.recall.found == sum(found.values()) - found["collage"]
    wrong = [
        (one, two)
        for one in range(len(SOURCES))
        for two in range(one + 1, len(SOURCES))
        if alike(one, two) and table.relation(np.array([one]), np.array([two]))[0] == DIFFERENT
    ]
    assert len(wrong) > 5
    assert (
        score.num_wrong_pairs
        == len(wrong)
        == sum(score.wrong_pairs_by_kind.values())
        == sum(score.wrong_pairs_by_transforms.values())
    )
    assert score.num_wrongly_merged == len({image for pair in wrong for image in pair})
    assert score.num_unusable == (~usable).sum()


def test_one_table_holds_all_descriptors_and_real_copies_are_found() -> None:
    table = baseline_table(pool(), truth(), baseline_descriptors(), sources=SOURCES)
    assert set(table) == {"thumbnail", "pHash"} | ({"PDQ"} if has_pdq() else set())
    for name in ("thumbnail", "pHash"):
        assert table[name].recall_by_kind["identical"].ratio == 1.0
        assert table[name].recall_by_kind["exact"].ratio == 1.0
        assert 0 < table[name].curve.average_precision <= 1
        assert json.loads(json.dumps(table[name].as_dict()))["num_images"] == len(SOURCES)
    assert table["thumbnail"].recall_by_kind["flip"].ratio == 1.0
    assert table["pHash"].recall_by_kind["flip"].ratio == 0.0


def test_pdq_finds_the_same_picture_and_leaves_flat_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if has_pdq():
        images = [drawn_picture(256, 256, np.random.default_rng(number)) for number in range(3)]
        flat = np.full((256, 256, 3), 200, np.uint8)
        bits, usable = pdq_hashes([*images, images[0], flat])
        assert bits.shape == (5, 256)
        assert (bits[0] == bits[3]).all()
        assert (bits[0] != bits[1]).sum() > 31
        assert usable.tolist() == [True, True, True, True, False]
    monkeypatch.setitem(sys.modules, "pdqhash", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match="pip install pdqhash"):
        pdq_hashes([])
    assert set(baseline_descriptors()) == {"thumbnail", "pHash"}


def test_images_and_names_must_match() -> None:
    with pytest.raises(DataError, match="1 images and 20 names"):
        score_pairs_by_descriptor([picture(0)], truth(), baseline_descriptors()["pHash"], sources=SOURCES)


def test_an_empty_pool_scores_nothing() -> None:
    empty = {key: type(value)() for key, value in truth().items() if key != "frames_apart"} | {"frames_apart": 2}
    for descriptor in baseline_descriptors().values():
        score = score_pairs_by_descriptor([], empty, descriptor, sources=[])
        assert (score.num_images, score.num_wrong_pairs, score.recall.ratio) == (0, 0, None)
        assert score.curve.average_precision is None
