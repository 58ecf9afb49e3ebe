"""A method edits a frozen backbone at its sites; what it creates or opens there is what gets tuned."""

from __future__ import annotations

from torch import Tensor, nn

from ris_bench.backbones.base import Backbone, Features
from ris_bench.registry import Registry

METHODS = Registry("method", "ris_bench.methods")


class Method(nn.Module):
    """An injection onto a frozen backbone: the constructor edits it, and its keyword-only arguments are the options."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()

    def forward(self, backbone: Backbone, image_B3HW: Tensor, tokens_BL: Tensor) -> Features:
        """Run the backbone; overridden only to change how the towers meet."""
        return backbone(image_B3HW, tokens_BL)
