"""Products of matrices and convolutions on a CPU with weights that stay as they are, by oneDNN.

It reads weights in an order of its own. PyTorch brings those of convolutions into it in every call, and asks another
library for linear layers, which takes longer on some processors. Here a weight is packed once. Nothing of it is public
in PyTorch; its compiler calls the same for weights that stay as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Then = Literal["none", "relu", "gelu"]
"""What is done to a product before it is written."""


def serves(x: Tensor) -> bool:
    """Whether it can be asked: in fp32, where nobody wants a gradient and nothing is compiled."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and _is_there()


@lru_cache(maxsize=1)
def _is_there() -> bool:
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def pack_linear(weight_OC: Tensor, x: Tensor) -> Tensor:
    """For inputs (..., C) of about this size; of another they are served too."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OC, x.shape[:-1].numel())


def linear(x: Tensor, packed: Tensor, bias_O: Tensor | None, then: Then = "none") -> Tensor:
    """`F.linear` with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, then, [], "none")


def convolves(layer: nn.Module) -> bool:
    """Whether it is a layer for `convolution`: of two axes, its padding in numbers."""
    return isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str)


def pack_convolution(layer: nn.Conv2d, weight_OCHW: Tensor, x: Tensor) -> Tensor:
    """Of another weight than the layer's own; for inputs (B, C, H, W) of about this size."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight_OCHW, *_geometry(layer), list(x.shape))


def convolution(layer: nn.Conv2d, x: Tensor, packed: Tensor, bias_O: Tensor | None, then: Then = "none") -> Tensor:
    """What the layer would make of x with the weight that was packed and another bias."""
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias_O, *_geometry(layer), then, [], "none")


def _geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    return layer.padding, layer.stride, layer.dilation, layer.groups
