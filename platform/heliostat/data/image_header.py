"""What the first bytes of an image file say, read by our own few lines that allocate nothing, and the limits on it.

Whatever the bytes are, the only exception that leaves this file is ImageRejected.
"""

import struct
from dataclasses import dataclass, replace
from typing import Literal, get_args

from heliostat.data.config import DecodeConfig, ImageFormat
from heliostat.errors import DataError

Reason = Literal[
    "unknown_format",
    "truncated",
    "too_many_pixels",
    "too_small",
    "extreme_ratio",
    "too_many_bytes",
    "decode_error",
    "format_not_allowed",
    "checksum_mismatch",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

MAX_SEGMENTS = 4096  # metadata segments before the pixels; a hostile file could hold millions of empty ones
_ORIENTATION_TAG, _WIDTH_TAG, _HEIGHT_TAG = 274, 256, 257  # TIFF 6.0 and EXIF
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame


@dataclass(frozen=True)
class Verdict:
    """Why an image was turned away: a reason from a fixed list, and one line of detail for people."""

    reason: str
    detail: str


class ImageRejected(DataError):  # noqa: N818  an outcome that callers count, not a fault
    """The bytes are not an image that we accept. `reason` is one of REASONS."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail

    @property
    def verdict(self) -> Verdict:
        """The same as a value."""
        return Verdict(self.reason, self.detail)

    def __reduce__(self) -> tuple[type["ImageRejected"], tuple[str, str]]:
        """Survive the way between processes with both arguments."""
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes say. width and height are in pixels as displayed, after the EXIF orientation (1 to 8)."""

    format: ImageFormat
    width: int
    height: int
    orientation: int = 1
    num_channels: int = 3
    """Channels stored, where the header says so at once (JPEG: 1, 3 or 4)."""


def probe(data: bytes) -> ImageHeader:
    """Read format, size and orientation from the header alone. ImageRejected: unknown_format, truncated, decode_error."""
    if not data:
        raise ImageRejected("truncated", "the file is empty")
    name = _sniff(data)
    try:
        header = _READERS[name](data)
    except (struct.error, IndexError):
        raise ImageRejected("truncated", f"the {name} header ends after {len(data)} bytes") from None
    if header.orientation in (5, 6, 7, 8):
        header = replace(header, width=header.height, height=header.width)
    return header if 1 <= header.orientation <= 8 else replace(header, orientation=1)


def _sniff(data: bytes) -> ImageFormat:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"BM"):
        return "bmp"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "tiff"
    raise ImageRejected("unknown_format", f"first bytes {data[:8].hex()} belong to no image format that is read")


def _jpeg_header(data: bytes) -> ImageHeader:
    position, orientation = 2, 1
    for _ in range(MAX_SEGMENTS):
        while data[position] == 0xFF and data[position + 1] == 0xFF:  # fill bytes
            position += 1
        if data[position] != 0xFF:
            raise ImageRejected("decode_error", f"no JPEG marker at byte {position}")
        marker, (length,) = data[position + 1], struct.unpack_from(">H", data, position + 2)
        if marker in _JPEG_SIZE_MARKERS:
            height, width, num_channels = struct.unpack_from(">HHB", data, position + 5)
            return ImageHeader("jpeg", width, height, orientation, num_channels)
        if marker in (0xD9, 0xDA) or length < 2:
            raise ImageRejected("decode_error", f"JPEG marker {marker:02x} at byte {position} comes before the size")
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    raise ImageRejected("decode_error", f"more than {MAX_SEGMENTS} JPEG segments before the size")


def _png_header(data: bytes) -> ImageHeader:
    if data[12:16] != b"IHDR":
        raise ImageRejected("decode_error" if len(data) >= 16 else "truncated", "PNG does not begin with IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    position, orientation = 8, 1
    for _ in range(MAX_SEGMENTS):
        if position + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        if kind in (b"eXIf", b"IDAT"):
            break
        position += 12 + length
    return ImageHeader("png", width, height, orientation)


def _webp_header(data: bytes) -> ImageHeader:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise ImageRejected("decode_error" if len(data) >= 16 else "truncated", f"WebP begins with the chunk {kind!r}")
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    struct.unpack_from("<6s", data, 24)
    position, orientation = 12, 1
    for _ in range(MAX_SEGMENTS if data[20] & 8 else 0):  # bit 3 of the flags: there is an EXIF chunk
        if position + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length].removeprefix(b"Exif\0\0"))
            break
        position += 8 + length + length % 2
    return ImageHeader("webp", width, height, orientation)


def _gif_header(data: bytes) -> ImageHeader:
    width, height = struct.unpack_from("<HH", data, 6)
    return ImageHeader("gif", width, height)


def _bmp_header(data: bytes) -> ImageHeader:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header_bytes == 12 else "<ii", data, 18)
    return ImageHeader("bmp", abs(width), abs(height))  # a negative height means top-down rows


def _tiff_header(data: bytes) -> ImageHeader:
    tags = _tiff_tags(data)
    if _WIDTH_TAG not in tags or _HEIGHT_TAG not in tags:
        raise ImageRejected("decode_error", "TIFF has no width or no height")
    return ImageHeader("tiff", tags[_WIDTH_TAG], tags[_HEIGHT_TAG], tags.get(_ORIENTATION_TAG, 1))


_READERS = {"jpeg": _jpeg_header, "png": _png_header, "webp": _webp_header, "gif": _gif_header, "bmp": _bmp_header}
_READERS["tiff"] = _tiff_header


def _tiff_tags(data: bytes) -> dict[int, int]:
    """The single SHORT and LONG values of the first directory of a TIFF, which is also how EXIF is stored."""
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (num_tags,) = struct.unpack_from(order + "H", data, directory)
    tags: dict[int, int] = {}
    for position in range(directory + 2, directory + 2 + 12 * min(num_tags, MAX_SEGMENTS), 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, position)
        if count == 1 and kind in (3, 4):
            (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, position + 8)
    return tags


def _exif_orientation(exif: bytes) -> int:
    """Orientation of an EXIF block, 1 where the block is broken: it is a hint, not worth an image."""
    try:
        return _tiff_tags(exif).get(_ORIENTATION_TAG, 1)
    except struct.error:
        return 1


def check_limits(header: ImageHeader, num_bytes: int, limits: DecodeConfig) -> None:
    """Raise ImageRejected when a header breaks a limit."""
    shortest, longest = sorted((header.width, header.height))
    size = f"{header.width} x {header.height} pixels"
    if num_bytes > limits.max_bytes:
        raise ImageRejected("too_many_bytes", f"{num_bytes} bytes, the limit is {limits.max_bytes}")
    if header.format not in limits.formats:
        raise ImageRejected("format_not_allowed", f"{header.format} is not one of {', '.join(limits.formats)}")
    if shortest < limits.min_side_pixels:
        raise ImageRejected("too_small", f"{size}, the shortest side allowed is {limits.min_side_pixels}")
    if shortest * longest > limits.max_pixels:
        raise ImageRejected("too_many_pixels", f"{size}, the limit is {limits.max_pixels} in all")
    if longest > limits.max_aspect_ratio * shortest:
        raise ImageRejected("extreme_ratio", f"{size}, the limit is {limits.max_aspect_ratio:g} to 1")
