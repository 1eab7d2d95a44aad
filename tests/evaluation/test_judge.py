"""The table: the same pixels for everyone, spreads over seeds, and margins over the right baselines."""

import numpy as np
import pytest
import torch

from heliostat.errors import DataError
from heliostat.evaluation.config import EvaluateConfig, KnnConfig
from heliostat.evaluation.judge import Judge, LabelledImages, Row, margins, random_backbone, rows_as_dicts
from heliostat.models.config import BackboneConfig, HeadConfig
from heliostat.models.stored import ModelInfo

TINY = BackboneConfig(arch="vit_tiny", embed_dim=32, depth=2, num_heads=2, img_size=16, patch_size=8)


def labelled(count: int, seed: int) -> LabelledImages:
    """Two classes that colour tells apart and luminance does not."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for index in range(count):
        image = np.zeros((20, 24, 3), np.uint8)
        red = index % 2 == 0
        image[..., 0 if red else 1] = 150 if red else round(150 * 0.299 / 0.587)
        images.append((image + rng.integers(0, 4, image.shape)).astype(np.uint8))
        labels.append("red" if red else "green")
    return LabelledImages.from_names(images, labels)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(labelled(24, 0), labelled(16, 1), EvaluateConfig(image_size=16, random_seeds=3, knn=KnnConfig(neighbors=3)))


def info(grayscale: bool = False) -> ModelInfo:
    head = HeadConfig(out_dim=8)
    pixels = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return ModelInfo(backbone=TINY, dino_head=head, grayscale=grayscale, steps=1, images_seen=1, **pixels)


def test_labels_are_numbered_by_name_and_foreign_ones_refused() -> None:
    bank = labelled(4, 0)
    assert bank.names == ("green", "red")
    assert bank.labels_N.tolist() == [1, 0, 1, 0]
    for label in ("blue", None):
        with pytest.raises(DataError, match="is not one of the 2 classes; lay images in one folder per class"):
            LabelledImages.from_names(bank.images[:1], [label], bank.names)


def test_colour_helps_in_colour_and_not_in_grey(judge: Judge) -> None:
    colour, grey = (judge.baselines(version) for version in ("colour", "grey"))
    assert [row.name for row in colour] == ["raw pixels", "colour histogram"]
    assert [row.name for row in grey] == ["raw pixels", "luminance histogram"]
    assert colour[0].knn == colour[1].knn == 1.0
    assert grey[0].knn < 0.9


def test_random_weights_are_a_mean_over_seeds_and_leave_the_random_state_alone(judge: Judge) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    row = judge.random_weights(info(), "colour")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert row.num_seeds == 3
    assert row == judge.random_weights(info(), "colour")
    first, second = (random_backbone(TINY, seed).state_dict() for seed in (0, 1))
    assert not torch.equal(first["cls_token"], second["cls_token"])


def test_the_spread_is_the_sample_standard_deviation(judge: Judge) -> None:
    row = judge.row("x", "colour", [(0.1, 0.5), (0.2, 0.5), (0.6, 0.5)])
    assert row.knn == pytest.approx(0.3)
    assert row.knn_std == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))
    assert (row.linear, row.linear_std, row.num_seeds) == (0.5, 0.0, 3)
    assert judge.row("x", "colour", [(0.1, 0.5)]).knn_std == 0.0


def test_margins_compare_with_random_weights_and_the_best_baseline_of_the_same_version() -> None:
    rows = [
        Row("raw pixels", "colour", 0.30, 0.0),
        Row("colour histogram", "colour", 0.60, 0.0),
        Row("random weights", "colour", 0.50, 0.0, knn_std=0.03, num_seeds=3),
        Row("teacher", "colour", 0.75, 0.0, knn_std=0.04, num_seeds=3),
        Row("raw pixels", "grey", 0.10, 0.0),
        Row("luminance histogram", "grey", 0.05, 0.0),
        Row("random weights", "grey", 0.20, 0.0, num_seeds=3),
        Row("student", "grey", 0.15, 0.0),
    ]
    teacher, student = margins(rows)
    assert (teacher["name"], teacher["best_baseline"]) == ("teacher", "colour histogram")
    assert teacher["above_random_points"] == pytest.approx(25)
    assert teacher["above_best_baseline_points"] == pytest.approx(15)
    assert teacher["spread_points"] == pytest.approx(5)
    assert (student["best_baseline"], student["above_random_points"]) == ("raw pixels", pytest.approx(-5))
    assert rows_as_dicts(rows)[3]["knn"] == 0.75
