"""Which code this is, and what it computes with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from ris_bench import __version__
from ris_bench.records import Provenance

LOADED: dict[str, Any] = {}
"""The plug-ins that have been loaded (see `plugins`), by name."""

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


def provenance(started: datetime, weights: dict[str, str], precision: str) -> Provenance:
    """Which code and packages are at work; the commit is None outside a checkout of the project."""
    commit, dirty = checkout()
    return Provenance(
        commit=commit,
        dirty=dirty,
        versions=versions(),
        weights=weights,
        precision=precision,
        started=started.isoformat(timespec="seconds"),
        plugins={name: plugin.sha256 for name, plugin in LOADED.items()},
    )


def checkout() -> tuple[str | None, bool | None]:
    """The commit of the project, and whether the package differs from it; None without a checkout or git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", here))


def versions() -> dict[str, str]:
    """Of what computes. This package itself need not be installed: a cluster is sent it."""
    packages = ("torch", "open_clip_torch", "timm", "peft", "numpy")
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **installed, "ris-bench": __version__}
