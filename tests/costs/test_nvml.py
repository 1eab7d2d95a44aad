"""What NVML says is passed on in our units, and what it does not say is not made up. A stand-in for the library, no GPU."""

import sys
import types

import pytest

from heliostat.costs.nvml import energy_counter, gpu_loads


class NVMLError(Exception):
    """As pynvml has it."""


def library(*, counts_energy: bool = True) -> types.ModuleType:
    module = types.ModuleType("pynvml")

    def energy(handle: str) -> int:
        if not counts_energy or handle != "handle GPU-1":
            raise NVMLError("Not Supported")
        return 1_234_500

    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetHandleByUUID = lambda uuid: f"handle {uuid}"
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetTotalEnergyConsumption = energy
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=20e9, total=80e9)
    module.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=50 + handle)
    module.nvmlDeviceGetPowerUsage = lambda handle: 350_000
    return module


def test_millijoules_become_joules_for_a_uuid_with_and_without_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library())
    for uuid in ("1", "GPU-1"):
        counter = energy_counter(uuid)
        assert counter is not None
        assert counter() == 1234.5


def test_a_gpu_that_does_not_count_gives_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(counts_energy=False))
    assert energy_counter("1") is None


def test_without_the_library_there_is_neither_counter_nor_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter("1") is None
    assert gpu_loads() == {}


def test_loads_have_the_names_that_mlflow_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library())
    loads = gpu_loads()
    assert len(loads) == 8
    assert loads["system/gpu_1_utilization_percentage"] == 51
    assert loads["system/gpu_0_memory_usage_percentage"] == 25
    assert loads["system/gpu_0_power_usage_watts"] == 350
