"""A method edits a frozen backbone at its sites; what it creates or opens there is what gets tuned."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ris_bench.backbones.base import Backbone, Features
from ris_bench.registry import Registry

METHODS = Registry("method", "ris_bench.methods")


class Method(nn.Module):
    """An injection onto a frozen backbone: the constructor edits it, and its keyword-only arguments are the options."""

    identity_at_start = False
    """Whether the method promises that before training it computes what `frozen` computes."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()

    def forward(self, backbone: Backbone, image_B3HW: Tensor, tokens_BL: Tensor) -> Features:
        """Run the backbone; overridden only to change how the towers meet."""
        return backbone(image_B3HW, tokens_BL)


class Serial(nn.Module):
    """`after(inner(x, ...))`: an adapter on what a module returns."""

    def __init__(self, inner: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, *args: Any) -> Any:
        return self.after(self.inner(*args))


class Parallel(nn.Module):
    """`inner(x, ...) + beside(x)`: an adapter on what a module is given."""

    def __init__(self, inner: nn.Module, beside: nn.Module) -> None:
        super().__init__()
        self.inner, self.beside = inner, beside

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.inner(x, *args) + self.beside(x)
