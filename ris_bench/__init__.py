"""Benchmarks of parameter-efficient tuning for referring image segmentation: fair, exact, repeatable, cheap."""

import os

__version__ = "0.1.0"

# Nothing underneath reports home unless the user wants it to. Some of them read this as they are imported.
for _name, _value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",
}.items():
    os.environ.setdefault(_name, _value)
