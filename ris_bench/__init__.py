"""Benchmarks of parameter-efficient tuning for referring image segmentation: fair, exact, repeatable, cheap."""

__version__ = "0.1.0"
