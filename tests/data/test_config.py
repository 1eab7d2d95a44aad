import pytest
from pydantic import ValidationError

from heliostat.config import StrictModel, walk_fields
from heliostat.data.config import BLUR_PROBABILITIES, CropsConfig, DecodeConfig, LoaderConfig, PhotographPoolConfig


@pytest.mark.parametrize("model", [CropsConfig, DecodeConfig, LoaderConfig, PhotographPoolConfig])
def test_every_setting_says_its_meaning(model: type[StrictModel]) -> None:
    assert [key for key, field in walk_fields(model) if not (field.description or "").strip().endswith(".")] == []


def test_the_default_crops_are_those_of_dinov2() -> None:
    crops = CropsConfig()
    assert (crops.global_crops_size, crops.global_crops_scale) == (224, (0.32, 1.0))
    assert (crops.local_crops_number, crops.local_crops_size, crops.local_crops_scale) == (8, 98, (0.05, 0.32))
    assert (crops.brightness, crops.contrast, crops.saturation, crops.hue) == (0.4, 0.4, 0.2, 0.1)
    assert BLUR_PROBABILITIES[crops.blur] == (0.0, 0.9, 0.5)


@pytest.mark.parametrize(
    "change",
    [{"global_crops_scale": (0.5, 0.4)}, {"local_crops_scale": (0.0, 0.4)}, {"std": (0.0, 1.0, 1.0)}, {"blur": "sometimes"}],
)
def test_impossible_crops_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CropsConfig.model_validate(change)
