"""Spread of features: the numbers of the training's own diagnostics, and the ends of their ranges."""

import numpy as np
import pytest
import torch

from heliostat.evaluation.spread import feature_std, rankme
from heliostat.training import diagnostics


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (2, 3)])
def test_both_numbers_are_those_of_the_trainings_diagnostics(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32) + 0.3
    tensor = torch.from_numpy(features)
    assert rankme(features) == pytest.approx(float(diagnostics.rankme(tensor)), rel=1e-5)
    assert feature_std(features) == pytest.approx(float(diagnostics.feature_std(tensor)), rel=1e-5)


def test_orthogonal_directions_have_full_rank_and_one_direction_has_rank_one() -> None:
    assert rankme(np.eye(8, dtype=np.float32)) == pytest.approx(8, rel=1e-4)
    assert rankme(np.outer(np.arange(1, 9), np.ones(5)).astype(np.float32)) == pytest.approx(1, abs=1e-4)


def test_one_feature_for_all_images_has_no_spread() -> None:
    same = np.tile(np.arange(1, 7, dtype=np.float32), (10, 1))
    assert feature_std(same) == pytest.approx(0, abs=1e-6)
    assert feature_std(np.zeros((4, 3), np.float32)) == 0
