import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "step_gpu.py"


def run(*words):
    """The script as a user starts it: from a checkout, without the package installed, and with no CUDA device in sight."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def step_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("step_gpu")


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing():
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("step_gpu: torch sees no CUDA device here; run it on a machine with one")
    assert done.stderr.count("\n") == 1
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before


def test_it_runs_where_only_torch_numpy_pydantic_and_yaml_are_installed():
    others = {"boto3", "cv2", "deepspeed", "faiss", "jinja2", "matplotlib", "mlflow", "PIL", "pyarrow", "ray", "safetensors"}
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import step_gpu; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} & others == set()


def test_every_part_that_a_cpu_can_run_runs():
    done = run("--smoke", "--steps", "2", "--drop-rates", "0.3", "--checkpoint")
    assert done.returncode == 0, done.stderr
    assert "| smoke | 0.3 | sdpa | 2 |" in done.stdout
    assert "unknown peak" in done.stdout
    assert "Blocks of the student are recomputed" in done.stdout


def test_the_batch_is_halved_until_it_fits(step_gpu):
    tried = []

    def needs_room_for(limit):
        def run(num_images):
            tried.append(num_images)
            if num_images > limit:
                raise torch.OutOfMemoryError("full")
            return num_images

        return run

    assert step_gpu.largest_batch(64, needs_room_for(20)) == 16
    assert tried == [64, 32, 16]
    assert step_gpu.largest_batch(4, needs_room_for(0)) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_unknown(step_gpu, name, peak):
    assert step_gpu.peak_tflops(name, None) == peak
    assert step_gpu.peak_tflops(name, 500.0) == 500.0


def test_work_per_image_equals_an_independent_table(step_gpu):
    cases = {name: step_gpu.setting(arch, 0.4, 1).tflop_per_image() for name, arch in step_gpu.ARCHS.items()}
    # The table of tests/models/test_flops.py counts ViT-g without registers: 4 of 261 and of 54 tokens.
    assert cases["vit_giant2"] == pytest.approx(5.036, rel=0.05)
    assert cases["vit_small"] < cases["vit_base"] < cases["vit_large"] < cases["vit_giant2"]
