"""The crops against Pillow with the same parameters."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from heliostat.data.augment import apply_parameters, crop_by_key, multi_crop, multi_crop_into, normalise
from heliostat.data.batch import Batch
from heliostat.data.config import CropsConfig
from heliostat.data.crop_parameters import CropParameters, image_generator, sample_parameters
from heliostat.data.photographs import photograph
from heliostat.errors import DataError

Pixels = npt.NDArray[np.uint8]

TOLERANCE = 1.5  # grey values of 255, mean absolute error


def _gaussian(image: Pixels, sigma: float) -> Pixels:
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(image.astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    rows = sum(tap * padded[offset : offset + image.shape[0]] for offset, tap in enumerate(taps))
    columns = sum(tap * rows[:, offset : offset + image.shape[1]] for offset, tap in enumerate(taps))
    return np.round(columns).astype(np.uint8)


def _hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue).astype(int) + int(turns * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")


def reference(pixels: Pixels, parameters: CropParameters) -> Pixels:
    """The crop as Pillow makes it, one plain step after the other."""
    box = (parameters.left, parameters.top, parameters.left + parameters.width, parameters.top + parameters.height)
    size = (parameters.size, parameters.size)
    image = Image.fromarray(pixels).crop(box).resize(size, Image.Resampling.BICUBIC)
    if parameters.flip:
        image = ImageOps.mirror(image)
    enhancers = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
    for name, amount in parameters.jitter:
        image = _hue(image, amount) if name == "hue" else enhancers[name](image).enhance(amount)
    if parameters.grayscale:
        image = image.convert("L").convert("RGB")
    result = np.array(image)
    if parameters.sigma:
        result = _gaussian(result, parameters.sigma)
    if parameters.solarize:
        result = np.array(ImageOps.solarize(Image.fromarray(result), 128))
    return result


def _error(pixels: Pixels, parameters: CropParameters) -> float:
    ours = apply_parameters(pixels, parameters)
    return float(np.abs(ours.astype(int) - reference(pixels, parameters)).mean())


@pytest.mark.parametrize("name", ["astronaut", "grass", "retina"])
@pytest.mark.parametrize("box", [(0, 0, 300, 300), (10, 20, 111, 77), (100, 50, 30, 40), (7, 7, 64, 64)])
def test_resizing_equals_pillows_antialiased_bicubic(name: str, box: tuple[int, int, int, int]) -> None:
    for size in (32, 98, 224):
        assert _error(photograph(name), CropParameters(*box, size=size)) < 0.3


SINGLE_OPERATIONS = {
    "flip": CropParameters(3, 5, 200, 180, 96, flip=True),
    "brighter": CropParameters(3, 5, 200, 180, 96, jitter=(("brightness", 1.4),)),
    "darker": CropParameters(3, 5, 200, 180, 96, jitter=(("brightness", 0.6),)),
    "more contrast": CropParameters(3, 5, 200, 180, 96, jitter=(("contrast", 1.4),)),
    "less contrast": CropParameters(3, 5, 200, 180, 96, jitter=(("contrast", 0.6),)),
    "more saturation": CropParameters(3, 5, 200, 180, 96, jitter=(("saturation", 1.2),)),
    "less saturation": CropParameters(3, 5, 200, 180, 96, jitter=(("saturation", 0.8),)),
    "hue forward": CropParameters(3, 5, 200, 180, 96, jitter=(("hue", 0.1),)),
    "hue back": CropParameters(3, 5, 200, 180, 96, jitter=(("hue", -0.1),)),
    "gray": CropParameters(3, 5, 200, 180, 96, grayscale=True),
    "least blur": CropParameters(3, 5, 200, 180, 96, sigma=0.1),
    "middle blur": CropParameters(3, 5, 200, 180, 96, sigma=0.7),
    "most blur": CropParameters(3, 5, 200, 180, 96, sigma=2.0),
    "solarize": CropParameters(3, 5, 200, 180, 96, solarize=True),
}


@pytest.mark.parametrize("operation", SINGLE_OPERATIONS)
@pytest.mark.parametrize("name", ["astronaut", "coffee", "grass"])
def test_each_operation_agrees_with_pillow(operation: str, name: str) -> None:
    assert _error(photograph(name), SINGLE_OPERATIONS[operation]) <= TOLERANCE


def test_whole_crops_agree_with_pillow() -> None:
    errors = []
    for index, name in enumerate(("astronaut", "chelsea", "china", "rocket", "motorcycle_left", "gravel")):
        pixels = photograph(name)
        config = CropsConfig(solarize_probability=0.0)  # at 128 a rounding step of one becomes a step of 255; tested alone
        hw = (pixels.shape[0], pixels.shape[1])
        errors += [_error(pixels, crop) for crop in sample_parameters(hw, config, image_generator(0, 0, index))]
    assert np.mean(errors) <= TOLERANCE
    assert max(errors) <= 2 * TOLERANCE


def test_maps_that_wait_for_each_other_agree_with_one_operation_after_the_other() -> None:
    names = ("brightness", "contrast", "saturation", "hue")
    strong = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    pixels, errors = photograph("coffee"), []
    for order in itertools.permutations(names):
        for side in (0, 1):
            jitter = tuple((name, strong[name][(place + side) % 2]) for place, name in enumerate(order))
            gray = order[0] == "hue"
            errors.append(_error(pixels, CropParameters(3, 5, 200, 180, 64, jitter=jitter, grayscale=gray)))
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("turns", [-0.5, -0.34, 0.0, 0.004, 0.2, 0.5])
def test_any_turn_of_the_hue_agrees_with_pillow(turns: float) -> None:
    assert _error(photograph("coffee"), CropParameters(3, 5, 200, 180, 96, jitter=(("hue", turns),))) <= TOLERANCE


def test_a_crop_is_made_again_from_its_key() -> None:
    config, image = CropsConfig(global_crops_size=32, local_crops_size=16, local_crops_number=3), photograph("coffee")
    crops = [crop for kind in multi_crop(image, config, (7, 3, 41)) for crop in kind]
    for number, crop in enumerate(crops):
        assert (crop_by_key(image, config, (7, 3, 41), number) == crop).all()


@pytest.mark.parametrize("planar", [True, False])
def test_crops_are_written_into_the_slots_of_a_batch(planar: bool) -> None:
    config, image = CropsConfig(global_crops_size=32, local_crops_size=16, local_crops_number=3), photograph("coffee")
    batch = [
        np.zeros((count, 5, *((3, side, side) if planar else (side, side, 3))), np.uint8) for count, side in ((2, 32), (3, 16))
    ]
    multi_crop_into(image, config, (1, 2, 3), batch[0][:, 4], batch[1][:, 4])
    for written, expected in zip(batch, multi_crop(image, config, (1, 2, 3)), strict=True):
        assert (written[:, 4] == (expected.transpose(0, 3, 1, 2) if planar else expected)).all()
        assert not written[:, :4].any()


def test_memory_of_another_shape_is_refused() -> None:
    config = CropsConfig(global_crops_size=32, local_crops_number=0)
    for wrong in (
        np.zeros((2, 3, 32, 31), np.uint8),
        np.zeros((2, 3, 32, 32), np.float32),
        np.zeros((2, 3, 32, 64), np.uint8)[..., ::2],
    ):
        with pytest.raises(DataError, match="crops go to"):
            multi_crop_into(photograph("coffee"), config, (0, 0, 0), wrong, np.zeros((0, 98, 98, 3), np.uint8))


def test_crops_are_a_pure_function_of_the_key() -> None:
    config = CropsConfig(global_crops_size=32, local_crops_size=16, local_crops_number=4)
    image = photograph("astronaut")[:70, :90]
    first, again = multi_crop(image, config, (1, 2, 3)), multi_crop(image.copy(), config, (1, 2, 3))
    assert first[0].shape == (2, 32, 32, 3)
    assert first[1].shape == (4, 16, 16, 3)
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert (multi_crop(image, config, other)[0] != first[0]).any()


@pytest.mark.parametrize("side", [1, 3, 17])
def test_images_smaller_than_the_crop_are_enlarged(side: int) -> None:
    image = np.full((side, side, 3), 77, np.uint8)
    config = CropsConfig(color_jitter_probability=0.0, solarize_probability=0.0)
    global_crops, local_crops = multi_crop(image, config, (0, 0, 0))
    assert (global_crops == 77).all()
    assert (local_crops == 77).all()


def test_no_local_crops_give_an_empty_array() -> None:
    crops = multi_crop(photograph("coins"), CropsConfig(local_crops_number=0), (0, 0, 0))
    assert crops[1].shape == (0, 98, 98, 3)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_other_arrays_are_refused(image: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match="wants"):
        multi_crop(image, CropsConfig(), (0, 0, 0))


def test_normalise_is_the_mean_and_standard_deviation_per_channel() -> None:
    config = CropsConfig()
    crops = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    batch = normalise(Batch(crops, crops[:, :, :4, :4], torch.zeros(4, 4, dtype=torch.bool), ("a", "b")), config)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    torch.testing.assert_close(batch.global_crops, (crops / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    assert batch.local_crops.dtype == torch.float32
    assert batch.image_ids == ("a", "b")
