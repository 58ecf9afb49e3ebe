"""A method edits a frozen backbone at its sites; what it creates or opens there is what gets tuned."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ris_bench.backbones.base import Backbone, Features, Known, Site
from ris_bench.errors import UserError
from ris_bench.registry import Registry

METHODS = Registry("method", "ris_bench.methods")


class Method(nn.Module):
    """An injection onto a frozen backbone: the constructor edits it, and its keyword-only arguments are the options."""

    identity_at_start = False
    """Whether the method promises that before training it computes what `frozen` computes."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()

    def forward(self, backbone: Backbone, image: Tensor | Known, tokens_BL: Tensor) -> Features:
        """Run the backbone; overridden only to change how the towers meet.

        What is given for `image` may be passed to `Backbone.encode_image` and `ImageTower.step` alone. What modules
        inside a tower have to know of the other is told by a `contextvars.ContextVar`: of an attribute nothing would be
        left where they are computed again in the backward pass.
        """
        return backbone(image, tokens_BL)

    def merge(self, backbone: Backbone) -> None:
        """Fold all changes of weights (`Site.reparametrize`) into the weights, where they cost nothing more.

        What else the method has put into the backbone stays there: nobody can fold that. UserError where a change that
        could be folded in cannot.
        """
        for module in list(backbone.modules()):
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


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


class Residual(nn.Module):
    """`x + branch(x)`."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


Hidden = int | float
"""The option of a hidden width: so many channels, or as a float that fraction of the width of each place."""


def hidden_channels(hidden: Hidden, site: Site) -> int:
    """The channels that an option means at a site. UserError where there is none."""
    channels = hidden if isinstance(hidden, int) else round(hidden * site.width)
    if channels < 1 or (isinstance(hidden, float) and hidden >= 1):
        raise UserError(
            f"a hidden width of {hidden} is not possible at {site.kind!r}, {site.width} channels wide: "
            "give a positive number of channels, or a fraction below 1.0 that leaves one"
        )
    return channels


def bottleneck(
    width: int, hidden: int, out_width: int, activation: nn.Module, *, on_maps: bool, bias: bool
) -> nn.Sequential:
    """Down, activation, up: linear layers on tokens (B, N, C), 1x1 convolutions on maps (B, C, H, W)."""

    def layer(before: int, after: int) -> nn.Module:
        return nn.Conv2d(before, after, 1, bias=bias) if on_maps else nn.Linear(before, after, bias=bias)

    return nn.Sequential(layer(width, hidden), activation, layer(hidden, out_width))
