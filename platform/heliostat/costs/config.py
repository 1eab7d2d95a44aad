"""Settings of the costs."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from heliostat.config import StrictModel

OTHER = "other"
GPU_WATTS = {"V100": 300.0, "A100": 400.0, "H100": 700.0, "H200": 700.0, "L40": 300.0, "L4": 72.0, OTHER: 400.0}
"""Largest power of the SXM card, or of the only one, by its maker's data sheet; `other` is what arXiv 2304.07193 takes."""
GPU_DOLLARS = {"V100": 1.5, "A100": 2.0, "H100": 3.5, "H200": 4.5, "L40": 1.5, "L4": 0.8, OTHER: 2.0}
"""Dollars an hour: round figures, assumption of 2026, not the offer of any one provider."""

NotNegative = Annotated[float, Field(ge=0)]


class CostsConfig(StrictModel):
    """How hours become energy, CO2 and dollars; no part of any fingerprint. What NVML measures takes the place of gpu_watts."""

    gpu_watts: dict[str, NotNegative] = GPU_WATTS
    """Power of a GPU where NVML does not measure it, by a part of its name; `other` for all the rest. What is given is laid
    over the defaults, the makers' largest power."""
    cpu_watts_per_core: NotNegative = 6.0
    """Power of one core of a worker that computes on CPUs (assumption: 192 W over 32 cores, memory included)."""
    pue: float = Field(default=1.1, ge=1)
    """Power of the data centre over power of its machines (1.1 in section 9 of arXiv 2304.07193)."""
    co2_kg_per_kwh: NotNegative = 0.385
    """Kilograms of CO2 equivalent per kWh of the grid (the US average that arXiv 2304.07193 uses)."""
    dollars_per_gpu_hour: dict[str, NotNegative] = GPU_DOLLARS
    """Price of one GPU for one hour, by a part of its name, its machine included; `other` for all the rest. What is given is
    laid over the defaults, which are round figures assumed in 2026: give those of your contract."""
    dollars_per_core_hour: NotNegative = 0.05
    """Price of one core for one hour, for workers that compute on CPUs (assumption of 2026)."""

    @field_validator("gpu_watts", mode="before")
    @classmethod
    def _add_watts(cls, given: Any) -> Any:
        return {**GPU_WATTS, **given} if isinstance(given, Mapping) else given

    @field_validator("dollars_per_gpu_hour", mode="before")
    @classmethod
    def _add_dollars(cls, given: Any) -> Any:
        return {**GPU_DOLLARS, **given} if isinstance(given, Mapping) else given


def of_gpu(table: Mapping[str, float], name: str) -> float:
    """The entry of a GPU: the longest key that its name contains, else `other`."""
    fitting = [key for key in table if key != OTHER and key.lower() in name.lower()]
    return table[max(fitting, key=len)] if fitting else table[OTHER]
