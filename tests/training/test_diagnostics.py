import math

import pytest
import torch

from heliostat.training.diagnostics import feature_std, prototype_usage, rankme, teacher_entropy


def test_feature_std_is_one_for_isotropic_and_zero_for_identical_features():
    torch.manual_seed(0)
    assert feature_std(torch.randn(4000, 32)).item() == pytest.approx(1, abs=0.02)
    assert feature_std(torch.randn(1, 32).repeat(50, 1)).item() == pytest.approx(0, abs=1e-5)


def test_rankme_counts_the_directions_in_use():
    assert rankme(torch.eye(8)).item() == pytest.approx(8, rel=1e-4)
    torch.manual_seed(0)
    two_directions = torch.randn(100, 1) @ torch.randn(1, 16)
    assert rankme(two_directions).item() == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(4, 4)).isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rankme_of_features_that_are_not_finite_is_nan_and_no_error(bad: float):
    features_RD = torch.eye(8)
    features_RD[3, 2] = bad
    assert rankme(features_RD).isnan()


def test_teacher_entropy_lies_between_zero_and_the_log_of_the_prototypes():
    assert teacher_entropy(torch.full((5, 16), 1 / 16)).item() == pytest.approx(math.log(16))
    assert teacher_entropy(torch.eye(16)).item() == 0


def test_prototype_usage_is_the_share_of_prototypes_that_get_rows():
    assert prototype_usage(torch.eye(16)).item() == pytest.approx(1)
    assert prototype_usage(torch.eye(16)[:4]).item() == pytest.approx(0.25)
    assert prototype_usage(torch.eye(16)[:1].repeat(9, 1)).item() == pytest.approx(1 / 16)
