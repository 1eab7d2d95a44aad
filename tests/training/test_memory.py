"""The memory formulas against real steps: what autograd keeps, and what the allocator hands out at the fullest moment.

A change in models/blocks.py, models/heads.py or training/losses.py that keeps more or less for the backward pass fails the
first test; the number to change stands at the top of training/memory.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from heliostat.config import apply_overrides, validate
from heliostat.data.batch import Batch
from heliostat.models.config import BackboneConfig
from heliostat.training.costs import num_parameters
from heliostat.training.distillation import Distillation
from heliostat.training.memory import GIB, Memory, held_for_backward, training_memory
from heliostat.training.method import SelfDistillation
from heliostat.training.recipe import DistillConfig, PretrainConfig, TrainingConfig

HEAD = {"head_n_prototypes": 1024, "head_bottleneck_dim": 64, "head_hidden_dim": 256}
SMALL: dict[str, Any] = {
    "student": {"arch": "vit_tiny", "embed_dim": 128, "depth": 3, "num_heads": 4, "img_size": 112},
    "method": {
        "drop_path_rate": 0.0,
        "centering": "sinkhorn_knopp",
        "dino": HEAD,
        "ibot": {**HEAD, "separate_head": True, "mask_ratio_min_max": [0.3, 0.3]},
    },
    "crops": {"global_crops_size": 112, "local_crops_size": 56, "local_crops_number": 4},
    "train": {"compute_dtype": "bfloat16", "global_batch_size": 4},
}
TEACHER = BackboneConfig(arch="vit_tiny", embed_dim=192, depth=4, num_heads=3, img_size=112, ffn_layer="swiglufused")
SETTINGS: dict[str, list[str]] = {
    "mlp": [],
    "float32": ["train.compute_dtype=float32"],
    "swiglu": ["student.ffn_layer=swiglufused"],
    "drop path": ["method.drop_path_rate=0.5"],
    "swiglu, drop path": ["student.ffn_layer=swiglufused", "method.drop_path_rate=0.25", "train.global_batch_size=8"],
    "drop path, float32": ["method.drop_path_rate=0.5", "train.compute_dtype=float32"],
    "wider and deeper": ["student.embed_dim=256", "student.depth=6", "student.num_heads=8"],
    "larger crops": ["student.img_size=168", "crops.global_crops_size=168"],
    "global crops only": ["crops.local_crops_number=0"],
    "shared head, centering": ["method.ibot.separate_head=false", "method.centering=centering"],
    "many prototypes": ["method.dino.head_n_prototypes=16384", "method.ibot.head_n_prototypes=16384", "student.depth=1"],
}


def pretrain(*overrides: str) -> PretrainConfig:
    return validate(PretrainConfig, apply_overrides(SMALL, overrides), "small")


def distill(*overrides: str) -> DistillConfig:
    shared = {key: value for key, value in SMALL.items() if key != "student"}
    students = {"one": SMALL["student"], "two": {**SMALL["student"], "embed_dim": 64, "ffn_layer": "swiglufused"}}
    return validate(DistillConfig, apply_overrides({**shared, "students": students}, overrides), "small")


def distill_one(*overrides: str) -> DistillConfig:
    return validate(DistillConfig, apply_overrides(SMALL, overrides), "small")


def batch_of(config: TrainingConfig) -> Batch:
    """One worker's batch, every second crop masked to exactly the mean mask ratio."""
    images, crops = config.train.global_batch_size, config.crops
    num_patches = (crops.global_crops_size // 14) ** 2
    masks = torch.zeros(2 * images, num_patches, dtype=torch.bool)
    masks[::2, : round(0.3 * num_patches)] = True
    sides = (2 * images, crops.global_crops_size), (crops.local_crops_number * images, crops.local_crops_size)
    return Batch(*(torch.randn(count, 3, side, side) for count, side in sides), masks)


def method_of(config: TrainingConfig) -> Any:
    torch.manual_seed(0)
    if isinstance(config, DistillConfig):
        return Distillation(teacher=TEACHER, students=config.backbones, method=config.method).train()
    return SelfDistillation(config.student, config.method).train()


def autocast(config: TrainingConfig) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=config.train.compute_dtype == "bfloat16")


def estimate(config: TrainingConfig) -> Memory:
    teacher = TEACHER if isinstance(config, DistillConfig) else None
    return training_memory(config, teacher, config.train.global_batch_size)


def held(config: TrainingConfig) -> float:
    teacher = TEACHER if isinstance(config, DistillConfig) else None
    return sum(held_for_backward(config, teacher, config.train.global_batch_size).values())


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside nested dataclasses and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict) or is_dataclass(value):
        for inner in (value if isinstance(value, dict) else vars(value)).values():
            yield from tensors_of(inner)


def bytes_held(config: TrainingConfig) -> int:
    """Bytes of the storages that a step holds between forward and backward: saved by autograd, or results of its own."""
    method, batch = method_of(config), batch_of(config)
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with autocast(config), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        teacher = method.teacher_targets(batch, 0.05)
        student = method.student_outputs(batch)
        total = method.weighted_sum(method.losses(student, teacher, batch))
    for tensor in [*tensors_of(teacher), *tensors_of(student)]:
        keep(tensor)
    for tensor in [*method.parameters(), *tensors_of(batch)]:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert total.requires_grad  # the graph, and with it every storage, is alive until here
    return sum(storages.values())


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that the allocator had handed out at once while `work` ran, those from before not counted."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_step_keeps_for_its_backward_pass_is_what_the_formula_says(name: str) -> None:
    config = pretrain(*SETTINGS[name])
    assert held(config) == pytest.approx(bytes_held(config), rel=0.01)


def test_several_students_hold_what_each_holds_and_one_teacher() -> None:
    assert held(distill()) == pytest.approx(bytes_held(distill()), rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        pretrain("train.global_batch_size=8", "student.depth=6", "student.embed_dim=192"),
        pretrain("train.global_batch_size=8", "student.depth=6", "method.drop_path_rate=0.4", "train.compute_dtype=float32"),
        pretrain("method.dino.head_n_prototypes=16384", "method.ibot.head_n_prototypes=16384", "student.depth=1"),
        pretrain("method.dino.head_n_prototypes=32768", "method.ibot.head_n_prototypes=32768", "train.global_batch_size=16"),
        pretrain("method.dino.head_n_prototypes=16384", "method.ibot.separate_head=false", "crops.local_crops_number=12"),
        distill("method.dino.head_n_prototypes=4096", "method.ibot.head_n_prototypes=4096"),
        distill_one("method.centering=centering", "method.ibot.head_n_prototypes=8192", "student.depth=1"),
    ],
    ids=["activations", "float32", "logits", "logits in blocks", "shared head", "distillation", "targets"],
)
def test_the_fullest_moment_of_a_whole_step_is_estimated_within_a_twentieth(config: TrainingConfig) -> None:
    method, batch = method_of(config), batch_of(config)
    parameters = [parameter for network in method.networks.values() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)

    def one_step() -> None:
        with autocast(config):
            teacher = method.teacher_targets(batch, 0.05)
            student = method.student_outputs(batch)
            total = method.weighted_sum(method.losses(student, teacher, batch))
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update_teacher(0.99)

    step = estimate(config).step
    expected = sum(step.values()) - step["crops in float32"]  # the batch is older than the measurement
    assert expected == pytest.approx(peak_bytes(one_step), rel=0.05)


def test_state_is_five_copies_of_what_is_trained_and_one_of_the_frozen_teacher() -> None:
    config = distill()
    trained = sum(sum(num_parameters(one, config.method)) for one in config.backbones.values())
    state = estimate(config).state
    assert sum(state.values()) == 4 * (5 * trained + sum(num_parameters(TEACHER, config.method)))
    real = method_of(config)
    assert sum(parameter.numel() for parameter in real.students.parameters()) == trained


def test_a_gpu_needs_more_than_the_formula_counts_and_the_reserve_says_so() -> None:
    on_gpu = estimate(pretrain("scaling.use_gpu=true"))
    assert on_gpu.reserve > GIB
    assert estimate(pretrain()).reserve == 0
    assert on_gpu.total == sum(on_gpu.state.values()) + sum(on_gpu.step.values()) + on_gpu.reserve


def test_without_images_enough_the_optimizer_is_the_fullest_moment() -> None:
    step = estimate(pretrain("train.global_batch_size=1", "student.embed_dim=1024", "student.depth=2")).step
    assert "optimizer temporaries" in step
