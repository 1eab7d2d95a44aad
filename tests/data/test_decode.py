"""Good images of every kind decode to what Pillow shows; hostile bytes end as ImageRejected and nothing else."""

import io
import pickle
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from heliostat.data.augment import apply_parameters
from heliostat.data.config import IMAGE_FORMATS, CropsConfig, DecodeConfig
from heliostat.data.crop_parameters import CropParameters, image_generator, sample_parameters
from heliostat.data.decode import REASONS, ImageRejected, decode, probe, reduction_for
from heliostat.data.photographs import photograph, photographs

LIMITS = DecodeConfig()


def _saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def _photograph(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(photograph("astronaut")).resize((width, height))


def _reason(data: bytes, limits: DecodeConfig = LIMITS) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode(data, limits)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def _expected(data: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_every_format_decodes_like_pillow(image_format: str) -> None:
    data = _saved(_photograph(), image_format)
    header = probe(data)
    assert (header.format, header.width, header.height) == (image_format, 60, 40)
    pixels = decode(data, LIMITS)
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert np.abs(pixels.astype(int) - _expected(data)).mean() < 1.0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp", "tiff"])
def test_the_camera_orientation_is_undone(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = (
        {"quality": 95, "subsampling": 0} if image_format == "jpeg" else {"lossless": True} if image_format == "webp" else {}
    )
    data = _saved(_photograph(), image_format, exif=exif, **options)
    pixels, header = decode(data, LIMITS), probe(data)
    assert pixels.shape == (header.height, header.width, 3)
    assert (header.width, header.height) == ((60, 40) if orientation < 5 else (40, 60))
    assert np.abs(pixels.astype(int) - _expected(data)).mean() < 1.0


@pytest.mark.parametrize(
    ("mode", "image_format"), [("L", "jpeg"), ("L", "png"), ("1", "png"), ("P", "png"), ("P", "gif"), ("L", "tiff")]
)
def test_gray_and_palette_images_become_three_channels(mode: str, image_format: str) -> None:
    data = _saved(_photograph().convert(mode), image_format)
    assert np.abs(decode(data, LIMITS).astype(int) - _expected(data)).mean() < 1.0


def test_cmyk_jpegs_keep_their_colours() -> None:
    data = _saved(_photograph().convert("CMYK"), "jpeg", quality=95)
    assert np.abs(decode(data, LIMITS).astype(int) - np.array(_photograph())).mean() < 4.0


def test_sixteen_bit_images_keep_their_upper_byte() -> None:
    gray = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
    for image_format in ("png", "tiff"):
        pixels = decode(_saved(Image.fromarray(gray), image_format), LIMITS)
        assert (pixels == (gray >> 8)[:, :, None]).all()


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 20, 40))
    for image_format in ("png", "webp"):
        pixels = decode(_saved(image, image_format, **({"lossless": True} if image_format == "webp" else {})), LIMITS)
        assert pixels[5, 5].tolist() == [0, 0, 200]
        assert pixels[5, 35].tolist() == [255, 255, 255]
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert (decode(_saved(palette, "png", transparency=0), LIMITS) == 255).all()


@pytest.mark.parametrize("image_format", ["gif", "webp", "tiff", "png"])
def test_animations_give_their_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "lime")]
    data = _saved(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert np.abs(decode(data, LIMITS).astype(int) - np.array([255, 0, 0])).max() < 8


def test_each_limit_has_its_reason() -> None:
    data = _saved(_photograph(80, 20), "png")
    assert _reason(data, DecodeConfig(max_bytes=len(data) - 1)) == "too_many_bytes"
    assert _reason(data, DecodeConfig(max_pixels=1599)) == "too_many_pixels"
    assert _reason(data, DecodeConfig(max_aspect_ratio=3.9)) == "extreme_ratio"
    assert _reason(data, DecodeConfig(min_side_pixels=21)) == "too_small"
    assert _reason(data, DecodeConfig(formats=("jpeg",))) == "format_not_allowed"
    exact = DecodeConfig(max_bytes=len(data), max_pixels=1600, max_aspect_ratio=4.0, min_side_pixels=20, formats=("png",))
    assert decode(data, exact).shape == (20, 80, 3)


@pytest.mark.parametrize(
    "data", [b"hello, this is text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"SIMPLE  =", b"\0" * 64]
)
def test_other_files_are_of_unknown_format(data: bytes) -> None:
    assert _reason(data) == "unknown_format"


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_every_truncation_is_rejected_or_decoded_but_never_anything_else(image_format: str) -> None:
    data = _saved(_photograph(), image_format)
    for length in sorted({*range(0, 60, 3), *np.linspace(60, len(data) - 1, 25).astype(int).tolist()}):
        _survives(data[:length])
    assert _reason(data[: len(data) // 2]) in ("truncated", "decode_error")
    assert _reason(b"") == "truncated"


def _survives(data: bytes) -> None:
    """Decoding ends with pixels or with a known reason."""
    try:
        pixels = decode(data, LIMITS)
    except ImageRejected as rejected:
        assert rejected.reason in REASONS  # noqa: PT017  both outcomes are fine
    else:
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3


@pytest.mark.filterwarnings("ignore")  # Pillow warns about the damage that was done on purpose
@pytest.mark.parametrize("image_format", [*IMAGE_FORMATS, "exif"])
def test_flipped_bits_never_escape_as_another_exception(image_format: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    image = _photograph()
    data = _saved(image, "jpeg", exif=exif) if image_format == "exif" else _saved(image, image_format)
    rng = np.random.default_rng(IMAGE_FORMATS.index(image_format) if image_format != "exif" else 99)
    for attempt in range(120):
        damaged = bytearray(data)
        region = min(len(data), 120) if attempt % 2 else len(data)  # half of the damage goes to the header
        for position in rng.integers(0, region, 1 + attempt % 4).tolist():
            damaged[position] ^= 1 << int(rng.integers(8))
        _survives(bytes(damaged))


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _png_chunk(b"IEND", b"")


def _tiff(*tags: tuple[int, int, int, int]) -> bytes:
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


JPEG_SIZE = b"\xff\xc0\x00\x11\x08"
HOSTILE = {
    "png bomb": (_png(60_000, 60_000, _png_chunk(b"IDAT", zlib.compress(bytes(10**6)))), "too_many_pixels"),
    "png of 4 billion columns": (_png(2**32 - 1, 2**32 - 1), "too_many_pixels"),
    "png without pixels": (_png(0, 10), "too_small"),
    "png of one long line": (_png(40_000, 20), "extreme_ratio"),
    "png with no data": (_png(64, 64), None),
    "png with another first chunk": (b"\x89PNG\r\n\x1a\n" + _png_chunk(b"tEXt", bytes(20)), "decode_error"),
    "png with a million empty chunks": (_png(64, 64, *([_png_chunk(b"tEXt", b"")] * 20_000)), None),
    "png with a text bomb": (_png(64, 64, _png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 * 10**7)))), None),
    "png chunk of 4 GB": (_png(64, 64, struct.pack(">I", 2**32 - 1) + b"IDAT"), None),
    "gif bomb": (b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(10), "too_many_pixels"),
    "gif with a frame beyond its canvas": (
        b"GIF89a"
        + struct.pack("<HHBBB", 20, 20, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0)
        + b"\x02\x01\x44\x00;",
        "decode_error",
    ),
    "bmp bomb": (b"BM" + bytes(12) + struct.pack("<Iii", 40, 2**31 - 1, -(2**31)) + bytes(40), "too_many_pixels"),
    "bmp of the smallest height": (b"BM" + bytes(12) + struct.pack("<Iii", 40, -5, 0) + bytes(40), "too_small"),
    "tiff bomb": (_tiff((256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1)), "too_many_pixels"),
    "tiff without a size": (_tiff((259, 3, 1, 1)), "decode_error"),
    "tiff with a directory far away": (b"II*\0" + struct.pack("<I", 2**32 - 1), "truncated"),
    "tiff whose directory is itself": (b"MM\0*" + struct.pack(">I", 0), None),
    "tiff with pixels far away": (
        _tiff((256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 2**31), (279, 4, 1, 4096)),
        None,
    ),
    "webp bomb": (b"RIFF\xff\xff\xff\x7fWEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\xff\xff\xff\xff", "too_many_pixels"),
    "webp of an unknown chunk": (b"RIFF\xff\xff\xff\x7fWEBPXXXX" + bytes(30), "decode_error"),
    "webp lossless without data": (b"RIFF\x20\0\0\0WEBPVP8L\x10\0\0\0\x2f" + bytes(12), "too_small"),
    "jpeg bomb": (b"\xff\xd8" + JPEG_SIZE + struct.pack(">HHB", 65_500, 65_500, 3) + bytes(40), "too_many_pixels"),
    "jpeg of no height": (b"\xff\xd8" + JPEG_SIZE + struct.pack(">HHB", 0, 100, 3) + bytes(40), "too_small"),
    "jpeg without a size": (b"\xff\xd8\xff\xda" + bytes(40), "decode_error"),
    "jpeg segment of length zero": (b"\xff\xd8\xff\xe0\0\0" + bytes(40), "decode_error"),
    "jpeg of fill bytes": (b"\xff\xd8" + b"\xff" * 10_000, "truncated"),
    "jpeg of a hundred thousand segments": (b"\xff\xd8" + b"\xff\xe0\x00\x02" * 100_000, "decode_error"),
    "jpeg with nonsense after the marker": (b"\xff\xd8\xff\xe0\x00\x04abXX" + bytes(10), "decode_error"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_rejected_before_any_pixel_is_decoded(name: str) -> None:
    data, reason = HOSTILE[name]
    found = _reason(data)
    assert reason in (None, found)


def test_a_jpeg_with_endless_scans_is_rejected() -> None:
    data = _saved(_photograph(), "jpeg", progressive=True)
    start = data.rindex(b"\xff\xda")
    assert _reason(data[:-2] + data[start:-2] * 200 + b"\xff\xd9") == "decode_error"


def test_a_jpeg_that_declares_two_sizes_is_rejected() -> None:
    data = _saved(_photograph(), "jpeg")
    start = data.index(b"\xff\xc0")
    other = bytearray(data[start : start + 19])
    other[5:9] = struct.pack(">HH", 30_000, 30_000)
    assert _reason(data[:start] + bytes(other) + data[start:]) == "too_many_pixels"
    assert _reason(data[: start + 19] + bytes(other) + data[start + 19 :]) == "decode_error"


def test_stray_bytes_at_the_end_of_a_jpeg_do_no_harm() -> None:
    data = _saved(_photograph(), "jpeg")
    assert (decode(data + b"stray", LIMITS) == decode(data, LIMITS)).all()
    assert (decode(data[:-2] + b"\0\1\2\3" + data[-2:], LIMITS) == decode(data, LIMITS)).all()


def test_samples_without_a_range_are_rejected() -> None:
    assert _reason(_saved(Image.fromarray(np.ones((32, 32), np.float32)), "tiff")) == "decode_error"


def test_a_rejection_survives_pickling_with_its_verdict() -> None:
    rejected = pickle.loads(pickle.dumps(ImageRejected("too_small", "3 x 3")))
    assert (rejected.verdict.reason, rejected.verdict.detail, str(rejected)) == ("too_small", "3 x 3", "too_small: 3 x 3")


@pytest.mark.parametrize(
    ("height", "width", "reduction"),
    [(375, 500, 1), (768, 1024, 1), (870, 1156, 1), (873, 1161, 2), (2000, 3000, 4), (5000, 7000, 8)],
)
def test_the_reduction_follows_from_the_size_and_the_crops(height: int, width: int, reduction: int) -> None:
    assert reduction_for(height, width, CropsConfig()) == reduction_for(width, height, CropsConfig()) == reduction
    assert reduction_for(height, width, CropsConfig(local_crops_size=400)) == 1 or reduction == 8
    assert reduction_for(100, 100_000, CropsConfig()) == 1  # the box that is left for such a picture is 100 pixels high


def test_no_crop_of_a_reduced_image_is_enlarged() -> None:
    config = CropsConfig(global_crops_size=56, local_crops_size=24)
    for height, width in ((250, 350), (500, 400), (1000, 1400), (300, 2400)):
        reduction = reduction_for(height, width, config)
        reduced_hw = (-(-height // reduction), -(-width // reduction))
        crops = [crop for index in range(200) for crop in sample_parameters(reduced_hw, config, image_generator(0, 0, index))]
        assert min(min(crop.height, crop.width) - crop.size for crop in crops) >= 0


@pytest.mark.parametrize("subsampling", [0, 2])
def test_crops_of_reduced_images_lie_close_to_those_of_whole_ones(subsampling: int) -> None:
    config, seen = CropsConfig(global_crops_size=112, local_crops_size=49), 0
    for name, picture in photographs().items():
        data = _saved(Image.fromarray(picture), "jpeg", quality=90, subsampling=subsampling)
        whole, reduced = decode(data, LIMITS), decode(data, LIMITS, crops=config)
        by = reduction_for(*picture.shape[:2], config)
        assert reduced.shape[:2] == (-(-whole.shape[0] // by), -(-whole.shape[1] // by))
        errors = []
        for crop in sample_parameters(reduced.shape[:2], config, image_generator(0, 0, 0)) if by > 1 else []:
            corner = (min(whole.shape[1], (crop.left + crop.width) * by), min(whole.shape[0], (crop.top + crop.height) * by))
            expected = Image.fromarray(whole).resize(
                (crop.size,) * 2, Image.Resampling.BICUBIC, (crop.left * by, crop.top * by, *corner)
            )
            ours = apply_parameters(reduced, CropParameters(*crop[:5]))
            errors.append(np.abs(ours.astype(int) - np.asarray(expected)).mean())
        seen += len(errors)
        if errors:  # on textures the smallest boxes, hardly larger than the crop, differ more: 2.2 at most (measured)
            assert np.mean(errors) <= 1.5, name
            assert max(errors) <= 2.5, name
    assert seen >= 100


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_reduced_images_keep_orientation_and_odd_sides(mode: str, orientation: int, quarter_turns: int) -> None:
    config, picture, exif = (
        CropsConfig(global_crops_size=16, local_crops_size=8),
        _photograph(333, 251).convert(mode),
        Image.Exif(),
    )
    upright = decode(_saved(picture, "jpeg", quality=95), LIMITS, crops=config)
    assert upright.shape == (63, 84, 3)  # a quarter, rounded up
    exif[274] = orientation
    turned = decode(_saved(picture, "jpeg", quality=95, exif=exif), LIMITS, crops=config)
    assert (turned == np.rot90(upright, quarter_turns)).all()
    quarter = picture.convert("RGB").crop((0, 0, 332, 248)).resize((83, 62), Image.Resampling.BOX)
    assert np.abs(upright[:62, :83].astype(int) - np.asarray(quarter)).mean() < 4.0  # another filter; a pixel's shift costs 20


def test_cmyk_is_inverted_where_the_adobe_marker_says_so() -> None:
    picture = _photograph()
    data = _saved(picture.convert("CMYK"), "jpeg", quality=95)  # with the marker, inverted, as Photoshop writes it
    start = data.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", data, start + 2)
    assert data[start + 4 : start + 9] == b"Adobe"
    unmarked = data[:start] + data[start + 2 + length :]
    assert np.abs(decode(data, LIMITS).astype(int) - np.array(picture)).mean() < 4.0
    assert (decode(unmarked, LIMITS) == _expected(unmarked)).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "P", "1", "I;16"])
def test_png_of_every_kind_decodes_like_pillow_to_the_bit(mode: str) -> None:
    picture = (
        Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27)
        if mode == "I;16"
        else _photograph().convert(mode)
    )
    data = _saved(picture, "png")
    expected = np.array(picture, np.uint16) >> 8 if mode == "I;16" else np.array(picture.convert("RGB"))
    assert (decode(data, LIMITS) == (expected[:, :, None] if mode == "I;16" else expected)).all()


def test_texts_and_profiles_of_a_png_change_no_pixel() -> None:
    data = _saved(_photograph(), "png")
    end = data.index(b"IDAT") - 4
    extra = (
        _png_chunk(b"gAMA", struct.pack(">I", 220_000))
        + _png_chunk(b"acTL", struct.pack(">II", 10**6, 0))
        + _png_chunk(b"tEXt", b"k\0v")
    )
    assert (decode(data[:end] + extra + data[end:], LIMITS) == decode(data, LIMITS)).all()
