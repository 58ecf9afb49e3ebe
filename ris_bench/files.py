"""Files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends, and is gone when it is left otherwise.

    The folder has to be there. Of two processes that write one file the later one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write text, in a folder that is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        # Half of a surrogate pair, which JSON can hold, is no text.
        temporary.write_text(text, encoding="utf-8", errors="replace")
