"""Trials run in one process, whatever the section says about workers."""

from tiny_training import settings

from heliostat.runtime.sweep_points import trial_config


def test_a_trial_of_a_section_that_reads_through_ray_data_reads_in_threads() -> None:
    base = settings("scaling.num_workers=2", "loader.via=ray_data")
    trial = trial_config(base, {"train.seed": 4})
    assert (trial.scaling.num_workers, trial.loader.via, trial.train.seed) == (0, "threads", 4)
