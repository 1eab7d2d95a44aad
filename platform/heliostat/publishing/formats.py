"""What every published format has in common: it is written, read back by the library that it is for, and compared.

A format is a module of this folder with the names of `Format`. The library of a format is imported inside its functions only.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from heliostat.errors import PublishError
from heliostat.models.config import BackboneConfig
from heliostat.models.stored import ModelInfo
from heliostat.models.vit import VisionTransformer

# Shapes: B images, C channels, H W image sides, R registers, N patches, D width.

NUM_IMAGES, SEED = 4, 0


class Tokens(NamedTuple):
    """What a published model says about images: all after the final norm, float32 on the CPU."""

    cls_BD: Tensor
    registers_BRD: Tensor
    patches_BND: Tensor


class Format(Protocol):
    """A way to publish a backbone."""

    FOLDER: str
    """Where its files lie below the release; empty for the release itself."""
    LIBRARIES: tuple[str, ...]
    """What it needs beyond the dependencies of heliostat; all are in the extra `export`."""

    def refusal(self, config: BackboneConfig) -> str:
        """Why the format cannot say what the backbone is, or nothing where it can."""

    def write(self, backbone: VisionTransformer, info: ModelInfo, folder: Path) -> None:
        """Write all files into an empty folder. The same backbone gives the same bytes."""

    def read_back(self, folder: Path, images_BCHW: Tensor) -> Tokens:
        """Load the folder as a user would and compute the tokens of normalised images of the native size."""

    def loading(self, info: ModelInfo) -> str:
        """Python for the card, run in the folder of the release: makes `cls` and `patches` of `images`."""

    def notes(self, info: ModelInfo) -> list[str]:
        """What a user of the format must know beyond that, one sentence each."""


@contextlib.contextmanager
def importing(library: str) -> Iterator[None]:
    """Turn a failed import into one line. Raises PublishError."""
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PublishError(f"{library} cannot be imported: {reason}; install the versions of constraints.txt") from error


def random_images(config: BackboneConfig) -> Tensor:
    """The images that formats are compared on: normal pixels (4, C, H, W) of the native size, always the same."""
    shape = (NUM_IMAGES, config.in_chans, config.img_size, config.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def split_tokens(tokens_BTD: Tensor, num_registers: int) -> Tokens:
    """Cut a sequence [cls, registers, patches] into its parts."""
    first_patch = 1 + num_registers
    return Tokens(tokens_BTD[:, 0], tokens_BTD[:, 1:first_patch], tokens_BTD[:, first_patch:])


def largest_difference(ours: Tokens, theirs: Tokens) -> float:
    """Largest absolute difference of any token; infinite where a shape differs, NaN where a value is."""
    if [part.shape for part in ours] != [part.shape for part in theirs]:
        return float("inf")
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([(one - other).detach().abs().max() for one, other in pairs if one.numel()]).max())
