"""What a recipe means by weights: an artifact or a file. Without torch, so that a wrong name is refused at once."""

import re
from pathlib import Path

from heliostat.errors import UsageError


def names_artifact(text: str) -> bool:
    """Whether a name of weights is meant as an artifact rather than as a file or a folder."""
    return re.match(r"^[a-z]+/[^/@]+@[^/@]+$", text) is not None


def weights_path(text: str) -> Path:
    """The file or folder of weights that is not an artifact. Raises UsageError when there is none on this machine."""
    if "://" in text:
        raise UsageError(f"{text}: weights are read from a local file or folder; copy them to this machine first")
    path = Path(text).expanduser()
    if not path.exists():
        raise UsageError(f"no weights at {text}; give model/name@version, a file (.pth, .safetensors) or a folder")
    return path
