"""Training of the copy embedder: batches, the loss against loops, and what a few steps already do."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from heliostat.curation import copy_training
from heliostat.curation.copy_network import CopyNetwork, CopyNetworkConfig, evened_out, open_copy_embedder, squeezed
from heliostat.curation.copy_pictures import training_scenes
from heliostat.curation.copy_training import CopyTrainingConfig, copy_loss, make_batch, train_copy_embedder
from heliostat.data.photographs import photograph
from heliostat.errors import DataError

TINY = CopyTrainingConfig(
    network=CopyNetworkConfig(image_size=32, widths=(8, 16, 32), blocks=(1, 1, 1), grid_width=4, dimension=32),
    steps=4,
    scenes_per_batch=3,
    families_per_batch=2,
    tiles_per_scene=2,
    tile_pixels=(32, 64),
    bfloat16=False,
)


@pytest.fixture(scope="module")
def scenes():
    return [[photograph(name)[:200, :200]] for name in ("coffee", "astronaut", "coins")]


def slow_loss(vectors: np.ndarray, ignored: np.ndarray, temp: float) -> tuple[float, float]:
    """InfoNCE and entropy, view by view."""
    num_pairs = len(ignored)
    contrast, entropy = [], []
    for view in range(2 * num_pairs):
        partner = (view + num_pairs) % (2 * num_pairs)
        strangers = [
            other
            for other in range(2 * num_pairs)
            if other % num_pairs != view % num_pairs and not ignored[view % num_pairs, other % num_pairs]
        ]
        logits = [vectors[view] @ vectors[other] / temp for other in [partner, *strangers]]
        contrast.append(np.log(np.exp(logits).sum()) - logits[0])
        entropy.append(-np.log(min(np.linalg.norm(vectors[view] - vectors[other]) for other in strangers)))
    return float(np.mean(contrast)), float(np.mean(entropy))


def test_the_loss_is_that_of_loops_over_views():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((12, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ignored = np.zeros((6, 6), np.bool_)
    ignored[1, 3] = ignored[3, 1] = ignored[0, 0] = True
    losses = copy_loss(torch.from_numpy(vectors), torch.from_numpy(ignored), TINY)
    expected = slow_loss(vectors, ignored, TINY.temp)
    assert (float(losses["contrast"]), float(losses["koleo"])) == pytest.approx(expected, abs=1e-9)


def test_a_batch_holds_two_views_of_each_tile_and_marks_tiles_that_overlap(scenes):
    views, ignored = make_batch(scenes, TINY, np.random.default_rng(0))
    num_pairs = (TINY.scenes_per_batch + TINY.families_per_batch) * TINY.tiles_per_scene
    assert views.shape == (2 * num_pairs, 32, 32, 3)
    assert ignored.shape == (num_pairs, num_pairs)
    assert (ignored == ignored.T).all()
    photographs = TINY.scenes_per_batch * TINY.tiles_per_scene
    same_scene = np.kron(np.eye(TINY.scenes_per_batch), np.ones((TINY.tiles_per_scene,) * 2)) > 0
    assert not ignored[:photographs, :photographs][~same_scene].any()
    assert not ignored[photographs:, :photographs].any()
    one_place = make_batch([[photograph("coffee")[:40, :40]]], TINY, np.random.default_rng(0))[1]
    assert one_place[:photographs, :photographs].all()  # all tiles of a picture of one tile's size overlap


def test_overlap_is_that_of_counted_pixels():
    generator = np.random.default_rng(0)
    corners = generator.integers(0, 20, (30, 2))
    boxes = np.concatenate([corners, corners + generator.integers(1, 15, (30, 2))], axis=1)
    found = copy_training._overlap(boxes)
    for i, j in np.ndindex(30, 30):
        canvases = np.zeros((2, 40, 40), np.bool_)
        for canvas, (top, left, bottom, right) in zip(canvases, boxes[[i, j]], strict=True):
            canvas[top:bottom, left:right] = True
        shared = (canvases[0] & canvases[1]).sum() / min(canvas.sum() for canvas in canvases)
        assert found[i, j] == (shared > 0.02)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(scenes):
    first, second = (train_copy_embedder(scenes, TINY) for _ in range(2))
    other = train_copy_embedder(scenes, TINY.model_copy(update={"seed": 1}))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_short_training_lowers_the_loss_and_tells_copies_from_neighbours(scenes):
    easier = {"mild_ratio": 1.0, "mild_strength": 0.0, "ramp_ratio": 1.0, "koleo_loss_weight": 0.3, "lr": 5e-3}
    config = TINY.model_copy(update={"steps": 80, "warmup_steps": 5, "scenes_per_batch": 16, "average_decay": 0.9, **easier})
    reported = []
    state = train_copy_embedder(training_scenes(), config, report=reported.append)
    assert reported[-1]["contrast"] < 0.8 * reported[0]["contrast"]
    torch.manual_seed(0)
    network = CopyNetwork(config.network)
    accuracies = []
    for weights in (None, state):
        if weights is not None:
            network.load_state_dict(weights)
        with torch.inference_mode():
            views, _ = make_batch(scenes, config.model_copy(update={"families_per_batch": 12}), np.random.default_rng(9), 0.4)
            vectors = torch.nn.functional.normalize(network.eval()(evened_out(views)), dim=1)
        first, second = vectors.chunk(2)
        accuracies.append(float(((first @ second.T).argmax(dim=1) == torch.arange(len(first))).float().mean()))
    assert accuracies[1] > accuracies[0] + 0.1


def test_pools_that_teach_nothing_are_refused(scenes):
    with pytest.raises(DataError, match="0 scenes with 0 pictures"):
        train_copy_embedder([], TINY)
    with pytest.raises(DataError, match="at least one picture in each"):
        train_copy_embedder([*scenes, []], TINY)
    with pytest.raises(DataError, match=r"1 pictures have a side under 32 pixels, first \(20, 50, 3\)"):
        train_copy_embedder([[np.zeros((20, 50, 3), np.uint8)], *scenes], TINY)


def test_the_command_writes_weights_that_open(tmp_path, monkeypatch, capsys):
    path = tmp_path / "copy.safetensors"
    monkeypatch.setattr("sys.argv", ["copy_training", str(path), "extra"])
    assert copy_training.main() == 2
    monkeypatch.setattr("sys.argv", ["copy_training", str(path)])
    monkeypatch.setattr(copy_training, "CopyTrainingConfig", lambda: TINY)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert copy_training.main() == 0
    assert "contrast" in capsys.readouterr().err
    assert load_file(path)["head.weight"].dtype == torch.float16
    embedder = open_copy_embedder(path)
    assert embedder.network.config == TINY.network
    assert embedder([squeezed(photograph("coins"), 50)]).shape == (1, 32)
