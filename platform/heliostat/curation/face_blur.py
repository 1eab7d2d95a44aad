"""Faces are made unrecognisable, and only then is an image encoded anew; an image without faces keeps its bytes.

Each face, enlarged by a margin, is averaged over cells: three along the longer side of the region, about two across the face.
Cells are spread out again smoothly and fade into the picture outside of the enlarged box. A face is therefore at most 9
colours, whatever is done to undo it; a Gaussian blur of known width could be inverted.

The new file has the pixels that `decode` shows, upright and without transparency: EXIF (orientation, GPS, thumbnail), XMP and
comments are gone, the colour profile stays.
"""

import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from heliostat.curation.features_config import FaceBlurConfig
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.image_header import probe
from heliostat.errors import DataError

# Shapes: H W 3 an image, n faces.

CELLS = 3  # along the longer side of a region; with more, blurred faces are detected again (benchmarks/detectors.py)
_FADE_RATIO = 0.1  # of the face's longer side, outside of the enlarged box
_LEAST_CELL_PIXELS = 3
_WEBP_QUALITY = 90  # a lossy WebP does not say its quality; 90 is above what the web uses
_KEPT_PROFILE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # the new file is grey or RGB: a profile for CMYK would be wrong


def faces_to_blur(boxes: NDArray[np.float32], config: FaceBlurConfig) -> NDArray[np.float32]:
    """(n, 4) of the boxes that are certain enough and have an area, in an order that does not depend on theirs.

    boxes: (n, 5) left, top, right, bottom, score; or (n, 4), all certain. DataError for other shapes and numbers that are not
    finite.
    """
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5) or not np.isfinite(boxes).all():
        raise DataError(f"faces are (n, 5) finite numbers: left, top, right, bottom, score; these are {boxes.shape}")
    certain = boxes[:, 4] >= config.min_face_score if boxes.shape[1] == 5 else np.ones(len(boxes), np.bool_)
    with_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    found = boxes[certain & with_area, :4]
    return np.asarray(found[np.lexsort(found.T)], np.float32)


def blur_pixels(image: NDArray[np.uint8], boxes: NDArray[np.float32], config: FaceBlurConfig) -> NDArray[np.uint8]:
    """A copy of an (H, W, 3) image with the faces of `faces_to_blur` blurred; nothing else changes."""
    blurred = image.copy()
    for box in faces_to_blur(boxes, config).astype(np.float64):
        _blur_one(blurred, box, config.face_margin_ratio)
    return blurred


def _blur_one(image: NDArray[np.uint8], box: NDArray[np.float64], margin_ratio: float) -> None:
    """Replace a region in place."""
    height, width = image.shape[:2]
    longer = max(box[2] - box[0], box[3] - box[1])
    fade = max(1.0, _FADE_RATIO * longer)
    reach = margin_ratio * longer + fade
    low_x, low_y = (int(np.floor(edge - reach)) for edge in box[:2])
    high_x, high_y = (int(np.ceil(edge + reach)) for edge in box[2:])
    left, top, right, bottom = max(low_x, 0), max(low_y, 0), min(high_x, width), min(high_y, height)
    if left >= right or top >= bottom:
        return
    region = image[top:bottom, left:right]
    opaque_x = _fading(np.arange(left, right), low_x, high_x, fade)
    opaque_y = _fading(np.arange(top, bottom), low_y, high_y, fade)
    opaque = np.minimum(opaque_y[:, None], opaque_x[None, :])[:, :, None]
    region[:] = np.rint(opaque * _averaged(region) + (1 - opaque) * region).astype(np.uint8)


def _fading(pixels: NDArray[np.int64], low: int, high: int, fade: float) -> NDArray[np.float64]:
    """1 inside, falling to 0 over the last `fade` pixels on each side of low..high; the image's own edge does not fade."""
    centre = pixels + 0.5
    return np.asarray(np.clip(np.minimum(centre - low, high - centre) / fade, 0.0, 1.0), np.float64)


def _averaged(region: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The region from the averages of its cells, spread out smoothly."""
    height, width = region.shape[:2]
    cell = max(_LEAST_CELL_PIXELS, max(height, width) / CELLS)
    cells = (max(1, round(width / cell)), max(1, round(height / cell)))
    averages = cv2.resize(region, cells, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(averages, (width, height), interpolation=cv2.INTER_LINEAR), np.float64)


def blur_faces(data: bytes, boxes: NDArray[np.float32], config: FaceBlurConfig, limits: DecodeConfig | None = None) -> bytes:
    """The file with its faces blurred, in its own format; the very same bytes when there is no face to blur.

    boxes: as `faces_to_blur`, in pixels of the decoded (upright) image; what lies outside of it is cut off. JPEG keeps its
    quantisation tables and its chroma subsampling, and is not progressive; PNG, BMP and TIFF are lossless, WebP if it was; of
    an animation the first frame stays. Raises ImageRejected for bytes that do not decode.
    """
    faces = faces_to_blur(boxes, config)
    if not len(faces):
        return data
    pixels = decode(data, limits if limits is not None else DecodeConfig())
    if not _touches(faces, *pixels.shape[:2]):
        return data
    return _encoded(blur_pixels(pixels, faces, config), data)


def _touches(faces: NDArray[np.float32], height: int, width: int) -> bool:
    """Whether any face lies in the image at least in part."""
    inside = (faces[:, 0] < width) & (faces[:, 1] < height) & (faces[:, 2] > 0) & (faces[:, 3] > 0)
    return bool(inside.any())


def _encoded(pixels: NDArray[np.uint8], original: bytes) -> bytes:
    """Pixels in the format of the original, near its quality; the same bytes each time."""
    image_format = probe(original).format
    with Image.open(io.BytesIO(original), formats=[image_format.upper()]) as opened:
        mode = opened.mode
        settings = _settings(opened, image_format, original)
        if mode in _KEPT_PROFILE_MODES and opened.info.get("icc_profile"):
            settings["icc_profile"] = opened.info["icc_profile"]
    image = Image.fromarray(pixels)
    if mode in ("1", "L", "LA") or mode.startswith("I;16"):
        image = image.convert("L")
    if image_format == "gif":
        image = image.quantize(256)
        settings.pop("icc_profile", None)  # Pillow would write it as an extension that few read
    sink = io.BytesIO()
    image.save(sink, image_format.upper(), **settings)
    return sink.getvalue()


def _settings(opened: Image.Image, image_format: str, original: bytes) -> dict[str, Any]:
    """What Pillow needs to write the format near the original's quality."""
    if image_format == "jpeg" and isinstance(opened, JpegImagePlugin.JpegImageFile):
        tables = [[min(255, max(1, step)) for step in opened.quantization[key]] for key in sorted(opened.quantization)]
        subsampling = JpegImagePlugin.get_sampling(opened) if opened.mode == "RGB" else 0
        # Neither progressive nor optimised: Pillow sizes the buffer of those by guess, and fails on noisy pictures.
        return {"qtables": tables[:2], "subsampling": max(subsampling, 0)}
    if image_format == "webp":
        return {"lossless": True} if b"VP8L" in original[:64] else {"quality": _WEBP_QUALITY}
    return {"compression": "tiff_deflate"} if image_format == "tiff" else {}
