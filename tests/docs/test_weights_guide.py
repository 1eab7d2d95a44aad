"""The guide to weights, run from top to bottom as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from random_backbone import random_backbone, random_model, tiny_config

from heliostat.artifacts import ArtifactRef, ArtifactStore, verify
from heliostat.runtime.recipe import read_recipe
from heliostat.storage import LocalStore

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "weights.md"
# Where torchvision fits torch this does nothing; see publishing/torchvision_operators.py.
PRELUDE = "from heliostat.publishing.torchvision_operators import import_torchvision\nimport_torchvision()\n"


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_guide_to_weights_shows_works_as_it_stands(tmp_path: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    blocks = {kind: re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S) for kind in ("python", "yaml", "bash")}
    torch.save(dict(random_backbone(tiny_config("mlp_registers")).state_dict()), tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    student = read_recipe("laptop").distill.student
    random_model(tmp_path / "heliostat-store", student, "demo-student")
    (tmp_path / "release.yaml").write_text(blocks["yaml"][0], encoding="utf-8")
    commands = [line.split() for block in blocks["bash"] for line in block.splitlines()]
    outputs = [run(["-m", "heliostat", *words[1:]], tmp_path) for words in commands]
    assert "onnx: parity with the model, largest difference" in outputs[-2]
    assert "└─ model: model/demo-student@1" in outputs[-1]
    release = ArtifactStore(LocalStore(tmp_path / "heliostat-store")).load(ArtifactRef.parse("release/demo-release@1"))
    verify(release)
    printed = run(["-c", PRELUDE + "\n".join(blocks["python"])], tmp_path)
    assert printed.startswith("fair vit_small 32 () ")
    assert sorted({name.partition("/")[0] for name in release.record.files}) == [
        "README.md",
        "config.json",
        "huggingface",
        "model.safetensors",
        "onnx",
        "parity.json",
        "timm",
    ]
