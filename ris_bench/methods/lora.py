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

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self) -> Tensor:
        return self.scale * (self.B @ self.A)


@METHODS("lora")
class LoRA(Method):
    """Query and value projections of every attention, as in the paper (section 4.2): the blocks of both towers, and the
    attention pool of a CLIP ResNet.

    `scale` is the paper's alpha / r. A is initialised as in microsoft/LoRA loralib/layers.py:120-125, B with zeros. The
    weight is changed at every use and never merged while it is trained. `targets` may name "k", "out", "fc1" and "fc2"
    too. The published count for CLIP R101 (0.03M) is met by rank 1 on both towers, 32,768, or by rank 4 on the
    attention pool alone; that for DINOv2-B (1.57M) by rank 16 on the text and 32 on the image, 1,572,864.
    """

    identity_at_start = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        text_rank: int = 1,
        image_rank: int = 1,
        scale: float = 1.0,
        targets: tuple[str, ...] = ("q", "v"),
    ) -> None:
        super().__init__(backbone)
        ranks = {"text": text_rank, "image": image_rank}
        if min(ranks.values()) < 0 or not any(ranks.values()):
            raise UserError(
                f"method 'lora' has text_rank {text_rank} and image_rank {image_rank}: one must be positive"
            )
        allowed = ("q", "k", "v", "out", "fc1", "fc2")
        if not targets or not set(targets) <= set(allowed) or len(set(targets)) < len(targets):
            raise UserError(f"method 'lora' has targets {list(targets)}; give some of {list(allowed)}, each once")
        for tower, rank in ranks.items():
            for site in (site for kind in targets if rank for site in backbone.sites(kind, (tower,))):
                site.reparametrize(lambda weight, rank=rank: LowRank(weight, rank, scale))
