"""Where the project keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """$RIS_BENCH_CACHE or ~/.cache/ris-bench."""
    return Path(os.environ.get("RIS_BENCH_CACHE") or Path.home() / ".cache" / "ris-bench")
