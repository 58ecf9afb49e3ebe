"""Memory that was freed is kept for what comes next: the same sizes are asked for in every step.

glibc gives large blocks back to the system at once, and the system clears each page of a new one when it is touched. A
step of training on a CPU spends a tenth to a third of its time so.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_SETTINGS = {
    # With the numbers that malloc.h has for them. Large blocks are cut from what is kept; that is never given back; and
    # all threads share it, since that of a thread of its own is bounded.
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),
    "MALLOC_ARENA_MAX": (-8, 1),
}

ENVIRONMENT = {name: str(value) for name, (_, value) in _SETTINGS.items()}
"""For processes that are yet to start, where threads may compute; what is not glibc ignores it."""


def keep_freed_memory() -> None:
    """From now on in this process, in its main thread; not where the C library is another."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for number, value in _SETTINGS.values():
            mallopt(number, value)
