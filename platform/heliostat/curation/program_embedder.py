"""Networks of others that come as a program: TorchScript (SSCD's files) and ONNX, as embedders.

TorchScript and ONNX files hold programs of their own languages, which can compute but also read files, so they are for files
that one trusts. Nothing is unpickled. onnxruntime is imported here and nowhere else in this room, and only when it is needed.
"""

import hashlib
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from heliostat.config import StrictModel, canonical_json
from heliostat.curation.embed import Embedder, check_image
from heliostat.errors import CheckpointError, UsageError

# Shapes: B images, H W an image, S side, D dimension.


class OpenEmbedderConfig(StrictModel):
    """How pixels are prepared for a network of others; what a file itself says is not asked for twice."""

    image_size: int | None = Field(default=None, gt=0)
    """Side of what a backbone, TorchScript or ONNX network sees, in pixels. None: 224 for backbones, 288 for TorchScript
    (SSCD), and what an ONNX file declares, 288 where it leaves it open."""

    fit: Literal["squeeze", "crop", "edge"] = "squeeze"
    """TorchScript and ONNX: `squeeze` gives up the aspect ratio (SSCD's square form); `crop` cuts the middle square; `edge`
    brings the shorter side to image_size, keeps the ratio and takes images one by one."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of pixels in 0..1 (ImageNet's, as SSCD and DINOv2 want); artifacts of ours bring their own."""

    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation of pixels in 0..1."""

    batch_size: int = Field(default=64, gt=0)
    """Images per forward; changes speed and memory, never the embeddings' meaning."""


def version_of(weights_sha256: str, **settings: Any) -> str:
    """Sixteen hexadecimal digits over the weights and all settings that change vectors."""
    return hashlib.sha256(canonical_json({"weights": weights_sha256, **settings}).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fitted(image: NDArray[np.uint8], size: tuple[int, int], fit: str) -> NDArray[np.uint8]:
    """(height, width) = size for `squeeze` and `crop`; the shorter side as size[0] for `edge`."""
    check_image(image)
    height, width = image.shape[:2]
    if fit == "squeeze":
        target = size
    else:
        scale = max(size[0] / height, size[1] / width)
        target = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    interpolation = cv2.INTER_AREA if target[0] < height else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(image, (target[1], target[0]), interpolation=interpolation), np.uint8)
    if fit != "crop":
        return resized
    top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
    return resized[top : top + size[0], left : left + size[1]]


def _checked(output: NDArray[Any], count: int, dimension: int | None, what: str) -> NDArray[np.float32]:
    """(B, D) float32, L2-normalised. Raises CheckpointError unless the output is one finite vector per image."""
    if output.ndim != 2 or len(output) != count or output.shape[1] < 2:
        raise CheckpointError(
            f"{what} gives {tuple(output.shape)} for {count} images, (images, width) is expected; export its pooled output"
        )
    if dimension is not None and output.shape[1] != dimension:
        raise CheckpointError(f"{what} gives vectors of width {output.shape[1]}, {dimension} before; its width must not change")
    vectors = output.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not (lengths > 0).all():
        raise CheckpointError(f"{what} gives a vector that is not finite or zero; its weights or its input scale are wrong")
    return np.asarray(vectors / lengths, np.float32)


@dataclass(frozen=True)
class NetworkEmbedder:
    """A network of others behind one function from prepared pixels to vectors."""

    name: str
    dimension: int
    version: str
    size: tuple[int, int]
    fit: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch_size: int
    is_uint8: bool
    has_fixed_batch: bool
    forward: Any
    """(N, 3, H, W) float32, or (N, H, W, 3) uint8 where is_uint8, to (N, D)."""

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(B, D) float32, L2-normalised. Raises DataError for what is no image, CheckpointError for what is no vector."""
        embeddings = np.empty((len(images), self.dimension), np.float32)
        for start in range(0, len(images), self.batch_size):
            some = [_fitted(image, self.size, self.fit) for image in images[start : start + self.batch_size]]
            embeddings[start : start + len(some)] = self.embedded(np.stack(some), self.dimension)
        return embeddings

    def embedded(self, pixels: NDArray[np.uint8], dimension: int | None) -> NDArray[np.float32]:
        """Vectors of (N, H, W, 3) uint8 pixels of the right size, N at most batch_size."""
        count = len(pixels)
        if self.has_fixed_batch and count < self.batch_size:
            pixels = np.concatenate([pixels, np.zeros((self.batch_size - count, *pixels.shape[1:]), np.uint8)])
        prepared: NDArray[Any] = pixels
        if not self.is_uint8:
            normalised = (pixels.astype(np.float32) / 255.0 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
            prepared = np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype=np.float32)
        output = self.forward(prepared)
        return _checked(output[:count] if output.shape[:1] == (len(pixels),) else output, count, dimension, self.name)


def _probed(embedder: NetworkEmbedder) -> NetworkEmbedder:
    """The embedder with the width that one grey gradient shows; raises CheckpointError for a wrong rank or size."""
    gradient = np.arange(embedder.size[0] * embedder.size[1], dtype=np.float64).reshape(1, *embedder.size, 1) % 251
    pixels = np.repeat(gradient, 3, axis=3).astype(np.uint8)
    return replace(embedder, dimension=embedder.embedded(pixels, None).shape[1])


def is_torchscript(path: Path) -> bool:
    """Whether a file is, by its name or its content, an archive with code beside its tensors."""
    if path.suffix == ".torchscript":
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())


def open_torchscript(path: Path, config: OpenEmbedderConfig, device: str) -> Embedder:
    """A TorchScript file as an embedder; raises CheckpointError when it is torn or gives anything but one vector an image."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
            network = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not TorchScript: {_first_line(error)}; fetch it again") from error

    def forward(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            with torch.inference_mode():
                output = network(torch.from_numpy(pixels).to(device))
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} cannot process images of {pixels.shape[2]} x {pixels.shape[3]} pixels: {_first_line(error)}; "
                "set image_size to what it was made for"
            ) from error
        if not isinstance(output, torch.Tensor):
            raise CheckpointError(f"{path} gives {type(output).__name__} instead of one tensor; export its pooled output")
        return np.asarray(output.float().cpu().numpy())

    size = config.image_size or 288
    return _probed(_network_embedder(path, config, (size, size), forward))


def _network_embedder(
    path: Path,
    config: OpenEmbedderConfig,
    size: tuple[int, int],
    forward: Any,
    *,
    is_uint8: bool = False,
    batch: int | None = None,
) -> NetworkEmbedder:
    settings = {"size": size, "fit": config.fit, "mean": config.mean, "std": config.std, "is_uint8": is_uint8}
    one_by_one = config.fit == "edge"
    return NetworkEmbedder(
        name=path.name,
        dimension=0,
        version=version_of(_sha256(path), **settings),
        size=size,
        fit=config.fit,
        mean=config.mean,
        std=config.std,
        batch_size=batch or (1 if one_by_one else config.batch_size),
        is_uint8=is_uint8,
        has_fixed_batch=batch is not None,
        forward=forward,
    )


def open_onnx(path: Path, config: OpenEmbedderConfig, device: str) -> Embedder:
    """An ONNX file as an embedder: (N, 3, H, W) float32 or (N, H, W, 3) uint8 in, (N, D) out.

    Raises CheckpointError for any other file, UsageError when onnxruntime is missing or lacks the device.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f'{path} needs onnxruntime; run: pip install "heliostat[export]"') from error
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if device.startswith("cuda") else ["CPUExecutionProvider"]
    if providers[0] not in onnxruntime.get_available_providers():
        raise UsageError(f"{path} on {device} needs {providers[0]}, which this onnxruntime lacks; install onnxruntime-gpu")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # its exceptions share no base class of their own
        raise CheckpointError(f"{path} is truncated or not ONNX: {_first_line(error)}; fetch it again") from error
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise CheckpointError(f"{path} has {len(inputs)} inputs; an embedder has one, the pixels")
    size, is_uint8, batch = _onnx_input(inputs[0].shape, inputs[0].type, config, path)

    def forward(pixels: NDArray[Any]) -> NDArray[np.float32]:
        try:
            return np.asarray(session.run(None, {inputs[0].name: pixels})[0])
        except Exception as error:
            raise CheckpointError(f"{path} cannot process {pixels.shape} {pixels.dtype}: {_first_line(error)}") from error

    return _probed(_network_embedder(path, config, size, forward, is_uint8=is_uint8, batch=batch))


def _onnx_input(
    shape: Sequence[Any], kind: str, config: OpenEmbedderConfig, path: Path
) -> tuple[tuple[int, int], bool, int | None]:
    """(height, width), whether uint8 channels-last, and the batch size where it is fixed."""
    is_uint8 = kind == "tensor(uint8)"
    channel = 3 if is_uint8 else 1
    if (
        len(shape) != 4
        or kind not in ("tensor(uint8)", "tensor(float)")
        or shape[channel] not in (3, None, str(shape[channel]))
    ):
        raise CheckpointError(
            f"{path} takes {kind} {list(shape)}; an embedder takes (N, 3, H, W) float or (N, H, W, 3) uint8: export it so"
        )
    sides = [side if isinstance(side, int) else None for index, side in enumerate(shape) if index not in (0, channel)]
    wanted = [side or config.image_size or 288 for side in sides]
    if config.image_size is not None and wanted != [config.image_size] * 2:
        raise CheckpointError(
            f"{path} is made for {wanted[0]} x {wanted[1]} pixels, image_size is {config.image_size}; leave it out"
        )
    if config.fit == "edge" and sides != [None, None]:
        raise CheckpointError(f"{path} is made for {wanted[0]} x {wanted[1]} pixels; fit=edge needs a file with open sides")
    return (wanted[0], wanted[1]), is_uint8, shape[0] if isinstance(shape[0], int) else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:160]
