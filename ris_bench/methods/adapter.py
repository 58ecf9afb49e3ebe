"""Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019. arXiv:1902.00751."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn

from ris_bench.backbones.base import Backbone
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Hidden, Method, Residual, Serial, bottleneck, hidden_channels


@METHODS("adapter")
class Adapter(Method):
    """`h + W2 g(W1 h + b1) + b2` on what a branch returns, before it is added to its input (section 2.1, figure 2).

    It stands at the MLP of every transformer block, with `placement: both` at its attention too, as in the paper; in a
    ResNet, which the paper does not treat, at the branch of every bottleneck, after its last norm, as 1x1 convolutions;
    with `pool_hidden` also at the attention pool, after its ReLU. In DINOv2 the block's LayerScale follows it. A hidden
    width of 0 means none there; `image_hidden: null` is 24 in a ResNet and 64 in a ViT.

    Layers as in google-research/adapter-bert modeling.py:321-360, GELU by tanh, but ReLU on maps. Initialisation as in
    the paper's section 3.6, normal with deviation 0.01 cut at two deviations (0.001 in the code), biases zero, but zero
    for W2 on maps. It deviates in having one adapter per block by default, where paper and code have two, and in
    leaving LayerNorms frozen, which adapter-bert optimization.py:71-73 trains.

    Published counts say nothing about places and widths; these are consistent with them, not proved by them. 2.39M on
    CLIP R101: the defaults, 2,387,224; `{text_hidden: 32, placement: both}`, 2,393,368; `{text_hidden: 0, image_hidden:
    0.03125, pool_hidden: 16, bias: false}`, 2,387,968. 1.98M on DINOv2-B: the defaults, 1,982,976; `{text_hidden: 40,
    image_hidden: 80}`, 1,982,880.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        text_hidden: Hidden = 64,
        image_hidden: Hidden | None = None,
        pool_hidden: Hidden = 0,
        placement: Literal["ffn", "both"] = "ffn",
        bias: bool = True,
    ) -> None:
        super().__init__(backbone)
        on_maps = backbone.image.convolutional
        if image_hidden is None:
            image_hidden = 24 if on_maps else 64
        if not (text_hidden or image_hidden or pool_hidden):
            raise UserError("method 'adapter' has no hidden width but 0: one must be positive")
        branches = ("attention", "ffn") if placement == "both" else ("ffn",)
        places = [(kind, "text", text_hidden) for kind in branches]
        places += [(kind, "image", image_hidden) for kind in (("bottleneck",) if on_maps else branches)]
        places += [("pool", "image", pool_hidden)]
        for kind, tower, hidden in places:
            for site in backbone.sites(kind, (tower,)) if hidden else ():
                layers = adapter(site.width, hidden_channels(hidden, site), on_maps and tower == "image", bias)
                site.wrap(partial(Serial, after=layers))


def adapter(width: int, hidden: int, on_maps: bool, bias: bool) -> Residual:
    activation = nn.ReLU() if on_maps else nn.GELU("tanh")
    layers = bottleneck(width, hidden, width, activation, on_maps=on_maps, bias=bias)
    for layer in (layers[0], layers[2]):
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        if bias:
            nn.init.zeros_(layer.bias)
    if on_maps:
        # No norm follows a ResNet's shortcut: what its bottlenecks add at the start would pile up.
        nn.init.zeros_(layers[2].weight)
    return Residual(layers)
