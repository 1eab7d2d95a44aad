from pathlib import Path

import numpy as np
import pytest
import torch

from heliostat.models.config import HeadConfig
from heliostat.models.heads import ProjectionHead
from heliostat.models.names import from_fair_names
from heliostat.models.weights import load_state, submodule_state

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = HeadConfig(out_dim=12, hidden_dim=10, bottleneck_dim=6, nlayers=3)


def test_logits_equal_the_reference():
    with np.load(GOLDEN / "losses.npz") as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("head")}
    head = ProjectionHead(64, HeadConfig(out_dim=96, hidden_dim=48, bottleneck_dim=32, nlayers=3))
    load_state(head, from_fair_names(submodule_state(golden, "head")), "golden head")
    torch.testing.assert_close(head(golden["head_input"]), golden["head_output"], atol=1e-5, rtol=0)


def test_initial_logits_are_cosines():
    head = ProjectionHead(8, SMALL)
    logits = head(100 * torch.randn(50, 8))
    assert logits.abs().max() <= 1 + 1e-6
    assert torch.equal(head.last_layer.parametrizations.weight.original0, torch.ones(12, 1))


@pytest.mark.parametrize("nlayers", [1, 2, 4])
def test_the_number_of_layers_is_that_of_the_config(nlayers):
    head = ProjectionHead(8, SMALL.model_copy(update={"nlayers": nlayers}))
    assert sum(isinstance(layer, torch.nn.Linear) for layer in head.mlp) == nlayers
    assert head(torch.randn(3, 8)).shape == (3, 12)


def test_a_head_without_rows_gives_zero_gradients_to_every_parameter():
    head = ProjectionHead(8, SMALL)
    head(torch.zeros(0, 8)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_gain_and_direction_of_the_prototypes_are_both_trained():
    head = ProjectionHead(8, SMALL)
    head(torch.randn(3, 8)).square().sum().backward()
    weight = head.last_layer.parametrizations.weight
    assert weight.original0.grad.any()
    assert weight.original1.grad.any()
