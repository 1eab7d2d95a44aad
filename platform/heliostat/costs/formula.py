"""From hours to energy, CO2 and dollars, as section 9 of arXiv 2304.07193 counts: hours x power x PUE x grid intensity."""

from collections.abc import Iterable, Mapping, Sequence

from heliostat.costs.attempts import Attempt, wasted_seconds
from heliostat.costs.config import CostsConfig, of_gpu

_SECONDS_PER_HOUR = 3600.0
_JOULES_PER_KWH = 3.6e6


def energy_and_co2(device_kwh: float, config: CostsConfig) -> tuple[float, float]:
    """(kWh with the data centre's overhead, kg of CO2) of what the devices have used."""
    kwh = device_kwh * config.pue
    return kwh, kwh * config.co2_kg_per_kwh


def compute_costs(attempts: Sequence[Attempt], config: CostsConfig) -> dict[str, float]:
    """The costs of a run, all of its attempts together, under the names of `metrics.py`; empty without attempts.

    Energy is measured where NVML does, else the power of the section times the time; the ratio says how much of it is measured.
    """
    if not attempts:
        return {}
    gpu_hours = worker_hours = kwh = measured_kwh = dollars = 0.0
    for attempt in attempts:
        hours = attempt.seconds / _SECONDS_PER_HOUR * attempt.num_workers
        worker_hours += hours
        gpu_hours += hours if attempt.device.is_gpu else 0.0
        dollars += hours * _dollars_per_hour(attempt, config)
        if attempt.joules is not None:
            used = attempt.joules * attempt.num_workers / _JOULES_PER_KWH
            measured_kwh += used
        else:
            used = hours * _watts(attempt, config) / 1000
        kwh += used
    wasted = sum(seconds * attempt.num_workers for seconds, attempt in zip(wasted_seconds(attempts), attempts, strict=True))
    total_kwh, co2_kg = energy_and_co2(kwh, config)
    return {
        "cost/gpu_hours": gpu_hours,
        "cost/worker_hours": worker_hours,
        "cost/wasted_worker_hours": wasted / _SECONDS_PER_HOUR,
        "cost/energy_kwh": total_kwh,
        "cost/energy_measured_ratio": measured_kwh / kwh if kwh else 0.0,
        "cost/co2_kg": co2_kg,
        "cost/dollars": dollars,
    }


def _watts(attempt: Attempt, config: CostsConfig) -> float:
    device = attempt.device
    return of_gpu(config.gpu_watts, device.name) if device.is_gpu else config.cpu_watts_per_core * device.cores


def _dollars_per_hour(attempt: Attempt, config: CostsConfig) -> float:
    device = attempt.device
    if device.is_gpu:
        return of_gpu(config.dollars_per_gpu_hour, device.name)
    return config.dollars_per_core_hour * device.cores


def share_costs(costs: Mapping[str, float], among: int) -> dict[str, float]:
    """An equal share for each of several models that one run has made."""
    return {name: value if name.endswith("_ratio") else value / among for name, value in costs.items()}


def add_costs(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum over runs; ratios are weighted by energy. Empty when there is none."""
    total: dict[str, float] = {}
    measured = 0.0
    for costs in several:
        for name, value in costs.items():
            total[name] = total.get(name, 0.0) + value
        measured += costs.get("cost/energy_measured_ratio", 0.0) * costs.get("cost/energy_kwh", 0.0)
    if total:
        kwh = total.get("cost/energy_kwh", 0.0)
        total["cost/energy_measured_ratio"] = measured / kwh if kwh else 0.0
    return total


def cost_text(costs: Mapping[str, float]) -> str:
    """One line for people: `2.1 GPU-hours (0.3 wasted), 1.6 kWh, 0.6 kg CO2, $4`; empty without costs."""
    if not costs:
        return ""
    on_gpus = costs["cost/gpu_hours"] > 0
    hours = costs["cost/gpu_hours"] if on_gpus else costs["cost/worker_hours"]
    wasted = costs["cost/wasted_worker_hours"]
    how = "measured" if costs["cost/energy_measured_ratio"] > 0.99 else "modelled"
    return (
        f"{_digits(hours)} {'GPU' if on_gpus else 'CPU worker'}-hours"
        + (f" ({_digits(wasted)} of them for steps done twice)" if wasted else "")
        + f", {_digits(costs['cost/energy_kwh'])} kWh ({how}), {_digits(costs['cost/co2_kg'])} kg CO2, "
        f"{_digits(costs['cost/dollars'])} dollars"
    )


def _digits(value: float) -> str:
    """Two digits that count, and no exponent."""
    if value == 0 or abs(value) >= 10:
        return f"{value:,.0f}"
    places = 1
    while places < 9 and abs(value) < 10 ** (1 - places):
        places += 1
    return f"{value:.{places}f}"
