"""How many trials a cluster has room for."""

import pytest
from tiny_training import settings

from heliostat.config import validate
from heliostat.errors import TrainingError
from heliostat.runtime.sweep_config import SweepConfig
from heliostat.runtime.sweep_room import concurrent_trials, num_fitting, process_demand

SWEEP = validate(SweepConfig, {"grid": {"train.seed": [0, 1]}, "max_concurrent_trials": 4}, "sweep")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("words", "nodes", "fitting"),
    [
        (["scaling.num_workers=0"], [{"CPU": 2.0}], 2),
        (["scaling.num_workers=1"], [{"CPU": 2.0}], 2),
        (["scaling.num_workers=2"], [{"CPU": 2.0}], 1),
        (["scaling.num_workers=2", "scaling.cpus_per_worker=0.1"], [{"CPU": 2.0}], 10),
        (["scaling.num_workers=2", "scaling.cpus_per_worker=2"], [{"CPU": 3.0}, {"CPU": 3.0}], 1),  # one worker a node
        (["scaling.num_workers=4", "scaling.use_gpu=true"], [{"CPU": 32.0, "GPU": 8.0}, {"CPU": 64.0}], 2),
        (["scaling.num_workers=2", "loader.via=ray_data", "loader.ray_workers=1"], [{"CPU": 4.0}], 1),
        (["scaling.num_workers=1", "online.num_cpus=1"], [{"CPU": 2.0}], 1),
        (["scaling.num_workers=4"], [{"CPU": 2.0}], 0),
    ],
)
def test_workers_data_workers_and_evaluations_of_all_trials_fit_at_once(words, nodes, fitting: int) -> None:
    config = settings(*words)
    assert num_fitting(config, nodes) == fitting
    if fitting:
        assert concurrent_trials(SWEEP, config, nodes) == min(fitting, 4)


def test_a_trial_that_can_never_start_is_refused_with_what_it_takes_and_what_is_there() -> None:
    message = r"no trial can start: it takes 4 workers of 1 CPU, Ray has 2 CPU; lower scaling\.num_workers or scaling\.cpus_per"
    with pytest.raises(TrainingError, match=message):
        concurrent_trials(SWEEP, settings("scaling.num_workers=4"), [{"CPU": 2.0}])


def test_an_evaluator_that_does_not_fit_is_named() -> None:
    message = r"1 worker of 1 CPU and an evaluator of 1 GPU, Ray has 2 CPU, 0 GPU; lower online\.num_gpus or online\.num_cpus"
    with pytest.raises(TrainingError, match=message):
        concurrent_trials(SWEEP, settings("scaling.num_workers=1", "online.num_gpus=1"), [{"CPU": 2.0}])


def test_a_cluster_of_a_fixed_size_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("HELIOSTAT_FIXED_SIZE", "1")
    with pytest.raises(TrainingError, match="no trial can start"):
        concurrent_trials(SWEEP, settings("scaling.num_workers=4"), [{"CPU": 2.0}])


def test_a_cluster_that_was_joined_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert concurrent_trials(SWEEP, settings("scaling.num_workers=4"), [{"CPU": 2.0}]) == 4


def test_the_process_of_a_trial_takes_a_place_only_when_it_trains_itself() -> None:
    assert process_demand(settings("scaling.num_workers=0", "scaling.cpus_per_worker=2")) == {"cpu": 2}
    assert process_demand(settings("scaling.num_workers=1")) == {"node:__internal_head__": 0.001}
