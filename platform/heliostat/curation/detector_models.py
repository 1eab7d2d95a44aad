"""The networks behind the built-in detectors, and .onnx files of others: pre-processing, one forward, decoding.

onnxruntime and OpenCV's dnn run on the CPU with one thread each; workers run side by side instead. Images go through one by
one, so that a score never depends on what else was in the batch (a batch saves nothing on a CPU core; measured).
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heliostat.curation.detectors import Images, check_images
from heliostat.errors import DataError

# Shapes: B images, n faces, h w the grid of CenterFace (a quarter of its input).

_OPENNSFW_RESIZED, _OPENNSFW_SIDE = 256, 224
_OPENNSFW_MEAN_BGR = np.array([104.0, 117.0, 123.0], np.float32)  # of the Caffe model

_CENTERFACE_OUTPUTS = ("537", "538", "539", "540")  # heat map, log scale, offset, landmarks
_CENTERFACE_STRIDE, _CENTERFACE_MULTIPLE = 4, 32
_CENTERFACE_LEAST_SCORE = 0.1  # lower ones are noise (measured: docs/concepts/detectors.md)
_OVERLAP_LIMIT = 0.3  # intersection over union at which the weaker of two boxes goes

_LEAST_SIDE, _MOST_SIDE = 16, 2048  # fixed inputs of others' networks, pixels


def version_of(path: Path, preprocessing: str) -> str:
    """32 hexadecimal digits that stand for the weights and for how images are prepared."""
    digest = hashlib.sha256(preprocessing.encode())
    digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _session(path: Path) -> Any:
    """An onnxruntime session on one thread. DataError when the file is no network."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every way in which a file can be wrong
        raise DataError(f"{path} is not a network that onnxruntime can open: {_line(error)}; export it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _fixed_side(size: Any, free: int, path: Path) -> int:
    """A side of an input: its size, or `free` where the network takes any. DataError beyond 16 to 2048."""
    if not isinstance(size, int):
        return free
    if not _LEAST_SIDE <= size <= _MOST_SIDE:
        raise DataError(f"{path} takes images of {size} pixels; detectors take {_LEAST_SIDE} to {_MOST_SIDE}")
    return size


def _image_input(session: Any, path: Path) -> Any:
    """The one input, checked to be (batch, height, width, 3) uint8."""
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else None
    if shape is None or len(shape) != 4 or shape[3] != 3 or inputs[0].type != "tensor(uint8)":
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise DataError(f"{path} takes {found}; a detector takes one tensor(uint8) of (batch, height, width, 3), RGB")
    return inputs[0]


class OpenNsfw:
    """Yahoo's open_nsfw (ResNet-50-thin), fed as by its authors: squeezed to 256, centre 224, through JPEG, BGR less mean."""

    name = "opennsfw"

    def __init__(self, path: Path) -> None:
        self.version = version_of(path, "opennsfw: pillow bilinear 256, centre 224, jpeg 75, bgr")
        self._session = _session(path)
        self._input = self._session.get_inputs()[0].name

    def scores(self, images: Images) -> NDArray[np.float32]:
        """See NsfwDetector."""
        check_images(images)
        found = [self._session.run(None, {self._input: self._prepared(image)[None]})[0][0, 1] for image in images]
        return np.asarray(found, np.float32).reshape(len(images))

    @staticmethod
    def _prepared(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(224, 224, 3) float32 BGR. The pass through JPEG is part of what the network was trained on."""
        margin = (_OPENNSFW_RESIZED - _OPENNSFW_SIDE) // 2
        square = Image.fromarray(image).resize((_OPENNSFW_RESIZED, _OPENNSFW_RESIZED), Image.Resampling.BILINEAR)
        square = square.crop((margin, margin, margin + _OPENNSFW_SIDE, margin + _OPENNSFW_SIDE))
        compressed = io.BytesIO()
        square.save(compressed, "JPEG", quality=75)
        pixels = np.asarray(Image.open(compressed), np.float32)
        return np.ascontiguousarray(pixels[:, :, ::-1] - _OPENNSFW_MEAN_BGR)


class OnnxNsfw:
    """A network of others: (1, H, W, 3) uint8 RGB in, the probability of unsafe content out, (1,) or (1, 1)."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.version = version_of(path, "onnx nsfw 1")
        self._path, self._session = path, _session(path)
        taken = _image_input(self._session, path)
        self._input = taken.name
        self._height, self._width = (_fixed_side(size, 224, path) for size in taken.shape[1:3])

    def scores(self, images: Images) -> NDArray[np.float32]:
        """See NsfwDetector. DataError when the network gives anything but one number in 0..1 for each image."""
        check_images(images)
        return np.asarray([self._score(image) for image in images], np.float32)

    def _score(self, image: NDArray[np.uint8]) -> float:
        squeezed = np.asarray(cv2.resize(image, (self._width, self._height), interpolation=cv2.INTER_AREA), np.uint8)
        found = np.asarray(_run(self._session, self._input, squeezed, self._path)[0])
        if found.size != 1 or not -1e-4 <= float(found.ravel()[0]) <= 1 + 1e-4:
            raise DataError(f"{self._path} gives {found.shape} {found.ravel()[:4]} for an image; one score in 0..1 expected")
        return float(np.clip(found.ravel()[0], 0.0, 1.0))


def _run(session: Any, input_name: str, image: NDArray[np.uint8], path: Path) -> list[Any]:
    try:
        return list(session.run(None, {input_name: np.ascontiguousarray(image)[None]}))
    except Exception as error:  # as in `_session`
        raise DataError(f"{path} fails on an image of {image.shape[:2]} pixels: {_line(error)}") from error


def fitted(image: NDArray[np.uint8], height: int, width: int) -> tuple[NDArray[np.uint8], float, float]:
    """(the image shrunk to fit into height x width and padded with black at right and bottom, scale across, scale down).

    Never enlarged: what the pixels do not show, a detector does not find in more of them.
    """
    scale = min(1.0, height / image.shape[0], width / image.shape[1])
    down, across = max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[:down, :across] = cv2.resize(image, (across, down), interpolation=cv2.INTER_AREA) if scale < 1 else image
    return canvas, across / image.shape[1], down / image.shape[0]


def in_image(boxes: NDArray[np.float32], image: NDArray[np.uint8], across: float, down: float) -> NDArray[np.float32]:
    """Boxes of the scaled image in pixels of the image itself, cut at its edges, the empty ones left out, best first."""
    height, width = image.shape[:2]
    scaled = boxes.astype(np.float32, copy=True)
    scaled[:, [0, 2]] = np.clip(scaled[:, [0, 2]] / across, 0, width)
    scaled[:, [1, 3]] = np.clip(scaled[:, [1, 3]] / down, 0, height)
    kept = scaled[(scaled[:, 2] > scaled[:, 0]) & (scaled[:, 3] > scaled[:, 1])]
    order = np.lexsort((kept[:, 3], kept[:, 2], kept[:, 1], kept[:, 0], -kept[:, 4]))
    return np.asarray(kept[order], np.float32)


class CenterFace:
    """CenterFace (arXiv 1911.03599) through OpenCV: RGB as it is, sides a multiple of 32."""

    name = "centerface"

    def __init__(self, path: Path, longest_side_pixels: int) -> None:
        if longest_side_pixels < _CENTERFACE_MULTIPLE or longest_side_pixels % _CENTERFACE_MULTIPLE:
            raise DataError(f"longest side {longest_side_pixels} is no multiple of {_CENTERFACE_MULTIPLE}; use 512")
        self.version = version_of(path, f"centerface: area {longest_side_pixels}, black padding, rgb")
        self._longest = longest_side_pixels
        try:
            self._network = cv2.dnn.readNetFromONNX(str(path))
        except cv2.error as error:
            raise DataError(f"{path} is not a network that OpenCV can open: {_line(error)}; reinstall it") from error

    def boxes(self, images: Images) -> list[NDArray[np.float32]]:
        """See FaceDetector. Scores below 0.1 are left out."""
        check_images(images)
        return [self._boxes(image) for image in images]

    def _boxes(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        scale = min(1.0, self._longest / max(image.shape[:2]))
        sides = (max(1, round(side * scale)) for side in image.shape[:2])
        height, width = (-(-side // _CENTERFACE_MULTIPLE) * _CENTERFACE_MULTIPLE for side in sides)
        canvas, across, down = fitted(image, height, width)
        self._network.setInput(cv2.dnn.blobFromImage(canvas))
        heat, scales, offsets, _ = self._network.forward(list(_CENTERFACE_OUTPUTS))
        return in_image(suppressed(_centerface_boxes(heat[0, 0], scales[0], offsets[0])), image, across, down)


def _centerface_boxes(
    heat_hw: NDArray[np.float32], scales_2hw: NDArray[np.float32], offsets_2hw: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(n, 5) of every cell above the least score: centre by cell and offset, size by the exponential of the scale."""
    row, column = np.nonzero(heat_hw > _CENTERFACE_LEAST_SCORE)
    tall, wide = np.exp(scales_2hw[:, row, column]) * _CENTERFACE_STRIDE
    centre_y = (row + offsets_2hw[0, row, column] + 0.5) * _CENTERFACE_STRIDE
    centre_x = (column + offsets_2hw[1, row, column] + 0.5) * _CENTERFACE_STRIDE
    corners = [centre_x - wide / 2, centre_y - tall / 2, centre_x + wide / 2, centre_y + tall / 2]
    return np.stack([*corners, heat_hw[row, column]], axis=1).astype(np.float32)


def suppressed(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Boxes without those that overlap a better one by `_OVERLAP_LIMIT` or more, best first."""
    left, top, right, bottom, score = boxes.T
    area = (right - left) * (bottom - top)
    waiting = np.lexsort((left, top, -score))
    kept = []
    while len(waiting):
        best, rest = waiting[0], waiting[1:]
        kept.append(best)
        across = np.maximum(0, np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest]))
        down = np.maximum(0, np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest]))
        common = across * down
        waiting = rest[common < _OVERLAP_LIMIT * (area[best] + area[rest] - common)]
    return boxes[np.array(kept, np.int64)]


class OnnxFaces:
    """A network of others: (1, H, W, 3) uint8 RGB in, (n, 5) boxes and scores in pixels of its input out."""

    def __init__(self, path: Path, longest_side_pixels: int) -> None:
        self.name = path.stem
        self.version = version_of(path, f"onnx faces 1: {longest_side_pixels}")
        self._path, self._session = path, _session(path)
        taken = _image_input(self._session, path)
        self._input = taken.name
        self._height, self._width = (_fixed_side(size, longest_side_pixels, path) for size in taken.shape[1:3])

    def boxes(self, images: Images) -> list[NDArray[np.float32]]:
        """See FaceDetector. DataError when the network gives anything but (n, 5) finite numbers for an image."""
        check_images(images)
        return [self._boxes(image) for image in images]

    def _boxes(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        canvas, across, down = fitted(image, self._height, self._width)
        found = np.asarray(_run(self._session, self._input, canvas, self._path)[0], np.float32)
        if found.ndim != 2 or found.shape[1] != 5 or not np.isfinite(found).all():
            raise DataError(f"{self._path} gives {found.shape} for an image; (n, 5) finite boxes and scores expected")
        return in_image(found, image, across, down)
