"""torchvision, imported where its compiled operators do not fit torch.

transformers and timm import torchvision, and torchvision describes its operators to torch while it is imported. Where its
wheel was built for another torch (torch for CPUs beside torchvision for CUDA is enough) its compiled file is not loaded, the
operators do not exist, and the import fails. No DINOv2 model calls them (they thin out detected boxes), so their signatures are
declared without an implementation, and only where the import failed for exactly that reason; calling one still fails, by name.
"""

import importlib.util
import re

import torch

from heliostat.errors import PublishError

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # an operator lives as long as the object that declared it


def import_torchvision() -> None:
    """Import torchvision, so that transformers and timm can be. Raises PublishError when it is there and cannot be imported."""
    if importlib.util.find_spec("torchvision") is None:
        return  # timm says so itself, transformers does without
    for _ in range(len(_OPERATORS) + 1):
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            found = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if found is None or found[1] not in _OPERATORS:
                reason = str(error).splitlines()[0]
                raise PublishError(f"torchvision cannot be imported: {reason}; install the build that fits torch") from error
            _declare(found[1])
        else:
            return
    raise PublishError("torchvision cannot be imported although its operators were declared; install the build that fits torch")


def _declare(operator: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(operator + _SIGNATURE)  # type: ignore[no-untyped-call]
    _declared.append(library)
