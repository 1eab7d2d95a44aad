"""Hours become energy, CO2 and dollars as the paper counts them."""

import pytest

from heliostat.config import apply_overrides, validate
from heliostat.costs import Attempt, CostsConfig, Device, add_costs, compute_costs, cost_text, share_costs
from heliostat.costs.config import GPU_WATTS, of_gpu
from heliostat.errors import ConfigError
from heliostat.metrics import METRICS
from heliostat.runtime.recipe import Recipe

A100 = Device(name="NVIDIA A100-SXM4-40GB", uuid="1")


def attempt(hours: float, workers: int = 1, device: Device = A100, **changes) -> Attempt:
    return Attempt(device=device, num_workers=workers, started=0.0, seconds=3600 * hours, **changes)


def test_the_papers_vit_g_emits_what_the_paper_says() -> None:
    """Section 9 and table 14 of arXiv 2304.07193: 22,016 A100-hours at 400 W, PUE 1.1, 0.385 kg/kWh: 9.7 MWh and 3.7 t."""
    costs = compute_costs([attempt(22_016 / 160, 160)], CostsConfig())
    assert costs["cost/gpu_hours"] == pytest.approx(22_016)
    assert costs["cost/energy_kwh"] == pytest.approx(22_016 * 0.4 * 1.1)
    assert round(costs["cost/energy_kwh"] / 1000, 1) == 9.7
    assert round(costs["cost/co2_kg"] / 1000, 1) == 3.7
    assert costs["cost/dollars"] == pytest.approx(22_016 * CostsConfig().dollars_per_gpu_hour["A100"])
    assert costs["cost/energy_measured_ratio"] == 0


def test_what_nvml_measured_takes_the_place_of_the_model() -> None:
    measured = attempt(1, 4, joules=3.6e6 * 0.25)
    costs = compute_costs([measured, attempt(1, 1)], CostsConfig(pue=1.0))
    assert costs["cost/energy_kwh"] == pytest.approx(4 * 0.25 + 0.4)
    assert costs["cost/energy_measured_ratio"] == pytest.approx(1 / 1.4)


def test_workers_on_cpus_cost_worker_hours_by_their_cores() -> None:
    costs = compute_costs(
        [attempt(2, 3, Device(cores=4))], CostsConfig(cpu_watts_per_core=5, pue=1.0, dollars_per_core_hour=0.1)
    )
    assert (costs["cost/gpu_hours"], costs["cost/worker_hours"]) == (0, pytest.approx(6))
    assert costs["cost/energy_kwh"] == pytest.approx(6 * 4 * 5 / 1000)
    assert costs["cost/dollars"] == pytest.approx(6 * 4 * 0.1)


def test_attempts_add_up_and_steps_done_twice_are_told_apart() -> None:
    # Records every 10 steps, one second a step after 5 s of start: the first attempt ends at 100, the second goes on from 60.
    first = attempt(0, 2, record_steps=10, first_step=10, last_step=100, first_record_seconds=15)
    first = first.model_copy(update={"seconds": 105.0})
    second = first.model_copy(update={"started": 200.0, "seconds": 55.0, "first_step": 70, "last_step": 110})
    costs = compute_costs([first, second], CostsConfig())
    assert costs["cost/worker_hours"] == pytest.approx((105 + 55) * 2 / 3600)
    assert costs["cost/wasted_worker_hours"] == pytest.approx(40 * 2 / 3600)


def test_an_attempt_that_never_made_a_record_wastes_no_known_steps_and_is_counted() -> None:
    costs = compute_costs([attempt(0.5), attempt(1, first_step=10, last_step=20, record_steps=10)], CostsConfig())
    assert costs["cost/worker_hours"] == pytest.approx(1.5)
    assert costs["cost/wasted_worker_hours"] == 0


def test_no_attempt_costs_nothing_and_says_nothing() -> None:
    assert compute_costs([], CostsConfig()) == {}
    assert cost_text({}) == ""
    assert add_costs([]) == {}


def test_every_cost_is_in_the_table_of_metrics_and_every_metric_of_costs_is_computed() -> None:
    assert set(compute_costs([attempt(1)], CostsConfig())) == {name for name in METRICS if name.startswith("cost/")}


def test_shares_sum_to_the_whole_and_ratios_are_weighted_by_energy() -> None:
    measured = compute_costs([attempt(3, joules=3.6e6)], CostsConfig())
    modelled = compute_costs([attempt(1)], CostsConfig())
    assert add_costs([share_costs(measured, 3)] * 3) == pytest.approx(measured)
    both = add_costs([measured, modelled])
    assert both["cost/gpu_hours"] == pytest.approx(4)
    assert both["cost/energy_measured_ratio"] == pytest.approx(1 / 1.4)


def test_a_price_of_ones_own_is_laid_over_the_table() -> None:
    words = ["name=x", "costs.dollars_per_gpu_hour.H100=1.25", "costs.gpu_watts.other=111", "costs.pue=1.4"]
    costs = validate(Recipe, apply_overrides({}, words), "test").costs
    assert (costs.dollars_per_gpu_hour["H100"], costs.gpu_watts["A100"], costs.pue) == (1.25, GPU_WATTS["A100"], 1.4)
    assert of_gpu(costs.dollars_per_gpu_hour, "NVIDIA H100 80GB HBM3") == 1.25
    assert of_gpu(costs.gpu_watts, "NVIDIA L40S") == GPU_WATTS["L40"]
    assert of_gpu(costs.gpu_watts, "Some New Card") == 111
    with pytest.raises(ConfigError, match=r"costs.pue=0.9: input should be greater than or equal to 1"):
        validate(Recipe, apply_overrides({}, ["name=x", "costs.pue=0.9"]), "test")


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (22_016.0, "22,016 GPU-hours, 9,687 kWh (modelled), 3,730 kg CO2, 44,032 dollars"),
        (2.0, "2.0 GPU-hours, 0.88 kWh (modelled), 0.34 kg CO2, 4.0 dollars"),
    ],
)
def test_the_line_for_people_has_the_digits_that_count(hours: float, text: str) -> None:
    assert cost_text(compute_costs([attempt(hours)], CostsConfig())) == text
