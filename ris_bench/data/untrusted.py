"""Files from elsewhere, read as plain data: nothing in them is executed, and what is damaged ends in a UserError."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ris_bench.errors import UserError

MOST_BYTES = 2**28
"""Of a pickle; those of RefCOCO have 15 MB. A byte can ask for a container of 200."""


class _PlainUnpickler(pickle._Unpickler):
    """Admits what needs no import: builtin containers, numbers and strings. Nothing is ever called.

    It is the reader in Python that the standard library falls back on. The one in C makes a table as long as the
    greatest number under which the file remembers a thing, which five bytes can set to 34 GB.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it would load {module}.{name}")


def read_pickle(path: Path) -> Any:
    """The plain data of a pickle, also of Python 2. Raises UserError where it is damaged or would import anything."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"it has more than {MOST_BYTES:,} bytes")
        # From memory, which gives no more than there is, however much is asked for. Written by Python 2.
        return _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path} is refused: {error}, and only plain data is read; use the original file") from None
    except Exception as error:  # A damaged pickle can raise almost anything.
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); download it again") from error


def read_json(path: Path, advice: str = "download it again") -> Any:
    """The content of a JSON file. Raises UserError where it is damaged or nested too deeply."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from error


def missing_files(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of the paths that are not in the folder or below it, sorted; one that leads out of it counts as missing."""
    wanted = set(paths)
    # A listing for each folder instead of a system call for each of 17,000 images.
    there: set[str] = set()
    for parent in {path.parent for path in wanted}:
        if parent.is_relative_to(folder) and ".." not in parent.relative_to(folder).parts and os.path.isdir(parent):
            there |= {entry.path for entry in os.scandir(parent)}
    return sorted(path for path in wanted if str(path) not in there)


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: half of a surrogate pair, which JSON can spell, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: object) -> str:
    """A name out of a file as one harmless word of a message: control characters are escaped."""
    return text if (text := str(name)).isprintable() else ascii(text)
