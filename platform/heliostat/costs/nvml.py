"""EDGE to NVML: what GPUs use, where the library and the GPU can tell. The only file that imports pynvml.

Tried against a stand-in of the library only, not on a GPU.
"""

from collections.abc import Callable


def energy_counter(uuid: str) -> Callable[[], float | None] | None:
    """A function that gives the joules which a GPU has used since its driver was loaded; None when it does not tell any more.

    None without the package nvidia-ml-py (extra `gpu`), without a driver, and for GPUs that do not count (before Volta, MIG):
    energy is then modelled as power times time, and the record says so.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def joules() -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # it counts millijoules
        except pynvml.NVMLError:  # a GPU that was lost, or a driver that was replaced; the record then says "modelled"
            return None

    return joules


def gpu_loads() -> dict[str, float]:
    """Use, memory and power of every GPU of this machine, under MLflow's names; empty without the package or without GPUs."""
    try:
        import pynvml
    except ImportError:
        return {}
    loads: dict[str, float] = {}
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle, name = pynvml.nvmlDeviceGetHandleByIndex(index), f"system/gpu_{index}"
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            loads[f"{name}_utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            loads[f"{name}_memory_usage_megabytes"] = memory.used / 1e6
            loads[f"{name}_memory_usage_percentage"] = 100 * memory.used / memory.total
            loads[f"{name}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except pynvml.NVMLError:  # no driver, or a device (MIG) that does not tell: what was read so far is true
        return loads
    return loads
