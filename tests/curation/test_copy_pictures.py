"""What the shipped weights saw and did not see."""

import numpy as np
import pytest

from heliostat.curation.copy_pictures import calibration_scenes, drawn_family, training_scenes
from heliostat.data.photographs import REGIONS, photographs


def test_training_calibration_and_evaluation_share_no_pixel_of_the_photographs():
    for trained, calibrated, image in zip(training_scenes(), calibration_scenes(), photographs().values(), strict=False):
        seen = np.zeros(image.shape[:2], np.int64)
        rows, columns = trained[0].shape[:2]
        np.testing.assert_array_equal(trained[0], image[:rows, :columns])
        seen[:rows, :columns] += 1
        below = calibrated[0].shape[0]
        np.testing.assert_array_equal(calibrated[0], image[len(image) - below :, :columns])
        seen[len(image) - below :, :columns] += 1
        seen[:, round(REGIONS["right"][0] * image.shape[1]) :] += 1
        assert seen.max() == 1


def test_there_are_enough_scenes_for_a_batch_and_films_have_many_frames():
    scenes = training_scenes()
    assert len(scenes) >= 16
    assert max(map(len, scenes)) > 10
    assert all(image.dtype == np.uint8 and min(image.shape[:2]) >= 64 for scene in scenes for image in scene)


@pytest.mark.parametrize("seed", range(20))
def test_drawings_of_one_template_are_alike_but_never_the_same(seed):
    family = drawn_family(np.random.default_rng(seed), 4)
    again = drawn_family(np.random.default_rng(seed), 4)
    assert len({image.shape for image in family}) == 1
    for image, repeated in zip(family, again, strict=True):
        np.testing.assert_array_equal(image, repeated)
    differences = [np.abs(a.astype(int) - b).mean() for i, a in enumerate(family) for b in family[:i]]
    assert min(differences) > 4.0
