"""Use of the hardware: model FLOPs over the peak, time to go, memory."""

import resource

import pytest
import torch
from tiny_training import Log, job, settings, trainer

from heliostat.metrics import METRICS
from heliostat.models.config import BackboneConfig
from heliostat.training.costs import flops_per_image, head_training_flops_per_image
from heliostat.training.throughput import PEAK_TFLOPS, peak_of_device, peak_tflops, use_of_hardware

CPU = torch.device("cpu")


def use(config, step: int = 4, speed: float = 100.0, **changes) -> dict[str, float]:
    return use_of_hardware(config, step=step, images_per_second=speed, **({"num_workers": 2, "device": CPU} | changes))


def test_time_to_go_is_what_is_left_at_this_speed() -> None:
    config = settings()  # 8 steps of 8 images
    assert use(config)["train/eta_seconds"] == pytest.approx(4 * 8 / 100)
    assert use(config, step=8)["train/eta_seconds"] == 0


def test_mfu_is_model_flops_over_the_peaks_of_all_workers() -> None:
    config = settings("scaling.peak_tflops=0.5")
    assert use(config)["train/mfu"] == pytest.approx(flops_per_image(config) * 100 / (2 * 0.5e12))
    assert use(config, num_workers=1)["train/mfu"] == pytest.approx(2 * use(config)["train/mfu"])
    teacher = BackboneConfig(arch="vit_small", img_size=32, patch_size=8)
    assert use(config, teacher=teacher)["train/mfu"] == pytest.approx(flops_per_image(config, teacher) * 100 / 1e12)


def test_while_heads_warm_up_the_frozen_backbone_has_no_backward_pass() -> None:
    changes = ("init.weights=model/x@1", "init.head_warmup_steps=4", "scaling.peak_tflops=0.5", "method.drop_path_rate=0")
    config = settings(*changes)
    assert use(config, step=4)["train/mfu"] == pytest.approx(head_training_flops_per_image(config) * 100 / 1e12)
    assert use(config, step=5)["train/mfu"] == pytest.approx(flops_per_image(config) * 100 / 1e12)


def test_cpus_have_no_peak_unless_one_is_given() -> None:
    assert "train/mfu" not in use(settings())
    assert peak_tflops(settings(), CPU) is None
    assert peak_tflops(settings("scaling.peak_tflops=1.5"), CPU) == 1.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 836.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GH200 480GB", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert peak_of_device(name) == peak


def test_no_name_of_the_table_hides_a_longer_one() -> None:
    names = list(PEAK_TFLOPS)
    for number, name in enumerate(names):
        assert not [later for later in names[number + 1 :] if f" {name} " in f" {later} "], name


def test_memory_is_what_this_process_held_at_most() -> None:
    held = torch.ones(50 * 2**20, dtype=torch.uint8)
    found = use(settings())["train/memory_bytes"]
    assert found >= held.numel()
    assert found == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.05)


def test_every_record_of_a_run_has_the_numbers(tmp_path) -> None:
    from heliostat.training.loop import fit

    log = Log()
    fit(trainer(job(tmp_path, settings("scaling.peak_tflops=0.01")), log))
    for step, metrics in log.metrics:
        assert metrics.keys() >= {"train/eta_seconds", "train/memory_bytes", "train/mfu"}, step
        assert metrics["train/mfu"] == pytest.approx(flops_per_image(settings()) * metrics["train/images_per_second"] / 0.01e12)
        assert metrics.keys() <= METRICS.keys()
