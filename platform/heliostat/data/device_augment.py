"""DINOv2's multi-crop augmentation of a whole batch on the training device, in torch.

The CPU only decodes and draws parameters; the same parameters give the same crops as `augment.py`, within the tolerance that
the tests hold both to. Resizing and blurring are separable and linear, so each is two batched products with small matrices that
are made on the device from the parameters: taps of any width cost the same, tensor cores do them, and the mirror image is a
reversed row of the matrix. Sampling a grid instead does not antialias, as OpenCV's bicubic does not, and lies 4 to 8 grey
values off on textures. Which crop needs which operation is known on the host, so nothing waits for the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heliostat.data.augment import BLUR_KERNEL, LEAST_SIGMA, LUMA, TRUNCATION
from heliostat.data.config import NUM_GLOBAL_CROPS, CropsConfig
from heliostat.data.crop_parameters import JITTER_OPERATIONS, ParameterArrays
from heliostat.errors import DataError

# Shapes: B images, R crops of one size (rows, crop-major), C channels (3), S side of a crop, H W sides of the largest box of a
# group, N bytes of all images. Pixel values are 0..255 in floating point, on whole numbers after each clipping.

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(len(JITTER_OPERATIONS))
_GROUP_BYTES = 2**28  # of boxes in floating point at a time; 256 MB is little beside a model, and enough to fill a device


@dataclass(frozen=True)
class RawImages:
    """Decoded images of different sizes in one buffer, which is what goes to the device.

    pixels: (N + slack,) uint8, interleaved RGB rows, one image after the other; the slack of one longest row lets boxes of
    different widths be read alike. sizes: height and width of each image, pixels.
    """

    pixels: Tensor
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        """Raise DataError where the buffer cannot hold the images."""
        needed = sum(3 * height * width for height, width in self.sizes) + self._slack_bytes(self.sizes)
        if self.pixels.dtype != torch.uint8 or self.pixels.shape != (needed,):
            raise DataError(
                f"raw images are {self.pixels.dtype} of shape {tuple(self.pixels.shape)}; give uint8 of ({needed},)"
            )

    @staticmethod
    def _slack_bytes(sizes: Sequence[tuple[int, int]]) -> int:
        return max((3 * width for _, width in sizes), default=0)

    @classmethod
    def pack(cls, images: Sequence[npt.NDArray[np.uint8]], pin_memory: bool = False) -> "RawImages":
        """Copy decoded images, each (height, width, 3) uint8, into one buffer; pinned, it goes to a GPU in the background."""
        sizes = tuple((image.shape[0], image.shape[1]) for image in images)
        num_bytes = sum(image.nbytes for image in images)
        pixels = torch.zeros(num_bytes + cls._slack_bytes(sizes), dtype=torch.uint8, pin_memory=pin_memory)
        position = 0
        for image in images:
            pixels.numpy()[position : position + image.nbytes] = image.reshape(-1)
            position += image.nbytes
        return cls(pixels, sizes)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "RawImages":
        """Move the pixels; sizes stay on the host."""
        return RawImages(self.pixels.to(device, non_blocking=non_blocking), self.sizes)


@torch.no_grad()
def augment_on_device(
    images: RawImages,
    parameters: ParameterArrays,
    config: CropsConfig,
    *,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cut, alter and normalise the crops of a batch on the device of `images`.

    parameters: of `draw_parameters_batch`, rows crop-major. dtype: of the arithmetic; float16 holds the tolerance as well
    (tests) and is what tensor cores want. Returns global crops (2 * B, C, S, S) and local crops (L * B, C, s, s) in out_dtype,
    crop-major as in `Batch`. DataError where rows and images do not fit.
    """
    num_images = len(images.sizes)
    num_global, num_rows = NUM_GLOBAL_CROPS * num_images, len(parameters.boxes_R4)
    if num_rows != num_images * (NUM_GLOBAL_CROPS + config.local_crops_number):
        raise DataError(f"{num_rows} rows of parameters are not those of {num_images} images; draw them with the same settings")
    kinds = ((np.arange(num_global), config.global_crops_size), (np.arange(num_global, num_rows), config.local_crops_size))
    global_crops, local_crops = (
        _normalised(_altered(_resized(images, parameters, rows, size, dtype), parameters.rows(rows)), config, out_dtype)
        for rows, size in kinds
    )
    return global_crops, local_crops


def _on(pixels: Tensor, values: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    """A small host array on the device of `pixels`."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(pixels.device, dtype, non_blocking=True)


def _resized(
    images: RawImages, parameters: ParameterArrays, rows: npt.NDArray[np.int64], size: int, dtype: torch.dtype
) -> Tensor:
    """Crops (R, C, S, S), resized by antialiased bicubic interpolation and mirrored."""
    crops = torch.empty((len(rows), 3, size, size), dtype=dtype, device=images.pixels.device)
    heights, widths = np.array(images.sizes, np.int64).reshape(-1, 2).T
    starts = np.concatenate([[0], np.cumsum(3 * heights * widths)])
    image_R, (top_R, left_R, height_R, width_R) = rows % max(len(images.sizes), 1), parameters.boxes_R4[rows].T
    first_byte_R, row_bytes_R = starts[image_R] + 3 * (top_R * widths[image_R] + left_R), 3 * widths[image_R]
    for group in _groups(height_R, width_R, dtype.itemsize):
        longest = int(height_R[group].max()), int(width_R[group].max())
        line_RH = np.minimum(np.arange(longest[0]), height_R[group, None] - 1)
        byte_RH = _on(images.pixels, first_byte_R[group, None] + line_RH * row_bytes_R[group, None], torch.int64)
        lines = images.pixels.as_strided((len(images.pixels) - 3 * longest[1] + 1, 3 * longest[1]), (1, 1))
        boxes_RHK = lines[byte_RH].to(dtype)  # K = W * C; what lies outside of a box has the weight 0
        height, width = (_on(images.pixels, side, torch.float32) for side in (height_R[group], width_R[group]))
        mirrored = _on(images.pixels, parameters.flip_R[rows][group], torch.bool)
        rows_RSK = torch.bmm(_bicubic(height, longest[0], size).to(dtype), boxes_RHK).round_().clamp_(0, 255)
        columns_RCWS = rows_RSK.view(len(group), size, longest[1], 3).permute(0, 3, 1, 2)
        weights_RSW = _bicubic(width, longest[1], size, mirrored).to(dtype)
        crops[_on(crops, group, torch.int64)] = (columns_RCWS @ weights_RSW.mT[:, None]).round_().clamp_(0, 255)
    return crops


def _groups(height_R: npt.NDArray[np.int64], width_R: npt.NDArray[np.int64], itemsize: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of similar boxes, as many as fit into _GROUP_BYTES when all are as large as the largest of them."""
    order = np.argsort(height_R * width_R, kind="stable")
    begin = 0
    while begin < len(order):
        largest = np.maximum.accumulate(height_R[order[begin:]]) * np.maximum.accumulate(width_R[order[begin:]])
        num_bytes = largest * np.arange(1, len(largest) + 1) * 3 * itemsize
        end = begin + max(1, int((num_bytes <= _GROUP_BYTES).sum()))
        yield order[begin:end]
        begin = end


def _bicubic(length_R: Tensor, longest: int, size: int, mirrored_R: Tensor | None = None) -> Tensor:
    """Weights (R, S, longest) that resize `length` pixels to `size`: Keys' kernel with a = -0.5, widened when it shrinks."""
    scale_R11 = (length_R / size)[:, None, None]
    output_S1 = torch.arange(size, device=length_R.device)[:, None]
    if mirrored_R is not None:
        output_S1 = torch.where(mirrored_R[:, None, None], size - 1 - output_S1, output_S1)
    source = torch.arange(longest, device=length_R.device) + 0.5
    distance = ((source - (output_S1 + 0.5) * scale_R11) / scale_R11.clamp(min=1.0)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((2.5 - 0.5 * distance) * distance - 4.0) * distance + 2.0
    weights = torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, 0.0))
    weights = torch.where(source < length_R[:, None, None], weights, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _altered(crops_RCSS: Tensor, parameters: ParameterArrays) -> Tensor:
    """Colours, blur and solarisation, in place."""
    _change_colors(crops_RCSS, parameters)
    blurred = np.flatnonzero(parameters.sigma_R >= LEAST_SIGMA)
    if len(blurred):
        rows = _on(crops_RCSS, blurred, torch.int64)
        weights = _gaussian(_on(crops_RCSS, parameters.sigma_R[blurred], torch.float32), crops_RCSS.shape[-1])
        weights = weights.to(crops_RCSS.dtype)[:, None]
        crops_RCSS[rows] = (weights @ crops_RCSS[rows] @ weights.mT).round_()
    if parameters.solarize_R.any():
        rows = _on(crops_RCSS, np.flatnonzero(parameters.solarize_R), torch.int64)
        picked = crops_RCSS[rows]
        crops_RCSS[rows] = torch.where(picked >= 128.0, 255.0 - picked, picked)
    return crops_RCSS


def _gaussian(sigma_R: Tensor, size: int) -> Tensor:
    """Weights (R, S, S) of a Gaussian of BLUR_KERNEL taps that mirrors at the border without repeating the edge."""
    reach = BLUR_KERNEL // 2
    output_S1, source = torch.arange(size, device=sigma_R.device)[:, None], torch.arange(size, device=sigma_R.device)

    def taps(distance: Tensor, there: Tensor | bool) -> Tensor:
        weights = torch.exp(-0.5 * (distance / sigma_R[:, None, None]) ** 2)
        return torch.where((distance.abs() <= reach) & there, weights, 0.0)

    weights = taps(output_S1 - source, True) + taps(output_S1 + source, source > 0)
    weights += taps(2 * (size - 1) - output_S1 - source, source < size - 1)
    return weights / weights.sum(-1, keepdim=True)


def _change_colors(crops_RCSS: Tensor, parameters: ParameterArrays) -> None:
    """The colour jitter and the grey, in place: per crop `own * pixel + gray * luma + shift` waits as on the CPU."""
    num_rows = len(parameters.order_R4)
    maps_3R = torch.tensor([1.0, 0.0, 0.0], device=crops_RCSS.device)[:, None].repeat(1, num_rows)
    mixes_R, waits_R = np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_)
    for place_R in parameters.order_R4.T:
        hue_R = place_R == _HUE
        _apply_maps(crops_RCSS, maps_3R, hue_R & mixes_R)
        mixes_R, waits_R = mixes_R & ~hue_R, waits_R & ~(hue_R & mixes_R)
        _turn_hue(crops_RCSS, np.flatnonzero(hue_R), parameters.amounts_R4[hue_R, _HUE])
        _compose(crops_RCSS, maps_3R, place_R, parameters.amounts_R4)
        linear_R = (place_R >= 0) & ~hue_R
        clips_R = linear_R & (parameters.amounts_R4[np.arange(num_rows), place_R] > 1.0)
        mixes_R, waits_R = (mixes_R | (place_R == _SATURATION)) & ~clips_R, (waits_R | linear_R) & ~clips_R
        _apply_maps(crops_RCSS, maps_3R, clips_R)
    gray_R = _on(crops_RCSS, parameters.grayscale_R, torch.bool)
    maps_3R[1] = torch.where(gray_R, maps_3R[0] + maps_3R[1], maps_3R[1])
    maps_3R[0] = torch.where(gray_R, 0.0, maps_3R[0])
    _apply_maps(crops_RCSS, maps_3R, waits_R | parameters.grayscale_R)


def _compose(crops_RCSS: Tensor, maps_3R: Tensor, place_R: npt.NDArray[np.int64], amounts_R4: npt.NDArray[np.float64]) -> None:
    """Let brightness, contrast or saturation follow the waiting maps of the crops whose turn it is, in place."""
    for place in (_BRIGHTNESS, _CONTRAST, _SATURATION):
        picked = np.flatnonzero(place_R == place)
        if not len(picked):
            continue
        rows, amount = _on(crops_RCSS, picked, torch.int64), _on(crops_RCSS, amounts_R4[picked, place], torch.float32)
        own, gray, shift = maps_3R[:, rows]
        if place == _SATURATION:
            own, gray = amount * own, gray + (1.0 - amount) * own
        else:
            mean = torch.zeros_like(own)
            if place == _CONTRAST:
                pixel_mean_RC = crops_RCSS[rows].mean((2, 3), dtype=torch.float32)
                luma = (pixel_mean_RC * pixel_mean_RC.new_tensor(LUMA)).sum(1)
                mean = torch.floor((own + gray) * luma + shift + 0.5)
            own, gray, shift = amount * own, amount * gray, amount * shift + (1.0 - amount) * mean
        maps_3R[:, rows] = torch.stack([own, gray, shift + TRUNCATION])


def _apply_maps(crops_RCSS: Tensor, maps_3R: Tensor, which_R: npt.NDArray[np.bool_]) -> None:
    """Apply the waiting maps of some crops, round and clip; nothing waits afterwards."""
    picked = np.flatnonzero(which_R)
    if not len(picked):
        return
    rows = _on(crops_RCSS, picked, torch.int64)
    own, gray, shift = maps_3R[:, rows, None, None, None].to(crops_RCSS.dtype)
    pixels = crops_RCSS[rows]
    luma = (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    crops_RCSS[rows] = (own * pixels + (gray * luma + shift)).round_().clamp_(0, 255)
    maps_3R[:, rows] = maps_3R.new_tensor([1.0, 0.0, 0.0])[:, None]


def _turn_hue(crops_RCSS: Tensor, picked: npt.NDArray[np.int64], turns: npt.NDArray[np.float64]) -> None:
    """Turn the hue of some crops in HSV, in place, by as many of Pillow's 255 steps as its 8 bits can express."""
    if not len(picked):
        return
    rows = _on(crops_RCSS, picked, torch.int64)
    sixths = _on(crops_RCSS, 6.0 * np.trunc(turns * 255.0) / 255.0, crops_RCSS.dtype)[:, None, None]
    red, green, blue = crops_RCSS[rows].unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - torch.minimum(torch.minimum(red, green), blue)
    above = torch.where(largest == red, green - blue, torch.where(largest == green, blue - red, red - green))
    corner = torch.where(largest == red, 0.0, torch.where(largest == green, 2.0, 4.0)).to(chroma.dtype)
    hue = corner + above / chroma.clamp(min=1.0) + sixths
    for channel, offset in enumerate((5.0, 3.0, 1.0)):
        place = torch.remainder(hue + offset, 6.0)
        crops_RCSS[rows, channel] = (largest - chroma * torch.minimum(place, 4.0 - place).clamp(0.0, 1.0)).round_()


def _normalised(crops_RCSS: Tensor, config: CropsConfig, out_dtype: torch.dtype) -> Tensor:
    """(value / 255 - mean) / std per channel."""
    std, mean = (torch.tensor(values, device=crops_RCSS.device)[:, None, None] for values in (config.std, config.mean))
    return torch.addcmul(-mean / std, crops_RCSS, 1.0 / (255.0 * std)).to(out_dtype)
