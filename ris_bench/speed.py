"""Two ways to compute the same: as the papers' code does it, and with sums and products in a cheaper order.

Both run on the same parameters. Tests hold them equal, and `benchmarks/speed.py` says what the second one saves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Speed = Literal["plain", "fast"]


class TwoWays(nn.Module):
    """A module whose `forward` asks `fast`."""

    fast = True


def choose(model: nn.Module, speed: Speed) -> None:
    """How every module of the model computes that knows two ways."""
    assert speed in get_args(Speed)
    for module in model.modules():
        if isinstance(module, TwoWays):
            module.fast = speed == "fast"


def doubled_convolution(x_BCHW: Tensor, weight_OC33: Tensor) -> Tensor:
    """`conv2d(interpolate(x, scale_factor=2, mode="bilinear"), weight, padding=1)`: (B, O, 2H, 2W).

    Both are linear, so that the channels can be mixed, once for each of the nine taps, where there are four times fewer
    cells; then every tap is enlarged and shifted along one axis after the other.
    """
    B, C, H, W = x_BCHW.shape
    out = len(weight_OC33)
    mix_CT = weight_OC33.permute(1, 3, 2, 0).reshape(C, -1)  # columns of the kernel, rows, channels out
    taps_BHWT = x_BCHW.permute(0, 2, 3, 1) @ mix_CT
    wide = _doubling(W, x_BCHW.dtype, x_BCHW.device) @ taps_BHWT.reshape(B, H, W * 3, 3 * out)
    rows = wide.view(B, H, 2 * W, 3, out).transpose(2, 3).reshape(B, H * 3, 2 * W * out)
    return (_doubling(H, x_BCHW.dtype, x_BCHW.device) @ rows).view(B, 2 * H, 2 * W, out).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept from an evaluation may serve in training
def _doubling(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2 length, length * 3): what a cell of the doubled axis takes from each cell for each of three taps in a row."""
    one_1NN = torch.eye(length, dtype=torch.float64, device="cpu")[None]
    doubled_MN = F.interpolate(one_1NN, scale_factor=2, mode="linear")[0].T
    padded = F.pad(doubled_MN, (0, 0, 1, 1))  # the convolution sees zeros beyond the ends
    return torch.stack([padded[tap : tap + 2 * length] for tap in range(3)], dim=2).flatten(1).to(device, dtype)
