"""Where a training stands, on disk: a folder of a few files, each of them whole, self-contained and checked.

A file `NUMBER-DIGEST.safetensors` appears under that name when all of it is on the disk; the digest is that of its
content, so that one that was damaged later is known too. Nothing in it is executed. It says what it was made for: one
of another trial, of other code or of other weights is not taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEPT = 2
"""Files in a folder: if the newest is damaged, there is the one before."""
SUFFIX = ".safetensors"

State = dict[str, Any]
"""Tensors, and what JSON takes, by name."""


@dataclass(frozen=True)
class Checkpoints:
    """Those in a folder, which need not exist, but the folder that it is in has to."""

    folder: Path
    made_for: Mapping[str, Any]
    """What has to be the same, as JSON takes it: the states of anything else do not count."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state, and remove all but the newest. Raises OSError where it cannot be written.

        Tensors that share memory are not possible.
        """
        tensors = {name: item for name, item in state.items() if isinstance(item, Tensor)}
        rest = {name: item for name, item in state.items() if name not in tensors}
        metadata = {"made_for": json.dumps(self.made_for), "state": json.dumps(rest)}
        self.folder.mkdir(exist_ok=True)
        number = max(map(_number, self._files()), default=0) + 1
        temporary = self.folder / f".{secrets.token_hex(4)}"
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(self.folder / f"{number:06}-{_digest(temporary)}{SUFFIX}")
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        _flush(self.folder)
        for old in self._files()[:-KEPT]:
            old.unlink(missing_ok=True)

    def restore(self, take_up: Callable[[State], None], log: Callable[[str], None]) -> bool:
        """Give the newest state to `take_up`, which refuses one by raising ValueError, TypeError or KeyError, and
        then has changed nothing: the one before is tried. Returns whether there was one; `log` is told which.
        """
        for remains in self.folder.glob(".*"):  # of a process that was killed as it wrote
            remains.unlink(missing_ok=True)
        for path in reversed(self._files()):
            try:
                take_up(self._read(path))
            except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
                why = " ".join(f"{type(error).__name__}: {error}".split())
                log(f"the checkpoint {path.name} is passed over ({why})")
                continue
            log(f"goes on from the checkpoint {path.name}")
            return True
        return False

    def _files(self) -> list[Path]:
        """The oldest first."""
        return sorted((path for path in self.folder.glob(f"*{SUFFIX}") if _number(path)), key=_number)

    def _read(self, path: Path) -> State:
        if path.stem.rpartition("-")[2] != _digest(path):
            raise ValueError("it is damaged: its content is not what its name says")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            given = json.loads(metadata["made_for"])
            wanted = json.loads(json.dumps(self.made_for))
            if other := [name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)]:
                raise ValueError(f"it was made for another {' and '.join(sorted(other))}")
            return json.loads(metadata["state"]) | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _number(path: Path) -> int:
    """0 for what is no checkpoint."""
    number = path.name.partition("-")[0]
    return int(number) if number.isascii() and number.isdigit() else 0


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _flush(folder: Path) -> None:
    # After a power cut the new name must be there before the old files are not.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
