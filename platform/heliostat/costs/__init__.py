"""What training costs: hours of workers, energy, CO2, dollars.

config.py    the section `costs` of a recipe: power, PUE, intensity of the grid, prices
attempts.py  time and energy of each attempt at a run, kept in the draft so that a run that resumes adds up
formula.py   the numbers of the record, from the attempts and the section
nvml.py      EDGE to NVML: what a GPU has used
"""

from heliostat.costs.attempts import Attempt, Device, Meter, read_attempts
from heliostat.costs.config import CostsConfig
from heliostat.costs.formula import add_costs, compute_costs, cost_text, energy_and_co2, share_costs

__all__ = [
    "Attempt",
    "CostsConfig",
    "Device",
    "Meter",
    "add_costs",
    "compute_costs",
    "cost_text",
    "energy_and_co2",
    "read_attempts",
    "share_costs",
]
