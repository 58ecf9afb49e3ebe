"""Full tuning: every parameter of both towers is trained together with the head (CRIS, CVPR 2022, arXiv:2111.15174)."""

from __future__ import annotations

from ris_bench.backbones.base import Backbone
from ris_bench.methods.base import METHODS, Method


@METHODS("full")
class Full(Method):
    """Opens all; normalisation statistics follow the backbone's `norm_stats`, as for every other method.

    CRIS trains the backbone at a tenth of the head's learning rate; here there is one rate, the trial's.
    """

    identity_at_start = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        backbone.open()
