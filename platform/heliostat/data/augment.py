"""DINOv2's multi-crop augmentation on a CPU, on uint8 pixels.

Parameters are drawn first (`crop_parameters.py`), then applied, so that a slow reference can run with the same ones. Every
image has its own generator, keyed by (seed, epoch, image index): the crops do not depend on threads, ranks or the history of
the run. Colour operations follow Pillow's definitions, as torchvision applies them for DINOv2.
"""

import functools
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from heliostat.data.batch import Batch
from heliostat.data.config import NUM_GLOBAL_CROPS, CropsConfig
from heliostat.data.crop_parameters import CropParameters, image_generator, sample_parameters
from heliostat.errors import DataError

# Shapes: G global crops (2), L local crops, C channels (3), H W global side, h w local side.

Pixels = npt.NDArray[np.uint8]

BLUR_KERNEL = 9  # DINOv2
LEAST_SIGMA = 0.25  # pixels; below, a neighbour weighs under 0.04 % and no grey value changes by more than one
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"

_IDENTITY = (1.0, 0.0, 0.0)
TRUNCATION = -0.5  # Pillow's blends cut the fraction off where OpenCV rounds

# The loader's threads are the parallelism; OpenCV's own pool would only make them wait for each other.
cv2.setNumThreads(1)


def multi_crop(image: Pixels, config: CropsConfig, rng_key: tuple[int, int, int]) -> tuple[Pixels, Pixels]:
    """Cut the crops of one image: a pure function of (image, config, rng_key).

    image: (height, width, 3) uint8 RGB of any size; smaller ones are enlarged. rng_key: (seed, epoch, image index).
    Returns global crops (G, H, W, C) and local crops (L, h, w, C), uint8. DataError when the image is not 3-channel uint8.
    """
    side, local_side = config.global_crops_size, config.local_crops_size
    global_crops = np.empty((NUM_GLOBAL_CROPS, side, side, 3), np.uint8)
    local_crops = np.empty((config.local_crops_number, local_side, local_side, 3), np.uint8)
    multi_crop_into(image, config, rng_key, global_crops, local_crops)
    return global_crops, local_crops


def crop_by_key(image: Pixels, config: CropsConfig, rng_key: tuple[int, int, int], number: int) -> Pixels:
    """One crop alone, the same bytes as in `multi_crop`: for looking at what a run saw.

    image: as decoded for that run (`decode` with its crops settings). rng_key: (seed, epoch, image index). number: 0 and 1 are
    the global crops, then the local ones. Returns (size, size, 3) uint8 RGB.
    """
    return apply_parameters(
        image, sample_parameters((image.shape[0], image.shape[1]), config, image_generator(*rng_key))[number]
    )


def multi_crop_into(
    image: Pixels, config: CropsConfig, rng_key: tuple[int, int, int], global_out: Pixels, local_out: Pixels
) -> None:
    """Cut the crops of one image, as `multi_crop` does, straight into the caller's memory.

    global_out, local_out: uint8, one crop after the other along the first axis, each either planar (3, side, side) or
    interleaved (side, side, 3); every single crop must be contiguous, the first axis may have any stride, so that
    `batch.reshape(G, B, 3, H, W)[:, slot]` of a crop-major batch will do. DataError when an array has another shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"multi_crop wants (height, width, 3) uint8, got {image.shape} {image.dtype}; repeat a grey channel 3 times"
        )
    outputs = [
        *_outputs(global_out, NUM_GLOBAL_CROPS, config.global_crops_size),
        *_outputs(local_out, config.local_crops_number, config.local_crops_size),
    ]
    parameters = sample_parameters((image.shape[0], image.shape[1]), config, image_generator(*rng_key))
    with torch.inference_mode():  # a third less overhead per call, which is what small crops cost
        image_1CHW = _channels_last(image)
        for crop, output in zip(parameters, outputs, strict=True):
            _write(_apply(image_1CHW, crop), output)


def _outputs(crops: Pixels, count: int, size: int) -> list[Pixels]:
    """The memory of each crop, checked."""
    shapes = ((count, 3, size, size), (count, size, size, 3))
    if crops.dtype != np.uint8 or crops.shape not in shapes or (count and not crops[0].flags.c_contiguous):
        raise DataError(f"crops go to uint8 memory of shape {shapes[0]} or {shapes[1]}, got {crops.shape} {crops.dtype}")
    return list(crops)


def _write(crop: Pixels, output: Pixels) -> None:
    """Put an interleaved or a grey crop into planar or interleaved memory."""
    planar = output.shape[0] == 3
    if crop.ndim == 2:
        output[:] = crop if planar else crop[:, :, None]
    elif planar:
        cv2.split(crop, list(output))
    else:
        output[:] = crop


def apply_parameters(image: Pixels, parameters: CropParameters) -> Pixels:
    """Cut and alter one crop: (H, W, 3) uint8 RGB -> (size, size, 3) uint8 RGB."""
    output = np.empty((parameters.size, parameters.size, 3), np.uint8)
    with torch.inference_mode():
        _write(_apply(_channels_last(image), parameters), output)
    return output


def _channels_last(image: Pixels) -> torch.Tensor:
    """(H, W, 3) -> (1, 3, H, W) over the same memory, with which the resize keeps pixels interleaved. Read-only is copied."""
    return torch.from_numpy(np.require(image, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)


def _apply(image_1CHW: torch.Tensor, parameters: CropParameters) -> Pixels:
    """(size, size, 3), or (size, size) where the crop is grey."""
    crop: Any = _resize(image_1CHW, parameters)
    if parameters.flip:
        crop = cv2.flip(crop, 1)
    if parameters.jitter or parameters.grayscale:
        crop = _change_colors(crop, parameters.jitter, parameters.grayscale)
    if parameters.sigma >= LEAST_SIGMA:
        crop = _blur(crop, parameters.sigma)
    if parameters.solarize:
        crop = cv2.min(crop, cv2.bitwise_not(crop))  # inverts exactly the values of 128 and above
    return crop  # type: ignore[no-any-return]


def _resize(image_1CHW: torch.Tensor, parameters: CropParameters) -> Pixels:
    """Bicubic with antialiasing, within 0.3 grey values of Pillow's on average (rounding).

    OpenCV's bicubic does not antialias: on textures it lies 4 to 8 grey values off at the usual scales, and its antialiased
    detours cost nearly as much as this operator (measured on one core: 0.2 ms against 0.26 ms for a 98-pixel crop).
    """
    top, left, height, width, size = parameters.top, parameters.left, parameters.height, parameters.width, parameters.size
    box = image_1CHW[:, :, top : top + height, left : left + width]
    if height > size:  # shrinking rows first leaves less for the columns, which cost more; the operator begins with them
        box = interpolate(box, size=(size, width), mode="bicubic", antialias=True)
    resized = interpolate(box, size=(size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.numpy()[0].transpose(1, 2, 0))


def _change_colors(crop: Pixels, jitter: tuple[tuple[str, float], ...], grayscale: bool) -> Pixels:
    """The colour jitter and the grey of one crop; grey comes back as (size, size).

    Brightness, contrast, saturation and whatever follows from them map a pixel to `own * pixel + gray * luma + shift`, three
    numbers. A factor of at most 1 cannot leave 0..255, so its map waits for the next one; only after a factor above 1 values
    must be clipped. A waiting map without `gray` treats the channels alike and commutes with a turn of the hue.
    """
    own, gray, shift = _IDENTITY
    for operation, amount in jitter:
        if operation == "hue":
            if gray != 0.0:
                crop, (own, gray, shift) = _map_colors(crop, own, gray, shift), _IDENTITY
            crop = _shift_hue(crop, amount)
            continue
        if operation == "contrast":
            mean = (own + gray) * _mean_luma(crop) + shift
            shift = amount * shift + (1.0 - amount) * math.floor(mean + 0.5)
        elif operation == "saturation":
            gray = amount * gray + (1.0 - amount) * (own + gray)
        else:
            shift *= amount
        own, shift = amount * own, shift + TRUNCATION
        if operation != "saturation":
            gray *= amount
        if amount > 1.0:
            crop, (own, gray, shift) = _map_colors(crop, own, gray, shift), _IDENTITY
    if grayscale:
        crop, own, gray = np.asarray(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), np.uint8), own + gray, 0.0
    return _map_colors(crop, own, gray, shift)


def _mean_luma(crop: Pixels) -> float:
    red, green, blue, _ = cv2.mean(crop)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _map_colors(crop: Pixels, own: float, gray: float, shift: float) -> Pixels:
    """own * pixel + gray * luma + shift, rounded and clipped."""
    if (own, gray, shift) == _IDENTITY:
        return crop
    if crop.ndim == 2:
        return np.asarray(cv2.transform(crop, np.array([[own, shift]])), np.uint8)
    red, green, blue = gray * LUMA[0], gray * LUMA[1], gray * LUMA[2]
    matrix = [[own + red, green, blue, shift], [red, own + green, blue, shift], [red, green, own + blue, shift]]
    return np.asarray(cv2.transform(crop, np.array(matrix)), np.uint8)


def _shift_hue(crop: Pixels, turns: float) -> Pixels:
    """Turn the hue in 8-bit HSV, where 256 steps are the full circle and overflow is the wrap; `crop` is overwritten."""
    steps = int(turns * 255.0) & 0xFF
    if steps == 0:
        return crop
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(hsv.shape[0], -1)
    np.add(rows, _hue_row(steps, hsv.shape[1]), out=rows)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, crop), np.uint8)


@functools.cache
def _hue_row(steps: int, width: int) -> npt.NDArray[np.uint8]:
    """What is added to a row of HSV. Adding to whole rows takes a third of the time of adding to every third byte."""
    return np.tile(np.array([steps, 0, 0], np.uint8), width)


def _blur(crop: Pixels, sigma: float) -> Pixels:
    """Gaussian blur of kernel 9; taps beyond 3 sigma are cut. sepFilter2D takes half of GaussianBlur's time."""
    kernel = min(BLUR_KERNEL, 2 * math.ceil(3.0 * sigma) + 1)
    taps = cv2.getGaussianKernel(kernel, sigma, cv2.CV_32F)
    return np.asarray(cv2.sepFilter2D(crop, -1, taps, taps), np.uint8)


def normalise(batch: Batch, config: CropsConfig) -> Batch:
    """uint8 crops -> float32, (value / 255 - mean) / std per channel, on the batch's device."""
    device = batch.global_crops.device
    scale = torch.tensor([1.0 / (255.0 * std) for std in config.std], device=device).view(1, 3, 1, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(config.mean, config.std, strict=True)], device=device).view(
        1, 3, 1, 1
    )
    return Batch(
        batch.global_crops.float().mul_(scale).add_(shift),
        batch.local_crops.float().mul_(scale).add_(shift),
        batch.masks,
        batch.image_ids,
    )
