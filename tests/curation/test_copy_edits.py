"""Edits give images again, the same ones for the same seed, and leave their input alone."""

import numpy as np
import pytest

from heliostat.curation.copy_edits import FILE, GEOMETRY, LIGHT, OVERLAYS, edited, flip
from heliostat.data.photographs import photograph

EDITS = [edit for edit, _ in (*GEOMETRY, *OVERLAYS, *LIGHT, *FILE)] + [flip]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("shape", [(32, 32), (60, 150), (170, 90)])
def test_every_edit_turns_any_image_into_a_changed_image(edit, shape):
    image = np.ascontiguousarray(photograph("astronaut")[: shape[0], 150 : 150 + shape[1]])
    before = image.copy()
    found = edit(image, np.random.default_rng(1))
    again = edit(image, np.random.default_rng(1))
    assert (found.dtype, found.ndim, found.shape[2]) == (np.uint8, 3, 3)
    assert min(found.shape[:2]) >= 10
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(found, again)
    assert found.shape != image.shape or (found != image).any()


def test_a_chain_without_strength_only_mirrors():
    image = np.ascontiguousarray(photograph("coffee")[:90, :120])
    found = [edited(image, np.random.default_rng(seed), 0.0) for seed in range(8)]
    assert all(np.array_equal(view, image) or np.array_equal(view, image[:, ::-1]) for view in found)
    assert len({view.tobytes() for view in found}) == 2


def test_large_images_are_made_small_before_they_are_edited():
    assert max(edited(photograph("retina"), np.random.default_rng(0), 0.0).shape) == 192
