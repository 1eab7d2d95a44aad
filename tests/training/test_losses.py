import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from heliostat.training.losses import (
    TargetAssignment,
    dino_global_loss,
    dino_local_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
    soft_cross_entropy,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "losses.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def slow_sinkhorn(logits, temperature):
    """The textbook form in float64, scaled down by prototype so that nothing overflows."""
    scores = logits.double() / temperature
    matrix = (scores - scores.amax(0, keepdim=True)).exp().T
    prototypes, samples = matrix.shape
    matrix /= matrix.sum()
    for _ in range(3):
        matrix /= matrix.sum(1, keepdim=True) * prototypes
        matrix /= matrix.sum(0, keepdim=True) * samples
    return (matrix * samples).T


def test_sinkhorn_targets_equal_the_reference(golden):
    temperature = float(golden["temperature"])
    for loss in ("dino", "ibot"):
        ours = sinkhorn_knopp(golden[f"{loss}_teacher_logits"], temperature)
        torch.testing.assert_close(ours, golden[f"{loss}_sinkhorn"], atol=1e-6, rtol=1e-5)


def test_dino_loss_equals_the_reference(golden):
    ours = soft_cross_entropy(golden["dino_student_logits"], golden["dino_sinkhorn"], 0.1).mean()
    assert ours.item() == pytest.approx(golden["dino_loss"].item(), rel=1e-5)


def test_centering_over_two_steps_equals_the_reference(golden):
    targets, temperature = TargetAssignment(96, "centering"), float(golden["temperature"])
    first = targets(golden["dino_teacher_logits"], temperature)
    targets.commit()
    second = targets(golden["dino_teacher_logits2"], temperature)
    torch.testing.assert_close(first, golden["dino_softmax1"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(second, golden["dino_softmax2"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(targets.center, golden["dino_center"], atol=1e-6, rtol=1e-5)


def test_masked_ibot_loss_equals_the_reference(golden):
    masks = golden["ibot_masks"]
    weights = (1 / masks.sum(1).clamp(min=1))[masks.nonzero()[:, 0]]
    torch.testing.assert_close(weights, golden["ibot_weights"])
    student, targets = golden["ibot_student_logits"], golden["ibot_sinkhorn"]
    ours = ibot_loss(student, targets, weights, num_crops=len(masks), student_temp=0.1)
    assert ours.item() == pytest.approx(golden["ibot_loss"].item(), rel=1e-5)


def test_koleo_and_its_gradient_equal_the_reference(golden):
    embeddings = golden["koleo_input"].clone().requires_grad_()
    loss = koleo_loss(embeddings)
    loss.backward()
    assert loss.item() == pytest.approx(golden["koleo"].item(), rel=1e-5)
    torch.testing.assert_close(embeddings.grad, golden["koleo_grad"], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sinkhorn_equals_a_slow_float64_version_up_to_logits_of_ten_thousand(scale):
    torch.manual_seed(0)
    sharp = scale * torch.rand(24, 10)
    sharp[:, 0] = scale  # one favourite of all rows, so that rows compete
    mixed = scale * torch.rand(1, 10) + 0.2 * torch.rand(24, 10)  # huge differences between prototypes, small ones between rows
    for logits in (sharp, mixed):
        ours = sinkhorn_knopp(logits, 0.04)
        torch.testing.assert_close(ours.double(), slow_sinkhorn(logits, 0.04), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.sum(1), torch.ones(24))


def test_sinkhorn_is_finite_where_every_exponential_underflows():
    logits = torch.full((6, 5), -1e4)
    logits[0] = 1e4
    targets = sinkhorn_knopp(logits, 0.04)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets, torch.full((6, 5), 0.2))


def test_sinkhorn_uses_prototypes_about_equally_and_centering_does_not():
    torch.manual_seed(0)
    logits = 0.1 * torch.randn(256, 8)
    logits[:, 0] += 0.5
    share = sinkhorn_knopp(logits, 0.05).mean(0)
    assert share.max() < 0.14
    assert TargetAssignment(8, "centering")(logits, 0.05).mean(0).max() > 0.9


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_targets_of_no_rows_are_empty_and_leave_the_centre(centering):
    targets = TargetAssignment(8, centering)
    assert targets(torch.zeros(0, 8), 0.05).shape == (0, 8)
    targets.commit()
    assert targets.center is None or not targets.center.any()


def test_centre_and_prototypes_are_float32_for_half_precision_logits():
    for centering in ("centering", "sinkhorn_knopp"):
        assert TargetAssignment(8, centering)(torch.randn(4, 8, dtype=torch.bfloat16), 0.05).dtype == torch.float32


def test_cls_token_losses_average_over_every_pair_of_different_crops():
    torch.manual_seed(0)
    student, targets = torch.randn(6, 5, 7), torch.softmax(torch.randn(2, 5, 7), -1)
    total = 0.0
    for crop in range(6):
        for teacher in range(2):
            if crop != teacher:
                logits = student[crop].double() / 0.1
                total += -(targets[teacher] * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean() / 10
    ours = dino_global_loss(student[:2], targets, num_local_crops=4, student_temp=0.1)
    ours = ours + dino_local_loss(student[2:], targets, student_temp=0.1)
    assert ours.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient_equal_the_textbook_form_over_several_blocks_of_rows(dtype):
    student = torch.randn(2, 70, 65_536).to(dtype)  # 64 such rows make one block
    targets = torch.softmax(torch.randn(70, 65_536), -1) * torch.linspace(0.5, 2, 70)[:, None]  # rows need not sum to 1
    weights = torch.randn(2, 70)
    logits = student.double().requires_grad_()
    expected = -(targets * torch.log_softmax(logits / 0.1, -1)).sum(-1)
    (expected * weights).sum().backward()
    student.requires_grad_()
    ours = soft_cross_entropy(student, targets, 0.1)
    (ours * weights).sum().backward()
    torch.testing.assert_close(ours.double(), expected.detach(), atol=0, rtol=1e-5)
    assert student.grad.dtype == dtype
    accuracy = 1e-5 if dtype == torch.float32 else 3e-3
    assert (student.grad.double() - logits.grad).norm() < accuracy * logits.grad.norm()


def test_cross_entropy_keeps_nothing_but_logits_and_targets():
    student, targets, kept = torch.randn(6, 50).requires_grad_(), torch.softmax(torch.randn(6, 50), -1), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        soft_cross_entropy(student, targets, 0.1)
    assert set(kept) == {student.data_ptr(), targets.data_ptr()}


def test_losses_are_finite_for_logits_of_ten_thousand():
    student, targets = 1e4 * torch.randn(4, 9).requires_grad_(), torch.softmax(torch.randn(4, 9), -1)
    loss = soft_cross_entropy(student, targets, 0.1).mean()
    loss.backward()
    assert loss.isfinite()


def test_koleo_of_duplicates_is_large_and_finite_in_every_precision():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        embeddings = torch.randn(1, 64).repeat(4, 1).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = koleo_loss(embeddings)
        loss.backward()
        assert loss.dtype == torch.float32
        assert 10 < loss.item() < 20
        # In float16 the gradient of an exact duplicate is beyond 65,504; parameters are float32, where it is clipped.
        assert dtype == torch.float16 or embeddings.grad.isfinite().all()


def test_koleo_of_zero_embeddings_is_finite():
    embeddings = torch.zeros(3, 8, requires_grad=True)
    koleo_loss(embeddings).backward()
    assert embeddings.grad.isfinite().all()


def test_koleo_of_a_single_image_is_zero_with_a_zero_gradient():
    embeddings = torch.randn(1, 8, requires_grad=True)
    loss = koleo_loss(embeddings)
    loss.backward()
    assert loss.item() == 0
    assert not embeddings.grad.any()


def test_koleo_over_all_ranks_is_that_of_the_only_rank_when_there_is_one():
    embeddings = torch.randn(5, 8)
    assert koleo_loss(embeddings, distributed=True) == koleo_loss(embeddings)
    assert koleo_loss(embeddings[:1], distributed=True) == 0


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest_neighbour():
    angles = torch.tensor([0.0, 0.1, 1.0])
    points = 3 * torch.stack([angles.cos(), angles.sin()], 1)
    chords = [2 * math.sin(0.05), 2 * math.sin(0.05), 2 * math.sin(0.45)]
    assert koleo_loss(points).item() == pytest.approx(-sum(map(math.log, chords)) / 3, rel=1e-5)


RANK = """
import sys, torch, torch.distributed as dist
from heliostat.training.losses import TargetAssignment, koleo_loss, sinkhorn_knopp

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
logits = torch.load(f"{folder}/logits.pt", weights_only=True)
own = logits[:7] if rank == 0 else logits[7:]
targets = TargetAssignment(logits.shape[1], "centering")
targets(own, 0.05)
targets.commit()
without_masks = logits if rank == 0 else logits[:0]
images = logits[[0, 13]][rank : rank + 1].requires_grad_()
koleo = koleo_loss(images, distributed=True)
koleo.backward()
result = [sinkhorn_knopp(own, 0.05), sinkhorn_knopp(without_masks, 0.05), targets.center, koleo.detach(), images.grad]
torch.save(result, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_compute_the_targets_of_the_joined_batch(tmp_path):
    torch.manual_seed(0)
    logits = torch.randn(20, 12)
    torch.save(logits, tmp_path / "logits.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    joined = sinkhorn_knopp(logits, 0.05)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), joined)
    torch.testing.assert_close(first[1], joined)
    assert second[1].shape == (0, 12)
    pair = logits[[0, 13]].requires_grad_()  # one image a rank: each has a neighbour on the other one only
    koleo = koleo_loss(pair)
    koleo.backward()
    torch.testing.assert_close((first[3] + second[3]) / 2, koleo.detach())
    torch.testing.assert_close(torch.cat([first[4], second[4]]) / 2, pair.grad)
    for center in (first[2], second[2]):
        torch.testing.assert_close(center, 0.1 * logits.mean(0, keepdim=True))
