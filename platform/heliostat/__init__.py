"""Heliostat: your own raw images into your own vision foundation models, on Ray, from one recipe."""

__version__ = "0.1.0"
