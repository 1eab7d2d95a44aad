"""A backbone judged while it is trained: a function of weights and images, without labels and with them."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from random_backbone import info_of, random_backbone, tiny_config

from heliostat.errors import TrainingError
from heliostat.evaluation.config import LinearConfig
from heliostat.evaluation.features import backbone_features, to_grey
from heliostat.evaluation.linear import linear_accuracy
from heliostat.evaluation.online import LabelledCrops, OnlineImages, evaluate_online, scored_half
from heliostat.evaluation.spread import feature_std, rankme

CONFIG = tiny_config("mlp")
INFO = info_of(CONFIG)


def pictures(count: int, side: int, seed: int) -> np.ndarray:
    """uint8 (count, side, side, 3) of smooth noise, each in a colour of its own."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack([cv2.resize(one, (side, side), interpolation=cv2.INTER_CUBIC) for one in small])


def labelled(count: int = 30, classes: int = 3) -> LabelledCrops:
    """Classes of a base picture each, with noise on it."""
    rng = np.random.default_rng(5)
    labels = np.arange(count) % classes
    base = pictures(classes, 32, seed=9)[labels].astype(int)
    crops = np.clip(base + rng.normal(0, 60, base.shape), 0, 255).astype(np.uint8)
    return LabelledCrops(crops, labels.astype(np.int64), scored_half(labels))


def images(*, with_labels: bool = True, num_pictures: int = 2) -> OnlineImages:
    whole = tuple(cv2.resize(one, (70, 50)) for one in pictures(max(num_pictures, 1), 64, seed=3))[:num_pictures]
    return OnlineImages(pictures(20, 32, seed=1), labelled() if with_labels else None, whole)


@pytest.fixture(scope="module")
def backbone():
    return random_backbone(CONFIG)


def features(backbone, crops: np.ndarray) -> np.ndarray:
    return backbone_features(backbone, crops, mean=INFO.mean, std=INFO.std, batch_size=7)


def slow_leave_one_out(vectors: np.ndarray, labels: np.ndarray, neighbors: int) -> float:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    right = 0
    for query in range(len(unit)):
        others = [row for row in range(len(unit)) if row != query]
        nearest = sorted(others, key=lambda row: (-float(unit[row] @ unit[query]), row))[:neighbors]
        votes: dict[int, float] = {}
        for row in nearest:
            votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + float(np.exp(unit[row] @ unit[query] / 0.07))
        right += max(sorted(votes), key=lambda label: votes[label]) == labels[query]
    return right / len(unit)


def test_the_metrics_are_those_of_slow_versions(backbone) -> None:
    found, given = evaluate_online(backbone, INFO, images()).metrics, labelled()
    vectors, training = features(backbone, given.crops_NSSC), features(backbone, images().training_NSSC)
    assert found["online/knn_accuracy"] == pytest.approx(slow_leave_one_out(vectors, given.labels_N, 10))
    scored = given.is_scored_N
    probe = linear_accuracy(
        vectors[~scored], given.labels_N[~scored], vectors[scored], given.labels_N[scored], config=LinearConfig()
    )
    assert found["online/linear_accuracy"] == probe
    assert found["online/rankme"] == pytest.approx(rankme(training), rel=1e-5)
    assert found["online/feature_std"] == pytest.approx(feature_std(training), rel=1e-5)
    assert 1 / 3 < found["online/knn_accuracy"] <= 1  # the classes look different


def test_fewer_images_than_neighbours_are_judged_by_all_the_others(backbone) -> None:
    few = labelled(count=6)
    vectors = features(backbone, few.crops_NSSC)
    found = evaluate_online(backbone, INFO, replace(images(), labelled=few)).metrics["online/knn_accuracy"]
    assert found == pytest.approx(slow_leave_one_out(vectors, few.labels_N, 5))


def test_without_labels_there_is_what_needs_none(backbone) -> None:
    assert set(evaluate_online(backbone, INFO, images(with_labels=False)).metrics) == {"online/rankme", "online/feature_std"}


def test_the_result_depends_on_nothing_random_and_leaves_the_generators_alone(backbone) -> None:
    before = torch.get_rng_state()
    first = evaluate_online(backbone, INFO, images())
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.manual_seed(123)
    np.random.seed(4)
    second = evaluate_online(backbone, INFO, images())
    assert (first.metrics, first.picture) == (second.metrics, second.picture)


def test_a_model_of_grey_images_is_judged_on_grey_ones(backbone) -> None:
    found = evaluate_online(backbone, replace_info(grayscale=True), images()).metrics
    grey = features(backbone, to_grey(images().training_NSSC))
    assert found["online/rankme"] == pytest.approx(rankme(grey), rel=1e-5)
    assert found != evaluate_online(backbone, INFO, images()).metrics


def replace_info(**changes):
    return INFO.model_copy(update=changes)


def test_features_that_are_not_finite_are_an_error_with_their_number() -> None:
    broken = random_backbone(CONFIG)
    with torch.no_grad():
        broken.cls_token.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"features of 20 of 20 images are not finite; lower optim\.lr"):
        evaluate_online(broken, INFO, images())


def test_the_picture_shows_images_above_and_16_patches_of_each_below(backbone) -> None:
    result = evaluate_online(backbone, INFO, images())
    sheet = cv2.imdecode(np.frombuffer(result.picture, np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape[:2] == (2 * 144 + 3 * 6, 2 * 144 + 3 * 6)
    assert result.colors_T3.shape == (2 * 16 * 11, 3)  # 70 x 50 pixels: 16 x 11 patches
    assert evaluate_online(backbone, INFO, images(num_pictures=0)).picture == b""


def test_a_picture_takes_order_and_signs_from_the_one_before(backbone) -> None:
    plain = evaluate_online(backbone, INFO, images()).colors_T3
    turned = 255 - plain[:, [2, 0, 1]]
    again = evaluate_online(backbone, INFO, images(), before_T3=turned).colors_T3
    assert np.abs(again.astype(int) - turned).max() <= 1  # rounding
    assert np.abs(again.astype(int) - plain).mean() > 20


def test_weights_that_moved_a_little_give_nearly_the_same_picture() -> None:
    before, moved = random_backbone(CONFIG), random_backbone(CONFIG)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    first = evaluate_online(before, INFO, images()).colors_T3
    second = evaluate_online(moved, INFO, images(), before_T3=first).colors_T3
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.95


def test_a_picture_of_other_patches_is_no_model_for_this_one(backbone) -> None:
    plain = evaluate_online(backbone, INFO, images())
    other = np.zeros((7, 3), np.uint8)
    assert evaluate_online(backbone, INFO, images(), before_T3=other).picture == plain.picture


def test_every_second_image_of_a_class_is_scored() -> None:
    found = scored_half(np.array([0, 0, 1, 0, 1, 2, 0]))
    assert found.tolist() == [False, True, False, False, True, False, True]
