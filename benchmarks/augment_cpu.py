"""CPU seconds per image from JPEG bytes to DINOv2's ten crops, beside the original's pipeline and albumentations.

    pip install -e ".[bench,demo]" && OMP_NUM_THREADS=1 python benchmarks/augment_cpu.py

The gate comes first: our crops and those of the Pillow pipeline at the same parameters. All sides then take turns on the same
images, one process and one thread; the sides are written from the public parameters of the originals.
"""

import io
import math
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its newest version otherwise

import albumentations
import cv2
import numpy as np
import numpy.typing as npt
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image, ImageEnhance, ImageOps
from results_file import cpu_hardware, today, versions, write_result
from torch.nn import functional

from heliostat.data.augment import apply_parameters, multi_crop, multi_crop_into
from heliostat.data.config import BLUR_PROBABILITIES, NUM_GLOBAL_CROPS, CropsConfig, DecodeConfig
from heliostat.data.crop_parameters import (
    CropParameters,
    draw_parameters_batch,
    fallback_box,
    image_generator,
    sample_parameters,
)
from heliostat.data.decode import decode
from heliostat.data.photographs import photographs

SIZES_HW = ((375, 500), (768, 1024))
ROUNDS = 8
IMAGES_PER_ROUND = 30
TOLERANCE = 1.5  # grey values of 255, mean absolute error
CROPS = CropsConfig()
LIMITS = DecodeConfig()
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CROPS.mean, CROPS.std))

Key = tuple[int, int, int]


def jpegs(size_hw: tuple[int, int], count: int) -> list[bytes]:
    """Pieces of real photographs at one size, JPEG quality 90 with halved colour; small photographs are enlarged."""
    rng, pictures, files = np.random.default_rng(0), list(photographs().values()), []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        scale = min(picture.shape[0] / size_hw[0], picture.shape[1] / size_hw[1]) * rng.uniform(0.7, 1.0)
        height, width = int(size_hw[0] * scale), int(size_hw[1] * scale)
        top, left = (int(rng.integers(0, room + 1)) for room in (picture.shape[0] - height, picture.shape[1] - width))
        piece = Image.fromarray(picture[top : top + height, left : left + width])
        out = io.BytesIO()
        piece.resize(size_hw[::-1], Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


# The original's side: Pillow operations as torchvision applies them, and its Gaussian blur, which goes through float tensors.


def original_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Kernel 9 in two dimensions as one depthwise convolution, mirrored at the border, rounded."""
    taps = torch.exp(-0.5 * (torch.arange(-4.0, 5.0) / sigma) ** 2)
    taps /= taps.sum()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    padded = functional.pad(pixels[None].float(), (4, 4, 4, 4), mode="reflect")
    blurred = functional.conv2d(padded, torch.outer(taps, taps).expand(3, 1, 9, 9), groups=3)[0]
    return Image.fromarray(blurred.round_().to(torch.uint8).permute(1, 2, 0).numpy())


def original_hue(image: Image.Image, turns: float) -> Image.Image:
    """A shift of Pillow's 8-bit hue that wraps."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.array(hue, np.uint8)
    shifted += np.uint8(int(turns * 255) & 0xFF)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def original_crop(picture: Image.Image, crop: CropParameters) -> Image.Image:
    """One crop as an 8-bit picture."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    image = picture.crop(box).resize((crop.size, crop.size), Image.Resampling.BICUBIC)
    if crop.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    enhancers = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
    for name, amount in crop.jitter:
        image = original_hue(image, amount) if name == "hue" else enhancers[name](image).enhance(amount)
    if crop.grayscale:
        gray = np.array(image.convert("L"), np.uint8)
        image = Image.fromarray(np.dstack([gray, gray, gray]))
    if crop.sigma:
        image = original_blur(image, crop.sigma)
    return ImageOps.solarize(image, 128) if crop.solarize else image


def uniform(low: float, high: float) -> float:
    """One number, drawn as torchvision draws it: by a tensor of its own."""
    return float(torch.empty(1).uniform_(low, high).item())


def original_parameters(image_hw: tuple[int, int], number: int) -> CropParameters:
    """The same distributions as ours, drawn one number at a time."""
    is_global, (height, width) = number < NUM_GLOBAL_CROPS, image_hw
    scale = CROPS.global_crops_scale if is_global else CROPS.local_crops_scale
    box = fallback_box(height, width)
    for _ in range(10):
        area, aspect = height * width * uniform(*scale), math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        box_w, box_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_w <= width and 0 < box_h <= height:
            top, left = (int(torch.randint(0, room + 1, (1,)).item()) for room in (height - box_h, width - box_w))
            box = (top, left, box_h, box_w)
            break
    jitter: tuple[tuple[str, float], ...] = ()
    flip = uniform(0, 1) < 0.5
    if uniform(0, 1) < CROPS.color_jitter_probability:
        amounts = [("brightness", uniform(0.6, 1.4)), ("contrast", uniform(0.6, 1.4)), ("saturation", uniform(0.8, 1.2))]
        amounts.append(("hue", uniform(-0.1, 0.1)))
        jitter = tuple(amounts[place] for place in torch.randperm(4))
    gray = uniform(0, 1) < CROPS.grayscale_probability
    sigma = uniform(0.1, 2.0) if uniform(0, 1) < BLUR_PROBABILITIES[CROPS.blur][min(number, 2)] else 0.0
    size = CROPS.global_crops_size if is_global else CROPS.local_crops_size
    return CropParameters(*box, size, flip, jitter, gray, sigma, number == 1 and uniform(0, 1) < CROPS.solarize_probability)


def original(data: bytes, key: Key) -> list[torch.Tensor]:
    """Bytes to ten normalised float tensors."""
    del key
    picture, crops = Image.open(io.BytesIO(data)).convert("RGB"), []
    for number in range(NUM_GLOBAL_CROPS + CROPS.local_crops_number):
        image = original_crop(picture, original_parameters((picture.height, picture.width), number))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        crops.append(pixels.clone().sub_(MEAN).div_(STD))
    return crops


# albumentations, in the way LightlyTrain documents: area interpolation, kernel from sigma, normalised float tensors.


def composed(number: int) -> albumentations.Compose:
    """The transform of one crop."""
    is_global = number < NUM_GLOBAL_CROPS
    size = CROPS.global_crops_size if is_global else CROPS.local_crops_size
    scale = CROPS.global_crops_scale if is_global else CROPS.local_crops_scale
    steps = [
        albumentations.RandomResizedCrop((size, size), scale=scale, interpolation=cv2.INTER_AREA),
        albumentations.HorizontalFlip(p=0.5),
        albumentations.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=0.8),
        albumentations.ToGray(p=0.2),
        albumentations.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=BLUR_PROBABILITIES[CROPS.blur][min(number, 2)]),
    ]
    if number == 1:
        steps.append(albumentations.Solarize(threshold_range=(0.5, 0.5), p=0.2))
    return albumentations.Compose([*steps, albumentations.Normalize(CROPS.mean, CROPS.std), ToTensorV2()])


COMPOSED = [composed(number) for number in range(NUM_GLOBAL_CROPS + CROPS.local_crops_number)]


def with_albumentations(data: bytes, key: Key) -> list[torch.Tensor]:
    """Bytes to ten normalised float tensors; OpenCV decodes, which is the fastest that this side could have."""
    del key
    image = bare_decode(data)
    return [transform(image=image)["image"] for transform in COMPOSED]


# Ours, and the limit.

GLOBAL_OUT = np.empty((NUM_GLOBAL_CROPS, 3, CROPS.global_crops_size, CROPS.global_crops_size), np.uint8)
LOCAL_OUT = np.empty((CROPS.local_crops_number, 3, CROPS.local_crops_size, CROPS.local_crops_size), np.uint8)


def ours(data: bytes, key: Key) -> object:
    """Bytes to ten uint8 crops in the batch's memory; the device normalises them."""
    return multi_crop_into(decode(data, LIMITS, crops=CROPS), CROPS, key, GLOBAL_OUT, LOCAL_OUT)


def crops_only(data: bytes, key: Key) -> object:
    """Bytes to ten uint8 crops, resized and mirrored only: what is left where another colours and blurs."""
    image = decode(data, LIMITS, crops=CROPS)
    crops = sample_parameters((image.shape[0], image.shape[1]), CROPS, image_generator(*key))
    return [apply_parameters(image, CropParameters(*crop[:6])) for crop in crops]


def for_device(data: bytes, key: Key) -> object:
    """What the CPU does where the device augments: decode, and draw the parameters."""
    image = decode(data, LIMITS, crops=CROPS)
    return image, draw_parameters_batch([(image.shape[0], image.shape[1])], CROPS, [key])


def bare_decode(data: bytes, key: Key | None = None) -> npt.NDArray[np.uint8]:
    """The limit: OpenCV's decoder and nothing else."""
    del key
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return np.asarray(pixels, np.uint8)


SIDES: dict[str, Callable[[bytes, Key], object]] = {
    "ours: bytes to ten uint8 crops": ours,
    "original: Pillow and torchvision's operations": original,
    "albumentations 2.0.8": with_albumentations,
    "ours, decode and resized crops only": crops_only,
    "ours, decode and parameters, the rest on the device": for_device,
    "limit: OpenCV decode only": bare_decode,
}


def check_agreement(files: list[bytes]) -> tuple[float, float]:
    """The gate: (mean, largest) mean absolute error of a crop against the original's side; RuntimeError above the tolerance."""
    config = CropsConfig(solarize_probability=0.0)  # at 128 a rounding step of one becomes a step of 255
    errors = []
    for number, data in enumerate(files):
        image = decode(data, LIMITS)
        crops = sample_parameters((image.shape[0], image.shape[1]), config, image_generator(0, 0, number))
        mine = [crop for kind in multi_crop(image, config, (0, 0, number)) for crop in kind]
        for pixels, crop in zip(mine, crops, strict=True):
            theirs = np.asarray(original_crop(Image.fromarray(image), crop), np.int16)
            errors.append(float(np.abs(pixels - theirs).mean()))
    if statistics.mean(errors) > TOLERANCE:
        raise RuntimeError(
            f"crops differ by {statistics.mean(errors):.2f} grey values, the limit is {TOLERANCE}; nothing was timed"
        )
    return statistics.mean(errors), max(errors)


def measure(files: list[bytes]) -> dict[str, list[float]]:
    """CPU milliseconds per image of each side, round by round; every round has other images, every second goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for side in SIDES.values():
        side(files[0], (0, 0, 0))
    for number in range(ROUNDS):
        picked = files[number * IMAGES_PER_ROUND : (number + 1) * IMAGES_PER_ROUND]
        for name in list(SIDES) if number % 2 else list(SIDES)[::-1]:
            began = time.process_time()
            for index, data in enumerate(picked):
                SIDES[name](data, (number, 0, index))
            seconds[name].append((time.process_time() - began) / len(picked) * 1000)
    return seconds


def spread(values: list[float]) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(results: dict[tuple[int, int], dict[str, list[float]]], agreement: tuple[float, float], load: float) -> list[str]:
    """The result file."""
    lines = [
        f"# From JPEG bytes to ten crops on a CPU, {today()}",
        "",
        f"{versions()}, OpenCV {cv2.__version__}, Pillow {version('pillow')}, simplejpeg {version('simplejpeg')}, "
        f"albumentations {version('albumentations')}. Command: `OMP_NUM_THREADS=1 python benchmarks/augment_cpu.py`.",
        "",
        f"Two crops of 224 and eight of 98 pixels, DINOv2's settings, blur {CROPS.blur}; {ROUNDS} rounds of {IMAGES_PER_ROUND} "
        "pieces of 17 photographs, JPEG quality 90, all sides in turns on the same files. CPU time of the one process; medians "
        "of rounds, spread in brackets. Quotients are formed within a round.",
        "",
        f"The gate: our crops and the Pillow pipeline's at the same parameters differ by {agreement[0]:.2f} grey values of 255 "
        f"on average, by {agreement[1]:.2f} in the worst crop (tolerance {TOLERANCE}). albumentations draws its own parameters "
        "and shrinks by area: it does the same work, not the same pixels.",
        "",
        f"Caveats: the machine was shared (load {load:.1f} at the end, so caches were too); 768 x 1024 pictures are mostly "
        "enlarged, which makes their files small and decoding cheap. Ours leaves normalising to the device; both others end in "
        "float tensors.",
    ]
    for (height, width), seconds in results.items():
        reference = seconds["ours: bytes to ten uint8 crops"]
        lines += ["", f"## {height} x {width} pixels", "", "| side | CPU ms per image | times ours |", "|---|---|---|"]
        for name, values in seconds.items():
            quotients = [value / mine for value, mine in zip(values, reference, strict=True)]
            lines.append(f"| {name} | {spread(values)} | {spread(quotients)} |")
    return lines


def main() -> None:
    """Gate, measure, write."""
    torch.set_num_threads(1)
    files = {size_hw: jpegs(size_hw, ROUNDS * IMAGES_PER_ROUND) for size_hw in SIZES_HW}
    agreement = check_agreement(files[SIZES_HW[0]][:34])
    results = {size_hw: measure(files[size_hw]) for size_hw in SIZES_HW}
    write_result("augment_cpu", table(results, agreement, os.getloadavg()[0]), cpu_hardware())


if __name__ == "__main__":
    main()
