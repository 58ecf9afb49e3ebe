"""Which code this is."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_PASSIVE = ("cli", "report")
"""Subpackages that no number of a trial depends on."""


@cache
def digest() -> str:
    """sha256 of the modules of this package that a trial or its numbers may depend on."""
    package = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in _PASSIVE:
            found.update(repr((name.as_posix(), path.read_bytes())).encode())
    return found.hexdigest()
