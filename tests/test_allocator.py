"""Freed memory is kept: the pages of a block that is asked for again are not touched anew."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ris_bench.allocator import ENVIRONMENT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

FAULTS = """
import resource, sys, threading, torch
if "keep" in sys.argv:
    from ris_bench.allocator import keep_freed_memory
    keep_freed_memory()

def step():
    parts = [torch.ones(15_000_000) for _ in range(3)]  # of 60 MB each

def steps():
    global faults
    for _ in range(8):  # until the room between aligned blocks has come together
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "thread" in sys.argv:
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
else:
    steps()
print(faults)
"""


def faults(*how: str, **environment: str) -> int:
    """Pages that a later step touches first; without anything about 45,000."""
    outside = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    command = [sys.executable, "-c", FAULTS, *how]
    return int(subprocess.run(command, check=True, capture_output=True, env=outside | environment).stdout)


def test_a_later_step_touches_no_new_pages():
    assert faults() > 30_000
    assert faults("keep") < 1000


def test_nor_in_a_thread_of_a_process_that_was_started_so():
    assert faults("thread", **ENVIRONMENT) < 1000
