"""timm and transformers can be imported beside a torchvision whose compiled operators do not fit torch."""

import subprocess
import sys

import pytest

from heliostat.errors import PublishError
from heliostat.publishing.torchvision_operators import import_torchvision


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)


def test_the_libraries_are_imported_and_only_what_was_missing_is_declared() -> None:
    done = run(
        "import torch\n"
        "from heliostat.publishing.torchvision_operators import _declared, import_torchvision\n"
        "import_torchvision()\n"
        "import_torchvision()\n"
        "import timm\n"
        "from transformers import Dinov2Model\n"
        "from torchvision.extension import _has_ops\n"
        "assert len(_declared) == (0 if _has_ops() else 2), _declared\n"
        "boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])\n"
        "try:\n    torch.ops.torchvision.nms(boxes, torch.ones(1), 0.5)\n"
        "except NotImplementedError as error:\n    assert 'torchvision::nms' in str(error) and not _has_ops()\n"
        "else:\n    assert _has_ops()\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("message", ["operator torchvision::roi_align does not exist", "CUDA error: no device\nmore"])
def test_any_other_failure_is_reported_and_nothing_is_declared(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    import builtins

    real = builtins.__import__

    def broken(name, *rest):
        if name == "torchvision":
            raise RuntimeError(message)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(PublishError, match=r"^torchvision cannot be imported: (operator|CUDA).*; install the build") as refused:
        import_torchvision()
    assert "\n" not in str(refused.value)
