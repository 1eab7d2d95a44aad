"""A model artifact -> files that others can load, each format read back by its own library and compared before it counts."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from heliostat.artifacts import Artifact
from heliostat.errors import ConfigError, HeliostatError, PublishError, UsageError
from heliostat.models.config import BackboneConfig
from heliostat.models.stored import BACKBONE, read_backbone
from heliostat.publishing import fair_format, huggingface_format, onnx_format, timm_format
from heliostat.publishing.config import FormatName, PublishConfig
from heliostat.publishing.formats import SEED, Format, Tokens, largest_difference, random_images

PARITY = "parity.json"
FORMATS: Mapping[FormatName, Format] = {
    "fair": fair_format,
    "huggingface": huggingface_format,
    "timm": timm_format,
    "onnx": onnx_format,
}


def check_libraries(formats: Sequence[FormatName]) -> None:
    """Raise UsageError when a library that a format needs is not installed. Imports nothing."""
    for name in formats:
        missing = [library for library in FORMATS[name].LIBRARIES if importlib.util.find_spec(library) is None]
        if missing:
            raise UsageError(f"publish.formats has {name}, which needs {', '.join(missing)}: pip install 'heliostat[export]'")


def check_architecture(formats: Sequence[FormatName], config: BackboneConfig) -> None:
    """Raise ConfigError when a format cannot say what the backbone is."""
    for name in formats:
        if reason := FORMATS[name].refusal(config):
            able = [other for other in FORMATS if not FORMATS[other].refusal(config)]
            raise ConfigError(
                f"publish.formats has {name}, which cannot hold this backbone: {reason}; these can: {', '.join(able)}"
            )


@torch.inference_mode()
def export_formats(model: Artifact, config: PublishConfig, folder: Path) -> dict[FormatName, float]:
    """Write every format below `folder`, and `parity.json`; returns the largest difference found for each.

    Raises PublishError when a format, read back by its own library, gives features that differ by more than the tolerance.
    """
    backbone, info = read_backbone(model)
    images_BCHW = random_images(info.backbone)
    features = backbone(images_BCHW)
    ours = Tokens(features.cls_BD, features.registers_BRD, features.patches_BND)
    differences: dict[FormatName, float] = {}
    for name in config.formats:
        there = folder / FORMATS[name].FOLDER
        there.mkdir(exist_ok=True)
        with _failures_of(name, str(model.ref)):
            FORMATS[name].write(backbone, info, there)
            theirs = FORMATS[name].read_back(there, images_BCHW)
        difference = largest_difference(ours, theirs)
        if not difference <= config.parity_tolerance:  # NaN passes no comparison
            raise PublishError(
                f"{name} of {model.ref} gives features that differ by {difference:g}, the limit publish.parity_tolerance is "
                f"{config.parity_tolerance:g}; nothing is published (is {BACKBONE} sound, and the library one that was tested?)"
            )
        differences[name] = difference
    (folder / PARITY).write_text(json.dumps(_parity(config, differences, images_BCHW.shape), indent=1) + "\n", encoding="utf-8")
    return differences


@contextlib.contextmanager
def _failures_of(name: FormatName, ref: str) -> Iterator[None]:
    """Turn whatever a library raises into one line; the cause stays attached for --debug."""
    try:
        yield
    except HeliostatError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise PublishError(
            f"{name} of {ref} cannot be written and read back: {type(error).__name__}: {first}; "
            "are the libraries of the versions in constraints.txt? (--debug shows where)"
        ) from error


def _parity(config: PublishConfig, differences: Mapping[FormatName, float], shape: Sequence[int]) -> dict[str, object]:
    libraries = sorted({"torch", *(library for name in differences for library in FORMATS[name].LIBRARIES)})
    return {
        "largest_difference": dict(differences),
        "tolerance": config.parity_tolerance,
        "images": {"shape": list(shape), "pixels": "normal", "seed": SEED},
        "libraries": {library: sys.modules[library].__version__ for library in libraries},  # all are imported by now
    }
