"""Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. arXiv:2106.09685."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ris_bench.backbones.base import Backbone
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Method


class LowRank(nn.Module):
    """The change `scale * B A` of a weight (out, in): A (rank, in), B (out, rank), zero at the start."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, width))
        self.B = nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self) -> Tensor:
        return self.scale * (self.B @ self.A)


@METHODS("lora")
class LoRA(Method):
    """Query and value projections of every attention, as in the paper (section 4.2): the blocks of both towers, and the
    attention pool of a CLIP ResNet.

    `scale` is the paper's alpha / r. A is initialised as in microsoft/LoRA loralib/layers.py:120-125, B with zeros, so
    the first forward pass equals that of `frozen`. The weight change is functional: nothing is ever merged, and packed
    attention weights, which are read without calling a module, are changed as well. The published count for CLIP R101
    (0.03M) is met by rank 1 on both towers: 32,768.
    """

    def __init__(self, backbone: Backbone, *, text_rank: int = 1, image_rank: int = 1, scale: float = 1.0) -> None:
        super().__init__(backbone)
        ranks = {"text": text_rank, "image": image_rank}
        if min(ranks.values()) < 0 or not any(ranks.values()):
            raise UserError(
                f"method 'lora' has text_rank {text_rank} and image_rank {image_rank}: one must be positive"
            )
        for tower, rank in ranks.items():
            if rank:
                for site in backbone.sites("q", (tower,)) + backbone.sites("v", (tower,)):
                    site.reparametrize(LowRank(site.width, rank, scale))
