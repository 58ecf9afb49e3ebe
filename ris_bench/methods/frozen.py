"""Fix backbone: only the head is trained, the floor of every table of parameter-efficient tuning."""

from __future__ import annotations

from ris_bench.methods.base import METHODS, Method


@METHODS("frozen")
class Frozen(Method):
    """Nothing is injected: 0 tuned parameters in the backbone."""

    identity_at_start = True
