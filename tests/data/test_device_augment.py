"""The device's crops against Pillow's and against the CPU's, with the same parameters."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from heliostat.data.augment import multi_crop
from heliostat.data.config import CropsConfig
from heliostat.data.crop_parameters import CropParameters, ParameterArrays, draw_parameters_batch
from heliostat.data.device_augment import RawImages, augment_on_device
from heliostat.data.photographs import photograph
from heliostat.errors import DataError

Pixels = npt.NDArray[np.uint8]
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # out come the pixels / 255
TOLERANCE = 1.5
NAMES = ("astronaut", "coffee", "grass", "retina", "chelsea")


def _pixels(crops: torch.Tensor) -> npt.NDArray[np.float64]:
    return crops.double().mul(255).permute(0, 2, 3, 1).cpu().numpy()


def _one(image: Pixels, crop: CropParameters, dtype: torch.dtype = torch.float32) -> npt.NDArray[np.float64]:
    config = CropsConfig(global_crops_size=crop.size, local_crops_number=0, **PLAIN)
    parameters = ParameterArrays.of([crop, crop])
    return _pixels(augment_on_device(RawImages.pack([image]), parameters, config, dtype=dtype)[0])[0]


def _slow(image: Pixels, crop: CropParameters) -> npt.NDArray[np.float64]:
    """A crop with one operation, by Pillow or by its definition."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    picture = Image.fromarray(image).crop(box).resize((crop.size, crop.size), Image.Resampling.BICUBIC)
    picture = ImageOps.mirror(picture) if crop.flip else picture
    enhancers = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
    for name, amount in crop.jitter:
        if name == "hue":
            hue, saturation, value = picture.convert("HSV").split()
            shifted = (np.asarray(hue).astype(int) + int(amount * 255)) % 256
            picture = Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")
        else:
            picture = enhancers[name](picture).enhance(amount)
    picture = picture.convert("L").convert("RGB") if crop.grayscale else picture
    pixels = np.array(picture, np.float64)
    if crop.sigma:
        taps = np.exp(-0.5 * (np.arange(-4, 5) / crop.sigma) ** 2)
        padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (9, 9), (0, 1))
        pixels = np.round(np.einsum("yxcij,i,j->yxc", windows, taps / taps.sum(), taps / taps.sum()))
    return np.where(pixels >= 128, 255 - pixels, pixels) if crop.solarize else pixels


BOX = (3, 5, 200, 180, 64)
OPERATIONS = {
    "resize": CropParameters(*BOX),
    "enlarge": CropParameters(7, 9, 31, 40, 64),
    "flip": CropParameters(*BOX, flip=True),
    "brighter": CropParameters(*BOX, jitter=(("brightness", 1.4),)),
    "darker": CropParameters(*BOX, jitter=(("brightness", 0.6),)),
    "more contrast": CropParameters(*BOX, jitter=(("contrast", 1.4),)),
    "less contrast": CropParameters(*BOX, jitter=(("contrast", 0.6),)),
    "more saturation": CropParameters(*BOX, jitter=(("saturation", 1.2),)),
    "less saturation": CropParameters(*BOX, jitter=(("saturation", 0.8),)),
    "hue forward": CropParameters(*BOX, jitter=(("hue", 0.1),)),
    "hue back": CropParameters(*BOX, jitter=(("hue", -0.1),)),
    "hue far": CropParameters(*BOX, jitter=(("hue", 0.45),)),
    "gray": CropParameters(*BOX, grayscale=True),
    "least blur": CropParameters(*BOX, sigma=0.1),
    "middle blur": CropParameters(*BOX, sigma=0.7),
    "most blur": CropParameters(*BOX, sigma=2.0),
    "solarize": CropParameters(*BOX, solarize=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_agrees_with_the_slow_way(operation: str, dtype: torch.dtype) -> None:
    crop = OPERATIONS[operation]
    for name in ("coffee", "grass"):
        assert np.abs(_one(photograph(name), crop, dtype) - _slow(photograph(name), crop)).mean() <= TOLERANCE


def test_whole_batches_agree_with_the_cpu_crop_by_crop() -> None:
    config = CropsConfig(global_crops_size=64, local_crops_size=28, local_crops_number=4, solarize_probability=0.0, **PLAIN)
    images = [photograph(name)[: 300 + 10 * number, : 280 + 20 * number] for number, name in enumerate(NAMES)]
    images[3] = images[3][:40, :37]  # boxes of very different sizes in one batch
    keys = [(5, 1, number) for number in range(len(images))]
    parameters = draw_parameters_batch([image.shape[:2] for image in images], config, keys)
    crops = augment_on_device(RawImages.pack(images), parameters, config)
    errors = []
    for number, (image, key) in enumerate(zip(images, keys, strict=True)):
        for on_device, on_cpu in zip(crops, multi_crop(image, config, key), strict=True):
            errors += np.abs(_pixels(on_device[number :: len(images)]) - on_cpu).mean((1, 2, 3)).tolist()
    assert len(errors) == len(images) * 6
    assert np.mean(errors) <= 0.5
    assert max(errors) <= 2 * TOLERANCE


def test_crops_come_normalised_in_the_type_asked_for_and_always_the_same() -> None:
    config, image = CropsConfig(global_crops_size=32, local_crops_size=16, local_crops_number=2), photograph("coffee")
    parameters = draw_parameters_batch([image.shape[:2]] * 2, config, [(0, 0, 1), (0, 0, 2)])
    raw = RawImages.pack([image, image])
    global_crops, local_crops = augment_on_device(raw, parameters, config, out_dtype=torch.bfloat16)
    assert (global_crops.shape, local_crops.shape) == ((4, 3, 32, 32), (4, 3, 16, 16))
    assert global_crops.dtype == local_crops.dtype == torch.bfloat16
    assert torch.equal(global_crops, augment_on_device(raw, parameters, config, out_dtype=torch.bfloat16)[0])
    plain = augment_on_device(raw, parameters, config.model_copy(update=PLAIN))[0]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    torch.testing.assert_close(augment_on_device(raw, parameters, config)[0], (plain - mean) / std, rtol=1e-5, atol=1e-5)


def test_groups_of_boxes_do_not_change_a_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CropsConfig(global_crops_size=32, local_crops_number=0)
    images = [photograph(name)[:200, :250] for name in NAMES]
    parameters = draw_parameters_batch([(200, 250)] * 5, config, [(0, 0, index) for index in range(5)])
    together = augment_on_device(RawImages.pack(images), parameters, config)[0]
    monkeypatch.setattr("heliostat.data.device_augment._GROUP_BYTES", 1)
    alone = augment_on_device(RawImages.pack(images), parameters, config)[0]
    assert (together - alone).abs().mean() < 1e-3  # another order of summation may round a pixel the other way


def test_no_local_crops_and_no_images_give_empty_tensors() -> None:
    config = CropsConfig(local_crops_number=0)
    parameters = draw_parameters_batch([], config, [])
    assert [crops.shape[0] for crops in augment_on_device(RawImages.pack([]), parameters, config)] == [0, 0]


def test_buffers_and_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="give uint8"):
        RawImages(torch.zeros(10, dtype=torch.uint8), ((4, 4),))
    parameters = draw_parameters_batch([(8, 8)], CropsConfig(), [(0, 0, 0)])
    with pytest.raises(DataError, match="rows of parameters"):
        augment_on_device(RawImages.pack([np.zeros((8, 8, 3), np.uint8)] * 2), parameters, CropsConfig())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gpu_gives_the_crops_of_the_cpu(dtype: torch.dtype) -> None:
    config = CropsConfig(solarize_probability=0.0, **PLAIN)
    images = [photograph(name) for name in NAMES]
    keys = [(0, 0, index) for index in range(len(images))]
    parameters = draw_parameters_batch([image.shape[:2] for image in images], config, keys)
    crops = augment_on_device(RawImages.pack(images).to("cuda"), parameters, config, dtype=dtype)
    for number, (image, key) in enumerate(zip(images, keys, strict=True)):
        for on_device, on_cpu in zip(crops, multi_crop(image, config, key), strict=True):
            assert np.abs(_pixels(on_device[number :: len(images)]) - on_cpu).mean() <= TOLERANCE
