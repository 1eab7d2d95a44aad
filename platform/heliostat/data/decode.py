"""Bytes to pixels, for bytes that strangers wrote.

`image_header.py` checks every limit before a decoder sees the image. JPEG goes to libjpeg-turbo (simplejpeg), plain PNG and
WebP to OpenCV, the rest and CMYK to Pillow. Whatever the bytes are, the only exception that leaves this file is ImageRejected.
Colour profiles are not applied: pixels are what the file stores.
"""

import io
import math
import struct
import zlib
from typing import NoReturn

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from heliostat.data.config import CropsConfig, DecodeConfig
from heliostat.data.crop_parameters import MIN_ASPECT_RATIO, fallback_box
from heliostat.data.image_header import MAX_SEGMENTS, REASONS, ImageHeader, ImageRejected, Reason, Verdict, check_limits, probe

__all__ = ["REASONS", "ImageHeader", "ImageRejected", "Reason", "Verdict", "check_limits", "decode", "probe", "reduction_for"]

Pixels = npt.NDArray[np.uint8]

_MAX_JPEG_SCANS = 100  # a small progressive file can repeat scans to burn minutes; encoders write about ten
_MAX_SCANNED_PIXELS = 10**9  # over all scans; about ten seconds at worst (measured), a 50 Mpx file of twenty scans


def reduction_for(height: int, width: int, crops: CropsConfig) -> int:
    """How far a JPEG of this size may be shrunk while it is decoded, for these crops: 1, 2, 4 or 8.

    The largest at which the smallest box that any crop can draw still has the crop's own pixels on each side, so that no crop
    is enlarged because of it. It depends on the size and the settings only, so a decoded image can be kept across epochs.
    """
    kinds = [(crops.global_crops_scale, crops.global_crops_size)]
    if crops.local_crops_number:
        kinds.append((crops.local_crops_scale, crops.local_crops_size))
    for reduction in (8, 4, 2):
        reduced_hw = (-(-height // reduction), -(-width // reduction))
        if all(_smallest_side(*reduced_hw, scale[0]) >= size for scale, size in kinds):
            return reduction
    return 1


def _smallest_side(height: int, width: int, least_scale: float) -> int:
    """The shortest side in pixels of the boxes that `crop_parameters` can draw on an image."""
    drawn = round(math.sqrt(height * width * least_scale * MIN_ASPECT_RATIO))
    return min(drawn, *fallback_box(height, width)[2:])


def reduction_above(height: int, width: int, least_side: int) -> int:
    """How far a JPEG may be shrunk while it is decoded so that its shorter side keeps `least_side` pixels: 1, 2, 4 or 8."""
    return next((reduction for reduction in (8, 4, 2) if min(height, width) >= reduction * least_side), 1)


def decode(data: bytes, limits: DecodeConfig, *, crops: CropsConfig | None = None, least_side: int | None = None) -> Pixels:
    """Decode the first frame to (height, width, 3) uint8 RGB, writable and contiguous.

    crops: with these settings a JPEG is decoded at 1 / `reduction_for` of its size, sides rounded up; None is the full size.
    least_side: likewise at 1 / `reduction_above`, for what looks at whole images of at most so many pixels.
    The EXIF orientation is applied; grey becomes three equal channels; 16-bit values keep their upper byte; transparency is
    laid over white. Raises ImageRejected, and nothing else, for any bytes. Memory: at most 28 bytes for each pixel of the
    header's size beside `data` (measured: 6 for JPEG, 17 for TIFF, 25 for WebP with transparency).
    """
    if len(data) > limits.max_bytes:
        raise ImageRejected("too_many_bytes", f"{len(data)} bytes, the limit is {limits.max_bytes}")
    header = probe(data)
    check_limits(header, len(data), limits)
    reduction = 1
    if header.format == "jpeg" and crops is not None:
        reduction = reduction_for(header.height, header.width, crops)
    elif header.format == "jpeg" and least_side is not None:
        reduction = reduction_above(header.height, header.width, least_side)
    try:
        if header.format == "jpeg" and header.num_channels != 4:
            pixels = _decode_jpeg(data, header, reduction)
        else:
            plain = _decode_with_opencv(data, header)
            pixels = _decode_with_pillow(data, header, reduction) if plain is None else plain
        if header.format != "tiff":  # Pillow turns TIFF itself
            pixels = _oriented(pixels, header.orientation)
        return np.ascontiguousarray(pixels)
    except ImageRejected:
        raise
    except Exception as error:  # noqa: BLE001  decoders raise anything on hostile bytes; all of it becomes a verdict
        _reject(error)


def _reject(error: Exception) -> NoReturn:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    cut_off = any(mark in text.lower() for mark in ("truncat", "premature", "unexpected end", "eof"))
    raise ImageRejected("truncated" if cut_off else "decode_error", text) from error


def _stored_size(header: ImageHeader, reduction: int = 1) -> tuple[int, int]:
    """(width, height) before the orientation, after the reduction."""
    width, height = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
    return -(-width // reduction), -(-height // reduction)


def _decode_jpeg(data: bytes, header: ImageHeader, reduction: int) -> Pixels:
    height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
    if (width, height) != _stored_size(header):
        raise ImageRejected("decode_error", f"JPEG declares two sizes, {_stored_size(header)} and {(width, height)}")
    _check_scans(data, header)
    width, height = _stored_size(header, reduction)
    try:
        # Exact transforms: each of the fast ones saves 5 % of the time and costs up to 1.1 grey values on average (measured).
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=reduction)
    except ValueError as error:
        if "extraneous" not in str(error):
            raise  # stray bytes between segments harm no pixel; all else does
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=reduction, strict=False)
    return pixels


def _check_scans(data: bytes, header: ImageHeader) -> None:
    """Every scan walks over the whole image, whatever it holds: bound the walk, not the bytes."""
    scans = data.count(b"\xff\xda")
    if scans > _MAX_JPEG_SCANS or scans * header.width * header.height > _MAX_SCANNED_PIXELS:
        raise ImageRejected(
            "decode_error",
            f"JPEG has {scans} scans of {header.width} x {header.height} pixels; "
            f"the limits are {_MAX_JPEG_SCANS} scans and {_MAX_SCANNED_PIXELS} pixels over all scans",
        )


def _decode_with_opencv(data: bytes, header: ImageHeader) -> Pixels | None:
    """PNG and WebP of the plainest kinds in two thirds of Pillow's time; None is left to Pillow, verdicts included."""
    plain = _plain_png(data) if header.format == "png" else data if data[12:16] == b"VP8 " else None
    if plain is None:
        return None
    pixels = cv2.imdecode(np.frombuffer(plain, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return np.asarray(pixels, np.uint8) if pixels is not None and pixels.shape[1::-1] == _stored_size(header) else None


def _plain_png(data: bytes) -> bytes | None:
    """The header, the pixels and the end of an 8-bit grey or RGB PNG, nothing else; None for other kinds and broken files.

    What the decoder never sees (texts, profiles, frames of an animation, wrong checksums) cannot harm or log anything.
    """
    if data[24:26] not in (b"\x08\x00", b"\x08\x02"):  # bits per sample, colour type
        return None
    kept, position = [data[:8]], 8
    for _ in range(MAX_SEGMENTS):
        if position + 12 > len(data):
            return None
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind in (b"tRNS", b"PLTE"):
            return None
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            if end > len(data) or zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                return None
            kept.append(data[position:end])
        if kind == b"IEND":
            return b"".join(kept)
        position = end
    return None


def _decode_with_pillow(data: bytes, header: ImageHeader, reduction: int) -> Pixels:
    with Image.open(io.BytesIO(data), formats=[header.format.upper()]) as opened:
        expected = (header.width, header.height) if header.format == "tiff" else _stored_size(header)
        if opened.size != expected:
            raise ImageRejected("decode_error", f"{header.format} declares two sizes, {expected} and {opened.size}")
        if header.format == "jpeg":
            _check_scans(data, header)
            opened.draft(opened.mode, (max(1, expected[0] // reduction), max(1, expected[1] // reduction)))
        opened.load()
        image: Image.Image = opened
        if image.mode.startswith("I;16"):
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise ImageRejected("decode_error", f"samples of mode {image.mode} have no fixed range; convert to 8 or 16 bits")
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            if image.mode != "RGBA":
                image = image.convert("RGBA")
            canvas = Image.new("RGB", image.size, "white")
            canvas.paste(image, mask=image.getchannel("A"))
            image = canvas
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _oriented(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the camera's orientation (EXIF 2.32, tag 274)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
